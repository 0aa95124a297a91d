"""Rectified flow: the convention, the paper's steps, time densities, solvers, guidance, the blend."""

import math

import pytest
import torch

import flow
from kernels import masked_step


def pictures(n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, n, 3, 8, 8, generator=g)
    return x0, noise, torch.rand(n, generator=g)


# ---- the path ------------------------------------------------------------------------------------


def test_ends_of_the_path():
    x0, noise, _ = pictures()
    assert torch.equal(flow.interpolate(x0, noise, torch.zeros(4)), x0)
    assert torch.equal(flow.interpolate(x0, noise, torch.ones(4)), noise)


def test_velocity_is_the_derivative_and_gives_x0_back():
    x0, noise, t = pictures()
    x = flow.interpolate(x0, noise, t)
    v = flow.velocity(x0, noise)
    assert torch.allclose(flow.interpolate(x0, noise, t + 0.1), x + 0.1 * v, atol=1e-6)
    assert torch.allclose(flow.x0_from_v(x, v, t), x0, atol=1e-6)
    assert flow.x0_from_v(x.bfloat16(), v.bfloat16(), t).dtype == torch.float32


# ---- times ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_shift_fixes_the_ends_rises_and_is_undone_by_its_inverse(shift):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    s = flow.shift_t(t, shift)
    assert s[0] == 0 and s[-1] == 1 and (s.diff() > 0).all()
    assert torch.allclose(flow.shift_t(s, 1 / shift), t, atol=1e-12)
    assert shift != 1 or torch.equal(s, t)
    assert flow.shift_t(0.5, 3.0) == 0.75


def test_timesteps_run_from_noise_to_picture():
    for n, shift in ((1, 1.0), (20, 1.0), (28, 3.0)):
        ts = flow.timesteps(n, shift)
        assert len(ts) == n + 1 and ts[0] == 1.0 and ts[-1] == 0.0
        assert all(a > b for a, b in zip(ts, ts[1:]))


@pytest.mark.parametrize("T, T1, T2", [(20, 15, 10), (8, 6, 3)])
def test_paper_steps(T, T1, T2):
    """ByteEdit counts T down to 1: both phases start from three quarters of the noise."""
    assert flow.step_time(T, T) == 1 and flow.step_time(0, T) == 0
    assert flow.step_time(T1, T) == 0.75
    assert flow.step_time(T2, T) == (0.5 if T == 20 else 0.375)
    down = flow.timesteps(T, start=T1, stop=T2)
    assert down == [k / T for k in range(T1, T2 - 1, -1)]
    assert flow.timesteps(T, start=T1) == flow.timesteps(T)[T - T1:]  # the same grid, entered later
    k = torch.randint(1, T2 + 1, (100,))
    assert torch.equal(flow.step_time(k, T), k / T)
    assert flow.step_time(T1, T, 3.0) == pytest.approx(0.9)


def test_logit_normal_density():
    """P(t < sigmoid(z)) is the normal distribution function of z (Esser et al. 2024, Sec. 3.1)."""
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    t = flow.sample_t(u)
    assert t.dtype == u.dtype and 0 < t.min() and t.max() < 1
    for z in (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0):
        share = (t < 1 / (1 + math.exp(-z))).float().mean().item()
        assert share == pytest.approx(0.5 * (1 + math.erf(z / math.sqrt(2))), abs=0.006)  # 4 standard errors
    assert flow.sample_t(torch.tensor([0.0, 1 - 2**-24])).isfinite().all()


