"""An editor ready to use: opened from any folder or from public weights, with what stands around it.

    pipe = open_editor("assets/base", device, needs=("fill",))
    noise = ...                                                   # [B, C, h, w] in the space of pipe.space
    pictures = sample(pipe.net, pipe.space, captions, mask, image, noise, flow.timesteps(20, pipe.shift))

Around a model of pixels stands nothing. One of latents needs SD3's VAE, and its text encoders or a cache of
what they say; where these are its manifest remembers (meta.stack, see checkpoint.kept_places). Nothing here
is trained.
"""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoint
import common
import flow
import model
from pretrained.files import is_public
from pretrained.sd3 import load_mmdit
from pretrained.text import load_text
from pretrained.vae import VAE, load_vae
from readers.cached import Cache, open_cache

SD3 = {"image_size": 1024, "aspects": True, "shift": 3.0}  # what its weights were trained for
MASK_INPUT = "mmdit.x_embedder.proj.weight"  # whose further columns read the mask and the masked picture

########################################## 1. spaces #########################################################


def shrink(mask: Tensor, stride: int) -> Tensor:
    """[B, 1, H, W] -> [B, 1, H/s, W/s]: a latent is regenerated when any of its pixels is."""
    return mask if stride == 1 else F.max_pool2d(mask, stride)


class PixelSpace:
    """The latent space of models that work on pixels: the picture itself, [B, 3, H, W] in [-1, 1]."""

    stride, channels = 1, 3

    def encode(self, image: Tensor) -> Tensor:
        return image

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class Encoded:
    """A VAE's space for pictures that are latents already, and masks of their size (readers/cached.py)."""

    stride = 1

    def __init__(self, vae: VAE):
        self.vae, self.channels = vae, vae.channels

    def encode(self, latents: Tensor) -> Tensor:
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents)


Space = PixelSpace | Encoded | VAE

########################################## 2. opening ########################################################


class Pipe(NamedTuple):
    net: model.Editor | model.EditNet  # on the CPU, its weights as they were saved, in fp32
    space: Space  # in which it works
    manifest: dict  # of the checkpoint
    stack: dict  # for meta.stack of the next manifest: where VAE and text encoders are
    cache: Cache | None  # in place of the text encoders

    @property
    def size(self) -> int | None:
        """Side of the square that it was trained at, in pixels."""
        return self.manifest.get("config", {}).get("image_size")

    @property
    def shift(self) -> float:
        """Of the sampler's times."""
        return float(self.manifest.get("config", {}).get("shift") or 1.0)

    @property
    def follows(self) -> bool:
        """Whether it follows instructions; else it draws captions, and fills holes if it can."""
        return isinstance(self.net, model.EditNet)


NEEDS = {  # what an editor must be able to do -> what to give instead of one that cannot
    "draw": "captions are to be drawn: give a base or an inpainting model",
    "fill": "holes are to be filled: give an inpainting model, of train_omni.py --stage inpaint",
    "follow": "instructions are to be followed: give the folder of a run with --stage edit"}


def open_weights(path: str, which: str = "auto", device: str = "cpu",
                 what: str = "--ckpt") -> tuple[dict[str, Tensor], dict]:
    """State dict and manifest of a checkpoint folder of ours, or of SD3's or SD3.5's public weights, which
    become an Editor's, in fp32.

    which: "ema" or "model"; "auto": the averaged ones where there are any. what: the flag that errors name.
    """
    if not os.path.exists(path):
        raise SystemExit(f"error: {what}: {path}: no such folder or file: give a run folder, a step_* folder "
                         "in one, a folder of assets/, or SD3 weights")
    if is_public(path):
        cfg, state = load_mmdit(path, torch.float32, device)
        return ({f"mmdit.{k}": v for k, v in state.items()},
                {"arch": {"kind": "editor", **asdict(cfg)}, "step": 0, "config": SD3,
                 "meta": {"stack": {"sd3": str(Path(path).absolute())}}})
    tensors, manifest = checkpoint.load(path, ("ema", "model") if which == "auto" else which)
    if stack := manifest.get("meta", {}).get("stack"):
        manifest["meta"]["stack"] = checkpoint.found_places(stack, path)
    return tensors.get("ema") or tensors["model"], manifest


