import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fp8.numerics import E4M3, E5M2, FORMATS, Quantized, dequantize, quantize
from lightning_fp8.numerics.quantize import amax, decode, scale_of

both_formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
both_scales = pytest.mark.parametrize("power_of_two", [False, True])


def all_bf16():
    """All finite bf16 values, fp32."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    return values[values.isfinite()]


def finite_codes(fmt):
    codes = torch.arange(256, dtype=torch.uint8).view(fmt.dtype)
    return codes[codes.float().isfinite()]


def reference_codes(x, fmt):
    """Round to nearest even and saturate in fp64, from the format's grid and not from torch's cast."""
    count = round(fmt.max / 2.0 ** np.floor(np.log2(fmt.max)) * 2**fmt.mantissa_bits)  # the top value's significand
    binades = int(np.log2(fmt.max / fmt.min_normal)) + 1
    steps = 2**fmt.mantissa_bits
    normals = [fmt.min_normal * 2.0**e * (1 + i / steps) for e in range(binades) for i in range(steps)]
    grid = np.array([i * fmt.min_subnormal for i in range(steps)] + normals)
    grid = grid[: len(grid) - (2 * steps - 1 - count)]
    assert grid[-1] == fmt.max
    middle = (grid[1:] + grid[:-1]) / 2
    magnitude = np.abs(x.astype(np.float64))
    code = np.searchsorted(middle, magnitude)  # the number of middles below
    tie = np.append(middle, np.inf)[code] == magnitude
    code += tie & (code % 2 == 1)  # the last bit of a code is the last bit of its mantissa
    return torch.from_numpy((code + 128 * np.signbit(x)).astype(np.uint8))


@both_formats
@pytest.mark.parametrize("exponent", [-100, 0, 100])
def test_every_bf16_value_rounds_to_nearest_even(fmt, exponent):
    # The tensor's largest magnitude is fmt.max * 2^exponent, so its scale is 2^exponent and the division is exact.
    x = all_bf16()
    x = x[x.abs() <= fmt.max * 2.0**exponent]
    codes, scale, _ = quantize(x.bfloat16(), fmt)
    assert scale == 2.0**exponent
    assert torch.equal(codes.view(torch.uint8), reference_codes(x.numpy() / np.float32(2.0**exponent), fmt))


@both_formats
@both_scales
def test_every_bf16_value_at_once(fmt, power_of_two):
    x = all_bf16()
    codes, scale, _ = quantize(x.bfloat16(), fmt, power_of_two=power_of_two)
    assert torch.equal(codes.view(torch.uint8), reference_codes(x.numpy() / scale.numpy(), fmt))
    assert codes.float().abs().max() <= fmt.max


@both_formats
def test_every_code_round_trips(fmt):
    codes = finite_codes(fmt)
    for scale in (2.0**-126, 1.0, 0.3, 2.0**100):
        again = quantize(dequantize(Quantized(codes, torch.tensor(scale))), fmt)
        assert torch.equal(again.codes.view(torch.uint8), codes.view(torch.uint8)), scale


@both_formats
@both_scales
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_non_finite_input_is_never_hidden(fmt, power_of_two, bad, dtype):
    x = torch.tensor([[1.0, -2.0, 0.0], [bad, 448.0, 3e38]], dtype=dtype)
    q = quantize(x, fmt, power_of_two=power_of_two)
    assert not q.scale.isfinite()
    assert not dequantize(q).isfinite().any()
    assert not dequantize(q, torch.bfloat16).isfinite().any()


EDGES = {
    "zeros": torch.zeros(3, 5),
    "negative zeros": -torch.zeros(3, 5),
    "empty": torch.empty(0, 7),
    "single": torch.tensor(-0.3),
    "subnormal": torch.tensor([2.0**-149, -(2.0**-130), 0.0]),
    "huge": torch.tensor([3e38, -2.9e38, 1e30]),
}


@both_formats
@both_scales
@pytest.mark.parametrize("x", EDGES.values(), ids=EDGES)
def test_edges(fmt, power_of_two, x):
    q = quantize(x, fmt, power_of_two=power_of_two)
    assert q.codes.shape == x.shape
    assert q.codes.dtype is fmt.dtype
    assert q.scale.shape == ()
    assert q.scale.dtype is torch.float32
    assert 2.0**-126 <= q.scale < float("inf")
    error = (dequantize(q).double() - x.double()).abs()
    # Half a unit in the last place, and the roundings of the division and the product.
    bound = x.double().abs() * (2.0 ** -(fmt.mantissa_bits + 1) + 2.0**-22) + fmt.min_subnormal * q.scale
    assert (error <= bound).all()
    if not x.any():
        assert q.scale == 1


@both_formats
def test_amax_fills_the_format(fmt):
    assert quantize(torch.tensor([0.1, -7.3]), fmt).codes.float().tolist()[1] == -fmt.max


@both_formats
def test_power_of_two_scale_is_the_smallest_that_does_not_saturate(fmt):
    powers = torch.tensor([2.0**k for k in range(-110, 120)])
    draws = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 1e3
    largest = torch.cat([powers, powers * (fmt.max / 2.0**15), draws, torch.tensor([3.4e38])])
    largest = largest.clamp_min(fmt.max * 2.0**-125)  # smaller ones meet the floor of the scale
    for x in (largest, largest.nextafter(torch.tensor(0.0)), largest.nextafter(torch.tensor(float("inf")))):
        scale = scale_of(x, fmt, power_of_two=True)
        assert (scale.frexp().mantissa == 0.5).all()
        assert (x.double() / scale.double() <= fmt.max).all()
        # amax / max is rounded to fp32 before it is rounded up to a power of two, hence "not far below" the limit.
        assert (x.double() / (scale.double() / 2) > fmt.max * (1 - 2.0**-24)).all()


def test_scale_of_is_elementwise():
    assert scale_of(torch.tensor([[0.0], [448.0], [896.0]]), E4M3).tolist() == [[1.0], [1.0], [2.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_amax(dtype):
    assert amax(torch.tensor([1.0, -3.0], dtype=dtype)) == 3.0
    assert amax(torch.empty(0, dtype=dtype)) == 0.0
    assert amax(torch.tensor([1.0, float("nan")], dtype=dtype)).isnan()
    assert amax(torch.tensor([1.0, -3.0], dtype=dtype)).dtype is torch.float32


LAYOUTS = {
    "vector": lambda codes: codes,
    "matrix": lambda codes: codes.view(16, 16),
    "wide": lambda codes: codes.view(2, 128),
    "transposed": lambda codes: codes.view(8, 32).t(),
    "every other column": lambda codes: codes.view(8, 32)[:, ::2],
    "row": lambda codes: codes.view(1, 256),
    "three dimensions": lambda codes: codes.view(4, 8, 8),
}


@both_formats
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decode_is_exact(fmt, layout, dtype):
    codes = layout(torch.arange(256, dtype=torch.uint8).view(fmt.dtype))
    values, expected = decode(codes, dtype), codes.float()
    assert values.dtype is dtype
    assert values.shape == codes.shape
    torch.testing.assert_close(values.float(), expected, rtol=0, atol=0, equal_nan=True)
    number = ~expected.isnan()
    assert torch.equal(values.signbit()[number], expected.signbit()[number])


def test_transpose_is_a_view():
    q = quantize(torch.arange(6.0).view(2, 3), E4M3)
    assert torch.equal(dequantize(q.t()), dequantize(q).t())
    assert q.t().codes.data_ptr() == q.codes.data_ptr()
    assert quantize(torch.arange(6.0).view(2, 3).t(), E4M3).codes.is_contiguous()


# To 2^127: above, the nearest value on a coarse grid may be 2^128, which is not an fp32 number.
@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=40),
    st.sampled_from([E4M3, E5M2]),
    st.booleans(),
)
def test_error_sign_and_order(values, fmt, power_of_two):
    x = torch.tensor(values, dtype=torch.float32).sort().values
    q = quantize(x, fmt, power_of_two=power_of_two)
    y = dequantize(q).double()
    # Half a unit in the last place of a normal value, or half the smallest subnormal; the quotient and the product are
    # each rounded to fp32 (2^-24 relatively, and once more near a tie), the product perhaps to an fp32 subnormal.
    bound = (2.0 ** -(fmt.mantissa_bits + 1) + 3 * 2.0**-24) * x.double().abs()
    bound += fmt.min_subnormal / 2 * q.scale.double() * (1 + 2.0**-23) + 2.0**-149
    assert ((y - x.double()).abs() <= bound).all()
    assert torch.equal(y.signbit(), x.signbit())
    assert (y.diff() >= 0).all()


@both_formats
@both_scales
@pytest.mark.parametrize(("along", "tile"), [(0, (None, 1)), (1, (1, None))])
def test_a_scale_a_line_is_each_line_cast_alone(fmt, power_of_two, along, tile):
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-6, 1, 1e3, 0, 1e20])[:, None]
    whole = quantize(x, fmt, tile=tile, power_of_two=power_of_two)
    assert whole.scale.shape == ((1, 7) if along == 0 else (5, 1))
    for i, line in enumerate(x.unbind(1 if along == 0 else 0)):
        alone = quantize(line, fmt, power_of_two=power_of_two)
        codes = whole.codes[:, i] if along == 0 else whole.codes[i]
        assert torch.equal(codes.view(torch.uint8), alone.codes.view(torch.uint8))
        assert whole.scale.flatten()[i] == alone.scale
    transposed = dequantize(Quantized(whole.t().codes.contiguous(), whole.t().scale))
    assert torch.equal(transposed, dequantize(whole).t())


def test_a_non_finite_value_spoils_its_own_line_only():
    x = torch.ones(3, 4)
    x[1, 2] = torch.nan
    assert dequantize(quantize(x, E4M3, tile=(1, None))).isfinite().all(dim=1).tolist() == [True, False, True]


TILES = [(1, 128), (128, 1), (128, 128), (1, 32), (3, 5)]


@both_formats
@both_scales
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", [(256, 128), (130, 200), (1, 1), (7, 33)])
def test_a_tile_is_cast_as_if_it_were_alone(fmt, power_of_two, tile, shape):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(5).exp()
    whole = quantize(x, fmt, tile=tile, power_of_two=power_of_two)
    values = dequantize(whole)
    rows, columns = tile
    assert whole.scale.shape == (-(-shape[0] // rows), -(-shape[1] // columns))
    for i in range(0, shape[0], max(rows, shape[0] // 3)):
        for j in range(0, shape[1], max(columns, shape[1] // 3)):
            i0, j0 = i // rows * rows, j // columns * columns
            area = (slice(i0, i0 + rows), slice(j0, j0 + columns))
            alone = quantize(x[area], fmt, power_of_two=power_of_two)
            assert torch.equal(whole.codes[area].view(torch.uint8), alone.codes.view(torch.uint8))
            assert torch.equal(values[area], dequantize(alone))
    assert torch.equal(dequantize(whole.t()), values.t())


def test_microscaling_never_saturates_and_uses_the_range():
    """E8M0 scales are rounded up, so the largest of a block lies in the upper half of the format's range."""
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(2)).mul(3).exp()
    codes, scale, _ = quantize(x, E4M3, tile=(1, 32), power_of_two=True)
    mantissa, _ = torch.frexp(scale)
    assert (mantissa == 0.5).all()
    largest = codes.float().abs().view(64, 3, 32).amax(dim=2)
    assert ((largest >= 448 / 2) & (largest <= 448)).all()


@pytest.mark.parametrize(
    ("shape", "tile", "scales"),
    [((0, 4), (1, None), (0, 1)), ((0, 4), (None, 1), (1, 4)), ((4, 0), (1, None), (4, 1)), ((0, 4), (1, 32), (0, 1))],
)
def test_no_elements_have_scales_of_one(shape, tile, scales):
    whole = quantize(torch.zeros(shape), E4M3, tile=tile)
    assert whole.codes.shape == shape
    assert whole.scale.shape == scales
    assert (whole.scale == 1).all()
