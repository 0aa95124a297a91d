"""SD3-medium's shapes with random weights on one GPU: steps of EditNet and of PeFL, samples; ms, MFU, memory.

    python runs/bench_sd3.py                                            # as many pictures as fit, minutes
    python runs/bench_sd3.py --only sample --sizes 1024 --how bf16,blocks
    python runs/bench_sd3.py --rehearse True                            # what it does, small, on a CPU

edit      train_omni.py --stage edit on cached features: forward, backward, clipping, AdamW, average
pefl      train_pefl.py with the VAE, ImageReward, VGG16 and coherence model, every block recomputed; stage 2
          makes 9 calls, the mean of 20/15/10
sample    28 Euler steps with guidance 5, which doubles the rows
diffusers the same samples by SD3Transformer2DModel, weights in bf16, where diffusers is installed

how: eager, bf16 (the weights of Linears in bf16: what autocast makes of them at every call, once) or blocks
(bf16, and torch.compile of every block, as one that all share). FLOP are counted on tensors without data
(runs/memory.py): products, convolutions and attention, nothing recomputed. mfu is their rate over --peak. The
first 2 calls do not count; then the median of at least 3. What fails or does not fit is a row with a note.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning costs a shared CPU up to 10x

import functools
import gc
import importlib.util
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import tyro  # noqa: E402
from torch import nn  # noqa: E402

import common  # noqa: E402
import flow  # noqa: E402
import model  # noqa: E402
import rewards  # noqa: E402
from common import clip_grad_norm  # noqa: E402
from kernels.bench import chosen, limits, machine, quantiles, save  # noqa: E402
from pretrained.towers import VGG16  # noqa: E402
from pretrained.vae import VAE, VAEConfig  # noqa: E402
from runs import memory  # noqa: E402
from runs.bench_models import diffusers_twin, run_twin  # noqa: E402

PARTS, HOW = ["edit", "pefl", "sample", "diffusers"], ["eager", "bf16", "blocks"]
WORDS = 154  # text tokens: 77 of CLIP, 77 of T5
CALLS = 9  # of the editor in PeFL's stage 2


@dataclass
class Config:
    out: str = "out/bench_sd3.json"  # where the numbers go, after every row
    preset: str = "sd3-medium"  # shapes, of model.PRESETS
    only: str = "all"  # parts: edit, pefl, sample, diffusers
    sizes: str = "1024,512"  # sides of the pictures in pixels
    how: str = "all"  # of sampling: eager, bf16, blocks
    batch: int = 0  # pictures of EditNet's training step; 0 = as many as fit, at most 16
    pictures: int = 2  # of PeFL's step
    steps: int = 28  # of a sample
    seconds: float = 2.0  # of measuring for each row, at least 3 calls
    peak: float = 989.0  # TFLOP/s of the datasheet, dense bf16: 989 is an H100's (SXM) and an H200's
    precision: str = "bf16"  # of autocast: bf16 or fp32
    rehearse: bool = False  # few blocks, small pictures


def build(kind: str, cfg: model.EditorConfig, device: torch.device) -> nn.Module:
    """kind: editor, inpaint, or editnet on a frozen base; random weights of a trained network's scale."""
    torch.manual_seed(0)
    with device:
        net = model.EditNet(cfg) if kind == "editnet" else model.Editor(
            model.inpainting(cfg) if kind == "inpaint" else cfg)
    if device.type != "meta":
        randomize(net)
    if kind == "editnet":
        net.base.requires_grad_(False)
    return net


@torch.no_grad()
def randomize(net: nn.Module) -> nn.Module:
    """Zeros, as initialised, would be multiplied faster."""
    for p in net.parameters():
        p.normal_(0, 0.2 if p.ndim == 1 else p[0].numel() ** -0.5)
    return net


def narrow(net: nn.Module) -> None:
    for m in net.modules():
        if isinstance(m, nn.Linear | nn.Conv2d):
            m.to(torch.bfloat16)


def clock(step, device: torch.device, seconds: float) -> list[float]:
    """Milliseconds of every call of step but the first two."""
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    times, end = [], float("inf")
    while len(times) < 5 or now() < end:
        start = now()
        step()
        times.append(1e3 * (now() - start))
        if len(times) == 2:
            end = now() + seconds
    return times[2:]


def updates(net: nn.Module, gradients, lr: float, average: bool = True):
    """A whole training step of what gradients() leaves in net's parameters."""
    opt = torch.optim.AdamW(model.param_groups(net, 0.01), lr=lr, betas=(0.9, 0.99), fused=True)
    ema = common.EMA(net, 0.999) if average else None

    def step():
        gradients()
        clip_grad_norm(net.parameters(), 1.0)
        opt.step()
        if ema:
            ema.update()
        opt.zero_grad(set_to_none=True)

    return step


