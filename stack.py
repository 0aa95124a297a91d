"""What stands around an editor of latents and is never trained: SD3's VAE, and its text encoders or a cache.

A pixel model needs none of it. One on SD3's weights remembers in its manifest where they are (meta.sd3).
"""

from dataclasses import asdict
from pathlib import Path

import torch

import cache
import frozen
import model
import weights

SD3 = {"image_size": 1024, "aspects": True, "shift": 3.0}  # what its weights were trained for


def open_public(path: str, device: str = "cpu") -> tuple[dict[str, torch.Tensor], dict]:
    """SD3's or SD3.5's weights -> state dict of an Editor, in fp32, and a manifest as ours are."""
    cfg, state = weights.load_mmdit(path, torch.float32, device)
    arch = {"kind": "editor", **asdict(cfg)}
    return ({f"mmdit.{k}": v for k, v in state.items()},
            {"arch": arch, "step": 0, "config": SD3, "meta": {"stack": {"sd3": str(Path(path).absolute())}}})


def surround(net: model.Editor | model.EditNet, known: dict, device: torch.device, what: str,
             tokenizers: str | None = None, folder: str | None = None) -> tuple:
    """-> the space `net` works in, what the next manifest says of it, the opened cache or None; and `net`
    learns to read captions.

    known: meta.stack of the manifest the weights came with: sd3, perhaps tokenizers and t5_length. folder:
    one of cache.py, in place of the text encoders. what: the flag and path that errors name.
    """
    if net.cfg.txt_bytes:
        if folder:
            raise SystemExit(f"error: --cache: {folder}: {what} reads captions itself: leave it out")
        return frozen.PixelSpace(), {}, None
    if not known.get("sd3"):
        raise SystemExit(f"error: {what}: its manifest does not say where VAE and text encoders are: give "
                         "--sd3")
    path = known["sd3"]
    vae = weights.load_vae(path, torch.float32, device)  # bf16 weights cost 1.6 % of the latents
    if vae.channels != net.cfg.channels:
        raise SystemExit(f"error: {what}: works on {net.cfg.channels} latent channels, the VAE of {path} has "
                         f"{vae.channels}: give the weights that belong together")
    known = known | ({"tokenizers": tokenizers} if tokenizers else {})
    words = None
    if folder:
        words = cache.open_cache(folder, base=path)
        known = known | {"t5_length": words.made["t5_length"]}
    else:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        text = weights.load_text(path, known.get("tokenizers"), dtype, device,
                                 t5_length=known.get("t5_length", 77))

    def read(captions):  # a function: deepcopy of the net does not copy what it holds
        features = words.text(captions, device) if words else text.encode_text(captions)
        return tuple(x.float() for x in features)

    txt, vec = read([""])
    if (got := (txt.shape[2], vec.shape[1])) != (net.cfg.txt_dim, net.cfg.vec_dim):
        raise SystemExit(f"error: {what}: reads text of widths {net.cfg.txt_dim} and {net.cfg.vec_dim}, "
                         f"{folder or path} gives {got[0]} and {got[1]}: give what belongs together")
    (net.base if isinstance(net, model.EditNet) else net).read = read
    return vae, known, words


def latents(cached: cache.Cache, source, vae: frozen.VAE, cfg, stride: int) -> tuple:
    """A source of pictures -> the same of latents, and their space. cfg: a train script's; stage inpaint
    makes its masks in pixels, and reads pictures."""
    if cfg.stage == "inpaint":
        raise SystemExit(f"error: --cache: {cfg.cache}: --stage inpaint masks pictures, not latents: make a "
                         "cache with --latents False")
    cache.open_cache(cfg.cache, source, image_size=cfg.image_size, aspects=cfg.aspects, stride=stride,
                     edits=cfg.stage == "edit")
    return cached.source(source), frozen.Encoded(vae)
