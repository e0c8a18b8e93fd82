"""Updates of limited size: StableAdamW's RMS clipping, and a limit on each element."""

import pytest
import torch
from toy_adamw import assert_same_bits, bits_of, parameters, set_grads, trained

from lightning_fp8.optim import FP8AdamW


def stable_adamw(grads, weight, *, lr, betas, eps, weight_decay, limit):
    """Algorithm 2 of "Stable and low-precision training for large-scale vision-language models", in fp64."""
    w, m, v = weight.double(), 0.0, 0.0
    for t, g in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * g.double()
        v = betas[1] * v + (1 - betas[1]) * g.double().square()
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        rms = (g.double().square() / v_hat.clamp_min(eps**2)).mean().sqrt()
        rate = lr / max(1.0, float(rms) / limit)
        w = w - rate * weight_decay * w - rate * m_hat / (v_hat.sqrt() + eps)
    return w


@pytest.mark.parametrize("limit", [1.0, 0.3])
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)])
@pytest.mark.parametrize("elements", [300, 1 << 17])
def test_clip_update_rms_is_stable_adamw(limit, lr, elements, monkeypatch):
    monkeypatch.setattr("lightning_fp8.optim.packing._CHUNK_ELEMENTS", {"cpu": elements})
    params = parameters(torch.float32)
    before = {name: p.detach().clone() for name, p in params.items()}
    options = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = FP8AdamW(list(params.items()), lr=lr, moments="fp32", clip_update_rms=limit, **options)
    grads = {name: [] for name in params}
    for step in range(6):
        set_grads(params, step, size=10.0 if step == 4 else 1.0)  # a spike that v has not seen coming
        for name, p in params.items():
            grads[name].append(p.grad)
        optimizer.step()
    for name, p in params.items():
        expected = stable_adamw(grads[name], before[name], lr=0.01, limit=limit, **options)
        torch.testing.assert_close(p.double(), expected, rtol=0, atol=6 * 2.0**-22)
    plain, _ = trained([])
    assert plain.keys() == params.keys()


def test_a_limit_that_is_not_reached_changes_nothing():
    expected = bits_of(*trained(range(3)))
    assert_same_bits(expected, bits_of(*trained(range(3), clip_update_rms=100.0, max_update=100.0)))


def test_max_update_limits_each_update():
    params = parameters(torch.float32)
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer = FP8AdamW(list(params.items()), lr=1.0, weight_decay=0.0, max_update=0.25)
    set_grads(params, 0)  # in a first step every update is 1 or -1
    optimizer.step()
    for name, p in params.items():
        torch.testing.assert_close((p - before[name]).abs(), torch.full_like(p, 0.25), rtol=0, atol=1e-6)
