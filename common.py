"""Machinery that the scripts call and that never calls back.

    1. processes and signals     2. the command line     3. randomness from progress
    4. optimisation: schedule, EMA                       5. several devices: averaging gradients, FSDP2
    6. which steps count

Test for every helper here: delete the call, and the script still reads as a training loop.
"""

import contextlib
import ctypes
import datetime
import difflib
import functools
import hashlib
import inspect
import io
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

# Spinning OpenMP threads cost a factor of 10 on a shared machine. libgomp reads this as torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
import torch.distributed as td  # noqa: E402
from tqdm import tqdm  # noqa: E402

from kernels import dispatch  # noqa: E402

########################################## 1. processes and signals ##########################################

_stop_signal = None  # name of the first SIGTERM or SIGUSR1 seen; read through Verdict


@dataclass(frozen=True)
class Dist:
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")


def setup(device="auto", group=True):
    """Join torchrun's process group (gloo on CPU, nccl on GPU, 10 minute timeout); alone without torchrun.

    device: "auto" (a GPU if torch sees one), "cpu", "cuda" or "cuda:N"; under torchrun each rank takes its
    own GPU. group: False in a script whose ranks share out shards and wait for nobody; one that died then
    stops no other, not even at the start. From here on SIGTERM and SIGUSR1 only set a flag that Verdict
    reports on every rank.
    """
    env = os.environ
    rank, world, local_rank = ranks()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise SystemExit(f"error: --device: {device}: use auto, cpu, cuda or cuda:N")
    device = torch.device(device)
    if device.type == "cuda":
        index = device.index if world == 1 and device.index is not None else local_rank
        if index >= torch.cuda.device_count():
            raise SystemExit(f"error: --device: cuda:{index}: torch sees {torch.cuda.device_count()} GPUs: "
                             "use --device=cpu or start fewer processes")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in env:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        # one core for data: measured faster on 4. torch's own number leaves hyperthreads out
        torch.set_num_threads(min(torch.get_num_threads(), cores - 1 if cores > 2 else cores))
    if world > 1 and group:
        gpu = device.type == "cuda"
        try:
            td.init_process_group("nccl" if gpu else "gloo", timeout=datetime.timedelta(minutes=10),
                                  device_id=device if gpu else None)
        except (RuntimeError, ValueError) as e:  # a taken port, no such host, too few ranks
            raise SystemExit(f"error: MASTER_ADDR, MASTER_PORT: {env['MASTER_ADDR']}:{env['MASTER_PORT']}: "
                             f"the ranks do not meet there ({one_line(e)}): give another port, or start all "
                             "of them") from None
    if threading.current_thread() is threading.main_thread():
        for s in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(s, _on_signal)
    if rank == 0:
        git_revision()
    return Dist(rank, world, device)


def ranks():
    """(RANK, WORLD_SIZE, LOCAL_RANK) as torchrun sets them; SystemExit if they cannot be."""
    found = {}
    for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)):
        text = os.environ.get(name, str(default))
        if not re.fullmatch(r"[0-9]{1,6}", text):
            raise SystemExit(f"error: {name}: {text[:40]!r}: is no number: unset it, or start with torchrun")
        found[name] = int(text)
    rank, world, local_rank = found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]
    if not rank < world or not local_rank < world:
        raise SystemExit(f"error: RANK, WORLD_SIZE: {rank} (local {local_rank}), {world}: ranks count from "
                         "0: unset them, or start with torchrun")
    if world > 1 and (lacks := [n for n in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]):
        raise SystemExit(f"error: WORLD_SIZE: {world}: {', '.join(lacks)} not set: start with torchrun, or "
                         "unset it for one process")
    return rank, world, local_rank


