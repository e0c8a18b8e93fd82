from fractions import Fraction

import pytest
import torch

from lightning_fp8.numerics.formats import E4M3, E5M2, FORMATS, e8m0_ceil, e8m0_value

# OCP 8-bit specification: largest value, smallest normal, smallest subnormal, codes of infinity, codes of NaN.
FIGURES = [
    pytest.param(E4M3, 448, Fraction(1, 2**6), Fraction(1, 2**9), set(), {0x7F, 0xFF}, id="e4m3"),
    pytest.param(
        E5M2, 57344, Fraction(1, 2**14), Fraction(1, 2**16), {0x7C, 0xFC}, {*range(0x7D, 0x80), *range(0xFD, 0x100)},
        id="e5m2",
    ),
]  # fmt: skip


def magnitude(code, fmt):
    """What the 7 bits below the sign mean by the two field widths alone, as if no code were special."""
    exponent, mantissa = divmod(code & 0x7F, 2**fmt.mantissa_bits)
    bias = 2 ** (fmt.exponent_bits - 1) - 1
    implicit = 2**fmt.mantissa_bits if exponent else 0
    return Fraction(implicit + mantissa, 2**fmt.mantissa_bits) * Fraction(2) ** (max(exponent, 1) - bias)


@pytest.mark.parametrize(("fmt", "largest", "normal", "subnormal", "infinities", "nans"), FIGURES)
def test_all_codes(fmt, largest, normal, subnormal, infinities, nans):
    values = torch.arange(256, dtype=torch.uint8).view(fmt.dtype).double()
    assert {c for c in range(256) if values[c].isnan()} == nans
    assert {c for c in range(256) if values[c].isinf()} == infinities
    finite = [c for c in range(256) if c not in nans | infinities]
    assert [Fraction(float(values[c])) for c in finite] == [magnitude(c, fmt) * (-1 if c > 127 else 1) for c in finite]
    assert [bool(values[c].signbit()) for c in finite] == [c > 127 for c in finite]  # including the two zeros

    positive = sorted(magnitude(c, fmt) for c in finite if 0 < c < 128)
    assert (positive[-1], positive[0]) == (largest, subnormal) == (fmt.max, fmt.min_subnormal)
    assert positive[2**fmt.mantissa_bits - 1] == normal == fmt.min_normal  # the first after all subnormal mantissas


def test_formats_are_found_by_name():
    assert FORMATS == {"e4m3": E4M3, "e5m2": E5M2}
    assert all(fmt.dtype.itemsize == 1 and 1 + fmt.exponent_bits + fmt.mantissa_bits == 8 for fmt in FORMATS.values())


def powers_and_neighbours():
    powers = torch.tensor([2.0**k for k in range(-126, 128)])
    inf = torch.tensor(float("inf"))
    return torch.cat([powers, powers.nextafter(-inf), powers.nextafter(inf)])


def test_e8m0_ceil_is_the_smallest_power_of_two_not_below():
    mantissas = torch.randint(2**23, 254 * 2**23, (10_000,), generator=torch.Generator().manual_seed(0))
    x = torch.cat([powers_and_neighbours(), mantissas.int().view(torch.float32)])
    x = x[(x > 2.0**-126) & (x <= 2.0**127)]  # the range of codes 1..254; below and above it the codes end
    value = e8m0_value(e8m0_ceil(x)).double()
    assert torch.equal(value.frexp().mantissa, torch.full_like(value, 0.5))  # a power of two
    assert (value >= x).all()
    assert (value / 2 < x).all()


@pytest.mark.parametrize(
    ("x", "code"),
    [(0.0, 1), (2.0**-149, 1), (2.0**-126, 1), (1.0, 127), (1.0 + 2**-23, 128), (2.0**127, 254), (3.4e38, 254)],
)
def test_e8m0_ceil_at_the_ends(x, code):
    assert e8m0_ceil(torch.tensor([x])).tolist() == [code]


def test_e8m0_codes_round_trip():
    codes = torch.arange(1, 255, dtype=torch.uint8)
    assert e8m0_value(codes).tolist() == [2.0 ** (c - 127) for c in range(1, 255)]
    assert torch.equal(e8m0_ceil(e8m0_value(codes)), codes)