def open_editor(path: str, device: torch.device, needs: tuple[str, ...] = (), what: str = "--ckpt",
                which: str = "auto", sd3: str | None = None, tokenizers: str | None = None,
                cache: str | None = None, mask_input: bool = False) -> Pipe:
    """Open what a train script wrote, or public weights. SystemExit with one line, in which `what` is the
    flag, for all that cannot be used.

    needs: of "draw", "fill", "follow" it must be able to do one. sd3, tokenizers, cache: where SD3's VAE and
    text encoders are, if not where the manifest says, and a cache in place of the latter. mask_input: give
    public weights, which have none, an empty one, whose columns are zero.
    """
    state, manifest = open_weights(path, which, what=what)
    arch, what = manifest.get("arch", {}), f"{what}: {path}"
    if arch.get("kind") == "editnet":
        net, able, kind = model.build_editnet(arch, what), {"follow"}, "an instruction editor"
    else:
        if mask_input and is_public(path) and not arch["inpaint"]:
            arch = arch | {"inpaint": True}
            common.print0(f"note: {what}: has no mask input and begins with an empty one: "
                          "train_omni.py --stage inpaint teaches it to read masks first")
        net = model.build_editor(arch, what)
        able = {"draw", "fill"} if net.cfg.inpaint else {"draw"}
        kind = "an inpainting model" if net.cfg.inpaint else "a text-to-image base without mask input"
        state = model.widen_input(state, net.cfg.in_channels, MASK_INPUT) if mask_input else state
    if needs and not able & set(needs):
        raise SystemExit(f"error: {what}: is {kind}; {NEEDS[needs[0]]}")
    checkpoint.load_state(net, state, path)
    stack = manifest.get("meta", {}).get("stack", {}) | ({"sd3": sd3} if sd3 else {})
    space, stack, words = surround(net, stack, device, what, tokenizers, cache)
    return Pipe(net, space, manifest, stack, words)


def surround(net: model.Editor | model.EditNet, stack: dict, device: torch.device, what: str,
             tokenizers: str | None = None, folder: str | None = None) -> tuple[Space, dict, Cache | None]:
    """-> the space `net` works in, what the next manifest says of it, the opened cache or None; and `net`
    learns to read captions.

    stack: meta.stack of the manifest the weights came with: sd3, perhaps tokenizers, t5, t5_length. folder:
    one of make_cache.py, in place of the text encoders. what: the flag and path that errors name.
    """
    if net.cfg.txt_bytes:
        for flag, value in (("cache", folder), ("sd3", stack.get("sd3")), ("tokenizers", tokenizers)):
            if value:
                raise SystemExit(f"error: --{flag}: {value}: {what} draws pixels and reads captions itself: "
                                 "leave it out")
        return PixelSpace(), {}, None
    if not stack.get("sd3"):
        raise SystemExit(f"error: {what}: its manifest does not say where VAE and text encoders are: give "
                         "--sd3")
    path = stack["sd3"]
    stack = stack | ({"tokenizers": tokenizers} if tokenizers else {})
    for flag, place in (("sd3", path), ("tokenizers", stack.get("tokenizers") if not folder else None)):
        if place and not os.path.exists(place):
            raise SystemExit(f"error: {what}: VAE and text encoders: {place}: no such file or folder: give "
                             f"--{flag}, which says where they are")
    vae = load_vae(path, torch.float32, device)  # bf16 weights cost 1.6 % of the latents
    if vae.channels != net.cfg.channels:
        raise SystemExit(f"error: {what}: works on {net.cfg.channels} latent channels, the VAE of {path} has "
                         f"{vae.channels}: give the weights that belong together")
    words = None
    if folder:
        words = open_cache(folder, base=path)
        made = {k: words.made[k] for k in ("t5", "t5_length")}  # without T5 its tokens are zeros
        if differ := [f"{k} {made[k]}, not {stack[k]}" for k in made if made[k] != stack.get(k, made[k])]:
            common.print0(f"note: --cache: {folder}: {what} read other text until now: {', '.join(differ)}")
        stack = stack | made
    else:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        text = load_text(path, stack.get("tokenizers"), dtype, device, stack.get("t5", True),
                         stack.get("t5_length", 77))

    def read(captions):  # a function: deepcopy of the net does not copy what it holds
        features = words.text(captions, device) if words else text.encode_text(captions)
        return tuple(x.float() for x in features)

    txt, vec = read([""])
    if (got := (txt.shape[2], vec.shape[1])) != (net.cfg.txt_dim, net.cfg.vec_dim):
        raise SystemExit(f"error: {what}: reads text of widths {net.cfg.txt_dim} and {net.cfg.vec_dim}, "
                         f"{folder or path} gives {got[0]} and {got[1]}: give what belongs together")
    (net.base if isinstance(net, model.EditNet) else net).read = read
    return vae, stack, words


