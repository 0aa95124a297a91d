"""masked_step: its Triton kernels in the interpreter, its gradients, the operation, what a GPU would run."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flow
from kernels import blend, masked_step
from kernels.dispatch import force, newer_ptxas

triton = pytest.importorskip("triton")
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

KERNELS = ("forward_kernel", "backward_kernel")
WEIGHTS = {1: [1.0], 2: [3.0, -2.0], 3: [5.0, -3.5, -0.5]}
SIZES = [(2, 3, 7, 9), (1, 1, 1, 1), (2, 2, 31, 37), (1, 4, 32, 32)]  # within, over and exactly a block


@pytest.fixture
def interpreter(monkeypatch):
    """The kernels under Triton's interpreter, whatever TRITON_INTERPRET was when they were imported."""
    for name in KERNELS:
        monkeypatch.setattr(blend, name, InterpretedFunction(getattr(blend, name).fn))
    with force("triton"):
        yield


def inputs(shape=(2, 3, 7, 9), n=2, heun=False, region=True, times="numbers", dtype=torch.float32,
           v_dtype=None, seed=0) -> dict:
    """Arguments of masked_step."""
    g = torch.Generator().manual_seed(seed)
    x, start, known, noise, *v = torch.randn(4 + n, *shape, generator=g).to(dtype)
    t, t_next = (0.7, 0.3) if times == "numbers" else torch.rand(2, shape[0], generator=g)
    more = dict(known=known, noise=noise, mask=torch.rand(shape[0], 1, *shape[2:], generator=g).to(dtype))
    return dict(x=x, v=[p.to(v_dtype or dtype) for p in v], t=t, t_next=t_next, weights=WEIGHTS[n],
                start=start if heun else None, **(more if region else {}))


def leaves(a: dict) -> list:
    """Everything that has a gradient, which is switched on."""
    some = [a["x"], *a["v"], a["start"], a.get("known"), a.get("noise")]
    return [z.requires_grad_() for z in some if z is not None]


def with_gradients(a: dict, seed=1) -> list[torch.Tensor]:
    """The step and the gradients of its leaves, from one fixed gradient of the step."""
    asked = leaves(a)
    out = masked_step(**a)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, asked, g)]


def in_float64(a: dict, swap=False, seed=1) -> list[torch.Tensor]:
    """The same, straight from the formulas, by autograd in fp64; swap: with the wrong sense of the mask."""
    t, t_next = (torch.as_tensor(a[k], dtype=torch.float64).view(-1, 1, 1, 1) for k in ("t", "t_next"))
    asked = [z.detach().double().requires_grad_() for z in leaves(a)]
    x, *rest = asked
    v, rest = rest[:len(a["v"])], rest[len(a["v"]):]
    y = x + (t_next - t) * sum(w * p for w, p in zip(a["weights"], v))
    if a["start"] is not None:
        y = (rest.pop(0) + y) / 2
    if "mask" in a:
        m = a["mask"].double()
        y = torch.lerp(y, (1 - t_next) * rest[0] + t_next * rest[1], m if swap else 1 - m)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(a["x"].dtype).double()
    return [y.detach(), *torch.autograd.grad(y, asked, g)]


def apart(a, b) -> list[float]:
    return [((p.double() - q).abs().max() / q.abs().max()).item() for p, q in zip(a, b)]


CASES = [dict(n=n, heun=heun, region=region, times=times) for n in (1, 2, 3) for heun in (False, True)
         for region in (False, True) for times in ("numbers", "tensors")]


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("run", ["reference", "triton"])
def test_against_float64(case, run, request):
    if run == "triton":
        request.getfixturevalue("interpreter")
    a = inputs(**case)
    forward, *gradients = apart(with_gradients(a), in_float64(a))
    assert forward < 2e-6 and max(gradients) < 5e-6 and len(gradients) == 1 + case["n"] + case["heun"] \
        + 2 * case["region"]
    if case["region"]:
        assert min(apart(with_gradients(a), in_float64(a, swap=True))) > 0.1


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_kernels_give_the_bits_of_the_reference(case, shape, dtype, interpreter):
    got = with_gradients(inputs(shape, dtype=dtype, **case))
    with force("reference"):
        want = with_gradients(inputs(shape, dtype=dtype, **case))
    assert all(torch.equal(p, q) for p, q in zip(got, want))
    with force("reference"):
        assert not torch.equal(got[0], masked_step(**inputs(shape, dtype=dtype, **case, seed=2)))


