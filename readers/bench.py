"""Benchmarks of edits as rows to be scored: what is asked, what it is compared with, where it counts.

    bench = open_bench("magicbrush", "dev")           # SystemExit unless the folder is as it was published
    for row in bench.rows: picture(row.source), ...   # the result's place in the tree of results: row.key

readers/benchmarks.py has the layouts. A set that lacks a file or a row is refused: means over other rows are
not the benchmark's. Numbers of rows are those of what is published, of UserBench and OmniEdit-Bench of the
papers.

    1. rows     2. the readers     3. judges' replies, and how rows become a number
    4. what a run leaves on disk     5. tables
"""

import csv
import io
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch.distributed as td
from PIL import Image, PngImagePlugin

import common
import log
from masks import ERASE_PROMPT
from readers import served
from readers.benchmarks import (
    EMU,
    EMU_ROWS,
    GEDIT,
    emu_files,
    emu_keys,
    is_name,
    jsonl_rows,
    open_table,
    pie_entry,
    pie_mask,
    read_json,
    session_of,
    table_files,
    to_the_letter,
)
from readers.edits import TASK_NAMES, TASKS
from readers.files import (
    BadFile,
    bad_name,
    hashed,
    image_size,
    inside,
    json_lines,
    photo_of,
    picture_cell,
    printable,
    read_image,
    read_mask,
)

#### 1. rows ################################################################################################

# What is published: of MagicBrush turns, of the others rows; UserBench's of each task
MAGICBRUSH_TURNS, GEDIT_ROWS, IMGEDIT_ROWS = {1053: "test", 528: "dev"}, 1212, 737
# of ByteEdit's Table 2 the CLIPScore is on the scale of clip_cosine; its BLIPScore may be either of the two
TEXT_METRICS = ("clip_cosine", "clip_t", "blip_itc", "blip_itm", "image_reward", "pick_score", "hps_v2")
RATIOS = ((1, 1), (2, 3), (3, 2), (3, 4), (4, 3), (9, 16), (16, 9))  # of OmniEdit-Bench, width : height
PIE_ROWS, EDITBENCH_ROWS, OMNIEDIT_PICTURES, USERBENCH_ROWS = 700, 240, 62, 100


@dataclass
class Row:
    """One result that a benchmark asks for."""

    key: str  # its place in the tree of results, without suffix
    source: object = None  # a path, or (RowGroups or ArrowRows, n); None: the result of the row `after`
    instruction: str = ""  # for an editor that follows instructions
    prompt: str | None = None  # for one that fills holes: what is to be seen
    source_text: str | None = None  # captions, for metrics
    target_text: str | None = None
    target: object = None  # the true result, where there is one
    mask: object = None  # a path, or PIE-Bench's code
    group: str = ""  # task or type
    tables: tuple[str, ...] = ("all",)  # in which it counts
    after: str = ""  # key of the row whose result is edited further
    place: int = 0  # in the benchmark: what its noise comes from
    copy: str = ""  # where the tree wants the source, too


@dataclass
class Benchmark:
    """Rows and how they are scored."""

    name: str
    split: str  # what was read, in words, for the table
    rows: list[Row]
    published: int  # rows of the published set
    metrics: tuple[str, ...]  # of measures.py, that its tables have
    judge: str = ""  # whose form its judged scores have: omniedit, gedit or imgedit
    suffix: str = ".png"  # of the results in its tree
    alpha: str | None = None  # of its masks, as for read_mask
    aggregation: str = ""  # how its published number comes about
    notes: list[str] = field(default_factory=list)
    listed: dict = field(default_factory=dict)  # ImgEdit's own entries, which its scorer reads
    prompts: dict = field(default_factory=dict)  # ImgEdit's judge_prompt.json


def picture(cell: object, alpha: bool = False) -> np.ndarray:
    """A Row's source or target -> uint8 [h, w, 3], with `alpha` perhaps [h, w, 4]."""
    if isinstance(cell, str):
        return read_image(cell, alpha=alpha)
    groups, n = cell
    file, name, (value,) = groups.row(n)
    return read_image(picture_cell(value, file, name), name, alpha=alpha)


def mask_of(bench: Benchmark, row: Row, h: int, w: int, border: bool = False) -> np.ndarray | None:
    """A row's mask -> float32 [h, w], 1 = may change, None without one. border: PIE-Bench's, for metrics."""
    if row.mask is None:
        return None
    if isinstance(row.mask, str):
        photo = photo_of(row.source) if isinstance(row.source, str) else (1, (h, w))
        mask = read_mask(row.mask, h, w, alpha=bench.alpha, photo=photo)
        return 1 - mask if bench.name == "editbench" and "black = edit" in bench.split else mask
    return pie_mask(row.mask, h, w, border)


