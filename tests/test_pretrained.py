"""Public weights: SD3's two published layouts against diffusers and transformers, export, damaged files."""

import hashlib
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import test_text_encoders as texts
import torch
from inprocess import run_script
from safetensors.torch import load_file, save_file
from test_model import fp64_rms, inputs
from test_vae import CFG as VAE_CFG
from test_vae import picture, their_decode, their_encode
from test_vae import randomize as random_vae
from test_vae import to_diffusers as vae_to_diffusers

import checkpoint
from model import PRESETS, Editor, EditorConfig, MMDiT, inpainting
from pretrained import __main__ as cli
from pretrained import files, sd3, towers
from pretrained import text as text_encoders
from pretrained.files import PARTS, Stored, header_hash, is_public, open_part, open_safetensors
from pretrained.text import CLIP_G, CLIP_L, T5_XXL, ClipText, T5Encoder
from pretrained.vae import VAE, VAEConfig, load_vae, vae_place
from runs.bench_models import randomize, run_twin

words = texts.files  # a fixture: a folder with a small vocab.json, merges.txt and T5's tokenizer.json
F64, TOLERANCE = torch.float64, 1e-11  # of the largest output; a correct float64 copy reaches 1e-14
SD3 = EditorConfig(depth=2, heads=2, head_dim=64, patch=2, channels=4, pos_max=12, learn_pos=False,
                   txt_dim=192, vec_dim=192, qk_norm=False, txt_bytes=0)
KINDS = {"sd3": SD3, "sd3.5": replace(SD3, depth=3, heads=4, head_dim=16, qk_norm=True, dual=2)}
SMALL = {"clip_l": replace(CLIP_L, width=64, heads=1, layers=2),
         "clip_g": replace(CLIP_G, width=128, heads=2, layers=3, project=128)}
PREFIX = {name: part.prefix for name, part in PARTS.items()}
PROMPTS = ["a photo of the red cat", "", "naïve 🙂 你好 " * 30]
both = pytest.mark.parametrize("kind", KINDS)


def error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def rounded(state, dtype=torch.float16):
    """Values that a file of `dtype` holds exactly, in float64."""
    return {k: v.detach().to(dtype).to(F64) for k, v in state.items()}


@pytest.fixture(scope="module")
def states(words):
    """-> name -> state dict of a small part, float64 with values of fp16 (T5: of fp8)."""
    vocab = len(json.loads((words / "vocab.json").read_text()))
    t5 = texts.Tokenizer.from_file(str(words / "tokenizer.json")).get_vocab_size()
    clips = {name: texts.randomize(ClipText(replace(cfg, vocab=vocab, eos=vocab - 1)), seed)
             for seed, (name, cfg) in enumerate(SMALL.items())}
    rows = -(-t5 // 128) * 128
    t5 = texts.randomize(T5Encoder(replace(texts.SMALL_T5, layers=2, vocab=rows)))
    return {**{kind: rounded(randomize(MMDiT(cfg)).state_dict()) for kind, cfg in KINDS.items()},
            "vae": rounded(random_vae(VAE(VAE_CFG)).state_dict()),
            **{name: rounded(net.state_dict()) for name, net in clips.items()},
            "t5xxl": rounded(t5.state_dict(), torch.float8_e4m3fn)}


def single(path, states, kind, parts=("vae",), **dtypes):
    """A file as published: fp16 unless told otherwise, names with prefixes."""
    out = {}
    for name in ("mmdit", *parts):
        state = states[kind if name == "mmdit" else name]
        dtype = dtypes.get(name, torch.float16)
        out |= {PREFIX[name] + k: v.to(dtype, copy=True) for k, v in state.items()}
    save_file(out, path)
    return str(path)


ALL = ("vae", "clip_l", "clip_g", "t5xxl")


@pytest.fixture(scope="module")
def tokenizers(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(words, folder / name)
    return folder


@pytest.fixture(scope="module")
def peers(states, words):
    """-> name -> the public implementation with the same weights, float64, every key used once."""
    pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
    from diffusers.models import normalization
    from transformers.models.t5 import modeling_t5

    out = {}
    for kind, cfg in KINDS.items():
        out[kind] = SD3Transformer2DModel(
            sample_size=cfg.pos_max * cfg.patch, patch_size=cfg.patch, in_channels=cfg.channels,
            num_layers=cfg.depth, attention_head_dim=cfg.head_dim, num_attention_heads=cfg.heads,
            joint_attention_dim=cfg.txt_dim, caption_projection_dim=cfg.width, out_channels=cfg.channels,
            pooled_projection_dim=cfg.vec_dim, pos_embed_max_size=cfg.pos_max,
            dual_attention_layers=tuple(range(cfg.dual)), qk_norm="rms_norm" if cfg.qk_norm else None)
        prefixed = {PREFIX["mmdit"] + k: v.clone() for k, v in states[kind].items()}
        prefixed = convert_sd3_transformer_checkpoint_to_diffusers(prefixed)
        out[kind].double().load_state_dict(prefixed, strict=True)
    out["vae"] = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(VAE_CFG.width * m for m in VAE_CFG.mult), layers_per_block=VAE_CFG.blocks,
        latent_channels=VAE_CFG.channels, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=1.5305, shift_factor=0.0609).double()
    out["vae"].load_state_dict(vae_to_diffusers(states["vae"]), strict=True)
    for name, cfg in SMALL.items():
        vocab = len(states[name]["text_model.embeddings.token_embedding.weight"])
        out[name] = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(
            vocab_size=vocab, hidden_size=cfg.width, intermediate_size=4 * cfg.width,
            num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads, projection_dim=cfg.width,
            hidden_act="quick_gelu" if cfg.quick_gelu else "gelu", eos_token_id=vocab - 1,
            bos_token_id=vocab - 2, pad_token_id=0)).double()
        identity = {} if cfg.project else {"text_projection.weight": torch.eye(cfg.width)}
        out[name].load_state_dict(states[name] | identity, strict=True)
    t5 = text_encoders.t5_config(Stored(dict(states["t5xxl"]), states["t5xxl"].get), "")
    out["t5xxl"] = transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=t5.vocab, d_model=t5.width, d_kv=t5.head_dim, d_ff=t5.hidden, num_layers=t5.layers,
        num_heads=t5.heads, feed_forward_proj="gated-gelu")).double()
    out["t5xxl"].load_state_dict(states["t5xxl"], strict=True)
    for net in out.values():
        net.eval().requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:  # both take RMS statistics in fp32 even of fp64 input
        patch.setattr(normalization.RMSNorm, "forward", fp64_rms)
        patch.setattr(modeling_t5.T5LayerNorm, "forward", texts.fp64_rms)
        yield out


