"""The 8-bit floating-point formats, as data.

Two formats carry values: E4M3 (range to 448, three mantissa bits; weights and activations) and E5M2 (range to
57344, two mantissa bits; gradients). E4M3 is the "fn" variant of the OCP 8-bit specification: it has no infinity,
and only 0x7F and 0xFF are NaN. E8M0 is a bare exponent, 2^(code - 127); it carries scales, never values, so it is
two functions on bytes and not a `Format`.

Every figure of a format follows from its two field widths and its dtype; `tests/numerics/test_formats.py` enumerates
all 256 codes of each against them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """An 8-bit floating-point format.

    Attributes:
        name: The name used in recipes and YAML.
        dtype: The torch dtype whose one-byte storage holds the codes.
        exponent_bits: Width of the exponent field.
        mantissa_bits: Width of the mantissa field; a normal value is exact to half of 2^-mantissa_bits, relatively.
    """

    name: str
    dtype: torch.dtype
    exponent_bits: int
    mantissa_bits: int

    @property
    def max(self) -> float:
        """The largest finite magnitude."""
        return float(torch.finfo(self.dtype).max)

    @property
    def min_normal(self) -> float:
        """The smallest magnitude that has all its mantissa bits."""
        return float(2.0 ** (2 - 2 ** (self.exponent_bits - 1)))

    @property
    def min_subnormal(self) -> float:
        """The smallest positive magnitude; half of it and less rounds to zero."""
        return self.min_normal * 2.0**-self.mantissa_bits


E4M3 = Format("e4m3", torch.float8_e4m3fn, exponent_bits=4, mantissa_bits=3)
E5M2 = Format("e5m2", torch.float8_e5m2, exponent_bits=5, mantissa_bits=2)
FORMATS = {fmt.name: fmt for fmt in (E4M3, E5M2)}


def e8m0_ceil(x: Tensor) -> Tensor:
    """The E8M0 code of the smallest power of two that is not below `x`.

    Args:
        x: fp32, non-negative and finite, any shape. The codes end at 2^-126 and 2^127: smaller values (zero too) and
            larger ones get the first and the last.

    Returns:
        uint8 codes in 1..254, of the shape of `x`.
    """
    # Adding all ones below the exponent field carries into it unless the mantissa is zero: a ceiling without log2.
    exponent = (x.view(torch.int32) + 0x7FFFFF) >> 23
    return exponent.clamp(1, 254).to(torch.uint8)


def e8m0_value(codes: Tensor) -> Tensor:
    """The powers of two, fp32, that E8M0 `codes` (uint8 in 1..254) stand for."""
    return (codes.to(torch.int32) << 23).view(torch.float32)
