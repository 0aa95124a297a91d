"""What stands around an editor of latents and is never trained: SD3's VAE, and its text encoders or a cache.

A pixel model needs none of it. One on SD3's weights remembers in its manifest where they are (meta.sd3).
"""

from dataclasses import asdict

import torch

import cache as cached
import frozen
import model
import weights

SD3 = {"image_size": 1024, "aspects": True, "shift": 3.0}  # what its weights were trained for


def open_public(path: str) -> tuple[dict[str, torch.Tensor], dict]:
    """SD3's or SD3.5's weights -> state dict of an Editor, on the CPU in fp32, and a manifest as ours are."""
    cfg, state = weights.load_mmdit(path, torch.float32, "cpu")
    arch = {"kind": "editor", **asdict(cfg)}
    return ({f"mmdit.{k}": v for k, v in state.items()},
            {"arch": arch, "step": 0, "config": SD3, "meta": {"stack": {"sd3": path}}})


def surround(net: model.Editor | model.EditNet, known: dict, device: torch.device, what: str,
             tokenizers: str | None = None, cache: str | None = None) -> tuple[object, dict]:
    """The space `net` works in, and what the next manifest says of it; `net` learns to read captions.

    known: meta.stack of the manifest the weights came with: sd3, perhaps tokenizers and t5_length. cache: a
    folder of cache.py, in place of the text encoders. what: the flag and path that errors name.
    """
    if net.cfg.txt_bytes:
        return frozen.PixelSpace(), {}
    if not known.get("sd3"):
        raise SystemExit(f"error: {what}: its manifest does not say where VAE and text encoders are: give "
                         "--sd3")
    path = known["sd3"]
    vae = weights.load_vae(path, torch.float32, device)  # bf16 weights cost 1.6 % of the latents
    if vae.channels != net.cfg.channels:
        raise SystemExit(f"error: {what}: works on {net.cfg.channels} latent channels, the VAE of {path} has "
                         f"{vae.channels}: give the weights that belong together")
    known = known | ({"tokenizers": tokenizers} if tokenizers else {})
    if cache:
        words = cached.open_cache(cache)
        known = known | {"t5_length": words.t5_length}

        def read(captions):
            return words.text(captions, device)
    else:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        text = weights.load_text(path, known.get("tokenizers"), dtype, device,
                                 t5_length=known.get("t5_length", 77))

        def read(captions):
            return text.encode_text(captions)

    (net.base if isinstance(net, model.EditNet) else net).read = lambda captions: [
        x.float() for x in read(captions)]  # a function: deepcopy does not copy what it holds
    return vae, known
