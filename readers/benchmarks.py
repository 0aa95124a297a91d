"""The files that benchmarks of edits are published in, and the trees that their scorers read.

    magicbrush  edit_sessions.json, images/, *_descriptions.json    ID/ID_1.png, ID_inde_2.png, ID_iter_2.png
    emu         Emu Edit's parquet                                  IDX.png (ours: it has no published tree)
    pie         PIE-Bench's mapping_file.json, annotation_images/   annotation_images/IMAGE_PATH
    editbench   annotations_*.csv, references_*/, masks_*/          natural/AOS.png, generated/AOS.png (ours)
    omniedit    prompts.jsonl, pictures/ (ours: not released)       TASK/NAME.png
    gedit       GEdit-Bench: save_to_disk's Arrow, or parquet       fullset/TASK/LANG/KEY.png, KEY_SRCIMG.png
    imgedit     basic_edit.json or singleturn.json                  KEY.png
    userbench   TASK/prompts.jsonl, pictures/, masks/ (ours: ByteEdit's is private)          TASK/NAME.png

`sample.py edit` makes items of the rows of some of them (sections 1, 2): one that cannot be used is named,
counted and passed over. `evaluate.py bench` scores all of them: readers/bench.py has their rows.

    1. rows become items     2. files of benchmarks
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

import common
from readers.files import (
    CACHE_BYTES,
    BadFile,
    RowGroups,
    bad_name,
    clean_caption,
    files_of,
    one_key_each,
    printable,
)

#### 1. rows become items ####################################################################################


def unique(text: str, task: str, used: set[str]) -> str:
    """A file name made of `text`, unlike those `used` before."""
    stem = re.sub(r"[^\w.-]+", "_", text).strip("._-")[:48] or "picture"
    name, n = f"{stem}_{task}", 1
    while name.lower() in used:
        n += 1
        name = f"{stem}-{n}_{task}"
    used.add(name.lower())
    return name


def is_name(text: object) -> bool:
    """Whether a key or a task of a benchmark can be the name of a file or folder."""
    return isinstance(text, str) and bool(re.fullmatch(r"\w[\w .-]{0,99}", text))


def to_the_letter(text: str) -> str:
    """A benchmark's prompt as it is published, with spaces at its ends (2 of ImgEdit's 737 have some), which
    `clean_caption` takes away. Control characters, halves of characters and too long a text it cleans."""
    cleaned, cut = clean_caption(text)
    return text if cleaned and not cut and " ".join(text.split()) == cleaned else cleaned


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
    turn; seed; key, task, lang: the result's place in a benchmark's tree; turn: of a single edit of a chain;
    letter: the texts are a benchmark's, and stay as they are.
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
    texts = [to_the_letter(text) if row.get("letter") else clean_caption(text)[0] for text in texts]
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
    if layout == "pie":
        item["suffix"] = ".jpg"
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

    gedit: fullset/TASK/LANG/KEY beside KEY_SRCIMG; imgedit, emu: KEY; pie: annotation_images/KEY, whose KEY
    is a path. The last turn of a chain has that name.
    magicbrush: KEY/KEY_1, KEY/KEY_iter_2, ...; edit number `turn` of a session made alone: KEY/KEY_inde_TURN.
    """
    key, task, turns = item["key"], item["task"], range(1, len(item["instructions"]) + 1)
    if layout == "flat":
        name = unique(f"{key}_inde_{turn}" if turn else key, "edit", used)
        return [name] if len(turns) == 1 else [f"{name}_turn{n}" for n in turns]
    parts = [("key", part) for part in (key.split("/") if layout == "pie" else [key])]
    for what, text in parts + [("task", task), ("lang", lang)] * (layout == "gedit"):
        if not is_name(text):
            raise ValueError(f"{what}: {text[:80]!r}: --layout {layout} needs a file name")
    if layout == "magicbrush":
        names = [f"{key}/{key}_" + ("1" if n == 1 else f"iter_{n}") for n in turns]
        names = [f"{key}/{key}_inde_{turn}"] if turn else names
    else:
        name = {"gedit": f"fullset/{task}/{lang}/{key}", "pie": f"annotation_images/{key}"}.get(layout, key)
        names = [f"{name}_turn{n}" for n in turns[:-1]] + [name]
    if names[-1].lower() in used:
        raise ValueError(f"key: {key!r}: a second time: every edit needs its own")
    used.add(names[-1].lower())
    return names


