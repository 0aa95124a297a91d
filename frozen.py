"""What is loaded and never trained: latent spaces and perceptual features.

Weights come from safetensors, or from the one public file that exists in no other form (torchvision's VGG16),
which is read with `weights_only=True`.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
    """A VAE's space for pictures that are latents already, and masks of their size (cache.py)."""

    stride = 1

    def __init__(self, vae: "VAE"):
        self.vae, self.channels = vae, vae.channels

    def encode(self, latents: Tensor) -> Tensor:
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents)


####################################################################################################
# The latent space of SD3 (first_stage_model.* of its single-file checkpoints)
####################################################################################################


@dataclass(frozen=True)
class VAEConfig:
    """Architecture and latent scale of an autoencoder; the defaults are SD3's and SD3.5's."""

    width: int = 128  # channels at full size; a multiple of 32, the number of groups of the norms
    mult: tuple[int, ...] = (1, 2, 4, 4)  # width of each level; the stride is 2 ** (levels - 1)
    blocks: int = 2  # residual blocks per level of the encoder; the decoder has one more
    channels: int = 16  # latent channels
    scale: float = 1.5305  # model's latents = (z - shift) * scale
    shift: float = 0.0609


@dataclass(frozen=True)
class Bands:
    """Work on maps too large to work on at once: `rows` rows at a time; whole maps are kept on `store`.

    Up to three whole maps exist at once. Decoding 4096x4096 in 16 bits the largest three take 17 GB together
    (calculated), which may be the host's; a band's temporaries are on the weights' device.
    """

    rows: int
    store: torch.device | str | None = None  # None: where the weights are


