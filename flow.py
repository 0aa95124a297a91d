"""Rectified flow, as pure functions. This file owns the convention; everything else points here.

    x_t = (1 - t) x_0 + t noise        t in [0, 1]: 0 is the picture, 1 is noise
    v   = noise - x_0                  what the network predicts, so x_0 = x_t - t v

A *paper step* k of T (ByteEdit counts T = 20 down to 1) is the time shift(k / T). Networks enter as callables
`denoise(x, t) -> v` with t [B]; under guidance v is left as a weighted sum, `Guided`. Nothing here touches
gradients or autocast: sample.py wraps its calls in inference mode, train_pefl.py runs some of them without
gradient and one with.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import masked_step


class Guided(NamedTuple):
    """v = sum of weights * predictions (one to three, [B, C, H, W]), which euler_step adds up as it goes."""

    predictions: list[Tensor]
    weights: list[float]


Denoise = Callable[[Tensor, Tensor], Tensor | Guided]


def bcast(t: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return t.view(-1, 1, 1, 1)


# ---- times ---------------------------------------------------------------------------------------


def shift_t(t: Tensor | float, shift: float) -> Tensor | float:
    """Move times towards noise: s t / (1 + (s - 1) t); s = 1 leaves them, SD3 uses 3 at 1024 x 1024.

    Esser et al. 2024, Eq. 23.
    """
    return shift * t / (1 + (shift - 1) * t)


def sample_t(u: Tensor, kind: str = "logit_normal", shift: float = 1.0) -> Tensor:
    """Training times from uniform draws u [B] in [0, 1) -> t [B].

    "logit_normal": t = sigmoid(normal), dense in the middle (Esser et al. 2024, Sec. 3.1); "uniform": t = u.
    Then shifted.
    """
    if kind == "logit_normal":
        u = torch.sigmoid(torch.special.ndtri(u.double().clamp(1e-6, 1 - 1e-6))).to(u.dtype)
    elif kind != "uniform":
        raise SystemExit(f"error: unknown timestep density {kind!r}: use 'logit_normal' or 'uniform'")
    return shift_t(u, shift)


def step_time(k: Tensor | int, T: int, shift: float = 1.0) -> Tensor | float:
    """Time of paper step k of T: k = T is pure noise, k = 0 the picture."""
    return shift_t(k / T, shift)


def timesteps(n: int, shift: float = 1.0, start: int | None = None, stop: int = 0) -> list[float]:
    """Times of the paper steps start, start - 1, ..., stop of n; by default from 1 (noise) to 0 (picture)."""
    start = n if start is None else start
    return [float(step_time(k, n, shift)) for k in range(start, stop - 1, -1)]


def t_from_logsnr(s: float) -> float:
    """Time of a log-SNR s = 2 ln((1 - t) / t)."""
    return 1 / (1 + math.exp(s / 2))


def edm_times(n: int, start: float, sigma_min: float = 0.03, rho: float = 7.0) -> list[float]:
    """n steps from time `start` to 0 as Karras et al. 2022 space them (Eq. 5), n + 1 times.

    The noise levels sigma = t / (1 - t) are even in sigma^(1/rho) from that of `start` to sigma_min; then 0.
    Karras' sigma_min is .002; .03, the least that SDXL knows, wastes fewer of some twenty steps.
    """
    if not 0 < start < 1 or start / (1 - start) <= sigma_min:
        raise SystemExit(f"error: a Karras schedule from t = {start:g}: start below 1 and above "
                         f"t = {sigma_min / (1 + sigma_min):.3g}")
    a, b = (start / (1 - start)) ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = [(a + i / max(1, n - 1) * (b - a)) ** rho for i in range(n)]
    return [start, *(s / (1 + s) for s in sigmas[1:]), 0.0]


# ---- the path ------------------------------------------------------------------------------------


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t [B, C, H, W] from x0, noise [B, C, H, W] and t [B]."""
    return (1 - bcast(t)) * x0 + bcast(t) * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    return noise - x0


