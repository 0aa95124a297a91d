"""readers/report.py and report.html: pages of small runs made with the real writers, and one in a browser."""

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

import checkpoint
import common
import log
from common import Dist
from readers import report as reports
from readers.report import Report, report
from scenes import results

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TEMPLATE = (Path(reports.__file__).parent / "report.html").read_text()
NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def rng_pictures(n, side=16, seed=0):
    """[n, 3, side, side] in [-1, 1]"""
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (n, 3, side, side))).float()


def sheet(step, rows=3, side=16, caption="a red star"):
    x, base, tuned = (rng_pictures(rows, side, seed) for seed in (0, 1, 100 + step))
    return log.contact_sheet(list(zip(x, x * 0, base, tuned)), ["picture", "input", "base", "tuned"],
                             [f"{caption} {i}" for i in range(rows)],
                             scores={"aesthetic_tuned": [0.5, -1.0, math.nan][:rows]})


def pefl(folder, steps=(10, 20, 30), resumed=None, scale=1.0, sheets=True, caption="a red star", close=True):
    """A run folder as train_pefl.py leaves it: metrics of a few keys, sheets, no checkpoint."""
    metrics = log.Metrics(folder, Dist(), {"lr": 1e-5, "base": "assets/base"}, "off", resumed_from=resumed)
    for step in steps:
        metrics.add(**{"reward/aesthetic": torch.tensor([scale * step, scale * step]), "loss/G": 1.0 / step})
        judged = {"judge/aesthetic_base": 0.5, "judge/aesthetic_tuned": step / 10, "alarm/saturation": 1.0}
        metrics.flush(step, judged | {"lr": 1e-5, "perf/img_s": 10.0, "phase": 1})
        if sheets:
            metrics.images(step, {"samples": sheet(step, caption=caption)})
    if close:
        metrics.close()
    return folder


def page_of(tmp_path, *runs, **settings):
    """The page of some folders, and the data in it."""
    out = tmp_path / "page/report.html"
    report(Report(runs=runs, out=out, **settings))
    page = out.read_text()
    inline = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1]
    return page, json.loads(inline)


def curves_of(data):
    return {chart["key"]: chart["curves"] for panel in data["panels"] for chart in panel["charts"]}


def test_a_run(tmp_path):
    page, data = page_of(tmp_path, pefl(tmp_path / "pefl"))
    curves = curves_of(data)
    assert [p["group"] for p in data["panels"]] == ["reward", "judge", "alarm", "loss", "perf", ""]
    assert curves["reward/aesthetic"][0]["x"] == curves["reward/aesthetic"][0]["y"] == [10, 20, 30]
    assert {(c["label"], c["dash"]) for c in curves["judge/aesthetic"]} == {("base", 1), ("tuned", 0)}
    about = data["runs"][0]["about"]
    assert data["runs"][0]["name"] == "pefl" and about.get("commit") == log.git_revision()
    assert about["command"].startswith("python ") and "cores" in about["machine"]
    assert data["runs"][0]["config"] == {"lr": "1e-05", "base": "assets/base"} and not data["alarms"]
    (gallery,) = data["galleries"]
    assert gallery["columns"] == ["picture", "input", "base", "tuned"] and gallery["steps"] == [10, 20, 30]
    first, _, third = gallery["rows"]
    assert first["title"] == "a red star 0" and third["scores"]["aesthetic_tuned"] == [None] * 3
    assert len(set(first["cells"][2])) == 1 and len(set(first["cells"][3])) == 3  # base stays, tuned changes
    assert len(data["pictures"]) == 3 + 1 + 3 + 9  # each once: black ones are one
    (worst,) = data["worst"]  # without those whose score is no number
    assert [r["title"] for r in worst["rows"]] == ["a red star 1", "a red star 0"]
    assert worst["rows"][0]["pictures"] == [[c, first["cells"] and gallery["rows"][1]["cells"][i][-1]]
                                            for i, c in enumerate(gallery["columns"])]
    assert len(page) < 300_000


