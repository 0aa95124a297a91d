"""Pictures from a checkpoint folder, which is all it needs: t2i, inpaint, outpaint, erase, edit.

    python sample.py inpaint --ckpt assets/base --image a.png --mask m.png --prompt "a small red star"
    python sample.py outpaint --ckpt assets/base --image a.png --aspect 16:9     # no prompt: prompt-free
    python sample.py erase --ckpt out/pefl --image photos/ --out out/erased      # masks: photos/NAME.mask.png
    python sample.py inpaint --ckpt out/pefl --jsonl edits.jsonl --num_samples 4 --seed 7
    torchrun --nproc_per_node=8 sample.py t2i --ckpt out/base --jsonl prompts.jsonl   # a share for each rank
    python sample.py t2i --ckpt stable-diffusion-3-medium/ --prompt "a red fox" --steps 28 --guidance 7
    python sample.py edit --ckpt out/editnet --image a.png --instruction "make it snow" "remove the red star"
    python sample.py edit --ckpt out/editnet --jsonl GEdit-Bench --out out/gedit  # the scorer's tree

A picture of any size is fitted, without squashing, into a shape the model was trained at, and comes back at
its own size: the generated region is scaled up and pasted into the original, whose pixels outside a soft seam
stay the same, bit for bit. --out also gets samples.jsonl (a row per result: input, prompt, seed, settings)
and the contact sheet sheet.png.

--crop: a hole in a large photo is worked on in a window around it (windows.py), holes far apart in windows
of their own, a large or long one (the rim of an outpainting) once more in tiles that overlap and add detail.
"auto" does so when it gives the hole more pixels (not with --paste False: that is of the whole picture),
"mask" always, "none" never. The prompt counts for every window.

Pictures in another colour space (Display P3, CMYK, ...) are converted, results are sRGB and say so. A picture
with alpha is shown to the model on white, and comes back with its alpha as it was (opaque where outpainting
adds to it); of an animation the first frame is used.

edit follows instructions. Several are a chain, each editing the result before; with a mask only what is white
may change. --jsonl: lines {source, instruction or instructions, mask, seed, key, task}, or a benchmark's own
files: GEdit-Bench's or Emu Edit's Arrow folder or parquet, ImgEdit's basic_edit.json, PIE-Bench's
mapping_file.json, MagicBrush's edit_sessions.json, with --image as the folder of their pictures. --layout
names the results as a benchmark's scorer expects; `evaluate.py bench` scores them.
"""

import json
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as td
import tyro
from PIL import Image, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

import common
import flow
import log
import masks
import model
import pipeline
import windows
from data import bucket, shapes
from pipeline import from_work, to_work
from readers.benchmarks import complete_edit, json_rows, jsonl_rows, kept, table_rows, unique
from readers.files import (
    MAX_PIXELS,
    MAX_SIDE,
    SUFFIXES,
    bad_name,
    clean_caption,
    over_white,
    photo_of,
    picture_cell,
    pictures_of,
    printable,
    read_image,
    read_mask,
    text_of,
)


@dataclass
class Config:
    task: tyro.conf.Positional[Literal["t2i", "inpaint", "outpaint", "erase", "edit"]]  # what to make
    ckpt: Annotated[str, tyro.conf.arg(aliases=["--init", "--base"])]  # a run, a step of it, or SD3 weights
    sd3: str | None = None  # SD3's VAE and text encoders; None = those --ckpt is or came with
    tokenizers: str | None = None  # folder with tokenizer, tokenizer_2, tokenizer_3, where --sd3 is one file
    out: str = "out/samples"  # folder for the results, samples.jsonl, sheet.png; overwrites earlier ones
    image: str | None = None  # picture, or a folder of them (broken ones are then skipped and counted)
    mask: str | None = None  # white = regenerate; file or folder of NAME.png; default NAME.mask.png beside it
    prompt: str | None = None  # what to draw, "" = prompt-free; default NAME.txt beside NAME, for outpaint ""
    instruction: tuple[str, ...] = ()  # edit: what to change; several are turns; default: lines of NAME.txt
    jsonl: str | None = None  # instead of --image: lines {image, mask, prompt, seed, ...}; paths from there
    left: int | None = None  # outpaint: pixels to add on this side
    right: int | None = None  # outpaint: pixels to add on this side
    top: int | None = None  # outpaint: pixels to add on this side
    bottom: int | None = None  # outpaint: pixels to add on this side
    aspect: str | None = None  # outpaint: grow to this width:height, such as 16:9, around the picture
    height: int | None = None  # t2i: height of the result in pixels; default --size
    width: int | None = None  # t2i: width of the result in pixels; default --size
    num_samples: int = 1  # results per input, each from its own noise
    seed: int = 0  # noise of result k of an input = f(seed, k), whatever the batch and the other inputs
    steps: int = 20  # sampler steps (ByteEdit: 20 for the base, 8 once accelerated)
    guidance: float | None = None  # classifier-free guidance; default 1 (off, as PeFL trains), for edit 2
    image_guidance: float = 1.5  # edit: the same towards the source picture; 1 = off
    solver: Literal["euler", "heun", "dpm"] = "euler"  # heun, dpm: second order; heun calls twice a step
    shift: float | None = None  # moves the sampler's times towards noise; default the checkpoint's
    size: int | None = None  # working size: side of a square of equal area; default the checkpoint's
    crop: Literal["auto", "mask", "none"] = "auto"  # windows around the mask: if larger there, always, never
    seam: int = 2  # width in pixels in which generated fades to original at the mask; 0 = hard paste
    blend: Literal["none", "every", "alternate"] = "none"  # put what is kept back after every (second) step
    paste: bool = True  # edit with a mask: the rest of the original untouched; False: as the model made it
    layout: Literal["flat", "gedit", "imgedit", "magicbrush", "pie", "emu"] | None = None  # default --jsonl's
    weights: Literal["auto", "ema", "model"] = "auto"  # auto: the averaged ones where the checkpoint has them
    batch_size: int = 16  # results sampled together: speed and memory only
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast where the hardware has it
    device: str = "auto"  # auto, cpu, cuda, cuda:N


