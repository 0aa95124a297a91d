"""Public weights: reading files strictly, and filling networks built on the meta device.

    1. Files: safetensors, memory-mapped, whole or in shards; pickles with weights_only=True
    2. Filling networks     3. The parts of SD3's stack     4. Looking at files: fingerprint, summary, saving

What cannot be found: the published files carry no checksum, so a flipped bit of a value that leaves it finite
loads. A damaged header, a cut file, a missing, surplus, misshapen or integer tensor and non-finite values are
one error line, and nothing is returned.
"""

import hashlib
import json
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from checkpoint import parse_json, read_bounded

Device = torch.device | str
Weights = dict[str, Tensor]
# safetensors' names
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}

####################################################################################################
# 1. Files
####################################################################################################


def first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]


def regular(file: str | Path) -> None:
    """OSError unless it is a regular file: of a FIFO or a device nothing may ever come, or no end."""
    if Path(file).exists() and not Path(file).is_file():
        raise OSError("no regular file")


@dataclass(frozen=True)
class Stored:
    """Tensors in files: what the headers say, as meta tensors, and how to get at values, memory-mapped.

    Even a mapped tensor that nobody looks at has its first pages read ahead, which adds up to gigabytes of a
    bundle: `read` is for those that are wanted.
    """

    headers: Weights
    read: Callable[[str], Tensor]


def open_safetensors(file: str | Path) -> Stored:
    try:
        regular(file)
        handle = safe_open(file, "pt")
        views = {k: handle.get_slice(k) for k in handle.keys()}
        headers = {k: torch.empty(v.get_shape(), dtype=DTYPES[v.get_dtype()], device="meta")
                   for k, v in views.items()}
    except (OSError, SafetensorError, KeyError, RuntimeError, TypeError, ValueError, OverflowError) as e:
        raise SystemExit(f"error: {file}: cannot be read ({first_line(e)[:200]}): give the published "
                         ".safetensors file, whole") from None
    return Stored(headers, handle.get_tensor)


def read_json(file: Path) -> dict:
    try:
        found = parse_json(read_bounded(file, 64 * 2**20))
    except (OSError, ValueError, RecursionError) as e:
        raise SystemExit(f"error: {file}: cannot be read ({first_line(e)}): copy it again") from None
    if not isinstance(found, dict):
        raise SystemExit(f"error: {file}: holds no table: copy it again")
    return found


