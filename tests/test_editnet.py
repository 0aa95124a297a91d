"""EditNet and its variants: they begin as their base, and differ in exactly what the paper says they do."""

from dataclasses import replace

import pytest
import torch

import checkpoint
import common
import flow
import model
import pipeline
from runs.bench_models import randomize

PLAIN = replace(model.PRESETS["test"], predict="v")
BASES = {"text to image": PLAIN, "inpainting, x0": model.inpainting(model.PRESETS["test"]),
         "qk norm, dual": replace(PLAIN, qk_norm=True, dual=1)}
NETS = {"editnet": ("editnet", False), "attend": ("attend", False), "cached": ("editnet", True),
        "controlnet": ("controlnet", False), "textcontrol": ("textcontrol", False),
        "concat": ("concat", False)}
TEXT = ["remove the red circle", "turn the star green"]


def build(name: str, cfg=PLAIN, trained: bool = True, start: str = "picture") -> model.EditNet:
    """A variant on a base with random weights; `trained`: its own weights are random as well."""
    torch.manual_seed(0)
    base = randomize(model.Editor(cfg))
    variant, cached = NETS[name]
    net = model.EditNet(cfg, variant, cached)
    net.attach(base.state_dict(), start)
    if trained:
        g = torch.Generator().manual_seed(1)
        for n, p in net.named_parameters():
            if not n.startswith("base.") and p.requires_grad:
                p.data += 0.1 * torch.randn(p.shape, generator=g)
    return net.double()


def inputs(h=16, w=24, seed=2):
    g = torch.Generator().manual_seed(seed)
    x, src = (torch.randn(2, 3, h, w, generator=g, dtype=torch.float64) for _ in range(2))
    return x, torch.tensor([0.3, 0.9], dtype=torch.float64), src, \
        torch.rand(2, 1, h, w, generator=g, dtype=torch.float64)


def run(net, x, t, src, region, text=TEXT, **kw):
    with torch.no_grad():
        return net(x, t, *net.encode_text(text), src, region, **kw)


def test_source_tokens_begin_as_the_base_sees_a_picture_or_what_a_mask_leaves():
    """With start="masked" they are what the base's first layer makes of a known picture beside x = 0."""
    cfg = BASES["inpainting, x0"]
    x, t, src, region = inputs()
    for start, seen in (("picture", (src, torch.zeros_like(region), torch.zeros_like(src))),
                        ("masked", (torch.zeros_like(src), torch.zeros_like(region), src))):
        for name in ("editnet", "attend"):
            net = build(name, cfg, trained=False, start=start)
            embedder = net.base.mmdit.x_embedder
            assert torch.allclose(net.source_tokens(src, region), embedder(torch.cat(seen, 1)), atol=1e-12)
            assert torch.equal(run(net, x, t, src, region),
                               net.base(x, t, *net.base.encode_text(TEXT)).detach())
    with pytest.raises(SystemExit, match="error: --source_start: masked: the base was not trained for holes"):
        build("editnet", PLAIN, start="masked")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("cfg", BASES.values(), ids=BASES)
@pytest.mark.parametrize("name", NETS)
def test_untrained_is_its_base_bit_for_bit(name, cfg, dtype):
    net = build(name, cfg, trained=False).to(dtype)
    x, t, src, region = (z.to(dtype) for z in inputs())
    with torch.no_grad():
        txt, vec = net.encode_text(TEXT)
        ours, base = net(x, t, txt, vec, src, region), net.base(x, t, *net.base.encode_text(TEXT))
    assert base.abs().max() > 0.1
    assert torch.equal(ours, base)


@pytest.mark.parametrize("name", NETS)
def test_source_region_and_instruction_matter_once_trained(name):
    net, (x, t, src, region) = build(name), inputs()
    out = run(net, x, t, src, region)
    for other in (run(net, x, t, src.flip(-1), region), run(net, x, t, src, 1 - region),
                  run(net, x, t, src, region, ["make it a sketch", "turn the star blue"])):
        assert (out - other).abs().max() > 1e-3
    assert (out - net.base(x, t, *net.base.encode_text(TEXT))).abs().max() > 1e-2


@pytest.mark.parametrize("name", [n for n in NETS if n != "concat"])
def test_branch_off_is_the_base(name):
    net, (x, t, *_) = build(name), inputs()
    fresh = build(name, trained=False)
    text = net.base.encode_text(TEXT)
    assert torch.equal(net.base(x, t, *text), fresh.base(x, t, *text))


