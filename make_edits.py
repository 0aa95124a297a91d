"""Edit pairs, made: the data half of OmniEdit, UltraEdit and generative data refinement.

    python make_edits.py instruct --data photos.jsonl --judge http://HOST/v1 --out requests.jsonl
    python make_edits.py specialist --n 700 --tries 4 --out out/made              # OmniEdit's seven
    python make_edits.py region --n 100 --tries 4 --out out/regions               # UltraEdit's
    python make_edits.py score --data out/made --out out/scored                   # 0 to 10, as its judges
    python make_edits.py refine --data out/scored --out out/refined               # noised, and drawn better
    python make_edits.py pack --data out/scored --out out/pairs                   # --data omniedit:out/pairs
    python make_edits.py chat --data out/scored --out out/chat                    # to fine-tune a judge

Each stage reads the finished shards of the one before and writes shards of its own, with a production log
and a table; the same command goes on after any kind of stop, on any number of ranks, to the same bytes:
torchrun --nproc_per_node=8 -- make_edits.py ... (without the "--" torchrun takes --n for one of
its own flags). `factory/shards.py` has the layout: OmniEdit's published columns, ours after them. What is
random in a row is a function of (seed, item, task, try).
"""

import json
import signal
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

import checkpoint
import common
import pipeline
from data import bucket
from factory import chat as conversations
from factory import instruct as instructing
from factory import pack as packing
from factory import refine as refining
from factory import regions, requests, score, shards, specialists
from log import open_out
from masks import pieces
from readers import prompts, served
from readers.files import BadFile, checked, json_lines, printable, too_many
from scenes.judge import to_float, to_uint8

Solver = Literal["euler", "heun", "dpm"]


@dataclass
class Instruct:
    """Requests for your own pictures, written by a served vision-language model (factory/instruct.py)."""

    data: str  # JSON lines: source, caption, objects (name, and mask, or segments and label, or box)
    out: str  # JSON lines of requests, in the same folder: specialist and region take them as --data
    judge: str  # the served model, http://HOST/v1
    judge_model: str = ""  # name of the served model; its key is read from the variable JUDGE_API_KEY
    budget: int | None = None  # most questions to the served model, retries counted; None: no limit
    tasks: str = "swap,remove,attribute,background,environment,style"  # tasks of which it proposes edits
    edits: int = 4  # proposals for a picture
    seeds: str | None = None  # instructions of people, a text file with one a line; each question shows some
    most: int = 10  # times that the same words may be an instruction
    n: int = 0  # pictures; 0: all
    seed: int = 0  # seed of all that is random


@dataclass
class Specialist:
    """OmniEdit's seven specialists (Sec. 3.2, appendix A.1)."""

    out: str  # folder of the shards
    data: str = "scenes"  # scenes, scenes:hard, or JSON lines of requests (factory/requests.py)
    split: Literal["train", "heldout"] = "train"  # which part of scenes
    tasks: str = "swap,remove,add,attribute,background,environment"  # also style, which needs --editor
    n: int = 0  # number of requests; 0: all lines, or 100 scenes
    offset: int = 0  # leave out the first so many requests
    tries: int = 4  # pictures of each request; pack keeps the best that the judge finds
    ckpt: str = "assets/base"  # the inpainting model that fills holes and draws captions
    editor: str | None = None  # the instruction editor, for style
    tokenizers: str | None = None  # folder of SD3's tokenizers, where they do not come with the weights
    image_size: int = 0  # side of the square of equal area; 0: the model's
    steps: int = 20  # sampler steps
    solver: Solver = "euler"  # solver of inpainting and of the editor
    guidance: float = 3.0  # guidance of the text; 1 = off
    remove_guidance: float = 1.0  # guidance of the text in removals; 1 = off
    behind: bool = True  # removals are told what is behind (OmniEdit); False: ByteEdit's erasing prompt
    edit_guidance: float = 3.0  # guidance of the editor's instruction; 1 = off
    image_guidance: float = 1.5  # guidance of the editor's source picture; 1 = off
    grow: float = 0.08  # growth of an object's mask, as a share of its box's longer side (default ours)
    anchor: Literal["real", "none"] = "real"  # Prompt-to-Prompt's first picture: the real one, or drawn too
    share_until: float = 0.8  # noise level down to which queries and keys are shared; 0: to the end
    blend_until: float = 0.3  # environment: noise level down to which objects are held (the paper: 70 %)
    quality: int = 0  # JPEG quality of the pictures (1 to 100); 0: PNG
    batch_size: int = 32  # pictures drawn together, of one shard
    shard: int = 64  # requests in a shard
    seed: int = 0  # seed of all that is random
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the hardware has it
    device: str = "auto"  # auto (a GPU where there is one), cpu or cuda


