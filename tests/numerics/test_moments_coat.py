import pytest
import torch

from lightning_fp8.numerics.formats import E4M3
from lightning_fp8.numerics.moments_coat import CoatMoments

N, B = 32, 128


def moments(octaves):
    """Magnitudes that span so many octaves in each block."""
    gen = torch.Generator().manual_seed(0)
    exponents = torch.rand(N, B, generator=gen) * octaves
    exponents[:, 0], exponents[:, 1] = 0.0, octaves
    signs = torch.randn(N, B, generator=gen).sign()
    return exponents.exp2() * signs, exponents.exp2()


def encode(m, v):
    return CoatMoments.encode(m, v, torch.zeros_like(v))


@pytest.mark.parametrize("octaves", [2.0, 8.0, 17.0, 30.0])
def test_errors_are_those_of_e4m3_over_the_power(octaves):
    m, v = moments(octaves)
    stored = encode(m, v)
    power = stored.v_power.double()
    assert ((power * 16) % 1 == 0).all()
    for x, y in zip((m, v), stored.decode(), strict=True):
        error = (y.double() / x).log2().abs()
        normal = x.abs() > x.abs().amax(1, keepdim=True) * (E4M3.min_normal / E4M3.max) ** (1 / power)
        # Half a step of E4M3 is at most 1/16 of a value, towards the smaller one 1/17: in octaves, over the power.
        bound = -torch.log2(torch.tensor(1 - 1 / 17)).double() / power
        assert (error <= bound * (1 + 1e-4))[normal].all()


def test_a_narrow_block_gains_precision_and_a_wide_one_loses_it():
    errors = []
    for octaves in (2.0, 17.0, 30.0):
        v = moments(octaves)[1]
        errors.append((encode(v, v).decode()[1] / v).log2().abs().mean().item())
    assert errors[0] < errors[1] / 4
    assert errors[2] > errors[1] * 1.5


def test_range_is_used():
    m, v = moments(10.0)
    values = encode(m, v).v_codes.view(E4M3.dtype).float()
    assert (values.amax(1) == E4M3.max).all()
    assert (values.amin(1) <= 4 * E4M3.min_subnormal).all()
    assert (values > 0).all()


def test_zeros_and_even_blocks():
    zeros = CoatMoments.zeros(4, 200, B, torch.device("cpu"))
    assert [tuple(t.shape) for t in zeros] == 2 * [(4, 200), (4, 2), (4, 2), (4, 2)]
    assert not any(t.any() for t in zeros.decode()) if zeros.m_codes.shape[1] == 1 else True
    nothing = encode(torch.zeros(2, B), torch.zeros(2, B))
    assert not any(t.any() for t in nothing.decode())
    even = torch.full((2, B), 3.0)
    torch.testing.assert_close(encode(even, even).decode()[1], even, rtol=1e-6, atol=0)