SIDES = ("left", "right", "top", "bottom")
TAKES = {  # what each task takes; flags of another task are refused, keys of a JSONL line ignored
    "t2i": ("prompt", "height", "width"),
    "inpaint": ("image", "mask", "prompt"),
    "outpaint": ("image", "prompt", *SIDES, "aspect"),
    "erase": ("image", "mask"),
    "edit": ("image", "mask", "instruction", "image_guidance", "paste", "layout"),
}
NEEDS = {task: ("draw",) if task == "t2i" else ("follow",) if task == "edit" else ("fill",) for task in TAKES}
# Default of --guidance, else 1 (RESULTS.md, "The gate"). For large models: InstructPix2Pix 7.5, CosXL-Edit 5
GUIDANCE = {"edit": 2.0}
TILE = 0.2  # share of the steps that a tile goes through, from the noise it starts with (default ours)
SHEET_ROWS, SHEET_RESULTS, THUMB = 24, 8, 256  # contact sheet: inputs, results of each, longest side


def main(cfg: Config) -> None:
    # 1) what was asked for, before anything is loaded
    check(cfg)
    if cfg.guidance is None:
        cfg = replace(cfg, guidance=GUIDANCE.get(cfg.task, 1.0))
    items, bad_lines = list_edits(cfg) if cfg.task == "edit" else list_items(cfg)
    many = bool(cfg.jsonl) or Path(cfg.image or "").is_dir()
    dist = common.setup(cfg.device)
    bf16 = common.use_bf16(cfg.precision, dist)
    cfg = replace(cfg, precision=common.PRECISION[bf16])  # as samples.jsonl has it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # setup() defers it for loops that save; this one need not
    out = prepare_out(cfg, items, dist)

    # 2) editor, and the shapes it knows. A text-to-image result is not cut out of a square: positions that
    #    the model has not seen are the lesser evil
    pipe = pipeline.open_editor(cfg.ckpt, dist.device, NEEDS[cfg.task], which=cfg.weights, sd3=cfg.sd3,
                                tokenizers=cfg.tokenizers)
    net, space, manifest = pipe.net, pipe.space, pipe.manifest
    if bf16:
        model.half_linears(net)
    net.to(dist.device).eval().requires_grad_(False)
    shift = pipe.shift if cfg.shift is None else cfg.shift
    size = working_size(cfg, pipe.size, net.cfg.patch * space.stride)
    aspects = bool(manifest.get("config", {}).get("aspects")) or cfg.task == "t2i"
    common.print0(f"{cfg.task}: {common.n_params(net) / 1e6:.1f} M parameters, step {manifest['step']}, "
                  f"{dist.device}, {len(items)} input(s), worked on at {size}x{size} or a shape of that area")

    # 3) sample: a few batches of inputs at a time, those of one shape together
    mine = items[dist.rank::dist.world]
    calls = 2 * cfg.steps - 1 if cfg.solver == "heun" else cfg.steps
    evaluations = sum(len(item["files"]) for item in mine) * cfg.num_samples * calls
    bar = log.progress(evaluations, desc=f"{cfg.task} steps", dist=dist)
    settings = dict(ts=flow.timesteps(cfg.steps, shift), guidance=cfg.guidance, solver=cfg.solver,
                    image_guidance=cfg.image_guidance, blend=cfg.blend, bf16=bf16)
    sheet, written, skipped = [], 0, 0
    for start in range(0, len(mine), 4 * cfg.batch_size):
        jobs = []
        for item in mine[start:start + 4 * cfg.batch_size]:
            try:
                job = load_job(item, cfg, size, net.cfg, space.stride, aspects)
                jobs.append(job)
            except SystemExit as e:
                if not many:
                    bar.leave = False
                    bar.close()
                    raise
                skipped += 1
                bar.total -= len(item["files"]) * cfg.num_samples * calls
                tqdm.write(f"skipped: {printable(str(e)).removeprefix('error: ')}")
        bar.total += sum(extra(job, cfg) for job in jobs) * cfg.num_samples
        todo = [(job, k) for job in jobs for k in range(cfg.num_samples)]
        while todo:  # a second time and more for further windows, and for chains of instructions
            later = []
            for batch in batches(todo, cfg.batch_size):
                jobs_here = [job for job, _ in batch]
                mask, image = (torch.stack([getattr(job, name) for job in jobs_here])
                               for name in ("mask_in", "masked"))
                gens = [common.generators(job.seed, job.place, [k])[0] for job, k in batch]
                noise = common.randn(gens, (space.channels, *(side // space.stride
                                                              for side in mask.shape[2:])))
                how = settings | {"tick": lambda: bar.update(len(batch))}
                if jobs_here[0].window.tile:
                    how["begin"] = torch.stack([job.begin for job in jobs_here])
                    how["ts"] = settings["ts"][-1 - tile_steps(cfg):]
                x0 = pipeline.sample(net, space, [job.prompt for job in jobs_here], mask, image, noise, **how)
                if not x0.isfinite().all():
                    raise SystemExit(f"error: {cfg.ckpt}: the model gave NaN: try --precision fp32")
                for (job, k), picture in zip(batch, x0.cpu()):
                    job = place(picture, job)
                    if job.windows:
                        later.append((to_window(job), k))
                        continue
                    result = finish(job, cfg.seam, cfg.paste)
                    save(out, job, k, result, cfg, {"shift": shift, "step": manifest["step"]})
                    written += 1
                    if k < SHEET_RESULTS:
                        job.results[k, job.turn] = thumb(result)
                    if job.turn + 1 < len(job.item["files"]):
                        later.append((next_turn(job, result, cfg, size), k))
                        bar.total += extra(later[-1][0], cfg)
            todo = later
        sheet += [row for job in jobs[:SHEET_ROWS - len(sheet)] for row in sheet_rows(job)]
    bar.close()

    # 4) contact sheet and the count, from all ranks
    if dist.world > 1:
        everyone = [None] * dist.world
        td.all_gather_object(everyone, (sheet, written, skipped))
        sheet = [row for part in everyone for row in part[0]][:SHEET_ROWS]
        written, skipped = (sum(part[i] for part in everyone) for i in (1, 2))
    skipped += bad_lines
    if not written:
        raise SystemExit(f"error: {cfg.jsonl or cfg.image}: all {skipped} inputs skipped: see above")
    if dist.rank == 0:
        row_titles, rows = [title for title, _ in sheet], [row for _, row in sheet]
        titles = [] if cfg.task == "t2i" else ["picture", "mask"]
        if cfg.task == "edit" and not any(overlay for _, overlay, *_ in rows):
            titles, rows = ["picture"], [[row[0], *row[2:]] for row in rows]
        count = max(map(len, rows)) - len(titles)
        if any(len(item["files"]) > 1 for item in items):
            titles += [f"turn {turn}" for turn in range(1, count + 1)]
        else:
            titles += [f"result {k}" for k in range(count)] if count > 1 else ["result"]
        write(out, "sheet.png", log.contact_sheet(rows, titles, row_titles))
        common.print0(f"{written} result(s) in {out}, {skipped} input(s) skipped")
        common.print0(f"contact sheet: {out / 'sheet.png'}")
    common.cleanup()


