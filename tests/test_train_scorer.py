"""train_scorer.py: what it reports, what it refuses, and that a small network learns a judge."""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from inprocess import run_ranks, run_script
from PIL import Image

import checkpoint
import common
import rewards
import train_scorer

COLOURS = {"red": (200, 40, 40), "blue": (40, 40, 200), "green": (40, 180, 60)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """240 pairs: grey becomes a colour, the one asked for (9.5) or another (2)."""
    root, rng, rows = tmp_path_factory.mktemp("edits"), np.random.default_rng(0), []
    for name, level in {"grey": (120,) * 3, **COLOURS}.items():
        for k in range(8):
            noisy = np.clip(np.array(level) + rng.normal(0, 12, (16, 16, 3)), 0, 255)
            Image.fromarray(noisy.astype(np.uint8)).save(root / f"{name}{k}.png")
    for i in range(240):
        asked, other = rng.choice(list(COLOURS), 2, replace=False)
        right = bool(i % 2)
        rows.append({"source": f"grey{i % 8}.png", "edited": f"{asked if right else other}{i % 7}.png",
                     "key": str(i), "instruction": f"make it {asked}", "score": 9.5 if right else 2.0,
                     "task": ("style", "environment")[i % 3 > 0]})
    (root / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:200]))
    (root / "held.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[200:]))
    (root / "bare.jsonl").write_text("".join(
        json.dumps({k: r[k] for k in ("source", "edited", "instruction", "key")}) + "\n" for r in rows))
    return root


def run(out, fails=False, **flags):
    flags = {"preset": "test", "steps": 100, "lr": 2e-3, "warmup": 10, "batch_size": 16, "workers": 0,
             "device": "cpu", "wandb": "off", "precision": "fp32", "aspects": False, "out": out} | flags
    done = run_script(train_scorer.__file__, *(f"--{k}={v}" for k, v in flags.items()))
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


@pytest.mark.slow
def test_learns(folder, tmp_path):
    pairs = {"data": folder / "pairs.jsonl", "val_data": folder / "held.jsonl"}
    text = run(tmp_path / "a", **pairs, steps=300, lr=1e-3)
    manifest = json.loads((tmp_path / "a/step_00000300/manifest.json").read_text())
    before, after = manifest["meta"]["before"], manifest["meta"]["val"]
    assert after["val/spearman"] > 0.8 > abs(before["val/spearman"]) and after["val/pairs"] == 40
    assert after["val/precision_as_many"] > 0.9 and after["val/off"] < 1.5 < before["val/off"]
    assert after["val/calibrated_off"] < 1.5 and after["val/calibrated_precision"] > 0.9
    assert after["val/score_of_nothing_done"] < 1 and "untrained   trained" in text
    net = rewards.open_scorer(str(tmp_path / "a"))
    flat = {k: torch.tensor(v)[None, :, None, None].expand(1, 3, 24, 40) / 127.5 - 1
            for k, v in {**COLOURS, "grey": (120,) * 3}.items()}
    right, wrong = rewards.score_edits(net, torch.cat([flat["grey"]] * 2), torch.cat([flat["red"]] * 2),
                                       ["make it red", "make it blue"])
    assert 0 <= wrong < 5 < right <= 10
    assert net.knots == after["knots"]


def test_resume_is_exact(folder, tmp_path):
    flags = {"data": folder / "pairs.jsonl", "batch_size": 4, "eval_pairs": 4, "save_every": 2, "steps": 3}
    run(tmp_path / "a", **flags)
    (tmp_path / "c").mkdir()
    (tmp_path / "a/step_00000002").rename(tmp_path / "c/step_00000002")
    text = run(tmp_path / "c", **flags)
    assert "resumed" in text and "rank correlation with the judge" in text
    at = "step_00000003/model.safetensors"
    assert (tmp_path / "a" / at).read_bytes() == (tmp_path / "c" / at).read_bytes()
    assert "began with --preset test" in run(tmp_path / "a", fails=True, **flags | {"preset": "tiny"})


def test_a_path_below_the_home_folder_resumes(folder, tmp_path, monkeypatch):
    """The manifest names no user (log.portable); the very command that began the run goes on with it."""
    monkeypatch.setenv("HOME", str(folder))
    flags = {"data": folder / "pairs.jsonl", "batch_size": 4, "eval_pairs": 4}
    run(tmp_path / "a", **flags, steps=1)
    assert "resumed" in run(tmp_path / "a", **flags, steps=2)
    assert (tmp_path / "a/run.lock").is_file()  # as every training script, it claims its folder


def test_a_report_is_of_the_weights_beside_it(folder, tmp_path, monkeypatch, capsys):
    """What calibrates a checkpoint was measured on its own weights, wherever --eval_every falls. A signal
    leaves no time for it: that is said when it is opened, and made up for when the run is said to be over."""
    flags = {"data": folder / "pairs.jsonl", "batch_size": 4, "eval_pairs": 4, "save_every": 2,
             "eval_every": 3}
    run(tmp_path / "a", **flags, steps=4)
    for at in (2, 4):
        manifest = json.loads((tmp_path / f"a/step_{at:08d}/manifest.json").read_text())
        assert manifest["meta"]["val"]["step"] == at
    rewards.open_scorer(str(tmp_path / "a"))
    assert "warning" not in capsys.readouterr().out
    own = common.Verdict.give

    def give(self, step, *rest):
        monkeypatch.setattr(common, "_stop_signal", "SIGTERM" if step == 3 else None)
        return own(self, step, *rest)

    monkeypatch.setattr(common.Verdict, "give", give)
    flags |= {"save_every": 100, "out": tmp_path / "b"}
    assert "stopped by a signal at step 5" in run(**flags, steps=100)
    monkeypatch.undo()
    rewards.open_scorer(str(tmp_path / "b"))
    assert "weights are of step 5, its scores were measured at step 3" in capsys.readouterr().out
    assert "rank correlation with the judge" in run(**flags, steps=5)
    rewards.open_scorer(str(tmp_path / "b"))
    assert "warning" not in capsys.readouterr().out
    flags["eval_every"] = 0  # and where no report was made yet
    monkeypatch.setattr(common.Verdict, "give", give)
    run(**flags | {"out": tmp_path / "c"}, steps=100)
    monkeypatch.undo()
    assert "rank correlation with the judge" in run(**flags | {"out": tmp_path / "c"}, steps=5)


@pytest.mark.slow
def test_two_ranks(folder, tmp_path):
    """Each scores its half of the held-out pairs; the report is of all of them."""
    flags = {"data": folder / "pairs.jsonl", "val_data": folder / "held.jsonl", "preset": "test", "steps": 2,
             "batch_size": 4, "workers": 0, "device": "cpu", "wandb": "off", "out": tmp_path / "two"}
    done = run_ranks(2, [train_scorer.__file__, *(f"--{k}={v}" for k, v in flags.items())])
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two/step_00000002/manifest.json").read_text())
    assert two["meta"]["before"]["val/pairs"] == 40 and two["samples"] == 16
    same = {k: getattr(train_scorer.Config, k) for k in ("lr", "warmup", "aspects")}
    run(tmp_path / "one", **{k: v for k, v in flags.items() if k != "out"} | same | {"batch_size": 8})
    one = json.loads((tmp_path / "one/step_00000002/manifest.json").read_text())
    assert one["meta"]["before"]["val/off"] == pytest.approx(two["meta"]["before"]["val/off"], abs=1e-4)
    assert one["meta"]["val"]["val/off"] == pytest.approx(two["meta"]["val"]["val/off"], abs=1e-3)


def test_starts_from_a_reward():
    """The towers of a preference reward see the edited picture as before, and the source not at all yet."""
    torch.manual_seed(0)
    cfg = rewards.REWARD_PRESETS["test"]
    reward = rewards.PreferenceReward(cfg)
    net = rewards.EditScorer(cfg)
    head = {f"head.{k}": v for k, v in net.head.state_dict().items()}
    net.load_state_dict(rewards.widened(reward.state_dict()) | head)
    x, other, ids = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32), torch.randint(0, 99, (2, 5))
    tokens = reward.blip["visual_encoder"](((x + 1) / 2 - reward.mean) / reward.std)
    txt = reward.blip["text_encoder"](ids, torch.ones_like(ids), tokens)
    got = net(other, x, ids, torch.ones_like(ids))
    assert torch.allclose(got, net.head(txt[:, 0]), atol=1e-5)
    assert torch.equal(got, net(x, x, ids, torch.ones_like(ids)))


