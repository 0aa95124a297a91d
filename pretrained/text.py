"""SD3's text encoders: CLIP-L, CLIP-G and T5-XXL, their tokenizers, and the vectors that SD3 makes of them.

    1. Tokenizers, from the files that the checkpoints ship with
    2. CLIP's text tower (Radford et al. 2021), under transformers' names
    3. T5's encoder (Raffel et al. 2020; v1.1), under transformers' names
    4. SD3's context and pooled vector (Esser et al. 2024, Sec. 4)

Nothing here masks padding: SD3 attends to it everywhere, so the number of tokens is part of a model's input.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

import common
from kernels import rms_norm
from pretrained.files import Device, Stored, count, fetch, fill, open_part, setting, shape_of

####################################################################################################
# 1. Tokenizers
####################################################################################################

CLIP_BOS, CLIP_EOS = "<|startoftext|>", "<|endoftext|>"
CLIP_WORDS = (r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|"
              r"[^\s\p{L}\p{N}]+")


def clip_tokenizer(folder: str, pad: int | None = None, length: int = 77) -> Tokenizer:
    """CLIP's tokenizer from FOLDER/vocab.json and FOLDER/merges.txt: [BOS] text [EOS] pad ..., `length` ids.

    Long text loses its end, never [EOS]. pad: None: [EOS] (CLIP-L); 0 for CLIP-G. Id 0 is also what a lone
    byte "!" would be. Text has "!</w>" (256) instead, and so have OpenCLIP and Stability's code; diffusers
    declares "!" a special token, so that its CLIP-G sees padding for every "!" typed. Ours is as in training.
    A typed "<|endoftext|>" ends the text (transformers).
    """
    vocab, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
    for path in (vocab, merges):
        if not path.is_file():
            raise SystemExit(f"error: {path}: no such file: name a folder with CLIP's vocab.json, merges.txt")
    try:
        bpe = models.BPE.from_file(str(vocab), str(merges), end_of_word_suffix="</w>", unk_token=CLIP_EOS)
    except Exception as e:
        why = (str(e).splitlines() or [type(e).__name__])[0]
        raise SystemExit(f"error: {folder}: vocab.json and merges.txt cannot be read ({why}): give those of "
                         "CLIP") from None
    tokenizer = Tokenizer(bpe)
    bos, eos = (tokenizer.token_to_id(t) for t in (CLIP_BOS, CLIP_EOS))
    if None in (bos, eos):
        raise SystemExit(f"error: {vocab}: has no {CLIP_BOS} or no {CLIP_EOS}: give CLIP's")
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in (CLIP_BOS, CLIP_EOS)])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.post_processor = processors.RobertaProcessing(
        (CLIP_EOS, eos), (CLIP_BOS, bos), trim_offsets=False, add_prefix_space=False)
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=eos if pad is None else pad)
    return tokenizer


def t5_tokenizer(path: str, length: int) -> Tokenizer:
    """T5's tokenizer from its tokenizer.json (or a folder with one): text [EOS] pad ..., `length` ids."""
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if file.suffix != ".json" or not file.is_file():
        raise SystemExit(f"error: {file}: no such tokenizer.json: give T5's (spiece.model is not read)")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as e:
        why = (str(e).splitlines() or [type(e).__name__])[0]
        raise SystemExit(f"error: {file}: cannot be read ({why}): give T5's tokenizer.json") from None
    tokenizer.no_truncation()  # the file may bring its own
    tokenizer.no_padding()
    pad, eos = tokenizer.token_to_id("<pad>"), tokenizer.token_to_id("</s>")
    if pad is None or tokenizer.encode("").ids != [eos]:
        raise SystemExit(f"error: {file}: has no <pad>, or does not end texts in </s>: give T5's")
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad, pad_token="<pad>")
    return tokenizer


def tokenize(tokenizer: Tokenizer, captions: list[str], device: torch.device | str = "cpu") -> Tensor:
    """[B] captions -> ids [B, L], L as the tokenizer was made for."""
    return torch.tensor([row.ids for row in tokenizer.encode_batch(captions)], device=device)


####################################################################################################
# 2. CLIP
####################################################################################################


