"""Measures of edits as papers' tables have them, each with its backbone and preprocessing named beside it.

    1. Pixels: L1, L2, PSNR, SSIM     2. Sets: Frechet distance, KID
    3. Towers, from users' files      4. One row of a benchmark: pictures, texts, mask
    5. Names                          6. measure, describe, features_of_set

Names are those of the tables; what a name means differs between papers, so `describe` goes beside every
number. Against what a picture is held is part of the name: `l1` is against the target (MagicBrush),
`l1_source` against the source (Emu Edit, UltraEdit). Regions, by a mask of what was to be edited:
`psnr_unedited` is PIE-Bench's, which blackens the edited part of both pictures and divides by all pixels, so
that it rises with the mask; `psnr_outside` and `psnr_inside` divide by the pixels they look at.

Pictures are uint8 [H, W, 3] here, as they are in files: published preprocessing starts there. not-a-number
stands for "not defined for this row" (equal captions, nothing unedited), never for a bad result: leave such
rows out of the mean, and count them.

Networks run in float32 on every device (OpenAI's code: in float16 on a GPU). L1, L2, PSNR and SSIM of a pair
of 512x512 pixels together take 37 ms of one slow core, SSIM nearly all of it.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import rewards
from log import frechet
from pretrained.files import Device, read_json
from pretrained.perceptual import Inception, Lpips, load_inception, load_lpips
from pretrained.towers import (
    DINO_PREP,
    HPS_PREP,
    IMAGENET_MEAN,
    IMAGENET_STD,
    PICKSCORE_PREP,
    Clip,
    Dino,
    Prep,
    load_clip,
    load_dino,
    prepared,
)

####################################################################################################
# 1. Pixels: uint8 [H, W, 3], or float of range 1
####################################################################################################


def resized(picture: np.ndarray, like: np.ndarray) -> np.ndarray:
    """To the height and width of `like` by Pillow's bicubic filter, antialiased, in 8 bits (MagicBrush's
    `.resize`); as it is if it has them."""
    h, w = like.shape[:2]
    if picture.shape[:2] == (h, w):
        return picture
    return np.asarray(Image.fromarray(picture).resize((w, h), Image.Resampling.BICUBIC))


def error(a: np.ndarray, b: np.ndarray, power: int, where: np.ndarray | None = None) -> float:
    """Mean of |a - b|^power over channels and pixels (those of `where`, bool [H, W]; none: not-a-number), of
    a range of 1. Sums of 8-bit pictures are exact."""
    exact = a.dtype == b.dtype == np.uint8
    d = a.astype(np.int32 if exact else np.float64) - b
    if where is not None:
        d = d[where]
    if not d.size:
        return math.nan
    total = float((np.abs(d) if power == 1 else d * d).sum())
    return total / d.size / (255**power if exact else 1)


def decibels(mse: float) -> float:
    """PSNR of a range of 1; equal pictures: infinity."""
    return math.inf if mse == 0 else -10 * math.log10(mse)


def kept(picture: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Black where `keep`, bool [H, W], is False."""
    return picture * keep[..., None].astype(picture.dtype)


SSIM_SIDE, SSIM_SIGMA = 5, 1.5  # 11 taps
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # of a range of 1


def blurred(x: Tensor) -> Tensor:
    """Gaussian of 11 taps over both axes of [N, H, W], borders reflected (without the edge pixel twice)."""
    taps = [math.exp(-((k / SSIM_SIGMA) ** 2) / 2) for k in range(-SSIM_SIDE, SSIM_SIDE + 1)]
    taps = [t / sum(taps) for t in taps]
    x = F.pad(x[None], (SSIM_SIDE,) * 4, mode="reflect")[0]
    for axis in (1, 2):
        n = x.shape[axis] - 2 * SSIM_SIDE
        y = x.narrow(axis, SSIM_SIDE, n) * taps[SSIM_SIDE]
        for k in range(SSIM_SIDE):  # the taps are symmetric
            y.add_(x.narrow(axis, k, n) + x.narrow(axis, 2 * SSIM_SIDE - k, n), alpha=taps[k])
        x = y
    return x


