"""Speed of a training step, side by side with a public implementation of the same network.

    python runs/bench_models.py                       # both cases, forward + backward, eager
    python runs/bench_models.py --case tiny --adamw --compile
    python runs/bench_models.py --forward             # forward alone, as in sampling
    python runs/bench_models.py --editnet             # EditNet, its variants over their base, a ControlNet
    python runs/bench_models.py --frozen              # the autoencoder and the text encoders

One process holds both networks with the same weights and runs them in turn, so that a busy machine slows
both alike; what counts is the ratio within each pair of steps. Needs `diffusers` and, for --frozen,
`transformers`, which nothing else here does.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning costs a shared CPU up to 10x

import argparse
import importlib.metadata
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `python runs/bench_models.py` puts runs/ on the path

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from kernels.bench import machine, quantiles, write  # noqa: E402
from kernels.dispatch import has_bf16  # noqa: E402
from model import PRESETS, EditNet, Editor, EditorConfig, MMDiT  # noqa: E402
from pretrained.sd3 import to_diffusers  # noqa: E402
from pretrained.text import CLIP_G, CLIP_L, T5_XXL, ClipText, T5Config, T5Encoder  # noqa: E402
from pretrained.vae import VAE, VAEConfig, vae_place  # noqa: E402

####################################################################################################
# diffusers' SD3Transformer2DModel with our weights (also what tests/test_model.py compares with)
####################################################################################################


def diffusers_twin(cfg: EditorConfig, weights: dict[str, Tensor]) -> nn.Module:
    """diffusers' SD3Transformer2DModel of the same shape with the same weights; every key is used, once."""
    from diffusers import SD3Transformer2DModel
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it warns about .to(dtype) even when there is nothing to keep in fp32
    twin = SD3Transformer2DModel(
        sample_size=cfg.pos_max * cfg.patch, patch_size=cfg.patch, in_channels=cfg.in_channels,
        num_layers=cfg.depth, attention_head_dim=cfg.head_dim, num_attention_heads=cfg.heads,
        joint_attention_dim=cfg.txt_dim, caption_projection_dim=cfg.width, pooled_projection_dim=cfg.vec_dim,
        out_channels=cfg.channels, pos_embed_max_size=cfg.pos_max,
        dual_attention_layers=tuple(range(cfg.dual)), qk_norm="rms_norm" if cfg.qk_norm else None)
    twin.to(next(iter(weights.values())).dtype).load_state_dict(to_diffusers(weights), strict=True)
    return twin


def run_twin(twin: nn.Module, x: Tensor, t: Tensor, txt: Tensor, vec: Tensor) -> Tensor:
    """The twin under our signature: t [B] in [0, 1]."""
    return twin(x, txt, vec, timestep=1000 * t.float(), return_dict=False)[0]


####################################################################################################
# Timing
####################################################################################################


@dataclass(frozen=True)
class Case:
    cfg: EditorConfig
    batch: int
    latent: int  # side of the square latent
    txt_len: int
    goal: float  # ours / theirs must stay below


CASES = {
    "tiny": Case(PRESETS["tiny"], batch=64, latent=64, txt_len=24, goal=0.85),
    "12x768": Case(replace(PRESETS["sd3-medium"], depth=12, heads=12, pos_max=64), batch=1, latent=64,
                   txt_len=154, goal=1.05),
}


