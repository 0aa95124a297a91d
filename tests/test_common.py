"""common.py with real files, real processes and real signals."""

import importlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import tyro
from inprocess import a_port
from PIL import Image

import checkpoint
import common
import log
from common import Dist
from kernels import dispatch
from log import Perf, peak_flops
from train_omni import Muon

ROOT = Path(common.__file__).parent


def python(code, *args, **env):
    """Start `code` in a fresh interpreter."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def net(width=8, seed=0):
    torch.manual_seed(seed)
    layers = torch.nn.Linear(width, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 1)
    return torch.nn.Sequential(*layers)


def save(out, step, **more):
    return checkpoint.save(out, step, {"model": {"w": torch.full((1000,), float(step))}}, {}, **more)


def steps(out):
    return sorted(p.name for p in Path(out).iterdir())


# randomness


def test_generators_depend_on_seed_step_position_and_stream_only():
    whole = common.randn(common.generators(1, 2, range(6)), (3, 4, 4))
    halves = [common.randn(common.generators(1, 2, range(a, a + 3)), (3, 4, 4)) for a in (0, 3)]
    assert torch.equal(whole, torch.cat(halves))  # one rank of 6 or two of 3
    assert len({tuple(row.flatten()[:4].tolist()) for row in whole}) == 6
    for other in ((2, 2, range(6)), (1, 3, range(6)), (1, 2, range(6, 12)), (1, 2, range(6), 1)):
        assert not torch.equal(whole, common.randn(common.generators(*other), (3, 4, 4)))
    swapped = common.randn(common.generators(2, 1, range(6)), (3, 4, 4))
    assert not torch.equal(whole, swapped)
    assert torch.equal(common.randn(common.generators(1, 2, torch.arange(6)), (3, 4, 4)), whole)


def test_draws_have_the_stated_ranges():
    gens = common.generators(0, 0, range(4000))
    noise, u, k = common.randn(gens, (2, 3)), common.rand(gens), common.randint(gens, 3, 7)
    assert noise.shape == (4000, 2, 3) and abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert u.shape == (4000,) and 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.02
    assert k.dtype == torch.int64 and set(k.tolist()) == {3, 4, 5, 6}


# schedule, EMA


def test_lr_at():
    assert [common.lr_at(s, 1.0, 4, 100) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert common.lr_at(0, 1.0, 0, 100) == 1
    assert common.lr_at(54, 1.0, 4, 104, "cosine") == pytest.approx(0.5)
    assert common.lr_at(104, 1.0, 4, 104, "cosine") == pytest.approx(0)
    assert common.lr_at(900, 1.0, 4, 104, "cosine") == pytest.approx(0)
    with pytest.raises(SystemExit, match="linear"):
        common.lr_at(9, 1.0, 0, 10, "linear")


def test_ema_formula_buffers_and_swap():
    module = net()
    module[0].weight.requires_grad_(False)
    ema = common.EMA(module, 0.5)
    expected = module[2].weight.detach().clone()
    for n in range(20):
        with torch.no_grad():
            module[2].weight += 1
        module(torch.randn(4, 8))  # moves the running statistics
        ema.update()
        d = min(0.5, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * module[2].weight
    state = ema.state_dict()
    assert torch.allclose(state["2.weight"], expected) and state[common.EMA_COUNT] == 20
    assert torch.equal(state["1.running_mean"], module[1].running_mean)
    assert torch.equal(state["0.weight"], module[0].weight)
    raw = module[2].weight.detach().clone()
    with pytest.raises(ZeroDivisionError), ema.swapped() as swapped:
        assert torch.equal(swapped[2].weight, state["2.weight"])
        1 / 0
    assert torch.equal(module[2].weight, raw)
    module[0].weight.requires_grad_(True)
    with pytest.raises(AssertionError, match="trained parameters changed"):
        ema.update()


def test_a_norm_of_no_gradients_is_where_the_parameters_are():
    """As while --disc_first: Verdict stacks it with losses, which stand on the GPU."""
    for device in ("cpu", "meta"):
        norm = common.clip_grad_norm((torch.nn.Parameter(torch.ones(2, device=device)) for _ in "ab"), 1.0)
        assert norm.shape == () and norm.device.type == device
    with pytest.raises(RuntimeError):  # what torch's own answer would lead to
        torch.stack([torch.nn.utils.clip_grad_norm_([], 1.0), norm])


def test_muon():
    """Against the exact polar factor: q, k and v of one matrix each on its own, both orientations, AdamW for
    the other groups bit for bit, weight decay, nothing done without a gradient, and state that resumes."""
    torch.manual_seed(0)
    qkv, wide, bias, idle = (torch.nn.Parameter(torch.randn(s)) for s in ((24, 8), (8, 20), (5,), (4, 4)))
    twin = torch.nn.Parameter(bias.detach().clone())
    opt = Muon([{"params": [qkv, wide, idle], "muon": True, "weight_decay": 0.5},
                {"params": [bias], "weight_decay": 0.0}], lr=0.1)
    plain = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.0)
    before, momentum = {p: p.detach().clone() for p in (qkv, wide, idle)}, {qkv: 0.0, wide: 0.0}
    for _ in range(3):
        for p in (qkv, wide, bias):
            p.grad = torch.randn_like(p)
        twin.grad = bias.grad.clone()
        grads, was = {p: p.grad.clone() for p in momentum}, {p: p.detach().clone() for p in momentum}
        opt.step(), plain.step()
        for p, parts in ((qkv, 3), (wide, 1)):
            momentum[p] = 0.95 * momentum[p] + 0.05 * grads[p]
            update = 0.05 * grads[p] + 0.95 * momentum[p]
            moved = (0.95 * was[p] - p.detach()) / (0.1 * 0.2 * max(p.shape[0] // parts, p.shape[1]) ** 0.5)
            for got, m in zip(moved.chunk(parts), update.chunk(parts)):
                u, s, v = torch.linalg.svd(m, full_matrices=False)
                kept = s > 0.05 * s.max()
                along = torch.einsum("ri,rc,ic->i", u, got, v)[kept]
                assert 0.6 < along.min() and along.max() < 1.3
                assert (got - u @ torch.diag(torch.einsum("ri,rc,ic->i", u, got, v)) @ v).abs().max() < 1e-4
            assert torch.equal(p.grad, grads[p])
        assert torch.equal(bias, twin)
    assert torch.equal(idle, before[idle]) and not torch.equal(qkv, before[qkv])
    net = torch.nn.ParameterDict(dict(qkv=qkv, wide=wide, bias=bias, idle=idle))
    state = checkpoint.optimizer_tensors(opt, net)
    assert {"qkv.momentum", "wide.momentum", "bias.exp_avg"} <= state.keys()
    for counted in (False, True):  # by name, and by place among the parameters as in checkpoints of old
        places = dict(qkv=0, wide=1, idle=2, bias=3) if counted else {}
        parts = [(*entry.split("."), value) for entry, value in state.items()]
        stored = {f"{places.get(name, name)}.{key}": value for name, key, value in parts}
        opt.state.clear()
        checkpoint.load_optimizer_tensors(opt, net, stored)
        assert torch.equal(opt.state[qkv]["momentum"], state["qkv.momentum"])
        assert torch.equal(opt.state[bias]["exp_avg"], state["bias.exp_avg"])


def test_a_bad_step_changes_nothing():
    """Weights, moments, counts and averages of AdamW, Muon and EMA: bit for bit, and the next step counts as
    if there had been none. Without found_inf a step is what it is with found_inf = 0."""
    def start():
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(8, 24), torch.nn.GELU(), torch.nn.Linear(24, 4))
        groups = [{"params": [m.weight for m in module if hasattr(m, "weight")], "muon": True},
                  {"params": [m.bias for m in module if hasattr(m, "bias")]}]
        opt = Muon(groups, lr=0.1, weight_decay=0.1, fused=True)
        return module, opt, common.EMA(module, 0.3)

    def step(module, opt, ema, seed, bad=None):
        g = torch.Generator().manual_seed(seed)
        for p in module.parameters():
            p.grad = torch.randn(p.shape, generator=g) * (math.nan if bad else 1)
        if bad is not None:
            opt.found_inf = torch.tensor(bad)
        opt.step()
        ema.update(None if bad is None else torch.tensor(bad))

    def state(module, opt, ema):
        return {**ema.state_dict(), **{f"raw {k}": v for k, v in module.state_dict().items()},
                **checkpoint.optimizer_tensors(opt, module)}

    plain, judged = start(), start()
    for seed in range(4):
        step(*plain, seed)
        step(*judged, seed, 0.0)
        before = {k: v.clone() for k, v in state(*judged).items()}
        step(*judged, 99, 1.0)
        after, clean = state(*judged), state(*plain)
        assert after.keys() == before.keys() == clean.keys() and len(after) == 19
        assert all(torch.equal(after[k], before[k]) and torch.equal(after[k], clean[k]) for k in after)
    assert clean[common.EMA_COUNT] == 4 and all(v.isfinite().all() for v in clean.values())


def test_ema_of_bf16_and_tied_weights():
    module = torch.nn.ModuleDict({k: torch.nn.Linear(4, 4) for k in "ab"}).bfloat16()
    module.b.weight = module.a.weight
    ema = common.EMA(module, 0.999)
    with torch.no_grad():
        module.a.weight += 1
    ema.update()
    state = ema.state_dict()
    assert state["a.weight"].dtype == torch.float32 and torch.equal(state["a.weight"], state["b.weight"])
    assert not torch.equal(state["a.weight"].bfloat16(), module.a.weight)  # bf16 cannot hold such a step
    with ema.swapped():
        assert module.a.weight.dtype == torch.bfloat16


# checkpoints


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, momentum=0.9)])
def test_resume_is_exact(tmp_path, optimizer):
    def start(seed):
        module = net(seed=seed)
        return module, common.EMA(module, 0.99), optimizer(module.parameters())

    def train(module, ema, opt, first, last):
        for step in range(first, last):
            x = common.randn(common.generators(0, step, range(4)), (8,))
            opt.param_groups[0]["lr"] = common.lr_at(step, 0.1, 5, 20)
            module(x).square().mean().backward()
            opt.step()
            opt.zero_grad()
            ema.update()

    def state(module, ema, opt):
        return {"model": module, "ema": ema, "optimizer": opt}

    straight = start(0)
    train(*straight, 0, 12)
    first = start(0)
    train(*first, 0, 5)
    assert checkpoint.save(tmp_path, 5, state(*first), {"config": {"seed": 0}, "run_id": "x"})
    second = start(1)
    manifest = checkpoint.resume(tmp_path, state(*second))
    train(*second, manifest["step"], 12)
    for name, group in checkpoint.tensors_of(state(*straight)).items():
        other = checkpoint.tensors_of(state(*second))[name]
        assert group.keys() == other.keys() and len(group) > 4
        for key in group:
            assert group[key].dtype == other[key].dtype and torch.equal(group[key], other[key]), (name, key)
    assert manifest["config"] == {"seed": 0} and manifest["meta"] == {"run_id": "x"}


def test_any_tensor_survives(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    group = {"bf16": base.bfloat16(), "transposed": base.t(), "shared": base, "again": base, "view": base[1],
             "empty": torch.zeros(0, 3), "scalar": torch.tensor(3), "bool": base > 4,
             "expanded": torch.ones(1, 2).expand(5, 2)}
    checkpoint.save(tmp_path, 1, {"model": group, "nothing": {}}, {})
    tensors, _ = checkpoint.load(tmp_path)
    assert tensors["nothing"] == {}
    for key, value in group.items():
        assert tensors["model"][key].dtype == value.dtype and torch.equal(tensors["model"][key], value), key
    assert (tmp_path / "step_00000001" / "model.safetensors").stat().st_mode & 0o044  # readable to a group


def test_keep_names_and_folders(tmp_path, capsys):
    for step in (10, 20, 30, 30):  # a resumed run may save a step again
        assert save(tmp_path, step, keep=2).name == f"step_000000{step}"
    assert steps(tmp_path) == ["step_00000020", "step_00000030"]
    for path in (tmp_path, tmp_path / "step_00000030"):
        tensors, manifest = checkpoint.load(path)
        assert manifest["step"] == 30 and tensors["model"]["w"][0] == 30
    shipped = tmp_path / "base"
    shutil.copytree(tmp_path / "step_00000020", shipped)
    assert checkpoint.load(shipped, ("ema", "model"))[1]["step"] == 20
    with pytest.raises(SystemExit, match=r"base/manifest.json: lists no file named ema: "):
        checkpoint.load(shipped, ("ema",))
    for path, what in ((tmp_path / "none", "no such folder"), (tmp_path.parent, "neither manifest.json nor")):
        with pytest.raises(SystemExit, match=what):
            checkpoint.load(path)
    assert checkpoint.latest(tmp_path / "none") is None
    for step in (40, 50):
        save(tmp_path, step, keep=0)
    assert len(steps(tmp_path)) == 5
    assert capsys.readouterr().out == ""


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def edit(path):
    path.write_text(path.read_text().replace('"step": 3', '"step": 4'))


FLAWS = {
    "flipped byte": (lambda p: flip(p / "model.safetensors"), "model.safetensors: SHA-256"),
    "truncated": (lambda p: os.truncate(p / "model.safetensors", 100), "model.safetensors: 100 bytes inst"),
    "file missing": (lambda p: (p / "model.safetensors").unlink(), "model.safetensors: cannot be read"),
    "manifest missing": (lambda p: (p / "manifest.json").unlink(), "manifest.json: cannot be read"),
    "manifest empty": (lambda p: (p / "manifest.json").write_text(""), "manifest.json: damaged"),
    "manifest truncated": (lambda p: os.truncate(p / "manifest.json", 50), "manifest.json: damaged"),
    "manifest binary": (lambda p: (p / "manifest.json").write_bytes(b"\xff\x00"), "manifest.json: damaged"),
    "manifest a list": (lambda p: (p / "manifest.json").write_text("[1]"), "manifest.json: damaged"),
    "manifest edited": (lambda p: edit(p / "manifest.json"), "manifest.json: was changed"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_damaged_newest_falls_back_loudly(tmp_path, capsys, flaw):
    damage, message = FLAWS[flaw]
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    damage(tmp_path / "step_00000003")
    tensors, manifest = checkpoint.load(tmp_path)
    out = capsys.readouterr().out
    assert manifest["step"] == 2 and tensors["model"]["w"][0] == 2
    assert f"step_00000003/{message}" in out and "FALLING BACK" in out and "using" in out
    with pytest.raises(SystemExit, match=message) as error:
        checkpoint.load(tmp_path / "step_00000003")
    assert "\n" not in str(error.value) and "use another" in str(error.value)
    # a run that resumed at 2 keeps its own checkpoints, whatever lies ahead of it, and in the end replaces it
    assert save(tmp_path, 2, keep=1)
    assert checkpoint.load(tmp_path)[1]["step"] == 2
    assert save(tmp_path, 3, keep=1) and steps(tmp_path) == ["step_00000003"]
    assert checkpoint.load(tmp_path)[1]["step"] == 3


def test_nothing_verifies_is_an_error_not_a_fresh_start(tmp_path):
    save(tmp_path, 1)
    flip(tmp_path / "step_00000001" / "model.safetensors")
    with pytest.raises(SystemExit, match="none of 1 checkpoints verifies"):
        checkpoint.load(tmp_path)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {"../../secret.safetensors": next(iter(manifest["files"].values()))}
    manifest["sha256"] = checkpoint._manifest_hash(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match="is no name of one"):
        checkpoint.load(folder)


SLOW_SAVER = """
import sys, time, torch, checkpoint
def slow(path, sha256=checkpoint.sha256):
    print("hashing", flush=True)
    time.sleep(600 if torch_step == 2 else 0)
    return sha256(path)
