"""scene_edits.py: instructions are true of exactly what differs, and wrong pairs are wrong as they say."""

import hashlib
import json
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_scenes import is_true, on_both, plain_dict

from masks import dilate
from scenes import __main__ as pages
from scenes import dataset, draw
from scenes import edits as scene_edits
from scenes import text as scene_text

LOCAL = ("swap", "remove", "add", "attribute")
SHAPES_HW = ((64, 64), (32, 32), (48, 96), (80, 33))


# ---- an independent reading of instructions --------------------------------------------------------


def _invert(words):
    return {w: name for name, many in words.items() for w in ([many] if isinstance(many, str) else many)}


SIZE, MATERIAL = _invert(scene_text.SIZE_WORDS), _invert(scene_text.MATERIAL_WORDS)
WHERE = _invert(scene_text.BACKGROUND_WORDS) | {
    "a cloudy sky": "sky", "a green lawn": "grass", "a sandy beach": "sand", "a brick wall": "brick",
    "rippling water": "water", "wood planks": "wood", "a tiled floor": "tiles", "a snowy field": "snow",
    "outer space": "space", "desert dunes": "dunes"}  # fmt: skip
WHEN = _invert(scene_text.ENVIRONMENT_WORDS) | {"a clear day": "clear"} | {e: e for e in draw.ENVIRONMENTS}
STYLE = _invert(scene_text.STYLE_WORDS)
FRAMES = {  # every way of saying each edit: X the object meant, Y what comes. New wording is added here too
    "swap": "replace X with Y|swap X for Y|turn X into Y|change X into Y|exchange X for Y|put Y where X is"
            "|transform X into Y|show Y instead of X",
    "remove": "remove X|delete X|erase X|take X away|remove X from the picture|get rid of X|take out X"
              "|show the picture without X",
    "add": "add Y|put Y|insert Y|place Y|draw Y|there should be Y",
    "colour": "make X Y|paint X Y|change the color of X to Y|recolor X to Y|turn X Y|X should be Y|color X Y",
    "material": "make X Y|change the material of X to Y|give X a Y look|X should be Y|change X to a Y one"
                "|use a Y finish for X",
    "size": "make X Y|change the size of X to Y|resize X to Y|X should be Y|change X to a Y one"
            "|scale X to be Y",
    "background": "replace the background with Y|change the background to Y|swap the background for Y"
                  "|use Y as the background|make the background Y|the background should be Y|set the scene Y"
                  "|show everything Y",
    "environment": "change the scene from X to Y|change the scene to Y|make the scene look like Y"
                   "|show the same scene Y|the same picture Y|change light and weather to Y"
                   "|show what this looks like Y",
    "style": "apply a Y style to the picture|turn the picture into Y|redraw it as Y|make it look like Y"
             "|change the style to Y|show this as Y|render the picture in Y style|convert the picture to Y",
}  # fmt: skip


def _any(words):
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


PLACE = (r"in the center|in the middle|on the (?:left|right)(?: side)?"
         r"|at the (?:top|bottom)(?: (?:left|right))?"
         r"|near the (?:top|bottom)|in the (?:top|bottom) (?:left|right) corner")  # fmt: skip
WORDS = rf"(?:({_any(SIZE)}) )?(?:({_any(draw.COLOURS)}) )?(?:({_any(MATERIAL)}) )?"
MEANT = re.compile(rf"\bthe (?:(leftmost|rightmost|topmost|bottommost) )?{WORDS}"
                   rf"({_any(draw.SHAPES)}|shape|object|thing)\b(?: ({PLACE}))?")  # fmt: skip
NEW = re.compile(rf"\ban? {WORDS}({_any(draw.SHAPES)})\b(?: ({PLACE}))?")


def place_fits(words, o):
    v, u = ("top", "mid", "bottom")[int(o.y * 2.999)], ("left", "mid", "right")[int(o.x * 2.999)]
    return set(words.split()) & {"top", "bottom", "left", "right"} == {v, u} - {"mid"}


def said(size, colour, material, shape):
    """Words -> fields of an object."""
    fields = {"size": SIZE.get(size), "colour": colour, "material": MATERIAL.get(material),
              "shape": shape if shape in draw.SHAPES else None}  # fmt: skip
    return {f: value for f, value in fields.items() if value}


