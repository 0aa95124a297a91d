"""Supervised flow matching: a text-to-image base, or an inpainting model, from scratch or from a checkpoint.

    python train_omni.py --stage base --data scenes --out out/base            # text to image, from scratch
    python train_omni.py --stage inpaint --init out/base --out out/inpaint    # inpainting on top of it
    torchrun --nproc_per_node=8 train_omni.py --stage inpaint --data /photos --preset small --image_size 256

The same command again resumes. Data: "scenes", a folder of pictures, or parquet (see data.py).
"""

from dataclasses import asdict, dataclass
from typing import Literal

import torch
import tyro

import common
import data
import flow
import model


@dataclass
class Config:
    out: str = "out/omni"  # run folder: checkpoints, metrics.jsonl, sample sheets
    data: str = "scenes"  # "scenes", a folder of pictures or a .parquet file / folder
    stage: Literal["base", "inpaint"] = "inpaint"  # base: text to image; inpaint: + mask and masked picture
    preset: str = "tiny"  # architecture, see PRESETS in model.py; ignored with --init
    init: str | None = None  # checkpoint folder to start from (its EMA); a base is widened for inpainting
    image_size: int = 32  # side of the square (or of the square of equal area, with --aspects)
    aspects: bool = False  # train on buckets from 1:4 to 4:1 instead of squares
    batch_size: int = 64  # pictures per rank and micro-batch
    accum: int = 1  # micro-batches per optimiser step
    steps: int = 20_000  # optimiser steps
    lr: float = 5e-4  # peak learning rate of AdamW
    lr_schedule: Literal["constant", "cosine"] = "cosine"  # after the warm-up
    warmup: int = 500  # steps of linear warm-up
    weight_decay: float = 0.01  # on matrices only
    beta2: float = 0.99  # AdamW's second-moment decay
    grad_clip: float = 1.0  # global norm; 0 = off
    ema: float = 0.999  # decay of the averaged weights that are sampled and shipped
    t_density: Literal["logit_normal", "uniform"] = "uniform"  # distribution of training times
    t_shift: float = 3.0  # moves training times towards noise, where captions decide (SD3: 3 at 1024^2)
    t_weight: float = 1.0  # the squared error of v counts t ** t_weight: 0 is v's own error, 2 that of x_0
    shift: float = 1.0  # of the sampler's times; the checkpoint carries it to sample.py and train_pefl.py
    text_lr: float = 0.2  # factor on lr for the text encoder, whose words otherwise collapse into one
    p_t2i: float = 0.25  # inpainting stage: share of pictures generated whole; data.TASKS divides the rest
    drop_caption: float = 0.1  # captions replaced by "", for classifier-free guidance
    bf16: bool = True  # autocast; weights, gradients and optimiser stay fp32
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    compile: bool = False  # torch.compile the transformer: about a minute first, then faster
    seed: int = 0  # of weights, data order, noise
    workers: int = 1  # data processes per rank
    device: str = "auto"  # auto, cpu, cuda
    log_every: int = 50  # steps between rows of metrics
    sample_every: int = 1000  # steps between sample sheets; 0 = never
    save_every: int = 1000  # steps between checkpoints
    keep: int = 2  # checkpoints kept
    wandb: Literal["auto", "online", "offline", "off"] = "auto"  # auto: online if logged in
    project: str = "feedback-editing"  # W&B project




