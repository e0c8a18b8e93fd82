"""Steps quantised state by a torch optimizer: expanded to fp32, stepped, and stored again, a bounded chunk at a time.

Parameters of one kind are packed into common blocks (`blocks.py`) and a private instance of the base class steps each
chunk of their rows as if it were one parameter (`base_step.py`), which element-wise optimizers do not notice. Transient
memory therefore does not grow with the model. Muon is not element-wise and gets one whole matrix at a time.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_fp8.numerics.rounding import dither, parameter_key, random_bits, row_keys, stochastic_round_bf16
from lightning_fp8.optim import blocks, shards
from lightning_fp8.optim.base_step import step_elements, step_matrix
from lightning_fp8.optim.codecs import WHOLE_MATRICES, Codec, codecs_for, codecs_in
from lightning_fp8.optim.finite import keep_unless
from lightning_fp8.optim.stored import State, new_stored, scalars_of, tensors_of

_CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}  # as in `packing.py`
_WHOLE = 1 << 62


class Member(NamedTuple):
    """One parameter of a step, its plain name, its state, and what this process holds of it, as matrices."""

    p: Tensor
    name: str
    state: State
    place: shards.Place
    weight: Tensor
    grad: Tensor

    @classmethod
    def of(cls, p: Tensor, name: str, state: State) -> "Member":
        """Of a parameter that has a gradient; its step is counted."""
        place = shards.place_of(p)
        weight, grad = shards.local_part(p), shards.local_gradient(p)
        return cls(p, name, state, place, weight.view(place.shape), grad.reshape(place.shape))

    def views(self, name: str) -> Tensor:
        """What this process holds of one stored tensor, as a matrix."""
        return shards.local_part(self.state[name]).view(self.place.shape[0], -1)


def new_state(base: Optimizer, p: Tensor, group: dict[str, Any]) -> State:
    """The stored state of `p` before its first step."""
    probe = torch.zeros(1, 1, dtype=torch.float32)  # which state there is does not depend on what is stepped
    after = step_elements(base, group, probe, torch.zeros_like(probe), {})
    step = {"step": torch.zeros((), dtype=torch.int64)}
    stored = new_stored(p, group["block_size"], codecs_of(base, p, group, tensors_of(after)))
    return scalars_of(after) | step | stored


def codecs_of(base: Optimizer, p: Tensor, group: dict[str, Any], keys: Iterable[str]) -> list[Codec]:
    """How the base's state of `p` under `keys` is stored."""
    return codecs_for(base, keys, quantized=group["moments"] == "fp8" and blocks.is_matrix(p.shape))


def alike(members: Iterable[Member], base: Optimizer) -> list[list[Member]]:
    """Splits parameters that have elements into batches that can be stepped as one."""
    batches: dict[Any, list[Member]] = {}
    for member in members:
        numbers = tuple((name, value.item()) for name, value in scalars_of(member.state).items())
        alone = id(member.p) if isinstance(base, WHOLE_MATRICES) else None
        kind = (member.weight.device, member.weight.dtype, member.grad.dtype, tuple(member.state), numbers, alone)
        batches.setdefault(kind, []).append(member)
    return list(batches.values())


def step_nothing(state: State, base: Optimizer, group: dict[str, Any]) -> None:
    """Steps the scalars of a parameter of which this process holds no element, as other processes step them."""
    probe = torch.zeros(1, 1, dtype=torch.float32)
    before = _scalars_before(state)
    if before:
        keys = [key for codec in codecs_in(base, tensors_of(state)) for key in codec.keys]
        before |= {key: torch.zeros_like(probe) for key in keys}
    state.update(_own_scalars(step_elements(base, group, probe, torch.zeros_like(probe), before)))


def step_batch(batch: list[Member], base: Optimizer, group: dict[str, Any], finite: Tensor | None = None) -> None:
    """Steps parameters of one kind, a bounded chunk of their rows at a time.

    Args:
        batch: From `alike`, their steps counted.
        base: The optimizer whose arithmetic is wanted.
        group: The options of their parameter group.
        finite: If given, a bool scalar: where it is false, no weight and nothing stored changes; scalars do, which are
            on the host.
    """
    size, state = group["block_size"], batch[0].state
    places = [member.place for member in batch]
    weights, grads = [member.weight for member in batch], [member.grad for member in batch]
    device, dtype, whole = weights[0].device, weights[0].dtype, isinstance(base, WHOLE_MATRICES)
    finite = None if finite is None else finite.to(device)
    keys = torch.tensor([parameter_key(group["seed"], m.name) for m in batch], dtype=torch.int32).to(device)
    count = state["step"].to(device, torch.int32)
    lanes = torch.arange(size, dtype=torch.int32, device=device)
    scalars = _scalars_before(state)
    known = codecs_in(base, tensors_of(state)) if scalars else []
    after: dict[str, Tensor] = {}
    views = {name: [member.views(name) for member in batch] for name in tensors_of(state)}
    limit = _WHOLE if whole else _CHUNK_ELEMENTS.get(device.type, 1 << 24)
    for rows in blocks.chunks(tuple(place.shape for place in places), limit):
        owner, row, first_column = shards.positions(rows, places, size, device)
        key, steps, columns = keys[owner], count.expand(len(row)), first_column + lanes
        old_weight = blocks.gather(weights, rows, size)
        weight, grad = old_weight.float(), blocks.gather(grads, rows, size).float()
        weight = weight.clone() if finite is not None else weight  # it is stepped in place
        before = {name: value.clone() for name, value in scalars.items()}
        for codec in known:
            stored = [blocks.gather(views[s.name], rows, 1 if s.per_block else size) for s in codec.stored]
            before.update(zip(codec.keys, codec.decode(stored), strict=True))
        if whole:
            after = step_matrix(base, group, weight, grad, before, columns=places[0].shape[1])
        else:
            after = step_elements(base, group, weight, grad, before)
        if dtype is torch.bfloat16 and group["rounding"] == "stochastic":
            weight = stochastic_round_bf16(weight, random_bits(row_keys(key, steps, row), columns))
        blocks.scatter(keep_unless(finite, weight.to(dtype), old_weight), weights, rows)
        uniform = dither(key, steps, row, columns)
        for codec in codecs_of(base, batch[0].p, group, tensors_of(after)):
            encoded = codec.encode([after[key] for key in codec.keys], uniform)
            for target, value in zip(codec.stored, encoded, strict=True):
                if target.name not in views:  # momentum that was 0 in earlier steps
                    for member in batch:
                        member.state.update(new_stored(member.p, size, [codec]))
                    views |= {s.name: [member.views(s.name) for member in batch] for s in codec.stored}
                if finite is not None:
                    value = keep_unless(finite, value, blocks.gather(views[target.name], rows, value.shape[1]))
                blocks.scatter(value, views[target.name], rows)
    for member in batch:
        member.state.update(_own_scalars(after))


def _scalars_before(state: State) -> State:
    """The base's scalars before a step that is counted already; none before the first, when the base begins."""
    return {**scalars_of(state), "step": (state["step"] - 1).float()} if state["step"] > 1 else {}


def _own_scalars(after: State) -> State:
    """The scalars that the base leaves, for one parameter; the step is counted by us."""
    return {name: value.clone() for name, value in scalars_of(after).items() if name != "step"}
