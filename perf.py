"""How fast a training run is, and whether its device is fed.

    perf/img_s          pictures a second, of all ranks
    perf/data_wait      share of the time that the host waited for a batch
    perf/gpu_busy       share of the time that a GPU was not out of work for want of a batch. Gaps between the
                        kernels of a step are not seen: perf/mfu tells of them
    perf/mfu            FLOPs a second (memory.py counts them; what is recomputed counts) over the card's peak
                        in bf16, where that is known
    perf/host_rss_gib   resident memory of rank 0
"""

import contextlib
import os
import time
from pathlib import Path

import torch

import common

# Dense bf16 with fp32 sums, TFLOP/s, from the makers' data sheets; the first name that is part of the card's
PEAK = {"B200": 2250, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "H800": 989, "A100": 312,
        "A800": 312, "L40S": 362, "RTX 4090": 165, "MI300X": 1307}
STARVED = 0.1  # share of the time without a batch from which it is said


def peak_flops(name):
    """Of the card of that name, FLOP/s; 0 for one that is not in the table."""
    return next((tera * 1e12 for part, tera in PEAK.items() if part in name), 0.0)


class Perf:
    """with perf.wait(): batch = next(it)    perf.add(pictures, flops)    row = perf.read()

    what: the data's flag and value, for the line that says that they come too slowly.
    """

    def __init__(self, device=torch.device("cpu"), bf16=False, what="the data"):
        self.cuda, self.what, self.windows, self.said = device.type == "cuda", what, 0, False
        self.peak = peak_flops(torch.cuda.get_device_name(device)) if self.cuda and bf16 else 0.0
        self.restart()

    def restart(self):
        self.start, self.waited, self.images, self.flops, self.waits = time.perf_counter(), 0.0, 0, 0, []

    def _moment(self):
        """An event after all that the GPU was given so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def wait(self):
        t, before = time.perf_counter(), self._moment() if self.cuda else None
        yield
        self.waited += time.perf_counter() - t
        if self.cuda:  # the GPU passes both at once if it still works on what it had before
            self.waits.append((before, self._moment()))

    def add(self, images, flops=0):
        """images: of all ranks; flops: of this one."""
        self.images, self.flops = self.images + images, self.flops + flops

    def read(self):
        """The table above since the last read. A GPU is waited for: read where metrics are written."""
        if self.waits:
            self.waits[-1][1].synchronize()
        seconds = max(time.perf_counter() - self.start, 1e-9)
        row = {"perf/img_s": self.images / seconds, "perf/data_wait": self.waited / seconds}
        idle = row["perf/data_wait"]
        if self.cuda:
            idle = min(sum(a.elapsed_time(b) for a, b in self.waits) / 1000 / seconds, 1.0)
            row["perf/gpu_busy"] = 1 - idle
        if self.peak and self.flops:
            row["perf/mfu"] = self.flops / seconds / self.peak
        with contextlib.suppress(OSError):  # Linux only
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            row["perf/host_rss_gib"] = pages * os.sysconf("SC_PAGE_SIZE") / 2**30
        self.windows += 1
        if idle > STARVED and self.windows > 1 and not self.said:  # the workers start in the first one
            self.said = True
            common.print0(f"warning: {self.what}: {idle:.0%} of the time went by waiting for batches: give "
                          "more --workers, or draw and decode ahead with `python pack.py`")
        self.restart()
        return row
