"""`numerics/rounding.py` in Triton: the same hash of the same numbers, and what it rounds."""

import triton
import triton.language as tl

from lightning_fp8.kernels.triton.elementary import as_float

_GOLDEN = tl.constexpr(0x9E3779B9)
_DITHER = tl.constexpr(0x80000000)


@triton.jit
def _mix(x, key):
    x = ((x ^ (x >> 16)) * 0x7FEB352D) ^ key
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _row_key(key0, key1, step, row):
    first = _mix(_mix(key0 ^ _mix(step, 0), key1) ^ row, 0)
    return first, _mix(first ^ key1, row)


@triton.jit
def _bits(key0, key1, step, row, column):
    first, second = _row_key(key0, key1, step, row)
    return _mix(column ^ first[:, None], second[:, None])


@triton.jit
def drawn(key0, key1, step, row, column):
    """What rounds a step: random bits for weights, uint32, and thresholds for v, fp32 in [0, 2^32).

    Args:
        key0: uint32, the parameter's key.
        key1: Its other half.
        step: uint32.
        row: uint32 [n], of the whole parameter.
        column: uint32 [n, b], likewise.
    """
    start = _bits(key0, key1, (step >> 10) ^ _DITHER, row, column)
    # Of a threshold 16 bits count. Shifted down they would be converted on the special-function units.
    threshold = ((start + step * _GOLDEN) & 0xFFFF0000).to(tl.float32)
    return _bits(key0, key1, step, row, column), threshold


@triton.jit
def stochastic_bf16(x, random):
    """The bits, int16, of the bf16 number below or above fp32 `x`, as uint32 `random` says; inf and NaN stay.

    A NaN that arithmetic made, or let through, has its uppermost mantissa bits set, so it stays one when it is cut.
    """
    added = tl.where(tl.abs(x) < float("inf"), random & 0xFFFF, 0)
    return ((x.to(tl.uint32, bitcast=True) + added) >> 16).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def widened(bits):
    """The fp32 value of bf16 numbers given by their bits, int16; fp32 ones are what they are."""
    if bits.dtype == tl.int16:  # noqa: SIM108  known on compiling, where the two have different types
        x = as_float(bits.to(tl.int32) << 16)
    else:
        x = bits
    return x
