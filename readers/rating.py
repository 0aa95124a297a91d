"""Side by side by people (ByteEdit Sec. 4.2, its main evaluation): a page that asks, tables of the answers.

    study(Study(folders=("out/a", "out/b"), out="out/study"))     OUT/page for raters, and OUT/key.json
    study(Study(answers=("1.jsonl", "2.jsonl"), out="out/study"))  tables, results.json, votes.jsonl

Folders are trees that sample.py writes, or another system's with the same names. Forms:

    gsb      two results of one edit, which is better: ByteEdit's good / same / bad, in one question or more
    expert   one result, 1 to 5: coherence, structure, aesthetics (ByteEdit Table 1)
    scpq     one result, 0, 0.5 or 1: semantic consistency, perceptual quality (ImagenHub; OmniEdit Sec. 5)

Fixed before anybody votes, all ours where the papers are silent: the last question is the primary one; "both
bad" counts as same; who is careless does not count (study.careless), nor do repeats and gold items; votes
about one picture depend on each other, so intervals are bootstraps over source pictures (tally.py).

    1. config   2. folders: cases   3. the page   4. votes and raters   5. the report
"""

import json
import math
import os
import random
import re
import sys
import time
from collections import Counter, defaultdict, namedtuple
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np

import common
from log import open_out, portable, progress, provenance, sign_test, table, write_json
from readers import benchmarks, tally
from readers import study as page
from readers.files import (
    BadFile,
    bad_name,
    checked,
    clean_caption,
    inside,
    json_lines,
    photo_of,
    picture_cell,
    pictures_of,
    printable,
    read_image,
    read_mask,
)

#### 1. config ###############################################################################################


@dataclass
class Study:
    folders: tuple[str, ...] = ()  # a folder of results for each system, which names it in the tables
    out: str = "out/study"  # page/ for raters and key.json, which they must not get; later the tables
    answers: tuple[str, ...] = ()  # what raters exported: makes the tables, in place of a page
    form: Literal["gsb", "expert", "scpq"] = "gsb"  # what raters are asked: at the top of this file
    criteria: tuple[str, ...] = ()  # rows: names of CRITERIA, or "name: a question"; the last one decides
    sources: str | None = None  # folder of the pictures before, where samples.jsonl does not say them
    instructions: str | None = None  # the same of what was asked: whatever sample.py --jsonl takes, with keys
    n: int = 0  # comparisons (expert, scpq: pictures), spread evenly over pairs of systems; 0 = all
    per_rater: int = 0  # comparisons for each rater, in blocks; 0 = all
    gold: float = 0.05  # ruined pictures, to see whether a rater looks: share of his items, at least five
    repeats: float = 0.05  # items that come twice, sides exchanged: share of his items, at least six
    resamples: int = 1000  # bootstrap samples over pictures
    seed: int = 0  # seed of order, sides, gold, repeats and the bootstrap


CRITERIA = {  # form -> name -> (question, hint)
    "gsb": {
        "follows": ("Follows the instruction", ""),
        "keeps": ("Keeps what was not to change", ""),
        "real": ("Looks real, no artefacts", ""),
        "overall": ("Better, all in all", "the one that you would rather have got"),
    },
    "expert": {  # ByteEdit Sec. 4.2
        "coherence": ("Coherence", "does what was painted fit to what is around it, without a seam?"),
        "structure": ("Structure", "are shapes, limbs and perspective as they should be?"),
        "aesthetics": ("Aesthetics", "colours, light, composition"),
    },
    "scpq": {  # ImagenHub's table, in our words
        "SC": ("Does what it was asked, and nothing else",
               "0: not followed, or another picture. 0.5: in part. 1: followed, and the rest is kept"),
        "PQ": ("Looks real", "0: broken at first glance. 0.5: odd in places. 1: like a true picture"),
    },
}
CHOICES = {  # form -> (key, what is stored, what the button says)
    "gsb": [("1", "left", "is better"), ("0", "same", "same"), ("2", "right", "is better"),
            ("x", "bad", "both bad")],
    "expert": [("1", 1, "bad"), ("2", 2, "2"), ("3", 3, "3"), ("4", 4, "4"), ("5", 5, "excellent")],
    "scpq": [("0", 0, "no"), ("5", 0.5, "in part"), ("1", 1, "yes")],
}
QUESTION = {
    "gsb": "You see a picture, what was asked, and two results. Say of each row which is better.\n"
           "Same: you would not mind which of the two you got. Both bad: you would use neither.",
    "expert": "You see a picture, what was asked, and a result. Rate it from 1 to 5.",
    "scpq": "You see a picture, what was asked, and a result. Does it succeed: not, in part, or wholly?",
}
LEAST_GOLD, LEAST_REPEATS = 5, 6  # fewer say nothing of a rater (study.careless)


