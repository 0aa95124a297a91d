"""Files from anywhere, read safely: pictures, masks, label maps, captions, JSON lines, rows of parquet.

Nothing here trusts a file: formats are few, sizes are capped before decoding, names must stay in their
folder, and all that is wrong is a BadFile of one line. Masks leave as float32 [h, w], 1 = regenerate.
"""

import hashlib
import io
import json
import math
import os
import re
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # no TIFF or PSD: far larger decoders for untrusted files
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_PIXELS, MAX_SIDE = 64_000_000, 16_384  # refused before decoding: a PNG of 10 kB can claim 400 MB
MAX_CAPTION, MAX_BAD = 2_000, 100  # bytes of UTF-8; bad files before a run stops
CACHE_BYTES = 256 << 20  # parquet row groups kept per process
HELDOUT = 0.05  # of a source that has no held-out part of its own
HELDOUT_NAMES = ("heldout", "val", "valid", "validation", "test", "dev")


class BadFile(SystemExit):
    """A file that cannot be used. Uncaught it ends the program with one line; loaders catch it and skip."""

    def __init__(self, name, problem, fix):
        super().__init__(f"error: {printable(str(name))}: {problem}: {fix}")


class EmptyPart(SystemExit):
    """A set that can be read, and has nothing in the split that was asked for."""


def printable(text):
    """Text with every run of spaces and control characters (they would reach terminals) made one space."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]+", " ", text).strip()


def too_many(bad, read, limit=MAX_BAD):
    """Ten bad files are always forgiven, then a tenth of what was read, and never more than `limit`."""
    return bad > min(limit, max(10, read / 10))


#### 1. pictures, masks, captions ############################################################################
def _open(source, name):
    """PIL image from a path or bytes, header only; refuses unknown formats and sizes beyond the caps."""
    name = name or ("picture in memory" if isinstance(source, bytes) else source)
    if not isinstance(source, bytes) and not os.path.isfile(source):
        raise BadFile(name, "no such file", "correct the path or remove the row")
    try:
        im = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except Image.DecompressionBombError:
        raise BadFile(name, f"more than {MAX_PIXELS:,} pixels", "scale it down") from None
    except Exception:  # decoders raise anything on a hostile header: struct.error, SyntaxError, zlib.error
        raise BadFile(name, "not a readable picture", f"use one of {', '.join(FORMATS)}") from None
    w, h = im.size
    if w * h > MAX_PIXELS or max(w, h) > MAX_SIDE:
        raise BadFile(name, f"{w}x{h} is over {MAX_PIXELS:,} pixels or {MAX_SIDE:,} a side", "scale it down")
    return im, name


def _turned(im):
    """Whether EXIF turns the picture by 90 degrees. A damaged EXIF block does not make a picture unusable."""
    try:
        return im.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception:
        return False


def _decode(im, name):
    try:
        im.load()  # verify() passes on a truncated JPEG; only decoding finds it
    except Exception as e:
        raise BadFile(name, f"damaged ({printable(str(e))[:80]})", "repair or remove it") from None
    try:
        ImageOps.exif_transpose(im, in_place=True)
    except Exception:
        pass
    return im


def _luma(im):
    """Picture of any mode -> float32 [h, w] in [0, 1]. 16 bit is scaled; Pillow's own I;16 -> L saturates."""
    deep = im.mode.startswith("I")
    return np.clip(np.asarray(im if deep else im.convert("L"), np.float32) / (65535 if deep else 255), 0, 1)


def image_size(source, name=None):
    """(h, w) as `read_image` would return it, from the header alone."""
    im, name = _open(source, name)
    return im.size if _turned(im) else im.size[::-1]


def read_image(source, name=None, cover=None):
    """Path or bytes of a picture -> RGB uint8 [h, w, 3]. Raises BadFile.

    EXIF orientation is applied, 16 bit is scaled, transparency is composited on white (`convert("RGB")` would
    show the colours hidden under it). With `cover=(h, w)` a JPEG may be decoded at a fraction of its size
    that still covers twice (h, w), which is several times faster; resize it antialiased afterwards.
    """
    im, name = _open(source, name)
    if cover and im.format == "JPEG":
        h, w = cover[::-1] if _turned(im) else cover
        scale = min(1, 2 * max(h / im.height, w / im.width))
        im.draft("RGB", (math.ceil(im.width * scale), math.ceil(im.height * scale)))
    im = _decode(im, name)
    if im.mode.startswith("I"):
        return np.repeat((_luma(im) * 255 + 0.5).astype(np.uint8)[..., None], 3, axis=2)
    if im.has_transparency_data:
        im = im.convert("RGBA")
        im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
    return np.array(im.convert("RGB"))


