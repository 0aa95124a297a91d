"""Pictures, captions and masks, or edit pairs, from any source, in one batch format.

    python data.py check photos/         # counts, broken files, shapes, captions, mask areas, a sample sheet
    python data.py check omniedit:DIR    # the same of a set of edit pairs (layouts: readers/edits.py)

    1. shapes: aspect buckets       2. order: which sample comes when, a function of (seed, step, rank, world)
    3. cropping      4. loaders of pictures, edit pairs and preferences      5. check

Below it: readers/ opens sources by name and reads files, masks.py makes masks.
Masks are 1 where the picture is to be regenerated. Pictures leave this file as float [-1, 1].
"""

import atexit
import errno
import hashlib
import math
import re
import resource
import signal
import sys
import threading
from collections import Counter, namedtuple
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import common
from common import begin_worker
from log import contact_sheet
from masks import ERASE_PROMPT, PROMPT_FREE, TASKS, task_mask
from readers.edits import TASK_NAMES, names_edits, open_edits
from readers.files import (
    MAX_BAD,
    MAX_CAPTION,
    BadFile,
    clean_caption,
    inside,
    mix,
    printable,
    read_image,
    size_of,
    too_many,
)
from readers.pictures import open_source

DRAWN = 1_000_000  # pairs of a procedural source among which tasks or scores are chosen


#### 1. shapes ###############################################################################################
SCENE_RATIOS = (1, 2 / 3, 3 / 2, 3 / 4, 4 / 3, 9 / 16, 16 / 9)  # the seven of OmniEdit
RATIOS = SCENE_RATIOS + (1 / 2, 2, 1 / 3, 3, 1 / 4, 4)


