"""Joint attention: the Triton kernels, interpreted, and plain torch against the formula in fp64."""

import contextlib
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from kernels import attention, dispatch, joint_attention
from kernels.attention import relative_error
from kernels.selftest import widen_interpreted_dots

ROOT = Path(__file__).resolve().parents[1]
EPS = 1e-6

# dtype -> largest error of a result, of a gradient, relative to its largest value
TOLERANCE = {torch.float32: (2e-6, 5e-6), torch.float16: (2e-3, 4e-3), torch.bfloat16: (1.6e-2, 3e-2)}


@pytest.fixture(autouse=True)
def interpreter():
    if not dispatch.interpreted():
        pytest.skip("needs TRITON_INTERPRET=1 and Triton")
    widen_interpreted_dots()


####################################################################################################
# Cases and the formula
####################################################################################################


def case(lengths, asks=None, norm="", bias="", attends=None, layout="qkv", batch=2, heads=2, head_dim=64):
    """asks: streams with queries; norm: "all" streams, "some" (the first has only wk, the last only wq);
    bias: "finite", "-inf" (a third of the keys), "dead" (all keys of sample 0 as well); layout: in memory."""
    return dict(lengths=lengths, asks=asks or [True] * len(lengths), norm=norm, bias=bias, attends=attends,
                layout=layout, batch=batch, heads=heads, head_dim=head_dim)


CACHED = [[True, True, True], [True, True, True], [False, True, True]]  # the source sees text and itself
CASES = {
    "two streams": case((13, 50)),
    "one token each": case((1, 1), norm="all", bias="finite"),
    "one token and whole tiles": case((1, 64), norm="all", batch=1),
    "an empty stream": case((0, 40, 7), norm="all", bias="-inf", batch=1),
    "an empty last stream": case((33, 0), batch=1),
    "four streams": case((5, 33, 1, 32), norm="all", bias="-inf", heads=1),
    "a stream that lends": case((7, 40, 33), asks=[True, True, False], norm="some", heads=1),
    "only the last asks": case((40, 9), asks=[False, True], norm="all", heads=1),
    "norms": case((13, 50), norm="all"),
    "norms of some streams": case((13, 50), norm="some"),
    "bias": case((13, 50), bias="-inf"),
    "nothing to see in one sample": case((13, 40), norm="all", bias="dead", heads=1),
    "a stream mask": case((33, 5, 40), attends=CACHED, batch=1),
    "a stream mask, norms, bias": case((33, 5, 40), norm="all", bias="-inf", attends=CACHED, heads=1),
    "a stream that may see nothing": case((9, 40), attends=[[True, True], [False, False]], norm="all",
                                          heads=1),
    "heads first": case((13, 40), layout="heads first", norm="all"),
    "inner axis strided": case((13, 40), layout="inner"),
    "one text for all samples": case((13, 40), layout="expanded"),
    "heads of 128": case((13, 40), head_dim=128, batch=1),
    "heads of 128, norms, bias, mask": case((13, 33, 7), norm="all", bias="-inf", attends=CACHED, heads=1,
                                            batch=1, head_dim=128),
}


