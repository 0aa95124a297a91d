"""What the judge asks of an editor that fills holes, on held-out scenes. The tasks are ByteEdit's (Sec. 4.2):
outpaint, edit (inpainting-editing), erase (inpainting-erasing).

    1. Cases: picture, mask, caption, truth     2. Metrics     3. A column of the tables, and its headlines
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import masks
from log import bootstrap, frechet_interval
from scenes import dataset, draw
from scenes import text as scene_text
from scenes.judge import (
    OBJECT_HEADS,
    PICTURE_HEADS,
    Parser,
    crops,
    gradient,
    masked_mean,
    object_box,
    object_labels,
    picture_labels,
    to_float,
)

TASKS = ("outpaint", "edit", "erase")

####################################################################################################
# 1. Cases: picture, mask, caption and truth of held-out scenes
####################################################################################################


@dataclass
class Cases:
    """What one task asks of N scenes. Pictures [N, 3, H, W] in [-1, 1], masks [N, 1, H, W], 1 = make new."""

    task: str
    indices: list[int]
    image: Tensor
    mask: Tensor
    truth: Tensor  # the picture that belongs there
    certain: Tensor  # [N, 1, H, W] pixels of the hole whose truth is determined: no object, no shadow, and no
    # texture that might have fallen otherwise
    caption: list[str]
    pictures: Tensor  # [N, 3] labels of PICTURE_HEADS
    which: Tensor  # [M] scene of a judged box
    boxes: Tensor  # [M, 4]
    objects: Tensor  # [M, 4] labels of OBJECT_HEADS, -100 = not asked


def named(o: draw.Object, caption: str) -> list[int]:
    """Labels of an object; the material counts only where the caption names it."""
    labels = object_labels(o)
    if not any(word in caption for word in scene_text.MATERIAL_WORDS[o.material]):
        labels[list(OBJECT_HEADS).index("material")] = -100
    return labels


def determined(s: draw.Scene, size: int, most: float = 0.05) -> np.ndarray:
    """Where the empty scene looks alike however its textures fall, bool [size, size]: of four draws with
    other texture seeds, each less its mean colour, no channel's standard deviation is above `most`, in
    [0, 1] units."""
    x = np.stack([draw.draw(replace(s, objects=(), seed=s.seed + k), size, size) for k in range(4)]) / 255
    return (x - x.mean((1, 2), keepdims=True)).std(0).max(-1) < most


def make_cases(task: str, indices: list[int], size: int, source: dataset.Scenes) -> Cases:
    """outpaint: data.py's outward mask; judged are the objects of which half or more lies in the hole, not
    all: where a wholly hidden one goes, nobody says. edit: the largest instance, dilated by 8% of the side
    (ByteEdit Sec. 4.1); the caption is the scene's, so that this object must come back. erase: all that the
    largest object draws (its shadow too), dilated by a pixel; the truth is the scene drawn without it, the
    prompt ERASE_PROMPT. Masks are a function of (scene, size)."""
    rows, which, boxes, objects = [], [], [], []
    for j, index in enumerate(indices):
        s, item = source.scene(index), source.load(index, size, size)
        image, labels, caption = item["image"], item["segments"], item["caption"]
        truth, judged = image, []
        area = [int((labels == k).sum()) for k in range(1, len(s.objects) + 1)]
        biggest = int(np.argmax(area)) + 1
        if task == "outpaint":
            rng = np.random.Generator(np.random.PCG64(draw.rng_for(source.seed, index, 12).integers(2**32)))
            mask = masks.make_mask("outward", size, size, rng) > 0
            judged = [k for k, n in enumerate(area, 1) if n and 0.5 <= mask[labels == k].mean() < 1]
        elif task == "edit":
            mask = masks.dilate(labels == biggest, max(1, round(0.08 * size)))
            judged = [biggest]
        elif task == "erase":
            without = replace(s, objects=s.objects[:biggest - 1] + s.objects[biggest:])
            truth = draw.draw(without, size, size)
            mask = masks.dilate((truth != image).any(-1) | (labels == biggest), max(1, round(size / 64)))
            caption = masks.ERASE_PROMPT
        else:
            raise ValueError(f"task {task!r}")
        if task == "erase":
            o = s.objects[biggest - 1]
            which.append(j)
            boxes.append(object_box(o.x, o.y, draw.RADIUS[o.size], size, size))
            objects.append([-100, -100, -100, 0])
            certain = mask & determined(s, size)
        else:
            for k in judged:
                o = s.objects[k - 1]
                which.append(j)
                boxes.append(object_box(o.x, o.y, draw.RADIUS[o.size], size, size))
                objects.append(named(o, caption))
            bare = draw.draw(replace(s, objects=()), size, size)
            certain = mask & (bare == image).all(-1) & determined(s, size)
        rows.append((image, mask, truth, certain, caption, picture_labels(s)))
    image, mask, truth, certain, caption, pictures = zip(*rows)
    mask, certain = (torch.from_numpy(np.stack(x))[:, None].float() for x in (mask, certain))
    image, truth = (to_float(np.stack(x)) for x in (image, truth))
    which, objects = (torch.tensor(x, dtype=torch.int64) for x in (which, objects))
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    pictures = torch.tensor(pictures)
    return Cases(task, list(indices), image, mask, truth, certain, list(caption), pictures, which, boxes,
                 objects.view(-1, 4))


####################################################################################################
# 2. Metrics: one number for each scene, errors in [0, 1] units
####################################################################################################


def seam_error(x: Tensor, truth: Tensor, mask: Tensor) -> np.ndarray:
    """Mean absolute error of the differences between neighbours across the mask's boundary [N]: a visible
    seam is large, a continued edge is not."""
    total, count = torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
    for axis in (-1, -2):
        across = mask.diff(dim=axis).abs()
        wrong = (x.diff(dim=axis) - truth.diff(dim=axis)).abs().mean(1, keepdim=True)
        total += (wrong * across).sum((1, 2, 3))
        count += across.sum((1, 2, 3))
    return torch.where(count > 0, total / 2 / count.clamp(min=1), math.nan).numpy()  # / 2: [-1, 1] -> [0, 1]


def paste(raw: Tensor, c: Cases) -> Tensor:
    """Known pixels put back."""
    return raw * c.mask + c.image * (1 - c.mask)


@torch.inference_mode()
def judge(raw: Tensor, c: Cases, net: Parser) -> dict[str, np.ndarray]:
    """Metrics [N] of pictures raw [N, 3, H, W] in [-1, 1]; not-a-number where a scene does not ask.

    Higher is better: shape, colour, material (mean over the judged objects), background, environment,
    style, empty (erase: no object at the box), attributes (mean of all that the task asks), named (edit: the
    object in the hole has the shape, the colour and, if it is said, the material of the caption). Lower is
    better: exact (mean |x - truth| over pixels whose truth is determined), hole (over all of the hole),
    seam, outside_raw (change of known pixels before pasting), outside (after), texture (mean |difference| of
    the statistics of `texture`, in the truths' standard deviations). sharpness: gradient in the hole over
    the truth's; 1 is right, below is blur, above noise. A blurred hole has a smaller exact and seam error
    than a sharp one (RESULTS.md): see `blurred` and `headlines`.
    """
    x = paste(raw, c)
    device = next(net.parameters()).device
    of_pictures, of_objects = net(x.to(device), c.which.to(device), c.boxes.to(device))
    out = {}
    N = len(x)
    asked = list(OBJECT_HEADS)
    kinds = {"edit": asked[:3], "outpaint": asked[:3] + list(PICTURE_HEADS), "erase": ["object"]}[c.task]
    for kind in kinds:
        if kind in PICTURE_HEADS:
            said = of_pictures[kind].argmax(1).cpu()
            out[kind] = (said == c.pictures[:, list(PICTURE_HEADS).index(kind)]).double().numpy()
            continue
        labels = c.objects[:, asked.index(kind)]
        use = labels >= 0
        ok = (of_objects[kind].argmax(1).cpu() == labels).double()[use]
        total = torch.zeros(N, dtype=torch.float64).index_add_(0, c.which[use], ok)
        count = torch.zeros(N, dtype=torch.float64).index_add_(0, c.which[use], torch.ones_like(ok))
        share = torch.where(count > 0, total / count.clamp(min=1), math.nan).numpy()
        out["empty" if kind == "object" else kind] = share
    stacked = np.stack(list(out.values()))
    out["attributes"] = np.nansum(stacked, 0) / np.maximum((~np.isnan(stacked)).sum(0), 1)
    out["attributes"][np.isnan(stacked).all(0)] = math.nan
    if c.task == "edit":
        out["named"] = (np.nan_to_num(stacked, nan=1.0) == 1).all(0).astype(np.float64)
    error = (x - c.truth).abs() / 2
    out["exact"] = masked_mean(error, c.certain)
    out["hole"] = masked_mean(error, c.mask)
    out["seam"] = seam_error(x, c.truth, c.mask)
    out["outside_raw"] = masked_mean((raw - c.image).abs() / 2, 1 - c.mask)
    out["outside"] = masked_mean((x - c.image).abs() / 2, 1 - c.mask)
    detail, true_detail = (masked_mean(gradient(y), c.mask) for y in (x, c.truth))
    out["sharpness"] = detail / np.maximum(true_detail, 1e-3)
    of_truth = texture(c.truth, c.mask)
    out["texture"] = ((texture(x, c.mask) - of_truth) / spread(of_truth)).abs().mean(1).double().numpy()
    return out


def blurred(raw: Tensor, c: Cases) -> Tensor:
    """The control that no measure of quality may prefer: each hole through a 3 x 3 box [N, 3, H, W]."""
    x = paste(raw, c)
    return paste(F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1), c)


def texture(x: Tensor, mask: Tensor) -> Tensor:
    """Statistics of what fills the holes, [N, 7]: logs of the mean gradient at full, half and quarter size,
    of the mean distance from the 3 x 3 mean, of the share of the gradient in its strongest tenth (flat or
    noisy against outlined), and of the standard deviations of brightness and of colour. Ours."""
    def mean(y: Tensor, m: Tensor) -> Tensor:
        return (y.mean(1, keepdim=True) * m).sum((1, 2, 3)) / m.sum((1, 2, 3)).clamp(min=1e-6)

    found, y, m = [], x, mask
    for _ in range(3):
        found.append(mean(gradient(y), m))
        y, m = F.avg_pool2d(y, 2), F.avg_pool2d(m, 2)
    found.append(mean((x - F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)).abs(), mask))
    steep, n = (gradient(x) * mask).flatten(1).sort(1, descending=True)[0], mask.flatten(1).sum(1)
    strongest = torch.arange(steep.shape[1])[None] < (n[:, None] / 10).ceil()
    found.append((steep * strongest).sum(1) / steep.sum(1).clamp(min=1e-6))
    for y in (x.mean(1, keepdim=True), x - x.mean(1, keepdim=True)):
        centre = (y * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True).clamp(min=1)
        found.append(mean((y - centre).square(), mask).sqrt())
    return torch.stack(found, 1).clamp(min=1e-3).log()


def spread(of_truth: Tensor) -> Tensor:
    """Standard deviations [D] of rows [N, D], as units; 1 where there is but one row."""
    return of_truth.std(0).clamp(min=1e-6) if len(of_truth) > 1 else torch.ones_like(of_truth[0])


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| of rows a [N, D], b [M, D] (Szekely and Rizzo 2013), 0 where
    both are the same rows; of two samples of one distribution it falls with 1 / N."""
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def texture_test(x: Tensor, of_truth: Tensor, draws: int = 200, seed: int = 0) -> tuple[float, float, float]:
    """Two-sample test of rows of `texture`, [N, D], of results and of the truths of the same scenes -> energy
    distance in the truths' standard deviations; 1.96 of its bootstrap standard deviations, over scenes; and
    p: how often it is as large when result and truth of each scene are swapped at random, which changes
    nothing if they look alike."""
    x, of_truth = (y.double() / spread(of_truth) for y in (x, of_truth))
    value, rng, more = energy_distance(x, of_truth), np.random.default_rng(seed), 0
    for _ in range(draws):
        swap = torch.from_numpy(rng.random((len(x), 1)) < 0.5)
        more += energy_distance(torch.where(swap, of_truth, x), torch.where(swap, x, of_truth)) >= value
    again = [torch.from_numpy(rng.integers(0, len(x), len(x))) for _ in range(40)]
    spread_of = np.std([energy_distance(x[i], of_truth[i]) for i in again])
    return value, 1.96 * float(spread_of), (1 + more) / (1 + draws)


@torch.inference_mode()
def frechet_features(x: Tensor, c: Cases, net: Parser) -> tuple[np.ndarray, np.ndarray]:
    """Parser features [N, 128] of the whole pictures and of the boxes around their holes."""
    device = next(net.parameters()).device
    boxes = []
    for m in c.mask[:, 0] > 0:
        ys, xs = m.any(1).nonzero()[:, 0].tolist(), m.any(0).nonzero()[:, 0].tolist()
        h, w = m.shape
        boxes.append((xs[0] / w, ys[0] / h, (xs[-1] + 1) / w, (ys[-1] + 1) / h))
    hole = crops(x.to(device), torch.arange(len(x), device=device), torch.tensor(boxes, device=device))
    return net.features(x.to(device)).cpu().numpy(), net.features(hole).cpu().numpy()


####################################################################################################
# 3. A column of the tables, and its headlines: the metrics that may call one picture better
####################################################################################################


def judge_result(pictures: np.ndarray, c: Cases, net: Parser) -> tuple[dict, dict]:
    """pictures uint8 [S, N, H, W, 3] -> metrics [S, N], and {metric: mean and interval} with what is of all
    scenes together: the Frechet distances, and the textures against the truths' (first seed, with its p)."""
    per_seed = [judge(to_float(p), c, net) for p in pictures]
    scores = {k: np.stack([m[k] for m in per_seed]) for k in per_seed[0]}
    summary = {k: bootstrap(v.mean(0)) for k, v in scores.items()}  # not-a-number depends on the scene alone
    of_truth = frechet_features(c.truth, c, net)
    of_result = zip(*(frechet_features(paste(to_float(p), c), c, net) for p in pictures))
    for name, a, b in zip(("frechet", "frechet_hole"), of_result, of_truth):
        summary[name] = frechet_interval(np.stack(a), np.broadcast_to(b, (len(a), *b.shape)))
    value, half, p = texture_test(*(texture(x, c.mask) for x in (paste(to_float(pictures[0]), c), c.truth)))
    summary["textures"] = {"mean": value, "low": max(value - half, 0.0), "high": value + half,
                           "n": pictures.shape[1], "p": p}
    return scores, summary


LOWER = ("texture", "textures", "frechet", "frechet_hole", "exact", "hole", "seam")
HIGHER = ("attributes", "named", "empty", "shape", "colour", "material", "background", "environment", "style")


def headlines(truth: dict, base: dict, blur: dict, less: dict[str, np.ndarray]) -> list[str]:
    """The metrics that rank the truth above a result, and that above itself blurred: no other may say that
    one picture is better than another. truth, base, blur: summaries of judge_result; less: by metric, blur
    minus base scene by scene [N], of which the interval must not reach 0."""
    found = []
    for name in (*LOWER, *HIGHER):
        if name in base:
            sign = 1 if name in HIGHER else -1
            gap = bootstrap(sign * less[name])["high"] if name in less else \
                sign * (blur[name]["mean"] - base[name]["mean"])
            if gap < 0 < sign * (truth[name]["mean"] - base[name]["mean"]):
                found.append(name)
    return found
