import math

import pytest
import torch

from lightning_fp8.numerics.formats import E4M3, e8m0_value
from lightning_fp8.numerics.moments import FP8Moments, FP32Moments, decode_root_v, encode_v

N, B = 64, 128
TINY = 2.0**-126
CODES_OF_V = 253  # intervals between codes 1 and 254
E4M3_GRID = torch.arange(127, dtype=torch.uint8).view(E4M3.dtype).double()  # magnitudes; code 127 is NaN


def level(spread):
    """|m| / sqrt(v) / e of what is cast to E4M3."""
    return (spread / E4M3.max) ** 0.4


# m is rounded to nearest in `spread`, so the worst error of a step is on one side of the middle between two codes.
MIDDLES = (E4M3_GRID[1:] + E4M3_GRID[:-1]) / 2
HALF_STEP = max((level(MIDDLES) - level(E4M3_GRID[:-1])).max(), (level(E4M3_GRID[1:]) - level(MIDDLES)).max()).item()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def moments_of(*, sigma=0.0, steps=30, beta1=0.9, beta2=0.95, seed=0, n=N, b=B):
    """(m, v) after some steps on gradients whose columns differ in size by a log-normal factor."""
    gen = generator(seed)
    size = (torch.randn(b, generator=gen) * sigma).exp()
    m, v = torch.zeros(n, b), torch.zeros(n, b)
    for _ in range(steps):
        g = torch.randn(n, b, generator=gen) * size
        m, v = m * beta1 + g * (1 - beta1), v * beta2 + g * g * (1 - beta2)
    return m, v


def uniform(shape, seed=1):
    return torch.rand(shape, generator=generator(seed))


def encode(m, v, random=None):
    return FP8Moments.encode(m, v, uniform(v.shape) if random is None else torch.full(v.shape, random))


def test_one_byte_an_element():
    moments = encode(*moments_of())
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in moments._asdict().items()}
    assert shapes == {
        "m_codes": (torch.uint8, (N, B)),
        "m_scale": (torch.uint8, (N, 1)),
        "v_codes": (torch.uint8, (N, B)),
        "v_max": (torch.float32, (N, 1)),
        "v_octaves": (torch.float32, (N, 1)),
    }


def wide_block():
    """Positive v from 2^-126 to 2^127, in blocks that each span far more than 40 octaves, and some zeros."""
    v = torch.linspace(-126, 127, N * B).exp2()[torch.randperm(N * B, generator=generator())].view(N, B)
    v[:, 0] = TINY
    v[:, 1:4] = 0.0
    return torch.randn(N, B, generator=generator(1)) * v.sqrt(), v


@pytest.mark.parametrize("random", [0.0, 0.5, 1 - 2.0**-16, None])
def test_no_positive_v_becomes_zero_and_zeros_stay(random):
    m, v = wide_block()
    m[:, 2], m[:, 3] = 1.0, -1.0  # m where v is 0
    moments = encode(m, v, random)
    decoded_m, decoded_v = moments.decode()
    assert torch.equal(decoded_v > 0, v > 0)
    assert torch.equal(moments.v_codes == 0, v == 0)
    assert (decoded_m[v == 0] == 0).all()


def test_the_largest_v_of_a_block_is_exact():
    for m, v in (moments_of(sigma=2.0), wide_block()):
        for random in (0.0, 0.5, 1 - 2.0**-16):
            assert torch.equal(encode(m, v, random).decode()[1].amax(1), v.amax(1))


@pytest.mark.parametrize("value", [TINY, 1e-20, 1.0, 2.0**127])
@pytest.mark.parametrize("random", [0.0, 1 - 2.0**-16])
def test_a_block_of_one_value(value, random):
    v = torch.full((2, B), value)
    v[1, ::2] = 0.0
    moments = encode(v.sqrt(), v, random)
    assert moments.v_octaves.tolist() == [[0.0], [0.0]]
    assert torch.equal(moments.v_codes, 254 * (v > 0).to(torch.uint8))
    assert torch.equal(moments.decode()[1], v)


def test_an_empty_block():
    moments = encode(torch.randn(3, B, generator=generator()), torch.zeros(3, B))
    assert moments.v_max.tolist() == moments.v_octaves.tolist() == [[0.0]] * 3
    assert not moments.v_codes.any()
    assert not (moments.m_codes & 0x7F).any()  # zeros of either sign
    assert not any(tensor.any() for tensor in moments.decode())


def test_all_codes_zero_decode_to_zero():
    """The state before the first step, as the optimizer creates it."""
    codes, scales = torch.zeros(2, B, dtype=torch.uint8), torch.zeros(2, 1)
    assert not any(t.any() for t in FP8Moments(codes, codes[:, :1] + 1, codes, scales, scales).decode())


