"""train_reward.py: real processes on flat coloured pictures, tiny sizes."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from held import held
from inprocess import run_ranks, run_script
from PIL import Image
from safetensors.torch import load_file

import checkpoint
import common
import rewards
import train_reward

ROOT = Path(train_reward.__file__).parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
COLOURS = {"red": (200, 40, 40), "blue": (40, 40, 200)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """captions.jsonl: a picture, true and false colour; pictures.json: bright or dark, ImageReward's form."""
    root, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    rows, items = [], []
    for i in range(120):
        true, false = ("red", "blue") if i % 2 else ("blue", "red")
        levels = {f"{i}.png": COLOURS[true], f"bright{i}.png": (190,) * 3, f"dark{i}.png": (60,) * 3}
        for name, level in levels.items():
            noisy = np.clip(np.array(level) + rng.normal(0, 12, (16, 16, 3)), 0, 255)
            Image.fromarray(noisy.astype(np.uint8)).save(root / name)
        rows.append({"image": f"{i}.png", "better": f"a {true} picture", "worse": f"a {false} picture"})
        files = [f"dark{i}.png", f"bright{i}.png"]
        items.append({"prompt": f"picture {i}", "generations": files, "ranking": [2, 1]})
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "pictures.json").write_text(json.dumps(items))
    return root


def command(pairs, out, **flags):
    flags = {"preset": "test", "steps": 40, "lr": 1e-3, "batch_size": 16, "workers": 0, "device": "cpu",
             "wandb": "off", "precision": "fp32", "log_every": 10, "eval_every": 0} | flags
    flags = {"pairs": pairs, "out": out} | flags
    return [train_reward.__file__, *(f"--{k}={v}" for k, v in flags.items())]


def run(argv, ranks=1, fails=False):
    done = run_script(*argv) if ranks == 1 else run_ranks(ranks, argv)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    if fails:
        assert "Traceback" not in done.stderr, done.stderr
    return done.stderr if fails else done.stdout


def rows(out):
    found = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [r for r in found if "loss/preference" in r], [r for r in found if "val/acc" in r]


def tensors(out, step):
    files = sorted((Path(out) / f"step_{step:08d}").glob("*.safetensors"))
    assert [f.stem for f in files] == ["model", "optimizer"]
    return {f"{f.stem}/{k}": v for f in files for k, v in load_file(f).items()}


@pytest.mark.parametrize("file, precision", [("captions.jsonl", "fp32"), ("pictures.json", "bf16")])
def test_learns(folder, tmp_path, file, precision):
    run(command(folder / file, tmp_path, precision=precision, augment=1))
    train, val = rows(tmp_path)
    assert train[-1]["loss/preference"] < 0.3
    assert val[-1]["val/acc"] > 0.9 and val[-1]["val/low"] < val[-1]["val/acc"] and val[-1]["val/pairs"] >= 5
    manifest = json.loads((tmp_path / "step_00000040/manifest.json").read_text())
    assert manifest["meta"]["val"]["val/best"] > 0.9 and manifest["samples"] == 640
    assert manifest["precision"] == precision
    net = rewards.build_reward(manifest["arch"])  # the folder needs nothing else
    net.load_state_dict(load_file(tmp_path / "step_00000040/model.safetensors"))
    ids, attend = net.tokenize(["a red picture", "a blue picture"])
    assert ids[0, 0] == 1 and attend.shape == ids.shape
    if file == "captions.jsonl":
        red = torch.tensor(COLOURS["red"])[None, :, None, None].expand(2, 3, 32, 32) / 127.5 - 1
        better, worse = net.eval()(red, ids, attend).tolist()
        assert better > worse


