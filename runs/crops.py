"""What sample.py --crop brings to large pictures, on held-out scenes drawn at 2000x1500: the truth is known.

    python runs/crops.py --out out/crops        # a table; OUT/sheet.png: the hole before, after and in truth

hole: 100x100 pixels across an object's outline, inpainted without a prompt. rim: 250 pixels left and
right of the middle 1500, outpainted. Detail is the mean gradient in what was regenerated over the truth's (1
is right), error the mean |x - truth| there, of 255.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import log  # noqa: E402
import sample  # noqa: E402
from readers.pictures import open_source  # noqa: E402

CROPS = {"before": "none", "after": "auto"}


@dataclass
class Config:
    ckpt: str = "assets/base"  # fills holes
    out: str = "out/crops"  # folder of the pictures and sheet.png
    n: int = 12  # scenes, each drawn in 4 to 12 seconds
    height: int = 1500  # of a scene, in pixels
    width: int = 2000  # of a scene, in pixels
    hole: int = 100  # side of the hole, in pixels
    rim: int = 250  # pixels added left and right
    steps: int = 20  # of the sampler


def gradient(picture: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] -> mean size of the gradient of its grey values, [h, w]."""
    return np.hypot(*np.gradient(picture.astype(np.float32).mean(2)))


def main(cfg: Config) -> None:
    out, source, h = Path(cfg.out), open_source("scenes", "heldout"), cfg.hole
    folders = {task: out / task for task in ("hole", "rim")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    truth, places = {}, {}
    for i in range(cfg.n):
        item, name = source.load(i, cfg.height, cfg.width), f"{i:03d}"
        truth[name], objects = item["image"], item["segments"] > 0
        edges = np.argwhere(objects[h:-h, h:-h] != objects[h:-h, h + 1:1 - h])
        y, x = edges[np.random.default_rng(i).integers(len(edges))] + h // 2
        places[name] = slice(y, y + h), slice(x, x + h)
        mask = np.zeros(objects.shape, np.uint8)
        mask[places[name]] = 255
        hidden = item["image"].copy()
        hidden[places[name]] = 128
        Image.fromarray(hidden).save(folders["hole"] / f"{name}.png")
        Image.fromarray(mask).save(folders["hole"] / f"{name}.mask.png")
        Image.fromarray(item["image"][:, cfg.rim:-cfg.rim]).save(folders["rim"] / f"{name}.png")
    rows, sides = [], (slice(None), np.r_[0:cfg.rim, cfg.width - cfg.rim:cfg.width])
    for task, folder in folders.items():
        for when, crop in CROPS.items():
            verb, add = ("inpaint", {}) if task == "hole" else ("outpaint", dict(left=cfg.rim, right=cfg.rim))
            sample.main(sample.Config(verb, cfg.ckpt, image=str(folder), out=str(out / f"{task}_{when}"),
                                      steps=cfg.steps, crop=crop, prompt="", **add))
            detail, error, spread = [], [], []
            for name, picture in truth.items():
                got = np.asarray(Image.open(out / f"{task}_{when}" / f"{name}_{verb}.png"))
                at = places[name] if task == "hole" else sides
                detail.append(gradient(got)[at].mean() / gradient(picture)[at].mean())
                error.append(np.abs(got[at].astype(float) - picture[at]).mean())
                spread.append((got[at].std(), picture[at].std()))
            std, true = np.mean(spread, 0)
            low, mid, high = np.quantile(detail, (0.25, 0.5, 0.75))
            rows.append(f"| {task} | {crop} | {mid:.2f} [{low:.2f}, {high:.2f}] | {np.mean(error):.1f} | "
                        f"{std:.1f} beside {true:.1f} |")
    pictures = []
    for name, picture in list(truth.items())[:6]:
        near = tuple(slice(max(0, at.start - h), at.stop + h) for at in places[name])
        files = [out / f"hole_{when}" / f"{name}_inpaint.png" for when in CROPS]
        row = [Image.fromarray(a[near]) for a in (*(np.asarray(Image.open(f)) for f in files), picture)]
        files = [out / f"rim_{when}" / f"{name}_outpaint.png" for when in CROPS]
        whole = [Image.open(f) for f in files] + [Image.fromarray(picture)]
        pictures.append(row + [im.resize((400, 300), Image.Resampling.LANCZOS) for im in whole])
    titles = ["hole: before", "after", "truth", "rim: before", "after", "truth"]
    log.contact_sheet(pictures, titles, [""] * len(pictures)).save(out / "sheet.png")
    print("| what | --crop | detail [quartiles] | error | std in the hole |\n|---|---|---|---|---|")
    print("\n".join(rows), f"\nsheet: {out / 'sheet.png'}", sep="\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
