"""Distil a judge of edits into a small network: (source, edited, instruction) -> score (OmniEdit Sec. 3.3).

    python train_scorer.py --data scenes:wrong=0.5 --aspects False --out out/scorer
    torchrun --nproc_per_node=8 train_scorer.py --data pairs.jsonl --init imagereward:ImageReward.pt,vocab.txt

The pairs are edit sets with scores from 0 to 10 (readers/edits.py), of a served judge or of people; those
without one teach nothing. The same command again resumes. At the start and at the end the held-out pairs say
what came of it: rank correlation, calibration, and what share of the pairs that it would keep (9 and more,
as OmniEdit does) the judge would keep too. rewards.open_scorer opens the folder; scores are calibrated on
those pairs.
"""

import math
import os
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.distributed as td
from torch import Tensor

import checkpoint
import common
import data
import log
import model
import rewards
from common import Verdict
from log import Perf
from readers.edits import open_edits
from readers.files import BadFile, clean_caption

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads do not survive forking workers


@dataclass
class Config:
    data: str = "scenes:wrong=0.5"  # scored edit pairs, as train_omni.py --stage edit takes them
    out: str = "out/scorer"  # run folder: checkpoints, metrics.jsonl
    val_data: str | None = None  # held-out pairs; None: the held-out part of --data, by source pictures
    preset: str = "tiny-p16"  # architecture, see REWARD_PRESETS in rewards.py; ignored with --init
    init: str | None = None  # a reward's folder or imagereward:PATH,VOCAB, whose towers it starts from
    aspects: bool = True  # whole pictures, squashed to the network's square as when scoring; False: crops
    negatives: float = 0.25  # share of a batch that is made wrong for nothing, with score 0 (see `spoil`)
    keep_score: float = 9.0  # pairs of this score (0 to 10) and more count as kept (OmniEdit Sec. 3.3)
    batch_size: int = 64  # pairs per rank
    steps: int = 2_000  # optimiser steps
    lr: float = 5e-4  # peak learning rate of AdamW, cosine to 0; with --init take 1e-5
    warmup: int = 50  # steps of linear warm-up
    weight_decay: float = 0.01  # AdamW's weight decay of matrices
    grad_clip: float = 1.0  # limit of the gradient's global norm; 0 = off
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast where the hardware has it
    seed: int = 0  # seed of weights, data order and negatives
    workers: int = 1  # processes per rank that load data
    device: str = "auto"  # auto (a GPU where there is one), cpu or cuda
    log_every: int = 50  # steps between rows of metrics
    eval_every: int = 0  # steps between held-out reports; 0 = at both ends and before checkpoints
    eval_pairs: int = 2_000  # how many held-out pairs the reports look at
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # how many of the newest checkpoints are kept
    wandb: Literal["auto", "online", "offline", "off"] = "auto"  # auto: online if logged in