def meant(match, objects):
    """The objects that a reference fits, by all it says."""
    most, *words, place = match.groups()
    fits = [o for o in objects if all(getattr(o, f) == v for f, v in said(*words).items())]
    fits = [o for o in fits if not place or place_fits(place, o)]
    ends = {"leftmost": lambda o: o.x, "rightmost": lambda o: -o.x, "topmost": lambda o: o.y,
            "bottommost": lambda o: -o.y}  # fmt: skip
    return [min(fits, key=ends[most])] if most else fits


def check(task, text, before, after):
    """Asserts that an instruction is true of the step from one scene to the next, and of nothing else.
    Returns its wording."""
    frames = FRAMES[task].split("|") if task != "attribute" else ""
    gone = [o for o in before.objects if o not in after.objects]
    came = [o for o in after.objects if o not in before.objects]
    if task in LOCAL:
        assert replace(after, objects=()) == replace(before, objects=())
    else:
        assert after == replace(before, **{task: getattr(after, task)}) and after != before
    if task == "add":
        assert not gone and after.objects[:-1] == before.objects
        place = re.search(PLACE, text)
        assert place_fits(place[0], after.objects[-1])
        text = re.sub(rf"^({PLACE}), (.*)$", r"\2", text)  # "on the left, add a star"
        match = NEW.search(text)
        fields = said(*match.groups()[:4])
        assert len(fields) == 4 and all(getattr(after.objects[-1], f) == v for f, v in fields.items())
        frame = re.sub(rf"Y ({PLACE})", "Y", NEW.sub("Y", text))
    elif task in LOCAL:
        match = MEANT.search(re.sub(r"the picture (?=without)|from the picture", "", text))
        if task == "remove":  # twins may be equal but for their place, and two never share that
            assert len(before.objects) - 1 == len(after.objects) and not came and len(gone) == 1
        else:
            assert len(gone) == len(came) == 1
            old, new = gone[0], came[0]
            assert before.objects.index(old) == after.objects.index(new)
            differ = {f for f in draw.Object.__dataclass_fields__ if getattr(old, f) != getattr(new, f)}
        assert meant(match, before.objects) == gone, (text, before)
        frame = text.replace(match[0], "X")
        if task == "swap":
            y = NEW.search(frame)
            fields = said(*y.groups()[:4])
            assert set(fields) == {"colour", "material", "shape"}
            assert {"colour", "shape"} <= differ <= set(fields)
            assert all(getattr(new, f) == v for f, v in fields.items())
            frame = frame.replace(y[0], "Y")
        if task == "attribute":
            (field,) = differ
            words = {"colour": {c: c for c in draw.COLOURS}, "size": SIZE, "material": MATERIAL}[field]
            y = re.search(rf"(?<!X )\b({_any(words)})\b|(?<=X )({_any(words)})\b", frame)
            assert y and words[y[0]] == getattr(new, field), (text, new)
            frame = (frame[: y.start()] + "Y" + frame[y.end() :]).replace(" an Y", " a Y")
            frames = FRAMES[field].split("|")
    else:
        words = {"background": WHERE, "environment": WHEN, "style": STYLE}[task]
        if task == "environment" and (now := re.search(rf"from ({_any(words)}) to", text)):
            assert words[now[1]] == before.environment
            text = text.replace(f"from {now[1]} to", "from X to")
        y = re.search(rf"(?:an? )?\b({_any(words)})(?=( style)?( to the picture| as the background)?$)", text)
        assert y and words[y[1]] == getattr(after, task), (text, after)
        article = "a " if text[y.start() :].startswith(("a ", "an ")) and y[2] else ""
        frame = text[: y.start()] + article + "Y" + text[y.end() :]
    assert frame in frames, (text, frame)
    return frame


# ---- the seven edits -------------------------------------------------------------------------------


def strange_words(level):
    """Words for what a level does not have."""
    of = draw.LEVELS[level]
    known = {*of.shapes, *of.colours, *of.backgrounds}
    known |= {w for w, m in MATERIAL.items() if m in of.materials} | {"wood"}  # a background too
    known |= {w for w, size in SIZE.items() if size in of.sizes}
    every = {*draw.SHAPES, *draw.COLOURS, *draw.BACKGROUNDS, *MATERIAL, *SIZE}
    return re.compile(rf"\b({_any(every - known)})\b") if every - known else re.compile("(?!)")


