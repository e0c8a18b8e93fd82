"""Casting a matrix for the GEMMs that sum over its rows' elements, over its columns', or for both at once.

    rows       codes [M, K], scales for sums along dimension 1
    columns    codes [M, K], scales for sums along dimension 0, in memory transposed

What a GEMM sums over has to lie contiguously in memory (so says the hardware), and finer scales run along it. So both
layouts are wanted of most operands, and a kernel that makes both reads the matrix once for two. On devices without
kernels the reference makes them, in the ordinary order of memory, and only one where one scale serves both.

`torch.ops.lightning_fp8.cast` is the operator behind it, with fake and CPU implementations, so that compiled graphs and
fake tensors see a cast as one step. It is registered on the dispatcher without autograd, which halves and more what a
call costs the host (measured: 7 against 18 microseconds of `torch.library.custom_op`): nobody differentiates a cast.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fp8 import hardware
from lightning_fp8.kernels.codes import encode
from lightning_fp8.kernels.outputs import WHOLE, Outputs, allocate
from lightning_fp8.numerics import FORMATS, Format, Quantized, quantize
from lightning_fp8.numerics.quantize import Tile, amax, scale_of


class Cast(NamedTuple):
    """An operand in FP8.

    Attributes:
        rows: For a sum along dimension 1; None if it was not asked for.
        columns: For a sum along dimension 0; likewise.
        amax: fp32 scalar, the largest magnitude, where there is one scale for the whole operand; else None.
    """

    rows: Quantized | None = None
    columns: Quantized | None = None
    amax: Tensor | None = None


_TILES_WITH_KERNELS = (WHOLE, (1, None), (1, 128), (1, 32), (128, 128))


@torch.no_grad()
def cast(
    x: Tensor,
    fmt: Format,
    tile: Tile | None = None,
    *,
    rows: bool = False,
    columns: bool = False,
    power_of_two: bool = False,
    remembered: Tensor | None = None,
) -> Cast:
    """Casts a matrix to `fmt`, to nearest even, saturating.

    Args:
        x: [M, K] in bf16, fp16 or fp32.
        fmt: The target format.
        tile: (rows, columns) that share a scale in `Cast.rows`, as in `numerics.quantize`; in `Cast.columns` it is
            its transpose. None: all elements do.
        rows: Whether `Cast.rows` is wanted.
        columns: Whether `Cast.columns` is wanted.
        power_of_two: Round scales up to powers of two.
        remembered: fp32 scalar, only without a tile: the decode scale to use if it is positive, else the amax's is.
            The returned scale is NaN if the amax is not finite.

    Returns:
        At least what is wanted: where one scale serves both layouts, the reference makes one copy, and that is both.
        Kernels and reference agree on every scale, and on every code whose scale is finite.
    """
    if not (rows or columns):
        return Cast()
    tile = tile or WHOLE
    if not _has_kernel(x, tile):
        return reference(x, fmt, tile, power_of_two, remembered, rows, columns)
    made = Outputs(
        *torch.ops.lightning_fp8.cast(x.contiguous(), remembered, fmt.name, *tile, power_of_two, rows, columns)
    )
    return collect(made, tile, rows, columns)


def collect(made: Outputs, tile: Tile, rows: bool, columns: bool) -> Cast:
    """The operator's outputs as a cast; views."""
    square, whole = tile[0] == tile[1], tile == WHOLE
    return Cast(
        _quantized(made.rows, made.row_scale, tile) if rows else None,
        _quantized(made.columns.t(), made.row_scale if square else made.column_scale, tile[::-1]) if columns else None,
        made.amax if whole else None,
    )


def _has_kernel(x: Tensor, tile: Tile) -> bool:
    """Which of the two runs is decided here and nowhere else."""
    return x.is_cuda and tile in _TILES_WITH_KERNELS and hardware.runs_kernels()


