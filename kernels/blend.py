"""A step of a sampler, all of it, in one pass over memory.

    v   = w_1 v_1 + w_2 v_2 + w_3 v_3              guidance over one to three predictions
    y   = x + (t' - t) v                           Euler from t to t'
    y   = (x_start + y) / 2                        Heun: the Euler step of its second evaluation, averaged
    out = m y + (1 - m) ((1 - t') known + t' noise)

The last line puts the known region back at the next step's noise level, m = 1 regenerate, 0 keep; soft values
interpolate (RePaint; Blended Latent Diffusion; UltraEdit's region edits). What is absent is skipped.

Heun's x + (t' - t) (v(x, t) + v(y, t')) / 2 is the mean of x and y + (t' - t) v(y, t') when y is the Euler
step from x: written so, its first velocity need not be kept.

Everything is computed in fp32 in the order written and rounded once, at the end. The kernels forbid fused
multiply-add, which costs nothing here, so that a GPU gives the bits of the reference.
"""

import torch
from torch import Tensor

from kernels.dispatch import jit, tl, triton, use_triton

BLOCK = 1024
WARPS = 2 if torch.version.hip else 4  # 128 threads of 8 values: 128-bit accesses for two-byte types too


def masked_step_ref(x: Tensor, v: list[Tensor], weights: list[float], dt, rest, level,
                    start: Tensor | None = None, known: Tensor | None = None, noise: Tensor | None = None,
                    mask: Tensor | None = None) -> Tensor:
    """The plain version; dt = t' - t, rest = 1 - t', level = t', floats or [B, 1, 1, 1]. fp64 stays fp64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = weights[0] * v[0].to(wide)
    for weight, p in zip(weights[1:], v[1:]):
        total = total + weight * p.to(wide)
    y = x.to(wide) + dt * total
    if start is not None:
        y = 0.5 * (start.to(wide) + y)
    if mask is not None:
        m = mask.to(wide)
        y = m * y + (1 - m) * (rest * known.to(wide) + level * noise.to(wide))
    return y.to(x.dtype)


def masked_step_backward_ref(grad: Tensor, mask: Tensor | None, weights: list[float], dt, rest, level,
                             heun: bool, v_dtype: torch.dtype, needs: list[bool]) -> list[Tensor]:
    """What `grad` [B, C, H, W] is worth to x (and start), to every prediction, to known and to noise, in
    this order, each if `needs` says so."""
    g = grad.to(torch.promote_types(grad.dtype, torch.float32))
    m = 1.0 if mask is None else mask.to(g.dtype)
    gy = 0.5 * (m * g) if heun else m * g
    out = [gy.to(grad.dtype)] if needs[0] else []
    if needs[1]:
        gv = dt * gy
        out += [(w * gv).to(v_dtype) for w in weights]
    gk = (1 - m) * g if needs[2] or needs[3] else None
    return out + [(c * gk).to(grad.dtype) for c, need in ((rest, needs[2]), (level, needs[3])) if need]


####################################################################################################
# Triton
####################################################################################################

# A program has BLOCK pixels of one channel of one picture. A pointer that is None is gone at compile time.


@jit
def forward_kernel(out, x, start, v1, v2, v3, known, noise, mask, coefs, w1, w2, w3, dt, rest, level,
                   channels, pixels, BLOCK: tl.constexpr):
    blocks = (pixels + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // blocks
    picture = row // channels
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    at = row.to(tl.int64) * pixels + pixel
    if coefs is not None:
        dt = tl.load(coefs + 3 * picture)
        rest = tl.load(coefs + 3 * picture + 1)
        level = tl.load(coefs + 3 * picture + 2)
    y = tl.load(x + at, inside).to(tl.float32)
    v = w1 * tl.load(v1 + at, inside).to(tl.float32)
    if v2 is not None:
        v += w2 * tl.load(v2 + at, inside).to(tl.float32)
    if v3 is not None:
        v += w3 * tl.load(v3 + at, inside).to(tl.float32)
    y += dt * v
    if start is not None:
        y = 0.5 * (tl.load(start + at, inside).to(tl.float32) + y)
    if mask is not None:
        m = tl.load(mask + picture.to(tl.int64) * pixels + pixel, inside).to(tl.float32)
        k = rest * tl.load(known + at, inside).to(tl.float32)
        k += level * tl.load(noise + at, inside).to(tl.float32)
        y = m * y + (1 - m) * k
    tl.store(out + at, y.to(out.dtype.element_ty), inside)


@jit
def backward_kernel(grad, mask, coefs, gx, gv1, gv2, gv3, gknown, gnoise, w1, w2, w3, dt, rest, level,
                    channels, pixels, HEUN: tl.constexpr, BLOCK: tl.constexpr):
    blocks = (pixels + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // blocks
    picture = row // channels
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    at = row.to(tl.int64) * pixels + pixel
    if coefs is not None:
        dt = tl.load(coefs + 3 * picture)
        rest = tl.load(coefs + 3 * picture + 1)
        level = tl.load(coefs + 3 * picture + 2)
    g = tl.load(grad + at, inside).to(tl.float32)
    gy = g
    if mask is not None:
        m = tl.load(mask + picture.to(tl.int64) * pixels + pixel, inside).to(tl.float32)
        gy = m * g
        gk = (1 - m) * g
        if gknown is not None:
            tl.store(gknown + at, (rest * gk).to(gknown.dtype.element_ty), inside)
        if gnoise is not None:
            tl.store(gnoise + at, (level * gk).to(gnoise.dtype.element_ty), inside)
    if HEUN:
        gy = 0.5 * gy
    if gx is not None:
        tl.store(gx + at, gy.to(gx.dtype.element_ty), inside)
    gv = dt * gy
    if gv1 is not None:
        tl.store(gv1 + at, (w1 * gv).to(gv1.dtype.element_ty), inside)
    if gv2 is not None:
        tl.store(gv2 + at, (w2 * gv).to(gv2.dtype.element_ty), inside)
    if gv3 is not None:
        tl.store(gv3 + at, (w3 * gv).to(gv3.dtype.element_ty), inside)


def _launch(kernel, like: Tensor, *args, **constants) -> None:
    """One program per BLOCK pixels of a channel. The guard: `like` need not be on the current GPU."""
    b, c, h, w = like.shape
    with torch.cuda.device_of(like):
        kernel[(b * c * triton.cdiv(h * w, BLOCK),)](
            *args, c, h * w, **constants, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False)


def _padded(x: list, absent=None) -> list:
    return [*x, absent, absent, absent][:3]


def _contiguous(*x: Tensor | None) -> list[Tensor | None]:
    return [None if z is None else z.contiguous() for z in x]


def masked_step_triton(x, v, weights, coef, coefs, start, known, noise, mask) -> Tensor:
    """Inputs that are not contiguous are copied first."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tensors = _contiguous(x, start, *_padded(v), known, noise, mask, coefs)
    if out.numel():
        _launch(forward_kernel, out, out, *tensors, *_padded(weights, 0.0), *coef)
    return out


