"""Pixels of any mode and colour space -> 8 bits of sRGB.

    profile      RGB, grey and CMYK pictures that embed one (Display P3, Adobe RGB, a printer's) go through
                 LittleCMS: relative colorimetric, black point compensated. A profile that is sRGB but for
                 rounding leaves every byte as it is. One that is damaged, or of another kind of pixels, is
                 ignored, and that is said.
    none         RGB and grey are taken as sRGB; CMYK and YCCK are R = 255 (1 - C) (1 - K), and so on
    16 bit       grey v -> v / 257, rounded; of colour Pillow hands out the upper byte, at most 1 of 255 off
    float        0 is black and 1 is white, clipped; NaN, or more than 2, is refused: no scale is known
    32 bit       integers are refused: no white is known
    alpha        comes apart, as it is stored; pictures with a transparent colour or palette get one
"""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE = 8 << 20  # bytes; printers' profiles have up to 3 MB
BLACK = ImageCms.Flags.BLACKPOINTCOMPENSATION
FLAGS = {"RGB": BLACK, "CMYK": BLACK, "L": BLACK | ImageCms.Flags.NOOPTIMIZE}
SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of a profile -> mode of the pixels it is for


@lru_cache(maxsize=32)
def _transform(profile, mode):
    """-> (LittleCMS transform from `mode` to sRGB, of grey a table uint8 [256, 3], None for a profile that is
    sRGB; what the profile calls itself).
    ValueError for a profile that cannot be used on these pixels."""
    if len(profile) > MAX_PROFILE:
        raise ValueError(f"colour profile of {len(profile):,} bytes")
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = opened.profile.xcolor_space.strip()
        name = " ".join((ImageCms.getProfileDescription(opened) or space).split())[:60]
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        raise ValueError("damaged colour profile") from None
    if SPACES.get(space) != mode:
        raise ValueError(f"{space} colour profile {name} in a picture of {mode} pixels")
    try:
        made = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB",
                                       ImageCms.Intent.RELATIVE_COLORIMETRIC, FLAGS[mode])
        if mode == "L":  # 256 values, unoptimized: LittleCMS' short cut for grey is 10 levels off in the dark
            table = np.asarray(made.apply(Image.fromarray(np.arange(256, dtype=np.uint8)[None])))[0]
            return (None if np.abs(table.astype(int).T - np.arange(256)).max() <= 1 else table), name
    except ImageCms.PyCMSError:
        raise ValueError(f"damaged colour profile {name}") from None
    if mode == "RGB":
        steps = np.arange(0, 256, 15, dtype=np.uint8)
        cube = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
        off = np.abs(np.asarray(made.apply(Image.fromarray(cube)), np.int16) - cube)
        made = made if off.max() > 1 else None
    return made, name


def _deep(im):
    """Picture of more than 8 bits a pixel -> L, alpha (uint8 [h, w] or None)."""
    v = np.asarray(im)
    if im.mode == "F":
        low, high = float(v.min(initial=0)), float(v.max(initial=0))
        if not (np.isfinite(low) and np.isfinite(high)) or high > 2:
            raise ValueError(f"float pixels from {low:.4g} to {high:.4g}, where 1 is white")
        return Image.fromarray((np.clip(v, 0, 1) * 255 + 0.5).astype(np.uint8)), None
    if im.mode == "I" and im.format == "TIFF":
        raise ValueError("32-bit integer pixels, whose white is not known")
    clear = im.info.get("transparency")
    alpha = np.where(v == clear, 0, 255).astype(np.uint8) if isinstance(clear, int) else None
    return Image.fromarray((np.clip(v, 0, 65535) / 257 + 0.5).astype(np.uint8)), alpha


def to_srgb(im):
    """Decoded PIL image -> (RGB uint8 [h, w, 3], alpha uint8 [h, w] or None, note or None).

    The note says in words which profile was applied, or why it was not. ValueError for pixels whose white is
    not known."""
    profile, alpha = im.info.get("icc_profile"), None
    if im.mode == "F" or im.mode.startswith("I"):
        im, alpha = _deep(im)
    elif im.has_transparency_data:
        grey = im.mode in ("LA", "La")
        im = im.convert("RGBA")
        alpha, im = np.array(im.getchannel("A")), im.convert("RGB")
        im = im.getchannel(0) if grey else im
    elif im.mode == "1":
        im = im.convert("L")
    elif im.mode not in ("L", "RGB", "CMYK"):  # P, YCbCr, LAB, HSV
        profile = profile if im.mode == "P" else None  # LAB says itself what it is
        im = im.convert("RGB")
    if not profile:
        return np.array(im.convert("RGB")), alpha, None
    try:
        if im.mode == "L" and profile[16:20] == b"RGB ":  # a grey copy of a colour picture kept its profile
            im = im.convert("RGB")
        made, name = _transform(profile, im.mode)
    except ValueError as e:
        return np.array(im.convert("RGB")), alpha, f"{e}: ignored, its colours are taken as sRGB"
    if made is None:
        return np.array(im.convert("RGB")), alpha, None
    rgb = made[np.asarray(im)] if im.mode == "L" else np.array(made.apply(im))
    return rgb, alpha, f"converted from {name} to sRGB"