@lru_cache(maxsize=None)
def shapes(image_size, stride, ratios=RATIOS):
    """(h, w) of every ratio h / w: multiples of `stride` with about image_size**2 pixels."""
    if image_size < stride or image_size % stride:
        raise SystemExit(f"error: --image_size: {image_size}: use a multiple of {stride}")
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
    weight ("": pairs without one), or None to take pairs as they are.
    min_score: leave out what is scored lower; a pair without a score stays."""

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
            keep &= ~(np.asarray([math.nan if s is None else s for s in scores], np.float32) < min_score)
        self.low = n - self.unused - int(keep.sum())
        if not keep.any():
            raise SystemExit(f"error: --min_score, --tasks: {min_score}, {weights}: none of the {n:,} pairs "
                             f"of {source.name} is left: lower the score, or change the weights")
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
    """The given indices once, in order; one shape per batch; positions count along the list. What cannot be
    read is left out: its neighbour would count twice in a mean over the list."""

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


#### 3. cropping #############################################################################################
def _crop(a, size, h, w, y, x, how, gap=None):
    """The part of `a`, taken as stretched to a picture of `size`, that `fit` cuts out, resized to (h, w)."""
    (ih, iw), im = size, Image.fromarray(a)
    scale = max(h / ih, w / iw)
    bh, bw = min(ih, h / scale), min(iw, w / scale)
    top, left, sy, sx = y * (ih - bh), x * (iw - bw), im.height / ih, im.width / iw
    box = (left * sx, top * sy, min(im.width, (left + bw) * sx), min(im.height, (top + bh) * sy))
    return np.array(im.resize((w, h), how, box, gap))


def fit(image, h, w, y=0.5, x=0.5, segments=None):
    """Resize to cover (h, w) and crop at (y, x) in [0, 1], 0.5 = centre. uint8 [h', w', 3] -> [h, w, 3].

    segments of any size, taken as stretched to the picture, get the same crop, nearest -> int32 [h, w]."""
    size = image.shape[:2]
    if segments is not None:
        segments = np.asarray(segments, np.int32)
        if size != (h, w) or segments.shape != (h, w):
            segments = _crop(segments, size, h, w, y, x, Image.Resampling.NEAREST)
    if size != (h, w):
        image = _crop(image, size, h, w, y, x, Image.Resampling.LANCZOS, 3.0)
    return image, segments


def fit_pair(source, image, mask, h, w, y=0.5, x=0.5):
    """`fit` of both pictures of an edit, of one size, and of its float mask [h', w'] or None: the same crop.

    With a mask the crop moves as little as needed to hold all that is selected, or the middle of it."""
    for axis in (0, 1) if mask is not None else ():
        n, at = mask.shape[axis], np.flatnonzero((mask > 0.5).any(1 - axis))
        b = min(n, (h, w)[axis] / max(h / mask.shape[0], w / mask.shape[1]))  # pixels the crop keeps
        if n - b > 1e-6 and len(at):
            lo, hi = max(0, at[-1] + 1 - b), min(n - b, at[0])  # where it may begin
            middle = min(max((at[0] + at[-1] + 1 - b) / 2, 0), n - b)
            start = min(max((y, x)[axis] * (n - b), lo), hi) if lo <= hi else middle
            y, x = (start / (n - b), x) if axis == 0 else (y, start / (n - b))
    if mask is not None and mask.shape != (h, w):
        binary = bool(np.all((mask == 0) | (mask == 1)))
        mask = np.clip(_crop(mask, mask.shape, h, w, y, x, Image.Resampling.BILINEAR), 0, 1)
        mask = (mask >= min(0.5, mask.max())).astype(np.float32) if binary else mask  # a thin one stays
    return *(fit(im, h, w, y, x)[0] for im in (source, image)), mask


#### 4. loaders ##############################################################################################
def task_weights(tasks, known=None):
    """--tasks, such as "remove=2,add=1", or a dict -> task -> weight, in that order, which draws depend on.

    known: names that there are, None while no set of pairs is open. SystemExit on another one, on one that
    comes twice, and on a number that cannot be."""
    names = ", ".join(t for t in known if t) if known else "the data's tasks; or balanced, or as_is"
    weights = {} if isinstance(tasks, str) else tasks
    for part in tasks.split(",") if isinstance(tasks, str) else ():
        name, _, number = (word.strip() for word in part.partition("="))
        try:
            number = float(number)
        except ValueError:
            name = None
        name = name if known else TASK_NAMES.get(name, name)  # OmniEdit's word for a task is ours, too
        if name in (None, *weights):
            raise SystemExit(f"error: --tasks: {part.strip()[:60]!r}: use NAME=WEIGHT,... of {names}")
        weights[name] = number
    for name, number in weights.items():
        if known and name not in known or not 0 <= number <= 10**9:
            raise SystemExit(f"error: --tasks: {name[:60]}={number}: use numbers >= 0 for {names}")
    return weights


def mixture(tasks):
    """Tasks of masks.TASKS as `task_weights` reads them -> task -> probability, of those above 0."""
    weights = task_weights(tasks, TASKS)
    if not any(weights.values()):
        raise SystemExit(f"error: --tasks: all zero: give one of {', '.join(TASKS)} a weight")
    return {t: p / sum(weights.values()) for t, p in weights.items() if p > 0}


def make_sample(source, tasks, prompt_free, train, index, h, w, rng, notes):
    """One picture with its task and mask; all randomness is from `rng`, in a fixed order. Raises BadFile."""
    item = source.load(index, h, w)
    y, x, _, pick, drop = rng.random(5)  # pictures are never flipped: captions say left and right
    if item["image"].dtype == np.float32:  # latents (make_cache.py), cropped and never flipped
        image, segments, (h, w) = item["image"], None, item["image"].shape[1:]
    else:
        image, segments = fit(item["image"], h, w, *((y, x) if train else (0.5, 0.5)), item.get("segments"))
    edges = np.cumsum(list(tasks.values()))[:-1]
    asked = list(tasks)[int(np.searchsorted(edges, pick, "right"))]
    mask, task = task_mask(asked, h, w, rng, segments)
    free = prompt_free.get(task, PROMPT_FREE[task]) if isinstance(prompt_free, dict) else prompt_free
    caption, cut = clean_caption(item["caption"])
    notes["captions cut"] += cut
    notes[f"{asked} turned into {task}"] += task != asked
    caption = ERASE_PROMPT if task == "erase" else "" if drop < free else caption
    return dict(image=image, mask=mask[None], caption=caption, task=task, segments=segments)


SIDES = re.compile(r"\b(left|right|(counter|anti)?-?clockwise|mirror|flip|rotat|east|west"
                   r"|text|word|letter|number|sign|writ|say|read|spell)|[\"\u201c\u201d\u00ab]", re.I)


def make_edit_sample(source, p_region, train, index, h, w, rng, notes):
    """One edit pair, cropped and flipped alike; all randomness is from `rng`, in a fixed order. BadFile.

    Not flipped (else half of them) where the instruction speaks of sides or of writing."""
    item = source.load(index, h, w)
    y, x, flip, shown, which = rng.random(5)
    wordings = item.get("captions") or [item["caption"]]
    caption, cut = clean_caption(wordings[int(which * len(wordings)) if train else 0])
    described = clean_caption(item.get("target_caption") or "")[0]
    notes["captions cut"] += cut
    at = (y, x) if train else (0.5, 0.5)
    before, image, mask = item["source"], item["image"], item["mask"]
    latents = image.dtype == np.float32  # make_cache.py: cropped and never flipped
    if latents:
        h, w = image.shape[1:]
    else:
        before, image, mask = fit_pair(before, image, mask, h, w, *at)
    if mask is None or shown >= p_region:
        mask = np.ones((h, w), np.float32)
    else:
        notes["regions shown"] += 1
    if train and not latents and flip < 0.5 and not SIDES.search(f"{caption} {described}"):
        before, image, mask = (np.ascontiguousarray(a[:, ::-1]) for a in (before, image, mask))
    score = np.float32(math.nan if item["score"] is None else item["score"])
    return dict(image=image, source=before, mask=mask[None], caption=caption, task=item["task"] or "",
                target_caption=described, score=score)


class Batches(torch.utils.data.Dataset):
    """Item s is this rank's whole batch of step s, so that nothing depends on the number of workers.

    make(index, h, w, rng, notes) -> dict of arrays, str or None; if it raises BadFile the next of the bucket
    takes the place, of a list none does. SystemExit must not end a worker: problems travel in the batch, the
    loader decides.
    draw(batch) -> entries to add to a batch, or to put in the place of others; None: nothing."""

    def __init__(self, order, make, seed, max_bad, draw=None):
        self.order, self.make, self.seed, self.max_bad = order, make, seed % 2**63, max_bad
        self.draw = draw

    def __getitem__(self, step):
        r = self.order.request(step)
        first = [self.order.index(r.bucket, s) for s in r.slot]
        samples, index, bad, notes = [None] * len(first), list(first), {}, Counter(wrapped=r.wrapped)
        listed = isinstance(self.order, Listed)
        for k in np.argsort(first, kind="stable"):  # ascending: neighbours share a row group
            for attempt in range(1 if listed else self.max_bad + 1):
                index[k] = self.order.index(r.bucket, r.slot[k] + attempt)
                rng = np.random.default_rng([self.seed, r.epoch, first[k], int(r.copy[k])])
                try:
                    samples[k] = self.make(index[k], *r.shape, rng, notes)
                    break
                except BadFile as e:
                    bad[index[k]] = str(e)
            if samples[k] is None and not listed:
                return dict(bad=bad, notes=dict(notes), read=len(first), fatal=True)
        left = [k for k, sample in enumerate(samples) if sample is not None]
        if not left:
            return dict(index=None, bad=bad, notes=dict(notes), read=0, fatal=False)
        samples, index, position = ([of[k] for k in left] for of in (samples, index, r.position))
        batch = dict(index=torch.tensor(index), position=position, step=r.step, epoch=r.epoch)
        for key, value in samples[0].items():
            values = [s[key] for s in samples]
            if not isinstance(value, str):  # pictures stay uint8 here: a quarter of the shared memory
                values = None if any(v is None for v in values) else torch.from_numpy(np.stack(values))
            batch[key] = values
        batch |= self.draw(batch) if self.draw else {}
        if torch.utils.data.get_worker_info():  # here a full /dev/shm is an exception; in the queue's thread
            for value in batch.values():  # it would be a batch that never comes
                if torch.is_tensor(value):
                    value.share_memory_()
        return batch | dict(bad=bad, notes=dict(notes), read=len(left), fatal=False)


def as_floats(pictures):
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [-1, 1]. A GPU would multiply by the inverse of a number,
    which rounds otherwise than a CPU's division: it divides by a tensor."""
    half = torch.full((), 127.5, device=pictures.device)
    return pictures.permute(0, 3, 1, 2).contiguous().float().div_(half).sub_(1)


