"""The networks: equal to diffusers' SD3 in float64, under the published names; text, rewards, LoRA."""

import hashlib
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import model
import rewards
from kernels import joint_attention, modulate, rms_norm
from model import PRESETS, Editor, EditorConfig, MMDiT
from pretrained import towers
from pretrained.sd3 import to_diffusers
from rewards import REWARD_PRESETS
from runs.bench_models import diffusers_twin, randomize, run_twin

SD3 = EditorConfig(depth=3, heads=4, head_dim=16, patch=2, channels=4, pos_max=24, txt_dim=48, vec_dim=40,
                   qk_norm=False, txt_bytes=0)
SD35 = replace(SD3, qk_norm=True, dual=2)
SIZES = {"square": (16, 16), "portrait": (32, 18), "landscape": (18, 46)}
TOLERANCE = 1e-11  # of the largest output; a correct float64 copy reaches 1e-14


####################################################################################################
# Parity with diffusers
####################################################################################################


def inputs(cfg, h=16, w=16, batch=2, txt_len=9, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, cfg.in_channels, h, w), (batch, txt_len, cfg.txt_dim), (batch, cfg.vec_dim))
    x, txt, vec = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    return x, torch.rand(batch, generator=g), txt, vec


def fp64_rms(self, x):
    """diffusers takes RMS statistics in fp32 even of fp64 input, which costs seven digits."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


@pytest.fixture
def twin(monkeypatch):
    """-> (ours, theirs) of a config, float64, equal random weights."""
    normalization = pytest.importorskip("diffusers.models.normalization")
    monkeypatch.setattr(normalization.RMSNorm, "forward", fp64_rms)

    def build(cfg):
        ours = randomize(MMDiT(cfg)).double()
        return ours, diffusers_twin(cfg, ours.state_dict())

    return build


def error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cfg", [SD3, SD35], ids=["sd3", "sd3.5"])
def test_output_equals_diffusers(twin, cfg, size):
    ours, theirs = twin(cfg)
    x, t, txt, vec = inputs(cfg, *SIZES[size])
    with torch.no_grad():
        v = ours(x, t, txt, vec)
        assert v.shape == x.shape and v.abs().max() > 1
        assert error(v, run_twin(theirs, x, t, txt, vec)) < TOLERANCE


@pytest.mark.parametrize("cfg", [SD3, SD35], ids=["sd3", "sd3.5"])
def test_gradients_equal_diffusers(twin, cfg):
    ours, theirs = twin(cfg)
    x, t, txt, vec = inputs(cfg, 16, 10)
    weight = torch.randn_like(x)
    grads = []
    for call in (ours, lambda *z: run_twin(theirs, *z)):
        leaves = [z.clone().requires_grad_() for z in (x, txt, vec)]
        (call(leaves[0], t, *leaves[1:]) * weight).sum().backward()
        grads.append([z.grad for z in leaves])
    for a, b in zip(*grads):
        assert error(a, b) < TOLERANCE
    # the conversion only moves values, so it converts gradients as well as weights
    mine, other = ({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()}
                   for net in (ours, theirs))
    mine = to_diffusers(mine)
    scale = max(g.abs().max() for g in other.values())
    for name in other:
        assert (mine[name] - other[name]).abs().max() < TOLERANCE * scale, name


@pytest.mark.parametrize("cfg", [SD3, SD35], ids=["sd3", "sd3.5"])
def test_conversion_uses_every_key_once(cfg):
    weights = {n: torch.full_like(p, i) for i, (n, p) in enumerate(MMDiT(cfg).state_dict().items())}
    converted = to_diffusers(weights)
    assert sum(p.numel() for p in converted.values()) == sum(p.numel() for p in weights.values())
    assert {p.flatten()[0].item() for p in converted.values()} == set(range(len(weights)))
    split = sum(".qkv." in n for n in weights)  # one key becomes three
    assert len(converted) == len(weights) + 2 * split


def swap_back(weights, layer):
    for kind in ("weight", "bias"):
        weights[f"{layer}.{kind}"] = torch.cat(weights[f"{layer}.{kind}"].chunk(2)[::-1])


def layernorm_eps(theirs, monkeypatch):
    for m in theirs.modules():
        if isinstance(m, torch.nn.LayerNorm):
            m.eps = 1e-5


def qk_eps(theirs, monkeypatch):
    for name, m in theirs.named_modules():
        if name.rpartition(".")[2].startswith("norm_") and hasattr(m, "eps"):
            m.eps = 1e-5


def unswapped(layer):
    def damage(theirs, monkeypatch):
        weights = theirs.state_dict()
        swap_back(weights, layer)
        theirs.load_state_dict(weights)
    return damage


def corner_crop(theirs, monkeypatch):
    def crop(table, h, w):
        side = math.isqrt(table.shape[1])
        return table.view(1, side, side, -1)[:, :h, :w].reshape(1, h * w, -1)
    monkeypatch.setattr(model, "crop_pos", crop)


def exact_gelu(theirs, monkeypatch):
    for block in theirs.transformer_blocks:
        block.ff.net[0].approximate = "none"


MISTAKES = {"final halves not swapped": unswapped("norm_out.linear"),
            "last context halves not swapped": unswapped("transformer_blocks.2.norm1_context.linear"),
            "corner crop": corner_crop, "LayerNorm eps 1e-5": layernorm_eps, "QK norm eps 1e-5": qk_eps,
            "exact GELU": exact_gelu}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_notices(twin, monkeypatch, mistake):
    """The smallest of these mistakes moves the output by 1e-6: float32 would not show it."""
    ours, theirs = twin(SD35)
    MISTAKES[mistake](theirs, monkeypatch)
    z = inputs(SD35)
    with torch.no_grad():
        assert error(ours(*z), run_twin(theirs, *z)) > 1e4 * TOLERANCE


KEYS = {  # sha256 over the sorted lines "name:shape" below model.diffusion_model. of the published files
    "sd3-medium": (491, "66e4ad8f9da0f3449166187c2e546b61cc1d8183b28ac1fb81e2cf2f799a3c72"),
    "sd3.5-medium": (665, "d292e17a2858c295e348bf854499d140c7fd1a897e467696ad4bdd5ca10d00f5"),
}


@pytest.mark.parametrize("preset", KEYS)
def test_names_and_shapes_of_the_published_checkpoints(preset):
    with torch.device("meta"):
        state = MMDiT(PRESETS[preset]).state_dict()
    lines = sorted(f"{k}:{list(v.shape)}" for k, v in state.items())
    assert (len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()) == KEYS[preset]


####################################################################################################
# MMDiT and Editor
####################################################################################################


@pytest.mark.parametrize("h, w", [(1, 1), (6, 6), (5, 3), (2, 6), (6, 1)])
def test_position_window_is_central(h, w):
    table = torch.arange(36.0).view(1, 36, 1)
    top, left = (6 - h) // 2, (6 - w) // 2
    expected = [6 * (top + i) + left + j for i in range(h) for j in range(w)]
    assert model.crop_pos(table, h, w).flatten().tolist() == expected


def test_position_window_larger_than_the_table():
    with pytest.raises(SystemExit, match="error: .*7x6.*6x6"):
        model.crop_pos(torch.zeros(1, 36, 1), 7, 6)


def test_untrained_output_is_zero():
    net = MMDiT(PRESETS["test"])
    assert net(*inputs(PRESETS["test"], dtype=torch.float32)).abs().max() == 0


def test_patches_and_unpatchify_orders():
    """Input patches run (channel, p, q), output patches (p, q, channel)."""
    embed = model.PatchEmbed(2, 3, 12)
    torch.nn.init.zeros_(embed.proj.bias)
    x = torch.randn(2, 3, 4, 6)
    assert torch.allclose(embed(x), embed.proj(x).flatten(2).transpose(1, 2), atol=1e-6)
    embed.proj.weight.data = torch.eye(12).view(12, 3, 2, 2)
    tokens = embed(x).view(2, 6, 3, 2, 2).permute(0, 1, 3, 4, 2).flatten(2)
    assert torch.equal(model.unpatchify(tokens, 2, 3, 2), x)


@pytest.mark.parametrize("preset", ["test", "tiny"])
def test_widening_for_inpainting_changes_nothing(preset):
    base, cfg = randomize(MMDiT(PRESETS[preset])), model.inpainting(PRESETS[preset])
    wide = MMDiT(cfg)
    wide.load_state_dict(model.widen_input(base.state_dict(), cfg.in_channels, "x_embedder.proj.weight"))
    x, t, txt, vec = inputs(cfg, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(wide(x, t, txt, vec), base(x[:, :3].contiguous(), t, txt, vec))
    with pytest.raises(SystemExit, match="error: .*7 input channels"):
        model.widen_input(wide.state_dict(), 3, "x_embedder.proj.weight")


def test_editor_concatenates_noisy_mask_masked():
    cfg = model.inpainting(replace(PRESETS["test"], predict="v"))
    editor = Editor(cfg)
    seen = []
    editor.mmdit.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    x, masked = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    mask = torch.rand(2, 1, 8, 8)
    txt, vec = editor.encode_text(["a", ""])
    editor(x, torch.rand(2), txt, vec, mask, masked)
    editor(x, torch.rand(2), txt, vec)
    assert torch.equal(seen[0], torch.cat([x, mask, masked], 1))
    assert torch.equal(seen[1], torch.cat([x, torch.ones_like(mask), torch.zeros_like(x)], 1))


def test_predicting_x0_is_converted_to_velocity():
    editor = Editor(PRESETS["test"])
    randomize(editor.mmdit)
    x0, noise = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    t = torch.tensor([0.3, 0.9])
    tb = t.view(-1, 1, 1, 1)
    x = (1 - tb) * x0 + tb * noise
    txt, vec = editor.encode_text(["red cube", "blue ball"])
    with torch.no_grad():
        v = editor(x, t, txt, vec)
        assert torch.allclose(x - tb * v, editor.mmdit(x, t, txt, vec), atol=1e-5)
    editor.mmdit.forward = lambda *args: x0  # a network that is right
    assert torch.allclose(editor(x, t, txt, vec), noise - x0, atol=1e-5)
    assert editor(x, torch.zeros(2), txt, vec).isfinite().all()


def test_refinement_sees_x_t_and_the_picture():
    """It starts as nothing; then the picture it makes is its own sum, an EditNet uses its base's, and only
    predictions of x0 have it."""
    cfg = replace(PRESETS["test"], refine=6)
    editor, plain = Editor(cfg), Editor(PRESETS["test"])
    randomize(editor.mmdit)
    plain.load_state_dict({k: v for k, v in editor.state_dict().items() if not k.startswith("refine")})
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.9])
    txt, vec = editor.encode_text(["red cube", "blue ball"])
    with torch.no_grad():
        assert torch.equal(editor(x, t, txt, vec), plain(x, t, txt, vec))
        editor.refine[2].weight.normal_()
        out = editor.mmdit(x, t, txt, vec)
        want = (x - out - editor.refine(torch.cat([out, x], 1))) / t.view(-1, 1, 1, 1)
        assert torch.allclose(editor(x, t, txt, vec), want, atol=1e-4)
        net = model.EditNet(cfg)
        net.attach(editor.state_dict())
        nothing = torch.zeros_like(x), torch.ones_like(x[:, :1])
        assert torch.allclose(net(x, t, txt, vec, *nothing), editor(x, t, txt, vec), atol=1e-5)
    with pytest.raises(ValueError, match="refine=6"):
        replace(cfg, predict="v")


@pytest.mark.parametrize("cfg", [SD3, SD35], ids=["sd3", "sd3.5"])
def test_checkpointing_gives_equal_gradients(cfg):
    net, z = randomize(MMDiT(cfg)), inputs(cfg, dtype=torch.float32)
    grads = []
    for net.checkpoint in (False, True):
        net.zero_grad()
        net(*z).square().mean().backward()
        grads.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_autocast_stays_close_to_fp32():
    for cfg in (SD3, SD35):
        net, z = randomize(MMDiT(cfg)), inputs(cfg, dtype=torch.float32)
        with torch.no_grad():
            exact = net(*z)
            with torch.autocast("cpu", torch.bfloat16):
                rough = net(*z)
        assert error(rough.float(), exact) < 0.05


def test_arch_rebuilds_the_editor():
    editor = Editor(model.inpainting(PRESETS["test"]))
    assert model.build_editor(editor.arch).cfg == editor.cfg
    with pytest.raises(SystemExit, match="error: .*'reward'"):
        model.build_editor({"kind": "reward"})
    with pytest.raises(SystemExit, match="error: .*colour"):
        model.build_editor({**editor.arch, "colour": 1})


####################################################################################################
# Text
####################################################################################################


def test_byte_text_reads_any_caption():
    captions = ["", "a red cube", "été 東京 🙂", "🙂" * 25_000, "x" * 100_000, "a\0b\n\t"]
    text = model.ByteText(30, 32, 48)
    ids = text.tokenize(captions)
    assert ids.dtype == torch.uint8 and ids.shape == (len(captions), 30)
    assert ids[0].sum() == 0 and bytes(ids[1, :10].tolist()) == b"a red cube"
    for row in ids:
        bytes(row.tolist()).rstrip(b"\0").decode()  # raises where a cut left half a character
    assert bytes(ids[3].tolist()).rstrip(b"\0").decode() == "🙂" * 7
    txt, vec = model.ByteText(128, 32, 48)(model.ByteText(128, 32, 48).tokenize(captions))
    assert txt.shape == (len(captions), 32, 32) and vec.shape == (len(captions), 48)
    assert txt.isfinite().all() and vec.isfinite().all()


def test_byte_text_reads_words():
    text = model.ByteText(48, 32, 32)
    share = text.words(text.tokenize(["a red  cube", "x" * 40, "", "a " * 24]))             # [4, W, N]
    bytes_of = [[row.nonzero().flatten().tolist() for row in caption if row.any()] for caption in share]
    assert bytes_of[0] == [[0], [2, 3, 4], [7, 8, 9, 10]]
    assert sorted(sum(bytes_of[1], [])) == list(range(40)) and len(bytes_of[1]) == 4  # cut every 12 bytes
    assert bytes_of[2] == []
    assert sorted(sum(bytes_of[3], [])) == list(range(0, 48, 2))  # the last token takes the rest
    total = share.sum(-1)
    assert torch.allclose(total, (total > 0).float())


def test_byte_text_tells_captions_apart():
    txt, vec = Editor(PRESETS["tiny"]).encode_text(["a red cube", "a red cube", "a red cone", ""])
    assert torch.allclose(txt[0], txt[1], atol=1e-6)
    assert (txt[0] - txt[2]).abs().max() > 1e-3 and (vec[0] - vec[2]).abs().max() > 1e-3
    assert (vec[0] - vec[3]).abs().max() > 1e-3


####################################################################################################
# Reward models
####################################################################################################


def imagereward_keys(vit_depth=24, txt_depth=12):
    """The layout of ImageReward.pt without its unused projections and position_ids buffer."""
    wb = ("weight", "bias")
    keys = {"blip.visual_encoder.cls_token", "blip.visual_encoder.pos_embed"}
    keys |= {f"blip.visual_encoder.{m}.{k}" for m in ("patch_embed.proj", "norm") for k in wb}
    keys |= {f"blip.visual_encoder.blocks.{i}.{m}.{k}" for i in range(vit_depth) for k in wb
             for m in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")}
    emb = "blip.text_encoder.embeddings"
    keys |= {f"{emb}.word_embeddings.weight", f"{emb}.position_embeddings.weight"}
    keys |= {f"{emb}.LayerNorm.{k}" for k in wb}
    parts = [f"{a}.{m}" for a in ("attention", "crossattention")
             for m in ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")]
    parts += ["intermediate.dense", "output.dense", "output.LayerNorm"]
    layer = "blip.text_encoder.encoder.layer"
    keys |= {f"{layer}.{i}.{m}.{k}" for i in range(txt_depth) for m in parts for k in wb}
    return keys | {f"mlp.layers.{i}.{k}" for i in (0, 2, 4, 6, 7) for k in wb}


def test_imagereward_names_and_sizes():
    with torch.device("meta"):
        net = rewards.PreferenceReward(REWARD_PRESETS["imagereward"])
    state = net.state_dict()
    assert set(state) == imagereward_keys()
    count = {p: sum(v.numel() for k, v in state.items() if k.startswith(p))
             for p in ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")}
    assert list(count.values()) == [303_301_632, 141_977_088, 927_969]
    assert state["blip.visual_encoder.pos_embed"].shape == (1, 197, 1024)
    assert state["blip.text_encoder.encoder.layer.3.crossattention.self.key.weight"].shape == (768, 1024)
    assert state["blip.text_encoder.encoder.layer.3.attention.self.key.weight"].shape == (768, 768)


def reward_inputs(cfg, batch=3, h=None, w=None):
    g = torch.Generator().manual_seed(0)
    image = torch.rand(batch, 3, h or cfg.image_size, w or cfg.image_size, generator=g) * 2 - 1
    ids = torch.randint(0, cfg.vocab, (batch, cfg.txt_len), generator=g)
    return image, ids, torch.ones_like(ids)


def test_text_and_vision_towers_equal_transformers():
    """Our BERT with cross-attention and ViT against transformers' BLIP, weights copied by name."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    cfg = REWARD_PRESETS["test"]
    ours = randomize(rewards.PreferenceReward(cfg)).eval().double()
    theirs = BlipTextModel(transformers.BlipTextConfig(
        vocab_size=cfg.vocab, hidden_size=cfg.txt_width, encoder_hidden_size=cfg.vit_width,
        intermediate_size=cfg.txt_hidden, num_hidden_layers=cfg.txt_depth, num_attention_heads=cfg.txt_heads,
        max_position_embeddings=cfg.positions, hidden_act="gelu", layer_norm_eps=1e-12,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0), add_pooling_layer=False).eval().double()
    missing, unexpected = theirs.load_state_dict(ours.blip["text_encoder"].state_dict(), strict=False)
    assert not unexpected and all("position_ids" in k for k in missing)
    _, ids, attend = reward_inputs(cfg)
    attend[1, 20:] = 0
    img = torch.randn(3, 17, cfg.vit_width, dtype=torch.float64)
    with torch.no_grad():
        a = ours.blip["text_encoder"](ids, attend, img)
        b = theirs(input_ids=ids, attention_mask=attend, encoder_hidden_states=img,
                   is_decoder=False).last_hidden_state
    assert error(a, b) < 1e-5  # their mask is -10000 or the dtype's minimum, depending on the version


