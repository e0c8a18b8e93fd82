"""What a converted layer computes: forward and backward, casts kept, evaluation."""

import copy

import pytest
import torch
from te_models import TOKENS, Model, loss
from torch import nn
from transformer_engine_on_cpu import casts, gemms

from lightning_fp8 import convert_linears, end_step, fp8_autocast
from lightning_fp8.compute import (
    convert_to_transformer_engine,
    transformer_engine_autocast,
)
from lightning_fp8.compute.autocast import frozen_scales
from lightning_fp8.compute.linear import switch


def test_norms_compute_as_torchs_do(te):
    x = torch.randn(2, 5, 32)
    for norm in (nn.LayerNorm(32, eps=0.1), nn.RMSNorm(32, eps=0.1)):
        nn.init.normal_(norm.weight)
        model = nn.Sequential(norm)
        results = []
        for convert in (False, True):
            if convert:
                convert_to_transformer_engine(model)
            y = model(x)
            y.square().sum().backward()
            results.append([y.detach(), *(p.grad for p in model.parameters())])
            model.zero_grad()
        for plain, other in zip(*results, strict=True):
            torch.testing.assert_close(other, plain)


def test_casts_and_gemms_are_those_of_our_recipe(te):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 48, bias=False)).bfloat16()
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    convert_linears(ours, backend="emulated")
    convert_to_transformer_engine(theirs)
    x = torch.randn(32, 32).bfloat16()
    ours(x).float().square().sum().backward()
    loss(theirs, tokens=x).mul(32 * 48).backward()
    plain = model(x).float().square().sum()
    plain.backward()
    for own, other, exact in zip(ours.parameters(), theirs.parameters(), model.parameters(), strict=True):
        off = (own.grad - exact.grad).float().norm()
        assert (other.grad - own.grad).float().norm() < 0.1 * off  # the same casts; sums round differently


@pytest.mark.parametrize("tokens", [(3, 7), (5,), (), (2, 3, 4), (2, 16), (2, 2, 8)])
def test_any_number_of_tokens_goes(te, tokens):
    torch.manual_seed(0)
    layer = nn.Linear(32, 48)
    convert_to_transformer_engine(layer)
    x = torch.randn(*tokens, 32, requires_grad=True)
    flat = x.detach().reshape(-1, 32)
    missing = -len(flat) % 16
    padded = torch.cat([flat, torch.zeros(missing, 32)]).requires_grad_()
    with transformer_engine_autocast():
        y, wanted = layer(x), layer(padded)
    dx, dw = torch.autograd.grad(y.sum(), (x, layer.weight))
    wanted_dx, wanted_dw = torch.autograd.grad(wanted[: len(flat)].sum(), (padded, layer.weight))
    assert y.shape == (*tokens, 48)
    assert dx.shape == x.shape
    assert torch.equal(y.reshape(-1, 48), wanted[: len(flat)])
    assert torch.equal(dx.reshape(-1, 32), wanted_dx[: len(flat)])
    assert torch.equal(dw, wanted_dw)


def test_switched_off_a_layer_is_the_torch_layer_it_also_is(te):
    layer = nn.Linear(32, 48)
    x = torch.randn(4, 32)
    y = layer(x)
    convert_to_transformer_engine(layer, "delayed")
    with transformer_engine_autocast("delayed", enabled=False), fp8_autocast(enabled=False):
        assert torch.equal(layer(x), y)
    assert not gemms
    with transformer_engine_autocast("delayed"):
        layer(x)
    assert gemms[0].fp8_operands == 2


def test_switching_the_layers_themselves_does_the_same(te):
    model = Model()
    y = model(TOKENS)
    convert_to_transformer_engine(model, keep_high_precision=("*head*", "body.0", "body.2"))
    switch(model, on=False)
    with transformer_engine_autocast():
        assert torch.equal(model(TOKENS), y)
        switch(model, on=True)
        assert not torch.equal(model(TOKENS), y)


def weight_casts(layer):
    return casts.count(tuple(layer.weight.shape))


@pytest.mark.parametrize("cached", [True, False])
def test_weights_are_cast_once_an_accumulation_window_where_asked(te, cached):
    layer = nn.Linear(32, 48)
    convert_to_transformer_engine(layer, cache_weights=cached)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    windows = 3
    for window in range(windows):
        for micro_batch in range(4):
            x = torch.full((16, 32), float(window + micro_batch))
            loss(layer, tokens=x).backward()
        optimizer.step()
    assert weight_casts(layer) == (windows if cached else 4 * windows)


def test_a_cached_cast_ends_with_the_step_or_the_weight_but_not_with_evaluation(te):
    layer = nn.Linear(32, 48, bias=False)
    convert_to_transformer_engine(layer, cache_weights=True)
    x = torch.randn(16, 32)
    loss(layer, tokens=x)
    with torch.no_grad(), transformer_engine_autocast():
        layer(x)
    before = weight_casts(layer)
    loss(layer, tokens=x)
    assert weight_casts(layer) == before
    layer.weight.data.zero_()  # counts no version
    end_step(layer)
    with transformer_engine_autocast():
        assert not layer(x).any()
    assert weight_casts(layer) == before + 1
    with torch.no_grad():
        layer.weight.add_(1)
    loss(layer, tokens=x)
    assert weight_casts(layer) == before + 2


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode, frozen_scales])
def test_evaluation_leaves_the_histories_as_they_are(te, off):
    layer = nn.Linear(32, 48)
    convert_to_transformer_engine(layer, "delayed")
    x = torch.randn(16, 32)

    def evaluate():
        with off(), transformer_engine_autocast("delayed"):
            return layer(1000 * x)

    evaluate()  # before any training, as a sanity check does
    state = layer.scaling_tensors()
    assert state["scale_fwd"].tolist() == [1, 1, 1]
    assert not state["amax_history_fwd"].any()
    assert not state["scale_fwd"].is_inference()
    loss(layer, "delayed", x).backward()
    trained = {name: tensor.clone() for name, tensor in layer.scaling_tensors().items()}
    assert trained["amax_history_fwd"][-1, 0] == x.abs().max()
    evaluate()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in layer.scaling_tensors().items())


def test_evaluation_within_a_training_step_does_not_hide_what_the_step_saw(te):
    layer = nn.Linear(32, 48)
    convert_to_transformer_engine(layer, "delayed")
    x = torch.randn(16, 32)
    with transformer_engine_autocast("delayed"):
        layer(x)
        with torch.no_grad():
            layer(1000 * x)
    assert layer.scaling_tensors()["amax_history_fwd"][-1, 0] == x.abs().max()