@dataclass
class Region:
    """UltraEdit's region edits: soft mask, alternating blend (Algorithm 1)."""

    out: str  # folder of the shards
    data: str = "scenes"  # scenes, scenes:hard, or JSON lines of requests (factory/requests.py)
    split: Literal["train", "heldout"] = "train"  # which part of scenes
    tasks: str = "swap,remove,background"  # with an object's mask
    n: int = 0  # number of requests; 0: all lines, or 100 scenes
    offset: int = 0  # leave out the first so many requests
    tries: int = 4  # candidates of each request, each with its own soft mask
    anchor: Literal["real", "none"] = "real"  # the source: the real picture, or one drawn after its caption
    ckpt: str = "assets/base"  # the base that draws
    tokenizers: str | None = None  # folder of SD3's tokenizers, where they do not come with the weights
    image_size: int = 0  # side of the square of equal area; 0: the model's
    steps: int = 20  # sampler steps of the whole way from noise
    strength: float = 1.0  # share (0 to 1) of the steps that is run (its code: .3 of SDXL-Turbo's 10 or 14)
    solver: Solver = "euler"  # solver of the sampler
    guidance: float = 3.0  # guidance of the text; 1 = off
    blend: Literal["alternate", "every", "none"] = "alternate"  # what is kept comes back after each 2nd step
    p_soft: float = 0.5  # chance of a soft ring around the object
    grow: float = 0.08  # growth of an object's mask, as a share of its box's longer side (its code: 0)
    clip: str | None = None  # WEIGHTS,TOKENIZER,openai|laion: the paper's filters by CLIP; None: no filter
    clip_image: float = 0.7  # least similarity of the pictures
    clip_dir: float = 0.22  # least similarity of the directions
    quality: int = 0  # JPEG quality of the pictures (1 to 100); 0: PNG
    batch_size: int = 32  # pictures drawn together, of one shard
    shard: int = 64  # requests in a shard
    seed: int = 0  # seed of all that is random
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the hardware has it
    device: str = "auto"  # auto (a GPU where there is one), cpu or cuda


@dataclass
class Score:
    """Scores of 0 to 10: semantic consistency, perceptual quality (OmniEdit, Sec. 3.3)."""

    data: str  # folder of specialist, region or refine
    out: str  # folder of the shards
    judge: str = "truth"  # truth (scenes), scorer:FOLDER (train_scorer.py), or a served model, http://HOST/v1
    judge_model: str = ""  # name of the served model; its key is read from the variable JUDGE_API_KEY
    budget: int | None = None  # most questions to the served model, retries counted; None: no limit
    parser: str = "assets/parser"  # the parser that reads scenes, for --judge truth
    min_score: float = 9.0  # score from which a try counts in the table of yields
    device: str = "auto"  # auto (a GPU where there is one), cpu or cuda


@dataclass
class Refine:
    """Generative data refinement: noise both pictures alike, draw them anew, filter (Boesel & Rombach)."""

    data: str  # folder of specialist, region or score
    out: str  # folder of the shards
    ckpt: str = "assets/base"  # the base that denoises first
    second: str | None = None  # the refiner that denoises then; None: the same base
    tokenizers: str | None = None  # folder of SD3's tokenizers, where they do not come with the weights
    upscale: float = 1.0  # factor for both sides, Lanczos (the paper: 2, by HAT)
    logsnr: float = -4.649  # log-SNR to which both are noised; of a larger picture it destroys less
    steps: str = "18,15"  # sampler steps of the two models
    schedule: Literal["edm", "linear"] = "edm"  # Karras' spacing, or the sampler's own
    sigma_min: float = 0.03  # last sigma of Karras' spacing before 0 (default ours)
    solver: Solver = "dpm"  # DPM-Solver++(2M)
    guidance: float = 3.0  # guidance of the captions (default ours, paper silent)
    same_noise: bool = True  # both pictures get one noise; False: the control
    paste: bool = False  # outside its mask the target takes the refined source (default ours)
    clip: str | None = None  # WEIGHTS,TOKENIZER,openai|laion; none: no filter
    clip_image: float = 0.7  # least similarity of the pictures
    clip_dir: float = 0.2  # least similarity of the directions
    quality: int = 0  # JPEG quality of the pictures (1 to 100); 0: PNG
    batch_size: int = 16  # pairs drawn together, of one shard
    seed: int = 0  # seed of all that is random
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the hardware has it
    device: str = "auto"  # auto (a GPU where there is one), cpu or cuda


