"""The editors: a multimodal diffusion transformer, its text encoder; EditNet and what it is compared with.

    1. Presets
    2. Primitives: patches, positions, timesteps, modulation
    3. MMDiT: SD3's transformer, under the parameter names of its single-file checkpoints
    4. ByteText, Editor: captions and noisy pictures in, velocity out
    5. EditNet, controlnet, textcontrol, concat: instruction editors on top of an Editor
    6. LoRA, FLOPs, compilation, parameter groups

Shapes: B batch, L tokens, D width, H heads, K head dim, p patch side; pictures and latents are [B, C, H, W].
Conventions (flow.py): x_t = (1 - t) x_0 + t noise, v = noise - x_0, t in [0, 1]; the sinusoid gets 1000 t.
"""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import joint_attention, modulate, rms_norm

####################################################################################################
# 1. Presets
####################################################################################################


@dataclass(frozen=True)
class EditorConfig:
    """Architecture of an Editor; goes into the checkpoint's manifest, so that a folder describes itself."""

    depth: int = 4  # joint blocks
    heads: int = 3  # attention heads; the width is heads * head_dim
    head_dim: int = 64
    patch: int = 4  # latent pixels per token side
    channels: int = 3  # latent channels
    pos_max: int = 32  # side of the square position table, cropped at the centre
    learn_pos: bool = True  # the table is trained; False: fixed, as loaded
    txt_dim: int = 192  # width of the text tokens
    vec_dim: int = 192  # width of the pooled text vector
    qk_norm: bool = True  # RMS norm of queries and keys per head (SD3.5)
    dual: int = 0  # first blocks with a second, image-only attention (SD3.5-medium: 13)
    inpaint: bool = False  # input = noisy latents | mask | masked latents, concatenated along channels
    predict: str = "v"  # the last layer's meaning: "v", or "x0" (made v; small pixel models learn it better)
    refine: int = 0  # channels of two convolutions over x_t and the finished x0: no borders of patches
    txt_bytes: int = 128  # bytes of caption the built-in text encoder reads; 0: features come from outside

    def __post_init__(self):
        if self.refine and self.predict != "x0":
            raise ValueError(f"refine={self.refine} refines pictures, predict={self.predict!r} gives none")

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def in_channels(self) -> int:
        return 2 * self.channels + 1 if self.inpaint else self.channels


PRESETS: dict[str, EditorConfig] = {
    "test": EditorConfig(depth=2, heads=2, head_dim=16, txt_dim=32, vec_dim=32, predict="x0"),
    "tiny": EditorConfig(predict="x0", qk_norm=False, patch=8, pos_max=16, refine=24, txt_bytes=96),
    "small": EditorConfig(depth=12, heads=6, pos_max=64, txt_dim=384, vec_dim=384, predict="x0"),
    "sd3-medium": EditorConfig(depth=24, heads=24, patch=2, channels=16, pos_max=192, learn_pos=False,
                               txt_dim=4096, vec_dim=2048, qk_norm=False, txt_bytes=0),
    "sd3.5-medium": EditorConfig(depth=24, heads=24, patch=2, channels=16, pos_max=384, learn_pos=False,
                                 txt_dim=4096, vec_dim=2048, dual=13, txt_bytes=0),
}

####################################################################################################
# 2. Primitives
####################################################################################################


class PatchEmbed(nn.Module):
    """[B, C, H, W] -> [B, (H/p)(W/p), D], row-major; inner order (channel, p, q), as in the conv weight."""

    def __init__(self, patch: int, channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        p = self.proj.kernel_size[0]
        x = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


def unpatchify(x: Tensor, h: int, w: int, p: int) -> Tensor:
    """[B, hw, p*p*C] -> [B, C, h*p, w*p]. Trap: inner order (p, q, channel), not (channel, p, q) as above."""
    return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=p, q=p)


