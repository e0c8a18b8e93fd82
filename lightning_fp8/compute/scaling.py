"""Delayed scaling: the scale of a cast comes from the magnitudes of the steps before.

    running   the largest |x| since the last optimizer step, over all micro-batches and uses of the layer
    history   what that was at each of the last H steps, the newest first
    scale     of max(history) * 2^margin, or of history[0] * 2^margin

Current scaling reads a tensor twice, once for its amax and once to cast it; a scale known beforehand lets one pass do
both. The price is that a tensor which grows from one step to the next saturates. (The method is Transformer Engine's
`DelayedScaling`, and FP8-LM's.)

* A scale of 0 means "not known", and the tensor is then cast by its own amax: at the first step, after a checkpoint
  that holds no state for the layer, after an operand was zero throughout its history. No host read is needed to know.
* A maximum may be taken twice, so the recomputation of activation checkpointing changes nothing.
* Only operands that were seen since the last step advance; a layer that was not used keeps its history.
* A non-finite amax keeps the old history and scale, and is counted. What was cast is not hidden: the scale handed to
  the GEMM becomes NaN.

The state belongs to the layer but is no buffer of it: the state dict stays that of the unconverted model.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fp8.compute.recipe import ROLES, Operand, Recipe, Role
from lightning_fp8.numerics.quantize import amax, scale_of

_UNSEEN = -1.0


@dataclass
class DelayedScales:
    """The scaling state of one layer; dimension 0 is the operand, in the order of `recipe.ROLES`.

    Attributes:
        running: fp32 scalars, one an operand, each written by one pass: forward or backward; -1 where the operand was
            not seen since the last step.
        history: fp32 [3, H], zeros where there is none yet.
        scale: fp32 [3], decode scales; 0 where not known.
        nonfinite: int64 [3], how many steps had a non-finite amax.
    """

    running: tuple[Tensor, Tensor, Tensor]
    history: Tensor
    scale: Tensor
    nonfinite: Tensor

    @classmethod
    def unknown(cls, history: int, device: torch.device) -> "DelayedScales":
        """The state before the first step."""
        zeros = torch.zeros(len(ROLES), device=device)
        return cls(
            running=(zeros[0] + _UNSEEN, zeros[1] + _UNSEEN, zeros[2] + _UNSEEN),
            history=torch.zeros(len(ROLES), history, device=device),
            scale=zeros,
            nonfinite=torch.zeros_like(zeros, dtype=torch.int64),
        )

    def to(self, device: torch.device) -> "DelayedScales":
        """The same state on another device; coming from the meta device, there is none."""
        if self.scale.is_meta:
            return DelayedScales.unknown(self.history.shape[1], device)
        x, weight, dy = self.running
        return DelayedScales(
            running=(x.to(device), weight.to(device), dy.to(device)),
            history=self.history.to(device),
            scale=self.scale.to(device),
            nonfinite=self.nonfinite.to(device),
        )

    def observe(self, role: Role, amax: Tensor) -> None:
        """Notes the amax of an operand that takes part in training."""
        largest = self.running[ROLES.index(role)]
        largest.copy_(torch.maximum(largest, amax))  # which lets NaN through


def shared_scale(x: Tensor, operand: Operand) -> Tensor:
    """The decode scale, an fp32 scalar, of `x` and what the other processes cast in its place; a collective call.

    It is not finite on all processes if an element is not on one.
    """
    largest = amax(x).nan_to_num(nan=torch.inf, posinf=torch.inf)
    _all_reduce_max(largest)
    return scale_of(largest, operand.number_format, power_of_two=operand.power_of_two)


def _all_reduce_max(x: Tensor) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX)


def advance(states: Iterable[DelayedScales], recipe: Recipe) -> None:
    """Ends a step for layers of one recipe: the magnitudes seen enter the history, and the scales follow.

    With torch.distributed initialised, all ranks get the largest magnitude of any, in one all-reduce; so every rank
    must call this with the same layers. A fixed number of tensor operations, and no host read.
    """
    layers = list(states)
    if not layers:
        return
    cells = [cell for layer in layers for cell in layer.running]
    running = torch.stack(cells).view(len(layers), len(ROLES)).nan_to_num(nan=torch.inf, posinf=torch.inf)
    _all_reduce_max(running)
    old = torch.stack([layer.history for layer in layers])
    rolled = torch.cat([running.unsqueeze(-1), old[..., :-1]], dim=-1)
    seen, finite = running >= 0, running.isfinite()
    history = torch.where((seen & finite).unsqueeze(-1), rolled, old)
    scale = scales_of(history, recipe)
    torch._foreach_copy_([layer.history for layer in layers], list(history.unbind()))
    torch._foreach_copy_([layer.scale for layer in layers], list(scale.unbind()))
    torch._foreach_add_([layer.nonfinite for layer in layers], list((seen & ~finite).long().unbind()))
    torch._foreach_zero_(cells)
    torch._foreach_add_(cells, _UNSEEN)


def scales_of(history: Tensor, recipe: Recipe) -> Tensor:
    """The scales [layers, 3] that follow from histories [layers, 3, H]; 0 for an operand that was always zero."""
    largest = (history.amax(dim=-1) if recipe.amax == "max" else history[..., 0]) * 2.0**recipe.margin
    largest = largest.clamp_max(torch.finfo(torch.float32).max)
    operands = [recipe.operand(role) for role in ROLES]
    scale = torch.stack(
        [scale_of(largest[:, i], o.number_format, power_of_two=o.power_of_two) for i, o in enumerate(operands)], dim=-1
    )
    return torch.where(largest > 0, scale, 0.0)
