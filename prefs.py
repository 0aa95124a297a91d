"""Preferences as the paper's come about: several generations of the base, ranked; here by the known truth.

`python evaluate.py prefs` writes them. Aesthetic pairs are the true picture, the best and the worst of k
generations, and degraded copies; alignment pairs are true and false captions (ByteEdit Sec. 3.1, 3.2).
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import common
import data
import masks
import scene_text
import scenes
from judge import gradient, to_float, to_uint8
from pictures import BadFile, clean_caption, too_many

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


def false_captions(s: scenes.Scene, seed: int, index: int, image: str, kinds: list[str]) -> list[dict]:
    """Alignment pairs {image, better, worse, kind} of one picture: a true caption against the same sentence
    wrong in a fact of the kind, or against another scene's ("scene"), as mismatched pairs of the web are
    (ByteEdit Sec. 3.2)."""
    rows = []
    for draw, ask in enumerate(kinds):
        say = (seed, index % 2**32, 14 + draw)
        better = scene_text.caption(s, scenes.rng_for(*say))
        worse, kind = scene_text.false_caption(s, scenes.rng_for(*say), ask)
        rows.append({"image": image, "better": better, "worse": worse, "kind": kind})
    return rows


def draw_kinds(seed: int, index: int, mismatched: float, n: int = 3) -> list[str]:
    """What n false captions of scene `index` are wrong in: "scene" by chance `mismatched`, else a fact."""
    rng, facts = scenes.rng_for(seed, index, 10), [k for k in scene_text.FALSE_KINDS if k != "scene"]
    return ["scene" if u < mismatched else scenes.pick(facts, v) for u, v in rng.random((n, 2))]


def make_prefs(cfg, out: Path, source, size: int, steps: list[int], seed: int,
               paint: Callable[[Tensor, Tensor, list[str], Tensor, int], Tensor]) -> dict:
    """Writes OUT/images/*.png, OUT/aesthetic.json (ImageReward's items: truth, best and worst of k; a
    picture and its degraded copy) and OUT/alignment.jsonl ({image, better, worse, kind}: true and false
    caption).

    cfg: evaluate.Config, of which data, n, offset, captions, k, batch_size, margin and mismatched are used.
    source: data.open_source(cfg.data). paint(pictures [B, 3, size, size], masks [B, 1, size, size], prompts,
    noise, steps) -> what the base puts there, [B, 3, size, size]. steps: of the k generations, in turn.
    -> counts for results.json. BadFile when too many pictures cannot be read.
    """
    (out / "images").mkdir(exist_ok=True)
    drawn = isinstance(source, scenes.Scenes)  # false captions of a scene are wrong in a known fact
    items, captions, wins, bad, read = [], [], 0, 0, 0
    bar = common.progress(cfg.n, desc="preferences")
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
            noise = common.randn(common.generators(seed, k, indices, stream=7), truth.shape[1:])
            raw = paint(truth, mask, prompts, noise, steps[k % len(steps)])
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
