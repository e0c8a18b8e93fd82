"""How well quantised moments and rounded weights serve a step, counted while it is taken, on its device.

Four figures say what a loss curve hides for thousands of steps: v that has reached the end of its format's range,
single updates that are far too large, and weights that no longer move because their updates are rounded away.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fp8.numerics.weights import Weights
from lightning_fp8.optim.step import Step


class Health(NamedTuple):
    """Figures of one step over all parameters that are measured: fp32 scalars on their device.

    Attributes:
        v_at_floor: Share of the positive second moments that are stored as 0, or as more than twice what they are.
        max_update: The largest |u|, u being what the learning rate multiplies.
        update_rms: The root mean square of u.
        updates_lost: Share of the weights that a step was to move and that stayed, bit for bit.
    """

    v_at_floor: Tensor
    max_update: Tensor
    update_rms: Tensor
    updates_lost: Tensor


class Counts(NamedTuple):
    """What `Health` is made of, and what can be added up: scalars."""

    elements: Tensor
    positive: Tensor
    at_floor: Tensor
    max_update: Tensor
    squared_updates: Tensor
    to_move: Tensor
    stayed: Tensor

    @classmethod
    def of(cls, before: Weights, step: Step, elements: int) -> "Counts":
        """Counts a step of blocks that hold `elements` elements besides padding, which is zero throughout."""
        old, new = before.decode(), step.weights.decode()
        stored_v = step.moments.decode()[1]
        positive = step.v >= torch.finfo(torch.float32).tiny
        to_move = step.exact != old
        return cls(
            torch.full((), float(elements), device=old.device),
            positive.sum().float(),
            (positive & ((stored_v == 0) | (stored_v > 2 * step.v))).sum().float(),
            step.update.abs().amax(),
            step.update.square().sum(),
            to_move.sum().float(),
            (to_move & (new == old)).sum().float(),
        )

    def plus(self, other: "Counts") -> "Counts":
        """The counts of both, on the device of the first."""
        moved = Counts(*(tensor.to(self.elements.device) for tensor in other))
        sums = Counts(*(a + b for a, b in zip(self, moved, strict=True)))
        return sums._replace(max_update=self.max_update.maximum(moved.max_update))

    def unless_skipped(self, finite: Tensor | None, last: "Counts | None") -> "Counts":
        """These, or where the step was skipped those of the `last` step that was not."""
        if finite is None:
            return self
        last = last or Counts(*(torch.zeros_like(count) for count in self))
        return Counts(*(torch.where(finite, new, old) for new, old in zip(self, last, strict=True)))

    def health(self) -> Health:
        """The figures."""
        return Health(
            self.at_floor / self.positive.clamp_min(1),
            self.max_update,
            (self.squared_updates / self.elements.clamp_min(1)).sqrt(),
            self.stayed / self.to_move.clamp_min(1),
        )
