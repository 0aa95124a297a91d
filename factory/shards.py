"""Shards of edit pairs: written whole or not at all, the same bytes whoever makes them.

A stage's folder holds, for each of its shards,

    00000.parquet    rows in COLUMNS: those published as OmniEdit-Filtered-1.2M, then ours
    00000.jsonl      the production log: a line for each thing made, kept or not, with its cause and its ms
    00000.json       rows, bytes, SHA-256, counts; written last: a shard without it is made anew

and plan.json (what was asked for; another command is refused), manifest.json (once all are there) and
sheet.png. Shard s belongs to rank s mod world and is a function of the plan and of s alone, so that another
world size goes on where a killed one stopped. No rank waits for another. Times are in the logs and nowhere
else: all other files are equal byte for byte after any number of kills.
"""

import glob
import hashlib
import io
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import checkpoint
import log
from readers.files import BadFile, printable, read_image, read_mask

VERSION = 1  # of this layout
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as `datasets` stores pictures
COLUMNS = {
    # OmniEdit's: names, types, order. The judge's numbers are rounded here, o_score is of the unrounded ones
    "omni_edit_id": pa.string(), "task": pa.string(), "src_img": PICTURE, "edited_img": PICTURE,
    "edited_prompt_list": pa.list_(pa.string()), "width": pa.int64(), "height": pa.int64(),
    "sc_score_1": pa.int64(), "sc_score_2": pa.int64(), "sc_reasoning": pa.string(), "pq_score": pa.int64(),
    "pq_reasoning": pa.string(), "o_score": pa.float64(),
    # ours. mask_image: what was generated, white = changed; object_mask: the object's own. family: of the
    # source picture, never split. item: what the tries of one edit have in common. source: where the truth is
    "mask_image": PICTURE, "object_mask": PICTURE, "source_caption": pa.string(),
    "target_caption": pa.string(), "family": pa.string(), "item": pa.string(), "try": pa.int64(),
    "seed": pa.int64(), "specialist": pa.string(), "params": pa.string(), "source": pa.string(),
    "clip_sim_image": pa.float64(), "clip_sim_dir": pa.float64(), "judge": pa.string(),
    "judge_status": pa.string(), "twin_of": pa.string(), "refined_from": pa.string()}  # fmt: skip
PICTURES = [name for name, kind in COLUMNS.items() if kind == PICTURE]
# what `datasets` and its viewer show as pictures; of the other columns the types say enough
SHOWN = {"info": {"features": {name: {"_type": "Image"} for name in PICTURES}}}
SCHEMA = pa.schema(list(COLUMNS.items()), metadata={"huggingface": json.dumps(SHOWN)})
TASK_WORDS = {"swap": "swap", "remove": "removal", "add": "addition", "attribute": "attribute_modification",
              "background": "background", "environment": "env", "style": "style"}  # fmt: skip
# as published, but for the background, which OmniEdit has no word for: readers/edits.py knows ours, and the
# word in the id, where the published rows have it

#### 1. pictures #############################################################################################


def picture(image, quality=0):
    """uint8 [h, w, 3], or a mask [h, w] of 0..1, or None -> a cell. quality: of JPEG (4:4:4); 0: PNG, exact.
    Masks are always PNG: JPEG's are not binary."""
    if image is None:
        return None
    file, image = io.BytesIO(), np.asarray(image)
    if image.ndim == 2:
        image, quality = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), 0
    if quality:
        Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=0)
    else:
        Image.fromarray(image).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def pixels(cell, name="a row"):
    """A cell -> uint8 [h, w, 3]."""
    return read_image(cell["bytes"], name)


def area(cell, h, w, name="a row"):
    """A mask's cell -> float32 [h, w]; None for none."""
    return read_mask(cell["bytes"], h, w, name) if cell else None


#### 2. files ################################################################################################


def put(path, data, first=False):
    """Bytes -> a file that is whole or not there. first: a file that another process wrote meanwhile stays.
    SystemExit with one line when the disk is full."""
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")

    def place():
        if not first:
            return tmp.replace(path)
        try:
            os.link(tmp, path)  # of several processes one succeeds
        except FileExistsError:
            pass
        except FileNotFoundError:
            raise
        except OSError:  # a file system without hard links
            return tmp.replace(path)
        tmp.unlink(missing_ok=True)

    try:
        for last in (False, False, True):
            try:
                tmp.write_bytes(data)
                checkpoint.fsync(tmp)
                place()
                break
            except FileNotFoundError:  # another rank has taken it for a dead process's, in `finish`
                if last:
                    raise
        checkpoint.fsync(path.parent)
    except OSError as e:
        tmp.unlink(missing_ok=True)
        raise SystemExit(f"error: {path}: cannot be written ({e.strerror or e}): free some space, then the "
                         "same command goes on") from None


