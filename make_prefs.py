"""Preferences as the paper's come about (ByteEdit Sec. 3.1, 3.2): of several pictures the best and worst.

    python make_prefs.py --ckpt assets/base --out out/prefs --n 3000 --steps 4,6,8     # known truth ranks
    python make_prefs.py --texts prompts.txt --ckpt A,B --steps 8,20 --judge people --out out/study
    python make_prefs.py --labels anna.jsonl,ben.jsonl --out out/study                  # what they exported
    python make_prefs.py --data laion --recaption http://HOST/v1 --model NAME --judge clipscore:CLIP,TOKENIZER

With pictures, --data: aesthetic pairs are the true picture, the best and the worst of k generations that fill
a hole, and degraded copies; alignment pairs are true and false captions. With --texts: diverse ones of them
are drawn k times each, by the checkpoints and numbers of steps in turn, and ranked by a reward, --judge, or
by people, for whom a page is written (readers/study.py). With --recaption a served model describes the
pictures whose own captions fit least, by a reward: alignment pairs of new against old caption (Sec. 3.2).
train_reward.py reads what is written.
"""

import json
import signal
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
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
import rewards
from factory.instruct import words
from log import open_out, provenance, write_json
from readers import prompts, served, study
from readers.files import BadFile, clean_caption, too_many
from readers.pictures import open_source
from scenes import dataset
from scenes import text as scene_text
from scenes.draw import Scene, pick, rng_for
from scenes.judge import to_float, to_uint8, truth_distance


@dataclass
class Config:
    ckpt: str = "assets/base"  # the base, whose generations are ranked; with --texts several, with commas
    out: str = "out/prefs"  # folder for pictures, aesthetic.json, alignment.jsonl, results.json
    data: str = "scenes"  # scenes, scenes:hard, a folder of captioned pictures or a .parquet
    texts: str | None = None  # in place of --data: .txt, .jsonl or .parquet files of prompts, with commas
    select: Literal["knn", "votek", "random"] = "knn"  # how --n texts are chosen (readers/prompts.py)
    features: Literal["encoder", "hashed"] = "encoder"  # texts are compared by the base's encoder, or words
    clusters: int = 64  # clusters of K-means, for --select knn (the paper names no number)
    neighbours: int = 10  # nearest texts that knn and votek look at (the paper names no number)
    judge: str = "people"  # who ranks: people, who get a page, or a reward (rewards.open_reward)
    recaption: str | None = None  # address of a served vision-language model, up to /v1: it writes captions
    model: str = ""  # name of the served model; its key is read from the variable JUDGE_API_KEY
    lowest: float = 0.3  # of --recaption: share of the --n pictures whose captions fit least, by --judge
    gold: float = 0.05  # share of items with a ruined picture, to see whether an annotator looks
    repeats: float = 0.05  # share of items that come twice, to see whether an annotator agrees with himself
    labels: str | None = None  # files that the page of --out exported, with commas: write their preferences
    others: bool = False  # also pair the pictures between best and worst with both
    n: int = 500  # number of prompts (with --data: pictures)
    offset: int = 0  # leave out the first so many pictures
    captions: int = 0  # number of further true scenes that make alignment pairs alone
    k: int = 4  # pictures for each prompt, of which the best and the worst are kept
    steps: str = "20"  # sampler steps, for each of the k pictures in turn, with commas
    guidance: float = 1.0  # classifier-free guidance; 1 = off
    solver: Literal["euler", "heun", "dpm"] = "euler"  # solver of the sampler
    degrade: Literal["look", "all", "none"] = "look"  # worse copies: in look; all: casts, shifts too
    margin: float = 0.25  # least gap of a pair: a fraction of the error; of a reward, std of its scores
    mismatched: float = 0.67  # share of false captions that are another scene's; the rest: one fact
    batch_size: int = 64  # pictures sampled together
    seed: int = 0  # seed of masks, prompts, noise and false captions
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast where the hardware has it
    device: str = "auto"  # auto (a GPU where there is one), cpu or cuda


