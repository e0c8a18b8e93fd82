"""Metrics of steps and losses against figures written out in Python, fp64."""

import math
import statistics

import numpy as np
import pytest
import torch

from lightning_fp8.metrics import (
    GradNormZ,
    LossGapToReference,
    LossSpike,
    LRSensitivity,
    MaxUpdate,
    MomentZeroFraction,
    ScaleDrift,
    StalledUpdateFraction,
    UpdateRMS,
    lr_sensitivity,
)

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")


def after(metric, values, *more):
    for value in values:
        metric.update(torch.as_tensor(value, dtype=torch.float32), *more)
    return float(metric.compute())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_updates_are_measured_over_all_elements(dtype):
    parts = [torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (3, 50, 7)]
    whole = torch.cat(parts).double().numpy()
    rms, largest = UpdateRMS(), MaxUpdate()
    for part in parts:
        rms.update(part)
        largest.update(part)
    assert float(rms.compute()) == pytest.approx(math.sqrt((whole**2).mean()), rel=1e-12)
    assert float(largest.compute()) == np.abs(whole).max()
    assert math.isnan(float(UpdateRMS().compute()))


def test_stalled_weights_are_those_that_were_to_move():
    before = torch.tensor([1.0, 1.0, 1.0, 2.0], dtype=torch.bfloat16)
    exact = torch.tensor([1.0 + 2**-10, 1.0 + 2**-6, 1.0, 2.0 - 2**-10])
    metric = StalledUpdateFraction()
    metric.update(before, exact, exact.bfloat16())
    assert float(metric.compute()) == pytest.approx(2 / 3)
    still = StalledUpdateFraction()
    still.update(before, before, before)
    assert float(still.compute()) == 0


@pytest.mark.parametrize(("step", "stalled"), [(2.0**-8 * 0.99, 1), (2.0**-8 * 1.01, 0)])
def test_to_nearest_a_weight_stays_below_half_a_unit_of_its_last_place(step, stalled):
    before = torch.ones(8, dtype=torch.bfloat16)
    exact = before.double() + step
    metric = StalledUpdateFraction()
    metric.update(before, exact, exact.bfloat16())
    assert float(metric.compute()) == stalled


def test_lost_moments_are_zeros_under_a_gradient():
    v, grad = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 1e-9, 0.0, 1.0])
    metric = MomentZeroFraction()
    metric.update(v, grad)
    assert float(metric.compute()) == 0.25


@pytest.mark.parametrize("history", [1, 3])
def test_drift_is_that_over_the_history(history):
    scales = [1.0, 8.0, 4.0, 0.5, 0.5, 64.0]
    metric = ScaleDrift(history)
    for t, scale in enumerate(scales):
        metric.update(torch.tensor([scale / 2, scale]))  # of several the largest counts
        expected = abs(math.log2(scale / scales[t - history])) if t >= history else 0
        assert float(metric.compute()) == expected


def gradient_norms(n):
    return np.abs(np.random.default_rng(0).normal(1.0, 0.1, n)).astype(np.float32).tolist()


def test_the_norm_is_judged_by_those_before_it():
    norms = gradient_norms(60)
    metric = GradNormZ(alpha=0.9, warmup=20)
    mean, variance = statistics.fmean(norms[:20]), statistics.pvariance(norms[:20])
    for t, norm in enumerate(norms):
        metric.update(torch.tensor(norm))
        expected = 0.0 if t < 20 else (norm - mean) / math.sqrt(variance)
        assert float(metric.compute()) == pytest.approx(expected, rel=1e-5), t
        if t >= 20:
            variance = 0.9 * (variance + 0.1 * (norm - mean) ** 2)
            mean = mean + 0.1 * (norm - mean)


def test_a_norm_that_is_not_finite_is_as_unusual_as_can_be_and_forgotten():
    one, other = GradNormZ(warmup=5), GradNormZ(warmup=5)
    for norm in gradient_norms(20):
        one.update(torch.tensor(norm))
        other.update(torch.tensor(norm))
    for bad in (math.inf, math.nan):
        assert after(one, [bad]) == math.inf
    assert after(one, [1.0]) == after(other, [1.0])


def test_a_constant_norm_has_no_deviation_and_any_other_is_infinitely_far():
    metric = GradNormZ(warmup=3)
    assert after(metric, [2.0] * 10) == 0
    assert after(metric, [2.5]) == math.inf


def losses(n, seed=0):
    return (2 + np.random.default_rng(seed).normal(0, 0.02, n)).astype(np.float32).tolist()


def test_a_spike_is_judged_by_the_median_of_the_window():
    values, metric = losses(60), LossSpike(window=21)
    for t, value in enumerate(values):
        metric.update(torch.tensor(value))
        known = sorted(values[max(0, t - 21) : t])
        expected = 0.0
        if 2 * len(known) >= 21:
            middle = known[(len(known) - 1) // 2]
            spread = sorted(abs(x - middle) for x in known)[(len(known) - 1) // 2]
            expected = (value - middle) / (1.4826 * spread + 1e-3)
        assert float(metric.compute()) == pytest.approx(expected, rel=1e-5, abs=1e-6), t


@pytest.mark.parametrize("seed", range(5))
def test_three_poisoned_batches_are_confirmed_at_the_second_and_a_clean_run_never(seed):
    metric, confirmed = LossSpike(window=30), []
    for t, loss in enumerate(losses(200, seed)):
        metric.update(torch.tensor(loss + (1.5 if 100 <= t < 103 else 0)))
        if metric.confirmed():
            confirmed.append(t)
    assert confirmed == [101, 102]


def test_one_spike_alone_is_not_confirmed_and_a_loss_that_is_not_finite_counts():
    metric = LossSpike(window=10)
    after(metric, losses(20))
    assert after(metric, [9.0]) > 6
    assert not metric.confirmed()
    after(metric, losses(1))
    assert after(metric, [math.nan]) == math.inf
    assert not metric.confirmed()
    after(metric, [math.inf])
    assert metric.confirmed()
    assert not metric.losses.isnan().any()


def test_a_constant_gap_is_found_whatever_the_loss_does():
    reference = torch.linspace(5, 2, 100)
    reference[40:45] = math.nan
    metric = LossGapToReference(reference)
    assert math.isnan(float(metric.compute()))
    for step in range(120):
        metric.update(torch.tensor(1.0025 * float(torch.nan_to_num(reference[min(step, 99)], 7.0))), step)
    assert float(metric.compute()) == pytest.approx(0.0025, rel=1e-4)


def test_the_gap_follows_the_newest_steps():
    metric = LossGapToReference(torch.full((200,), 2.0), alpha=0.9)
    for step in range(200):
        metric.update(torch.tensor(2.0 if step < 100 else 2.2), step)
    assert float(metric.compute()) == pytest.approx(0.1, rel=1e-3)


def test_sensitivity_is_what_the_rates_cost_on_average():
    found = [2.5, 2.0, 2.2, math.nan, math.inf, 9.0]
    expected = np.mean([2.5, 2.0, 2.2, 4.0, 4.0, 4.0]) - 2.0
    assert float(lr_sensitivity(torch.tensor(found), 4.0)) == pytest.approx(expected, rel=1e-6)
    metric = LRSensitivity(initial=4.0)
    for loss in found:
        metric.update(torch.tensor(loss))
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-6)


def test_a_model_that_any_rate_suits_is_not_sensitive():
    assert float(lr_sensitivity(torch.full((7,), 2.0), 4.0)) == 0
