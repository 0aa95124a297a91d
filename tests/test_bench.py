"""kernels/bench.py: every operation, implementation and mode at tiny sizes, what it refuses to time; the
comparison of whole networks in bench_models.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inprocess import NATIVE

from kernels import bench
from model import PRESETS
from runs import bench_models

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SLOW = pytest.mark.slow
NOT_HERE = {"cudnn", "efficient"}  # on a CPU


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(path, *flags) -> dict[tuple, dict]:
    """The rows of the JSON file by operation, shape and implementation."""
    bench.main(["--ms", "1", "--threads", "1", "--device", "cpu", "--json", str(path / "bench.json"), *flags])
    return {(r["op"], r["shape"], r["who"]): r for r in json.loads((path / "bench.json").read_text())["rows"]}


def complete(row: dict, unit: str) -> None:
    for mode in bench.MODES:
        low, middle, high = row[mode]["ms"]
        assert 0 < low <= middle <= high and row[mode][unit] > 0 and row[mode]["of_limit"] > 0
    assert "note" not in row


@pytest.mark.parametrize("dtype", ["fp32", *(pytest.param(d, marks=SLOW) for d in ("bf16", "fp16"))])
def test_all_operations(dtype, tmp_path, threads, capsys):
    rows = run(tmp_path, "--shapes", "test", "--only", "eager,ours,flash,cudnn,efficient", "--dtype", dtype)
    who = {op: {w for o, _, w in rows if o == op} for op in bench.OPS}
    assert who == {"attention": {"eager", "ours", "flash"} | NOT_HERE, "masked_step": {"eager", "ours"},
                   "rms_norm": {"eager", "ours"}, "gate+modulate": {"eager"}}
    for (op, _, w), row in rows.items():
        if w in NOT_HERE:
            assert "No viable backend" in row["note"] and not set(bench.MODES) & set(row)
        else:
            complete(row, "TFLOP/s" if op == "attention" else "GB/s")
    out = capsys.readouterr().out
    assert "limits, measured: copy" in out and out.count(" both ") == len(rows) - 2
    about = json.loads((tmp_path / "bench.json").read_text())
    assert about["dtype"] == str(bench.DTYPES[dtype])[6:] and min(about["limits"].values()) > 0
    assert {"torch", "cpu", "date", "commit"} <= set(about["machine"])


@pytest.mark.slow
def test_compiled_and_flex(tmp_path, threads):
    rows = run(tmp_path, "--shapes", "test", "--only", "compile,flex")
    assert len(rows) == len(bench.OPS) + 1
    flex = rows.pop(("attention", "test", "flex"))
    assert flex["forward"]["TFLOP/s"] > 0 and "backward on CPU" in flex["note"] and "both" not in flex
    for (op, _, _), row in rows.items():
        complete(row, "TFLOP/s" if op == "attention" else "GB/s")


@pytest.mark.parametrize("name", [name for name in bench.ATTENTION if "tiny" in name] + ["test"])
def test_rates_count_what_the_formulas_need(name):
    """FLOP of the products q k^T and p v, counted by torch on the plain version."""
    from torch.utils.flop_counter import FlopCounterMode

    problem = bench.attention_problem(bench.ATTENTION[name], torch.float32, CPU)
    with FlopCounterMode(display=False) as counter:
        problem.calls["eager"]()
    assert problem.work == (counter.get_total_flops(), 2.5 * counter.get_total_flops())


def test_bytes_of_a_step():
    """Three bf16 predictions, four fp32 latents, a mask, the result; backward the mask and five tensors."""
    problem = bench.step_problem(bench.STEP["test"], torch.bfloat16, CPU)
    n, pixels = 2 * 3 * 5 * 7, 2 * 5 * 7
    assert problem.work == (n * (3 * 2 + 4 * 4 + 4) + 4 * pixels, n * (2 * 4 + 3 * 2) + 4 * pixels)


@pytest.mark.parametrize("change, note", [
    (lambda out: [z + 0.01 for z in out], "disagrees with eager"),
    (lambda out: [z * torch.nan for z in out], "disagrees with eager"),
    (lambda out: [1.01 * z - (0.01 * z).detach() for z in out], "its gradients disagree")])
def test_who_is_wrong_is_not_timed(change, note):
    problem = bench.step_problem(bench.STEP["test"], torch.float32, CPU)
    right = problem.calls["ours"]
    towards, expected = bench.reference(problem)
    problem.calls["ours"] = lambda: change(right())
    row = bench.measure(problem, "ours", towards, expected, CPU, 1, {"GB/s": 1.0})
    assert note in row["note"] and set(row) == {"note"}
    problem.calls["ours"] = right
    complete(bench.measure(problem, "ours", towards, expected, CPU, 1, {"GB/s": 1.0}), "GB/s")


def test_errors_are_notes():
    """One implementation that needs too much does not end the others' run; nor does eager itself."""
    problem = bench.step_problem(bench.STEP["test"], torch.float32, CPU)

    def too_much():
        raise torch.OutOfMemoryError("no memory\nfor this")

    problem.calls["eager"] = too_much
    towards, expected = bench.reference(problem)
    assert expected is None
    row = bench.measure(problem, "ours", towards, expected, CPU, 1, {"GB/s": 1.0})
    assert "not compared" in row.pop("note")
    complete(row, "GB/s")
    assert bench.measure(problem, "eager", towards, expected, CPU, 1, {"GB/s": 1.0}) \
        == {"note": "OutOfMemoryError: no memory"}


