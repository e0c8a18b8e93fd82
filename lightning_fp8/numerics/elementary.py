"""Logarithm, power of two and square root of fp32 tensors, the same bits on every path.

The library functions differ in the last bit between eager and compiled code, between vector widths, and even with the
place of an element in its tensor (torch's eager `sqrt` on a CPU too). A code that is rounded from one then depends on
who computed it. Logarithms and powers here are polynomials: only additions and multiplications of fp32, each rounded as
IEEE 754 says, in one order, and integer arithmetic on the bits. They also take a fraction of the time of fp64's.

That holds as long as nobody fuses a multiplication and an addition into one rounding. Eager torch cannot, since they
are two calls, and inductor's C++ is built with -ffp-contract=off; a compiler for a GPU has to be told.

The coefficients are minimax (Remez exchange in fp64) for the error that each docstring names; "exact" is what a
polynomial is at 0, since it has no constant term.
"""

import torch
from torch import Tensor

_MANTISSA_BITS = 23
_MANTISSA = (1 << _MANTISSA_BITS) - 1
ROOT_HALF = 0x3F3504F3  # the bits of sqrt(1/2)

# log2(1 + x) / x on [sqrt(1/2) - 1, sqrt(2) - 1].
LOG2 = (
    1.442694772427166,
    -0.7213571489144762,
    0.4809394449089522,
    -0.36008721622825,
    0.28670745336892905,
    -0.2500690359957697,
    0.23689039125907077,
    -0.14574450463843952,
)
# (2^x - 1) / x on [0, 1].
EXP2 = (
    0.6931513118046008,
    0.24016445015509036,
    0.05579991310374498,
    0.009017030322426758,
    0.0018671300698853328,
)


def log2(x: Tensor) -> tuple[Tensor, Tensor]:
    """The binary logarithm of normal positive fp32 `x`, in two parts: whole octaves, int32, and fp32 in [-1/2, 1/2].

    The sum is right to 1e-7 and exact at powers of two; it is kept apart because fp32 could not hold it so well.
    """
    offset = x.view(torch.int32) - ROOT_HALF
    mantissa = (offset & _MANTISSA).add_(ROOT_HALF).view(torch.float32)
    above_one = mantissa.sub_(1.0)
    return offset >> _MANTISSA_BITS, _horner(above_one, LOG2).mul_(above_one)


def exp2(octaves: Tensor, fraction: Tensor) -> Tensor:
    """2^(octaves + fraction), fp32, of whole `octaves` (fp32) in [-126, 126] and fp32 `fraction` in [0, 1].

    Right to 2.2e-7, relatively, and exact at fraction 0.
    """
    mantissa = _horner(fraction, EXP2).mul_(fraction).add_(1.0)
    exponent = octaves.int() << _MANTISSA_BITS
    return exponent.add_(mantissa.view(torch.int32)).view(torch.float32)


def sqrt(x: Tensor) -> Tensor:
    """The square root of fp32 `x`, correctly rounded.

    On a CPU eager torch's fp32 root is not. In fp64 it may be an ulp off too, which does not reach fp32: a root of 24
    bits is 4 fp64 ulps or more away from the middle between two fp32 numbers.
    """
    return x.double().sqrt_().float() if x.device.type == "cpu" else x.sqrt()


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """The polynomial in `x` with `coefficients`, the constant one first."""
    result = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        result = result.add_(coefficient).mul_(x)
    return result.add_(coefficients[0])
