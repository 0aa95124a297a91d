"""Checkpoints: save, resume and load, of runs on one device or sharded over many.

    OUT/step_00001000/    {model,ema,optimizer,...}.safetensors and manifest.json

The manifest is written last, with the SHA-256 of every file and of itself: a checkpoint is a folder that
verifies, anything else is debris. Nothing is pickled. The files are the same for any number of ranks, sharded
or not, so a run may go on with another number of them, and with or without --fsdp.

    state = {"model": net, "ema": ema, "optimizer": opt}
    if found := checkpoint.resume(cfg.out, state, net.arch):
        step = found["step"]
    ...
    saved = checkpoint.save(cfg.out, step, state, meta, cfg.keep, dist)
"""

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import socket
import stat
import struct
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as td
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

import model
from common import (
    EMA,
    EMA_COUNT,
    PRECISION,
    Dist,
    bits,
    check_fit,
    gathered,
    git_revision,
    is_sharded,
    local,
    one_line,
    print0,
)
from log import portable

_STEP = re.compile(r"step_(\d+)(\.old)?")  # .old: set aside while its replacement takes its name
_FILE = re.compile(r"[\w.-]+\.safetensors|dcp/(\.metadata|[\w-]+\.distcp)")  # dcp/: of sharded runs of old
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
         torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
         torch.bool: "BOOL"}  # safetensors' own


class _Flaw(Exception):
    """What is wrong with a checkpoint folder: "FILE: PROBLEM"."""


########################################## 1. what is kept ###################################################


def tensors_of(state):
    """file -> {key: tensor, sharded or not}, from file -> module, EMA, optimiser or such a dict.

    Samplers know nothing of low-rank updates: with these, "model" and "ema" are merged into plain weights,
    and "lora" and "lora_ema" hold the factors, and whatever else trains, to resume from.
    """
    out = {name: optimizer_tensors(x, _owner(state, name)) if isinstance(x, torch.optim.Optimizer)
           else x if isinstance(x, dict) else x.state_dict() for name, x in state.items()}
    net, ema = state.get("model"), state.get("ema")
    if _has_lora(net):
        names = {n for n, p in net.named_parameters() if p.requires_grad}
        out["lora"] = {k: v for k, v in out["model"].items() if k in names}
        out["lora_ema"] = {k: v for k, v in out["ema"].items() if k in names or k == EMA_COUNT}
        out["model"] = model.merged_state(net)
        with ema.swapped():
            out["ema"] = model.merged_state(net)
    return out


def _has_lora(net):
    return isinstance(net, torch.nn.Module) and any(".parametrizations." in n for n, _ in
                                                    net.named_parameters())


def frozen_bits(net):
    """common.bits of what a run with low-rank updates takes from its base again when it resumes, since it
    does not keep it; None without them. For meta["frozen"] and `resume`."""
    if not _has_lora(net):
        return None
    return bits(net, {n for n, p in net.named_parameters() if p.requires_grad})


def _owner(state, name):
    """The module whose parameters an optimiser moves: "model" for "optimizer", X for "X_optimizer"."""
    return state[name.removesuffix("optimizer").removesuffix("_") or "model"]


def _names(opt, net):
    """Parameter -> name, in the order of the optimiser's groups."""
    known = {id(p): n for n, p in net.named_parameters()}
    return {p: known[id(p)] for g in opt.param_groups for p in g["params"]}


def optimizer_tensors(opt, net):
    """The optimiser's state: "PARAMETER.KEY" -> tensor. Learning rates are not state."""
    flat = {}
    for p, name in _names(opt, net).items():
        for key, value in opt.state.get(p, {}).items():
            if value is not None:  # SGD's empty momentum
                value = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
                flat[f"{name}.{key}"] = value
    return flat


