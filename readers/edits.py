"""Sets of edit pairs in the layouts they are published in, one preset each (`open_edits` opens them).

    omniedit    TIGER-Lab/OmniEdit-Filtered-1.2M                                       parquet
    ip2p        InstructPix2Pix: seeds.json and folders; timbrooks/instructpix2pix-clip-filtered and
                fusing/instructpix2pix-1000-samples                                    folders, parquet
    magicbrush  osunlp/MagicBrush: transparent = edit                                  parquet
    ultraedit   BleachNick/UltraEdit, _500k, _Region_Based_100k: white, opaque = edit      parquet, JSON lines
    jsonl       source, edited, instruction, and perhaps mask, task, score             JSON lines

An edit source has len(), .name, .tasks (names it can hold), .task(i) -> str or None and .score(i) -> float in
0..10 or None without decoding, .size(i) -> (h, w) of the source picture, or None if it draws at any size, and
.load(i, h, w) -> dict(image uint8 [h', w', 3], the target; source, of its size; caption, the instruction;
captions, all its wordings; mask float32 [h', w'], 1 = may change, or None; task; score). Raises BadFile.
.texts(n) and .fingerprint(n) as of sources of pictures.
A source that draws says in .wrong which share of its pairs is scored low.
Optional: .task_of int8 [n] (places in .tasks, -1 none) and .scores float32 [n] (NaN none), .runs and .window.
"""

import hashlib
import json
import math
import os
import re
import sys
from array import array
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
from PIL import Image

from readers import packed
from readers.files import (
    ASPECT,
    HELDOUT,
    BadFile,
    EmptyPart,
    RowGroups,
    bytes_of,
    checked,
    files_of,
    hashed,
    held_out,
    image_size,
    inside,
    json_lines,
    part_of,
    photo_of,
    picture_cell,
    printable,
    read_image,
    read_mask,
)
from readers.pictures import column_texts, group_facts

TASKS = ("swap", "remove", "add", "attribute", "background", "environment", "style")  # OmniEdit's seven
TASK_WORDS = {  # as OmniEdit's column, GEdit-Bench (with a hyphen), ImgEdit and PIE-Bench say them
    "swap": ("swap", "replace", "replacement", "object_swap", "obj_swap", "subject-replace",
             "change object"),
    "remove": ("remove", "removal", "object_removal", "obj_removal", "subject-remove", "delete object"),
    "add": ("add", "addition", "object_addition", "obj_addition", "subject-add", "add object"),
    "attribute": ("attribute", "attribute_modification", "attr_mod", "color_alter", "material_alter",
                  "adjust", "change colour", "change material"),
    "background": ("background", "background_change", "background_swap", "bg", "change background"),
    "environment": ("environment", "env", "environment_change", "tone_transfer"),
    "style": ("style", "style_transfer", "style_change", "change style"),
}
TASK_NAMES = {word: task for task, words in TASK_WORDS.items() for word in words}

# Names under which a set keeps each thing, in order of preference. alpha: see read_mask. size: height, width.
# key: what the held-out split goes by, so that the edits of one picture stay on one side.
# described: a caption of the target, which alignment rewards are told.
Preset = namedtuple("Preset", "source target instruction mask task score key size alpha described",
                    defaults=[(), None, ()])
PRESETS = {
    "omniedit": Preset(("src_img",), ("edited_img",), ("edited_prompt_list",), ("mask_image",), ("task",),
                       ("o_score",), ("family", "omni_edit_id"), ("height", "width"),
                       described=("target_caption",)),
    "ip2p": Preset(("original_image", "input_image"), ("edited_image",), ("edit_prompt",), (), (), (),
                   ("original_prompt", "edit_prompt"), described=("edited_prompt",)),
    "magicbrush": Preset(("source_img",), ("target_img",), ("instruction",), ("mask_img",), (), (),
                         ("img_id", "instruction"), alpha="hole"),
    "ultraedit": Preset(("source_image",), ("edited_image",), ("edit_prompt",), ("mask_image",), (), (),
                        ("source_caption", "idx", "edit_prompt"), alpha="region",
                        described=("target_caption",)),
    "jsonl": Preset(
        ("source", "source_image", "source_img", "src_img", "input_image", "original_image"),
        ("edited", "target", "edited_image", "edited_img", "target_image", "target_img"),
        ("instruction", "instructions", "edit_prompt", "edited_prompt_list", "prompt", "edit"),
        ("mask", "mask_image", "mask_img"), ("task", "edit_type", "task_type"),
        ("score", "o_score", "weight"), ("key", "omni_edit_id", "img_id"), ("height", "width"),
        described=("target_caption", "output_caption")),
}  # fmt: skip
NEEDED = ("source", "target", "instruction")
NO_MASK = (None, "", b"", "NONE", "none")  # UltraEdit's JSON lines say NONE


