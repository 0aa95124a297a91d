"""Faults injected into training runs: cases(folder, n) and kills(folder, victim, n) -> (group, name, act).

A victim is a train script at its smallest size, forked from here (a fork costs a second where a start costs
ten) with one function of the code replaced by one that kills, hangs, or fails at its n-th call. What must
hold: the processes end by themselves, in one line where they can still speak; the same command then goes on;
and losses, weights, optimisers and averages at the end are, bit for bit, those of a run that nothing befell.
"""

import contextlib
import datetime
import faulthandler
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import einops._torch_specific  # noqa: F401  as two below: here, and not in every fork
import numpy as np
import torch
import torch._dynamo  # noqa: F401  which optimisers import: 1.3 s
import torch.distributed as td
from PIL import Image
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp
from torch.distributed.tensor import DTensor

import checkpoint
import common
import log
import rewards
import train_omni
import train_pefl
import train_reward
from scenes import dataset  # noqa: F401
from tests.held import at_call
from tests.inprocess import a_port

########################################## 1. victims ########################################################

LIMIT = 600  # seconds for a fault, with its runs
STEPS = 6
TINY = dict(batch_size=2, save_every=2, log_every=1, workers=0, device="cpu", wandb="off", precision="fp32",
            warmup=0)
OMNI = TINY | dict(preset="test", image_size=16, steps=STEPS, sample_every=0)


class Victim(NamedTuple):
    script: ModuleType
    flags: dict  # of its Config; {folder} in a text is where victims live
    ranks: int = 1
    needs: tuple[str, ...] = ()  # victims whose undisturbed runs it builds on


VICTIMS = {
    "train_omni": Victim(train_omni, OMNI),
    "train_reward": Victim(train_reward, TINY | dict(
        pairs="{folder}/pairs.jsonl", preset="test", steps=STEPS, val_fraction=0.3, eval_every=3, augment=2,
        noise=0.1, lr=1e-3)),
    "train_pefl": Victim(train_pefl, TINY | dict(
        base="{folder}/train_omni", aesthetic="{folder}/train_reward", phases="4/3/2x3,3/2/1x3", lr=1e-3,
        disc_init="{folder}/train_reward", sample_every=0), needs=("train_omni", "train_reward")),
    "two FSDP2 ranks": Victim(train_omni, OMNI | dict(fsdp=True, save_every=3), 2)}

POINTS = {  # where a run is killed: before the n-th call of a function
    "in the rename": (Path, "rename"),
    "in an all-reduce": (td, "all_reduce"),
    "between the files of a checkpoint": (checkpoint, "_signed"),
    "in an all-gather of FSDP2": (fsdp, "foreach_all_gather"),
    "in the sync of a file": (checkpoint, "fsync"),
    "in a reduce-scatter of FSDP2": (fsdp, "foreach_reduce"),
    "amid the tensors of a file": (torch.Tensor, "isfinite"),
    "in the gathering of a tensor": (DTensor, "full_tensor"),
    "before the manifest": (checkpoint, "finish"),
    "in a broadcast": (td, "broadcast_object_list"),
    "in pruning": (checkpoint, "prune"),
    "in the comparison of ranks": (td, "all_gather_object"),
    "in a step": (common.Verdict, "give"),
    "in the average": (common.EMA, "update"),
    "in a reward": (rewards.PreferenceReward, "forward"),
    "in the held-out accuracy": (train_reward, "accuracy"),
    "in a row of metrics": (log.Metrics, "flush")}


def pairs(folder):
    """Bright pictures are better than dark ones, for 20 captions."""
    rng = np.random.default_rng(0)
    for i in range(20):
        for name, level in (("bright", 190), ("dark", 60)):
            noisy = rng.integers(level - 30, level + 30, (16, 16, 3), np.uint8)
            Image.fromarray(noisy).save(folder / f"{name}{i}.png")
    rows = [{"caption": f"picture {i}", "better": f"bright{i}.png", "worse": f"dark{i}.png"}
            for i in range(20)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))


########################################## 2. running them ###################################################