def agree(dist, found):
    """SystemExit on all ranks if one of them has another value under a name of the dict `found` (a script's
    config; hashes), naming rank, name and values. One all-gather; device, workers and wandb may differ."""
    if dist.world == 1:
        return
    every = [None] * dist.world
    td.all_gather_object(every, {k: v for k, v in found.items() if k not in ("device", "workers", "wandb")})
    for rank, other in enumerate(every):
        differs = [k for k in every[0] | other if other.get(k) != every[0].get(k)]
        if differs:
            k = differs[0]
            raise SystemExit(f"error: rank {rank}: {k}: {other.get(k)}, and rank 0 has {every[0].get(k)}: "
                             "all ranks need one command, one version of the code and the same data")


def code_hash():
    """Of our source files, whatever git says."""
    digest, root = hashlib.sha256(), Path(__file__).parent
    folders = (".", "kernels", "pretrained", "readers", "scenes")
    for file in sorted(f for folder in folders for f in (root / folder).glob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache  # setup() asks first: the checkout may move on while a run goes on
def git_revision():
    """Commit of the code that runs, with "+" if the tree differed from it; None outside git."""
    try:
        command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def bits(net, but=()):
    """Sum over the bytes of a network's whole (not sharded) tensors: exact, so alike on any device. but:
    names of those left out."""
    tensors = [t for k, t in net.state_dict().items() if k not in but and not is_sharded(t) and t.numel()]
    return sum(t.detach().contiguous().view(-1).view(torch.uint8).sum(dtype=torch.int64).item()
               for t in tensors)


PRECISION = {True: "bf16", False: "fp32"}


def use_bf16(precision, dist):
    """Whether to compute in bf16, the same on every rank of a group; prints one line that says why.

    precision: "bf16", "fp32", or "auto": bf16 where every rank's hardware has instructions for it. Without a
    group (setup) each rank asks its own hardware, and the plan of the folder refuses one that differs.
    """
    everywhere = torch.tensor(float(dispatch.has_bf16(dist.device)), device=dist.device)
    several = dist.world > 1 and td.is_initialized()
    if several:
        td.all_reduce(everywhere, op=td.ReduceOp.MIN)
    has = everywhere.item() > 0
    bf16 = has if precision == "auto" else precision == "bf16"
    whose = "this" if not several else "every rank's" if has else "some rank's"
    kind = "GPU" if dist.device.type == "cuda" else "CPU"
    fact = f"{whose} {kind} has {'' if has else 'no '}bf16 instructions"
    why = f" ({fact})" if precision == "auto" else " (as asked)"
    if bf16 and not has:
        why = f" (as asked, and emulated: {fact}; fp32 is several times faster, 7 to 11 times with AVX2)"
    print0(f"precision: {PRECISION[bf16]}{why}")
    return bf16


def _on_signal(number, frame):
    global _stop_signal
    _stop_signal = signal.Signals(number).name


def cleanup():
    """The last call of a script: leave the process group, if there is one. A process of several ranks ends
    here, with code 0: the interpreter's own end destroys threads of torch that still run, and now and then
    aborts a run that is complete (LOG.md)."""
    if td.is_initialized():
        several = td.get_world_size() > 1
        td.destroy_process_group()
        if several:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


def die_with_parent(number=0):
    """Called in a child process: SIGKILL when the process that started it is gone, however it went. Linux;
    elsewhere torch's workers look for their parent every 5 s."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != multiprocessing.parent_process().pid:  # it went before that
            os._exit(1)


def begin_worker(number=0):
    """What a data worker does first. It is deaf to the signals that Slurm and Ctrl-C send to all of a group:
    the trainer must save, and then ends its workers (data.Loader)."""
    torch.set_num_threads(1)
    for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(s, signal.SIG_IGN)
    die_with_parent()


def print0(*words):
    """Print one line on rank 0, above a progress bar if there is one."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(" ".join(str(w) for w in words))
        sys.stdout.flush()


def n_params(module, trained=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def one_line(e):
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]


########################################## 2. the command line ###########################################


def numbers(text, what, low):
    """A flag such as "20,8" -> [20, 8]; SystemExit below `low`. what: its name."""
    words, most = text.split(","), MOST["seed"] if what.startswith("seed") else 10**6
    if len(words) > 1000 or not all(re.fullmatch(r"\s*-?[0-9]{1,20}\s*", x) for x in words):
        raise SystemExit(f"error: --{what}: {text[:80]!r}: use whole numbers with commas between them")
    found = [int(x) for x in words]
    if min(found) < low or max(found) > most:
        raise SystemExit(f"error: --{what}: {text[:80]}: use at least {low}, at most {most:,}")
    return found


BOUNDS = {
    "at_least_1": (lambda v: v >= 1, "must be at least 1"),
    "not_negative": (lambda v: v >= 0, "must not be negative"),
    "above_0": (lambda v: v > 0, "must be above 0"),
    "share": (lambda v: 0 <= v <= 1, "must be from 0 to 1"),
    "below_1": (lambda v: 0 <= v < 1, "must be at least 0 and below 1")}


MOST = {  # what no use of a flag needs, and what would fill the memory or the screen first
    "seed": 2**63 - 1, "batch_size": 2**16, "workers": 512, "image_size": 2**14, "size": 2**14, "lora": 2**12,
    "height": 2**14, "width": 2**14, "num_samples": 10**5, "k": 1000, "accum": 2**16, "rows": 1000,
    "stride": 1024, "t5_length": 512, "text_batch": 2**14, "shard": 2**20, "text_shard": 2**20,
    "augment": 1024, "guidance": 1000, "image_guidance": 1000, "lr": 1000, "muon_lr": 1000, "disc_lr": 1000,
    "seam": 2**14,
    **dict.fromkeys(("left", "right", "top", "bottom"), 2**14)}
NEEDED = ("out", "data", "pairs", "base", "ckpt")  # texts that must say something
EMPTY = ("prompt",)  # that may be empty, which is not the same as left out


def check_bounds(cfg, **flags):
    """SystemExit for a number of a script's Config that is out of range, before anything is loaded.

    flags: a key of BOUNDS -> names of fields; None passes. Every number must be finite and in MOST, or below
    10^9; a text must be printable, not empty where it is a place, nor where it may be left out: a shell
    script's variable that is not set would pass for that.
    """
    for name, value in vars(cfg).items():
        most = MOST.get(name, 10**9)
        if isinstance(value, int | float) and not abs(value) <= most:  # not-a-number is not
            refuse(cfg, name, f"must be a number up to {most:,}")
        for text in (value if isinstance(value, tuple) else (value,)):
            if isinstance(text, str) and "\0" in text:
                refuse(cfg, name, "holds a zero byte: leave it out")
        default = next((f.default for f in fields(cfg) if f.name == name), "")
        if value == "" and name in NEEDED and default != "":
            refuse(cfg, name, "is empty: name a place")
        if value == "" and default is None and name not in EMPTY:
            refuse(cfg, name, "is empty: leave it out, or say what it is to be")
    for bound, names in flags.items():
        holds, text = BOUNDS[bound]
        for name in names:
            if (value := getattr(cfg, name)) is not None and not holds(value):
                refuse(cfg, name, text)


def refuse(cfg, flag, text):
    """SystemExit that names a flag, its value and what is wrong with it."""
    value = str(getattr(cfg, flag)) if not isinstance(v := getattr(cfg, flag), int) or abs(v) < 10**40 else \
        f"a number of {int(math.log10(abs(v))) + 1} digits"
    value = value if value and value.isprintable() else repr(value)
    raise SystemExit(f"error: --{flag}: {value if len(value) <= 80 else value[:80] + '...'}: {text}")


def parse(what, **settings):
    """tyro.cli of a Config or a function; what is wrong with the command is one line, and an unknown flag is
    told with the nearest one."""
    import tyro  # half the scripts' helpers are imported without a command line

    plain = is_dataclass(what) or inspect.isfunction(what)  # not a union of several
    names = list(inspect.signature(what).parameters) if plain else []
    for f in fields(what) if is_dataclass(what) else ():
        for note in getattr(f.type, "__metadata__", ()):
            names += [a.lstrip("-") for a in getattr(note, "aliases", None) or ()]
    words = sys.argv[1:] if (args := settings.get("args")) is None else args
    for word in words if names else ():
        flag = re.match(r"--([a-zA-Z][\w-]*)", word)
        name = flag and flag[1].replace("-", "_")
        if name and name not in (*names, "help") and not name.startswith("tyro_"):
            near = difflib.get_close_matches(name, names, 1, 0.5)
            raise SystemExit(f"error: --{flag[1][:80]}: there is no such flag: "
                             + (f"use --{near[0]}, or see --help" if near else "see --help"))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(what, **settings)
    except SystemExit as e:
        if not e.code:
            raise
        words = " ".join(re.sub(r"\x1b\[[\d;]*m|[\u2500-\u257f]", " ", said.getvalue()).split())
        words = re.sub(r"^(Parsing error|Required options)|(For full helptext|Run ).*", "", words)
        raise SystemExit(f"error: {_told(words.strip())}: see --help") from None


def _told(words):
    """What tyro says of a command line, as flag: value: the fix; what is not known here, as it is."""
    if m := re.search(r"invalid choice '(.*?)' for argument '(.*?)'\. Expected one of \((.*?),?\)", words):
        return f"{m[2]}: {m[1][:80]}: use one of {m[3]}".replace("'", "")
    if m := re.search(r"Error parsing (\S+): (could|invalid literal for int).*?: '(.*?)'", words):
        kind = "number" if m[2] == "could" else "whole number, such as 10000"
        return f"{m[1]}: {m[3][:80]}: must be a {kind}"
    if m := re.search(r"Missing value for argument '(.*?)'", words):
        return f"{m[1]}: has no value: give one"
    if m := re.search(r"Unrecognized options: (.*)", words):
        return f"command line: {m[1][:80]}: belongs to no flag: leave it out"
    return f"command line: {re.sub(r'^Missing from .*?: ', 'missing: ', words)[:300]}"


class _Lossy:
    """A stream that drops what it cannot write, as to a closed pipe or a full disk: a run goes on."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def _try(self, act, *args):
        try:
            return act(*args)
        except (OSError, ValueError) as e:
            self.stream = open(os.devnull, "w")
            if self is sys.stdout:
                print(f"warning: stdout: {one_line(e)}; going on without it", file=sys.stderr)

    def write(self, text):
        self._try(self.stream.write, text)
        return len(text)

    def flush(self):
        self._try(self.stream.flush)


def command(main, config, about, interrupted="the same command resumes at the newest checkpoint", prog=None):
    """A script's last line: its flags from the command line, main(cfg), and one line for what ends it that is
    no fault of the code: a full disk, want of memory, a rank or a worker that died, Ctrl-C."""
    sys.stdout, sys.stderr = _Lossy(sys.stdout), _Lossy(sys.stderr)
    import tyro

    try:
        main(parse(config, description=about, config=(tyro.conf.FlagConversionOff,), prog=prog))
    except KeyboardInterrupt:  # an exit code of 0 would let a shell script go on
        raise SystemExit(f"interrupted: {interrupted}") from None
    except MemoryError:
        raise SystemExit("error: not enough memory: lower --batch_size or --image_size") from None
    except OSError as e:
        where = e.filename or "a file or pipe"
        raise SystemExit(f"error: {where}: {e.strerror or one_line(e)}: make room or correct it, then the "
                         "same command goes on") from None
    except RuntimeError as e:
        if not (line := ended(e)):
            raise
        raise SystemExit(line) from None


def commands(functions, prog):
    """The last line of a file with several: `PROG NAME --flags` calls functions[NAME]; else as `command`."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        return print("usage: " + "\n       ".join(f"python {prog} {n} --help" for n in functions))
    if name not in functions:
        near = difflib.get_close_matches(name, functions, 1, 0.5) or functions
        raise SystemExit(f"error: command line: {name[:80]!r}: use " + " or ".join(near))
    del sys.argv[1]
    command(lambda run: run(), later(functions[name]), None, "what is written stays", f"{prog} {name}")


def later(function):
    """The same flags, but a function without any: tyro calls what it parses for, and holds what it prints."""
    @functools.wraps(function)
    def begin(*args, **kwargs):
        return lambda: function(*args, **kwargs)

    return begin


def ended(e):
    """The line for a RuntimeError of torch that is no fault of the code; None for all others."""
    text = one_line(e)
    if isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return "error: not enough memory: lower --batch_size or --image_size, or recompute: --checkpointing 1"
    if isinstance(e, td.DistError) or re.search(r"gloo|NCCL|[Cc]onnection (closed|reset)", text):
        return f"error: ranks: another one ended, or cannot be reached ({text[:120]}): see what it said; " \
               "the same command resumes"
    if "DataLoader worker" in text:
        return f"error: --workers: a data worker died ({text[:120]}): the same command goes on, with fewer"
    return None


######################################### 3. randomness from progress ########################################


def generators(seed, step, positions, stream=0):
    """One CPU generator per GLOBAL sample position, a function of (seed, step, position, stream) alone.

    The same sample gets the same draws whatever the world size, so a resumed run continues exactly, and so
    does one on another number of ranks as long as world * batch stays. `stream` separates draws of one step
    that must not share. torch's Mersenne twister takes 32 bits of a seed, so two of N generators coincide
    with probability N^2 / 2^33.
    """
    made = []
    for position in positions:
        key = hashlib.blake2b(f"{seed},{step},{int(position)},{stream}".encode(), digest_size=8).digest()
        made.append(torch.Generator().manual_seed(int.from_bytes(key, "little")))
    return made


def randn(gens, shape, device="cpu"):
    """Standard normal [len(gens), *shape], fp32, row i from gens[i]."""
    out = torch.empty(len(gens), *shape)
    for row, g in zip(out, gens):
        row.normal_(generator=g)
    return out.to(device, non_blocking=True)


def rand(gens):
    """Uniform in [0, 1), [len(gens)]."""
    return torch.tensor([torch.rand((), generator=g).item() for g in gens])


def randint(gens, low, high):
    """int64 uniform in [low, high), [len(gens)]."""
    return torch.tensor([torch.randint(low, high, (), generator=g).item() for g in gens])


######################################## 4. optimisation #####################################################


def lr_at(step, lr, warmup, total, kind="constant"):
    """Learning rate at optimiser step `step`: linear warm-up, then constant or cosine to 0 at `total`."""
    if step < warmup:
        return lr * (step + 1) / warmup
    if kind == "constant":
        return lr
    if kind == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))
    raise SystemExit(f"error: lr schedule: {kind}: use constant or cosine")