@dataclass(frozen=True)
class ClipTextConfig:
    """Architecture of a CLIP text tower. The defaults are CLIP-L's in SD3, whose file has no projection."""

    width: int = 768
    heads: int = 12
    layers: int = 12
    quick_gelu: bool = True  # x sigmoid(1.702 x), OpenAI's; False: the exact GELU, OpenCLIP's
    project: int = 0  # width of the pooled vector's projection; 0: none
    vocab: int = 49408
    length: int = 77
    eos: int = 49407  # pooled at the first of these


CLIP_L = ClipTextConfig()
CLIP_G = ClipTextConfig(width=1280, heads=20, layers=32, quick_gelu=False, project=1280)


class ClipLayer(nn.Module):
    """Pre-norm transformer layer, LayerNorm eps 1e-5. causal: a token sees itself and those before it."""

    def __init__(self, width: int, heads: int, hidden: int, quick_gelu: bool, causal: bool):
        super().__init__()
        self.heads, self.quick_gelu, self.causal = heads, quick_gelu, causal
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y, attn = self.layer_norm1(x), self.self_attn
        q, k, v = (attn[n](y).unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for n in ("q_proj", "k_proj", "v_proj"))                                  # [B, H, L, K]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + attn["out_proj"](y.transpose(1, 2).flatten(2))
        y = self.mlp["fc1"](self.layer_norm2(x))
        y = y * torch.sigmoid(1.702 * y) if self.quick_gelu else F.gelu(y)
        return x + self.mlp["fc2"](y)


