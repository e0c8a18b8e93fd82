"""FP8 state for the optimizers of torch.

`FP8Optimizer(base)` keeps the state of `base` in one byte an element and lets the base class do the arithmetic: rows
of parameters are expanded to fp32 a bounded chunk at a time, a private instance of the base class steps the chunk as if
it were a parameter, and what it leaves is rounded and stored again. Because these optimizers are element-wise, the
chunk may hold rows of many parameters; transient memory does not grow with the model. Muon is not element-wise and
gets one whole matrix at a time.

`param_groups` is the list of `base`, the same object, so schedulers and all who read or set hyperparameters may hold
either. bf16 weights are rounded stochastically, by the same bits as in `FP8AdamW`.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_fp8.numerics.rounding import dither, parameter_key, random_bits, row_keys, stochastic_round_bf16
from lightning_fp8.optim import blocks, shards
from lightning_fp8.optim.base_step import step_elements, step_matrix
from lightning_fp8.optim.codecs import REFUSED_OPTIONS, WHOLE_MATRICES, Codec, check_base, codecs_for, codecs_in
from lightning_fp8.optim.groups import parameter_names
from lightning_fp8.optim.ledger import Ledger, measure_ledger
from lightning_fp8.optim.release import GradientRelease
from lightning_fp8.optim.state import load_exactly
from lightning_fp8.optim.stored import State, expand, new_stored, scalars_of, store, tensors_of

_CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}  # as in `adamw.py`
_WHOLE = 1 << 62


class _Member(NamedTuple):
    """One parameter of a step, its plain name, and what this process holds of it, as matrices."""

    p: Tensor
    name: str
    place: shards.Place
    weight: Tensor
    grad: Tensor


class FP8Optimizer(Optimizer):
    """A torch optimizer whose state is one byte an element.

    State of a parameter with at least 64 columns is stored by the codecs of `codecs.py`, that of others in fp32; in
    all cases there is `step`, an int64 scalar.

    Args:
        base: Adam, AdamW, NAdam, RAdam, Adamax, Adagrad, RMSprop, SGD or Muon. State that it has is taken over.
        moments: "fp8", or "fp32" for comparison. Groups may differ, in this and in what follows.
        block_size: Elements that share scales.
        rounding: How bf16 weights are rounded: "stochastic" or "nearest".
        seed: Of the random bits.

    Raises:
        ValueError: `base` cannot be wrapped, has an option that cannot be had, or an argument is wrong.

    Caveats:
        Muon needs whole matrices: no sharded parameters, and transient memory for the largest one. `foreach` is
        turned off for the private instance, which steps one tensor.
    """

    gradient_release: GradientRelease | None = None  # set by `enable_gradient_release`

    def __init__(
        self,
        base: Optimizer,
        moments: Literal["fp8", "fp32"] = "fp8",
        *,
        block_size: int = 128,
        rounding: Literal["stochastic", "nearest"] = "stochastic",
        seed: int = 0,
    ) -> None:
        check_base(base)
        own = {"moments": moments, "block_size": block_size, "rounding": rounding, "seed": seed}
        self.base = base
        super().__init__(base.param_groups, {**base.defaults, **own})
        self.param_groups = base.param_groups
        self.state.update({p: state for p, state in base.state.items() if state and state.get("step", 1) != 0})
        base.state.clear()
        self._take_over()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, to the base optimizer too; see `torch.optim.Optimizer.add_param_group`."""
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1], self.base)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "base": self.base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.base.param_groups = self.param_groups  # loading makes a new list

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step for every parameter that has a gradient.

        Args:
            closure: Recomputes the loss and the gradients; always called if given.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            self._step_group(number, range(len(group["params"])))
        return loss

    @torch.no_grad()
    def step_parameter(self, group: int, index: int) -> None:
        """One step for parameter `index` of group number `group`, if it has a gradient: for gradient release."""
        self._step_group(group, [index])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict with every code and scale exactly as it was saved; see `state.py`.

        State of the base class, in full precision, is taken over: it is rounded once.
        """
        load_exactly(self, state_dict, super().load_state_dict)
        self._take_over()

    def base_state_dict(self) -> dict[str, Any]:
        """The state that the base class would have, in fp32, for its `load_state_dict`; integer keys."""
        packed = self.state_dict()
        own = self.defaults.keys() - self.base.defaults.keys()
        groups = [{k: v for k, v in group.items() if k not in own} for group in packed["param_groups"]]
        state = {}
        for group, saved in zip(self.param_groups, groups, strict=True):
            for p, index in zip(group["params"], saved["params"], strict=True):
                if stored := self.state.get(p):
                    values = expand(p, group["block_size"], codecs_in(self.base, tensors_of(stored)), stored)
                    state[index] = {**scalars_of(stored), "step": stored["step"].float(), **values}
        return {**packed, "state": state, "param_groups": groups}

    def memory(self) -> Ledger:
        """Bytes a parameter of weights, gradients, moments and scales, measured on the storages of this process."""
        return measure_ledger((p for group in self.param_groups for p in group["params"]), [self])

    def allocate(self) -> None:
        """Creates the state of every parameter that has none, as its first step would."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad and not self.state[p]:
                    self._allocate(p, group)

    def _allocate(self, p: Tensor, group: dict[str, Any]) -> None:
        probe = torch.zeros(1, 1)  # which state there is does not depend on what is stepped
        after = step_elements(self.base, group, probe, torch.zeros(1, 1), {})
        codecs = self._codecs(p, group, tensors_of(after))
        step = {"step": torch.zeros((), dtype=torch.int64)}
        self.state[p].update(scalars_of(after) | step | new_stored(p, group["block_size"], codecs))

    def _codecs(self, p: Tensor, group: dict[str, Any], keys: Iterable[str]) -> list[Codec]:
        return codecs_for(self.base, keys, quantized=group["moments"] == "fp8" and blocks.is_matrix(p.shape))

    def _take_over(self) -> None:
        """Stores what there is of the base's own state in full precision."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p)
                if not state:
                    continue
                step = torch.as_tensor(state.get("step", 1.0))  # SGD and Muon count none
                if step.is_floating_point():  # ours are integers
                    codecs = self._codecs(p, group, tensors_of(state))
                    stored = store(p, group["block_size"], codecs, state)
                    self.state[p] = {**scalars_of(state), "step": step.to(torch.int64), **stored}
                # Loading puts scalars where the parameter is; torch's optimizers look for them on the CPU.
                self.state[p].update({name: value.cpu() for name, value in scalars_of(self.state[p]).items()})

    def _step_group(self, number: int, indices: Iterable[int]) -> None:
        """Steps those parameters of a group that have a gradient."""
        group = self.param_groups[number]
        params, names = group["params"], parameter_names(group, number)
        batches: dict[Any, list[_Member]] = {}
        for i in indices:
            p = params[i]
            if p.grad is None:
                continue
            if not self.state[p]:
                self._allocate(p, group)
            self.state[p]["step"] += 1
            place, weight, grad = shards.place_of(p), shards.local_part(p), shards.local_gradient(p)
            if weight.numel():
                member = _Member(p, names[i], place, weight.view(place.shape), grad.reshape(place.shape))
                batches.setdefault(self._kind(member), []).append(member)
            else:
                self._step_nothing(p, group)
        for batch in batches.values():
            self._step_batch(batch, group)

    def _step_nothing(self, p: Tensor, group: dict[str, Any]) -> None:
        """Steps the scalars of a parameter of which this process holds no element, as other processes step them."""
        state, probe = self.state[p], torch.zeros(1, 1)
        before = _scalars_before(state)
        if before:
            keys = [key for codec in codecs_in(self.base, tensors_of(state)) for key in codec.keys]
            before |= {key: torch.zeros_like(probe) for key in keys}
        state.update(_own_scalars(step_elements(self.base, group, probe, torch.zeros_like(probe), before)))

    def _kind(self, member: _Member) -> Any:
        """What parameters have in common that are stepped as one."""
        state = self.state[member.p]
        numbers = tuple((name, value.item()) for name, value in scalars_of(state).items())
        alone = id(member.p) if isinstance(self.base, WHOLE_MATRICES) else None
        return member.weight.device, member.weight.dtype, member.grad.dtype, tuple(state), numbers, alone

    def _step_batch(self, batch: list[_Member], group: dict[str, Any]) -> None:
        """Steps parameters of one kind, a bounded chunk of their rows at a time."""
        size, p, state = group["block_size"], batch[0].p, self.state[batch[0].p]
        places = [member.place for member in batch]
        weights, grads = [member.weight for member in batch], [member.grad for member in batch]
        device, dtype, whole = weights[0].device, weights[0].dtype, isinstance(self.base, WHOLE_MATRICES)
        keys = torch.tensor([parameter_key(group["seed"], m.name) for m in batch], dtype=torch.int32).to(device)
        count = state["step"].to(device, torch.int32)
        lanes = torch.arange(size, dtype=torch.int32, device=device)
        scalars = _scalars_before(state)
        known = codecs_in(self.base, tensors_of(state)) if scalars else []
        after: dict[str, Tensor] = {}
        views = {name: self._views(batch, name) for name in tensors_of(state)}
        limit = _WHOLE if whole else _CHUNK_ELEMENTS.get(device.type, 1 << 24)
        for rows in blocks.chunks(tuple(place.shape for place in places), limit):
            owner, row, first_column = shards.positions(rows, places, size, device)
            key, steps, columns = keys[owner], count.expand(len(row)), first_column + lanes
            weight, grad = (blocks.gather(t, rows, size).float() for t in (weights, grads))
            before = {name: value.clone() for name, value in scalars.items()}
            for codec in known:
                stored = [blocks.gather(views[s.name], rows, 1 if s.per_block else size) for s in codec.stored]
                before.update(zip(codec.keys, codec.decode(stored), strict=True))
            if whole:
                after = step_matrix(self.base, group, weight, grad, before, columns=places[0].shape[1])
            else:
                after = step_elements(self.base, group, weight, grad, before)
            if dtype is torch.bfloat16 and group["rounding"] == "stochastic":
                weight = stochastic_round_bf16(weight, random_bits(row_keys(key, steps, row), columns))
            blocks.scatter(weight, weights, rows)
            uniform = dither(key, steps, row, columns)
            for codec in self._codecs(p, group, tensors_of(after)):
                encoded = codec.encode([after[key] for key in codec.keys], uniform)
                for target, value in zip(codec.stored, encoded, strict=True):
                    if target.name not in views:  # momentum that was 0 in earlier steps
                        for member in batch:
                            self.state[member.p].update(new_stored(member.p, size, [codec]))
                        views |= {s.name: self._views(batch, s.name) for s in codec.stored}
                    blocks.scatter(value, views[target.name], rows)
        for member in batch:
            self.state[member.p].update(_own_scalars(after))

    def _views(self, batch: list[_Member], name: str) -> list[Tensor]:
        """What this process holds of one stored tensor of each parameter, as matrices."""
        return [shards.local_part(self.state[m.p][name]).view(m.place.shape[0], -1) for m in batch]


def _scalars_before(state: State) -> State:
    """The base's scalars before a step that is counted already; none before the first, when the base begins."""
    return {**scalars_of(state), "step": (state["step"] - 1).float()} if state["step"] > 1 else {}