@on_both
@pytest.mark.parametrize("task", scene_edits.EDITS)
def test_instructions_are_true_of_what_differs(task, level):
    texts, frames, strange = set(), set(), strange_words(level)
    for i in range(350):
        s = draw.scene(4, i, level)
        e = scene_edits.EDITS[task](s, draw.rng_for(i))
        assert e.task == task and e.instruction.isascii() and e.target.level == level
        assert len(e.instruction) <= draw.LEVELS[level].max_bytes
        assert not strange.search(e.instruction), e.instruction
        frames.add(check(task, e.instruction, s, e.target))
        texts.add(e.instruction)
    every = FRAMES[task].split("|") if task != "attribute" else {
        f for k in ("colour", "material", "size") for f in FRAMES[k].split("|")}  # fmt: skip
    assert frames == set(every) and len(every) >= 6
    assert len(texts) > (230 if task in LOCAL else 30)


@on_both
def test_every_value_is_reached(level):
    """An edit leads to every shape, colour, material, size, background, environment and style of the level,
    and to no other."""
    of = draw.LEVELS[level]
    came = {"swap": set(), "add": set(), "attribute": set(), "background": set(), "environment": set(),
            "style": set()}  # fmt: skip
    for i in range(700):
        whole = draw.scene(4, i, level)
        for task in came:  # beside a large object there is no room for a giant one
            s = replace(whole, objects=()) if task == "add" and i % 2 else whole
            target = scene_edits.EDITS[task](s, draw.rng_for(i)).target
            new = [o for o in target.objects if o not in s.objects]
            old = s.objects[target.objects.index(new[0])] if task in ("swap", "attribute") else None
            came[task] |= {(f, getattr(o, f)) for o in new for f in ("shape", "colour", "material", "size")
                           if old is None or getattr(o, f) != getattr(old, f)}  # fmt: skip
            came[task] |= {(f, getattr(target, f)) for f in scene_edits.WHOLE if f == task}
    looks = {("colour", v) for v in of.colours} | {("material", v) for v in of.materials}
    shapes, sizes = {("shape", v) for v in of.shapes}, {("size", v) for v in of.sizes}
    assert came["swap"] == looks | shapes and came["attribute"] == looks | sizes
    assert came["add"] == looks | shapes | sizes
    for field in scene_edits.WHOLE:
        names = {"background": of.backgrounds, "environment": draw.ENVIRONMENTS, "style": draw.STYLES}
        assert came[field] == {(field, v) for v in names[field]}


def test_the_longest_instructions_fit():
    """Of easy: objects of long names in a corner; all wordings."""
    for colours, places in ((("purple",), (0.71,)), (("yellow", "purple"), (0.29, 0.71))):
        made = [draw.Object("triangle", c, "striped", "large", 0.71, p) for c, p in zip(colours, places)]
        s, lengths = draw.Scene(tuple(made), "sky", "snowfall", "watercolor", 1, "easy"), set()
        for i in range(3000):
            task = ("swap", "attribute", "remove")[i % 3]
            e = scene_edits.EDITS[task](s, draw.rng_for(i))
            lengths.add(len(e.instruction))
            if i % 10 < 3:
                check(task, e.instruction, s, e.target)
        assert 80 < max(lengths) <= draw.LEVELS["easy"].max_bytes


@on_both
def test_the_reading_is_strict(level):
    """The same instruction with one word changed is not true any more."""
    for i in range(50):
        s = draw.scene(4, i, level)
        for task, edit in scene_edits.EDITS.items():
            e = edit(s, draw.rng_for(i))
            later = edit(s, draw.rng_for(i, 99))
            if task == "remove" or later.target == e.target:
                continue
            with pytest.raises(AssertionError):
                check(task, e.instruction, s, later.target)


@on_both
def test_objects_are_referred_to_in_many_ways(level):
    one = draw.scene(4, 3, level)
    assert len({scene_edits.refer(one, draw.rng_for(i))[1] for i in range(100)}) > 8
    said_of = [MEANT.search(scene_edits.refer(draw.scene(4, i, level), draw.rng_for(i))[1])
               for i in range(400)]  # fmt: skip
    ways = {tuple(bool(w) for w in m.groups()) + (m[5] in draw.SHAPES,) for m in said_of}
    assert len(ways) > 10


