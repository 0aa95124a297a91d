"""Sources of captioned pictures: a folder, parquet.

A source has len(), .name, .size(i) -> (h, w) or None when it draws at any size, and .load(i, h, w) ->
dict(image uint8 [h', w', 3] covering (h, w) if it can, caption str, segments int [h'', w''] or None).
.texts(n) gives, for each of the first n items, the texts that a loader may draw with it, read without the
pictures ([] where that fails: a loader finds the item bad, too); .fingerprint(n) is a hash over all names.
Optional: .runs and .window, rows that are read together (see data.shuffled).
"""

import os
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np

from readers import packed
from readers.files import (
    HELDOUT,
    MAX_CAPTION,
    BadFile,
    EmptyPart,
    RowGroups,
    bytes_of,
    checked,
    facts,
    files_of,
    hashed,
    held_out,
    image_size,
    inside,
    is_held,
    json_lines,
    mix,
    part_of,
    photo_of,
    picture_cell,
    pictures_of,
    printable,
    read_image,
    read_labels,
    read_mask,
    text_of,
)

CAPTION_COLUMNS = ("caption", "text", "prompt")  # of parquet files
Row = namedtuple("Row", "file caption segments mask")  # caption None: look for NAME.txt


def _metadata_row(row):
    if not isinstance(row.get("file_name"), str):
        raise ValueError("no file_name")
    caption = next((row[k] for k in ("text", "caption", "prompt") if row.get(k) is not None), "")
    if not isinstance(caption, str):
        raise ValueError("the caption is not a string")
    return Row(row["file_name"], caption, row.get("segments"), row.get("mask"))


def column_texts(groups, rows, names):
    """Of the given rows the strings in the first of the named columns, read without the pictures: lists."""
    cells = groups.light(lambda there: [next((c for c in names if c in there), None)])
    rows = iter(rows.tolist())
    row = next(rows, None)
    for k, (_, (cell,)) in enumerate(cells):
        if k == row:
            yield [c for c in (cell if isinstance(cell, list) else [cell]) if isinstance(c, str)]
            row = next(rows, None)


def group_facts(groups, rows):
    """What names the rows of parquet files, for `hashed`."""
    yield from ((os.path.basename(file), bytes_of(file)) for file in groups.files)
    yield [[(start, group) for _, start, group, _ in groups.groups]]
    yield np.asarray(rows, np.int64).tobytes()


class Folder:
    """Folder of pictures with metadata.jsonl as in Hugging Face's imagefolder (file_name; text, caption or
    prompt; perhaps segments = label map, mask = an object's mask), or NAME.txt, NAME.seg.png beside each:
    all files that are pictures of a kind that is read, and a line with the number of the others."""

    def __init__(self, root, split, share):
        self.root, self.name, self.bad_lines, left, texts = str(root), str(root), 0, "", set()
        if (Path(root) / "metadata.jsonl").is_file():
            rows, self.bad_lines = checked(json_lines(Path(root) / "metadata.jsonl"), _metadata_row)
        else:
            found = sorted(os.path.relpath(os.path.join(at, f), root) for at, _, names in os.walk(root)
                           for f in names if not f.startswith("."))
            maps = {f.removesuffix(".seg.png"): f for f in found if f.endswith(".seg.png")}
            files, left = pictures_of(os.path.join(root, f) for f in found if not f.endswith(".seg.png"))
            files, texts = [os.path.relpath(f, root) for f in files], {f for f in found if f.endswith(".txt")}
            rows = [Row(f, None, maps.get(os.path.splitext(f)[0]), None) for f in files]
            self._note(left if rows else "")
        if not rows:
            raise BadFile(root, left or "no pictures", "use metadata.jsonl, parquet, or pictures such as "
                                                       ".jpg, .png, .webp")
        beside = (os.path.splitext(r.file)[0] + ".txt" in texts for r in rows if r.caption is None)
        if split != "heldout" and not any(r.caption for r in rows) and not any(beside):
            self._note("no picture has a caption, so all are used without words: for captions put NAME.txt "
                       "beside NAME.png, or text into metadata.jsonl")
        named = {r.file for r in rows if is_held(r.file, 1)}
        self.rows = [r for r in rows if split == "all" or (
            r.file in named if named else held_out(r.file, share)) == (split == "heldout")]

    def _note(self, words):
        if words and int(os.environ.get("RANK", 0)) == 0:
            print(f"note: {printable(self.root)}: {words}", file=sys.stderr)

    def __len__(self):
        return len(self.rows)

    def size(self, i):
        return image_size(inside(self.root, self.rows[i].file))

    def facts(self, i):
        return facts(inside(self.root, self.rows[i].file))

    def caption(self, i):
        row = self.rows[i]
        text = os.path.splitext(row.file)[0] + ".txt"
        if row.caption is not None or not os.path.isfile(os.path.join(self.root, text)):
            return row.caption or ""
        with open(inside(self.root, text), "rb") as f:
            return text_of(f.read(16 * MAX_CAPTION))

    def load(self, i, h, w):
        row = self.rows[i]
        file, segments = inside(self.root, row.file), None
        image = read_image(file, cover=(h, w))
        if row.segments:
            segments = read_labels(inside(self.root, row.segments), None, photo_of(file))
        elif row.mask:
            segments = (read_mask(inside(self.root, row.mask), photo=photo_of(file)) > 0.5).astype(np.int32)
        return dict(image=image, caption=self.caption(i), segments=segments)

    def texts(self, n):
        for i in range(n):
            try:
                yield [self.caption(i)]
            except BadFile:
                yield []

    def fingerprint(self, n):
        def named():
            for row in self.rows:
                yield row, bytes_of(os.path.join(self.root, row.file))
                if row.caption is None:
                    yield (bytes_of(os.path.join(self.root, os.path.splitext(row.file)[0] + ".txt")),)

        return hashed([("Folder", n), *named()])


