"""readers/study.py and study.html: simulated annotators, careless ones too, and the page in a browser."""

import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from readers import preferences, study

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def written(folder, n=60, gold=8, repeats=0.2, prompt="a cat {}"):
    """A study whose picture k of each item has quality 3 - k; of gold items the fourth is ruined."""
    rng, items = np.random.default_rng(0), []
    for i in range(n + gold):
        names = [study.save_picture(folder, rng.integers(0, 255, (8, 8, 3), np.uint8)) for _ in range(4)]
        items.append(study.Item(prompt.format(i), names, [f"model {k}" for k in range(4)], None,
                                {"worst": [names[3]]} if i >= n else None))
    return items, study.write_study(folder, items, "Which is best?", repeats, seed=1)


def answer(key, id, name, rng, verdict="ranked", noise=0.0, place=None, blind=False, ms=2000):
    """A line of the page: by quality with noise, at one place, or blindly."""
    names = list(key["items"][id]["made"])
    order = rng.sample(names, 4)
    ranked = sorted(names, key=lambda n: names.index(n) + rng.gauss(0, noise))
    best, worst = ranked[0], ranked[3]
    if place is not None:
        best, worst = order[place], order[3 - place]
    if blind:
        best, worst = rng.sample(names, 2)
    ranked = verdict == "ranked"
    return {"version": 1, "study": key["sha256"], "id": id, "annotator": name, "verdict": verdict,
            "best": best if ranked else None, "worst": worst if ranked else None, "order": order, "ms": ms,
            "at": 1000 + rng.random()}