def main(cfg: Config) -> None:
    check(cfg)
    dist = common.setup(cfg.device)
    device = dist.device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16)

    # 1) model: from scratch, or from a checkpoint; a base's patch embedding gets zero columns for the mask
    #    and the masked picture
    torch.manual_seed(cfg.seed)
    if cfg.init:
        weights, manifest = common.load_checkpoint(cfg.init, ("ema", "model"))
        arch, weights = manifest["arch"], weights.get("ema") or weights["model"]
        arch = arch | {"inpaint": arch.get("inpaint", False) or cfg.stage == "inpaint"}
        if not arch.get("txt_bytes", 1):
            raise SystemExit(f"error: --init: {cfg.init}: needs a VAE and text encoders: name one without")
        if cfg.stage == "base" and arch.get("inpaint"):
            raise SystemExit(f"error: --stage: base: {cfg.init} is an inpainting model: use --stage inpaint")
        editor = model.build_editor(arch, f"--init: {cfg.init}")
        weights = model.widen_input(weights, editor.cfg.in_channels, "mmdit.x_embedder.proj.weight")
        common.load_state(editor, weights, cfg.init)
    else:
        arch = model.PRESETS[cfg.preset]
        editor = model.Editor(model.inpainting(arch) if cfg.stage == "inpaint" else arch)
    if cfg.image_size % editor.cfg.patch:
        raise SystemExit(f"error: --image_size: {cfg.image_size}: must be a multiple of the patch, "
                         f"{editor.cfg.patch}")
    editor.to(device)
    editor.mmdit.checkpoint = cfg.checkpointing
    size = common.n_params(editor) / 1e6
    common.print0(f"{cfg.stage}: {size:.1f} M parameters, {device}, {dist.world} rank(s)")

    # 2) optimiser, averaged weights
    groups = [{**g, "factor": 1.0} for g in model.param_groups(editor.mmdit, cfg.weight_decay)]
    groups += [{**g, "factor": cfg.text_lr} for g in model.param_groups(editor.text, cfg.weight_decay)]
    opt = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    ema = common.EMA(editor, cfg.ema)

    # 3) resume: the newest checkpoint of --out that verifies
    step, run_id = 0, None
    if found := common.load_latest(cfg.out):
        tensors, manifest = found
        common.load_state(editor, tensors["model"], cfg.out)
        ema.load_state_dict(tensors["ema"])
        common.load_optimizer_tensors(opt, tensors["optimizer"])
        step, run_id = manifest["step"], manifest["meta"].get("run_id")
        common.print0(f"resumed {cfg.out} at step {step} ({manifest['samples']} pictures seen)")
    metrics = common.Metrics(cfg.out, dist, asdict(cfg), cfg.wandb, cfg.project, run_id, step or None)
    if cfg.compile:
        editor.mmdit.compile(dynamic=False)
        editor.text.compile(dynamic=False)

    # 4) data: batch s is a function of (seed, s, rank, world)
    source = data.open_source(cfg.data, "train")
    tasks = task_mixture(cfg)
    loader = data.make_loader(
        source, cfg.image_size, cfg.batch_size, tasks, seed=cfg.seed, rank=dist.rank, world=dist.world,
        workers=cfg.workers, start_step=step * cfg.accum, aspects=cfg.aspects, stride=editor.cfg.patch)
    common.print0(loader.summary)
    grid = sample_inputs(cfg, editor)
    samples_per_step = cfg.batch_size * dist.world * cfg.accum
    perf = common.Perf()
    bad_steps = lost_saves = 0

    bar = common.progress(cfg.steps, step, cfg.stage, dist)
    while step < cfg.steps:
        for group in opt.param_groups:
            group["lr"] = group["factor"] * common.lr_at(step, cfg.lr, cfg.warmup, cfg.steps, cfg.lr_schedule)
        loss_sum = torch.zeros((), device=device)
        for micro in range(cfg.accum):
            with perf.wait():
                batch = next(loader)
            x0, mask = batch["image"].to(device), batch["mask"].to(device)      # [B, 3, H, W], [B, 1, H, W]

            # 5) everything random comes from (seed, step, global position of the sample)
            gens = common.generators(cfg.seed, step * cfg.accum + micro, batch["position"])
            t = flow.sample_t(common.rand(gens, device), cfg.t_density, cfg.t_shift)                     # [B]
            keep_caption = (common.rand(gens) >= cfg.drop_caption).tolist()
            noise = common.randn(gens, x0.shape[1:], device)
            captions = [c if k else "" for c, k in zip(batch["caption"], keep_caption)]

            # 6) flow matching: t^w || v_theta(x_t, t, c, m, x_0 (1 - m)) - (noise - x_0) ||^2
            with autocast:
                txt, vec = editor.encode_text(captions)
                v = editor(flow.interpolate(x0, noise, t), t, txt, vec, mask, x0 * (1 - mask))
            error = (v.float() - flow.velocity(x0, noise)).square().flatten(1).mean(1)                   # [B]
            loss = (t**cfg.t_weight * error).mean()
            (loss / cfg.accum).backward()
            loss_sum += loss.detach() / cfg.accum
            for lo in (0, 25, 50, 75):
                inside = (100 * t >= lo) & (100 * t < lo + 25)
                metrics.add(**{f"loss_t/{lo}-{lo + 25}": error.detach()[inside]})
            perf.add(len(x0) * dist.world)

        # 7) one verdict for all ranks; a non-finite step changes nothing
        common.average_gradients(editor.parameters(), dist.world)
        grad_norm = torch.nn.utils.clip_grad_norm_(editor.parameters(), cfg.grad_clip or torch.inf)
        stop, bad = common.sync_flags(dist, ~torch.isfinite(grad_norm) | ~torch.isfinite(loss_sum))
        bad_steps = bad_steps + 1 if bad else 0
        if bad:
            common.print0(f"warning: step {step}: non-finite loss or gradient, skipped ({bad_steps} running)")
            if bad_steps == 20:
                raise SystemExit(f"error: {cfg.out}: 20 non-finite steps in a row: lower --lr or resume an "
                                 "earlier checkpoint")
        else:
            opt.step()
            ema.update()
        opt.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        metrics.add(**{"loss": loss_sum, "grad_norm": grad_norm})

        # 8) logs, samples from the averaged weights, checkpoints
        if step % cfg.log_every == 0 or step == cfg.steps:
            metrics.flush(step, {"lr": opt.param_groups[0]["lr"], "data/skipped": loader.stats()["skipped"],
                                 **perf.read()})
        if cfg.sample_every and (step % cfg.sample_every == 0 or step == cfg.steps) and common.is_main(dist):
            with ema.swapped(), torch.inference_mode(), autocast:
                metrics.images(step, {"samples": sample_sheet(cfg, editor, grid, device)})
        if step % cfg.save_every == 0 or step == cfg.steps or stop:
            saved = common.save_checkpoint(
                cfg.out, step,
                {"model": editor.state_dict(), "ema": ema.state_dict(),
                 "optimizer": common.optimizer_tensors(opt)},
                {"arch": editor.arch, "config": asdict(cfg), "samples": step * samples_per_step,
                 "run_id": metrics.run_id}, cfg.keep, dist)
            lost_saves = 0 if saved else lost_saves + 1
            if lost_saves and (step == cfg.steps or stop or lost_saves == 3):
                raise SystemExit(f"error: {cfg.out}: {lost_saves} checkpoint(s) running were not saved: free "
                                 "some space, then the same command resumes")
        if stop:
            common.print0(f"stopped by a signal at step {step}; the same command resumes")
            break
    bar.close()
    common.print0(common.peak_memory())
    metrics.close()
    loader.close()
    common.cleanup()


