"""Scenes: procedural captioned pictures whose every fact is known (numpy + PIL only).

A `Scene` is a small description: objects (shape, colour, material, size, place) on a background, in an
environment (weather, time of day) and a style. From it follow, exactly: the picture at any size, the
instance label map, true and false captions, the seven edits of OmniEdit Table 2 with their targets and
masks, and what lies under an object (draw the scene without it).

    python scenes.py --sheet sheet.png --n 64 --size 64
    python scenes.py --export data/scenes --n 1000 --size 64 --split heldout

Everything is a function of (seed, index). No global random state is used, and nothing drawn for one object
depends on another, so removing an object leaves every other pixel bit for bit the same. The drawings are
ours, no paper describes them.
"""

import json
import math
import textwrap
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIZES = ("small", "medium", "large")
RADIUS = {"small": 0.135, "medium": 0.18, "large": 0.24}  # of the short side
COLOURS = {
    "red": (0.86, 0.12, 0.14), "orange": (0.97, 0.53, 0.06), "yellow": (0.98, 0.86, 0.14),
    "green": (0.16, 0.62, 0.22), "cyan": (0.16, 0.82, 0.87), "blue": (0.13, 0.27, 0.86),
    "purple": (0.52, 0.17, 0.72), "pink": (0.98, 0.50, 0.74), "brown": (0.46, 0.26, 0.12),
    "white": (0.97, 0.97, 0.97), "gray": (0.52, 0.52, 0.54), "black": (0.09, 0.09, 0.11),
}  # fmt: skip
# second colour of patterned materials: a pale tint, except where the colour is itself pale or has no hue
_SECOND = {"yellow": (0.80, 0.52, 0.05), "white": (0.62, 0.66, 0.73), "gray": (0.82, 0.82, 0.84),
           "black": (0.46, 0.46, 0.50), "cyan": (0.05, 0.45, 0.55), "pink": (1.0, 0.92, 0.96)}  # fmt: skip
# colours that would vanish on a background are not placed there
_CLASH = {"sky": ("cyan", "white"), "grass": ("green",), "sand": ("yellow",), "brick": ("brown",),
          "water": ("blue", "cyan"), "wood": ("brown",), "tiles": (), "snow": ("white",), "space": ("black",),
          "dunes": ("orange",)}  # fmt: skip


@dataclass(frozen=True)
class Object:
    """One object. x, y: centre as fractions of width and height; angle in degrees (a slight tilt); the rest
    are names."""

    shape: str
    colour: str
    material: str
    size: str
    x: float
    y: float
    angle: float = 0.0


@dataclass(frozen=True)
class Scene:
    """A picture's whole description. objects: drawn in order, later ones on top. seed: phase and tone of the
    textures."""

    objects: tuple[Object, ...]
    background: str
    environment: str
    style: str
    seed: int


def to_dict(scene):
    """Scene -> plain dict for JSON."""
    return asdict(scene) | {"objects": [asdict(o) for o in scene.objects]}


def from_dict(d):
    """Inverse of to_dict."""
    return Scene(**(d | {"objects": tuple(Object(**o) for o in d["objects"])}))


# ---- randomness: a function of integers ----------------------------------------------------------


