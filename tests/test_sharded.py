"""FSDP2 under torchrun with gloo: two ranks against one, other numbers of ranks, kills and damage."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sharded_run
import torch
from held import held
from inprocess import run_ranks, run_script
from safetensors.torch import load_file

import checkpoint
import common
import model

RUN = sharded_run.__file__
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def run(ranks, **settings):
    command = [RUN, json.dumps(settings, default=str)]
    done = run_script(*command) if ranks == 1 else run_ranks(ranks, command)
    assert done.returncode == 0, done.stdout + done.stderr
    result = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    return json.loads(result) | {"text": done.stdout}


def state(folder):
    """{"file/key": tensor} of a checkpoint's safetensors."""
    return {f"{f.stem}/{k}": v for f in Path(folder).glob("*.safetensors") for k, v in load_file(f).items()}


NUMBERS = ("raw", "averaged", "raw again", "ema")


def close(a, b, rel):
    x, y = ([n for row in r["rows"] for n in row] + [r[k] for k in NUMBERS] for r in (a, b))
    return all(abs(m - n) <= rel * abs(m) for m, n in zip(x, y, strict=True))


@pytest.mark.parametrize("kind, more", [
    ("editor", {"recompute": 2}),  # an EditNet without checkpointing: test_sharded_scripts.py
    pytest.param("editnet", {"recompute": 1}, marks=pytest.mark.slow),
    pytest.param("textcontrol", {}, marks=pytest.mark.slow),
    pytest.param("concat", {}, marks=pytest.mark.slow)])
def test_two_ranks_equal_one(tmp_path, kind, more):
    """Losses, gradient norms, outputs with raw and averaged weights; tensors of the checkpoints."""
    more = dict(kind=kind, steps=3, save=[3]) | more
    one = run(1, out=tmp_path / "1", shard=False, **more)
    two = run(2, out=tmp_path / "2", **more)
    assert close(one, two, 2e-5)
    assert two["raw"] == two["raw again"] and abs(two["raw"] / two["averaged"] - 1) > 1e-3
    assert not close(one, run(1, out=tmp_path / "x", shard=False, data=1, **more), 2e-5)  # other pictures
    a, b = state(tmp_path / "1/step_00000003"), state(tmp_path / "2/step_00000003")
    assert a.keys() == b.keys() and any(k.startswith("optimizer/") for k in a)
    for k in a:
        assert a[k].dtype == b[k].dtype
        # Adam moves a key's bias, whose gradient is zero but for rounding, by a whole step
        assert k.endswith("qkv.bias") or (a[k].float() - b[k].float()).abs().max() < 2e-5, k


@pytest.mark.slow
def test_a_bad_step_of_one_rank_changes_nothing(tmp_path):
    """A loss of NaN on rank 1: both ranks' shards of weights, moments and averages stay, bit for bit."""
    clean = run(2, out=tmp_path / "clean", steps=2, save=[2])
    judged = run(2, out=tmp_path / "judged", steps=3, save=[3], bad=3)
    assert judged["rows"][:2] == clean["rows"] and judged["rows"][2][0] != judged["rows"][2][0]
    assert all(judged[k] == clean[k] for k in NUMBERS)
    a, b = state(tmp_path / "clean/step_00000002"), state(tmp_path / "judged/step_00000003")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_bf16_is_near_autocast(tmp_path):
    """Gathered in bf16, masters in fp32: as near to autocast as bf16 is, and not equal to fp32."""
    one, two, exact = (run(n, out=tmp_path, kind="editnet", steps=3, **more) for n, more in (
        (1, dict(shard=False, bf16=True)), (2, dict(bf16=True)), (2, dict(bf16=False))))
    assert close(one, two, 2e-2) and not close(exact, two, 1e-5)


