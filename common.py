"""Machinery that the scripts call and that never calls back.

Contents: 1. processes and signals   2. randomness from progress   3. schedule, EMA, gradient averaging
          4. checkpoints             5. metrics                    6. pictures
Test for every helper here: delete the call, and the script still reads as a training loop.
"""
import contextlib
import datetime
import errno
import functools
import hashlib
import json
import math
import netrc
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

# Spinning OpenMP threads cost a factor of 10 on a shared machine. libgomp reads this as torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as td  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

from kernels import dispatch  # noqa: E402

########################################## 1. processes and signals ##########################################

_stop_signal = None  # name of the first SIGTERM or SIGUSR1 seen; read through verdict.py


@dataclass(frozen=True)
class Dist:
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")


def setup(device="auto"):
    """Join torchrun's process group (gloo on CPU, nccl on GPU, 10 minute timeout); alone without torchrun.

    device: "auto" (a GPU if torch sees one), "cpu", "cuda" or "cuda:N"; under torchrun each rank takes its
    own GPU. From here on SIGTERM and SIGUSR1 only set a flag that verdict.py reports on every rank.
    """
    env = os.environ
    rank, world = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    local_rank = int(env.get("LOCAL_RANK", 0))
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
    if world > 1:
        gpu = device.type == "cuda"
        td.init_process_group("nccl" if gpu else "gloo", timeout=datetime.timedelta(minutes=10),
                              device_id=device if gpu else None)
    if threading.current_thread() is threading.main_thread():
        for s in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(s, _on_signal)
    if rank == 0:
        git_revision()
    return Dist(rank, world, device)


PRECISION = {True: "bf16", False: "fp32"}


def use_bf16(precision, dist):
    """Whether to compute in bf16, the same on every rank; prints one line that says why.

    precision: "bf16", "fp32", or "auto": bf16 where every rank's hardware has instructions for it.
    """
    everywhere = torch.tensor(float(dispatch.has_bf16(dist.device)), device=dist.device)
    if dist.world > 1:
        td.all_reduce(everywhere, op=td.ReduceOp.MIN)
    has = everywhere.item() > 0
    bf16 = has if precision == "auto" else precision == "bf16"
    whose = "this" if dist.world == 1 else "every rank's" if has else "some rank's"
    kind = "GPU" if dist.device.type == "cuda" else "CPU"
    fact = f"{whose} {kind} has {'' if has else 'no '}bf16 instructions"
    why = f" ({fact})" if precision == "auto" else " (as asked)"
    if bf16 and not has:
        why = f" (as asked, and emulated: {fact}; fp32 is several times faster, 7 to 11 times with AVX2)"
    print0(f"precision: {PRECISION[bf16]}{why}")
    return bf16


def refuse_old_flags():
    """SystemExit for a flag of earlier commands that has another name now."""
    if any(re.match(r"--(no-?)?bf16(=|$)", word) for word in sys.argv[1:]):
        raise SystemExit("error: --bf16: is now --precision: auto (bf16 where the hardware has it, the "
                         "default), bf16 or fp32")


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


def is_main(dist):
    return dist.rank == 0


def print0(*words):
    """Print one line on rank 0, above a progress bar if there is one."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(" ".join(str(w) for w in words))
        sys.stdout.flush()


class _Lines:
    """stderr in a file, for tqdm: a bar that is drawn again and again would run into the lines of errors."""

    def write(self, text):
        if text.strip():
            sys.stderr.write(text.strip("\r\n") + "\n")

    def flush(self):
        sys.stderr.flush()


def progress(total, start=0, desc="", dist=Dist()):
    """A tqdm bar on rank 0 (on stderr; a line every 30 s at most when stderr is a file), silent elsewhere."""
    look = dict(mininterval=30, file=_Lines(), ncols=100)
    if sys.stderr.isatty():
        look = dict(mininterval=0.2, dynamic_ncols=True)
    return tqdm(total=total, initial=start, desc=desc, disable=dist.rank != 0, **look)


def stop_asked():
    """Whether this process got SIGTERM or SIGUSR1; other ranks may get theirs later (see verdict.py)."""
    return _stop_signal is not None


def peak_bytes():
    """Peak memory so far, in bytes: allocated on the GPU, without one the resident memory of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory():
    """`peak_bytes` as text."""
    where = "GPU" if torch.cuda.is_available() and torch.cuda.is_initialized() else "host"
    return f"{where} peak {peak_bytes() / 2**30:.2f} GiB"


