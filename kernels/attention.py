"""Joint attention over separate token streams (SD3's MMDiT, Sec. 4 of Esser et al. 2024).

Every stream i brings its own q_i, k_i, v_i of L_i tokens; each query attends to the keys of all streams:

    n(x)  = 1 / sqrt(mean(x^2) + eps)                     a number per row
    q'_i  = wq_i n(q_i) q_i,  k'_j = wk_j n(k_j) k_j      without norm weights: q_i, k_j
    s_ij  = q'_i k'_j^T / sqrt(D) + bias_j                bias: a number per key (region masks, padding)
    out_i = softmax([s_i1 | s_i2 | ...]) [v_1 | v_2 | ...]    over the streams j that i may attend to

A query that may attend to nothing (no keys, or all with bias -inf) gets zeros, and gives no gradient.

Triton (flash attention, Dao et al. 2022, with streams): nothing is joined. A program owns a tile of rows of
one stream and walks through the streams one after the other, each in whole tiles without masks and one masked
tail. The forward pass reads k as it is: with norms, the program's rows are scaled by wq wk_j, the scores by
n of the keys. It keeps lse = log2 of the sum of 2^(s log2 e). The backward pass goes over the scores twice:
it needs no atomics and gives the same bits every time.

    p = 2^(s log2 e - lse),  dp = do v^T,  ds = p (dp - rowsum(do out))
    by rows:  dq' = ds k' / sqrt(D)
    by keys:  dv = p^T do,  dk' = ds^T q' / sqrt(D),  dbias = column sums of ds

It works on q' and k', rebuilt for its duration; the norms' own backward is the end of each program:

    y = n(x) x,  dw = sum over rows of g y,  dx = n(x) (w g - y mean(w g y))     g: the gradient of x'
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import dispatch
from kernels.dispatch import jit, tl
from kernels.rms_norm import rms_norm

# Up to this many keys a CPU does softmax(q k^T) v as two batched products, where they are faster than torch's
# fused kernel. Its time in units of theirs, forward and backward, at 96, 352, 512 and 1178 keys (heads of 64,
# torch 2.13): on an AMX core in bf16 3.0, 2.1, 1.6, 0.75, in fp32 1.2 and 0.8 at the first two; on an AVX2
# core in fp32 0.8, 0.9, 0.5, 0.5 (forward alone 0.6, 0.7, 0.4, 0.3), in emulated bf16 0.5 at the first two.
CPU_MATH_TOKENS = dict.fromkeys((torch.bfloat16, torch.float16), 512 if dispatch.has_bf16("cpu") else 0)
LOG2E = math.log2(math.e)
MAX_STREAMS = 4

####################################################################################################
# Plain torch
####################################################################################################


def attention_ref(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Plain attention, q [B, H, N, D], k and v [B, H, M, D], bias [B, M] -> [B, H, N, D].

    16-bit scores are not cast before the softmax: it computes in fp32 in any case and rounds its result once.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias[:, None, None]
    return scores.softmax(-1).to(v.dtype) @ v


def joint_attention_ref(q: list[Tensor], k: list[Tensor], v: list[Tensor], bias: Tensor | None = None) \
        -> list[Tensor]:
    """All of q attend to all of k: lists of [B, L_i, H, D], bias [B, keys] -> one [B, L_i, H, D] per q."""
    lengths = [x.shape[1] for x in q]
    # the copy that joins the streams also puts heads before tokens; the batched products would copy once more
    qs, ks, vs = (torch.cat([y.transpose(1, 2) for y in x], dim=2) for x in (q, k, v))      # [B, H, N, D]
    dead = None
    if bias is not None:
        dead = (bias == -math.inf).all(1)[:, None, None, None]
        bias = bias.masked_fill(dead[:, 0, 0], 0)  # a softmax over nothing would be NaN
    if qs.device.type == "cpu" and ks.shape[2] <= CPU_MATH_TOKENS.get(ks.dtype, 0) or ks.shape[2] == 0:
        out = attention_ref(qs, ks, vs, bias)
    else:
        mask = None if bias is None else bias.to(qs.dtype)[:, None, None]
        out = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask)
    if dead is not None:
        out = out.masked_fill(dead, 0)
    return list(out.transpose(1, 2).split(lengths, dim=1))                               # [B, L_i, H, D]


####################################################################################################
# Triton: what the kernels share
#
# Streams come as tuples of pointers, lengths and (batch, row, head) strides; a tuple's size is part of the
# kernel's type, so the loops over streams are unrolled. Statistics are fp32 [B, H, rows of all streams], bias
# [B, rows of all streams]. `scale` and bias hold the factor log2 e.
####################################################################################################


@jit
def _locate(lengths, tile, BLOCK: tl.constexpr):
    """Tile number -> its stream, its first row there, the number of rows of the streams before."""
    stream, first, before, tiles, rows = 0, 0, 0, 0, 0
    for s in tl.static_range(len(lengths)):
        here = tile >= tiles
        stream = tl.where(here, s, stream)
        first = tl.where(here, tiles, first)
        before = tl.where(here, rows, before)
        tiles += tl.cdiv(lengths[s], BLOCK)
        rows += lengths[s]
    return stream, (tile - first) * BLOCK, before


@jit
def _pick(items, stream):
    x = items[0]
    for s in tl.static_range(1, len(items)):
        x = tl.where(stream == s, items[s], x)
    return x


@jit
def _head(x, strides, stream, b, h):
    """Where head h of sample b of a stream begins, and the step from row to row."""
    at = x[0] + b * strides[0][0] + h * strides[0][2]
    step = strides[0][1]
    for s in tl.static_range(1, len(x)):
        at = tl.where(stream == s, x[s] + b * strides[s][0] + h * strides[s][2], at)
        step = tl.where(stream == s, strides[s][1], step)
    return at, step


@jit
def _packed(x, lengths, stream, b, h, H, D: tl.constexpr):
    """The same for contiguous [B, L, H, D]; the step is H D."""
    return _pick(x, stream) + (b * _pick(lengths, stream) * H + h) * D


@jit
def _allowed(length, ATTENDS: tl.constexpr, asking, STREAMS: tl.constexpr, keys):
    """`length` if the asking stream may attend to stream `keys`, else 0: its loop does not run."""
    if ATTENDS == -1:
        return length
    return tl.where((ATTENDS >> (asking * STREAMS + keys)) & 1 != 0, length, 0)


@jit
def _inverse_rms(x, strides, lengths, rstd, total, H, eps, NORMED: tl.constexpr, D: tl.constexpr,
                 BLOCK: tl.constexpr):
    """rstd [B, H, total] = 1 / rms of every row; 1 for streams that are not normed."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    stream, row, before = _locate(lengths, tl.program_id(0), BLOCK)
    at, step = _head(x, strides, stream, b, h)
    rows = row + tl.arange(0, BLOCK)
    inside = rows < _pick(lengths, stream)
    tile = tl.load(at + rows[:, None] * step + tl.arange(0, D)[None, :], mask=inside[:, None], other=0.0)
    tile = tile.to(tl.float32)
    n = 1 / tl.sqrt_rn(tl.sum(tile * tile, 1) / D + eps)
    n = tl.where((NORMED >> stream) & 1 != 0, n, 1.0)
    tl.store(rstd + (b * H + h) * total + before + rows, n, mask=inside)


