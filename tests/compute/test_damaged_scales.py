"""Scales that changed since they were saved are refused by name, when they are loaded."""

import math

import pytest
import torch
from torch import nn

from lightning_fp8 import Recipe, convert_linears, fp8_state_dict, load_fp8_state_dict
from lightning_fp8.compute.linear import end_step


def trained(recipe):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    convert_linears(model, recipe)
    for step in range(3):
        model(torch.randn(16, 32) * (step + 1)).square().sum().backward()
        end_step(model)
    return model


@pytest.mark.parametrize(
    "recipe", [Recipe(scaling="delayed", history=4), Recipe(scaling="delayed", amax="most_recent", margin=2)]
)
@pytest.mark.parametrize(("role", "name"), enumerate(("input", "weight", "grad_output")))
def test_damage_is_refused_by_name(recipe, role, name):
    state = fp8_state_dict(trained(recipe))
    assert load_fp8_state_dict(trained(recipe), state) == ""
    good = state["layers"]["1"]["scale"][role].item()
    for bad in (math.nan, math.inf, -good, good * 64, good / 64, 0.0):
        state["layers"]["1"]["scale"][role] = bad
        with pytest.raises(ValueError, match=f"FP8 scale of the {name} of '1' is .* damaged"):
            load_fp8_state_dict(trained(recipe), state)
    state["layers"]["1"]["scale"][role] = good
    assert load_fp8_state_dict(trained(recipe), state) == ""
    for bad in (math.nan, math.inf, -1.0):
        state["layers"]["1"]["history"][role, -1] = bad
        with pytest.raises(ValueError, match=f"FP8 scale of the {name} of '1' .* damaged"):
            load_fp8_state_dict(trained(recipe), state)
        state["layers"]["1"]["history"][role, -1] = 0.0