def read_mask(source, h=None, w=None, name=None, invert=False, log=None, alpha=None):
    """Path or bytes of a mask -> float32 [h, w] in [0, 1], 1 = regenerate. BadFile if it selects nothing.

    Luma, unless an alpha channel varies: then alpha is the mask if what is visible has one colour (UltraEdit:
    painted = regenerate), else the transparent part is (MagicBrush: a hole in a picture). A known convention
    is not guessed: alpha "region" or "hole". `invert` turns the result round. Two values, one of them 0, are
    a binary mask whatever the other is (0/1, 0/255, a palette). Another size is stretched to (h, w), nearest
    if binary, else antialiased. `log` (print) gets the area."""
    im, name = _open(source, name)
    im, how = _decode(im, name), "luma"
    if alpha == "hole" and not im.has_transparency_data:
        raise BadFile(name, "a mask without an alpha channel, where transparent = edit is the rule",
                      "save the hole in alpha, or read white = edit with the preset jsonl")
    rgba = np.asarray(im.convert("RGBA")) if im.has_transparency_data else np.zeros((1, 1, 4), np.uint8)
    if alpha == "hole" or rgba[..., 3].min() < rgba[..., 3].max():
        seen, m = rgba[..., :3][rgba[..., 3] > 127], rgba[..., 3].astype(np.float32) / 255
        hole = alpha == "hole" or not alpha and seen.size and int(np.ptp(seen, axis=0).max()) > 16
        m, how = (1 - m, "transparent part") if hole else (m, "alpha")
    else:
        m = _luma(im if im.mode.startswith("I") else im.convert("RGB"))
    top = m.max(initial=0)
    binary = bool(top > 0 and np.all((m == 0) | (m == top)))
    m = (m > 0).astype(np.float32) if binary else m
    m, own = (1 - m if invert else m), m.shape
    if h and w and own != (h, w):
        kind = Image.Resampling.NEAREST if binary else Image.Resampling.BILINEAR
        m = np.clip(np.asarray(Image.fromarray(m).resize((w, h), kind)), 0, 1)
    if m.max() < 0.5:
        raise BadFile(name, "the mask selects nothing", "paint what is to be regenerated white, or invert")
    if log:
        size = f"{own[1]}x{own[0]}" + (f" stretched to {w}x{h}" if m.shape != own else "")
        area = float(m.mean())
        warn = "" if 0.001 <= area <= 0.99 else " WARNING: nearly nothing or everything"
        log(f"mask {printable(str(name))}: {size}, {how}{' inverted' * invert}, regenerates {area:.1%}{warn}")
    return m


def read_labels(source, name):
    """Label map (grey, 16 bit or palette indices) -> int32 [h, w]."""
    im, name = _open(source, name)
    if im.mode not in ("1", "L", "P", "I;16", "I"):
        raise BadFile(name, f"label map with pixel mode {im.mode}", "save it grey or with a palette")
    return np.array(_decode(im, name)).astype(np.int32)


def clean_caption(text):
    """-> (caption, cut): control characters out, cut to MAX_CAPTION bytes at a whole character."""
    raw = printable(text[: 4 * MAX_CAPTION]).encode("utf-8", "ignore")  # JSON may hold lone surrogates
    cut = len(raw) > MAX_CAPTION or len(text) > 4 * MAX_CAPTION
    return raw[:MAX_CAPTION].decode("utf-8", "ignore"), cut


def inside(root, name, place=None):
    """Path of `name` under the folder `root`; BadFile if it leaves it (absolute, "..", a symbolic link).
    place: the file and line that say so, for the message."""
    if not isinstance(name, str) or not name or "\0" in name or len(name) > 4096:
        raise BadFile(place or root, f"{str(name)[:80]!r} is not a file name", "correct the row")
    base = os.path.realpath(root)
    path = os.path.realpath(os.path.join(base, name))
    if os.path.isabs(name) or os.path.commonpath([base, path]) != base:
        where = f"{place}: {name}" if place else name
        raise BadFile(where, f"leaves the data folder {root}", "move the file into it")
    return path


