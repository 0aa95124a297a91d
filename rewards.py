"""Whatever looks at a picture and answers with a number: the three rewards, VGG's features, published scores.

    1. Networks: PreferenceReward (aesthetic, alignment), CoherenceReward, EditScorer        2. VGG16
    3. Pictures: each published network's own resizing, cropping and normalising
    4. DINO and DINOv2     5. CLIP, from transformers', OpenAI's or open_clip's names
    6. ImageReward as a PreferenceReward     7. Scores, one function each     8. opening a reward by name

Pictures are float [B, 3, H, W] in [-1, 1], as everywhere; every score is [B] and differentiable in them.
Sizes are read from the weights. What weights cannot tell (quick-GELU or GELU, which resizing) is an argument.
"""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

import checkpoint
from kernels import joint_attention
from model import PatchEmbed, SelfBlock, config_from, unpatchify
from pretrained.files import Device, count, fill, read_weights, shape_of
from pretrained.text import ClipLayer, ClipText, ClipTextConfig, clip_tokenizer, tokenize

####################################################################################################
# 1. Networks
####################################################################################################


@dataclass(frozen=True)
class RewardConfig:
    """PreferenceReward at any size; the default is ImageReward's (446 M parameters)."""

    image_size: int = 224  # pictures are resized to this square before they are scored
    patch: int = 16
    vit_width: int = 1024
    vit_depth: int = 24
    vit_heads: int = 16
    txt_width: int = 768
    txt_depth: int = 12
    txt_heads: int = 12
    txt_hidden: int = 3072
    vocab: int = 30524
    txt_len: int = 35
    positions: int = 512
    tokenizer: str = ""  # JSON of the `tokenizers` library, kept with the weights


@dataclass(frozen=True)
class CoherenceConfig:
    """CoherenceReward: a ViT that scores every pixel (ByteEdit Sec. 3.2; sizes ours, paper silent)."""

    pos_side: int = 8  # tokens per side of the learned position table; resized to other sizes
    patch: int = 4
    width: int = 128
    depth: int = 4
    heads: int = 4


REWARD_PRESETS: dict[str, RewardConfig] = {
    "test": RewardConfig(32, 8, 32, 2, 2, 32, 2, 2, 64, 512, 40, 64),
    "small": RewardConfig(32, 8, 64, 4, 2, 64, 2, 2, 256, 1024, 48, 64),
    "tiny": RewardConfig(64, 8, 128, 4, 4, 128, 3, 4, 512, 1024, 48, 64),
    "tiny-p16": RewardConfig(64, 16, 128, 4, 4, 128, 3, 4, 512, 1024, 48, 64),
    "imagereward": RewardConfig(),
}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ViT(nn.Module):
    """Vision transformer under the names that BLIP, ImageReward and DINO share. All tokens, [CLS] first."""

    def __init__(self, side: int, patch: int, width: int, depth: int, heads: int, channels: int = 3):
        super().__init__()
        self.patch_embed = PatchEmbed(patch, channels, width)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, side * side + 1, width))
        self.blocks = nn.ModuleList(SelfBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W], normalised -> [B, 1 + hw, D]; the position table is resized to h x w (bicubic)."""
        p = self.patch_embed.proj.kernel_size[0]
        h, w = x.shape[-2] // p, x.shape[-1] // p
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        pos = self.pos_embed[:, 1:]
        if (h, w) != (side, side):
            pos = F.interpolate(rearrange(pos, "1 (h w) d -> 1 d h w", h=side), (h, w), mode="bicubic")
            pos = rearrange(pos, "1 d h w -> 1 (h w) d")
        x = self.patch_embed(x) + pos
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls.to(x.dtype), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class BertSelf(nn.Module):
    """Query, key, value of BERT (separate Linears); keys and values may come from another width."""

    def __init__(self, width: int, heads: int, kv_width: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(kv_width, width)
        self.value = nn.Linear(kv_width, width)

    def forward(self, x: Tensor, kv: Tensor, bias: Tensor | None) -> Tensor:
        qkv = self.query(x), self.key(kv), self.value(kv)
        q, k, v = (rearrange(y, "b l (h k) -> b h l k", h=self.heads) for y in qkv)
        return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), "b h l k -> b l (h k)")


class BertOutput(nn.Module):
    """Dense, then LayerNorm of the residual sum (post-norm, eps 1e-12)."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.dense = nn.Linear(hidden, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


def bert_attention(width: int, heads: int, kv_width: int) -> nn.ModuleDict:
    return nn.ModuleDict({"self": BertSelf(width, heads, kv_width), "output": BertOutput(width, width)})


class MedLayer(nn.Module):
    """Self-attention -> cross-attention to the picture -> feed-forward (BLIP's MED in multimodal mode)."""

    def __init__(self, cfg: RewardConfig):
        super().__init__()
        D, H = cfg.txt_width, cfg.txt_heads
        self.attention = bert_attention(D, H, D)
        self.crossattention = bert_attention(D, H, cfg.vit_width)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(D, cfg.txt_hidden)})
        self.output = BertOutput(cfg.txt_hidden, D)

    def forward(self, x: Tensor, img: Tensor, bias: Tensor) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, x, bias), x)
        x = self.crossattention["output"](self.crossattention["self"](x, img, None), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class MedText(nn.Module):
    """BERT with cross-attention in every layer; no token types, no pooler."""

    def __init__(self, cfg: RewardConfig):
        super().__init__()
        D = cfg.txt_width
        self.embeddings = nn.ModuleDict({
            "word_embeddings": nn.Embedding(cfg.vocab, D),
            "position_embeddings": nn.Embedding(cfg.positions, D),
            "LayerNorm": nn.LayerNorm(D, eps=1e-12)})
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(MedLayer(cfg) for _ in range(cfg.txt_depth))})

    def forward(self, ids: Tensor, attend: Tensor, img: Tensor) -> Tensor:
        """ids, attend [B, L] (attend 0 = padding), img [B, N, vit_width] -> [B, L, D]."""
        e = self.embeddings
        places = torch.arange(ids.shape[1], device=ids.device)
        x = e["LayerNorm"](e["word_embeddings"](ids) + e["position_embeddings"](places))
        bias = torch.zeros_like(attend, dtype=x.dtype).masked_fill(attend == 0, -10000.0)[:, None, None]
        for layer in self.encoder["layer"]:
            x = layer(x, img, bias)
        return x


