"""readers/rating.py and tally.py: the formulas, trees of results, studies of simulated raters, the page."""

import itertools
import json
import math
import random
import re

import numpy as np
import pytest
from inprocess import run_script
from PIL import Image
from test_benchmarks import gedit
from test_study import CHROMIUM, in_browser

from log import sign_test, wilson
from readers import rating, study, tally
from readers.rating import Study


#### the formulas ############################################################################################
def test_gsb():
    """G 6, S 2, B 2 by hand, and ByteEdit's own counts (Sec. 4.3: outpainting, editing, erasing)."""
    rows = [(n, v) for n, v in enumerate([1] * 6 + [0] * 2 + [-1] * 2)]
    r = tally.compare(rows)
    expected = {"superiority": 2.0, "share": 2 / 3, "net": 0.4, "win": 0.75, "half": 0.7}
    assert {k: r[k][0] for k in expected} == pytest.approx(expected)
    assert (r["good"], r["same"], r["bad"], r["pictures"]) == (6, 2, 2, 10)
    assert r["wilson"] == pytest.approx([0.4093, 0.9285], abs=1e-4) == wilson(6, 8)
    assert r["p"] == pytest.approx(2 * (1 + 8 + 28) / 2**8) == sign_test(6, 2) and round(r["p"], 4) == 0.2891
    for counts, value in (((4766, 2679, 4355), 1.0584), ((5605, 3295, 3448), 1.3199),
                          ((5413, 3034, 4478), 1.1245)):
        assert tally.gsb(*counts)["superiority"] == pytest.approx(value, abs=5e-5)
    assert math.isnan(tally.gsb(0, 3, 0)["win"]) and tally.gsb(2, 0, 0)["superiority"] == math.inf
    assert tally.compare([(0, 1), (1, 1)])["superiority"] == [math.inf] * 3
    votes = [("p", 1), ("p", 1), ("p", -1), ("q", 0), ("q", 0), ("r", -1), ("s", 1), ("t", 1), ("u", 1)]
    assert tally.compare(votes)["p"] == sign_test(4, 1)  # of pictures, each by its majority


def test_intervals_are_of_pictures():
    """Each vote ten times about the same picture says no more; independent ones agree with the normal one."""
    rng = np.random.default_rng(0)
    votes = [(n, int(v)) for n, v in enumerate(rng.choice((1, 0, -1), 400, p=(0.5, 0.3, 0.2)))]
    one, ten = tally.compare(votes), tally.compare(votes * 10)
    assert ten["net"] == one["net"] and ten["p"] == one["p"] and ten["good"] == 10 * one["good"]
    assert np.diff(ten["wilson"]) < 0.5 * np.diff(one["wilson"])
    deviation = np.std([v for _, v in votes]) / 20
    assert one["net"][2] - one["net"][1] == pytest.approx(2 * 1.96 * deviation, rel=0.12)
    assert tally.compare(votes) == one and tally.compare(votes, seed=1)["net"][1:] != one["net"][1:]


def test_bradley_terry():
    wins = np.array([[0, 7, 8], [3, 0, 6], [2, 4, 0]], float)  # A-B 6 wins 2 ties 2 losses, ties half
    theta = tally.bradley_terry(wins)
    assert theta == pytest.approx([0.740570, -0.149102, -0.591468], abs=1e-6)
    assert tally.rating(theta) == pytest.approx([1128.650, 974.098, 897.252], abs=1e-3)
    votes = [(n, i, j, v) for n, (i, j, v) in enumerate(
        (i, j, v) for (i, j), counts in {(0, 1): (6, 2, 2), (1, 2): (5, 2, 3), (0, 2): (7, 2, 1)}.items()
        for v, m in zip((1, 0, -1), counts) for _ in range(m))]
    r = tally.ranking(votes, ["A", "B", "C"])
    assert [r["ratings"][k][0] for k in "ABC"] == pytest.approx(list(tally.rating(theta)))
    assert r["beats"][0][1] == pytest.approx(0.708823, abs=1e-6)
    assert all(low < v < high for v, low, high in r["ratings"].values())
    assert r["ratings"]["A"][1] > r["ratings"]["C"][0]