def sweep(folder, name=""):
    """Removes what killed processes left half written of files whose names begin so."""
    for stale in Path(folder).glob(f"{glob.escape(name)}*.tmp"):
        stale.unlink(missing_ok=True)


def text(value):
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def keep_plan(out, plan):
    """Writes plan.json, or SystemExit if the folder was begun with another, naming the first difference."""
    out, plan = Path(out), json.loads(text({"version": VERSION, **plan}))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise SystemExit(f"error: --out: {out}: {e.strerror or e}: give another folder") from None
    try:
        old = json.loads((out / "plan.json").read_bytes())
    except FileNotFoundError:
        if (out / "manifest.json").exists():
            raise SystemExit(f"error: --out: {out}: is a folder of something else: give another") from None
        put(out / "plan.json", text(plan), first=True)
        old = json.loads((out / "plan.json").read_bytes())  # perhaps another rank's
    except ValueError:
        raise SystemExit(f"error: {out}/plan.json: not JSON: remove the folder, or repair it") from None
    old, plan = (p | p.pop("options", {}) for p in (old, plan))
    for key in sorted(plan.keys() | old.keys()):
        if plan.get(key) != old.get(key):
            raise SystemExit(f"error: --out: {out}: was begun with {key} {old.get(key)!r}, not "
                             f"{plan.get(key)!r}: give the same command, or another folder")


def read_plan(folder, stages):
    """plan.json of a stage's folder; SystemExit if it is none, or not one of `stages`."""
    path = Path(folder) / "plan.json"
    try:
        plan = json.loads(path.read_bytes())
        stage, _ = plan["stage"], plan["shards"]
    except (OSError, ValueError, KeyError, TypeError):
        raise SystemExit(f"error: --data: {folder}: not a folder of a stage: run `make_edits.py "
                         f"{stages[0]} --out {folder}` first") from None
    if stage not in stages:
        raise SystemExit(f"error: --data: {folder}: is of the stage {stage!r}: this one reads "
                         f"{' or '.join(stages)}")
    return plan


def fingerprint(folder):
    """What a stage's folder was asked for, as a short hash."""
    return hashlib.sha256((Path(folder) / "plan.json").read_bytes()).hexdigest()[:16]


def verified(path):
    """Whether shard `path` (.parquet) is there and every byte as it was written; damage is named."""
    try:
        told = json.loads(path.with_suffix(".json").read_bytes())
        if path.stat().st_size == told["bytes"] and checkpoint.sha256(path) == told["sha256"]:
            return True
    except (OSError, ValueError, KeyError, TypeError):
        if not path.with_suffix(".json").exists():
            return False
    print(f"damaged: {path}: it is made anew", file=sys.stderr)
    path.with_suffix(".json").unlink(missing_ok=True)
    return False


def write(path, rows, lines, group=100):
    """A shard: rows (dicts of COLUMNS; what is left out is null), then its log, then the file that says it is
    whole. group: rows in a row group. Two processes may write one at once, for the bytes are the same: an old
    .json stays until the new one takes its place."""
    unknown = {k for row in rows for k in row} - COLUMNS.keys()
    if unknown:
        raise ValueError(f"no columns {sorted(unknown)}")
    table = pa.Table.from_pylist([{k: row.get(k) for k in COLUMNS} for row in rows], schema=SCHEMA)
    file = io.BytesIO()
    codec = {f"{k}.{part}" if k in PICTURES else f"{k}.list.element" if pa.types.is_list(kind) else k:
             "NONE" if k in PICTURES and part == "bytes" else "ZSTD"
             for k, kind in COLUMNS.items() for part in ("bytes", "path")}
    pq.write_table(table, file, row_group_size=group, compression=codec, write_page_index=True,
                   use_dictionary=False)
    put(path, file.getvalue())
    put(path.with_suffix(".jsonl"), "".join(json.dumps(line) + "\n" for line in lines).encode())
    counts = Counter(row["task"] for row in rows)
    causes = Counter(line["cause"] for line in lines if line.get("cause"))
    put(path.with_suffix(".json"), text({
        "rows": len(rows), "bytes": path.stat().st_size, "sha256": checkpoint.sha256(path),
        "tasks": dict(sorted(counts.items())), "made": len(lines), "rejected": dict(sorted(causes.items()))}))


