"""What `health()` reports."""

import math

import pytest
import torch
from toy_adamw import assert_same_bits, bits_of, parameters, poison, set_grads, trained

from lightning_fp8.numerics.weights import BF16_WEIGHTS
from lightning_fp8.optim import FP8AdamW


def test_health_of_a_step_that_is_known():
    p = torch.nn.Parameter(torch.ones(8, 200).bfloat16())
    optimizer = FP8AdamW([("w", p)], lr=1e-6, weight_decay=0.0, rounding="nearest", track_health=True)
    p.grad = torch.full_like(p, 0.5)
    p.grad[:, 100:] *= -1
    optimizer.step()
    health = optimizer.health()
    assert health.v_at_floor == 0
    assert health.updates_lost == 1
    # In a first step u = g / (|g| + eps). Each of fp32's roundings is 2^-24.
    assert abs(health.max_update - 1) < 1e-6
    assert abs(health.update_rms - 1) < 1e-6


def test_health_counts_lost_updates_by_rounding():
    """Odds of 1/40: a stochastic rounding moves that share, Kahan's and the correction's weights all."""
    lost = {}
    for rounding in BF16_WEIGHTS:
        p = torch.nn.Parameter(torch.full((64, 256), 1.0).bfloat16())
        lr = 2.0**-8 / 40  # below 1 a last bit is 2^-8
        optimizer = FP8AdamW([("w", p)], lr=lr, weight_decay=0.0, rounding=rounding, track_health=True)
        p.grad = torch.ones_like(p)
        optimizer.step()
        lost[rounding] = float(optimizer.health().updates_lost)
    assert lost["nearest"] == 1
    assert lost["kahan"] == lost["correction8"] == 0
    assert abs(lost["stochastic"] - 39 / 40) < 5 * math.sqrt(39) / 40 / 128


def test_health_counts_v_at_the_floor():
    shares = {}
    for moments in ("fp8", "e4m3"):
        p = torch.nn.Parameter(torch.zeros(4, 128))
        optimizer = FP8AdamW([p], moments=moments, track_health=True)
        p.grad = torch.ones_like(p)
        p.grad[:, :32] = 2.0**-12  # v is 24 octaves down: 0 in E4M3, in range of fp8
        p.grad[:, 32:40] = 2.0**-24  # 48 octaves
        p.grad[:, 40:48] = 0.0  # not positive: not counted
        optimizer.step()
        shares[moments] = float(optimizer.health().v_at_floor)
    assert shares == pytest.approx({"fp8": 8 / 120, "e4m3": 40 / 120})


def test_health_is_over_all_groups_that_ask_for_it():
    params = parameters()
    groups = [{"params": [item], "track_health": item[0] != "norm"} for item in params.items()]
    optimizer = FP8AdamW(groups, weight_decay=0.0)
    with pytest.raises(ValueError, match="nothing was counted; set track_health=True and take a step first"):
        optimizer.health()
    set_grads(params, 0)
    params["norm"].grad *= 0
    optimizer.step()
    assert abs(optimizer.health().update_rms - 1) < 1e-3  # 0 for a third of the parameters if `norm` were in it
    before = optimizer.health()
    set_grads(params, 1)
    poison(params, float("nan"))
    optimizer.step()  # skipped
    assert optimizer.health() == before


def test_health_changes_no_bit():
    assert_same_bits(bits_of(*trained(range(3))), bits_of(*trained(range(3), track_health=True)))
