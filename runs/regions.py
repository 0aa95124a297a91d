"""UltraEdit's region edits, piece by piece (claim C9): hard or soft mask, and three ways to blend.

    python runs/regions.py --out out/regions

The same requests of held-out scenes, the same noise, for each of six settings and three seeds; what was drawn
is judged as it is, nothing is pasted back. Controls: the source as it was, and the truth. What the rim
and the blend add is told as differences, request by request (runs/table.py).
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
import make_edits  # noqa: E402
from factory import score, shards  # noqa: E402
from log import open_out, provenance, write_json  # noqa: E402
from readers.edits import TASK_NAMES  # noqa: E402
from runs.table import estimate  # noqa: E402
from scenes.dataset import EditScenes  # noqa: E402
from scenes.judge import load_parser, to_float  # noqa: E402
from scenes.judge_edits import edit_cases  # noqa: E402
from scenes.judge_holes import seam_error  # noqa: E402

COLUMNS = {"done": "edit done, %", "kept": "other facts kept, %", "outside": "change outside",
           "seam": "seam error", "good": "scores of 9 and more, %"}


@dataclass
class Config:
    out: str = "out/regions"  # shards of every setting, results.json
    ckpt: str = "assets/base"  # draws
    parser: str = "assets/parser"  # judges
    n: int = 60  # requests of each setting and seed, of all tasks
    tasks: str = "swap,remove,background"
    steps: int = 20  # of the sampler
    seeds: int = 3
    guidance: float = 3.0  # of the text


def pictures_of(rows: list[dict], pairs: EditScenes) -> tuple:
    """Rows of scenes -> source, edited, truth [N, 3, H, W] in [-1, 1], hard object masks [N, 1, H, W]."""
    source, edited = (to_float(np.stack([shards.pixels(r[k]) for r in rows]))
                      for k in ("src_img", "edited_img"))
    h, w = source.shape[-2:]
    mask = np.stack([shards.area(r["mask_image"], h, w) for r in rows])
    truth = torch.cat([edit_cases(TASK_NAMES[r["task"]], [json.loads(r["source"])["pair"]], h, w, pairs).truth
                       for r in rows])
    return source, edited, truth, torch.from_numpy(mask == 1).float()[:, None]


def measure(rows: list[dict], verdicts: list, source, edited, truth, mask) -> dict[str, np.ndarray]:
    """One number a row: edit done, share of other facts kept, mean |change| of pixels that the mask keeps in
    [0, 1], seam error at the hard mask's border, whether the overall score is at least 9."""
    keep = torch.from_numpy(np.stack([shards.area(r["mask_image"], *source.shape[-2:]) for r in rows]) == 0)
    keep = keep[:, None].float()
    change = ((edited - source).abs().mean(1, keepdim=True) * keep).sum((1, 2, 3)) / 2 / keep.sum((1, 2, 3))
    known = [v.o_score is not None for v in verdicts]
    nan = float("nan")
    return {"done": np.array([v.sc_score_1 > 5 if k else nan for v, k in zip(verdicts, known)], float),
            "kept": np.array([v.sc_score_2 / 10 if k else nan for v, k in zip(verdicts, known)], float),
            "good": np.array([v.o_score >= 9 if k else nan for v, k in zip(verdicts, known)], float),
            "outside": change.numpy(), "seam": seam_error(edited, truth, mask)}


def controls(rows: list[dict], judge, source, edited, truth, mask) -> dict[str, dict]:
    """The same measures of the source as it was, and of the truth."""
    out = {}
    for name, x in (("source", source), ("truth", truth)):
        again = [r | {"edited_img": shards.picture(np.asarray(p))} for r, p in
                 zip(rows, make_edits.to_uint8(x).numpy())]
        out[name] = measure(again, judge(again), source, x, truth, mask)
    return out


def main(cfg: Config) -> None:
    started, out, found = time.time(), open_out(cfg.out), {}
    judge = score.truth(load_parser(cfg.parser, torch.device("cpu")))
    pairs = EditScenes("heldout")
    for seed in range(cfg.seeds):
        for p_soft in (0.0, 1.0):
            for blend in ("none", "every", "alternate"):
                folder = out / f"{'soft' if p_soft else 'hard'}_{blend}_{seed}"
                make_edits.region(make_edits.Region(
                    str(folder), split="heldout", tasks=cfg.tasks, n=cfg.n, tries=1, ckpt=cfg.ckpt,
                    steps=cfg.steps, guidance=cfg.guidance, blend=blend, p_soft=p_soft, seed=seed,
                    shard=cfg.n), common.Dist())
                rows = shards.read(folder / shards.name_of(0))
                pictures = pictures_of(rows, pairs)
                found.setdefault(f"{'soft' if p_soft else 'hard'} {blend}", []).append(
                    measure(rows, judge(rows), *pictures))
        for name, m in controls(rows, judge, *pictures).items():
            found.setdefault(name, []).append(m)

    print(f"mean over {cfg.seeds} seeds [least, most]; {len(rows)} requests, mask and blend\n"
          + "| setting | " + " | ".join(COLUMNS.values()) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    table = {}
    for name, seeds in found.items():
        table[name] = {k: [float(np.nanmean(m[k])) for m in seeds] for k in COLUMNS}
        cells = [(100 if "%" in told else 1) * np.array(table[name][k]) for k, told in COLUMNS.items()]
        digits = [1 if "%" in told else 4 for told in COLUMNS.values()]
        print(f"| {name} | " + " | ".join(f"{c.mean():.{d}f} [{c.min():.{d}f}, {c.max():.{d}f}]"
                                          for c, d in zip(cells, digits)) + " |", flush=True)
    print("\n| difference, 95 % | " + " | ".join(COLUMNS.values()) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for one, other in (("soft alternate", "hard alternate"), ("hard alternate", "hard none"),
                       ("hard alternate", "hard every")):
        pairs_of = list(zip(found[one], found[other]))
        gaps = {k: estimate([np.stack([a[k] - b[k] for a, b in pairs_of])], True) for k in COLUMNS}
        table[f"{one} - {other}"] = gaps
        cells = [f"{100 * mean:+.1f} ± {100 * half:.1f}" if "%" in told else f"{mean:+.4f} ± {half:.4f}"
                 for (mean, half), told in zip(gaps.values(), COLUMNS.values())]
        print(f"| {one} - {other} | {' | '.join(cells)} |")
    write_json(out / "results.json", {**provenance(started), "config": asdict(cfg), "table": table})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, config=(tyro.conf.FlagConversionOff,)))
