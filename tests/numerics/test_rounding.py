import math

import pytest
import torch

from lightning_fp8.numerics.rounding import _mix, parameter_key, random_bits, row_keys, stochastic_round_bf16

MASK = 0xFFFFFFFF


def signed(x):
    return x - 2**32 if x >= 2**31 else x


def mix(x, key=0):
    """lowbias32 on unsigned integers, with a second key between the multiplications."""
    x, key = x & MASK, key & MASK
    x ^= x >> 16
    x = (x * 0x7FEB352D & MASK) ^ key
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ (x >> 16)


def reference_bits(key, step, row, column):
    first = mix(mix(key[0] ^ mix(step), key[1]) ^ row)
    second = mix(first ^ key[1], row)
    return signed(mix(column ^ first, second))


def bits_of(*, seed=0, name="w", step=1, rows=range(512), columns=range(512)):
    rows = torch.tensor(list(rows), dtype=torch.int32)
    keys = torch.tensor([parameter_key(seed, name)], dtype=torch.int32).expand(len(rows), 2)
    columns = torch.tensor(list(columns), dtype=torch.int32)
    return random_bits(row_keys(keys, torch.full_like(rows, step), rows), columns)


def test_mix_is_lowbias32():
    draws = torch.randint(-(2**31), 2**31, (2000,), generator=torch.Generator().manual_seed(0))
    x = torch.cat([draws, torch.tensor([0, 1, -1, 2**31 - 1, -(2**31)])]).int()
    assert _mix(x).tolist() == [signed(mix(v)) for v in x.tolist()]
    keys = x.flip(0)
    assert _mix(x, keys).tolist() == [signed(mix(v, key)) for v, key in zip(x.tolist(), keys.tolist(), strict=True)]


@pytest.mark.parametrize("step", [0, 1, 12345, 2**31 - 1])
def test_bits_equal_the_integer_reference(step):
    key, rows, columns = parameter_key(7, "layers.0.weight"), [0, 1, 65_535, 2**31 - 1], [0, 1, 127, 2**20, 2**31 - 1]
    bits = bits_of(seed=7, name="layers.0.weight", step=step, rows=rows, columns=columns)
    assert bits.dtype is torch.int32
    assert bits.tolist() == [[reference_bits(key, step, row, column) for column in columns] for row in rows]


def test_parameter_key_is_fixed_for_ever():
    # Checkpoints resume on it, so it must not depend on the interpreter's hash seed or on the release.
    assert parameter_key(0, "w") == parameter_key(0, "w")
    assert len({parameter_key(seed, name) for seed in range(50) for name in ("w", "b", "1:w")}) == 150
    assert all(-(2**31) <= part < 2**31 for part in parameter_key(3, "w"))


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
@pytest.mark.parametrize("axis", ["element", "step"])
def test_bits_are_uniform(shift, axis):
    if axis == "element":
        bits = bits_of()
    else:
        bits = torch.cat([bits_of(step=step, rows=range(2), columns=range(64)) for step in range(1, 1025)])
    counts = ((bits >> shift) & 0xFF).flatten().bincount(minlength=256).double()
    expected = bits.numel() / 256
    chi_square = ((counts - expected).square() / expected).sum()
    # 255 degrees of freedom: mean 255, standard deviation sqrt(510). Five of them on either side: a false alarm in
    # less than 1e-5 of the seeds; on the lower side it catches bits that are too even, a counter for instance.
    assert abs(chi_square - 255) < 5 * math.sqrt(510)


