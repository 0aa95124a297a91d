"""Benchmarks of edits: small sets in their published layouts, read, sampled, scored, and the trees read back.

Expected numbers are hand-computed, or what the published scorers print for the same input.
"""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from inprocess import run_ranks, run_script
from PIL import Image
from test_served import Judge

import benchmark
import checkpoint
import evaluate
import model
import sample
from readers import bench, benchmarks
from readers.edits import TASK_NAMES, TASKS, open_edits

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread_and_own_signals")
SEVEN = dict(zip(TASKS, ("swap", "remove", "add", "color_alter", "background", "env", "style_change")))


# ---- small sets in their published layouts -------------------------------------------------------


def noise(seed, w=24, h=16):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8)).resize((w, h), Image.Resampling.BICUBIC)


def put(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def as_cell(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def hole(w=24, h=16):
    """White in the middle: 8/24 x 12/16 of it is a quarter."""
    m = np.zeros((h, w), np.uint8)
    m[h // 8:h - h // 8, w // 3:2 * w // 3] = 255
    return Image.fromarray(m)


def magicbrush(root, turns=(1, 3, 2)):
    """JSON keys are not the folders' names, which are what stands before "-"."""
    sessions, local = {}, {}
    for k, count in enumerate(turns):
        folder, key, session = f"10{k}", f"key{k}", []
        put(root / f"images/{folder}/{folder}-input.png", noise(100 * k))
        said = {f"{folder}-input.png": "a picture"}
        for n in range(1, count + 1):
            before = "input" if n == 1 else f"output{n - 1}"
            wide = 24 if n < count else 26  # results are resized to it
            put(root / f"images/{folder}/{folder}-output{n}.png", noise(100 * k + n, wide, 16))
            rgba = noise(100 * k).convert("RGBA")
            rgba.putalpha(hole().point(lambda v: 255 - v))  # transparent = edit
            put(root / f"images/{folder}/{folder}-mask{n}.png", rgba)
            session.append({"input": f"{folder}-{before}.png", "mask": f"{folder}-mask{n}.png",
                            "output": f"{folder}-output{n}.png", "instruction": f"make it red {n} "})
            said[f"{folder}-output{n}.png"] = f"a red picture {n}"
        sessions[key], local[folder] = session, said
    (root / "edit_sessions.json").write_text(json.dumps(sessions))
    for name in ("local", "global"):
        (root / f"{name}_descriptions.json").write_text(json.dumps(local))
    return root


def emu(root, rows=3, name="test-00000-of-00001", more=()):
    cell = as_cell(noise(1))
    table = {"instruction": ["add a star "] * rows, "image": [cell] * rows, "task": ["add", "remove"] * rows,
             "split": ["test"] * rows, "idx": list(range(rows)), "hash": ["x"] * rows,
             "input_caption": ["a street"] * rows, "output_caption": ["a street", "a star"] * rows}
    table |= dict.fromkeys(more, ["x"] * rows)
    (root / "data").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({k: v[:rows] for k, v in table.items()}), root / f"data/{name}.parquet")
    return root


def pie(root, mask=(25, 4, 49, 6, 380, 99)):
    entries = {}
    for n, kind in enumerate(("0", "3", "9")):
        path = f"{kind}_kind/1_artificial/{n:012d}.jpg"
        put(root / "annotation_images" / path, noise(n))
        entries[f"{n:012d}"] = {"image_path": path, "original_prompt": "a [round] cake",
                                "editing_prompt": "a [square] cake", "editing_instruction": "make it square ",
                                "editing_type_id": kind, "blended_word": "", "mask": list(mask)}
    (root / "mapping_file.json").write_text(json.dumps(entries))
    return root


def editbench(root, invert=False):
    for kind in ("natural", "generated"):
        root.mkdir(parents=True, exist_ok=True)
        with open(root / f"annotations_{kind}.csv", "w", newline="") as f:
            out = csv.writer(f)
            out.writerow(["aos", "prompt_full", "prompt_mask-simple", "prompt_mask-rich"])
            for n in range(2):
                out.writerow([f"a{n}", "a cat, sitting on a mat", "a cat", "a black cat"])
                put(root / f"references_{kind}/a{n}.png", noise(n))
                mask = hole()
                put(root / f"masks_{kind}/a{n}.png", mask.point(lambda v: 255 - v) if invert else mask)
    return root


def omniedit(root, pictures=1):
    lines = []
    for n in range(pictures):
        put(root / f"pictures/p{n}.png", noise(n, 32, 18))
        lines += [{"picture": f"p{n}.png", "task": x, "instruction": f"{x} "} for x in SEVEN.values()]
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def gedit_table():
    clear = noise(3).convert("RGBA")
    clear.putalpha(hole())
    return {"task_type": ["style_change", "subject-replace", "style_change", "style_change"],
            "key": ["k1", "k2", "k1", "k3"], "instruction": ["make it red ", "make it a dog", "变红", "snow"],
            "instruction_language": ["en", "en", "cn", "en"],
            "input_image": [as_cell(noise(1)), as_cell(clear), as_cell(noise(1)), as_cell(noise(4))],
            "input_image_raw": [as_cell(noise(1))] * 4, "Intersection_exist": [True, False, True, False]}


def gedit(root, form="stream", drop=None):
    """As datasets.save_to_disk leaves a DatasetDict."""
    table = pa.table({k: v for k, v in gedit_table().items() if k != drop})
    (root / "train").mkdir(parents=True)
    (root / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (root / "train/state.json").write_text('{"_data_files": []}')
    for k in range(2):
        part = table.slice(2 * k, 2)
        with pa.OSFile(str(root / f"train/data-{k:05d}-of-00002.arrow"), "wb") as f:
            with (pa.ipc.new_stream if form == "stream" else pa.ipc.new_file)(f, part.schema) as w:
                w.write_table(part)
    return root


def imgedit(root, prompts=True):
    put(root / "animal/1.jpg", noise(1))
    put(root / "daily object/2.png", noise(2))
    edits = {"1082": {"id": "animal/1.jpg", "prompt": "make it red ", "edit_type": "adjust"},
             "673": {"id": "daily object/2.png", "prompt": "add a cube", "edit_type": "add"}}
    (root / "basic_edit.json").write_text(json.dumps(edits))
    if prompts:
        said = {kind: f"Question {kind}. Judge: <edit_prompt>" for kind in ("adjust", "add")}
        (root / "judge_prompt.json").write_text(json.dumps(said))
    return root


def userbench(root):
    for task in ("erase", "outpaint"):
        for n in range(2):
            put(root / f"{task}/pictures/u{n}.png", noise(n))
            put(root / f"{task}/masks/u{n}.png", hole())
        lines = [{"name": f"u{n}", "prompt": "a red star" if task == "outpaint" else ""} for n in range(2)]
        (root / f"{task}/prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


MAKE = {"magicbrush": magicbrush, "emu": emu, "pie": pie, "editbench": editbench, "omniedit": omniedit,
        "gedit": gedit, "imgedit": imgedit, "userbench": userbench}
ROWS = {"magicbrush": {"all_turn": 6, "final_turn": 3}, "emu": {"all": 3}, "pie": {"all": 3},
        "editbench": {"all": 4}, "omniedit": {"all": 7}, "imgedit": {"all": 2}, "userbench": {"all": 4},
        "gedit": {"en": 3, "en, intersection": 1, "cn": 1, "cn, intersection": 1}}
TREE = {  # of results, as the scorers read them
    "magicbrush": {f"{i}/{i}_{x}.png" for i, xs in (("100", ["1"]), ("102", ["1", "iter_2", "inde_2"]), (
        "101", ["1", "iter_2", "iter_3", "inde_2", "inde_3"])) for x in xs},
    "emu": {"0.png", "1.png", "2.png"},
    "pie": {f"annotation_images/{k}_kind/1_artificial/{n:012d}.jpg" for n, k in enumerate("039")},
    "editbench": {f"{kind}/a{n}.png" for kind in ("natural", "generated") for n in (0, 1)},
    "omniedit": {f"{task}/p0.png" for task in TASKS},
    "gedit": {f"fullset/{name}{end}.png" for end in ("", "_SRCIMG") for name in (
        "style_change/en/k1", "style_change/cn/k1", "style_change/en/k3", "subject-replace/en/k2")},
    "imgedit": {"1082.png", "673.png", "basic_edit.json"},
    "userbench": {f"{task}/u{n}.png" for task in ("erase", "outpaint") for n in (0, 1)}}
FILLERS = ("editbench", "userbench")
PLACES = {"magicbrush": "MagicBrush/test", "emu": "emu_edit_test_set", "pie": "PIE-Bench_v1",
          "editbench": "EditBench", "omniedit": "OmniEdit-Bench", "gedit": "GEdit-Bench",
          "imgedit": "ImgEdit-Bench", "userbench": "UserBench"}  # in the README


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """ROOT/editnet, ROOT/inpaint: tiny random editors; ROOT/NAME: every benchmark."""
    root = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    for name, net in (("editnet", model.EditNet(model.PRESETS["test"])),
                      ("inpaint", model.Editor(model.inpainting(model.PRESETS["test"])))):
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)
        meta = {"arch": net.arch, "config": {"image_size": 16, "aspects": True}}
        checkpoint.write(root / name, 5, {"model": net.state_dict()}, meta)
    for name, make in MAKE.items():
        make(root / name)
    return root


def ask(at, name, out, **kw):
    """evaluate.py bench in this process -> results.json."""
    kw = {"data": at / name, "out": out, "partial": True, "steps": 1, "precision": "fp32",
          "device": "cpu"} | kw
    if "results" not in kw:
        kw = {"ckpt": at / ("inpaint" if name in FILLERS else "editnet")} | kw
    kw = {k: str(v) if isinstance(v, Path) else v for k, v in kw.items()}
    evaluate.main(benchmark.Bench(name, **kw))
    return json.loads((Path(out) / "results.json").read_text())


def refused(call, *args, **kw):
    with pytest.raises(SystemExit) as e:
        call(*args, **kw)
    line = str(e.value.code)
    assert line.startswith("error: ") and "\n" not in line, line
    return line


def files(folder):
    return {str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()}


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


# ---- numbers of the published scorers ------------------------------------------------------------


def test_pie_masks():
    """Their decoder's and their metrics' on 6x6; 2,044 pixels of border on 512x512."""
    inner = benchmarks.pie_mask([13, 3, 20, 1], 6, 6)
    assert sorted(map(tuple, np.argwhere(inner).tolist())) == [(2, 1), (2, 2), (2, 3), (3, 2)]
    whole = benchmarks.pie_mask([13, 3, 20, 1], 6, 6, border=True)
    assert ["".join(str(int(v)) for v in row) for row in whole] == [
        "111111", "100001", "111101", "101001", "100001", "111111"]
    assert benchmarks.pie_mask([51250, 10], border=True).sum() == 2054
    assert benchmarks.pie_mask([512 * 512 - 3, 10, 512 * 512, 5]).sum() == 3  # cut
    for code in ([1, 2, 3], [-1, 2], [1.0, 2], "1 2", None, [True, 2]):
        with pytest.raises(ValueError, match="^mask: "):
            benchmarks.pie_mask(code)


def test_viescore():
    """min, then the root of each row, then means: of groups 6.120185, of rows 5.160247."""
    assert bench.viescore([8, 6], [9, 7]) == (6, 7, pytest.approx(6.480741, abs=1e-6))
    o = [bench.viescore(*x)[2] for x in (([8, 6], [9, 7]), ([10, 0], [9, 9]), ([9, 9], [9, 9]))]
    rows = [bench.Row(str(k), group=g) for k, g in enumerate("aab")]
    b = bench.Benchmark("gedit", "", rows, 3, (), "gedit")
    lines = {str(k): {"key": str(k), "o": v, "judge_status": "ok"} for k, v in enumerate(o)}
    found = bench.tables_of(b, ["o"], lines)["all"]
    assert found["groups"]["a"]["o"]["mean"] == pytest.approx(3.240370, abs=1e-6)
    assert found["macro"]["o"]["mean"] == pytest.approx(6.120185, abs=1e-6)
    assert found["micro"]["o"]["mean"] == pytest.approx(5.160247, abs=1e-6)
    lines["1"] = {"key": "1", "judge_status": "sc: empty"}  # no score is not 0
    found = bench.tables_of(b, ["o"], lines)["all"]
    assert found["groups"]["a"]["o"]["mean"] == pytest.approx(6.480741, abs=1e-6)
    assert found["missing"] == {"judge: sc: empty": 1} and found["micro"]["o"]["n"] == 2


@pytest.mark.parametrize("reply, expected", [
    ('```json\n{"id": "m", "score": [8, 6], "reasoning": "a"}\n```', [8, 6]),
    ('{"id": "m", "score": [8, 6]}', [8, 6]), ('{"id": "m", "score": [10, 0.5]}', [10, 0.5]),
    ('{"id": "m", "score": 7}', None), ('{"id": "m", "score": [6]}', None), ("[6, 0]", None), ("7", None),
    ('{"id": "m", "score": [6, 0, 3]}', None), ('{"id": "m", "score": [12, -3]}', None),
    ('{"id": "m", "score": ["8", "10"]}', None), ('{"id": "m", "score": []}', None), ("11", None),
    ("{'id': 'm', 'score': [8, 6]}", None), ('{"id": "m", "score": [8, 6], "reasoning": "a "b" c"}', None),
    ('{"id": "m", "score": [8, 6]} {"id": "m", "score": [1, 1]}', None),
    ('{"id": "m", "score": [8, 6], "reasoning": "abc', None), ('{"id": "other", "score": [8, 6]}', None)])
def test_replies_are_read_strictly(reply, expected):
    """Two scores or none: the published parser puts random numbers, passes -3, or breaks later."""
    if expected is None:
        with pytest.raises(ValueError):
            bench.read_two(reply, "m")
    else:
        assert bench.read_two(reply, "m") == expected


@pytest.mark.parametrize("reply, published, ours", [
    ("A: 5|B: 4|C: 3", 4.0, 4.0), ("A: 5/5|B: 4|C: 3", 3.5, None), ("A: 5.|B: 4|C: 3", 3.5, None),
    ("A:5|B: 4|C: 3", 3.5, None), ("**A**: 5|B: **4**|C: 3", 4.0, None),
    ("Brief reasoning: 2|A: 5|B: 4|C: 3", 3.5, None), ("Brief reasoning: good|A: 5|B: 4|C: 4", 4.33, 4.33),
    ("A: 0|B: 9|C: 3", 4.0, None),
    ("Steps: 2|A: 5|B: good|C: 4", 3.67, None), ("A: 5|B: \u0664|C: 3", 4.0, None), ("no line", None, None)])
def test_imgedit_replies(reply, published, ours):
    found = bench.imgedit_scores(reply.replace("|", "\n"))
    assert (round(sum(found) / len(found), 2) if found else None) == published
    try:
        assert bench.three_scores(reply.replace("|", "\n")) == ours
    except ValueError:
        assert ours is None


def test_imgedit_overall():
    """GPT-4o's published row: types 4.2444, items 4.1912; 4.20 is printed."""
    types = dict(add=(4.61, 95), adjust=(4.33, 94), extract=(2.9, 117), replace=(4.35, 92), remove=(3.66, 86),
                 background=(4.57, 94), style=(4.93, 100), compose=(3.96, 23), action=(4.89, 36))
    found = bench.imgedit_overall({k: [v] * n for k, (v, n) in types.items()})
    assert found["types"] == {k: v for k, (v, _) in types.items()}
    assert found["overall of types"] == pytest.approx(4.2444, abs=1e-4)
    assert found["overall of items"] == pytest.approx(4.1912, abs=1e-4)


def test_infinite_and_undefined_scores():
    nan, inf = float("nan"), float("inf")
    assert bench.interval(np.array([1.0, inf, nan]))["mean"] == inf
    assert bench.interval(np.array([1.0, inf, nan]))["n"] == 2
    line = {"clip_dir": None, "psnr": "inf"}
    assert np.isnan(bench.number(line, "clip_dir")) and bench.number(line, "psnr") == inf
    assert bench.number(line, "clip_dir_or_0") == 0
    assert np.isnan(bench.number({"missing": "x"}, "clip_dir_or_0"))


# ---- readers -------------------------------------------------------------------------------------


def test_magicbrush_rows(tmp_path):
    """12 sessions of 1, 2, 3, ... turns: 24 and 12 pairs; the first turn of one-turn sessions is in both."""
    b = bench.open_bench("magicbrush", str(magicbrush(tmp_path, (1, 2, 3) * 4)), partial=True)
    count = {t: sum(t in r.tables for r in b.rows) for t in ("all_turn", "final_turn")}
    assert count == {"all_turn": 24, "final_turn": 12} and len(b.rows) == 24 + 12
    by_key = {r.key: r for r in b.rows}
    last = by_key["102/102_iter_3"]
    assert last.after == "102/102_iter_2" and last.source is None and last.target.endswith("102-output3.png")
    assert by_key["102/102_inde_3"].source.endswith("102/102-output2.png")
    assert by_key["102/102_iter_2"].tables == () and by_key["102/102_iter_2"].after == "102/102_1"
    assert last.instruction == "make it red 3 " and last.target_text == "a red picture 3"
    area = bench.mask_of(b, by_key["100/100_1"], 16, 24)
    assert area.sum() == 8 * 12 and area[8, 12] == 1
    assert [len(c) for c in bench.chains(b.rows)[:4]] == [1, 2, 1, 3]
    assert [[r.key for r in p] for p in bench.parts(bench.chains(b.rows)[3], 9)] == [
        ["102/102_1"], ["102/102_iter_2"], ["102/102_iter_3"]]


@pytest.mark.parametrize("form", ["stream", "file", "parquet"])
def test_gedit_in_every_form(tmp_path, form):
    if form == "parquet":
        (tmp_path / "data").mkdir()
        pq.write_table(pa.table(gedit_table()), tmp_path / "data/train-00000-of-00001.parquet")
    else:
        gedit(tmp_path, form)
    b = bench.open_bench("gedit", str(tmp_path), partial=True)
    assert [r.key for r in b.rows] == ["fullset/style_change/en/k1", "fullset/subject-replace/en/k2",
                                       "fullset/style_change/cn/k1", "fullset/style_change/en/k3"]
    assert [r.tables for r in b.rows] == [("en", "en, intersection"), ("en",), ("cn", "cn, intersection"),
                                          ("en",)]
    assert b.rows[0].instruction == "make it red " and b.rows[2].instruction == "变红"
    assert np.array_equal(bench.picture(b.rows[3].source), np.asarray(noise(4)))
    assert bench.picture(b.rows[1].source, alpha=True).shape == (16, 24, 4)
    assert len(bench.open_bench("gedit", str(tmp_path), True, language="cn").rows) == 1


def test_arrow_files_that_lie(tmp_path):
    """Bytes flipped anywhere in a file: rows, or one line; never a read outside of it."""
    raw = (gedit(tmp_path / "g") / "train/data-00000-of-00002.arrow").read_bytes()
    rng, refused_ones = np.random.default_rng(0), 0
    for k in range(150):
        bad = bytearray(raw)
        for at in rng.integers(0, len(raw), 1 + k % 4):
            bad[at] ^= 1 << int(rng.integers(8))
        file = tmp_path / f"{k}.arrow"
        file.write_bytes(bad[:rng.integers(len(raw))] if k % 5 == 0 else bad)
        try:
            table = benchmarks.read_arrow(str(file))
            for column in table.columns:
                column.to_pylist()
        except SystemExit as e:
            assert "not an Arrow file, or damaged" in str(e)
            refused_ones += 1
    assert 10 < refused_ones < 150


def test_emu_by_count(tmp_path):
    """The test split has 3,589 rows; the set of generations calls it validation."""
    emu(tmp_path, 3589, "validation-00000-of-00001", more=("edited_image", "model"))
    emu(tmp_path, 2022, "test-00000-of-00001", more=("edited_image", "model"))
    b = bench.open_bench("emu", str(tmp_path))
    assert len(b.rows) == 3589 and "PARTIAL" not in b.split
    assert "split called validation" in b.notes[0] and b.notes[1] == "1,795 rows with equal captions"
    (tmp_path / "data/validation-00000-of-00001.parquet").unlink()
    line = refused(bench.open_bench, "emu", str(tmp_path))
    assert "no split of 3,589 rows" in line and "test 2,022" in line


def test_emu_names_that_come_twice(tmp_path):
    file = emu(tmp_path) / "data/test-00000-of-00001.parquet"
    table = pq.read_table(file).set_column(4, "idx", pa.array([7, 7, 8]))
    pq.write_table(table, file)
    b = bench.open_bench("emu", str(tmp_path), partial=True)
    assert [r.key for r in b.rows] == ["00000", "00001", "00002"] and "named by their rows" in b.notes[0]
    _, rows = benchmarks.table_rows(tmp_path)
    assert [row["key"] for _, row in rows] == ["00000", "00001", "00002"]


@pytest.mark.parametrize("invert", [False, True])
def test_editbench_masks_by_their_areas(tmp_path, invert):
    b = bench.open_bench("editbench", str(editbench(tmp_path, invert)), True, column="prompt_mask-rich")
    assert ("black" if invert else "white") + " = edit" in b.split and "prompt_mask-rich" in b.split
    assert b.rows[0].prompt == "a black cat" and b.rows[3].key == "generated/a1"
    assert "0 small, 4 medium, 0 large, 0 below" in b.notes[0]
    assert bench.mask_of(b, b.rows[0], 16, 24).sum() == 8 * 12
    with pytest.raises(ValueError, match="neither white nor black"):
        bench.mask_polarity([0.01, 0.02, 0.03], "x")


def test_pie_rows(at):
    b = bench.open_bench("pie", str(at / "pie"), partial=True)
    r = b.rows[0]
    assert (r.source_text, r.target_text) == ("a round cake", "a square cake")
    assert r.instruction == "make it square " and [x.group for x in b.rows] == ["random", "delete object",
                                                                                "change style"]
    assert b.notes == ["3 masks go past the end of their picture, and are cut there"]
    inner, whole = (bench.mask_of(b, r, 16, 24, border=x) for x in (False, True))
    assert inner.sum() == 4 + 6 + 4 and whole[0].all() and whole[:, -1].all() and inner[0].sum() == 0


def test_prompts_stay_as_they_are():
    assert benchmarks.to_the_letter(" add  a cube. ") == " add  a cube. "
    assert benchmarks.to_the_letter("a\tb\n") == "a\tb\n"
    assert benchmarks.to_the_letter("a\x07b") == "a b" and benchmarks.to_the_letter("  ") == ""
    assert benchmarks.to_the_letter("a\ud800b") == "ab"
    assert len(benchmarks.to_the_letter("x" * 9000)) == 2000


def test_task_names():
    for word, task in {"subject-replace": "swap", "subject-add": "add", "subject-remove": "remove",
                       "adjust": "attribute", "replace": "swap", "background": "background",
                       "delete object": "remove"}.items():
        assert TASK_NAMES[word] == task


def test_instruct_pix2pix_split_by_position(tmp_path):
    """Their test split: the last 5 % of seeds.json, also where folders are missing."""
    listed = [[f"{n:07d}", ["1"]] for n in range(40)]
    (tmp_path / "seeds.json").write_text(json.dumps(listed))
    for folder, _ in listed:
        if folder != "0000001":
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "prompt.json").write_text(json.dumps({"edit": folder, "output": "b"}))
    held, train = (open_edits(f"ip2p:{tmp_path}", split) for split in ("heldout", "train"))
    assert [held._row(i)[3] for i in range(len(held))] == [["0000038"], ["0000039"]]
    assert len(train) == 37 and len(open_edits(f"ip2p:{tmp_path}", "all")) == 39


# ---- sample.py's side ----------------------------------------------------------------------------


def edit(at, jsonl, out, **kw):
    sample.main(sample.Config("edit", str(at / "editnet"), jsonl=str(jsonl), out=str(out), steps=1,
                              device="cpu", precision="fp32", **kw))
    return files(out) - {"samples.jsonl", "sheet.png"}


def test_sample_gedit_from_arrow(at, tmp_path):
    """save_to_disk's folder, as the hub serves it; the copy of a source keeps its transparency."""
    assert edit(at, at / "gedit", tmp_path) == TREE["gedit"]
    shown = np.asarray(Image.open(tmp_path / "fullset/subject-replace/en/k2_SRCIMG.png"))
    assert shown.shape[2] == 4 and np.array_equal(shown[..., 3], np.asarray(hole()))
    rows = [json.loads(x) for x in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {"make it red ", "变红"} <= {r["instruction"] for r in rows}


def test_sample_pie_magicbrush_emu_imgedit(at, tmp_path):
    got = edit(at, at / "pie/mapping_file.json", tmp_path / "pie")
    assert got == TREE["pie"]
    assert Image.open(tmp_path / "pie" / min(got)).format == "PNG"
    assert edit(at, at / "magicbrush/edit_sessions.json", tmp_path / "m") == TREE["magicbrush"]
    assert edit(at, at / "emu", tmp_path / "emu") == TREE["emu"]
    assert edit(at, at / "imgedit/basic_edit.json", tmp_path / "i") == TREE["imgedit"]
    listed = json.loads((tmp_path / "i/basic_edit.json").read_text())
    assert listed == json.loads((at / "imgedit/basic_edit.json").read_text())  # with its trailing space


# ---- files to table ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
def test_bench(at, tmp_path, name, capsys):
    """Sampled and scored; again: nothing is repeated; the tree alone, in another folder: the same numbers."""
    out = tmp_path / "out"
    found = ask(at, name, out, metrics="l1_source,psnr_source")
    rows = {t: v["expected"] for t, v in found["tables"].items()}
    assert rows == ROWS[name] and all(v["results"] == v["expected"] for v in found["tables"].values())
    assert "PARTIAL" in found["split"] and found["measures"]["l1_source"]["against"] == "source"
    text = (out / "table.txt").read_text()
    assert text in capsys.readouterr().out and "l1_source" in text and "rows scored" in text
    assert ("o: no --judge" in text) == (name in ("omniedit", "gedit"))
    assert files(out / "pictures") == TREE[name]
    made = {p: p.stat().st_mtime_ns for p in (out / "pictures").rglob("*") if p.suffix in (".png", ".jpg")}
    assert all(Image.open(p).format == "PNG" for p in made)
    lines = (out / "rows.0.jsonl").read_text()
    again = ask(at, name, out, metrics="l1_source,psnr_source")
    assert again["tables"] == found["tables"] and (out / "rows.0.jsonl").read_text() == lines
    assert {p: p.stat().st_mtime_ns for p in made} == made
    other = ask(at, name, tmp_path / "other", results=out / "pictures", metrics="l1_source,psnr_source")
    assert other["tables"] == found["tables"] and not (tmp_path / "other/pictures").exists()


def test_magicbrush_tree_is_what_its_scorer_reads(at, tmp_path):
    """The pairs that image_eval.py finds, by its rules; L1 and L2 by plain numpy."""
    found = ask(at, "magicbrush", tmp_path)
    gen, gt = tmp_path / "pictures", at / "magicbrush/images"
    assert set(os.listdir(gen)) == set(os.listdir(gt))
    all_turn, final_turn = [], []
    for folder in sorted(os.listdir(gen)):
        names = sorted(os.listdir(gen / folder))
        first, inde, its = ([n for n in names if key in n] for key in (f"{folder}_1", "inde", "iter"))
        outputs = sorted(n for n in os.listdir(gt / folder) if "output" in n)
        all_turn += [(gen / folder / a, gt / folder / b) for a, b in zip(first + inde, outputs, strict=True)]
        final_turn.append((gen / folder / (its or first)[-1], gt / folder / outputs[-1]))
    for table, pairs in (("all_turn", all_turn), ("final_turn", final_turn)):
        values = []
        for a, b in pairs:
            b = Image.open(b).convert("RGB")
            a = np.asarray(Image.open(a).convert("RGB").resize(b.size), np.float64) / 255
            d = a - np.asarray(b, np.float64) / 255
            values.append((np.abs(d).mean(), (d * d).mean()))
        got = found["tables"][table]["micro"]
        assert [got[k]["mean"] for k in ("l1", "l2")] == pytest.approx(np.mean(values, 0), abs=1e-9)
        assert found["left_out"] == {"clip_i": "no --clip", "dino": "no --dino", "clip_t": "no --clip"}


def test_chain_edits_its_own_results(at, tmp_path):
    """iter_2 is the first result edited again: what sample.py makes of the same instructions."""
    ask(at, "magicbrush", tmp_path / "out", image_size=16)
    again = bench.open_bench("magicbrush", str(at / "magicbrush"), True)
    row = next(r for r in again.rows if r.key == "101/101_iter_2")
    seen = bench.source_of(row, tmp_path / "out/pictures")
    assert np.array_equal(seen, pixels(tmp_path / "out/pictures/101/101_1.png"))
    free = pixels(tmp_path / "out/pictures/101/101_iter_2.png")
    assert not np.array_equal(free, pixels(tmp_path / "out/pictures/101/101_inde_2.png"))


def test_holes_are_filled_and_nothing_else(at, tmp_path):
    for name in ("userbench", "pie", "editbench", "magicbrush"):
        ask(at, name, tmp_path / name, ckpt=at / "inpaint")
        b = bench.open_bench(name, str(at / name), True)
        for r in b.rows:
            result = pixels(bench.result_of(tmp_path / name / "pictures", r.key))
            source = bench.source_of(r, tmp_path / name / "pictures")
            mask = bench.mask_of(b, r, *source.shape[:2]) > 0
            assert np.array_equal(result[~mask], source[~mask]) and (result != source)[mask].any()
    found = json.loads((tmp_path / "pie/results.json").read_text())["tables"]["all"]["micro"]
    found = found["psnr_unedited"]
    assert found["mean"] is None and found["n"] == 3  # equal outside: infinite
    assert "inf" in (tmp_path / "pie/table.txt").read_text()


def test_baselines_where_captions_are_known(at, tmp_path):
    """METHOD:BASE of sets that say what a result shows; refused where one says nothing, or has no masks."""
    def change(name, ckpt, out, **kw):
        got = ask(at, name, tmp_path / out, ckpt=ckpt, metrics="l1_source", steps=4, **kw)
        table = next(iter(got["tables"].values()))
        assert table["results"] == table["expected"] == 3
        return table["micro"]["l1_source"]["mean"]

    base = at / "inpaint"
    little, much = (change("emu", f"sdedit:{base}", f"e{s}", strength=s) for s in (0.25, 1.0))
    assert 0.01 < little < much
    free, inside = (change("pie", f"{m}:{base}", m, strength=1.0) for m in ("sdedit", "blended"))
    assert inside < 0.7 * free  # what the masks keep stays
    assert change("pie", f"diffedit:{base}", "diffedit") > 0
    line = refused(ask, at, "gedit", tmp_path / "g", ckpt=f"sdedit:{base}")
    assert "sdedit needs captions of the results, and rows of gedit have none" in line
    assert "blended needs masks" in refused(ask, at, "emu", tmp_path / "h", ckpt=f"blended:{base}")


def test_pictures_too_small_for_a_measure(at, tmp_path):
    put(imgedit(tmp_path / "data") / "animal/1.jpg", noise(1, 20, 5))
    line = refused(ask, at, "imgedit", tmp_path / "out", data=tmp_path / "data", metrics="ssim_source")
    assert "--metrics: 1082: ssim: pictures of 20x5 pixels" in line


def test_region_is_shown_on_request(at, tmp_path):
    for name, region in (("a", False), ("b", True)):
        ask(at, "pie", tmp_path / name, region=region)
    a, b = (pixels(next((tmp_path / x / "pictures").rglob("*.jpg"))) for x in "ab")
    assert not np.array_equal(a, b)


def test_missing_and_damaged_results(at, tmp_path):
    """They are said and counted, neither zero nor left out in silence; once there they are scored."""
    ask(at, "gedit", tmp_path / "made")
    tree = shutil.copytree(tmp_path / "made/pictures", tmp_path / "tree")
    (tree / "fullset/style_change/en/k1.png").rename(tree / "away")
    (tree / "fullset/subject-replace/en/k2.png").write_bytes(b"x")
    found = ask(at, "gedit", tmp_path / "out", results=tree)
    en = found["tables"]["en"]
    assert (en["expected"], en["results"], en["micro"]["l1_source"]["n"]) == (3, 1, 1)
    assert en["missing"] == {"no file": 1, "not a readable picture": 1}
    assert found["tables"]["en, intersection"]["micro"]["l1_source"]["n"] == 0
    text = (tmp_path / "out/table.txt").read_text()
    assert "1 results of 3 rows" in text and "missing: 1 row(s): no file" in text and "1 of 3" in text
    (tree / "away").rename(tree / "fullset/style_change/en/k1.png")
    found = ask(at, "gedit", tmp_path / "out", results=tree)["tables"]["en"]
    assert found["results"] == 2 and found["missing"] == {"not a readable picture": 1}
    lines = (tmp_path / "out/rows.0.jsonl").read_text().splitlines()
    shutil.copy(tree / "fullset/style_change/cn/k1.png", tree / "fullset/style_change/en/k3.png")
    again = ask(at, "gedit", tmp_path / "out", results=tree)["tables"]["en"]  # a result that was replaced
    assert again["micro"] != found["micro"]
    new = (tmp_path / "out/rows.0.jsonl").read_text().splitlines()[len(lines):]
    assert [json.loads(x)["key"][-2:] for x in new] == ["k2", "k3"]


def test_goes_on_after_a_kill(at, tmp_path, monkeypatch):
    """Rows that were written are not made again, a line that was cut off is; the tables are the same."""
    whole = ask(at, "emu", tmp_path / "whole", batch_size=1)
    own, scored = benchmark.score, []

    def cut_off(b, r, *args):
        scored.append(r.key)
        if len(scored) == 3:
            raise KeyboardInterrupt
        return own(b, r, *args)

    monkeypatch.setattr(benchmark, "score", cut_off)
    monkeypatch.setattr(bench, "parts", lambda rows, most: ([r] for r in rows))
    with pytest.raises(KeyboardInterrupt):
        ask(at, "emu", tmp_path / "cut", batch_size=1)
    file = tmp_path / "cut/rows.0.jsonl"
    assert len(file.read_bytes().splitlines()) == 2
    file.write_bytes(file.read_bytes()[:-9])
    found = ask(at, "emu", tmp_path / "cut", batch_size=1)
    assert scored == ["0", "1", "2", "1", "2"] and found["tables"] == whole["tables"]


def test_networks_named_by_flags(at, tmp_path):
    """Emu Edit's columns over a small random CLIP; equal captions are not defined, and 0 in another mean."""
    pytest.importorskip("transformers")
    from test_measures_towers import clip_folder, clip_peer

    folder = clip_folder(tmp_path, clip_peer())
    found = ask(at, "emu", tmp_path / "out", clip=folder)
    got = found["tables"]["all"]["micro"]
    lines = [json.loads(x) for x in (tmp_path / "out/rows.0.jsonl").read_text().splitlines()]
    values = [line["clip_dir"] for line in lines]
    assert [v is None for v in values] == [True, False, True]
    assert got["clip_dir"]["n"] == 1 and got["clip_dir"]["mean"] == pytest.approx(values[1])
    assert got["clip_dir_or_0"]["n"] == 3 and got["clip_dir_or_0"]["mean"] == pytest.approx(values[1] / 3)
    assert got["clip_out"]["n"] == 3 and found["left_out"] == {"dino_source": "no --dino"}
    assert found["measures"]["clip_i_source"]["against"] == "source" and found["notes"] == [
        "2 rows with equal captions"]
    assert set(found["measures"]["clip_out"]) >= {"backbone", "weights", "preprocessing", "range"}
    made = tmp_path / "out/pictures"
    sets = ask(at, "emu", tmp_path / "sets", clip=folder, metrics="clip_fid", results=made)
    sets = sets["tables"]["all"]["sets"]["clip_fid"]
    assert sets["n"] == 3 and sets["value"] > 0 and sets["against"] == "sources"
    assert "clip_fid: " in (tmp_path / "sets/table.txt").read_text()
    assert "--clip" in refused(ask, at, "emu", tmp_path / "no", metrics="clip_fid")


def test_another_plan_is_refused(at, tmp_path):
    ask(at, "imgedit", tmp_path)
    assert "was begun with another steps" in refused(ask, at, "imgedit", tmp_path, steps=2)
    assert "was begun with another" in refused(ask, at, "imgedit", tmp_path, data=imgedit(tmp_path / "i"),
                                               metrics="psnr_source")


@pytest.mark.slow
def test_goes_on_after_sigkill(at, tmp_path):
    """Killed between two lines, whenever that is: all that was written stays."""
    whole = ask(at, "omniedit", tmp_path / "whole", batch_size=1)
    command = [sys.executable, ROOT / "evaluate.py", "bench", "--name", "omniedit", "--data", at / "omniedit",
               "--ckpt", at / "editnet", "--steps", 1, "--partial", "True", "--precision", "fp32", "--device",
               "cpu", "--batch_size", 1, "--out", tmp_path / "cut"]
    process, file = subprocess.Popen(list(map(str, command))), tmp_path / "cut/rows.0.jsonl"
    while process.poll() is None and not (file.is_file() and file.stat().st_size):
        time.sleep(0.001)
    process.kill()
    process.wait()
    before = file.read_bytes()
    found = ask(at, "omniedit", tmp_path / "cut", batch_size=1)
    assert found["tables"] == whole["tables"] and file.read_bytes().startswith(before)


@pytest.mark.slow
def test_two_ranks(at, tmp_path):
    """The same rows and pictures as of one; the last rank writes the table."""
    flags = ["--name", "magicbrush", "--data", at / "magicbrush", "--ckpt", at / "editnet", "--steps", 1,
             "--partial", "True", "--precision", "fp32", "--device", "cpu", "--out"]
    one = run_script(ROOT / "evaluate.py", "bench", *flags, tmp_path / "1")
    two = run_ranks(2, [ROOT / "evaluate.py", "bench", *flags, tmp_path / "2"])
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    tables = [json.loads((tmp_path / n / "results.json").read_text())["tables"] for n in "12"]
    assert tables[0] == tables[1] and files(tmp_path / "1/pictures") == files(tmp_path / "2/pictures")
    keys = [{json.loads(x)["key"] for x in (tmp_path / f"2/rows.{r}.jsonl").read_text().splitlines()}
            for r in (0, 1)]
    assert keys[0] and keys[1] and not keys[0] & keys[1]
    about = json.loads((tmp_path / "1/results.json").read_text())
    assert about["command"].startswith("python evaluate.py bench --name magicbrush") and about["date"]


# ---- judges --------------------------------------------------------------------------------------


@pytest.fixture
def server():
    started = []

    def start(trick):
        started.append(Judge(trick))
        return started[-1], f"http://127.0.0.1:{started[-1].server_port}/v1"

    yield start
    for s in started:
        s.shutdown()
        s.server_close()


def of_discs(question):
    return "disc" in question.text


def test_judged_gedit(at, tmp_path, server):
    """Two scores each, min, root, groups; what fails has no score, and is asked again by the next run."""
    broken = [True]

    def trick(n, q):
        if of_discs(q) or q.kind == "pq":
            return None
        if "artefacts" in q.text:
            return {"id": q.mark, "score": [9, 7], "reasoning": "x"}
        if "a dog" in q.text and broken[0]:
            return "[6, 0]"
        return {"id": q.mark, "score": [9, 9] if "a dog" in q.text else [8, 6], "reasoning": "x"}

    judge, url = server(trick)
    kw = dict(judge=url, judge_model="m", data=at / "gedit")
    found = ask(at, "gedit", tmp_path, **kw)
    en = found["tables"]["en"]
    assert en["results"] == 3 and en["missing"] == {"judge: sc: unparsed: 0 JSON objects": 1}
    assert en["micro"]["o"]["mean"] == pytest.approx(42**0.5) and en["micro"]["o"]["n"] == 2
    assert en["micro"]["l1_source"]["n"] == 3 and found["judge"] == {"url": url, "model": "m"}
    asked, broken[0] = len(judge.asked), False
    en = ask(at, "gedit", tmp_path, **kw)["tables"]["en"]
    assert en["groups"]["subject-replace"]["o"]["mean"] == pytest.approx(63**0.5)
    assert en["macro"]["o"]["mean"] == pytest.approx((63**0.5 + 42**0.5) / 2)
    assert en["micro"]["o"]["mean"] == pytest.approx((63**0.5 + 2 * 42**0.5) / 3)
    assert len(judge.asked) == asked + 14 + 2  # the self-test, and one row
    assert not en["missing"]


def test_judged_omniedit_and_its_budget(at, tmp_path, server):
    judge, url = server(lambda n, q: None if of_discs(q) or q.kind == "pq" else {
        "id": q.mark, "reasoning": "x", "score": [10, 10] if "swap" in q.text else [8, 5]})
    line = refused(ask, at, "omniedit", tmp_path, judge=url, judge_model="m", budget=24)
    assert "budget of 24 requests is spent: the same command goes on" in line
    before = (tmp_path / "rows.0.jsonl").read_text().splitlines()
    assert 3 <= len(before) <= 5  # of the ten requests after the self-test some go to rows that do not end
    found = ask(at, "omniedit", tmp_path, judge=url, judge_model="m")["tables"]["all"]
    assert found["micro"]["o"]["mean"] == pytest.approx((80**0.5 + 6 * 40**0.5) / 7)
    assert found["micro"]["accuracy"]["mean"] == pytest.approx(1 / 7) and found["micro"]["sc"]["n"] == 7
    assert (tmp_path / "rows.0.jsonl").read_text().splitlines()[:len(before)] == before


def test_judged_imgedit(at, tmp_path, server):
    """Its own prompts and reply form; its scorer's files; both numbers called Overall."""
    _, url = server(lambda n, q: None if "Judge: " not in q.text else (
        "Brief reasoning: good\nA: 5\nB: 4\nC: 4" if "add a cube" in q.text else "A: 2\nB: 2\nC: 1"))
    found = ask(at, "imgedit", tmp_path, judge=url, judge_model="m")
    assert found["overall"] == {"types": {"adjust": 1.67, "add": 4.33},
                                "overall of types": pytest.approx(3), "overall of items": pytest.approx(3)}
    assert "Overall: 3.00 of the types, 3.00 of the items" in (tmp_path / "table.txt").read_text()
    replies = json.loads((tmp_path / "result.json").read_text())
    assert set(replies) == {"1082", "673"} and replies["673"].endswith("C: 4")
    assert json.loads((tmp_path / "pictures/basic_edit.json").read_text())["1082"]["prompt"] == "make it red "
    line = refused(ask, at, "imgedit", tmp_path / "n", data=imgedit(tmp_path / "bare", False), judge=url,
                   judge_model="m")
    assert "no prompt for add, adjust in judge_prompt.json" in line


# ---- bad input: one line -------------------------------------------------------------------------


def broken(name, root, change):
    change(MAKE[name](root / name))
    return str(root / name)


def rewrite(file, change):
    def act(root):
        content = json.loads((root / file).read_text())
        content = change(content) or content
        (root / file).write_text(json.dumps(content))
    return act


def unlink(file):
    return lambda root: next(root.glob(file)).unlink()


BAD = {  # name -> benchmark, what happens to it, words of the line
    "no sessions": ("magicbrush", unlink("edit_sessions.json"), "edit_sessions.json: No such file"),
    "no descriptions": ("magicbrush", unlink("local*"), "local_descriptions.json: No such file"),
    "no target": ("magicbrush", unlink("images/101/101-output2.png"), "101/101-output2.png: no such file in"),
    "no caption": ("magicbrush", rewrite("local_descriptions.json", lambda c: c["101"].clear()),
                   "local_descriptions.json has no 101-output1.png"),
    "train split": ("magicbrush", rewrite("edit_sessions.json", lambda c: c["key0"][0].update(mask=None)),
                    "turn 1: input, output, mask or instruction is missing"),
    "edit_turns": ("magicbrush", rewrite("edit_sessions.json", lambda c: c["key0"]), "not a JSON object"),
    "outside": ("magicbrush", rewrite("edit_sessions.json", lambda c: c["key0"][0].update(
        mask="../../../edit_sessions.json")), "leaves the data folder"),
    "another folder": ("magicbrush", rewrite("edit_sessions.json", lambda c: c["key0"][0].update(
        input="..-x")), "is no folder's name"),
    "no emu": ("emu", lambda root: shutil.rmtree(root / "data"), "no parquet or Arrow file there"),
    "two splits": ("emu", lambda root: emu(root, 2, "validation-00000-of-00001"),
                   "no split of 3,589 rows, Emu Edit's test split, among test 3, validation 2"),
    "file missing": ("emu", lambda root: (root / "data/test-00000-of-00001.parquet").rename(
        root / "data/test-00000-of-00002.parquet"), "1 of the 2 files of test: complete the download"),
    "columns": ("gedit", lambda root: (shutil.rmtree(root), gedit(root, drop="Intersection_exist")),
                "no column Intersection_exist among"),
    "arrow cut": ("gedit", lambda root: (root / "train/data-00001-of-00002.arrow").write_bytes(b"ARROW1"),
                  "not an Arrow file, or damaged"),
    "arrow missing": ("gedit", unlink("train/data-00001*"), "1 of the 2 files of train"),
    "pie is not imgedit": ("imgedit", lambda root: (root / "basic_edit.json").write_text(
        (pie(root / "p") / "mapping_file.json").read_text()), "id, prompt or edit_type is missing"),
    "odd mask": ("pie", lambda root: pie(root, (1, 2, 3)), "mask: 3 numbers: a start without its length"),
    "mask of words": ("pie", lambda root: pie(root, ("1", 2)), "mask: not a list of whole numbers"),
    "picture": ("pie", unlink("annotation_images/*/*/*.jpg"), "no such file in"),
    "path": ("pie", rewrite("mapping_file.json", lambda c: c["000000000000"].update(
        image_path="../annotation_images/0_kind/1_artificial/000000000000.jpg")), "is no path below"),
    "type": ("pie", rewrite("mapping_file.json", lambda c: c["000000000000"].update(editing_type_id="12")),
             "editing_type_id: '12': is none of 0 to 9"),
    "multi-turn": ("imgedit", rewrite("basic_edit.json", lambda c: {"1": {
        "id": "animal/1.jpg", "turn1": "x"}}), "id, prompt or edit_type is missing"),
    "source": ("imgedit", unlink("animal/1.jpg"), "animal/1.jpg: no such file in"),
    "column": ("editbench", lambda root: (root / "annotations_natural.csv").write_text("aos,prompt\na0,x\n"),
               "no column aos or prompt_full"),
    "mask": ("editbench", unlink("masks_natural/a1.png"), "a1.png: no such file in"),
    "no csv": ("editbench", unlink("annotations_generated.csv"), "annotations_generated.csv: No such file"),
    "tasks": ("omniedit", lambda root: (root / "prompts.jsonl").write_text(
        (root / "prompts.jsonl").read_text().rpartition("\n")[0]), "p0.png: 6 edits, its form has one of"),
    "climbs": ("omniedit", lambda root: (root / "prompts.jsonl").write_text(
        '{"picture": "../pictures/p0.png", "task": "add", "instruction": "y"}'), "picture is no file's name"),
    "task": ("omniedit", lambda root: (root / "prompts.jsonl").write_text(
        '{"picture": "p0.png", "task": "x", "instruction": "y"}'), "task: 'x': is none of swap"),
    "no prompts": ("userbench", lambda root: [p.unlink() for p in root.glob("*/prompts.jsonl")],
                   "no TASK/prompts.jsonl"),
    "not json": ("userbench", lambda root: (root / "erase/prompts.jsonl").write_text("{"),
                 "not JSON in UTF-8"),
    "twice": ("userbench", lambda root: (root / "erase/prompts.jsonl").write_text(
        '{"name": "u0", "prompt": ""}\n' * 2), "erase/u0: 1 key(s) a second time"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sets(tmp_path, name):
    which, change, words = BAD[name]
    line = refused(bench.open_bench, which, broken(which, tmp_path, change), partial=True)
    assert words in line, line


@pytest.mark.parametrize("name", MAKE)
def test_parts_of_a_benchmark_need_to_be_asked_for(at, name):
    line = refused(bench.open_bench, name, str(at / name))
    assert "the published set has" in line or "no split of 3,589" in line


@pytest.mark.parametrize("flags, words", [
    ({"ckpt": "", "results": ""}, "give either an editor or a tree"),
    ({"results": "gone", "ckpt": ""}, "gone: no such folder"),
    ({"data": "gone"}, "gone: no such file or folder"), ({"metrics": "clip_i"}, "--clip: clip_i needs it"),
    ({"metrics": "nice"}, "'nice' is no measure"), ({"judge": "http://x/v1"}, "has no judged scores"),
    ({"ckpt": "inpaint"}, "is an inpainting model; instructions are to be followed"),
    ({"steps": 0}, "--steps: 0"), ({"image_size": 3}, "--image_size: 3: must be a multiple"),
    ({"clip": "gone"}, "error: --clip: ")])
def test_bad_flags(at, tmp_path, flags, words):
    flags = {k: str(at / v) if k == "ckpt" and v else v for k, v in flags.items()}
    assert words in refused(ask, at, "emu", tmp_path, **flags)


def test_commands_keep_their_form(monkeypatch, tmp_path, at):
    """The tasks are positional, and bench is one more; an unknown flag is told with the nearest one."""
    done = run_script(ROOT / "evaluate.py", "bench", "--name", "imgedit", "--dta", "x")
    assert done.returncode != 0 and "--dta: there is no such flag: use --data" in done.stderr
    done = run_script(ROOT / "evaluate.py", "scenes", "--n", 1, "--ckpt", at / "inpaint", "--device", "cpu",
                      "--out", tmp_path)
    assert "error: --n: 1: use 2 to" in done.stderr
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "compare"])
    assert evaluate.common.parse(evaluate.Config).task == "compare"
