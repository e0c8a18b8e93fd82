"""v follows gradients that change: the error of what is stored after many steps, by the way it is rounded."""

import pytest
import torch

from lightning_fp8.numerics import E4M3
from lightning_fp8.numerics.moments import FP8Moments, decode_v, encode_v
from lightning_fp8.numerics.rounding import dither, parameter_key

N, B = 64, 128


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def thresholds(steps, *, rows=N, columns=B, name="w"):
    """What rounds v in steps 1, 2, ...: fp32 [rows, columns] each."""
    keys = torch.tensor([parameter_key(0, name)], dtype=torch.int32).expand(rows, 2)
    row, column = torch.arange(rows, dtype=torch.int32), torch.arange(columns, dtype=torch.int32)
    return (dither(keys, torch.full_like(row, step), row, column) for step in range(1, steps + 1))


ROUNDINGS = {
    "dithered": lambda steps, n: thresholds(steps, rows=n),
    "independent": lambda steps, n: (torch.rand(n, B, generator=g) for g in [generator(1)] * steps),
    "nearest": lambda steps, n: (torch.full((n, B), 0.5) for _ in range(steps)),
}
CHANGES = ["thirtieth", "threefold", "zero", "decay"]


def tracking_error(beta2, *, change="thirtieth", rounding="dithered", seed=0, n=16):
    """log2(stored v / v) of live columns, [n, columns], and the mean of sqrt(v / stored v), which scales an update.

    After 1 / (1 - beta2) steps the gradients of every other column change, for 6 / (1 - beta2) more steps.
    """
    gen = generator(seed)
    size = torch.ones(B)
    v = torch.zeros(n, B, dtype=torch.float64)
    stored = encode_v(v.float(), torch.zeros(n, B))
    memory = round(1 / (1 - beta2))
    for step, random in enumerate(ROUNDINGS[rounding](7 * memory, n)):
        if step == memory:
            size[::2] *= {"thirtieth": 1 / 30, "threefold": 3.0, "zero": 0.0, "decay": 1.0}[change]
        if step >= memory and change == "decay":
            size *= 100 ** (-1 / (6 * memory))
        squared = (torch.randn(n, B, generator=gen) * size).square() * (1 - beta2)
        v = v * beta2 + squared
        decoded = decode_v(*stored) * beta2 + squared
        stored = encode_v(decoded, random)
    error = (decode_v(*stored).double() / v).log2()[:, 1 if change == "zero" else 0 :: 1 + (change == "zero")]
    return error, (-error / 2).exp2().mean()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("beta2", [0.95, 0.99, 0.999])
def test_v_follows_gradients_that_change(beta2, change):
    error, scale = tracking_error(beta2, change=change)
    assert error.abs().mean() <= 0.1
    assert error.mean().abs() <= 0.02
    assert abs(scale - 1) <= 0.02  # the mean size of an update


def test_rounding_to_nearest_is_a_ratchet():
    """Why v is rounded stochastically, and that the test above can fail."""
    error, scale = tracking_error(0.999, rounding="nearest")
    assert error.abs().mean() > 1
    assert error.mean() > 0.5
    assert scale < 0.9


def in_a_fixed_range(m, v):
    """M as it would be stored without a scale of its block: in units of 8 sqrt(v), which no |m| exceeds."""
    unit = 8 * v.sqrt()
    spread = ((m / unit).abs() ** 2.5 * E4M3.max).to(E4M3.dtype).double() / E4M3.max
    return torch.where(v > 0, spread**0.4 * unit, 0.0).copysign(m)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("smaller", [30, 1000])
def test_updates_keep_their_size_where_gradients_fall_and_v_remembers(smaller, fixed):
    """M follows in ten steps and v in a thousand, so updates fall with m; in a fixed range they die, or do not fall."""
    gen, n, (beta1, beta2) = generator(), 8, (0.9, 0.999)
    m, v = (torch.zeros(n, B, dtype=torch.float64) for _ in range(2))
    stored_m, stored_v = m, v
    sizes = []
    for step, random in enumerate(thresholds(1500, rows=n)):
        grad = torch.randn(n, B, generator=gen).double() / (smaller if step >= 1000 else 1)
        m, v = m.lerp(grad, 1 - beta1), v.lerp(grad.square(), 1 - beta2)
        own_m, own_v = stored_m.lerp(grad, 1 - beta1), stored_v.lerp(grad.square(), 1 - beta2)
        moments = FP8Moments.encode(own_m.float(), own_v.float(), random)
        stored_m, stored_v = (moment.double() for moment in moments.decode())
        if fixed:
            stored_m = in_a_fixed_range(own_m, stored_v)
        if step >= 1100:  # of the larger gradients m has forgotten all but .9^100
            sizes.append((stored_m.abs() / stored_v.sqrt()).mean() / (m.abs() / v.sqrt()).mean())
    off = (torch.stack(sizes) - 1).abs().max()
    assert off > 0.5 if fixed else off <= 0.02


@pytest.mark.parametrize("beta2", [0.95, 0.99])
def test_even_thresholds_halve_the_noise_of_independent_ones(beta2):
    even, independent = (tracking_error(beta2, rounding=r)[0].square().mean() for r in ("dithered", "independent"))
    assert even < 0.6 * independent


@pytest.mark.parametrize("period", [5, 21, 89])
def test_gradients_with_a_period_meet_no_resonance(period):
    """Every `period` steps a Fibonacci number apart the golden-ratio sequence nearly returns to where it was."""
    gen, n, beta2 = generator(), 16, 0.99
    v = torch.zeros(n, B, dtype=torch.float64)
    stored = encode_v(v.float(), torch.zeros(n, B))
    for step, random in enumerate(thresholds(10 * period + 600, rows=n)):
        size = torch.ones(B)
        size[::2] = step % period == 0
        squared = (torch.randn(n, B, generator=gen) * size).square() * (1 - beta2)
        v = v * beta2 + squared
        stored = encode_v(decode_v(*stored) * beta2 + squared, random)
    error = (decode_v(*stored).double() / v).log2()
    assert error.abs().mean() <= 0.1
    assert error.mean().abs() <= 0.02
