"""How far an editor follows its instruction against how much of the picture it keeps, over image guidance.

    python runs/curves.py --data PIE-Bench_v1 --ckpt out/raw,out/refined --clip CLIP_B32 --out out/curves

"Improving image editing models with generative data refinement", Fig. 2: each point is a run of a benchmark
(evaluate.py bench) at one image guidance, CLIP's text-image direction to the right and its image similarity
up; its bars are the deviation over the seeds. Up and to the right is better, at no single guidance. Writes
curves.json, curves.md and curves.png; a run that is there is not repeated.
"""

import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from log import open_out, provenance, write_json  # noqa: E402

COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207))


@dataclass
class Config:
    data: str  # the benchmark's folder
    ckpt: str  # instruction editors, with commas: a curve each
    name: str = "pie"  # which benchmark, as evaluate.py bench --name
    image_guidance: str = "1,1.25,1.5,1.75,2,2.5"  # image guidances, a point of the curve each
    seeds: str = "0,1,2"  # seeds of noise, with commas
    x: str = "clip_dir"  # measure to the right (measures.py)
    y: str = "clip_i_source"  # measure up (measures.py)
    flags: str = ""  # further flags of evaluate.py bench, such as "--steps 50 --guidance 7.5"
    clip: str | None = None  # CLIP ViT-B/32: a folder of transformers', or WEIGHTS,TOKENIZER
    out: str = "out/curves"  # folder for the runs, curves.json, curves.md and curves.png


def main(cfg: Config) -> None:
    started, out, seeds = time.time(), open_out(cfg.out), common.numbers(cfg.seeds, "seeds", 0)
    try:
        scales = [float(x) for x in cfg.image_guidance.split(",")]
    except ValueError:
        raise SystemExit(f"error: --image_guidance: {cfg.image_guidance}: use numbers with commas between "
                         "them") from None
    curves = {}
    for n, ckpt in enumerate(x.strip() for x in cfg.ckpt.split(",")):
        curves[ckpt] = []
        for scale in scales:
            found = [point(cfg, ckpt, scale, seed, out / f"{n}_{scale:g}_{seed}") for seed in seeds]
            x, y = np.array(found).T
            curves[ckpt].append({"image_guidance": scale, "x": x.mean(), "y": y.mean(), "x_std": deviation(x),
                                 "y_std": deviation(y), "seeds": len(seeds)})
    write_json(out / "curves.json", {**provenance(started), "config": asdict(cfg), "x": cfg.x, "y": cfg.y,
                                     "curves": curves})
    text = table(curves, cfg.x, cfg.y)
    (out / "curves.md").write_text(text)
    plot(curves, cfg.x, cfg.y).save(out / "curves.png")
    print(f"\n{text}\nwrote {out}/curves.json, curves.md, curves.png")


def point(cfg: Config, ckpt: str, scale: float, seed: int, folder: Path) -> tuple[float, float]:
    """Means of both measures over the rows of one run of the benchmark, made unless it is there."""
    if not (folder / "results.json").is_file():
        command = [sys.executable, "evaluate.py", "bench", "--name", cfg.name, "--data",
                   str(Path(cfg.data).resolve()), "--ckpt", str(Path(ckpt).resolve()), "--metrics",
                   f"{cfg.x},{cfg.y}", "--image_guidance", str(scale), "--seed", str(seed), "--out",
                   str(folder.resolve()), *(["--clip", cfg.clip] if cfg.clip else []), *cfg.flags.split()]
        if done := subprocess.run(command, cwd=ROOT).returncode:
            raise SystemExit(f"error: evaluate.py bench: ended with {done} at --image_guidance {scale:g}: "
                             "mend what its last line says; the same command goes on here")
    table = next(iter(json.loads((folder / "results.json").read_text())["tables"].values()))
    if table["results"] < table["expected"]:
        print(f"warning: {folder}: {table['results']} results of {table['expected']} rows", file=sys.stderr)
    return table["micro"][cfg.x]["mean"], table["micro"][cfg.y]["mean"]


def deviation(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def table(curves: dict[str, list[dict]], x: str, y: str) -> str:
    lines = [f"| | image guidance | {x} | {y} |", "|---|---|---|---|"]
    lines += [f"| {ckpt} | {p['image_guidance']:g} | {p['x']:.4f} ± {p['x_std']:.4f} | {p['y']:.4f} ± "
              f"{p['y_std']:.4f} |" for ckpt, points in curves.items() for p in points]
    return "\n".join(lines) + "\n"


def plot(curves: dict[str, list[dict]], x: str, y: str, W: int = 900, H: int = 640) -> Image.Image:
    """The curves, drawn with Pillow; each point carries its image guidance."""
    im = Image.new("RGB", (W, H), "white")
    d, points = ImageDraw.Draw(im), [p for c in curves.values() for p in c]
    spans = {}
    for k in "xy":
        low, high = (f(s * p[f"{k}_std"] + p[k] for p in points) for f, s in ((min, -1), (max, 1)))
        pad = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        spans[k] = (low - pad, high + pad)

    def at(u: float, v: float) -> tuple[float, float]:
        (xl, xh), (yl, yh) = spans["x"], spans["y"]
        return 80 + (u - xl) / (xh - xl) * (W - 110), H - 60 - (v - yl) / (yh - yl) * (H - 90)

    d.rectangle([*at(spans["x"][0], spans["y"][1]), *at(spans["x"][1], spans["y"][0])], outline="black")
    for k in "xy":
        low, high = spans[k]
        step = 10 ** math.floor(math.log10((high - low) / 4))
        step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6)
        for i in range(math.ceil(low / step), math.floor(high / step) + 1):
            px, py = at(i * step, spans["y"][0]) if k == "x" else at(spans["x"][0], i * step)
            line = [px, 30, px, H - 60] if k == "x" else [80, py, W - 30, py]
            d.line(line, fill=(225, 225, 225))
            d.text((px, H - 52) if k == "x" else (74, py), f"{i * step:.6g}", "black",
                   anchor="mt" if k == "x" else "rm", font_size=14)
    d.text((W / 2, H - 24), x, "black", anchor="mt", font_size=16)
    d.text((80, 8), y, "black", font_size=16)
    for n, (ckpt, of) in enumerate(curves.items()):
        colour = COLOURS[n % len(COLOURS)]
        d.line([at(p["x"], p["y"]) for p in of], fill=colour, width=3)
        for p in of:
            d.line([at(p["x"] - p["x_std"], p["y"]), at(p["x"] + p["x_std"], p["y"])], fill=colour)
            d.line([at(p["x"], p["y"] - p["y_std"]), at(p["x"], p["y"] + p["y_std"])], fill=colour)
            px, py = at(p["x"], p["y"])
            d.ellipse([px - 4, py - 4, px + 4, py + 4], fill=colour)
            d.text((px + 7, py - 7), f"{p['image_guidance']:g}", colour, anchor="ls", font_size=13)
        d.text((W - 40, 40 + 20 * n), ckpt, colour, anchor="ra", font_size=15)
    return im


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, config=(tyro.conf.FlagConversionOff,)))
