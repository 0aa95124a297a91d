"""SD3's autoencoder (first_stage_model.* of its single-file checkpoints), and how it is loaded."""

import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pretrained.files import Device, Place, count, fill, open_part, same_name, setting, shape_of


@dataclass(frozen=True)
class VAEConfig:
    """Architecture and latent scale of an autoencoder; the defaults are SD3's and SD3.5's."""

    width: int = 128  # channels at full size; a multiple of 32, the number of groups of the norms
    mult: tuple[int, ...] = (1, 2, 4, 4)  # width of each level; the stride is 2 ** (levels - 1)
    blocks: int = 2  # residual blocks per level of the encoder; the decoder has one more
    channels: int = 16  # latent channels
    scale: float = 1.5305  # model's latents = (z - shift) * scale
    shift: float = 0.0609


def convolve(x: Tensor, conv: nn.Conv2d, norm: nn.GroupNorm | None = None, up: bool = False) -> Tensor:
    """A 3x3 convolution of silu(norm(x)), or of x, or of x at twice the size (nearest); [B, C, H, W].

    Trap: with stride 2 the zeros stand right and below only, not all around (O(1) off otherwise).
    """
    x = x if norm is None else F.silu(norm(x))
    x = F.interpolate(x, scale_factor=2.0, mode="nearest") if up else x
    return conv(F.pad(x, (0, 1, 0, 1)) if conv.stride[0] == 2 else x)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2 = group_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        if channels_in != channels:
            self.nin_shortcut = nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = convolve(x, self.conv1, self.norm1)
        h = convolve(h, self.conv2, self.norm2)
        shortcut = getattr(self, "nin_shortcut", nn.Identity())
        return shortcut(x) + h


class AttnBlock(nn.Module):
    """One head over all places of the map."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).mT[:, None] for f in (self.q, self.k, self.v))            # [B, 1, HW, C]
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.unflatten(2, x.shape[2:])
        return x + self.proj_out(h)


class Resample(nn.Module):
    """Half or twice the size."""

    def __init__(self, channels: int, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.conv, up=self.up)


class Middle(nn.Module):
    """Works at the latents' size."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """Residual blocks of one size, then a change of size: "downsample", "upsample", "" for none."""

    def __init__(self, channels_in: int, channels: int, blocks: int, resample: str):
        super().__init__()
        widths = [channels_in] + [channels] * blocks
        self.block = nn.ModuleList(ResBlock(a, b) for a, b in zip(widths, widths[1:]))
        if resample:
            setattr(self, resample, Resample(channels, up=resample == "upsample"))

    def parts(self) -> list[nn.Module]:
        return [*self.block, *(m for name, m in self.named_children() if name != "block")]


class VAEHalf(nn.Module):
    """The encoder or the decoder: conv_in, levels (before or after the middle), norm_out, conv_out."""

    def __init__(self, cfg: VAEConfig, decoder: bool):
        super().__init__()
        widths = [cfg.width * m for m in cfg.mult]
        top, last = widths[-1], len(widths) - 1
        ends = (cfg.channels, top, widths[0], 3) if decoder else (3, widths[0], top, 2 * cfg.channels)
        self.conv_in = nn.Conv2d(ends[0], ends[1], 3, padding=1)
        if decoder:  # trap: numbered by size as in the encoder, so the first to run is the last: up.3
            before = [*widths[1:], top]
            self.up = nn.ModuleList(Level(before[i], w, cfg.blocks + 1, "upsample" if i > 0 else "")
                                    for i, w in enumerate(widths))
        else:
            before = [widths[0], *widths[:-1]]
            self.down = nn.ModuleList(Level(before[i], w, cfg.blocks, "downsample" if i < last else "")
                                      for i, w in enumerate(widths))
        self.mid = Middle(top)
        self.norm_out = group_norm(ends[2])
        self.conv_out = nn.Conv2d(ends[2], ends[3], 3, padding=1)
        self.decoder = decoder

    def forward(self, x: Tensor, recompute: bool) -> Tensor:
        levels = reversed(self.up) if self.decoder else self.down
        parts = [part for level in levels for part in level.parts()]
        parts = [self.mid, *parts] if self.decoder else [*parts, self.mid]
        x = convolve(x, self.conv_in)
        for part in [*parts, self.end]:
            if recompute and torch.is_grad_enabled():
                x = checkpoint(part, x, use_reentrant=False)
            else:
                x = part(x)
        return x

    def end(self, x: Tensor) -> Tensor:
        return convolve(x, self.conv_out, self.norm_out)


class VAE(nn.Module):
    """SD3's autoencoder, with the interface of PixelSpace; no quantising convolutions on either side.

    checkpoint: with gradients, keep the input of every residual block and resampling, and recompute the rest
      in the backward pass.
    It computes in the dtype of its weights (the decoder in autocast's) and answers in that of its input. bf16
    weights cost 1.6% of the latents and of the picture: encode in fp32 or fp16.
    """

    def __init__(self, cfg: VAEConfig = VAEConfig()):
        super().__init__()
        self.cfg = cfg
        self.stride, self.channels = 2 ** (len(cfg.mult) - 1), cfg.channels
        self.checkpoint = False
        self.encoder = VAEHalf(cfg, decoder=False)
        self.decoder = VAEHalf(cfg, decoder=True)

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image [B, 3, H, W] in [-1, 1] -> mean, log variance of z, unscaled, [B, C, H/stride, W/stride]."""
        h, w = image.shape[-2:]
        if h % self.stride or w % self.stride:
            raise SystemExit(f"error: a picture of {h}x{w}: the VAE takes sides that are multiples of "
                             f"{self.stride}: resize or crop it")
        with torch.autocast(image.device.type, enabled=False):  # PeFL's judge and tiles ask under it
            both = self.encoder(image.to(self.encoder.conv_in.weight.dtype), self.checkpoint)
        mean, logvar = both.to(image).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """image [B, 3, H, W] in [-1, 1] -> scaled latents [B, C, H/stride, W/stride].

        noise: standard normal of the latents' shape, for a sample of the posterior; None: its mode.
        """
        mean, logvar = self.moments(image)
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        return (z - self.cfg.shift) * self.cfg.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] -> picture [B, 3, h * stride, w * stride], not clamped."""
        z = latents / self.cfg.scale + self.cfg.shift
        return self.decoder(z.to(self.decoder.conv_in.weight.dtype), self.checkpoint).to(latents)


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


def load_vae(path: str, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> VAE:
    """The autoencoder of a public SD3 (file or diffusers folder), frozen; sizes from the shapes.

    Scale and shift of the latents: SD3's, or as the folder's vae/config.json says.
    """
    stored, config = open_part(path, "vae")
    if not (weights := stored.headers):
        raise SystemExit(f"error: {path}: holds no autoencoder: give a file with first_stage_model.* or a "
                         "folder with vae/")
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
