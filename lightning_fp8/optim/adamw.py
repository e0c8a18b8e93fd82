"""AdamW whose moments are one byte each, for weights that have no fp32 master copy.

Per step and parameter, all arithmetic in fp32 (Loshchilov & Hutter, "Decoupled Weight Decay Regularization"):

    w <- w * (1 - lr * weight_decay)
    m <- beta1 * m + (1 - beta1) * g              v <- beta2 * v + (1 - beta2) * g^2
    w <- w - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

The update uses the fresh m and v; only what is stored is quantised (`numerics/moments.py`), and a bf16 weight is
rounded stochastically (`numerics/weights.py`). Bytes a parameter, weights and gradients in bf16: 2 + 2 + 2.05, where
fp32 moments make it 2 + 2 + 8.

The step is a function on blocks (`step.py`), applied to many parameters at once (`packing.py`). The class owns state,
order, names and options.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_fp8.numerics.weights import BF16_WEIGHTS
from lightning_fp8.optim import shards
from lightning_fp8.optim.finite import all_finite, count_skips
from lightning_fp8.optim.fresh import moments_of, new_state, weights_of
from lightning_fp8.optim.groups import parameter_name
from lightning_fp8.optim.guidance import warn_of_moments
from lightning_fp8.optim.health import Counts, Health
from lightning_fp8.optim.ledger import Ledger, measure_ledger
from lightning_fp8.optim.packing import Member, alike, step_batch
from lightning_fp8.optim.release import GradientRelease
from lightning_fp8.optim.state import load_exactly
from lightning_fp8.optim.step import MOMENTS

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

_FREE_TO_READ = ("cpu",)  # devices whose memory the host reads without waiting


class FP8AdamW(Optimizer):
    """AdamW with both moments in FP8 and stochastic rounding of bf16 weights.

    State of a parameter with at least 64 columns, seen as [R, C]: `m_codes` and `v_codes`, uint8 of the parameter's
    shape; `m_scale` and `v_density` uint8, `v_max` fp32, [R, ceil(C / block_size)]. Of any other parameter: `m` and
    `v` in fp32. In all cases `step`, an int64 scalar on the parameter's device. Other values of `moments` and
    `rounding` have the fields of their classes in `numerics`.

    Every argument after `params` but `max_skipped_steps` may differ between groups.

    Args:
        params: Parameters, (name, parameter) pairs or groups of either. Names key the random bits, so that they
            depend neither on the order of the parameters nor on how they are grouped; without them the position does.
        lr: Learning rate, a float or a scalar tensor.
        betas: Decay of the first and the second moment; may change from step to step. As in torch's AdamW, bias is
            corrected by 1 - beta^t with the beta of this step.
        eps: Added to the denominator.
        weight_decay: Decoupled; a weight shrinks by lr * weight_decay a step.
        moments: How moments are kept: "fp8", or to compare with "e4m3", "e4m3/e5m2", "coat", "bf16", "fp32". For
            embeddings in fp32, give them a group of their own.
        block_size: Elements that share the scales of their moments.
        rounding: How bf16 weights are kept: "stochastic", "nearest", "kahan" (+2 bytes a parameter) or "correction8"
            (+1), see `numerics/weights.py`. fp32 weights need none.
        seed: Of the random bits.
        maximize: Follow the gradient up instead of down.
        clip_update_rms: Divide the learning rate of a parameter, for this step, by its root mean square of
            g / max(sqrt(v), eps) over this limit, where that is above 1 (StableAdamW, whose limit is 1). Costs another
            pass over gradients and moments.
        max_update: Limit |u| of each element, u being what the learning rate multiplies.
        max_skipped_steps: Raise when this many steps in a row had gradients that are not finite. Reads the device in
            each step. None never raises.
        track_health: Count what `health()` reports.
        compile: Compile the step with `torch.compile`: once for each combination of formats and dtypes, whatever the
            learning rate, the step and the shapes. The first step then takes a while, and a compiler. Codes and bf16
            weights have been equal to the eager step's wherever they were compared; fp32 weights differ by an ulp.

    Raises:
        ValueError: An argument is out of range, a parameter is neither bf16 nor fp32, or not contiguous, or a gradient
            is sparse.
        FloatingPointError: See `max_skipped_steps`.

    Caveats:
        A step's results are the same, bit for bit, for the same device, dtype and torch version only.

        A step in which any gradient holds NaN, inf or a number beyond 2^63 is skipped as a whole (`finite.py`): no
        weight, moment or step count changes, and `skipped_steps` counts it. Gradients of this process are looked at;
        where each process holds a shard, all must decide alike, as clipping by the global norm makes them.

        On a GPU a step never waits for the device, unless `max_skipped_steps` is given.
    """

    gradient_release: GradientRelease | None = None  # set by `enable_gradient_release`

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        moments: Literal["fp8", "e4m3", "e4m3/e5m2", "coat", "bf16", "fp32"] = "fp8",
        block_size: int = 128,
        rounding: Literal["stochastic", "nearest", "kahan", "correction8"] = "stochastic",
        seed: int = 0,
        maximize: bool = False,
        clip_update_rms: float | None = None,
        max_update: float | None = None,
        max_skipped_steps: int | None = None,
        track_health: bool = False,
        compile: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "moments": moments,
            "block_size": block_size,
            "rounding": rounding,
            "seed": seed,
            "maximize": maximize,
            "clip_update_rms": clip_update_rms,
            "max_update": max_update,
            "max_skipped_steps": max_skipped_steps,
            "track_health": track_health,
            "compile": compile,
        }
        super().__init__(params, defaults)
        self._skips: Tensor | None = None
        self._health: Counts | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what was pickled or copied, and options that it did not know yet; counters start anew."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._skips, self._health = None, None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; see `torch.optim.Optimizer.add_param_group`."""
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1])

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
        named = {number: list(self._named_gradients(number, indices)) for number, indices in chosen}
        grads = [_gradient(name, p) for group in named.values() for name, p in group]
        if not grads:
            return
        finite = all_finite(grads)
        self._count_skip(finite)
        readable = finite.device.type in _FREE_TO_READ
        if readable and not finite:
            return
        flag = None if readable else finite
        counts = [
            counted
            for number, members in named.items()
            for counted in self._step_group(self.param_groups[number], members, flag)
        ]
        if counts:
            self._health = functools.reduce(Counts.plus, counts).unless_skipped(flag, self._health)

    def _named_gradients(self, number: int, indices: Iterable[int]) -> Iterator[tuple[str, Tensor]]:
        """(name, parameter) of those parameters of a group that have a gradient."""
        group = self.param_groups[number]
        params = group["params"]
        return ((parameter_name(group, number, i), params[i]) for i in indices if params[i].grad is not None)

    def _step_group(
        self, group: dict[str, Any], named: list[tuple[str, Tensor]], finite: Tensor | None
    ) -> Iterator[Counts]:
        """Steps parameters of a group, all that have gradients, unless `finite` says that nothing is to change."""
        members = [
            Member(
                name,
                shards.place_of(p),
                shards.local_part(p),
                _gradient(name, p),
                self._state_of(p, group),
                moments_of(p, group["moments"]),
                weights_of(p, group["rounding"]),
            )
            for name, p in named
        ]
        # In one call for all: a tensor operation for each of hundreds of parameters would cost as much as the step.
        steps = [member.state["step"] for member in members]
        if steps:
            torch._foreach_add_(steps, 1 if finite is None else [finite.to(step.device).long() for step in steps])
        for batch in alike(members):
            counts = step_batch(batch, group, None if finite is None else finite.to(batch[0].weight.device))
            if counts is not None:
                yield counts

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """What this process holds of the state of `p`, created at its first step."""
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state.update(new_state(p, group))
        return {name: shards.local_part(value) for name, value in state.items()}

    def allocate(self) -> None:
        """Creates the state of every parameter that has none, as its first step would."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad and not self.state[p]:
                    self.state[p].update(new_state(p, group))

    def memory(self) -> Ledger:
        """Bytes a parameter of weights, gradients, moments and scales, measured on the storages of this process."""
        return measure_ledger((p for group in self.param_groups for p in group["params"]), [self])

    def _count_skip(self, finite: Tensor) -> None:
        self._skips = count_skips(self._skips, finite)
        limit = self.defaults["max_skipped_steps"]
        if limit is not None and int(self._skips[1]) >= limit:
            raise FloatingPointError(
                f"FP8AdamW: the gradients of {limit} steps in a row held NaN, inf or a number beyond 2^63. Lower the "
                "learning rate, clip gradients, or resume from an earlier checkpoint."
            )

    @property
    def skip_counts(self) -> Tensor | None:
        """Steps skipped in all, and since the last one that was not: int64 [2], on the device; None before any."""
        return self._skips

    @property
    def skipped_steps(self) -> int:
        """Steps skipped since the optimizer was made or its state loaded; reads the device."""
        return 0 if self._skips is None else int(self._skips[0])

    def health(self) -> Health:
        """Figures of the last step that was taken, on the device, over the groups that have `track_health`.

        Raises:
            ValueError: There was no such step.
        """
        if self._health is None:
            raise ValueError("FP8AdamW: nothing was counted; set track_health=True and take a step first.")
        return self._health.health()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict with every code and scale exactly as it was saved; see `state.py`.

        Raises:
            ValueError: It is the state of another optimizer.
        """
        if any("exp_avg" in state for state in state_dict["state"].values()):
            raise ValueError(
                "FP8AdamW: this is the state of torch.optim.AdamW; optim.import_adamw_state takes it over."
            )
        load_exactly(self, state_dict, super().load_state_dict)