def check(cfg: Config) -> None:
    """Refuse values that cannot work, before anything is loaded."""
    def refuse(flag, text):
        raise SystemExit(f"error: --{flag}: {getattr(cfg, flag)}: {text}")

    if not cfg.init and cfg.preset not in model.PRESETS:
        refuse("preset", f"use one of {', '.join(model.PRESETS)}")
    if not cfg.init and not model.PRESETS[cfg.preset].txt_bytes:
        refuse("preset", "needs a VAE and text encoders: use tiny or small")
    for flag in ("image_size", "batch_size", "accum", "steps", "log_every", "save_every"):
        if getattr(cfg, flag) < 1:
            refuse(flag, "must be at least 1")
    for flag in ("lr", "text_lr", "t_weight", "warmup", "weight_decay", "grad_clip", "sample_every", "keep",
                 "workers"):
        if not getattr(cfg, flag) >= 0:
            refuse(flag, "must not be negative")
    for flag in ("ema", "beta2"):
        if not 0 <= getattr(cfg, flag) < 1:
            refuse(flag, "must be at least 0 and below 1")
    for flag in ("drop_caption", "p_t2i"):
        if not 0 <= getattr(cfg, flag) <= 1:
            refuse(flag, "must be a probability from 0 to 1")
    for flag in ("shift", "t_shift"):
        if not getattr(cfg, flag) > 0:
            refuse(flag, "must be above 0; 1 leaves the times as they are")


def task_mixture(cfg: Config) -> dict[str, float]:
    """Task -> probability of the stage: whole pictures only, or ByteEdit's masks (Sec. 4.1)."""
    if cfg.stage == "base":
        return {"t2i": 1.0}
    rest = {task: p for task, p in data.TASKS.items() if task != "t2i"}
    return {"t2i": cfg.p_t2i} | {task: p * (1 - cfg.p_t2i) / sum(rest.values()) for task, p in rest.items()}


def sample_inputs(cfg: Config, editor: model.Editor) -> dict:
    """The fixed held-out pictures, masks and captions of every sample sheet."""
    source = data.open_source(cfg.data, "heldout")
    tasks = task_mixture(cfg)
    return next(data.make_eval_batches(source, range(min(8, len(source))), cfg.image_size, 8, tasks,
                                       stride=editor.cfg.patch))


def sample_sheet(cfg: Config, editor: model.Editor, batch: dict, device: torch.device):
    """Contact sheet: picture, masked input, result at 20 steps without guidance and with guidance 3."""
    x0, mask = batch["image"].to(device), batch["mask"].to(device)
    masked = x0 * (1 - mask)
    txt, vec = editor.encode_text(batch["caption"])
    null = editor.encode_text([""] * len(x0))
    noise = common.randn(common.generators(cfg.seed, 0, range(len(x0)), stream=1), x0.shape[1:], device)
    ts = flow.timesteps(20, cfg.shift)

    def both(x, t):
        return editor(x, t, txt, vec, mask, masked), editor(x, t, *null, mask, masked)

    plain = flow.sample(lambda x, t: editor(x, t, txt, vec, mask, masked), noise, ts)
    guided = flow.sample(flow.guide(both, 3.0), noise, ts)
    rows = [list(row) for row in zip(x0.cpu(), masked.cpu(), plain.cpu(), guided.cpu())]
    titles = ["picture", "input", "20 steps", "guidance 3"]
    return common.contact_sheet(rows, titles, row_titles=batch["caption"])


if __name__ == "__main__":
    try:
        cli = (tyro.conf.FlagConversionOff, tyro.conf.UsePythonSyntaxForLiteralCollections)
        main(tyro.cli(Config, description=__doc__, config=cli))
    except KeyboardInterrupt:  # an exit code of 0 would let a shell script go on
        raise SystemExit("interrupted: the same command resumes at the newest checkpoint") from None