# What torch says where memory that processes share cannot be had
NO_SHARING = re.compile("shared memory|/torch_|No space left|Read-only file system|Too many open|Bus error")


class Loader:
    """Iterator over batches, once through. `summary` says the order in words.

    device: where the tensors of a batch go, each in one copy that a GPU's host does not wait for, pictures as
    bytes. draw: see Batches; what a step draws or tokenises besides is the workers' work too.

    A batch is a function of its step, so workers that were killed are replaced, twice, and nothing is lost;
    where processes cannot share memory (a full /dev/shm) this one goes on alone. Both are said in a line.
    The workers end with `close`, or with the process, whatever ends that: they are deaf to SIGTERM, so torch
    and multiprocessing would wait for them without end."""

    def __init__(self, source, order, make, seed, workers, steps, max_bad=MAX_BAD, device="cpu", draw=None):
        self.device, self.workers = torch.device(device), workers
        self.source, self.max_bad, self.summary = source, max_bad, f"{source.name}: {order.summary()}"
        self.steps_per_epoch, self._steps = len(order), steps or range(len(order))
        self._given = self._empty = self._deaths = 0
        self._bad, self._read, self._notes = {}, 0, Counter()
        self._batches, self._items = None, Batches(order, make, seed, max_bad, draw)

    def _start(self):
        """(Re)start behind the batches that were given."""
        several, handler = self.workers > 0, signal.getsignal(signal.SIGCHLD)
        if several:
            torch.multiprocessing.get_context().Semaphore()  # OSError where /dev/shm cannot be written
            if (files := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < 128:  # a tensor under way is a file
                raise OSError(errno.EMFILE, f"{files} open files are too few")
        # its own generator: starting workers would else draw from the global one, and spoil exact resume
        loader = torch.utils.data.DataLoader(
            self._items, batch_size=None, sampler=self._steps[self._given:], num_workers=self.workers,
            prefetch_factor=4 if several else None, worker_init_fn=begin_worker if several else None,
            pin_memory=self.device.type == "cuda", generator=torch.Generator())
        self._batches = iter(loader)
        if several:  # after multiprocessing's own, hence run before it
            atexit.register(self.close)
            if threading.current_thread() is threading.main_thread():
                # torch's handler raises wherever a step happens to be when a worker dies; `next` tells it too
                signal.signal(signal.SIGCHLD, handler)

    def _fetch(self):
        while True:
            try:
                if self._batches is None:
                    self._start()
                return next(self._batches)
            except (RuntimeError, OSError, EOFError) as e:
                workers = getattr(self._batches, "_workers", ())
                cut = isinstance(e, EOFError | ConnectionError)  # it died as it handed a tensor over
                for w in workers if cut else ():
                    w.join(0.2)
                dead = next((w.exitcode for w in workers if w.exitcode), -signal.SIGKILL if cut else 0)
                scarce = getattr(e, "errno", 0) in (errno.ENOSPC, errno.EROFS, errno.EMFILE, errno.EACCES)
                scarce = scarce or dead == -signal.SIGBUS or NO_SHARING.search(str(e))
                if not self.workers or not (scarce or dead):
                    raise
                self.close()
                self._deaths += 1
                what = f"signal {-dead}" if dead < 0 else f"code {dead}" if dead else str(e).splitlines()[-1]
                if scarce:
                    print(f"warning: --workers: {self.workers}: processes cannot share memory ({what[:120]}):"
                          " this one loads its data alone; free /dev/shm, or raise `ulimit -n`",
                          file=sys.stderr)
                    self.workers = 0
                elif self._deaths == 3:
                    raise SystemExit(f"error: --workers: {self.workers}: a data worker died for the third "
                                     f"time ({what}; 9: often for want of memory): the same command resumes, "
                                     "with fewer --workers or a smaller --batch_size") from None
                else:
                    print(f"warning: --workers: {self.workers}: a data worker died ({what}); all are "
                          "started again, no batch is lost", file=sys.stderr)

    def __iter__(self):
        return self

    def __next__(self):
        try:
            batch = self._fetch()
        except StopIteration:
            if self._given and self._given == self._empty:
                raise SystemExit(f"{list(self._bad.values())[-1]} (none of the {len(self._bad)} listed can "
                                 f"be read: repair {self.source.name})") from None
            raise
        self._given += 1
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
        if batch["index"] is None:
            self._empty += 1
            return next(self)
        for key, value in batch.items():
            if torch.is_tensor(value):
                batch[key] = value = value.to(self.device, non_blocking=True)
                if value.dtype == torch.uint8 and value.dim() == 4:
                    batch[key] = as_floats(value)
        return batch

    @property
    def shapes(self):
        """(h, w) in pixels at which an endless loader's batches come."""
        return self._items.order.shapes

    def fingerprint(self):
        """Hash over how many items there are, in what order, and the names or rows of a thousand of them."""
        rows = getattr(self.source, "rows", self.source if isinstance(self.source, list) else ())
        some = [rows[i] for i in np.linspace(0, len(rows) - 1, min(len(rows), 1000)).astype(int)]
        groups = getattr(getattr(self.source, "groups", None), "first", ())
        text = repr((len(self.source), self.summary, some, list(groups)))
        return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12]

    def stats(self):
        """Counts of this process: read, skipped (distinct files), wrapped (over all ranks), captions cut."""
        return {"read": self._read, "skipped": len(self._bad), **{k: v for k, v in self._notes.items() if v}}

    def close(self):
        """End the workers, of which one may hang, have been stopped or be dead. May be called twice."""
        batches, self._batches = self._batches, None
        if workers := getattr(batches, "_workers", ()):
            atexit.unregister(self.close)
            if all(w.is_alive() for w in workers):
                batches._shutdown_workers()  # as torch does; it then waits 5 s for one that does not answer
            for w in workers:
                w.kill()
                w.join()