def criteria_of(cfg):
    """Rows of the form, as the page has them."""
    known, rows = CRITERIA[cfg.form], []
    for text in cfg.criteria or known:
        name, colon, question = text.partition(":")
        name, question = name.strip(), clean_caption(question)[0]
        if not re.fullmatch(r"\w[\w -]{0,30}", name) or not (name in known or colon and question):
            common.refuse(cfg, "criteria", f"use {', '.join(known)}, or 'name: a question'")
        question, hint = known[name] if not question else (question, "")
        rows.append({"id": name, "text": question, "hint": hint, "choices": [
            dict(zip(("key", "value", "text"), choice)) for choice in CHOICES[cfg.form]]})
    names = [row["id"] for row in rows]
    if len(set(names)) < len(names) or cfg.form == "scpq" and set(names) != {"SC", "PQ"}:
        common.refuse(cfg, "criteria", "each once, of scpq SC and PQ")
    return rows


def study(cfg: Study) -> None:
    """A page of --folders, or tables of --answers. SystemExit of one line for what cannot be used."""
    common.check_bounds(cfg, not_negative=("n", "per_rater", "seed"), share=("gold", "repeats"),
                        at_least_1=("resamples",))
    started = time.time()
    if cfg.answers:
        return report(cfg, started)
    least = 2 if cfg.form == "gsb" else 1
    if len(cfg.folders) < least:
        raise wrong("folders", cfg.folders,
                    f"{cfg.form} needs at least {least}: give the systems' folders, or --answers")
    make(cfg)


def wrong(flag, values, text):
    """-> SystemExit of one line."""
    values = printable(" ".join(map(str, [values] if isinstance(values, str) else values)))[:200]
    return SystemExit(f"error: --{flag}: {values or 'none'}: {text}")


#### 2. folders: cases #######################################################################################
# A picture that a system made: file, None where it lists one that is not there; image: the picture before;
# sides: what outpainting added at each of SIDES.
Found = namedtuple("Found", "file image prompt task mask sides")
# One edit and what the systems made of it; pictures are names of study.save_picture. marked: the source with
# what was to be painted in red; cluster: its source picture's name, or its key where there is none; aspect:
# width by height of the source, else of a result.
Case = namedtuple("Case", "key prompt task source marked cluster aspect results")
SIDES = ("left", "top", "right", "bottom")


def some(names, most=5):
    """Names for a message, not all of many."""
    names = [printable(str(n))[:80] for n in names]
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def key_of(file):
    """Path of a picture in its tree -> what it is called there, without suffix."""
    return os.path.splitext(Path(file).as_posix())[0]


def read_tree(folder):
    """Folder of results -> {key: Found}, by samples.jsonl if there is one, else all its pictures."""
    root = Path(folder)
    if not root.is_dir():
        raise wrong("folders", str(folder), "no such folder: correct the path")
    found = {}
    if (root / "samples.jsonl").is_file():
        rows = checked(json_lines(root / "samples.jsonl"), _sample)[0]
        turns = defaultdict(lambda: defaultdict(list))  # a chain: its instructions one after the other
        for row in rows:
            turns[_chain(row)][row.get("turn") or 1].append(row["instruction"])
        for row in rows:
            at = inside(root, row["file"], f"{root / 'samples.jsonl'}")
            before = [turns[_chain(row)][k] for k in range(1, row.get("turn") or 1)]
            before = [texts[0] for texts in before] if all(len(t) == 1 for t in before) else []
            sides = [row.get(s) for s in SIDES]
            texts = ", then ".join([*before, row["instruction"]])
            task = row.get("edit_type") or row.get("task") or ""
            found[key_of(row["file"])] = Found(
                at if os.path.isfile(at) else None, row.get("image"), texts, task, row.get("mask"),
                sides if sides[0] is not None else None)
    else:
        files = sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith(".")
                       and not p.stem.endswith((".mask", "_SRCIMG")) and p != root / "sheet.png")
        pictures, left = pictures_of(files)
        if left:
            print(f"note: {printable(str(folder))}: {left}", file=sys.stderr)
        for file in pictures:
            key = key_of(file.relative_to(root))
            if key in found:
                also = Path(found[key].file).name
                raise wrong("folders", str(file), f"and {also}: two results of one name: remove one")
            found[key] = Found(str(file), None, None, "", None, None)
    if not any(f.file for f in found.values()):
        raise wrong("folders", str(folder), "no result in it: give what sample.py wrote")
    return found


def _sample(row):
    texts = row.get("instruction", row.get("prompt")), row.get("file")
    if not all(isinstance(t, str) for t in texts) or bad_name(texts[1]):
        raise ValueError("no file, or no instruction")
    for k in ("image", "mask", "edit_type", "task"):
        if not isinstance(row.get(k), str | None):
            raise ValueError(f"{k} is no text")
    for k, most in (("turn", 1000), *((side, 2**14) for side in SIDES)):
        if row.get(k) is not None and not (type(row[k]) is int and 0 <= row[k] <= most):
            raise ValueError(f"{k} is no number up to {most}")
    if len({row.get(side) is None for side in SIDES}) > 1:
        raise ValueError(f"not all of {', '.join(SIDES)}")
    return row | {"instruction": clean_caption(texts[0])[0]}


