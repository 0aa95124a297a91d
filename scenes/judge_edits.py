"""What the judge asks of an instruction editor: edits of held-out scenes, and what is left of text to image.

Every fact of a scene is known, so what an edit should change and what it should keep are lists of facts: an
attribute of the picture, or of an object at its place. The parser (judge.py) reads them. A fact that it reads
wrong even in the true target is not asked, nor one to be kept that it cannot read in the source, and a pair
whose source already reads as edited is not judged. So the true target has 100% success, the untouched source
0%, and both have kept everything; `bounds` says what these rules leave out.

OmniEdit's judges (Sec. 5) rate semantic consistency - is it there, is nothing else changed - and perceptual
quality: here `edit`, `kept`, both at once (`success`, the paper's accuracy), and the Frechet distance.

    1. Cases     2. Metrics of an edit     3. Text to image
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from log import bootstrap, frechet_interval
from scenes import dataset, draw
from scenes.dataset import EditScenes
from scenes.edits import edit_mask
from scenes.judge import (
    OBJECT_HEADS,
    PICTURE_HEADS,
    Parser,
    masked_mean,
    object_box,
    object_labels,
    picture_features,
    picture_labels,
    to_float,
)
from scenes.text import ENVIRONMENT_WORDS, MATERIAL_WORDS, STYLE_WORDS, caption, place_of

####################################################################################################
# 1. Cases
####################################################################################################

KEPT, EDITED, ELSEWHERE = range(3)  # what a box is for; ELSEWHERE: a place as good as the edited one
NOT_ASKED = -100


@dataclass
class EditCases:
    """What one task asks of N pairs. Pictures [N, 3, H, W] in [-1, 1]."""

    task: str
    indices: list[int]  # of EditScenes
    image: Tensor  # the source
    truth: Tensor  # the target
    region: Tensor  # [N, 1, H, W] bool: all that the edited object draws, before or after; all that differs
    caption: list[str]  # the instruction
    source_caption: list[str]  # of the source and of the target, in the same words where they agree
    target_caption: list[str]
    resized: Tensor  # [N] bool: the edit is one of size, for which the parser has no head
    pictures: Tensor  # [N, 3] labels of PICTURE_HEADS in the target
    which: Tensor  # [M] pair of a box, rising
    boxes: Tensor  # [M, 4]
    objects: Tensor  # [M, 4] labels of OBJECT_HEADS, NOT_ASKED where they mean nothing
    role: Tensor  # [M] KEPT, EDITED (at most one of a pair) or ELSEWHERE


def edit_cases(task: str, indices: list[int], h: int, w: int, source: EditScenes) -> EditCases:
    """Pairs `indices` of `source`, all of one task, drawn at h x w.

    Boxes: the edited object's place (in the target; where it was, for remove), every other object, and up
    to four places where neither picture has an object. An added object may stand anywhere in the part of the
    picture that the instruction names: ELSEWHERE.
    """
    rows, which, boxes, objects, roles = [], [], [], [], []
    for j, index in enumerate(indices):
        before, edit = source.edit(index)
        if edit.task != task:
            raise ValueError(f"pair {index} is of task {edit.task}, not {task}")
        image, truth = draw.draw(before, h, w), draw.draw(edit.target, h, w)
        region = (edit_mask(edit, before, h, w) > 0) | (image != truth).any(-1)
        k = None if edit.ids is None else edit.ids[0] - 1
        places = []  # (object whose place and size are meant, labels, role)
        if task == "remove":
            places.append((before.objects[k], [NOT_ASKED] * 3 + [0], EDITED))
        for i, o in enumerate(edit.target.objects):
            places.append((o, object_labels(o), EDITED if i == k and task != "remove" else KEPT))
        if task == "add":
            new = edit.target.objects[k]
            places += [(o, object_labels(o), ELSEWHERE) for o in as_good(new, before.objects, h, w)]
        avoid = place_of(edit.target.objects[k]) if task == "add" else None
        nothing = [NOT_ASKED] * 3 + [0]
        places += [(o, nothing, KEPT) for o in free_places(source.seed, index, before, edit.target, avoid)]
        for o, labels, role in places:
            which.append(j)
            boxes.append(object_box(o.x, o.y, draw.RADIUS[o.size], h, w))
            objects.append(labels)
            roles.append(role)
        resized = task == "attribute" and before.objects[k].size != edit.target.objects[k].size
        texts = (edit.instruction, *(caption(s, draw.rng_for(source.seed, index, 8))
                                     for s in (before, edit.target)))
        rows.append((image, truth, region, texts, resized, picture_labels(edit.target)))
    image, truth, region, texts, resized, pictures = zip(*rows)
    return EditCases(task, list(indices), to_float(np.stack(image)), to_float(np.stack(truth)),
                     torch.from_numpy(np.stack(region))[:, None], *map(list, zip(*texts)),
                     torch.tensor(resized), torch.tensor(pictures), torch.tensor(which), torch.tensor(boxes),
                     torch.tensor(objects), torch.tensor(roles))


def as_good(new: draw.Object, others: tuple[draw.Object, ...], h: int, w: int) -> list[draw.Object]:
    """`new` at the other free places of its part (ninth) of the picture, 0.35 radii apart: the parser reads
    boxes that are off by 0.2."""
    r, found = draw.RADIUS[new.size], []
    dx, dy = 0.35 * r * min(h, w) / w, 0.35 * r * min(h, w) / h
    for x in np.arange(r, 1 - r + 1e-6, dx):
        for y in np.arange(r, 1 - r + 1e-6, dy):
            o = replace(new, x=float(x), y=float(y))
            if place_of(o) == place_of(new) and draw.gap(o.x, o.y, r, others) > -0.3 * r:
                found.append(o)
    return found


def free_places(seed: int, index: int, before: draw.Scene, after: draw.Scene,
                avoid: tuple | None) -> list[draw.Object]:
    """Up to four places without an object in either scene, and not in the part `avoid` of the picture: what
    stands there after an edit is one too many."""
    rng, found = draw.rng_for(seed, index, 9), []
    known = (*before.objects, *after.objects)
    for x, y, u in rng.random((24, 3)).tolist():
        size = draw.pick(draw.LEVELS[before.level].sizes, u)
        o = draw.Object("", "", "", size, 0.1 + 0.8 * x, 0.1 + 0.8 * y)
        free = draw.gap(o.x, o.y, 0.7 * draw.RADIUS[size], known) > 0
        if free and place_of(o) != avoid and len(found) < 4:
            found.append(o)
    return found


####################################################################################################
# 2. Metrics of an edit: one number for each pair, errors in [0, 1] units
####################################################################################################


@torch.inference_mode()
def read(x: Tensor, which: Tensor, boxes: Tensor, net: Parser, part: int = 32) -> tuple[Tensor, Tensor]:
    """What the parser says of pictures x [N, 3, H, W] and of boxes [M, 4] in the pictures which [M], rising:
    labels [N, 3] and [M, 4] in the order of the heads. part: pictures at a time."""
    device, of_pictures, of_objects = next(net.parameters()).device, [], []
    for i in range(0, len(x), part):
        rows = (which >= i) & (which < i + part)
        said = net(x[i:i + part].to(device), (which[rows] - i).to(device), boxes[rows].to(device))
        for found, heads in zip((of_pictures, of_objects), said):
            found.append(torch.stack([y.argmax(1) for y in heads.values()], 1).cpu())
    return torch.cat(of_pictures), torch.cat(of_objects)


@dataclass
class Asked:
    """Which facts of EditCases are asked: those that the parser reads right in the true target, and, if they
    are to be kept, in the source too."""

    pictures: Tensor  # [N, 3] bool
    objects: Tensor  # [M, 4] bool
    judged: Tensor  # [N] bool: the source does not read as edited


def ask(c: EditCases, net: Parser) -> Asked:
    (pictures, objects), (was_pictures, was_objects) = (read(x, c.which, c.boxes, net)
                                                        for x in (c.truth, c.image))
    asked = Asked(pictures == c.pictures, objects == c.objects, torch.ones(len(c.image), dtype=torch.bool))
    rest = torch.tensor([kind != c.task for kind in PICTURE_HEADS])
    asked.pictures[:, rest] &= (was_pictures == c.pictures)[:, rest]
    asked.objects[c.role == KEPT] &= (was_objects == c.objects)[c.role == KEPT]
    edited = torch.zeros(len(c.image), 4, dtype=torch.bool)
    edited[c.which[c.role == EDITED]] = asked.objects[c.role == EDITED]
    elsewhere = c.role == ELSEWHERE
    asked.objects[elsewhere] = edited[c.which[elsewhere]]
    asked.judged = ~is_edited(c.image, c, asked, net, (was_pictures, was_objects))
    return asked


def bounds(c: EditCases, asked: Asked, net: Parser) -> dict[str, np.ndarray]:
    """What the rules of `ask` leave out, [N]: judged (0 or 1); truth_read: all that was edited reads right in
    the true target, nothing left out; source_read: it does so in the source already; kept_asked: the share
    asked of the facts that are to be kept."""
    every = Asked(torch.ones_like(asked.pictures), c.objects != NOT_ASKED, asked.judged)
    of_truth, of_source = (is_edited(x, c, every, net) for x in (c.truth, c.image))
    share = kept_facts(c, asked.pictures, asked.objects) / kept_facts(c, every.pictures, every.objects)
    return {k: v.double().numpy() for k, v in (("judged", asked.judged), ("truth_read", of_truth),
                                               ("source_read", of_source), ("kept_asked", share))}


def kept_facts(c: EditCases, pictures: Tensor, objects: Tensor) -> Tensor:
    """How many of the facts pictures bool [N, 3] and objects bool [M, 4] are among those to be kept, [N]."""
    rest, rows = torch.tensor([kind != c.task for kind in PICTURE_HEADS]), c.role == KEPT
    return pictures[:, rest].sum(1).index_add_(0, c.which[rows], objects[rows].sum(1))


def any_of(ok: Tensor, which: Tensor, n: int) -> Tensor:
    """ok [M] of boxes of the pairs which [M] -> [n] whether any of a pair's is."""
    return torch.zeros(n, dtype=torch.int64).index_add_(0, which, ok.long()) > 0


