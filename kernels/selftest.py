"""Numbers of every kernel on this machine's GPU, forward and backward, against plain torch in fp64.

    python -m kernels.selftest

Exit code 1 if one is off. Without a GPU, a small part runs in Triton's interpreter, in under a minute.
"""

import os
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


def main() -> int:
    if dispatch.triton is None:
        print("no Triton on this platform: plain torch runs everywhere, there is nothing to test")
        return 0
    gpu = torch.cuda.is_available()
    if not gpu and not dispatch.interpreted():  # it must stand before the kernels are imported
        os.execve(sys.executable, [sys.executable, "-m", "kernels.selftest"],
                  {**os.environ, "TRITON_INTERPRET": "1"})
    if gpu:
        device, dtypes = torch.device("cuda", 0), (torch.bfloat16, torch.float16)
        sizes = {"lengths": (154, 1111, 640)}
        arch = dispatch.architecture(device)
        print(f"{torch.cuda.get_device_name()} ({arch}), torch {torch.__version__}, Triton "
              f"{dispatch.triton.__version__}, ptxas {'.'.join(map(str, dispatch.newer_ptxas(arch)))}")
    else:
        device, dtypes = torch.device("cpu"), (torch.float32, torch.bfloat16)
        sizes = {"lengths": (5, 40), "heads": 1}
        widen_interpreted_dots()
        print("no GPU here: the kernels interpreted on the CPU, joint attention on 45 tokens", flush=True)
    wrong = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if gpu else (torch.float32,):
        worst = blend.self_test(device, dtype)
        wrong += not worst <= 1
        print(f"masked step      {str(dtype)[6:]:8}  {worst:7.3f} of its bound  "
              f"{'ok' if worst <= 1 else 'WRONG'}", flush=True)
    for dtype in dtypes:
        for head_dim in (64, 128):
            for norm, bias in ((False, False), (True, False), (False, True), (True, True)):
                worst = attention.worst_error(device, dtype, head_dim, norm, bias, **sizes)
                wrong += not worst <= 1
                what = f"{str(dtype)[6:]:8}  heads of {head_dim:3}  {'norm' * norm:4}  {'bias' * bias:4}"
                verdict = "ok" if worst <= 1 else "WRONG"
                print(f"joint attention  {what}  {worst:7.3f} of its bound  {verdict}", flush=True)
    print(f"{wrong} are off: run with KERNELS=reference, report it" if wrong else "all within their bounds")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
