"""SD3's text encoders: equal to transformers' and to diffusers' encode_prompt in float64; tokenizers."""

import hashlib
import json
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from pretrained import text as text_encoders
from pretrained.files import PARTS
from pretrained.text import CLIP_G, CLIP_L, T5_XXL, ClipText, SD3Text, T5Config, T5Encoder

TOLERANCE = 1e-11  # of the largest output; a correct float64 copy reaches 1e-14
WORDS = r"""a photo of the red cat's old house isn't there, 12 dogs & 3,000 birds (blurry) they're we'll I'm
Straße façade naïve ÅNGSTRÖM İstanbul ΣΊΣΥΦΟΣ привет мир 你好 世界 日本語 한국어 हिन्दी ไทย مرحبا שלום ﬁn ½ ①
🙂 👩‍👩‍👧‍👦 🇨🇭 👍🏽 ✈️ Ⅻ ａｂｃ - -- ... ?! # @user http://x.y/z_1 C++ \ " '' ''' under_scored CamelCase 3.14
1e-5 £5 €6 ! wow! !! <|startoftext|> <|endoftext|> <|ENDOFTEXT|> </s> <pad> <extra_id_0>""".split()
WORDS += ["cafe\u0301", "\u200b", "\u00ad"]


def strings(n=1000, seed=0):
    rng = random.Random(seed)
    out = ["", " ", "\n\t", "é", "e\u0301", "a  b\u00a0\u3000c", "x" * 3000, "word " * 400, "\x00\U0010ffff"]
    while len(out) < n:
        space = rng.choice([" ", " ", "", "  ", "\n", "\t ", "\u2003"])
        text = space.join(rng.choices(WORDS, k=rng.choice([1, 3, 8, 20, 120])))
        if rng.random() < 0.2:  # any characters at all, but halves of pairs
            text += "".join(chr(rng.choice([rng.randrange(1, 0xd800), rng.randrange(0xe000, 0x110000)]))
                            for _ in range(12))
        out.append(rng.choice([text, text, text.upper(), text.title()]))
    return out


PLAIN = [s for s in strings(600) if "!" not in s]


