"""Which kernel casts what, on how many programs.

A thread works best on sixteen codes that lie one after the other, the widest load and store there is, and on no more
than 32 to 64 elements, so that all stay in registers; tiles and numbers of warps are chosen so. Nothing here waits for
the device or reads from it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_fp8.kernels.cast import WHOLE, Outputs
from lightning_fp8.kernels.triton import lines, tensor, tiles
from lightning_fp8.numerics.formats import E4M3, Format
from lightning_fp8.numerics.quantize import Tile


def launch(x: Tensor, fmt: Format, tile: Tile, power_of_two: bool, remembered: Tensor | None, outputs: Outputs) -> None:
    """Fills `outputs` as `kernels.cast` describes them; those without elements are not wanted.

    Raises:
        ValueError: x is not a contiguous matrix.
    """
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(
            f"FP8 cast kernels take a contiguous matrix, this is {tuple(x.shape)} with strides {x.stride()}."
            " Call contiguous() on it, or use lightning_fp8.kernels.cast, which does."
        )
    fp8 = tl.float8e4nv if fmt is E4M3 else tl.float8e5
    if tile == WHOLE:
        _tensor(x, fp8, power_of_two, remembered, outputs)
    elif tile == (1, None):
        _lines(x, fp8, power_of_two, outputs)
    elif tile[0] == tile[1]:
        _squares(x, fp8, power_of_two, outputs)
    else:
        _pieces(x, fp8, power_of_two, tile[1], outputs)


def _tensor(x: Tensor, fp8: tl.dtype, power_of_two: bool, remembered: Tensor | None, outputs: Outputs) -> None:
    (m, k), (bm, bk) = x.shape, tensor.TILE
    amax = outputs.amax.zero_().view(torch.int32)
    codes = _wanted(outputs.rows), _wanted(outputs.columns)
    grid, options = (triton.cdiv(m, bm) * triton.cdiv(k, bk),), {"FP8": fp8, "BM": bm, "BK": bk, "num_warps": 4}
    if remembered is None:
        tensor.amax_kernel[(triton.cdiv(x.numel(), tensor.FLAT),)](x, amax, x.numel(), BLOCK=tensor.FLAT, num_warps=8)
    else:
        tensor.remembered_kernel[grid](x, *codes, amax, remembered, m, k, **options)
    tensor.cast_kernel[grid](x, *codes, outputs.row_scale, amax, remembered, m, k, POWER_OF_TWO=power_of_two, **options)


def _lines(x: Tensor, fp8: tl.dtype, power_of_two: bool, outputs: Outputs) -> None:
    (m, k), (bm, bk) = x.shape, lines.TILE
    rows, columns = _wanted(outputs.rows), _wanted(outputs.columns)
    if columns is None and k <= lines.LONGEST_ROW:
        block = triton.next_power_of_2(k)
        warps = min(max(block // 512, 1), 32)
        lines.rows_kernel[(m,)](
            x, rows, outputs.row_scale, m, k, FP8=fp8, POWER_OF_TWO=power_of_two, BK=block, num_warps=warps
        )
        return
    zeros = torch.zeros(m + k, dtype=torch.int32, device=x.device)
    amaxes = zeros[:m] if rows is not None else None, zeros[m:] if columns is not None else None
    grid, options = (triton.cdiv(m, bm) * triton.cdiv(k, bk),), {"BM": bm, "BK": bk, "num_warps": 8}
    lines.amax_kernel[grid](x, *amaxes, m, k, **options)
    scales = _wanted(outputs.row_scale), _wanted(outputs.column_scale)
    lines.cast_kernel[grid](x, rows, columns, *scales, *amaxes, m, k, FP8=fp8, POWER_OF_TWO=power_of_two, **options)


def _squares(x: Tensor, fp8: tl.dtype, power_of_two: bool, outputs: Outputs) -> None:
    m, k = x.shape
    grid = (triton.cdiv(m, tiles.SIDE) * triton.cdiv(k, tiles.SIDE),)
    options = {"FP8": fp8, "POWER_OF_TWO": power_of_two, "SIDE": tiles.SIDE, "num_warps": 8}
    tiles.squares_kernel[grid](x, _wanted(outputs.rows), _wanted(outputs.columns), outputs.row_scale, m, k, **options)


def _pieces(x: Tensor, fp8: tl.dtype, power_of_two: bool, length: int | None, outputs: Outputs) -> None:
    m, k = x.shape
    grid = (triton.cdiv(m, tiles.SIDE) * triton.cdiv(k, tiles.SIDE),)
    options = {"FP8": fp8, "POWER_OF_TWO": power_of_two, "LENGTH": length, "SIDE": tiles.SIDE, "num_warps": 16}
    wanted = [_wanted(t) for t in (outputs.rows, outputs.columns, outputs.row_scale, outputs.column_scale)]
    tiles.pieces_kernel[grid](x, *wanted, m, k, **options)


def _wanted(output: Tensor) -> Tensor | None:
    return output if output.numel() else None