def test_a_checkpoint_says_what_starts_do_not(tmp_path):
    folder = pefl(tmp_path / "a", sheets=False)
    meta = {"config": {"lr": 2.0}, "samples": 320, "precision": "fp32"}
    checkpoint.save(folder, 30, {"model": {"w": torch.zeros(2)}}, meta)
    about = page_of(tmp_path, folder)[1]["runs"][0]["about"]
    assert about["samples"] == "320" and about["precision"] == "fp32" and about["checkpoint"] == "30"
    (folder / "starts.jsonl").unlink()  # a run of an earlier version
    run = page_of(tmp_path, folder)[1]["runs"][0]
    assert run["config"] == {"lr": "2.0"} and run["about"].get("commit") == log.git_revision()
    (folder / "step_00000030/manifest.json").write_text("{")
    run = page_of(tmp_path, folder)[1]["runs"][0]
    assert any("manifest.json: is damaged" in n for n in run["notes"])


def test_a_resumed_run(tmp_path):
    """Killed at step 40, resumed from 20: what stood of 30 and 40 counts no more; a torn row is no fault."""
    folder = pefl(tmp_path / "a", (10, 20, 30, 40), sheets=False, scale=1)
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 50, "reward/aes')
    _, data = page_of(tmp_path, folder)
    assert any("half" in n for n in data["runs"][0]["notes"])
    pefl(folder, (30, 40, 50), resumed=20, sheets=False, scale=2)
    _, data = page_of(tmp_path, folder)
    (curve,), run = curves_of(data)["reward/aesthetic"], data["runs"][0]
    assert curve["x"] == [10, 20, 30, 40, 50] and curve["y"] == [10, 20, 60, 80, 100]
    assert run["about"]["start 1"].count(",") >= 3 and "start 2" not in run["about"]
    assert run["resumes"] == [20] and len(run["notes"]) == 1 and "2 rows were done again" in run["notes"][0]
    pefl(folder, (10, 20), sheets=False, scale=3)  # begun anew in its folder
    (curve,) = curves_of(page_of(tmp_path, folder)[1])["reward/aesthetic"]
    assert curve["y"] == [30, 60]


def test_rows_of_one_step_are_one(tmp_path):
    metrics = log.Metrics(tmp_path / "a", Dist(), {}, "off")
    metrics.flush(10, {"loss/preference": 1.0, "reward/better": 1.0})
    metrics.flush(10, {"val/acc": 0.5})
    metrics.close()
    curves = curves_of(page_of(tmp_path, tmp_path / "a")[1])
    assert {k: c[0]["x"] for k, c in curves.items()} == dict.fromkeys(
        ("reward/better", "loss/preference", "val/acc"), [10])


def test_edited_by_hand(tmp_path, capsys):
    """What is no row is named and left out; a file of such lines is refused; odd values do no harm."""
    folder = pefl(tmp_path / "a", sheets=False)
    path = folder / "metrics.jsonl"
    good = path.read_text()
    odd = [{"step": 40, "loss/G": None}, {"step": 50, "loss/G": 1e308, "note": [1], "loss/D": True},
           {"step": 60, "loss/G": 0.5, "alarm/hacking": "look at me"}]
    big = '{"step": 70, "loss/G": 1' + "0" * 400 + "}\n"
    path.write_text(good + "what?\n[1]\n" + '{"loss": 1}\n{"step": -1}\n{"step": 1.5}\n\n'
                    + "".join(json.dumps(x) + "\n" for x in odd) + big)
    data = page_of(tmp_path, folder)[1]
    curve = curves_of(data)["loss/G"][0]
    assert curve["x"] == [10, 20, 30, 40, 50, 60, 70] and curve["y"][3:] == [None, None, 0.5, None]
    assert curve["bad"] == [40, 50, 70] and "loss/D" not in curves_of(data)
    assert "line 4, 5, 6, 7, 8" in data["runs"][0]["notes"][0] and "line 4, 5" in capsys.readouterr().err
    assert ("alarm/hacking", "look at me") in {(a["key"], a["text"]) for a in data["alarms"]}
    path.write_text("rubbish\n" * 50)
    with pytest.raises(SystemExit, match=r"error: .*metrics.jsonl line 11: no row of metrics"):
        page_of(tmp_path, folder)
    path.write_text("")
    assert "has no rows yet" in page_of(tmp_path, folder)[1]["runs"][0]["notes"][0]


