"""What of the scored rows becomes a data set: the best try, no copies, no picture on both sides of the split.

A *family* is all that shares a source picture: tries, twins (an addition and its removal), refined copies.
Families go whole to the held-out part, or whole to the training part.
"""

import hashlib
import re
from collections import Counter, defaultdict

import numpy as np
from PIL import Image

from factory import shards
from readers.files import held_out

WHOLE = ("env", "style")  # edits that may change little everywhere
LIGHT = ["omni_edit_id", "task", "edited_prompt_list", "o_score", "family", "item", "try", "twin_of",
         "judge_status", "refined_from"]


def difference_hash(image: np.ndarray) -> int:
    """uint8 [h, w, 3] -> 64 bits: of an 8 x 9 grey copy, where a pixel is brighter than its left one."""
    grey = np.asarray(Image.fromarray(image).convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def normalised(instruction: str) -> str:
    return re.sub(r"[\W_]+", " ", instruction.lower()).strip()


def looks(row: dict) -> dict:
    """Of a row with its pictures, what tells copies and edits of nothing: source and target (hashes of their
    pixels), hashes (difference_hash of both), changed (share of pixels that differ by more than 8 of 255)."""
    a, b = shards.pixels(row["src_img"]), shards.pixels(row["edited_img"])
    changed = (np.abs(a.astype(np.int16) - b).max(-1) > 8).mean() if a.shape == b.shape else 1.0
    return {"source": hashlib.sha256(a.tobytes()).hexdigest(), "changed": float(changed),
            "target": hashlib.sha256(b.tobytes()).hexdigest(),
            "hashes": (difference_hash(a), difference_hash(b))}


def join_families(rows: list[dict]) -> None:
    """Gives rows that share a picture, as source or target, one family, whatever they were told."""
    parent, of = {}, {}

    def root(name):
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for row in rows:
        for picture in (row["source"], row["target"]):
            a, b = sorted((root(row["family"]), root(of.setdefault(picture, row["family"]))))
            parent[b] = a
    for row in rows:
        row["family"] = root(row["family"])


def choose(rows: list[dict], min_score: float | None, most: int = 4, near: int = 3, equal: bool = False,
           per_task: int = 0) -> tuple[list[int], dict[int, str]]:
    """Places of the rows that are kept, and the cause of every other. rows: LIGHT columns and `looks`.

    min_score: None keeps rows without a score, too. Kept are, in this order of rules: what was scored; scores
    of min_score and more; edits that change more than a thousandth of the pixels; of the tries of an item
    the best (of equal ones the first); of pairs with the same instruction those that differ in more than
    `near` of 64 bits in source or target, and not in tries alone; at most `most` of a source and task; at
    most per_task of a task, and with `equal` as many of each as of the rarest, families in the order of a
    hash.
    """
    cause, best = {}, {}
    for k, row in enumerate(rows):
        score = row["o_score"]
        if min_score is not None and score is None:
            cause[k] = "no score"
        elif min_score is not None and score < min_score:
            cause[k] = "low score"
        elif row["changed"] < 0.001 and row["task"] not in WHOLE:
            cause[k] = "nothing changed"
        else:
            rank = (-(score or 0), row["try"], k)
            place = row["item"], row["task"], row["refined_from"] is not None
            if place in best and best[place][0] <= rank:
                cause[k] = "a better try"
                continue
            if place in best:
                cause[best[place][1]] = "a better try"
            best[place] = rank, k
    kept, seen, per_source = [], defaultdict(list), Counter()
    for k, row in enumerate(rows):
        if k in cause:
            continue
        said = normalised((row["edited_prompt_list"] or [""])[0])
        a, b = row["hashes"]
        copy = any(row["source"] == other or (a ^ x).bit_count() <= near and (b ^ y).bit_count() <= near
                   for other, x, y in seen[row["task"], said])
        if copy:
            cause[k] = "a copy"
        elif per_source[row["source"], row["task"]] >= most:
            cause[k] = "many of one source"
        else:
            seen[row["task"], said].append((row["source"], a, b))
            per_source[row["source"], row["task"]] += 1
            kept.append(k)
    counts = Counter(rows[k]["task"] for k in kept)
    limit = min(counts.values(), default=0) if equal else per_task
    limit = min(limit, per_task) if equal and per_task else limit
    if limit:
        taken, balanced = Counter(), []
        for k in sorted(kept, key=lambda k: (order(rows[k]["family"]), k)):
            taken[rows[k]["task"]] += 1
            if taken[rows[k]["task"]] > limit:
                cause[k] = "balance"
            else:
                balanced.append(k)
        kept = sorted(balanced)
    return kept, cause


def order(family: str) -> str:
    return hashlib.sha256(f"pack {family}".encode()).hexdigest()


def split(rows: list[dict], kept: list[int], dev: float, shard: int) -> dict[str, list[int]]:
    """File name -> places of its rows: train-00000-of-00003.parquet, ... and dev-..., the held-out part, as
    data sets are named. Families in the order of a hash, none in both parts."""
    parts = {"train": [], "dev": []}
    for k in sorted(kept, key=lambda k: (order(rows[k]["family"]), k)):
        parts["dev" if held_out(rows[k]["family"], dev) else "train"].append(k)
    out = {}
    for name, places in parts.items():
        n = -(-len(places) // shard)
        out |= {f"{name}-{s:05d}-of-{n:05d}.parquet": places[s * shard:(s + 1) * shard] for s in range(n)}
    return out
