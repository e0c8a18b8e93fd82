"""Steps many parameters as one array of blocks, a bounded chunk at a time.

Parameters of one kind (device, dtypes, formats) are packed into common blocks (`blocks.py`), so that a step is a fixed
number of tensor operations a chunk, whatever the number of parameters, and its transient memory does not depend on
their size. Everything that a block needs to know of its parameter is looked up by the parameter's number in the batch.
"""

import functools
import types
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_fp8.kernels.adamw import Group, Matrix, adamw, has_adamw
from lightning_fp8.numerics.moments import FP8Moments
from lightning_fp8.numerics.rounding import dither, parameter_key, random_bits, row_keys
from lightning_fp8.numerics.weights import CorrectedWeights, FP32Weights, StochasticWeights, Weights
from lightning_fp8.optim import blocks, shards
from lightning_fp8.optim.finite import keep_unless
from lightning_fp8.optim.health import Counts
from lightning_fp8.optim.step import Corrections, Hyper, Moments, Step, squared_update_size, step_blocks

_CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}  # temporaries that stay in a CPU's caches, or fill a GPU
_key = functools.lru_cache(maxsize=1 << 16)(parameter_key)
_DRAWN = (StochasticWeights, CorrectedWeights)  # weights that random bits round


class Member(NamedTuple):
    """One parameter of a step: its plain name, its formats, and what this process holds of it, outside autograd.

    `rate` is its own learning rate, fp32 [1], where that is not the group's.
    """

    name: str
    place: shards.Place
    weight: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    moments: type[Moments]
    weights: type[Weights]
    rate: Tensor | None = None


class _Batch(NamedTuple):
    """Parameters that are packed together, as matrices.

    Attributes:
        places: Of each, as a matrix, in the whole parameter.
        grads: [R, C] each.
        stored: What is rewritten, by field: the weights' tensors, then the moments', [R, C] or [R, blocks of a row].
        widths: For each field of `stored`, how many of its numbers belong to a block: `block_size` or 1.
        keys: int32 [P, 2], of the random bits.
        steps: int32 [P], the step counts, this step included.
        corrections: Of each parameter, [P, 1].
    """

    places: tuple[shards.Place, ...]
    grads: list[Tensor]
    stored: dict[str, list[Tensor]]
    widths: list[int]
    keys: Tensor
    steps: Tensor
    corrections: Corrections


def alike(members: Iterable[Member]) -> list[list[Member]]:
    """Splits parameters into batches that can be packed together: same device, dtypes and formats.

    Empty parameters are left out: they have nothing to step, and no rows to pack.
    """
    batches: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        if member.weight.numel():
            batches.setdefault(_kind(member), []).append(member)
    return list(batches.values())


def _kind(member: Member) -> tuple[Any, ...]:
    return member.weight.device, member.weight.dtype, member.grad.dtype, member.moments, member.weights


def step_batch(
    members: list[Member], group: dict[str, Any], finite: Tensor | None = None, factor: Tensor | None = None
) -> Counts | None:
    """Steps parameters of one kind, a bounded chunk of their rows at a time.

    Args:
        members: From `alike`, their steps counted.
        group: The options of their parameter group.
        finite: If given, a bool scalar: where it is false, nothing changes.
        factor: If given, what gradients are multiplied by, an fp32 scalar.

    Returns:
        What was counted, if the group has its health tracked.
    """
    weights_kind, moments_kind, size = members[0].weights, members[0].moments, group["block_size"]
    batch, hyper, compute = _pack(members, group), Hyper.of(group), step_rows
    if _has_kernel(batch, members[0], group, finite):
        return _step_by_kernel(batch, members, group, finite, factor)
    if group["compile"]:
        hyper, compute = hyper.as_tensors(), _compiled_step(*_kind(members[0]), hyper.maximize, hyper.max_update)
    device = batch.keys.device
    lanes = torch.arange(size, dtype=torch.int32, device=device)
    own_rates = [member.rate for member in members if member.rate is not None]
    rates = torch.stack(own_rates) if own_rates else None
    counts: Counts | None = None
    for rows in _chunks(batch, device):
        owner, row, first_column = shards.positions(rows, batch.places, size, device)
        columns, keys, steps = first_column + lanes, batch.keys[owner], batch.steps[owner]
        old = _gather(batch, rows)
        first = len(weights_kind._fields)
        weights, moments = weights_kind(*old[:first]), moments_kind(*old[first:])
        result = compute(
            weights,
            _gradients(batch, rows, size, factor),
            moments,
            keys,
            steps,
            row,
            columns,
            Corrections(*(correction[owner] for correction in batch.corrections)),
            hyper if rates is None else hyper._replace(lr=rates[owner]),
        )
        if group["track_health"]:
            counted = Counts.of(weights, result, owner, len(members))
            counts = counted if counts is None else counts.plus(counted)
        for tensors, new, value in zip(batch.stored.values(), (*result.weights, *result.moments), old, strict=True):
            blocks.scatter(keep_unless(finite, new, value), tensors, rows)
    return counts


