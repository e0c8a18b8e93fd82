"""Native FP8 GEMMs on a device that has them, against emulated ones on the same operands; `pytest -m gpu`."""

import pytest
import torch
from torch import nn

from lightning_fp8 import convert_linears, hardware
from lightning_fp8.compute import PRESETS, end_step
from lightning_fp8.compute.gemm import record_gemms

pytestmark = pytest.mark.gpu
K, N = 256, 384


@pytest.fixture(params=PRESETS)
def preset(request):
    recipe = PRESETS[request.param]
    problem = hardware.why_not_native({o.granularity for o in (recipe.input, recipe.weight, recipe.grad_output)})
    if problem:
        pytest.skip(problem)
    return request.param


def layer_of(preset, backend, bias=True, k=K, n=N):
    torch.manual_seed(0)
    layer = nn.Linear(k, n, bias=bias).to("cuda", torch.bfloat16)
    convert_linears(layer, preset, backend=backend)
    return layer


def tensor(tokens, size, kind, seed):
    x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed))
    if kind == "outliers":
        x[::7, ::31] *= 1e4
    elif kind == "zeros":
        x.zero_()
    elif kind == "zero rows":
        x[::2] = 0
    elif kind == "subnormal":
        x *= 1e-39
    elif kind == "many octaves":
        x *= torch.logspace(-20, 20, size, base=2.0)
    return x.to("cuda", torch.bfloat16)


def step(layer, x, dy):
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.weight.grad.clone()


def absolute_products(layer, x, dy):
    """Sums of the magnitudes of what each GEMM adds up, in fp64: errors of accumulation are relative to these."""
    x, dy, w = x.double().abs(), dy.double().abs(), layer.weight.detach().double().abs()
    return x @ w.t() + (0 if layer.bias is None else layer.bias.detach().double().abs()), dy @ w, dy.t() @ x


@pytest.mark.parametrize("kind", ["normal", "outliers", "zeros", "zero rows", "subnormal", "many octaves"])
@pytest.mark.parametrize("tokens", [128, 50, 1])
def test_native_and_emulated_layers_agree(preset, tokens, kind, monkeypatch):
    monkeypatch.setattr(hardware, "emulation_dtype", lambda device_type: torch.float32)
    native, emulated = layer_of(preset, "native"), layer_of(preset, "emulated")
    x, dy = tensor(tokens, K, kind, 1), tensor(tokens, N, kind, 2)
    with record_gemms() as gemms:
        results = step(native, x, dy)
    assert {gemm.backend for gemm in gemms} == {"native"}
    assert len(gemms) == 3 - len(PRESETS[preset].high_precision)
    expected = step(emulated, x, dy)
    sums = absolute_products(native, x, dy)
    for got, want, absolute, terms in zip(results, expected, sums, (K, N, tokens), strict=True):
        # Hopper keeps 14 bits or so of a sum of 32 products; casts may widen a magnitude by 2^-2; both round to bf16.
        accumulation = (terms // 32 + 1) * 2**-13 * 1.25 * absolute
        bound = accumulation + 2 * 2**-8 * want.double().abs() + 2**-100
        assert got.isfinite().all()
        assert ((got.double() - want.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_every_dtype_comes_out(preset, dtype, bias):
    layer = layer_of(preset, "native", bias).to(dtype)
    x = tensor(50, K, "normal", 1).to(dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype is x.grad.dtype is layer.weight.grad.dtype is dtype
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    assert (y - plain).double().norm() < 0.1 * plain.double().norm()


@pytest.mark.parametrize(("k", "n"), [(16, 16), (192, 48), (48, 400), (1040, 80)])
def test_sizes_that_are_no_multiples_of_a_block(preset, k, n):
    native, emulated = (layer_of(preset, backend, k=k, n=n) for backend in ("native", "emulated"))
    x, dy = tensor(33, k, "normal", 1), tensor(33, n, "normal", 2)
    for got, want in zip(step(native, x, dy), step(emulated, x, dy), strict=True):
        assert (got - want).double().norm() < 0.02 * want.double().norm()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_input_is_not_hidden(preset, poison):
    layer, x = layer_of(preset, "native"), tensor(64, K, "normal", 1)
    x[3, 5] = poison
    with torch.no_grad():
        assert not layer(x)[3].isfinite().any()


def test_no_tokens(preset):
    layer = layer_of(preset, "native")
    x = torch.empty(0, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, N)
    assert not layer.weight.grad.any()


def test_no_step_waits_for_the_device(preset):
    layer = layer_of(preset, "auto")
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    x, dy = tensor(64, K, "normal", 1), tensor(64, N, "normal", 2)

    def train():
        x.grad = None
        layer(x.detach().requires_grad_()).backward(dy)
        optimizer.step()
        end_step(layer)
        optimizer.zero_grad()

    train()  # libraries initialise themselves
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            train()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_native_layers_compile_to_one_graph(preset):
    torch._dynamo.reset()
    layer, eager = layer_of(preset, "native"), layer_of(preset, "native")
    compiled = torch.compile(layer, fullgraph=True)
    x, dy = tensor(64, K, "normal", 1), tensor(64, N, "normal", 2)
    x_compiled, x_eager = (x.detach().clone().requires_grad_() for _ in range(2))
    compiled(x_compiled).backward(dy)
    eager(x_eager).backward(dy)
    for got, want in ((x_compiled.grad, x_eager.grad), (layer.weight.grad, eager.weight.grad)):
        assert (got - want).double().norm() < 0.02 * want.double().norm()
