"""The passes over memory of a gradient reduction in FP8: quantise, accumulate, decode.

What they are for, and how exact they are, is told in `distributed/reduction.py`. Each is one launch for all tensors of
a bucket on a GPU (`triton/gradients.py`), and elsewhere the operations of the reference, tensor by tensor; codes and
counts are equal. Sums of ranks are made in the order of the ranks, so they do not depend on who makes them.

The three operators of `torch.ops.lightning_fp8` behind them have fake implementations: graphs and fake tensors see a
pass as one step.
"""

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fp8 import hardware
from lightning_fp8.numerics import FORMATS, Format
from lightning_fp8.numerics.quantize import decode, quantize_to


class Counts(NamedTuple):
    """What casts did to the elements of P tensors.

    Attributes:
        saturated: int32 [P], values beyond the format's largest.
        underflown: int32 [P], values other than 0 whose code is 0.
    """

    saturated: Tensor
    underflown: Tensor


def _has_kernel(x: Tensor, gradients: Sequence[Tensor] = ()) -> bool:
    """Which of the two runs is decided here and nowhere else."""
    return x.is_cuda and hardware.runs_kernels() and all(g.is_contiguous() for g in gradients)


def encode(gradients: Sequence[Tensor], scale: Tensor, fmt: Format, length: int) -> tuple[Tensor, Counts]:
    """What a rank sends.

    Args:
        gradients: P tensors of any float dtype.
        scale: fp32 [P], s.
        fmt: The format on the wire.
        length: Bytes to send; at least as many as there are elements, the rest is zero.

    Returns:
        uint8 [length], the codes of all elements in order, and what the casts did.
    """
    if _has_kernel(scale, gradients) and hardware.compiles_gradient_casts():
        codes, lost = torch.ops.lightning_fp8.encode_gradients(list(gradients), scale, fmt.name, length)
    else:
        codes, lost = _encode(list(gradients), scale, fmt.name, length)
    return codes, Counts(torch.zeros_like(lost), lost)


def accumulate(codes: Tensor, tensors: Sequence[slice], headroom: Tensor, fmt: Format) -> tuple[Tensor, Counts]:
    """What the owner of a chunk makes of it.

    Args:
        codes: uint8 [N, C], the chunk as every rank has sent it.
        tensors: Where in the chunk each of the P tensors lies; empty where it does not.
        headroom: fp32 [P], mu.
        fmt: The format on the wire.

    Returns:
        uint8 [C], the codes b, and what the casts did.
    """
    run = torch.ops.lightning_fp8.accumulate_gradients if _has_kernel(codes) else _accumulate
    result, *counts = run(codes, [t.start for t in tensors], [t.stop for t in tensors], headroom, fmt.name)
    return result, Counts(*counts)


def decode_into(
    gradients: Sequence[Tensor], codes: Tensor, scale: Tensor, headroom: Tensor, ways: int, fmt: Format
) -> None:
    """Writes the means over into `gradients`.

    Args:
        gradients: P tensors of any float dtype.
        codes: uint8, b of all elements in order; what is beyond the last is left out.
        scale: fp32 [P], s.
        headroom: fp32 [P], mu.
        ways: Ranks, N.
        fmt: The format on the wire.
    """
    run = torch.ops.lightning_fp8.decode_gradients if _has_kernel(codes, gradients) else _decode
    run(list(gradients), codes, scale / (headroom * ways), fmt.name)


def _encode(gradients: list[Tensor], scale: Tensor, format: str, length: int) -> tuple[Tensor, Tensor]:
    codes = torch.zeros(length, dtype=torch.uint8, device=scale.device)
    underflown, start = [], 0
    for g, s in zip(gradients, scale, strict=True):
        part = codes[start : start + g.numel()]
        part.copy_(quantize_to(g.reshape(-1), FORMATS[format], s).view(torch.uint8))
        underflown.append(_underflown(part, g.reshape(-1)))
        start += g.numel()
    return codes, torch.stack(underflown).int() * scale.isfinite()


