"""Joint attention over separate token streams (SD3's MMDiT, Sec. 4 of Esser et al. 2024).

Every stream i brings its own q_i, k_i, v_i of L_i tokens; each query attends to the keys of all streams:

    k = [k_1 | k_2 | ...],  v = [v_1 | v_2 | ...]
    out_i = softmax(q_i k^T / sqrt(D)) v

There is no mask and no dropout: SD3 attends to padding tokens as well.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this many keys a CPU does softmax(q k^T) v as two batched products. Forward and backward, the fused
# CPU kernel takes 3.0x their time in bf16 at 96 keys, 2.1x at 352, 1.6x at 512, but 0.75x at 1178; in fp32
# 1.2x at 96, 0.8x at 352 (heads of 64, one AMX core, torch 2.13).
CPU_MATH_TOKENS = {torch.bfloat16: 512, torch.float16: 512, torch.float32: 128, torch.float64: 128}


def attention_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain attention, q [B, H, N, D], k and v [B, H, M, D] -> [B, H, N, D].

    16-bit scores are not cast before the softmax: it computes in fp32 in any case and rounds its result once.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(-1).to(v.dtype) @ v


def joint_attention(q: list[Tensor], k: list[Tensor], v: list[Tensor]) -> list[Tensor]:
    """Attend jointly over streams. q, k, v: one [B, L_i, H, D] per stream -> one [B, L_i, H, D] per stream.

    A stream whose q is None only lends its keys and values (the context of SD3's last block); it gets None.
    """
    asked = [x for x in q if x is not None]
    lengths = [x.shape[1] for x in asked]
    # the copy that joins the streams also puts heads before tokens; the batched products would copy once more
    qs, ks, vs = (torch.cat([y.transpose(1, 2) for y in x], dim=2) for x in (asked, k, v))     # [B, H, N, D]
    small = qs.device.type == "cpu" and ks.shape[2] <= CPU_MATH_TOKENS[ks.dtype]
    out = attention_ref(qs, ks, vs) if small else F.scaled_dot_product_attention(qs, ks, vs)
    parts = iter(out.transpose(1, 2).split(lengths, dim=1))                              # [B, L_i, H, D]
    return [None if x is None else next(parts) for x in q]
