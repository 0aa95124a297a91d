"""Public image towers and the rewards built on them, loaded from the files they are published in.

    1. Pictures: each network's own resizing, cropping and normalising
    2. DINO and DINOv2
    3. CLIP, from transformers', OpenAI's or open_clip's names
    4. ImageReward as a PreferenceReward
    5. Rewards and judges, one function each, and by name

Pictures are float [B, 3, H, W] in [-1, 1], as everywhere; every score is [B] and differentiable in them.
Sizes are read from the weights. What weights cannot tell (quick-GELU or GELU, which resizing) is an argument.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from frozen import IMAGENET_MEAN, IMAGENET_STD
from kernels import joint_attention
from model import CLIP_MEAN, CLIP_STD, PreferenceReward, RewardConfig, RewardHead, SelfBlock, ViT
from text_encoders import ClipLayer, ClipText, ClipTextConfig, clip_tokenizer, tokenize
from weights import Device, count, fill, read_weights, shape_of

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
# 2. DINO and DINOv2
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
# 3. CLIP (Radford et al. 2021), under transformers' names; its text tower is in text_encoders.py
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
# 4. ImageReward (Xu et al. 2023): BLIP and a linear head, under the names of ImageReward.pt
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
# 5. Rewards and judges: all [B]
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


REWARDS = ("imagereward", "clipscore", "pickscore", "hpsv2", "aesthetic")


def open_reward(spec: str, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Callable:
    """NAME:PATH,PATH -> score(picture, captions) -> [B], frozen and differentiable in the picture.

    imagereward:ImageReward.pt,vocab.txt     clipscore:CLIP,TOKENIZER (OpenAI's; the raw cosine)
    pickscore:PICKSCORE,TOKENIZER            hpsv2:HPS_v2.1_compressed.pt,TOKENIZER
    aesthetic:sac+logos+ava1-l14-linearMSE.pth,CLIP (OpenAI's ViT-L/14; captions are not read)
    """
    name, _, rest = spec.partition(":")
    paths = rest.split(",")
    if name not in REWARDS or len(paths) != 2 or not all(paths):
        raise SystemExit(f"error: reward {spec!r}: give NAME:PATH,PATH with a name of {', '.join(REWARDS)}")
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