PROMPT_FREE = 0.25  # share of aesthetic preferences without a prompt: the editor outpaints without one


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


def _pale(x: Tensor, rng: np.random.Generator) -> Tensor:
    mean = x.mean((1, 2), keepdim=True)
    return mean + float(rng.uniform(0.25, 0.6)) * (x - mean)


DEGRADATIONS = {"blur": _blur, "noise": _noise, "colour": _colour, "blocks": _blocks, "shift": _shift,
                "ghost": _ghost, "pale": _pale}
KINDS = {"all": ("blur", "noise", "colour", "blocks", "shift", "ghost"),
         "look": ("blur", "noise", "blocks", "ghost", "pale"), "none": ()}


def degrade(x: Tensor, truth: Tensor, mask: Tensor, rng: np.random.Generator, names: tuple[str, ...]) \
        -> tuple[Tensor, str]:
    """A worse version of a picture x [3, H, W] in the hole mask [1, H, W], by one of `names`, and which:
    blur, noise, colour shift, blocks, content shifted against the seam, ghosting, contrast lost. Worse means
    3% farther from the truth: a blurred bad picture can be the better one."""
    before = truth_distance(x[None], truth[None], mask[None])
    last = ("colour" if "colour" in names else "noise", "noise", "noise")  # which always does it, in the end
    for name in [*(names[i] for i in rng.permutation(len(names))), *last]:
        y = (x + mask * (DEGRADATIONS[name](x, rng) - x)).clamp(-1, 1)
        if truth_distance(y[None], truth[None], mask[None]) > before + 0.03:
            break
    return y, name


def clear(near: float, far: float, margin: float) -> bool:
    """Whether the worst of k generations, `far` from the truth, is told from the best, `near`: farther by at
    least `margin` of the best's distance. Closer ones would teach a reward noise. Ours, paper silent."""
    return far > near and far >= (1 + margin) * near


def false_captions(s: Scene, seed: int, index: int, image: str, kinds: list[str]) -> list[dict]:
    """Alignment pairs {image, better, worse, kind, family} of one picture: a true caption against the same
    sentence wrong in a fact of the kind, or against another scene's ("scene"), as mismatched pairs of the web
    are (ByteEdit Sec. 3.2). index: the scene's, or -1 - index: other captions, for another picture of it."""
    rows = []
    for draw, ask in enumerate(kinds):
        say = (seed, index % 2**32, 14 + draw)
        better = scene_text.caption(s, rng_for(*say))
        worse, kind = scene_text.false_caption(s, rng_for(*say), ask)
        rows.append({"image": image, "better": better, "worse": worse, "kind": kind,
                     "family": max(index, -1 - index)})
    return rows


def draw_kinds(seed: int, index: int, mismatched: float, n: int = 3) -> list[str]:
    """What n false captions of scene `index` are wrong in: "scene" by chance `mismatched`, else a fact."""
    rng, facts = rng_for(seed, index, 10), [k for k in scene_text.FALSE_KINDS if k != "scene"]
    return ["scene" if u < mismatched else pick(facts, v) for u, v in rng.random((n, 2))]