def make_loader(source, image_size, batch_size, tasks, seed=0, rank=0, world=1, workers=2, start_step=0,
                aspects=False, stride=8, prompt_free=PROMPT_FREE, **to):
    """Endless training batches from `start_step`. batch_size is per rank; the batch at step s depends on
    (seed, s, rank, world) alone, and the ranks' batches joined on world * batch_size alone. Random crops.

    batch: image [B, 3, H, W] in [-1, 1]; mask [B, 1, H, W], 1 = regenerate; caption and task, lists of str;
    index int64 [B]; segments int32 [B, H, W] or None; step, epoch; position, places in the global batch.
    tasks: task -> weight, or its text (`task_weights`). prompt_free: chance that a caption becomes "", one
    number or per task; erasing says ERASE_PROMPT. A bad file is named, counted and replaced by the next of
    its bucket; SystemExit beyond MAX_BAD or a tenth of what was read.
    A source of latents (make_cache.py): image [B, C, h, w], mask of its size, centre crops, the task t2i.
    to: device, draw and max_bad of `Loader`, for all loaders."""
    if getattr(source, "latents", False) and list(mixture(tasks)) != ["t2i"]:
        raise SystemExit(f"error: --tasks: {', '.join(mixture(tasks))}: latents cannot be masked: use t2i "
                         "alone, or pictures and the cache's text only")
    order = Sampler(source, image_size, batch_size, seed, rank, world, aspects, stride)
    make = partial(make_sample, source, mixture(tasks), prompt_free, True)
    return Loader(source, order, make, seed, workers, range(start_step, sys.maxsize), **to)


