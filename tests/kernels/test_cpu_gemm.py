"""The C++ product against fp64, and that it is the one that runs."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_fp8 import convert_linears
from lightning_fp8.compute.gemm import fp8_gemm
from lightning_fp8.kernels import gemm
from lightning_fp8.kernels.cpu import build
from lightning_fp8.numerics import E4M3, E5M2, Quantized, quantize

E4M3FN, E5M2FN, FP32, BF16, FP16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float32, torch.bfloat16, torch.float16
here = pytest.mark.skipif(not gemm._runs(), reason="this machine has no AVX512-BF16, or no C++ compiler")
has_instructions = torch.cpu.get_capabilities().get("avx512_bf16", False)
ONE = torch.tensor(1.0)
# Tiles have 6 rows and 64 columns, blocks 96 rows, registers 32 numbers, stretches of the sum 512 terms.
SIZES = [
    (1, 1, 1),
    (5, 3, 2),
    (6, 32, 64),
    (7, 48, 65),
    (33, 17, 31),
    (97, 513, 130),
    (193, 544, 16),
    (96, 1024, 128),
    (12, 1500, 80),
]


def codes(rows, columns, dtype, *, transposed=False, seed=0):
    """Of numbers of all sizes that the format has."""
    generator = torch.Generator().manual_seed(rows * 7 + columns + seed)
    bits = torch.randint(0, 256, (columns, rows) if transposed else (rows, columns), generator=generator)
    x = bits.to(torch.uint8).view(dtype)
    x = torch.where(x.float().isfinite(), x.float(), 0.0).to(dtype)
    return x.t() if transposed else x


def exact(a, b, scale_a, scale_b, bias):
    """The result in fp64, and what may be off: the roundings of K products summed in fp32, of the scales and bias."""
    scales = scale_a.double() * scale_b.double()
    y = a.double() @ b.double() * scales
    size = a.double().abs() @ b.double().abs() * scales
    bias = torch.zeros(()) if bias is None else bias
    return y + bias.double(), ((a.shape[1] + 3) * size + 2 * (y + bias.double()).abs() + bias.double().abs()) * 2**-24


@here
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("formats", [(E4M3FN, E4M3FN), (E5M2FN, E4M3FN), (E4M3FN, E5M2FN)], ids=str)
def test_the_product_is_that_of_fp64_within_the_roundings_of_its_sum(size, transposed, formats):
    m, k, n = size
    a = codes(m, k, formats[0], transposed=transposed[0])
    b = codes(k, n, formats[1], transposed=transposed[1], seed=1)
    generator = torch.Generator().manual_seed(k)
    by_line = torch.rand(m, 1, generator=generator) + 0.1, torch.rand(1, n, generator=generator) + 0.1
    bias = torch.randn(n, generator=generator)
    for scale_a, scale_b, b_or_none in [(torch.tensor(0.37), torch.tensor(3e-3), None), (*by_line, bias)]:
        y = gemm.multiply(a, b, scale_a, scale_b, b_or_none, FP32)
        expected, allowed = exact(a, b, scale_a, scale_b, b_or_none)
        assert ((y.double() - expected).abs() <= allowed).all()
        # To bf16 and fp16 the same number is rounded, once and to nearest even.
        for dtype in (BF16, FP16):
            assert torch.equal(gemm.multiply(a, b, scale_a, scale_b, b_or_none, dtype), y.to(dtype))


@here
@pytest.mark.parametrize("dtype", [E4M3FN, E5M2FN])
@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_code_means_what_the_format_says(dtype, side, transposed):
    """256 codes beside a row or column of 1 and 0: products are the values themselves."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    one = torch.eye(3).to(E4M3FN)
    wide = every.reshape(1, 256).expand(3, 256).contiguous()
    finite = torch.where(wide.float().isfinite(), wide.float(), 0.0).to(dtype)
    if side == "b":
        y = gemm.multiply(one, finite.t().contiguous().t() if transposed else finite, ONE, ONE, None, FP32)
    else:
        y = gemm.multiply(finite.t() if not transposed else finite.t().contiguous(), one, ONE, ONE, None, FP32).t()
    assert torch.equal(y, finite.float())
    # inf and NaN: alone in a sum, each by itself
    alone = every[:, None].clone()
    product = gemm.multiply(alone, torch.ones(1, 1).to(E4M3FN), ONE, ONE, None, FP32)
    assert torch.equal(product.nan_to_num(7.0), every.float()[:, None].nan_to_num(7.0))


@here
def test_what_is_not_finite_spreads_as_in_a_sum():
    a, b = torch.randn(20, 40).to(E5M2FN), torch.randn(40, 70).to(E4M3FN)
    a[3, 5], a[7, 1], b[2, 66] = torch.inf, torch.nan, torch.nan
    y = gemm.multiply(a, b, ONE, ONE, None, BF16)
    expected = a.float() @ b.float()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    assert gemm.multiply(b.t(), b, torch.tensor(torch.inf), ONE, None, BF16).isfinite().logical_not().any()


