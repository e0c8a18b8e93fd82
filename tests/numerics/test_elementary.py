import math

import pytest
import torch

from lightning_fp8.numerics import elementary

ULP = 2.0**-24  # half a unit in the last place of a number in [1, 2): what rounding to fp32 costs, relatively
MANTISSAS = torch.arange(1 << 23, dtype=torch.int32)  # every fp32 number of an octave


def octave_of(exponent):
    return (MANTISSAS + ((exponent + 127) << 23)).view(torch.float32)


@pytest.mark.parametrize("exponent", [-126, -1, 0, 127])
def test_log2_of_every_mantissa(exponent):
    octave, log = elementary.log2(octave_of(exponent))
    assert log.abs().max() <= 0.5 + 2 * ULP
    exact = exponent + octave_of(0).double().log2()
    # The polynomial's own error, 4.8e-8, and that of fp32's Horner scheme, whose result is at most 1/2.
    assert (octave.double() + log.double() - exact).abs().max() <= 4.9e-8 + ULP
    assert (octave[0], log[0]) == (exponent, 0)


def test_log2_has_no_step_where_its_pieces_meet():
    """At sqrt(2), where the mantissa is halved: neighbours are 2^-23 / (sqrt(2) ln 2) apart, plus the error of both."""
    around = torch.arange(-64, 64, dtype=torch.int32) + torch.tensor(math.sqrt(2)).view(torch.int32)
    octave, log = elementary.log2(around.view(torch.float32))
    value = octave.double() + log.double()
    assert octave.unique().tolist() == [0, 1]
    assert value.diff().abs().max() <= 2.0**-23 / (math.sqrt(2) * math.log(2)) + 2 * (4.9e-8 + ULP)


@pytest.mark.parametrize("octaves", [-126, -63, 0, 100])
def test_exp2_of_a_dense_grid(octaves):
    fraction = torch.arange((1 << 23) + 1, dtype=torch.float32) * 2.0**-23
    found = elementary.exp2(torch.full_like(fraction, float(octaves)), fraction)
    exact = (fraction.double() + octaves).exp2()
    # The polynomial's own error, 8.3e-8; the sum's rounding; and that of what is added to 1, which is below it.
    assert (found.double() / exact - 1).abs().max() <= 8.3e-8 + 2 * ULP
    assert found[0] == 2.0**octaves


@pytest.mark.parametrize("exponent", [-126, -1, 0, 126])
def test_sqrt_is_correctly_rounded(exponent):
    """Checked in integers: no fp32 number is nearer to the root of x than the one found."""
    x = octave_of(exponent)[::5]
    root = elementary.sqrt(x)
    for neighbour in (root.nextafter(torch.tensor(0.0)), root.nextafter(torch.tensor(math.inf))):
        # The middle of two fp32 numbers has 25 bits, so that its square is exact in fp64.
        middle = (root.double() + neighbour.double()) / 2
        assert ((middle.square() < x.double()) == (neighbour < root)).all()
    assert elementary.sqrt(torch.zeros(1)) == 0


@pytest.mark.parametrize("function", [elementary.log2, elementary.sqrt, lambda x: elementary.exp2(x.floor(), x % 1)])
def test_results_do_not_depend_on_how_a_tensor_is_cut(function):
    """Vector widths and remainders differ between the whole and its pieces; library functions differ then."""
    x = torch.rand(3001, generator=torch.Generator().manual_seed(0)) * 100 + 0.1

    def bits(*parts):
        results = [function(part) for part in parts]
        columns = zip(*(result if isinstance(result, tuple) else (result,) for result in results), strict=True)
        return [torch.cat(column) for column in columns]

    for whole, pieces in zip(bits(x), bits(*x.split(3)), strict=True):
        assert torch.equal(whole, pieces)