@pytest.mark.parametrize("subnormal", [2.0**-149, 2.0**-127, TINY - 2.0**-149])
def test_subnormal_v_counts_as_zero(subnormal):
    v = torch.full((2, B), subnormal)
    v[1, 0] = 2.0**-120
    m = torch.full_like(v, 1e-19)
    moments = encode(m, v)
    assert moments.v_codes.count_nonzero() == 1
    assert moments.v_max.tolist() == [[0.0], [2.0**-120]]
    assert moments.v_octaves.tolist() == [[0.0], [0.0]]
    assert moments.decode()[0].count_nonzero() == 1


@pytest.mark.parametrize("hi", [1.0, 3.7e-9, 1e30])
def test_v_far_below_the_largest_is_raised_to_40_octaves_only(hi):
    v = hi * torch.linspace(0, -60, B).exp2().expand(2, B).contiguous()
    moments = encode(v.sqrt(), v)
    assert moments.v_octaves.tolist() == [[40.0], [40.0]]
    m, decoded = moments.decode()
    low = v < hi * 2.0**-40
    # The floor is one rounding of fp32 away from exact, 2^-24.
    torch.testing.assert_close(decoded[low], torch.full_like(decoded[low], hi * 2.0**-40), rtol=2.0**-23, atol=0)
    # ... so their updates, at most 1 here, become smaller and not larger, but for half a step of m's code.
    assert (m[low] <= v[low].sqrt() + HALF_STEP * decoded[low].sqrt() * (1 + 1e-6)).all()


@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("random", [0.0, 0.5, 1 - 2.0**-16, None])
def test_v_is_one_of_its_two_neighbours(sigma, random):
    m, v = moments_of(sigma=sigma)
    moments = encode(m, v, random)
    assert (moments.v_octaves < 40).all()
    step = moments.v_octaves.double() / CODES_OF_V
    error = (moments.decode()[1].double() / v.double()).log2()
    # Stochastic rounding may take either neighbour: less than a whole step. Decoded values are rounded to fp32.
    assert (error.abs() <= step + 1e-6).all()
    if random == 0.5:
        assert (error.abs() <= step / 2 + 1e-6).all()  # that is rounding to nearest


def test_v_is_unbiased_in_code_space():
    draws = 512
    v = moments_of(sigma=1.0, n=4)[1]
    random = ((torch.arange(draws) + 0.5) / draws).view(draws, 1, 1).expand(draws, *v.shape)
    codes, hi, octaves = encode_v(v.repeat(draws, 1), random.reshape(-1, B))
    mean = codes.view(draws, *v.shape).double().mean(0)
    hi, octaves = hi[:4].double(), octaves[:4].double()
    exact = 254 + (v.double() / hi).log2() * CODES_OF_V / octaves
    # Of `draws` evenly spaced random numbers, the share that rounds up is right to 1/draws. `octaves` is rounded to
    # fp32, so the smallest v lies within 254 * 2^-24 of code 1 and is clamped to it.
    assert (mean - exact).abs().max() <= 1 / draws + 254 * 2.0**-24


@pytest.mark.parametrize("sigma", [0.0, 2.0])
def test_m_is_right_to_half_a_step(sigma):
    m, v = moments_of(sigma=sigma)
    moments = encode(m, v)
    decoded_m, decoded_v = (x.double() for x in moments.decode())
    unit = decoded_v.sqrt() * e8m0_value(moments.m_scale)
    assert ((m.double().abs() / unit).amax(1) <= 1 + 1e-6).all()  # the scale is not too small ...
    assert ((m.double().abs() / unit).amax(1) > 0.5 - 1e-6).all()  # ... and not too large
    # 1e-6: the ratio, its power and the decoded values are fp32 numbers.
    error = (decoded_m - m).abs() / unit
    assert error.max() <= HALF_STEP + 1e-6
    # At equal |m|/sqrt(v) the error shows the whole grid: half a step is reached, nearly.
    assert error.max() >= HALF_STEP / 2


def test_m_follows_the_power_law():
    """All 127 magnitudes are decoded to the level of the formula, and both signs."""
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8).view(2, 127)
    ones = torch.ones(2, 1)
    v_codes = torch.full_like(codes, 254)
    m, _ = FP8Moments(codes, torch.full((2, 1), 127 + 3, dtype=torch.uint8), v_codes, 4 * ones, 0 * ones).decode()
    expected = level(E4M3_GRID) * 2.0**3 * 2.0
    torch.testing.assert_close(m.double(), torch.stack([expected, -expected]), rtol=2.0**-23, atol=0)


def test_m_keeps_its_largest_value():
    # |r| = e exactly must not be cast beyond 448, which is NaN in some torch releases.
    v = torch.ones(1, B)
    m = torch.linspace(-1, 1, B).view(1, B)
    decoded = encode(m, v).decode()[0]
    assert decoded[0, 0] == -1
    assert decoded[0, -1] == 1
    assert decoded.isfinite().all()