checkpoint.sha256 = slow
for torch_step in (1, 2):
    checkpoint.save(sys.argv[1], torch_step, {"model": {"w": torch.tensor([torch_step])}}, {}, keep=1)
"""


def test_kill_9_during_save_leaves_the_previous_checkpoint(tmp_path):
    child = python(SLOW_SAVER, tmp_path)
    assert [child.stdout.readline().strip() for _ in range(2)] == ["hashing"] * 2
    assert steps(tmp_path) == ["step_00000001", "step_00000002.tmp"]
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    tensors, manifest = checkpoint.load(tmp_path)
    assert manifest["step"] == 1 and tensors["model"]["w"][0] == 1
    save(tmp_path, 2, keep=1)
    assert steps(tmp_path) == ["step_00000002"]


def test_kill_between_the_two_renames(tmp_path):
    folder = save(tmp_path, 1)
    folder.rename(folder.with_name(folder.name + ".old"))  # where a second save of step 1 was killed
    assert checkpoint.load(tmp_path)[1]["step"] == 1
    save(tmp_path, 1)
    assert steps(tmp_path) == ["step_00000001"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("check", [True, False])
def test_full_disk(tmp_path, monkeypatch, capsys, check):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mount is not allowed here")
    try:
        assert save(disk, 1)
        if not check:  # the disk fills up while the file is being written
            monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 10**12))
        assert checkpoint.save(disk, 2, {"model": {"w": torch.zeros(10**6)}}, {}) is None
        out = capsys.readouterr().out
        assert out.count("\n") == 1 and "not saved" in out and "training goes on" in out
        assert ("MiB are free" if check else "No space left") in out
        assert steps(disk) == ["step_00000001"] and checkpoint.load(disk)[1]["step"] == 1
    finally:
        subprocess.run(["umount", disk])


def test_failing_disk_is_retried_then_reported(tmp_path, monkeypatch, capsys):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert checkpoint.save(tmp_path, 1, {"model": {"w": torch.zeros(10**5)}}, {}) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert pauses == [1, 2] and "File too large" in capsys.readouterr().out and steps(tmp_path) == []
    (tmp_path / "file").touch()
    assert checkpoint.save(tmp_path / "file", 1, {}, {}) is None  # the run folder is a file
    assert save(tmp_path, 1)


def test_wrong_architecture_is_one_clear_line():
    wide, narrow = torch.nn.Sequential(torch.nn.Linear(9, 9)), net(8)
    with pytest.raises(SystemExit) as error:
        checkpoint.load_state(narrow, wide.state_dict(), "runs/a/model.safetensors")
    text = str(error.value)
    assert text.startswith("error: runs/a/model.safetensors: does not fit Sequential: 7 missing (1.bias, ")
    assert "0.weight [9, 9] instead of [8, 8]" in text and "\n" not in text and ", ...)" in text
    average = common.EMA(net(8, seed=3), 0.9).state_dict()
    checkpoint.load_state(narrow, average, "ema")  # its counter is no weight
    assert torch.equal(narrow[0].weight, net(8, seed=3)[0].weight)
    opt = torch.optim.AdamW(wide.parameters())
    wide(torch.randn(2, 9)).sum().backward()
    opt.step()
    with pytest.raises(SystemExit, match="other parameters"):
        checkpoint.load_optimizer_tensors(torch.optim.AdamW(narrow.parameters()), narrow,
                                          checkpoint.optimizer_tensors(opt, wide))


# metrics


def rows(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=lambda c: pytest.fail(c)) for line in lines]


def test_metrics_rows_means_and_nan(tmp_path, capsys):
    metrics = log.Metrics(tmp_path, Dist(), {}, wandb="off")
    metrics.add(**{"loss/all": torch.tensor([1.0, 2.0]), "acc": 1.0})
    metrics.add(**{"loss/all": torch.tensor(6.0), "bad": math.nan, "worse": torch.tensor(math.inf)})
    row = metrics.flush(7, {"lr": 1e-4, "device": "cpu", "t": torch.tensor(2)})
    assert row["loss/all"] == 3 and row["acc"] == 1 and math.isnan(row["bad"]) and row["t"] == 2
    assert metrics.flush(8) == {}
    picture = Image.new("RGB", (8, 8))
    metrics.images(8, {"samples/ema weights": picture})
    metrics.close()
    first, second = rows(tmp_path)
    assert first["step"] == 7 and first["bad"] is None and first["worse"] is None and first["lr"] == 1e-4
    assert second.keys() == {"step", "time"}
    assert "step      7 | loss/all 3 | acc 1 | bad nan" in capsys.readouterr().out
    assert (tmp_path / "images" / "step_00000008_samples_ema_weights.png").exists()


def test_metrics_resume_after_a_torn_row(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    metrics = log.Metrics(tmp_path, Dist(), {}, wandb="off", run_id="abc", resumed_from=1)
    assert metrics.run_id == "abc"
    metrics.flush(2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[2] == '{"resumed_from": 1}' and json.loads(lines[3])["step"] == 2


def test_wandb_offline_and_a_crashing_wandb(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    metrics = log.Metrics(tmp_path, Dist(), {"lr": 1.0}, wandb="offline", run_id="abcd1234")
    assert metrics.run is not None and "wandb: offline, id abcd1234" in capsys.readouterr().out
    metrics.add(loss=1.0)
    metrics.flush(5)
    metrics.images(5, {"samples": Image.new("RGB", (8, 8))})
    metrics.flush(3)  # an earlier step again, as after a resume
    run = metrics.run

    def broken(*args, **kwargs):
        assert "step" not in kwargs
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(run), "log", broken)
    for step in range(6, 14):
        metrics.flush(step)
    out = capsys.readouterr().out
    assert out.count("wandb.log failed") == 2 and "without it" in out and metrics.run is None
    assert [r["step"] for r in rows(tmp_path)] == [5, 3, *range(6, 14)]
    run.finish()
    metrics.close()
    assert list((tmp_path / "wandb").glob("offline-run-*-abcd1234/*.wandb"))


def test_wandb_that_cannot_start(tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")
    modes, projects = [], []
    monkeypatch.delenv("WANDB_PROJECT", raising=False)

    def no_network(**kwargs):
        modes.append(kwargs["mode"])
        projects.append(kwargs["project"])
        raise wandb.errors.CommError("timed out\nafter 90 s")

    monkeypatch.setattr(wandb, "init", no_network)
    monkeypatch.setattr(log, "_unreachable", lambda: "")  # tests/test_hostile.py
    log.Metrics(tmp_path, Dist(), {}, wandb="online").flush(1)
    out = capsys.readouterr().out
    assert modes == ["online", "offline"] and out.count("\n") == 3
    assert "going on offline" in out and "going on without it" in out
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    log.Metrics(tmp_path, Dist(), {}, wandb="offline").flush(2)
    assert projects == ["feedback-editing", "feedback-editing", "mine"]
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    log.Metrics(tmp_path, Dist(), {}, wandb="offline").flush(2)
    assert "going on without it" in capsys.readouterr().out
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log.Metrics(tmp_path, Dist(), {}).flush(3)
    assert "wandb" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="sometimes"):
        log.Metrics(tmp_path, Dist(), {}, wandb="sometimes")


def test_unwritable_out_dir_does_not_stop_metrics(tmp_path, capsys):
    (tmp_path / "file").touch()
    metrics = log.Metrics(tmp_path / "file", Dist(), {}, wandb="off")
    metrics.add(loss=1.0)
    assert metrics.flush(1) == {"loss": 1}
    metrics.images(1, {"a": Image.new("RGB", (8, 8))})
    metrics.close()
    assert capsys.readouterr().out.count("warning") == 2


# processes

TWO_RANKS = """
import json, os, signal, sys, torch, common
from pathlib import Path
from common import Verdict
import checkpoint, log
dist = common.setup("cpu")
out, result = Path(sys.argv[1]), {}
common.print0("only once")
torch.cpu._is_amx_tile_supported = lambda: dist.rank == 0  # a CPU with bf16 instructions and one without
torch.cpu._is_avx512_bf16_supported = lambda: False
result["bf16"] = common.use_bf16("auto", dist)
torch.manual_seed(0)
net = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(3)]).double()
x = common.randn(common.generators(0, 0, range(8)), (4,)).double().chunk(dist.world)[dist.rank]
loss = net[0](x).square().mean()
if dist.rank == 0:
    loss = loss + net[1](x).square().mean()   # used on one rank only; net[2] on none
