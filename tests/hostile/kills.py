"""The factory of edit pairs, killed at random moments: cases(folder, n) -> (group, name, act).

A victim is the whole way from requests to a data set (make_edits.py specialist, score, refine, score, pack,
chat) at the smallest size, on one rank or two, each forked from here with torchrun's environment. At a moment
drawn from a seed SIGKILL ends all of its processes, or one rank of two: the other goes on beside what comes
next, as ranks do whose torchrun is killed (they are sessions of their own). Then the same commands are given
to the other number of ranks. What must hold: every file is, byte for byte, that of a run on one rank that
nothing befell; logs and tables but for their times.
"""

import contextlib
import json
import os
import random
import re
import signal
import time
from functools import partial
from pathlib import Path

import torch

import checkpoint
import make_edits
import model
from tests.hostile.faults import ended, forked

ROOT = Path(__file__).parents[2]
TASKS = "swap,remove,add,background,attribute,environment"


def base(folder, seed=0):
    """A random inpainting model of 16 x 16 pixels that is not the identity, with guidance that matters."""
    torch.manual_seed(seed)
    net = model.Editor(model.replace(model.PRESETS["test"], inpaint=True, pos_max=8))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.15)
    checkpoint.write(folder, 0, {"model": net.state_dict()}, {
        "arch": net.arch, "config": {"image_size": 16, "shift": 1.0}})
    return str(folder)


def commands(ckpt, out):
    """Name of each stage's folder below `out` -> its Config."""
    common = dict(ckpt=ckpt, precision="fp32", device="cpu")
    score = dict(parser=str(ROOT / "assets/parser"), device="cpu")
    at = {name: str(out / name) for name in ("made", "scored", "refined", "rescored", "pairs", "chat")}
    return {
        "made": make_edits.Specialist(at["made"], n=6, tries=2, steps=2, shard=2, batch_size=3, tasks=TASKS,
                                      **common),
        "scored": make_edits.Score(at["made"], at["scored"], **score),
        "refined": make_edits.Refine(at["scored"], at["refined"], steps="2,1", batch_size=3, **common),
        "rescored": make_edits.Score(at["refined"], at["rescored"], **score),
        "pairs": make_edits.Pack(f"{at['scored']},{at['rescored']}", at["pairs"], min_score=0, dev=0.4,
                                 shard=3, group=2),
        "chat": make_edits.Chat(at["scored"], at["chat"])}


class Killed(Exception):
    """Processes that still live."""


def stage(cfg, said, ranks, until=None, spare=None):
    """One command on so many ranks -> what they said. At the time `until` SIGKILL to all of them but rank
    `spare`: Killed with the children that are left. AssertionError if one fails by itself."""
    children, files = [], [Path(f"{said}.{r}.txt") for r in range(ranks)]
    for r in range(ranks):
        def one(r=r):
            if ranks > 1:
                os.environ.update(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(ranks), MASTER_PORT="1",
                                  MASTER_ADDR="127.0.0.1")  # where nobody meets: no rank waits for another
            make_edits.main(cfg)
        children.append(forked(one, files[r]))
    left = list(range(ranks))
    while left:
        if until is not None and time.monotonic() >= until:
            dies = [r for r in left if r != spare]
            for r in dies:
                os.kill(children[r][0], signal.SIGKILL)
            for r in dies:
                os.waitpid(children[r][0], 0)
            raise Killed([children[r] for r in left if r == spare])
        for r in list(left):
            done, status = os.waitpid(children[r][0], os.WNOHANG)
            if done:
                left.remove(r)
                code = os.waitstatus_to_exitcode(status)
                assert code == 0, f"{type(cfg).__name__}: rank {r} of {ranks}: {code}: {files[r].read_text()}"
        time.sleep(0.005)
    return [f.read_text() for f in files]


def whole(ckpt, out, ranks, until=None, spare=None):
    """All stages in turn -> what each one said."""
    out.mkdir(exist_ok=True)
    return {name: stage(cfg, f"{out}.{name}", ranks, until, spare)
            for name, cfg in commands(ckpt, out).items()}


def here(ckpt, out):
    """All stages in this process: what they import and build once need not be in every fork."""
    out.mkdir()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)}
    with open(f"{out}.txt", "w") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        for cfg in commands(ckpt, out).values():
            make_edits.main(cfg)
    for s, handler in handlers.items():
        signal.signal(s, handler)


def untimed(line):
    """A line of a production log without its time."""
    return {k: v for k, v in json.loads(line).items() if k != "ms"}


def contents(out):
    """Every file below a folder -> its bytes; of a production log its lines without their times."""
    found = {}
    for p in sorted(out.rglob("*")):
        name = str(p.relative_to(out))
        if p.is_file():
            log = re.search(r"\d{5}\.jsonl$", name)
            found[name] = [untimed(x) for x in p.read_text().splitlines()] if log else p.read_bytes()
    return found


def tables(said):
    """Of what stages said, the lines of their tables, without the seconds."""
    lines = {}
    for name, texts in said.items():
        for line in "\n".join(texts).splitlines():
            if re.match(r"(task|swap|remov|add|attribute|background|env)\w* ", line):
                lines.setdefault(name, set()).add(re.sub(r" +\d+\.\d{3} ", " ", line))
    return lines


def killed(folder, reference, seed):
    """One trial. What the seed draws: who dies, and when; how many ranks come first alternates."""
    ckpt, expected, told, seconds = reference
    rng, ranks, tries = random.Random(seed), 1 + seed % 2, 0
    spare = rng.randrange(2) if ranks == 2 and rng.random() < 0.4 else None
    moment = rng.uniform(0, seconds[ranks])
    while True:
        out = folder / f"killed_{seed}_{tries}"
        try:
            whole(ckpt, out, ranks, time.monotonic() + moment, spare)
        except Killed as e:
            left = e.args[0]
            break
        moment, tries = 0.7 * moment, tries + 1  # a quicker machine than before: it was over
    before = len(contents(out))
    said = whole(ckpt, out, 3 - ranks)
    for pid, _ in left:  # beside which all this was made
        ended((pid, time.monotonic() + 300))
    found = contents(out)
    differs = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
    assert not differs, f"killed after {moment:.2f} s with {before} files: not the same: {differs}"
    lacks = {name: lines - tables(said).get(name, set()) for name, lines in told.items()}
    assert not any(lacks.values()), f"killed after {moment:.2f} s: lines of tables that nobody said: {lacks}"


def undisturbed(folder):
    """-> the base, the files and tables of a run on one rank, and the seconds of one on one and on two."""
    ckpt, seconds = base(folder / "base"), {}
    here(ckpt, folder / "here")
    for ranks in (2, 1):
        started = time.monotonic()
        said = whole(ckpt, folder / f"whole_{ranks}", ranks)
        seconds[ranks] = time.monotonic() - started
    return ckpt, contents(folder / "whole_1"), tables(said), seconds


def cases(folder, n):
    """The first n kills."""
    reference = undisturbed(folder)
    for seed in range(n):
        yield "kills", f"killed, seed {seed}", partial(killed, folder, reference, seed)