EMA_COUNT = "_ema_updates"  # a key of EMA.state_dict(), for exact resume of the warm-up; load_state skips it


def local(tensor):
    """What this rank holds of a tensor: its shard of one that `shard` split (a DTensor), else all of it.
    Shares memory with it, and knows nothing of autograd."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor


def is_sharded(tensor):
    return hasattr(tensor, "to_local")  # a DTensor, whose import costs half a second


def check_fit(module, tensors, what):
    own = module.state_dict()
    given = {k: v for k, v in tensors.items() if k != EMA_COUNT}
    problems = {
        "missing": sorted(own.keys() - given.keys()),
        "unexpected": sorted(given.keys() - own.keys()),
        "of another shape": [f"{k} {list(given[k].shape)} instead of {list(own[k].shape)}" for k in own
                             if k in given and given[k].shape != own[k].shape],
    }
    text = "; ".join(f"{len(keys)} {kind} ({', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''})"
                     for kind, keys in problems.items() if keys)
    if text:
        raise SystemExit(f"error: {what}: does not fit {type(module).__name__}: {text}: another architecture "
                         "saved it, build the model from its manifest's arch")


class EMA:
    """fp32 moving average of the parameters that train; frozen ones and buffers are the module's own.

    Update n (from 0) uses min(decay, (1 + n) / (10 + n)), a warm-up (ours; papers give the decay only), so
    that short runs do not average in what they began with. 0.99 is reached at n = 890, 0.999 at 8,990, 0.9999
    at 89,990: a shorter run with a larger decay averages over its last tenth or so, whatever the decay says.
    Of a sharded parameter each rank averages its own shard.
    """

    def __init__(self, module, decay):
        self.module, self.decay = module, decay
        self.names = [k for k, p in module.named_parameters() if p.requires_grad]
        self.average = [local(p).float().clone() for p in self._params()]
        self.n = torch.zeros((), dtype=torch.int64, device=next(module.parameters()).device)

    def _params(self):
        _reshard(self.module)
        params = [(k, p) for k, p in self.module.named_parameters() if p.requires_grad]
        assert [k for k, _ in params] == self.names, "the trained parameters changed after EMA() was made"
        return [p for _, p in params]

    @torch.no_grad()
    def update(self, bad=None):
        """Take in the weights as they are now; not where `bad`, a scalar on the device, is 1 (Verdict)."""
        n = self.n.double()
        share, counts = 1 - ((1 + n) / (10 + n)).clamp(max=self.decay), 1
        if bad is not None:
            share, counts = torch.where(bad > 0, 0.0, share), (bad == 0).long()
        share = [share.float()] * len(self.average)
        torch._foreach_lerp_(self.average, [local(p).float() for p in self._params()], share)
        self.n += counts

    def state_dict(self):
        """The whole state, averaged weights in it (not copied), and EMA_COUNT, the number of updates."""
        average = {id(p): _like(p, a) for p, a in zip(self._params(), self.average)}  # tied: two names
        state = self.module.state_dict(keep_vars=True)
        state = {k: average.get(id(v), v.detach()) for k, v in state.items()}
        return state | {EMA_COUNT: self.n.clone()}

    @contextlib.contextmanager
    def swapped(self):
        """In the block the module has the averaged weights: do not train there.

        By pointer, but for shards: FSDP2 gathers from storage of its own, to which p.data does not lead, so
        these are copied. All ranks of a sharded module enter and leave together.
        """
        params = self._params()
        raw = [local(p).clone() if is_sharded(p) else p.data for p in params]

        def put(values):
            _reshard(self.module)  # what is gathered still holds the other weights
            for p, v in zip(params, values):
                if is_sharded(p):
                    local(p).copy_(v)
                else:
                    p.data = v

        try:
            put(a.to(p.dtype) for p, a in zip(params, self.average))
            yield self.module
        finally:
            put(raw)


def _reshard(module):
    """Let go of gathered parameters: after a pass without gradient they stand in the place of the shards."""
    for m in module.modules():
        if hasattr(m, "reshard"):
            m.reshard()


def _like(param, shard):
    """`shard`, as large as this rank's of `param`, as a tensor distributed in the same way."""
    if not is_sharded(param):
        return shard
    return type(param.data).from_local(shard, param.device_mesh, param.placements, run_check=False,
                                       shape=param.shape, stride=param.stride())


