"""Pictures, captions and masks from any source, in one batch format.

    python data.py check photos/        # counts, broken files, shapes, captions, mask areas, a sample sheet

Readers of untrusted files, sources, geometry, masks (ByteEdit Sec. 4.1), order, loaders, preferences, check.
Masks are 1 where the picture is to be regenerated. Pictures leave this file as float [-1, 1].
"""

import hashlib
import io
import json
import math
import os
import re
import signal
import sys
from collections import Counter, OrderedDict, namedtuple
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # no TIFF or PSD: far larger decoders for untrusted files
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_PIXELS, MAX_SIDE = 64_000_000, 16_384  # refused before decoding: a PNG of 10 kB can claim 400 MB
MAX_CAPTION, MAX_BAD = 2_000, 100  # bytes of UTF-8; bad files before a run stops
CACHE_BYTES = 256 << 20  # parquet row groups kept per process
HELDOUT = 0.05  # of a source that has no held-out part of its own
HELDOUT_NAMES = ("heldout", "val", "valid", "validation", "test", "dev")
ERASE_PROMPT = "empty background, nothing there"

# How often a sample gets each task and loses its caption: ours, the paper gives no probabilities
TASKS = {"t2i": 0.10, "inpaint": 0.30, "edit": 0.25, "outpaint": 0.25, "erase": 0.10}
PROMPT_FREE = {"t2i": 0.0, "inpaint": 0.1, "edit": 0.0, "outpaint": 0.5, "erase": 0.0}


class BadFile(SystemExit):
    """A file that cannot be used. Uncaught it ends the program with one line; loaders catch it and skip."""

    def __init__(self, name, problem, fix):
        super().__init__(f"error: {printable(str(name))}: {problem}: {fix}")


def printable(text):
    """Text with every run of spaces and control characters (they would reach terminals) made one space."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]+", " ", text).strip()


def too_many(bad, read, limit=MAX_BAD):
    """Ten bad files are always forgiven, then a tenth of what was read, and never more than `limit`."""
    return bad > min(limit, max(10, read / 10))


#### 1. readers ##############################################################################################
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


def read_mask(source, h=None, w=None, name=None, invert=False, log=None):
    """Path or bytes of a mask -> float32 [h, w] in [0, 1], 1 = regenerate. BadFile if it selects nothing.

    Luma, unless an alpha channel varies: then alpha is the mask if what is visible has one colour (UltraEdit:
    painted = regenerate), else the transparent part is (MagicBrush: a hole in a picture). `invert` turns the
    result round. Two values, one of them 0, are a binary mask whatever the other is (0/1, 0/255, a palette).
    Another size is stretched to (h, w), nearest if binary, else antialiased. `log` (print) gets the area."""
    im, name = _open(source, name)
    im, how = _decode(im, name), "luma"
    rgba = np.asarray(im.convert("RGBA")) if im.has_transparency_data else np.zeros((1, 1, 4), np.uint8)
    if rgba[..., 3].min() < rgba[..., 3].max():
        seen, m = rgba[..., :3][rgba[..., 3] > 127], rgba[..., 3].astype(np.float32) / 255
        hole = seen.size and int(np.ptp(seen, axis=0).max()) > 16
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


def _read_labels(source, name):
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


def inside(root, name):
    """Path of `name` under the folder `root`; BadFile if it leaves it (absolute, "..", a symbolic link)."""
    if not isinstance(name, str) or not name or "\0" in name or len(name) > 4096:
        raise BadFile(root, f"{str(name)[:80]!r} is not a file name", "correct the row")
    base = os.path.realpath(root)
    path = os.path.realpath(os.path.join(base, name))
    if os.path.isabs(name) or os.path.commonpath([base, path]) != base:
        raise BadFile(name, f"leaves the data folder {root}", "move the file into it")
    return path


def _checked(rows, check):
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


def _json_lines(path):
    with open(path, "rb") as f:
        for n, line in enumerate(iter(lambda: f.readline(1 << 20), b""), 1):
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                row = ValueError("not JSON, or longer than 1 MiB")
            if line.strip():
                yield f"{path} line {n}", row


#### 2. sources ##############################################################################################
# A source has len(), .name, .size(i) -> (h, w) or None when it draws at any size, and .load(i, h, w) ->
# dict(image uint8 [h', w', 3] covering (h, w) if it can, caption str, segments int [h'', w''] or None).
# Optional: .runs and .window, rows that are read together (see `shuffled`).
def held_out(key, fraction):
    """Stable split: a key falls on the same side in every process and version."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "replace")).digest()[:6]) < fraction * 2**48


Row = namedtuple("Row", "file caption segments mask")  # caption None: look for NAME.txt


def _metadata_row(row):
    if not isinstance(row.get("file_name"), str):
        raise ValueError("no file_name")
    caption = next((row[k] for k in ("text", "caption", "prompt") if row.get(k) is not None), "")
    if not isinstance(caption, str):
        raise ValueError("the caption is not a string")
    return Row(row["file_name"], caption, row.get("segments"), row.get("mask"))


