"""How much of a tensor a cast loses altogether."""

import torch
from torch import Tensor

from lightning_fp8.metrics.merged import OfCasts, ratio, total
from lightning_fp8.metrics.rounded import Rounded


class UnderflowRate(OfCasts):
    """The share of the non-zero elements that a cast turns into zero: #(x != 0 and Q(x) = 0) / #(x != 0).

    0 where all is zero. `update(x, cast)`. Reduction: sums of both counts. (Ling 2.0 tracks it by layer, 2510.22115.)
    The error of a tensor as a whole does not show it: one outlier carries the energy, and what underflows is the rest.
    """

    size = 2
    higher_is_better = False

    @staticmethod
    def measure(x: Rounded) -> Tensor:
        """The statistics: [lost, non-zero]."""
        non_zero = x.exact != 0
        return torch.stack([total(non_zero & (x.value == 0)), total(non_zero)])

    @staticmethod
    def figure(statistics: Tensor) -> Tensor:
        """In 0..1."""
        return ratio(statistics[..., 0], statistics[..., 1])
