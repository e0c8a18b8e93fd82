"""Which kernel casts what, on how many programs.

A thread works best on sixteen codes that lie one after the other, the widest load and store there is, and on no more
than 32 to 64 elements, so that all stay in registers; tiles and numbers of warps are chosen so. Nothing here waits for
the device or reads from it.

Three matrices are cast: one that lies in memory (`launch`), and what SwiGLU (`launch_gated`) and RMSNorm
(`launch_normed`) would write. The latter two have no kernel for scales by row, nor by square, which no input has.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_fp8.kernels.outputs import WHOLE, Outputs
from lightning_fp8.kernels.triton import lines, norm, tensor, tiles
from lightning_fp8.numerics.formats import E4M3, E5M2, Format
from lightning_fp8.numerics.quantize import Tile


def launch(x: Tensor, fmt: Format, tile: Tile, power_of_two: bool, remembered: Tensor | None, outputs: Outputs) -> None:
    """Fills `outputs` as `kernels.outputs` describes them; those without elements are not wanted.

    Raises:
        ValueError: x is not a contiguous matrix.
    """
    _check(x)
    if tile == WHOLE:
        _tensor(Source(x), fmt, power_of_two, remembered, outputs)
    elif tile == (1, None):
        _lines(x, fmt, power_of_two, outputs)
    elif tile[0] == tile[1]:
        _squares(x, fmt, power_of_two, outputs)
    else:
        _pieces(Source(x), fmt, power_of_two, tile[1], outputs)


def launch_gated(
    gate: Tensor, up: Tensor, fmt: Format, tile: Tile, power_of_two: bool, remembered: Tensor | None, outputs: Outputs
) -> None:
    """As `launch`, of silu(gate) * up; the tile is the whole or a piece of a row."""
    _check(gate)
    _check(up)
    if tile == WHOLE:
        _tensor(Source(gate, up), fmt, power_of_two, remembered, outputs)
    else:
        _pieces(Source(gate, up), fmt, power_of_two, tile[1], outputs)


def launch_normed(
    x: Tensor,
    gain: Tensor,
    eps: float,
    fmt: Format,
    tile: Tile,
    power_of_two: bool,
    remembered: Tensor | None,
    values: Tensor,
    rstd: Tensor,
    outputs: Outputs,
) -> None:
    """As `launch`, of RMSNorm's result; fills fp32 `rstd` [M], and `values` with the result if it has elements."""
    _check(x)
    (m, k), (bm, bk) = x.shape, norm.BAND
    source, whole = Source(x, gain, rstd), tile == WHOLE
    amax = outputs.amax.zero_().view(torch.int32) if whole else None
    codes = [_wanted(outputs.rows), _wanted(outputs.columns)] if whole and remembered is not None else [None, None]
    pointers = x, gain, _wanted(values), rstd, *codes, amax, remembered
    options = {"EPS": eps, "FP8": _TYPES[fmt], "BM": bm, "BK": bk, "num_warps": 4}
    norm.norm_kernel[(triton.cdiv(m, bm),)](*pointers, m, k, **options)
    if whole:
        _cast_whole(source, fmt, power_of_two, remembered, amax, outputs)
    else:
        _pieces(source, fmt, power_of_two, tile[1], outputs)


class Source(NamedTuple):
    """What a matrix is made of; see `sources.py`."""

    x: Tensor
    other: Tensor | None = None
    rstd: Tensor | None = None


_TYPES = {E4M3: tl.float8e4nv, E5M2: tl.float8e5}


def _check(x: Tensor) -> None:
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(
            f"FP8 cast kernels take a contiguous matrix, this is {tuple(x.shape)} with strides {x.stride()}."
            " Call contiguous() on it, or use lightning_fp8.kernels.cast, which does."
        )