class Parquet:
    """Parquet files with a picture column (Hugging Face struct {bytes, path}, raw bytes, or a path under the
    file's folder) and perhaps captions (string or list)."""

    def __init__(self, files, name, split, share):
        self.name, self.groups = name, RowGroups(files, self._columns)
        self.window, self.rows = self.groups.window, np.arange(self.groups.first[-1])
        if split != "all":
            held = mix(self.rows.astype(np.uint64)) < np.uint64(share * 2**63) * np.uint64(2)
            self.rows = self.rows[held == (split == "heldout")]
        self.runs = self.groups.runs(self.rows)

    @staticmethod
    def _columns(file, kinds):
        structs = [n for n, t in kinds.items() if t.startswith("struct<bytes")]
        found = [n for n in ("image", "img", "jpg", "png", "image_path") if n in kinds] + structs
        captions = [n for n in CAPTION_COLUMNS if n in kinds]
        if not found:
            raise BadFile(file, f"no picture column among {', '.join(kinds) or 'its none'}",
                          "name it image: a struct {bytes, path}, bytes or a path")
        if len(found) > 1 and found == structs:
            raise BadFile(file, f"several picture columns ({', '.join(structs[:3])}), none is named image",
                          "name one image; edit pairs are read as omniedit:PATH, ip2p:PATH, magicbrush:PATH "
                          "or ultraedit:PATH")
        return found[0], captions[0] if captions else None

    def __len__(self):
        return len(self.rows)

    def _picture(self, i):
        """-> (bytes or path, name for messages, caption cell)."""
        file, name, (picture, caption) = self.groups.row(self.rows[i])
        return picture_cell(picture, file, name), name, caption

    def size(self, i):
        return image_size(*self._picture(i)[:2])

    def facts(self, i):
        return facts(*self._picture(i)[:2])

    def load(self, i, h, w):
        picture, name, caption = self._picture(i)
        texts = [c for c in (caption if isinstance(caption, list) else [caption]) if isinstance(c, str)]
        image = read_image(picture, name, cover=(h, w))
        return dict(image=image, caption=texts[0] if texts else "", segments=None)

    def texts(self, n):
        return (found[:1] or [""] for found in column_texts(self.groups, self.rows, CAPTION_COLUMNS))

    def fingerprint(self, n):
        return hashed([("Parquet", n), *group_facts(self.groups, self.rows)])


def open_source(spec, split="train"):
    """"scenes", "scenes:hard", a folder of pictures, a parquet file or a folder of them, or a folder that was
    packed -> source; SystemExit on all else.

    split "train", "heldout" or "all". A folder's held-out part is its subfolder or parquet files of a name in
    HELDOUT_NAMES, with a train/ beside it or without; where there is none 5% of the rows, by a hash of the
    file name or row number."""
    if split not in ("train", "heldout", "all"):
        raise SystemExit(f"error: split: {split!r}: use train, heldout or all")
    if spec.partition(":")[0] == "scenes":
        from scenes.dataset import Scenes, parse_spec

        level, wrong = parse_spec(spec)
        if wrong is not None:
            raise SystemExit(f"error: {spec}: only edit pairs can be wrong: leave out wrong=")
        return Scenes("train" if split == "all" else split, level)
    path, share = Path(spec), HELDOUT
    if not path.exists() or path.is_file() and path.suffix != ".parquet":
        problem = "not a data source" if path.exists() else "no such file or folder"
        raise SystemExit(f"error: {spec}: {problem}: give scenes, a folder of pictures or a .parquet file")
    if packed.is_packed(path):
        return packed.Packed(path, False, split)
    if not (path / "metadata.jsonl").is_file():
        path, split = part_of(path, split)
    files = []
    if not (path / "metadata.jsonl").is_file():
        files, split = files_of(path, split, ".parquet")
    source = Parquet(files, str(path), split, share) if files else Folder(path, split, share)
    if not len(source):
        raise EmptyPart(f"error: {spec}: no pictures in its {split} part: add some")
    return source
