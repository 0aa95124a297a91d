"""Compile a Triton kernel for a GPU that is not there, and read what came out.

    python -m kernels.aot                             # every kernel that ships, for every target: minutes
    python -m kernels.aot sm_90 --only "forward d64" --json out.json

    built = build(kernel, {"x": "*bf16", "n": "i32", "BLOCK": 128}, "sm_90", warps=8, stages=2)
    built.registers, built.shared, built.spilled, built.log          # the whole kernel
    built.loops[0].count("HGMMA"), built.loops[0].instructions       # its innermost matrix loops

Must run where TRITON_INTERPRET is not set: kernels decorated under it cannot be compiled.
"""

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_89": GPUTarget("cuda", 89, 32),
           "sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32),
           "gfx942": GPUTarget("hip", "gfx942", 64)}
SHARED_LIMIT = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes
MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "v_mfma")  # matrix instructions by the start of their names
LOCAL = ("LDL", "STL", "scratch_")  # loads and stores of spilled registers


@dataclass(frozen=True)
class Loop:
    """A loop body of the machine code."""

    opcodes: tuple[str, ...]

    @property
    def instructions(self) -> int:
        return len(self.opcodes)

    def count(self, *names: str) -> int:
        """Instructions whose name starts with one of `names`."""
        return sum(op.startswith(names) for op in self.opcodes)


@dataclass(frozen=True)
class Built:
    target: str
    code: str  # SASS, or AMD assembly
    ptx: str  # "" on AMD
    log: str  # what ptxas said
    shared: int  # bytes of shared memory per program
    registers: int  # per thread
    spilled: int  # bytes of stack per thread
    loops: tuple[Loop, ...]  # innermost loops with matrix instructions; those of all kinds if there are none

    def opcodes(self) -> Counter:
        return Counter(op for _, op, _ in _instructions(self.code, self.target))

    def summary(self) -> dict:
        """The numbers of it. serialised: ptxas could not keep several WGMMAs in flight (warning C75xx)."""
        loops = [{"instructions": x.instructions, "matrix": x.count(*MATRIX), "local": x.count(*LOCAL),
                  "exp2": x.count("MUFU.EX2", "v_exp_f32"), "async": x.count("LDGSTS", "UTMALDG")}
                 for x in self.loops]
        matrix = [op for op in self.opcodes() if op.startswith(MATRIX)]
        return {"registers": self.registers, "shared": self.shared, "spilled": self.spilled,
                "serialised": "C75" in self.log, "matrix": matrix, "loops": loops}


def build(kernel, args: dict, target: str, warps: int = 4, stages: int = 2) -> Built:
    """Compile a @triton.jit kernel for one of TARGETS.

    args: every parameter's name -> the value of a constexpr; or a type, "*bf16", "i32", "fp32"; or a number
    (Triton makes constants of ones at run time); or a tuple of these. Pointers count as aligned to 16 bytes,
    integers as multiples of 16 when written "i32:16", as Triton finds them at run time.
    """
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    signature, constants, attrs = {}, {}, {}

    def put(path: tuple, value):
        if isinstance(value, tuple):
            return tuple(put((*path, i), x) for i, x in enumerate(value))
        if not isinstance(value, str):
            constants[path] = value
            return "constexpr"
        kind, _, aligned = value.partition(":")
        if kind.startswith("*") or aligned:
            attrs[path] = [["tt.divisibility", 16]]
        return kind

    for i, name in enumerate(kernel.arg_names):
        if name in constexprs:
            constants[(i,)], signature[name] = args[name], "constexpr"
        else:
            signature[name] = put((i,), args[name])
    said = io.StringIO()
    knobs = triton.knobs
    with (tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(said), knobs.cache.scope(),
          knobs.nvidia.scope()):  # a cached kernel would come without ptxas' words
        knobs.cache.dir = cache
        knobs.nvidia.dump_ptxas_log = True
        done = triton.compile(ASTSource(kernel, signature, constants, attrs), target=TARGETS[target],
                              options={"num_warps": warps, "num_stages": stages})
        asm, shared = dict(done.asm), done.metadata.shared
        if target.startswith("gfx"):
            code, ptx = asm["amdgcn"], ""
            registers, spilled = (int(re.search(rf"\.{key}:\s+(\d+)", code)[1])
                                  for key in ("vgpr_count", "private_segment_fixed_size"))
        else:
            ptx = asm["ptx"]
            cubin = Path(cache, "kernel.cubin")
            cubin.write_bytes(asm["cubin"])
            code, usage = (subprocess.run([knobs.nvidia.cuobjdump.path, flag, cubin], check=True,
                                          capture_output=True, text=True).stdout
                           for flag in ("--dump-sass", "--dump-resource-usage"))
            registers, spilled = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    return Built(target, code, ptx, said.getvalue(), shared, registers, spilled, _loops(code, target))


def _instructions(code: str, target: str) -> list[tuple[str, str, str]]:
    """-> (place, opcode, operands) in order; a place is an address, on AMD also a label (opcode "")."""
    if target.startswith("gfx"):
        lines = re.findall(r"^(?:(\.LBB\w+):|\s+([a-z]\w+)(.*))", code, re.M)
        return [(label or str(i), op, rest) for i, (label, op, rest) in enumerate(lines)]
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", code)
    return [(f"0x{int(place, 16):x}", op, rest) for place, op, rest in found]


def _loops(code: str, target: str) -> tuple[Loop, ...]:
    """The smallest loop around each matrix instruction (a wait inside it can be a loop of its own)."""
    rows = _instructions(code, target)
    index = {place: i for i, (place, _, _) in enumerate(rows)}
    spans = set()
    # code behind the program's end that jumps back (Blackwell's waits, AMD's peeled iterations) is no loop
    ends = [i for i, (_, op, _) in enumerate(rows) if op in ("EXIT", "s_endpgm")]
    for i, (_, op, rest) in enumerate(rows):
        if op.startswith(("BRA", "s_cbranch", "s_branch")):
            to = re.search(r"0x[0-9a-f]+|\.LBB\w+", rest)
            start = index.get(to[0], i) if to else i
            if start < i and not any(start < end < i for end in ends):
                spans.add((start, i))
    matrix = [i for i, (_, op, _) in enumerate(rows) if op.startswith(MATRIX)]
    around = ([s for s in spans if s[0] <= i <= s[1]] for i in matrix)
    chosen = {min(s, key=lambda s: s[1] - s[0]) for s in around if s} if matrix else spans
    return tuple(Loop(tuple(op for _, op, _ in rows[a:b + 1] if op)) for a, b in sorted(chosen))


def main() -> None:
    from kernels import attention

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--only", action="append", help="kernels of exactly this name; may be repeated")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        raise SystemExit("error: TRITON_INTERPRET: is set: unset it, interpreted kernels cannot be compiled")
    out = {}
    for target in args.targets or TARGETS:
        if target not in TARGETS:
            raise SystemExit(f"error: target {target!r}: use one of {', '.join(TARGETS)}")
        for name, (kernel, values, warps, stages) in attention.shipped(target).items():
            if args.only and name not in args.only:
                continue
            got = out.setdefault(target, {})[name] = build(kernel, values, target, warps, stages).summary()
            loops = ", ".join(f"{x['instructions']} ({x['local']} local)" for x in got["loops"])
            print(f"{target:7} {name:28} {got['registers']:3} registers {got['shared']:6} B shared "
                  f"{got['spilled']:4} B spilled; loops: {loops or 'none'}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"triton": triton.__version__, "kernels": out}))


if __name__ == "__main__":
    sys.exit(main())
