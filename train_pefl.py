"""Perceptual Feedback Learning (ByteEdit, Sec. 3): tune an editor by back-propagating rewards.

    python train_pefl.py --aesthetic out/aesthetic --alignment out/alignment --out out/pefl
    python train_pefl.py ... --start noise --hold known --w_alignment 0.001   # not the paper's; better here
    torchrun --nproc_per_node=8 -- train_pefl.py --base out/inpaint --aesthetic ... --alignment ... --data ...
    python train_pefl.py --base out/editnet --aesthetic ...       # an instruction editor, on pairs (Sec. 5)
    python train_pefl.py --base sd3_medium_folder --alignment imagereward:ImageReward.pt,vocab.txt --vgg ...

One step, for a picture x, a mask m and a caption c, in the paper's letters (Sec. 3.1):
    stage 1   noise the masked input x (1 - m) to the fixed step T1; the noisier steps are skipped
    stage 2   denoise T1 -> t' without gradient, t' drawn from [1, T2]
    stage 3   predict x0' = G(x, m, c, t') in one call of the network, with gradient

Then L^G = L_reward + eta (L_reg + L_vgg) for the editor G, with the rewards R_alpha (aesthetic), R_beta
(alignment) and R_gamma (coherence) in L_reward (Eq. 2-4, 7, 8); and L^D for R_gamma, which learns online as
the discriminator (Eq. 6, 8). Progressive phases shrink T, T1 and T2 (Sec. 3.3). The same command resumes.
Where a flag's help names a section or an equation, and not "ours", its default is the paper's.

Where this differs from the equations: the terms of L_reward have weights (Sec. 4.1; Eq. 7 sums them); scores
of our own rewards are in deviations of held-out scores, since -log sigmoid of a large one has no gradient
left; R_gamma sees the picture alone, not c as in Eq. 7, since coherence is no matter of words; || . ||_1 is
the mean over elements; and t' is drawn once for a micro-batch on all ranks, so that they do equal work.
Sec. 4.1 breaks off after "we introduced a 50". We take it to mean that training does not start from pure
noise, which stage 1 does (T1 = 15 of 20), and use no other number from it. runs/memory.py counts a step's
memory by the same calls: who adds a network to the loop adds it there.

An instruction editor (ours: the paper names it as future work) starts from its noised source picture instead
of the masked input, and has targets as real pictures. L_reg holds x0' to the source where source and target
agree; L_vgg compares all of x0' with the target, or with --hold known that same part alone.
"""

import copy
import math
import re
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from torch.utils.checkpoint import checkpoint as recompute

import checkpoint
import common
import data
import flow
import log
import model
import pipeline
from common import Verdict
from log import Perf
from readers.edits import open_edits
from readers.files import heldout_or
from readers.pictures import open_source
from rewards import PreferenceReward, feature_l1, open_coherence, open_features, open_reward, score_of


