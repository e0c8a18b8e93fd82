"""Averaging gradients over N ranks with one byte an element on the wire: the arithmetic, without the wire.

No collective library sums FP8 well: gloo and older NCCL refuse it, and a sum in FP8 loses bits at every addition. So
the two halves of an all-reduce are made of transports, which move bytes, and the sum happens in fp32 in between. For
each tensor, with g_i the gradient on rank i:

    shared       s = max over ranks of amax(g_i) / format.max           the smallest of the ranks' encode scales
    encode       a_i = fp8(g_i / s)                                     cannot saturate
    all-to-all   rank r gets the r-th chunk of every a_i
    accumulate   q = a_1 + ... + a_N, fp32;  b = fp8(mu q)              by the chunk's owner alone
    all-gather   every rank gets every b, hence the same bytes
    decode       mean = b s / (mu N)

The shared scale and the headroom mu are FP8-LM's (Peng et al., 2310.18313, section 2.1). A sum of N numbers below 448
may need anything up to 448 N; mu = 1/N is always safe and mu = 1 leaves the most of the format to small sums, which
those of gradients that mostly cancel are. Each tensor starts at 1/N; where more than 0.001 % of a sum saturates, mu is
halved for the next step; else it grows, by 2 in 1000 steps, as far as 1.

Error of an element that does not saturate. With u = 2^-(mantissa bits + 1), and z half the smallest subnormal, casts
to nearest change x by at most max(u |x|, z). So, with e the error of the mean of what was sent,

    e <= (1/N) sum_i max(u |g_i|, z s)        |result - mean| <= e + max(u (|mean| + e), z s / (mu N))

besides fp32's own roundings. One that saturates keeps 1 / (mu N) of its value or more.

Casts round to nearest. Rounding stochastically is unbiased where nearest is not, below z s, but has twice the variance;
gradients carry noise of their own, which dithers the nearest rounding, so averages over steps are no better for it.
`benchmarks/gradients.py` measures both.

The passes over memory, `encode`, `accumulate` and `decode_into`, are `kernels/gradients.py`'s.

A value that is not finite on any rank makes s infinite and every element of the result NaN, on all ranks alike.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_fp8.kernels.gradients import Counts, accumulate, decode_into, encode
from lightning_fp8.numerics import Format
from lightning_fp8.numerics.quantize import amax, scale_of

__all__ = [
    "Counts",
    "accumulate",
    "bytes_sent",
    "chunk_length",
    "decode_into",
    "encode",
    "largest_magnitudes",
    "next_headroom",
    "shared_scale",
    "within_chunk",
]

SATURATED_SHARE = 1e-5  # of a tensor's sums, above which its headroom is halved
_GROWTH = 2.0 ** (1 / 1000)  # of the headroom, a step


def largest_magnitudes(gradients: Sequence[Tensor]) -> Tensor:
    """The largest |g| of each tensor, fp32 [P]; infinite where a value is not finite, as a maximum may ignore NaN."""
    return torch.stack([amax(g) for g in gradients]).nan_to_num(nan=torch.inf, posinf=torch.inf)


def shared_scale(largest: Tensor, fmt: Format) -> Tensor:
    """The decode scales s, fp32 [P], for the largest magnitudes of any rank."""
    return scale_of(largest, fmt)


def next_headroom(headroom: Tensor, saturated: Tensor, sizes: Tensor, ways: int) -> Tensor:
    """The headroom mu of the next step.

    Args:
        headroom: fp32 [P].
        saturated: int [P], sums of this step that did not fit, of all ranks.
        sizes: [P], elements of the tensors.
        ways: Ranks, N.
    """
    grown = torch.where(saturated > sizes * SATURATED_SHARE, headroom / 2, headroom * _GROWTH)
    return grown.clamp(1 / ways, 1)


def within_chunk(sizes: Sequence[int], start: int, stop: int) -> Iterator[slice]:
    """Where tensors of these `sizes`, laid end to end, lie in the chunk from `start` to `stop`."""
    end = 0
    for size in sizes:
        begin, end = end, end + size
        yield slice(*(min(max(edge, start), stop) - start for edge in (begin, end)))


def chunk_length(elements: int, ways: int) -> int:
    """Elements of the chunk that each of `ways` ranks owns; the last ones may be padding."""
    return -(-elements // ways)


def bytes_sent(elements: int, tensors: int, ways: int) -> float:
    """Bytes that a rank sends to average a bucket: the all-to-all, a ring's all-gather, the all-reduce of scales.

    The codes and, with those of the all-gather, two int32 counts a tensor; and one fp32 magnitude a tensor, of which a
    ring's all-reduce sends 2 (N - 1) / N. The same of a bf16 all-reduce is 2 (N - 1) / N * 2 bytes an element.
    """
    length = chunk_length(elements, ways)
    return (ways - 1) * (length + (length + 8 * tensors) + 2 * 4 * tensors / ways)