def result_of(folder: Path, key: str) -> Path | None:
    """The picture of a row in a tree of results: .png or .jpg, as the scorers take them."""
    names = (folder / f"{key}{suffix}" for suffix in (".png", ".jpg", ".jpeg"))
    return next((path for path in names if path.is_file()), None)


#### 2. the readers ##########################################################################################


def open_bench(name: str, path: str, partial: bool = False, captions: str = "local",
               column: str = "prompt_full", language: str = "", pictures: str = "") -> Benchmark:
    """A benchmark's published folder -> Benchmark; SystemExit of one line for all that is not as published.

    partial: fewer or more rows than published are taken, and the table says so. captions: MagicBrush's local
    or global ones. column: EditBench's prompt. language: GEdit-Bench's en or cn, "" both. pictures: ImgEdit's
    folder of them, if not beside the file."""
    root = Path(path)
    if not root.exists():
        raise SystemExit(f"error: --data: {path}: no such file or folder: correct the path")
    try:
        bench = {"magicbrush": lambda: magicbrush(root, captions), "emu": lambda: emu(root, partial),
                 "pie": lambda: pie(root), "editbench": lambda: editbench(root, column),
                 "omniedit": lambda: omniedit(root), "gedit": lambda: gedit(root, language),
                 "imgedit": lambda: imgedit(root, pictures), "userbench": lambda: userbench(root)}[name]()
    except ValueError as e:
        raise SystemExit(f"error: --data: {printable(str(e)).removeprefix('jsonl: ')}") from None
    if twice := [key for key, n in Counter(r.key.lower() for r in bench.rows).items() if n > 1]:
        raise SystemExit(f"error: --data: {path}: {twice[0]}: {len(twice)} key(s) a second time: every row "
                         "needs its own")
    for place, row in enumerate(bench.rows):
        row.place = place
    counted = sum(not r.after for r in bench.rows) if name == "magicbrush" else len(bench.rows)
    if counted != bench.published:
        if not partial:
            raise SystemExit(f"error: --data: {path}: {counted:,} rows, the published set has "
                             f"{bench.published:,}: give all of it, or --partial True, and the table says so")
        bench.split += f", PARTIAL: {counted:,} of {bench.published:,} rows"
    return bench


def there(root: Path, name: str, place: str) -> str:
    """Path of a file below `root`; BadFile if it is not there or leaves it."""
    path = inside(str(root), name, place)
    if not os.path.isfile(path):
        raise BadFile(f"--data: {place}: {name}", f"no such file in {root}", "complete the download")
    return path


def magicbrush(root: Path, captions: str) -> Benchmark:
    """all_turn: every turn from its true input, which papers call single-turn; final_turn: the last turn of a
    session from our own results, their multi-turn. Always against the true target."""
    file, rows = root / "edit_sessions.json", []
    content = read_json(file, "MagicBrush's edit_sessions.json")
    names = (root / f"{captions}_description{s}.json" for s in ("s", ""))  # its scorer's default lacks the s
    listed = next((path for path in names if path.is_file()), root / f"{captions}_descriptions.json")
    said = read_json(listed, f"MagicBrush's {captions}_descriptions.json")
    for key, session in content.items():
        place = f"{file}: {key}"
        try:
            folder, edits = session_of(session)
        except ValueError as e:
            raise ValueError(f"{place}: {e}: download it again") from None
        texts = said.get(folder, said.get(key))  # the scorer looks captions up by the folder
        texts = texts if isinstance(texts, dict) else {}
        for n, e in enumerate(edits, 1):
            names = [e.get(what) for what in ("input", "output", "mask")]
            if not all(isinstance(x, str) and x for x in (*names, e["instruction"])):
                raise ValueError(f"{place}: turn {n}: input, output, mask or instruction is missing: "
                                 "download the split that has them")
            source, target, mask = (there(root / "images", f"{folder}/{x}", place) for x in names)
            text = texts.get(names[1])
            if not isinstance(text, str):
                raise ValueError(f"{place}: {listed.name} has no {names[1]}: download it again")
            one = dict(instruction=to_the_letter(e["instruction"]), prompt=text, target_text=text,
                       source_text=texts.get(names[0]), target=target, mask=mask)
            last = ("final_turn",) if n == len(edits) else ()
            if n == 1:
                rows.append(Row(f"{folder}/{folder}_1", source, tables=("all_turn", *last), **one))
                continue
            rows.append(Row(f"{folder}/{folder}_inde_{n}", source, tables=("all_turn",), **one))
            before = f"{folder}/{folder}_" + ("1" if n == 2 else f"iter_{n - 1}")
            rows.append(Row(f"{folder}/{folder}_iter_{n}", None, tables=last, after=before, **one))
    turns = sum(not r.after for r in rows)
    split = MAGICBRUSH_TURNS.get(turns)
    told = f"{split or 'unknown split'}, {len(content):,} sessions, {captions} descriptions"
    return Benchmark("magicbrush", told, rows, turns if split else max(MAGICBRUSH_TURNS),
                     ("l1", "l2", "clip_i", "dino", "clip_t"), alpha="hole",
                     aggregation="mean over pairs; all_turn is the papers' single-turn, final_turn their "
                     "multi-turn; L2 without a root")