def branch_inputs(net, *args):
    """What the second control block reads: (image tokens, text tokens), the source's left out."""
    seen = []
    handle = net.branch[1].register_forward_pre_hook(lambda _, a: seen.append((a[0][:, :24], a[1])))
    run(net, *args)
    handle.remove()
    return seen[-1]  # a cached net runs its blocks for the source first


@pytest.mark.parametrize("name, follows", [("editnet", True), ("cached", True), ("controlnet", False),
                                           ("textcontrol", False)])
def test_only_editnet_reads_the_base_as_it_goes(name, follows):
    """Paper Sec. 3.3: ControlNet's branch runs in parallel, without the base's intermediate tokens."""
    net, args = build(name), inputs()
    img, txt = branch_inputs(net, *args)
    with torch.no_grad():
        net.base.mmdit.joint_blocks[0].x_block.mlp.fc2.weight.mul_(1.5)
        net.base.mmdit.joint_blocks[0].context_block.mlp.fc2.weight.mul_(1.5)
    img2, txt2 = branch_inputs(net, *args)
    assert torch.equal(img, img2) != follows
    assert torch.equal(txt, txt2) != follows


@pytest.mark.parametrize("name, writes", [("editnet", True), ("textcontrol", True), ("controlnet", False)])
def test_who_changes_the_text(name, writes):
    """Paper Sec. 5.2: ControlNet cannot update the text tokens; TextControl and EditNet do."""
    net, (x, t, src, region) = build(name), inputs()
    for layer in (*net.img_out, *getattr(net, "src_out", ())):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    changed = (run(net, x, t, src, region) - run(net, x, t, src.flip(-1), region)).abs().max()
    assert (changed > 1e-4) == writes


@pytest.mark.parametrize("name", ["editnet", "cached"])
def test_source_tokens_write_at_their_place(name):
    """Through the last block's src_out alone, which nothing mixes any more, a change of one source patch
    changes that token's output most by far: the others see it through the branch's attention only."""
    net, (x, t, src, region) = build(name), inputs()
    for layer in (*net.img_out, *net.txt_out, *net.src_out[:-1]):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    other, p = src.clone(), PLAIN.patch
    other[..., p:2 * p, :p] += 1
    change = (run(net, x, t, src, region) - run(net, x, t, other, region)).abs().sum(1, keepdim=True)
    patches = torch.nn.functional.avg_pool2d(change, p).mean((0, 1))
    rest = patches.clone()
    rest[1, 0] = 0
    assert patches[1, 0] > 3 * rest.max()


def test_cached_source_does_not_see_noise_or_time():
    net, (x, t, src, region) = build("cached"), inputs()
    text = net.encode_text(TEXT)
    memory = net.remember(*text, src, region)
    assert len(memory) == PLAIN.depth
    assert torch.equal(net(x, t, *text, src, region), net(x, t, *text, src, region, memory))
    # the same memory serves another noise and another time
    y, s = x.flip(-2), t.flip(0)
    assert torch.equal(net(y, s, *text, src, region), net(y, s, *text, src, region, memory))
    other = net.remember(*text, src.flip(-1), region)
    assert (net(x, t, *text, src, region, memory) - net(x, t, *text, src, region, other)).abs().max() > 1e-3


def test_concat_is_a_wider_first_convolution():
    """Two embeddings that are added are one convolution over concatenated channels."""
    net, (x, t, src, region) = build("concat"), inputs()
    wide = model.MMDiT(replace(PLAIN, channels=7)).double()  # 3 noisy, 3 source, 1 region
    weights = {k: v for k, v in net.base.mmdit.state_dict().items() if not k.startswith("final_layer.linear")}
    first, second = net.base.mmdit.x_embedder.proj, net.src_embedder.proj
    weights["x_embedder.proj.weight"] = torch.cat([first.weight, second.weight], 1)
    weights["x_embedder.proj.bias"] = first.bias + second.bias
    wide.load_state_dict(weights, strict=False)
    wide.final_layer.linear = net.base.mmdit.final_layer.linear
    img, txt, c = wide.embed(torch.cat([x, src, region], 1), t, *net.encode_text(TEXT))
    for block in wide.joint_blocks:
        img, txt = block(img, txt, c)
    with torch.no_grad():
        out = model.unpatchify(wide.final_layer(img, c), 4, 6, 4)
    assert (out - run(net, x, t, src, region)).abs().max() < 1e-12