def make_eval_batches(source, indices, image_size, batch_size, tasks, rank=0, world=1, workers=0,
                      aspects=False, stride=8, **to):
    """The given pictures once, in order, as `make_loader` batches: centre crops, masks from the index, every
    caption there.

    step is 0 and position the place in `indices`, so noise from (seed, step, position) knows no batch size or
    world. Rank r takes the r-th share; a batch ends early at the end and where the shape changes. A bad file
    is named, counted and left out; SystemExit where all are bad, and as in `make_loader`."""
    order = Listed(source, [int(i) for i in indices], image_size, batch_size, rank, world, aspects, stride)
    make = partial(make_sample, source, mixture(tasks), 0.0, False)
    return Loader(source, order, make, 0, workers, None, **to)


def edit_weights(source, balance):
    """balance: True, all tasks alike; False, pairs as they come; or a dict task -> weight -> dict or None."""
    if isinstance(balance, bool):
        return dict.fromkeys((*source.tasks, ""), 1.0) if balance else None
    return task_weights(balance, (*source.tasks, ""))


def make_edit_loader(source, image_size, batch_size, seed=0, rank=0, world=1, workers=2, start_step=0,
                     aspects=False, stride=8, p_region=0.3, balance=True, min_score=None, **to):
    """Endless batches of edit pairs, functions of the same as `make_loader`'s. Source, target and mask are
    cropped and flipped together; the crop holds the region of the edit where there is a mask.

    batch: image (the target) and source [B, 3, H, W] in [-1, 1]; mask [B, 1, H, W], 1 = may change, ones for
    free-form edits; caption (the instruction), target_caption and task, lists of str ("" without one); score
    float32 [B] in 0..10, NaN for none; index int64 [B], position, step, epoch.
    p_region: chance that a pair with a mask is shown it (default ours; UltraEdit's second stage mixes them).
    A source of latents (make_cache.py): image, source [B, C, h, w], mask [B, 1, h, w], centre crops.
    balance: see `edit_weights`; a task that is not named in a dict is left out. min_score: pairs with a lower
    score are left out. A procedural source is taken to hold its tasks equally often."""
    args = source, image_size, batch_size, seed, rank, world, aspects, stride
    sizes = getattr(source, "sizes", None)
    if aspects and rank == 0 and sizes is not None and (unknown := int((sizes == 0).any(1).sum())) > 20_000:
        print(f"note: {source.name}: {unknown:,} pictures say their size nowhere but in themselves: it "
              "takes a while to read; leave aspects off if all are square", file=sys.stderr)
    drawn = size_of(source, 0) is None
    min_score = None if drawn and not source.wrong else min_score  # all right, and too many to look at
    as_drawn = drawn and not isinstance(balance, dict) and min_score is None
    weights = edit_weights(source, balance)
    order = Sampler(*args) if as_drawn else EditSampler(*args, weights=weights, min_score=min_score)
    make = partial(make_edit_sample, source, p_region, True)
    return Loader(source, order, make, seed, workers, range(start_step, sys.maxsize), **to)