def test_other_densities():
    u = torch.rand(10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(flow.sample_t(u, "uniform"), u)
    assert torch.equal(flow.sample_t(u, "uniform", 3.0), flow.shift_t(u, 3.0))
    assert (flow.sample_t(u, shift=3.0) > flow.sample_t(u)).all()
    with pytest.raises(SystemExit, match="error: .*'cosine'"):
        flow.sample_t(u, "cosine")


def test_log_snr():
    for t in (0.01, 0.3, 0.5, 0.99):
        assert flow.t_from_logsnr(2 * math.log((1 - t) / t)) == pytest.approx(t)
    assert flow.t_from_logsnr(-4.649) == pytest.approx(0.9109, abs=1e-4)


# ---- solvers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("n", [1, 3, 20])
def test_a_straight_flow_is_solved_exactly(solver, n):
    x0, noise, _ = pictures()
    x = flow.sample(lambda x, t: noise - x0, noise, flow.timesteps(n, 3.0), solver)
    assert torch.allclose(x, x0, atol=1e-5)


def curved(x, t):
    """Velocity of the flow that carries N(0, 1) to N(0, 1/4): x_t = x_1 s(t), s(t)^2 = (1-t)^2/4 + t^2."""
    t = flow.bcast(t)
    return x * (t - (1 - t) / 4) / ((1 - t) ** 2 / 4 + t**2)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver, order):
    """Stops at t = 0.25, where the exact scale is known: heun's last step, to 0, is Euler's by design."""
    x = torch.ones(1, 1, 1, 1)
    exact = math.sqrt(0.75**2 / 4 + 0.25**2)
    errors = [abs(flow.sample(curved, x, flow.timesteps(n, stop=n // 4), solver).item() - exact)
              for n in (8, 16, 32)]
    for coarse, fine in zip(errors, errors[1:]):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def test_heun_is_better_to_the_end_and_costs_two_calls_a_step():
    x, calls = torch.ones(1, 1, 1, 1), []

    def counted(x, t):
        calls.append(t.item())
        return curved(x, t)

    err = {}
    for solver in ("euler", "heun"):
        calls.clear()
        err[solver] = abs(flow.sample(counted, x, flow.timesteps(16), solver).item() - 0.5)
        assert len(calls) == (16 if solver == "euler" else 31) and min(calls) > 0
    assert err["heun"] < err["euler"] / 2
    with pytest.raises(SystemExit, match="error: .*'ddim'"):
        flow.sample(curved, x, [1.0, 0.0], "ddim")


def test_one_step_of_euler_from_any_time_is_the_x0_prediction():
    x, v, _ = pictures()
    for t in (1.0, 0.75, 0.1):
        assert torch.allclose(flow.euler_step(x, v, t, 0.0), flow.x0_from_v(x, v, torch.full((4,), t)))


def test_sampling_stays_in_fp32():
    x = flow.sample(lambda x, t: (0.1 * x).bfloat16(), torch.randn(1, 3, 4, 4).bfloat16(), flow.timesteps(4))
    assert x.dtype == torch.float32


def test_gradients_flow_through_sampling():
    weight = torch.tensor(0.5, requires_grad=True)
    known, noise, _ = pictures(1)
    start = noise.clone().requires_grad_()
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    x = flow.sample(lambda x, t: weight * x, start, flow.timesteps(4), "euler", known, noise, mask)
    x.sum().backward()
    assert weight.grad.abs() > 0 and start.grad[..., :4].abs().min() > 0
    assert start.grad[..., 4:].abs().max() == 0  # the known region ends as it is


# ---- the known region ----------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_known_region_is_kept_exactly(solver):
    known, noise, _ = pictures()
    mask = (torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(3)) > 0.5).float()
    x = flow.sample(lambda x, t: 3 * x + 1, noise, flow.timesteps(5), solver, known, noise, mask)
    keep = mask.expand_as(x) == 0
    assert torch.equal(x[keep], known[keep])
    assert (x[~keep] - known[~keep]).abs().mean() > 0.1


def test_known_region_stands_at_its_noise_level_on_the_way():
    known, noise, _ = pictures()
    seen = []

    def denoise(x, t):
        seen.append((x, t))
        return torch.zeros_like(x)

    flow.sample(denoise, noise, flow.timesteps(4), "euler", known, noise, torch.zeros(4, 1, 8, 8))
    for x, t in seen:
        assert torch.allclose(x, flow.interpolate(known, noise, t), atol=1e-6)


def test_soft_masks_interpolate():
    known, noise, t = pictures()
    x, mask = torch.randn(4, 3, 8, 8), torch.rand(4, 1, 8, 8)

    def blend(x, mask, t):
        return masked_step(x, [torch.zeros_like(x)], t, t, known=known, noise=noise, mask=mask)

    expected = mask * x + (1 - mask) * flow.interpolate(known, noise, t)
    assert torch.allclose(blend(x, mask, t), expected, atol=1e-6)
    assert torch.equal(blend(x, torch.ones_like(mask), t), x)
    assert torch.allclose(blend(x, mask, 0.3), blend(x, mask, torch.full((4,), 0.3)), atol=1e-6)
    assert blend(x.bfloat16(), mask, t).dtype == torch.bfloat16


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("n", [1, 4, 5])
def test_alternating_blend(solver, n):
    """UltraEdit's code: blended after steps 1, 3, ... from 0, the source at the next step's noise level."""
    known, noise, _ = pictures()
    mask = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    ts, seen = flow.timesteps(n, 2.0), []

    def denoise(x, t):
        seen.append((t[0].item(), x))
        return 2 * x - 1

    out = flow.sample(denoise, noise, ts, solver, known, noise, mask, alternate=True)
    x = noise  # by hand
    for i, (t, t_next) in enumerate(zip(ts[:-1], ts[1:])):
        free = flow.sample(lambda x, t: 2 * x - 1, x, [t, t_next], solver)
        source = flow.interpolate(known, noise, torch.full((4,), t_next))
        x = mask * free + (1 - mask) * source if i % 2 == 1 else free
        assert i + 1 == n or any(s == pytest.approx(t_next) and torch.allclose(y, x, atol=1e-5)
                                 for s, y in seen)
    assert torch.allclose(out, x, atol=1e-5)
    hard = flow.sample(denoise, noise, ts, solver, known, noise, torch.zeros_like(mask), alternate=True)
    assert torch.equal(hard, known) == (n % 2 == 0)  # an even number of steps ends with a blend
    always = flow.sample(denoise, noise, ts, solver, known, noise, mask)
    assert not torch.allclose(out, always, atol=1e-3)


# ---- guidance ------------------------------------------------------------------------------------


def added_up(v):
    """What a sampler makes of guidance's weighted predictions."""
    return flow.euler_step(torch.zeros_like(v.predictions[0]), v, 0.0, 1.0)


def guided_by(cond, null, guidance):
    weights = flow.text_weights(guidance)
    rows = torch.cat([{"both": cond, "none": null}[name] for name in weights])
    return flow.guide(lambda x, t: rows, weights)


def test_guidance_algebra():
    cond, null, t = pictures()
    for g, expected in ((0.0, null), (1.0, cond), (3.0, 3 * cond - 2 * null)):
        guided = added_up(guided_by(cond, null, g)(cond, t))
        assert torch.allclose(guided, expected, atol=1e-5)
    # guiding v and guiding the x0 it implies are the same
    x = torch.randn_like(cond)
    guided = flow.x0_from_v(x, added_up(guided_by(cond, null, 3.0)(x, t)), t)
    a, b = flow.x0_from_v(x, cond, t), flow.x0_from_v(x, null, t)
    assert torch.allclose(guided, b + 3 * (a - b), atol=1e-5)


@pytest.mark.parametrize("text, image, rows", [
    (7.5, 1.5, ["both", "image", "none"]), (1, 1.5, ["both", "image", "none"]),
    (1, 0, ["both", "image", "none"]), (3, 1, ["both", "image"]), (2, 2, ["both", "none"]),
    (0, 2, ["image", "none"]), (1, 1, ["both"]), (0, 1, ["image"]), (0, 0, ["none"])])
def test_dual_guidance(text, image, rows):
    """The formula as InstructPix2Pix writes it, from the rows that matter alone, in one evaluation."""
    v = dict(zip(("both", "image", "none"), torch.randn(3, 4, 3, 8, 8)))
    x, t = torch.randn(4, 3, 8, 8), torch.rand(4)
    weights, calls = flow.dual_weights(text, image), []

    def denoise_rows(xs, ts):
        calls.append(len(xs))
        assert torch.equal(xs, torch.cat([x] * len(rows))) and torch.equal(ts, torch.cat([t] * len(rows)))
        return torch.cat([v[name] for name in weights])

    naive = v["none"] + image * (v["image"] - v["none"]) + text * (v["both"] - v["image"])
    got = added_up(flow.guide(denoise_rows, weights)(x, t))
    assert list(weights) == rows and calls == [4 * len(rows)]
    assert torch.allclose(got, naive, atol=1e-5)
    assert len(rows) > 1 or torch.equal(got, v[rows[0]])


# ---- DPM-Solver++(2M), and times as Karras spaces them -------------------------------------------


def gaussian(m=0.7, s=0.4):
    """Pictures N(m, s^2), whose velocity is known, and where a point flows: v(x, t), end(x, t, u)."""
    def spread(t):
        return math.sqrt((1 - t) ** 2 * s**2 + t**2)

    def v(x, t):
        t = float(t[0])
        z = (x - (1 - t) * m) / spread(t)
        return -m + z * (t - (1 - t) * s**2) / spread(t)

    return v, lambda x, t, u: (1 - u) * m + (x - (1 - t) * m) / spread(t) * spread(u)


def solved(solver, n, start=0.911, stop=0.05):
    """Largest error at `stop` after n steps even in ln((1 - t) / t), in float64."""
    v, exact = gaussian()
    a, b = (math.log((1 - t) / t) for t in (start, stop))
    ts = [1 / (1 + math.exp(a + (b - a) * i / n)) for i in range(n + 1)]
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)
    got = flow.sample(v, x, ts, solver)
    assert got.dtype == torch.float64
    return float((got - exact(x, ts[0], ts[-1])).abs().max())


def test_dpm_is_of_second_order_and_euler_of_first():
    orders = {s: [math.log2(solved(s, n) / solved(s, 2 * n)) for n in (20, 40)] for s in ("euler", "dpm")}
    assert all(0.85 < p < 1.15 for p in orders["euler"]), orders
    assert all(1.85 < p < 2.2 for p in orders["dpm"]), orders
    assert solved("dpm", 20) < solved("euler", 20) / 10


def test_dpm_begins_and_ends_as_euler():
    """From t = 1 ln((1 - t) / t) grows by infinity: two steps, and the one to 0, are of first order."""
    v, exact = gaussian()
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)
    euler = flow.sample(v, x, [1.0, 0.8, 0.5])
    assert torch.allclose(flow.sample(v, x, [1.0, 0.8, 0.5], "dpm"), euler, atol=1e-12, rtol=0)
    far = flow.sample(v, x, flow.timesteps(40), "dpm") - exact(x, 1.0, 0.0)
    assert far.isfinite().all() and far.abs().max() < 0.01
    last = flow.sample(v, x, [0.5, 0.0], "dpm")
    assert torch.allclose(last, x - 0.5 * v(x, [0.5]))


