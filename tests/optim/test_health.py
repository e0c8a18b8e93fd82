"""What `health()` reports."""

import math

import pytest
import torch
from toy_adamw import assert_same_bits, bits_of, parameters, poison, set_grads, trained

from lightning_fp8.numerics.weights import BF16_WEIGHTS
from lightning_fp8.optim import FP8AdamW, enable_gradient_release, finite


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
    assert lost["nearest"] == lost["scaled_fp16"] == 1  # 1/40 of bf16's last bit is less than half of fp16's
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
        p.grad[:, 48:56] = 2.0**-12.5  # so that no empty interval is wide enough to be left out
        p.grad[:, 40:48] = 0.0  # not positive: not counted
        optimizer.step()
        shares[moments] = float(optimizer.health().v_at_floor)
    assert shares == pytest.approx({"fp8": 8 / 120, "e4m3": 48 / 120})


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


def test_health_of_each_parameter():
    """Against the formulas, on parameters that share chunks and blocks; those of all together follow from them."""
    sizes = {"a.weight": 1.0, "b.weight": 0.5, "conv.weight": 0.25, "norm": 0.125, "gate": 0.0}
    params = parameters(torch.float32)
    optimizer = FP8AdamW(list(params.items()), lr=0.0, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0, track_health=True)
    for name, p in params.items():
        p.grad = torch.full_like(p, sizes[name])
    params["a.weight"].grad[0, 0] = 3.0
    optimizer.step()
    found = optimizer.health_by_parameter()
    assert set(found) == set(params)
    squares = elements = 0.0
    for name, p in params.items():
        u = p.grad / (p.grad + 1)  # with betas of 0, m = g and v = g^2
        squares, elements = squares + float(u.square().sum()), elements + p.numel()
        torch.testing.assert_close(found[name].max_update, u.max(), rtol=1e-6, atol=0)
        torch.testing.assert_close(found[name].update_rms, u.square().mean().sqrt(), rtol=1e-5, atol=0)
        assert found[name].v_at_floor == found[name].updates_lost == 0
    whole = optimizer.health()
    assert whole.max_update == max(health.max_update for health in found.values())
    assert float(whole.update_rms) == pytest.approx(math.sqrt(squares / elements), rel=1e-5)


@pytest.mark.parametrize("elements", [300, 1000])
def test_chunks_change_no_figure(elements, monkeypatch):
    expected = trained(track_health=True)[1].health_by_parameter()
    monkeypatch.setattr("lightning_fp8.optim.packing._CHUNK_ELEMENTS", {"cpu": elements})
    found = trained(track_health=True)[1].health_by_parameter()
    assert found.keys() == expected.keys()
    for name, figures in found.items():
        torch.testing.assert_close(torch.stack(figures), torch.stack(expected[name]), rtol=1e-5, atol=0)


def test_lost_updates_are_those_of_their_own_parameter():
    params = {
        name: torch.nn.Parameter(torch.full((4, 128), size).bfloat16()) for name, size in (("w", 1.0), ("x", 0.0))
    }
    optimizer = FP8AdamW(params.items(), lr=1e-6, weight_decay=0.0, rounding="nearest", track_health=True)
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    lost = {name: float(figures.updates_lost) for name, figures in optimizer.health_by_parameter().items()}
    assert lost == {"w": 1.0, "x": 0.0}


@pytest.mark.parametrize("free", [("cpu",), ()], ids=["read", "masked"])
def test_figures_of_released_gradients_are_of_all_parameters(free, monkeypatch):
    monkeypatch.setattr(finite, "_FREE_TO_READ", free)
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 128)).bfloat16()
    optimizer = FP8AdamW(model.named_parameters(), track_health=True)
    enable_gradient_release(model, optimizer)
    model(torch.ones(2, 128).bfloat16()).sum().backward()
    optimizer.step()
    found = optimizer.health_by_parameter()
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert optimizer.health().max_update == max(figures.max_update for figures in found.values())
    model(torch.full((2, 128), float("nan")).bfloat16()).sum().backward()
    again = optimizer.health_by_parameter()
    assert optimizer.skipped_steps == 2  # of the weights: gradients of biases do not depend on what comes in
    assert all(again[name] == found[name] for name in ("0.weight", "1.weight"))
    assert again["0.bias"] != found["0.bias"]
