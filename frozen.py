"""What is loaded and never trained: latent spaces and perceptual features.

Weights come from safetensors, or from the one public file that exists in no other form (torchvision's VGG16),
which is read with `weights_only=True`.
"""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class PixelSpace:
    """The latent space of models that work on pixels: the picture itself, [B, 3, H, W] in [-1, 1]."""

    stride, channels = 1, 3

    def encode(self, image: Tensor) -> Tensor:
        return image

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class VGG16(nn.Module):
    """VGG16's convolutions (Simonyan & Zisserman 2015) up to relu4_3, under torchvision's names `features.N`.

    Features after relu1_2, relu2_2, relu3_3 and relu4_3, the layers of Johnson et al. 2016: ByteEdit's Eq. 3
    names none.
    """

    CONVS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256),
             14: (256, 256), 17: (256, 512), 19: (512, 512), 21: (512, 512)}
    POOLS, TAPS = (4, 9, 16), (3, 8, 15, 22)

    def __init__(self):
        super().__init__()
        convs = {str(i): nn.Conv2d(a, b, 3, padding=1) for i, (a, b) in self.CONVS.items()}
        self.features = nn.ModuleDict(convs)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """image [B, 3, H, W] in [-1, 1], sides at least 8 -> four maps [B, C_i, H_i, W_i]."""
        x, maps = ((image + 1) / 2 - self.mean) / self.std, []
        for i in range(self.TAPS[-1] + 1):
            if i in self.CONVS:
                x = self.features[str(i)](x)
            elif i in self.POOLS:
                x = F.max_pool2d(x, 2)
            else:
                x = F.relu(x)
                if i in self.TAPS:
                    maps.append(x)
        return maps


def load_vgg16(path: str) -> VGG16:
    """VGG16 from torchvision's vgg16-397923af.pth or a safetensors copy of it, without the classifier."""
    try:
        is_pickle = Path(path).suffix in (".pth", ".pt")
        weights = torch.load(path, map_location="cpu", weights_only=True) if is_pickle else load_file(path)
    except Exception as e:
        why = (str(e).splitlines() or [type(e).__name__])[0]
        raise SystemExit(f"error: --vgg: {path}: cannot be read ({why}): give torchvision's VGG16 weights, "
                         ".pth or .safetensors") from None
    net = VGG16()
    own = net.state_dict()
    kept = {k: v for k, v in weights.items() if k in own} if isinstance(weights, dict) else {}
    if bad := [k for k in own if k not in kept or kept[k].shape != own[k].shape]:
        raise SystemExit(f"error: --vgg: {path}: {bad[0]} is missing or of another shape: give torchvision's "
                         "VGG16 weights")
    net.load_state_dict(kept)
    return net.eval().requires_grad_(False)