class RewardHead(nn.Module):
    """ImageReward's head on [CLS]: five Linears without activations between them, dropout in training."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
            nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1))

    def init_weights(self, original: bool) -> None:
        """`original`: ImageReward's Normal(0, 1 / (in + 1)). It shrinks [CLS] to 1e-9 and its gradient below
        Adam's eps: the known plateau at loss 0.6931. Ours: Normal(0, 1 / sqrt(in)), which keeps the scale."""
        for m in self.layers:
            if isinstance(m, nn.Linear):
                fan = self.layers[0].in_features + 1 if original else m.in_features**0.5
                nn.init.normal_(m.weight, std=1 / fan)
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class PreferenceReward(nn.Module):
    """R(c, x): the aesthetic and the alignment reward (ByteEdit Sec. 3.1, 3.2), built as ImageReward is."""

    def __init__(self, cfg: RewardConfig, original_init: bool = False):
        super().__init__()
        self.cfg = cfg
        self.blip = nn.ModuleDict({
            "visual_encoder": ViT(cfg.image_size // cfg.patch, cfg.patch, cfg.vit_width, cfg.vit_depth,
                                  cfg.vit_heads),
            "text_encoder": MedText(cfg)})
        self.mlp = RewardHead(cfg.txt_width)
        for m in self.blip.modules():
            if isinstance(m, nn.Linear | nn.Embedding):
                std = 0.02 if isinstance(m, nn.Embedding) else m.weight.shape[1] ** -0.5
                nn.init.normal_(m.weight, std=std)
        self.mlp.init_weights(original_init)
        self.register_buffer("mean", torch.tensor(CLIP_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD)[:, None, None], persistent=False)
        self.tokenizer = Tokenizer.from_str(cfg.tokenizer) if cfg.tokenizer else None
        if self.tokenizer:
            self.tokenizer.encode_special_tokens = True  # a typed "[PAD]" is text
        self.score_mean, self.score_std = 0.0, 1.0  # of held-out scores, from the manifest

    @property
    def arch(self) -> dict:
        return {"kind": "reward", **asdict(self.cfg)}

    def tokenize(self, captions: list[str], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """[B] captions -> ids, attend [B, L], attend 0 on padding; L is the batch's longest, <= txt_len."""
        rows = self.tokenizer.encode_batch(captions)
        both = torch.tensor([[r.ids for r in rows], [r.attention_mask for r in rows]])
        return tuple(both.to(device, non_blocking=True))

    def image_features(self, image: Tensor) -> list[Tensor]:
        """image [B, 3, H, W] in [-1, 1] -> [the image tower's tokens [B, N, D]], in place of VGG's maps."""
        return [self.blip["visual_encoder"](((image + 1) / 2 - self.mean) / self.std)]

    def forward(self, image: Tensor, ids: Tensor, attend: Tensor) -> Tensor:
        """image [B, 3, H, W] in [-1, 1], ids and attend [B, L] -> raw score [B] (no normalisation).

        The short side is resized to `image_size` and the centre cropped (ImageReward), differentiably.
        """
        S = self.cfg.image_size
        h, w = image.shape[-2:]
        if (h, w) != (S, S):
            size = (S, max(S, round(w * S / h))) if h <= w else (max(S, round(h * S / w)), S)
            image = F.interpolate(image.float(), size, mode="bicubic", antialias=True)
            top, left = (size[0] - S) // 2, (size[1] - S) // 2
            image = image[..., top:top + S, left:left + S]
        img = self.blip["visual_encoder"](((image + 1) / 2 - self.mean) / self.std)
        txt = self.blip["text_encoder"](ids, attend, img)
        with torch.autocast(image.device.type, enabled=False):  # bf16 scores tie
            return self.mlp(txt[:, 0].to(self.mlp.layers[0].weight.dtype))[:, 0]

    def normalised(self, image: Tensor, ids: Tensor, attend: Tensor) -> Tensor:
        """The score [B] in standard deviations of the held-out ones, as ImageReward's: -log sigmoid of a raw
        score of 10 has no gradient left."""
        return (self(image, ids, attend) - self.score_mean) / self.score_std


def build_reward(arch: dict, what: str = "the checkpoint") -> PreferenceReward:
    """PreferenceReward from the `arch` of a manifest; SystemExit that names `what` when it is none."""
    return PreferenceReward(config_from(RewardConfig, arch, "reward", what))


class CoherenceReward(nn.Module):
    """R_gamma(x): a score for every pixel, > 0 = looks real (ByteEdit Eq. 6). Also the discriminator."""

    def __init__(self, cfg: CoherenceConfig):
        super().__init__()
        self.cfg = cfg
        self.vit = ViT(cfg.pos_side, cfg.patch, cfg.width, cfg.depth, cfg.heads)
        self.head = nn.Sequential(
            nn.Linear(cfg.width, cfg.width), nn.GELU(), nn.Linear(cfg.width, cfg.patch**2))

    @property
    def arch(self) -> dict:
        return {"kind": "coherence", **asdict(self.cfg)}

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> logits [B, 1, H, W]."""
        p = self.cfg.patch
        tokens = self.head(self.vit(image)[:, 1:])
        return unpatchify(tokens.float(), image.shape[-2] // p, image.shape[-1] // p, p)


def build_coherence(arch: dict, what: str = "the checkpoint") -> CoherenceReward:
    """CoherenceReward from a manifest's `coherence_arch`; SystemExit that names `what` when it is none."""
    return CoherenceReward(config_from(CoherenceConfig, arch, "coherence", what))


class EditScorer(nn.Module):
    """(source, edited, instruction) -> a score from 0 to 10: a judge of edits, distilled (OmniEdit Sec. 3.3,
    where it is an 8B language model; this one is PreferenceReward's size, default ours).

    One image tower sees edited, source and how far they are apart, pixel by pixel, as nine channels; the text
    tower looks at its patches; [CLS] becomes logits of the whole scores 0 to 10, whose mean is the score.
    """

    def __init__(self, cfg: RewardConfig):
        super().__init__()
        self.cfg = cfg
        self.vit = ViT(cfg.image_size // cfg.patch, cfg.patch, cfg.vit_width, cfg.vit_depth, cfg.vit_heads, 9)
        self.text = MedText(cfg)
        for m in self.modules():
            if isinstance(m, nn.Linear | nn.Embedding):
                std = 0.02 if isinstance(m, nn.Embedding) else m.weight.shape[1] ** -0.5
                nn.init.normal_(m.weight, std=std)
        self.head = nn.Linear(cfg.txt_width, 11)
        self.register_buffer("mean", torch.tensor(CLIP_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD)[:, None, None], persistent=False)
        self.tokenizer = Tokenizer.from_str(cfg.tokenizer) if cfg.tokenizer else None
        if self.tokenizer:
            self.tokenizer.encode_special_tokens = True
        self.knots = ([0.0, 10.0], [0.0, 10.0])  # score -> calibrated score, from the manifest

    @property
    def arch(self) -> dict:
        return {"kind": "scorer", **asdict(self.cfg)}

    tokenize = PreferenceReward.tokenize

    def forward(self, source: Tensor, edited: Tensor, ids: Tensor, attend: Tensor) -> Tensor:
        """source, edited [B, 3, H, W] in [-1, 1], ids and attend [B, L] -> logits [B, 11], fp32.

        Both are squashed to the square: a crop could lose the edit."""
        pair, size = [], (self.cfg.image_size,) * 2
        for image in (edited, source):
            if image.shape[-2:] != size:
                image = F.interpolate(image.float(), size, mode="bicubic", antialias=True)
            pair.append(((image + 1) / 2 - self.mean) / self.std)
        pair.append((pair[0] - pair[1]).abs())
        txt = self.text(ids, attend, self.vit(torch.cat(pair, 1)))
        with torch.autocast(source.device.type, enabled=False):
            return self.head(txt[:, 0].to(self.head.weight.dtype)).float()

    def score(self, logits: Tensor) -> Tensor:
        """Logits [B, 11] -> scores [B], 0 to 10."""
        return logits.softmax(-1) @ torch.arange(11.0, device=logits.device)


def scorer_loss(logits: Tensor, scores: Tensor) -> Tensor:
    """[B, 11], [B] in 0..10 -> cross-entropy [B] to the two whole scores beside each (7.3: 0.7 of 7, 0.3 of
    8), whose minimum has the right mean; a squared error would not say how sure it is."""
    low = scores.floor().clamp(0, 9)
    up = scores - low
    logp = logits.log_softmax(-1)
    at = low.long()[:, None]
    return -((1 - up) * logp.gather(1, at)[:, 0] + up * logp.gather(1, at + 1)[:, 0])


def widened(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A PreferenceReward's towers as an EditScorer's: the edited picture is seen as before, source and
    difference at first not at all (as InstructPix2Pix widens a network). The head is left out."""
    out = {k.replace("blip.visual_encoder.", "vit.").replace("blip.text_encoder.", "text."): v
           for k, v in weights.items() if k.startswith("blip.")}
    patch = out["vit.patch_embed.proj.weight"]
    return out | {"vit.patch_embed.proj.weight": F.pad(patch, (0, 0, 0, 0, 0, 6))}


def open_scorer(path: str, device: Device = "cpu", what: str = "--judge") -> EditScorer:
    """A frozen EditScorer from a folder of train_scorer.py, calibrated as its manifest says."""
    tensors, manifest = checkpoint.load(path, ("model",))
    net = EditScorer(config_from(RewardConfig, manifest.get("arch", {}), "scorer", f"{what}: {path}"))
    checkpoint.load_state(net, tensors["model"], path)
    if knots := (manifest.get("meta", {}).get("val") or {}).get("knots"):
        net.knots = knots
    return net.to(device).eval().requires_grad_(False)


@torch.no_grad()
def score_edits(net: EditScorer, source: Tensor, edited: Tensor, instructions: list[str]) -> list[float]:
    """source, edited [B, 3, H, W] in [-1, 1] and B instructions -> calibrated scores, 0 to 10."""
    device = net.mean.device
    logits = net(source.to(device), edited.to(device), *net.tokenize(instructions, device))
    return np.interp(net.score(logits).double().cpu().numpy(), *net.knots).tolist()


def train_tokenizer(captions: list[str], vocab: int, length: int) -> str:
    """JSON of a lower-casing byte-level BPE learned from `captions`, for rewards that train from scratch.

    vocab: tokens at most, at least 260: [PAD] = 0, [CLS] = 1, [SEP] = 2, [UNK] = 3, all bytes (so any caption
    can be written), merges. length: tokens a caption is cut to, [CLS] first and [SEP] last included. The same
    list gives the same JSON. Default ours: the paper's models bring BERT's tokenizer.
    """
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    if vocab < 260:
        raise SystemExit(f"error: tokenizer: vocab {vocab}: must be at least 260 (4 special, 256 bytes)")
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(length)
    return tokenizer.to_str()


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


####################################################################################################
# 2. Perceptual features
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
    weights = read_weights(path, "--vgg: ")
    with torch.device("meta"):
        net = VGG16()
    net.mean, net.std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    weights = {k: v for k, v in weights.items() if k in net.state_dict()}
    return fill(net, weights, f"--vgg: {path}", "torchvision's VGG16", torch.float32, "cpu")


Picture = Tensor | list[Image.Image]  # [B, 3, H, W] in [-1, 1], differentiable; or PIL pictures of any sizes

####################################################################################################
# 3. Pictures
####################################################################################################


@dataclass(frozen=True)
class Prep:
    """How a network wants its pictures. Bicubic everywhere; `size` is the side of the square it sees.

    fit: "crop" resizes the short side to `short` and cuts out the centre; "pad" fits the long side and fills
    with black; "square" ignores the aspect ratio.
    """

    size: int = 224
    short: int = 224
    fit: str = "crop"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    half_even: bool = True  # a crop's half pixel: torchvision rounds to even, transformers down
    antialias: bool = True  # PIL's filter grows with the reduction; F.interpolate's does so only if told


CLIP_PREP = Prep()  # OpenAI's and open_clip's CLIP, ImageReward
PICKSCORE_PREP = Prep(half_even=False)  # transformers' CLIPImageProcessor
HPS_PREP = Prep(fit="pad")  # HPSv2's fork of open_clip (ResizeMaxSize); the same as CLIP's on squares
IP2P_PREP = Prep(fit="square", antialias=False)  # InstructPix2Pix's ClipSimilarity
DINO_PREP = Prep(short=256, mean=IMAGENET_MEAN, std=IMAGENET_STD)  # DINO's and DINOv2's evaluation


def placed(prep: Prep, h: int, w: int) -> tuple[int, int, int, int]:
    """Height and width after resizing [h, w], then top and left of the square in it (negative = padding)."""
    S = prep.size
    if prep.fit == "square":
        return S, S, 0, 0
    if prep.fit == "pad":
        scale = S / max(h, w)
        h, w = round(h * scale), round(w * scale)
        return h, w, -((S - h) // 2), -((S - w) // 2)
    short, long = prep.short, int(prep.short * max(h, w) / min(h, w))  # torchvision truncates the long side
    h, w = (short, long) if h <= w else (long, short)
    top, left = (round((n - S) / 2) if prep.half_even else (n - S) // 2 for n in (h, w))
    return h, w, top, left


def prepare(image: Tensor, prep: Prep) -> Tensor:
    """image [B, 3, H, W] in [-1, 1] -> what the network sees, [B, 3, S, S] normalised. Differentiable.

    Equal to the PIL path up to its rounding to 8 bits and its clipping of the filter's overshoot.
    """
    x = ((image if image.dtype == torch.float64 else image.float()) + 1) / 2
    S, (h, w, top, left) = prep.size, placed(prep, *image.shape[-2:])
    if (h, w) != image.shape[-2:]:
        x = F.interpolate(x, (h, w), mode="bicubic", antialias=prep.antialias)
    x = F.pad(x, (-left, S - w + left, -top, S - h + top))  # negative amounts cut
    mean, std = (x.new_tensor(v)[:, None, None] for v in (prep.mean, prep.std))
    return (x - mean) / std


def prepare_pictures(pictures: list[Image.Image], prep: Prep) -> Tensor:
    """PIL pictures of any modes and sizes -> [B, 3, S, S] float32 normalised, pixel for pixel as published.

    A network that resizes tensors and not PIL pictures (IP2P_PREP) goes through `prepare`.
    """
    S, out = prep.size, []
    for picture in pictures:
        rgb = picture.convert("RGB")
        if prep.antialias:
            h, w, top, left = placed(prep, rgb.height, rgb.width)
            rgb = rgb.resize((w, h), Image.Resampling.BICUBIC)
            rgb = rgb.crop((left, top, left + S, top + S))  # black outside of the picture
        x = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)[None].float() / 127.5 - 1
        out.append(prepare(x, Prep(S, S, mean=prep.mean, std=prep.std) if prep.antialias else prep))
    return torch.cat(out)


def prepared(picture: Picture, prep: Prep, device: torch.device) -> Tensor:
    if isinstance(picture, Tensor):
        return prepare(picture, prep)
    return prepare_pictures(picture, prep).to(device)


####################################################################################################
# 4. DINO and DINOv2
####################################################################################################


class ScaledBlock(SelfBlock):
    """SelfBlock with DINOv2's LayerScale on both branches."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.ls1 = nn.ParameterDict({"gamma": nn.Parameter(torch.full((width,), 1e-5))})
        self.ls2 = nn.ParameterDict({"gamma": nn.Parameter(torch.full((width,), 1e-5))})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn(self.norm1(x))
        (a,) = joint_attention([q], [k], [v])
        x = x + self.ls1["gamma"] * self.attn.proj(a.flatten(2))
        return x + self.ls2["gamma"] * self.mlp(self.norm2(x))


class Dino(ViT):
    """DINO (the names and the network of ViT), or DINOv2: LayerScale, and registers after [CLS]."""

    def __init__(self, side: int, patch: int, width: int, depth: int, heads: int, scaled: bool,
                 registers: int):
        super().__init__(side, patch, width, depth, heads)
        if scaled:
            self.blocks = nn.ModuleList(ScaledBlock(width, heads) for _ in range(depth))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        # resizing of the position table, as published: to (n + 0.1) / side with that very scale, which moves
        # the samples by some 0.1 / n of a token; only models with registers ask for the exact size
        self.offset, self.antialias = (0.0, True) if registers else (0.1, False)

    def positions(self, h: int, w: int) -> Tensor:
        """-> [1, hw, D], those of the patches."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        table = self.pos_embed[:, 1:]
        if (h, w) == (side, side):
            return table
        scale = [(n + self.offset) / side for n in (h, w)]
        how = {"scale_factor": scale} if self.offset else {"size": (h, w)}
        table = rearrange(table, "1 (h w) d -> 1 d h w", h=side)
        table = F.interpolate(table, **how, mode="bicubic", antialias=self.antialias)
        return rearrange(table, "1 d h w -> 1 (h w) d")

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] normalised -> [B, 1 + registers + hw, D], [CLS] first."""
        p = self.patch_embed.proj.kernel_size[0]
        first = [self.cls_token + self.pos_embed[:, :1]]
        if hasattr(self, "register_tokens"):  # they have no positions
            first.append(self.register_tokens)
        x = self.patch_embed(x) + self.positions(x.shape[-2] // p, x.shape[-1] // p)
        x = torch.cat([*(y.expand(len(x), -1, -1) for y in first), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def load_dino(path: str, heads: int | None = None, dtype: torch.dtype = torch.float32,
              device: Device = "cpu") -> Dino:
    """DINO's or DINOv2's backbone from its published file; heads of 64, as in all of them, unless given."""
    weights = read_weights(path)
    # the projection head of a training checkpoint, and the token that only masked training uses
    weights = {k: v for k, v in weights.items() if not k.startswith("head.") and k != "mask_token"}
    D, _, patch, _ = shape_of(weights, "patch_embed.proj.weight", path, "DINO")
    side = math.isqrt(shape_of(weights, "pos_embed", path, "DINO")[1] - 1)
    registers = weights["register_tokens"].shape[1] if "register_tokens" in weights else 0
    with torch.device("meta"):
        net = Dino(side, patch, D, count(weights, "blocks."), heads or D // 64,
                   "blocks.0.ls1.gamma" in weights, registers)
    return fill(net, weights, path, "DINO", dtype, device)


####################################################################################################
# 5. CLIP (Radford et al. 2021), under transformers' names; its text tower is in pretrained/text.py
####################################################################################################


class ClipVision(nn.Module):
    """Normalised pictures of one size -> the projected embedding of [CLS]."""

    def __init__(self, side: int, patch: int, width: int, depth: int, heads: int, hidden: int, out: int,
                 quick_gelu: bool):
        super().__init__()
        self.size = side * patch
        embeddings = nn.Module()
        embeddings.class_embedding = nn.Parameter(0.02 * torch.randn(width))
        embeddings.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        embeddings.position_embedding = nn.Embedding(side**2 + 1, width)
        layers = [ClipLayer(width, heads, hidden, quick_gelu, causal=False) for _ in range(depth)]
        self.vision_model = nn.ModuleDict({
            "embeddings": embeddings,
            "pre_layrnorm": nn.LayerNorm(width),  # the published misspelling
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(layers)}),
            "post_layernorm": nn.LayerNorm(width)})
        self.visual_projection = nn.Linear(width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] normalised -> [B, E], not of unit length."""
        m = self.vision_model
        e = m["embeddings"]
        x = e.patch_embedding(x.to(e.class_embedding.dtype)).flatten(2).transpose(1, 2)           # [B, hw, D]
        x = torch.cat([e.class_embedding.expand(len(x), 1, -1), x], dim=1) + e.position_embedding.weight
        x = m["pre_layrnorm"](x)
        for layer in m["encoder"]["layers"]:
            x = layer(x)
        return self.visual_projection(m["post_layernorm"](x[:, 0]))


OPEN_CLIP_NAMES = (  # OpenAI's and open_clip's names -> transformers', in this order
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.ln_1\.", ".layer_norm1."),
    (r"\.ln_2\.", ".layer_norm2."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."))


def clip_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both towers of a CLIP in OpenAI's, open_clip's or transformers' names -> transformers' names.

    Left out: the buffers that published files carry (position_ids, attn_mask, OpenAI's three sizes).
    """
    buffers = r"(^|\.)(position_ids|attn_mask|input_resolution|context_length|vocab_size)$"
    weights = {k: v for k, v in weights.items() if not re.search(buffers, k)}
    if not any(k.startswith("visual.") for k in weights):
        return weights
    out = {}
    for old, v in weights.items():
        new = old
        for pattern, name in OPEN_CLIP_NAMES:
            new = re.sub(pattern, name, new)
        if old in ("visual.proj", "text_projection"):  # stored for x @ W
            out[new] = v.T
        elif m := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", new):
            out |= {f"{m[1]}.self_attn.{n}_proj.{m[2]}": part for n, part in zip("qkv", v.chunk(3))}
        else:
            out[new] = v
    return out


class Clip(nn.Module):
    """Both towers of a CLIP, and how it wants its pictures. Without a tokenizer it has no text tower."""

    def __init__(self, vision: ClipVision, text: ClipText | None, tokenizer: Tokenizer | None, prep: Prep,
                 logit_scale: Tensor):
        super().__init__()
        self.vision, self.text_tower, self.tokenizer, self.prep = vision, text, tokenizer, prep
        self.register_buffer("logit_scale", logit_scale)  # ln of the factor on cosines

    def image(self, picture: Picture) -> Tensor:
        """-> [B, E] of unit length, fp32 at least."""
        y = self.vision(prepared(picture, self.prep, self.logit_scale.device))
        return F.normalize(y if y.dtype == torch.float64 else y.float(), dim=-1)

    @torch.no_grad()
    def text(self, captions: list[str]) -> Tensor:
        """-> [B, E] of unit length, fp32 at least, without gradient."""
        _, y = self.text_tower(tokenize(self.tokenizer, captions, self.logit_scale.device))
        return F.normalize(y if y.dtype == torch.float64 else y.float(), dim=-1)


def load_clip(path: str, tokenizer: str | None, quick_gelu: bool, prep: Prep = CLIP_PREP,
              heads: int | None = None, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Clip:
    """A CLIP with a ViT from its published file (all three kinds of names) or folder; sizes from the shapes.

    tokenizer: a folder with CLIP's vocab.json and merges.txt, or None for the image tower alone.
    quick_gelu: True for OpenAI's weights, False for LAION's (the H/14 of PickScore and HPSv2): no weight
    tells. heads: of the image tower; by default 16 in ViT-H, g and G (of 80, 88, 104), else heads of 64.
    """
    what, stem = "CLIP", "vision_model.embeddings."
    weights = clip_names(read_weights(path))
    scale = weights.get("logit_scale", torch.tensor(math.log(100)))
    parts = [{k: v for k, v in weights.items() if k.startswith(names)} for names in (
        ("vision_model.", "visual_projection."), ("text_model.", "text_projection."))]
    D, _, patch, _ = shape_of(weights, stem + "patch_embedding.weight", path, what)
    side = math.isqrt(shape_of(weights, stem + "position_embedding.weight", path, what)[0] - 1)
    hidden = shape_of(weights, "vision_model.encoder.layers.0.mlp.fc1.weight", path, what)[0]
    out = shape_of(weights, "visual_projection.weight", path, what)[0]
    heads = heads or (16 if D in (1280, 1408, 1664) else D // 64)
    with torch.device("meta"):
        vision = ClipVision(side, patch, D, count(weights, "vision_model.encoder.layers."), heads, hidden,
                            out, quick_gelu)
    if vision.size != prep.size:  # ViT-L/14@336
        prep = replace(prep, size=vision.size, short=vision.size)
    text = reader = None
    if tokenizer is not None:
        rows, D = shape_of(weights, "text_model.embeddings.token_embedding.weight", path, what)
        length = shape_of(weights, "text_model.embeddings.position_embedding.weight", path, what)[0]
        reader = clip_tokenizer(tokenizer, length=length)
        if (size := reader.get_vocab_size()) != rows:
            raise SystemExit(f"error: {tokenizer}: {size} tokens, but {path} embeds {rows}: give the "
                             "vocab.json and merges.txt of this CLIP")
        cfg = ClipTextConfig(D, D // 64, count(weights, "text_model.encoder.layers."), quick_gelu, out, rows,
                             length, eos=reader.token_to_id("<|endoftext|>"))
        with torch.device("meta"):
            text = ClipText(cfg)
        text = fill(text, parts[1], path, "CLIP's text tower", dtype, device)
    vision = fill(vision, parts[0], path, "CLIP's image tower", dtype, device)
    return Clip(vision, text, reader, prep, scale.to(device, torch.promote_types(dtype, torch.float32)))


####################################################################################################
# 6. ImageReward (Xu et al. 2023): BLIP and a linear head, under the names of ImageReward.pt
####################################################################################################

IMAGEREWARD_MEAN, IMAGEREWARD_STD = 0.16717362830052426, 1.0333394966054072  # of its test set's scores


def bert_tokenizer(vocab: str, length: int) -> Tokenizer:
    """BLIP's tokenizer from bert-base-uncased's vocab.txt: lower case, [DEC] and [ENC] added after its words.

    Every caption becomes [CLS] ... [SEP], cut or padded to `length`. BLIP's matching head puts [ENC] in the
    first place; ImageReward leaves [CLS] there. The `tokenizers` library's table is Unicode 8's: younger
    marks and signs, and 256 signs of CJK extension E, fall otherwise than in the Python tokenizer of its
    training.
    """
    try:
        words = Path(vocab).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise SystemExit(f"error: {vocab}: cannot be read ({e}): give bert-base-uncased's "
                         "vocab.txt") from None
    words = words[:-1] if words[-1] == "" else words
    ids = {word: i for i, word in enumerate(words)}
    if lacking := [t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if t not in ids]:
        raise SystemExit(f"error: {vocab}: {lacking[0]} is missing: give bert-base-uncased's vocab.txt")
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]")
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])])
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=ids["[PAD]"], pad_token="[PAD]")
    return tokenizer


