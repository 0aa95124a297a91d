"""Preferences as the paper's come about: several generations of the base, ranked; here by the known truth.

    python make_prefs.py --ckpt assets/base --out out/prefs --n 3000 --steps 4,6,8

Aesthetic pairs are the true picture, the best and the worst of k generations, and degraded copies; alignment
pairs are true and false captions (ByteEdit Sec. 3.1, 3.2). train_reward.py reads what is written.
"""

import json
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import common
import data
import flow
import log
import masks
import pipeline
from log import open_out, provenance, write_json
from readers.files import BadFile, clean_caption, too_many
from scenes import dataset
from scenes import text as scene_text
from scenes.draw import Scene, pick, rng_for
from scenes.judge import gradient, to_float, to_uint8


@dataclass
class Config:
    ckpt: str = "assets/base"  # the base, whose generations are ranked
    out: str = "out/prefs"  # folder for pictures, aesthetic.json, alignment.jsonl, results.json
    data: str = "scenes"  # scenes, scenes:hard, a folder of captioned pictures or a .parquet
    n: int = 500  # prompts
    offset: int = 0  # first picture
    captions: int = 0  # further true pictures for alignment pairs alone
    k: int = 4  # pictures for each prompt, of which the best and the worst are kept
    steps: str = "20"  # of sampling, for each of the k in turn, with commas
    guidance: float = 1.0  # classifier-free guidance; 1 = off
    solver: Literal["euler", "heun"] = "euler"  # of the sampler
    margin: float = 0.25  # best and worst are a pair if the worst's error is larger by this fraction
    mismatched: float = 0.67  # share of false captions that are another scene's; the rest: one fact
    batch_size: int = 64  # pictures sampled together
    seed: int = 0  # of masks, prompts, noise and false captions
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast where the hardware has it
    device: str = "auto"  # auto, cpu, cuda


PROMPT_FREE = 0.25  # share of aesthetic preferences without a prompt: the editor outpaints without one


