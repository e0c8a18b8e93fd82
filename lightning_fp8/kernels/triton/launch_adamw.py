"""How the step of `FP8AdamW` is launched: for many parameters, or for one.

Parameters whose rows all begin on 16 bytes are stepped in one launch, the others, whose loads must be narrower, in a
second one.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_fp8.kernels.adamw import Group, Matrix
from lightning_fp8.kernels.triton.adamw import TILE, many_kernel, one_kernel
from lightning_fp8.kernels.triton.table import on_device
from lightning_fp8.numerics.moments import m_levels

_TYPES = {torch.bfloat16: tl.int16, torch.float32: tl.float32}
_BITS = {torch.bfloat16: torch.int16, torch.bool: torch.uint8}
# With 168 registers a thread three programs fit on a multiprocessor; nothing is spilled for it. Counting takes more
# where Triton is older than 3.9.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_REGISTERS, _REGISTERS_TO_COUNT = 168, 208


def launch(
    matrices: Sequence[Matrix],
    steps: Tensor,
    numbers: Tensor,
    group: Group,
    block_size: int,
    finite: Tensor | None,
    counts: Tensor | None = None,
) -> None:
    """Steps parameters; see `kernels.adamw.adamw`."""
    common = (steps, numbers, m_levels(steps.device), _bits(finite), counts, *group)
    options = _OPTIONS | {"maxnreg": _REGISTERS if counts is None else _REGISTERS_TO_COUNT}
    placed = [(matrix, place) for place, matrix in enumerate(matrices) if matrix.weight.numel()]
    if len(matrices) == 1:
        for matrix, _ in placed:
            _one(matrix, common, block_size, options)
        return
    for alignment in (16, 1):
        chosen = [(matrix, place) for matrix, place in placed if _alignment(matrix) == alignment]
        if chosen:
            _many(chosen, alignment, common, block_size, options)


def _one(matrix: Matrix, common: tuple[Any, ...], block_size: int, options: dict[str, Any]) -> None:
    tile = _tile(_alignment(matrix), block_size)
    one_kernel[(_programs(matrix, tile, block_size),)](
        *(_bits(tensor) for tensor in _tensors(matrix)),
        *_numbers(matrix),
        *common,
        BLOCK=block_size,
        TILE=tile,
        **options,
    )


def _many(
    chosen: Sequence[tuple[Matrix, int]],
    alignment: int,
    common: tuple[Any, ...],
    block_size: int,
    options: dict[str, Any],
) -> None:
    first, rows, device = [0], [], chosen[0][0].weight.device
    tile = _tile(alignment, block_size)
    for matrix, place in chosen:
        rows.append((*(tensor.data_ptr() for tensor in _tensors(matrix)), *_numbers(matrix), place))
        first.append(first[-1] + _programs(matrix, tile, block_size))
    many_kernel[(first.pop(),)](
        on_device(tuple(rows), torch.int64, device),
        on_device(tuple(first), torch.int32, device),
        *common,
        len(rows),
        WEIGHT=_TYPES[chosen[0][0].weight.dtype],
        GRAD=_TYPES[chosen[0][0].grad.dtype],
        ALIGNMENT=alignment,
        PADDED=triton.next_power_of_2(len(rows)),
        BLOCK=block_size,
        TILE=tile,
        **options,
    )


def _tensors(matrix: Matrix) -> tuple[Tensor, ...]:
    """Those that the kernels take, in order."""
    return matrix.weight, matrix.grad, *matrix.moments


def _numbers(matrix: Matrix) -> tuple[int, ...]:
    """Likewise."""
    return *matrix.weight.shape, matrix.first_row, matrix.first_column, *matrix.key


def _programs(matrix: Matrix, tile: int, block_size: int) -> int:
    """How many a parameter takes."""
    rows, columns = matrix.weight.shape
    return int(triton.cdiv(rows * triton.cdiv(columns, block_size), tile // block_size))


def _tile(alignment: int, block_size: int) -> int:
    """Elements of a program; where loads are narrow, a thread has many blocks and needs all their numbers."""
    return TILE if alignment == 16 else max(TILE // 8, block_size)


def _alignment(matrix: Matrix) -> int:
    """Bytes that the addresses of all rows are multiples of: 16, or any."""
    tensors = matrix.weight, matrix.grad, matrix.moments.m_codes, matrix.moments.v_codes
    aligned = matrix.weight.shape[1] % 16 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    return 16 if aligned else 1


def _bits(tensor: Tensor | None) -> Tensor | None:
    """Bf16 and bool, which kernels take by their bits."""
    if tensor is None or tensor.dtype not in _BITS:
        return tensor
    return tensor.view(_BITS[tensor.dtype])