def _chain(row):
    return row.get("key"), row.get("image"), str(row.get("sample"))


def file_named(text, folder):
    """A path as sample.py keeps it (from the folder it was started in, or from ~) -> a file that is there, or
    None. Looked for from here, and from the folders above the tree."""
    if not text or bad_name(text):
        return None
    try:
        path = Path(text).expanduser()
    except RuntimeError:  # the home of somebody who is not here
        return None
    places = (Path(p) / path for p in (".", *Path(folder).resolve().parents))
    return next((str(p) for p in places if p.is_file()), None)


def read_asked(cfg):
    """--instructions -> {key: (picture before, instruction, task)}: what sample.py --jsonl takes. Keys are
    those of the trees that it writes, and of lines their own "key"."""
    path, out, used = Path(cfg.instructions), {}, set()
    root, layout = Path(cfg.sources) if cfg.sources else path.parent, "flat"

    def make_item(row):
        if row.get("key") and not (row.get("image") or row.get("source") or row.get("source_image")):
            row = row | {"image": str(row["key"])}  # --sources knows it by this name
        return benchmarks.complete_edit(row, layout, root, used)

    try:
        if path.is_dir() or path.suffix in (".parquet", ".arrow"):
            layout, rows = benchmarks.table_rows(path)
        elif path.suffix == ".json":
            layout, root, rows = benchmarks.json_rows(path, root if cfg.sources else None)
        else:
            rows = benchmarks.jsonl_rows(path)
        items, _ = benchmarks.kept(rows, make_item)
    except ValueError as e:
        raise SystemExit(f"error: --instructions: {str(e).removeprefix('jsonl: ')}") from None
    keys = Counter(item["key"] for item in items)
    for item in items:
        for turn, file in enumerate(item["files"], 1):
            out[file] = item["image"], ", then ".join(item["instructions"][:turn]), item["task"]
        if keys[item["key"]] == 1:
            out.setdefault(item["key"], out[item["files"][-1]])
    return out


def by_name(folder):
    """Pictures below a folder -> {key, and its last part where that is one picture's: path}."""
    if not Path(folder).is_dir():
        raise wrong("sources", str(folder), "no such folder: correct the path")
    files = pictures_of(sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.name[0] != "."))[0]
    keys = {key_of(p.relative_to(folder)): str(p) for p in files}
    last = Counter(Path(k).name for k in keys)
    return {Path(k).name: p for k, p in keys.items() if last[Path(k).name] == 1} | keys


def source_of(key, found, tree, sources, asked):
    """The picture before an edit: a path, (RowGroups, row), or None. Found by --sources, by --instructions,
    beside the result (GEdit-Bench), or by samples.jsonl, in this order."""
    names = [key, Path(key).name, Path(found.image or "").stem]
    if known := next((sources[n] for n in names if n in sources), None):
        return known
    if asked and (isinstance(asked[0], tuple) or os.path.isfile(asked[0])):
        return asked[0]
    beside = Path(tree) / f"{key}_SRCIMG.png"
    return str(beside) if beside.is_file() else file_named(found.image, tree)


def read_source(source):
    """-> uint8 [h, w, 3]; source: as of `source_of`."""
    if isinstance(source, str):
        return read_image(source)
    file, name, (cell,) = source[0].row(source[1])
    return read_image(picture_cell(cell, file, name), name)


def on_canvas(picture, sides):
    """Outpainting: the picture on the grey canvas that it grew to, so that results lie upon it. sides None:
    as it is."""
    left, top, right, bottom = sides or (0, 0, 0, 0)
    h, w = picture.shape[:2]
    canvas = np.full((h + top + bottom, w + left + right, 3), 128, np.uint8)
    canvas[top:top + h, left:left + w] = picture
    return canvas


def systems_of(folders):
    """Folders -> {what the tables call it: folder}: their names, or paths where names are alike."""
    names = Counter(Path(f).resolve().name for f in folders)
    out = {}
    for f in folders:
        name = Path(f).resolve().name
        name = printable(name if names[name] == 1 else portable(str(f)).rstrip("/"))
        if name in out:
            raise wrong("folders", str(f), "twice: give each system once")
        out[name] = f
    return out


