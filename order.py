"""Aspect buckets, and the order in which samples come: pure functions of (seed, step, rank, world).

Nothing is stored and nothing dropped; every rank has the same shape at a step. data.py's loaders use it.
"""

import math
from collections import namedtuple
from functools import lru_cache

import numpy as np

from pictures import BadFile

DRAWN = 1_000_000  # pairs of a procedural source among which tasks or scores are chosen


#### 1. shapes ###############################################################################################
SCENE_RATIOS = (1, 2 / 3, 3 / 2, 3 / 4, 4 / 3, 9 / 16, 16 / 9)  # the seven of OmniEdit
RATIOS = SCENE_RATIOS + (1 / 2, 2, 1 / 3, 3, 1 / 4, 4)


@lru_cache(maxsize=None)
def shapes(image_size, stride, ratios=RATIOS):
    """(h, w) of every ratio h / w: multiples of `stride` with about image_size**2 pixels."""
    if image_size < stride or image_size % stride:
        raise SystemExit(f"error: image_size: {image_size}: use a multiple of {stride}")
    sides = [[round(image_size * s / stride) * stride or stride for s in (r**0.5, r**-0.5)] for r in ratios]
    return tuple(dict.fromkeys(map(tuple, sides)))


@lru_cache(maxsize=1 << 16)
def bucket(h, w, image_size, stride, aspects):
    """Shape (h', w') at which a picture of (h, w) is used: the one rule for caching, training and sampling.

    Without `aspects` a square; else, of the shapes 1:4 to 4:1 of equal area, the nearest in log ratio."""
    if not aspects:
        return shapes(image_size, stride, (1,))[0]
    return min(shapes(image_size, stride), key=lambda s: (round(abs(math.log(h * s[1] / (w * s[0]))), 9), s))


#### 2. order ################################################################################################
def mix(z):
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
            left, right = right, left ^ (mix(right + k) & low)
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


def paced(counts, rng):
    """An even mixture of `counts` things: (kind, place in its kind) of each of sum(counts) places."""
    pace = np.concatenate([(np.arange(k) + rng.random(k)) / k for k in counts])
    order = np.argsort(pace, kind="stable")
    kind, place = np.repeat(np.arange(len(counts)), counts), np.concatenate([np.arange(k) for k in counts])
    return kind[order], place[order]


# What one rank loads at a step. slot int64 [B] counts within the bucket; copy > 0 where it wrapped round.
Request = namedtuple("Request", "step epoch shape bucket slot copy position wrapped")


def size_of(source, i):
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
        if aspects and size_of(source, 0) is None:
            self.shapes, self.drawn = shapes(image_size, stride, SCENE_RATIOS), True
        elif aspects:
            every, which = shapes(image_size, stride), np.zeros(n, np.int64)
            for i in range(n):
                which[i] = every.index(bucket(*size_of(source, i), image_size, stride, True))
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
        return paced(self.batches, np.random.default_rng([self.seed, epoch, 1]))

    def _slots(self, epoch, b, at):
        """(slot, copy) of places [k] of a bucket's epoch; places past its end wrap round."""
        keys = (self.seed, epoch, 2, b), (self.seed, epoch, 3)
        return shuffled(at % self.count[b], self.runs[b], self.window, *keys), at // self.count[b]

    def request(self, step):
        epoch, k = divmod(step, len(self))
        b, j = (0, k) if len(self.batches) == 1 else (int(a[k]) for a in self._schedule(epoch))
        at = np.arange(self.total) + j * self.total
        wrapped = int((at >= self.count[b]).sum())
        position = list(range(self.rank * self.batch, (self.rank + 1) * self.batch))
        slot, copy = self._slots(epoch, b, at[position])
        draw = np.random.default_rng([self.seed, step, 4]).integers(len(self.shapes)) if self.drawn else b
        return Request(step, epoch, self.shapes[draw], b, slot, copy, position, wrapped)

    def index(self, b, slot):
        """Index in the source of a slot; slots past the end wrap round."""
        slot = int(slot) % self.count[b]
        return slot if self.members[b] is None else int(self.members[b][slot])


