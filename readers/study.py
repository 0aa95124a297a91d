"""What people prefer: a page that asks them, and what their answers are worth (ByteEdit Sec. 3.1).

    write_study(folder, items, question)     a page and pictures: open page/index.html, or serve page/
    write_page(folder, tasks, items, ...)    the same page with another form (readers/rating.py)
    read_answers(files, key)                 the lines that it exports, of any number of annotators
    annotators, careless, agreement          who looked, and how far they agree
    decided                                  best and worst of an item, by the majority

The page (study.html, one file, nothing is fetched) shows one to four pictures, in another order for every
annotator, and knows neither what made them nor which items test the annotator: that is in key.json, which
stays at home. Its forms: "rank", best and worst; "gsb", "expert" and "scpq", rows of choices (rating.py).
"""

import hashlib
import json
import math
import os
import random
import sys
from collections import Counter, defaultdict, namedtuple
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from readers.files import BadFile, checked, clean_caption, json_lines, printable

# names: of its pictures, as in pictures/NAME.png; made: what made each, for the key alone; gold: names of
# which the answer must be one, {"best": [...], "worst": [...]}, either may be left out
Item = namedtuple("Item", "prompt names made source gold", defaults=[None, None])
Answer = namedtuple("Answer", "id annotator verdict best worst order ms at")
VERDICTS = ("ranked", "tie", "bad", "skip")
GOLD, SELF, FAST, ONE_PLACE = 0.7, 0.34, 700, 0.9  # below, below, below (ms), above: see `careless`


#### 1. the page #############################################################################################
def save_picture(folder, picture):
    """uint8 [h, w, 3] -> its name: a hash of its pixels, which tells nobody what made it."""
    picture = np.ascontiguousarray(picture)
    name = hashlib.sha256(repr(picture.shape).encode() + picture.tobytes()).hexdigest()[:20]
    path = Path(folder) / "page" / "pictures" / f"{name}.png"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
        os.utime(path, (946684800, 946684800))  # a time of day would tell in what order they were made
    return name


