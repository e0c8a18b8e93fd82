"""The layer as a whole: its error against fp64, what it saves, and weights that are shared, used twice or frozen."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_fp8 import convert_linears, hardware
from lightning_fp8.compute import PRESETS, end_step
from lightning_fp8.compute.gemm import record_gemms


def tensor(*shape, seed=1, spread=0.0):
    """Normal values; with a spread, of sizes that differ from column to column by so many octaves."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.logspace(-spread / 2, spread / 2, shape[-1], base=2.0)


def linear(k=64, n=64, recipe="tensorwise", bias=False, dtype=torch.bfloat16, seed=0, **options):
    torch.manual_seed(seed)
    layer = nn.Linear(k, n, bias=bias).to(dtype)
    convert_linears(layer, recipe, **options)
    return layer


def cast_error(x, operand, along):
    """The most that casting can change each element of a matrix: half a step of the format, at the scale of its tile.

    Computed from the format and the definition of the granularity alone, tile by tile, in fp64.
    """
    fmt, tile = operand.number_format, operand.tile(along) or (None, None)
    rows, columns = (side or size for side, size in zip(tile, x.shape, strict=True))
    error = torch.empty_like(x)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            part = x[i : i + rows, j : j + columns].abs()
            scale = part.max() / fmt.max * (2 if operand.power_of_two else 1)  # rounded up to a power of two
            relative = part * 2.0 ** -(fmt.mantissa_bits + 1)
            error[i : i + rows, j : j + columns] = torch.maximum(relative, scale * fmt.min_subnormal / 2)
    return error * (1 + 2**-20)  # the division by the scale rounds, in fp32


def product_error(a, b, error_a, error_b, dtype):
    """Of a product with such operands: the casts', fp32 accumulation, and rounding to `dtype`."""
    exact, absolute = a @ b, a.abs() @ b.abs()
    widest = (a.abs() + error_a) @ (b.abs() + error_b)
    return widest - absolute + (a.shape[1] + 4) * 2**-24 * widest + torch.finfo(dtype).eps * exact.abs()


@pytest.mark.parametrize("spread", [0.0, 12.0])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_layer_is_an_fp64_layer_within_what_the_formats_allow(preset, spread, monkeypatch):
    monkeypatch.setattr(hardware, "emulation_dtype", lambda device_type: torch.float32)
    recipe = PRESETS[preset]
    layer = linear(192, 160, recipe, dtype=torch.float32)
    x, dy = tensor(50, 192, spread=spread).requires_grad_(), tensor(50, 160, seed=2, spread=spread)
    if recipe.scaling == "delayed":  # the second step, by a remembered scale
        layer(x.detach().clone().requires_grad_()).backward(dy)
        layer.zero_grad()
        end_step(layer)
        assert (layer.fp8_scales.scale > 0).all()
    layer(x).backward(dy)
    got = {"forward": layer(x).detach(), "input_grad": x.grad, "weight_grad": layer.weight.grad}
    x, w, dy = x.detach().double(), layer.weight.detach().double(), dy.double()
    products = {
        "forward": (x, w.t(), cast_error(x, recipe.input, 1), cast_error(w, recipe.weight, 1).t()),
        "input_grad": (dy, w, cast_error(dy, recipe.grad_output, 1), cast_error(w, recipe.weight, 0)),
        "weight_grad": (dy.t(), x, cast_error(dy, recipe.grad_output, 0).t(), cast_error(x, recipe.input, 0)),
    }
    for gemm, (a, b, error_a, error_b) in products.items():
        if not recipe.uses_fp8(gemm):
            error_a, error_b = torch.zeros_like(a), torch.zeros_like(b)
        allowed = product_error(a, b, error_a, error_b, torch.float32)
        error = (got[gemm].double() - a @ b).abs()
        assert (error <= allowed).all()
        if recipe.uses_fp8(gemm) and not spread:  # the bound says something, and so do the figures
            assert allowed.mean() < 0.25 * (a.abs() @ b.abs()).mean()
            assert error.mean() > 1e-3 * (a @ b).abs().mean()


class Attention(nn.Module):
    def __init__(self, width=64, heads=4):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, width=64, hidden=176):
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(64) for _ in range(2))
        self.attention, self.mlp = Attention(), SwiGLU()

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


def storage_bytes(tensors, but):
    """Of distinct storages; those of the parameters, which are kept anyhow, do not count."""
    own = {p.untyped_storage().data_ptr() for p in but}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for address, size in storages.items() if address not in own)