def main(cfg: Config) -> None:
    common.check_bounds(
        cfg, at_least_1=("batch_size", "steps", "log_every", "save_every", "eval_pairs"),
        share=("negatives",), not_negative=(
            "lr", "warmup", "grad_clip", "weight_decay", "workers", "eval_every", "keep"))
    if cfg.preset not in rewards.REWARD_PRESETS:
        common.refuse(cfg, "preset", f"use one of {', '.join(rewards.REWARD_PRESETS)}")
    if cfg.batch_size == 1 and cfg.negatives:
        common.refuse(cfg, "batch_size", "has no next pair whose instruction to lend: use at least 2, or "
                                         "--negatives 0")
    if not 0 < cfg.keep_score <= 10:
        common.refuse(cfg, "keep_score", "scores go from 0 to 10")
    dist = common.setup(cfg.device)
    common.agree(dist, asdict(cfg) | {"code": common.code_hash()})
    device, bf16 = dist.device, common.use_bf16(cfg.precision, dist)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    # 1) scored pairs, and those held out: no source picture is on both sides
    source = open_edits(cfg.data, "train")
    held = open_edits(cfg.val_data or cfg.data, "all" if cfg.val_data else "heldout")
    if hasattr(held, "wrong") and not cfg.val_data:
        held.wrong = source.wrong  # of scenes, where held-out pairs are else all right
    picks = list(range(min(cfg.eval_pairs, len(held))))
    for pairs, n in ((source, min(len(source), 10_000)), (held, len(picks))):
        if not any(pairs.score(i) is not None for i in range(n)):
            raise SystemExit(f"error: --data: {pairs.name}: not one of {n:,} pairs has a score: judge them "
                             "first, or give them a column `score` from 0 to 10")
    if (scored := sum(held.score(i) is not None for i in picks)) < 2:
        raise SystemExit(f"error: --eval_pairs: {cfg.eval_pairs}: {held.name} holds out {scored} with a "
                         "score, and calibration takes two: raise it, or hold out more (pack --dev)")

    # 2) architecture and weights: those of --out if there is something to resume, of --init, or from scratch
    torch.manual_seed(cfg.seed)
    checkpoint.claim(cfg.out)
    found, weights = checkpoint.latest(cfg.out), None
    if found:
        now = log.portable(asdict(cfg))  # as a manifest keeps paths
        arch = model.config_from(rewards.RewardConfig, found[1].get("arch", {}), "scorer", cfg.out)
        for key in ("preset", "init", "data"):
            if found[1]["config"][key] != now[key]:
                raise SystemExit(f"error: {cfg.out}: began with --{key} {found[1]['config'][key]}, not "
                                 f"{now[key]}: repeat that command, or give another --out")
        checkpoint.warn_changed(cfg.out, found[1], now, bf16)
    elif cfg.init:
        arch, weights = opened(cfg.init)
    else:
        arch = rewards.REWARD_PRESETS[cfg.preset]
        words = rewards.train_tokenizer(instructions(source), arch.vocab, arch.txt_len)
        arch = replace(arch, tokenizer=words)
    net = rewards.EditScorer(arch)
    if weights:
        head = {f"head.{k}": v for k, v in net.head.state_dict().items()}
        checkpoint.load_state(net, rewards.widened(weights) | head, cfg.init)
    net.to(device).train()
    common.print0(f"scorer: {common.n_params(net) / 1e6:.1f} M parameters, {device}, {dist.world} rank(s)")

    # 3) optimiser
    matrices = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() <= 1]
    opt = torch.optim.AdamW([{"params": matrices, "weight_decay": cfg.weight_decay},
                             {"params": others, "weight_decay": 0.0}], lr=cfg.lr, fused=True)
    params = matrices + others

    # 4) resume: the newest checkpoint of --out that verifies
    step, val, before, run_id, state = 0, {}, {}, None, {"model": net, "optimizer": opt}
    if manifest := checkpoint.resume(cfg.out, state):
        step, meta = manifest["step"], manifest["meta"]
        val, before, run_id = meta["val"], meta["before"], meta["run_id"]
        common.print0(f"resumed {cfg.out} at step {step} ({manifest['samples']} pairs seen)")
    metrics = log.Metrics(cfg.out, dist, asdict(cfg), cfg.wandb, run_id, step or None)

    # 5) data: batch s is a function of (seed, s, rank, world). Tasks come equally often
    batches = data.make_edit_loader(
        source, arch.image_size, cfg.batch_size, seed=cfg.seed, rank=dist.rank, world=dist.world,
        workers=cfg.workers, start_step=step, aspects=cfg.aspects, stride=arch.patch, p_region=0.0,
        device=device, draw=partial(draws, cfg))
    common.agree(dist, {"data": batches.fingerprint(), "weights": common.bits(net)})
    perf, verdict = Perf(device, bf16, f"--data {cfg.data}"), Verdict(dist, cfg.out, "lower --lr")
    lost_saves = 0
    if not step:
        before = report(net, held, picks, cfg, dist, autocast)
        metrics.flush(0, numbers_of(before))
    meta = {"arch": net.arch, "config": asdict(cfg), "precision": common.PRECISION[bf16], "before": before,
            "run_id": metrics.run_id}
    if step == cfg.steps and (not val or val.get("step", step) != step):  # ended by a signal at its last step
        val = report(net, held, picks, cfg, dist, autocast) | {"step": step}
        metrics.flush(step, numbers_of(val))
        meta |= {"samples": manifest["samples"], "val": val}
        checkpoint.save(cfg.out, step, state, meta, cfg.keep, dist)

    bar = log.progress(cfg.steps, step, "scorer", dist)
    while step < cfg.steps:
        for group in opt.param_groups:
            group["lr"] = common.lr_at(step, cfg.lr, cfg.warmup, cfg.steps, "cosine")
        with perf.wait():
            batch = next(batches)
        edited, captions, scores, free = spoil(batch)

        # 6) cross-entropy to the judge's score; a pair without one weighs 0
        with autocast:
            logits = net(batch["source"], edited, *net.tokenize(captions, device))
        known = ~scores.isnan()
        losses = rewards.scorer_loss(logits, scores.nan_to_num())
        loss = (losses * known).mean()
        loss.backward()
        off = (net.score(logits.detach()) - scores).abs()
        metrics.add(**{"loss/scorer": loss})
        metrics.add_where(known & ~free, **{"train/off": off})
        metrics.add_where(free, **{"train/off_negatives": off})
        perf.add(len(losses) * dist.world)

        # 7) one verdict for all ranks: a non-finite step changes nothing
        common.average_gradients(params, dist.world)
        grad_norm = torch.nn.utils.clip_grad_norm_(params, cfg.grad_clip or torch.inf)
        opt.found_inf = verdict.give(step, grad_norm, loss)
        opt.step()
        opt.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        last = step == cfg.steps
        metrics.add(**{"grad_norm/scorer": grad_norm})
        stop = verdict.read(last=last or step % cfg.save_every == 0)

        # 8) logs, held-out report, checkpoints
        if step % cfg.log_every == 0 or last:
            metrics.flush(step, {"lr": opt.param_groups[0]["lr"], **perf.read(),
                                 "data/skipped": batches.stats()["skipped"]})
        # What calibrates a checkpoint was said by its own weights; a signal alone leaves no time for a report
        saves = step % cfg.save_every == 0 and not verdict.bad
        if last or saves and not stop or cfg.eval_every and step % cfg.eval_every == 0:
            val = report(net, held, picks, cfg, dist, autocast) | {"step": step}
            metrics.flush(step, numbers_of(val))
        if last or stop or saves:
            meta |= {"samples": step * cfg.batch_size * dist.world, "val": val}
            saved = checkpoint.save(cfg.out, step, state, meta, 0 if verdict.bad else cfg.keep, dist)
            lost_saves = checkpoint.count_lost(cfg.out, saved, lost_saves, last or stop)
        if stop:
            common.print0(f"stopped by a signal at step {step}; the same command resumes")
            break
    bar.close()
    if step == cfg.steps:
        common.print0(table(before, val, cfg.keep_score))
    common.print0(log.peak_memory())
    metrics.close()
    batches.close()
    common.cleanup()