def is_edited(x: Tensor, c: EditCases, asked: Asked, net: Parser,
              said: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """[N] bool: everything that was to be changed reads as asked in pictures x. A change of size is one if
    the object reads right at its new size and the picture is nearer to the target's than to the source's
    there. said: what `read` returned for x."""
    pictures, objects = said or read(x, c.which, c.boxes, net)
    n, done = len(x), torch.ones(len(x), dtype=torch.bool)
    if c.task in PICTURE_HEADS:
        i = list(PICTURE_HEADS).index(c.task)
        done &= (pictures[:, i] == c.pictures[:, i]) | ~asked.pictures[:, i]
    there = ((objects == c.objects) | ~asked.objects).all(1)
    done &= any_of(there & (c.role != KEPT), c.which, n) | ~any_of(c.role == EDITED, c.which, n)
    nearer = (masked_mean((x - c.truth).abs(), c.region) < masked_mean((x - c.image).abs(), c.region))
    return done & (torch.from_numpy(nearer) | ~c.resized)


def judge_edit(x: Tensor, c: EditCases, asked: Asked, net: Parser) -> dict[str, np.ndarray]:
    """Metrics [N] of pictures x [N, 3, H, W] in [-1, 1]; not-a-number where a pair does not ask.

    edit: what was asked is there. kept: every other object, and every attribute of the picture that was not
    to change, reads as in the true target, and nothing stands where nothing was; kept_share: the share of
    these facts, since one that noise made unreadable is enough against `kept`. success: edit and kept. over:
    mean |x - source| outside the region that the edit changes (over-editing). exact: mean |x - target| in it.
    error: mean |x - target| over the picture. `over` and `exact` of "add" hold the object against the one
    place at which the target has it, though the instruction names a ninth of the picture.
    """
    pictures, objects = said = read(x, c.which, c.boxes, net)
    edit = is_edited(x, c, asked, net, said)
    facts = kept_facts(c, asked.pictures, asked.objects)
    right = kept_facts(c, asked.pictures & (pictures == c.pictures), asked.objects & (objects == c.objects))
    kept = right == facts
    of_source, of_truth = (x - c.image).abs() / 2, (x - c.truth).abs() / 2
    region, judged = c.region.float(), asked.judged.numpy()
    return {"edit": np.where(judged, edit.double().numpy(), math.nan), "kept": kept.double().numpy(),
            "kept_share": torch.where(facts > 0, right / facts.clamp(min=1), math.nan).numpy(),
            "success": np.where(judged, (edit & kept).double().numpy(), math.nan),
            "over": masked_mean(of_source, 1 - region), "exact": masked_mean(of_truth, region),
            "error": masked_mean(of_truth, torch.ones_like(region))}


def judge_edits(pictures: np.ndarray, c: EditCases, asked: Asked, net: Parser) -> tuple[dict, tuple]:
    """pictures uint8 [S, N, H, W, 3] -> metrics [S, N]; parser features [S, N, D] of them and of truth."""
    per_seed = [judge_edit(to_float(p), c, asked, net) for p in pictures]
    return {k: np.stack([m[k] for m in per_seed]) for k in per_seed[0]}, features_of(pictures, c.truth, net)


def features_of(pictures: np.ndarray, truth: Tensor, net: Parser) -> tuple[np.ndarray, np.ndarray]:
    """Parser features [S, N, D] of pictures uint8 [S, N, H, W, 3] and of truth [N, 3, H, W], for
    frechet_interval."""
    features = np.stack([picture_features(to_float(p), net) for p in pictures])
    return features, np.broadcast_to(picture_features(truth, net), features.shape)


def summary_of(scores: list[dict], features: list[tuple]) -> dict:
    """{metric: mean and interval} over tasks: the mean of their means, and the Frechet distance of their
    union. scores: metrics [S, N] of each task; features: [S, N, D] of the pictures, and of the true ones."""
    # not-a-number depends on the scene alone, not on the seed
    found = {k: bootstrap(*(of_task[k].mean(0) for of_task in scores)) for k in scores[0]}
    return found | {"frechet": frechet_interval(*(np.concatenate(x, 1) for x in zip(*features)))}


####################################################################################################
# 3. Text to image: is what the caption says anywhere in the picture
####################################################################################################


@dataclass
class Prompts:
    """N captions of held-out scenes, and the facts that they name."""

    indices: list[int]
    truth: Tensor  # [N, 3, H, W] the scenes themselves
    caption: list[str]
    pictures: Tensor  # [N, 3] labels of PICTURE_HEADS, NOT_ASKED where the caption is silent
    which: Tensor  # [K] scene of a named object
    objects: Tensor  # [K, 4] labels of OBJECT_HEADS, NOT_ASKED where the caption is silent
    grid: Tensor  # [P, 4] boxes in which objects are looked for
    fine: Tensor  # [Q, 4] the same, closer to each other


def prompts(indices: list[int], size: int, source: dataset.Scenes) -> Prompts:
    """Captions of scenes `indices`. The shape and colour of an object count, its material where it is named,
    its size, place and number do not."""
    images, captions, pictures, which, objects = [], [], [], [], []
    for j, index in enumerate(indices):
        s, got = source.scene(index), source.load(index, size, size)
        text, labels = got["caption"], picture_labels(s)
        for kind, words in (("environment", ENVIRONMENT_WORDS), ("style", STYLE_WORDS)):
            if not any(word in text for word in words[getattr(s, kind)]):
                labels[list(PICTURE_HEADS).index(kind)] = NOT_ASKED
        for o in s.objects:
            if o.colour in text and o.shape in text:
                of_object = object_labels(o)
                if not any(word in text for word in MATERIAL_WORDS[o.material]):
                    of_object[list(OBJECT_HEADS).index("material")] = NOT_ASKED
                which.append(j)
                objects.append(of_object)
        images.append(got["image"])
        captions.append(text)
        pictures.append(labels)
    return Prompts(list(indices), to_float(np.stack(images)), captions, torch.tensor(pictures),
                   torch.tensor(which), torch.tensor(objects), places(size, source.level, 0.6),
                   places(size, source.level, 0.25))


def places(size: int, level: str, apart: float) -> Tensor:
    """Boxes [P, 4] that cover a square picture: each object size of the level, so many radii apart."""
    found = []
    for r in (draw.RADIUS[name] for name in draw.LEVELS[level].sizes):
        steps = np.linspace(r, 1 - r, 1 + math.ceil((1 - 2 * r) / (apart * r))).tolist()
        found += [object_box(x, y, r, size, size) for x in steps for y in steps]
    return torch.tensor(found)


@torch.inference_mode()
def plainly(x: Tensor, objects: Tensor, boxes: Tensor, net: Parser, part: int = 8) -> Tensor:
    """Whether the most conspicuous thing in each picture x [N, 3, S, S] has the shape and the colour of
    objects [N, 4] (labels), [N] bool: what the parser reads in the one of boxes [Q, 4] where it is surest of
    an object, of its shape and of its colour. No odd box counts: of 418 true pictures of single objects 99 %
    pass, and 2 % of other scenes'. part: pictures at a time."""
    device, Q, found = next(net.parameters()).device, len(boxes), []
    for images in x.split(part) if len(x) else ():  # nothing is split into one empty part
        which = torch.arange(len(images)).repeat_interleave(Q)
        said = net(images.to(device), which.to(device), boxes.repeat(len(images), 1).to(device))[1]
        said = {k: v.softmax(1).unflatten(0, (-1, Q)).cpu() for k, v in said.items()}        # [n, Q, labels]
        sure = said["object"][..., 1] * said["shape"].amax(2) * said["colour"].amax(2)       # [n, Q]
        here = sure.argmax(1)[:, None, None]
        found.append(torch.cat([said[k].take_along_dim(here, 1).argmax(2) for k in ("shape", "colour")], 1))
    kinds = [list(OBJECT_HEADS).index(k) for k in ("shape", "colour")]
    return (torch.cat(found) == objects[:, kinds]).all(1) if found else torch.zeros(0, dtype=torch.bool)


def judge_t2i(x: Tensor, p: Prompts, net: Parser) -> dict[str, np.ndarray]:
    """Metrics [N] of pictures x [N, 3, S, S] in [-1, 1] for the prompts, the share of what they name that is
    right: background, environment, style, objects (read with all named attributes in some box: a place of
    `places`), attributes (mean of these). What a box reads by accident counts: compare with the picture of
    another prompt. drawn: of prompts for a single object, whether the picture plainly shows its shape and its
    colour, see `plainly`."""
    grid = p.grid
    which = torch.arange(len(x)).repeat_interleave(len(grid))
    pictures, objects = read(x, which, grid.repeat(len(x), 1), net, part=8)
    objects = objects.view(len(x), len(grid), 4)
    out = {}
    for i, kind in enumerate(PICTURE_HEADS):
        ok = (pictures[:, i] == p.pictures[:, i]).double().numpy()
        out[kind] = np.where(p.pictures[:, i] == NOT_ASKED, math.nan, ok)
    wanted = p.objects[:, None]                                                              # [K, 1, 4]
    there = ((objects[p.which] == wanted) | (wanted == NOT_ASKED)).all(2).any(1)             # [K]
    total, count = (torch.zeros(len(x), dtype=torch.float64).index_add_(0, p.which, y.double())
                    for y in (there, torch.ones_like(there)))
    out["objects"] = torch.where(count > 0, total / count.clamp(min=1), math.nan).numpy()
    out["attributes"] = np.nanmean(np.stack(list(out.values())), 0)  # the background is always named
    single = torch.bincount(p.which, minlength=len(x)) == 1
    out["drawn"] = np.full(len(x), math.nan)
    seen = plainly(x[single], p.objects[single[p.which]], p.fine, net)
    out["drawn"][single.numpy()] = seen.double().numpy()
    return out
