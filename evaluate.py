"""The scenes judge, and preferences from the known truth.

    python evaluate.py parser  --out assets/parser --steps 6000          # the judge's parser
    python evaluate.py scenes  --ckpt assets/base,out/pefl --n 500       # tables, results.json, contact sheet
    python evaluate.py edits   --ckpt out/editnet,out/concat --n 300     # the same, of instruction editors
    python evaluate.py t2i     --ckpt assets/base --guidance 3           # the same, of text to image
    python evaluate.py compare --ckpt out/pefl,assets/base --steps 8,20  # paired good / same / bad, of either
    python evaluate.py prefs   --ckpt assets/base --out out/prefs --n 3000 --steps 4,6,8

A scene's description is known, so the judge needs no human: a parser network (judge.py) reads attributes back
from the picture, and the exact picture that belongs there is drawn again. `scenes` has the tasks of ByteEdit
(judge_holes.py), `edits` the seven of OmniEdit and `t2i` text to image (judge_edits.py). Masks and
instructions depend on the scene, noise on (seed, scene): equal for every checkpoint, so that all comparisons
are paired. Intervals are 95% bootstraps over scenes. Every picture is judged as 8 bits per channel, a filled
hole with the known pixels pasted back.

    1. Config     2. Results: pictures of an editor     3. parser, scenes, edits, t2i, compare, prefs
"""

import datetime
import json
import math
import os
import platform
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

import common
import data
import flow
import model
import scenes
from judge import (
    SIDE,
    bootstrap,
    frechet_interval,
    load_parser,
    parser_accuracy,
    sign_test,
    to_float,
    to_uint8,
    train_parser,
)
from judge_edits import EditCases, ask, bounds, edit_cases, features_of, judge_edits, judge_t2i, prompts
from judge_holes import TASKS, Cases, judge_result, make_cases, paste
from order import shapes
from pictures import read_image
from prefs import make_prefs
from scene_edits import EditScenes

####################################################################################################
# 1. Config
####################################################################################################

@dataclass
class Config:
    task: tyro.conf.Positional[Literal["parser", "scenes", "edits", "t2i", "compare", "prefs"]]
    ckpt: str = ""  # checkpoints or folders of saved pictures, with commas; prefs: the base
    out: str = "out/evaluate"  # folder for results and the sheet, for the parser, or for the preferences
    save: str = ""  # scenes, edits: also keep the pictures here, a folder each, for a later `compare`
    parser: str = "assets/parser"  # the judge's parser
    n: int = 500  # scenes for each task; t2i, prefs: prompts
    data: str = "scenes"  # scenes or scenes:hard; prefs: also a folder of captioned pictures or a .parquet
    offset: int = 0  # first scene
    steps: str = "20"  # of sampling, for all or for each checkpoint (prefs: each of k); parser: of training
    guidance: float = 1.0  # classifier-free guidance, of the instruction in edits; 1 = off
    image_guidance: float = 1.0  # edits: guidance of the source picture; 1 = off
    region: bool = False  # edits: show the editor which region changes
    aspects: str = "1:1"  # width:height, with commas; edits: each is judged on its own; parser: it sees all
    image_size: int = 0  # edits: side of the square of equal area; 0 = what the editor was trained at
    solver: Literal["euler", "heun"] = "euler"  # of the sampler
    seeds: str = "0"  # noise seeds, with commas
    captions: int = 0  # prefs: further true pictures for alignment pairs alone
    k: int = 4  # prefs: pictures for each prompt, of which the best and the worst are kept
    margin: float = 0.25  # prefs: best and worst are a pair if the worst's error is larger by this fraction
    mismatched: float = 0.67  # prefs: share of false captions that are another scene's; the rest: one fact
    batch_size: int = 64  # pictures sampled together; parser: scenes in a training batch
    lr: float = 2e-3  # parser: peak learning rate, cosine
    tie: float = 0.05  # compare: errors that differ by less than this fraction are a tie
    rows: int = 4  # rows of the contact sheet for each task
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast where the hardware has it
    device: str = "auto"  # auto, cpu, cuda


def numbers(text: str, what: str, low: int) -> list[int]:
    """ "20,8" -> [20, 8]."""
    try:
        found = [int(x) for x in text.split(",")]
    except ValueError:
        raise SystemExit(f"error: --{what}: {text!r}: use whole numbers with commas between them") from None
    if min(found) < low:
        raise SystemExit(f"error: --{what}: {min(found)}: use at least {low}")
    return found


####################################################################################################
# 2. Results: pictures of an editor, or of a folder
####################################################################################################