#### 2. files of benchmarks ##################################################################################

GEDIT = ("task_type", "key", "instruction", "instruction_language", "input_image")  # columns of its table
EMU = ("idx", "task", "instruction", "input_caption", "output_caption", "image")
EMU_ROWS = 3589  # of the test split
PIE_TYPES = ("random", "change object", "add object", "delete object", "change content", "change pose",
             "change colour", "change material", "change background", "change style")  # by editing_type_id
Rows = Iterable[tuple[str, dict | ValueError]]  # (place, row)


class ArrowRows:
    """Rows of Arrow files, which datasets.save_to_disk writes, with what is used here of files.RowGroups: the
    files are mapped into memory, and nothing of them is read before it is asked for."""

    def __init__(self, files: Iterable[Path], choose: Callable[[str, dict], list[str]]):
        self.files = [str(file) for file in files]
        self.tables = [read_arrow(file) for file in self.files]
        self.columns = [choose(file, {f.name: str(f.type) for f in table.schema})
                        for file, table in zip(self.files, self.tables)]
        self.first = np.concatenate([[0], np.cumsum([len(t) for t in self.tables])]).astype(np.int64)

    def row(self, n: int) -> tuple[str, str, list]:
        """-> (file, name for messages, cells of the chosen columns)."""
        k = int(np.searchsorted(self.first, n, "right")) - 1
        at = int(n - self.first[k])
        return (self.files[k], f"{self.files[k]} row {at}",
                [self.tables[k][c][at].as_py() for c in self.columns[k]])

    def light(self, choose: Callable[[list[str]], list[str]]) -> Iterator[tuple[str, list]]:
        """(name for messages, cells) of small columns of every row."""
        for file, table in zip(self.files, self.tables):
            lists = [table[c].to_pylist() for c in choose(table.schema.names)]
            yield from ((f"{file} row {n}", list(cells)) for n, cells in enumerate(zip(*lists)))


def read_arrow(file: str):
    """A file of Arrow's, a stream or not -> pyarrow Table, mapped into memory; BadFile."""
    import pyarrow as pa

    try:
        source, batches, size = pa.memory_map(file), [], 0
        whole = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pa.ipc.open_file(source) if whole else pa.ipc.open_stream(source)
        for batch in (map(reader.get_batch, range(reader.num_record_batches)) if whole else reader):
            batch.validate(full=True)  # offsets that lie would be read outside of the file
            batches, size = [*batches, batch], size + batch.nbytes
            if size > 4 * os.path.getsize(file) + CACHE_BYTES:  # compressed, which save_to_disk does not do
                raise ValueError(f"becomes more than {size:,} bytes")
        return pa.Table.from_batches(batches, reader.schema)
    except Exception as e:  # ArrowInvalid, OSError
        problem = f"not an Arrow file, or damaged ({printable(str(e))[:80]})"
        raise BadFile(file, problem, "download it again") from None


def table_files(path: Path) -> dict[str, list[Path]]:
    """Parquet or Arrow files, one or a folder of them -> {split: its files}; ValueError if there are none, or
    if one of a split is missing. A split is what a parquet's name begins with, or an Arrow file's folder."""
    files = []
    for suffix in (".parquet", ".arrow"):
        files = files or files_of(path, "all", suffix)[0] if path.exists() else []
    files = [f for f in files if not f.name.startswith("cache-")]  # what datasets keeps of a map()
    if not files:
        raise ValueError(f"jsonl: {path}: no parquet or Arrow file there: correct the path")
    splits = {}
    for file in files:
        split = file.parent.name if file.suffix == ".arrow" else re.split("[-.]", file.name)[0]
        splits.setdefault(split, []).append(file)
    for split, files in splits.items():
        numbered = [m for f in files if (m := re.search(r"-(\d+)-of-(\d+)\.", f.name))]
        total = int(numbered[0][2]) if numbered and path.is_dir() else 0
        if (have := len({m[1] for m in numbered})) < total:
            raise ValueError(f"jsonl: {path}: {have} of the {total} files of {split}: complete the download")
    return splits