@dataclass
class Pack:
    """The best of the scored rows as a data set: train-*.parquet and dev-*.parquet, split by families."""

    data: str  # folders of score, with commas between them
    out: str  # folder of the data set
    min_score: float | None = 9.0  # least score that is kept (OmniEdit: 9); None: rows without a score, too
    most: int = 4  # most rows kept of one source and task
    near: int = 3  # pictures whose 64-bit hashes differ in at most so many bits are copies
    equal: bool = False  # as many rows of every task as of the rarest
    per_task: int = 0  # rows of a task at most; 0: any
    dev: float = 0.05  # share of the families that is held out
    shard: int = 1000  # rows in a file: at 1 megapixel in JPEG about 0.5 GB
    group: int = 100  # rows in a row group: viewers want less than 300 MB


@dataclass
class Chat:
    """Scored pairs as conversations, to fine-tune a vision-language model into a judge (factory/chat.py)."""

    data: str  # folder of score
    out: str  # folder: chat.jsonl, pictures/


Stage = Instruct | Specialist | Region | Score | Refine | Pack | Chat

########################################## 1. what stages share ##############################################


def options(cfg: Stage) -> dict:
    """For the plan: all that decides bytes, of weights what they are. No path of this machine; what does not
    matter is left out."""
    told = {k: v for k, v in asdict(cfg).items() if k not in ("out", "data", "device", "tokenizers")}
    if told.get("judge", "truth") != "truth":
        told["parser"] = None  # is not asked
    for key in ("ckpt", "editor", "second", "parser"):
        if told.get(key):
            told[key] = weights_of(told[key], f"--{key}")
    told.pop("budget", None)
    kind, _, path = told.get("judge", "").partition(":")
    if path:  # a URL's last part is no secret
        told["judge"] = weights_of(path, "--judge") if kind == "scorer" else requests.relative(path)
    if told.get("clip"):
        first, *rest = told["clip"].split(",")
        told["clip"] = [weights_of(first, "--clip"), *map(requests.relative, rest)]
    return told


def weights_of(path: str, flag: str) -> str:
    try:
        return checkpoint.identity(path)
    except SystemExit as e:
        raise SystemExit(str(e).replace("error: ", f"error: {flag}: ", 1)) from None


def settled(cfg, dist) -> tuple:
    """The precision that this hardware computes in becomes part of the plan: half a set in another one would
    be another set. -> cfg, whether bf16."""
    bf16 = common.use_bf16(cfg.precision, dist)
    return replace(cfg, precision=common.PRECISION[bf16]), bf16


def open_pipe(path: str, dist, needs: tuple, what: str, tokenizers: str | None) -> pipeline.Pipe:
    pipe = pipeline.open_editor(path, dist.device, needs, what, tokenizers=tokenizers)
    pipe.net.to(dist.device).eval().requires_grad_(False)
    return pipe


def shapes_of(source, items: range, size: int, stride: int) -> tuple[dict, list[dict]]:
    """Requests of a shard, loaded -> {(task, h, w): [(i, request)]} in their order, and log lines of bad
    ones."""
    groups, lines = {}, []
    for i in items:
        clock = shards.Clock()
        try:
            h, w = bucket(*(source.size(i) or (1, 1)), size, stride, source.size(i) is not None)
            got = source.load(i, h, w)
        except BadFile as e:
            print(f"skipped: {str(e).removeprefix('error: ')}")
            lines.append({"key": source.key(i), "task": source.task(i), "try": None, "status": "bad",
                          "cause": "bad file", "why": printable(str(e))[:300], "ms": clock()})
            if too_many(len(lines), i - items.start + 1):
                raise
            continue
        groups.setdefault((source.task(i), h, w), []).append((i, got))
    return groups, lines


def row_of(request: dict, item: str, task: str, attempt: int, made: dict, cfg) -> dict:
    """A row of COLUMNS. item: names the request and who made it; made: as specialists.make gives it."""
    h, w = made["image"].shape[:2]
    source = request["source"]
    if source and made["drawn"]:  # the picture is no longer the scene
        source = json.dumps(json.loads(source) | {"drawn": True})
    return {"omni_edit_id": f"{item}-{attempt}", "task": shards.TASK_WORDS[task],
            "src_img": shards.picture(made["source"], cfg.quality),
            "edited_img": shards.picture(made["image"], cfg.quality),
            "edited_prompt_list": request["instructions"], "width": w, "height": h,
            "mask_image": shards.picture(made["mask"]),
            "object_mask": None if made["drawn"] else shards.picture(request["object"]),
            "source_caption": request["source_caption"], "target_caption": request["target_caption"],
            "family": request["family"], "item": item, "try": attempt, "seed": cfg.seed,
            "specialist": made["specialist"], "params": json.dumps(made["params"]), "source": source}


def twin(row: dict, request: dict) -> dict | None:
    """The addition that a removal is backwards: its target is the real picture. None without its words."""
    if not request["added"]:
        return None
    key = row["item"].removeprefix("remove-")
    return row | {"omni_edit_id": f"add-{key}-{row['try']}", "task": shards.TASK_WORDS["add"],
                  "src_img": row["edited_img"], "edited_img": row["src_img"], "item": f"add-{key}",
                  "edited_prompt_list": request["added"], "source_caption": row["target_caption"],
                  "target_caption": row["source_caption"], "twin_of": row["omni_edit_id"]}


