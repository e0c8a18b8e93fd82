"""A tensor before and after a cast to FP8: what metrics of casts look at."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fp8.numerics import Quantized, dequantize
from lightning_fp8.numerics.quantize import decode

_GROUP = 128  # rows; what shares a scale lies within
# fp32 divides by the scale and multiplies by it again: an element at the very end of the range is within this of it.
_ROUNDING = 1 + 2.0**-22


class Rounded(NamedTuple):
    """What was cast and what it became.

    Attributes:
        exact: fp32, before.
        value: fp32 of the same shape, what the codes stand for.
        saturated: bool of the same shape, where the magnitude was beyond the range and was cut to its end.
    """

    exact: Tensor
    value: Tensor
    saturated: Tensor

    @classmethod
    def of(cls, x: Tensor, cast: Quantized) -> "Rounded":
        """`x`, of any shape with `cast.codes`."""
        exact, value = x.reshape(cast.codes.shape).float(), dequantize(cast)
        at_end = decode(cast.codes, torch.float32).abs() == torch.finfo(cast.codes.dtype).max
        return cls(exact, value, at_end & (exact.abs() > value.abs() * _ROUNDING))


def thin(x: Tensor, cast: Quantized, most: int) -> tuple[Tensor, Quantized]:
    """About `most` elements of a matrix and of its cast: groups of 128 rows at even distances.

    The scales stay those of the whole. A matrix that is smaller is returned as it is.
    """
    stride = -(-x.numel() // most)
    groups = x.shape[0] // _GROUP
    if stride <= 1 or groups < 2:
        return x, cast
    scale = cast.scale
    if scale.dim() == 2 and scale.shape[0] > 1:
        rows = _GROUP // (cast.tile[0] if cast.tile else 1)
        scale = _every(scale, groups, rows, stride)
    codes = _every(cast.codes.view(torch.uint8), groups, _GROUP, stride).view(cast.codes.dtype)
    return _every(x, groups, _GROUP, stride), Quantized(codes, scale, cast.tile)


def _every(x: Tensor, groups: int, rows: int, stride: int) -> Tensor:
    return x[: groups * rows].reshape(groups, rows, -1)[::stride].flatten(0, 1)