#### data ####################################################################################################
def opened(init: str) -> tuple[rewards.RewardConfig, dict[str, Tensor]]:
    """--init -> architecture and weights of a PreferenceReward."""
    name, colon, rest = init.partition(":")
    if name == "imagereward" and rest.count(",") == 1:
        net = rewards.load_imagereward(*rest.split(","))
    elif colon and not os.path.exists(init):
        raise SystemExit(f"error: --init: {init}: give a reward's folder, or imagereward:PATH,VOCAB")
    else:
        net = rewards.open_reward(init, what="--init")
    return net.cfg, net.state_dict()


def instructions(source, n: int = 2_000) -> list[str]:
    """All wordings of up to n pairs, evenly spaced: what a tokenizer is learned from."""
    found = []
    for i in np.unique(np.linspace(0, len(source) - 1, min(n, len(source))).astype(int)).tolist():
        try:
            item = source.load(i, 16, 16)
        except BadFile:
            continue  # named and counted when it is trained on
        found += [clean_caption(c)[0] for c in item.get("captions") or [item["caption"]]]
    return list(dict.fromkeys(found))


def draws(cfg: Config, batch: dict) -> dict:
    """`kind` of each pair, list of int: 0 as it is, 1 the source in place of the edited picture, 2 the
    instruction of the next pair of this rank's batch. A function of (seed, step, global position)."""
    gens = common.generators(cfg.seed, batch["step"], batch["position"])
    return {"kind": [(1 + (u < cfg.negatives / 2)) * (u < cfg.negatives) for u in common.rand(gens).tolist()]}


def spoil(batch: dict) -> tuple[Tensor, list[str], Tensor, Tensor]:
    """Edited pictures, instructions and scores of a batch, and which are its free negatives, of score 0:
    nothing was done, or something else was asked for: what the next pair asks, if it is of another task, or
    no task is known; within one task it may be true. The next pair is that of this rank's batch, behind the
    last the first: other numbers of ranks lend other instructions, of the same kind. Without them a scorer
    learns how good pictures look, and no more (sets kept at 9 and more have no low scores at all)."""
    kind, captions = batch["kind"], list(batch["caption"])
    same = torch.tensor([k == 1 for k in kind], device=batch["image"].device)
    edited = torch.where(same[:, None, None, None], batch["source"], batch["image"])
    wrong = same.clone()
    for i, k in enumerate(kind):
        other, task = batch["caption"][(i + 1) % len(kind)], batch["task"][i]
        apart = not task or task != batch["task"][(i + 1) % len(kind)]
        if k == 2 and other != captions[i] and apart:
            captions[i], wrong[i] = other, True
    return edited, captions, torch.where(wrong, 0.0, batch["score"]), wrong


#### the report ##############################################################################################
@torch.no_grad()
def report(net, held, picks: list[int], cfg: Config, dist: common.Dist, autocast) -> dict:
    """What the scorer says of the held-out pairs -> see `compare`; all ranks get the same."""
    loader = data.make_edit_eval_batches(
        held, picks, net.cfg.image_size, cfg.batch_size, rank=dist.rank, world=dist.world,
        workers=cfg.workers, aspects=cfg.aspects, stride=net.cfg.patch, device=dist.device)
    rows = []
    net.eval()
    for batch in loader:
        tokens = net.tokenize(batch["caption"], dist.device)
        with autocast:
            both = [net.score(net(batch["source"], batch[k], *tokens)).tolist() for k in ("image", "source")]
        rows += zip(*both, batch["score"].tolist(), batch["task"])
    net.train()
    loader.close()
    if dist.world > 1:
        parts = [None] * dist.world
        td.all_gather_object(parts, rows)
        rows = [row for part in parts for row in part]
    rows = [row for row in rows if not math.isnan(row[2])]
    said, nothing_done, true, tasks = zip(*rows)
    out = compare(np.array(said), np.array(true), np.array(tasks), cfg.keep_score)
    return out | {"val/score_of_nothing_done": float(np.mean(nothing_done))}