def _first(names, among):
    return next((n for n in names if n in among), None)


def _task(name, omni_edit_id=None):
    """A set's name of a task -> place in TASKS, -1 if it is none of the seven. OmniEdit files changes of the
    background under other tasks: its ids tell (a word "background" or "bg" in them; inferred)."""
    if name and re.search(r"(^|[^a-z])(background|bg)([^a-z]|$)", str(omni_edit_id).lower()):
        return TASKS.index("background")
    return TASKS.index(t) if (t := TASK_NAMES.get(str(name).strip().lower())) else -1


def _score(value):
    """Number or None -> float, NaN for None. ValueError for what is no score."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 10:
        raise ValueError(f"score {printable(str(value))[:40]!r} is not a number from 0 to 10")
    return float(value)


def _wordings(value):
    """Instruction cell (a string or a list of them) -> its wordings that say something."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, str) and printable(v[:9999])]


def joined(names):
    """Names of two things each [N, 2], as numbers -> the least name that is joined with it, through however
    many others, for each [N]."""
    known, place = np.unique(names, return_inverse=True)
    a, b = place.reshape(-1, 2).T
    least, before = np.arange(len(known)), None
    while before is None or (least != before).any():
        before, both = least, np.minimum(least[a], least[b])
        least = least.copy()
        np.minimum.at(least, a, both)
        np.minimum.at(least, b, both)
        least = least[least]  # halves the way of a chain
    return known[least[a]]


def _same_aspect(a, b):
    return max(a[0] * b[1], a[1] * b[0]) <= ASPECT * min(a[0] * b[1], a[1] * b[0])


def _read_pair(source, target, mask, alpha, h, w):
    """Pictures of a row, each (path or bytes, name), mask perhaps None -> dict(image, source, mask), all of
    the size of the source, which is decoded small if that covers (h, w). BadFile when they do not fit."""
    photo = photo_of(*source)
    size, its = photo[1], image_size(*target)
    if not _same_aspect(size, its):
        raise BadFile(target[1], f"the target is {its[1]}x{its[0]}, its source {size[1]}x{size[0]}",
                      "crop them alike, or remove the row")
    first, image = (read_image(*x, cover=(h, w)) for x in (source, target))
    size = first.shape[:2]
    if image.shape != first.shape:
        image = np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS))
    mask = mask and read_mask(mask[0], *size, mask[1], alpha=alpha, photo=photo)
    return dict(image=image, source=first, mask=mask)


