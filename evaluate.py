"""The judge of scenes, and public benchmarks of edits.

    python evaluate.py parser  --out assets/parser --train_steps 6000          # the judge's parser
    python evaluate.py scenes  --ckpt assets/base,out/pefl --n 500       # tables, results.json, contact sheet
    python evaluate.py edits   --ckpt out/editnet,out/concat --n 300     # the same, of instruction editors
    python evaluate.py t2i     --ckpt assets/base --guidance 3           # the same, of text to image
    python evaluate.py compare --ckpt out/pefl,assets/base --steps 8,20  # paired good / same / bad, of either
    python evaluate.py bench   --name magicbrush --data MagicBrush/test --ckpt out/editnet --clip CLIP_B32
    python evaluate.py study   --folders out/a out/b --out out/rating    # side by side by people; --answers
    python evaluate.py report  out/pefl out/judge --out report.html     # runs and judges as one HTML file

A scene's description is known, so the judge needs no human: a parser network (scenes/judge.py) reads
attributes back from the picture, and the exact picture that belongs there is drawn again. `scenes` has the
tasks of ByteEdit (scenes/judge_holes.py), `edits` the seven of OmniEdit and `t2i` text to image
(scenes/judge_edits.py). Masks and instructions depend on the scene, noise on (seed, scene): equal for every
checkpoint, so that all comparisons are paired. Intervals are 95% bootstraps over scenes. Every picture is
judged as 8 bits per channel, a filled hole with the known pixels pasted back. Beside instruction editors
`edits` takes sdedit:BASE, blended:BASE and diffedit:BASE: a base that draws is told the target's caption, and
blended the region that changes (pipeline.baseline).

`bench` samples a published benchmark with an editor, or takes a tree of results (--results), scores every row
and prints the table (readers/bench.py, measures.py). Its rows are shared out over torchrun's ranks; the same
command goes on after any kind of stop.

    1. Statistics     2. Config     3. Results: pictures of an editor     4. The tasks
    5. bench     6. The commands
"""

import json
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import numpy as np
import torch
import tyro
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

import checkpoint
import common
import flow
import log
import measures
import model
import pipeline
from data import bucket, shapes
from log import bootstrap, open_out, provenance, sign_test, table, write_json
from measures import frechet
from pipeline import Pipe
from readers import bench as benches
from readers import rating
from readers import report as pages
from readers.files import BadFile, printable, read_image
from scenes import dataset
from scenes.dataset import EditScenes
from scenes.draw import LEVELS
from scenes.judge import (
    SIDE,
    Parser,
    load_parser,
    parser_accuracy,
    picture_features,
    to_float,
    to_uint8,
    train_parser,
)
from scenes.judge_edits import (
    EditCases,
    ask,
    bounds,
    edit_cases,
    features_of,
    judge_edits,
    judge_t2i,
    prompts,
)
from scenes.judge_holes import (
    TASKS,
    Cases,
    blurred,
    frechet_features,
    judge,
    make_cases,
    paste,
    texture,
    texture_test,
)

####################################################################################################
# 1. Statistics
####################################################################################################


def frechet_interval(a: np.ndarray, b: np.ndarray, draws: int = 40, seed: int = 0) -> dict:
    """Frechet distance of paired features [S, N, D] (S noise seeds), interval = 1.96 bootstrap standard
    deviations. Not the percentiles: a resample repeats scenes, which shifts the distance itself upwards."""
    S, N, D = a.shape
    rng = np.random.default_rng(seed)
    value = frechet(a.reshape(-1, D), b.reshape(-1, D))
    resampled = []
    for _ in range(draws):
        i = rng.integers(0, N, N)
        resampled.append(frechet(a[:, i].reshape(-1, D), b[:, i].reshape(-1, D)))
    half = 1.96 * float(np.std(resampled))
    return {"mean": value, "low": max(value - half, 0.0), "high": value + half, "n": N}


def judge_result(pictures: np.ndarray, c: Cases, net: Parser) -> tuple[dict, dict]:
    """pictures uint8 [S, N, H, W, 3] -> metrics [S, N], and {metric: mean and interval} with what is of all
    scenes together: the Frechet distances, and the textures against the truths' (first seed, with its p)."""
    per_seed = [judge(to_float(p), c, net) for p in pictures]
    scores = {k: np.stack([m[k] for m in per_seed]) for k in per_seed[0]}
    summary = {k: bootstrap(v.mean(0)) for k, v in scores.items()}  # not-a-number depends on the scene alone
    of_truth = frechet_features(c.truth, c, net)
    of_result = zip(*(frechet_features(paste(to_float(p), c), c, net) for p in pictures))
    for name, a, b in zip(("frechet", "frechet_hole"), of_result, of_truth):
        summary[name] = frechet_interval(np.stack(a), np.broadcast_to(b, (len(a), *b.shape)))
    value, half, p = texture_test(*(texture(x, c.mask) for x in (paste(to_float(pictures[0]), c), c.truth)))
    summary["textures"] = {"mean": value, "low": max(value - half, 0.0), "high": value + half,
                           "n": pictures.shape[1], "p": p}
    return scores, summary


LOWER = ("texture", "textures", "frechet", "frechet_hole", "exact", "hole", "seam")
HIGHER = ("attributes", "named", "empty", "shape", "colour", "material", "background", "environment", "style")


