"""What a step of `FP8AdamW` computes."""

import math

import pytest
import torch
from toy_adamw import assert_same, assert_same_bits, bits_of, parameters, set_grads, trained

from lightning_fp8.optim import FP8AdamW


def test_fp32_is_torch_adamw():
    """With fp32 moments and weights only the order of roundings differs from torch's own."""
    params, others = parameters(torch.float32), parameters(torch.float32)
    matrices, vectors = [["a.weight", "b.weight", "conv.weight", "gate"], ["norm"]]
    steps, lr = 20, 3e-3

    def groups(p):
        return [{"params": [p[n] for n in matrices]}, {"params": [p[n] for n in vectors], "weight_decay": 0.0}]

    ours = FP8AdamW(groups(params), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, moments="fp32")
    torchs = torch.optim.AdamW(groups(others), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, foreach=False)
    for step in range(steps):
        for optimizer in (ours, torchs):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / steps)
                group["betas"] = (0.9, 0.95) if step < 10 else (0.8, 0.99)
        set_grads(params, step)
        set_grads(others, step)
        ours.step()
        torchs.step()
    for name, p in params.items():
        # A step rounds the weight at most three times on either side, each by 2^-24 of it. The terms of m are at most
        # max|g| = 5, each side rounds m thrice a step and m remembers 10 steps: 2 * 3 * 10 * 5 * 2^-24, over sqrt(v),
        # which is 1/4 or more after bias correction but for the first steps of a few elements, where m/sqrt(v) is
        # 1: an update is right to 1200 * 2^-24, with what v and the quotient add, and is multiplied by lr.
        bound = steps * 2.0**-24 * (6 * others[name].abs().max() + 1200 * lr)
        assert (p - others[name]).abs().max() <= bound, name
        assert torch.equal(ours.state[p]["step"], torch.tensor(steps))


@pytest.mark.parametrize(("beta2", "rel_l2", "largest"), [(0.95, 0.055, 0.35), (0.999, 0.08, None)])
@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_updates_follow_fp32_moments(beta2, rel_l2, largest, sigma):
    """The bounds are the project's promise, on columns that differ in size by a log-normal factor."""
    gen = torch.Generator().manual_seed(0)
    quantized, exact = (torch.nn.Parameter(torch.zeros(16, 256)) for _ in range(2))
    options = {"lr": 1.0, "betas": (0.9, beta2), "weight_decay": 0.0}
    optimizers = [FP8AdamW([quantized], **options), torch.optim.AdamW([exact], **options)]
    size = (torch.randn(256, generator=gen) * sigma).exp()
    error = total = worst = 0.0
    for _ in range(200):
        quantized.grad = torch.randn(16, 256, generator=gen) * size
        exact.grad = quantized.grad.clone()
        for p, optimizer in zip((quantized, exact), optimizers, strict=True):
            p.data.zero_()  # so that the weight after the step is the update
            optimizer.step()
        difference = (quantized - exact).detach()
        error += difference.square().sum().item()
        total += exact.detach().square().sum().item()
        worst = max(worst, difference.abs().max().item())
    assert math.sqrt(error / total) <= rel_l2
    assert largest is None or worst <= largest