def sampler(call, cfg: model.EditorConfig, side: int, steps: int, device: torch.device, bf16: bool):
    """-> a function that makes one picture's latents; call(x, t, txt, vec) is the network."""
    g = torch.Generator(device).manual_seed(0)
    x, txt, vec = (torch.randn(shape, generator=g, device=device) for shape in (
        (1, cfg.channels, side, side), (2, WORDS, cfg.txt_dim), (2, cfg.vec_dim)))

    guided = flow.guide(lambda x, t: call(x, t, txt, vec), flow.text_weights(5.0))

    @torch.inference_mode()
    def draw():
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return flow.sample(guided, x, flow.timesteps(steps, 3.0))

    return draw


@functools.cache
def forward_flop(arch: model.EditorConfig, side: int) -> int:
    """Of one picture's forward pass."""
    rank = memory.Rank("cpu", False)
    net = rank.hold("the editor", build("editor", arch, torch.device("meta")))
    with rank.stepping(), torch.no_grad():
        net(torch.randn(1, arch.channels, side, side), torch.rand(1), *memory.text(net, 1, WORDS))
    return rank.live.flops


def counted(arch: model.EditorConfig, count, batch: int) -> tuple[float, float]:
    """Bytes and FLOP of a step, count(arch, batch) -> memory.Rank. Blocks are alike, and counting 24 of them
    takes seconds: both grow from 2 blocks on as they do from 2 to 4."""
    two, four = (count(replace(arch, depth=depth), batch) for depth in (2, 4))
    return tuple(x + (arch.depth - 2) / 2 * (y - x)
                 for x, y in ((two.peak, four.peak), (two.live.flops, four.live.flops)))


def room(arch: model.EditorConfig, count, device: torch.device) -> int:
    """Pictures of a step, at most 16, that leave a twelfth of the GPU's memory."""
    release(device)
    one, two = (counted(arch, count, batch)[0] for batch in (1, 2))
    free = torch.cuda.mem_get_info(device)[0] * 11 / 12 if device.type == "cuda" else 2**33
    return max(1, min(16, 1 + int((free - one) / (two - one))))


def measure(result: dict, row: dict, make, device: torch.device) -> None:
    """make() -> (the function to time, its FLOP). `row`, with what was found, joins the result; saves it."""
    cfg, began, gpu = result["config"], time.perf_counter(), device.type == "cuda"
    try:
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        step, work = make()
        times = clock(step, device, cfg["seconds"])
        low, middle, high = quantiles(times)
        rate = work / middle / 1e9
        row |= {"ms": [low, middle, high], "calls": len(times), "img_s": 1e3 * row["batch"] / middle,
                "TFLOP/s": rate, "mfu": rate / cfg["peak"], "of_limit": rate / result["limits"]["TFLOP/s"]}
        if gpu:
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        del step
    except Exception as e:  # not enough memory, a compiler that fails: a fact to report, and the next row
        row["note"] = common.one_line(e)
    release(device)
    row["seconds"] = round(time.perf_counter() - began, 1)
    result["rows"].append(row)
    save(cfg["out"], result)
    cells = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
    print("  ".join(cells), flush=True)


def release(device: torch.device) -> None:
    gc.collect()  # what failed is held by its own traceback
    if device.type == "cuda":
        torch.cuda.empty_cache()


def bench_edit(result: dict, arch: model.EditorConfig, size: int, device: torch.device, bf16: bool) -> None:
    side = size // 8

    def count(arch: model.EditorConfig, batch: int) -> memory.Rank:
        empty = build("editnet", arch, torch.device("meta"))
        return memory.omni(empty, (batch, arch.channels, side, side), device, bf16, words=WORDS)

    batch = result["config"]["batch"] or room(arch, count, device)
    size_in_bytes, flop = counted(arch, count, batch)

    def make():
        net = build("editnet", arch, device)
        gradients = partial(memory.omni_step, net, (batch, arch.channels, side, side), device, bf16, WORDS)
        return updates(net, gradients, 1e-5), flop

    row = {"part": "edit", "size": size, "batch": batch, "counted_gib": size_in_bytes / 2**30}
    measure(result, row, make, device)


