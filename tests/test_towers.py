"""Public towers and rewards: equal to transformers in float64, from the names they are published under."""

import json
import math
import random
import re
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from inprocess import run_script
from PIL import Image
from safetensors.torch import save_file
from tokenizers import pre_tokenizers

import rewards
from pretrained import files, sd3, towers
from pretrained import text as text_encoders

transformers = pytest.importorskip("transformers")
TOLERANCE = 1e-11  # of the largest output; a correct float64 copy reaches 1e-14
F64 = torch.float64
CAPTIONS = ["a red car", "the lazy dog jumps", "two cafes"]


def randomize(net, seed=0):
    """Random weights of a trained network's scale; zeros and ones would hide a swapped or unread tensor."""
    g = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if p.ndim < 2:
            p.data = (1 if "norm" in name or "ln_" in name else 0) + 0.3 * noise
        else:
            p.data = noise * (0.5 if p.numel() == p.shape[-1] else p[0].numel() ** -0.5)
    return net


def error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def pixels(side, batch=2, seed=0, width=None):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, side, width or side, generator=g, dtype=F64)


def picture(h, w, seed=0):
    """A PIL picture with edges, so that a filter overshoots and a shift by one pixel shows."""
    g = np.random.default_rng(seed)
    coarse = Image.fromarray(g.integers(0, 256, (max(2, h // 9), max(2, w // 9), 3), dtype=np.uint8))
    return coarse.resize((w, h), Image.Resampling.NEAREST)


def as_tensor(p):
    return torch.from_numpy(np.array(p)).permute(2, 0, 1)[None].to(F64) / 127.5 - 1


def save(tmp_path, weights, name="w.safetensors"):
    path = tmp_path / name
    weights = {k: v.contiguous().clone() for k, v in weights.items()}
    save_file(weights, path) if name.endswith("safetensors") else torch.save(weights, path)
    return str(path)


def output_and_gradient(call, x):
    x = x.clone().requires_grad_()
    y = call(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=F64).view_as(y)).sum().backward()
    return y.detach(), x.grad


def agree(ours, theirs, x):
    """Largest of the errors of outputs and of gradients."""
    (a, ga), (b, gb) = output_and_gradient(ours, x), output_and_gradient(theirs, x)
    assert a.shape == b.shape and b.abs().max() > 0.1 and gb.abs().max() > 1e-5
    return max(error(a, b), error(ga, gb))


def rename(weights, table):
    """Names replaced pairwise; every name is used once."""
    out = {}
    for k, v in weights.items():
        for old, new in table:
            k = k.replace(old, new)
        assert k not in out
        out[k] = v
    return out


def split_qkv(weights, old, parts):
    """The one tensor `old` of each layer -> three."""
    out = {}
    for k, v in weights.items():
        if old in k:
            out |= {k.replace(old, part): c for part, c in zip(parts, v.chunk(3))}
        else:
            out[k] = v
    return out


def join_qkv(weights, parts, new):
    out = {}
    for k, v in weights.items():
        if parts[0] in k:
            out[k.replace(parts[0], new)] = torch.cat([weights[k.replace(parts[0], p)] for p in parts])
        elif not any(p in k for p in parts):
            out[k] = v
    return out


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


####################################################################################################
# DINO, DINOv2
####################################################################################################

EMBEDDINGS = [("cls_token", "embeddings.cls_token"), ("pos_embed", "embeddings.position_embeddings"),
              ("register_tokens", "embeddings.register_tokens"), ("mask_token", "embeddings.mask_token"),
              ("patch_embed.proj", "embeddings.patch_embeddings.projection"), ("norm.", "layernorm."),
              ("attn.proj", "attention.o_proj")]
V1 = [*EMBEDDINGS, ("blocks.", "layers."), ("norm1", "layernorm_before"), ("norm2", "layernorm_after")]
V2 = [*EMBEDDINGS, ("blocks.", "encoder.layer."), ("ls1.gamma", "layer_scale1.lambda1"),
      ("ls2.gamma", "layer_scale2.lambda1")]
QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
SHAPE = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
             hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


class DoubleTorch:
    """`torch` for a peer's module that forces fp32: its float32 is float64."""

    def __getattr__(self, name):
        return torch.float64 if name == "float32" else getattr(torch, name)


def dino_peer(version, eps=1e-6):
    """-> transformers' network with random weights, and the table of names."""
    if version == "v1":
        cfg = transformers.ViTConfig(**SHAPE, intermediate_size=512, layer_norm_eps=eps)
        return randomize(transformers.ViTModel(cfg, add_pooling_layer=False)).double().eval(), V1
    kind = {"v2": "Dinov2", "registers": "Dinov2WithRegisters"}[version]
    cfg = getattr(transformers, kind + "Config")(**SHAPE, layer_norm_eps=eps)
    return randomize(getattr(transformers, kind + "Model")(cfg)).double().eval(), V2


def published_dino(theirs, names):
    """Weights under the names of the facebookresearch files."""
    return rename(join_qkv(theirs.state_dict(), QKV, "attn.qkv"), [(b, a) for a, b in reversed(names)])


def run_peer(theirs, version):
    how = {"interpolate_pos_encoding": True} if version == "v1" else {}
    return lambda x: theirs(x, **how).last_hidden_state


@pytest.mark.parametrize("version", ["v1", "v2", "registers"])
def test_dino_equals_transformers(version, tmp_path, monkeypatch):
    theirs, names = dino_peer(version)
    for name in ("dinov2", "dinov2_with_registers"):  # the first use imports it
        if module := sys.modules.get(f"transformers.models.{name}.modeling_{name}"):
            monkeypatch.setattr(module, "torch", DoubleTorch())
    weights = published_dino(theirs, names)
    assert ("mask_token" in weights) == (version != "v1")
    assert same(split_qkv(rename(weights, names), "attn.qkv", QKV), theirs.state_dict())  # and back
    ours = towers.load_dino(save(tmp_path, weights), dtype=F64)
    assert not any(p.requires_grad for p in ours.parameters())

    peer = run_peer(theirs, version)
    assert agree(ours, peer, pixels(32)) < TOLERANCE
    ours.offset = 0.0  # transformers resizes positions to the exact size
    assert agree(ours, peer, pixels(48, width=24)) < TOLERANCE
    # what must not pass
    assert agree(lambda x: ours(x).roll(1, 1), peer, pixels(32)) > TOLERANCE
    if version != "v1":
        ours.antialias = not ours.antialias
        assert agree(ours, peer, pixels(24)) > TOLERANCE
    wrong, _ = dino_peer(version, eps=1e-12)  # transformers' default, and its conversion of DINO
    assert agree(ours, run_peer(wrong, version), pixels(32)) > TOLERANCE


def test_published_resizing_of_positions():
    """(n + 0.1) / side as the scale, as DINO and DINOv2 without registers are published."""
    net = randomize(towers.Dino(4, 8, 128, 1, 2, scaled=True, registers=0)).double()
    table = net.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = F.interpolate(table, scale_factor=(6.1 / 4, 3.1 / 4), mode="bicubic")
    expected = expected.flatten(2).transpose(1, 2)
    assert torch.equal(net.positions(6, 3), expected)
    exact = F.interpolate(table, (6, 3), mode="bicubic").flatten(2).transpose(1, 2)
    assert error(exact, expected) > 1e-3
    assert not towers.Dino(4, 8, 128, 1, 2, scaled=True, registers=4).offset


def test_dino_is_vit_under_the_same_names():
    """model.ViT (BLIP, coherence) and DINO are one network where no position is resized."""
    a, b = towers.ViT(4, 8, 128, 2, 2), towers.Dino(4, 8, 128, 2, 2, scaled=False, registers=0)
    b.load_state_dict(randomize(a).state_dict())
    x = pixels(32)
    assert torch.equal(a.double()(x), b.double()(x))


@pytest.mark.parametrize("nest", [lambda w: w, lambda w: {"student": {}, "teacher": {
    **{f"module.backbone.{k}": v for k, v in w.items()}, "module.head.last_layer.weight_v": torch.ones(3)}}])
def test_dino_files(nest, tmp_path):
    weights = randomize(towers.Dino(4, 8, 128, 1, 2, scaled=False, registers=0)).state_dict()
    path = tmp_path / "dino.pth"
    torch.save(nest(weights), path)
    assert same(towers.load_dino(str(path)).state_dict(), weights)


####################################################################################################
# CLIP
####################################################################################################


BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB = 2 * len(BYTES) + 2 + 2


@pytest.fixture
def clip_words(tmp_path):
    return clip_vocabulary(tmp_path)


def clip_vocabulary(tmp_path):
    """A folder with a small CLIP's vocab.json and merges.txt: bytes, two merges, the two special tokens."""
    merges = [("r", "e"), ("re", "d</w>")]
    tokens = [*BYTES, *(b + "</w>" for b in BYTES), *("".join(m) for m in merges), "<|startoftext|>",
              "<|endoftext|>"]
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    return str(folder)


def clip_peer(quick=True, eps=1e-5, heads=2, projection=24):
    tower = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=heads,
                 layer_norm_eps=eps, hidden_act="quick_gelu" if quick else "gelu")
    text = dict(**tower, vocab_size=VOCAB, max_position_embeddings=48, eos_token_id=VOCAB - 1)
    text["num_attention_heads"] = 2
    cfg = transformers.CLIPConfig(
        text_config=text, vision_config=dict(**tower, image_size=32, patch_size=8), projection_dim=projection,
        attn_implementation="sdpa")  # the eager one takes its softmax in fp32
    return randomize(transformers.CLIPModel(cfg)).double().eval()


def image_features(peer):
    return lambda x: peer.visual_projection(peer.vision_model(x).pooler_output)


@pytest.mark.parametrize("heads, quick", [(2, True), (2, False), (4, False)])
def test_clip_image_tower_equals_transformers(heads, quick, tmp_path):
    theirs = clip_peer(quick, heads=heads)
    path = save(tmp_path, theirs.state_dict())
    ours = towers.load_clip(path, None, quick, heads=heads, dtype=F64).vision
    kept = {k: v for k, v in theirs.state_dict().items() if k.startswith("vis")}
    assert same(ours.state_dict(), kept)  # every key once, and back by the same names
    x, peer = pixels(32), image_features(theirs)
    assert agree(ours, peer, x) < TOLERANCE
    # what must not pass
    assert agree(ours, image_features(clip_peer(not quick, heads=heads)), x) > TOLERANCE
    assert agree(ours, image_features(clip_peer(quick, eps=1e-6, heads=heads)), x) > TOLERANCE
    assert agree(ours, image_features(clip_peer(quick, heads=8 // heads)), x) > TOLERANCE
    m = theirs.vision_model
    assert agree(ours, lambda x: theirs.visual_projection(  # another pooling
        m.post_layernorm(m(x).last_hidden_state[:, 1])), x) > TOLERANCE
    m.pre_layrnorm = nn.Identity()
    assert agree(ours, peer, x) > TOLERANCE


class OpenClipBlock(nn.Module):
    """open_clip's residual block: torch's own MultiheadAttention makes the names of its in_proj."""

    def __init__(self, width, heads, hidden):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, hidden), "c_proj": nn.Linear(hidden, width)})

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


def open_clip_tower(width, heads, hidden):
    blocks = nn.ModuleList(OpenClipBlock(width, heads, hidden) for _ in range(2))
    return nn.ModuleDict({"resblocks": blocks})


class OpenClip(nn.Module):
    def __init__(self, width=128, heads=2, hidden=512, out=24):
        super().__init__()
        self.visual = v = nn.Module()
        v.class_embedding = nn.Parameter(torch.randn(width))
        v.positional_embedding = nn.Parameter(torch.randn(17, width))
        v.conv1 = nn.Conv2d(3, width, 8, 8, bias=False)
        v.ln_pre, v.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        v.transformer = open_clip_tower(width, heads, hidden)
        v.proj = nn.Parameter(torch.randn(width, out))
        self.token_embedding = nn.Embedding(VOCAB, width)
        self.positional_embedding = nn.Parameter(torch.randn(48, width))
        self.transformer = open_clip_tower(width, heads, hidden)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, out))
        self.logit_scale = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("attn_mask", torch.full((48, 48), -math.inf).triu(1))

    def encode_image(self, x):
        v = self.visual
        x = v.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding
        x = v.ln_pre(x)
        for block in v.transformer["resblocks"]:
            x = block(x)
        return v.ln_post(x[:, 0]) @ v.proj

    def encode_text(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding
        for block in self.transformer["resblocks"]:
            x = block(x, self.attn_mask)
        return self.ln_final(x)[torch.arange(len(ids)), ids.argmax(1)] @ self.text_projection


@pytest.mark.parametrize("nest", [lambda w: w, lambda w: {
    "state_dict": {f"module.{k}": v for k, v in w.items()}}])
def test_open_clip_names(nest, tmp_path, clip_words):
    """Both towers under OpenAI's and open_clip's names, flat and nested as HPSv2's file is."""
    theirs = randomize(OpenClip()).double().eval()
    published = {**theirs.state_dict(), "input_resolution": torch.tensor(224)}
    torch.save(nest(published), path := str(tmp_path / "open_clip.pt"))
    clip = towers.load_clip(path, clip_words, quick_gelu=False, dtype=F64)
    assert clip.logit_scale == theirs.logit_scale
    assert agree(clip.vision, theirs.encode_image, pixels(32)) < TOLERANCE
    weights = towers.clip_names(files.read_weights(path))
    assert weights.keys() == clip_peer().state_dict().keys()  # every key once
    ids = text_encoders.tokenize(clip.tokenizer, CAPTIONS)
    ids[:, 1:][(ids == VOCAB - 1)[:, :-1]] = 0  # open_clip pads with 0, which nothing reads
    text = F.normalize(theirs.encode_text(ids), dim=-1)
    assert (ids == 0).sum() > 3 and error(clip.text(CAPTIONS), text) < TOLERANCE
    # a swapped third must not pass
    swapped = dict(weights)
    q, k = (f"vision_model.encoder.layers.0.self_attn.{n}_proj.weight" for n in "qk")
    swapped[q], swapped[k] = weights[k], weights[q]
    wrong = towers.load_clip(save(tmp_path, swapped), None, False, dtype=F64)
    assert agree(wrong.vision, theirs.encode_image, pixels(32)) > TOLERANCE


####################################################################################################
# ImageReward
####################################################################################################

WORDS = ("the quick brown fox jump ##s ##ed over lazy dog a photo of red car ##pet un ##believ ##able cafe "
         "naive").split()


@pytest.fixture
def vocab(tmp_path):
    """A small vocab.txt: bert's special tokens elsewhere, words, letters, signs; not all."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    signs = list("!?.,:;'\"()[]#-_/&中文日本") + ["é", "ß", "я", "д", "##д", "ال", "🙂", "##🙂", "ı"]
    tokens = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *signs, *letters,
              *(f"##{c}" for c in letters), *WORDS]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(dict.fromkeys(tokens)) + "\n", encoding="utf-8")
    return str(path)


def strings(n, young):
    """n captions: words, accents in both Unicode forms, scripts, emoji, control characters, long words.

    young: also characters that no or only a late version of Unicode has.
    """
    r, old = random.Random(0), unicodedata.ucd_3_2_0
    odd = ["Café", "cafe\u0301", "naïve", "İstanbul", "ﬁne", "Straße", "ÉTÉ", "中文字", "日本語テキスト",
           "한국어", "العربية", "हिन्दी", "привет", "🙂", "👩\u200d👩\u200d👧",
           "🏳\ufe0f\u200d🌈", "e\u0301\u0327", "\u200b", "\u00a0", "\t", "\n", "\r",
           "\x00", "\x07", "\ufffd", "\u3000", "\u202e", "\ue000", "\u2028", "don't",
           "it's", "--", "...", "#hash", "##s", "x" * 101, "ab" * 60, "½", "²", "∑",
           "“q”", "C++", "3.14", "$5", "a_b", "𝒳", "ǅ", "ΑΣ", "O'Neil", "[", "]", "<b>",
           "~^`|"]

    def word():
        c = chr(r.choice([r.randrange(1, 0xd800), r.randrange(0xe000, 0x110000)]))
        known = old.category(c) == unicodedata.category(c) != "Cn"
        return r.choice([*odd, *WORDS, r.choice(WORDS).upper(), *([c] * 9 if known or young else [])])

    return ["".join(word() + r.choice(["", " ", " ", "  ", ", "])
                    for _ in range(r.choice([0, 1, 3, 8, 20, 80]))) for _ in range(n)]


def test_bert_tokenizer_equals_transformers(vocab):
    """The Python tokenizer that ImageReward was trained with, and transformers' present one."""
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    ours = rewards.bert_tokenizer(vocab, 35)
    size = len(Path(vocab).read_text(encoding="utf-8").splitlines())
    assert [ours.token_to_id(t) for t in ("[DEC]", "[ENC]")] == [size, size + 1]
    present = transformers.BertTokenizer.from_pretrained(str(Path(vocab).parent))
    for theirs, texts in ((BertTokenizerLegacy(vocab), strings(1000, False)), (present, strings(1000, True))):
        theirs.add_special_tokens({"bos_token": "[DEC]"})
        theirs.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
        rows = ours.encode_batch(texts)
        batch = theirs(texts, padding="max_length", truncation=True, max_length=35)
        wrong = [t for t, row, ids in zip(texts, rows, batch["input_ids"]) if row.ids != ids]
        assert not wrong, (len(wrong), wrong[0])
        assert [row.attention_mask for row in rows] == batch["attention_mask"]
        assert all(row.ids[0] == ours.token_to_id("[CLS]") and len(row.ids) == 35 for row in rows)
    # what must not pass: without lower case, without accents taken off
    from tokenizers import normalizers
    for wrong in (normalizers.BertNormalizer(lowercase=False), normalizers.Lowercase()):
        ours.normalizer = wrong
        assert [r.ids for r in ours.encode_batch(texts)] != batch["input_ids"]


def imagereward_file(cfg, tmp_path, prefix="", nest=lambda w: w):
    """A small ImageReward.pt as its training script saves it, and the network whose weights it holds."""
    net = randomize(rewards.PreferenceReward(cfg)).eval()
    weights = {**net.state_dict(), "blip.text_encoder.embeddings.position_ids": torch.arange(512)[None]}
    for name, width in (("vision", cfg.vit_width), ("text", cfg.txt_width)):
        part = f"blip.{name}_proj."
        weights |= {part + "weight": torch.ones(256, width), part + "bias": torch.ones(256)}
    path = tmp_path / "ImageReward.pt"
    torch.save(nest({prefix + k: v for k, v in weights.items()}), path)
    return str(path), net


def small_imagereward(vocab):
    words = len(Path(vocab).read_text(encoding="utf-8").splitlines())
    return rewards.RewardConfig(32, 8, 128, 2, 2, 64, 2, 1, 96, words + 2)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_imagereward_file_is_loaded_strictly(vocab, tmp_path, prefix):
    cfg = small_imagereward(vocab)
    path, net = imagereward_file(cfg, tmp_path, prefix)
    ours = rewards.load_imagereward(path, vocab)
    assert same(ours.state_dict(), net.state_dict())
    assert {**ours.arch, "tokenizer": ""} == net.arch  # sizes are read from the shapes
    assert not any(p.requires_grad for p in ours.parameters()) and not ours.training
    again = rewards.build_reward(ours.arch)  # as our own checkpoints are loaded
    assert again.tokenize(["a red car"])[0].tolist() == ours.tokenize(["a red car"])[0].tolist()

    for change, why in (({}, "missing"), ({"mlp.layers.9.weight": torch.ones(1)}, "not of ImageReward"),
                        ({"mlp.layers.7.bias": torch.ones(2)}, "is \\[2\\]")):
        weights = {**files.read_weights(path), **change}
        if not change:
            del weights["mlp.layers.0.bias"]
        with pytest.raises(SystemExit, match=f"error: .*w.safetensors: .*{why}"):
            rewards.load_imagereward(save(tmp_path, weights), vocab)
    Path(vocab).write_text(Path(vocab).read_text(encoding="utf-8") + "more\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="error: .*vocab.txt: .* tokens .* give"):
        rewards.load_imagereward(path, vocab)


BLIP_VISION = [("cls_token", "embeddings.class_embedding"), ("pos_embed", "embeddings.position_embedding"),
               ("patch_embed.proj", "embeddings.patch_embedding"), ("blocks.", "encoder.layers."),
               ("attn.qkv", "self_attn.qkv"), ("attn.proj", "self_attn.projection"),
               ("norm1.", "layer_norm1."), ("norm2.", "layer_norm2.")]


def blip_peer(net, vision_eps=1e-6, text_eps=1e-12):
    """transformers' two BLIP towers and a plain head, with the weights of `net`; every key used once."""
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    cfg, state = net.cfg, net.blip.state_dict()
    vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(
        hidden_size=cfg.vit_width, intermediate_size=4 * cfg.vit_width, num_hidden_layers=cfg.vit_depth,
        num_attention_heads=cfg.vit_heads, image_size=cfg.image_size, patch_size=cfg.patch,
        layer_norm_eps=vision_eps)).double().eval()
    text = BlipTextModel(transformers.BlipTextConfig(
        vocab_size=cfg.vocab, hidden_size=cfg.txt_width, encoder_hidden_size=cfg.vit_width,
        intermediate_size=cfg.txt_hidden, num_hidden_layers=cfg.txt_depth, num_attention_heads=cfg.txt_heads,
        max_position_embeddings=cfg.positions, layer_norm_eps=text_eps), add_pooling_layer=False)
    text.double().eval()
    for peer, part, table in ((vision, "visual_encoder.", BLIP_VISION), (text, "text_encoder.", [])):
        weights = {k.removeprefix(part): v for k, v in state.items() if k.startswith(part)}
        weights = {re.sub(r"^norm\.", "post_layernorm.", k): v for k, v in rename(weights, table).items()}
        peer.load_state_dict(weights)
    head = nn.Sequential(*(nn.Linear(a, b) for a, b in zip((cfg.txt_width, 1024, 128, 64, 16),
                                                           (1024, 128, 64, 16, 1)))).double()
    head.load_state_dict(rename(net.mlp.state_dict(), [
        ("layers.0", "0"), ("layers.2", "1"), ("layers.4", "2"), ("layers.6", "3"), ("layers.7", "4")]))

    def score(x, ids, attend):
        img = vision(x).last_hidden_state
        out = text(input_ids=ids, attention_mask=attend, encoder_hidden_states=img, is_decoder=False)
        raw = head(out.last_hidden_state[:, 0])[:, 0]
        return (raw - 0.16717362830052426) / 1.0333394966054072

    return score


def test_imagereward_equals_transformers(vocab, tmp_path):
    """Tokenizer, both towers, head and normalisation of a loaded file, and the gradient for the picture."""
    path, _ = imagereward_file(small_imagereward(vocab), tmp_path)
    net = rewards.load_imagereward(path, vocab, dtype=F64)
    captions = ["a photo of the lazy dog", "", "red carpet, unbelievable cafe " * 9]
    ids, attend = net.tokenize(captions)
    assert attend.sum(1).tolist()[1:] == [2, 35]

    def ours(x, ids=ids, attend=attend):
        txt = net.blip["text_encoder"](ids, attend, net.blip["visual_encoder"](x))
        return (net.mlp(txt[:, 0])[:, 0] - net.score_mean) / net.score_std

    x = pixels(32, 3)
    peer = blip_peer(net)
    assert agree(ours, lambda x: peer(x, ids, attend), x) < TOLERANCE
    # what must not pass
    for wrong in (blip_peer(net, vision_eps=1e-5), blip_peer(net, text_eps=1e-6)):
        assert agree(ours, lambda x: wrong(x, ids, attend), x) > TOLERANCE
    first = ids.clone()
    first[:, 0] = net.tokenizer.token_to_id("[ENC]")  # BLIP's matching head does so, ImageReward does not
    assert agree(ours, lambda x: peer(x, first, attend), x) > TOLERANCE
    assert agree(ours, lambda x: peer(x, ids, torch.ones_like(attend)), x) > TOLERANCE

    # from pictures in [-1, 1], in fp32
    single = rewards.load_imagereward(path, vocab)
    image = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        a = single.normalised(image, ids, attend)
        b = peer(towers.prepare(image.double(), towers.Prep(32, 32)), ids, attend)
    assert error(a, b) < 1e-4


####################################################################################################
# Pictures
####################################################################################################

SIZES = [(224, 224), (227, 224), (224, 227), (500, 333), (333, 500), (97, 301), (1024, 577), (225, 641),
         (31, 57)]


@pytest.mark.parametrize("size", SIZES)
def test_pictures_equal_clip_image_processor(size):
    theirs = transformers.CLIPImageProcessorPil()
    p = picture(*size)
    expected = theirs(p, return_tensors="pt")["pixel_values"]
    ours = towers.prepare_pictures([p], towers.PICKSCORE_PREP)
    assert ours.dtype == torch.float32 and (ours - expected).abs().max() < 1e-6
    # torchvision's centre, where it differs: half pixels are rounded to even, here 1.5 -> 2
    shifted = (towers.prepare_pictures([p], towers.CLIP_PREP) - expected).abs().max() > 0.1
    h, w, top, left = towers.placed(towers.CLIP_PREP, *size)
    assert shifted == ((top, left) != towers.placed(towers.PICKSCORE_PREP, *size)[2:])
    assert shifted == (size in [(227, 224), (224, 227), (97, 301), (31, 57)])


def test_placing():
    """Sizes and crops as torchvision's Resize and CenterCrop give them: the long side is cut, not rounded."""
    assert towers.placed(towers.CLIP_PREP, 500, 333) == (336, 224, 56, 0)  # 336.3
    assert towers.placed(towers.CLIP_PREP, 333, 499) == (224, 335, 0, 56)  # 335.7; 55.5 -> 56
    assert towers.placed(towers.PICKSCORE_PREP, 333, 499) == (224, 335, 0, 55)
    assert towers.placed(towers.DINO_PREP, 600, 600) == (256, 256, 16, 16)
    assert towers.placed(towers.HPS_PREP, 300, 600) == (112, 224, -56, 0)
    assert towers.placed(towers.IP2P_PREP, 300, 600) == (224, 224, 0, 0)


PREPS = {"clip": towers.CLIP_PREP, "pickscore": towers.PICKSCORE_PREP, "hps": towers.HPS_PREP,
         "dino": towers.DINO_PREP}


@pytest.mark.parametrize("size", [(300, 401), (129, 64), (224, 224)])
@pytest.mark.parametrize("prep", PREPS.values(), ids=PREPS)
def test_differentiable_preparation_equals_pil(prep, size):
    """Up to the 8 bits that PIL rounds to twice, once for each direction."""
    ramp = torch.linspace(0.2, 0.8, size[0])[:, None] * torch.linspace(0.3, 1, size[1])  # no overshoot
    p = Image.fromarray((ramp[..., None].repeat(1, 1, 3) * 255).byte().numpy())
    pil, x = towers.prepare_pictures([p], prep), as_tensor(p).requires_grad_()
    ours = towers.prepare(x, prep)
    assert ours.shape == pil.shape == (1, 3, 224, 224)
    inside = slice(None) if prep.fit == "crop" else slice(115, 120)  # an edge to padding overshoots
    assert (ours - pil)[..., inside, inside].abs().max() < 1.5 / 255 / min(prep.std)
    ours.sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0


def test_padding_and_squares():
    p = Image.new("RGB", (448, 224), (255, 0, 0))
    x = towers.prepare_pictures([p], towers.HPS_PREP)
    black = (0 - torch.tensor(towers.CLIP_MEAN)) / torch.tensor(towers.CLIP_STD)
    assert torch.allclose(x[0, :, 10, 10], black) and torch.allclose(x[0, 1:, 112, 100], black[1:])
    assert torch.allclose(x, towers.prepare(as_tensor(p).float(), towers.HPS_PREP), atol=1e-5)
    y = as_tensor(picture(300, 500))
    expected = F.interpolate((y + 1) / 2, (224, 224), mode="bicubic", align_corners=False)  # IP2P's
    mean, std = (y.new_tensor(v)[:, None, None] for v in (towers.CLIP_MEAN, towers.CLIP_STD))
    expected = (expected - mean) / std
    assert (towers.prepare(y, towers.IP2P_PREP) - expected).abs().max() < TOLERANCE
    p = picture(300, 500)  # both of these resize tensors: nothing is rounded to 8 bits
    for prep in (towers.IP2P_PREP, towers.HPS_PREP):
        exact = towers.prepare(as_tensor(p), prep)
        assert (towers.prepare_pictures([p], prep) - exact).abs().max() < 1e-3  # 8 bits: 1.5e-2
    other = towers.prepare(y, replace(towers.IP2P_PREP, antialias=True))
    assert (other - expected).abs().max() > 0.1
    modes = [Image.new("L", (30, 20), 7), Image.new("RGBA", (9, 99))]
    modes = towers.prepare_pictures(modes, towers.CLIP_PREP)
    assert modes.shape == (2, 3, 224, 224)


####################################################################################################
# Rewards and judges
####################################################################################################

TINY = towers.Prep(32, 32)


@pytest.fixture
def clip_pair(tmp_path, clip_words):
    theirs = clip_peer()
    return towers.load_clip(save(tmp_path, theirs.state_dict()), clip_words, True, TINY, dtype=F64), theirs


def peer_text(clip, theirs, captions):
    ids = text_encoders.tokenize(clip.tokenizer, captions)
    return theirs.text_projection(theirs.text_model(ids).pooler_output).detach()



def test_scores_equal_transformers(clip_pair):
    clip, theirs = clip_pair
    x = torch.rand(3, 3, 32, 32, dtype=F64, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def logits(x):
        ids = text_encoders.tokenize(clip.tokenizer, CAPTIONS)
        out = theirs(input_ids=ids, pixel_values=towers.prepare(x, TINY))
        return out.logits_per_image.diagonal()

    assert agree(lambda x: rewards.pickscore(clip, x, CAPTIONS), logits, x) < TOLERANCE
    cosine = rewards.clip_cosine(clip, x, CAPTIONS)
    scale = theirs.logit_scale.detach().exp()
    assert error(cosine, logits(x) / scale) < TOLERANCE and cosine.shape == (3,)
    # what must not pass: captions of other pictures
    assert error(rewards.clip_cosine(clip, x, CAPTIONS[::-1]), logits(x) / scale) > TOLERANCE


def test_scores_take_pil_pictures(clip_pair):
    """The same function is a reward on tensors and a metric on PIL pictures."""
    clip = clip_pair[0]
    pictures = [picture(32, 32, seed) for seed in range(3)]
    a = rewards.clip_cosine(clip, pictures, CAPTIONS)
    b = rewards.clip_cosine(clip, torch.cat([as_tensor(p) for p in pictures]), CAPTIONS)
    assert (a - b).abs().max() < 1e-6
    c = rewards.clip_cosine(clip, [picture(40, 70), *pictures[1:]], CAPTIONS)
    assert c[1:].tolist() == a[1:].tolist()


def test_direction_and_similarity(clip_pair):
    clip, theirs = clip_pair
    g = torch.Generator().manual_seed(1)
    source, edited = (torch.rand(3, 3, 32, 32, dtype=F64, generator=g) * 2 - 1 for _ in range(2))

    def embed(x):
        y = image_features(theirs)(towers.prepare(x, TINY))
        return y / y.norm(dim=-1, keepdim=True)

    def embed_text(captions):
        y = peer_text(clip, theirs, captions)
        return y / y.norm(dim=-1, keepdim=True)

    after = ["a blue car", "the lazy dog sleeps", "two cafes"]

    def direction(x):
        d, t = embed(x) - embed(source), embed_text(after[:2] + ["a"]) - embed_text(CAPTIONS)
        return (d * t).sum(-1) / d.norm(dim=-1) / t.norm(dim=-1)

    ours = lambda x: rewards.clip_direction(clip, source, x, CAPTIONS, after[:2] + ["a"])  # noqa: E731
    assert agree(ours, direction, edited) < TOLERANCE
    score = rewards.clip_direction(clip, source, edited, CAPTIONS, after)
    assert score.isnan().tolist() == [False, False, True]  # equal captions have no direction
    assert agree(lambda x: rewards.clip_similarity(clip, source, x),
                 lambda x: (embed(x) * embed(source)).sum(-1), edited) < TOLERANCE


def test_aesthetic_head(clip_pair, tmp_path):
    clip, theirs = clip_pair
    published = randomize(rewards.RewardHead(24))
    path = save(tmp_path, published.state_dict(), "head.pth")
    head = rewards.load_aesthetic_head(path, dtype=F64)
    x = torch.rand(2, 3, 32, 32, dtype=F64) * 2 - 1

    def peer(x, unit=True):
        y = image_features(theirs)(towers.prepare(x, TINY))
        y = y / y.norm(dim=-1, keepdim=True) if unit else y
        for i in (0, 2, 4, 6, 7):
            y = y @ published.layers[i].weight.double().T + published.layers[i].bias.double()
        return y[:, 0]

    def ours(x):
        return rewards.aesthetic_score(head, clip, x)

    assert agree(ours, peer, x) < TOLERANCE
    assert agree(ours, lambda x: peer(x, unit=False), x) > TOLERANCE


####################################################################################################
# Files
####################################################################################################


class Bomb:
    def __reduce__(self):
        return print, ("executed",)


def test_bad_files(tmp_path, capsys):
    good = randomize(towers.Dino(4, 8, 128, 1, 2, scaled=False, registers=0)).state_dict()
    whole = Path(save(tmp_path, good))
    cases = {"cut.safetensors": whole.read_bytes()[:-100], "empty.safetensors": b"", "empty.pt": b"",
             "text.pt": b"not weights"}
    for name, raw in cases.items():
        (tmp_path / name).write_bytes(raw)
    torch.save({"a": Bomb()}, tmp_path / "bomb.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    save(tmp_path, {"x": torch.ones(1)}, "other.safetensors")
    save(tmp_path, {**good, "norm.bias": torch.ones(128, dtype=torch.int8)}, "int8.safetensors")
    for name in (*cases, "bomb.pt", "list.pt", "numbers.pt", "other.safetensors", "int8.safetensors",
                 "absent.pt"):
        with pytest.raises(SystemExit) as e:
            towers.load_dino(str(tmp_path / name))
        line = str(e.value)
        assert line.startswith("error: ") and name in line and "\n" not in line and "give" in line, line
        assert "weights_only" not in line and "option" not in line  # torch's advice is to execute the file
    assert "executed" not in capsys.readouterr().out


def test_torchscript_is_a_program(tmp_path, recwarn):
    """As OpenAI publishes CLIP, and NVIDIA FID's Inception: not run, and said so."""
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), str(tmp_path / "ViT-B-32.pt"))
    recwarn.clear()
    with pytest.raises(SystemExit, match="error: .*ViT-B-32.pt: cannot be read .a TorchScript program"):
        files.read_weights(str(tmp_path / "ViT-B-32.pt"))
    assert not recwarn


def test_half_precision_files_and_folders(tmp_path, clip_words):
    """fp16 files are widened; a folder is transformers' with model.safetensors in it."""
    theirs = clip_peer()
    (tmp_path / "folder").mkdir()
    save(tmp_path / "folder", {k: v.half() for k, v in theirs.state_dict().items()}, "model.safetensors")
    clip = towers.load_clip(str(tmp_path / "folder"), clip_words, quick_gelu=True)
    assert {p.dtype for p in clip.parameters()} == {torch.float32}
    assert clip.prep.size == 32  # read from the shapes, as a ViT-L/14@336 is
    half = towers.load_clip(str(tmp_path / "folder"), clip_words, quick_gelu=True, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    a, b = (rewards.pickscore(c, pixels(32).float().clamp(-1, 1), CAPTIONS[:2]) for c in (clip, half))
    assert a.dtype == b.dtype == torch.float32 and 0 < (a - b).abs().max() < 0.2
    (Path(clip_words) / "merges.txt").write_text("#version: 0.2\n")
    (Path(clip_words) / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1}))
    with pytest.raises(SystemExit, match="error: .*tokenizer: 2 tokens, but .* give"):
        towers.load_clip(str(tmp_path / "folder"), clip_words, quick_gelu=True)


