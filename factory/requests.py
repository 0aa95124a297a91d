"""What the specialists are asked: a picture, where, which words. From scenes, or from columns of real data.

A source of requests has len(), .name, .about (for the plan), .key(i), .task(i) (never "add": that is a
removal with its roles exchanged), .size(i) -> (h, w) or None if it draws at any size, and .load(i, h, w) ->
dict:

    image          uint8 [h, w, 3], the real picture
    object         float32 [h, w], 1 = the object meant; None where the whole picture is
    prompt         what the pictures of an inpainting or text-to-image model are told; for removals what is
                   predicted behind the object ("" if nobody said)
    source_caption, target_caption     "" where unknown
    instructions   wordings of the edit        added: wordings of its inverse, for removals
    family         of the picture: rows of one family are never split
    source         JSON by which a judge that knows the truth finds it, or None

BadFile for what cannot be used.
"""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np

import data
from common import print0
from masks import dilate
from readers.edits import TASK_NAMES, TASKS
from readers.files import (
    BadFile,
    checked,
    clean_caption,
    image_size,
    inside,
    json_lines,
    photo_of,
    printable,
    read_image,
    read_labels,
    read_mask,
)
from scenes.dataset import EditScenes, parse_spec
from scenes.draw import draw, instances, rng_for
from scenes.edits import addition
from scenes.text import caption

WHERE = ("swap", "remove", "attribute", "background", "environment")  # an object's mask is needed
MADE = tuple(t for t in TASKS if t != "add")


def tasks_of(text):
    """"swap,remove,add", or OmniEdit's words -> the tasks of requests in order, and whether removals are
    kept, and reversed."""
    asked = [TASK_NAMES.get(t.strip(), t.strip()) for t in text.split(",")]
    if unknown := [t for t in asked if t not in TASKS] or len(set(asked)) < len(asked):
        raise SystemExit(f"error: --tasks: {text}: {unknown[0] if unknown is not True else 'twice'}: use "
                         f"each at most once of {', '.join(TASKS)}")
    made = list(dict.fromkeys("remove" if t == "add" else t for t in asked))
    return made, "remove" in asked, "add" in asked


