"""Files from anywhere, read safely: pictures, masks, label maps, captions, JSON lines, rows of parquet.

Nothing here trusts a file: sizes are capped before decoding, names must stay in their folder, and all that
is wrong is a BadFile of one line. Masks leave as float32 [h, w], 1 = regenerate; pictures as 8 bits of sRGB.

Which decoders run on a picture: those of BY_CONTENT, the formats that people's pictures are in, whatever the
file is called (a .jpg from a telephone may be HEIC, a .png from the web WebP). The rest of what Pillow reads
(JPEG 2000, TGA, PNM, ICO, ...) only on files whose own name has that format's suffix: a rare decoder must not
be had by renaming a file. Never: NEVER. HEIC and JPEG XL are read where their plug-in is installed.
"""

import codecs
import hashlib
import importlib
import io
import json
import math
import os
import re
import sys
import warnings
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
from PIL import Image

from readers.colour import to_srgb

PLUGINS = {"pillow_heif": "register_heif_opener", "pillow_jxl": None}  # module -> what registers it
for _module, _register in PLUGINS.items():
    try:
        _plugin = importlib.import_module(_module)
    except ImportError:
        continue
    if _register:
        getattr(_plugin, _register)()
Image.init()
BY_CONTENT = tuple(f for f in ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JXL")
                   if f in Image.OPEN)
NEVER = {  # format of Pillow's -> why it is left out
    "EPS": "starts Ghostscript", "WMF": "is drawn by Windows alone",
    "PSD": "is layers, whose flat copy may be missing", "MPEG": "is a film",
    "BUFR": "has no decoder", "GRIB": "has no decoder", "HDF5": "has no decoder", "IPTC": "is no picture",
    "MIC": "has its pictures inside OLE", "FPX": "has its pictures inside OLE",
    "FITS": "is measurements", "SPIDER": "is measurements", "MCIDAS": "is measurements"}
NAMED = {ext: fmt for ext, fmt in Image.registered_extensions().items()  # suffix -> format
         if fmt in Image.OPEN and fmt not in NEVER}
SUFFIXES = (".png", ".jpg", *sorted(NAMED.keys() - {".png", ".jpg"}))
INSTALL = {".heic": "pillow-heif", ".heif": "pillow-heif", ".hif": "pillow-heif",
           ".jxl": "pillow-jxl-plugin", ".avif": "a Pillow with AVIF"}  # what reads a suffix
