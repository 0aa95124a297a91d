"""Sharded training: FSDP2 over the blocks that train, and checkpoints that resume on another number of ranks.

    1. shard: who holds what            2. optimiser groups, gradient norm, gathering
    3. checkpoints: weights as ever, for samplers; the optimiser's state through torch.distributed.checkpoint

A script calls these in place of net.to(device), clip_grad_norm_, save_checkpoint and load_latest; the rest of
it (EMA, average_gradients, Verdict, the resumable data) knows shards. Needs torchrun, also for one rank.
"""
import json
import pickle
import shutil
import struct
import warnings
from pathlib import Path

import torch
import torch.distributed as td
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import common

########################################## 1. who holds what #################################################


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
    if any(".parametrizations." in name for name, _ in net.named_parameters()):
        raise SystemExit("error: --fsdp: a low-rank update is small, and what it updates is replicated: "
                         "leave out one of the two")
    if getattr(net, "cached", False):  # FSDP2 sees what a block is given and returns, not what it hands aside
        raise SystemExit("error: --fsdp: keys and values that --cached keeps pass FSDP2 by: leave out one of "
                         "the two")
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


################################### 2. optimiser groups, gradient norm #######################################


def split_groups(groups):
    """Optimiser groups, those of shards apart: a fused or foreach step does not take both kinds at once."""
    parts = [{**g, "params": [p for p in g["params"] if common.is_sharded(p) == sharded]}
             for g in groups for sharded in (True, False)]
    return [g for g in parts if g["params"]]


