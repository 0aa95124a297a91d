"""Whether diverse texts cover more than blindly chosen ones (ByteEdit Sec. 3.1), where the facts are known.

    python runs/diverse.py --out out/diverse

Pools of captions of scenes: as they are drawn, all kinds alike, and as people's prompts are, few kinds often
and most rarely. Of each a few are chosen; what counts is how many of the pool's facts they speak of: kinds
of objects (shape and colour) and settings (background and environment). The choice knows nothing of facts: it
sees words, or what the base's text encoder makes of them.
"""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import make_prefs  # noqa: E402
import pipeline  # noqa: E402
from log import open_out, provenance, write_json  # noqa: E402
from readers import prompts  # noqa: E402
from scenes import dataset  # noqa: E402
from scenes.draw import LEVELS, rng_for  # noqa: E402
from scenes.text import caption  # noqa: E402


@dataclass
class Config:
    out: str = "out/diverse"  # results.json
    ckpt: str = "assets/base"  # whose text encoder
    pool: int = 2_000  # captions
    n: int = 100  # of them are chosen
    clusters: int = 50  # of K-means
    neighbours: int = 10  # of knn; vote-k takes more, as ImageReward: 150
    seeds: int = 3  # each another pool and another choice


def facts(scene) -> set:
    """Kinds of objects and settings that a scene has."""
    return {(o.shape, o.colour) for o in scene.objects} | {(scene.background, scene.environment)}


def draw_pool(n: int, skewed: bool, seed: int) -> tuple[list, list[str]]:
    """n scenes and their captions, each caption once. skewed: kept with the product of the Zipf weights of
    background, shapes and colours."""
    source, rng, level = dataset.Scenes(), np.random.default_rng([seed, skewed]), LEVELS["easy"]
    scenes, texts, i = [], {}, seed * 1_000_000
    while len(texts) < n:
        s, i = source.scene(i), i + 1
        keep = 1 / (1 + level.backgrounds.index(s.background))
        for o in s.objects:
            keep /= (1 + level.shapes.index(o.shape)) * (1 + level.colours.index(o.colour))
        if rng.random() < (keep if skewed else 1) and (said := caption(s, rng_for(seed, i, 3))) not in texts:
            texts[said] = None
            scenes.append(s)
    return scenes, list(texts)


def as_long(texts: list[str], chosen: np.ndarray, seed: int) -> np.ndarray:
    """Blindly chosen texts of as many words as the chosen ones: whether it is only their length."""
    rng, words = np.random.default_rng([seed, 2]), np.array([len(t.split()) for t in texts])
    out = []
    for n in words[chosen]:
        like = np.setdiff1d(np.flatnonzero(words == n), out)
        out.append(rng.choice(like if len(like) else np.setdiff1d(np.arange(len(texts)), out)))
    return np.sort(out)


def main(cfg: Config) -> None:
    started, rows = time.time(), []
    torch.set_num_threads(1)
    pipe = pipeline.open_editor(cfg.ckpt, torch.device("cpu"), ("draw",))
    for seed in range(cfg.seeds):
        for skewed in (False, True):
            scenes, texts = draw_pool(cfg.pool, skewed, seed)
            every = set().union(*map(facts, scenes))
            spaces = {"words": make_prefs.features_of(texts, None),
                      "encoder": make_prefs.features_of(texts, pipe)}
            for space, x in spaces.items():
                chosen = {how: prompts.select(x, cfg.n, how, cfg.clusters, 150 if how == "votek" else
                                              cfg.neighbours, seed) for how in prompts.SELECT}
                chosen["as long"] = as_long(texts, chosen["knn"], seed)
                for how, these in chosen.items():
                    met = set().union(*(facts(scenes[i]) for i in these))
                    rows.append({"seed": seed, "pool": "skewed" if skewed else "even", "features": space,
                                 "select": how, "facts": len(met) / len(every), "of": len(every),
                                 "distance": prompts.coverage(x, these),
                                 "words": float(np.mean([len(texts[i].split()) for i in these]))})
    print(f"share of the pool's facts in {cfg.n} of {cfg.pool:,} texts, mean [least, most] of {cfg.seeds} "
          "seeds; distance of a text from the nearest chosen one; words of a chosen text")
    for pool in ("even", "skewed"):
        for space in ("words", "encoder"):
            for how in (*prompts.SELECT, "as long"):
                these = [r for r in rows if (r["pool"], r["features"], r["select"]) == (pool, space, how)]
                f, far, words = ([r[key] for r in these] for key in ("facts", "distance", "words"))
                print(f"{pool:<8}{space:<9}{how:<8}{np.mean(f):.3f} [{min(f):.3f}, {max(f):.3f}]  "
                      f"{np.mean(far):.3f}  {np.mean(words):.1f}")
    out = open_out(cfg.out)
    write_json(Path(out) / "results.json", {**provenance(started), "config": asdict(cfg), "rows": rows})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, config=(tyro.conf.FlagConversionOff,)))
