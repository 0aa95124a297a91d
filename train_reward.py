"""Train a reward model R(c, x) on preferences: aesthetic (ByteEdit Eq. 1) or alignment (Eq. 5).

    python train_reward.py --pairs pairs/aesthetic.json --lr 5e-4 --warmup 50 --out out/aesthetic
    python train_reward.py --pairs pairs/alignment.jsonl --lr 5e-4 --warmup 50 --out out/alignment
    torchrun --nproc_per_node=8 -- train_reward.py --pairs train.json --init blip:model_large.pth,vocab.txt \
        --freeze 0.7 --batch_size 8

The same command again resumes. Which of the two rewards comes out is a matter of the pair file alone
(readers/preferences.py): what is compared is always two (caption, picture) couples, a caption with two
pictures or a picture with two captions. The run folder is complete: its manifest holds the architecture and
the tokenizer.
"""

import math
import os
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoint
import common
import data
import log
import model
import rewards
from common import Verdict
from log import Perf, wilson
from readers import preferences
from readers.files import clean_caption

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads do not survive forking workers


@dataclass
class Config:
    pairs: str  # preference file(s), PATH or PATH,PATH (readers/preferences.py has the formats)
    out: str = "out/reward"  # run folder: checkpoints, metrics.jsonl
    images: str | None = None  # folder that pictures' names start from; None: the pair file's own
    val_pairs: str | None = None  # held-out file(s); None: a part of --pairs, by whole prompts (or pictures)
    val_fraction: float = 0.1  # share of --pairs that is held out; 0 = train on all, report no accuracy
    preset: str = "tiny"  # architecture, see REWARD_PRESETS in rewards.py; ignored with --init
    init: str | None = None  # start from a reward's folder, blip:PATH,VOCAB or imagereward:PATH,VOCAB
    original_init: bool = False  # initialise the head as ImageReward: it waits long at loss 0.6931
    freeze: float = 0.0  # share of the first ViT blocks and text layers left as they are (ImageReward: 0.7)
    dropout: float | None = None  # dropout in the head; None: ImageReward's 0.2, 0.2, 0.1
    augment: int = 0  # largest shift of both pictures of a pair, alike, in pixels of the model's input
    noise: float = 0.0  # largest std of the Gaussian noise added to both pictures of a pair: harder to hack
    batch_size: int = 64  # pairs per rank and micro-batch
    accum: int = 1  # micro-batches per optimiser step
    steps: int = 2_000  # optimiser steps
    lr: float = 1e-5  # peak learning rate of Adam: 1e-5 fine-tunes published models, from scratch take 5e-4
    lr_schedule: Literal["constant", "cosine"] = "cosine"  # after the warm-up; cosine to 0 as ImageReward
    warmup: int = 0  # optimiser steps of linear warm-up; from scratch take 50
    grad_clip: float = 0.0  # limit of the gradient's global norm; 0 = off, as ImageReward
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast where the hardware has it
    seed: int = 0  # seed of weights, data order and dropout
    workers: int = 1  # processes per rank that load data
    device: str = "auto"  # auto (a GPU where there is one), cpu or cuda
    log_every: int = 50  # steps between rows of metrics
    eval_every: int = 500  # steps between held-out accuracies; 0 = only at the end and before checkpoints
    eval_pairs: int = 2_000  # held-out pairs used while training (at the end all are); 0 = all
    plateau_warn: int = 300  # warn when the loss stays within 0.693 +- 0.002 for so many steps; 0 = never
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # how many of the newest checkpoints are kept
    wandb: Literal["auto", "online", "offline", "off"] = "auto"  # auto: online if logged in


LN2 = math.log(2)  # the loss of a model that scores everything alike