def masked_step_backward_triton(grad, mask, weights, coef, coefs, heun, v_dtype, needs) -> list[Tensor]:
    def new(dtype):
        return torch.empty(grad.shape, dtype=dtype, device=grad.device)

    gx, gknown, gnoise = (new(grad.dtype) if needs[i] else None for i in (0, 2, 3))
    gv = [new(v_dtype) for _ in weights] if needs[1] else []
    tensors = _contiguous(grad, mask, coefs)
    if grad.numel():
        _launch(backward_kernel, grad, *tensors, gx, *_padded(gv), gknown, gnoise,
                *_padded(weights, 0.0), *coef, HEUN=heun)
    return [z for z in (gx, *gv, gknown, gnoise) if z is not None]


####################################################################################################
# The operation
####################################################################################################


def self_test(device: torch.device, dtype: torch.dtype, head_dim: int = 0) -> float:
    """Kernels against the reference on this device, odd sizes: largest error over a rounding of dtype."""
    g = torch.Generator().manual_seed(0)
    x, start, known, noise, grad, *v = torch.randn(8, 2, 3, 37, 41, generator=g).to(device, dtype)
    mask = torch.rand(2, 1, 37, 41, generator=g).to(device, dtype)
    weights, coefs = [3.0, -1.5, -0.5], torch.tensor([[-0.3, 0.4, 0.6], [-0.1, 0.9, 0.1]], device=device)
    columns = _columns([], coefs)
    got = [masked_step_triton(x, v, weights, [0.0] * 3, coefs, start, known, noise, mask),
           *masked_step_backward_triton(grad, mask, weights, [0.0] * 3, coefs, True, dtype, [True] * 4)]
    want = [masked_step_ref(x, v, weights, *columns, start, known, noise, mask),
            *masked_step_backward_ref(grad, mask, weights, *columns, True, dtype, [True] * 4)]
    worst = max(((a.double() - b.double()).abs().max() / b.abs().max()).item() for a, b in zip(got, want))
    return worst / torch.finfo(dtype).eps


def _use_triton(x: Tensor) -> bool:
    return use_triton("masked_step", x, check=self_test, fits=x.dtype != torch.float64)


def _columns(coef: list[float], coefs: Tensor | None):
    """dt, 1 - t', t' as numbers, or as [B, 1, 1, 1] each from coefs [B, 3]."""
    return coef if coefs is None else coefs.view(-1, 3, 1, 1, 1).unbind(1)


@torch.library.custom_op("kernels::masked_step", mutates_args=())
def masked_step_op(x: Tensor, v: list[Tensor], weights: list[float], coef: list[float], coefs: Tensor | None,
                   start: Tensor | None, known: Tensor | None, noise: Tensor | None,
                   mask: Tensor | None) -> Tensor:
    if _use_triton(x):
        return masked_step_triton(x, v, weights, coef, coefs, start, known, noise, mask)
    return masked_step_ref(x, v, weights, *_columns(coef, coefs), start, known, noise, mask).contiguous()


