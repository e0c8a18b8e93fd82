"""Moments and scales that no step makes are refused by name, when they are loaded."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_fp8.optim import FP8AdamW, FP8Optimizer

KINDS = {
    **{moments: lambda params, m=moments: FP8AdamW(params, moments=m) for moments in ("fp8", "e4m3", "coat", "fp32")},
    "wrapped": lambda params: FP8Optimizer(torch.optim.AdamW(params)),
}


def stepped(kind):
    torch.manual_seed(0)
    model = nn.Linear(64, 4, bias=False)
    optimizer = KINDS[kind](model.named_parameters() if kind != "wrapped" else model.parameters())
    model(torch.randn(8, 64)).square().sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_step_makes_is_refused_by_name(kind):
    saved = stepped(kind).state_dict()
    stepped(kind).load_state_dict(copy.deepcopy(saved))
    tensors = {k: v for k, v in saved["state"][0].items() if torch.is_tensor(v) and v.is_floating_point() and v.dim()}
    assert tensors
    for name in tensors:
        magnitude = name == "v" or name.endswith(("_max", "_scale"))
        for bad in (math.nan, math.inf, -math.inf, *([-1.0] if magnitude else [])):
            damaged = copy.deepcopy(saved)
            damaged["state"][0][name].view(-1)[-1] = bad
            optimizer = stepped(kind)
            before = copy.deepcopy(optimizer.state_dict())
            with pytest.raises(ValueError, match=rf"{name} in the saved state of .* damaged"):
                optimizer.load_state_dict(damaged)
            after = optimizer.state_dict()
            assert all(torch.equal(after["state"][0][k], before["state"][0][k]) for k in tensors)
