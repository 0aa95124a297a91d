"""RMS norm over the last axis (queries and keys of SD3.5, per head).

    n   = rsqrt(mean(x^2) + eps)            one number per row
    y   = n x
    out = w y
    dw  = sum over rows of g y
    dx  = n (w g - y mean(w g y))
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


class _RMSNorm(torch.autograd.Function):
    """PyTorch has no fused CPU kernel, and autograd through its five operations takes twice the time of this.

    x and g are strided views here (a slice of qkv, a transpose): one copy costs less than striding often.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        wide = torch.promote_types(x.dtype, torch.float32)  # statistics in at least fp32
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=wide)
        n = torch.rsqrt(norm.square() / x.shape[-1] + eps).to(x.dtype)
        y = rows * n
        ctx.save_for_backward(y, n, weight)
        return (y * weight.to(x.dtype)).view(x.shape)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor, None]:
        y, n, weight = ctx.saved_tensors
        w, rows = weight.to(y.dtype), g.reshape(y.shape)
        gy = rows * y
        mean = gy @ (w / len(w))[:, None]                                                # mean(w g y), [N, 1]
        dx = torch.addcmul(rows * w, y, mean, value=-1) * n
        return dx.view(g.shape), gy.sum(0, dtype=weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D] -> [..., D] in x's dtype."""
    if x.device.type == "cpu":
        return _RMSNorm.apply(x, weight, eps)
    return rms_norm_ref(x, weight, eps)
