"""Seeds of one name as one row: python runs/table.py RESULTS.json METRIC [METRIC ...]

Reads what `evaluate.py scenes` or `edits` wrote for checkpoints named NAME0, NAME1, ... and prints a markdown
table for each metric: the mean of k seeds and half its 95 % interval, 1.96 sqrt(sum se_i^2 / k^2 + s^2 / k),
with se_i the bootstrap's error over scenes of seed i, and s the spread of the seeds. Rates are percent.
"""

import json
import re
import statistics
import sys
from collections import defaultdict

RATES = ("edit", "kept", "kept_share", "success", "attributes")


def cell(seeds: list[dict], percent: bool) -> str:
    """[{mean, low, high}] of the seeds -> "mean ± half width"."""
    k, means = len(seeds), [s["mean"] for s in seeds]
    within = sum(((s["high"] - s["low"]) / 3.92) ** 2 for s in seeds) / k**2
    between = statistics.variance(means) / k if k > 1 else 0.0
    scale, digits = (100, 0) if percent else (1, 4 if max(means) < 1 else 1)
    half = 1.96 * (within + between) ** 0.5
    return f"{scale * statistics.mean(means):.{digits}f} ± {scale * half:.{digits}f}"


def main(path: str, metrics: list[str]) -> None:
    with open(path) as f:
        aspects = json.load(f)["aspects"]
    for aspect, found in aspects.items():
        tasks = found["tasks"]
        for metric in metrics:
            groups = defaultdict(lambda: defaultdict(list))
            for task, rows in tasks.items():
                for name, row in rows.items():
                    if row.get(metric, {}).get("mean") is not None:  # nothing to over-edit in a whole picture
                        groups[re.sub(r"\d*(@\d+)?$", "", name.split("/")[-1])][task].append(row[metric])
            shown = [t for t in tasks if any(t in cells for cells in groups.values())]
            if not shown:
                known = sorted({m for rows in tasks.values() for row in rows.values() for m in row})
                raise SystemExit(f"error: {path}: no metric {metric!r}: use one of {', '.join(known)}")
            print(f"\n{metric}, {aspect}:\n\n| | {' | '.join(shown)} |\n|---|{'---|' * len(shown)}")
            for group, cells in groups.items():
                row = [cell(cells[t], metric in RATES) if cells[t] else "-" for t in shown]
                print(f"| {group} | {' | '.join(row)} |")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit("usage: python runs/table.py RESULTS.json METRIC [METRIC ...]")
    main(sys.argv[1], sys.argv[2:])
