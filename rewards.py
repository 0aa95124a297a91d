"""Whatever looks at a picture and answers with a number: the three rewards, the scorer, published scores.

    1. Networks: PreferenceReward (aesthetic, alignment), CoherenceReward, EditScorer
    2. ImageReward as a PreferenceReward     3. BLIP for retrieval     4. Scores, one function each
    5. opening a reward by name

Pictures are float [B, 3, H, W] in [-1, 1], as everywhere; every score is [B] and differentiable in them. The
published networks that scores are made of are in pretrained/towers.py.
"""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

import checkpoint
import common
from model import config_from, unpatchify
from pretrained import towers
from pretrained.files import Device, count, fill, read_weights, shape_of
from pretrained.towers import Clip, Picture, Prep, ViT, load_clip, load_vgg16, prepared

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

    def forward(self, x: Tensor, img: Tensor | None, bias: Tensor) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, x, bias), x)
        if img is not None:
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

    def forward(self, ids: Tensor, attend: Tensor, img: Tensor | None) -> Tensor:
        """ids, attend [B, L] (attend 0 = padding), img [B, N, vit_width] -> [B, L, D]. Without a picture:
        BLIP's unimodal mode, which skips the attention to it."""
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


def start_towers(net: nn.Module, towers_of: nn.Module) -> None:
    """What a network over two towers begins with: weights for training from scratch in `towers_of` (default
    ours), CLIP's deviations of pixels, and the tokenizer of its cfg."""
    for m in towers_of.modules():
        if isinstance(m, nn.Linear | nn.Embedding):
            nn.init.normal_(m.weight, std=0.02 if isinstance(m, nn.Embedding) else m.weight.shape[1] ** -0.5)
    for name, values in (("mean", towers.CLIP_MEAN), ("std", towers.CLIP_STD)):
        net.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
    net.tokenizer = Tokenizer.from_str(net.cfg.tokenizer) if net.cfg.tokenizer else None
    if net.tokenizer:
        net.tokenizer.encode_special_tokens = True  # a typed "[PAD]" is text


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
        start_towers(self, self.blip)
        self.mlp.init_weights(original_init)
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

        The short side is resized to `image_size` and the centre cropped (ImageReward), differentiably: of a
        picture that is not square, what lies beside the centre has no gradient.
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
        start_towers(self, self)
        self.head = nn.Linear(cfg.txt_width, 11)
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


def measured_at(manifest: dict, what: str) -> dict:
    """meta.val: what held-out pairs said of the weights; a line where these were others, of another step, as
    in a checkpoint that a signal left (manifests of old do not say)."""
    found = manifest.get("meta", {}).get("val") or {}
    if found.get("step", manifest.get("step")) != manifest.get("step"):
        common.print0(f"warning: {what}: its weights are of step {manifest.get('step')}, its scores were "
                      f"measured at step {found['step']}, and are scaled by that: let its training end")
    return found


def open_scorer(path: str, device: Device = "cpu", what: str = "--judge") -> EditScorer:
    """A frozen EditScorer from a folder of train_scorer.py, calibrated as its manifest says."""
    tensors, manifest = checkpoint.load(path, ("model",))
    net = EditScorer(config_from(RewardConfig, manifest.get("arch", {}), "scorer", f"{what}: {path}"))
    checkpoint.load_state(net, tensors["model"], path)
    if knots := measured_at(manifest, f"{what}: {path}").get("knots"):
        net.knots = knots
    else:
        common.print0(f"warning: {what}: {path}: was not calibrated on held-out pairs: its scores are taken "
                      "as they are")
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

####################################################################################################
# 2. ImageReward (Xu et al. 2023): BLIP and a linear head, under the names of ImageReward.pt
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
    spread = towers.CLIP_MEAN, towers.CLIP_STD
    net.mean, net.std = (torch.tensor(v, device=device)[:, None, None] for v in spread)
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
# 3. BLIP for retrieval (Li et al. 2022): does this text belong to this picture
####################################################################################################