def batches(pairs: list[tuple["Job", int]], batch_size: int) -> Iterator[list[tuple["Job", int]]]:
    """All (job, sample number) by working shape, tiles apart, at most batch_size at once."""
    def shape(pair: tuple["Job", int]) -> tuple:
        return pair[0].window.tile, pair[0].mask_in.shape

    for _, group in groupby(sorted(pairs, key=shape), shape):
        group = list(group)
        for i in range(0, len(group), batch_size):
            yield group[i:i + batch_size]


# ---- what is asked for ---------------------------------------------------------------------------


def check(cfg: Config) -> None:
    """SystemExit on a number out of range or flags that exclude each other."""
    common.check_bounds(cfg, at_least_1=("steps", "num_samples", "batch_size", "size"), above_0=("shift",),
                        not_negative=("seam", "guidance", "image_guidance"))
    default = {f.name: f.default for f in fields(cfg)}
    for name in sorted(set().union(*TAKES.values()) - set(TAKES[cfg.task])):
        if getattr(cfg, name) != default[name]:
            raise SystemExit(f"error: --{name}: {getattr(cfg, name)}: not used by {cfg.task}: leave it out")
    if cfg.blend != "none" and cfg.task == "t2i":
        raise SystemExit(f"error: --blend: {cfg.blend}: t2i has no known region: leave it out")
    alone = cfg.task == "edit" and cfg.image and not (cfg.jsonl or Path(cfg.image).is_dir())
    if cfg.blend != "none" and alone and not (cfg.mask or has_mask(cfg.image)):
        raise SystemExit(f"error: --blend: {cfg.blend}: puts back what is outside a region: give --mask, or "
                         "leave it out")
    if cfg.jsonl and cfg.image and not (cfg.task == "edit" and Path(cfg.image).is_dir()):
        raise SystemExit(f"error: --jsonl: {cfg.jsonl}: not together with --image: give one of them")