def test_bf16(interpreter):
    """bf16 into fp32 has the reference's bits. The interpreter cuts fp32 to bf16 off instead of rounding it
    (on a GPU: cvt.rn, below), so out of it come the cut-off bits of the reference on widened inputs."""
    mixed = dict(n=3, heun=True, v_dtype=torch.bfloat16)
    got = with_gradients(inputs(**mixed))
    with force("reference"):
        want = with_gradients(inputs(**mixed))
    assert [z.dtype for z in got[2:5]] == [torch.bfloat16] * 3
    for p, q in zip(got[:2] + got[5:], want[:2] + want[5:]):
        assert torch.equal(p, q)
    a = inputs(n=3, heun=True, dtype=torch.bfloat16)
    wide = {k: z.float() if torch.is_tensor(z) else z for k, z in a.items()}
    wide["v"] = [p.float() for p in a["v"]]
    got = masked_step(**a)
    with force("reference"):
        want = masked_step(**wide)
        rounded = masked_step(**a)
    assert torch.equal(got, (want.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16))
    assert torch.equal(rounded, want.bfloat16()) and not torch.equal(rounded, got)


@pytest.mark.parametrize("run", ["reference", "triton"])
def test_inputs_in_any_layout(run, request):
    if run == "triton":
        request.getfixturevalue("interpreter")
    a = inputs(heun=True)
    b = {k: z.to(memory_format=torch.channels_last) if torch.is_tensor(z) else z for k, z in a.items()}
    stacked = torch.randn(2, 7, 7, 9)
    stacked[:, 1:4] = a["v"][0]
    b["v"] = [stacked[:, 1:4], a["v"][1].transpose(2, 3).contiguous().transpose(2, 3)]
    b["mask"] = a["mask"] = a["mask"][:1].expand(2, -1, -1, -1)
    assert not any(z.is_contiguous() for z in (b["x"], b["start"], *b["v"], b["known"], b["mask"]))
    out, plain = with_gradients(b), with_gradients(a)
    assert all(torch.equal(p, q) for p, q in zip(out, plain)) and all(p.is_contiguous() for p in out)


def test_nothing_outside_the_tensors_is_touched(interpreter):
    """Every tensor lies between NaNs: none gets in, and those around the outputs stay."""
    shape, pad, buffers = (2, 3, 5, 7), 4096, []

    def guarded(z=None):
        buffer = torch.full((2 * pad + 210,), torch.nan)
        buffers.append(buffer)
        inner = buffer[pad:-pad].view(shape)
        return inner if z is None else inner.copy_(z)

    def mask():
        buffer = torch.full((2 * pad + 70,), torch.nan)
        return buffer[pad:-pad].copy_(torch.rand(70)).view(2, 1, 5, 7)

    x, v1, v2, v3, start, known, noise, grad = (guarded(torch.randn(shape)) for _ in range(8))
    scalars, m = (5.0, -3.5, -0.5, -0.4, 0.7, 0.3), mask()
    outs = [guarded() for _ in range(7)]
    blend._launch(blend.forward_kernel, x, outs[0], x, start, v1, v2, v3, known, noise, m, None, *scalars)
    blend._launch(blend.backward_kernel, x, grad, m, None, *outs[1:], *scalars, HEUN=True)
    assert not any(z.isnan().any() for z in outs)
    assert all(b[:pad].isnan().all() and b[-pad:].isnan().all() for b in buffers)


def test_no_pictures():
    assert masked_step(**inputs((0, 3, 4, 4))).shape == (0, 3, 4, 4)


def test_self_test(interpreter, monkeypatch):
    """What decides on a GPU: zero for the kernels as they are, far over one for another step."""
    assert blend.self_test(torch.device("cpu"), torch.float32) == 0
    reference = blend.masked_step_ref
    monkeypatch.setattr(blend, "masked_step_ref", lambda *a: reference(*a) * 1.00001)
    assert blend.self_test(torch.device("cpu"), torch.float32) > 10


