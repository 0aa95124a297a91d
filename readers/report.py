"""A run to look at: one HTML file with curves, alarms, pictures, worst cases and tables, without W&B.

    report(Report(runs=(Path("out/pefl"), Path("out/judge")), out=Path("report.html")))

What it finds in the folders, and a few levels below them: metrics.jsonl, starts.jsonl, the newest manifest
and images/ of a training script; results.json, scores.npz and sheet.png of evaluate.py, and pictures that it
saved. The page (report.html is its template) fetches nothing. Nothing in the files is trusted: numbers and
texts reach the page as JSON, texts are shown by textContent, pictures are encoded anew.

    1. Config     2. Curves     3. Alarms     4. Runs     5. Tables     6. Pictures     7. The page
"""

import base64
import datetime
import hashlib
import io
import json
import math
import os
import re
import stat
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, features

import common
from checkpoint import parse_json, read_bounded
from readers.files import BadFile, printable, read_image, too_many

MOST_JSON, MOST_METRICS, MOST_SCORES = 2**26, 2**30, 2**28  # bytes that are read of one file
DEEP, MOST_FOLDERS = 3, 2000  # how far below a given folder runs are looked for
MOST_SHEETS = 24  # of a run's sheets: the first, the last, and some between
TINY = 96  # pixels a side up to which a picture is kept without loss
SHEET = 1000, 16_000  # width, height at most of a sheet that cannot be cut apart


#### 1. config ###############################################################################################
@dataclass
class Report:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # folders of train scripts and of evaluate.py, or above them
    out: Path = Path("report.html")  # the page; overwritten
    smooth: float = 0.0  # smoothing of the curves that the page begins with, 0 to 0.99
    max_mb: float = 5.0  # of the page, in 10^6 bytes: pictures beyond it are left out
    points: int = 400  # of a curve: longer ones become means, between minimum and maximum
    side: int = 384  # longest side of a picture in the page
    worst: int = 4  # worst cases of each task and editor


def check(cfg: Report) -> None:
    common.check_bounds(cfg, at_least_1=("points", "side"), above_0=("max_mb",), not_negative=("worst",),
                        below_1=("smooth",))
    if cfg.points > 10_000:
        common.refuse(cfg, "points", "a screen shows 10,000 at most")
    out, shown = Path(cfg.out), printable(str(cfg.out))[:200]
    if out.suffix.lower() not in (".html", ".htm") or "\0" in str(out):  # not over a run's metrics.jsonl
        raise SystemExit(f"error: --out: {shown}: is no name of a page: end it in .html")
    if out.is_dir():
        raise SystemExit(f"error: --out: {shown}: is a folder: name a file, such as {shown}/report.html")
    if not cfg.runs:
        raise SystemExit("error: report: no RUN: name at least one folder, such as out/pefl")


#### 2. curves ###############################################################################################
def read_metrics(path):
    """metrics.jsonl -> {"series": {key: (steps, values)}, "events": [(step, key, text)], "resumes": [step],
    "times": (first, last) in seconds, "rows", "notes"}.

    A resumed run does the steps after its checkpoint again: what stood of them before is dropped, as where
    steps go back without a word (a run begun anew in its folder). null is not-a-number. The last line may be
    half: the run is alive, or was killed. Texts under alarm... are alarms that a script gave."""
    rows, bad, torn, repeated, resumes, half = [], [], 0, 0, [], False
    with open(_regular(path, MOST_METRICS), "rb") as f:
        for n, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                step = row.get("resumed_from", row.get("step"))
                if type(step) is not int or not 0 <= step < 2**53:
                    raise ValueError
            except (ValueError, AttributeError, RecursionError):
                if not line.endswith(b"\n"):
                    half = True
                    continue
                bad, torn = [*bad, n], n
                if too_many(len(bad), n):
                    raise BadFile(f"{path} line {n}", f"no row of metrics, as {len(bad)} lines up to it",
                                  "restore the file that the run wrote") from None
                continue
            resumed = "resumed_from" in row
            if resumed and bad and torn == n - 1:  # log.Metrics ends a torn row when the run goes on
                bad.pop()
            while rows and rows[-1][0] > step:
                rows.pop()
                repeated += 1
            if resumed:
                resumes.append(step)
            else:
                rows.append((step, row))
    series, events, shown = {}, [], {}
    for step, row in rows:
        for key, value in row.items():
            if key in ("step", "time"):
                continue
            if isinstance(value, str) and key.startswith("alarm"):
                events.append((step, _text(key), _text(value)))
            if value is not None and type(value) not in (int, float):
                continue
            if key not in shown:
                shown[key] = _text(key)
            steps, values = series.setdefault(shown[key], ([], []))
            if steps and steps[-1] == step:
                steps.pop(), values.pop()
            steps.append(step)
            values.append(_number(value))
    notes = [f"{len(bad)} lines of metrics.jsonl could not be read and are left out: line "
             + ", ".join(map(str, bad[:10])) + ", ..." * (len(bad) > 10)] if bad else []
    notes += [f"{repeated:,} rows were done again after a resume: the later ones are shown"] * bool(repeated)
    notes += ["the last line of metrics.jsonl is half: the run goes on, or was killed"] if half else []
    notes += ["metrics.jsonl has no rows yet"] if not rows else []
    times = [t for _, row in rows if 0 < (t := _number(row.get("time"))) < 1e11]
    return {"series": {k: (np.array(s, np.int64), np.array(v)) for k, (s, v) in series.items()},
            "events": events, "resumes": resumes, "times": times[:1] + times[-1:], "rows": len(rows),
            "last": rows[-1][0] if rows else None, "notes": notes}


