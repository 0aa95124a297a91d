"""runs/gpu.py: parts that end, fail, run over their time; and all of it rehearsed on a CPU."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import checkpoint
import common

ROOT = Path(common.__file__).parent
sys.path.insert(0, str(ROOT / "runs"))
import gpu  # noqa: E402

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")

# says when it is ready; at SIGTERM it saves
SAVES = """
import signal, sys, time
def save(*_):
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(900)
"""
# does not hear SIGTERM, nor does the process that it starts, whose number it says
HANGS = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(900)"])
print(child.pid, flush=True)
time.sleep(900)
"""


@pytest.fixture
def log(tmp_path):
    for name in ("out", "scratch"):
        (tmp_path / name).mkdir()
    return gpu.Log(tmp_path / "out", tmp_path / "scratch", time.monotonic() + 600, dict(os.environ))


def script(log, text):
    path = log.scratch / f"{len(list(log.scratch.iterdir()))}.py"
    path.write_text(text)
    return str(path)


def stored(log):
    return json.loads((log.out / "gpu.json").read_text())["parts"]


def when_it_speaks(log, text):
    """Started, and its first line is out."""
    started = gpu.start(log, script(log, text))
    while not started[1].read_text().endswith("\n"):
        time.sleep(0.02)
    return started


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # it may go between a look whether it is there and the reading
        return False


def test_what_fails_is_named_and_passed_over(log, capsys):
    assert not gpu.part(log, "first", 300, script(log, "raise SystemExit('error: no such GPU')"))
    assert stored(log)["first"]["code"] == 1 and stored(log)["first"]["said"] == ["error: no such GPU"]
    assert gpu.part(log, "second", 300, script(log, "print(7)"), gpu.read(log.scratch / "absent.json"))
    row = stored(log)["second"]
    assert row["code"] == 0 and row["said"] == ["7"] and "FileNotFoundError" in row["numbers"]
    assert "first: FAILED, code 1" in capsys.readouterr().out and len(stored(log)) == 2


def test_a_training_that_is_stopped_has_saved(log, capsys):
    assert gpu.finish(log, "train", when_it_speaks(log, SAVES), 0.0)
    row = stored(log)["train"]
    assert row["late"] and row["code"] == 0 and row["said"] == ["ready", "saved"]
    assert "train: stopped, its time is over" in capsys.readouterr().out


@linux
def test_what_hangs_is_killed_with_all_that_it_started(log):
    started = when_it_speaks(log, HANGS)
    child = int(started[1].read_text())
    assert alive(child)
    assert not gpu.finish(log, "hangs", started, 0.0, grace=0.3)
    assert stored(log)["hangs"]["code"] == -9 and stored(log)["hangs"]["seconds"] < 300
    end = time.monotonic() + 300
    while alive(child) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive(child)


@linux
def test_a_signal_ends_what_runs(log):
    started = when_it_speaks(log, HANGS)
    child = int(started[1].read_text())
    with pytest.raises(SystemExit, match="error: SIGTERM: .*gpu.json has what was found"):
        gpu.stop(log, "SIGTERM")
    assert started[0].wait(60) == -9 and not gpu.part(log, "next", 30, script(log, "print(7)"))
    end = time.monotonic() + 300
    while alive(child) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive(child)


def test_nothing_begins_when_the_time_is_over(log):
    log.end = time.monotonic() + 1
    assert not gpu.part(log, "late", 30, script(log, "print(7)"))
    content = json.loads((log.out / "gpu.json").read_text())
    assert content == {"parts": {}, "left_out": ["late: no time is left"]}


@pytest.mark.parametrize("flags, words", [
    ({"skip": "tests,speed"}, "error: --skip: speed: use some of"),
    ({"ptxas": "absent.xz"}, "error: --ptxas: absent.xz: no such file")])
def test_flags_that_cannot_work(flags, words, tmp_path):
    with pytest.raises(SystemExit, match=words):
        gpu.main(gpu.Config(out=str(tmp_path / "out"), **flags))
    assert not (tmp_path / "out").exists()


def test_goals_are_compared_with_what_was_measured():
    def row(who, forward, both):
        return {"op": "attention", "shape": "sd3-1024", "who": who, "forward": {"TFLOP/s": forward},
                "both": {"TFLOP/s": both}}

    absent = {"op": "attention", "shape": "sd3-1024", "who": "flash", "note": "no viable backend"}
    found = gpu.goals({
        "kernels": {"numbers": {"rows": [row("ours", 400.0, 330.0), row("cudnn", 420.0, 300.0), absent]}},
        "sd3": {"numbers": {"rows": [{"part": "sample", "size": 1024, "ms": [1900, 2000, 2100], "mfu": 0.3},
                                     {"part": "edit", "size": 1024, "note": "no memory"}]}},
        "compiled": {"numbers": {"rows": [{"part": "sample", "size": 1024, "ms": [990, 1000, 1010]}]}},
        "t2i": {"numbers": "none: FileNotFoundError"}})
    assert [(g["found"], g["goal"]) for g in found] == [(400.0, 380), (1.1, 1.0), (1.0, 1 / 1.4)]


@pytest.mark.slow
def test_the_rehearsal(tmp_path):
    content = gpu.main(gpu.Config(out=str(tmp_path), minutes=60, rehearse=True))
    assert json.loads((tmp_path / "gpu.json").read_text()) == content
    assert {name: row["said"] for name, row in content["parts"].items() if row["code"]} == {}
    assert not content["left_out"]
    parts = content["parts"]
    assert {"selftest", "tests", "sd3", "kernels", "t2i", "prefs", "aesthetic", "alignment", "inpaint",
            "pefl", "edit", "judge", "judge_edits"} <= set(parts)
    rows = parts["sd3"]["numbers"]["rows"]
    assert {row["part"] for row in rows} >= {"edit", "pefl", "sample"}
    assert all(row["ms"][1] > 0 and row["mfu"] > 0 for row in rows)
    assert parts["kernels"]["numbers"]["rows"] and parts["edit"]["numbers"]["step"] == 2
    files = {str(f.relative_to(tmp_path)): f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()}
    folders = ("base", "editnet", "pefl")
    assert files.keys() == {"gpu.json", "judge.png"} | {
        f"{folder}/{name}" for folder in folders for name in ("manifest.json", "model.safetensors")}
    assert max(files.values()) < 16 * 2**20
    for folder in folders:
        assert checkpoint.load(tmp_path / folder)[1]["step"] == 2
        manifest = (tmp_path / folder / "manifest.json").read_text()
        assert str(tmp_path) not in manifest and "gpu_" not in manifest  # folders of this machine
    assert Image.open(tmp_path / "judge.png").width > 100