def text_tokens(net: model.Editor | model.EditNet, stack: dict) -> int:
    """How many tokens a caption is, to `net` and the text encoders that `stack` names."""
    return net.cfg.txt_bytes // 4 or 77 + stack.get("t5_length", 77)


def latents(cached: Cache, source, vae: VAE, cfg, stride: int) -> tuple:
    """A source of pictures -> the same of latents, and their space. cfg: a train script's; stage inpaint
    makes its masks in pixels, and reads pictures."""
    if cfg.stage == "inpaint":
        raise SystemExit(f"error: --cache: {cfg.cache}: --stage inpaint masks pictures, not latents: make a "
                         "cache with --latents False")
    open_cache(cfg.cache, source, image_size=cfg.image_size, aspects=cfg.aspects, stride=stride,
               edits=cfg.stage == "edit")
    return cached.source(source), Encoded(vae)


def check_shapes(net: model.Editor | model.EditNet, shapes: list, token: int, image_size: int) -> None:
    """SystemExit where one of the shapes (h, w) to train at, in pixels, has more tokens a side, of `token`
    pixels, than the position table of `net`: a long bucket may come only after hours."""
    h, w = max(shapes, key=max)
    if max(h, w) > (most := net.cfg.pos_max) * token:
        raise SystemExit(f"error: --image_size: {image_size}: makes pictures of {w}x{h} pixels, "
                         f"{w // token}x{h // token} tokens, and the model's position table has "
                         f"{most}x{most}: use a smaller one, or leave --aspects out")


########################################## 3. using ##########################################################


def conditions(net: model.Editor | model.EditNet, space: Space, mask: Tensor, image: Tensor) -> tuple:
    """What an editor is given beside the text, in its space.

    mask [B, 1, H, W], 1 = regenerate, or the region that may change; image [B, 3, H, W]: the picture with the
    hole, or the source of an edit. -> m [B, 1, h, w] and the latents of image (1 - mask) [B, C, h, w]; or the
    source's latents and the region; or nothing, for a text-to-image base.
    """
    if isinstance(net, model.EditNet):
        return space.encode(image), shrink(mask, space.stride)
    if not net.cfg.inpaint:
        return ()
    return shrink(mask, space.stride), space.encode(image * (1 - mask))


def denoiser(net: model.Editor | model.EditNet, captions: list[str], condition: tuple, guidance: float = 1.0,
             image_guidance: float = 1.0) -> flow.Denoise:
    """`net` under classifier-free guidance, as flow.sample takes it: one call of the network a step.

    captions [B], or instructions; condition: of `conditions`. An instruction editor has dual guidance
    (InstructPix2Pix); its null picture is zeros, with a region of ones. What a cached one needs of the source
    is computed here, once.
    """
    memory, text = (), net.encode_text(captions)
    null = tuple(x.expand(len(captions), *x.shape[1:]) for x in net.encode_text([""]))
    if isinstance(net, model.EditNet):
        weights = flow.dual_weights(guidance, image_guidance)
        src, region = condition
        known = {"both": (*text, src, region), "image": (*null, src, region),
                 "none": (*null, torch.zeros_like(src), torch.ones_like(region))}
    else:
        weights = flow.text_weights(guidance)
        known = {"both": (*text, *condition), "none": (*null, *condition)}
    rows = [torch.cat(parts) for parts in zip(*(known[name] for name in weights))]
    if isinstance(net, model.EditNet) and net.cached:
        memory = (net.remember(*rows),)
    return flow.guide(lambda x, t: net(x, t, *rows, *memory), weights)