def test_refusals(folder, tmp_path):
    assert "not one of 228 pairs has a score" in run(tmp_path, fails=True, data=folder / "bare.jsonl",
                                                     val_data=folder / "held.jsonl")
    assert "error: --eval_pairs: 1: " in run(tmp_path, fails=True, data=folder / "pairs.jsonl", eval_pairs=1)
    assert "error: --batch_size: 1: has no next pair whose" in run(tmp_path, fails=True, batch_size=1)
    assert "error: --keep_score: 11" in run(tmp_path, fails=True, keep_score=11)
    assert "error: --init: x:y" in run(tmp_path, fails=True, init="x:y")


def test_sizes_that_cannot_be_are_refused_before_it_is_built(tmp_path):
    net = rewards.EditScorer(rewards.REWARD_PRESETS["test"])
    for key, value in (("vit_heads", 0), ("vit_depth", 10**7)):
        meta = {"arch": net.arch | {key: value}}
        checkpoint.write(tmp_path / key, 1, {"model": {"a": torch.zeros(2)}}, meta)
        with pytest.raises(SystemExit, match=f"manifest.json: arch: {key} '{value}' is no number"):
            rewards.open_scorer(str(tmp_path / key))


def test_loss_has_the_right_mean():
    """The gradient vanishes at two whole scores in the right shares, for each score."""
    for value in (0.0, 3.7, 9.0, 9.25, 10.0):
        low = min(int(value), 9)
        logits = torch.full((1, 11), -40.0)
        logits[0, low], logits[0, low + 1] = np.log([max(low + 1 - value, 1e-9), max(value - low, 1e-9)])
        logits.requires_grad_()
        rewards.scorer_loss(logits, torch.tensor([value])).sum().backward()
        assert logits.grad.abs().max() < 1e-5
    logits = torch.log_softmax(torch.randn(3, 11), 1)
    assert torch.allclose(rewards.scorer_loss(logits, torch.tensor([4.0, 10.0, 0.0])),
                          -logits[[0, 1, 2], [4, 10, 0]])


