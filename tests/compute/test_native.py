"""Native GEMMs without a GPU: shapes and layouts on fake CUDA tensors, values on CPUs where torch has a kernel."""

from types import SimpleNamespace

import pytest
import torch
from scaled_mm_oracle import blocks, oracle
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from lightning_fp8 import convert_linears, hardware
from lightning_fp8.compute import PRESETS
from lightning_fp8.compute.gemm.emulated import emulated_gemm
from lightning_fp8.compute.gemm.native import native_gemm, swizzle_mx_scales
from lightning_fp8.compute.linear import _How, _ThreeGemms
from lightning_fp8.compute.recipe import GEMMS, Recipe
from lightning_fp8.compute.scaling import DelayedScales
from lightning_fp8.numerics import E4M3, quantize

E4, E5, E8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
KINDS = ("tensor", "row", "block_1x128", "block_128x128", "mx_1x32")
NAMES = {
    "tensor": ("TensorWise", "TensorWise"),
    "row": ("RowWise", "RowWise"),
    "block_1x128": ("BlockWise1x128", "BlockWise1x128"),
    "block_128x128": ("BlockWise1x128", "BlockWise128x128"),
    "mx_1x32": ("BlockWise1x32", "BlockWise1x32"),
}
RECENT = torch.__version__ >= "2.13"
on_cpu = pytest.mark.skipif(not RECENT, reason="torch 2.11's scaled_mm has no kernel for CPUs")


@pytest.fixture
def calls(monkeypatch):
    """What is handed to `F.scaled_mm`, which goes on as ever."""
    seen, scaled_mm = [], F.scaled_mm

    def spy(a, b, scale_a, kind_a, scale_b, kind_b, **options):
        kind = next(kind for kind, names in NAMES.items() if names == (kind_a.name, kind_b.name))
        seen.append(SimpleNamespace(operands=(a, b, scale_a, scale_b), kind=kind, **options))
        if kind == "block_128x128" and b.shape[1] % 128 and not RECENT:
            # torch 2.11's fake product counts the blocks of a ragged N short by one; the oracle judges this call.
            return torch.empty(a.shape[0], b.shape[1], device=a.device, dtype=options["output_dtype"])
        return scaled_mm(a, b, scale_a, kind_a, scale_b, kind_b, **options)

    monkeypatch.setattr(F, "scaled_mm", spy)
    return seen


def three_gemms(recipe, tokens, k, n, bias=True, dtype=torch.bfloat16):
    """Forward and backward of a layer on a fake CUDA device, called directly: the autograd engine needs a real one."""
    cuda = torch.device("cuda")
    x, dy = (torch.empty(tokens, size, device=cuda, dtype=dtype) for size in (k, n))
    weight = torch.empty(n, k, device=cuda, dtype=dtype)
    offset = torch.empty(n, device=cuda, dtype=dtype) if bias else None
    scales = DelayedScales.unknown(recipe.history, cuda) if recipe.scaling == "delayed" else None
    how = _How(recipe, "native", scales, cache_weights=False, learning=True)
    forward = recipe.uses_fp8("forward")
    x8 = how.cast(x, "input", rows=forward, columns=recipe.uses_fp8("weight_grad"))
    w8 = how.cast(weight, "weight", rows=forward)
    ctx = SimpleNamespace(needs_input_grad=(True, False, False, True, False, bias, False, False))
    ctx.save_for_backward = lambda *tensors: setattr(ctx, "saved_tensors", tensors)
    y = _ThreeGemms.forward(ctx, x, x8.rows, x8.columns, weight, w8.rows, offset, dtype, how)
    dx, _, _, dw, _, db, *_ = _ThreeGemms.backward(ctx, dy)
    return y, dx, dw, db