@torch.no_grad()
def clip_grad_norm(params, limit):
    """torch.nn.utils.clip_grad_norm_ for parameters sharded or not -> the global norm, on every rank."""
    params = [p for p in params if p.grad is not None]
    if not any(common.is_sharded(p.grad) for p in params):
        return torch.nn.utils.clip_grad_norm_(params, limit)
    shards = [common.local(p.grad) for p in params if common.is_sharded(p.grad)]
    whole = [p.grad for p in params if not common.is_sharded(p.grad)]
    squares = torch.nn.utils.get_total_norm(shards).square()
    td.all_reduce(squares)
    norm = (squares + torch.nn.utils.get_total_norm(whole).to(squares).square()).sqrt()
    torch._foreach_mul_(shards + whole, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def gathered(tensors):
    """(name, whole tensor) of a state dict, one after the other. All ranks run through it together."""
    for name, t in tensors.items():
        yield name, (t.full_tensor() if common.is_sharded(t) else t).detach()


########################################## 3. checkpoints ####################################################
# OUT/step_N as common.py writes it, with dcp/ in place of optimizer.safetensors. Every rank writes its shards
# there, so OUT must be a folder that all nodes see.


def save_checkpoint(out_dir, step, tensors, optimizer, meta, keep=2, dist=common.Dist()):
    """common.save_checkpoint of a sharded run: the same folder, promises and answer. All ranks call it.

    tensors: file -> {key: tensor, sharded or not}, gathered and written one tensor at a time: rank 0 holds no
    more than one of them whole. optimizer: its state goes to dcp/, each rank's own shards.
    """
    folder = Path(out_dir) / f"step_{step:08d}"
    tmp, state = common.temporary(folder), common.optimizer_tensors(optimizer)
    size = sum(t.nbytes for group in (*tensors.values(), state) for t in group.values())
    files, first = {}, dist.rank == 0
    flaw = _attempt(dist, lambda: first and common.begin_checkpoint(folder, size))
    for name, group in tensors.items():
        if not flaw:
            def write():
                entry = write_gathered(tmp / f"{name}.safetensors", group, first)
                files.update({f"{name}.safetensors": entry} if first else {})
            flaw = _attempt(dist, write)
    if not flaw:
        flaw = _attempt(dist, lambda: dcp.save(state, storage_writer=_Writer(tmp / "dcp")))
    if not flaw:
        def sign():
            mine = [tmp / "dcp" / ".metadata"] * first + list((tmp / "dcp").glob(f"__{dist.rank}_*.distcp"))
            files.update({f"dcp/{path.name}": _entry(path) for path in mine})
        flaw = _attempt(dist, sign)
    if not flaw:
        signed = [None] * dist.world
        td.all_gather_object(signed, files)
        files = {name: entry for part in signed for name, entry in part.items()}

        def finish():
            if first:
                common.fsync(tmp / "dcp")
                common.finish_checkpoint(folder, step, files, meta, dist.world)
                if keep:
                    common.prune(folder, step, keep)
        flaw = _attempt(dist, finish)
    if flaw:
        if first:
            shutil.rmtree(tmp, ignore_errors=True)
        common.print0(f"warning: checkpoint {folder} not saved ({flaw}); training goes on")
    return None if flaw else folder


def _attempt(dist, act):
    """act() on every rank -> what went wrong with a file on any of them, on all; "" if nothing did."""
    flaw = ""
    try:
        act()
    except (OSError, dcp.api.CheckpointException) as e:
        if isinstance(e, dcp.api.CheckpointException):  # on all ranks alike: {rank: (error, traceback)}
            e = next(iter(e.failures.values()))[0]
        flaw = common.one_line(e)
    everyone = [None] * dist.world
    td.all_gather_object(everyone, flaw)
    return next((f for f in everyone if f), "")


NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
         torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


def write_gathered(path, tensors, first):
    """A safetensors file of tensors that may be sharded. All ranks call it; the first writes -> its bytes and
    SHA-256. OSError comes at the end: the other ranks must not wait for this one in the middle."""
    order = sorted(tensors, key=lambda k: (-tensors[k].element_size(), k))  # wide first: all are aligned
    header, end = {}, 0
    for key in order:
        t = tensors[key]
        header[key] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    error, file = None, None
    for block in (None, *gathered({k: tensors[k] for k in order})):
        if not first or error:
            continue
        try:
            if block is None:
                file = open(path, "wb")
                file.write(struct.pack("<Q", len(text)) + text)
            else:
                file.write(block[1].cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        except OSError as e:
            error = e
    if file:
        file.close()
    if error:
        raise error
    if first:
        common.fsync(path)
        return _entry(path)


def _entry(path):
    return {"bytes": path.stat().st_size, "sha256": common.sha256(path)}


@torch.no_grad()
def load_checkpoint(folder, net, ema, optimizer):
    """Into net, ema and optimizer what `save_checkpoint` wrote to the folder that common.find_latest found,
    on any number of ranks: each reads its own rows. -> {file: tensors} of the further files."""
    _load_rows(folder / "model.safetensors", net.state_dict(), net)
    averages = ema.state_dict()
    _load_rows(folder / "ema.safetensors", averages, net)
    ema.n.copy_(averages[common.EMA_COUNT])

    reader = _Reader(folder / "dcp")
    params, state = [p for g in optimizer.param_groups for p in g["params"]], {}
    for key, stored in reader.read_metadata().state_dict_metadata.items():
        i = int(key.split(".", 1)[0])
        if i >= len(params) or stored.size and stored.size != params[i].shape:
            raise SystemExit(f"error: {folder}/dcp: {key} {list(stored.size)}: is of other parameters, "
                             "resume with the checkpoint's architecture, or start in a new folder")
        dtype = stored.properties.dtype
        state[key] = torch.empty_like(params[i], dtype=dtype) if stored.size else torch.empty((), dtype=dtype)
    dcp.load(state, storage_reader=reader)
    common.load_optimizer_tensors(optimizer, state)
    rest = set(folder.glob("*.safetensors")) - {folder / "model.safetensors", folder / "ema.safetensors"}
    return {path.stem: load_file(path) for path in sorted(rest)}


def _load_rows(path, targets, net):
    """This rank's rows of a file into tensors, sharded (by rows, as torch.chunk cuts them) or not."""
    with safe_open(path, "pt") as f:
        shapes = {k: torch.empty(f.get_slice(k).get_shape(), device="meta") for k in f.keys()}
        common.check_fit(net, shapes, path)
        for key, t in targets.items():
            if not common.is_sharded(t):
                t.copy_(f.get_tensor(key))
                continue
            rows = -(-len(t) // t.device_mesh.size())
            start = min(t.device_mesh.get_local_rank() * rows, len(t))
            if start < len(t):
                common.local(t).copy_(f.get_slice(key)[start:start + rows])


class _Writer(FileSystemWriter):
    def storage_meta(self):
        return None  # the path that it was written at, which says nothing once it was renamed


class _Reader(FileSystemReader):
    """DCP unpickles .metadata: this lets nothing through but the classes that it is made of."""

    def read_metadata(self, *args, **kwargs):
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as f:
                _Unpickler(f).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as e:
            raise SystemExit(f"error: {path}: {e}: this is not what torch.distributed.checkpoint "
                             "writes: do not use this folder") from None
        return super().read_metadata(*args, **kwargs)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        found = super().find_class(module, name) if "." not in name else None
        ours = module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        if (ours and isinstance(found, type) and found.__module__ == module or found is torch.Size
                or isinstance(found, torch.dtype) or (module, name) in PLAIN):
            return found
        raise pickle.UnpicklingError(f"names {module}.{name}")


PLAIN = {("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}
