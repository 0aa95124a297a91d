"""The campaign: hostile inputs and faults, tried one by one.

    python -m tests.hostile              # the inputs (inputs.py)
    python -m tests.hostile 20           # and 20 faults (faults.py): runs killed, hanging, without disk
    python -m tests.hostile kills        # instead: 50 kills of each victim of faults.py, half an hour
    python -m tests.hostile ends         # instead: two ranks that nothing befalls, 200 times, to their end
    python -m tests.hostile factory      # instead: make_edits.py killed at 20 random moments (kills.py)

Prints for each group how many were tried, survived (harmless, or gone on to the same result), were refused in
one line, and went wrong. The exit code is 1 if one went wrong. Each wrong one is named with what happened.
"""

import contextlib
import io
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork of a process with a pool of threads waits for them

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
        text = f"{type(e).__name__}: {e}"
        return text if len(text) < 4000 else f"{text[:500]} ... {text[-3500:]}"  # where it hung is at the end
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


KILLS, ENDS, FACTORY = 50, 200, 20  # of each victim; of two ranks; of make_edits.py


def main(what, *victims):
    """what: the number of faults beside the inputs, or "kills" (of those `victims`; none: all), "ends" or
    "factory"."""
    warnings.simplefilter("ignore")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if what == "kills":
            told = campaign((case for victim in victims or faults.VICTIMS
                             for case in faults.kills(Path(folder), victim, KILLS)), faults.LIMIT)
        elif what == "ends":
            told = campaign(faults.ends(Path(folder), ENDS), faults.LIMIT)
        elif what == "factory":
            told = campaign(kills.cases(Path(folder), FACTORY), 600)
        else:
            told = campaign(inputs.cases(folder))
            told |= campaign(faults.cases(Path(folder), int(what)), faults.LIMIT)
        os.chdir("/")
    told["all"] = sum(told.values(), Counter())
    print(f"{'':<18}{'tried':>8}{'survived':>10}{'refused':>9}{'wrong':>7}")
    for group, n in told.items():
        print(f"{group:<18}{n.total():>8}{n['survived']:>10}{n['refused']:>9}{n['wrong']:>7}")
    print(f"{time.monotonic() - started:.0f} s")
    return told["all"]["wrong"] > 0


if __name__ == "__main__":
    words = sys.argv[1:] or ["0"]
    known = re.fullmatch("[0-9]{1,5}|ends|factory", words[0]) and not words[1:]
    if not known and not (words[0] == "kills" and set(words[1:]) <= set(faults.VICTIMS)):
        raise SystemExit("usage: python -m tests.hostile [FAULTS | ends | factory | kills [VICTIM ...]]")
    sys.exit(main(*words))
