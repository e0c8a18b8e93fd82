"""Which layers become Transformer Engine's, what they keep, and what their state dict holds."""

import copy

import pytest
import torch
from te_models import TOKENS, Model, loss
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformer_engine_on_cpu import gemms

from lightning_fp8 import FP8Linear, convert_linears
from lightning_fp8.compute import (
    convert_to_transformer_engine,
    restore_from_transformer_engine,
)

NAMES = {"TransformerEngineLinear", "TransformerEngineRMSNorm", "TransformerEngineLayerNorm"}


def converted(model):
    return {name for name, layer in model.named_modules() if type(layer).__name__ in NAMES}


def test_layers_become_transformer_engines_and_keep_all_that_they_were(te):
    model = Model()
    model.body[1].weight.requires_grad_(False)
    calls = []
    model.body[3].register_forward_hook(lambda *_: calls.append("hook"))
    layers, parameters = list(model.modules()), dict(model.named_parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    report = convert_to_transformer_engine(model)
    assert report.converted == ["body.1", "body.3", "again"]
    assert converted(model) == {"body.0", "body.1", "body.2", "body.3", "again"}
    assert isinstance(model.body[1], te.Linear)
    assert isinstance(model.body[1], nn.Linear)
    assert isinstance(model.body[0], te.RMSNorm)
    assert all(a is b for a, b in zip(model.modules(), layers, strict=True))
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert model.again.weight is model.body[1].weight
    assert model.again.bias is None
    assert model.state_dict().keys() == state.keys()
    loss(model).backward()
    optimizer.step()
    assert calls == ["hook"]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}
    assert changed == {name for name in state if name.startswith(("embedding", "body", "tied", "lm_head"))} - {
        "body.1.weight"
    }


def test_the_report_is_that_of_the_other_backends(te):
    ours, theirs = convert_linears(Model(), backend="emulated"), convert_to_transformer_engine(Model())
    assert theirs == ours
    assert set(theirs.kept) == {"narrow", "tied", "lm_head"}


def test_norms_without_what_transformer_engine_needs_are_kept(te):
    class Own(nn.RMSNorm):
        pass

    kept = [nn.RMSNorm(32), nn.RMSNorm(32, eps=1e-6, elementwise_affine=False), nn.LayerNorm(32, bias=False)]
    kept += [nn.LayerNorm(32, elementwise_affine=False), Own(32, eps=1e-6)]
    model = nn.Sequential(*kept, nn.LayerNorm(32), nn.RMSNorm(32, eps=1e-6))
    types = [type(layer) for layer in kept]
    convert_to_transformer_engine(model, keep_high_precision=("6",))
    assert [type(layer) for layer in kept] == types
    assert converted(model) == {"5"}


def test_converting_twice_changes_nothing_but_what_is_asked_anew(te):
    model = Model()
    convert_to_transformer_engine(model, "delayed")
    loss(model, "delayed")
    scales = model.body[1].fp8_meta["scaling_fwd"]
    report = convert_to_transformer_engine(model, "delayed", cache_weights=True)
    assert report.converted == ["body.1", "body.3", "again"]
    assert model.body[1].fp8_meta["scaling_fwd"] is scales
    assert model.body[1].te_cache_weights
    convert_to_transformer_engine(model, {"preset": "delayed", "history": 4}, keep_high_precision=("body.3", "*.0"))
    assert type(model.body[3]) is nn.Linear
    assert type(model.body[0]) is nn.RMSNorm
    assert "scaling_fwd" not in model.body[1].fp8_meta
    loss(model, {"preset": "delayed", "history": 4})
    assert model.body[1].fp8_meta["scaling_fwd"].amax_history.shape == (4, 3)


def test_one_backends_layers_become_the_others_only_when_asked(te):
    model = Model()
    convert_linears(model, backend="emulated")
    assert convert_to_transformer_engine(model).converted == ["body.1", "body.3", "again"]
    assert not any(isinstance(layer, FP8Linear) for layer in model.modules())
    assert not hasattr(model.body[1], "fp8_recipe")
    assert "TransformerEngineLinear" in convert_linears(model, backend="emulated").kept["body.1"]


def test_restored_layers_are_what_they_were(te):
    model = Model()
    attributes = {name: set(layer.__dict__) for name, layer in model.named_modules()}
    types = [type(layer) for layer in model.modules()]
    y = model(TOKENS)
    convert_to_transformer_engine(model)
    loss(model).backward()
    assert restore_from_transformer_engine(model) == ["body.1", "body.3", "again"]
    assert [type(layer) for layer in model.modules()] == types
    assert {name: set(layer.__dict__) for name, layer in model.named_modules()} == attributes
    assert torch.equal(model(TOKENS), y)
    assert restore_from_transformer_engine(model) == []


