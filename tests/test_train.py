"""train_omni.py and train_pefl.py: real processes with signals and ranks, and main() with spies; tiny sizes.

Gradient accumulation is not compared with a larger batch: noise and t' are keyed by micro-step, so
accum 2 x batch 2 draws other numbers than accum 1 x batch 4 by design.
"""

import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import typing
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro
from held import held
from inprocess import NATIVE, run_ranks, run_script
from PIL import Image
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

import checkpoint
import common
import data
import flow
import model
import pipeline
import rewards
import train_omni
import train_pefl
import train_reward
from common import Verdict
from kernels import dispatch

ROOT = Path(train_omni.__file__).parent
pytestmark = pytest.mark.usefixtures("one_thread_and_own_signals")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONFAULTHANDLER": "1"}
SHARED = dict(batch_size=4, lr=1e-3, warmup=2, ema=0.9, precision="fp32", workers=0, device="cpu",
              wandb="off", log_every=1, sample_every=0, save_every=4)
OMNI = SHARED | dict(preset="test", lr_schedule="constant", steps=4)
PEFL = SHARED | dict(phases="5/4/2x4")


def shipped(folder, net, **meta):
    """A checkpoint folder such as assets/base: weights and manifest."""
    return str(checkpoint.write(folder, 0, {"model": net.state_dict()}, {"arch": net.arch, **meta}))


def random_editor(cfg):
    """No zero gates, so that gradients reach everything at once."""
    editor = model.Editor(cfg)
    for p in editor.parameters():
        p.data.add_(torch.randn(p.shape), alpha=0.05)
    return editor


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders: an inpainting base, a text-to-image one, one that needs a VAE, rewards, a damaged base."""
    root = tmp_path_factory.mktemp("made")
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


#### resume ##################################################################################################


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


OMNI_FILES = {"model", "ema", "optimizer"}
PEFL_FILES = OMNI_FILES | {"coherence", "coherence_optimizer"}


@pytest.mark.slow
def test_omni_resumes(made, tmp_path):
    resumes(made, tmp_path, train_omni, OMNI_FILES, workers=1, accum=2, batch_size=2)


@pytest.mark.slow
def test_omni_base_resumes(made, tmp_path):
    more = dict(precision=NATIVE, lr_schedule="cosine", aspects=True, muon_lr=2e-3)
    resumes(made, tmp_path, train_omni, OMNI_FILES, stage="base", **more)


@pytest.mark.slow
def test_pefl_resumes(made, tmp_path):
    resumes(made, tmp_path, train_pefl, PEFL_FILES, accum=2, batch_size=2, reward_noise=0.2, disc_first=5)


@pytest.mark.slow
def test_pefl_lora_resumes(made, tmp_path):
    more = dict(lora=4, precision=NATIVE, workers=1)
    resumes(made, tmp_path, train_pefl, PEFL_FILES | {"lora", "lora_ema"}, **more)


#### ranks ###################################################################################################


@pytest.mark.parametrize("script, flags", [
    (train_omni, {}), pytest.param(train_pefl, {}, marks=pytest.mark.slow),
    pytest.param(train_pefl, {"lora": 4, "accum": 2}, marks=pytest.mark.slow)])
def test_two_ranks(made, tmp_path, script, flags):
    two_ranks_agree(made, tmp_path, script, flags)


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


#### a step of train_pefl ####################################################################################


def test_stages(made, tmp_path, monkeypatch):
    """T1 .. t' without gradient, one prediction at t' with it; t' in [1, T2]; phases change T, T1, T2."""
    calls, forward = [], model.Editor.forward

    def spy(self, x, t, *rest):
        assert (t == t[0]).all()
        calls.append((torch.is_grad_enabled(), round(t[0].item(), 5)))
        return forward(self, x, t, *rest)

    monkeypatch.setattr(model.Editor, "forward", spy)
    found = call(made, tmp_path, train_pefl, phases="9/7/4x5,6/5/3x1,4/4/1x3", batch_size=1)
    expected, phases = [], [(1, 9, 7, 4)] * 5 + [(2, 6, 5, 3)] + [(3, 4, 4, 1)] * 3
    for row, (number, T, T1, T2) in zip(found, phases, strict=True):
        last = row["t_prime"]
        assert (row["phase"], row["T"]) == (number, T) and 1 <= last <= T2
        expected += [(False, round(k / T, 5)) for k in range(T1, last, -1)] + [(True, round(last / T, 5))]
    assert calls == expected
    assert len({row["t_prime"] for row in found[:5]}) > 1


def test_t_prime_covers_its_range():
    drawn = {int(common.randint(common.generators(0, s, [0], stream=1), 1, 4 + 1)) for s in range(100)}
    assert drawn == {1, 2, 3, 4}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_reaches_every_weight(made, tmp_path, monkeypatch, precision):
    """bf16: weights that autocast casts in stage 2, without gradient, must not serve stage 3 from a cache."""
    editors, seen = [], []
    own = pipeline.open_editor
    monkeypatch.setattr(pipeline, "open_editor", lambda *a, **k: editors.append(own(*a, **k)) or editors[-1])

    def sums(params, world):  # of the gradients of the editor, then of the coherence model
        seen.extend(None if p.grad is None else p.grad.abs().sum().item() for p in params)

    monkeypatch.setattr(common, "average_gradients", sums)
    call(made, tmp_path, train_pefl, phases="5/4/2x1", precision=precision)
    names = [n for n, p in editors[0].net.named_parameters() if p.requires_grad]
    of_editor, of_coherence = seen[:len(names)], seen[len(names):]
    # the last block's text stream lends keys and values only, so its query's norm is never used (SD3)
    unused = "mmdit.joint_blocks.1.context_block.attn.ln_q.weight"
    assert [n for n, g in zip(names, of_editor) if not g] == [unused]
    assert of_coherence and all(of_coherence)