def open_table(files: list[Path], needed: tuple[str, ...]) -> RowGroups | ArrowRows:
    """Files of a benchmark's table; rows are read when they are needed. The last of the `needed` columns
    is the picture."""
    def columns(file: str, kinds: Iterable[str]) -> list[str]:
        if missing := [name for name in needed if name not in kinds]:
            whose = "Emu Edit's" if needed is EMU else "GEdit-Bench's"
            raise BadFile(file, f"no column {', '.join(missing)} among {', '.join(kinds)}",
                          f"give {whose} parquet or Arrow folder")
        return [needed[-1]]

    return (RowGroups if files[0].suffix != ".arrow" else ArrowRows)(files, columns)


def emu_files(splits: dict[str, list[Path]], partial: bool) -> tuple[str, list[Path]]:
    """-> name and files of Emu Edit's test split: the one with 3,589 rows. The set of its generations has the
    names swapped, `validation` there is the test. partial: one split of another length is taken, too."""
    counts = {split: int(open_table(files, EMU).first[-1]) for split, files in splits.items()}
    right = [split for split, n in counts.items() if n == EMU_ROWS]
    found = right or (list(counts) if partial and len(counts) == 1 else [])
    if len(found) != 1:
        there = ", ".join(f"{split} {n:,}" for split, n in counts.items())
        where = next(iter(splits.values()))[0].parent
        raise ValueError(f"jsonl: {where}: no split of {EMU_ROWS:,} rows, Emu Edit's test split, among "
                         f"{there}: give it, or the file of one split")
    return found[0], splits[found[0]]


def emu_keys(idx: list) -> list[str]:
    """Names of results: the column idx, or the row's number where that names some twice."""
    keys = [str(x) for x in idx]
    unlike = len(set(keys)) == len(keys) and all(map(is_name, keys))
    return keys if unlike else [f"{n:05d}" for n in range(len(keys))]


def table_rows(path: Path) -> tuple[str, Rows]:
    """-> layout and rows of GEdit-Bench's or Emu Edit's table; pictures are read when needed."""
    splits = table_files(path)
    first = next(iter(splits.values()))[0]
    names = open_names(first)
    if {"input_caption", "output_caption"} <= set(names):
        split, files = emu_files(splits, True)
        if split != "test":
            common.print0(f"note: {printable(str(path))}: Emu Edit's test rows are its split {split}")
        groups = open_table(files, EMU)
        rows = list(groups.light(lambda names: list(EMU[:3])))
        keys = emu_keys([cells[0] for _, cells in rows])
        return "emu", [(place, {"image": (groups, n), "key": keys[n], "task": task, "letter": True,
                                "instruction": text or ""})
                       for n, (place, (_, task, text)) in enumerate(rows)]
    groups = open_table([f for files in splits.values() for f in files], GEDIT)
    rows = groups.light(lambda names: list(GEDIT[:-1]))
    return "gedit", ((place, {"image": (groups, n), "task": task, "key": key, "lang": lang,
                              "instruction": text or "", "letter": True})
                     for n, (place, (task, key, text, lang)) in enumerate(rows))


def open_names(file: Path) -> list[str]:
    """Names of the columns of a parquet or Arrow file."""
    if file.suffix == ".arrow":
        return read_arrow(str(file)).schema.names
    found = []
    RowGroups([file], lambda file, kinds: found.extend(kinds) or [])
    return found


def read_json(path: Path, what: str) -> dict:
    """A JSON object with something in it; ValueError names the file and `what` it should be."""
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=one_key_each)
    except OSError as e:
        raise ValueError(f"jsonl: {path}: {e.strerror}: correct the path") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not content:
        raise ValueError(f"jsonl: {path}: not a JSON object: give {what}")
    return content


