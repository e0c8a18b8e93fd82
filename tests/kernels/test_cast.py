"""The operator in front of kernels and reference, without a GPU: what compilers, fake tensors and layers see of it."""

import importlib
import importlib.util

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fp8 import convert_linears
from lightning_fp8.compute import PRESETS
from lightning_fp8.compute.gemm.native import native_gemm
from lightning_fp8.compute.linear import end_step
from lightning_fp8.kernels import Cast, cast
from lightning_fp8.numerics import E4M3, E5M2, dequantize, quantize

TILES = {"tensor": None, "row": (1, None), "1x128": (1, 128), "1x32": (1, 32), "128x128": (128, 128)}
all_tiles = pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
all_presets = pytest.mark.parametrize("preset", PRESETS)
# By its full name: `kernels.cast` is the function.
front = importlib.import_module("lightning_fp8.kernels.cast")


@pytest.fixture
def by_operator(monkeypatch):
    """As on a device with kernels: the operator runs, whose CPU implementation is the reference."""
    monkeypatch.setattr(front, "_has_kernel", lambda x, tile: True)


def values(x, seed=0):
    return torch.randn(x, generator=torch.Generator().manual_seed(seed)).bfloat16()


def same(a, b):
    return torch.equal(a.codes.view(torch.uint8), b.codes.view(torch.uint8)) and torch.equal(a.scale, b.scale)


@all_tiles
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(40, 300), (1, 1), (0, 7), (7, 0), (130, 16)])
def test_the_operator_returns_what_quantize_returns(tile, power_of_two, shape, by_operator):
    x = values(shape)
    made = cast(x, E5M2, tile, rows=True, columns=True, power_of_two=power_of_two)
    rows = quantize(x, E5M2, tile=tile, power_of_two=power_of_two)
    columns = quantize(x, E5M2, tile=tile and tile[::-1], power_of_two=power_of_two)
    for actual, expected in ((made.rows, rows), (made.columns, columns)):
        assert same(actual._replace(codes=actual.codes.contiguous()), expected)
        assert actual.tile == expected.tile
        assert torch.equal(dequantize(actual), dequantize(expected))
    assert made.rows.codes.is_contiguous()
    assert made.columns.codes.t().is_contiguous()
    if tile in ((1, 128), (1, 32)):
        assert made.rows.scale.t().is_contiguous()
        assert made.columns.scale.is_contiguous()
    assert (made.amax is None) == (tile is not None)


@pytest.mark.parametrize("operator", [False, True])
def test_only_what_is_wanted_is_made(operator, monkeypatch):
    monkeypatch.setattr(front, "_has_kernel", lambda x, tile: operator)
    x = values((8, 16))
    assert cast(x, E4M3) == Cast()
    rows, columns = (cast(x, E4M3, (1, None), **{name: True}) for name in ("rows", "columns"))
    assert rows.rows is not None
    assert rows.columns is None
    assert columns.rows is None
    assert columns.columns is not None


def test_matrices_that_do_not_lie_in_rows_are_cast_as_their_copies(by_operator):
    x = values((16, 48)).t()
    assert same(cast(x, E4M3, rows=True).rows, quantize(x.contiguous(), E4M3))


@all_tiles
@pytest.mark.parametrize(("rows", "columns"), [(True, True), (True, False), (False, True)])
def test_the_operator_is_one(tile, rows, columns):
    """Schema, fake tensors, aliasing, and strides: torch's own checks."""
    remembered = torch.tensor(0.5) if tile is None else None
    arguments = (values((40, 144)), remembered, "e4m3", *(tile or (None, None)), True, rows, columns)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.lightning_fp8.cast.default, arguments, test_utils=checks)


class Log(TorchDispatchMode):
    """Notes every operator that runs, and what it returns."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.ran.append((function.overloadpacket.__name__, result))
        return result

    def names(self):
        return {name for name, _ in self.ran}


@all_presets
def test_native_gemms_take_the_codes_as_they_lie(preset, by_operator):
    """On a pretended CUDA device: no code is copied or transposed for any of the three GEMMs."""
    recipe = PRESETS[preset]
    with FakeTensorMode(), torch.device("cuda"):
        x, w, dy = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((256, 128), (384, 128), (256, 384)))
        x8, w8, dy8 = (
            cast(t, recipe.operand(role).number_format, recipe.operand(role).tile(1), rows=True, columns=True)
            for t, role in ((x, "input"), (w, "weight"), (dy, "grad_output"))
        )
        with Log() as log:
            y = native_gemm(x8.rows, w8.rows.t(), None, torch.bfloat16, True)
            dx = native_gemm(dy8.rows, w8.columns, None, torch.bfloat16, False)
            dw = native_gemm(dy8.columns.t(), x8.columns, None, torch.bfloat16, False)
    assert (y.shape, dx.shape, dw.shape) == ((256, 384), (256, 128), (384, 128))
    assert sum("scaled_mm" in name for name, _ in log.ran) == 3
    codes = (torch.float8_e4m3fn, torch.float8_e5m2)
    made = {name for name, result in log.ran if isinstance(result, torch.Tensor) and result.dtype in codes}
    assert made <= {"t", "transpose", "view", "detach", "alias"}
    if preset in ("tensorwise", "delayed", "rowwise"):
        assert not log.names() & {"clone", "copy_", "constant_pad_nd", "_to_copy"}


def trained(preset, run=lambda layer: layer):
    torch.manual_seed(0)
    layer = convert_one(preset)
    x = values((32, 128)).requires_grad_()
    for _ in range(2):
        y = run(layer)(x)
        y.backward(values(y.shape, seed=1))
        end_step(layer)
    return y.detach(), x.grad, layer.weight.grad, layer.bias.grad


def convert_one(preset):
    layer = nn.Linear(128, 256).bfloat16()
    convert_linears(layer, preset, keep_high_precision=(), backend="emulated")
    return layer


@all_presets
def test_layers_learn_the_same_through_the_operator(preset, monkeypatch):
    expected = trained(preset)
    monkeypatch.setattr(front, "_has_kernel", lambda x, tile: True)
    for actual, value in zip(trained(preset), expected, strict=True):
        assert torch.equal(actual, value)


@pytest.mark.parametrize("preset", ["tensorwise", "delayed", "blockwise"])
def test_compilers_see_the_operator(preset, by_operator):
    expected = trained(preset)
    torch.compiler.reset()
    actual = trained(preset, lambda layer: torch.compile(layer, fullgraph=True, backend="aot_eager"))
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@all_presets
def test_autograd_keeps_one_byte_an_element(preset, by_operator):
    layer, saved = convert_one(preset), []
    x = values((64, 128)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    activations = [t for t in saved if t.data_ptr() != layer.weight.data_ptr() and t.dtype is not torch.float32]
    assert sum(t.untyped_storage().nbytes() for t in activations) == x.numel() * (2 if "gw_hp" in preset else 1)


READS = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select"}


@all_presets
@pytest.mark.parametrize("operator", [False, True])
def test_a_training_step_reads_nothing_back_to_the_host(preset, operator, monkeypatch):
    monkeypatch.setattr(front, "_has_kernel", lambda x, tile: operator)
    with Log() as log:
        trained(preset)
    assert {"mm", "addmm", "aminmax", "amax", "cast"} & log.names()
    assert not READS & log.names()


def test_the_host_reads_that_are_counted_are_seen():
    with Log() as log:
        float(torch.ones(2).sum())
    assert READS & log.names()
