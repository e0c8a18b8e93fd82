"""What the operators of casts return, and where in memory it lies: what references and kernels are given to fill."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fp8.numerics import Format
from lightning_fp8.numerics.quantize import Tile

WHOLE: Tile = (None, None)


class Outputs(NamedTuple):
    """What the operator returns; what was not asked for or does not exist has no elements.

    Attributes:
        rows: float8 [M, K].
        columns: float8 [K, M].
        row_scale: fp32: a scalar, the scale of both layouts; or [M, 1]; or one a tile. Squares serve both layouts;
            pieces of rows have theirs stored column by column, as GEMM hardware reads them.
        column_scale: fp32 [1, K], or one a tile.
        amax: fp32, a scalar where the scale is.
    """

    rows: Tensor
    columns: Tensor
    row_scale: Tensor
    column_scale: Tensor
    amax: Tensor


def allocate(x: Tensor, fmt: Format, tile: Tile, rows: bool, columns: bool) -> Outputs:
    """The operator's outputs, not yet filled: what they are for fake tensors."""
    (m, k), (height, width) = x.shape, tile

    def fp32(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    if tile == WHOLE:
        row_scale, column_scale = fp32(), fp32(0)
    elif height == width:
        row_scale, column_scale = fp32(_tiles(m, height), _tiles(k, width)), fp32(0)
    else:
        row_scale = fp32(_tiles(k, width), m).t() if rows else fp32(0)
        column_scale = fp32(_tiles(m, width), k) if columns else fp32(0)
    return Outputs(
        x.new_empty((m, k) if rows else (0,), dtype=fmt.dtype),
        x.new_empty((k, m) if columns else (0,), dtype=fmt.dtype),
        row_scale,
        column_scale,
        fp32() if tile == WHOLE else fp32(0),
    )


def _tiles(size: int, length: int | None) -> int:
    return 1 if length is None else -(-size // length)