@pytest.mark.slow
def test_plateau(folder, tmp_path):
    """ImageReward's initialisation waits at ln 2 where ours learns, and says so."""
    flags = dict(lr=1e-5, steps=50, lr_schedule="constant", plateau_warn=30, dropout=0, val_fraction=0)
    text = run(command(folder / "captions.jsonl", tmp_path / "original", original_init=True, **flags))
    assert all(abs(r["loss/preference"] - 0.6931) < 0.002 for r in rows(tmp_path / "original")[0])
    assert len(re.findall("warning: step 30: the loss has stayed .* without --original_init", text)) == 1
    text = run(command(folder / "captions.jsonl", tmp_path / "ours", **flags))
    losses = [r["loss/preference"] for r in rows(tmp_path / "ours")[0]]
    assert losses[-1] < losses[0] - 0.05 and "has stayed" not in text


def test_original_init_is_below_adam_eps():
    """What reaches the towers at ImageReward's width, behind its head and behind ours."""
    for original in (True, False):
        torch.manual_seed(0)
        x = torch.randn(16, 768, requires_grad=True)
        head = rewards.RewardHead(768).eval()
        head.init_weights(original)
        score = head(x)[:, 0]
        torch.nn.functional.softplus(score[8:] - score[:8]).mean().backward()
        assert x.grad.abs().max() < 1e-8 if original else x.grad.abs().max() > 1e-4


def test_accuracy_by_kind_and_by_gap(folder, tmp_path):
    """One kind is told the wrong way round, and its gaps are the least: the accuracies say so."""
    lines = []
    for i in range(60):
        better, worse = ("bright", "dark") if i % 2 else ("dark", "bright")
        lines.append({"caption": f"picture {i}", "better": f"{better}{i}.png", "worse": f"{worse}{i}.png",
                      "kind": "right" if i % 2 else "wrong", "gap": i % 2 + 0.001 * i})
    held = folder / "held.jsonl"
    held.write_text("\n".join(map(json.dumps, lines)))
    run(command(folder / "pictures.json", tmp_path, val_pairs=held))
    val = rows(tmp_path)[1][-1]
    assert val["val/acc_right"] > 0.9 and val["val/acc_wrong"] < 0.1 and 0.4 < val["val/acc"] < 0.6
    assert val["val/acc_gap_low"] < 0.1 and val["val/acc_gap_high"] > 0.9
    assert (val["val/acc_gap_low"] + val["val/acc_gap_mid"] + val["val/acc_gap_high"]) / 3 == pytest.approx(
        val["val/acc"], abs=0.01)
    nan = math.nan
    assert train_reward.thirds([3.0, nan, 1.0, 2.0]) == ["gap_high", "", "gap_low", "gap_mid"]
    assert train_reward.thirds([1.0, nan, 2.0]) == ["", "", ""]  # too few


def test_scores_are_normalised_by_the_held_out_ones(folder, tmp_path, capsys):
    """What PeFL sees of a reward has mean 0 and deviation 1, as ImageReward's: the loss leaves both free, and
    a weight means nothing without them. Measured at the end alone, too (--eval_every 0)."""
    run(command(folder / "captions.jsonl", tmp_path / "r", steps=30))
    net = rewards.open_reward(str(tmp_path / "r"))
    assert "warning" not in capsys.readouterr().out
    _, manifest = checkpoint.load(tmp_path / "r")
    val = manifest["meta"]["val"]
    assert (net.score_mean, net.score_std) == (val["val/score_mean"], val["val/score_std"]) != (0.0, 1.0)
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    pictures = torch.stack([torch.from_numpy(np.array(Image.open(folder / r["image"]).convert("RGB")))
                            for r in lines]).movedim(-1, 1) / 127.5 - 1
    with torch.no_grad():
        scores = [rewards.score_of(net)(pictures, [r[side] for r in lines]) for side in ("better", "worse")]
    assert abs(torch.cat(scores).mean()) < 0.3 and 0.7 < torch.cat(scores).std() < 1.4
    run(command(folder / "captions.jsonl", tmp_path / "cut", steps=2, val_fraction=0))
    assert rewards.open_reward(str(tmp_path / "cut")).score_std == 1.0
    assert "were not measured" in capsys.readouterr().out