@on_both
def test_a_reference_fits_one_object(level):
    """Also of two alike, of which only the place tells which is meant."""
    for i in range(300):
        s = draw.scene(4, i, level)
        twins = replace(s, objects=s.objects + tuple(
            replace(o, x=round(1 - o.x, 4), y=round(o.y * 0.9, 4)) for o in s.objects[:1]))  # fmt: skip
        for of in (s, twins):
            k, phrase = scene_edits.refer(of, draw.rng_for(i))
            assert meant(MEANT.fullmatch(phrase), of.objects) == [of.objects[k]], (phrase, of)


@on_both
def test_a_place_is_said_only_of_what_lies_well_apart(level):
    """Nothing else that the other words fit is just over the border of a third."""
    count = 0
    for i in range(600):
        s = draw.scene(4, i, level)
        k, phrase = scene_edits.refer(s, draw.rng_for(i))
        match, o = MEANT.fullmatch(phrase), s.objects[k]
        if not match[6]:
            continue
        fits = meant(MEANT.fullmatch(phrase.removesuffix(" " + match[6])), s.objects)
        count += len(fits) > 1
        for q in fits:
            apart = [abs(getattr(q, a) - getattr(o, a)) for a in "xy"
                     if int(getattr(q, a) * 2.999) != int(getattr(o, a) * 2.999)]  # fmt: skip
            assert q is o or max(apart) > 0.2, (phrase, s)
        assert min(abs(v - b) for v in (o.x, o.y) for b in (1 / 3, 2 / 3)) > 0.04, (phrase, o)
    assert count > (10 if level == "hard" else 0)


@on_both
@pytest.mark.parametrize("task", scene_edits.EDITS)
def test_edits_change_only_their_mask(task, level):
    for i in range(50):
        s, (h, w) = draw.scene(4, i, level), SHAPES_HW[i % 4]
        e = scene_edits.EDITS[task](s, draw.rng_for(i))
        a, b, mask = draw.draw(s, h, w), draw.draw(e.target, h, w), scene_edits.edit_mask(e, s, h, w)
        changed = (a != b).any(-1)
        assert mask.shape == (h, w) and mask.dtype == np.float32 and set(np.unique(mask)) <= {0, 1}
        assert changed.any(), (e, s)
        if task in LOCAL:
            assert not changed[mask == 0].any(), (e, s)
            assert mask.mean() < (0.75 if level == "hard" else 0.95)
        elif task == "background":
            assert e.ids is None and ((mask == 0) == (draw.instances(s, h, w) > 0)).all()
        else:
            assert e.ids is None and mask.all()


@on_both
def test_truth_under_a_removed_object_is_exact(level):
    """Drawing without any object gives the background that shows between the objects, bit for bit."""
    for i in range(40):
        s, (h, w) = draw.scene(6, i, level), SHAPES_HW[i % 4]
        mask = draw.footprint(s.objects, s.style, h, w)
        a, b = draw.draw(s, h, w), draw.draw(replace(s, objects=()), h, w)
        assert (a[~mask] == b[~mask]).all() and (a != b).any()


def overlap(objects):
    """How deep the last object reaches into another, in its radii."""
    *others, new = objects
    r = draw.RADIUS[new.size]
    return -draw.gap(new.x, new.y, r, others) / r


@on_both
def test_chain(level):
    tasks, most = set(), {"easy": 2, "hard": 6}[level]
    for i in range(60 if level == "easy" else 40):
        s = draw.scene(5, i, level)
        turns = scene_edits.chain(s, draw.rng_for(i), 12)
        assert len(turns) == 12 and turns == scene_edits.chain(s, draw.rng_for(i), 12)
        for text, after in turns:
            task = next((f for f in scene_edits.WHOLE if getattr(s, f) != getattr(after, f)), None)
            if task is None:
                local = {-1: "remove", 1: "add", 0: "swap" if NEW.search(text) else "attribute"}
                task = local[len(after.objects) - len(s.objects)]
            check(task, text, s, after)
            tasks.add(task)
            assert 1 <= len(after.objects) <= most and len(text) <= draw.LEVELS[level].max_bytes
            assert task != "add" or level == "hard" or overlap(after.objects) < 0.051, (s, after)
            s = after
    assert tasks == set(scene_edits.EDITS)
    empty = replace(s, objects=())
    assert scene_edits.chain(empty, draw.rng_for(1), 5)
    with pytest.raises(ValueError, match="no object"):
        scene_edits.remove(empty, draw.rng_for(1))