def error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def randomize(net, seed=0):
    """Random weights that keep activations near 1, with norms that do something; float64, frozen."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            r = torch.randn(p.shape, generator=g, dtype=torch.float64)
            if p.ndim == 1:
                p.copy_(0.2 * r + ("norm" in name and name.endswith("weight")))
            else:
                p.copy_(r if "embed" in name or "relative" in name else 2 * r * p[0].numel() ** -0.5)
    return net.double().requires_grad_(False)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return small_tokenizers(tmp_path_factory.mktemp("tokenizers"))


def small_tokenizers(folder):
    """-> a folder with vocab.json and merges.txt as CLIP's and a tokenizer.json as T5's, both small."""
    folder.mkdir(exist_ok=True)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(text_encoders.CLIP_WORDS), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(vocab_size=900, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(strings(300, seed=7), trainer)
    merges = [m if isinstance(m, list) else m.split(" ") for m in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())  # "!" is the first, as in CLIP's vocabulary
    order = symbols + [s + "</w>" for s in symbols] + [a + b for a, b in merges]
    order += [text_encoders.CLIP_BOS, text_encoders.CLIP_EOS]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(order))}
    assert vocab["!"] == 0 and len(merges) > 200
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))

    t5 = Tokenizer(models.Unigram())
    t5.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)])
    t5.train_from_iterator([" ".join(WORDS)] * 20, trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    t5.add_special_tokens([f"<extra_id_{i}>" for i in range(99, -1, -1)])
    t5.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    t5.save(str(folder / "tokenizer.json"))
    return folder


####################################################################################################
# Tokenizers
####################################################################################################


def theirs_clip(files, pad):
    transformers = pytest.importorskip("transformers")
    return transformers.CLIPTokenizer(str(files / "vocab.json"), str(files / "merges.txt"), pad_token=pad)


def theirs_t5(files):
    transformers = pytest.importorskip("transformers")
    return transformers.T5Tokenizer.from_pretrained(str(files))


def ids_of(tokenizer, texts, length):
    rows = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return rows.input_ids


def test_clip_tokens_equal_transformers(files):
    texts = strings()
    ours = text_encoders.tokenize(text_encoders.clip_tokenizer(str(files)), texts)
    right = ids_of(theirs_clip(files, text_encoders.CLIP_EOS), texts, 77)
    assert ours.shape == (1000, 77) and torch.equal(ours, right)
    bos, eos = len(json.loads((files / "vocab.json").read_text())) - 2, ours.max()
    assert (ours[:, 0] == bos).all() and ours[0].tolist() == [bos] + [eos] * 76
    assert ours[7, 76] == eos and (ours[7, 1:76] < bos).all()                                # long text: cut
    assert 0.1 < (ours[:, 76] != eos).logical_or(ours[:, 75] != eos).float().mean() < 0.9


def test_clip_g_pads_with_zero_and_a_typed_exclamation_mark_is_no_padding(files):
    """diffusers makes "!" a special token to pad with; OpenCLIP, which SD3 was trained with, does not."""
    tokenizer = text_encoders.clip_tokenizer(str(files), pad=0)
    assert torch.equal(text_encoders.tokenize(tokenizer, PLAIN), ids_of(theirs_clip(files, "!"), PLAIN, 77))
    (marked,) = text_encoders.tokenize(tokenizer, ["x! y"])
    vocab = json.loads((files / "vocab.json").read_text())
    assert marked[2] == vocab["!</w>"] and (marked[5:] == 0).all() and (marked[:5] > 0).all()
    bare = text_encoders.clip_tokenizer(str(files))
    bare.no_padding()
    for text, ids in zip(strings(100), text_encoders.tokenize(tokenizer, strings(100)).tolist()):
        kept = bare.encode(text).ids
        assert ids == kept + [0] * (77 - len(kept))


@pytest.mark.parametrize("damage", ["normalizer", "pre_tokenizer", "pad", "length"])
def test_the_clip_comparison_notices(files, damage):
    tokenizer = text_encoders.clip_tokenizer(str(files))
    if damage == "normalizer":
        tokenizer.normalizer = normalizers.Lowercase()  # no NFC
    elif damage == "pre_tokenizer":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif damage == "pad":
        tokenizer.enable_padding(length=77, pad_id=0)
    else:
        tokenizer.enable_truncation(76)
    right = ids_of(theirs_clip(files, text_encoders.CLIP_EOS), strings(), 77)
    assert not torch.equal(text_encoders.tokenize(tokenizer, strings()), right)


@pytest.mark.parametrize("length", [77, 256])
def test_t5_tokens_equal_transformers(files, length):
    texts = strings()
    ours = text_encoders.tokenize(text_encoders.t5_tokenizer(str(files), length), texts)
    right = ids_of(theirs_t5(files), texts, length)
    assert torch.equal(ours, right)
    assert ours[0].tolist() == [1] + [0] * (length - 1) and ours[7, -1] == 1
    cut = text_encoders.t5_tokenizer(str(files / "tokenizer.json"), length)
    cut.post_processor = processors.TemplateProcessing(single=["$A"], special_tokens=[])
    assert not torch.equal(text_encoders.tokenize(cut, texts), right)


def test_settings_in_the_file_do_not_count(files, tmp_path):
    other = Tokenizer.from_file(str(files / "tokenizer.json"))
    other.enable_truncation(5)
    other.enable_padding(length=9, pad_id=3)
    other.save(str(tmp_path / "tokenizer.json"))
    a, b = (text_encoders.tokenize(text_encoders.t5_tokenizer(str(p), 20), PLAIN) for p in (files, tmp_path))
    assert torch.equal(a, b)


def test_files_that_are_none(files, tmp_path):
    with pytest.raises(SystemExit, match="error: .*vocab.json: no such file"):
        text_encoders.clip_tokenizer(str(tmp_path))
    with pytest.raises(SystemExit, match="error: .*no such tokenizer.json"):
        text_encoders.t5_tokenizer(str(tmp_path), 77)
    with pytest.raises(SystemExit, match="error: .*spiece.model is not read"):
        text_encoders.t5_tokenizer(str(tmp_path / "spiece.model"), 77)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(SystemExit, match="error: .*cannot be read"):
        text_encoders.clip_tokenizer(str(tmp_path))
    (tmp_path / "vocab.json").write_text('{"a": 0, "<|endoftext|>": 1}')
    with pytest.raises(SystemExit, match="error: .*vocab.json: has no <|startoftext|>"):
        text_encoders.clip_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SystemExit, match="error: .*tokenizer.json: cannot be read"):
        text_encoders.t5_tokenizer(str(tmp_path), 77)
    Tokenizer(models.Unigram([("a", 0.0)])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(SystemExit, match="error: .*tokenizer.json: has no <pad>"):
        text_encoders.t5_tokenizer(str(tmp_path), 77)


####################################################################################################
# CLIP
####################################################################################################

SMALL_L = replace(CLIP_L, width=64, heads=4, layers=3, vocab=300, eos=299)
SMALL_G = replace(CLIP_G, width=96, heads=3, layers=4, vocab=300, eos=299, project=96)
CLIPS = {"clip_l": SMALL_L, "clip_g": SMALL_G}


def clip_twin(cfg, seed=0):
    """-> (ours, theirs), float64, equal random weights, every key used once."""
    transformers = pytest.importorskip("transformers")
    ours = randomize(ClipText(cfg), seed)
    theirs = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(
        vocab_size=cfg.vocab, hidden_size=cfg.width, intermediate_size=4 * cfg.width,
        num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads, max_position_embeddings=cfg.length,
        hidden_act="quick_gelu" if cfg.quick_gelu else "gelu", projection_dim=cfg.project or cfg.width,
        eos_token_id=cfg.eos, bos_token_id=cfg.eos - 1, pad_token_id=0)).double().eval()
    weights = dict(ours.state_dict())
    if not cfg.project:
        weights["text_projection.weight"] = torch.eye(cfg.width)
    theirs.load_state_dict(weights, strict=True)
    return ours, theirs.requires_grad_(False)


def clip_ids(cfg, pad, seed=0):
    """[B, 77]: texts of 0, 5 and 75 tokens."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, cfg.eos - 1, (3, 77), generator=g)
    ids[:, 0] = cfg.eos - 1
    for row, n in zip(ids, (0, 5, 75)):
        row[n + 1] = cfg.eos
        row[n + 2:] = pad
    return ids