def n_params(module, trained=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


######################################### 2. randomness from progress ########################################


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


def rand(gens, device="cpu"):
    """Uniform in [0, 1), [len(gens)]."""
    return torch.tensor([torch.rand((), generator=g).item() for g in gens]).to(device)


def randint(gens, low, high, device="cpu"):
    """int64 uniform in [low, high), [len(gens)]."""
    return torch.tensor([torch.randint(low, high, (), generator=g).item() for g in gens]).to(device)


######################################## 3. optimisation #####################################################


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
    """What this rank holds of a tensor: its shard of one that sharded.py split (a DTensor), else all of it.
    Shares memory with it, and knows nothing of autograd."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor


def is_sharded(tensor):
    return hasattr(tensor, "to_local")  # a DTensor, whose import costs half a second


class EMA:
    """fp32 moving average of the parameters that train; frozen ones and buffers are the module's own.

    Update n (from 0) uses min(decay, (1 + n) / (10 + n)) with warmup, else decay; papers give the decay only.
    Of a sharded parameter each rank averages its own shard.
    """

    def __init__(self, module, decay, warmup=True):
        self.module, self.decay, self.warmup = module, decay, warmup
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
        """Take in the weights as they are now; not where `bad`, a scalar on the device, is 1 (verdict.py)."""
        n = self.n.double()
        decay = ((1 + n) / (10 + n)).clamp(max=self.decay) if self.warmup else torch.full_like(n, self.decay)
        share, counts = 1 - decay, 1
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

    @torch.no_grad()
    def load_state_dict(self, tensors):
        check_fit(self.module, tensors, "ema")
        if EMA_COUNT not in tensors:
            raise SystemExit(f"error: ema: no {EMA_COUNT}: plain weights, not an EMA state: use load_state")
        for name, average in zip(self.names, self.average):
            average.copy_(tensors[name])
        self.n.copy_(tensors[EMA_COUNT])

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


class Muon(torch.optim.AdamW):
    """AdamW, and Muon (Jordan et al. 2024) for the groups that say muon=True: of a matrix's momentum only the
    directions are kept, U V^T of its U S V^T, so that rare directions, a word seldom said, learn as fast as
    common ones. Scaled by 0.2 sqrt(longer side), the size of an AdamW step (Liu et al. 2025), whence learning
    rates are alike. A small model from scratch needed a sixth fewer pictures for less error (LOG.md).

    params: groups as of AdamW; those with muon hold matrices [out, in] alone, where out = 3 in is q, k and v
    one below the other, three matrices. torch.optim.Muon computes in bf16, which most CPUs only emulate.
    found_inf: see verdict.py.
    """

    # quintic of which four rounds bring singular values from 0.01 up to 0.7 ... 1.2 (Jordan et al. 2024)
    COEFFICIENTS, ROUNDS, MOMENTUM = (3.4445, -4.7750, 2.0315), 4, 0.95

    @torch.no_grad()
    def step(self):
        held = []  # from AdamW, which steps over what has no gradient
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None] if group.get("muon") else []
            held += [(p, p.grad) for p in params]
            bad = getattr(self, "found_inf", params[0].new_zeros(()) if params else None)
            alike = {}  # matrices of a shape are one batch
            for p in params:
                if p not in self.state:  # AdamW wants to find a step in every state it loads
                    self.state[p] = {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
                momentum = self.state[p]["momentum"]
                grad = torch.where(bad > 0, momentum, p.grad)  # towards which a momentum does not move
                momentum.lerp_(grad, 1 - self.MOMENTUM)
                update = grad.lerp(momentum, self.MOMENTUM)  # Nesterov's
                p.mul_(torch.where(bad > 0, 1.0, 1 - group["lr"] * group["weight_decay"]))
                parts = 3 if p.shape[0] == 3 * p.shape[1] else 1
                for target, matrix in zip(p.chunk(parts), update.chunk(parts)):
                    alike.setdefault(target.shape, []).append((target, matrix))
            for (rows, columns), pairs in alike.items():
                x = self.orthogonal(torch.stack([matrix for _, matrix in pairs]))
                for (target, _), direction in zip(pairs, x):
                    direction = torch.where(bad > 0, 0.0, direction)
                    target.add_(direction, alpha=-0.2 * max(rows, columns) ** 0.5 * group["lr"])
        for p, _ in held:
            p.grad = None
        super().step()
        for p, grad in held:
            p.grad = grad

    def orthogonal(self, x):
        """[N, rows, columns] -> about U V^T of each, by Newton and Schulz's iteration."""
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x
        x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
        a, b, c = self.COEFFICIENTS
        for _ in range(self.ROUNDS):
            square = x @ x.mT
            x = a * x + torch.baddbmm(square, square, square, beta=b, alpha=c) @ x
        return x.mT if tall else x


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


########################################## 4. checkpoints ####################################################
# OUT/step_00001000/{model,ema,optimizer,...}.safetensors + manifest.json. The manifest is written last, with
# the SHA-256 of every file and of itself: a checkpoint is a folder that verifies, anything else is debris.

_STEP = re.compile(r"step_(\d+)(\.old)?")  # .old: set aside while its replacement takes its name
_FILE = re.compile(r"[\w.-]+\.safetensors|dcp/(\.metadata|[\w-]+\.distcp)")  # dcp/: of sharded.py


class _Flaw(Exception):
    """What is wrong with a checkpoint folder: "FILE: PROBLEM"."""


def optimizer_tensors(opt):
    """The optimiser's state: "INDEX.KEY" (index over all groups) -> tensor. Learning rates are not state."""
    flat = {}
    for i, p in enumerate(p for g in opt.param_groups for p in g["params"]):
        for key, value in opt.state.get(p, {}).items():
            if value is not None:  # SGD's empty momentum
                value = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
                flat[f"{i}.{key}"] = value
    return flat


def load_optimizer_tensors(opt, tensors):
    """Restore what `optimizer_tensors` gave, exactly. SystemExit if it belongs to other parameters."""
    params = [p for g in opt.param_groups for p in g["params"]]
    state = {}
    for name, value in tensors.items():
        i, key = name.split(".", 1)
        if int(i) >= len(params) or value.dim() and value.shape != params[int(i)].shape:
            raise SystemExit(f"error: optimizer state: {name} {list(value.shape)}: is of other parameters, "
                             "resume with the checkpoint's architecture, or start in a new folder")
        state.setdefault(int(i), {})[key] = value.clone()  # load_state_dict would alias it
    opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})