def test_rewards_by_name(tmp_path, vocab, clip_words):
    """Each name opens its network with its own preparation, and is differentiable in pictures of any size."""
    clip = save(tmp_path, clip_peer().state_dict(), "clip.safetensors")
    head = save(tmp_path, randomize(rewards.RewardHead(24)).state_dict(), "head.pth")
    specs = {"imagereward": f"{imagereward_file(small_imagereward(vocab), tmp_path)[0]},{vocab}",
             "clipscore": f"{clip},{clip_words}", "pickscore": f"{clip},{clip_words}",
             "hpsv2": f"{clip},{clip_words}", "aesthetic": f"{head},{clip}"}
    assert tuple(specs) == rewards.PUBLISHED
    x, scores = torch.rand(3, 3, 41, 57) * 2 - 1, {}
    for name, paths in specs.items():
        score = rewards.open_reward(f"{name}:{paths}")
        image = x.clone().requires_grad_()
        scores[name] = score(image, CAPTIONS)
        scores[name].sum().backward()
        assert scores[name].shape == (3,) and image.grad.abs().amax((1, 2, 3)).min() > 0
    assert (scores["pickscore"] / scores["clipscore"]).std() > 1e-4  # GELU, not quick-GELU
    for spec in ("clipscore:a", "nothing:a,b", "hpsv2:a,"):
        with pytest.raises(SystemExit, match="error: reward: .*NAME:PATH,PATH"):
            rewards.open_reward(spec)