def test_preference_reward_reads_both_picture_and_caption():
    cfg = REWARD_PRESETS["test"]
    net = rewards.PreferenceReward(cfg).eval()
    image, ids, attend = reward_inputs(cfg)
    image.requires_grad_()
    score = net(image, ids, attend)
    assert score.shape == (3,)
    score.sum().backward()
    assert image.grad.abs().amax((1, 2, 3)).min() > 0
    with torch.no_grad():
        assert (net(image, ids.flip(0), attend) - score).abs().max() > 1e-4
        changed, short = ids.clone(), attend.clone()
        changed[:, 10:], short[:, 10:] = 7, 0  # padding is not read
        assert torch.allclose(net(image, changed, short), net(image, ids, short), atol=1e-5)


@pytest.mark.parametrize("h, w", [(64, 64), (20, 48), (50, 33)])
def test_preference_reward_takes_any_size(h, w):
    cfg = REWARD_PRESETS["test"]
    net = rewards.PreferenceReward(cfg).eval()
    image, ids, attend = reward_inputs(cfg, 1, h, w)
    image.requires_grad_()
    net(image, ids, attend).sum().backward()
    assert image.grad.isfinite().all() and image.grad.abs().max() > 0


def test_vit_position_table_is_resized():
    vit = towers.ViT(4, 4, 32, 1, 2)
    assert vit(torch.randn(1, 3, 16, 16)).shape == (1, 17, 32)
    assert vit(torch.randn(1, 3, 24, 12)).shape == (1, 19, 32)


