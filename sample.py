"""Pictures from a checkpoint folder, which is all it needs: t2i, inpaint, outpaint, erase.

    python sample.py inpaint --ckpt assets/base --image a.png --mask m.png --prompt "a small red star"
    python sample.py outpaint --ckpt assets/base --image a.png --aspect 16:9     # no prompt: prompt-free
    python sample.py erase --ckpt out/pefl --image photos/ --out out/erased      # masks: photos/NAME.mask.png
    python sample.py inpaint --ckpt out/pefl --jsonl edits.jsonl --num_samples 4 --seed 7
    torchrun --nproc_per_node=8 sample.py t2i --ckpt out/base --jsonl prompts.jsonl   # a share for each rank

A picture of any size is fitted, without squashing, into a shape the model was trained at, and comes back at
its own size: the generated region is scaled up and pasted into the original, whose pixels outside a soft seam
stay the same, bit for bit. --out also gets samples.jsonl (a row per result: input, prompt, seed, settings)
and the contact sheet sheet.png.
"""

import json
import math
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as td
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import common
import data
import flow
import masks
import model
import pictures


@dataclass
class Config:
    task: tyro.conf.Positional[Literal["t2i", "inpaint", "outpaint", "erase"]]  # what to make
    ckpt: str  # checkpoint folder: a run, one of its steps, or a shipped one such as assets/base
    out: str = "out/samples"  # folder for the results, samples.jsonl, sheet.png; overwrites earlier ones
    image: str | None = None  # picture, or a folder of them (broken ones are then skipped and counted)
    mask: str | None = None  # white = regenerate; file or folder of NAME.png; default NAME.mask.png beside it
    prompt: str | None = None  # what to draw, "" = prompt-free; default NAME.txt beside NAME, for outpaint ""
    jsonl: str | None = None  # instead of --image: lines {image, mask, prompt, seed, ...}; paths from there
    left: int | None = None  # outpaint: pixels to add on this side
    right: int | None = None  # outpaint: pixels to add on this side
    top: int | None = None  # outpaint: pixels to add on this side
    bottom: int | None = None  # outpaint: pixels to add on this side
    aspect: str | None = None  # outpaint: grow to this width:height, such as 16:9, around the picture
    height: int | None = None  # t2i: of the result, in pixels; default --size
    width: int | None = None  # t2i: of the result, in pixels; default --size
    num_samples: int = 1  # results per input, each from its own noise
    seed: int = 0  # noise of result k of an input = f(seed, k), whatever the batch and the other inputs
    steps: int = 20  # sampler steps (ByteEdit: 20 for the base, 8 once accelerated)
    guidance: float = 1.0  # classifier-free guidance; 1 = off, as PeFL trains; 3 helps a base, twice the time
    solver: Literal["euler", "heun"] = "euler"  # heun: second order, two evaluations a step
    shift: float | None = None  # moves the steps towards noise; default the checkpoint's
    size: int | None = None  # working resolution: side of the square of equal area; default the checkpoint's
    seam: int = 2  # pixels around the mask that fade from generated to original; 0 = hard paste
    keep_known: bool = False  # put the known region back at every step; the model is shown it anyway
    weights: Literal["auto", "ema", "model"] = "auto"  # auto: the averaged ones where the checkpoint has them
    batch_size: int = 16  # results sampled together: speed and memory only
    bf16: bool = True  # autocast; False: fp32 throughout
    device: str = "auto"  # auto, cpu, cuda, cuda:N


SIDES = ("left", "right", "top", "bottom")
TAKES = {  # what each task takes; flags of another task are refused, keys of a JSONL line ignored
    "t2i": ("prompt", "height", "width"),
    "inpaint": ("image", "mask", "prompt"),
    "outpaint": ("image", "prompt", *SIDES, "aspect"),
    "erase": ("image", "mask"),
}
SHEET_ROWS, SHEET_RESULTS, THUMB = 24, 8, 256  # contact sheet: inputs, results of each, longest side


