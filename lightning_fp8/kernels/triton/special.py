"""The special functions of a GPU, one instruction each, with the errors that NVIDIA's PTX manual allows them.

Arguments and results below 2^-126 count as 0. The interpreter has no such functions; it takes numpy's.
"""

import triton
import triton.language as tl

from lightning_fp8.kernels.triton.encode import INTERPRETED


@triton.jit
def exp2(x):
    """2^x, right to 2^-22, relatively."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def log2(x):
    """The binary logarithm of `x` in [1, 2), right to 2^-22."""
    if INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def inverse(x):
    """1 / x, right to 2^-23, relatively; inf where `x` is 0."""
    if INTERPRETED:
        return tl.math.div_rn(1.0, x)
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def root(x):
    """The square root of `x`, right to 2^-23, relatively."""
    if INTERPRETED:
        return tl.sqrt_rn(x)
    return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