def follow_up(cfg, stages: tuple[str, ...], stage: str) -> tuple[Path, dict]:
    """The folder that a stage reads and the plan of its own, shard by shard like it."""
    folder = Path(cfg.data)
    before = shards.read_plan(folder, stages)
    plan = {"stage": stage, "options": options(cfg), "shards": before["shards"], "items": before["items"],
            "from": {"stage": before["stage"], "plan": shards.fingerprint(folder)}}
    if folder.resolve() == Path(cfg.out).resolve():
        raise SystemExit(f"error: --out: {cfg.out}: is what is read: give another folder")
    return folder, plan


def run(cfg, plan: dict, make, dist, folder: Path | None = None) -> bool:
    """Makes this rank's shards and, with the last one, the manifest, table and sheet. -> whether all are
    there."""
    names = [shards.name_of(s) for s in range(plan["shards"])]

    def ready(s):
        return folder is None or shards.verified(folder / shards.name_of(s))

    waiting = shards.produce(cfg.out, plan["shards"], make, dist, ready=ready)
    if waiting:
        print(f"{waiting} of {len(range(dist.rank, plan['shards'], dist.world))} shards wait for {cfg.data}: "
              "the same command goes on once they are there", flush=True)
    if not shards.finish(cfg.out, names):
        return False
    shards.sheet(cfg.out, names)
    print(f"wrote {cfg.out}: {plan['shards']} shard(s), manifest.json, sheet.png", flush=True)
    return True


########################################## 2. instruct #######################################################


def instruct(cfg: Instruct, dist) -> None:
    common.check_bounds(cfg, at_least_1=("edits", "most"), not_negative=("n", "budget"))
    tasks, out = requests.tasks_of(cfg.tasks)[0], Path(cfg.out)
    if dist.world > 1:
        raise SystemExit("error: torchrun: one process asks the model many things at once: start it alone")
    if Path(cfg.data).resolve().parent != out.resolve().parent:
        raise SystemExit(f"error: --out: {out}: names of pictures are relative to {Path(cfg.data).parent}: "
                         "give a file in that folder")
    if not Path(cfg.data).is_file() or out.resolve() == Path(cfg.data).resolve():
        raise SystemExit(f"error: --data: {cfg.data}: "
                         + ("is --out, too" if Path(cfg.data).is_file() else "no such file"))
    rows, _ = checked(json_lines(cfg.data), instructing.row_of)
    rows = [row | {"key": str(row.get("key") or i)} for i, row in enumerate(rows)][:cfg.n or None]
    if not rows:
        raise SystemExit(f"error: --data: {cfg.data}: no usable row: see above")
    seeds = prompts.open_texts(cfg.seeds) if cfg.seeds else []
    client = served.Served(cfg.judge, cfg.judge_model, out.with_suffix(".replies.jsonl"), cfg.budget)
    served.self_test(client)
    clock = shards.Clock()
    replies = list(served.propose_edits(client, instructing.pictures(str(out.parent), rows, seeds, cfg.seed),
                                        cfg.edits, tasks))
    if client.stopped or any(r.status == "budget" for r in replies):
        why = client.stopped or f"the budget of {client.budget} requests is spent"
        raise SystemExit(f"error: --judge: {client.url}: {why}: the same command goes on where it ended")
    found, counts, lines = instructing.requests_of(rows, replies, cfg.most)
    for path, what in ((out, found), (out.with_suffix(".log.jsonl"), lines)):
        shards.sweep(out.parent, f"{path.name}.")
        shards.put(path, "".join(json.dumps(row) + "\n" for row in what).encode())
    print("\n".join(f"{name:<32} {count:>8,}" for name, count in counts.items())
          + f"\n{'milliseconds a picture':<32} {clock(len(rows)):>8.1f}\nwrote {out}: --data {out}")


########################################## 3. specialist #####################################################