@pytest.fixture(scope="module")
def folders(peers, tokenizers, tmp_path_factory):
    """-> kind -> a diffusers folder that the public implementations wrote, in shards, with tokenizers."""
    root, out = tmp_path_factory.mktemp("folders"), {}
    for kind in KINDS:
        out[kind] = str(root / kind)
        shutil.copytree(tokenizers, root / kind)
        (root / kind / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
        for name, part in PARTS.items():
            size = {"max_shard_size": "1MB"} if name in ("mmdit", "t5xxl") else {}
            peers[kind if name == "mmdit" else name].save_pretrained(root / kind / part.folder, **size)
        assert len(list((root / kind / "transformer").glob("*-of-*.safetensors"))) > 1
    return out


def mmdit_error(path, peer):
    cfg, state = sd3.load_mmdit(path, F64)
    net = MMDiT(cfg).double()
    net.load_state_dict(state, strict=True)
    errors = []
    for size in ((16, 16), (24, 12)):
        x = inputs(cfg, *size)
        with torch.no_grad():
            v = net(*x)
            assert v.abs().max() > 1
            errors.append(error(v, run_twin(peer, *x)))
    return max(errors)


def vae_error(vae, peer):
    image, z = picture(16, 24), picture(2, 3, VAE_CFG.channels)
    with torch.no_grad():
        return max(error(vae.encode(image), their_encode(peer, image)),
                   error(vae.decode(z), their_decode(peer, z)))


def text_errors(text, peers, words, t5=True):
    """Of context and pooled vector, against diffusers' pipeline over the peers."""
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

    readers = [texts.theirs_clip(words, pad) for pad in (texts.text_encoders.CLIP_EOS, "!")]
    for reader in readers:
        reader.model_max_length = 77
    pipe = StableDiffusion3Pipeline(
        transformer=None, scheduler=None, vae=None, text_encoder=peers["clip_l"], tokenizer=readers[0],
        text_encoder_2=peers["clip_g"], tokenizer_2=readers[1], text_encoder_3=peers["t5xxl"],
        tokenizer_3=texts.theirs_t5(words))
    right = texts.their_encode(pipe, PROMPTS)
    if not t5:
        right[0][:, 77:] = 0
    return [error(a, b) for a, b in zip(text.encode_text(PROMPTS), right)]


####################################################################################################
# Loading: equal to the public implementations
####################################################################################################


@both
def test_transformer_equals_diffusers(kind, states, peers, folders, tmp_path):
    files = [single(tmp_path / "a.safetensors", states, kind, ()),
             single(tmp_path / "b.safetensors", states, kind, ALL), folders[kind]]
    for path in files:
        assert is_public(path)
        cfg, state = sd3.load_mmdit(path, F64)
        assert cfg == KINDS[kind]
        assert state.keys() == states[kind].keys()
        assert all(torch.equal(state[k], v) for k, v in states[kind].items())
        assert mmdit_error(path, peers[kind]) < TOLERANCE


@both
def test_every_value_is_read_once(kind, folders, tmp_path):
    """Each tensor of the folder is filled with a number of its own."""
    folder = shutil.copytree(folders[kind], tmp_path / "x")
    found = {}
    for shard in (folder / "transformer").glob("*.safetensors"):
        part = {k: torch.full_like(v, len(found) + i) for i, (k, v) in enumerate(load_file(shard).items())}
        found |= part
        save_file(part, shard)
    _, state = sd3.load_mmdit(str(folder), F64)
    assert sum(v.numel() for v in state.values()) == sum(v.numel() for v in found.values())
    assert {x.item() for v in state.values() for x in v.unique()} == set(range(len(found)))


def test_autoencoder_equals_diffusers(states, peers, folders, tmp_path):
    for path in (single(tmp_path / "a.safetensors", states, "sd3"), folders["sd3"]):
        vae = load_vae(path, F64)
        assert vae.cfg == VAE_CFG and not vae.training and not any(p.requires_grad for p in vae.parameters())
        assert vae_error(vae, peers["vae"]) < TOLERANCE


def test_scale_of_a_folder_is_its_own(folders, tmp_path):
    folder = shutil.copytree(folders["sd3"], tmp_path / "x")
    config = json.loads((folder / "vae/config.json").read_text())
    for scale, shift, want in ((0.5, 0.25, (0.5, 0.25)), (0.5, None, (0.5, 0.0))):
        (folder / "vae/config.json").write_text(
            json.dumps(config | {"scaling_factor": scale, "shift_factor": shift}))
        cfg = load_vae(str(folder)).cfg
        assert (cfg.scale, cfg.shift) == want
    for scale in ("big", 0, True):
        (folder / "vae/config.json").write_text(json.dumps(config | {"scaling_factor": scale}))
        with pytest.raises(SystemExit, match="error: .*scaling_factor"):
            load_vae(str(folder))


@pytest.mark.parametrize("t5", [torch.float16, torch.float8_e4m3fn])
def test_bundled_encoders_equal_diffusers(t5, states, peers, words, tokenizers, tmp_path, capsys):
    path = single(tmp_path / "a.safetensors", states, "sd3", ALL, t5xxl=t5)
    text = text_encoders.load_text(path, str(tokenizers), F64)
    assert max(text_errors(text, peers, words)) < TOLERANCE
    assert {p.dtype for p in text.parameters()} == {F64} and not text.training
    assert not any(p.requires_grad for p in text.parameters())
    assert text.t5xxl.shared.weight is text.t5xxl.encoder["embed_tokens"].weight
    assert capsys.readouterr().out == ""
    short = text_encoders.load_text(path, str(tokenizers), t5_length=9)
    assert short.encode_text(["x"])[0].shape == (1, 86, 192)


def test_encoders_of_a_folder_equal_diffusers(peers, folders, words):
    text = text_encoders.load_text(folders["sd3"], dtype=F64)  # its own tokenizers
    assert max(text_errors(text, peers, words)) < TOLERANCE


def test_encoders_on_their_own_equal_diffusers(states, peers, words, tokenizers, tmp_path):
    """text_encoders/ of the published repositories: files without prefixes, T5's embedding once or twice."""
    for drop in ((), ("shared.weight",), ("encoder.embed_tokens.weight",)):
        for name in ("clip_l", "clip_g", "t5xxl"):
            state = {k: v.half() for k, v in states[name].items() if k not in drop}
            save_file(state, tmp_path / f"{name}{'_fp16' if name == 't5xxl' else ''}.safetensors")
        text = text_encoders.load_text(str(tmp_path), str(tokenizers), F64)
        assert max(text_errors(text, peers, words)) < TOLERANCE


def test_without_t5(states, peers, words, tokenizers, tmp_path, capsys):
    path = single(tmp_path / "a.safetensors", states, "sd3", ("clip_l", "clip_g"))
    text = text_encoders.load_text(path, str(tokenizers), F64)
    assert max(text_errors(text, peers, words, t5=False)) < TOLERANCE
    assert text_errors(text, peers, words)[0] > 0.1
    line = capsys.readouterr().out
    assert path in line and "holds no T5" in line and line.count("\n") == 1
    path = single(tmp_path / "b.safetensors", states, "sd3", ALL)
    blind = text_encoders.load_text(path, str(tokenizers), F64, t5=False)
    assert blind.t5xxl is None and blind.width == SD3.txt_dim and capsys.readouterr().out == ""
    assert all(torch.equal(a, b) for a, b in zip(blind.encode_text(PROMPTS), text.encode_text(PROMPTS)))


def test_a_projection_that_is_no_identity_counts(peers, words, folders, tmp_path):
    folder = shutil.copytree(folders["sd3"], tmp_path / "x")
    file = folder / "text_encoder/model.safetensors"
    state = load_file(file)
    state = {**state, "text_projection.weight": torch.randn(64, 64, dtype=F64)}
    save_file(state, file, metadata={"format": "pt"})
    text = text_encoders.load_text(str(folder), dtype=F64)
    assert text_errors(text, peers, words)[1] > 0.1
    other = type(peers["clip_l"]).from_pretrained(folder / "text_encoder", dtype=F64)
    assert max(text_errors(text, {**peers, "clip_l": other}, words)) < TOLERANCE


def test_only_what_is_asked_for_is_read(states, tokenizers, tmp_path, monkeypatch):
    """A mapped tensor costs read-ahead: those of the other parts are not even mapped; none is read twice."""
    path, read, right = single(tmp_path / "a.safetensors", states, "sd3", ALL), [], open_safetensors

    def opened(file):
        stored = right(file)
        return replace(stored, read=lambda name: read.append(name) or stored.read(name))
    monkeypatch.setattr(files, "open_safetensors", opened)
    for call, name in ((sd3.load_mmdit, "mmdit"), (load_vae, "vae")):
        call(path)
        assert len(read) == len(states["sd3" if name == "mmdit" else name]) == len(set(read))
        assert all(k.startswith(PREFIX[name]) for k in read)
        read.clear()
    cli.show(path)
    assert not read
    text_encoders.load_text(path, str(tokenizers), t5=False)
    assert sorted({k.split(".")[1] for k in read}) == ["clip_g", "clip_l"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, states, tokenizers, tmp_path):
    path = single(tmp_path / "a.safetensors", states, "sd3", ALL)
    _, state = sd3.load_mmdit(path, dtype)
    nets = load_vae(path, dtype), text_encoders.load_text(path, str(tokenizers), dtype)
    assert {v.dtype for v in (*state.values(), *(p for n in nets for p in n.parameters()))} == {dtype}
    want = {k: v.to(dtype) for k, v in states["sd3"].items()}
    assert all(torch.equal(state[k], v) for k, v in want.items())
    Path(path).write_bytes(b"\0" * os.path.getsize(path))  # in place: nothing may still be the mapped file
    assert all(torch.equal(state[k], v) for k, v in want.items())


####################################################################################################
# Negative controls: mistakes in a file that keeps its names and shapes
####################################################################################################


def halves(value):
    return torch.cat(value.chunk(2)[::-1])


def thirds(value):
    return torch.cat([value.chunk(3)[i] for i in (1, 0, 2)])


MISTAKES = {  # part, tensor of the single file, what is wrong with it
    "final modulation swapped": ("sd3", "final_layer.adaLN_modulation.1.weight", halves),
    "last text modulation swapped": ("sd3", "joint_blocks.1.context_block.adaLN_modulation.1.bias", halves),
    "queries and keys": ("sd3", "joint_blocks.0.x_block.attn.qkv.weight", thirds),
    "queries and keys of text": ("sd3", "joint_blocks.0.context_block.attn.qkv.weight", thirds),
    "positions mirrored": ("sd3", "pos_embed", lambda v: v.flip(1)),
    "attention transposed": ("vae", "decoder.mid.attn_1.v.weight", lambda v: v.transpose(0, 1)),
    "projection transposed": ("clip_g", "text_projection.weight", lambda v: v.T),
    "T5 queries and keys": ("t5xxl", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                            lambda v: v.flip(0)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparisons_notice(mistake, states, peers, words, tokenizers, tmp_path):
    part, key, damage = MISTAKES[mistake]
    wrong = {**states, part: {**states[part], key: damage(states[part][key]).contiguous()}}
    path = single(tmp_path / "a.safetensors", wrong, "sd3", ALL)
    if part == "sd3":
        assert mmdit_error(path, peers["sd3"]) > 1e-3
    elif part == "vae":
        assert vae_error(load_vae(path, F64), peers["vae"]) > 1e-3
    else:
        assert max(text_errors(text_encoders.load_text(path, str(tokenizers), F64), peers, words)) > 1e-3


def test_the_comparison_notices_a_wrong_map(peers, folders, monkeypatch):
    """A folder read without swapping the halves back."""
    right = sd3.mmdit_place
    assert mmdit_error(folders["sd3"], peers["sd3"]) < TOLERANCE
    monkeypatch.setattr(sd3, "mmdit_place", lambda key, depth: replace(right(key, depth), swap=False))
    assert mmdit_error(folders["sd3"], peers["sd3"]) > 0.1


####################################################################################################
# The published sizes
####################################################################################################

PUBLISHED = {  # keys and sha256 over the sorted lines "name:shape" of three published files
    ("sd3-medium", ("vae", "clip_l", "clip_g")):
        (1448, "280d4b5ccdef3dd3ef8ab7bee9ade9540b010fb630f4af1e75e0f9585a867a08"),
    ("sd3-medium", ALL):
        (1668, "229b43acec68c9201466ad929a50b4c08a88a2110ddf4dec2c0f9dfbe5af49c5"),
    ("sd3.5-medium", ("vae",)):
        (909, "936c1fef4f846b608f205f8c5f70a1b4d00d796ff82afe7d9c52114c40b963f9"),
}


def published(preset, parts):
    with torch.device("meta"):
        nets = {"mmdit": MMDiT(PRESETS[preset]), "vae": VAE(), "clip_l": ClipText(CLIP_L),
                "clip_g": ClipText(CLIP_G), "t5xxl": T5Encoder(T5_XXL)}
    return {PREFIX[n] + k: v for n in ("mmdit", *parts) for k, v in nets[n].state_dict().items()}


@pytest.mark.parametrize("preset, parts", PUBLISHED)
def test_published_files(preset, parts, tmp_path, capsys):
    """Files of the published names, shapes and sizes, all holes: their headers say what they are."""
    tensors = published(preset, parts)
    lines = sorted(f"{k}:{list(v.shape)}" for k, v in tensors.items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert (len(lines), digest) == PUBLISHED[preset, parts]
    header, at = {}, 0
    for k, v in tensors.items():
        header[k] = {"dtype": "F16", "shape": list(v.shape), "data_offsets": [at, at := at + 2 * v.numel()]}
    raw = json.dumps(header).encode()
    path = tmp_path / "sd3.safetensors"
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(raw)) + raw)
        f.truncate(8 + len(raw) + at)
    cli.show(str(path))
    stored, config = open_part(str(path), "mmdit")
    assert sd3.editor_config(stored.headers, config, str(path)) == PRESETS[preset]
    out = capsys.readouterr().out
    assert f"{preset}: 24 blocks, 24 heads of 64" in out and len(out.splitlines()) == 2 + len(parts)
    assert f"{sum(v.numel() for k, v in tensors.items() if k.startswith(PREFIX['mmdit'])):,} values" in out
    assert len(header_hash(str(path))) == 64


def test_published_names_in_diffusers():
    """The map of names agrees with tests/test_frozen.py's own for every tensor of the published VAE."""
    with torch.device("meta"):
        own = VAE(VAEConfig()).state_dict()
    theirs = vae_to_diffusers(own)
    places = {k: vae_place(k, 4) for k in own}
    assert [n for p in places.values() for n in p.names] == list(theirs)
    assert all((theirs[p.names[0]].ndim != own[k].ndim) == p.flat for k, p in places.items())


####################################################################################################
# Export
####################################################################################################


def their_transformer(folder):
    from diffusers import SD3Transformer2DModel

    net, info = SD3Transformer2DModel.from_pretrained(folder, torch_dtype=F64, output_loading_info=True)
    assert not any(info.values()), info
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("shard", [5 * 10**9, 300_000])
@pytest.mark.parametrize("inpaint", [False, True])
@both
def test_export_loads_in_diffusers(kind, inpaint, shard, peers, tmp_path):
    cfg = inpainting(KINDS[kind]) if inpaint else KINDS[kind]
    net = randomize(MMDiT(cfg)).double()
    folder = sd3.export_diffusers(cfg, net.state_dict(), str(tmp_path), shard)
    files = sorted(p.name for p in folder.iterdir())
    many = shard < 10**9
    assert any("-00001-of-" in f for f in files) == many and ("diffusion_pytorch_model.safetensors" in
                                                              files) != many
    if many:
        table = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
        assert table["metadata"]["total_size"] == sum(v.nbytes for v in net.state_dict().values())
    theirs, x = their_transformer(folder), inputs(cfg)
    with torch.no_grad():
        assert error(net(*x), run_twin(theirs, *x)) < TOLERANCE
    again, state = sd3.load_mmdit(str(tmp_path), F64)
    assert is_public(str(tmp_path)) and again == cfg
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    with pytest.raises(SystemExit, match="error: .*transformer: is there already"):
        sd3.export_diffusers(cfg, net.state_dict(), str(tmp_path))


def test_export_refuses_what_diffusers_has_not(tmp_path):
    state = MMDiT(SD3).state_dict()
    for cfg, why in ((replace(SD3, predict="x0"), "predicts x0"), (replace(SD3, txt_bytes=64), "own text"),
                     (replace(SD3, depth=3), "missing"), (replace(SD3, txt_dim=64), "instead of")):
        with pytest.raises(SystemExit, match=f"error: .*{why}") as e:
            sd3.export_diffusers(cfg, state, str(tmp_path))
        assert "\n" not in str(e.value)
    assert not any(tmp_path.iterdir())


def test_export_leaves_nothing_of_a_failure(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(SystemExit, match="error: .*No space left"):
        sd3.export_diffusers(SD3, MMDiT(SD3).state_dict(), str(tmp_path))
    assert not any(tmp_path.iterdir())


def command(*arguments):
    return run_script(Path(sd3.__file__).with_name("__main__.py"), *arguments)


def test_commands(tmp_path, capsys):
    """export takes the averaged weights; show, usage and errors are short."""
    nets = {name: randomize(Editor(SD3), seed) for seed, name in enumerate(("model", "ema"))}
    checkpoint.write(tmp_path / "run/step_00000001", 1, {k: v.state_dict() for k, v in nets.items()},
                            {"arch": nets["ema"].arch})
    done = command("export", tmp_path / "run", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    _, state = sd3.load_mmdit(str(tmp_path / "out"))
    assert all(torch.equal(state[k], v) for k, v in nets["ema"].mmdit.state_dict().items())
    assert not is_public(str(tmp_path / "run")) and is_public(str(tmp_path / "out"))
    cli.show(str(tmp_path / "out"))
    shown = capsys.readouterr().out
    assert "float32" in shown and "of another size: 2 blocks, 2 heads of 64" in shown
    bad = command("show", tmp_path / "run")
    assert bad.returncode == 1 and re.fullmatch(r"error: [^\n]+\n", bad.stderr)
    assert "usage: python -m pretrained show PATH" in command("show").stderr
    path = tmp_path / "other.safetensors"
    save_file({"a.b": torch.ones(3), "a.c": torch.ones(2, dtype=torch.int8), "d": torch.ones(1)}, path)
    cli.show(str(path))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("a "))
    assert "2 tensors, 5 values: float32 0.000 GB, int8" in line


def test_export_wants_an_editor(tmp_path):
    editor = Editor(PRESETS["test"])
    for arch, why in ((editor.arch, "predicts x0"), ({"kind": "reward"}, "holds a 'reward'")):
        checkpoint.write(tmp_path / why, 1, {"model": editor.state_dict()}, {"arch": arch})
        with pytest.raises(SystemExit, match=f"error: .*{why}"):
            cli.export(str(tmp_path / why), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


####################################################################################################
# Damaged and wrong files
####################################################################################################


def one_line(call, *arguments, why="", **named):
    with pytest.raises(SystemExit) as e:
        call(*arguments, **named)
    line = str(e.value)
    assert re.fullmatch(r"error: [^\n]+: [^\n]+", line) and re.search(why, line), line
    return line


class Bomb:
    def __reduce__(self):
        return print, ("executed",)


def resaved(path, change):
    state = load_file(path)
    change(state)
    save_file({k: v.contiguous().clone() for k, v in state.items()}, path)


def renamed(state, key, name):
    state[name] = state.pop(key)


MM = "model.diffusion_model."
CHANGES = {  # what is done to the tensors of a whole file, what the line says
    "missing": (lambda s: s.pop(MM + "x_embedder.proj.bias"), r"1 missing \(x_embedder.proj.bias\)"),
    "missing block": (lambda s: [s.pop(k) for k in [*s] if "joint_blocks.0." in k], "missing"),
    "unexpected": (lambda s: s.update({MM + "more": torch.ones(1)}), r"1 not of an SD3 transformer \(more\)"),
    "foreign": (lambda s: s.update({"alphas": torch.ones(1)}), "1 tensors are not of SD3, 'alphas' first"),
    "renamed": (lambda s: renamed(s, MM + "pos_embed", MM + "pos_embedding"), "'pos_embed' is missing"),
    "shape": (lambda s: s.update({MM + "t_embedder.mlp.2.bias": torch.ones(7)}),
              r"t_embedder.mlp.2.bias is \[7\] instead of \[128\]"),
    "axes": (lambda s: s.update({MM + "x_embedder.proj.weight": torch.ones(4)}), r"weight' is \[4\]"),
    "empty tensor": (lambda s: s.update({MM + "pos_embed": torch.ones(1, 0, 128)}), "pos_embed"),
    "table": (lambda s: s.update({MM + "pos_embed": torch.ones(1, 143, 128)}), "143"),
    "ints": (lambda s: s.update({MM + "x_embedder.proj.bias": torch.ones(128, dtype=torch.int16)}),
             "1 not floating point .*torch.int16"),
    "nan": (lambda s: s[MM + "final_layer.linear.bias"].fill_(torch.nan), "linear.bias' holds NaN"),
    "infinite": (lambda s: s[MM + "joint_blocks.0.x_block.attn.qkv.bias"][5].fill_(torch.inf), "holds NaN"),
    "dual in the middle": (lambda s: s.update({
        f"{MM}joint_blocks.1.x_block.attn2.{k}": torch.ones(n) for k, n in (
            ("qkv.weight", (384, 128)), ("qkv.bias", 384), ("proj.weight", (128, 128)), ("proj.bias", 128))}),
        "attn2"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file(change, states, tmp_path):
    path = single(tmp_path / "a.safetensors", states, "sd3")
    resaved(path, CHANGES[change][0])
    assert path in one_line(sd3.load_mmdit, path, why=CHANGES[change][1])


def test_files_that_cannot_be_read(states, tmp_path, capsys):
    whole = Path(single(tmp_path / "a.safetensors", states, "sd3")).read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    torch.save({"x": Bomb()}, tmp_path / "bomb")
    cases = {"cut": whole[:-1], "header": whole[:size // 2], "seven": whole[:7], "empty": b"",
             "longer": whole + b"\0", "bomb": (tmp_path / "bomb").read_bytes(), "text": b"not weights" * 9,
             "huge": struct.pack("<Q", 2**62) + whole[8:]}
    for name, raw in cases.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(raw)
        for call in (sd3.load_mmdit, load_vae, header_hash, cli.show):
            assert str(path) in one_line(call, str(path), why="cannot be read")
    one_line(sd3.load_mmdit, str(tmp_path / "absent.safetensors"), why="cannot be read")
    one_line(sd3.load_mmdit, str(tmp_path / "absent"), why="neither a .safetensors file nor a folder")
    for name in ("bomb", "bomb.ckpt", "bomb.pt"):  # never a pickle, not even a good one
        shutil.copy(tmp_path / "bomb", tmp_path / "copy")
        os.replace(tmp_path / "copy", tmp_path / name)
        one_line(sd3.load_mmdit, str(tmp_path / name), why="neither a .safetensors file nor a folder")
    one_line(load_vae, single(tmp_path / "b.safetensors", states, "sd3", ()), why="no autoencoder")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.slow
def test_every_kind_of_flipped_bit_in_the_header_is_found(states, tmp_path):
    """All bits of its length and 600 others; values that stay finite are nobody's to find."""
    path = Path(single(tmp_path / "a.safetensors", states, "sd3", ()))
    whole = bytearray(path.read_bytes())
    size = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = random.Random(0)
    for bit in [*range(64), *rng.sample(range(64, 8 * size), 600)]:
        whole[bit // 8] ^= 1 << bit % 8
        path.write_bytes(whole)
        one_line(sd3.load_mmdit, str(path))
        whole[bit // 8] ^= 1 << bit % 8
    whole[-1] ^= 0x80  # the sign of a value
    path.write_bytes(whole)
    assert sd3.load_mmdit(str(path))[0] == SD3


def test_values_too_large_for_the_dtype(states, tmp_path):
    path = single(tmp_path / "a.safetensors", states, "sd3", mmdit=torch.float32)
    resaved(path, lambda s: s[MM + "pos_embed"].fill_(1e5))
    one_line(sd3.load_mmdit, path, torch.float16, why="'pos_embed' has values too large for .*float16")
    assert sd3.load_mmdit(path, torch.bfloat16)[1]["pos_embed"].max() > 9e4


def test_folders_that_lack_something(folders, tmp_path):
    def copy(name):
        return shutil.copytree(folders["sd3"], tmp_path / name)
    half = copy("half")
    shards = sorted((half / "text_encoder_3").glob("*-of-*"))
    gone = [s.name for s in shards[1::2]]
    for name in gone:
        (half / "text_encoder_3" / name).unlink()
    why = f"{len(gone)} of {len(shards)} shards are missing"
    line = one_line(text_encoders.load_text, str(half), why=why)
    assert gone[0] in line and shards[0].name not in line
    assert text_encoders.load_text(str(half), t5=False).t5xxl is None
    index = "diffusion_pytorch_model.safetensors.index.json"
    for text, why in (("{", "cannot be read"), ("[]", "no table"), ("{}", "no table of shards"),
                      ('{"weight_map": {"a": "../x"}}', "no table of shards"),
                      ('{"weight_map": {"a": 3}}', "no table of shards")):
        (half / "transformer" / index).write_text(text)
        assert index in one_line(sd3.load_mmdit, str(half), why=why)
    swapped = copy("swapped") / "transformer"
    a, b, *_ = sorted(swapped.glob("*-of-*"))
    shutil.copy(a, b)  # the same shard twice
    one_line(sd3.load_mmdit, str(swapped.parent), why=f"{b.name}: .* not in both")
    for name in ("vae", "transformer", "text_encoder", "text_encoder_2"):
        bare = copy(f"no_{name}")
        shutil.rmtree(bare / name)
        call = {"vae": load_vae, "transformer": sd3.load_mmdit}.get(name, text_encoders.load_text)
        one_line(call, str(bare), why="holds no|is missing")
    for file in (tmp_path / "no_vae/transformer").glob("*.safetensors*"):
        file.unlink()
    one_line(sd3.load_mmdit, str(tmp_path / "no_vae"), why="has neither diffusion_pytorch_model.safe")
    (tmp_path / "nothing").mkdir()
    for call in (sd3.load_mmdit, load_vae, header_hash, cli.show):
        one_line(call, str(tmp_path / "nothing"))
    assert not is_public(str(tmp_path / "nothing"))


def test_half_precision_copies_in_a_folder(folders, states, tmp_path):
    """A download of the fp16 copies alone, whole or in shards."""
    folder = shutil.copytree(folders["sd3"], tmp_path / "x")
    index = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    index.rename(index.with_name("diffusion_pytorch_model.safetensors.index.fp16.json"))
    whole = folder / "text_encoder_2/model.safetensors"
    whole.rename(whole.with_name("model.fp16.safetensors"))
    _, state = sd3.load_mmdit(str(folder), F64)
    assert all(torch.equal(state[k], v) for k, v in states["sd3"].items())
    assert text_encoders.load_text(str(folder)).clip_g.cfg.layers == 3


def test_tokenizers_that_do_not_match(states, tokenizers, tmp_path):
    path = single(tmp_path / "a.safetensors", states, "sd3", ALL)
    one_line(text_encoders.load_text, path, why="holds no tokenizer/.*: name a folder of tokenizers")
    other = shutil.copytree(tokenizers, tmp_path / "other")
    vocab = json.loads((other / "tokenizer_2/vocab.json").read_text())
    del vocab["z</w>"]
    for table in (vocab, vocab | {f"more {i}": len(vocab) + i for i in range(2)}):
        (other / "tokenizer_2/vocab.json").write_text(json.dumps(table))
        merges = other / "tokenizer_2/merges.txt"
        merges.write_text("#version: 0.2\n")
        one_line(text_encoders.load_text, path, str(other), why=r"tokenizer_2: \d+ tokens, but .* embeds")
    shutil.rmtree(other / "tokenizer_2")
    one_line(text_encoders.load_text, path, str(other), why="tokenizer_2/vocab.json: no such file")
    shutil.copytree(tokenizers / "tokenizer", other / "tokenizer_2")
    reader = texts.Tokenizer.from_file(str(other / "tokenizer_3/tokenizer.json"))
    reader.add_tokens([f"token{i}" for i in range(200)])
    reader.save(str(other / "tokenizer_3/tokenizer.json"))
    one_line(text_encoders.load_text, path, str(other), why=r"tokenizer_3: \d+ tokens, but .* embeds")
    (other / "tokenizer_3/tokenizer.json").unlink()
    one_line(text_encoders.load_text, path, str(other), why="no such tokenizer.json")


def test_encoders_that_do_not_fit(states, tokenizers, tmp_path):
    path = single(tmp_path / "a.safetensors", states, "sd3", ("vae",))
    one_line(text_encoders.load_text, path, str(tokenizers), why="holds no clip_l: give")
    parts = ("clip_l", "clip_g", "t5xxl")
    for name, key, change, why in (
            ("clip_g", "text_projection.weight", None, "no text_projection.weight"),
            ("clip_l", "text_model.final_layer_norm.bias", None, "1 missing"),
            ("t5xxl", "encoder.embed_tokens.weight", lambda v: v.flip(0), "embed_tokens.weight differ"),
            ("t5xxl", "encoder.block.1.layer.0.layer_norm.weight", None, "1 missing"),
            ("t5xxl", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", None, "no T5 encoder")):
        state = {k: v for k, v in states[name].items() if k != key}
        state |= {key: change(states[name][key])} if change else {}
        path = single(tmp_path / "a.safetensors", {**states, name: state}, "sd3", parts)
        one_line(text_encoders.load_text, path, str(tokenizers), why=why)
    narrow = {k: v[..., :128].clone() if v.ndim == 2 and v.shape[1] == 192 else v[:128].clone() if
              v.shape[0] == 192 else v for k, v in states["t5xxl"].items()}
    path = single(tmp_path / "a.safetensors", {**states, "t5xxl": narrow}, "sd3", parts)
    one_line(text_encoders.load_text, path, str(tokenizers), why="192 wide together, more than T5's 128")


def test_vgg16(tmp_path, capsys):
    """torchvision's file with its classifier, pickled or not; a bomb; a tensor less."""
    net = towers.VGG16()
    state = {**net.state_dict(), "features.24.weight": torch.ones(1), "classifier.0.bias": torch.ones(2)}
    torch.save(state, tmp_path / "vgg.pth")
    cli.convert(str(tmp_path / "vgg.pth"), str(tmp_path / "vgg.safetensors"))
    x = torch.rand(1, 3, 16, 16)
    for name in ("vgg.pth", "vgg.safetensors"):
        ours = towers.load_vgg16(str(tmp_path / name))
        assert all(torch.equal(a, b) for a, b in zip(ours(x), net(x))) and not ours.training
    torch.save({"x": Bomb()}, tmp_path / "bomb.pth")
    torch.save({k: v for k, v in state.items() if k != "features.5.bias"}, tmp_path / "less.pth")
    one_line(towers.load_vgg16, str(tmp_path / "bomb.pth"), why="--vgg: .*bomb.pth: cannot be read")
    one_line(towers.load_vgg16, str(tmp_path / "less.pth"), why="--vgg: .*missing .features.5.bias")
    assert "executed" not in capsys.readouterr().out
    one_line(cli.convert, str(tmp_path / "vgg.pth"), str(tmp_path / "no/x.safetensors"), why="be written")
    assert (tmp_path / "vgg.safetensors").stat().st_mode & 0o777 == 0o644
    assert not list(tmp_path.glob("*.tmp"))


####################################################################################################
# Memory, fingerprints
####################################################################################################

MEASURE = """
import re, sys, threading, time
import torch
from pretrained.sd3 import load_mmdit
from model import MMDiT
from safetensors.torch import load_file

def anonymous():
    with open("/proc/self/status") as f:
        return int(re.search(r"RssAnon:\\s+(\\d+)", f.read())[1]) * 1024

def peak(call):
    found, stop = [], threading.Event()
    def watch():
        while not stop.is_set():
            found.append(anonymous())
            time.sleep(0.0005)
    before = anonymous()
    thread = threading.Thread(target=watch)
    thread.start()
    result = call(lambda: found.append(anonymous()))
    found.append(anonymous())
    stop.set()
    thread.join()
    return max(found) - before, result

def plainly(look):
    net = MMDiT(cfg)
    weights = {k.removeprefix("model.diffusion_model."): v.float() for k, v in load_file(path).items()}
    net.load_state_dict(weights)
    look()  # on a busy core the watcher may have had no turn since
    return net

path = sys.argv[1]
small = load_mmdit(sys.argv[2])  # threads and allocators are warm
ours, (cfg, state) = peak(lambda look: load_mmdit(path))
size = sum(v.nbytes for v in state.values())
del state
theirs, net = peak(plainly)
print(size, ours, theirs)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's memory accounting")
def test_loading_holds_one_copy(states, tmp_path):
    """Memory that is no mapped file, from fp16 to fp32: the model and a tensor, not two models."""
    cfg = replace(SD3, depth=2, heads=8)
    net = randomize(MMDiT(cfg))
    large = single(tmp_path / "large.safetensors", {"x": net.state_dict()}, "x", ())
    small = single(tmp_path / "small.safetensors", states, "sd3", ())
    done = subprocess.run([sys.executable, "-c", MEASURE, large, small], capture_output=True, text=True,
                          cwd=Path(sd3.__file__).parents[1], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    size, ours, theirs = map(int, done.stdout.split())
    assert size > 60e6 and 0.95 * size < ours < 1.15 * size < 1.8 * size < theirs


def test_fingerprints(states, folders, tmp_path):
    path = single(tmp_path / "a.safetensors", states, "sd3")
    seen = [header_hash(p) for p in (path, folders["sd3"], folders["sd3.5"])]
    shutil.copy(path, tmp_path / "copy.safetensors")
    assert header_hash(str(tmp_path / "copy.safetensors")) == seen[0]
    resaved(path, lambda s: s[MM + "final_layer.linear.bias"].add_(0.5))  # one small tensor
    seen.append(header_hash(path))
    seen.append(header_hash(single(path, states, "sd3", mmdit=torch.bfloat16)))
    folder = shutil.copytree(folders["sd3"], tmp_path / "x")
    assert header_hash(str(folder)) == seen[1]
    for file in ("vae/config.json", "tokenizer/merges.txt"):
        (folder / file).write_text((folder / file).read_text() + "\n")
        seen.append(header_hash(str(folder)))
    assert len(set(seen)) == len(seen) == 7
