"""Metrics of activations, attention, logits and weights against figures written out in numpy, fp64."""

import math

import numpy as np
import pytest
import torch

from lightning_fp8.metrics import (
    ActivationKurtosis,
    Amax,
    AttentionEntropy,
    AttentionLogitMax,
    MaxMedianRatio,
    OutputLogZ,
    SwiGLUAlignment,
)
from lightning_fp8.metrics.attention import attention_scores

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")


def of(metric, *batches):
    for batch in batches:
        metric.update(*batch)
    return float(metric.compute())


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_amax_is_the_largest_magnitude_of_all_batches(dtype):
    batches = [normal(3, 5, 7, seed=seed, dtype=dtype) for seed in range(4)]
    assert of(Amax(), *((x,) for x in batches)) == max(np.abs(x.double().numpy()).max() for x in batches)


def test_amax_shows_what_is_not_finite_and_nothing_as_nothing():
    assert of(Amax(), (torch.tensor([1.0, -math.inf]),)) == math.inf
    assert math.isnan(of(Amax(), (torch.tensor([1.0, math.nan]),), (torch.ones(2),)))
    assert of(Amax(), (torch.zeros(0),)) == 0
    assert of(Amax()) == -math.inf


def kurtosis(x):
    r2 = (x.double().numpy().reshape(-1, x.shape[-1]) ** 2).mean(0)
    return (r2**2).mean() / r2.mean() ** 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kurtosis_is_over_the_tokens_of_all_batches(dtype):
    """Not the mean of the batches' kurtoses: these batches have different channels that stand out."""
    batches = [normal(2, 8, 32, seed=seed, dtype=dtype) for seed in range(3)]
    for channel, x in enumerate(batches):
        x[..., channel] *= 20
    found = of(ActivationKurtosis(32), *((x,) for x in batches))
    assert found == pytest.approx(kurtosis(torch.cat(batches)), rel=1e-12)
    assert abs(found - np.mean([kurtosis(x) for x in batches])) > 1


def test_kurtosis_lies_between_1_and_the_number_of_channels():
    even, one = torch.ones(4, 16), torch.zeros(4, 16)
    one[:, 3] = 1e25  # whose fourth power is no fp32 number
    assert of(ActivationKurtosis(16), (even,)) == 1
    assert of(ActivationKurtosis(16), (one,)) == 16
    assert math.isnan(of(ActivationKurtosis(16), (torch.zeros(4, 16),)))
    assert of(ActivationKurtosis(16), (even[:0],), (even,)) == 1


@pytest.mark.parametrize("width", [1, 4, 5])
def test_max_median_is_the_mean_over_tokens(width):
    x = normal(3, 6, width, seed=1).bfloat16()
    rows = np.sort(np.abs(x.double().numpy().reshape(-1, width)), axis=1)
    expected = (rows[:, -1] / rows[:, (width - 1) // 2]).mean()
    assert of(MaxMedianRatio(), (x[:1],), (x[1:],)) == pytest.approx(expected, rel=1e-6)


def test_tokens_without_a_median_do_not_count():
    x = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 9.0]])
    assert of(MaxMedianRatio(), (x,)) == 2
    assert math.isnan(of(MaxMedianRatio(), (x[1:],)))
    assert math.isnan(of(MaxMedianRatio(), (x[:0],)))


def softmax_entropy(row):
    p = np.exp(row - row.max())
    p = p / p.sum()
    return -(p * np.log(np.maximum(p, 1e-300))).sum()


def test_attention_is_that_of_each_query_over_what_it_sees():
    q, k = normal(2, 4, 5, 8, seed=2) * 3, normal(2, 2, 5, 8, seed=3) * 3
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    scores = attention_scores(q, k)
    largest, entropies = [], []
    for b in range(2):
        for h in range(4):
            for t in range(5):
                keys = k[b, h // 2, : t + 1].double().numpy()  # two query heads share a key head
                row = keys @ q[b, h, t].double().numpy() / math.sqrt(8)
                largest.append(np.abs(row).max())
                entropies.append(softmax_entropy(row))
    assert of(AttentionLogitMax(), (scores, seen)) == pytest.approx(max(largest), rel=1e-6)
    assert of(AttentionEntropy(), (scores, seen)) == pytest.approx(np.mean(entropies), rel=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e4])
def test_entropy_lies_between_0_and_that_of_a_choice_among_all(size):
    scores = torch.arange(8.0).expand(3, 8) * size
    assert of(AttentionEntropy(), (scores, None)) == pytest.approx(math.log(8) if size == 0 else 0, abs=1e-6)


def test_queries_that_see_nothing_do_not_count():
    scores, seen = torch.full((2, 4), 1e3), torch.tensor([[True] * 4, [False] * 4])
    assert of(AttentionEntropy(), (scores, seen)) == pytest.approx(math.log(4), rel=1e-6)
    assert of(AttentionLogitMax(), (scores * seen.logical_not(), seen)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_log_z_is_the_mean_over_tokens(dtype):
    batches = [normal(2, 3, 11, seed=seed, dtype=dtype) * 50 for seed in range(2)]
    rows = torch.cat(batches).double().numpy().reshape(-1, 11)
    expected = np.mean([row.max() + math.log(np.exp(row - row.max()).sum()) for row in rows])
    assert of(OutputLogZ(), *((x,) for x in batches)) == pytest.approx(expected, rel=1e-6)


def test_log_z_of_large_logits_is_finite():
    assert of(OutputLogZ(), (torch.full((2, 4), 3e4),)) == pytest.approx(3e4 + math.log(4))


def test_alignment_is_the_largest_cosine_of_any_neuron():
    gate, up = normal(6, 16, seed=4), normal(6, 16, seed=5)
    rows = zip(gate.double().numpy(), up.double().numpy(), strict=True)
    cosines = [abs(g @ u / np.linalg.norm(g) / np.linalg.norm(u)) for g, u in rows]
    assert of(SwiGLUAlignment(), (gate[:3], up[:3]), (gate[3:], up[3:])) == pytest.approx(max(cosines), rel=1e-6)
    up[2] = -7 * gate[2]
    assert of(SwiGLUAlignment(), (gate.bfloat16(), up.bfloat16())) == pytest.approx(1, abs=1e-4)
    assert of(SwiGLUAlignment(), (torch.zeros(2, 4), torch.ones(2, 4))) == 0
    assert of(SwiGLUAlignment(), (gate[:0], up[:0])) == 0
