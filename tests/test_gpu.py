"""What only a GPU can show, in two minutes on one:

    TRITON_INTERPRET=0 python -m pytest -q -m "not slow" tests/test_gpu.py

Without TRITON_INTERPRET=0 the same tests run at toy sizes on the CPU, the kernels in Triton's interpreter:
then they test themselves, and skip what has no meaning there. With it and no GPU all are skipped.
"""

import contextlib
import copy
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from trained import shipped

import common
import flow
import model
import pipeline
import rewards
import train_omni
import train_pefl
from common import clip_grad_norm
from kernels import attention, blend, dispatch
from kernels.selftest import widen_interpreted_dots
from runs import memory

ROOT = Path(train_omni.__file__).parent
ON_GPU = torch.cuda.is_available() and not dispatch.interpreted()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
STEPS = 20 if ON_GPU else 2
PRECISION = "bf16" if ON_GPU else "fp32"

pytestmark = [pytest.mark.skipif(not (ON_GPU or dispatch.interpreted()), reason="no GPU, no interpreter"),
              pytest.mark.usefixtures("one_thread_and_own_signals")]
gpu = pytest.mark.skipif(not ON_GPU, reason="no GPU, or TRITON_INTERPRET is not 0")
LONG = [] if ON_GPU else [pytest.mark.slow]  # interpreted


@pytest.fixture(autouse=True)
def fresh():
    """Decisions as at the start of a process."""
    dispatch._decide.cache_clear()
    if ON_GPU:
        dispatch.newer_ptxas(dispatch.architecture(DEVICE))  # for kernels that run without a decision, too
    else:
        widen_interpreted_dots()


class Counted:
    """A kernel, whose launches kernel[grid](...) are counted under its name."""

    def __init__(self, kernel, name, count):
        self.kernel, self.name, self.count = kernel, name, count

    def __getitem__(self, grid):
        self.count[self.name] += 1
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch):
    count = Counter()
    for name in ("_inverse_rms", "_normalise", "_forward", "_backward_q", "_backward_kv"):
        monkeypatch.setattr(attention, name, Counted(getattr(attention, name), name, count))
    for name in ("forward_kernel", "backward_kernel"):
        monkeypatch.setattr(blend, name, Counted(getattr(blend, name), name, count))
    return count


def kernels_on():
    """On a GPU nothing: the decision is dispatch's own."""
    return contextlib.nullcontext() if ON_GPU else dispatch.force("triton")


def kernels_off():
    return dispatch.force("reference")


def close(got, want, bound):
    got, want = got.double().cpu(), want.double().cpu()
    error = (got - want).norm() / want.norm()
    assert error < bound, f"{error:.2e}"  # NaN is never below


####################################################################################################
# Kernels
####################################################################################################

# tokens of text, image, source, as in kernels/bench.py; head dim, norms, bias
SHAPES = {"tiny": ((24, 64), 64, False, False), "tiny edit": ((24, 64, 64), 64, True, False),
          "sd3 512": ((154, 1024), 64, False, False), "sd3 1024": ((333, 4096), 64, False, False),
          "sd3.5 1024": ((333, 4096), 64, True, False), "edit 1024": ((333, 4096, 4096), 64, True, False),
          "region 1024": ((333, 4096, 4096), 64, True, True), "heads of 128": ((333, 4096), 128, True, True)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=gpu)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_at_real_shapes(shape, dtype, launches):
    """Outputs and gradients against plain torch in fp64, and the same bits twice."""
    lengths, head_dim, norm, bias = SHAPES[shape]
    if not ON_GPU:
        lengths, dtype = (5, 9, 3)[:len(lengths)], torch.float32
    assert attention.worst_error(DEVICE, dtype, head_dim, norm, bias, lengths, 2 if ON_GPU else 1) <= 1
    assert launches["_forward"] == launches["_backward_q"] == launches["_backward_kv"] == 2
    assert (launches["_normalise"] > 0) == norm


