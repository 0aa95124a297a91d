"""SD3's autoencoder: equal to diffusers' AutoencoderKL in float64, under the published names."""

import hashlib
import re

import pytest
import torch

import pipeline
from pretrained.vae import VAE, VAEConfig

CFG = VAEConfig(width=32, channels=4)
TOLERANCE = 1e-11  # of the largest output; a correct float64 copy reaches 1e-14


def randomize(net, seed=0):
    """Random weights that keep activations near 1, with norms that do something."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            r = torch.randn(p.shape, generator=g, dtype=torch.float64)
            if p.ndim == 1:
                p.copy_(0.2 * r + ("norm" in name and name.endswith("weight")))
            else:
                p.copy_(r * p[0].numel() ** -0.5)
    return net.double()


def error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def picture(h, w, channels=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, h, w, generator=g, dtype=torch.float64)


####################################################################################################
# Parity with diffusers
####################################################################################################

NAMES = [(r"^(en|de)coder\.mid\.block_(\d)", lambda m: f"{m[1]}coder.mid_block.resnets.{int(m[2]) - 1}"),
         (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
         (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
         (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
         (r"\.down\.(\d)\.block\.", r".down_blocks.\1.resnets."),
         (r"\.down\.(\d)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
         (r"\.up\.(\d)\.block\.", lambda m: f".up_blocks.{3 - int(m[1])}.resnets."),
         (r"\.up\.(\d)\.upsample\.", lambda m: f".up_blocks.{3 - int(m[1])}.upsamplers.0."),
         (r"\.nin_shortcut\.", ".conv_shortcut."), (r"\.norm_out\.", ".conv_norm_out.")]


def to_diffusers(weights):
    out = {}
    for key, value in weights.items():
        attention = ".attn_1." in key and ".norm." not in key
        for pattern, name in NAMES:
            key = re.sub(pattern, name, key)
        out[key] = value.flatten(1) if attention and value.ndim == 4 else value
    assert len(out) == len(weights)
    return out


@pytest.fixture
def twin():
    """-> (ours, theirs), float64, equal random weights, every key used once."""
    pytest.importorskip("diffusers")
    from diffusers import AutoencoderKL

    ours = randomize(VAE(CFG)).requires_grad_(False)
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(CFG.width * m for m in CFG.mult), layers_per_block=CFG.blocks,
        latent_channels=CFG.channels, use_quant_conv=False, use_post_quant_conv=False).double()
    theirs.load_state_dict(to_diffusers(ours.state_dict()), strict=True)
    return ours, theirs.eval().requires_grad_(False)


def their_encode(theirs, image, noise=None):
    dist = theirs.encode(image).latent_dist
    z = dist.mode() if noise is None else dist.mean + dist.std * noise
    return (z - 0.0609) * 1.5305


def their_decode(theirs, latents):
    return theirs.decode(latents / 1.5305 + 0.0609).sample


@pytest.mark.parametrize("h, w", [(32, 32), (24, 56)])
def test_encode_equals_diffusers(twin, h, w):
    ours, theirs = twin
    image, noise = picture(h, w), picture(h // 8, w // 8, CFG.channels, seed=2)
    assert ours.encode(image).shape == (2, CFG.channels, h // ours.stride, w // ours.stride)
    assert error(ours.encode(image), their_encode(theirs, image)) < TOLERANCE
    assert error(ours.moments(image)[1], theirs.encode(image).latent_dist.logvar) < TOLERANCE
    sample = ours.encode(image, noise)
    assert error(sample, their_encode(theirs, image, noise)) < TOLERANCE
    assert error(ours.encode(image), sample) > 0.01


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("h, w", [(4, 4), (3, 7)])
def test_decode_and_its_gradient_equal_diffusers(twin, h, w, checkpointed):
    ours, theirs = twin
    ours.checkpoint = checkpointed
    z = picture(h, w, CFG.channels)
    weight = picture(h * 8, w * 8, seed=3)
    results = []
    for call in (ours.decode, lambda x: their_decode(theirs, x)):
        leaf = z.clone().requires_grad_()
        out = call(leaf)
        (out * weight).sum().backward()
        results.append((out.detach(), leaf.grad))
    assert results[0][0].shape == (2, 3, h * 8, w * 8)
    for a, b in zip(*results):
        assert error(a, b) < TOLERANCE


def test_all_gradients_equal_diffusers(twin):
    """Of a sampled latent's decoding, with respect to the picture and, converted, to every parameter."""
    ours, theirs = (net.requires_grad_(True) for net in twin)
    image, noise, weight = picture(16, 24), picture(2, 3, CFG.channels, seed=2), picture(16, 24, seed=3)
    leaves = [image.clone().requires_grad_() for _ in range(2)]
    (ours.decode(ours.encode(leaves[0], noise)) * weight).sum().backward()
    (their_decode(theirs, their_encode(theirs, leaves[1], noise)) * weight).sum().backward()
    assert error(leaves[0].grad, leaves[1].grad) < TOLERANCE
    mine = to_diffusers({n: p.grad for n, p in ours.named_parameters()})
    other = {n: p.grad for n, p in theirs.named_parameters()}
    scale = max(g.abs().max() for g in other.values())
    assert set(mine) == set(other)
    for n in mine:
        assert (mine[n] - other[n]).abs().max() <= TOLERANCE * scale, n


