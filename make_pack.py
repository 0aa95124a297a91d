"""Draw or decode a source once, into a folder that packed.py describes and reads.

    python make_pack.py scenes --out DIR --limit 1000000 --image_size 64     # then train with --data DIR
    python make_pack.py scenes:wrong=0.5 --out DIR --limit 200000
    python make_pack.py omniedit:SET --out DIR --image_size 512 --aspects True
"""

import json
import math
import os
import shutil
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
import data
from common import die_with_parent
from data import bucket
from readers.edits import names_edits, open_edits
from readers.files import BadFile, heldout_or, printable, size_of, too_many
from readers.packed import INDEX, LABELS, PARTS, read_index
from readers.pictures import open_source


def pack(spec: str, /, out: str, limit: int = 0, image_size: int = 64, aspects: bool = False,
         stride: int = 8, edits: bool = False, heldout: int = 512, shard: int = 4096,
         workers: int = os.cpu_count() or 1) -> None:
    """Draw or decode a source once, into a folder that every train script reads as --data. The same command
    goes on after a stop, and makes damaged files anew.

    Args:
        spec: as --data of a train script
        out: the folder
        limit: items of the training part; 0 = all, of which a procedural source has too many
        image_size: side of the square, or of the square of equal area, that pictures will still cover; scenes
            are drawn at this size
        aspects: what they cover is a bucket from 1:4 to 4:1 instead, as with --aspects of a train script
        stride: its sides are multiples of it
        edits: pairs, for --stage edit; goes without saying but for scenes
        heldout: items of the held-out part, for sample sheets; 0 = none
        shard: items in a file
        workers: processes
    """
    for flag, value, low in (("limit", limit, 0), ("stride", stride, 1), ("image_size", image_size, stride),
                             ("heldout", heldout, 0), ("shard", shard, 1), ("workers", workers, 1)):
        most = {"limit": 10**9, "image_size": 2**14, "stride": 1024, "workers": 512}.get(flag, 10**7)
        if not low <= value <= most:
            raise SystemExit(f"error: --{flag}: {str(value)[:40]}: must be at least {low}, at most {most:,}")
    edits, out = edits or names_edits(spec), Path(out)
    open_part = open_edits if edits else open_source

    # 1) what there is to do
    sources = {"train": open_part(spec, "train")}
    if size_of(sources["train"], 0) is None and (aspects or not limit):
        why = "square: leave out --aspects" if limit else "as often as is asked: say how many with --limit"
        raise SystemExit(f"error: {spec}: is drawn {why}")
    if heldout and (held := heldout_or(None, open_part, spec)) is not None:
        sources["heldout"] = held
    counts = {part: min(len(s), heldout if part == "heldout" else limit or len(s))
              for part, s in sources.items()}
    plan = dict(data=spec, edits=edits, image_size=image_size, aspects=aspects, stride=stride, shard=shard,
                items=counts, fingerprint={part: sources[part].fingerprint(n) for part, n in counts.items()})
    tasks = list(sources["train"].tasks) if edits else None
    begin(out, plan)
    done, todo = {part: {} for part in PARTS}, []
    for part, n in counts.items():
        for k, first in enumerate(range(0, n, shard)):
            name = f"{part}_{k:05d}.bin"
            done[part][name] = intact(out / name)
            if done[part][name] is None:
                todo.append((part, name, range(first, min(first + shard, n))))
    print(f"{sources['train'].name}: {', '.join(f'{n:,} {part}' for part, n in counts.items())}; "
          f"{len(todo):,} of {sum(map(len, done.values())):,} files to make")

    # 2) a file a process
    settings = out, sources, tasks, image_size, stride, aspects
    room(out, todo, *settings[1:])
    read, bad = 0, []
    with ProcessPoolExecutor(workers, initializer=_begin, initargs=settings) as pool:
        jobs = [(part, name, pool.submit(_make, part, name, which)) for part, name, which in todo]
        for part, name, job in tqdm(jobs, disable=None, leave=False):
            done[part][name], problems = job.result()
            read, bad = read + len(done[part][name]) + len(problems), bad + problems
            for problem in problems:
                print(f"skipped: {problem.removeprefix('error: ')}", file=sys.stderr)
            if too_many(len(bad), read):
                pool.shutdown(cancel_futures=True)
                raise SystemExit(f"{bad[-1]} (the last of {len(bad)} bad items among {read} read, too many "
                                 f"to go on: repair {spec})")

    # 3) from here on it is a source
    files = {part: {name: len(rows) for name, rows in shards.items()} for part, shards in done.items()}
    write_json(out / "packed.json", {"plan": plan, "tasks": tasks, "shards": files})
    (out / "packing.json").unlink()
    n = sum(sum(shards.values()) for shards in files.values())
    size = sum(int(rows["bytes"].sum()) for shards in done.values() for rows in shards.values())
    left = sum(counts.values()) - n
    print(f"{n:,} items, {left:,} left out as bad, {size / 2**30:.3f} GiB: train with --data {out}")


