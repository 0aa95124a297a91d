"""make_prefs.py --texts and --labels: from texts to a page, from what people export to preferences."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from test_served import Judge
from test_study import answer, export

import checkpoint
import make_prefs
import model
import rewards
from readers import preferences, study

SIZE = 16
TEXTS = [f"{a} {b} {c}" for a in ("a red", "two blue", "a fantastic green", "one small grey")
         for b in ("star", "box", "heart", "cross") for c in ("on grass", "in the snow")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two random bases, one of them with a mask input, a random reward, and texts of two kinds of files."""
    at = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    cfg = model.PRESETS["test"]
    for name, c in (("one", cfg), ("two", model.inpainting(cfg))):
        net = model.Editor(c)
        torch.nn.init.normal_(net.mmdit.final_layer.linear.weight, std=0.05)
        checkpoint.write(at / name, 1, {"model": net.state_dict()},
                         {"arch": net.arch, "config": {"image_size": SIZE}})
    arch = rewards.REWARD_PRESETS["test"]
    words = rewards.train_tokenizer(TEXTS, arch.vocab, arch.txt_len)
    net = rewards.PreferenceReward(dataclasses.replace(arch, tokenizer=words))
    checkpoint.write(at / "reward", 1, {"model": net.state_dict()}, {"arch": net.arch, "val": {}})
    (at / "a.txt").write_text("\n".join(TEXTS[:20]))
    (at / "b.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in [*TEXTS[20:], "epic 8k"]))
    return at


def config(made, out, **changes):
    flags = {"texts": f"{made / 'a.txt'},{made / 'b.jsonl'}", "ckpt": f"{made / 'one'},{made / 'two'}",
             "steps": "1,2", "n": 14, "clusters": 4, "neighbours": 3, "batch_size": 8, "gold": 0.5,
             "repeats": 0.7, "device": "cpu", "out": str(out)} | changes
    return make_prefs.Config(**flags)


@pytest.mark.slow
def test_people(made, tmp_path, capsys):
    """Texts -> page -> answers of four, one blind -> pairs, and what was left out is said."""
    make_prefs.main(config(made, tmp_path / "s"))
    said = capsys.readouterr().out
    assert "too little left 1" in said and "fantastic, brilliant" in said and f"{made / 'one'}" in said
    chosen = (tmp_path / "s/prompts.txt").read_text().splitlines()
    assert len(chosen) == 14 and not any("fantastic" in t for t in chosen)
    key = study.read_key(tmp_path / "s")
    first = [i for i in key["items"].values() if not i["gold"]]
    assert {v.rsplit("/")[-1] for i in first for v in i["made"].values()} == {
        "one, 1 steps", "two, 1 steps", "one, 2 steps", "two, 2 steps"}
    gold = [i for i in key["items"].values() if i["gold"]]
    assert len(gold) >= 5 and all(i["made"][i["gold"]["worst"][0]] == "ruined" for i in gold)
    (picture, *_) = (tmp_path / "s/page/pictures").iterdir()
    assert Image.open(picture).size == (SIZE, SIZE)

    rng, files = random.Random(0), []
    for n in ("anna", "ben", "cleo", "dora"):
        lines = [answer(key, i, n, rng, blind=n == "dora") for i in key["items"]]
        files.append(export(tmp_path / f"{n}.jsonl", lines))
    make_prefs.main(make_prefs.Config(labels=",".join(map(str, files)), out=str(tmp_path / "s")))
    said = capsys.readouterr().out
    assert "left out: gold" in said and said.count("left out") == 1 and "kappa 1.00" in said
    pairs = preferences.open_pairs(tmp_path / "s/aesthetic.json")
    assert len(pairs) == 14 and {p.caption_better for p in pairs} == set(chosen)


def test_a_reward(made, tmp_path, capsys):
    """The reward's best and worst of every text, and nothing else; close ones are no pair."""
    make_prefs.main(config(made, tmp_path / "j", judge=str(made / "reward"), features="hashed", margin=0.0))
    assert "over hashed words" in capsys.readouterr().out
    pairs = preferences.open_pairs(tmp_path / "j/aesthetic.json")
    assert len(pairs) == 14 and not (tmp_path / "j/page/index.html").exists()
    score = rewards.score_of(rewards.open_reward(str(made / "reward")))
    for p in pairs:
        better, worse = (torch.from_numpy(np.array(Image.open(tmp_path / "j" / f))).permute(2, 0, 1)[None]
                         / 127.5 - 1 for f in (p.image_better, p.image_worse))
        assert score(better, [p.caption_better]) > score(worse, [p.caption_worse])
    make_prefs.main(config(made, tmp_path / "k", judge=str(made / "reward"), margin=1e6))
    assert json.loads((tmp_path / "k/aesthetic.json").read_text()) == []


def test_margin_is_in_deviations_of_a_published_score(made, tmp_path, monkeypatch):
    """Cosines differ by hundredths, PickScore's scores by ones: of both as many pairs are clear, some not."""
    own, kept = rewards.score_of(rewards.open_reward(str(made / "reward"))), []
    for k, scale in enumerate((1e-4, 100.0)):
        monkeypatch.setattr(rewards, "open_reward", lambda *a: lambda x, c: 20 + scale * own(x, c).double())
        make_prefs.main(config(made, tmp_path / str(k), judge="clipscore:a,b", features="hashed", margin=2.0))
        kept.append(json.loads((tmp_path / str(k) / "aesthetic.json").read_text()))
    assert kept[0] == kept[1] and 0 < len(kept[0]) < 14


@pytest.mark.parametrize("change, words", [
    ({"n": 99}, "--n: 99: --texts has 32"), ({"texts": "nowhere.txt"}, "no such file"), ({"k": 5}, "--k: 5"),
    ({"judge": "x:y"}, "--judge"), ({"ckpt": "nowhere"}, "nowhere"), ({"clusters": 0}, "--clusters"),
    ({"gold": 2.0}, "--gold"), ({"texts": None, "labels": "x"}, "not the key of a study")])
def test_mistakes_give_one_line(made, tmp_path, change, words):
    with pytest.raises(SystemExit) as stop:
        make_prefs.main(config(made, tmp_path, **change))
    text = str(stop.value)
    assert text.startswith("error: ") and "\n" not in text and words in text, text


# ---- new captions by a served model ----------------------------------------------------------------------


def captioned(at, n=10):
    """Pictures of one grey each, and captions that say something else."""
    at.mkdir()
    for i in range(n):
        Image.fromarray(np.full((40, 40, 3), 20 * i + 10, np.uint8)).save(at / f"{i}.png")
        (at / f"{i}.txt").write_text(TEXTS[i])
    return at


def writer(n, question):
    """Describes pictures by their grey: most anew, one in its own words, one in two sentences."""
    grey = int(question.pictures[0][0, 0, 0]) // 20
    said = {3: TEXTS[3] + " again", 4: "Grey. Very grey."}.get(grey, f"a plain square of grey number {grey}")
    return {"id": question.mark, "caption": said}


def test_new_captions_for_those_that_fit_least(made, tmp_path, capsys):
    """Which pairs are kept follows from the reward alone; again, and nothing is asked."""
    server, data = Judge(writer), str(captioned(tmp_path / "in"))
    source = make_prefs.open_source(data, "train")
    N = len(source)
    flags = dict(data=data, recaption=f"http://127.0.0.1:{server.server_port}/v1",
                 model="judge", judge=str(made / "reward"), n=N, lowest=0.8, margin=0.0, device="cpu",
                 batch_size=4)
    make_prefs.main(make_prefs.Config(out=str(tmp_path / "o"), **flags))
    rows = [json.loads(line) for line in (tmp_path / "o/alignment.jsonl").read_text().splitlines()]
    net = rewards.open_reward(str(made / "reward"))
    score, size = rewards.score_of(net), net.cfg.image_size

    def fit(i, text):
        x = torch.full((1, 3, size, size), (20 * i + 10) / 127.5 - 1)
        with torch.inference_mode():
            return score(x, [text]).item()

    grey = [int(source.load(i, 8, 8)["image"][0, 0, 0]) // 20 for i in range(N)]
    old = {i: fit(i, TEXTS[i]) for i in grey}
    lowest = sorted(grey, key=old.get)[:round(0.8 * N)]
    want = {i: f"a plain square of grey number {i}" for i in lowest if i not in (3, 4)
            and fit(i, f"a plain square of grey number {i}") - old[i] > 1e-6}
    bad = 4 in lowest
    assert 0 < len(want) < len(lowest)
    assert {TEXTS.index(r["worse"]): r["better"] for r in rows} == want
    assert all(r["kind"] == "recaption" and (tmp_path / "o" / r["image"]).is_file() for r in rows)
    assert len(server.asked) == len(lowest)
    said = capsys.readouterr().out
    assert f"{N} captioned pictures, 0 skipped; {len(lowest)} of them are described" in said
    assert f"{int(bad)} replies could not be" in said
    make_prefs.main(make_prefs.Config(out=str(tmp_path / "o"), **flags))
    assert len(server.asked) == len(lowest) + bad  # what could not be used
    pairs = preferences.open_pairs(tmp_path / "o/alignment.jsonl")
    assert len(pairs) == len(want) and all(p.image_better == p.image_worse for p in pairs)
    with pytest.raises(SystemExit, match="error: --judge: people: .*told by a reward"):
        make_prefs.main(make_prefs.Config(out=str(tmp_path / "p"), **flags | {"judge": "people"}))
    server.shutdown()
    server.server_close()


def test_further_captions_are_of_scenes(made, tmp_path):
    """Of photos none were made, whatever was asked."""
    flags = dict(data=str(captioned(tmp_path / "in")), ckpt=str(made / "two"), n=3, captions=2, device="cpu")
    with pytest.raises(SystemExit, match="error: --captions: 2: further pictures .* scenes alone"):
        make_prefs.main(make_prefs.Config(out=str(tmp_path / "o"), **flags))


def test_a_served_model_that_is_not_there(made, tmp_path):
    flags = dict(data=str(captioned(tmp_path / "in", 3)), recaption="http://127.0.0.1:9/v1", model="judge",
                 judge=str(made / "reward"), n=3, lowest=1.0, device="cpu", out=str(tmp_path / "o"))
    own = make_prefs.served.Served

    def client(*args, **more):
        return own(*args, **more, backoff=0.0, attempts=1, give_up=2)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(make_prefs.served, "Served", client)
        with pytest.raises(SystemExit, match="error: --recaption: http://127.0.0.1:9/v1: .*the same command"):
            make_prefs.main(make_prefs.Config(**flags))
