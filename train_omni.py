"""Supervised flow matching: a text-to-image base, an inpainting model, or an instruction editor (OmniEdit).

    python train_omni.py --stage base --data scenes --out out/base            # text to image, from scratch
    python train_omni.py --stage inpaint --init out/base --out out/inpaint    # inpainting on top of it
    python train_omni.py --stage edit --init assets/base --out out/editnet    # EditNet on top of either
    torchrun --nproc_per_node=8 -- train_omni.py --data /photos --preset small --image_size 256

    python train_omni.py --stage edit --init sd3_medium.safetensors --cache out/cache --out out/sd3

The same command again resumes. Data: "scenes", a folder of pictures, or parquet (see data.py); for --stage
edit "scenes" or pairs in a published form, such as omniedit:PATH (readers/edits.py). The defaults are ours,
for small models from scratch; README.md has the flags for SD3.
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Literal

import torch
import tyro

import checkpoint
import common
import data
import flow
import log
import model
import pipeline
from common import Verdict
from log import Perf
from readers.cached import Latents
from readers.edits import open_edits
from readers.files import heldout_or
from readers.pictures import open_source

Variant = Literal["editnet", "attend", "controlnet", "textcontrol", "concat"]


@dataclass
class Config:
    out: str = "out/omni"  # run folder: checkpoints, metrics.jsonl, sample sheets
    data: str = "scenes"  # "scenes", a folder of pictures, .parquet, packed (make_pack.py); edit: PRESET:PATH
    stage: Literal["base", "inpaint", "edit"] = "inpaint"  # text to image, holes, instructions
    preset: str = "tiny"  # architecture, see PRESETS in model.py; ignored with --init
    init: Annotated[str | None, tyro.conf.arg(aliases=["--ckpt", "--base"])] = None  # weights to start from
    sd3: str | None = None  # SD3's VAE and text encoders; None = those --init came with
    tokenizers: str | None = None  # folder with tokenizer, tokenizer_2, tokenizer_3, where --sd3 is one file
    cache: str | None = None  # folder of make_cache.py: text features, and latents of pictures
    variant: Variant = "editnet"  # edit: how the source picture gets in; model.EditNet explains each
    source_start: Literal["picture", "masked"] = "picture"  # edit: source tokens start as picture or masked
    fixed_source: bool = False  # edit: source tokens see source and text only, and are computed once
    tune_base: Literal["frozen", "lora", "full"] | None = None  # edit: None = frozen, but full for concat
    lora: int = 16  # edit: rank of the base's update with --tune_base lora
    weighting: Literal["threshold", "score", "none"] = "threshold"  # edit: 0 or 1, score / 10, 1
    min_score: float = 9.0  # edit, threshold: pairs of this score (0 to 10) and more weigh 1, others 0
    tasks: str | None = None  # weights; None: t2i=6,inpaint=6,edit=5,outpaint=5,erase=2; edit: balanced
    p_region: float = 0.3  # edit: share (0 to 1) of the pairs with a mask that see it
    image_size: int = 64  # side of the square in pixels (with --aspects of a square of equal area)
    aspects: bool = False  # train on buckets from 1:4 to 4:1 instead of squares
    batch_size: int = 64  # pictures per rank and micro-batch
    accum: int = 1  # micro-batches per optimiser step
    steps: int = 20_000  # optimiser steps
    lr: float = 5e-4  # peak learning rate of AdamW
    muon_lr: float = 0.0  # learning rate of Muon, for matrices of attention and MLPs; 0 = AdamW for all
    lr_schedule: Literal["constant", "cosine"] = "cosine"  # of the learning rate after warm-up
    warmup: int = 500  # steps of linear warm-up
    ema: float = 0.999  # largest decay of the averaged weights, which are sampled and shipped: common.EMA
    t_density: Literal["logit_normal", "uniform"] = "uniform"  # distribution of t in training
    t_shift: float = 3.0  # moves training times towards noise, where captions decide (SD3: 3 at 1024^2)
    t_weight: float = 1.0  # v's squared error is weighed with t to this power (2: the error of x_0)
    shift: float | None = None  # of the times of sample.py and train_pefl.py; None = --init's, or 1
    text_lr: float = 0.2  # the text encoder's lr over lr; 0 = frozen (at 1 all words became one vector)
    drop_caption: float = 0.1  # share (0 to 1) without text, for guidance; edit: and as many without source
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast where the hardware has it
    checkpointing: int = 0  # recompute every n-th block's activations: 1 = all, a third more time; 0 = none
    fsdp: bool = False  # shard the blocks that train over torchrun's ranks (common.shard)
    compile: bool = False  # torch.compile every block: slow at first, then faster
    seed: int = 0  # seed of weights, data order and noise
    workers: int = 1  # processes per rank that load data
    device: str = "auto"  # auto (a GPU where there is one), cpu or cuda
    log_every: int = 50  # steps between rows of metrics
    sample_every: int = 1000  # steps between sample sheets; 0 = never
    save_every: int = 1000  # steps between checkpoints
    keep: int = 2  # how many of the newest checkpoints are kept
    wandb: Literal["auto", "online", "offline", "off"] = "auto"  # auto: online if logged in


TASKS = {  # --tasks of the stages (defaults ours, papers silent)
    "base": "t2i=1",  # whole pictures
    "inpaint": "t2i=6,inpaint=6,edit=5,outpaint=5,erase=2",  # ByteEdit's masks (Sec. 4.1), a quarter global
    "edit": "balanced"}  # all alike; or as_is, as often as in the data
# beta2: torch's 0.999 averages squares over 1,000 steps, which a short run from scratch has not to spare
WEIGHT_DECAY, BETAS, GRAD_CLIP = 0.01, (0.9, 0.99), 1.0  # of matrices alone; AdamW's; the global norm


def main(cfg: Config) -> None:
    check(cfg)
    dist = common.setup(cfg.device)
    common.agree(dist, asdict(cfg) | {"code": common.code_hash()})
    device = dist.device
    bf16 = common.use_bf16(cfg.precision, dist)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    # 1) model: from scratch, or from a checkpoint; a base's patch embedding gets zero columns for the mask
    #    and the masked picture; an instruction editor begins as its base
    torch.manual_seed(cfg.seed)
    editor, stack = build(cfg)
    if editor.cfg.txt_bytes and not cfg.text_lr:  # else its gradient would count where the norm is clipped
        editor.text.requires_grad_(False)
    frozen = checkpoint.frozen_bits(editor)
    if not cfg.fsdp:
        editor.to(device)
    begins = f"--init: {cfg.init}" if cfg.init else f"--preset: {cfg.preset}"
    space, stack, cached = pipeline.surround(editor, stack, device, begins, cfg.tokenizers, cfg.cache)
    stride = editor.cfg.patch * space.stride
    if cfg.image_size % stride:
        raise SystemExit(f"error: --image_size: {cfg.image_size}: must be a multiple of {stride}, the "
                         "model's patch in pixels")
    base = editor.base if cfg.stage == "edit" else editor
    base.mmdit.checkpoint = cfg.checkpointing
    size, trained = (common.n_params(editor, only) / 1e6 for only in (False, True))
    common.print0(f"{cfg.stage}: {size:.1f} M parameters, {trained:.1f} M trained, {device}, "
                  f"{dist.world} rank(s)")
    tokens, words = (cfg.image_size // stride) ** 2, pipeline.text_tokens(editor, stack)
    common.print0(f"a picture is {tokens} tokens, its text {words}")
    flops = model.flops(editor, cfg.batch_size, tokens, words)  # of a micro-batch
    if cfg.fsdp:
        common.shard(editor, dist, bf16)

    # 2) optimiser, averaged weights
    text = {id(p) for p in editor.text.parameters()} if editor.cfg.txt_bytes else {}
    groups = [{**g, "params": [p for p in g["params"] if (id(p) in text) == of_text],
               "peak": factor * (cfg.muon_lr if "muon" in g else cfg.lr)}
              for of_text, factor in ((False, 1.0), (True, cfg.text_lr))
              for g in model.param_groups(editor, WEIGHT_DECAY, muon=cfg.muon_lr > 0)]
    opt = Muon(common.split_groups(groups), lr=cfg.lr, betas=BETAS, fused=True)
    ema = common.EMA(editor, cfg.ema)

    # 3) resume: the newest checkpoint of --out that verifies
    checkpoint.claim(cfg.out)
    step, run_id = 0, None
    state = {"model": editor, "ema": ema, "optimizer": opt}
    if manifest := checkpoint.resume(cfg.out, state, editor.arch, frozen):
        step, run_id = manifest["step"], manifest["meta"].get("run_id")
        common.print0(f"resumed {cfg.out} at step {step} ({manifest['samples']} pictures seen)")
        checkpoint.warn_changed(cfg.out, manifest, asdict(cfg), bf16)
    metrics = log.Metrics(cfg.out, dist, asdict(cfg), cfg.wandb, run_id, step or None)
    if cfg.compile:
        model.compile_blocks(editor)

    # 4) data: batch s is a function of (seed, s, rank, world). The workers also do what `draws` says: noise,
    #    times, dropped captions and their bytes are functions of (seed, s, global position of the sample)
    at = dict(seed=cfg.seed, rank=dist.rank, world=dist.world, workers=cfg.workers, aspects=cfg.aspects,
              start_step=step * cfg.accum, stride=stride)
    source = (open_edits if cfg.stage == "edit" else open_source)(cfg.data, "train")
    if cached and cached.made["latents"]:
        source, space = pipeline.latents(cached, source, space, cfg, stride)
    at |= dict(device=device, draw=partial(draws, cfg, space.channels, space.stride, editor.cfg.txt_bytes))
    if cfg.stage == "edit":
        loader = data.make_edit_loader(source, cfg.image_size, cfg.batch_size, p_region=cfg.p_region,
                                       balance=edit_tasks(tasks_of(cfg)), min_score=least_score(cfg), **at)
    else:
        loader = data.make_loader(source, cfg.image_size, cfg.batch_size, tasks_of(cfg), **at)
    common.print0(loader.summary)
    pipeline.check_shapes(editor, loader.shapes, stride, cfg.image_size)
    common.agree(dist, {"data": loader.fingerprint(), "weights": common.bits(editor)})
    grid = sample_inputs(cfg, stride, source, device) if cfg.sample_every else None
    samples_per_step = cfg.batch_size * dist.world * cfg.accum
    perf, lost_saves = Perf(device, bf16, f"--data {cfg.data}"), 0
    verdict = Verdict(dist, cfg.out, "lower --lr or resume an earlier checkpoint")

    bar = log.progress(cfg.steps, step, cfg.stage, dist)
    while step < cfg.steps:
        for group in opt.param_groups:
            group["lr"] = common.lr_at(step, group["peak"], cfg.warmup, cfg.steps, cfg.lr_schedule)
        loss_sum = torch.zeros((), device=device)
        for micro in range(cfg.accum):
            with perf.wait():
                batch = next(loader)
            t, noise = batch["t"], batch["noise"]                                    # [B], [B, C, h, w]
            with torch.no_grad():
                x0 = space.encode(batch["image"])                                             # [B, C, h, w]
                condition = conditions(cfg, editor, space, batch)

            # 5) flow matching: lambda t^w || v_theta(x_t, t, c, condition) - (noise - x_0) ||^2
            #    condition: m and x_0 (1 - m), or the source picture and its region. lambda, a pair's weight:
            #    OmniEdit's Eq. 6, which weighs the squared error of x_0. Since x_0 = x_t - t v, that is t^2
            #    times v's: --t_weight (w) 2 is Eq. 6 as printed, 0 the usual flow matching, 1 our default
            with autocast:
                txt, vec = editor.encode_text(batch["text"])
                v = editor(flow.interpolate(x0, noise, t), t, txt, vec, *condition)
            error = (v.float() - flow.velocity(x0, noise)).square().flatten(1).mean(1)                   # [B]
            loss = (batch["weight"] * t**cfg.t_weight * error).mean()
            (loss / cfg.accum).backward()
            loss_sum += loss.detach() / cfg.accum
            for lo in (0, 25, 50, 75):
                metrics.add_where((100 * t >= lo) & (100 * t < lo + 25), **{f"loss/t_{lo}-{lo + 25}": error})
            perf.add(len(x0) * dist.world, flops)

        # 6) one verdict for all ranks: a non-finite step changes nothing. All of it happens on the device,
        #    for which nothing here waits; what the verdict was is read a step later
        common.average_gradients(editor.parameters(), dist.world)
        grad_norm = common.clip_grad_norm(editor.parameters(), GRAD_CLIP)
        opt.found_inf = bad = verdict.give(step, loss_sum, grad_norm)
        opt.step()
        ema.update(bad)
        opt.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        metrics.add(**{"loss/flow": loss_sum, "grad_norm/editor": grad_norm})
        stop = verdict.read(last=step == cfg.steps or step % cfg.save_every == 0)

        # 7) logs, samples from the averaged weights, checkpoints
        if step % cfg.log_every == 0 or step == cfg.steps:
            metrics.flush(step, {"lr": opt.param_groups[0]["lr"], "data/skipped": loader.stats()["skipped"],
                                 **perf.read()})
        due = cfg.sample_every and (step % cfg.sample_every == 0 or step == cfg.steps)
        if due and (cfg.fsdp or dist.rank == 0):  # shards: all ranks compute the sheet
            with ema.swapped(), torch.no_grad():
                metrics.images(step, {"samples": sample_sheet(cfg, editor, space, grid, bf16)})
        ends = step == cfg.steps or stop
        if ends or step % cfg.save_every == 0 and not verdict.bad:
            meta = {"arch": editor.arch, "config": asdict(cfg), "precision": common.PRECISION[bf16],
                    "samples": step * samples_per_step, "run_id": metrics.run_id, "stack": stack,
                    "frozen": frozen}
            saved = checkpoint.save(cfg.out, step, state, meta, 0 if verdict.bad else cfg.keep, dist)
            lost_saves = checkpoint.count_lost(cfg.out, saved, lost_saves, ends)
        if stop:
            common.print0(f"stopped by a signal at step {step}; the same command resumes")
            break
    bar.close()
    common.print0(log.peak_memory())
    metrics.close()
    loader.close()
    common.cleanup()


def check(cfg: Config) -> None:
    """Refuse values that cannot work, before anything is loaded."""
    common.check_bounds(
        cfg, at_least_1=("image_size", "batch_size", "accum", "steps", "log_every", "save_every"),
        not_negative=("lr", "muon_lr", "text_lr", "t_weight", "warmup", "sample_every", "keep", "workers",
                      "checkpointing"),
        above_0=("shift", "t_shift"), share=("drop_caption", "p_region"), below_1=("ema",))
    if not cfg.init and cfg.preset not in model.PRESETS:
        common.refuse(cfg, "preset", f"use one of {', '.join(model.PRESETS)}")
    if not cfg.init and not model.PRESETS[cfg.preset].txt_bytes:
        common.refuse(cfg, "preset", "needs a VAE and text encoders: use tiny or small, or give --init SD3's "
                                     "weights")
    if cfg.stage == "edit" and cfg.drop_caption > 2 / 3:
        common.refuse(cfg, "drop_caption", "must be up to 2/3: half as many again are without source alone")
    if not 0 <= cfg.min_score <= 10:
        common.refuse(cfg, "min_score", "must be a score from 0 to 10")
    if cfg.stage == "edit" and not cfg.init:
        raise SystemExit("error: --stage: edit: needs a trained model to build on: give --init, such as "
                         "--init assets/base")
    if cfg.stage != "edit" and (cfg.variant != "editnet" or cfg.fixed_source or cfg.tune_base):
        common.refuse(cfg, "stage", "--variant, --fixed_source and --tune_base concern --stage edit only")
    for flag in ("p_region", "weighting", "min_score"):
        if cfg.stage != "edit" and getattr(cfg, flag) != getattr(Config, flag):
            common.refuse(cfg, flag, "is of edit pairs: leave it out, or give --stage edit")
    if cfg.weighting != "threshold" and cfg.min_score != Config.min_score:
        common.refuse(cfg, "min_score", "is of use with --weighting threshold alone: leave it out")
    if cfg.stage == "base" and cfg.tasks:
        common.refuse(cfg, "tasks", "--stage base draws whole pictures: leave it out")
    (edit_tasks if cfg.stage == "edit" else data.mixture)(tasks_of(cfg))
    if cfg.fixed_source and cfg.variant != "editnet":
        common.refuse(cfg, "variant", "caches no source tokens (editnet does): leave out --fixed_source")
    if cfg.source_start != "picture" and (cfg.stage != "edit" or cfg.variant not in model.SOURCE_TOKENS):
        common.refuse(cfg, "source_start", "concerns --variant editnet or attend of --stage edit: drop it")
    if cfg.muon_lr and cfg.fsdp:
        common.refuse(cfg, "muon_lr", "needs whole matrices, of which --fsdp leaves each rank a part: leave "
                                      "out one")
    if cfg.tune_base == "lora" and cfg.lora < 1:
        common.refuse(cfg, "lora", "must be at least 1")
    if cfg.tune_base != "lora" and cfg.lora != Config.lora:
        common.refuse(cfg, "lora", "is of use with --stage edit --tune_base lora: leave it out, or add these")


def build(cfg: Config, device: str = "cpu") -> tuple[model.Editor | model.EditNet, dict]:
    """The model of the stage with its starting weights, on the CPU, what stays frozen without gradient; and
    the stack that its manifest names (pipeline.surround). Fills in --shift."""
    if not cfg.init:
        arch = model.PRESETS[cfg.preset]
        cfg.shift = cfg.shift or 1.0
        editor = model.Editor(model.inpainting(arch) if cfg.stage == "inpaint" else arch)
        return editor, {"sd3": cfg.sd3} if cfg.sd3 else {}
    state, manifest = pipeline.open_weights(cfg.init, device=device, what="--init")
    arch = manifest["arch"]
    cfg.shift = cfg.shift or manifest.get("config", {}).get("shift") or 1.0
    stack = manifest.get("meta", {}).get("stack", {}) | ({"sd3": cfg.sd3} if cfg.sd3 else {})
    if cfg.stage == "edit":
        return build_edit(cfg, arch, state), stack
    arch = arch | {"inpaint": arch.get("inpaint", False) or cfg.stage == "inpaint"}
    if cfg.stage == "base" and arch.get("inpaint"):
        raise SystemExit(f"error: --stage: base: {cfg.init} is an inpainting model: use --stage inpaint")
    editor = model.build_editor(arch, f"--init: {cfg.init}")
    state = model.widen_input(state, editor.cfg.in_channels, pipeline.MASK_INPUT)
    checkpoint.load_state(editor, state, cfg.init)
    return editor, stack


def build_edit(cfg: Config, arch: dict, state: dict) -> model.EditNet:
    """A new EditNet of the variant on a base, or one that was trained before; frozen as --tune_base says."""
    if arch.get("kind") == "editnet":
        net = model.build_editnet(arch, f"--init: {cfg.init}")
        if (net.variant, net.cached) != (cfg.variant, cfg.fixed_source):
            raise SystemExit(f"error: --init: {cfg.init}: holds --variant {net.variant}"
                             f"{' --fixed_source' * net.cached}: give the same flags, or a base")
        if cfg.source_start != "picture":
            common.refuse(cfg, "source_start", f"{cfg.init} has begun already: leave it out, or give a base")
        checkpoint.load_state(net, state, cfg.init)
    else:
        base = model.build_editor(arch, f"--init: {cfg.init}")
        checkpoint.load_state(base, state, cfg.init)
        net = model.EditNet(base.cfg, cfg.variant, cfg.fixed_source)
        net.attach(base.state_dict(), cfg.source_start)
    tuned = cfg.tune_base or ("full" if cfg.variant == "concat" else "frozen")
    if tuned == "frozen":
        net.base.requires_grad_(False)
    elif tuned == "lora":
        model.add_lora(net.base, cfg.lora)
    elif net.cfg.txt_bytes:
        net.base.text.requires_grad_(False)  # instructions are read by net.text; captions stay as they are
    return net


def draws(cfg: Config, channels: int, stride: int, txt_bytes: int, batch: dict) -> dict:
    """What the data workers add to a batch: t, weight [B]; noise [B, C, h, w] in the space of `channels` and
    `stride`; text, as bytes [B, txt_bytes] or, for encoders from outside, captions; null [B] bool.

    For guidance captions are dropped, with --drop_caption; of edits also source pictures (null), by one draw
    as in InstructPix2Pix: with half of it text alone, both, and source alone.
    """
    gens = common.generators(cfg.seed, batch["step"], batch["position"])
    t = flow.sample_t(common.rand(gens), cfg.t_density, cfg.t_shift)
    u = common.rand(gens)
    p, drop, null = cfg.drop_caption / 2, u < cfg.drop_caption, torch.zeros(len(u), dtype=torch.bool)
    if cfg.stage == "edit":
        null = (u >= p) & (u < 3 * p)
    text = ["" if gone else c for c, gone in zip(batch["caption"], drop.tolist())]
    h, w = batch["image"].shape[1:3] if batch["image"].dtype == torch.uint8 else batch["image"].shape[2:]
    return {"t": t, "noise": common.randn(gens, (channels, h // stride, w // stride)), "null": null,
            "text": model.byte_ids(text, txt_bytes) if txt_bytes else text, "weight": importance(cfg, batch),
            "segments": None}  # label maps have done their work: nothing to copy


def conditions(cfg: Config, editor: model.Editor | model.EditNet, space, batch: dict) -> tuple:
    """The latents and masks beside the text (pipeline.conditions), where they are dropped zeros and ones."""
    if cfg.stage != "edit":
        return pipeline.conditions(editor, space, batch["mask"], batch["image"])
    null = batch["null"][:, None, None, None]
    source, region = pipeline.conditions(editor, space, batch["mask"], batch["source"])
    return source.masked_fill(null, 0.0), region.masked_fill(null, 1.0)


def importance(cfg: Config, batch: dict) -> torch.Tensor:
    """lambda [B] of OmniEdit's Eq. 6. --weighting threshold gives 1 to all that is in a batch: the loader has
    left out the pairs that weigh 0. A pair without a score counts as 1."""
    if cfg.stage != "edit" or cfg.weighting != "score":
        return torch.ones(len(batch["caption"]))
    return torch.where(batch["score"].isnan(), 1.0, batch["score"] / 10)


def least_score(cfg: Config) -> float | None:
    """Pairs scored below weigh nothing (OmniEdit Sec. 3.3) and are not loaded; OmniEdit keeps about one pair
    in ten this way."""
    return cfg.min_score if cfg.weighting == "threshold" else None


def tasks_of(cfg: Config) -> str:
    return TASKS[cfg.stage] if cfg.tasks is None else cfg.tasks


def edit_tasks(text: str) -> bool | dict[str, float]:
    """--tasks of pairs -> `balance` of data.make_edit_loader."""
    return text == "balanced" if text in ("balanced", "as_is") else data.task_weights(text)


def sample_inputs(cfg: Config, stride: int, source, device: torch.device) -> dict:
    """The fixed pictures, masks and captions of every sample sheet, up to eight: held out and square; of a
    cache the first ones, at the bucket at which it holds them. Nothing is dropped from them."""
    known = isinstance(source, Latents)
    at = dict(stride=stride, aspects=known and cfg.aspects, device=device)
    if cfg.stage == "edit":
        source = source if known else heldout_or(source, open_edits, cfg.data)
        batches = data.make_edit_eval_batches(source, range(min(8, len(source))), cfg.image_size, 8,
                                              p_region=cfg.p_region, **at)
    else:
        source = source if known else heldout_or(source, open_source, cfg.data)
        batches = data.make_eval_batches(source, range(min(8, len(source))), cfg.image_size, 8,
                                         tasks_of(cfg), **at)
    batch = next(batches)
    return batch | {"null": torch.zeros(len(batch["image"]), dtype=torch.bool, device=device)}


def sample_sheet(cfg: Config, editor: model.Editor | model.EditNet, space, batch: dict, bf16: bool):
    """Contact sheet at 20 steps without guidance and with it: 3; for edits text 3, source 1.5.

    Columns: picture, and its masked input; or source and target of an edit. Rows are titled by caption.
    """
    image, given = batch["image"], batch["source" if cfg.stage == "edit" else "image"]
    gens = common.generators(cfg.seed, 0, range(len(image)), stream=1)
    noise = common.randn(gens, space.encode(image[:1]).shape[1:], image.device)
    plain, guided = (pipeline.sample(editor, space, batch["caption"], batch["mask"], given, noise,
                                     flow.timesteps(20, cfg.shift), *guidance, bf16=bf16)
                     for guidance in ((1.0, 1.0), (3.0, 1.5)))
    columns = [batch["source"], image] if cfg.stage == "edit" else [image]
    columns += [image * (1 - batch["mask"])] * (cfg.stage == "inpaint")
    columns = [space.decode(x) for x in columns] if isinstance(space, pipeline.Encoded) else columns
    columns += [plain, guided]
    titles = {"base": ["picture"], "inpaint": ["picture", "input"], "edit": ["source", "target"]}[cfg.stage]
    rows = [list(row) for row in zip(*(c.cpu() for c in columns))]
    return log.contact_sheet(rows, [*titles, "20 steps", "guided"], row_titles=batch["caption"])


class Muon(torch.optim.AdamW):
    """AdamW, and Muon (Jordan et al. 2024) for the groups that say muon=True: of a matrix's momentum only the
    directions are kept, U V^T of its U S V^T, so that rare directions, a word seldom said, learn as fast as
    common ones. Scaled by 0.2 sqrt(longer side), the size of an AdamW step (Liu et al. 2025), whence learning
    rates are alike. A small model from scratch needed a sixth fewer pictures for less error (LOG.md).

    params: groups as of AdamW; those with muon hold matrices [out, in] alone, where out = 3 in is q, k and v
    one below the other, three matrices. torch.optim.Muon computes in bf16, which most CPUs only emulate.
    found_inf: see Verdict.
    """

    # quintic of which four rounds bring singular values from 0.01 up to 0.7 ... 1.2 (Jordan et al. 2024)
    COEFFICIENTS, ROUNDS, MOMENTUM = (3.4445, -4.7750, 2.0315), 4, 0.95

    @torch.no_grad()
    def step(self):
        held = []  # from AdamW, which steps over what has no gradient
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None] if group.get("muon") else []
            held += [(p, p.grad) for p in params]
            bad = getattr(self, "found_inf", params[0].new_zeros(()) if params else None)
            alike = {}  # matrices of a shape are one batch
            for p in params:
                if p not in self.state:  # AdamW wants to find a step in every state it loads
                    self.state[p] = {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
                momentum = self.state[p]["momentum"]
                grad = torch.where(bad > 0, momentum, p.grad)  # towards which a momentum does not move
                momentum.lerp_(grad, 1 - self.MOMENTUM)
                update = grad.lerp(momentum, self.MOMENTUM)  # Nesterov's
                p.mul_(torch.where(bad > 0, 1.0, 1 - group["lr"] * group["weight_decay"]))
                parts = 3 if p.shape[0] == 3 * p.shape[1] else 1
                for target, matrix in zip(p.chunk(parts), update.chunk(parts)):
                    alike.setdefault(target.shape, []).append((target, matrix))
            for (rows, columns), pairs in alike.items():
                x = self.orthogonal(torch.stack([matrix for _, matrix in pairs]))
                for (target, _), direction in zip(pairs, x):
                    direction = torch.where(bad > 0, 0.0, direction)
                    target.add_(direction, alpha=-0.2 * max(rows, columns) ** 0.5 * group["lr"])
        for p, _ in held:
            p.grad = None
        super().step()
        for p, grad in held:
            p.grad = grad

    def orthogonal(self, x):
        """[N, rows, columns] -> about U V^T of each, by Newton and Schulz's iteration."""
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x
        x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
        a, b, c = self.COEFFICIENTS
        for _ in range(self.ROUNDS):
            square = x @ x.mT
            x = a * x + torch.baddbmm(square, square, square, beta=b, alpha=c) @ x
        return x.mT if tall else x


if __name__ == "__main__":
    common.command(main, Config, __doc__)
