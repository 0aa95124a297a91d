"""Tiny runs of the training scripts, and what they leave behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from held import held
from inprocess import run_ranks, run_script
from safetensors.torch import load_file

import checkpoint
import flow
import model
import rewards
import train_omni
import train_pefl

ROOT = Path(train_omni.__file__).parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONFAULTHANDLER": "1"}
SHARED = dict(batch_size=4, lr=1e-3, warmup=2, ema=0.9, precision="fp32", workers=0, device="cpu",
              wandb="off", log_every=1, sample_every=0, save_every=4)
OMNI = SHARED | dict(preset="test", lr_schedule="constant", steps=4)
PEFL = SHARED | dict(phases="5/4/2x4", adversarial_from=1)


def shipped(folder, net, **meta):
    """A checkpoint folder such as assets/base: weights and manifest."""
    return str(checkpoint.write(folder, 0, {"model": net.state_dict()}, {"arch": net.arch, **meta}))


def random_editor(cfg):
    """No zero gates, so that gradients reach everything at once."""
    editor = model.Editor(cfg)
    for p in editor.parameters():
        p.data.add_(torch.randn(p.shape), alpha=0.05)
    return editor


def make_models(root):
    """Folders: an inpainting base, a text-to-image one, one that needs a VAE, rewards, a damaged base."""
    torch.manual_seed(0)
    test, size = model.PRESETS["test"], {"config": {"image_size": 32, "shift": 1.0}}
    out = {"base": shipped(root / "base", random_editor(model.inpainting(test)), **size),
           "t2i": shipped(root / "t2i", random_editor(test), **size)}
    latent = model.inpainting(model.replace(test, channels=16, txt_bytes=0))
    out["latent"] = shipped(root / "latent", model.Editor(latent), **size)
    tokenizer = rewards.train_tokenizer(["a red circle", "a blue square on grass"], 300, 40)
    for seed, name, json_text in ((1, "aesthetic", tokenizer), (2, "alignment", tokenizer), (3, "mute", "")):
        torch.manual_seed(seed)
        net = rewards.PreferenceReward(model.replace(rewards.REWARD_PRESETS["test"], tokenizer=json_text))
        net.mlp.layers[-1].weight.data.mul_(0.1)  # scores far below the margin of relu(2 - r)
        out[name] = shipped(root / name, net, val={"val/score_mean": 0.0, "val/score_std": 1.0})
    out["damaged"] = shutil.copytree(out["base"], root / "damaged")
    weights = bytearray((out["damaged"] / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (out["damaged"] / "model.safetensors").write_bytes(weights)
    (root / "empty").mkdir()
    return out | {"empty": root / "empty", "missing": root / "missing"}


def settings(made, out, script, **flags):
    own = OMNI if script is train_omni else PEFL | {k: made[k] for k in ("base", "aesthetic", "alignment")}
    return own | {"out": str(out)} | flags


def call(made, out, script, **flags):
    """main() in this process -> the rows of metrics.jsonl that hold losses."""
    script.main(script.Config(**settings(made, out, script, **flags)))
    return rows(out)


def command(made, out, script, **flags):
    flags = settings(made, out, script, **flags)
    return [script.__file__, *(f"--{k}={v}" for k, v in flags.items())]


def run(argv, ranks=1):
    done = run_script(*argv) if ranks == 1 else run_ranks(ranks, argv)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(out):
    found = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [r for r in found if "grad_norm/editor" in r]


def newest(out):
    return max(Path(out).glob("step_????????"))


def tensors(out):
    """{"file/key": tensor} of the newest checkpoint."""
    return {f"{f.stem}/{k}": v for f in newest(out).glob("*.safetensors") for k, v in load_file(f).items()}


def differ(a, b):
    assert a.keys() == b.keys()
    return [k for k in a if not torch.equal(a[k], b[k])]
OMNI_FILES = {"model", "ema", "optimizer"}
PEFL_FILES = OMNI_FILES | {"coherence", "coherence_optimizer"}


def steps(script, n):
    return dict(steps=n) if script is train_omni else dict(phases=f"5/4/2x{n}")


def refused(made, out, script, text, **flags):
    """One line that begins with "error: ", and nothing but SystemExit, which is exit code 1."""
    flags = {k: str(made[v]) if v in made and k != "stage" else v for k, v in flags.items()}
    with pytest.raises(SystemExit) as e:
        call(made, out, script, **flags)
    message = str(e.value)
    assert message.startswith("error: ") and "\n" not in message, message
    assert re.search(text, message), message


def resumes(made, tmp_path, script, files, **flags):
    """SIGKILL after the first checkpoint, the same command, SIGTERM, the same command: as without them."""
    long = {"steps": 16} if script is train_omni else {"phases": "5/4/2x6,4/3/2x10"}
    flags = long | dict(sample_every=8) | flags
    run(command(made, tmp_path / "whole", script, **flags))
    argv, out = command(made, tmp_path / "cut", script, **flags), tmp_path / "cut"
    start = dict(cwd=ROOT, env=ENV, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    gate, give = tmp_path / "gate", ("common:Verdict", "give")  # called once a step
    process = subprocess.Popen([sys.executable, *held(*give, 15, gate, argv)], **start,
                               start_new_session=True)
    while not (out / "step_00000004").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)  # the data worker too
    process.communicate()
    assert not (out / "step_00000016").exists()

    process = subprocess.Popen([sys.executable, *held(*give, 3, gate, argv)], **start)
    while "resumed" not in (line := process.stdout.readline()):
        assert line, process.communicate()
    process.terminate()
    gate.touch()
    text, errors = process.communicate(timeout=600)
    assert process.returncode == 0 and "stopped by a signal" in text, text + errors
    assert 4 < int(newest(out).name[5:]) < 16

    assert "resumed" in run(argv)
    whole, cut = tensors(tmp_path / "whole"), tensors(out)
    assert {k.split("/")[0] for k in whole} == files
    assert not differ(whole, cut)
    last, again = rows(tmp_path / "whole")[-1], rows(out)[-1]
    same = [k for k in last if not k.startswith("perf/") and k != "time"]
    assert last["step"] == 16 and {k: last[k] for k in same} == {k: again[k] for k in same}


def two_ranks_agree(made, tmp_path, script, flags):
    """Two ranks of 2 and one of 4 agree in losses, gradients and the running means of gradients.

    Not in weights: Adam moves weights whose gradient is zero but for rounding (a key's bias) by a whole step.
    """
    one = call(made, tmp_path / "1", script, **flags)
    run(command(made, tmp_path / "2", script, **flags | {"batch_size": 2}), ranks=2)
    two = rows(tmp_path / "2")
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        for key in (k for k in a if k.startswith(("loss", "grad", "reward", "coherence", "t_prime"))):
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=2e-4), (a["step"], key)
    a, b = tensors(tmp_path / "1"), tensors(tmp_path / "2")
    assert a.keys() == b.keys()
    means = [k for k in a if k.endswith("exp_avg")]
    assert means and any(a[k].abs().max() > 1e-4 for k in means)
    for k in means:
        assert (a[k] - b[k]).abs().max() <= 5e-3 * a[k].abs().max() + 2e-6, k
    ranks = [json.loads((newest(tmp_path / n) / "manifest.json").read_text()) for n in "12"]
    assert [m["world"] for m in ranks] == [1, 2] and ranks[0]["samples"] == ranks[1]["samples"]


def spied(made, out, monkeypatch, **flags):
    """One step with spies -> its row of metrics, what `read_batch` was given and gave, what stage 2 began
    with, what the aesthetic reward and the coherence model were shown."""
    seen = {}
    own = train_pefl.read_batch, flow.sample, train_pefl.feature_l1

    def read_batch(batch, *rest):
        if "batch" not in seen:
            seen["batch"], seen["given"] = batch, own[0](batch, *rest)
        return own[0](batch, *rest)

    def sample(velocity, x, ts, *rest, **more):
        seen.setdefault("start", (x.clone(), ts))
        return own[1](velocity, x, ts, *rest, **more)

    def feature_l1(features, x, x0):
        seen.setdefault("vgg", x0.detach())
        seen.setdefault("vgg_of", x)
        return own[2](features, x, x0)

    with monkeypatch.context() as m:
        m.setattr(train_pefl, "read_batch", read_batch)
        m.setattr(flow, "sample", sample)
        m.setattr(train_pefl, "feature_l1", feature_l1)
        m.setattr(train_pefl, "mean_score", lambda nets, own=train_pefl.mean_score: (
            lambda image, c: own(nets)(seen.setdefault("image", image), c)))
        row, = call(made, out, train_pefl, **dict(phases="5/4/2x1", lr=0.0) | flags)
    return row, seen