def main(cfg: Config) -> None:
    check(cfg)
    dist = common.setup(cfg.device)
    common.agree(dist, asdict(cfg) | {"code": common.code_hash()})
    device = dist.device
    bf16 = common.use_bf16(cfg.precision, dist)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    # 1) preferences, and those held out
    if cfg.val_pairs:
        pairs, held = open_all(cfg.pairs, "all", cfg), open_all(cfg.val_pairs, "all", cfg)
    elif cfg.val_fraction:
        pairs, held = open_all(cfg.pairs, "train", cfg), open_all(cfg.pairs, "heldout", cfg)
    else:
        pairs, held = open_all(cfg.pairs, "all", cfg), None
    common.print0(f"{len(pairs):,} pairs to train on, {len(held) if held else 0:,} held out")

    # 2) architecture and weights: those of --out if there is something to resume, of --init, or from scratch
    torch.manual_seed(cfg.seed)
    checkpoint.claim(cfg.out)
    found, weights = checkpoint.latest(cfg.out), None
    if found:
        arch = model.config_from(rewards.RewardConfig, found[1].get("arch", {}), "reward", cfg.out)
        same_run(cfg, found[1], bf16)
    elif cfg.init and cfg.init.startswith(("blip:", "imagereward:")):
        arch, weights = published(cfg.init)
    elif cfg.init:
        tensors, manifest = checkpoint.load(cfg.init, "model")
        weights = tensors["model"]
        arch = model.config_from(rewards.RewardConfig, manifest["arch"], "reward", f"--init: {cfg.init}")
    else:
        arch = rewards.REWARD_PRESETS[cfg.preset]
        arch = replace(arch, tokenizer=rewards.train_tokenizer(captions_of(pairs), arch.vocab, arch.txt_len))
    if not arch.tokenizer:
        raise SystemExit(f"error: {cfg.init}: holds no tokenizer: use a folder that train_reward.py wrote")
    reward = rewards.PreferenceReward(arch, cfg.original_init)
    if weights:
        if not any(k.startswith("mlp.") for k in weights):
            common.print0(f"{cfg.init}: a backbone without a head; the head starts fresh")
            weights = {**weights, **{f"mlp.{k}": v for k, v in reward.mlp.state_dict().items()}}
        checkpoint.load_state(reward, weights, cfg.init)
    for m in reward.modules():
        if isinstance(m, torch.nn.Dropout) and cfg.dropout is not None:
            m.p = cfg.dropout
    freeze(reward, cfg.freeze)
    reward.to(device).train()
    total, trained = common.n_params(reward) / 1e6, common.n_params(reward, trained=True) / 1e6
    common.print0(f"reward: {total:.1f} M parameters, {trained:.1f} M train, {device}, {dist.world} rank(s)")
    sample = reward.tokenizer.encode_batch(captions_of(pairs)[:1000])
    if cut := sum(bool(e.overflowing) for e in sample) / len(sample):
        common.print0(f"warning: {cut:.0%} of the captions are longer than {arch.txt_len} tokens and cut")

    # 3) optimiser: Adam without weight decay, as ImageReward
    params = [p for p in reward.parameters() if p.requires_grad]
    opt = torch.optim.Adam(params, lr=cfg.lr, fused=True)

    # 4) resume: the newest checkpoint of --out that verifies
    step, val, run_id = 0, {}, None
    state = {"model": reward, "optimizer": opt}
    if manifest := checkpoint.resume(cfg.out, state):
        step, val, run_id = manifest["step"], manifest["meta"].get("val", {}), manifest["meta"].get("run_id")
        common.print0(f"resumed {cfg.out} at step {step} ({manifest['samples']} pairs seen)")
    metrics = log.Metrics(cfg.out, dist, asdict(cfg), cfg.wandb, run_id, step or None)
    meta = {"arch": reward.arch, "config": asdict(cfg), "precision": common.PRECISION[bf16],
            "run_id": metrics.run_id}

    # 5) data: batch s is a function of (seed, s, rank, world)
    batches = data.pair_loader(
        pairs, arch.image_size, cfg.batch_size, seed=cfg.seed, rank=dist.rank, world=dist.world,
        workers=cfg.workers, start_step=step * cfg.accum, stride=arch.patch, device=device,
        draw=partial(draws, cfg))
    common.agree(dist, {"data": batches.fingerprint(), "weights": common.bits(reward)})
    perf, verdict = Perf(device, bf16, f"--pairs {cfg.pairs}"), Verdict(dist, cfg.out, "lower --lr")
    lost_saves, flat_since, warned = 0, None, False
    if held and step == cfg.steps and (not val or val.get("step", step) != step):  # a signal ended it there
        val = measured(reward, held, val, step, True, cfg, dist, autocast)
        metrics.flush(step, {k: v for k, v in val.items() if k != "step"})
        meta |= {"samples": manifest["samples"], "val": val}
        checkpoint.save(cfg.out, step, state, meta, cfg.keep, dist)

    bar = log.progress(cfg.steps, step, "reward", dist)
    while step < cfg.steps:
        for group in opt.param_groups:
            group["lr"] = common.lr_at(step, cfg.lr, cfg.warmup, cfg.steps, cfg.lr_schedule)
        # dropout draws from the global generator: seeded from progress, a resumed run repeats it
        torch.manual_seed(common.generators(cfg.seed, step, [dist.rank], stream=1)[0].initial_seed())
        loss_sum = torch.zeros((), device=device)
        for micro in range(cfg.accum):
            with perf.wait():
                batch = next(batches)
            if cfg.augment:
                batch |= shift_pairs(batch["better"], batch["worse"], batch["shifts"], cfg.augment)
            if cfg.noise:
                std = cfg.noise * batch["u"][:, None, None, None]                            # [B, 1, 1, 1]
                for side in ("better", "worse"):
                    batch[side] = batch[side] + std * batch["noise_" + side]

            # 6) Eq. 1: -log sigmoid(R(c, x_p) - R(c, x_n)).  Eq. 5: -log sigmoid(R(c_p, x) - R(c_n, x)).
            with autocast:
                r_better, r_worse = score_pairs(reward, batch, device)          # [B], [B]
            loss = F.softplus(r_worse - r_better).mean()
            (loss / cfg.accum).backward()
            loss_sum += loss.detach() / cfg.accum
            metrics.add(**{"loss/preference": loss, "train/acc": (r_better > r_worse).float(),
                           "train/margin": r_better - r_worse,
                           "reward/better": r_better, "reward/worse": r_worse})
            perf.add(2 * len(r_better) * dist.world)

        # 7) one verdict for all ranks: a non-finite step changes nothing. It is given on the device, and read
        #    a step later
        common.average_gradients(params, dist.world)
        grad_norm = torch.nn.utils.clip_grad_norm_(params, cfg.grad_clip or torch.inf)
        opt.found_inf = verdict.give(step, grad_norm, loss_sum)
        opt.step()
        opt.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        last = step == cfg.steps
        metrics.add(**{"grad_norm/reward": grad_norm})
        stop = verdict.read(last=step == cfg.steps or step % cfg.save_every == 0)

        # 8) logs, and the plateau: gradients of a head that starts too small are below Adam's eps
        if step % cfg.log_every == 0 or last:
            row = metrics.flush(step, {"lr": opt.param_groups[0]["lr"], **perf.read(),
                                       "data/skipped": batches.stats()["skipped"]})
            flat = abs(row["loss/preference"] - LN2) <= 0.002
            flat_since = (step - cfg.log_every if flat_since is None else flat_since) if flat else None
            if flat and not warned and cfg.plateau_warn and step - flat_since >= cfg.plateau_warn:
                common.print0(plateau_text(cfg, step, row))
            warned = flat and (warned or bool(cfg.plateau_warn) and step - flat_since >= cfg.plateau_warn)

        # 9) held-out accuracy, checkpoints. What a checkpoint's scores are normalised by is its own weights';
        #    a signal alone leaves no time for that, and rewards.open_reward says so
        saves = step % cfg.save_every == 0 and not verdict.bad
        if held and (last or saves and not stop or cfg.eval_every and step % cfg.eval_every == 0):
            val = measured(reward, held, val, step, last, cfg, dist, autocast)
            metrics.flush(step, {k: v for k, v in val.items() if k != "step"})
        if last or stop or saves:
            meta |= {"samples": step * cfg.batch_size * dist.world * cfg.accum, "val": val}
            saved = checkpoint.save(cfg.out, step, state, meta, 0 if verdict.bad else cfg.keep, dist)
            lost_saves = checkpoint.count_lost(cfg.out, saved, lost_saves, last or stop)
        if stop:
            common.print0(f"stopped by a signal at step {step}; the same command resumes")
            break
    bar.close()
    common.print0(log.peak_memory())
    metrics.close()
    batches.close()
    common.cleanup()