@dataclass
class Config:
    base: Annotated[str, tyro.conf.arg(aliases=["--ckpt", "--init"])] = "assets/base"  # the editor G to tune
    sd3: str | None = None  # SD3's VAE and text encoders; None = those --base came with
    tokenizers: str | None = None  # folder with tokenizer, tokenizer_2, tokenizer_3, where --sd3 is one file
    cache: str | None = None  # folder of make_cache.py --split all: text features in place of the encoders
    aesthetic: str | None = None  # R_alpha: folder of train_reward.py, or NAME:PATH,PATH; A,B: their mean
    alignment: str | None = None  # R_beta: the same; NAME is a published reward of rewards.open_reward
    heldout_reward: str | None = None  # a reward that is logged and never trained on: it shows hacking
    vgg: str | None = None  # torchvision VGG16 for L_vgg; None = the tower of a reward of train_reward.py
    out: str = "out/pefl"  # run folder: checkpoints, metrics.jsonl, sample sheets
    data: str = "scenes"  # "scenes", a folder of pictures, or parquet; instruction editors: PRESET:PATH
    image_size: int | None = None  # side of the training square in pixels; None = the base's
    aspects: bool = False  # train on buckets from 1:4 to 4:1, of which rewards see the centre square (ours)
    tasks: str = "t2i=2,outpaint=7,edit=7,inpaint=3,erase=3"  # relative weights (ours); t2i: all is hole
    p_region: float = 0.3  # instruction editors: share (0 to 1) of the pairs with a mask that see it
    batch_size: int = 16  # pictures per rank and micro-batch (default ours, paper silent)
    accum: int = 1  # micro-batches per optimiser step
    phases: str = "20/15/10x2000,8/6/3x2000"  # T/T1/T2 (Sec. 3.3) x steps (ours; all of the loop's), in turn
    guidance: float = 1.0  # classifier-free, of stages 2 and 3: give what you sample with (ours); 1 = none
    start: Literal["masked", "noise"] = "masked"  # of stage 2: x (1 - m) noised to T1; or noise, at T (ours)
    w_aesthetic: float = 0.01  # weight of R_alpha in L_reward (Sec. 4.1)
    w_alignment: float = 0.01  # weight of R_beta in L_reward (Sec. 4.1)
    w_coherence: float = 0.05  # weight of R_gamma in L_reward, the adversarial loss (Sec. 4.1)
    adversarial_from: int = 2  # first phase with R_gamma in L_reward (Sec. 4.1); beyond the last: never
    reward_noise: float = 0.0  # std of noise on the pictures, in [-1, 1], that rewards see (ours)
    eta: float = 1.0  # weight of L_reg + L_vgg (Eq. 4; default ours, paper silent)
    hold: Literal["all", "known"] = "all"  # L_reg, L_vgg hold everywhere (Eq. 3), or outside the hole (ours)
    disc_init: str | None = None  # R_gamma begins as a PeFL run's, or a reward's image tower; None = fresh
    disc_lr: float = 1e-4  # learning rate of R_gamma (default ours, paper silent)
    disc_first: int = 0  # first steps of --phases, in which only R_gamma learns (0 as in the paper)
    disc_updates: int = 1  # steps of R_gamma for each of the editor's, all counted in --phases (paper: 1)
    lr: float = 2e-6  # learning rate of the editor (Sec. 4.1)
    warmup: int = 1000  # steps of linear warm-up, from --disc_first on (Sec. 4.1)
    ema: float = 0.9999  # largest decay of the averaged weights (Sec. 4.1), reached late: common.EMA
    lora: int = 0  # rank of a low-rank update of the joint blocks; 0 = tune every weight
    checkpointing: int = 0  # recompute every n-th block of the editor, and decoder and rewards; 0 = none
    fsdp: bool = False  # shard the editor's blocks over torchrun's ranks (common.shard)
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast where the hardware has it
    seed: int = 0  # seed of data order, noise, t' and R_gamma
    workers: int = 1  # processes per rank that load data
    device: str = "auto"  # auto (a GPU where there is one), cpu or cuda
    log_every: int = 20  # steps between rows of metrics
    sample_every: int = 200  # steps between sample sheets; 0 = never
    save_every: int = 200  # steps between checkpoints
    keep: int = 2  # how many of the newest checkpoints are kept
    wandb: Literal["auto", "online", "offline", "off"] = "auto"  # auto: online if logged in


PROMPT_FREE = {"outpaint": 0.3, "inpaint": 0.3}  # share without a prompt (default ours, paper silent)
# Published scores, about so large that Eq. 2 hardly has a slope there: sigmoid(-score)
FLAT = {"pickscore": (20, "2e-9"), "aesthetic": (5.5, "0.004")}
# AdamW's betas and the limit of the gradient's global norm, of either network (ours, paper silent). The first
# beta of a discriminator is low, as in GANs since DCGAN: what it should answer to moves
BETAS, DISC_BETAS, GRAD_CLIP = (0.9, 0.99), (0.5, 0.99), 1.0


