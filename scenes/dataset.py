"""Scenes as a dataset like any other: a source of pictures, one of edit pairs, and how they are named."""

from dataclasses import replace
from functools import cached_property

import numpy as np

from readers.files import hashed
from scenes.draw import LEVELS, _render, draw, pick, rng_for, scene
from scenes.edits import (
    EDITS,
    TASKS,
    WRONG,
    _another,
    _aside,
    _damage,
    _fewer,
    _level,
    _more,
    _partly,
    crowded,
    edit_mask,
    region_mask,
)
from scenes.text import caption

SPLITS = {"train": (1, 10_000_000), "heldout": (2, 100_000)}  # seed, number of scenes


def parse_spec(spec):
    """"scenes", "scenes:hard", "scenes:wrong=0.5", "scenes:hard,wrong=0.5" -> (level, share of wrong pairs or
    None); None if it is no spec of scenes at all. SystemExit on an unknown level, an impossible share, or
    anything said twice."""
    kind, colon, rest = spec.partition(":")
    if kind != "scenes":
        return None
    level = wrong = None
    for part in rest.split(",") if colon else ():
        key, equals, value = part.partition("=")
        if part in LEVELS and level is None:
            level = part
        elif key == "wrong" and equals and wrong is None:
            try:
                wrong = float(value)
            except ValueError:
                wrong = -1.0
            if not 0 <= wrong <= 1:
                raise SystemExit(f"error: {spec}: wrong={value}: use a share from 0 to 1")
        else:
            raise SystemExit(f"error: {spec}: {part!r}: the levels of scenes are {', '.join(LEVELS)} "
                             "(scenes:hard); edit pairs also take wrong=SHARE")
    return level or "easy", wrong


class Scenes:
    """Source of captioned pictures (see data.py). split: train or heldout, which share no seed; level: a key
    of LEVELS. SystemExit on others."""

    def __init__(self, split="train", level="easy"):
        if split not in SPLITS:
            raise SystemExit(f"error: scenes: split {split!r}: use one of {', '.join(SPLITS)}")
        if level not in LEVELS:
            raise SystemExit(f"error: scenes: level {level!r}: use one of {', '.join(LEVELS)}")
        self.seed, self.length = SPLITS[split]
        self.level, self.name = level, "scenes" if level == "easy" else f"scenes:{level}"

    def __len__(self):
        return self.length

    def size(self, i):
        """None: a scene is drawn at any size."""
        return None

    def scene(self, i):
        if not 0 <= i < self.length:
            raise IndexError(f"scene {i} of {self.length}")
        return scene(self.seed, i, self.level)

    def load(self, i, h, w):
        """dict(image uint8 [h, w, 3], caption str, segments uint8 [h, w]), fixed for (split, i, h, w)."""
        from scenes.text import caption  # here: it needs this module's names

        s = self.scene(i)
        image, segments = _render(s, h, w)
        return {"image": image, "caption": caption(s, rng_for(self.seed, i, 3)), "segments": segments}

    def texts(self, n):
        return ([caption(self.scene(i), rng_for(self.seed, i, 3))] for i in range(n))

    def fingerprint(self, n):
        return hashed([("Scenes", n), (self.name, self.seed, None)])


# ---- the edit source -----------------------------------------------------------------------------