def test_each_loss_trains_its_own_model(made, tmp_path):
    """L^G leaves the coherence model alone, L^D the editor."""
    for weight in (0.0, 50.0):  # the editor stands still: the coherence model must learn alike
        call(made, tmp_path / str(weight), train_pefl, lr=0.0, w_coherence=weight)
    a, b = tensors(tmp_path / "0.0"), tensors(tmp_path / "50.0")
    base = load_file(Path(made["base"]) / "model.safetensors")
    assert not [k for k in a if k.startswith("coherence") and not torch.equal(a[k], b[k])]
    assert all(torch.equal(a[f"model/{k}"], v) for k, v in base.items())
    call(made, tmp_path / "D", train_pefl, w_aesthetic=0.0, w_alignment=0.0, w_coherence=0.0, eta=0.0)
    d = tensors(tmp_path / "D")
    assert all(torch.equal(d[f"model/{k}"], v) for k, v in base.items())  # with a learning rate now
    assert [k for k in d if k.startswith("coherence/") and not torch.equal(d[k], a[k])] == []
    call(made, tmp_path / "still", train_pefl, disc_lr=0.0)
    still = tensors(tmp_path / "still")
    assert [k for k in d if k.startswith("coherence/") and not torch.equal(d[k], still[k])]
    assert [k for k in base if not torch.equal(base[k], still[f"model/{k}"])]


def test_rewards_stay_frozen(made, tmp_path, monkeypatch):
    nets, load = {}, train_pefl.open_reward

    def keep(path, *rest, **more):
        nets[path] = load(path, *rest, **more)
        return nets[path]

    monkeypatch.setattr(train_pefl, "open_reward", keep)
    call(made, tmp_path, train_pefl, heldout_reward=made["alignment"])
    assert set(nets) == {made["aesthetic"], made["alignment"]}
    for path, net in nets.items():
        state, before = net.state_dict(), load_file(Path(path) / "model.safetensors")
        assert all(torch.equal(state[k], v) for k, v in before.items())
        assert not any(m.training for m in net.modules())
        assert not any(p.requires_grad or p.grad is not None for p in net.parameters())


def test_coherence_learns_to_separate(made, tmp_path):
    found = call(made, tmp_path, train_pefl, phases="4/3/2x30", disc_lr=3e-3, lr=1e-5, eta=0.0)
    assert found[0]["coherence/accuracy"] < 0.8
    last = found[-1]
    assert last["coherence/accuracy"] > 0.9 and last["coherence/real"] > 0 > last["coherence/fake"]
    assert last["loss/D"] < 0.7 * found[0]["loss/D"]


def test_coherence_learns_alone_first(made, tmp_path):
    """--disc_first: the editor stands still and needs no gradient; the coherence model learns as it would."""
    found = call(made, tmp_path / "alone", train_pefl, phases="5/4/2x6", disc_first=4, save_every=3)
    assert [row["grad_norm/editor"] > 0 for row in found] == [False] * 4 + [True] * 2
    base = load_file(Path(made["base"]) / "model.safetensors")
    early = load_file(tmp_path / "alone" / "step_00000003" / "model.safetensors")
    assert all(torch.equal(early[k], v) for k, v in base.items())
    still = call(made, tmp_path / "still", train_pefl, phases="5/4/2x4", lr=0.0)
    assert [r["loss/D"] for r in found[:4]] == [r["loss/D"] for r in still]


def test_coherence_starts_from_a_tower_or_a_run(made, tmp_path):
    flags = dict(phases="5/4/2x1", lr=0.0, disc_lr=0.0)
    call(made, tmp_path / "tower", train_pefl, disc_init=made["aesthetic"], **flags)
    tower, got = load_file(Path(made["aesthetic"]) / "model.safetensors"), tensors(tmp_path / "tower")
    names = [k for k in tower if k.startswith("blip.visual_encoder.") and "patch_embed" not in k]
    assert names and all(torch.equal(got[f"coherence/vit.{k.removeprefix('blip.visual_encoder.')}"], tower[k])
                         for k in names)
    disc = rewards.open_coherence(made["aesthetic"], 32, 4, "x")
    reward = rewards.open_reward(made["aesthetic"])
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.allclose(disc.vit(x), reward.image_features(x)[0], atol=1e-5)
    assert torch.equal(disc.vit.patch_embed.proj.weight, got["coherence/vit.patch_embed.proj.weight"])
    call(made, tmp_path / "run", train_pefl, disc_init=str(tmp_path / "tower"), seed=1, **flags)
    again = tensors(tmp_path / "run")
    assert not [k for k in got if k.startswith("coherence/") and not torch.equal(got[k], again[k])]


def test_a_run_with_other_sizes_of_the_coherence_model_resumes(made, tmp_path):
    """As those do that began with --disc_width and the like, which are gone: --disc_init of its own --out."""
    flags = dict(save_every=1, phases="5/4/2x1", disc_init=made["aesthetic"])
    call(made, tmp_path / "run", train_pefl, **flags)
    flags["phases"] = "5/4/2x2"
    refused(made, tmp_path / "run", train_pefl, "run.*coherence", **flags | dict(disc_init=None))
    call(made, tmp_path / "run", train_pefl, **flags | dict(disc_init=str(tmp_path / "run")))
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]


def test_rewards_look_through_noise(made, tmp_path):
    """It changes what they see and nothing else: L_reg and the first t' are those without it."""
    clear, veiled = (call(made, tmp_path / str(std), train_pefl, phases="5/4/2x1", reward_noise=std)[0]
                     for std in (0.0, 0.5))
    for key in ("reward/aesthetic", "reward/alignment", "loss/coherence", "loss/D"):
        assert clear[key] != veiled[key]
    assert clear["loss/reg"] == veiled["loss/reg"] and clear["t_prime"] == veiled["t_prime"]


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


