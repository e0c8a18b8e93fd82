"""RMSNorm and SwiGLU with their casts, in Triton's interpreter: run by `test_interpreter.py`.

Two things are shown apart. First that the numbers in between are the plain operations': silu and rstd to a few units
of fp32, and what follows them to the bit. Then that codes, scales and amax are the cast of just these, bit for bit.
"""

import os

import pytest
import torch
import triton
import triton.language as tl
from interpreted import assert_same, followed_by_nan, guarded, wild

from lightning_fp8.kernels.cast import fill_by_reference
from lightning_fp8.kernels.fused import gated, normed
from lightning_fp8.kernels.outputs import WHOLE, allocate
from lightning_fp8.kernels.triton import norm, sources, tiles
from lightning_fp8.kernels.triton.launch import launch_gated, launch_normed
from lightning_fp8.numerics import E4M3, E5M2
from lightning_fp8.numerics.quantize import quantize_to

assert os.environ.get("TRITON_INTERPRET") == "1"

TILES = {"tensor": WHOLE, "1x128": (1, 128), "1x32": (1, 32)}
EPS = 1e-5
# Formats and shapes do not meddle with one another.
kinds_of_shapes = pytest.mark.parametrize(
    ("fmt", "power_of_two", "shape"),
    [
        (E4M3, False, (130, 200)),
        (E5M2, True, (130, 200)),
        (E4M3, True, (1, 1)),
        (E5M2, False, (7, 300)),
        (E4M3, False, (129, 1)),
        (E4M3, False, (33, 64)),
    ],
    ids=str,
)
all_tiles = pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
layouts = pytest.mark.parametrize(
    ("rows", "columns"), [(True, True), (True, False), (False, True)], ids=["both", "rows", "columns"]
)