# ---- the edit source -------------------------------------------------------------------------------


def digest(source, indices, h, w):
    out = hashlib.sha256()
    for i in indices:
        got = source.load(i, h, w)
        out.update(got["image"].tobytes() + got["source"].tobytes() + got["mask"].tobytes())
        out.update(json.dumps([got[k] for k in ("caption", "target_caption", "task", "score")]).encode())
    return out.hexdigest()


STORED = {"hard": "ae43df1725aa0da4", "easy": "2e3938eafa31b903"}


@on_both
def test_instructions_are_the_same_on_every_machine(level):
    source = dataset.EditScenes("train", level=level)
    edits = [source.edit(i)[1] for i in range(210)]
    text = [f"[{json.dumps(e.instruction)}, {plain_dict(e.target)}]" for e in edits]
    scores = dataset.EditScenes("train", 0.5, level)
    text += [f"{scores.score(i):.9f} {scores.kind(i)}" for i in range(210)]
    assert hashlib.sha256("\n".join(text).encode()).hexdigest()[:16] == STORED[level]


def test_easy_adds_where_there_is_room():
    """What is added hardly overlaps. A scene is edited as it is where there is room; else its first object
    steps aside into a corner, or the scene is emptied: about as often. On hard scenes are edited as they
    are."""
    source, found = dataset.EditScenes("train"), Counter()
    for i in range(7 * 600):
        if source.task(i) != "add":
            continue
        s, (before, e) = source.scenes.scene(i), source.edit(i)
        assert 1 <= len(e.target.objects) <= 2 and overlap(e.target.objects) < 0.051, e
        new = e.target.objects[-1]
        assert draw.RADIUS[new.size] < min(new.x, new.y, 1 - new.x, 1 - new.y)
        assert 0.24 <= draw.RADIUS[new.size] <= 0.36
        assert e.target == replace(before, objects=(*before.objects, new))
        if before == s:
            found["as it is"] += 1
            continue
        again = scene_edits.add(s, draw.rng_for(source.seed, i, 4))
        assert scene_edits.crowded(again)
        assert len(s.objects) == 2 or overlap(again.target.objects) > 0.05
        found["aside" if before.objects else "emptied"] += 1
        if before.objects:
            (aside,), first = before.objects, s.objects[0]
            assert aside == replace(first, size="large", x=aside.x, y=aside.y)
            assert (aside.x, aside.y) == (0.27 if first.x < 0.5 else 0.73, 0.27 if first.y < 0.5 else 0.73)
        else:
            assert before == replace(s, objects=())
    assert found["as it is"] > 40 and 0.7 < found["aside"] / found["emptied"] < 1.3
    hard = dataset.EditScenes("train", level="hard")
    assert all(hard.edit(i)[0] == hard.scenes.scene(i) for i in range(2, 7 * 300, 7))


@on_both
def test_deterministic_across_processes(level):
    code = ("from test_scene_edits import *; s = dataset.EditScenes('train', 0.6, LEVEL);"
            "print(digest(s, range(1000, 1030), 40, 56))").replace("LEVEL", repr(level))  # fmt: skip
    path = f"{Path(draw.__file__).parents[1]}:{Path(__file__).parent}"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         env={"PYTHONPATH": path}).stdout  # fmt: skip
    source = dataset.EditScenes("train", 0.6, level)
    source.load(5, 64, 64)  # what was drawn before, and the order, must not matter
    digest(source, range(1029, 999, -1), 40, 56)
    assert got.strip() == digest(source, range(1000, 1030), 40, 56)
    assert got.strip() != digest(source, range(1001, 1031), 40, 56)


