"""Numbers of every kernel on this machine's GPU, forward and backward, against plain torch in fp64.

    python -m kernels.selftest
    python -m kernels.selftest --jobs 16     # in 16 processes: most of the time is compiling, on a core each

Exit code 1 if one is off. Without a GPU, a small part runs in Triton's interpreter, in under a minute.
"""

import argparse
import os
import subprocess
import sys

import torch

from kernels import attention, blend, dispatch


def widen_interpreted_dots() -> None:
    """Triton's interpreter multiplies the bit patterns of bf16 matrices as integers: hand it fp32 instead."""
    import numpy as np
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def wide(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return plain(self, wide(a), wide(b), *rest)

    create_dot.widens = True
    if not hasattr(plain, "widens"):
        InterpreterBuilder.create_dot = create_dot


def side_by_side(jobs: int) -> int:
    """The checks shared out among so many processes -> 1 if one of them found an error, or broke off."""
    command = [sys.executable, "-m", "kernels.selftest", "--part"]
    started = [subprocess.Popen([*command, f"{i}/{jobs}"], stdout=subprocess.PIPE, text=True)
               for i in range(jobs)]
    failed = []
    for i, process in enumerate(started):
        lines = process.communicate()[0].splitlines()
        print("\n".join(lines[i > 0:]), end="\n" * (len(lines) > (i > 0)), flush=True)  # one headline
        failed += [i] * (process.returncode != 0)
    return verdict(len(failed), "of the processes failed")


def verdict(wrong: int, what: str = "are off") -> int:
    print(f"{wrong} {what}: run with KERNELS=reference, report it" if wrong else "all within their bounds")
    return int(wrong > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--part", metavar="K/N", help="one of N shares of the checks alone, the first is 0")
    args = parser.parse_args()
    if dispatch.triton is None:
        print("no Triton on this platform: plain torch runs everywhere, there is nothing to test")
        return 0
    if args.jobs > 1:
        return side_by_side(args.jobs)
    gpu = torch.cuda.is_available()
    if not gpu and not dispatch.interpreted():  # it must stand before the kernels are imported
        os.execve(sys.executable, [sys.executable, "-m", "kernels.selftest", *sys.argv[1:]],
                  {**os.environ, "TRITON_INTERPRET": "1"})
    if gpu:
        device, dtypes = torch.device("cuda", 0), (torch.float32, torch.bfloat16, torch.float16)
        sizes = {"lengths": (154, 1111, 640)}
        arch = dispatch.architecture(device)
        print(f"{torch.cuda.get_device_name()} ({arch}), torch {torch.__version__}, Triton "
              f"{dispatch.triton.__version__}, ptxas {'.'.join(map(str, dispatch.newer_ptxas(arch)))}")
    else:
        device, dtypes = torch.device("cpu"), (torch.float32, torch.bfloat16)
        sizes = {"lengths": (5, 40), "heads": 1}
        widen_interpreted_dots()
        print("no GPU here: the kernels interpreted on the CPU, joint attention on 45 tokens", flush=True)
    checks = [("masked step", dtype, blend.self_test, (device, dtype)) for dtype in dtypes
              if gpu or dtype == torch.float32]
    checks += [(f"joint attention  heads of {head_dim:3}  {'norm' * norm:4}  {'bias' * bias:4}", dtype,
                attention.worst_error, (device, dtype, head_dim, norm, bias))
               for dtype in dtypes if not gpu or dtype != torch.float32  # fp32 has no attention kernel there
               for head_dim in (64, 128)
               for norm, bias in ((False, False), (True, False), (False, True), (True, True))]
    checks += [(f"joint attention  short streams  {'norm' * norm:4}  {'bias' * bias:4}", dtype,
                attention.self_check, (device, dtype, 64, 2, norm, bias, True))
               for dtype in dtypes if gpu and dtype != torch.float32  # interpreted, tiles are the same
               for norm, bias in ((False, False), (True, True))]
    mine, shares = map(int, args.part.split("/")) if args.part else (0, 1)
    wrong = 0
    for what, dtype, check, given in checks[mine::shares]:
        worst = check(*given, **sizes if check is attention.worst_error else {})
        wrong += not worst <= 1
        print(f"{what:40} {str(dtype)[6:]:8}  {worst:7.3f} of its bound  {'ok' if worst <= 1 else 'WRONG'}",
              flush=True)
    return int(wrong > 0) if args.part else verdict(wrong)


if __name__ == "__main__":
    sys.exit(main())