@dataclass
class Editor:
    """A checkpoint ready to sample from. kind: "scenes" (fills holes), "edits" (follows instructions)."""

    kind: str
    net: model.Editor | model.EditNet
    size: int
    shift: float
    device: torch.device
    bf16: bool


def load_editor(path: str, device: torch.device, precision: str, kind: str | None = "scenes") -> Editor:
    """Averaged weights if there are any; SystemExit unless it is of the kind, in pixel space. kind None: an
    editor of either kind; "t2i": that, or a text-to-image base."""
    weights, manifest = common.load_checkpoint(path, ("ema", "model"))
    arch = manifest.get("arch", {})
    fills_holes = kind != "t2i"
    if kind in (None, "t2i"):
        kind = "edits" if arch.get("kind") == "editnet" else "scenes"
    net = model.build_editnet(arch, path) if kind == "edits" else model.build_editor(arch, path)
    if kind == "scenes" and fills_holes and not net.cfg.inpaint:
        raise SystemExit(f"error: {path}: is a text-to-image base without mask input: train it with"
                         " `train_omni.py --stage inpaint`")
    if not net.cfg.txt_bytes:
        raise SystemExit(f"error: {path}: needs a VAE and text encoders: the judge samples only pixel-space"
                         " editors, give it a folder of pictures in the layout of --save")
    common.load_state(net, weights.get("ema") or weights["model"], path)
    config = manifest.get("config", {})
    if "image_size" not in config:
        raise SystemExit(f"error: {path}/manifest.json: config has no image_size: use a checkpoint that"
                         " train_omni.py or train_pefl.py wrote")
    net = net.to(device).eval().requires_grad_(False)
    return Editor(kind, net, int(config["image_size"]), float(config.get("shift", 1.0)), device,
                  precision == "bf16")


@torch.inference_mode()
def generate(e: Editor, image: Tensor, mask: Tensor, caption: list[str], noise: Tensor, steps: int,
             guidance: float = 1.0, solver: str = "euler") -> Tensor:
    """Pictures [B, 3, H, W] as the network returns them, known pixels not pasted. Arguments as in Cases."""
    image, mask, x = image.to(e.device), mask.to(e.device), noise.to(e.device)
    masked = image * (1 - mask)
    with torch.autocast(e.device.type, torch.bfloat16, enabled=e.bf16):
        txt, vec = e.net.encode_text(caption)
        null = e.net.encode_text([""] * len(caption))

        def cond(x: Tensor, t: Tensor) -> Tensor:
            return e.net(x, t, txt, vec, mask, masked)

        def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return cond(x, t), e.net(x, t, *null, mask, masked)

        denoise = cond if guidance == 1 else flow.guide(both, guidance)
        return flow.sample(denoise, x, flow.timesteps(steps, e.shift), solver).cpu()


@torch.inference_mode()
def generate_edit(e: Editor, source: Tensor, region: Tensor, instruction: list[str], noise: Tensor,
                  steps: int, guidance: float = 1.0, image_guidance: float = 1.0,
                  solver: str = "euler") -> Tensor:
    """Pictures [B, 3, H, W] by instruction. region float [B, 1, H, W]: ones = free-form."""
    source, region, x = source.to(e.device), region.to(e.device), noise.to(e.device)
    with torch.autocast(e.device.type, torch.bfloat16, enabled=e.bf16):
        text, null = e.net.encode_text(instruction), e.net.encode_text([""] * len(instruction))
        denoise = flow.edit_denoise(e.net, text, null, source, region, guidance, image_guidance)
        return flow.sample(denoise, x, flow.timesteps(steps, e.shift), solver).cpu()


@dataclass
class Result:
    """One column of the tables: pictures uint8 [S, N, H, W, 3] by key of the cases, nothing pasted yet."""

    kind: str  # of Editor
    name: str
    size: int
    stride: int = 1  # sides of its pictures are multiples of this
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


AnyCases = dict[str, Cases] | dict[str, EditCases]  # by folder: TASK, or ASPECT/TASK
STREAMS = (*TASKS, *EditScenes.tasks)  # of noise


