"""Speed of the operations in kernels/, beside what else computes the same.

    python kernels/bench.py                     # GPU: all shapes in bf16; CPU: the smallest in fp32
    python kernels/bench.py --ops attention --shapes sd3-1024,editnet-1024 --only ours,cudnn
    python kernels/bench.py --shapes all --dtype bf16 --json out/bench.json

Rows: `ours` is the public function, whatever it chooses to run; `triton` its kernels in any case (on a GPU);
`eager` the plain formulas; `compile` torch.compile of those; for attention also SDPA with one backend each
(`flash`, `cudnn`, `efficient`) and FlexAttention (`flex`), which get the same separate streams and so pay for
joining them, for the norms and for splitting.

forward is without autograd; backward starts from a finished forward pass; both is a training step's share.
Time is the median, with the 20th and 80th percentile. The rate counts what the formulas need, whatever an
implementation does: for attention 4 FLOP per score and channel forward, 10 backward; for the others every
tensor once. Next to it its share of what the device reaches in a large copy or matrix product, measured here
first. Memory is the peak of a forward and backward pass over what was there before. Who disagrees with
`eager` is not timed.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning costs a shared CPU up to 10x

import argparse
import contextlib
import functools
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `python kernels/bench.py` puts kernels/, not the repository, on the path

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from kernels import dispatch, joint_attention, masked_step, modulate, rms_norm  # noqa: E402
from kernels.attention import attention_ref  # noqa: E402
from kernels.blend import masked_step_ref  # noqa: E402
from kernels.rms_norm import rms_norm_ref  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AGREE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # largest error over largest value
MODES = ("forward", "backward", "both")
WHO = ("eager", "compile", "ours", "triton", "flash", "cudnn", "efficient", "flex")


@dataclass
class Problem:
    """One operation at one shape: tensors that get a gradient, and who computes it from them."""

    leaves: list[Tensor]
    calls: dict[str, Callable[[], list[Tensor]]]  # by name; "eager" is what the others must agree with
    work: tuple[float, float]  # FLOP or bytes, forward and backward
    unit: str  # "TFLOP/s" or "GB/s"
    context: dict[str, Callable] = field(default_factory=dict)  # name -> what a call runs in


def triton_forced():
    return dispatch.force("triton")


def compiled(f: Callable) -> Callable:
    return torch.compile(f, dynamic=False)


def nbytes(*x: Tensor | None) -> int:
    return sum(z.numel() * z.element_size() for z in x if z is not None)


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


####################################################################################################
# Joint attention
####################################################################################################


@dataclass(frozen=True)
class Attention:
    batch: int
    streams: tuple[int, ...]  # tokens: text, noisy image, source image
    heads: int
    head_dim: int = 64
    norm: bool = False  # RMS norm of queries and keys
    bias: bool = False  # a number per key, a quarter of the image's keys -inf
    attends: tuple[tuple[bool, ...], ...] | None = None  # which stream sees which


CACHED = ((True,) * 3, (True,) * 3, (True, False, True))  # EditNet's source does not look at the noisy image
ATTENTION = {
    "test": Attention(2, (5, 16, 16), 2, 16, norm=True, bias=True, attends=CACHED),
    "tiny": Attention(64, (24, 64), 3),
    "tiny-editnet": Attention(64, (24, 64, 64), 3, norm=True),
    "sd3-512": Attention(2, (333, 1024), 24),
    "sd3-1024": Attention(2, (333, 4096), 24),
    "sd3.5-1024": Attention(2, (333, 4096), 24, norm=True),
    "editnet-512": Attention(2, (333, 1024, 1024), 24, norm=True),
    "editnet-1024": Attention(2, (333, 4096, 4096), 24, norm=True),
    "editnet-1024-bias": Attention(2, (333, 4096, 4096), 24, norm=True, bias=True),
    "editnet-1024-cached": Attention(2, (333, 4096, 4096), 24, norm=True, attends=CACHED),
    "4k": Attention(4, (4096,), 24),
    "8k": Attention(2, (8192,), 24),
    "4k-d128": Attention(4, (4096,), 12, 128),
}


def joined(attend: Callable, q: list[Tensor], k: list[Tensor], v: list[Tensor], norm, bias, attends) -> list:
    """Joint attention as others write it: norms, one sequence, attend(q, k, v, bias), split."""
    if norm:
        q, k = ([F.rms_norm(x, x.shape[-1:], w.to(x.dtype), 1e-6) for x, w in zip(xs, ws)]
                for xs, ws in zip((q, k), zip(*norm)))
    out = [None] * len(q)
    rows = attends or [[True] * len(k)] * len(q)
    for seen in dict.fromkeys(map(tuple, rows)):
        asking = [i for i, row in enumerate(rows) if tuple(row) == seen]
        keys = [j for j, yes in enumerate(seen) if yes]
        qs, ks, vs = (torch.cat([x[i] for i in which], 1).transpose(1, 2)
                      for x, which in ((q, asking), (k, keys), (v, keys)))
        b = torch.cat([bias[j] for j in keys], 1) if bias else None
        parts = attend(qs, ks, vs, b).transpose(1, 2).split([q[i].shape[1] for i in asking], 1)
        for i, part in zip(asking, parts):
            out[i] = part
    return out


def attend_eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return attention_ref(q, k, v, bias)


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    mask = None if bias is None else bias[:, None, None].to(q.dtype).expand(-1, -1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def score(s, b, h, i, j):
        return s + bias[b, j]

    return flex_attention(q, k, v, score_mod=None if bias is None else score)


def attention_problem(shape: Attention, dtype: torch.dtype, device: torch.device) -> Problem:
    g = torch.Generator().manual_seed(0)
    B, H, D = shape.batch, shape.heads, shape.head_dim
    qkv = [torch.randn(B, n, 3, H, D, generator=g).to(device, dtype) for n in shape.streams]
    weights = [(1 + 0.3 * torch.randn(2, D, generator=g)).to(device) for _ in qkv] if shape.norm else []
    leaves = [x.requires_grad_() for x in (*qkv, *weights)]
    bias = None
    if shape.bias:
        bias = [torch.randn(B, n, generator=g).to(device) for n in shape.streams]
        for b in bias[1:]:
            b[:, : b.shape[1] // 4] = -torch.inf

    def inputs():
        q, k, v = ([x[:, :, i] for x in qkv] for i in range(3))
        return q, k, v, [tuple(w) for w in weights] or None, bias, shape.attends

    def ours():
        q, k, v, norm, bias, attends = inputs()
        return joint_attention(q, k, v, norm, bias=bias, attends=attends)

    one_graph = compiled(lambda *x: joined(attend_eager, *x))
    flex = compiled(lambda *x: joined(attend_flex, *x))
    calls = {"eager": lambda: joined(attend_eager, *inputs()), "compile": lambda: one_graph(*inputs()),
             "ours": ours, "triton": ours, **dict.fromkeys(SDPA, lambda: joined(attend_sdpa, *inputs())),
             "flex": lambda: flex(*inputs())}
    if not on_gpu(device):
        del calls["triton"]
    L = shape.streams
    seen = shape.attends or [[True] * len(L)] * len(L)
    pairs = sum(a * b for a, row in zip(L, seen) for b, yes in zip(L, row) if yes)
    context = {"triton": triton_forced} | {name: lambda b=b: sdpa_kernel([b]) for name, b in SDPA.items()}
    return Problem(leaves, calls, (4 * B * H * D * pairs, 10 * B * H * D * pairs), "TFLOP/s", context)


SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION}

####################################################################################################
# The others: memory is what they cost
####################################################################################################


@dataclass(frozen=True)
class Step:
    shape: tuple[int, int, int, int]  # latents
    predictions: int
    heun: bool = False


STEP = {
    "test": Step((2, 3, 5, 7), 3, heun=True),
    "tiny": Step((64, 3, 64, 64), 2),
    "sd3-512": Step((1, 16, 64, 64), 2),
    "sd3-1024": Step((1, 16, 128, 128), 2),
    "editnet-1024": Step((1, 16, 128, 128), 3),
    "editnet-1024-x64": Step((64, 16, 128, 128), 3),
    "editnet-1024-x64-heun": Step((64, 16, 128, 128), 3, heun=True),
}


def step_problem(shape: Step, dtype: torch.dtype, device: torch.device) -> Problem:
    """The latents stay in fp32, as flow.sample keeps them; the predictions come in dtype."""
    g = torch.Generator().manual_seed(0)

    def random(dtype=torch.float32):
        return torch.randn(shape.shape, generator=g).to(device, dtype)

    x, known, noise, start = (random() for _ in range(4))
    v = [random(dtype).requires_grad_() for _ in range(shape.predictions)]
    mask = torch.rand(shape.shape[0], 1, *shape.shape[2:], generator=g).to(device)
    weights, t, t_next = [1.5, -0.3, -0.2][:shape.predictions], 0.7, 0.65
    start = start if shape.heun else None
    x.requires_grad_()

    def eager(x, v):
        return [masked_step_ref(x, v, weights, t_next - t, 1 - t_next, t_next, start, known, noise, mask)]

    def ours():
        return [masked_step(x, v, t, t_next, weights, start, known, noise, mask)]

    one_graph = compiled(eager)
    calls = {"eager": lambda: eager(x, v), "compile": lambda: one_graph(x, v), "ours": ours}
    if on_gpu(device):
        calls["triton"] = ours
    work = nbytes(x, x, *v, start, known, noise, mask), nbytes(x, x, *v, mask)
    return Problem([x, *v], calls, work, "GB/s", {"triton": triton_forced})


@dataclass(frozen=True)
class Rows:
    batch: int
    tokens: int
    heads: int
    head_dim: int = 64


ROWS = {"test": Rows(2, 5, 2, 16), "tiny": Rows(64, 64, 3), "sd3-512": Rows(2, 1024, 24),
        "sd3-1024": Rows(2, 4096, 24), "sd3-1024-x8": Rows(8, 4096, 24)}


def norm_problem(shape: Rows, dtype: torch.dtype, device: torch.device) -> Problem:
    """RMS norm of queries, a strided view of what the projection made."""
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(shape.batch, shape.tokens, 3, shape.heads, shape.head_dim, generator=g)
    x = qkv.to(device, dtype)[:, :, 0].requires_grad_()
    w = (1 + 0.3 * torch.randn(shape.head_dim, generator=g)).to(device).requires_grad_()
    one_graph = compiled(rms_norm_ref)
    calls = {"eager": lambda: [rms_norm_ref(x, w, 1e-6)], "compile": lambda: [one_graph(x, w, 1e-6)],
             "ours": lambda: [rms_norm(x, w, 1e-6)]}
    return Problem([x, w], calls, (nbytes(x, x), nbytes(x, x, x)), "GB/s")


def block_problem(shape: Rows, dtype: torch.dtype, device: torch.device) -> Problem:
    """What stands between two layers of a block: x + gate y, then modulate. There is no kernel for it: the
    rows say how far torch.compile is from a copy, which is all that a kernel could win."""
    g = torch.Generator().manual_seed(0)
    D = shape.heads * shape.head_dim
    x, y = torch.randn(2, shape.batch, shape.tokens, D, generator=g).to(device, dtype)
    gate, shift, scale = torch.randn(3, shape.batch, D, generator=g).to(device, dtype)
    leaves = [z.requires_grad_() for z in (x, y, gate, shift, scale)]

    def eager(x, y, gate, shift, scale):
        x = torch.addcmul(x, gate[:, None], y)
        return [x, modulate(x, shift, scale)]

    one_graph = compiled(eager)
    calls = {"eager": lambda: eager(*leaves), "compile": lambda: one_graph(*leaves)}
    return Problem(leaves, calls, (nbytes(x, y, x, x), nbytes(x, x, x, y, x, y)), "GB/s")


OPS = {"attention": (attention_problem, ATTENTION), "masked_step": (step_problem, STEP),
       "rms_norm": (norm_problem, ROWS), "gate+modulate": (block_problem, ROWS)}

####################################################################################################
# Timing
####################################################################################################


def quantiles(x: list[float]) -> tuple[float, float, float]:
    q = statistics.quantiles(x, n=10, method="inclusive")
    return q[1], statistics.median(x), q[7]


def clock(f: Callable, device: torch.device, ms: float) -> tuple[float, float, float]:
    """20th, 50th, 80th percentile of milliseconds, measured for about `ms` and at least 5 times. On a GPU the
    cache is emptied before every call."""
    if on_gpu(device):
        from triton.testing import do_bench

        return tuple(do_bench(f, warmup=ms / 4, rep=ms, quantiles=[0.2, 0.5, 0.8]))
    f()
    times, end = [], time.perf_counter() + ms / 1e3
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        f()
        times.append(1e3 * (time.perf_counter() - start))
    return quantiles(times)


def limits(device: torch.device, dtype: torch.dtype, ms: float) -> dict[str, float]:
    """What the device reaches in a large copy (bytes read and written) and a large matrix product."""
    n, side = (2**30, 8192) if on_gpu(device) else (2**26, 1024)
    a = torch.ones(n, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    m = torch.randn(side, side, device=device).to(dtype)
    copy, product = clock(lambda: b.copy_(a), device, ms)[1], clock(lambda: m @ m, device, ms)[1]
    return {"GB/s": 2 * n / copy / 1e6, "TFLOP/s": 2 * side**3 / product / 1e9}


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value; NaN is infinitely far."""
    error = ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
    return error if error == error else float("inf")


