"""Kernels against their reference, in Triton's interpreter: run by `test_interpreter.py` in a process of its own.

Triton reads TRITON_INTERPRET where a kernel is decorated, so a process interprets all kernels or none.
"""

import os

import pytest
import torch
import triton
import triton.language as tl

from lightning_fp8.kernels.cast import fill_by_reference
from lightning_fp8.kernels.outputs import WHOLE, allocate
from lightning_fp8.kernels.triton import encode, lines, tensor, tiles
from lightning_fp8.kernels.triton.launch import launch
from lightning_fp8.numerics import E4M3, E5M2, FORMATS
from lightning_fp8.numerics.quantize import quantize_to, scale_of

assert os.environ.get("TRITON_INTERPRET") == "1"

TL = {E4M3: tl.float8e4nv, E5M2: tl.float8e5}
TILES = {"tensor": WHOLE, "row": (1, None), "1x128": (1, 128), "1x32": (1, 32), "128x128": (128, 128)}
all_formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
all_tiles = pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
# Formats and scales do not meddle with one another: two of four pairs do where many shapes are tried.
kinds = pytest.mark.parametrize(("fmt", "power_of_two"), [(E4M3, False), (E5M2, True)], ids=["e4m3", "e5m2"])
both_scales = pytest.mark.parametrize("power_of_two", [False, True], ids=["", "power_of_two"])


def assert_same(actual, expected, name=""):
    """Codes bit for bit, scales number for number; one NaN is as good as another."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.stride() == expected.stride()
    is_code = actual.element_size() == 1
    equal = actual.view(torch.uint8) == expected.view(torch.uint8) if is_code else actual == expected
    wrong = ~(equal | (actual.float().isnan() & expected.float().isnan()))
    assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.numel()}, first {actual[wrong][:3], expected[wrong][:3]}"


GUARD = 512  # elements


def guarded(outputs):
    """The outputs in memory that goes on behind them, and whether that is as it was."""
    buffers = [torch.full((t.numel() + GUARD,), 1.5).to(t.dtype) for t in outputs]
    views = [b.as_strided(t.shape, t.stride()) for b, t in zip(buffers, outputs, strict=True)]
    return type(outputs)(*views), lambda: all((b[-GUARD:].float() == 1.5).all() for b in buffers)


def followed_by_nan(x):
    """The same matrix; whoever reads behind it finds NaN."""
    return torch.cat([x.flatten(), torch.full((GUARD,), torch.nan, dtype=x.dtype)])[: x.numel()].view(x.shape)


def check(x, fmt, tile, *, power_of_two=False, remembered=None, rows=True, columns=True):
    """Kernel and reference fill all outputs alike; where a scale is not finite, its codes are free."""
    actual, expected = (allocate(x, fmt, tile, rows, columns) for _ in range(2))
    actual, untouched = guarded(actual)
    launch(followed_by_nan(x), fmt, tile, power_of_two, remembered, actual)
    assert untouched(), "the kernel wrote beyond its outputs"
    fill_by_reference(x, fmt, tile, power_of_two, remembered, expected)
    if remembered is None and not expected.row_scale.isfinite().all():
        actual.rows.view(torch.uint8).zero_()
        actual.columns.view(torch.uint8).zero_()
        expected.rows.view(torch.uint8).zero_()
        expected.columns.view(torch.uint8).zero_()
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        assert_same(a, e, name)


def wild(shape, dtype=torch.bfloat16, seed=0):
    """Values whose magnitudes differ by many orders."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(4).exp()).to(dtype)


def all_bf16():
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)


SHAPES = [(130, 200), (1, 1), (7, 300), (129, 1), (32, 64)]


@kinds
@all_tiles
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_layouts(fmt, tile, power_of_two, shape):
    check(wild(shape), fmt, tile, power_of_two=power_of_two)


@all_tiles
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes(tile, dtype):
    check(wild((70, 150)).to(dtype).nan_to_num(), E4M3, tile)


