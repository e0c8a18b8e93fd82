import pytest
import torch

from lightning_fp8.numerics.formats import E4M3, E5M2
from lightning_fp8.numerics.moments_absmax import AbsmaxE5M2Moments, AbsmaxMoments

N, B = 32, 128
KINDS = [(AbsmaxMoments, E4M3), (AbsmaxE5M2Moments, E5M2)]


def moments(sigma=0.0):
    gen = torch.Generator().manual_seed(0)
    size = (torch.randn(B, generator=gen) * sigma).exp()
    return torch.randn(N, B, generator=gen) * size, (torch.randn(N, B, generator=gen) * size).square()


def encode(kind, m, v):
    return kind.encode(m, v, torch.zeros_like(v))


@pytest.mark.parametrize(("kind", "v_format"), KINDS)
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_errors_are_the_formats(kind, v_format, scale):
    m, v = (x * scale for x in moments())
    decoded = encode(kind, m, v).decode()
    for x, y, fmt in zip((m, v), decoded, (E4M3, v_format), strict=True):
        largest = x.abs().amax(1, keepdim=True)
        step = 2.0 ** -(fmt.mantissa_bits + 1) * x.abs() + fmt.min_subnormal / 2 / fmt.max * largest
        assert ((y - x).abs() <= step * (1 + 1e-6)).all()
        # The block's largest is kept, but for the rounding of its scale.
        torch.testing.assert_close(y.abs().amax(1, keepdim=True), largest, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize(("kind", "v_format"), KINDS)
def test_small_v_becomes_zero(kind, v_format):
    """The documented failure: what `fp8` is for."""
    v = torch.ones(1, B)
    v[0, 1] = v_format.min_subnormal / v_format.max / 2.1
    v[0, 2] = v_format.min_subnormal / v_format.max
    decoded = encode(kind, v.sqrt(), v).decode()[1]
    assert decoded[0, 1] == 0
    assert decoded[0, 2] > 0


@pytest.mark.parametrize(("kind", "v_format"), KINDS)
def test_zeros(kind, v_format):
    zeros = kind.zeros(4, 200, B, torch.device("cpu"))
    assert [tuple(t.shape) for t in zeros] == [(4, 200), (4, 2), (4, 200), (4, 2)]
    assert not any(t.any() for t in zeros)
    assert not any(t.any() for t in encode(kind, torch.zeros(2, B), torch.zeros(2, B)).decode())
    tiny = torch.full((2, B), 1e-44)
    assert all(t.isfinite().all() for t in encode(kind, tiny, tiny).decode())