def checked(rows, check):
    """check(row) of every (place, row), rows with which it raises ValueError named and left out.

    row may itself be a ValueError. -> (results, number of bad rows); SystemExit when there are too many."""
    good, bad = [], 0
    for n, (place, row) in enumerate(rows, 1):
        try:
            if not isinstance(row, dict):
                raise row if isinstance(row, ValueError) else ValueError("not a JSON object")
            good.append(check(row))
        except ValueError as e:
            bad += 1
            problem = BadFile(place, str(e), f"repair or remove it (bad so far: {bad})")
            if too_many(bad, n):
                raise problem from None
            print(f"skipped: {str(problem).removeprefix('error: ')}", file=sys.stderr)
    return good, bad


def json_lines(path, starts=None):
    """Yields (name for messages, row or ValueError) for each line; `starts` gets its number and offset."""
    with open(path, "rb") as f:
        for n, line in enumerate(iter(lambda: f.readline(1 << 20), b""), 1):
            start, row = f.tell() - len(line), None
            try:
                if len(line) == 1 << 20 and line[-1:] != b"\n":
                    while (rest := f.readline(1 << 20)) and rest[-1:] != b"\n":
                        pass
                    row = ValueError("longer than 1 MiB")
                elif line.strip():
                    row = json.loads(line)
            except (ValueError, RecursionError):
                row = ValueError("not JSON in UTF-8")
            if line.strip():
                if starts is not None:
                    starts.extend((n, start))
                yield f"{path} line {n}", row