def test_gradients_reach_every_weight_that_trains():
    for name in NETS:
        net, (x, t, src, region) = build(name), inputs()
        net.base.requires_grad_(name == "concat")
        net(x, t, *net.encode_text(TEXT), src, region).square().sum().backward()
        missing = {n for n, p in net.named_parameters() if p.requires_grad and p.grad is None}
        # captions are read by the base's own encoder; SD3.5's last text has a norm that it never uses
        unused = ("base.text.", "context_block.attn.ln_q.weight")
        assert all(n.startswith(unused[0]) or n.endswith(unused[1]) for n in missing), (name, missing)


@pytest.mark.parametrize("name", ["editnet", "cached"])
def test_checkpointing_changes_nothing(name):
    """But what is held for the backward pass: of a cached source's pass, too."""
    net, (x, t, src, region) = build(name), inputs()
    grads, held = [], []

    def hold(value):
        held[-1] += value.nbytes
        return value

    for on in (False, True):
        net.base.mmdit.checkpoint = on
        net.zero_grad()
        text = net.encode_text(TEXT)
        held.append(0)
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda value: value):
            net.remember(*text, src, region) if net.cached else net(x, t, *text, src, region)
        net(x, t, *text, src, region).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and held[1] < held[0] / 2
    for n in grads[0]:
        torch.testing.assert_close(grads[0][n], grads[1][n], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["editnet", "cached", "concat"])
def test_dual_guidance_is_the_three_forwards(name):
    net, (x, t, src, region) = build(name), inputs()
    text, null = net.encode_text(TEXT), net.encode_text(["", ""])
    guided = pipeline.denoiser(net, TEXT, (src, region), 5.0, 1.5)(x, t)
    guided = flow.euler_step(torch.zeros_like(x), guided, 0.0, 1.0)
    none = net(x, t, *null, torch.zeros_like(src), torch.ones_like(region))
    image, both = net(x, t, *null, src, region), net(x, t, *text, src, region)
    expected = none + 1.5 * (image - none) + 5.0 * (both - image)
    assert (guided - expected).abs().max() < 1e-4 * expected.abs().max()


def test_lora_on_the_base_is_saved_as_plain_weights_and_resumes(tmp_path):
    net = build("editnet", trained=False).float()
    model.add_lora(net.base, 4)
    ema = common.EMA(net, 0.5)
    for p in net.parameters():
        if p.requires_grad:
            p.data += 0.05
    ema.update()
    opt = torch.optim.SGD([p for p in net.parameters() if p.requires_grad])
    state = {"model": net, "ema": ema, "optimizer": opt}
    tensors = checkpoint.tensors_of(state)
    plain = model.EditNet(PLAIN)
    plain.load_state_dict(tensors["model"])
    x, t, src, region = (z.float() for z in inputs())
    torch.testing.assert_close(run(plain, x, t, src, region), run(net, x, t, src, region))
    again = build("editnet", trained=False).float()
    model.add_lora(again.base, 4)
    restored = common.EMA(again, 0.5)
    fresh = torch.optim.SGD([p for p in again.parameters() if p.requires_grad])
    assert checkpoint.save(tmp_path, 1, state, {})
    checkpoint.resume(tmp_path, {"model": again, "ema": restored, "optimizer": fresh})
    for a, b in zip(ema.average, restored.average):
        assert torch.equal(a, b)
    assert torch.equal(run(again, x, t, src, region), run(net, x, t, src, region))


def test_bad_architectures_are_one_line():
    for call, word in ((lambda: model.EditNet(PLAIN, "controlnet", cached=True), "cache"),
                       (lambda: model.EditNet(PLAIN, "other"), "variant"),
                       (lambda: model.build_editnet({"kind": "editor"}, "x"), "--stage edit")):
        with pytest.raises(SystemExit, match=word):
            call()


def test_shapes_of_any_aspect():
    net = build("editnet")
    for h, w in ((8, 32), (32, 8), (12, 20)):
        x, t, src, region = inputs(h, w)
        assert run(net, x, t, src, region).shape == x.shape
