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
    """What rounds a step: random bits for weights, uint32, and thresholds for v, fp32 in [0, 1).

    Args:
        key0: uint32, the parameter's key.
        key1: Its other half.
        step: uint32.
        row: uint32 [n], of the whole parameter.
        column: uint32 [n, b], likewise.
    """
    start = _bits(key0, key1, (step >> 10) ^ _DITHER, row, column)
    # The upper 16 bits as the fraction of a number in [1, 2): conversions run on the special-function units.
    fraction = ((start + step * _GOLDEN) >> 9) & 0x7FFF80
    return _bits(key0, key1, step, row, column), (fraction | 0x3F800000).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def stochastic_bf16(x, random):
    """The bits, int16, of the bf16 number below or above fp32 `x`, as uint32 `random` says; inf and NaN stay."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    carried = bits + tl.where(size < 0x7F800000, random & 0xFFFF, 0)
    return tl.where(size > 0x7F800000, 0x7FC0, carried >> 16).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def widened(bits):
    """The fp32 value of bf16 numbers given by their bits, int16; fp32 ones are what they are."""
    if bits.dtype == tl.int16:  # noqa: SIM108  known on compiling, where the two have different types
        x = as_float(bits.to(tl.int32) << 16)
    else:
        x = bits
    return x
