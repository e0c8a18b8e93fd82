import copy

import pytest
import torch
from torch import nn

from lightning_fp8 import convert_linears, fp8_state_dict, load_fp8_state_dict
from lightning_fp8.compute import convert_to_transformer_engine, transformer_engine_autocast

DELAYED = {"preset": "delayed", "history": 4}
TENSORS = {"scale_fwd": (3,), "amax_history_fwd": (4, 3), "scale_bwd": (2,), "amax_history_bwd": (4, 2)}


def build(recipe=DELAYED):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
    convert_to_transformer_engine(model, recipe)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model, optimizer, steps, recipe=DELAYED):
    for step in steps:
        torch.manual_seed(step)
        x = (1 + step) * torch.randn(16, 32)
        with transformer_engine_autocast(recipe):
            y = model(x)
        (y - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_state_is_plain_tensors_by_the_name_of_the_layer(te, tmp_path):
    model, optimizer = build()
    assert fp8_state_dict(model) == {}  # Transformer Engine makes it in the first forward
    train(model, optimizer, range(2))
    state = fp8_state_dict(model)
    assert state["version"] == 1
    assert list(state["layers"]) == ["0", "2"]
    for saved in state["layers"].values():
        recipe = saved.pop("recipe")
        assert recipe["history"] == 4
        assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == TENSORS
        assert all(type(tensor) is torch.Tensor for tensor in saved.values())
        assert saved["scale_fwd"][0] != 1
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True).keys() == state.keys()
    train(model, optimizer, range(2, 3))
    assert not torch.equal(fp8_state_dict(model)["layers"]["0"]["scale_fwd"], state["layers"]["0"]["scale_fwd"])


@pytest.mark.parametrize("forwarded", [False, True])
def test_training_resumes_bit_for_bit(te, forwarded):
    through, optimizer = build()
    train(through, optimizer, range(3))
    saved = copy.deepcopy((through.state_dict(), optimizer.state_dict(), fp8_state_dict(through)))
    train(through, optimizer, range(3, 6))
    wanted = fp8_state_dict(through)["layers"]  # now: Transformer Engine rolls the histories of all models together
    again, optimizer = build()
    if forwarded:  # then the state exists when it is loaded, else it waits
        with torch.no_grad(), transformer_engine_autocast(DELAYED):
            again(torch.randn(16, 32))
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert load_fp8_state_dict(again, saved[2]) == ""
    train(again, optimizer, range(3, 6))
    for own, other in zip(through.parameters(), again.parameters(), strict=True):
        assert torch.equal(own, other)
    state = fp8_state_dict(again)["layers"]
    assert all(torch.equal(state[name][key], wanted[name][key]) for name in wanted for key in TENSORS)


def test_the_scales_matter_for_that(te):
    through, optimizer = build()
    train(through, optimizer, range(3))
    saved = copy.deepcopy((through.state_dict(), optimizer.state_dict()))
    train(through, optimizer, range(3, 6))
    again, optimizer = build()
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(again, optimizer, range(3, 6))
    assert not torch.equal(through[0].weight, again[0].weight)


def test_a_state_that_still_waits_is_saved_again(te):
    model, optimizer = build()
    train(model, optimizer, range(2))
    state = fp8_state_dict(model)
    again, _ = build()
    load_fp8_state_dict(again, state)
    waiting = fp8_state_dict(again)
    assert waiting.keys() == state.keys()
    for name, saved in state["layers"].items():
        assert all(torch.equal(waiting["layers"][name][key], saved[key]) for key in TENSORS)
    with torch.inference_mode(), transformer_engine_autocast(DELAYED):  # a sanity check comes before training
        again(torch.randn(16, 32))
    assert torch.equal(again[0].scaling_tensors()["scale_fwd"], state["layers"]["0"]["scale_fwd"])


def test_what_does_not_fit_is_said_and_starts_anew(te):
    model, optimizer = build()
    train(model, optimizer, range(2))
    state = fp8_state_dict(model)
    other, _ = build({"preset": "delayed", "history": 8})
    assert "the recipe's history changed" in load_fp8_state_dict(other, state)
    assert "2 of 2 FP8 layers (0, 2) calibrate their scales anew" in load_fp8_state_dict(build()[0], {})
    native = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
    convert_linears(native, DELAYED, backend="emulated")
    message = "the checkpoint's scales are of another backend"
    assert message in load_fp8_state_dict(native, state)
    assert message in load_fp8_state_dict(build()[0], fp8_state_dict(native))
    current, optimizer = build("tensorwise")
    train(current, optimizer, range(1), "tensorwise")
    assert fp8_state_dict(current) == {}
    assert load_fp8_state_dict(current, state) == ""