@jit
def _normalise(x, strides, out, lengths, rstd, w, total, H, D: tl.constexpr, BLOCK: tl.constexpr):
    """out, contiguous [B, L, H, D] per stream = w rstd x."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    stream, row, before = _locate(lengths, tl.program_id(0), BLOCK)
    at, step = _head(x, strides, stream, b, h)
    rows, d = row + tl.arange(0, BLOCK), tl.arange(0, D)
    inside = rows < _pick(lengths, stream)
    n = tl.load(rstd + (b * H + h) * total + before + rows, mask=inside, other=0.0)
    tile = tl.load(at + rows[:, None] * step + d[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    tile = tile * n[:, None] * tl.load(w + stream * D + d)[None, :]
    to = _packed(out, lengths, stream, b, h, H, D)
    tl.store(to + rows[:, None] * (H * D) + d[None, :], tile.to(to.dtype.element_ty), mask=inside[:, None])


@jit
def _norm_backward(g, at, step, rows, inside, rstd, w, dw, normed, D: tl.constexpr):
    """g, the gradient of a tile of x' -> that of x; writes the tile's share of dw to dw [D]."""
    d = tl.arange(0, D)
    n = tl.load(rstd + rows, mask=inside, other=0.0)
    y = tl.load(at + rows[:, None] * step + d[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    y = y * n[:, None]
    wg = g * tl.load(w + d)[None, :]
    tl.store(dw + d, tl.sum(tl.where(inside[:, None], g * y, 0.0), 0))
    mean = tl.where(normed, tl.sum(wg * y, 1) / D, 0.0)
    return n[:, None] * (wg - y * mean[:, None])


####################################################################################################
# Triton: forward
####################################################################################################


@jit
def _forward_loop(acc, total, top, q, k, v, rstd, bias, begin, end, k_step, v_step, scale, NORM: tl.constexpr,
                  BIAS: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr):
    """Keys begin..end of one stream: carries the online softmax's weighted sum, sum and maximum on."""
    d = tl.arange(0, D)
    for start in tl.range(begin, end, COLS):
        n = start + tl.arange(0, COLS)
        inside = n < end
        if TAIL:
            keys = tl.load(k + n[:, None] * k_step + d[None, :], mask=inside[:, None], other=0.0)
        else:
            keys = tl.load(k + n[:, None] * k_step + d[None, :])
        s = tl.dot(q, tl.trans(keys), input_precision="ieee")
        factor = scale
        if NORM:  # q carries the scale
            factor = (tl.load(rstd + n, mask=inside, other=0.0) if TAIL else tl.load(rstd + n))[None, :]
        if BIAS:
            b = tl.load(bias + n, mask=inside, other=float("-inf")) if TAIL else tl.load(bias + n)
            s = s * factor + b[None, :]
            factor = 1.0
        elif NORM:
            s = s * factor
            factor = 1.0
        if TAIL and not BIAS:
            s = tl.where(inside[None, :], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1) * factor)
        if BIAS:  # nothing but -inf so far: -inf - -inf would be NaN
            shift = tl.where(new == float("-inf"), 0.0, new)
        else:
            shift = new
        p = tl.exp2(s * factor - shift[:, None])
        alpha = tl.exp2(top - shift)
        total = total * alpha + tl.sum(p, 1)
        if TAIL:
            values = tl.load(v + n[:, None] * v_step + d[None, :], mask=inside[:, None], other=0.0)
        else:
            values = tl.load(v + n[:, None] * v_step + d[None, :])
        acc = tl.dot(p.to(values.dtype), values, acc * alpha[:, None], input_precision="ieee")
        top = new
    return acc, total, top