class Folder:
    """Folder of pictures with metadata.jsonl as in Hugging Face's imagefolder (file_name; text, caption or
    prompt; perhaps segments = label map, mask = an object's mask), or NAME.txt, NAME.seg.png beside each."""

    def __init__(self, root, split, share):
        self.root, self.name, self.bad_lines = str(root), str(root), 0
        if (Path(root) / "metadata.jsonl").is_file():
            rows, self.bad_lines = _checked(_json_lines(Path(root) / "metadata.jsonl"), _metadata_row)
        else:
            files = sorted(os.path.relpath(os.path.join(at, f), root) for at, _, names in os.walk(root)
                           for f in names if f.lower().endswith(SUFFIXES) and not f.startswith("."))
            maps = {f.removesuffix(".seg.png"): f for f in files if f.endswith(".seg.png")}
            rows = [Row(f, None, maps.get(os.path.splitext(f)[0]), None) for f in files
                    if not f.endswith(".seg.png")]
        if not rows:
            raise BadFile(root, "no pictures", f"use metadata.jsonl, parquet or {', '.join(SUFFIXES)}")
        self.rows = [r for r in rows if split == "all" or held_out(r.file, share) == (split == "heldout")]

    def __len__(self):
        return len(self.rows)

    def size(self, i):
        return image_size(inside(self.root, self.rows[i].file))

    def load(self, i, h, w):
        row = self.rows[i]
        image, caption, segments = read_image(inside(self.root, row.file), cover=(h, w)), row.caption, None
        if caption is None:
            text = os.path.splitext(row.file)[0] + ".txt"
            caption = ""
            if os.path.isfile(os.path.join(self.root, text)):
                with open(inside(self.root, text), "rb") as f:
                    caption = f.read(16 * MAX_CAPTION).decode("utf-8", "replace")
        if row.segments:
            segments = _read_labels(inside(self.root, row.segments), None)
        elif row.mask:
            segments = (read_mask(inside(self.root, row.mask)) > 0.5).astype(np.int32)
        return dict(image=image, caption=caption, segments=segments)