@torch.library.custom_op("kernels::masked_step_backward", mutates_args=())
def masked_step_backward_op(grad: Tensor, mask: Tensor | None, weights: list[float], coef: list[float],
                            coefs: Tensor | None, heun: bool, v_dtype: torch.dtype,
                            needs: list[bool]) -> list[Tensor]:
    if _use_triton(grad):
        return masked_step_backward_triton(grad, mask, weights, coef, coefs, heun, v_dtype, needs)
    out = masked_step_backward_ref(grad, mask, weights, *_columns(coef, coefs), heun, v_dtype, needs)
    return [z.contiguous() for z in out]


@masked_step_op.register_fake
def _(x, v, weights, coef, coefs, start, known, noise, mask):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@masked_step_backward_op.register_fake
def _(grad, mask, weights, coef, coefs, heun, v_dtype, needs):
    dtypes = [grad.dtype] * needs[0] + [v_dtype] * (needs[1] * len(weights)) + [grad.dtype] * sum(needs[2:])
    return [torch.empty(grad.shape, dtype=d, device=grad.device) for d in dtypes]


def _save(ctx, inputs, output):
    x, v, ctx.weights, ctx.coef, coefs, start, known, noise, mask = inputs
    ctx.heun, ctx.v_dtype = start is not None, v[0].dtype
    ctx.save_for_backward(mask, coefs)


def _backward(ctx, grad):
    wants = ctx.needs_input_grad  # of the inputs in order; v is a list of its own
    if wants[8] or wants[4]:
        raise NotImplementedError("masked_step has no gradient for the mask or the times: detach them")
    mask, coefs = ctx.saved_tensors
    needs = [wants[0] or wants[5], any(wants[1]), wants[6], wants[7]]
    parts = iter(masked_step_backward_op(grad, mask, ctx.weights, ctx.coef, coefs, ctx.heun, ctx.v_dtype,
                                         needs))
    gx = next(parts) if needs[0] else None
    gv = [next(parts) for _ in ctx.weights] if needs[1] else [None] * len(ctx.weights)
    gknown, gnoise = (next(parts) if need else None for need in needs[2:])
    return gx, gv, None, None, None, gx if ctx.heun else None, gknown, gnoise, None


masked_step_op.register_autograd(_backward, setup_context=_save)


def masked_step(x: Tensor, v: list[Tensor], t: Tensor | float, t_next: Tensor | float,
                weights: list[float] | None = None, start: Tensor | None = None, known: Tensor | None = None,
                noise: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """One step of a sampler from t to t_next -> [B, C, H, W] in x's dtype, contiguous.

    x [B, C, H, W]: what the predictions v, a list of one to three of its shape and one dtype, were made for;
    weights: their guidance weights (flow.dual_weights), by default 1 for a single one. t, t_next in [0, 1],
    numbers or [B]. start: Heun's second evaluation, x being the Euler step from start. known, noise
    [B, C, H, W] and mask [B, 1, H, W] in [0, 1], 1 = regenerate: all or none.

    fp32, bf16, fp16, mixed as they come; computed in fp32. Differentiable in x, v, start, known and noise.
    """
    weights = [1.0] if weights is None else [float(w) for w in weights]
    _check(x, v, weights, start, known, noise, mask)
    coef, coefs = [0.0, 0.0, 0.0], None
    if torch.is_tensor(t) or torch.is_tensor(t_next):
        wide = torch.promote_types(x.dtype, torch.float32)
        t, t_next = (torch.as_tensor(z, dtype=wide, device=x.device).expand(len(x)) for z in (t, t_next))
        coefs = torch.stack([t_next - t, 1 - t_next, t_next], 1)
    else:
        coef = [float(t_next - t), float(1 - t_next), float(t_next)]
    return masked_step_op(x, list(v), weights, coef, coefs, start, known, noise, mask)


def _check(x, v, weights, start, known, noise, mask) -> None:
    """What the kernels take for granted: they would read past the end of a smaller tensor."""
    region = [z for z in (known, noise, mask) if z is not None]
    if not 1 <= len(v) == len(weights) <= 3 or len(region) not in (0, 3):
        raise ValueError(f"masked_step: {len(v)} predictions with {len(weights)} weights, {len(region)} of "
                         "known, noise, mask: give one to three, as many, and all or none")
    if any(z.shape != x.shape for z in (*v, *region[:2], *([] if start is None else [start]))):
        raise ValueError(f"masked_step: not all of x's shape {tuple(x.shape)}")
    if region and mask.shape != (len(x), 1, *x.shape[2:]):
        raise ValueError(f"masked_step: mask {tuple(mask.shape)} for x {tuple(x.shape)}: give [B, 1, H, W]")
    if len({z.dtype for z in v}) > 1 or start is not None and start.dtype != x.dtype:
        raise ValueError("masked_step: predictions of one dtype, start in x's")