def make_edit_eval_batches(source, indices, image_size, batch_size, rank=0, world=1, workers=0,
                           aspects=False, stride=8, p_region=0.0, **to):
    """The given pairs once, in order, as `make_edit_loader` batches: centre crops, no flips, first wordings.
    Ranks, steps and positions as in `make_eval_batches`."""
    order = Listed(source, [int(i) for i in indices], image_size, batch_size, rank, world, aspects, stride)
    make = partial(make_edit_sample, source, p_region, False)
    return Loader(source, order, make, 0, workers, None, **to)


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
                once=False, **to):
    """Endless batches, a function of the same as `make_loader`'s: better, worse [B, 3, H, W] in [-1, 1],
    caption_better, caption_worse, index, position, step. `once`: each pair once, in order."""
    if once:
        order = Listed(pairs, range(len(pairs)), image_size, batch_size, rank, world, False, stride)
    else:
        order = Sampler(pairs, image_size, batch_size, seed, rank, world, False, stride)
    steps = None if once else range(start_step, sys.maxsize)
    return Loader(pairs, order, partial(make_pair, pairs), seed, workers, steps, **to)


#### 5. python data.py check SPEC ############################################################################
def check(spec: str, /, image_size: int = 256, stride: int = 8, aspects: bool = False, limit: int = 500,
          out: str = "out/check.png"):
    """Open a data source and report counts, bad files, shapes, captions and mask areas; draw a sheet.

    Args:
        spec: scenes, scenes:hard, a folder of pictures, a parquet file or a folder of them; or edit pairs:
            scenes:wrong=SHARE, omniedit:PATH, ip2p:PATH, magicbrush:PATH, ultraedit:PATH, PATH.jsonl; or a
            packed folder of either
        image_size: side of the square, or of the square of equal area
        stride: sides are multiples of it
        aspects: keep aspect ratios (of edit pairs: always)
        limit: pictures decoded, evenly spaced over the source
        out: where the sheet of pictures with their masks goes
    """
    from tqdm import tqdm

    if limit < 1:
        raise SystemExit(f"error: --limit: {limit}: look at one picture at least")
    if names_edits(spec):
        return check_edits(open_edits(spec, "all"), image_size, stride, limit, out)
    source = open_source(spec, "all")
    picks = np.unique(np.linspace(0, len(source) - 1, min(limit, len(source))).astype(int)).tolist()
    used, notes, lengths, areas, bad, rows = Counter(), Counter(), [], {t: [] for t in TASKS}, [], []
    brings = Counter()
    for n, i in enumerate(tqdm(picks, disable=None, leave=False)):
        try:
            h, w = bucket(*(source.size(i) or (1, 1)), image_size, stride, aspects)
            row = []
            for t in TASKS:
                rng = np.random.default_rng([i, len(row)])
                s = make_sample(source, {t: 1.0}, 0.0, False, i, h, w, rng, notes)
                picture, m = s["image"], s["mask"][0, ..., None]
                row.append(tinted(picture, m) if s["task"] == t else None)
                areas[t] += [float(m.mean())] if s["task"] == t else []
                lengths += [len(s["caption"].encode())] if t == "t2i" else []
        except BadFile as e:
            bad.append(str(e).removeprefix("error: "))
            continue
        used[h, w] += 1
        brings.update(source.facts(i) if hasattr(source, "facts") else ())
        if n >= len(rows) * len(picks) / 8:
            rows.append([Image.fromarray(picture), *row])
    print(f"{printable(source.name)}: {len(source):,} pictures, {len(picks):,} looked at, {len(bad)} cannot "
          f"be used, {getattr(source, 'bad_lines', 0)} bad metadata lines")
    print("".join(f"  bad: {b}\n" for b in bad[:20]), end="")
    print("".join(f"  shape {w}x{h}: {n:,}\n" for (h, w), n in used.most_common()), end="")
    if brings:
        print(f"  {brings['profile']:,} with a colour profile (converted to sRGB), {brings['alpha']:,} with "
              f"alpha (composited on white), {brings['animated']:,} animated (first frame used)")
    if not lengths:
        raise SystemExit(f"error: {printable(spec)}: not one picture can be used: see the list above")
    print(f"  captions: {sum(map(bool, lengths)):,}, median {int(np.median(lengths))} bytes, longest "
          f"{max(lengths)}, {notes['captions cut'] // len(TASKS)} cut at {MAX_CAPTION}")
    for t, a in areas.items():
        if not a:
            print(f"  mask area, {t}: none: it takes segments or a mask, and is drawn as inpaint")
            continue
        low, mid, high = np.quantile(a, (0.05, 0.5, 0.95))
        print(f"  mask area, {t}: median {mid:.2f}, 5% to 95% {low:.2f} to {high:.2f} ({len(a):,} pictures)")
    shown = [0, *(k for k, t in enumerate(TASKS, 1) if areas[t])]
    save_sheet(out, [[row[k] for k in shown] for row in rows], [["picture", *TASKS][k] for k in shown])
    raise SystemExit(1 if bad else 0)