def load_imagereward(path: str, vocab: str, dtype: torch.dtype = torch.float32,
                     device: Device = "cpu") -> PreferenceReward:
    """ImageReward.pt (or its safetensors) and bert-base-uncased's vocab.txt -> PreferenceReward, frozen.

    `normalised` gives the published scores. `position_ids` and the two unused projections are left out, and
    `module.` (DDP) is taken off; anything else missing or unknown is an error: the published loader ignores
    it and scores with random weights.
    """
    what = "ImageReward"
    unused = r"blip\.text_encoder\.embeddings\.position_ids|blip\.(vision|text)_proj\.(weight|bias)"
    weights = {k: v for k, v in read_weights(path).items() if not re.fullmatch(unused, k)}
    cfg = reward_config(weights, path, vocab, what)
    with torch.device("meta"):
        net = PreferenceReward(cfg)
    net.mean, net.std = (torch.tensor(v, device=device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    net.score_mean, net.score_std = IMAGEREWARD_MEAN, IMAGEREWARD_STD
    return fill(net, weights, path, what, dtype, device)


def reward_config(weights: dict[str, Tensor], path: str, vocab: str, what: str) -> RewardConfig:
    """Sizes from shapes under PreferenceReward's names, heads of 64; the tokenizer from BERT's vocab.txt."""
    vit, bert = "blip.visual_encoder.", "blip.text_encoder."
    D, _, patch, _ = shape_of(weights, vit + "patch_embed.proj.weight", path, what)
    side = math.isqrt(shape_of(weights, vit + "pos_embed", path, what)[1] - 1)
    rows, width = shape_of(weights, bert + "embeddings.word_embeddings.weight", path, what)
    hidden = shape_of(weights, bert + "encoder.layer.0.intermediate.dense.weight", path, what)[0]
    positions = shape_of(weights, bert + "embeddings.position_embeddings.weight", path, what)[0]
    tokenizer = bert_tokenizer(vocab, RewardConfig.txt_len)
    if (size := tokenizer.get_vocab_size()) != rows:
        raise SystemExit(f"error: {vocab}: {size} tokens with [DEC] and [ENC], but {path} embeds {rows}: "
                         "give the vocab.txt of bert-base-uncased (30,522 lines)")
    return RewardConfig(
        image_size=side * patch, patch=patch, vit_width=D, vit_depth=count(weights, vit + "blocks."),
        vit_heads=D // 64, txt_width=width, txt_depth=count(weights, bert + "encoder.layer."),
        txt_heads=width // 64, txt_hidden=hidden, vocab=rows, positions=positions,
        tokenizer=tokenizer.to_str())


def blip_weights(path: str) -> dict[str, Tensor]:
    """The part of BLIP's model_large.pth that ImageReward starts from, under PreferenceReward's names.

    Left out: momentum copies, decoder, queues, projections and the matching head. It has no reward head.
    """
    weights = {f"blip.{k}": v for k, v in read_weights(path).items()
               if k.startswith(("visual_encoder.", "text_encoder.")) and not k.endswith("position_ids")}
    shape_of(weights, "blip.visual_encoder.pos_embed", path, "BLIP")
    shape_of(weights, "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight", path, "BLIP")
    return weights


####################################################################################################
# 7. Scores: all [B]
####################################################################################################


def imagereward(net: PreferenceReward, picture: Picture, captions: list[str]) -> Tensor:
    """ImageReward's published score, about -2 to 2; `load_imagereward`'s network."""
    S = net.cfg.image_size  # its own forward normalises
    x = prepared(picture, Prep(S, S, mean=(0.5,) * 3, std=(0.5,) * 3), net.mean.device)
    return net.normalised(x, *net.tokenize(captions, net.mean.device))


def clip_cosine(clip: Clip, picture: Picture, captions: list[str]) -> Tensor:
    """cos(image, text): the "CLIPScore" of ImageReward's code, of ByteEdit's tables (0.24 to 0.33) and, over
    HPSv2's weights (ViT-H/14, LAION, HPS_PREP), HPSv2. Name the weights with the number."""
    return (clip.image(picture) * clip.text(captions)).sum(-1)


def clip_score_hessel(clip: Clip, picture: Picture, captions: list[str]) -> Tensor:
    """2.5 max(cos, 0) with "A photo depicts" before each caption (Hessel et al. 2021, over ViT-B/32)."""
    return 2.5 * clip_cosine(clip, picture, ["A photo depicts " + c for c in captions]).clamp(min=0)


def clip_score_100(clip: Clip, picture: Picture, captions: list[str]) -> Tensor:
    """100 max(cos, 0): torchmetrics' CLIPScore of one picture (over a set it clips the mean); PIE-Bench's."""
    return 100 * clip_cosine(clip, picture, captions).clamp(min=0)


def pickscore(clip: Clip, picture: Picture, captions: list[str]) -> Tensor:
    """exp(logit_scale) cos with PickScore's weights (Kirstain et al. 2023; LAION's ViT-H/14), about 20."""
    return clip.logit_scale.exp() * clip_cosine(clip, picture, captions)


def hpsv2(clip: Clip, picture: Picture, captions: list[str]) -> Tensor:
    """cos with HPSv2's or HPSv2.1's weights, about 0.2 to 0.35; not comparable across versions."""
    return clip_cosine(clip, picture, captions)


def aesthetic_score(head: RewardHead, clip: Clip, picture: Picture) -> Tensor:
    """LAION's aesthetic predictor, about 1 to 10: five Linears on the unit embedding of OpenAI's ViT-L/14."""
    return head(clip.image(picture).to(head.layers[0].weight.dtype))[:, 0]


def clip_direction(clip: Clip, source: Picture, edited: Picture, before: list[str],
                   after: list[str]) -> Tensor:
    """cos(edited - source, after - before) of unit embeddings (InstructPix2Pix, over ViT-L/14 and IP2P_PREP).

    NaN where the two captions are equal: there is no direction to judge by, and 0 would be a verdict.
    """
    text = clip.text(after) - clip.text(before)
    score = F.cosine_similarity(clip.image(edited) - clip.image(source), text, dim=-1)
    return torch.where((text != 0).any(-1), score, torch.nan)


def clip_similarity(clip: Clip, a: Picture, b: Picture) -> Tensor:
    """cos(image, image): CLIP-I of MagicBrush (over ViT-B/32), CLIPimg of Emu Edit."""
    return (clip.image(a) * clip.image(b)).sum(-1)


def dino_similarity(dino: Dino, a: Picture, b: Picture) -> Tensor:
    """cos of the [CLS] features (MagicBrush and Emu Edit: DINO ViT-S/16 after DINO_PREP)."""
    cls = (dino(prepared(x, DINO_PREP, dino.cls_token.device).to(dino.cls_token.dtype))[:, 0] for x in (a, b))
    return F.cosine_similarity(*cls, dim=-1)


def load_aesthetic_head(path: str, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> RewardHead:
    """sac+logos+ava1-l14-linearMSE.pth."""
    weights = read_weights(path)
    with torch.device("meta"):
        head = RewardHead(shape_of(weights, "layers.0.weight", path, "the aesthetic predictor")[1])
    return fill(head, weights, path, "the aesthetic predictor", dtype, device)


####################################################################################################
# 8. Opening
####################################################################################################

PUBLISHED = ("imagereward", "clipscore", "pickscore", "hpsv2", "aesthetic")


def open_reward(spec: str, device: Device = "cpu", what: str = "reward",
                dtype: torch.dtype = torch.float32) -> PreferenceReward | Callable:
    """A frozen reward: a folder of train_reward.py -> the network, in evaluation mode; or a published one,
    NAME:PATH,PATH -> score(picture, captions) -> [B], differentiable in the picture.

    imagereward:ImageReward.pt,vocab.txt     clipscore:CLIP,TOKENIZER (OpenAI's; the raw cosine)
    pickscore:PICKSCORE,TOKENIZER            hpsv2:HPS_v2.1_compressed.pt,TOKENIZER
    aesthetic:sac+logos+ava1-l14-linearMSE.pth,CLIP (OpenAI's ViT-L/14; captions are not read)

    what: the flag that errors name.
    """
    name, colon, rest = spec.partition(":")
    if not colon or Path(spec).exists():
        return _trained(spec, f"{what}: {spec}").to(device)
    paths = rest.split(",")
    if name not in PUBLISHED or len(paths) != 2 or not all(paths):
        raise SystemExit(f"error: {what}: {spec!r}: give a folder, or NAME:PATH,PATH with a name of "
                         f"{', '.join(PUBLISHED)}")
    to = {"dtype": dtype, "device": device}
    if name == "imagereward":
        return partial(imagereward, load_imagereward(*paths, **to))
    if name == "aesthetic":
        head, clip = load_aesthetic_head(paths[0], **to), load_clip(paths[1], None, quick_gelu=True, **to)
        return lambda picture, captions: aesthetic_score(head, clip, picture)
    if name == "clipscore":
        return partial(clip_cosine, load_clip(*paths, quick_gelu=True, **to))
    if name == "pickscore":
        return partial(pickscore, load_clip(*paths, quick_gelu=False, prep=PICKSCORE_PREP, **to))
    return partial(hpsv2, load_clip(*paths, quick_gelu=False, prep=HPS_PREP, **to))


def _trained(path: str, what: str) -> PreferenceReward:
    tensors, manifest = checkpoint.load(path, ("model",))
    net = build_reward(manifest.get("arch", {}), what)
    if net.tokenizer is None:
        raise SystemExit(f"error: {what}: holds no tokenizer: use a folder that train_reward.py wrote")
    checkpoint.load_state(net, tensors["model"], path)
    scores = manifest.get("meta", {}).get("val") or {}
    net.score_mean, net.score_std = scores.get("score_mean", 0.0), max(scores.get("score_std", 1.0), 1e-3)
    return net.eval().requires_grad_(False)


def score_of(reward: PreferenceReward | Callable) -> Callable:
    """A reward as a function of pictures [B, 3, H, W] in [-1, 1] and B captions -> [B]."""
    if not isinstance(reward, PreferenceReward):
        return reward
    return lambda image, captions: reward.normalised(image, *reward.tokenize(captions, image.device))


def open_coherence(init: str | None, image_size: int, patch: int, width: int, depth: int,
                   what: str) -> CoherenceReward:
    """R_gamma: fresh, from a PeFL run's coherence model, or on a trained reward's image tower with a fresh
    head, which both bring their own sizes. The paper's backbone is a ViT, of unknown origin; a tower that
    knows pictures already learns to tell generated pixels several times faster than a fresh one (LOG.md)."""
    if not init:
        heads = max(1, width // 32)
        return CoherenceReward(CoherenceConfig(image_size // patch, patch, width, depth, heads))
    tensors, manifest = checkpoint.load(init, ("coherence", "model"))
    if arch := manifest["meta"].get("coherence_arch"):
        disc = build_coherence(arch, f"{what}: {init}")
        checkpoint.load_state(disc, tensors["coherence"], init)
        return disc
    r = build_reward(manifest["arch"], f"{what}: {init}").cfg
    disc = CoherenceReward(CoherenceConfig(
        r.image_size // r.patch, r.patch, r.vit_width, r.vit_depth, r.vit_heads))
    tower = "blip.visual_encoder."
    checkpoint.load_state(disc.vit, {k.removeprefix(tower): v for k, v in tensors["model"].items()
                                     if k.startswith(tower)}, init)
    return disc


def open_features(vgg: str | None, rewards: dict, device: Device) -> tuple[Callable, str]:
    """V of ByteEdit's Eq. 3, picture -> maps, and its name: VGG16 where its weights are given, else a
    reward's frozen image tower."""
    if vgg:
        return load_vgg16(vgg).to(device), f"VGG16 ({vgg})"
    for name in ("aesthetic", "alignment"):
        if isinstance(rewards.get(name), PreferenceReward):
            return rewards[name].image_features, f"the {name} reward's image tower (no --vgg given)"
    return (lambda image: []), "nothing (neither --vgg nor a reward of ours given)"


def feature_l1(features: Callable, x: Tensor, x0: Tensor) -> Tensor:
    """|| V(x) - V(x0') ||_1, the mean over each map's elements, then over maps (ByteEdit Eq. 3)."""
    with torch.no_grad():
        real = features(x)
    gaps = [(a - b).abs().mean() for a, b in zip(real, features(x0))]
    return torch.stack(gaps).mean() if gaps else x0.new_zeros(())