@pytest.mark.parametrize("v_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_of_the_sampler_is_the_cpus_to_the_bit(v_dtype, launches):
    shape = (4, 16, 128, 128) if ON_GPU else (2, 3, 7, 9)
    g = torch.Generator().manual_seed(0)
    x, start, known, noise, *v = torch.randn(7, *shape, generator=g)
    given = dict(start=start, known=known, noise=noise, mask=torch.rand(len(x), 1, *shape[2:], generator=g))
    v, weights = [z.to(v_dtype) for z in v], [5.0, -3.5, -0.5]
    with dispatch.force("reference"):
        want = blend.masked_step(x, v, 0.7, 0.65, weights, **given)
    with dispatch.force("triton"):
        got = blend.masked_step(x.to(DEVICE), [z.to(DEVICE) for z in v], 0.7, 0.65, weights,
                                **{name: z.to(DEVICE) for name, z in given.items()})
    assert launches["forward_kernel"] == 1 and torch.equal(got.cpu(), want)


@gpu
def test_the_first_to_ask_may_be_a_backward_pass(capsys):
    """In autograd's thread of the GPU, which the self-test's own backward pass must not need."""
    qkv = torch.randn(2, 40, 3, 4, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)

    def block(qkv):
        q, k, v = qkv.unbind(2)
        return attention.joint_attention([q], [k], [v])[0]

    out = checkpoint(block, qkv, use_reentrant=False)
    dispatch._decide.cache_clear()
    out.sum().backward()
    assert capsys.readouterr().err.count("Triton on") == 2 and qkv.grad.isfinite().all()


def editor(preset, seed=0):
    """Random weights, those that begin as zero too."""
    torch.manual_seed(seed)
    net = model.Editor(model.inpainting(model.PRESETS[preset]))
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.2 if p.ndim == 1 else p[0].numel() ** -0.5)
    return net


def pictures(n=8 if ON_GPU else 2, side=64 if ON_GPU else 16):
    """x_0, noise, times, mask, masked picture."""
    g = torch.Generator().manual_seed(1)
    x, noise, masked = torch.randn(3, n, 3, side, side, generator=g)
    return x, noise, torch.rand(n, generator=g), torch.rand(n, 1, side, side, generator=g).round(), masked


def gradients(net, device, bf16):
    x, noise, t, mask, masked = (z.to(device) for z in pictures())
    net.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        txt, vec = net.encode_text(["a red star"] * len(x))
        v = net(flow.interpolate(x, noise, t), t, txt, vec, mask, masked)
    (v.float() - flow.velocity(x, noise)).square().mean().backward()
    return v.detach().float(), {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("preset", ["tiny", pytest.param("small", marks=gpu)])
def test_the_network_in_fp32_is_the_cpus(preset, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    net = editor(preset)
    with kernels_off():
        want = gradients(net, torch.device("cpu"), False)
        got = gradients(copy.deepcopy(net).to(DEVICE), DEVICE, False)
    close(got[0], want[0], 1e-4)
    assert got[1].keys() == want[1].keys() and len(want[1]) > 50
    for key, g in want[1].items():
        close(got[1][key], g, 2e-3)


@pytest.mark.parametrize("preset", [pytest.param("tiny", marks=LONG), pytest.param("small", marks=gpu)])
def test_the_network_with_kernels(preset, launches):
    """As far from fp32 as it is without them, every gradient, and the same bits twice."""
    net, bf16 = editor(preset).to(DEVICE), PRECISION == "bf16"
    with kernels_off():
        exact, plain = gradients(net, DEVICE, False), gradients(net, DEVICE, bf16)
    assert not launches
    with kernels_on():
        got, again = (gradients(net, DEVICE, bf16) for _ in range(2))
    assert launches["_forward"] == launches["_backward_kv"] >= 2 * net.cfg.depth
    assert torch.equal(got[0], again[0])
    close(got[0], exact[0], 0.03 if bf16 else 1e-4)
    for key, g in exact[1].items():
        here, there = ((z[1][key] - g).norm() / g.norm() for z in (got, plain))
        assert here < 2 * there + (0.02 if bf16 else 1e-4), f"{key}: {here:.3f}, plain {there:.3f}"


@pytest.mark.parametrize("guidance, keep", [(1.0, False), pytest.param(3.0, True, marks=LONG)])
def test_samples_with_kernels(guidance, keep, launches):
    net = editor("tiny").to(DEVICE).requires_grad_(False).eval()
    _, _, _, mask, masked = pictures()
    noise, made = common.randn(common.generators(0, 0, range(len(mask))), masked.shape[1:]), []
    for kernels in (kernels_off, kernels_on):
        with kernels():
            made.append(pipeline.sample(
                net, pipeline.PixelSpace(), ["a red star"] * len(mask), mask, masked, noise,
                flow.timesteps(3), guidance, blend="every" if keep else "none", bf16=PRECISION == "bf16"))
    assert launches["forward_kernel"] == 3 and launches["_forward"] >= 3 * net.cfg.depth
    close(made[1], made[0], 0.03 if PRECISION == "bf16" else 1e-4)


####################################################################################################
# The trainers
####################################################################################################

SHARED = dict(precision=PRECISION, device=DEVICE.type, wandb="off", log_every=1, sample_every=0, warmup=5,
              batch_size=32 if ON_GPU else 2, image_size=64 if ON_GPU else 16, workers=2 if ON_GPU else 0)


def losses(out, key="loss/flow"):
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row[key] for row in rows if key in row])


def omni(out, steps=STEPS, **flags):
    """-> the loss of every step so far."""
    given = dict(stage="inpaint", preset="tiny", lr=1e-3, muon_lr=3e-3, lr_schedule="constant",
                 save_every=steps)
    train_omni.main(train_omni.Config(out=str(out), steps=steps, **SHARED | given | flags))
    found = losses(out)
    assert len(found) == steps and found.isfinite().all()
    return found