@jit
def _forward(q, k, v, out, lse, rstd_q, rstd_k, wq, wk, bias, q_lengths, k_lengths, q_strides, k_strides,
             v_strides, q_total, k_total, H, scale, ATTENDS: tl.constexpr, NORM: tl.constexpr,
             BIAS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A tile of ROWS queries of one stream against all keys. out: contiguous; lse [B, H, q_total]."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    stream, row, before = _locate(q_lengths, tl.program_id(0), ROWS)
    at, step = _head(q, q_strides, stream, b, h)
    rows, d = row + tl.arange(0, ROWS), tl.arange(0, D)
    inside = rows < _pick(q_lengths, stream)
    stat = (b * H + h) * q_total + before + rows
    at += rows[:, None] * step + d[None, :]
    if not NORM:
        mine = tl.load(at, mask=inside[:, None], other=0.0)

    acc = tl.zeros([ROWS, D], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    first = 0  # rows of the streams before
    for s in tl.static_range(len(k)):
        length = _allowed(k_lengths[s], ATTENDS, stream, len(k), s)
        whole = length // COLS * COLS
        if NORM:  # loaded again for every stream (volatile: really), kept it would cost registers
            mine = tl.load(at, mask=inside[:, None], other=0.0, volatile=True)
            n = tl.load(rstd_q + stat, mask=inside, other=0.0) * scale
            w = tl.load(wq + stream * D + d) * tl.load(wk + s * D + d)
            mine = (mine.to(tl.float32) * n[:, None] * w[None, :]).to(mine.dtype)
        k_at = k[s] + b * k_strides[s][0] + h * k_strides[s][2]
        v_at = v[s] + b * v_strides[s][0] + h * v_strides[s][2]
        r_at, b_at = rstd_k + (b * H + h) * k_total + first, bias + b * k_total + first
        acc, total, top = _forward_loop(acc, total, top, mine, k_at, v_at, r_at, b_at, 0, whole,
                                        k_strides[s][1], v_strides[s][1], scale, NORM, BIAS, False, D, COLS)
        acc, total, top = _forward_loop(acc, total, top, mine, k_at, v_at, r_at, b_at, whole, length,
                                        k_strides[s][1], v_strides[s][1], scale, NORM, BIAS, True, D, COLS)
        first += k_lengths[s]

    empty = total == 0
    total = tl.where(empty, 1.0, total)
    to = _packed(out, q_lengths, stream, b, h, H, D)
    result = (acc / total[:, None]).to(to.dtype.element_ty)
    tl.store(to + rows[:, None] * (H * D) + d[None, :], result, mask=inside[:, None])
    # +inf makes every p of the backward pass 0
    tl.store(lse + stat, tl.where(empty, float("inf"), top + tl.log2(total)), mask=inside)


####################################################################################################
# Triton: backward
####################################################################################################


@jit
def _backward_q_loop(dq, q, do, lse, delta, k, v, bias, begin, end, k_step, v_step, scale, BIAS: tl.constexpr,
                     TAIL: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr):
    d = tl.arange(0, D)
    for start in tl.range(begin, end, COLS):
        n = start + tl.arange(0, COLS)
        inside = n < end
        if TAIL:
            keys = tl.load(k + n[:, None] * k_step + d[None, :], mask=inside[:, None], other=0.0)
            values = tl.load(v + n[:, None] * v_step + d[None, :], mask=inside[:, None], other=0.0)
        else:
            keys = tl.load(k + n[:, None] * k_step + d[None, :])
            values = tl.load(v + n[:, None] * v_step + d[None, :])
        s = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        if BIAS:
            b = tl.load(bias + n, mask=inside, other=float("-inf")) if TAIL else tl.load(bias + n)
            s += b[None, :]
        p = tl.exp2(s - lse[:, None])
        if TAIL:
            p = tl.where(inside[None, :], p, 0.0)
        ds = p * (tl.dot(do, tl.trans(values), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision="ieee")
    return dq


@jit
def _backward_q(q, k, v, out, do, lse, delta, bias, dq, x, rstd, w, dw, q_lengths, k_lengths, q_strides,
                k_strides, v_strides, x_strides, q_total, k_total, H, scale, ATTENDS: tl.constexpr,
                NORMED: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr,
                ROWS: tl.constexpr, COLS: tl.constexpr):
    """dq of a tile of ROWS queries; writes delta = rowsum(do out) for _backward_kv. x: q before its norm."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    stream, row, before = _locate(q_lengths, tl.program_id(0), ROWS)
    rows, d = row + tl.arange(0, ROWS), tl.arange(0, D)
    inside = rows < _pick(q_lengths, stream)
    stat = (b * H + h) * q_total + before
    place, keep = rows[:, None] * (H * D) + d[None, :], inside[:, None]
    at, step = _head(q, q_strides, stream, b, h)
    mine = tl.load(at + rows[:, None] * step + d[None, :], mask=keep, other=0.0)
    grad = tl.load(_packed(do, q_lengths, stream, b, h, H, D) + place, mask=keep, other=0.0)
    made = tl.load(_packed(out, q_lengths, stream, b, h, H, D) + place, mask=keep, other=0.0)
    dots = tl.sum(grad.to(tl.float32) * made.to(tl.float32), 1)
    tl.store(delta + stat + rows, dots, mask=inside)
    sums = tl.load(lse + stat + rows, mask=inside, other=float("inf"))

    acc = tl.zeros([ROWS, D], tl.float32)
    first = 0
    for s in tl.static_range(len(k)):
        length = _allowed(k_lengths[s], ATTENDS, stream, len(k), s)
        whole = length // COLS * COLS
        k_at = k[s] + b * k_strides[s][0] + h * k_strides[s][2]
        v_at = v[s] + b * v_strides[s][0] + h * v_strides[s][2]
        b_at = bias + b * k_total + first
        acc = _backward_q_loop(acc, mine, grad, sums, dots, k_at, v_at, b_at, 0, whole, k_strides[s][1],
                               v_strides[s][1], scale, BIAS, False, D, COLS)
        acc = _backward_q_loop(acc, mine, grad, sums, dots, k_at, v_at, b_at, whole, length, k_strides[s][1],
                               v_strides[s][1], scale, BIAS, True, D, COLS)
        first += k_lengths[s]

    acc *= scale * 0.6931471805599453  # scale holds log2 e
    if NORM:
        at, step = _head(x, x_strides, stream, b, h)
        share = dw + ((b * H + h) * tl.num_programs(0) + tl.program_id(0)) * D
        acc = _norm_backward(acc, at, step, rows, inside, rstd + stat, w + stream * D, share,
                             (NORMED >> stream) & 1 != 0, D)
    to = _packed(dq, q_lengths, stream, b, h, H, D)
    tl.store(to + place, acc.to(to.dtype.element_ty), mask=keep)


@jit
def _backward_kv_loop(dk, dv, db, k, v, bias, q, do, lse, delta, begin, end, q_step, do_step, scale,
                      BIAS: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """Scores are computed as k q^T: the transpose of a product, fed to another, goes wrong on Hopper."""
    d = tl.arange(0, D)
    for start in tl.range(begin, end, ROWS):
        m = start + tl.arange(0, ROWS)
        if TAIL:
            inside = m < end
            rows = tl.load(q + m[:, None] * q_step + d[None, :], mask=inside[:, None], other=0.0)
            grad = tl.load(do + m[:, None] * do_step + d[None, :], mask=inside[:, None], other=0.0)
            sums = tl.load(lse + m, mask=inside, other=float("inf"))  # p = 0: no further mask is needed
            dots = tl.load(delta + m, mask=inside, other=0.0)
        else:
            rows = tl.load(q + m[:, None] * q_step + d[None, :])
            grad = tl.load(do + m[:, None] * do_step + d[None, :])
            sums, dots = tl.load(lse + m), tl.load(delta + m)
        s = tl.dot(k, tl.trans(rows), input_precision="ieee") * scale
        if BIAS:
            s += bias[:, None]
        p = tl.exp2(s - sums[None, :])
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(grad), input_precision="ieee") - dots[None, :])
        if BIAS:
            db += tl.sum(ds, 1)
        dk = tl.dot(ds.to(rows.dtype), rows, dk, input_precision="ieee")
    return dk, dv, db


@jit
def _backward_kv(q, k, v, do, lse, delta, bias, dk, dv, dbias, x, rstd, w, dw, q_lengths, k_lengths,
                 q_strides, k_strides, v_strides, x_strides, q_total, k_total, H, scale,
                 ATTENDS: tl.constexpr, NORMED: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
                 D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """dk, dv and, per head, dbias [B, H, k_total] of a tile of COLS keys. x: k before its norm."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    stream, row, before = _locate(k_lengths, tl.program_id(0), COLS)
    cols, d = row + tl.arange(0, COLS), tl.arange(0, D)
    inside = cols < _pick(k_lengths, stream)
    stat = (b * H + h) * k_total + before
    keep = inside[:, None]
    at, step = _head(k, k_strides, stream, b, h)
    keys = tl.load(at + cols[:, None] * step + d[None, :], mask=keep, other=0.0)
    at, step = _head(v, v_strides, stream, b, h)
    values = tl.load(at + cols[:, None] * step + d[None, :], mask=keep, other=0.0)
    mine = tl.zeros([COLS], tl.float32)
    if BIAS:
        mine = tl.load(bias + b * k_total + before + cols, mask=inside, other=0.0)

    acc_k = tl.zeros([COLS, D], tl.float32)
    acc_v = tl.zeros([COLS, D], tl.float32)
    acc_b = tl.zeros([COLS], tl.float32)
    first = (b * H + h) * q_total
    for s in tl.static_range(len(q)):
        length = _allowed(q_lengths[s], ATTENDS, s, len(k), stream)
        whole = length // ROWS * ROWS
        q_at = q[s] + b * q_strides[s][0] + h * q_strides[s][2]
        do_at = do[s] + (b * q_lengths[s] * H + h) * D
        acc_k, acc_v, acc_b = _backward_kv_loop(
            acc_k, acc_v, acc_b, keys, values, mine, q_at, do_at, lse + first, delta + first, 0, whole,
            q_strides[s][1], H * D, scale, BIAS, False, D, ROWS)
        acc_k, acc_v, acc_b = _backward_kv_loop(
            acc_k, acc_v, acc_b, keys, values, mine, q_at, do_at, lse + first, delta + first, whole, length,
            q_strides[s][1], H * D, scale, BIAS, True, D, ROWS)
        first += q_lengths[s]

    place = cols[:, None] * (H * D) + d[None, :]
    to = _packed(dv, k_lengths, stream, b, h, H, D)
    tl.store(to + place, acc_v.to(to.dtype.element_ty), mask=keep)
    if BIAS:
        tl.store(dbias + stat + cols, acc_b, mask=inside)
    acc_k *= scale * 0.6931471805599453
    if NORM:
        at, step = _head(x, x_strides, stream, b, h)
        share = dw + ((b * H + h) * tl.num_programs(0) + tl.program_id(0)) * D
        acc_k = _norm_backward(acc_k, at, step, cols, inside, rstd + stat, w + stream * D, share,
                               (NORMED >> stream) & 1 != 0, D)
    to = _packed(dk, k_lengths, stream, b, h, H, D)
    tl.store(to + place, acc_k.to(to.dtype.element_ty), mask=keep)


####################################################################################################
# Custom ops
####################################################################################################

# Rows (queries) and columns (keys) of a tile, warps, stages: the largest without spilled registers in a loop
# (tests/test_aot.py). On Hopper, products of fewer than 64 columns would wait for shared memory.
TILES = {
    ("forward", 64): (128, 128, 8, 2), ("forward", 128): (128, 64, 8, 2),
    ("backward_q", 64): (128, 64, 8, 2), ("backward_q", 128): (128, 64, 8, 2),
    ("backward_kv", 64): (64, 128, 8, 2), ("backward_kv", 128): (32, 128, 8, 2),
}
# Where no stream is longer than SHORT (64x64 pixels at patch 8: 64 image and 24 text tokens) a tile of 128 x
# 128 would be filled to a seventh. Heads of 64 only: other models have longer streams.
SHORT, SHORT_TILE = 64, (64, 64, 4, 2)
OTHER_TILES = {
    "sm_8": {("backward_q", 128): (128, 32, 8, 2), ("backward_kv", 128): (16, 128, 8, 2)},
    "sm_10": {("forward", 64): (128, 64, 8, 2), ("backward_q", 64): (128, 128, 8, 2)},
    "gfx": {("forward", 64): (128, 64, 4, 2), ("forward", 128): (128, 64, 4, 2),
            ("backward_q", 64): (128, 32, 4, 2), ("backward_q", 128): (128, 32, 4, 2),
            ("backward_kv", 64): (16, 128, 8, 2), ("backward_kv", 128): (16, 64, 4, 2)},
}
OTHER_TILES["sm_12"] = OTHER_TILES["sm_8"]  # as little shared memory as sm_89
NORM_ROWS = 64  # of _inverse_rms and _normalise


def tiles(kernel: str, head_dim: int, arch: str, longest: int = 2 * SHORT) -> tuple[int, int, int, int]:
    """arch: "sm_90", "gfx942", ...; "cpu": the interpreter, several tiles and a tail out of few tokens.
    longest: tokens of the longest stream, queries and keys."""
    if arch == "cpu":
        return 32, 32, 4, 1
    if longest <= SHORT and head_dim == 64 and arch.startswith("sm_"):
        return SHORT_TILE
    other = next((x for family, x in OTHER_TILES.items() if arch.startswith(family)), {})
    return other.get((kernel, head_dim), TILES[kernel, head_dim])


def _arch(x: Tensor) -> str:
    return "cpu" if x.device.type == "cpu" else dispatch.architecture(x.device)


def _strides(x: list[Tensor]) -> tuple:
    return tuple(y.stride()[:3] for y in x)


def _lengths(x: list[Tensor]) -> tuple[int, ...]:
    return tuple(y.shape[1] for y in x)


def _grid(x: list[Tensor], block: int) -> tuple[int, int, int]:
    B, _, H, _ = x[0].shape
    return sum(-(-n // block) for n in _lengths(x)), H, B


def _empty(x: Tensor, *shape: int) -> Tensor:
    """What a kernel will fill: contiguous, like x or an fp32 statistic of `shape`."""
    return x.new_empty(shape, dtype=torch.float32) if shape else x.new_empty(x.shape)


def _rstd(x: list[Tensor], normed: int, eps: float) -> Tensor:
    B, _, H, D = x[0].shape
    n = _lengths(x)
    out = _empty(x[0], B, H, sum(n))
    grid = _grid(x, NORM_ROWS)
    if all(grid):
        _inverse_rms[grid](tuple(x), _strides(x), n, out, sum(n), H, eps, NORMED=normed, D=D, BLOCK=NORM_ROWS)
    return out


def _normed(x: list[Tensor], rstd: Tensor, w: Tensor) -> list[Tensor]:
    D, grid = x[0].shape[3], _grid(x, NORM_ROWS)
    out = [_empty(y) for y in x]
    if all(grid):
        _normalise[grid](tuple(x), _strides(x), tuple(out), _lengths(x), rstd, w, rstd.shape[2], grid[1], D=D,
                         BLOCK=NORM_ROWS)
    return out


@torch.library.custom_op("kernels::joint_attention", mutates_args=())
def _attend(q: list[Tensor], k: list[Tensor], v: list[Tensor], wq: Tensor | None, wk: Tensor | None,
            bias: Tensor | None, q_normed: int, k_normed: int, attends: int, eps: float) -> list[Tensor]:
    """q: the streams that ask. wq [len(q), D], wk [len(k), D] fp32; bit i of q_normed, k_normed: stream i is
    normed. bias fp32 [B, keys]. Bit a len(k) + j of attends: asking stream a sees stream j; -1: all do.
    -> [one out per stream of q, lse, rstd of q, rstd of k]
    """
    B, _, H, D = q[0].shape
    nq, nk = _lengths(q), _lengths(k)
    lse, out = _empty(q[0], B, H, sum(nq)), [_empty(x) for x in q]
    norm = wq is not None
    rstd_q, rstd_k = (_rstd(x, bits, eps) if norm else _empty(lse, 0)
                      for x, bits in ((q, q_normed), (k, k_normed)))
    rows, cols, warps, stages = tiles("forward", D, _arch(lse), max(nq + nk))
    grid = _grid(q, rows)
    if all(grid):
        _forward[grid](tuple(q), tuple(k), tuple(v), tuple(out), lse, rstd_q, rstd_k, wq if norm else lse,
                       wk if norm else lse, lse if bias is None else bias * LOG2E, nq, nk, _strides(q),
                       _strides(k), _strides(v), sum(nq), sum(nk), H, D**-0.5 * LOG2E, ATTENDS=attends,
                       NORM=norm, BIAS=bias is not None, D=D, ROWS=rows, COLS=cols, num_warps=warps,
                       num_stages=stages)
    return [*out, lse, rstd_q, rstd_k]


@_attend.register_fake
def _(q, k, v, wq, wk, bias, q_normed, k_normed, attends, eps):
    B, _, H, _ = q[0].shape
    norms = [_empty(x[0], B, H, sum(_lengths(x))) if wq is not None else _empty(x[0], 0) for x in (q, k)]
    return [*(_empty(x) for x in q), _empty(q[0], B, H, sum(_lengths(q))), *norms]


@torch.library.custom_op("kernels::joint_attention_backward", mutates_args=())
def _attend_backward(grads: list[Tensor], q: list[Tensor], k: list[Tensor], v: list[Tensor],
                     out: list[Tensor], lse: Tensor, rstd_q: Tensor, rstd_k: Tensor, wq: Tensor | None,
                     wk: Tensor | None, bias: Tensor | None, q_normed: int, k_normed: int,
                     attends: int) -> list[Tensor]:
    """-> [dq of each stream, dk, dv, then dwq, dwk, dbias as far as their tensors are given]"""
    B, _, H, D = q[0].shape
    nq, nk = _lengths(q), _lengths(k)
    norm = wq is not None
    raw_q, raw_k = q, k
    if norm:
        q, k = _normed(q, rstd_q, wq), _normed(k, rstd_k, wk)
    dq, dk, dv = ([_empty(x) for x in y] for y in (q, k, v))
    delta = _empty(lse)
    dbias = _empty(lse, B, H, sum(nk)) if bias is not None else lse
    scaled = lse if bias is None else bias * LOG2E
    common = {"ATTENDS": attends, "NORM": norm, "BIAS": bias is not None, "D": D}
    sizes, strides = (sum(nq), sum(nk), H, D**-0.5 * LOG2E), [_strides(x) for x in (q, k, v)]

    rows, cols, warps, stages = tiles("backward_q", D, _arch(lse), max(nq + nk))
    grid, q_tiles = _grid(q, rows), [-(-n // rows) for n in nq]
    dwq = _empty(lse, B, H, grid[0], D) if norm else lse
    if all(grid):
        _backward_q[grid](tuple(q), tuple(k), tuple(v), tuple(out), tuple(grads), lse, delta, scaled,
                          tuple(dq), tuple(raw_q), rstd_q, wq if norm else lse, dwq, nq, nk, *strides,
                          _strides(raw_q), *sizes, NORMED=q_normed, ROWS=rows, COLS=cols, num_warps=warps,
                          num_stages=stages, **common)
    rows, cols, warps, stages = tiles("backward_kv", D, _arch(lse), max(nq + nk))
    grid, k_tiles = _grid(k, cols), [-(-n // cols) for n in nk]
    dwk = _empty(lse, B, H, grid[0], D) if norm else lse
    if all(grid):
        _backward_kv[grid](tuple(q), tuple(k), tuple(v), tuple(grads), lse, delta, scaled, tuple(dk),
                           tuple(dv), dbias, tuple(raw_k), rstd_k, wk if norm else lse, dwk, nq, nk, *strides,
                           _strides(raw_k), *sizes, NORMED=k_normed, ROWS=rows, COLS=cols, num_warps=warps,
                           num_stages=stages, **common)
    more = []
    if norm:
        more += [torch.stack([x.sum((0, 1, 2)) for x in dw.split(n, 2)])
                 for dw, n in ((dwq, q_tiles), (dwk, k_tiles))]
    if bias is not None:
        more.append(dbias.sum(1))
    return [*dq, *dk, *dv, *more]


@_attend_backward.register_fake
def _(grads, q, k, v, out, lse, rstd_q, rstd_k, wq, wk, bias, q_normed, k_normed, attends):
    return [*(_empty(x) for y in (q, k, v) for x in y), *(_empty(x) for x in (wq, wk, bias) if x is not None)]


def _save(ctx, inputs, output) -> None:
    q, k, v, wq, wk, bias, *ctx.flags, _ = inputs
    ctx.sizes = len(q), len(k)
    ctx.save_for_backward(*q, *k, *v, *output, wq, wk, bias)


def _grads(ctx, grads: list[Tensor | None]) -> tuple:
    nq, nk = ctx.sizes
    *saved, wq, wk, bias = ctx.saved_tensors
    q, k, v, out, stats = (saved[a:b] for a, b in ((0, nq), (nq, nq + nk), (nq + nk, nq + 2 * nk),
                                                   (nq + 2 * nk, -3), (-3, len(saved))))
    grads = [torch.zeros_like(x) if g is None else g.contiguous() for g, x in zip(grads, out)]
    made = torch.ops.kernels.joint_attention_backward(grads, q, k, v, out, *stats, wq, wk, bias, *ctx.flags)
    made = iter(made)
    dq, dk, dv = ([next(made) for _ in range(n)] for n in (nq, nk, nk))
    return dq, dk, dv, *(None if x is None else next(made) for x in (wq, wk, bias)), None, None, None, None


_attend.register_autograd(_grads, setup_context=_save)


def _flops(q: list[torch.Size], k: list[torch.Size], attends: int, products: int) -> int:
    """Of that many products of scores' size, for torch.utils.flop_counter (runs/memory.py, perf/mfu)."""
    B, _, H, D = q[0]
    pairs = sum(x[1] * y[1] * (attends >> (a * len(k) + j) & 1) for a, x in enumerate(q)
                for j, y in enumerate(k))
    return 2 * products * B * H * D * pairs


@register_flop_formula(torch.ops.kernels.joint_attention)
def _(q, k, v, wq, wk, bias, q_normed, k_normed, attends, *args, **kwargs) -> int:
    return _flops(q, k, attends, 2)


@register_flop_formula(torch.ops.kernels.joint_attention_backward)
def _(grads, q, k, v, out, lse, rstd_q, rstd_k, wq, wk, bias, q_normed, k_normed, attends, **kwargs) -> int:
    return _flops(q, k, attends, 4)  # what a gradient needs: that the kernels make scores again is theirs


def shipped(arch: str, dtype: str = "bf16", streams: int = 2) -> dict[str, tuple]:
    """Every kernel that runs on `arch` -> name: (kernel, arguments for aot.build, warps, stages)."""
    x, length = (f"*{dtype}",) * streams, ("i32",) * streams
    stride = (("i32:16", "i32:16", "i32:16"),) * streams
    sizes = {"q_lengths": length, "k_lengths": length, "q_strides": stride, "k_strides": stride,
             "v_strides": stride, "q_total": "i32", "k_total": "i32", "H": "i32", "scale": "fp32"}
    names = ("lse", "delta", "bias", "rstd_q", "rstd_k", "wq", "wk", "rstd", "w", "dw", "dbias")
    stats = dict.fromkeys(names, "*fp32")
    out = {}
    for D in (64, 128):
        for norm in (False, True):
            for bias in (False, True):
                common = {**dict.fromkeys(("q", "k", "v", "out", "do", "dq", "dk", "dv", "x"), x), **stats,
                          **sizes, "x_strides": stride, "ATTENDS": -1, "NORMED": 2**streams - 1, "NORM": norm,
                          "BIAS": bias, "D": D}
                for kernel in (_forward, _backward_q, _backward_kv):
                    name = kernel.fn.__name__[1:]
                    for short in (False, True)[:1 + (D == 64 and arch.startswith("sm_"))]:
                        rows, cols, warps, stages = tiles(name, D, arch, SHORT * (2 - short))
                        args = {p: {**common, "ROWS": rows, "COLS": cols}[p] for p in kernel.arg_names}
                        label = f"{name} d{D}{' short' * short}{' norm' * norm}{' bias' * bias}"
                        out[label] = kernel, args, warps, stages
        small = {"x": x, "strides": stride, "out": x, "lengths": length, "rstd": "*fp32", "w": "*fp32",
                 "total": "i32", "H": "i32", "eps": "fp32", "NORMED": 3, "D": D, "BLOCK": NORM_ROWS}
        for kernel in (_inverse_rms, _normalise):
            out[f"{kernel.fn.__name__[1:]} d{D}"] = kernel, {p: small[p] for p in kernel.arg_names}, 4, 2
    return out


####################################################################################################
# The public function
####################################################################################################


def joint_attention(q: list[Tensor | None], k: list[Tensor], v: list[Tensor], norm: list[tuple] | None = None,
                    eps: float = 1e-6, bias: list[Tensor | None] | None = None,
                    attends: list[list[bool]] | None = None) -> list[Tensor | None]:
    """Attend jointly over up to four streams.

    q, k, v: one [B, L_i, H, D] per stream, any strides and lengths. A stream whose q is None only lends its
    keys and values (the context of SD3's last block, a cached source image); it gets None.
    norm: per stream the weights (wq, wk) of its RMS norms, [D] each; None leaves q or k as it is.
    bias: per stream [B, L_i], added to every score of these keys (-inf: never attended to), or None.
    attends: attends[i][j] says whether queries of stream i see keys of stream j. All do by default.
    -> one [B, L_i, H, D] per stream
    """
    if len(k) > MAX_STREAMS:
        raise ValueError(f"joint_attention takes up to {MAX_STREAMS} streams, got {len(k)}")
    asking = [i for i, x in enumerate(q) if x is not None]
    if not asking:
        return [None] * len(q)
    if attends is not None and all(attends[i][j] for i in asking for j in range(len(k))):
        attends = None
    asked, out = [q[i] for i in asking], [None] * len(q)
    joined = None
    if bias is not None and any(b is not None for b in bias):
        wide = torch.promote_types(k[0].dtype, torch.float32)
        joined = torch.cat([x.new_zeros(x.shape[:2], dtype=wide) if b is None else b.to(wide)
                            for b, x in zip(bias, k)], dim=1)
    x = asked[0]
    D = x.shape[3]
    fits = D in (64, 128) and (x.dtype in (torch.bfloat16, torch.float16) or x.device.type == "cpu")
    wins = D == 64 or joined is not None  # without a bias, cuDNN is faster in heads of 128
    normed = norm is not None and any(w is not None for pair in norm for w in pair)
    short = D == 64 and max(y.shape[1] for y in (*asked, *k)) <= SHORT  # other tiles are other kernels
    kind = len(k), normed, joined is not None, short
    op = f"joint attention, {len(k)}{' short' * short} streams{', norms' * normed}{', bias' * kind[2]}"
    triton = dispatch.use_triton(op, x, D, self_check, fits, wins, kind)
    # the kernels count elements within a head of a stream in 32 bits
    triton = triton and all(y.shape[1] * y.stride(1) < 2**31 for y in (*asked, *k, *v))
    run = _triton if triton else _plain
    for i, part in zip(asking, run(asked, k, v, asking, norm, eps, joined, attends)):
        out[i] = part
    return out


def _plain(q, k, v, asking, norm, eps, bias, attends) -> list[Tensor]:
    """joint_attention for the streams that ask, numbered `asking`; bias [B, keys]."""
    if norm is not None:
        q = [x if norm[i][0] is None else rms_norm(x, norm[i][0], eps) for i, x in zip(asking, q)]
        k = [x if w is None else rms_norm(x, w, eps) for x, (_, w) in zip(k, norm)]
    if attends is None:
        return joint_attention_ref(q, k, v, bias)
    biases = [None] * len(k) if bias is None else bias.split(_lengths(k), 1)
    out = [None] * len(q)
    for seen in {tuple(attends[i]): None for i in asking}:  # streams that see the same keys ask together
        members = [n for n, i in enumerate(asking) if tuple(attends[i]) == seen]
        keys = [j for j in range(len(k)) if seen[j]]
        ks, vs = ([x[j] for j in keys] or [x[0][:, :0]] for x in (k, v))
        b = torch.cat([biases[j] for j in keys], 1) if bias is not None and keys else None
        for n, part in zip(members, joint_attention_ref([q[n] for n in members], ks, vs, b)):
            out[n] = part
    return out


def _triton(q, k, v, asking, norm, eps, bias, attends) -> list[Tensor]:
    q, k, v = ([y if y.stride(3) == 1 else y.contiguous() for y in x] for x in (q, k, v))
    wq = wk = None
    bits = [0, 0]
    if norm is not None:
        sides = [[norm[i][0] for i in asking], [w for _, w in norm]]
        bits = [sum(1 << i for i, w in enumerate(side) if w is not None) for side in sides]
        ones = q[0].new_ones(q[0].shape[3], dtype=torch.float32)
        if any(bits):
            wq, wk = (torch.stack([ones if w is None else w.float() for w in side]) for side in sides)
    mask = -1
    if attends is not None:
        mask = sum(attends[i][j] << (a * len(k) + j) for a, i in enumerate(asking) for j in range(len(k)))
    return torch.ops.kernels.joint_attention(q, k, v, wq, wk, bias, *bits, mask, eps)[:len(q)]


####################################################################################################
# Self-test
####################################################################################################

# largest error of a result or gradient, relative to its largest value
BOUNDS = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def worst_error(device: torch.device, dtype: torch.dtype, head_dim: int, norm: bool, bias: bool,
                lengths: tuple[int, ...] = (77, 515, 128), heads: int = 4, seed: int = 0) -> float:
    """Triton's outputs and gradients against _plain in fp64, in units of BOUNDS; inf if two runs differ."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    qkv = [random(2, n, 3, heads, head_dim).to(dtype) for n in lengths]
    weights = [(1 + 0.3 * random(head_dim)).float() for _ in range(2 * len(lengths))]
    biases = [random(2, n).float() for n in lengths]
    for b in biases:
        b[:, ::3] = -math.inf
    towards = [random(2, n, heads, head_dim) for n in lengths]

    def run(to: torch.dtype | None) -> list[Tensor]:
        """to: the reference's dtype, None: the kernels."""
        leaves = [x.to(device, to).detach().requires_grad_() for x in (*qkv, *weights, *biases)]
        S = len(lengths)
        q, k, v = zip(*(x.unbind(2) for x in leaves[:S]))
        pairs = list(zip(leaves[S:2 * S], leaves[2 * S:3 * S])) if norm else None
        joined = torch.cat(leaves[3 * S:], dim=1) if bias else None
        # not joint_attention under dispatch.force, which holds for every thread: others may be at work
        out = (_plain if to else _triton)(list(q), list(k), list(v), range(S), pairs, 1e-6, joined, None)
        sum((o.to(torch.float64) * t.to(device)).sum() for o, t in zip(out, towards)).backward()
        return [*(o.detach() for o in out), *(x.grad for x in leaves if x.grad is not None)]

    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        exact, got, again = run(torch.float64), run(None), run(None)
    if not all(torch.equal(a, b) for a, b in zip(got, again)):
        return math.inf
    errors = [relative_error(a, b) for a, b in zip(got, exact)]
    return math.inf if any(math.isnan(e) for e in errors) else max(errors) / BOUNDS[dtype]


def relative_error(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value of b; where b is 0 throughout, a must be."""
    difference, size = (x.abs().max().item() if x.numel() else 0.0 for x in (a.double() - b, b))
    return difference / size if size else (0.0 if difference == 0 else math.inf)


def self_check(device: torch.device, dtype: torch.dtype, head_dim: int, streams: int, norm: bool,
               bias: bool, short: bool) -> float:
    """What dispatch asks before such kernels run for the first time on a device."""
    lengths = (SHORT, 24, 33, 5) if short else (515, 77, 128, 64)
    return worst_error(device, dtype, head_dim, norm, bias, lengths[:streams])