class _Edits:
    """What the readers below share. rows: the numbers of the pairs of one split, in a reader's own count."""

    tasks, alpha, bad_lines = TASKS, None, 0

    def _take(self, name, rows, split, light=lambda row: row):
        """rows: (name, row) as for `checked`; light(row) -> dict(row = its number, and perhaps key, task,
        score, size, id, held = whether it is held out, else a hash of its key says), or it raises
        ValueError. Bad rows are named and counted; the rest are split."""
        kept, strange = [array("q"), array("b"), array("f"), array("i"), array("i")], Counter()

        def check(row):
            row = light(row)
            score, task, key, size = (row.get(k) for k in ("score", "task", "key", "size"))
            score, place = _score(score), _task(task, row.get("id"))
            held = row["held"] if "held" in row else split != "all" and held_out(str(key), HELDOUT)
            if split != "all" and held != (split == "heldout"):
                return
            strange[str(task)] += task is not None and place < 0
            known = size is not None and all(type(s) is int and 0 < s < 1 << 20 for s in size)
            for column, value in zip(kept, (row["row"], place, score, *(size if known else (0, 0)))):
                column.append(value)

        self.bad_lines = checked(rows, check)[1]
        self.name = name
        self.rows, self.task_of, self.scores, *sizes = (np.array(column) for column in kept)
        self.sizes, self.runs = np.stack(sizes, 1), [len(self.rows)]
        for task, n in strange.items():
            if n:
                print(f"note: {name}: {n:,} of task {printable(task)[:40]!r}, none of {', '.join(TASKS)}: "
                      "they count as pairs without a task", file=sys.stderr)

    def _keep(self, which):
        self.rows, self.task_of, self.scores, self.sizes = (
            column[which] for column in (self.rows, self.task_of, self.scores, self.sizes))
        self.runs = [len(self.rows)]

    def __len__(self):
        return len(self.rows)

    def task(self, i):
        return TASKS[self.task_of[i]] if self.task_of[i] >= 0 else None

    def score(self, i):
        return None if math.isnan(self.scores[i]) else float(self.scores[i])

    def size(self, i):
        if self.sizes[i].all():
            return tuple(self.sizes[i].tolist())
        (source, name), *_ = self._row(i)
        return image_size(source, name)

    def load(self, i, h, w):
        source, target, mask, captions, described, name = self._row(i)
        if not captions:
            raise BadFile(name, "an empty instruction", "say what the edit is, or remove the row")
        return _read_pair(source, target, mask, self.alpha, h, w) | dict(
            caption=captions[0], captions=captions, task=self.task(i), score=self.score(i),
            target_caption=described if isinstance(described, str) else "")

    def texts(self, n):
        for i in range(n):
            try:
                yield self._row(i)[3]
            except BadFile:
                yield []

    def fingerprint(self, n):
        def facts():
            for i in range(n):
                try:
                    *pictures, captions, _, _ = self._row(i)
                    yield captions, *((os.path.basename(p[0]), bytes_of(p[0])) for p in pictures if p)
                except BadFile:
                    yield i, "bad"

        return hashed([(type(self).__name__, n), *facts()])


def _named(file, folder, name, what):
    """Picture of a row as (path, name for messages); BadFile if it leaves the folder."""
    return inside(folder, file, f"{name}, {what}"), f"{name}, {what} {file}"


class EditParquet(_Edits):
    """Parquet files in the columns of a preset; pictures as in `pictures.picture_cell`."""

    def __init__(self, files, name, preset, split):
        self.preset, self.alpha = preset, PRESETS[preset].alpha
        self.groups = RowGroups(files, self._columns)
        self.window = self.groups.window
        self._take(name, self._light_rows(), split)
        self.runs = self.groups.runs(self.rows)

    def _columns(self, file, kinds):
        wanted = (*NEEDED, "mask", "described")
        found = {what: _first(getattr(PRESETS[self.preset], what), kinds) for what in wanted}
        missing = [" or ".join(getattr(PRESETS[self.preset], what)) for what in NEEDED if not found[what]]
        if missing:
            among = printable(", ".join(kinds))[:400] or "its none"
            raise BadFile(file, f"no column {', '.join(missing)} (preset {self.preset}) among {among}",
                          "rename them, or use another preset")
        return list(found.values())

    def _light_rows(self):
        p = PRESETS[self.preset]

        def columns(names):  # ours say background in the column: of them no name is asked
            published = self.preset == "omniedit" and "omni_edit_id" in names and "family" not in names
            return [_first(p.task, names), _first(p.score, names), _first(p.key, names),
                    "omni_edit_id" if published else None, *(_first((s,), names) for s in p.size)]

        for n, (name, (task, score, key, own, *size)) in enumerate(self.groups.light(columns)):
            row = dict(row=n, task=task, score=score, size=size or None, id=own)
            yield name, row | dict(key=os.path.basename(name) if key is None else key)

    def _row(self, i):
        file, name, (source, target, instruction, mask, described) = self.groups.row(self.rows[i])
        mask = mask.get("bytes") or mask.get("path") if isinstance(mask, dict) else mask
        cells = [("source", source), ("target", target)] + [("mask", mask)] * (mask not in NO_MASK)
        named = [(picture_cell(value, file, f"{name}, {what}"), f"{name}, {what}") for what, value in cells]
        return (*named, *[None] * (3 - len(named)), _wordings(instruction), described, name)

    def texts(self, n):
        return column_texts(self.groups, self.rows, PRESETS[self.preset].instruction)

    def fingerprint(self, n):
        return hashed([("EditParquet", n), *group_facts(self.groups, self.rows)])