OTHERS = {
    "next step": {"step": 2},
    "distant step": {"step": 1 + 2**16},
    "next row": {"rows": range(1, 513)},
    "next column": {"columns": range(1, 513)},
    "next block": {"columns": range(128, 640)},
    "next seed": {"seed": 1},
    "other name": {"name": "v"},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("shift", [0, 16])
def test_bits_are_independent(other, shift):
    a, b = (((bits >> shift) & 0xFFFF).double().flatten() / 65535 - 0.5 for bits in (bits_of(), bits_of(**other)))
    correlation = (a * b).mean() * 12  # the variance of a uniform number is 1/12
    # Of n independent pairs the standard deviation is 1/sqrt(n); five of them: a false alarm in 6e-7 of the seeds.
    assert abs(correlation) < 5 / math.sqrt(a.numel())


def test_the_two_halves_are_independent():
    bits = bits_of()
    low, high = (((bits >> shift) & 0xFFFF).double() / 65535 - 0.5 for shift in (0, 16))
    assert abs((low * high).mean() * 12) < 5 / math.sqrt(bits.numel())  # as above


def test_a_slice_has_the_bits_of_the_whole():
    whole = bits_of()
    assert torch.equal(bits_of(rows=range(100, 300)), whole[100:300])
    assert torch.equal(bits_of(columns=range(37, 301)), whole[:, 37:301])
    keys = torch.tensor([parameter_key(0, "w")] * 2, dtype=torch.int32)
    per_row = row_keys(keys, torch.ones(2, dtype=torch.int32), torch.tensor([5, 9], dtype=torch.int32))
    columns = torch.tensor([[0, 1], [300, 301]], dtype=torch.int32)  # each row its own columns, as blocks have
    assert torch.equal(random_bits(per_row, columns), torch.stack([whole[5, :2], whole[9, 300:302]]))


def all_bits():
    return torch.arange(2**16, dtype=torch.int32)


@pytest.mark.parametrize("bits", [0, 1, 0x7FFF, 0xFFFF, -1])
def test_bf16_values_stay(bits):
    x = all_bits().to(torch.int16).view(torch.bfloat16)  # all of them, with both zeros, infinities and NaNs
    rounded = stochastic_round_bf16(x.float(), torch.full(x.shape, bits, dtype=torch.int32))
    assert rounded.dtype is torch.bfloat16
    assert torch.equal(rounded.isnan(), x.isnan())
    assert torch.equal(rounded[~x.isnan()].view(torch.int16), x[~x.isnan()].view(torch.int16))


def test_no_nan_is_lost():
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7F80FFFF, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert stochastic_round_bf16(nans, torch.full((5,), 0xFFFF, dtype=torch.int32)).isnan().all()


@pytest.mark.parametrize("low", [0, 1, 0x4000, 0x8000, 0xC123, 0xFFFF])
@pytest.mark.parametrize("high", [0x0000, 0x0001, 0x3F80, 0x42FF, 0x7F7F, -0x8000, -0x407F, -0x81])
def test_odds_are_the_distance(low, high):
    # Over all 65,536 values of the random half: away from zero in exactly `low` of them, towards it in the others.
    x = torch.tensor((high << 16) | low, dtype=torch.int32).view(torch.float32).expand(2**16)
    rounded = stochastic_round_bf16(x, all_bits()).view(torch.int16).int()
    assert set(rounded.tolist()) <= {high, high + 1}
    assert (rounded == high + 1).sum() == low


def test_the_high_half_is_not_used():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    bits = bits_of(rows=range(1), columns=range(1000))[0]
    assert torch.equal(stochastic_round_bf16(x, bits), stochastic_round_bf16(x, bits & 0xFFFF))


@pytest.mark.parametrize("value", [1.001, -1.001, 3.3e-5, -0.7, 1e-40, 123456.7])
def test_unbiased(value):
    x = torch.full((512, 512), value)
    rounded = stochastic_round_bf16(x, bits_of()).double()
    low, high = rounded.min(), rounded.max()
    exact = float(x[0, 0])
    assert low < exact < high
    odds = (exact - low) / (high - low)
    deviation = (high - low) * math.sqrt(odds * (1 - odds) / x.numel())
    assert abs(rounded.mean() - exact) < 5 * deviation  # false alarm in 6e-7 of the seeds


def test_tiny_updates_add_up():
    ulp, steps = 2.0**-7, 1000  # of bf16 in [1, 2)
    update = 1e-3 * ulp
    stochastic = nearest = torch.ones(64, 512, dtype=torch.bfloat16)
    for step in range(steps):
        bits = bits_of(step=step, rows=range(64))
        stochastic = stochastic_round_bf16(stochastic.float() + update, bits)
        nearest = (nearest.float() + update).bfloat16()
    assert (nearest == 1).all()
    # A sum of 1,000 draws that move one ulp at odds 1e-3: variance just below 1 ulp^2 an element. fp32 holds 1 + update
    # to 2^-24 only, 2^-17 of an ulp: the odds may be wrong by that, 1,000 times.
    tolerance = 5 * ulp / math.sqrt(stochastic.numel()) + steps * 2.0**-24
    assert abs(stochastic.double().mean() - (1 + steps * update)) < tolerance