def reference(
    x: Tensor, fmt: Format, tile: Tile, power_of_two: bool, remembered: Tensor | None, rows: bool, columns: bool
) -> Cast:
    """`cast` in plain torch, on any device."""
    if tile == WHOLE:
        largest = amax(x)
        scale = decode_scale = scale_of(largest, fmt, power_of_two=power_of_two)
        if remembered is not None:
            scale = torch.where(remembered > 0, remembered, scale)
            # amax * 0 is 0, or NaN if it is not finite: then so is all that a GEMM makes of it, and nothing is hidden.
            decode_scale = scale + largest * 0
        one = Quantized(encode(x, fmt, scale), decode_scale)
        return Cast(one, one, largest)
    if tile[0] == tile[1]:
        one = quantize(x, fmt, tile=tile, power_of_two=power_of_two)
        return Cast(one, one)
    return Cast(
        quantize(x, fmt, tile=tile, power_of_two=power_of_two) if rows else None,
        quantize(x, fmt, tile=tile[::-1], power_of_two=power_of_two) if columns else None,
    )


def _quantized(codes: Tensor, scale: Tensor, tile: Tile) -> Quantized:
    rows, columns = tile
    return Quantized(codes, scale, None if rows is None or columns is None else (rows, columns))


torch.library.define(
    "lightning_fp8::cast",
    "(Tensor x, Tensor? remembered, str format, int? tile_rows, int? tile_columns, bool power_of_two, bool rows,"
    " bool columns) -> (Tensor rows, Tensor columns, Tensor row_scale, Tensor column_scale, Tensor amax)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _fake(
    x: Tensor,
    remembered: Tensor | None,
    format: str,
    tile_rows: int | None,
    tile_columns: int | None,
    power_of_two: bool,
    rows: bool,
    columns: bool,
) -> Outputs:
    return allocate(x, FORMATS[format], (tile_rows, tile_columns), rows, columns)


torch.library.register_fake("lightning_fp8::cast", _fake)


@torch.library.impl("lightning_fp8::cast", "cpu")
def _by_reference(
    x: Tensor,
    remembered: Tensor | None,
    format: str,
    tile_rows: int | None,
    tile_columns: int | None,
    power_of_two: bool,
    rows: bool,
    columns: bool,
) -> Outputs:
    tile = (tile_rows, tile_columns)
    outputs = allocate(x, FORMATS[format], tile, rows, columns)
    fill_by_reference(x, FORMATS[format], tile, power_of_two, remembered, outputs)
    return outputs


def fill_by_reference(
    x: Tensor, fmt: Format, tile: Tile, power_of_two: bool, remembered: Tensor | None, outputs: Outputs
) -> None:
    """Fills `outputs` with what `reference` returns: the signature of the kernels' `launch`."""
    rows, columns = outputs.rows.dim() == 2, outputs.columns.dim() == 2
    made = reference(x, fmt, tile, power_of_two, remembered, rows, columns)
    if made.rows:
        outputs.row_scale.copy_(made.rows.scale)
        if rows:
            outputs.rows.copy_(made.rows.codes)
    if columns and made.columns:
        outputs.columns.copy_(made.columns.codes.t())
        if tile[0] != tile[1]:
            outputs.column_scale.copy_(made.columns.scale)
    if made.amax is not None:
        outputs.amax.copy_(made.amax)


@torch.library.impl("lightning_fp8::cast", "cuda")
def _by_kernel(
    x: Tensor,
    remembered: Tensor | None,
    format: str,
    tile_rows: int | None,
    tile_columns: int | None,
    power_of_two: bool,
    rows: bool,
    columns: bool,
) -> Outputs:
    from lightning_fp8.kernels.triton.launch import launch

    tile = (tile_rows, tile_columns)
    outputs = allocate(x, FORMATS[format], tile, rows, columns)
    with hardware.device_of(x):
        (launch if x.numel() else fill_by_reference)(x, FORMATS[format], tile, power_of_two, remembered, outputs)
    return outputs