def open_folder(folder: Path, stem: str) -> Stored:
    """FOLDER/STEM.safetensors, or the shards that STEM.safetensors.index.json names; else their fp16 copies.

    Every shard must be there and hold the very tensors that the index says.
    """
    files = [(f"{stem}.safetensors", f"{stem}.safetensors.index.json"),
             (f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json")]
    for whole, index in files:
        if (folder / whole).is_file():
            return open_safetensors(folder / whole)
        if (folder / index).is_file():
            break
    else:
        raise SystemExit(f"error: {folder}: has neither {files[0][0]} nor {files[0][1]}: download it whole")
    table = read_json(folder / index).get("weight_map")
    names = table.values() if isinstance(table, dict) else ()
    if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise SystemExit(f"error: {folder / index}: has no table of shards: copy it again")
    shards = sorted(set(names))
    if missing := [n for n in shards if not (folder / n).is_file()]:
        raise SystemExit(f"error: {folder}: {len(missing)} of {len(shards)} shards are missing "
                         f"({', '.join(missing)}): download the rest")
    stored = {shard: open_safetensors(folder / shard) for shard in shards}
    headers = {}
    for shard, part in stored.items():
        if wrong := sorted(part.headers.keys() ^ {k for k, n in table.items() if n == shard}):
            raise SystemExit(f"error: {folder / shard}: {wrong[0]!r} is in the shard or in {index}, not in "
                             "both: download the folder again")
        headers |= part.headers
    return Stored(headers, lambda name: stored[table[name]].read(name))


def read_weights(path: str, flag: str = "") -> Weights:
    """Tensors by name, memory-mapped, from .safetensors, a folder of transformers', or .pt/.pth/.bin.

    The latter are read with weights_only=True and may nest the weights under `state_dict`, `model` or
    `teacher` (open_clip, BLIP, DINO); SD3's stack is never read from them. A prefix `module.` (DDP) or
    `backbone.` (DINO) is taken off. flag: "--vgg: ", what to name before the file in an error line.
    """
    if Path(path).is_dir() or Path(path).suffix == ".safetensors":
        stored = open_folder(Path(path), "model") if Path(path).is_dir() else open_safetensors(path)
        weights = {k: stored.read(k) for k in stored.headers}
    else:
        try:
            regular(path)
            zipped = zipfile.is_zipfile(path)
            if zipped and any(Path(n).name == "constants.pkl" for n in zipfile.ZipFile(path).namelist()):
                # OpenAI's own CLIP files, clean-fid's Inception
                raise ValueError("a TorchScript program, not run here; it is published as tensors, too")
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except Exception as e:
            # torch's own words on a pickle recommend to load it without weights_only
            why = "not only tensors, or damaged" if isinstance(e, pickle.UnpicklingError) else first_line(e)
            raise SystemExit(f"error: {flag}{path}: cannot be read ({why}): give the published .safetensors "
                             "or .pt file") from None
    for nest in ("state_dict", "model", "teacher"):
        if isinstance(weights, dict) and isinstance(weights.get(nest), dict):
            weights = weights[nest]
    tensors = isinstance(weights, dict) and all(isinstance(v, Tensor) for v in weights.values())
    if not tensors or not weights:
        raise SystemExit(f"error: {flag}{path}: holds no table of tensors: give the published weights")
    for k, v in weights.items():  # strides of 0 claim terabytes that are not there
        if v.layout != torch.strided or v.numel() * v.element_size() > v.untyped_storage().nbytes():
            raise SystemExit(f"error: {flag}{path}: {str(k)[:80]}: {list(v.shape)} claims more values than "
                             "the file holds, or is sparse: give the published weights")
    if not all(isinstance(k, str) for k in weights):
        raise SystemExit(f"error: {flag}{path}: holds tensors without a name: give the published weights")
    plain = {re.sub(r"^(module\.|backbone\.)+", "", k): v for k, v in weights.items()}
    if len(plain) < len(weights):
        raise SystemExit(f"error: {flag}{path}: holds tensors twice, with and without `module.`: give the "
                         "published weights")
    return plain


def shape_of(weights: Weights, key: str, path: str, what: str, ndim: int | None = None) -> torch.Size:
    """SystemExit if there is no such tensor, or if it is none of `ndim` axes, all of them longer than 0."""
    shape = weights[key].shape if key in weights else None
    if shape is None or ndim not in (None, len(shape)) or 0 in shape:
        why = "is missing" if shape is None else f"is {list(shape)}"
        raise SystemExit(f"error: {path}: {key!r} {why}: this is no {what}; give its published weights")
    return shape


def count(weights: Weights, stem: str) -> int:
    """How many layers `stem`N there are."""
    found = (re.match(re.escape(stem) + r"(\d+)\.", k) for k in weights)
    return len({int(m[1]) for m in found if m})


####################################################################################################
# 2. Filling networks
####################################################################################################


@dataclass(frozen=True)
class Place:
    """Where a file keeps one of our tensors."""

    names: tuple[str, ...]  # several: stacked along the first axis
    swap: bool = False  # our [shift | scale] is [scale | shift] there
    flat: bool = False  # our 1x1 convolution is a Linear there


def same_name(key: str) -> Place:
    return Place((key,))


def check_fit(weights: Weights, expected: dict[str, tuple[int, ...]], path: str, what: str) -> None:
    """SystemExit that names what is missing, unknown, of another shape or no floating point."""
    known = weights.keys() & expected.keys()
    problems = {
        "missing": sorted(expected.keys() - weights.keys()),
        f"not of {what}": sorted(weights.keys() - expected.keys()),
        "of another shape": sorted(f"{k} is {list(weights[k].shape)} instead of {list(expected[k])}"
                                   for k in known if weights[k].shape != torch.Size(expected[k])),
        "not floating point": sorted(f"{k} is {weights[k].dtype}" for k in known
                                     if not weights[k].is_floating_point())}
    text = "; ".join(f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
                     for kind, keys in problems.items() if keys)
    if text:
        raise SystemExit(f"error: {path}: tensors {text}: give the published weights of {what}, whole")


def fetch(own: Weights, weights: Weights, path: str, what: str, dtype: torch.dtype, device: Device,
          place: Callable[[str], Place] = same_name, read: Callable[[str], Tensor] | None = None) -> Weights:
    """The values of `own`, a state dict of which only names and shapes count: strictly, every tensor of the
    file once, one at a time straight to its dtype and device, nothing shared with the mapped file.

    read: name -> values, where `weights` holds headers only. device "meta": names and shapes are checked, no
    value is read.
    """
    expected = {}
    for key, like in own.items():
        at = place(key)
        shape = (len(like) // len(at.names), *like.shape[1:]) if like.ndim else ()
        expected |= dict.fromkeys(at.names, shape[:2] if at.flat else shape)
    check_fit(weights, expected, path, what)
    if torch.device(device).type == "meta":
        return {key: torch.empty_like(like, dtype=dtype, device=device) for key, like in own.items()}
    out = {}
    for key, like in own.items():
        at = place(key)
        parts = [(read or weights.__getitem__)(name) for name in at.names]
        parts = parts[0].chunk(2)[::-1] if at.swap else parts
        value = torch.empty(like.shape, dtype=dtype, device=device)
        for target, part in zip(value.chunk(len(parts)) if len(parts) > 1 else (value,), parts):
            target.copy_(part.reshape(target.shape))
        if not all(v.isfinite() for v in value.aminmax()):
            finite = all(part.double().isfinite().all() for part in parts)
            raise SystemExit(f"error: {path}: {at.names[0]!r} " + (
                f"has values too large for {dtype}: ask for another dtype" if finite else
                "holds NaN or infinity: the file is damaged, copy it again"))
        out[key] = value
    return out


def fill(net: nn.Module, weights: Weights, path: str, what: str, dtype: torch.dtype, device: Device,
         place: Callable[[str], Place] = same_name,
         read: Callable[[str], Tensor] | None = None) -> nn.Module:
    """Strictly load `weights` into `net`, built on the meta device: no second copy. Frozen, in eval mode."""
    net.load_state_dict(fetch(net.state_dict(), weights, path, what, dtype, device, place, read), assign=True)
    return net.eval().requires_grad_(False)


####################################################################################################
# 3. The parts of SD3's stack
####################################################################################################


@dataclass(frozen=True)
class Part:
    """One network of SD3's stack: where the two published layouts keep it."""

    prefix: str  # of its names in the single file
    folder: str  # in a diffusers folder
    stem: str  # of its file there
    alone: str = ""  # the file of a text encoder in a folder of such files (text_encoders/), no prefix in it


PARTS = {
    "mmdit": Part("model.diffusion_model.", "transformer", "diffusion_pytorch_model"),
    "vae": Part("first_stage_model.", "vae", "diffusion_pytorch_model"),
    "clip_l": Part("text_encoders.clip_l.transformer.", "text_encoder", "model", "clip_l*.safetensors"),
    "clip_g": Part("text_encoders.clip_g.transformer.", "text_encoder_2", "model", "clip_g*.safetensors"),
    "t5xxl": Part("text_encoders.t5xxl.transformer.", "text_encoder_3", "model", "t5xxl*.safetensors")}


def is_public(path: str) -> bool:
    """Whether `path` is a .safetensors file or a diffusers folder, not one of our checkpoints' folders."""
    path = Path(path)
    if path.is_dir():
        return (path / "model_index.json").is_file() or (path / "transformer" / "config.json").is_file()
    return path.suffix == ".safetensors"


def open_part(path: str, name: str) -> tuple[Stored, dict]:
    """A part's tensors without prefix (none: not in there) and the config.json of its folder ({}: none)."""
    part, folder = PARTS[name], Path(path)
    if not folder.is_dir():
        if folder.suffix != ".safetensors":
            raise SystemExit(f"error: {path}: is neither a .safetensors file nor a folder: give SD3's "
                             "file or a diffusers folder")
        stored = open_safetensors(path)
        prefixes = tuple(p.prefix for p in PARTS.values())
        if unknown := sorted(k for k in stored.headers if not k.startswith(prefixes)):
            raise SystemExit(f"error: {path}: {len(unknown)} tensors are not of SD3, {unknown[0]!r} first: "
                             "give a published SD3 or SD3.5 file")
        headers = {k.removeprefix(part.prefix): v for k, v in stored.headers.items()
                   if k.startswith(part.prefix)}
        return Stored(headers, lambda name: stored.read(part.prefix + name)), {}
    if part.alone and (files := sorted(folder.glob(part.alone))):
        return open_safetensors(files[0]), {}  # of several T5s the first by name: fp16 before fp8
    folder = folder / part.folder
    if not folder.is_dir():
        return Stored({}, {}.__getitem__), {}
    config = folder / "config.json"
    return open_folder(folder, part.stem), read_json(config) if config.is_file() else {}


def setting(config: dict, key: str, default: float, path: str) -> float:
    """A number of config.json; null counts as 0."""
    value = config.get(key, default) or 0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SystemExit(f"error: {path}: config.json says {key} {value!r}: a number is needed")
    return value


####################################################################################################
# 4. Looking at files
####################################################################################################


def public_files(path: str) -> list[Path]:
    """The files below a public file's or folder's path that its networks and tokenizers are read from."""
    root = Path(path)
    if not root.is_dir():
        return [root]
    folders = ["", *(p.folder for p in PARTS.values()), "tokenizer", "tokenizer_2", "tokenizer_3"]
    found = [f for sub in folders for end in ("*.safetensors", "*.json", "merges.txt")
             for f in (root / sub).glob(end)]
    if not any(f.suffix == ".safetensors" for f in found):
        raise SystemExit(f"error: {path}: holds no .safetensors files: give a public file or folder")
    return sorted(set(found))


def header_hash(path: str) -> str:
    """A cheap fingerprint of a public file or folder, for caches: SHA-256 over every name, dtype, shape and
    file size, 64 bytes from the middle of every tensor, and the small files whole. Not a proof: values that
    were not sampled may differ. The name of a single file does not count."""
    digest = hashlib.sha256()
    root = Path(path)
    for file in public_files(path):
        digest.update(b"" if file == root else str(file.relative_to(root)).encode())
        if file.suffix != ".safetensors":
            digest.update(file.read_bytes())
            continue
        open_safetensors(file)  # says what is wrong with it
        with open(file, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = f.read(size)
            digest.update(header + file.stat().st_size.to_bytes(8, "little"))
            for name, tensor in sorted(json.loads(header).items()):
                if name != "__metadata__":
                    begin, end = tensor["data_offsets"]
                    f.seek(8 + size + max(begin, (begin + end) // 2 - 32))
                    digest.update(f.read(min(64, end - begin)))
    return digest.hexdigest()


def describe(weights: Weights) -> str:
    """Tensors, values, gigabytes and dtypes, from the headers alone."""
    sizes = Counter()
    for v in weights.values():
        sizes[str(v.dtype).removeprefix("torch.")] += v.nbytes
    dtypes = ", ".join(f"{name} {n / 1e9:.3f} GB" for name, n in sizes.most_common())
    return f"{len(weights)} tensors, {sum(v.numel() for v in weights.values()):,} values: {dtypes}"


def by_first_name(weights: Weights) -> dict[str, Weights]:
    out = {}
    for key, value in weights.items():
        out.setdefault(key.split(".")[0], {})[key] = value
    return out




def write(weights: Weights, file: Path) -> None:
    """Copies: safetensors refuses tensors that share memory, as tied ones and the thirds of qkv do."""
    save_file({k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in weights.items()},
              file, metadata={"format": "pt"})  # which transformers insists on
    file.chmod(0o644)  # safetensors makes it 0600, which a shared folder does not want