loss.backward()
common.average_gradients(net.parameters(), dist.world, bucket_bytes=100)
result["grads"] = [None if p.grad is None else p.grad.flatten().tolist() for p in net.parameters()]
judged = Verdict(dist, out, "repair it")
result["given"] = [judged.give(0, torch.tensor(1.0)).item()]
result["given"].append(judged.give(1, torch.tensor([0.0, float("nan")][dist.rank])).item())
result["read"] = [judged.read(), judged.running, judged.read(last=True), judged.running]
metrics = log.Metrics(out, dist, {}, wandb="off")
metrics.add(both=torch.full((1 + dist.rank,), float(dist.rank)), **{f"only{dist.rank}": 5.0})
result["row"] = metrics.flush(1, {"lr": 1.0})
result["none"] = metrics.flush(2)
result["saved"] = str(checkpoint.save(out, 1, {"model": net.state_dict()}, {}, dist=dist))
result["failed"] = str(checkpoint.save(out / "metrics.jsonl", 1, {}, {}, dist=dist))
result["fresh"] = checkpoint.latest(out / "nothing")
checkpoint.save(out, 2, {"model": net.state_dict()}, {}, dist=dist)
if dist.rank == 0:
    (out / "step_00000002" / "model.safetensors").write_bytes(b"")