########################################## 5. several devices ################################################


@torch.no_grad()
def average_gradients(params, world, bucket_bytes=64 * 2**20):
    """Replace gradients by their mean over the ranks, in large buckets. All ranks pass the same parameters.

    A gradient that is None on some ranks counts as zero there; one that is None on all of them stays None, so
    that the optimiser skips it as it would on one rank. Sharded parameters are left out: FSDP2 has averaged
    theirs in the backward pass.
    """
    params = [p for p in params if p.requires_grad and not is_sharded(p)]
    if world == 1 or not params:
        return
    present = torch.tensor([float(p.grad is not None) for p in params])
    present = present.to(params[0].device, non_blocking=True)
    td.all_reduce(present)
    if any(p.grad is None for p in params):  # only then is reading `present` worth a synchronisation
        for p, count in zip(params, present.tolist()):
            if p.grad is None and count:
                p.grad = torch.zeros_like(p)
    buckets = []  # from here on all ranks hold the same set of gradients, and cut it into the same buckets
    for g in (p.grad for p in params if p.grad is not None):
        last = buckets[-1] if buckets else []
        if last and last[0].dtype == g.dtype and sum(b.nbytes for b in last) + g.nbytes <= bucket_bytes:
            last.append(g)
        else:
            buckets.append([g])
    for bucket in buckets:
        flat = torch.cat([g.reshape(-1) for g in bucket])
        td.all_reduce(flat)
        parts = flat.div_(world).split([g.numel() for g in bucket])
        torch._foreach_copy_(bucket, [f.view_as(g) for f, g in zip(parts, bucket)])