def check_writable(out_dir):
    """SystemExit if no file can be made in `out_dir`, which is created; a full disk is not noticed here."""
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out_dir).close()
    except OSError as e:
        raise SystemExit(f"error: --out: {out_dir}: cannot be written ({e.strerror}): give another folder "
                         "or correct its permissions") from None


def save_checkpoint(out_dir, step, tensors, meta, keep=2, dist=Dist()):
    """Write OUT/step_STEP, then delete all but the `keep` newest (0: none). All ranks call it, rank 0 writes.

    tensors: file name -> {key: Tensor}. meta: JSON-able; its arch, config, precision and samples become
    entries of the manifest itself, the rest stands under "meta". Returns the folder on every rank, or None
    after one printed line when the disk is full or failing: training goes on, and the caller counts failures
    in a row.
    """
    folder = Path(out_dir) / f"step_{step:08d}"
    done = False
    if dist.rank == 0:
        for pause in (1, 2, None):
            try:
                write_checkpoint(folder, step, tensors, meta, dist.world)
                done = True
                break
            except (OSError, SafetensorError) as e:  # safetensors reports a full disk as its own error
                full = getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(e)
                if pause is None or full:
                    print0(f"warning: checkpoint {folder} not saved ({one_line(e)}); training goes on")
                    break
                time.sleep(pause)
        if done and keep:
            prune(folder, step, keep)
    if dist.world > 1:
        flag = torch.tensor(float(done), device=dist.device)
        td.all_reduce(flag, op=td.ReduceOp.MAX)
        done = flag.item() > 0
    return folder if done else None