def load_optimizer_tensors(opt, net, tensors):
    """Restore what `optimizer_tensors` gave, exactly. SystemExit if it belongs to other parameters."""
    params = list(_names(opt, net))
    place, state = {name: i for i, name in enumerate(_names(opt, net).values())}, {}
    for entry, value in tensors.items():
        name, key = entry.rsplit(".", 1)
        i = int(name) if name.isdigit() else place.get(name, -1)  # checkpoints of old counted parameters
        if not 0 <= i < len(params) or value.dim() and value.shape != params[i].shape:
            raise SystemExit(f"error: optimizer state: {entry} {list(value.shape)}: is of other parameters: "
                             "resume with the checkpoint's architecture, or start in a new folder")
        state.setdefault(i, {})[key] = value.clone()  # load_state_dict would alias it
        if value.dtype not in (torch.float32, torch.float64) or not local(value).isfinite().all():
            raise SystemExit(f"error: optimizer state: {entry}: {value.dtype}, or not finite: resume with a "
                             "run's own checkpoint, or start in a new folder")
    names = list(place)
    for i, x in state.items():  # of Adam and Muon, whole
        whole = {"step", "momentum"} if "momentum" in x else {"step", "exp_avg", "exp_avg_sq"}
        if (lacks := whole - x.keys()) and x.keys() & {"momentum", "exp_avg", "exp_avg_sq"}:
            raise SystemExit(f"error: optimizer state: {names[i]} has no {', '.join(sorted(lacks))}: resume "
                             "with a run's own checkpoint, or start in a new folder")
    fresh = [n for i, n in enumerate(names) if i not in state]
    if len(fresh) > len(names) / 10:  # a parameter that nothing reads has none, as the last text norms of SD3
        print0(f"warning: optimizer state: {len(fresh)} of {len(names)} parameters have none ({fresh[0]} "
               "first), as if they had never moved")
    opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})


########################################## 2. saving #########################################################


def check_writable(out_dir):
    """SystemExit if no file can be made in `out_dir`, which is created; a full disk is not noticed here."""
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out_dir).close()
    except OSError as e:
        raise SystemExit(f"error: --out: {out_dir}: cannot be written ({e.strerror}): give another folder "
                         "or correct its permissions") from None


_locks = {}  # folder -> its open lock file: as long as it is open the folder is this process's


def claim(out_dir):
    """A run folder, created, belongs to this process until it ends, however it ends; all ranks call it.
    SystemExit if no file can be made there, or if another run has it.

    The lock is the kernel's, on OUT/run.lock, whose content only says who: a crashed run leaves none behind,
    and data workers do not inherit it. NFS passes it to its server; where a disk cannot lock a line says so.
    """
    _on_first_rank(lambda: _claim(Path(out_dir)))


def _claim(out):
    check_writable(out)
    path = os.path.realpath(out / "run.lock")
    if path in _locks:
        return
    try:
        file = open(path, "a+b", buffering=0)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EAGAIN):
            with contextlib.suppress(OSError):
                file.seek(0)
            who = file.read(200).decode("utf-8", "replace") or "unknown"
            raise SystemExit(f"error: --out: {out}: another run writes there ({one_line_of(who)}): give "
                             "another folder, or end that run") from None
        print0(f"warning: --out: {out}: cannot be locked there ({e.strerror}): see to it that no other run "
               "writes to it")
        return
    _locks[path] = file
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def one_line_of(text):
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def save(out_dir, step, state, meta, keep=2, dist=Dist()):
    """Write OUT/step_STEP, then delete all but the `keep` newest (0: none). All ranks call it, rank 0 writes.

    SystemExit if a weight is not finite. After a step that was not finite (Verdict.bad) trainers call this at
    their end only, with keep=0: the checkpoints there may be the last good ones.
    state: as for `tensors_of`. meta: JSON-able; its arch, config, precision and samples become entries of the
    manifest itself, the rest stands under "meta". Returns the folder on every rank, or None after one printed
    line when the disk is full or failing: training goes on, and the caller counts failures in a row.
    """
    folder = Path(out_dir) / f"step_{step:08d}"
    tensors = tensors_of(state)
    for pause in (1, 2, None):
        flaw, full = "", False
        try:
            write(folder, step, tensors, meta, dist)
            if keep and dist.rank == 0:
                prune(folder, step, keep)
        except (OSError, SafetensorError, _Flaw) as e:
            full = getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            flaw = f"!{e}" if isinstance(e, _Flaw) else one_line(e)
        flaw, full = _from_first_rank((flaw, full), dist)
        if flaw.startswith("!"):
            raise SystemExit(f"error: {out_dir}: step {step}: {flaw[1:]}: not saved: lower --lr; the same "
                             "command goes on from the checkpoint before")
        if not flaw:
            return folder
        if pause is None or full:
            print0(f"warning: checkpoint {folder} not saved ({flaw}); training goes on")
            return None
        time.sleep(pause)


