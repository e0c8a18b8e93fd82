import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_fp8 import convert_linears, fp8_autocast
from lightning_fp8.compute import PRESETS
from lightning_fp8.compute.gemm import record_gemms
from lightning_fp8.numerics import E4M3, dequantize, quantize

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2


def linear(k=64, n=32, bias=True, dtype=torch.bfloat16, recipe="tensorwise", seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(k, n, bias=bias).to(dtype)
    convert_linears(layer, recipe)
    return layer


def batch(*shape, dtype=torch.bfloat16, seed=1, requires_grad=True):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.requires_grad_(requires_grad)


def bound(exact, absolute, k, dtype):
    """fp32 accumulation over k, then at most three roundings to a dtype (GEMM, scale, output)."""
    return k * 2**-24 * absolute + 1.5 * torch.finfo(dtype).eps * exact.abs() + 1e-30


def cast(t, operand, along):
    """What a GEMM that sums over dimension `along` of the matrix `t` should see, in fp64."""
    t = t.detach().reshape(-1, t.shape[-1])
    options = {"tile": operand.tile(along), "power_of_two": operand.power_of_two}
    return dequantize(quantize(t, operand.number_format, **options)).double()


@pytest.mark.parametrize("shape", [(16, 64), (2, 8, 64), (2, 3, 5, 64), (1, 64), (64,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("preset", [name for name in PRESETS if not PRESETS[name].high_precision])
def test_three_gemms_are_products_of_the_cast_operands(shape, dtype, preset):
    layer, x = linear(dtype=dtype, recipe=preset), batch(*shape, dtype=dtype)
    y = layer(x)
    dy = batch(*y.shape, dtype=dtype, seed=2, requires_grad=False)
    y.backward(dy)
    r, w = PRESETS[preset], layer.weight
    for got, a, b, extra in (
        (y, cast(x, r.input, 1), cast(w, r.weight, 1).t(), layer.bias.detach().double()),
        (x.grad, cast(dy, r.grad_output, 1), cast(w, r.weight, 0), 0.0),
        (w.grad, cast(dy, r.grad_output, 0).t(), cast(x, r.input, 0), 0.0),
    ):
        exact = a @ b + extra
        error = (got.detach().double().reshape(exact.shape) - exact).abs()
        assert (error <= bound(exact, a.abs() @ b.abs() + abs(extra), a.shape[1], torch.bfloat16)).all()
    torch.testing.assert_close(layer.bias.grad, dy.reshape(-1, 32).float().sum(0).to(dtype))
    assert y.dtype is x.grad.dtype is layer.weight.grad.dtype is dtype


@pytest.mark.parametrize("preset", PRESETS)
def test_fp8_is_really_used(preset):
    layer, x, recipe = linear(recipe=preset), batch(16, 64), PRESETS[preset]
    with record_gemms() as gemms:
        layer(x).sum().backward()
    dy = {"e4m3": E4, "e5m2": E5}[recipe.grad_output.format]
    expected = {
        "forward": (16, 64, 32, E4, E4, "emulated"),  # y = x w^T
        "input_grad": (16, 32, 64, dy, E4, "emulated"),  # dx = dy w
        "weight_grad": (32, 16, 64, dy, E4, "emulated"),  # dw = dy^T x
    }
    assert gemms == [record for gemm, record in expected.items() if recipe.uses_fp8(gemm)]


@pytest.mark.parametrize("gemm", ["forward", "input_grad", "weight_grad"])
def test_a_gemm_can_stay_in_high_precision(gemm):
    layer, x = linear(recipe={"high_precision": [gemm]}, bias=False), batch(16, 64)
    plain, x2 = nn.Linear(64, 32, bias=False).bfloat16(), batch(16, 64)
    plain.load_state_dict(layer.state_dict())
    with record_gemms() as gemms:
        y = layer(x)
        y.backward(torch.ones_like(y))
    y2 = plain(x2)
    y2.backward(torch.ones_like(y2))
    same = {
        "forward": torch.equal(y, y2),
        "input_grad": torch.equal(x.grad, x2.grad),
        "weight_grad": torch.equal(layer.weight.grad, plain.weight.grad),
    }
    assert len(gemms) == 2
    assert same == {name: name == gemm for name in same}


@pytest.mark.parametrize(
    ("x_grad", "w_grad", "gemms"), [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)]
)
def test_no_gemm_is_wasted_on_a_gradient_nobody_wants(x_grad, w_grad, gemms):
    layer, x = linear(bias=False), batch(16, 64, requires_grad=x_grad)
    layer.weight.requires_grad_(w_grad)
    with record_gemms() as records:
        y = layer(x)
        if y.requires_grad:
            y.sum().backward()
    assert len(records) == gemms


def saved_tensors(run):
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return saved


@pytest.mark.parametrize(
    ("preset", "dtype", "scales"),
    [
        ("tensorwise", E4, 1),
        ("rowwise", E4, 64),
        ("rowwise_gw_hp", torch.bfloat16, 0),
        ("blockwise", E4, 64),
        ("mxfp8", E4, 4 * 64),
    ],
)
def test_autograd_keeps_one_byte_an_element_of_the_input(preset, dtype, scales):
    """Or, where the weight gradient stays in high precision, the input itself."""
    layer, x = linear(bias=False, recipe=preset), batch(128, 64)
    saved = [t for t in saved_tensors(lambda: layer(x)) if t.data_ptr() != layer.weight.data_ptr()]
    activations = [t for t in saved if t.dtype is not torch.float32]
    assert [(t.dtype, t.numel()) for t in activations] == [(dtype, 128 * 64)]
    assert sum(t.numel() for t in saved if t.dtype is torch.float32) == scales


def test_square_tiles_serve_both_layouts_with_one_copy():
    recipe = {"preset": "blockwise", "high_precision": ["weight_grad"]}
    layer, x = linear(k=160, n=256, bias=False, recipe=recipe), batch(4, 160)
    forward, backward = (cast(layer.weight, layer.fp8_recipe.weight, along) for along in (1, 0))
    assert torch.equal(forward, backward)
    assert layer(x).shape == (4, 256)


def test_a_scale_a_row_keeps_an_outlier_in_its_row():
    x = batch(16, 64, requires_grad=False)
    x[3, 5] = 1e8
    others = [i for i in range(16) if i != 3]
    errors = {}
    for preset in ("tensorwise", "rowwise"):
        layer = linear(bias=False, recipe=preset)
        exact = x[others].double() @ layer.weight.detach().double().t()
        errors[preset] = (layer(x)[others].double() - exact).norm() / exact.norm()
    assert errors["tensorwise"] == 1  # all else underflows
    assert errors["rowwise"] < 2 * 2**-4  # each operand is within 2^-4 of itself


def test_siblings_share_one_copy_of_their_input():
    q, k, v = linear(seed=1), linear(seed=2), linear(seed=3)
    x = batch(16, 64)
    h = x * 1
    codes = [t for t in saved_tensors(lambda: [layer(h) for layer in (q, k, v)]) if t.dtype is E4]
    assert len(codes) == 3
    assert len({t.data_ptr() for t in codes}) == 1


def test_runs_in_inference_mode():
    layer, x = linear(), batch(16, 64, requires_grad=False)
    expected = layer(x)
    with torch.inference_mode():
        h = x * 1
        assert torch.equal(layer(h), expected)
        assert torch.equal(layer(h), expected)


def test_a_changed_tensor_is_cast_again():
    layer, x = linear(bias=False), batch(16, 64, requires_grad=False)
    before = layer(x)
    x.mul_(-2.0)  # a power of two: only the scale changes, so the result is exactly twice
    assert torch.equal(layer(x), -2 * before)


def test_leaves_the_state_dict_and_the_parameters_alone():
    plain = nn.Linear(64, 32)
    weight, keys, parameters = plain.weight, list(plain.state_dict()), list(plain.parameters())
    convert_linears(plain)
    assert plain.weight is weight
    assert list(plain.state_dict()) == keys
    assert all(a is b for a, b in zip(plain.parameters(), parameters, strict=True))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_survives_copying(clone):
    layer, x = linear(), batch(16, 64)
    assert torch.equal(clone(layer)(x), layer(x))


def test_autocast_decides_the_output_dtype():
    layer, x = linear(dtype=torch.float32), batch(16, 64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), record_gemms() as gemms:
        y = layer(x)
    y.sum().backward()
    assert len(gemms) == 1
    assert y.dtype is torch.bfloat16
    assert x.grad.dtype is layer.weight.grad.dtype is torch.float32


def test_no_tokens_give_no_output_and_zero_gradients():
    layer, x = linear(), batch(0, 64)
    y = layer(x)
    assert y.shape == (0, 32)
    y.sum().backward()
    assert x.grad.shape == (0, 64)
    assert not layer.weight.grad.any()


def test_a_non_contiguous_input_is_read_in_its_own_order():
    layer, x = linear(), batch(64, 16)
    assert torch.equal(layer(x.t()), layer(x.t().contiguous()))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_input_is_not_hidden(poison):
    layer, x = linear(), batch(16, 64, requires_grad=False)
    x[3, 5] = poison
    assert not layer(x).isfinite().any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_bit(reentrant):
    layer = linear()
    grads = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        layer.zero_grad()
        x = batch(16, 64)
        run(x).sum().backward()
        grads.append((x.grad.clone(), layer.weight.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_functional_call_uses_the_given_weight():
    layer, x = linear(bias=False), batch(16, 64)
    doubled = torch.func.functional_call(layer, {"weight": layer.weight * 2}, (x,))
    torch.testing.assert_close(doubled, layer(x) * 2)  # a power of two changes scales only


def test_the_switch_nests_and_is_restored_by_exceptions():
    layer, x = linear(), batch(16, 64)
    fp8, plain = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
    assert not torch.equal(fp8, plain)
    with fp8_autocast(enabled=False):
        assert torch.equal(layer(x), plain)
        with fp8_autocast():
            assert torch.equal(layer(x), fp8)
        assert torch.equal(layer(x), plain)
    with pytest.raises(RuntimeError, match="stop"), fp8_autocast(enabled=False):
        raise RuntimeError("stop")
    assert torch.equal(layer(x), fp8)


def test_each_thread_has_its_own_switch():
    layer, x = linear(), batch(16, 64)
    fp8, results = layer(x), []
    with fp8_autocast(enabled=False):
        thread = threading.Thread(target=lambda: results.append(layer(x)))
        thread.start()
        thread.join()
    assert torch.equal(results[0], fp8)


def test_shows_its_formats():
    assert "fp8=e4m3/e4m3/e5m2 by tensor, current scaling, backend=emulated" in repr(linear())


def test_power_of_two_scales_reach_every_operand():
    layer = linear(recipe={name: {"power_of_two": True} for name in ("input", "weight", "grad_output")}, bias=False)
    x = batch(16, 64, requires_grad=False)
    x8, w8 = (quantize(t.detach(), E4M3, power_of_two=True) for t in (x, layer.weight))
    exact = dequantize(x8, torch.float64) @ dequantize(w8, torch.float64).t()
    # With exact scaling, the result is the GEMM's own, rounded to bf16 once or twice.
    torch.testing.assert_close(layer(x).double(), exact, rtol=2**-7, atol=1e-6)
