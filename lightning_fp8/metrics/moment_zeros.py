"""Second moments that their format has lost."""

import torch
from torch import Tensor

from lightning_fp8.metrics.merged import Merged, ratio, total


class MomentZeroFraction(Merged):
    """The share of the elements whose stored second moment is zero though their gradient is not: #(v = 0, g != 0) / #v.

    An update divides by sqrt(v) + eps, so each of them is a step of the size of m / eps. `update(v, grad)` with v as
    decoded after the step. Reduction: sums of both counts.
    """

    size = 2
    higher_is_better = False

    @staticmethod
    def measure(v: Tensor, grad: Tensor) -> Tensor:
        """The statistics: [zeros, elements]."""
        lost = (v == 0) & (grad != 0)
        return torch.stack([total(lost), total(torch.ones_like(lost))])

    @staticmethod
    def figure(statistics: Tensor) -> Tensor:
        """In 0..1."""
        return ratio(statistics[..., 0], statistics[..., 1])

    def update(self, v: Tensor, grad: Tensor) -> None:
        """Adds second moments and the gradients of the same step, of one shape."""
        self.add(self.measure(v, grad))
