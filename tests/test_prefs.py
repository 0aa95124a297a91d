"""make_prefs.py --texts and --labels: from texts to a page, from what people export to preferences."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
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


@pytest.mark.parametrize("change, words", [
    ({"n": 99}, "--n: 99: --texts has 32"), ({"texts": "nowhere.txt"}, "no such file"), ({"k": 5}, "--k: 5"),
    ({"judge": "x:y"}, "--judge"), ({"ckpt": "nowhere"}, "nowhere"), ({"clusters": 0}, "--clusters"),
    ({"gold": 2.0}, "--gold"), ({"texts": None, "labels": "x"}, "not the key of a study")])
def test_mistakes_give_one_line(made, tmp_path, change, words):
    with pytest.raises(SystemExit) as stop:
        make_prefs.main(config(made, tmp_path, **change))
    text = str(stop.value)
    assert text.startswith("error: ") and "\n" not in text and words in text, text