def test_where_stage_2_begins(made, tmp_path, monkeypatch):
    """At T1 with the noised masked input, or like a sample: at T with noise alone."""
    for start, first in (("masked", 0.8), ("noise", 1.0)):
        _, seen = spied(made, tmp_path / start, monkeypatch, start=start)
        x, ts = seen["start"]
        batch = seen["batch"]
        masked = batch["image"] * (1 - batch["mask"])
        assert ts[0] == pytest.approx(first)
        torch.testing.assert_close(x, (1 - first) * masked + first * batch["noise"])


def test_where_the_regularisers_hold(made, tmp_path, monkeypatch):
    """--hold known: L_reg and L_vgg know nothing of the hole."""
    (everywhere, a), (known, b) = (spied(made, tmp_path / hold, monkeypatch, hold=hold)
                                   for hold in ("all", "known"))
    x, x0, outside = a["batch"]["image"], a["image"], 1 - a["given"].hole
    assert everywhere["loss/reg"] == pytest.approx((x - x0).abs().mean().item(), rel=1e-5)
    assert known["loss/reg"] == pytest.approx(((x - x0).abs() * outside).mean().item(), rel=1e-5)
    torch.testing.assert_close(b["vgg"], x * (1 - outside) + x0 * outside)
    assert known["loss/vgg"] < everywhere["loss/vgg"]
    row, _ = spied(made, tmp_path / "global", monkeypatch, hold="known", tasks="t2i=1")  # all is hole
    assert row["loss/reg"] == row["loss/vgg"] == 0


def test_when_the_adversarial_loss_begins(made, tmp_path):
    """In the phase that is named, or in the last one; the coherence model learns from the first step on."""
    def phases_with(out, **flags):
        return ["loss/coherence" in row for row in call(made, tmp_path / out, train_pefl, **flags)]

    two = dict(phases="5/4/2x1,3/2/1x1")
    assert phases_with("default", **two) == [False, True]
    assert phases_with("all", adversarial_from=1, **two) == [True, True]
    assert phases_with("one", phases="5/4/2x1") == [True]
    assert all("loss/D" in row for row in rows(tmp_path / "default"))


def test_steps_of_the_coherence_model_alone(made, tmp_path):
    """--disc_updates 2: the editor moves in every second step, the coherence model in each."""
    base = load_file(Path(made["base"]) / "model.safetensors")
    moved, before = [], None
    for n in (1, 2, 3):
        call(made, tmp_path / str(n), train_pefl, phases=f"5/4/2x{n}", disc_updates=2, warmup=0, save_every=n)
        now = tensors(tmp_path / str(n))
        last = {k: now[f"model/{k}"] for k in base}
        coherence = {k: v for k, v in now.items() if k.startswith("coherence/")}
        assert before is None or any(not torch.equal(coherence[k], v) for k, v in before.items())
        moved.append(any(not torch.equal(last[k], v) for k, v in base.items()))
        base, before = last, coherence
    assert moved == [False, True, False]


def test_several_rewards_are_their_mean(made, tmp_path):
    of = made["aesthetic"], made["alignment"], f"{made['aesthetic']},{made['alignment']}"
    found = [call(made, tmp_path / str(i), train_pefl, phases="5/4/2x1", aesthetic=spec)[0]
             for i, spec in enumerate(of)]
    a, b, both = (row["reward/aesthetic"] for row in found)
    assert both == pytest.approx((a + b) / 2, abs=1e-6) and a != b
    assert train_pefl.members("out/a,imagereward:m.pt,vocab.txt,out/b") == [
        "out/a", "imagereward:m.pt,vocab.txt", "out/b"]


def test_a_published_reward_beside_ours(made, tmp_path, monkeypatch, capsys):
    """L_vgg finds ours behind it; a held-out reward that no sheet will ask is said."""
    load = train_pefl.open_reward
    monkeypatch.setattr(train_pefl, "open_reward", lambda spec, *a: (
        lambda x, c: x.mean((1, 2, 3))) if spec.startswith("clipscore:") else load(spec, *a))
    found = call(made, tmp_path / "a", train_pefl, aesthetic=f"clipscore:a,b,{made['aesthetic']}",
                 heldout_reward=made["alignment"], phases="5/4/2x1")
    assert found[0]["loss/vgg"] > 0
    assert "warning: --heldout_reward: is asked with the sample sheets" in capsys.readouterr().out


def test_rewards_on_another_scale_are_named(monkeypatch, capsys):
    """-log sigmoid is flat where PickScore and LAION's aesthetic score lie; as alarms they are welcome."""
    monkeypatch.setattr(train_pefl, "open_reward", lambda spec, *rest: spec)
    train_pefl.open_rewards(train_pefl.Config(
        aesthetic="aesthetic:a,b", alignment="imagereward:a,b,pickscore:a,b", heldout_reward="pickscore:a,b"))
    warned = [line.split(" its scores")[0] for line in capsys.readouterr().out.splitlines()]
    assert warned == ["warning: --aesthetic: aesthetic:", "warning: --alignment: pickscore:"]
    for score, slope in train_pefl.FLAT.values():
        assert float(slope) == pytest.approx(torch.sigmoid(torch.tensor(-float(score))).item(), rel=0.1)
    train_pefl.open_rewards(train_pefl.Config(aesthetic="clipscore:a,b", alignment="out/alignment"))
    assert not capsys.readouterr().out


def test_an_alignment_that_is_never_asked_is_said(made, tmp_path, capsys):
    """Once, after the first interval: without a caption its term of the loss is 0 for every picture."""
    for name, flags, times in (("none", dict(tasks="erase=1"), 1), ("some", dict(tasks="edit=1"), 0),
                               ("weightless", dict(tasks="erase=1", w_alignment=0.0), 0)):
        call(made, tmp_path / name, train_pefl, phases="4/3/2x4", log_every=2, **flags)
        said = capsys.readouterr().out
        assert said.count("warning: --alignment") == times, said
        assert said.count("none of 8 pictures so far has a caption") == times