def sample_result(result: Result, e: Editor, cases: AnyCases, cfg: Config, steps: int,
                  seeds: list[int]) -> None:
    """Fill `result` with pictures of one editor."""
    bar = common.progress(len(seeds) * sum(len(c.indices) for c in cases.values()), desc=result.name)
    for key, c in cases.items():
        h, w = c.image.shape[2:]
        out = np.empty((len(seeds), len(c.indices), h, w, 3), np.uint8)
        for s, seed in enumerate(seeds):
            for i in range(0, len(c.indices), cfg.batch_size):
                part = slice(i, i + cfg.batch_size)
                # a function of (seed, scene, task): the same for every checkpoint and batch size
                gens = common.generators(seed, 0, c.indices[part], stream=STREAMS.index(c.task))
                noise = common.randn(gens, c.image.shape[1:])
                if e.kind == "edits":
                    region = c.region[part] if cfg.region else torch.ones_like(c.region[part])
                    got = generate_edit(e, c.image[part], region.float(), c.caption[part], noise, steps,
                                        cfg.guidance, cfg.image_guidance, cfg.solver)
                else:
                    got = generate(e, c.image[part], c.mask[part], c.caption[part], noise, steps,
                                   cfg.guidance, cfg.solver)
                out[s, part] = to_uint8(got).numpy()
                bar.update(len(got))
        result.pictures[key] = out
    bar.close()


def save_result(result: Result, cases: AnyCases, seeds: list[int], folder: Path) -> None:
    """FOLDER/TASK/seed_S/INDEX.png (edits: FOLDER/ASPECT/TASK/...) and judge.json."""
    for key, pictures in result.pictures.items():
        for seed, row in zip(seeds, pictures):
            at = folder / key / f"seed_{seed}"
            at.mkdir(parents=True, exist_ok=True)
            for index, picture in zip(cases[key].indices, row):
                Image.fromarray(picture).save(at / f"{index:06d}.png")
    about = {k: getattr(result, k) for k in ("kind", "name", "size", "stride")}
    (folder / "judge.json").write_text(json.dumps(about))


def open_result(folder: Path) -> Result:
    """The Result of a folder in the layout of save_result, without its pictures."""
    try:
        info = json.loads((folder / "judge.json").read_text())
        return Result(str(info.get("kind", "scenes")), str(info["name"]), int(info["size"]),
                      int(info.get("stride", 1)))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SystemExit(f"error: {folder / 'judge.json'}: damaged: save the pictures again") from None


def read_result(result: Result, folder: Path, cases: AnyCases, seeds: list[int]) -> None:
    for key, c in cases.items():
        rows, (h, w) = [], c.image.shape[2:]
        for seed in seeds:
            for index in c.indices:
                file = folder / key / f"seed_{seed}" / f"{index:06d}.png"
                picture = read_image(file)
                if picture.shape != (h, w, 3):
                    got = f"{picture.shape[1]}x{picture.shape[0]}"
                    raise SystemExit(f"error: {file}: {got} instead of {w}x{h}: save the pictures again")
                rows.append(picture)
        result.pictures[key] = np.stack(rows).reshape(len(seeds), len(c.indices), h, w, 3)


def aspect_sizes(aspects: str, size: int, stride: int) -> dict[str, tuple[int, int]]:
    """ "9:16,1:1" -> {"9x16": (h, w), ...}, multiples of stride with about size^2 pixels."""
    found = {}
    for text in aspects.split(","):
        try:
            width, height = (int(x) for x in text.split(":"))
            if not 1 / 4 <= width / height <= 4:
                raise ValueError
        except (ValueError, ZeroDivisionError):
            raise SystemExit(f"error: --aspects: {text!r}: use width:height from 1:4 to 4:1, such as 16:9,"
                             " with commas between them") from None
        found[f"{width}x{height}"] = shapes(size, stride, (height / width,))[0]
    return found


def level_of(cfg: Config) -> str:
    """The level of scenes that --data names; SystemExit on all else: of other pictures no truth is known."""
    if (found := scenes.parse_spec(cfg.data)) is None or found[1] is not None:
        raise SystemExit(f"error: --data: {cfg.data}: the judge knows the truth of scenes only: use scenes "
                         "or scenes:hard")
    return found[0]


def gather_cases(cfg: Config, kind: str, size: int, stride: int) -> AnyCases:
    if kind == "scenes":
        source, tasks = scenes.Scenes("heldout", level_of(cfg)), TASKS
    else:
        source = EditScenes("heldout", level=level_of(cfg))
        tasks = source.tasks
    most = len(source) // (1 if kind == "scenes" else len(tasks))
    if cfg.n < 2 or cfg.offset < 0 or cfg.offset + cfg.n > most:
        raise SystemExit(f"error: --n: {cfg.n}: use 2 to {most} scenes, --offset included")
    indices = list(range(cfg.offset, cfg.offset + cfg.n))
    if kind == "scenes":
        return {task: make_cases(task, indices, size, source) for task in tasks}
    # the tasks take turns in EditScenes
    return {f"{aspect}/{task}": edit_cases(task, [len(tasks) * i + k for i in indices], h, w, source)
            for aspect, (h, w) in aspect_sizes(cfg.aspects, size, stride).items()
            for k, task in enumerate(tasks)}