def main(cfg: Config) -> None:
    check(cfg)
    dist = common.setup(cfg.device)
    common.agree(dist, asdict(cfg) | {"code": common.code_hash()})
    device = dist.device
    bf16 = common.use_bf16(cfg.precision, dist)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    phases = parse_phases(cfg.phases)
    total = sum(phase[-1] for phase in phases)

    # 1) the editor to tune, and a frozen copy that says how far it has moved
    pipe = pipeline.open_editor(cfg.base, device, ("fill", "follow"), "--base", sd3=cfg.sd3, mask_input=True,
                                tokenizers=cfg.tokenizers, cache=cfg.cache)
    editor, space, instructed, shift = pipe.net, pipe.space, pipe.follows, pipe.shift
    image_size, patch = side_of(cfg, pipe), editor.cfg.patch * space.stride
    if image_size % patch:
        raise SystemExit(f"error: --image_size: {image_size}: must be a multiple of {patch}, the editor's "
                         "patch in pixels")
    if instructed and cfg.tasks != Config.tasks:
        common.refuse(cfg, "tasks", "are kinds of holes, and an instruction editor has pairs: leave it out")
    if not instructed and cfg.p_region != Config.p_region:
        common.refuse(cfg, "p_region", "is of pairs, and this editor fills holes: leave it out")
    base = copy.deepcopy(editor).requires_grad_(False).to(device)
    prepare_editor(cfg, pipe)
    frozen = checkpoint.frozen_bits(editor)
    if not cfg.fsdp:
        editor.to(device)

    # 2) rewards: R_alpha (Eq. 1) and R_beta (Eq. 5), of train_reward.py, are frozen; R_gamma learns online
    #    and is the discriminator
    rewards = open_rewards(cfg, device)
    scores = {name: mean_score(nets) for name, nets in rewards.items()}
    # of each role the first reward of train_reward.py: its image tower can serve as V of Eq. 3
    ours = {k: r for k, nets in rewards.items() for r in reversed(nets) if isinstance(r, PreferenceReward)}
    features, source_of_features = open_features(cfg.vgg, ours, device)
    if cfg.eta and not (cfg.vgg or ours):
        common.print0("warning: --vgg: is not given, nor a reward of train_reward.py, whose image tower "
                      "could stand in for it: L_vgg (Eq. 3) is 0")
    torch.manual_seed(cfg.seed)
    disc = open_coherence(cfg.disc_init, image_size, patch, "--disc_init").to(device)
    tokens = (image_size // patch) ** 2
    size = cfg.batch_size * rows_of(cfg), tokens, pipeline.text_tokens(editor, pipe.stack)
    call_flops = model.flops(editor, *size, backward=False)  # of a call of the editor in stage 2
    flops = model.flops(editor, *size)  # and of stage 3
    if cfg.fsdp:
        common.shard(editor, dist, bf16)
    editor_params, disc_params = [p for p in editor.parameters() if p.requires_grad], list(disc.parameters())
    n = common.n_params
    common.print0(f"editor {n(editor) / 1e6:.1f} M ({n(editor, True) / 1e6:.2f} M trained), coherence "
                  f"{n(disc) / 1e6:.2f} M, rewards {', '.join(scores) or 'none'}, L_vgg from "
                  f"{source_of_features}, {device}")

    # 3) optimisers, averaged weights, resume
    groups = common.split_groups(model.param_groups(editor, weight_decay=0.0))
    opt = torch.optim.AdamW(groups, lr=cfg.lr, betas=BETAS, fused=True)
    disc_opt = torch.optim.AdamW(disc_params, lr=cfg.disc_lr, betas=DISC_BETAS, weight_decay=0.0, fused=True)
    ema = common.EMA(editor, cfg.ema)
    checkpoint.claim(cfg.out)
    step, run_id = 0, None
    state = {"model": editor, "ema": ema, "optimizer": opt,
             "coherence": disc, "coherence_optimizer": disc_opt}
    if saved := checkpoint.resume(cfg.out, state, frozen=frozen):
        step, run_id = saved["step"], saved["meta"].get("run_id")
        common.print0(f"resumed {cfg.out} at step {step} ({saved['samples']} pictures seen)")
        for flag in ("aesthetic", "alignment", "vgg"):
            if (had := saved["config"].get(flag)) and not getattr(cfg, flag):
                raise SystemExit(f"error: --{flag}: {had}: {cfg.out} began with it, and its loss would be "
                                 "another without it: give it again, or begin another --out")
        checkpoint.warn_changed(cfg.out, saved, asdict(cfg) | {"shift": shift}, bf16)
    metrics = log.Metrics(cfg.out, dist, asdict(cfg), cfg.wandb, run_id, step or None)
    meta = {"arch": editor.arch, "coherence_arch": disc.arch, "precision": common.PRECISION[bf16],
            "run_id": metrics.run_id, "stack": pipe.stack, "frozen": frozen,
            "config": asdict(cfg) | {"image_size": image_size, "shift": shift}}

    # 4) data: x, m, c of --tasks. The workers also do what `draws` says: noise and t' are functions of (seed,
    #    step, position of the sample). Sides are multiples of every patch that looks at pictures as they are
    towers = [r.cfg.patch for nets in rewards.values() for r in nets
              if isinstance(r, PreferenceReward) and not cfg.vgg]
    stride = math.lcm(patch, disc.cfg.patch, *towers)
    at = dict(seed=cfg.seed, rank=dist.rank, world=dist.world, workers=cfg.workers, aspects=cfg.aspects,
              start_step=step * cfg.accum, stride=stride, device=device)
    at["draw"] = partial(draws, cfg, phases, space.channels, space.stride, editor.cfg.txt_bytes)
    if instructed:
        source = open_edits(cfg.data, "train")
        loader = data.make_edit_loader(source, image_size, cfg.batch_size, p_region=cfg.p_region, **at)
    else:
        source = open_source(cfg.data, "train")
        at["prompt_free"] = PROMPT_FREE
        loader = data.make_loader(source, image_size, cfg.batch_size, cfg.tasks, **at)
    common.print0(loader.summary)
    pipeline.check_shapes(editor, loader.shapes, patch, image_size)
    common.agree(dist, {"data": loader.fingerprint(), "weights": common.bits(editor),
                        "coherence": common.bits(disc)})
    grid = heldout_grid(cfg, source, instructed, image_size, stride, device)
    # R_theta of Eq. 7, theta in {alpha, beta, gamma}: functions of pictures and captions
    R = {k: r for k, r in scores.items() if k != "heldout"} | {"coherence": lambda image, c: disc(image)}
    perf, lost_saves, stop = Perf(device, bf16, f"--data {cfg.data}"), 0, False
    first_step, captions_due = step, bool(cfg.alignment and cfg.w_alignment)  # said once if none comes
    pictures = cfg.batch_size * cfg.accum * dist.world  # of a step
    verdict = Verdict(dist, cfg.out, "lower --lr or the reward weights")
    bar = log.progress(total, step, "pefl", dist)

    while step < total and not stop:
        phase, (T, T1, T2) = phase_at(phases, step)
        weights = weights_at(cfg, R, adversarial=phase >= cfg.adversarial_from)
        # R_gamma learns alone at first, and in all but one of --disc_updates steps
        editor_learns = step >= cfg.disc_first and (step - cfg.disc_first + 1) % cfg.disc_updates == 0
        for group in opt.param_groups:
            group["lr"] = common.lr_at(max(step - cfg.disc_first, 0), cfg.lr, cfg.warmup, total)
        g_sum = d_sum = torch.zeros((), device=device)
        for micro in range(cfg.accum):
            with perf.wait():
                batch = next(loader)
            x, c, t_prime = batch["image"], batch["c"], batch["t_prime"]
            given = read_batch(batch, editor, space, cfg.hold)

            # 5) Stage 1: diffuse x (1 - m) to step T1. The noisier steps, T ... T1 + 1, are skipped (with
            #    --start noise none is, and at T all of x is gone)
            ts = flow.timesteps(T, shift, start=T if cfg.start == "noise" else T1, stop=t_prime)
            t_start, t = (torch.full((len(x),), time, device=device) for time in (ts[0], ts[-1]))
            x_t = flow.interpolate(given.start, batch["noise"], t_start)

            # Stage 2: denoise T1 -> t' without gradient, so that PeFL's memory is that of a single call
            with autocast:
                velocity = conditioned(editor, batch["text"], given.condition, cfg.guidance)
                with torch.no_grad():
                    x_t = flow.sample(velocity, x_t, ts)

            disc.requires_grad_(False)  # L^G is the editor's alone
            with autocast, torch.set_grad_enabled(editor_learns):
                # Stage 3: predict x0' = G(x, m, c, t') from x_t' in one call, with gradient, [B, 3, H, W].
                # It is not clamped to [-1, 1], so that values out of range keep a gradient (ours)
                x0 = recomputed(cfg, space.decode, flow.x0_from_v(x_t, velocity(x_t, t), t))

                # L_reward, Eq. 2 and 7: -log sigmoid of R_alpha and R_beta, and of R_gamma at every pixel
                reward_noise = batch["reward_noise"] if cfg.reward_noise else torch.zeros_like(x)
                seen, losses, rated = x0 + reward_noise, {}, {}
                for name, weight in weights.items():
                    r = recomputed(cfg, R[name], seen, c)                             # [B], or [B, 1, H, W]
                    # without a c there is nothing to align with: that picture's term is 0, and counts
                    asked = batch["has_c"] if name == "alignment" else torch.ones_like(r)
                    losses[name] = weight, -(asked * F.logsigmoid(r)).mean()
                    rated[name] = r.detach()

                # L_reg and L_vgg, Eq. 3: stay with the real picture, in pixels (the anchor is x) and features
                losses["reg"] = cfg.eta, ((given.anchor - x0).abs() * given.kept).mean()
                # --hold known: where V looks at the hole it sees the real one, which has no gradient
                compared = given.hole * x + (1 - given.hole) * x0 if cfg.hold == "known" else x0
                losses["vgg"] = cfg.eta, feature_l1(features, x, compared)

            # 6) L^G, Eq. 4 and 8: L_reward + eta (L_reg + L_vgg), for the editor
            g_loss = sum(weight * loss for weight, loss in losses.values())
            if editor_learns:
                (g_loss / cfg.accum).backward()
            # 7) L^D, Eq. 6 and 8, for R_gamma: every pixel z of x is real, every pixel z' of x0' generated
            disc.requires_grad_(True)
            with autocast:
                real, fake = disc(x + reward_noise), disc(seen.detach())                             # logits
            d_loss = (F.softplus(-real) + F.softplus(fake)).mean()
            (d_loss / cfg.accum).backward()
            g_sum, d_sum = g_sum + g_loss.detach() / cfg.accum, d_sum + d_loss.detach() / cfg.accum
            watch(metrics, losses, rated, batch["has_c"] > 0, real, fake, given.hole)
            perf.add(len(x) * dist.world, flops + (len(ts) - 1) * call_flops)

        # 8) one verdict for all ranks, on the device and read a step later: a non-finite step changes nothing
        common.average_gradients(editor_params + disc_params, dist.world)
        g_norm, d_norm = (common.clip_grad_norm(params, GRAD_CLIP) for params in (editor_params, disc_params))
        opt.found_inf = disc_opt.found_inf = bad = verdict.give(step, g_norm, d_norm, g_sum, d_sum)
        disc_opt.step()
        if editor_learns:
            opt.step()
            ema.update(bad)
        opt.zero_grad()
        disc_opt.zero_grad()
        step += 1
        bar.update()
        metrics.add(**{"loss/G": g_sum, "loss/D": d_sum, "grad_norm/editor": g_norm,
                       "grad_norm/coherence": d_norm})
        last = step == total
        stop = verdict.read(last=last or step % cfg.save_every == 0)

        # 9) logs; held-out samples of the averaged weights in T steps, with the hacking alarms; checkpoints
        row = {"phase": phase, "T": T, "t_prime": t_prime, "lr": opt.param_groups[0]["lr"]}
        due = cfg.sample_every and (last or step % cfg.sample_every == 0)
        if due and (cfg.fsdp or dist.rank == 0):  # shards: all ranks compute the sheet
            with ema.swapped(), torch.no_grad(), autocast:
                alarms, sheet = judge(cfg, editor, base, space, scores, grid, flow.timesteps(T, shift), bf16)
            metrics.images(step, {"samples": sheet})
            row |= alarms
        if due or last or step % cfg.log_every == 0:
            row = metrics.flush(step, row | perf.read() | {"data/skipped": loader.stats()["skipped"]})
            if captions_due and "reward/alignment" not in row:
                common.print0(f"warning: --alignment: {cfg.alignment}: does nothing: of {source.name} none "
                              f"of {(step - first_step) * pictures:,} pictures so far has a caption for it: "
                              "give data with captions, of edits those of their targets")
            captions_due = False
        if last or stop or step % cfg.save_every == 0 and not verdict.bad:
            meta["samples"] = step * pictures
            saved = checkpoint.save(cfg.out, step, state, meta, 0 if verdict.bad else cfg.keep, dist)
            lost_saves = checkpoint.count_lost(cfg.out, saved, lost_saves, last or stop)
    bar.close()
    if stop:
        common.print0(f"stopped by a signal at step {step}; the same command resumes")
    common.print0(log.peak_memory())
    metrics.close()
    loader.close()
    common.cleanup()


def check(cfg: Config) -> None:
    """Refuse values that cannot work, before anything is loaded."""
    common.check_bounds(
        cfg, at_least_1=("batch_size", "accum", "log_every", "save_every", "image_size", "disc_updates",
                         "adversarial_from"),
        not_negative=("lr", "disc_lr", "disc_first", "reward_noise", "warmup", "sample_every", "keep",
                      "workers", "lora", "checkpointing", "eta", "w_aesthetic", "w_alignment", "w_coherence"),
        above_0=("guidance",), below_1=("ema",), share=("p_region",))
    data.mixture(cfg.tasks)
    total = sum(phase[-1] for phase in parse_phases(cfg.phases))
    if (total - cfg.disc_first) // cfg.disc_updates < 1:
        common.print0(f"warning: --disc_first: {cfg.disc_first}, with --disc_updates {cfg.disc_updates}: of "
                      f"the {total} steps of --phases the editor gets none, only R_gamma learns")
    if not cfg.w_coherence or cfg.adversarial_from > len(parse_phases(cfg.phases)):
        common.print0("note: --adversarial_from, --w_coherence: R_gamma learns and is logged, and is in no "
                      "phase's L_reward")
    if cfg.heldout_reward and not cfg.sample_every:
        common.print0("warning: --heldout_reward: is asked with the sample sheets, and --sample_every 0 "
                      "makes none: it is never logged")


def parse_phases(text: str) -> list[tuple[int, int, int, int]]:
    """"T/T1/T2xSTEPS,..." -> [(T, T1, T2, steps), ...]; T >= T1 > T2 >= 1, so that stage 2 has work to do."""
    phases = []
    for part in text.split(","):
        m = re.fullmatch(r"(\d{1,4})/(\d{1,4})/(\d{1,4})x(\d{1,9})", part.strip())
        T, T1, T2, steps = map(int, m.groups()) if m else (0, 0, 0, 0)
        if not T >= T1 > T2 >= 1 or not steps or len(phases) == 1000:
            raise SystemExit(f"error: --phases: {part[:60]}: write T/T1/T2xSTEPS with T >= T1 > T2 >= 1, "
                             "such as 20/15/10x2000")
        phases.append((T, T1, T2, steps))
    return phases


def phase_at(phases: list[tuple[int, int, int, int]], step: int) -> tuple[int, tuple[int, int, int]]:
    """Number (from 1) and (T, T1, T2) of the phase that optimiser step `step` (from 0) belongs to."""
    for number, (*ttt, steps) in enumerate(phases, 1):
        if step < steps:
            return number, tuple(ttt)
        step -= steps
    raise ValueError("step lies behind the last phase")


def weights_at(cfg: Config, R: dict, adversarial: bool) -> dict[str, float]:
    """The terms of L_reward (Eq. 7) in a phase: name of R_theta -> weight, the flag w_NAME. Those of weight 0
    are left out."""
    weights = {name: getattr(cfg, f"w_{name}") for name in R}
    weights["coherence"] *= adversarial
    return {name: weight for name, weight in weights.items() if weight}


def open_rewards(cfg: Config, device: torch.device | str = "cpu") -> dict[str, list]:
    """The frozen rewards that are named, by what they are: aesthetic, alignment, heldout. A mean of several
    is ours: what raises one by a trick seldom raises the others."""
    named = {"aesthetic": cfg.aesthetic, "alignment": cfg.alignment, "heldout_reward": cfg.heldout_reward}
    for flag, spec in named.items():
        if spec and not all(members(spec)):
            common.refuse(cfg, flag, "has nothing before or after a comma: give A,B, or A alone")
    for flag in ("aesthetic", "alignment"):
        for name, (score, slope) in FLAT.items():
            if any(part.startswith(f"{name}:") for part in members(named[flag] or "")):
                common.print0(f"warning: --{flag}: {name}: its scores are about {score}, where -log sigmoid "
                              f"has a slope of {slope}: it will hardly train; take a reward of "
                              "train_reward.py or imagereward:, or this one as --heldout_reward")
    return {flag.removesuffix("_reward"): [open_reward(part, device, f"--{flag}") for part in members(spec)]
            for flag, spec in named.items() if spec}


def members(spec: str) -> list[str]:
    """ "out/a,imagereward:MODEL,VOCAB" -> its two rewards: behind a published one's name a comma joins."""
    if Path(spec).exists():
        return [spec]
    found, parts = [], spec.split(",")
    while parts:
        found.append(parts.pop(0))
        if ":" in found[-1] and parts:
            found[-1] += "," + parts.pop(0)
    return found


def mean_score(nets: list):
    """The mean score of rewards, as a function of pictures [B, 3, H, W] in [-1, 1] and B captions -> [B]."""
    scores = [score_of(net) for net in nets]
    return lambda image, captions: sum(score(image, captions) for score in scores) / len(scores)


def prepare_editor(cfg: Config, pipe: pipeline.Pipe) -> None:
    """Decide what of the editor trains, and what is recomputed in the backward pass."""
    editor = pipe.net
    if pipe.follows and editor.variant != "concat":  # its base keeps what it knows, as in train_omni.py
        editor.base.requires_grad_(False)
    elif pipe.follows and editor.cfg.txt_bytes:
        editor.base.text.requires_grad_(False)
    if cfg.lora:
        if pipe.follows and editor.variant == "concat":
            raise SystemExit(f"error: --lora: {cfg.lora}: {cfg.base} is a concat, which has no branch to "
                             "update: leave it out")
        torch.manual_seed(cfg.seed)  # LoRA's A: the same on every rank
        model.add_lora(editor, cfg.lora)
        if not pipe.follows and model.mask_input_is_empty(editor):  # the blocks alone never saw a hole
            editor.mmdit.x_embedder.requires_grad_(True)
            common.print0(f"note: --lora: {cfg.lora}: the input layer trains too, all of it, since its "
                          "columns for the mask and the masked picture are still empty")
    (editor.base if pipe.follows else editor).mmdit.checkpoint = cfg.checkpointing
    pipe.space.checkpoint = bool(cfg.checkpointing)


def draws(cfg: Config, phases: list, channels: int, stride: int, txt_bytes: int, batch: dict) -> dict:
    """What the data workers add to a batch.

    noise [B, C, h, w] in the space of `channels` and `stride`; reward_noise [B, 3, H, W], through which
    rewards look, with --reward_noise; text, as bytes [B, txt_bytes] or, for encoders from outside, captions;
    c and has_c [B], the captions of `reward_captions` and where there is one; t_prime, one for the whole
    batch on all ranks, so that they do equal work.
    """
    step = min(batch["step"] // cfg.accum, sum(phase[-1] for phase in phases) - 1)  # they work ahead
    _, (_, _, T2) = phase_at(phases, step)
    gens = common.generators(cfg.seed, batch["step"], batch["position"])
    H, W = batch["image"].shape[1:3]
    out = {"noise": common.randn(gens, (channels, H // stride, W // stride))}
    if cfg.reward_noise:  # a reward answers to patterns too faint to see; through noise, to what is shown
        out["reward_noise"] = cfg.reward_noise * common.randn(gens, (3, H, W))
    t_prime = common.randint(common.generators(cfg.seed, batch["step"], [0], stream=1), 1, T2 + 1)
    c, text = reward_captions(batch), batch["caption"]
    out |= {"t_prime": int(t_prime), "c": c, "has_c": torch.tensor([float(text != "") for text in c])}
    return out | {"text": model.byte_ids(text, txt_bytes) if txt_bytes else text,
                  "segments": None}  # label maps have done their work: nothing to copy


def reward_captions(batch: dict) -> list[str]:
    """What rewards read, [B]: captions, those of the target of an edit, and "" for the erase prompt."""
    if "target_caption" in batch:
        return batch["target_caption"]
    return ["" if task == "erase" else c for c, task in zip(batch["caption"], batch["task"])]


class Given(NamedTuple):
    """What PeFL takes from a batch. For edits, which the paper leaves as future work, it is our reading."""

    start: torch.Tensor  # what stage 1 diffuses, [B, C, h, w]: x (1 - m); of an edit the source
    condition: tuple  # what the editor is given beside the text: m and x (1 - m); the source and its region
    hole: torch.Tensor  # what is new, [B, 1, H, W]: m; of an edit where target and source differ
    anchor: torch.Tensor  # what L_reg holds x0' to, [B, 3, H, W]: x; of an edit the source
    kept: torch.Tensor  # where, [B, 1, H, W]: everywhere (--hold known: outside m); of an edit outside `hole`


def read_batch(batch: dict, editor, space, hold: str = "all") -> Given:
    x, m = batch["image"], batch["mask"]
    condition = pipeline.conditions(editor, space, m, batch.get("source", x))
    if "source" not in batch:
        return Given(condition[1], condition, m, x, 1 - m if hold == "known" else torch.ones_like(m))
    source = batch["source"]  # 6 % of a JPEG's pixels (quality 90) differ by more than 0.1 without an edit
    new = ((source - x).abs().amax(1, keepdim=True) > 0.1).float()
    return Given(condition[0], condition, new, source, 1 - new)


def conditioned(editor, text, condition: tuple, guidance: float = 1.0):
    """G for a batch with its text and its masks or sources, as a function (x_t, t [B]) -> v; with guidance
    the v that sampling goes by, for which one call has the batch with its text and without."""
    if guidance == 1:
        txt, vec = editor.encode_text(text)
        return lambda x_t, t: editor(x_t, t, txt, vec, *condition)
    denoise = pipeline.denoiser(editor, text, condition, guidance)
    return lambda x_t, t: sum(weight * v for v, weight in zip(*denoise(x_t, t)))


def rows_of(cfg: Config) -> int:
    """How often a call of the editor has each picture of the batch."""
    return 1 if cfg.guidance == 1 else 2


def side_of(cfg: Config, pipe: pipeline.Pipe) -> int:
    """The side of the training square in pixels; SystemExit where neither the flag nor the base says it."""
    if not (side := cfg.image_size or pipe.size):
        raise SystemExit(f"error: --base: {cfg.base}: does not say at what size it was trained: give "
                         "--image_size")
    return side


def recomputed(cfg: Config, fn, *inputs):
    """fn(*inputs); with --checkpointing its activations are computed again in the backward pass."""
    return recompute(fn, *inputs, use_reentrant=False) if cfg.checkpointing else fn(*inputs)


def watch(metrics: log.Metrics, losses: dict, rated: dict, captioned, real, fake, hole) -> None:
    """Add a micro-batch's metrics: losses name -> (weight, loss), rewards name -> r, logits of R_gamma.

    captioned, bool [B]: whose alignment counts; a picture without a caption has none, in the loss neither."""
    metrics.add(**{f"loss/{name}": loss.detach() for name, (_, loss) in losses.items()})
    for name, r in rated.items():
        if name != "coherence":
            counts = captioned if name == "alignment" else torch.ones_like(captioned)
            metrics.add_where(counts, **{f"reward/{name}": r})
    metrics.add(**{"coherence/real": real, "coherence/fake": fake,
                   "coherence/accuracy": torch.cat([real > 0, fake <= 0]).float()})
    metrics.add_where(seam(hole), **{"coherence/seam": (real > fake).float()})


def seam(mask: torch.Tensor) -> torch.Tensor:
    """Pixels within 2 of the hole's border, [B, 1, H, W] bool: where incoherence shows. A coherence model
    that knows nothing scores the real picture above the generated one in half of them."""
    return (F.max_pool2d(mask, 5, 1, 2) > 0) & (F.max_pool2d(1 - mask, 5, 1, 2) > 0)


def heldout_grid(cfg: Config, train, instructed: bool, image_size: int, stride: int, device) -> dict:
    """The fixed held-out pictures, masks and captions of the judge and its sheet. train: the training source;
    where the data have no held-out part, the sheet shows pictures of it, which were trained on."""
    at = dict(stride=stride, device=device)
    if instructed:
        source = heldout_or(train, open_edits, cfg.data)
        return next(data.make_edit_eval_batches(source, range(min(32, len(source))), image_size, 32,
                                                p_region=cfg.p_region, **at))
    source = heldout_or(train, open_source, cfg.data)
    return next(data.make_eval_batches(source, range(min(32, len(source))), image_size, 32, cfg.tasks, **at))


def judge(cfg: Config, editor, base, space, scores: dict, batch: dict, ts: list[float], bf16: bool):
    """Held-out samples, guided as in training -> metrics, and a sheet of the samples. Metrics: scores of all
    rewards, of alignment those of captioned pictures; the samples' statistics over the real pictures'
    (log.image_stats), 1 = alike; mean change outside the mask; distance to the frozen base, in velocity at
    t = 0.5 and in weights, over the base's norm."""
    x, captions, c, given = batch["image"], batch["caption"], reward_captions(batch), \
        read_batch(batch, editor, space)
    gens = common.generators(cfg.seed, 0, range(len(x)), stream=9)
    noise, half = common.randn(gens, given.start.shape[1:], x.device), x.new_full((len(x),), 0.5)
    x_t = flow.interpolate(space.encode(x), noise, half)
    out, v = {}, {}
    for name, net in (("base", base), ("tuned", editor)):
        out[name] = pipeline.sample(net, space, captions, batch["mask"], batch.get("source", x), noise, ts,
                                    cfg.guidance, bf16=bf16).clamp(-1, 1)
        v[name] = net(x_t, half, *net.encode_text(captions), *given.condition).float()
    each = {f"{name}_{who}": score(image, c) for name, score in scores.items() for who, image in out.items()}
    asked = torch.tensor([text != "" for text in c], device=x.device)
    row, shown_scores = {}, {}
    for key, r in each.items():
        counts = asked if key.startswith("alignment_") else torch.ones_like(asked)  # as in R_beta
        if counts.any():
            row[f"judge/{key}"] = r[counts].mean().item()
            shown_scores[key] = r[:8].where(counts[:8], torch.nan).tolist()
    real = log.image_stats(x)
    row |= {f"alarm/{k}": value / max(real[k], 1e-6) for k, value in log.image_stats(out["tuned"]).items()}
    keep = (1 - given.hole).expand_as(x)
    change = ((out["tuned"] - given.anchor).abs() * keep).sum() / keep.sum().clamp(min=1)
    row["alarm/change_outside_mask"] = change.item()
    row["alarm/velocity_drift"] = ((v["tuned"] - v["base"]).norm() / v["base"].norm()).item()
    before = base.state_dict()
    moved = sum((w.float() - before[k].float()).square().sum()
                for k, w in common.gathered(model.merged_state(editor))).sqrt()
    row["alarm/weight_drift"] = (moved / sum(w.float().square().sum() for w in before.values()).sqrt()).item()
    shown = batch["source"] if "source" in batch else x * (1 - given.hole)
    rows = [[p.cpu() for p in four] for four in zip(x[:8], shown, out["base"], out["tuned"])]
    return row, log.contact_sheet(rows, ["picture", "input", "base", "tuned"], row_titles=captions[:8],
                                  scores=shown_scores)


if __name__ == "__main__":
    common.command(main, Config, __doc__)