def emu(root: Path, partial: bool) -> Benchmark:
    """Compared with the source, as UltraEdit and its followers do: there is no true result."""
    split, files = emu_files(table_files(root), partial)
    groups, rows = open_table(files, EMU), []
    listed = list(groups.light(lambda names: list(EMU[:-1])))
    keys = emu_keys([cells[0] for _, cells in listed])
    for n, (place, (_, task, *texts)) in enumerate(listed):
        if not isinstance(texts[0], str) or not texts[0].strip():
            raise ValueError(f"{place}: its instruction is missing: download it again")
        before, after = (x if isinstance(x, str) and x.strip() else None for x in texts[1:])
        rows.append(Row(keys[n], (groups, n), to_the_letter(texts[0]), source_text=before, target_text=after,
                        group=str(task)))
    if not rows:
        raise ValueError(f"{root}: no rows: download it again")
    equal = sum(r.source_text == r.target_text for r in rows)
    bench = Benchmark("emu", f"split {split}", rows, EMU_ROWS,
                      ("clip_dir", "clip_i_source", "clip_out", "l1_source", "dino_source"),
                      aggregation="mean over rows; clip_dir of rows with equal captions is not defined, and "
                      "counted as 0 in clip_dir_or_0")
    if split != "test":
        bench.notes.append(f"its test rows are in the split called {split}: the set of generations has the "
                           "names swapped")
    if keys[0] != str(listed[0][1][0]):
        bench.notes.append("idx is not one name each: results are named by their rows, 00000 and so on")
    if equal:
        bench.notes.append(f"{equal:,} rows with equal captions")
    return bench


def pie(root: Path) -> Benchmark:
    root = root if (root / "mapping_file.json").is_file() else root / "data"
    file, rows, cut = root / "mapping_file.json", [], 0
    for key, entry in read_json(file, "PIE-Bench's mapping_file.json").items():
        place = f"{file}: {key}"
        try:
            entry = pie_entry(entry)
            source = there(root / "annotation_images", entry["image_path"], place)
            h, w = image_size(source)
            pie_mask(entry.get("mask"), h, w)
        except ValueError as e:
            raise ValueError(f"{place}: {e}: download it again") from None
        cut += any(start + n > h * w for start, n in zip(entry["mask"][::2], entry["mask"][1::2]))
        before, after = (re.sub(r"[\[\]]", "", entry[k]) for k in ("original_prompt", "editing_prompt"))
        rows.append(Row("annotation_images/" + os.path.splitext(entry["image_path"])[0], source,
                        to_the_letter(entry["editing_instruction"]), after, before, after, mask=entry["mask"],
                        group=entry["type"]))
    notes = [f"{cut:,} masks go past the end of their picture, and are cut there"] * bool(cut)
    return Benchmark("pie", "all", rows, PIE_ROWS,
                     ("structure", "psnr_unedited", "lpips_unedited", "l2_unedited", "ssim_unedited",
                      "clip_score", "clip_edited"), suffix=".jpg", notes=notes,
                     aggregation="mean over pictures; a picture without an unedited part has no score "
                     "there; results are PNG files under the .jpg names that its scorer wants")


def editbench(root: Path, column: str) -> Benchmark:
    """Which of its masks' colours is the edit is not published: it is told by the classes of their areas."""
    rows, areas = [], []
    for kind in ("natural", "generated"):
        file = root / f"annotations_{kind}.csv"
        try:
            with open(file, newline="", encoding="utf-8-sig") as f:
                table = list(csv.DictReader(f))
        except OSError as e:
            raise ValueError(f"{file}: {e.strerror}: complete the download") from None
        except (ValueError, csv.Error) as e:
            problem = f"no CSV in UTF-8 ({printable(str(e))[:60]})"
            raise ValueError(f"{file}: {problem}: download it again") from None
        if not table or not {"aos", column} <= table[0].keys():
            raise ValueError(f"{file}: no column aos or {column}: give EditBench's, or another --column")
        for n, line in enumerate(table, 2):
            name, text = line["aos"], line[column]
            if not name or not text or bad_name(name) or "/" in name or name.startswith("."):
                raise ValueError(f"{file}: line {n}: no aos or {column}: download it again")
            source, mask = (there(root / f"{what}_{kind}", f"{name}.png", f"{file}: line {n}")
                            for what in ("references", "masks"))
            rows.append(Row(f"{kind}/{name}", source, prompt=to_the_letter(text), target_text=text, mask=mask,
                            group=kind))
            areas.append(float(read_mask(mask, *image_size(source), photo=photo_of(source)).mean()))
    polarity, classes = mask_polarity(areas, root)
    return Benchmark("editbench", f"natural and generated, {column}, {polarity}", rows, EDITBENCH_ROWS,
                     TEXT_METRICS,
                     aggregation="mean over pictures", notes=[f"masks: {polarity}: {classes}"])