def _accumulate(
    codes: Tensor, starts: list[int], stops: list[int], headroom: Tensor, format: str
) -> tuple[Tensor, Tensor, Tensor]:
    fmt, result = FORMATS[format], torch.zeros_like(codes[0])
    saturated, underflown = [], []
    for start, stop, mu in zip(starts, stops, headroom, strict=True):
        values = decode(codes[:, start:stop].view(fmt.dtype), torch.float32)
        sums = functools.reduce(operator.add, values.unbind()) * mu
        part = result[start:stop]
        part.copy_(quantize_to(sums, fmt, torch.ones_like(mu)).view(torch.uint8))
        saturated.append((sums.abs() > fmt.max).sum())
        underflown.append(_underflown(part, sums))
    return result, torch.stack(saturated).int(), torch.stack(underflown).int()


def _decode(gradients: list[Tensor], codes: Tensor, factors: Tensor, format: str) -> None:
    start = 0
    for g, factor in zip(gradients, factors.unbind(), strict=True):
        part = codes[start : start + g.numel()].view(FORMATS[format].dtype)
        g.copy_((decode(part.unsqueeze(0), torch.float32) * factor).view(g.shape))
        start += g.numel()


def _underflown(codes: Tensor, values: Tensor) -> Tensor:
    # The sign bit apart, zero is the code 0 in both formats.
    return ((codes & 0x7F == 0) & (values != 0)).sum()


_TAG = torch.Tag.pt2_compliant_tag
for _signature in (
    "encode_gradients(Tensor[] gradients, Tensor scale, str format, int length) -> (Tensor codes, Tensor underflown)",
    "accumulate_gradients(Tensor codes, int[] starts, int[] stops, Tensor headroom, str format)"
    " -> (Tensor codes, Tensor saturated, Tensor underflown)",
    "decode_gradients(Tensor(a!)[] gradients, Tensor codes, Tensor factors, str format) -> ()",
):
    torch.library.define(f"lightning_fp8::{_signature.split('(')[0]}", _signature[_signature.index("(") :], tags=_TAG)
torch.library.impl("lightning_fp8::encode_gradients", "cpu", _encode)
torch.library.impl("lightning_fp8::accumulate_gradients", "cpu", _accumulate)
torch.library.impl("lightning_fp8::decode_gradients", "cpu", _decode)


def _new_codes(gradients: list[Tensor], scale: Tensor, format: str, length: int) -> tuple[Tensor, Tensor]:
    return scale.new_zeros(length, dtype=torch.uint8), torch.zeros_like(scale, dtype=torch.int32)


def _new_sums(
    codes: Tensor, starts: list[int], stops: list[int], headroom: Tensor, format: str
) -> tuple[Tensor, Tensor, Tensor]:
    counts = torch.zeros_like(headroom, dtype=torch.int32)
    return torch.zeros_like(codes[0]), counts, torch.zeros_like(counts)


torch.library.register_fake("lightning_fp8::encode_gradients", _new_codes)
torch.library.register_fake("lightning_fp8::accumulate_gradients", _new_sums)
torch.library.register_fake("lightning_fp8::decode_gradients", lambda *_: None)


@torch.library.impl("lightning_fp8::encode_gradients", "cuda")
def _encode_by_kernel(gradients: list[Tensor], scale: Tensor, format: str, length: int) -> tuple[Tensor, Tensor]:
    from lightning_fp8.kernels.triton import launch_gradients

    outputs = _new_codes(gradients, scale, format, length)
    with hardware.device_of(scale):
        launch_gradients.encode(gradients, scale, FORMATS[format], *outputs)
    return outputs


@torch.library.impl("lightning_fp8::accumulate_gradients", "cuda")
def _accumulate_by_kernel(
    codes: Tensor, starts: list[int], stops: list[int], headroom: Tensor, format: str
) -> tuple[Tensor, Tensor, Tensor]:
    from lightning_fp8.kernels.triton import launch_gradients

    outputs = _new_sums(codes, starts, stops, headroom, format)
    with hardware.device_of(codes):
        launch_gradients.accumulate(codes, starts, stops, headroom, FORMATS[format], *outputs)
    return outputs


@torch.library.impl("lightning_fp8::decode_gradients", "cuda")
def _decode_by_kernel(gradients: list[Tensor], codes: Tensor, factors: Tensor, format: str) -> None:
    from lightning_fp8.kernels.triton import launch_gradients

    with hardware.device_of(codes):
        launch_gradients.decode(gradients, codes, factors, FORMATS[format])
