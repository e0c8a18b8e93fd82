import pytest
import torch

from lightning_fp8.numerics.moments_plain import BF16Moments, FP32Moments

N, B = 32, 128
CPU = torch.device("cpu")


def moments():
    gen = torch.Generator().manual_seed(0)
    return torch.randn(N, B, generator=gen), torch.randn(N, B, generator=gen).square(), torch.rand(N, B, generator=gen)


def test_fp32_moments_are_what_they_were():
    m, v, random = moments()
    encoded = FP32Moments.encode(m, v, random)
    assert encoded.decode() == (m, v) == tuple(encoded)


def test_bf16_moments_are_right_to_their_last_bit():
    m, v, random = moments()
    decoded_m, decoded_v = BF16Moments.encode(m, v, random).decode()
    assert ((decoded_m - m).abs() <= m.abs() * 2.0**-8).all()  # half of a last bit, which is 2^-8 to 2^-7
    assert ((decoded_v - v).abs() < v * 2.0**-7).all()
    assert torch.equal(decoded_m, m.bfloat16().float())


def test_v_in_bf16_is_unbiased():
    draws = 1024
    v = torch.full((draws, B), 1.0 + 2.0**-10)
    random = ((torch.arange(draws) + 0.5) / draws).view(draws, 1).expand(draws, B)
    mean = BF16Moments.encode(v, v, random).decode()[1].double().mean()
    assert abs(mean - (1 + 2.0**-10)) <= 2.0**-7 / draws


@pytest.mark.parametrize(("kind", "dtype"), [(FP32Moments, torch.float32), (BF16Moments, torch.bfloat16)])
def test_zeros(kind, dtype):
    zeros = kind.zeros(3, 200, B, CPU)
    assert all(t.shape == (3, 200) and t.dtype is dtype and not t.any() for t in zeros)
    assert zeros.m.data_ptr() != zeros.v.data_ptr()
