"""Rows of many tensors as one array of blocks, and back.

The codecs of the moments work on blocks of consecutive elements along the last dimension. Here is how a parameter is
cut into them, and how the blocks of many small parameters become one tensor, so that a step costs a number of
operations that does not depend on the number of parameters, and transient memory that does not depend on their size.

    parameter [R, C]  ->  rows r0..r1 of it  ->  [(r1 - r0) * ceil(C / b), b], the last block of each row zero-padded
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MIN_COLUMNS = 64


class Rows(NamedTuple):
    """Rows `start` to `stop` of the matrix that parameter number `owner` is viewed as."""

    owner: int
    start: int
    stop: int


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether a parameter of this whole (unsharded) shape has rows long enough for quantised moments.

    Vectors, and tensors with fewer than 64 columns, keep theirs in fp32.
    """
    return len(shape) >= 2 and matrix_shape(shape)[1] >= MIN_COLUMNS


def row_dimensions(shape: Sequence[int]) -> int:
    """How many leading dimensions of a parameter of this whole (unsharded) shape count its rows.

    Blocks run along the last dimension or, where that is narrow (convolutions), along all but the first; a vector is
    one row.
    """
    if len(shape) < 2:
        return 0
    return len(shape) - 1 if shape[-1] >= MIN_COLUMNS else 1


def matrix_shape(shape: Sequence[int], leading: int | None = None) -> tuple[int, int]:
    """The (rows, columns) that a tensor of this shape is seen as.

    Args:
        shape: Of a whole parameter, or of a part of it.
        leading: `row_dimensions` of the whole parameter, if `shape` is that of a part.
    """
    leading = row_dimensions(shape) if leading is None else leading
    return math.prod(shape[:leading]), math.prod(shape[leading:])


def blocks_per_row(columns: int, block_size: int) -> int:
    """How many blocks a row is cut into."""
    return -(-columns // block_size)


@functools.lru_cache(maxsize=256)
def chunks(shapes: tuple[tuple[int, int], ...], max_elements: int) -> tuple[tuple[Rows, ...], ...]:
    """Splits matrices of `shapes` into chunks of at most `max_elements` elements (at least one row)."""
    result: list[tuple[Rows, ...]] = []
    chunk: list[Rows] = []
    room = max_elements
    for index, (rows, columns) in enumerate(shapes):
        start = 0
        while start < rows:
            count = min(rows - start, max(room // columns, 0 if chunk else 1))
            if count:
                chunk.append(Rows(index, start, start + count))
                start += count
                room -= count * columns
            if start < rows:
                result.append(tuple(chunk))
                chunk, room = [], max_elements
    return (*result, tuple(chunk)) if chunk else tuple(result)


def gather(tensors: Sequence[Tensor], rows: Sequence[Rows], block_size: int) -> Tensor:
    """The blocks [n, block_size] of `rows` of matrices `tensors` [R, C], ragged ends filled with zeros.

    Tensors that hold one number a block, [R, blocks_per_row], are gathered with `block_size` 1.
    """
    parts = []
    for owner, start, stop in rows:
        part = tensors[owner][start:stop]
        missing = -part.shape[1] % block_size
        parts.append((F.pad(part, (0, missing)) if missing else part).reshape(-1, block_size))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def scatter(blocks: Tensor, tensors: Sequence[Tensor], rows: Sequence[Rows]) -> None:
    """Writes `blocks` [n, b] back into `rows` of `tensors`; the inverse of `gather`."""
    for (owner, start, stop), part in zip(rows, _split(blocks, tensors, rows), strict=True):
        tensors[owner][start:stop].copy_(part)


def _split(blocks: Tensor, tensors: Sequence[Tensor], rows: Sequence[Rows]) -> Iterator[Tensor]:
    first = 0
    for owner, start, stop in rows:
        columns = tensors[owner].shape[1]
        count = (stop - start) * blocks_per_row(columns, blocks.shape[1])
        yield blocks[first : first + count].reshape(stop - start, -1)[:, :columns]
        first += count
