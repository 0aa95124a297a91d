"""The judge: a parser network that reads a scene's attributes back from a picture.

A scene's description is known, so the judge needs no human. It is never a reward: training on it would end
its use. What it is asked: judge_holes.py (of filled holes), judge_edits.py (of edits by instruction).

    1. Pictures     2. Parser: network, training, accuracy
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import checkpoint
import common
import log
import model
from scenes import dataset, draw

####################################################################################################
# 1. Pictures: floats are [-1, 1], errors in [0, 1] units
####################################################################################################


def to_float(image: np.ndarray | Tensor) -> Tensor:
    """uint8 [..., H, W, 3] -> float [..., 3, H, W] in [-1, 1]."""
    return torch.as_tensor(image).movedim(-1, -3).float() / 127.5 - 1


def to_uint8(image: Tensor) -> Tensor:
    """float [..., 3, H, W] in [-1, 1] -> uint8 [..., H, W, 3]; clamps."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1).contiguous()


def masked_mean(x: Tensor, m: Tensor) -> np.ndarray:
    """Mean of x [N, C, H, W] where m [N, 1, H, W] is 1 -> [N]; not-a-number where it is nowhere."""
    total, area = (x.mean(1, keepdim=True) * m).sum((1, 2, 3)).double(), m.sum((1, 2, 3)).double()
    return torch.where(area > 0, total / area.clamp(min=1), math.nan).numpy()


def gradient(x: Tensor) -> Tensor:
    """|d/dx| + |d/dy|, mean over channels: [N, 3, H, W] -> [N, 1, H, W], in the units of x."""
    dx, dy = x.diff(dim=-1, append=x[..., -1:]), x.diff(dim=-2, append=x[..., -1:, :])
    return (dx.abs() + dy.abs()).mean(1, keepdim=True)