def json_rows(path: Path, root: Path | None) -> tuple[str, Path, list[tuple[str, dict | ValueError]]]:
    """-> layout, folder of the pictures, (place, row)s of ImgEdit's basic_edit.json or its multi-turn files,
    of PIE-Bench's mapping_file.json, or of MagicBrush's edit_sessions.json: each session as a chain, and its
    further edits alone, too."""
    content = read_json(path, "ImgEdit's basic_edit.json, PIE-Bench's mapping_file.json, MagicBrush's "
                              "edit_sessions.json, or lines in a .jsonl file")
    first, rows = next(iter(content.values())), []
    if isinstance(first, list):
        for key, session in content.items():
            try:
                folder, edits = session_of(session)
            except ValueError as e:
                rows.append((f"{path}: {key}", e))
                continue
            each = [{"image": f"{folder}/{e['input']}", "key": folder, "letter": True,
                     "instruction": e["instruction"]} for e in edits]
            chain = each[0] | {"instruction": [e["instruction"] for e in each]}
            alone = [e | {"turn": turn} for turn, e in enumerate(each[1:], 2)]
            rows += [(f"{path}: {key}", row) for row in (chain, *alone)]
        return "magicbrush", root or path.parent / "images", rows
    if isinstance(first, dict) and "image_path" in first:
        for key, entry in content.items():
            try:
                entry = pie_entry(entry)
                entry = {"image": f"annotation_images/{entry['image_path']}", "letter": True,
                         "key": os.path.splitext(entry["image_path"])[0], "task": entry["type"],
                         "instruction": entry["editing_instruction"]}
            except ValueError as e:
                entry = e
            rows.append((f"{path}: {key}", entry))
        return "pie", root or path.parent, rows
    for key, entry in content.items():
        if isinstance(entry, dict):
            turns = sorted(name for name in entry if name.startswith("turn"))
            texts = entry.get("prompt") or [entry[turn] for turn in turns]
            entry = {"image": entry.get("id"), "instruction": texts, "key": key, "letter": True,
                     "task": entry.get("edit_type")}
        rows.append((f"{path}: {key}", entry))
    return "imgedit", root or path.parent, rows


def session_of(session: object) -> tuple[str, list[dict]]:
    """A session of MagicBrush's -> its folder and its edits in turn order; ValueError. The folder is what
    stands before "-" in the name of an input, as the published script has it, not the key."""
    if not isinstance(session, list) or not session or not all(
            isinstance(e, dict) and isinstance(e.get("input"), str) for e in session):
        raise ValueError("not a list of {input, instruction}")
    folders = {e["input"].split("-")[0] for e in session}
    if len(folders) > 1 or not is_name(min(folders)):
        raise ValueError(f"input: {', '.join(sorted(folders))[:80]!r}: is no folder's name before -")
    return min(folders), [e | {"instruction": e.get("instruction") or ""} for e in session]


def pie_entry(entry: object) -> dict:
    """An entry of mapping_file.json, with its type in words; ValueError names what it lacks."""
    if not isinstance(entry, dict):
        raise ValueError("not a JSON object")
    for name in ("image_path", "original_prompt", "editing_prompt", "editing_instruction"):
        if not isinstance(entry.get(name), str):
            raise ValueError(f"{name}: missing")
    if not all(map(is_name, entry["image_path"].split("/"))):
        raise ValueError(f"image_path: {entry['image_path'][:80]!r}: is no path below annotation_images")
    if str(entry.get("editing_type_id")) not in map(str, range(len(PIE_TYPES))):
        raise ValueError(f"editing_type_id: {str(entry.get('editing_type_id'))[:20]!r}: is none of 0 to 9")
    return entry | {"type": PIE_TYPES[int(entry["editing_type_id"])]}


def pie_mask(code: object, h: int = 512, w: int = 512, border: bool = False) -> np.ndarray:
    """PIE-Bench's code of a mask -> float32 [h, w], 1 = edit: start, length, start, length, ..., row by row,
    from 0; what is past the end is cut, as their decoder does. ValueError on all else.

    border: as their metrics have it, the outermost pixels are 1. An inpainting model would repaint them."""
    if not isinstance(code, list) or not all(type(x) is int and x >= 0 for x in code):
        raise ValueError("mask: not a list of whole numbers: start, length, start, length, ...")
    if len(code) % 2:
        raise ValueError(f"mask: {len(code)} numbers: a start without its length")
    m = np.zeros(h * w, np.float32)
    for start, length in zip(code[::2], code[1::2]):
        m[start:start + length] = 1
    m = m.reshape(h, w)
    if border:
        m[0], m[-1], m[:, 0], m[:, -1] = 1, 1, 1, 1
    return m
