"""train_omni.py and train_pefl.py with --fsdp True: two ranks against one, killed and resumed."""

import json
import subprocess
import sys
import time

import pytest
import torch
from held import held
from inprocess import NATIVE
from test_sd3 import flags_of as flags_of_sd3
from test_sd3 import imagereward, pefl, sd3, vgg  # noqa: F401  (sd3: a fixture)
from test_sharded import kill
from test_text_encoders import files  # noqa: F401  (a fixture)
from test_train_edit import edit, made  # noqa: F401  (made: a fixture)
from trained import ENV, PEFL_FILES, ROOT, call, command, differ, newest, rows, run, tensors

import checkpoint
import train_omni
import train_pefl

pytestmark = pytest.mark.usefixtures("one_thread_and_own_signals")


def flags_of(made, script):  # noqa: F811
    return edit(made) if script is train_omni else {"base": made["base"], "sample_every": 4}


def agree(one, two):
    for a, b in zip(one, two, strict=True):
        for key in (k for k in a if not k.startswith(("time", "perf", "lr", "data"))):
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=2e-4), (a["step"], key)


@pytest.mark.slow
@pytest.mark.parametrize("script", [train_omni, pytest.param(train_pefl, marks=pytest.mark.slow)])
def test_two_sharded_ranks_equal_one(made, tmp_path, script):  # noqa: F811
    """Losses, gradients, rewards, held-out samples, alarms: of a run alone, of two ranks with shards."""
    flags = flags_of(made, script)
    one = call(made, tmp_path / "1", script, **flags)
    run(command(made, tmp_path / "2", script, **flags | {"batch_size": 2, "fsdp": True}), ranks=2)
    two = rows(tmp_path / "2")
    assert len(one) == len(two) == 4
    agree(one, two)
    a, b = tensors(tmp_path / "1"), tensors(tmp_path / "2")
    assert a.keys() == b.keys()
    assert json.loads((newest(tmp_path / "2") / "manifest.json").read_text())["world"] == 2


@pytest.mark.slow
def test_pefl_on_sd3(sd3, tmp_path):  # noqa: F811
    """The real stack, small: VAE, three text encoders, ImageReward, VGG; one rank of 2 and two of 1."""
    flags = dict(phases="6/5/3x4", adversarial_from=1, save_every=4, batch_size=2)
    one = pefl(sd3, tmp_path, "one", **flags)
    own = dict(base=sd3["sd3"], image_size=32, lr=1e-4, warmup=2, ema=0.9,
               alignment=imagereward(tmp_path), vgg=vgg(tmp_path), fsdp=True)
    flags = flags_of_sd3(sd3, tmp_path / "two", **own | flags | {"batch_size": 1})
    run([train_pefl.__file__, *(f"--{k}={v}" for k, v in flags.items())], ranks=2)
    agree(one, rows(tmp_path / "two"))


@pytest.mark.slow
@pytest.mark.parametrize("script", [train_omni, train_pefl])
def test_sharded_run_resumes(made, tmp_path, script):  # noqa: F811
    """kill -9 of torchrun and both ranks, the same command: as without; then the same on one rank."""
    long = {"steps": 12} if script is train_omni else {"phases": "5/4/2x12"}
    flags = flags_of(made, script) | long | dict(batch_size=2, fsdp=True, precision=NATIVE)
    run(command(made, tmp_path / "whole", script, **flags), ranks=2)
    out = tmp_path / "cut"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = held("common:Verdict", "give", 11, tmp_path / "gate", command(made, out, script, **flags))
    process = subprocess.Popen([*torchrun, "--", *argv], cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while not (out / "step_00000004").exists():
        assert process.poll() is None
        time.sleep(0.002)
    kill(process)
    process.wait()
    assert not (out / "step_00000012").exists()
    assert "resumed" in run(command(made, out, script, **flags), ranks=2)
    assert not differ(tensors(tmp_path / "whole"), tensors(out))
    last, again = rows(tmp_path / "whole")[-1], rows(out)[-1]
    same = [k for k in last if not k.startswith("perf/") and k != "time"]
    assert last["step"] == 12 and {k: last[k] for k in same} == {k: again[k] for k in same}
    longer = {"steps": 13} if script is train_omni else {"phases": "5/4/2x13"}
    assert "step 12 (" in run(command(made, out, script, **flags | longer | {"batch_size": 4}))
    if script is train_pefl:
        assert {k.split("/")[0] for k in tensors(out)} == PEFL_FILES
    state, _ = checkpoint.load(out, ("ema",))
    assert all(torch.isfinite(v).all() for v in state["ema"].values())