def build(c, dtype, seed=0):
    """-> leaves (fp64, values of `dtype`); a function leaves -> q, k, v, norm, bias for joint_attention."""
    g = torch.Generator().manual_seed(seed)
    S, H, D = len(c["lengths"]), c["heads"], c["head_dim"]
    shape = {"qkv": lambda n: (c["batch"], n, 3, H, D), "heads first": lambda n: (3, c["batch"], H, n, D),
             "inner": lambda n: (3, c["batch"], n, D, H), "expanded": lambda n: (1, n, 3, H, D)}[c["layout"]]
    leaves = [torch.randn(shape(n), generator=g).to(dtype).double() for n in c["lengths"]]
    weights = [(1 + 0.3 * torch.randn(D, generator=g)).double() for _ in range(2 * S)]
    biases = [2 * torch.randn(c["batch"], n, generator=g).double() for n in c["lengths"]]
    for b in biases:
        if c["bias"] in ("-inf", "dead"):
            b[:, 1::3] = -math.inf
        if c["bias"] == "dead":
            b[0] = -math.inf

    def arguments(leaves):
        xs, ws, bs = leaves[:S], leaves[S:3 * S], leaves[3 * S:]
        views = {"qkv": lambda x: x.unbind(2), "heads first": lambda x: x.transpose(2, 3).unbind(0),
                 "inner": lambda x: x.transpose(3, 4).unbind(0),
                 "expanded": lambda x: x.expand(c["batch"], -1, -1, -1, -1).unbind(2)}[c["layout"]]
        q, k, v = map(list, zip(*(views(x) for x in xs)))
        q = [x if ask else None for x, ask in zip(q, c["asks"])]
        norm = list(zip(ws[:S], ws[S:])) if c["norm"] else None
        if c["norm"] == "some":
            norm[0] = (None, norm[0][1])
            norm[-1] = (norm[-1][0], None)
        return q, k, v, norm, bs if c["bias"] else None

    return leaves + weights + biases, arguments


def formula(q, k, v, norm, bias, attends):
    """The docstring of kernels/attention.py, in fp64, a sample, head and stream at a time."""
    def normed(x, w):
        return x if w is None else w * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()

    if norm is not None:
        q = [None if x is None else normed(x, w[0]) for x, w in zip(q, norm)]
        k = [normed(x, w[1]) for x, w in zip(k, norm)]
    outs = []
    for i, x in enumerate(q):
        seen = [j for j in range(len(k)) if attends is None or attends[i][j]]
        if x is None or not seen:
            outs.append(None if x is None else torch.zeros_like(x))
            continue
        ks, vs = torch.cat([k[j] for j in seen], 1), torch.cat([v[j] for j in seen], 1)
        s = torch.einsum("bnhd,bmhd->bhnm", x, ks) / x.shape[-1] ** 0.5
        if bias is not None:
            s = s + torch.cat([bias[j] for j in seen], 1)[:, None, None]
        top = s.amax(-1, keepdim=True).detach().clamp(min=-1e300)
        e = (s - top).exp()
        p = e / e.sum(-1, keepdim=True).clamp(min=1e-300)  # over nothing: 0 / 1e-300
        outs.append(torch.einsum("bhnm,bmhd->bnhd", p, vs))
    return outs


