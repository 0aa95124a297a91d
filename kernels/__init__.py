"""Fused operations, one per file, each with its maths, its plain-torch reference and its public function.

`kernels/` is the only place that asks what device a tensor is on.
"""

from kernels.attention import joint_attention
from kernels.blend import masked_step
from kernels.modulate import modulate
from kernels.rms_norm import rms_norm

__all__ = ["joint_attention", "masked_step", "modulate", "rms_norm"]
