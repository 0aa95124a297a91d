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
and prints the table (benchmark.py, measures.py). Its rows are shared out over torchrun's ranks; the same
command goes on after any kind of stop.

    1. Config     2. Pictures of an editor     3. The tasks     4. The commands
"""

import math
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import numpy as np
import torch
import tyro
from safetensors import SafetensorError
from torch import Tensor

import benchmark
import checkpoint
import common
import flow
import log
import pipeline
from data import shapes
from log import bootstrap, frechet, open_out, provenance, table, write_json
from pipeline import Pipe
from readers import rating
from readers import report as pages
from scenes import dataset
from scenes.dataset import EditScenes
from scenes.draw import LEVELS
from scenes.judge import (
    SIDE,
    load_parser,
    parser_accuracy,
    picture_features,
    to_float,
    to_uint8,
    train_parser,
)
from scenes.judge_edits import (
    ask,
    bounds,
    edit_cases,
    features_of,
    judge_edits,
    judge_t2i,
    prompts,
    summary_of,
)
from scenes.judge_holes import TASKS, headlines, judge_result, make_cases
from scenes.results import (
    ORDER,
    AnyCases,
    Result,
    cell,
    compare,
    folder_of,
    known,
    open_result,
    read_result,
    save_result,
    save_scores,
    sheet,
    soft,
)

####################################################################################################
# 1. Config
####################################################################################################


@dataclass
class Config:
    task: tyro.conf.Positional[Literal["parser", "scenes", "edits", "t2i", "compare"]]
    ckpt: str = ""  # checkpoints or folders of saved pictures, with commas; edits: METHOD:BASE, too
    out: str = "out/evaluate"  # folder for results and the sheet, or for the parser
    save: str = ""  # scenes, edits: also keep the pictures here, a folder each, for a later `compare`
    parser: str = "assets/parser"  # the judge's parser
    n: int = 500  # scenes for each task; t2i: number of prompts
    data: str = "scenes"  # scenes or scenes:hard
    offset: int = 0  # leave out the first so many scenes
    steps: str = "20"  # sampler steps: one number for all, or one for each checkpoint, with commas
    train_steps: int = 6000  # parser: training steps
    guidance: float = 1.0  # classifier-free guidance, of the instruction in edits; 1 = off
    image_guidance: float = 1.0  # edits: guidance of the source picture; 1 = off
    region: bool = False  # edits: show the editor which region changes
    strength: float = 0.75  # edits: share (0 to 1) of the steps that sdedit and diffedit run
    aspects: str = "1:1"  # width:height, with commas; edits: each is judged on its own; parser: it sees all
    image_size: int = 0  # edits: side of the square of equal area; 0 = what the editor was trained at
    solver: Literal["euler", "heun", "dpm"] = "euler"  # solver of the sampler
    seeds: str = "0"  # noise seeds, with commas
    batch_size: int = 64  # pictures sampled together; parser: scenes in a training batch
    lr: float = 2e-3  # parser: peak learning rate, cosine
    tie: float = 0.05  # compare: errors that differ by less than this fraction are a tie
    rows: int = 4  # rows of the contact sheet for each task
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast where the hardware has it
    device: str = "auto"  # auto (a GPU where there is one), cpu or cuda


####################################################################################################
# 2. Pictures of an editor, or of a folder
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
                        c.source_caption[part], cfg.solver, cfg.precision == "bf16").float().cpu()
                elif pipe.follows:
                    mask = c.region[part].float() if cfg.region else torch.ones(len(gens), 1, h, w)
                    got = drawn(pipe, cfg, c.caption[part], mask, c.image[part], gens, steps)
                else:
                    got = drawn(pipe, cfg, c.caption[part], c.mask[part], c.image[part], gens, steps)
                out[s, part] = to_uint8(got).numpy()
                bar.update(len(got))
        result.pictures[key] = out
    bar.close()


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
        pipe, (method, base) = None, pipeline.method_of(entry, cfg.solver)
        if method and kind == "edits":
            pipe = open_judged(base, device, "draw", "fill")
            r = Result("edits", f"{entry.rstrip('/')}@{k}", cfg.image_size or pipe.size,
                       pipe.net.cfg.patch * pipe.space.stride, method=method, level=level_of(cfg))
        elif (Path(entry) / "judge.json").is_file():
            r = open_result(Path(entry))
            if r.kind != (kind or r.kind):
                raise SystemExit(f"error: {entry}: holds pictures of `evaluate.py {r.kind}`, not of {kind}:"
                                 " name another folder")
            if r.level != level_of(cfg):
                raise SystemExit(f"error: {entry}: holds pictures of {r.level} scenes, not of {level_of(cfg)}"
                                 " ones: give the --data that they were drawn for, or name another folder")
        else:
            pipe = open_judged(entry, device, *({"scenes": ["fill"], "edits": ["follow"]}.get(kind)
                                                or ["fill", "follow"]))
            size = cfg.image_size if pipe.follows and cfg.image_size else pipe.size
            r = Result("edits" if pipe.follows else "scenes", f"{entry.rstrip('/')}@{k}", size,
                       pipe.net.cfg.patch * pipe.space.stride, level=level_of(cfg))
        kind = r.kind
        opened.append(pipe)
        results.append(r)
        if r.size != results[0].size:
            raise SystemExit(f"error: --ckpt: {entry}: makes {r.size}-pixel pictures, {entries[0]}"
                             f" {results[0].size}: compare editors of one size")
    names = [r.name for r in results]
    for i, r in enumerate(results):
        r.name += f" ({i})" if names.count(names[i]) > 1 else ""
    folders = [folder_of(r) for r in results]
    if cfg.save and (twice := next((f for f in folders if folders.count(f) > 1), None)):
        a, b = [r.name for r, f in zip(results, folders) if f == twice][:2]
        raise SystemExit(f"error: --save: {a} and {b} would both be saved as {twice}: rename one's folder")
    cases = gather_cases(cfg, kind, results[0].size, math.lcm(*(r.stride for r in results)))
    for entry, k, pipe, r in zip(entries, steps, opened, results):
        if pipe is None:
            read_result(r, Path(entry), cases, seeds)
        else:
            sample_result(r, pipe, cases, cfg, k, seeds)
    return results, cases, seeds


####################################################################################################
# 3. The tasks: parser, scenes, edits, t2i, compare
####################################################################################################


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
    save_scores(Path(cfg.out), [*results, controls[0]], scores)
    finish(cfg, started, results, cases, seeds, {"tasks": report, "controls": more})


def finish(cfg: Config, started: float, results: list[Result], cases: AnyCases, seeds: list[int],
           content: dict) -> None:
    """Pictures (--save), contact sheet and results.json."""
    out = Path(cfg.out)
    if cfg.save:
        for r in results:
            save_result(r, cases, seeds, Path(cfg.save) / folder_of(r))
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
    save_scores(Path(cfg.out), results, {key: rows[:len(results)] for key, rows in every.items()})
    finish(cfg, started, results, cases, seeds, {"aspects": report})


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
        print(f"\n{key}: {n} scenes, {len(seeds)} seed(s); n: those that a measure is asked of")
        print(table(["", "n", "good", "same", "bad", "(G+S)/(S+B)", "(G-B)/n % [95%]", "sign test p"], [
            [k, str(v["net"]["n"]), str(v["good"]), str(v["same"]), str(v["bad"]),
             f"{v['superiority']:.0f}%" if v["net"]["n"] else "-",
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
# 4. The commands
####################################################################################################

# beside the tasks of Config, which judge scenes: name -> its flags, its function
COMMANDS = {"bench": (benchmark.Bench, benchmark.bench), "study": (rating.Study, rating.study),
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