class ClipText(nn.Module):
    """Token ids -> what the layer before the last puts out, and one vector for the text."""

    def __init__(self, cfg: ClipTextConfig):
        super().__init__()
        self.cfg = cfg
        layers = [ClipLayer(cfg.width, cfg.heads, 4 * cfg.width, cfg.quick_gelu, causal=True)
                  for _ in range(cfg.layers)]
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({"token_embedding": nn.Embedding(cfg.vocab, cfg.width),
                                         "position_embedding": nn.Embedding(cfg.length, cfg.width)}),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(layers)}),
            "final_layer_norm": nn.LayerNorm(cfg.width)})
        if cfg.project:
            # Trap: transformers' and SD3's files hold it for F.linear, OpenCLIP's `text_projection` for x @ W
            self.text_projection = nn.Linear(cfg.width, cfg.project, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids [B, L] -> hidden [B, L, D] of the penultimate layer, without the final norm; pooled [B, E].

        pooled: the last layer's normed output at the first [EOS], projected if it projects, else D wide.
        """
        net = self.text_model
        places = net["embeddings"]["position_embedding"].weight[:ids.shape[1]]
        x = net["embeddings"]["token_embedding"](ids) + places
        for layer in net["encoder"]["layers"]:
            hidden, x = x, layer(x)
        end = (ids == self.cfg.eos).int().argmax(1)
        pooled = net["final_layer_norm"](x[torch.arange(len(x), device=x.device), end])
        return hidden, self.text_projection(pooled) if self.cfg.project else pooled


####################################################################################################
# 3. T5
####################################################################################################


@dataclass(frozen=True)
class T5Config:
    """Architecture of a T5 v1.1 encoder; the defaults are XXL's."""

    width: int = 4096
    heads: int = 64
    head_dim: int = 64
    layers: int = 24
    hidden: int = 10240
    vocab: int = 32128


T5_XXL = T5Config()
T5_BUCKETS, T5_FAR = 32, 128  # half of the buckets for either direction; beyond 128 tokens all are one


def t5_buckets(length: int) -> Tensor:
    """Bucket of the distance from token i to token j, int64 [L, L]: exact up to 7, then logarithmic to 128.

    On the CPU whatever the device: the logarithm is rounded down, and 16, 32 and 64 sit on the edges.
    """
    places = torch.arange(length, device="cpu")
    offset = places[None, :] - places[:, None]                                               # j - i
    half, exact = T5_BUCKETS // 2, T5_BUCKETS // 4
    far = offset.abs().clamp(min=1).float()
    large = exact + (torch.log(far / exact) / math.log(T5_FAR / exact) * (half - exact)).long()
    bucket = torch.where(offset.abs() < exact, offset.abs(), large.clamp(max=half - 1))
    return bucket + half * (offset > 0)


class T5Attention(nn.Module):
    """Trap: scores are not divided by sqrt(head_dim); T5's initialisation has it in the weights."""

    def __init__(self, cfg: T5Config, biased: bool):
        super().__init__()
        inner = cfg.heads * cfg.head_dim
        self.heads = cfg.heads
        self.q, self.k, self.v = (nn.Linear(cfg.width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, cfg.width, bias=False)
        if biased:  # block 0's table serves all blocks
            self.relative_attention_bias = nn.Embedding(T5_BUCKETS, cfg.heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(y.transpose(1, 2).flatten(2))


class T5Gated(nn.Module):
    def __init__(self, cfg: T5Config):
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(cfg.width, cfg.hidden, bias=False) for _ in range(2))
        self.wo = nn.Linear(cfg.hidden, cfg.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Trap: in XXL the output passes 65,504; in fp16 the last product is computed and kept in fp32."""
        y = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        return F.linear(y.float(), self.wo.weight.float()) if y.dtype == torch.float16 else self.wo(y)


class T5Layer(nn.Module):
    """x + f(norm(x)); the norm is an RMS norm with weights, eps 1e-6."""

    def __init__(self, width: int, name: str, inner: nn.Module):
        super().__init__()
        self.name = name
        self.add_module(name, inner)
        self.layer_norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, x: Tensor, *bias: Tensor) -> Tensor:
        y = rms_norm(x, self.layer_norm.weight, self.layer_norm.eps).to(self.layer_norm.weight.dtype)
        return x + getattr(self, self.name)(y, *bias)


class T5Encoder(nn.Module):
    """Token ids -> one vector per token. The sum that runs through the layers is fp32 for 16-bit weights.

    The file holds the embedding twice (`shared`, `encoder.embed_tokens`); here they are one module.
    """

    def __init__(self, cfg: T5Config):
        super().__init__()
        self.shared = nn.Embedding(cfg.vocab, cfg.width)
        blocks = []
        for i in range(cfg.layers):
            layers = [T5Layer(cfg.width, "SelfAttention", T5Attention(cfg, biased=i == 0)),
                      T5Layer(cfg.width, "DenseReluDense", T5Gated(cfg))]
            blocks.append(nn.ModuleDict({"layer": nn.ModuleList(layers)}))
        self.encoder = nn.ModuleDict({"embed_tokens": self.shared, "block": nn.ModuleList(blocks),
                                      "final_layer_norm": nn.RMSNorm(cfg.width, eps=1e-6)})

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, L] -> [B, L, D], normed."""
        table = self.encoder["block"][0]["layer"][0].SelfAttention.relative_attention_bias
        bias = table(t5_buckets(ids.shape[1]).to(ids.device))                                # [L, L, H]
        bias = bias.permute(2, 0, 1)[None].contiguous()
        x = self.shared(ids)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        for block in self.encoder["block"]:
            attention, gated = block["layer"]
            x = gated(attention(x, bias))
        norm = self.encoder["final_layer_norm"]
        return rms_norm(x, norm.weight, norm.eps).to(norm.weight.dtype)


####################################################################################################
# 4. SD3
####################################################################################################


def sd3_conditioning(clip_l: tuple[Tensor, Tensor], clip_g: tuple[Tensor, Tensor],
                     t5: Tensor) -> tuple[Tensor, Tensor]:
    """What the encoders put out -> context [B, 77 + T, D] and pooled vector [B, El + Eg] (4096, 2048 in SD3).

    clip_l, clip_g: hidden [B, 77, Dl], [B, 77, Dg] and pooled; t5 [B, T, D]. CLIP's features stand side by
    side, zeros fill them up to T5's width, and CLIP's tokens come before T5's.
    """
    hidden = torch.cat([clip_l[0], clip_g[0]], dim=-1)
    hidden = F.pad(hidden, (0, t5.shape[-1] - hidden.shape[-1]))
    return torch.cat([hidden, t5], dim=1), torch.cat([clip_l[1], clip_g[1]], dim=-1)


class SD3Text(nn.Module):
    """The three encoders with their tokenizers. Without T5, its part of the context is zeros (diffusers).

    tokenizers: CLIP-L's (pads with [EOS]), CLIP-G's (pads with 0) and T5's or None. T5's length is its
    tokenizer's: 77 in the paper (154 tokens in all), 256 by default in diffusers' pipeline.
    t5_length, width: of the zeros, where T5 is missing.
    """

    def __init__(self, clip_l: ClipText, clip_g: ClipText, t5xxl: T5Encoder | None,
                 tokenizers: tuple[Tokenizer, Tokenizer, Tokenizer | None], t5_length: int = 77,
                 width: int = 4096):
        super().__init__()
        self.clip_l, self.clip_g, self.t5xxl = clip_l, clip_g, t5xxl
        self.tokenizers, self.t5_length, self.width = tokenizers, t5_length, width

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """[B] captions -> txt [B, 77 + T, width], vec [B, El + Eg], in the encoders' dtype."""
        device = self.clip_l.text_model["final_layer_norm"].weight.device
        l_ids, g_ids = (tokenize(t, captions, device) for t in self.tokenizers[:2])
        clip_l, clip_g = self.clip_l(l_ids), self.clip_g(g_ids)
        if self.t5xxl is None:
            t5 = clip_g[0].new_zeros(len(captions), self.t5_length, self.width)
        else:
            t5 = self.t5xxl(tokenize(self.tokenizers[2], captions, device))
        return sd3_conditioning(clip_l, clip_g, t5)


def load_text(path: str, tokenizers: str | None = None, dtype: torch.dtype = torch.float32,
              device: Device = "cpu", t5: bool = True, t5_length: int = 77) -> SD3Text:
    """SD3's text encoders, frozen, from a file that bundles them, a diffusers folder, or a folder that holds
    clip_l.safetensors, clip_g.safetensors and t5xxl_*.safetensors.

    tokenizers: a folder with tokenizer/, tokenizer_2/ and tokenizer_3/; None: `path` itself. t5: False leaves
    it out (9.5 GB in 16 bits); then, as when there is none, its t5_length tokens are zeros, as wide as the
    transformer's text input where `path` has the transformer. fp16 and fp8 values are widened to `dtype`.
    """
    folder = Path(tokenizers or path)
    if not (folder / "tokenizer").is_dir():
        raise SystemExit(f"error: {folder}: holds no tokenizer/, tokenizer_2/ and tokenizer_3/: name a "
                         "folder of tokenizers that does, as diffusers' folders of SD3 do")
    clips, readers = [], []
    for name, quick, sub, pad in (("clip_l", True, "tokenizer", None), ("clip_g", False, "tokenizer_2", 0)):
        stored, config = open_part(path, name)
        cfg = clip_config(stored, config, quick, path, name)
        reader = clip_tokenizer(str(folder / sub), pad, cfg.length)
        check_tokens(reader.get_vocab_size(), cfg.vocab, 0, folder / sub, path)
        clips.append((replace(cfg, eos=reader.token_to_id(CLIP_EOS)), stored, name))
        readers.append(reader)
    stored, reader = open_part(path, "t5xxl")[0] if t5 else None, None
    if stored and stored.headers:
        t5_cfg = t5_config(stored, path)
        width = t5_cfg.width
        reader = t5_tokenizer(str(folder / "tokenizer_3"), t5_length)
        check_tokens(reader.get_vocab_size(), t5_cfg.vocab, 127, folder / "tokenizer_3", path)
    else:
        text_in = open_part(path, "mmdit")[0].headers.get("context_embedder.weight")
        width = T5Config.width if text_in is None else text_in.shape[-1]
        if t5:
            common.print0(f"{path}: holds no T5, its {t5_length} tokens will be zeros")
    if (clip := sum(cfg.width for cfg, *_ in clips)) > width:
        raise SystemExit(f"error: {path}: the CLIPs are {clip} wide together, more than T5's {width}: these "
                         "encoders are not of one SD3")
    with torch.device("meta"):
        nets = [ClipText(cfg) for cfg, *_ in clips]
        encoder = T5Encoder(t5_cfg) if reader else None
    for net, (_, held, name) in zip(nets, clips):
        fill(net, held.headers, path, name, dtype, device, read=held.read)
    if encoder:
        own = {k: v for k, v in encoder.state_dict().items() if k not in T5_TABLES or k in stored.headers}
        state = fetch(own, stored.headers, path, "t5xxl", dtype, device, read=stored.read)
        table = next(state[k] for k in T5_TABLES if k in state)
        encoder.load_state_dict({**state, **dict.fromkeys(T5_TABLES, table)}, assign=True)
    return SD3Text(*nets, encoder, (*readers, reader), t5_length, width).eval().requires_grad_(False)


def check_tokens(size: int, rows: int, spare: int, tokenizer: Path, path: str) -> None:
    """spare: rows of padding that the embedding may have (T5's: to a multiple of 128)."""
    if not rows - spare <= size <= rows:
        raise SystemExit(f"error: {tokenizer}: {size} tokens, but {path} embeds {rows}: give the tokenizers "
                         "of this model")


def clip_config(stored: Stored, config: dict, quick_gelu: bool, path: str, name: str) -> ClipTextConfig:
    """Sizes of a text tower from its shapes; heads of 64 unless its config.json says else.

    An identity as projection (CLIP-L's in diffusers' folders) is none, and is taken out of the headers.
    CLIP-G must have one.
    """
    if not (weights := stored.headers):
        raise SystemExit(f"error: {path}: holds no {name}: give a file that bundles the text encoders, a "
                         "diffusers folder, or a folder with clip_l.safetensors, clip_g.safetensors")
    weights.pop("text_model.embeddings.position_ids", None)  # a buffer that older files carry
    rows, D = shape_of(weights, "text_model.embeddings.token_embedding.weight", path, name, 2)
    length = shape_of(weights, "text_model.embeddings.position_embedding.weight", path, name, 2)[0]
    matrix = "text_projection.weight"
    if matrix not in weights and name == "clip_g":
        raise SystemExit(f"error: {path}: clip_g has no {matrix}: give the published weights")
    if matrix in weights and torch.equal(stored.read(matrix).float(), torch.eye(D)):
        del weights[matrix]
    project = shape_of(weights, matrix, path, name, 2)[0] if matrix in weights else 0
    heads = int(setting(config, "num_attention_heads", D // 64, path))
    act = config.get("hidden_act", "quick_gelu" if quick_gelu else "gelu")
    if act not in ("quick_gelu", "gelu") or heads < 1 or D % heads:
        raise SystemExit(f"error: {path}: {name} has {heads} heads, width {D} and activation {act!r}: it is "
                         "none of SD3's encoders")
    return ClipTextConfig(D, heads, count(weights, "text_model.encoder.layers."), act == "quick_gelu",
                          project, rows, length)


T5_TABLES = ("shared.weight", "encoder.embed_tokens.weight")  # one embedding: files have either name or both


def t5_config(stored: Stored, path: str) -> T5Config:
    """Sizes of a T5 encoder from its shapes. A second copy of the embedding is taken out of the headers."""
    weights = stored.headers
    held = [k for k in T5_TABLES if k in weights]
    if len(held) == 2:
        a, b = (stored.read(k).flatten().view(torch.uint8) for k in held)  # torch does not compare fp8
        if not torch.equal(a, b):
            raise SystemExit(f"error: {path}: T5's {' and '.join(held)} differ: the file is damaged, copy it "
                             "again")
        del weights[held.pop()]
    block, what = "encoder.block.0.layer.", "T5 encoder"
    rows, width = shape_of(weights, held[0] if held else T5_TABLES[0], path, what, 2)
    heads = shape_of(weights, block + "0.SelfAttention.relative_attention_bias.weight", path, what, 2)[1]
    inner = shape_of(weights, block + "0.SelfAttention.q.weight", path, what, 2)[0]
    hidden = shape_of(weights, block + "1.DenseReluDense.wi_0.weight", path, what, 2)[0]
    if inner % heads:
        raise SystemExit(f"error: {path}: {heads} heads in {inner} features: this is no {what}; give its "
                         "published weights")
    return T5Config(width, heads, inner // heads, count(weights, "encoder.block."), hidden, rows)
