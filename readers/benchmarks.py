"""The files that benchmarks of edits are published in, and the trees that their scorers read.

    flat        JSON lines {source, instruction or instructions, mask, seed, key, task}
    gedit       GEdit-Bench's parquet                        fullset/TASK/LANG/KEY.png beside KEY_SRCIMG.png
    imgedit     ImgEdit's basic_edit.json, or its turns      KEY.png
    magicbrush  MagicBrush's edit_sessions.json              KEY/KEY_1.png, KEY/KEY_iter_2.png, ...

A row that cannot be used is named, counted and passed over; such a file is a ValueError of one line.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import common
from readers.files import BadFile, RowGroups, bad_name, clean_caption, files_of, one_key_each, printable

GEDIT = ("task_type", "key", "instruction", "instruction_language", "input_image")  # columns of its parquet


def unique(text: str, task: str, used: set[str]) -> str:
    """A file name made of `text`, unlike those `used` before."""
    stem = re.sub(r"[^\w.-]+", "_", text).strip("._-")[:48] or "picture"
    name, n = f"{stem}_{task}", 1
    while name.lower() in used:
        n += 1
        name = f"{stem}-{n}_{task}"
    used.add(name.lower())
    return name


def jsonl_rows(path: Path) -> Iterator[tuple[str, dict | ValueError]]:
    """(place, row) of every line of a JSONL file."""
    if not path.is_file():
        raise ValueError(f"jsonl: {path}: no such file: correct the path")
    for n, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                yield f"{path}:{n}", json.loads(line, object_pairs_hook=one_key_each)
            except (ValueError, RecursionError) as e:
                twice = str(e).startswith("two keys")
                yield f"{path}:{n}", e if twice else ValueError("not JSON in UTF-8")


def kept(rows: Iterable[tuple[str, dict | ValueError]], make: Callable[[dict], dict]) -> tuple[list, int]:
    """make(row) of the rows for which it raises no ValueError; the number of the others, which are named."""
    items, bad = [], 0
    for place, row in rows:
        try:
            if not isinstance(row, dict):
                raise row if isinstance(row, ValueError) else ValueError("not a JSON object")
            items.append(make(row))
        except ValueError as e:
            bad += 1
            common.print0(f"skipped: {place}: {printable(str(e))}")
    return items, bad


def complete_edit(row: dict, layout: str, root: Path, used: set[str], mask: str | None = None, seed: int = 0,
                  instructions: tuple[str, ...] = ()) -> dict:
    """Item of a row; ValueError names the key and what is wrong. mask, seed and instructions fill what the
    row leaves out.

    Keys: image (or source, source_image), a path from `root`, or (pictures.RowGroups, n); instruction,
    instructions (or edit_prompt), one text a turn; mask (or mask_image), a path, "NONE", or a list of one per
    turn; seed; key, task, lang: the result's place in a benchmark's tree; turn: of a single edit of a chain.
    """
    def first(*keys: str) -> object:
        return next((row[key] for key in keys if row.get(key) is not None), None)

    image, regions = first("source", "image", "source_image"), first("mask", "mask_image")
    if not image or not isinstance(image, str | tuple):
        raise ValueError("image: missing: edit needs a picture")
    for what, name in (("image", image), *(("mask", name) for name in (
            regions if isinstance(regions, list) else [regions]))):
        if isinstance(name, str) and name and (problem := bad_name(name)):
            raise ValueError(f"{what}: {problem}: correct it")
    listed = image
    image = str(root / image) if isinstance(image, str) else image
    texts = first("instructions", "instruction", "edit_prompt")
    if texts is None:
        texts = list(instructions)
        if not texts and isinstance(image, str) and (beside := Path(image).with_suffix(".txt")).is_file():
            texts = beside.read_text(errors="replace").strip().splitlines()
        if not texts:
            raise ValueError(f"instruction: missing for {image}: say what to change")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"instruction: {str(texts)[:80]!r}: give a text, or a list of texts")
    texts = [clean_caption(text)[0] for text in texts]
    if not all(texts) or not texts:
        raise ValueError("instruction: empty: say what to change")
    regions = regions if isinstance(regions, list) else [regions] * len(texts)
    if len(regions) != len(texts) or not all(isinstance(one, str | None) for one in regions):
        raise ValueError(f"mask: {str(regions)[:80]}: give a path, or a list of one for each turn")
    regions = [mask if one is None else None if one == "NONE" else str(root / one) for one in regions]
    seed, turn = seed if row.get("seed") is None else row["seed"], row.get("turn")
    for what, number in (("seed", seed), ("turn", turn)):
        if type(number) is not int and (what == "seed" or number is not None):
            raise ValueError(f"{what}: {number!r}: give an integer")
    key, task, lang = (str(row.get(name) or "") for name in ("key", "task", "lang"))
    key = key or (Path(image).stem if isinstance(image, str) else "picture")
    item = dict(name=key, image=image, masks=regions, instructions=texts, seed=seed, key=key, task=task)
    item["files"] = tree(item, layout, lang or "en", turn, used)
    if layout == "gedit":
        item["shown"] = f"{item['files'][-1]}_SRCIMG.png"
    if layout == "imgedit":
        if not isinstance(listed, str):
            raise ValueError("image: inside a parquet: --layout imgedit needs files")
        turns = {"prompt": texts[0]} if len(texts) == 1 else {f"turn{n}": t for n, t in enumerate(texts, 1)}
        item["listed"] = {"id": listed, **turns, "edit_type": task}
    return item


def tree(item: dict, layout: str, lang: str, turn: int | None, used: set[str]) -> list[str]:
    """Where the results of an item's turns go, without suffix; ValueError when two would share a place.

    gedit: fullset/TASK/LANG/KEY beside KEY_SRCIMG; imgedit: KEY. The last turn of a chain has that name.
    magicbrush: KEY/KEY_1, KEY/KEY_iter_2, ...; edit number `turn` of a session made alone: KEY/KEY_inde_TURN.
    """
    key, task, turns = item["key"], item["task"], range(1, len(item["instructions"]) + 1)
    if layout == "flat":
        name = unique(f"{key}_inde_{turn}" if turn else key, "edit", used)
        return [name] if len(turns) == 1 else [f"{name}_turn{n}" for n in turns]
    for what, text in [("key", key)] + [("task", task), ("lang", lang)] * (layout == "gedit"):
        if not re.fullmatch(r"\w[\w .-]{0,99}", text):
            raise ValueError(f"{what}: {text[:80]!r}: --layout {layout} needs a file name")
    if layout == "magicbrush":
        names = [f"{key}/{key}_" + ("1" if n == 1 else f"iter_{n}") for n in turns]
        names = [f"{key}/{key}_inde_{turn}"] if turn else names
    else:
        name = f"fullset/{task}/{lang}/{key}" if layout == "gedit" else key
        names = [f"{name}_turn{n}" for n in turns[:-1]] + [name]
    if names[-1].lower() in used:
        raise ValueError(f"key: {key!r}: a second time: every edit needs its own")
    used.add(names[-1].lower())
    return names


def gedit_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, row) of GEdit-Bench's parquet, a file or a folder of them; pictures are read when needed."""
    def columns(file: str, kinds: Iterable[str]) -> list[str]:
        if missing := [name for name in GEDIT if name not in kinds]:
            raise BadFile(file, f"no column {', '.join(missing)} among {', '.join(kinds)}",
                                   "give GEdit-Bench's parquet")
        return ["input_image"]

    files, _ = files_of(path, "all", ".parquet") if path.exists() else ([], "all")
    if not files:
        raise ValueError(f"jsonl: {path}: no parquet there: correct the path")
    groups = RowGroups(files, columns)
    for n, (place, cells) in enumerate(groups.light(lambda names: list(GEDIT[:-1]))):
        task, key, text, lang = cells
        yield place, {"image": (groups, n), "task": task, "key": key, "lang": lang, "instruction": text or ""}


