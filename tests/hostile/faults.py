"""Faults injected into training runs, each a process of its own: cases(folder, n) -> (group, name, act).

A victim is train_omni.py at the smallest size, forked from here (a fork costs a second where a start costs
ten) with one function of the code replaced by one that kills, hangs, or fails at its n-th call. What must
hold: the process ends by itself, in one line where it can still speak; the same command then goes on; and the
weights at the end are, bit for bit, those of a run that nothing befell.
"""

import contextlib
import itertools
import os
import resource
import signal
import socket
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch
import torch.distributed as td

import checkpoint
import common
import train_omni

STEPS = 6
TINY = dict(preset="test", image_size=16, batch_size=2, steps=STEPS, save_every=2, sample_every=0,
            log_every=100, workers=0, device="cpu", wandb="off", precision="fp32", warmup=0)


def forked(act, said, seconds=60):
    """act() in a child -> its exit code, a negative signal if that ended it; what it says is in the file
    `said`. AssertionError if it is not over in so many seconds."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 70
        try:
            fd = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(fd, 1), os.dup2(fd, 2)
            sys.stdout = sys.stderr = os.fdopen(fd, "w", buffering=1)
            signal.alarm(0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            torch.set_num_threads(1)
            try:
                act()
                code = 0
            except SystemExit as e:
                print(e)
                code = 1 if e.code else 0
            except RuntimeError as e:  # as common.command
                print(common.ended(e) or traceback.format_exc())
                code = 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid, time.monotonic() + seconds


def ended(child):
    pid, until = child
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("did not end by itself")


def train(out, prepare=None, **flags):
    if prepare:
        prepare()
    train_omni.main(train_omni.Config(**TINY | {"out": str(out)} | flags))


def run(out, prepare=None, **flags):
    """One run -> (exit code, what it said)."""
    said = Path(f"{out}.txt")
    code = ended(forked(partial(train, out, prepare, **flags), said))
    return code, said.read_text()


def weights(out):
    tensors, manifest = checkpoint.load(Path(out))
    assert manifest["step"] == STEPS
    return tensors


def same(a, b):
    assert a.keys() == b.keys()
    for file in a:
        assert all(torch.equal(a[file][k], b[file][k]) for k in a[file]), f"{file} is another one"


def at_call(owner, name, n, act):
    """Replace owner.name so that its n-th call (from 1) is preceded by act()."""
    real, calls = getattr(owner, name), itertools.count(1)

    def instead(*args, **kwargs):
        if next(calls) == n:
            act()
        return real(*args, **kwargs)

    setattr(owner, name, instead)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


POINTS = {  # where a run is killed: owner, function, how often it is called in a whole run of TINY
    "between the files of a checkpoint": (checkpoint, "_signed", 9),
    "before the manifest": (checkpoint, "finish", 3),
    "in the sync of a file": (checkpoint, "fsync", 18),
    "in the rename": (Path, "rename", 3),
    "in pruning": (checkpoint, "prune", 3),
    "in a step": (common.Verdict, "give", 6),
    "in the average": (common.EMA, "update", 6)}


def killed(folder, reference, point, n):
    owner, name, _ = POINTS[point]
    out = folder / f"killed_{name}_{n}"
    code, said = run(out, partial(at_call, owner, name, n, die))
    assert code == -signal.SIGKILL, f"{code}: {said}"
    code, said = run(out)
    assert code == 0, said
    same(weights(out), reference())
    assert not list(out.glob("*.tmp"))


def ranks(out, prepare=(None, None), seconds=60, patience=60, flags=({}, {})):
    """Two ranks -> their exit codes and what they said. patience: seconds of the process group."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for r in (0, 1):
        def one(r=r):
            import datetime

            os.environ.update(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=str(port))
            real = td.init_process_group
            td.init_process_group = lambda *a, **k: real(*a, **k | {"timeout":
                                                                   datetime.timedelta(seconds=patience)})
            train(out, prepare[r], **flags[r])
        children.append(forked(one, f"{out}.{r}.txt", seconds))
    codes = [ended(c) for c in children]
    return codes, [Path(f"{out}.{r}.txt").read_text() for r in (0, 1)]


def one_line(said):
    assert "Traceback" not in said, said
    assert any(line.startswith("error: ") for line in said.splitlines()), said


def rank_dies(folder, n):
    """One of two dies in a collective: the other ends, in a line, and the same command goes on."""
    out = folder / f"rank_dies_{n}"
    codes, said = ranks(out, (None, partial(at_call, td, "all_reduce", n, die)))
    assert codes[1] == -signal.SIGKILL and codes[0] == 1, (codes, said)
    one_line(said[0])
    codes, said = ranks(out)
    assert codes == [0, 0], said
    assert checkpoint.load(out)[1]["step"] == STEPS


def rank_hangs(folder):
    """The other waits no longer than the group's timeout (here 5 s), and says so in a line."""
    codes, said = ranks(folder / "rank_hangs", (None, partial(at_call, td, "all_reduce", 9, partial(
        time.sleep, 12))), patience=5)
    assert codes[0] == 1, (codes, said)
    one_line(said[0])