def randomize(net: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of a trained network's scale: zero-initialised modulations would hide every mistake."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            r = torch.randn(p.shape, generator=g, dtype=torch.float32).to(p)
            if name.endswith((".ln_q.weight", ".ln_k.weight")):
                p.copy_(1 + 0.3 * r)
            else:
                p.copy_(r * (0.2 if p.ndim == 1 else 1.0 if name == "pos_embed" else p[0].numel() ** -0.5))
    return net


def stepper(net: nn.Module, call, inputs: tuple[Tensor, ...], adamw: bool, dtype: torch.dtype,
            like: int = 0):
    """-> a function that runs a training step (forward, backward, AdamW if asked) and returns its seconds.

    like: the number of the input that has the output's shape."""
    opt = torch.optim.AdamW(net.parameters(), lr=1e-6, fused=True) if adamw else None
    target = torch.randn_like(inputs[like])

    def step() -> float:
        net.zero_grad(set_to_none=True)
        start = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            v = call(*inputs)
        (v.float() - target).square().mean().backward()
        if opt:
            opt.step()
        return time.perf_counter() - start

    return step


def timer(call, inputs: tuple[Tensor, ...], dtype: torch.dtype):
    """-> a function that runs a forward pass without gradient and returns its seconds."""
    @torch.no_grad()
    def run() -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            call(*inputs)
        return time.perf_counter() - start

    return run


def build_pair(case: Case, args: argparse.Namespace):
    """-> (our stepper, their stepper), equal weights and inputs; checks that the outputs agree first."""
    cfg = case.cfg
    ours = randomize(MMDiT(cfg))
    theirs = diffusers_twin(cfg, ours.state_dict())
    g = torch.Generator().manual_seed(1)
    x = torch.randn(case.batch, cfg.in_channels, case.latent, case.latent, generator=g)
    t = torch.rand(case.batch, generator=g)
    txt = torch.randn(case.batch, case.txt_len, cfg.txt_dim, generator=g)
    vec = torch.randn(case.batch, cfg.vec_dim, generator=g)
    with torch.no_grad():
        a, b = ours(x, t, txt, vec), run_twin(theirs, x, t, txt, vec)
    assert (a - b).abs().max() < 1e-4 * b.abs().max(), "the two networks disagree: their times mean nothing"
    call_ours, call_theirs = ours, lambda *z: run_twin(theirs, *z)
    if args.compile:
        call_ours, call_theirs = torch.compile(call_ours), torch.compile(call_theirs)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    if args.forward:
        return (timer(call_ours, (x, t, txt, vec), dtype), timer(call_theirs, (x, t, txt, vec), dtype))
    return (stepper(ours, call_ours, (x, t, txt, vec), args.adamw, dtype),
            stepper(theirs, call_theirs, (x, t, txt, vec), args.adamw, dtype))


def bench(case: Case, args: argparse.Namespace) -> dict:
    return alternate(*build_pair(case, args), case.goal, args)


def alternate(ours, theirs, goal: float, args: argparse.Namespace) -> dict:
    """Runs both in pairs -> the quantiles of their times and of the ratio within a pair."""
    for _ in range(args.warmup):
        ours(), theirs()
    pairs = []
    for i in range(args.pairs):  # the order alternates: whoever runs second finds warmer caches
        a, b = (ours(), theirs()) if i % 2 == 0 else (theirs(), ours())[::-1]
        pairs.append((a, b))
    return {"ours_ms": quantiles([1e3 * a for a, _ in pairs]),
            "diffusers_ms": quantiles([1e3 * b for _, b in pairs]),
            "ratio": quantiles([a / b for a, b in pairs]), "goal": goal, "pairs": len(pairs)}


def frozen_pairs(full: bool, args: argparse.Namespace):
    """-> name, ours, theirs, one after the other: SD3's autoencoder beside diffusers', its text encoders
    beside transformers', equal weights. full: the published widths, of the text encoders a few layers."""
    import transformers
    from diffusers import AutoencoderKL

    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    cfg = VAEConfig() if full else VAEConfig(width=32)
    side = 256 if full else 32
    ours = randomize(VAE(cfg)).eval()
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(cfg.width * m for m in cfg.mult), layers_per_block=cfg.blocks,
        latent_channels=cfg.channels, use_quant_conv=False, use_post_quant_conv=False).eval()
    places = {k: vae_place(k, len(cfg.mult)) for k in ours.state_dict()}
    theirs.load_state_dict({places[k].names[0]: v.flatten(1) if places[k].flat else v
                            for k, v in ours.state_dict().items()})
    image, z = torch.randn(1, 3, side, side), torch.randn(1, cfg.channels, side // 8, side // 8)
    yield "vae encode", *paired(ours.encoder, theirs.encoder, (image, False), (image,), dtype)
    yield "vae decode", *paired(ours.decoder, theirs.decoder, (z, False), (z,), dtype)
    for net in (ours, theirs):
        net.requires_grad_(False)
    z.requires_grad_()
    yield ("vae decode, gradient",
           stepper(ours, lambda z, _: ours.decoder(z, False), (z, image), False, dtype, like=1),
           stepper(theirs, lambda z, _: theirs.decoder(z), (z, image), False, dtype, like=1))
    del ours, theirs

    vocab = 49408 if full else 500
    ids = torch.randint(0, vocab - 1, (4, 77))
    for name, cfg in (("clip_l", CLIP_L), ("clip_g", CLIP_G)):
        cfg = replace(cfg, layers=min(cfg.layers, 12), vocab=vocab, eos=vocab - 1)
        cfg = cfg if full else replace(cfg, width=64, heads=2, layers=2, project=64 * bool(cfg.project))
        ours = randomize(ClipText(cfg)).eval()
        theirs = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(
            vocab_size=vocab, hidden_size=cfg.width, intermediate_size=4 * cfg.width, bos_token_id=0,
            eos_token_id=vocab - 1,
            num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads, projection_dim=cfg.width,
            hidden_act="quick_gelu" if cfg.quick_gelu else "gelu")).eval()
        missing = {} if cfg.project else {"text_projection.weight": torch.eye(cfg.width)}
        theirs.load_state_dict(ours.state_dict() | missing)
        ids[:, -1] = vocab - 1
        yield name, *paired(ours, lambda ids: theirs(ids, output_hidden_states=True).hidden_states[-2],
                            (ids,), (ids,), dtype, lambda out: out[0])
    cfg = replace(T5_XXL, layers=2) if full else T5Config(64, 2, 32, 2, 128, 500)
    ours = randomize(T5Encoder(cfg)).eval()
    theirs = transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=cfg.vocab, d_model=cfg.width, d_kv=cfg.head_dim, d_ff=cfg.hidden, num_layers=cfg.layers,
        num_heads=cfg.heads, feed_forward_proj="gated-gelu")).eval()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(0, cfg.vocab, (4, 77))
    yield "t5", *paired(ours, lambda ids: theirs(ids).last_hidden_state, (ids,), (ids,), dtype)