def test_dpm_under_guidance_is_dpm_of_the_guided_velocity():
    v, _ = gaussian()
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)

    def rows(x, t):
        return torch.cat([v(part, t) * k for k, part in enumerate(x.chunk(2), 1)])

    ts = flow.edm_times(12, 0.911)
    guided = flow.sample(flow.guide(rows, {"both": 3.0, "none": -2.0}), x, ts, "dpm")
    assert torch.allclose(guided, flow.sample(lambda x, t: 3 * v(x, t) - 4 * v(x, t), x, ts, "dpm"))


def test_dpm_puts_the_known_region_back():
    x0, noise, _ = pictures(2)
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., 4:] = 1
    got = flow.sample(lambda x, t: x * 0.3, noise, flow.timesteps(5), "dpm", x0, noise, mask)
    assert torch.allclose(got[..., :4], x0[..., :4]) and not torch.allclose(got[..., 4:], x0[..., 4:])


def test_edm_times():
    """Entry 16 of Karras' list of 50 from 80 to .002 is the log-SNR at which the refinement paper begins."""
    start = flow.t_from_logsnr(-4.649)
    assert abs(start - 0.9109) < 1e-4
    whole = flow.edm_times(50, 80 / 81, sigma_min=0.002)
    assert len(whole) == 51 and whole[-1] == 0 and abs(whole[16] - start) < 1e-5
    ts = flow.edm_times(33, start)
    assert ts[0] == start and len(ts) == 34 and abs(ts[-2] / (1 - ts[-2]) - 0.03) < 1e-9
    assert all(a > b for a, b in zip(ts, ts[1:]))
    assert flow.edm_times(1, 0.5) == [0.5, 0.0]
    for start in (1.0, 0.01):
        with pytest.raises(SystemExit, match="Karras"):
            flow.edm_times(3, start)