def shard(net, dist, bf16):
    """Distribute an Editor or EditNet whose weights are the same on all ranks; `net` is then on dist.device.

    Sharded, each its own FSDP2 unit: joint blocks and control blocks that train, and the zero projections
    behind these. Their fp32 masters are split over the ranks, as are gradients, optimiser and average; from
    the first use in a step to the end of its backward pass they are gathered in bf16 (fp32 without `bf16`),
    2 bytes a parameter, for PeFL calls them up to T1 times a step. Gradients are averaged in fp32.
    Replicated: what is frozen (an EditNet's base), in bf16: it has no optimiser state, and gathering would
    cost more than holding. And what trains outside the blocks, in fp32, 1% of SD3: a text encoder is called
    from outside `forward`, where nothing would gather it; average_gradients is for these.

    Call it after every deepcopy of `net` and before optimiser and EMA are made: parameters become others.
    Autocast stays on around the calls. Trap: FSDP2 would cast inputs to bf16, t among them (15% off).
    """
    # not above: their import costs half a second, which only a run with --fsdp should pay
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if any(".parametrizations." in name for name, _ in net.named_parameters()):
        raise SystemExit("error: --fsdp: a low-rank update is small, and what it updates is replicated: "
                         "leave out one of the two")
    if getattr(net, "cached", False):  # FSDP2 sees what a block is given and returns, not what it hands aside
        raise SystemExit("error: --fsdp: keys and values that --fixed_source keeps pass FSDP2 by: leave out "
                         "one of the two")
    if not td.is_initialized():  # one rank without torchrun takes the same path
        td.init_process_group("nccl" if dist.device.type == "cuda" else "gloo", store=td.HashStore(), rank=0,
                              world_size=1)
    units = [m for m in blocks(net) if any(p.requires_grad for p in m.parameters())]
    if not units:
        raise SystemExit("error: --fsdp: no block trains, so there is nothing to shard: leave it out")
    inside = {id(p) for m in units for p in m.parameters() if p.requires_grad}
    whole = {p for p in net.parameters() if id(p) not in inside}
    for p in whole:
        p.data = p.data.to(dist.device, torch.bfloat16 if bf16 and not p.requires_grad else p.dtype)
    for b in net.buffers():
        b.data = b.data.to(dist.device)
    settings = dict(mesh=init_device_mesh(dist.device.type, (dist.world,)), ignored_params=whole,
                    reshard_after_forward=False, mp_policy=MixedPrecisionPolicy(
                        torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False))
    # the sums behind the zero projections are out of place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .FSDPLinear. returned a view")
    for m in units:
        fully_shard(m, **settings)
    fully_shard(net, **settings)  # the root has no parameters: it tells the units when a pass begins and ends


