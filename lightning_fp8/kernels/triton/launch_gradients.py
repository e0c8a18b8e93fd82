"""How the passes of a gradient reduction are launched: once for all tensors of a bucket."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_fp8.kernels.triton.gradients import TILE, accumulate_kernel, decode_kernel, encode_kernel
from lightning_fp8.kernels.triton.table import on_device
from lightning_fp8.numerics.formats import E4M3, Format

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_WARPS = 8


def encode(gradients: Sequence[Tensor], scale: Tensor, fmt: Format, codes: Tensor, underflown: Tensor) -> None:
    """Fills `codes`, and adds to `underflown`, as `kernels.gradients.encode` returns them."""
    table, options = _tensors(gradients, codes)
    if options:
        encode_kernel[table[0]](*table[1:], codes, scale, underflown, len(gradients), FP8=_fp8(fmt), **options)


def decode(gradients: Sequence[Tensor], codes: Tensor, factors: Tensor, fmt: Format) -> None:
    """Writes codes times the factors of their tensors into `gradients`."""
    table, options = _tensors(gradients, codes)
    if options:
        decode_kernel[table[0]](*table[1:], codes, factors, len(gradients), FP8=_fp8(fmt), **options)


def accumulate(
    codes: Tensor,
    starts: Sequence[int],
    stops: Sequence[int],
    headroom: Tensor,
    fmt: Format,
    result: Tensor,
    saturated: Tensor,
    underflown: Tensor,
) -> None:
    """Fills `result`, and adds to the counts, as `kernels.gradients.accumulate` returns them."""
    edges = tuple(zip(starts, stops, strict=True))
    aligned = all(number % 16 == 0 for number in (*starts, *stops, codes.shape[1]))
    first = _firsts([stop - start for start, stop in edges])
    if not first[-1]:
        return
    accumulate_kernel[(first[-1],)](
        on_device(edges, torch.int64, codes.device),
        on_device(first[:-1], torch.int32, codes.device),
        codes,
        result,
        headroom,
        saturated,
        underflown,
        *codes.shape,
        len(edges),
        FP8=_fp8(fmt),
        **_options(16 if aligned else 1, len(edges)),
    )


def _tensors(gradients: Sequence[Tensor], codes: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The grid, the table and the beginnings of tensors that lie end to end in `codes`, and options; none if empty.

    Raises:
        ValueError: A tensor is not contiguous, or they are of several dtypes.
    """
    (dtype,) = {g.dtype for g in gradients} if len({g.dtype for g in gradients}) == 1 else (None,)
    if dtype not in _TYPES or not all(g.is_contiguous() for g in gradients):
        raise ValueError("FP8 gradient reduction takes contiguous gradients of one dtype: bf16, fp16 or fp32.")
    sizes = [g.numel() for g in gradients]
    rows = tuple(zip((g.data_ptr() for g in gradients), sizes, itertools.accumulate([0, *sizes]), strict=False))
    first = _firsts(sizes)
    if not first[-1]:
        return (), {}
    aligned = all(number % 16 == 0 for row in rows for number in row)
    table = (first[-1],), on_device(rows, torch.int64, codes.device), on_device(first[:-1], torch.int32, codes.device)
    return table, {"TYPE": _TYPES[dtype], **_options(16 if aligned else 1, len(rows))}


def _firsts(sizes: Sequence[int]) -> tuple[int, ...]:
    """The first program of each tensor, and how many there are."""
    return tuple(itertools.accumulate([0, *(triton.cdiv(size, TILE) for size in sizes)]))


def _options(alignment: int, tensors: int) -> dict[str, Any]:
    padded = triton.next_power_of_2(tensors)
    return {"ALIGNMENT": alignment, "PADDED": padded, "TILE": TILE, "num_warps": _WARPS}


def _fp8(fmt: Format) -> Any:
    return tl.float8e4nv if fmt is E4M3 else tl.float8e5