result["resumed"] = checkpoint.latest(out)[1]["step"]
if dist.rank == 1:
    os.kill(os.getpid(), signal.SIGTERM)
judged.give(2, torch.tensor(1.0))
result["stop"] = [judged.read(), judged.read(last=True)]
metrics.close()
(out / f"rank{dist.rank}.json").write_text(json.dumps(result))
common.cleanup()
raise SystemExit("a process of two ranks has ended")
"""


def test_two_ranks(tmp_path):
    with a_port() as port:
        env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [python(TWO_RANKS, tmp_path, RANK=str(r), LOCAL_RANK=str(r), **env) for r in range(2)]
        out = [p.communicate(timeout=600)[0] for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], "\n".join(out)
    assert out[0].count("only once") == 1 and "only once" not in out[1] and "step" not in out[1]
    a, b = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2))
    assert json.dumps(a).replace("NaN", "") == json.dumps(b).replace("NaN", "")

    torch.manual_seed(0)
    one = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(3)]).double()
    x = common.randn(common.generators(0, 0, range(8)), (4,)).double()
    (one[0](x).square().mean() + one[1](x[:4]).square().mean() / 2).backward()
    for grad, p in zip(a["grads"], one.parameters()):
        assert (grad is None) == (p.grad is None)
        assert grad is None or torch.allclose(torch.tensor(grad).double(), p.grad.flatten(), rtol=1e-6)
    assert a["bf16"] is b["bf16"] is False
    assert "precision: fp32 (some rank's CPU has no bf16 instructions)" in out[0]
    assert a["given"] == [0, 1] and a["read"] == [False, 0, False, 1] and a["stop"] == [False, True]
    assert "warning: step 1: non-finite" in out[0]
    assert a["row"]["both"] == pytest.approx(2 / 3) and a["row"]["only0"] == a["row"]["only1"] == 5
    assert a["none"] == {} and a["fresh"] is None and a["resumed"] == 1
    assert a["saved"].endswith("step_00000001") and a["failed"] == "None"
    assert [r["step"] for r in rows(tmp_path)] == [1, 2]


SIGNALLED = """
import common, os, time, torch
from common import Verdict
judged, step = Verdict(common.setup("cpu"), "out", "repair it"), 0
print("ready", flush=True)
while not judged.read():
    judged.give(step, torch.tensor(1.0))
    step += 1
    time.sleep(0.01)