def clip_errors(ours, theirs, ids, layer=-2, **mask):
    out = theirs(ids, output_hidden_states=True, **mask)
    hidden, pooled = ours(ids)
    assert hidden.abs().max() > 1 and pooled.abs().max() > 1
    return error(hidden, out.hidden_states[layer]), error(pooled, out.text_embeds)


@pytest.mark.parametrize("name", CLIPS)
def test_clip_equals_transformers(name):
    cfg = CLIPS[name]
    ours, theirs = clip_twin(cfg)
    for pad in (0, cfg.eos):
        assert max(clip_errors(ours, theirs, clip_ids(cfg, pad))) < TOLERANCE


def layernorm_eps(ours):
    for m in ours.modules():
        if isinstance(m, torch.nn.LayerNorm):
            m.eps = 1e-6


def other_gelu(ours):
    for m in ours.modules():
        if hasattr(m, "quick_gelu"):
            m.quick_gelu = not m.quick_gelu


def not_causal(ours):
    for m in ours.modules():
        if hasattr(m, "causal"):
            m.causal = False


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("damage", [layernorm_eps, other_gelu, not_causal])
def test_the_clip_parity_notices(name, damage):
    """LayerNorm's epsilon moves the output by 1e-6 only."""
    ours, theirs = clip_twin(CLIPS[name])
    damage(ours)
    assert min(clip_errors(ours, theirs, clip_ids(CLIPS[name], 0))) > 1e4 * TOLERANCE