def mask_polarity(areas: list[float], where: object) -> tuple[str, str]:
    """White shares of EditBench's masks -> which colour is the edit, and how many are in each class of areas:
    small from 5.7 %, medium from 21.5 %, large from 36.9 %. ValueError if neither fits: one in twenty may be
    outside, and the median must be below a half."""
    for polarity, found in (("white = edit", areas), ("black = edit", [1 - a for a in areas])):
        below = sum(a < 0.057 for a in found)
        if found and np.median(found) < 0.5 and below <= len(found) / 20:
            counts = np.histogram(found, (0.057, 0.215, 0.369, 1.01))[0]
            return polarity, "{} small, {} medium, {} large, {} below".format(*counts, below)
    raise ValueError(f"{where}: masks: {100 * np.median(areas):.0f} % are white in the median: neither white "
                     "nor black has areas of EditBench's classes: download them again")


def jsonl_of(path: Path, needed: tuple[str, ...]) -> list[tuple[str, dict]]:
    """(place, row)s of a JSONL file whose rows all have the `needed` texts."""
    found = []
    for place, row in jsonl_rows(path):
        if not isinstance(row, dict):
            problem = row if isinstance(row, ValueError) else "not a JSON object"
            raise ValueError(f"{place}: {problem}: correct it")
        if lacks := [name for name in needed if not isinstance(row.get(name), str)]:
            raise ValueError(f"{place}: no text {', '.join(lacks)}: add it")
        found.append((place, row))
    if not found:
        raise ValueError(f"{path}: no rows: add them")
    return found


def omniedit(root: Path) -> Benchmark:
    """OmniEdit-Bench's form (Sec. 5): 62 pictures of seven ratios, each with one edit of each of the seven
    tasks. It is not released: prompts.jsonl has lines of picture (a name in pictures/), task, instruction
    (default ours)."""
    rows, asked, ratios = [], Counter(), {}
    for place, row in jsonl_of(root / "prompts.jsonl", ("picture", "task", "instruction")):
        task = TASK_NAMES.get(row["task"].lower())
        if task is None or not row["instruction"].strip() or not is_name(row["picture"]):
            raise ValueError(f"{place}: task: {row['task'][:40]!r}: is none of {', '.join(TASKS)}, or the "
                             "picture is no file's name, or the instruction is empty")
        source = there(root / "pictures", row["picture"], place)
        asked[row["picture"]] += 1
        h, w = image_size(source)
        ratios[row["picture"]] = min(RATIOS, key=lambda r: abs(math.log(w * r[1] / (h * r[0]))))
        rows.append(Row(f"{task}/{os.path.splitext(row['picture'])[0]}", source,
                        to_the_letter(row["instruction"]), group=task))
    if odd := [name for name, n in asked.items() if n != len(TASKS)]:
        raise ValueError(f"{root}: {odd[0]}: {asked[odd[0]]} edits, its form has one of each of the "
                         f"{len(TASKS)} tasks: add or remove rows")
    shares = ", ".join(f"{w}:{h} {n}" for (w, h), n in sorted(Counter(ratios.values()).items()))
    return Benchmark("omniedit", "its form, pictures of ours", rows, OMNIEDIT_PICTURES * len(TASKS),
                     ("l1_source",),
                     "omniedit", notes=[f"pictures by their nearest ratio: {shares}"],
                     aggregation="O = sqrt(min(SC) PQ) per row, then the mean; accuracy: share of rows with "
                     "SC = 10 (the paper's is people's, the share of SC = 1 in {0, .5, 1})")


def gedit(root: Path, language: str) -> Benchmark:
    """A source is `input_image`; `key` and folder names as written."""
    columns = (*GEDIT[:-1], "Intersection_exist", GEDIT[-1])
    groups = open_table([f for files in table_files(root).values() for f in files], columns)
    rows = []
    for n, (place, cells) in enumerate(groups.light(lambda names: list(columns[:-1]))):
        task, key, text, lang, both = cells
        if not all(map(is_name, (task, key, lang))) or not isinstance(text, str) or not text.strip():
            raise ValueError(f"{place}: task_type, key, instruction or instruction_language is missing: "
                             "download it again")
        name = f"fullset/{task}/{lang}/{key}"
        if language in ("", lang):
            rows.append(Row(name, (groups, n), to_the_letter(text), group=task, copy=f"{name}_SRCIMG.png",
                            tables=(lang, *[f"{lang}, intersection"] * bool(both))))
    if not rows:
        raise ValueError(f"{root}: no row of the language {language}: the data say en and cn")
    return Benchmark("gedit", language or "en and cn", rows, GEDIT_ROWS // 2 if language else GEDIT_ROWS,
                     ("l1_source",), "gedit",
                     aggregation="O = sqrt(min(SC) min(PQ)) per row; G_: the unweighted mean of the groups' "
                     "means; languages and the intersection apart")