def run(fn, leaves, arguments, dtype=torch.float64, narrow=0):
    """-> outputs, gradients of all leaves, under fixed random weights. The first `narrow` leaves get `dtype`,
    the others at least fp32."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [x.to(dtype if i < narrow else wide).clone().requires_grad_() for i, x in enumerate(leaves)]
    outs = [o for o in fn(*arguments(leaves)) if o is not None]
    g = torch.Generator().manual_seed(9)
    loss = sum((o.double() * torch.randn(o.shape, generator=g, dtype=torch.float64)).sum() for o in outs)
    loss.backward()
    return ([o.detach() for o in outs],
            [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves])


def compare(c, dtype, mode):
    """Largest relative errors of outputs and of gradients."""
    leaves, arguments = build(c, dtype)
    exact = run(lambda q, k, v, n, b: formula(q, k, v, n, b, c["attends"]), leaves, arguments)
    with dispatch.force(mode):
        got = run(lambda q, k, v, n, b: joint_attention(q, k, v, n, EPS, b, c["attends"]), leaves, arguments,
                  dtype, len(c["lengths"]))
    return [max(relative_error(a, b) for a, b in zip(*pair)) for pair in zip(got, exact)]


####################################################################################################
# Numbers
####################################################################################################


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_formula_in_fp32(name):
    forward, backward = compare(CASES[name], torch.float32, "triton")
    assert forward <= TOLERANCE[torch.float32][0] and backward <= TOLERANCE[torch.float32][1]


@pytest.mark.parametrize("name", CASES)
def test_plain_torch_equals_the_formula(name):
    assert max(compare(CASES[name], torch.float64, "reference")) < 1e-12
    forward, backward = compare(CASES[name], torch.float32, "reference")
    assert forward <= 2e-6 and backward <= 5e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["two streams", "a stream mask, norms, bias",
                                  "heads of 128, norms, bias, mask"])
def test_kernels_in_16_bits(name, dtype):
    forward, backward = compare(CASES[name], dtype, "triton")
    assert forward <= TOLERANCE[dtype][0] and backward <= TOLERANCE[dtype][1]
    assert forward > TOLERANCE[torch.float32][0]  # it did run in 16 bits


@pytest.mark.parametrize("drop", ["norm", "bias", "attends", "stream"])
def test_the_comparison_sees_what_is_left_out(drop):
    c = CASES["a stream mask, norms, bias"]
    leaves, arguments = build(c, torch.float32)

    def without(q, k, v, norm, bias):
        norm, bias = None if drop == "norm" else norm, None if drop == "bias" else bias
        attends = None if drop == "attends" else c["attends"]
        if drop == "stream":
            k, v = [k[0], k[0][:, :5], k[2]], [v[0], v[0][:, :5], v[2]]
        return joint_attention(q, k, v, norm, EPS, bias, attends)

    exact = run(lambda q, k, v, n, b: formula(q, k, v, n, b, c["attends"]), leaves, arguments)
    with dispatch.force("triton"):
        got = run(without, leaves, arguments, torch.float32, 3)
    assert all(max(relative_error(a, b) for a, b in zip(*pair)) > 1e-2 for pair in zip(got, exact))


def test_large_scores_and_outliers():
    """Scores of hundreds, of both signs (fp32: off by 2e-5): the running maximum, tiles far below it."""
    c = case((40, 50), heads=1)
    leaves, arguments = build(c, torch.float32)
    leaves[0][:, :, :2] *= 8
    leaves[1][:, 17, 1] *= -40
    exact = run(lambda q, k, v, n, b: formula(q, k, v, n, b, None), leaves, arguments)
    with dispatch.force("triton"):
        got = run(lambda q, k, v, n, b: joint_attention(q, k, v), leaves, arguments, torch.float32, 2)
    assert max(relative_error(a, b) for pair in zip(got, exact) for a, b in zip(*pair)) < 1e-4
    assert all(x.isfinite().all() for part in got for x in part)


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_rows_that_see_nothing_are_zero_and_give_no_gradient(mode):
    leaves, arguments = build(CASES["nothing to see in one sample"], torch.float32)
    with dispatch.force(mode):
        outs, grads = run(lambda *a: joint_attention(*a[:4], EPS, a[4]), leaves, arguments, torch.float32, 2)
    assert all((o[0] == 0).all() and (o[1] != 0).any() for o in outs)
    assert all((g[0] == 0).all() and (g[1] != 0).any() for g in grads[:2] + grads[6:])
    assert all(g.isfinite().all() for g in grads)


####################################################################################################
# Determinism, memory, torch.library
####################################################################################################


@pytest.mark.slow
def test_two_backwards_give_the_same_bits():
    leaves, arguments = build(CASES["a stream mask, norms, bias"], torch.float16)

    def fn(*a):
        return joint_attention(*a[:4], EPS, a[4], CACHED)

    with dispatch.force("triton"):
        a, b = (run(fn, leaves, arguments, torch.float16, 3) for _ in range(2))
    assert all(torch.equal(x, y) for pair in zip(a, b) for x, y in zip(*pair))


GUARD = 4096  # elements on either side: more than a tile's worth of rows


@pytest.mark.parametrize("name", ["an empty stream", "four streams", "heads of 128, norms, bias, mask"])
def test_nothing_is_written_outside_outputs_and_all_of_them_is(name, monkeypatch):
    buffers = []

    def guarded(x, *shape):
        shape, dtype = (shape, torch.float32) if shape else (x.shape, x.dtype)
        n = math.prod(shape)
        whole = torch.full((n + 2 * GUARD,), math.nan, dtype=dtype)
        buffers.append((whole, n))
        return whole[GUARD:GUARD + n].view(shape)

    def intact():
        return all(w[:GUARD].isnan().all() and w[GUARD + n:].isnan().all() for w, n in buffers)

    monkeypatch.setattr(attention, "_empty", guarded)
    c = CASES[name]
    leaves, arguments = build(c, torch.float32)
    with dispatch.force("triton"):
        run(lambda *a: joint_attention(*a[:4], EPS, a[4], c["attends"]), leaves, arguments, torch.float32,
            len(c["lengths"]))
    assert len(buffers) > 10 and intact()
    assert all(not w[GUARD:GUARD + n].isnan().any() for w, n in buffers)
    x = torch.randn(1, 6, 1, 64)  # and a kernel that writes a row more than its output has is caught
    attention._inverse_rms[(1, 1, 1)]((x,), (x.stride()[:3],), (6,), guarded(x, 1, 1, 5), 6, 1, EPS, NORMED=1,
                                      D=64, BLOCK=64)
    assert not intact()


def test_no_copy_of_strided_views(monkeypatch):
    """Views of the fused projection reach the kernels as they are; only a strided inner axis is copied."""
    seen = []
    real = attention._attend._opoverload

    def spy(q, k, v, *rest):
        seen.extend([*q, *k, *v])
        return real(q, k, v, *rest)

    monkeypatch.setattr(torch.ops.kernels, "joint_attention", spy)
    for layout, copied in (("qkv", False), ("heads first", False), ("expanded", False), ("inner", True)):
        leaves, arguments = build(case((5, 9), layout=layout), torch.float32)
        leaves = [x.float() for x in leaves]
        with dispatch.force("triton"):
            joint_attention(*arguments(leaves)[:3])
        mine = {x.untyped_storage().data_ptr() for x in leaves}
        assert all((x.untyped_storage().data_ptr() not in mine) == copied for x in seen)
        seen.clear()


def saved_bytes(mode, norm):
    """What a call keeps for its backward pass, the projections' outputs included."""
    c = case((150, 10), norm=norm, heads=1, batch=1)
    leaves, arguments = build(c, torch.float16)
    leaves = [x.to(torch.float16 if i < 2 else torch.float32).requires_grad_() for i, x in enumerate(leaves)]
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with dispatch.force(mode), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = joint_attention(*arguments(leaves)[:4])
    for x in (*leaves[:2], *out):  # the projections around it keep these in any case
        pack(x)
    return sum(x.nbytes() for x in kept.values())