@pytest.mark.slow
def test_resumes_on_another_number_of_ranks(tmp_path):
    """2 -> 2 bit for bit, 2 -> 1 and 1 -> 2 to rounding; frozen weights too. 1 is not sharded."""
    whole = run(2, out=tmp_path / "whole", save=[2, 4], kind="editnet")
    for name in ("two", "one"):
        shutil.copytree(tmp_path / "whole/step_00000002", tmp_path / name / "step_00000002")
    two = run(2, out=tmp_path / "two", save=[4], kind="editnet")
    one = run(1, out=tmp_path / "one", shard=False, save=[3], steps=3, kind="editnet")
    back = run(2, out=tmp_path / "one", save=[4], kind="editnet")
    assert len(two["rows"]) == 2 and len(one["rows"]) == len(back["rows"]) == 1
    assert two["rows"] == whole["rows"][2:] and all(two[k] == whole[k] for k in NUMBERS)
    both = back | {"rows": one["rows"] + back["rows"]}
    assert close(both, two, 2e-5)
    a, b = state(tmp_path / "whole/step_00000004"), state(tmp_path / "two/step_00000004")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    worlds = [json.loads((tmp_path / p / "manifest.json").read_text())["world"] for p in
              ("whole/step_00000004", "one/step_00000003", "one/step_00000004")]
    assert worlds == [2, 1, 2]


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    """SIGKILL to both ranks between steps 4 and 7 of a run that saves at every step; then the newest whole
    one is damaged."""
    whole = run(2, out=tmp_path / "whole", steps=10, save=[10])
    out = tmp_path / "cut"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    settings = json.dumps({"out": str(out), "steps": 500, "save": "each"})
    argv = held("common:Verdict", "give", 7, tmp_path / "gate", [RUN, settings])
    process = subprocess.Popen([*torchrun, "--", *argv], env=ENV, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (out / "step_00000004").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    kill(process)
    process.communicate()
    newest = max(p for p in out.glob("step_*") if p.suffix == "")
    assert 4 <= int(newest.name[5:]) < 7
    (newest.with_name("step_00000009.tmp")).mkdir()  # a save that was cut off
    damaged = bytearray((newest / "optimizer.safetensors").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (newest / "optimizer.safetensors").write_bytes(damaged)
    again = run(2, out=out, steps=10, save=[10])
    assert "FALLING BACK" in again["text"] and "optimizer.safetensors" in again["text"]
    assert len(again["rows"]) == 11 - int(newest.name[5:])
    assert again["rows"] == whole["rows"][-len(again["rows"]):] and all(again[k] == whole[k] for k in NUMBERS)


def children(pid):
    """torchrun gives each rank a session of its own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(path.parent.name))
        except (OSError, ValueError):
            continue
    return found


def kill(torchrun):
    """SIGKILL to it and its ranks."""
    for pid in [torchrun.pid, *children(torchrun.pid)]:
        with contextlib.suppress(ProcessLookupError):  # a rank that has seen the other one die
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_failing_disk(tmp_path):
    """A save that fails on rank 0 fails on both, in one line, and leaves nothing; checkpoints of a sharded
    run are those of any other, and what an earlier version left of an optimiser is not unpickled."""
    (tmp_path / "file").write_text("")
    got = run(2, out=tmp_path, steps=1, save=[1], failing=True)
    assert got["failed"] == [None, None] and got["text"].count("warning: checkpoint") == 2
    assert "No space left" in got["text"]
    folder = tmp_path / "step_00000001"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", folder.name]
    assert checkpoint.load(folder)[0].keys() == {"model", "ema", "optimizer"}
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "dcp").mkdir()
    (folder / "dcp/.metadata").write_bytes(b"")
    entry = {"bytes": 0, "sha256": checkpoint.sha256(folder / "dcp/.metadata")}
    manifest["files"] |= {"dcp/.metadata": entry}
    manifest["sha256"] = checkpoint._manifest_hash(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.load(folder, "ema")[0].keys() == {"ema"}  # its weights can be used
    with pytest.raises(SystemExit, match="error: .*step_00000001: an earlier version saved its optimiser"):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize("text, change", [
    ("a low-rank update", lambda net: model.add_lora(net, 2)),
    ("--fixed_source", lambda net: setattr(net, "cached", True)),
    ("no block trains", lambda net: net.requires_grad_(False))])
def test_what_cannot_be_sharded(text, change):
    net = sharded_run.build("editnet")
    change(net)
    with pytest.raises(SystemExit, match=f"error: --fsdp: .*{text}"):
        try:
            common.shard(net, common.Dist(), False)
        finally:
            common.cleanup()