@pytest.mark.parametrize("split, level", [("train", "easy"), ("heldout", "easy"), ("heldout", "hard")])
def test_right_pairs(split, level):
    source, strange = dataset.EditScenes(split, level=level), strange_words(level)
    assert len(source) == len(dataset.Scenes(split)) and source.size(0) is None
    assert source.name == dataset.Scenes(split, level).name
    soft = 0
    for i in range(140):
        h, w = SHAPES_HW[i % 4]
        got, s = source.load_exact(i, h, w), dataset.Scenes(split, level).scene(i)
        assert max(len(got[k]) for k in ("caption", "target_caption")) <= draw.LEVELS[level].max_bytes
        assert not strange.search(got["caption"] + "; " + got["target_caption"])
        plain = source.load(i, h, w)
        assert set(plain) == {"image", "source", "caption", "target_caption", "mask", "task", "score"}
        assert is_true(plain["target_caption"], got["after"])
        assert all(np.array_equal(got[key], plain[key]) for key in plain)
        assert got["task"] == source.task(i) == source.tasks[i % 7] and got["score"] == source.score(i) == 10
        check(got["task"], got["caption"], got["before"], got["after"])
        if got["task"] == "add" and level == "easy":  # what stood in the way is gone or aside
            s = replace(s, objects=got["before"].objects)
        assert got["before"] == s and got["kind"] is None and (got["image"] == got["truth"]).all()
        assert (got["source"] == draw.draw(s, h, w)).all()
        assert (got["image"] == draw.draw(got["after"], h, w)).all()
        assert got["image"].dtype == np.uint8 and got["image"].shape == got["source"].shape == (h, w, 3)
        assert (got["changed"] == (got["source"] != got["image"]).any(-1)).all() and got["changed"].any()
        mask = got["mask"]
        assert mask.dtype == np.float32 and mask.shape == (h, w) and 0 <= mask.min() and mask.max() == 1
        assert (mask[got["changed"]] == 1).all()
        soft += ((mask > 0) & (mask < 1)).any()
        if got["task"] in ("environment", "style"):
            assert mask.all()
        if got["task"] in LOCAL:
            assert (got["source"] == got["image"])[~got["changed"]].all()
            assert mask.mean() < 0.9 or level == "easy"
    assert 25 < soft < 85
    assert dataset.SPLITS["train"][0] != dataset.SPLITS["heldout"][0]


def test_region_masks_are_of_four_kinds():
    changed = np.zeros((64, 64), bool)
    changed[20:30, 30:40] = np.tri(10, dtype=bool)
    kinds = {"outline": 0, "box": 0, "grey box": 0, "fades": 0}
    for i in range(200):
        mask = scene_edits.region_mask(changed, draw.rng_for(i))
        assert (mask[changed] == 1).all() and mask[:, :8].max() == 0 and mask.mean() < 0.5
        ys, xs = np.nonzero(mask)
        box = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        levels = np.unique(mask)
        flat = "box" if (box == 1).all() else "grey box" if box.all() else "outline"
        name = "fades" if len(levels) > 3 else flat
        kinds[name] += 1
        if name == "grey box":
            assert levels[:-1].tolist()[-1] in np.float32([0.1, 0.3, 0.5, 0.7, 0.8])
    assert min(kinds.values()) > 25


@on_both
@pytest.mark.parametrize("hw", [(8, 8), (17, 200), (200, 17), (96, 130)])
def test_any_size(hw, level):
    source = dataset.EditScenes("train", 0.7, level)
    for i in range(42):
        got = source.load(i, *hw)
        assert got["image"].shape == got["source"].shape == (*hw, 3) and got["mask"].shape == hw
        assert np.isfinite(got["mask"]).all() and got["mask"].any()


# ---- wrong pairs -----------------------------------------------------------------------------------


def test_shares_and_scores():
    some, more = dataset.EditScenes("train", 0.3), dataset.EditScenes("train", 0.6)
    n = 4000
    kinds = [some.kind(i) for i in range(n)]
    assert abs(sum(k is not None for k in kinds) / n - 0.3) < 0.03
    for k, (low, high) in scene_edits.WRONG.items():
        got = [some.score(i) for i in range(n) if kinds[i] == k]
        assert len(got) > 0.05 * n and low <= min(got) < low + 0.5 and high - 0.5 < max(got) <= high < 9
    right = [some.score(i) for i in range(n) if kinds[i] is None]
    assert 9 <= min(right) and max(right) <= 10 and np.std(right) > 0.2
    assert all(more.kind(i) == kinds[i] for i in range(n) if kinds[i])  # they stay wrong
    for i in [i for i in range(60) if more.kind(i) is None]:
        a, b = dataset.EditScenes("train").load(i, 32, 32), more.load(i, 32, 32)
        assert a.pop("score") == 10 > b.pop("score") and all(np.array_equal(a[k], b[k]) for k in a)
    heldout = dataset.EditScenes("heldout", 0.6)
    assert all(heldout.kind(i) is None and heldout.score(i) == 10 for i in range(200))
    short = dataset.EditScenes("heldout")
    short.wrong = 0.5  # 100,000 pairs
    assert short.scores.shape == short.task_of.shape == (len(short),) and short.scores.dtype == np.float32
    assert np.allclose(short.scores[:300], [short.score(i) for i in range(300)])
    assert [short.tasks[t] for t in short.task_of[:30]] == [short.task(i) for i in range(30)]
    assert 0.48 < (short.scores < 9).mean() < 0.52