def blocks(net):
    """The modules that `shard` makes units of, in the order of their use."""
    mmdit = getattr(net, "base", net).mmdit
    beside = [getattr(net, n) for n in ("branch", "img_out", "src_out", "txt_out") if hasattr(net, n)]
    return [m for group in (mmdit.joint_blocks, *beside) for m in group]


def split_groups(groups):
    """Optimiser groups, those of shards apart: a fused or foreach step does not take both kinds at once."""
    parts = [{**g, "params": [p for p in g["params"] if is_sharded(p) == sharded]}
             for g in groups for sharded in (True, False)]
    return [g for g in parts if g["params"]]


@torch.no_grad()
def clip_grad_norm(params, limit):
    """torch.nn.utils.clip_grad_norm_ for parameters sharded or not -> the global norm, on every rank, where
    the parameters are (torch's is on the CPU if none of them has a gradient)."""
    every = list(params)
    params = [p for p in every if p.grad is not None]
    if not params:
        return torch.zeros((), device=every[0].device)
    if not any(is_sharded(p.grad) for p in params):
        return torch.nn.utils.clip_grad_norm_(params, limit)
    shards = [local(p.grad) for p in params if is_sharded(p.grad)]
    whole = [p.grad for p in params if not is_sharded(p.grad)]
    squares = torch.nn.utils.get_total_norm(shards).square()
    td.all_reduce(squares)
    norm = (squares + torch.nn.utils.get_total_norm(whole).to(squares).square()).sqrt()
    torch._foreach_mul_(shards + whole, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def gathered(tensors):
    """(name, whole tensor) of a state dict, one after the other. All ranks run through it together."""
    for name, t in tensors.items():
        yield name, (t.full_tensor() if is_sharded(t) else t).detach()


########################################## 6. which steps count #############################################


class Verdict:
    """Which training steps count: decided on the device, alike on all ranks, read by the host a step later.

        verdict = Verdict(dist, out, "lower --lr")
        ...
        opt.found_inf = bad = verdict.give(step, loss, grad_norm)
        opt.step()
        ema.update(bad)
        stop = verdict.read()

    A host that asked at every step whether its numbers are finite would wait for the device each time, and
    the device then for the host. Here `bad` stays on the device. torch's fused optimisers leave weights,
    moments and their count of steps as they are where found_inf is 1 (it is made for loss scaling), and so do
    Muon and EMA: a step with a non-finite number changes nothing.

    out, remedy: for the error after 20 bad steps in a row.
    """

    def __init__(self, dist, out, remedy):
        self.dist, self.running, self.given = dist, 0, []
        self.error = f"error: {out}: 20 non-finite steps in a row: {remedy}"

    def give(self, step, *numbers):
        """Scalars of a step, on the device -> 1.0 there if one of them is not finite on one rank, else 0.0.

        The all-reduce also asks whether a rank was told to stop. Workers are signalled one after the other,
        each at its own point of a step: acting on a local flag would let one rank save alone and hang.
        """
        bad = ~torch.isfinite(torch.stack([n.detach().float() for n in numbers])).all()
        stop = torch.full((), float(_stop_signal is not None), device=bad.device)
        flags = torch.stack([bad.float(), stop])
        if self.dist.world > 1:
            td.all_reduce(flags, op=td.ReduceOp.MAX)
        done = torch.cuda.Event() if flags.is_cuda else None
        host = flags.to("cpu", non_blocking=True)  # into pinned memory, which torch makes for it
        if done:
            done.record()
        self.given.append((step, host, done))
        return flags[0]

    def read(self, last=False):
        """Whether to stop, by all verdicts but the newest, whose step may still run, or by all if it is the
        `last` before a checkpoint. Prints a line for a bad step; SystemExit at the 20th in a row. While `bad`
        says that the last one read was bad, nothing is to be saved and nothing pruned."""
        stop = False
        while len(self.given) > (not (last or stop)):  # a run that stops saves: all must be known
            step, host, done = self.given.pop(0)
            if done:
                done.synchronize()
            bad, asked = host.tolist()
            stop, self.running = stop or asked > 0, self.running + 1 if bad else 0
            if bad:
                print0(f"warning: step {step}: non-finite loss or gradient: skipped ({self.running} "
                              "running)")
            if self.running == 20:
                raise SystemExit(self.error)
        return stop

    @property
    def bad(self):
        return self.running > 0
