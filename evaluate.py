"""The scenes judge, and preferences from the known truth.

    python evaluate.py parser  --out assets/parser --steps 6000          # the judge's parser
    python evaluate.py scenes  --ckpt assets/base,out/pefl --n 500       # tables, results.json, contact sheet
    python evaluate.py compare --ckpt out/pefl,assets/base --steps 8,20  # paired good / same / bad
    python evaluate.py prefs   --ckpt assets/base --out out/prefs --n 3000 --steps 4,6,8

A scene's description is known, so the judge needs no human: a parser network (judge.py) reads attributes back
from the picture, and the exact picture that belongs in the hole is drawn again. Tasks are the paper's
(ByteEdit Sec. 4.2): outpaint, edit (inpainting-editing), erase (inpainting-erasing). Masks depend on the
scene, noise on (seed, scene): equal for every checkpoint, so that all comparisons are paired. Intervals are
95% bootstraps over scenes. Every picture is judged as 8 bits per channel and with the known pixels pasted
back.

    1. Config                  2. Cases: picture, mask, truth     3. Results
    4. Metrics of a picture    5. parser, scenes, compare, prefs
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
import masks
import model
import scene_text
import scenes
from judge import (
    OBJECT_HEADS,
    PICTURE_HEADS,
    SIDE,
    Parser,
    bootstrap,
    crops,
    frechet_interval,
    gradient,
    load_parser,
    masked_mean,
    object_box,
    object_labels,
    parser_accuracy,
    picture_labels,
    sign_test,
    to_float,
    to_uint8,
    train_parser,
)
from pictures import read_image
from prefs import make_prefs

####################################################################################################
# 1. Config
####################################################################################################

TASKS = ("outpaint", "edit", "erase")


@dataclass
class Config:
    task: tyro.conf.Positional[Literal["parser", "scenes", "compare", "prefs"]]
    ckpt: str = ""  # checkpoints or folders of saved pictures, with commas; prefs: the base
    out: str = "out/evaluate"  # folder for results.json and the sheet, for the parser, or for the preferences
    save: str = ""  # scenes: also keep the pictures here, a folder for each checkpoint, for a later `compare`
    parser: str = "assets/parser"  # the judge's parser
    n: int = 500  # scenes for each task; prefs: prompts
    data: str = "scenes"  # prefs: "scenes", a folder of captioned pictures or a parquet file
    offset: int = 0  # first scene
    steps: str = "20"  # of sampling, for all or for each checkpoint (prefs: each of k); parser: of training
    guidance: float = 1.0  # classifier-free guidance; 1 = off
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
    bf16: bool = True  # autocast; the samples themselves stay fp32
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
# 2. Cases: picture, mask, caption and truth of held-out scenes
####################################################################################################


@dataclass
class Cases:
    """What one task asks of N scenes. Pictures [N, 3, H, W] in [-1, 1], masks [N, 1, H, W], 1 = make new."""

    task: str
    indices: list[int]
    image: Tensor
    mask: Tensor
    truth: Tensor  # the picture that belongs there
    certain: Tensor  # [N, 1, H, W] pixels of the hole whose truth is determined: no object or shadow there
    caption: list[str]
    pictures: Tensor  # [N, 3] labels of PICTURE_HEADS
    which: Tensor  # [M] scene of a judged box
    boxes: Tensor  # [M, 4]
    objects: Tensor  # [M, 4] labels of OBJECT_HEADS, -100 = not asked


def named(o: scenes.Object, caption: str) -> list[int]:
    """Labels of an object; the material counts only where the caption names it."""
    labels = object_labels(o)
    if not any(word in caption for word in scene_text.MATERIAL_WORDS[o.material]):
        labels[list(OBJECT_HEADS).index("material")] = -100
    return labels


def make_cases(task: str, indices: list[int], size: int, source: scenes.Scenes) -> Cases:
    """outpaint: data.py's outward mask; judged are the objects of which half or more lies in the hole, not
    all: where a wholly hidden one goes, nobody says. edit: the largest instance, dilated by 8% of the side
    (ByteEdit Sec. 4.1); the caption is the scene's, so that this object must come back. erase: all that the
    largest object draws (its shadow too), dilated by a pixel; the truth is the scene drawn without it, the
    prompt ERASE_PROMPT. Masks are a function of (scene, size)."""
    rows, which, boxes, objects = [], [], [], []
    for j, index in enumerate(indices):
        s, item = source.scene(index), source.load(index, size, size)
        image, labels, caption = item["image"], item["segments"], item["caption"]
        truth, judged = image, []
        area = [int((labels == k).sum()) for k in range(1, len(s.objects) + 1)]
        biggest = int(np.argmax(area)) + 1
        if task == "outpaint":
            rng = np.random.Generator(np.random.PCG64(scenes.rng_for(source.seed, index, 12).integers(2**32)))
            mask = masks.make_mask("outward", size, size, rng) > 0
            judged = [k for k, n in enumerate(area, 1) if n and 0.5 <= mask[labels == k].mean() < 1]
        elif task == "edit":
            mask = masks.dilate(labels == biggest, max(1, round(0.08 * size)))
            judged = [biggest]
        elif task == "erase":
            without = replace(s, objects=s.objects[:biggest - 1] + s.objects[biggest:])
            truth = scenes.draw(without, size, size)
            mask = masks.dilate((truth != image).any(-1) | (labels == biggest), max(1, round(size / 64)))
            caption = data.ERASE_PROMPT
        else:
            raise ValueError(f"task {task!r}")
        if task == "erase":
            o = s.objects[biggest - 1]
            which.append(j)
            boxes.append(object_box(o.x, o.y, scenes.RADIUS[o.size], size, size))
            objects.append([-100, -100, -100, 0])
            certain = mask
        else:
            for k in judged:
                o = s.objects[k - 1]
                which.append(j)
                boxes.append(object_box(o.x, o.y, scenes.RADIUS[o.size], size, size))
                objects.append(named(o, caption))
            bare = scenes.draw(replace(s, objects=()), size, size)
            certain = mask & (bare == image).all(-1)
        rows.append((image, mask, truth, certain, caption, picture_labels(s)))
    image, mask, truth, certain, caption, pictures = zip(*rows)
    mask, certain = (torch.from_numpy(np.stack(x))[:, None].float() for x in (mask, certain))
    image, truth = (to_float(np.stack(x)) for x in (image, truth))
    which, objects = (torch.tensor(x, dtype=torch.int64) for x in (which, objects))
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    pictures = torch.tensor(pictures)
    return Cases(task, list(indices), image, mask, truth, certain, list(caption), pictures, which, boxes,
                 objects.view(-1, 4))


####################################################################################################
# 3. Results: pictures of an editor, or of a folder
####################################################################################################


@dataclass
class Editor:
    """A checkpoint ready to sample from."""

    net: model.Editor
    size: int
    shift: float
    device: torch.device
    bf16: bool


def load_editor(path: str, device: torch.device, bf16: bool) -> Editor:
    """Averaged weights if there are any; SystemExit unless it is an inpainting editor in pixel space."""
    weights, manifest = common.load_checkpoint(path, ("ema", "model"))
    net = model.build_editor(manifest.get("arch", {}), path)
    if not net.cfg.inpaint:
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
    return Editor(net, int(config["image_size"]), float(config.get("shift", 1.0)), device, bf16)


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


@dataclass
class Result:
    """One column of the tables: raw pictures uint8 [S, N, H, W, 3] by task; known pixels not yet pasted."""

    name: str
    size: int
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


def sample_result(result: Result, e: Editor, cases: dict[str, Cases], cfg: Config, steps: int,
                  seeds: list[int]) -> None:
    """Fill `result` with pictures of one editor."""
    bar = common.progress(len(seeds) * sum(len(c.indices) for c in cases.values()), desc=result.name)
    for task, c in cases.items():
        out = np.empty((len(seeds), len(c.indices), e.size, e.size, 3), np.uint8)
        for s, seed in enumerate(seeds):
            for i in range(0, len(c.indices), cfg.batch_size):
                part = slice(i, i + cfg.batch_size)
                # a function of (seed, scene, task): the same for every checkpoint and batch size
                gens = common.generators(seed, 0, c.indices[part], stream=TASKS.index(task))
                noise = common.randn(gens, c.image.shape[1:])
                got = generate(e, c.image[part], c.mask[part], c.caption[part], noise, steps, cfg.guidance,
                               cfg.solver)
                out[s, part] = to_uint8(got).numpy()
                bar.update(len(got))
        result.pictures[task] = out
    bar.close()


def save_result(result: Result, cases: dict[str, Cases], seeds: list[int], folder: Path) -> None:
    """FOLDER/TASK/seed_S/INDEX.png and judge.json."""
    for task, pictures in result.pictures.items():
        for seed, row in zip(seeds, pictures):
            at = folder / task / f"seed_{seed}"
            at.mkdir(parents=True, exist_ok=True)
            for index, picture in zip(cases[task].indices, row):
                Image.fromarray(picture).save(at / f"{index:06d}.png")
    (folder / "judge.json").write_text(json.dumps({"name": result.name, "size": result.size}))


def read_result(result: Result, folder: Path, cases: dict[str, Cases], seeds: list[int]) -> None:
    for task, c in cases.items():
        rows = []
        for seed in seeds:
            for index in c.indices:
                file = folder / task / f"seed_{seed}" / f"{index:06d}.png"
                picture = read_image(file)
                if picture.shape != (result.size, result.size, 3):
                    h, w = picture.shape[:2]
                    raise SystemExit(f"error: {file}: {w}x{h}: judge.json says {result.size}x{result.size}:"
                                     " save the pictures again")
                rows.append(picture)
        result.pictures[task] = np.stack(rows).reshape(len(seeds), len(c.indices), *rows[0].shape)


def gather(cfg: Config, device: torch.device) -> tuple[list[Result], dict[str, Cases], list[int]]:
    """Every entry of --ckpt sampled or read, on the same scenes, masks and noise."""
    entries = [x.strip() for x in cfg.ckpt.split(",") if x.strip()]
    if not entries:
        raise SystemExit("error: --ckpt: is empty: give checkpoints or folders of saved pictures")
    seeds, steps = numbers(cfg.seeds, "seeds", 0), numbers(cfg.steps, "steps", 1)
    if len(steps) not in (1, len(entries)):
        raise SystemExit(f"error: --steps: {cfg.steps}: give one number or {len(entries)}, one for each")
    source = scenes.Scenes("heldout")
    if cfg.n < 2 or cfg.offset < 0 or cfg.offset + cfg.n > len(source):
        raise SystemExit(f"error: --n: {cfg.n}: use 2 to {len(source)} scenes, --offset included")
    steps = steps * (len(entries) // len(steps))
    opened, results = [], []
    for entry, k in zip(entries, steps):  # all are opened before the first is sampled: an error costs no time
        saved = Path(entry) / "judge.json"
        if saved.is_file():
            try:
                info = json.loads(saved.read_text())
                results.append(Result(str(info["name"]), int(info["size"])))
            except (ValueError, KeyError, TypeError):
                raise SystemExit(f"error: {saved}: damaged: save the pictures again") from None
            opened.append(None)
        else:
            opened.append(load_editor(entry, device, cfg.bf16))
            results.append(Result(f"{entry.rstrip('/')}@{k}", opened[-1].size))
        if results[-1].size != results[0].size:
            raise SystemExit(f"error: --ckpt: {entry}: makes {results[-1].size}-pixel pictures, {entries[0]}"
                             f" {results[0].size}: compare editors of one size")
    names = [r.name for r in results]
    for i, r in enumerate(results):
        r.name += f" ({i})" if names.count(names[i]) > 1 else ""
    indices = list(range(cfg.offset, cfg.offset + cfg.n))
    cases = {task: make_cases(task, indices, results[0].size, source) for task in TASKS}
    for entry, k, e, r in zip(entries, steps, opened, results):
        if e is None:
            read_result(r, Path(entry), cases, seeds)
        else:
            sample_result(r, e, cases, cfg, k, seeds)
    return results, cases, seeds


####################################################################################################
# 4. Metrics: one number for each scene, errors in [0, 1] units
####################################################################################################


def seam_error(x: Tensor, truth: Tensor, mask: Tensor) -> np.ndarray:
    """Mean absolute error of the differences between neighbours across the mask's boundary [N]: a visible
    seam is large, a continued edge is not."""
    total, count = torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
    for axis in (-1, -2):
        across = mask.diff(dim=axis).abs()
        wrong = (x.diff(dim=axis) - truth.diff(dim=axis)).abs().mean(1, keepdim=True)
        total += (wrong * across).sum((1, 2, 3))
        count += across.sum((1, 2, 3))
    return torch.where(count > 0, total / 2 / count.clamp(min=1), math.nan).numpy()  # / 2: [-1, 1] -> [0, 1]


def paste(raw: Tensor, c: Cases) -> Tensor:
    """Known pixels put back."""
    return raw * c.mask + c.image * (1 - c.mask)


@torch.inference_mode()
def judge(raw: Tensor, c: Cases, net: Parser) -> dict[str, np.ndarray]:
    """Metrics [N] of pictures raw [N, 3, H, W] in [-1, 1]; not-a-number where a scene does not ask.

    Higher is better: shape, colour, material (mean over the judged objects), background, environment,
    style, empty (erase: no object at the box), attributes (mean of all that the task asks). Lower is
    better: exact (mean |x - truth| over pixels whose truth is determined), hole (over all of the hole),
    seam, outside_raw (change of known pixels before pasting), outside (after). sharpness: gradient in the
    hole over the truth's; 1 is right, below is blur, above noise.
    """
    x = paste(raw, c)
    device = next(net.parameters()).device
    of_pictures, of_objects = net(x.to(device), c.which.to(device), c.boxes.to(device))
    out = {}
    N = len(x)
    asked = list(OBJECT_HEADS)
    kinds = {"edit": asked[:3], "outpaint": asked[:3] + list(PICTURE_HEADS), "erase": ["object"]}[c.task]
    for kind in kinds:
        if kind in PICTURE_HEADS:
            said = of_pictures[kind].argmax(1).cpu()
            out[kind] = (said == c.pictures[:, list(PICTURE_HEADS).index(kind)]).double().numpy()
            continue
        labels = c.objects[:, asked.index(kind)]
        use = labels >= 0
        ok = (of_objects[kind].argmax(1).cpu() == labels).double()[use]
        total = torch.zeros(N, dtype=torch.float64).index_add_(0, c.which[use], ok)
        count = torch.zeros(N, dtype=torch.float64).index_add_(0, c.which[use], torch.ones_like(ok))
        share = torch.where(count > 0, total / count.clamp(min=1), math.nan).numpy()
        out["empty" if kind == "object" else kind] = share
    stacked = np.stack(list(out.values()))
    out["attributes"] = np.nansum(stacked, 0) / np.maximum((~np.isnan(stacked)).sum(0), 1)
    out["attributes"][np.isnan(stacked).all(0)] = math.nan
    error = (x - c.truth).abs() / 2
    out["exact"] = masked_mean(error, c.certain)
    out["hole"] = masked_mean(error, c.mask)
    out["seam"] = seam_error(x, c.truth, c.mask)
    out["outside_raw"] = masked_mean((raw - c.image).abs() / 2, 1 - c.mask)
    out["outside"] = masked_mean((x - c.image).abs() / 2, 1 - c.mask)
    detail, true_detail = (masked_mean(gradient(y), c.mask) for y in (x, c.truth))
    out["sharpness"] = detail / np.maximum(true_detail, 1e-3)
    return out


@torch.inference_mode()
def frechet_features(x: Tensor, c: Cases, net: Parser) -> tuple[np.ndarray, np.ndarray]:
    """Parser features [N, 128] of the whole pictures and of the boxes around their holes."""
    device = next(net.parameters()).device
    boxes = []
    for m in c.mask[:, 0] > 0:
        ys, xs = m.any(1).nonzero()[:, 0].tolist(), m.any(0).nonzero()[:, 0].tolist()
        h, w = m.shape
        boxes.append((xs[0] / w, ys[0] / h, (xs[-1] + 1) / w, (ys[-1] + 1) / h))
    hole = crops(x.to(device), torch.arange(len(x), device=device), torch.tensor(boxes, device=device))
    return net.features(x.to(device)).cpu().numpy(), net.features(hole).cpu().numpy()


def judge_result(pictures: np.ndarray, c: Cases, net: Parser) -> tuple[dict, dict]:
    """pictures uint8 [S, N, H, W, 3] -> metrics [S, N], and {metric: mean and interval} with the Frechet
    distances."""
    per_seed = [judge(to_float(p), c, net) for p in pictures]
    scores = {k: np.stack([m[k] for m in per_seed]) for k in per_seed[0]}
    summary = {k: bootstrap(v.mean(0)) for k, v in scores.items()}  # not-a-number depends on the scene alone
    of_truth = frechet_features(c.truth, c, net)
    of_result = zip(*(frechet_features(paste(to_float(p), c), c, net) for p in pictures))
    for name, a, b in zip(("frechet", "frechet_hole"), of_result, of_truth):
        summary[name] = frechet_interval(np.stack(a), np.broadcast_to(b, (len(a), *b.shape)))
    return scores, summary


####################################################################################################
# 5. parser, scenes, compare, prefs
####################################################################################################

# printed in percent
SHARE = ("shape", "colour", "material", "background", "environment", "style", "empty", "attributes")
ORDER = (*SHARE, "exact", "hole", "seam", "sharpness", "outside_raw", "outside", "frechet", "frechet_hole")


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


def sheet(results: list[Result], cases: dict[str, Cases], rows: int) -> Image.Image:
    """source | mask | each result, pasted | truth, for the first scenes of every task."""
    pictures, names = [], []
    for task, c in cases.items():
        for i in range(min(rows, len(c.indices))):
            got = [paste(to_float(r.pictures[task][0]), c)[i] for r in results]
            pictures.append([c.image[i], c.image[i] * (1 - c.mask[i]), *got, c.truth[i]])
            names.append(f"{task}: {c.caption[i]}")
    titles = ["source", "hole", *(r.name for r in results), "truth"]
    return common.contact_sheet(pictures, titles, row_titles=names)


def open_out(folder: str) -> Path:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def run_parser(cfg: Config, device: torch.device) -> None:
    started = time.time()
    (steps,) = numbers(cfg.steps, "steps", 1)[:1]
    net = train_parser(steps, cfg.batch_size, cfg.lr, device, cfg.bf16)
    weights = {k: v.bfloat16() for k, v in net.state_dict().items()}
    net.load_state_dict({k: v.float() for k, v in weights.items()})  # judged as it ships
    held = {}
    for size, n in ((SIDE, 5000), (2 * SIDE, 2000)):
        held[f"{size}x{size}"] = {k: bootstrap(v) for k, v in parser_accuracy(net, size, n, device).items()}
    heads = list(next(iter(held.values())))
    print("held-out accuracy on clean renders, percent [95% interval]")
    print(table(["", *held], [[k, *(cell("shape", v[k]) for v in held.values())] for k in heads]))
    meta = {"arch": net.arch, "config": asdict(cfg), "samples": steps * cfg.batch_size, "heldout": held,
            **provenance(started)}
    common.write_checkpoint(cfg.out, steps, {"model": weights}, meta)
    print(f"wrote {cfg.out}: {common.n_params(net) / 1e6:.2f} M parameters, {time.time() - started:.0f} s")


def run_scenes(cfg: Config, device: torch.device) -> None:
    started = time.time()
    out = open_out(cfg.out)
    net = load_parser(cfg.parser, device)
    results, cases, seeds = gather(cfg, device)
    truth = Result("truth", results[0].size, {t: to_uint8(c.truth)[None].numpy() for t, c in cases.items()})
    report = {}
    for task, c in cases.items():
        report[task] = {r.name: judge_result(r.pictures[task], c, net)[1] for r in [*results, truth]}
        names = [k for k in ORDER if k in report[task]["truth"]]
        print(f"\n{task}: {len(c.indices)} held-out scenes, {len(seeds)} seed(s), mean [95% interval]")
        rows = [[k, *(cell(k, v[k]) for v in report[task].values())] for k in names]
        print(table(["", *report[task]], rows))
    if cfg.save:
        for r in results:
            save_result(r, cases, seeds, Path(cfg.save) / r.name.replace("/", "_"))
    sheet(results, cases, cfg.rows).save(out / "sheet.png")
    write_json(out / "results.json", {**provenance(started), "config": asdict(cfg), "tasks": report})
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
    """GSB of metrics [S, N] by criterion. overall: more attributes right wins, and where they are equal the
    smaller exact error (where the scene has none, the smaller seam error)."""
    each = {k: verdicts(a[k], b[k], k == "attributes", tie) for k in ("attributes", "exact", "seam")}
    second = np.where(np.isnan(a["exact"]), each["seam"], each["exact"])
    overall = np.where(each["attributes"] != 0, each["attributes"], second)
    return {k: gsb(v) for k, v in {"overall": overall, **each}.items()}


def run_compare(cfg: Config, device: torch.device) -> None:
    started = time.time()
    out = open_out(cfg.out)
    net = load_parser(cfg.parser, device)
    if len([x for x in cfg.ckpt.split(",") if x.strip()]) != 2:
        raise SystemExit(f"error: --ckpt: {cfg.ckpt!r}: compare needs exactly two, A,B")
    (a, b), cases, seeds = gather(cfg, device)
    report = {}
    print(f"A = {a.name}\nB = {b.name}\ngood: A is better; overall: attributes first, then exact error"
          f" (a tie within {100 * cfg.tie:.0f}%)")
    for task, c in cases.items():
        of_a, of_b = judge_result(a.pictures[task], c, net)[0], judge_result(b.pictures[task], c, net)[0]
        report[task] = {"gsb": compare(of_a, of_b, cfg.tie),
                        "difference": {k: bootstrap((of_a[k] - of_b[k]).mean(0)) for k in of_a}}
        print(f"\n{task}: {len(c.indices)} scenes, {len(seeds)} seed(s)")
        print(table(["", "good", "same", "bad", "(G+S)/(S+B)", "(G-B)/n % [95%]", "sign test p"], [
            [k, str(v["good"]), str(v["same"]), str(v["bad"]), f"{v['superiority']:.0f}%",
             cell("attributes", v["net"]), f"{v['p']:.2g}"] for k, v in report[task]["gsb"].items()]))
        rows = [[k, cell(k, report[task]["difference"][k])] for k in ORDER if k in of_a]
        print(table(["A - B", "mean [95%]"], rows))
    sheet([a, b], cases, cfg.rows).save(out / "sheet.png")
    write_json(out / "results.json", {**provenance(started), "config": asdict(cfg), "a": a.name, "b": b.name,
                                      "tasks": report})
    print(f"\nwrote {out / 'results.json'} and {out / 'sheet.png'}")


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
    e = load_editor(cfg.ckpt, device, cfg.bf16)
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
    device = common.setup(cfg.device).device
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # setup() defers it for loops that save
    run = {"parser": run_parser, "scenes": run_scenes, "compare": run_compare, "prefs": run_prefs}
    try:
        run[cfg.task](cfg, device)
    except (OSError, SafetensorError) as e:  # what is read is read by data.py and common.py, which say so
        raise SystemExit(f"error: --out: {cfg.out}: cannot write {getattr(e, 'filename', None) or 'there'} "
                         f"({getattr(e, 'strerror', None) or e}): free some space or choose another folder"
                         ) from None


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__, config=(tyro.conf.FlagConversionOff,)))
    except KeyboardInterrupt:
        raise SystemExit("interrupted: nothing was judged") from None