def specialist(cfg: Specialist, dist) -> None:
    common.check_bounds(cfg, at_least_1=("tries", "steps", "batch_size", "shard"),
                        not_negative=("n", "offset", "grow", "image_size", "quality"))
    tasks, keeps_removals, adds = requests.tasks_of(cfg.tasks)
    if "style" in tasks and not cfg.editor:
        raise SystemExit("error: --editor: None: style needs an instruction editor: name one, such as "
                         "assets/editnet")
    source = requests.open_requests(cfg.data, cfg.split, tasks, cfg.n, cfg.offset)
    n, (cfg, bf16) = len(source), settled(cfg, dist)
    plan = {"stage": "specialist", "options": options(cfg), "data": source.about, "items": n,
            "shards": -(-n // cfg.shard)}
    pipe = open_pipe(cfg.ckpt, dist, ("fill",), "--ckpt", cfg.tokenizers)
    editor = open_pipe(cfg.editor, dist, ("follow",), "--editor", cfg.tokenizers) if cfg.editor else None
    shards.keep_plan(cfg.out, plan)  # last: a command that cannot be binds no folder
    size, stride = cfg.image_size or pipe.size, pipe.space.stride * pipe.net.cfg.patch

    def make(s):
        items = range(s * cfg.shard, min(n, (s + 1) * cfg.shard))
        groups, lines = shapes_of(source, items, size, stride)
        rows, made_of = [], {}
        for (task, _, _), found in groups.items():
            todo = [(i, request, k) for i, request in found for k in range(cfg.tries)]
            for at in range(0, len(todo), cfg.batch_size):
                part, clock = todo[at:at + cfg.batch_size], shards.Clock()
                keys = [(source.key(i), k) for i, _, k in part]
                made = specialists.make(task, pipe, editor, [r for _, r, _ in part], keys, cfg, bf16)
                ms = clock(len(part))
                made_of |= {(i, k): (m, ms) for (i, _, k), m in zip(part, made)}
        asked = {i: request for found in groups.values() for i, request in found}
        for (i, attempt), (made, ms) in sorted(made_of.items()):
            key, task = source.key(i), source.task(i)
            row = row_of(asked[i], f"{task}-{key}", task, attempt, made, cfg)
            line = {"key": key, "task": task, "try": attempt, "status": "made", "cause": None, "ms": ms}
            if task != "remove" or keeps_removals:
                rows.append(row)
                lines.append(line)
            if task == "remove" and adds:
                reverse = twin(row, asked[i])
                lines.append(line | {"task": "add", "ms": 0.0 if keeps_removals else ms,
                                     "cause": None if reverse else "no words for the addition"})
                rows += [reverse] if reverse else []
        return rows, lines

    run(cfg, plan, make, dist)


########################################## 4. region #########################################################


def region(cfg: Region, dist) -> None:
    common.check_bounds(cfg, at_least_1=("tries", "steps", "batch_size", "shard"),
                        not_negative=("n", "offset", "grow", "image_size", "quality"),
                        share=("p_soft", "strength"))
    tasks, *_ = requests.tasks_of(cfg.tasks)
    if "add" in cfg.tasks or set(tasks) - set(regions.TASKS):
        raise SystemExit(f"error: --tasks: {cfg.tasks}: a region is an object's, or all around it: use some "
                         f"of {', '.join(regions.TASKS)}")
    source = requests.open_requests(cfg.data, cfg.split, tasks, cfg.n, cfg.offset)
    n, (cfg, bf16) = len(source), settled(cfg, dist)
    plan = {"stage": "region", "options": options(cfg), "data": source.about, "items": n,
            "shards": -(-n // cfg.shard)}
    pipe = open_pipe(cfg.ckpt, dist, ("fill", "draw"), "--ckpt", cfg.tokenizers)
    clip = refining.open_clip(cfg.clip, dist.device) if cfg.clip else None
    shards.keep_plan(cfg.out, plan)
    size, stride = cfg.image_size or pipe.size, pipe.space.stride * pipe.net.cfg.patch

    def draw(task, part):
        """(i, request, try) of one task and shape -> what row_of takes, and what the filter says, each."""
        keys, rows = [(source.key(i), k) for i, _, k in part], [r for _, r, _ in part]
        image = to_float(np.stack([r["image"] for r in rows]))
        space, (h, w) = pipe.space, image.shape[-2:]
        shape = (space.channels, h // space.stride, w // space.stride)
        noise = specialists.noise_for(cfg.seed, keys, f"region {task}", shape)
        masks, rings = [], []
        for key, r in zip(keys, rows):
            fine = specialists.hole(task, r["object"], cfg.grow)
            fine = ~fine if task == "background" else fine  # its ring lies around the object, too, not in it
            rng = np.random.default_rng(int(specialists.noise_for(  # a function of the same four
                cfg.seed, [key], f"ring {task}", (1,)).view(torch.int32)) & 0x7FFFFFFF)
            mask, ring = regions.soft_mask(fine, pieces(fine), rng, cfg.p_soft)
            masks.append(1 - mask if task == "background" else mask)
            rings.append(ring)
        mask = torch.from_numpy(np.stack(masks))[:, None]
        if cfg.anchor == "none":  # the source is drawn after its caption, and then edited
            ones = torch.ones_like(mask)
            image = specialists.fill(pipe, [r["source_caption"] for r in rows], torch.zeros_like(image), ones,
                                     noise, cfg.steps, cfg.guidance, cfg.solver, bf16).clamp(-1, 1)
        x = regions.draw(pipe, [r["prompt"] or specialists.masks.ERASE_PROMPT for r in rows], image, mask,
                         noise, cfg.steps, cfg.strength, cfg.guidance, cfg.blend, cfg.solver,
                         bf16)
        told = [{"cause": None}] * len(rows)
        if clip:
            told = refining.clip_filter(clip, image, x.clamp(-1, 1), [r["source_caption"] for r in rows],
                                        [r["target_caption"] for r in rows],
                                        {"image": cfg.clip_image, "dir": cfg.clip_dir})
        params = {"guidance": cfg.guidance, "steps": cfg.steps, "strength": cfg.strength, "blend": cfg.blend,
                  "anchor": cfg.anchor}
        sources, pictures = to_uint8(image).numpy(), to_uint8(x).numpy()
        return [(dict(source=sources[j], image=pictures[j], mask=masks[j], specialist="region",
                      drawn=cfg.anchor == "none", params=params | {"ring": rings[j]}), told[j])
                for j in range(len(rows))]

    def make(s):
        items = range(s * cfg.shard, min(n, (s + 1) * cfg.shard))
        groups, lines = shapes_of(source, items, size, stride)
        done = []
        for (task, _, _), found in groups.items():
            fine = []
            for i, request in found:
                verdict, _ = regions.grade(request["object"] > 0.5)
                if verdict == "fine":
                    fine.append((i, request))
                else:
                    lines.append({"key": source.key(i), "task": task, "try": None, "status": "rejected",
                                  "cause": f"mask {verdict}", "ms": 0.0})
            todo = [(i, request, k) for i, request in fine for k in range(cfg.tries)]
            for at in range(0, len(todo), cfg.batch_size):
                part, clock = todo[at:at + cfg.batch_size], shards.Clock()
                got = draw(task, part)
                ms = clock(len(part))
                done += [(i, k, request, *g, ms) for (i, request, k), g in zip(part, got)]
        rows = []
        for i, attempt, request, made, told, ms in sorted(done, key=lambda d: d[:2]):
            key, task = source.key(i), source.task(i)
            lines.append({"key": key, "task": task, "try": attempt, "ms": ms, "cause": told["cause"],
                          "status": "rejected" if told["cause"] else "made"})
            if not told["cause"]:
                rows.append(row_of(request, f"region-{task}-{key}", task, attempt, made, cfg)
                            | {k: v for k, v in told.items() if k != "cause"})
        return rows, lines

    run(cfg, plan, make, dist)


########################################## 5. score ##########################################################


def score_stage(cfg: Score, dist) -> None:
    common.check_bounds(cfg, not_negative=("min_score",))
    folder, plan = follow_up(cfg, ("specialist", "region", "refine"), "score")
    judge = score.open_judge(cfg.judge, cfg.parser, dist.device, cfg.judge_model,
                             Path(cfg.out) / "replies.jsonl", cfg.budget)
    shards.keep_plan(cfg.out, plan)
    name = cfg.judge_model or requests.relative(cfg.judge)
    mine = [Path(cfg.out) / shards.name_of(s) for s in range(dist.rank, plan["shards"], dist.world)]
    again = [at for at in mine if at.with_suffix(".json").is_file() and score.may_pass(
        shards.lines_of(cfg.out, [at.name]))]
    for at in again:  # what was answered is in replies.jsonl
        at.with_suffix(".json").unlink()
    if again:
        print(f"{len(again)} shard(s) have rows that the server failed to judge: these are asked again",
              flush=True)

    def make(s):
        rows, clock = shards.read(folder / shards.name_of(s)), shards.Clock()
        rows = score.scored(rows, judge, name)
        ms = clock(len(rows))
        return rows, [{"key": row["omni_edit_id"], "task": row["task"], "try": row["try"], "ms": ms,
                       "status": row["judge_status"], "o_score": row["o_score"],
                       "cause": None if row["o_score"] is not None else row["judge_status"]} for row in rows]

    finished = run(cfg, plan, make, dist, folder)
    there = [Path(cfg.out) / shards.name_of(s) for s in range(plan["shards"])]
    there = [path for path in there if path.with_suffix(".json").is_file()]
    light = [row for path in there for row in shards.read(path, ["task", "item", "try", "o_score"])]
    if light and (finished or dist.rank == 0):  # the whole table is told by whoever is last
        print(f"{len(there)} of {plan['shards']} shards, min_score {cfg.min_score:g}:\n"
              + score.yield_table(score.yields(light, cfg.min_score), cfg.min_score), flush=True)
    if finished and cfg.judge == "truth" and all(row["o_score"] is None for row in light):
        raise SystemExit(f"error: --judge: truth: is known of scenes alone, of none of these {len(light)} "
                         "rows: give --judge scorer:DIR or http://HOST/v1, and another --out")


########################################## 6. refine #########################################################


def refine(cfg: Refine, dist) -> None:
    common.check_bounds(cfg, at_least_1=("batch_size",), above_0=("upscale", "sigma_min"),
                        not_negative=("quality",))
    steps = common.numbers(cfg.steps, "steps", 0)
    if len(steps) > 2 or sum(steps) < 1:
        raise SystemExit(f"error: --steps: {cfg.steps}: use those of the base and of the second model: 18,15")
    cfg, bf16 = settled(cfg, dist)
    folder, plan = follow_up(cfg, ("specialist", "region", "score"), "refine")
    pipes = [open_pipe(cfg.ckpt, dist, ("draw",), "--ckpt", cfg.tokenizers)]
    pipes += [open_pipe(cfg.second, dist, ("draw",), "--second", cfg.tokenizers) if cfg.second else pipes[0]]
    space, shift = pipes[0].space, pipes[0].shift
    if (space.stride, space.channels) != (pipes[1].space.stride, pipes[1].space.channels):
        raise SystemExit(f"error: --second: {cfg.second}: works in another space than {cfg.ckpt}: give "
                         "models of one autoencoder")
    parts = refining.times(cfg.logsnr, steps, cfg.schedule, shift, cfg.sigma_min)
    clip = refining.open_clip(cfg.clip, dist.device) if cfg.clip else None
    shards.keep_plan(cfg.out, plan)
    if not clip:
        common.print0("note: --clip: none given: nothing is filtered")
    stride = space.stride * pipes[0].net.cfg.patch

    def draw(batch):
        """Rows of one size -> their refined rows and causes."""
        h, w = (max(stride, round(cfg.upscale * batch[0][k] / stride) * stride) for k in ("height", "width"))
        shape = (space.channels, h // space.stride, w // space.stride)
        keys = [(row["item"], row["try"]) for row in batch]
        noise = specialists.noise_for(cfg.seed, keys, "refine", shape)
        other = noise if cfg.same_noise else specialists.noise_for(cfg.seed, keys, "refine target", shape)
        out = []
        for cell, text, z in (("src_img", "source_caption", noise), ("edited_img", "target_caption", other)):
            image = to_float(np.stack([refining.lanczos(shards.pixels(row[cell]), h, w) for row in batch]))
            out.append(refining.redraw(pipes, [row[text] or "" for row in batch], image, z, parts,
                                       cfg.guidance, cfg.solver, bf16).clamp(-1, 1))
        masks = [shards.area(row["mask_image"], h, w) for row in batch]
        if cfg.paste:
            for j, m in enumerate(masks):
                m = torch.ones(1, h, w) if m is None else torch.from_numpy(m)[None]
                out[1][j] = m * out[1][j] + (1 - m) * out[0][j]
        told = [{"cause": None}] * len(batch)
        if clip:
            told = refining.clip_filter(clip, *out, [row["source_caption"] for row in batch],
                                        [row["target_caption"] for row in batch],
                                        {"image": cfg.clip_image, "dir": cfg.clip_dir})
        pictures = [to_uint8(x).numpy() for x in out]
        empty = dict.fromkeys(("sc_score_1", "sc_score_2", "sc_reasoning", "pq_score", "pq_reasoning",
                               "o_score", "judge", "judge_status"))
        return [(row | empty | {
            "omni_edit_id": f"{row['omni_edit_id']}-refined", "refined_from": row["omni_edit_id"],
            "src_img": shards.picture(pictures[0][j], cfg.quality), "width": w, "height": h,
            "edited_img": shards.picture(pictures[1][j], cfg.quality),
            "mask_image": shards.picture(masks[j]),
            "object_mask": shards.picture(shards.area(row["object_mask"], h, w)),
        } | {k: v for k, v in told[j].items() if k != "cause"}, told[j]["cause"])
            for j, row in enumerate(batch)]

    def make(s):
        rows, groups, lines, done = shards.read(folder / shards.name_of(s)), {}, [], {}
        for k, row in enumerate(rows):
            if cfg.clip and not (row["source_caption"] and row["target_caption"]):
                lines.append({"key": row["omni_edit_id"], "task": row["task"], "try": row["try"], "ms": 0.0,
                              "status": "rejected", "cause": "no captions"})
            else:
                groups.setdefault((row["height"], row["width"]), []).append(k)
        for places in groups.values():
            for at in range(0, len(places), cfg.batch_size):
                part, clock = places[at:at + cfg.batch_size], shards.Clock()
                got = draw([rows[k] for k in part])
                ms = clock(len(part))
                done |= {k: (*g, ms) for k, g in zip(part, got)}
        out = []
        for k, (row, cause, ms) in sorted(done.items()):
            lines.append({"key": rows[k]["omni_edit_id"], "task": row["task"], "try": row["try"], "ms": ms,
                          "status": "rejected" if cause else "made", "cause": cause})
            out += [] if cause else [row]
        return out, lines

    run(cfg, plan, make, dist, folder)


########################################## 7. pack ###########################################################


def pack(cfg: Pack, dist) -> None:
    common.check_bounds(cfg, at_least_1=("most", "shard", "group"), below_1=("dev",),
                        not_negative=("near", "per_task", "min_score"))
    folders = [Path(f) for f in cfg.data.split(",")]
    for folder in folders:
        shards.read_plan(folder, ("score", "specialist", "region", "refine"))
        if not (folder / "manifest.json").is_file():
            raise SystemExit(f"error: --data: {folder}: is not finished: give its command again first")
    plan = {"stage": "pack", "options": options(cfg), "from": [shards.fingerprint(f) for f in folders]}

    # 1) every row looked at, one shard at a time: the same list on every rank
    rows = []
    for folder in folders:
        for s in range(shards.read_plan(folder, ("score", "specialist", "region", "refine"))["shards"]):
            path = folder / shards.name_of(s)
            for at, row in enumerate(shards.read(path, [*packing.LIGHT, "src_img", "edited_img"])):
                rows.append({k: row[k] for k in packing.LIGHT} | packing.looks(row)
                            | {"path": path, "at": at})
    if repeated := len(rows) - len({row["omni_edit_id"] for row in rows}):
        raise SystemExit(f"error: --data: {cfg.data}: {repeated} ids twice: were two runs made with the same "
                         "requests? give one of them, or make them with other --offset")
    packing.join_families(rows)
    kept, cause = packing.choose(rows, cfg.min_score, cfg.most, cfg.near, cfg.equal, cfg.per_task)
    files = packing.split(rows, kept, cfg.dev, cfg.shard)
    if not files:
        raise SystemExit(f"error: --data: {cfg.data}: no row is kept of {len(rows)}: lower --min_score, or "
                         "score first; --min_score None keeps rows without a score, too")
    names = list(files)
    shards.keep_plan(cfg.out, plan | {"shards": len(names), "items": len(rows)})

    # 2) the rows that are kept, written; their families as they were joined
    def make(s):
        whole, out, lines = {}, [], []
        for k in files[names[s]]:
            path, clock = rows[k]["path"], shards.Clock()
            if path not in whole:
                whole = {path: shards.read(path)}
            out.append(whole[path][rows[k]["at"]] | {"family": rows[k]["family"]})
            lines.append({"key": rows[k]["omni_edit_id"], "task": rows[k]["task"], "try": rows[k]["try"],
                          "status": "kept", "cause": None, "ms": clock()})
        if s == 0:  # one shard's log has what was left out
            lines += [{"key": rows[k]["omni_edit_id"], "task": rows[k]["task"], "try": rows[k]["try"],
                       "status": "rejected", "cause": why, "ms": 0.0} for k, why in sorted(cause.items())]
        return out, lines

    shards.produce(cfg.out, len(names), make, dist, names=names.__getitem__, group=cfg.group)
    if shards.finish(cfg.out, names):
        shards.sheet(cfg.out, names)
        held = sum(len(v) for k, v in files.items() if k.startswith("dev"))
        print(f"wrote {cfg.out}: {len(kept)} of {len(rows)} rows, {held} held out, {len(names)} file(s): "
              f"--data omniedit:{cfg.out}", flush=True)


########################################## 8. chat ###########################################################


def chat(cfg: Chat, dist) -> None:
    folder, out = Path(cfg.data), open_out(cfg.out)
    shards.read_plan(folder, ("score",))
    if not (folder / "manifest.json").is_file():
        raise SystemExit(f"error: --data: {folder}: is not finished: give its command again first")
    (out / "pictures").mkdir(exist_ok=True)
    made, skipped = conversations.write(folder, out)
    print(f"wrote {out / 'chat.jsonl'}: {made:,} conversations; {skipped:,} rows without scores left out")


STAGES = {Instruct: instruct, Specialist: specialist, Region: region, Score: score_stage, Refine: refine,
          Pack: pack, Chat: chat}
named = tyro.conf.subcommand
Command = (Annotated[Instruct, named("instruct")] | Annotated[Specialist, named("specialist")]
           | Annotated[Region, named("region")] | Annotated[Score, named("score")]
           | Annotated[Refine, named("refine")] | Annotated[Pack, named("pack")]
           | Annotated[Chat, named("chat")])


def main(cfg: Stage) -> None:
    dist = common.setup(getattr(cfg, "device", "cpu"), group=False)
    for s in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(s, signal.SIG_DFL)  # what is on disk is all the state there is: nothing to save
    STAGES[type(cfg)](cfg, dist)
    common.cleanup()


if __name__ == "__main__":
    common.command(main, Command, __doc__, "the same command goes on")
