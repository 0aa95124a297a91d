"""Where a large picture is worked on: squares around what is to be regenerated, each at the model's size.

A hole of 100 pixels in a photo of 4000, shrunk as a whole to the model's size, is a few pixels: what comes
back is a flat patch. Here every hole gets a window of its own (default ours, papers silent):

    compact     one window, twice as wide as the hole, so that a quarter of it is hole and the rest is context
    long        (a rim, a strip, a frame: over 3 times as long as it is thick) the whole picture first, which
                decides what is where, then tiles along it, twice as wide as it is thick
    large       (compact, but larger than the model's size) its window first, then tiles of the model's size,
                at most 4 along it
    never       smaller than the model's size: nothing is scaled up to be worked on

Tiles overlap by half. They start from what the first pass left, with noise upon it, so that they add detail
and no second object. Holes that fit into one such window share it. Pure functions of a mask.
"""

from collections import namedtuple

import numpy as np

from masks import pieces

CELLS = 128  # cells along the longer side, in which holes are told apart
LONG = 3  # length over thickness from which a hole is tiled
TILES = 4  # along a large hole
# tile: starts from what an earlier window has made
Window = namedtuple("Window", "top left height width tile", defaults=(False,))


def parts(mask):
    """bool [h, w] -> list of (cells bool [h', w'] of one connected hole, pixels a cell is wide)."""
    h, w = mask.shape
    cell = -(-max(h, w) // CELLS)
    padded = np.pad(mask, ((0, -h % cell), (0, -w % cell)))
    cells = padded.reshape(padded.shape[0] // cell, cell, -1, cell).any((1, 3))
    found = []
    for piece in pieces(cells):
        one = np.zeros_like(cells)
        one[piece[:, 0], piece[:, 1]] = True
        found.append((one, cell))
    return found


def thickness(cells):
    """Side of the largest square of cells that is all hole."""
    total = np.pad(cells.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    low, high = 1, min(cells.shape)
    while low < high:
        k = (low + high + 1) // 2
        full = total[k:, k:] - total[:-k, k:] - total[k:, :-k] + total[:-k, :-k]
        low, high = (k, high) if full.max() == k * k else (low, k - 1)
    return low


def box(mask):
    """top, left, bottom, right of what is true."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(ys[0]), int(xs[0]), int(ys[-1]) + 1, int(xs[-1]) + 1


def around(bounds, side, shape):
    """Window of `side` pixels around the middle of a box, moved into a picture of (h, w)."""
    out = []
    for low, high, n in zip(bounds[:2], bounds[2:], shape):
        length = min(side, n)
        out.append((min(max((low + high - length) // 2, 0), n - length), length))
    (top, height), (left, width) = out
    return Window(top, left, height, width)


def tiles(mask, bounds, side, shape):
    """Windows of `side` whose inner halves together hold all of a hole, those with most context first."""
    step, found = max(1, side // 2), []
    top, left, bottom, right = bounds
    for y in range(top, bottom, step):
        for x in range(left, right, step):
            here = mask[y:min(y + step, bottom), x:min(x + step, right)]
            if here.any():
                w = around((y, x, min(y + step, bottom), min(x + step, right)), side, shape)
                w = w._replace(tile=True)
                share = mask[w.top:w.top + w.height, w.left:w.left + w.width].mean()
                found.append((share, w))
    return [w for _, w in sorted(found)]


def plan(mask, size):
    """Mask [h, w], the model's size in pixels -> windows in the order in which they are to be filled, first
    those that start from noise, then tiles. None is empty of what is to be regenerated."""
    mask, shape = mask > 0, mask.shape
    whole, holes, rims = Window(0, 0, *shape), [], []  # holes: (bounds, side) of compact ones; rims: tiles
    if mask.all():
        return [whole]
    for cells, cell in parts(mask):
        top, left, bottom, right = (cell * v for v in box(cells))
        own = cells[top // cell:bottom // cell, left // cell:right // cell].repeat(cell, 0).repeat(cell, 1)
        here = mask[top:bottom, left:right]
        here = here & own[:here.shape[0], :here.shape[1]]
        bounds = tuple(v + (top, left)[i % 2] for i, v in enumerate(box(here)))
        longest, thick = max(bounds[2] - bounds[0], bounds[3] - bounds[1]), thickness(cells) * cell
        if longest <= max(LONG * thick, size // 2):
            holes.append((bounds, max(size, 2 * longest)))
        else:
            alone = np.zeros_like(mask)
            alone[top:top + here.shape[0], left:left + here.shape[1]] = here
            rims += tiles(alone, bounds, max(size, 2 * thick), shape)
    shared = []
    for a, side in sorted(holes):
        for i, (b, other) in enumerate(shared):
            both = (*np.minimum(a, b)[:2].tolist(), *np.maximum(a, b)[2:].tolist())
            if 2 * max(both[2] - both[0], both[3] - both[1]) <= max(side, other):
                shared[i] = both, max(side, other)
                break
        else:
            shared.append((a, side))
    first, fine = [around(bounds, side, shape) for bounds, side in shared if side < max(shape)], list(rims)
    if rims or len(first) < len(shared):
        first.append(whole)
    for bounds, _ in shared:
        longest = max(bounds[2] - bounds[0], bounds[3] - bounds[1])
        if longest > size:
            fine += tiles(mask, bounds, max(size, longest // TILES), shape)
    return list(dict.fromkeys(first + fine))


def trust(window, shape):
    """float32 [height, width] of a window in a picture of (h, w): 1 inside, falling to 0 over a quarter of
    its side towards the borders beyond which the picture goes on."""
    falls = []
    for start, length, n in zip(window[:2], window[2:4], shape):
        at, band = np.arange(length) + 0.5, max(1, length // 4)
        before = at / band if start > 0 else np.full(length, np.inf)
        after = (length - at) / band if start + length < n else np.full(length, np.inf)
        falls.append(np.minimum(np.minimum(before, after), 1).astype(np.float32))
    return falls[0][:, None] * falls[1]