#### 2. parts and rows #######################################################################################
def held_out(key, fraction):
    """Stable split: a key falls on the same side in every process and version."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "replace")).digest()[:6]) < fraction * 2**48


def part_of(folder, split):
    """A folder's subfolder for a split, and what split is still to be made in it -> (path, split).

    With train/ the held-out part is the folder beside it that has one of HELDOUT_NAMES, if there is one."""
    path = Path(folder)
    if split == "all" or not (path / "train").is_dir():
        return path, split
    held = [path / n for n in HELDOUT_NAMES if (path / n).is_dir()]
    return held[0] if held and split == "heldout" else path / "train", "all" if held else split


def files_of(path, split, suffix):
    """A file, or a folder's files of one suffix, of a split -> (files, the split yet to be made of the rows).

    Files named as in HELDOUT_NAMES (dev-00000-of-00001.parquet) are the held-out part, if there are any."""
    if path.is_file():
        return [path], split
    files = sorted(f for f in path.rglob("*" + suffix) if f.is_file())
    held = [f for f in files if re.split("[-.]", f.name)[0] in HELDOUT_NAMES]
    if split == "all" or not held:
        return files, split
    return held if split == "heldout" else [f for f in files if f not in held], "all"


def _batches(f, g, columns):
    """A row group of a pyarrow ParquetFile in pieces that need at most CACHE_BYTES, or a row at a time.

    A column that is a dictionary and places in it says nothing of what its rows need: a megabyte may become
    gigabytes. But a row is no longer than all the pages of its columns."""
    group = f.metadata.row_group(g)
    wanted = [group.column(k) for k in range(group.num_columns)]
    wanted = [c for c in wanted if c.path_in_schema.split(".")[0] in columns]
    rows = CACHE_BYTES // max(1, sum(c.total_uncompressed_size for c in wanted))
    return f.iter_batches(max(1, min(rows, 65536)), row_groups=[g], columns=columns, use_threads=False)


class RowGroups:
    """Rows of parquet files, read lazily; the row groups last used stay in memory, in each process. A group
    may need twice its pages, or CACHE_BYTES where that is more; one that needs more is refused.

    choose(file, kinds) -> the columns to read of a file, kinds being column -> type in words; it may raise
    BadFile. first [groups + 1] int64: row numbers where row groups begin; window: how many fit in memory."""

    def __init__(self, files, choose):
        import pyarrow.parquet as pq

        self.files, self.pid, self.groups, runs, largest = list(map(str, files)), None, [], [], 1
        for file in self.files:
            try:
                f = pq.ParquetFile(file)
            except Exception as e:  # ArrowInvalid, OSError
                raise BadFile(file, f"not parquet ({printable(str(e))[:80]})", "download it again") from None
            columns = choose(file, {field.name: str(field.type) for field in f.schema_arrow})
            start = sum(runs)
            for g in range(f.metadata.num_row_groups):
                group = f.metadata.row_group(g)
                if group.total_byte_size > 2 << 30:
                    raise BadFile(file, f"row group {g} is over 2 GiB", "write smaller row groups")
                largest = max(largest, group.total_byte_size)
                self.groups.append((file, start, g, columns))
                runs.append(group.num_rows)
        self.window = max(1, CACHE_BYTES // largest)
        self.first = np.concatenate([[0], np.cumsum(runs)]).astype(np.int64)

    def runs(self, rows):
        """How many of the sorted row numbers are in each row group."""
        return np.diff(np.searchsorted(rows, self.first))

    def row(self, n):
        """-> (file, name for messages, cells of the chosen columns, None for a column that is None)."""
        import pyarrow.parquet as pq

        g = int(np.searchsorted(self.first, n, "right")) - 1
        file, start, group, columns = self.groups[g]
        if self.pid != os.getpid():  # a worker starts with its own cache
            self.pid, self.cache = os.getpid(), OrderedDict()
        if g not in self.cache:
            try:
                self.cache[g] = self._group(pq.ParquetFile(file), f"{file} row group {group}", group, columns)
            except BadFile:
                raise
            except Exception as e:
                what = f"damaged ({printable(str(e))[:80]})"
                raise BadFile(f"{file} row group {group}", what, "download the file again") from None
            while len(self.cache) > 1 and sum(t.nbytes for t in self.cache.values()) > CACHE_BYTES:
                self.cache.popitem(last=False)
        self.cache.move_to_end(g)
        at = int(n - self.first[g])
        cells = [self.cache[g][c][at].as_py() if c else None for c in columns]
        return file, f"{file} row {n - start}", cells

    def _group(self, f, name, g, columns):
        import pyarrow as pa

        wanted = list(dict.fromkeys(c for c in columns if c))
        parts, size, most = [], 0, max(CACHE_BYTES, 2 * f.metadata.row_group(g).total_byte_size)
        for part in _batches(f, g, wanted):
            parts, size = parts + [part], size + part.nbytes
            if size > most:
                raise BadFile(name, f"becomes more than {most:,} bytes", "write smaller row groups, "
                              "or without a dictionary")
        schema = f.schema_arrow
        return pa.Table.from_batches(parts, parts[0].schema if parts else schema)

    def light(self, choose):
        """Small columns of every row: choose(names of a file's columns) -> those wanted, None for none.
        Yields (name for messages, list of cells) in the order of the rows, which are read piece by piece;
        BadFile where a file's would need more than 4 CACHE_BYTES."""
        import pyarrow.parquet as pq

        for file in self.files:
            try:
                f = pq.ParquetFile(file)
                columns = choose(f.schema_arrow.names)
                wanted, n, size = list(dict.fromkeys(c for c in columns if c)), 0, 0
                if not wanted:
                    none = (None,) * len(columns)
                    yield from ((f"{file} row {n}", none) for n in range(f.metadata.num_rows))
                    continue
                for g in range(f.metadata.num_row_groups):
                    for part in _batches(f, g, wanted):
                        size += part.nbytes
                        if size > 4 * CACHE_BYTES:
                            raise BadFile(file, f"its texts become more than {4 * CACHE_BYTES:,} bytes",
                                          "cut it into smaller files, or shorten them")
                        lists = [part[c].to_pylist() if c else [None] * len(part) for c in columns]
                        yield from ((f"{file} row {n + k}", cells) for k, cells in enumerate(zip(*lists)))
                        n += len(part)
            except (BadFile, GeneratorExit):
                raise
            except Exception as e:
                what = f"damaged ({printable(str(e))[:80]})"
                raise BadFile(file, what, "download the file again") from None


def picture_cell(value, file, name):
    """A parquet cell that holds a picture (Hugging Face struct {bytes, path}, bytes, or a path under the
    file's folder) -> bytes or path. BadFile if it holds none."""
    value = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
    if not isinstance(value, bytes | str) or not value:
        raise BadFile(name, "no picture in it", "remove the row")
    return inside(os.path.dirname(file) or ".", value) if isinstance(value, str) else value


#### 2. order ################################################################################################
def mix(z):
    """Bits of uint64 [n] scrambled (splitmix64); arithmetic wraps."""
    z = (z + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def size_of(source, i):
    """source.size(i), or square where the file is bad: it is met again, named and counted while loading."""
    try:
        return source.size(i)
    except BadFile:
        return 1, 1