# ---- the operation -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASES[0], CASES[14], CASES[-1]], ids=str)
def test_opcheck(case):
    a = inputs(**case)
    leaves(a)
    coefs = torch.rand(2, 3) if case["times"] == "tensors" else None
    coef = [-0.4, 0.7, 0.3]
    region = [a.get(k) for k in ("known", "noise", "mask")]
    torch.library.opcheck(blend.masked_step_op,
                          (a["x"], a["v"], a["weights"], coef, coefs, a["start"], *region))
    torch.library.opcheck(blend.masked_step_backward_op,
                          (a["x"].detach(), region[2], a["weights"], coef, coefs, case["heun"], torch.float16,
                           [True, case["n"] > 1, *[case["region"]] * 2]))


def test_only_the_gradients_that_are_asked_for():
    a = inputs(n=3)
    a["v"][1].requires_grad_()
    whole = with_gradients(inputs(n=3))
    g = torch.randn(a["x"].shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.autograd.grad(masked_step(**a), a["v"][1], g)[0], whole[3])
    for name in ("mask", "t"):
        b = inputs(times="tensors")
        b[name].requires_grad_()
        with pytest.raises(NotImplementedError, match="mask or the times"):
            masked_step(**b).sum().backward()


CALL = re.compile(r"= torch\.ops\.kernels\.masked_step\b")  # in the code of a graph


@pytest.mark.slow
def test_a_step_compiles_without_breaks():
    """Network, guidance, step and backward in one graph; with times as tensors one graph for all steps."""
    a, w = inputs(), torch.tensor(0.5, requires_grad=True)
    graphs = []

    def denoise(x, t):
        v = torch.tanh(w * x + flow.bcast(t))
        return flow.Guided([v, v * v], [3.0, -2.0])

    def step(x, t, t_next):
        return flow.euler_step(x, denoise(x, t), t, t_next, None, a["known"], a["noise"], a["mask"])

    def counting(graph, example):
        graphs.append(str(graph.code))
        return graph

    compiled = torch.compile(step, fullgraph=True)
    counted = torch.compile(step, fullgraph=True, backend=counting)
    for t, t_next in ((1.0, 0.6), (0.6, 0.3), (0.3, 0.0)):
        t, t_next = torch.full((2,), t), torch.full((2,), t_next)
        want = step(a["x"], t, t_next)
        for f in (compiled, counted):
            got = f(a["x"], t, t_next)
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(*(torch.autograd.grad(z.square().sum(), w, retain_graph=True)[0]
                                         for z in (got, want)))
    assert len(graphs) == 1 and len(CALL.findall(graphs[0])) == 1


@pytest.mark.parametrize("solver, calls", [("euler", 3), ("heun", 5)])
def test_a_sampling_step_is_one_call(solver, calls):
    """All of flow.sample in one graph: one operation for every evaluation of the network."""
    a, graphs = inputs(), []

    def denoise_rows(x, t):
        return torch.tanh(x + flow.bcast(t))

    def run(x):
        weights = flow.dual_weights(3.0, 1.5)
        return flow.sample(flow.guide(denoise_rows, weights), x, flow.timesteps(3), solver, a["known"],
                           a["noise"], a["mask"])

    def backend(graph, example):
        graphs.append(graph.code)
        return graph

    assert torch.equal(torch.compile(run, fullgraph=True, backend=backend)(a["x"]), run(a["x"]))
    assert len(graphs) == 1 and len(CALL.findall(graphs[0])) == calls
    assert graphs[0].count("torch.tanh") == calls


@pytest.mark.parametrize("change, word", [
    (dict(v=[]), "0 predictions"), (dict(weights=[1.0]), "2 predictions with 1 weights"),
    (dict(noise=None), "all or none"), (dict(mask=torch.ones(2, 7, 9)), "B, 1, H, W"),
    (dict(known=torch.ones(2, 3, 1, 9)), "x's shape"), (dict(start=torch.ones(2, 3, 7, 9).half()), "start")])
def test_shapes_that_do_not_fit(change, word):
    with pytest.raises(ValueError, match=word):
        masked_step(**(inputs() | change))


# ---- what a GPU would run ------------------------------------------------------------------------

SCALARS = dict.fromkeys(("w1", "w2", "w3", "dt", "rest", "level"), "fp32")
SAMPLING = dict(out="*fp32", x="*fp32", start=None, v1="*bf16", v2="*bf16", v3="*bf16", known="*fp32",
                noise="*fp32", mask="*fp32", coefs=None)
ALL_BF16 = dict.fromkeys(("out", "x", "start", "v1", "known", "noise", "mask"), "*bf16") \
    | dict(v2=None, v3=None, coefs="*fp32")