def _has_kernel(batch: _Batch, kind: Member, group: dict[str, Any], finite: Tensor | None) -> bool:
    """Whether a kernel takes these steps, with the same results."""
    served = kind.moments is FP8Moments and kind.weights in (StochasticWeights, FP32Weights)
    known = finite is None or kind.weight.is_cuda  # else the host would wait for another device
    numbers = not any(isinstance(number, Tensor) for number in (*group["betas"], group["eps"]))
    tensors = (tensor for field in batch.stored.values() for tensor in field)
    return (
        served
        and known
        and numbers
        and has_adamw(kind.weight, kind.grad, group["block_size"])
        and all(place.first_row is not None for place in batch.places)
        and all(tensor.is_contiguous() for tensor in tensors)
    )


def _step_by_kernel(
    batch: _Batch, members: list[Member], group: dict[str, Any], finite: Tensor | None, factor: Tensor | None
) -> Counts | None:
    """`step_rows` for all rows of each parameter."""
    hyper, sign = Hyper.of(group), -1.0 if group["maximize"] else 1.0
    rates = [hyper.lr if member.rate is None else member.rate for member in members]
    factors = [1 - rate * hyper.weight_decay for rate in rates]
    columns = [_column(rates, batch.steps), _column(factors, batch.steps), *batch.corrections]
    signs = _column([sign] * len(members), batch.steps)
    columns.append(signs if factor is None else signs * factor)
    counts = torch.zeros(len(members), len(Counts._fields), device=signs.device) if group["track_health"] else None
    keys = (_key(group["seed"], member.name) for member in members)
    each = zip(batch.places, batch.grads, zip(*batch.stored.values(), strict=True), keys, strict=True)
    adamw(
        [
            Matrix(weight, grad.contiguous(), FP8Moments(*moments), place.first_row or 0, place.first_column, key)
            for place, grad, (weight, *moments), key in each
        ],
        batch.steps,
        torch.cat(columns, dim=1),
        Group(
            float(hyper.beta1),
            float(1 - hyper.beta1),
            float(hyper.beta2),
            float(1 - hyper.beta2),
            float(hyper.eps),
            hyper.max_update,
        ),
        group["block_size"],
        finite,
        counts,
    )
    return None if counts is None else Counts(*counts.unbind(1))


def _column(values: list[Any], like: Tensor) -> Tensor:
    """One number for all parameters, or a tensor of one element for each, as fp32 [P, 1] on the device of `like`."""
    if isinstance(values[0], Tensor):
        return torch.stack([value.reshape(1).float() for value in values]).to(like.device, non_blocking=True)
    return torch.full((len(values), 1), float(values[0]), dtype=torch.float32, device=like.device)


def step_rows(
    weights: Weights,
    grad: Tensor,
    moments: Moments,
    keys: Tensor,
    steps: Tensor,
    row: Tensor,
    columns: Tensor,
    corrections: Corrections,
    hyper: Hyper,
) -> Step:
    """`step_blocks` with the random bits of its blocks; they are functions of `keys`, `steps`, `row` and `columns`.

    See `rounding.dither` for these four. All that changes from step to step is a tensor, so that this is what to
    compile: one graph for each combination of formats and dtypes.
    """
    bits = random_bits(row_keys(keys, steps, row), columns) if isinstance(weights, _DRAWN) else columns
    return step_blocks(weights, grad, moments, bits, dither(keys, steps, row, columns), corrections, hyper)