def tinted(picture, mask):
    """uint8 [h, w, 3] as a PIL image, red where the mask [h, w, 1] is."""
    return Image.fromarray((picture + 0.55 * mask * (np.array([255, 40, 90]) - picture)).astype(np.uint8))


def save_sheet(out, *rows):
    """Contact sheet (log.contact_sheet) written to `out`; SystemExit if that is no place for a picture."""
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(*rows).save(out)
    except (OSError, ValueError) as e:  # Pillow: an unknown suffix is a ValueError
        raise SystemExit(f"error: --out: {out}: {e}: give a writable place that ends in .png") from None
    print(f"  sheet: {out}")


def check_edits(source, image_size, stride, limit, out):
    """The report of `check` on edit pairs; of the sheet a row is source, target, mask and instruction."""
    from tqdm import tqdm

    n, bad, rows, titles, areas, lengths = len(source), [], [], [], [], []
    picks = np.unique(np.linspace(0, n - 1, min(limit, n)).astype(int)).tolist()
    every = picks if size_of(source, 0) is None else range(n)  # a procedural source has too many to ask
    tasks = Counter(source.task(i) or "no task" for i in every)
    scores = [source.score(i) for i in every]
    used, notes = Counter(), Counter()
    for k, i in enumerate(tqdm(picks, disable=None, leave=False)):
        try:
            h, w = bucket(*(source.size(i) or (1, 1)), image_size, stride, True)
            shown = notes["regions shown"]
            s = make_edit_sample(source, 1.0, False, i, h, w, np.random.default_rng(i), notes)
        except BadFile as e:
            bad.append(str(e).removeprefix("error: "))
            continue
        used[h, w] += 1
        lengths.append(len(s["caption"].encode()))
        masked = notes["regions shown"] > shown
        areas += [float(s["mask"].mean())] * masked
        if k >= len(rows) * len(picks) / 8:
            pictures = [Image.fromarray(s[key]) for key in ("source", "image")]
            rows.append(pictures + [tinted(s["source"], s["mask"][0, ..., None])] * masked)
            score = "" if math.isnan(s["score"]) else f" {s['score']:.1f}"
            titles.append(f"{s['task'] or 'no task'}{score}: {s['caption']}")
    print(f"{printable(source.name)}: {n:,} pairs, {len(picks):,} looked at, {len(bad)} cannot be used, "
          f"{getattr(source, 'bad_lines', 0)} bad rows, {getattr(source, 'missing', 0)} of missing folders")
    print("".join(f"  bad: {b}\n" for b in bad[:20]), end="")
    print("".join(f"  shape {w}x{h}: {k:,}\n" for (h, w), k in used.most_common()), end="")
    print("  tasks: " + ", ".join(f"{t} {k:,}" for t, k in tasks.most_common()))
    if not lengths:
        raise SystemExit(f"error: {source.name}: not one pair can be used: see the list above")
    print(f"  instructions: median {int(np.median(lengths))} bytes, longest {max(lengths)}, "
          f"{notes['captions cut']} cut at {MAX_CAPTION}")
    known = [s for s in scores if s is not None]
    print(f"  scores: {len(known):,} of {len(scores):,} pairs, {sum(s >= 9 for s in known):,} at least 9")
    for low, k in enumerate(np.histogram(known, np.arange(11))[0].tolist() if known else ()):
        print(f"    {low} to {low + 1}: {k:>9,} {'#' * round(50 * k / len(known))}")
    low, mid, high = np.quantile(areas or [0], (0.05, 0.5, 0.95))
    print(f"  mask area: median {mid:.1%}, 5% to 95% {low:.1%} to {high:.1%} ({len(areas):,} pairs have one)")
    nothing, everything = sum(a < 0.001 for a in areas), sum(a > 0.99 for a in areas)
    if nothing + everything:
        print(f"  WARNING: {nothing:,} masks select nearly nothing, {everything:,} nearly everything, right "
              "only for edits of the whole picture: is white the edit? (magicbrush: transparent)")
    save_sheet(out, rows, ["source", "target", "mask"], titles)
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    common.commands({"check": check}, "data.py")