print("saved and left")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_set_the_flag(number):
    child = python(SIGNALLED)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    assert child.communicate(timeout=300)[0] == "saved and left\n" and child.returncode == 0


@pytest.fixture
def cpu(monkeypatch):
    """A CPU that has the instructions it is told, by torch's answers."""
    def has(amx=False, avx512=False, **more):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: more, raising=False)
    return has


def test_precision_is_what_the_cpu_has(cpu, monkeypatch, capsys):
    for known, bf16 in ((dict(amx=True), True), (dict(avx512=True), True), (dict(bf16=True, neon=True), True),
                        (dict(bf16=False, neon=True), False), (dict(avx2=True), False)):
        cpu(**known)
        assert common.use_bf16("auto", Dist()) is bf16, known
        assert capsys.readouterr().out == (
            "precision: bf16 (this CPU has bf16 instructions)\n" if bf16 else
            "precision: fp32 (this CPU has no bf16 instructions)\n")
    cpu(bf16=True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # Arm on macOS
    assert not common.use_bf16("auto", Dist())
    cpu()
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # a torch that cannot be asked about Arm
    assert not common.use_bf16("auto", Dist())


def test_precision_as_asked_says_what_it_costs(cpu, capsys):
    for known, asked, line in (
            (dict(), "bf16", "bf16 (as asked, and emulated: this CPU has no bf16 instructions; fp32 is "
                             "several times faster, 7 to 11 times with AVX2)"),
            (dict(), "fp32", "fp32 (as asked)"), (dict(amx=True), "bf16", "bf16 (as asked)"),
            (dict(amx=True), "fp32", "fp32 (as asked)")):
        cpu(**known)
        assert common.use_bf16(asked, Dist()) is (asked == "bf16")
        assert capsys.readouterr().out == f"precision: {line}\n"


def test_a_gpu_is_asked_without_its_emulation(cpu, monkeypatch):
    cpu(amx=True)
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or
                            including_emulation)
        assert dispatch.has_bf16("cuda:0") is native


