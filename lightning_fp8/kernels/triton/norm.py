"""RMSNorm: the inverse root mean square of each row, with the cast of the result where its scale is remembered.

A program owns a band of rows, as many as make a full sector of the transposed codes, and goes along it twice: the sum
of squares, then what needs it. The second time the band comes from the cache, for it was read a moment before. So of
memory's traffic, an element of bf16 costs

    delayed scaling    2 + 1 or 2 + 2                   the norm writes FP8, and finds the amax on its way
    current scaling    2, then 2 + 1 or 2 + 2           it leaves rstd and the amax, and casts in a second pass, which
                                                        makes the norm's result again rather than read a copy of it
    scales by piece    2, then 2 + 1 or 2 + 2           likewise: a piece of a column is taller than a band

and 2 more where the norm's result is wanted as well. A norm, then a cast, cost 4 more each.
"""

import triton
import triton.language as tl

from lightning_fp8.kernels.triton.encode import encode, fp32, load_tile, magnitude, store_columns, store_rows
from lightning_fp8.kernels.triton.sources import normed

BAND = (32, 128)  # rows of a band, and columns that a program holds at a time


@triton.jit
def norm_kernel(
    x_ptr,
    gain_ptr,
    values_ptr,
    rstd_ptr,
    rows_ptr,
    columns_ptr,
    amax_ptr,
    remembered_ptr,
    M,
    K,
    EPS: tl.constexpr,
    FP8: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Stores rstd, and the result in high precision (`values`) if it is wanted; raises amax (int32 bits), if wanted.

    Casts by the remembered scale, if there is one and it is positive.
    """
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    squares = tl.zeros([BM, BK], tl.float32)
    for left in range(0, K, BK):
        k = tl.zeros([BK], tl.int64) + left + tl.arange(0, BK)
        x = fp32(load_tile(x_ptr, m, k, M, K))
        squares += x * x
    mean = tl.math.div_rn(tl.sum(squares, axis=1), tl.zeros([BM], tl.float32) + K)
    rstd = tl.math.div_rn(tl.full([BM], 1.0, tl.float32), tl.math.sqrt_rn(mean + EPS))
    tl.store(rstd_ptr + m, rstd, mask=m < M)
    if values_ptr is not None or amax_ptr is not None:
        scale = 0.0
        if remembered_ptr is not None:
            scale = tl.load(remembered_ptr)
        largest = tl.zeros([BM, BK], tl.int32)
        for left in range(0, K, BK):
            k = tl.zeros([BK], tl.int64) + left + tl.arange(0, BK)
            gain = tl.load(gain_ptr + k, mask=k < K, other=0.0)
            y = normed(load_tile(x_ptr, m, k, M, K), rstd[:, None], gain[None, :])
            if values_ptr is not None:
                store_rows(y, values_ptr, m, k, M, K)
            if amax_ptr is not None:
                # Beyond the matrix x is 0, but 0 * rstd is NaN where a row's elements are all 0 and EPS is, too.
                inside = (m[:, None] < M) & (k[None, :] < K)
                largest = tl.maximum(largest, tl.where(inside, magnitude(y), 0))
            if remembered_ptr is not None:  # noqa: SIM102 (this is known when it is compiled)
                if scale > 0:
                    codes = encode(fp32(y), scale, FP8, False, True)
                    if rows_ptr is not None:
                        store_rows(codes, rows_ptr, m, k, M, K)
                    if columns_ptr is not None:
                        store_columns(codes, columns_ptr, m, k, M, K)
        if amax_ptr is not None:
            tl.atomic_max(amax_ptr, tl.max(tl.max(largest, axis=1), axis=0), sem="relaxed")
