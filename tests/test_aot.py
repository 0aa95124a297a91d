"""What the kernels become on GPUs that are not here: they build, fit, keep registers, and do not grow.

Compiled in processes of their own: this one's kernels are decorated for Triton's interpreter. The largest of
each kind is looked at. After a change to a kernel, `python tests/test_aot.py` looks at all of every target,
and writes the budgets anew (half an hour).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = Path(__file__).with_name("aot_budgets.json")
GROWTH = 1.03
SHARED_LIMIT = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes
MATRIX = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
MAIN = [f"{kernel} d{d}{extra}" for kernel in ("forward", "backward_q", "backward_kv") for d in (64, 128)
        for extra in ("", " norm bias")]
FAST = {"sm_90": MAIN[:1], "gfx942": MAIN[:1]}
LARGEST = [name for name in MAIN if name.endswith("norm bias")]
SHORT = [f"{kernel} d64 short norm bias" for kernel in ("forward", "backward_q", "backward_kv")]


def compiled(tmp_path, target, only=()):
    """-> name: Built.summary() of the kernels that ship for `target`."""
    out = tmp_path / "aot.json"
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRITON_PTXAS_PATH")}
    command = [sys.executable, "-m", "kernels.aot", target, "--json", str(out)]
    done = subprocess.run([*command, *(x for name in only for x in ("--only", name))], cwd=ROOT, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())["kernels"][target]


def faults(target, name, got, budget):
    """What is wrong with a kernel, in words. budget: instructions of its loops, None: not compared."""
    found = []
    if got["shared"] > SHARED_LIMIT[target]:
        found.append(f"{got['shared']} bytes of shared memory")
    if got["serialised"]:
        found.append("WGMMAs run one by one")
    if not name.startswith(("forward", "backward")):
        return found
    if not got["matrix"] or not all(op.startswith(MATRIX[target]) for op in got["matrix"]):
        found.append(f"matrix instructions {got['matrix']}")
    if len(got["loops"]) != 4:  # whole tiles and tail of two streams
        found.append(f"{len(got['loops'])} loops")
    if any(x["local"] for x in got["loops"]):
        found.append(f"spilled registers in loops: {[x['local'] for x in got['loops']]}")
    if target != "gfx942" and not all(x["async"] for x in got["loops"][::2]):
        found.append("whole tiles are not loaded asynchronously")
    now = [x["instructions"] for x in got["loops"]]
    if budget is not None and any(a > GROWTH * b for a, b in zip(now, budget)):
        found.append(f"loops of {now} instructions, budget {budget}")
    return found


def budgets(target):
    stored = json.loads(BUDGETS.read_text())
    return stored["loops"][target] if stored["triton"] == triton.__version__ else {}


def check(tmp_path, target, only=()):
    built = compiled(tmp_path, target, only)
    assert set(only) <= set(built)
    wrong = {name: faults(target, name, got, budgets(target).get(name)) for name, got in built.items()}
    assert not {name: x for name, x in wrong.items() if x}
    return built


@pytest.mark.parametrize("target", ["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_main_kernels(target, tmp_path):
    check(tmp_path, target, FAST[target])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])  # the others: python tests/test_aot.py
def test_kernels_that_ship(target, tmp_path):
    names = LARGEST + (SHORT if target == "sm_90" else [])
    assert set(check(tmp_path, target, names)) == set(names)


def python(script):
    """What a script prints that has the kernels undecorated by the interpreter, parsed."""
    head = "import json; from kernels import attention; from kernels.aot import build\n"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", head + script], cwd=ROOT, env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_other_streams_masks_and_lengths_of_one():
    """Triton makes constants of arguments that are 1: a stream of one token, one head."""
    got = python("""
out = []
for name in ("forward", "backward_kv"):
    for streams, change in ((1, {}), (3, {"q_lengths": (1, "i32", 1), "k_lengths": ("i32", 1, 1),
                                                   "ATTENDS": 0b101111110, "H": 1, "q_total": "i32:16"})):
        kernel, args, warps, stages = attention.shipped("sm_90", streams=streams)[f"{name} d64 norm bias"]
        out.append(build(kernel, {**args, **change}, "sm_90", warps, stages).summary())
print(json.dumps(out))
""")
    assert [len(x["loops"]) for x in got] == [2, 2] * 2
    assert not any(loop["local"] for x in got for loop in x["loops"])


@pytest.mark.slow
def test_faults_are_seen():
    """A tile that is known to be too large for its warps; and each fault alone."""
    got = python("kernel, args, _, _ = attention.shipped('sm_90')['forward d128']\n"
                 "args |= {'ROWS': 128, 'COLS': 128}\n"
                 "print(json.dumps(build(kernel, args, 'sm_90', 4, 2).summary()))")
    found = faults("sm_90", "forward d128", got, None)
    assert any("spilled registers" in x for x in found) and "WGMMAs run one by one" in found
    loop = {"instructions": 100, "matrix": 4, "local": 0, "exp2": 8, "async": 2}
    good = {"shared": 0, "serialised": False, "matrix": ["HGMMA.64x64x16"], "loops": [loop] * 4}
    assert faults("sm_90", "forward d64", good, [98] * 4) == []
    for change, budget, word in (
            ({"shared": 10**6}, None, "shared memory"), ({"matrix": ["HMMA.16816"]}, None, "HMMA"),
            ({"loops": [loop] * 2}, None, "2 loops"), ({}, [96] * 4, "budget"),
            ({"loops": [{**loop, "async": 0}] * 4}, None, "asynchronously")):
        (found,) = faults("sm_90", "forward d64", {**good, **change}, budget)
        assert word in found


@pytest.mark.slow
def test_the_command_refuses_what_it_cannot_do():
    for interpret, args, words in (("1", [], "TRITON_INTERPRET: is set"), ("0", ["sm_70"], "'sm_70'")):
        done = subprocess.run([sys.executable, "-m", "kernels.aot", *args], cwd=ROOT, capture_output=True,
                              text=True, env=os.environ | {"TRITON_INTERPRET": interpret})
        assert done.returncode == 1 and done.stderr.startswith("error: ") and words in done.stderr


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        every = {target: compiled(Path(folder), target) for target in SHARED_LIMIT}
    wrong = [f"{target} {name}: {', '.join(found)}" for target, built in every.items()
             for name, got in built.items() if (found := faults(target, name, got, None))]
    if wrong:
        sys.exit("error: the budgets are left as they were:\n" + "\n".join(wrong))
    rows = ",\n".join(f'  "{target}": {{\n' + ",\n".join(
        f'   "{name}": {[x["instructions"] for x in got["loops"]]}' for name, got in built.items()) + "}"
        for target, built in every.items())
    BUDGETS.write_text(f'{{"triton": "{triton.__version__}", "loops": {{\n{rows}}}}}\n')
