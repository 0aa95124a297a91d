"""Region edits as UltraEdit makes them (its Algorithm 1, slides; data_generation.py): a soft mask, a blend.

An object's mask is *fine*; around it lies a *coarse* one (filled hulls of its pieces, or their box). Where
both agree the soft mask is 1 or 0, in the ring between them one constant. While sampling every second step is

    z_{t-1} = (1 - M_s) z_T + M_s DM(z_t)

where z_T of the slides is, as in its code, the source at the noise level of t - 1 (flow.sample, alternate).
"""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import flow
import pipeline
from masks import pieces
from scenes.draw import pick

TASKS = ("swap", "remove", "attribute", "background")  # that are done in a region
SOFT = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8)  # of the ring, as in its code
LARGE, SMALL, PIECES = 0.9, 0.01, 500  # its limits: share of the picture; contours
HULLS, BOXED = 150, 500  # below: ring up to the hulls; up to: hulls, and a ring up to the box


def hull(points: np.ndarray) -> np.ndarray:
    """Corners [m, 2] of the convex hull of points [n, 2], in order (monotone chain)."""
    points = sorted(set(map(tuple, points.tolist())))
    if len(points) < 3:
        return np.array(points)

    def half(points):
        out = []
        for p in points:
            while len(out) > 1 and ((out[-1][0] - out[-2][0]) * (p[1] - out[-2][1])
                                    - (out[-1][1] - out[-2][1]) * (p[0] - out[-2][0])) <= 0:
                out.pop()
            out.append(p)
        return out[:-1]

    return np.array(half(points) + half(points[::-1]))


def hulls(parts: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """bool [h, w]: the filled convex hull of every piece, whole pixels included."""
    im = Image.new("1", shape[::-1])
    for part in parts:
        corners = [(int(x), int(y)) for y, x in hull(part)]
        (ImageDraw.Draw(im).polygon if len(corners) > 2 else ImageDraw.Draw(im).line)(corners, fill=1)
        for y, x in part if len(corners) < 3 else ():
            im.putpixel((int(x), int(y)), 1)
    out = np.array(im)
    for part in parts:  # a polygon's border may leave out a pixel of its own
        out[part[:, 0], part[:, 1]] = True
    return out


def box(mask: np.ndarray) -> np.ndarray:
    """bool [h, w]: the box around all that is set."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    out = np.zeros_like(mask)
    if len(ys):
        out[ys[0]:ys[-1] + 1, xs[0]:xs[-1] + 1] = True
    return out


def grade(mask: np.ndarray) -> tuple[str, list[np.ndarray]]:
    """An object's mask, bool [h, w] -> "too large", "too small", "fragmented" or "fine", and its pieces."""
    share, parts = mask.mean(), pieces(mask)
    if share > LARGE:
        return "too large", parts
    if share < SMALL:
        return "too small", parts
    return ("fragmented" if len(parts) > PIECES else "fine"), parts


def soft_mask(fine: np.ndarray, parts: list[np.ndarray], rng: np.random.Generator,
              p_soft: float = 0.5) -> tuple[np.ndarray, float]:
    """float32 [h, w] and the ring's constant (0: a hard mask, the fine one).

    With chance p_soft there is a ring: up to the filled hulls where the object has less than 150 pieces; of
    more the hulls are the main mask, and the ring goes up to the box.
    """
    is_soft, level = rng.random(2)
    main, coarse = fine, hulls(parts, fine.shape)
    if len(parts) >= HULLS:
        main, coarse = coarse, box(fine)
    value = pick(SOFT, level) if is_soft < p_soft else 0.0
    return np.where(main, 1.0, np.where(coarse, value, 0.0)).astype(np.float32), value


@torch.inference_mode()
def draw(pipe: pipeline.Pipe, captions: list[str], image: Tensor, mask: Tensor, noise: Tensor, steps: int,
         strength: float, guidance: float, blend: str, solver: str = "euler", bf16: bool = False) -> Tensor:
    """Region edits [B, 3, H, W] of image with soft mask [B, 1, H, W]: sampling begins at the noise of
    `strength` of the steps (1: all). What the mask keeps comes back after "every" step, after every second
    one ("alternate"), or never ("none"). A model that fills holes is shown the hole, all that the mask does
    not keep whole."""
    net, space, device = pipe.net, pipe.space, next(pipe.net.parameters()).device
    image, mask, noise = image.to(device), mask.to(device), noise.to(device)
    start = max(1, round(strength * steps))
    ts = flow.timesteps(steps, pipe.shift, start)
    known, soft = space.encode(image), pipeline.shrink(mask, space.stride)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        condition = pipeline.conditions(net, space, (mask > 0).float(), image)
        denoise = pipeline.denoiser(net, captions, condition, guidance)
        x = flow.interpolate(known, noise, noise.new_full((len(noise),), ts[0]))
        back = () if blend == "none" else (known, noise, soft, blend == "alternate")
        z = flow.sample(denoise, x, ts, solver, *back)
    return space.decode(z).float().cpu()
