"""Seeds of one name as one row, and how names differ: python runs/table.py OUT METRIC [METRIC ...]

Reads scores.npz of `evaluate.py edits` or `scenes --out OUT`, for checkpoints NAME0, NAME1, ... of k seeds,
and prints markdown tables: the mean, and each NAME minus the first, seed by seed and scene by scene. After ±:
half a 95 % interval, 1.96 sqrt(e^2 + s^2 / k), with e the error over scenes of the seeds' mean and s the
spread of the seeds. Rates are percent.
"""

import math
import re
import sys
import zipfile
from pathlib import Path

import numpy as np

RATES = ("edit", "kept", "kept_share", "success", "attributes")


def cell(tasks: list[np.ndarray], percent: bool) -> str:
    """Values [k, N] of k seeds and N scenes (not-a-number: not asked of it), for each task -> "mean ± half
    width" of the mean over tasks."""
    tasks = [t[:, ~np.isnan(t[0])] for t in tasks]
    tasks = [t for t in tasks if t.shape[1] > 1]  # nothing to over-edit in a whole picture
    if not tasks:
        return "-"
    k, means = len(tasks[0]), np.mean([t.mean(1) for t in tasks], 0)
    scene = sum(t.mean(0).var(ddof=1) / t.shape[1] for t in tasks) / len(tasks) ** 2
    seed = means.var(ddof=1) / k if k > 1 else 0.0
    scale, digits = (100, 0) if percent else (1, 4)
    return f"{scale * means.mean():.{digits}f} ± {scale * 1.96 * math.sqrt(scene + seed):.{digits}f}"


def main(out: str, metrics: list[str]) -> None:
    path = Path(out) / "scores.npz"
    try:
        found = dict(np.load(path))
        names = found.pop("names").tolist()
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        raise SystemExit(f"error: {path}: missing or damaged: name a folder that `evaluate.py edits` or "
                         "`scenes` wrote") from None
    groups = {}  # NAME -> rows
    for i, name in enumerate(names):
        groups.setdefault(re.sub(r"\d*(@\d+)?$", "", name.split("/")[-1]), []).append(i)
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
            shown += [(f"{group} - {first}", at, of_first) for group, at in others
                      if len(at) == len(of_first)]
            for title, at, less in shown:
                row = [cell([r[at] - (r[less] if less else 0) for r in rows], metric in RATES)
                       for rows in columns.values()]
                print(f"| {title} | {' | '.join(row)} |")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit("usage: python runs/table.py OUT METRIC [METRIC ...]")
    main(sys.argv[1], sys.argv[2:])
