"""The C++ codes and values against torch's operations: every bit, and that it is the one that runs."""

import platform

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_fp8 import convert_linears
from lightning_fp8.kernels import codes
from lightning_fp8.kernels.cpu import build
from lightning_fp8.numerics import FORMATS
from lightning_fp8.numerics.quantize import decode, quantize_to

pytestmark = pytest.mark.skipif(build.load("codes") is None, reason="there is no C++ compiler")
BF16, FP32 = torch.bfloat16, torch.float32
formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
EVERY_BF16 = torch.arange(2**16).to(torch.int32).to(torch.int16).view(BF16)


@pytest.fixture
def calls(monkeypatch):
    """Counts what the library does."""
    counted, library = [], codes._library()

    class Counting:
        def fp8_encode(self, *arguments):
            counted.append("encode")
            library.fp8_encode(*arguments)

        def fp8_decode(self, *arguments):
            counted.append("decode")
            library.fp8_decode(*arguments)

    monkeypatch.setattr(codes, "_library", Counting)
    return counted


def same(a, b):
    """Bit for bit, and in memory of the same order; the sign of NaN says nothing."""
    nan = a.float().isnan()
    a_bits, b_bits = (x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]) for x in (a, b))
    return a.stride() == b.stride() and torch.equal(nan, b.float().isnan()) and torch.equal(a_bits[~nan], b_bits[~nan])


@formats
@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-20, 3e4, 2.0**-126, float("inf"), float("nan")])
def test_codes_of_every_bf16_number(fmt, scale, calls):
    scale = torch.tensor(scale)
    assert same(codes.encode(EVERY_BF16, fmt, scale), quantize_to(EVERY_BF16, fmt, scale))
    assert calls == ["encode"]


@formats
@pytest.mark.parametrize("scale", [1.0, 0.1, 0.37, 3e-5])
def test_codes_of_fp32_numbers_about_every_tie(fmt, scale):
    levels = torch.arange(128, dtype=torch.uint8).view(fmt.dtype).float()
    levels = levels[levels.isfinite()]
    ties = torch.cat([(levels[1:] + levels[:-1]) / 2, levels, levels[-1:] * 1.0625, torch.tensor([3e38, 1e-40])])
    near = ((ties * scale).view(torch.int32) + torch.arange(-3, 4)[:, None].int()).clamp_min(0).view(FP32).flatten()
    gen = torch.Generator().manual_seed(0)
    wide = torch.randn(2**20, generator=gen) * torch.randn(2**20, generator=gen).mul(4).exp()
    for x in (near, -near, wide):
        assert same(codes.encode(x, fmt, torch.tensor(scale)), quantize_to(x, fmt, torch.tensor(scale)))


@formats
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_values_of_every_code(fmt, dtype, calls):
    every = torch.arange(256, dtype=torch.uint8).view(fmt.dtype)
    assert same(codes.decode(every, dtype), every.to(dtype))
    assert calls == ["decode"]


@pytest.mark.parametrize("shape", [(0,), (), (1,), (5, 0), (3, 7), (2, 3, 5), (257, 129)])
def test_any_shape_and_layout(shape, calls):
    x = torch.randn(shape, dtype=BF16)
    fmt, scale = FORMATS["e4m3"], torch.tensor(0.01)
    views = [x, x.expand(2, *shape), *([x.t(), x[:, ::2], x[1:]] if x.dim() == 2 else [])]
    for view in views:
        made = codes.encode(view, fmt, scale)
        assert same(made, quantize_to(view, fmt, scale))
        for again in (made, *([made.t()] if made.dim() == 2 else [])):
            assert same(codes.decode(again, FP32), decode(again, FP32))
    assert len(calls) >= 2 * len(views)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_share_what_is_large(threads):
    x, fmt, scale = torch.randn(2**17 + 5), FORMATS["e5m2"], torch.tensor(0.01)
    before, _ = torch.get_num_threads(), torch.set_num_threads(threads)
    try:
        made = codes.encode(x, fmt, scale)
        values = codes.decode(made, FP32)
    finally:
        torch.set_num_threads(before)
    assert same(made, quantize_to(x, fmt, scale))
    assert torch.equal(values, made.to(FP32))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_layer_has_the_operations_and_their_bits(backend, calls, monkeypatch):
    monkeypatch.setattr("lightning_fp8.kernels.gemm.has_kernel", lambda a: False)  # it would decode by itself
    layer = torch.nn.Sequential(torch.nn.Linear(32, 48, bias=False)).bfloat16()
    convert_linears(layer, backend="emulated")
    x = torch.randn(16, 32, dtype=BF16)
    eager = layer(x)
    assert calls == ["encode", "encode", "decode", "decode"]
    assert torch.equal(torch.compile(layer, backend=backend, fullgraph=True)(x), eager)
    assert len(calls) == 4


def test_fake_tensors_see_through_both(calls):
    with FakeTensorMode():
        made = codes.encode(torch.empty(3, 5, dtype=BF16), FORMATS["e5m2"], torch.empty(()))
        values = codes.decode(made.t(), BF16)
    assert (made.shape, made.dtype) == ((3, 5), torch.float8_e5m2)
    assert (values.shape, values.dtype, values.stride()) == ((5, 3), BF16, (1, 5))
    assert not calls


@pytest.mark.parametrize("check", ["test_faketensor", "test_autograd_registration"])  # the others add up what is FP8
def test_the_operators_are_declared_as_they_are(check):
    encode, decode = torch.ops.lightning_fp8.encode, torch.ops.lightning_fp8.decode
    torch.library.opcheck(encode, (torch.randn(3, 5), torch.tensor(0.1), "e4m3"), test_utils=check)
    made = codes.encode(torch.randn(3, 5), FORMATS["e4m3"], torch.tensor(0.1))
    torch.library.opcheck(decode, (made, FP32), test_utils=check)


def test_without_a_compiler_the_operations_run(monkeypatch, calls):
    monkeypatch.setattr(build, "load", lambda name: None)
    made = codes.encode(EVERY_BF16, FORMATS["e4m3"], torch.tensor(0.1))
    assert same(codes.decode(made, FP32), made.to(FP32))
    assert not calls


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names instruction sets of x86")
@pytest.mark.parametrize("instructions", ["-march=x86-64", "-march=x86-64-v2", "-march=x86-64-v3"])
@formats
def test_every_bit_is_the_same_whatever_instructions_it_is_built_of(instructions, fmt, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_NATIVE", instructions)
    monkeypatch.setattr(build, "load", build.load.__wrapped__)
    monkeypatch.setattr(codes, "_library", codes._library.__wrapped__)
    for scale in (torch.tensor(0.37), torch.tensor(2.0**-20)):
        made = codes.encode(EVERY_BF16, fmt, scale)
        assert same(made, quantize_to(EVERY_BF16, fmt, scale))
    assert torch.equal(codes.decode(made, BF16).nan_to_num(7), made.to(BF16).nan_to_num(7))
    assert list(tmp_path.glob("lightning_fp8/codes-*.so"))
