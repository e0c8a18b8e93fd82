"""The scaling state: what is saved, under which names, and what loads into what."""

import copy

import pytest
import torch
from lightning.fabric.wrappers import _FabricModule
from lightning.pytorch.strategies import SingleDeviceStrategy
from states import differences
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_fp8 import convert_linears, end_step, fp8_state_dict, load_fp8_state_dict
from lightning_fp8.compute import restore_linears
from lightning_fp8.compute.recipe import Recipe

DELAYED = Recipe(scaling="delayed", history=4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.down(self.up(x).relu())


def net(recipe=DELAYED, seed=0, **options):
    torch.manual_seed(seed)
    model = Net()
    convert_linears(model, recipe, **options)
    return model


def train(model, steps=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        model((step + 1) * torch.randn(16, 32, generator=generator)).square().mean().backward()
        end_step(model)
        model.zero_grad()
    return model


def scales(model):
    found = [layer.fp8_scales for layer in (model.up, model.down)]
    return [tensor for s in found for tensor in (torch.stack(s.running), s.history, s.scale, s.nonfinite)]


def test_a_state_survives_a_file_that_holds_tensors_only(tmp_path):
    source, target = train(net()), net(seed=1)
    torch.save(fp8_state_dict(source), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["version"] == 1
    assert set(state["layers"]) == {"up", "down"}
    assert load_fp8_state_dict(target, state) == ""
    assert all(torch.equal(a, b) for a, b in zip(scales(source), scales(target), strict=True))
    assert all((s.scale > 0).all() for s in (target.up.fp8_scales, target.down.fp8_scales))


def test_a_state_between_micro_batches_is_whole():
    source, target = train(net()), net()
    for model in (source, target):
        model(torch.ones(16, 32)).sum().backward()  # not yet the end of a step
    load_fp8_state_dict(target, fp8_state_dict(source))
    for model in (source, target):
        end_step(model)
    assert all(torch.equal(a, b) for a, b in zip(scales(source), scales(target), strict=True))


def test_saved_and_loaded_states_are_copies():
    source, target = train(net()), net()
    state = fp8_state_dict(source)
    load_fp8_state_dict(target, state)
    before, saved = [tensor.clone() for tensor in scales(target)], copy.deepcopy(state)
    train(source, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(before, scales(target), strict=True))
    assert differences(state, saved) == []
    train(target, seed=2)
    assert differences(state, saved) == []


def compiled(model):
    return torch.compile(model, backend="eager")


def in_parallel(model):
    return nn.DataParallel(model)  # its attribute is called "module", as that of DistributedDataParallel


def in_fabric(model):
    return _FabricModule(model, SingleDeviceStrategy())


def recomputing(model):
    model.up, model.down = checkpoint_wrapper(model.up), checkpoint_wrapper(model.down)
    return model


@pytest.mark.parametrize("wrap", [compiled, in_parallel, in_fabric, recomputing])
def test_names_are_those_of_the_bare_model(wrap):
    source, target = train(net()), wrap(net(seed=1))
    assert set(fp8_state_dict(target)["layers"]) == {"up", "down"}
    assert load_fp8_state_dict(target, fp8_state_dict(source)) == ""


def test_current_scaling_has_no_state():
    assert fp8_state_dict(train(net("tensorwise"))) == {}
    assert load_fp8_state_dict(net("tensorwise"), fp8_state_dict(train(net()))) == ""
    model = train(net())
    restore_linears(model)
    assert fp8_state_dict(model) == {}


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (dict, "2 of 2 FP8 layers (up, down) calibrate their scales anew: the checkpoint has no scales of them."),
        (
            lambda: fp8_state_dict(train(net(keep_high_precision=("down",)))),
            "1 of 2 FP8 layers (down) calibrate their scales anew: the checkpoint has no scales of them.",
        ),
        (
            lambda: fp8_state_dict(train(net(Recipe(scaling="delayed", history=8, amax="most_recent")))),
            "2 of 2 FP8 layers (up, down) calibrate their scales anew: the recipe's history, amax changed.",
        ),
    ],
    ids=["bf16 run", "other layers", "other recipe"],
)
def test_what_a_checkpoint_lacks_is_calibrated_anew(state, told):
    model = net()
    assert load_fp8_state_dict(model, state()) == told
    fresh = net()
    missing = [name for name in ("up", "down") if name in told.split("(")[1].split(")")[0]]
    for name in missing:
        assert not getattr(model, name).fp8_scales.scale.any()  # unknown, not 1
    losses = [m(torch.ones(16, 32)).sum().item() for m in (model, fresh)]
    assert losses[0] == losses[1] or len(missing) == 1


def test_recipes_that_scale_alike_share_a_state():
    other = Recipe(scaling="delayed", history=4, high_precision=("weight_grad",), fast_accumulation=())
    assert load_fp8_state_dict(net(other), fp8_state_dict(train(net()))) == ""


def test_more_layers_than_the_model_has_are_no_harm():
    assert load_fp8_state_dict(net(keep_high_precision=("down",)), fp8_state_dict(train(net()))) == ""


def test_a_later_version_is_refused():
    with pytest.raises(ValueError, match=r"version 2, and this lightning-fp8 knows 1: upgrade.*or leave"):
        load_fp8_state_dict(net(), {**fp8_state_dict(train(net())), "version": 2})


def test_the_model_s_own_state_dict_is_that_of_plain_linears():
    model, plain = train(net()), Net()
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict(), strict=True)
