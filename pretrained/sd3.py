"""SD3's and SD3.5's transformer from its two published layouts, and back into diffusers' one."""

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from model import EditorConfig, MMDiT
from pretrained.files import (
    Device,
    Place,
    Weights,
    check_fit,
    count,
    fetch,
    first_line,
    open_part,
    same_name,
    setting,
    shape_of,
    write,
)

####################################################################################################
# 1. Names in diffusers' folders
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
