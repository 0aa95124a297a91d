"""Perceptual Feedback Learning (ByteEdit, Sec. 3): tune an editor by back-propagating rewards.

    python train_pefl.py --aesthetic out/aesthetic --alignment out/alignment --out out/pefl
    torchrun --nproc_per_node=8 train_pefl.py --base out/inpaint --aesthetic ... --alignment ... --data ...
    python train_pefl.py --base out/editnet --aesthetic ...       # an instruction editor, on pairs (Sec. 5)
    python train_pefl.py --base sd3_medium_folder --alignment imagereward:ImageReward.pt,vocab.txt --vgg ...

One step, for a picture x, a mask m, a caption c (Sec. 3.1):
    stage 1   noise the masked input x (1 - m) to the fixed step T1; the noisier steps are skipped
    stage 2   denoise T1 -> t' without gradient, t' drawn from [1, T2]
    stage 3   predict x0' from x_t' in one network call, with gradient
then L^G = sum of the rewards' losses + eta (L_reg + L_vgg) for the editor (Eq. 2-4, 7, 8), and L^D for the
coherence model, which learns online as the discriminator (Eq. 6, 8). Progressive phases shrink T / T1 / T2
(Sec. 3.3). The same command again resumes.

An instruction editor (ours: the paper names it as future work) starts from its noised source picture instead
of the masked input, has targets as real pictures, and L_reg holds it to the source where nothing changes.
"""

import copy
import math
import re
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch.utils.checkpoint import checkpoint

import common
import data
import flow
import frozen
import memory
import model
import sharded
import stack
import towers
import weights
from perf import Perf
from verdict import Verdict


@dataclass
class Config:
    base: str = "assets/base"  # to tune: an inpainting model's or instruction editor's folder, or SD3 weights
    sd3: str | None = None  # SD3's VAE and text encoders; None = those --base came with
    tokenizers: str | None = None  # folder with tokenizer, tokenizer_2, tokenizer_3, where --sd3 is one file
    cache: str | None = None  # folder of cache.py --split all: text features in place of the encoders
    aesthetic: str | None = None  # aesthetic reward R_alpha: a folder, or a published NAME:PATH,PATH
    alignment: str | None = None  # alignment reward R_beta, likewise; towers.open_reward names the published
    heldout_reward: str | None = None  # a reward that is logged and never trained on: the hacking alarm
    out: str = "out/pefl"  # run folder: checkpoints, metrics.jsonl, sample sheets
    data: str = "scenes"  # "scenes", a folder of pictures, a .parquet file / folder; an editor's: PRESET:PATH
    image_size: int | None = None  # side of the training square; None = the base's
    aspects: bool = False  # train on buckets from 1:4 to 4:1 instead of squares
    phases: str = "20/15/10x2000,8/6/3x2000"  # T/T1/T2 x optimiser steps, one after the other (Sec. 3.3)
    batch_size: int = 16  # pictures per rank and micro-batch
    accum: int = 1  # micro-batches per optimiser step
    p_region: float = 0.3  # instruction editors: share of the pairs with a mask that are shown it
    p_outpaint: float = 0.35  # proportions of the tasks (default ours, paper silent): outward expansion masks
    p_edit: float = 0.35  # inpainting-editing: an instance, dilated, joined with random masks
    p_inpaint: float = 0.15  # irregular and square masks
    p_erase: float = 0.15  # inpainting-erasing: holes in the background, the erase prompt
    p_promptfree: float = 0.3  # share of outpainting and inpainting pictures without a prompt
    w_aesthetic: float = 0.01  # weight of the aesthetic loss (Sec. 4.1)
    w_alignment: float = 0.01  # weight of the alignment loss (Sec. 4.1)
    w_coherence: float = 0.05  # weight of the adversarial loss (Sec. 4.1)
    reward_loss: Literal["neg_log_sigmoid", "relu_margin"] = "neg_log_sigmoid"  # Eq. 2, or relu(2 - r)
    reward_noise: float = 0.0  # std of Gaussian noise through which all rewards look (ours; LOG.md)
    eta: float = 1.0  # weight of L_reg + L_vgg (Eq. 4; default ours, paper silent)
    vgg: str | None = None  # torchvision VGG16 weights for L_vgg; None = a reward's image tower
    disc_init: str | None = None  # start it from a PeFL run's coherence model or a reward's image tower
    disc_width: int = 128  # coherence ViT (default ours, paper silent); --disc_init brings its own sizes
    disc_depth: int = 4  # its blocks
    disc_patch: int | None = None  # its patch; None = the editor's
    disc_lr: float = 1e-4  # its learning rate (default ours, paper silent)
    disc_first: int = 0  # steps in which it learns alone before the editor moves (0 as in the paper)
    lr: float = 2e-6  # of the editor (Sec. 4.1)
    warmup: int = 1000  # steps of linear warm-up (Sec. 4.1)
    weight_decay: float = 0.0  # on matrices only
    grad_clip: float = 1.0  # global norm of the editor's gradient; 0 = off
    ema: float = 0.9999  # decay of the averaged weights (Sec. 4.1)
    lora: int = 0  # rank of a low-rank update of the joint blocks; 0 = tune every weight
    shift: float | None = None  # of the paper steps' times; None = the base's
    checkpointing: int = 0  # recompute every n-th block of the editor, decoder and rewards; 0 = none, 1 = all
    fsdp: bool = False  # shard the editor's blocks over torchrun's ranks (sharded.py)
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast where the hardware has it
    seed: int = 0  # of data order, noise, t' and the coherence model
    workers: int = 1  # data processes per rank
    device: str = "auto"  # auto, cpu, cuda
    log_every: int = 20  # steps between rows of metrics
    sample_every: int = 200  # steps between sample sheets; 0 = never
    save_every: int = 200  # steps between checkpoints
    wandb: Literal["auto", "online", "offline", "off"] = "auto"  # auto: online if logged in


