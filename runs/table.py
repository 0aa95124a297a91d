"""Seeds of one name as one row, and how names differ: python runs/table.py OUT METRIC [METRIC ...]

Reads scores.npz of `evaluate.py edits` or `scenes --out OUT`, for checkpoints NAME0, NAME1, ... of k seeds,
and prints markdown tables: the mean, and each NAME minus the first, seed by seed and scene by scene (of two
numbers of seeds where one is 1). After ±: half a 95 % interval, t sqrt(e^2 + s^2 / k), with e the error over
scenes of the seeds' mean, s the spread of the seeds, and Student's t for Satterthwaite's degrees of freedom.
Rates are percent.
"""

import math
import re
import sys
import zipfile
from pathlib import Path

import numpy as np

RATES = ("edit", "kept", "kept_share", "success", "attributes")


def cell(tasks: list[np.ndarray], percent: bool, shared: bool) -> str:
    """`estimate` as "mean ± half width", rates in percent."""
    mean, half = estimate(tasks, shared)
    scale, digits = (100, 0) if percent else (1, 4)
    return "-" if math.isnan(mean) else f"{scale * mean:.{digits}f} ± {scale * half:.{digits}f}"


def estimate(tasks: list[np.ndarray], shared: bool) -> tuple[float, float]:
    """Values [k, N] of k seeds and N scenes (not-a-number: not asked of it), for each task -> the mean over
    tasks and half the width of its 95 % interval. shared: all tasks are asked of the same scenes.

    What neither seed nor scene explains is both in e^2 and in s^2 / k, so the interval is too wide where that
    is most of the spread. The degrees of freedom are the seeds' alone: scenes are many."""
    tasks = [t for t in tasks if (~np.isnan(t[0])).sum() > 1]  # nothing to over-edit in a whole picture
    if not tasks:
        return math.nan, math.nan
    k, means = len(tasks[0]), np.mean([np.nanmean(t, 1) for t in tasks], 0)
    # what each scene adds to the deviation of the mean; over the scenes of a task it sums to 0
    asked = [(~np.isnan(t[0])).sum() for t in tasks]
    parts = [np.nan_to_num(t.mean(0) - np.nanmean(t)) / math.sqrt(n * (n - 1)) / len(tasks)
             for t, n in zip(tasks, asked)]
    scene = float((np.sum(parts, 0) ** 2).sum() if shared else sum((p**2).sum() for p in parts))
    seed = float(means.var(ddof=1)) / k if k > 1 else 0.0
    wide = quantile((k - 1) * ((scene + seed) / seed) ** 2) if seed else 1.96
    return float(means.mean()), wide * math.sqrt(scene + seed)


def quantile(freedom: float) -> float:
    """97.5 % of Student's t (Cornish-Fisher; 3 % too small at 2 degrees of freedom, a quarter at 1)."""
    z, v = 1.959964, freedom
    return (z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3))


NAME = re.compile(r"(\w+:)?(.*/)?((?!step_)[^/]*?)(\d*)(/step_\d+)?(@\d+)?(?: \(\d+\))?$")


def group_of(name: str) -> str:
    """METHOD:OUT/NAME0/step_00000700@20 -> METHOD:NAME/step_00000700@20: without folder and seed."""
    method, _, stem, _, step, at = NAME.match(name).groups(default="")
    return method + stem + step + at


def groups_of(names: list[str]) -> dict[str, list[int]]:
    """NAME@STEPS -> the places of its seeds. Seeds are of one folder and method; where two folders have the
    same name, the folders stand before it."""
    found = {}
    for i, name in enumerate(names):
        method, folder, stem, _, step, at = NAME.match(name).groups(default="")
        found.setdefault(method + folder + stem + step + at, []).append(i)
    short = [group_of(names[at[0]]) for at in found.values()]
    return {s if short.count(s) == 1 else full: at for s, (full, at) in zip(short, found.items())}


def main(out: str, metrics: list[str]) -> None:
    path = Path(out) / "scores.npz"
    try:
        found = dict(np.load(path))
        names = found.pop("names").tolist()
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        raise SystemExit(f"error: {path}: missing or damaged: name a folder that `evaluate.py edits` or "
                         "`scenes` wrote") from None
    groups = groups_of(names)
    (first, of_first), *others = groups.items()
    keys = [key.rsplit("/", 1) for key in found]
    for metric in metrics:
        tasks = [task for task, m in keys if m == metric]
        if not tasks:
            raise SystemExit(f"error: {path}: no metric {metric!r}: use one of "
                             f"{', '.join(dict.fromkeys(m for _, m in keys))}")
        for aspect in dict.fromkeys(t.rpartition("/")[0] for t in tasks):
            own = [t for t in tasks if t.rpartition("/")[0] == aspect]
            columns = {t.split("/")[-1]: [found[f"{t}/{metric}"]] for t in own}
            columns["mean"] = [rows for (rows,) in columns.values()]
            print(f"\n{f'{metric} {aspect}'.strip()}\n")
            print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
            shown = [(group, at, None) for group, at in groups.items()]
            for group, at in others:  # one alone, such as the base, is compared with every seed
                k = max(len(at), len(of_first))
                if {len(at), len(of_first)} <= {1, k}:
                    shown.append((f"{group} - {first}", at * (k // len(at)), of_first * (k // len(of_first))))
            for title, at, less in shown:
                row = [cell([r[at] - (r[less] if less else 0) for r in rows], metric in RATES, not aspect)
                       for rows in columns.values()]
                print(f"| {title} | {' | '.join(row)} |")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit("usage: python runs/table.py OUT METRIC [METRIC ...]")
    main(sys.argv[1], sys.argv[2:])