def truth_distance(x: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """How far pictures [N, 3, H, W] are from the truth in the hole, [N], in [0, 1] units; 0 for the truth
    itself.

    Pixel L1 plus twice the L1 between local gradient energies (5 x 5 means). Pixel or gradient L1 alone
    would prefer blur to a sharp texture that lies a little off; local energy counts lost and invented
    detail alike. The judge's parser has no part in it.
    """
    def energy(y: Tensor) -> Tensor:
        return F.avg_pool2d(gradient(y), 5, 1, 2, count_include_pad=False)

    d = (x - truth).abs().mean(1, keepdim=True) + 2 * (energy(x) - energy(truth)).abs()
    return (d * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(min=1) / 2


####################################################################################################
# 2. Parser: what does the picture show? Trained on clean renders of train scenes, never a reward
####################################################################################################

SIDE = 64  # pixels of what the network sees, crops and whole pictures alike
CONTEXT = 1.35  # half side of an object's crop in radii
PICTURE_HEADS = {"background": draw.BACKGROUNDS, "environment": draw.ENVIRONMENTS, "style": draw.STYLES}
OBJECT_HEADS = {"shape": draw.SHAPES, "colour": tuple(draw.COLOURS), "material": draw.MATERIALS,
                "object": ("no", "yes", "part")}  # part: the box misses the object by more than half a radius


def conv(c_in: int, c_out: int, kernel: int, stride: int) -> nn.Sequential:
    layer = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2)
    return nn.Sequential(layer, nn.GroupNorm(8, c_out), nn.ReLU(inplace=True))


class Parser(nn.Module):
    """One convolutional trunk reads the whole picture and an object's crop; heads name what they show.

    An object's heads see both features: without the picture, white at night and grey by day are one colour.
    """

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(  # unshuffled: single pixels are seen, at the cost of half the side
            nn.PixelUnshuffle(2), conv(12, 48, 5, 2), conv(48, 64, 3, 1), conv(64, 96, 3, 2),
            conv(96, 128, 3, 1), conv(128, 96, 3, 2), nn.Flatten(), nn.Linear(96 * 16, 128), nn.SiLU())
        self.join = nn.Sequential(nn.Linear(256, 128), nn.SiLU())
        self.picture = nn.ModuleDict({k: nn.Linear(128, len(v)) for k, v in PICTURE_HEADS.items()})
        self.object = nn.ModuleDict({k: nn.Linear(128, len(v)) for k, v in OBJECT_HEADS.items()})

    @property
    def arch(self) -> dict:
        heads = {**PICTURE_HEADS, **OBJECT_HEADS}
        return {"kind": "parser", "labels": {k: list(v) for k, v in heads.items()}}

    def features(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, 128], for the heads and the Frechet distance."""
        if image.shape[-2:] != (SIDE, SIDE):
            image = F.interpolate(image, (SIDE, SIDE), mode="bilinear", antialias=True)
        return self.trunk(image)

    def forward(self, image: Tensor, which: Tensor, boxes: Tensor) -> tuple[dict, dict]:
        """image [B, 3, H, W]; boxes [M, 4] = x0, y0, x1, y1 as fractions, of the pictures which [M].

        -> logits by head, of the pictures [B, ...] and of the boxes [M, ...].
        """
        f = self.features(image)
        g = self.join(torch.cat([self.trunk(crops(image, which, boxes)), f[which]], dim=1))
        of_pictures = {k: head(f) for k, head in self.picture.items()}
        return of_pictures, {k: head(g) for k, head in self.object.items()}


def crops(image: Tensor, which: Tensor, boxes: Tensor) -> Tensor:
    """Bilinear crops [M, 3, SIDE, SIDE] of image[which]; beyond a picture its edge is repeated."""
    if max(image.shape[-2:]) > 2 * SIDE:  # grid_sample does not smooth
        image = F.interpolate(image, (2 * SIDE, 2 * SIDE), mode="bilinear", antialias=True)
    at = (torch.arange(SIDE, device=image.device) + 0.5) / SIDE
    x = 2 * (boxes[:, 0:1] + at * (boxes[:, 2:3] - boxes[:, 0:1])) - 1                     # [M, SIDE]
    y = 2 * (boxes[:, 1:2] + at * (boxes[:, 3:4] - boxes[:, 1:2])) - 1
    grid = torch.stack([x[:, None].expand(-1, SIDE, -1), y[:, :, None].expand(-1, -1, SIDE)], dim=-1)
    return F.grid_sample(image[which], grid, padding_mode="border", align_corners=False)


def object_box(x: float, y: float, radius: float, h: int, w: int) -> tuple[float, float, float, float]:
    """Box with context around a centre (fractions); the radius is in short sides."""
    rx, ry = CONTEXT * radius * min(h, w) / w, CONTEXT * radius * min(h, w) / h
    return x - rx, y - ry, x + rx, y + ry


def picture_labels(s: draw.Scene) -> list[int]:
    return [v.index(getattr(s, k)) for k, v in PICTURE_HEADS.items()]


def object_labels(o: draw.Object) -> list[int]:
    return [v.index(getattr(o, k)) for k, v in OBJECT_HEADS.items() if k != "object"] + [1]


@torch.inference_mode()
def picture_features(x: Tensor, net: Parser) -> np.ndarray:
    """Parser features [N, D] of pictures [N, 3, H, W]."""
    device = next(net.parameters()).device
    return torch.cat([net.features(part.to(device)) for part in x.split(256)]).cpu().numpy()


class ParserBatches(torch.utils.data.Dataset):
    """Item s is a batch of clean renders: pictures, labels, a box on each object, one on free background, and
    one that holds a part of each object.

    Boxes on objects are off by up to a fifth of a radius each way and a tenth in size, since an edited object
    need not sit where the original did. Those that miss theirs are there for whoever looks for an object box
    by box: half a disc is no crescent. Pictures are of the sources in turn, batches at the sizes (h, w) in
    turn.
    """

    def __init__(self, sources: list[dataset.Scenes], start: int, batch_size: int, steps: int,
                 sizes: list[tuple[int, int]], jitter: bool):
        self.sources, self.start, self.batch_size, self.steps = sources, start, batch_size, steps
        self.sizes, self.jitter = sizes, jitter

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, ...]:
        h, w = self.sizes[step % len(self.sizes)]
        images, pictures, which, boxes, objects = [], [], [], [], []
        for j in range(self.batch_size):
            index = self.start + step * self.batch_size + j
            source = self.sources[j % len(self.sources)]
            s, rng = source.scene(index), draw.rng_for(source.seed, index, 11)
            images.append(draw.draw(s, h, w))
            pictures.append(picture_labels(s))
            places = [(o.x, o.y, draw.RADIUS[o.size], object_labels(o)) for o in s.objects]
            for _ in range(8):
                sizes = draw.LEVELS[s.level].sizes
                x, y, r = *rng.uniform(0.1, 0.9, 2), draw.RADIUS[sizes[rng.integers(len(sizes))]]
                # as near to objects as scenes puts them to each other: what erasing leaves behind
                if all(math.hypot(x - o.x, y - o.y) > draw.RADIUS[o.size] + 0.7 * r for o in s.objects):
                    places.append((x, y, r, [-100, -100, -100, 0]))  # -100: cross_entropy's ignore_index
                    break
            for o in s.objects:
                r, short = draw.RADIUS[o.size], min(h, w)
                off, angle = r * rng.uniform(0.6, 1.4), rng.uniform(0, 2 * math.pi)
                x, y = o.x + off * math.cos(angle) * short / w, o.y + off * math.sin(angle) * short / h
                others = [p for p in s.objects if p != o]
                if all(math.hypot(x - p.x, y - p.y) > 0.6 * draw.RADIUS[p.size] for p in others):
                    places.append((x, y, r, [-100, -100, -100, 2]))
            for x, y, r, labels in places:
                if self.jitter:
                    dx, dy = rng.uniform(-0.2, 0.2, 2)
                    x, y, r = x + r * dx, y + r * dy, r * rng.uniform(0.9, 1.1)
                which.append(j)
                boxes.append(object_box(x, y, r, h, w))
                objects.append(labels)
        return (torch.from_numpy(np.stack(images)), torch.tensor(pictures), torch.tensor(which),
                torch.tensor(boxes, dtype=torch.float32), torch.tensor(objects))


def one_thread(_: int) -> None:
    torch.set_num_threads(1)


def train_parser(steps: int, batch_size: int, lr: float, device: torch.device, bf16: bool,
                 sizes: list[tuple[int, int]] = [(SIDE, SIDE)]) -> Parser:
    """A parser trained from scratch on train scenes of every level in turn, drawn at each of the sizes
    (h, w): three batches of four, and the fourth at half the size."""
    torch.manual_seed(0)
    net = Parser().to(device, memory_format=torch.channels_last)
    opt = torch.optim.AdamW(model.param_groups(net, 0.05), lr=lr, betas=(0.9, 0.99))
    turns = [turn for h, w in sizes for turn in ((h, w), (h, w), (h, w), (h // 2, w // 2))]
    levels = [dataset.Scenes("train", level) for level in draw.LEVELS]
    batches = ParserBatches(levels, 0, batch_size, steps, turns, jitter=True)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=1, worker_init_fn=one_thread)
    bar = log.progress(steps, desc="parser")
    for step, batch in enumerate(loader):
        images, pictures, which, boxes, objects = (x.to(device) for x in batch)
        for group in opt.param_groups:
            group["lr"] = common.lr_at(step, lr, min(200, steps // 10 + 1), steps, "cosine")
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            images = to_float(images).contiguous(memory_format=torch.channels_last)
            of_pictures, of_objects = net(images, which, boxes)
            loss = sum(F.cross_entropy(x, pictures[:, i]) for i, x in enumerate(of_pictures.values()))
            loss = loss + sum(F.cross_entropy(x, objects[:, i]) for i, x in enumerate(of_objects.values()))
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        bar.update()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    bar.close()
    return net.eval()


@torch.inference_mode()
def parser_accuracy(net: Parser, size: tuple[int, int], n: int, device: torch.device,
                    level: str = "easy") -> dict[str, np.ndarray]:
    """Right or wrong (1, 0) of every head on clean held-out renders of size (h, w); NaN: a box without an
    object."""
    source = dataset.Scenes("heldout", level)
    start = len(source) - 20_000  # far from the scenes that checkpoints are judged on
    right = {k: [] for k in (*PICTURE_HEADS, *OBJECT_HEADS)}
    batches = ParserBatches([source], start, 100, n // 100, [size], jitter=False)
    for images, pictures, which, boxes, objects in map(batches.__getitem__, range(len(batches))):
        said = net(to_float(images.to(device)), which.to(device), boxes.to(device))
        for logits, labels in zip(said, (pictures, objects)):
            for i, (k, x) in enumerate(logits.items()):
                ok = (x.argmax(1).cpu() == labels[:, i]).double().masked_fill(labels[:, i] < 0, math.nan)
                right[k].append(ok.numpy())
    return {k: np.concatenate(v) for k, v in right.items()}


def load_parser(path: str, device: torch.device) -> Parser:
    """The judge from its folder; SystemExit when it is missing, damaged, of another kind or other labels."""
    if not Path(path).is_dir():
        raise SystemExit(f"error: --parser: {path}: no such folder: train the judge: `python"
                         f" evaluate.py parser --out {path} --train_steps 6000`")
    weights, manifest = checkpoint.load(path, ("model",))
    net = Parser()
    if manifest.get("arch") != net.arch:
        kind = manifest.get("arch", {}).get("kind")
        raise SystemExit(f"error: --parser: {path}: holds a {kind!r}, or other labels than scenes/draw.py: "
                         "train the judge: `python evaluate.py parser --out FOLDER --train_steps 6000`")
    checkpoint.load_state(net, {k: v.float() for k, v in weights["model"].items()}, path)
    return net.to(device).eval().requires_grad_(False)
