"""Masks made for training (ByteEdit Sec. 4.1): 1 = regenerate. Kinds as in the paper; every size and
probability is ours, the paper gives none. And what else is asked of masks."""

import math

import numpy as np
from PIL import Image, ImageDraw

ERASE_PROMPT = "empty background, nothing there"

TASKS = ("t2i", "inpaint", "edit", "outpaint", "erase")
# How often a sample loses its caption in supervised training (ours, the paper gives no probabilities). In
# feedback fewer do (train_pefl.py): a picture without one has nothing to align with
PROMPT_FREE = {"t2i": 0.0, "inpaint": 0.1, "edit": 0.0, "outpaint": 0.5, "erase": 0.0}


def dilate(m, r):
    """bool [h, w] grown by r pixels in every direction (a square), in time independent of r."""
    for axis in (0, 1) if r > 0 else ():
        n, c = m.shape[axis], np.cumsum(m, axis, dtype=np.int32)
        after, before = np.arange(n) + r, np.arange(n) - r - 1
        first = (before >= 0)[:, None] if axis == 0 else before >= 0
        m = c.take(np.minimum(after, n - 1), axis) > c.take(np.maximum(before, 0), axis) * first
    return m


def pieces(mask: np.ndarray) -> list[np.ndarray]:
    """bool [h, w] -> its connected parts (edges and corners touch), each as pixels [n, 2] of y, x."""
    runs, parent = [], []  # runs of ones: (y, from, to)

    def root(k):
        while parent[k] != k:
            parent[k] = k = parent[parent[k]]
        return k

    above = []
    for y, row in enumerate(np.asarray(mask, bool)):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
        here = []
        for a, b in zip(edges[::2].tolist(), edges[1::2].tolist()):
            k = len(runs)
            runs.append((y, a, b))
            parent.append(k)
            here.append(k)
            for j in above:
                if runs[j][1] <= b and a <= runs[j][2]:
                    parent[root(j)] = root(k)
        above = here
    parts = {}
    for k, (y, a, b) in enumerate(runs):
        parts.setdefault(root(k), []).append(np.stack([np.full(b - a, y), np.arange(a, b)], 1))
    return [np.concatenate(p) for p in parts.values()]


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
        solid = dilate(solid, max(1, round(side / 64)) if segments is not None else 0)
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