BLIP_NAMES = (  # transformers' names of BlipForImageTextRetrieval -> BLIP's own, in this order
    (r"^vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
    (r"^vision_model\.post_layernorm\.", "visual_encoder.norm."),
    (r"^vision_model\.encoder\.layers\.", "visual_encoder.blocks."),
    (r"\.self_attn\.projection\.", ".attn.proj."),
    (r"\.self_attn\.", ".attn."),
    (r"\.layer_norm(\d)\.", r".norm\1."))


class Blip(nn.Module):
    """BLIP's two answers on whether a text belongs to a picture: `itc` and `itm`."""

    def __init__(self, cfg: RewardConfig, shared: int):
        super().__init__()
        self.cfg = cfg
        self.visual_encoder = ViT(cfg.image_size // cfg.patch, cfg.patch, cfg.vit_width, cfg.vit_depth,
                                  cfg.vit_heads)
        self.text_encoder = MedText(cfg)
        self.vision_proj = nn.Linear(cfg.vit_width, shared)
        self.text_proj = nn.Linear(cfg.txt_width, shared)
        self.itm_head = nn.Linear(cfg.txt_width, 2)
        self.tokenizer = Tokenizer.from_str(cfg.tokenizer)
        self.tokenizer.encode_special_tokens = True

    tokenize = PreferenceReward.tokenize

    @property
    def prep(self) -> Prep:
        """Squashed to a square, as BLIP's predict.py has it."""
        return Prep(self.cfg.image_size, self.cfg.image_size, fit="square")

    def tokens(self, picture: Picture) -> Tensor:
        """-> the image tower's [B, N, D]."""
        return self.visual_encoder(prepared(picture, self.prep, self.itm_head.weight.device))

    def itc(self, tokens: Tensor, captions: list[str]) -> Tensor:
        """-> cosines [B] of the projected [CLS] features, the text read without the picture."""
        txt = self.text_encoder(*self.tokenize(captions, tokens.device), None)[:, 0]
        return F.cosine_similarity(self.vision_proj(tokens[:, 0]), self.text_proj(txt), dim=-1)

    def itm(self, tokens: Tensor, captions: list[str]) -> Tensor:
        """-> probability [B] of a match, the text read with attention to the picture. Its first token stays
        [CLS]: the published class for this does not set [ENC]."""
        txt = self.text_encoder(*self.tokenize(captions, tokens.device), tokens)[:, 0]
        return self.itm_head(txt).softmax(-1)[:, 1]


def load_blip(path: str, vocab: str, device: Device = "cpu") -> Blip:
    """BLIP's model_base_retrieval_coco.pth or transformers' BlipForImageTextRetrieval (file or folder), and
    bert-base-uncased's vocab.txt. Left out: momentum copies, decoder, queues, temperature, position_ids."""
    what = "BLIP for retrieval"
    weights = {}
    for name, v in read_weights(path).items():
        for pattern, new in BLIP_NAMES:
            name = re.sub(pattern, new, name)
        if not re.match(r"(\w+_m|text_decoder)\.|(\w+_queue|temp)$|.*\.position_ids$", name):
            weights[name] = v
    stem = {f"blip.{k}": v for k, v in weights.items()}  # the towers' names in ImageReward.pt
    cfg = reward_config(stem, path, vocab, what)
    shared = shape_of(weights, "vision_proj.weight", path, what, 2)[0]
    with torch.device("meta"):
        net = Blip(cfg, shared)
    return fill(net, weights, path, what, torch.float32, device)


####################################################################################################
# 4. Scores: all [B]
####################################################################################################


def imagereward(net: PreferenceReward, picture: Picture, captions: list[str]) -> Tensor:
    """ImageReward's published score, about -2 to 2; `load_imagereward`'s network."""
    S = net.cfg.image_size  # its own forward normalises
    x = prepared(picture, Prep(S, S, mean=(0.5,) * 3, std=(0.5,) * 3), net.mean.device)
    return net.normalised(x, *net.tokenize(captions, net.mean.device))


def clip_cosine(clip: Clip, picture: Picture, captions: list[str]) -> Tensor:
    """cos(image, text): the "CLIPScore" of ImageReward's code, of ByteEdit's tables (0.24 to 0.33) and, over
    HPSv2's weights (ViT-H/14, LAION, towers.HPS_PREP), HPSv2 or HPSv2.1, about 0.2 to 0.35 and not comparable
    with each other. Name the weights with the number."""
    return (clip.image(picture) * clip.text(captions)).sum(-1)


def pickscore(clip: Clip, picture: Picture, captions: list[str]) -> Tensor:
    """exp(logit_scale) cos with PickScore's weights (Kirstain et al. 2023; LAION's ViT-H/14), about 20."""
    return clip.logit_scale.exp() * clip_cosine(clip, picture, captions)


def aesthetic_score(head: RewardHead, clip: Clip, picture: Picture) -> Tensor:
    """LAION's aesthetic predictor, about 1 to 10: five Linears on the unit embedding of OpenAI's ViT-L/14."""
    return head(clip.image(picture).to(head.layers[0].weight.dtype))[:, 0]


def clip_direction(clip: Clip, source: Picture, edited: Picture, before: list[str],
                   after: list[str]) -> Tensor:
    """cos(edited - source, after - before) of unit embeddings (InstructPix2Pix, over ViT-L/14 and IP2P_PREP).

    NaN where the two captions are equal: there is no direction to judge by, and 0 would be a verdict.
    """
    return direction(clip.image(source), clip.image(edited), clip.text(before), clip.text(after))


def direction(source: Tensor, edited: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """The same of embeddings [B, E], which are of unit length. An edit that changed nothing has 0."""
    text = after - before
    score = F.cosine_similarity(edited - source, text, dim=-1)
    return torch.where((text != 0).any(-1), score, torch.nan)


def clip_similarity(clip: Clip, a: Picture, b: Picture) -> Tensor:
    """cos(image, image): CLIP-I of MagicBrush (over ViT-B/32), CLIPimg of Emu Edit."""
    return (clip.image(a) * clip.image(b)).sum(-1)


def load_aesthetic_head(path: str, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> RewardHead:
    """sac+logos+ava1-l14-linearMSE.pth."""
    weights = read_weights(path)
    with torch.device("meta"):
        head = RewardHead(shape_of(weights, "layers.0.weight", path, "the aesthetic predictor")[1])
    return fill(head, weights, path, "the aesthetic predictor", dtype, device)


####################################################################################################
# 5. Opening
####################################################################################################

PUBLISHED = ("imagereward", "clipscore", "pickscore", "hpsv2", "aesthetic")


def open_reward(spec: str, device: Device = "cpu", what: str = "reward",
                dtype: torch.dtype = torch.float32) -> PreferenceReward | Callable:
    """A frozen reward: a folder of train_reward.py -> the network, in evaluation mode; or a published one,
    NAME:PATH,PATH -> score(picture, captions) -> [B], differentiable in the picture.

    imagereward:ImageReward.pt,vocab.txt     clipscore:CLIP,TOKENIZER (OpenAI's; the raw cosine)
    pickscore:PICKSCORE,TOKENIZER            hpsv2:HPS_v2.1_compressed.pt,TOKENIZER
    aesthetic:sac+logos+ava1-l14-linearMSE.pth,CLIP (OpenAI's ViT-L/14; captions are not read)

    Scores of train_reward.py and of ImageReward are in deviations of held-out ones; the others are as they
    are published, and each has its own scale: PickScore's are about 20. what: the flag that errors name.
    """
    name, colon, rest = spec.partition(":")
    if not colon or Path(spec).exists():
        return _trained(spec, f"{what}: {spec}").to(device)
    paths = rest.split(",")
    if name not in PUBLISHED or len(paths) != 2 or not all(paths):
        raise SystemExit(f"error: {what}: {spec!r}: give a folder, or NAME:PATH,PATH with a name of "
                         f"{', '.join(PUBLISHED)}")
    if gone := [p for p in paths if not Path(p).exists()]:
        raise SystemExit(f"error: {what}: {spec}: {gone[0]}: no such file or folder: correct the path")
    to = {"dtype": dtype, "device": device}
    if name == "imagereward":
        return partial(imagereward, load_imagereward(*paths, **to))
    common.print0(f"note: {what}: {name} has its published scores, which are not normalised: what a weight "
                  "of its loss means depends on their scale")
    if name == "aesthetic":
        head, clip = load_aesthetic_head(paths[0], **to), load_clip(paths[1], None, quick_gelu=True, **to)
        return lambda picture, captions: aesthetic_score(head, clip, picture)
    if name == "clipscore":
        return partial(clip_cosine, load_clip(*paths, quick_gelu=True, **to))
    if name == "pickscore":
        return partial(pickscore, load_clip(*paths, quick_gelu=False, prep=towers.PICKSCORE_PREP, **to))
    return partial(clip_cosine, load_clip(*paths, quick_gelu=False, prep=towers.HPS_PREP, **to))


def _trained(path: str, what: str) -> PreferenceReward:
    if not Path(path).is_dir():
        raise SystemExit(f"error: {what}: no such folder: give a folder that train_reward.py wrote, or a "
                         f"published reward, NAME:PATH,PATH with a name of {', '.join(PUBLISHED)}")
    tensors, manifest = checkpoint.load(path, ("model",))
    net = build_reward(manifest.get("arch", {}), what)
    if net.tokenizer is None:
        raise SystemExit(f"error: {what}: holds no tokenizer: use a folder that train_reward.py wrote")
    checkpoint.load_state(net, tensors["model"], path)
    found = measured_at(manifest, what)
    if "val/score_mean" in found:
        net.score_mean, net.score_std = found["val/score_mean"], max(found["val/score_std"], 1e-3)
    else:
        common.print0(f"warning: {what}: its scores of held-out pairs were not measured and are taken as "
                      "they are: what a weight of its loss means depends on their scale")
    if found.get("val/low", 1.0) <= 0.5:
        common.print0(f"warning: {what}: is right in {found['val/acc']:.0%} of {found['val/pairs']} held-out "
                      f"pairs, {found['val/low']:.0%} to {found['val/high']:.0%}: no better than chance")
    return net.eval().requires_grad_(False)


def is_normalised(reward: PreferenceReward | Callable) -> bool:
    """Whether an opened reward's scores are in their standard deviations: ours, and ImageReward's."""
    return isinstance(getattr(reward, "args", [reward])[0], PreferenceReward)


def score_of(reward: PreferenceReward | Callable) -> Callable:
    """A reward as a function of pictures [B, 3, H, W] in [-1, 1] and B captions -> [B]."""
    if not isinstance(reward, PreferenceReward):
        return reward
    return lambda image, captions: reward.normalised(image, *reward.tokenize(captions, image.device))


def open_coherence(init: str | None, image_size: int, patch: int, what: str) -> CoherenceReward:
    """R_gamma: fresh, of CoherenceConfig's sizes and the editor's patch (in pixels, at least 4); or from a
    PeFL run's coherence model, or on a trained reward's image tower with a fresh head: these bring their own
    sizes. The paper's backbone is a ViT, of unknown origin; a tower that knows pictures already learns to
    tell generated pixels several times faster than a fresh one (LOG.md). what: the flag that errors name."""
    if not init:
        patch = max(patch, 4)
        return CoherenceReward(CoherenceConfig(image_size // patch, patch))
    if not Path(init).is_dir():
        raise SystemExit(f"error: {what}: {init}: no such folder: give one that train_pefl.py or "
                         "train_reward.py wrote")
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
    # It learned on (x + 1) / 2 in CLIP's deviations, and is shown x: its first layer takes that over
    mean, std = (torch.tensor(v) for v in (towers.CLIP_MEAN, towers.CLIP_STD))
    first = disc.vit.patch_embed.proj
    with torch.no_grad():
        first.bias += torch.einsum("ochw,c->o", first.weight, (0.5 - mean) / std)
        first.weight *= (0.5 / std)[:, None, None]
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