def imgedit(root: Path, pictures: str) -> Benchmark:
    names = ("basic_edit.json", "singleturn.json", "singleturn/singleturn.json")
    found = (root / name for name in names if (root / name).is_file())
    file = root if root.is_file() else next(found, root / names[0])
    folder, rows = Path(pictures) if pictures else file.parent, []
    content = read_json(file, "ImgEdit's basic_edit.json")
    for key, entry in content.items():
        place = f"{file}: {key}"
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) and entry[k].strip()
                                                  for k in ("id", "prompt", "edit_type")) or not is_name(key):
            raise ValueError(f"{place}: id, prompt or edit_type is missing: give the single-turn file")
        rows.append(Row(key, there(folder, entry["id"], place), to_the_letter(entry["prompt"]),
                        group=entry["edit_type"]))
    prompts = file.parent / "judge_prompt.json"
    return Benchmark("imgedit", "basic", rows, IMGEDIT_ROWS, ("l1_source",), "imgedit", listed=content,
                     prompts=read_json(prompts, "ImgEdit's judge_prompt.json") if prompts.is_file() else {},
                     aggregation="mean of a reply's three scores, rounded to 2; mean of each type, rounded "
                     "to 2; Overall: of the types in most published rows, of the items in some")


def userbench(root: Path) -> Benchmark:
    """ByteEdit's UserBench (Sec. 4.1) is 100 private pairs. Its form here (default ours, paper silent): a
    folder for each task with pictures/NAME.png, masks/NAME.png (white = regenerate; for outpainting the
    picture is on its larger canvas) and prompts.jsonl, lines of name and prompt, "" without one."""
    rows, tasks = [], sorted(file.parent for file in root.glob("*/prompts.jsonl"))
    for folder in tasks:
        for place, row in jsonl_of(folder / "prompts.jsonl", ("name", "prompt")):
            if not is_name(row["name"]):
                raise ValueError(f"{place}: name: {row['name'][:40]!r}: is no file's name without suffix")
            source, mask = (there(folder / what, f"{row['name']}.png", place)
                            for what in ("pictures", "masks"))
            text = row["prompt"] or (ERASE_PROMPT if folder.name == "erase" else "")
            rows.append(Row(f"{folder.name}/{row['name']}", source, prompt=to_the_letter(text),
                            target_text=row["prompt"].strip() or None, mask=mask, group=folder.name))
    if not rows:
        raise ValueError(f"{root}: no TASK/prompts.jsonl in it: see readers/benchmarks.py for the layout")
    return Benchmark("userbench", ", ".join(d.name for d in tasks), rows, USERBENCH_ROWS * len(tasks),
                     TEXT_METRICS,
                     aggregation="mean over pictures of a task")


#### 3. judges' replies, and how rows become a number ########################################################

JUDGED = {"omniedit": ("sc", "pq", "o", "accuracy"), "gedit": ("sc", "pq", "o"), "imgedit": ("score",)}


def viescore(sc: list[float], pq: list[float]) -> tuple[float, float, float]:
    """VIEScore of one row: the least of each, and the root of their product. Means come after that."""
    return min(sc), min(pq), math.sqrt(min(sc) * min(pq))


def imgedit_scores(reply: str) -> list[int]:
    """Numbers of a reply as ImgEdit's scorer counts them: of every line of the form `Name: N`, whatever it
    is. Its score is their mean, of however many there are."""
    parts = (line.strip().split(": ") for line in reply.splitlines())
    return [int(part[1]) for part in parts if len(part) == 2 and part[1].isdecimal()]


def three_scores(reply: str, mark: str = "") -> float:
    """Mean of the three scores of 1 to 5 that ImgEdit asks for, rounded as its scorer does. ValueError for
    what that scorer would count all the same: two lines, a line of the reasoning (but for one among the last
    three), 0 or 9, digits of other scripts."""
    found, last = imgedit_scores(reply), [line.strip() for line in reply.splitlines() if line.strip()][-3:]
    if len(found) != 3 or not all(re.fullmatch("[^:]+: [1-5]", line) for line in last):
        raise ValueError(f"unparsed: {len(found)} scores, or not of 1 to 5\n{reply[:4096]}")
    return round(sum(found) / 3, 2)


def ask_pq(mark: str) -> list:
    """VIEScore's perceptual quality in its form: two scores, of the edited picture alone."""
    return [f"Question {mark}. You judge a picture that a model has made.", 0,
            "Give two scores from 0 to 10. First: how natural it looks (0: the scene, its light, distances "
            "or shadows look wrong, 10: natural). Second: how free it is of artefacts (0: full of "
            "distortions, watermarks, blurred or broken faces and hands, seams, 10: none).\n"
            + served.FORM.format(mark=mark, form="[first, second]")]