def with_gradients(problem: Problem, name: str, towards: list[Tensor]) -> list[Tensor]:
    with problem.context.get(name, contextlib.nullcontext)():
        out = problem.calls[name]()
        return [*(z.detach() for z in out), *torch.autograd.grad(out, problem.leaves, towards)]


def reference(problem: Problem) -> tuple[list[Tensor], list[Tensor] | None]:
    """A fixed gradient of every output; what `eager` makes of the problem, None if that does not fit."""
    with torch.no_grad():
        out = problem.calls["ours" if "ours" in problem.calls else "eager"]()
    torch.manual_seed(0)
    towards = [torch.randn_like(z) for z in out]
    try:
        return towards, with_gradients(problem, "eager", towards)
    except torch.OutOfMemoryError:
        return towards, None


def backward_only(problem: Problem, name: str, towards: list[Tensor], device: torch.device, ms: float):
    out = problem.calls[name]()
    return clock(lambda: torch.autograd.grad(out, problem.leaves, towards, retain_graph=True), device, ms)


def peak(f: Callable) -> float:
    """MB that f needs on the GPU beyond what is there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    f()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(problem: Problem, name: str, towards: list[Tensor], expected: list[Tensor] | None,
            device: torch.device, ms: float, top: dict[str, float]) -> dict:
    """-> forward, backward, both, memory_mb; "note" says why something is missing."""
    row, call = {}, problem.calls[name]
    tolerance = AGREE[min((z.dtype for z in problem.leaves), key=lambda d: d.itemsize)]
    both = functools.partial(with_gradients, problem, name, towards)
    try:
        with problem.context.get(name, contextlib.nullcontext)():
            with torch.no_grad():
                error = max(map(relative, call(), expected)) if expected else 0
                if error > tolerance:
                    return {"note": f"disagrees with eager: {error:.1e}"}
                row["forward"] = clock(call, device, ms)
            error = max(map(relative, both(), expected)) if expected else 0
            if error > tolerance:
                return {"note": f"its gradients disagree with eager's: {error:.1e}"}
            row["backward"] = backward_only(problem, name, towards, device, ms)
            row["both"] = clock(both, device, ms)
            if on_gpu(device):
                row["memory_mb"] = peak(both)
    except Exception as e:  # no such backend, not enough memory, no such gradient: a fact to report
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        row["note"] = f"{type(e).__name__}: {lines[0][:80] if lines else ''}"
    if expected is None:
        row["note"] = row.get("note", "not compared: eager does not fit into memory")
    work = dict(zip(MODES, (*problem.work, sum(problem.work))))
    for mode in MODES:
        if mode in row:
            rate = work[mode] / row[mode][1] / (1e9 if problem.unit == "TFLOP/s" else 1e6)
            row[mode] = {"ms": row[mode], problem.unit: rate, "of_limit": rate / top[problem.unit]}
    return row


def machine(device: torch.device) -> dict:
    """What a reader needs to judge the numbers."""
    def said(*command: str) -> str:
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    info = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux
    lines = info.read_text().splitlines() if info.exists() else []
    names = [x.split(":")[1].strip() for x in lines if x.startswith("model name")]
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cores": os.cpu_count(),
             "cpu": names[0] if names else platform.processor(),
             "capability": torch.backends.cpu.get_cpu_capability(), "load": round(os.getloadavg()[0], 2)}
    if on_gpu(device):
        about = {"torch": torch.__version__, "triton": importlib.metadata.version("triton"),
                 "gpu": torch.cuda.get_device_name(device), "arch": dispatch.architecture(device),
                 "cuda": torch.version.cuda or torch.version.hip, "cudnn": torch.backends.cudnn.version(),
                 "ptxas": ".".join(map(str, dispatch.newer_ptxas(dispatch.architecture(device)))),
                 "clock, power limit": said("nvidia-smi", f"--id={torch.cuda.current_device()}",
                                            "--format=csv,noheader",
                                            "--query-gpu=clocks.max.sm,power.limit")}
    return about | {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
                    "commit": said("git", "rev-parse", "--short", "HEAD")
                    + "+" * bool(said("git", "status", "--porcelain", "-uno"))}


def save(file: str, content: dict) -> None:
    """Whole at every moment: a benchmark that is cut off keeps what it has measured."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def write(file: str, content: dict) -> None:
    save(file, content)
    print(f"wrote {file}")