def main(cfg: Config) -> None:
    # 1) what was asked for, before anything is loaded
    check(cfg)
    items, bad_lines = list_items(cfg)
    many = bool(cfg.jsonl) or Path(cfg.image or "").is_dir()
    dist = common.setup(cfg.device)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # setup() defers it for loops that save; this one need not
    out = prepare_out(cfg, items, dist)

    # 2) model, and the shapes it knows. A t2i result is not cut out of a square: rather unknown positions
    editor, manifest = load_editor(cfg)
    editor.to(dist.device).eval().requires_grad_(False)
    trained = manifest.get("config", {})
    shift = float(trained.get("shift", 1.0)) if cfg.shift is None else cfg.shift
    size = working_size(cfg, trained, editor.cfg.patch)
    aspects = bool(trained.get("aspects")) or cfg.task == "t2i"
    common.print0(f"{cfg.task}: {common.n_params(editor) / 1e6:.1f} M parameters, step {manifest['step']}, "
                  f"{dist.device}, {len(items)} input(s), worked on at {size}x{size} or a shape of that area")

    # 3) sample: a few batches of inputs at a time, those of one shape together
    mine = items[dist.rank::dist.world]
    calls = cfg.steps if cfg.solver == "euler" else 2 * cfg.steps - 1
    bar = common.progress(len(mine) * cfg.num_samples * calls, desc=f"{cfg.task} steps", dist=dist)
    sheet, written, skipped = [], 0, 0
    for start in range(0, len(mine), 4 * cfg.batch_size):
        jobs = []
        for item in mine[start:start + 4 * cfg.batch_size]:
            try:
                jobs.append(load_job(item, cfg.task, size, editor.cfg, aspects))
            except SystemExit as e:
                if not many:
                    bar.leave = False
                    bar.close()
                    raise
                skipped += 1
                bar.total -= cfg.num_samples * calls
                tqdm.write(f"skipped: {pictures.printable(str(e)).removeprefix('error: ')}")
        for batch in batches(jobs, cfg.num_samples, cfg.batch_size):
            x0 = generate(
                editor, [job.prompt for job, _ in batch], torch.stack([job.mask_in for job, _ in batch]),
                torch.stack([job.masked for job, _ in batch]),
                [common.generators(job.seed, 0, [k])[0] for job, k in batch], cfg.steps, cfg.guidance, shift,
                cfg.solver, cfg.keep_known, cfg.bf16, tick=lambda: bar.update(len(batch)))
            if not x0.isfinite().all():
                raise SystemExit(f"error: {cfg.ckpt}: the model gave NaN: try --bf16=False")
            for (job, k), picture in zip(batch, x0.cpu()):
                result = finish(picture, job, cfg.seam)
                save(out, job, k, result, cfg, {"shift": shift, "step": manifest["step"]})
                written += 1
                job.results += [thumb(result)] if len(job.results) < SHEET_RESULTS else []
        sheet += [sheet_row(job) for job in jobs[:SHEET_ROWS - len(sheet)]]
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
    if common.is_main(dist):
        count = min(cfg.num_samples, SHEET_RESULTS)
        titles = [] if cfg.task == "t2i" else ["picture", "mask"]
        titles += [f"result {k}" for k in range(count)] if count > 1 else ["result"]
        rows, row_titles = [row for _, row in sheet], [title for title, _ in sheet]
        write(out / "sheet.png", common.contact_sheet(rows, titles, row_titles))
        common.print0(f"{written} result(s) in {out}, {skipped} input(s) skipped")
        common.print0(f"contact sheet: {out / 'sheet.png'}")
    common.cleanup()