def test_alignment_is_logged_of_pictures_with_a_caption(made, tmp_path, monkeypatch):
    """As it weighs in the loss, the judge's too; where no picture has one, there is no number."""
    def score(image, captions):
        return 0 * image.mean((1, 2, 3)) + torch.tensor([1.0 if c else -100.0 for c in captions])

    monkeypatch.setattr(train_pefl, "mean_score", lambda nets: score)
    found = call(made, tmp_path / "some", train_pefl, tasks="erase=1,edit=1", sample_every=4)
    assert {row.get("reward/alignment", 1) for row in found} == {1}
    assert any("reward/alignment" in row and row["reward/aesthetic"] < 0 for row in found)  # some of a batch
    last = found[-1]
    assert last["judge/alignment_tuned"] == last["judge/alignment_base"] == 1
    assert -100 < last["judge/aesthetic_tuned"] < 1
    found = call(made, tmp_path / "none", train_pefl, tasks="erase=1", sample_every=4)
    assert all("reward/alignment" not in row and row["reward/aesthetic"] == -100 for row in found)
    assert all(row["loss/alignment"] == 0 and row["loss/aesthetic"] == pytest.approx(100) for row in found)
    assert "judge/alignment_tuned" not in found[-1] and found[-1]["judge/aesthetic_tuned"] == -100


def test_reward_rises(made, tmp_path):
    """Feedback through one frozen reward: its score on what the editor predicts goes up, step by step."""
    found = call(made, tmp_path, train_pefl, phases="4/3/2x30", w_aesthetic=1.0, w_alignment=0.0,
                 w_coherence=0.0, eta=0.0, lr=2e-3)
    scores = [row["reward/aesthetic"] for row in found]
    assert min(scores[-5:]) > max(scores[:5])
    assert "reward/alignment" not in found[0]


def test_an_own_reward_as_the_readme_says(made, tmp_path):
    """Its two lines, put where it says: the reward is trained on, logged and judged."""
    text, script = (ROOT / "README.md").read_text(), Path(train_pefl.__file__).read_text()
    for after, start in (("    w_alignment", "w_green"), ("    scores = {name: mean_score", "scores[")):
        new, = ("    " + line for line in text.splitlines() if line.startswith(start))
        lines = script.splitlines()
        at, = (i for i, x in enumerate(lines) if x.startswith(after))
        script = "\n".join(lines[:at + 1] + [new] + lines[at + 1:])
    own = tmp_path / "train_mine.py"
    own.write_text(script)
    flags = settings(made, tmp_path / "out", train_pefl, sample_every=4, w_green=0.5)
    done = subprocess.run([sys.executable, str(own), *(f"--{k}={v}" for k, v in flags.items())],
                          capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    last = rows(tmp_path / "out")[-1]
    assert {"loss/green", "reward/green", "judge/green_tuned", "loss/aesthetic"} <= set(last)


def test_a_reward_at_chance_is_named(made, tmp_path, capsys):
    weights, manifest = checkpoint.load(made["aesthetic"])
    val = {"val/score_mean": 0.0, "val/score_std": 1.0, "val/acc": 0.5, "val/high": 0.7, "val/pairs": 18}
    for low in (0.3, 0.51):
        meta = {"arch": manifest["arch"], "val": val | {"val/low": low}}
        rewards.open_reward(str(checkpoint.write(tmp_path / str(low), 0, weights, meta)))
        named = "is right in 50% of 18 held-out pairs, 30% to 70%: no better than chance"
        assert (named in capsys.readouterr().out) == (low < 0.5)


def test_the_editor_gets_no_step(made, tmp_path, capsys):
    call(made, tmp_path, train_pefl, phases="5/4/2x2", disc_first=2)
    assert "warning: --disc_first: 2, with --disc_updates 1: of the 2 steps" in capsys.readouterr().out


def test_the_losses_and_their_sum(made, tmp_path):
    """-log sigmoid of a reward (Eq. 2); L^G is L_reward + eta (L_reg + L_vgg) (Eq. 8)."""
    row, c = call(made, tmp_path, train_pefl, phases="4/3/2x1")[0], train_pefl.Config
    for name in ("aesthetic", "alignment"):
        low = F.softplus(torch.tensor(-row[f"reward/{name}"])).item()  # of the mean: a lower bound
        assert low - 1e-6 <= row[f"loss/{name}"] < low + 0.1
    total = sum(row[f"loss/{k}"] * getattr(c, f"w_{k}") for k in ("aesthetic", "alignment", "coherence"))
    assert row["loss/G"] == pytest.approx(total + c.eta * (row["loss/reg"] + row["loss/vgg"]), rel=1e-5)


def test_checkpointing_changes_nothing(made, tmp_path):
    for name in (False, True):
        call(made, tmp_path / str(name), train_pefl, phases="5/4/2x2", checkpointing=name, save_every=2)
    assert not differ(tensors(tmp_path / "False"), tensors(tmp_path / "True"))


def test_lora(made, tmp_path):
    """Only A and B train; `model` and `ema` load plainly and differ from the base by matrices of low rank."""
    call(made, tmp_path, train_pefl, lora=2, phases="4/3/2x3", save_every=3)
    got, base = tensors(tmp_path), load_file(Path(made["base"]) / "model.safetensors")
    factors = [k for k in got if k.startswith("lora/")]
    assert factors and all(re.search(r"joint_blocks\..*\.weight\.0\.[AB]$", k) for k in factors)
    arch = json.loads((newest(tmp_path) / "manifest.json").read_text())["arch"]
    for name in ("model", "ema"):
        state = load_file(newest(tmp_path) / f"{name}.safetensors")
        checkpoint.load_state(model.build_editor(arch), state, name)
        moved = {k: state[k] - base[k] for k in base if not torch.equal(state[k], base[k])}
        assert len(moved) == len(factors) // 2 and all(k.endswith("weight") for k in moved)
        assert all(torch.linalg.matrix_rank(d.double(), rtol=1e-4) <= 2 for d in moved.values())
    editor = pipeline.open_editor(str(tmp_path), torch.device("cpu"), ("fill",)).net  # and can be tuned on
    assert torch.equal(editor.state_dict()["mmdit.pos_embed"], base["mmdit.pos_embed"])


def test_lora_learns_to_see_the_hole(made, tmp_path, capsys):
    """Of a base with an empty mask input the input layer trains beside the blocks, is resumed and averaged
    with them: else two masks would give one and the same picture for ever."""
    torch.manual_seed(0)
    editor = random_editor(model.inpainting(model.PRESETS["test"]))
    editor.mmdit.x_embedder.proj.weight.data[:, 3:] = 0
    base = shipped(tmp_path / "base", editor, config={"image_size": 32, "shift": 1.0})
    flags = dict(base=base, lora=2, save_every=1, keep=9)
    call(made, tmp_path / "whole", train_pefl, phases="4/3/2x2", **flags)
    assert "the input layer trains too" in capsys.readouterr().out
    whole, layer = tensors(tmp_path / "whole"), "mmdit.x_embedder.proj.weight"
    assert whole[f"model/{layer}"][:, 3:].any() and whole[f"ema/{layer}"][:, 3:].any()
    assert f"lora/{layer}" in whole
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "whole/step_00000001", tmp_path / "cut/step_00000001")
    call(made, tmp_path / "cut", train_pefl, phases="4/3/2x2", **flags)
    assert not differ(whole, tensors(tmp_path / "cut"))