def published(init: str) -> tuple[rewards.RewardConfig, dict[str, Tensor]]:
    """blip:PATH,VOCAB, what ImageReward and ByteEdit's rewards start from (without a head), or imagereward:
    PATH,VOCAB -> architecture, weights."""
    name, _, rest = init.partition(":")
    path, comma, vocab = rest.partition(",")
    if not (path and comma and vocab):
        raise SystemExit(f"error: --init: {init}: give {name}:PATH,VOCAB with BERT's vocab.txt")
    if name == "imagereward":
        net = rewards.load_imagereward(path, vocab)
        return net.cfg, net.state_dict()
    state = rewards.blip_weights(path)
    return rewards.reward_config(state, path, vocab, "BLIP"), state


def check(cfg: Config) -> None:
    """Refuse values and combinations that cannot work, before anything is loaded."""
    common.check_bounds(
        cfg, at_least_1=("batch_size", "accum", "steps", "log_every", "save_every"),
        not_negative=("lr", "warmup", "grad_clip", "augment", "noise", "workers", "eval_every", "eval_pairs",
                      "plateau_warn", "keep"),
        share=("freeze",), below_1=("val_fraction", "dropout"))
    if cfg.preset not in rewards.REWARD_PRESETS:
        common.refuse(cfg, "preset", f"use one of {', '.join(rewards.REWARD_PRESETS)}")
    if cfg.freeze and not cfg.init:
        common.refuse(cfg, "freeze", "would keep random weights as they are: give --init, or leave it at 0")
    if cfg.original_init and cfg.init:
        common.refuse(cfg, "original_init", "concerns fresh models only: leave out --init or --original_init")



