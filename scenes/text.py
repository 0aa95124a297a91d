"""Captions of scenes, true and false: words for every fact of a description (draw.py), nothing more.

A caption is made in two steps, facts and then words, so that a sentence that differs from a true one in a
single fact can be said in the same words. Everything random comes from the generator given.
"""

from dataclasses import dataclass, replace

from scenes.draw import ENVIRONMENTS, LEVELS, MATERIALS, STYLES, pick, scene

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
SIZE_WORDS = {"small": ("small", "tiny"), "medium": ("medium", "medium-sized"), "large": ("large", "big"),
              "huge": ("huge", "very large"), "giant": ("giant", "enormous")}  # fmt: skip
MATERIAL_WORDS = {m: (m, m) for m in MATERIALS} | {
    "matte": ("matte", "plain"), "metal": ("metal", "metallic"), "dotted": ("dotted", "spotted")}  # fmt: skip
BACKGROUND_WORDS = {  # the first of each is the shortest
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
ENVIRONMENT_WORDS = {
    "clear": ("by day", "on a clear day", "in daylight"),
    "sunset": ("at sunset", "at dusk", "in evening light"),
    "night": ("at night", "in the dark", "by moonlight"),
    "fog": ("in fog", "in thick fog", "on a foggy day"),
    "rain": ("in rain", "in the rain", "on a rainy day"),
    "snowfall": ("in snowfall", "while it snows", "as snow falls"),
}
STYLE_WORDS = {
    "photo": ("photo", "photo"), "cartoon": ("cartoon", "cartoon drawing"),
    "sketch": ("sketch", "pencil sketch"),
    "watercolor": ("watercolor", "watercolor painting"), "pixel": ("pixel art", "pixel art picture"),
}  # fmt: skip
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_PLACES = tuple((v, u) for v in ("top", "middle", "bottom") for u in ("left", "center", "right"))


def place_of(o):
    """(top | middle | bottom, left | center | right): thirds of the picture by the object's centre."""
    return ("top", "middle", "bottom")[int(o.y * 2.999)], ("left", "center", "right")[int(o.x * 2.999)]


def place_words(place):
    v, u = place
    if place == ("middle", "center"):
        return "in the center"
    if v == "middle":
        return f"on the {u}"
    return f"at the {v}" if u == "center" else f"at the {v} {u}"


def plainly_off(said, true):
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
                and self.size in (None, o.size) and self.place in (None, place_of(o)))  # fmt: skip


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
    """Facts to say of a scene. level 0 says most; 1 drops places, 2 sizes, 3 materials (except where all but
    the plain one are always said), 4 relation and number; from 5 on only some objects are named."""
    plain = LEVELS[scene.level].plain
    if plain is not None and level == 3:
        level = 4
    material, size = plain is not None or level < 3 and u[0] < 0.92, level < 2 and u[1] < 0.45
    place = level < 1 and u[2] < (0.5 if len(scene.objects) == 1 else 0.2)
    order = sorted(range(len(scene.objects)), key=lambda k: u[12 + k % 8])
    groups = {}
    for o in (scene.objects[k] for k in order):
        said = material and o.material != plain
        g = _Group(0, o.shape, o.colour, o.material if said else None, o.size if size else None,
                   place_of(o) if place else None)  # fmt: skip
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


def article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def _say_group(g, u):
    shape = g.shape if g.count == 1 else g.shape + ("es" if g.shape == "cross" else "s")
    words = [pick(SIZE_WORDS[g.size], u[7]) if g.size else "", g.colour,
             pick(MATERIAL_WORDS[g.material], u[8]) if g.material else "", shape]  # fmt: skip
    words = " ".join(word for word in words if word)
    words = article(words) if g.count == 1 else f"{_number(g.count)} {words}"
    return f"{words} {place_words(g.place)}" if g.place else words


def _say(facts, u, short=False):
    """Facts in words; the draws u choose the wording and never the facts."""
    names = [_say_group(g, u) for g in facts.groups]
    if facts.relation is not None:
        things = f"{names[0]} {'to the ' if 'of' in facts.relation else ''}{facts.relation} {names[1]}"
    else:
        things = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names) or "nothing"
    where = pick(BACKGROUND_WORDS[facts.background][: 1 if short else 3], u[9])
    if facts.total is not None:
        things, where = f"{_number(facts.total)} shapes", f"{where}: {things}"
    when, style = facts.environment or "", facts.style or ""
    if when:
        when = pick(ENVIRONMENT_WORDS[when][: 1 if short else 3], u[10])
    if style:
        style = pick(STYLE_WORDS[style][: 1 if short else 2], u[11])
    form = int(u[20] * 4) if not short else 0
    if when and (form == 1 or facts.total is not None):
        scene_words = f"{when}, {things} {where}"
    else:
        scene_words = f"{things} {where} {when}".rstrip()
    if not style:
        return scene_words
    if form == 2 and not scene_words.startswith(when or " "):
        return f"{article(STYLE_WORDS[facts.style][1])} of {scene_words}"
    return f"{style}: {scene_words}" if form == 3 else f"{scene_words}, {style}"


def _fitting(scene, u):
    """The fullest facts whose sentence fits: (facts, short, text)."""
    of = LEVELS[scene.level]
    for level in range(of.says, 8):
        facts = _facts(scene, u, level)
        for short in (False, True):
            text = _say(facts, u, short)
            if len(text) <= of.max_bytes:
                return facts, short, text
    raise AssertionError(text)


def caption(scene, rng):
    """A true caption of a scene, ASCII, at most its level's max_bytes. Names every object (with fewer words
    when there are many), the background, the environment unless clear and the style unless photo (those two
    are said now and then)."""
    return _fitting(scene, rng.random(_DRAWS).tolist())[2]


def _wrong(facts, kind, scene, rng):
    """Facts with one statement of the given kind changed to a false one, or None when there is no such
    statement."""
    of = LEVELS[scene.level]

    def other(options, true):
        return pick([o for o in options if o != true], rng.random())

    if kind in ("background", "environment", "style"):
        true = getattr(facts, kind)
        options = {"background": of.backgrounds, "environment": ENVIRONMENTS, "style": STYLES}[kind]
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
    options = {"shape": of.shapes, "colour": of.colours, "material": of.materials, "size": of.sizes,
               "place": _PLACES}[kind]  # fmt: skip
    if kind == "material" and of.plain is not None:
        options = [m for m in options if m not in (of.plain, g.material)]  # no caption says plain
    elif getattr(g, kind) is None:
        return None
    if not options:
        return None
    changed = replace(g, **{kind: other(options, getattr(g, kind))})
    meant = [o for o in scene.objects if g.matches(o)]
    if kind == "place" and not all(plainly_off(changed.place, place_of(o)) for o in meant):
        return None
    if any(changed.matches(o) for o in scene.objects):
        return None  # it would be true of another object
    return replace(facts, groups=facts.groups[:k] + (changed,) + facts.groups[k + 1 :])


def _stranger(level, rng):
    """A random scene of a level from a generator."""
    return scene(int(rng.random() * 2**48), 0, level)


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
                wrong, _, text = _fitting(_stranger(scene.level, rng), u)
            else:
                wrong = _wrong(facts, name, scene, rng)
                text = _say(wrong, u, short) if wrong is not None else ""
            if wrong is not None and len(text) <= LEVELS[scene.level].max_bytes and not _holds(wrong, scene):
                return text, name
    raise AssertionError("no false caption")  # unreachable: the background is always named