@pytest.mark.parametrize("script", [train_omni, train_pefl])
def test_a_lora_run_goes_on_with_the_base_it_began_with(made, tmp_path, script):
    """It keeps its updates alone: on other weights that lie in the base's place now they would mean something
    else. A folder from before this was kept goes on."""
    base, out = str(shutil.copytree(made["base"], tmp_path / "base")), tmp_path / "out"
    flags = dict(base=base, lora=2) if script is train_pefl else \
        dict(init=base, stage="edit", tune_base="lora", lora=2)
    call(made, out, script, **flags, **steps(script, 1))
    call(made, out, script, **flags, **steps(script, 2))
    shutil.rmtree(base)
    torch.manual_seed(5)
    shipped(base, random_editor(model.inpainting(model.PRESETS["test"])), config={"image_size": 32})
    refused(made, out, script, "low-rank updates are of other weights", **flags, **steps(script, 3))
    path = newest(out) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["meta"]["frozen"]
    path.write_text(json.dumps(manifest | {"sha256": checkpoint._manifest_hash(manifest)}))
    call(made, out, script, **flags, **steps(script, 3))


def test_a_frozen_text_encoder_has_no_gradient(made, tmp_path):
    """--text_lr 0: what cannot move must not count in the norm that the others' gradients are clipped to."""
    first = tensors(tmp_path / "a") if call(made, tmp_path / "a", train_omni, steps=1, text_lr=0.0) else None
    assert not any(k.startswith("optimizer/text.") for k in first)
    call(made, tmp_path / "a", train_omni, steps=2, text_lr=0.0)
    moved = differ(first, tensors(tmp_path / "a"))
    assert "model/mmdit.pos_embed" in moved and not any("/text." in k for k in moved)


def test_lora_is_seeded(made, tmp_path):
    """LoRA's A comes from --seed alone, wherever the generator of this process (or rank) stands."""
    for name, seed in (("0", 0), ("again", 0), ("1", 1)):
        torch.seed()
        call(made, tmp_path / name, train_pefl, lora=2, lr=0.0, phases="4/3/2x1", seed=seed)
    a, again, b = (tensors(tmp_path / n) for n in ("0", "again", "1"))
    assert not differ(a, again)
    assert all(not torch.equal(a[k], b[k]) for k in a if k.startswith("lora/") and k.endswith("A"))


def test_chain(made, tmp_path):
    """A text-to-image base, inpainting on top of it, feedback on top of that, on photos without captions."""
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for i in range(30):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(photos / f"{i}.png")
    call(made, tmp_path / "base", train_omni, stage="base", steps=2)
    flags = dict(data=str(photos), aspects=True, image_size=32, sample_every=2)
    call(made, tmp_path / "inpaint", train_omni, init=str(tmp_path / "base"), steps=2, **flags)
    for name, channels in (("base", 3), ("inpaint", 7)):
        assert tensors(tmp_path / name)["model/mmdit.x_embedder.proj.weight"].shape[1] == channels
    base = str(tmp_path / "inpaint")
    found = call(made, tmp_path / "pefl", train_pefl, base=base, phases="4/3/2x2", **flags)
    assert {"judge/aesthetic_tuned", "alarm/weight_drift"} <= found[-1].keys()
    assert all(list((tmp_path / n / "images").glob("*.png")) for n in ("inpaint", "pefl"))
    with Image.open(tmp_path / "pefl/images/step_00000002_samples.png") as sheet:  # for readers/report.py
        plan = json.loads(sheet.info["cells"])
    assert plan["titles"] == ["picture", "input", "base", "tuned"]
    assert {"aesthetic_base", "aesthetic_tuned"} <= plan["scores"].keys()
    assert all(len(v) == len(plan["boxes"]) and np.isfinite(v).all() for v in plan["scores"].values())


#### numbers that are not finite #############################################################################


def poison(monkeypatch, script, when):
    """A loss of NaN at the steps for which when(step) holds."""
    home, name = (flow, "velocity") if script is train_omni else (train_pefl, "feature_l1")
    plain, step = getattr(home, name), iter(range(10**6))

    def poisoned(*a):
        return plain(*a) * (math.nan if when(next(step)) else 1.0)

    monkeypatch.setattr(home, name, poisoned)


def steps(script, n):
    return dict(steps=n) if script is train_omni else dict(phases=f"5/4/2x{n}")


