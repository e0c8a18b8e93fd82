"""The arithmetic of the reduction, all ranks in one process; references are in fp64."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fp8.distributed.reduction import (
    SATURATED_SHARE,
    Counts,
    accumulate,
    bytes_sent,
    chunk_length,
    decode_into,
    encode,
    largest_magnitudes,
    next_headroom,
    shared_scale,
    within_chunk,
)
from lightning_fp8.numerics import E4M3, E5M2, FORMATS, Format
from lightning_fp8.numerics.quantize import decode

SIZES = (1000, 1, 0, 333, 64)


def reduce(
    ranks: Sequence[Sequence[Tensor]], fmt: Format = E4M3, mu: float | None = None
) -> tuple[list[Tensor], Counts, Counts]:
    """What every rank gets, and what the casts on the way there and back did."""
    ways, sizes = len(ranks), [g.numel() for g in ranks[0]]
    chunk = chunk_length(sum(sizes), ways)
    headroom = torch.full((len(sizes),), 1 / ways if mu is None else mu)
    largest = torch.stack([largest_magnitudes(own) for own in ranks]).amax(0)
    scale = shared_scale(largest, fmt)
    sent = [encode(own, scale, fmt, ways * chunk) for own in ranks]
    codes = torch.stack([codes for codes, _ in sent]).view(ways, ways, chunk)
    returned = [
        accumulate(codes[:, rank], list(within_chunk(sizes, rank * chunk, (rank + 1) * chunk)), headroom, fmt)
        for rank in range(ways)
    ]
    result = [torch.empty_like(g) for g in ranks[0]]
    decode_into(result, torch.cat([codes for codes, _ in returned]), scale, headroom, ways, fmt)
    there, back = ([c for _, c in counts] for counts in (sent, returned))
    add = [Counts(*(torch.stack(column).sum(0) for column in zip(*counts, strict=True))) for counts in (there, back)]
    return result, add[0], add[1]


def gradients(ways: int, magnitude: float = 1.0, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """Log-normal sizes over many octaves within a tensor, tensors of other magnitudes, ranks half alike."""
    generator = torch.Generator().manual_seed(ways)
    common = [torch.randn(size, generator=generator) for size in SIZES]
    ranks = []
    for _ in range(ways):
        spread = [torch.randn(size, generator=generator).mul(3).exp2() for size in SIZES]
        own = [torch.randn(size, generator=generator) for size in SIZES]
        parts = zip(common, own, spread, strict=True)
        ranks.append([((c + o) * s * magnitude * 10.0**i).to(dtype) for i, (c, o, s) in enumerate(parts)])
    return ranks


def bound(ranks: list[Tensor], fmt: Format, mu: float) -> Tensor:
    """The bound of `reduction.py`, in fp64, with 2^-20 for what fp32 rounds."""
    u, z = 2.0 ** -(fmt.mantissa_bits + 1), fmt.min_subnormal / 2
    stacked = torch.stack(ranks).double()
    s = stacked.abs().amax() / fmt.max if stacked.numel() else torch.ones(())
    sending = (u * stacked.abs()).clamp_min(z * s).mean(0)
    returning = (u * (stacked.mean(0).abs() + sending)).clamp_min(z * s / (mu * len(ranks)))
    return (sending + returning) * (1 + 2.0**-20) + stacked.abs().mean(0) * 2.0**-20


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-5, 1.0, 1e20])
@pytest.mark.parametrize("ways", [2, 3, 4, 8])
def test_error_is_within_the_bound(ways: int, magnitude: float, fmt: Format) -> None:
    ranks = gradients(ways, magnitude)
    result, _, _ = reduce(ranks, fmt)
    for found, own in zip(result, zip(*ranks, strict=True), strict=True):
        error = (found.double() - torch.stack(own).double().mean(0)).abs()
        assert (error <= bound(list(own), fmt, 1 / ways)).all()


def test_bound_is_not_loose() -> None:
    """Some element comes within two thirds of it, so that half the precision would not pass."""
    ranks = gradients(2)
    result, _, _ = reduce(ranks)
    closest = max(
        float(((r.double() - torch.stack(own).double().mean(0)).abs() / bound(list(own), E4M3, 0.5)).max())
        for r, own in zip(result, zip(*ranks, strict=True), strict=True)
        if r.numel()
    )
    assert closest > 2 / 3


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_every_pair_of_codes(fmt: Format) -> None:
    """Two ranks, every finite value each: the mean is the fp64 mean, rounded to nearest even once."""
    values = decode(torch.arange(256, dtype=torch.uint8).view(1, -1).view(fmt.dtype), torch.float32)[0]
    values = values[values.isfinite()]
    a, b = (x.flatten() for x in torch.meshgrid(values, values, indexing="ij"))
    result, sent, _ = reduce([[a], [b]], fmt)
    exact = ((a.double() + b.double()) / 2).float()  # representable: both are multiples of 2^-17 below 2^16
    assert torch.equal(result[0], exact.to(fmt.dtype).float())
    assert sent.underflown.tolist() == [0]


def test_headroom_uses_the_format_for_small_sums() -> None:
    """Gradients that cancel leave a sum far below them, which mu = 1 keeps and mu = 1 / N loses."""
    fmt, ways = E4M3, 8
    small = fmt.min_subnormal
    ranks = [[torch.tensor([448.0, small if rank == 0 else 0.0])] for rank in range(ways)]
    assert reduce(ranks, mu=1 / ways)[0][0][1] == 0
    cancelling = [[torch.tensor([448.0 * (-1) ** rank, small if rank == 0 else 0.0])] for rank in range(ways)]
    assert reduce(cancelling, mu=1.0)[0][0].tolist() == [0.0, small / ways]


@pytest.mark.parametrize("mu", [1 / 4, 0.5, 1.0])
def test_what_saturates_keeps_its_share(mu: float) -> None:
    ranks = [[torch.tensor([3.0, -3.0, 0.1])] for _ in range(4)]
    result, _, counts = reduce(ranks, mu=mu)
    assert counts.saturated.tolist() == [2 if mu > 1 / 4 else 0]
    assert torch.allclose(result[0][:2], torch.tensor([3.0, -3.0]) / (mu * 4))
    assert 0.1 * (1 - 2**-3) < result[0][2] < 0.1 * (1 + 2**-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_reaches_every_element(bad: float) -> None:
    ranks = gradients(3)
    ranks[1][3][7] = bad
    result, sent, _ = reduce(ranks)
    assert result[3].isnan().all()
    assert all(r.isfinite().all() for i, r in enumerate(result) if i != 3)
    assert sent.underflown[3] == 0
    assert largest_magnitudes([torch.tensor([1.0, bad])]).tolist() == [torch.inf]


def test_zeros_stay_zero_and_a_rank_of_zeros_counts() -> None:
    zeros = [torch.zeros(size) for size in SIZES]
    result, sent, returned = reduce([zeros, zeros])
    assert all(torch.equal(r, z) for r, z in zip(result, zeros, strict=True))
    assert sent.underflown.sum() == returned.underflown.sum() == 0
    (one, _), values = gradients(2), [torch.full((size,), 448.0) for size in SIZES]
    result, _, _ = reduce([values, zeros])
    assert all((r == 224).all() for r in result)
    assert [r.shape for r in result] == [g.shape for g in one]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_rounded_once(dtype: torch.dtype) -> None:
    ranks = [[g.clamp(-100, 100) for g in own] for own in gradients(2, 1e-3, dtype)]
    result, _, _ = reduce(ranks)
    wide, _, _ = reduce([[g.float() for g in own] for own in ranks])
    assert all(torch.equal(r, w.to(dtype)) for r, w in zip(result, wide, strict=True))


def test_counts_are_those_of_a_loop() -> None:
    one, other = [448.0, 448.0, 2.0**-11, -(2.0**-11), 0.0, 2.0**-9], [448.0, 300.0, 0.0, 0.0, 0.0, 0.0]
    ranks = [[torch.tensor(one)], [torch.tensor(other)]]
    _, sent, returned = reduce(ranks, mu=1.0)
    assert sent.underflown.tolist() == [2]  # half of 2^-9 and less is lost
    assert returned.saturated.tolist() == [2]  # 896 and 748 do not fit
    assert returned.underflown.tolist() == [0]
    _, _, returned = reduce(ranks, mu=0.5)
    assert returned.underflown.tolist() == [1]  # 2^-10, a tie, to even


def test_headroom_halves_and_recovers() -> None:
    sizes, mu = torch.tensor([10**6, 10**6]), torch.tensor([0.8, 0.8])
    limit = round(SATURATED_SHARE * 10**6)
    assert limit == 10
    halved = next_headroom(mu, torch.tensor([limit + 1, limit]), sizes, 8)
    assert halved[0] == mu[0] / 2
    assert halved[1] > mu[1]
    mu = torch.tensor([0.2, 0.9])
    for _ in range(1000):
        mu = next_headroom(mu, torch.zeros(2), sizes, 8)
    assert mu[0].item() == pytest.approx(0.4, rel=1e-3)
    assert mu[1] == 1
    assert next_headroom(torch.tensor([0.125, 0.2]), sizes, sizes, 8).tolist() == [0.125, 0.125]


def test_headroom_settles_below_saturation() -> None:
    """Ranks that agree push it back to where nothing saturates; then it tries again, slowly."""
    ranks, mu, steps = [[torch.randn(1000, generator=torch.Generator().manual_seed(0))] for _ in range(4)], 1.0, []
    for _ in range(12):
        _, _, counts = reduce(ranks, mu=mu)
        mu = float(next_headroom(torch.tensor([mu]), counts.saturated, torch.tensor([1000]), 4))
        steps.append(mu)
    assert steps[0] == 0.5
    assert min(steps) == 0.25
    assert max(steps[2:]) < 0.26


def test_chunks_hold_everything_once() -> None:
    assert [chunk_length(n, 4) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    for ways in range(1, 6):
        for sizes in ([5, 0, 1, 7], [1], [0], [2, 2], [0, 3, 0, 0, 1]):
            chunk = chunk_length(sum(sizes), ways)
            seen = [0] * len(sizes)
            for rank in range(ways):
                parts = list(within_chunk(sizes, rank * chunk, (rank + 1) * chunk))
                assert all(0 <= part.start <= part.stop <= chunk for part in parts)
                seen = [n + part.stop - part.start for n, part in zip(seen, parts, strict=True)]
            assert seen == sizes


def test_bytes_are_half_of_bf16() -> None:
    """A bucket of DDP's, 25 MiB of Llama-3-8B in bf16: 13 M elements, at most 10 tensors."""
    for ways in (2, 8, 64, 1024):
        ring = 2 * (ways - 1) / ways * 2 * 13_107_200
        assert bytes_sent(13_107_200, 10, ways) / ring <= 0.51
    assert bytes_sent(13_107_200, 10, 1) == 0


def test_nothing_is_read_back_to_the_host() -> None:
    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket is not torch.ops.aten._local_scalar_dense
            assert func.overloadpacket is not torch.ops.aten.nonzero
            return func(*args, **(kwargs or {}))

    with Reads():
        _, _, returned = reduce(gradients(2), E5M2)
        next_headroom(torch.full((5,), 0.5), returned.saturated, torch.tensor(SIZES), 2)
