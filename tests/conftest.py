"""Settings that must stand before torch is imported, and the repository root on sys.path."""

import os
import signal
import sys
import zlib
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork of a process with a pool of threads waits for them
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads: a factor of 10 on a shared machine
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are decorated
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
    os.environ.pop(name, None)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """What a test draws without a seed is its own, whatever ran before it in its process."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(zlib.crc32(item.nodeid.encode()))


@pytest.fixture(autouse=True)
def no_bars_left():
    """A progress bar that an error left open would move the next test's bars down a line."""
    yield
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()


@pytest.fixture
def one_thread_and_own_signals():
    """For tests that call main(), which installs handlers and may choose a number of threads."""
    import torch

    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for s, handler in before.items():
        signal.signal(s, handler)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders that the training scripts begin with; modules of other models have their own."""
    from trained import make_models

    return make_models(tmp_path_factory.mktemp("made"))