def find_cases(cfg):
    """-> Cases of at least two systems (gsb) or one, whose pictures are then in OUT/page; the systems' names.
    Every key that a system lacks, or that cannot be used, is counted and named."""
    systems = systems_of(cfg.folders)
    trees = {name: read_tree(folder) for name, folder in systems.items()}
    asked = read_asked(cfg) if cfg.instructions else {}
    sources = by_name(cfg.sources) if cfg.sources else {}
    every = sorted(set().union(*trees.values()))
    for name, tree in trees.items():
        lacks = [k for k in every if k not in tree or not tree[k].file]
        print(f"{name}: {len(every) - len(lacks):,} of {len(every):,} results"
              + f"; missing: {some(lacks)}" * bool(lacks))
    least, cases, lost = 2 if cfg.form == "gsb" else 1, [], defaultdict(list)
    common_keys = [k for k in every if sum(k in t and t[k].file is not None for t in trees.values()) >= least]
    if not common_keys:
        shown = "; ".join(f"{name} has {some(tree, 2)}" for name, tree in trees.items())
        raise wrong("folders", cfg.folders,
                    f"not one result is called alike ({shown}): give those of one edit one name")
    bar = progress(len(common_keys), desc="pictures")
    for key in common_keys:
        found = {name: tree[key] for name, tree in trees.items() if key in tree and tree[key].file}
        told = asked.get(key) or asked.get(Path(key).name)
        try:
            case = _case(cfg, key, found, systems, sources, told)
        except BadFile as e:
            print(f"skipped: {str(e).removeprefix('error: ')}", file=sys.stderr)
            case = "cannot be read"
        if isinstance(case, str):
            lost[case].append(key)
        else:
            cases.append(case)
        bar.update(1)
    bar.close()
    for problem, keys in lost.items():
        print(f"{len(keys):,} left out, {problem}: {some(keys)}")
    if not cases:
        problem, keys = max(lost.items(), key=lambda x: len(x[1]))
        fix = "--sources" if "before" in problem else "--instructions" if "asked" in problem else "others"
        raise wrong("folders", cfg.folders, f"nothing to show; {problem}: {some(keys, 2)}: give {fix}")
    if not any(c.source for c in cases):
        print("note: no pictures before: if these are edits, give --sources")
    if not any(c.prompt for c in cases):
        print("note: no instructions: if there were any, give --instructions")
    return cases, list(systems)


def _case(cfg, key, found, systems, sources, told):
    """Case of a key, or why there is none."""
    prompts = {told[1]} if told else {f.prompt for f in found.values() if f.prompt is not None}
    where = {n: source_of(key, f, systems[n], sources, told) for n, f in found.items()}
    paths = [s for n, s in enumerate(where.values()) if s is not None and s not in list(where.values())[:n]]
    if len(prompts) > 1:
        return "asked differently of the systems"
    if cfg.instructions and not prompts:
        return "what was asked is not in --instructions"
    if not paths and (cfg.sources or told or any(f.image for f in found.values())):
        return "the picture before is not found"
    first, source, marked = next(iter(found.values())), None, None
    before = [on_canvas(read_source(p), first.sides) for p in paths]
    if any(not np.array_equal(b, before[0]) for b in before):
        return "the pictures before differ between the systems"
    made = {n: read_image(f.file) for n, f in found.items()}
    results = {n: page.save_picture(cfg.out, x) for n, x in made.items()}
    h, w = (before or [*made.values()])[0].shape[:2]
    if before:
        source = page.save_picture(cfg.out, before[0])
        mask = file_named(first.mask, systems[next(iter(found))])
        if mask and not first.sides:
            photo = photo_of(paths[0]) if isinstance(paths[0], str) else None
            hole = read_mask(mask, *before[0].shape[:2], photo=photo)[..., None]
            marked = page.save_picture(cfg.out, _red(before[0], hole))
    task = told[2] if told and told[2] else first.task
    prompt = prompts.pop() if prompts else ""
    return Case(key, prompt, task, source, marked, source or key, round(w / h, 4), results)


def _red(picture, hole):
    """What is to be painted, tinted as on sample.py's sheets. hole [h, w, 1] in [0, 1]."""
    a = 0.6 * hole
    return (picture * (1 - a) + np.array([235, 45, 60]) * a + 0.5).astype(np.uint8)


#### 3. the page #############################################################################################
def balanced(cases, names, form, n, rng):
    """-> [(case, systems)]: pairs of systems (of expert and scpq each system) in turn, so that any piece of
    the list has them equally often, as far as there are pictures; the first n. And of gsb what is left out
    because the results are the same picture: {systems: number}."""
    alike, queues = {}, []
    for unit in combinations(names, 2 if form == "gsb" else 1):
        queue = [(c, unit) for c in cases if all(name in c.results for name in unit)]
        if len(unit) == 2:
            equal = sum(c.results[unit[0]] == c.results[unit[1]] for c, _ in queue)
            alike |= {unit: equal} if equal else {}
            queue = [(c, u) for c, u in queue if c.results[unit[0]] != c.results[unit[1]]]
        rng.shuffle(queue)
        queues.append(queue)
    ring = [queue[k] for k in range(max(map(len, queues))) for queue in queues if k < len(queue)]
    return ring[:n or None], alike