def gather(cfg: Config, device: torch.device, kind: str | None) -> tuple[list[Result], AnyCases, list[int]]:
    """Every entry of --ckpt sampled or read, on the same scenes, masks and noise. kind: that all must be of;
    None: the first one's."""
    entries = [x.strip() for x in cfg.ckpt.split(",") if x.strip()]
    if not entries:
        raise SystemExit("error: --ckpt: is empty: give checkpoints or folders of saved pictures")
    seeds, steps = numbers(cfg.seeds, "seeds", 0), numbers(cfg.steps, "steps", 1)
    if len(steps) not in (1, len(entries)):
        raise SystemExit(f"error: --steps: {cfg.steps}: give one number or {len(entries)}, one for each")
    steps = steps * (len(entries) // len(steps))
    opened, results = [], []
    for entry, k in zip(entries, steps):  # all are opened before the first is sampled: an error costs no time
        e = None
        if (Path(entry) / "judge.json").is_file():
            r = open_result(Path(entry))
            if r.kind != (kind or r.kind):
                raise SystemExit(f"error: {entry}: holds pictures of `evaluate.py {r.kind}`, not of {kind}:"
                                 " name another folder")
        else:
            e = load_editor(entry, device, cfg.precision, kind)
            size = cfg.image_size if e.kind == "edits" and cfg.image_size else e.size
            r = Result(e.kind, f"{entry.rstrip('/')}@{k}", size, e.net.cfg.patch)
        kind = r.kind
        opened.append(e)
        results.append(r)
        if r.size != results[0].size:
            raise SystemExit(f"error: --ckpt: {entry}: makes {r.size}-pixel pictures, {entries[0]}"
                             f" {results[0].size}: compare editors of one size")
    names = [r.name for r in results]
    for i, r in enumerate(results):
        r.name += f" ({i})" if names.count(names[i]) > 1 else ""
    cases = gather_cases(cfg, kind, results[0].size, math.lcm(*(r.stride for r in results)))
    for entry, k, e, r in zip(entries, steps, opened, results):
        if e is None:
            read_result(r, Path(entry), cases, seeds)
        else:
            sample_result(r, e, cases, cfg, k, seeds)
    return results, cases, seeds


####################################################################################################
# 3. parser, scenes, edits, t2i, compare, prefs
####################################################################################################

# printed in percent
SHARE = ("drawn", "named", "success", "edit", "kept", "kept_share", "shape", "colour", "material",
         "objects", "background", "environment", "style", "empty", "attributes", "judged", "truth_read",
         "source_read", "kept_asked")
ORDER = (*SHARE, "exact", "over", "error", "hole", "seam", "sharpness", "outside_raw", "outside", "frechet",
         "frechet_hole")


def provenance(started: float) -> dict:
    device = f"{torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    now = datetime.datetime.now(datetime.timezone.utc)
    command = " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command, "commit": common.git_revision(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device}", "torch": torch.__version__,
            "date": now.isoformat(timespec="seconds"), "seconds": round(time.time() - started, 1)}


