"""Delayed scaling as a layer sees it; the state by itself is tested in test_scaling.py."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_fp8 import convert_linears, fp8_autocast
from lightning_fp8.compute import FP8Linear, end_step, restore_linears
from lightning_fp8.compute.gemm import fp8_gemm
from lightning_fp8.compute.recipe import PRESETS
from lightning_fp8.compute.scaling import DelayedScales
from lightning_fp8.numerics import E4M3, E5M2, Quantized, quantize
from lightning_fp8.numerics.quantize import quantize_to

DELAYED = PRESETS["delayed"]
CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def linear(recipe="delayed", k=64, n=32, bias=False, seed=0, **options):
    torch.manual_seed(seed)
    layer = nn.Linear(k, n, bias=bias).bfloat16()
    convert_linears(layer, recipe, **options)
    return layer


def batch(*shape, seed=1, scale=1.0, requires_grad=True):
    x = (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()
    return x.requires_grad_(requires_grad)


def largest(x):
    return x.detach().abs().max().item()


def train(layer, x, dy):
    """Forward and backward; returns y, dx and dw of this pass alone."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.weight.grad


def same(a, b):
    """Every tensor of two states is the same bit for bit."""
    pairs = zip(
        (*a.running, a.history, a.scale, a.nonfinite), (*b.running, b.history, b.scale, b.nonfinite), strict=True
    )
    return all(torch.equal(p, q) for p, q in pairs)