def test_what_scales_the_scores_is_of_the_weights_beside_it(folder, tmp_path, monkeypatch, capsys):
    """As in test_train_scorer.py: measured before each checkpoint, but not when a signal alone makes one."""
    flags = {"batch_size": 4, "eval_pairs": 4, "val_fraction": 0.2, "eval_every": 3}
    run(command(folder / "captions.jsonl", tmp_path / "a", **flags, steps=4, save_every=2))
    for at in (2, 4):
        manifest = json.loads((tmp_path / f"a/step_{at:08d}/manifest.json").read_text())
        assert manifest["meta"]["val"]["step"] == at
    rewards.open_reward(str(tmp_path / "a"))
    assert "are of step" not in capsys.readouterr().out
    own = common.Verdict.give

    def give(self, step, *rest):
        monkeypatch.setattr(common, "_stop_signal", "SIGTERM" if step == 3 else None)
        return own(self, step, *rest)

    monkeypatch.setattr(common.Verdict, "give", give)
    assert "at step 5" in run(command(folder / "captions.jsonl", tmp_path / "b", **flags, steps=100))
    monkeypatch.undo()
    rewards.open_reward(str(tmp_path / "b"))
    assert "weights are of step 5, its scores were measured at step 3" in capsys.readouterr().out
    run(command(folder / "captions.jsonl", tmp_path / "b", **flags, steps=5))
    rewards.open_reward(str(tmp_path / "b"))
    assert "are of step" not in capsys.readouterr().out


def test_wilson():
    low, high = train_reward.wilson(90, 100)  # Newcombe 1998 formula, computed by hand
    assert low == pytest.approx(0.82563, abs=1e-4) and high == pytest.approx(0.94477, abs=1e-4)
    assert train_reward.wilson(0, 10) == (0.0, pytest.approx(0.27753, abs=1e-4))
    assert train_reward.wilson(10, 10)[1] == 1.0 and train_reward.wilson(0, 0) == (0.0, 1.0)


