import pytest
import torch

from lightning_fp8 import hardware
from lightning_fp8.compute.gemm import fp8_gemm, record_gemms
from lightning_fp8.numerics import E4M3, E5M2, dequantize, quantize

FORMATS = [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def emulation_dtype(request, monkeypatch):
    monkeypatch.setattr(hardware, "emulation_dtype", lambda device_type: request.param)
    return request.param


def operands(fmt_a, fmt_b, m=48, k=80, n=32):
    generator = torch.Generator().manual_seed(m + k + n)
    a = torch.randn(m, k, generator=generator)
    b = torch.randn(n, k, generator=generator) * 1e-3
    return quantize(a, fmt_a), quantize(b, fmt_b).t()


@pytest.mark.parametrize(("fmt_a", "fmt_b"), FORMATS)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_the_dequantised_operands(fmt_a, fmt_b, out_dtype, emulation_dtype):
    a, b = operands(fmt_a, fmt_b)
    exact = dequantize(a, torch.float64) @ dequantize(b, torch.float64)
    absolute = dequantize(a, torch.float64).abs() @ dequantize(b, torch.float64).abs()
    y = fp8_gemm(a, b, out_dtype, "emulated")
    assert y.dtype is out_dtype
    # K fp32 additions of exact products; one rounding to the emulation dtype, one of the scaling, one to the output.
    roundings = torch.finfo(emulation_dtype).eps / 2 + torch.finfo(out_dtype).eps / 2 + 2**-23
    bound = a.codes.shape[1] * 2**-24 * absolute + roundings * exact.abs() * (1 + 2**-8)
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("transposed", ["a", "b", "both", "neither"])
def test_transposed_codes_give_the_same_product(transposed):
    a, b = operands(E4M3, E4M3)
    expected = fp8_gemm(a, b, torch.float32, "emulated")
    if transposed in ("a", "both"):
        a = a._replace(codes=a.codes.t().contiguous().t())
    if transposed in ("b", "both"):
        b = b._replace(codes=b.codes.contiguous())
    torch.testing.assert_close(fp8_gemm(a, b, torch.float32, "emulated"), expected, rtol=1e-6, atol=1e-9)


def test_agrees_with_the_scaled_matrix_product_of_torch():
    # Torch's CPU kernel is a plain loop: an oracle for tiny shapes, far too slow for anything else.
    a, b = operands(E4M3, E4M3, m=16, k=32, n=16)
    expected = torch._scaled_mm(a.codes, b.codes, a.scale, b.scale, out_dtype=torch.float32)
    torch.testing.assert_close(fp8_gemm(a, b, torch.float32, "emulated"), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(
    torch.__version__ < "2.13",
    reason="torch 2.11's own product on CPUs knows one scale a tensor only; 2.13's takes rows",
)
def test_agrees_with_the_scaled_matrix_product_of_torch_by_row():
    a, b = torch.randn(16, 32), torch.randn(16, 32)
    a8, b8 = quantize(a, E4M3, tile=(1, None)), quantize(b, E4M3, tile=(1, None)).t()
    expected = torch._scaled_mm(a8.codes, b8.codes, a8.scale, b8.scale, out_dtype=torch.bfloat16)
    torch.testing.assert_close(fp8_gemm(a8, b8, torch.bfloat16, "emulated"), expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(("tile_a", "tile_b"), [((1, 128), (1, 128)), ((1, 128), (128, 128)), ((1, 32), (1, 32))])
@pytest.mark.parametrize("k", [256, 200])
def test_scales_that_vary_within_the_sum_are_applied_inside_it(tile_a, tile_b, k):
    generator = torch.Generator().manual_seed(k)
    a, b = (torch.randn(48, k, generator=generator) * torch.logspace(-4, 4, k) for _ in "ab")
    a8, b8 = quantize(a, E4M3, tile=tile_a), quantize(b, E4M3, tile=tile_b).t()
    exact = dequantize(a8).double() @ dequantize(b8).double()
    absolute = dequantize(a8).double().abs() @ dequantize(b8).double().abs()
    y = fp8_gemm(a8, b8, torch.float32, "emulated")
    assert ((y.double() - exact).abs() <= k * 2**-24 * absolute).all()


@pytest.mark.parametrize("k", [128, 200, 272, 640])
@pytest.mark.parametrize("n", [32, 160])
@pytest.mark.parametrize(("tile_b", "fmt_a"), [((1, 128), E4M3), ((128, 128), E4M3), ((1, 128), E5M2)])
def test_in_bf16_each_block_of_a_sum_is_rounded_once(tile_b, fmt_a, n, k, monkeypatch):
    """Scales that are no powers of two: a product for each 128 terms, rounded to bf16, scaled and added up in fp32."""
    monkeypatch.setattr(hardware, "emulation_dtype", lambda device_type: torch.bfloat16)
    generator = torch.Generator().manual_seed(k)
    sizes = torch.logspace(-3, 3, k)
    a, b = (torch.randn(rows, k, generator=generator) * sizes for rows in (24, n))
    a8, b8 = quantize(a, fmt_a, tile=(1, 128)), quantize(b, E4M3, tile=tile_b).t()
    y = fp8_gemm(a8, b8, torch.float32, "emulated").double()
    left, right = (_fp64(t) for t in (a8, b8))
    blocks = [(left[:, i : i + 128], right[i : i + 128]) for i in range(0, k, 128)]
    bound = sum(2**-8 * (p @ q).abs() + (128 + len(blocks) + 3) * 2**-24 * (p.abs() @ q.abs()) for p, q in blocks)
    error = (y - left @ right).abs()
    assert (error <= bound * (1 + 2**-8)).all()
    assert error.max() > 0


def _fp64(x):
    """Decoded with scales applied in fp64: no rounding at all."""
    rows, columns = x.tile
    scale = x.scale.double().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return x.codes.double() * scale[: x.codes.shape[0], : x.codes.shape[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("k", [32, 80, 200, 640])
def test_mx_scales_go_into_the_operands_without_a_rounding(k, dtype, monkeypatch):
    """The result is off by the sum's roundings and, in bf16, by its own."""
    monkeypatch.setattr(hardware, "emulation_dtype", lambda device_type: dtype)
    generator = torch.Generator().manual_seed(k)
    a, b = (torch.randn(rows, k, generator=generator) * torch.logspace(-6, 6, k) for rows in (24, 48))
    a8, b8 = (quantize(t, E4M3, tile=(1, 32), power_of_two=True) for t in (a, b))
    b8 = b8.t()
    for operand in (a8, b8):
        assert torch.equal(dequantize(operand, dtype).double(), _fp64(operand))
    exact, absolute = _fp64(a8) @ _fp64(b8), _fp64(a8).abs() @ _fp64(b8).abs()
    bound = k * 2**-24 * absolute + (2**-8 * exact.abs() if dtype is torch.bfloat16 else 0)
    assert ((fp8_gemm(a8, b8, torch.float32, "emulated").double() - exact).abs() <= bound * (1 + 2**-8)).all()


def test_autocast_does_not_reach_into_the_product(monkeypatch):
    monkeypatch.setattr(hardware, "emulation_dtype", lambda device_type: torch.float32)
    a, b = operands(E4M3, E4M3)
    expected = fp8_gemm(a, b, torch.float32, "emulated")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fp8_gemm(a, b, torch.float32, "emulated"), expected)


def test_every_gemm_is_recorded_with_sizes_and_dtypes():
    a, b = operands(E5M2, E4M3)
    with record_gemms() as outer:
        fp8_gemm(a, b, torch.bfloat16, "emulated")
        with record_gemms() as inner:
            fp8_gemm(a, b, torch.bfloat16, "emulated")
    fp8_gemm(a, b, torch.bfloat16, "emulated")
    assert len(outer) == 2
    assert len(inner) == 1
    assert inner[0] == (48, 80, 32, torch.float8_e5m2, torch.float8_e4m3fn, "emulated")
    assert inner[0].flops == 2 * 48 * 80 * 32


@pytest.mark.parametrize(
    ("device", "matrix_unit", "expected"),
    [("cpu", False, torch.float32), ("cpu", True, torch.bfloat16), ("cuda", False, torch.bfloat16)],
)
def test_the_emulation_runs_in_the_faster_dtype(device, matrix_unit, expected, monkeypatch):
    monkeypatch.setattr(hardware, "_CPU_HAS_MATRIX_UNITS", matrix_unit)
    assert hardware.emulation_dtype(device) is expected