def make(cfg):
    """OUT/page and OUT/key.json; prints what was made."""
    criteria, rng = criteria_of(cfg), random.Random(cfg.seed)
    if within := [f for f in cfg.folders if Path(cfg.out).resolve().is_relative_to(Path(f).resolve())]:
        raise wrong("out", cfg.out, f"lies in {within[0]}, a system's folder: give another")
    open_out(cfg.out)
    cases, names = find_cases(cfg)
    ring, alike = balanced(cases, names, cfg.form, cfg.n, rng)
    for unit, equal in alike.items():
        print(f"{' and '.join(unit)}: {equal:,} results are the same picture, which nobody is asked about")
    if not ring:
        raise wrong("folders", cfg.folders, "all results are the same pictures: give another system")
    pair, entries, shown = cfg.form == "gsb", [], Counter()

    def add(case, made, **more):
        """made: {picture: what made it}, from left to right -> the item's number."""
        entries.append((case, made, more))
        return len(entries) - 1

    # 1) sides: of each pair of systems each is left in every second item
    for case, unit in ring:
        order = list(unit)[::-1] if shown[unit] % 2 else list(unit)
        shown[unit] += 1
        add(case, {case.results[name]: name for name in order}, systems=list(unit))
    blocks = max(1, math.ceil(len(ring) / cfg.per_rater)) if cfg.per_rater else 1
    blocks = [[int(i) for i in part] for part in np.array_split(np.arange(len(ring)), blocks)]
    size = max(map(len, blocks))

    # 2) gold, in every block: a ruined result beside itself; of one picture, both alone
    n_gold = min(len(ring), max(LEAST_GOLD, round(cfg.gold * size))) if cfg.gold else 0
    numbers, gold = np.random.default_rng([cfg.seed, 19]), []
    for k, i in enumerate(sorted(rng.sample(range(len(ring)), n_gold))):
        case, made, _ = entries[i]
        true = sorted(made)[k % len(made)]
        picture = read_image(str(Path(cfg.out) / "page" / "pictures" / f"{true}.png"))
        spoilt = page.save_picture(cfg.out, page.ruin(picture, numbers))
        if pair:
            sides = [(true, made[true]), (spoilt, "ruined")]
            gold.append((None, add(case, dict(sides[::-1] if k % 2 else sides), gold=true)))
        else:
            gold.append((i, add(case, {spoilt: "ruined"}, gold=i)))

    # 3) repeats, in the second part of a block, their firsts in the first part
    parts = []
    for block in blocks:
        n_again = min(len(block), max(LEAST_REPEATS, round(cfg.repeats * len(block)))) if cfg.repeats else 0
        twice = rng.sample(block, n_again)
        again = [add(entries[i][0], dict(list(entries[i][1].items())[::-1]), repeat_of=i,
                     systems=entries[i][2]["systems"]) for i in twice]
        rest = [i for i in {*block, *(i for i, _ in gold if i is not None)} if i not in twice]
        rng.shuffle(rest)
        cut = max(0, (len(block) + n_again) // 2 - len(twice))
        first, second = [*twice, *rest[:cut]], [*rest[cut:], *again]
        for k, (_, j) in enumerate(gold):
            (first, second)[k % 2].append(j)
        parts.append([first, second])

    # 4) ids that tell nothing, in an order that tells nothing
    places = list(range(len(entries)))
    rng.shuffle(places)
    ids = [sha256(json.dumps([cfg.seed, "rating", place]).encode()).hexdigest()[:12] for place in places]
    tasks, items = [], {}
    for i in sorted(range(len(entries)), key=lambda i: places[i]):
        case, made, more = entries[i]
        task = {"id": ids[i], "prompt": case.prompt, "candidates": list(made), "source": case.source,
                "aspect": case.aspect}
        tasks.append(task | ({"marked": case.marked} if case.marked else {}))
        known = {k: ids[more[k]] if type(more.get(k)) is int else more.get(k) for k in ("gold", "repeat_of")}
        items[ids[i]] = {"prompt": case.prompt, "made": made, **known, "systems": more.get("systems"),
                         "key": case.key, "cluster": case.cluster, "task": case.task}
    blocks = [[sorted((ids[i] for i in part)) for part in block] for block in parts]
    page.write_page(cfg.out, tasks, items, QUESTION[cfg.form], cfg.form, {"systems": names},
                    criteria=criteria, blocks=blocks)
    of_block, again = max(sum(map(len, b)) for b in blocks), sum(bool(i["repeat_of"]) for i in items.values())
    print(f"wrote {Path(cfg.out) / 'page'}: {len(ring):,} " + ("comparisons" if pair else "pictures to rate")
          + f" of {len(names)} systems, {len(gold)} gold items, {again} repeats. Give raters that folder "
          f"(page/index.html needs no server), keep {Path(cfg.out) / 'key.json'}.")
    if len(blocks) > 1:
        print(f"{len(blocks)} blocks of up to {of_block} items: rater number k gets block (k - 1) modulo "
              f"{len(blocks)}, so number them; 1 to {3 * len(blocks)} give each comparison three votes")
    else:
        print(f"each rater gets all {of_block} items"
              + "; number them from 1: even ones see the sides exchanged" * pair)
    print(f"then: python evaluate.py study --answers FILE ... --out {portable(cfg.out)}")


#### 4. votes and raters #####################################################################################
Vote = namedtuple("Vote", "id annotator verdict votes order ms at")
VERDICTS = ("rated", "skip")


def _vote_of(key):
    values = {c["id"]: [choice["value"] for choice in c["choices"]] for c in key["criteria"]}

    def check(row):
        if "sum" not in row:
            raise ValueError("changed by hand after the page wrote it")
        _, name, verdict, order, ms, at = page.common_part(row, key, VERDICTS)
        votes = row.get("votes")
        if not isinstance(votes, dict) or verdict == "rated" and not (votes.keys() == values.keys() and all(
                type(v) in (int, float, str) and v in values[c] for c, v in votes.items())):
            raise ValueError("not an answer to each row of its form")
        return Vote(row["id"], name, verdict, votes if verdict == "rated" else {}, order, ms, at)
    return check


def picked(vote, criterion):
    """What a vote of gsb says, whatever the sides: the picture's name, "same" or "bad"."""
    value = vote.votes[criterion]
    return vote.order[value == "right"] if value in ("left", "right") else value


def against(vote, criterion, key):
    """+1 where the first of the item's two systems is better, -1 the second, 0 same or both bad."""
    item, name = key["items"][vote.id], picked(vote, criterion)
    return 0 if name in ("same", "bad") else 1 if item["made"][name] == item["systems"][0] else -1


def raters(votes, key):
    """Votes -> {rater: what is known of him}: as study.annotators, and of how many items these are, the votes
    for the left and the right picture with a sign test, and the share of items under study.FAST. The last
    criterion is looked at."""
    criterion, out = key["criteria"][-1]["id"], {}
    pair, scale = key["form"] == "gsb", len(key["criteria"][-1]["choices"])
    for name in sorted({v.annotator for v in votes}):
        mine = {v.id: v for v in votes if v.annotator == name}
        rated = {i: v for i, v in mine.items() if v.verdict == "rated"}
        gold = right = again = same = 0
        for i, v in rated.items():
            item = key["items"][i]
            if item["gold"] and pair:
                gold += 1
                right += picked(v, criterion) == item["gold"]
            elif item["gold"] and item["gold"] in rated:  # lower than itself unspoilt, or as low as can be
                gold += 1
                bad, good = (sum(x.votes.values()) for x in (v, rated[item["gold"]]))
                right += bad < good or bad == sum(c["choices"][0]["value"] for c in key["criteria"])
            if (first := rated.get(item["repeat_of"])) and pair:
                again += 1
                same += picked(v, criterion) == picked(first, criterion)
            elif first:  # of five values, one beside it is the same; of three not
                again += 1
                off = max(abs(v.votes[c] - first.votes[c]) for c in v.votes)
                same += off <= (1 if scale > 3 else 0)
        plain = [v for i, v in rated.items() if not key["items"][i]["gold"]]
        left, beside = (sum(v.votes[criterion] == side for v in plain) for side in ("left", "right"))
        most = max(Counter(tuple(v.votes.values()) for v in plain).values(), default=0)
        block = max(key["blocks"], key=lambda b: len({i for part in b for i in part} & mine.keys()))
        ranked, top = (left + beside, max(left, beside)) if pair else (len(plain), most)
        out[name] = {"answers": len(mine), "of": sum(map(len, block)), "ranked": ranked, "gold": gold,
                     "right": right, "again": again, "same": same, "left": left, "right_side": beside,
                     "p_side": sign_test(left, beside), "ms": float(np.median([v.ms for v in mine.values()])),
                     "fast": float(np.mean([v.ms < page.FAST for v in mine.values()])),
                     "place": top / ranked if ranked else 0.0,
                     "where": "on one side" if pair else "of one answer"}
        out[name]["careless"] = page.careless(out[name])
    return out


#### 5. the report ###########################################################################################
def report(cfg, started):
    """Answers -> tables on the screen, OUT/results.json and OUT/votes.jsonl."""
    key = page.read_key(cfg.out, tuple(CRITERIA))
    every = page.read_answers(cfg.answers, key, _vote_of(key))
    if not every:
        raise wrong("answers", cfg.answers, "not one answer in them: export again")
    known = raters(every, key)
    _print_raters(known, key["form"] == "gsb")
    counted = [v for v in every if not known[v.annotator]["careless"]]
    items = key["items"]
    votes = [v for v in counted if v.verdict == "rated"
             and not items[v.id]["gold"] and not items[v.id]["repeat_of"]]
    dropped = len(every) - len(counted)
    print(f"{len(votes):,} of {len(every):,} answers count; left out: {dropped:,} of careless raters, "
          f"{sum(v.verdict == 'skip' for v in counted):,} skipped, "
          f"{sum(bool(items[v.id]['gold']) for v in counted):,} to gold items, "
          f"{sum(bool(items[v.id]['repeat_of']) for v in counted):,} to repeats")
    write_votes(cfg, every, known, key)
    if not votes:
        raise wrong("answers", cfg.answers, "none that counts: ask more people")
    found = _report_gsb(cfg, votes, key) if key["form"] == "gsb" else _report_scores(cfg, votes, key)
    level, told = ("nominal" if key["form"] == "gsb" else "ordinal"), {}
    for c in (c["id"] for c in key["criteria"]):
        rows = [(items[v.id]["cluster"], v.id, v.annotator, _class(v, c, key)) for v in votes]
        told[c] = a = tally.agreement(rows, level, cfg.resamples, cfg.seed)
        if not a["items"]:
            print(f"agreement, {c}: unknown, no item was seen by two")
            continue
        print(f"agreement, {c}: {a['raw']:.1%} of pairs of votes alike; Krippendorff's alpha ({level}) "
              f"{_range(a['alpha'])}; Fleiss' kappa {a['fleiss']:.3f} ({a['fleiss_items']:,} of "
              f"{a['items']:,} items, {a['fleiss_raters']} raters each)"
              + (f"; Cohen's {a['cohen']:.3f}" if "cohen" in a else ""))
    write_json(Path(cfg.out) / "results.json", {
        **provenance(started), "config": portable(asdict(cfg)), "form": key["form"],
        "study": key["sha256"], "answers": len(every), "votes": len(votes), "raters": known, **found,
        "agreement": told})
    print(f"wrote {Path(cfg.out) / 'results.json'} and {Path(cfg.out) / 'votes.jsonl'}")


def _class(vote, criterion, key):
    """A vote as agreement sees it: of gsb +1, 0, -1 for the first system of its pair, both bad as 0."""
    return against(vote, criterion, key) if key["form"] == "gsb" else vote.votes[criterion]


def _range(v, digits=3):
    """[value, low, high] in words."""
    texts = ["-" if math.isnan(x) else f"{x:.{digits}f}" for x in v[:3]]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]"


