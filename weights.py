"""Public weights: reading files strictly, SD3's and SD3.5's stack from its two published layouts, export.

    1. Files: safetensors, memory-mapped, whole or in shards; pickles with weights_only=True
    2. Filling networks built on the meta device
    3. Names in diffusers' folders
    4. SD3: the transformer, the autoencoder, the text encoders
    5. Looking at files: a fingerprint for caches, a summary
    6. Saving

    python weights.py show sd3_medium.safetensors            # or a folder: what it holds, nothing is loaded
    python weights.py convert ImageReward.pt ImageReward.safetensors
    python weights.py export out/run DIFFUSERS_FOLDER        # our Editor -> diffusers' transformer/

What cannot be found: the published files carry no checksum, so a flipped bit of a value that leaves it finite
loads. A damaged header, a cut file, a missing, surplus, misshapen or integer tensor and non-finite values are
one error line, and nothing is returned.
"""

import hashlib
import json
import math
import pickle
import re
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import common
from frozen import VAE, VAEConfig
from model import PRESETS, EditorConfig, MMDiT, config_from
from text_encoders import (
    CLIP_EOS,
    ClipText,
    ClipTextConfig,
    SD3Text,
    T5Config,
    T5Encoder,
    clip_tokenizer,
    t5_tokenizer,
)

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
        handle = safe_open(file, "pt")
        views = {k: handle.get_slice(k) for k in handle.keys()}
        headers = {k: torch.empty(v.get_shape(), dtype=DTYPES[v.get_dtype()], device="meta")
                   for k, v in views.items()}
    except (OSError, SafetensorError, KeyError) as e:
        raise SystemExit(f"error: {file}: cannot be read ({first_line(e)}): give the published .safetensors "
                         "file, whole") from None
    return Stored(headers, handle.get_tensor)


def read_json(file: Path) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
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
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
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
# 3. Names in diffusers' folders
####################################################################################################

# ours -> theirs, below a stream's block; qkv and the modulations need more than a new name
IMAGE_NAMES = {"attn.proj": "attn.to_out.0", "attn.ln_q": "attn.norm_q", "attn.ln_k": "attn.norm_k",
               "attn2.proj": "attn2.to_out.0", "attn2.ln_q": "attn2.norm_q", "attn2.ln_k": "attn2.norm_k",
               "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2", "adaLN_modulation.1": "norm1.linear"}
TEXT_NAMES = {"attn.proj": "attn.to_add_out", "attn.ln_q": "attn.norm_added_q",
              "attn.ln_k": "attn.norm_added_k", "mlp.fc1": "ff_context.net.0.proj",
              "mlp.fc2": "ff_context.net.2", "adaLN_modulation.1": "norm1_context.linear"}
OUTER_NAMES = {"x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder",
               "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
               "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
               "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
               "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
               "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear"}


def mmdit_place(key: str, depth: int) -> Place:
    """Where diffusers' SD3Transformer2DModel keeps a tensor of our MMDiT (SD3's single-file names).

    [shift | scale] is [scale | shift] in exactly two places: the final layer and the text stream of the last
    block.
    """
    if key == "pos_embed":
        return Place(("pos_embed.pos_embed",))
    layer, _, kind = key.rpartition(".")
    swap = layer in ("final_layer.adaLN_modulation.1",
                     f"joint_blocks.{depth - 1}.context_block.adaLN_modulation.1")
    if not key.startswith("joint_blocks."):
        return Place((f"{OUTER_NAMES[layer]}.{kind}",), swap)
    _, i, stream, rest = layer.split(".", 3)
    image, block = stream == "x_block", f"transformer_blocks.{i}"
    if rest.endswith(".qkv"):
        names = (f"to_{n}" if image else f"add_{n}_proj" for n in "qkv")
        return Place(tuple(f"{block}.{rest.removesuffix('qkv')}{name}.{kind}" for name in names))
    return Place((f"{block}.{(IMAGE_NAMES if image else TEXT_NAMES)[rest]}.{kind}",), swap)