def complete(item: dict, task: str) -> dict:
    """The item with its prompt filled in; ValueError names the flag and what is wrong."""
    for key, value in item.items():
        number = key in (*SIDES, "height", "width", "seed")
        if value is not None and (type(value) is not int if number else not isinstance(value, str)):
            raise ValueError(f"{key}: {value!r}: give {'an integer' if number else 'a text'}")
        low = key not in SIDES
        if number and key != "seed" and value is not None and not low <= value <= MAX_SIDE:
            raise ValueError(f"{key}: {value}: must be between {int(low)} and {MAX_SIDE}")
    if "image" in item and not item["image"]:
        raise ValueError(f"image: missing: {task} needs a picture")
    for key in ("image", "mask"):
        if item.get(key) and (problem := bad_name(item[key])):
            raise ValueError(f"{key}: {problem}: correct it")
    if task == "outpaint":
        sides = [item[side] for side in SIDES if item[side] is not None]
        if item["aspect"] is not None and sides:
            raise ValueError(f"aspect: {item['aspect']}: not together with {'/'.join(SIDES)}: give one")
        if item["aspect"] is None and not any(sides):
            raise ValueError(f"aspect: missing: nothing to add: give it, or some of {', '.join(SIDES)}")
        if item["aspect"] is not None:
            ratio(item["aspect"])
    if task == "erase":
        return item | {"prompt": masks.ERASE_PROMPT}
    prompt = item["prompt"]
    if prompt is None and task != "t2i" and (beside := Path(item["image"]).with_suffix(".txt")).is_file():
        prompt = text_of(beside.read_bytes())
    if prompt is None and task != "outpaint":
        raise ValueError(f'prompt: missing for {item.get("image", task)}: say what to draw, "" = prompt-free')
    return item | {"prompt": clean_caption(prompt or "")[0]}


def ratio(text: str) -> float:
    """"16:9" or "1.78" -> width / height; ValueError."""
    m = re.fullmatch(r"(\d+\.?\d*)(?::(\d+\.?\d*))?", text.strip())
    width, height = (float(m[1]), float(m[2] or 1)) if m else (0, 0)
    if not (width and height):
        raise ValueError(f"aspect: {text}: must be width:height, such as 16:9")
    return width / height


def list_items(cfg: Config) -> tuple[list[dict], int]:
    """-> dicts of TAKES[task], prompt, seed, name and [name] of the result (unique, safe); bad lines."""
    base = {key: getattr(cfg, key) for key in (*TAKES[cfg.task], "seed")}
    bad = 0
    try:
        if cfg.jsonl:
            path = Path(cfg.jsonl)
            items, bad = kept(jsonl_rows(path), lambda row: complete(from_row(row, base, path), cfg.task))
        elif cfg.image and Path(cfg.image).is_dir():
            items = [complete(base | {"image": p}, cfg.task) for p in files_in(cfg.image)]
        else:
            if (path := base.get("image")) and not bad_name(path) and not Path(path).exists():
                raise ValueError(f"image: {path}: no such file or folder: correct the path")
            items = [complete(base, cfg.task)]
    except ValueError as e:
        raise SystemExit(f"error: --{e}") from None
    if not items:
        raise SystemExit(f"error: {cfg.jsonl or cfg.image}: nothing to do, {bad} bad lines: give pictures")
    used = set()
    for item in items:
        item["name"] = unique(Path(item["image"]).stem if "image" in item else item["prompt"], cfg.task, used)
        item["files"] = [item["name"]]
    return items, bad


def files_in(folder: str) -> list[str]:
    """The pictures of a folder, but for masks; what else is in it is counted by kind."""
    files = sorted(str(p) for p in Path(folder).iterdir()
                   if p.is_file() and not p.stem.endswith(".mask") and not p.name.startswith("."))
    pictures, left = pictures_of(files)
    if left:
        common.print0(f"note: {printable(folder)}: {left}")
    return pictures


def from_row(row: dict, base: dict, path: Path) -> dict:
    """`base` with what a line of the JSONL file `path` says instead; its paths start at the file."""
    item = base | {key: row[key] for key in base if key in row}
    for key in {"image", "mask"} & item.keys() & row.keys():
        item[key] = str(path.parent / item[key]) if isinstance(item[key], str) else item[key]
    return item


def result_file(item: dict, name: str, k: int, num_samples: int) -> str:
    """Every result is a PNG; PIE-Bench's scorer wants its under .jpg names, and reads what is inside."""
    return (f"{name}_{k}" if num_samples > 1 else name) + item.get("suffix", ".png")