def forked(act, said, seconds=180):
    """act() in a child -> (its process id, when it must be over), for `ended`; what it says is in the file
    `said`."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 70
        try:
            fd = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(fd, 1), os.dup2(fd, 2)
            faulthandler.enable(2)  # where an abort comes from
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
    """The exit code of a `forked` child, a negative signal if that ended it. AssertionError if it is not over
    in time."""
    pid, until = child
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGABRT)  # says where it was (faulthandler)
    time.sleep(2)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("did not end by itself")


def run(victim, out, prepare=(), patience=30, flags=(), kill=None):
    """A victim's command -> the exit codes of its ranks and what they said.

    prepare: rank -> what is called in it first. patience: seconds of the process group. flags: rank -> flags
    of its own. kill: (seconds, ranks), SIGKILL from outside after so long. On a machine with much else to do
    a run takes half a minute.
    """
    script, own, world, _ = VICTIMS[victim]

    def one(rank):
        if world > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            real, limit = td.init_process_group, datetime.timedelta(seconds=patience)
            td.init_process_group = lambda *a, **k: real(*a, **k | {"timeout": limit})
        dict(prepare).get(rank, lambda: None)()
        at = {k: v.format(folder=out.parent) if isinstance(v, str) else v for k, v in own.items()}
        script.main(script.Config(**at | {"out": str(out)} | dict(flags).get(rank, {})))

    said, codes = [Path(f"{out}.{rank}.txt") for rank in range(world)], []
    with a_port() as port:
        children = [forked(partial(one, rank), said[rank]) for rank in range(world)]
        if kill:
            time.sleep(kill[0])
            for rank in kill[1]:
                os.kill(children[rank][0], signal.SIGKILL)
        for child in children:
            try:
                codes.append(ended(child))
            except AssertionError as e:
                codes.append(str(e))
    return codes, [file.read_text() for file in said]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def one_line(said):
    assert "Traceback" not in said, said
    assert any(line.startswith("error: ") for line in said.splitlines()), said


########################################## 3. what must come out #############################################


def result(out):
    """Of a complete run: its tensors and, by step, what it measured last; not what it took."""
    tensors, manifest = checkpoint.load(out)
    assert manifest["step"] == STEPS, manifest["step"]
    rows = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):  # a row that a kill cut off
            row = json.loads(line)
            told = {k: v for k, v in row.items() if not k.startswith(("perf/", "time"))}
            rows.setdefault(row.get("step"), {}).update(told)
    rows.pop(None, None)  # marks of a start
    return tensors, rows


def same(out, reference):
    (tensors, rows), (wanted, told) = result(out), reference
    assert tensors.keys() == wanted.keys()
    for file in wanted:
        assert tensors[file].keys() == wanted[file].keys(), file
        other = [k for k, v in wanted[file].items() if not torch.equal(tensors[file][k], v)]
        assert not other, f"{file} is another one: {other[:3]}"
    differs = [(step, k) for step in told for k in told[step] if rows.get(step, {}).get(k) != told[step][k]]
    assert not differs, f"metrics are others: {differs[:5]}"
    assert not list(out.glob("*.tmp")) and not list(out.glob("*.old"))


def counting(file):
    """Write how often each point is passed, at the end of a run."""
    counts = Counter()
    for point, (owner, name) in POINTS.items():
        def instead(*args, real=getattr(owner, name), point=point, **kwargs):
            counts[point] += 1
            return real(*args, **kwargs)
        setattr(owner, name, instead)
    at_call(common, "cleanup", 1, lambda: file.write_text(json.dumps(counts)))


def undisturbed(folder, victim):
    """(result of a run that nothing befell, how often each of its ranks passes each point, its seconds).
    It is run once in a `folder`."""
    out = folder / victim
    for name in VICTIMS[victim].needs:
        undisturbed(folder, name)
    counts = [Path(f"{out}.{rank}.json") for rank in range(VICTIMS[victim].ranks)]
    if not (folder / f"{victim}.seconds").exists():
        pairs(folder)
        began = time.monotonic()
        codes, said = run(victim, out, {rank: partial(counting, f) for rank, f in enumerate(counts)})
        assert not any(codes), (codes, said)
        (folder / f"{victim}.seconds").write_text(str(time.monotonic() - began))
    return (result(out), [json.loads(f.read_text()) for f in counts],
            float((folder / f"{victim}.seconds").read_text()))


########################################## 4. kills ##########################################################


def goes_on(victim, out, reference):
    codes, said = run(victim, out)
    assert not any(codes), (codes, said)
    same(out, reference)
    shutil.rmtree(out)  # of 200 kills


def others_ended(codes, said, over=False):
    """Those that were not killed ended by themselves, in a line, or (`over`) had come to their end."""
    for code, text in zip(codes, said):
        if code != -signal.SIGKILL and not (over and code == 0):
            assert code == 1, (codes, said)
            one_line(text)


def killed(folder, victim, point, calls):
    """calls: rank -> the call of `point` before which it dies. Of two that both shall die one may see the
    other die first."""
    owner, name = POINTS[point]
    out = folder / f"{victim}, {point}, {calls}"
    codes, said = run(victim, out, {r: partial(at_call, owner, name, n, die) for r, n in calls.items()})
    assert -signal.SIGKILL in [codes[r] for r in calls], (codes, said)
    others_ended(codes, said)
    goes_on(victim, out, undisturbed(folder, victim)[0])


def killed_at_random(folder, victim, number, ranks):
    """Twice, at moments that are functions of the number; sooner where the run was over by then."""
    reference, _, seconds = undisturbed(folder, victim)
    out, rng = folder / f"{victim}, random {number}", random.Random(f"{victim} {number}")
    for again in (False, True):
        delay = rng.uniform(0, 0.9) * seconds
        while True:
            codes, said = run(victim, out, kill=(delay, ranks))
            others_ended(codes, said, over=(out / f"step_{STEPS:08d}").exists())
            if again or -signal.SIGKILL in codes:
                break
            shutil.rmtree(out)
            delay /= 2
    goes_on(victim, out, reference)


def kills(folder, victim, n):
    """n kills of a victim, spread over its points and their calls; each fifth at random moments. Of two ranks
    the first dies, the second, both, the first, ..."""
    _, counts, _ = undisturbed(folder, victim)
    groups = [(0,), (1,), (0, 1)][:1 if len(counts) == 1 else 3]
    points, seen = enumerate(itertools.cycle(POINTS)), set()
    for i in range(n):
        ranks = groups[i % len(groups)]
        if i % 5 == 4:
            yield victim, f"killed at random moment {i}", partial(killed_at_random, folder, victim, i, ranks)
            continue
        for k, point in points:  # a share of the calls that never comes again (the golden ratio's multiples)
            calls = {r: 1 + int(0.618034 * k % 1 * counts[r][point]) for r in ranks if counts[r].get(point)}
            if calls and (mark := (point, *calls.items())) not in seen:
                seen.add(mark)
                at = " and ".join(f"call {c} of rank {r}" for r, c in calls.items())
                yield victim, f"killed {point}, {at}", partial(killed, folder, victim, point, calls)
                break


def comes_to_its_end(folder, number):
    """Two ranks, shards or not in turn, three steps: no process may end with anything but 0 (LOG.md: the rare
    abort)."""
    out = folder / f"end {number}"
    flags = {"steps": 3, "save_every": 3, "fsdp": number % 2 == 0}
    codes, said = run("two FSDP2 ranks", out, flags={0: flags, 1: flags}, patience=60)
    assert codes == [0, 0], (codes, said)
    shutil.rmtree(out)


def ends(folder, n):
    return (("ends of two ranks", f"end {i}", partial(comes_to_its_end, folder, i)) for i in range(n))


########################################## 5. what comes once ################################################


def rank_hangs(folder):
    """The other waits no longer than the group's timeout (here 5 s), and says so in a line."""
    hang = partial(at_call, fsdp, "foreach_all_gather", 9, partial(time.sleep, 12))
    codes, said = run("two FSDP2 ranks", folder / "rank_hangs", {1: hang}, patience=5)
    assert codes[0] == 1, (codes, said)
    one_line(said[0])