class SceneRequests:
    """Request i is of task tasks[i % len]: the edits of EditScenes, whose truth is known.

    offset: first so many edits of every task left out. The object that a removal is to uncover, and what a
    predictor would say of it, are the true ones.
    """

    def __init__(self, spec, split, tasks, n, offset=0):
        level, _ = parse_spec(spec)
        self.pairs, self.level, self.split = EditScenes(split, 0.0, level), level, split
        self.tasks, self.n, self.offset = tasks, n, offset
        self.name, self.about = spec, {"source": spec, "split": split, "offset": offset}
        if not 1 <= n <= len(self.pairs) // len(TASKS) - offset:
            raise SystemExit(f"error: --n: {n}: use 1 to {len(self.pairs) // len(TASKS) - offset:,}")

    def __len__(self):
        return self.n

    def task(self, i):
        return self.tasks[i % len(self.tasks)]

    def pair(self, i):
        return TASKS.index(self.task(i)) + len(TASKS) * (i // len(self.tasks) + self.offset)

    def key(self, i):
        return f"{self.level}-{self.split}-{self.pair(i):07d}"

    def size(self, i):
        return None

    def load(self, i, h, w):
        pair, task = self.pair(i), self.task(i)
        before, edit = self.pairs.edit(pair)
        seen = instances(before, h, w)
        if task in ("background", "environment"):
            mask = (seen > 0).astype(np.float32)
        elif edit.ids is not None:
            mask = (seen == edit.ids[0]).astype(np.float32)
            if not mask.any():
                raise BadFile(f"{self.name} {pair}", "its object is hidden", "leave it out")
        else:
            mask = None
        target = caption(edit.target, rng_for(self.pairs.seed, pair, 8))
        added = []
        if task == "remove":
            added = [addition(before.objects[edit.ids[0] - 1],
                              rng_for(self.pairs.seed, pair, 31).random(4).tolist())]
        return dict(image=draw(before, h, w), object=mask, prompt=target, target_caption=target,
                    source_caption=caption(before, rng_for(self.pairs.seed, pair, 3)),
                    instructions=[edit.instruction], added=added, family=self.key(i),
                    source=json.dumps({"scenes": self.level, "split": self.split, "pair": pair}))


class Lines:
    """Requests in JSON lines; paths are relative to the file.

    source (a picture), task, instruction (a string or a list of wordings); the object as mask (a picture),
    or segments (a label map) and label, or box [x0, y0, x1, y1] in pixels of the picture as shown, labels and
    boxes also in lists, for several objects together; perhaps source_caption, target_caption, prompt
    (default: target_caption), behind (of removals: a predicted caption of what is behind), add_instruction
    (of removals: their inverse), key (default: a hash of all that tells requests apart), family (default: the
    source's bytes). A mask or label map is turned as EXIF turns its photo.
    """

    def __init__(self, path, tasks, n, offset=0):
        self.folder, self.name, rows = str(Path(path).parent), str(path), []
        if not Path(path).is_file():
            raise SystemExit(f"error: --data: {path}: no such file: give scenes, or JSON lines of requests")
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
        self.about = {"source": Path(path).name, "sha256": digest, "offset": offset}
        rows, _ = checked(json_lines(path), self._row)
        if others := sorted({row["task"] for row in rows} - set(tasks)):
            n_others = sum(row["task"] in others for row in rows)
            print0(f"note: {path}: {n_others} of {len(rows)} requests are left out: --tasks does not name "
                   f"{', '.join(others)}")
        rows = [row for row in rows if row["task"] in tasks]
        self.rows = rows[offset:offset + n] if n else rows[offset:]
        if not self.rows:
            raise SystemExit(f"error: --data: {path}: no request of the tasks {', '.join(tasks)}: add some")
        key, times = Counter(map(self.key, range(len(self)))).most_common(1)[0]
        if times > 1:
            row = next(row for i, row in enumerate(self.rows) if self.key(i) == key)
            about = printable(f"{row['task']} in {row['source']}")[:80]
            raise SystemExit(f"error: --data: {path}: {times} requests have the key {printable(key)[:60]}"
                             f" ({about}): remove all but one, or give each a key of its own")

    @staticmethod
    def _row(row):
        task = TASK_NAMES.get(str(row.get("task")).strip().lower())
        if task == "add":  # as a removal its words would be those of the opposite
            raise ValueError("an addition is a removal backwards: say task remove, with add_instruction")
        if task is None:
            raise ValueError(f"task {printable(str(row.get('task')))[:40]!r} is none of {', '.join(TASKS)}")
        if not isinstance(row.get("source"), str) or not row["source"]:
            raise ValueError("no source, the name of a picture")
        for name in ("instruction", "add_instruction"):
            value = row.get(name)
            value = [value] if isinstance(value, str) else value or []
            if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
                raise ValueError(f"{name} is no wording, nor a list of them")
            row[name] = value
        if not row["instruction"]:
            raise ValueError("no instruction")
        for name in ("source_caption", "target_caption", "prompt", "behind", "mask", "segments", "family"):
            if not isinstance(row.get(name), str | None):
                raise ValueError(f"{name} is not a string")
        box, label = row.get("box"), row.get("label")
        if isinstance(box, list) and box and not isinstance(box[0], list):
            box = [box]
        boxes = box if isinstance(box, list) and box else [box]
        if box is not None and not all(isinstance(b, list) and len(b) == 4 and all(
                type(v) in (int, float) for v in b) for b in boxes):
            raise ValueError("box is not [x0, y0, x1, y1], nor a list of such")
        label = label if isinstance(label, list) else [label]
        if row.get("segments") and (not label or any(type(v) is not int for v in label)):
            raise ValueError("segments without a label, a whole number")
        if task in WHERE and not (row.get("mask") or row.get("segments") or box):
            raise ValueError(f"{task} needs mask, segments and label, or box")
        if task in ("swap", "background", "attribute", "environment") and not (
                row.get("prompt") or row.get("target_caption")):
            raise ValueError(f"{task} needs prompt or target_caption: what is to be drawn")
        if task in ("attribute", "environment") and not row.get("source_caption"):
            raise ValueError(f"{task} needs source_caption: Prompt-to-Prompt compares two")
        return row | {"task": task, "box": box, "label": label}

    def __len__(self):
        return len(self.rows)

    def task(self, i):
        return self.rows[i]["task"]

    def key(self, i):
        row = self.rows[i]
        said = json.dumps([row["source"], row["instruction"], row["task"],  # one wording may mean two people
                           *(row.get(k) for k in ("mask", "segments", "label", "box"))])
        return str(row.get("key") or hashlib.sha256(said.encode()).hexdigest()[:16])

    def size(self, i):
        return image_size(inside(self.folder, self.rows[i]["source"]))

    def load(self, i, h, w):
        row = self.rows[i]
        path = inside(self.folder, row["source"])
        image, family = read_image(path), row.get("family")
        size, mask = image.shape[:2], None
        if row.get("mask"):
            mask = read_mask(inside(self.folder, row["mask"]), *size, photo=photo_of(path))
        elif row.get("segments"):  # Open Images' maps have a size of their own
            labels = read_labels(inside(self.folder, row["segments"]), None, photo_of(path))
            mask = np.isin(labels, row["label"]).astype(np.float32)
        elif row.get("box"):
            mask = np.zeros(size, np.float32)
            for box in row["box"]:
                x0, y0, x1, y1 = (max(0, round(v)) for v in box)
                mask[y0:y1, x0:x1] = 1
        if mask is not None:
            mask = data.fit(image, h, w, segments=(mask > 0.5).astype(np.int32))[1].astype(np.float32)
            if not mask.any():
                raise BadFile(f"{self.name}: {row['source']}", "its object is not in the picture",
                              "correct mask, label or box")
        if not family:
            with open(path, "rb") as f:
                family = hashlib.file_digest(f, "sha256").hexdigest()[:16]
        said = {k: clean_caption(row.get(k) or "")[0] for k in ("source_caption", "target_caption", "prompt",
                                                                "behind")}
        prompt = said["behind"] if row["task"] == "remove" else said["prompt"] or said["target_caption"]
        return dict(image=data.fit(image, h, w)[0], object=mask, prompt=prompt, family=family,
                    source_caption=said["source_caption"], source=None, added=row["add_instruction"],
                    target_caption=said["target_caption"] or said["behind"],
                    instructions=[clean_caption(v)[0] for v in row["instruction"]])


def open_requests(spec, split, tasks, n, offset=0):
    """"scenes", "scenes:hard", or a .jsonl of `Lines`."""
    if parse_spec(spec):
        return SceneRequests(spec, split, tasks, n or 100, offset)
    return Lines(spec, tasks, n, offset)


def grown(mask, share):
    """An object's mask, larger on every side by a share of its box's longer side: an exact one keeps shadow
    and outline, from which an inpainting model draws the object anew. [h, w] -> bool."""
    m = mask > 0.5
    ys, xs = np.flatnonzero(m.any(1)), np.flatnonzero(m.any(0))
    if not len(ys):
        return m
    longer = max(ys[-1] - ys[0], xs[-1] - xs[0]) + 1
    return dilate(m, round(share * longer) or (1 if share else 0))


def relative(path):
    """A path for a plan: no folder of this machine."""
    return os.path.basename(os.path.normpath(path))