def json_rows(path: Path, root: Path | None) -> tuple[str, Path, list[tuple[str, dict | ValueError]]]:
    """-> layout, folder of the pictures, (place, row)s of ImgEdit's basic_edit.json or its multi-turn files,
    or of MagicBrush's edit_sessions.json: each session as a chain, and its further edits alone, too."""
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=one_key_each)
    except OSError as e:
        raise ValueError(f"jsonl: {path}: {e.strerror}: correct the path") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not content:
        raise ValueError(f"jsonl: {path}: not a JSON object: give ImgEdit's basic_edit.json, MagicBrush's "
                         "edit_sessions.json, or lines in a .jsonl file")
    if not isinstance(next(iter(content.values())), list):
        rows = []
        for key, entry in content.items():
            if isinstance(entry, dict):
                turns = sorted(name for name in entry if name.startswith("turn"))
                texts = entry.get("prompt") or [entry[turn] for turn in turns]
                entry = {"image": entry.get("id"), "instruction": texts, "key": key,
                         "task": entry.get("edit_type")}
            rows.append((f"{path}: {key}", entry))
        return "imgedit", root or path.parent, rows
    rows = []
    for key, session in content.items():
        if not isinstance(session, list) or not session or not all(
                isinstance(e, dict) and isinstance(e.get("input"), str) for e in session):
            rows.append((f"{path}: {key}", ValueError("not a list of {input, instruction}")))
            continue
        edits = [{"image": f"{e['input'].split('-')[0]}/{e['input']}", "key": key,
                  "instruction": e.get("instruction") or ""} for e in session]
        chain = edits[0] | {"instruction": [e["instruction"] for e in edits]}
        alone = [e | {"turn": turn} for turn, e in enumerate(edits[1:], 2)]
        rows += [(f"{path}: {key}", row) for row in (chain, *alone)]
    return "magicbrush", root or path.parent / "images", rows