@torch.inference_mode()
def generate(editor: model.Editor, captions: list[str], mask: Tensor, masked: Tensor,
             gens: list[torch.Generator], steps: int = 20, guidance: float = 1.0, shift: float = 1.0,
             solver: str = "euler", keep_known: bool = False, bf16: bool = True,
             tick: Callable[[], object] = lambda: None) -> Tensor:
    """Sample pictures at the model's own resolution -> x0 [B, C, H, W], fp32, not clamped.

    captions [B]; mask [B, 1, H, W], 1 = regenerate, and masked = x_0 (1 - mask) [B, C, H, W], on any device
    (ones and zeros for text to image); gens: one CPU generator per picture, for its noise. With guidance 1
    the null prompt "" is not evaluated. keep_known blends the known region in after every step. tick: called
    at every evaluation.
    """
    device = editor.mmdit.pos_embed.device
    mask, masked = mask.to(device), masked.to(device)
    noise = common.randn(gens, masked.shape[1:], device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        txt, vec = editor.encode_text(captions)
        null_txt, null_vec = (x.expand(len(captions), *x.shape[1:]) for x in editor.encode_text([""]))
        both = [torch.cat(p) for p in ((txt, null_txt), (vec, null_vec), (mask, mask), (masked, masked))]

        def plain(x: Tensor, t: Tensor) -> Tensor:
            tick()
            return editor(x, t, txt, vec, mask, masked)

        def pair(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            tick()
            return editor(x.repeat(2, 1, 1, 1), t.repeat(2), *both).float().chunk(2)

        denoise = plain if guidance == 1 else flow.guide(pair, guidance)
        known = dict(known=masked, noise=noise, mask=mask) if keep_known else {}
        return flow.sample(denoise, noise, flow.timesteps(steps, shift), solver, **known)


def batches(jobs: list["Job"], num_samples: int, batch_size: int) -> Iterator[list[tuple["Job", int]]]:
    """All (job, sample number) by working shape, at most batch_size at once."""
    def shape(pair: tuple["Job", int]) -> torch.Size:
        return pair[0].mask_in.shape

    for _, group in groupby(sorted(((job, k) for job in jobs for k in range(num_samples)), key=shape), shape):
        group = list(group)
        for i in range(0, len(group), batch_size):
            yield group[i:i + batch_size]


# ---- what is asked for ---------------------------------------------------------------------------


def check(cfg: Config) -> None:
    """SystemExit on a number out of range or flags that exclude each other."""
    for name, low in (("steps", 1), ("num_samples", 1), ("batch_size", 1), ("size", 1), ("seam", 0)):
        value = getattr(cfg, name)
        if value is not None and value < low:
            raise SystemExit(f"error: --{name}: {value}: must be at least {low}")
    for name, value in (("guidance", cfg.guidance), ("shift", 1.0 if cfg.shift is None else cfg.shift)):
        if not (math.isfinite(value) and (value > 0 or name == "guidance" and value == 0)):
            raise SystemExit(f"error: --{name}: {value}: must be a positive number")
    for name in sorted(set().union(*TAKES.values()) - set(TAKES[cfg.task])):
        if getattr(cfg, name) is not None:
            raise SystemExit(f"error: --{name}: {getattr(cfg, name)}: not used by {cfg.task}: leave it out")
    if cfg.keep_known and cfg.task == "t2i":
        raise SystemExit("error: --keep_known: True: t2i has no known region: leave it out")
    if cfg.jsonl and cfg.image:
        raise SystemExit(f"error: --jsonl: {cfg.jsonl}: not together with --image: give one of them")


def complete(item: dict, task: str) -> dict:
    """The item with its prompt filled in; ValueError names the flag and what is wrong."""
    for key, value in item.items():
        number = key in (*SIDES, "height", "width", "seed")
        if value is not None and (type(value) is not int if number else not isinstance(value, str)):
            raise ValueError(f"{key}: {value!r}: give {'an integer' if number else 'a text'}")
        low = key not in SIDES
        if number and key != "seed" and value is not None and not low <= value <= pictures.MAX_SIDE:
            raise ValueError(f"{key}: {value}: must be between {int(low)} and {pictures.MAX_SIDE}")
    if "image" in item and not item["image"]:
        raise ValueError(f"image: missing: {task} needs a picture")
    if task == "outpaint":
        sides = [item[side] for side in SIDES if item[side] is not None]
        if item["aspect"] is not None and sides:
            raise ValueError(f"aspect: {item['aspect']}: not together with {'/'.join(SIDES)}: give one")
        if item["aspect"] is None and not any(sides):
            raise ValueError(f"aspect: missing: nothing to add: give it, or some of {', '.join(SIDES)}")
        if item["aspect"] is not None:
            ratio(item["aspect"])
    if task == "erase":
        return item | {"prompt": data.ERASE_PROMPT}
    prompt = item["prompt"]
    if prompt is None and task != "t2i" and (beside := Path(item["image"]).with_suffix(".txt")).is_file():
        prompt = beside.read_text(errors="replace")
    if prompt is None and task != "outpaint":
        raise ValueError(f'prompt: missing for {item.get("image", task)}: say what to draw, "" = prompt-free')
    return item | {"prompt": pictures.clean_caption(prompt or "")[0]}


def ratio(text: str) -> float:
    """"16:9" or "1.78" -> width / height; ValueError."""
    m = re.fullmatch(r"(\d+\.?\d*)(?::(\d+\.?\d*))?", text.strip())
    width, height = (float(m[1]), float(m[2] or 1)) if m else (0, 0)
    if not (width and height):
        raise ValueError(f"aspect: {text}: must be width:height, such as 16:9")
    return width / height


def list_items(cfg: Config) -> tuple[list[dict], int]:
    """-> dicts of TAKES[task], prompt, seed, name (of the results: unique, safe); the number of bad lines."""
    base = {key: getattr(cfg, key) for key in (*TAKES[cfg.task], "seed")}
    bad = 0
    try:
        if cfg.jsonl:
            items, bad = read_jsonl(Path(cfg.jsonl), base, cfg.task)
        elif cfg.image and Path(cfg.image).is_dir():
            files = sorted(p for p in Path(cfg.image).iterdir()
                           if p.suffix.lower() in pictures.SUFFIXES and not p.stem.endswith(".mask"))
            items = [complete(base | {"image": str(p)}, cfg.task) for p in files]
        else:
            items = [complete(base, cfg.task)]
    except ValueError as e:
        raise SystemExit(f"error: --{e}") from None
    if not items:
        raise SystemExit(f"error: {cfg.jsonl or cfg.image}: nothing to do, {bad} bad lines: give pictures")
    used = set()
    for item in items:
        text = Path(item["image"]).stem if "image" in item else item["prompt"]
        stem = re.sub(r"[^\w.-]+", "_", text).strip("._-")[:48] or "picture"
        name, n = f"{stem}_{cfg.task}", 1
        while name.lower() in used:
            n += 1
            name = f"{stem}-{n}_{cfg.task}"
        used.add(name.lower())
        item["name"] = name
    return items, bad


def read_jsonl(path: Path, base: dict, task: str) -> tuple[list[dict], int]:
    """Items of a JSONL file, `base` filling what a line leaves out; bad lines are named and counted."""
    if not path.is_file():
        raise ValueError(f"jsonl: {path}: no such file: correct the path")
    items, bad = [], 0
    for n, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise ValueError("not JSON") from None
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            item = base | {key: row[key] for key in base if key in row}
            for key in {"image", "mask"} & item.keys() & row.keys():
                item[key] = str(path.parent / item[key]) if isinstance(item[key], str) else item[key]
            items.append(complete(item, task))
        except ValueError as e:
            bad += 1
            common.print0(f"skipped: {path}:{n}: {pictures.printable(str(e))}")
    return items, bad


def result_file(name: str, k: int, num_samples: int) -> str:
    return f"{name}_{k}.png" if num_samples > 1 else f"{name}.png"


def prepare_out(cfg: Config, items: list[dict], dist: common.Dist) -> Path:
    """Make --out and start samples.jsonl anew; refuses to write over an input."""
    out = Path(cfg.out)
    if common.is_main(dist):
        files = {result_file(i["name"], k, cfg.num_samples) for i in items for k in range(cfg.num_samples)}
        for p in {cfg.jsonl, *(item.get(key) for item in items for key in ("image", "mask"))} - {None}:
            p = Path(p).resolve()
            if p.parent == out.resolve() and p.name in files | {"samples.jsonl", "sheet.png"}:
                raise SystemExit(f"error: --out: {out}: would overwrite the input {p.name}: give another")
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / "samples.jsonl").write_text("")
        except OSError as e:
            raise SystemExit(f"error: --out: {out}: {e.strerror}: give a writable folder") from None
    if dist.world > 1:
        td.barrier()
    return out


# ---- checkpoint ----------------------------------------------------------------------------------


def load_editor(cfg: Config) -> tuple[model.Editor, dict]:
    """The Editor of --ckpt with the weights asked for, on the CPU, and its manifest."""
    names = ("ema", "model") if cfg.weights == "auto" else cfg.weights
    tensors, manifest = common.load_checkpoint(cfg.ckpt, names)
    arch = manifest.get("arch", {})
    if arch.get("kind") != "editor":
        raise SystemExit(f"error: {cfg.ckpt}: holds a {arch.get('kind')!r}: give an editor's folder")
    editor = model.build_editor(arch, cfg.ckpt)
    if not editor.cfg.txt_bytes:
        raise SystemExit(f"error: {cfg.ckpt}: needs a VAE and text encoders: give a pixel-space model")
    if cfg.task != "t2i" and not editor.cfg.inpaint:
        raise SystemExit(f"error: {cfg.ckpt}: {cfg.task} needs a model trained with --stage inpaint")
    name = "ema" if "ema" in tensors else "model"
    common.load_state(editor, tensors[name], f"{cfg.ckpt}/{name}.safetensors")
    return editor, manifest


def working_size(cfg: Config, trained: dict, patch: int) -> int:
    size = cfg.size or trained.get("image_size")
    if not size:
        raise SystemExit(f"error: {cfg.ckpt}/manifest.json: it has no config.image_size: give --size")
    if size % patch:
        raise SystemExit(f"error: --size: {size}: must be a multiple of the model's patch, {patch}")
    return size


# ---- pictures in ---------------------------------------------------------------------------------


@dataclass
class Job:
    """One input, at its own size and as the model sees it."""

    name: str  # of the results, without number and suffix
    prompt: str
    seed: int
    source: np.ndarray | None  # uint8 [h0, w0, 3], the picture as it was read
    canvas: np.ndarray  # uint8 [h, w, 3], the picture; for outpainting on its larger canvas
    mask: np.ndarray  # float32 [h, w], 1 = regenerate
    box: tuple[int, int, int, int]  # top, left, height, width of the canvas within the working shape
    mask_in: Tensor  # [1, H, W] in {0, 1}
    masked: Tensor  # [3, H, W]
    about: dict  # for samples.jsonl
    results: list[Image.Image] = field(default_factory=list)  # thumbnails


def load_job(item: dict, task: str, size: int, arch: model.EditorConfig, aspects: bool) -> Job:
    """Read one input. SystemExit (pictures.BadFile) with one line when it cannot be used."""
    source, about = None, {}
    if task == "t2i":
        canvas = np.zeros((item["height"] or size, item["width"] or size, 3), np.uint8)
        mask = np.ones(canvas.shape[:2], np.float32)
    else:
        source = canvas = pictures.read_image(item["image"])
        about["image"] = str(Path(item["image"]).resolve())
    if task == "outpaint":
        canvas, mask, sides = extend(source, item)
        about |= sides
        common.print0(f"{pictures.printable(item['image'])}: {source.shape[1]}x{source.shape[0]} grows to "
                      f"{canvas.shape[1]}x{canvas.shape[0]}, regenerates {mask.mean():.1%}")
    elif task != "t2i":
        mask, path = find_mask(item, *source.shape[:2])
        about["mask"] = str(path.resolve())
    if len(item["prompt"].encode(errors="replace")) > arch.txt_bytes:
        common.print0(f"note: {item['name']}: the model reads {arch.txt_bytes} bytes of the prompt")
    H, W = data.bucket(*mask.shape, size, arch.patch, aspects)
    if max(H, W) > arch.pos_max * arch.patch:
        raise SystemExit(f"error: --size: {size}: {item['name']} needs {W}x{H}, the model takes "
                         f"at most {arch.pos_max * arch.patch} a side: give a smaller --size")
    fitted = to_work(canvas, mask, H, W)
    return Job(item["name"], item["prompt"], item["seed"], source, canvas, mask, *fitted, about)


def extend(picture: np.ndarray, item: dict) -> tuple[np.ndarray, np.ndarray, dict]:
    """Outpainting: uint8 [h, w, 3] -> grey canvas with the picture on it, its mask, pixels added per side."""
    h, w = picture.shape[:2]
    add = {side: item[side] or 0 for side in SIDES}
    if item["aspect"] is not None:
        r = ratio(item["aspect"])
        more_w, more_h = max(0, round(min(h * r, 1e9)) - w), max(0, round(min(w / r, 1e9)) - h)
        if not (more_w or more_h):
            raise SystemExit(f"error: {item['image']}: is {item['aspect']} already: give another --aspect")
        add = dict(zip(SIDES, (more_w // 2, more_w - more_w // 2, more_h // 2, more_h - more_h // 2)))
    height, width = h + add["top"] + add["bottom"], w + add["left"] + add["right"]
    if height * width > pictures.MAX_PIXELS or max(height, width) > pictures.MAX_SIDE:
        raise SystemExit(f"error: {item['image']}: would grow to {width}x{height}, over the cap of "
                         f"{pictures.MAX_PIXELS:,} pixels, {pictures.MAX_SIDE:,} a side: add less")
    inner = slice(add["top"], add["top"] + h), slice(add["left"], add["left"] + w)
    canvas, mask = np.full((height, width, 3), 128, np.uint8), np.ones((height, width), np.float32)
    canvas[inner], mask[inner] = picture, 0
    return canvas, mask, add


def find_mask(item: dict, h: int, w: int) -> tuple[np.ndarray, Path]:
    """Mask of an item -> float32 [h, w], its path. One of another size but the same aspect is scaled."""
    image = Path(item["image"])
    if item["mask"] and not Path(item["mask"]).is_dir():
        choices = [Path(item["mask"])]
    elif item["mask"]:
        choices = [Path(item["mask"]) / f"{image.stem}{suffix}" for suffix in (".png", *pictures.SUFFIXES)]
    else:
        choices = [image.with_name(f"{image.stem}.mask{suffix}") for suffix in (".png", *pictures.SUFFIXES)]
    path = next((p for p in choices if p.is_file()), None)
    if path is None:
        raise SystemExit(f"error: {choices[0]}: no such mask for {image}: give --mask, or put "
                         f"{image.stem}.mask.png beside the picture")
    mh, mw = pictures.image_size(path)
    if abs(mw * h - mh * w) > max(h, w):  # the longer side rounded to a pixel is not another aspect
        raise SystemExit(f"error: {path}: {mw}x{mh}, but {image} is {w}x{h}: make them equal")
    mask = pictures.read_mask(path, h, w, log=common.print0)
    mask[mask < 0.02] = 0  # black saved as JPEG is not quite black, and unmasked means untouched
    return mask, path


def to_work(canvas: np.ndarray, mask: np.ndarray, H: int, W: int) -> tuple[tuple, Tensor, Tensor]:
    """Fit a picture inside (H, W), the rest filled by reflection -> Job's box, mask_in and masked.

    What the mask hides must not leak into the known pixels around it, as plain resizing would let it: known
    pixels are averaged among themselves, and a working pixel that any masked pixel falls on counts as masked.
    """
    size = mask.shape
    scale = min(H / size[0], W / size[1])
    h, w = (max(1, min(side, round(n * scale))) for side, n in zip((H, W), size))
    hole = torch.from_numpy(mask >= 0.5)[None, None].float()
    x = torch.from_numpy(canvas).permute(2, 0, 1)[None].float() / 127.5 - 1
    if (h, w) != size:
        parts = torch.cat([x * (1 - hole), 1 - hole], 1)
        parts = F.interpolate(parts, (h, w), mode="bicubic", antialias=True)
        x = (parts[:, :3] / parts[:, 3:].clamp(min=1e-3)).clamp(-1, 1)
        hole = F.adaptive_max_pool2d(hole, (h, w))
    top, left = (H - h) // 2, (W - w) // 2
    both = torch.cat([hole, x * (1 - hole)], 1)[0].numpy()
    both = torch.from_numpy(np.pad(both, ((0, 0), (top, H - h - top), (left, W - w - left)), "symmetric"))
    return (top, left, h, w), both[:1], both[1:]


# ---- pictures out --------------------------------------------------------------------------------


def finish(x0: Tensor, job: Job, seam: int) -> np.ndarray:
    """Sampled x0 [3, H, W] -> uint8 [h, w, 3] at the input's size, and the input itself beyond the seam."""
    top, left, h, w = job.box
    x = x0[:, top:top + h, left:left + w]
    if (h, w) != job.mask.shape:
        x = F.interpolate(x[None], job.mask.shape, mode="bicubic", antialias=True)[0]
    x = ((x.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    a = np.maximum(job.mask, ramp(job.mask >= 0.5, seam))[..., None]
    return (a * x + (1 - a) * job.canvas + 0.5).astype(np.uint8)


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
    file = result_file(job.name, k, cfg.num_samples)
    keys = ("task", "steps", "guidance", "solver", "seam", "keep_known", "weights", "bf16", "ckpt")
    row = {"file": file, **job.about, "prompt": job.prompt, "seed": job.seed, "sample": k,
           "height": result.shape[0], "width": result.shape[1], "work": list(job.mask_in.shape[1:]),
           "mask_area": round(float(job.mask.mean()), 4),
           **{key: getattr(cfg, key) for key in keys}, **more}
    write(out / file, Image.fromarray(result), json.dumps(row) + "\n")


def write(path: Path, picture: Image.Image, row: str = "") -> None:
    try:
        picture.save(path)
        with open(path.with_name("samples.jsonl"), "a") as f:
            f.write(row)
    except OSError as e:
        raise SystemExit(f"error: {path}: {e.strerror or e}: free some space or give another --out") from None


def thumb(picture: np.ndarray) -> Image.Image:
    """For the contact sheet: at most THUMB a side; tiny pictures magnified, their pixels visible."""
    im = Image.fromarray(picture)
    im.thumbnail((THUMB, THUMB), Image.Resampling.LANCZOS)
    zoom = max(1, THUMB // 2 // max(im.size))
    return im.resize((im.width * zoom, im.height * zoom), Image.Resampling.NEAREST)


def sheet_row(job: Job) -> tuple[str, list[Image.Image]]:
    """Title and pictures of one input on the contact sheet: the picture, its mask in red, the results."""
    if job.source is None:
        return job.prompt, job.results
    overlay = thumb(job.canvas)
    tint = thumb((job.mask * 153 + 0.5).astype(np.uint8))
    overlay.paste((235, 45, 60), (0, 0), tint)
    title = f"{job.name}: {job.prompt}" if job.prompt else job.name
    return title, [thumb(job.source), overlay, *job.results]


if __name__ == "__main__":
    try:
        cli = (tyro.conf.FlagConversionOff, tyro.conf.UsePythonSyntaxForLiteralCollections)
        main(tyro.cli(Config, description=__doc__, config=cli))
    except KeyboardInterrupt:
        raise SystemExit("interrupted: the results written so far are kept") from None