def ssim(a: np.ndarray, b: np.ndarray, border: int = 0) -> float:
    """Structural similarity (Wang et al. 2004) of channels apart, then their mean: Gaussian window (sigma
    1.5), range 1, mean over the whole map with reflected borders, as torchmetrics >= 1.4.2 has it. border=5
    leaves its outermost pixels out, as torchmetrics did before and scikit-image does.

    Computed from the blurred sum s and difference d of the pictures: var a + var b = (var s + var d) / 2,
    cov = (var s - var d) / 4, so that equal pictures have exactly 1 in float32.
    """
    if min(a.shape[:2]) <= SSIM_SIDE:
        raise ValueError(f"ssim: pictures of {a.shape[1]}x{a.shape[0]} pixels: both sides need at least "
                         f"{SSIM_SIDE + 1}")
    scale = 1 / 255 if a.dtype == np.uint8 else 1.0
    a, b = (torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1))).float() * scale for x in (a, b))
    total = 0.0
    for x, y in zip(a, b):  # a channel at a time stays in the cache
        s, d = x + y - 1, x - y  # around 0, which keeps the digits of the variances
        s, d, ss, dd = blurred(torch.stack([s, d, s * s, d * d]))
        vs, vd = ss - s * s, dd - d * d
        s = (s + 1).square_()
        d = d.square_()
        found = ((s - d) / 2 + SSIM_C1) * ((vs - vd) / 2 + SSIM_C2)
        found /= ((s + d) / 2 + SSIM_C1) * ((vs + vd) / 2 + SSIM_C2)
        h, w = found.shape
        total += found[border:h - border, border:w - border].mean(dtype=torch.float64).item()
    return total / len(a)


####################################################################################################
# 2. Sets
####################################################################################################


def check_sets(name: str, a: np.ndarray, b: np.ndarray) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"{name}: features {list(a.shape)} and {list(b.shape)}: both sets need at least 2 "
                         "rows, of one width")