def write_json(path: Path, content: dict) -> None:
    """Not-a-number becomes null."""
    def clean(x):
        if isinstance(x, dict):
            return {k: clean(v) for k, v in x.items()}
        if isinstance(x, list):
            return [clean(v) for v in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    path.write_text(json.dumps(clean(content), indent=1) + "\n")


def cell(name: str, v: dict) -> str:
    if v["n"] == 0:
        return "-"
    if name in SHARE:
        return f"{100 * v['mean']:.1f} [{100 * v['low']:.1f}, {100 * v['high']:.1f}]"
    return f"{v['mean']:.4f} [{v['low']:.4f}, {v['high']:.4f}]"


def table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    return "\n".join("  ".join([r[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(r[1:], widths[1:]))])
                     for r in [head, *rows])


def sheet(results: list[Result], cases: AnyCases, rows: int) -> Image.Image:
    """source | what the mask leaves | each result, pasted | truth, for the first scenes of every case."""
    pictures, names, holes = [], [], results[0].kind == "scenes"
    for key, c in cases.items():
        for i in range(min(rows, len(c.indices))):
            left = [c.image[i] * (1 - c.mask[i])] if holes else []
            got = [to_float(r.pictures[key][0]) for r in results]
            got = [(paste(x, c) if holes else x)[i] for x in got]
            pictures.append([c.image[i], *left, *got, c.truth[i]])
            names.append(f"{key}: {c.caption[i]}")
    titles = ["source", *(["hole"] if holes else []), *(r.name for r in results), "truth"]
    return common.contact_sheet(pictures, titles, row_titles=names)


def open_out(folder: str) -> Path:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def run_parser(cfg: Config, device: torch.device) -> None:
    started = time.time()
    (steps,) = numbers(cfg.steps, "steps", 1)[:1]
    sizes = list(aspect_sizes(cfg.aspects, SIDE, SIDE // 8).values())
    net = train_parser(steps, cfg.batch_size, cfg.lr, device, cfg.precision == "bf16", sizes)
    weights = {k: v.bfloat16() for k, v in net.state_dict().items()}
    net.load_state_dict({k: v.float() for k, v in weights.items()})  # judged as it ships
    held = {}
    for level in scenes.LEVELS:
        for h, w in [*sizes, *((h // 2, w // 2) for h, w in sizes)]:
            right = parser_accuracy(net, (h, w), 3000 if (h, w) in sizes else 1000, device, level)
            held[f"{level} {w}x{h}"] = {k: bootstrap(v) for k, v in right.items()}
    heads = list(next(iter(held.values())))
    print("held-out accuracy on clean renders, percent [95% interval]")
    print(table(["", *held], [[k, *(cell("shape", v[k]) for v in held.values())] for k in heads]))
    meta = {"arch": net.arch, "config": asdict(cfg), "precision": cfg.precision,
            "samples": steps * cfg.batch_size, "heldout": held, **provenance(started)}
    common.write_checkpoint(cfg.out, steps, {"model": weights}, meta)
    print(f"wrote {cfg.out}: {common.n_params(net) / 1e6:.2f} M parameters, {time.time() - started:.0f} s")


def run_scenes(cfg: Config, device: torch.device) -> None:
    started = time.time()
    open_out(cfg.out)
    net = load_parser(cfg.parser, device)
    results, cases, seeds = gather(cfg, device, "scenes")
    truth = known("truth", cases)
    report, scores = {}, {}
    for task, c in cases.items():
        judged = {r.name: judge_result(r.pictures[task], c, net) for r in [*results, truth]}
        report[task] = {name: summary for name, (_, summary) in judged.items()}
        scores[task] = [judged[r.name][0] for r in results]
        names = [k for k in ORDER if k in report[task]["truth"]]
        print(f"\n{task}: {len(c.indices)} held-out scenes, {len(seeds)} seed(s), mean [95% interval]")
        rows = [[k, *(cell(k, v[k]) for v in report[task].values())] for k in names]
        print(table(["", *report[task]], rows))
    save_scores(cfg, results, scores)
    finish(cfg, started, results, cases, seeds, {"tasks": report})


def known(which: str, cases: AnyCases) -> Result:
    """A column of bounds: the "truth", or the "image" as it was given."""
    pictures = {k: to_uint8(getattr(c, which))[None].numpy() for k, c in cases.items()}
    return Result("", "source" if which == "image" else which, 0, 1, pictures)


def save_scores(cfg: Config, results: list[Result], scores: dict[str, list[dict[str, np.ndarray]]]) -> None:
    """OUT/scores.npz, for differences of any two: "names", and by "KEY/METRIC" [editors, scenes], means
    of the noise seeds. scores: by key of the cases the metrics [S, N] of each editor."""
    rows = {f"{key}/{k}": np.stack([m[k].mean(0) for m in of_editors]).astype(np.float32)
            for key, of_editors in scores.items() for k in of_editors[0]}
    np.savez_compressed(Path(cfg.out) / "scores.npz", names=[r.name for r in results], **rows)


def finish(cfg: Config, started: float, results: list[Result], cases: AnyCases, seeds: list[int],
           content: dict) -> None:
    """Pictures (--save), contact sheet and results.json."""
    out = Path(cfg.out)
    if cfg.save:
        for r in results:
            save_result(r, cases, seeds, Path(cfg.save) / r.name.replace("/", "_"))
    sheet(results, cases, cfg.rows).save(out / "sheet.png")
    write_json(out / "results.json", {**provenance(started), "config": asdict(cfg), **content})
    print(f"\nwrote {out / 'results.json'} and {out / 'sheet.png'}")


def run_edits(cfg: Config, device: torch.device) -> None:
    """Tables of what judge_edits.py measures, for each aspect ratio: rows are the tasks and their mean,
    columns the editors, the source as it was and the true target."""
    started = time.time()
    open_out(cfg.out)
    net = load_parser(cfg.parser, device)
    results, cases, seeds = gather(cfg, device, "edits")
    columns, report, every = [*results, known("image", cases), known("truth", cases)], {}, {}
    for aspect in dict.fromkeys(k.split("/")[0] for k in cases):
        own = {k.split("/")[1]: c for k, c in cases.items() if k.split("/")[0] == aspect}
        asked = {task: ask(c, net) for task, c in own.items()}
        limits = {task: bounds(c, asked[task], net) for task, c in own.items()}
        tasks = {task: {} for task in (*own, "mean")}
        for r in columns:
            judged = {task: judge_edits(r.pictures[f"{aspect}/{task}"], c, asked[task], net)
                      for task, c in own.items()}
            for task, (scores, features) in judged.items():
                tasks[task][r.name] = summary_of([scores], [features])
                every.setdefault(f"{aspect}/{task}", []).append(scores)
            tasks["mean"][r.name] = summary_of(*zip(*judged.values()))
        limits = {task: {k: bootstrap(v) for k, v in found.items()} for task, found in limits.items()}
        h, w = next(iter(own.values())).image.shape[2:]
        report[aspect] = {"size": [h, w], "tasks": tasks, "parser": limits}
        print(f"\n{aspect} ({w}x{h} pixels): {cfg.n} held-out pairs for each task, {len(seeds)} seed(s), "
              "mean [95% interval]")
        for k in [k for k in ORDER if k in tasks["mean"]["truth"]]:
            rows = [[task, *(cell(k, v[k]) for v in found.values())] for task, found in tasks.items()]
            print("\n" + table([k, *(r.name for r in columns)], rows))
        heads = list(next(iter(limits.values())))
        print("\n" + table(["the parser", *heads], [[task, *(cell(k, v[k]) for k in heads)]
                                                    for task, v in limits.items()]))
    save_scores(cfg, results, {key: rows[:len(results)] for key, rows in every.items()})
    finish(cfg, started, results, cases, seeds, {"aspects": report})


def summary_of(scores: list[dict], features: list[tuple]) -> dict:
    """{metric: mean and interval} over tasks: the mean of their means, and the Frechet distance of their
    union. scores: metrics [S, N] of each task; features: [S, N, D] of the pictures, and of the true ones."""
    # not-a-number depends on the scene alone, not on the seed
    found = {k: bootstrap(*(of_task[k].mean(0) for of_task in scores)) for k in scores[0]}
    return found | {"frechet": frechet_interval(*(np.concatenate(x, 1) for x in zip(*features)))}


def run_t2i(cfg: Config, device: torch.device) -> None:
    """Captions of held-out scenes drawn by every entry of --ckpt; by an instruction editor twice: by its own
    base, with the branch off, and with a null picture, which takes the caption as an instruction (OmniEdit
    Fig. 10). Controls: the scene itself, and another prompt's."""
    started = time.time()
    out, net = open_out(cfg.out), load_parser(cfg.parser, device)
    entries = [x.strip() for x in cfg.ckpt.split(",") if x.strip()]
    seeds, steps = numbers(cfg.seeds, "seeds", 0), numbers(cfg.steps, "steps", 1)
    if not entries or len(steps) not in (1, len(entries)):
        raise SystemExit(f"error: --ckpt: {cfg.ckpt!r}: give checkpoints, and in --steps one number or one "
                         "for each")
    painters = []
    for entry, k in zip(entries, steps * (len(entries) // len(steps))):
        e = load_editor(entry, device, cfg.precision, "t2i")
        name = f"{entry.rstrip('/')}@{k}"
        if e.kind == "edits":
            painters += [(f"{name}, branch off", replace(e, kind="scenes", net=e.net.base), k),
                         (f"{name}, null picture", e, k)]
        else:
            painters.append((name, e, k))
    if len(sizes := {e.size for _, e, _ in painters}) > 1:
        raise SystemExit(f"error: --ckpt: pictures of {sorted(sizes)} pixels: compare editors of one size")
    source, indices = scenes.Scenes("heldout", level_of(cfg)), list(range(cfg.offset, cfg.offset + cfg.n))
    if cfg.n < 2 or cfg.offset < 0 or indices[-1] >= len(source):
        raise SystemExit(f"error: --n: {cfg.n}: use 2 to {len(source)} scenes, --offset included")
    p, columns = prompts(indices, painters[0][1].size, source), {}
    for name, e, k in painters:
        got, bar = [], common.progress(len(seeds) * cfg.n, desc=name)
        for seed in seeds:
            parts = []
            for i in range(0, cfg.n, cfg.batch_size):
                part = slice(i, i + cfg.batch_size)
                noise = common.randn(common.generators(seed, 0, indices[part], stream=len(STREAMS)),
                                     p.truth.shape[1:])
                nothing, ones = torch.zeros_like(noise), torch.ones_like(noise[:, :1])
                draw = generate_edit if e.kind == "edits" else generate
                x = draw(e, nothing, ones, p.caption[part], noise, k, cfg.guidance, solver=cfg.solver)
                parts.append(to_uint8(x))
                bar.update(len(x))
            got.append(torch.cat(parts).numpy())
        columns[name] = np.stack(got)
        bar.close()
    columns["another's picture"] = to_uint8(p.truth.roll(1, 0))[None].numpy()
    columns["truth"] = to_uint8(p.truth)[None].numpy()
    report = {}
    for name, pictures in columns.items():
        per_seed = [judge_t2i(to_float(x), p, net) for x in pictures]
        scores = {k: np.stack([m[k] for m in per_seed]) for k in per_seed[0]}
        report[name] = summary_of([scores], [features_of(pictures, p.truth, net)])
    print(f"\ntext to image: {cfg.n} held-out captions, {len(seeds)} seed(s), mean [95% interval]")
    print(table(["", *report], [[k, *(cell(k, v[k]) for v in report.values())]
                                for k in ORDER if k in report["truth"]]))
    shown = [name for name in columns if name != "another's picture"]
    rows = [[to_float(columns[name][0][i]) for name in shown] for i in range(min(4 * cfg.rows, cfg.n))]
    common.contact_sheet(rows, shown, row_titles=p.caption).save(out / "sheet.png")
    write_json(out / "results.json", {**provenance(started), "config": asdict(cfg), "t2i": report})
    print(f"\nwrote {out / 'results.json'} and {out / 'sheet.png'}")


def verdicts(a: np.ndarray, b: np.ndarray, higher: bool, tie: float) -> np.ndarray:
    """+1 where a is better, -1 where b is, 0 for a tie (or where neither was asked). Errors tie within the
    fraction `tie` of the larger one, or within half a level of 8 bits; shares tie only when equal."""
    a, b = np.nan_to_num(a), np.nan_to_num(b)
    if higher:
        return np.sign(np.round(a - b, 9))
    return np.where(np.abs(a - b) <= np.maximum(tie * np.maximum(a, b), 0.5 / 255), 0, np.sign(b - a))


def gsb(v: np.ndarray) -> dict:
    """Good, same, bad of verdicts [S, N]; superiority (G+S)/(S+B) in percent as in ByteEdit Sec. 4.3; net
    preference (G-B)/(G+S+B) with its interval; sign test over scenes (majority of the seeds)."""
    good, same, bad = int((v > 0).sum()), int((v == 0).sum()), int((v < 0).sum())
    majority = np.sign(v.sum(0))
    return {"good": good, "same": same, "bad": bad, "superiority": 100 * (good + same) / max(same + bad, 1),
            "net": bootstrap(v.mean(0)), "p": sign_test(int((majority > 0).sum()), int((majority < 0).sum()))}


def compare(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tie: float) -> dict[str, dict]:
    """GSB of metrics [S, N] by criterion. overall, of filled holes: more attributes right wins, and where
    they are equal the smaller exact error (where the scene has none, the smaller seam error). Of edits:
    success wins, and where it is equal the smaller error over the picture."""
    higher, lower = ("attributes",), ("exact", "seam")
    if "success" in a:
        higher, lower = ("success", "edit", "kept"), ("error", "over", "exact")
    each = {k: verdicts(a[k], b[k], k in higher, tie) for k in (*higher, *lower)}
    second = np.where(np.isnan(a[lower[0]]), each[lower[1]], each[lower[0]])
    overall = np.where(each[higher[0]] != 0, each[higher[0]], second)
    return {k: gsb(v) for k, v in {"overall": overall, **each}.items()}


def run_compare(cfg: Config, device: torch.device) -> None:
    started = time.time()
    open_out(cfg.out)
    net = load_parser(cfg.parser, device)
    if len([x for x in cfg.ckpt.split(",") if x.strip()]) != 2:
        raise SystemExit(f"error: --ckpt: {cfg.ckpt!r}: compare needs exactly two, A,B")
    (a, b), cases, seeds = gather(cfg, device, None)
    print(f"A = {a.name}\nB = {b.name}\ngood: A is better; overall: attributes (edits: success) first, then"
          f" the error (a tie within {100 * cfg.tie:.0f}%)")
    scores, report = {}, {}
    for key, c in cases.items():
        if a.kind == "edits":
            asked = ask(c, net)
            scores[key] = [judge_edits(r.pictures[key], c, asked, net)[0] for r in (a, b)]
        else:
            scores[key] = [judge_result(r.pictures[key], c, net)[0] for r in (a, b)]
    for aspect in dict.fromkeys(k.split("/")[0] for k in cases) if a.kind == "edits" else ():
        own = [v for k, v in scores.items() if k.split("/")[0] == aspect]
        scores[f"{aspect}/all"] = [{k: np.concatenate([x[k] for x in of_one], 1) for k in of_one[0]}
                                   for of_one in zip(*own)]
    for key, (of_a, of_b) in scores.items():
        report[key] = {"gsb": compare(of_a, of_b, cfg.tie),
                       "difference": {k: bootstrap((of_a[k] - of_b[k]).mean(0)) for k in of_a}}
        n = next(iter(of_a.values())).shape[1]
        print(f"\n{key}: {n} scenes, {len(seeds)} seed(s)")
        print(table(["", "good", "same", "bad", "(G+S)/(S+B)", "(G-B)/n % [95%]", "sign test p"], [
            [k, str(v["good"]), str(v["same"]), str(v["bad"]), f"{v['superiority']:.0f}%",
             cell("attributes", v["net"]), f"{v['p']:.2g}"] for k, v in report[key]["gsb"].items()]))
        rows = [[k, cell(k, report[key]["difference"][k])] for k in ORDER if k in of_a]
        print(table(["A - B", "mean [95%]"], rows))
    finish(cfg, started, [a, b], cases, seeds, {"a": a.name, "b": b.name, "tasks": report})


def run_prefs(cfg: Config, device: torch.device) -> None:
    """Preferences for train_reward.py, see prefs.make_prefs; and OUT/results.json."""
    started = time.time()
    steps = numbers(cfg.steps, "steps", 1)
    (seed,) = numbers(cfg.seeds, "seeds", 0)[:1]
    if cfg.k < 2:
        raise SystemExit(f"error: --k: {cfg.k}: ranking needs at least 2 pictures")
    if cfg.margin < 0 or not 0 <= cfg.mismatched <= 1:
        name, value = ("margin", cfg.margin) if cfg.margin < 0 else ("mismatched", cfg.mismatched)
        raise SystemExit(f"error: --{name}: {value}: use {'0 or more' if name == 'margin' else '0 to 1'}")
    source = data.open_source(cfg.data, "train")
    wanted = cfg.n + cfg.captions
    if min(cfg.n, cfg.captions, cfg.offset) < 0 or not 1 <= wanted <= len(source) - cfg.offset:
        raise SystemExit(f"error: --n: {cfg.n}: use 1 to {len(source)}, with --captions and --offset")
    if not cfg.ckpt or "," in cfg.ckpt:
        raise SystemExit(f"error: --ckpt: {cfg.ckpt!r}: prefs needs one checkpoint folder, the base")
    e = load_editor(cfg.ckpt, device, cfg.precision)
    out = open_out(cfg.out)

    def paint(image: Tensor, mask: Tensor, prompts: list[str], noise: Tensor, steps: int) -> Tensor:
        return generate(e, image, mask, prompts, noise, steps, cfg.guidance, cfg.solver)

    counts = make_prefs(cfg, out, source, e.size, steps, seed, paint)
    write_json(out / "results.json", {**provenance(started), "config": asdict(cfg), **counts})


def main(cfg: Config) -> None:
    if cfg.batch_size < 1:
        raise SystemExit(f"error: --batch_size: {cfg.batch_size}: use at least 1")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SystemExit("error: torchrun: several processes would judge the same: start one, without it")
    dist = common.setup(cfg.device)
    cfg = replace(cfg, precision=common.PRECISION[common.use_bf16(cfg.precision, dist)])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # setup() defers it for loops that save
    run = {"parser": run_parser, "scenes": run_scenes, "edits": run_edits, "t2i": run_t2i,
           "compare": run_compare, "prefs": run_prefs}
    try:
        run[cfg.task](cfg, dist.device)
    except (OSError, SafetensorError) as e:  # what is read is read by data.py and common.py, which say so
        raise SystemExit(f"error: --out: {cfg.out}: cannot write {getattr(e, 'filename', None) or 'there'} "
                         f"({getattr(e, 'strerror', None) or e}): free some space or choose another folder"
                         ) from None


if __name__ == "__main__":
    try:
        common.refuse_old_flags()
        main(tyro.cli(Config, description=__doc__, config=(tyro.conf.FlagConversionOff,)))
    except KeyboardInterrupt:
        raise SystemExit("interrupted: nothing was judged") from None