def test_resuming_names_another_precision(capsys):
    run = {"config": {"precision": "auto", "lr": 1.0}, "precision": "bf16"}
    before_the_flag = {"config": {"bf16": True, "lr": 1.0}}
    for manifest in (run, before_the_flag):
        for asked in ("auto", "bf16", "fp32"):  # what it comes to counts, not how it was said
            checkpoint.warn_changed("out", manifest, {"precision": asked, "lr": 1.0}, True)
            assert capsys.readouterr().out == ""
            checkpoint.warn_changed("out", manifest, {"precision": asked, "lr": 1.0}, False)
            told = capsys.readouterr().out
            assert told == "warning: out: began with --precision bf16, goes on with fp32\n"


def test_the_precision_stands_in_the_manifest(tmp_path):
    checkpoint.save(tmp_path, 1, {"model": {"w": torch.zeros(3)}}, {"precision": "fp32"})
    assert checkpoint.load(tmp_path)[1]["precision"] == "fp32"


@pytest.mark.parametrize("script", ["train_omni", "train_pefl", "train_reward", "sample", "evaluate"])
def test_every_script_takes_a_precision(script):
    needed = {"train_omni": [], "train_pefl": ["--base", "x"], "train_reward": ["--pairs", "x"],
              "sample": ["t2i", "--ckpt", "x"], "evaluate": ["scenes"]}[script]
    config = importlib.import_module(script).Config
    assert tyro.cli(config, args=needed).precision == "auto"
    for value in ("auto", "bf16", "fp32"):
        assert tyro.cli(config, args=[*needed, "--precision", value]).precision == value
    with pytest.raises(SystemExit):
        tyro.cli(config, args=[*needed, "--precision", "fp16"])