def pefl(out, steps=STEPS, **flags):
    given = dict(base=str(ROOT / "assets/base"), phases=f"8/6/3x{steps}", adversarial_from=1, lr=1e-5,
                 save_every=steps)
    train_pefl.main(train_pefl.Config(out=str(out), **SHARED | given | flags))
    found = losses(out, "loss/G")
    assert len(found) == steps and found.isfinite().all()
    return found


def reward(folder):
    torch.manual_seed(0)
    tokenizer = rewards.train_tokenizer(["a red circle", "a blue square on grass"], 300, 40)
    return shipped(folder, rewards.PreferenceReward(
        model.replace(rewards.REWARD_PRESETS["test"], tokenizer=tokenizer)))


SLOWLY = pytest.mark.skipif(not ON_GPU, reason="Triton's interpreter takes minutes; inpaint is run with it")


@pytest.mark.parametrize("stage", [pytest.param("inpaint", marks=LONG), *(
    pytest.param(stage, marks=[*LONG, SLOWLY]) for stage in ("edit", "pefl"))])
def test_training_with_kernels_and_without(stage, tmp_path, launches, capsys):
    """The same losses, and the kernels did run."""
    def train(out):
        if stage == "pefl":
            return pefl(out, alignment=reward(tmp_path / "reward"), ema=0.9)
        return omni(out, stage=stage, init=str(ROOT / "assets/base") if stage == "edit" else None)

    with kernels_off():
        plain = train(tmp_path / "off")
    assert not launches
    dispatch._decide.cache_clear()
    with kernels_on():
        fused = train(tmp_path / "on")
    blocks = model.PRESETS["tiny"].depth * (2 if stage == "edit" else 1)
    assert launches["_backward_kv"] >= STEPS * (blocks - 1) and launches["_forward"] >= STEPS * blocks
    said = capsys.readouterr()
    assert "memory, measured" in said.out and "plain torch on" not in said.err
    if ON_GPU:
        assert "Triton on" in said.err
    torch.testing.assert_close(fused, plain, rtol=0.03 if ON_GPU else 1e-3, atol=0)


@pytest.mark.parametrize("flags", [pytest.param({}, id="whole", marks=LONG),
                                   pytest.param({"fsdp": True, "muon_lr": 0.0}, id="fsdp", marks=LONG)])
def test_a_resumed_run_goes_on(flags, tmp_path):
    """A GPU may sum in another order: close, on a CPU the same bits."""
    whole = omni(tmp_path / "whole", **flags)
    omni(tmp_path / "half", STEPS // 2, **flags)
    resumed = omni(tmp_path / "half", **flags)
    torch.testing.assert_close(resumed, whole, rtol=0.02 if ON_GPU else 0, atol=0)


@pytest.mark.parametrize("stage", [pytest.param("base", marks=LONG), pytest.param("inpaint", marks=LONG)])
def test_fsdp_on_one_rank_is_the_same_training(stage, tmp_path):
    whole, split = (omni(tmp_path / str(fsdp), stage=stage, fsdp=fsdp, muon_lr=0.0) for fsdp in (False, True))
    torch.testing.assert_close(split, whole, rtol=0.03 if ON_GPU else 1e-4, atol=0)


@pytest.mark.slow
@gpu
def test_compiled_training(tmp_path):
    eager, compiled = omni(tmp_path / "eager"), omni(tmp_path / "compiled", compile=True)
    torch.testing.assert_close(compiled, eager, rtol=0.03, atol=0)
    torch._dynamo.reset()


@gpu
@pytest.mark.parametrize("kind, checkpointing", [("editor", 0), ("editor", 1), ("editnet", 0)])
def test_memory_is_what_was_counted(kind, checkpointing):
    """Within 15 %: two whole steps, as the trainer makes them."""
    shape, latents = model.PRESETS["small"], (64, 3, 64, 64)
    net = (model.EditNet(shape) if kind == "editnet" else model.Editor(shape)).to(DEVICE)
    if kind == "editnet":
        net.base.requires_grad_(False)
    getattr(net, "base", net).mmdit.checkpoint = checkpointing
    counted = memory.omni(net, latents, DEVICE, True).peak
    before = torch.cuda.memory_allocated()
    held = sum(p.nbytes for p in net.parameters())
    opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3, fused=True)
    ema = common.EMA(net, 0.9)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        memory.omni_step(net, latents, DEVICE, True)
        clip_grad_norm(net.parameters(), 1.0)
        opt.step()
        ema.update()
        opt.zero_grad(set_to_none=True)
    measured = torch.cuda.max_memory_allocated() - before + held
    assert counted == pytest.approx(measured, rel=0.15)