def norm_eps(net):
    for m in net.modules():
        if isinstance(m, torch.nn.GroupNorm):
            m.eps = 1e-5


def unshifted(net):
    net.cfg = VAEConfig(width=32, channels=4, shift=0.0)


def shift_after_scale(net):
    net.cfg = VAEConfig(width=32, channels=4, shift=0.0609 / 1.5305)


def swapped_qk(net):
    for half in (net.encoder, net.decoder):
        half.mid.attn_1.v, half.mid.attn_1.q = half.mid.attn_1.q, half.mid.attn_1.v


def swapped_moments(net):
    """log variance first: only the encoder shows it."""
    conv = net.encoder.conv_out
    for p in (conv.weight, conv.bias):
        p.copy_(torch.cat(p.chunk(2)[::-1]))


MISTAKES = {"GroupNorm eps 1e-5": norm_eps, "latents not shifted": unshifted,
            "shifted after scaling": shift_after_scale, "queries and values swapped": swapped_qk}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_notices(twin, mistake):
    """The smallest of these moves the output by 1e-6."""
    ours, theirs = twin
    MISTAKES[mistake](ours)
    image, z = picture(16, 16), picture(2, 2, CFG.channels)
    assert error(ours.encode(image), their_encode(theirs, image)) > 1e4 * TOLERANCE
    assert error(ours.decode(z), their_decode(theirs, z)) > 1e4 * TOLERANCE


def test_the_comparison_notices_an_encoder_gone_wrong(twin, monkeypatch):
    ours, theirs = twin
    image = picture(16, 16)
    swapped_moments(ours)
    assert error(ours.encode(image), their_encode(theirs, image)) > 0.1
    swapped_moments(ours)
    assert error(ours.encode(image), their_encode(theirs, image)) < TOLERANCE
    for level in ours.encoder.down[:-1]:  # zeros on the left and above instead
        monkeypatch.setattr(level.downsample, "forward", lambda x, conv=level.downsample.conv: conv(
            torch.nn.functional.pad(x, (1, 0, 1, 0))))
    assert error(ours.encode(image), their_encode(theirs, image)) > 0.1


def test_names_and_shapes_of_the_published_checkpoints():
    """sha256 over the sorted lines "name:shape" of first_stage_model.* in the published files."""
    with torch.device("meta"):
        state = VAE().state_dict()
    lines = sorted(f"first_stage_model.{k}:{list(v.shape)}" for k, v in state.items())
    assert len(lines) == 244 and sum(v.numel() for v in state.values()) == 83_819_683
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == \
        "b5fbfffd792b8f62c4e1faa7960bc89d77164e5d27b72544977f18d79ddf38cf"


####################################################################################################
# Memory, precision
####################################################################################################


def kept(vae, z):
    """Bytes that autograd keeps for the backward pass of a decode."""
    seen = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = vae.decode(z)
    weights = {p.untyped_storage().data_ptr() for p in vae.parameters()}
    return out, sum(n for ptr, n in seen.items() if ptr not in weights)


def test_recomputation_keeps_less():
    vae = randomize(VAE(CFG)).requires_grad_(False)
    z = picture(8, 8, CFG.channels).requires_grad_()
    _, plain = kept(vae, z)
    vae.checkpoint = True
    _, less = kept(vae, z)
    assert less < plain / 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precisions(dtype):
    """Weights of any precision; the answer has the input's."""
    vae = randomize(VAE(CFG))
    image, z = picture(16, 16), picture(2, 2, CFG.channels)
    with torch.no_grad():
        right = vae.encode(image), vae.decode(z)
        vae = vae.to(dtype)
        for a, b in zip((vae.encode(image.float()), vae.decode(z.float())), right):
            assert a.dtype == torch.float32
            assert error(a, b) < {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]


def test_autocast_does_not_reach_the_encoder():
    """A sheet is judged under it, and a tile begins there: their latents are those of training."""
    vae, image = randomize(VAE(CFG)).float(), picture(32, 32).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        z = vae.encode(image)
        assert vae.decode(z).dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(z, vae.encode(image))


def test_sides_that_do_not_fit():
    with pytest.raises(SystemExit, match="error: .*20x16.*multiples of 8"):
        VAE(CFG).encode(torch.zeros(1, 3, 20, 16))


def test_pixel_space_has_the_same_interface():
    space, vae = pipeline.PixelSpace(), VAE(CFG)
    for name in ("stride", "channels", "encode", "decode"):
        assert hasattr(space, name) and hasattr(vae, name)
    x = picture(4, 4)
    assert torch.equal(space.decode(space.encode(x)), x)