def test_imagereward_takes_pictures_of_any_size(tmp_path, vocab):
    """Resized as published: the long side cut, the half pixel to even."""
    net = rewards.load_imagereward(imagereward_file(small_imagereward(vocab), tmp_path)[0], vocab)
    x = torch.rand(3, 3, 41, 59) * 2 - 1
    side = net.cfg.image_size
    ids, attend = net.tokenize(CAPTIONS)
    with torch.no_grad():
        a = rewards.imagereward(net, x, CAPTIONS)
        b = blip_peer(net)(towers.prepare(x.double(), towers.Prep(side, side)), ids, attend)
    assert error(a, b) < 1e-4
    assert towers.placed(towers.Prep(side, side), 41, 59) == (32, 46, 0, 7)


def test_blip_weights(tmp_path):
    """BLIP's model_large.pth: what ImageReward starts from, without momentum copies, decoder and queues."""
    net = randomize(rewards.PreferenceReward(rewards.REWARD_PRESETS["test"]))
    own = {k.removeprefix("blip."): v for k, v in net.state_dict().items() if k.startswith("blip.")}
    rest = {"visual_encoder_m.cls_token": torch.ones(1), "text_decoder.cls.predictions.bias": torch.ones(2),
            "text_encoder.embeddings.position_ids": torch.arange(9)[None], "temp": torch.ones(()),
            "itm_head.weight": torch.ones(2, 2), "image_queue": torch.ones(2, 2)}
    torch.save({"model": {**own, **rest}, "epoch": 19}, tmp_path / "model_large.pth")
    weights = rewards.blip_weights(str(tmp_path / "model_large.pth"))
    missing, unknown = net.load_state_dict(weights, strict=False)
    assert not unknown and all(k.startswith("mlp.") for k in missing)
    torch.save({"model": rest}, tmp_path / "model_large.pth")
    with pytest.raises(SystemExit, match="error: .*model_large.pth: .*give"):
        rewards.blip_weights(str(tmp_path / "model_large.pth"))