def prepare_out(cfg: Config, items: list[dict], dist: common.Dist) -> Path:
    """Make --out and start samples.jsonl anew; refuses to write over an input."""
    out = Path(cfg.out)
    if dist.rank == 0:
        files = {result_file(item, name, k, cfg.num_samples) for item in items for name in item["files"]
                 for k in range(cfg.num_samples)} | {"samples.jsonl", "sheet.png"}
        files |= {item["shown"] for item in items if "shown" in item}
        listed = {item["key"]: item["listed"] for item in items if "listed" in item}
        files |= {"basic_edit.json"} if listed else set()
        inputs = {cfg.jsonl, *(p for item in items for p in (item.get("image"), item.get("mask"))),
                  *(p for item in items for p in item.get("masks", ()))}
        for p in (Path(p).resolve() for p in inputs if isinstance(p, str)):
            if p.is_relative_to(out.resolve()) and str(p.relative_to(out.resolve())) in files:
                raise SystemExit(f"error: --out: {out}: would overwrite the input {p.name}: give another")
        try:
            for folder in {(out / name).parent for name in files}:
                folder.mkdir(parents=True, exist_ok=True)
            (out / "samples.jsonl").write_text("")
            if listed:
                (out / "basic_edit.json").write_text(json.dumps(listed, indent=1))
        except OSError as e:
            raise SystemExit(f"error: --out: {out}: {e.strerror}: give a writable folder") from None
    if dist.world > 1:
        td.barrier()
    return out


# ---- edits, and the files of their benchmarks ----------------------------------------------------


def list_edits(cfg: Config) -> tuple[list[dict], int]:
    """-> dicts of image, masks, instructions and files (of each turn), seed, ... (`complete_edit`); bad rows.

    Rows come from --image and --instruction, from a JSONL file, or from a benchmark's own file.
    """
    path, layout, used, items, bad = Path(cfg.jsonl or ""), "flat", set(), [], 0
    root = Path(cfg.image) if cfg.jsonl and cfg.image else path.parent

    def make(row: dict) -> dict:
        return complete_edit(row, cfg.layout or layout, root, used, mask=cfg.mask, seed=cfg.seed,
                             instructions=cfg.instruction)

    try:
        if cfg.jsonl and (path.is_dir() or path.suffix in (".parquet", ".arrow")):
            layout, rows = table_rows(path)
            items, bad = kept(rows, make)
        elif cfg.jsonl and path.suffix == ".json":
            layout, root, rows = json_rows(path, root if cfg.image else None)
            items, bad = kept(rows, make)
        elif cfg.jsonl:
            items, bad = kept(jsonl_rows(path), make)
        elif cfg.image and Path(cfg.image).is_dir():
            items = [make({"image": p}) for p in files_in(cfg.image)]
        else:
            items = [make({"image": cfg.image})]
    except ValueError as e:
        raise SystemExit(f"error: --{e}") from None
    if not items:
        raise SystemExit(f"error: {cfg.jsonl or cfg.image}: nothing to do, {bad} bad rows: give edits")
    if (cfg.layout or layout) != "flat" and cfg.num_samples > 1:
        raise SystemExit(f"error: --num_samples: {cfg.num_samples}: the tree {cfg.layout or layout} has one "
                         "result per edit: leave it out, or give --layout flat")
    return items, bad


# ---- pictures in ---------------------------------------------------------------------------------


def working_size(cfg: Config, trained: int | None, stride: int) -> int:
    size = cfg.size or trained
    if not size:
        raise SystemExit(f"error: {cfg.ckpt}/manifest.json: it has no config.image_size: give --size")
    if size % stride:
        raise SystemExit(f"error: --size: {size}: must be a multiple of {stride}, the model's patch in "
                         "pixels")
    return size


@dataclass
class Job:
    """One input, at its own size, and the window of it that is worked on, as the model sees it."""

    name: str  # of the input, for messages and the contact sheet
    prompt: str
    seed: int
    source: np.ndarray | None  # uint8 [h0, w0, 3], the picture as it was read, on white
    canvas: np.ndarray  # uint8 [h, w, 3], the picture on white; for outpainting on its larger canvas
    mask: np.ndarray  # float32 [h, w], 1 = regenerate; for a free-form edit all ones
    hide: bool  # whether the model sees the picture with a hole, or (an edit) all of it
    windows: list[windows.Window]  # of the canvas, still to be worked on after the present one
    window: windows.Window
    layer: np.ndarray  # uint8 [h, w, 3], what was generated so far, elsewhere the canvas
    trust: np.ndarray  # float32 [h, w], 0 = still to be generated, 1 = done or not to be touched
    kept: np.ndarray  # the same as it was at first
    about: dict  # for samples.jsonl
    work: Callable[[int, int], tuple[int, int]]  # working shape of a window of (h, w)
    own: np.ndarray | None = None  # uint8 [h, w, 4], the canvas as it was read, if it has an alpha channel
    box: tuple[int, int, int, int] = ()  # top, left, height, width of the window within the working shape
    mask_in: Tensor | None = None  # [1, H, W] in {0, 1}, for an edit [0, 1]
    masked: Tensor | None = None  # [3, H, W], for an edit the whole picture
    begin: Tensor | None = None  # [3, H, W], what a tile starts from
    item: dict = field(default_factory=dict)
    turn: int = 0  # of a chain of instructions
    place: int = 0  # number of the window
    regions: list[tuple[np.ndarray, str | None]] = field(default_factory=list)  # edit: mask, file of turns
    results: dict[tuple[int, int], Image.Image] = field(default_factory=dict)  # sample, turn -> thumbnail