def paired(ours, theirs, mine: tuple, his: tuple, dtype: torch.dtype, part=lambda out: out):
    """Two timers of functions whose outputs are equal; part: what of ours is theirs."""
    with torch.no_grad():
        a, b = part(ours(*mine)), theirs(*his)
    assert (a - b).abs().max() < 1e-3 * b.abs().max(), "the two networks disagree: their times mean nothing"
    return timer(ours, mine, dtype), timer(theirs, his, dtype)


def edit_steppers(case: Case, args: argparse.Namespace) -> dict:
    """Name -> stepper: the base, trained; every variant on a frozen base; diffusers' SD3 ControlNet on its
    frozen transformer. Random weights, one set of inputs."""
    from diffusers import SD3ControlNetModel

    cfg = replace(case.cfg, txt_bytes=0)  # text features come from outside, as the twin's do
    base = randomize(Editor(cfg))
    g = torch.Generator().manual_seed(1)
    x, src = (torch.randn(case.batch, cfg.channels, case.latent, case.latent, generator=g) for _ in range(2))
    t, region = torch.rand(case.batch, generator=g), torch.ones_like(x[:, :1])
    txt = torch.randn(case.batch, case.txt_len, cfg.txt_dim, generator=g)
    vec = torch.randn(case.batch, cfg.vec_dim, generator=g)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    steppers = {"base": stepper(base, base, (x, t, txt, vec), args.adamw, dtype)}
    for name in ("editnet", "cached", "controlnet", "textcontrol", "concat"):
        net = EditNet(cfg, "editnet" if name == "cached" else name, name == "cached")
        net.attach(base.state_dict())
        net.base.requires_grad_(name == "concat")
        steppers[name] = stepper(net, net, (x, t, txt, vec, src, region), args.adamw, dtype)
    twin = diffusers_twin(cfg, base.mmdit.state_dict()).requires_grad_(False)
    control = SD3ControlNetModel.from_transformer(  # its last block differs, so weights cannot be copied
        twin, num_layers=cfg.depth, num_extra_conditioning_channels=1, load_weights_from_transformer=False)
    control.requires_grad_(True)

    def theirs(x, t, txt, vec, src, region):
        cond = torch.cat([src, region], 1)
        parts = control(x, cond, 1.0, txt, vec, timestep=1000 * t, return_dict=False)[0]
        return twin(x, txt, vec, 1000 * t, block_controlnet_hidden_states=parts, return_dict=False)[0]

    inputs = (x, t, txt, vec, src, region)
    steppers["diffusers ControlNet"] = stepper(control, theirs, inputs, args.adamw, dtype)
    return steppers