def chosen(asked: str, known: list[str], flag: str) -> list[str]:
    names = [name for name in known if name != "test"] if asked == "all" else asked.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"error: {flag}: {unknown[0]!r}: use all, or some of {', '.join(known)}")
    return names


def show(row: dict, unit: str) -> None:
    name = f"{row['op']:<14} {row['shape']:<22}{row['who']:<10}"
    memory = f"{row['memory_mb']:.0f}" if "memory_mb" in row else "-"
    for mode in MODES:
        if mode in row:
            r = row[mode]
            ms = "/".join(f"{v:.3f}" for v in r["ms"])
            print(f"{name}{mode:<9}{ms:>24}{r[unit]:>10.3g} {unit:<8}{r['of_limit']:>5.0%}{memory:>7}",
                  flush=True)
    if "note" in row:
        print(f"{name}{row['note']}", flush=True)


def main(argv: list[str] | None = None) -> dict:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ops", default="all", help=f"all, or some of {','.join(OPS)}")
    p.add_argument("--shapes", default="", help="all, or some names; default: all on a GPU, tiny on a CPU")
    p.add_argument("--only", default="all", help=f"all, or some of {','.join(WHO)}")
    p.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    p.add_argument("--ms", type=float, default=100, help="time per measurement, milliseconds")
    p.add_argument("--threads", type=int, default=2, help="torch threads on a CPU")
    p.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    p.add_argument("--json", default="out/bench.json", help="where the numbers go")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = DTYPES[args.dtype or ("bf16" if on_gpu(device) else "fp32")]
    ops, only = chosen(args.ops, [*OPS], "--ops"), chosen(args.only, [*WHO], "--only")
    shapes = [*dict.fromkeys(name for _, known in OPS.values() for name in known)]
    asked = chosen(args.shapes or ("all" if on_gpu(device) else "tiny"), shapes, "--shapes")

    info = machine(device)
    print("  ".join(f"{k} {v}" for k, v in info.items()))
    top = limits(device, dtype, args.ms)
    print(f"limits, measured: copy {top['GB/s']:.0f} GB/s, matrix product {top['TFLOP/s']:.3g} TFLOP/s")
    print(f"{'op':<14} {'shape':<22}{'who':<10}{'mode':<9}{'ms, p20/p50/p80':>24}{'rate':>14}{'limit':>10}"
          f"{'MB':>7}")
    rows = []
    result = {"machine": info, "dtype": str(dtype).removeprefix("torch."), "limits": top, "rows": rows}
    for op in ops:
        make, known = OPS[op]
        for shape in (name for name in asked if name in known):
            problem = make(known[shape], dtype, device)
            towards, expected = reference(problem)
            for who in (name for name in problem.calls if name in only):
                torch._dynamo.reset()  # else the next shape makes it give up or turn dynamic
                # a compiled backward is timed again and again on one graph
                with torch._functorch.config.patch(donated_buffer=False):
                    row = measure(problem, who, towards, expected, device, args.ms, top)
                rows.append({"op": op, "shape": shape, "who": who, **row})
                show(rows[-1], problem.unit)
                save(args.json, result)
            del problem, towards, expected
    write(args.json, result)
    return result


if __name__ == "__main__":
    main()