def headlines(truth: dict, base: dict, blur: dict, less: dict[str, np.ndarray]) -> list[str]:
    """The metrics that rank the truth above a result, and that above itself blurred: no other may say that
    one picture is better than another. truth, base, blur: summaries of judge_result; less: by metric, blur
    minus base scene by scene [N], of which the interval must not reach 0."""
    found = []
    for name in (*LOWER, *HIGHER):
        if name in base:
            sign = 1 if name in HIGHER else -1
            gap = bootstrap(sign * less[name])["high"] if name in less else \
                sign * (blur[name]["mean"] - base[name]["mean"])
            if gap < 0 < sign * (truth[name]["mean"] - base[name]["mean"]):
                found.append(name)
    return found


####################################################################################################
# 2. Config
####################################################################################################

@dataclass
class Config:
    task: tyro.conf.Positional[Literal["parser", "scenes", "edits", "t2i", "compare"]]
    ckpt: str = ""  # checkpoints or folders of saved pictures, with commas; edits: METHOD:BASE, too
    out: str = "out/evaluate"  # folder for results and the sheet, or for the parser
    save: str = ""  # scenes, edits: also keep the pictures here, a folder each, for a later `compare`
    parser: str = "assets/parser"  # the judge's parser
    n: int = 500  # scenes for each task; t2i: prompts
    data: str = "scenes"  # scenes or scenes:hard
    offset: int = 0  # first scene
    steps: str = "20"  # of sampling, for all or for each checkpoint
    train_steps: int = 6000  # parser: of training
    guidance: float = 1.0  # classifier-free guidance, of the instruction in edits; 1 = off
    image_guidance: float = 1.0  # edits: guidance of the source picture; 1 = off
    region: bool = False  # edits: show the editor which region changes
    strength: float = 0.75  # edits: of sdedit and diffedit, the share of the steps that is run
    aspects: str = "1:1"  # width:height, with commas; edits: each is judged on its own; parser: it sees all
    image_size: int = 0  # edits: side of the square of equal area; 0 = what the editor was trained at
    solver: Literal["euler", "heun", "dpm"] = "euler"  # of the sampler
    seeds: str = "0"  # noise seeds, with commas
    batch_size: int = 64  # pictures sampled together; parser: scenes in a training batch
    lr: float = 2e-3  # parser: peak learning rate, cosine
    tie: float = 0.05  # compare: errors that differ by less than this fraction are a tie
    rows: int = 4  # rows of the contact sheet for each task
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast where the hardware has it
    device: str = "auto"  # auto, cpu, cuda


####################################################################################################
# 3. Results: pictures of an editor, or of a folder
####################################################################################################


def open_judged(path: str, device: torch.device, *needs: str) -> Pipe:
    """An editor ready to be judged; SystemExit unless it can do one of `needs` (pipeline.open_editor)."""
    pipe = pipeline.open_editor(path, device, needs)
    if not pipe.size:
        raise SystemExit(f"error: {path}/manifest.json: config has no image_size: use a checkpoint that"
                         " train_omni.py or train_pefl.py wrote")
    pipe.net.to(device).eval().requires_grad_(False)
    return pipe


