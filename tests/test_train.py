"""train_omni.py and train_pefl.py: real processes with signals and ranks, and main() with spies; tiny sizes.

Gradient accumulation is not compared with a larger batch: noise and t' are keyed by micro-step, so
accum 2 x batch 2 draws other numbers than accum 1 x batch 4 by design.
"""

import json
import math
import re
import shutil
import subprocess
import sys
import traceback
from dataclasses import fields

import numpy as np
import pytest
import torch
from inprocess import NATIVE
from PIL import Image
from torch.overrides import TorchFunctionMode
from trained import (
    ENV,
    OMNI_FILES,
    PEFL_FILES,
    ROOT,
    call,
    command,
    differ,
    newest,
    random_editor,
    refused,
    resumes,
    shipped,
    steps,
    tensors,
    two_ranks_agree,
)

import checkpoint
import flow
import model
import train_omni
import train_pefl
from common import Verdict
from kernels import dispatch

pytestmark = pytest.mark.usefixtures("one_thread_and_own_signals")


#### resume ##################################################################################################


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


#### what users get wrong about a run's folder ###############################################################


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