def _tensor(source: Source, fmt: Format, power_of_two: bool, remembered: Tensor | None, outputs: Outputs) -> None:
    x, amax = source.x, outputs.amax.zero_().view(torch.int32)
    if remembered is None:
        grid = (triton.cdiv(x.numel(), tensor.FLAT),)
        tensor.amax_kernel[grid](x, source.other, amax, x.numel(), BLOCK=tensor.FLAT, num_warps=8)
    else:
        codes = _wanted(outputs.rows), _wanted(outputs.columns)
        grid, options = _tensor_tiles(x, fmt)
        tensor.remembered_kernel[grid](x, source.other, *codes, amax, remembered, *x.shape, **options)
    _cast_whole(source, fmt, power_of_two, remembered, amax, outputs)


def _cast_whole(
    source: Source, fmt: Format, power_of_two: bool, remembered: Tensor | None, amax: Tensor | None, outputs: Outputs
) -> None:
    codes = _wanted(outputs.rows), _wanted(outputs.columns)
    grid, options = _tensor_tiles(source.x, fmt)
    pointers = *source, *codes, outputs.row_scale, amax, remembered
    tensor.cast_kernel[grid](*pointers, *source.x.shape, POWER_OF_TWO=power_of_two, **options)


def _tensor_tiles(x: Tensor, fmt: Format) -> tuple[tuple[int], dict[str, Any]]:
    (m, k), (bm, bk) = x.shape, tensor.TILE
    return (triton.cdiv(m, bm) * triton.cdiv(k, bk),), {"FP8": _TYPES[fmt], "BM": bm, "BK": bk, "num_warps": 4}


def _lines(x: Tensor, fmt: Format, power_of_two: bool, outputs: Outputs) -> None:
    (m, k), (bm, bk) = x.shape, lines.TILE
    rows, columns = _wanted(outputs.rows), _wanted(outputs.columns)
    if columns is None and k <= lines.LONGEST_ROW:
        block = triton.next_power_of_2(k)
        warps = min(max(block // 512, 1), 32)
        lines.rows_kernel[(m,)](
            x, rows, outputs.row_scale, m, k, FP8=_TYPES[fmt], POWER_OF_TWO=power_of_two, BK=block, num_warps=warps
        )
        return
    zeros = torch.zeros(m + k, dtype=torch.int32, device=x.device)
    amaxes = zeros[:m] if rows is not None else None, zeros[m:] if columns is not None else None
    grid, options = (triton.cdiv(m, bm) * triton.cdiv(k, bk),), {"BM": bm, "BK": bk, "num_warps": 8}
    lines.amax_kernel[grid](x, *amaxes, m, k, **options)
    scales = _wanted(outputs.row_scale), _wanted(outputs.column_scale)
    lines.cast_kernel[grid](
        x, rows, columns, *scales, *amaxes, m, k, FP8=_TYPES[fmt], POWER_OF_TWO=power_of_two, **options
    )


def _squares(x: Tensor, fmt: Format, power_of_two: bool, outputs: Outputs) -> None:
    m, k = x.shape
    grid = (triton.cdiv(m, tiles.SIDE) * triton.cdiv(k, tiles.SIDE),)
    options = {"FP8": _TYPES[fmt], "POWER_OF_TWO": power_of_two, "SIDE": tiles.SIDE, "num_warps": 8}
    tiles.squares_kernel[grid](x, _wanted(outputs.rows), _wanted(outputs.columns), outputs.row_scale, m, k, **options)


def _pieces(source: Source, fmt: Format, power_of_two: bool, length: int | None, outputs: Outputs) -> None:
    m, k = source.x.shape
    grid = (triton.cdiv(m, tiles.SIDE) * triton.cdiv(k, tiles.SIDE),)
    options = {"FP8": _TYPES[fmt], "POWER_OF_TWO": power_of_two, "LENGTH": length, "SIDE": tiles.SIDE, "num_warps": 16}
    wanted = [_wanted(t) for t in (outputs.rows, outputs.columns, outputs.row_scale, outputs.column_scale)]
    tiles.pieces_kernel[grid](*source, *wanted, m, k, **options)


def _wanted(output: Tensor) -> Tensor | None:
    return output if output.numel() else None
