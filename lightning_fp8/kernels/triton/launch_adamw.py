"""How the step of `FP8AdamW` is launched: for many parameters, or for one.

Parameters whose rows all begin on 16 bytes are stepped in one launch, the others, whose loads must be narrower, in a
second one. Their table is copied from pinned memory, which the host does not wait for, and kept: as long as gradients
lie where they lay in an earlier step, as a caching allocator's mostly do, there is nothing to copy.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_fp8.kernels.triton.adamw import COLUMNS, TILE, many_kernel, one_kernel
from lightning_fp8.numerics.moments import FP8Moments, m_levels

_TYPES = {torch.bfloat16: tl.int16, torch.float32: tl.float32}
_WARPS = 4


class Parameter(NamedTuple):
    """One parameter to step, as matrices.

    Attributes:
        weight: bf16 or fp32 [R, C].
        grad: Likewise.
        moments: Codes [R, C], numbers of blocks [R, ceil(C / block_size)].
        first_row: Its first row's number in the whole parameter.
        first_column: Likewise.
        key: Of its random bits.
    """

    weight: Tensor
    grad: Tensor
    moments: FP8Moments
    first_row: int
    first_column: int
    key: tuple[int, int]

    def tensors(self) -> tuple[Tensor, ...]:
        """Those that the kernels take, in order."""
        return self.weight, self.grad, *self.moments[:2], *self.moments[2:]

    def numbers(self) -> tuple[int, ...]:
        """Likewise."""
        return *self.weight.shape, self.first_row, self.first_column, *self.key

    def tiles(self, block: int) -> int:
        """Programs that it takes."""
        rows, columns = self.weight.shape
        return triton.cdiv(rows * triton.cdiv(columns, block), max(1, TILE // block))

    def alignment(self) -> int:
        """Bytes that all its addresses of rows are multiples of, up to 16."""
        codes = self.moments.m_codes, self.moments.v_codes
        addresses = (tensor.data_ptr() for tensor in (self.weight, self.grad, *codes))
        return 16 if self.weight.shape[1] % 16 == 0 and all(address % 16 == 0 for address in addresses) else 1


def launch(
    parameters: Sequence[Parameter],
    steps: Tensor,
    numbers: Tensor,
    shared: Sequence[float],
    block_size: int,
    finite: Tensor | None,
) -> None:
    """Steps parameters of one dtype, whose gradients are of one dtype, on one device; all tensors are contiguous.

    Args:
        parameters: To step.
        steps: int32 [P], their step counts, this step included.
        numbers: fp32 [P, 4]: learning rate, factor of weight decay, corrections of m and v.
        shared: beta1, 1 - beta1, beta2, 1 - beta2, eps, sign of the gradient, largest update.
        block_size: Elements of a block, a power of two up to TILE.
        finite: bool scalar: where it is false, nothing changes. None is true.
    """
    if len(parameters) == 1:
        _one(parameters[0], steps, numbers, shared, block_size, finite)
        return
    for alignment in (16, 1):
        chosen = [(p, place) for place, p in enumerate(parameters) if p.alignment() == alignment and p.weight.numel()]
        if chosen:
            _many(chosen, alignment, steps, numbers, shared, block_size, finite)


def _one(
    p: Parameter, steps: Tensor, numbers: Tensor, shared: Sequence[float], block_size: int, finite: Tensor | None
) -> None:
    tensors = [_bits(tensor) for tensor in p.tensors()]
    levels, options = m_levels(p.weight.device), {"BLOCK": block_size, "TILE": TILE, **_OPTIONS}
    if p.weight.numel():
        one_kernel[(p.tiles(block_size),)](
            *tensors, *p.numbers(), steps, numbers, levels, _bits(finite), *shared, **options
        )


def _many(
    chosen: Sequence[tuple[Parameter, int]],
    alignment: int,
    steps: Tensor,
    numbers: Tensor,
    shared: Sequence[float],
    block_size: int,
    finite: Tensor | None,
) -> None:
    first, rows, device = [0], [], steps.device
    for p, place in chosen:
        rows.append((*(tensor.data_ptr() for tensor in p.tensors()), *p.numbers(), place))
        first.append(first[-1] + p.tiles(block_size))
    some = chosen[0][0]
    many_kernel[(first.pop(),)](
        _on_device(tuple(rows), device),
        _on_device(tuple(first), device).int(),
        steps,
        numbers,
        m_levels(device),
        _bits(finite),
        *shared,
        len(rows),
        WEIGHT=_TYPES[some.weight.dtype],
        GRAD=_TYPES[some.grad.dtype],
        ALIGNMENT=alignment,
        PADDED=triton.next_power_of_2(len(rows)),
        BLOCK=block_size,
        TILE=TILE,
        **_OPTIONS,
    )


_OPTIONS = {"num_warps": _WARPS, "enable_fp_fusion": False}


def _bits(tensor: Tensor | None) -> Tensor | None:
    """Bf16 numbers as the kernels take them, by their bits; other tensors as they are."""
    if tensor is None or tensor.dtype is not torch.bfloat16:
        return tensor if tensor is None or tensor.dtype is not torch.bool else tensor.view(torch.uint8)
    return tensor.view(torch.int16)


@functools.lru_cache(maxsize=64)
def _on_device(values: tuple[tuple[int, ...], ...] | tuple[int, ...], device: torch.device) -> Tensor:
    table = torch.tensor(values, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