@torch.inference_mode()
def sample(net: model.Editor | model.EditNet, space: Space, captions: list[str], mask: Tensor, image: Tensor,
           noise: Tensor, ts: list[float], guidance: float = 1.0, image_guidance: float = 1.0,
           solver: str = "euler", blend: str = "none", bf16: bool = False,
           tick: Callable[[], object] = lambda: None, begin: Tensor | None = None) -> Tensor:
    """Fill holes, follow instructions, or draw captions -> pictures [B, 3, H, W], fp32, not clamped, nothing
    pasted, on the device of `net`.

    captions [B] (or instructions); mask, image: as for `conditions`, on any device; text to image: ones and
    zeros. noise [B, C, h, w] of the space. ts: flow.timesteps. guidance 1: off. blend: put what the mask
    keeps back after "every" step, or every second one ("alternate"; flow.sample). bf16: autocast. tick: is
    called at every evaluation. begin [B, 3, H, W]: what to start from at ts[0] < 1, instead of noise alone.
    """
    device = next(net.parameters()).device
    noise = noise.to(device)
    condition = conditions(net, space, mask.to(device), image.to(device))
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        velocity = denoiser(net, captions, condition, guidance, image_guidance)

        def denoise(x: Tensor, t: Tensor) -> Tensor | flow.Guided:
            tick()
            return velocity(x, t)

        back = {}
        if blend != "none":
            known, kept = condition if isinstance(net, model.EditNet) else condition[::-1]
            back = dict(known=known, noise=noise, mask=kept, alternate=blend == "alternate")
        x = noise
        if begin is not None:
            x = flow.interpolate(space.encode(begin.to(device)), noise, noise.new_full((len(noise),), ts[0]))
        z0 = flow.sample(denoise, x, ts, solver, **back)
    return space.decode(z0)


def to_work(canvas: np.ndarray, mask: np.ndarray, H: int, W: int,
            hide: bool = True) -> tuple[tuple, Tensor, Tensor]:
    """Fit a picture uint8 [h0, w0, 3] and its mask [h0, w0] inside (H, W), the rest filled by reflection ->
    box (top, left, h, w) of the picture in it, mask [1, H, W], picture [3, H, W] in [-1, 1].

    What the mask hides must not leak into the known pixels around it, as plain resizing would let it: known
    pixels are averaged among themselves, and a working pixel that any masked pixel falls on counts as masked.
    hide=False: an edit sees the whole picture, and its mask stays soft.
    """
    size = mask.shape
    scale = min(H / size[0], W / size[1])
    h, w = (max(1, min(side, round(n * scale))) for side, n in zip((H, W), size))
    hole = torch.from_numpy(mask >= 0.5 if hide else mask)[None, None].float()
    x = torch.from_numpy(canvas).permute(2, 0, 1)[None].float() / 127.5 - 1
    seen = 1 - hole if hide else torch.ones_like(hole)
    if (h, w) != size:
        parts = F.interpolate(torch.cat([x * seen, seen], 1), (h, w), mode="bicubic", antialias=True)
        x = (parts[:, :3] / parts[:, 3:].clamp(min=1e-3)).clamp(-1, 1)
        hole = F.adaptive_max_pool2d(hole, (h, w))
    top, left = (H - h) // 2, (W - w) // 2
    both = torch.cat([hole, x * (1 - hole) if hide else x], 1)[0].numpy()
    both = torch.from_numpy(np.pad(both, ((0, 0), (top, H - h - top), (left, W - w - left)), "symmetric"))
    return (top, left, h, w), both[:1], both[1:]