def test_bradley_terry_against_another_algorithm():
    """Newton's method against Zermelo's fixed point (1929), batched as one by one; no finite maximum."""
    rng = np.random.default_rng(1)
    batch = rng.integers(1, 9, (5, 4, 4)).astype(float) * (1 - np.eye(4))
    batch[3, 0] *= 40
    for wins, theta in zip(batch, tally.bradley_terry(batch)):
        p = np.ones(4)
        for _ in range(3000):
            p = wins.sum(1) / ((wins + wins.T) / (p[:, None] + p[None])).sum(1)
            p /= np.exp(np.log(p).mean())
        assert theta == pytest.approx(np.log(p), abs=1e-7) == tally.bradley_terry(wins)
    never_lost = batch[0].copy()
    never_lost[:, 0] = 0
    apart = np.kron(np.eye(2), [[0, 3], [2, 0]])
    assert np.isnan(tally.bradley_terry(np.stack([never_lost, apart]))).all()
    assert not np.isnan(tally.bradley_terry([[0, 1, 0], [0, 0, 1], [1, 0, 0]])).any()  # a circle is enough


def alpha_of_pairs(units, level):
    """Krippendorff's alpha as defined: the disagreement of pairs within items over that of all pairs."""
    units = [u for u in units if len(u) > 1]
    every = [v for u in units for v in u]

    def off(a, b):
        if level == "nominal":
            return float(a != b)
        if level == "interval":
            return (a - b)**2
        low, high = min(a, b), max(a, b)
        return (sum(low <= v <= high for v in every) - (every.count(a) + every.count(b)) / 2)**2

    seen = sum(sum(off(a, b) for a, b in itertools.permutations(u, 2)) / (len(u) - 1) for u in units)
    chance = sum(off(a, b) for a, b in itertools.permutations(every, 2)) / (len(every) - 1)
    return 1 - seen / chance


def test_agreement():
    kappa, raw = tally.fleiss([[3, 0, 0], [2, 1, 0], [0, 1, 2], [1, 1, 1], [0, 0, 3]])
    assert (kappa, raw) == pytest.approx((0.270833, 0.533333), abs=1e-6)
    raters = [[0, 0.5, 1, 1, 0], [0, 0.5, 1, 0.5, None], [0, 1, 1, 1, 0.5]]
    units = [[v for v in u if v is not None] for u in zip(*raters)]
    for level, value in (("nominal", 0.390625), ("ordinal", 0.693571), ("interval", 0.713235)):
        assert tally.krippendorff(units, level) == pytest.approx(value, abs=1e-6)
        assert alpha_of_pairs(units, level) == pytest.approx(value, abs=1e-6)
    assert tally.cohen("GGSBGBSG", "GSSBGBBG") == pytest.approx(0.619048, abs=1e-6)
    assert math.isnan(tally.krippendorff([[1, 1], [1, 1]], "nominal"))
    with pytest.raises(ValueError, match="same number"):
        tally.fleiss([[2, 0], [1, 0]])


def test_agreement_of_random_votes():
    """Against the definitions, with votes missing, and against other packages where they are installed."""
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 4, 40)
    votes = [(n // 2, n, f"r{k}", int(v)) for n, t in enumerate(truth) for k in range(4)
             if rng.random() < 0.8 for v in [t if rng.random() < 0.6 else rng.integers(0, 4)]]
    units = [[v for _, m, _, v in votes if m == n] for n in range(40)]
    pairs = [a == b for u in units for a, b in itertools.combinations(u, 2)]
    for level in ("nominal", "ordinal"):
        a = tally.agreement(votes, level)
        assert a["raw"] == pytest.approx(np.mean(pairs)) and "cohen" not in a
        assert a["alpha"][0] == pytest.approx(alpha_of_pairs(units, level))
        assert a["alpha"][1] < a["alpha"][0] < a["alpha"][2]
        usual = [u for u in units if len(u) == a["fleiss_raters"]]
        assert a["fleiss_items"] == len(usual) == max(sum(len(u) == k for u in units) for k in (2, 3, 4))
    two = [v for v in votes if v[2] in ("r0", "r1")]
    both = [u for u in ([v for _, m, _, v in two if m == n] for n in range(40)) if len(u) == 2]
    assert tally.agreement(two, "nominal")["cohen"] == pytest.approx(tally.cohen(*zip(*both)))
    assert tally.agreement([v for v in votes if v[2] == "r0"], "nominal") == {"items": 0}


def test_against_other_packages():
    krippendorff = pytest.importorskip("krippendorff")
    irr = pytest.importorskip("statsmodels.stats.inter_rater")
    rng = np.random.default_rng(3)
    votes = rng.integers(1, 6, (3, 30)).astype(float)
    votes[0, :7] = np.nan
    units = [[v for v in u if not np.isnan(v)] for u in votes.T]
    for level in ("nominal", "ordinal", "interval"):
        assert tally.krippendorff(units, level) == pytest.approx(
            krippendorff.alpha(votes, level_of_measurement=level))
    counts = irr.aggregate_raters(votes[1:].T.astype(int))[0]
    assert tally.fleiss(counts)[0] == pytest.approx(irr.fleiss_kappa(counts))


def test_means():
    rows = [("p", "anna", [1, 0.5]), ("p", "ben", [0, 0.5]), ("q", "anna", [1, 1]), ("q", "ben", [1, 0])]
    (a, low, high, spread), (b, *_) = tally.means(rows)
    assert (a, b) == (0.75, 0.5) and (low, high) == (0.5, 1) and spread == pytest.approx(0.5 / 2**0.5)
    other = [(p, r, [x / 2, y]) for p, r, (x, y) in rows]
    gap = tally.differences(rows, other)
    assert gap[0] == [0.375, 0.25, 0.5] and gap[1] == [0, 0, 0]  # paired: pictures are drawn together


#### trees and pages #########################################################################################
COLOURS = ("red", "green", "blue", "grey", "white")


def picture(path, seed, colour=0, size=(24, 32)):
    x = np.random.default_rng(seed).integers(0, 90, (*size, 3), np.uint8)
    x[..., colour % 3] += 120
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path)
    return path