def x0_from_v(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The picture that x_t and v imply, in fp32: the one-step prediction PeFL's rewards look at."""
    return x.float() - bcast(t).float() * v.float()


# ---- guidance ------------------------------------------------------------------------------------


def text_weights(guidance: float) -> dict[str, float]:
    """Rows that guidance of the text has to evaluate, and what each is multiplied by: v(null) + g (v(text) -
    v(null)). A row of weight zero is left out."""
    rows = {"both": guidance, "none": 1 - guidance}
    return {name: float(weight) for name, weight in rows.items() if weight}


def dual_weights(guidance: float, image_guidance: float) -> dict[str, float]:
    """Rows that dual guidance has to evaluate, in order, and what each is multiplied by.

    InstructPix2Pix (Brooks et al. 2023, Eq. 3) with text scale s_T = guidance and image scale s_I:
        v = v(null) + s_I (v(image) - v(null)) + s_T (v(image, text) - v(image))
          = s_T v(image, text) + (s_I - s_T) v(image) + (1 - s_I) v(null)
    A row of weight zero is left out: (image, text) at s_T = 0, image at s_I = s_T, null at s_I = 1. So 1, 1
    is one row, and s_T = 1 alone saves nothing.
    """
    rows = {"both": guidance, "image": image_guidance - guidance, "none": 1 - image_guidance}
    return {name: float(weight) for name, weight in rows.items() if weight}


def guide(denoise_rows: Callable[[Tensor, Tensor], Tensor], weights: dict[str, float]) -> Denoise:
    """Classifier-free guidance, one evaluation a step.

    `denoise_rows` gets x and t of B pictures once for each of `weights` (text_weights or dual_weights),
    [n B, ...] in its order, and returns v [n B, C, H, W].
    """
    n = len(weights)

    def denoise(x: Tensor, t: Tensor) -> Guided:
        return Guided(list(denoise_rows(x.repeat(n, 1, 1, 1), t.repeat(n)).chunk(n)), list(weights.values()))

    return denoise


# ---- samplers ------------------------------------------------------------------------------------


def euler_step(x: Tensor, v: Tensor | Guided, t: Tensor | float, t_next: Tensor | float,
               start: Tensor | None = None, known: Tensor | None = None, noise: Tensor | None = None,
               mask: Tensor | None = None) -> Tensor:
    """x + (t_next - t) v [B, C, H, W], in x's dtype; t, t_next numbers or [B] (torch.compile: numbers become
    part of the graph).

    start: the mean of this and start, which makes it Heun's second half. With known, noise, mask the known
    region is then put back at t_next. All of it is one operation, kernels.masked_step.
    """
    predictions, weights = v if isinstance(v, Guided) else ([v], [1.0])
    return masked_step(x, predictions, t, t_next, weights, start, known, noise, mask)


SOLVERS = ("euler", "heun", "dpm")


def multistep(x: Tensor, v: Tensor | Guided, t: float, t_next: float, past: tuple[Tensor, float] | None) \
        -> tuple[Tensor, tuple[Tensor, float]]:
    """DPM-Solver++(2M) as the velocity with which an Euler step from t to t_next makes its step.

    With l = ln((1 - t) / t), h = l(t_next) - l(t) and the predicted pictures D of this step and D_old of the
    one before, over which l grew by r h:
        x(t_next) = t_next / t x + (1 - t_next) (1 - exp(-h)) D',    D' = D + (D - D_old) / (2 r)
    Its first term and factor are those of (x - D') / t, Euler's, exactly: on this path the first order is
    Euler, and the second changes the picture it heads for. past: D_old and r h, or None. First order where h
    or r h is not finite: from t = 1, the step after that, and to t = 0.
    -> the velocity, and this step's past.
    """
    if isinstance(v, Guided):
        v = sum(w * p.to(x.dtype) for w, p in zip(v.weights, v.predictions))
    D = x - t * v.to(x.dtype)
    if t == 1 or t_next == 0:
        return (x - D) / t, None
    h = math.log((1 - t_next) / t_next) - math.log((1 - t) / t)
    ahead = D if past is None else D + (D - past[0]) * (h / (2 * past[1]))
    return (x - ahead) / t, (D, h)


def sample(denoise: Denoise, x: Tensor, ts: list[float], solver: str = "euler",
           known: Tensor | None = None, noise: Tensor | None = None, mask: Tensor | None = None,
           alternate: bool = False) -> Tensor:
    """Integrate dx/dt = v from ts[0] to ts[-1].

    x: [B, C, H, W] at time ts[0], kept in fp32. solver: "euler"; "heun" (second order: two evaluations a
    step, the last step to t = 0 is Euler's); "dpm": DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2; second
    order, one evaluation a step). With known, noise [B, C, H, W] and mask [B, 1, H, W]
    (1 = regenerate) every step puts the known region back at its noise level. -> x at ts[-1].

    alternate: only every second step does, as in UltraEdit's region edits (Algorithm 1; known = the source,
    mask soft), and the model settles the seam in between. Its paper blends where t mod 2 = 0, t counting
    down; its code, which made its data, after steps 1, 3, 5, ... counted from 0, and so does this. The two
    agree for an odd number of steps. An even number ends with a blend: what the mask keeps is then the source
    itself; after an odd number the last step is free.
    """
    if solver not in SOLVERS:
        raise SystemExit(f"error: unknown solver {solver!r}: use one of {', '.join(SOLVERS)}")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    past = None  # of dpm: the step before's picture, and how much ln((1 - t) / t) it gained
    for i, (t, t_next) in enumerate(zip(ts[:-1], ts[1:])):
        here, there = (x.new_full((len(x),), s) for s in (t, t_next))
        keep = mask is not None and not (alternate and i % 2 == 0)
        region = dict(known=known, noise=noise, mask=mask) if keep else {}
        if solver == "dpm":
            v, past = multistep(x, denoise(x, here), t, t_next, past)
            x = euler_step(x, v, t, t_next, **region)
        elif solver == "euler" or t_next == 0:
            x = euler_step(x, denoise(x, here), t, t_next, **region)
        else:
            y = euler_step(x, denoise(x, here), t, t_next)
            x = euler_step(y, denoise(y, there), t, t_next, start=x, **region)
    return x