def compare(said: np.ndarray, true: np.ndarray, tasks: np.ndarray, keep: float) -> dict:
    """Scores of the scorer and of the judge, [N] each -> Spearman's correlation, in all and by task; mean
    error and calibration error, as they are and calibrated; precision and recall of keeping what reaches
    `keep`, and the precision of keeping as many as the judge does. `knots`: the calibration, of all pairs.

    What is calibrated is judged on the half that it was not fitted on. A precision of nothing kept is None.
    """
    half = np.random.default_rng(0).permutation(len(said)) % 2  # rows may alternate in what they are
    fixed = np.zeros(len(said))
    for h in (0, 1):
        fixed[half == h] = np.interp(said[half == h], *isotonic(said[half != h], true[half != h]))
    good = true >= keep
    best = np.zeros(len(said), bool)
    best[np.argsort(-said, kind="stable")[:good.sum()]] = True
    out = {"val/pairs": len(said), "val/judge_keeps": float(good.mean()),
           "val/spearman": spearman(said, true)}
    for name, s in (("", said), ("calibrated_", fixed)):
        kept = s >= keep
        out |= {f"val/{name}off": float(np.abs(s - true).mean()), f"val/{name}ece": ece(s, true),
                f"val/{name}kept": float(kept.mean()),
                f"val/{name}precision": float(good[kept].mean()) if kept.any() else None,
                f"val/{name}recall": float(kept[good].mean()) if good.any() else None}
    out["val/precision_as_many"] = float(good[best].mean()) if good.any() else None
    out |= {f"val/spearman_{t or 'no_task'}": spearman(said[tasks == t], true[tasks == t])
            for t in sorted(set(tasks.tolist()))}
    return out | {"knots": [k.tolist() for k in isotonic(said, true)]}


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks [N], those of equal values their mean."""
    _, where, n = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(n) - (n - 1) / 2)[where]


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation; None where one of them is constant."""
    a, b = ranks(a) - (len(a) + 1) / 2, ranks(b) - (len(b) + 1) / 2
    scale = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else None


def ece(said: np.ndarray, true: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: how far the means of both are apart in ten equal groups by `said`."""
    groups = [g for g in np.array_split(np.argsort(said, kind="stable"), bins) if len(g)]
    return float(sum(abs(said[g].mean() - true[g].mean()) * len(g) for g in groups) / len(said))


def isotonic(said: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rising function nearest to `true` (pool adjacent violators) -> knots x, y for np.interp: the mean
    of each pool, so that it rises between them."""
    pools = []  # sum of x, sum of y, number
    levels, at, n = np.unique(said, return_inverse=True, return_counts=True)  # equal scores are one pool
    for level, total, k in zip(levels, np.bincount(at, true), n):
        pools.append([level * k, total, k])
        while len(pools) > 1 and pools[-2][1] * pools[-1][2] >= pools[-1][1] * pools[-2][2]:
            pools[-2:] = [[a + b for a, b in zip(*pools[-2:])]]
    x, y, n = np.array(pools, np.float64).T
    return x / n, y / n


def numbers_of(found: dict) -> dict:
    return {k: v for k, v in found.items() if k.startswith("val/") and v is not None}


def table(before: dict, after: dict, keep: float) -> str:
    rows = {"spearman": "rank correlation with the judge", "off": "mean distance from its score",
            "ece": "calibration error", "calibrated_ece": "  the same, calibrated",
            "precision": f"of those it scores >= {keep:g}, the judge too", "recall": "  found of the judge's",
            "calibrated_precision": "  the same, calibrated", "calibrated_recall": "  found of the judge's",
            "precision_as_many": "of as many as the judge keeps",
            "score_of_nothing_done": "score of the source in place of the edit"}
    lines = [f"{after['val/pairs']:,} held-out pairs, the judge keeps {after['val/judge_keeps']:.1%}"
             f"{'':<14}untrained   trained"]
    for key, words in rows.items():
        cells = ("none kept" if x.get(f"val/{key}") is None else f"{x[f'val/{key}']:.3f}"
                 for x in (before, after))
        lines.append(f"{words:<55}" + "".join(f"{c:>10}" for c in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    common.command(main, Config, __doc__)