def read(path, columns=None):
    """Rows of a finished shard as dicts. BadFile when it is damaged."""
    try:
        return pq.read_table(path, columns=columns).to_pylist()
    except Exception as e:  # ArrowInvalid, OSError
        what = f"damaged ({printable(str(e))[:80]})"
        raise BadFile(path, what, "run the stage that made it again") from None


def name_of(shard):
    return f"{shard:05d}.parquet"


#### 3. making ###############################################################################################


def produce(out, n, make, dist, names=name_of, ready=lambda shard: True, group=100):
    """Makes what this rank has to make of the shards 0..n-1 of a folder.

    make(shard) -> rows, lines of the log. ready(shard): whether what it is made of is there. -> how many of
    this rank's were not ready.
    """
    out, waiting = Path(out), 0
    mine = range(dist.rank, n, dist.world)
    for s in mine:  # of this rank's alone: the others are at work
        sweep(out, f"{Path(names(s)).stem}.")
    bar = log.progress(len(mine), 0, out.name, dist)
    for s in mine:
        if verified(out / names(s)):
            pass
        elif ready(s):
            write(out / names(s), *make(s), group=group)
        else:
            waiting += 1
        bar.update()
    bar.close()
    return waiting


def finish(out, names):
    """Once all shards are there, whoever finds them writes manifest.json and sheet.png, and prints the table.
    -> whether they are."""
    out = Path(out)
    try:
        files = {name: json.loads((out / name).with_suffix(".json").read_bytes()) for name in names}
    except FileNotFoundError:
        return False
    plan = json.loads((out / "plan.json").read_bytes())
    tasks, causes = Counter(), Counter()
    for told in files.values():
        tasks.update(told["tasks"])
        causes.update(told["rejected"])
    put(out / "manifest.json", text(plan | {
        "rows": sum(f["rows"] for f in files.values()), "made": sum(f["made"] for f in files.values()),
        "tasks": dict(sorted(tasks.items())), "rejected": dict(sorted(causes.items())), "files": files}))
    sweep(out)  # all is written
    print(table(out, names), flush=True)
    return True


def lines_of(out, names):
    return [json.loads(line) for name in names
            for line in (Path(out) / name).with_suffix(".jsonl").read_text().splitlines()]


def table(out, names):
    """What a stage made: by task how many were made, kept, rejected by cause, and the seconds of one."""
    by_task = {}
    for line in lines_of(out, names):
        by_task.setdefault(line["task"], []).append(line)
    rows = [("task", "made", "kept", "s each", "rejected")]
    for task, lines in sorted(by_task.items()):
        causes = Counter(line["cause"] for line in lines if line.get("cause"))
        seconds = sum(line["ms"] for line in lines) / 1000 / len(lines)
        rows.append((task, str(len(lines)), str(sum(not line.get("cause") for line in lines)),
                     f"{seconds:.3f}", ", ".join(f"{c} {k}" for c, k in causes.most_common()) or "-"))
    wide = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join(cell.rjust(n) if i else cell.ljust(n)
                               for i, (cell, n) in enumerate(zip(row, wide))) + f"  {row[4]}" for row in rows)


def sheet(out, names, n=24):
    """sheet.png: source, mask, target of n rows spread evenly over the shards."""
    out = Path(out)
    counts = [json.loads((out / name).with_suffix(".json").read_bytes())["rows"] for name in names]
    first = np.concatenate([[0], np.cumsum(counts)]).astype(int)
    picks = np.unique(np.linspace(0, first[-1] - 1, min(n, first[-1])).astype(int)) if first[-1] else []
    rows, titles = [], []
    for s, name in enumerate(names):
        mine = [int(p - first[s]) for p in picks if first[s] <= p < first[s + 1]]
        if not mine:
            continue
        found = read(out / name)
        for row in (found[k] for k in mine):
            cells = [row["src_img"], row["mask_image"], row["edited_img"]]
            rows.append([Image.open(io.BytesIO(c["bytes"])) if c else None for c in cells])
            score = "" if row["o_score"] is None else f" {row['o_score']:.1f}"
            titles.append(f"{row['task']}{score}: {(row['edited_prompt_list'] or [''])[0]}")
    if rows:
        file = io.BytesIO()
        for row in rows:
            for im in filter(None, row):
                im.thumbnail((256, 256))
        log.contact_sheet(rows, ["source", "mask", "target"], titles).save(file, "PNG")
        put(out / "sheet.png", file.getvalue())


class Clock:
    """Milliseconds since the last call, for the log."""

    def __init__(self):
        self.at = time.perf_counter()

    def __call__(self, share=1):
        now = time.perf_counter()
        ms, self.at = 1000 * (now - self.at), now
        return round(ms / max(1, share), 1)