def load_job(item: dict, cfg: Config, size: int, arch: model.EditorConfig, stride: int, aspects: bool) -> Job:
    """Read one input; a token is patch * stride pixels. SystemExit (pictures.BadFile), one line, when it
    cannot be used."""
    task, source, about, regions, own = cfg.task, None, {}, [], None
    texts = item.get("instructions") or [item["prompt"]]
    if task == "t2i":
        canvas = np.zeros((item["height"] or size, item["width"] or size, 3), np.uint8)
        mask = np.ones(canvas.shape[:2], np.float32)
    elif isinstance(item["image"], str):
        canvas = read_image(item["image"], alpha=True, log=common.print0)
        about["image"] = str(Path(item["image"]).resolve())
    else:
        groups, n = item["image"]
        file, about["image"], (cell,) = groups.row(n)
        canvas = read_image(picture_cell(cell, file, about["image"]), about["image"], alpha=True,
                            log=common.print0)
    source = None if task == "t2i" else on_white(canvas)
    if task == "outpaint":
        canvas, mask, sides = extend(canvas, item)
        about |= sides
        common.print0(f"{printable(item['image'])}: {source.shape[1]}x{source.shape[0]} grows to "
                      f"{canvas.shape[1]}x{canvas.shape[0]}, regenerates {mask.mean():.1%}")
    elif task == "edit":
        regions = find_regions(item, *source.shape[:2])
        mask = regions[0][0]
    elif task != "t2i":
        mask, path = find_mask(item, *source.shape[:2])
        about["mask"] = str(path.resolve())
    if canvas.shape[2] == 4:
        own, canvas = canvas, on_white(canvas)
        clear = float((own[..., 3] == 0)[mask > 0].mean())
        if clear > 0.01 and (mask < 1).any():
            common.print0(f"note: {printable(item['name'])}: {clear:.0%} of what is regenerated is "
                          "transparent, and stays so")
    if arch.txt_bytes and any(len(text.encode(errors="replace")) > arch.txt_bytes for text in texts):
        common.print0(f"note: {printable(item['name'])}: the model reads {arch.txt_bytes} bytes of the "
                      "prompt")
    token = arch.patch * stride

    def work(h: int, w: int) -> tuple[int, int]:
        H, W = bucket(h, w, size, token, aspects)
        if task == "edit" and aspects:  # it must not go to the margin: rather a shape between two buckets
            H, W = shapes(size, token, (min(max(h / w, 1 / 4), 4),))[0]
        if max(H, W) > arch.pos_max * token:
            name = printable(item["name"])
            raise SystemExit(f"error: --size: {size}: {name} needs {W}x{H}, the model takes at most "
                             f"{arch.pos_max * token} a side: give a smaller --size")
        return H, W

    job = Job(item["name"], texts[0], item["seed"], source, canvas, mask, task != "edit", [],
              windows.Window(0, 0, *mask.shape), canvas, mask, mask, about, work, own, item=item,
              regions=regions)
    return start(job, cfg, size)


def start(job: Job, cfg: Config, size: int) -> Job:
    """The windows in which a picture is worked on, and the first of them, of `size` pixels at least."""
    shape, found = job.mask.shape, [windows.Window(0, 0, *job.mask.shape)]
    if cfg.crop == "mask" or cfg.crop == "auto" and cfg.paste and cfg.task != "t2i":
        near = windows.plan(job.mask, size)
        sizes = [(h, w) for _, _, h, w, _ in (*found, *near)]
        scale = [min(1, *(a / b for a, b in zip(job.work(*size), size))) for size in sizes]
        if cfg.crop == "mask" or max(scale[1:]) > scale[0]:
            found = near
    if len(found) > 1 or found[0][2:4] != shape:
        sizes = ", ".join(f"{n} of {w}x{h}" + " in tiles" * tile for (h, w, tile), n in
                          Counter(w[2:] for w in found).items())
        common.print0(f"{printable(job.name)}: {shape[1]}x{shape[0]} is worked on in windows: {sizes}")
    kept = np.zeros(shape, np.float32)
    if cfg.paste:
        kept[~masks.dilate(job.mask > 0, cfg.seam)] = 1
    return to_window(replace(job, windows=found, window=found[0], layer=job.canvas, trust=kept, kept=kept,
                             place=-1))


def to_window(job: Job) -> Job:
    """The job at the next of its windows: what the model is given of it."""
    window, *rest = job.windows
    at, begin, work = cut(window), None, job.work(*window[2:4])
    trust = job.kept if window.tile and not job.window.tile else job.trust  # tiles go over it all again
    mask = np.where(trust[at] < 0.5, job.mask[at], 0)
    box, mask_in, masked = to_work(job.layer[at], mask, *work, hide=job.hide)
    if window.tile:
        begin = to_work(job.layer[at], mask, *work, hide=False)[2]
    return replace(job, windows=rest, window=window, place=job.place + 1, trust=trust, box=box,
                   mask_in=mask_in, masked=masked, begin=begin)