@pytest.mark.parametrize("h, w", [(32, 32), (16, 48), (64, 36)])
def test_coherence_scores_every_pixel(h, w):
    net = rewards.CoherenceReward(rewards.CoherenceConfig(width=32, depth=1, heads=2))
    x = torch.randn(2, 3, h, w)
    y = net(x)
    assert y.shape == (2, 1, h, w) and y.dtype == torch.float32
    net.vit.blocks = torch.nn.ModuleList()  # without attention a token sees its own patch only
    other = x.clone()
    other[:, :, 4:8, 8:12] += 1
    changed = (net(other) - net(x)).abs().sum((0, 1)) > 0
    assert changed[4:8, 8:12].any()
    changed[4:8, 8:12] = False
    assert not changed.any()


def test_head_initialisation_keeps_gradients_alive():
    """ImageReward's own initialisation is the plateau at 0.6931: gradients below Adam's eps."""
    size, head = {}, rewards.RewardHead(768).eval()
    for original in (False, True):
        torch.manual_seed(0)
        head.init_weights(original)
        cls = F.layer_norm(torch.randn(8, 2, 768), (768,)).requires_grad_()
        better, worse = head(cls).unbind(1)
        F.softplus(worse - better).mean().backward()
        size[original] = cls.grad.abs().max().item()
        if original:
            assert head.layers[0].weight.std().item() == pytest.approx(1 / 769, rel=0.01)
            assert head.layers[7].weight.abs().max().item() < 5 / 769
    assert size[True] < 1e-9 and size[False] > 1e-4
    for original in (False, True):
        layer = rewards.PreferenceReward(REWARD_PRESETS["test"], original_init=original).mlp.layers[2]
        assert layer.weight.std().item() == pytest.approx(1 / 33 if original else 1 / 32, rel=0.01)