def test_the_clip_parity_notices_what_only_one_output_shows():
    ours, theirs = clip_twin(SMALL_G)
    ids = clip_ids(SMALL_G, 0)
    for layer in (-1, -3):
        assert clip_errors(ours, theirs, ids, layer)[0] > 0.1
    assert error(ours.text_model["final_layer_norm"](ours(ids)[0]), ours(ids)[0]) > 0.1
    hidden, pooled = clip_errors(ours, theirs, ids, attention_mask=(ids != 0).long())
    assert hidden > 0.1 and pooled < TOLERANCE  # causal: what comes after [EOS] cannot change it
    ours.text_projection.weight.copy_(ours.text_projection.weight.T.clone())  # square: no shape tells
    hidden, pooled = clip_errors(ours, theirs, ids)
    assert hidden < TOLERANCE and pooled > 0.1
    ours.text_projection.weight.copy_(ours.text_projection.weight.T.clone())
    ours.cfg = replace(SMALL_G, eos=0)  # pooled at the first padding
    assert clip_errors(ours, theirs, ids[:2])[1] > 0.1


KEYS = {  # keys, parameters, sha256 over the sorted lines "name:shape" of the published files
    "clip_l": (196, 123_060_480, "ed4018192bfcf961eb49fc6724e4af056740a54d83e47ded18cefc5cee80f3e8"),
    "clip_g": (517, 694_659_840, "4df29e6ec57b5775629e5a70ba193376104128f2885373d83627a7a4ba51aad2"),
    "t5xxl": (220, 4_762_310_656, "5e4bbc13122a75862d73dad81636ae492f3890e4045024896e5534df7304149d"),
}


@pytest.mark.parametrize("name", KEYS)
def test_names_and_shapes_of_the_published_files(name):
    keys, size, digest = KEYS[name]
    with torch.device("meta"):
        net = T5Encoder(T5_XXL) if name == "t5xxl" else ClipText({"clip_l": CLIP_L, "clip_g": CLIP_G}[name])
    lines = sorted(f"{k}:{list(v.shape)}" for k, v in net.state_dict().items())
    assert (len(lines), sum(p.numel() for p in net.parameters())) == (keys, size)
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest


####################################################################################################
# T5
####################################################################################################

SMALL_T5 = T5Config(width=192, heads=4, head_dim=24, layers=3, hidden=160, vocab=1000)


def fp64_rms(self, x):
    """transformers takes RMS statistics in fp32 even of fp64 input."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def t5_twin(monkeypatch, cfg=SMALL_T5, eps=1e-6):
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    if monkeypatch:
        monkeypatch.setattr(modeling.T5LayerNorm, "forward", fp64_rms)
    ours = randomize(T5Encoder(cfg))
    theirs = modeling.T5EncoderModel(modeling.T5Config(
        vocab_size=cfg.vocab, d_model=cfg.width, d_kv=cfg.head_dim, d_ff=cfg.hidden, num_layers=cfg.layers,
        num_heads=cfg.heads, feed_forward_proj="gated-gelu", layer_norm_epsilon=eps)).double().eval()
    assert set(theirs.state_dict()) == set(ours.state_dict())  # the embedding under both names
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs.requires_grad_(False)


def t5_ids(length, seed=0, cfg=SMALL_T5):
    ids = torch.randint(3, cfg.vocab, (2, length), generator=torch.Generator().manual_seed(seed))
    ids[0, length // 3:] = 0
    ids[0, length // 3] = 1
    return ids


def theirs_of(theirs, ids, **mask):
    return theirs(ids, **mask)[0]


@pytest.mark.parametrize("length", [1, 77, 300])
def test_t5_equals_transformers(monkeypatch, length):
    ours, theirs = t5_twin(monkeypatch)
    ids = t5_ids(length)
    assert ours(ids).shape == (2, length, 192) and ours(ids).abs().max() > 1
    assert error(ours(ids), theirs_of(theirs, ids)) < TOLERANCE


def exact_gelu(ours, monkeypatch):
    gelu = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x, approximate="none": gelu(x))


def scaled(ours, monkeypatch):
    for m in ours.modules():
        if isinstance(m, text_encoders.T5Attention):
            m.q.weight.mul_(24**-0.5)


def flipped(ours, monkeypatch):
    right = text_encoders.t5_buckets
    monkeypatch.setattr(text_encoders, "t5_buckets", lambda length: right(length).T.contiguous())


def one_direction(ours, monkeypatch):
    """The decoder's buckets: all 32 for what lies before."""
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    bucket = modeling.T5Attention._relative_position_bucket

    def buckets(length):
        places = torch.arange(length)
        return bucket(places[None] - places[:, None], bidirectional=False)
    monkeypatch.setattr(text_encoders, "t5_buckets", buckets)