def _uniforms(seed, i):
    """Three arrays of uniform draws in [0, 1) that depend on (seed, i) alone, i an int or an array of them:
    what must be known of a pair without making its generator (splitmix64, exact on every machine)."""
    x = np.atleast_1d(np.asarray(i, np.uint64)) * np.uint64(4) + np.uint64(seed << 40)
    out = []
    for _ in range(3):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        z = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out.append(((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**53)
    return out


class EditScenes:
    """Edit source over the scenes of a split: pair i is scene i with an edit of task i % 7. wrong: the
    share of pairs, drawn by index, that are wrong in one of the ways of WRONG and scored below 9; right
    pairs then score 9 to 10, and 10 when wrong is 0. The pairs that stay right are the same for every
    share. The held-out split has right pairs only. SystemExit on an unknown split or level, or a share
    outside 0..1."""

    tasks = list(TASKS)

    def __init__(self, split="train", wrong=0.0, level="easy"):
        if not 0 <= wrong <= 1:
            raise SystemExit(f"error: scenes: wrong={wrong}: use a share from 0 to 1")
        self.scenes, self.wrong = Scenes(split, level), wrong if split == "train" else 0.0
        self.seed, self.name = self.scenes.seed, self.scenes.name

    def __len__(self):
        return len(self.scenes)

    def size(self, i):
        """None: pairs are drawn at any size."""
        return None

    def task(self, i):
        return TASKS[i % len(TASKS)]

    def score(self, i):
        """0 to 10, what a judge would give the pair."""
        return float(self._score(*_uniforms(self.seed, i))[0])

    def kind(self, i):
        """How pair i is wrong, a key of WRONG, or None if it is right."""
        is_wrong, kind, _ = (float(u[0]) for u in _uniforms(self.seed, i))
        return pick(tuple(WRONG), kind) if is_wrong < self.wrong else None

    def _score(self, is_wrong, kind, good):
        low, high = np.array(list(WRONG.values())).T[:, (kind * len(WRONG)).astype(int)]
        right = 9 + good if self.wrong else np.full_like(good, 10)
        return np.where(is_wrong < self.wrong, low + (high - low) * good, right)

    @cached_property
    def task_of(self):
        """Places in .tasks of all pairs, int8 [n]."""
        return (np.arange(len(self)) % len(TASKS)).astype(np.int8)

    @cached_property
    def scores(self):
        """Scores of all pairs, float32 [n]."""
        parts = (np.arange(k, min(k + 2**18, len(self))) for k in range(0, len(self), 2**18))
        return np.concatenate([self._score(*_uniforms(self.seed, i)).astype(np.float32) for i in parts])

    def edit(self, i):
        """(scene, Edit) of pair i: what is asked, whether or not the pair shows it. Large objects leave no
        room for one more: a scene to which one is added then keeps its first object, in a corner and of the
        smallest size, or, every second time, none."""
        before = self.scenes.scene(i)
        edit = EDITS[self.task(i)](before, rng_for(self.seed, i, 4))
        if crowded(edit) and i // len(TASKS) % 2:
            before = replace(before, objects=(_aside(before.objects[0], _level(before).sizes[0]),))
            edit = EDITS[self.task(i)](before, rng_for(self.seed, i, 4))
        if crowded(edit):
            before = replace(before, objects=())
            edit = EDITS[self.task(i)](before, rng_for(self.seed, i, 4))
        return before, edit

    def texts(self, n):
        return ([self.edit(i)[1].instruction] for i in range(n))

    def fingerprint(self, n):
        return hashed([("EditScenes", n), (self.name, self.seed, self.wrong)])

    def load(self, i, h, w):
        """dict(image, the target, and source uint8 [h, w, 3]; caption, the instruction; target_caption, a
        true one of what is asked for; mask float32 [h, w], 1 = may change, soft values included; task;
        score), fixed for (split, i, h, w) and the share."""
        got = self.load_exact(i, h, w)
        keys = ("image", "source", "caption", "target_caption", "mask", "task", "score")
        return {key: got[key] for key in keys}

    def load_exact(self, i, h, w):
        """What load gives and what only scenes know: before and after (the scene, and what the instruction
        asks for), truth (uint8 [h, w, 3], the picture of `after`; the image of a right pair), changed
        (bool [h, w], the pixels in which source and truth differ), kind (see WRONG; None: right)."""
        before, edit = self.edit(i)
        source, truth, kind = draw(before, h, w), draw(edit.target, h, w), self.kind(i)
        changed = (source != truth).any(-1)
        # in a tiny picture an edit may change nothing that shows
        area = changed if changed.any() else edit_mask(edit, before, h, w) > 0
        whole = edit.task in ("environment", "style")
        mask = np.ones((h, w), np.float32) if whole else region_mask(area, rng_for(self.seed, i, 5))
        image = truth if kind is None else self._spoil(kind, i, before, edit, source, truth, area)
        return dict(image=image, source=source, caption=edit.instruction, mask=mask, task=edit.task,
                    target_caption=caption(edit.target, rng_for(self.seed, i, 8)), score=self.score(i),
                    before=before, after=edit.target, truth=truth, changed=changed, kind=kind)  # fmt: skip

    def _spoil(self, kind, i, before, edit, source, truth, area):
        """The target of a wrong pair, uint8 [h, w, 3]: the higher its score, the nearer to the truth."""
        good, rng = float(_uniforms(self.seed, i)[2][0]), rng_for(self.seed, i, 6)
        if kind == "half-done":
            if edit.task == "swap" and rng.random() < 0.5:
                return draw(_fewer(edit, before, rng, 1 if good > 0.5 else 2), *area.shape)
            return _partly(source, truth, area, 0.2 + 0.4 * good, rng)
        if kind == "wrong object":
            return draw(_another(edit, before, rng), *area.shape)
        if kind == "over-edited":
            return draw(_more(edit, rng, slight=good > 0.4), *area.shape)
        return _damage(truth, area, 1 - good, rng)
