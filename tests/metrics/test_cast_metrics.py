"""Metrics of casts against figures computed element by element in numpy, fp64."""

import math

import numpy as np
import pytest
import torch

from lightning_fp8.metrics import SQNR, BlockSQNR, CosineDistortion, SaturationRate, ScaleLag, UnderflowRate
from lightning_fp8.metrics.rounded import thin
from lightning_fp8.numerics import E4M3, E5M2, Quantized, quantize
from lightning_fp8.numerics.quantize import quantize_to

TILES = {"tensor": None, "row": (1, None), "block": (1, 128), "square": (128, 128), "mx": (1, 32), "columns": (128, 1)}
METRICS = {
    "underflow": UnderflowRate,
    "saturation": SaturationRate,
    "sqnr": SQNR,
    "cosine": CosineDistortion,
    "lag": ScaleLag,
}


def wide(m, k, octaves, seed=0):
    """Values whose magnitudes spread over many octaves, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * 2.0 ** (-octaves * torch.rand(m, k, generator=generator))
    return torch.where(torch.rand(m, k, generator=generator) < 0.05, 0.0, x)


def expanded(cast):
    """The scale of each element, in numpy."""
    scale, (m, k) = cast.scale.double().numpy(), cast.codes.shape
    if cast.tile is not None:
        scale = scale.repeat(cast.tile[0], 0)[:m].repeat(cast.tile[1], 1)[:, :k]
    return np.broadcast_to(scale, (m, k))


def reference(x, cast):
    exact, scale = x.double().numpy(), expanded(cast)
    value = cast.codes.to(torch.float64).numpy() * scale
    largest = torch.finfo(cast.codes.dtype).max * scale
    noise = ((exact - value) ** 2).sum()
    return {
        "underflow": ((exact != 0) & (value == 0)).sum() / max(1, (exact != 0).sum()),
        "saturation": (np.abs(exact) > largest * (1 + 1e-6)).mean(),
        "sqnr": 10 * math.log10((exact**2).sum() / noise) if noise else math.inf,
        "cosine": 1 - (exact * value).sum() / np.linalg.norm(exact) / np.linalg.norm(value),
        "lag": math.log2(np.abs(exact).max() / largest.max()),
    }


def measured(kind, x, cast):
    metric = kind()
    metric.update(x, cast)
    return float(metric.compute())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_each_metric_is_that_of_all_elements(tile, fmt, dtype):
    x = wide(200, 300, 30).to(dtype)
    cast = quantize(x, fmt, tile=tile)
    expected = reference(x, cast)
    assert 0 < expected["underflow"] < 1
    for name, kind in METRICS.items():
        # x is fp32 and its decoded value is rounded to fp32: relative errors of 2^-24, of SQNR 1e-6 dB
        tolerance = 2.0**-17 if name == "lag" else 1e-6
        assert measured(kind, x, cast) == pytest.approx(expected[name], rel=1e-5, abs=tolerance), name


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("octaves", [-3, 0, 0.25, 5])
def test_a_scale_that_lags_saturates(fmt, octaves):
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    scale = x.abs().amax() / fmt.max / 2.0**octaves
    cast = Quantized(quantize_to(x, fmt, scale), scale)
    expected = reference(x, cast)
    assert (expected["saturation"] > 0) == (octaves > 0)
    assert measured(SaturationRate, x, cast) == expected["saturation"]
    assert measured(ScaleLag, x, cast) == octaves


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_a_cast_by_its_own_amax_saturates_nowhere(tile):
    """Not even by the rounding of its scale, over many magnitudes."""
    for seed in range(20):
        x = wide(128, 128, 20, seed) * (1 + seed / 7)
        cast = quantize(x, E4M3, tile=tile)
        assert measured(SaturationRate, x, cast) == 0
        assert measured(ScaleLag, x, cast) == 0


def blocks(x, cast):
    """The SQNR in dB of each block of 128 in a row that is not zero throughout."""
    exact = x.double().numpy()
    noise = (exact - cast.codes.to(torch.float64).numpy() * expanded(cast)) ** 2
    starts = range(0, x.shape[1], 128)
    pairs = [((exact[i, j : j + 128] ** 2).sum(), noise[i, j : j + 128].sum()) for i in range(len(x)) for j in starts]
    return np.array([10 * math.log10(s / n) if n else math.inf for s, n in pairs if s])


@pytest.mark.parametrize("columns", [128, 300])
@pytest.mark.parametrize("octaves", [0, 8, 20])
def test_the_worst_blocks_are_found(octaves, columns):
    """Within the width of a bin, 1 dB, and what a percentile of finitely many blocks leaves open."""
    x = wide(500, columns, 0) * 2.0 ** (-octaves * torch.rand(500, 1, generator=torch.Generator().manual_seed(2)))
    cast = quantize(x, E4M3)
    db = np.sort(blocks(x, cast))
    low, high = db[int(0.05 * len(db)) - 1], db[int(0.05 * len(db)) + 1]
    assert low - 1 <= measured(BlockSQNR, x, cast) <= high + 1


def test_an_outlier_is_seen_by_blocks_and_underflow_and_not_by_the_sqnr_of_the_whole():
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(3))
    clean = quantize(x, E4M3)
    hit = x.clone()
    hit[0, 0] = 2.0**20
    cast = quantize(hit, E4M3)
    assert measured(SQNR, hit, cast) > measured(SQNR, x, clean)
    assert measured(UnderflowRate, hit, cast) > 0.3
    assert measured(BlockSQNR, x, clean) > 29
    assert measured(BlockSQNR, hit, cast) < 15


def gaussian_sqnr(bits, scale):
    """By integration: of a Gaussian, divided by `scale`, rounded to that many significant bits."""
    x = np.linspace(1e-5, 7, 400_000)
    mantissa, exponent = np.frexp(x / scale)
    error = x - np.ldexp(np.rint(mantissa * 2**bits) / 2**bits, exponent) * scale
    density = np.exp(-(x**2) / 2)
    return 10 * math.log10((density * x**2).sum() / (density * error**2).sum())


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
def test_a_gaussian_has_the_sqnr_of_its_format(fmt):
    """Half a million samples: 0.05 dB; what is below the normal numbers carries next to no energy."""
    x = torch.randn(1024, 512, generator=torch.Generator().manual_seed(4))
    cast = quantize(x, fmt)
    expected = gaussian_sqnr(fmt.mantissa_bits + 1, float(cast.scale))
    assert measured(SQNR, x, cast) == pytest.approx(expected, abs=0.05)
    assert expected == pytest.approx(31.5 - 6 * (fmt is E5M2), abs=0.2)


def test_more_bits_are_six_decibels_each():
    x = torch.randn(1024, 512, generator=torch.Generator().manual_seed(5))
    difference = measured(SQNR, x, quantize(x, E4M3)) - measured(SQNR, x, quantize(x, E5M2))
    assert difference == pytest.approx(6.02, abs=0.15)


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("shape", [(4, 8), (0, 8)], ids=["zeros", "nothing"])
def test_of_nothing_nothing_is_lost(shape, fmt):
    x = torch.zeros(shape)
    cast = quantize(x, fmt)
    found = {name: measured(kind, x, cast) for name, kind in METRICS.items()}
    assert found == {"underflow": 0, "saturation": 0, "sqnr": math.inf, "cosine": 0, "lag": -math.inf}
    assert math.isnan(measured(BlockSQNR, x, cast))


def test_an_exact_cast_has_no_noise():
    x = torch.tensor([[448.0, 1.0, 0.5, -2.0]])
    cast = quantize(x, E4M3)
    assert measured(SQNR, x, cast) == math.inf
    assert measured(BlockSQNR, x, cast) > 60
    assert measured(CosineDistortion, x, cast) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_is_not_hidden(bad):
    x = torch.ones(4, 8)
    x[0, 0] = bad
    cast = quantize(x, E4M3)
    assert math.isnan(measured(SQNR, x, cast))
    assert not math.isfinite(measured(ScaleLag, x, cast)) or math.isnan(measured(ScaleLag, x, cast))


def test_large_and_small_tensors_do_not_overflow():
    for size in (1e30, 1e-30):
        x = torch.randn(64, 128, generator=torch.Generator().manual_seed(6)) * size
        assert measured(SQNR, x, quantize(x, E4M3)) == pytest.approx(31.5, abs=0.5)
        assert measured(BlockSQNR, x, quantize(x, E4M3)) > 29


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("rows", [1024, 1000])
def test_a_thinned_cast_is_that_of_its_rows(tile, rows):
    x = wide(rows, 256, 10)
    whole = quantize(x, E4M3, tile=tile)
    some, cast = thin(x, whole, most=256 * 300)
    kept = torch.cat([torch.arange(g * 128, g * 128 + 128) for g in range(0, rows // 128, 4)])
    assert torch.equal(some, x[kept])
    assert np.array_equal(
        cast.codes.float().numpy() * expanded(cast), (whole.codes.float().numpy() * expanded(whole))[kept]
    )


def test_a_small_cast_is_not_thinned():
    x = wide(200, 64, 10)
    cast = quantize(x, E4M3)
    assert thin(x, cast, most=200 * 64)[0] is x
    assert thin(x, cast, most=64)[0] is x  # fewer than two groups of rows