def saved_bytes(module, x, only=()):
    """What autograd saves in a forward pass; with `only`, what these submodules save."""
    saved, inside = [], []

    def pack(t):
        if inside or not only:
            saved.append(t)
        return t

    for submodule in only:
        submodule.register_forward_pre_hook(lambda *_: inside.append(1))
        submodule.register_forward_hook(lambda *_: inside.clear())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    return storage_bytes(saved, module.parameters()), y


def bytes_of(make, recipe, linears_only):
    torch.manual_seed(0)
    module = make().bfloat16()
    if recipe:
        convert_linears(module, recipe)
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    size, _ = saved_bytes(module, tensor(2, 128, 64).bfloat16().requires_grad_(), linears if linears_only else ())
    return size


@pytest.mark.parametrize("preset", ["tensorwise", "delayed"])
def test_the_inputs_of_linear_layers_are_saved_in_half_the_bytes(preset):
    """Of an attention + SwiGLU block whose q, k, v and gate, up are modules of their own."""
    bf16, fp8 = (bytes_of(Block, recipe, linears_only=True) for recipe in (None, preset))
    tokens = 2 * 128
    assert bf16 == tokens * 2 * (3 * 64 + 176)  # q, k, v share one; so do gate, up
    print(f"saved inputs of linear layers: bf16 {bf16}, {preset} {fp8}, {fp8 / bf16:.3f}")
    assert fp8 <= 0.55 * bf16


@pytest.mark.parametrize("preset", ["tensorwise", "delayed"])
def test_all_that_a_swiglu_saves_shrinks_by_a_seventh(preset):
    bf16, fp8 = (bytes_of(SwiGLU, recipe, linears_only=False) for recipe in (None, preset))
    tokens = 2 * 128
    # x, gate's and up's outputs, silu, product; x itself, a leaf, is held by whoever made it
    assert bf16 == tokens * 2 * (64 + 4 * 176)
    print(f"saved by a SwiGLU: bf16 {bf16}, {preset} {fp8}, {fp8 / bf16:.3f}")
    assert fp8 <= 0.86 * bf16


def saved_by(layers, inputs):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ys = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    return storage_bytes(saved, [p for layer in layers for p in layer.parameters()]), ys


def test_siblings_without_a_common_input_share_nothing():
    """The count can tell: three copies would be one and a half times what bf16 saves."""
    q, k, v = (linear(seed=seed) for seed in range(3))
    x = tensor(128, 64).bfloat16().requires_grad_()
    together, _ = saved_by([q, k, v], [x, x, x])
    apart, _ = saved_by([q, k, v], [x * 1, x * 1, x * 1])
    assert together < 128 * 64 * 1.01
    assert apart > 2.9 * together


@pytest.mark.parametrize("cache_weights", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_tied_weights_get_the_gradients_of_both_layers(preset, cache_weights):
    first, second = (
        linear(recipe=preset, cache_weights=cache_weights),
        linear(recipe=preset, cache_weights=cache_weights),
    )
    x, z = (tensor(32, 64, seed=seed).bfloat16() for seed in (1, 2))
    single = []
    for inputs in (x, z):
        layer = linear(recipe=preset)
        layer(inputs).sum().backward()
        single.append(layer.weight.grad)
    second.weight = first.weight
    (first(x).sum() + second(z).sum()).backward()
    assert torch.equal(first.weight.grad, single[0] + single[1])
    assert second.weight.grad is first.weight.grad
    assert len(list(nn.ModuleList([first, second]).parameters())) == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_a_layer_used_twice_gets_the_gradients_of_both_uses(preset):
    layer, copy_a, copy_b = (linear(recipe=preset) for _ in range(3))
    x = tensor(32, 64).bfloat16()
    layer(F.gelu(layer(x))).sum().backward()
    copy_b(F.gelu(copy_a(x))).sum().backward()
    assert torch.equal(layer.weight.grad, copy_a.weight.grad + copy_b.weight.grad)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_frozen_weight_costs_neither_gemm_nor_memory(preset):
    layer, trained = linear(recipe=preset), linear(recipe=preset)
    layer.weight.requires_grad_(False)
    x = tensor(128, 64).bfloat16().requires_grad_()
    size, (y,) = saved_by([layer], [x])
    assert size == 0
    with record_gemms() as gemms:
        y.sum().backward()
    assert len(gemms) == 1
    assert layer.weight.grad is None
    z = x.detach().clone().requires_grad_()
    trained(z).sum().backward()
    assert torch.equal(x.grad, z.grad)
