"""The known-region blend of a sampling step (RePaint; Blended Latent Diffusion; UltraEdit's region edits).

    known_t = (1 - t) x_known + t noise          the known region brought to the step's noise level
    out     = m x + (1 - m) known_t              m = 1 regenerate, 0 keep; soft values interpolate
"""

import torch
from torch import Tensor


def blend_known(x: Tensor, known: Tensor, noise: Tensor, mask: Tensor, t: Tensor | float) -> Tensor:
    """x, known, noise [B, C, H, W]; mask [B, 1, H, W] in [0, 1]; t in [0, 1], a float or [B] -> [B, C, H, W].

    Computed in fp32, returned in x's dtype. Differentiable in x and known.
    """
    if torch.is_tensor(t):
        t = t.float().view(-1, 1, 1, 1)
    m = mask.float()
    return (m * x.float() + (1 - m) * ((1 - t) * known.float() + t * noise.float())).to(x.dtype)
