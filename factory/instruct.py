"""Requests written by a served model: (picture, caption, objects) -> tasks, instructions, captions.

Rows in: source (a picture), caption, objects: a list of {name, and mask (a picture), or segments (a label
map) and label, or box}; perhaps key. Rows out: what requests.Lines reads. What the model proposes is checked
(served.check_edit), its object looked for among those of the row, and said at most `most` times in a set, as
UltraEdit and Emu Edit do it; what is left out is counted by cause. Additions are removals with their roles
exchanged, so the model writes a removal's inverse and is never asked for an addition.
"""

import random
import re
from collections import Counter

from factory.requests import WHERE
from readers.files import BadFile, inside, printable, read_image

ARTICLES = {"a", "an", "the", "of", "in", "on", "with", "and"}
PLACE = ("mask", "segments", "label", "box")


def row_of(row: dict) -> dict:
    """A row in -> itself; ValueError with what is wrong with it."""
    for name in ("source", "caption"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ValueError(f"no {name}, a text")
    objects = row.get("objects") or []
    if not isinstance(objects, list) or not all(isinstance(o, dict) for o in objects):
        raise ValueError("objects is no list of {name, mask | segments and label | box}")
    for o in objects:
        if not isinstance(o.get("name"), str) or not o["name"].strip():
            raise ValueError("an object has no name")
        if not (o.get("mask") or o.get("segments") and type(o.get("label")) is int or o.get("box")):
            raise ValueError(f"{printable(o['name'])[:40]}: no mask, segments and label, or box")
    return row | {"objects": objects}


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower())) - ARTICLES


def place_of(edit: dict, objects: list[dict]) -> tuple[dict, str]:
    """The keys that tell where the edit's object is, and "" -> or {} and why there are none.

    An object is meant if all the words of its name are in the model's words for it; if several are, the one
    with most words. Backgrounds and environments are all around all objects, of one label map or in boxes."""
    if edit["task"] not in WHERE:
        return {}, ""
    if edit["task"] in ("background", "environment"):
        if not objects:
            return {}, "no object to keep"
        maps = {o.get("segments") for o in objects}
        if len(objects) == 1:
            return {k: objects[0][k] for k in PLACE if objects[0].get(k) is not None}, ""
        if len(maps) == 1 and None not in maps:
            return {"segments": maps.pop(), "label": [o["label"] for o in objects]}, ""
        if all(o.get("box") for o in objects):
            return {"box": [o["box"] for o in objects]}, ""
        return {}, "objects in several masks"
    said = words(edit["object"])
    found = [o for o in objects if words(o["name"]) <= said]
    most = max((len(words(o["name"])) for o in found), default=0)
    found = [o for o in found if len(words(o["name"])) == most]
    if len(found) != 1:
        return {}, "which of several objects" if found else "no such object"
    return {k: found[0][k] for k in PLACE if found[0].get(k) is not None}, ""


def examples(seeds: list[str], key: str, seed: int, most: int = 8) -> list[str]:
    """60 % of the human instructions (Emu Edit), `most` at most, drawn and shuffled for each picture."""
    rng = random.Random(f"{seed} {key}")
    return rng.sample(seeds, min(most, round(0.6 * len(seeds)) or len(seeds)))


def pictures(folder: str, rows: list[dict], seeds: list[str], seed: int):
    """What served.propose_edits takes, one by one; a picture that cannot be read ends the run by its name."""
    for row in rows:
        try:
            yield read_image(inside(folder, row["source"])), row["caption"], examples(seeds, row["key"], seed)
        except BadFile as e:
            raise SystemExit(f"error: {str(e).removeprefix('error: ')}") from None


def requests_of(rows: list[dict], replies, most: int) -> tuple[list[dict], Counter, list[dict]]:
    """Rows and their Replies -> requests, counts (what was left out, by cause), a log line for each row."""
    out, counts, log, said = [], Counter(), [], Counter()
    for row, reply in zip(rows, replies):
        counts["pictures"] += 1
        line, here = {"key": row["key"], "status": reply.status, "kept": 0, "left_out": {}}, set()
        for k, edit in enumerate(reply.value or ()):
            counts["proposed"] += 1
            place, why = place_of(edit, row["objects"])
            wording = " ".join(sorted(words(edit["instruction"])))
            if not why and wording in here:
                why = "said twice of a picture"
            if not why and said[wording] >= most:
                why = f"said {most} times before"
            if why:
                counts[why] += 1
                line["left_out"][str(k)] = why
                continue
            said[wording] += 1
            here.add(wording)
            request = {k: edit[k] for k in ("task", "instruction", "source_caption", "target_caption")}
            if edit["task"] == "remove":
                request |= {"behind": edit["behind"], "add_instruction": edit["inverse"] or []}
            out.append({"source": row["source"], "key": f"{row['key']}-{k}"} | request | place)
            line["kept"] += 1
        if reply.value is None:
            counts[f"no answer: {reply.status.split(':')[0]}"] += 1
        log.append(line)
    counts["kept"] = len(out)
    return out, counts, log