def slow_is_healthy(folder):
    """A rank that is late for every step, and a disk that is slow, less than the timeout, are no fault:
    nothing is said, and the result is the same."""
    def slow(owner, name):
        real = getattr(owner, name)
        setattr(owner, name, lambda *args: (time.sleep(1), real(*args))[1])

    out = folder / "slow"
    codes, said = run("two FSDP2 ranks", out, {0: partial(slow, checkpoint, "_signed"),
                                               1: partial(slow, common.Verdict, "give")}, patience=60)
    assert codes == [0, 0], (codes, said)
    assert not any(word in said[0].replace("warning: --data", "") for word in ("error", "warning")), said[0]
    same(out, undisturbed(folder, "two FSDP2 ranks")[0])


def rank_differs(folder, name, flag):
    """Ranks of different commands: both end, in a line that names rank and field."""
    codes, said = run("two FSDP2 ranks", folder / f"differs_{name}", flags={1: flag})
    assert codes == [1, 1], (codes, said)
    for text in said:
        one_line(text)
        assert "rank 1" in text and name in text, text


def other_code(folder):
    def touched():
        common.code_hash = lambda: "another"

    codes, said = run("two FSDP2 ranks", folder / "other_code", {1: touched})
    assert codes == [1, 1] and "code" in said[0] and "rank 1" in said[0], (codes, said)