def drawn(pipe: Pipe, cfg: "Config", captions: list[str], mask: Tensor, image: Tensor, gens: list,
          steps: int) -> Tensor:
    """pipeline.sample at the settings of `cfg`, noise from `gens` -> [B, 3, H, W] on the CPU."""
    h, w = (side // pipe.space.stride for side in image.shape[2:])
    noise = common.randn(gens, (pipe.space.channels, h, w))
    return pipeline.sample(pipe.net, pipe.space, captions, mask, image, noise,
                           flow.timesteps(steps, pipe.shift), cfg.guidance, cfg.image_guidance, cfg.solver,
                           bf16=cfg.precision == "bf16").float().cpu()


@dataclass
class Result:
    """One column of the tables: pictures uint8 [S, N, H, W, 3] by key of the cases, nothing pasted yet."""

    kind: str  # of Editor
    name: str
    size: int
    stride: int = 1  # sides of its pictures are multiples of this
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    method: str = ""  # of pipeline.METHODS, if it is a base's work


AnyCases = dict[str, Cases] | dict[str, EditCases]  # by folder: TASK, or ASPECT/TASK
STREAMS = (*TASKS, *EditScenes.tasks)  # of noise


def sample_result(result: Result, pipe: Pipe, cases: AnyCases, cfg: Config, steps: int,
                  seeds: list[int]) -> None:
    """Fill `result` with pictures of one editor."""
    bar = log.progress(len(seeds) * sum(len(c.indices) for c in cases.values()), desc=result.name)
    for key, c in cases.items():
        h, w = c.image.shape[2:]
        out = np.empty((len(seeds), len(c.indices), h, w, 3), np.uint8)
        for s, seed in enumerate(seeds):
            for i in range(0, len(c.indices), cfg.batch_size):
                part = slice(i, i + cfg.batch_size)
                # a function of (seed, scene, task): the same for every checkpoint and batch size
                gens = common.generators(seed, 0, c.indices[part], stream=STREAMS.index(c.task))
                if result.method:
                    noise = common.randn(gens, (pipe.space.channels, h // pipe.space.stride,
                                                w // pipe.space.stride))
                    got = pipeline.baseline(
                        result.method, pipe.net, pipe.space, c.target_caption[part], c.image[part],
                        c.region[part].float(), noise, steps, pipe.shift, cfg.guidance, cfg.strength,
                        c.source_caption[part], cfg.precision == "bf16").float().cpu()
                elif pipe.follows:
                    mask = c.region[part].float() if cfg.region else torch.ones(len(gens), 1, h, w)
                    got = drawn(pipe, cfg, c.caption[part], mask, c.image[part], gens, steps)
                else:
                    got = drawn(pipe, cfg, c.caption[part], c.mask[part], c.image[part], gens, steps)
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
    if (found := dataset.parse_spec(cfg.data)) is None or found[1] is not None:
        raise SystemExit(f"error: --data: {cfg.data}: the judge knows the truth of scenes only: use scenes "
                         "or scenes:hard")
    return found[0]


def gather_cases(cfg: Config, kind: str, size: int, stride: int) -> AnyCases:
    if kind == "scenes":
        source, tasks = dataset.Scenes("heldout", level_of(cfg)), TASKS
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
    seeds, steps = common.numbers(cfg.seeds, "seeds", 0), common.numbers(cfg.steps, "steps", 1)
    if len(steps) not in (1, len(entries)):
        raise SystemExit(f"error: --steps: {cfg.steps}: give one number or {len(entries)}, one for each")
    steps = steps * (len(entries) // len(steps))
    opened, results = [], []
    for entry, k in zip(entries, steps):  # all are opened before the first is sampled: an error costs no time
        pipe, (method, base) = None, method_of(entry)
        if method and kind == "edits":
            pipe = open_judged(base, device, "draw", "fill")
            r = Result("edits", f"{entry.rstrip('/')}@{k}", cfg.image_size or pipe.size,
                       pipe.net.cfg.patch * pipe.space.stride, method=method)
        elif (Path(entry) / "judge.json").is_file():
            r = open_result(Path(entry))
            if r.kind != (kind or r.kind):
                raise SystemExit(f"error: {entry}: holds pictures of `evaluate.py {r.kind}`, not of {kind}:"
                                 " name another folder")
        else:
            pipe = open_judged(entry, device, *({"scenes": ["fill"], "edits": ["follow"]}.get(kind)
                                                or ["fill", "follow"]))
            size = cfg.image_size if pipe.follows and cfg.image_size else pipe.size
            r = Result("edits" if pipe.follows else "scenes", f"{entry.rstrip('/')}@{k}", size,
                       pipe.net.cfg.patch * pipe.space.stride)
        kind = r.kind
        opened.append(pipe)
        results.append(r)
        if r.size != results[0].size:
            raise SystemExit(f"error: --ckpt: {entry}: makes {r.size}-pixel pictures, {entries[0]}"
                             f" {results[0].size}: compare editors of one size")
    names = [r.name for r in results]
    for i, r in enumerate(results):
        r.name += f" ({i})" if names.count(names[i]) > 1 else ""
    cases = gather_cases(cfg, kind, results[0].size, math.lcm(*(r.stride for r in results)))
    for entry, k, pipe, r in zip(entries, steps, opened, results):
        if pipe is None:
            read_result(r, Path(entry), cases, seeds)
        else:
            sample_result(r, pipe, cases, cfg, k, seeds)
    return results, cases, seeds


####################################################################################################
# 4. parser, scenes, edits, t2i, compare
####################################################################################################

# printed in percent
SHARE = ("drawn", "named", "success", "edit", "kept", "kept_share", "shape", "colour", "material",
         "objects", "background", "environment", "style", "empty", "attributes", "judged", "truth_read",
         "source_read", "kept_asked")
ORDER = (*SHARE, "exact", "over", "error", "hole", "seam", "sharpness", "texture", "textures", "outside_raw",
         "outside", "frechet", "frechet_hole")


def cell(name: str, v: dict) -> str:
    if v["n"] == 0:
        return "-"
    if name in SHARE:
        return f"{100 * v['mean']:.1f} [{100 * v['low']:.1f}, {100 * v['high']:.1f}]"
    return f"{v['mean']:.4f} [{v['low']:.4f}, {v['high']:.4f}]"


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
    return log.contact_sheet(pictures, titles, row_titles=names)


def run_parser(cfg: Config, device: torch.device) -> None:
    started = time.time()
    steps = cfg.train_steps
    sizes = list(aspect_sizes(cfg.aspects, SIDE, SIDE // 8).values())
    net = train_parser(steps, cfg.batch_size, cfg.lr, device, cfg.precision == "bf16", sizes)
    weights = {k: v.bfloat16() for k, v in net.state_dict().items()}
    net.load_state_dict({k: v.float() for k, v in weights.items()})  # judged as it ships
    held = {}
    for level in LEVELS:
        for h, w in [*sizes, *((h // 2, w // 2) for h, w in sizes)]:
            right = parser_accuracy(net, (h, w), 3000 if (h, w) in sizes else 1000, device, level)
            held[f"{level} {w}x{h}"] = {k: bootstrap(v) for k, v in right.items()}
    heads = list(next(iter(held.values())))
    print("held-out accuracy on clean renders, percent [95% interval]")
    print(table(["", *held], [[k, *(cell("shape", v[k]) for v in held.values())] for k in heads]))
    meta = {"arch": net.arch, "config": asdict(cfg), "precision": cfg.precision,
            "samples": steps * cfg.batch_size, "heldout": held, **provenance(started)}
    checkpoint.write(cfg.out, steps, {"model": weights}, meta)
    print(f"wrote {cfg.out}: {common.n_params(net) / 1e6:.2f} M parameters, {time.time() - started:.0f} s")


def run_scenes(cfg: Config, device: torch.device) -> None:
    started = time.time()
    open_out(cfg.out)
    net = load_parser(cfg.parser, device)
    results, cases, seeds = gather(cfg, device, "scenes")
    controls = [soft(results[0], cases), known("truth", cases)]
    report, scores, more = {}, {}, {}
    for task, c in cases.items():
        judged = {r.name: judge_result(r.pictures[task], c, net) for r in [*results, *controls]}
        report[task] = {name: summary for name, (_, summary) in judged.items()}
        base, blur, truth = (judged[r.name] for r in (results[0], *controls))
        less = {k: (blur[0][k] - v).mean(0) for k, v in base[0].items()}
        sound = headlines(truth[1], base[1], blur[1], less)
        scores[task] = [judged[r.name][0] for r in [*results, controls[0]]]
        print(f"\n{task}: {len(c.indices)} held-out scenes, {len(seeds)} seed(s), mean [95% interval]")
        rows = [[k + " *" * (k in sound), *(cell(k, v[k]) for v in report[task].values())]
                for k in ORDER if k in truth[1]]
        rows.append(["textures: p", *(f"{v['textures']['p']:.3f}" for v in report[task].values())])
        print(table(["", *report[task]], rows))
        halves = frechet(*(picture_features(c.truth[i::2], net) for i in (0, 1))) if cfg.n > 3 else math.nan
        print(f"Frechet distance of one half of the truths to the other half, other scenes: {halves:.1f}")
        more[task] = {"headlines": sound, "frechet_of_halves": halves}
    print(f"\n* ranks the truth above {results[0].name}, and that above the same with blurred holes: no "
          "other row says that a picture is better")
    save_scores(cfg, [*results, controls[0]], scores)
    finish(cfg, started, results, cases, seeds, {"tasks": report, "controls": more})


def soft(r: Result, cases: AnyCases) -> Result:
    """A control: a result with its holes through a box filter. What it wins is no quality."""
    pictures = {key: np.stack([to_uint8(blurred(to_float(x), cases[key])).numpy() for x in of])
                for key, of in r.pictures.items()}
    return Result("", f"{r.name}, blurred", r.size, 1, pictures)


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
    log.save_sheet(sheet(results, cases, cfg.rows), out / "sheet.png")
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
    seeds, steps = common.numbers(cfg.seeds, "seeds", 0), common.numbers(cfg.steps, "steps", 1)
    if not entries or len(steps) not in (1, len(entries)):
        raise SystemExit(f"error: --ckpt: {cfg.ckpt!r}: give checkpoints, and in --steps one number or one "
                         "for each")
    painters = []
    for entry, k in zip(entries, steps * (len(entries) // len(steps))):
        pipe = open_judged(entry, device, "draw", "follow")
        name = f"{entry.rstrip('/')}@{k}"
        if pipe.follows:
            painters += [(f"{name}, branch off", pipe._replace(net=pipe.net.base), k),
                         (f"{name}, null picture", pipe, k)]
        else:
            painters.append((name, pipe, k))
    if len(sizes := {pipe.size for _, pipe, _ in painters}) > 1:
        raise SystemExit(f"error: --ckpt: pictures of {sorted(sizes)} pixels: compare editors of one size")
    source, indices = dataset.Scenes("heldout", level_of(cfg)), list(range(cfg.offset, cfg.offset + cfg.n))
    if cfg.n < 2 or cfg.offset < 0 or indices[-1] >= len(source):
        raise SystemExit(f"error: --n: {cfg.n}: use 2 to {len(source)} scenes, --offset included")
    p, columns = prompts(indices, painters[0][1].size, source), {}
    for name, pipe, k in painters:
        got, bar = [], log.progress(len(seeds) * cfg.n, desc=name)
        for seed in seeds:
            parts = []
            for i in range(0, cfg.n, cfg.batch_size):
                part = slice(i, i + cfg.batch_size)
                gens = common.generators(seed, 0, indices[part], stream=len(STREAMS))
                nothing = torch.zeros_like(p.truth[part])
                x = drawn(pipe, cfg, p.caption[part], torch.ones_like(nothing[:, :1]), nothing, gens, k)
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
    log.save_sheet(log.contact_sheet(rows, shown, row_titles=p.caption), out / "sheet.png")
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
    they are equal the texture nearer to the truth's. Of edits: success wins, and where it is equal the
    smaller error over the picture."""
    higher, lower = ("attributes",), ("texture", "exact", "seam")
    if "success" in a:
        higher, lower = ("success", "edit", "kept"), ("error", "over", "exact")
    each = {k: verdicts(a[k], b[k], k in higher, tie) for k in (*higher, *lower)}
    overall = np.where(each[higher[0]] != 0, each[higher[0]], each[lower[0]])
    return {k: gsb(v) for k, v in {"overall": overall, **each}.items()}


def run_compare(cfg: Config, device: torch.device) -> None:
    started = time.time()
    open_out(cfg.out)
    net = load_parser(cfg.parser, device)
    if len([x for x in cfg.ckpt.split(",") if x.strip()]) != 2:
        raise SystemExit(f"error: --ckpt: {cfg.ckpt!r}: compare needs exactly two, A,B")
    (a, b), cases, seeds = gather(cfg, device, None)
    print(f"A = {a.name}\nB = {b.name}\ngood: A is better; overall: attributes (edits: success) first, then "
          f"the texture (edits: the error; a tie within {100 * cfg.tie:.0f}%)")
    scores, report, blur = {}, {}, soft(b, cases) if b.kind == "scenes" else None
    for key, c in cases.items():
        if a.kind == "edits":
            asked = ask(c, net)
            scores[key] = [judge_edits(r.pictures[key], c, asked, net)[0] for r in (a, b)]
        else:
            scores[key] = [judge_result(r.pictures[key], c, net)[0] for r in (a, b, blur)]
    for aspect in dict.fromkeys(k.split("/")[0] for k in cases) if a.kind == "edits" else ():
        own = [v for k, v in scores.items() if k.split("/")[0] == aspect]
        scores[f"{aspect}/all"] = [{k: np.concatenate([x[k] for x in of_one], 1) for k in of_one[0]}
                                   for of_one in zip(*own)]
    for key, (of_a, of_b, *of_blur) in scores.items():
        report[key] = {"gsb": compare(of_a, of_b, cfg.tie),
                       "difference": {k: bootstrap((of_a[k] - of_b[k]).mean(0)) for k in of_a}}
        n = next(iter(of_a.values())).shape[1]
        print(f"\n{key}: {n} scenes, {len(seeds)} seed(s)")
        print(table(["", "good", "same", "bad", "(G+S)/(S+B)", "(G-B)/n % [95%]", "sign test p"], [
            [k, str(v["good"]), str(v["same"]), str(v["bad"]), f"{v['superiority']:.0f}%",
             cell("attributes", v["net"]), f"{v['p']:.2g}"] for k, v in report[key]["gsb"].items()]))
        for blurry in of_blur:
            report[key]["control"] = compare(blurry, of_b, cfg.tie)
            found = report[key]["control"].items()
            print("B with blurred holes against B: "
                  + ", ".join(f"{k} {cell('attributes', v['net'])}" for k, v in found) + "; what it wins is "
                  f"no quality: {', '.join(k for k, v in found if v['net']['low'] > 0) or 'nothing'}")
        rows = [[k, cell(k, report[key]["difference"][k])] for k in ORDER if k in of_a]
        print(table(["A - B", "mean [95%]"], rows))
    finish(cfg, started, [a, b], cases, seeds, {"a": a.name, "b": b.name, "tasks": report})


def check(cfg: Config) -> None:
    """Refuse values that cannot work, before anything is loaded."""
    common.check_bounds(cfg, at_least_1=("batch_size", "train_steps"), not_negative=(
        "n", "offset", "guidance", "image_guidance", "image_size", "rows", "lr", "tie"),
        share=("strength",))


def judge_scenes(cfg: Config) -> None:
    check(cfg)
    if common.ranks()[1] > 1:
        raise SystemExit("error: torchrun: several processes would judge the same: start one, without it")
    dist = common.setup(cfg.device)
    cfg = replace(cfg, precision=common.PRECISION[common.use_bf16(cfg.precision, dist)])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # setup() defers it for loops that save
    run = {"parser": run_parser, "scenes": run_scenes, "edits": run_edits, "t2i": run_t2i,
           "compare": run_compare}
    try:
        run[cfg.task](cfg, dist.device)
    except (OSError, SafetensorError) as e:  # what is read is read by data.py and common.py, which say so
        raise SystemExit(f"error: --out: {cfg.out}: cannot write {getattr(e, 'filename', None) or 'there'} "
                         f"({getattr(e, 'strerror', None) or e}): free some space or choose another folder"
                         ) from None


####################################################################################################
# 5. bench
####################################################################################################


@dataclass
class Bench:
    """A benchmark of edits as it is published, to its table."""

    name: Literal["magicbrush", "emu", "pie", "editbench", "omniedit", "gedit", "imgedit", "userbench"]
    data: str  # its folder as published (readers/benchmarks.py has the layouts)
    ckpt: str = ""  # editor that makes the results, into OUT/pictures, in the tree that its scorer reads; or
    # METHOD:BASE, of sdedit, blended, diffedit, where the benchmark says what the result shows
    results: str = ""  # or such a tree of any system's results
    out: str = "out/bench"  # folder for rows.*.jsonl, results.json, table.txt, sheet.png
    partial: bool = False  # a set with fewer rows than published, too; the table says so
    captions: Literal["local", "global"] = "local"  # magicbrush: descriptions, for clip_t
    column: Literal["prompt_full", "prompt_mask-simple", "prompt_mask-rich"] = "prompt_full"  # editbench
    language: Literal["", "en", "cn"] = ""  # gedit: one of its two
    pictures: str = ""  # imgedit: the folder of its pictures, if not beside the file
    metrics: str = ""  # names of measures.py, with commas; default those of the benchmark's tables
    clip: str | None = None  # CLIP ViT-B/32: a folder of transformers', or WEIGHTS,TOKENIZER
    clip_large: str | None = None  # CLIP ViT-L/14, the same
    dino: str | None = None  # dino_vits16
    dino_keys: str | None = None  # dino_vitb8, for structure
    lpips: str | None = None  # BACKBONE,HEADS
    blip: str | None = None  # BLIP for retrieval: a folder of transformers', or WEIGHTS,vocab.txt
    image_reward: str | None = None  # ImageReward.pt,vocab.txt
    pick_score: str | None = None  # PickScore_v1
    hps: str | None = None  # HPS_v2.1_compressed.pt,TOKENIZER
    inception: str | None = None  # of pytorch-fid, for fid and kid
    judge: str = ""  # omniedit, gedit, imgedit: a served model, http://HOST/v1
    judge_model: str = ""  # its name; its key is read from the variable JUDGE_API_KEY
    budget: int | None = None  # requests to it, of each rank, retries counted; None: no end
    region: bool = False  # show an instruction editor the mask; most tables do not
    steps: int = 20  # of the sampler
    guidance: float = 3.0  # of the text; 1 = off
    image_guidance: float = 1.5  # of the source picture; 1 = off
    strength: float = 0.75  # of sdedit and diffedit: share of the steps that is run
    solver: Literal["euler", "heun", "dpm"] = "euler"
    image_size: int = 0  # side of the square of equal area that is worked at; 0: what it was trained at
    seed: int = 0  # noise of a row = f(seed, its place in the benchmark)
    sd3: str | None = None  # SD3's VAE and text encoders, where they are not what --ckpt came with
    tokenizers: str | None = None
    rows: int = 8  # of the contact sheet
    batch_size: int = 16  # rows sampled together
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast where the hardware has it
    device: str = "auto"  # auto, cpu, cuda


TOWERS = ("clip", "clip_large", "dino", "dino_keys", "lpips", "blip", "image_reward", "pick_score", "hps",
          "inception")
# what does not change a number, or is told by the weights' sums
UNTOLD = ("out", "data", "pictures", "device", "batch_size", "budget", "rows", "sd3", "tokenizers", *TOWERS)


def bench(cfg: Bench) -> None:
    # 1) rows, measures, judge, editor: all opened before the first row, an error costs no time
    started = time.time()
    common.check_bounds(cfg, at_least_1=("steps", "batch_size"),
                        not_negative=("guidance", "image_guidance", "image_size", "rows", "budget"),
                        share=("strength",))
    if bool(cfg.ckpt) == bool(cfg.results):
        raise SystemExit(f"error: --ckpt: {cfg.ckpt!r}: give either an editor or a tree of --results")
    if cfg.results and not Path(cfg.results).is_dir():
        raise SystemExit(f"error: --results: {cfg.results}: no such folder: correct the path")
    b = benches.open_bench(cfg.name, cfg.data, cfg.partial, cfg.captions, cfg.column, cfg.language,
                           cfg.pictures)
    dist = common.setup(cfg.device)
    for s in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(s, signal.SIG_DFL)  # what is on disk is all the state there is
    cfg = replace(cfg, precision=common.PRECISION[common.use_bf16(cfg.precision, dist)])
    towers = measures.open_towers(**{name: getattr(cfg, name) for name in TOWERS}, device=dist.device)
    names, left_out = choose_measures(b, cfg, towers)
    singles = [name for name in names if name not in measures.SETS]
    pipe = open_for(b, cfg, dist.device) if cfg.ckpt else None
    about = {"measures": measures.describe(names, towers), "step": pipe and pipe.manifest.get("step")}
    told = common.portable({k: v for k, v in asdict(cfg).items() if k not in UNTOLD})
    benches.keep_plan(open_out(cfg.out), b, told | about, dist)
    client = benches.open_client(b, cfg.judge, cfg.judge_model, cfg.budget, cfg.out, dist.rank)
    folder = Path(cfg.results or f"{cfg.out}/pictures")

    # 2) the rows of this rank that are not finished: results, measures, judge, a few at a time
    done = benches.read_lines(cfg.out)
    mine = [r for chain in benches.chains(b.rows)[dist.rank::dist.world] for r in chain
            if (not benches.finished(done.get(r.key)) or
                done[r.key]["file"] != benches.digest(benches.result_of(folder, r.key)) if r.tables else
                pipe and not benches.result_of(folder, r.key))]
    with log.progress(len(mine), desc=b.name, dist=dist) as bar, benches.Lines(cfg.out, dist.rank) as lines:
        for part in benches.parts(mine, 4 * cfg.batch_size):
            if pipe:
                make_results(pipe, cfg, b, part, folder, dist.rank)
            found = {r.key: score(b, r, singles, towers, folder) for r in part if r.tables}
            stopped = client and benches.judge_rows(client, b, part, found, folder)
            for key, line in found.items():
                if not stopped or benches.finished(line):
                    lines.add({"key": key, **line})
            if stopped:
                raise SystemExit(f"error: --judge: {client.url}: {stopped}: the same command goes on where "
                                 "it ended")
            bar.update(len(part))

    # 3) the table, by the rank that ends last
    done = benches.read_lines(cfg.out)
    if waiting := sum(bool(r.tables) and r.key not in done for r in b.rows):
        print(f"rank {dist.rank}: done; {waiting:,} rows are still with others", flush=True)
    else:
        write_tables(cfg, b, names, left_out, done, about, towers, folder, started)
    common.cleanup()


def choose_measures(b: benches.Benchmark, cfg: Bench, towers: measures.Towers) -> tuple[list[str], dict]:
    """-> names, {name: why it is left out}. Those of --metrics must be possible; of the benchmark's own those
    are taken whose networks are there."""
    asked, names, left_out = [x.strip() for x in cfg.metrics.split(",") if x.strip()], [], {}
    for name in asked or b.metrics:
        try:
            names += measures.check_names([name], towers)
        except ValueError as e:
            if asked:
                raise SystemExit(f"error: {'' if str(e).startswith('--') else '--metrics: '}{e}") from None
            flag = measures.MEASURES[name].tower
            left_out[name] = f"no --{flag}" if getattr(towers, flag) is None else f"--{flag} has no tokenizer"
    if b.judge and not cfg.judge:
        left_out |= dict.fromkeys(benches.JUDGED[b.judge], "no --judge")
    return list(dict.fromkeys(names)), left_out


def open_for(b: benches.Benchmark, cfg: Bench, device: torch.device) -> Pipe:
    """The editor, if it can do what the benchmark asks: follow instructions, or fill holes; for METHOD:BASE
    draw what the rows say that their results show."""
    needs = ["follow"] * all(r.instruction for r in b.rows)
    needs += ["fill"] * all(r.mask is not None and r.prompt is not None for r in b.rows)
    method, path = method_of(cfg.ckpt)
    if method:
        needs = ["draw", "fill"]
        lacks = "captions of the results" if any(not r.target_text for r in b.rows) else \
            "masks" if method == "blended" and any(r.mask is None for r in b.rows) else ""
        if lacks:
            raise SystemExit(f"error: --ckpt: {cfg.ckpt}: {method} needs {lacks}, and rows of {b.name} have "
                             "none: give an editor")
    pipe = pipeline.open_editor(path, device, tuple(needs), sd3=cfg.sd3, tokenizers=cfg.tokenizers)
    size, token = cfg.image_size or pipe.size, pipe.net.cfg.patch * pipe.space.stride
    if not size or size % token:
        raise SystemExit(f"error: --image_size: {size or 'missing'}: must be a multiple of {token}, the "
                         "model's patch in pixels")
    if cfg.precision == "bf16":
        model.half_linears(pipe.net)
    pipe.net.to(device).eval().requires_grad_(False)
    return pipe


def method_of(ckpt: str) -> tuple[str, str]:
    """ "sdedit:assets/base" -> its two parts; another path -> "" and itself."""
    method, _, base = ckpt.partition(":")
    return (method, base) if method in pipeline.METHODS else ("", ckpt)


def make_results(pipe: Pipe, cfg: Bench, b: benches.Benchmark, rows: list[benches.Row], folder: Path,
                 rank: int) -> None:
    """Samples what has no result yet into the tree of results, each at its source's size.

    An instruction editor sees the whole picture, and its mask with --region; nothing is pasted. One that
    fills holes is given the mask, and what is outside it comes back as it was."""
    method = method_of(cfg.ckpt)[0]
    whole = pipe.follows or bool(method)  # all of the picture may change
    token, size, jobs = pipe.net.cfg.patch * pipe.space.stride, cfg.image_size or pipe.size, {}
    aspects = bool(pipe.manifest.get("config", {}).get("aspects"))
    for r in rows:
        if benches.result_of(folder, r.key):
            continue
        source = benches.source_of(r, folder)
        h, w = source.shape[:2]
        mask = np.ones((h, w), np.float32)
        if r.mask is not None and (cfg.region if pipe.follows else method in ("", "blended")):
            mask = benches.mask_of(b, r, h, w)
        H, W = bucket(h, w, size, token, aspects)
        if pipe.follows and aspects:  # as sample.py: rather a shape between two buckets than a margin
            H, W = shapes(size, token, (min(max(h / w, 1 / 4), 4),))[0]
        if max(H, W) > pipe.net.cfg.pos_max * token:
            raise SystemExit(f"error: --image_size: {size}: {r.key} needs {W}x{H}, the model takes at most "
                             f"{pipe.net.cfg.pos_max * token} a side: give a smaller one")
        fit = pipeline.to_work(source, mask, H, W, hide=not whole)
        jobs.setdefault((H, W), []).append((r, source, mask[..., None], *fit))
    for (H, W), found in jobs.items():
        for at in range(0, len(found), cfg.batch_size):
            part, sources, masks, boxes, mask_in, image_in = zip(*found[at:at + cfg.batch_size])
            gens = common.generators(cfg.seed, 0, [r.place for r in part])
            noise = common.randn(gens, (pipe.space.channels, H // pipe.space.stride, W // pipe.space.stride))
            given, bf16 = (torch.stack(mask_in), torch.stack(image_in)), cfg.precision == "bf16"
            if method:
                x0 = pipeline.baseline(method, pipe.net, pipe.space, [r.target_text for r in part],
                                       given[1], given[0], noise, cfg.steps, pipe.shift, cfg.guidance,
                                       cfg.strength, [r.source_text or "" for r in part], bf16).float().cpu()
            else:
                said = [r.instruction if pipe.follows else r.prompt for r in part]
                x0 = pipeline.sample(pipe.net, pipe.space, said, *given, noise,
                                     flow.timesteps(cfg.steps, pipe.shift), cfg.guidance,
                                     cfg.image_guidance, cfg.solver, bf16=bf16).float().cpu()
            if not x0.isfinite().all():
                raise SystemExit(f"error: {cfg.ckpt}: the model gave NaN: try --precision fp32")
            for r, source, mask, box, x in zip(part, sources, masks, boxes, x0):
                x = pipeline.from_work(x, box, *source.shape[:2])
                x = x if whole else mask * x + (1 - mask) * source
                if r.copy:
                    copy = benches.picture(r.source, alpha=True)
                    benches.put_picture(folder / r.copy, copy, cfg.out, rank)
                file = folder / f"{r.key}{b.suffix}"
                benches.put_picture(file, (x + 0.5).astype(np.uint8), cfg.out, rank)


def score(b: benches.Benchmark, r: benches.Row, names: list[str], towers: measures.Towers,
          folder: Path) -> dict:
    """Measures of a row by name, not-a-number where a row has not what one needs; {"missing": why} without a
    usable result."""
    file = benches.result_of(folder, r.key)
    if not file:
        return {"missing": "no file"}
    try:
        result = benches.result_picture(b, r, folder)
    except BadFile as e:
        return {"missing": "not a readable picture", "why": printable(str(e))[:200]}
    given = {"source": benches.source_of(r, folder), "target": r.target and benches.picture(r.target),
             "source_text": r.source_text, "target_text": r.target_text, "mask": None}
    masked = any("mask" in measures.MEASURES[name].needs for name in names)
    if masked and r.mask is not None and given["source"] is not None:
        given["mask"] = benches.mask_of(b, r, *given["source"].shape[:2], border=True) > 0.5
    asked = [n for n in names if all(given[k] is not None for k in measures.MEASURES[n].needs)]
    try:
        found = measures.measure(asked, towers, result=result, **given)
    except ValueError as e:  # a picture too small for one of them
        raise SystemExit(f"error: --metrics: {r.key}: {e}") from None
    return dict.fromkeys(names, math.nan) | found | {"file": benches.digest(file)}


def write_tables(cfg: Bench, b: benches.Benchmark, names: list[str], left_out: dict, done: dict,
                 about: dict, towers: measures.Towers, folder: Path, started: float) -> None:
    """results.json, table.txt, sheet.png; for ImgEdit its scorer's files."""
    out, sets = Path(cfg.out), [name for name in names if name in measures.SETS]
    columns = [name for name in names if name not in sets]
    columns += ["clip_dir_or_0"] * ("clip_dir" in columns)
    columns += benches.JUDGED[b.judge] if cfg.judge else ()
    tables = benches.tables_of(b, columns, done)
    for name, t in tables.items():
        rows = [r for r in b.rows if name in r.tables and benches.finished(done[r.key])]
        t["sets"] = {k: distance(k, b, rows, towers, folder) for k in sets if len(rows) > 1}
    overall = benches.imgedit_files(b, done, out, folder) if b.name == "imgedit" else None
    text = benches.table_text(b, columns, tables, left_out, overall)
    write_json(out / "results.json", {
        **provenance(started), "config": common.portable(asdict(cfg)), "benchmark": b.name, "split": b.split,
        "published_rows": b.published, "aggregation": b.aggregation, "notes": b.notes, "left_out": left_out,
        "judge": {"url": cfg.judge, "model": cfg.judge_model} if cfg.judge else None, **about,
        "tables": tables, "overall": overall})
    benches.put(out / "table.txt", f"{text}\n".encode())
    if picture := benches.sheet(b, done, folder, cfg.rows):
        picture.save(out / "sheet.png")
    print(f"\n{text}\n\nwrote {out / 'results.json'}, table.txt" + ", sheet.png" * bool(picture), flush=True)


def distance(name: str, b: benches.Benchmark, rows: list[benches.Row], towers: measures.Towers,
             folder: Path) -> dict:
    """fid, kid or clip_fid of results from their targets or, where there are none, from their sources."""
    against = "targets" if rows[0].target is not None else "sources"
    results = (benches.result_picture(b, r, folder) for r in rows)
    others = (benches.picture(r.target) if r.target is not None else benches.source_of(r, folder)
              for r in rows)
    both = [measures.features_of_set(name, x, towers) for x in (results, others)]
    value = (measures.kid if name == "kid" else measures.fid)(*both)
    return {"value": value, "n": len(rows), "against": against}


####################################################################################################
# 6. The commands
####################################################################################################

# beside the tasks of Config, which judge scenes: name -> its flags, its function
COMMANDS = {"bench": (Bench, bench), "study": (rating.Study, rating.study),
            "report": (pages.Report, pages.report)}


def main(cfg) -> None:
    run = next((run for kind, run in COMMANDS.values() if isinstance(cfg, kind)), judge_scenes)
    run(cfg)


if __name__ == "__main__":
    flags, lost = Config, "nothing was judged"
    words = (*get_args(get_args(get_type_hints(Config, include_extras=True)["task"])[0]), *COMMANDS)
    if len(sys.argv) < 2 or not sys.argv[1].startswith("-") and sys.argv[1] not in words:
        raise SystemExit(f"error: command line: {' '.join(sys.argv[1:2]) or 'no task'}: use one of "
                         f"{', '.join(words)}")
    if sys.argv[1] in COMMANDS:
        flags, lost = COMMANDS[sys.argv[1]][0], "the same command goes on"
        sys.argv[:2] = [f"{sys.argv[0]} {sys.argv[1]}"]  # one word: results.json names the command by it
    common.command(main, flags, __doc__, lost)