def test_a_root_that_is_a_linear_layer_is_converted_in_place(te):
    layer = nn.Linear(32, 32)
    assert convert_to_transformer_engine(layer).converted == [""]
    assert isinstance(layer, te.Linear)


def test_copies_of_a_model_are_models_of_their_own(te):
    model = Model()
    convert_to_transformer_engine(model, "delayed")
    loss(model, "delayed")
    other = copy.deepcopy(model)
    assert isinstance(other.body[1], te.Linear)
    assert other.again.weight is other.body[1].weight is not model.body[1].weight
    before = model.body[1].scaling_tensors()["scale_fwd"].clone()
    other.body[1].scaling_tensors()["scale_fwd"].zero_()
    assert torch.equal(model.body[1].scaling_tensors()["scale_fwd"], before)


def test_mx_keeps_what_its_blocks_do_not_fit(te):
    report = convert_to_transformer_engine(nn.Sequential(nn.Linear(32, 48), nn.Linear(64, 32)), "mxfp8")
    assert report.converted == ["1"]
    assert report.kept == {"0": "sizes 32 x 48 are not multiples of 32"}


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_state_dicts_load_strictly_whoever_wrote_them(te, recipe):
    model, plain = Model(), Model()
    keys = list(plain.state_dict())
    convert_to_transformer_engine(model, recipe)
    loss(model, recipe).backward()
    own = model.state_dict()
    assert list(own) == keys
    model.load_state_dict(own)
    plain.load_state_dict(own)
    model.load_state_dict(plain.state_dict())
    stock = {**own, "body.1._extra_state": torch.tensor([1], dtype=torch.uint8), "body.0._extra_state": torch.empty(0)}
    kept = dict(stock)
    model.load_state_dict(stock)
    assert stock.keys() == kept.keys()  # the caller's dict is left alone
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**own, "body.1.other": torch.empty(0)})


def test_a_dict_that_transformer_engine_wrote_itself_loads(te):
    theirs = te.Linear(32, 32, device="cpu")
    recipe = te.get_default_recipe.__globals__["DelayedScaling"](amax_history_len=4)
    with te.autocast(enabled=True, recipe=recipe):
        theirs(torch.randn(16, 32))
    state = theirs.state_dict()
    assert state["_extra_state"].numel() > 0  # a pickle, which weights_only would refuse
    layer = nn.Linear(32, 32)
    convert_to_transformer_engine(layer, "delayed")
    layer.load_state_dict(state)
    assert torch.equal(layer.weight, theirs.weight)


def test_meta_layers_are_initialised_as_torchs_and_stay_the_same_parameters(te):
    with torch.device("meta"):
        layer = nn.Linear(32, 64)
    convert_to_transformer_engine(layer)
    layer.to_empty(device="cpu")
    parameters, plain = [layer.weight, layer.bias], nn.Linear(32, 64)
    for each in (layer, plain):
        torch.manual_seed(5)
        each.reset_parameters()
    assert layer.weight is parameters[0]
    assert layer.bias is parameters[1]
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.bias, plain.bias)


@pytest.fixture
def mesh(tmp_path):
    if torch.distributed.is_initialized():  # by a strategy of Lightning's, which keeps its group for the process
        torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("itself", [True, False])
def test_a_sharded_model_is_refused_with_the_place_to_convert_it(te, mesh, itself):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 10))
    fully_shard(model[0] if itself else model, mesh=mesh)
    with pytest.raises(
        ValueError, match=r"0 is sharded already.*convert_to_transformer_engine\(self, .* in configure_model"
    ):
        convert_to_transformer_engine(model)


def test_a_model_that_was_converted_before_it_was_sharded_is_left_as_it_is(te, mesh):
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 10))
    convert_to_transformer_engine(model)
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert convert_to_transformer_engine(model, cache_weights=True).converted == ["1"]
    assert isinstance(model[1], te.Linear)
    loss(model, tokens=torch.randn(16, 32)).backward()
    assert sum(gemm.fp8_operands == 2 for gemm in gemms) == 3
    assert model[1].weight.grad.full_tensor().any()
    for other in ({"recipe": "delayed"}, {"keep_high_precision": ("1",)}):
        with pytest.raises(ValueError, match="1 is sharded already"):
            convert_to_transformer_engine(model, **other)