def bench_pefl(result: dict, arch: model.EditorConfig, size: int, device: torch.device, bf16: bool) -> None:
    small, batch = result["config"]["rehearse"], result["config"]["pictures"]
    vae = randomize(VAE(VAEConfig(width=32) if small else VAEConfig()).to(device)).requires_grad_(False)
    vgg = randomize(VGG16().to(device)).requires_grad_(False)
    reward = rewards.PreferenceReward(rewards.REWARD_PRESETS["test" if small else "imagereward"]).to(device)
    reward.eval().requires_grad_(False)
    disc = rewards.CoherenceReward(rewards.CoherenceConfig(size // 16, 16, 128, 4, 4)).to(device)
    ids = torch.full((20,), 7, device=device)

    def score(image, captions):
        words = ids.expand(len(image), -1)
        return reward.normalised(image, words, torch.ones_like(words))

    def count(recompute: bool, arch: model.EditorConfig, batch: int) -> memory.Rank:
        empty = build("inpaint", arch, torch.device("meta"))
        vae.checkpoint = empty.mmdit.checkpoint = recompute
        return memory.pefl(empty, vae, {"alignment": score}, disc, vgg, (batch, 3, size, size), device, bf16,
                           words=WORDS, recompute=recompute)

    flop = batch * (counted(arch, partial(count, False), 1)[1] + (CALLS - 1) * forward_flop(arch, size // 8))
    size_in_bytes = count(True, arch, batch).peak  # which part has the peak depends on the number of blocks

    def make():
        net, before = (build("inpaint", arch, device) for _ in range(2))
        net.mmdit.checkpoint = True
        gradients = partial(memory.pefl_step, net, vae, {"alignment": score}, disc, vgg,
                            (batch, 3, size, size), device, bf16, WORDS, True, CALLS)
        editor, coherence = updates(net, gradients, 2e-6), updates(disc, lambda: None, 1e-4, average=False)

        def step(held=before):  # as train_pefl.py holds it, to measure how far the editor has moved
            editor()
            coherence()

        return step, flop

    row = {"part": "pefl", "size": size, "batch": batch, "counted_gib": size_in_bytes / 2**30}
    measure(result, row, make, device)


def bench_samples(result: dict, arch: model.EditorConfig, sizes: list[int], how: list[str],
                  device: torch.device, bf16: bool) -> None:
    net = build("editor", arch, device).eval().requires_grad_(False)
    for way in (w for w in HOW if w in how):
        if way != "eager" and bf16:
            narrow(net)
        if way == "blocks":
            torch._dynamo.reset()
            for block in net.mmdit.joint_blocks:
                block.compile(dynamic=False)
        for size in sizes:
            steps = result["config"]["steps"]
            work = steps * 2 * forward_flop(arch, size // 8)
            draw = sampler(net, arch, size // 8, steps, device, bf16)
            row = {"part": "sample", "size": size, "batch": 1, "how": way}
            measure(result, row, lambda: (draw, work), device)


def bench_diffusers(result: dict, arch: model.EditorConfig, sizes: list[int], device: torch.device,
                    bf16: bool) -> None:
    if not importlib.util.find_spec("diffusers"):
        return print("diffusers is not installed: its rows are left out", flush=True)
    weights = {k: v.cpu() for k, v in build("editor", arch, device).mmdit.state_dict().items()}
    twin = diffusers_twin(arch, weights).to(device).eval().requires_grad_(False)
    if bf16:
        narrow(twin)
    for size in sizes:
        steps = result["config"]["steps"]
        work = steps * 2 * forward_flop(arch, size // 8)
        draw = sampler(partial(run_twin, twin), arch, size // 8, steps, device, bf16)
        row = {"part": "diffusers", "size": size, "batch": 1, "how": "bf16" if bf16 else "eager"}
        measure(result, row, lambda: (draw, work), device)


def main(cfg: Config) -> dict:
    parts, how = chosen(cfg.only, PARTS, "--only"), chosen(cfg.how, HOW, "--how")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    arch, sizes = model.PRESETS[cfg.preset], [int(size) for size in cfg.sizes.split(",")]
    if cfg.rehearse:
        arch = replace(arch, depth=2, heads=2, txt_dim=64, vec_dim=32, pos_max=16)
        cfg.steps, cfg.seconds, sizes = 2, 0.01, [64]
    bf16 = cfg.precision == "bf16"
    result = {"machine": machine(device), "config": asdict(cfg), "rows": [],
              "limits": limits(device, torch.bfloat16 if bf16 else torch.float32, 100)}
    print("  ".join(f"{k} {v}" for k, v in result["machine"].items()), flush=True)
    if "sample" in parts:
        bench_samples(result, arch, sizes, [way for way in how if way != "blocks"], device, bf16)
    for size in sizes if "edit" in parts else ():
        bench_edit(result, arch, size, device, bf16)
    if "pefl" in parts:
        bench_pefl(result, arch, min(sizes, key=lambda size: abs(size - 512)), device, bf16)
    if "diffusers" in parts:
        bench_diffusers(result, arch, sizes, device, bf16)
    if "sample" in parts and "blocks" in how:  # last: compiling takes a minute, and may fail
        bench_samples(result, arch, sizes, ["blocks"], device, bf16)
    return result


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, config=(tyro.conf.FlagConversionOff,)))