@all_tiles
@pytest.mark.parametrize(("rows", "columns"), [(True, False), (False, True)], ids=["rows", "columns"])
@both_scales
def test_one_layout(tile, rows, columns, power_of_two):
    check(wild((20, 140)), E4M3, tile, rows=rows, columns=columns, power_of_two=power_of_two)


def test_rows_longer_than_a_program(monkeypatch):
    monkeypatch.setattr(lines, "LONGEST_ROW", 128)
    check(wild((5, 300)), E4M3, (1, None), columns=False)


EDGES = {
    "zeros": torch.zeros(3, 40),
    "negative zeros": -torch.zeros(3, 40),
    "subnormal": torch.tensor([[2.0**-133, -(2.0**-127), 0.0, 2.0**-126]]),
    "huge": torch.tensor([[3e38, -2.9e38, 1e30, 1e-30]]),
    "single": torch.tensor([[-0.3]]),
    "nan": torch.tensor([[1.0, float("nan"), 3.0], [1.0, 2.0, 3.0]]),
    "inf": torch.tensor([[1.0, float("inf"), 3.0], [1.0, 2.0, 3.0]]),
    "-inf": torch.tensor([[1.0, -float("inf"), 3.0], [1.0, 2.0, 3.0]]),
}


@kinds
@all_tiles
@pytest.mark.parametrize("x", EDGES.values(), ids=EDGES)
def test_edges(fmt, tile, power_of_two, x):
    check(x.bfloat16(), fmt, tile, power_of_two=power_of_two)


# From the smallest scale there is to the largest that an amax can ask for, some of them ready to saturate nearly all.
REMEMBERED = [2.0**-126, 1.7e-30, 0.3, 1.9999999, 2.0**30, 7.5e35]


@all_formats
@pytest.mark.parametrize("scale", REMEMBERED)
def test_every_bf16_value_by_a_remembered_scale(fmt, scale):
    """NaN and inf among them: the codes saturate, and the scale handed out is NaN."""
    check(all_bf16(), fmt, WHOLE, remembered=torch.tensor(scale))


@all_formats
@both_scales
@pytest.mark.parametrize("largest", [3.3e38, 448.0, 17.25])
def test_every_bf16_value_by_its_amax(fmt, power_of_two, largest):
    x = all_bf16()
    check(torch.where(x.abs() <= largest, x, 0.0), fmt, WHOLE, power_of_two=power_of_two)


@kinds
@pytest.mark.parametrize("remembered", [0.0, -1.0, float("nan"), 0.125])
@pytest.mark.parametrize("largest", [0.0, 3.0, float("nan")])
def test_the_amax_is_used_where_no_scale_is_remembered(fmt, power_of_two, remembered, largest):
    x = wild((65, 130))
    x[64, 129] = largest
    if largest == 0:
        x.zero_()
    if remembered == 0.125 or largest == largest:
        check(x, fmt, WHOLE, power_of_two=power_of_two, remembered=torch.tensor(remembered))


