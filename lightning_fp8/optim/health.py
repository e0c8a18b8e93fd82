"""How well quantised moments and rounded weights serve a step, counted while it is taken, on its device.

Four figures say what a loss curve hides for thousands of steps: v that has reached the end of its format's range,
single updates that are far too large, and weights that no longer move because their updates are rounded away.

Counts are kept by parameter, so that a layer that goes wrong has a name; what they come to for all together is added up
when it is asked for. Where parameters are sharded they are of this process' part.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fp8.numerics.weights import Weights
from lightning_fp8.optim.step import Step


class Health(NamedTuple):
    """Figures of one step over the parameters that are measured: fp32 scalars on their device.

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
    """What `Health` is made of, of each of P parameters: fp32 [P]."""

    positive: Tensor
    at_floor: Tensor
    max_update: Tensor
    squared_updates: Tensor
    to_move: Tensor
    stayed: Tensor

    @classmethod
    def of(cls, before: Weights, step: Step, owner: Tensor, parameters: int) -> "Counts":
        """Counts a step of n blocks, whose padding is zero throughout.

        Args:
            before: The weights before it.
            step: What it has made.
            owner: int32 [n], the number of the parameter that a block belongs to.
            parameters: How many there are.
        """
        old, new = before.decode(), step.weights.decode()
        stored_v = step.moments.decode()[1]
        positive = step.v >= torch.finfo(torch.float32).tiny
        to_move = step.exact != old
        none = torch.zeros(parameters, device=old.device)

        def added(values: Tensor) -> Tensor:
            return none.index_add(0, owner, values.sum(dim=1, dtype=torch.float32))

        return cls(
            added(positive),
            added(positive & ((stored_v == 0) | (stored_v > 2 * step.v))),
            none.scatter_reduce(0, owner.long(), step.update.abs().amax(dim=1), "amax"),
            added(step.update.square()),
            added(to_move),
            added(to_move & (new == old)),
        )

    def plus(self, other: "Counts") -> "Counts":
        """The counts of the same parameters over the blocks of both."""
        sums = Counts(*(a + b for a, b in zip(self, other, strict=True)))
        return sums._replace(max_update=self.max_update.maximum(other.max_update))

    def unless_skipped(self, finite: Tensor | None, last: "Counts | None") -> "Counts":
        """These, or where the step was skipped those of the `last` step that was not."""
        if finite is None:
            return self
        last = last or Counts(*(torch.zeros_like(count) for count in self))
        finite = finite.to(self.positive.device)
        return Counts(*(torch.where(finite, new, old) for new, old in zip(self, last, strict=True)))


class Measured(NamedTuple):
    """Parameters that were counted together: the elements of each, and their counts."""

    elements: tuple[int, ...]
    counts: Counts


LastStep = Mapping[tuple[str, ...], Measured]


def of_all(step: LastStep) -> Health:
    """The figures of a step over all its parameters, given by their names; on the device of the first."""
    device = next(iter(step.values())).counts.positive.device
    fields = zip(*(measured.counts for measured in step.values()), strict=True)
    joined = Counts(*(torch.cat([part.to(device) for part in parts]) for parts in fields))
    total = Counts(*(field.sum() for field in joined))._replace(max_update=joined.max_update.amax())
    return _health(total, sum(sum(measured.elements) for measured in step.values()))


def of_each(step: LastStep) -> dict[str, Health]:
    """The figures of each parameter, by its name and on its own device."""
    return {
        name: _health(Counts(*scalars), elements)
        for names, measured in step.items()
        for name, elements, *scalars in zip(
            names, measured.elements, *(field.unbind() for field in measured.counts), strict=True
        )
    }


def _health(counts: Counts, elements: int) -> Health:
    return Health(
        counts.at_floor / counts.positive.clamp_min(1),
        counts.max_update,
        (counts.squared_updates / max(1, elements)).sqrt(),
        counts.stayed / counts.to_move.clamp_min(1),
    )
