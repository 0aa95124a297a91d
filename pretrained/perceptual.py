"""Published convolutional networks that measures are made of: LPIPS, and the Inception of FID.

    1. LPIPS (Zhang et al. 2018), version 0.1, over torchvision's AlexNet, VGG16 or SqueezeNet 1.1
    2. Inception of 2015-12-05 (Szegedy et al. 2016) as FID uses it, under torchvision's names

Read from the files in which they are published, as everything in this folder is; frozen, in float32.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from pretrained.files import Device, Weights, fill, read_weights, shape_of

####################################################################################################
# 1. LPIPS
####################################################################################################

LPIPS_SHIFT, LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pictures in [-1, 1]
LPIPS_TAPS = {  # backbone -> where features are taken, and how many channels they have there
    "alex": {1: 64, 4: 192, 7: 384, 9: 256, 11: 256},
    "vgg": {3: 64, 8: 128, 15: 256, 22: 512, 29: 512},
    "squeeze": {1: 64, 4: 128, 7: 256, 9: 384, 10: 384, 11: 512, 12: 512}}


class Fire(nn.Module):
    """SqueezeNet's block: 1x1 down to `squeeze`, then 1x1 and 3x3 side by side."""

    def __init__(self, width: int, squeeze: int, expand: int):
        super().__init__()
        self.squeeze = nn.Conv2d(width, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


def lpips_backbone(kind: str) -> nn.Sequential:
    """torchvision's `features` up to the last tap; the place of a layer is its name there."""
    def conv(a, b, k=3, stride=1):
        return nn.Conv2d(a, b, k, stride, k // 2 if stride == 1 else 2)

    if kind == "alex":
        pool = nn.MaxPool2d(3, 2)
        return nn.Sequential(conv(3, 64, 11, 4), nn.ReLU(), pool, conv(64, 192, 5), nn.ReLU(), pool,
                             conv(192, 384), nn.ReLU(), conv(384, 256), nn.ReLU(), conv(256, 256), nn.ReLU())
    if kind == "squeeze":
        pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        return nn.Sequential(nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool, Fire(64, 16, 64), Fire(128, 16, 64),
                             pool, Fire(128, 32, 128), Fire(256, 32, 128), pool, Fire(256, 48, 192),
                             Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256))
    layers, width = [], 3
    for out in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
        layers += [conv(width, out), nn.ReLU()] if out else [nn.MaxPool2d(2)]
        width = out or width
    return nn.Sequential(*layers)


def lpips_layer(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Features a, b [B, C, h, w] and weights [C] -> [B]: of unit length over channels (eps 1e-10 after the
    root, so that places without features are zeros), squared difference, weighted sum, mean over places."""
    a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
    return ((a - b).square() * weight[:, None, None]).sum(1).mean((1, 2))


class Lpips(nn.Module):
    """Distance of two pictures, 0 for equal ones; it depends on their resolution."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.features = lpips_backbone(kind)
        self.lins = nn.ParameterList(torch.zeros(1, c, 1, 1) for c in LPIPS_TAPS[kind].values())

    def maps(self, image: Tensor) -> list[Tensor]:
        shift, scale = (image.new_tensor(v)[:, None, None] for v in (LPIPS_SHIFT, LPIPS_SCALE))
        x, out = (image - shift) / scale, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in LPIPS_TAPS[self.kind]:
                out.append(x)
        return out

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b [B, 3, H, W] in [-1, 1], sides at least 32 -> [B]."""
        maps = zip(self.maps(a), self.maps(b), self.lins)
        return sum(lpips_layer(x, y, lin[0, :, 0, 0]) for x, y, lin in maps)


def lpips_names(weights: Weights) -> Weights:
    """torchvision's backbones, LPIPS's linear layers (lin0.model.1.weight) and whole state dicts of the lpips
    package (net.slice1.0.weight) or torchmetrics (net.slices.0.0.weight) -> our names."""
    out = {}
    for name, v in weights.items():
        parts = name.split(".")
        if parts[0] == "features":
            out[name] = v
        elif parts[0] == "net":  # the layer keeps torchvision's number inside its slice
            at = 3 if parts[1] == "slices" else 2
            out[".".join(["features", *parts[at:]])] = v
        elif parts[0].startswith("lin") and parts[0][3:].isdigit():
            out[f"lins.{parts[0][3:]}"] = v
    return out


def load_lpips(backbone: str, heads: str | None = None, device: Device = "cpu") -> Lpips:
    """LPIPS from torchvision's file of a backbone and the package's weights/v0.1/{alex,vgg,squeeze}.pth, or
    from one file with both. Which backbone it is shows in its shapes."""
    weights = lpips_names(read_weights(backbone))
    if heads:
        own = {k: v for k, v in lpips_names(read_weights(heads)).items() if k.startswith("lins.")}
        weights = {k: v for k, v in weights.items() if k.startswith("features.")} | own
    side = shape_of(weights, "features.0.weight", backbone, "backbone of LPIPS", 4)[-1]
    kind = "alex" if side == 11 else "squeeze" if "features.3.squeeze.weight" in weights else "vgg"
    with torch.device("meta"):
        net = Lpips(kind)
    return fill(net, weights, f"{backbone},{heads}" if heads else backbone, f"LPIPS ({kind})", torch.float32,
                device)


####################################################################################################
# 2. Inception
####################################################################################################


class Norm(nn.Module):
    """Batch normalisation with the statistics that the file has, eps 1e-3."""

    def __init__(self, width: int):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_parameter(name, nn.Parameter(torch.ones(width)))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-3)


class ConvNorm(nn.Module):
    """pad None: as much as keeps the size."""

    def __init__(self, a: int, b: int, kernel: int | tuple[int, int] = 1, stride: int = 1,
                 pad: int | None = None):
        super().__init__()
        kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        pad = tuple(k // 2 for k in kernel) if pad is None else pad
        self.conv = nn.Conv2d(a, b, kernel, stride, pad, bias=False)
        self.bn = Norm(b)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


POOLS = {"avg": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),  # TensorFlow's mean
         "max": lambda x: F.max_pool2d(x, 3, 1, 1),
         "half": lambda x: F.max_pool2d(x, 3, 2)}


class Mixed(nn.Module):
    """Branches side by side. paths: of each branch the names of its layers (or of a pool) one after another;
    a tuple of names is a fork at its end."""

    def __init__(self, layers: dict[str, tuple], paths: list[list]):
        super().__init__()
        self.paths = paths
        for name, sizes in layers.items():
            self.add_module(name, ConvNorm(*sizes))

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for path in self.paths:
            y = x
            for step in path:
                if isinstance(step, tuple):
                    y = torch.cat([getattr(self, name)(y) for name in step], 1)
                else:
                    y = POOLS[step](y) if step in POOLS else getattr(self, step)(y)
            out.append(y)
        return torch.cat(out, 1)


def chain(stem: str, n: int) -> list[str]:
    return [f"{stem}_{i + 1}" for i in range(n)]


def mixed_a(width: int, pool: int) -> Mixed:
    return Mixed(
        {"branch1x1": (width, 64), "branch5x5_1": (width, 48), "branch5x5_2": (48, 64, 5),
         "branch3x3dbl_1": (width, 64), "branch3x3dbl_2": (64, 96, 3), "branch3x3dbl_3": (96, 96, 3),
         "branch_pool": (width, pool)},
        [["branch1x1"], chain("branch5x5", 2), chain("branch3x3dbl", 3), ["avg", "branch_pool"]])


def mixed_b(width: int) -> Mixed:
    return Mixed(
        {"branch3x3": (width, 384, 3, 2, 0), "branch3x3dbl_1": (width, 64), "branch3x3dbl_2": (64, 96, 3),
         "branch3x3dbl_3": (96, 96, 3, 2, 0)},
        [["branch3x3"], chain("branch3x3dbl", 3), ["half"]])


def mixed_c(width: int, c: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    return Mixed(
        {"branch1x1": (width, 192), "branch7x7_1": (width, c), "branch7x7_2": (c, c, row),
         "branch7x7_3": (c, 192, column), "branch7x7dbl_1": (width, c), "branch7x7dbl_2": (c, c, column),
         "branch7x7dbl_3": (c, c, row), "branch7x7dbl_4": (c, c, column), "branch7x7dbl_5": (c, 192, row),
         "branch_pool": (width, 192)},
        [["branch1x1"], chain("branch7x7", 3), chain("branch7x7dbl", 5), ["avg", "branch_pool"]])


def mixed_d(width: int) -> Mixed:
    return Mixed(
        {"branch3x3_1": (width, 192), "branch3x3_2": (192, 320, 3, 2, 0), "branch7x7x3_1": (width, 192),
         "branch7x7x3_2": (192, 192, (1, 7)), "branch7x7x3_3": (192, 192, (7, 1)),
         "branch7x7x3_4": (192, 192, 3, 2, 0)},
        [chain("branch3x3", 2), chain("branch7x7x3", 4), ["half"]])


def mixed_e(width: int, pool: str) -> Mixed:
    fork = {"a": (384, 384, (1, 3)), "b": (384, 384, (3, 1))}
    return Mixed(
        {"branch1x1": (width, 320), "branch3x3_1": (width, 384), "branch3x3dbl_1": (width, 448),
         "branch3x3dbl_2": (448, 384, 3), "branch_pool": (width, 192),
         **{f"branch3x3_2{k}": v for k, v in fork.items()},
         **{f"branch3x3dbl_3{k}": v for k, v in fork.items()}},
        [["branch1x1"], ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")],
         [*chain("branch3x3dbl", 2), ("branch3x3dbl_3a", "branch3x3dbl_3b")], [pool, "branch_pool"]])


class Inception(nn.Module):
    """FID's Inception up to the last mean over places. Unlike torchvision's, its pools leave the padding out
    of their means, and the last block pools by the maximum (the network that FID was defined with)."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, 2, 0)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, 1, 0)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, 1, 0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_a(192, 32), mixed_a(256, 64), mixed_a(288, 64)
        self.Mixed_6a = mixed_b(288)
        self.Mixed_6b, self.Mixed_6c = mixed_c(768, 128), mixed_c(768, 160)
        self.Mixed_6d, self.Mixed_6e = mixed_c(768, 160), mixed_c(768, 192)
        self.Mixed_7a = mixed_d(768)
        self.Mixed_7b, self.Mixed_7c = mixed_e(1280, "avg"), mixed_e(2048, "max")

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in about [-1, 1], sides at least 75 (299 for FID) -> [B, 2048]."""
        for name, layer in self.named_children():
            if name in ("Conv2d_3b_1x1", "Mixed_5b"):
                x = F.max_pool2d(x, 3, 2)
            x = layer(x)
        return x.mean((2, 3))


def load_inception(path: str, device: Device = "cpu") -> Inception:
    """pt_inception-2015-12-05-6726825d.pth of pytorch-fid (or a safetensors copy of it), without its
    classifier. The TorchScript archive of the same network is a program and not read."""
    weights = {k: v for k, v in read_weights(path).items()
               if not k.startswith("fc.") and not k.endswith("num_batches_tracked")}
    shape_of(weights, "Conv2d_1a_3x3.conv.weight", path, "Inception of FID", 4)
    with torch.device("meta"):
        net = Inception()
    return fill(net, weights, path, "Inception of FID", torch.float32, device)
