"""What the guidance says of eps and beta2, held against steps of the optimizer."""

import warnings

import pytest
import torch

from lightning_fp8.optim import FP8AdamW
from lightning_fp8.optim.guidance import STORAGES, moment_hazards, safe_eps
from lightning_fp8.optim.step import MOMENTS

BETAS = (0.9, 0.95)


def largest_update(moments, eps, small, steps=200):
    """The largest |u| in a block of a column with gradients of 1 and others with 0, then `small`, then 0 again."""
    p = torch.zeros(1, 128, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = FP8AdamW([p], lr=1.0, betas=BETAS, eps=eps, weight_decay=0.0, moments=moments)
    for step in range(steps + 1):
        before = p.detach().clone()
        p.grad = torch.full((1, 128), small if steps / 2 <= step < steps else 0.0)
        p.grad[0, 0] = 1.0
        optimizer.step()
    return (p - before).abs()[0, 1:].max().item()


@pytest.mark.parametrize("moments", ["e4m3", "e4m3/e5m2"])
def test_safe_eps_bounds_an_update_whose_v_was_lost(moments):
    eps = safe_eps(moments, 1.0, BETAS, max_update=5.0)
    # The largest gradients whose v is lost: (1 - beta2) g^2 just below the share f of the block's largest.
    small = 0.99 * (STORAGES[moments].lost / (1 - BETAS[1])) ** 0.5
    at_limit, below = (largest_update(moments, factor * eps, small) for factor in (1.0, 0.1))
    assert at_limit <= 5.0
    assert below > 25.0  # so the bound is no more than twice too careful
    assert largest_update("fp8", 1e-12, small) < 2.0


def test_a_v_that_is_rounded_to_nearest_stays_above_the_beta2_of_the_table():
    """One column falls, another stays: v of the first halves within 1 / (1 - beta2) steps, or never."""

    def left(moments, beta2, steps=400):
        numbers = MOMENTS[moments]
        v = torch.ones(1, 128)
        v[0, 1:] = torch.linspace(0.01, 0.9, 127)
        m = torch.zeros_like(v)
        start = v = numbers.encode(m, v, m).decode()[1]
        for _ in range(steps):
            v = beta2 * v
            v[0, 0] = 1.0
            v = numbers.encode(m, v, torch.zeros(1, 128)).decode()[1]
        return (v / start)[0, 1:]

    for moments in ("e4m3", "e4m3/e5m2"):
        limit = STORAGES[moments].largest_beta2
        assert left(moments, limit - 0.005).max() < 0.5
        assert left(moments, limit + 0.005).max() > 0.5
        assert left(moments, 0.999).min() == 1.0


def test_hazards_are_named_with_their_remedies():
    assert STORAGES.keys() == MOMENTS.keys()
    assert moment_hazards("fp8", (0.9, 0.999), 1e-8) == []
    lost, stuck = moment_hazards("e4m3", (0.9, 0.999), 1e-8)
    assert "2^-18.8" in lost
    assert "stochastically" in stuck
    assert moment_hazards("e4m3", (0.9, 0.9), 1e-7) == []
    p = torch.zeros(4, 128, requires_grad=True)
    with pytest.warns(UserWarning, match="v below 2"):
        FP8AdamW([p], moments="e4m3", betas=(0.9, 0.9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FP8AdamW([p])
    with pytest.raises(ValueError, match="one of fp8"):
        safe_eps("int8", 1.0, BETAS)