def test_bad_device_is_one_line():
    with pytest.raises(SystemExit, match="error: --device: tpu9: use auto"):
        common.setup("tpu9")
    with pytest.raises(SystemExit, match="torch sees"):
        common.setup("cuda:99")


# pictures and the rest


def test_contact_sheet(tmp_path):
    picture, mask = torch.full((3, 32, 32), -1.0), torch.ones(1, 32, 32)
    picture[0, :16] = 1
    rows = [[picture, mask, None], [Image.new("L", (20, 32), 128)]]
    titles = ["source", "mask", "a title that is too long for it"]
    sheet = log.contact_sheet(rows, titles, ["caption " * 9, "\udcff\n\x1b"])
    sheet.save(tmp_path / "sheet.png")
    pixels = {colour for _, colour in sheet.getcolors(10**6)}
    assert {(255, 0, 0), (0, 0, 0), (255, 255, 255), (128, 128, 128)} <= pixels
    assert 3 * 128 < sheet.width < 700 and 2 * 128 < sheet.height < 400
    assert log.contact_sheet([[picture]], ["x"], scale=1).height < 100
    assert log.contact_sheet([], []).size
    smooth = log.contact_sheet([[picture]], [], smooth=True)
    assert len(smooth.getcolors(10**6)) > len(log.contact_sheet([[picture]], []).getcolors(10**6))
    nan = log.to_pil(torch.full((3, 4, 4), math.nan))
    assert nan.size == (4, 4) and nan.mode == "RGB"


def test_perf_and_memory(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])  # 20 ms for a batch, 5 ms for the rest
    perf = Perf(what="--data photos")
    for said in ("memory, measured", "warning", ""):  # each once; no warning for the first rows
        with perf.wait():
            now[0] += 0.02
        now[0] += 0.005
        perf.add(10)
        row = perf.read()
        assert row["perf/data_wait"] == pytest.approx(0.8) and row["perf/img_s"] == pytest.approx(400)
        assert "perf/gpu_busy" not in row and "perf/mfu" not in row  # of a GPU
        assert capsys.readouterr().out.partition(":")[0] == said
    assert perf.read()["perf/img_s"] == 0
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("a card nobody knows") == 0
    assert log.peak_bytes() > 10**7 and "GiB" in log.peak_memory()
    assert common.n_params(torch.nn.Linear(3, 2)) == 8