def truth_distance(x: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """How far pictures [N, 3, H, W] are from the truth in the hole, [N], in [0, 1] units; 0 for the truth
    itself.

    Pixel L1 plus twice the L1 between local gradient energies (5 x 5 means). Pixel or gradient L1 alone
    would prefer blur to a sharp texture that lies a little off; local energy counts lost and invented
    detail alike. The judge's parser has no part in it.
    """
    def energy(y: Tensor) -> Tensor:
        return F.avg_pool2d(gradient(y), 5, 1, 2, count_include_pad=False)

    d = (x - truth).abs().mean(1, keepdim=True) + 2 * (energy(x) - energy(truth)).abs()
    return (d * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(min=1) / 2


def _blur(x: Tensor, rng: np.random.Generator) -> Tensor:
    k = int(rng.integers(3, 6))
    for _ in range(2):
        x = F.avg_pool2d(F.pad(x[None], (k // 2, (k - 1) // 2) * 2, mode="replicate"), k, 1)[0]
    return x


def _noise(x: Tensor, rng: np.random.Generator) -> Tensor:
    return x + torch.from_numpy(rng.standard_normal(x.shape, np.float32)) * float(rng.uniform(0.1, 0.5))


def _colour(x: Tensor, rng: np.random.Generator) -> Tensor:
    cast = rng.uniform(-0.35, 0.35, (3, 1, 1)).astype(np.float32)
    return x * float(rng.uniform(0.7, 1.3)) + torch.from_numpy(cast)


def _blocks(x: Tensor, rng: np.random.Generator) -> Tensor:
    k = int(rng.integers(2, 6))
    h, w = x.shape[-2:]
    return F.interpolate(F.interpolate(x[None], (max(1, h // k), max(1, w // k)), mode="area"), (h, w))[0]


def _shift(x: Tensor, rng: np.random.Generator) -> Tensor:
    most = max(2, x.shape[-1] // 12)
    dy, dx = (int(rng.integers(1, most + 1)) * int(rng.choice((-1, 1))) for _ in range(2))
    return x.roll((dy, dx), (1, 2))


def _ghost(x: Tensor, rng: np.random.Generator) -> Tensor:
    return x + float(rng.uniform(0.3, 0.6)) * (_shift(_shift(x, rng), rng) - x)


DEGRADATIONS = {"blur": _blur, "noise": _noise, "colour": _colour, "blocks": _blocks, "shift": _shift,
                "ghost": _ghost}


def degrade(x: Tensor, truth: Tensor, mask: Tensor, rng: np.random.Generator) -> tuple[Tensor, str]:
    """A worse version of a picture x [3, H, W] in the hole mask [1, H, W], and what was done: blur, noise,
    colour shift, blocks, content shifted against the seam, ghosting. Worse means 3% farther from the truth: a
    blurred bad picture can be the better one."""
    names = list(DEGRADATIONS)
    before = truth_distance(x[None], truth[None], mask[None])
    for name in [*(names[i] for i in rng.permutation(len(names))), "colour", "noise", "noise"]:
        y = (x + mask * (DEGRADATIONS[name](x, rng) - x)).clamp(-1, 1)
        if truth_distance(y[None], truth[None], mask[None]) > before + 0.03:
            break
    return y, name


def clear(near: float, far: float, margin: float) -> bool:
    """Whether the worst of k generations, `far` from the truth, is told from the best, `near`: farther by at
    least `margin` of the best's distance. Closer ones would teach a reward noise. Ours, paper silent."""
    return far > near and far >= (1 + margin) * near


def false_captions(s: Scene, seed: int, index: int, image: str, kinds: list[str]) -> list[dict]:
    """Alignment pairs {image, better, worse, kind} of one picture: a true caption against the same sentence
    wrong in a fact of the kind, or against another scene's ("scene"), as mismatched pairs of the web are
    (ByteEdit Sec. 3.2)."""
    rows = []
    for draw, ask in enumerate(kinds):
        say = (seed, index % 2**32, 14 + draw)
        better = scene_text.caption(s, rng_for(*say))
        worse, kind = scene_text.false_caption(s, rng_for(*say), ask)
        rows.append({"image": image, "better": better, "worse": worse, "kind": kind})
    return rows


def draw_kinds(seed: int, index: int, mismatched: float, n: int = 3) -> list[str]:
    """What n false captions of scene `index` are wrong in: "scene" by chance `mismatched`, else a fact."""
    rng, facts = rng_for(seed, index, 10), [k for k in scene_text.FALSE_KINDS if k != "scene"]
    return ["scene" if u < mismatched else pick(facts, v) for u, v in rng.random((n, 2))]


def make_prefs(cfg: Config, out: Path, source, pipe: pipeline.Pipe) -> dict:
    """Writes OUT/images/*.png, OUT/aesthetic.json (ImageReward's items: truth, best and worst of k; a
    picture and its degraded copy) and OUT/alignment.jsonl ({image, better, worse, kind}: true and false
    caption).

    source: data.open_source(cfg.data). pipe: the base, which fills the holes. -> counts for results.json.
    BadFile when too many pictures cannot be read.
    """
    size, seed, steps = pipe.size, cfg.seed, common.numbers(cfg.steps, "steps", 1)
    bf16 = cfg.precision == "bf16"
    (out / "images").mkdir(exist_ok=True)
    drawn = isinstance(source, dataset.Scenes)  # false captions of a scene are wrong in a known fact
    items, captions, wins, bad, read = [], [], 0, 0, 0
    bar = log.progress(cfg.n, desc="preferences")
    for start in range(cfg.offset, cfg.offset + cfg.n, cfg.batch_size):
        indices, loaded = [], []
        for i in range(start, min(start + cfg.batch_size, cfg.offset + cfg.n)):
            read += 1
            try:
                loaded.append(source.load(i, size, size))
                indices.append(i)
            except BadFile as problem:
                bad += 1
                common.print0(f"skipped: {str(problem).removeprefix('error: ')}")
                if too_many(bad, read):
                    raise
        bar.update(read - bar.n)
        if not indices:
            continue
        rngs = [np.random.Generator(np.random.PCG64([seed, i, 13])) for i in indices]
        fitted = [data.fit(x["image"], size, size, segments=x.get("segments")) for x in loaded]
        truth = to_float(np.stack([image for image, _ in fitted]))
        prompts = [clean_caption(x["caption"])[0] for x in loaded]
        tasks = [("inpaint", "edit", "outpaint")[rng.integers(3)] for rng in rngs]
        prompts = ["" if rng.random() < PROMPT_FREE else c for rng, c in zip(rngs, prompts)]
        mask = np.stack([masks.task_mask(task, size, size, rng, segments)[0]
                         for task, rng, (_, segments) in zip(tasks, rngs, fitted)])
        mask = torch.from_numpy(mask)[:, None]

        # 1) k pictures of the base for every prompt, with their own noise and number of steps
        made = []
        for k in range(cfg.k):
            gens = common.generators(seed, k, indices, stream=7)
            noise = common.randn(gens, (pipe.space.channels, *[size // pipe.space.stride] * 2))
            ts = flow.timesteps(steps[k % len(steps)], pipe.shift)
            raw = pipeline.sample(pipe.net, pipe.space, prompts, mask, truth, noise, ts, cfg.guidance,
                                  solver=cfg.solver, bf16=bf16).float().cpu()
            made.append(to_float(to_uint8(raw * mask + truth * (1 - mask))))
        distance = torch.stack([truth_distance(x, truth, mask) for x in made])               # [k, B]
        made = torch.stack(made)
        best, worst = distance.argmin(0), distance.argmax(0)

        # 2) ranked by the known truth, and controlled degradations of the true and of the best picture
        for j, (index, rng) in enumerate(zip(indices, rngs)):
            told = clear(float(distance[best[j], j]), float(distance[worst[j], j]), cfg.margin)
            wins += told
            pictures = {"truth": truth[j], "best": made[best[j], j], "worst": made[worst[j], j]}
            pictures["truth_bad"], how_truth = degrade(truth[j], truth[j], mask[j], rng)
            pictures["best_bad"], how_best = degrade(pictures["best"], truth[j], mask[j], rng)
            files = {k: f"images/{index:08d}_{k}.png" for k in pictures}
            for k, x in pictures.items():
                Image.fromarray(to_uint8(x).numpy()).save(out / files[k])
            items.append({"prompt": prompts[j], "generations": [files[k] for k in ("truth", "best", "worst")],
                          "ranking": [1, 2, 3 if told else 2], "kind": "generated"})  # readers skip ties
            for k, how in (("truth", how_truth), ("best", how_best)):
                items.append({"prompt": prompts[j], "generations": [files[k], files[f"{k}_bad"]],
                              "ranking": [1, 2], "kind": how})

            # 3) false captions: of a scene, one that its picture belies (of a generated one: its known
            #    part); of a photo, the caption of another that says something else
            if drawn:
                s = source.scene(index)
                captions += false_captions(s, seed, index, files["truth"],
                                           draw_kinds(seed, index, cfg.mismatched))
                captions += false_captions(s, seed, -1 - index, files["best"], ["background"])
            elif prompts[j] and (others := [c for c in prompts if c not in ("", prompts[j])]):
                worse = others[rng.integers(len(others))]
                captions.append({"image": files["truth"], "better": prompts[j], "worse": worse,
                                 "kind": "other"})
    bar.close()
    first = cfg.offset + cfg.n
    for index in range(first, first + cfg.captions if drawn else first):
        file = f"images/{index:08d}_truth.png"
        Image.fromarray(source.load(index, size, size)["image"]).save(out / file)
        captions += false_captions(source.scene(index), seed, index, file,
                                   draw_kinds(seed, index, cfg.mismatched))
    written = {"aesthetic.json": (items, json.dumps(items)),
               "alignment.jsonl": (captions, "".join(json.dumps(x) + "\n" for x in captions))}
    for name, (rows, text) in written.items():
        if rows:
            (out / name).write_text(text)
            print(f"wrote {out / name}: {len(rows):,} items")
    if items:
        print(f"best and worst differ by {100 * cfg.margin:.0f}% for {100 * wins / (read - bad):.0f}% of "
              f"{read - bad} prompts; {bad} picture(s) skipped")
    return {"items": len(items), "captions": len(captions), "skipped": bad, "clear": wins}


def check(cfg: Config) -> None:
    """Refuse values that cannot work, before anything is loaded."""
    common.check_bounds(cfg, at_least_1=("batch_size",), not_negative=("n", "captions", "offset", "margin"),
                        share=("mismatched",))
    common.numbers(cfg.steps, "steps", 1)
    if cfg.k < 2:
        common.refuse(cfg, "k", "ranking needs at least 2 pictures")


def main(cfg: Config) -> None:
    started = time.time()
    check(cfg)
    if common.ranks()[1] > 1:
        raise SystemExit("error: torchrun: several processes would make the same: start one, without it")
    dist = common.setup(cfg.device)
    cfg = replace(cfg, precision=common.PRECISION[common.use_bf16(cfg.precision, dist)])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # setup() defers it for loops that save
    source = data.open_source(cfg.data, "train")
    wanted = cfg.n + cfg.captions
    if not 1 <= wanted <= len(source) - cfg.offset:
        raise SystemExit(f"error: --n: {cfg.n}: use 1 to {len(source)}, with --captions and --offset")
    pipe = pipeline.open_editor(cfg.ckpt, dist.device, ("fill",))
    pipe.net.to(dist.device).eval().requires_grad_(False)
    try:
        out = open_out(cfg.out)
        counts = make_prefs(cfg, out, source, pipe)
        write_json(out / "results.json", {**provenance(started), "config": asdict(cfg), **counts})
    except OSError as e:  # what is read is read by data.py and checkpoint.py, which say so
        raise SystemExit(f"error: --out: {cfg.out}: cannot write {e.filename or 'there'} ({e.strerror or e}"
                         "): free some space or choose another folder") from None


if __name__ == "__main__":
    common.command(main, Config, __doc__, "what was written is not whole")