def extra(job: Job, cfg: Config) -> int:
    """Evaluations that the windows after the first take."""
    steps = [tile_steps(cfg) if w.tile else cfg.steps for w in job.windows]
    return sum(n if cfg.solver == "euler" else 2 * n - 1 for n in steps)


def tile_steps(cfg: Config) -> int:
    """How many of the last steps a tile goes through."""
    return max(1, round(TILE * cfg.steps))


def cut(window: windows.Window) -> tuple[slice, slice]:
    top, left, h, w, _ = window
    return slice(top, top + h), slice(left, left + w)


def next_turn(job: Job, result: np.ndarray, cfg: Config, size: int) -> Job:
    """The next instruction of a chain, on the result of this one, with the same noise: as if run alone."""
    turn = job.turn + 1
    own = result if job.own is not None else None
    return start(replace(job, prompt=job.item["instructions"][turn], turn=turn, canvas=on_white(result),
                         mask=job.regions[turn][0], own=own), cfg, size)


def on_white(picture: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3], or [h, w, 4] put on white."""
    return over_white(picture[..., :3], picture[..., 3]) if picture.shape[2] == 4 else picture


def extend(picture: np.ndarray, item: dict) -> tuple[np.ndarray, np.ndarray, dict]:
    """Outpainting: uint8 [h, w, 3 or 4] -> grey canvas with the picture on it (opaque around it), its mask,
    pixels added per side."""
    h, w = picture.shape[:2]
    add = {side: item[side] or 0 for side in SIDES}
    if item["aspect"] is not None:
        r = ratio(item["aspect"])
        more_w, more_h = max(0, round(min(h * r, 1e9)) - w), max(0, round(min(w / r, 1e9)) - h)
        if not (more_w or more_h):
            raise SystemExit(f"error: {item['image']}: is {item['aspect']} already: give another --aspect")
        add = dict(zip(SIDES, (more_w // 2, more_w - more_w // 2, more_h // 2, more_h - more_h // 2)))
    height, width = h + add["top"] + add["bottom"], w + add["left"] + add["right"]
    if height * width > MAX_PIXELS or max(height, width) > MAX_SIDE:
        raise SystemExit(f"error: {item['image']}: would grow to {width}x{height}, over the cap of "
                         f"{MAX_PIXELS:,} pixels, {MAX_SIDE:,} a side: add less")
    inner = slice(add["top"], add["top"] + h), slice(add["left"], add["left"] + w)
    canvas = np.full((height, width, picture.shape[2]), 128, np.uint8)
    canvas[..., 3:], mask = 255, np.ones((height, width), np.float32)
    canvas[inner], mask[inner] = picture, 0
    return canvas, mask, add


def find_mask(item: dict, h: int, w: int) -> tuple[np.ndarray, Path]:
    """Mask of an item -> float32 [h, w], its path. One of another size but the same aspect is scaled."""
    image = Path(item["image"])
    if item["mask"] and not Path(item["mask"]).is_dir():
        choices = [Path(item["mask"])]
    elif item["mask"]:
        choices = [Path(item["mask"]) / f"{image.stem}{suffix}" for suffix in (".png", *SUFFIXES)]
    else:
        choices = [image.with_name(f"{image.stem}.mask{suffix}") for suffix in (".png", *SUFFIXES)]
    path = next((p for p in choices if p.is_file()), None)
    if path is None:
        raise SystemExit(f"error: {choices[0]}: no such mask for {image}: give --mask, or put "
                         f"{image.stem}.mask.png beside the picture")
    photo = photo_of(image) if image.is_file() else (1, (h, w))  # else it is inside a parquet
    mask = read_mask(path, h, w, log=common.print0, photo=photo)
    mask[mask < 0.02] = 0  # black saved as JPEG is not quite black, and unmasked means untouched
    return mask, path


def has_mask(image: str) -> bool:
    """Is there a mask beside the picture: NAME.mask.png?"""
    return any(Path(image).with_suffix(f".mask{suffix}").is_file() for suffix in SUFFIXES)


def find_regions(item: dict, h: int, w: int) -> list[tuple[np.ndarray, str | None]]:
    """(mask, its path) of every turn of an edit; without one, ones and None: a free-form edit."""
    image, found = item["image"] if isinstance(item["image"], str) else item["key"], {}
    for name in dict.fromkeys(item["masks"]):
        if name or has_mask(image):
            mask, path = find_mask({"image": image, "mask": name}, h, w)
            found[name] = mask, str(path.resolve())
        else:
            found[name] = np.ones((h, w), np.float32), None
    return [found[name] for name in item["masks"]]


# ---- pictures out --------------------------------------------------------------------------------


def place(x0: Tensor, job: Job) -> Job:
    """Sampled x0 [3, H, W] of a window -> the job with it in its layer, where nothing better is.

    Where windows overlap the earlier fades into the later, as the trust in it falls towards its border."""
    x = from_work(x0, job.box, *job.window[2:4])
    at, layer, trust = cut(job.window), job.layer.copy(), job.trust.copy()
    mine = windows.trust(job.window, job.mask.shape)
    b = (mine * (1 - trust[at]) / np.maximum(mine * (1 - trust[at]) + trust[at], 1e-6))[..., None]
    layer[at] = (b * x + (1 - b) * layer[at] + 0.5).astype(np.uint8)
    trust[at] = np.maximum(trust[at], mine)
    return replace(job, layer=layer, trust=trust)


def finish(job: Job, seam: int, paste: bool = True) -> np.ndarray:
    """All windows done -> uint8 [h, w, 3] at the input's size, and the input itself beyond the seam (with
    paste=False: nowhere); with the input's alpha [h, w, 4] if it has one."""
    a = np.maximum(job.mask, ramp(job.mask >= 0.5, seam))[..., None] if paste else np.float32(1)
    kept = job.canvas if job.own is None else job.own[..., :3]
    rgb = (a * job.layer + (1 - a) * kept + 0.5).astype(np.uint8)
    return rgb if job.own is None else np.dstack([rgb, job.own[..., 3]])