@pytest.fixture(scope="module", params=draw.LEVELS)
def wrong(request):
    source = dataset.EditScenes("train", 1.0, request.param)
    return [source.load_exact(i, 48, 48) for i in range(500)]


def of_kind(wrong, kind):
    got = [w for w in wrong if w["kind"] == kind]
    assert {w["task"] for w in got} == set(scene_edits.TASKS)
    return got


def touched(w, objects):
    return draw.footprint(objects, w["before"].style, 48, 48)


def objects_of(w):
    """The object an edit is about before and after it (None: there is none), and all others."""
    gone = [o for o in w["before"].objects if o not in w["after"].objects]
    came = [o for o in w["after"].objects if o not in w["before"].objects]
    return (gone or [None])[0], (came or [None])[0], [o for o in w["before"].objects if o not in gone]


def test_wrong_pairs_are_neither_the_truth_nor_said_to_be(wrong):
    for w in wrong:
        assert (w["image"] != w["truth"]).any() and w["score"] < 9, w["caption"]
        assert w["image"].dtype == np.uint8 and w["image"].shape == w["truth"].shape
        check(w["task"], w["caption"], w["before"], w["after"])  # what is asked stays possible


def test_half_done(wrong):
    ways = {"mixture": 0, "part": 0, "fields": 0}
    for w in of_kind(wrong, "half-done"):
        a, b, c = (w[k].astype(float) for k in ("source", "truth", "image"))
        plain = np.abs(b - a) > 40
        share = ((c - a)[plain] / (b - a)[plain]) if plain.any() else np.array([0.5])
        same_a, same_b = (c == a).all(-1)[w["changed"]], (c == b).all(-1)[w["changed"]]
        if (same_a | same_b).all():
            assert 0.15 < same_b.mean() < 0.75
            ways["part"] += 1
        elif 0.18 < share.min() and share.max() < 0.63:
            assert np.ptp(share) < 0.05
            ways["mixture"] += 1
        else:
            old, new, _ = objects_of(w)
            k, fields = w["before"].objects.index(old), ("shape", "colour", "material")
            for n in range(1, 7):
                o = replace(new, **{f: getattr(old, f) for j, f in enumerate(fields) if n >> j & 1})
                all_before = w["before"].objects
                s = replace(w["before"], objects=all_before[:k] + (o,) + all_before[k + 1 :])
                if o not in (old, new) and (draw.draw(s, 48, 48) == w["image"]).all():
                    ways["fields"] += 1
                    break
            else:
                raise AssertionError(w["caption"])
        assert (c == a)[~w["changed"]].all() or w["task"] == "swap"
    assert min(ways.values()) >= 5, ways


def test_wrong_object(wrong):
    others_edited = 0
    for w in of_kind(wrong, "wrong object"):
        level = draw.LEVELS[w["before"].level]
        largest = level.sizes[-1]
        assert (w["image"] != w["source"]).any(), w["caption"]
        if w["task"] not in LOCAL:
            continue
        old, new, others = objects_of(w)
        if w["task"] != "add" and others:
            away = ~touched(w, [replace(o, shape=s, size=z) for o in others for s in draw.SHAPES
                                for z in (o.size, largest)])  # fmt: skip
            own = touched(w, [old]) & away
            if not own.any():
                continue
            if (w["image"] == w["source"])[own].all():  # the named object is as it was
                others_edited += 1
                assert (w["image"] == w["source"])[away].all()
                continue
            # every other already is what is asked for
            fields = [f for f in ("colour", "material", "size") if getattr(new, f) != getattr(old, f)]
            assert all(getattr(o, f) == getattr(new, f) for o in others for f in fields)
            assert w["task"] == "attribute"
        place = [replace(o, shape=s, size=largest) for o in (old, new) if o for s in draw.SHAPES]
        assert (w["image"] == w["source"])[~touched(w, place)].all()
    assert others_edited > (20 if level.most > 2 else 4)


