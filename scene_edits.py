"""The seven edits of OmniEdit Table 2 on scenes (see scenes.py), with exact targets and masks."""

from dataclasses import dataclass, replace

import numpy as np

from scene_text import ENVIRONMENT_WORDS, STYLE_WORDS, article, place_of, place_words
from scenes import (
    BACKGROUNDS,
    CLASH,
    COLOURS,
    ENVIRONMENTS,
    MATERIALS,
    RADIUS,
    SHAPES,
    SIZES,
    STYLES,
    Object,
    Scene,
    footprint,
    free_place,
    gap,
    instances,
    pick,
)


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
    return " ".join(["the", *words] + ([place_words(place_of(o))] if "place" in fields else []))


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
            return k, _phrase(o, few[0] if u[-1] < 0.7 else pick(unique, (u[-1] - 0.7) / 0.3))
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
    return pick([o for o in options if o != true], u)


def _colours_on(scene):
    return [c for c in COLOURS if c not in CLASH[scene.background]]


def swap(scene, rng):
    """Object swap: another shape, colour and material in the place and size of an object."""
    k, old = _refer(scene, rng)
    u, o = rng.random(4).tolist(), scene.objects[k]
    new = replace(o, shape=_other(SHAPES, o.shape, u[0]), colour=_other(_colours_on(scene), o.colour, u[1]),
                  material=pick(MATERIALS, u[2]))  # fmt: skip
    text = pick(("replace {} with {}", "swap {} for {}", "turn {} into {}", "change {} into {}"), u[3])
    text = text.format(old, article(f"{new.colour} {new.material} {new.shape}"))
    return Edit("swap", _with(scene, k, new), text, (k + 1,))


def remove(scene, rng):
    """Object removal: the target is drawn without the object, so what lay under it is exact."""
    k, old = _refer(scene, rng)
    texts = ("remove {}", "delete {}", "erase {}", "take {} away", "remove {} from the picture")
    target = replace(scene, objects=scene.objects[:k] + scene.objects[k + 1 :])
    return Edit("remove", target, pick(texts, rng.random()).format(old), (k + 1,))


def add(scene, rng):
    """Object addition in a free place (of 32 tried the freest, at most slightly overlapping), on top of the
    others."""
    u = rng.random(70).tolist()
    sizes = SIZES[: 1 + int(u[0] * 3)][::-1]
    places = ((s, free_place(scene.objects, s, u[6:], -0.05)) for s in sizes)
    size, place = next(((s, p) for s, p in places if p), (None, None))
    if place is None:
        size, place = "small", free_place(scene.objects, "small", u[6:], -99.0)
    new = Object(pick(SHAPES, u[1]), pick(_colours_on(scene), u[2]), pick(MATERIALS, u[3]), size,
                 round(place[0], 4), round(place[1], 4), round((u[4] - 0.5) * 24, 2))  # fmt: skip
    text = pick(("add {} {}", "put {} {}", "insert {} {}", "place {} {}"), u[5])
    what = article(f"{new.size} {new.colour} {new.material} {new.shape}")
    text = text.format(what, place_words(place_of(new)))
    return Edit("add", replace(scene, objects=(*scene.objects, new)), text, (len(scene.objects) + 1,))


def attribute(scene, rng):
    """Attribute modification: another colour (half of the time), material or size of one object."""
    k, old = _refer(scene, rng)
    u, o = rng.random(3).tolist(), scene.objects[k]
    rest = scene.objects[:k] + scene.objects[k + 1 :]
    sizes = [s for s in SIZES if s != o.size and gap(o.x, o.y, RADIUS[s], rest) > -0.05
             and min(o.x, o.y, 1 - o.x, 1 - o.y) > RADIUS[s]]  # fmt: skip
    if u[0] < 0.5:
        new = replace(o, colour=_other(_colours_on(scene), o.colour, u[1]))
        texts = ("make {} {}", "paint {} {}", "change the color of {} to {}", "recolor {} to {}")
    elif u[0] < 0.8 or not sizes:
        new = replace(o, material=_other(MATERIALS, o.material, u[1]))
        texts = ("make {} {}", "change the material of {} to {}", "give {} a {} look")
    else:
        new = replace(o, size=pick(sizes, u[1]))
        texts = ("make {} {}", "change the size of {} to {}", "resize {} to {}")
    value = next(getattr(new, f) for f in ("colour", "material", "size") if getattr(new, f) != getattr(o, f))
    return Edit("attribute", _with(scene, k, new), pick(texts, u[2]).format(old, value), (k + 1,))


def background(scene, rng):
    """Background swap; prefers backgrounds on which no object's colour would vanish."""
    u = rng.random(2).tolist()
    others = [b for b in BACKGROUNDS if b != scene.background]
    b = pick([b for b in others if not any(o.colour in CLASH[b] for o in scene.objects)] or others, u[0])
    texts = ("replace the background with {}", "change the background to {}",
             "swap the background for {}", "use {} as the background")  # fmt: skip
    text = pick(texts, u[1]).format(_BACKGROUND_NOUNS[b])
    return Edit("background", replace(scene, background=b), text, None)


def environment(scene, rng):
    """Environment change: another weather or time of day."""
    u = rng.random(3).tolist()
    e = _other(ENVIRONMENTS, scene.environment, u[0])
    text = pick(("change the scene from {0} to {1}", "change the scene to {1}",
                  "make the scene look like {1}", "show the same scene {2}"), u[1])  # fmt: skip
    now, then = _ENVIRONMENT_NOUNS[scene.environment], _ENVIRONMENT_NOUNS[e]
    text = text.format(now, then, pick(ENVIRONMENT_WORDS[e], u[2]))
    return Edit("environment", replace(scene, environment=e), text, None)


def style(scene, rng):
    """Style transfer."""
    u = rng.random(3).tolist()
    s = _other(STYLES, scene.style, u[0])
    text = pick(("apply a {0} style to the picture", "turn the picture into {1}", "redraw it as {1}",
                  "make it look like {1}"), u[1])  # fmt: skip
    text = text.format(STYLE_WORDS[s][0], article(STYLE_WORDS[s][1]))
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
    before = [source.objects[k - 1] for k in edit.ids if edit.task != "add"]
    after = [edit.target.objects[k - 1] for k in edit.ids if edit.task != "remove"]
    return footprint(before + after, source.style, h, w).astype(np.float32)
