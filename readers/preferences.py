"""Preferences: of two pictures for a caption, or of two captions for a picture, which is the better."""

import json
import math
from collections import namedtuple
from pathlib import Path

from readers.files import BadFile, checked, json_lines, lot, printable, text_of

# kind: what tells better from worse; gap: by how much it does, in whatever unit, not-a-number where unknown;
# family: what else pairs have in common, such as the scene that several pictures are made from
Pair = namedtuple("Pair", "image_better caption_better image_worse caption_worse kind gap family",
                  defaults=["", math.nan, ""])


def _pairs_of(row):
    """Row of a preference file -> list of Pair. Of ImageReward's ranks lower is better; ties are skipped."""
    kind, gap = str(row.get("kind", "")), row.get("gap")
    gap = float(gap) if type(gap) in (int, float) and abs(gap) < math.inf else math.nan
    family = "" if row.get("family") is None else str(row["family"])
    caption = next((row[k] for k in ("caption", "prompt", "text") if isinstance(row.get(k), str)), None)
    if "ranking" in row or "generations" in row:
        files, ranks = row.get("generations"), row.get("ranking")
        lists = isinstance(files, list) and isinstance(ranks, list) and len(files) == len(ranks)
        if caption is None or not lists:
            raise ValueError("needs prompt, and generations and ranking of equal length")
        ranked = list(zip(files, ranks))
        if not all(type(f) is str and type(r) in (int, float) and abs(r) < math.inf for f, r in ranked):
            raise ValueError("generations must be file names and ranking finite numbers")
        gap = gap if len(ranked) == 2 else math.nan
        return [Pair(f, caption, g, caption, kind, gap, family)
                for f, a in ranked for g, b in ranked if a < b]
    better, worse = row.get("better"), row.get("worse")
    if not (isinstance(better, str) and isinstance(worse, str)) or better == worse:
        raise ValueError("better and worse must be two different strings")
    if isinstance(row.get("image"), str):
        return [Pair(row["image"], better, row["image"], worse, kind, gap, family)]
    if caption is None:
        raise ValueError("neither caption (of two pictures) nor image (of two captions)")
    return [Pair(better, caption, worse, caption, kind, gap, family)]


class Pairs(list):
    """List of Pair, with .name, .root (the folder of its pictures) and .bad_rows."""


def open_pairs(path, split="all", images=None, fraction=0.1):
    """Preference file -> Pairs: JSON list or JSON lines of ImageReward items {prompt, generations, ranking},
    {caption, better, worse} with two pictures, {image, better, worse} with two captions, told by the keys.

    Pictures are relative to `images`, else to the file's folder. A row may have kind, gap and family. Bad
    rows are named and skipped up to a limit, then SystemExit. split, fraction: see `part`."""
    path = Path(path)
    if split not in ("train", "heldout", "all"):
        raise SystemExit(f"error: split: {split!r}: use train, heldout or all")
    if not path.is_file():
        raise SystemExit(f"error: {path}: no such file: give preference pairs, such as make_prefs.py writes")
    with open(path, "rb") as f:
        is_list = text_of(f.read(64)).lstrip().startswith("[")
    try:
        items = json.loads(path.read_bytes()) if is_list else ()
    except (ValueError, RecursionError) as e:
        raise BadFile(path, f"not JSON ({printable(str(e))[:80]})", "repair it") from None
    rows = ((f"{path} item {n}", row) for n, row in enumerate(items)) if is_list else json_lines(path)
    found, bad_rows = checked(rows, _pairs_of)
    pairs = Pairs(p for row in found for p in row)
    pairs.name, pairs.root, pairs.bad_rows = str(path), str(images or path.parent), bad_rows
    return part(pairs, split, fraction)


def part(pairs, split, fraction):
    """The "train" or "heldout" part of Pairs, or "all" of them: by a hash of their `families`, so that no
    picture, and no prompt of two pictures, is on both sides (captions to choose among may be alike on both).
    `fraction` is held out, of few families one at least, of one none. SystemExit where a part has nothing."""
    kept = pairs
    if split != "all":
        lots = [lot(key) for key in families(pairs)]
        least, most = min(lots, default=1.0), max(lots, default=1.0)
        held = [least < most and fraction > 0 and (x < fraction or x == least) for x in lots]
        kept = Pairs(p for p, h in zip(pairs, held) if h == (split == "heldout"))
    if not kept and pairs and split == "heldout" and fraction > 0:
        raise SystemExit(f"error: {pairs.name}: its {len(pairs)} pairs share pictures or prompts, each with "
                         "some other, so that none can be held out: give --val_pairs, or --val_fraction 0")
    if not kept:
        raise SystemExit(f"error: {pairs.name}: no pairs in its {split} part: check its keys, or the "
                         "fraction")
    kept.name, kept.root, kept.bad_rows = pairs.name, pairs.root, pairs.bad_rows
    return kept


def families(pairs):
    """What the split goes by, for each pair: the first name of all that is joined with it, through however
    many others. A pair joins its pictures, its family and, of two pictures, its prompt."""
    first = {}

    def find(name):
        while (before := first.setdefault(name, name)) != name:
            first[name] = first[before]
            name = before
        return name

    def named(p):
        prompt = p.caption_better if p.image_better != p.image_worse else ""
        return [f"{kind} {name}" for kind, name in (("picture", p.image_better), ("picture", p.image_worse),
                                                    ("prompt", prompt), ("family", p.family)) if name]

    for p in pairs:
        names = sorted(find(name) for name in named(p))
        for name in names[1:]:
            first[find(name)] = names[0]
    return [find(f"picture {p.image_better}") for p in pairs]