@pytest.mark.parametrize("script", [train_omni, train_pefl])
def test_nan_changes_nothing(made, tmp_path, monkeypatch, capsys, script):
    call(made, tmp_path / "clean", script, save_every=1, **steps(script, 2))
    poison(monkeypatch, script, lambda step: step == 2)
    found = call(made, tmp_path / "nan", script, save_every=1, **steps(script, 3))
    assert "warning: step 2: non-finite" in capsys.readouterr().out
    assert not differ(tensors(tmp_path / "clean"), tensors(tmp_path / "nan"))
    assert found[-1]["step"] == 3 and found[-1]["loss/flow" if script is train_omni else "loss/G"] is None


class Asked(TorchFunctionMode):
    """What the host asks of tensors from the first verdict of a training to its last: a GPU would be waited
    for at each. `flush` and Verdict.read may."""

    ASKS = {getattr(torch.Tensor, name) for name in (
        "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero",
        "masked_select", "unique", "__getitem__", "__setitem__")} | {torch.nonzero, torch.masked_select}

    def __init__(self, monkeypatch):
        super().__init__()
        self.found, self.on = [], False
        give, read = Verdict.give, Verdict.read
        monkeypatch.setattr(Verdict, "give", lambda *a: (setattr(self, "on", True), give(*a))[1])
        monkeypatch.setattr(Verdict, "read", lambda v, last: (setattr(self, "on", not last), read(v, last))[1]
                            )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.on and func in self.ASKS and not torch.utils.data.get_worker_info():
            index = args[1] if func.__name__ in ("__getitem__", "__setitem__") else None
            picks = any(isinstance(i, torch.Tensor) for i in (index if isinstance(index, tuple) else [index]))
            where = [f"{f.name} line {f.lineno}" for f in traceback.extract_stack()]
            if (picks or not func.__name__.endswith("item__")) and not any(
                    w.startswith(("flush", "read ")) for w in where):
                self.found.append(f"{func.__name__}: {where[-4:]}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("script, flags", [
    (train_omni, dict(stage="inpaint")), (train_omni, dict(stage="base", muon_lr=1e-3, accum=2)),
    (train_pefl, dict(reward_noise=0.1, disc_first=1))])
def test_no_step_asks_the_device(made, tmp_path, monkeypatch, script, flags):
    flags = flags | dict(workers=1, save_every=9, log_every=2, **steps(script, 3))
    with Asked(monkeypatch) as asked:
        call(made, tmp_path / "asks", script, **flags)
    assert asked.found == []
    plain = flow.interpolate
    monkeypatch.setattr(flow, "interpolate", lambda x, noise, t: (t[t > 0.5], plain(x, noise, t))[1])
    with asked:
        call(made, tmp_path / "asked", script, **flags)
    assert asked.found and all("__getitem__" in line for line in asked.found)


@pytest.mark.parametrize("script", [train_omni, train_pefl])
def test_nan_for_good(made, tmp_path, monkeypatch, script):
    poison(monkeypatch, script, lambda step: step >= 2)
    with pytest.raises(SystemExit, match="^error: .*: 20 non-finite steps in a row: .*--lr"):
        call(made, tmp_path, script, save_every=1, **steps(script, 40))
    assert all(v.isfinite().all() for v in tensors(tmp_path).values())


#### what users get wrong ####################################################################################


def refused(made, out, script, text, **flags):
    """One line that begins with "error: ", and nothing but SystemExit, which is exit code 1."""
    flags = {k: str(made[v]) if v in made and k != "stage" else v for k, v in flags.items()}
    with pytest.raises(SystemExit) as e:
        call(made, out, script, **flags)
    message = str(e.value)
    assert message.startswith("error: ") and "\n" not in message, message
    assert re.search(text, message), message