def make_prefs(cfg: Config, out: Path, source, pipe: pipeline.Pipe) -> dict:
    """Writes OUT/images/*.png, OUT/aesthetic.json (ImageReward's items: truth, best and worst of k; a
    picture and its degraded copy) and OUT/alignment.jsonl ({image, better, worse, kind, family}: true and
    false caption). family, in both: the source's index, of which no two pictures may be on both sides of a
    split.

    source: open_source(cfg.data). pipe: the base, which fills the holes. -> counts for results.json.
    BadFile when too many pictures cannot be read.
    """
    size, seed, steps = pipe.size, cfg.seed, common.numbers(cfg.steps, "steps", 1)
    bf16 = cfg.precision == "bf16"
    (out / "images").mkdir(exist_ok=True)
    for name in ("aesthetic.json", "alignment.jsonl"):  # of an earlier run, whose pictures are overwritten
        (out / name).unlink(missing_ok=True)
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
            how, names = {}, KINDS[cfg.degrade]
            for k in ("truth", "best") if names else ():
                pictures[f"{k}_bad"], how[k] = degrade(pictures[k], truth[j], mask[j], rng, names)
            files = {k: f"images/{index:08d}_{k}.png" for k in pictures}
            for k, x in pictures.items():
                Image.fromarray(to_uint8(x).numpy()).save(out / files[k])
            # a kind each: to tell the best from the worst is more than to tell the true from the generated
            told = [("truth", "best"), ("truth", "worst"), *([("best", "worst")] if told else [])]
            far = {"truth": 0.0, "best": float(distance[best[j], j]), "worst": float(distance[worst[j], j])}
            items += [{"prompt": prompts[j], "generations": [files[a], files[b]], "ranking": [1, 2],
                       "kind": f"{a} over {b}", "gap": round(far[b] - far[a], 6), "family": index}
                      for a, b in told]
            items += [{"prompt": prompts[j], "generations": [files[k], files[f"{k}_bad"]], "ranking": [1, 2],
                       "kind": kind, "family": index} for k, kind in how.items()]

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
                                 "kind": "other", "family": index})
    bar.close()
    first = cfg.offset + cfg.n
    for index in range(first, first + cfg.captions):
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
        print(f"best against worst is a pair for {100 * wins / (read - bad):.0f}% of {read - bad} prompts: "
              f"those whose worst errs {100 * cfg.margin:.0f}% more (--margin); {bad} picture(s) skipped")
    return {"items": len(items), "captions": len(captions), "skipped": bad, "clear": wins}


def features_of(texts: list[str], pipe: pipeline.Pipe | None) -> np.ndarray:
    """Unit vectors [N, D] of texts: the pooled output of the base's text encoder, centred (all its
    vectors lie to one side); without a base their hashed words."""
    if pipe is None:
        return prompts.hashed(texts)
    with torch.inference_mode():
        parts = [pipe.net.encode_text(texts[a:a + 256])[1].float().cpu() for a in range(0, len(texts), 256)]
    x = torch.cat(parts).numpy()
    return prompts.unit(x - x.mean(0))


def least_gap(margin: float, reward, scores: np.ndarray) -> float:
    """--margin in the unit of a reward's scores: these are deviations already if they are normalised, else
    those of `scores`, all that it gave here."""
    return max(margin * (1.0 if rewards.is_normalised(reward) else float(scores.std())), 1e-6)


QUESTION = ("Which picture is the best for its text, and which the worst? Look at beauty, colours, structure "
            "and brightness.")  # ByteEdit's four