def rng_for(*integers):
    """np.random.Generator that depends only on the given integers (splitmix64 into Philox), the same on every
    machine."""
    h = 0x9E3779B97F4A7C15
    for n in integers:
        h = (h ^ (n & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        h ^= h >> 31
    return np.random.Generator(np.random.Philox(key=h))


def _pick(options, u):
    """One of the options by a uniform draw u in [0, 1): only random() is used, its stream is stable across
    numpy versions."""
    return options[int(u * len(options))]


def _gap(x, y, r, objects):
    """Free distance between a disc and the nearest object, in short sides; negative when they overlap."""
    return min((math.hypot(x - o.x, y - o.y) - r - RADIUS[o.size] for o in objects), default=1.0)


def _place(objects, size, us, worst=-0.3):
    """First place that touches no object, else the best one if it overlaps by at most `worst` radii, else
    None."""
    r = RADIUS[size]
    edge, best = r + 0.03, None
    for ux, uy in zip(us[0::2], us[1::2]):
        x, y = edge + ux * (1 - 2 * edge), edge + uy * (1 - 2 * edge)
        gap = _gap(x, y, r, objects)
        if best is None or gap > best[0]:
            best = (gap, x, y)
        if gap > 0.01:
            break
    return best[1:] if best[0] > worst * r else None


def scene(seed, index):
    """Scene number `index` of stream `seed`: 1 to 4 objects, attributes independent and uniform apart from
    _CLASH and that about one scene in eight repeats one object. Half of the scenes are photos, two fifths
    have clear weather."""
    us = iter(rng_for(seed, index, 1).random(200).tolist())
    background = _pick(BACKGROUNDS, next(us))
    environment = "clear" if next(us) < 0.3 else _pick(ENVIRONMENTS, next(us))
    style = "photo" if next(us) < 0.4 else _pick(STYLES, next(us))
    n = (1, 1, 2, 2, 2, 3, 3, 3, 4, 4)[int(next(us) * 10)]
    alike = next(us) < 0.12
    colours = [c for c in COLOURS if c not in _CLASH[background]]
    texture_seed = int(next(us) * 2**48)
    objects = []
    for _ in range(n):
        kind = _pick(SHAPES, next(us)), _pick(colours, next(us)), _pick(MATERIALS, next(us))
        size, angle = _pick(SIZES[: 2 if n == 4 else 3], next(us)), round((next(us) - 0.5) * 24, 2)
        place = _place(objects, size, [next(us) for _ in range(36)])
        if alike and objects:
            kind = objects[0].shape, objects[0].colour, objects[0].material
        if place is not None:
            objects.append(Object(*kind, size, round(place[0], 4), round(place[1], 4), angle))
    return Scene(tuple(objects), background, environment, style, texture_seed)


# ---- coordinates and noise -----------------------------------------------------------------------


class Grid(NamedTuple):
    """Pixel centres of an h x w picture sampled every `pitch` pixels (pitch > 1 only for the pixel style)."""

    h: int
    w: int
    short: int
    pitch: int
    xs: np.ndarray  # [1, W] in pixels
    ys: np.ndarray  # [H, 1]
    u: np.ndarray  # [1, W] in short sides
    v: np.ndarray  # [H, 1]
    down: np.ndarray  # [H, 1], 0 at the top to 1 at the bottom


@lru_cache(maxsize=64)
def _grid(h, w, pitch):
    short = min(h, w)
    xs = ((np.arange(-(-w // pitch), dtype=np.float32) + 0.5) * pitch)[None]
    ys = ((np.arange(-(-h // pitch), dtype=np.float32) + 0.5) * pitch)[:, None]
    return Grid(h, w, short, pitch, xs, ys, xs / short, ys / short, np.minimum(ys / h, 1))


def _grid_for(scene, h, w):
    if h < 8 or w < 8:
        raise SystemExit(f"error: scenes.py: picture size {h}x{w}: use at least 8x8 pixels")
    return _grid(h, w, max(2, round(min(h, w) / 28)) if scene.style == "pixel" else 1)


_TILE = 512  # samples of a noise tile along one short side; a power of two, so that wrapping is a bit mask


@lru_cache(maxsize=None)
def _tile(name):
    """Periodic value noise in [0, 1], [_TILE, _TILE] float32: 'smooth' has features of 1/4 .. 1/16, 'grain'
    of 1/64."""
    total = np.zeros((_TILE, _TILE), np.float32)
    octaves = ((4, 0.55), (8, 0.3), (16, 0.15)) if name == "smooth" else ((64, 0.6), (128, 0.4))
    for cells, weight in octaves:
        knots = rng_for(7, cells).random((cells, cells)).astype(np.float32)
        t = np.arange(_TILE) * cells / _TILE
        i = t.astype(int)
        f = (t - i).astype(np.float32)
        f = f * f * (3 - 2 * f)
        rows = knots[i] * (1 - f[:, None]) + knots[(i + 1) % cells] * f[:, None]
        total += weight * (rows[:, i] * (1 - f) + rows[:, (i + 1) % cells] * f)
    return (total - total.min()) / (total.max() - total.min())


_TABLE = rng_for(11).random(1024).astype(np.float32)  # random number of a cell


def _noise(name, g, u0, v0, su=1.0, sv=1.0):
    """Noise [H, W] at (u * su + u0, v * sv + v0)."""
    i = ((g.v[:, 0] * sv + v0) * _TILE).astype(np.int64) & (_TILE - 1)
    j = ((g.u[0] * su + u0) * _TILE).astype(np.int64) & (_TILE - 1)
    return _tile(name)[i][:, j]


def _rgb(*c):
    return np.array(c, np.float32)


def _mix(a, b, f):
    """a (1 - f) + b f for colours [3] or [H, W, 3] and a field f [H, W]."""
    return a + f[..., None] * (b - a)


def _clip01(a):
    return np.minimum(np.maximum(a, 0), 1)


def _specks(g, per_side, u0, v0, radius):
    """Anti-aliased round specks [H, W] in [0, 1], one per jittered cell, of about `radius` short sides."""
    x, y = g.u * per_side + u0, g.v * per_side + v0
    i, j = np.floor(y), np.floor(x)
    key = (i * 57 + j * 131).astype(np.int64)
    size = _TABLE[key & 1023]
    dx = (x - j - 0.25 - 0.5 * _TABLE[(key + 333) & 1023]) * (g.short / per_side)
    dy = (y - i - 0.25 - 0.5 * _TABLE[(key + 666) & 1023]) * (g.short / per_side)
    r = radius * g.short * (0.45 + 0.9 * size)
    drawn = np.maximum(r, 0.5 * g.pitch)  # a speck below a sample's size keeps its area by getting fainter
    return _clip01((drawn - np.sqrt(dx * dx + dy * dy)) / g.pitch + 0.5) * np.maximum((r / drawn) ** 2, 0.2)


# ---- backgrounds: (grid, r: 8 uniform draws of the scene) -> [H, W, 3] in [0, 1] -----------------


def _sky(g, r):
    top = _mix(_rgb(0.30, 0.55, 0.92), _rgb(0.36, 0.66, 0.90), np.float32([r[0]]))[0]
    base = _mix(top, _rgb(0.74, 0.87, 0.98), g.down)
    cloud = _clip01(_noise("smooth", g, r[1], r[2], 0.55, 1.0) * 4 - 2.1) * 0.8
    return _mix(base, _rgb(0.97, 0.98, 1.0), cloud)


def _grass(g, r):
    f = 0.55 * _noise("grain", g, r[1], r[2], 0.8, 0.22) + 0.45 * _noise("smooth", g, r[3], r[4])
    dark = _pick(((0.18, 0.42, 0.12), (0.26, 0.44, 0.10), (0.14, 0.42, 0.22)), r[0])
    return _mix(_rgb(*dark), _rgb(0.56, 0.76, 0.32), f)


def _sand(g, r):
    phase = g.v * (7 + 3 * r[3]) + (r[4] - 0.5) * g.u + 0.9 * _noise("smooth", g, r[1], r[2], 0.5, 0.5)
    f = 0.5 + 0.22 * np.sin(phase * (2 * math.pi)) + 0.45 * (_noise("grain", g, r[5], r[6]) - 0.5)
    dark, light = _pick((((0.76, 0.64, 0.44), (0.95, 0.87, 0.68)),
                         ((0.80, 0.70, 0.54), (0.97, 0.91, 0.78))), r[0])  # fmt: skip
    return _mix(_rgb(*dark), _rgb(*light), f)


def _brick(g, r):
    high = 1 / (6 + int(2 * r[1]))
    y = g.v / high + r[2]
    i = np.floor(y)
    x = g.u / (2 * high) + 0.5 * (i % 2) + r[3]
    j = np.floor(x)
    fx, fy = x - j, y - i
    d = np.minimum(np.minimum(fx, 1 - fx) * 2, np.minimum(fy, 1 - fy)) * (high * g.short)
    tone = _TABLE[(i * 57 + j * 131).astype(np.int64) & 1023]
    face = _pick(((0.68, 0.34, 0.26), (0.72, 0.46, 0.34), (0.58, 0.40, 0.36), (0.70, 0.60, 0.50)), r[0])
    f = _clip01((d - 0.011 * g.short) / g.pitch + 0.5)
    return _mix(_rgb(0.80, 0.77, 0.72), _rgb(*face), f) * (0.86 + 0.26 * tone)[..., None]


def _water(g, r):
    wave = np.sin((g.v * (6 + 2 * r[3]) + 1.6 * _noise("smooth", g, r[1], r[2], 0.6, 1.0)) * (2 * math.pi))
    deep, light = _pick((((0.05, 0.30, 0.52), (0.26, 0.58, 0.76)),
                         ((0.04, 0.36, 0.48), (0.26, 0.64, 0.68))), r[0])  # fmt: skip
    img = _mix(_rgb(*deep), _rgb(*light), 0.35 + 0.4 * g.down + 0.25 * wave)
    return _mix(img, _rgb(0.85, 0.95, 0.98), _clip01(wave * 3 - 2.2) * 0.6)


def _wood(g, r):
    high = 1 / (4 + int(2 * r[1]))
    y = g.v / high + r[2]
    i = np.floor(y)
    fy = y - i
    seam = _clip01((np.minimum(fy, 1 - fy) * high * g.short - 0.008 * g.short) / g.pitch + 0.5)
    tone = _TABLE[(i * 57).astype(np.int64) & 1023]
    grain = _noise("smooth", g, r[3], r[4], 0.25, 3.0)
    dark, light = _pick((((0.46, 0.30, 0.17), (0.70, 0.50, 0.31)), ((0.60, 0.43, 0.26), (0.85, 0.68, 0.46)),
                         ((0.34, 0.24, 0.18), (0.55, 0.41, 0.31))), r[0])  # fmt: skip
    return _mix(_rgb(*dark), _rgb(*light), 0.7 * grain + 0.4 * tone) * (0.45 + 0.55 * seam)[..., None]


def _tiles(g, r):
    per = 4 + int(3 * r[1])
    q = []
    for t, start in ((g.u, r[2]), (g.v, r[3])):
        t = t * per + start
        i = np.floor(t)
        edge = (0.5 - np.abs(t - i - 0.5)) * (2 * g.short / per / g.pitch)
        q.append(np.minimum(edge, 1) * (1 - 2 * (i % 2)))
    a, b = _pick((((0.86, 0.84, 0.78), (0.56, 0.62, 0.66)), ((0.90, 0.88, 0.86), (0.66, 0.50, 0.46)),
                  ((0.84, 0.88, 0.84), (0.46, 0.60, 0.52)),
                  ((0.92, 0.90, 0.94), (0.60, 0.56, 0.70))), r[0])  # fmt: skip
    shade = 0.94 + 0.1 * _noise("smooth", g, r[4], r[5])
    return _mix(_rgb(*a), _rgb(*b), 0.5 + 0.5 * q[0] * q[1]) * shade[..., None]


def _snow(g, r):
    f = _clip01(_noise("smooth", g, r[1], r[2], 0.5, 1.2) * 1.6 - 0.3)
    shade = _pick(((0.72, 0.80, 0.92), (0.78, 0.82, 0.90), (0.74, 0.84, 0.90)), r[0])
    glitter = _clip01(_noise("grain", g, r[3], r[4]) * 5 - 3.7)
    return _mix(_mix(_rgb(*shade), _rgb(0.96, 0.98, 1.0), f), _rgb(1, 1, 1), glitter)


def _space(g, r):
    haze = _pick(((0.22, 0.14, 0.38), (0.10, 0.20, 0.40), (0.30, 0.12, 0.28)), r[0])
    img = _mix(_rgb(0.03, 0.04, 0.12), _rgb(*haze), _clip01(_noise("smooth", g, r[1], r[2]) * 1.5 - 0.3))
    return _mix(img, _rgb(1.0, 0.98, 0.90), _specks(g, 5, r[3] * 99, r[4] * 99, 0.011))


def _dunes(g, r):
    img = _mix(_rgb(0.62, 0.80, 0.93), _rgb(0.97, 0.90, 0.74), _clip01(g.down * 3))
    img = np.broadcast_to(img, (g.v.size, g.u.size, 3)).copy()
    light = _rgb(*_pick(((0.93, 0.70, 0.42), (0.90, 0.62, 0.38), (0.92, 0.76, 0.50)), r[0]))
    for k in range(4):
        crest = 0.16 + 0.23 * k + (0.05 + 0.02 * k) * np.sin(g.u * (3.2 + 1.4 * r[1 + k]) + 6.3 * r[2 + k])
        below = (g.down - crest) * g.h
        slope = _mix(light, light * 0.72, _clip01(below / (0.26 * g.h)))
        img += _clip01(below / g.pitch + 0.5)[..., None] * (slope - img)
    return img


_DRAW_BACKGROUND = {"sky": _sky, "grass": _grass, "sand": _sand, "brick": _brick, "water": _water,
                    "wood": _wood, "tiles": _tiles, "snow": _snow, "space": _space,
                    "dunes": _dunes}  # fmt: skip
BACKGROUNDS = tuple(_DRAW_BACKGROUND)


# ---- environments: a layer over the whole picture ------------------------------------------------


def _sunset(img, g, r):
    img *= _rgb(1.0, 0.80, 0.64)
    return img + (0.08 + 0.26 * (1 - g.down) ** 2)[..., None] * _rgb(1.0, 0.34, 0.10)


def _night(img, g, r):
    return img * _rgb(0.46, 0.50, 0.70) + _rgb(0.0, 0.01, 0.06)


def _fog(img, g, r):
    f = 0.50 - 0.34 * g.down + 0.24 * _noise("smooth", g, r[6], r[7], 0.5, 0.8)
    return _mix(img, _rgb(0.84, 0.86, 0.88), f)


def _rain(img, g, r):
    img = _mix(img, img.mean(-1, keepdims=True), np.float32([[0.2]])) * _rgb(0.70, 0.76, 0.84)
    per, slant = 11, 0.22
    x = (g.u + slant * g.v) * per + r[6] * 9
    j = np.floor(x)
    start = _TABLE[(j * 57).astype(np.int64) & 1023]
    y = g.v * 3.2 + start * 7 + r[7]
    on = _clip01((0.42 - (y - np.floor(y))) * 8)
    d = np.abs(x - j - 0.5) * (g.short / per)
    f = _clip01((max(0.006 * g.short, 0.5 * g.pitch) - d) / g.pitch + 0.5) * on
    return _mix(img, _rgb(0.88, 0.93, 1.0), f * (0.6 * min(1, (g.short / g.pitch / 64) ** 0.6)))


def _snowfall(img, g, r):
    img = _mix(img, _rgb(0.86, 0.90, 0.97), np.float32([[0.22]]))
    f = np.maximum(_specks(g, 6, r[6] * 99, r[7] * 99, 0.019), _specks(g, 9, r[7] * 77, r[6] * 77, 0.010))
    return _mix(img, _rgb(1, 1, 1), f * 0.9)


_DRAW_ENVIRONMENT = {"clear": lambda img, g, r: img, "sunset": _sunset, "night": _night, "fog": _fog,
                     "rain": _rain, "snowfall": _snowfall}  # fmt: skip
ENVIRONMENTS = tuple(_DRAW_ENVIRONMENT)


# ---- shapes: signed distance on the unit disc, y downwards ---------------------------------------


def _hypot(x, y):
    return np.sqrt(x * x + y * y)


def _star(x, y):
    x = np.abs(x)
    for kx in (0.809017, -0.809017):  # fold the plane onto one half of one arm
        d = 2 * np.maximum(kx * x + 0.587785 * y, 0)
        x, y = x - d * kx, y - d * 0.587785
    x, y = np.abs(x), -y
    return x * 0.925 + (y - 0.98) * 0.38


def _heart(x, y):
    x, y = np.abs(x) / 1.62, (0.86 - y) / 1.62
    lobe = _hypot(x - 0.25, y - 0.75) - 0.353553
    m = 0.5 * np.maximum(x + y, 0)
    point = np.sqrt(np.minimum(x * x + (y - 1) ** 2, (x - m) ** 2 + (y - m) ** 2)) * np.sign(x - y)
    return np.where(x + y > 1, lobe, point) * 1.62


def _drop(x, y):
    tip = np.maximum(np.abs(x) * 0.875 - (y + 0.95) * 0.484, y - 0.03)
    return np.minimum(_hypot(x, y - 0.33) - 0.62, tip)


def _cross(x, y):
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.minimum(x, y) - 0.31, np.maximum(x, y) - 0.92)


_DISTANCE = {
    "circle": lambda x, y: _hypot(x, y) - 0.92,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.80,
    "triangle": lambda x, y: np.maximum(y - 0.74, np.abs(x) * 0.873 - (y + 0.96) * 0.488),
    "star": _star,
    "heart": _heart,
    "hexagon": lambda x, y: np.maximum(np.abs(y), np.abs(x) * 0.866 + np.abs(y) * 0.5) - 0.82,
    "diamond": lambda x, y: np.abs(x) * 0.82 + np.abs(y) * 0.572 - 0.56,
    "ring": lambda x, y: np.abs(_hypot(x, y) - 0.68) - 0.26,
    "cross": _cross,
    "crescent": lambda x, y: np.maximum(_hypot(x + 0.04, y) - 0.94, 0.76 - _hypot(x - 0.44, y + 0.08)),
    "flower": lambda x, y: (_hypot(x, y) - 0.58 - 0.36 * np.abs(np.cos(3 * np.arctan2(x, -y)))) * 0.8,
    "drop": _drop,
}
SHAPES = tuple(_DISTANCE)


# ---- materials: (x, y, distance on the unit disc, colour, second colour, px: pixels per radius) ->


def _matte(x, y, d, c, c2, px):
    return c * (1.0 - 0.14 * (x + y))[..., None], 1.0


def _metal(x, y, d, c, c2, px):
    t = 0.55 * x + 0.83 * y
    rgb = c * (0.72 + 0.42 * np.cos(t * 4.2 + 0.9))[..., None]
    return rgb + (0.75 * np.exp(-60 * (t + 0.30) ** 2) + 0.06)[..., None], 1.0


def _glass(x, y, d, c, c2, px):
    rim = _clip01(1 + d * min(px / 2.2, 5))
    glint = _clip01(1.6 - 7 * _hypot(x + 0.34, (y + 0.40) * 1.2))
    rgb = _mix(_mix(c * 0.85 + 0.15, c * 0.80, rim), _rgb(1, 1, 1), glint)
    return rgb, np.maximum(0.42 + 0.5 * rim, glint * 0.9)


def _pattern(f, x, y, c, c2):
    return _mix(c, c2, _clip01(f)) * (1.0 - 0.08 * (x + y))[..., None], 1.0


def _striped(x, y, d, c, c2, px):
    f = np.abs(((x + y) * (0.7071 / 0.72) + 0.25) % 1 - 0.5)  # period 0.72 radii, in units of it
    return _pattern((0.21 - f) * (0.72 * px) + 0.5, x, y, c, c2)


def _dotted(x, y, d, c, c2, px):
    p, q = (x + y) * 0.7071 / 0.62, (x - y) * 0.7071 / 0.62
    return _pattern((0.30 - _hypot(p - np.rint(p), q - np.rint(q))) * (0.62 * px) + 0.5, x, y, c, c2)


def _checkered(x, y, d, c, c2, px):
    p, q = np.sin(x * (math.pi / 0.46)), np.sin(y * (math.pi / 0.46))
    return _pattern(0.5 + p * q * (0.46 * px * 0.6), x, y, c, c2)


def _wooden(x, y, d, c, c2, px):
    rings = np.sin((y + 0.16 * np.sin(2.3 * x + 0.8)) * 12.5)
    rgb = (c * 0.78 + _rgb(0.62, 0.40, 0.20) * 0.22) * (0.92 + 0.30 * rings)[..., None]
    return rgb, 1.0


_SHADE = {"matte": _matte, "metal": _metal, "glass": _glass, "striped": _striped, "dotted": _dotted,
          "checkered": _checkered, "wooden": _wooden}  # fmt: skip
MATERIALS = tuple(_SHADE)


# ---- drawing an object ---------------------------------------------------------------------------


class _Patch(NamedTuple):
    """An object evaluated on its box: rows, cols (slices), x, y, distance d (unit disc), coverage and shadow
    [n, m]."""

    rows: slice
    cols: slice
    x: np.ndarray
    y: np.ndarray
    d: np.ndarray
    cover: np.ndarray
    shadow: np.ndarray
    px: float


def _patch(o, g, style):
    """The object's box, or None when it lies outside the picture."""
    radius = RADIUS[o.size] * g.short
    shift = max(1, round(0.03 * g.short / g.pitch))  # shadow offset in samples
    blur = max(0.09 * g.short, 2.0 * g.pitch) if style != "cartoon" else g.pitch
    line = _line(g) / 2 if style == "cartoon" else 0.0
    reach = radius + max(blur / 2, line + g.pitch)
    cx, cy = o.x * g.w, o.y * g.h
    i0, i1 = math.floor((cy - reach) / g.pitch), math.ceil((cy + reach) / g.pitch) + shift
    j0, j1 = math.floor((cx - reach) / g.pitch), math.ceil((cx + reach) / g.pitch) + shift
    i0, j0, i1, j1 = max(i0, 0), max(j0, 0), min(i1, g.v.size), min(j1, g.u.size)
    if i0 >= i1 or j0 >= j1:
        return None
    # one distance field serves body and shadow: evaluated from `shift` samples further up and left
    scale = np.float32(g.pitch / radius)
    x0, y0 = ((j0 - shift + 0.5) * g.pitch - cx) / radius, ((i0 - shift + 0.5) * g.pitch - cy) / radius
    x = np.arange(j1 - j0 + shift, dtype=np.float32)[None] * scale + np.float32(x0)
    y = np.arange(i1 - i0 + shift, dtype=np.float32)[:, None] * scale + np.float32(y0)
    c, s = math.cos(math.radians(o.angle)), math.sin(math.radians(o.angle))
    x, y = x * c + y * s, y * c - x * s
    d = _DISTANCE[o.shape](x, y)
    shadow = _clip01(0.5 - d[:-shift, :-shift] * (radius / blur))
    x, y, d = x[shift:, shift:], y[shift:, shift:], d[shift:, shift:]
    cover = _clip01((0.5 + line / g.pitch) - d * (radius / g.pitch))
    shadow = shadow * shadow * (3 - 2 * shadow)
    return _Patch(slice(i0, i1), slice(j0, j1), x, y, d, cover, shadow, radius / g.pitch)


def _line(g):
    return max(0.9 * g.pitch, 0.022 * g.short)  # width of drawn outlines in pixels


def _paint(img, p, o, g, style):
    """Blend one object and its shadow into img, in place."""
    box = img[p.rows, p.cols]
    box *= (1 - (0.30 if style == "cartoon" else 0.42) * p.shadow)[..., None]
    c = _rgb(*COLOURS[o.colour])
    c2 = _rgb(*_SECOND[o.colour]) if o.colour in _SECOND else c * 0.22 + 0.78
    if style == "cartoon" and o.material == "matte":
        rgb, alpha = c, 1.0
    else:
        rgb, alpha = _SHADE[o.material](p.x, p.y, p.d, c, c2, p.px)
    if style == "cartoon":
        ink = _clip01(0.5 + (p.d * p.px + _line(g) / 2 / g.pitch))
        rgb, alpha = _mix(rgb, _rgb(0.05, 0.04, 0.08), ink), np.maximum(alpha, ink)
    else:  # a slightly darker edge, so that no object melts into a background of its colour
        rgb = rgb * (1 - 0.22 * _clip01(1.5 + p.d * p.px))[..., None]
    box += (p.cover * alpha)[..., None] * (rgb - box)


# ---- styles --------------------------------------------------------------------------------------


def _spread(a, k, weight):
    """3-tap blur (weight, 1 - 2 weight, weight) of [H, W, 3] along both axes, taps k samples apart, edges
    repeated."""
    for axis in (0, 1):
        a = np.moveaxis(a, axis, 0)
        n = a.shape[0]
        up, down = a[np.maximum(np.arange(n) - k, 0)], a[np.minimum(np.arange(n) + k, n - 1)]
        a = np.moveaxis((1 - 2 * weight) * a + weight * (up + down), 0, axis)
    return a


def _edges(a, k):
    """Sum of absolute differences of a [H, W] field k samples to the right and down."""
    e = np.zeros_like(a)
    e[:-k] += np.abs(a[k:] - a[:-k])
    e[:, :-k] += np.abs(a[:, k:] - a[:, :-k])
    return e


def _photo(img, g, r):
    return img


def _cartoon(img, g, r):
    grey = _clip01(img.mean(-1, keepdims=True))
    return np.floor(grey * 8.99) / 8.4 + 1.25 * (img - grey)  # lightness in steps, hue kept


def _sketch(img, g, r):
    k = _reach("sketch", g)
    grey = img.mean(-1)
    paper = _rgb(0.97, 0.96, 0.93)
    hatch = np.sin((g.u + g.v) * (2 * math.pi * 15)) + 0.6 * (_noise("grain", g, r[5], r[6]) - 0.5)
    dark = 0.20 * _clip01(hatch) * (1 - grey) + 1.3 * np.minimum(np.maximum(_edges(grey, k) - 0.05, 0), 0.6)
    return _mix(paper, img * 1.05, np.float32([[0.52]])) * (1 - np.minimum(dark, 0.85))[..., None]


def _watercolor(img, g, r):
    k = _reach("watercolor", g) // 2
    soft = _spread(img, k, min(0.25, 0.2 * g.short / 64))
    wash = _noise("smooth", g, r[4], r[5], 1.5, 1.5) - 0.5
    f = 0.72 + 0.5 * wash + 0.16 * (_noise("grain", g, r[5], r[6]) - 0.5)
    edge = np.minimum(_edges(soft.mean(-1), k), 0.3)
    return _mix(_rgb(0.99, 0.97, 0.93), soft, f) * (1 - 0.7 * edge)[..., None] + 0.04


def _pixel(img, g, r):
    grey = _clip01(img.mean(-1, keepdims=True))
    return np.floor(grey * 9.99) / 9.4 + 1.1 * (img - grey)


_DRAW_STYLE = {"photo": _photo, "cartoon": _cartoon, "sketch": _sketch, "watercolor": _watercolor,
               "pixel": _pixel}  # fmt: skip
STYLES = tuple(_DRAW_STYLE)


def _reach(style, g):
    """How many samples a style carries a pixel's influence."""
    k = max(1, round(g.short / 64))
    return {"sketch": k, "watercolor": 2 * k}.get(style, 0)


# ---- pictures ------------------------------------------------------------------------------------


def _render(scene, h, w):
    """Picture uint8 [h, w, 3] and label map uint8 [h, w] in one pass."""
    g = _grid_for(scene, h, w)
    r = rng_for(scene.seed, 2).random(8).tolist()
    img = np.ascontiguousarray(_DRAW_BACKGROUND[scene.background](g, r))
    labels = np.zeros(img.shape[:2], np.uint8)
    for k, o in enumerate(scene.objects, 1):
        p = _patch(o, g, scene.style)
        if p is not None:
            _paint(img, p, o, g, scene.style)
            labels[p.rows, p.cols][p.d < 0] = k
    img = _DRAW_STYLE[scene.style](_DRAW_ENVIRONMENT[scene.environment](img, g, r), g, r)
    img = (_clip01(img) * 255 + 0.5).astype(np.uint8, order="C")
    return _enlarge(img, g), _enlarge(labels, g)


def _enlarge(a, g):
    return a if g.pitch == 1 else np.ascontiguousarray(a.repeat(g.pitch, 0).repeat(g.pitch, 1)[: g.h, : g.w])


def draw(scene, h, w):
    """Picture of a scene, uint8 [h, w, 3], any h, w >= 8. Places are fractions of w and h, sizes of the short
    side: shapes stay round in a wide picture."""
    return _render(scene, h, w)[0]


def instances(scene, h, w):
    """Label map uint8 [h, w]: 0 background, k where the k-th object (from 1) is the topmost with coverage
    above a half."""
    return _render(scene, h, w)[1]


def boxes(scene, h, w):
    """Boxes of the visible parts, one (x0, y0, x1, y1) in pixels (x1, y1 exclusive) per object, None where
    hidden."""
    labels, out = instances(scene, h, w), []
    for k in range(1, len(scene.objects) + 1):
        ys, xs = np.nonzero(labels == k)
        out.append((int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1) if len(xs) else None)
    return out


# ---- captions ------------------------------------------------------------------------------------

MAX_BYTES = 128  # of a caption: byte-level text encoders see all of it
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
_SIZE_WORDS = {"small": ("small", "tiny"), "medium": ("medium", "medium-sized"), "large": ("large", "big")}
_MATERIAL_WORDS = {m: (m, m) for m in MATERIALS} | {
    "matte": ("matte", "plain"), "metal": ("metal", "metallic"), "dotted": ("dotted", "spotted")}  # fmt: skip
_BACKGROUND_WORDS = {  # the first of each is the shortest
    "sky": ("in the sky", "against a cloudy sky", "up in the sky"),
    "grass": ("on grass", "on a green lawn", "on the grass"),
    "sand": ("on sand", "on a sandy beach", "on the sand"),
    "brick": ("on bricks", "on a brick wall", "in front of a brick wall"),
    "water": ("on water", "on rippling water", "floating on water"),
    "wood": ("on planks", "on wood planks", "on a plank floor"),
    "tiles": ("on tiles", "on a tiled floor", "on floor tiles"),
    "snow": ("on snow", "on a snowy field", "on white snow"),
    "space": ("in space", "in outer space", "in deep space"),
    "dunes": ("on dunes", "in the desert", "on desert dunes"),
}
_ENVIRONMENT_WORDS = {
    "clear": ("by day", "on a clear day", "in daylight"),
    "sunset": ("at sunset", "at dusk", "in evening light"),
    "night": ("at night", "in the dark", "by moonlight"),
    "fog": ("in fog", "in thick fog", "on a foggy day"),
    "rain": ("in rain", "in the rain", "on a rainy day"),
    "snowfall": ("in snowfall", "while it snows", "as snow falls"),
}
_STYLE_WORDS = {
    "photo": ("photo", "photo"), "cartoon": ("cartoon", "cartoon drawing"),
    "sketch": ("sketch", "pencil sketch"),
    "watercolor": ("watercolor", "watercolor painting"), "pixel": ("pixel art", "pixel art picture"),
}  # fmt: skip
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_PLACES = tuple((v, u) for v in ("top", "middle", "bottom") for u in ("left", "center", "right"))


def _place_of(o):
    """(top | middle | bottom, left | center | right): thirds of the picture by the object's centre."""
    return ("top", "middle", "bottom")[int(o.y * 2.999)], ("left", "center", "right")[int(o.x * 2.999)]


def _place_words(place):
    v, u = place
    if place == ("middle", "center"):
        return "in the center"
    if v == "middle":
        return f"on the {u}"
    return f"at the {v}" if u == "center" else f"at the {v} {u}"


def _off(said, true):
    """Whether a place is plainly wrong: 'on the left' is not wrong of something at the top left."""
    centre = said == ("middle", "center")
    return centre or said[0] not in ("middle", true[0]) or said[1] not in ("center", true[1])


@dataclass(frozen=True)
class _Group:
    """A mention of `count` objects that share what is said of them; None = not said."""

    count: int
    shape: str
    colour: str
    material: str | None = None
    size: str | None = None
    place: tuple[str, str] | None = None

    def matches(self, o):
        return (o.shape == self.shape and o.colour == self.colour and self.material in (None, o.material)
                and self.size in (None, o.size) and self.place in (None, _place_of(o)))  # fmt: skip


@dataclass(frozen=True)
class _Facts:
    """What a caption says. relation: of the first group to the second; total: the number of objects; None =
    not said."""

    groups: tuple[_Group, ...]
    background: str
    environment: str | None = None
    style: str | None = None
    relation: str | None = None
    total: int | None = None


def _holds(facts, scene):
    """Whether every statement is true of the scene; 'a' means at least one, 'two' and more mean exactly."""
    for g in facts.groups:
        n = sum(g.matches(o) for o in scene.objects)
        if n == 0 or (g.count > 1 and n != g.count):
            return False
    if facts.relation is not None:
        pairs = [(a, b) for a in scene.objects for b in scene.objects
                 if a is not b and facts.groups[0].matches(a) and facts.groups[1].matches(b)]  # fmt: skip
        if not any(_relation(a, b) == facts.relation for a, b in pairs):
            return False
    return (facts.background == scene.background and facts.environment in (None, scene.environment)
            and facts.style in (None, scene.style) and facts.total in (None, len(scene.objects))
            and bool(facts.groups) == bool(scene.objects))  # fmt: skip


def _relation(a, b):
    """How a lies to b when it is plain to see, else None."""
    dx, dy = a.x - b.x, a.y - b.y
    if max(abs(dx), abs(dy)) < 0.25 or min(abs(dx), abs(dy)) > 0.6 * max(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


_DRAWS = 24  # uniform draws a caption takes from its generator, whatever the scene


def _facts(scene, u, level):
    """Facts to say of a scene. level 0 says most; 1 drops places, 2 sizes, 3 materials; from 5 on only some
    objects are named."""
    material, size = level < 3 and u[0] < 0.92, level < 2 and u[1] < 0.45
    place = level < 1 and u[2] < (0.5 if len(scene.objects) == 1 else 0.2)
    order = sorted(range(len(scene.objects)), key=lambda k: u[12 + k % 8])
    groups = {}
    for o in (scene.objects[k] for k in order):
        g = _Group(0, o.shape, o.colour, o.material if material else None, o.size if size else None,
                   _place_of(o) if place else None)  # fmt: skip
        groups[g] = groups.get(g, 0) + 1
    groups = tuple(replace(g, count=n) for g, n in groups.items())
    relation = None
    if len(scene.objects) == 2 and len(groups) == 2 and not place and u[3] < 0.5 and level < 4:
        relation = _relation(*(scene.objects[k] for k in order))
    if level >= 5:
        groups = groups[: 8 - level]
    return _Facts(
        groups, scene.background,
        None if scene.environment == "clear" and (u[4] < 0.75 or level > 3) else scene.environment,
        None if scene.style == "photo" and (u[5] < 0.75 or level > 3) else scene.style,
        relation, len(scene.objects) if u[6] < 0.12 and level < 4 and len(scene.objects) > 1 else None,
    )  # fmt: skip


def _number(n):
    return _NUMBERS[n] if n < len(_NUMBERS) else str(n)


def _article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def _say_group(g, u):
    shape = g.shape if g.count == 1 else g.shape + ("es" if g.shape == "cross" else "s")
    words = [_pick(_SIZE_WORDS[g.size], u[7]) if g.size else "", g.colour,
             _pick(_MATERIAL_WORDS[g.material], u[8]) if g.material else "", shape]  # fmt: skip
    words = " ".join(word for word in words if word)
    words = _article(words) if g.count == 1 else f"{_number(g.count)} {words}"
    return f"{words} {_place_words(g.place)}" if g.place else words


def _say(facts, u, short=False):
    """Facts in words; the draws u choose the wording and never the facts."""
    names = [_say_group(g, u) for g in facts.groups]
    if facts.relation is not None:
        things = f"{names[0]} {'to the ' if 'of' in facts.relation else ''}{facts.relation} {names[1]}"
    else:
        things = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names) or "nothing"
    where = _pick(_BACKGROUND_WORDS[facts.background][: 1 if short else 3], u[9])
    if facts.total is not None:
        things, where = f"{_number(facts.total)} shapes", f"{where}: {things}"
    when, style = facts.environment or "", facts.style or ""
    if when:
        when = _pick(_ENVIRONMENT_WORDS[when][: 1 if short else 3], u[10])
    if style:
        style = _pick(_STYLE_WORDS[style][: 1 if short else 2], u[11])
    form = int(u[20] * 4) if not short else 0
    if when and (form == 1 or facts.total is not None):
        scene_words = f"{when}, {things} {where}"
    else:
        scene_words = f"{things} {where} {when}".rstrip()
    if not style:
        return scene_words
    if form == 2 and not scene_words.startswith(when or " "):
        return f"{_article(_STYLE_WORDS[facts.style][1])} of {scene_words}"
    return f"{style}: {scene_words}" if form == 3 else f"{scene_words}, {style}"


def _fitting(scene, u):
    """The fullest facts whose sentence fits: (facts, short, text)."""
    for level in range(8):
        facts = _facts(scene, u, level)
        for short in (False, True):
            text = _say(facts, u, short)
            if len(text) <= MAX_BYTES:
                return facts, short, text
    raise AssertionError(text)


def caption(scene, rng):
    """A true caption of a scene, ASCII, at most 128 bytes. Names every object (with fewer words when there
    are many), the background, the environment unless clear and the style unless photo (those two are said
    now and then)."""
    return _fitting(scene, rng.random(_DRAWS).tolist())[2]


def _wrong(facts, kind, scene, rng):
    """Facts with one statement of the given kind changed to a false one, or None when there is no such
    statement."""
    def other(options, true):
        return _pick([o for o in options if o != true], rng.random())

    if kind in ("background", "environment", "style"):
        true = getattr(facts, kind)
        options = {"background": BACKGROUNDS, "environment": ENVIRONMENTS, "style": STYLES}[kind]
        return None if true is None else replace(facts, **{kind: other(options, true)})
    if kind == "relation":
        return None if facts.relation is None else replace(facts, relation=_OPPOSITE[facts.relation])
    if not facts.groups:
        return None
    k = int(rng.random() * len(facts.groups))
    g = facts.groups[k]
    if kind == "count":
        if facts.total is not None and len(facts.groups) == 1:
            return None
        changed = replace(g, count=min(g.count + 1 + int(rng.random() * 2), 5))
        if changed.count <= g.count or facts.relation is not None:
            return None
        total = None if facts.total is None else facts.total + changed.count - g.count
        return replace(facts, groups=facts.groups[:k] + (changed,) + facts.groups[k + 1 :], total=total)
    options = {"shape": SHAPES, "colour": tuple(COLOURS), "material": MATERIALS, "size": SIZES,
               "place": _PLACES}[kind]  # fmt: skip
    if getattr(g, kind) is None:
        return None
    changed = replace(g, **{kind: other(options, getattr(g, kind))})
    if kind == "place" and not all(_off(changed.place, _place_of(o)) for o in scene.objects if g.matches(o)):
        return None
    if any(changed.matches(o) for o in scene.objects):
        return None  # it would be true of another object
    return replace(facts, groups=facts.groups[:k] + (changed,) + facts.groups[k + 1 :])


def _stranger(rng):
    """A random scene from a generator."""
    return scene(int(rng.random() * 2**48), 0)


FALSE_KINDS = ("colour", "shape", "material", "size", "place", "relation", "count", "background",
               "environment", "style", "scene")  # fmt: skip


def false_caption(scene, rng, kind=None):
    """(caption, kind): a caption that is false of the scene, wrong in one statement (one of FALSE_KINDS;
    'scene' = a true caption of another scene). From a generator in the same state, caption() gives the
    true sentence with the same wording, so that the two differ in the fact alone. kind: ask for one; where
    the sentence does not allow it another is taken."""
    u = rng.random(_DRAWS).tolist()
    facts, short, _ = _fitting(scene, u)
    ranks = dict(zip(FALSE_KINDS, rng.random(len(FALSE_KINDS)).tolist()))
    kinds = sorted(FALSE_KINDS, key=ranks.get)
    if kind is not None:
        kinds = [kind] + [k for k in kinds if k != kind]
    for name in kinds:
        for _ in range(4):
            if name == "scene":
                wrong, _, text = _fitting(_stranger(rng), u)
            else:
                wrong = _wrong(facts, name, scene, rng)
                text = _say(wrong, u, short) if wrong is not None else ""
            if wrong is not None and len(text) <= MAX_BYTES and not _holds(wrong, scene):
                return text, name
    raise AssertionError("no false caption")  # unreachable: the background is always named


# ---- the seven edits of OmniEdit Table 2 ---------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """One edit. task: key of EDITS; target: the scene after it; ids: labels (from 1) of the touched objects,
    in the target for `add` and in the source otherwise; None when the whole picture is meant (background,
    environment, style)."""

    task: str
    target: Scene
    instruction: str
    ids: tuple[int, ...] | None


_BACKGROUND_NOUNS = {"sky": "a cloudy sky", "grass": "a green lawn", "sand": "a sandy beach",
                     "brick": "a brick wall", "water": "rippling water", "wood": "wood planks",
                     "tiles": "a tiled floor", "snow": "a snowy field", "space": "outer space",
                     "dunes": "desert dunes"}  # fmt: skip
_ENVIRONMENT_NOUNS = {"clear": "a clear day", "sunset": "sunset", "night": "night", "fog": "fog",
                      "rain": "rain", "snowfall": "snowfall"}  # fmt: skip


def _phrase(o, fields):
    """'the small red glass star at the top left' with only the given fields said."""
    words = [getattr(o, f) for f in ("size", "colour", "material", "shape") if f in fields]
    return " ".join(["the", *words] + ([_place_words(_place_of(o))] if "place" in fields else []))


def _refer(scene, rng):
    """(k, phrase): an object of the scene, index from 0, and words that fit it and no other."""
    if not scene.objects:
        raise ValueError("the scene has no object to edit")
    u = rng.random(len(scene.objects) + 2).tolist()
    colour = ("shape", "colour")
    says = [("shape",), colour, (*colour, "material"), (*colour, "size"), (*colour, "place"),
            (*colour, "material", "size"), (*colour, "material", "size", "place")]  # fmt: skip
    for k in sorted(range(len(scene.objects)), key=u.__getitem__):
        o = scene.objects[k]
        unique = [f for f in says if sum(_phrase(o, f) == _phrase(q, f) for q in scene.objects) == 1]
        if unique:
            few = [f for f in unique[:2] if f != ("shape",) or u[-2] < 0.3] or unique[-1:]
            return k, _phrase(o, few[0] if u[-1] < 0.7 else _pick(unique, (u[-1] - 0.7) / 0.3))
    # only twins in the same part of the picture are left: the outermost one of a kind has a name
    o = scene.objects[0]
    twins = [q for q in scene.objects if _phrase(q, says[2]) == _phrase(o, says[2])]
    far = max(("x", "y"), key=lambda a: max(getattr(q, a) for q in twins) - min(getattr(q, a) for q in twins))
    o = min(twins, key=lambda q: getattr(q, far))
    most = "the leftmost" if far == "x" else "the topmost"
    return scene.objects.index(o), _phrase(o, says[2]).replace("the", most, 1)


def _with(scene, k, o):
    return replace(scene, objects=scene.objects[:k] + (o,) + scene.objects[k + 1 :])


def _other(options, true, u):
    return _pick([o for o in options if o != true], u)


def _colours_on(scene):
    return [c for c in COLOURS if c not in _CLASH[scene.background]]


def swap(scene, rng):
    """Object swap: another shape, colour and material in the place and size of an object."""
    k, old = _refer(scene, rng)
    u, o = rng.random(4).tolist(), scene.objects[k]
    new = replace(o, shape=_other(SHAPES, o.shape, u[0]), colour=_other(_colours_on(scene), o.colour, u[1]),
                  material=_pick(MATERIALS, u[2]))  # fmt: skip
    text = _pick(("replace {} with {}", "swap {} for {}", "turn {} into {}", "change {} into {}"), u[3])
    text = text.format(old, _article(f"{new.colour} {new.material} {new.shape}"))
    return Edit("swap", _with(scene, k, new), text, (k + 1,))


def remove(scene, rng):
    """Object removal: the target is drawn without the object, so what lay under it is exact."""
    k, old = _refer(scene, rng)
    texts = ("remove {}", "delete {}", "erase {}", "take {} away", "remove {} from the picture")
    target = replace(scene, objects=scene.objects[:k] + scene.objects[k + 1 :])
    return Edit("remove", target, _pick(texts, rng.random()).format(old), (k + 1,))


def add(scene, rng):
    """Object addition in a free place (of 32 tried the freest, at most slightly overlapping), on top of the
    others."""
    u = rng.random(70).tolist()
    sizes = SIZES[: 1 + int(u[0] * 3)][::-1]
    size, place = next(((s, p) for s in sizes if (p := _place(scene.objects, s, u[6:], -0.05))), (None, None))
    if place is None:
        size, place = "small", _place(scene.objects, "small", u[6:], -99.0)
    new = Object(_pick(SHAPES, u[1]), _pick(_colours_on(scene), u[2]), _pick(MATERIALS, u[3]), size,
                 round(place[0], 4), round(place[1], 4), round((u[4] - 0.5) * 24, 2))  # fmt: skip
    text = _pick(("add {} {}", "put {} {}", "insert {} {}", "place {} {}"), u[5])
    what = _article(f"{new.size} {new.colour} {new.material} {new.shape}")
    text = text.format(what, _place_words(_place_of(new)))
    return Edit("add", replace(scene, objects=(*scene.objects, new)), text, (len(scene.objects) + 1,))


def attribute(scene, rng):
    """Attribute modification: another colour (half of the time), material or size of one object."""
    k, old = _refer(scene, rng)
    u, o = rng.random(3).tolist(), scene.objects[k]
    rest = scene.objects[:k] + scene.objects[k + 1 :]
    sizes = [s for s in SIZES if s != o.size and _gap(o.x, o.y, RADIUS[s], rest) > -0.05
             and min(o.x, o.y, 1 - o.x, 1 - o.y) > RADIUS[s]]  # fmt: skip
    if u[0] < 0.5:
        new = replace(o, colour=_other(_colours_on(scene), o.colour, u[1]))
        texts = ("make {} {}", "paint {} {}", "change the color of {} to {}", "recolor {} to {}")
    elif u[0] < 0.8 or not sizes:
        new = replace(o, material=_other(MATERIALS, o.material, u[1]))
        texts = ("make {} {}", "change the material of {} to {}", "give {} a {} look")
    else:
        new = replace(o, size=_pick(sizes, u[1]))
        texts = ("make {} {}", "change the size of {} to {}", "resize {} to {}")
    value = next(getattr(new, f) for f in ("colour", "material", "size") if getattr(new, f) != getattr(o, f))
    return Edit("attribute", _with(scene, k, new), _pick(texts, u[2]).format(old, value), (k + 1,))


def background(scene, rng):
    """Background swap; prefers backgrounds on which no object's colour would vanish."""
    u = rng.random(2).tolist()
    others = [b for b in BACKGROUNDS if b != scene.background]
    b = _pick([b for b in others if not any(o.colour in _CLASH[b] for o in scene.objects)] or others, u[0])
    texts = ("replace the background with {}", "change the background to {}",
             "swap the background for {}", "use {} as the background")  # fmt: skip
    text = _pick(texts, u[1]).format(_BACKGROUND_NOUNS[b])
    return Edit("background", replace(scene, background=b), text, None)


def environment(scene, rng):
    """Environment change: another weather or time of day."""
    u = rng.random(3).tolist()
    e = _other(ENVIRONMENTS, scene.environment, u[0])
    text = _pick(("change the scene from {0} to {1}", "change the scene to {1}",
                  "make the scene look like {1}", "show the same scene {2}"), u[1])  # fmt: skip
    now, then = _ENVIRONMENT_NOUNS[scene.environment], _ENVIRONMENT_NOUNS[e]
    text = text.format(now, then, _pick(_ENVIRONMENT_WORDS[e], u[2]))
    return Edit("environment", replace(scene, environment=e), text, None)


def style(scene, rng):
    """Style transfer."""
    u = rng.random(3).tolist()
    s = _other(STYLES, scene.style, u[0])
    text = _pick(("apply a {0} style to the picture", "turn the picture into {1}", "redraw it as {1}",
                  "make it look like {1}"), u[1])  # fmt: skip
    text = text.format(_STYLE_WORDS[s][0], _article(_STYLE_WORDS[s][1]))
    return Edit("style", replace(scene, style=s), text, None)


EDITS = {"swap": swap, "remove": remove, "add": add, "attribute": attribute, "background": background,
         "environment": environment, "style": style}  # fmt: skip


def edit_mask(edit, source, h, w):
    """Where an edit may change the picture, float32 [h, w], 1 = regenerate. swap, remove, add, attribute:
    everything the touched objects draw, shadow and the style's reach included, before and after: outside
    it source and target are equal bit for bit. background: the complement of the visible objects (through
    glass it still shows, as at their smoothed edges). environment, style: ones."""
    if edit.task == "background":
        return (instances(source, h, w) == 0).astype(np.float32)
    if edit.ids is None:
        return np.ones((h, w), np.float32)
    g = _grid_for(source, h, w)
    touched = np.zeros((g.v.size, g.u.size), bool)
    before = [source.objects[k - 1] for k in edit.ids if edit.task != "add"]
    after = [edit.target.objects[k - 1] for k in edit.ids if edit.task != "remove"]
    for o in before + after:
        p = _patch(o, g, source.style)
        if p is not None:
            touched[p.rows, p.cols] |= (p.cover > 0) | (p.shadow > 0)
    for _ in range(_reach(source.style, g)):
        touched[1:] |= touched[:-1].copy()
        touched[:-1] |= touched[1:].copy()
        touched[:, 1:] |= touched[:, :-1].copy()
        touched[:, :-1] |= touched[:, 1:].copy()
    return _enlarge(touched.astype(np.float32), g)


# ---- a dataset like any other --------------------------------------------------------------------

SPLITS = {"train": (1, 10_000_000), "heldout": (2, 100_000)}  # seed, number of scenes


class Scenes:
    """Source of captioned pictures (see data.py). split: train or heldout, which share no seed."""

    name = "scenes"

    def __init__(self, split="train"):
        if split not in SPLITS:
            raise SystemExit(f"error: scenes.py: split {split!r}: use one of {', '.join(SPLITS)}")
        self.seed, self.length = SPLITS[split]

    def __len__(self):
        return self.length

    def size(self, i):
        """None: a scene is drawn at any size."""
        return None

    def scene(self, i):
        if not 0 <= i < self.length:
            raise IndexError(f"scene {i} of {self.length}")
        return scene(self.seed, i)

    def load(self, i, h, w):
        """dict(image uint8 [h, w, 3], caption str, segments uint8 [h, w]), fixed for (split, i, h, w)."""
        s = self.scene(i)
        image, segments = _render(s, h, w)
        return {"image": image, "caption": caption(s, rng_for(self.seed, i, 3)), "segments": segments}


def sheet(source, n, size, columns=8):
    """Contact sheet of the first n scenes with their captions, a PIL image."""
    zoom = max(1, 160 // size)
    cell, line, margin = size * zoom, 11, 12
    high = cell + 7 * line + margin
    page = Image.new("RGB", (columns * (cell + margin) + margin, -(-n // columns) * high + margin), "white")
    pen = ImageDraw.Draw(page)
    for i in range(n):
        x, y = margin + i % columns * (cell + margin), margin + i // columns * high
        got = source.load(i, size, size)
        page.paste(Image.fromarray(got["image"]).resize((cell, cell), Image.Resampling.NEAREST), (x, y))
        text = "\n".join(textwrap.wrap(got["caption"], max(8, cell // 6)))
        pen.text((x, y + cell + 2), text, fill=(40, 40, 40), spacing=1)
    return page


def export(source, folder, n, size):
    """Write the first n scenes as an image folder: NAME.png, NAME.seg.png (8-bit label map) and
    metadata.jsonl."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metadata.jsonl", "w") as f:
        for i in range(n):
            got, name = source.load(i, size, size), f"{i:06d}"
            Image.fromarray(got["image"]).save(folder / f"{name}.png")
            Image.fromarray(got["segments"]).save(folder / f"{name}.seg.png")
            row = {"file_name": f"{name}.png", "text": got["caption"], "segments": f"{name}.seg.png"}
            f.write(json.dumps(row) + "\n")


@dataclass
class Config:
    sheet: str = ""  # write a contact sheet to this picture file
    export: str = ""  # write an image folder here
    n: int = 64  # how many scenes
    size: int = 64  # width and height in pixels
    split: str = "train"  # train or heldout


def main(cfg):
    source = Scenes(cfg.split)
    if not (cfg.sheet or cfg.export):
        raise SystemExit("error: scenes.py: nothing to do: give --sheet FILE.png or --export FOLDER")
    if not 0 < cfg.n <= len(source):
        raise SystemExit(f"error: scenes.py: --n {cfg.n}: use 1 to {len(source)}")
    try:
        if cfg.sheet:
            sheet(source, cfg.n, cfg.size).save(cfg.sheet)
            print(f"wrote {cfg.sheet}: {cfg.n} scenes at {cfg.size}x{cfg.size}")
        if cfg.export:
            export(source, cfg.export, cfg.n, cfg.size)
            print(f"wrote {cfg.export}: {cfg.n} pictures, label maps, metadata.jsonl")
    except (OSError, ValueError) as e:  # PIL: unknown file extension is a ValueError
        say = f"{cfg.export or cfg.sheet}: {e}: choose a writable place; a sheet ends in .png"
        raise SystemExit(f"error: scenes.py: {say}") from None


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