def fid(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of two sets of features [N, D]; of `features_of_set("fid", ...)` it is clean-fid's
    FID, of "clip_fid" its CLIP-FID. Name N of both sets with it: below about 10,000 it is mostly bias."""
    check_sets("fid", a, b)
    return frechet(a, b)


def kid_subsets(a: np.ndarray, b: np.ndarray, subsets: int = 100, size: int = 1000,
                seed: int = 0) -> np.ndarray:
    """Kernel distances (Binkowski et al. 2018) [subsets] between random subsets of features a, b [N, D]:
    unbiased squared MMD with the kernel (x.y / D + 1)^3, so a distance may be negative. Print 1,000 times
    their mean, and their spread."""
    check_sets("kid", a, b)
    if subsets < 1 or size < 2:
        raise ValueError(f"kid: {subsets} subsets of {size}: use at least 1 of at least 2")
    a, b = (torch.from_numpy(np.asarray(x, np.float64)) for x in (a, b))
    rng, m, out = np.random.default_rng(seed), min(len(a), len(b), size), []

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    for _ in range(subsets):
        x, y = (s[torch.from_numpy(rng.choice(len(s), m, replace=False))] for s in (a, b))
        within = sum(k.sum() - k.trace() for k in (kernel(x, x), kernel(y, y))) / (m * (m - 1))
        out.append((within - 2 * kernel(x, y).mean()).item())
    return np.array(out)


def kid(a: np.ndarray, b: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 0) -> float:
    """Mean of `kid_subsets`: 100 subsets of at most 1,000, as clean-fid has it (there without a seed)."""
    return float(kid_subsets(a, b, subsets, size, seed).mean())


####################################################################################################
# 3. Towers
####################################################################################################


@dataclass
class Towers:
    """Networks that measures look with; None: no file was given. about: flag -> its backbone and weights."""

    clip: Clip | None = None  # OpenAI's ViT-B/32 in the tables of MagicBrush, UltraEdit
    clip_large: Clip | None = None  # OpenAI's ViT-L/14 in PIE-Bench, ImageReward's code
    dino: Dino | None = None  # dino_vits16
    dino_keys: Dino | None = None  # dino_vitb8
    lpips: Lpips | None = None  # AlexNet; SqueezeNet in PIE-Bench
    blip: rewards.Blip | None = None
    image_reward: rewards.PreferenceReward | None = None
    pick_score: Clip | None = None
    hps: Clip | None = None
    inception: Inception | None = None
    device: Device = "cpu"
    about: dict[str, dict] = field(default_factory=dict)


WANTED = {  # flag -> what to give there, for error lines
    "clip": "OpenAI's CLIP ViT-B/32: a folder of transformers', or WEIGHTS,TOKENIZER",
    "clip_large": "OpenAI's CLIP ViT-L/14: a folder of transformers', or WEIGHTS,TOKENIZER",
    "dino": "dino_vits16: its .pth, or transformers' folder",
    "dino_keys": "dino_vitb8: its .pth, or transformers' folder",
    "lpips": "BACKBONE,HEADS: torchvision's AlexNet, VGG16 or SqueezeNet 1.1, and LPIPS's v0.1 .pth of it",
    "blip": "BLIP for retrieval: transformers' folder, or model_base_retrieval_coco.pth,vocab.txt",
    "image_reward": "ImageReward.pt,vocab.txt",
    "pick_score": "PickScore_v1: a folder of transformers', or WEIGHTS,TOKENIZER",
    "hps": "HPS_v2.1_compressed.pt,TOKENIZER (or HPS_v2's)",
    "inception": "pt_inception-2015-12-05-6726825d.pth of pytorch-fid"}
CLIPS = {(768, 32): "ViT-B/32", (768, 16): "ViT-B/16", (1024, 14): "ViT-L/14", (1280, 14): "ViT-H/14",
         (1408, 14): "ViT-g/14", (1664, 14): "ViT-bigG/14"}
DINOS = {(384, 16): "dino_vits16", (384, 8): "dino_vits8", (768, 16): "dino_vitb16", (768, 8): "dino_vitb8"}


def split(spec: str, words: str) -> tuple[str, str | None]:
    """"WEIGHTS,SECOND", or a folder with both -> weights, second path (None: not given). words: the file
    of the second kind that such a folder has."""
    if Path(spec).exists():
        return spec, spec if (Path(spec) / words).is_file() else None
    first, _, second = spec.partition(",")
    return first, second or None


def fingerprint(path: str) -> str:
    """Names of the files of weights, each with the first 12 digits of its SHA-256."""
    root = Path(path)
    files = [root]
    if root.is_dir():
        files = [f for f in (root / "model.safetensors", root / "model.fp16.safetensors") if f.is_file()][:1]
        files = files or sorted(root.glob("*.safetensors"))
    out = []
    for file in files:
        with open(file, "rb") as f:
            name = f"{root.name}/{file.name}" if root.is_dir() else file.name
            out.append(f"{name} {hashlib.file_digest(f, 'sha256').hexdigest()[:12]}")
    return ", ".join(out)


def open_clip(spec: str, quick_gelu: bool, prep: Prep, device: Device) -> tuple[Clip, str]:
    """-> the network, and its backbone in words. Which GELU it has is read from config.json if there is one,
    else as asked. Without vocab.json and merges.txt it reads pictures only."""
    path, tokenizer = split(spec, "vocab.json")
    if (config := Path(path) / "config.json").is_file():
        vision = read_json(config).get("vision_config")
        act = vision.get("hidden_act", "quick_gelu") if isinstance(vision, dict) else "quick_gelu"
        quick_gelu = act == "quick_gelu"  # which transformers leaves out of the file: it is its default
    clip = load_clip(path, tokenizer, quick_gelu, prep, device=device)
    kernel = clip.vision.vision_model["embeddings"].patch_embedding
    size = kernel.out_channels, kernel.kernel_size[0]
    name = CLIPS.get(size, f"ViT of width {size[0]}, patches of {size[1]}")
    return clip, f"CLIP {name}, {'quick-GELU' if quick_gelu else 'GELU'}"


def open_dino(spec: str, device: Device) -> tuple[Dino, str]:
    net = load_dino(spec, device=device)
    kernel = net.patch_embed.proj
    size = kernel.out_channels, kernel.kernel_size[0]
    name = DINOS.get(size, f"DINO ViT of width {size[0]}, patches of {size[1]}")
    return net, f"DINOv2 {size[0]}/{size[1]}" if hasattr(net.blocks[0], "ls1") else name


def open_lpips(spec: str, device: Device) -> tuple[Lpips, str]:
    net = load_lpips(*split(spec, ""), device)
    return net, {"alex": "AlexNet", "vgg": "VGG16", "squeeze": "SqueezeNet 1.1"}[net.kind] + ", LPIPS v0.1"


def bert_words(spec: str, flag: str) -> tuple[str, str]:
    path, vocab = split(spec, "vocab.txt")
    if vocab is None:
        raise SystemExit(f"error: {spec}: no vocab.txt with it: give {WANTED[flag]}")
    return path, str(Path(vocab) / "vocab.txt") if Path(vocab).is_dir() else vocab


def open_blip(spec: str, device: Device) -> tuple[rewards.Blip, str]:
    net = rewards.load_blip(*bert_words(spec, "blip"), device=device)
    return net, f"BLIP ViT of width {net.cfg.vit_width}, patches of {net.cfg.patch}"


def open_image_reward(spec: str, device: Device) -> tuple[rewards.PreferenceReward, str]:
    net = rewards.load_imagereward(*bert_words(spec, "image_reward"), device=device)
    return net, f"ImageReward, BLIP ViT of width {net.cfg.vit_width}, patches of {net.cfg.patch}"


def open_inception(spec: str, device: Device) -> tuple[Inception, str]:
    return load_inception(spec, device), "Inception of 2015-12-05, 2,048 features"


OPENERS: dict[str, Callable] = {
    "clip": partial(open_clip, quick_gelu=True, prep=Prep()),
    "clip_large": partial(open_clip, quick_gelu=True, prep=Prep()),
    "dino": open_dino, "dino_keys": open_dino, "lpips": open_lpips, "blip": open_blip,
    "image_reward": open_image_reward,
    "pick_score": partial(open_clip, quick_gelu=False, prep=PICKSCORE_PREP),
    "hps": partial(open_clip, quick_gelu=False, prep=HPS_PREP),
    "inception": open_inception}


def open_towers(clip: str | None = None, clip_large: str | None = None, dino: str | None = None,
                dino_keys: str | None = None, lpips: str | None = None, blip: str | None = None,
                image_reward: str | None = None, pick_score: str | None = None, hps: str | None = None,
                inception: str | None = None, device: Device = "cpu") -> Towers:
    """Frozen networks, in float32, of the files and folders that are given (see WANTED). SystemExit that
    names the flag and the file where one cannot be read."""
    given = {"clip": clip, "clip_large": clip_large, "dino": dino, "dino_keys": dino_keys, "lpips": lpips,
             "blip": blip, "image_reward": image_reward, "pick_score": pick_score, "hps": hps,
             "inception": inception}
    towers = Towers(device=device)
    for flag, spec in given.items():
        if not spec:
            continue
        try:
            net, backbone = OPENERS[flag](spec, device=device)
        except SystemExit as e:
            raise SystemExit(str(e).replace("error: ", f"error: --{flag}: ", 1)) from None
        setattr(towers, flag, net)
        paths = [spec] if Path(spec).exists() else spec.split(",")[:1 + (flag == "lpips")]
        towers.about[flag] = {"backbone": backbone, "weights": ", ".join(map(fingerprint, paths))}
    return towers


####################################################################################################
# 4. One row
####################################################################################################


@dataclass
class Row:
    """What is known of one edit. Embeddings are made once for all measures that ask for them."""

    towers: Towers
    pictures: dict[str, np.ndarray]  # "result", perhaps "source", "target"
    texts: dict[str, str]  # perhaps "source_text", "target_text"
    mask: np.ndarray | None  # bool [H, W], True = to be edited
    made: dict = field(default_factory=dict)

    def once(self, key: tuple, make: Callable):
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def pair(self, against: str) -> tuple[np.ndarray, np.ndarray]:
        """The result at the size of what it is held against, and that."""
        like = self.pictures[against]
        return self.once(("pair", against), lambda: resized(self.pictures["result"], like)), like

    def region(self, against: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        a, b = self.pair(against)
        if self.mask.shape != b.shape[:2]:
            raise ValueError(f"mask: {self.mask.shape[1]}x{self.mask.shape[0]} pixels, but the {against} has "
                             f"{b.shape[1]}x{b.shape[0]}: give the mask of that picture")
        return a, b, self.mask

    def pil(self, which: str) -> Image.Image:
        if which != "edited part":
            return Image.fromarray(self.pictures[which])
        picture = resized(self.pictures["result"], self.mask)
        return Image.fromarray(kept(picture, self.mask))

    def image(self, flag: str, which: str = "result", **change) -> Tensor:
        """Embedding [E] of unit length by a CLIP. change: of its preparation of pictures."""
        clip = getattr(self.towers, flag)
        prep = replace(clip.prep, **change)

        def make():
            x = prepared([self.pil(which)], prep, clip.logit_scale.device)
            return F.normalize(clip.vision(x).float(), dim=-1)[0]

        return self.once((flag, which, prep), make)

    def text(self, flag: str, which: str, prefix: str = "") -> Tensor:
        caption = prefix + self.texts[which]
        return self.once((flag, "text", caption), lambda: getattr(self.towers, flag).text([caption])[0])

    def cosine(self, flag: str, which: str = "target_text", prefix: str = "", picture: str = "result",
               **change) -> float:
        return (self.image(flag, picture, **change) @ self.text(flag, which, prefix)).item()

    def cls(self, which: str) -> Tensor:
        """DINO's [CLS] output [D]."""
        net = self.towers.dino

        def make():
            return net(prepared([self.pil(which)], DINO_PREP, net.cls_token.device))[0, 0]

        return self.once(("dino", which), make)

    def blip_tokens(self) -> Tensor:
        return self.once(("blip",), lambda: self.towers.blip.tokens([self.pil("result")]))


def as_tensor(picture: np.ndarray, device: Device) -> Tensor:
    """uint8 [H, W, 3] -> float [1, 3, H, W], 0 to 255."""
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))[None].to(device).float()