def from_work(x0: Tensor, box: tuple, h: int, w: int) -> np.ndarray:
    """Sampled [3, H, W] -> the picture in its box, scaled back to (h, w): float [h, w, 3], 0 to 255."""
    top, left, high, wide = box
    x = x0[:, top:top + high, left:left + wide]
    if (high, wide) != (h, w):
        x = F.interpolate(x[None], (h, w), mode="bicubic", antialias=True)[0]
    return ((x.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()


########################################## 4. baselines ######################################################

# What the papers' tables compare with, on a base that draws captions (with a mask input: all is hole).
METHODS = ("sdedit", "blended", "diffedit")


def method_of(ckpt: str, solver: str = "euler") -> tuple[str, str]:
    """ "sdedit:assets/base" -> its two parts; another path -> "" and itself. SystemExit for a solver that the
    method has not."""
    method, _, base = ckpt.partition(":")
    if method == "diffedit" and solver != "euler":
        raise SystemExit(f"error: --solver: {solver}: {ckpt} goes up and down the flow in Euler's steps: "
                         "leave it out")
    return (method, base) if method in METHODS else ("", ckpt)


def free(net: model.Editor, space: Space, captions: list[str], image: Tensor, guidance: float) \
        -> flow.Denoise:
    """A base that draws captions and is told nothing of `image` [B, 3, H, W] but its size."""
    return denoiser(net, captions, conditions(net, space, torch.ones_like(image[:, :1]), image), guidance)


@torch.inference_mode()
def baseline(method: str, net: model.Editor, space: Space, captions: list[str], image: Tensor, region: Tensor,
             noise: Tensor, steps: int, shift: float = 1.0, guidance: float = 3.0, strength: float = 0.75,
             before: list[str] | None = None, solver: str = "euler", bf16: bool = False) -> Tensor:
    """Edit pictures with a base that only draws captions -> [B, 3, H, W], fp32, not clamped, nothing pasted.

    captions [B] of the pictures that are wanted; image [B, 3, H, W] in [-1, 1]; region [B, 1, H, W], what may
    change (blended alone looks at it); noise [B, C, h, w] of the space. strength: the share of the `steps`
    paper steps that is run (1: the picture is noise at first). before [B]: captions of `image` (diffedit;
    None: ""). solver: as of flow.sample, for the first two.

    sdedit: noise the picture to `strength` and denoise it (Meng et al. 2022, Algorithm 1).
    blended: from noise; after every step what the region leaves is the noised picture (Avrahami et al. 2023,
    Algorithm 1; its decoder is not tuned to each picture, nor thin masks widened).
    diffedit: the region is where the captions disagree (`disagreement`); the picture goes up to `strength`
    along the flow of the empty caption, and comes down with the new caption in the region, outside it the way
    it went up (Couairon et al. 2023, Sec. 3.2; of its DDIM encoding the flow's Euler steps).
    """
    device = next(net.parameters()).device
    image, region, noise = image.to(device), region.to(device), noise.to(device)
    z = space.encode(image)
    ts = flow.timesteps(steps, shift, start=max(1, round(strength * steps)))
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        wanted = free(net, space, captions, image, guidance)
        if method == "sdedit":
            x = flow.sample(wanted, flow.interpolate(z, noise, noise.new_full((len(z),), ts[0])), ts, solver)
        elif method == "blended":
            m = shrink(region.float(), space.stride)
            x = flow.sample(wanted, noise, flow.timesteps(steps, shift), solver, z, noise, m)
        elif method == "diffedit":
            unsaid = free(net, space, [""] * len(z), image, 1.0)
            m = disagreement(wanted, free(net, space, before or [""] * len(z), image, guidance), z, noise)
            way = [z]  # x at ts[-1], ..., ts[0]; a step up asks at its end: at t = 0 no velocity is learnt
            for t, t_next in zip(ts[:0:-1], ts[-2::-1]):
                v = unsaid(way[-1], z.new_full((len(z),), t_next))
                way.append(flow.euler_step(way[-1], v, t, t_next))
            x = way.pop()
            for t, t_next in zip(ts[:-1], ts[1:]):
                x = flow.euler_step(x, wanted(x, x.new_full((len(x),), t)), t, t_next)
                x = m * x + (1 - m) * way.pop()
        else:
            raise SystemExit(f"error: --method: {method}: use one of {', '.join(METHODS)}")
    return space.decode(x)


def disagreement(one: flow.Denoise, other: flow.Denoise, z: Tensor, noise: Tensor, t: float = 0.5,
                 draws: int = 10, threshold: float = 0.5) -> Tensor:
    """DiffEdit's mask (Couairon et al. 2023, Sec. 3.2, step 1) -> [B, 1, h, w] in {0, 1}, 1 = may change.

    Where two denoisers differ, |v - v'|, meaned over the channels and over `draws` noises at t; of each
    picture cut at three times its mean and made [0, 1] (the paper: "remove extreme values", the factor is
    its code's), then above `threshold`. The noises are `noise` [B, C, h, w], rolled by some places: nothing
    new is drawn.
    """
    total, at = 0.0, z.new_full((len(z),), t)
    for k in range(draws):
        x = flow.interpolate(z, noise.roll((3 * k, 5 * k), (2, 3)), at)
        d = flow.euler_step(torch.zeros_like(x), one(x, at), 0.0, 1.0) \
            - flow.euler_step(torch.zeros_like(x), other(x, at), 0.0, 1.0)
        total = total + d.abs().mean(1, keepdim=True)
    most = 3 * total.mean((1, 2, 3), keepdim=True)
    return (torch.minimum(total, most) / most.clamp(min=1e-9) > threshold).float()
