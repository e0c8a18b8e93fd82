import math

import pytest
import torch

from lightning_fp8.optim import blocks

SIZE = 128
SHAPES = [  # parameter, the matrix it is seen as, whether its moments are quantised
    ((), (1, 1), False),
    ((7,), (1, 7), False),
    ((1000,), (1, 1000), False),
    ((5, 63), (5, 63), False),
    ((5, 64), (5, 64), True),
    ((1, 300), (1, 300), True),
    ((3, 256), (3, 256), True),
    ((4, 129), (4, 129), True),
    ((8, 16, 3, 3), (8, 144), True),
    ((8, 3, 3, 3), (8, 27), False),
    ((2, 3, 200), (6, 200), True),  # experts [E, d, f]
    ((0, 64), (0, 64), True),
]
matrices = pytest.mark.parametrize("block_size", [1, 32, SIZE])


@pytest.mark.parametrize(("shape", "matrix", "quantized"), SHAPES)
def test_views(shape, matrix, quantized):
    assert blocks.matrix_shape(shape) == matrix
    assert blocks.is_matrix(shape) is quantized
    assert math.prod(matrix) == math.prod(shape)


def numbered():
    """Tensors of all shapes, seen as matrices; no element is zero and no two are equal."""
    sizes = [math.prod(shape) for shape, *_ in SHAPES]
    values = torch.arange(1, 1 + sum(sizes), dtype=torch.float32).split(sizes)
    return [value.view(matrix) for value, (_, matrix, _) in zip(values, SHAPES, strict=True)]


def all_rows(tensors):
    return [blocks.Rows(i, 0, t.shape[0]) for i, t in enumerate(tensors) if t.shape[0]]


@matrices
def test_scatter_inverts_gather(block_size):
    tensors = numbered()
    rows = all_rows(tensors)
    gathered = blocks.gather(tensors, rows, block_size)
    assert gathered.shape[1] == block_size
    back = [torch.zeros_like(t) for t in tensors]
    blocks.scatter(gathered, back, rows)
    assert all(torch.equal(a, b) for a, b in zip(back, tensors, strict=True))
    # Nothing but padding is added.
    assert gathered.count_nonzero() == sum(t.numel() for t in tensors)


@matrices
def test_only_the_named_rows_are_written(block_size):
    tensors = numbered()
    rows = [blocks.Rows(7, 1, 3), blocks.Rows(10, 4, 6)]
    back = [torch.zeros_like(t) for t in tensors]
    blocks.scatter(blocks.gather(tensors, rows, block_size), back, rows)
    for owner, (source, written) in enumerate(zip(tensors, back, strict=True)):
        kept = torch.zeros(len(source), 1)
        for row in rows:
            kept[row.start : row.stop] += row.owner == owner
        assert torch.equal(written, source * kept)


@pytest.mark.parametrize("limit", [1, 100, 1000, 1024, 5000, 10**9])
def test_chunks_cover_every_row_once_in_order(limit):
    shapes = tuple(matrix for _, matrix, _ in SHAPES)
    chunks = blocks.chunks(shapes, limit)
    covered = [(i, r) for chunk in chunks for i, start, stop in chunk for r in range(start, stop)]
    assert covered == [(i, r) for i, (rows, _) in enumerate(shapes) for r in range(rows)]
    for chunk in chunks:
        elements = sum((stop - start) * shapes[i][1] for i, start, stop in chunk)
        single_row = len(chunk) == 1 and chunk[0].stop - chunk[0].start == 1
        assert chunk
        assert elements <= limit or single_row


def test_chunks_are_full():
    """A chunk ends only where the next row would not fit, or a step would cost more operations than it must."""
    assert blocks.chunks(((10, 100), (3, 50)), 400) == (
        (blocks.Rows(0, 0, 4),),
        (blocks.Rows(0, 4, 8),),
        (blocks.Rows(0, 8, 10), blocks.Rows(1, 0, 3)),
    )
    assert blocks.chunks((), 400) == ()
