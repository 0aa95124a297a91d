"""Joint attention over separate token streams (SD3's MMDiT, Sec. 4 of Esser et al. 2024).

Every stream i brings its own q_i, k_i, v_i of L_i tokens; each query attends to the keys of all streams:

    k = [k_1 | k_2 | ...],  v = [v_1 | v_2 | ...]
    out_i = softmax(q_i k^T / sqrt(D)) v

There is no mask and no dropout: SD3 attends to padding tokens as well.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this many tokens a CPU does softmax(q k^T) v as two batched products: the fused CPU kernel's backward
# is 3x slower there in bf16 (B 64, 3 heads of 64, 96 tokens, 3 threads: 20.8 ms against 6.3 ms forward and
# backward).
CPU_MATH_TOKENS = 512


def attention_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain attention, q [B, H, N, D], k and v [B, H, M, D] -> [B, H, N, D]; softmax in fp32 (fp64 stays)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype) @ v


def joint_attention(q: list[Tensor], k: list[Tensor], v: list[Tensor]) -> list[Tensor]:
    """Attend jointly over streams. q, k, v: one [B, L_i, H, D] per stream -> one [B, L_i, H, D] per stream.

    A stream whose q is None only lends its keys and values (the context of SD3's last block); it gets None.
    """
    asked = [x for x in q if x is not None]
    lengths = [x.shape[1] for x in asked]
    qs, ks, vs = (torch.cat(x, dim=1).transpose(1, 2) for x in (asked, k, v))          # [B, H, N, D]
    small = qs.device.type == "cpu" and ks.shape[2] <= CPU_MATH_TOKENS
    out = attention_ref(qs, ks, vs) if small else F.scaled_dot_product_attention(qs, ks, vs)
    parts = iter(out.transpose(1, 2).split(lengths, dim=1))                              # [B, L_i, H, D]
    return [None if x is None else next(parts) for x in q]
