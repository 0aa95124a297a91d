"""Which implementation of an operation runs: decided once per device, dtype, head dim and variant of kernel.

    KERNELS=auto       (default) Triton on a GPU whose self-test agrees with the reference, else plain torch
    KERNELS=reference  plain torch everywhere
    KERNELS=triton     Triton wherever it can run; a failed self-test is an error instead of a fall-back

What was chosen is printed once per operation and kind of input. On a CPU it is always plain torch, unless
`force("triton")`: Triton's interpreter then runs the kernels, if TRITON_INTERPRET=1 stood before the import.

The first to ask may be anywhere: under fake tensors (runs/memory.py), while torch.compile
traces, in a checkpointed block, in a thread of autograd. The self-test runs in a thread of its own, which
none of that reaches: the answer is the same everywhere.
"""

import contextlib
import functools
import importlib.metadata
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # there is no Triton for macOS and Windows; plain torch needs none
    triton, tl = None, SimpleNamespace(constexpr=int)  # what the kernels' annotations name

MODES = ("auto", "reference", "triton")
MENDED = (3, 7)  # Triton before: its interpreter needs numpy < 2.4, or _mend_interpreter
SAFE_PTXAS = (13, 3)  # older: may overwrite registers that a running WGMMA still reads (fixed in CUDA 13.3)
_forced: str | None = None
_deciding = threading.Lock()  # whoever asks meanwhile waits for the answer: one self-test, one line


def jit(fn):
    """triton.jit; without Triton the function stays as it is and is never called."""
    return triton.jit(fn) if triton else fn


def interpreted() -> bool:
    """Whether the kernels were decorated for Triton's interpreter, which runs on CPU tensors."""
    return triton is not None and triton.knobs.runtime.interpret


def _mend_interpreter() -> None:
    """Bounds of loops are arrays of one number: Triton before 3.7 calls int() on them, numpy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = mended


if interpreted() and tuple(map(int, triton.__version__.split(".")[:2])) < MENDED:
    _mend_interpreter()


@contextlib.contextmanager
def force(mode: str):
    """For tests: "triton" (on a CPU: the interpreter) or "reference", whatever the device and KERNELS say."""
    global _forced
    before, _forced = _forced, mode
    try:
        yield
    finally:
        _forced = before


def has_bf16(device: torch.device | str) -> bool:
    """Whether `device` has bf16 instructions, asked of the hardware; without them torch emulates bf16."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        return True
    # Arm's instructions serve through oneDNN, which torch has on Linux and lacks on macOS.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("bf16")) and torch.backends.mkldnn.is_available()


def use_triton(op: str, x: torch.Tensor, head_dim: int = 0, check: Callable[..., float] | None = None,
               fits: bool = True, wins: bool = True, variant: tuple = ()) -> bool:
    """Whether operation `op` on inputs like x runs its Triton kernels.

    check(device, dtype, head_dim, *variant): the self-test of what would run, its largest error relative to
    what the dtype allows (<= 1 passes). A miscompilation of one variant says nothing about another.
    fits: whether the kernels exist for this kind of input at all; wins: whether they are the faster choice,
    as far as is known (KERNELS=triton does not ask).
    """
    if _forced:
        return _forced == "triton" and fits
    if x.device.type == "cpu":
        return False
    return _constant(op, x.device, x.dtype, head_dim, check, fits, wins, variant)


def mode() -> str:
    chosen = os.environ.get("KERNELS", "auto")
    if chosen not in MODES:
        raise SystemExit(f"error: KERNELS: {chosen!r}: use one of {', '.join(MODES)}")
    return chosen


def _constant(*question) -> bool:
    with _deciding:
        return _decide(*question)


# torch.compile calls it while tracing, and keeps the answer. torch.compiler.assume_constant_result sets this
# too, and imports all of torch's compiler for it, a second at the start of every script.
_constant._dynamo_marked_constant = True


