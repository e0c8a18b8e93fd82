"""The three passes of a gradient reduction in FP8 in Triton, each over all tensors of a bucket in one launch.

Bytes moved an element of bf16 on N ranks: 2 + 1 to encode, and to decode; (N + 1) / N to accumulate a chunk. Counts are
sums of whole numbers, exact in any order.
"""

import triton
import triton.language as tl

from lightning_fp8.kernels.triton.encode import INTERPRETED, encode, fp32, to_fp8
from lightning_fp8.kernels.triton.table import owner_of, pointer

TILE = 4096  # elements a program


@triton.jit(do_not_specialize=["TENSORS"])
def encode_kernel(
    table_ptr,
    first_ptr,
    codes_ptr,
    scale_ptr,
    underflown_ptr,
    TENSORS,
    TYPE: tl.constexpr,
    FP8: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Casts tensors by their scales and lays them end to end; a table's row is an address, a size, a place."""
    program = tl.program_id(0)
    owner = owner_of(first_ptr, program, TENSORS, PADDED)
    at = table_ptr + owner * 3
    i = (program - tl.load(first_ptr + owner)).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = i < tl.multiple_of(tl.load(at + 1), ALIGNMENT)
    scale = tl.load(scale_ptr + owner)
    # By a scale that is not finite every number becomes 0, or NaN if it is not finite itself.
    finite = scale < float("inf")
    x = fp32(tl.load(pointer(at, TYPE, ALIGNMENT) + i, mask=inside, other=0.0))
    x = x * tl.where(finite, 1.0, 0.0)
    codes = encode(x, tl.where(finite, scale, 1.0), FP8, False, False).to(tl.uint8, bitcast=True)
    tl.store(codes_ptr + (tl.multiple_of(tl.load(at + 2), ALIGNMENT) + i), codes, mask=inside)
    tl.atomic_add(underflown_ptr + owner, _underflown(codes, x), sem="relaxed")


@triton.jit(do_not_specialize=["TENSORS", "RANKS"])
def accumulate_kernel(
    table_ptr,
    first_ptr,
    codes_ptr,
    result_ptr,
    headroom_ptr,
    saturated_ptr,
    underflown_ptr,
    RANKS,
    CHUNK,
    TENSORS,
    FP8: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Adds up what all ranks sent of a chunk, in their order, and casts it; a table's row is a start and a stop."""
    LARGEST: tl.constexpr = 448.0 if tl.float8e4nv == FP8 else 57344.0
    program = tl.program_id(0)
    owner = owner_of(first_ptr, program, TENSORS, PADDED)
    start = tl.multiple_of(tl.load(table_ptr + owner * 2), ALIGNMENT)
    i = start + (program - tl.load(first_ptr + owner)).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = i < tl.multiple_of(tl.load(table_ptr + owner * 2 + 1), ALIGNMENT)
    total = _decoded(tl.load(codes_ptr + i, mask=inside, other=0), FP8)
    for rank in range(1, RANKS):
        codes = tl.load(codes_ptr + (rank * CHUNK.to(tl.int64) + i), mask=inside, other=0)
        total += _decoded(codes, FP8)
    total *= tl.load(headroom_ptr + owner)
    codes = to_fp8(total, FP8).to(tl.uint8, bitcast=True)
    tl.store(result_ptr + i, codes, mask=inside)
    tl.atomic_add(saturated_ptr + owner, tl.sum((tl.abs(total) > LARGEST).to(tl.int32), axis=0), sem="relaxed")
    tl.atomic_add(underflown_ptr + owner, _underflown(codes, total), sem="relaxed")


@triton.jit(do_not_specialize=["TENSORS"])
def decode_kernel(
    table_ptr,
    first_ptr,
    codes_ptr,
    factor_ptr,
    TENSORS,
    TYPE: tl.constexpr,
    FP8: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes codes that lie end to end, times a factor each, into tensors; a table as of `encode_kernel`."""
    program = tl.program_id(0)
    owner = owner_of(first_ptr, program, TENSORS, PADDED)
    at = table_ptr + owner * 3
    i = (program - tl.load(first_ptr + owner)).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = i < tl.multiple_of(tl.load(at + 1), ALIGNMENT)
    codes = tl.load(codes_ptr + (tl.multiple_of(tl.load(at + 2), ALIGNMENT) + i), mask=inside, other=0)
    values = _decoded(codes, FP8) * tl.load(factor_ptr + owner)
    if INTERPRETED and tl.bfloat16 == TYPE:  # whose own cast does not round to nearest even
        bits = values.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        values = tl.where(values != values, 0x7FC0, rounded).to(tl.int16).to(tl.bfloat16, bitcast=True)
    tl.store(pointer(at, TYPE, ALIGNMENT) + i, values.to(TYPE), mask=inside)


@triton.jit
def _decoded(codes, FP8: tl.constexpr):
    """What codes, uint8, stand for, fp32."""
    if INTERPRETED:  # whose own cast is wrong for NaN: the exponent and the mantissa where fp32 has them, then scaled
        MANTISSA: tl.constexpr = 3 if tl.float8e4nv == FP8 else 2
        FIRST: tl.constexpr = 0x7F if tl.float8e4nv == FP8 else 0x7C  # code that is no finite number
        size = codes.to(tl.int32) & 0x7F
        bits = (size << (23 - MANTISSA)) | ((codes.to(tl.int32) & 0x80) << 24)
        value = bits.to(tl.float32, bitcast=True) * 2.0 ** (120 if MANTISSA == 3 else 112)
        value = tl.where(size >= FIRST, float("nan"), value)
    else:
        value = codes.to(FP8, bitcast=True).to(tl.float32)
    return value


@triton.jit
def _underflown(codes, values):
    """How many values other than 0 have the code of 0."""
    return tl.sum((((codes & 0x7F) == 0) & (values != 0.0)).to(tl.int32), axis=0)