def same_run(cfg: Config, manifest: dict, bf16: bool) -> None:
    """Refuse to continue a run of another model; say what else differs from the command that began it."""
    before, now = manifest["config"], log.portable(asdict(cfg))
    for key in ("preset", "init", "freeze", "original_init"):
        if before.get(key) != now[key]:
            raise SystemExit(f"error: {cfg.out}: began with --{key} {before.get(key)}, not {now[key]}: "
                             "repeat that command to resume it, or give another --out")
    checkpoint.warn_changed(cfg.out, manifest, now, bf16)


def open_all(paths: str, split: str, cfg: Config) -> preferences.Pairs:
    """Pairs of one or several files (PATH,PATH) as one list, split as one (readers/preferences.py: part)."""
    files = [preferences.open_pairs(p, images=cfg.images) for p in paths.split(",")]
    joined, root = preferences.Pairs(), os.path.commonpath([os.path.abspath(f.root) for f in files])
    joined.name, joined.root, joined.bad_rows = paths, root, sum(f.bad_rows for f in files)
    for f in files:
        sub = os.path.relpath(f.root, root)
        joined += f if sub == "." else [p._replace(image_better=f"{sub}/{p.image_better}",
                                                   image_worse=f"{sub}/{p.image_worse}") for p in f]
    return preferences.part(joined, split, cfg.val_fraction)


def captions_of(pairs: preferences.Pairs) -> list[str]:
    """Every distinct caption once, in order."""
    both = (c for p in pairs for c in (p.caption_better, p.caption_worse))
    return [clean_caption(c)[0] for c in dict.fromkeys(both)]


def freeze(reward: rewards.PreferenceReward, fraction: float) -> None:
    """Stop the gradients of the first `fraction` of ViT blocks and text layers, with stem and embeddings.

    ImageReward's 0.7: blocks 0-15 of 24 and layers 0-7 of 12; not, as there by an off-by-one in a comparison
    of names, the first tensor of the layer after. 1: everything but the head.
    """
    if not fraction:
        return
    vit, text = reward.blip["visual_encoder"], reward.blip["text_encoder"]
    for p in (vit.cls_token, vit.pos_embed, *vit.patch_embed.parameters(), *text.embeddings.parameters()):
        p.requires_grad_(False)
    for layers in (vit.blocks, text.encoder["layer"]):
        layers[:int(fraction * len(layers))].requires_grad_(False)
    if fraction == 1:
        vit.norm.requires_grad_(False)


def draws(cfg: Config, batch: dict) -> dict:
    """What the data workers add to a batch: shifts, where each pair is cut out (y, x); u [B] in [0, 1) and
    noise_better, noise_worse [B, 3, H, W]. Functions of (seed, step, global position of the pair)."""
    gens, out = common.generators(cfg.seed, batch["step"], batch["position"]), {}
    if cfg.augment:
        out["shifts"] = [torch.randint(0, 2 * cfg.augment + 1, (2,), generator=g).tolist() for g in gens]
    if cfg.noise:
        H, W = batch["better"].shape[1:3]
        out["u"] = common.rand(gens)
        out |= {"noise_" + side: common.randn(gens, (3, H, W)) for side in ("better", "worse")}
    return out


def shift_pairs(better: Tensor, worse: Tensor, at: list, reach: int) -> dict[str, Tensor]:
    """Both pictures [B, 3, H, W] of a pair, moved alike by up to `reach` pixels each way, edges repeated: cut
    out at (y, x) of `at`, from 0 to 2 reach."""
    H, W = better.shape[-2:]
    padded = F.pad(torch.cat([better, worse], 1), (reach,) * 4, mode="replicate")  # [B, 6, H + 2r, W + 2r]
    moved = torch.stack([p[:, y:y + H, x:x + W] for p, (y, x) in zip(padded, at)])
    return {"better": moved[:, :3], "worse": moved[:, 3:]}


