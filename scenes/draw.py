"""Scenes: procedural captioned pictures whose every fact is known (numpy + PIL only).

A `Scene` is a small description: objects (shape, colour, material, size, place) on a background, in an
environment (weather, time of day) and a style. What scenes are made of is a level (LEVELS): "easy", one or
two large objects of few kinds, which a small model learns in hours on a CPU and a person reads at a glance
at 64x64; "hard", up to four small objects of every kind there is. From a scene follow, exactly: the picture
at any size, the instance label map, what lies under an object (draw the scene without it), true and false
captions (scenes/text.py) and the seven edits of OmniEdit Table 2 with their targets and masks
(scenes/edits.py). `python -m scenes` makes pages and folders of them.

Everything is a function of (seed, index). No global random state is used, and nothing drawn for one object
depends on another, so removing an object leaves every other pixel bit for bit the same. The drawings are
ours, no paper describes them.
"""

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

RADIUS = {"small": 0.135, "medium": 0.18, "large": 0.24, "huge": 0.30, "giant": 0.36}  # of the short side
SIZES = tuple(RADIUS)
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
CLASH = {"sky": ("cyan", "white"), "grass": ("green",), "sand": ("yellow",), "brick": ("brown",),
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
    textures. level: the key of LEVELS whose words its edits and false captions are made of."""

    objects: tuple[Object, ...]
    background: str
    environment: str
    style: str
    seed: int
    level: str = "hard"


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


def pick(options, u):
    """One of the options by a uniform draw u in [0, 1): only random() is used, its stream is stable across
    numpy versions."""
    return options[int(u * len(options))]


def gap(x, y, r, objects):
    """Free distance between a disc and the nearest object, in short sides; negative when they overlap."""
    return min((math.hypot(x - o.x, y - o.y) - r - RADIUS[o.size] for o in objects), default=1.0)


def free_place(objects, size, us, worst=-0.3):
    """First place that touches no object, else the best one if it overlaps by at most `worst` radii, else
    None."""
    r = RADIUS[size]
    edge, best = r + 0.03, None
    for ux, uy in zip(us[0::2], us[1::2]):
        x, y = edge + ux * (1 - 2 * edge), edge + uy * (1 - 2 * edge)
        free = gap(x, y, r, objects)
        if best is None or free > best[0]:
            best = (free, x, y)
        if free > 0.01:
            break
    return best[1:] if best[0] > worst * r else None


def scene(seed, index, level="easy"):
    """Scene number `index` of stream `seed`: objects as the level has them, attributes independent and
    uniform apart from CLASH and that about one scene in eight repeats one object."""
    us, of = iter(rng_for(seed, index, 1).random(200).tolist()), LEVELS[level]
    background = pick(of.backgrounds, next(us))
    environment = "clear" if next(us) < of.p_clear else pick(ENVIRONMENTS, next(us))
    style = "photo" if next(us) < of.p_photo else pick(STYLES, next(us))
    n = pick(of.counts, next(us))
    alike = next(us) < 0.12
    colours = of.colours_on(background)
    texture_seed = int(next(us) * 2**48)
    objects = []
    for _ in range(n):
        kind = pick(of.shapes, next(us)), pick(colours, next(us)), pick(of.materials, next(us))
        size, angle = pick(of.sizes[: of.fitting[n - 1]], next(us)), round((next(us) - 0.5) * 24, 2)
        place = free_place(objects, size, [next(us) for _ in range(36)])
        if alike and objects:
            kind = objects[0].shape, objects[0].colour, objects[0].material
        if place is not None:
            objects.append(Object(*kind, size, round(place[0], 4), round(place[1], 4), angle))
    return Scene(tuple(objects), background, environment, style, texture_seed, level)


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


def _grid_for(style, h, w):
    if h < 8 or w < 8:
        raise SystemExit(f"error: scenes: picture size {h}x{w}: use at least 8x8 pixels")
    return _grid(h, w, max(2, round(min(h, w) / 28)) if style == "pixel" else 1)


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
    dark = pick(((0.18, 0.42, 0.12), (0.26, 0.44, 0.10), (0.14, 0.42, 0.22)), r[0])
    return _mix(_rgb(*dark), _rgb(0.56, 0.76, 0.32), f)


def _sand(g, r):
    phase = g.v * (7 + 3 * r[3]) + (r[4] - 0.5) * g.u + 0.9 * _noise("smooth", g, r[1], r[2], 0.5, 0.5)
    f = 0.5 + 0.22 * np.sin(phase * (2 * math.pi)) + 0.45 * (_noise("grain", g, r[5], r[6]) - 0.5)
    dark, light = pick((((0.76, 0.64, 0.44), (0.95, 0.87, 0.68)),
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
    face = pick(((0.68, 0.34, 0.26), (0.72, 0.46, 0.34), (0.58, 0.40, 0.36), (0.70, 0.60, 0.50)), r[0])
    f = _clip01((d - 0.011 * g.short) / g.pitch + 0.5)
    return _mix(_rgb(0.80, 0.77, 0.72), _rgb(*face), f) * (0.86 + 0.26 * tone)[..., None]


def _water(g, r):
    wave = np.sin((g.v * (6 + 2 * r[3]) + 1.6 * _noise("smooth", g, r[1], r[2], 0.6, 1.0)) * (2 * math.pi))
    deep, light = pick((((0.05, 0.30, 0.52), (0.26, 0.58, 0.76)),
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
    dark, light = pick((((0.46, 0.30, 0.17), (0.70, 0.50, 0.31)), ((0.60, 0.43, 0.26), (0.85, 0.68, 0.46)),
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
    a, b = pick((((0.86, 0.84, 0.78), (0.56, 0.62, 0.66)), ((0.90, 0.88, 0.86), (0.66, 0.50, 0.46)),
                  ((0.84, 0.88, 0.84), (0.46, 0.60, 0.52)),
                  ((0.92, 0.90, 0.94), (0.60, 0.56, 0.70))), r[0])  # fmt: skip
    shade = 0.94 + 0.1 * _noise("smooth", g, r[4], r[5])
    return _mix(_rgb(*a), _rgb(*b), 0.5 + 0.5 * q[0] * q[1]) * shade[..., None]


def _snow(g, r):
    f = _clip01(_noise("smooth", g, r[1], r[2], 0.5, 1.2) * 1.6 - 0.3)
    shade = pick(((0.72, 0.80, 0.92), (0.78, 0.82, 0.90), (0.74, 0.84, 0.90)), r[0])
    glitter = _clip01(_noise("grain", g, r[3], r[4]) * 5 - 3.7)
    return _mix(_mix(_rgb(*shade), _rgb(0.96, 0.98, 1.0), f), _rgb(1, 1, 1), glitter)


def _space(g, r):
    haze = pick(((0.22, 0.14, 0.38), (0.10, 0.20, 0.40), (0.30, 0.12, 0.28)), r[0])
    img = _mix(_rgb(0.03, 0.04, 0.12), _rgb(*haze), _clip01(_noise("smooth", g, r[1], r[2]) * 1.5 - 0.3))
    return _mix(img, _rgb(1.0, 0.98, 0.90), _specks(g, 5, r[3] * 99, r[4] * 99, 0.011))


def _dunes(g, r):
    img = _mix(_rgb(0.62, 0.80, 0.93), _rgb(0.97, 0.90, 0.74), _clip01(g.down * 3))
    img = np.broadcast_to(img, (g.v.size, g.u.size, 3)).copy()
    light = _rgb(*pick(((0.93, 0.70, 0.42), (0.90, 0.62, 0.38), (0.92, 0.76, 0.50)), r[0]))
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


# ---- levels --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """What scenes are drawn from. Environments and styles are the same on every level; p_clear and p_photo
    are the shares that get none, the rest is uniform."""

    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    materials: tuple[str, ...]
    sizes: tuple[str, ...]  # keys of RADIUS, small ones first
    backgrounds: tuple[str, ...]
    counts: tuple[int, ...]  # the number of objects is one of these
    fitting: tuple[int, ...]  # how many of the sizes are used where there are 1, 2, ... objects
    most: int  # objects a scene may have after edits
    crowds: bool  # whether one is added even where there is no room, upon another
    p_clear: float
    p_photo: float
    says: int  # how much captions leave out from the first (scene_text._facts): 0 nothing, 2 places and sizes
    plain: str | None  # the material that captions do not mention; all others are then always said
    max_bytes: int  # of captions and instructions: byte-level text encoders see all of them

    def colours_on(self, background):
        """Colours that do not vanish on a background."""
        return [c for c in self.colours if c not in CLASH[background]]


LEVELS = {
    "easy": Level(("circle", "square", "triangle", "star", "heart", "ring"),
                  ("red", "yellow", "green", "blue", "purple", "white"), ("matte", "striped"),
                  ("large", "huge", "giant"), ("sky", "grass", "wood", "brick", "snow", "space"),
                  counts=(1, 1, 1, 1, 1, 1, 1, 2, 2, 2), fitting=(3, 1), most=2, crowds=False, p_clear=0.5,
                  p_photo=0.75, says=2, plain="matte", max_bytes=96),
    "hard": Level(SHAPES, tuple(COLOURS), MATERIALS, ("small", "medium", "large"), BACKGROUNDS,
                  counts=(1, 1, 2, 2, 2, 3, 3, 3, 4, 4), fitting=(3, 3, 3, 2), most=6, crowds=True,
                  p_clear=0.3, p_photo=0.4, says=0, plain=None, max_bytes=128),
}  # fmt: skip


# ---- pictures ------------------------------------------------------------------------------------


def _render(scene, h, w):
    """Picture uint8 [h, w, 3] and label map uint8 [h, w] in one pass."""
    g = _grid_for(scene.style, h, w)
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


def footprint(objects, style, h, w):
    """Every pixel that any of the objects has a part in, bool [h, w]: body, shadow and as far as the style
    carries them. Outside it a picture is bit for bit the same with and without them."""
    g = _grid_for(style, h, w)
    touched = np.zeros((g.v.size, g.u.size), bool)
    for o in objects:
        p = _patch(o, g, style)
        if p is not None:
            touched[p.rows, p.cols] |= (p.cover > 0) | (p.shadow > 0)
    for _ in range(_reach(style, g)):
        touched[1:] |= touched[:-1].copy()
        touched[:-1] |= touched[1:].copy()
        touched[:, 1:] |= touched[:, :-1].copy()
        touched[:, :-1] |= touched[:, 1:].copy()
    return _enlarge(touched, g)
