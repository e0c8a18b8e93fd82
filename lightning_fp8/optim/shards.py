"""Where the local part of a parameter lies in the whole of it.

FSDP2 and tensor parallelism hand an optimizer DTensors. A step works on the local part, but what it does must not
depend on how a parameter is cut: what is quantised, and how rows and blocks are counted, follows from the whole shape,
and the random bits are keyed by the whole row and column. State is a DTensor with the parameter's own placements, so
torch.distributed.checkpoint can move it to any other number of processes.

A tensor with one number a block, [..., ceil(C / b)], is cut by the same placements as the parameter [..., C]. That
matches for every cut along rows, even or not; along columns it does where no block is cut, which is checked.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, zeros
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_fp8.optim import blocks


class Place(NamedTuple):
    """The matrix that the local part of a parameter is seen as, and where it lies.

    Attributes:
        shape: Its rows and columns.
        leading: For each dimension that counts rows: its local size, its whole size, and where the local part begins.
        first_column: Of the whole parameter, where the local part begins.
    """

    shape: tuple[int, int]
    leading: tuple[tuple[int, int, int], ...]
    first_column: int

    def whole_rows(self, rows: Tensor) -> Tensor:
        """The numbers in the whole parameter of local `rows`, int32 [n]."""
        if all(local == size for local, size, _ in self.leading):
            return rows
        whole, stride = torch.zeros_like(rows), 1
        for local, size, offset in reversed(self.leading):
            whole += (rows % local + offset) * stride
            rows = rows // local
            stride *= size
        return whole

    @property
    def first_row(self) -> int | None:
        """The number in the whole parameter of its first row; None if its rows do not follow one another there."""
        if any(local != size for local, size, _ in self.leading[1:]):
            return None
        return sum(offset for *_, offset in self.leading[:1]) * math.prod(size for _, size, _ in self.leading[1:])


def place_of(p: Tensor) -> Place:
    """Where the local part of `p` lies; a plain tensor is all there is.

    Raises:
        ValueError: `p` is a convolution's weight that is cut along one of its last dimensions.
    """
    whole = tuple(p.shape)
    local, offset = _cut(p, whole)
    leading = blocks.row_dimensions(whole)
    if local[leading + 1 :] != whole[leading + 1 :]:
        raise ValueError(
            f"A parameter of shape {whole} is sharded as {local}: all its dimensions but the first make its rows,"
            " which are then in pieces. Shard the first dimension."
        )
    rows, columns = blocks.matrix_shape(local, leading)
    first_column = offset[leading] if leading < len(whole) else 0
    for size in whole[leading + 1 :]:
        first_column *= size
    return Place((rows, columns), tuple(zip(local, whole, offset, strict=True))[:leading], first_column)


def positions(
    rows: Sequence[blocks.Rows], places: Sequence[Place], block_size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the blocks of local `rows` lie: parameter number [n], row and first column [n, 1] in the whole, int32."""
    parts = []
    for owner, start, stop in rows:
        place = places[owner]
        count = blocks.blocks_per_row(place.shape[1], block_size)
        block = torch.arange(count * (stop - start), dtype=torch.int32, device=device)
        row, column = block // count + start, block % count * block_size + place.first_column
        parts.append(torch.stack([torch.full_like(block, owner), place.whole_rows(row), column]))
    owners, row, first_column = torch.cat(parts, dim=1)
    return owners, row, first_column.unsqueeze(1)


def local_part(t: Tensor) -> Tensor:
    """What this process holds of `t`, outside autograd."""
    with torch.no_grad():
        return (t.to_local() if isinstance(t, DTensor) else t).detach()


def local_gradient(p: Tensor) -> Tensor:
    """What this process holds of the gradient of `p`, cut as `p` is.

    Raises:
        ValueError: There is none, or it is sparse.
    """
    grad = p.grad
    if grad is None:
        raise ValueError(f"A parameter of shape {tuple(p.shape)} has no gradient; call backward() first.")
    if grad.layout is not torch.strided:
        raise ValueError(
            f"The gradient of a parameter of shape {tuple(p.shape)} is sparse; give its layer sparse=False, or that"
            " parameter another optimizer."
        )
    if isinstance(p, DTensor) and isinstance(grad, DTensor) and grad.placements != p.placements:
        with torch.no_grad():  # replicated weights under sequence parallelism have partial gradients
            return local_part(grad.redistribute(placements=p.placements))
    return local_part(grad)


