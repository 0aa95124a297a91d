"""A few training steps for tests/test_sharded.py: python sharded_run.py JSON, alone or under torchrun.

Prints, on rank 0, one JSON line: loss and gradient norm of each step, the sum of an output with the averaged
weights and of one with the raw ones, and what went wrong where it was asked to.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint  # noqa: E402
import common  # noqa: E402
import model  # noqa: E402
from common import Verdict  # noqa: E402

CFG = replace(model.PRESETS["test"], depth=3, dual=1)


def build(kind):
    torch.manual_seed(1)
    net = model.Editor(CFG)
    if kind != "editor":
        base, net = net, model.EditNet(CFG, kind)
        net.attach(base.state_dict())
        (net.base.text if kind == "concat" else net.base).requires_grad_(False)
    for p in net.parameters():
        p.data.add_(torch.randn(p.shape), alpha=0.05)
    return net


def forward(net, x, src, t):
    txt, vec = net.encode_text([f"{round(100 * float(s))} circles" for s in t])  # the same for any ranks
    condition = (src, torch.ones_like(src[:, :1])) if isinstance(net, model.EditNet) else ()
    return net(x, t, txt, vec, *condition)


def batch(seed, dist):
    """4 pictures, source pictures and times, this rank's part of them."""
    g = torch.Generator().manual_seed(seed)
    pictures = torch.randn(2, 4, 3, 32, 32, generator=g)
    return [x.chunk(dist.world)[dist.rank] for x in (*pictures, torch.rand(4, generator=g))]


def run(out, kind="editor", shard=True, steps=4, save=(), recompute=0, bf16=False, data=0, failing=False,
        bad=0):
    dist = common.setup("cpu")
    net = build(kind)
    getattr(net, "base", net).mmdit.checkpoint = recompute
    if shard:
        common.shard(net, dist, bf16)
    groups = common.split_groups(model.param_groups(net, 0.01))
    opt = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    ema, step, rows = common.EMA(net, 0.9), 0, []
    state = {"model": net, "ema": ema, "optimizer": opt}
    if found := checkpoint.resume(out, state, net.arch):
        step = found["step"]
    verdict = Verdict(dist, out, "repair it")
    for step in range(step + 1, steps + 1):
        x, src, t = batch(step + 1000 * data, dist)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            v = forward(net, x, src, t)
        loss = (v.float() - x).square().mean() * (float("nan") if step == bad and dist.rank == 1 else 1)
        loss.backward()
        common.average_gradients(net.parameters(), dist.world)
        norm = common.clip_grad_norm(list(net.parameters()), 1.0)
        opt.found_inf = verdict.give(step, loss, norm)
        opt.step()
        ema.update(opt.found_inf)
        opt.zero_grad(set_to_none=True)
        loss = loss.detach()
        if dist.world > 1:
            torch.distributed.all_reduce(loss)
        rows.append([loss.item() / dist.world, norm.item()])
        if save == "each" or step in save:
            checkpoint.save(out, step, state, {"arch": net.arch}, 3, dist)
    result = {"rows": rows}
    x, src, t = batch(77, common.Dist())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        result["raw"] = forward(net, x, src, t).double().square().sum().item()
        with ema.swapped():  # what was gathered for the raw pass must not serve this one
            result["averaged"] = forward(net, x, src, t).double().square().sum().item()
        result["raw again"] = forward(net, x, src, t).double().square().sum().item()
    average = common.gathered(ema.state_dict())
    result["ema"] = sum(v.double().square().sum().item() for k, v in average if "." in k)
    if failing:
        result["failed"] = [checkpoint.save(f"{out}/file/below", 9, state, {}, 2, dist)]
        if dist.rank == 0:
            def full(*args):
                raise OSError(28, "No space left on device")
            checkpoint._signed = full
        result["failed"].append(checkpoint.save(out, 9, state, {}, 2, dist))
    if dist.rank == 0:
        print(json.dumps(result))
    common.cleanup()


if __name__ == "__main__":
    run(**json.loads(sys.argv[1]))