@functools.cache
def _decide(op: str, device: torch.device, dtype: torch.dtype, head_dim: int, check, fits: bool = True,
            wins: bool = True, variant: tuple = ()) -> bool:
    what = f"{op} ({str(dtype).removeprefix('torch.')}{f', heads of {head_dim}' if head_dim else ''})"
    why = ("KERNELS=reference" if mode() == "reference" else
           "no Triton" if triton is None else
           "TRITON_INTERPRET is set" if interpreted() else
           f"no kernel for {device.type}" if device.type != "cuda" else
           "no kernel for these" if not fits else
           "faster for these" if not wins and mode() == "auto" else "")
    if why:
        return _say(f"{what}: plain torch ({why})", False)
    arch = architecture(device)
    ptxas = newer_ptxas(arch)
    error = float("inf")
    try:
        error = _aside(device, check, device, dtype, head_dim, *variant) if check else 0.0
        failed = "" if error <= 1 else f"self-test is off by {error:.3g} times what {dtype} allows"
    except Exception as e:  # what a broken compiler or driver raises is anyone's guess
        failed = f"self-test ended with {type(e).__name__}: {' '.join(str(e).split())[:200]}"
    remedy = ""
    if arch == "sm_90" and ptxas < SAFE_PTXAS:
        remedy = (f"; ptxas {'.'.join(map(str, ptxas))} is known to miscompile some Hopper kernels: "
                  "`pip install 'nvidia-cuda-nvcc>=13.3'`, or set TRITON_PTXAS_PATH to a ptxas of CUDA 13.3")
    if failed and mode() == "triton":
        raise SystemExit(f"error: KERNELS=triton: {what} on {arch}: {failed}{remedy}")
    if failed:
        return _say(f"{what}: plain torch on {arch}, since the {failed}{remedy}", False)
    return _say(f"{what}: Triton on {arch}, self-test at {error:.2g} of its bound{remedy}", True)


def _aside(device: torch.device, check: Callable[..., float], *question) -> float:
    """check(*question) in a thread of its own, in which `device` is the current GPU.

    Modes, hooks on saved tensors, autocast and the state of tracing belong to threads: a self-test in the
    asking one would compute without data under FakeTensorMode, and in a checkpointed block its backward pass
    would recompute that block, which asks again.
    """
    def run() -> float:
        # autograd's own thread of the GPU may be the one that asks and waits: the backward pass stays here
        with torch.autograd.set_multithreading_enabled(False), torch.cuda.device(device):
            return check(*question)

    with ThreadPoolExecutor(1, "kernels") as executor:
        return executor.submit(run).result()


def _say(text: str, answer: bool) -> bool:
    if os.environ.get("RANK", "0") == "0":
        print(f"kernels: {text}", file=sys.stderr, flush=True)
    return answer


def architecture(device: torch.device) -> str:
    """"sm_90", "gfx942", ... of a GPU."""
    props = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return props.gcnArchName.split(":")[0]
    return f"sm_{props.major}{props.minor}"


@functools.cache
def newer_ptxas(arch: str) -> tuple[int, ...]:
    """The version of ptxas that Triton uses for `arch`, (0,) on AMD.

    On Hopper a ptxas >= SAFE_PTXAS of the wheel nvidia-cuda-nvcc, if installed, is made the one it uses.
    """
    if not arch.startswith("sm_"):
        return (0,)
    tools = triton.knobs.nvidia
    tool = tools.ptxas_blackwell if int(arch[3:]) >= 100 else tools.ptxas
    version = _version(tool.version)
    if arch == "sm_90" and version < SAFE_PTXAS and "TRITON_PTXAS_PATH" not in os.environ:
        found = _wheel_ptxas()
        if found and found[1] >= SAFE_PTXAS:
            from triton.backends.nvidia.compiler import CUDABackend, get_ptxas_version

            os.environ["TRITON_PTXAS_PATH"], version = found
            # part of the key of Triton's disk cache: it would return what the old ptxas made
            get_ptxas_version.cache_clear()
            CUDABackend.hash.cache_clear()
    return version


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _wheel_ptxas() -> tuple[str, tuple[int, ...]] | None:
    """Path and version of the ptxas that the wheel nvidia-cuda-nvcc brought."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvcc") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    path = next((str(f.locate()) for f in files if f.name in ("ptxas", "ptxas.exe")), None)
    tool = path and triton.knobs.NvidiaTool.from_path(path)
    return (path, _version(tool.version)) if tool else None