def test_closure():
    p = torch.nn.Parameter(torch.ones(2, 64))
    optimizer = FP8AdamW([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (p * 3).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3 * 128
    assert (p < 1).all()
    assert optimizer.step() is None


def test_parameters_without_gradient_are_left_alone():
    params = parameters()
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer = FP8AdamW(list(params.items()), lr=0.1)
    set_grads(params, 0)
    params["b.weight"].grad = params["norm"].grad = None
    optimizer.step()
    for name, p in params.items():
        skipped = name in ("b.weight", "norm")
        assert torch.equal(p, before[name]) is skipped
        assert (p in optimizer.state) is not skipped


def test_stochastic_rounding_makes_progress_where_nearest_does_not():
    steps, lr = 100, 1e-5
    moved = {}
    for rounding in ("stochastic", "nearest"):
        p = torch.nn.Parameter(torch.ones(64, 256).bfloat16())
        optimizer = FP8AdamW([("w", p)], lr=lr, weight_decay=0.0, rounding=rounding)
        for _ in range(steps):
            p.grad = torch.ones_like(p)  # u = 1 in each step, to FP8's error
            optimizer.step()
        moved[rounding] = 1 - p.double().mean().item()
    assert moved["nearest"] == 0
    # Below 1 an ulp is 2^-8: each element makes a number of steps of that size, whose variance is steps * lr ulp or
    # less. Five standard deviations of the mean of 2^14 elements; gradients of one size have no quantisation error
    # beyond half a step of m's code, 2 %.
    deviation = math.sqrt(steps * lr * 2.0**-8 / p.numel())
    assert abs(moved["stochastic"] - steps * lr) < 5 * deviation + 0.02 * steps * lr


def test_a_learning_rate_may_be_a_tensor():
    expected = trained(dtype=torch.float32)
    params, optimizer = trained(dtype=torch.float32, lr=torch.tensor(0.01))
    for name, p in params.items():
        # lr and 1 - lr * weight_decay are rounded to fp32 before they are used, and the result once more, each step.
        torch.testing.assert_close(p, expected[0][name], rtol=0, atol=3 * 4 * 2.0**-24 * p.abs().max().item())
        assert optimizer.state[p]["step"] == 3


def test_the_gradient_may_have_any_layout():
    params, others = parameters(), parameters()
    optimizers = [FP8AdamW(list(p.items())) for p in (params, others)]
    set_grads(params, 0)
    set_grads(others, 0)
    others["a.weight"].grad = others["a.weight"].grad.t().contiguous().t()
    for optimizer in optimizers:
        optimizer.step()
    assert_same(params, optimizers[0], others, optimizers[1])


def test_gradients_whose_squares_underflow():
    """Their v is 0 while m is not: what is stored of m must then be 0, and the weights stay finite."""
    params = parameters(torch.float32)
    optimizer = FP8AdamW(list(params.items()), weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in params.items()}
    for step in range(5):
        set_grads(params, step, size=1e-24)
        optimizer.step()
    for name, p in params.items():
        torch.testing.assert_close(p, before[name], rtol=0, atol=1e-6)  # lr * |g| / eps = 1e-19 a step, and rounding
    assert not (optimizer.state[params["a.weight"]]["m_codes"] & 0x7F).any()


def test_maximize_is_minimising_the_negative():
    params, optimizer = trained([0, 1], maximize=True)
    others = parameters()
    other = FP8AdamW(list(others.items()), lr=0.01)
    for step in range(2):
        set_grads(others, step)
        for p in others.values():
            p.grad.neg_()
        other.step()
    assert_same_bits(bits_of(params, optimizer), bits_of(others, other))


@pytest.mark.parametrize("cycle", ["betas", "lr"])
def test_options_that_change_from_step_to_step_are_torchs(cycle):
    """As OneCycleLR and CyclicLR change them: the bias of a step is corrected with that step's betas."""
    params, others = parameters(torch.float32), parameters(torch.float32)
    ours = FP8AdamW(list(params.items()), lr=1e-3, moments="fp32", maximize=True)
    torchs = torch.optim.AdamW(others.values(), lr=1e-3, maximize=True, foreach=False)
    for step in range(12):
        for ps, optimizer in ((params, ours), (others, torchs)):
            for group in optimizer.param_groups:
                if cycle == "betas":
                    group["betas"] = (0.85 + 0.01 * (step % 5), 0.95 + 0.004 * (step % 7))
                else:
                    group["lr"] = 1e-3 * (1 + step % 3)
            set_grads(ps, step)
            optimizer.step()
    for name, p in params.items():
        # Twelve steps of three roundings of weights below 5, and of updates that are right to 2^-13 (see test_adamw).
        torch.testing.assert_close(p, others[name], rtol=0, atol=12 * (15 * 2.0**-24 + 3e-3 * 2.0**-13))


def test_sparse_gradients_are_refused_by_name():
    embedding = torch.nn.Embedding(8, 64, sparse=True)
    optimizer = FP8AdamW(embedding.named_parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"^FP8AdamW: the gradient of 'weight' is sparse; give its layer sparse=False"):
        optimizer.step()


ERRORS = [  # argument, value, what the message must hold: field, value and remedy
    ("lr", -1.0, r"lr is -1\.0; it must be 0 or more, and finite"),
    ("lr", float("nan"), r"lr is nan; it must be 0 or more, and finite"),
    ("eps", -1e-8, r"eps is -1e-08; it must be 0 or more, and finite"),
    ("weight_decay", -0.1, r"weight_decay is -0\.1; it must be 0 or more, and finite"),
    ("betas", (1.0, 0.9), r"betas are \(1\.0, 0\.9\); both must be in \[0, 1\)"),
    ("betas", (0.9, -0.1), r"betas are \(0\.9, -0\.1\); both must be in \[0, 1\)"),
    ("block_size", 0, r"block_size is 0; it must be from 1 to 2147483647"),
    ("clip_update_rms", 0.0, r"clip_update_rms is 0\.0; it must be more than 0, or None"),
    ("max_update", -1.0, r"max_update is -1\.0; it must be more than 0, or None"),
    ("max_skipped_steps", 0, r"max_skipped_steps is 0; it must be more than 0, or None"),
    ("moments", "fp16", r"moments 'fp16' is not one of fp8, e4m3, e4m3/e5m2, coat, fp8_lm, bf16, fp32"),
    ("rounding", "up", r"rounding 'up' is not one of stochastic, nearest, kahan, correction8, scaled_fp16"),
]


@pytest.mark.parametrize(("name", "value", "message"), ERRORS)
def test_bad_arguments(name, value, message):
    p = torch.nn.Parameter(torch.ones(2, 64))
    with pytest.raises(ValueError, match=rf"^FP8AdamW: {message}\.$"):
        FP8AdamW([p], **{name: value})
    with pytest.raises(ValueError, match=message):
        FP8AdamW([{"params": [p], name: value}])


PARAMETER_ERRORS = [
    (torch.ones(2, 64, dtype=torch.float16), r"a parameter is torch\.float16; weights must be bfloat16 or float32"),
    (torch.ones(64, 2).t(), r"a parameter of shape \(2, 64\) is not contiguous; make it so first"),
]


@pytest.mark.parametrize(("value", "message"), PARAMETER_ERRORS)
def test_bad_parameters(value, message):
    with pytest.raises(ValueError, match=rf"^FP8AdamW: {message}\.$"):
        FP8AdamW([torch.nn.Parameter(value)])