@pytest.mark.parametrize("exponent", [-20, -7, -1, 1, 20])
def test_codes_are_blind_to_powers_of_two(exponent):
    m, v = moments_of(sigma=1.0)
    a, b = encode(m, v), encode(m * 2.0**exponent, v * 4.0**exponent)
    for name in ("m_codes", "m_scale", "v_codes", "v_octaves"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(a.v_max * 4.0**exponent, b.v_max)


def update_error(sigma):
    """(rms error of m / sqrt(v) after a round trip, rms of m / sqrt(v), one step of v in octaves)."""
    m, v = moments_of(sigma=sigma, n=128)
    moments = encode(m, v)
    decoded_m, decoded_v = moments.decode()
    u, decoded_u = m / v.sqrt(), decoded_m / decoded_v.sqrt()
    return (decoded_u - u).square().mean().sqrt(), u.square().mean().sqrt(), moments.v_octaves.mean() / CODES_OF_V


def test_unequal_columns_cost_no_more_than_the_step_of_v():
    even, *_ = update_error(0.0)
    uneven, size, step = update_error(2.0)
    # sqrt(v) moves by half a step of v's logarithmic scale (v by a whole one, at most): relative error 2^(step/2) - 1.
    assert uneven <= even + size * (2 ** (step / 2) - 1)


@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.0])
def test_a_second_round_trip_changes_no_code(sigma):
    first = encode(*moments_of(sigma=sigma))
    second = encode(*first.decode(), random=0.5)  # decoded v lie on their codes but for fp32 rounding: take the nearest
    for name in ("m_codes", "m_scale", "v_codes", "v_max"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("beta2", [0.95, 0.999])
@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("t", [2, 31])
def test_one_step_from_a_shared_state(beta2, sigma, t):
    """|du| <= c * (beta1 / sqrt(beta2)) * |dr| + |u| * (2^(D/506) - 1), where v >= hi * 2^-40."""
    beta1 = 0.9
    m, v = moments_of(sigma=sigma, steps=t - 1, beta2=beta2)
    moments = encode(m, v)
    g = torch.randn(N, B, generator=generator(9)).double()
    if sigma:
        g *= v.double().sqrt()

    def update(m, v):
        m, v = m.double() * beta1 + g * (1 - beta1), v.double() * beta2 + g * g * (1 - beta2)
        return m / (1 - beta1**t) / (v / (1 - beta2**t)).sqrt()

    u, quantized_u = update(m, v), update(*moments.decode())
    within = v >= moments.v_max * 2.0**-40  # lower ones are raised, of which the bound says nothing
    assert within.double().mean() > 0.9
    c = math.sqrt(1 - beta2**t) / (1 - beta1**t)
    dr = HALF_STEP * e8m0_value(moments.m_scale).double()
    bound = c * beta1 / math.sqrt(beta2) * dr + u.abs() * ((moments.v_octaves.double() / 506).exp2() - 1)
    assert ((quantized_u - u).abs() <= bound * (1 + 1e-5))[within].all()  # decoded moments are fp32, the bound is exact


def tracking_error(beta2, *, stochastic):
    """log2(stored v / v), by element, 6 / (1 - beta2) steps after the gradients of every other column fell 30-fold."""
    gen, n = generator(), 16
    size = torch.ones(B)
    v = torch.zeros(n, B)
    nearest = torch.full((n, B), 0.5)
    stored = encode_v(v, nearest)
    memory = round(1 / (1 - beta2))
    for step in range(7 * memory):
        if step == memory:
            size[::2] /= 30
        squared = (torch.randn(n, B, generator=gen) * size).square() * (1 - beta2)
        v = v * beta2 + squared
        decoded = decode_root_v(*stored).square().float() * beta2 + squared
        stored = encode_v(decoded, torch.rand(n, B, generator=gen) if stochastic else nearest)
    return (decode_root_v(*stored).square() / v.double()).log2()


BETAS2 = [0.95, 0.99, 0.999]


# At .999 the noise of stochastic rounding itself is .12 octaves here: steps of D / 253 = .036 octaves that are taken at
# random, averaged over 1 / (2 (1 - beta2)) steps. It has no bias, which the next test asserts.
@pytest.mark.parametrize("beta2", [0.95, 0.99])
def test_v_follows_gradients_that_fall(beta2):
    assert tracking_error(beta2, stochastic=True).abs().mean() <= 0.1


@pytest.mark.parametrize("beta2", BETAS2)
def test_v_follows_gradients_that_fall_without_bias(beta2):
    assert tracking_error(beta2, stochastic=True).mean().abs() <= 0.1


def test_rounding_to_nearest_is_a_ratchet():
    """Why v is rounded stochastically, and that the two tests above can fail."""
    error = tracking_error(0.999, stochastic=False)
    assert error.abs().mean() > 0.1
    assert error.mean() > 0.1


def test_fp32_moments_are_what_they_were():
    m, v = moments_of()
    moments = FP32Moments.encode(m, v, uniform(v.shape))
    assert moments.decode() == (m, v) == tuple(moments)