def test_convert_command(tmp_path, vocab):
    path, net = imagereward_file(small_imagereward(vocab), tmp_path, "module.")
    out = str(tmp_path / "ImageReward.safetensors")
    done = run_script(Path(sd3.__file__).with_name("__main__.py"), "convert", path, out)
    assert done.returncode == 0, done.stderr
    assert same(rewards.load_imagereward(out, vocab).state_dict(), net.state_dict())
    bad = run_script(Path(sd3.__file__).with_name("__main__.py"), "convert", path, path)
    assert bad.returncode == 1 and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1


def test_published_sizes():
    """Parameter counts of the published networks, built from their shapes alone."""
    with torch.device("meta"):
        nets = {"dino_vits16": towers.Dino(14, 16, 384, 12, 6, False, 0),
                "dino_vitb8": towers.Dino(28, 8, 768, 12, 12, False, 0),
                "dinov2_vitb14": towers.Dino(37, 14, 768, 12, 12, True, 0),
                "clip_b32": towers.ClipVision(7, 32, 768, 12, 12, 3072, 512, True),
                "clip_l14": towers.ClipVision(16, 14, 1024, 24, 16, 4096, 768, True),
                "clip_h14": towers.ClipVision(16, 14, 1280, 32, 16, 5120, 1024, False)}
    sizes = {k: sum(p.numel() for p in net.parameters()) for k, net in nets.items()}
    assert sizes == {"dino_vits16": 21_665_664, "dino_vitb8": 85_807_872, "dinov2_vitb14": 86_579_712,
                     "clip_b32": 87_849_216, "clip_l14": 303_966_208, "clip_h14": 632_076_800}
