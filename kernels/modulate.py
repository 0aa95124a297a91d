"""Adaptive LayerNorm (adaLN, Peebles & Xie 2022): normalise, then scale and shift by the condition.

    h   = (x - mean(x)) / sqrt(var(x) + eps)      over the last axis, no weights
    out = h (1 + scale) + shift
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6  # SD3's


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, L, D], shift and scale [B, D] -> [B, L, D].

    Under autocast x (the residual stream) is fp32, shift and scale are bf16. A GPU normalises in fp32. On
    a CPU the bytes moved are the cost, and the result feeds bf16 Linears: there x is rounded first, not last.
    """
    if x.device.type == "cpu":
        x = x.to(shift.dtype)
    return torch.addcmul(shift[:, None], F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale[:, None])
