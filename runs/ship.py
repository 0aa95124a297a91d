"""Store the averaged weights of a run as a shipped folder: bf16 safetensors, provenance in manifest.json.

    python runs/ship.py assets/base "bash runs/base.sh" out/base/t2i out/base/inpaint
    python runs/ship.py assets/editnet "bash runs/editnet.sh ship" out/editnet/ship1 out/editnet/ship2
    python runs/ship.py assets/editnet "..." assets/editnet out/more          # it has been trained on

The runs are the stages in order: the last one's weights are stored, pictures and minutes are summed over all.
A shipped folder stands for the stages of which it came.
An instruction editor whose frozen base is a shipped folder beside it leaves those weights there.
"""

import json
import os
import platform
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import checkpoint  # noqa: E402
import common  # noqa: E402


def gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def portable(config: dict) -> dict:
    """Without the folders of this machine: of other absolute paths the last name."""
    return {k: Path(v).name if isinstance(v, str) and os.path.isabs(v) else v for k, v in config.items()
            if k not in ("out", "init")}


def minutes(run: str) -> float:
    """Training time by metrics.jsonl; a gap of more than ten minutes is a pause between two starts."""
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    times = [row["time"] for row in rows if "time" in row]
    return sum(b - a for a, b in zip(times, times[1:]) if b - a < 600) / 60


def without_base(weights: dict, out: Path, base: str) -> tuple[dict, dict]:
    """The weights less those of the base folder, and where those are; SystemExit if they differ."""
    tensors, manifest = checkpoint.load(base, ("model",))
    for key, value in tensors["model"].items():
        if not torch.equal(weights.pop(f"base.{key}"), value):
            raise SystemExit(f"error: {base}: {key}: differs from the run's: only a frozen base is shared")
    digest = manifest["files"]["model.safetensors"]["sha256"]
    return weights, {"path": os.path.relpath(base, out), "prefix": "base.", "sha256": digest}


def main(out: str, command: str, *runs: str) -> None:
    manifests = [checkpoint.load(run, ("ema", "model"))[1] for run in runs[:-1]]
    tensors, manifest = checkpoint.load(runs[-1], ("ema",))
    weights = {k: v.to(torch.bfloat16) for k, v in tensors["ema"].items() if k != common.EMA_COUNT}
    manifests.append(manifest)
    before = [m["meta"].get("provenance") for m in manifests]
    seen = sum(m["samples"] for m in manifests)
    spent = [told["training_minutes"] if told else minutes(run) for told, run in zip(before, runs)]
    stages = [told["stages"] if told else [portable(m["config"])] for told, m in zip(before, manifests)]
    config = portable(manifest["config"])
    provenance = {
        "command": command, "commit": manifest["git"], "pictures_seen": seen,
        "training_minutes": round(sum(spent)), "saved": manifest["time"],
        "torch": manifest["torch"],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {gpu()}", "weights": "EMA, bf16",
        "stages": [stage for part in stages for stage in part]}
    meta = {"arch": manifest["arch"], "config": config, "precision": manifest.get("precision"),
            "samples": seen, "provenance": provenance}
    if manifest["arch"]["kind"] == "editnet":
        shared = manifests[0]["meta"].get("shared")
        base = Path(runs[0]) / shared["path"] if shared else manifests[0]["config"]["init"]
        weights, meta["shared"] = without_base(weights, Path(out), base)
    folder = checkpoint.write(Path(out), manifest["step"], {"model": weights}, meta)
    size = sum(f.stat().st_size for f in folder.iterdir()) / 2**20
    print(f"{folder}: step {manifest['step']}, {seen:,} pictures seen, {size:.1f} MiB")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit("usage: python runs/ship.py OUT_FOLDER COMMAND RUN_FOLDER [RUN_FOLDER ...]")
    main(*sys.argv[1:])