def ruin(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 [h, w, 3] -> a copy that nobody who looks calls the better: large blocks, noise, no contrast."""
    h, w, _ = x.shape
    cell = max(2, min(h, w) // 6)
    y = Image.fromarray(x).resize((max(1, w // cell), max(1, h // cell)), Image.Resampling.BOX)
    y = np.asarray(y.resize((w, h), Image.Resampling.NEAREST), np.float32)
    return np.clip(128 + 0.5 * (y - 128) + 60 * rng.standard_normal(x.shape), 0, 255).astype(np.uint8)


def write_study(folder, items, question, repeats=0.05, seed=0):
    """Items whose pictures `save_picture` has saved -> page/index.html and key.json; the key, a dict.

    repeats: share of items that come twice, under another id, to see whether an annotator agrees with
    himself. Ids tell nothing: they are hashes. An item of equal pictures is left out.
    """
    rng, tasks, key = random.Random(seed), [], {}

    def add(item, again=""):
        told = json.dumps([seed, item.prompt, item.names, item.source, again])
        id = hashlib.sha256(told.encode()).hexdigest()[:12]
        if id not in key:
            tasks.append({"id": id, "prompt": clean_caption(item.prompt)[0], "candidates": sorted(item.names),
                          "source": item.source})
            key[id] = {"prompt": item.prompt, "made": dict(zip(item.names, item.made)), "gold": item.gold,
                       "repeat_of": again or None}
        return id

    for item in items:
        if not 2 <= len(item.names) <= 4:
            raise ValueError(f"an item has 2 to 4 pictures, not {len(item.names)}")
        if len(set(item.names)) == len(item.names):
            id = add(item)
            if not item.gold and rng.random() < repeats:
                add(item, id)
    rng.shuffle(tasks)
    return write_page(folder, tasks, key, question)


def write_page(folder, tasks, items, question, form="rank", secret=None, **more):
    """What the page shows (tasks, and more: criteria, blocks), and what it must not know (items by id, and
    secret, a dict) -> page/index.html and key.json; the key. SystemExit over the key of another study:
    without it nobody could read that one's answers."""
    study = {"question": question, "form": form, **more, "tasks": tasks}
    study["sha256"] = hashlib.sha256(json.dumps(study).encode()).hexdigest()
    home = Path(folder) / "key.json"
    if home.exists() and read_key(folder, None)["sha256"] != study["sha256"]:
        raise SystemExit(f"error: {home}: of another study, whose answers nobody could read without it: give "
                         "another folder, or remove it")
    page = (Path(__file__).parent / "study.html").read_text(encoding="utf-8")
    inline = json.dumps(study).replace("<", "\\u003c")  # no text of ours can end the script
    (Path(folder) / "page").mkdir(parents=True, exist_ok=True)
    (Path(folder) / "page" / "index.html").write_text(page.replace("@TASKS@", inline), encoding="utf-8")
    key = {"sha256": study["sha256"], "form": form, **more, **(secret or {}), "items": items}
    home.write_text(json.dumps(key, indent=1), encoding="utf-8")
    return key


#### 2. answers ##############################################################################################
def read_key(folder, forms=("rank",)):
    """key.json of a study that has one of these forms (None: any)."""
    path = Path(folder) / "key.json"
    try:
        key = json.loads(path.read_bytes())
        assert isinstance(key["sha256"], str) and isinstance(key["items"], dict)
    except (OSError, ValueError, LookupError, TypeError, AssertionError):
        raise SystemExit(f"error: {path}: not the key of a study: give the folder that it was written "
                         "to") from None
    if forms and (form := key.get("form", "rank")) not in forms:
        maker = "make_prefs.py --labels" if form == "rank" else "evaluate.py study --answers"
        raise SystemExit(f"error: {path}: the key of a study of the form {printable(str(form))[:20]}: its "
                         f"answers are for {maker}")
    return key


def line_sum(row):
    """A number over all of a line of the page but its own "sum" (FNV-1a, as in study.html): whoever edits a
    line by hand leaves another one behind. No protection against somebody who wants to cheat."""
    row = {k: v for k, v in row.items() if k != "sum"}
    h = 2166136261
    for byte in json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass"):
        h = (h ^ byte) * 16777619 & 0xFFFFFFFF
    return h


def common_part(row, key, verdicts):
    """What lines of all forms say -> (item of the key, annotator, verdict, order, ms, at); ValueError."""
    if row.get("study") != key["sha256"]:
        raise ValueError("an answer to another study")
    if "sum" in row and row["sum"] != line_sum(row):
        raise ValueError("changed by hand after the page wrote it")
    item = key["items"].get(row.get("id")) if isinstance(row.get("id"), str) else None
    if item is None:
        raise ValueError("an answer to an item that is not there")
    name, verdict, order = row.get("annotator"), row.get("verdict"), row.get("order")
    if not (isinstance(name, str) and printable(name)) or verdict not in verdicts:
        raise ValueError("no annotator, or no verdict")
    if not isinstance(order, list) or not all(isinstance(n, str) for n in order) \
            or sorted(order) != sorted(item["made"]):
        raise ValueError("not the pictures of its item")
    if not all(type(row.get(k)) in (int, float) and 0 <= row[k] < math.inf for k in ("ms", "at")):
        raise ValueError("ms and at are not times")
    return item, printable(name)[:40], verdict, tuple(order), float(row["ms"]), float(row["at"])


def _answer_of(key):
    def check(row):
        _, name, verdict, order, ms, at = common_part(row, key, VERDICTS)
        best, worst, ranked = row.get("best"), row.get("worst"), verdict == "ranked"
        if ranked and not (best in order and worst in order and best != worst):
            raise ValueError("best and worst are not two of its pictures")
        return Answer(row["id"], name, verdict, best if ranked else None, worst if ranked else None, order,
                      ms, at)
    return check


def read_answers(files, key, check=None):
    """Exported lines -> Answers; of two of an annotator to one item the later. Bad lines are named and left
    out; SystemExit where there are too many, or where a file belongs to another study.

    check(row): of another form, to a tuple with annotator, id and at."""
    found, twice = {}, Counter()
    for file in files:
        if not Path(file).is_file():
            raise BadFile(file, "no such file", "give what the page exported")
        _, first = next(json_lines(file), (None, None))
        other = first.get("study") if isinstance(first, dict) else None
        if isinstance(other, str) and other != key["sha256"]:
            raise BadFile(file, "answers to another study", "give those that this study's page exported")
        for a in checked(json_lines(file), check or _answer_of(key))[0]:
            old = found.get((a.annotator, a.id))
            if old is not None and old._replace(ms=0, at=0) != a._replace(ms=0, at=0):
                twice[a.annotator] += 1
            if old is None or old.at <= a.at:
                found[a.annotator, a.id] = a
    for name, n in twice.items():
        print(f"note: {name}: {n} item(s) answered a second time and otherwise: the later answer counts; if "
              "they are two people, give one of them another name", file=sys.stderr)
    return list(found.values())


#### 3. what they are worth ##################################################################################
def annotators(answers, key):
    """Answers -> {annotator: what is known of him}: answers; gold, right, of the items whose answer is known;
    again, same, of the repeated ones (the same best); ms, the median; place, the largest share that
    one place on the screen has among his best; see `careless`."""
    out = {}
    for name in sorted({a.annotator for a in answers}):
        mine = {a.id: a for a in answers if a.annotator == name}
        gold = right = again = same = 0
        for a in mine.values():
            item = key["items"][a.id]
            if item["gold"] and a.verdict != "skip":
                gold += 1
                right += all(getattr(a, k) in names for k, names in item["gold"].items())
            first = mine.get(item["repeat_of"])
            if first and "skip" not in (a.verdict, first.verdict):
                again += 1
                same += (a.verdict, a.best) == (first.verdict, first.best)
        ranked = [a for a in mine.values() if a.verdict == "ranked"]
        places = Counter(a.order.index(a.best) for a in ranked)
        out[name] = {"answers": len(mine), "ranked": len(ranked), "gold": gold, "right": right,
                     "again": again, "same": same, "ms": float(np.median([a.ms for a in mine.values()])),
                     "place": max(places.values()) / len(ranked) if ranked else 0.0}
        out[name]["careless"] = careless(out[name])
    return out


def careless(known):
    """Why an annotator's answers do not count, in words; "" if they do.

    Gold items below 70 % right, of at least five; the same answer to less than a third of the repeated items,
    and to so few that one who agrees with himself in half of them comes to that in less than 1 of 10 studies
    (none of four, one of seven, three of twelve: clicking at random gives a quarter); a median below 0.7 s;
    nine in ten bests at one place of the screen (or with one answer: "where"), of at least ten. Thresholds
    ours, paper silent."""
    why = []
    if known["gold"] >= 5 and known["right"] < GOLD * known["gold"]:
        why.append(f"gold {known['right']} of {known['gold']}")
    n, same = known["again"], known["same"]
    if same < SELF * n and sum(math.comb(n, k) for k in range(same + 1)) < 0.1 * 2**n:
        why.append(f"agrees with himself in {same} of {n}")
    if known["ms"] < FAST:
        why.append(f"{known['ms']:.0f} ms an answer")
    if known["ranked"] >= 10 and known["place"] > ONE_PLACE:
        why.append(f"{known['place']:.0%} {known.get('where', 'at one place')}")
    return ", ".join(why)


def agreement(answers):
    """{"best", "worst": (share of equal answers among all pairs of annotators of an item, kappa, pairs)}.

    kappa is against blind choice, one in the number of pictures. Only what both ranked counts."""
    items, out = defaultdict(list), {}
    for a in answers:
        if a.verdict == "ranked":
            items[a.id].append(a)
    for what in ("best", "worst"):
        equal, chance = [], []
        for group in items.values():
            for a, b in combinations(group, 2):
                equal.append(getattr(a, what) == getattr(b, what))
                chance.append(1 / len(a.order))
        share, blind = (float(np.mean(x)) if x else math.nan for x in (equal, chance))
        out[what] = share, (share - blind) / (1 - blind), len(equal)
    return out


def decided(answers, key):
    """Answers of annotators that count -> {id: (best, worst)}, where more than half of those who did not skip
    an item name the same best, and more than half the same worst. Gold items and repeats are no items."""
    votes = defaultdict(list)
    for a in answers:
        item = key["items"][a.id]
        if a.verdict != "skip" and not item["gold"] and not item["repeat_of"]:
            votes[a.id].append(a)
    out = {}
    for id, group in votes.items():
        most = [Counter(getattr(a, k) for a in group).most_common(1)[0] for k in ("best", "worst")]
        if all(name is not None and 2 * n > len(group) for name, n in most) and most[0][0] != most[1][0]:
            out[id] = most[0][0], most[1][0]
    return out


def ranked_items(chosen, key, others=False):
    """{id: (best, worst)} -> ImageReward's items, as readers/preferences.py reads them, names relative to the
    study's folder: best and worst alone, as ByteEdit's, or `others` between them, which are five pairs."""
    items = []
    for id, (best, worst) in sorted(chosen.items()):
        item = key["items"][id]
        names = [n for n in item["made"] if others or n in (best, worst)]
        items.append({"prompt": item["prompt"], "generations": [f"page/pictures/{n}.png" for n in names],
                      "ranking": [1 if n == best else 3 if n == worst else 2 for n in names],
                      "kind": "people"})
    return items


def write_ranked(folder, items):
    path = Path(folder) / "aesthetic.json"
    tmp = path.with_suffix(".tmp")
    tmp.write_text(json.dumps(items), encoding="utf-8")
    os.replace(tmp, path)
    return path
