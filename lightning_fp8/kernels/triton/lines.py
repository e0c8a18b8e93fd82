"""A scale for each row, for sums along it, and a scale for each column.

Bytes moved an element of bf16:

    rows alone        2 + 1       a program holds whole rows, so one read finds the amax and casts
    columns alone     2, then 2 + 1
    both              2, then 2 + 1 + 1: one read finds all amaxes, a second one makes both layouts

A column is longer than a program can hold; its amax is gathered by atomic maxima of tiles. Rows too long for one
program are treated in the same way.
"""

import triton
import triton.language as tl

from lightning_fp8.kernels.triton.encode import (
    encode,
    fp32,
    load_tile,
    magnitude,
    scale_of,
    store_columns,
    store_rows,
    tile_origin,
)

LONGEST_ROW = 32768  # that a program holds, 32 elements a thread
TILE = (128, 128)


@triton.jit
def rows_kernel(x_ptr, rows_ptr, scale_ptr, M, K, FP8: tl.constexpr, POWER_OF_TWO: tl.constexpr, BK: tl.constexpr):
    """Casts one row."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BK)
    x = tl.load(x_ptr + (m * K + k), mask=k < K, other=0.0)
    scale = scale_of(tl.max(magnitude(x), axis=0), FP8, POWER_OF_TWO)
    tl.store(scale_ptr + m, scale)
    tl.store(rows_ptr + (m * K + k), encode(fp32(x), scale, FP8, POWER_OF_TWO, False), mask=k < K)


@triton.jit
def amax_kernel(x_ptr, row_amax_ptr, column_amax_ptr, M, K, BM: tl.constexpr, BK: tl.constexpr):
    """Raises the amaxes (int32 bits) of the rows and the columns of a tile."""
    top, left = tile_origin(K, BM, BK)
    m, k = top + tl.arange(0, BM), left + tl.arange(0, BK)
    magnitudes = magnitude(load_tile(x_ptr, m, k, M, K))
    if row_amax_ptr is not None:
        tl.atomic_max(row_amax_ptr + m, tl.max(magnitudes, axis=1), mask=m < M, sem="relaxed")
    if column_amax_ptr is not None:
        tl.atomic_max(column_amax_ptr + k, tl.max(magnitudes, axis=0), mask=k < K, sem="relaxed")


@triton.jit
def cast_kernel(
    x_ptr,
    rows_ptr,
    columns_ptr,
    row_scale_ptr,
    column_scale_ptr,
    row_amax_ptr,
    column_amax_ptr,
    M,
    K,
    FP8: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Casts a tile by the amaxes of its rows and columns; the first tile of a line stores the line's scale."""
    top, left = tile_origin(K, BM, BK)
    m, k = top + tl.arange(0, BM), left + tl.arange(0, BK)
    x = fp32(load_tile(x_ptr, m, k, M, K))
    if rows_ptr is not None:
        scale = scale_of(tl.load(row_amax_ptr + m, mask=m < M, other=0), FP8, POWER_OF_TWO)
        if left == 0:
            tl.store(row_scale_ptr + m, scale, mask=m < M)
        store_rows(encode(x, scale[:, None], FP8, POWER_OF_TWO, False), rows_ptr, m, k, M, K)
    if columns_ptr is not None:
        scale = scale_of(tl.load(column_amax_ptr + k, mask=k < K, other=0), FP8, POWER_OF_TWO)
        if top == 0:
            tl.store(column_scale_ptr + k, scale, mask=k < K)
        store_columns(encode(x, scale[None, :], FP8, POWER_OF_TWO, False), columns_ptr, m, k, M, K)
