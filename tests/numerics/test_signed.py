import pytest
import torch

from lightning_fp8.numerics.formats import E4M3
from lightning_fp8.numerics.signed import Signed

B = 128


def spread(sigma, rows=200, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(rows, B, generator=gen) * (sigma * torch.randn(rows, B, generator=gen)).exp()


def reference(m):
    """The docstring's formulas in fp64, an element at a time."""
    hi = max(abs(x) for x in m)
    sizes = [abs(x) for x in m if x]
    mean = sum(torch.tensor(hi / s, dtype=torch.float64).log2().item() for s in sizes) / len(sizes)
    k = int(16 * min(max(6 / mean if mean else 3.0, 1), 3)) / 16
    return hi, k


@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.0, 4.0])
def test_blocks_are_coded_as_the_formulas_say(sigma):
    m = spread(sigma, rows=20)
    coded = Signed.encode(m)
    for row, codes, hi, power in zip(m.double().tolist(), coded.codes, coded.hi, coded.power, strict=True):
        expected_hi, k = reference(row)
        assert hi.item() == expected_hi
        assert power.item() == 16 * k
        values = torch.tensor([(abs(x) / hi.item()) ** k * E4M3.max for x in row], dtype=torch.float64)
        exact = values.float().copysign(torch.tensor(row).float()).to(E4M3.dtype)
        assert torch.equal(codes, exact.view(torch.uint8))


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.0, 4.0])
def test_errors_are_those_of_the_format(sigma, scale):
    m = spread(sigma) * scale
    coded = Signed.encode(m)
    k = coded.power / 16.0
    # Half an ulp of E4M3 is 2^-4 of a value at most; the k-th root divides it by k, to first order from below it.
    relative = 1 - (1 - 2.0**-4) ** (1 / k)
    floor = coded.hi * (2.0**-10 / 448) ** (1 / k)
    assert ((coded.decode() - m).abs() <= m.abs() * relative * 1.0001 + floor * 1.0001).all()


@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.0])
def test_coding_what_was_decoded_settles(sigma):
    """Else a momentum that is neither fed nor decayed would wander. The exponent may move once, and a code with it."""
    m = spread(sigma)
    first = coded = Signed.encode(m)
    for _ in range(4):
        before, coded = coded, Signed.encode(coded.decode())
    assert all(torch.equal(a, b) for a, b in zip(before, coded, strict=True))
    assert torch.equal(first.hi, coded.hi)
    # two roundings of one size, independent at worst
    assert (coded.decode() - m).norm() <= 2**0.5 * (first.decode() - m).norm()


def test_every_code_means_what_it_encodes_to():
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    for power in (16, 17, 31, 48):
        coded = Signed(codes[None], torch.tensor([[2.5]]), torch.tensor([[power]], dtype=torch.uint8))
        expected = codes.view(E4M3.dtype).double()
        expected = 2.5 * (expected.abs() / 448) ** (16 / power) * expected.sign()
        torch.testing.assert_close(coded.decode()[0].double(), expected, rtol=2.0**-23, atol=0)


def test_the_largest_is_exact_and_zero_is_zero():
    m = spread(1.0)
    m[:, 7] = 0.0
    decoded = Signed.encode(m).decode()
    largest = m.abs().argmax(dim=1, keepdim=True)
    assert torch.equal(decoded.gather(1, largest), m.gather(1, largest))
    assert not decoded[:, 7].any()
    for block in (torch.zeros(1, B), torch.full((1, B), 1e-40)):
        coded = Signed.encode(block)
        assert not coded.codes.any()
        assert not coded.hi.any()
        assert not coded.decode().any()


@pytest.mark.parametrize("value", [1.0, -3.0, 2.0**-126, 3e38])
def test_equal_elements_are_exact(value):
    m = torch.full((2, B), value)
    coded = Signed.encode(m)
    assert torch.equal(coded.decode(), m)
    assert (coded.power == 48).all()


def test_companding_halves_the_error_of_plain_e4m3():
    m = spread(0.0)
    hi = m.abs().amax(1, keepdim=True)
    plain = (m / hi * 448).to(E4M3.dtype).float() / 448 * hi
    assert (Signed.encode(m).decode() - m).norm() < 0.6 * (plain - m).norm()


def test_results_do_not_depend_on_how_blocks_are_packed():
    m = spread(1.0)
    whole = Signed.encode(m)
    for start in range(0, len(m), 3):
        part = Signed.encode(m[start : start + 3])
        assert all(torch.equal(a, b[start : start + 3]) for a, b in zip(part, whole, strict=True))
        assert torch.equal(part.decode(), whole.decode()[start : start + 3])