def read_two(reply: str, mark: str) -> list[float]:
    return served.scores_of(served.the_object(reply, mark), 2)


def judge_row(client: served.Served, bench: Benchmark, row: Row, source: np.ndarray,
              result: np.ndarray) -> dict:
    """A result judged in the form of its benchmark -> JUDGED's scores, "judge_status"; not "ok": no scores.

    omniedit: two SC and one PQ, as its data card; gedit: two of each, as VIEScore. The words are ours
    (readers/served.py), so the numbers are comparable among themselves, and with published ones in kind only.
    imgedit: its own prompt of the type; the raw reply is kept, for its own scorer."""
    if bench.judge == "imgedit":
        prompt = bench.prompts[row.group].replace("<edit_prompt>", served.unmarked(row.instruction))
        got = client.ask(lambda mark: [prompt, 0, 1], (source, result), three_scores)
        if got.status != "ok":
            return {"judge_status": got.status}
        return {"score": got.value, "reply": got.text, "judge_status": "ok"}
    if bench.judge == "omniedit":
        v = served.judge_one(client, source, result, row.instruction)
        if v.judge_status != "ok":
            return {"judge_status": v.judge_status}
        sc, pq = [v.sc_score_1, v.sc_score_2], [v.pq_score]
    else:
        replies = [client.ask(served.ask_sc(row.instruction), (source, result), read_two)]
        if replies[0].status == "ok":
            replies.append(client.ask(ask_pq, (result,), read_two))
        if replies[-1].status != "ok":
            return {"judge_status": f"{'sc' if len(replies) == 1 else 'pq'}: {replies[-1].status}"}
        sc, pq = (reply.value for reply in replies)
    found = dict(zip(("sc", "pq", "o"), viescore(sc, pq)))
    if bench.judge == "omniedit":
        found["accuracy"] = float(found["sc"] == 10)
    return found | {"sc_scores": sc, "pq_scores": pq, "judge_status": "ok"}


def imgedit_overall(scores: dict[str, list[float]]) -> dict:
    """Scores by type -> means of the types as its scorer prints them, and both numbers that are published as
    Overall: the mean of the types, and of the items."""
    types = {kind: round(sum(v) / len(v), 2) for kind, v in scores.items() if v}
    items = [x for v in scores.values() for x in v]
    return {"types": types, "overall of types": sum(types.values()) / len(types) if types else math.nan,
            "overall of items": sum(items) / len(items) if items else math.nan}


#### 4. what a run leaves on disk ############################################################################


def chains(rows: list[Row]) -> list[list[Row]]:
    """Rows that edit each other's results are one chain, which one rank makes; every other row is its own."""
    found, of = [], {}
    for r in rows:
        of[r.key] = of[r.after] if r.after else len(found)
        if r.after:
            found[of[r.key]].append(r)
        else:
            found.append([r])
    return found


def parts(rows: list[Row], most: int) -> Iterator[list[Row]]:
    """At most so many rows at a time, none together with one whose result it edits."""
    turns = {}
    for r in rows:
        turns[r.key] = turns.get(r.after, 0) + 1 if r.after else 0
    for turn in sorted(set(turns.values())):
        group = [r for r in rows if turns[r.key] == turn]
        yield from (group[i:i + most] for i in range(0, len(group), most))


