"""Every option that torch's own tests give to the optimizers that can be wrapped."""

import copy

import pytest
import torch
from scenarios import TENSOR_LR, parameters, same, train
from torch import optim

from lightning_fp8.optim import FP8AdamW, FP8Optimizer

CONFIGURATIONS = {  # those of torch.testing._internal.common_optimizers for CPUs, less what is refused by name
    optim.Adam: [
        {"lr": 0.01},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        TENSOR_LR,
        {"lr": torch.tensor(0.001), "betas": (torch.tensor(0.9), torch.tensor(0.99))},
    ],
    optim.AdamW: [{"lr": 0.01}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}, TENSOR_LR],
    optim.NAdam: [
        {"lr": 1e-3},
        {"momentum_decay": 6e-3},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "momentum_decay": 6e-3},
        {"weight_decay": 0.1, "momentum_decay": 6e-3, "decoupled_weight_decay": True},
        {"weight_decay": 0.1, "maximize": True},
    ],
    optim.RAdam: [
        {"lr": 2e-3},
        {"eps": 1e-6},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"weight_decay": 0.1, "maximize": True},
    ],
    optim.Adamax: [{"lr": 0.1}, {"weight_decay": 0.1}, {"maximize": True}, {"weight_decay": 0.1, "maximize": True}],
    optim.Adagrad: [
        {"lr": 0.1},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"initial_accumulator_value": 0.1, "weight_decay": 0.1},
        {"lr": 0.1, "lr_decay": 0.5, "weight_decay": 0.1},
        TENSOR_LR,
    ],
    optim.RMSprop: [
        {"lr": 1e-3},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"maximize": True, "weight_decay": 0.1},
        {"weight_decay": 0.1, "momentum": 0.1},
    ],
    optim.SGD: [
        {"lr": 1e-2},
        TENSOR_LR,
        {"weight_decay": 0.5},
        {"momentum": 0.9},
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "momentum": 0.9},
        {"weight_decay": 0.1, "momentum": 0.9, "maximize": True},
        {"momentum": 0.9, "dampening": 0.5},
        {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True},
    ],
    optim.Muon: [
        {"lr": 0.01},
        TENSOR_LR,
        {"weight_decay": 0.2},
        {"momentum": 0.8},
        {"ns_steps": 6},
        {"ns_coefficients": (3.4, -4.7, 2.0)},
        {"adjust_lr_fn": "match_rms_adamw"},
    ],
}


CASES = [(kind, options) for kind, all_options in CONFIGURATIONS.items() for options in ({}, *all_options)]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=[f"{kind.__name__} {options}" for kind, options in CASES])
def test_every_configuration_of_torch(kind, options):
    """With fp32 state the result is torch's, bit for bit; with FP8 state it is close and resumable."""
    used = slice(0, 2) if kind is optim.Muon else slice(None)
    plain, exact, quantized = (parameters()[used] for _ in range(3))
    train(kind(plain, **options), plain, 6)
    train(FP8Optimizer(kind(exact, **options), moments="fp32"), exact, 6)
    assert same(plain, exact)
    ours = FP8Optimizer(kind(quantized, **options))
    train(ours, quantized, 6)
    for p, q, start in zip(plain, quantized, parameters(), strict=False):
        assert (p - q).norm() <= 0.055 * (p - start).norm()
    again = FP8Optimizer(kind(quantized, **options))
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert again.state_dict()["param_groups"] == ours.state_dict()["param_groups"]


@pytest.mark.parametrize("options", [{}, {"lr": 0.01}, {"weight_decay": 0.1}, TENSOR_LR], ids=str)
def test_fp8_adamw_in_torchs_configurations(options):
    plain, ours = parameters(), parameters()
    train(optim.AdamW(plain, **options), plain, 6)
    train(FP8AdamW(ours, **options), ours, 6)
    for p, q, start in zip(plain, ours, parameters(), strict=True):
        assert (p - q).norm() <= 0.055 * (p - start).norm()
