"""Store the averaged weights of a run as a shipped folder: bf16 safetensors, and provenance in manifest.json.

    python runs/ship.py out/base assets/base
"""

import json
import platform
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402


def main(run: str, out: str) -> None:
    tensors, manifest = common.load_checkpoint(run, ("ema",))
    weights = {k: v.to(torch.bfloat16) for k, v in tensors["ema"].items() if k != common.EMA_COUNT}
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    times = [r["time"] for r in rows if "time" in r]
    # gaps of more than ten minutes are pauses between two starts of the same command
    seconds = sum(b - a for a, b in zip(times, times[1:]) if b - a < 600)
    provenance = {
        "command": "bash runs/base.sh", "commit": manifest["git"], "pictures_seen": manifest["samples"],
        "training_minutes": round(seconds / 60),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": manifest["torch"], "saved": manifest["time"], "weights": "EMA, bf16"}
    meta = {"arch": manifest["arch"], "config": manifest["config"], "samples": manifest["samples"],
            "provenance": provenance}
    folder = common.write_checkpoint(Path(out), manifest["step"], {"model": weights}, meta)
    size = sum(f.stat().st_size for f in folder.iterdir()) / 2**20
    print(f"{folder}: step {manifest['step']}, {manifest['samples']:,} pictures seen, {size:.1f} MiB")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python runs/ship.py RUN_FOLDER OUT_FOLDER")
    main(*sys.argv[1:])