def put(path: Path, content: bytes, beside: Path | str = "", rank: int = 0) -> None:
    """Written whole or not at all; until then it is in `beside`, so that no tree has a file that is cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = Path(beside or path.parent) / f".half.{rank}"
    half.write_bytes(content)
    os.replace(half, path)


def put_picture(path: Path, x: np.ndarray, out: str, rank: int) -> None:
    """uint8 [h, w, 3 or 4] as PNG, whatever the suffix, in sRGB and said so."""
    srgb, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    srgb.add(b"sRGB", b"\0")
    Image.fromarray(x).save(buffer, "PNG", pnginfo=srgb)
    put(path, buffer.getvalue(), out, rank)


def keep_plan(out: Path, b: Benchmark, told: dict, dist: common.Dist) -> None:
    """OUT/plan.json, what decides the numbers; SystemExit if the folder was begun with something else."""
    asked = ((r.key, r.instruction, r.prompt, r.source_text, r.target_text) for r in b.rows)
    keys = hashed(asked)[:12]
    plan, file = json.loads(json.dumps(told | {"rows": keys, "split": b.split})), out / "plan.json"
    if dist.rank == 0 and not file.is_file():
        put(file, (json.dumps(plan, indent=1) + "\n").encode())
    if dist.world > 1:
        td.barrier()
    try:
        before = read_json(file, "another --out")
    except ValueError as e:
        raise SystemExit(f"error: --out: {e}".replace("jsonl: ", "")) from None
    if differs := next((k for k in plan | before if plan.get(k) != before.get(k)), None):
        raise SystemExit(f"error: --out: {out}: was begun with another {differs}: give another folder, or "
                         "the command that it was begun with")


class Lines:
    """OUT/rows.RANK.jsonl, a line for every row that was scored; a line that a kill cut off is closed."""

    def __init__(self, out: str, rank: int):
        self.path = Path(out) / f"rows.{rank}.jsonl"

    def __enter__(self) -> "Lines":
        self.file = open(self.path, "ab+")
        if self.file.seek(0, os.SEEK_END):
            self.file.seek(-1, os.SEEK_END)
            self.file.write(b"" if self.file.read(1) == b"\n" else b"\n")
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def add(self, line: dict) -> None:
        """Its time comes with it. Not-a-number, "not defined for this row", becomes null, infinity "inf"."""
        odd = {k: None if math.isnan(v) else str(v) for k, v in line.items()
               if isinstance(v, float) and not math.isfinite(v)}
        self.file.write((json.dumps(line | odd | {"at": round(time.time(), 3)}) + "\n").encode())
        self.file.flush()


def read_lines(out: str) -> dict[str, dict]:
    """{key: line} of all ranks, the latest of each."""
    found = [line for file in sorted(Path(out).glob("rows.*.jsonl")) for _, line in json_lines(file)
             if isinstance(line, dict) and isinstance(line.get("key"), str)]
    return {line["key"]: line for line in sorted(found, key=lambda line: line["at"])}


def finished(line: dict | None) -> bool:
    """Whether a row needs no further try: it has a result, and the judge's scores if it was judged."""
    return line is not None and "missing" not in line and line.get("judge_status", "ok") == "ok"


def digest(path: Path | None) -> str:
    """Of a result, so that one that is replaced is scored anew; "" of none."""
    return hashed([path.read_bytes()])[:12] if path else ""


def source_of(r: Row, folder: Path) -> np.ndarray | None:
    """uint8 [h, w, 3]: what is edited; of a further turn the result before it, None if that is missing."""
    if not r.after:
        return picture(r.source)
    before = result_of(folder, r.after)
    return before and picture(str(before))


def result_picture(b: Benchmark, r: Row, folder: Path, like: np.ndarray | None = None) -> np.ndarray:
    """A row's result -> uint8 [h, w, 3]; BadFile. PIE-Bench's runners save strips, of which the last 512x512
    are the result; GEdit-Bench's judge sees it at the size of its source, `like`."""
    x = read_image(str(result_of(folder, r.key)))
    if b.name == "pie" and x.shape[0] != x.shape[1] and min(x.shape[:2]) >= 512:
        x = x[-512:, -512:]
    if b.name == "gedit" and like is not None and x.shape != like.shape:
        x = np.asarray(Image.fromarray(x).resize(like.shape[1::-1], Image.Resampling.BICUBIC))
    return x


def open_client(b: Benchmark, url: str, name: str, budget: int | None, out: str,
                rank: int) -> served.Served | None:
    """The served judge, once it has shown that it can see two pictures; None without an address."""
    if not url:
        return None
    if not b.judge:
        raise SystemExit(f"error: --judge: {url}: {b.name} has no judged scores: leave it out")
    if not name:
        raise SystemExit("error: --judge_model: empty: say which model the server is to ask")
    if b.judge == "imgedit" and (lacks := {r.group for r in b.rows} - b.prompts.keys()):
        raise SystemExit(f"error: --judge: {url}: no prompt for {', '.join(sorted(lacks))} in "
                         "judge_prompt.json beside ImgEdit's file: take it from its Benchmark.tar")
    return served.self_test(served.Served(url, name, Path(out) / f"judge.{rank}.jsonl", budget))


def judge_rows(client: served.Served, b: Benchmark, rows: list[Row], found: dict[str, dict],
               folder: Path) -> str | None:
    """The judge's scores put beside the measures of rows that have a result -> why it will say no more, or
    None."""
    def ask(r):
        source = source_of(r, folder)
        return judge_row(client, b, r, source, result_picture(b, r, folder, source))

    rows = [r for r in rows if "missing" not in found.get(r.key, {"missing": ""})]
    for r, said in zip(rows, client.map(ask, rows)):
        found[r.key] |= said
    if any(line.get("judge_status", "").endswith("budget") for line in found.values()):
        return f"the budget of {client.budget} requests is spent"
    return client.stopped


#### 5. tables ###############################################################################################


def number(line: dict, name: str) -> float:
    """A score of a line, not-a-number where there is none. clip_dir_or_0: equal captions count as 0, which
    torch's cosine says of them."""
    if name == "clip_dir_or_0" and "missing" not in line:
        return number(line, "clip_dir") if line["clip_dir"] is not None else 0.0
    return math.nan if line.get(name) is None else float(line[name])