####################################################################################################
# LoRA, parameter groups
####################################################################################################


def test_lora_is_zero_at_first_and_trains_only_its_own():
    editor = Editor(PRESETS["test"])
    randomize(editor.mmdit)
    plain = {k: v.clone() for k, v in editor.state_dict().items()}
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    with torch.no_grad():
        txt, vec = editor.encode_text(["a", "b"])
        before = editor(x, t, txt, vec)
    model.add_lora(editor, 4)
    assert torch.equal(editor(x, t, txt, vec), before)
    merged = model.merged_state(editor)
    assert merged.keys() == plain.keys() and all(torch.equal(merged[k], plain[k]) for k in plain)

    editor(x, t, txt, vec).square().mean().backward()
    trained = {n for n, p in editor.named_parameters() if p.requires_grad}
    assert trained and all(n.endswith((".A", ".B")) for n in trained)
    assert trained == {n for n, p in editor.named_parameters() if p.grad is not None}
    linears = [n for n, m in editor.named_modules() if n.endswith((".qkv", ".proj", ".fc1", ".fc2"))]
    assert len(trained) == 2 * sum("joint_blocks" in n for n in linears)


def test_merged_lora_equals_the_adapted_model():
    editor = Editor(PRESETS["test"])
    randomize(editor.mmdit)
    model.add_lora(editor, 4)
    with torch.no_grad():
        for n, p in editor.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    merged = Editor(PRESETS["test"])
    merged.load_state_dict(model.merged_state(editor), strict=True)
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    with torch.no_grad():
        txt, vec = editor.encode_text(["a", "b"])
        assert torch.allclose(merged(x, t, txt, vec), editor(x, t, txt, vec), atol=1e-6)
        randomized = editor(x, t, txt, vec)
        assert (Editor(PRESETS["test"])(x, t, txt, vec) - randomized).abs().max() > 1e-3


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_param_groups_cover_each_trainable_parameter_once(lora):
    editor = Editor(replace(PRESETS["test"], learn_pos=False))
    if lora:
        model.add_lora(editor, 2)
    groups = model.param_groups(editor, 0.1)
    got = [id(p) for g in groups for p in g["params"]]
    assert sorted(got) == sorted(id(p) for p in editor.parameters() if p.requires_grad)
    names = {id(p): n for n, p in editor.named_parameters()}
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    assert decayed and not any(n.endswith("bias") or "ln_" in n or "pos" in n for n in decayed)
    torch.optim.AdamW(groups, lr=1e-3)