def to_diffusers(weights: Weights) -> Weights:
    """State dict of our MMDiT (SD3's single-file names) -> state dict of diffusers' SD3Transformer2DModel."""
    depth, out = count(weights, "joint_blocks."), {}
    for key, value in weights.items():
        at = mmdit_place(key, depth)
        value = torch.cat(value.chunk(2)[::-1]) if at.swap else value
        out |= zip(at.names, value.chunk(len(at.names)))
    return out


def vae_place(key: str, levels: int) -> Place:
    """Where diffusers' AutoencoderKL keeps a tensor of our VAE; its decoder counts levels from the middle."""
    if m := re.match(r"(.*)\.mid\.attn_1\.(q|k|v|proj_out|norm)\.(.*)", key):
        layer = {"norm": "group_norm", "proj_out": "to_out.0"}.get(m[2], f"to_{m[2]}")
        return Place((f"{m[1]}.mid_block.attentions.0.{layer}.{m[3]}",),
                     flat=m[2] != "norm" and m[3] == "weight")
    key = re.sub(r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", key)
    key = re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.", key)
    for ours, theirs in ((r"\.down\.(\d+)\.", r".down_blocks.\1."), (r"\.block\.", ".resnets."),
                         (r"\.(down|up)sample\.", r".\1samplers.0."),
                         (r"\.nin_shortcut\.", ".conv_shortcut."), (r"\.norm_out\.", ".conv_norm_out.")):
        key = re.sub(ours, theirs, key)
    return Place((key,))


####################################################################################################
# 4. SD3
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
    "vae": Part(VAE.PREFIX, "vae", "diffusion_pytorch_model"),
    "clip_l": Part(SD3Text.PREFIXES["clip_l"], "text_encoder", "model", "clip_l*.safetensors"),
    "clip_g": Part(SD3Text.PREFIXES["clip_g"], "text_encoder_2", "model", "clip_g*.safetensors"),
    "t5xxl": Part(SD3Text.PREFIXES["t5xxl"], "text_encoder_3", "model", "t5xxl*.safetensors")}


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


def editor_config(weights: Weights, config: dict, path: str) -> EditorConfig:
    """Size and kind of an SD3 transformer, in either layout, from its shapes.

    Heads are as wide as the QK norms; without those no shape tells, and they are of 64 as in every SD3, or as
    the folder's config.json says.
    """
    theirs, what = "pos_embed.pos_embed" in weights, "SD3 transformer"
    depth = count(weights, "transformer_blocks." if theirs else "joint_blocks.")

    def name(key: str) -> str:
        return mmdit_place(key, depth).names[0] if theirs else key

    def shape(key: str, ndim: int) -> torch.Size:
        return shape_of(weights, name(key), path, what, ndim)

    D, channels_in, patch, _ = shape("x_embedder.proj.weight", 4)
    side = math.isqrt(shape("pos_embed", 3)[1])
    channels = shape("final_layer.linear.weight", 2)[0] // patch**2
    norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    qk_norm = name(norm) in weights
    head_dim = int(setting(config, "attention_head_dim", 64, path))
    if qk_norm:
        (head_dim,) = shape(norm, 1)
    if not depth or head_dim < 1 or D % head_dim or channels_in not in (channels, 2 * channels + 1):
        raise SystemExit(f"error: {path}: {depth} blocks, width {D}, heads of {head_dim}, {channels_in} "
                         f"channels in, {channels} out: this is no {what}; give its published weights")
    return EditorConfig(
        depth=depth, heads=D // head_dim, head_dim=head_dim, patch=patch, channels=channels, pos_max=side,
        learn_pos=False, txt_dim=shape("context_embedder.weight", 2)[1],
        vec_dim=shape("y_embedder.mlp.0.weight", 2)[1], qk_norm=qk_norm,
        dual=sum(name(f"joint_blocks.{i}.x_block.attn2.proj.weight") in weights for i in range(depth)),
        inpaint=channels_in != channels, txt_bytes=0)