def from_texts(cfg: Config, out: Path, device: torch.device) -> dict:
    """Chosen texts to OUT/prompts.txt, pictures, and either the page or OUT/aesthetic.json -> counts."""
    texts, notes = prompts.undecorated(prompts.open_texts(cfg.texts))
    print(f"{len(texts):,} texts; left out: " + (", ".join(f"{k} {n:,}" for k, n in notes.items()) or "none")
          + f"\ndecoration, of which texts are freed: {', '.join(prompts.DECORATIVE)}")
    if not 1 <= cfg.n <= len(texts):
        raise SystemExit(f"error: --n: {cfg.n}: --texts has {len(texts):,} usable ones: choose among them")
    paths, steps = cfg.ckpt.split(","), common.numbers(cfg.steps, "steps", 1)
    pipes = [pipeline.open_editor(p, device, ("draw",)) for p in paths]
    for path, pipe in zip(paths, pipes):
        pipe.net.to(device).eval().requires_grad_(False)
        if pipe.size != pipes[0].size:
            raise SystemExit(f"error: --ckpt: {path}: draws at {pipe.size} pixels, the first at "
                             f"{pipes[0].size}: their sizes would give them away")
    reward = judge = None
    if cfg.judge != "people":
        judge = rewards.open_reward(cfg.judge, device, "--judge")
        reward = rewards.score_of(judge)

    # 1) diverse texts
    x = features_of(texts, pipes[0] if cfg.features == "encoder" else None)
    chosen = prompts.select(x, cfg.n, cfg.select, cfg.clusters, cfg.neighbours, cfg.seed)
    told = f"the text encoder of {paths[0]}" if cfg.features == "encoder" else "hashed words and their pairs"
    found = prompts.coverage(x, chosen)
    print(f"{cfg.n:,} chosen by {cfg.select} over {told}: a text lies {found:.3f} from the nearest chosen")
    texts = [texts[i] for i in chosen]
    (out / "prompts.txt").write_text("".join(t + "\n" for t in texts), encoding="utf-8")

    # 2) k pictures of each
    rng, items, rated, bar = np.random.default_rng([cfg.seed, 17]), [], [], log.progress(cfg.n, desc="texts")
    for start in range(0, cfg.n, cfg.batch_size):
        part = texts[start:start + cfg.batch_size]
        made, names = [], []
        for k in range(cfg.k):
            pipe, n = pipes[k % len(pipes)], steps[k // len(pipes) % len(steps)]
            gens = common.generators(cfg.seed, k, range(start, start + len(part)), stream=8)
            noise = common.randn(gens, (pipe.space.channels, *[pipe.size // pipe.space.stride] * 2))
            holes = torch.ones(len(part), 1, pipe.size, pipe.size)
            empty = torch.zeros(len(part), 3, pipe.size, pipe.size)
            raw = pipeline.sample(pipe.net, pipe.space, part, holes, empty, noise,
                                  flow.timesteps(n, pipe.shift), cfg.guidance, solver=cfg.solver,
                                  bf16=cfg.precision == "bf16")
            made.append(to_uint8(raw.float().cpu()).numpy())
            names.append(f"{paths[k % len(pipes)]}, {n} steps")

        # 3) best and worst: by the reward, or asked of people
        if reward:
            scores = torch.stack([reward(to_float(x).to(device), part).float().cpu() for x in made])  # [k, B]
        for j, text in enumerate(part):
            saved = [study.save_picture(out, x[j]) for x in made]
            if reward:
                rated.append((text, dict(zip(saved, names)), saved, scores[:, j]))
                continue
            items.append(study.Item(text, saved, names))
            if rng.random() < cfg.gold:
                spoilt = study.save_picture(out, study.ruin(made[-1][j], rng))
                items.append(study.Item(text, [*saved[:-1], spoilt], [*names[:-1], "ruined"], None,
                                        {"worst": [spoilt]}))
        bar.update(len(part))
    bar.close()
    counts = {"texts": len(texts), "coverage": found, "features": told, "notes": dict(notes)}
    if reward:
        ranked, least = [], least_gap(cfg.margin, judge, torch.cat([scores for *_, scores in rated]).numpy())
        for text, made, saved, scores in rated:
            best, worst = int(scores.argmax()), int(scores.argmin())
            if scores[best] - scores[worst] >= least:
                key = {"items": {"": {"prompt": text, "made": made}}}
                ranked += [{**item, "kind": "judge"} for item in study.ranked_items(
                    {"": (saved[best], saved[worst])}, key, cfg.others)]
        print(f"wrote {study.write_ranked(out, ranked)}: {len(ranked):,} of {cfg.n:,} texts "
              "with a clear best and worst")
        return counts | {"items": len(ranked)}
    key = study.write_study(out, items, QUESTION, cfg.repeats, cfg.seed)
    print(f"wrote {out / 'page'}: {len(key['items']):,} items, "
          f"{sum(bool(i['gold']) for i in key['items'].values())} of them gold, "
          f"{sum(bool(i['repeat_of']) for i in key['items'].values())} repeats. Give annotators that folder "
          f"(page/index.html needs no server), keep {out / 'key.json'}; then --labels FILE,FILE --out {out}")
    return counts | {"items": len(key["items"])}


def from_labels(cfg: Config) -> None:
    """What annotators exported -> who counts, how far they agree, and OUT/aesthetic.json."""
    key = study.read_key(cfg.out)
    answers = study.read_answers(cfg.labels.split(","), key)
    if not answers:
        raise SystemExit(f"error: --labels: {cfg.labels}: not one answer in it: export again")
    known = study.annotators(answers, key)
    print("annotator            answers    gold  repeats  ms an answer")
    for name, a in known.items():
        print(f"{name:<20} {a['answers']:>7} {a['right']:>3}/{a['gold']:<3} {a['same']:>4}/{a['again']:<3} "
              f"{a['ms']:>12,.0f}" + f"   left out: {a['careless']}" * bool(a["careless"]))
    counted = [a for a in answers if not known[a.annotator]["careless"]]
    for what, (share, kappa, pairs) in study.agreement(counted).items():
        told = f"{share:.1%} of {pairs:,} pairs of answers alike, kappa {kappa:.2f}" if pairs else "unknown"
        print(f"agreement on the {what}: {told}")
    chosen = study.decided(counted, key)
    if not chosen:
        raise SystemExit(f"error: --labels: {cfg.labels}: no item has a majority among those that count: ask "
                         "more people")
    items = study.ranked_items(chosen, key, cfg.others)
    asked = sum(not i["gold"] and not i["repeat_of"] for i in key["items"].values())
    print(f"wrote {study.write_ranked(cfg.out, items)}: {len(items):,} of {asked:,} items decided")


def overlap(a: str, b: str) -> float:
    """Words that two texts share, over all of theirs, 0 to 1."""
    one, other = words(a), words(b)
    return len(one & other) / max(1, len(one | other))


def recaption(cfg: Config, out: Path, source, judge, size: int, device: torch.device) -> dict:
    """OUT/alignment.jsonl of new against old captions of the same pictures -> counts for results.json.

    judge: a reward, of pictures of `size`. A new caption counts where it beats the old one by --margin, and
    is no paraphrase of it (fewer than half of the words are shared). What the model says is kept in
    OUT/served.jsonl: the same command goes on.
    """
    client = served.Served(cfg.recaption, cfg.model, cache=out / "served.jsonl")
    reward = rewards.score_of(judge)
    (out / "images").mkdir(exist_ok=True)

    def look(index: int, side: int) -> np.ndarray:
        return data.fit(source.load(index, side, side)["image"], side, side)[0]

    def fit_of(pictures: list[np.ndarray], captions: list[str]) -> np.ndarray:
        parts = range(0, len(captions), cfg.batch_size)
        with torch.inference_mode():
            found = [reward(to_float(np.stack(pictures[k:k + cfg.batch_size])).to(device),
                            captions[k:k + cfg.batch_size]).float().cpu() for k in parts]
        return torch.cat(found).numpy() if found else np.zeros(0)

    # 1) the pictures whose captions fit least
    known, texts, scores, bad = [], [], [], 0
    for start in range(cfg.offset, cfg.offset + cfg.n, cfg.batch_size):
        pictures, part = [], []
        for i in range(start, min(start + cfg.batch_size, cfg.offset + cfg.n)):
            try:
                text = clean_caption(source.load(i, size, size)["caption"])[0]
                if text:
                    pictures.append(look(i, size))
                    part.append(text)
                    known.append(i)
            except BadFile as problem:
                bad += 1
                common.print0(f"skipped: {str(problem).removeprefix('error: ')}")
                if too_many(bad, i + 1 - cfg.offset):
                    raise
        scores += fit_of(pictures, part).tolist()
        texts += part
    order = np.argsort(scores, kind="stable")[:round(cfg.lowest * len(scores))]
    print(f"{len(known):,} captioned pictures, {bad} skipped; {len(order):,} of them are described")

    # 2) what the served model sees there
    replies = list(served.describe(client, (look(known[k], 512) for k in order)))
    if client.stopped:
        raise SystemExit(f"error: --recaption: {client.url}: {client.stopped}: the same command goes on "
                         "where it ended")
    said = [(k, reply.value) for k, reply in zip(order, replies) if reply.status == "ok"]
    better = fit_of([look(known[k], size) for k, _ in said], [text for _, text in said])

    # 3) pairs of those that fit better, and say something else
    rows, close, least = [], 0, least_gap(cfg.margin, judge, np.array(scores))
    for (k, text), score in zip(said, better):
        if score - scores[k] < least:
            continue
        if overlap(text, texts[k]) >= 0.5:
            close += 1
            continue
        file = f"images/{known[k]:08d}_picture.png"
        Image.fromarray(look(known[k], 512)).save(out / file)
        rows.append({"image": file, "better": text, "worse": texts[k], "kind": "recaption",
                     "gap": round(float(score - scores[k]), 6)})
    (out / "alignment.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"wrote {out / 'alignment.jsonl'}: {len(rows):,} pairs; of {len(said):,} new captions "
          f"{close:,} were paraphrases and {len(said) - close - len(rows):,} fitted no better; "
          f"{len(order) - len(said):,} replies could not be used")
    return {"pairs": len(rows), "described": len(said), "paraphrases": close, "served": dict(client.counts)}


def check(cfg: Config) -> None:
    """Refuse values that cannot work, before anything is loaded."""
    common.check_bounds(cfg, at_least_1=("batch_size", "clusters", "neighbours"),
                        not_negative=("n", "captions", "offset", "margin"),
                        share=("mismatched", "gold", "repeats", "lowest"))
    if cfg.recaption and cfg.judge == "people":
        common.refuse(cfg, "judge", "which captions fit least is told by a reward: name one, such as "
                                    "clipscore:CLIP,TOKENIZER")
    if cfg.labels:
        return  # what is asked of models does not matter there
    common.numbers(cfg.steps, "steps", 1)
    if cfg.k < 2:
        common.refuse(cfg, "k", "ranking needs at least 2 pictures")
    if cfg.texts and cfg.judge == "people" and cfg.k > 4:
        common.refuse(cfg, "k", "people compare at most 4 pictures")


def main(cfg: Config) -> None:
    started = time.time()
    check(cfg)
    if cfg.labels:
        return from_labels(cfg)
    if common.ranks()[1] > 1:
        raise SystemExit("error: torchrun: several processes would make the same: start one, without it")
    dist = common.setup(cfg.device)
    cfg = replace(cfg, precision=common.PRECISION[common.use_bf16(cfg.precision, dist)])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # setup() defers it for loops that save
    if cfg.texts:
        out = open_out(cfg.out)
        counts = from_texts(cfg, out, dist.device)
        write_json(out / "results.json", {**provenance(started), "config": asdict(cfg), **counts})
        return
    source = open_source(cfg.data, "train")
    if cfg.captions and (cfg.recaption or not isinstance(source, dataset.Scenes)):
        common.refuse(cfg, "captions", "further pictures have captions that are false in a known fact, as "
                                       "scenes alone have: leave it out, or raise --n")
    wanted = cfg.n + cfg.captions
    if not 1 <= wanted <= len(source) - cfg.offset:
        raise SystemExit(f"error: --n: {cfg.n}: use 1 to {len(source)}, with --captions and --offset")
    if cfg.recaption:
        net = rewards.open_reward(cfg.judge, dist.device, "--judge")
        size = net.cfg.image_size if isinstance(net, rewards.PreferenceReward) else 224  # CLIP's, and BLIP's
        work = partial(recaption, judge=net, size=size, device=dist.device)
    else:
        pipe = pipeline.open_editor(cfg.ckpt, dist.device, ("fill",))
        pipe.net.to(dist.device).eval().requires_grad_(False)
        work = partial(make_prefs, pipe=pipe)
    try:
        out = open_out(cfg.out)
        counts = work(cfg, out, source)
        write_json(out / "results.json", {**provenance(started), "config": asdict(cfg), **counts})
    except OSError as e:  # what is read is read by data.py and checkpoint.py, which say so
        raise SystemExit(f"error: --out: {cfg.out}: cannot write {e.filename or 'there'} ({e.strerror or e}"
                         "): free some space or choose another folder") from None


if __name__ == "__main__":
    common.command(main, Config, __doc__, "what was written is not whole")
