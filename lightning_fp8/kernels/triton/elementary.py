"""`numerics/elementary.py` in Triton: the same polynomial, operation by operation, so the same bits.

That takes multiplications and additions that are rounded one by one: kernels that use it are launched with
`enable_fp_fusion=False`, which keeps both LLVM and ptxas from fusing them.
"""

import triton
import triton.language as tl

from lightning_fp8.numerics import elementary

_LOG2 = tl.constexpr(elementary.LOG2)
_ROOT_HALF = tl.constexpr(elementary.ROOT_HALF)


@triton.jit
def as_float(bits):
    """The fp32 number that int32 `bits` encode."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def as_int(x):
    """The bits of fp32 `x`, int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def log2(bits):
    """The binary logarithm of a normal positive fp32 number, given by its bits: whole octaves, int32, and the rest."""
    offset = bits - _ROOT_HALF
    x = as_float((offset & 0x7FFFFF) + _ROOT_HALF) - 1.0
    p = x * _LOG2[7]
    p = (p + _LOG2[6]) * x
    p = (p + _LOG2[5]) * x
    p = (p + _LOG2[4]) * x
    p = (p + _LOG2[3]) * x
    p = (p + _LOG2[2]) * x
    p = (p + _LOG2[1]) * x
    return offset >> 23, (p + _LOG2[0]) * x