FP8_ONLY = [name for name in PRESETS if not PRESETS[name].high_precision]
BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("tokens", "k", "n", "dtype"),
    [
        (1, 192, 256, BF16),
        (50, 192, 48, BF16),
        (130, 256, 192, BF16),
        (7, 48, 400, BF16),
        (50, 192, 256, torch.float16),
        (50, 192, 256, torch.float32),
    ],
)
@pytest.mark.parametrize("preset", FP8_ONLY)
def test_torch_accepts_every_call_of_the_three_gemms(preset, tokens, k, n, dtype, calls, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: pytest.fail("a plain matrix product ran"))
    with FakeTensorMode():
        y, dx, dw, db = three_gemms(PRESETS[preset], tokens, k, n, dtype=dtype)
        assert [tuple(t.shape) for t in (y, dx, dw, db)] == [(tokens, n), (tokens, k), (n, k), (n,)]
        assert all(t.device.type == "cuda" and t.dtype is dtype for t in (y, dx, dw, db))
        assert len(calls) == 3
        for call in calls:
            a, b, *_ = call.operands
            assert a.dtype in (E4, E5)
            assert b.dtype is E4
            assert call.output_dtype is (dtype if call.kind == "tensor" else torch.bfloat16)
            assert call.bias is None or call.bias.dtype is call.output_dtype is not torch.float32
            product = oracle(*call.operands, call.kind, call.bias, call.output_dtype)
            assert product.shape == (a.shape[0], b.shape[1])
        # The bias goes with the forward product, or after it where hardware adds none to fp32.
        fused = not (dtype is torch.float32 and calls[0].kind == "tensor")
        assert [call.bias is not None for call in calls] == [fused, False, False]


def test_a_gemm_in_high_precision_is_none_of_the_calls(calls):
    with FakeTensorMode():
        three_gemms(PRESETS["rowwise_gw_hp"], 50, 192, 256)
    assert len(calls) == 2


@pytest.mark.parametrize("fast", [(), ("forward",), ("input_grad", "weight_grad"), GEMMS])
@pytest.mark.parametrize("preset", ["tensorwise", "delayed", "rowwise", "blockwise", "mxfp8"])
def test_fast_accumulation_is_asked_for_gemm_by_gemm(preset, fast, calls):
    recipe = PRESETS[preset]
    options = {f: getattr(recipe, f) for f in ("input", "weight", "grad_output", "scaling")}
    with FakeTensorMode():
        three_gemms(Recipe(**options, fast_accumulation=fast), 50, 192, 256)
    has_it = preset in ("tensorwise", "delayed", "rowwise")  # cuBLAS knows none for scales by block
    assert [call.use_fast_accum for call in calls] == [has_it and gemm in fast for gemm in GEMMS]


@pytest.mark.parametrize("preset", FP8_ONLY)
def test_no_tokens_need_no_call(preset, calls):
    with FakeTensorMode():
        y, dx, dw, _ = three_gemms(PRESETS[preset], 0, 192, 256)
    assert [tuple(t.shape) for t in (y, dx, dw)] == [(0, 256), (0, 192), (256, 192)]
    assert not calls


@pytest.mark.parametrize("tokens", [1, 2, 50, 127])
@pytest.mark.parametrize("preset", ["tensorwise", "rowwise", "blockwise", "mxfp8"])
def test_what_is_padded_is_codes_not_high_precision(preset, tokens, calls):
    """Padding stops at the next multiple that the hardware wants."""
    with FakeTensorMode():
        three_gemms(PRESETS[preset], tokens, 256, 256)
    multiple = {"tensorwise": 16, "rowwise": 16, "blockwise": 128, "mxfp8": 32}[preset]
    forward, input_grad, weight_grad = [call.operands[0].shape for call in calls]
    rows = blocks(tokens, 4) * 4 if preset == "blockwise" else tokens
    assert forward == input_grad == (rows, 256)
    assert weight_grad == (256, blocks(tokens, multiple) * multiple)


def operands(m, k, n, tile):
    generator = torch.Generator().manual_seed(m + k)
    a, b = (torch.randn(size, k, generator=generator) for size in (m, n))
    return quantize(a, E4M3, tile=tile), quantize(b, E4M3, tile=tile).t()