def main(cfg: Config) -> None:
    check(cfg)
    dist = common.setup(cfg.device)
    device = dist.device
    bf16 = common.use_bf16(cfg.precision, dist)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    phases = parse_phases(cfg.phases)
    total = sum(phase[-1] for phase in phases)

    # 1) the editor to tune, and a frozen copy that says how far it has moved
    editor, manifest = load_editor(cfg.base)
    surroundings = manifest.get("meta", {}).get("stack", {}) | ({"sd3": cfg.sd3} if cfg.sd3 else {})
    image_size = cfg.image_size or manifest.get("config", {}).get("image_size", 64)
    shift = manifest.get("config", {}).get("shift", 1.0) if cfg.shift is None else cfg.shift
    if not cfg.fsdp:
        editor.to(device)
    space, surroundings, _ = stack.surround(editor, surroundings, device, f"--base: {cfg.base}",
                                            cfg.tokenizers, cfg.cache)
    space.checkpoint = bool(cfg.checkpointing)
    patch = editor.cfg.patch * space.stride
    if image_size % patch:
        raise SystemExit(f"error: --image_size: {image_size}: must be a multiple of {patch}, the editor's "
                         "patch in pixels")
    base = copy.deepcopy(editor).requires_grad_(False).to(device)
    instructed = isinstance(editor, model.EditNet)
    if cfg.lora:
        if instructed and editor.variant == "concat":
            raise SystemExit(f"error: --lora: {cfg.lora}: {cfg.base} is a concat, which has no branch to "
                             "update: leave it out")
        torch.manual_seed(cfg.seed)  # LoRA's A: the same on every rank
        model.add_lora(editor, cfg.lora)
        editor.to(device)
    (editor.base if instructed else editor).mmdit.checkpoint = cfg.checkpointing

    # 2) rewards: aesthetic and alignment are frozen; coherence learns online and is the discriminator
    named = {"aesthetic": cfg.aesthetic, "alignment": cfg.alignment, "heldout_reward": cfg.heldout_reward}
    rewards = {flag.removesuffix("_reward"): load_reward(path, device, f"--{flag}: {path}")
               for flag, path in named.items() if path}
    scores = {name: score_of(net) for name, net in rewards.items()}
    weighted = {"aesthetic": cfg.w_aesthetic, "alignment": cfg.w_alignment}
    perceptual, perceptual_name = load_perceptual(cfg, rewards, device)
    torch.manual_seed(cfg.seed)
    disc = load_coherence(cfg, image_size, patch).to(device)
    pictures, ranks = (cfg.batch_size, 3, image_size, image_size), dist.world if cfg.fsdp else 0
    vgg = perceptual if cfg.vgg else None
    flops = call_flops = 0  # of a micro-batch with one call of the editor in stage 2; of a call
    if common.is_main(dist):  # the count takes a few seconds
        count = memory.pefl(editor, space, rewards, disc, vgg, pictures, device, bf16, ranks,
                            77 + surroundings.get("t5_length", 77), bool(cfg.checkpointing))
        common.print0(count.report())
        flops, call_flops = count.flops, count.call_flops
    if cfg.fsdp:
        sharded.shard(editor, dist, bf16)
    trained = [p for p in editor.parameters() if p.requires_grad]
    common.print0(
        f"editor {common.n_params(editor) / 1e6:.1f} M "
        f"({sum(p.numel() for p in trained) / 1e6:.2f} M trained), "
        f"coherence {common.n_params(disc) / 1e6:.2f} M, "
        f"rewards {', '.join(rewards) or 'none'}, L_vgg from {perceptual_name}, {device}")

    # 3) optimisers, averaged weights, resume
    groups = model.param_groups(editor, cfg.weight_decay)
    opt = torch.optim.AdamW(sharded.split_groups(groups), lr=cfg.lr, betas=(0.9, 0.99), fused=True)
    disc_opt = torch.optim.AdamW(
        disc.parameters(), lr=cfg.disc_lr, betas=(0.5, 0.99), weight_decay=0.0, fused=True)
    ema = common.EMA(editor, cfg.ema)
    step, run_id = 0, None
    if found := (common.find_latest if cfg.fsdp else common.load_latest)(cfg.out):
        tensors, saved = found
        if cfg.fsdp:
            tensors = sharded.load_checkpoint(tensors, editor, ema, opt)
        names = {"coherence", "coherence_optimizer"} | (set() if cfg.fsdp else {"model", "ema", "optimizer"})
        names |= {"lora", "lora_ema"} if cfg.lora else set()
        if tensors.keys() != names:
            raise SystemExit(f"error: {cfg.out}: holds {', '.join(sorted(tensors))} instead of "
                             f"{', '.join(sorted(names))}: repeat the command that began it, or give "
                             "another --out")
        if not cfg.fsdp:
            state, average = model.resumed_states(editor, tensors)
            common.load_state(editor, state, cfg.out)
            ema.load_state_dict(average)
            common.load_optimizer_tensors(opt, tensors["optimizer"])
        common.load_state(disc, tensors["coherence"], cfg.out)
        common.load_optimizer_tensors(disc_opt, tensors["coherence_optimizer"])
        step, run_id = saved["step"], saved["meta"].get("run_id")
        common.print0(f"resumed {cfg.out} at step {step} ({saved['samples']} pictures seen)")
        common.warn_changed(cfg.out, saved, asdict(cfg), bf16)
    common.check_writable(cfg.out)
    metrics = common.Metrics(cfg.out, dist, asdict(cfg), cfg.wandb, run_id=run_id, resumed_from=step or None)

    # 4) data: captioned, prompt-free, outpainting, editing and erasing in the stated proportions. The workers
    #    also do what `draws` says: noise and t' are functions of (seed, step, position of the sample)
    seen_by = [r.cfg.patch for r in rewards.values() if isinstance(r, model.PreferenceReward)]
    stride = math.lcm(patch, disc.cfg.patch, *([] if cfg.vgg else seen_by))  # L_vgg's features: unresized
    tasks = {"outpaint": cfg.p_outpaint, "edit": cfg.p_edit, "inpaint": cfg.p_inpaint, "erase": cfg.p_erase}
    at = dict(seed=cfg.seed, rank=dist.rank, world=dist.world, workers=cfg.workers, aspects=cfg.aspects,
              start_step=step * cfg.accum, stride=stride, device=device)
    at["draw"] = partial(draws, cfg, phases, space.channels, space.stride, editor.cfg.txt_bytes)
    if instructed:
        source = data.open_edits(cfg.data, "train")
        loader = data.make_edit_loader(source, image_size, cfg.batch_size, p_region=cfg.p_region, **at)
    else:
        source = data.open_source(cfg.data, "train")
        loader = data.make_loader(source, image_size, cfg.batch_size, tasks, **at, prompt_free={
            "outpaint": cfg.p_promptfree, "inpaint": cfg.p_promptfree})
    common.print0(loader.summary)
    grid = heldout_grid(cfg, source, instructed, image_size, tasks, stride, device)
    reward_loss = {
        "neg_log_sigmoid": lambda r: -F.logsigmoid(r),
        "relu_margin": lambda r: F.relu(2 - r),  # ImageReward's
    }[cfg.reward_loss]
    perf, lost_saves = Perf(device, bf16, f"--data {cfg.data}"), 0
    verdict = Verdict(dist, cfg.out, "lower --lr or the reward weights")

    second = min(step + 2, total)  # the first one's forward pass has no optimiser state beside it yet
    bar = common.progress(total, step, "pefl", dist)
    while step < total:
        phase, (T, T1, T2) = phase_at(phases, step)
        moving = step >= cfg.disc_first  # before that the coherence model learns alone
        for group in opt.param_groups:
            group["lr"] = common.lr_at(max(step - cfg.disc_first, 0), cfg.lr, cfg.warmup, total)
        g_sum = d_sum = torch.zeros((), device=device)
        for micro in range(cfg.accum):
            with perf.wait():
                batch = next(loader)
            x, noise, t_prime = batch["image"], batch["noise"], batch["t_prime"]  # x: real, [B, 3, H, W]
            start, condition, hole, (like, where) = prepare(batch, space)
            told, prompted = batch["told"], batch["prompted"]

            with autocast:
                txt, vec = editor.encode_text(batch["text"])

                # stage 1: diffuse the masked input to step T1; the noisier steps, T .. T1 + 1, are skipped
                ts = flow.timesteps(T, shift, start=T1, stop=t_prime)
                t_start, t_end = (torch.full((len(x),), ts[i], device=device) for i in (0, -1))
                x_t = flow.interpolate(start, noise, t_start)

                # stage 2: T1 -> t', without gradient, without guidance
                with torch.no_grad():
                    x_t = flow.sample(lambda x, t: editor(x, t, txt, vec, *condition), x_t, ts)

            disc.requires_grad_(False)  # L^G is the editor's alone
            with autocast, torch.set_grad_enabled(moving):
                # stage 3: x_t' -> x0' in one prediction, with gradient
                v = editor(x_t, t_end, txt, vec, *condition)
                z0 = flow.x0_from_v(x_t, v, t_end)
                fake = maybe_checkpoint(cfg, space.decode, z0)          # x0' = G(x, m, c, t'), [B, 3, H, W]

                # L_reward, Eq. 7: -log sigmoid of aesthetic, alignment and coherence. Through noise a reward
                # answers to what a picture shows, and not to patterns too faint to see that raise its score
                veil = cfg.reward_noise * batch["veil"] if cfg.reward_noise else torch.zeros_like(x)
                seen = fake + veil
                losses = {}
                for name, weight in weighted.items():
                    if name in scores and weight:
                        score = maybe_checkpoint(cfg, scores[name], seen, told)
                        asked = prompted if name == "alignment" else torch.ones_like(prompted)
                        losses[name] = (weight, (asked * reward_loss(score)).mean())
                        metrics.add(**{f"reward/{name}": score.detach()})
                fake_logits = maybe_checkpoint(cfg, disc, seen)         # R_gamma(x0'), [B, 1, H, W]
                losses["coherence"] = (cfg.w_coherence, reward_loss(fake_logits).mean())

                # L_reg and L_vgg, Eq. 3: stay with the real picture, in pixels and in features
                losses["reg"] = (cfg.eta, ((like - fake).abs() * where).mean())
                losses["vgg"] = (cfg.eta, feature_l1(perceptual, x, fake))

            # L^G, Eq. 8
            g_loss = sum(weight * loss for weight, loss in losses.values())
            if moving:
                (g_loss / cfg.accum).backward()
            disc.requires_grad_(True)

            # L^D, Eq. 6 and 8: every pixel of x is real, every pixel of x0' is generated
            with autocast:
                real_logits, fake_logits = disc(x + veil), disc(seen.detach())
            d_loss = (F.softplus(-real_logits) + F.softplus(fake_logits)).mean()
            (d_loss / cfg.accum).backward()

            g_sum, d_sum = g_sum + g_loss.detach() / cfg.accum, d_sum + d_loss.detach() / cfg.accum
            metrics.add(**{f"loss/{name}": loss.detach() for name, (_, loss) in losses.items()})
            metrics.add(**{
                "coherence/real": real_logits, "coherence/fake": fake_logits,
                "coherence/accuracy": torch.cat([real_logits > 0, fake_logits <= 0]).float()})
            metrics.add_where(seam(hole), **{"coherence/seam": (real_logits > fake_logits).float()})
            perf.add(len(x) * dist.world, flops + (T1 - t_prime - 1) * call_flops)

        # 5) one verdict on both losses for all ranks: a non-finite step changes nothing. All of it happens on
        #    the device, for which nothing here waits; what the verdict was is read a step later
        common.average_gradients(trained, dist.world)
        common.average_gradients(disc.parameters(), dist.world)
        g_norm = sharded.clip_grad_norm(trained, cfg.grad_clip or torch.inf)
        d_norm = torch.nn.utils.clip_grad_norm_(disc.parameters(), cfg.grad_clip or torch.inf)
        bad = verdict.give(step, g_norm, d_norm, g_sum, d_sum)
        opt.found_inf = disc_opt.found_inf = bad
        disc_opt.step()
        if moving:
            opt.step()
            ema.update(bad)
        opt.zero_grad(set_to_none=True)
        disc_opt.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        metrics.add(**{"loss/G": g_sum, "loss/D": d_sum, "grad/G": g_norm, "grad/D": d_norm})
        stop = verdict.read(last=step == total)
        if step == second:
            common.print0(f"memory, measured: {common.peak_memory()}")

        # 6) logs; held-out samples of the averaged weights in T steps, with the hacking alarms; checkpoints
        due = bool(cfg.sample_every) and (step % cfg.sample_every == 0 or step == total)
        extra = {"phase": phase, "T": T, "t_prime": t_prime, "lr": opt.param_groups[0]["lr"]}
        if due and (cfg.fsdp or common.is_main(dist)):
            with ema.swapped(), torch.no_grad(), autocast:
                ts = flow.timesteps(T, shift)
                alarms, sheet = judge(cfg, editor, base, space, scores, grid, ts)
            metrics.images(step, {"samples": sheet})
            extra |= alarms
        if due or step % cfg.log_every == 0 or step == total:
            metrics.flush(step, extra | perf.read() | {"data/skipped": loader.stats()["skipped"]})
        if step % cfg.save_every == 0 or step == total or stop:
            nets = {**model.trained_tensors(editor, ema), "coherence": disc.state_dict(),
                    "coherence_optimizer": common.optimizer_tensors(disc_opt)}
            meta = {"arch": editor.arch,
                    "config": asdict(cfg) | {"image_size": image_size, "shift": shift, "steps": T},
                    "precision": common.PRECISION[bf16],
                    "samples": step * cfg.batch_size * cfg.accum * dist.world, "coherence_arch": disc.arch,
                    "run_id": metrics.run_id, "stack": surroundings}
            if cfg.fsdp:
                saved = sharded.save_checkpoint(cfg.out, step, nets, opt, meta, dist=dist)
            else:
                nets["optimizer"] = common.optimizer_tensors(opt)
                saved = common.save_checkpoint(cfg.out, step, nets, meta, dist=dist)
            lost_saves = common.count_lost(cfg.out, saved, lost_saves, step == total or stop)
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

    for flag in ("batch_size", "accum", "log_every", "save_every", "disc_depth", "disc_width"):
        if getattr(cfg, flag) < 1:
            refuse(flag, "must be at least 1")
    for flag in ("lr", "disc_lr", "disc_first", "reward_noise", "warmup", "weight_decay", "grad_clip",
                 "sample_every", "workers", "lora"):
        if not getattr(cfg, flag) >= 0:
            refuse(flag, "must not be negative")
    for flag in ("p_outpaint", "p_edit", "p_inpaint", "p_erase", "p_promptfree"):
        if not 0 <= getattr(cfg, flag) <= 1:
            refuse(flag, "must be a proportion from 0 to 1")
    for flag in ("image_size", "disc_patch"):
        if getattr(cfg, flag) is not None and getattr(cfg, flag) < 1:
            refuse(flag, "must be at least 1")
    if not 0 <= cfg.ema < 1:
        refuse("ema", "must be at least 0 and below 1")
    if cfg.shift is not None and not cfg.shift > 0:
        refuse("shift", "must be above 0; 1 leaves the times as they are")
    if cfg.disc_width % max(1, cfg.disc_width // 32):
        refuse("disc_width", "must be a multiple of 32, the width of an attention head")


def parse_phases(text: str) -> list[tuple[int, int, int, int]]:
    """"T/T1/T2xSTEPS,..." -> [(T, T1, T2, steps), ...]; T >= T1 > T2 >= 1, so that stage 2 has work to do."""
    phases = []
    for part in text.split(","):
        m = re.fullmatch(r"(\d+)/(\d+)/(\d+)x(\d+)", part.strip())
        T, T1, T2, steps = map(int, m.groups()) if m else (0, 0, 0, 0)
        if not T >= T1 > T2 >= 1 or not steps:
            raise SystemExit(f"error: --phases: {part}: write T/T1/T2xSTEPS with T >= T1 > T2 >= 1, such as "
                             "20/15/10x2000")
        phases.append((T, T1, T2, steps))
    return phases


def phase_at(phases: list[tuple[int, int, int, int]], step: int) -> tuple[int, tuple[int, int, int]]:
    """Number (from 1) and (T, T1, T2) of the phase that optimiser step `step` (from 0) belongs to."""
    for number, (*ttt, steps) in enumerate(phases, 1):
        if step < steps:
            return number, tuple(ttt)
        step -= steps
    raise ValueError("step lies behind the last phase")


def load_editor(path: str) -> tuple[model.Editor | model.EditNet, dict]:
    """The averaged weights of an inpainting model or of an instruction editor, or SD3's; and the manifest.

    SD3 has no mask input: it gets one whose columns are zero, and learns to read it from the feedback alone.
    """
    if weights.is_public(path):
        state, manifest = stack.open_public(path)
        editor = model.build_editor(manifest["arch"] | {"inpaint": True}, f"--base: {path}")
        common.print0(f"note: --base: {path}: has no mask input and begins with an empty one: "
                      "train_omni.py --stage inpaint teaches it to read masks first")
        common.load_state(editor, model.widen_input(state, editor.cfg.in_channels,
                                                    "mmdit.x_embedder.proj.weight"), path)
        return editor, manifest
    tensors, manifest = common.load_checkpoint(path, ("ema", "model"))
    arch, state = manifest.get("arch", {}), tensors.get("ema") or tensors["model"]
    if arch.get("kind") == "editnet":
        net = model.build_editnet(arch, f"--base: {path}")
        common.load_state(net, state, path)
        if net.variant != "concat":  # its base keeps what it knows, as in train_omni.py
            net.base.requires_grad_(False)
        elif net.cfg.txt_bytes:
            net.base.text.requires_grad_(False)
        return net, manifest
    editor = model.build_editor(arch, f"--base: {path}")
    if not editor.cfg.inpaint:
        raise SystemExit(f"error: --base: {path}: a text-to-image model without mask input: run "
                         "train_omni.py --stage inpaint first")
    common.load_state(editor, state, path)
    return editor, manifest


def draws(cfg: Config, phases: list, channels: int, stride: int, txt_bytes: int, batch: dict) -> dict:
    """What the data workers add to a batch: noise [B, C, h, w] in the space of `channels` and `stride`; veil
    [B, 3, H, W], the rewards' noise, if there is any; text, as bytes [B, txt_bytes] or, for encoders from
    outside, captions; told, as told_of has it, and prompted [B], 1 where something is told; and t', one for
    the whole batch on all ranks, so that they do equal work."""
    step = min(batch["step"] // cfg.accum, sum(phase[-1] for phase in phases) - 1)  # they work ahead
    _, (_, _, T2) = phase_at(phases, step)
    gens = common.generators(cfg.seed, batch["step"], batch["position"])
    H, W = batch["image"].shape[1:3]
    out = {"noise": common.randn(gens, (channels, H // stride, W // stride))}
    if cfg.reward_noise:
        out["veil"] = common.randn(gens, (3, H, W))
    t_prime = common.randint(common.generators(cfg.seed, batch["step"], [0], stream=1), 1, T2 + 1)
    told, text = told_of(batch), batch["caption"]
    out |= {"t_prime": int(t_prime), "told": told, "prompted": torch.tensor([float(c != "") for c in told])}
    return out | {"text": model.byte_ids(text, txt_bytes) if txt_bytes else text,
                  "segments": None}  # label maps have done their work: nothing to copy


def told_of(batch: dict) -> list[str]:
    """The captions that rewards are told: none for the erase prompt; those of the target of an edit."""
    if "target_caption" in batch:
        return batch["target_caption"]
    return ["" if task == "erase" else c for c, task in zip(batch["caption"], batch["task"])]


def prepare(batch: dict, space) -> tuple:
    """What a batch means to PeFL -> (what stage 1 noises [B, C, h, w], the editor's two conditions, what
    changes [B, 1, H, W], (what L_reg holds to [B, 3, H, W], where)).

    Inpainting: x (1 - m); m, x (1 - m); m; x everywhere.
    Instructions: the source; source, region; where target and source differ by more than 0.1; the source in
    the rest. Some pixels of a JPEG (6 % at quality 90) differ by more without being edited.
    """
    x, mask = batch["image"], batch["mask"]
    if "source" not in batch:
        masked = space.encode(x * (1 - mask))
        return masked, (frozen.shrink(mask, space.stride), masked), mask, (x, torch.ones_like(mask))
    source = batch["source"]
    changed = ((source - x).abs().amax(1, keepdim=True) > 0.1).float()
    src = space.encode(source)
    return src, (src, frozen.shrink(mask, space.stride)), changed, (source, 1 - changed)


def load_reward(path: str, device: torch.device, what: str):
    """A frozen reward model in evaluation mode, or a published one: a function of picture and captions.

    `what` names it in errors.
    """
    if path.partition(":")[0] in towers.REWARDS:
        return towers.open_reward(path, device=device)
    tensors, manifest = common.load_checkpoint(path, ("model",))
    net = model.build_reward(manifest.get("arch", {}), what)
    if net.tokenizer is None:
        raise SystemExit(f"error: {what}: holds no tokenizer: use a folder that train_reward.py wrote")
    common.load_state(net, tensors["model"], path)
    scores = manifest.get("meta", {}).get("val") or {}
    net.score_mean, net.score_std = scores.get("score_mean", 0.0), max(scores.get("score_std", 1.0), 1e-3)
    return net.to(device).eval().requires_grad_(False)


def score_of(reward):
    """A reward as a function of pictures [B, 3, H, W] in [-1, 1] and B captions -> [B]."""
    if not isinstance(reward, model.PreferenceReward):
        return reward
    return lambda image, captions: reward.normalised(image, *reward.tokenize(captions, image.device))


def load_coherence(cfg: Config, image_size: int, stride: int) -> model.CoherenceReward:
    """R_gamma: fresh, from a PeFL run's coherence model, or on a trained reward's image tower with a fresh
    head. The paper's backbone is a ViT, of unknown origin; a tower that knows pictures already learns to tell
    generated pixels several times faster than a fresh one (LOG.md)."""
    patch = cfg.disc_patch or max(stride, 4)
    heads = max(1, cfg.disc_width // 32)
    if not cfg.disc_init:
        return model.CoherenceReward(model.CoherenceConfig(
            image_size // patch, patch, cfg.disc_width, cfg.disc_depth, heads))
    tensors, manifest = common.load_checkpoint(cfg.disc_init, ("coherence", "model"))
    if arch := manifest["meta"].get("coherence_arch"):
        disc = model.build_coherence(arch, f"--disc_init: {cfg.disc_init}")
        common.load_state(disc, tensors["coherence"], cfg.disc_init)
        return disc
    r = model.build_reward(manifest["arch"], f"--disc_init: {cfg.disc_init}").cfg
    disc = model.CoherenceReward(model.CoherenceConfig(
        r.image_size // r.patch, r.patch, r.vit_width, r.vit_depth, r.vit_heads))
    tower = "blip.visual_encoder."
    common.load_state(disc.vit, {k.removeprefix(tower): v for k, v in tensors["model"].items()
                                 if k.startswith(tower)}, cfg.disc_init)
    return disc


def load_perceptual(cfg: Config, rewards: dict, device: torch.device):
    """V of Eq. 3, and its name: VGG16 where its weights are given, else a reward's frozen image tower."""
    if cfg.vgg:
        return frozen.load_vgg16(cfg.vgg).to(device), f"VGG16 ({cfg.vgg})"
    for name in ("aesthetic", "alignment"):
        if isinstance(rewards.get(name), model.PreferenceReward):
            return rewards[name].image_features, f"the {name} reward's image tower (no --vgg given)"
    return (lambda image: []), "nothing (neither --vgg nor a reward of ours given)"


def feature_l1(features, x: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """|| V(x) - V(G) ||_1, the mean over each map's elements, then over maps (Eq. 3)."""
    with torch.no_grad():
        real = features(x)
    gaps = [(a - b).abs().mean() for a, b in zip(real, features(fake))]
    return torch.stack(gaps).mean() if gaps else fake.new_zeros(())


def maybe_checkpoint(cfg: Config, fn, *inputs):
    """fn(*inputs); its activations are recomputed in the backward pass with --checkpointing."""
    return checkpoint(fn, *inputs, use_reentrant=False) if cfg.checkpointing else fn(*inputs)


def seam(mask: torch.Tensor) -> torch.Tensor:
    """Pixels within 2 of the hole's border, [B, 1, H, W] bool: where incoherence shows. A coherence model
    that knows nothing scores the real picture above the generated one in half of them."""
    return (F.max_pool2d(mask, 5, 1, 2) > 0) & (F.max_pool2d(1 - mask, 5, 1, 2) > 0)


def heldout_grid(cfg: Config, train, instructed: bool, image_size: int, tasks: dict, stride: int,
                 device: torch.device) -> dict:
    """The fixed held-out pictures, masks and captions of the judge and its sheet. train: the other part."""
    at = dict(stride=stride, device=device)
    if instructed:
        source = data.heldout_or(train, data.open_edits, cfg.data)
        return next(data.make_edit_eval_batches(source, range(min(32, len(source))), image_size, 32,
                                                p_region=cfg.p_region, **at))
    source = data.heldout_or(train, data.open_source, cfg.data)
    return next(data.make_eval_batches(source, range(min(32, len(source))), image_size, 32, tasks, **at))


def image_stats(x: torch.Tensor) -> dict[str, float]:
    """Statistics that reward hacking moves, to compare with the real pictures' (default ours, paper silent).

    x [B, 3, H, W] in [-1, 1] -> saturation, contrast, Laplacian variance (sharpness, grain), share clipped.
    """
    x = x.float()
    grey = x.mean(1, keepdim=True)
    rows = grey[..., :-2, 1:-1] + grey[..., 2:, 1:-1]
    cols = grey[..., 1:-1, :-2] + grey[..., 1:-1, 2:]
    laplace = 4 * grey[..., 1:-1, 1:-1] - rows - cols
    return {"saturation": (x.amax(1) - x.amin(1)).mean().item(),
            "contrast": grey.flatten(1).std(1).mean().item(),
            "laplacian": laplace.var().item(),
            "clipped": (x.abs() > 0.99).float().mean().item()}


def judge(cfg: Config, editor, base, space, scores: dict, batch: dict, ts: list[float]):
    """Held-out samples without guidance: rewards (trained and held out), statistics over the real pictures',
    change outside the mask, distance to the frozen base in velocity and in weights; and a sheet of them."""
    x, captions, told = batch["image"], batch["caption"], told_of(batch)
    start, condition, hole, (like, _) = prepare(batch, space)
    noise = common.randn(common.generators(cfg.seed, 0, range(len(x)), stream=9), start.shape[1:], x.device)
    out, v = {}, {}
    for name, net in (("base", base), ("tuned", editor)):
        txt, vec = net.encode_text(captions)
        z0 = flow.sample(lambda x, t: net(x, t, txt, vec, *condition), noise, ts)
        out[name] = space.decode(z0).clamp(-1, 1)
        half = torch.full((len(x),), 0.5, device=x.device)
        v[name] = net(flow.interpolate(space.encode(x), noise, half), half, txt, vec, *condition).float()
    row = {}
    for name, score in scores.items():
        for who, image in out.items():
            row[f"judge/{name}_{who}"] = score(image, told).mean().item()
    real = image_stats(x)
    row |= {f"alarm/{k}": value / max(real[k], 1e-6) for k, value in image_stats(out["tuned"]).items()}
    keep = (1 - hole).expand_as(x)
    change = ((out["tuned"] - like).abs() * keep).sum() / keep.sum().clamp(min=1)
    row["alarm/change_outside_mask"] = change.item()
    row["alarm/velocity_drift"] = ((v["tuned"] - v["base"]).norm() / v["base"].norm()).item()
    before = base.state_dict()
    moved = sum((w.float() - before[k].float()).square().sum()
                for k, w in sharded.gathered(model.merged_state(editor))).sqrt()
    row["alarm/weight_drift"] = (moved / sum(w.float().square().sum() for w in before.values()).sqrt()).item()
    given = batch["source"] if "source" in batch else x * (1 - hole)
    rows = [[p.cpu() for p in four] for four in zip(x[:8], given, out["base"], out["tuned"])]
    sheet = common.contact_sheet(rows, ["picture", "input", "base", "tuned"], row_titles=captions[:8])
    return row, sheet


if __name__ == "__main__":
    try:
        common.refuse_old_flags()
        cli = (tyro.conf.FlagConversionOff, tyro.conf.UsePythonSyntaxForLiteralCollections)
        main(tyro.cli(Config, description=__doc__, config=cli))
    except KeyboardInterrupt:  # an exit code of 0 would let a shell script go on
        raise SystemExit("interrupted: the same command resumes at the newest checkpoint") from None