def _own_scalars(after: State) -> State:
    """The scalars that the base leaves, for one parameter; the step is counted by us."""
    return {name: value.clone() for name, value in scalars_of(after).items() if name != "step"}


def _check_group(group: dict[str, Any], base: Optimizer) -> None:
    """Raises ValueError naming the field, what it is and what it may be."""
    choices = {"moments": ("fp8", "fp32"), "rounding": ("stochastic", "nearest")}
    for name, allowed in choices.items():
        if group[name] not in allowed:
            raise ValueError(f"FP8Optimizer: {name} {group[name]!r} is not one of {', '.join(allowed)}.")
    if group["block_size"] < 1:
        raise ValueError(f"FP8Optimizer: block_size is {group['block_size']}; it must be 1 or more.")
    kind = type(base).__name__
    for name, reason in REFUSED_OPTIONS.items():
        if group.get(name):
            raise ValueError(f"FP8Optimizer cannot wrap {kind} with {name}={group[name]}: {reason}. Leave it out.")
    for p in group["params"]:
        if p.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"FP8Optimizer: a parameter is {p.dtype}; weights must be bfloat16 or float32.")
        if not p.is_contiguous():
            raise ValueError(
                f"FP8Optimizer: a parameter of shape {tuple(p.shape)} is not contiguous; make it so first."
            )
        if isinstance(base, WHOLE_MATRICES) and isinstance(p, DTensor):
            raise ValueError(f"FP8Optimizer: {kind} needs whole matrices and a parameter is sharded; use FP8AdamW.")
