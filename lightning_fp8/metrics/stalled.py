"""Weights that do not move, because what they were to move by is rounded away."""

import torch
from torch import Tensor

from lightning_fp8.metrics.merged import Merged, ratio, total


class StalledUpdateFraction(Merged):
    """The share of the weights to be moved by a step that stayed: #(after = before, w != before) / #(w != before).

    w is the exact new weight, before it is rounded. 0 where none was to move. Rounded to nearest, a bf16 weight stays
    if it is to move by less than 2^-9 of itself; rounded stochastically, many stay in each step but none for good.
    `update(before, exact, after)`. Reduction: sums of both counts.
    """

    size = 2
    higher_is_better = False

    @staticmethod
    def measure(before: Tensor, exact: Tensor, after: Tensor) -> Tensor:
        """The statistics: [stayed, to move]."""
        to_move = exact.double() != before.double()
        return torch.stack([total(to_move & (after == before)), total(to_move)])

    @staticmethod
    def figure(statistics: Tensor) -> Tensor:
        """In 0..1."""
        return ratio(statistics[..., 0], statistics[..., 1])

    def update(self, before: Tensor, exact: Tensor, after: Tensor) -> None:
        """Adds a step: stored weights, exact new weights, stored new weights, all of one shape."""
        self.add(self.measure(before, exact, after))