def write_checkpoint(folder, step, tensors, meta, world=1):
    """Write one checkpoint folder, assets/ too: .tmp folder, fsync, rename. Errors leave nothing behind."""
    folder, tmp = Path(folder), temporary(folder)
    try:
        begin_checkpoint(folder, sum(t.nbytes for group in tensors.values() for t in group.values()))
        files = {}
        for name, group in tensors.items():
            path = tmp / f"{name}.safetensors"
            save_file(_savable(group), path)
            path.chmod(0o644)  # safetensors makes it 0600, which a shared run folder does not want
            fsync(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        finish_checkpoint(folder, step, files, meta, world)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    return folder


def temporary(folder):
    """Where a checkpoint is written before it takes its name."""
    return Path(folder).with_name(Path(folder).name + ".tmp")


def begin_checkpoint(folder, size):
    """Make the empty temporary folder for `size` bytes of tensors. OSError if the disk has no room."""
    tmp = temporary(folder)
    tmp.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(tmp, ignore_errors=True)
    need, free = 1.1 * size + 2**16, shutil.disk_usage(tmp.parent).free
    if free < need:
        raise OSError(errno.ENOSPC, f"needs {need / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free")
    tmp.mkdir()


def finish_checkpoint(folder, step, files, meta, world=1):
    """Add the manifest to the temporary folder, whose files (name -> bytes, sha256) are on the disk, then
    give it its name."""
    folder, tmp = Path(folder), temporary(folder)
    old = folder.with_name(folder.name + ".old")
    lifted = {k: meta[k] for k in ("arch", "config", "precision", "samples") if k in meta}
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    rest = {k: v for k, v in meta.items() if k not in lifted}
    manifest = {"format": 1, "step": step, **lifted, "files": files, "torch": torch.__version__,
                "world": world, "git": git_revision(), "time": now, "meta": rest}
    manifest = json.loads(json.dumps(manifest, default=str))  # as it will be read, for the hash
    manifest["sha256"] = _manifest_hash(manifest)
    (tmp / "manifest.json").write_text(json.dumps(manifest, indent=1))
    fsync(tmp / "manifest.json")
    fsync(tmp)
    if folder.exists():  # a resumed run passes this step again
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    tmp.rename(folder)
    fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def count_lost(out, saved, lost, last):
    """Checkpoints running that `save_checkpoint` could not write (it returned None): 0 if `saved`, else one
    more than `lost`. SystemExit at the third, or when there is no later one to hope for (`last`)."""
    lost = 0 if saved else lost + 1
    if lost and (last or lost == 3):
        raise SystemExit(f"error: {out}: {lost} checkpoint(s) running were not saved: free some space, then "
                         "the same command resumes")
    return lost


def _savable(group):
    """CPU, contiguous, no shared storage: safetensors refuses the rest."""
    out, seen = {}, set()
    for key, t in group.items():
        t = t.detach().cpu().contiguous()
        storage = t.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != t.nbytes:
            t = t.clone()
        seen.add(t.untyped_storage().data_ptr())
        out[key] = t
    return out


def fsync(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(fd)


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _manifest_hash(manifest):
    rest = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _step_folders(out_dir):
    """[(step, folder)], newest first."""
    found = [(m, p) for p in Path(out_dir).glob("step_*") if (m := _STEP.fullmatch(p.name)) and p.is_dir()]
    return sorted([(int(m[1]), p) for m, p in found], key=lambda f: (f[0], f[1].suffix == ""), reverse=True)


def prune(newest, step, keep):
    """Delete all but the `keep` newest checkpoints up to `newest`, that of `step`."""
    # A folder of a later step did not verify when this run resumed before it: it is left alone until it is
    # overwritten, and never counts among the kept.
    earlier = [p for s, p in _step_folders(newest.parent) if s <= step]
    for p in earlier[keep:] + list(newest.parent.glob("step_*.tmp")):
        shutil.rmtree(p, ignore_errors=True)


def _verify(folder, names=None):
    """(files of those names, manifest) of one folder, every byte checked; raises _Flaw."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        files = {k: (v["bytes"], v["sha256"]) for k, v in manifest["files"].items()}
        if manifest["sha256"] != _manifest_hash(manifest) or not all(_FILE.fullmatch(k) for k in files):
            raise _Flaw("manifest.json: was changed after it was written")
    except OSError:
        raise _Flaw("manifest.json: cannot be read (a save that was cut off, or no checkpoint)") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _Flaw("manifest.json: damaged") from None
    if names is not None:
        names = (names,) if isinstance(names, str) else names
        files = {k: v for k, v in files.items() if k.removesuffix(".safetensors") in names}
        if not files:
            raise _Flaw(f"manifest.json: lists no file named {' or '.join(names)}")
    for file, (size, digest) in files.items():
        try:
            if (found := (folder / file).stat().st_size) != size:
                raise _Flaw(f"{file}: {found} bytes instead of {size}")
            if sha256(folder / file) != digest:
                raise _Flaw(f"{file}: SHA-256 differs from the manifest's, the file is damaged")
        except OSError as e:
            raise _Flaw(f"{file}: cannot be read ({e.strerror})") from None
    return list(files), manifest


def _read(folder, names=None):
    """(tensors, manifest) of one folder, every byte checked; raises _Flaw."""
    files, manifest = _verify(folder, names)
    tensors = {}
    for file in (f for f in files if f.endswith(".safetensors")):
        try:
            tensors[file.removesuffix(".safetensors")] = load_file(folder / file)
        except (OSError, SafetensorError) as e:
            raise _Flaw(f"{file}: cannot be read ({getattr(e, 'strerror', None) or e})") from None
    if shared := manifest["meta"].get("shared"):
        _add_shared(tensors, folder, **shared)
    return tensors, manifest


def _add_shared(tensors, folder, path, prefix, sha256):
    """Weights that a shipped folder leaves in another one (an EditNet's base): `path`, relative to it, must
    hold the model.safetensors of that hash; its keys are added below `prefix`."""
    weights, manifest = _read(folder / path, "model")
    if manifest["files"]["model.safetensors"]["sha256"] != sha256:
        raise _Flaw(f"manifest.json: shares the weights of {path}, which holds other ones now")
    for group in tensors.values():
        group |= {prefix + k: v for k, v in weights["model"].items()}


def _newest(out_dir, names=None, read=_read):
    """(folder, *read(folder, names)) of the newest step that verifies; None without any step."""
    flaws = []
    for _, folder in _step_folders(out_dir):
        try:
            found = folder, *read(folder, names)
        except _Flaw as e:
            flaws.append(f"{folder.name}/{e}")
            print0(f"warning: {folder}/{e}; FALLING BACK to the checkpoint before it")
            continue
        if flaws:
            print0(f"warning: using {folder} instead of {len(flaws)} newer, damaged checkpoint(s)")
        return found
    if flaws:
        raise SystemExit(f"error: {out_dir}: none of {len(flaws)} checkpoints verifies ({flaws[0]}): restore "
                         "one, or move them away to start from scratch")


def load_checkpoint(path, names=None):
    """({file: {key: CPU Tensor}}, manifest) of a step or shipped folder, or of a run's newest good step.

    names: files to read, those of them that exist, e.g. ("ema", "model"); None = all. Nothing is unpickled.
    SystemExit naming the file for any flaw of a folder that was named; a run folder falls back to an earlier
    step, loudly.
    """
    path = Path(path)
    names = (names,) if isinstance(names, str) else names
    if not path.is_dir():
        raise SystemExit(f"error: {path}: no such folder: give a run folder, a step_* in it or a shipped one")
    if (path / "manifest.json").exists() or _STEP.fullmatch(path.name):
        try:
            return _read(path, names)
        except _Flaw as e:
            raise SystemExit(f"error: {path}/{e}: use another checkpoint or copy this one again") from None
    found = _newest(path, names)
    if found is None:
        raise SystemExit(f"error: {path}: holds neither manifest.json nor step_* folders: give a folder "
                         "that a train script wrote")
    return found[1:]


def load_latest(out_dir):
    """(tensors, manifest) to resume from, or None if nothing was saved. All ranks call it, and agree.

    SystemExit if there are checkpoints and none verifies: starting from scratch is for the user to decide.
    """
    found = None

    def find():
        nonlocal found
        found = _newest(out_dir)
        return found and found[0].name

    name = _on_first_rank(find)
    if name is None:
        return None
    tensors, manifest = found[1:] if found else load_checkpoint(Path(out_dir) / name)
    if any(file.startswith("dcp/") for file in manifest["files"]):
        raise SystemExit(f"error: {out_dir}: {name} was saved by a sharded run: resume with --fsdp True")
    return tensors, manifest


def find_latest(out_dir):
    """(folder, manifest) of what a sharded run resumes from, verified and not loaded; None if nothing was
    saved. All ranks call it. SystemExit as `load_latest`."""
    found = _on_first_rank(lambda: _newest(out_dir, read=_verify))
    if found is None:
        return None
    folder, files, manifest = found
    if not any(file.startswith("dcp/") for file in files):
        raise SystemExit(f"error: {out_dir}: {folder.name} was saved by a run that was not sharded: resume "
                         "without --fsdp")
    return folder, manifest


def _on_first_rank(find):
    """What find() returns on rank 0, on every rank; its SystemExit too."""
    if not (td.is_initialized() and td.get_world_size() > 1):
        return find()
    result = [None, None]
    if td.get_rank() == 0:
        try:
            result[0] = find()
        except SystemExit as e:
            result[1] = str(e)
    td.broadcast_object_list(result, device=torch.device("cuda") if td.get_backend() == "nccl" else None)
    if result[1]:
        raise SystemExit(result[1])
    return result[0]


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


SAME_RESULT = {"out", "device", "workers", "log_every", "eval_every", "eval_pairs", "sample_every", "keep",
               "save_every", "plateau_warn", "wandb", "project", "compile", "checkpointing", "dry_run"}


def warn_changed(out, manifest, now, bf16):
    """On resuming, a line for each flag (of the dict `now`) that differs from the command that began the run,
    less those that leave the result alone and those without a value of their own (None). Of --precision what
    was decided is compared, in a manifest from before that flag its bool bf16."""
    before = dict(manifest["config"])
    before["precision"] = manifest.get("precision") or PRECISION.get(before.get("bf16"))
    for key, value in (now | {"precision": PRECISION[bf16]}).items():
        if before.get(key, value) != value and value is not None and key not in SAME_RESULT:
            print0(f"warning: {out}: began with --{key} {before[key]}, goes on with {value}")


def load_state(module, tensors, what):
    """module.load_state_dict, strict; else SystemExit with one line, in which `what` names the file. A module
    on the meta device (of a dry run) stays as it is."""
    check_fit(module, tensors, what)
    if any(p.is_meta for p in module.parameters()):
        return
    module.load_state_dict({k: v for k, v in tensors.items() if k != EMA_COUNT}, strict=True)


@functools.cache  # setup() asks first: the checkout may move on while a run goes on
def git_revision():
    """Commit of the code that runs, with "+" if the tree differed from it; None outside git."""
    try:
        command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


############################################ 5. metrics ######################################################


class Metrics:
    """Means, to stdout, OUT/metrics.jsonl and W&B. Rank 0 writes. A failing logger never stops a run.

    wandb: "auto" (WANDB_MODE if set, else online with an API key, else offline), "online", "offline", "off".
    run_id: W&B id from the checkpoint (put `metrics.run_id` into its meta): a resumed run goes on there.
    resumed_from: step of that checkpoint. A row marks it, as rows of steps that are now repeated stand above.
    """

    def __init__(self, out_dir, dist, config, wandb="auto", project="feedback-editing", run_id=None,
                 resumed_from=None):
        self.out_dir, self.dist = Path(out_dir), dist
        self.run_id = run_id or secrets.token_hex(4)
        self.sums, self.counts = {}, {}
        self.file = self.run = self.wandb = None
        self.failures = 0
        if dist.rank != 0:
            return
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            self.file = open(self.out_dir / "metrics.jsonl", "a+b", buffering=0)
            if self.file.tell() and os.pread(self.file.fileno(), 1, self.file.tell() - 1) != b"\n":
                self.file.write(b"\n")  # the last row was cut off by a kill
        except OSError as e:
            print0(f"warning: {self.out_dir}/metrics.jsonl: {e.strerror}; it is not written")
        if resumed_from is not None:
            self._row({"resumed_from": resumed_from})
        self._start_wandb(wandb, project, config)

    def _start_wandb(self, mode, project, config):
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if _wandb_key() else "offline")
        if mode in ("off", "disabled"):
            return
        if mode not in ("online", "offline"):
            raise SystemExit(f"error: wandb mode: {mode}: use auto, online, offline or off")
        for mode in ("online", "offline")[mode == "offline":]:
            try:
                import wandb  # 0.6 s and 33 packages: only when it is used
                settings = wandb.Settings(silent=True, console="off", init_timeout=60, reinit="create_new")
                self.run = wandb.init(project=project, id=self.run_id, resume="allow", mode=mode,
                                      config=config, dir=self.out_dir, settings=settings)
                self.run.define_metric("trainer/step")
                self.run.define_metric("*", step_metric="trainer/step")
                self.wandb = wandb
                where = self.run.url if mode == "online" else Path(self.run.dir).parent  # for `wandb sync`
                print0(f"wandb: {mode}, id {self.run_id}, {where}")
                return
            except Exception as e:  # no package, no key, no network, no space: none of them is worth a run
                instead = "offline" if mode == "online" else "without it"
                print0(f"warning: wandb {mode} failed ({one_line(e)}), going on {instead}")
                self.run = None

    def add(self, **values):
        """Add tensors (every element counts) or floats. Sums stay on the device: no synchronisation."""
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                self.counts[name] = self.counts.get(name, 0) + value.numel()
                value = value.detach().sum(dtype=torch.float64)
            else:
                self.counts[name] = self.counts.get(name, 0) + 1
            self.sums[name] = self.sums.get(name, 0.0) + value

    def add_where(self, chosen, **values):
        """Add the elements of tensors where `chosen`, bool of their shape, is true; they are counted on the
        device."""
        for name, value in values.items():
            value = torch.where(chosen, value.detach(), 0).sum(dtype=torch.float64)
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + chosen.sum()

    def flush(self, step, extra={}):
        """{name: mean over ranks and elements since the last flush} | extra (rank 0's, not reduced).

        Every rank calls it. Ranks may have added different names. NaN is kept here, null in metrics.jsonl.
        """
        names = list(self.sums)
        if self.dist.world > 1:
            everyone = [None] * self.dist.world
            td.all_gather_object(everyone, names)
            names = names if all(n == names for n in everyone) else sorted(set().union(*everyone))
        like = {"dtype": torch.float64, "device": self.dist.device}
        table = torch.zeros(2, len(names), **like)
        for n, column in zip(names, table.unbind(1)):
            column[0], column[1] = self.sums.get(n, 0.0), self.counts.get(n, 0)
        if self.dist.world > 1 and names:
            td.all_reduce(table)
        row = {n: total / count for n, total, count in zip(names, *table.tolist()) if count}
        row |= {k: v.item() if isinstance(v, torch.Tensor | np.generic) else v for k, v in extra.items()}
        self.sums, self.counts = {}, {}
        if self.dist.rank == 0:
            shown = [f"| {k} {v:.4g}" if isinstance(v, float) else f"| {k} {v}" for k, v in row.items()]
            print0(f"step {step:6d}", *shown[:10])
            self._row({"step": step, "time": round(time.time(), 1), **row})
            self._log({"trainer/step": step, **row})  # never step=: W&B drops rows of earlier steps
        return row

    def images(self, step, pictures):
        """{key: PIL picture} to OUT/images/step_STEP_KEY.png and to W&B, on rank 0."""
        if self.dist.rank != 0:
            return
        for key, picture in pictures.items():
            try:
                key = re.sub(r"[^A-Za-z0-9_.-]+", "_", key)
                path = self.out_dir / "images" / f"step_{step:08d}_{key}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
            except OSError as e:
                print0(f"warning: {path}: {one_line(e)}; the picture is not saved")
        if self.run:
            self._log({"trainer/step": step}, pictures)

    def _row(self, row):
        if self.file:
            try:
                self.file.write((json.dumps(_no_nan(row), default=str, allow_nan=False) + "\n").encode())
            except OSError as e:
                print0(f"warning: {self.out_dir}/metrics.jsonl: {e.strerror}; a row is lost")

    def _log(self, row, pictures={}):
        if not self.run:
            return
        try:
            self.run.log(row | {k: self.wandb.Image(p, file_type="jpg") for k, p in pictures.items()})
            self.failures = 0
        except Exception as e:  # a full disk raises OSError here, out of the middle of a training step
            self.failures += 1
            if self.failures == 1:
                print0(f"warning: wandb.log failed ({one_line(e)}), going on")
            if self.failures == 5:
                print0("warning: wandb.log failed 5 times in a row, going on without it")
                self.run = None

    def close(self):
        """Finish W&B and close the file."""
        if self.run:
            try:
                self.run.finish()
            except Exception as e:
                print0(f"warning: wandb.finish failed ({one_line(e)})")
        if self.file:
            self.file.close()
        self.run = self.file = None


def _wandb_key():
    """Whether W&B could log in without asking: it would wait for an answer on a terminal."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def one_line(e):
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]


def _no_nan(value):
    if isinstance(value, dict):
        return {k: _no_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_no_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


############################################ 6. pictures #####################################################


def to_pil(picture):
    """PIL RGB from a PIL picture, a float tensor [3, H, W] in [-1, 1] or a mask [1, H, W] in [0, 1]."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    x = picture.detach().float().cpu()
    x = x.expand(3, -1, -1) if x.shape[0] == 1 else (x + 1) / 2
    x = (x.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(x.permute(1, 2, 0).contiguous().numpy())


def contact_sheet(rows, titles, row_titles=None, scale=None, smooth=False):
    """One PIL picture from rows of what `to_pil` takes, or None for an empty cell.

    titles: one per column. row_titles: one per row, wrapped, at the left. scale: integer magnification; None
    brings pictures of at most 64 px to about 128. smooth: Lanczos; nearest shows the pixels as they are.
    """
    pictures = [[None if p is None else to_pil(p) for p in row] for row in rows]
    longest = max([1] + [max(p.size) for row in pictures for p in row if p])
    if scale is None:
        scale = 128 // longest if longest <= 64 else 1
    how = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    pictures = [[p and p.resize((p.width * scale, p.height * scale), how) for p in row] for row in pictures]
    n = max([len(titles)] + [len(row) for row in pictures])
    font, line, gap = ImageFont.load_default(size=14), 18, 8
    widths = [max([84] + [row[c].width for row in pictures if c < len(row) and row[c]]) for c in range(n)]
    titles = list(titles) + [""] * (n - len(titles))
    heads = [_wrap(str(t), font, w + gap - 2, 3) for t, w in zip(titles, widths)]
    left = 176 if row_titles else 0
    sides = [_wrap(str(t), font, left - gap, 12) for t in row_titles or []] + [[]] * len(pictures)
    heights = [max([line * len(s)] + [p.height for p in row if p]) for row, s in zip(pictures, sides)]
    top = gap + line * max([len(h) for h in heads] + [0])
    size = gap + left + sum(w + gap for w in widths), top + gap + sum(h + gap for h in heights)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    x0 = gap + left
    for head, w in zip(heads, widths):
        for i, text in enumerate(head):
            place = x0 + w / 2, top - line * (len(head) - i)
            draw.text(place, text, fill="#202020", font=font, anchor="ma")
        x0 += w + gap
    y = top + gap // 2
    for row, side, h in zip(pictures, sides, heights):
        for i, text in enumerate(side):
            draw.text((gap, y + line * i), text, fill="#202020", font=font)
        x = gap + left
        for p, w in zip(row, widths):
            if p:
                sheet.paste(p, (x + (w - p.width) // 2, y))
            x += w + gap
        y += h + gap
    return sheet


def _wrap(text, font, width, limit):
    """Lines of `text` that fit `width` pixels, at most `limit` of them."""
    text = "".join(c if c.isprintable() else " " for c in text.encode("utf-8", "replace").decode())[:400]
    lines, current = [], ""
    for word in text.split():
        while font.getlength(word) > width and len(word) > 1:  # a word wider than the column is cut
            cut = max(k for k in range(1, len(word)) if k == 1 or font.getlength(word[:k]) <= width)
            lines, current, word = lines + ([current] if current else []) + [word[:cut]], "", word[cut:]
        joined = f"{current} {word}".strip()
        if font.getlength(joined) <= width:
            current = joined
        else:
            lines, current = lines + [current], word
    lines += [current] if current else []
    return lines if len(lines) <= limit else lines[:limit - 1] + [lines[limit - 1] + " ..."]
