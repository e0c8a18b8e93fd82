"""One scale for the tensor.

Bytes moved an element of bf16, with one layout of codes or with both:

    current scaling   amax 2, then cast 2 + 1 or 2 + 2
    delayed scaling   2 + 1 or 2 + 2: the scale is remembered, and the pass that casts finds the amax

The host never learns the amax. `cast_kernel` reads it where `amax_kernel` or `remembered_kernel` left it. After
the latter it has a whole pass to do only where no scale was remembered (0), which it sees for itself; its programs
otherwise end at once, the first having handed out the scale, NaN if the amax turned out not finite.

The matrix is x, or made of it and of `other` as `sources.py` says. Then what is read is 4 bytes a time for SwiGLU, and
nothing is written and read again in between.
"""

import triton
import triton.language as tl

from lightning_fp8.kernels.triton.encode import (
    encode,
    fp32,
    magnitude,
    scale_of,
    store_columns,
    store_rows,
    tile_origin,
)
from lightning_fp8.kernels.triton.sources import gated, load_source

FLAT = 8192  # elements a program, where only the amax is wanted
TILE = (64, 128)  # rows, columns


@triton.jit
def amax_kernel(x_ptr, other_ptr, amax_ptr, size, BLOCK: tl.constexpr):
    """Raises amax (int32 bits) to the largest magnitude among `size` elements of x or of SwiGLU's product."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < size, other=0.0)
    if other_ptr is not None:
        x = gated(x, tl.load(other_ptr + offsets, mask=offsets < size, other=0.0))
    tl.atomic_max(amax_ptr, tl.max(magnitude(x), axis=0), sem="relaxed")


@triton.jit
def remembered_kernel(
    x_ptr,
    other_ptr,
    rows_ptr,
    columns_ptr,
    amax_ptr,
    remembered_ptr,
    M,
    K,
    FP8: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Casts by the remembered scale, if it is positive, and raises amax in any case."""
    top, left = tile_origin(K, BM, BK)
    m, k = top + tl.arange(0, BM), left + tl.arange(0, BK)
    x = load_source(x_ptr, other_ptr, None, m, k, M, K)
    tl.atomic_max(amax_ptr, tl.max(tl.max(magnitude(x), axis=1), axis=0), sem="relaxed")
    scale = tl.load(remembered_ptr)
    if scale > 0:
        _cast_tile(x, scale, rows_ptr, columns_ptr, m, k, M, K, FP8, False, True)


@triton.jit
def cast_kernel(
    x_ptr,
    other_ptr,
    rstd_ptr,
    rows_ptr,
    columns_ptr,
    scale_ptr,
    amax_ptr,
    remembered_ptr,
    M,
    K,
    FP8: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Casts by the scale of amax, unless a remembered one did; the first program stores the decode scale."""
    largest = tl.load(amax_ptr)
    scale = scale_of(largest, FP8, POWER_OF_TWO)
    to_do, decode = True, scale
    if remembered_ptr is not None:
        remembered = tl.load(remembered_ptr)
        to_do = (remembered > 0) == 0
        decode = tl.where(to_do, scale, remembered) + largest.to(tl.float32, bitcast=True) * 0.0
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, decode)
    if to_do:
        top, left = tile_origin(K, BM, BK)
        m, k = top + tl.arange(0, BM), left + tl.arange(0, BK)
        x = load_source(x_ptr, other_ptr, rstd_ptr, m, k, M, K)
        _cast_tile(x, scale, rows_ptr, columns_ptr, m, k, M, K, FP8, POWER_OF_TWO, False)


@triton.jit
def _cast_tile(
    x,
    scale,
    rows_ptr,
    columns_ptr,
    m,
    k,
    M,
    K,
    FP8: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    REMEMBERED: tl.constexpr,
):
    codes = encode(fp32(x), scale, FP8, POWER_OF_TWO, REMEMBERED)
    if rows_ptr is not None:
        store_rows(codes, rows_ptr, m, k, M, K)
    if columns_ptr is not None:
        store_columns(codes, columns_ptr, m, k, M, K)
