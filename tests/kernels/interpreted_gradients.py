"""The passes of a gradient reduction against their reference in Triton's interpreter: run by `test_interpreter.py`."""

import os

import pytest
import torch

from lightning_fp8.kernels import gradients as reference
from lightning_fp8.kernels.triton import gradients as kernels
from lightning_fp8.kernels.triton import launch_gradients
from lightning_fp8.numerics import E4M3, E5M2, FORMATS
from lightning_fp8.numerics.quantize import amax, scale_of

assert os.environ.get("TRITON_INTERPRET") == "1"

GUARD = 64
all_formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
# Sizes whose tensors begin on 16 bytes and others; some empty, some longer than a program.
SIZES = {"aligned": (160, 0, 5008, 16), "ragged": (1000, 1, 0, 333, 4097), "empty": (0, 0), "one": (7,)}
sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def wild(sizes, dtype=torch.bfloat16, seed=0):
    """Tensors in one memory, with NaN between them, whose elements differ by many orders."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        memory = torch.full((-(-size // 16) * 16 + GUARD,), torch.nan, dtype=dtype)
        x = memory[:size]
        x.copy_(torch.randn(size, generator=generator) * torch.randn(size, generator=generator).mul(3).exp2())
        found.append(x)
    return found


def guarded(size):
    memory = torch.full((size + GUARD,), 9, dtype=torch.uint8)
    memory[:size] = 0
    return memory


def same_codes(a, b):
    """Equal, but for the sign of NaN."""
    nan = ((a & 0x7F) == 0x7F) & ((b & 0x7F) == 0x7F)
    return bool(((a == b) | nan).all())


@all_formats
@sizes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_encode(fmt, sizes, dtype):
    gradients = wild(sizes, dtype)
    scale = torch.stack([scale_of(amax(g), fmt) for g in gradients])
    length = sum(sizes) + 3
    memory, underflown = guarded(length), torch.zeros(len(sizes), dtype=torch.int32)
    launch_gradients.encode(gradients, scale, fmt, memory[:length], underflown)
    codes, counts = reference.encode(gradients, scale, fmt, length)
    assert torch.equal(memory[:length], codes)
    assert (memory[length:] == 9).all()
    assert torch.equal(underflown, counts.underflown)
    assert counts.underflown.sum() > 0 or sum(sizes) < 1000 or fmt is E5M2


@all_formats
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_reaches_everyone(fmt, value):
    gradients = wild((64, 48))
    gradients[0][5] = value
    scale = torch.stack([torch.tensor(torch.inf), scale_of(amax(gradients[1]), fmt)])
    memory, underflown = guarded(112), torch.zeros(2, dtype=torch.int32)
    launch_gradients.encode(gradients, scale, fmt, memory[:112], underflown)
    codes, counts = reference.encode(gradients, scale, fmt, 112)
    assert same_codes(memory[:112], codes)
    assert torch.equal(underflown, counts.underflown)
    result = [torch.empty_like(g) for g in gradients]
    launch_gradients.decode(result, memory[:112], scale, fmt)
    assert result[0].isnan().all()
    assert result[1].isfinite().all()


def every_code(fmt, ranks):
    """[ranks, 256], each rank with another order; NaN where all have it, without infinities."""
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes[codes.view(fmt.dtype).float().isfinite()]
    return torch.stack([finite.roll(37 * rank) for rank in range(ranks)])


@all_formats
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("headroom", [1.0, 0.3])
def test_accumulate(fmt, ranks, headroom):
    codes = every_code(fmt, ranks).repeat(1, 20)
    edges = [slice(0, 64), slice(64, 64), slice(64, 67), slice(67, 4900), slice(4900, 4950)]  # and a rest
    mu = torch.tensor([headroom, 1.0, 1.0, headroom, 0.5])
    memory, counts = guarded(codes.shape[1]), [torch.zeros(5, dtype=torch.int32) for _ in range(2)]
    starts, stops = [e.start for e in edges], [e.stop for e in edges]
    launch_gradients.accumulate(codes, starts, stops, mu, fmt, memory[:-GUARD], *counts)
    result, expected = reference.accumulate(codes, edges, mu, fmt)
    assert torch.equal(memory[:-GUARD], result)
    assert (memory[-GUARD:] == 9).all()
    assert torch.equal(counts[0], expected.saturated)
    assert torch.equal(counts[1], expected.underflown)
    assert expected.saturated.sum() > 0 or ranks == 1 or headroom < 1


def test_accumulate_in_aligned_chunks_and_with_nan():
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 20)
    for fmt in FORMATS.values():
        result, counts = torch.zeros(5120, dtype=torch.uint8), [torch.zeros(2, dtype=torch.int32) for _ in range(2)]
        mu = torch.tensor([1.0, 1 / 3])
        launch_gradients.accumulate(codes, [0, 256], [256, 5120], mu, fmt, result, *counts)
        expected, _ = reference.accumulate(codes, [slice(0, 256), slice(256, 5120)], mu, fmt)
        finite = codes[0].view(fmt.dtype).float().isfinite()
        assert torch.equal(result[finite], expected[finite])
        assert ((result & 0x7F) == 0x7F)[codes[0].view(fmt.dtype).float().isnan()].all()


@all_formats
@sizes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_decode(fmt, sizes, dtype):
    total = sum(sizes)
    codes = every_code(fmt, 1)[0].repeat(40)[:total].contiguous()
    factors = torch.rand(len(sizes), generator=torch.Generator().manual_seed(1)) * 1e-3
    results, expected = wild(sizes, dtype), wild(sizes, dtype)
    launch_gradients.decode(results, codes, factors, fmt)
    reference._decode(expected, codes, factors, fmt.name)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_gradients_of_several_dtypes_are_refused():
    mixed = [*wild((16,)), *wild((16,), torch.float32)]
    with pytest.raises(ValueError, match="one dtype"):
        launch_gradients.encode(mixed, torch.ones(2), E4M3, torch.empty(32, dtype=torch.uint8), torch.zeros(2).int())


def test_offsets_beyond_two_to_the_31():
    """A tensor behind 2^31 others; memory that nobody touches costs nothing."""
    far, size = 2**31 + 16, 48
    codes = torch.empty(far + size, dtype=torch.uint8)
    gradient, scale = wild((size,))[0], torch.tensor([0.01])
    table, first = torch.tensor([[gradient.data_ptr(), size, far]]), torch.zeros(1, dtype=torch.int32)
    lost, tl = torch.zeros(1, dtype=torch.int32), kernels.tl
    kernels.encode_kernel[(1,)](table, first, codes, scale, lost, 1, tl.bfloat16, tl.float8e4nv, 16, 1, 64)
    assert torch.equal(codes[far:], reference.encode([gradient], scale, E4M3, size)[0])
    result = torch.empty(far + size, dtype=torch.uint8)
    edges = torch.tensor([[far, far + size]])
    counts = [torch.zeros(1, dtype=torch.int32) for _ in range(2)]
    shared = torch.ones(1)
    kernels.accumulate_kernel[(1,)](
        edges, first, codes, result, shared, *counts, 1, far + size, 1, tl.float8e4nv, 16, 1, 64
    )
    assert torch.equal(result[far:], codes[far:])
    decoded = torch.empty(size, dtype=torch.bfloat16)
    table = torch.tensor([[decoded.data_ptr(), size, far]])
    kernels.decode_kernel[(1,)](table, first, codes, scale, 1, tl.bfloat16, tl.float8e4nv, 16, 1, 64)
    expected = torch.empty_like(decoded)
    reference._decode([expected], codes[far:], scale, "e4m3")
    assert torch.equal(decoded, expected)