def export(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_careless_annotators_are_caught(tmp_path):
    """Three who look, with honest doubt, and one who clicks blindly, one always at one place, one at once."""
    _, key = written(tmp_path, 40, 8, 0.3)
    kinds = {"anna": {"noise": 0.6}, "ben": {"noise": 0.6}, "cleo": {"noise": 0.3}, "dice": {"blind": True},
             "first": {"place": 0}, "hasty": {"noise": 0.3, "ms": 300}}
    files = []
    for n, (name, how) in enumerate(kinds.items()):
        rng = random.Random(n)
        files.append(export(tmp_path / f"{name}.jsonl", [answer(key, i, name, rng, **how)
                                                         for i in key["items"]]))
    answers = study.read_answers(files, key)
    known = study.annotators(answers, key)
    careless = {name: a["careless"] for name, a in known.items()}
    assert [n for n, why in careless.items() if not why] == ["anna", "ben", "cleo"], careless
    assert "gold" in careless["dice"] and "100% at one place" in careless["first"]
    assert careless["hasty"] == "300 ms an answer"
    assert all(a["gold"] == 8 and a["again"] >= 6 for a in known.values())

    good = [a for a in answers if not careless[a.annotator]]
    for what in ("best", "worst"):
        share, kappa, pairs = study.agreement(answers)[what]
        better, kappa_good, pairs_good = study.agreement(good)[what]
        assert better > share and kappa_good > kappa > 0 and pairs == 5 * pairs_good
    blind = study.agreement([a for a in answers if a.annotator in ("dice", "first")])["best"]
    assert abs(blind[1]) < 0.2

    chosen = study.decided(good, key)
    true = {id: tuple(list(key["items"][id]["made"])[k] for k in (0, 3)) for id in chosen}
    right = np.mean([chosen[id] == true[id] for id in chosen])
    of_all = study.decided(answers, key)
    assert right > 0.9 and 25 <= len(chosen) <= 40 and len(of_all) < len(chosen)
    assert not any(key["items"][id]["gold"] or key["items"][id]["repeat_of"] for id in chosen)


@pytest.mark.parametrize("same, again, out", [
    (0, 3, False), (0, 4, True), (1, 6, False), (1, 7, True), (3, 12, True), (4, 12, False), (20, 100, True),
    (40, 100, False)])
def test_how_often_one_must_agree_with_himself(same, again, out):
    known = {"gold": 0, "right": 0, "again": again, "same": same, "ms": 2000, "ranked": 0, "place": 0}
    assert study.careless(known) == (f"agrees with himself in {same} of {again}" if out else "")


def test_what_train_reward_reads(tmp_path):
    _, key = written(tmp_path, 6, 0, 0)
    rng = random.Random(0)
    lines = [answer(key, i, "anna", rng) for i in key["items"]]
    chosen = study.decided(study.read_answers([export(tmp_path / "a.jsonl", lines)], key), key)
    for others, n in ((False, 1), (True, 5)):
        path = study.write_ranked(tmp_path, study.ranked_items(chosen, key, others))
        pairs = preferences.open_pairs(path)
        assert len(pairs) == 6 * n and all((tmp_path / p.image_better).is_file() for p in pairs)
        assert {p.kind for p in pairs} == {"people"}
        for p in pairs:
            item = next(i for i in key["items"].values() if i["prompt"] == p.caption_better)
            at = [list(item["made"]).index(Path(f).stem) for f in (p.image_better, p.image_worse)]
            assert at[0] < at[1]


def test_majority():
    names = list("abcd")
    key = {"items": {"1": {"made": dict.fromkeys(names), "gold": None, "repeat_of": None}}}

    def votes(*pairs):
        return study.decided([study.Answer("1", str(n), "ranked" if p[0] in "abcd" else p, *(
            p if p[0] in "abcd" and len(p) == 2 else (None, None)), tuple(names), 2000.0, 0.0)
            for n, p in enumerate(pairs)], key)

    assert votes("ab") == votes("ab", "ab", "cd") == {"1": ("a", "b")}
    assert votes("ab", "cd") == votes("ab", "tie") == votes("ab", "ab", "bad", "tie") == {}
    assert votes("ab", "ab", "skip", "skip") == {"1": ("a", "b")}


def test_bad_lines(tmp_path, capsys):
    """A later answer wins; what is not an answer to this study is named and counts for nothing."""
    _, key = written(tmp_path, 12, 0, 0)
    rng, (one, two, *_) = random.Random(0), key["items"]
    first, later = answer(key, one, "anna", rng), answer(key, one, "anna", rng, verdict="tie")
    later["at"] = first["at"] + 5
    good = answer(key, two, "anna", rng)
    bad = [good | x for x in (
        {"study": "0"}, {"id": "zzz"}, {"annotator": " "}, {"verdict": "yes"}, {"best": good["worst"]},
        {"order": good["order"][:3]}, {"ms": -1}, {"best": "../../etc"}, {"at": True})]
    many = [answer(key, i, "ben", rng) for i in key["items"]]
    file = export(tmp_path / "a.jsonl", [later, first, *bad[:4], good, *many, *bad[4:]])
    answers = study.read_answers([file], key)
    assert len(answers) == 14 and capsys.readouterr().err.count("skipped") == len(bad)
    mine = {a.id: a for a in answers if a.annotator == "anna"}
    assert mine[one].verdict == "tie" and mine[one].best is None and mine[two].best == good["best"]
    with pytest.raises(SystemExit, match="no such file"):
        study.read_answers([tmp_path / "none"], key)
    with pytest.raises(SystemExit, match="not the key of a study"):
        study.read_key(tmp_path / "page")


def test_the_page_gives_nothing_away(tmp_path):
    items, key = written(tmp_path, 4, 4, 1.0, prompt='</script><img src=x onerror=alert(1)> "{}"')
    page = (tmp_path / "page/index.html").read_text()
    inline = json.loads(re.search(r'<script id="tasks" type="application/json">(.*?)</script>', page)[1])
    assert len(inline["tasks"]) == 12 and not re.search("model|gold", json.dumps(inline))
    assert "onerror" not in page.replace(json.dumps(inline).replace("<", "\\u003c"), "")
    assert "<img src=x" not in page and "innerHTML" not in page and not re.search(r"https?://", page)
    assert "fetch(" not in page and "default-src 'none'" in page
    assert all(set(t) == {"id", "prompt", "candidates", "source"} for t in inline["tasks"])
    assert len(list((tmp_path / "page/pictures").iterdir())) == 32
    assert not list((tmp_path / "page").glob("key*"))
    assert study.read_key(tmp_path) == key
    assert study.write_study(tmp_path, items, "Which is best?", 1.0, seed=1) == key


DRIVER = """
const out = [], press = (code, shift) => document.dispatchEvent(
  new KeyboardEvent("keydown", {code: code, shiftKey: !!shift, bubbles: true, cancelable: true}));
const log = (name) => out.push([name, answers.map((a) => [a.id, a.verdict, a.best, a.worst])]);
log("before");
if (!byId("name").value) byId("name").value = "anna";
byId("begin").click();
log("begun");
const texts = [...document.querySelectorAll("#prompt img, #work script")].length;
const shown = order[at].order.slice();
try { DO } catch (e) { out.push(["error", String(e)]); }
document.body.replaceChildren();
document.body.textContent = "RESULT" + JSON.stringify({out, texts, shown, lines: lines(), message: "",
  asked: annotator, order: order.map((t) => t.id)}) + "END";
"""


def in_browser(folder, do):
    """The page and what a person would do, in a headless browser that keeps its profile -> the outcome."""
    page = (folder / "page/index.html").read_text()
    (folder / "page/test.html").write_text(
        page.replace("</body>", f"<script>{DRIVER.replace('DO', do)}</script></body>"))
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile",
         "--dump-dom", f"file://{folder}/page/test.html"], capture_output=True, text=True, timeout=600)
    found = re.search(r"<body>RESULT(.*)END\s*</body>", done.stdout, re.S)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_in_a_browser(tmp_path):
    """Keys, undo, answers kept over a reload, export, import; nothing of a text becomes an element."""
    _, key = written(tmp_path, 6, 0, 0, prompt="<img src=x onerror=alert(1)><b>cat</b> {}")
    first = in_browser(tmp_path, """
      press("Digit2"); press("Digit2", true); log("one cannot be both");
      press("Digit1"); log("ranked");
      press("KeyT"); log("tie"); press("Backspace"); log("undone"); press("KeyX"); press("Numpad3");
    """)
    states = {name: rows for name, rows in first["out"]}
    assert states["before"] == states["begun"] == states["one cannot be both"] == [] and first["texts"] == 0
    id, verdict, best, worst = states["ranked"][0]
    assert verdict == "ranked" and best == first["shown"][0] and worst == first["shown"][1]
    assert [v for _, v, *_ in states["tie"]] == ["ranked", "tie"] and states["undone"] == states["ranked"]
    lines = [json.loads(line) for line in first["lines"].splitlines()]
    assert [x["verdict"] for x in lines] == ["ranked", "bad"] and lines[0]["order"] == first["shown"]
    (tmp_path / "a.jsonl").write_text(first["lines"])
    assert [a.verdict for a in study.read_answers([tmp_path / "a.jsonl"], key)] == ["ranked", "bad"]

    foreign = json.dumps(lines[0] | {"annotator": "<b>eve</b>"})
    newer = json.dumps(lines[0] | {"verdict": "tie", "best": None, "worst": None, "at": lines[0]["at"] + 1})
    again = in_browser(tmp_path, f"""
      merge({json.dumps(newer + chr(10) + foreign + chr(10) + "rubbish")}); log("merged");
      out.push(["message", byId("message").textContent]);
    """.replace("<", "\\u003c"))
    states = {name: rows for name, rows in again["out"]}
    assert again["asked"] == "anna" and again["order"] == first["order"]  # kept over a reload
    assert [v for _, v, *_ in states["begun"]] == ["ranked", "bad"]
    assert [v for _, v, *_ in states["merged"]] == ["tie", "bad"]
    assert states["message"].startswith("1 answers imported, 2 lines")