NO_PICTURES = {".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".parquet"}  # found beside pictures
MAX_PIXELS, MAX_SIDE = 64_000_000, 16_384  # refused before decoding: a PNG of 10 kB can claim 400 MB
MAX_CAPTION, MAX_BAD = 2_000, 100  # bytes of UTF-8; bad files before a run stops
CACHE_BYTES = 256 << 20  # parquet row groups kept per process
HELDOUT = 0.05  # of a source that has no held-out part of its own
HELDOUT_NAMES = ("heldout", "val", "valid", "validation", "test", "dev")


class BadFile(SystemExit):
    """A file that cannot be used. Uncaught it ends the program with one line; loaders catch it and skip."""

    def __init__(self, name, problem, fix):
        name = printable(str(name))
        name = name if len(name) <= 300 else f"{name[:200]} ... {name[-60:]}"
        super().__init__(f"error: {name}: {printable(problem)}: {printable(fix)}")


class EmptyPart(SystemExit):
    """A set that can be read, and has nothing in the split that was asked for."""


def printable(text):
    """Text that a terminal can be shown: runs of spaces and control characters made one space, and halves of
    characters (names that are not UTF-8, JSON's lone surrogates) as escapes."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]+", " ", text).strip()


def say_once(kind, line, said=set()):
    """`line` to stderr, the first time in this process that there is one of its kind."""
    if kind not in said:
        said.add(kind)
        print(f"note: {printable(line)} (of further ones nothing is said)", file=sys.stderr)


def too_many(bad, read, limit=MAX_BAD):
    """Ten bad files are always forgiven, then a tenth of what was read, and never more than `limit`."""
    return bad > min(limit, max(10, read / 10))


#### 1. pictures, masks, captions ############################################################################
TURNS = {  # EXIF orientation -> what shows the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}
ASPECT = 1.02  # a target or mask whose aspect ratio differs by more is another picture's


def suffix_of(name):
    return os.path.splitext(str(name))[1].lower()


def format_inside(head):
    """What the first 32 bytes of a file are of: a format of Pillow's, HEIF, JXL, or None."""
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"):
        return "HEIF"
    if head[:2] == b"\xff\x0a" or head[4:8] == b"JXL ":
        return "JXL"
    for known in (*BY_CONTENT, *sorted(Image.OPEN.keys() - {*BY_CONTENT, "CUR"})):  # CUR: TGA begins so, too
        accept = Image.OPEN[known][1]
        try:
            if accept and len(head) >= 16 and accept(head) is True:
                return known
        except Exception:  # written for whole headers
            pass
    return None


def pictures_of(files):
    """Paths -> (those that are pictures; what is left out, in words by kind, "" for nothing).

    By suffix; a file whose suffix says nothing is a picture if what is inside is one of BY_CONTENT. Text and
    tables beside pictures are no loss and not counted."""
    pictures, left = [], Counter()
    for file in files:
        suffix = suffix_of(file)
        if suffix in NAMED:
            pictures.append(file)
        elif suffix not in NO_PICTURES:
            try:
                with open(file, "rb") as f:
                    inside_it = format_inside(f.read(32))
            except OSError:
                inside_it = None
            if inside_it in BY_CONTENT:
                pictures.append(file)
            else:
                left[suffix or "without a suffix"] += 1
    kinds = (f"{n:,} {printable(kind)[:20]}" + (f" (install {INSTALL[kind]})" if kind in INSTALL else "")
             for kind, n in left.most_common())
    return pictures, f"{left.total():,} files skipped: {', '.join(kinds)}" if left else ""


def _open(source, name):
    """PIL image from a path or bytes, header only; refuses unknown formats and sizes beyond the caps."""
    name = name or ("picture in memory" if isinstance(source, bytes) else source)
    if not isinstance(source, bytes) and not os.path.isfile(source):
        raise BadFile(name, "no such file", "correct the path or remove the row")
    suffix = suffix_of(name if isinstance(source, bytes) else source)
    formats = [*BY_CONTENT, *{NAMED[suffix]}.difference(BY_CONTENT)] if suffix in NAMED else BY_CONTENT
    try:
        with warnings.catch_warnings():  # of sizes that are refused below, of odd EXIF: not on the screen
            warnings.simplefilter("ignore")
            im = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
    except Image.DecompressionBombError:
        raise BadFile(name, f"more than {MAX_PIXELS:,} pixels", "scale it down") from None
    except Exception:  # decoders raise anything on a hostile header: struct.error, SyntaxError, zlib.error
        raise _unread(source, name) from None
    _check_size(im, name)
    return im, name


def _unread(source, name):
    """Why no decoder took a picture -> BadFile."""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as f:
            known = format_inside(f.read(32))
    except OSError as e:
        return BadFile(name, f"not readable ({e.strerror})", "correct its permissions")
    if known in ("HEIF", "JXL") and known not in BY_CONTENT:
        return BadFile(name, f"{known} inside", f"install {INSTALL['.heic' if known == 'HEIF' else '.jxl']}")
    if known in NEVER:
        return BadFile(name, f"{known} inside, which {NEVER[known]}", "save it as PNG or JPEG")
    if known and known not in BY_CONTENT:
        suffixes = ", ".join(ext for ext, fmt in NAMED.items() if fmt == known)
        return BadFile(name, f"{known} inside", f"rename it to {suffixes}")
    return BadFile(name, "not a readable picture", f"use one of {', '.join(BY_CONTENT)}")


def _check_size(im, name):
    w, h = im.size
    if w * h > MAX_PIXELS or max(w, h) > MAX_SIDE:
        raise BadFile(name, f"{w}x{h} is over {MAX_PIXELS:,} pixels or {MAX_SIDE:,} a side", "scale it down")


def _orientation(im):
    """EXIF's 1 to 8, None if it says nothing. A damaged EXIF block does not make a picture unusable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            turn = im.getexif().get(0x0112)
        return turn if turn in range(1, 9) else None
    except Exception:
        return None


def _turned(im):
    """Whether the stored pixels are shown turned by 90 degrees. Pillow turns TIFF itself, size included."""
    return im.format != "TIFF" and (_orientation(im) or 1) >= 5


def _decode(im, name):
    """Decoded and upright, its first frame."""
    turn = None if im.format == "TIFF" else _orientation(im)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            im.load()  # verify() passes on a truncated JPEG; only decoding finds it
    except Exception as e:
        raise BadFile(name, f"damaged ({printable(str(e))[:80]})", "repair or remove it") from None
    _check_size(im, name)  # an ICO says its size only now
    if turn in TURNS:
        info, kind = im.info, im.format
        im = im.transpose(TURNS[turn])
        im.info, im.format = info, kind
    return im


def frames_note(im):
    """What is said of an animation, or of a TIFF with several pages; "" of a still picture. A JPEG with
    further pictures inside (MPO: depth, a gain map) is a still picture."""
    if im.format == "MPO" or not getattr(im, "is_animated", False):
        return ""
    return f"{getattr(im, 'n_frames', 2):,} frames: the first is used"


def facts(source, name=None):
    """What a picture brings, from its header -> words, such as ("animated", "alpha", "profile")."""
    im, _ = _open(source, name)
    return [word for word, there in (("animated", frames_note(im)), ("alpha", im.has_transparency_data),
                                     ("profile", im.info.get("icc_profile"))) if there]


def _luma(im):
    """Picture of any mode -> float32 [h, w] in [0, 1]. 16 bit is scaled; Pillow's own I;16 -> L saturates.
    Of floats 1 is white, or 255 where there are values above 1."""
    v = np.asarray(im if im.mode == "F" or im.mode.startswith("I") else im.convert("L"), np.float32)
    top = 65535 if im.mode.startswith("I") else 1 if im.mode == "F" and v.max(initial=0) <= 1 else 255
    return np.clip(np.nan_to_num(v) / top, 0, 1)


def image_size(source, name=None):
    """(h, w) as `read_image` would return it, from the header alone."""
    im, name = _open(source, name)
    return im.size if _turned(im) else im.size[::-1]


def read_image(source, name=None, cover=None, alpha=False, log=None):
    """Path or bytes of a picture -> RGB uint8 [h, w, 3] in sRGB (readers/colour.py). Raises BadFile.

    EXIF orientation is applied, an animation is its first frame, transparency is composited on white
    (`convert("RGB")` would show the colours hidden under it); with `alpha` a picture that has one comes as
    RGBA uint8 [h, w, 4], its colours not multiplied by it. With `cover=(h, w)` a JPEG may be decoded at a
    fraction of its size that still covers twice (h, w), which is several times faster; resize it antialiased
    afterwards. `log` (print) is told what was converted or dropped; without, each kind is said once, but
    for conversions, which lose nothing.
    """
    im, name = _open(source, name)
    if cover and im.format in ("JPEG", "MPO"):
        h, w = cover[::-1] if _turned(im) else cover
        scale = min(1, 2 * max(h / im.height, w / im.width))
        im.draft(im.mode, (math.ceil(im.width * scale), math.ceil(im.height * scale)))
    frames = frames_note(im)
    im = _decode(im, name)
    try:
        rgb, opaque, colours = to_srgb(im)
    except ValueError as e:
        raise BadFile(name, str(e), "save it with 8 or 16 bits") from None
    for kind, note in (("animation", frames), ("profile", colours)):
        if note and log:
            log(f"{printable(str(name))}: {printable(note)}")
        elif note and "converted" not in note:
            say_once(kind, f"{name}: {note}")
    if opaque is None:
        return rgb
    return np.dstack([rgb, opaque]) if alpha else over_white(rgb, opaque)


def over_white(rgb, alpha):
    """RGB uint8 [h, w, 3] with its alpha uint8 [h, w] on white -> uint8 [h, w, 3]."""
    im = Image.fromarray(rgb)
    return np.array(Image.composite(im, Image.new("RGB", im.size, "white"), Image.fromarray(alpha)))


def photo_of(source, name=None):
    """A picture's (EXIF orientation, (h, w) as shown), which its mask and label map are laid on."""
    im, _ = _open(source, name)
    return _orientation(im) or 1, im.size if _turned(im) else im.size[::-1]


def _fits(size, shown):
    """Whether two (h, w) are of one aspect ratio, or would be but for a pixel of rounding."""
    (h, w), (a, b) = size, shown
    return abs(h * b - w * a) <= max(a, b) or max(h * b, w * a) <= ASPECT * min(h * b, w * a)


def _laid_on(im, name, photo, log=None):
    """A decoded mask or label map, turned as its photo is; BadFile if it is another picture's.

    photo: `photo_of`. One with an EXIF orientation of its own is upright already. Else, of a photo that EXIF
    turns by 90 degrees, its size says whether it is of the stored pixels or of the shown ones. Where its size
    cannot say (half a turn, mirrored, square) it is taken to be of the stored pixels, as programs that know
    nothing of EXIF write it (default ours); that is said."""
    if photo is None:
        return im
    turn, (h, w) = photo
    size, stored = im.size[::-1], ((w, h) if turn >= 5 else (h, w))
    if turn != 1 and _orientation(im) is None:
        a, b = (size == stored, size == (h, w)) if size in (stored, (h, w)) else (
            _fits(size, stored), _fits(size, (h, w)))
        if a:
            im = im.transpose(TURNS[turn])
        if a and b:
            note = (f"{name}: EXIF turns its photo (orientation {turn}), its size does not say whether it is "
                    "turned already: turned alike; if it was painted on the photo as shown, save that turned")
            log(f"note: {printable(note)}") if log else say_once("turned", note)
        size = im.size[::-1]
    if not _fits(size, (h, w)):
        raise BadFile(name, f"{size[1]}x{size[0]}, but its picture is {w}x{h}", "make them equal")
    return im


def read_mask(source, h=None, w=None, name=None, invert=False, log=None, alpha=None, photo=None):
    """Path or bytes of a mask -> float32 [h, w] in [0, 1], 1 = regenerate. BadFile if it selects nothing.

    Luma, unless an alpha channel varies: then alpha is the mask if what is visible has one colour (UltraEdit:
    painted = regenerate), else the transparent part is (MagicBrush: a hole in a picture). A known convention
    is not guessed: alpha "region" or "hole". `invert` turns the result round. Two values, one of them 0, are
    a binary mask whatever the other is (0/1, 0/255, a palette). Another size is stretched to (h, w), nearest
    if binary, else antialiased. `photo` is the picture it belongs to (`photo_of`): it is turned as that is,
    and must have its aspect ratio. A colour profile is ignored: a mask is numbers. `log` (print) gets the
    area."""
    im, name = _open(source, name)
    frames = frames_note(im)
    im, how = _laid_on(_decode(im, name), name, photo, log), "luma"
    if frames:
        log(f"{printable(str(name))}: {frames}") if log else say_once("animation", f"{name}: {frames}")
    if alpha == "hole" and not im.has_transparency_data:
        raise BadFile(name, "a mask without an alpha channel, where transparent = edit is the rule",
                      "save the hole in alpha, or the pairs as JSON lines, whose masks are white = edit")
    rgba = np.asarray(im.convert("RGBA")) if im.has_transparency_data else np.zeros((1, 1, 4), np.uint8)
    if alpha == "hole" or rgba[..., 3].min() < rgba[..., 3].max():
        seen, m = rgba[..., :3][rgba[..., 3] > 127], rgba[..., 3].astype(np.float32) / 255
        hole = alpha == "hole" or not alpha and seen.size and int(np.ptp(seen, axis=0).max()) > 16
        m, how = (1 - m, "transparent part") if hole else (m, "alpha")
    else:
        m = _luma(im if im.mode == "F" or im.mode.startswith("I") else im.convert("RGB"))
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


def read_labels(source, name, photo=None):
    """Label map (grey, 16 bit or palette indices) -> int32 [h, w], turned as its photo is (`photo_of`)."""
    im, name = _open(source, name)
    if im.mode not in ("1", "L", "P", "I;16", "I;16B", "I"):
        raise BadFile(name, f"label map with pixel mode {im.mode}", "save it grey or with a palette")
    return np.array(_laid_on(_decode(im, name), name, photo)).astype(np.int32)


def text_of(raw):
    """Bytes of a text file -> its text: UTF-8, or what its first bytes say (Windows writes them)."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return raw.decode("utf-16", "replace")
    return raw.decode("utf-8-sig", "replace")


def clean_caption(text):
    """-> (caption, cut): control characters out, cut to MAX_CAPTION bytes at a whole character."""
    text = text.encode("utf-8", "ignore").decode()  # JSON may hold lone surrogates
    raw = printable(text[: 4 * MAX_CAPTION]).encode()
    cut = len(raw) > MAX_CAPTION or len(text) > 4 * MAX_CAPTION
    return raw[:MAX_CAPTION].decode("utf-8", "ignore"), cut


def bad_name(name):
    """What is wrong with a file name, "" if it can be one."""
    try:
        raw = os.fsencode(name)
    except (TypeError, ValueError):  # not a text; half a character that no file system has
        return f"{printable(str(name)[:80])!r} is not a file name"
    if not raw or b"\0" in raw:
        return f"{printable(str(name)[:80])!r} is not a file name"
    if len(raw) > 4096 or max(map(len, raw.split(b"/"))) > 255:
        return f"{printable(str(name)[:40])!r}... is too long for a file name"
    return ""


def inside(root, name, place=None):
    """Path of `name` under the folder `root`; BadFile if it leaves it (absolute, "..", a symbolic link).
    place: the file and line that say so, for the message."""
    if problem := bad_name(name):
        raise BadFile(place or root, problem, "correct the row")
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


def one_key_each(pairs):
    """object_pairs_hook: json would keep the last of two keys of one name, and say nothing."""
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(k for k, n in Counter(k for k, _ in pairs).items() if n > 1)
        raise ValueError(f"two keys named {printable(twice)[:40]}")
    return row


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
                    row = json.loads(line, object_pairs_hook=one_key_each)
            except (ValueError, RecursionError) as e:
                row = e if str(e).startswith("two keys") else ValueError("not JSON in UTF-8")
            if line.strip():
                if starts is not None:
                    starts.extend((n, start))
                yield f"{path} line {n}", row


#### 2. parts and rows #######################################################################################
def hashed(parts):
    """SHA-256 over bytes, and over all else as JSON lines: what a source names, not what pictures show."""
    digest = hashlib.sha256()
    for part in parts:
        text = part if isinstance(part, bytes) else \
            json.dumps(part, default=str).encode("utf-8", "surrogatepass") + b"\n"
        digest.update(text)
    return digest.hexdigest()


def bytes_of(file):
    """Size of a file, -1 where there is none."""
    try:
        return os.path.getsize(file)
    except OSError:
        return -1


def lot(key):
    """A key's number in [0, 1), the same in every process and version."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "replace")).digest()[:6]) / 2**48


def held_out(key, fraction):
    """Stable split: a key falls on the same side in every process and version."""
    return lot(key) < fraction


def part_of(folder, split):
    """A folder's subfolder for a split, and what split is still to be made in it -> (path, split).

    With train/ (or training/) the held-out part is the folder beside it that has the first of HELDOUT_NAMES
    that is there; without, `is_held` tells a folder's files apart."""
    path = Path(folder)
    train = next((path / n for n in ("train", "training") if (path / n).is_dir()), None)
    if split == "all" or train is None:
        return path, split
    held = [path / n for n in HELDOUT_NAMES if (path / n).is_dir()]
    return held[0] if held and split == "heldout" else train, "all" if held else split


def is_held(name, depth=None):
    """Whether a relative file name is of a held-out part: in a folder named as in HELDOUT_NAMES (of the outer
    `depth` ones; None: of any), or itself a file such as dev-00000-of-00001.parquet."""
    *folders, file = Path(name).parts or ("",)
    inside_one = any(f in HELDOUT_NAMES for f in folders[:depth])
    return inside_one or depth is None and re.split("[-.]", file)[0] in HELDOUT_NAMES


def files_of(path, split, suffix):
    """A file, or a folder's files of one suffix, of a split -> (files, the split yet to be made of the rows).

    Those of `is_held` are the held-out part, if there are any."""
    if path.is_file():
        return [path], split
    files = sorted(f for f in path.rglob("*" + suffix) if f.is_file())
    held = [f for f in files if is_held(f.relative_to(path))]
    if split == "all" or not held:
        return files, split
    return held if split == "heldout" else [f for f in files if f not in held], "all"


def heldout_or(train, open_part, spec):
    """The held-out part of a set, or `train` with a note where the set is too small to have one."""
    try:
        return open_part(spec, "heldout")
    except EmptyPart:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"note: {spec}: nothing is held out: sample sheets show what is trained on",
                  file=sys.stderr)
        return train


def _one_each(file, names, wanted):
    """BadFile if a wanted column's name is that of two."""
    if twice := next((c for c in wanted if c and names.count(c) > 1), None):
        raise BadFile(file, f"{names.count(twice)} columns named {twice}", "rename or drop one")


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
            _one_each(file, f.schema_arrow.names, columns)
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
                _one_each(file, f.schema_arrow.names, columns)
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


#### 3. order ################################################################################################
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