TRAINING = dict(grad="*bf16", mask="*bf16", coefs="*fp32", gx="*bf16", gv1="*bf16", gv2="*bf16", gv3="*bf16",
                gknown=None, gnoise=None, HEUN=False)
WIDE = dict(grad="*fp32", mask="*fp32", coefs=None, gx="*fp32", gv1="*bf16", gv2=None, gv3=None,
            gknown="*fp32", gnoise="*fp32", HEUN=True)
WHOLE = {False: {"LDG.E.128", "STG.E.128"}, True: {"global_load_dwordx4", "global_store_dwordx4"}}
BUILDS = {"sampling": ("forward_kernel", SAMPLING), "bf16": ("forward_kernel", ALL_BF16),
          "backward": ("backward_kernel", TRAINING), "backward-all": ("backward_kernel", WIDE)}
GPUS = ("sm_90", "gfx942")
OTHERS = ("sm_80", "sm_89", "sm_100")


def build(name, args, target, fusion=False, size="i32:16"):
    from kernels.aot import build

    kernel = JITFunction(getattr(blend, name).fn)
    with triton.knobs.language.scope():
        triton.knobs.language.default_fp_fusion = fusion
        return build(kernel, {**args, **SCALARS, "channels": "i32:16", "pixels": size, "BLOCK": blend.BLOCK},
                     target, warps=2 if target == "gfx942" else 4)


def accesses(built) -> set[str]:
    """Kinds of global loads and stores, the three coefficients of a picture left out."""
    names = r"global_(?:load|store)_dwordx\d" if built.target == "gfx942" else r"(?:LDG|STG)\.E(?:\.\w+)*"
    found = set(re.findall(names, built.code))
    return {re.sub(r"\.(CONSTANT|STRONG|EF|EL|LTC\d+B)", "", name) for name in found}


def build_all(path, targets):
    made = {(name, target): build(*BUILDS[name], target) for name in BUILDS for target in targets}
    made["ragged"] = build("forward_kernel", SAMPLING, "sm_90", size="i32")
    made["fused"] = build("forward_kernel", SAMPLING, "sm_90", True)
    Path(path).write_bytes(pickle.dumps(made))


def in_a_process(tmp_path_factory, targets):
    """What `build_all` builds in a process of its own: Triton's interpreter leaves its language changed."""
    path = tmp_path_factory.mktemp("built") / "all"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(blend.__file__).parents[1]
    code = f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'tests')!r}]; import test_blend as t; "
    code += f"t.build_all({str(path)!r}, {targets})"
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return pickle.loads(path.read_bytes())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return in_a_process(tmp_path_factory, GPUS)


@pytest.fixture(scope="module")
def compiled_for_others(tmp_path_factory):
    return in_a_process(tmp_path_factory, OTHERS)


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("name", BUILDS)
def test_compiled_kernels(name, target, compiled):
    check_build(compiled[name, target], name, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", OTHERS)
@pytest.mark.parametrize("name", BUILDS)
def test_compiled_kernels_of_other_gpus(name, target, compiled_for_others):
    check_build(compiled_for_others[name, target], name, target)


def check_build(built, name, target):
    from kernels.aot import LOCAL

    args = BUILDS[name][1]
    opcodes = built.opcodes()
    assert built.spilled == 0 and not any(op.startswith(LOCAL) for op in opcodes)
    whole = WHOLE[target == "gfx942"]
    assert whole <= accesses(built)
    if args["coefs"] is None:
        assert accesses(built) == whole
    if built.ptx:
        assert ".ftz" not in built.ptx
        if "*bf16" in (args.get("out"), args.get("gx")):
            assert re.search(r"cvt\.rn\.bf16(x2)?\.f32", built.ptx)
    fused = {op for op in opcodes if op.startswith(("FFMA", "v_fma_f32", "v_fmac_f32", "v_pk_fma"))}
    if fused and target == "sm_100" and newer_ptxas(target) < (13, 1):
        pytest.skip("this ptxas fuses multiplications and additions for sm_100 whatever --fmad=false says")
    assert not fused


def test_the_checks_of_compiled_kernels_can_fail(compiled):
    assert accesses(compiled["ragged"]) != WHOLE[False]
    assert any(op.startswith("FFMA") for op in compiled["fused"].opcodes())