@pytest.mark.parametrize("damage", [exact_gelu, scaled, flipped, one_direction])
def test_the_t5_parity_notices(monkeypatch, damage):
    ours, theirs = t5_twin(monkeypatch)
    right = theirs_of(theirs, t5_ids(77))
    damage(ours, monkeypatch)
    assert error(ours(t5_ids(77)), right) > 1e6 * TOLERANCE


def test_the_t5_parity_notices_epsilon_and_mask(monkeypatch):
    ours, theirs = t5_twin(monkeypatch, eps=1e-5)
    ids = t5_ids(77)
    assert error(ours(ids), theirs_of(theirs, ids)) > 1e4 * TOLERANCE
    ours, theirs = t5_twin(monkeypatch)
    assert error(ours(ids), theirs_of(theirs, ids, attention_mask=(ids != 0).long())) > 0.1


def test_t5_distances_equal_transformers():
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    places = torch.arange(700)
    right = modeling.T5Attention._relative_position_bucket(places[None, :] - places[:, None])
    assert torch.equal(text_encoders.t5_buckets(700), right)


def test_t5_in_16_bits(monkeypatch):
    """In fp16, where products pass 65,504, ours stays near fp32 as transformers does with its fp32 `wo`."""
    ours, theirs = t5_twin(None)
    weights = {k: v.float() * (3e4 if k.endswith("wo.weight") else 1) for k, v in ours.state_dict().items()}
    ours.float().load_state_dict(weights)
    ids = t5_ids(77)
    right = ours(ids)
    theirs.float().load_state_dict(weights)
    assert error(theirs_of(theirs, ids), right) < 1e-5
    for block in theirs.half().encoder.block:
        block.layer[1].DenseReluDense.wo.float()
    assert error(theirs_of(theirs, ids).float(), right) < 0.05
    half = ours.half()(ids)
    assert half.dtype == torch.float16 and error(half.float(), right) < 0.05
    monkeypatch.setattr(text_encoders.T5Gated, "forward", lambda self, x: self.wo(
        F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)))
    assert not ours(ids).isfinite().all()
    for net in (ours.bfloat16(), theirs.bfloat16()):
        net.load_state_dict(weights)
    a, b = ((y.float() - right).norm() for y in (ours(ids), theirs_of(theirs, ids)))
    assert a < b < 0.15 * right.norm()  # transformers adds up in bf16


def test_t5_embedding_is_stored_twice_and_held_once():
    net = T5Encoder(SMALL_T5)
    weights = {k: v.clone() for k, v in randomize(T5Encoder(SMALL_T5)).float().state_dict().items()}
    with torch.device("meta"):
        empty = T5Encoder(SMALL_T5)
    empty.load_state_dict(weights, strict=True, assign=True)
    assert empty.shared.weight is empty.encoder["embed_tokens"].weight
    net.load_state_dict(weights, strict=True)
    assert torch.equal(net(t5_ids(9)), empty(t5_ids(9)))


####################################################################################################
# What SD3 sees
####################################################################################################

PROMPTS = ["a photo of the red cat", "", "naïve 🙂 你好 " * 30, "Straße, 12 dogs & <|endoftext|> birds"]