def bench_editnet(case: Case, args: argparse.Namespace) -> dict:
    """Every network in turn, round after round: its time over the base's and ControlNet's of that round."""
    steppers = edit_steppers(case, args)
    rounds = []
    for i in range(args.warmup + args.pairs):
        order = list(steppers) if i % 2 == 0 else list(steppers)[::-1]
        ms = {name: 1e3 * steppers[name]() for name in order}
        rounds += [ms] * (i >= args.warmup)
    return {name: {"ms": quantiles([r[name] for r in rounds]),
                   "over_base": quantiles([r[name] / r["base"] for r in rounds]),
                   "over_controlnet": quantiles([r[name] / r["diffusers ControlNet"] for r in rounds])}
            for name in steppers}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--case", choices=[*CASES, "all"], default="all", help="which shape")
    p.add_argument("--pairs", type=int, default=20, help="pairs of timed steps")
    p.add_argument("--warmup", type=int, default=3, help="untimed steps of each before that")
    p.add_argument("--threads", type=int, default=2, help="torch threads")
    p.add_argument("--editnet", action="store_true", help="EditNet and its variants instead")
    p.add_argument("--frozen", action="store_true", help="the autoencoder and the text encoders instead")
    p.add_argument("--forward", action="store_true", help="no backward pass")
    p.add_argument("--adamw", action="store_true", help="time the optimizer's step as well")
    p.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    p.add_argument("--precision", choices=["bf16", "fp32"], default="bf16" if has_bf16("cpu") else "fp32",
                   help="bf16 autocast on both sides or on neither; default: as this CPU has instructions")
    p.add_argument("--json", default="out/bench.json", help="where the numbers go")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    try:
        info = {"diffusers": importlib.metadata.version("diffusers")} | machine(torch.device("cpu"))
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("error: diffusers: not installed: pip install diffusers") from None

    print("  ".join(f"{k} {v}" for k, v in info.items()))
    if args.editnet:
        chosen = CASES if args.case == "all" else [args.case]
        cases = {name: bench_editnet(CASES[name], args) for name in chosen}
        for name, rows in cases.items():
            print(f"{name}, p20/p50/p80{'ms':>30} {'over the base':>22} {'over ControlNet':>22}")
            for net, row in rows.items():
                cells = ["/".join(f"{v:.2f}" for v in row[k]) for k in ("ms", "over_base", "over_controlnet")]
                print(f"{net:<22} {cells[0]:>26} {cells[1]:>22} {cells[2]:>22}", flush=True)
        return write(args.json, {"machine": info, "options": vars(args), "cases": cases})

    print(f"{'case':<20} {'ours ms  p20/p50/p80':>24} {'diffusers ms':>24} {'ratio':>20}  goal")
    results = {}
    if args.frozen:
        todo = ((name, partial(alternate, *pair, 1.05, args))
                for name, *pair in frozen_pairs(args.case != "tiny", args))
    else:
        todo = ((name, partial(bench, CASES[name], args)) for name in
                (CASES if args.case == "all" else [args.case]))
    for name, measure in todo:
        r = results[name] = measure()
        ms = ["/".join(f"{v:.1f}" for v in r[k]) for k in ("ours_ms", "diffusers_ms")]
        ratio = "/".join(f"{v:.3f}" for v in r["ratio"])
        verdict = "ok" if r["ratio"][1] <= r["goal"] else "MISSED"
        print(f"{name:<20} {ms[0]:>24} {ms[1]:>24} {ratio:>20}  <= {r['goal']} {verdict}", flush=True)
    write(args.json, {"machine": info, "options": vars(args), "cases": results})


if __name__ == "__main__":
    main()