def test_long_runs_keep_their_spikes(tmp_path):
    """40,000 rows: at most `points` places, and the value that is a thousand times the others is there."""
    values = 1 + 0.1 * np.sin(np.arange(40_000) / 500)
    values[27_777], values[5_000] = 1000, -50
    (tmp_path / "a").mkdir()
    with open(tmp_path / "a/metrics.jsonl", "w") as f:
        f.writelines(f'{{"step": {i}, "loss/G": {v if i != 20_000 else "null"}}}\n'
                     for i, v in enumerate(values.tolist()))
    page, data = page_of(tmp_path, tmp_path / "a")
    (curve,) = curves_of(data)["loss/G"]
    assert len(curve["x"]) == len(curve["y"]) == len(curve["lo"]) == 400 and len(page) < 150_000
    assert max(curve["hi"]) == 1000 and min(curve["lo"]) == -50 and curve["bad"] == [20_000]
    assert abs(curve["x"][curve["hi"].index(1000)] - 27_777) <= 100 and curve["bads"] == 1
    assert np.all(np.diff(curve["x"]) > 0) and None not in curve["y"]
    x, y, lo, hi = reports.thin(np.arange(10), np.arange(10.0), 5)
    assert lo is hi is None and len(x) == 10


def test_nothing_of_a_file_becomes_html(tmp_path):
    """Two runs of one name, whose name, captions, flags and keys try to leave the script element."""
    runs = [pefl(tmp_path / a / "script><script>alert(1)<", caption=NASTY) for a in ("<", "b")]
    with open(runs[0] / "metrics.jsonl", "a") as f:
        f.write(json.dumps({"step": 99, NASTY: 1.0, "alarm": NASTY, "x/\u202e\udc80": 2}) + "\n")
    with open(runs[0] / "starts.jsonl", "a") as f:
        f.write(json.dumps({"command": NASTY, "config": {NASTY: NASTY}}) + "\n")
    page, data = page_of(tmp_path, *runs)
    assert [r["name"] for r in data["runs"]] == ["</script><script>alert(1)<", "b/script><script>alert(1)<"]
    assert NASTY in curves_of(data) and data["runs"][0]["config"] == {NASTY: NASTY}
    assert data["galleries"][0]["rows"][0]["title"].startswith(NASTY)
    for tag in ("<script", "</script", "<img", "onerror", "alert("):
        outside = page.replace(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"), "")
        assert outside.count(tag) == TEMPLATE.count(tag), tag
    assert "<" not in page[page.index('type="application/json">') + 24:].split("</script>")[0]


def test_no_remote_references(tmp_path):
    page, data = page_of(tmp_path, pefl(tmp_path / "a"))
    rest = re.sub(r"data:image/\w+;base64,[\w+/=]+", "", page)
    assert "://" not in rest and "//" not in re.sub(r"(^|\s)// .*", "", rest)
    assert "default-src 'none'; img-src data:;" in page
    for word in ("fetch(", "XMLHttp", "import(", "innerHTML", "outerHTML", "insertAdjacent", "eval(", "<link",
                 "url(", "@import", "srcset", "document.write"):
        assert word not in TEMPLATE, word
    assert data["pictures"] and all(re.fullmatch(r"data:image/(webp|jpeg);base64,[\w+/=]+", p)
                                    for p in data["pictures"])


def judged(folder, n=6, offset=10, saved=None):
    """What `evaluate.py scenes` leaves: two editors and the truth. Scene 13 is the second's worst."""
    folder.mkdir(parents=True)
    rng, names = np.random.default_rng(0), ["base@20", "pefl@8"]
    scores = {"edit/attributes": np.ones((2, n), np.float32),
              "edit/exact": rng.uniform(0, 0.1, (2, n)).astype(np.float32)}
    scores["edit/attributes"][1, 3] = 0.0
    scores["edit/exact"][1, 4] = np.nan
    tasks = {"edit": {name: {k.split("/")[1]: log.bootstrap(v[e]) for k, v in scores.items()}
                      for e, name in enumerate(names)}}
    tasks["edit"]["truth"] = {"attributes": log.bootstrap(np.ones(n)), "exact": log.bootstrap([])}
    about = log.provenance(0.0) | {"config": {"offset": offset, "n": n}}
    log.write_json(folder / "results.json", about | {"tasks": tasks})
    np.savez_compressed(folder / "scores.npz", names=names, **scores)
    made = log.contact_sheet([list(rng_pictures(3))], ["source", *names], ["edit: a star"])
    log.save_sheet(made, folder / "sheet.png")
    for e, name in enumerate(names if saved else ()):
        pictures = rng.integers(0, 255, (1, n, 12, 12, 3), np.uint8)
        cases = {"edit": SimpleNamespace(indices=list(range(offset, offset + n)))}
        results.save_result(results.Result("scenes", name, 12, 1, {"edit": pictures}), cases, [0],
                             saved / name)
    return folder


def test_judges(tmp_path):
    folder = judged(tmp_path / "judge", saved=tmp_path / "saved")
    data = page_of(tmp_path, folder, tmp_path / "saved", worst=2)[1]
    (judge,) = data["judges"]
    (table,) = judge["tables"]
    assert table["title"] == "edit" and table["columns"] == ["base@20", "pefl@8", "truth"]
    assert table["bounds"] == [False, False, True]
    name, percent, better, (base, pefl, truth) = table["rows"][0]
    assert (name, percent, better) == ("attributes", True, 1) and pefl[0] == pytest.approx(5 / 6, abs=1e-4)
    assert pefl[1] < pefl[0] < pefl[2] and base == truth == [1, 1, 1]
    assert table["rows"][1][:3] == ["exact", False, -1] and table["rows"][1][3][2] == [None] * 3
    assert judge["about"].get("commit") == log.git_revision()

    assert [w["title"] for w in data["worst"]] == ["judge: edit, base@20", "judge: edit, pefl@8"]
    of_pefl = data["worst"][1]["rows"]
    assert of_pefl[0]["title"] == "scene 13" and of_pefl[0]["scores"]["attributes"] == 0
    exact = np.load(folder / "scores.npz")["edit/exact"][1]
    assert of_pefl[1]["title"] == f"scene {10 + np.nanargmax(np.where(np.arange(6) == 3, np.nan, exact))}"
    assert [name for name, _ in of_pefl[0]["pictures"]] == ["pefl@8", "base@20"]  # the one in question first
    encoded = data["pictures"][of_pefl[0]["pictures"][0][1]]
    expected = np.array(Image.open(tmp_path / "saved/pefl@8/edit/seed_0/000013.png"))
    assert encoded == reports.encode(expected, (384, 384))
    assert data["galleries"][0]["columns"] == ["source", "base@20", "pefl@8"]


def test_the_worst_of_a_filled_hole_is_told_by_its_texture():
    """As results.compare decides: a blur has the smaller `exact`, and would hide."""
    scores = {"attributes": np.ones(3), "exact": np.array([0.3, 0.1, 0.2]), "seam": np.zeros(3),
              "texture": np.array([0.1, 0.9, 0.5])}
    assert reports.worst_of(scores, 2) == [1, 2]
    a, b = ({k: v[None, [i]] for k, v in scores.items()} for i in (1, 2))
    assert results.compare(a, b, 0.05)["overall"]["bad"] == 1


def test_comparisons(tmp_path):
    """What `evaluate.py compare` writes, and edits by aspect, however deep the tables are."""
    same = np.full((1, 4), 0.1)
    a = {"attributes": np.array([[1.0, 1, 0, 1]]), "texture": same, "exact": same, "seam": same}
    b = a | {"attributes": np.array([[0.0, 1, 0, 0]])}
    more = {k: log.bootstrap(v[0]) for k, v in a.items()}
    found = {"a": "A", "b": "B", "tasks": {"edit": {"gsb": results.compare(a, b, 0.05), "difference": more}}}
    (tmp_path / "c").mkdir()
    log.write_json(tmp_path / "c/results.json", found)
    gsb, difference = page_of(tmp_path, tmp_path / "c")[1]["judges"][0]["tables"]
    assert gsb["gsb"][0][:5] == ["overall", 2, 2, 0, 200.0] and gsb["title"] == "edit"
    assert difference["columns"] == ["A - B"] and difference["rows"][0][3] == [[0.75, 0.25, 1.0]]
    leaf = log.bootstrap(np.arange(4))
    deep = {"aspects": {"1x1": {"size": [8, 8], "tasks": {"remove": {"e": {"success": leaf}}},
                                "parser": {"remove": {"truth_read": leaf}}}}}
    assert [t["title"] for t in reports.tables_of(deep)] == ["1x1 / remove", "1x1 / parser"]
    assert reports.tables_of({"t2i": {"e": {"drawn": leaf}}})[0]["title"] == "t2i"
    assert reports.SHARE == results.SHARE and set(reports.LOWER) <= set(results.ORDER)


def test_sheets_come_apart(tmp_path):
    """The very pixels of every cell, whatever is magnified, missing or of another size."""
    pictures = (rng_pictures(4, 16) + 1).mul(127.5).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    small = pictures[3][:8]
    rows = [[Image.fromarray(pictures[0]), None], [Image.fromarray(pictures[1]), Image.fromarray(small)]]
    made = log.contact_sheet(rows, ["a", "a"], ["one", "two " * 60], scores={"s": [1.0, math.nan]})
    log.save_sheet(made, tmp_path / "s.png")
    titles, names, cells, scores = reports.cells_of(tmp_path / "s.png")
    assert titles == ["a", "a (2)"] and names[0] == "one"
    assert scores["s"][0] == 1 and math.isnan(scores["s"][1])
    assert np.array_equal(cells[0][0], pictures[0]) and cells[0][1] is None
    assert np.array_equal(cells[1][0], pictures[1]) and np.array_equal(cells[1][1], small)
    plan = json.loads(made.info["cells"])
    for flaw in ({"scale": 0}, {"boxes": [[[0, 0, 9999, 5]]]}, {"boxes": [[[-1, 0, 5, 5]]]}, {"titles": 3},
                 {"scores": [1]}, {"boxes": [[[0, 0, "5", 5]]]}, {"boxes": []}):
        made.info["cells"] = json.dumps(plan | flaw)
        log.save_sheet(made, tmp_path / "s.png")
        assert reports.cells_of(tmp_path / "s.png")[0] == ["sheet"], flaw
    made.save(tmp_path / "s.png")  # as an earlier version did
    titles, _, cells, _ = reports.cells_of(tmp_path / "s.png")
    assert titles == ["sheet"] and cells[0][0].shape[:2] == made.size[::-1]


def test_it_stays_small(tmp_path):
    """Sheets beyond --max_mb are left out, the newest last, and that is said; curves go coarser before."""
    folder = pefl(tmp_path / "a", range(10, 70, 10), sheets=False)
    metrics = log.Metrics(folder, Dist(), {}, "off")
    for step in range(10, 70, 10):
        metrics.images(step, {"samples": sheet(step, 2, 48)})
    metrics.close()
    page, data = page_of(tmp_path, folder, max_mb=0.15)
    assert len(page.encode()) <= 150_000 and data["pictures"]
    assert 60 in data["galleries"][0]["steps"] and 1 < len(data["galleries"][0]["steps"]) < 6
    assert any("do not fit into 0.15 MB" in n for n in data["notes"])
    assert page_of(tmp_path, folder, max_mb=5)[1]["galleries"][0]["steps"] == list(range(10, 70, 10))
    with pytest.raises(SystemExit, match=r"error: --max_mb: 0.01: .* give at least 0\.0\d"):
        page_of(tmp_path, folder, max_mb=0.01)
    assert reports.looked_at(1) == [0] and reports.looked_at(5)[:3] == [4, 0, 2]
    assert sorted(reports.looked_at(37)) == list(range(37))


def alarms(**series):
    """{key with __ for /: values} -> [(step, key)] at steps 10, 20, ..."""
    found = {k.replace("__", "/"): (10 * np.arange(1, len(v) + 1), np.array(v, float))
             for k, v in series.items()}
    return [(step, key) for step, key, _ in reports.alarms_of(found)]


@pytest.mark.parametrize("key, healthy, fires, at", [
    ("alarm__saturation", [1, 1.1, 0.9, 1.2], [1, 1.2, 1.7, 1.8], [30]),
    ("alarm__laplacian", [0.4, 0.35, 0.5, 0.3], [0.4, 0.2, 0.4, 0.2], [20, 40]),
    ("alarm__change_outside_mask", [0.03, 0.04, 0.045], [0.03, 0.04, 0.1], [30]),
    ("alarm__weight_drift", [0.01, 0.02, 0.03, 0.04], [0.01, 0.02, 0.03, 0.1], [40]),
    ("coherence__accuracy", [0.9, 0.7, 0.98], [0.9, 0.995, 1], [20]),
    ("perf__data_wait", [0.9, 0.02, 0.05], [0.9, 0.02, 0.3], [30]),
    ("loss__G", [1, 2, 1e6], [1, math.nan, math.nan], [20])])
def test_alarms(key, healthy, fires, at):
    assert not alarms(**{key: healthy})
    assert alarms(**{key: fires}) == [(step, key.replace("__", "/")) for step in at]


def test_a_hacked_reward(tmp_path):
    """Trained rewards rise; it is hacking where the held-out one is below the base's twice running."""
    base = {"judge__heldout_base": [1, 1, 1, 1], "judge__alignment_base": [0, 0, 0, 0]}
    up = base | {"judge__alignment_tuned": [1, 2, 3, 4]}
    assert not alarms(**up, judge__heldout_tuned=[1, 2, 0.9, 1.1])
    assert alarms(**up, judge__heldout_tuned=[1, 0.9, 0.8, 0.7]) == [(30, "judge/heldout_tuned")]
    assert not alarms(**base, judge__alignment_tuned=[0] * 4, judge__heldout_tuned=[0.9] * 4)
    metrics = log.Metrics(tmp_path / "a", Dist(), {}, "off")
    for step, reward in ((10, 1.0), (20, math.nan), (30, math.inf)):
        metrics.add(**{"reward/aesthetic": reward})
        metrics.flush(step)
    metrics.close()
    data = page_of(tmp_path, tmp_path / "a")[1]
    assert [(a["step"], a["key"]) for a in data["alarms"]] == [(20, "reward/aesthetic")]
    assert curves_of(data)["reward/aesthetic"][0]["bad"] == [20, 30]


def test_bad_input(tmp_path, capsys):
    run = pefl(tmp_path / "run", sheets=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "j").mkdir()

    def refused(match, *runs, **settings):
        with pytest.raises(SystemExit, match=match) as e:
            report(Report(runs, **({"out": tmp_path / "r.html"} | settings)))
        assert "\n" not in str(e.value) and str(e.value).startswith("error: ")
        assert not (tmp_path / "r.html").exists() and not list(tmp_path.glob(".*"))

    refused("no RUN")
    refused("RUN: .*nowhere: no such folder", tmp_path / "nowhere")
    refused("RUN: .*metrics.jsonl: is no folder", run / "metrics.jsonl")
    refused("RUN: .*empty: holds neither", tmp_path / "empty")
    refused("RUN: .*empty: holds neither", run, tmp_path / "empty")
    refused("--out: .*folder.html: is a folder", run, out=tmp_path / "folder.html")
    refused("--out: .*metrics.jsonl: is no name of a page", run, out=run / "metrics.jsonl")
    refused("--out: .*cannot be written", run, out=run / "metrics.jsonl/r.html")
    refused("--max_mb: 0", run, max_mb=0.0)
    refused("--smooth: 1", run, smooth=1.0)
    judged(tmp_path / "k", saved=tmp_path / "saved")
    refused("only pictures that --save kept", tmp_path / "saved")
    refused("--points: 0", run, points=0)
    refused("--points: 99999", run, points=99_999)
    for text in ("", "[]", "{", '{"a": NaN}', "[" * 100_000):
        (tmp_path / "j/results.json").write_text(text)
        refused("results.json: is", tmp_path / "j")
    odd = {"tasks": {"edit": {"e": {"x": {"mean": "1", "low": [], "high": 2}}}}}
    (tmp_path / "j/results.json").write_text(json.dumps(odd))
    (tmp_path / "j/scores.npz").write_bytes(b"PK no")
    (tmp_path / "j/sheet.png").write_bytes(b"no picture")
    data = page_of(tmp_path, tmp_path / "j")[1]
    assert data["judges"][0]["tables"][0]["rows"] == [["x", False, 0, [[None, None, 2.0]]]]
    assert "scores.npz: is damaged" in data["judges"][0]["notes"][0]
    assert any("sheet.png" in n for n in data["notes"])
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    refused("metrics.jsonl: is no regular file", run)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    refused("holds neither", run)


def test_flags(tmp_path, monkeypatch):
    """The dataclass as a command line, as evaluate.py parses it."""
    line = ["evaluate.py", "out/a", "out/b", "--out", "x.html", "--max_mb", "2"]
    monkeypatch.setattr("sys.argv", line)
    cfg = common.parse(Report, config=(tyro.conf.FlagConversionOff,))
    assert cfg == Report((Path("out/a"), Path("out/b")), Path("x.html"), max_mb=2.0)
    monkeypatch.setattr("sys.argv", [*line, "--smoth", "0.5"])
    with pytest.raises(SystemExit, match="error: --smoth: there is no such flag: use --smooth"):
        common.parse(Report, config=(tyro.conf.FlagConversionOff,))


def test_many_folders(tmp_path):
    """Runs below a folder, named once even if named twice, of different kinds, in one page."""
    pefl(tmp_path / "out/a/pefl")
    pefl(tmp_path / "out/b/pefl", (5, 15))
    judged(tmp_path / "out/judge")
    metrics = log.Metrics(tmp_path / "out/reward", Dist(), {}, "off")
    metrics.flush(1000, {"val/acc": 0.7, "loss/preference": 0.5})
    metrics.close()
    data = page_of(tmp_path, tmp_path / "out/a", tmp_path / "out", tmp_path / "out/b/pefl")[1]
    assert [r["name"] for r in data["runs"]] == ["a/pefl", "b/pefl", "reward"]
    assert [j["name"] for j in data["judges"]] == ["judge"]
    assert [c["run"] for c in curves_of(data)["reward/aesthetic"]] == [0, 1]
    assert [c["run"] for c in curves_of(data)["val/acc"]] == [2]


DRIVER = """
const out = {}, told = () => ({...document.body.dataset});
out.first = told();
out.shown = [...document.querySelectorAll("main img")].filter((i) => i.complete && i.naturalWidth > 0).length;
const chart = document.querySelector(".chart svg"), tip = document.querySelector(".chart .tip");
chart.dispatchEvent(new KeyboardEvent("keydown", {key: "End", bubbles: true, cancelable: true}));
out.tip = tip.textContent; out.swatch = tip.querySelector("svg").getBoundingClientRect().width;
const set = (node, v, what) => { node.value = v; node.dispatchEvent(new Event(what, {bubbles: true})); };
byId("log").click(); out.log = told(); byId("log").click();
set(byId("smooth"), 0.9, "input"); out.raw = document.querySelectorAll("path.raw").length;
const box = document.querySelector("#legend input");
box.click(); out.one = told(); box.click();
set(byId("only"), "loss", "input"); out.only = told(); set(byId("only"), "", "input");
const wipe = document.querySelector(".gallery input[type=range]");
set(wipe, 20, "input"); out.cut = document.querySelector(".cards").style.getPropertyValue("--cut");
out.after = document.querySelector("img.after").getAttribute("src");
set(document.querySelectorAll(".gallery input[type=range]")[1], 0, "input");
out.earlier = document.querySelector("img.after").getAttribute("src");
out.asked = performance.getEntriesByType("resource").map((e) => e.name).filter((n) => !n.startsWith("data:"));
out.alien = document.querySelectorAll("main script, main [onerror], h1 *").length;
document.body.replaceChildren();
document.body.textContent = "RESULT" + JSON.stringify(out) + "END";
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_in_a_browser(tmp_path):
    """Curves, alarms, pictures and tables are drawn; the controls work; nothing is asked of any network."""
    runs = pefl(tmp_path / "a"), pefl(tmp_path / "b", (15, 35), caption=NASTY)
    with open(runs[1] / "metrics.jsonl", "a") as f:
        f.write('{"step": 40, "loss/G": null, "reward/aesthetic": -1.0}\n')
    page, data = page_of(tmp_path, *runs, judged(tmp_path / "judge"))
    (tmp_path / "test.html").write_text(page.replace(
        "</body>", "<script>window.addEventListener('load', () => setTimeout(() => {" + DRIVER
        + "}, 0))</script></body>"))
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
         "--virtual-time-budget=3000", "--dump-dom", f"file://{tmp_path}/test.html"], capture_output=True,
        text=True, timeout=600)
    found = re.search(r"<body[^>]*>RESULT(.*)END\s*</body>", done.stdout, re.S)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    out = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    first = out["first"]
    assert first["ready"] == "yes" and out["asked"] == [] and out["alien"] == 0
    curves = sum(len(c) for c in curves_of(data).values())
    assert int(first["curves"]) == curves == 16 and int(first["charts"]) == len(curves_of(data)) == 7
    assert int(first["bad"]) == 1 and int(first["alarms"]) == len(data["alarms"]) == 1
    assert int(first["tables"]) == 1 and out["shown"] == int(first["pictures"]) > 10
    assert "step 40" in out["tip"] and "-1" in out["tip"] and out["swatch"] == 22
    assert int(out["log"]["curves"]) == curves and out["raw"] == curves
    assert int(out["one"]["curves"]) == curves // 2 and int(out["only"]["charts"]) == 1
    assert out["cut"] == "20%" and out["after"] != out["earlier"]
    assert out["after"].startswith("data:image/")