def _gradient(name: str, p: Tensor) -> Tensor:
    """What this process holds of the gradient of `p`, outside autograd."""
    grad = p.grad
    if grad is None or grad.layout is not torch.strided:
        raise ValueError(
            f"FP8AdamW: the gradient of {name!r} is sparse; give its layer sparse=False, or that parameter another "
            "optimizer."
        )
    return shards.local_gradient(p)


def _check_group(group: dict[str, Any]) -> None:
    """Raises ValueError naming the field, what it is and what it may be."""
    choices: dict[str, Iterable[str]] = {"moments": MOMENTS, "rounding": BF16_WEIGHTS}
    for name, allowed in choices.items():
        if group[name] not in allowed:
            raise ValueError(f"FP8AdamW: {name} {group[name]!r} is not one of {', '.join(allowed)}.")
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"FP8AdamW: {name} is {group[name]}; it must be 0 or more.")
    for name in ("clip_update_rms", "max_update", "max_skipped_steps"):
        if group[name] is not None and not group[name] > 0:
            raise ValueError(f"FP8AdamW: {name} is {group[name]}; it must be more than 0, or None.")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"FP8AdamW: betas are {group['betas']}; both must be in [0, 1).")
    if group["block_size"] < 1:
        raise ValueError(f"FP8AdamW: block_size is {group['block_size']}; it must be 1 or more.")
    for p in group["params"]:
        if p.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"FP8AdamW: a parameter is {p.dtype}; weights must be bfloat16 or float32.")
        if not p.is_contiguous():
            raise ValueError(f"FP8AdamW: a parameter of shape {tuple(p.shape)} is not contiguous; make it so first.")
    warn_of_moments(group["moments"], group["betas"], group["eps"])