@pytest.mark.parametrize("emulation", [torch.float32, torch.bfloat16], ids=["in fp32", "in bf16"])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16], ids=["no bias", "fp32 bias", "bf16 bias"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 5, 16])
@pytest.mark.parametrize("tile", [None, (1, None)], ids=["tensor", "row"])
@on_cpu
def test_native_and_emulated_products_agree(tile, tokens, out_dtype, bias_dtype, emulation, calls, monkeypatch):
    a, b = operands(tokens, 32, 16, tile)
    bias = None if bias_dtype is None else torch.linspace(-2, 2, 16).to(bias_dtype)
    native = native_gemm(a, b, bias, out_dtype, True)
    assert native.dtype is out_dtype
    assert native.shape == (tokens, 16)
    assert len(calls) == (tokens > 0)
    monkeypatch.setattr(hardware, "emulation_dtype", lambda device_type: emulation)
    emulated = emulated_gemm(a, b, bias, out_dtype, True)
    a_values, b_values = (t.codes.double() * t.scale for t in (a, b))
    product, added = a_values @ b_values, 0.0 if bias is None else bias.double()
    y, offset = (product + added).abs(), added if bias is None else added.abs()
    inner = out_dtype if tile is None else BF16  # of the hardware's result, and of the bias that it adds
    half, inner_half = (torch.finfo(dtype).eps / 2 for dtype in (out_dtype, inner))
    bound = 2 * 34 * 2**-24 * (a_values.abs() @ b_values.abs() + offset) + 2 * half * y
    if inner is not torch.float32:
        bound = bound + inner_half * (y + offset)
    if emulation is BF16:
        bound = bound + 2**-8 * product.abs()  # its own rounding, before it is scaled
    assert ((native.double() - emulated.double()).abs() <= bound * (1 + 2**-7)).all()


@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("preset", ["tensorwise", "delayed", "rowwise"])
@on_cpu
def test_native_and_emulated_layers_agree(preset, tokens, calls):
    """All three GEMMs, with operands cast and transposed as the layer does it, ragged tokens padded."""
    results = []
    for backend in ("native", "emulated"):
        torch.manual_seed(0)
        layer = torch.nn.Linear(48, 16, bias=False)
        convert_linears(layer, preset)
        layer.fp8_backend = backend
        x = torch.randn(tokens, 48, requires_grad=True)
        y = layer(x)
        y.backward(torch.randn(tokens, 16))
        results.append((y.detach(), x.grad, layer.weight.grad))
    assert len(calls) == 3
    tolerance = 1e-5 if preset != "rowwise" else 2**-7  # by row, results come out in bf16
    for native, emulated in zip(*results, strict=True):
        torch.testing.assert_close(native, emulated, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(128, 4), (1, 1), (130, 3), (256, 9), (37, 17)])
def test_mx_scales_lie_as_cublas_reads_them(rows, columns):
    exponents = torch.randint(1, 255, (rows, columns), generator=torch.Generator().manual_seed(rows))
    scales = torch.exp2(exponents.double() - 127).float()
    got = swizzle_mx_scales(scales).view(torch.uint8)
    tiles_down, tiles_across = blocks(rows, 128), blocks(columns, 4)
    assert got.shape == (tiles_down * tiles_across * 512,)
    expected = [0] * len(got)
    for row in range(rows):
        for column in range(columns):
            tile = (row // 128) * tiles_across + column // 4
            inside = (row % 32) * 16 + ((row % 128) // 32) * 4 + column % 4
            expected[tile * 512 + inside] = exponents[row, column].item()
    assert got.tolist() == expected


def test_a_scale_that_is_not_finite_stays_so_as_an_exponent():
    scales = torch.tensor([[1.0, float("inf"), float("nan"), 2.0**-126]])
    assert swizzle_mx_scales(scales)[:4].float().isnan().tolist() == [False, True, True, False]