def slow_is_healthy(folder):
    """A rank that is late for every step, less than the timeout, is no fault: nothing is said."""
    def late():
        real = common.Verdict.give

        def give(*args):
            time.sleep(1)
            return real(*args)
        common.Verdict.give = give

    codes, said = ranks(folder / "slow", (None, late), patience=8)
    assert codes == [0, 0] and "error" not in said[0] and "warning" not in said[0].replace(
        "warning: --data", ""), (codes, said)


def rank_differs(folder, name, flag):
    """Ranks of different commands: both end, in a line that names rank and field."""
    codes, said = ranks(folder / f"differs_{name}", flags=({}, flag))
    assert codes == [1, 1], (codes, said)
    for text in said:
        one_line(text)
        assert "rank 1" in text and name in text, text


def other_code(folder):
    def touched():
        common.code_hash = lambda: "another"

    codes, said = ranks(folder / "other_code", (None, touched))
    assert codes == [1, 1] and "code" in said[0] and "rank 1" in said[0], (codes, said)


def disk_fills(folder, reference):
    """Files can no longer grow from the second checkpoint on: training goes on to the end, the exit code says
    that the last one is missing, and with room the same command goes on."""
    def full():
        at_call(checkpoint, "begin", 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, -1)))

    out = folder / "disk"
    code, said = run(out, full)
    assert code == 1 and "training goes on" in said and "not saved" in said, said
    one_line(said)
    code, said = run(out)
    assert code == 0, said
    same(weights(out), reference())


def diverges(folder):
    """Every step from the third on is not finite: what was good stays, and is all that stays."""
    def prepare():
        real, calls = common.Verdict.give, itertools.count()

        def give(self, step, *numbers):
            return real(self, step, *numbers, torch.tensor(float("nan") if next(calls) >= 2 else 0.0))
        common.Verdict.give = give

    out = folder / "diverges"
    code, said = run(out, prepare, steps=40, save_every=2)
    assert code == 1, said
    one_line(said)
    assert [p.name for p in out.glob("step_*")] == ["step_00000002"], list(out.iterdir())


def out_goes(folder, reference):
    """--out is deleted in mid-run: it is made anew."""
    import shutil

    out = folder / "goes"
    code, said = run(out, partial(at_call, common.EMA, "update", 4, partial(shutil.rmtree, out)))
    assert code == 0 and (out / "metrics.jsonl").exists(), said
    same(weights(out), reference())


def two_runs(folder):
    """A second run in one --out is refused while the first lives, and not when it has been killed."""
    out = folder / "two"
    first = forked(partial(train, out, partial(at_call, common.EMA, "update", 2, partial(time.sleep, 30))),
                   f"{out}.first.txt")
    while not (out / "run.lock").exists() or not (out / "run.lock").read_text():
        time.sleep(0.05)
    code, said = run(out)
    assert code == 1 and "another run writes there" in said, said
    one_line(said)
    os.kill(first[0], signal.SIGKILL)
    ended(first)
    code, said = run(out)
    assert code == 0, said


def undisturbed(folder):
    """The weights of a run that nothing befalls, in this process."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)}
    if not (folder / "reference").exists():
        with open(folder / "reference.txt", "w") as said, contextlib.redirect_stdout(said), \
                contextlib.redirect_stderr(said):
            train(folder / "reference")
    for s, handler in handlers.items():
        signal.signal(s, handler)
    return weights(folder / "reference")


def cases(folder, n):
    """The first n of: those that come once, then kills at every point, each at its first call, second, ..."""
    kept = {}

    def reference():
        return kept or kept.update(undisturbed(folder)) or kept

    undisturbed(folder)  # here: what it imports need not be imported again in every fork
    once = [("diverges", partial(diverges, folder)), ("two runs in one --out", partial(two_runs, folder)),
            ("--out is deleted", partial(out_goes, folder, reference)),
            ("the disk fills", partial(disk_fills, folder, reference)),
            ("a rank dies in a collective", partial(rank_dies, folder, 9)),
            ("a rank hangs", partial(rank_hangs, folder)), ("a slow rank", partial(slow_is_healthy, folder)),
            ("another --lr", partial(rank_differs, folder, "lr", {"lr": 0.1})),
            ("another --seed", partial(rank_differs, folder, "seed", {"seed": 4})),
            ("another --batch_size", partial(rank_differs, folder, "batch_size", {"batch_size": 3})),
            ("another code", partial(other_code, folder))]
    kills = [(f"killed {point}, call {k}", partial(killed, folder, reference, point, k))
             for k in range(1, 20) for point, (*_, most) in POINTS.items() if k <= most]
    kills += [(f"a rank dies in collective {k}", partial(rank_dies, folder, k)) for k in range(1, 30)]
    for name, act in (once + kills)[:n]:
        yield "faults", name, act
