"""Casting tensors to FP8 and back, with one scale for the whole tensor, for each line or for each tile of it.

    scale = amax(x) / format.max            codes = saturate(x / scale)            x ~ codes * scale

The scale is the *decode* scale, the one GEMMs multiply by. Three decisions, each with its reason:

* The cast saturates explicitly. `Tensor.to(float8)` differs between torch releases and formats: beyond the maximum
  E4M3 gave NaN in torch 2.11 and 448 in 2.13, E5M2 gives inf.
* A non-finite input is never hidden as the largest finite code. It makes the amax, hence the scale, non-finite, and so
  every dequantised value is NaN: whoever looks at the loss sees it.
* An all-zero tensor gets scale 1, and a scale is never below the smallest normal fp32 number, so no division by a
  subnormal (flushed to zero on some devices) can happen.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_fp8.numerics.formats import E4M3, Format

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


Tile = tuple[int | None, int | None]


class Quantized(NamedTuple):
    """A tensor in FP8.

    Attributes:
        codes: float8, any shape.
        scale: fp32, what decodes them. Without a tile it broadcasts against `codes`: a scalar, or one a line.
        tile: (rows, columns) of a matrix that share a scale, `scale` being [ceil(M / rows), ceil(K / columns)]; or
            None.
    """

    codes: Tensor
    scale: Tensor
    tile: tuple[int, int] | None = None

    def t(self) -> "Quantized":
        """The transpose of a matrix; a view."""
        return Quantized(self.codes.t(), self.scale.t(), self.tile and (self.tile[1], self.tile[0]))


def amax(x: Tensor, along: int | None = None) -> Tensor:
    """The largest magnitude of `x`, fp32; 0 where there is nothing, NaN or inf where `x` holds one.

    Args:
        x: Any shape.
        along: The dimension that is reduced, to size 1; None reduces all of them, to a scalar.
    """
    if x.numel() == 0:
        shape = () if along is None else tuple(1 if d == along % x.dim() else n for d, n in enumerate(x.shape))
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    low, high = torch.aminmax(x) if along is None else torch.aminmax(x, dim=along, keepdim=True)
    return torch.maximum(-low, high).float()


def scale_of(amax: Tensor, fmt: Format, *, power_of_two: bool = False) -> Tensor:
    """The decode scale that maps `amax` onto the largest value of `fmt`.

    Args:
        amax: fp32, non-negative, any shape.
        fmt: The format to fill.
        power_of_two: Round the scale up to a power of two, so that scaling is exact; up, so that nothing saturates.

    Returns:
        fp32 of the shape of `amax`: 1 where amax is 0, non-finite where amax is.
    """
    scale = (amax / fmt.max).clamp_min(_SMALLEST_SCALE)
    if power_of_two:
        # Through the bits: the exponent field of the next power of two at or above the scale. Non-finite stays so.
        rounded = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
        scale = torch.where(scale < torch.inf, rounded, scale)
    return scale.masked_fill(amax == 0, 1.0)


def quantize(x: Tensor, fmt: Format, *, tile: Tile | None = None, power_of_two: bool = False) -> Quantized:
    """Casts `x` to `fmt`, round to nearest even, saturating.

    Args:
        x: bf16, fp16 or fp32; a matrix if there is a tile, else of any shape.
        fmt: The target format.
        tile: (rows, columns) that share a scale, where None is all of them: (1, None) is a scale for each row,
            (1, 128) one for each 128 elements of a row, cut short at its end. No tile: all elements share one.
        power_of_two: See `scale_of`.

    Returns:
        Contiguous codes of the shape of `x` and their scales.
    """
    if tile is not None and None not in tile:
        return _quantize_tiles(x, fmt, (tile[0] or 1, tile[1] or 1), power_of_two)
    scale = scale_of(amax(x, None if tile is None else tile.index(None)), fmt, power_of_two=power_of_two)
    return Quantized(quantize_to(x, fmt, scale), scale)


def quantize_to(x: Tensor, fmt: Format, scale: Tensor) -> Tensor:
    """The contiguous codes of `x` for a decode scale that is already known (fp32, broadcast against `x`).

    Here a non-finite value does become the largest code where `scale` is finite: whoever brings the scale must look
    at the amax.
    """
    return _saturate(x.float() / scale, fmt).contiguous()


def _quantize_tiles(x: Tensor, fmt: Format, tile: tuple[int, int], power_of_two: bool) -> Quantized:
    tiles = _in_tiles(x.float(), tile)
    scale = scale_of(tiles.abs().amax(dim=(1, 3)), fmt, power_of_two=power_of_two)
    codes = _saturate(tiles / _beside_tiles(scale), fmt)
    return Quantized(_as_matrix(codes, x.shape).contiguous(), scale, tile)


def _in_tiles(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """A matrix as [tiles down, rows of a tile, tiles across, columns of a tile], ragged ends filled with zeros."""
    (m, k), (rows, columns) = x.shape, tile
    down, across = -(-m // rows), -(-k // columns)
    if (m, k) != (down * rows, across * columns):
        x = F.pad(x, (0, across * columns - k, 0, down * rows - m))
    return x.reshape(down, rows, across, columns)


def _as_matrix(tiles: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_in_tiles`."""
    down, rows, across, columns = tiles.shape
    whole = tiles.reshape(down * rows, across * columns)
    return whole if whole.shape == shape else whole[: shape[0], : shape[1]]


def _beside_tiles(scale: Tensor) -> Tensor:
    """Scales [tiles down, tiles across] as a view beside tiles: one operation, where indexing is two."""
    down, across = scale.shape
    return scale.view(down, 1, across, 1)


def _saturate(scaled: Tensor, fmt: Format) -> Tensor:
    return scaled.clamp(-fmt.max, fmt.max).to(fmt.dtype)


def dequantize(x: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that `x` stands for, computed in fp32 and rounded once to `dtype`."""
    values = decode(x.codes, torch.float32)
    if x.tile is None:
        return (values * x.scale).to(dtype)
    return _as_matrix((_in_tiles(values, x.tile) * _beside_tiles(x.scale)).to(dtype), values.shape)


def decode(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The unscaled values of float8 `codes`; exact, because every FP8 value is a bf16, fp16 (E4M3) or fp32 value."""
    if codes.is_cpu and codes.dtype is E4M3.dtype and codes.dim() == 2:
        # Torch decodes E4M3 on CPUs in a scalar loop; looking 256 values up is three to four times faster.
        transposed = not codes.is_contiguous()
        rows = (codes.t() if transposed else codes).contiguous()
        table = torch.arange(256, dtype=torch.uint8).view(E4M3.dtype).to(dtype)
        values = table.index_select(0, rows.view(torch.uint8).view(-1).int()).view(rows.shape)
        return values.t() if transposed else values
    return codes.to(dtype)
