"""Which training steps count: decided on the device, the same for all ranks, read by the host a step later.

    verdict = Verdict(dist, out, "lower --lr")
    ...
    opt.found_inf = bad = verdict.give(step, loss, grad_norm)
    opt.step()
    ema.update(bad)
    stop = verdict.read()

A host that asked at every step whether its numbers are finite would wait for the device each time, and the
device then for the host. Here `bad` stays on the device. torch's fused optimisers leave weights, moments and
their count of steps as they are where found_inf is 1 (it is made for loss scaling), and so do common.Muon and
common.EMA: a step with a non-finite number changes nothing.
"""

import torch
import torch.distributed as td

import common


class Verdict:
    """out, remedy: for the error after 20 bad steps in a row."""

    def __init__(self, dist, out, remedy):
        self.dist, self.running, self.given = dist, 0, []
        self.error = f"error: {out}: 20 non-finite steps in a row: {remedy}"

    def give(self, step, *numbers):
        """Scalars of a step, on the device -> 1.0 there if one of them is not finite on one rank, else 0.0.

        The all-reduce also asks whether a rank was told to stop. Workers are signalled one after the other,
        each at its own point of a step: acting on a local flag would let one rank save alone and hang.
        """
        bad = ~torch.isfinite(torch.stack([n.detach().float() for n in numbers])).all()
        stop = torch.full((), float(common.stop_asked()), device=bad.device)
        flags = torch.stack([bad.float(), stop])
        if self.dist.world > 1:
            td.all_reduce(flags, op=td.ReduceOp.MAX)
        done = torch.cuda.Event() if flags.is_cuda else None
        host = flags.to("cpu", non_blocking=True)  # into pinned memory, which torch makes for it
        if done:
            done.record()
        self.given.append((step, host, done))
        return flags[0]

    def read(self, last=False):
        """Whether to stop, by all verdicts but the newest, whose step may still run, or by all if it is the
        `last`. Prints a line for a bad step; SystemExit at the 20th in a row."""
        stop = False
        while len(self.given) > (not last):
            step, host, done = self.given.pop(0)
            if done:
                done.synchronize()
            bad, asked = host.tolist()
            stop, self.running = stop or asked > 0, self.running + 1 if bad else 0
            if bad:
                common.print0(f"warning: step {step}: non-finite loss or gradient: skipped ({self.running} "
                              "running)")
            if self.running == 20:
                raise SystemExit(self.error)
        return stop
