"""A scale for each piece of a line (1 x 128, or MX's 1 x 32) or for each square of 128 x 128.

One read of bf16 makes both layouts, 2 + 1 + 1 bytes an element: a program holds a square of 128 x 128, in which the
pieces of rows, of columns and the square itself are all whole, so nobody else's amax is needed. Scales of pieces of
rows are stored column by column, those of pieces of columns row by row: so GEMM hardware reads them. What is cast by
pieces is x, or made of it and of `other` as `sources.py` says.
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
from lightning_fp8.kernels.triton.sources import load_source

SIDE = 128


@triton.jit
def squares_kernel(
    x_ptr, rows_ptr, columns_ptr, scale_ptr, M, K, FP8: tl.constexpr, POWER_OF_TWO: tl.constexpr, SIDE: tl.constexpr
):
    """Casts a square by one scale; scales are [ceil(M / SIDE), ceil(K / SIDE)]."""
    top, left = tile_origin(K, SIDE, SIDE)
    m, k = top + tl.arange(0, SIDE), left + tl.arange(0, SIDE)
    x = load_tile(x_ptr, m, k, M, K)
    scale = scale_of(tl.max(tl.max(magnitude(x), axis=1), axis=0), FP8, POWER_OF_TWO)
    tl.store(scale_ptr + tl.program_id(0), scale)
    codes = encode(fp32(x), scale, FP8, POWER_OF_TWO, False)
    if rows_ptr is not None:
        store_rows(codes, rows_ptr, m, k, M, K)
    if columns_ptr is not None:
        store_columns(codes, columns_ptr, m, k, M, K)


@triton.jit
def pieces_kernel(
    x_ptr,
    other_ptr,
    rstd_ptr,
    rows_ptr,
    columns_ptr,
    row_scale_ptr,
    column_scale_ptr,
    M,
    K,
    FP8: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    LENGTH: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Casts a square by pieces of LENGTH; both arrays of scales lie as [pieces of a line, lines]."""
    top, left = tile_origin(K, SIDE, SIDE)
    m, k = top + tl.arange(0, SIDE), left + tl.arange(0, SIDE)
    x = load_source(x_ptr, other_ptr, rstd_ptr, m, k, M, K)
    if rows_ptr is not None:
        codes, scale = _cast_pieces(x, FP8, POWER_OF_TWO, LENGTH, SIDE)
        _store_scales(scale, row_scale_ptr, m, left, M, K, LENGTH, SIDE)
        store_rows(codes, rows_ptr, m, k, M, K)
    if columns_ptr is not None:
        codes, scale = _cast_pieces(tl.trans(x), FP8, POWER_OF_TWO, LENGTH, SIDE)
        _store_scales(scale, column_scale_ptr, k, top, K, M, LENGTH, SIDE)
        store_rows(codes, columns_ptr, k, m, K, M)


@triton.jit
def _cast_pieces(x, FP8: tl.constexpr, POWER_OF_TWO: tl.constexpr, LENGTH: tl.constexpr, SIDE: tl.constexpr):
    """Codes [SIDE, SIDE] and scales [SIDE, SIDE / LENGTH] for pieces of the rows of x."""
    pieces = tl.reshape(x, [SIDE, SIDE // LENGTH, LENGTH])
    scale = scale_of(tl.max(magnitude(pieces), axis=2), FP8, POWER_OF_TWO)
    codes = encode(fp32(pieces), scale[:, :, None], FP8, POWER_OF_TWO, False)
    return tl.reshape(codes, [SIDE, SIDE]), scale


@triton.jit
def _store_scales(scale, scale_ptr, line, first, LINES, EXTENT, LENGTH: tl.constexpr, SIDE: tl.constexpr):
    """Stores scale[line, piece] at [piece, line]; of EXTENT elements of a line, the tile begins at `first`."""
    piece = first // LENGTH + tl.arange(0, SIDE // LENGTH)
    inside = (line[:, None] < LINES) & (piece[None, :] * LENGTH < EXTENT)
    tl.store(scale_ptr + (piece[None, :] * LINES + line[:, None]), scale, mask=inside)
