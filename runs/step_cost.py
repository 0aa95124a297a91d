"""What a step of train_omni.py costs the host beside the device's work, in ms per 1,024 pictures.

    python runs/step_cost.py --out out/step_cost.json

The tiny preset, stage inpaint; CPU time of one thread. Two ways are timed in turn, round by round, so that
other work on the machine meets both: "in the host", where the process that trains draws noise and times,
reads captions as bytes and makes floats of pictures; and "in the workers", where the data workers draw and
the host hands bytes to the device. The device is torch's meta device: it takes what a GPU would be given and
does nothing, so what is timed is the host's part of it, without the driver's. Workers' own times stand
beside it, for scenes drawn when they are asked for and for packed ones.
"""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import data  # noqa: E402
import flow  # noqa: E402
import masks  # noqa: E402
import model  # noqa: E402
import pipeline  # noqa: E402
import train_omni  # noqa: E402
from data import Sampler  # noqa: E402
from make_pack import pack  # noqa: E402
from readers.pictures import open_source  # noqa: E402


@dataclass
class Config:
    out: str = "out/step_cost.json"  # where the numbers go
    batch_size: int = 128  # pictures at once
    image_size: int = 64  # their side
    rounds: int = 7  # every part is timed so often, in turn


def main(cfg: Config) -> None:
    torch.set_num_threads(1)
    omni = train_omni.Config(stage="inpaint", image_size=cfg.image_size)
    arch = model.inpainting(model.PRESETS["tiny"])
    draws = partial(train_omni.draws, omni, arch.channels, 1, arch.txt_bytes)
    made = data.mixture(train_omni.TASKS["inpaint"]), masks.PROMPT_FREE, True
    with torch.device("meta"):
        net = model.Editor(arch)

    def batches(source):
        order = Sampler(source, cfg.image_size, cfg.batch_size, 0, 0, 1, False, 8)
        return data.Batches(order, partial(data.make_sample, source, *made), 0, 100)

    def to_meta(batch):
        for key, value in batch.items():
            if torch.is_tensor(value):
                batch[key] = value = value.to("meta", non_blocking=True)
                if value.dtype == torch.uint8 and value.dim() == 4:
                    batch[key] = data.as_floats(value)
        return batch

    def in_the_host(batch):
        drawn = draws(batch)
        floats = {k: data.as_floats(v) for k, v in batch.items() if k == "image"}
        return to_meta(batch | drawn | floats)

    def step(batch):
        t, x0 = batch["t"], batch["image"]
        condition = train_omni.conditions(omni, net, pipeline.PixelSpace(), batch)
        v = net(flow.interpolate(x0, batch["noise"], t), t, *net.encode_text(batch["text"]), *condition)
        (batch["weight"] * t * (v - batch["noise"] + x0).square().flatten(1).mean(1)).mean().backward()
        net.zero_grad(set_to_none=True)

    with tempfile.TemporaryDirectory() as folder:
        pack("scenes", folder, limit=2 * cfg.batch_size, image_size=cfg.image_size, heldout=0, workers=1)
        drawn, ahead = batches(open_source("scenes")), batches(open_source(folder))
        rows = {name: [] for name in (
            "worker: scenes drawn, collated", "worker: packed scenes, collated", "worker: draws",
            "host: draws in the host", "host: draws in the workers", "host: forward and backward, a step")}
        for k in range(cfg.rounds + 1):
            ms = []

            def timed(f, *args):
                start = time.process_time()
                out = f(*args)
                ms.append((time.process_time() - start) * 1e3)
                return out

            timed(drawn.__getitem__, k)
            batch = timed(ahead.__getitem__, k)
            more = timed(draws, batch)
            timed(in_the_host, dict(batch))
            ready = timed(to_meta, batch | more)
            timed(step, ready)
            for row, value, each in zip(rows.values(), ms, (True, True, True, True, False, False)):
                row.append(value * 1024 / cfg.batch_size if each else value)  # a launch knows no batch size
    rows = {name: values[1:] for name, values in rows.items()}  # the first round warms up
    ratio = statistics.median(b / a for a, b in zip(rows["host: draws in the workers"],
                                                   rows["host: draws in the host"]))
    size = {"floats": 4 * 7, "bytes": 3 + 4 * 4}  # bytes a pixel of picture, noise and mask
    print("ms of one core per 1,024 pictures, median (least to most):")
    for name, values in rows.items():
        print(f"  {name:38} {statistics.median(values):8.1f} ({min(values):.1f} to {max(values):.1f})")
    print(f"  host, in the host over in the workers: {ratio:.1f} (median of {cfg.rounds} pairs)")
    print("  copied to the device: " + ", ".join(
        f"as {kind} {1024 * n * cfg.image_size**2 / 2**20:.0f} MiB" for kind, n in size.items()))
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    Path(cfg.out).write_text(json.dumps({"rows": rows, "ratio": ratio, "git": common.git_revision(),
                                         "torch": torch.__version__}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