def load_mmdit(path: str, dtype: torch.dtype = torch.float32,
               device: Device = "cpu") -> tuple[EditorConfig, Weights]:
    """A public SD3 or SD3.5 (file or diffusers folder) -> its architecture, and a state dict of MMDiT.

    The bundled autoencoder and encoders are not touched. 2 c + 1 input channels are read as an inpainting
    model's (`export_diffusers` writes them); no public SD3 has them.
    """
    stored, config = open_part(path, "mmdit")
    cfg = editor_config(stored.headers, config, path)
    with torch.device("meta"):
        own = MMDiT(cfg).state_dict()
    theirs = "pos_embed.pos_embed" in stored.headers
    place = (lambda key: mmdit_place(key, cfg.depth)) if theirs else same_name
    return cfg, fetch(own, stored.headers, path, "an SD3 transformer", dtype, device, place, stored.read)


def load_vae(path: str, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> VAE:
    """The autoencoder of a public SD3 (file or diffusers folder), frozen; sizes from the shapes.

    Scale and shift of the latents: SD3's, or as the folder's vae/config.json says.
    """
    stored, config = open_part(path, "vae")
    if not (weights := stored.headers):
        raise SystemExit(f"error: {path}: holds no autoencoder: give a file with {VAE.PREFIX}* or a folder "
                         "with vae/")
    theirs, what = "decoder.conv_norm_out.weight" in weights, "SD3 autoencoder"
    levels = count(weights, "encoder.down_blocks." if theirs else "encoder.down.")

    def name(key: str) -> str:
        return vae_place(key, levels).names[0] if theirs else key

    width = shape_of(weights, name("encoder.conv_in.weight"), path, what, 4)[0]
    wide = [shape_of(weights, name(f"encoder.down.{i}.block.0.conv1.weight"), path, what, 4)[0]
            for i in range(levels)]
    if not wide or width % 32 or any(w % width for w in wide):
        raise SystemExit(f"error: {path}: widths {width}, {wide}: this is no {what}; give its published "
                         "weights")
    cfg = VAEConfig(
        width, tuple(w // width for w in wide),
        count(weights, name("encoder.down.0.block.0.conv1.weight").removesuffix("0.conv1.weight")),
        shape_of(weights, name("decoder.conv_in.weight"), path, what, 4)[1],
        setting(config, "scaling_factor", VAEConfig.scale, path),
        setting(config, "shift_factor", VAEConfig.shift, path))
    if cfg.scale <= 0:
        raise SystemExit(f"error: {path}: config.json says scaling_factor {cfg.scale}: it must be positive")
    with torch.device("meta"):
        net = VAE(cfg)
    return fill(net, weights, path, "an " + what, dtype, device,
                (lambda key: vae_place(key, levels)) if theirs else same_name, stored.read)


def load_text(path: str, tokenizers: str | None = None, dtype: torch.dtype = torch.float32,
              device: Device = "cpu", t5: bool = True, t5_length: int = 77) -> SD3Text:
    """SD3's text encoders, frozen, from a file that bundles them, a diffusers folder, or a folder that holds
    clip_l.safetensors, clip_g.safetensors and t5xxl_*.safetensors.

    tokenizers: a folder with tokenizer/, tokenizer_2/ and tokenizer_3/; None: `path` itself. t5: False leaves
    it out (9.5 GB in 16 bits); then, as when there is none, its t5_length tokens are zeros, as wide as the
    transformer's text input where `path` has the transformer. fp16 and fp8 values are widened to `dtype`.
    """
    folder = Path(tokenizers or path)
    if not (folder / "tokenizer").is_dir():
        raise SystemExit(f"error: {folder}: holds no tokenizer/, tokenizer_2/ and tokenizer_3/: name a "
                         "folder of tokenizers that does, as diffusers' folders of SD3 do")
    clips, readers = [], []
    for name, quick, sub, pad in (("clip_l", True, "tokenizer", None), ("clip_g", False, "tokenizer_2", 0)):
        stored, config = open_part(path, name)
        cfg = clip_config(stored, config, quick, path, name)
        reader = clip_tokenizer(str(folder / sub), pad, cfg.length)
        check_tokens(reader.get_vocab_size(), cfg.vocab, 0, folder / sub, path)
        clips.append((replace(cfg, eos=reader.token_to_id(CLIP_EOS)), stored, name))
        readers.append(reader)
    stored, reader = open_part(path, "t5xxl")[0] if t5 else None, None
    if stored and stored.headers:
        t5_cfg = t5_config(stored, path)
        width = t5_cfg.width
        reader = t5_tokenizer(str(folder / "tokenizer_3"), t5_length)
        check_tokens(reader.get_vocab_size(), t5_cfg.vocab, 127, folder / "tokenizer_3", path)
    else:
        text_in = open_part(path, "mmdit")[0].headers.get("context_embedder.weight")
        width = T5Config.width if text_in is None else text_in.shape[-1]
        if t5:
            common.print0(f"{path}: holds no T5, its {t5_length} tokens will be zeros")
    if (clip := sum(cfg.width for cfg, *_ in clips)) > width:
        raise SystemExit(f"error: {path}: the CLIPs are {clip} wide together, more than T5's {width}: these "
                         "encoders are not of one SD3")
    with torch.device("meta"):
        nets = [ClipText(cfg) for cfg, *_ in clips]
        encoder = T5Encoder(t5_cfg) if reader else None
    for net, (_, held, name) in zip(nets, clips):
        fill(net, held.headers, path, name, dtype, device, read=held.read)
    if encoder:
        own = {k: v for k, v in encoder.state_dict().items() if k not in T5_TABLES or k in stored.headers}
        state = fetch(own, stored.headers, path, "t5xxl", dtype, device, read=stored.read)
        table = next(state[k] for k in T5_TABLES if k in state)
        encoder.load_state_dict({**state, **dict.fromkeys(T5_TABLES, table)}, assign=True)
    return SD3Text(*nets, encoder, (*readers, reader), t5_length, width).eval().requires_grad_(False)


def check_tokens(size: int, rows: int, spare: int, tokenizer: Path, path: str) -> None:
    """spare: rows of padding that the embedding may have (T5's: to a multiple of 128)."""
    if not rows - spare <= size <= rows:
        raise SystemExit(f"error: {tokenizer}: {size} tokens, but {path} embeds {rows}: give the tokenizers "
                         "of this model")


def clip_config(stored: Stored, config: dict, quick_gelu: bool, path: str, name: str) -> ClipTextConfig:
    """Sizes of a text tower from its shapes; heads of 64 unless its config.json says else.

    An identity as projection (CLIP-L's in diffusers' folders) is none, and is taken out of the headers.
    CLIP-G must have one.
    """
    if not (weights := stored.headers):
        raise SystemExit(f"error: {path}: holds no {name}: give a file that bundles the text encoders, a "
                         "diffusers folder, or a folder with clip_l.safetensors, clip_g.safetensors")
    weights.pop("text_model.embeddings.position_ids", None)  # a buffer that older files carry
    rows, D = shape_of(weights, "text_model.embeddings.token_embedding.weight", path, name, 2)
    length = shape_of(weights, "text_model.embeddings.position_embedding.weight", path, name, 2)[0]
    matrix = "text_projection.weight"
    if matrix not in weights and name == "clip_g":
        raise SystemExit(f"error: {path}: clip_g has no {matrix}: give the published weights")
    if matrix in weights and torch.equal(stored.read(matrix).float(), torch.eye(D)):
        del weights[matrix]
    project = shape_of(weights, matrix, path, name, 2)[0] if matrix in weights else 0
    heads = int(setting(config, "num_attention_heads", D // 64, path))
    act = config.get("hidden_act", "quick_gelu" if quick_gelu else "gelu")
    if act not in ("quick_gelu", "gelu") or heads < 1 or D % heads:
        raise SystemExit(f"error: {path}: {name} has {heads} heads, width {D} and activation {act!r}: it is "
                         "none of SD3's encoders")
    return ClipTextConfig(D, heads, count(weights, "text_model.encoder.layers."), act == "quick_gelu",
                          project, rows, length)


T5_TABLES = ("shared.weight", "encoder.embed_tokens.weight")  # one embedding: files have either name or both


def t5_config(stored: Stored, path: str) -> T5Config:
    """Sizes of a T5 encoder from its shapes. A second copy of the embedding is taken out of the headers."""
    weights = stored.headers
    held = [k for k in T5_TABLES if k in weights]
    if len(held) == 2:
        a, b = (stored.read(k).flatten().view(torch.uint8) for k in held)  # torch does not compare fp8
        if not torch.equal(a, b):
            raise SystemExit(f"error: {path}: T5's {' and '.join(held)} differ: the file is damaged, copy it "
                             "again")
        del weights[held.pop()]
    block, what = "encoder.block.0.layer.", "T5 encoder"
    rows, width = shape_of(weights, held[0] if held else T5_TABLES[0], path, what, 2)
    heads = shape_of(weights, block + "0.SelfAttention.relative_attention_bias.weight", path, what, 2)[1]
    inner = shape_of(weights, block + "0.SelfAttention.q.weight", path, what, 2)[0]
    hidden = shape_of(weights, block + "1.DenseReluDense.wi_0.weight", path, what, 2)[0]
    if inner % heads:
        raise SystemExit(f"error: {path}: {heads} heads in {inner} features: this is no {what}; give its "
                         "published weights")
    return T5Config(width, heads, inner // heads, count(weights, "encoder.block."), hidden, rows)


####################################################################################################
# 5. Looking at files
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


def show(path: str) -> None:
    """Print what a public file or folder holds, from its headers."""
    single, prefixes = Path(path).suffix == ".safetensors", tuple(p.prefix for p in PARTS.values())
    headers = open_safetensors(path).headers if single else {}
    parts = {}
    if Path(path).is_dir() or any(k.startswith(prefixes) for k in headers):
        parts = {name: open_part(path, name) for name in PARTS}
        parts = {name: (stored.headers, config) for name, (stored, config) in parts.items() if stored.headers}
    if not parts:
        for name, part in sorted(by_first_name(headers or read_weights(path)).items()):
            print(f"{name:<24} {describe(part)}")
    for name, (part, config) in parts.items():
        print(f"{name:<7} {describe(part)}")
        if name == "mmdit":
            cfg = editor_config(part, config, path)
            known = [k for k, v in PRESETS.items() if v == cfg]
            print(f"        {known[0] if known else 'of another size'}: {cfg.depth} blocks, {cfg.heads} "
                  f"heads of {cfg.head_dim}, patch {cfg.patch}, channels {cfg.in_channels} in, "
                  f"{cfg.channels} out, positions {cfg.pos_max}x{cfg.pos_max}, text {cfg.txt_dim}, "
                  f"vector {cfg.vec_dim}, QK norm {'yes' if cfg.qk_norm else 'no'}, {cfg.dual} dual blocks")


def by_first_name(weights: Weights) -> dict[str, Weights]:
    out = {}
    for key, value in weights.items():
        out.setdefault(key.split(".")[0], {})[key] = value
    return out


####################################################################################################
# 6. Saving
####################################################################################################


def write(weights: Weights, file: Path) -> None:
    """Copies: safetensors refuses tensors that share memory, as tied ones and the thirds of qkv do."""
    save_file({k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in weights.items()},
              file, metadata={"format": "pt"})  # which transformers insists on
    file.chmod(0o644)  # safetensors makes it 0600, which a shared folder does not want


def convert(source: str, target: str) -> None:
    """A pickled table of tensors -> safetensors, names as `read_weights` gives them."""
    if Path(target).suffix != ".safetensors":
        raise SystemExit(f"error: {target}: the result is a .safetensors file: name it so")
    weights, tmp = read_weights(source), Path(target + ".tmp")
    try:
        write(weights, tmp)
        tmp.rename(target)
    except (OSError, SafetensorError) as e:
        tmp.unlink(missing_ok=True)
        raise SystemExit(f"error: {target}: cannot be written ({first_line(e)}): free some space, or name "
                         "another file") from None


def export_diffusers(cfg: EditorConfig, state: Weights, out: str, shard: int = 5 * 10**9) -> Path:
    """A state dict of MMDiT -> OUT/transformer/, for diffusers' SD3Transformer2DModel.from_pretrained.

    In the dtypes of `state`; several files with an index when there are more than `shard` bytes. An
    inpainting model is written as one with 2 c + 1 input channels. SystemExit for what diffusers cannot
    represent, and if the folder is there already. Nothing remains of a failed export.
    """
    if cfg.predict != "v" or cfg.txt_bytes:
        why = f"predicts {cfg.predict}" if cfg.predict != "v" else "has its own text encoder"
        raise SystemExit(f"error: {out}: diffusers cannot represent a model that {why}: export one trained "
                         "from SD3 (predict v, txt_bytes 0)")
    with torch.device("meta"):
        own = MMDiT(cfg).state_dict()
    check_fit(state, {k: v.shape for k, v in own.items()}, out, "an SD3 transformer of this size")
    config = {
        "_class_name": "SD3Transformer2DModel", "attention_head_dim": cfg.head_dim,
        "caption_projection_dim": cfg.width, "dual_attention_layers": list(range(cfg.dual)),
        "in_channels": cfg.in_channels, "joint_attention_dim": cfg.txt_dim, "num_attention_heads": cfg.heads,
        "num_layers": cfg.depth, "out_channels": cfg.channels, "patch_size": cfg.patch,
        "pooled_projection_dim": cfg.vec_dim, "pos_embed_max_size": cfg.pos_max,
        "qk_norm": "rms_norm" if cfg.qk_norm else None,
        "sample_size": min(128, cfg.pos_max * cfg.patch)}  # pipelines' default picture, 1024 as in SD3
    groups, room = [[]], shard
    weights = to_diffusers(state)
    for name, value in weights.items():
        if groups[-1] and value.nbytes > room:
            groups.append([])
            room = shard
        groups[-1].append(name)
        room -= value.nbytes
    stem = "diffusion_pytorch_model"
    files = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    files = files if len(groups) > 1 else [f"{stem}.safetensors"]
    folder = Path(out) / "transformer"
    tmp = folder.with_name("transformer.tmp")
    if folder.exists():
        raise SystemExit(f"error: {folder}: is there already: name another folder")
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        for file, names in zip(files, groups):
            write({n: weights[n] for n in names}, tmp / file)
        if len(groups) > 1:
            index = {"metadata": {"total_size": sum(v.nbytes for v in weights.values())},
                     "weight_map": {n: file for file, names in zip(files, groups) for n in names}}
            (tmp / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))
        (tmp / "config.json").write_text(json.dumps(config, indent=1))
        tmp.rename(folder)
    except (OSError, SafetensorError) as e:
        raise SystemExit(f"error: {folder}: cannot be written ({first_line(e)}): free some space, or name "
                         "another folder") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return folder


def export(checkpoint: str, out: str) -> None:
    """One of our checkpoints of an Editor, the averaged weights first -> OUT/transformer/ (diffusers)."""
    tensors, manifest = common.load_checkpoint(checkpoint, ("ema", "model"))
    cfg = config_from(EditorConfig, manifest.get("arch", {}), "editor", checkpoint)
    weights = tensors.get("ema") or tensors["model"]
    state = {k.removeprefix("mmdit."): v for k, v in weights.items() if k.startswith("mmdit.")}
    folder = export_diffusers(cfg, state, out)
    print(f"{folder}: {describe(state)}")


COMMANDS = {"show": (show, "PATH"), "convert": (convert, "IN.pt OUT.safetensors"),
            "export": (export, "CHECKPOINT OUT")}

if __name__ == "__main__":
    command, arguments = COMMANDS.get(sys.argv[1] if len(sys.argv) > 1 else "", (None, ""))
    if command is None or len(sys.argv) - 2 != len(arguments.split()):
        raise SystemExit("usage: " + "\n       ".join(
            f"python weights.py {name} {words}" for name, (_, words) in COMMANDS.items()))
    command(*sys.argv[2:])