def test_muon_groups_hold_the_matrices_of_blocks_only():
    net = model.EditNet(PRESETS["test"])
    *others, group = model.param_groups(net, 0.1, muon=True)
    names = {id(p): n for n, p in net.named_parameters()}
    found = {names[id(p)] for p in group["params"]}
    assert group["muon"] and not any("muon" in g for g in others)
    assert {"branch.1.x_block.mlp.fc2.weight", "base.mmdit.joint_blocks.0.context_block.attn.qkv.weight",
            "text.blocks.1.attn.proj.weight"} <= found
    assert all(p.ndim == 2 for p in group["params"]) and not any("adaLN" in n or "embed" in n for n in found)
    got = [id(p) for g in (*others, group) for p in g["params"]]
    assert sorted(got) == sorted(id(p) for p in net.parameters() if p.requires_grad)


####################################################################################################
# Fused operations against their references, with gradients
####################################################################################################


def gradients(fn, *tensors):
    """-> [result, gradient of each tensor] under a fixed random weighting of the result."""
    leaves = [z.detach().clone().requires_grad_() for z in tensors]
    out = fn(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (out * weight.to(out.dtype)).sum().backward()
    return [out.detach(), *(z.grad for z in leaves)]


@pytest.mark.parametrize("lengths", [(5, 9), (1, 1), (60, 300), (3, 4, 5)])
def test_joint_attention_over_streams(lengths):
    """Both of the CPU's paths: 360 tokens in fp64 take the fused kernel, the others two products."""
    qkv = [torch.randn(2, n, 3, 2, 16, dtype=torch.float64) for n in lengths]

    def joint(*streams):
        q, k, v = zip(*(s.unbind(2) for s in streams))
        return torch.cat(joint_attention(list(q), list(k), list(v)), 1)

    def plain(*streams):
        q, k, v = (z.transpose(1, 2) for z in torch.cat(streams, 1).unbind(2))
        return ((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2)

    for a, b in zip(gradients(joint, *qkv), gradients(plain, *qkv)):
        assert torch.allclose(a, b, atol=1e-10)


def test_joint_attention_of_a_stream_that_only_lends():
    q, k, v = ([torch.randn(2, n, 2, 8) for n in (4, 7)] for _ in range(3))
    both, (none, out) = joint_attention(q, k, v), joint_attention([None, q[1]], k, v)
    assert none is None and torch.allclose(out, both[1], atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rms_norm(dtype, tolerance):
    x = torch.randn(3, 5, 3, 2, 24, dtype=torch.float64).to(dtype)[:, :, 1]  # strided, as q is
    weight = 1 + 0.3 * torch.randn(24, dtype=torch.float64)
    weight = weight if dtype == torch.float64 else weight.float()
    exact = gradients(lambda x, w: F.rms_norm(x, (24,), w, 1e-6), x.double(), weight.double())
    got = gradients(lambda x, w: rms_norm(x, w, 1e-6), x, weight)
    assert [z.dtype for z in got] == [dtype, dtype, weight.dtype]
    assert all(error(a.double(), b) < tolerance for a, b in zip(got, exact))


def test_rms_norm_goes_backward_twice():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    out = rms_norm(x, weight, 1e-6).square().sum()
    first = torch.autograd.grad(out, [x, weight], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(out, [x, weight])))


def test_modulate():
    x, shift, scale = torch.randn(3, 7, 32), torch.randn(3, 32), torch.randn(3, 32)
    centred = x - x.mean(-1, keepdim=True)
    h = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(modulate(x, shift, scale), h * (1 + scale[:, None]) + shift[:, None], atol=1e-5)
    rough = modulate(x, shift.bfloat16(), scale.bfloat16())
    assert rough.dtype == torch.bfloat16 and error(rough.float(), modulate(x, shift, scale)) < 0.02


def test_blocks_are_compiled_once_for_all_depths():
    """Graphs traced for 3 and for 6 blocks: one of the first ones, one of the last one, those of the text."""
    traced = {}
    for depth in (3, 6):
        torch.manual_seed(0)
        editor = Editor(replace(PRESETS["test"], depth=depth))
        for p in editor.parameters():
            torch.nn.init.normal_(p, std=0.1)
        x, t = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.8])
        plain = editor(x, t, *editor.encode_text(["a red cube", "x"]))
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model.compile_blocks(editor, "eager")
        assert torch.equal(editor(x, t, *editor.encode_text(["a red cube", "x"])), plain)
        traced[depth] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    assert traced[3] == traced[6] <= 4, traced