def true_everywhere(flag: Tensor, params: Iterable[Tensor]) -> Tensor:
    """Whether a bool scalar is true on every process that holds a part, or a copy, of any of `params`.

    A collective operation for each mesh that they are on; the host does not wait for it.
    """
    for mesh in dict.fromkeys(p.device_mesh for p in params if isinstance(p, DTensor)):
        each = DTensor.from_local(flag.int(), mesh, [Partial("min")] * mesh.ndim)
        flag = each.full_tensor().bool().to(flag.device)
    return flag


def sums_over_shards(parts: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """Of each of `params` the sum of a scalar over its shards, of which this process has one part: collective."""
    kinds: dict[tuple[DeviceMesh, tuple[Placement, ...]], list[int]] = {}
    for number, p in enumerate(params):
        if isinstance(p, DTensor):
            kinds.setdefault((p.device_mesh, p.placements), []).append(number)
    sums = list(parts)
    for (mesh, placements), numbers in kinds.items():
        summed = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
        own = DTensor.from_local(torch.stack([parts[number] for number in numbers]), mesh, summed)
        for number, total in zip(numbers, own.full_tensor().unbind(), strict=True):
            sums[number] = total.to(parts[number].device)
    return sums


def new_elements(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros, one an element of `p`, cut as `p` is."""
    return _zeros(p, tuple(p.shape), dtype)


def new_scales(p: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """Zeros, one a block of `p`, cut as `p` is.

    Raises:
        ValueError: `p` is cut inside a block, or its rows are in pieces.
    """
    place_of(p)
    whole = tuple(p.shape)
    leading = blocks.row_dimensions(whole)
    columns = blocks.matrix_shape(whole, leading)[1]
    ways = math.prod(_ways(p, leading)) if leading < len(whole) else 1
    if ways > 1 and columns % (block_size * ways):  # the same answer on every process, or some would wait for ever
        raise ValueError(
            f"A parameter of shape {whole} is sharded {ways} ways along its {columns} columns, which cuts blocks of"
            f" {block_size}: choose a block_size that divides the columns of every shard, or shard rows."
        )
    return _zeros(p, (*whole[:leading], blocks.blocks_per_row(columns, block_size)), dtype)


def cut_alike(value: Tensor, p: Tensor) -> Tensor:
    """A copy of a state tensor (one number an element or a block) for `p`: on its device, cut as `p` is.

    Between a whole tensor and a sharded one, and from one sharding to another, nothing but the cut changes. A whole
    value must be the same on every process; gathering a sharded one is a collective operation.
    """
    if isinstance(value, DTensor) and isinstance(p, DTensor):
        same = value.device_mesh == p.device_mesh and value.placements == p.placements
        moved = value if same else value.redistribute(p.device_mesh, p.placements)
        return moved.detach().clone()
    if isinstance(value, DTensor):
        return value.full_tensor().detach().clone().to(p.device)
    if not isinstance(p, DTensor) or not value.dim():
        return value.detach().clone().to(p.device)
    result = _zeros(p, tuple(value.shape), value.dtype)
    part = value.detach()
    for dim, (size, start) in enumerate(zip(*_cut(p, tuple(value.shape)), strict=True)):
        part = part.narrow(dim, start if size else 0, size)
    local_part(result).copy_(part)
    return result


def _ways(p: Tensor, dim: int) -> Iterator[int]:
    """Into how many parts each dimension of the mesh cuts dimension `dim` of `p`."""
    if isinstance(p, DTensor):
        yield from (p.device_mesh.size(i) for i, placement in enumerate(p.placements) if placement.is_shard(dim))


def _zeros(p: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if isinstance(p, DTensor):
        return zeros(shape, dtype=dtype, device_mesh=p.device_mesh, placements=p.placements)
    return torch.zeros(shape, dtype=dtype, device=p.device)


def _cut(p: Tensor, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The local shape, and where it begins, of a tensor of whole `shape` that is cut as `p` is."""
    if isinstance(p, DTensor):
        return _cached_cut(shape, p.device_mesh, p.placements)
    return shape, (0,) * len(shape)


@functools.lru_cache(maxsize=4096)
def _cached_cut(
    shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Placement, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    local, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple(local), tuple(offset)