def begin(out, plan):
    """Make the folder, or go on with it. SystemExit if it holds what was packed with other flags."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        there = [out / name for name in ("packing.json", "packed.json") if (out / name).is_file()]
        found = json.loads(there[0].read_bytes())["plan"] if there else plan
        differ = [f"{k} {found.get(k)}, not {plan[k]}" for k in plan if found.get(k) != plan[k]]
        if differ:
            raise SystemExit(f"error: --out: {out}: holds what was packed with {'; '.join(differ)}: give "
                             "another folder, or delete this one")
        write_json(out / "packing.json", {"plan": plan})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise SystemExit(f"error: --out: {out}: {printable(str(e))[:120]}: give a folder that can be "
                         "written, or delete this one") from None


def room(out, todo, sources, tasks, image_size, stride, aspects):
    """SystemExit if what is left to do, by its first items, is larger than the disk's free space."""
    if not todo:
        return
    part, _, which = todo[0]
    looked = (shrunk(sources[part], i, image_size, stride, aspects) for i in which[:8])
    sizes = [len(record(item, tasks)[0]) for item in looked if isinstance(item, dict)]
    need = max(sizes, default=0) * sum(len(which) for *_, which in todo)
    free = shutil.disk_usage(out).free
    if need > free:
        raise SystemExit(f"error: --out: {out}: needs about {need / 2**30:.2f} GiB, {free / 2**30:.2f} GiB "
                         "are free: lower --limit or --image_size, or give another disk")


def shrunk(source, i, image_size, stride, aspects):
    """Item i, no larger than to cover its bucket, its arrays of one size; if it is bad, a str: why."""
    try:
        h, w = bucket(*(source.size(i) or (1, 1)), image_size, stride, aspects)
        item = source.load(i, h, w)
    except BadFile as e:
        return str(e)
    size = item["image"].shape[:2]
    scale = min(1, max(h / size[0], w / size[1]))
    h, w = (max(low, round(side * scale)) if scale < 1 else side for low, side in zip((h, w), size))
    if "source" in item:
        three = data.fit_pair(item["source"], item["image"], item["mask"], h, w)
        return item | dict(zip(("source", "image", "mask"), three))
    two = data.fit(item["image"], h, w, segments=item.get("segments"))
    return item | dict(zip(("image", "segments"), two))


def record(item, tasks):
    """-> (bytes of an item, its row of INDEX, without its place in the file)."""
    image, labels, mask = item["image"], item.get("segments"), item.get("mask")
    parts, row = [image, item["source"]] if tasks is not None else [image], np.zeros((), INDEX)
    if labels is not None:
        low, high = (int(f(labels)) for f in (np.min, np.max))
        kind = next(d for d in LABELS.values() if np.iinfo(d).min <= low and high <= np.iinfo(d).max)
        row["labels"] = kind.itemsize
        parts.append(labels.astype(kind))
    if mask is not None:
        plain = bool(np.all((mask == 0) | (mask == 1)))
        row["mask"] = 1 if plain else 4
        parts.append(mask.astype("u1" if plain else "<f4"))
    texts = json.dumps({"captions": item.get("captions") or [item["caption"]],
                        "target_caption": item.get("target_caption") or ""}).encode()
    raw = b"".join(np.ascontiguousarray(p).tobytes() for p in parts) + texts
    row["bytes"], row["crc"], row["texts"] = len(raw), zlib.crc32(raw), len(texts)
    row["h"], row["w"] = image.shape[:2]
    row["task"] = tasks.index(item["task"]) if tasks is not None and item["task"] else -1
    row["score"] = math.nan if item.get("score") is None else item["score"]
    return raw, row


def intact(path):
    """Rows of PART_NNNNN.bin if every byte of it is as it was written, else None."""
    try:
        rows = read_index(path)
    except BadFile:
        return None
    with open(path, "rb") as f:
        whole = all(zlib.crc32(f.read(int(row["bytes"]))) == row["crc"] for row in rows)
    return rows if whole else None


def _begin(*settings):
    global _settings
    _settings = settings
    torch.set_num_threads(1)
    die_with_parent()


def _make(part, name, which):
    """In a process of its own: one .bin and its .npy -> (its rows, what is wrong with the bad items)."""
    out, sources, tasks, *at = _settings
    path, rows, bad, end = out / name, [], [], 0
    path.with_suffix(".npy").unlink(missing_ok=True)
    with open(path, "wb") as f:
        for i in which:
            item = shrunk(sources[part], i, *at)
            if isinstance(item, str):
                bad.append(item)
                continue
            raw, row = record(item, tasks)
            row["at"], end = end, end + len(raw)
            rows.append(row)
            f.write(raw)
        f.flush()
        os.fsync(f.fileno())
    rows = np.array(rows, INDEX)
    replace(path.with_suffix(".npy"), lambda f: np.save(f, rows))
    return rows, bad


def write_json(path, value):
    replace(path, lambda f: f.write(json.dumps(value, indent=1).encode()))


def replace(path, write):
    """A file that is whole or not there: write(file)."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


if __name__ == "__main__":
    common.command(lambda run: run(), common.later(pack), None, "the same command goes on")