def write(folder, step, tensors, meta, dist=Dist()):
    """Write one checkpoint folder, assets/ too: .tmp folder, fsync, rename. Errors leave nothing behind.

    tensors: file -> {key: tensor}. Sharded ones are gathered one at a time, so that rank 0 holds no more than
    one of them whole; all ranks call it. What fails on rank 0 is raised at the end, for the other ranks must
    not wait for it amid the gathering.
    """
    folder, files, error = Path(folder), {}, None
    tmp = folder.with_name(folder.name + ".tmp")

    def first(act, *args):
        nonlocal error
        if dist.rank == 0 and error is None:
            try:
                return act(*args)
            except (OSError, _Flaw) as e:
                error = e

    def put(key, file, value):
        if value.is_floating_point() and not value.isfinite().all():
            raise _Flaw(f"{file.name.rsplit('/', 1)[-1]}: {key} is not finite")
        file.write(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    try:
        first(begin, tmp, sum(t.nbytes for group in tensors.values() for t in group.values()))
        for name, group in tensors.items():
            path = tmp / f"{name}.safetensors"
            order = sorted(group, key=lambda k: (-group[k].element_size(), k))  # wide first: all are aligned
            with contextlib.ExitStack() as stack:
                file = first(open, path, "wb")
                if file:
                    stack.callback(first, file.close)
                    first(file.write, _header(group, order))
                for key, value in gathered({k: group[k] for k in order}):
                    first(put, key, file, value)
            files[path.name] = first(_signed, path)
        first(finish, folder, tmp, step, files, meta, dist.world)
        if error:
            raise error
    except BaseException:
        if dist.rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        raise
    return folder


def begin(tmp, size):
    """Make the empty temporary folder for `size` bytes of tensors. OSError if the disk has no room."""
    tmp.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(tmp, ignore_errors=True)
    need, free = 1.1 * size + 2**16, shutil.disk_usage(tmp.parent).free
    if free < need:
        raise OSError(errno.ENOSPC, f"needs {need / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free")
    tmp.mkdir()


def _header(group, order):
    """Length and JSON table with which a safetensors file of these keys begins."""
    table, end = {}, 0
    for key in order:
        t = group[key]
        table[key] = {"dtype": NAMES[t.dtype], "shape": list(t.shape),
                      "data_offsets": [end, end + t.numel() * t.element_size()]}
        end = table[key]["data_offsets"][1]
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _signed(path):
    """The manifest's entry of a file that was written, which is on the disk from here on."""
    fsync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def finish(folder, tmp, step, files, meta, world):
    """Add the manifest to the temporary folder, whose files (name -> bytes, sha256) are on the disk, then
    give it its name."""
    old = folder.with_name(folder.name + ".old")
    lifted = {k: meta[k] for k in ("arch", "config", "precision", "samples") if k in meta}
    if "config" in lifted:  # which only says how it was made
        lifted["config"] = portable(lifted["config"])
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    rest = {k: v for k, v in meta.items() if k not in lifted}
    if "stack" in rest:  # which is read, from wherever
        rest["stack"] = kept_places(rest["stack"], folder)
    manifest = {"format": 1, "step": step, **lifted, "files": files, "torch": torch.__version__,
                "world": world, "git": git_revision(), "time": now, "meta": rest}
    manifest = json.loads(json.dumps(manifest, default=str), parse_constant=lambda text: None)  # as it will
    # be read, for the hash; statistics that are no numbers become null
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


PLACES = ("sd3", "tokenizers")  # the paths in meta.stack


def kept_places(stack, folder):
    """meta.stack as the manifest of a checkpoint `folder` keeps it, without names of users where that can be.

    A path is relative to the run folder if it is below the one that holds this, or if both are below the
    folder that the script was started in; else it begins with ~ if it is below the home folder; else it
    stays, absolute.
    """
    run, home = _run_folder(folder), Path(os.path.expanduser("~"))
    roots = [r for r in (run.parent, Path.cwd()) if len(r.parts) > 1 and r not in home.parents]

    def kept(path):
        path = Path(os.path.abspath(path))
        if any(path.is_relative_to(r) and run.is_relative_to(r) for r in roots):
            return os.path.relpath(path, run)
        below_home = len(home.parts) > 1 and path.is_relative_to(home)
        return f"~/{path.relative_to(home)}" if below_home else str(path)

    return {k: kept(v) if k in PLACES and v else v for k, v in stack.items()}


def found_places(stack, path):
    """What `kept_places` kept, of a manifest below `path` (as for `load`), as absolute paths. Relative ones
    are sought in the run folder; then in the current one, for manifests of old kept what a flag said."""
    run = _run_folder(path)

    def found(text):
        beside = os.path.normpath(run / os.path.expanduser(text))
        return os.path.abspath(text) if os.path.exists(text) and not os.path.exists(beside) else beside

    return {k: found(v) if k in PLACES and v else v for k, v in stack.items()}


def _run_folder(folder):
    folder = Path(os.path.realpath(folder))
    return folder.parent if _STEP.fullmatch(folder.name) else folder


def count_lost(out, saved, lost, last):
    """Checkpoints running that `save` could not write (it returned None): 0 if `saved`, else one
    more than `lost`. SystemExit at the third, or when there is no later one to hope for (`last`)."""
    lost = 0 if saved else lost + 1
    if lost and (last or lost == 3):
        raise SystemExit(f"error: {out}: {lost} checkpoint(s) running were not saved: see above (free some "
                         "space, or lower --lr), then the same command resumes")
    return lost


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


def identity(path):
    """"NAME@12 hex digits": the last name of `path` and what weights are read there, of a step or shipped
    folder, a run's newest step, a public file or folder. Retrained weights in an old place are others.
    SystemExit if there is nothing."""
    path = Path(os.path.normpath(path))
    if not path.exists():
        raise SystemExit(f"error: {path}: no such folder or file: give a run folder, a step_* folder in one, "
                         "a folder of assets/, or public weights")
    try:
        if (path / "manifest.json").exists() or _STEP.fullmatch(path.name):
            manifest = read_manifest(path)
        else:
            found = path.is_dir() and _newest(path, read=lambda folder, _: (read_manifest(folder),))
            manifest = found[1] if found else None
    except _Flaw as e:
        raise SystemExit(f"error: {path}/{e}: use another checkpoint or copy this one again") from None
    if manifest:
        sums = {name: file["sha256"] for name, file in manifest["files"].items()
                if not name.startswith("optimizer")}
        sums["shared"] = manifest["meta"].get("shared", {}).get("sha256")  # of an EditNet: its base
    else:
        kinds = (".safetensors", ".bin", ".pt", ".pth")
        files = sorted(f for f in path.rglob("*") if f.suffix in kinds and f.is_file()) or [path]
        if path.is_dir() and files == [path]:
            raise SystemExit(f"error: {path}: holds no weights: give a folder with {', '.join(kinds)} files")
        sums = {str(file.relative_to(path)): sha256(file) for file in files}
    return f"{path.name}@{hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:12]}"


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


def _from_first_rank(value, dist):
    """Rank 0's value on every rank."""
    if dist.world == 1:
        return value
    box = [value]
    td.broadcast_object_list(box, device=dist.device if dist.device.type == "cuda" else None)
    return box[0]


########################################## 3. reading ########################################################


MOST_BYTES = 64 * 2**20  # of a manifest; a tokenizer's JSON is a few megabytes of it
BUILT = {  # kind of arch -> (fields that are numbers, at least 1), (those at least 0), how many values it has
    "editor": (("depth", "heads", "head_dim", "patch", "channels", "pos_max", "txt_dim", "vec_dim"),
               ("dual", "refine", "txt_bytes"),
               lambda depth=4, heads=3, head_dim=64, patch=4, channels=3, pos_max=32, txt_dim=192,
               vec_dim=192, dual=0, refine=0, txt_bytes=128:
               (depth * heads * head_dim + pos_max**2 + txt_dim + vec_dim + 3 * channels * patch**2)
               * heads * head_dim + 9 * refine * (refine + 2 * channels) + (txt_bytes + txt_dim) * txt_dim),
    "reward": (("image_size", "patch", "vit_width", "vit_depth", "vit_heads", "txt_width", "txt_depth",
                "txt_heads", "txt_hidden", "vocab", "txt_len", "positions"), (),
               lambda image_size=224, patch=16, vit_width=1024, vit_depth=24, vit_heads=16, txt_width=768,
               txt_depth=12, txt_heads=12, txt_hidden=3072, vocab=30524, txt_len=35, positions=512:
               (vit_depth * vit_width + (image_size // patch)**2 + 3 * patch**2) * vit_width
               + (txt_depth * (txt_width + txt_hidden) + vocab + positions) * txt_width),
    "coherence": (("pos_side", "patch", "width", "depth", "heads"), (),
                  lambda pos_side=8, patch=4, width=128, depth=4, heads=4:
                  (depth * width + pos_side**2 + 4 * patch**2) * width)}
BUILT["scorer"] = BUILT["reward"]


def read_bounded(path, most):
    """Bytes of a regular file of at most so many; OSError else: no FIFO, device or folder is waited for."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(fd, "rb") as f:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, "no regular file")
        if about.st_size > most:
            raise OSError(errno.EFBIG, f"{about.st_size:,} bytes are more than {most:,}")
        return f.read(most + 1)


def parse_json(raw):
    """JSON of finite numbers; ValueError else, RecursionError where it is nested deeper than Python goes."""
    def refuse(text):
        raise ValueError(f"{text} is no number")

    found = json.loads(raw, parse_constant=refuse, parse_int=_whole)
    _finite(found)
    return found


def _whole(text):
    if len(text) > 20:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _finite(value):
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is not finite")
    for v in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _finite(v)


def _cut(value):
    return repr(str(value)[:40])


def _need(holds, what):
    if not holds:
        raise _Flaw(f"manifest.json: {what}")


def _is_whole(value, low, high):
    return type(value) is int and low <= value <= high


def read_manifest(folder):
    """The manifest of a checkpoint folder, every field of which has its type and bounds; _Flaw else.

    Its own hash proves no more than that it is whole: whoever writes a file can write a hash. What is read of
    it later is checked here, the format first, for a later one may have other fields.
    """
    try:
        m = parse_json(read_bounded(Path(folder) / "manifest.json", MOST_BYTES))
    except OSError as e:
        raise _Flaw(f"manifest.json: cannot be read ({e.strerror}; a save that was cut off, or no checkpoint)"
                    ) from None
    except (ValueError, RecursionError) as e:
        raise _Flaw(f"manifest.json: damaged ({one_line(e)[:80]})") from None
    _need(isinstance(m, dict), "damaged (no table)")
    _need("format" in m, "damaged (has no format)")
    _need(m["format"] == 1 and type(m["format"]) is int, f"format {_cut(m['format'])}, this code reads 1: "
          "use the version that wrote it")
    missing = [k for k in ("step", "files", "meta", "sha256") if k not in m]
    _need(not missing, f"damaged (has no {', '.join(missing)})")
    _need(m["sha256"] == _manifest_hash(m), "was changed after it was written")
    files = m["files"]
    _need(isinstance(files, dict) and 0 < len(files) <= 4096, "files: no table of files")
    for name, entry in files.items():
        _need(len(name) < 200 and _FILE.fullmatch(name), f"files: {name[:80]!r} is no name of one")
        _need(isinstance(entry, dict) and _is_whole(entry.get("bytes"), 0, 2**50)
              and isinstance(entry.get("sha256"), str) and re.fullmatch("[0-9a-f]{64}", entry["sha256"]),
              f"files: {name}: needs bytes and sha256")
    for key, low, high in (("step", 0, 10**12), ("samples", 0, 10**18), ("world", 1, 10**6)):
        _need(key not in m or _is_whole(m[key], low, high), f"{key}: {_cut(m.get(key))} is no number "
              f"from {low} to {high:,}")
    for key in ("arch", "config", "meta"):
        _need(key not in m or isinstance(m[key], dict), f"{key}: is no table")
    for key in ("precision", "torch", "git", "time"):
        _need(isinstance(m.get(key), str | None), f"{key}: is no text")
    config, meta = m.get("config", {}), m["meta"]
    _need(config.get("image_size") is None or _is_whole(config["image_size"], 0, 2**14),
          f"config: image_size {_cut(config.get('image_size'))}")
    shift = config.get("shift")
    _need(shift is None or type(shift) in (int, float) and 0 < shift <= 10**4, f"config: shift {_cut(shift)}")
    for key in ("stack", "val", "shared", "coherence_arch"):
        _need(key not in meta or isinstance(meta[key], dict), f"meta: {key}: is no table")
    stack = meta.get("stack", {})
    for key in PLACES:
        _need(isinstance(stack.get(key), str | None) and len(stack.get(key) or "") < 4096
              and "\0" not in (stack.get(key) or ""), f"meta: stack: {key} is no path")
    _need("t5_length" not in stack or _is_whole(stack["t5_length"], 1, 512), "meta: stack: t5_length "
          f"{_cut(stack.get('t5_length'))}")
    run = meta.get("run_id")
    _need(run is None or isinstance(run, str) and re.fullmatch(r"[\w-]{1,64}", run), "meta: run_id: no name")
    if shared := meta.get("shared"):
        texts = all(isinstance(shared.get(k), str) and len(shared[k]) < 4096 for k in ("path", "prefix",
                                                                                       "sha256"))
        _need(texts and len(shared) == 3 and "\0" not in shared["path"], "meta: shared: needs path, prefix, "
              "sha256")
    weights = 4 * sum(entry["bytes"] for entry in files.values()) + 2**26
    _check_arch("arch", m.get("arch", {}), weights)
    _check_arch("meta: coherence_arch", meta.get("coherence_arch", {}), weights)
    return m


def _check_arch(where, arch, most):
    """_Flaw for sizes that cannot be, or of which a network would have far more values than the files hold
    bytes (`most`): it is built before it is filled. Names are checked by model.config_from."""
    kind = arch.get("kind")
    if kind == "editnet":
        base = arch.get("base")
        _need(isinstance(base, dict) and base.get("kind") == "editor", f"{where}: no base")
        _need(arch.get("variant") in model.VARIANTS and type(arch.get("cached")) is bool,
              f"{where}: variant {_cut(arch.get('variant'))}, cached {_cut(arch.get('cached'))}")
        return _check_arch(f"{where}: base", arch["base"], most)
    if not isinstance(kind, str) or kind not in BUILT:
        return
    positive, others, count = BUILT[kind]
    for low, names in ((1, positive), (0, others)):
        for k in names:
            _need(k not in arch or _is_whole(arch[k], low, 2**20), f"{where}: {k} {_cut(arch.get(k))} is "
                  f"no number from {low} to {2**20:,}")
    for k in ("depth", "vit_depth", "txt_depth", "dual"):
        _need(arch.get(k, 0) <= 512, f"{where}: {k} {arch.get(k)} is over 512")
    _need(arch.get("predict", "v") in ("v", "x0"), f"{where}: predict {_cut(arch.get('predict'))}")
    for k in ("learn_pos", "qk_norm", "inpaint"):
        _need(type(arch.get(k, False)) is bool, f"{where}: {k} {_cut(arch.get(k))}")
    _need(isinstance(arch.get("tokenizer", ""), str), f"{where}: tokenizer is no text")
    _need(not arch.get("refine") or arch.get("predict", "v") == "x0", f"{where}: refine without predict x0")
    for width, heads in (("vit_width", "vit_heads"), ("txt_width", "txt_heads"), ("width", "heads")):
        if isinstance(arch.get(width), int) and isinstance(arch.get(heads), int):
            _need(arch[width] % arch[heads] == 0, f"{where}: {width} {arch[width]} in {arch[heads]} heads")
    values = count(**{k: arch[k] for k in (*positive, *others) if k in arch})
    _need(values <= most, f"{where}: a network of {values:,} values and more, but the files are smaller")


def _verify(folder, names=None):
    """(files of those names, manifest) of one folder, every byte checked; raises _Flaw."""
    manifest = read_manifest(folder)
    files = {k: (v["bytes"], v["sha256"]) for k, v in manifest["files"].items()}
    if names is not None:
        names = (names,) if isinstance(names, str) else names
        files = {k: v for k, v in files.items() if k.removesuffix(".safetensors") in names}
        if not files:
            raise _Flaw(f"manifest.json: lists no file named {' or '.join(names)}")
    for file, (size, digest) in files.items():
        try:
            about = (folder / file).stat()
            if not stat.S_ISREG(about.st_mode):
                raise _Flaw(f"{file}: no regular file")
            if (found := about.st_size) != size:
                raise _Flaw(f"{file}: {found} bytes instead of {size}")
            if sha256(folder / file) != digest:
                raise _Flaw(f"{file}: SHA-256 differs from the manifest's, the file is damaged")
        except OSError as e:
            raise _Flaw(f"{file}: cannot be read ({e.strerror})") from None
    return list(files), manifest


def _read(folder, names=None, alone=False):
    """(tensors, manifest) of one folder, every byte checked; raises _Flaw. alone: weights that it leaves in
    another folder are a flaw."""
    files, manifest = _verify(folder, names)
    tensors = {}
    for file in (f for f in files if f.endswith(".safetensors")):
        try:
            tensors[file.removesuffix(".safetensors")] = load_file(folder / file)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as e:
            raise _Flaw(f"{file}: cannot be read ({getattr(e, 'strerror', None) or one_line(e)})") from None
    if shared := manifest["meta"].get("shared"):
        _need(not alone, "shares weights of a folder that shares weights")
        _add_shared(tensors, folder, **shared)
    return tensors, manifest


def _add_shared(tensors, folder, path, prefix, sha256):
    """Weights that a shipped folder leaves in another one (an EditNet's base): `path`, relative to it, must
    hold the model.safetensors of that hash; its keys are added below `prefix`."""
    weights, manifest = _read(folder / path, "model", alone=True)
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


def load(path, names=None):
    """({file: {key: CPU Tensor}}, manifest) of a step or shipped folder, or of a run's newest good step.

    names: files to read, those of them that exist, e.g. ("ema", "model"); None = all. SystemExit naming the
    file for any flaw of a folder that was named; a run folder falls back to an earlier step, loudly.
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


def latest(out_dir):
    """Folder and manifest of a run's newest checkpoint that verifies; None if nothing was saved.

    All ranks call it, and agree. SystemExit if there are checkpoints and none verifies: starting from scratch
    is for the user to decide.
    """
    found = _on_first_rank(lambda: _newest(out_dir, read=_verify))
    if found is None:
        return None
    folder, files, manifest = found
    if any(file.startswith("dcp/") for file in files):
        raise SystemExit(f"error: {out_dir}: {folder.name}: an earlier version saved its optimiser in a form "
                         "that is no longer read: begin anew from its weights, in another --out")
    return folder, manifest


def resume(out_dir, state, arch=None, frozen=None):
    """Load the newest checkpoint of a run that verifies into `state` (as for `save`, without plain dicts) ->
    its manifest; None if nothing was saved. All ranks call it; each reads its own rows of what is sharded.

    arch: of the model, refused if the checkpoint holds another. frozen: of `frozen_bits`; likewise, but
    folders of old do not say.
    """
    found = latest(out_dir)
    if found is None:
        return None
    folder, manifest = found
    again = "repeat the command that began it, or give another --out"
    manifest = {"config": {}, "samples": 0} | manifest
    if arch is not None and manifest.get("arch") != arch:
        there = manifest.get("arch") or {}
        other = [f"{k}: {there.get(k)} there, {arch.get(k)} here" for k in sorted(there.keys() | arch.keys())
                 if there.get(k) != arch.get(k)]
        raise SystemExit(f"error: {out_dir}: holds another architecture ({'; '.join(other)[:300]}): {again}")
    held = {file.removesuffix(".safetensors") for file in manifest["files"]}
    wanted = state.keys() | ({"lora", "lora_ema"} if _has_lora(state.get("model")) else set())
    if held != wanted:
        raise SystemExit(f"error: {out_dir}: holds {', '.join(sorted(held))} instead of "
                         f"{', '.join(sorted(wanted))}: {again}")
    if frozen != (was := manifest["meta"].get("frozen")) and was is not None:
        raise SystemExit(f"error: {out_dir}: its low-rank updates are of other weights than its base has "
                         "now: give the base that it began with, or another --out")
    for name, x in state.items():
        if isinstance(x, torch.optim.Optimizer):
            net = _owner(state, name)
            load_optimizer_tensors(x, net, _optimizer_rows(folder / f"{name}.safetensors", x, net))
            continue
        lora = {"model": "lora", "ema": "lora_ema"}.get(name) if "lora" in wanted else None
        path, targets = folder / f"{lora or name}.safetensors", x.state_dict()
        stored = _load_rows(path, targets, state["model"] if name == "ema" else x, partly=lora is not None)
        if isinstance(x, EMA):
            if EMA_COUNT not in stored:
                raise SystemExit(f"error: {path}: plain weights without {EMA_COUNT}: not what an average "
                                 "resumes from")
            x.n.copy_(targets[EMA_COUNT])
    return manifest


@torch.no_grad()
def _load_rows(path, targets, net, partly=False):
    """A file into tensors, of sharded ones this rank's rows. partly: it rightly holds some of them. ->
    the names in it."""
    with safe_open(path, "pt") as f:
        stored = set(f.keys())
        shapes = {k: torch.empty(f.get_slice(k).get_shape(), device="meta") for k in stored}
        for k in sorted(targets.keys() & stored):
            if (kind := f.get_slice(k).get_dtype()) != NAMES.get(targets[k].dtype):
                raise SystemExit(f"error: {path}: {k} is {kind}, and a run keeps {NAMES[targets[k].dtype]}: "
                                 "it was converted; resume from a run's own checkpoint, or begin with --init")
        check_fit(net, ({k: v for k, v in net.state_dict().items() if k not in stored} if partly else {})
                  | shapes, path)
        for key in targets.keys() & stored:
            if is_sharded(targets[key]):
                _copy_rows(targets[key], f.get_slice(key))
            else:
                targets[key].copy_(f.get_tensor(key))
    return stored


def _copy_rows(t, whole):
    """This rank's rows, as torch.chunk cuts them, of a slice of a file."""
    rows = -(-len(t) // t.device_mesh.size())
    start = min(t.device_mesh.get_local_rank() * rows, len(t))
    if start < len(t):
        local(t).copy_(whole[start:start + rows])


@torch.no_grad()
def _optimizer_rows(path, opt, net):
    """The tensors of an optimiser's file, sharded as its parameters are."""
    params = {name: p for p, name in _names(opt, net).items()}
    tensors = {}
    with safe_open(path, "pt") as f:
        for entry in f.keys():
            p = params.get(entry.rsplit(".", 1)[0])
            if p is not None and is_sharded(p) and list(p.shape) == f.get_slice(entry).get_shape():
                whole = f.get_slice(entry)
                tensors[entry] = torch.empty_like(p, dtype=f.get_slice(entry)[:0].dtype)
                _copy_rows(tensors[entry], whole)
            else:
                tensors[entry] = f.get_tensor(entry)
    return tensors


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


SAME_RESULT = {"out", "device", "workers", "log_every", "eval_every", "eval_pairs", "sample_every", "keep",
               "save_every", "plateau_warn", "wandb", "compile", "checkpointing"}
FILLED_IN = {"image_size", "shift", "sd3", "tokenizers"}  # left out they are those of the weights


def warn_changed(out, manifest, now, bf16):
    """On resuming, a line for each flag (of the dict `now`) that differs from the command that began the run,
    less those that leave the result alone. One that was given and is left out now (None) differs too, unless
    the scripts fill it in. Of --precision what was decided is compared, in a manifest from before that flag
    its bool bf16."""
    before = dict(manifest["config"])
    before["precision"] = manifest.get("precision") or PRECISION.get(before.get("bf16"))
    for key, value in portable(now | {"precision": PRECISION[bf16]}).items():
        left_out = value is None and key in FILLED_IN
        if before.get(key, value) != value and key not in SAME_RESULT and not left_out:
            goes_on = "without" if value is None else f"with {value}"
            print0(f"warning: {out}: began with --{key} {before[key]}, goes on {goes_on}")


def load_state(module, tensors, what):
    """module.load_state_dict, strict; else SystemExit with one line, in which `what` names the file. A module
    on the meta device (of a dry run) stays as it is."""
    check_fit(module, tensors, what)
    if any(p.is_meta for p in module.parameters()):
        return
    module.load_state_dict({k: v for k, v in tensors.items() if k != EMA_COUNT}, strict=True)
