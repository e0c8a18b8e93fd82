import pytest
import torch

from lightning_fp8.numerics.formats import E4M3
from lightning_fp8.numerics.moments_fp8lm import FP8LMMoments

N, B = 32, 128
HALF = torch.finfo(torch.float16)


def encode(m, v):
    return FP8LMMoments.encode(m, v, torch.zeros_like(v))


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_errors_are_the_formats(scale):
    gen = torch.Generator().manual_seed(0)
    m, v = torch.randn(N, B, generator=gen) * scale, torch.randn(N, B, generator=gen).square() * scale
    decoded = encode(m, v).decode()
    floors = E4M3.min_subnormal / E4M3.max, 2.0**-24 / HALF.max
    for x, y, bits, floor in zip((m, v), decoded, (3, 10), floors, strict=True):
        largest = x.abs().amax(1, keepdim=True)
        step = 2.0 ** -(bits + 1) * x.abs() + floor / 2 * largest
        assert ((y - x).abs() <= step * (1 + 1e-6) + x.abs() * 2.0**-22).all()
        assert ((y - x).abs() > step / 2).any()


def test_v_becomes_zero_below_the_range_of_fp16():
    """The documented end of its range, 2^41 below the largest: 2^22 further down than E4M3's."""
    v = torch.ones(1, B)
    v[0, 1], v[0, 2], v[0, 3] = 2.0**-41.1, 2.0**-40, 2.0**-30
    decoded = encode(v.sqrt(), v).decode()[1]
    assert decoded[0, 1] == 0
    assert decoded[0, 2] > 0
    assert abs(decoded[0, 3] / 2.0**-30 - 1) < 2.0**-10


def fade(beta2, halvings=1.0):
    """What is left of v after so many steps without gradients that it should have halved that often."""
    v = torch.linspace(1, 2, B).repeat(N, 1)
    steps = round(halvings * 0.6931 / (1 - beta2))
    stored = encode(v.sqrt(), v)
    for _ in range(steps):
        # The largest of a block, whose scale follows it, is held, so that the others have to be rounded.
        v = stored.decode()[1] * beta2
        v[:, -1] = 2.0
        stored = encode(v.sqrt(), v)
    return stored.decode()[1][:, :-1] / torch.linspace(1, 2, B)[:-1] / beta2**steps


def test_v_follows_at_the_usual_beta2():
    assert (fade(0.95) - 1).abs().max() < 0.01
    assert (fade(0.999) - 1).abs().max() < 0.3  # rounds by up to half of what it is to lose


def test_v_stays_for_ever_near_beta2_of_one():
    """The documented ratchet: 2^-12.3 a step is less than half of the last bit wherever that is."""
    assert (fade(1 - 2.0**-12.3, halvings=0.2) > 2**0.19).all()


def test_zeros():
    zeros = FP8LMMoments.zeros(4, 200, B, torch.device("cpu"))
    assert [tuple(t.shape) for t in zeros] == [(4, 200), (4, 2), (4, 200), (4, 2)]
    assert [t.dtype for t in zeros] == [torch.uint8, torch.float32, torch.float16, torch.float32]
    assert not any(t.any() for t in zeros)
    assert not any(t.any() for t in encode(torch.zeros(2, B), torch.zeros(2, B)).decode())
    for size in (1e-44, 3e38):
        x = torch.full((2, B), size)
        assert all(t.isfinite().all() for t in encode(x, x).decode())