@pytest.fixture(scope="module")
def sd3(files):
    """-> (ours, diffusers' pipeline) with one set of small encoders and the same files of tokenizers."""
    pipelines = pytest.importorskip("diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3")
    with pytest.MonkeyPatch.context() as patch:
        vocab = len(json.loads((files / "vocab.json").read_text()))
        clips = [clip_twin(replace(cfg, vocab=vocab, eos=vocab - 1), seed)
                 for seed, cfg in enumerate(CLIPS.values())]
        t5, their_t5 = t5_twin(patch)
        ours = SD3Text(clips[0][0], clips[1][0], t5, (
            text_encoders.clip_tokenizer(str(files)), text_encoders.clip_tokenizer(str(files), pad=0),
            text_encoders.t5_tokenizer(str(files), 77)))
        tokenizers = [theirs_clip(files, pad) for pad in (text_encoders.CLIP_EOS, "!")]
        for tokenizer in tokenizers:
            tokenizer.model_max_length = 77
        pipe = pipelines.StableDiffusion3Pipeline(
            transformer=None, scheduler=None, vae=None, text_encoder=clips[0][1],
            tokenizer=tokenizers[0], text_encoder_2=clips[1][1], tokenizer_2=tokenizers[1],
            text_encoder_3=their_t5, tokenizer_3=theirs_t5(files))
        yield ours, pipe


def their_encode(pipe, captions, length=77):
    txt, _, vec, _ = pipe.encode_prompt(captions, None, None, device=torch.device("cpu"),
                                        do_classifier_free_guidance=False, max_sequence_length=length)
    return txt, vec


def test_conditioning_equals_diffusers(sd3, files):
    ours, pipe = sd3
    txt, vec = ours.encode_text(PROMPTS)
    assert txt.shape == (4, 77 + 77, 192) and vec.shape == (4, 64 + 96)
    for a, b in zip((txt, vec), their_encode(pipe, PROMPTS)):
        assert error(a, b) < TOLERANCE
    assert (txt[:, :77, 160:] == 0).all() and (txt[:, 77:, 160:] != 0).all()
    long = SD3Text(ours.clip_l, ours.clip_g, ours.t5xxl,
                   (*ours.tokenizers[:2], text_encoders.t5_tokenizer(str(files), 256)))
    for a, b in zip(long.encode_text(PROMPTS), their_encode(pipe, PROMPTS, 256)):
        assert error(a, b) < TOLERANCE


def test_conditioning_without_t5_equals_diffusers(sd3, monkeypatch):
    ours, pipe = sd3
    transformer = torch.nn.Module()
    transformer.config = type("Config", (), {"joint_attention_dim": 192})
    monkeypatch.setattr(pipe, "text_encoder_3", None)
    monkeypatch.setattr(pipe, "transformer", transformer)
    blind = SD3Text(ours.clip_l, ours.clip_g, None, (*ours.tokenizers[:2], None), width=192)
    for a, b in zip(blind.encode_text(PROMPTS), their_encode(pipe, PROMPTS)):
        assert error(a, b) < TOLERANCE


def swapped_clips(ours, monkeypatch):
    right = text_encoders.sd3_conditioning
    monkeypatch.setattr(text_encoders, "sd3_conditioning", lambda a, b, t5: right(b, a, t5))


def t5_first(ours, monkeypatch):
    right = text_encoders.sd3_conditioning

    def wrong(*parts):
        txt, vec = right(*parts)
        return txt.roll(77, dims=1), vec.flip(1)
    monkeypatch.setattr(text_encoders, "sd3_conditioning", wrong)


def swapped_padding(ours, monkeypatch):
    """Pooled vectors are blind to it."""
    a, b, t5 = ours.tokenizers
    monkeypatch.setattr(ours, "tokenizers", (b, a, t5))


@pytest.mark.parametrize("damage", [swapped_clips, t5_first, swapped_padding])
def test_the_conditioning_parity_notices(sd3, monkeypatch, damage):
    ours, pipe = sd3
    damage(ours, monkeypatch)
    (txt, vec), (right_txt, right_vec) = ours.encode_text(PROMPTS), their_encode(pipe, PROMPTS)
    assert error(txt, right_txt) > 0.1
    assert damage is swapped_padding or error(vec, right_vec) > 0.1


def test_published_prefixes():
    assert PARTS["t5xxl"].prefix == "text_encoders.t5xxl.transformer."
    parts = (ClipText(SMALL_L), ClipText(SMALL_G), T5Encoder(SMALL_T5))
    children = dict(SD3Text(*parts, (None, None, None)).named_children())
    assert list(children) == [name for name in PARTS if name not in ("mmdit", "vae")]