def test_the_first_step_is_that_of_current_scaling_bit_for_bit():
    delayed, current = linear("delayed", bias=True), linear("tensorwise", bias=True)
    for seed in (1, 2):  # two micro-batches of different size: the second is calibrated by itself, too
        x, dy = batch(16, 64, seed=seed, scale=seed), batch(16, 32, seed=seed + 10, requires_grad=False)
        pairs = zip(train(delayed, x, dy), train(current, x, dy), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_later_steps_use_the_remembered_scale_and_saturate_what_grew():
    layer, growth = linear(), 64
    x, dy = batch(16, 64, requires_grad=False), batch(16, 32, seed=2, requires_grad=False)
    train(layer, x, dy)
    end_step(layer)
    y, dx, dw = train(layer, x * growth, dy * growth)
    remembered = {
        name: quantize(t.detach(), fmt).scale
        for name, t, fmt in (("x", x, E4M3), ("w", layer.weight, E4M3), ("dy", dy, E5M2))
    }
    x8 = Quantized(quantize_to(x * growth, E4M3, remembered["x"]), remembered["x"])
    w8 = Quantized(quantize_to(layer.weight.detach(), E4M3, remembered["w"]), remembered["w"])
    dy8 = Quantized(quantize_to(dy * growth, E5M2, remembered["dy"]), remembered["dy"])
    assert (x8.codes.float().abs() == E4M3.max).float().mean() > 0.5  # most of it saturates
    assert torch.equal(y, fp8_gemm(x8, w8.t(), torch.bfloat16, "emulated"))
    assert torch.equal(dx, fp8_gemm(dy8, w8, torch.bfloat16, "emulated"))
    assert torch.equal(dw, fp8_gemm(dy8.t(), x8, torch.bfloat16, "emulated"))
    # A step later the history knows, and nothing saturates.
    end_step(layer)
    now = layer.fp8_scales.scale[0]
    assert torch.equal(now, quantize(x * growth, E4M3).scale)


def test_a_margin_leaves_room_for_what_grows():
    layer, x = linear({"preset": "delayed", "margin": 3}), batch(16, 64, requires_grad=False)
    train(layer, x, batch(16, 32, seed=2, requires_grad=False))
    end_step(layer)
    codes = quantize_to(x * 8, E4M3, layer.fp8_scales.scale[0]).float()
    assert torch.equal(codes, quantize(x, E4M3).codes.float())


def test_a_tensor_used_again_a_step_later_is_cast_by_the_new_scale():
    """The cast of the step before is void, although the tensor is the same: its scale was another."""
    layer, x = linear({"preset": "delayed", "margin": 12}), batch(16, 64, requires_grad=False)
    layer(x)
    end_step(layer)
    again = layer(x)
    assert torch.equal(again, layer(x.clone()))
    assert not torch.equal(again, linear("tensorwise")(x))  # 12 octaves of room cost small values


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_a_non_finite_operand_is_not_hidden_and_does_not_stay(poison):
    layer, x, dy = linear(), batch(16, 64, requires_grad=False), batch(16, 32, seed=2, requires_grad=False)
    train(layer, x, dy)
    end_step(layer)
    before = copy.deepcopy(layer.fp8_scales)
    for bad_x, bad_dy, hit in ((True, False, (0, 2)), (False, True, (1, 2))):
        x2, dy2 = x.clone(), dy.clone()
        x2[3, 5], dy2[3, 5] = (poison if bad_x else 1.0), (poison if bad_dy else 1.0)
        results = train(layer, x2, dy2)
        for i, result in enumerate(results):
            assert result.isnan().all() if i in hit else result.isfinite().all()
    end_step(layer)
    assert layer.fp8_scales.nonfinite.tolist() == [1, 0, 1]
    assert torch.equal(layer.fp8_scales.scale, before.scale)
    assert all(result.isfinite().all() for result in train(layer, x, dy))


def test_an_operand_that_was_always_zero_is_cast_by_its_own_magnitude():
    layer, zeros = linear("delayed"), torch.zeros(16, 64, dtype=torch.bfloat16)
    for _ in range(3):
        layer(zeros.clone())
        end_step(layer)
    assert layer.fp8_scales.scale[0] == 0
    x = batch(16, 64)
    assert torch.equal(layer(x), linear("tensorwise")(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_leaves_the_scaling_state_as_it_is(reentrant):
    def run(checkpointed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32)).bfloat16()
        convert_linears(model, "delayed")
        for step in range(3):
            for micro_batch in range(2):
                x = batch(16, 64, seed=10 * step + micro_batch, scale=1.0 + step)
                y = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
                y.backward(batch(16, 32, seed=99, requires_grad=False))
            if step < 2:
                end_step(model)
        return [layer.fp8_scales for layer in model if isinstance(layer, FP8Linear)], model[0].weight.grad

    (plain, grad), (recomputed, grad2) = run(False), run(True)
    assert torch.equal(grad, grad2)
    assert all(cell >= 0 for state in plain for cell in state.running)  # a step is under way
    assert all(same(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_observes_nothing_and_uses_the_remembered_scale(context):
    layer, x = linear(), batch(16, 64, requires_grad=False)
    train(layer, x, batch(16, 32, seed=2, requires_grad=False))
    end_step(layer)
    before = copy.deepcopy(layer.fp8_scales)
    with context():
        y = layer(x * 4)
    assert same(layer.fp8_scales, before)
    saturated = Quantized(quantize_to(x * 4, E4M3, before.scale[0]), before.scale[0])
    w8 = quantize(layer.weight.detach(), E4M3)
    assert torch.equal(y, fp8_gemm(saturated, w8.t(), torch.bfloat16, "emulated"))


def test_a_layer_that_is_switched_off_observes_nothing():
    layer = linear()
    with fp8_autocast(enabled=False):
        layer(batch(16, 64)).sum().backward()
    assert same(layer.fp8_scales, DelayedScales.unknown(16, CPU))


def test_siblings_that_share_a_cast_each_observe():
    layers, h = [linear(seed=i) for i in range(3)], batch(16, 64, requires_grad=False)
    for layer in layers:
        layer(h)
    assert [layer.fp8_scales.running[0].item() for layer in layers] == [largest(h)] * 3


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("other", ["tensorwise", "delayed"])
def test_siblings_with_different_recipes_keep_to_their_own(other, order):
    layers = [linear(other), linear({"preset": "delayed", "margin": 12})]
    h = batch(16, 64, requires_grad=False)
    for layer in layers:
        layer(h.clone())
        end_step(layer)
    with torch.no_grad():
        alone = [layer(h.clone()) for layer in layers]
    assert not torch.equal(*alone)
    for i in order:
        assert torch.equal(layers[i](h), alone[i])
    assert all(layer.fp8_scales.running[0] == largest(h) for layer in layers if layer.fp8_scales)


def test_two_uses_of_a_layer_in_a_step_are_one_entry():
    layer = linear(n=64)
    x = batch(16, 64)
    h = layer(x)
    layer(h * 100).sum().backward()
    end_step(layer)
    assert layer.fp8_scales.history[0, :2].tolist() == [max(largest(x), largest(h * 100)), 0.0]


def test_recipes_may_differ_within_a_model():
    model = nn.Sequential(*[linear({"preset": "delayed", "history": h}, n=64) for h in (2, 5)], linear("rowwise"))
    for _ in range(3):
        model(batch(16, 64)).sum().backward()
        end_step(model)
    assert [layer.fp8_scales.history.shape[1] for layer in model[:2]] == [2, 5]
    assert (model[0].fp8_scales.history > 0).all()
    assert ((model[1].fp8_scales.history > 0).sum(1) == 3).all()
    assert model[2].fp8_scales is None


def test_the_state_is_neither_parameter_nor_buffer():
    layer, plain = linear(bias=True), nn.Linear(64, 32)
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert not list(layer.buffers())
    layer.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_goes_on_from_the_same_state_by_itself(clone):
    layer, x = linear(), batch(16, 64)
    layer(x)
    end_step(layer)
    layer(x)
    twin = clone(layer)
    assert same(twin.fp8_scales, layer.fp8_scales)
    before = copy.deepcopy(layer.fp8_scales)
    twin(x * 64)
    end_step(twin)
    assert same(layer.fp8_scales, before)
    assert twin.fp8_scales.history[0, 0] == largest(x * 64)


def test_a_layer_made_on_the_meta_device_starts_anew_where_it_arrives():
    with torch.device("meta"):
        layer = nn.Linear(64, 32)
    convert_linears(layer, {"preset": "delayed", "history": 4})
    assert layer.fp8_scales.scale.is_meta
    layer.to_empty(device="cpu")
    assert same(layer.fp8_scales, DelayedScales.unknown(4, CPU))


def test_a_change_of_dtype_keeps_the_state():
    layer = linear()
    layer(batch(16, 64))
    end_step(layer)
    before = copy.deepcopy(layer.fp8_scales)
    assert same(layer.float().fp8_scales, before)


def test_the_state_moves_to_the_device_of_the_layer():
    state = DelayedScales.unknown(4, CPU)
    moved = state.to(torch.device("meta"))
    assert all(t.is_meta for t in (*moved.running, moved.history, moved.scale, moved.nonfinite))
    layer = linear()
    layer.to("meta")
    assert layer.fp8_scales.scale.is_meta


def test_converting_again_keeps_the_state_of_the_same_recipe_only():
    layer, x = linear(), batch(16, 64)
    layer(x)
    end_step(layer)
    state = layer.fp8_scales
    convert_linears(layer, "delayed")
    assert layer.fp8_scales is state
    convert_linears(layer, {"preset": "delayed", "margin": 1})
    assert same(layer.fp8_scales, DelayedScales.unknown(16, CPU))
    convert_linears(layer, "tensorwise")
    assert layer.fp8_scales is None
    restore_linears(layer)
    assert not hasattr(layer, "fp8_scales")


def test_gradients_observed_are_those_that_arrive_at_the_output():
    layer, dy = linear(), batch(16, 32, seed=2, requires_grad=False)
    train(layer, batch(16, 64), dy)
    assert layer.fp8_scales.running[2] == largest(dy)
    assert layer.fp8_scales.running[1] == largest(layer.weight)


def test_a_gemm_in_high_precision_needs_no_magnitudes():
    recipe = dataclasses.replace(DELAYED, high_precision=("input_grad", "weight_grad"))
    layer = linear(recipe)
    layer(batch(16, 64)).sum().backward()
    assert layer.fp8_scales.running[2] == -1