BOTH = [
    ("/no/such/place", dict(data="/no/such/place")),
    ("empty.*no pictures|empty", dict(data="empty")),
    ("--?image_size: 30: .*multiple", dict(image_size=30)),
    ("--image_size: 256: .*256x256 pixels, 64x64 tokens, .* has 32x32", dict(image_size=256)),
    ("--image_size: 112: .*, 3[78]x2[01] tokens, .* has 32x32", dict(image_size=112, aspects=True)),
    ("--?batch_size: 0", dict(batch_size=0)),
    ("--?accum: 0", dict(accum=0)),
    ("--?log_every: 0", dict(log_every=0)),
    ("--?save_every: 0", dict(save_every=0)),
    ("--device: tpu", dict(device="tpu")),
]
BAD = [(train_omni, *case) for case in BOTH] + [(train_pefl, *case) for case in BOTH] + [
    (train_omni, "--preset: huge: use one of", dict(preset="huge")),
    (train_omni, "--preset: sd3-medium: needs a VAE", dict(preset="sd3-medium")),
    (train_omni, "--steps: 0", dict(steps=0)),
    (train_omni, "--ema: 1.5", dict(ema=1.5)),
    (train_omni, "--muon_lr: -0.1", dict(muon_lr=-0.1)),
    (train_omni, "--muon_lr: 0.1: needs whole matrices", dict(muon_lr=0.1, fsdp=True)),
    (train_omni, "--init: .*missing: no such folder", dict(init="missing")),
    (train_omni, "--init: .*holds a .reward.*train_omni.py or", dict(init="aesthetic")),
    (train_omni, "--init: .*latent: .*give --sd3", dict(init="latent")),
    (train_omni, "damaged/model.safetensors: SHA-256", dict(init="damaged")),
    (train_pefl, "--base: .*missing: no such folder", dict(base="missing")),
    (train_pefl, "--alignment: clipscore:gone,words: gone: no such", dict(alignment="clipscore:gone,words")),
    (train_pefl, "empty: holds neither", dict(base="empty")),
    (train_pefl, "--base: .*t2i: .*--stage inpaint", dict(base="t2i")),
    (train_pefl, "--base: .*aesthetic: holds a 'reward'", dict(base="aesthetic")),
    (train_pefl, "--base: .*latent: .*give --sd3", dict(base="latent")),
    (train_pefl, "damaged/model.safetensors: SHA-256", dict(base="damaged")),
    (train_pefl, "--aesthetic: .*base: holds an 'editor', .*train_reward.py", dict(aesthetic="base")),
    (train_pefl, "--alignment: .*mute: .*tokenizer", dict(alignment="mute")),
    (train_pefl, "--heldout_reward: .*missing: no such folder", dict(heldout_reward="missing")),
    (train_pefl, "--vgg: .*missing", dict(vgg="missing")),
    (train_pefl, "--tasks: all zero: give one of t2i, inpaint", dict(tasks="t2i=0,erase=0")),
    (train_pefl, "--tasks: edit=-1.0: use numbers >= 0 for t2i, inpaint", dict(tasks="t2i=1,edit=-1")),
    (train_pefl, "--tasks: remove=1.0: .* for t2i, inpaint, edit, outpaint, erase", dict(tasks="remove=1")),
    (train_pefl, "--tasks: 'erase': use NAME=WEIGHT,... of t2i, inpaint", dict(tasks="t2i=1,erase")),
    (train_pefl, "--tasks: 'edit=2': use NAME=WEIGHT", dict(tasks="edit=1,edit=2")),
    (train_omni, "--tasks: remove=2.0: .* for t2i, inpaint", dict(tasks="remove=2")),
    (train_pefl, "--image_size: 20: .*multiple", dict(image_size=20)),
    (train_pefl, "--disc_init: .*base: holds an 'editor'", dict(disc_init="base")),
    (train_pefl, "--disc_updates: 0", dict(disc_updates=0)),
    (train_pefl, "--adversarial_from: 0", dict(adversarial_from=0)),
    (train_pefl, "--reward_noise: -1", dict(reward_noise=-1.0)),
    (train_pefl, "--lora: -1", dict(lora=-1)),
    *[(train_pefl, f"--{flag}: '': is empty: leave it out", {flag: ""})
      for flag in ("aesthetic", "vgg", "disc_init")],
    (train_omni, "--init: '': is empty: leave it out", dict(init="")),
    (train_pefl, "--aesthetic: ,: has nothing before", dict(aesthetic=",")),
    (train_pefl, "--disc_init: /nope: no such folder", dict(disc_init="/nope")),
    *[(script, f"--{flag}: /nope: --{begins}: .* draws pixels", {flag: "/nope"})
      for script, begins in ((train_omni, "preset"), (train_pefl, "base")) for flag in ("sd3", "tokenizers")],
    (train_omni, "--lora: 4: is of use with --stage edit", dict(lora=4)),
]


@pytest.mark.parametrize("script, text, flags", BAD, ids=[f"{s.__name__}-{f}" for s, _, f in BAD])
def test_bad_values(made, tmp_path, script, text, flags):
    refused(made, tmp_path / "out", script, text, **flags)


@pytest.mark.parametrize("text", [
    "", "20/15/10", "20/15/10x0", "20/21/10x5", "20/15/15x5", "20/15/0x5", "20/-15/10x5", "20/15/10x5,",
    "20/15x5", "a/b/cxd", "20/15/10x5;8/6/3x5"])
def test_bad_phases(text):
    with pytest.raises(SystemExit, match="^error: --phases: [^\n]*T >= T1 > T2 >= 1"):
        train_pefl.parse_phases(text)


def test_phases():
    phases = train_pefl.parse_phases("20/15/10x2, 8/6/3x3")
    assert phases == [(20, 15, 10, 2), (8, 6, 3, 3)]
    assert [train_pefl.phase_at(phases, s)[0] for s in range(5)] == [1, 1, 2, 2, 2]
    assert train_pefl.phase_at(phases, 2) == (2, (8, 6, 3))
    paper = [phase[:3] for phase in train_pefl.parse_phases(train_pefl.Config.phases)]
    assert paper == [(20, 15, 10), (8, 6, 3)]  # Sec. 4.1


def test_wrong_run_folder(made, tmp_path):
    """--out holds another run."""
    call(made, tmp_path / "omni", train_omni, steps=1)
    refused(made, tmp_path / "omni", train_omni,
            r"omni: holds another architecture \(inpaint: True there, False here\)", stage="base")
    refused(made, tmp_path / "omni", train_pefl, "omni", phases="4/3/2x2")
    call(made, tmp_path / "full", train_pefl, phases="4/3/2x1")
    refused(made, tmp_path / "full", train_pefl, "full.*lora", phases="4/3/2x2", lora=2)
    call(made, tmp_path / "lora", train_pefl, phases="4/3/2x1", lora=2)
    refused(made, tmp_path / "lora", train_pefl, "lora", phases="4/3/2x2")
    refused(made, tmp_path / "lora", train_pefl, "lora", phases="4/3/2x2", lora=3)


@pytest.mark.parametrize("script", [train_omni, train_pefl])
def test_changed_flags_are_said(made, tmp_path, capsys, script):
    """The same folder with another seed goes on, and says so; of logging it says nothing, nor of a precision
    that is asked for and was chosen before."""
    call(made, tmp_path, script, save_every=1, precision="auto", **steps(script, 1))
    chosen = "bf16" if dispatch.has_bf16("cpu") else "fp32"
    manifest = json.loads((newest(tmp_path) / "manifest.json").read_text())
    assert manifest["precision"] == chosen and manifest["config"]["precision"] == "auto"
    assert f"precision: {chosen} (this CPU has" in capsys.readouterr().out
    call(made, tmp_path, script, save_every=1, seed=7, log_every=2, precision=chosen, **steps(script, 1))
    text = capsys.readouterr().out
    assert text.count("warning") == 1 and "began with --seed 0, goes on with 7" in text