@pytest.mark.slow
def test_kill_and_resume(folder, tmp_path):
    """kill -9 in the middle, then the same command: model and optimizer as without the kill, bit for bit."""
    flags = dict(steps=40, save_every=7, accum=2, batch_size=4, augment=2, noise=0.2, workers=1)
    run(command(folder / "captions.jsonl", tmp_path / "whole", **flags))
    argv = command(folder / "captions.jsonl", tmp_path / "killed", **flags)
    process = subprocess.Popen([sys.executable, *held("common:Verdict", "give", 39, tmp_path / "gate", argv)],
                               cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    target = 7 * int(np.random.default_rng().integers(1, 5))
    while not (tmp_path / f"killed/step_{target:08d}").exists():
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/step_00000040").exists()
    assert "resumed" in run(argv)
    whole, killed = tensors(tmp_path / "whole", 40), tensors(tmp_path / "killed", 40)
    assert whole.keys() == killed.keys()
    assert not [k for k in whole if not torch.equal(whole[k], killed[k])]
    other = command(folder / "captions.jsonl", tmp_path / "killed", **flags, original_init=True)
    assert "began with --original_init False" in run(other, fails=True)


@pytest.mark.slow
def test_two_ranks(folder, tmp_path):
    """Two ranks of 8 and one rank of 16 agree (without dropout, whose draws differ by rank).

    Weights whose gradient is zero but for rounding, as a key's bias, are moved by Adam all the same: so
    gradients (their running mean, exp_avg) and losses are compared.
    """
    flags = dict(steps=5, dropout=0, augment=1, log_every=1)
    run(command(folder / "captions.jsonl", tmp_path / "1", **flags))
    run(command(folder / "captions.jsonl", tmp_path / "2", **flags | {"batch_size": 8}), ranks=2)
    one, two = tensors(tmp_path / "1", 5), tensors(tmp_path / "2", 5)
    for k in (k for k in one if k.endswith("exp_avg")):
        assert (one[k] - two[k]).abs().max() <= 2e-3 * one[k].abs().max() + 1e-5, k
    (train, val), (train2, val2) = rows(tmp_path / "1"), rows(tmp_path / "2")
    losses = [[r["loss/preference"] for r in found] for found in (train, train2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert val[0]["val/loss"] == pytest.approx(val2[0]["val/loss"], rel=1e-3)
    assert val[0]["val/pairs"] == val2[0]["val/pairs"]


def test_sigterm_saves(folder, tmp_path):
    argv = command(folder / "captions.jsonl", tmp_path, steps=100_000)
    process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, env=ENV, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    while "step " not in process.stdout.readline():
        pass
    process.terminate()
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and "the same command resumes" in text
    assert len(list(tmp_path.glob("step_*/manifest.json"))) == 1


def test_init_and_freeze(folder, tmp_path):
    run(command(folder / "captions.jsonl", tmp_path / "a", steps=4))
    run(command(folder / "captions.jsonl", tmp_path / "b", steps=3, init=tmp_path / "a", freeze=0.5))
    a, b = tensors(tmp_path / "a", 4), tensors(tmp_path / "b", 3)
    changed = {k for k in a if k.startswith("model/") and not torch.equal(a[k], b[k])}
    still = ("visual_encoder.blocks.0.", "visual_encoder.patch_embed.", "visual_encoder.pos_embed",
             "text_encoder.encoder.layer.0.", "text_encoder.embeddings.")
    assert not [k for k in changed if k.removeprefix("model/blip.").startswith(still)]
    assert any("blocks.1." in k for k in changed) and any("layer.1." in k for k in changed)


def test_freeze_as_imagereward():
    """0.7 of 24 blocks and 12 layers: 0-15 and 0-7, whole layers."""
    with torch.device("meta"):
        net = rewards.PreferenceReward(rewards.REWARD_PRESETS["imagereward"])
    train_reward.freeze(net, 0.7)
    state = {n: p.requires_grad for n, p in net.named_parameters()}
    for part, first in ((r"visual_encoder\.blocks", 16), (r"encoder\.layer", 8)):
        for name, trains in state.items():
            if found := re.search(part + r"\.(\d+)\.", name):
                assert trains == (int(found[1]) >= first), name
    assert not state["blip.visual_encoder.pos_embed"] and state["mlp.layers.0.weight"]


def test_tokenizer():
    text = ["a red picture", "A Blue picture", "überraschung 你好"]
    made = rewards.train_tokenizer(text, 300, 10)
    assert made == rewards.train_tokenizer(text, 300, 10)
    net = rewards.PreferenceReward(rewards.RewardConfig(32, 8, 32, 1, 2, 32, 1, 2, 64, 300, 10, 16, made))
    ids, attend = net.tokenize(["a RED picture", "你 é \x00 " * 30, ""])
    assert ids.shape == attend.shape == (3, 10)  # cut to txt_len
    assert ids[0].tolist()[:2] != ids[1].tolist()[:2] and ids[:, 0].tolist() == [1, 1, 1]
    assert ids[2].tolist() == [1, 2] + [0] * 8 and attend[2].sum() == 2
    assert 3 not in ids  # bytes: nothing is unknown
    assert torch.equal(net.tokenize(["a red picture"])[0][0], ids[0][attend[0] > 0])
    with pytest.raises(SystemExit, match="vocab 100"):
        rewards.train_tokenizer(text, 100, 10)


BAD = [
    ({"preset": "huge"}, "--preset: huge"),
    ({"batch_size": 0}, "--batch_size: 0"),
    ({"freeze": 0.7}, "--init"),
    ({"dropout": 1.5}, "--dropout: 1.5"),
    ({"val_fraction": 1.0}, "--val_fraction: 1"),
    ({"init": "gone"}, "gone"),
    ({"init": "gone", "original_init": True}, "--original_init"),
    ({"val_pairs": "none.jsonl"}, "none.jsonl"),
    ({"pairs": "none.jsonl"}, "none.jsonl"),
    ({"device": "tpu9"}, "tpu9"),
    ({"lr": -1.0}, "--lr: -1.0"),
    ({"keep": -1}, "--keep: -1"),
]
SAME = '{"image": "0.png", "better": "a", "worse": "a"}'


@pytest.mark.parametrize("flags, text", BAD)
def test_bad_values(folder, tmp_path, flags, text):
    flags = dict(pairs=str(folder / "captions.jsonl"), out=str(tmp_path), preset="test", device="cpu") | flags
    with pytest.raises(SystemExit, match=f"error: .*{re.escape(text)}"):
        train_reward.main(train_reward.Config(**flags, workers=0, wandb="off"))


@pytest.mark.parametrize("content", ["", "not json\n", "[1, 2", SAME])
def test_bad_pair_file(tmp_path, content):
    (tmp_path / "pairs.jsonl").write_text(content)
    config = train_reward.Config(str(tmp_path / "pairs.jsonl"), str(tmp_path / "out"), wandb="off")
    with pytest.raises(SystemExit, match="error: .*pairs.jsonl"):
        train_reward.main(config)


def test_bad_command_line(folder, tmp_path):
    """One clear line, another exit code than 0, no traceback."""
    assert "--colour" in run(command(folder / "captions.jsonl", tmp_path, colour=3), fails=True)
    assert run(command(folder / "gone.jsonl", tmp_path), fails=True).splitlines()[-1].startswith("error: ")


def test_help_lists_every_knob():
    text, source = run([train_reward.__file__, "--help"]), (ROOT / "train_reward.py").read_text()
    knobs = [field.name for field in fields(train_reward.Config)]
    assert len(knobs) <= 40
    for name in knobs:
        assert f"--{name.replace('_', '-')}" in text
        assert re.search(rf"^    {name}: .*  # \S", source, re.M), f"{name} has no comment"


@pytest.mark.parametrize("name", ["blip", "imagereward"])
def test_starts_from_published_weights(folder, tmp_path, name):
    """BLIP's file has no head, ImageReward's has; the backbone is theirs, and trains on."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.manual_seed(3)
    net = rewards.PreferenceReward(rewards.RewardConfig(32, 8, 64, 1, 1, 64, 1, 1, 96, len(words) + 2))
    state = {k.removeprefix("blip.") if name == "blip" else k: v for k, v in net.state_dict().items()
             if name == "imagereward" or not k.startswith("mlp.")}
    torch.save({"model": state} if name == "blip" else state, tmp_path / "weights.pth")
    init = f"{name}:{tmp_path}/weights.pth,{tmp_path}/vocab.txt"
    out = run(command(folder / "captions.jsonl", tmp_path / "out", init=init, steps=1, lr=0.0))
    assert ("head starts fresh" in out) == (name == "blip")
    got = tensors(tmp_path / "out", 1)
    kept = [k for k in net.state_dict() if name == "imagereward" or not k.startswith("mlp.")]
    assert all(torch.equal(got[f"model/{k}"], net.state_dict()[k]) for k in kept)
    assert torch.equal(got["model/mlp.layers.0.weight"], net.mlp.layers[0].weight) == (name == "imagereward")
    refused = run(command(folder / "captions.jsonl", tmp_path / "no", init=f"{name}:only_one"), fails=True)
    assert refused.splitlines()[-1].startswith(f"error: --init: {name}:only_one: give")


def test_several_files_are_split_as_one(tmp_path):
    """A prompt of two files is on one side, also where a small file must hold one out."""
    for name, prompts in (("a", range(4)), ("b", range(14))):
        (tmp_path / name).mkdir()
        rows = [{"caption": f"prompt {i}", "better": f"{i}.png", "worse": f"{i}w.png"} for i in prompts]
        (tmp_path / name / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    cfg = train_reward.Config(pairs=f"{tmp_path}/a/p.jsonl,{tmp_path}/b/p.jsonl", val_fraction=0.1)
    parts = [train_reward.open_all(cfg.pairs, split, cfg) for split in ("train", "heldout", "all")]
    prompts = [{p.caption_better for p in part} for part in parts]
    assert not prompts[0] & prompts[1] and prompts[1] and prompts[0] | prompts[1] == prompts[2]
    assert len(parts[2]) == 18 == len({p.image_better for p in parts[2]})  # pictures of two folders
    assert {p.image_better.split("/")[0] for p in parts[2]} == {"a", "b"}