def tree(root, name, n, change=0, skip=(), rows=True):
    """A tree as sample.py edit writes it (see `test_a_tree_of_sample`), of sources in ROOT/photos."""
    lines = []
    for i in range(n):
        source = picture(root / "photos" / f"{i}.png", i)
        if i not in skip:
            picture(root / name / f"{i}_edit.png", 1000 + i + change, change)
        lines.append({"file": f"{i}_edit.png", "image": str(source), "mask": None, "key": str(i), "turn": 1,
                      "edit_type": COLOURS[i % 2], "instruction": f"make {i} {COLOURS[i % 5]}", "sample": 0})
    if rows:
        (root / name / "samples.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return str(root / name)


def made(root, systems=("ours", "theirs"), n=20, **flags):
    folders = tuple(tree(root, name, n, 100 * k + 1) for k, name in enumerate(systems))
    rating.study(Study(folders=folders, out=str(root / "s"), **flags))
    return study.read_key(root / "s", None)


def pixels(path):
    return np.asarray(Image.open(path))


def shown(folder, name):
    """A picture of a page."""
    return pixels(folder / "page" / "pictures" / f"{name}.png")


def tasks_of(folder):
    text = (folder / "page/index.html").read_text()
    return json.loads(re.search(r'<script id="tasks" type="application/json">(.*?)</script>', text)[1])


def test_a_page_is_blind_and_balanced(tmp_path, capsys):
    """Three systems: pairs, sides, blocks and repeats are even, and the page knows no system."""
    key = made(tmp_path, ("first", "second", "third"), 12, per_rater=12, seed=3)
    inline, items = tasks_of(tmp_path / "s"), key["items"]
    tasks = {t["id"]: t for t in inline["tasks"]}
    text = (tmp_path / "s/page/index.html").read_text()
    assert not re.search("first\"|second|third|ruined|photos|_edit", json.dumps(inline))
    assert not any(word in text for word in ("ruined", str(tmp_path), "repeat_of"))
    assert {f.name for f in (tmp_path / "s/page").iterdir()} == {"index.html", "pictures"}
    files = list((tmp_path / "s/page/pictures").iterdir())
    assert all(re.fullmatch(r"[0-9a-f]{20}\.png", f.name) for f in files)
    assert len({f.stat().st_mtime for f in files}) == 1

    asked = {i: x for i, x in items.items() if x["systems"] and not x["repeat_of"]}
    assert len(asked) == 36 and len(inline["blocks"]) == 3
    placed = [i for block in inline["blocks"] for part in block for i in part if i in asked]
    assert sorted(placed) == sorted(asked)  # each in one block
    for block in inline["blocks"]:
        ids = [i for part in block for i in part]
        pairs = [tuple(items[i]["systems"]) for i in ids if i in asked]
        assert {pairs.count(p) for p in set(pairs)} == {4} and len(set(pairs)) == 3
        for pair in set(pairs):  # and of each pair each system is on the left in half of them
            left = [items[i]["made"][tasks[i]["candidates"][0]] for i in ids
                    if i in asked and tuple(items[i]["systems"]) == pair]
            assert left.count(pair[0]) == 2
        again = [i for i in ids if items[i]["repeat_of"]]
        assert len(again) == 6 and sum(bool(items[i]["gold"]) for i in ids) == 5
        for i in again:
            first = items[i]["repeat_of"]
            assert tasks[i]["candidates"] == tasks[first]["candidates"][::-1]
            assert first in block[0] and i in block[1] and tasks[i]["prompt"] == tasks[first]["prompt"]
    for i, x in items.items():
        if x["gold"]:
            (spoilt,) = (n for n, what in x["made"].items() if what == "ruined")
            assert x["gold"] != spoilt and {x["gold"], spoilt} == set(tasks[i]["candidates"])
    rating.study(Study(folders=tuple(str(tmp_path / n) for n in ("first", "second", "third")),
                       out=str(tmp_path / "s"), per_rater=12, seed=3))  # the same again is the same
    assert study.read_key(tmp_path / "s", None) == key
    assert "1 to 9 give each comparison three votes" in capsys.readouterr().out


def test_missing_results_are_named(tmp_path, capsys):
    a, b = tree(tmp_path, "a", 8, 1, skip=(2,)), tree(tmp_path, "b", 8, 2, skip=(5,))
    lines = (tmp_path / "b/samples.jsonl").read_text().splitlines()[:7]
    lines[3] = lines[3].replace("make 3", "unmake 3")
    (tmp_path / "b/samples.jsonl").write_text("\n".join(lines))
    (tmp_path / "a/4_edit.png").write_bytes(b"no picture")
    Image.open(tmp_path / "a/6_edit.png").save(tmp_path / "b/6_edit.png")
    rating.study(Study(folders=(a, b), out=str(tmp_path / "s"), gold=0, repeats=0))
    said = capsys.readouterr()
    assert "a: 7 of 8 results; missing: 2_edit" in said.out
    assert "b: 6 of 8 results; missing: 5_edit, 7_edit" in said.out
    assert "1 left out, asked differently of the systems: 3_edit" in said.out
    assert "1 left out, cannot be read: 4_edit" in said.out and "4_edit.png: not a readable" in said.err
    assert "a and b: 1 results are the same picture" in said.out
    assert {x["key"] for x in study.read_key(tmp_path / "s", None)["items"].values()} == {"0_edit", "1_edit"}


def test_trees_of_other_systems(tmp_path, capsys):
    """Bare pictures of another kind of file, sources and instructions from elsewhere; without them, said."""
    a = tree(tmp_path, "a", 6, 1)
    other = tmp_path / "other"
    other.mkdir()
    for i in range(6):
        Image.open(picture(tmp_path / "x.png", 50 + i, 2)).save(other / f"{i}_edit.webp", lossless=True)
    rating.study(Study(folders=(a, str(other)), out=str(tmp_path / "s")))  # a's samples.jsonl tells of both
    task = tasks_of(tmp_path / "s")["tasks"][0]
    assert task["source"] and task["prompt"].startswith("make ")
    (tmp_path / "a/samples.jsonl").unlink()
    rating.study(Study(folders=(a, str(other)), out=str(tmp_path / "bare")))
    assert "give --sources" in capsys.readouterr().out
    assert tasks_of(tmp_path / "bare")["tasks"][0]["source"] is None
    (tmp_path / "asked.jsonl").write_text("".join(
        json.dumps({"key": str(i), "source": f"photos/{i}.png", "instruction": f"do {i}", "task": "add"})
        + "\n" for i in range(6)))
    asked = {"instructions": str(tmp_path / "asked.jsonl")}
    rating.study(Study(folders=(a, str(other)), out=str(tmp_path / "t"), **asked))
    key = study.read_key(tmp_path / "t", None)
    assert {x["task"] for x in key["items"].values()} == {"add"}
    for task in tasks_of(tmp_path / "t")["tasks"]:
        name = key["items"][task["id"]]["key"].split("_")[0]
        assert task["prompt"] == f"do {name}"
        assert (shown(tmp_path / "t", task["source"]) == pixels(tmp_path / f"photos/{name}.png")).all()
    (tmp_path / "asked.jsonl").write_text('{"key": "3_edit", "instruction": "go"}\n')
    rating.study(Study(folders=(a, str(other)), out=str(tmp_path / "u"), **asked, sources=a))
    assert "5 left out, what was asked is not in --instructions" in capsys.readouterr().out


def test_instructions_of_a_benchmark_in_a_table(tmp_path):
    """GEdit-Bench's Arrow folder: what was asked, by the keys of its tree, and its pictures."""
    asked = rating.read_asked(Study(instructions=str(gedit(tmp_path / "gedit"))))
    source, text, task = asked["fullset/style_change/en/k3"]
    assert (text, task) == ("snow", "style_change") and rating.read_source(source).shape == (16, 24, 3)
    assert asked["k2"][1] == "make it a dog" and "k1" not in asked  # k1 is two rows


def test_chains_outpainting_and_masks(tmp_path):
    """Turn 2 shows both instructions; an outpainted source lies on its canvas; a hole is marked in red."""
    picture(tmp_path / "p.png", 0)
    mask = np.zeros((24, 32), np.uint8)
    mask[:12] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    rows = [{"file": f"x_turn{t}.png", "key": "x", "turn": t, "instruction": w, "sample": 0}
            for t, w in ((1, "add a cat"), (2, "make it snow"))]
    rows += [{"file": "wide.png", "prompt": "", "task": "outpaint", "left": 4, "right": 8, "top": 0,
              "bottom": 0}]
    rows += [{"file": "hole.png", "prompt": "a dog", "task": "inpaint", "mask": "m.png"}]
    rows = [row | {"image": "p.png"} for row in rows]
    for k, name in enumerate("ab"):
        for row in rows:
            picture(tmp_path / name / row["file"], len(row["file"]) + 50 * k, k,
                    (24, 44) if row["file"] == "wide.png" else (24, 32))
        (tmp_path / name / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = tmp_path / "s"
    rating.study(Study(folders=(str(tmp_path / "a"), str(tmp_path / "b")), out=str(out), gold=0, repeats=0))
    key = study.read_key(out, None)["items"]
    tasks = {key[t["id"]]["key"]: t for t in tasks_of(tmp_path / "s")["tasks"]}
    assert tasks["x_turn1"]["prompt"] == "add a cat"
    assert tasks["x_turn2"]["prompt"] == "add a cat, then make it snow"
    source, wide = pixels(tmp_path / "p.png"), shown(out, tasks["wide"]["source"])
    assert wide.shape == (24, 44, 3) and (wide[:, 4:36] == source).all() and (wide[:, :4] == 128).all()
    marked = shown(out, tasks["hole"]["marked"])
    assert (shown(out, tasks["hole"]["source"]) == source).all() and (marked[12:] == source[12:]).all()
    assert np.abs(marked[:12] - (0.4 * source[:12] + 0.6 * np.array([235, 45, 60]))).max() <= 1
    assert {x["cluster"] for x in key.values() if x["key"] != "wide"} == {tasks["hole"]["source"]}


@pytest.mark.slow
def test_a_tree_of_sample(tmp_path, monkeypatch):
    """What sample.py itself writes is read, paths and all, from another folder than it ran in."""
    monkeypatch.chdir(tmp_path)
    rows = [{"source": f"photos/{i}.png", "instruction": "make it snow", "key": f"k{i}"} for i in range(2)]
    for i in range(2):
        picture(tmp_path / f"photos/{i}.png", i, size=(32, 32))
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    root = rating.Path(__file__).parents[1]
    for steps in (1, 2):
        done = run_script(root / "sample.py", "edit", "--ckpt", root / "assets/editnet", "--jsonl",
                          "asked.jsonl", "--steps", steps, "--size", 32, "--device", "cpu", "--out",
                          f"out/{steps}")
        assert done.returncode == 0, done.stderr
    monkeypatch.chdir("/")
    folders, out = (f"{tmp_path}/out/1", f"{tmp_path}/out/2"), tmp_path / "s"
    rating.study(Study(folders=folders, out=str(out), gold=0, repeats=0))
    key = study.read_key(out, None)
    assert key["systems"] == ["1", "2"]
    assert {x["key"] for x in key["items"].values()} == {"k0_edit", "k1_edit"}
    for task in tasks_of(out)["tasks"]:
        i = key["items"][task["id"]]["key"][1]
        assert task["prompt"] == "make it snow"
        assert (shown(out, task["source"]) == pixels(tmp_path / f"photos/{i}.png")).all()


#### answers #################################################################################################
def line(key, id, name, votes, order=None, ms=3000, at=1.0, **change):
    row = {"version": 1, "study": key["sha256"], "id": id, "annotator": name,
           "verdict": "rated" if votes else "skip", "votes": votes or {},
           "order": order or list(key["items"][id]["made"]), "ms": ms, "at": at} | change
    return row | {"sum": study.line_sum(row)}


def prefers(key, id, rng, want):
    """A vote by want(item) -> a system's name or "same" / "bad", sides shuffled; ruined ones lose."""
    item = key["items"][id]
    order = rng.sample(list(item["made"]), 2)
    best = item["made"][item["gold"]] if item["gold"] else want(item)
    if best not in item["made"].values():
        return order, best
    return order, "left" if item["made"][order[0]] == best else "right"


def export(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def report(root, files, out="s"):
    rating.study(Study(answers=tuple(files), out=str(root / out)))
    return json.loads((root / out / "results.json").read_text())


def test_a_study_of_three_systems(tmp_path, capsys):
    """Known preferences come back: counts by hand, the order of systems, who is careless, agreement."""
    names = ("best", "middle", "worst")
    key = made(tmp_path, names, 20, criteria=("real", "overall"))
    truth = {}  # what careful raters say, the better system in 3 of 4
    for id, x in key["items"].items():
        k, pair = int(x["key"].split("_")[0]), x["systems"]
        truth[id] = pair and ("same" if k % 5 == 0 else pair[1] if k % 5 == 1 else pair[0])
    files, rng = [], random.Random(0)
    for name in ("anna", "ben", "cleo", "dice", "hasty", "lefty"):
        rows = []
        for id, x in key["items"].items():
            order, vote = prefers(key, id, rng, lambda x: truth[x["repeat_of"] or id])
            if name == "dice":
                vote = rng.choice(("left", "right", "same", "bad"))
            vote = "left" if name == "lefty" and not x["gold"] else vote
            ms = 300 if name == "hasty" else 2000
            rows.append(line(key, id, name, {"real": "bad", "overall": vote}, order, ms))
        files.append(export(tmp_path / f"{name}.jsonl", rows))
    r, said = report(tmp_path, files), capsys.readouterr().out
    careless = {n: a["careless"] for n, a in r["raters"].items()}
    assert [n for n, why in careless.items() if not why] == ["anna", "ben", "cleo"], careless
    assert "100% on one side" in careless["lefty"] and careless["hasty"] == "300 ms an answer"
    assert r["raters"]["anna"]["gold"] == r["raters"]["anna"]["right"] == 5
    assert r["raters"]["anna"]["again"] == r["raters"]["anna"]["same"] == 6
    assert r["votes"] == 3 * 60
    assert list(r["pairs"]) == [" against ".join(p) for p in itertools.combinations(names, 2)]
    for found in r["pairs"].values():
        got = found["overall"]
        assert (got["good"], got["same"], got["bad"], got["pictures"]) == (36, 12, 12, 20)
        assert got["superiority"][0] == pytest.approx(48 / 24) and got["both_bad"] == 0
        assert found["real"]["same"] == found["real"]["both_bad"] == 60
        assert found["overall, red"]["pictures"] == found["overall, green"]["pictures"] == 10
        # three careful raters say the same: the interval is that of 20 pictures, not of 60 votes
        assert got["net"][2] - got["net"][1] > 0.6 and got["p"] == pytest.approx(sign_test(12, 4))
    ratings = r["ranking"]["overall"]["ratings"]
    assert ratings["best"][0] > ratings["middle"][0] > ratings["worst"][0]
    wins = np.array([[0, 42, 42], [18, 0, 42], [18, 18, 0]], float)
    assert [ratings[n][0] for n in names] == pytest.approx(list(tally.rating(tally.bradley_terry(wins))))
    assert r["ranking"]["real"]["ratings"]["best"][0] == pytest.approx(1000)
    assert r["agreement"]["overall"]["alpha"][0] == 1 and r["agreement"]["overall"]["raw"] == 1
    assert "36" in said and "left out: gold" in said and "(G+S)/(S+B)" in said and "of S both bad" in said
    votes = [json.loads(x) for x in (tmp_path / "s/votes.jsonl").read_text().splitlines()]
    mine = [v for v in votes if v["counts"] and v["criterion"] == "overall"
            and {v["model_a"], v["model_b"]} == {"best", "worst"}]
    better = [v[f"model_{v['vote']}"] for v in mine if v["vote"] in "ab"]
    assert (better.count("best"), better.count("worst"), len(mine)) == (36, 12, 60)


@pytest.mark.parametrize("form, better, worse", [("expert", 4, 2), ("scpq", 1, 0.5)])
def test_ratings(tmp_path, capsys, form, better, worse):
    """Means, O and accuracy by hand; a rater who gives the ruined pictures full marks is left out."""
    key = made(tmp_path, n=10, form=form)
    rows = {"anna": [], "ben": [], "eve": []}
    for id, x in key["items"].items():
        (what,) = x["made"].values()
        first = key["items"][x["repeat_of"]] if x["repeat_of"] else x
        (what,) = first["made"].values()
        value = {"ours": better, "theirs": worse, "ruined": 1 if form == "expert" else 0}[what]
        votes = dict.fromkeys([c["id"] for c in key["criteria"]], value)
        if form == "scpq" and what == "ours" and int(x["key"].split("_")[0]) < 5:
            votes["PQ"] = 0.5
        rows["anna"].append(line(key, id, "anna", votes))
        rows["ben"].append(line(key, id, "ben", votes))
        rows["eve"].append(line(key, id, "eve", votes | dict.fromkeys(votes, better)))
    r = report(tmp_path, [export(tmp_path / f"{n}.jsonl", x) for n, x in rows.items()])
    said, ours, theirs = capsys.readouterr().out, r["systems"]["ours"], r["systems"]["theirs"]
    assert all(why in r["raters"]["eve"]["careless"] for why in ("gold 0 of 5", "100% of one answer"))
    assert not r["raters"]["anna"]["careless"] and r["raters"]["anna"]["same"] == 6 and ours["votes"] == 20
    if form == "expert":
        assert ours["coherence"] == [4, 4, 4, 0] and theirs["aesthetics"][0] == 2
        assert r["differences"]["ours - theirs"]["structure"] == [2, 2, 2]
    else:
        assert ours["O"][0] == pytest.approx((1 + 0.5**0.5) / 2) and theirs["O"][0] == 0.5
        assert ours["accuracy"][0] == 1 and theirs["accuracy"][0] == 0 and "accuracy" in said
        table = (tmp_path / "s/imagenhub/anna.tsv").read_text().splitlines()
        assert table[:2] == ["uid\tours\ttheirs", "0_edit\t[1, 0.5]\t[0.5, 0.5]"] and len(table) == 11
    assert r["agreement"][key["criteria"][0]["id"]]["cohen"] == 1


def test_files_that_are_not_as_they_should_be(tmp_path, capsys):
    """Of another study, edited, twice and otherwise, unfinished, cut off: each is said in one line."""
    key = made(tmp_path, n=12, criteria=("overall",))
    other = tmp_path / "other"
    other.mkdir()
    foreign = made(other, n=12, criteria=("overall",), seed=1)
    rng, ids = random.Random(0), list(key["items"])
    rows = [line(key, id, "anna", {"overall": vote}, order) for id in ids
            for order, vote in [prefers(key, id, rng, lambda x: "ours")]]
    edited = [rows[0] | {"votes": {"overall": "bad"}}, *rows[1:]]
    later = [line(key, r["id"], "anna", {"overall": "same"}, r["order"], at=2.0) for r in rows[:3]]
    bad = [line(key, ids[0], "anna", {"overall": "maybe"}), line(key, ids[0], "anna", {}, verdict="rated"),
           {k: v for k, v in rows[0].items() if k != "sum"},
           line(key, ids[0], "anna", {"overall": "left"}, ["x", "y"])]
    a = export(tmp_path / "a.jsonl", rows)

    r = report(tmp_path, [a, a, export(tmp_path / "b.jsonl", rows[:9])])
    assert r["answers"] == len(rows) and "note" not in capsys.readouterr().err  # once more is no news
    r = report(tmp_path, [a, export(tmp_path / "b.jsonl", later)])
    assert "note: anna: 3 item(s) answered a second time and otherwise" in capsys.readouterr().err
    assert r["answers"] == len(rows)
    r = report(tmp_path, [export(tmp_path / "b.jsonl", edited + bad)])
    err = capsys.readouterr().err
    assert r["answers"] == len(rows) - 1 and err.count("skipped: ") == 5
    assert err.count("changed by hand") == 2 and "line 1: changed by hand" in err
    (tmp_path / "c.jsonl").write_text((tmp_path / "a.jsonl").read_text()[:4000])
    report(tmp_path, [str(tmp_path / "c.jsonl")])
    said = capsys.readouterr()
    assert "unfinished" in said.out and said.err.count("skipped: ") == 1 and "not JSON" in said.err
    skips = export(tmp_path / "d.jsonl", [line(key, i, "anna", None) for i in ids])
    elsewhere = export(tmp_path / "e.jsonl", [line(foreign, i, "anna", None) for i in foreign["items"]])
    (tmp_path / "empty.jsonl").write_text("")
    for files, words in (([a, elsewhere], "e.jsonl: answers to another study"),
                         (["no.jsonl"], "no.jsonl: no such file"),
                         ([skips], "none that counts"), ([str(tmp_path / "empty.jsonl")], "not one answer")):
        with pytest.raises(SystemExit) as stop:
            report(tmp_path, files)
        text = str(stop.value)
        assert text.startswith("error: ") and words in text and "\n" not in text
    with pytest.raises(SystemExit, match="of the form gsb"):
        study.read_key(tmp_path / "s")


def test_a_key_is_not_written_over(tmp_path):
    made(tmp_path, n=6)
    with pytest.raises(SystemExit, match="of another study"):
        made(tmp_path, n=6, seed=1)


@pytest.mark.parametrize("change, words", [
    ({"folders": ("a",)}, "--folders: a: gsb needs at least 2"),
    ({"folders": ("a", "none")}, "no such folder"),
    ({"folders": ("a", "c")}, "not one result is called alike (a has 0_edit, 1_edit and 1 more; c has z)"),
    ({"folders": ("a", "a/")}, "twice"), ({"folders": ("a", "empty")}, "no result in it"),
    ({"criteria": ("beauty",)}, "--criteria"), ({"criteria": ("real", "real")}, "each once"),
    ({"form": "scpq", "criteria": ("SC",)}, "SC and PQ"), ({"gold": 2.0}, "--gold"), ({"n": -1}, "--n"),
    ({"sources": "c"}, "the picture before is not found"), ({"sources": "nowhere"}, "--sources: nowhere"),
    ({"instructions": "nowhere.jsonl"}, "--instructions: nowhere.jsonl: no such file"),
    ({"out": "a/s"}, "--out: a/s: lies in a"), ({"answers": ("x.jsonl",)}, "not the key of a study")])
def test_mistakes_give_one_line(tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        tree(tmp_path, name, 3, ord(name), rows=False)
    picture(tmp_path / "c/z.png", 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        rating.study(Study(**{"folders": ("a", "b"), "out": "s"} | change))
    text = str(stop.value)
    assert text.startswith("error: ") and "\n" not in text and words in text, text


#### a browser ###############################################################################################
RATER = """
const known = KNOWN;   // id -> the picture to prefer, or "same"
function rate(n) {
  for (let i = 0; i < n && at >= 0; i++) {
    const want = known[order[at].id];
    spent = 2000;   // a person takes his time
    press("KeyX");
    press(want === "same" ? "Digit0" : order[at].order[0] === want ? "Digit1" : "Numpad2");
  }
}
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_rater_in_a_browser(tmp_path):
    """Twenty comparisons, gold and repeats by keyboard, with an undo and a reload in the middle of an item,
    and what is exported: the table is right."""
    key = made(tmp_path, n=20, criteria=("real", "overall"))
    want = {}
    for id, x in key["items"].items():
        names, k = {what: n for n, what in x["made"].items()}, int(x["key"].split("_")[0])
        want[id] = x["gold"] or ("same" if k % 5 == 0 else names["theirs"] if k % 5 == 1 else names["ours"])
    rater = RATER.replace("KNOWN", json.dumps(want))
    first = in_browser(tmp_path / "s", rater + """
      const tell = (name) => out.push([name, Object.entries(votes), answers.length]);
      rate(11); log("eleven");
      press("Backspace"); tell("undone");
      press("ArrowLeft"); tell("undone more");
      rate(1); press("Digit2"); tell("half");
      out.push(["seen", document.querySelectorAll("#criteria button.chosen").length,
                document.querySelectorAll("#criteria tr").length, byId("progress").textContent]);
      press("Space"); out.push(["flicker", byId("grid").className,
                                getComputedStyle(document.querySelector("#grid img.over")).visibility]);
      document.dispatchEvent(new KeyboardEvent("keyup", {code: "Space"}));
      press("KeyZ"); out.push(["zoom", byId("grid").className,
                               document.querySelector("#grid img").style.transform]);
    """)
    said = {name: rest for name, *rest in first["out"]}
    assert "error" not in said and len(said["eleven"][0]) == 11, said
    assert said["undone"] == [[["real", "bad"]], 10] and said["undone more"] == [[], 10]
    assert said["half"] == [[["real", "right"]], 11] and said["seen"] == [1, 2, "11 of 31 "]
    assert said["flicker"] == ["flicker", "visible"] and said["zoom"] == ["", "scale(4)"]

    again = in_browser(tmp_path / "s", rater + """
      out.push(["kept", Object.entries(votes), answers.length]);
      const me = annotator, all = study.blocks;
      study.blocks = [all[0], all[0], all[0]];
      out.push(["numbers", [1, 3, 4, 6, 7].map((n) => {
        annotator = String(n);
        return [share().block, share().mirrored, places(order[0])[0] === order[0].candidates[0]]; })]);
      annotator = me; study.blocks = all;
      press("Backspace"); rate(40); log("all");
      out.push(["end", byId("prompt").textContent, byId("progress").textContent]);
    """)
    said = {name: rest for name, *rest in again["out"]}
    assert said["kept"] == [[["real", "right"]], 11] and len(said["all"][0]) == 31, said
    assert said["numbers"] == [[[0, False, True], [2, False, True], [0, True, False], [2, True, False],
                                [0, False, True]]]
    assert again["order"] == first["order"]
    assert "Thank you" in said["end"][0] and said["end"][1] == "31 of 31 "
    (tmp_path / "anna.jsonl").write_text(again["lines"])
    r = report(tmp_path, [str(tmp_path / "anna.jsonl")])
    found, anna = r["pairs"]["ours against theirs"], r["raters"]["anna"]
    assert [found["overall"][k] for k in ("good", "same", "bad")] == [12, 4, 4]
    assert [found["real"][k] for k in ("good", "same", "bad", "both_bad")] == [0, 20, 0, 20]
    assert anna["right"] == anna["gold"] == 5 and anna["same"] == anna["again"] == 6
    assert anna["answers"] == anna["of"] == 31 and not anna["careless"]
