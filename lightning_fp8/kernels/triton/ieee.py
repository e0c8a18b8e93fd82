"""Quotients and roots as IEEE rounds them, for numbers known to be far from the ends of fp32's range.

What `div_rn` and `sqrt_rn` expand to tests every element and branches for the extreme ones, so that of a thread's
elements each waits for the one before. Without the test they are a straight line, which the hardware overlaps: a first
guess from the special-function unit, then multiplications and additions with one rounding. The steps are those of the
compiler's own fast path; `test_ieee.py` shows that they are right for any guess within four units in the last place,
which is more than the units are off.

The interpreter has no such unit. Its guess is the rounded result of numpy.
"""

import triton
import triton.language as tl

from lightning_fp8.kernels.triton.encode import INTERPRETED, multiply_add, with_sign_of


@triton.jit
def quotient(x, y):
    """The quotient x / y, rounded as IEEE says; its size in [2^-126, 2^126], that of x from 2^-100, y from 2^-100."""
    inverse = _inverse(y)
    inverse = multiply_add(inverse, multiply_add(-y, inverse, tl.full(y.shape, 1.0, tl.float32)), inverse)
    q = x * inverse
    return with_sign_of(multiply_add(multiply_add(-y, q, x), inverse, q), x)  # a zero has lost its sign


@triton.jit
def root(x):
    """The square root of x, rounded as IEEE says, for x in [2^-100, 2^126]."""
    inverse = _inverse_root(x)
    r = x * inverse
    return multiply_add(multiply_add(-r, r, x), inverse * 0.5, r)


@triton.jit
def _inverse(x):
    if INTERPRETED:
        guess = tl.math.div_rn(1.0, x)
    else:
        guess = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return guess


@triton.jit
def _inverse_root(x):
    if INTERPRETED:
        guess = tl.math.div_rn(1.0, tl.sqrt_rn(x))
    else:
        guess = tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return guess
