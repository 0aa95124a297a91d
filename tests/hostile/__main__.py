"""The campaign: hostile inputs and faults, tried one by one.

    python -m tests.hostile              # the inputs (inputs.py)
    python -m tests.hostile 20           # and 20 faults (faults.py): runs killed, hanging, without disk
    python -m tests.hostile 0 20         # and 20 kills (kills.py) of make_edits.py, at random moments

Prints for each group how many were tried, survived (harmless, or gone on to the same result), were refused in
one line, and went wrong. The exit code is 1 if one went wrong. Each wrong one is named with what happened.
"""

import contextlib
import io
import os
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from log import peak_bytes  # noqa: E402
from tests.hostile import faults, inputs, kills  # noqa: E402


class TooLong(BaseException):
    """Not an Exception: nothing on the way may take it for one of its own."""


def _too_long(*_):
    raise TooLong


def judge(act, limit=inputs.LIMIT):
    """act() -> "survived", "refused" or what is wrong with how it ended."""
    started = time.monotonic()
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(limit)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            act()
        return "survived"
    except SystemExit as e:
        line = str(e)
        if line.startswith("error: ") and "\n" not in line and len(line) < 2000:
            return "refused"
        return f"not one line: {line[:200]!r}"
    except inputs.Accepted:
        return "accepted"
    except TooLong:
        return f"still at it after {time.monotonic() - started:.0f} s"
    except BaseException as e:
        return f"{type(e).__name__}: {e}"[:300]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def campaign(found, limit=inputs.LIMIT):
    """[(group, name, act)] -> group -> Counter; prints the wrong ones."""
    told = {}
    for group, name, act in found:
        peak = peak_bytes()
        verdict = judge(act, limit)
        if peak_bytes() - peak > inputs.MEMORY:
            verdict = f"took {(peak_bytes() - peak) / 2**30:.1f} GiB"
        kind = verdict if verdict in ("survived", "refused") else "wrong"
        told.setdefault(group, Counter()).update([kind])
        if kind == "wrong":
            print(f"WRONG {group}: {name}: {verdict}", flush=True)
    return told


def main(n_faults, n_kills):
    warnings.simplefilter("ignore")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        told = campaign(inputs.cases(folder))
        for module, n in ((faults, n_faults), (kills, n_kills)):
            told |= campaign(module.cases(Path(folder), n), 600) if n else {}
        os.chdir("/")
    told["all"] = sum(told.values(), Counter())
    print(f"{'':<14}{'tried':>8}{'survived':>10}{'refused':>9}{'wrong':>7}")
    for group, n in told.items():
        print(f"{group:<14}{n.total():>8}{n['survived']:>10}{n['refused']:>9}{n['wrong']:>7}")
    print(f"{time.monotonic() - started:.0f} s")
    return told["all"]["wrong"] > 0


if __name__ == "__main__":
    words = sys.argv[1:]
    if len(words) > 2 or not all(w.isdecimal() and len(w) < 6 for w in words):
        raise SystemExit("usage: python -m tests.hostile [FAULTS [KILLS]]")
    sys.exit(main(*map(int, [*words, 0, 0][:2])))