def ramp(mask: np.ndarray, seam: int) -> np.ndarray:
    """bool [h, w] -> float32: 1 on the mask, falling to 0 within `seam` pixels around it.

    Grown, then averaged over squares of at most the same radius: exactly 1 and exactly 0 stay so. Takes the
    same time for every seam.
    """
    r = seam // 2
    total, count = masks.dilate(mask, seam - r).astype(np.int64), 1
    for axis in (0, 1):
        c = np.insert(np.cumsum(total, axis), 0, 0, axis)
        i = np.arange(mask.shape[axis])
        low, high = np.maximum(i - r, 0), np.minimum(i + r + 1, len(i))
        total = c.take(high, axis) - c.take(low, axis)
        count = count * np.expand_dims(high - low, 1 - axis)
    return (total / count).astype(np.float32)


def save(out: Path, job: Job, k: int, result: np.ndarray, cfg: Config, more: dict) -> None:
    """Write one result and append its row; several ranks append to one file, a line at a time."""
    file = result_file(job.item, job.item["files"][job.turn], k, cfg.num_samples)
    keys = ("task", "steps", "guidance", "solver", "seam", "blend", "weights", "precision", "ckpt")
    about = job.about | {"prompt": job.prompt}
    if cfg.task == "edit":
        keys += ("image_guidance", "paste")
        about = job.about | {"mask": job.regions[job.turn][1], "key": job.item["key"],
                             "edit_type": job.item["task"], "instruction": job.prompt, "turn": job.turn + 1}
    row = {"file": file, **about, "seed": job.seed, "sample": k,
           "height": result.shape[0], "width": result.shape[1], "work": list(job.mask_in.shape[1:]),
           "mask_area": round(float(job.mask.mean()), 4), "windows": job.place + 1,
           **{key: getattr(cfg, key) for key in keys}, **more}
    if "shown" in job.item and job.turn == 0:
        write(out, job.item["shown"], Image.fromarray(job.canvas if job.own is None else job.own))
    write(out, file, Image.fromarray(result), json.dumps(log.portable(row)) + "\n")


def write(out: Path, file: str, picture: Image.Image, row: str = "") -> None:
    srgb = PngImagePlugin.PngInfo()
    srgb.add(b"sRGB", b"\0")  # the chunk that says so; its intent: perceptual
    try:
        picture.save(out / file, "PNG", **{"pnginfo": srgb} if file != "sheet.png" else {})
        with open(out / "samples.jsonl", "a") as f:
            f.write(row)
    except OSError as e:
        raise SystemExit(f"error: {out / file}: {e.strerror or e}: free some space or give another "
                         "--out") from None


def thumb(picture: np.ndarray) -> Image.Image:
    """For the contact sheet: at most THUMB a side; tiny pictures magnified, their pixels visible."""
    im = Image.fromarray(on_white(picture) if picture.ndim == 3 else picture)
    im.thumbnail((THUMB, THUMB), Image.Resampling.LANCZOS)
    zoom = max(1, THUMB // 2 // max(im.size))
    return im.resize((im.width * zoom, im.height * zoom), Image.Resampling.NEAREST)


def sheet_rows(job: Job) -> list[tuple[str, list[Image.Image | None]]]:
    """Title and pictures of one input on the contact sheet: the picture, its mask in red, the results.

    A chain of instructions has a row for each of its samples, with all turns.
    """
    if job.source is None:
        return [(job.prompt, list(job.results.values()))]
    texts, overlay = job.item.get("instructions") or [job.prompt], None
    if not job.regions or job.regions[0][1]:
        overlay = thumb(job.canvas)
        tint = thumb((job.mask * 153 + 0.5).astype(np.uint8))
        overlay.paste((235, 45, 60), (0, 0), tint)
    title = ": ".join(filter(None, (job.name, ", then ".join(texts))))
    results = [job.results[place] for place in sorted(job.results)]
    n = len(texts) if len(texts) > 1 else len(results)
    return [(title, [thumb(job.source), overlay, *results[i:i + n]]) for i in range(0, len(results), n)]


if __name__ == "__main__":
    common.command(main, Config, __doc__, "the results written so far are kept")