@functools.cache
def _compiled_step(*kind: Hashable) -> Callable[..., Step]:
    """`step_rows` compiled for one kind of parameters and options, by whatever tells them apart.

    Each is compiled from code of its own: dynamo counts the graphs of a code object, and gives up after eight, which
    the formats and dtypes of one process may exceed.
    """
    own = types.FunctionType(step_rows.__code__.replace(), step_rows.__globals__, step_rows.__name__)
    compiled: Callable[..., Step] = torch.compile(own, dynamic=True, fullgraph=True)
    return compiled


def _pack(members: list[Member], group: dict[str, Any]) -> _Batch:
    places = tuple(member.place for member in members)
    shapes = [place.shape for place in places]
    weights_kind, moments_kind = members[0].weights, members[0].moments
    stored: dict[str, list[Tensor]] = {weights_kind._fields[0]: [member.weight for member in members]}
    for name in (*weights_kind._fields[1:], *moments_kind._fields):
        stored[name] = [member.state[name] for member in members]
    # What has as many numbers as the parameter has one an element; all else has one a block.
    size, count = group["block_size"], members[0].weight.numel()
    widths = [size if tensors[0].numel() == count else 1 for tensors in stored.values()]
    device = members[0].weight.device
    steps = torch.stack([member.state["step"] for member in members])
    corrections = (1 / (1 - beta ** steps.double().unsqueeze(1)) for beta in group["betas"])
    return _Batch(
        places,
        [member.grad.reshape(shape) for member, shape in zip(members, shapes, strict=True)],
        # `view`, for these are written to.
        {name: [t.view(s[0], -1) for t, s in zip(tensors, shapes, strict=True)] for name, tensors in stored.items()},
        widths,
        _keys(group["seed"], tuple(member.name for member in members), device),
        steps.int(),
        Corrections(*(correction.float() for correction in corrections)),
    )


def _chunks(batch: _Batch, device: torch.device) -> tuple[tuple[blocks.Rows, ...], ...]:
    limit = _CHUNK_ELEMENTS.get(device.type, 1 << 24)
    return blocks.chunks(tuple(place.shape for place in batch.places), limit)


@functools.lru_cache(maxsize=256)
def _keys(seed: int, names: tuple[str, ...], device: torch.device) -> Tensor:
    """The keys of parameters, copied to their device once."""
    return torch.tensor([_key(seed, name) for name in names], dtype=torch.int32).to(device)


def _gather(batch: _Batch, rows: tuple[blocks.Rows, ...]) -> list[Tensor]:
    stored = zip(batch.stored.values(), batch.widths, strict=True)
    return [blocks.gather(tensors, rows, width) for tensors, width in stored]


def _gradients(batch: _Batch, rows: tuple[blocks.Rows, ...], size: int, factor: Tensor | None) -> Tensor:
    """Those of some rows, [n, size]."""
    grads = blocks.gather(batch.grads, rows, size)
    return grads if factor is None else grads.float() * factor


def squared_updates(members: list[Member], group: dict[str, Any], factor: Tensor | None = None) -> list[Tensor]:
    """Of each parameter, what this process holds of the sum of g^2 / max(v, eps^2): fp64 scalars; see `step.py`.

    Args:
        members: From `alike`, their steps counted.
        group: The options of their parameter group.
        factor: If given, what gradients are multiplied by, an fp32 scalar.
    """
    batch, kind, hyper = _pack(members, group), members[0].moments, Hyper.of(group)
    sums: list[list[Tensor]] = [[] for _ in members]
    size, device = group["block_size"], batch.keys.device
    for rows in _chunks(batch, device):
        owner = shards.positions(rows, batch.places, size, device)[0]
        corrections = Corrections(*(correction[owner] for correction in batch.corrections))
        stored = _gather(batch, rows)[-len(kind._fields) :]
        grads = _gradients(batch, rows, size, factor)
        squares = squared_update_size(grads, kind(*stored), corrections, hyper).double()
        counts = [(stop - start) * blocks.blocks_per_row(batch.places[i].shape[1], size) for i, start, stop in rows]
        # Sums of slices, not an indexed addition, whose order differs from run to run on a GPU.
        for (index, _, _), part in zip(rows, squares.split(counts), strict=True):
            sums[index].append(part.sum())
    return [torch.stack(parts).sum() for parts in sums]