def _print_raters(known, pair):
    head = ["rater", "answers", "gold", "repeats", "ms", *["left", "p"][:2 * pair]]
    rows = [[name, f"{a['answers']}/{a['of']}", f"{a['right']}/{a['gold']}", f"{a['same']}/{a['again']}",
             f"{a['ms']:,.0f}",
             *[f"{a['left']}/{a['left'] + a['right_side']}", f"{a['p_side']:.2g}"][:2 * pair]]
            for name, a in known.items()]
    lines = table(head, rows).splitlines()
    print(lines[0])
    for line, a in zip(lines[1:], known.values()):
        notes = [f"left out: {a['careless']}"] if a["careless"] else []
        notes += ["unfinished"] if a["answers"] < a["of"] else []
        notes += [f"{a['fast']:.0%} of answers under {page.FAST / 1000} s"] if a["fast"] > 0.1 else []
        notes += ["prefers a side"] if pair and a["p_side"] < 0.01 else []
        print(line + ("   " + "; ".join(notes) if notes else ""))


def _report_gsb(cfg, votes, key):
    """Tables of good, same, bad of every pair of systems; ratings of all. Good: the first is better."""
    items, how, asked = key["items"], (cfg.resamples, cfg.seed), [c["id"] for c in key["criteria"]]
    names = key["systems"]
    out = {"systems": names, "pairs": {}, "ranking": {}}
    for pair in sorted({tuple(items[v.id]["systems"]) for v in votes}):
        mine = [v for v in votes if tuple(items[v.id]["systems"]) == pair]
        lines = [(c, c, mine) for c in asked]  # name, criterion, votes; of the last criterion each task's
        tasks = sorted({items[v.id]["task"] for v in mine})
        for task in tasks if len(tasks) > 1 else ():
            lines.append((f"{asked[-1]}, {task or 'no task'}", asked[-1],
                          [v for v in mine if items[v.id]["task"] == task]))
        found, rows, shares = {}, [], []
        for name, c, some_votes in lines:
            r = tally.compare([(items[v.id]["cluster"], against(v, c, key)) for v in some_votes], *how)
            r["both_bad"] = sum(v.votes[c] == "bad" for v in some_votes)
            found[name] = r
            rows.append([name, *(f"{r[k]:,}" for k in ("good", "same", "bad", "both_bad", "pictures")),
                         _range(r["superiority"]), _range(r["net"]), f"{r['p']:.2g}"])
            shares.append([name, _range(r["share"]), _range(r["win"]),
                           "[{:.3f}, {:.3f}]".format(*r["wilson"]), _range(r["half"])])
        out["pairs"][" against ".join(pair)] = found
        print(f"\n{pair[0]} (good) against {pair[1]} (bad): votes, and [95% interval] over pictures")
        print(table(["", "G", "S", "B", "of S both bad", "pictures", "(G+S)/(S+B)", "net (G-B)/n",
                     "sign test p"], rows))
        print(table(["", "win share (G+S)/(G+2S+B)", "win rate G/(G+B)", "Wilson, as if independent",
                     "ties as halves"], shares))
    if len(names) > 2:
        for c in asked:
            rows = [(items[v.id]["cluster"], *map(names.index, items[v.id]["systems"]), against(v, c, key))
                    for v in votes]
            r = out["ranking"][c] = tally.ranking(rows, names, *how)
            if math.isnan(next(iter(r["ratings"].values()))[0]):
                print(f"\nBradley-Terry, {c}: no finite ratings: some systems never lost to the others, or "
                      "were not compared with them: ask more")
                continue
            print(f"\nBradley-Terry, {c}, ties as half wins: rating [95% interval over pictures]"
                  + f"; {r['without']:.1%} of resamples have none" * (r["without"] > 0))
            for name, v in sorted(r["ratings"].items(), key=lambda x: -x[1][0]):
                print(f"  {name:<24} {_range(v, 0)}")
    return out