@pytest.mark.parametrize("dual", [0, 1])
def test_shared_queries_and_keys(dual):
    """A row that shares with itself changes nothing; one that shares with another takes its queries and keys
    in every attention of the image tokens, and no value: the reference swaps them by hand."""
    torch.manual_seed(0)
    cfg = model.EditorConfig(depth=2, heads=2, head_dim=8, patch=2, channels=3, pos_max=8, txt_dim=16,
                             vec_dim=16, dual=dual, qk_norm=True)
    net = model.MMDiT(cfg)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.6, 0.6])
    txt, vec = torch.randn(2, 5, 16), torch.randn(2, 16)
    own, share = net(x, t, txt, vec), torch.tensor([0, 0])
    assert torch.equal(net(x, t, txt, vec, torch.tensor([0, 1])), own)
    got = net(x, t, txt, vec, share)
    assert torch.equal(got[0], own[0]) and (got[1] - own[1]).abs().max() > 1e-3

    def swapped(attn):
        plain = attn.forward
        return lambda y: (lambda q, k, v: (q[share], k[share], v))(*plain(y))

    for block in net.joint_blocks:
        for name in ("attn", "attn2")[:1 + block.x_block.dual]:
            attn = getattr(block.x_block, name)
            attn.forward = swapped(attn)
    assert torch.equal(net(x, t, txt, vec), got)