def score_pairs(reward: rewards.PreferenceReward, batch: dict, device) -> tuple[Tensor, Tensor]:
    """R of the better and of the worse couples of a batch, fp32 [B] each, in one pass over both."""
    image = torch.cat([batch["better"], batch["worse"]])                                 # [2B, 3, H, W]
    tokens = reward.tokenize(batch["caption_better"] + batch["caption_worse"], device)
    return reward(image, *tokens).float().chunk(2)


def measured(reward, held, before: dict, step: int, whole: bool, cfg: Config, dist, autocast) -> dict:
    """meta.val of a checkpoint: `accuracy`, on all held-out pairs or about --eval_pairs of them, the best one
    so far (before: what the last call gave), and the step at which all this was measured."""
    every = 1 if whole or not cfg.eval_pairs else max(1, len(held) // cfg.eval_pairs)
    found = accuracy(reward, held, every, cfg, dist, autocast)
    return found | {"val/best": max(found["val/acc"], before.get("val/best", 0.0)), "step": step}


@torch.no_grad()
def accuracy(reward, held: preferences.Pairs, every: int, cfg: Config, dist: common.Dist, autocast) -> dict:
    """Held-out accuracy on each `every`-th pair: the better couple must score higher, a tie is wrong.

    With its 95 % Wilson interval, the loss, mean and deviation of the scores (which the loss leaves free; the
    manifest keeps them under meta.val, to normalise by, as ImageReward is), and the accuracy of every kind
    and of the least, the middle and the largest third of the gaps, where the pairs have them. All ranks get
    the same.
    """
    pairs = preferences.Pairs(held[::every])
    pairs.name, pairs.root = held.name, held.root
    groups = [{"", p.kind, third} for p, third in zip(pairs, thirds([p.gap for p in pairs]))]
    rows = {name: i for i, name in enumerate(sorted({name for group in groups for name in group}))}
    sums = torch.zeros(len(rows), 5, dtype=torch.float64)  # right, loss, score, score^2, pairs
    loader = data.pair_loader(pairs, reward.cfg.image_size, cfg.batch_size, rank=dist.rank, world=dist.world,
                              workers=cfg.workers, stride=reward.cfg.patch, once=True, device=dist.device)
    reward.eval()
    for batch in loader:
        with autocast:
            r_better, r_worse = score_pairs(reward, batch, dist.device)
        one = torch.stack([
            (r_better > r_worse).float(), F.softplus(r_worse - r_better), (r_better + r_worse) / 2,
            (r_better**2 + r_worse**2) / 2, torch.ones_like(r_better)], 1)
        for i, values in zip(batch["index"].tolist(), one.double().cpu()):
            for name in groups[i]:
                sums[rows[name]] += values
    reward.train()
    loader.close()
    sums = sums.to(dist.device)
    if dist.world > 1:
        torch.distributed.all_reduce(sums)
    (right, loss, score, square, n), *by_group = sums.tolist()
    low, high = wilson(right, n)
    return {"val/acc": right / n, "val/low": low, "val/high": high, "val/pairs": int(n), "val/loss": loss / n,
            "val/score_mean": score / n, "val/score_std": max(square / n - (score / n)**2, 0.0)**0.5,
            **{f"val/acc_{name}": r[0] / r[-1] for name, r in zip(list(rows)[1:], by_group) if r[-1]}}


def thirds(gaps: list[float]) -> list[str]:
    """Whether each gap is among the least, the middle or the largest third of the known ones; else ""."""
    known = sorted(g for g in gaps if not math.isnan(g))
    if len(known) < 3:
        return [""] * len(gaps)
    low, high = known[len(known) // 3], known[2 * len(known) // 3]
    return ["" if math.isnan(g) else "gap_low" if g < low else "gap_mid" if g < high else "gap_high"
            for g in gaps]


def plateau_text(cfg: Config, step: int, row: dict) -> str:
    """The warning of a run whose loss stays at ln 2, with the remedy."""
    remedy = "raise --lr (from scratch 5e-4 with --warmup 50), or check that better and worse are told right"
    if cfg.original_init:
        remedy = "gradients are below Adam's eps: start a new run without --original_init"
    return (f"warning: step {step}: the loss has stayed at 0.693 +- 0.002 for {cfg.plateau_warn} steps, as "
            f"if all were scored alike (mean margin {row['train/margin']:.1e}): {remedy}")


if __name__ == "__main__":
    common.command(main, Config, __doc__)