class Parquet:
    """Parquet files with a picture column (Hugging Face struct {bytes, path}, raw bytes, or a path under the
    file's folder) and perhaps captions (string or list). The row groups last used stay in memory."""

    def __init__(self, files, name, split, share):
        import pyarrow.parquet as pq

        self.name, self.pid, self.groups, runs, largest = name, None, [], [], 1
        for file in map(str, files):
            try:
                f = pq.ParquetFile(file)
            except Exception as e:  # ArrowInvalid, OSError
                raise BadFile(file, f"not parquet ({printable(str(e))[:80]})", "download it again") from None
            kinds = {field.name: str(field.type) for field in f.schema_arrow}
            structs = [n for n, t in kinds.items() if t.startswith("struct<bytes")]
            pictures = [n for n in ("image", "img", "jpg", "png", "image_path") if n in kinds] + structs
            captions = [n for n in ("caption", "text", "prompt") if n in kinds]
            if not pictures:
                raise BadFile(file, f"no picture column among {', '.join(kinds) or 'its none'}",
                              "name it image: a struct {bytes, path}, bytes or a path")
            for g in range(f.metadata.num_row_groups):
                group = f.metadata.row_group(g)
                if group.total_byte_size > 2 << 30:
                    raise BadFile(file, f"row group {g} is over 2 GiB", "write smaller row groups")
                largest = max(largest, group.total_byte_size)
                self.groups.append((file, g, pictures[0], captions[0] if captions else None))
                runs.append(group.num_rows)
        self.window = max(1, CACHE_BYTES // largest)
        self.first = np.concatenate([[0], np.cumsum(runs)]).astype(np.int64)
        self.rows = np.arange(self.first[-1])
        if split != "all":
            held = _mix(self.rows.astype(np.uint64)) < np.uint64(share * 2**63) * np.uint64(2)
            self.rows = self.rows[held == (split == "heldout")]
        self.runs = np.diff(np.searchsorted(self.rows, self.first))

    def __len__(self):
        return len(self.rows)

    def _row(self, i):
        """-> (file, picture cell, caption cell)."""
        import pyarrow.parquet as pq

        g = int(np.searchsorted(self.first, self.rows[i], "right")) - 1
        file, group, picture, caption = self.groups[g]
        if self.pid != os.getpid():  # a worker starts with its own cache
            self.pid, self.cache = os.getpid(), OrderedDict()
        if g not in self.cache:
            try:
                columns = [picture, caption] if caption else [picture]
                self.cache[g] = pq.ParquetFile(file).read_row_group(group, columns=columns)
            except Exception as e:
                what = f"damaged ({printable(str(e))[:80]})"
                raise BadFile(f"{file} row group {group}", what, "download the file again") from None
            while len(self.cache) > 1 and sum(t.nbytes for t in self.cache.values()) > CACHE_BYTES:
                self.cache.popitem(last=False)
        self.cache.move_to_end(g)
        row = int(self.rows[i] - self.first[g])
        return file, *(self.cache[g][c][row].as_py() if c else "" for c in (picture, caption))

    def _picture(self, i):
        """-> (bytes or path, name for messages, caption cell)."""
        file, value, caption = self._row(i)
        value = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
        name = f"{file} row {self.rows[i]}"
        if not isinstance(value, bytes | str) or not value:
            raise BadFile(name, "no picture in it", "remove the row")
        return inside(os.path.dirname(file) or ".", value) if isinstance(value, str) else value, name, caption

    def size(self, i):
        return image_size(*self._picture(i)[:2])

    def load(self, i, h, w):
        picture, name, caption = self._picture(i)
        texts = [c for c in (caption if isinstance(caption, list) else [caption]) if isinstance(c, str)]
        image = read_image(picture, name, cover=(h, w))
        return dict(image=image, caption=texts[0] if texts else "", segments=None)


def open_source(spec, split="train"):
    """"scenes", a folder of pictures, a parquet file or a folder of them -> source; SystemExit on all else.

    split "train", "heldout" or "all". A folder's held-out part is its subfolder or parquet files of a name in
    HELDOUT_NAMES, otherwise 5% of the rows, by a hash of the file name or row number."""
    if split not in ("train", "heldout", "all"):
        raise SystemExit(f"error: split: {split!r}: use train, heldout or all")
    if spec == "scenes":
        from scenes import Scenes

        return Scenes(split)
    path, share = Path(spec), HELDOUT
    if not path.exists() or path.is_file() and path.suffix != ".parquet":
        problem = "not a data source" if path.exists() else "no such file or folder"
        raise SystemExit(f"error: {spec}: {problem}: give scenes, a folder of pictures or a .parquet file")
    if path.is_file():
        source = Parquet([path], str(path), split, share)
    else:
        if split != "all" and (path / "train").is_dir() and not (path / "metadata.jsonl").is_file():
            held = [path / n for n in HELDOUT_NAMES if (path / n).is_dir()]
            path = held[0] if held and split == "heldout" else path / "train"
            split = "all" if held else split
        files = [] if (path / "metadata.jsonl").is_file() else sorted(path.rglob("*.parquet"))
        held = [f for f in files if re.split("[-.]", f.name)[0] in HELDOUT_NAMES]
        if held and split != "all":
            files, split = held if split == "heldout" else [f for f in files if f not in held], "all"
        source = Parquet(files, str(path), split, share) if files else Folder(path, split, share)
    if not len(source):
        raise SystemExit(f"error: {spec}: no pictures in its {split} part: add some, or open split all")
    return source


#### 3. geometry #############################################################################################
SCENE_RATIOS = (1, 2 / 3, 3 / 2, 3 / 4, 4 / 3, 9 / 16, 16 / 9)  # the seven of OmniEdit
RATIOS = SCENE_RATIOS + (1 / 2, 2, 1 / 3, 3, 1 / 4, 4)


@lru_cache(maxsize=None)
def shapes(image_size, stride, ratios=RATIOS):
    """(h, w) of every ratio h / w: multiples of `stride` with about image_size**2 pixels."""
    if image_size < stride or image_size % stride:
        raise SystemExit(f"error: image_size: {image_size}: use a multiple of {stride}")
    sides = [[round(image_size * s / stride) * stride or stride for s in (r**0.5, r**-0.5)] for r in ratios]
    return tuple(dict.fromkeys(map(tuple, sides)))


def bucket(h, w, image_size, stride, aspects):
    """Shape (h', w') at which a picture of (h, w) is used: the one rule for caching, training and sampling.

    Without `aspects` a square; else, of the shapes 1:4 to 4:1 of equal area, the nearest in log ratio."""
    if not aspects:
        return shapes(image_size, stride, (1,))[0]
    return min(shapes(image_size, stride), key=lambda s: (round(abs(math.log(h * s[1] / (w * s[0]))), 9), s))


def fit(image, h, w, y=0.5, x=0.5, segments=None):
    """Resize to cover (h, w) and crop at (y, x) in [0, 1], 0.5 = centre. uint8 [h', w', 3] -> [h, w, 3].

    segments of any size, taken as stretched to the picture, get the same crop, nearest -> int32 [h, w]."""
    ih, iw = image.shape[:2]
    scale = max(h / ih, w / iw)
    bh, bw = min(ih, h / scale), min(iw, w / scale)
    top, left = y * (ih - bh), x * (iw - bw)

    def crop(im, how, gap=None):
        sy, sx = im.height / ih, im.width / iw
        box = (left * sx, top * sy, min(im.width, (left + bw) * sx), min(im.height, (top + bh) * sy))
        return np.array(im.resize((w, h), how, box, gap))

    if segments is not None:
        segments = np.asarray(segments, np.int32)
        if (ih, iw) != (h, w) or segments.shape != (h, w):
            segments = crop(Image.fromarray(segments), Image.Resampling.NEAREST)
    if (ih, iw) != (h, w):
        image = crop(Image.fromarray(image), Image.Resampling.LANCZOS, 3.0)
    return image, segments


#### 4. masks ################################################################################################
# Kinds as in ByteEdit Sec. 4.1; every size and probability is ours, the paper gives none.
def dilate(m, r):
    """bool [h, w] grown by r pixels in every direction (a square), in time independent of r."""
    for axis in (0, 1) if r > 0 else ():
        n, c = m.shape[axis], np.cumsum(m, axis, dtype=np.int32)
        after, before = np.arange(n) + r, np.arange(n) - r - 1
        first = (before >= 0)[:, None] if axis == 0 else before >= 0
        m = c.take(np.minimum(after, n - 1), axis) > c.take(np.maximum(before, 0), axis) * first
    return m


def _box(m):
    ys, xs = np.flatnonzero(m.any(1)), np.flatnonzero(m.any(0))
    return int(ys[0]), int(xs[0]), int(ys[-1]) + 1, int(xs[-1]) + 1


def _strokes(h, w, rng, area, box=None):
    """Brush strokes along random walks from `box` (top, left, bottom, right) on, until `area` is covered."""
    im = Image.new("L", (w, h))
    draw, side = ImageDraw.Draw(im), math.sqrt(h * w)
    top, left, bottom, right = box or (0, 0, h, w)
    for _ in range(16):
        n, width = int(rng.integers(4, 9)), max(2, int(side * rng.uniform(0.08, 0.2)))
        angle = rng.uniform(0, 2 * math.pi) + np.cumsum(rng.normal(0, 0.8, n))
        step = side * rng.uniform(0.05, 0.2, n)
        xs = np.clip(rng.uniform(left, right) + np.cumsum(step * np.cos(angle)), 0, w - 1)
        ys = np.clip(rng.uniform(top, bottom) + np.cumsum(step * np.sin(angle)), 0, h - 1)
        path, r = np.stack([xs, ys], 1).tolist(), width / 2
        draw.line([tuple(p) for p in path], fill=1, width=width)
        for px, py in path:  # round joints: joint="curve" is slower
            draw.ellipse((px - r, py - r, px + r, py + r), fill=1)
        m = np.asarray(im)
        if m.mean() >= area:
            break
    return m.astype(bool)


def _rectangle(h, w, rng, area, centre=None):
    rh = min(h, max(1, round(math.sqrt(area * h * w * 2 ** rng.uniform(-1, 1)))))
    rw = min(w, max(1, round(area * h * w / rh)))
    y, x = int(rng.integers(h - rh + 1)), int(rng.integers(w - rw + 1))
    if centre:
        y, x = max(0, centre[0] - rh // 2), max(0, centre[1] - rw // 2)
    m = np.zeros((h, w), bool)
    m[y:y + rh, x:x + rw] = True
    return m


def _outward(h, w, rng):
    """Keep a window and regenerate around it, on 1 to 4 sides; of each extended axis 15% to 60% is new."""
    sides = set(rng.permutation(4)[:rng.integers(1, 5)].tolist())
    spans = []
    for n, before, after in ((h, 0, 1), (w, 2, 3)):
        new, part = rng.uniform(0.15, 0.6) * n, rng.uniform(0.3, 0.7)
        part = part if {before, after} <= sides else float(before in sides)
        lo = max(1, round(new * part)) if before in sides else 0
        hi = n - max(1, round(new * (1 - part))) if after in sides else n
        spans.append(slice(min(lo, n - 1), max(min(lo, n - 1) + 1, hi)))
    m = np.ones((h, w), bool)
    m[tuple(spans)] = False
    return m


def instances(segments):
    """Label map -> (labels of instances, bool map of what erasing must not touch).

    With a background label 0: the other labels of at least 0.2% of the picture. Without (BSDS500: a label per
    region): regions of 1% to 50%, and if these leave no background, the largest region counts as it."""
    area = np.bincount(segments.ravel()) / segments.size  # [labels], labels are small and not negative
    if area[0] > 0:
        return np.flatnonzero(area[1:] >= 0.002) + 1, segments != 0
    keep = (area >= 0.01) & (area <= 0.5)
    solid = keep.copy()
    solid[area.argmax()] &= area[~solid].sum() >= 0.05
    return np.flatnonzero(keep), solid[segments]


def make_mask(kind, h, w, rng, segments=None):
    """One mask, float32 [h, w] of 0 and 1 (1 = regenerate), or None if `segments` lacks what the kind needs.

    global      everything
    irregular   brush strokes, 5% to about 50% of the picture
    square      one rectangle, 5% to 50%, sides 1:2 to 2:1
    outward     all but a window
    instance    an instance of the label map, dilated by 1% to 8% of the side and joined (70%) with strokes or
                a rectangle around it; None without an instance
    background  for erasing: the shape of an instance put elsewhere, strokes or a rectangle, never on an
                instance or the pixels beside it; anywhere without a label map; None if no background is left
    """
    side = math.sqrt(h * w)
    if kind == "global":
        m = np.ones((h, w), bool)
    elif kind == "irregular":
        m = _strokes(h, w, rng, rng.uniform(0.05, 0.45))
    elif kind == "square":
        m = _rectangle(h, w, rng, rng.uniform(0.05, 0.5))
    elif kind == "outward":
        m = _outward(h, w, rng)
    elif kind == "instance":
        labels = instances(segments)[0] if segments is not None else ()
        if not len(labels):
            return None
        one = segments == labels[rng.integers(len(labels))]
        m, (top, left, bottom, right) = dilate(one, max(1, round(side * rng.uniform(0.01, 0.08)))), _box(one)
        around, grow = rng.random(), side * rng.uniform(0, 0.15)
        if around < 0.35:
            m = m | _strokes(h, w, rng, 0.02, (top - grow, left - grow, bottom + grow, right + grow))
        elif around < 0.7:
            m[int(max(0, top - grow)):int(bottom + grow), int(max(0, left - grow)):int(right + grow)] = True
    elif kind == "background":
        labels, solid = instances(segments) if segments is not None else ((), np.zeros((h, w), bool))
        solid = dilate(solid, max(1, round(side / 64)) if len(labels) else 0)
        free = np.flatnonzero(~solid)
        if not len(free):
            return None
        for _ in range(4):
            y, x = divmod(int(free[rng.integers(len(free))]), w)
            what, area = rng.random(), rng.uniform(0.03, 0.25)
            if what < 0.5 and len(labels):
                one = segments == labels[rng.integers(len(labels))]
                top, left, bottom, right = _box(one)
                y, x = rng.integers(h - bottom + top + 1), rng.integers(w - right + left + 1)
                m = np.zeros((h, w), bool)
                m[y:y + bottom - top, x:x + right - left] = one[top:bottom, left:right]
                m = dilate(m, max(1, round(side * rng.uniform(0.01, 0.06))))
            else:
                shape = (_strokes, area / 2, (y, x, y, x)) if what < 0.75 else (_rectangle, area, (y, x))
                m = shape[0](h, w, rng, *shape[1:])
            m = m & ~solid
            if m.mean() >= 0.01:
                break
        if not m.any():
            m.flat[free[rng.integers(len(free))]] = True
    else:
        raise ValueError(f"mask kind {kind!r}")
    return m.astype(np.float32)


def task_mask(task, h, w, rng, segments=None):
    """(mask, task): "t2i" global, "inpaint" irregular or square, "edit" instance, "outpaint" outward, "erase"
    background. Without an instance to edit, or background to erase from, the task becomes "inpaint"."""
    kind = {"t2i": "global", "edit": "instance", "outpaint": "outward", "erase": "background"}.get(task)
    if kind and (m := make_mask(kind, h, w, rng, segments)) is not None:
        return m, task
    return make_mask("irregular" if rng.random() < 0.5 else "square", h, w, rng), "inpaint"


#### 5. order ################################################################################################
def _mix(z):
    """Bits of uint64 [n] scrambled (splitmix64); arithmetic wraps."""
    z = (z + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permute(i, n, key):
    """Keyed bijection of [0, n), applied to integers [k] -> int64 [k]: a shuffle that is never stored.

    A Feistel network on an even number of bits, walked until it lands below n. key: tuple of ints >= 0."""
    half = np.uint64(max(3, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    x = np.array(i, np.uint64)
    todo, round_keys = np.arange(len(x)), np.random.SeedSequence(key).generate_state(6, np.uint64)
    while len(todo):
        left, right = x[todo] >> half, x[todo] & low
        for k in round_keys:
            left, right = right, left ^ (_mix(right + k) & low)
        x[todo] = (left << half) | right
        todo = todo[x[todo] >= n]
    return x.astype(np.int64)


def shuffled(i, runs, window, key, run_key):
    """As `permute` over sum(runs), but rows of `window` runs (parquet row groups, in shuffled order) stay
    together, so that only so many need be in memory. When one window holds all, it is a plain permutation."""
    runs, i = np.asarray(runs, np.int64), np.asarray(i, np.int64)
    if len(runs) <= window:
        return permute(i, int(runs.sum()), key)
    order = permute(np.arange(len(runs)), len(runs), run_key)
    ends = np.cumsum(runs[order])
    out, block = np.empty_like(i), np.searchsorted(ends, i, "right") // window
    for b in np.unique(block).tolist():
        start, stop = (ends[b * window - 1] if b else 0), ends[min((b + 1) * window, len(ends)) - 1]
        out[block == b] = start + permute(i[block == b] - start, int(stop - start), (*key, b))
    run = np.searchsorted(ends, out, "right")
    return (np.cumsum(runs) - runs)[order[run]] + out - (ends - runs[order])[run]


# What one rank loads at a step. slot int64 [B] counts within the bucket; copy > 0 where it wrapped round.
Request = namedtuple("Request", "step epoch shape bucket slot copy position wrapped")


def _size(source, i):
    """source.size(i), or square where the file is bad: it is met again, named and counted while loading."""
    try:
        return source.size(i)
    except BadFile:
        return 1, 1


class Sampler:
    """Endless order of a source: `request(step)` is a pure function of (seed, step, rank, world).

    In an epoch every bucket is shuffled and cut into global batches of world * batch_size, the last filled by
    wrapping round. All ranks have the same bucket at a step; buckets are interleaved evenly. A source that
    draws at any size has one bucket whose shape, with `aspects`, is drawn for every global batch."""

    def __init__(self, source, image_size, batch_size, seed, rank, world, aspects, stride):
        if batch_size < 1:
            raise SystemExit(f"error: batch_size: {batch_size}: must be at least 1")
        self.seed, self.rank, self.batch, self.total = seed % 2**63, rank, batch_size, batch_size * world
        n, self.window, self.drawn = len(source), getattr(source, "window", 1), False
        runs = np.asarray(getattr(source, "runs", [n]))
        self.shapes, self.runs, self.members = shapes(image_size, stride, (1,)), [runs], [None]
        if aspects and _size(source, 0) is None:
            self.shapes, self.drawn = shapes(image_size, stride, SCENE_RATIOS), True
        elif aspects:
            every, which = shapes(image_size, stride), np.zeros(n, np.int64)
            for i in range(n):
                which[i] = every.index(bucket(*_size(source, i), image_size, stride, True))
            used, ends = np.unique(which), np.cumsum(runs)
            self.shapes, self.members = [every[b] for b in used], [np.flatnonzero(which == b) for b in used]
            run_of = np.searchsorted(ends, np.arange(n), "right")
            self.runs = [np.bincount(run_of[m], minlength=len(runs)) for m in self.members]
        self.count = [n if m is None else len(m) for m in self.members]
        self.batches = [-(-c // self.total) for c in self.count]

    def __len__(self):
        return sum(self.batches)  # steps in an epoch

    def summary(self):
        if self.drawn:
            return f"{self.count[0]:,} pictures drawn at " + ", ".join(f"{w}x{h}" for h, w in self.shapes)
        extra = len(self) * self.total - sum(self.count)
        return (f"{sum(self.count):,} items, {len(self):,} steps an epoch, {extra:,} repeated to fill them: "
                + ", ".join(f"{w}x{h} {c:,}" for (h, w), c in zip(self.shapes, self.count)))

    @lru_cache(maxsize=8)
    def _schedule(self, epoch):
        """(bucket, batch) of every step of an epoch: each bucket in its own order, all at an even pace."""
        rng = np.random.default_rng([self.seed, epoch, 1])
        pace = np.concatenate([(np.arange(k) + rng.random(k)) / k for k in self.batches])
        order = np.argsort(pace, kind="stable")
        return (np.repeat(np.arange(len(self.batches)), self.batches)[order],
                np.concatenate([np.arange(k) for k in self.batches])[order])

    def request(self, step):
        epoch, k = divmod(step, len(self))
        b, j = (0, k) if len(self.batches) == 1 else (int(a[k]) for a in self._schedule(epoch))
        at = np.arange(self.total) + j * self.total
        wrapped = int((at >= self.count[b]).sum())
        position = list(range(self.rank * self.batch, (self.rank + 1) * self.batch))
        at, keys = at[position], ((self.seed, epoch, 2, b), (self.seed, epoch, 3))
        slot = shuffled(at % self.count[b], self.runs[b], self.window, *keys)
        draw = np.random.default_rng([self.seed, step, 4]).integers(len(self.shapes)) if self.drawn else b
        return Request(step, epoch, self.shapes[draw], b, slot, at // self.count[b], position, wrapped)

    def index(self, b, slot):
        """Index in the source of a slot; slots past the end wrap round."""
        slot = int(slot) % self.count[b]
        return slot if self.members[b] is None else int(self.members[b][slot])


class Listed:
    """The given indices once, in order; one shape per batch; positions count along the list."""

    def __init__(self, source, indices, image_size, batch_size, rank, world, aspects, stride):
        self.n, self.requests, group, last = len(source), [], [], None
        if bad := [i for i in indices if not 0 <= i < self.n]:
            raise SystemExit(f"error: indices: {bad[0]}: {source.name} has {self.n:,}")
        share = -(-len(indices) // world)
        for p in [*range(rank * share, min((rank + 1) * share, len(indices))), None]:
            size = aspects and p is not None and _size(source, indices[p]) or (1, 1)
            shape = bucket(*size, image_size, stride, aspects)
            if group and (p is None or shape != last or len(group) == batch_size):
                slot = np.array([indices[q] for q in group])
                self.requests.append(Request(0, 0, last, 0, slot, np.zeros_like(slot), group, 0))
                group = []
            group, last = group + [p], shape

    def __len__(self):
        return len(self.requests)

    def summary(self):
        return f"{sum(len(r.slot) for r in self.requests):,} listed, {len(self):,} batches"

    def request(self, k):
        return self.requests[k]

    def index(self, _, slot):
        return int(slot) % self.n


#### 6. loaders ##############################################################################################
def mixture(tasks):
    """Task -> probability, checked and summing to 1. SystemExit on an unknown task or an impossible
    number."""
    for t, p in tasks.items():
        if t not in TASKS or not 0 <= p < math.inf:
            raise SystemExit(f"error: tasks: {t}={p}: use numbers >= 0 for {', '.join(TASKS)}")
    if not any(tasks.values()):
        raise SystemExit("error: tasks: all zero: give at least one a probability")
    return {t: p / sum(tasks.values()) for t, p in tasks.items() if p > 0}


def make_sample(source, tasks, prompt_free, hflip, train, index, h, w, rng, notes):
    """One picture with its task and mask; all randomness is from `rng`, in a fixed order. Raises BadFile."""
    item = source.load(index, h, w)
    y, x, flip, pick, drop = rng.random(5)
    image, segments = fit(item["image"], h, w, *((y, x) if train else (0.5, 0.5)), item.get("segments"))
    if hflip and flip < 0.5:
        image, segments = image[:, ::-1], None if segments is None else segments[:, ::-1]
    edges = np.cumsum(list(tasks.values()))[:-1]
    asked = list(tasks)[int(np.searchsorted(edges, pick, "right"))]
    mask, task = task_mask(asked, h, w, rng, segments)
    free = prompt_free.get(task, PROMPT_FREE[task]) if isinstance(prompt_free, dict) else prompt_free
    caption, cut = clean_caption(item["caption"])
    notes["captions cut"] += cut
    notes[f"{asked} turned into {task}"] += task != asked
    caption = ERASE_PROMPT if task == "erase" else "" if drop < free else caption
    return dict(image=image, mask=mask[None], caption=caption, task=task, segments=segments)


class Batches(torch.utils.data.Dataset):
    """Item s is this rank's whole batch of step s, so that nothing depends on the number of workers.

    make(index, h, w, rng, notes) -> dict of arrays, str or None; if it raises BadFile the next of the bucket
    takes the place. SystemExit must not end a worker: problems travel in the batch, the loader decides."""

    def __init__(self, order, make, seed, max_bad):
        self.order, self.make, self.seed, self.max_bad = order, make, seed % 2**63, max_bad

    def __getitem__(self, step):
        if torch.utils.data.get_worker_info():
            torch.set_num_threads(1)
            for s in (signal.SIGTERM, signal.SIGUSR1):  # Slurm signals the whole group: the trainer must save
                signal.signal(s, signal.SIG_IGN)
        r = self.order.request(step)
        first = [self.order.index(r.bucket, s) for s in r.slot]
        samples, index, bad, notes = [None] * len(first), list(first), {}, Counter(wrapped=r.wrapped)
        for k in np.argsort(first, kind="stable"):  # ascending: neighbours share a row group
            for attempt in range(self.max_bad + 1):
                index[k] = self.order.index(r.bucket, r.slot[k] + attempt)
                rng = np.random.default_rng([self.seed, r.epoch, first[k], int(r.copy[k])])
                try:
                    samples[k] = self.make(index[k], *r.shape, rng, notes)
                    break
                except BadFile as e:
                    bad[index[k]] = str(e)
            else:
                return dict(bad=bad, notes=dict(notes), read=len(first), fatal=True)
        batch = dict(index=torch.tensor(index), position=r.position, step=r.step, epoch=r.epoch)
        for key, value in samples[0].items():
            values = [s[key] for s in samples]
            if not isinstance(value, str):  # pictures stay uint8 here: a quarter of the shared memory
                values = None if any(v is None for v in values) else torch.from_numpy(np.stack(values))
            batch[key] = values
        return batch | dict(bad=bad, notes=dict(notes), read=len(first), fatal=False)


class Loader:
    """Iterator over batches, once through. `summary` says the order in words."""

    def __init__(self, source, order, make, seed, workers, steps, max_bad):
        self.source, self.max_bad, self.summary = source, max_bad, f"{source.name}: {order.summary()}"
        self.steps_per_epoch, self._batches = len(order), None
        self._bad, self._read, self._notes = {}, 0, Counter()
        # its own generator: starting workers would else draw from the global one, and spoil exact resume
        self._loader = torch.utils.data.DataLoader(
            Batches(order, make, seed, max_bad), batch_size=None, sampler=steps or range(len(order)),
            num_workers=workers, persistent_workers=workers > 0, prefetch_factor=4 if workers else None,
            pin_memory=torch.cuda.is_available(), generator=torch.Generator())

    def __iter__(self):
        return self

    def __next__(self):
        if self._batches is None:
            self._batches = iter(self._loader)
        batch = next(self._batches)
        bad, fatal = batch.pop("bad"), batch.pop("fatal")
        self._notes.update(batch.pop("notes"))
        self._read += batch.pop("read") + len(bad)
        for i, problem in bad.items():
            if i not in self._bad:
                print(f"skipped: {problem.removeprefix('error: ')}", file=sys.stderr)
                self._bad[i] = problem
        if fatal or too_many(len(self._bad), self._read, self.max_bad):
            raise SystemExit(f"{list(self._bad.values())[-1]} (the last of {len(self._bad)} bad files among "
                             f"{self._read} read, too many to go on: repair {self.source.name})")
        for key, value in batch.items():
            if torch.is_tensor(value) and value.dtype == torch.uint8:
                batch[key] = value.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)
        return batch

    def stats(self):
        """Counts of this process: read, skipped (distinct files), wrapped (over all ranks), captions cut."""
        return {"read": self._read, "skipped": len(self._bad), **{k: v for k, v in self._notes.items() if v}}

    def close(self):
        self._batches = self._loader = None  # ends the workers


def make_loader(source, image_size, batch_size, tasks=TASKS, seed=0, rank=0, world=1, workers=2, start_step=0,
                aspects=False, stride=8, prompt_free=PROMPT_FREE, hflip=False, max_bad=MAX_BAD):
    """Endless training batches from `start_step`. batch_size is per rank; the batch at step s depends on
    (seed, s, rank, world) alone, and the ranks' batches joined on world * batch_size alone. Random crops.

    batch: image [B, 3, H, W] in [-1, 1]; mask [B, 1, H, W], 1 = regenerate; caption and task, lists of str;
    index int64 [B]; segments int32 [B, H, W] or None; step, epoch; position, places in the global batch.
    tasks: task -> weight. prompt_free: chance that a caption becomes "", one number or per task; erasing says
    ERASE_PROMPT. hflip is off by default: captions say left and right. A bad file is named, counted and
    replaced by the next of its bucket; SystemExit beyond `max_bad` or a tenth of what was read."""
    order = Sampler(source, image_size, batch_size, seed, rank, world, aspects, stride)
    make = partial(make_sample, source, mixture(tasks), prompt_free, hflip, True)
    return Loader(source, order, make, seed, workers, range(start_step, sys.maxsize), max_bad)


def make_eval_batches(source, indices, image_size, batch_size, tasks=TASKS, seed=0, rank=0, world=1,
                      workers=0, aspects=False, stride=8, prompt_free=0.0, max_bad=MAX_BAD):
    """The given pictures once, in order, as `make_loader` batches; centre crops, masks from (seed, index).

    step is 0 and position the place in `indices`, so noise from (seed, step, position) knows no batch size or
    world. Rank r takes the r-th share; a batch ends early at the end and where the shape changes."""
    order = Listed(source, [int(i) for i in indices], image_size, batch_size, rank, world, aspects, stride)
    make = partial(make_sample, source, mixture(tasks), prompt_free, False, False)
    return Loader(source, order, make, seed, workers, None, max_bad)


#### 7. preferences ##########################################################################################
Pair = namedtuple("Pair", "image_better caption_better image_worse caption_worse kind", defaults=[""])


def _pairs_of(row):
    """Row of a preference file -> list of Pair. Of ImageReward's ranks lower is better; ties are skipped."""
    kind = str(row.get("kind", ""))  # what tells better from worse: accuracy is reported for each
    caption = next((row[k] for k in ("caption", "prompt", "text") if isinstance(row.get(k), str)), None)
    if "ranking" in row or "generations" in row:
        files, ranks = row.get("generations"), row.get("ranking")
        lists = isinstance(files, list) and isinstance(ranks, list) and len(files) == len(ranks)
        if caption is None or not lists:
            raise ValueError("needs prompt, and generations and ranking of equal length")
        ranked = list(zip(files, ranks))
        if not all(type(f) is str and type(r) in (int, float) and abs(r) < math.inf for f, r in ranked):
            raise ValueError("generations must be file names and ranking finite numbers")
        return [Pair(f, caption, g, caption, kind) for f, a in ranked for g, b in ranked if a < b]
    better, worse = row.get("better"), row.get("worse")
    if not (isinstance(better, str) and isinstance(worse, str)) or better == worse:
        raise ValueError("better and worse must be two different strings")
    if isinstance(row.get("image"), str):
        return [Pair(row["image"], better, row["image"], worse, kind)]
    if caption is None:
        raise ValueError("neither caption (of two pictures) nor image (of two captions)")
    return [Pair(better, caption, worse, caption, kind)]


class Pairs(list):
    """List of Pair, with .name, .root (the folder of its pictures) and .bad_rows."""


def open_pairs(path, split="all", images=None, fraction=0.1):
    """Preference file -> Pairs: JSON list or JSON lines of ImageReward items {prompt, generations, ranking},
    {caption, better, worse} with two pictures, {image, better, worse} with two captions, told by the keys.

    Pictures are relative to `images`, else to the file's folder. split "train" / "heldout" goes by a hash of
    the prompt (the picture, where captions are compared or there is none), so that none is on both sides;
    `fraction` is held out. Bad rows are named and skipped up to a limit, then SystemExit."""
    path = Path(path)
    if split not in ("train", "heldout", "all") or not path.is_file():
        raise SystemExit(f"error: {path}, split {split!r}: no such file or split: use train, heldout or all")
    with open(path, "rb") as f:
        is_list = f.read(64).lstrip().startswith(b"[")
    try:
        items = json.loads(path.read_bytes()) if is_list else ()
    except (ValueError, RecursionError) as e:
        raise BadFile(path, f"not JSON ({printable(str(e))[:80]})", "repair it") from None
    rows = ((f"{path} item {n}", row) for n, row in enumerate(items)) if is_list else _json_lines(path)
    found, bad_rows = _checked(rows, _pairs_of)
    pairs = Pairs(p for row in found for p in row)
    if split != "all":
        keys = [p.image_better != p.image_worse and p.caption_better or p.image_better for p in pairs]
        pairs = Pairs(p for p, k in zip(pairs, keys) if held_out(k, fraction) == (split == "heldout"))
    if not pairs:
        raise SystemExit(f"error: {path}: no pairs in its {split} part: check its keys, or the fraction")
    pairs.name, pairs.root, pairs.bad_rows = str(path), str(images or path.parent), bad_rows
    return pairs


def make_pair(pairs, index, h, w, rng, notes):
    """Both pictures, centre crops: a judgement is about all of a picture."""
    p, out = pairs[index], {}
    for side, file, text in (("better", *p[:2]), ("worse", *p[2:4])):
        same = side == "worse" and file == p.image_better
        image = None if same else read_image(inside(pairs.root, file), cover=(h, w))
        out[side] = out["better"] if same else fit(image, h, w)[0]
        out["caption_" + side], cut = clean_caption(text)
        notes["captions cut"] += cut
    return out


def pair_loader(pairs, image_size, batch_size, seed=0, rank=0, world=1, workers=2, start_step=0, stride=8,
                max_bad=MAX_BAD, once=False):
    """Endless batches, as sure as `make_loader`'s: better, worse [B, 3, H, W] in [-1, 1], caption_better,
    caption_worse, index, position, step. `once`: each pair once, in order, for held-out accuracy."""
    if once:
        order = Listed(pairs, range(len(pairs)), image_size, batch_size, rank, world, False, stride)
    else:
        order = Sampler(pairs, image_size, batch_size, seed, rank, world, False, stride)
    steps = None if once else range(start_step, sys.maxsize)
    return Loader(pairs, order, partial(make_pair, pairs), seed, workers, steps, max_bad)


#### python data.py check SPEC ###############################################################################
def check(spec: str, /, image_size: int = 256, stride: int = 8, aspects: bool = False, limit: int = 500,
          out: str = "out/check.png"):
    """Open a data source and report counts, bad files, shapes, captions and mask areas; draw a sheet.

    Args:
        spec: scenes, a folder of pictures, a parquet file or a folder of them
        image_size: side of the square, or of the square of equal area
        stride: sides are multiples of it
        aspects: keep aspect ratios
        limit: pictures decoded, evenly spaced over the source
        out: where the sheet of pictures with their masks goes
    """
    from tqdm import tqdm

    from common import contact_sheet

    if limit < 1:
        raise SystemExit(f"error: --limit: {limit}: look at one picture at least")
    source = open_source(spec, "train" if spec == "scenes" else "all")
    picks = np.unique(np.linspace(0, len(source) - 1, min(limit, len(source))).astype(int)).tolist()
    used, notes, lengths, areas, bad, rows = Counter(), Counter(), [], {t: [] for t in TASKS}, [], []
    for n, i in enumerate(tqdm(picks, disable=None, leave=False)):
        try:
            h, w = bucket(*(source.size(i) or (1, 1)), image_size, stride, aspects)
            row = []
            for t in TASKS:
                rng = np.random.default_rng([i, len(row)])
                s = make_sample(source, {t: 1.0}, 0.0, False, False, i, h, w, rng, notes)
                picture, m = s["image"], s["mask"][0, ..., None]
                tint = (picture + 0.55 * m * (np.array([255, 40, 90]) - picture)).astype(np.uint8)
                row.append(Image.fromarray(tint) if s["task"] == t else None)
                areas[t] += [float(m.mean())] if s["task"] == t else []
                lengths += [len(s["caption"].encode())] if t == "t2i" else []
        except BadFile as e:
            bad.append(str(e).removeprefix("error: "))
            continue
        used[h, w] += 1
        if n >= len(rows) * len(picks) / 8:
            rows.append([Image.fromarray(picture), *row])
    print(f"{source.name}: {len(source):,} pictures, {len(picks):,} looked at, {len(bad)} cannot be used, "
          f"{getattr(source, 'bad_lines', 0)} bad metadata lines")
    print("".join(f"  bad: {b}\n" for b in bad[:20]), end="")
    print("".join(f"  shape {w}x{h}: {n:,}\n" for (h, w), n in used.most_common()), end="")
    if not lengths:
        raise SystemExit(f"error: {spec}: not one picture can be used: see the list above")
    print(f"  captions: {sum(map(bool, lengths)):,}, median {int(np.median(lengths))} bytes, longest "
          f"{max(lengths)}, {notes['captions cut'] // len(TASKS)} cut at {MAX_CAPTION}")
    for t, a in areas.items():
        low, mid, high = np.quantile(a, (0.05, 0.5, 0.95)) if a else (0, 0, 0)
        print(f"  mask area, {t}: median {mid:.2f}, 5% to 95% {low:.2f} to {high:.2f} ({len(a):,} pictures)")
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(rows, ["picture", *TASKS]).save(out)
    except (OSError, ValueError) as e:  # Pillow: an unknown suffix is a ValueError
        raise SystemExit(f"error: --out: {out}: {e}: give a writable place that ends in .png") from None
    print(f"  sheet: {out}")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    import tyro

    tyro.extras.subcommand_cli_from_dict({"check": check})