@here
def test_results_that_lie_between_two_bf16_numbers_go_to_the_even_one():
    a = torch.tensor([[1.0, 2.0**-8]]).to(E4M3FN).expand(2, 2).contiguous()
    b = torch.tensor([[1.0, 1.5], [1.0, 0.5]]).to(E4M3FN)
    y = gemm.multiply(a, b, ONE, ONE, None, FP32)
    assert y[0].tolist() == [1 + 2**-8, 1.5 + 2**-9]
    assert gemm.multiply(a, b, ONE, ONE, None, BF16)[0].tolist() == [1.0, 1.5]
    # Products of a scale that is no bf16 number, near the end of its range and below its normal numbers.
    for scale in (3e38 / 448, 1e-40, 3.3895e38, -3.3961e38):
        y = gemm.multiply(a, b, torch.tensor(scale), ONE, None, FP32)
        assert torch.equal(gemm.multiply(a, b, torch.tensor(scale), ONE, None, BF16), y.to(BF16))


@here
@pytest.mark.parametrize("size", [(0, 16, 16), (16, 0, 16), (16, 16, 0)])
def test_empty_matrices(size):
    m, k, n = size
    bias = torch.arange(n).float()
    y = gemm.multiply(torch.zeros(m, k).to(E4M3FN), torch.zeros(k, n).to(E4M3FN), ONE, ONE, bias, BF16)
    assert torch.equal(y, bias.expand(m, n).to(BF16))


@here
def test_slices_and_views_that_repeat():
    a, b = codes(64, 96, E4M3FN), codes(96, 128, E4M3FN)
    for left, right in [(a[5:37], b), (a[:, 32:64], b[32:64]), (a[::2], b[:, ::2]), (a[:1].expand(9, 96), b)]:
        expected = gemm.multiply(left.contiguous(), right.contiguous(), ONE, ONE, None, FP32)
        assert torch.equal(gemm.multiply(left, right, ONE, ONE, None, FP32), expected)


@here
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads):
    a, b = codes(500, 256, E4M3FN), codes(256, 300, E4M3FN, transposed=True)
    expected = gemm.multiply(a, b, ONE, ONE, None, FP32)
    before, _ = torch.get_num_threads(), torch.set_num_threads(threads)
    try:
        assert torch.equal(gemm.multiply(a, b, ONE, ONE, None, FP32), expected)
    finally:
        torch.set_num_threads(before)


@here
@pytest.mark.parametrize("tile", [None, (1, None)])
def test_emulated_products_are_its(tile, monkeypatch):
    a, b = quantize(torch.randn(32, 64), E5M2, tile=tile), quantize(torch.randn(48, 64), E4M3, tile=tile).t()
    made = fp8_gemm(a, b, BF16, "emulated")
    assert torch.equal(made, gemm.multiply(a.codes, b.codes, a.scale, b.scale, None, BF16))
    monkeypatch.setattr(gemm, "multiply", None)
    with pytest.raises(TypeError):
        fp8_gemm(a, b, BF16, "emulated")
    blocks = [quantize(torch.randn(32, 128), E4M3, tile=(1, 128)) for _ in "ab"]
    fp8_gemm(blocks[0], Quantized(*blocks[1]).t(), BF16, "emulated")  # whose scales vary within a sum: not its


def test_without_a_compiler_or_the_instructions_operations_run(monkeypatch):
    a, b = quantize(torch.randn(32, 64), E5M2), quantize(torch.randn(48, 64), E4M3).t()
    made = fp8_gemm(a, b, FP32, "emulated")
    for library in (None, type("Without", (), {"fp8_gemm_runs": staticmethod(lambda: 0)})):
        monkeypatch.setattr(build, "load", lambda name, library=library: library if name == "gemm" else None)
        monkeypatch.setattr(gemm, "multiply", None)
        assert not gemm.has_kernel(a.codes)
        torch.testing.assert_close(fp8_gemm(a, b, FP32, "emulated"), made, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="no AVX512-BF16"):
            gemm._library.__wrapped__()


@pytest.mark.skipif(not has_instructions, reason="this CPU has no AVX512-BF16")
def test_it_runs_where_the_cpu_has_the_instructions():
    assert build.load("gemm") is None or gemm._runs()


@here
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_layer_has_the_bits_of_eager(backend):
    layer = torch.nn.Sequential(torch.nn.Linear(32, 48)).bfloat16()
    convert_linears(layer, backend="emulated")
    x = torch.randn(16, 32, dtype=BF16)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, backend=backend, fullgraph=True)(x), layer(x))


@here
def test_the_operator_is_declared_as_it_is():
    a, b = codes(16, 32, E4M3FN), codes(32, 48, E4M3FN)
    for check in ("test_faketensor", "test_autograd_registration"):  # the others add up what is FP8
        arguments = (a, b, ONE, ONE, torch.randn(48), BF16)
        torch.library.opcheck(torch.ops.lightning_fp8.fp8_gemm, arguments, test_utils=check)
    with FakeTensorMode():
        empty = [torch.empty(size, dtype=E4M3FN) for size in ((16, 32), (32, 48))]
        y = gemm.multiply(*empty, torch.empty(()), torch.empty(()), None, BF16)
    assert (y.shape, y.dtype) == ((16, 48), BF16)
    with FlopCounterMode(display=False) as counter:
        gemm.multiply(a, b, ONE, ONE, None, BF16)
    assert counter.get_total_flops() == 2 * 16 * 32 * 48