@triton.jit
def scales_kernel(magnitude_ptr, scale_ptr, FP8: tl.constexpr, POWER_OF_TWO: tl.constexpr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(scale_ptr + i, encode.scale_of(tl.load(magnitude_ptr + i), FP8, POWER_OF_TWO))


@all_formats
@both_scales
@pytest.mark.parametrize("exponent", [0, 1, 8, 10, 127, 254, 255])
def test_the_scale_of_every_significand(fmt, power_of_two, exponent):
    """All 2^23 of them: the division by a constant is exact, also where the scale meets its floor."""
    step = 1 if exponent == 127 and fmt is E4M3 else 257  # the formats differ by a power of two
    significands = torch.arange(0, 2**23, step, dtype=torch.int32)
    significands = significands[: len(significands) // 2**14 * 2**14].contiguous()
    bits = significands | (exponent << 23)
    scale, n = torch.empty(len(bits)), min(len(bits), 2**18) & -(2**14)
    n = 2**14 if len(bits) % n else n
    scales_kernel[(len(bits) // n,)](bits, scale, TL[fmt], power_of_two, n)
    assert_same(scale, scale_of(bits.view(torch.float32), fmt, power_of_two=power_of_two))


@triton.jit
def encode_kernel(x_ptr, scale_ptr, codes_ptr, FP8: tl.constexpr, REMEMBERED: tl.constexpr, N: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, N)
    codes = encode.encode(tl.load(x_ptr + row * N + i), tl.load(scale_ptr + row), FP8, False, REMEMBERED)
    tl.store(codes_ptr + row * N + i, codes)


@all_formats
def test_quotients_next_to_ties(fmt):
    """fp32 values a few units in the last place around the product of a scale and the middle of two codes."""
    codes = torch.arange(128, dtype=torch.uint8).view(fmt.dtype).float()
    codes = codes[codes <= fmt.max]
    middles = (codes[1:] + codes[:-1]) / 2
    generator = torch.Generator().manual_seed(0)
    significands = torch.cat(
        [torch.rand(60, generator=generator) + 1, torch.tensor([1.0, 1.75, 2 - 2**-23, 1 + 2**-23])]
    )
    scales = significands * torch.randint(-60, 60, (64,), generator=generator).float().exp2()
    near = (scales[:, None] * middles).view(torch.int32)
    x = torch.stack([near + d for d in range(-4, 5)], dim=2).view(torch.float32).flatten(1)
    x = torch.cat([x, -x], dim=1)
    n = triton.next_power_of_2(x.shape[1])
    x = torch.nn.functional.pad(x, (0, n - x.shape[1])).contiguous()
    for remembered in (False, True):
        actual = torch.empty_like(x, dtype=fmt.dtype)
        encode_kernel[(64,)](x, scales, actual, TL[fmt], remembered, n)
        assert_same(actual, quantize_to(x, fmt, scales[:, None]))


def test_matrices_that_do_not_lie_in_rows_are_refused():
    x = wild((8, 16)).t()
    with pytest.raises(ValueError, match=r"contiguous matrix, this is \(16, 8\) with strides \(1, 16\)"):
        launch(x, E4M3, WHOLE, False, None, allocate(x, E4M3, WHOLE, True, True))
    with pytest.raises(ValueError, match="contiguous matrix"):
        launch(wild((2, 3, 4)), E4M3, WHOLE, False, None, allocate(wild((2, 3)), E4M3, WHOLE, True, True))


LONG = 2**30 + 16


def test_offsets_beyond_two_to_the_31():
    """Three rows (or columns) whose elements lie 2^30 apart; memory that nobody touches costs nothing."""
    far, near = torch.empty(3, LONG, dtype=torch.bfloat16), wild((3, 128))
    far[:, :128] = near
    rows, scale = torch.empty(3, LONG, dtype=E4M3.dtype), torch.tensor(0.5)
    columns = torch.empty(LONG, 3, dtype=E4M3.dtype)
    amax = torch.zeros((), dtype=torch.int32)
    tensor.remembered_kernel[(1,)](far, None, rows, columns, amax, scale, 3, LONG, tl.float8e4nv, 64, 128)
    assert_same(rows[:, :128].contiguous(), quantize_to(near, E4M3, scale))
    assert_same(columns[:128], quantize_to(near, E4M3, scale).t().contiguous())
    tall = torch.empty(3, LONG, dtype=E4M3.dtype)  # the transpose of a matrix of three columns
    few = wild((128, 3))
    tensor.remembered_kernel[(1,)](few, None, None, tall, amax, scale, LONG, 3, tl.float8e4nv, 64, 128)
    assert_same(tall[:, :64].contiguous(), quantize_to(few[:64], E4M3, scale).t().contiguous())
    row_scale = torch.empty(3)
    lines.rows_kernel[(3,)](near, rows, row_scale, 3, 128, tl.float8e4nv, False, 128)
    assert_same(row_scale[:, None], scale_of(near.abs().amax(1, keepdim=True).float(), E4M3))
    scales = torch.empty(1, 3)
    tiles.pieces_kernel[(1,)](far, None, None, rows, None, scales, None, 3, LONG, tl.float8e4nv, False, 128, 128)
    assert_same(rows[:, :128].contiguous(), quantize_to(near, E4M3, scales.t()))