def sincos_2d(width: int, side: int) -> Tensor:
    """Initial position table [1, side * side, width], row-major."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega                      # [side, D/4]
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)                                   # [side, D/2]
    rows = axis[:, None].expand(side, side, -1)
    cols = axis[None, :].expand(side, side, -1)
    return torch.cat([cols, rows], dim=-1).reshape(1, side * side, width).float()


def crop_pos(table: Tensor, h: int, w: int) -> Tensor:
    """The central h x w window of a square table [1, S*S, D] -> [1, hw, D]; floor division per axis (SD3)."""
    side = math.isqrt(table.shape[1])
    if h > side or w > side:
        raise SystemExit(f"error: a picture of {h}x{w} tokens is larger than the model's {side}x{side} "
                         "position table: use a smaller picture")
    top, left = (side - h) // 2, (side - w) // 2
    grid = table.view(1, side, side, -1)[:, top:top + h, left:left + w]
    return grid.reshape(1, h * w, -1)


class TimestepEmbed(nn.Module):
    """t [B] in [0, 1] -> [B, D]: 256 sinusoids of 1000 t, [cos | sin], in fp32 (bf16 t: 15 % off)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        freqs = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        angle = 1000 * t.float()[:, None] * freqs
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class VectorEmbed(nn.Module):
    """Pooled text [B, vec_dim] -> [B, D]."""

    def __init__(self, vec_dim: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(vec_dim, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, vec: Tensor) -> Tensor:
        return self.mlp(vec)


class MLP(nn.Module):
    """Linear, GELU, Linear. tanh GELU in the MMDiT, exact GELU in the ViT: they differ by 4e-4."""

    def __init__(self, width: int, hidden: int, approximate: str):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


####################################################################################################
# 3. MMDiT (Esser et al. 2024; keys and shapes of sd3_medium.safetensors below model.diffusion_model.)
####################################################################################################


QK_EPS = 1e-6


class StreamAttention(nn.Module):
    """One stream's projections around the joint attention; qkv puts out [q | k | v], heads inside."""

    def __init__(self, width: int, heads: int, qk_norm: bool, pre_only: bool = False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        if not pre_only:
            self.proj = nn.Linear(width, width)
        if qk_norm:
            self.ln_q = nn.RMSNorm(width // heads, eps=QK_EPS)
            self.ln_k = nn.RMSNorm(width // heads, eps=QK_EPS)
        self.qk_norm = qk_norm

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, D] -> q, k, v [B, L, H, K], q and k before their norms."""
        B, L, D = x.shape
        return self.qkv(x).view(B, L, 3, self.heads, -1).unbind(2)

    @property
    def norms(self) -> tuple[Tensor | None, Tensor | None]:
        """Weights of the norms of q and k, for joint_attention."""
        return (self.ln_q.weight, self.ln_k.weight) if self.qk_norm else (None, None)

    def memory(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v as another call's `far`: k normed."""
        return (rms_norm(k, self.ln_k.weight, QK_EPS) if self.qk_norm else k), v


class StreamBlock(nn.Module):
    """One stream (image or text) of a joint block: adaLN modulation, attention projections, MLP.

    `pre_only` (the text stream of the last block) only lends keys and values: 2-chunk modulation, no output.
    `dual` adds SD3.5-medium's second attention among the image tokens: 9-chunk modulation.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, pre_only: bool = False, dual: bool = False):
        super().__init__()
        self.pre_only, self.dual = pre_only, dual
        self.attn = StreamAttention(width, heads, qk_norm, pre_only)
        if dual:
            self.attn2 = StreamAttention(width, heads, qk_norm)
        if not pre_only:
            self.mlp = MLP(width, 4 * width, "tanh")
        chunks = 2 if pre_only else 9 if dual else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, chunks * width))

    def modulation(self, silu_c: Tensor) -> tuple[Tensor, ...]:
        """silu_c [B, D] = SiLU(c), the same for all blocks -> chunks (shift, scale, gate, ...), [B, D]."""
        return self.adaLN_modulation[1](silu_c).chunk(2 if self.pre_only else 9 if self.dual else 6, dim=-1)


Memory = tuple[tuple, tuple | None]  # (k, v) [B, L, H, K] for the joint attention, the same for the dual one


def attend(q: list[Tensor], k: list[Tensor], v: list[Tensor], norms: list[tuple], far: tuple | None) \
        -> list[Tensor]:
    """joint_attention; `far` holds the normed keys and the values of one more stream, which asks nothing."""
    if far is None:
        return joint_attention(q, k, v, norms, QK_EPS)
    return joint_attention([*q, None], [*k, far[0]], [*v, far[1]], [*norms, (None, None)], QK_EPS)[:-1]


class JointBlock(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool, last: bool, dual: bool, index: int = 0):
        super().__init__()
        self.index = index  # among its fellows
        self.context_block = StreamBlock(width, heads, qk_norm, pre_only=last)
        self.x_block = StreamBlock(width, heads, qk_norm, dual=dual)

    def forward(self, img: Tensor, txt: Tensor, silu_c: Tensor, memory: Memory | None = None,
                keep: bool = False, share: Tensor | None = None) -> tuple:
        """img [B, L, D], txt [B, Lt, D], silu_c [B, D] -> img, txt (None after the last block).

        memory: keys and values of further image tokens, attended to as this block's own; keep: return those
        of its image tokens as a third result, to be another call's memory. share [B]: the row whose image
        tokens' queries and keys a row takes in place of its own (see MMDiT.forward).
        """
        x, c = self.x_block, self.context_block
        mi, mt = x.modulation(silu_c), c.modulation(silu_c)
        far, far2 = memory or (None, None)

        # 1) attention over both streams
        qi, ki, vi = x.attn(modulate(img, mi[0], mi[1]))
        if share is not None:
            qi, ki = qi[share], ki[share]
        qt, kt, vt = c.attn(modulate(txt, mt[0], mt[1]))
        norms = [x.attn.norms, c.attn.norms]
        ai, at = attend([qi, None if c.pre_only else qt], [ki, kt], [vi, vt], norms, far)
        if x.dual:  # fed from the same input of the block, not from attention's result
            q2, k2, v2 = x.attn2(modulate(img, mi[6], mi[7]))
            if share is not None:
                q2, k2 = q2[share], k2[share]
            (a2,) = attend([q2], [k2], [v2], [x.attn2.norms], far2)
        kept = ((x.attn.memory(ki, vi), x.attn2.memory(k2, v2) if x.dual else None),) if keep else ()
        img = img + mi[2][:, None] * x.attn.proj(ai.flatten(2))
        if x.dual:
            img = img + mi[8][:, None] * x.attn2.proj(a2.flatten(2))

        # 2) MLP of each stream
        img = img + mi[5][:, None] * x.mlp(modulate(img, mi[3], mi[4]))
        if c.pre_only:
            return img, None, *kept
        txt = txt + mt[2][:, None] * c.attn.proj(at.flatten(2))
        txt = txt + mt[5][:, None] * c.mlp(modulate(txt, mt[3], mt[4]))
        return img, txt, *kept


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, img: Tensor, silu_c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation[1](silu_c).chunk(2, dim=-1)
        return self.linear(modulate(img, shift, scale))


class MMDiT(nn.Module):
    """SD3's transformer. Every Linear has a bias, LayerNorms have no weights, text tokens no positions."""

    def __init__(self, cfg: EditorConfig):
        super().__init__()
        D = cfg.width
        self.patch = cfg.patch
        self.checkpoint = 0  # recompute every n-th block in the backward pass; 0: none, 1: each
        self.x_embedder = PatchEmbed(cfg.patch, cfg.in_channels, D)
        self.pos_embed = nn.Parameter(sincos_2d(D, cfg.pos_max), requires_grad=cfg.learn_pos)
        self.t_embedder = TimestepEmbed(D)
        self.y_embedder = VectorEmbed(cfg.vec_dim, D)
        self.context_embedder = nn.Linear(cfg.txt_dim, D)
        self.joint_blocks = nn.ModuleList(
            JointBlock(D, cfg.heads, cfg.qk_norm, i == cfg.depth - 1, i < cfg.dual, i)
            for i in range(cfg.depth))
        self.final_layer = FinalLayer(D, cfg.patch**2 * cfg.channels)
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier, zero biases; modulations and the output start at zero (adaLN-zero, Peebles & Xie 2022)."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for name, p in self.named_parameters():
            if "adaLN_modulation" in name or "final_layer.linear" in name:
                nn.init.zeros_(p)

    def embed(self, x: Tensor, t: Tensor, txt: Tensor, vec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs of `forward` -> img [B, hw, D], txt [B, Lt, D], silu_c [B, D]: what the blocks take."""
        h, w = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        img = self.x_embedder(x) + crop_pos(self.pos_embed, h, w)                        # [B, hw, D]
        silu_c = F.silu(self.t_embedder(t) + self.y_embedder(vec))                       # [B, D]
        return img, self.context_embedder(txt), silu_c

    def run(self, block: JointBlock, *inputs) -> tuple:
        """block(*inputs), recomputed in the backward pass if it is one of those that `checkpoint` says."""
        if self.checkpoint and block.index % self.checkpoint == 0 and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def unembed(self, img: Tensor, silu_c: Tensor, h: int, w: int) -> Tensor:
        """The last tokens [B, hw, D] -> [B, C, H, W]."""
        return unpatchify(self.final_layer(img, silu_c), h, w, self.patch)

    def forward(self, x: Tensor, t: Tensor, txt: Tensor, vec: Tensor, share: Tensor | None = None) -> Tensor:
        """x [B, C_in, H, W], t [B] in [0, 1], txt [B, Lt, txt_dim], vec [B, vec_dim] -> [B, C, H, W].

        H and W are multiples of the patch; any aspect ratio the position table can hold. share int64 [B]:
        Prompt-to-Prompt of a joint attention (Shin et al. 2025, arXiv 2508.07519): in every block row i asks
        with the image tokens' queries and keys of row share[i], its values and its text are its own. A
        picture then keeps the layout of that row.
        """
        img, txt, silu_c = self.embed(x, t, txt, vec)
        for block in self.joint_blocks:
            shared = () if share is None else (None, False, share)
            img, txt = self.run(block, img, txt, silu_c, *shared)
        return self.unembed(img, silu_c, x.shape[-2] // self.patch, x.shape[-1] // self.patch)


def widen_input(weights: dict[str, Tensor], channels_in: int, key: str) -> dict[str, Tensor]:
    """Give a patch embedding more input channels. Their columns are zero: the output is unchanged at first.

    weights: a state dict; key: its patch embedding's weight, [D, C, p, p] -> [D, channels_in, p, p].
    """
    w = weights[key]
    if w.shape[1] > channels_in:
        raise SystemExit(f"error: {key}: the checkpoint has {w.shape[1]} input channels, the model only "
                         f"{channels_in}: name another checkpoint")
    wide = w.new_zeros(w.shape[0], channels_in, *w.shape[2:])
    wide[:, : w.shape[1]] = w
    return {**weights, key: wide}


def mask_input_is_empty(editor: "Editor") -> bool:
    """Whether an inpainting Editor sees nothing of mask and masked picture, as after `widen_input`. False of
    one on the meta device, which has no weights."""
    seen = editor.mmdit.x_embedder.proj.weight[:, editor.cfg.channels:]
    return not seen.is_meta and not seen.any()


####################################################################################################
# 4. Text encoder for models trained from scratch, and the Editor
####################################################################################################


class SelfBlock(nn.Module):
    """Pre-norm transformer block (ViT names), exact GELU, LayerNorm eps 1e-6."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = StreamAttention(width, heads, qk_norm=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, 4 * width, "none")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn(self.norm1(x))
        (a,) = joint_attention([q], [k], [v])
        x = x + self.attn.proj(a.flatten(2))
        return x + self.mlp(self.norm2(x))


def byte_ids(captions: list[str], max_bytes: int) -> Tensor:
    """[B] strings -> uint8 [B, max_bytes], cut or padded with 0; a cut never leaves half a character."""
    rows = (c.encode(errors="replace")[:max_bytes].decode(errors="ignore").encode() for c in captions)
    joined = b"".join(row.ljust(max_bytes, b"\0") for row in rows)
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8).view(-1, max_bytes)


class ByteText(nn.Module):
    """UTF-8 bytes -> a token for each word, and a pooled vector (default ours, paper silent).

    Two convolutions read the letters, a word is the mean over its bytes, two transformer blocks mix words.
    Words of more than 12 bytes (or text without spaces) are cut, so that any language fits. Missing words
    enter the blocks as bare positions and are attended to, as SD3's padding is.
    """

    WORD = 12  # bytes of a word at most

    def __init__(self, max_bytes: int, txt_dim: int, vec_dim: int, depth: int = 2):
        super().__init__()
        self.max_bytes, self.max_words = max_bytes, max_bytes // 4
        self.embed = nn.Embedding(256, 64)
        self.conv1 = nn.Conv1d(64, txt_dim, 5, padding=2)
        self.conv2 = nn.Conv1d(txt_dim, txt_dim, 5, padding=2)
        self.norm0 = nn.LayerNorm(txt_dim, eps=1e-6)
        self.pos = nn.Parameter(0.02 * torch.randn(1, self.max_words, txt_dim))
        self.blocks = nn.ModuleList(SelfBlock(txt_dim, max(1, txt_dim // 64)) for _ in range(depth))
        self.norm = nn.LayerNorm(txt_dim, eps=1e-6)
        self.pool = nn.Linear(txt_dim, vec_dim)
        for block in self.blocks:  # they start as the identity: what the words say gets through at first
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.mlp.fc2.weight)

    def tokenize(self, captions: list[str]) -> Tensor:
        return byte_ids(captions, self.max_bytes)

    def words(self, ids: Tensor) -> Tensor:
        """ids [B, N] -> [B, W, N], the weight of each byte in each word's mean; missing words: zeros."""
        B, N = ids.shape
        at = torch.arange(N, device=ids.device).expand(B, N)
        space = (ids == 32) | (ids == 0)
        since = at - torch.where(space, at, 0).cummax(1).values  # bytes since the last space
        starts = space | (since % self.WORD == 0)
        word = (starts.cumsum(1) - 1).clamp(0, self.max_words - 1)
        member = (word[:, None] == torch.arange(self.max_words, device=ids.device)[:, None]) & ~space[:, None]
        return member / member.sum(2, keepdim=True).clamp(min=1)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids [B, max_bytes] -> txt [B, max_bytes/4, txt_dim], vec [B, vec_dim]."""
        x = self.embed(ids.long()).transpose(1, 2)                                       # [B, 64, N]
        x = self.conv2(F.gelu(self.conv1(x))).transpose(1, 2)                            # [B, N, D]
        words = self.words(ids)
        real = (words.sum(2) > 0).to(x.dtype)[..., None]                                 # [B, W, 1]
        x = self.norm0(words.to(x.dtype) @ x) * real + self.pos
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        pooled = (x * real).sum(1) / real.sum(1).clamp(min=1).sqrt()  # a sum of n words grows as sqrt(n)
        return x, self.pool(pooled)


class Editor(nn.Module):
    """The trained generator: an MMDiT and, when it learns from scratch, its text encoder.

    read: captions -> txt, vec, for a model without a text encoder of its own; pipeline.py sets it.
    """

    read: Callable[[list[str]], tuple[Tensor, Tensor]] | None = None
    X0_T_MIN = 0.05  # v = (x_t - x0) / t divides by at least this: errors explode at t -> 0 (default ours)

    def __init__(self, cfg: EditorConfig):
        super().__init__()
        self.cfg = cfg
        self.mmdit = MMDiT(cfg)
        if cfg.txt_bytes:
            self.text = ByteText(cfg.txt_bytes, cfg.txt_dim, cfg.vec_dim)
        if cfg.refine:
            self.refine = nn.Sequential(
                nn.Conv2d(2 * cfg.channels, cfg.refine, 3, padding=1), nn.GELU(),
                nn.Conv2d(cfg.refine, cfg.channels, 3, padding=1))
            nn.init.zeros_(self.refine[2].weight)
            nn.init.zeros_(self.refine[2].bias)

    @property
    def arch(self) -> dict:
        return {"kind": "editor", **asdict(self.cfg)}

    def encode_text(self, captions: list[str] | Tensor) -> tuple[Tensor, Tensor]:
        """[B] captions, or their byte_ids -> txt [B, Lt, txt_dim], vec [B, vec_dim]. "" is guidance's null
        condition."""
        if not self.cfg.txt_bytes:
            return self.read(captions)
        ids = captions if isinstance(captions, Tensor) else self.text.tokenize(captions)
        return self.text(ids.to(self.mmdit.pos_embed.device))

    def forward(self, x: Tensor, t: Tensor, txt: Tensor, vec: Tensor, mask: Tensor | None = None,
                masked: Tensor | None = None, share: Tensor | None = None) -> Tensor:
        """Velocity at x_t.

        x [B, C, H, W] at times t [B] in [0, 1]; mask [B, 1, H, W], 1 = regenerate; masked [B, C, H, W] is
        x_0 (1 - mask). Without a mask an inpainting model generates the whole picture (mask of ones,
        ByteEdit's global mask). share: as in MMDiT.forward. -> v [B, C, H, W]
        """
        shared = () if share is None else (share,)
        return self.to_velocity(x, t, self.mmdit(self.network_input(x, mask, masked), t, txt, vec, *shared))

    def network_input(self, x: Tensor, mask: Tensor | None = None, masked: Tensor | None = None) -> Tensor:
        """x, or x | mask | masked along channels, [B, C_in, H, W]."""
        if not self.cfg.inpaint:
            return x
        mask = torch.ones_like(x[:, :1]) if mask is None else mask
        masked = torch.zeros_like(x) if masked is None else masked
        return torch.cat([x, mask.to(x.dtype), masked.to(x.dtype)], dim=1)

    def to_velocity(self, x: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """The transformer's output, v or x_0, as v. A patch of x_0 is a linear function of its token alone:
        two convolutions make it meet its neighbours, and hand on what x_t shows already (default ours)."""
        if self.cfg.predict == "v":
            return out
        if self.cfg.refine:
            out = out + self.refine(torch.cat([out, x.to(out.dtype)], dim=1))
        return (x - out) / t.to(x.dtype).clamp(min=self.X0_T_MIN)[:, None, None, None]


def build_editor(arch: dict, what: str = "the checkpoint") -> Editor:
    """Editor from the `arch` of a manifest; SystemExit that names `what` when it is of another kind."""
    return Editor(config_from(EditorConfig, arch, "editor", what))


WRITTEN_BY = {"editor": "train_omni.py or train_pefl.py", "reward": "train_reward.py",
              "scorer": "train_scorer.py", "coherence": "train_pefl.py"}  # kind of a folder: the script


def _a(kind: str | None) -> str:
    return f"{'an' if str(kind)[0] in 'aeiou' else 'a'} {kind!r}"


def config_from(cls: type, arch: dict, kind: str, what: str = "the checkpoint"):
    """cls from a manifest's arch dict, refusing other kinds and unknown fields in one line."""
    if arch.get("kind") != kind:
        raise SystemExit(f"error: {what}: holds {_a(arch.get('kind'))}, and {_a(kind)} is needed here: name "
                         f"a folder that {WRITTEN_BY[kind]} wrote")
    known = {f.name for f in fields(cls)}
    unknown = set(arch) - known - {"kind"}
    if unknown:
        raise SystemExit(f"error: {what}: unknown fields {sorted(unknown)} in its arch: another version of "
                         "this code wrote it: use that version")
    return cls(**{k: v for k, v in arch.items() if k in known})


####################################################################################################
# 5. EditNet and the variants it is compared with (OmniEdit, Sec. 4, Fig. 4, Table 7)
####################################################################################################


VARIANTS = ("editnet", "attend", "controlnet", "textcontrol", "concat")
SOURCE_TOKENS = ("editnet", "attend")  # those in which the source is a stream of its own


class EditNet(nn.Module):
    """An Editor that follows instructions: it sees a source picture and the region that may change.

    Every variant starts as its base, bit for bit, and differs in how the source gets in:
        editnet      each block's copy, the control block, attends jointly to the base's image tokens, to the
                     source's and to the text, all as they stand before that block; what it makes of the image
                     and of the text tokens is added to the base's after the block, and what it makes of each
                     source token to the image token at its place
        attend       the same, but what it makes of the source tokens is added nowhere
        controlnet   the copies run on their own: noisy + source tokens enter the first one; only image tokens
                     are added to the base's
        textcontrol  the same, and text tokens are added too
        concat       InstructPix2Pix: the source is further channels of the input; no copies, all is tuned

    Sums enter through zero Linears, new input columns are zero (ours: OmniEdit is silent). That the source
    tokens' own output is added is our reading of Sec. 4 ("output of the control branch tokens"): without it,
    as in `attend`, all that is to stay has to be found by attention (RESULTS.md, C5). An instruction is
    read by a trainable copy of a built-in text encoder, since the base's has only read captions; `base` alone
    is untouched. Base blocks read that copy too, so a ControlNet gets a text that learns, which the published
    ones, on frozen encoders, do not: `--text_lr 0` compares as the paper does. Free-form edits have a region
    of ones (UltraEdit); the null image is zeros and ones.

    `cached` (editnet): source tokens attend to source and text only and are modulated as at t = 0, so that
    their keys and values are computed once per edit (`remember`) instead of at every step. Ours.
    """

    def __init__(self, base: EditorConfig, variant: str = "editnet", cached: bool = False):
        super().__init__()
        if variant not in VARIANTS:
            raise SystemExit(f"error: variant {variant!r}: use one of {', '.join(VARIANTS)}")
        if cached and variant != "editnet":
            raise SystemExit(f"error: variant {variant!r} caches no source tokens: use editnet")
        D = base.width
        self.cfg, self.variant, self.cached = base, variant, cached
        self.base = Editor(base)
        if base.txt_bytes:
            self.text = ByteText(base.txt_bytes, base.txt_dim, base.vec_dim)
        # a convolution of concatenated channels is the sum of two: this is the second one, for every variant
        self.src_embedder = PatchEmbed(base.patch, base.channels + 1, D)
        if variant != "concat":
            self.branch = nn.ModuleList(
                JointBlock(D, base.heads, base.qk_norm, i == base.depth - 1, i < base.dual, i)
                for i in range(base.depth))
            self.img_out = nn.ModuleList(nn.Linear(D, D) for _ in range(base.depth))
        if variant == "editnet":
            self.src_out = nn.ModuleList(nn.Linear(D, D) for _ in range(base.depth))
        if variant in (*SOURCE_TOKENS, "textcontrol"):
            self.txt_out = nn.ModuleList(nn.Linear(D, D) for _ in range(base.depth - 1))  # the last: no text
        for name, p in self.named_parameters():
            if name.startswith(("img_out.", "src_out.", "txt_out.", "src_embedder.")):
                nn.init.zeros_(p)

    @property
    def arch(self) -> dict:
        return {"kind": "editnet", "variant": self.variant, "cached": self.cached, "base": self.base.arch}

    @torch.no_grad()
    def attach(self, weights: dict[str, Tensor], start: str = "picture") -> None:
        """Take the base's weights (a state dict of Editor), and begin the copies as copies of it.

        Source tokens begin as the base sees a picture that it denoises (start="picture") or what a mask
        leaves of one ("masked"; the base must have been trained for holes), the region as nothing (ours).
        SystemExit where the base has seen no masks.
        """
        self.base.load_state_dict(weights)
        if self.cfg.txt_bytes:
            self.text.load_state_dict(self.base.text.state_dict())
        if self.variant != "concat":
            self.branch.load_state_dict(self.base.mmdit.joint_blocks.state_dict())
        if self.variant in SOURCE_TOKENS:
            if start == "masked" and not self.cfg.inpaint:
                raise SystemExit("error: --source_start: masked: the base was not trained for holes (--stage "
                                 "inpaint): leave it out")
            C, seen = self.cfg.channels, self.base.mmdit.x_embedder.proj  # of x, the mask, the masked picture
            self.src_embedder.proj.weight[:, :C] = seen.weight[:, -C:] if start == "masked" \
                else seen.weight[:, :C]
            self.src_embedder.proj.bias.copy_(seen.bias)

    def encode_text(self, instructions: list[str] | Tensor) -> tuple[Tensor, Tensor]:
        """[B] instructions, or their byte_ids -> txt [B, Lt, txt_dim], vec [B, vec_dim]. "" is guidance's
        null condition."""
        if not self.cfg.txt_bytes:
            return self.base.read(instructions)
        ids = instructions if isinstance(instructions, Tensor) else self.text.tokenize(instructions)
        return self.text(ids.to(self.base.mmdit.pos_embed.device))

    def source_tokens(self, src: Tensor, region: Tensor) -> Tensor:
        """src [B, C, H, W], region [B, 1, H, W] -> [B, hw, D], without positions."""
        return self.src_embedder(torch.cat([src, region.to(src.dtype)], dim=1))

    def remember(self, txt: Tensor, vec: Tensor, src: Tensor, region: Tensor) -> list[tuple[Memory, Tensor]]:
        """All that `cached` needs of the source at a step: its keys and values at every control block, and
        what the block makes of its tokens [B, hw, D]."""
        m = self.base.mmdit
        h, w = src.shape[-2] // m.patch, src.shape[-1] // m.patch
        tokens = self.source_tokens(src, region) + crop_pos(m.pos_embed, h, w)
        silu_c = F.silu(m.t_embedder(src.new_zeros(len(src))) + m.y_embedder(vec))
        txt, found = m.context_embedder(txt), []
        for block in self.branch:
            tokens, txt, memory = m.run(block, tokens, txt, silu_c, None, True)
            found.append((memory, tokens))
        return found

    def forward(self, x: Tensor, t: Tensor, txt: Tensor, vec: Tensor, src: Tensor, region: Tensor,
                memory: list[tuple[Memory, Tensor]] | None = None) -> Tensor:
        """Velocity at x_t.

        x [B, C, H, W] at times t [B] in [0, 1]; txt, vec from encode_text; src [B, C, H, W] the source's
        latents; region [B, 1, H, W], 1 = may change; memory: what `remember` returned, to save its time.
        -> v [B, C, H, W]
        """
        if self.cached and memory is None:
            memory = self.remember(txt, vec, src, region)
        m = self.base.mmdit
        h, w = x.shape[-2] // m.patch, x.shape[-1] // m.patch
        img, txt, silu_c = m.embed(self.base.network_input(x), t, txt, vec)
        if self.variant == "concat":
            img = img + self.source_tokens(src, region)
            for block in m.joint_blocks:
                img, txt = m.run(block, img, txt, silu_c)
        elif self.variant in SOURCE_TOKENS:
            img = self.interact(img, txt, silu_c, src, region, memory)
        else:
            img = self.parallel(img, txt, silu_c, src, region)
        return self.base.to_velocity(x, t, m.unembed(img, silu_c, h, w))

    def interact(self, img: Tensor, txt: Tensor, silu_c: Tensor, src: Tensor, region: Tensor,
                 memory: list[tuple[Memory, Tensor]] | None) -> Tensor:
        """EditNet: block by block, the control block reads the base's tokens and writes to them."""
        m, L = self.base.mmdit, img.shape[1]
        h, w = src.shape[-2] // m.patch, src.shape[-1] // m.patch
        tokens = None if self.cached else self.source_tokens(src, region) + crop_pos(m.pos_embed, h, w)
        for i, (block, control) in enumerate(zip(m.joint_blocks, self.branch)):
            if self.cached:
                far, tokens = memory[i]
                read_img, read_txt = m.run(control, img, txt, silu_c, far)
            else:  # image and source tokens share a stream: the same weights, the same modulation
                both, read_txt = m.run(control, torch.cat([img, tokens], 1), txt, silu_c)
                read_img, tokens = both[:, :L], both[:, L:]
            img, txt = m.run(block, img, txt, silu_c)
            img = img + self.img_out[i](read_img)
            if self.variant == "editnet":
                img = img + self.src_out[i](tokens)
            if txt is not None:
                txt = txt + self.txt_out[i](read_txt)
        return img

    def parallel(self, img: Tensor, txt: Tensor, silu_c: Tensor, src: Tensor, region: Tensor) -> Tensor:
        """ControlNet (Zhang et al. 2023, as in SD3's): the branch never sees what the base makes of it."""
        m = self.base.mmdit
        read_img, read_txt = img + self.source_tokens(src, region), txt
        for i, (block, control) in enumerate(zip(m.joint_blocks, self.branch)):
            read_img, read_txt = m.run(control, read_img, read_txt, silu_c)
            img, txt = m.run(block, img, txt, silu_c)
            img = img + self.img_out[i](read_img)
            if self.variant == "textcontrol" and txt is not None:
                txt = txt + self.txt_out[i](read_txt)
        return img


def build_editnet(arch: dict, what: str = "the checkpoint") -> EditNet:
    """EditNet from the `arch` of a manifest; SystemExit that names `what` when it is of another kind."""
    if arch.get("kind") != "editnet":
        raise SystemExit(f"error: {what}: holds {_a(arch.get('kind'))}, and an 'editnet' is needed here: "
                         "name the folder of a run with --stage edit")
    return EditNet(config_from(EditorConfig, arch["base"], "editor", what), arch["variant"], arch["cached"])


####################################################################################################
# 6. LoRA, FLOPs, compilation, parameter groups
####################################################################################################


class LowRank(nn.Module):
    """W -> W + (alpha / r) B A, as a parametrization of a Linear's weight (Hu et al. 2021)."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.B @ self.A


def add_lora(model: nn.Module, rank: int) -> None:
    """Freeze `model`; give the attention and MLP Linears of its joint blocks a trainable low-rank update.

    Those of an EditNet are its branch's: the base stays as it is. The update starts at zero; alpha equals the
    rank. `merged_state` returns plain weights under the plain names.
    """
    model.requires_grad_(False)
    for name, m in model.named_modules():
        chosen = name.startswith(("mmdit.joint_blocks.", "joint_blocks.", "branch."))
        if chosen and isinstance(m, nn.Linear) and "adaLN" not in name:
            nn.utils.parametrize.register_parametrization(m, "weight", LowRank(m, rank))


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """State dict under the plain names, low-rank updates added in; the same as state_dict() without LoRA."""
    out = {}
    for name, value in model.state_dict().items():
        if ".parametrizations." not in name:
            out[name] = value
        elif name.endswith(".original"):
            layer = name.split(".parametrizations.")[0]
            out[f"{layer}.weight"] = model.get_submodule(layer).weight.detach().clone()
    return out


def flops(net: Editor | EditNet, batch: int, img: int, txt: int, backward: bool = True) -> float:
    """FLOPs of a call of the network, for perf/mfu: a multiplication and an addition for each product in the
    Linears of its blocks and in attention; the rest, 1 % of SD3, is left out, as is a built-in text encoder.

    img, txt: tokens of a picture and of its text. backward: and those of the backward pass, gradients of
    inputs everywhere and of the weights that train; what checkpointing recomputes is not counted.
    """
    def linears(module: nn.Module, tokens: int, backward: bool = backward) -> float:
        return sum(2 * batch * tokens * m.weight.numel() * (1 + backward * (1 + m.weight.requires_grad))
                   for name, m in module.named_modules() if isinstance(m, nn.Linear) and "adaLN" not in name)

    def block(joint: JointBlock, tokens: int, backward: bool = backward) -> float:
        scores = (tokens + txt) ** 2 + tokens**2 * hasattr(joint.x_block, "attn2")
        return (linears(joint.x_block, tokens, backward) + linears(joint.context_block, txt, backward)
                + 4 * batch * scores * net.cfg.width * (1 + 2 * backward))

    base, source = getattr(net, "base", net), img * (getattr(net, "variant", "") in SOURCE_TOKENS)
    trains = any(p.requires_grad for p in base.parameters())  # else no gradient before the branch joins
    beside = (("img_out", img), ("src_out", img), ("txt_out", txt))
    return (sum(block(b, img, backward and (trains or i > 0)) for i, b in enumerate(base.mmdit.joint_blocks))
            + sum(block(b, img + source) for b in getattr(net, "branch", ()))
            + sum(linears(getattr(net, name), tokens) for name, tokens in beside if hasattr(net, name)))


def compile_blocks(net: Editor | EditNet, backend: str = "inductor") -> None:
    """torch.compile of every joint block and of the text encoder. Blocks of one make share what is compiled,
    so that it takes as long for 24 of them as for two; what stands between them stays as it is."""
    # a bucket, a frozen copy, a sheet's batch: each is a version of the same code, of which 8 are allowed
    torch._dynamo.config.recompile_limit = 128
    for m in net.modules():
        if isinstance(m, JointBlock | ByteText):
            m.compile(dynamic=False, backend=backend)


def half_linears(net: nn.Module) -> None:
    """Weights and biases of Linears and convolutions to bf16: what autocast makes of them at every call, of
    frozen ones too, so the results stay the same, bit for bit. Only for a net that is called under autocast
    alone."""
    for m in net.modules():
        if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d) and not hasattr(m, "parametrizations"):
            m.to(torch.bfloat16)


def param_groups(model: nn.Module, weight_decay: float, muon: bool = False) -> list[dict]:
    """AdamW groups of what trains: matrices decay; biases, norms, embeddings, positions do not. muon: the
    matrices of attention and MLPs are a third group, which says muon=True, for train_omni.Muon."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    tables = ("pos", "pos_embed", "cls_token", "embed.weight", "embeddings.weight")
    inside = re.compile(r"(^|\.)(joint_blocks|branch|blocks)\.\d+\..*(attn2?|mlp)\..*weight$")
    groups = {"decay": [], "rest": [], "muon": []}
    for n, p in named:
        matrix = p.ndim >= 2 and not n.endswith(tables)
        groups["muon" if matrix and muon and inside.search(n) else "decay" if matrix else "rest"].append(p)
    out = [{"params": groups["decay"], "weight_decay": weight_decay},
           {"params": groups["rest"], "weight_decay": 0.0}]
    return out + [{"params": groups["muon"], "weight_decay": weight_decay, "muon": True}] * muon


def inpainting(cfg: EditorConfig) -> EditorConfig:
    """The same architecture with inpainting input (noisy latents | mask | masked latents)."""
    return replace(cfg, inpaint=True)