def test_a_run_that_is_cut_off_keeps_its_rows(tmp_path, threads, monkeypatch):
    own, calls = bench.measure, []

    def cut_off(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return own(*args)

    monkeypatch.setattr(bench, "measure", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--shapes", "test", "--only", "eager,ours")
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [(r["op"], r["who"]) for r in rows] == [("attention", "eager"), ("attention", "ours")]


@pytest.mark.parametrize("flag, value", [("--ops", "softmax"), ("--shapes", "tiny,huge"), ("--only", "mine")])
def test_unknown_names(flag, value, tmp_path, threads):
    word = value.split(",")[-1]
    with pytest.raises(SystemExit, match=f"error: {flag}: '{word}': use all, or some of"):
        run(tmp_path, flag, value)


@pytest.mark.slow
def test_as_a_command(tmp_path):
    """From any folder, without flags for the shape: a CPU takes the tiny ones."""
    command = [sys.executable, ROOT / "kernels/bench.py", "--only", "ours", "--ms", "1", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out/bench.json").read_text())["rows"]
    assert {r["shape"] for r in rows} == {"tiny"} and len(rows) == 3


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--adamw"], ["--editnet"], ["--frozen"],
                                   ["--forward", "--precision", NATIVE, "--compile"]], ids=" ".join)
def test_whole_networks(flags, tmp_path, threads, monkeypatch):
    pytest.importorskip("diffusers")
    from dataclasses import replace


    net = replace(PRESETS["test"], pos_max=16, depth=1 if "--compile" in flags else 2)
    small = bench_models.Case(net, batch=2, latent=16, txt_len=5, goal=1e9)
    monkeypatch.setattr(bench_models, "CASES", {"tiny": small})
    monkeypatch.setattr(sys, "argv", ["bench_models.py", "--case", "tiny", "--pairs", "2", "--warmup", "1",
                                      "--threads", "1", "--json", str(tmp_path / "b.json"), *flags])
    bench_models.main()
    content = json.loads((tmp_path / "b.json").read_text())
    assert {"torch", "diffusers"} <= set(content["machine"])
    if "--frozen" in flags:
        assert {"vae encode", "vae decode, gradient", "clip_l", "clip_g", "t5"} <= set(content["cases"])
        assert all(r["ratio"][1] > 0 for r in content["cases"].values())
        return
    rows = content["cases"]["tiny"]
    if "--editnet" in flags:
        assert {"base", "editnet", "cached", "diffusers ControlNet"} <= set(rows)
    else:
        assert rows["ratio"][1] > 0 and rows["pairs"] == 2
