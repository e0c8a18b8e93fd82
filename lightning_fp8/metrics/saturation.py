"""How much of a tensor lies beyond the range that a cast has."""

import torch
from torch import Tensor

from lightning_fp8.metrics.merged import OfCasts, ratio, total
from lightning_fp8.metrics.rounded import Rounded


class SaturationRate(OfCasts):
    """The share of the elements that a cast cuts to the end of its range: #(|x| > scale * max) / #x.

    With a scale of the tensor's own amax it is 0; with one of earlier steps (delayed scaling) it need not be.
    `update(x, cast)`. Reduction: sums of both counts. (FP8-LM, 2310.18313, steers its gradient scale by it.)
    """

    size = 2
    higher_is_better = False

    @staticmethod
    def measure(x: Rounded) -> Tensor:
        """The statistics: [cut, all]."""
        return torch.stack([total(x.saturated), total(torch.ones_like(x.saturated))])

    @staticmethod
    def figure(statistics: Tensor) -> Tensor:
        """In 0..1."""
        return ratio(statistics[..., 0], statistics[..., 1])
