"""The step of `FP8AdamW` and the passes of a gradient reduction on a device, beside the operations on it."""

import pytest
import torch

from lightning_fp8 import hardware
from lightning_fp8.kernels import gradients
from lightning_fp8.numerics import FORMATS
from lightning_fp8.numerics.quantize import amax, scale_of
from lightning_fp8.optim import FP8AdamW, enable_gradient_release, packing

pytestmark = pytest.mark.gpu

SHAPES = [(1024, 2048), (3, 200), (64, 130), (8, 16, 144), (512,)]


def trained(dtype, *, released=False, steps=12, **options):
    gen = torch.Generator().manual_seed(0)
    model = torch.nn.ParameterList([(torch.randn(s, generator=gen) * 0.02).to("cuda", dtype) for s in SHAPES])
    optimizer = FP8AdamW(model.named_parameters(), **{"lr": 1e-2, **options})
    if released:
        enable_gradient_release(model, optimizer)
    for _ in range(steps):
        loss = torch.zeros((), device="cuda")
        for p in model:
            spread = (torch.randn(p.shape[-1:], generator=gen) * 3).exp()
            grad = torch.randn(p.shape, generator=gen) * 1e-3 * spread * (torch.rand(p.shape, generator=gen) < 0.7)
            loss = loss + (p * grad.to("cuda", dtype)).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [tensor for p in model for tensor in (p.detach(), *optimizer.state[p].values())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [{}, {"max_update": 0.5, "clip_update_rms": 1.0, "weight_decay": 0.3}, {"eps": 1e-15}, {"block_size": 64}],
)
def test_it_does_what_the_operations_do(dtype, options, monkeypatch):
    """A first step, after which codes that differ would lead to others."""
    assert hardware.runs_kernels()
    found = trained(dtype, steps=1, **options)
    monkeypatch.setattr(packing, "has_adamw", lambda *_: False)
    for a, b in zip(found, trained(dtype, steps=1, **options), strict=True):
        if a.dtype is torch.float32:
            assert torch.allclose(a, b, rtol=2.0**-20, atol=2.0**-20 * 1e-2)
        else:
            assert (a != b).sum() <= 1 + a.numel() / 1000
            assert a.is_floating_point() or ((a.long() - b.long()).abs() <= 1).all()


def test_losses_of_many_steps_are_those_of_the_operations(monkeypatch):
    """Codes that differ by one here and there are noise, and no drift."""
    found = trained(torch.bfloat16, steps=50)
    monkeypatch.setattr(packing, "has_adamw", lambda *_: False)
    expected = trained(torch.bfloat16, steps=50)
    for a, b in zip(found, expected, strict=True):
        if a.dtype is torch.bfloat16:
            assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_health_is_what_the_operations_count(dtype, monkeypatch):
    found, expected = [], []
    for into, kernel in ((found, True), (expected, False)):
        if not kernel:
            monkeypatch.setattr(packing, "has_adamw", lambda *_: False)
        gen = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=gen).to("cuda", dtype)) for s in SHAPES]
        optimizer = FP8AdamW(params, lr=1e-4, track_health=True)
        for p in params:
            p.grad = torch.randn(p.shape, generator=gen).to("cuda", dtype)
        optimizer.step()
        into.extend(optimizer.health())
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-3)


def test_one_parameter_at_a_time_is_stepped_as_all_are():
    for a, b in zip(trained(torch.bfloat16), trained(torch.bfloat16, released=True), strict=True):
        assert torch.equal(a, b)


def test_a_step_does_not_wait_for_the_host():
    p = torch.nn.Parameter(torch.randn(256, 256, device="cuda", dtype=torch.bfloat16))
    q = torch.nn.Parameter(torch.randn(256, 250, device="cuda", dtype=torch.bfloat16))
    optimizer = FP8AdamW([p, q])
    p.grad, q.grad = torch.randn_like(p), torch.randn_like(q)
    optimizer.step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_the_passes_of_a_reduction(fmt):
    gen = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(n, generator=gen).mul(torch.randn(n, generator=gen).exp()).bfloat16() for n in (4096, 7, 9999)
    ]
    scale, mu = torch.stack([scale_of(amax(g), fmt) for g in tensors]), torch.tensor([1.0, 0.5, 0.25])
    length = sum(g.numel() for g in tensors)
    codes, counts = gradients.encode(tensors, scale, fmt, length)
    there, counted = gradients.encode([g.cuda() for g in tensors], scale.cuda(), fmt, length)
    assert torch.equal(there.cpu(), codes)
    assert torch.equal(counted.underflown.cpu(), counts.underflown)
    ranks, edges = codes.repeat(3, 1), [slice(0, 4096), slice(4096, 4103), slice(4103, length)]
    sums, counts = gradients.accumulate(ranks, edges, mu, fmt)
    there, counted = gradients.accumulate(ranks.cuda(), edges, mu.cuda(), fmt)
    assert torch.equal(there.cpu(), sums)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(counted, counts, strict=True))
    results, found = [torch.empty_like(g) for g in tensors], [torch.empty_like(g).cuda() for g in tensors]
    gradients.decode_into(results, sums, scale, mu, 3, fmt)
    gradients.decode_into(found, sums.cuda(), scale.cuda(), mu.cuda(), 3, fmt)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, results, strict=True))
