"""Pages and folders of scenes.

    python -m scenes sheet --out sheet.png --n 64 --size 64                  # pictures and captions
    python -m scenes export --out data/scenes --n 1000 --split heldout --level hard  # an image folder
    python -m scenes edits --out edits.png --n 28                         # source | target | region mask
    python -m scenes edits --out wrong.png --n 28 --wrong 1              # pairs as a bad generator makes them
    python -m scenes chain --out turns.png --n 6                          # several edits of one scene in turn
"""

import json
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import common
from scenes.dataset import EditScenes, Scenes
from scenes.draw import draw, rng_for
from scenes.edits import chain


def contact_sheet(rows, columns, cell, lines):
    """A page of captioned pictures, a PIL image. rows: lists of (uint8 [h, w, 3], text), every list a row of
    pictures; `columns` rows stand side by side. cell: a picture's longer side in pixels; lines: of text."""
    margin, line = 12, 11
    wide = max(map(len, rows)) * (cell + margin) + margin
    high = cell + line * lines + margin
    size = columns * wide, -(-len(rows) // columns) * high + margin
    page = Image.new("RGB", size, "lightgray")
    pen = ImageDraw.Draw(page)
    for n, row in enumerate(rows):
        for k, (image, text) in enumerate(row):
            x, y = n % columns * wide + margin + k * (cell + margin), margin + n // columns * high
            scale = cell / max(image.shape[:2])
            size = round(image.shape[1] * scale), round(image.shape[0] * scale)
            page.paste(Image.fromarray(image).resize(size, Image.Resampling.NEAREST), (x, y))
            text = "\n".join(textwrap.wrap(text, max(8, cell // 6)))
            pen.text((x, y + cell + 2), text, fill=(40, 40, 40), spacing=1)
    return page


def sheet(out: str, n: int = 64, size: int = 64, split: str = "train", level: str = "easy"):
    """The first scenes with their captions.

    Args:
        out: picture file to write
        n: how many scenes
        size: width and height in pixels
        split: train or heldout
        level: easy or hard, see LEVELS of scenes/draw.py
    """
    source = opened(split, level, n)
    loaded = (source.load(i, size, size) for i in range(n))
    rows = [[(got["image"], got["caption"])] for got in loaded]
    save(contact_sheet(rows, 8, size * max(1, 160 // size), 7), out)


def export(out: str, n: int = 64, size: int = 64, split: str = "train", level: str = "easy"):
    """An image folder: NAME.png, NAME.seg.png (8-bit label map) and metadata.jsonl.

    Args:
        out: folder to write
        n: how many scenes
        size: width and height in pixels
        split: train or heldout
        level: easy or hard, see LEVELS of scenes/draw.py
    """
    source, folder = opened(split, level, n), Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "metadata.jsonl", "w") as f:
            for i in range(n):
                got, name = source.load(i, size, size), f"{i:06d}"
                Image.fromarray(got["image"]).save(folder / f"{name}.png")
                Image.fromarray(got["segments"]).save(folder / f"{name}.seg.png")
                row = {"file_name": f"{name}.png", "text": got["caption"], "segments": f"{name}.seg.png"}
                f.write(json.dumps(row) + "\n")
    except OSError as e:
        raise SystemExit(f"error: --out: {out}: {e.strerror}: choose a place that can be written") from None
    print(f"wrote {out}: {n} pictures, label maps, metadata.jsonl")


def edits(out: str, n: int = 28, size: int = 64, split: str = "train", wrong: float = 0.0,
                level: str = "easy"):
    """Source | target with task and score | region mask of the first pairs.

    Args:
        out: picture file to write
        n: how many pairs
        size: width and height in pixels
        split: train or heldout
        wrong: share of wrong pairs, named under the mask; train only
        level: easy or hard, see LEVELS of scenes/draw.py
    """
    opened(split, level, n)
    source, rows = EditScenes(split, wrong, level), []
    for i in range(n):
        got = source.load_exact(i, size, size)
        mask = np.repeat((got["mask"] * 255).astype(np.uint8)[..., None], 3, -1)
        rows.append([(got["source"], got["caption"]), (got["image"], f"{got['task']}, {got['score']:.1f}"),
                     (mask, got["kind"] or "")])  # fmt: skip
    save(contact_sheet(rows, 2, 128, 6), out)


def chained(out: str, n: int = 6, size: int = 64, split: str = "train", turns: int = 5,
                level: str = "easy"):
    """The first scenes, each edited several times in turn.

    Args:
        out: picture file to write
        n: how many scenes
        size: width and height in pixels
        split: train or heldout
        turns: how many edits
        level: easy or hard, see LEVELS of scenes/draw.py
    """
    opened(split, level, n)
    source, rows = EditScenes(split, level=level), []
    for i in range(n):
        before = source.scenes.scene(i)
        later = chain(before, rng_for(source.seed, i, 7), turns)
        rows.append([(draw(s, size, size), text) for text, s in [("", before), *later]])
    save(contact_sheet(rows, 1, 128, 6), out)


def opened(split, level, n):
    source = Scenes(split, level)
    if not 0 < n <= len(source):
        raise SystemExit(f"error: --n: {n}: use 1 to {len(source):,}")
    return source


def save(page, out):
    try:
        page.save(out)
    except (OSError, ValueError) as e:  # PIL: unknown file extension is a ValueError
        raise SystemExit(f"error: --out: {out}: {e}: choose a writable place and a name that ends in .png"
                         ) from None
    print(f"wrote {out}")


if __name__ == "__main__":
    common.commands({"sheet": sheet, "export": export, "edits": edits, "chain": chained}, "-m scenes")