def disk_fills(folder, victim):
    """Files can no longer grow beyond 20 kB from the second checkpoint on: training goes on to the end, the
    exit code says that the last one is missing, and with room the same command goes on."""
    def full():
        at_call(checkpoint, "begin", 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1)))

    out = folder / f"disk, {victim}"
    codes, said = run(victim, out, {0: full})
    assert set(codes) == {1} and "training goes on" in said[0] and "not saved" in said[0], (codes, said)
    for text in said:
        one_line(text)
    goes_on(victim, out, undisturbed(folder, victim)[0])


def diverges(folder):
    """Every step from the third on is not finite: what was good stays, and is all that stays."""
    def prepare():
        real, calls = common.Verdict.give, itertools.count()

        def give(self, step, *numbers):
            return real(self, step, *numbers, torch.tensor(float("nan") if next(calls) >= 2 else 0.0))
        common.Verdict.give = give

    out = folder / "diverges"
    (code,), (said,) = run("train_omni", out, {0: prepare}, flags={0: {"steps": 40, "save_every": 2}})
    assert code == 1, said
    one_line(said)
    assert [p.name for p in out.glob("step_*")] == ["step_00000002"], list(out.iterdir())


def out_goes(folder):
    """--out is deleted in mid-run: it is made anew."""
    out = folder / "goes"
    (code,), (said,) = run("train_omni", out, {0: partial(at_call, common.EMA, "update", 4,
                                                          partial(shutil.rmtree, out))})
    assert code == 0 and (out / "metrics.jsonl").exists(), said
    wanted, found = undisturbed(folder, "train_omni")[0][0], checkpoint.load(out)[0]
    assert all(torch.equal(found[file][k], v) for file in wanted for k, v in wanted[file].items())


def two_runs(folder):
    """A second run in one --out is refused while the first lives, and not when it has been killed."""
    out = folder / "two"

    def meanwhile():
        (code,), (said,) = run("train_omni", out, {0: checkpoint._locks.clear})  # which the fork inherited
        assert code == 1 and "another run writes there" in said, said
        one_line(said)
        die()

    (code,), (said,) = run("train_omni", out, {0: partial(at_call, common.EMA, "update", 2, meanwhile)})
    assert code == -signal.SIGKILL, said
    (code,), (said,) = run("train_omni", out)
    assert code == 0, said


def cases(folder, n):
    """The first n of: a kill of every victim, what comes once, and the other kills, the victims in turn."""
    once = [("diverges", partial(diverges, folder)), ("two runs in one --out", partial(two_runs, folder)),
            ("--out is deleted", partial(out_goes, folder)),
            *((f"the disk of {v} fills", partial(disk_fills, folder, v)) for v in VICTIMS),
            ("a rank hangs", partial(rank_hangs, folder)), ("a slow rank", partial(slow_is_healthy, folder)),
            ("another --lr", partial(rank_differs, folder, "lr", {"lr": 0.1})),
            ("another --seed", partial(rank_differs, folder, "seed", {"seed": 4})),
            ("another --batch_size", partial(rank_differs, folder, "batch_size", {"batch_size": 3})),
            ("another code", partial(other_code, folder))]
    deaths = [kills(folder, victim, n) for victim in VICTIMS]
    turns = itertools.chain.from_iterable(zip(*deaths))
    first = itertools.islice(turns, len(VICTIMS))
    yield from itertools.islice(itertools.chain(first, (("faults", *case) for case in once), turns), n)