def test_statistics():
    a, b = np.array([1.0, 2, 2, 3]), np.array([1.0, 3, 2, 4])  # ranks 1, 2.5, 2.5, 4: 4.5 / sqrt(4.5 * 5)
    assert train_scorer.spearman(a, b) == pytest.approx(0.9486833)
    assert train_scorer.spearman(b, -b**3) == pytest.approx(-1) and train_scorer.spearman(a, a * 0) is None
    x, y = train_scorer.isotonic(np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 5]))
    assert x.tolist() == [1, 2.5, 4] and y.tolist() == [1, 2.5, 5]
    for true in ([1.0, 3, 9, 10], [10.0, 9, 3, 1]):  # equal scores have one calibrated value, in any order
        x, y = train_scorer.isotonic(np.full(4, 5.0), np.array(true))
        assert np.interp(5.0, x, y) == 5.75
    x, y = train_scorer.isotonic(np.array([4.0, 5, 4, 6]), np.array([2.0, 1, 4, 7]))
    assert x.tolist() == pytest.approx([13 / 3, 6]) and y.tolist() == pytest.approx([7 / 3, 7])
    assert train_scorer.ece(np.arange(10.0), np.arange(10.0) + 2) == pytest.approx(2)


def test_calibration_is_judged_where_it_was_not_fitted():
    """Scores that rank well and are all too low: nothing is kept before calibration, the right ones after.
    On pure noise the calibrated error is no better than that of a constant."""
    rng = np.random.default_rng(1)
    true = rng.uniform(0, 10, 4000)
    found = train_scorer.compare(true / 3, true, np.full(4000, "swap"), 9.0)
    assert found["val/kept"] == 0 and found["val/precision"] is None and found["val/spearman"] > 0.999
    assert found["val/calibrated_precision"] > 0.95 and found["val/calibrated_recall"] > 0.95
    assert found["val/precision_as_many"] == 1 and found["val/calibrated_off"] < 0.05 < found["val/off"]
    noise = train_scorer.compare(rng.uniform(0, 10, 4000), true, np.full(4000, ""), 9.0)
    assert noise["val/calibrated_off"] > 2.4 and abs(noise["val/spearman"]) < 0.06
    assert noise["val/precision_as_many"] == pytest.approx(0.1, abs=0.05)


def test_negatives():
    """A function of the position alone; an equal task's instruction, which may be true, is not lent."""
    cfg = train_scorer.Config(negatives=0.5)
    one = train_scorer.draws(cfg, {"step": 3, "position": list(range(400))})["kind"]
    two = train_scorer.draws(cfg, {"step": 3, "position": list(range(200, 400))})["kind"]
    assert one[200:] == two and 150 < sum(k > 0 for k in one) < 250 and 60 < one.count(1) < 140
    x = torch.arange(4.0)[:, None, None, None].expand(4, 3, 2, 2)
    edited, captions, scores, wrong = train_scorer.spoil(
        {"kind": [0, 1, 2, 2], "caption": list("abcd"), "task": ["swap", "add", "add", "add"],
         "image": x + 10, "source": x, "score": torch.tensor([9.0, 8.0, 7.0, np.nan])})
    assert edited[:, 0, 0, 0].tolist() == [10, 1, 12, 13] and captions == ["a", "b", "c", "a"]
    assert scores.tolist() == [9, 0, 7, 0] and wrong.tolist() == [False, True, False, True]
    unknown = {"kind": [2, 2], "caption": list("ab"), "task": ["", ""], "image": x[:2] + 10, "source": x[:2],
               "score": torch.tensor([9.0, 8.0])}  # sets without tasks have these negatives, too
    edited, captions, scores, wrong = train_scorer.spoil(unknown)
    assert captions == ["b", "a"] and scores.tolist() == [0, 0]
    assert wrong.all() and edited[:, 0, 0, 0].tolist() == [10, 11]


def test_every_knob_is_documented():
    text = Path(train_scorer.__file__).read_text()
    for field in fields(train_scorer.Config):
        assert f"    {field.name}: " in text and "#" in next(
            line for line in text.splitlines() if line.startswith(f"    {field.name}: "))
