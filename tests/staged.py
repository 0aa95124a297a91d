"""Stages of make_edits.py as commands, and what they leave behind."""

import itertools
import os
import signal

import pyarrow.parquet as pq
from inprocess import run_script

import checkpoint


def files_of(folder):
    """Everything but the logs, which hold times."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix != ".jsonl"}


def stage(name, **flags):
    flags = [f"--{k}={v}" for k, v in flags.items()]
    done = run_script("make_edits.py", name, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def rows_of(folder):
    return [row for p in sorted(folder.glob("*.parquet")) for row in pq.read_table(p).to_pylist()]


def killed(work, stop):
    """work() in a child that is killed at its stop-th file operation -> the signal that ended it."""
    if child := os.fork():
        return os.WTERMSIG(os.waitpid(child, 0)[1])
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    left = itertools.count(stop, -1)
    real = checkpoint.fsync

    def fsync(path):  # twice for each file: before it is renamed, and after
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(path)

    checkpoint.fsync = fsync
    work()
    os._exit(0)
