"""Stochastic rounding whose random bits are a function of what is rounded, not of who rounds it when.

A bf16 weight that is rounded to nearest loses every update smaller than half its last bit; rounded up or down with
the right odds it keeps them on average. The random bits come from a counter-based hash of

    (seed, parameter name)  ->  key        once, on the host
    (key, step, row)        ->  row key    64 bits, once a row
    (row key, column)       ->  32 bits    once an element

so that replicas round alike, a resumed run rounds as the uninterrupted one, and sharding a tensor by rows or columns
changes nothing.

A moving average is rounded in each step too, and what it remembers of a thousand independent roundings is their random
walk. Its thresholds (`dither`) are therefore a low-discrepancy sequence in time, of a random start an element: step t
has frac(start + t * (golden ratio)), which is uniform over elements and over time as random numbers are, but fills
the unit interval evenly within a few steps, so that roundings up and down balance. Whatever has a period of its own (a
column whose gradients come every 89 steps, say) meets nearly the same threshold each time; so the start is drawn anew
every 1,024 steps.

The mixer is the two-multiply 32-bit permutation "lowbias32" of Chris Wellons' hash-prospector;
all arithmetic is modulo 2^32 in int32, which is what a GPU does natively.
"""

import hashlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B9 - (1 << 32)  # 2^32 / golden ratio, to the nearest odd number, as a signed 32-bit number
_DITHER_PERIOD_BITS = 10  # steps for which an element keeps the start of its sequence, as a power of two
_DITHER = -(1 << 31)  # sets the keys of these starts apart from those of any step
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - (1 << 32))  # lowbias32's, the second as a signed 32-bit number


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32; torch's own shift copies the sign."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _mix(x: Tensor, key: Tensor | int = 0) -> Tensor:
    """Permutes int32 `x`; a second `key` may enter between the two multiplications."""
    x = (x ^ _shifted(x, 16)) * _MULTIPLIERS[0] ^ key
    x = (x ^ _shifted(x, 15)) * _MULTIPLIERS[1]
    return x ^ _shifted(x, 16)


def parameter_key(seed: int, name: str) -> tuple[int, int]:
    """The key of one parameter: two signed 32-bit integers from a cryptographic hash of seed and name."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:], "little", signed=True)


def row_keys(keys: Tensor, step: Tensor, rows: Tensor) -> Tensor:
    """Folds the step and the row number into parameter keys.

    Args:
        keys: int32 [n, 2], of the parameter that each row belongs to.
        step: int32 [n], the parameter's step count.
        rows: int32 [n], the row's number in the whole (unsharded) parameter.

    Returns:
        int32 [n, 2].
    """
    first = _mix(_mix(keys[:, 0] ^ _mix(step), keys[:, 1]) ^ rows)
    return torch.stack([first, _mix(first ^ keys[:, 1], rows)], dim=1)


def random_bits(row_keys: Tensor, columns: Tensor) -> Tensor:
    """32 random bits an element.

    Args:
        row_keys: int32 [n, 2] from `row_keys`.
        columns: int32 [n, c] or [c], the element's column in the whole parameter.

    Returns:
        int32 [n, c], all 32 bits used.
    """
    return _mix(columns ^ row_keys[:, :1], row_keys[:, 1:])


def dither(keys: Tensor, step: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Thresholds of stochastic rounding that are evenly spread over the steps of each element.

    Args:
        keys: int32 [n, 2], of the parameter that each row belongs to.
        step: int32 [n], the parameter's step count.
        rows: int32 [n], the row's number in the whole (unsharded) parameter.
        columns: int32 [n, c] or [c], the element's column in the whole parameter.

    Returns:
        fp32 [n, c], multiples of 2^-16 in [0, 1).
    """
    epoch = (step >> _DITHER_PERIOD_BITS) ^ _DITHER
    start = random_bits(row_keys(keys, epoch, rows), columns)
    return _shifted(start + (step * _GOLDEN).unsqueeze(1), 16).float() * 2.0**-16


def stochastic_round_bf16(x: Tensor, bits: Tensor) -> Tensor:
    """Rounds fp32 `x` to bf16, up or down with odds proportional to the distance.

    Args:
        x: fp32, any shape.
        bits: int32 of the same shape; the low 16 bits are used and must be uniform.

    Returns:
        bf16. A value that bf16 can hold is returned unchanged; inf and NaN stay what they are.
    """
    # Sign and magnitude are separate in the encoding, so adding below the kept bits moves away from zero.
    # The mask is zero for inf and NaN: integers, since `where` and `isfinite` take ten times as long on a CPU.
    encoding = x.view(torch.int32)
    low = (((encoding & 0x7FFFFFFF) - 0x7F800000) >> 31) & 0xFFFF
    carried = ((bits & low) + encoding) & ~low
    return carried.view(torch.float32).to(torch.bfloat16)