def _report_scores(cfg, votes, key):
    """Means of every system, of scpq with O = sqrt(SC PQ) of each vote and accuracy, the share of SC = 1
    (OmniEdit Sec. 5), and differences from the first system over the pictures of both."""
    items, how = key["items"], (cfg.resamples, cfg.seed)
    names = key["systems"]
    heads, scored = [c["id"] for c in key["criteria"]], defaultdict(list)
    for v in votes:
        x = [float(v.votes[c]) for c in heads]
        if key["form"] == "scpq":
            sc, pq = float(v.votes["SC"]), float(v.votes["PQ"])
            x += [math.sqrt(sc * pq), float(sc == 1)]
        scored[items[v.id]["systems"][0]].append((items[v.id]["cluster"], v.annotator, x))
    heads += ["O", "accuracy"] if key["form"] == "scpq" else []
    out, rows, gaps = {"systems": {}, "differences": {}}, [], []
    for name in (n for n in names if n in scored):
        found = tally.means(scored[name], *how)
        out["systems"][name] = {"votes": len(scored[name]), **dict(zip(heads, found))}
        rows.append([name, f"{len(scored[name]):,}", f"{len({c for c, *_ in scored[name]}):,}",
                     *(_range(v) + (f" +-{v[3]:.3f}" if not math.isnan(v[3]) else "") for v in found)])
    print("\nmean [95% interval over pictures] +- deviation of the raters' means")
    print(table(["", "votes", "pictures", *heads], rows))
    first, *others = (n for n in names if n in scored)
    for name in others:
        found = tally.differences(scored[first], scored[name], *how)
        out["differences"][f"{first} - {name}"] = dict(zip(heads, found))
        gaps.append([f"{first} - {name}", *map(_range, found)])
    if gaps:
        print(table(["difference", *heads], gaps))
    return out


