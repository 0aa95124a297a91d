"""A published benchmark of edits: the results of an editor, or a tree of anybody's, scored to a table.

`evaluate.py bench`. readers/bench.py has the rows and what a run leaves on disk, measures.py the metrics.

    1. flags     2. the run     3. results of an editor     4. scores and tables
"""

import math
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import checkpoint
import common
import flow
import log
import measures
import model
import pipeline
from data import bucket, shapes
from log import open_out, provenance, write_json
from pipeline import Pipe
from readers import bench as benches
from readers.files import BadFile, printable

#### 1. flags ##############################################################################################


@dataclass
class Bench:
    """A benchmark of edits as it is published, to its table."""

    name: Literal["magicbrush", "emu", "pie", "editbench", "omniedit", "gedit", "imgedit", "userbench"]
    data: str  # its folder as published (readers/benchmarks.py has the layouts)
    ckpt: str = ""  # editor to score (METHOD:BASE: see pipeline.baseline); results go to OUT/pictures
    results: str = ""  # or a folder of any system's results, in the tree that the published scorer reads
    out: str = "out/bench"  # folder for rows.*.jsonl, results.json, table.txt, sheet.png
    partial: bool = False  # accept a set with fewer rows than published; the table says so
    captions: Literal["local", "global"] = "local"  # magicbrush: which descriptions clip_t compares with
    column: Literal["prompt_full", "prompt_mask-simple", "prompt_mask-rich"] = "prompt_full"  # editbench
    language: Literal["", "en", "cn"] = ""  # gedit: only this one of its two languages
    pictures: str = ""  # imgedit: the folder of its pictures, if not beside the file
    metrics: str = ""  # names of measures.py, with commas; default those of the benchmark's tables
    clip: str | None = None  # CLIP ViT-B/32: a folder of transformers', or WEIGHTS,TOKENIZER
    clip_large: str | None = None  # CLIP ViT-L/14, the same
    dino: str | None = None  # DINO ViT-S/16: a file or folder with the weights of dino_vits16
    dino_keys: str | None = None  # DINO ViT-B/8 (dino_vitb8), for structure
    lpips: str | None = None  # LPIPS: BACKBONE,HEADS, two files
    blip: str | None = None  # BLIP for retrieval: a folder of transformers', or WEIGHTS,vocab.txt
    image_reward: str | None = None  # ImageReward.pt,vocab.txt
    pick_score: str | None = None  # PickScore_v1, a folder
    hps: str | None = None  # HPS_v2.1_compressed.pt,TOKENIZER
    inception: str | None = None  # pytorch-fid's Inception weights, for fid and kid
    judge: str = ""  # omniedit, gedit, imgedit: a served model, http://HOST/v1
    judge_model: str = ""  # name of the served model; its key is read from the variable JUDGE_API_KEY
    budget: int | None = None  # most questions to it, per rank, retries counted; None: no limit
    region: bool = False  # show an instruction editor the mask; most tables do not
    steps: int = 20  # sampler steps
    guidance: float = 3.0  # guidance of the text; 1 = off
    image_guidance: float = 1.5  # guidance of the source picture; 1 = off
    strength: float = 0.75  # share (0 to 1) of the steps that sdedit and diffedit run
    solver: Literal["euler", "heun", "dpm"] = "euler"  # solver of the sampler
    image_size: int = 0  # side of the square of equal area that is worked at; 0: what it was trained at
    seed: int = 0  # noise of a row = f(seed, its place in the benchmark)
    sd3: str | None = None  # SD3's VAE and text encoders, where they are not what --ckpt came with
    tokenizers: str | None = None  # folder of SD3's tokenizers, where they do not come with the weights
    rows: int = 8  # rows of the contact sheet
    batch_size: int = 16  # rows sampled together
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast where the hardware has it
    device: str = "auto"  # auto (a GPU where there is one), cpu or cuda


TOWERS = ("clip", "clip_large", "dino", "dino_keys", "lpips", "blip", "image_reward", "pick_score", "hps",
          "inception")
# what does not change a number, or is told by the weights' sums
UNTOLD = ("out", "data", "pictures", "device", "batch_size", "budget", "rows", "sd3", "tokenizers", *TOWERS)


#### 2. the run ############################################################################################


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
    about = {"measures": measures.describe(names, towers),
             "weights": pipe and checkpoint.identity(pipeline.method_of(cfg.ckpt)[1])}
    told = log.portable({k: v for k, v in asdict(cfg).items() if k not in UNTOLD})
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


#### 3. results of an editor ###############################################################################


def open_for(b: benches.Benchmark, cfg: Bench, device: torch.device) -> Pipe:
    """The editor, if it can do what the benchmark asks: follow instructions, or fill holes; for METHOD:BASE
    draw what the rows say that their results show."""
    needs = ["follow"] * all(r.instruction for r in b.rows)
    needs += ["fill"] * all(r.mask is not None and r.prompt is not None for r in b.rows)
    method, path = pipeline.method_of(cfg.ckpt, cfg.solver)
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


def make_results(pipe: Pipe, cfg: Bench, b: benches.Benchmark, rows: list[benches.Row], folder: Path,
                 rank: int) -> None:
    """Samples what has no result yet into the tree of results, each at its source's size.

    An instruction editor sees the whole picture, and its mask with --region; nothing is pasted. One that
    fills holes is given the mask, and what is outside it comes back as it was."""
    method = pipeline.method_of(cfg.ckpt)[0]
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
                                       cfg.strength, [r.source_text or "" for r in part], cfg.solver,
                                       bf16).float().cpu()
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


#### 4. scores and tables ##################################################################################


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
        **provenance(started), "config": log.portable(asdict(cfg)), "benchmark": b.name, "split": b.split,
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
