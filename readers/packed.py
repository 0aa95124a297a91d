"""Pictures or edit pairs that make_pack.py drew or decoded ahead: raw pixels, read through memory maps.

In a packed folder, for each part (train, heldout):

    PART_NNNNN.bin    items one after the other: image [h, w, 3], of a pair source [h, w, 3], label map, mask,
                      then the texts in JSON
    PART_NNNNN.npy    a row of INDEX for each of them; written after its .bin, so it says that that is whole
    packing.json      what was asked for, while it is being made; packed.json takes its place in the end

An item is one piece with a CRC-32. Any number of processes share the pages that the system keeps.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np

from readers.files import BadFile, EmptyPart, hashed, printable

PARTS = ("train", "heldout")
# at, bytes: where an item is in its .bin. labels: bytes of a label, 0: no map. mask: 0: none, 1: zeros and
# ones, 4: float32. texts: bytes. task: place among the tasks, -1 for none. score: NaN for none
INDEX = np.dtype([("at", "<i8"), ("bytes", "<i8"), ("crc", "<u4"), ("h", "<i4"), ("w", "<i4"),
                  ("labels", "u1"), ("mask", "u1"), ("texts", "<i4"), ("task", "i1"), ("score", "<f4")])
LABELS = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<i4")}
AGAIN = "give the same `make_pack.py` command again, which makes anew what is damaged"


def is_packed(path):
    return any((Path(path) / name).is_file() for name in ("packed.json", "packing.json"))


def manifest(root):
    """packed.json of a folder: plan (the flags), tasks (None for pictures), shards (part -> {file: items}).
    BadFile if there is none yet, or it is damaged."""
    path = Path(root) / "packed.json"
    if not path.is_file():
        raise BadFile(root, "packing was not finished", "give the same `make_pack.py` command again")
    try:
        found = json.loads(path.read_bytes())
        found["plan"]["edits"], found["tasks"], [found["shards"][part].items() for part in PARTS]
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise BadFile(path, f"damaged ({printable(str(e))[:80]})", AGAIN) from None


def read_index(path):
    """Rows of PART_NNNNN.bin. BadFile if they, or the size of the .bin, are not as they were written."""
    path, index = Path(path), Path(path).with_suffix(".npy")
    try:
        rows = np.load(index, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise BadFile(index, f"cannot be read ({printable(str(e))[:80]})", AGAIN) from None
    if rows.dtype != INDEX or np.any(rows["at"] != np.cumsum(rows["bytes"]) - rows["bytes"]):
        raise BadFile(index, "not an index of packed items", AGAIN)
    size, expected = path.stat().st_size if path.is_file() else 0, int(rows["bytes"].sum())
    if size != expected:
        raise BadFile(path, f"{size:,} bytes instead of {expected:,}", AGAIN)
    return rows


class Packed:
    """Source of packed pictures or pairs, with all that sources of its kind have (pictures.py, edits.py).

    edits: which of the two is asked for. split: train, heldout or all. An item is what the source that was
    packed gives for it, at the size at which it was packed, whatever size is asked for."""

    bad_lines = 0

    def __init__(self, root, edits, split):
        self.name, self.maps, found = str(root), {}, manifest(root)
        if found["plan"]["edits"] != edits:
            holds, wants = ("pictures", "edit pairs") if edits else ("edit pairs", "pictures")
            raise BadFile(root, f"holds {holds}, and {wants} are asked for", "pack those")
        shards = [(Path(root) / name, n) for part in PARTS if split in (part, "all")
                  for name, n in found["shards"][part].items()]
        every = [read_index(path) for path, _ in shards]
        for (path, n), rows in zip(shards, every):
            if len(rows) != n:
                raise BadFile(path, f"{len(rows):,} items instead of {n:,}", AGAIN)
        if not any(map(len, every)):
            raise EmptyPart(f"error: {root}: nothing in its {split} part: pack it with --heldout")
        self.files, self.tasks = [path for path, _ in shards], found["tasks"]
        self.rows = np.concatenate(every)
        self.file_of = np.repeat(np.arange(len(every)), list(map(len, every)))
        self.sizes = np.stack([self.rows["h"], self.rows["w"]], 1)
        self.task_of, self.scores = self.rows["task"], self.rows["score"]

    def __len__(self):
        return len(self.rows)

    def size(self, i):
        return tuple(self.sizes[i].tolist())

    def task(self, i):
        return self.tasks[self.task_of[i]] if self.task_of[i] >= 0 else None

    def score(self, i):
        return None if math.isnan(self.scores[i]) else float(self.scores[i])

    def _read(self, i):
        """-> (item i, uint8 [bytes], not to be written to; its row of INDEX)."""
        row, k = self.rows[i], int(self.file_of[i])
        if k not in self.maps:
            self.maps[k] = np.memmap(self.files[k], np.uint8, "r")
        raw = self.maps[k][row["at"]:row["at"] + row["bytes"]]
        if zlib.crc32(raw) != row["crc"]:
            raise BadFile(f"{self.files[k]} item {i}", "damaged (its CRC-32 differs)", AGAIN)
        return raw, row

    def texts(self, n):
        for i in range(n):
            try:
                raw, row = self._read(i)
                yield json.loads(raw[len(raw) - row["texts"]:].tobytes())["captions"]
            except BadFile:
                yield []

    def fingerprint(self, n):
        return hashed([("Packed", n), self.rows.tobytes()])  # the index has a CRC of every item

    def load(self, i, h, w):
        raw, row = self._read(i)
        H, W, at = int(row["h"]), int(row["w"]), 0

        def take(dtype, *shape):
            nonlocal at
            start, at = at, at + dtype.itemsize * math.prod(shape)
            return np.frombuffer(raw[start:at], dtype).reshape(shape)

        image = take(LABELS[1], H, W, 3)
        source = None if self.tasks is None else take(LABELS[1], H, W, 3)
        labels = take(LABELS[int(row["labels"])], H, W) if row["labels"] else None
        mask = take(np.dtype("<f4" if row["mask"] == 4 else "u1"), H, W) if row["mask"] else None
        mask = None if mask is None else mask.astype(np.float32)
        texts = json.loads(raw[at:].tobytes())
        if source is None:
            return dict(image=image, caption=texts["captions"][0], segments=labels)
        return dict(image=image, source=source, mask=mask, caption=texts["captions"][0], **texts,
                    task=self.task(i), score=self.score(i))