class EditLines(_Edits):
    """JSON lines with the keys of a preset; paths are relative to the file. In memory: where lines begin.

    Pairs without a key are split by what they show: an addition and its removal, which exchange source and
    target, and the edits of an edit stay on one side."""

    def __init__(self, files, name, preset, split):
        self.preset, self.alpha, self.files = PRESETS[preset], PRESETS[preset].alpha, list(map(str, files))
        self.starts, self.file_of, self._names = array("q"), array("i"), array("Q")
        parents = [os.path.dirname(os.path.abspath(file)) for file in self.files]
        self.folders = [os.path.relpath(p, os.path.commonpath(parents)) for p in parents]

        def rows():
            for k, file in enumerate(self.files):
                for row in json_lines(file, self.starts):
                    self.file_of.append(k)
                    self._names.extend((0, 0))
                    yield row

        self._take(name, rows(), "all", self._light)
        if split != "all":
            family = joined(np.array(self._names).reshape(-1, 2))[self.rows]
            held = np.array([held_out(str(f), HELDOUT) for f in family], bool)
            self._keep(held == (split == "heldout"))
        del self._names

    def _cell(self, row, what):
        return next((row[k] for k in getattr(self.preset, what) if row.get(k) is not None), None)

    def _light(self, row):
        for what in NEEDED:
            value = self._cell(row, what)
            if what == "instruction" and value is not None and not _wordings(value):
                raise ValueError("an empty instruction")
            if what != "instruction" and not (isinstance(value, str) and value) or value is None:
                names, among = ", ".join(getattr(self.preset, what)), printable(", ".join(row))[:200]
                raise ValueError(f"no {what} ({names}) among {among or 'its no keys'}")
        if not isinstance(self._cell(row, "mask"), str | None):
            raise ValueError("the mask is not a file name")
        size = [row.get(s) for s in self.preset.size]
        key = self._cell(row, "key")
        of = (("key", key),) * 2 if key else [(self.folders[self.file_of[-1]], self._cell(row, what))
                                              for what in ("source", "target")]
        # lines are read one at a time, so the last start, and the last names, are this line's
        for side, named in zip((-2, -1), of):
            digest = hashlib.sha256(json.dumps(named).encode("utf-8", "replace")).digest()
            self._names[side] = int.from_bytes(digest[:8], "big")
        return dict(row=len(self.file_of) - 1, size=size or None, id=row.get("omni_edit_id"),
                    task=self._cell(row, "task"), score=self._cell(row, "score"))

    def _row(self, i):
        n = self.rows[i]
        file, (line, start) = self.files[self.file_of[n]], self.starts[2 * n:2 * n + 2]
        with open(file, "rb") as f:
            f.seek(start)
            row = json.loads(f.readline(1 << 20))
        folder, name = os.path.dirname(file) or ".", f"{file} line {line}"
        mask = self._cell(row, "mask")
        named = [_named(self._cell(row, what), folder, name, what) for what in NEEDED[:2]]
        mask = None if mask in NO_MASK else _named(mask, folder, name, "mask")
        return *named, mask, _wordings(self._cell(row, "instruction")), self._cell(row, "described"), name


