"""A script as a command that stands still at a place, so that who kills or signals it cannot come too late.

    python tests/held.py OWNER NAME N GATE SCRIPT ARGS      also below torchrun

Before its N-th call of OWNER.NAME (common:Verdict give) the script waits until the file GATE is there. One of
a test's size is over in less time than a test on a busy machine may be late.
"""

import itertools
import pkgutil
import runpy
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def at_call(owner, name, n, act):
    """Replace owner.name so that its n-th call (from 1) is preceded by act()."""
    real, calls = getattr(owner, name), itertools.count(1)

    def instead(*args, **kwargs):
        if next(calls) == n:
            act()
        return real(*args, **kwargs)

    setattr(owner, name, instead)


def held(owner, name, n, gate, argv):
    """The words of a command that runs argv, a script and its flags, in this way."""
    return [__file__, owner, name, str(n), str(gate), *map(str, argv)]


def wait(gate, seconds=1800):
    """Who is waited for may have failed: then not for ever."""
    until = time.monotonic() + seconds
    while not gate.exists():
        if time.monotonic() > until:
            raise SystemExit(f"error: {gate}: nobody came in {seconds} s")
        time.sleep(0.02)


if __name__ == "__main__":
    owner, name, n, gate, *sys.argv = sys.argv[1:]
    sys.path[:1] = [str(Path(sys.argv[0]).resolve().parent), str(ROOT)]
    at_call(pkgutil.resolve_name(owner), name, int(n), partial(wait, Path(gate)))
    runpy.run_path(sys.argv[0], run_name="__main__")
