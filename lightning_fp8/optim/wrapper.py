"""FP8 state for the optimizers of torch.

`FP8Optimizer(base)` keeps the state of `base` in one byte an element and lets the base class do the arithmetic, on
fp32 copies of a bounded chunk of rows at a time (`expanded.py`).

`param_groups` is the list of `base`, the same object, so schedulers and all who read or set hyperparameters may hold
either. bf16 weights are rounded stochastically, by the same bits as in `FP8AdamW`.

torch's optimizers count steps, and correct their bias, on the host. On a device that the host would have to wait for, a
step whose gradients are not finite is therefore masked at once and taken back on the host when the next step begins,
where the flag has long arrived.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_fp8.optim import shards
from lightning_fp8.optim.arguments import check_shared
from lightning_fp8.optim.codecs import REFUSED_OPTIONS, WHOLE_MATRICES, check_base, codecs_in, incomplete
from lightning_fp8.optim.expanded import Member, alike, codecs_of, new_state, step_batch, step_nothing
from lightning_fp8.optim.finite import Arriving, SkippedSteps, free_to_read
from lightning_fp8.optim.groups import parameter_name
from lightning_fp8.optim.ledger import Ledger, measure_ledger
from lightning_fp8.optim.release import GradientRelease
from lightning_fp8.optim.state import load_exactly
from lightning_fp8.optim.stored import State, expand, scalars_of, store, tensors_of


class _Attempt(NamedTuple):
    """A step of a parameter that may have been masked: the flag, and what to go back to."""

    finite: Arriving
    names: set[str]
    scalars: State


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
        max_skipped_steps: Raise when this many steps in a row had gradients that are not finite. Reads the device in
            each step. None never raises.

    Raises:
        FloatingPointError: See `max_skipped_steps`.
        ValueError: `base` cannot be wrapped, has an option that cannot be had, or an argument is wrong.

    Caveats:
        Muon needs whole matrices: no sharded parameters, and transient memory for the largest one. `foreach` is
        turned off for the private instance, which steps one tensor.

        A step in which any gradient holds NaN, inf or a number beyond 2^63, on any process that shares a sharded
        parameter, is skipped as a whole, as by `FP8AdamW`. On a GPU no step waits for the device, unless
        `max_skipped_steps` is given; `state` then counts a step that was skipped until the next one begins, or
        `state_dict()` is called.
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
        max_skipped_steps: int | None = None,
    ) -> None:
        check_base(base)
        own = {
            "moments": moments,
            "block_size": block_size,
            "rounding": rounding,
            "seed": seed,
            "max_skipped_steps": max_skipped_steps,
        }
        self.base = base
        super().__init__(base.param_groups, {**base.defaults, **own})
        self.param_groups = base.param_groups
        self.state.update({p: state for p, state in base.state.items() if state and state.get("step", 1) != 0})
        base.state.clear()
        self._begin()
        self._take_over()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, to the base optimizer too; see `torch.optim.Optimizer.add_param_group`."""
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1], self.base)

    def __getstate__(self) -> dict[str, Any]:
        self._settle(list(self._attempts))
        return {**super().__getstate__(), "base": self.base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what was pickled or copied; counters start anew."""
        super().__setstate__(state)
        self.base.param_groups = self.param_groups  # loading makes a new list
        self._begin()

    def _begin(self) -> None:
        self._skips = SkippedSteps("FP8Optimizer")
        self._attempts: dict[Tensor, _Attempt] = {}

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
        self._step([(number, range(len(group["params"]))) for number, group in enumerate(self.param_groups)])
        return loss

    @torch.no_grad()
    def step_parameter(self, group: int, index: int) -> None:
        """One step for parameter `index` of group number `group`, if it has a gradient: for gradient release.

        A gradient that is not finite skips the step of this parameter alone.
        """
        self._step([(group, [index])])

    def _step(self, chosen: Iterable[tuple[int, Iterable[int]]]) -> None:
        """Steps the parameters that have a gradient among those `chosen` by group and index, all or none of them."""
        present = {
            number: [i for i in indices if self.param_groups[number]["params"][i].grad is not None]
            for number, indices in chosen
        }
        params = [self.param_groups[number]["params"][i] for number, indices in present.items() for i in indices]
        if not params:
            return
        finite = self._skips.finite(
            params, [shards.local_gradient(p) for p in params], self.defaults["max_skipped_steps"]
        )
        known = free_to_read(finite)
        if known and not finite:
            return
        self._settle(params)
        arriving = None if known else Arriving(finite)
        for number, indices in present.items():
            self._step_group(number, indices, None if known else finite, arriving)

    def _step_group(
        self, number: int, indices: Iterable[int], finite: Tensor | None, arriving: Arriving | None
    ) -> None:
        """Steps parameters of a group, which have gradients, unless `finite` says that nothing is to change."""
        group, members = self.param_groups[number], []
        for i in indices:
            p = group["params"][i]
            state = self.state[p]
            if not state:
                state.update(new_state(self.base, p, group))
            if arriving is not None:
                scalars = {name: value.clone() for name, value in scalars_of(state).items()}
                self._attempts[p] = _Attempt(arriving, set(state), scalars)
            state["step"] += 1
            member = Member.of(p, parameter_name(group, number, i), state)
            if member.weight.numel():
                members.append(member)
            else:
                step_nothing(state, self.base, group)
        for batch in alike(members, self.base):
            step_batch(batch, self.base, group, finite)

    def _settle(self, params: Iterable[Tensor]) -> None:
        """Takes back, on the host, the last steps of `params` that were masked on their device."""
        for attempt, state in [(self._attempts.pop(p), self.state[p]) for p in params if p in self._attempts]:
            if not attempt.finite.value():
                for name in state.keys() - attempt.names:
                    del state[name]
                state.update(attempt.scalars)

    @property
    def skip_counts(self) -> Tensor | None:
        """Steps skipped in all, and since the last one that was not: int64 [2], on the device; None before any."""
        return self._skips.counts

    @property
    def skipped_steps(self) -> int:
        """Steps skipped since the optimizer was made or its state loaded; reads the device."""
        return self._skips.total

    def state_dict(self) -> dict[str, Any]:
        """As of every torch optimizer, with the stored codes and scales."""
        self._settle(list(self._attempts))
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict with every code and scale exactly as it was saved; see `state.py`.

        State of the base class, in full precision, is taken over: it is rounded once. Hyperparameters become those
        that were saved, but for `moments`, `block_size` and `rounding`, which must be the same; `convert_state` loads
        what was kept in another way.

        Raises:
            ValueError: It is the state of another optimizer, of other such options, or incomplete.
        """
        load_exactly(self, state_dict, super().load_state_dict, lambda p, group, state: incomplete(self.base, state))
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
                    self.state[p].update(new_state(self.base, p, group))

    def _take_over(self) -> None:
        """Stores what there is of the base's own state in full precision."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p)
                if not state:
                    continue
                counted = state.get("step", 1.0)  # SGD and Muon count none
                step = torch.as_tensor(counted)
                if step.is_floating_point() or not isinstance(counted, Tensor):  # ours are tensors of integers
                    codecs = codecs_of(self.base, p, group, tensors_of(state))
                    stored = store(p, group["block_size"], codecs, state)
                    self.state[p] = {**scalars_of(state), "step": step.to(torch.int64), **stored}
                # Loading puts scalars where the parameter is; torch's optimizers look for them on the CPU.
                self.state[p].update({name: value.cpu() for name, value in scalars_of(self.state[p]).items()})


def _check_group(group: dict[str, Any], base: Optimizer) -> None:
    """Raises ValueError naming the field, what it is and what it may be."""
    check_shared("FP8Optimizer", group, {"moments": ("fp8", "fp32"), "rounding": ("stochastic", "nearest")})
    kind = type(base).__name__
    for name, reason in REFUSED_OPTIONS.items():
        if group.get(name):
            raise ValueError(f"FP8Optimizer cannot wrap {kind} with {name}={group[name]}: {reason}. Leave it out.")
    if isinstance(base, WHOLE_MATRICES) and any(isinstance(p, DTensor) for p in group["params"]):
        raise ValueError(f"FP8Optimizer: {kind} needs whole matrices and a parameter is sharded; use FP8AdamW.")