class EditFolders(_Edits):
    """InstructPix2Pix as its authors publish it: seeds.json = [[folder, [seed, ...]], ...], and in each
    folder prompt.json, SEED_0.jpg (before) and SEED_1.jpg (after). Each seed is a pair of its own. Held out
    is their test split: the last 5 % of seeds.json by position, folders that are missing counted (their val,
    the 5 % before, is not)."""

    def __init__(self, root, split):
        self.root = str(root)
        try:
            listed = json.loads((Path(root) / "seeds.json").read_bytes())
            self.pairs = [(str(folder), str(seed)) for folder, seeds in listed for seed in seeds]
            # the split of their edit_dataset.py, its rounding too
            held = {str(folder) for folder, _ in listed[max(1, math.floor((0.9 + 0.05) * len(listed))):]}
        except (OSError, ValueError, TypeError, RecursionError) as e:
            problem = f"not a list of [folder, [seed, ...]] ({printable(str(e))[:80]})"
            raise BadFile(f"{root}/seeds.json", problem, "download it again") from None
        there = {entry.name for entry in os.scandir(root) if entry.is_dir()}
        gone = {folder for folder, _ in self.pairs} - there
        if gone:  # the published list names thousands that its archive lacks (instruct-pix2pix issue 80)
            print(f"skipped: {root}: {len(gone):,} of the folders in seeds.json do not exist: their pairs "
                  "are left out", file=sys.stderr)
        self.missing = sum(folder in gone for folder, _ in self.pairs)
        self._take(str(root), ((f"{root}/{folder}", dict(row=n, key=folder, held=folder in held))
                               for n, (folder, _) in enumerate(self.pairs) if folder in there), split)

    def _row(self, i):
        folder, seed = self.pairs[self.rows[i]]
        name = f"{folder}/prompt.json"
        try:
            with open(inside(self.root, name), "rb") as f:
                prompt = json.loads(f.read(1 << 20))
            captions, described = _wordings(prompt.get("edit")), prompt.get("output")
        except (OSError, ValueError, AttributeError, RecursionError) as e:
            problem = f"not a prompt ({printable(str(e))[:80]})"
            raise BadFile(f"{self.root}/{name}", problem, "repair it") from None
        pictures = [_named(f"{folder}/{seed}_{k}.jpg", self.root, self.root, what)
                    for k, what in enumerate(("source", "target"))]
        return *pictures, None, captions, described, name


def open_preset(preset, path, split):
    """Edit source of a set in one of the layouts above: a file, or a folder of its files; SystemExit if there
    is none. split "train", "heldout" or "all": files or folders named dev, val, test ... are held out, else
    5% of the pairs by a hash of their source's name, id or caption (its edits stay together; of JSON lines
    without a key all that share a picture), but for InstructPix2Pix's folders (EditFolders)."""
    spec, path = f"{preset}:{path}", Path(path)
    if not path.exists():
        raise SystemExit(f"error: {spec}: no such file or folder: correct the path")
    if preset == "ip2p" and (path / "seeds.json").is_file():
        source = EditFolders(path, split)
    else:
        path, split = part_of(path, split)
        for suffix, reader in ((".parquet", EditParquet), (".jsonl", EditLines)):
            files, rest = files_of(path, split, suffix)
            if files and files[0].suffix == suffix:
                source = reader(files, str(path), preset, rest)
                break
        else:
            raise SystemExit(f"error: {spec}: no .parquet or .jsonl in it: give such a file or folder")
    if not len(source):
        raise EmptyPart(f"error: {spec}: no usable pairs in its {split} part: add some, or see the lines "
                        "above")
    return source


def open_edits(spec, split="train"):
    """Edit pairs -> source; SystemExit with one line on all else.

    spec: "scenes" or "scenes:hard", procedural pairs; "scenes:wrong=0.5" or "scenes:hard,wrong=0.5", half of
    them wrong, and scored; "omniedit:PATH", "ip2p:PATH", "magicbrush:PATH", "ultraedit:PATH", "jsonl:PATH" or
    PATH.jsonl, a file or a folder of files; a folder that was packed.
    split "train", "heldout" or "all" (of scenes: train)."""
    if split not in ("train", "heldout", "all"):
        raise SystemExit(f"error: split: {split!r}: use train, heldout or all")
    kind, colon, rest = spec.partition(":")
    if kind == "scenes":
        from scenes.dataset import EditScenes, parse_spec

        level, wrong = parse_spec(spec)
        return EditScenes("train" if split == "all" else split, wrong or 0.0, level)
    if packed.is_packed(spec):
        return packed.Packed(spec, True, split)
    if not colon and spec.endswith(".jsonl"):
        kind, rest = "jsonl", spec
    if kind not in PRESETS or not rest:
        raise SystemExit(f"error: {spec}: not a set of edit pairs: give scenes, PATH.jsonl, a packed "
                         f"folder, or one of {', '.join(PRESETS)} with :PATH")
    return open_preset(kind, rest, split)


def names_edits(spec):
    """Whether a spec means edit pairs and nothing else."""
    if packed.is_packed(spec):
        return packed.manifest(spec)["plan"]["edits"]
    marked = "wrong=" in spec if spec.partition(":")[0] == "scenes" else ":" in spec
    return marked and not Path(spec).exists() or spec.endswith(".jsonl")