def interval(*groups: np.ndarray) -> dict:
    """log.bootstrap; PSNR of equal pictures is infinite, and so is then its mean."""
    if any(np.isinf(g).any() for g in groups):
        return {"mean": math.inf, "low": math.nan, "high": math.inf,
                "n": int(sum((~np.isnan(g)).sum() for g in groups))}
    return log.bootstrap(*groups)


def tables_of(b: Benchmark, names: list[str], done: dict[str, dict]) -> dict:
    """{table: rows expected, results, what is missing and why; by group, over groups (macro) and over rows
    (micro) means with their intervals}. A missing row has no score: it is neither 0 nor left out unsaid."""
    out = {}
    for table in dict.fromkeys(t for r in b.rows for t in r.tables):
        rows = [r for r in b.rows if table in r.tables]
        lines = [done[r.key] for r in rows]
        why = Counter(line.get("missing") or f"judge: {line['judge_status']}" for line in lines
                      if not finished(line))
        values = {name: np.array([number(line, name) for line in lines]) for name in names}
        groups = {g: np.array([r.group == g for r in rows]) for g in sorted({r.group for r in rows})}
        out[table] = {
            "expected": len(rows), "results": sum("missing" not in line for line in lines),
            "missing": dict(why),
            "groups": {g: {"expected": int(m.sum())} | {k: interval(v[m]) for k, v in values.items()}
                       for g, m in groups.items()},
            "macro": {k: interval(*(v[m] for m in groups.values())) for k, v in values.items()},
            "micro": {k: interval(v) for k, v in values.items()}}
    return out


def table_text(b: Benchmark, columns: list[str], tables: dict, left_out: dict, overall: dict | None) -> str:
    def cells(of):
        found = [of[k] for k in columns]
        return ["-" if not v["n"] else "inf" if math.isinf(v["mean"]) else
                f"{v['mean']:.4f} [{v['low']:.4f}, {v['high']:.4f}]" for v in found]

    text = [f"{b.name}, {b.split}", *(f"note: {note}" for note in b.notes)]
    for table, t in tables.items():
        text += ["", f"{table}: {t['results']:,} results of {t['expected']:,} rows, mean [95%]"]
        rows = [[f"{g} ({v['expected']:,})", *cells(v)] for g, v in t["groups"].items()]
        rows += [[f"mean of {len(rows)} groups", *cells(t["macro"])]]
        rows = [*(rows if len(rows) > 2 else []), ["mean of rows", *cells(t["micro"])],
                ["rows scored", *(f"{t['micro'][k]['n']:,} of {t['expected']:,}" for k in columns)]]
        text.append(log.table([table, *columns], rows))
        seen = list(t["missing"].items())
        text += [f"missing: {n:,} row(s): {why}" for why, n in seen[:5]]
        text += [f"missing: {sum(n for _, n in seen[5:]):,} more: see results.json"] * (len(seen) > 5)
        text += [f"{name}: {v['value']:.4f}, {v['n']:,} results and {v['n']:,} {v['against']}"
                 for name, v in t.get("sets", {}).items()]
    if overall:
        text += ["", f"Overall: {overall['overall of types']:.2f} of the types, "
                     f"{overall['overall of items']:.2f} of the items"]
    return "\n".join([*text, "", b.aggregation, *(f"{name}: {why}" for name, why in left_out.items())])


def imgedit_files(b: Benchmark, done: dict[str, dict], out: Path, folder: Path) -> dict | None:
    """The files that ImgEdit's own scorer reads: basic_edit.json in a tree of ours, and OUT/result.json, the
    judge's replies -> its Overall, None where nothing was judged."""
    if folder == out / "pictures":
        put(folder / "basic_edit.json", json.dumps(b.listed, indent=1).encode())
    replies = {r.key: done[r.key]["reply"] for r in b.rows if "reply" in done[r.key]}
    if not replies:
        return None
    put(out / "result.json", json.dumps(replies, indent=1).encode())
    scores = {}
    for r in b.rows:
        if r.key in replies:
            scores.setdefault(r.group, []).append(done[r.key]["score"])
    return imgedit_overall(scores)


def sheet(b: Benchmark, done: dict[str, dict], folder: Path, most: int) -> Image.Image | None:
    """source | result | target, if there is one, of the first rows that have a result."""
    pictures, titles, rows = [], ["source", "result", "target"], []
    for r in [r for r in b.rows if r.tables and "missing" not in done[r.key]][:most]:
        row = [source_of(r, folder), result_picture(b, r, folder)]
        row += [] if r.target is None else [picture(r.target)]
        row = [None if x is None else Image.fromarray(x) for x in row]
        for im in filter(None, row):
            im.thumbnail((256, 256), Image.Resampling.LANCZOS)
        pictures.append(row)
        rows.append(f"{r.key}: {r.instruction or r.prompt}")
    return log.contact_sheet(pictures, titles[:max(map(len, pictures))], rows) if pictures else None
