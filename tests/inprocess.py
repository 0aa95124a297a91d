"""Scripts as commands with few processes: the imports of one alone take seconds."""

import contextlib
import io
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import torch

from kernels import dispatch

# What long runs compute in: a CPU without bf16 instructions emulates them, ten times slower
NATIVE = "bf16" if dispatch.has_bf16(torch.device("cpu")) else "fp32"


def run_script(path, *args):
    """`python PATH ARGS` in this process -> returncode, stdout and stderr, as subprocess.run has them.

    From the command line to the exit code all is the script's own, on one thread; an exception that is no
    SystemExit is raised here. What a process itself does (signals, ranks, its exit) needs one.
    """
    out, err, code, argv = io.StringIO(), io.StringIO(), 0, sys.argv
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)}
    threads = torch.get_num_threads()
    sys.argv = [str(path), *map(str, args)]
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as e:
        code = e.code or 0
        if isinstance(code, str):
            err.write(code + "\n")
            code = 1
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
        for s, handler in handlers.items():
            signal.signal(s, handler)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@contextlib.contextmanager
def a_port():
    """The number of a free port that nobody else is given as long as this lasts. Who binds it by its number
    and with SO_REUSEADDR, as servers do (torch's store, uvicorn), has it; else nobody listens there."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(("127.0.0.1", 0))
        yield s.getsockname()[1]


def run_ranks(ranks, argv):
    """`torchrun --nproc_per_node=RANKS ARGV` without the process that is torchrun -> as `run_script`.

    Its environment, and the others end when one fails; no restarts. The output is that of all ranks in turn.
    """
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONFAULTHANDLER": "1"}
    with a_port() as port, contextlib.ExitStack() as files:
        at = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        logs = [[files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)] for _ in range(ranks)]
        started = [subprocess.Popen([sys.executable, *map(str, argv)], stdout=out, stderr=err,
                                    env={**os.environ, **quiet, **at, "RANK": str(r), "LOCAL_RANK": str(r)})
                   for r, (out, err) in enumerate(logs)]
        while None in (codes := [process.poll() for process in started]):
            for process in started if any(codes) else ():
                process.kill()
            time.sleep(0.05)
        for log in (x for pair in logs for x in pair):
            log.seek(0)
        said = ["".join(pair[i].read() for pair in logs) for i in (0, 1)]
    return SimpleNamespace(returncode=max(codes) or min(codes), stdout=said[0], stderr=said[1])