def test_over_edited(wrong):
    objects_too = 0
    for w in of_kind(wrong, "over-edited"):
        old, new, others = objects_of(w)
        more = (w["image"] != w["truth"]).any(-1)
        if w["score"] > 3.0 + 0.4 * 4.5 and (others if w["task"] in LOCAL else w["after"].objects):
            # one of the others is another one or gone; the edit itself is done
            others = others if w["task"] in LOCAL else w["after"].objects
            near = [replace(o, shape=s) for o in others for s in draw.SHAPES]
            assert not more[~draw.footprint(near, w["after"].style, 48, 48)].any(), w["caption"]
            objects_too += 1
        else:
            assert more.mean() > 0.3, w["caption"]
        if w["task"] in LOCAL:
            assert (w["image"] != w["source"])[~touched(w, [o for o in (old, new) if o])].any()
    assert objects_too > (20 if wrong[0]["before"].level == "hard" else 8)


def test_damaged(wrong):
    for w in of_kind(wrong, "damaged"):
        area = dilate(w["changed"], 1)
        error = np.abs(w["image"].astype(int) - w["truth"]).mean(-1)
        assert not error[~area].any() and error[area].mean() > 2, w["caption"]


def test_a_lower_score_is_a_worse_picture(wrong):
    for w in wrong[:40]:
        a, b = w["source"], w["truth"]
        for seed in range(6):
            half = [scene_edits._partly(a, b, w["changed"], f, draw.rng_for(seed)) for f in (0.3, 0.5, 0.7)]
            bad = [scene_edits._damage(b, w["changed"], f, draw.rng_for(2)) for f in (1.0, 0.5, 0.0)]
            for images in (half, bad):  # seed 2: noise; coarser blocks need not be worse
                errors = [np.abs(c.astype(float) - b).mean() for c in images]
                assert errors[0] > errors[1] > errors[2] > 0
    # another object, where there is one, against the whole picture
    low, high = ([w for w in wrong if w["kind"] == "over-edited" and w["task"] in LOCAL and test(w["score"])
                  and objects_of(w)[2]] for test in (lambda s: s < 4.5, lambda s: s > 5))  # fmt: skip
    more = [np.mean([(w["image"] != w["truth"]).any(-1).mean() for w in group]) for group in (low, high)]
    assert more[0] > 2 * more[1]


# ---- command, errors, speed --------------------------------------------------------------------------


@on_both
def test_sheets(level, tmp_path, capsys):
    pages.edits(str(tmp_path / "a.png"), n=3, size=48, wrong=1, level=level)
    pages.chained(str(tmp_path / "b.png"), n=2, size=32, turns=3, level=level)
    assert Image.open(tmp_path / "a.png").width > 700 and Image.open(tmp_path / "b.png").width > 500
    assert "wrote" in capsys.readouterr().out


@pytest.mark.parametrize("call", [
    lambda: dataset.EditScenes("train", 1.5),
    lambda: dataset.EditScenes("test"),
    lambda: dataset.EditScenes("train", level="medium"),
    lambda: pages.edits("x.png", level="medium"),
    lambda: pages.edits("x.png", n=0),
    lambda: pages.edits("x.notapicture", n=1),
    lambda: pages.chained("no/such/folder/x.png", n=1),
    lambda: pages.edits("x.png", size=4),
])  # fmt: skip
def test_user_errors_are_one_line(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        call()
    assert str(e.value).startswith("error: ") and "\n" not in str(e.value)


def test_speed():
    source = dataset.EditScenes()
    for i in range(20):
        source.load(i, 64, 64)
    seconds = []
    for at in (1000, 1070, 1140):  # others may have the core's other half; of each task a seventh
        start = time.process_time()
        for i in range(70):
            source.load(at + i, 64, 64)
        seconds.append(time.process_time() - start)
    rate = 70 / min(seconds)
    print(f"{rate:.0f} pairs/s")
    assert rate > 150