def write_votes(cfg, votes, known, key):
    """OUT/votes.jsonl, a line for every vote and criterion, with the systems' names, model_a on the left; of
    scpq also OUT/imagenhub/RATER.tsv, as ImagenHub reads them."""
    lines, tables = [], defaultdict(lambda: defaultdict(dict))
    for v in sorted(votes, key=lambda v: (v.annotator, v.at)):
        item = key["items"][v.id]
        check = "gold" if item["gold"] else "repeat" if item["repeat_of"] else ""
        about = {"rater": v.annotator, "item": v.id, "key": item["key"], "task": item["task"]}
        shown = [item["made"][n] for n in v.order]
        pair = {"model_a": shown[0], "model_b": shown[1]} if len(shown) == 2 else {"model": shown[0]}
        counts = not (check or known[v.annotator]["careless"] or v.verdict == "skip")
        more = {"check": check, "counts": counts, "ms": v.ms, "ts": v.at, "version": 1}
        for c in (c["id"] for c in key["criteria"]):
            told = v.votes.get(c, "skip")
            told = {"left": "a", "right": "b"}.get(told, told)
            lines.append(about | pair | {"criterion": c, "vote": told} | more)
        if key["form"] == "scpq" and v.verdict == "rated" and not check:
            tables[v.annotator][item["key"]][shown[0]] = f"[{v.votes['SC']}, {v.votes['PQ']}]"
    (Path(cfg.out) / "votes.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    for rater, rows in tables.items():
        folder = open_out(Path(cfg.out) / "imagenhub")
        names = sorted({n for row in rows.values() for n in row})
        lines = [["uid", *names], *([k, *(row.get(n, "") for n in names)] for k, row in sorted(rows.items()))]
        file = folder / (re.sub(r"[^A-Za-z0-9_-]", "_", rater) + ".tsv")
        file.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
