"""One sheet of what the shipped models do with held-out scenes, which they have never seen, and with a
picture of 384x256 pixels, larger than those they were trained on.

    python runs/showcase.py --out out/demo         # OUT/showcase.png
    python runs/showcase.py --out assets           # the picture of the README

Holes: the picture, the hole, the base at 20 steps, PeFL at 8, the truth. Instructions: the picture, the edit,
the truth. The large picture loses its object to sample.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
import flow  # noqa: E402
import log  # noqa: E402
import pipeline  # noqa: E402
import sample  # noqa: E402
from scenes import dataset, draw  # noqa: E402
from scenes.dataset import EditScenes  # noqa: E402
from scenes.judge_edits import edit_cases  # noqa: E402
from scenes.judge_holes import make_cases, paste  # noqa: E402

HOLES = {"edit": "draw", "outpaint": "continue", "erase": "erase"}


@dataclass
class Config:
    out: str = "out/showcase"  # folder of showcase.png
    base: str = "assets/base"  # fills holes
    pefl: str = "assets/pefl"  # the same after feedback
    editnet: str = "assets/editnet"  # follows instructions
    first: int = 0  # first of the held-out scenes that are shown: none is picked by hand
    guidance: float = 3.0  # of the prompt
    edit_guidance: float = 2.0  # of the instruction
    image_guidance: float = 1.5  # of the source picture
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the hardware has it
    device: str = "auto"  # auto, cpu, cuda


def main(cfg: Config) -> None:
    dist = common.setup(cfg.device)
    precision = common.PRECISION[common.use_bf16(cfg.precision, dist)]
    bf16 = precision == "bf16"
    base, pefl = (pipeline.open_editor(path, dist.device, ("fill",)) for path in (cfg.base, cfg.pefl))
    editnet = pipeline.open_editor(cfg.editnet, dist.device, ("follow",))
    for pipe in (base, pefl, editnet):
        pipe.net.to(dist.device).eval().requires_grad_(False)
    out = log.open_out(cfg.out)

    # 1) holes: two scenes for each of ByteEdit's three tasks
    source, rows, titles = dataset.Scenes("heldout"), [], []
    for task in ("edit", "outpaint", "erase"):
        c = make_cases(task, [cfg.first, cfg.first + 1], base.size, source)
        noise = common.randn(common.generators(0, 0, c.indices), c.image.shape[1:])
        made = [paste(pipeline.sample(pipe.net, pipe.space, c.caption, c.mask, c.image, noise,
                                      flow.timesteps(steps, pipe.shift), cfg.guidance, bf16=bf16).cpu(), c)
                for pipe, steps in ((base, 20), (pefl, 8))]
        hole = c.image * (1 - c.mask) + 0.5 * c.mask
        rows += [list(row) for row in zip(c.image, hole, *made, c.truth)]
        titles += [f"{HOLES[task]}: {caption}" for caption in c.caption]
    columns = ["picture", "hole", "before feedback, 20 steps", "after PeFL, 8 steps", "truth"]
    left = log.contact_sheet(rows, columns, row_titles=titles, scale=2)

    # 2) instructions: a held-out pair for each of OmniEdit's seven tasks
    pairs, rows, titles = EditScenes("heldout"), [], []
    for k, task in enumerate(pairs.tasks):
        c = edit_cases(task, [len(pairs.tasks) * cfg.first + k], editnet.size, editnet.size, pairs)
        noise = common.randn(common.generators(0, 0, c.indices), c.image.shape[1:])
        got = pipeline.sample(editnet.net, editnet.space, c.caption, torch.ones_like(noise[:, :1]), c.image,
                              noise, flow.timesteps(20, editnet.shift), cfg.edit_guidance, cfg.image_guidance,
                              bf16=bf16).cpu()
        rows.append([c.image[0], got[0], c.truth[0]])
        titles += [f"\N{LEFT DOUBLE QUOTATION MARK}{c.caption[0]}\N{RIGHT DOUBLE QUOTATION MARK}"]
    right = log.contact_sheet(rows, ["picture", "EditNet", "truth"], row_titles=titles, scale=2)

    # 3) a larger picture, as a user would have it edited
    picture, hole = photo(source.scene(cfg.first), out / "photo")
    sample.main(sample.Config("erase", cfg.pefl, image=picture, mask=hole, out=str(out / "photo/result"),
                              steps=8, precision=precision, device=cfg.device))
    files = picture, hole, out / "photo/result/picture_erase.png"
    large = log.contact_sheet([[Image.open(file) for file in files]], ["384x256 pixels", "mask", "erased"],
                                 row_titles=["sample.py erase"])
    high = max(left.height, right.height)
    page = Image.new("RGB", (max(left.width + right.width, large.width), high + large.height), "white")
    for sheet, place in ((left, (0, 0)), (right, (left.width, 0)), (large, (0, high))):
        page.paste(sheet, place)
    page.save(out / "showcase.png")
    print(f"wrote {out / 'showcase.png'}")


def photo(scene: draw.Scene, folder: Path) -> tuple[str, str]:
    """Files of a scene drawn large and of a mask over all that its first object draws."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw.draw(scene, 256, 384)).save(folder / "picture.png")
    hole = draw.footprint(scene.objects[:1], scene.style, 256, 384)
    Image.fromarray(hole.astype(np.uint8) * 255).save(folder / "hole.png")
    return str(folder / "picture.png"), str(folder / "hole.png")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, config=(tyro.conf.FlagConversionOff,)))