def lpips_of(row: Row, a: np.ndarray, b: np.ndarray) -> float:
    if min(a.shape[:2]) < 32:
        raise ValueError(f"lpips: pictures of {a.shape[1]}x{a.shape[0]} pixels: both sides need at least 32")
    a, b = (as_tensor(x, row.towers.device) / 127.5 - 1 for x in (a, b))
    return row.towers.lpips(a, b).item()


def structure_prepared(picture: np.ndarray, device: Device) -> Tensor:
    """As PIE-Bench's code feeds DINO: 0 to 255, never divided by 255, short side to 224 (the long one at most
    480; bilinear, antialiased as by torchvision >= 0.17), then ImageNet's mean and standard deviation."""
    x = as_tensor(picture, device)
    h, w = x.shape[-2:]
    short, long = 224, int(224 * max(h, w) / min(h, w))
    if long > 480:
        short, long = int(480 * short / long), 480
    size = (short, long) if h <= w else (long, short)
    if size != (h, w):
        x = F.interpolate(x, size, mode="bilinear", antialias=True)
    mean, std = (x.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


def structure_distance(a: Tensor, b: Tensor) -> float:
    """Keys of all tokens, [L, D] each -> mean squared difference of their matrices of cosines [L, L]."""
    def cosines(k):
        norms = k.norm(dim=1, keepdim=True)
        return k @ k.T / (norms @ norms.T).clamp(min=1e-8)

    return F.mse_loss(cosines(a), cosines(b)).item()


def structure_of(row: Row) -> float:
    net = row.towers.dino_keys
    return structure_distance(*(net.keys(structure_prepared(x, row.towers.device))[0]
                                for x in row.pair("source")))


def unedited(row: Row, score: Callable) -> float:
    """PIE-Bench: the plain measure of result and source, both black where the mask is."""
    a, b, mask = row.region("source")
    if mask.all():
        return math.nan
    return score(kept(a, ~mask), kept(b, ~mask))


def edited_score(row: Row) -> float:
    if not row.mask.any():
        return math.nan
    return 100 * max(row.cosine("clip_large", picture="edited part", half_even=False), 0.0)


def direction_of(row: Row) -> float:
    parts = [row.image("clip", "source"), row.image("clip"), row.text("clip", "source_text"),
             row.text("clip", "target_text")]
    return rewards.direction(*(x[None] for x in parts)).item()


####################################################################################################
# 5. Names
####################################################################################################


@dataclass(frozen=True)
class Measure:
    definition: str
    range: str
    needs: tuple[str, ...]  # arguments of measure() beside the result
    score: Callable[[Row], float] | None  # None: of sets
    tower: str | None = None
    prep: str = ""  # what the tower does not tell

    @property
    def against(self) -> str:
        return ", ".join(k for k in self.needs if k != "mask") or "a set of references"


CLEAN = ("each channel in float, squashed to 299x299 (Pillow bicubic, antialiased, unrounded), cut to "
         "0..255, (x - 128) / 128")
DOWN, UP = "lower is better", "higher is better"
UNIT, COSINE, DISTANCE = f"0 to 1, {DOWN}", f"-1 to 1, {UP}", f"0 and up, {DOWN}"
DECIBELS = f"decibels, equal pictures infinity, {UP}"
RESIZED = "result resized to the other picture's size where it differs (Pillow bicubic, antialiased, 8 bits)"
TO_LPIPS = RESIZED + ", then RGB in [-1, 1], no other resizing"
PIXELS = {  # name: power of the difference, what is said of its mean, words, range
    "l1": (1, float, "mean |difference| of RGB in [0, 1]", UNIT),
    "l2": (2, float, "mean squared difference of RGB in [0, 1], no root", UNIT),
    "psnr": (2, decibels, "-10 log10 of the mean squared difference of RGB in [0, 1]", DECIBELS)}


def pixels_of(row: Row, base: str, region: str, against: str) -> float:
    power, say, *_ = PIXELS[base]
    if not region:
        return say(error(*row.pair(against), power))
    a, b, mask = row.region(against)
    return say(error(a, b, power, mask if region == "inside" else ~mask))


def pair_measures(against: str) -> dict[str, Measure]:
    """What the result can be held against the target for (the plain names), or against the source. Only
    outside of the mask the plain name is against the source, which is what should be there."""
    out, held = {}, f"result against {against}"
    tail = "" if against == "target" else "_source"
    for base, (_, _, words, span) in PIXELS.items():
        for region, where in (("", "all pixels"), ("inside", "the edited pixels only"),
                              ("outside", "the unedited pixels only")):
            end = {"target": "_target", "source": ""}[against] if region == "outside" else tail
            name = "_".join(filter(None, (base, region))) + end
            out[name] = Measure(f"{words}, over {where}, {held}", span, (against, *["mask"] * bool(region)),
                                partial(pixels_of, base=base, region=region, against=against), None, RESIZED)
    out["ssim" + tail] = Measure(
        "structural similarity, Gaussian window of sigma 1.5, channels apart, whole map, borders reflected "
        f"(torchmetrics >= 1.4.2), {held}", COSINE, (against,),
        lambda r: ssim(*r.pair(against)), None, RESIZED)
    out["lpips" + tail] = Measure(f"LPIPS v0.1, {held} (tables: AlexNet)", DISTANCE, (against,),
                                  lambda r: lpips_of(r, *r.pair(against)), "lpips", TO_LPIPS)
    papers = "MagicBrush" if against == "target" else "Emu Edit, UltraEdit"
    out["clip_i" + tail] = Measure(
        f"cosine of CLIP's image embeddings, {held} ({papers}: ViT-B/32)", COSINE, (against,),
        lambda r: (r.image("clip") @ r.image("clip", against)).item(), "clip")
    out["dino" + tail] = Measure(
        f"cosine of DINO's [CLS] outputs, {held} ({papers}: dino_vits16)", COSINE, (against,),
        lambda r: F.cosine_similarity(r.cls("result"), r.cls(against), dim=0).item(), "dino")
    return out


HALF = "a crop's half pixel rounds down, as transformers' does"
BLACK = "result and source, edited part of both black, then over all pixels (PIE-Bench)"
UNEDITED, TEXT = ("source", "mask"), ("target_text",)

MEASURES: dict[str, Measure] = {
    **pair_measures("target"),
    **pair_measures("source"),
    # PIE-Bench
    "l2_unedited": Measure(f"mean squared difference of {BLACK}", UNIT, UNEDITED,
                           lambda r: unedited(r, lambda a, b: error(a, b, 2)), None, RESIZED),
    "psnr_unedited": Measure(f"PSNR of {BLACK}", DECIBELS, UNEDITED,
                             lambda r: unedited(r, lambda a, b: decibels(error(a, b, 2))), None, RESIZED),
    "ssim_unedited": Measure(f"SSIM (as ssim) of {BLACK}", COSINE, UNEDITED,
                             lambda r: unedited(r, ssim), None, RESIZED),
    "lpips_unedited": Measure(f"LPIPS v0.1 of {BLACK}, there SqueezeNet", DISTANCE, UNEDITED,
                              lambda r: unedited(r, partial(lpips_of, r)), "lpips", TO_LPIPS),
    "structure": Measure(
        "mean squared difference of the matrices of cosines of DINO's last keys, all tokens, result and "
        "source (PIE-Bench: dino_vitb8, printed x 1,000)", DISTANCE, ("source",), structure_of, "dino_keys",
        RESIZED + "; short side to 224 (bilinear on the tensor, antialiased); values of 0 to 255 less "
        "ImageNet's mean, over its standard deviation, as PIE-Bench's code has it"),
    "clip_score": Measure(
        "100 max(cos, 0) of result and target text (PIE-Bench \"whole\": ViT-L/14; torchmetrics' of "
        "one picture)", f"0 to 100, {UP}", TEXT,
        lambda r: 100 * max(r.cosine("clip_large", half_even=False), 0.0), "clip_large", HALF),
    "clip_edited": Measure(
        "clip_score of the result, black outside the edited part (PIE-Bench \"edited\": ViT-L/14)",
        f"0 to 100, {UP}", ("target_text", "mask"), edited_score, "clip_large", HALF),
    # a text and a picture
    "clip_t": Measure("cosine of result and the target's local description (MagicBrush CLIP-T: ViT-B/32)",
                      COSINE, TEXT, lambda r: r.cosine("clip"), "clip"),
    "clip_out": Measure("cosine of result and output caption (Emu Edit, UltraEdit CLIPout: ViT-B/32)",
                        COSINE, TEXT, lambda r: r.cosine("clip"), "clip"),
    "clip_dir": Measure(
        "cosine of result - source and output - input caption, embeddings of unit length (Emu Edit, "
        "UltraEdit CLIPdir: ViT-B/32); not defined for equal captions; an edit that changed nothing has 0",
        COSINE, ("source", "source_text", "target_text"), direction_of, "clip"),
    "clip_score_hessel": Measure(
        "2.5 max(cos, 0), \"A photo depicts \" before the text (Hessel et al. 2021: ViT-B/32)",
        f"0 to 2.5, {UP}", TEXT,
        lambda r: 2.5 * max(r.cosine("clip", prefix="A photo depicts "), 0.0), "clip"),
    "clip_cosine": Measure(
        "cosine of result and target text (\"CLIPScore\" of ImageReward's code: ViT-L/14; ByteEdit's .24 to "
        ".33 are on this scale)", COSINE, TEXT, lambda r: r.cosine("clip_large"), "clip_large"),
    "blip_itc": Measure(
        "cosine of BLIP's projected features, the text read alone (ITC; ByteEdit's BLIPScore is this or "
        "blip_itm)",
        COSINE, TEXT, lambda r: r.towers.blip.itc(r.blip_tokens(), [r.texts["target_text"]]).item(), "blip"),
    "blip_itm": Measure(
        "probability of a match by BLIP's two-way head (ITM; ByteEdit's BLIPScore is this or blip_itc)",
        f"0 to 1, {UP}", TEXT,
        lambda r: r.towers.blip.itm(r.blip_tokens(), [r.texts["target_text"]]).item(), "blip"),
    "image_reward": Measure(
        "ImageReward, (r - 0.167) / 1.033; does not see the source", f"about -2 to 2, {UP}", TEXT,
        lambda r: rewards.imagereward(r.towers.image_reward, [r.pil("result")],
                                      [r.texts["target_text"]]).item(), "image_reward"),
    "pick_score": Measure(
        "PickScore, exp(logit_scale) cos; does not see the source", f"about 18 to 24, {UP}", TEXT,
        lambda r: r.towers.pick_score.logit_scale.exp().item() * r.cosine("pick_score"), "pick_score"),
    "hps_v2": Measure(
        "HPSv2, plain cosine (its benchmark prints 100 times this), v2 or v2.1 as the weights are; does not "
        "see the source", f"about 0.2 to 0.35, {UP}", TEXT, lambda r: r.cosine("hps"), "hps"),
    # sets
    "fid": Measure("Frechet distance of Inception features (clean-fid); state N of both sets",
                   DISTANCE, (), None, "inception", CLEAN),
    "kid": Measure("mean of the unbiased MMD^2 of subsets of Inception features, kernel (x.y / d + 1)^3 "
                   "(clean-fid), printed x 1,000", f"about 0 and up, may be negative, {DOWN}",
                   (), None, "inception", CLEAN),
    "clip_fid": Measure("Frechet distance of CLIP's image embeddings, not of unit length (clean-fid: "
                        "ViT-B/32); state N of both sets", DISTANCE, (), None, "clip")}
NAMES: dict[str, str] = {name: m.definition for name, m in MEASURES.items()}
SETS = tuple(name for name, m in MEASURES.items() if m.score is None)

####################################################################################################
# 6. What callers use
####################################################################################################


def check_names(names: Iterable[str], towers: Towers) -> list[str]:
    """The names, once each, in their order; ValueError of one line that names the flag of what is missing."""
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in MEASURES:
            raise ValueError(f"{name!r} is no measure: use names of {', '.join(NAMES)}")
        m = MEASURES[name]
        if m.tower and getattr(towers, m.tower) is None:
            raise ValueError(f"--{m.tower}: {name} needs it: give {WANTED[m.tower]}")
        if m.tower and "text" in m.against and getattr(getattr(towers, m.tower), "tokenizer", None) is None:
            raise ValueError(f"--{m.tower}: {name} reads captions, and no tokenizer is there: give "
                             f"{WANTED[m.tower]}")
    return names


def check_picture(name: str, x: np.ndarray | None) -> None:
    if x is not None and (not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 3
                          or x.shape[2] != 3 or not x.size):
        raise ValueError(f"{name}: {getattr(x, 'dtype', type(x).__name__)} {list(np.shape(x))}: give uint8 "
                         "[H, W, 3]")


@torch.no_grad()
def measure(names: Iterable[str], towers: Towers, *, result: np.ndarray, source: np.ndarray | None = None,
            target: np.ndarray | None = None, source_text: str | None = None, target_text: str | None = None,
            mask: np.ndarray | None = None) -> dict[str, float]:
    """Measures of one edit by name; not-a-number: not defined for this row, infinity: PSNR of equal pictures.

    Pictures uint8 [H, W, 3] of any sizes; mask bool [H, W], True = to be edited, at the size of what the
    result is held against; for PIE-Bench with its border of ones, and texts without their brackets.
    """
    names = check_names(names, towers)
    if sets := [n for n in names if n in SETS]:
        raise ValueError(f"{sets[0]} is of sets of pictures: use features_of_set")
    given = {"source": source, "target": target, "source_text": source_text, "target_text": target_text,
             "mask": mask}
    for name in names:
        if lacking := [k for k in MEASURES[name].needs if given[k] is None]:
            raise ValueError(f"{name}: needs {' and '.join(lacking)}, which this row has not")
    pictures = {"result": result, "source": source, "target": target}
    for k, x in pictures.items():
        check_picture(k, x)
    if mask is not None and (mask.dtype != bool or mask.ndim != 2 or not mask.size):
        raise ValueError(f"mask: {mask.dtype} {list(mask.shape)}: give bool [H, W], True = to be edited")
    row = Row(towers, {k: x for k, x in pictures.items() if x is not None},
              {k: given[k] for k in ("source_text", "target_text") if given[k] is not None}, mask)
    return {name: float(MEASURES[name].score(row)) for name in names}


def preparation(m: Measure, towers: Towers) -> str:
    """How pictures and texts reach the network, or the difference."""
    net = getattr(towers, m.tower) if m.tower else None
    prep = DINO_PREP if m.tower == "dino" else getattr(net, "prep", None)
    if m.tower == "image_reward":
        prep = Prep(net.cfg.image_size, net.cfg.image_size)
    words = []
    if prep:
        fit = {"crop": f"short side to {prep.short}, centre {prep.size}x{prep.size} cut out",
               "pad": f"long side to {prep.size}, padded with black to a square",
               "square": f"squashed to {prep.size}x{prep.size}"}[prep.fit]
        how = "bicubic on the tensor" if prep.tensor else "Pillow bicubic, 8 bits"
        whose = "ImageNet's" if prep.mean == IMAGENET_MEAN else "CLIP's"
        words.append(f"{fit} ({how}, antialiased), {whose} mean and standard deviation")
    if m.prep:
        words.append(m.prep)
    if net is not None and "text" in m.against:
        words.append(f"text cut to {net.tokenizer.truncation['max_length']} tokens")
    return "; ".join(words)


def describe(names: Iterable[str], towers: Towers) -> dict[str, dict]:
    """To be stored beside the numbers: {name: {definition, backbone, weights, preprocessing, against,
    range}}."""
    out = {}
    for name in check_names(names, towers):
        m = MEASURES[name]
        about = towers.about.get(m.tower, {"backbone": "none", "weights": "none"})
        out[name] = {"definition": m.definition, **about, "preprocessing": preparation(m, towers),
                     "against": m.against, "range": m.range}
    return out


def clean_resized(picture: np.ndarray, side: int = 299) -> np.ndarray:
    """clean-fid's: uint8 [H, W, 3] -> float32 [side, side, 3], each channel by Pillow in float, not rounded,
    cut to 0..255. (A picture that has the size already goes through the filter, too, which changes nothing.)
    """
    channels = [np.asarray(Image.fromarray(picture[..., k].astype(np.float32)).resize(
        (side, side), Image.Resampling.BICUBIC)) for k in range(3)]
    return np.stack(channels, -1).clip(0, 255)


@torch.no_grad()
def features_of_set(name: str, pictures: Iterable[np.ndarray], towers: Towers,
                    batch_size: int = 32) -> np.ndarray:
    """Pictures uint8 [H, W, 3] of any sizes, one at a time from any iterator -> float32 [N, D], what `fid`
    and `kid` take. name: "fid" or "kid" (Inception, 2,048 wide) or "clip_fid" (CLIP, not of unit length)."""
    check_names([name], towers)
    if name not in SETS:
        raise ValueError(f"{name} is of single pictures: use measure")
    out, batch = [], []

    def flush():
        if not batch:
            return
        if name == "clip_fid":
            x = prepared(batch, towers.clip.prep, towers.clip.logit_scale.device)
            out.append(towers.clip.vision(x).float().cpu().numpy())
        else:
            x = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).to(towers.device)
            out.append(towers.inception((x - 128) / 128).cpu().numpy())
        batch.clear()

    for picture in pictures:
        check_picture(name, picture)
        batch.append(Image.fromarray(picture) if name == "clip_fid" else clean_resized(picture))
        if len(batch) == batch_size:
            flush()
    flush()
    if not out:
        raise ValueError(f"{name}: no pictures: give at least 2")
    return np.concatenate(out)