@pytest.mark.parametrize("norm", ["", "all"])
def test_less_is_kept_for_the_backward_pass(norm, monkeypatch):
    monkeypatch.setattr(attention, "CPU_MATH_TOKENS", {})  # not against two products, which keep the scores
    assert saved_bytes("triton", norm) < 0.75 * saved_bytes("reference", norm)


@pytest.mark.parametrize("full", [False, True], ids=["plain", "norms, bias, mask"])
def test_opcheck(full):
    q, k, v = ([torch.randn(1, n, 1, 64, requires_grad=True) for n in (5, 34)] for _ in range(3))
    w, bias = ((torch.randn(2, 64, requires_grad=True) for _ in range(2)),
               torch.randn(1, 39, requires_grad=True)) if full else ((None, None), None)
    arguments = (q, k, v, *w, bias, *((3, 1, 0b1101) if full else (0, 0, -1)), EPS)
    torch.library.opcheck(torch.ops.kernels.joint_attention.default, arguments)


@pytest.mark.parametrize("mode, backend", [("triton", "aot_eager"), ("reference", "aot_eager"),
                                           pytest.param("reference", "inductor", marks=pytest.mark.slow),
                                           pytest.param("triton", "inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(mode, backend):
    torch._dynamo.reset()
    c = case((6, 33), norm="all", bias="-inf", attends=[[True, True], [False, True]])
    leaves, arguments = build(c, torch.float32)

    def fn(*a):
        return joint_attention(*a[:4], EPS, a[4], c["attends"])

    with dispatch.force(mode):
        eager = run(fn, leaves, arguments, torch.float32, 2)
        fn = torch.compile(fn, fullgraph=True, backend=backend)
        compiled = run(fn, leaves, arguments, torch.float32, 2)
    assert all(relative_error(a, b) < 2e-6 for pair in zip(compiled, eager) for a, b in zip(*pair))


def test_more_than_four_streams_are_refused():
    x = [torch.randn(1, 2, 1, 64)] * 5
    with pytest.raises(ValueError, match="up to 4 streams, got 5"):
        joint_attention(x, x, x)


@pytest.mark.parametrize("limit", [55, 56])
def test_a_cpu_joins_the_streams(limit, monkeypatch):
    """Without extras: two products up to so many keys, torch's fused kernel above. To the bit."""
    monkeypatch.setattr(attention, "CPU_MATH_TOKENS", {torch.float32: limit})
    g = torch.Generator().manual_seed(3)
    q, k, v = ([torch.randn(2, n, 3, 64, generator=g) for n in (16, 40)] for _ in range(3))
    qs, ks, vs = (torch.cat(x, 1).transpose(1, 2) for x in (q, k, v))
    plain = ((qs * 64**-0.5) @ ks.mT).softmax(-1) @ vs
    fused = torch.nn.functional.scaled_dot_product_attention(qs, ks, vs)
    assert not torch.equal(plain, fused)
    got = torch.cat(joint_attention(q, k, v), 1).transpose(1, 2)
    assert torch.equal(got, plain if limit == 56 else fused)


####################################################################################################
# Real tiles
####################################################################################################


@pytest.mark.parametrize("arch, head_dim", [("sm_90", 64), ("sm_90", 128), ("gfx942", 64),
                                            pytest.param("gfx942", 128, marks=pytest.mark.slow)])
def test_the_tiles_that_ship(arch, head_dim, monkeypatch):
    """Tiles of 128 with tails, as on the GPU: a stream of tails alone, one that has whole tiles too."""
    chosen = attention.tiles
    monkeypatch.setattr(attention, "tiles", lambda kernel, D, _, *longest: chosen(kernel, D, arch, *longest))
    c = case((77, 5, 131), norm="all", bias="-inf", attends=CACHED, batch=1, heads=1, head_dim=head_dim)
    forward, backward = compare(c, torch.float32, "triton")
    assert forward <= TOLERANCE[torch.float32][0] and backward <= TOLERANCE[torch.float32][1]


####################################################################################################
# Dispatch
####################################################################################################


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU as far as the decision sees one."""
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(dispatch, "newer_ptxas", lambda arch: (12, 8))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.delenv("KERNELS", raising=False)
    dispatch._decide.cache_clear()
    yield lambda check: dispatch._decide("attention", torch.device("cuda", 0), torch.bfloat16, 64, check)
    dispatch._decide.cache_clear()


def broken(*_):
    raise RuntimeError("illegal memory\naccess")


@pytest.mark.parametrize("check, answer, words", [
    (lambda *_: 0.5, True, "Triton on sm_90, self-test at 0.5 of its bound; ptxas 12.8 is known to"),
    (lambda *_: 2.0, False, "plain torch on sm_90, since the self-test is off by 2 times"),
    (lambda *_: math.nan, False, "plain torch"), (broken, False, "RuntimeError: illegal memory access")],
    ids=["passes", "off", "nan", "broken"])
def test_the_self_test_decides(hopper, capsys, monkeypatch, check, answer, words):
    assert hopper(check) is answer and hopper(check) is answer
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1  # once
    assert "TRITON_PTXAS_PATH" in said and "nvidia-cuda-nvcc" in said
    dispatch._decide.cache_clear()
    monkeypatch.setenv("KERNELS", "triton")
    if answer:
        assert hopper(check)
    else:
        with pytest.raises(SystemExit, match="error: KERNELS=triton: attention"):
            hopper(check)


def test_the_environment_decides(hopper, monkeypatch, capsys):
    monkeypatch.setenv("KERNELS", "reference")
    assert not hopper(lambda *_: 0.1) and "KERNELS=reference" in capsys.readouterr().err
    dispatch._decide.cache_clear()
    monkeypatch.setenv("KERNELS", "fast")
    with pytest.raises(SystemExit, match="error: KERNELS: 'fast': use one of auto, reference, triton"):
        hopper(lambda *_: 0.1)


def test_what_is_known_decides(hopper, monkeypatch, capsys):
    def asked(**more):
        return dispatch._decide("attention", torch.device("cuda", 0), torch.half, 128, lambda *_: 0.1, **more)

    assert not asked(fits=False) and "no kernel for these" in capsys.readouterr().err
    assert not asked(wins=False) and "faster for these" in capsys.readouterr().err
    dispatch._decide.cache_clear()
    monkeypatch.setenv("KERNELS", "triton")
    assert not asked(fits=False) and asked(wins=False)


@pytest.mark.parametrize("found, version", [(None, (12, 8)), (("/wheel/ptxas", (13, 1)), (12, 8)),
                                            (("/wheel/ptxas", (13, 5)), (13, 5))])
def test_a_safe_ptxas_of_the_wheel_is_taken_on_hopper(monkeypatch, found, version):
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")
    monkeypatch.delenv("TRITON_PTXAS_PATH")
    monkeypatch.setattr(dispatch, "_wheel_ptxas", lambda: found)
    bundled = dispatch.triton.knobs.nvidia.ptxas.version
    if dispatch._version(bundled) >= dispatch.SAFE_PTXAS:
        pytest.skip(f"this Triton brings ptxas {bundled}")
    dispatch.newer_ptxas.cache_clear()
    assert dispatch.newer_ptxas("sm_80") == dispatch._version(bundled)
    assert dispatch.newer_ptxas("sm_90") == (version if version[0] == 13 else dispatch._version(bundled))
    assert os.environ.get("TRITON_PTXAS_PATH") == ("/wheel/ptxas" if version[0] == 13 else None)
    assert dispatch.newer_ptxas("gfx942") == (0,)
    dispatch.newer_ptxas.cache_clear()


def small_check(*_):
    """A self-test as it is, of few tokens, interpreted: forward and backward passes of both sides."""
    return attention.worst_error(torch.device("cpu"), torch.float32, 64, True, False, lengths=(3, 9), heads=1)


def under_fake_tensors(ask):
    """As memory.py, the first to ask in every training script."""
    with FakeTensorMode(), torch.device("meta"), torch.inference_mode():
        return ask()


def in_a_block(ask, calls=(1, 2)):
    """In a checkpointed block: in its forward pass and when the backward pass recomputes it."""
    answers = []

    def block(x):
        answers.append(ask() if len(answers) + 1 in calls else None)
        return x.sin().sin()

    checkpoint(block, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert len(answers) == 2
    return all(a for a in answers if a is not None)


def while_recomputing(ask):
    return in_a_block(ask, calls=(2,))


def while_tracing(ask):
    """torch.compile traces what asks, in one graph; the answer is a constant of it."""
    def fn(x):
        return 2 * x if dispatch._constant("attention", torch.device("cuda", 0), torch.bfloat16, 64,
                                           small_check) else x

    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, backend="aot_eager")(torch.ones(2)).tolist() == [2, 2]


def with_another_state(ask):
    """Everything that a thread carries, turned on."""
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda x: None)
    with hooks, torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        return ask()


@pytest.mark.parametrize("place", [under_fake_tensors, in_a_block, while_recomputing, while_tracing,
                                   with_another_state], ids=lambda f: f.__name__)
def test_the_decision_is_the_same_wherever_it_is_asked(hopper, capsys, place):
    assert place(lambda: hopper(small_check))
    assert capsys.readouterr().err.count("Triton on sm_90, self-test at") == 1


def test_threads_that_ask_together_wait_for_one_self_test(hopper, capsys):
    """And one that asks meanwhile what needs no self-test is not told the kernels that it forces."""
    started, asked, calls = threading.Event(), threading.Event(), []

    def check(*_):
        calls.append(1)
        started.set()
        assert asked.wait(300)
        return small_check()

    def ask():
        return dispatch._constant("attention", torch.device("cuda", 0), torch.bfloat16, 64, check)

    with ThreadPoolExecutor(3) as threads:
        answers = [threads.submit(ask) for _ in range(3)]
        assert started.wait(300)
        meanwhile = [dispatch.use_triton("attention", torch.ones(1))]
        asked.set()  # the self-test may be over before this thread's next turn
        while not all(a.done() for a in answers):
            meanwhile.append(dispatch.use_triton("attention", torch.ones(1)))
        assert all(a.result() for a in answers)
    assert len(calls) == 1 and not any(meanwhile)
    assert capsys.readouterr().err.count("\n") == 1


def test_the_self_test_does_not_wait_for_autograds_threads(hopper):
    """A GPU's backward pass runs in a thread of autograd, which may be the one that asks."""
    def check(*_):
        return 9.0 if torch._C._is_multithreading_enabled() else 0.1

    assert torch._C._is_multithreading_enabled() and hopper(check)


def test_worst_error_sees_a_wrong_kernel(monkeypatch):
    """The self-test's own negative control: the scale of the scores off by a thousandth."""
    device, sizes = torch.device("cpu"), {"lengths": (5, 40), "heads": 1}
    assert attention.worst_error(device, torch.float32, 64, False, False, **sizes) < 1
    monkeypatch.setattr(attention, "LOG2E", attention.LOG2E * 1.001)
    assert attention.worst_error(device, torch.float32, 64, False, False, **sizes) > 10


def test_without_triton_everything_is_plain_torch():
    script = """
import sys
sys.modules["triton"] = None  # its import fails
import torch
from kernels import dispatch, joint_attention
x = [torch.randn(1, n, 2, 64) for n in (3, 5)]
runs = dispatch._decide("op", torch.device("cuda"), torch.half, 64, None)
print(dispatch.triton, joint_attention(x, x, x)[1].shape, runs)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["None", "torch.Size([1,", "5,", "2,", "64])", "False"], done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if "kernels: " in line]  # torch 2.11 says more
    assert said == ["kernels: op (float16, heads of 64): plain torch (no Triton)"]


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [2])
def test_selftest_command(jobs):
    """Every check once, one headline and one verdict, in however many processes."""
    done = subprocess.run([sys.executable, "-m", "kernels.selftest", "--jobs", str(jobs)], cwd=ROOT,
                          env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
                          capture_output=True, text=True)
    assert done.returncode == 0 and "no GPU here" in done.stdout or torch.cuda.is_available()
    head, *checks, verdict = done.stdout.splitlines()
    assert verdict == "all within their bounds" and all(line.endswith("  ok") for line in checks)
    assert len(set(checks)) == len(checks) == (23 if torch.cuda.is_available() else 17)


def test_short_streams_have_tiles_of_their_own(monkeypatch):
    """And a self-test of their own, which a long stream's says nothing about."""
    assert attention.tiles("forward", 64, "sm_90", attention.SHORT) == attention.SHORT_TILE
    assert attention.tiles("forward", 64, "sm_90", attention.SHORT + 1) == attention.TILES["forward", 64]
    assert attention.tiles("forward", 128, "sm_90", 1) == attention.TILES["forward", 128]
    assert attention.tiles("forward", 64, "gfx942", 1) != attention.SHORT_TILE  # not looked at there
    asked = []
    monkeypatch.setattr(dispatch, "use_triton", lambda *args: asked.append(args[-1]) or False)
    for n in (attention.SHORT, attention.SHORT + 1):
        x = [torch.randn(1, m, 1, 64) for m in (24, n)]
        joint_attention(x, x, x)
    assert asked == [(2, False, False, True), (2, False, False, False)]
    lengths = []
    monkeypatch.setattr(attention, "worst_error", lambda *args: lengths.append(args[-1]) or 0.0)
    for short in (True, False):
        attention.self_check(torch.device("cpu"), torch.float32, 64, 3, False, False, short)
    assert max(lengths[0]) == attention.SHORT < max(lengths[1])
