"""Hostile inputs and faults: the campaign of tests/hostile, its fast part whole, of its kills a few (slow).
And what a run does to its machine: workers, streams, locks."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Literal

import pytest
import torch

import checkpoint
import common
import data
import log
from readers.pictures import open_source
from tests.held import held
from tests.hostile import faults, inputs, kills
from tests.hostile.__main__ import campaign

ROOT = Path(__file__).parents[1]
GROUPS = {"flags": 500, "commands": 10, "texts": 20, "environment": 30, "manifests": 400, "resumes": 10,
          "weights": 100, "pickles": 30, "parquets": 20}


@pytest.mark.parametrize("group", GROUPS)
def test_inputs(group, tmp_path, monkeypatch, capsys):
    """None is wrong: each is refused in one line, or does no harm."""
    monkeypatch.chdir(tmp_path)
    told = campaign((group, name, act) for name, act in getattr(inputs, group)(tmp_path))[group]
    assert not told["wrong"], capsys.readouterr().out
    assert told.total() >= GROUPS[group] and told["survived"] >= 1


def test_the_campaign_sees_what_is_wrong(capsys):
    def ends(e):
        raise e

    acts = [lambda: None, lambda: ends(SystemExit("error: a: b")), lambda: ends(SystemExit("error: a\nb")),
            lambda: ends(SystemExit(0)), lambda: ends(ValueError("x")), lambda: ends(MemoryError()),
            lambda: ends(inputs.Accepted()), lambda: time.sleep(5)]
    told = campaign((("it", str(i), act) for i, act in enumerate(acts)), 1)["it"]
    assert told == Counter(survived=1, refused=1, wrong=6)
    assert capsys.readouterr().out.count("WRONG") == 6


FEW = ("diverges", "two runs in one --out", "the disk of train_reward fills", "a slow rank", "another --lr")
FRESH = """
import sys
from pathlib import Path
from tests.hostile import faults, kills
from tests.hostile.__main__ import judge
folder, words = Path(sys.argv[1]), sys.argv[2:]
def survives(act, limit, name):
    told = judge(act, limit)
    assert told == "survived", f"{name}: {told}"
"""


def forks(code, folder, *words):
    """Code that forks its victims, in a process of its own: a fork of one in which other tests have left a
    pool of threads may wait for these for ever."""
    done = subprocess.run([sys.executable, "-c", FRESH + code, folder, *words], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    """A folder for their undisturbed runs, which every one of its faults is compared with."""
    return tmp_path_factory.mktemp("victims")


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_faults(name, victims):
    forks("""
found = {n: act for _, n, act in faults.cases(folder, 30)}
survives(found[words[0]], faults.LIMIT, words[0])
""", victims, name)


@pytest.mark.slow
@pytest.mark.parametrize("victim", faults.VICTIMS)
def test_kills(victim, victims):
    """The second: of two ranks the other one is killed, in a collective."""
    forks("""
_, (_, name, act) = faults.kills(folder, words[0], 2)
survives(act, faults.LIMIT, name)
""", victims, victim)


@pytest.mark.slow
def test_another_seed_is_another_result(victims):
    forks("""
codes, _ = faults.run("train_omni", folder / "seed", flags={0: {"seed": 1}})
assert codes == [0]
try:
    faults.same(folder / "seed", faults.undisturbed(folder, "train_omni")[0])
except AssertionError as e:
    assert "is another one" in str(e)
else:
    raise AssertionError("another seed gave the same")
""", victims)


@pytest.mark.slow
def test_the_factory_killed_and_resumed_by_another_world(tmp_path):
    """Two of the twenty: one rank, then two; and one of two, beside the other of which one then works."""
    forks("""
found = [act for _, _, act in kills.cases(folder, 8)]
for seed in (4, 7):
    survives(found[seed], 600, seed)
""", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torchrun_killed_and_one_process_beside_its_ranks(tmp_path):
    """SIGKILL to torchrun leaves its ranks, which are sessions of their own, at work in the folder."""
    def command(out):
        flags = dict(out=tmp_path / out, n=24, tries=2, steps=2, shard=2, precision="fp32", ckpt=base)
        return ["make_edits.py", "specialist", *(f"--{k}={v}" for k, v in flags.items())]

    def alone(out):
        subprocess.run([sys.executable, *command(out)], cwd=ROOT, check=True, capture_output=True)

    base = kills.base(tmp_path / "base")
    argv = held("factory.shards", "write", 2, tmp_path / "gate", command("out"))  # of 6, in each rank
    with open(tmp_path / "said", "w") as said:
        run = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                                "--nproc_per_node=2", "--", *argv], cwd=ROOT, stdout=said,
                               stderr=subprocess.STDOUT, start_new_session=True)
    while not list((tmp_path / "out").glob("0*.json")):
        assert run.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.02)
    ranks = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert len(ranks) == 2 and all(map(alive, ranks)) and not (tmp_path / "out/manifest.json").exists()
    (tmp_path / "gate").touch()
    alone("out")
    until = time.monotonic() + 300
    while any(map(alive, ranks)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, ranks))
    alone("whole")
    assert kills.contents(tmp_path / "out") == kills.contents(tmp_path / "whole")


def batches(n, workers, kill=()):
    loader, out = data.make_loader(open_source("scenes"), 16, 2, "t2i=1", workers=workers), []
    for i in range(n):
        out.append(next(loader))
        if i in kill:
            os.kill(loader._batches._workers[0].pid, signal.SIGKILL)
    return loader, out


def test_killed_workers_are_replaced_and_no_batch_is_lost(capfd):
    (a, whole), (b, cut) = batches(12, 1), batches(12, 1, (1, 6))
    for x, y in zip(whole, cut, strict=True):
        assert torch.equal(x["image"], y["image"]) and torch.equal(x["index"], y["index"])
    assert capfd.readouterr().err.count("a data worker died (signal 9)") == 2
    workers = [w for loader in (a, b) for w in loader._batches._workers]
    a.close(), b.close(), b.close()
    assert all(w.exitcode is not None for w in workers)


@pytest.mark.slow
def test_the_third_dead_worker_ends_the_run():
    with pytest.raises(SystemExit, match="for the third time"):
        batches(20, 1, (1, 6, 11))


@pytest.mark.parametrize("problem", [OSError(30, "Read-only file system"), RuntimeError(
    "unable to write to file </torch_1_2_3>: No space left on device (28)")])
def test_without_shared_memory_the_trainer_loads_alone(monkeypatch, capsys, problem):
    def fails(*args):
        raise problem

    whole = batches(3, 0)[1]
    monkeypatch.setattr(torch.multiprocessing.get_context(), "Semaphore", fails)
    found = batches(3, 1)[1]
    assert all(torch.equal(x["image"], y["image"]) for x, y in zip(whole, found, strict=True))
    assert "cannot share memory" in capsys.readouterr().err


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they look for their parent every 5 s")
def test_workers_end_with_the_trainer(tmp_path):
    """One that is killed, and one whose stdout goes away at once: it goes on, and all of it ends."""
    command = [sys.executable, "train_omni.py", "--preset", "test", "--image_size", "16", "--batch_size", "2",
               "--sample_every", "0", "--device", "cpu", "--wandb", "off", "--workers", "2", "--log_every",
               "1"]
    run = subprocess.Popen([*command, "--out", str(tmp_path / "a")], cwd=ROOT, stdout=subprocess.PIPE,
                           stderr=subprocess.DEVNULL)
    while not next(iter(run.stdout.readline, b"")).startswith(b"step"):
        pass
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    assert len(children) == 2
    for child in children:  # it cannot look for its parent, as torch's workers do every 5 s
        os.kill(int(child), signal.SIGSTOP)
    run.kill()
    run.wait()
    run.stdout.close()
    until = time.monotonic() + 60
    while any(map(alive, children)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, children))
    run = subprocess.Popen([*command, "--steps", "3", "--out", str(tmp_path / "b")], cwd=ROOT,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.close()
    assert "going on without it" in run.communicate(timeout=600)[1]
    assert run.returncode == 0 and (tmp_path / "b/step_00000003/manifest.json").exists()


def test_a_stream_that_is_closed_or_full_ends_nothing(monkeypatch, capsys):
    """/dev/full and a closed file: a line on stderr, once each."""
    closed = open(os.devnull, "w")
    closed.close()
    full = open("/dev/full", "wb", buffering=0)
    for stream in (io.TextIOWrapper(full, write_through=True), closed):
        with monkeypatch.context() as m:
            m.setattr(sys, "stdout", common._Lossy(stream))
            print("one\n")
            common.print0("two")
    assert capsys.readouterr().err.count("going on without it") == 2
    common._Lossy(None).write("no stream at all")
    full.close()


def test_a_lock_is_not_left_behind(tmp_path):
    """By a process that is gone; and one process may claim its folder twice."""
    child = faults.forked(lambda: (checkpoint.claim(tmp_path), faults.die()), tmp_path / "said")
    assert faults.ended(child) == -signal.SIGKILL and (tmp_path / "run.lock").read_text()
    checkpoint.claim(tmp_path)
    checkpoint.claim(tmp_path)
    child = faults.forked(lambda: (checkpoint._locks.clear(), checkpoint.claim(tmp_path)), tmp_path / "said")
    assert faults.ended(child) == 1
    assert f"another run writes there (process {os.getpid()} on" in (tmp_path / "said").read_text()


def test_a_disk_that_cannot_lock_says_so(tmp_path, monkeypatch, capsys):
    def cannot(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(checkpoint.fcntl, "lockf", cannot)
    checkpoint.claim(tmp_path)
    assert "cannot be locked there (No locks available)" in capsys.readouterr().out


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    net = torch.nn.Linear(2, 2)
    assert checkpoint.save(tmp_path, 1, {"model": net}, {})
    with torch.no_grad():
        net.bias[0] = float("nan")
    with pytest.raises(SystemExit, match="bias is not finite: not saved"):
        checkpoint.save(tmp_path, 2, {"model": net}, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_paths_without_names_of_users(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    found = log.portable({"data": f"jsonl:{tmp_path}/pairs/a.jsonl", "lr": 0.1,
                             "init": "/home/someone/sd3.safetensors", "sd3": "/data/sd3", "out": "out/x"})
    assert found == {"data": "jsonl:pairs/a.jsonl", "init": "~/sd3.safetensors", "lr": 0.1,
                     "sd3": "/data/sd3", "out": "out/x"}


def test_places_are_kept_without_names_of_users_and_found_again(monkeypatch, tmp_path):
    """Of meta.stack: below what holds the run, below the start folder, below the home, elsewhere; from a step
    of the run or from a shipped folder, wherever one stands, and after all of it has moved."""
    home, work = tmp_path / "home/someone", tmp_path / "home/someone/jobs"
    run = tmp_path / "disk/runs/a"
    for folder in (work / "w", work / "out/a", run, tmp_path / "disk/runs/w", home / "w", tmp_path / "w"):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    for out, given, kept in ((run, run, "."), (run, tmp_path / "disk/runs/w", "../w"),
                             ("out/a", "w", "../../w"), (run, "w", "~/jobs/w"), ("out/a", home / "w", "~/w"),
                             (run, tmp_path / "w", str(tmp_path / "w"))):
        for folder in (Path(out) / "step_00000001", Path(out)):
            stack = checkpoint.kept_places({"sd3": str(given), "tokenizers": None, "t5_length": 77}, folder)
            assert stack == {"sd3": kept, "tokenizers": None, "t5_length": 77}
            monkeypatch.chdir("/" if Path(out).is_absolute() else work)
            assert checkpoint.found_places(stack, folder)["sd3"] == os.path.abspath(work / given)
            monkeypatch.chdir(work)
    (tmp_path / "disk").rename(tmp_path / "moved")
    moved = str(tmp_path / "moved/runs/w")
    assert checkpoint.found_places({"sd3": "../w"}, tmp_path / "moved/runs/a")["sd3"] == moved
    old = {"sd3": "w"}  # manifests of old kept what the flag said
    assert checkpoint.found_places(old, tmp_path / "moved/runs/a")["sd3"] == str(work / "w")
    monkeypatch.setenv("HOME", "/")  # of containers: no prefix of everything
    monkeypatch.chdir("/")
    assert checkpoint.kept_places({"sd3": "/data/w"}, tmp_path / "moved/runs/a") == {"sd3": "/data/w"}


def test_wandb_out_of_reach_is_not_waited_for(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert "refused" in log._unreachable()
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:x")
    assert "ValueError" in log._unreachable()


def test_metrics_of_a_folder_that_was_deleted(tmp_path, capsys):
    metrics = log.Metrics(tmp_path / "out", common.Dist(), {}, "off")
    shutil.rmtree(tmp_path / "out")
    metrics.flush(1, {"a": 1.0})
    metrics.close()
    assert "was deleted; begun anew" in capsys.readouterr().out
    assert (tmp_path / "out/metrics.jsonl").read_text().count("\n") == 1


def test_help_is_no_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrained", "--help"])
    import runpy

    runpy.run_module("pretrained", run_name="__main__")
    assert "usage: python -m pretrained show" in capsys.readouterr().out


def test_what_torch_says_of_ranks_and_memory_is_one_line():
    for e in (torch.OutOfMemoryError("CUDA out of memory.\nTried"),
              RuntimeError("[enforce fail] can't allocate memory: you tried"),
              RuntimeError("[gloo/transport/tcp/pair.cc:5] Connection closed by peer"),
              RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed.")):
        assert common.ended(e).startswith("error: ") and "\n" not in common.ended(e)
    assert common.ended(RuntimeError("shape mismatch")) is None


@pytest.mark.parametrize("line, words", [
    ("chek scenes", "'chek': use check"),
    ("check scenes --limitt 3", "--limitt: there is no such flag: use --limit,"),
    ("check scenes --limit three", "three")])
def test_files_with_several_commands(monkeypatch, line, words):
    monkeypatch.setattr(sys, "argv", ["data.py", *line.split()])
    with pytest.raises(SystemExit) as e:
        common.commands({"check": data.check}, "data.py")
    assert str(e.value).startswith("error: ") and words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("line, said", [
    ("--start maskd", "--start: maskd: use one of masked, noise: see --help"),
    ("--lr fast", "--lr: fast: must be a number: see --help"),
    ("--steps 1e4", "--steps: 1e4: must be a whole number, such as 10000: see --help"),
    ("--steps", "--steps: has no value: give one: see --help"),
    ("3", "command line: 3: belongs to no flag: leave it out: see --help")])
def test_a_wrong_value_is_told_with_its_flag(line, said):
    def go(start: Literal["masked", "noise"] = "masked", lr: float = 1.0, steps: int = 1):
        pass

    with pytest.raises(SystemExit) as e:
        common.parse(go, args=line.split())
    assert str(e.value) == f"error: {said}"


def test_a_command_runs_outside_of_what_parses_it(monkeypatch, capsys):
    """What it prints is seen, and a wrong value is the command's own line."""
    monkeypatch.setattr(sys, "argv", ["x", "go", "--n", "3"])

    def go(n: int = 1):
        print("n is", n, file=sys.stderr)

    common.commands({"go": go}, "x")
    assert capsys.readouterr().err == "n is 3\n"
