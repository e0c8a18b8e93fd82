"""AdamW whose moments are one byte each, for weights that have no fp32 master copy.

Per step and parameter, all arithmetic in fp32 (Loshchilov & Hutter, "Decoupled Weight Decay Regularization"):

    w <- w * (1 - lr * weight_decay)
    m <- beta1 * m + (1 - beta1) * g              v <- beta2 * v + (1 - beta2) * g^2
    w <- w - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

The update uses the fresh m and v; only what is stored is quantised (`numerics/moments.py`), and a bf16 weight is
rounded stochastically (`numerics/weights.py`). Bytes a parameter, weights and gradients in bf16: 2 + 2 + 2.06, where
fp32 moments make it 2 + 2 + 8.

The step is a function on blocks (`step.py`), applied to many parameters at once (`packing.py`). The class owns state,
order, names and options.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_fp8.numerics.weights import BF16_WEIGHTS
from lightning_fp8.optim import health, shards
from lightning_fp8.optim.arguments import check_adamw, check_limits, check_shared
from lightning_fp8.optim.finite import SkippedSteps, free_to_read
from lightning_fp8.optim.fresh import fields_of, moments_of, new_state, weights_of
from lightning_fp8.optim.groups import parameter_name
from lightning_fp8.optim.health import Health, Measured
from lightning_fp8.optim.ledger import Ledger, measure_ledger
from lightning_fp8.optim.packing import Member, alike, step_batch
from lightning_fp8.optim.release import GradientRelease
from lightning_fp8.optim.state import load_exactly
from lightning_fp8.optim.step import MOMENTS
from lightning_fp8.optim.update_clipping import with_clipped_rates

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class FP8AdamW(Optimizer):
    """AdamW with both moments in FP8 and stochastic rounding of bf16 weights.

    State of a parameter with at least 64 columns, seen as [R, C]: `m_codes` and `v_codes`, uint8 of the parameter's
    shape; `m_scale`, `v_density`, `v_split` and `v_gap` uint8, `v_max` fp32, [R, ceil(C / block_size)]. Of any other
    parameter: `m` and `v` in fp32. In all cases `step`, an int64 scalar on the parameter's device. Other values of
    `moments` and `rounding` have the fields of their classes in `numerics`.

    Every argument after `params` but `max_skipped_steps` may differ between groups.

    Args:
        params: Parameters, (name, parameter) pairs or groups of either. Names key the random bits, so that they
            depend neither on the order of the parameters nor on how they are grouped; without them the position does.
        lr: Learning rate, a float or a scalar tensor.
        betas: Decay of the first and the second moment; may change from step to step. As in torch's AdamW, bias is
            corrected by 1 - beta^t with the beta of this step.
        eps: Added to the denominator.
        weight_decay: Decoupled; a weight shrinks by lr * weight_decay a step.
        moments: How moments are kept: "fp8", or to compare with "e4m3", "e4m3/e5m2", "coat", "fp8_lm", "bf16", "fp32".
            For embeddings in fp32, give them a group of their own.
        block_size: Elements that share the scales of their moments.
        rounding: How bf16 weights are kept: "stochastic", "nearest", "kahan" (+2 bytes a parameter), "correction8"
            (+1) or, to compare with, "scaled_fp16" (+2), see `numerics/weights.py`. fp32 weights need none.
        seed: Of the random bits.
        maximize: Follow the gradient up instead of down.
        clip_update_rms: Divide the learning rate of a parameter, for this step, by its root mean square of
            g / max(sqrt(v), eps) over this limit, where that is above 1 (StableAdamW, whose limit is 1). Of a sharded
            parameter the whole counts. Costs another pass over gradients and moments, and one collective operation.
        max_update: Limit |u| of each element, u being what the learning rate multiplies.
        max_skipped_steps: Raise when this many steps in a row had gradients that are not finite. Reads the device in
            each step. None never raises.
        track_health: Count what `health()` and `health_by_parameter()` report.
        compile: Compile with `torch.compile` what no kernel steps (`kernels/adamw.py`: on a CPU with a C++ compiler
            that is moments other than "fp8" and other roundings than "stochastic"): once for each combination of
            formats and dtypes, whatever the learning rate, the step and the shapes. The first step then takes a while.
            Codes and bf16 weights are equal to the eager step's wherever they were compared.

    Raises:
        ValueError: An argument is out of range, a parameter is neither bf16 nor fp32, or not contiguous, or a gradient
            is sparse.
        FloatingPointError: See `max_skipped_steps`.

    Caveats:
        A step's results are the same, bit for bit, for the same device, dtype and torch version only.

        A step in which any gradient holds NaN, inf or a number beyond 2^63 is skipped as a whole (`finite.py`): no
        weight, moment or step count changes, and `skipped_steps` counts it. Where parameters are sharded or replicated
        by DTensor (FSDP2, tensor parallelism), the processes of their meshes skip together, at the cost of one
        collective operation on a scalar a step and mesh. Under DDP all see the same gradients, those of the
        all-reduce. Stages of a pipeline, which share no mesh, decide each for itself. Under gradient release a step
        is that of one parameter: the others' are taken.

        On a GPU a step never waits for the device, unless `max_skipped_steps` is given.
    """

    gradient_release: GradientRelease | None = None  # set by `enable_gradient_release`
    grad_factor: Tensor | None = (
        None  # what the next step multiplies gradients by, an fp32 scalar; see `clip_grad_norm`
    )

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        moments: Literal["fp8", "e4m3", "e4m3/e5m2", "coat", "fp8_lm", "bf16", "fp32"] = "fp8",
        block_size: int = 128,
        rounding: Literal["stochastic", "nearest", "kahan", "correction8", "scaled_fp16"] = "stochastic",
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
        self._skips = SkippedSteps("FP8AdamW")
        self._health: dict[tuple[str, ...], Measured] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what was pickled or copied, and options that it did not know yet; counters start anew."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._skips, self._health = SkippedSteps("FP8AdamW"), {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; see `torch.optim.Optimizer.add_param_group`."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_shared("FP8AdamW", group, {"moments": MOMENTS, "rounding": BF16_WEIGHTS})
        check_adamw("FP8AdamW", group)
        check_limits("FP8AdamW", group, "clip_update_rms", "max_update")

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
        everything = [(n, range(len(group["params"]))) for n, group in enumerate(self.param_groups)]
        self._health, self.grad_factor = self._step(everything) or self._health, None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients, and what the next step was to multiply them by."""
        self.grad_factor = None
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step_parameter(self, group: int, index: int) -> None:
        """One step for parameter `index` of group number `group`, if it has a gradient: for gradient release.

        A gradient that is not finite skips the step of this parameter alone.
        """
        self._health |= self._step([(group, [index])])

    def _step(self, chosen: Iterable[tuple[int, Iterable[int]]]) -> dict[tuple[str, ...], Measured]:
        """Steps the parameters that have a gradient among those `chosen` by group and index, all or none of them.

        Returns:
            What was counted in it, by the names of parameters.
        """
        named = {number: list(self._named_gradients(number, indices)) for number, indices in chosen}
        params = [p for group in named.values() for _, p in group]
        if not params:
            return {}
        grads = [_gradient(name, p) for group in named.values() for name, p in group]
        finite = self._skips.finite(params, grads, self.defaults["max_skipped_steps"])
        known = free_to_read(finite)
        if known and not finite:
            return {}
        flag = None if known else finite
        return {
            names: measured
            for number, members in named.items()
            for names, measured in self._step_group(self.param_groups[number], members, flag)
        }

    def _named_gradients(self, number: int, indices: Iterable[int]) -> Iterator[tuple[str, Tensor]]:
        """(name, parameter) of those parameters of a group that have a gradient."""
        group, params = self.param_groups[number], self.param_groups[number]["params"]
        return ((parameter_name(group, number, i), params[i]) for i in indices if params[i].grad is not None)

    def _step_group(
        self, group: dict[str, Any], named: list[tuple[str, Tensor]], finite: Tensor | None
    ) -> Iterator[tuple[tuple[str, ...], Measured]]:
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
        if group["clip_update_rms"] is not None:
            members = with_clipped_rates(members, [p for _, p in named], group, self.grad_factor)
        for batch in alike(members):
            flag, factor = (None if x is None else x.to(batch[0].weight.device) for x in (finite, self.grad_factor))
            counts = step_batch(batch, group, flag, factor)
            if counts is not None:
                names, elements = zip(*((member.name, member.weight.numel()) for member in batch), strict=True)
                last = self._health[names].counts if names in self._health else None
                yield names, Measured(elements, counts.unless_skipped(finite, last))

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

    @property
    def skip_counts(self) -> Tensor | None:
        """Steps skipped in all, and since the last one that was not: int64 [2], on the device; None before any."""
        return self._skips.counts

    @property
    def skipped_steps(self) -> int:
        """Steps skipped since the optimizer was made or its state loaded; reads the device."""
        return self._skips.total

    def health(self) -> Health:
        """Figures of the last step that was taken, on the device, over the groups that have `track_health`.

        They are of what this process holds. Under gradient release, of the last step of each parameter. A ValueError
        says that there was no such step.
        """
        return health.of_all(self._counted())

    def health_by_parameter(self) -> dict[str, Health]:
        """The figures of `health()` of each parameter, by its name, or by group and position where it has none."""
        return health.of_each(self._counted())

    def _counted(self) -> dict[tuple[str, ...], Measured]:
        if not self._health:
            raise ValueError("FP8AdamW: nothing was counted; set track_health=True and take a step first.")
        return self._health

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict with every code and scale exactly as it was saved; see `state.py`.

        Hyperparameters become those that were saved, but for `moments`, `block_size` and `rounding`, which must be the
        same; `convert_state` loads what was kept in another way.

        Raises:
            ValueError: It is the state of another optimizer, of other such options, or incomplete.
        """
        if any("exp_avg" in state for state in state_dict["state"].values()):
            raise ValueError(
                "FP8AdamW: this is the state of torch.optim.AdamW; optim.import_adamw_state takes it over."
            )
        load_exactly(
            self, state_dict, super().load_state_dict, lambda p, group, state: fields_of(p, group) - state.keys()
        )


def _gradient(name: str, p: Tensor) -> Tensor:
    """What this process holds of the gradient of `p`, outside autograd."""
    grad = p.grad
    if grad is None or grad.layout is not torch.strided:
        raise ValueError(
            f"FP8AdamW: the gradient of {name!r} is sparse; give its layer sparse=False, or that parameter another "
            "optimizer."
        )
    return shards.local_gradient(p)