@triton.jit
def gated_kernel(gate_ptr, up_ptr, h_ptr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(h_ptr + i, sources.gated(tl.load(gate_ptr + i), tl.load(up_ptr + i)))


def gated_in_triton(gate, up):
    size = triton.next_power_of_2(gate.numel())
    padded = [torch.nn.functional.pad(x.flatten(), (0, size - x.numel())) for x in (gate, up)]
    h = torch.empty_like(padded[0])
    gated_kernel[(1,)](*padded, h, size)
    return h[: gate.numel()].view(gate.shape)


def compare(launch, x, values, fmt, tile, power_of_two, remembered, rows=True, columns=True):
    """`launch(outputs)` fills what the reference makes of `values`, and nothing beyond; returns it."""
    actual, untouched = guarded(allocate(x, fmt, tile, rows, columns))
    launch(fmt, tile, power_of_two, remembered, actual)
    assert untouched(), "the kernel wrote beyond its outputs"
    expected = allocate(x, fmt, tile, rows, columns)
    fill_by_reference(values, fmt, tile, power_of_two, remembered, expected)
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        if expected.row_scale.isfinite().all() or name not in ("rows", "columns"):
            assert_same(a, e, name)


def check_gated(gate, up, fmt, tile, power_of_two=False, remembered=None, **wanted):
    def launch(*how):
        launch_gated(followed_by_nan(gate), followed_by_nan(up), *how)

    compare(launch, gate, gated_in_triton(gate, up), fmt, tile, power_of_two, remembered, **wanted)


def check_normed(x, gain, fmt, tile, power_of_two=False, remembered=None, eps=EPS, values=True, **wanted):
    y = torch.full_like(x, torch.nan) if values else x.new_empty(0)
    rstd = torch.empty(x.shape[0], 1)

    def launch(fmt, tile, power_of_two, remembered, outputs):
        given = followed_by_nan(x), followed_by_nan(gain[None])[0], eps
        launch_normed(*given, fmt, tile, power_of_two, remembered, y, rstd, outputs)

    first = (gain.float() * (rstd_of(x, eps) * x.float())).to(x.dtype)
    compare(launch, x, first, fmt, tile, power_of_two, remembered, **wanted)
    assert torch.equal(rstd, rstd_of(x, eps))
    exact = (x.double().square().mean(1, keepdim=True) + eps).rsqrt()
    assert (rstd - exact).abs().le(exact * 2.0**-21).all()
    if values:
        assert_same(y, first, "values")
    return rstd


def rstd_of(x, eps):
    """What the kernel's first loop makes of x, on its own."""
    rstd, (bm, bk) = torch.empty(x.shape[0], 1), norm.BAND
    grid = (triton.cdiv(x.shape[0], bm),)
    norm.norm_kernel[grid](x, x, None, rstd, None, None, None, None, *x.shape, eps, tl.float8e4nv, bm, bk)
    return rstd


def operands(shape, dtype=torch.bfloat16):
    return wild(shape, dtype, seed=1), wild(shape, dtype, seed=2)


@kinds_of_shapes
@all_tiles
def test_swiglu(fmt, power_of_two, tile, shape):
    check_gated(*operands(shape), fmt, tile, power_of_two)


@kinds_of_shapes
@all_tiles
def test_rms_norm(fmt, power_of_two, tile, shape):
    check_normed(wild(shape), 1 + torch.randn(shape[1]).bfloat16(), fmt, tile, power_of_two)


@all_tiles
@layouts
def test_one_layout(tile, rows, columns):
    check_gated(*operands((40, 140)), E4M3, tile, rows=rows, columns=columns)
    gain = 1 + torch.randn(140).bfloat16()
    check_normed(wild((40, 140)), gain, E4M3, tile, values=False, rows=rows, columns=columns)


@all_tiles
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes(tile, dtype):
    gate, up = (x.clamp(-100, 100) for x in operands((70, 150), dtype))
    check_gated(gate, up, E4M3, tile)
    check_normed(up, 1 + torch.randn(150).to(dtype), E4M3, tile)


@pytest.mark.parametrize(
    ("fmt", "power_of_two", "rows", "columns", "scale"),
    [
        (E4M3, False, True, True, 0.02),
        (E5M2, True, True, True, 0.02),
        (E4M3, False, True, False, 0.3),
        (E4M3, False, False, True, 2.0**-126),
        (E4M3, False, True, True, 0.0),
        (E5M2, True, True, True, 0.0),
        (E4M3, False, True, True, float("nan")),
    ],
)
def test_a_remembered_scale(fmt, power_of_two, rows, columns, scale):
    """Without one, 0, the amax's is used; the two passes of a norm agree on its result."""
    remembered, wanted = torch.tensor(scale), {"rows": rows, "columns": columns}
    gate, up = operands((70, 150))
    check_gated(gate, up.clamp(-9, 9), fmt, WHOLE, power_of_two, remembered, **wanted)
    check_normed(gate, 1 + torch.randn(150).bfloat16(), fmt, WHOLE, power_of_two, remembered, **wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("remembered", [None, torch.tensor(0.5)], ids=["current", "delayed"])
def test_what_is_not_finite_shows(value, remembered):
    gate, up = operands((40, 140))
    up[3, 5] = value
    made = allocate(up, E4M3, WHOLE, True, True)
    launch_gated(gate, up, E4M3, WHOLE, False, remembered, made)
    assert not made.row_scale.isfinite()
    made = allocate(up, E4M3, WHOLE, True, True)
    gain, rstd = torch.ones(140).bfloat16(), torch.empty(40, 1)
    launch_normed(up, gain, EPS, E4M3, WHOLE, False, remembered, up.new_empty(0), rstd, made)
    # A row with an inf has rstd 0, hence NaN for it.
    assert not made.row_scale.isfinite()


def test_zeros_with_and_without_eps():
    x, gain = torch.zeros(33, 130).bfloat16(), torch.ones(130).bfloat16()
    check_normed(x, gain, E4M3, WHOLE)
    made, rstd = allocate(x, E4M3, WHOLE, True, False), torch.empty(33, 1)
    x[:] = 1.0  # and rows beyond the 33rd, which no one has, have none either: their rstd is inf
    launch_normed(x, gain, 0.0, E4M3, WHOLE, False, None, x.new_empty(0), rstd, made)
    assert made.amax == 1.0


def test_silu_is_good_to_a_few_units_of_fp32():
    """For every bf16 gate: against fp64, beside torch's own, in units of 2^-24 of the result."""
    gate = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gate = gate[gate.isfinite()].float()
    exact = gate.double() / (1 + (-gate.double()).exp())
    ours = gated_in_triton(gate, torch.ones_like(gate)).double()
    normal = (gate > -87) & (gate != 0)  # beyond it exp(-x) is beyond fp32, and the quotient 0, as torch's is
    errors = ((ours - exact).abs() / exact.abs())[normal] * 2**24
    assert errors.max() < 8
    # In bf16 nearly all are torch's own, and none is further off than a unit of its last place.
    plain = gated(gate.bfloat16(), torch.ones_like(gate).bfloat16()).view(torch.int16).int()
    mine = gated_in_triton(gate.bfloat16(), torch.ones_like(gate).bfloat16()).view(torch.int16).int()
    assert (plain - mine).abs().max() <= 1
    assert (plain != mine).float().mean() < 1e-3
    # So are products: silu is rounded before.
    g, u = torch.randn(1 << 15).bfloat16(), torch.randn(1 << 15).bfloat16()
    assert (gated(g, u) != gated_in_triton(g, u)).float().mean() < 1e-3


def test_the_norm_is_torchs():
    """By rstd within 2^-21 and equal otherwise: of bf16's results nearly all are `F.rms_norm`'s."""
    x, gain = torch.randn(64, 384).bfloat16(), (1 + 0.1 * torch.randn(384)).bfloat16()
    theirs = torch.nn.functional.rms_norm(x, (384,), gain, EPS)
    y, _ = normed(x, gain, EPS)
    assert_same(y, theirs)
    rstd = check_normed(x, gain, E4M3, (1, 128))
    ours = (gain.float() * (rstd * x.float())).bfloat16()
    assert (ours != theirs).float().mean() < 1e-3
    assert (ours.float() - theirs.float()).abs().le(theirs.float().abs() * 2.0**-7).all()


LONG = 2**30 + 16


def test_offsets_beyond_two_to_the_31():
    """Three rows whose elements lie 2^30 apart; memory that nobody touches costs nothing."""
    near, gain = wild((3, 128)), torch.ones(128).bfloat16()
    far, other = (torch.empty(3, LONG, dtype=torch.bfloat16) for _ in range(2))
    far[:, :128] = near
    other[:, :128] = near.flip(0)
    rows, scales = torch.empty(3, LONG, dtype=E4M3.dtype), torch.empty(1, 3)
    tiles.pieces_kernel[(1,)](far, other, None, rows, None, scales, None, 3, LONG, tl.float8e4nv, False, 128, 128)
    h = gated_in_triton(near, near.flip(0))
    assert_same(rows[:, :128].contiguous(), quantize_to(h, E4M3, scales.t()))
    # The transposed codes of 2^30 rows of three: the third column of codes begins beyond 2^31.
    near, gain, tall = wild((2, 3)), torch.ones(3).bfloat16(), torch.empty(3, LONG, dtype=E4M3.dtype)
    amax, rstd, scale = torch.zeros((), dtype=torch.int32), torch.empty(LONG), torch.tensor(0.5)
    norm.norm_kernel[(1,)](near, gain, None, rstd, None, tall, amax, scale, LONG, 3, EPS, tl.float8e4nv, 2, 128)
    y = (gain.float() * (rstd[:2, None] * near.float())).bfloat16()
    assert_same(tall[:, :2].contiguous(), quantize_to(y, E4M3, scale).t().contiguous())