class EditSampler(Sampler):
    """Order of edit pairs: as Sampler's, with tasks as often as their weights say, and low scores left out.

    In every bucket the tasks are mixed at an even pace, and each goes through its own pairs again and again,
    all of them shuffled before any comes back; the task that lasts longest makes the epoch. weights: task ->
    weight ("": pairs without one), or None to take pairs as they are. NaN is no score, and below any."""

    def __init__(self, source, *args, weights=None, min_score=None):
        super().__init__(source, *args)
        n, runs = len(source), np.asarray(getattr(source, "runs", [len(source)]))
        if size_of(source, 0) is None:  # drawn, not stored: as many as can be looked at one by one
            n, runs = min(n, DRAWN), np.array([min(n, DRAWN)])
        self.tasks, ids, keep = [""], np.zeros(n, np.int64), np.ones(n, bool)
        if weights is not None:
            self.tasks = [*source.tasks, ""]
            ids = getattr(source, "task_of", None)
            ids = [self.tasks.index(source.task(i) or "") for i in range(n)] if ids is None else ids[:n]
            ids = np.asarray(ids, np.int64) % len(self.tasks)  # -1, no task, is the last
            keep = np.array([weights.get(t, 0) > 0 for t in self.tasks])[ids]
        self.unused = n - int(keep.sum())
        if min_score is not None:
            scores = getattr(source, "scores", None)
            scores = [source.score(i) for i in range(n)] if scores is None else scores[:n]
            keep &= np.asarray(scores, np.float32) >= min_score
        self.low = n - self.unused - int(keep.sum())
        if not keep.any():
            raise SystemExit(f"error: min_score, tasks: {min_score}, {weights}: none of the {n:,} pairs of "
                             f"{source.name} is left: lower min_score, or change the weights")
        self.number = np.bincount(ids[keep], minlength=len(self.tasks))
        share = np.array([(weights or {"": 1.0}).get(t, 0) for t in self.tasks]) * (self.number > 0)
        longest = max(k / s for k, s in zip(self.number, share) if s > 0)
        self.often = share * longest / np.maximum(self.number, 1)  # of a task's pairs, in an epoch
        self.window = max(1, self.window // int((self.number > 0).sum()))  # each task is somewhere else
        run_of, buckets = np.searchsorted(np.cumsum(runs), np.arange(n), "right"), []
        for shape, members in zip(self.shapes if self.members[0] is not None else [None], self.members):
            m = np.arange(n) if members is None else members
            groups = [m[keep[m] & (ids[m] == t)] for t in range(len(self.tasks))]
            if any(map(len, groups)):
                buckets.append((shape, groups, [np.bincount(run_of[g], minlength=len(runs)) for g in groups]))
        if self.members[0] is not None:
            self.shapes = [b[0] for b in buckets]
        self.members = [np.concatenate(groups) for _, groups, _ in buckets]
        self.first = [np.cumsum([0, *map(len, groups)]) for _, groups, _ in buckets]
        self.runs = [runs for *_, runs in buckets]
        # rounded first: 3.0000000000000004 times one pair is not four
        self.quota = [np.ceil(np.round(np.diff(f) * self.often, 6)).astype(np.int64) for f in self.first]
        self.count = [int(q.sum()) for q in self.quota]
        self.batches = [-(-c // self.total) for c in self.count]

    def summary(self):
        tasks = ", ".join(f"{t or 'no task'} {k:,} x {o:.2f}" for t, k, o in
                          zip(self.tasks, self.number, self.often) if k) if len(self.tasks) > 1 else ""
        left = f"; left out: {self.low:,} by score, {self.unused:,} by task" * (self.low + self.unused > 0)
        tasks = f"; pairs of a task, and how often an epoch has them: {tasks}" * bool(tasks)
        return super().summary() + tasks + left

    @lru_cache(maxsize=32)
    def _mixed(self, epoch, b):
        kinds, places = paced(self.quota[b], np.random.default_rng([self.seed, epoch, 5, b]))
        return kinds.astype(np.int16), places.astype(np.int32)  # one of each per pair, in every worker

    def _slots(self, epoch, b, at):
        kinds, places = self._mixed(epoch, b)
        kind, lap = kinds[at % self.count[b]], at // self.count[b]
        turn = places[at % self.count[b]] + epoch * self.quota[b][kind]
        cycle, place = np.divmod(turn, np.diff(self.first[b])[kind])
        slot = np.empty_like(place)
        for k, c in set(zip(kind.tolist(), cycle.tolist())):
            mine = (kind == k) & (cycle == c)
            keys = (self.seed, c, 2, b, k), (self.seed, c, 3)
            slot[mine] = self.first[b][k] + shuffled(place[mine], self.runs[b][k], self.window, *keys)
        return slot, cycle * 4096 + lap  # copies of a pair in an epoch differ in one or the other

    def index(self, b, slot):
        return int(self.members[b][int(slot) % len(self.members[b])])


class Listed:
    """The given indices once, in order; one shape per batch; positions count along the list."""

    def __init__(self, source, indices, image_size, batch_size, rank, world, aspects, stride):
        self.n, self.requests, group, last = len(source), [], [], None
        if bad := [i for i in indices if not 0 <= i < self.n]:
            raise SystemExit(f"error: indices: {bad[0]}: {source.name} has {self.n:,}")
        share = -(-len(indices) // world)
        for p in [*range(rank * share, min((rank + 1) * share, len(indices))), None]:
            size = aspects and p is not None and size_of(source, indices[p]) or (1, 1)
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
