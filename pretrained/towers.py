"""Published networks that look at pictures: VGG16, DINO, DINOv2 and CLIP, each with its way to prepare them.

    1. Pictures: each network's own resizing, cropping and normalising
    2. VGG16     3. the vision transformer that BLIP, ImageReward and DINO share
    4. DINO and DINOv2     5. CLIP, from transformers', OpenAI's or open_clip's names

Pictures are float [B, 3, H, W] in [-1, 1], as everywhere. Sizes are read from the weights. What weights
cannot tell (quick-GELU or GELU, which resizing) is an argument.
"""

import math
import re
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from kernels import joint_attention
from model import PatchEmbed, SelfBlock
from pretrained.files import Device, count, fill, read_weights, shape_of
from pretrained.text import ClipLayer, ClipText, ClipTextConfig, clip_tokenizer, tokenize

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Picture = Tensor | list[Image.Image]  # [B, 3, H, W] in [-1, 1], differentiable; or PIL pictures of any sizes

####################################################################################################
# 1. Pictures
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
    tensor: bool = False  # the published code resizes a tensor, so that nothing is rounded to 8 bits


CLIP_PREP = Prep()  # OpenAI's and open_clip's CLIP, ImageReward
PICKSCORE_PREP = Prep(half_even=False)  # transformers' CLIPImageProcessor
# HPSv2's fork of open_clip (ResizeMaxSize, after ToTensor); torchvision antialiases tensors since 0.17
HPS_PREP = Prep(fit="pad", tensor=True)
IP2P_PREP = Prep(fit="square", antialias=False, tensor=True)  # InstructPix2Pix's ClipSimilarity
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
    """PIL pictures of any modes, sizes -> [B, 3, S, S] float32 normalised, pixel for pixel as published."""
    S, out = prep.size, []
    for picture in pictures:
        rgb = picture.convert("RGB")
        if not prep.tensor:
            h, w, top, left = placed(prep, rgb.height, rgb.width)
            rgb = rgb.resize((w, h), Image.Resampling.BICUBIC)
            rgb = rgb.crop((left, top, left + S, top + S))  # black outside of the picture
        x = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)[None].float() / 127.5 - 1
        out.append(prepare(x, prep if prep.tensor else Prep(S, S, mean=prep.mean, std=prep.std)))
    return torch.cat(out)


def prepared(picture: Picture, prep: Prep, device: torch.device) -> Tensor:
    if isinstance(picture, Tensor):
        return prepare(picture, prep)
    return prepare_pictures(picture, prep).to(device)


####################################################################################################
# 2. VGG16 (Simonyan & Zisserman 2015)
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

####################################################################################################
# 3. Vision transformer
####################################################################################################


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

    def tokens(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] normalised -> what the first block sees, [B, 1 + registers + hw, D], [CLS] first."""
        p = self.patch_embed.proj.kernel_size[0]
        first = [self.cls_token + self.pos_embed[:, :1]]
        if hasattr(self, "register_tokens"):  # they have no positions
            first.append(self.register_tokens)
        x = self.patch_embed(x) + self.positions(x.shape[-2] // p, x.shape[-1] // p)
        return torch.cat([*(y.expand(len(x), -1, -1) for y in first), x], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] normalised -> [B, 1 + registers + hw, D], [CLS] first."""
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def keys(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] normalised -> the last block's keys, [B, 1 + registers + hw, D], heads joined."""
        x = self.tokens(x)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        return last.attn(last.norm1(x))[1].flatten(2)


VIT_NAMES = (  # transformers' names of DINO (a ViTModel) -> its own, in this order
    (r"^vit\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(attention\.)?(query|key|value|q_proj|k_proj|v_proj)\.", r".attn.\2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."))


def dino_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINO in transformers' names (ViTModel, of old and of version 5) or its own -> its own names."""
    if "embeddings.cls_token" not in weights and "vit.embeddings.cls_token" not in weights:
        return weights
    out = {}
    for name, v in weights.items():
        if name.startswith(("pooler.", "vit.pooler.")):  # untrained
            continue
        for pattern, new in VIT_NAMES:
            name = re.sub(pattern, new, name)
        out[name] = v
    parts = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"))
    for name in [n for n in out if re.search(r"\.attn\.(query|q_proj)\.", n)]:
        which = parts[".q_proj." in name]
        own = [name.replace(which[0], part) for part in which]
        if all(n in out for n in own):  # else what is missing is named as such
            out[name.replace(which[0], "qkv")] = torch.cat([out.pop(n) for n in own])
    return out


def load_dino(path: str, heads: int | None = None, dtype: torch.dtype = torch.float32,
              device: Device = "cpu") -> Dino:
    """DINO's or DINOv2's backbone from its published file, or DINO's from transformers' file or folder; heads
    of 64, as in all of them, unless given. Norms' eps is 1e-6 as trained, not transformers' 1e-12."""
    weights = dino_names(read_weights(path))
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