def _number(value):
    """A float that JSON can hold, or not-a-number."""
    try:
        value = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        value = math.nan
    return value if math.isfinite(value) and abs(value) < 1e300 else math.nan


def thin(steps, values, buckets):
    """A curve, of more than 2 * `buckets` points, as means of equal stretches of steps with their smallest
    and largest values, so that a spike of one step stays -> steps, means, low, high (the last two None if
    whole)."""
    if len(steps) <= 2 * buckets:
        return steps, values, None, None
    span = max(int(steps[-1] - steps[0]), 1)
    which = np.minimum((steps - steps[0]) * buckets // span, buckets - 1)
    starts = np.flatnonzero(np.diff(which, prepend=-1))
    known = np.isfinite(values)
    n = np.add.reduceat(known.astype(np.int64), starts)
    total = np.add.reduceat(np.where(known, values, 0.0), starts)
    mean = np.where(n > 0, total / np.maximum(n, 1), math.nan)
    x = np.add.reduceat(steps.astype(np.float64), starts) / np.diff(np.append(starts, len(steps)))
    return x.astype(np.int64), mean, np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)


def curve(run, steps, values, buckets, label="", dash=0):
    """What the page draws: x, y, perhaps lo and hi; `bad`, steps whose value is not finite."""
    bad = steps[~np.isfinite(values)]
    x, y, lo, hi = thin(steps, values, buckets)
    out = {"run": run, "label": label, "dash": dash, "x": x.tolist(), "y": _short(y)}
    if lo is not None:
        out |= {"lo": _short(lo), "hi": _short(hi)}
    if len(bad):
        out |= {"bad": bad[:: -(-len(bad) // 100)].tolist(), "bads": len(bad)}
    return out


def _short(values):
    return [float(f"{v:.5g}") if math.isfinite(v) else None for v in values.tolist()]


# what is looked at first; other prefixes follow by name
GROUPS = {"reward": "Rewards, in training", "judge": "Rewards of held-out pictures, base and tuned",
          "alarm": "Alarms: what reward hacking moves", "coherence": "Coherence model (the discriminator)",
          "loss": "Losses", "val": "Held-out", "train": "Training", "grad_norm": "Gradient norms",
          "perf": "Throughput", "data": "Data", "": "Schedule"}


def panels_of(runs, buckets):
    """Curves of all runs -> [{"group", "title", "charts": [{"key", "curves"}]}]: a chart for a key, those of
    judge/NAME_base and judge/NAME_tuned on one."""
    charts = {}
    for r, run in enumerate(runs):
        for key, (steps, values) in run["series"].items():
            prefix, _, name = key.rpartition("/") if "/" in key else ("", "", key)
            label = next((w for w in ("base", "tuned") if prefix == "judge" and name.endswith(f"_{w}")), "")
            key = key.removesuffix(f"_{label}") if label else key
            group = prefix.split("/")[0]
            found = charts.setdefault(group, {}).setdefault(key, [])
            found.append(curve(r, steps, values, buckets, label, int(label == "base")))
    order = [*GROUPS, *sorted(charts.keys() - GROUPS.keys())]
    return [{"group": g, "title": GROUPS.get(g, g),
             "charts": [{"key": k, "curves": c} for k, c in charts[g].items()]} for g in order if g in charts]


#### 3. alarms ###############################################################################################
DRIFT, RISE, WON, STARVED = 1.5, 1.5, 0.99, 0.1


def alarms_of(series, events=()):
    """Where a run's curves enter what README.md, Watching a run, calls an alarm -> [(step, key, text)]. The
    thresholds are ours.

    Picture statistics that are half as far again from those of real pictures as at the start; change outside
    the mask above 1.5 times that at the start; drift that grows more than three times as fast as ever before;
    a discriminator that is right in 99 %; a held-out reward below the base's twice running while a trained
    one is above; waiting for data in 10 % of the time; numbers that are not finite."""
    out = list(events)

    def enter(key, fired, say):
        steps, values = series[key]
        for i in np.flatnonzero(fired & ~np.append(False, fired[:-1])).tolist():
            out.append((int(steps[i]), key, say(values[i])))

    for key, (steps, v) in series.items():
        known = v[np.isfinite(v)]
        prefix, _, name = key.rpartition("/")
        if prefix in ("loss", "reward", "grad_norm", "judge", "alarm"):
            enter(key, ~np.isfinite(v), lambda v: f"{key} is not finite")
        if not len(known):
            continue
        if prefix == "alarm" and name in ("saturation", "contrast", "laplacian", "clipped"):
            far = np.abs(np.log(np.clip(np.nan_to_num(v, nan=1.0), 1e-6, 1e6)))
            first = abs(math.log(min(max(known[0], 1e-6), 1e6)))
            enter(key, far > first + math.log(DRIFT), lambda v: f"{name} {v:.3g} times that of real pictures,"
                  f" {known[0]:.3g} at first: colours or grain are being hacked")
        elif key == "alarm/change_outside_mask":
            enter(key, np.nan_to_num(v) > RISE * known[0] + 0.005, lambda v: f"{v:.3g} changed outside the "
                  f"mask, {known[0]:.3g} at first: raise --eta")
        elif key in ("alarm/velocity_drift", "alarm/weight_drift"):
            rise = np.diff(v, prepend=0.0) / np.maximum(np.diff(steps, prepend=0), 1)  # in a step
            most = np.fmax.accumulate(np.append(0.0, rise[:-1]))
            fired = (rise > 3 * most) & (np.arange(len(v)) >= 3)
            enter(key, fired, lambda v: f"{name} grew to {v:.3g} all at once: lower --lr")
        elif key == "coherence/accuracy":
            enter(key, np.nan_to_num(v) > WON, lambda v: f"the discriminator is right in {v:.1%}: it has won,"
                  " lower --disc_lr")
        elif key == "perf/data_wait":
            fired = (np.nan_to_num(v) > STARVED) & (np.arange(len(v)) > 0)  # at first the workers start
            enter(key, fired, lambda v: f"{v:.0%} of the time went by waiting for batches: more --workers, "
                  "or make_pack.py")
    if "judge/heldout_tuned" in series:
        steps = series["judge/heldout_tuned"][0]

        def gain(name):
            """What the tuned editor has over the base, at each step."""
            pairs = (series.get(f"judge/{name}_{who}", (steps[:0],) * 2) for who in ("tuned", "base"))
            tuned, base = (dict(zip(x.tolist(), y.tolist())) for x, y in pairs)
            return np.array([tuned.get(s, math.nan) - base.get(s, math.nan) for s in steps.tolist()])

        below, risen = gain("heldout") < 0, (gain("aesthetic") > 0) | (gain("alignment") > 0)
        enter("judge/heldout_tuned", below & risen & np.append(False, below[:-1]), lambda v: "the held-out "
              f"reward fell to {v:.3g}, below the base's, while a trained one rose: it is being hacked")
    return sorted(out, key=lambda a: a[0])


#### 4. runs #################################################################################################
def find_folders(given):
    """Folders below those given that hold something of ours: {folder: [names of files]}, in order."""
    found, known, seen = {}, set(), 0
    for root in given:
        shown = printable(str(root))[:200]
        if "\0" in str(root) or not os.path.lexists(root):
            raise SystemExit(f"error: RUN: {shown}: no such folder: name one that a script wrote, such as "
                             "out/pefl")
        if not os.path.isdir(root):
            raise SystemExit(f"error: RUN: {shown}: is no folder: name the folder that it is in")
        empty = True
        for at, folders, files in os.walk(root, onerror=_unreadable):
            seen += 1
            depth = len(Path(at).relative_to(root).parts)
            if seen > MOST_FOLDERS:
                raise SystemExit(f"error: RUN: {shown}: more than {MOST_FOLDERS:,} folders: name the runs "
                                 "themselves")
            folders[:] = sorted(d for d in folders if depth < DEEP and d not in ("wandb", "images", "page")
                                and not d.startswith((".", "step_", "seed_")))
            ours = {"metrics.jsonl", "results.json", "judge.json"}.intersection(files)
            if ours and os.path.realpath(at) not in known:  # named twice, or above another that was named
                found[Path(at)] = ours
                known.add(os.path.realpath(at))
            empty = empty and not ours
        if empty:
            raise SystemExit(f"error: RUN: {shown}: holds neither metrics.jsonl of a training script nor "
                             "results.json of evaluate.py: name a folder that one of them wrote")
    return found


def _unreadable(e):
    raise SystemExit(f"error: RUN: {printable(str(e.filename))[:200]}: {e.strerror}: correct its permissions")


def _regular(path, most):
    """`path`, if it is a regular file of at most so many bytes; BadFile else."""
    try:
        about = os.stat(path)
    except OSError as e:
        raise BadFile(path, e.strerror or "cannot be read", "correct its permissions") from None
    if not stat.S_ISREG(about.st_mode):
        raise BadFile(path, "is no regular file", "restore the file that the run wrote")
    if about.st_size > most:
        raise BadFile(path, f"{about.st_size:,} bytes are more than {most:,}", "cut it")
    return path


def read_json(path):
    """A table of a JSON file; BadFile if it is none."""
    try:
        found = parse_json(read_bounded(path, MOST_JSON))
        if isinstance(found, dict):
            return found
        problem = "is no table"
    except OSError as e:
        problem = f"cannot be read ({e.strerror})"
    except (ValueError, RecursionError):
        problem = "is damaged"
    raise BadFile(path, problem, "restore it, or write it again")


def said(e, folder):
    """A BadFile in words, without where the folder is."""
    return str(e).removeprefix("error: ").replace(f"{printable(str(folder))}/", "")


def short_names(paths):
    """As few of the last parts of each path as tell them apart: the rest is nobody's business."""
    parts = [Path(os.path.abspath(p)).parts for p in paths]
    out = []
    for mine in parts:
        n = next((n for n in range(1, len(mine)) if [p[-n:] for p in parts].count(mine[-n:]) == 1), len(mine))
        out.append(_text(os.path.join(*mine[-n:]), 120))
    return out


def _text(value, most=500):
    """Anything as text that can be shown, cut."""
    try:
        text = printable(value if isinstance(value, str) else json.dumps(value, default=str))
    except RecursionError:
        text = "nested too deeply"
    return text if len(text) <= most else text[:most] + " ..."


def read_run(folder):
    """A training script's folder -> what the page says of it, with the whole curves under "series"."""
    run, notes = read_metrics(folder / "metrics.jsonl"), []
    about, starts, config = {}, [], {}
    if (folder / "starts.jsonl").is_file():
        with open(_regular(folder / "starts.jsonl", MOST_JSON), "rb") as f:
            for line in f:
                try:
                    row = json.loads(line)
                    starts += [row] if isinstance(row, dict) else []
                except (ValueError, RecursionError):
                    notes.append("a line of starts.jsonl could not be read")
    if starts:
        about = {k: v for k, v in starts[-1].items() if k != "config"}
        config = starts[-1].get("config")
        if len({(_text(s.get("commit")), _text(s.get("machine"))) for s in starts}) > 1:
            notes.append(f"started {len(starts)} times, not always with one commit on one machine")
    steps = [int(m[1]) for p in folder.glob("step_*") if (m := re.fullmatch(r"step_(\d{1,15})", p.name))]
    if steps:
        try:
            m = read_json(folder / f"step_{max(steps):08d}" / "manifest.json")
            config = config or m.get("config")
            about = {"commit": m.get("git"), "torch": m.get("torch"), "date": m.get("time"),
                     "ranks": m.get("world")} | about
            about |= {"precision": m.get("precision"), "samples": m.get("samples"), "checkpoint": max(steps)}
        except BadFile as e:
            notes.append(said(e, folder))
    shown = ("command", "commit", "machine", "ranks", "torch", "date", "precision", "samples", "checkpoint")
    about = {k: _text(about[k]) for k in shown if about.get(k) is not None}
    config = config if isinstance(config, dict) else {}
    when = [datetime.datetime.fromtimestamp(t, datetime.timezone.utc).isoformat(" ", "minutes")
            for t in run.pop("times")]
    about |= dict(zip(("first row", "last row"), when))
    about |= {f"start {i}": ", ".join(_text(s.get(k), 80) for k in ("date", "commit", "machine"))
              for i, s in list(enumerate(starts, 1))[:-1][-10:]}  # before the last
    run |= {"folder": folder, "about": about, "notes": run["notes"] + notes,
            "config": {_text(k, 80): _text(v) for k, v in list(config.items())[:200]}}
    found = alarms_of(run["series"], run.pop("events"))
    return run | {"alarms": found[:200], "more_alarms": max(0, len(found) - 200)}


#### 5. tables ###############################################################################################
# evaluate.py prints these in percent; a test holds both lists equal
SHARE = ("drawn", "named", "success", "edit", "kept", "kept_share", "shape", "colour", "material",
         "objects", "background", "environment", "style", "empty", "attributes", "judged", "truth_read",
         "source_read", "kept_asked")
HIGHER = SHARE[:15]  # is better; of the others this is not said
LOWER = ("exact", "over", "error", "hole", "seam", "texture", "textures", "frechet", "frechet_hole")
BOUNDS = ("truth", "source", "another's picture")  # columns that are no editor's


def _leaf(x):
    return isinstance(x, dict) and {"mean", "low", "high"} <= x.keys()


def _cell(x):
    return _short(np.array([_number(x.get(k)) for k in ("mean", "low", "high")]))


def tables_of(node, path=(), depth=0):
    """Tables anywhere in a results.json: {"title", "columns", "rows": [[metric, percent, better, [mean, low,
    high] or None by column]]}, and those of good / same / bad {"title", "gsb": [[criterion, good, same,
    bad, superiority, [net, low, high], p]]}."""
    if not isinstance(node, dict) or depth > 8:
        return []
    title, out = " / ".join(_text(p, 80) for p in path), []
    gsb = node.get("gsb")
    if isinstance(gsb, dict):
        rows = [[_text(k, 80), *(_number(v.get(x)) for x in ("good", "same", "bad", "superiority")),
                 _cell(v["net"]), _number(v.get("p"))]
                for k, v in gsb.items() if isinstance(v, dict) and _leaf(v.get("net"))]
        out.append({"title": title, "gsb": _nulls(rows)})
        node = {k: v for k, v in node.items() if k != "gsb"}
    columns = {k: v for k, v in node.items() if isinstance(v, dict) and any(map(_leaf, v.values()))}
    if columns:
        metrics = list(dict.fromkeys(m for v in columns.values() for m, x in v.items() if _leaf(x)))
        rows = [[_text(m, 80), m in SHARE, int(m in HIGHER) - int(m in LOWER),
                 [_cell(v[m]) if _leaf(v.get(m)) else None for v in columns.values()]] for m in metrics]
        heads = ["A - B" if k == "difference" else _text(k, 120) for k in columns]
        out.append({"title": title, "columns": heads, "rows": rows,
                    "bounds": [k in BOUNDS or k.endswith(", blurred") for k in columns]})
    for k, v in node.items():
        if k not in columns and k != "config":
            out += tables_of(v, (*path, k) if k not in ("tasks", "aspects") else path, depth + 1)
    return out


def _nulls(value):
    if isinstance(value, list):
        return [_nulls(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def read_judge(folder, name, n):
    """A folder of evaluate.py -> what the page says of it, with the n worst cases of each task and editor."""
    found, notes, worst = read_json(folder / "results.json"), [], []
    tables = tables_of({k: v for k, v in found.items() if k != "config"})
    if not tables:
        notes.append("results.json holds no table with intervals")
    shown = ("command", "commit", "machine", "torch", "date", "seconds", "a", "b")
    about = {k: _text(found[k]) for k in shown if found.get(k) is not None}
    config = found.get("config") if isinstance(found.get("config"), dict) else {}
    offset = config.get("offset") if type(config.get("offset")) is int else 0
    if (folder / "scores.npz").is_file() and n:
        try:
            worst = worst_cases(*read_scores(folder / "scores.npz"), name, offset, n)
        except BadFile as e:
            notes.append(said(e, folder))
    return {"folder": folder, "name": name, "about": about, "tables": tables[:200], "notes": notes,
            "worst": worst, "config": {_text(k, 80): _text(v) for k, v in list(config.items())[:200]}}


def read_scores(path):
    """scores.npz of evaluate.py -> names, {key: {metric: [editors, scenes]}}. BadFile for any other file."""
    try:
        with zipfile.ZipFile(_regular(path, MOST_SCORES)) as z:
            if sum(i.file_size for i in z.infolist()) > MOST_SCORES:
                raise ValueError
        with np.load(path, allow_pickle=False) as z:
            names = [_text(str(n), 120) for n in z["names"].tolist()]
            out = {}
            for k in z.files:
                v = z[k]
                if k != "names" and "/" in k:
                    if v.ndim != 2 or len(v) != len(names) or v.dtype.kind != "f":
                        raise ValueError
                    key, _, metric = k.rpartition("/")
                    out.setdefault(_text(key, 80), {})[_text(metric, 80)] = v.astype(np.float64)
        return names, out
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        raise BadFile(path, "is damaged", "judge again") from None


def worst_of(metrics, n):
    """{metric: [scenes]} of one editor -> the n worst scenes: what was asked for was least done, and among
    these the largest error, as evaluate.py's `compare` ranks them."""
    size = len(next(iter(metrics.values())))
    asked = next((metrics[k] for k in ("success", "attributes") if k in metrics), np.zeros(size))
    errors = [metrics[k] for k in ("error", "texture", "exact", "seam") if k in metrics] or [np.zeros(size)]
    error = errors[0]
    for other in errors[1:]:
        error = np.where(np.isnan(error), other, error)
    order = np.lexsort((-np.nan_to_num(error), np.nan_to_num(asked, nan=np.inf)))
    return order[:n].tolist()


def worst_cases(editors, found, name, offset, n):
    """[{"title", "key", "editor", "rows": [{"scene", "title", "pictures": [], "scores"}]}]: the n worst
    scenes of each task and editor, without pictures yet."""
    out = []
    for key, metrics in found.items():
        for e, editor in enumerate(editors):
            mine = {m: v[e] for m, v in metrics.items()}
            out.append({"title": f"{name}: {key}, {editor}", "key": key, "editor": editor, "rows": [
                {"scene": offset + i, "title": f"scene {offset + i}", "pictures": [],
                 "scores": {m: _short(v[i:i + 1])[0] for m, v in mine.items()}} for i in worst_of(mine, n)]})
    return out


#### 6. pictures #############################################################################################
def encode(picture, most):
    """uint8 [h, w, 3] -> a data: URL, at most `most` = (width, height) in pixels. Tiny ones without loss."""
    im = Image.fromarray(np.ascontiguousarray(picture))
    im.thumbnail(most, Image.Resampling.LANCZOS)
    kind = "webp" if features.check("webp") else "jpeg"
    settings = {"quality": 82}
    if kind == "webp":
        settings = {"quality": 82, "method": 4, "lossless": max(im.size) <= TINY}
    raw = io.BytesIO()
    im.save(raw, kind, **settings)
    return f"data:image/{kind};base64," + base64.b64encode(raw.getvalue()).decode()


class Album:
    """The pictures of the page, each once, up to `room` bytes."""

    def __init__(self, room, side):
        self.room, self.most, self.urls, self.index = room, (side, side), [], {}

    def put(self, pictures, words=0, most=None):
        """Arrays or None -> their numbers (-1 for None), or None, and nothing is kept, if they do not fit.
        words: bytes of what is said of them. most: width and height of a sheet, which is no picture."""
        keys = [p is not None and hashlib.sha256(repr(p.shape).encode() + p.tobytes()).digest()
                for p in pictures]
        new = {k: encode(p, most or self.most) for k, p in zip(keys, pictures) if k and k not in self.index}
        size = words + sum(len(url) + 4 for url in new.values())
        if size > self.room:
            return None
        self.room -= size
        for k, url in new.items():
            self.index[k] = len(self.urls)
            self.urls.append(url)
        return [self.index[k] if k else -1 for k in keys]


def cells_of(path):
    """A contact sheet that log.save_sheet wrote -> titles, row titles, rows of uint8 [h, w, 3] or None, and
    {name: a score per row}. One without a plan, of other versions or scripts, is one picture, "sheet"."""
    sheet = read_image(path)
    try:
        with Image.open(path, formats=("PNG",)) as im:
            plan = parse_json(im.info["cells"])
        scale, rows = plan["scale"], []
        for boxes in plan["boxes"]:
            rows.append([])
            for box in boxes:
                if box is None:
                    rows[-1].append(None)
                    continue
                x, y, w, h = box
                if not all(type(v) is int for v in (*box, scale)) or not (
                        0 <= x and 0 <= y and 0 < w and 0 < h and 1 <= scale <= 128
                        and x + w <= sheet.shape[1] and y + h <= sheet.shape[0]):
                    raise ValueError
                rows[-1].append(sheet[y:y + h:scale, x:x + w:scale])
        titles = [_text(str(t), 200) for t in plan["titles"]]
        titles = [t if titles.index(t) == i else f"{t} ({i + 1})" for i, t in enumerate(titles)]
        names = [_text(str(t), 400) for t in plan["rows"]] + [""] * len(rows)
        scores = {_text(k, 80): [_number(v) for v in values] for k, values in plan["scores"].items()}
        if rows and titles:
            return titles, names[:len(rows)], rows, {k: v for k, v in scores.items() if len(v) == len(rows)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return ["sheet"], [""], [[sheet]], {}


def looked_at(n):
    """0 ... n - 1 in the order in which they are worth their place: the last, the first, the middles."""
    out, gaps = [n - 1, 0][:n], [(0, n - 1)]
    while gaps:
        a, b = gaps.pop(0)
        if b - a > 1:
            out.append((a + b) // 2)
            gaps += [(a, (a + b) // 2), ((a + b) // 2, b)]
    return out


def sheets_in(folder):
    """{key: [(step, path)]} of a run's images/, at most MOST_SHEETS each; how many more there are."""
    found, more = {}, 0
    for path in sorted((folder / "images").glob("step_*.png")):
        if m := re.fullmatch(r"step_(\d{1,15})_(.+)\.png", path.name):
            found.setdefault(m[2], []).append((int(m[1]), path))
    for key, sheets in found.items():
        some = sorted(looked_at(len(sheets))[:MOST_SHEETS])
        more += len(sheets) - len(some)
        found[key] = [sheets[i] for i in some]
    return found, more


def fill(gallery, at, path, album):
    """Put the cells of a sheet into `gallery`, as its number `at`; False if there is no room."""
    titles, names, rows, scores = cells_of(path)
    pictures = [p for row in rows for p in row]
    words = 2 * sum(map(len, names)) + 8 * len(pictures) + 30 * len(scores) * len(rows)
    numbers = album.put(pictures, words, SHEET if titles == ["sheet"] else None)
    if numbers is None:
        return False
    numbers = iter(numbers)
    for title in titles:
        if title not in gallery["columns"]:
            gallery["columns"].append(title)
    columns = [gallery["columns"].index(t) for t in titles]
    for i, (name, row) in enumerate(zip(names, rows)):
        if i == len(gallery["rows"]):
            gallery["rows"].append({"title": name, "cells": {}, "scores": {}})
        mine = gallery["rows"][i]
        for c, number in zip(columns, [next(numbers) for _ in row]):
            mine["cells"].setdefault(c, {})[at] = number
        for k, values in scores.items():
            mine["scores"].setdefault(k, {})[at] = values[i]
    gallery["shown"].append(at)
    return True


def add_pictures(runs, judges, saved, album, cfg):
    """Galleries of the sheets of runs and judges, and pictures for the worst cases -> galleries, worst cases
    of runs, notes of what was left out. What matters most comes first: the newest sheets, then worst cases,
    then the other sheets.

    saved: {editor's name: folder} of pictures that evaluate.py --save kept."""
    galleries, jobs, notes, lost = [], [], [], 0
    for run in runs:
        sheets, more = sheets_in(run["folder"])
        if more:
            notes.append(f"{run['name']}: {more} sheets between the first and the last are left out")
        for key, found in sheets.items():
            galleries.append({"title": f"{run['name']}: {_text(key, 80)}", "columns": [], "rows": [],
                              "steps": [s for s, _ in found], "shown": []})
            jobs += [(n and 2 + n, galleries[-1], at, found[at][1])
                     for n, at in enumerate(looked_at(len(found)))]
    for judge in judges:
        if (judge["folder"] / "sheet.png").is_file():
            galleries.append({"title": f"{judge['name']}: held-out pictures", "columns": [], "rows": [],
                              "steps": [None], "shown": []})
            jobs.append((1, galleries[-1], 0, judge["folder"] / "sheet.png"))
    jobs.sort(key=lambda job: job[0])
    first = sum(job[0] <= 1 for job in jobs)
    for n, (_, gallery, at, path) in enumerate([*jobs, (0, None, 0, None)]):
        if n == first:
            lost += sum(add_saved(judge["worst"], saved, album) for judge in judges)
        try:
            lost += gallery is not None and not fill(gallery, at, path, album)
        except BadFile as e:
            notes.append(f"{gallery['title']}: {said(e, path.parent)}")
    if lost:
        notes.append(f"{lost} sheets or worst cases are left out, or without their pictures: they do not fit "
                     f"into {cfg.max_mb:g} MB (--max_mb)")
    for g in galleries:
        shown = sorted(g.pop("shown"))
        g["steps"] = [g["steps"][i] for i in shown]
        for row in g["rows"]:
            row["cells"] = [[row["cells"].get(c, {}).get(at, -1) for at in shown]
                            for c in range(len(g["columns"]))]
            row["scores"] = {k: _short(np.array([v.get(at, math.nan) for at in shown]))
                             for k, v in row["scores"].items()}
    galleries = [g for g in galleries if g["rows"]]
    return galleries, [group for g in galleries for group in worst_rows(g, cfg.worst)], notes


def add_saved(worst, saved, album):
    """Pictures that --save kept, of all editors, the one in question first -> how many did not fit."""
    lost = 0
    for group in worst:
        order = sorted(saved, key=lambda e: e != group["editor"])
        if group["editor"] not in saved:
            continue
        for row in group["rows"]:
            files = [(e, _saved_file(saved[e], group["key"], row["scene"])) for e in order]
            files = [(e, f) for e, f in files if f]
            try:
                numbers = album.put([read_image(f) for _, f in files], sum(len(e) + 12 for e in order))
            except BadFile:
                numbers = []
            lost += numbers is None
            row["pictures"] = [[e, number] for (e, _), number in zip(files, numbers or [])]
    return lost


def _saved_file(folder, key, scene):
    """FOLDER/KEY/seed_S/SCENE.png of the first seed, or None. Neither keys nor links lead out of FOLDER."""
    if not re.fullmatch(r"[\w-]+(/[\w-]+)?", key):
        return None
    found = sorted((folder / key).glob(f"seed_*/{scene:06d}.png"))
    inside = os.path.realpath(folder) + os.sep
    return next((f for f in found if os.path.realpath(f).startswith(inside)), None)


def worst_rows(gallery, n):
    """Of a run's newest sheet the held-out pictures that the tuned editor's reward likes least: a reward that
    it was not trained on, if there is one."""
    scores = [k for k in (gallery["rows"][0]["scores"] if gallery["rows"] else ()) if k.endswith("_tuned")]
    if not scores or not n:
        return []
    by = "heldout_tuned" if "heldout_tuned" in scores else scores[-1]
    rows = [r for r in gallery["rows"] if r["scores"].get(by) and r["scores"][by][-1] is not None]
    rows = sorted(rows, key=lambda r: r["scores"][by][-1])[:n]
    out = [{"title": r["title"], "scores": {k: v[-1] for k, v in r["scores"].items()},
            "pictures": [[c, cell[-1]] for c, cell in zip(gallery["columns"], r["cells"]) if cell[-1] >= 0]}
           for r in rows]
    return [{"title": f"{gallery['title']}, step {gallery['steps'][-1]}, lowest {by}", "rows": out}]


#### 7. the page #############################################################################################
def report(cfg: Report) -> None:
    """Write the page. What is wrong with an input is one line and no page."""
    check(cfg)
    found = find_folders(cfg.runs)
    names = dict(zip(found, short_names(found)))
    runs = [read_run(f) | {"name": names[f]} for f, files in found.items() if "metrics.jsonl" in files]
    judges = [read_judge(f, names[f], cfg.worst) for f, files in found.items() if "results.json" in files]
    saved = {_text(read_json(f / "judge.json").get("name"), 120): f
             for f, files in found.items() if "judge.json" in files}
    if not runs and not judges:
        raise SystemExit("error: RUN: only pictures that --save kept: name the judge's folder, too")
    for thing in (*runs, *judges):
        for note in thing["notes"]:
            print(f"note: {thing['name']}: {note}", file=sys.stderr)

    page = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(" ", "minutes")
    data = {"made": now, "code": common.git_revision(), "smooth": cfg.smooth, "notes": [],
            "alarms": [{"run": r, "step": step, "key": key, "text": text}
                       for r, run in enumerate(runs) for step, key, text in run["alarms"]],
            "runs": [{k: run[k] for k in ("name", "about", "config", "notes", "rows", "last", "resumes",
                                          "more_alarms")} for run in runs]}
    most, buckets = int(cfg.max_mb * 1e6), cfg.points
    while True:  # curves may have half of the page
        data["panels"] = panels_of(runs, buckets)
        size = len(inline(data["panels"]))
        if size <= most / 2 or buckets <= 25:
            break
        buckets //= 2
    if buckets < cfg.points:
        data["notes"].append(f"curves are drawn from {buckets} stretches instead of {cfg.points}, to fit into"
                             f" {cfg.max_mb:g} MB (--max_mb)")
    album = Album(0, cfg.side)
    data |= {"judges": [{k: j[k] for k in ("name", "about", "config", "tables", "notes")} for j in judges],
             "galleries": [], "worst": [group for j in judges for group in j["worst"]], "pictures": []}
    fixed = len(page.encode()) + len(inline(data)) + 2000  # of notes
    album.room = most - fixed
    if album.room < 0:
        raise SystemExit(f"error: --max_mb: {cfg.max_mb:g}: curves and tables alone are {fixed / 1e6:.2f} MB:"
                         f" give at least {1.1 * fixed / 1e6:.2g}, or fewer runs")
    galleries, worst, notes = add_pictures(runs, judges, saved, album, cfg)
    data |= {"galleries": galleries, "worst": worst + data["worst"], "pictures": album.urls,
             "notes": [*data["notes"], *notes[-10:]]}
    write(cfg.out, page.replace("@DATA@", inline(data)))
    print(f"wrote {cfg.out}: {len(runs)} run(s), {len(judges)} judge(s), {len(data['alarms'])} alarm(s), "
          f"{len(album.urls)} pictures, {os.path.getsize(cfg.out) / 1e6:.2f} MB")
    for note in data["notes"]:
        print(f"note: {note}", file=sys.stderr)


def inline(data):
    """JSON that can stand in a script element: no text can end it."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def write(out, text):
    """Whole or not at all."""
    out = Path(out)
    tmp = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tmp.write_text(text, encoding="utf-8")
        os.replace(tmp, out)
    except OSError as e:
        tmp.unlink(missing_ok=True) if tmp.parent.is_dir() else None
        raise SystemExit(f"error: --out: {printable(str(out))[:200]}: cannot be written ({e.strerror}): give "
                         "another place") from None