def conv_rows(x: Tensor, conv: nn.Conv2d, norm: nn.GroupNorm | None = None, up: bool = False,
              bands: Bands | None = None) -> Tensor:
    """A 3x3 convolution of silu(norm(x)), or of x, or of x at twice the size (nearest); [B, C, H, W].

    Trap: with stride 2 the zeros stand right and below only, not all around (O(1) off otherwise).
    With `bands` the result is the same, band by band: the norm's statistics are those of the whole map, and a
    band reads the one row on either side that the convolution asks for. So there are no tiles, no seams and
    nothing to blend; a band holds its share of the temporaries instead of the map.
    """
    stride = conv.stride[0]
    before = 0 if stride == 2 else 1
    if bands is None:
        x = x if norm is None else F.silu(norm(x))
        x = F.interpolate(x, scale_factor=2.0, mode="nearest") if up else x
        return conv(F.pad(x, (0, 1, 0, 1)) if stride == 2 else x)
    affine = norm and norm_affine(x, norm, bands)
    zoom = 2 if up else 1
    B, _, H, W = x.shape
    H, W = H * zoom, W * zoom
    out = torch.empty(B, conv.out_channels, H // stride, W // stride, dtype=x.dtype,
                      device=bands.store or conv.weight.device)
    for a in range(0, out.shape[2], bands.rows):
        b = min(a + bands.rows, out.shape[2])
        low, high = a * stride - before, (b - 1) * stride - before + 3       # rows read, zeros outside [0, H)
        first, last = max(low, 0), min(high, H)
        y = x[:, :, first // zoom:-(-last // zoom)].to(conv.weight.device)
        if affine:
            y = F.silu((y * affine[0] + affine[1]).to(x.dtype))
        if up:
            y = F.interpolate(y, scale_factor=2.0, mode="nearest")[:, :, first % 2:first % 2 + last - first]
        y = F.pad(y, (before, 1, first - low, high - last))
        out[:, :, a:b] = F.conv2d(y, conv.weight, conv.bias, stride)
    return out


def norm_affine(x: Tensor, norm: nn.GroupNorm, bands: Bands) -> tuple[Tensor, Tensor]:
    """scale, shift [B, C, 1, 1], fp32 or wider, with norm(x) = x * scale + shift; x is read in bands."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts = x.split(bands.rows, dim=2)
    grouped = (p.to(norm.weight.device, wide).reshape(len(x), norm.num_groups, -1) for p in parts)
    var, mean = map(torch.stack, zip(*(torch.var_mean(p, dim=2, correction=0) for p in grouped)))
    share = torch.tensor([p.shape[2] / x.shape[2] for p in parts], dtype=wide, device=mean.device)
    share = share[:, None, None]                                                             # [bands, 1, 1]
    middle = (share * mean).sum(0)                                                           # [B, groups]
    var = (share * (var + (mean - middle).square())).sum(0)
    per = norm.num_channels // norm.num_groups
    middle, rstd = (s.repeat_interleave(per, dim=1) for s in (middle, (var + norm.eps).rsqrt()))     # [B, C]
    scale = norm.weight.to(wide) * rstd
    return scale[..., None, None], (norm.bias.to(wide) - middle * scale)[..., None, None]


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

    def forward(self, x: Tensor, bands: Bands | None = None) -> Tensor:
        h = conv_rows(x, self.conv1, self.norm1, bands=bands)
        h = conv_rows(h, self.conv2, self.norm2, bands=bands)
        shortcut = getattr(self, "nin_shortcut", nn.Identity())
        if bands is None:
            return shortcut(x) + h
        for part, end in zip(h.split(bands.rows, dim=2), x.split(bands.rows, dim=2)):
            part += shortcut(end.to(self.conv1.weight.device)).to(part.device)
        return h


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

    def forward(self, x: Tensor, bands: Bands | None = None) -> Tensor:
        return conv_rows(x, self.conv, up=self.up, bands=bands)


class Middle(nn.Module):
    """Works at the latents' size, where even a large picture is small: never in bands."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor, bands: Bands | None = None) -> Tensor:
        x = x.to(self.attn_1.q.weight.device)
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

    def forward(self, x: Tensor, recompute: bool, bands: Bands | None) -> Tensor:
        levels = reversed(self.up) if self.decoder else self.down
        parts = [part for level in levels for part in level.parts()]
        parts = [self.mid, *parts] if self.decoder else [*parts, self.mid]
        bands = None if torch.is_grad_enabled() else bands
        x = conv_rows(x, self.conv_in, bands=bands)
        for part in [*parts, self.end]:
            if recompute and torch.is_grad_enabled():
                x = checkpoint(part, x, use_reentrant=False)
            else:
                x = part(x, bands)
        return x

    def end(self, x: Tensor, bands: Bands | None = None) -> Tensor:
        return conv_rows(x, self.conv_out, self.norm_out, bands=bands)


class VAE(nn.Module):
    """SD3's autoencoder, with the interface of PixelSpace; no quantising convolutions on either side.

    checkpoint: with gradients, keep the input of every residual block and resampling, and recompute the rest
      in the backward pass.
    bands: without gradients, work on so many rows at a time (`Bands`): for pictures whose maps do not fit.
      Exact: equal to working at once but for rounding, with no seams.
    It computes in the dtype of its weights and answers in that of its input. bf16 weights cost 1.6% of the
    latents and of the picture: encode in fp32 or fp16.
    """

    PREFIX = "first_stage_model."  # of the parameter names in the single-file checkpoints

    def __init__(self, cfg: VAEConfig = VAEConfig()):
        super().__init__()
        self.cfg = cfg
        self.stride, self.channels = 2 ** (len(cfg.mult) - 1), cfg.channels
        self.checkpoint = False
        self.bands: Bands | None = None
        self.encoder = VAEHalf(cfg, decoder=False)
        self.decoder = VAEHalf(cfg, decoder=True)

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image [B, 3, H, W] in [-1, 1] -> mean, log variance of z, unscaled, [B, C, H/stride, W/stride]."""
        h, w = image.shape[-2:]
        if h % self.stride or w % self.stride:
            raise SystemExit(f"error: a picture of {h}x{w}: the VAE takes sides that are multiples of "
                             f"{self.stride}: resize or crop it")
        both = self.encoder(image.to(self.encoder.conv_in.weight.dtype), self.checkpoint, self.bands)
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
        return self.decoder(z.to(self.decoder.conv_in.weight.dtype), self.checkpoint, self.bands).to(latents)


####################################################################################################
# Perceptual features
####################################################################################################


class VGG16(nn.Module):
    """VGG16's convolutions (Simonyan & Zisserman 2015) up to relu4_3, under torchvision's names `features.N`.

    Features after relu1_2, relu2_2, relu3_3 and relu4_3, the layers of Johnson et al. 2016: ByteEdit's Eq. 3
    names none.
    """

    CONVS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256),
             14: (256, 256), 17: (256, 512), 19: (512, 512), 21: (512, 512)}
    POOLS, TAPS = (4, 9, 16), (3, 8, 15, 22)

    def __init__(self):
        super().__init__()
        convs = {str(i): nn.Conv2d(a, b, 3, padding=1) for i, (a, b) in self.CONVS.items()}
        self.features = nn.ModuleDict(convs)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """image [B, 3, H, W] in [-1, 1], sides at least 8 -> four maps [B, C_i, H_i, W_i]."""
        x, maps = ((image + 1) / 2 - self.mean) / self.std, []
        for i in range(self.TAPS[-1] + 1):
            if i in self.CONVS:
                x = self.features[str(i)](x)
            elif i in self.POOLS:
                x = F.max_pool2d(x, 2)
            else:
                x = F.relu(x)
                if i in self.TAPS:
                    maps.append(x)
        return maps


def load_vgg16(path: str) -> VGG16:
    """VGG16 from torchvision's vgg16-397923af.pth or a safetensors copy of it, without the classifier."""
    from weights import fill, read_weights  # not above: weights.py builds the VAE of this file

    weights = read_weights(path, "--vgg: ")
    with torch.device("meta"):
        net = VGG16()
    net.mean, net.std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    weights = {k: v for k, v in weights.items() if k in net.state_dict()}
    return fill(net, weights, f"--vgg: {path}", "torchvision's VGG16", torch.float32, "cpu")
