"""Kernels on a device: the same codes as the reference, at sizes a layer has, and no wait for the host."""

import pytest
import torch
from torch import nn

from lightning_fp8 import convert_linears, hardware
from lightning_fp8.compute import PRESETS
from lightning_fp8.compute.linear import end_step
from lightning_fp8.kernels.cast import fill_by_reference
from lightning_fp8.kernels.outputs import WHOLE, allocate
from lightning_fp8.numerics import FORMATS

pytestmark = pytest.mark.gpu

TILES = {"tensor": WHOLE, "row": (1, None), "1x128": (1, 128), "1x32": (1, 32), "128x128": (128, 128)}
all_formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
all_tiles = pytest.mark.parametrize("tile", TILES.values(), ids=TILES)


def assert_same(actual, expected):
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        a = a.cpu()
        equal = a.view(torch.uint8) == e.view(torch.uint8) if a.element_size() == 1 else a == e
        assert (equal | (a.float().isnan() & e.float().isnan())).all(), name


def check(x, fmt, tile, power_of_two=False, remembered=None):
    assert hardware.runs_kernels()
    actual, expected = allocate(x.cuda(), fmt, tile, True, True), allocate(x, fmt, tile, True, True)
    from lightning_fp8.kernels.triton.launch import launch

    launch(x.cuda(), fmt, tile, power_of_two, None if remembered is None else remembered.cuda(), actual)
    fill_by_reference(x, fmt, tile, power_of_two, remembered, expected)
    assert_same(actual, expected)


@all_formats
@all_tiles
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(1024, 2048), (130, 200), (1, 1), (7, 33), (4096, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_reference_gives_the_same(fmt, tile, power_of_two, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(4).exp()
    check(x.to(dtype), fmt, tile, power_of_two)


@all_formats
@pytest.mark.parametrize("scale", [2.0**-126, 1.7e-30, 0.3, 1.0, 1.9999999, 2.0**30, 7.5e35])
def test_every_bf16_value(fmt, scale):
    """The one step that the interpreter does not prove: that the conversion instruction rounds and saturates."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)
    check(x, fmt, WHOLE, remembered=torch.tensor(scale))


def test_offsets_beyond_two_to_the_31():
    x = torch.zeros(2**16 + 1, 2**15, dtype=torch.bfloat16, device="cuda")
    x[-1] = 3.5
    from lightning_fp8.kernels import cast

    made = cast(x, FORMATS["e4m3"], rows=True)
    assert made.rows is not None
    assert made.rows.scale == 3.5 / 448
    assert (made.rows.codes[-1].float() == 448).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_training_step_does_not_wait_for_the_host(preset):
    recipe = PRESETS[preset]
    if problem := hardware.why_not_native((recipe.input.granularity, recipe.weight.granularity)):
        pytest.skip(problem)
    layer = nn.Linear(256, 512, device="cuda", dtype=torch.bfloat16)
    convert_linears(layer, preset, keep_high_precision=())
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step():
        layer(x).sum().backward()
        end_step(layer)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