def test_a_flag_that_is_left_out_is_said(made, tmp_path, capsys):
    """What a command that goes on has forgotten: of a reward it is refused, since the loss would be another;
    else a line says so. What the weights bring along themselves is no matter."""
    begun = dict(phases="4/3/2x1", heldout_reward=made["aesthetic"], tasks="edit=1", image_size=32)
    call(made, tmp_path, train_pefl, sample_every=1, **begun)
    capsys.readouterr()
    for flag in ("aesthetic", "alignment"):
        refused(made, tmp_path, train_pefl, f"^error: --{flag}: .*{flag}: .* began with it.*: give it again",
                **begun | {flag: None, "phases": "4/3/2x2"})
    capsys.readouterr()
    call(made, tmp_path, train_pefl, **begun | {"heldout_reward": None, "image_size": None})
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warned) == 1 and re.search("began with --heldout_reward .*, goes on without$", warned[0])
    manifest = {"config": {"dropout": 0.9, "sd3": "/a", "shift": 3.0}, "precision": "fp32"}
    checkpoint.warn_changed("out", manifest, dict.fromkeys(manifest["config"]), False)
    assert capsys.readouterr().out == "warning: out: began with --dropout 0.9, goes on without\n"


def test_a_run_from_before_flags_went_resumes_without_a_word(capsys):
    """Its manifest has fields that are gone, and lacks one that has come."""
    manifest = checkpoint.load(ROOT / "assets/pefl")[1]
    before = manifest["config"] | {"reward_loss": "neg_log_sigmoid", "p_global": 0.0, "disc_width": 128,
                                   "project": "feedback-editing", "shift": 2.0}
    del before["tasks"]
    manifest["config"] = before
    cfg = train_pefl.Config(**{f.name: before[f.name] for f in fields(train_pefl.Config) if f.name in before})
    bf16 = manifest["precision"] == "bf16"
    checkpoint.warn_changed("out", manifest, vars(cfg) | {"shift": before["shift"]}, bf16)
    assert capsys.readouterr().out == ""
    checkpoint.warn_changed("out", manifest, vars(cfg) | {"shift": 9.0}, bf16)
    assert f"began with --shift {before['shift']}, goes on with 9.0" in capsys.readouterr().out


@pytest.mark.parametrize("script", [train_omni, train_pefl])
def test_full_disk(made, tmp_path, monkeypatch, capsys, script):
    """Training goes on without a checkpoint; it must not end as if all were well."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(made, tmp_path, script, "checkpoint.* not saved", save_every=1, **steps(script, 2))
    assert "needs" in capsys.readouterr().out and not list(tmp_path.glob("step_*"))


@pytest.mark.parametrize("script", [train_omni, pytest.param(train_pefl, marks=pytest.mark.slow)])
def test_command_line(made, tmp_path, script):
    """Exit codes, and the last line of what a user sees."""
    for flag, text in (("--colour=3", "--colour"), ("--data=/no/such/place", "/no/such/place")):
        argv = [sys.executable, *command(made, tmp_path, script), flag]
        done = subprocess.run(argv, cwd=ROOT, env=ENV, capture_output=True, text=True)
        assert done.returncode in (1, 2) and text in done.stderr, done.stderr
        assert "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: /no/such/place")


#### knobs ###################################################################################################


def plain_type(annotation):
    """T of T, of T | None and of what tyro is told beside it."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    inner = [a for a in typing.get_args(annotation) if a is not type(None)]
    return inner[0] if type(None) in typing.get_args(annotation) else annotation


def test_shared_knobs_have_one_type():
    types = {}
    for script in (train_omni, train_pefl, train_reward):
        for f in fields(script.Config):
            first = types.setdefault(f.name, (script.__name__, plain_type(f.type)))
            assert first[1] == plain_type(f.type), (f.name, script.__name__, first)


def test_tasks_of_the_paper():
    """The four kinds of masks and the instances (Sec. 4.1), as often by default as they always were here."""
    pefl = {"t2i": 1 / 11, "outpaint": 3.5 / 11, "edit": 3.5 / 11, "inpaint": 1.5 / 11, "erase": 1.5 / 11}
    omni = {"t2i": 1 / 4, "inpaint": 1 / 4, "edit": 5 / 24, "outpaint": 5 / 24, "erase": 1 / 12}
    for text, right in ((train_pefl.Config.tasks, pefl), (train_omni.TASKS["inpaint"], omni),
                        (train_omni.TASKS["base"], {"t2i": 1})):
        assert data.mixture(text) == pytest.approx(right) and list(data.mixture(text)) == list(right)
    assert list(data.mixture("erase=3, t2i=1,edit=0")) == ["erase", "t2i"]


def test_whole_pictures_know_no_tasks():
    with pytest.raises(SystemExit, match="^error: --tasks: t2i=1: --stage base draws whole pictures"):
        train_omni.check(train_omni.Config(stage="base", tasks="t2i=1"))


@pytest.mark.parametrize("script, flags", [(train_omni, dict(steps=1)), (train_pefl, dict(phases="5/4/2x1"))])
def test_tasks_reach_the_data(made, tmp_path, monkeypatch, script, flags):
    asked, own = [], data.task_mask
    monkeypatch.setattr(data, "task_mask", lambda task, *rest: (asked.append(task), own(task, *rest))[1])
    call(made, tmp_path, script, tasks="erase=1,outpaint=2", batch_size=32, sample_every=1, **flags)
    assert set(asked) == {"erase", "outpaint"} and 0.4 < asked.count("outpaint") / len(asked) < 0.9


@pytest.mark.parametrize("script", [train_omni, train_pefl, train_reward])
def test_help_explains_every_knob(script, capsys):
    with pytest.raises(SystemExit) as e:
        tyro.cli(script.Config, args=["--help"], config=(tyro.conf.FlagConversionOff,))
    text, source = capsys.readouterr().out, inspect.getsource(script.Config)
    assert e.value.code == 0
    for f in fields(script.Config):
        assert f"--{f.name.replace('_', '-')}" in text
        comment = re.search(rf"^    {f.name}: .*  # (\S.*)", source, re.M)
        assert comment, f"{script.__name__}: {f.name} has no comment"
        assert comment[1].split()[0] in text
