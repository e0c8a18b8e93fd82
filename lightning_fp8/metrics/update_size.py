"""How large the steps of an adaptive optimizer are, in units of its learning rate."""

import torch
from torch import Tensor

from lightning_fp8.metrics.merged import Merged, squares
from lightning_fp8.numerics.quantize import amax


class UpdateRMS(Merged):
    """The root mean square of u = m / (sqrt(v) + eps), what the learning rate multiplies; of moments as stored.

    Adam's is about 1 or less; a second moment that its format has lost makes it tens. NaN before the first element.
    `update(u)`. Reduction: sums of squares and elements. (StableAdamW, Wortsman et al., 2304.13013.)
    """

    size = 2
    higher_is_better = None

    @staticmethod
    def measure(u: Tensor) -> Tensor:
        """The statistics: [sum of squares, elements]."""
        return torch.stack([squares(u), torch.full((), float(u.numel()), dtype=torch.float64, device=u.device)])

    @staticmethod
    def figure(statistics: Tensor) -> Tensor:
        """At least 0."""
        return (statistics[..., 0] / statistics[..., 1]).sqrt()

    def update(self, u: Tensor) -> None:
        """Adds an update of any shape."""
        self.add(self.measure(u))


class MaxUpdate(Merged):
    """The largest |u|; with fp32 moments it is at most (1 - beta1) / sqrt(1 - beta2), and in practice a few.

    `update(u)`. Reduction: max.
    """

    reduction = "max"
    higher_is_better = False

    @staticmethod
    def measure(u: Tensor) -> Tensor:
        """The statistic: fp64 [1]."""
        return amax(u).double().view(1)

    def update(self, u: Tensor) -> None:
        """Adds an update of any shape."""
        self.add(self.measure(u))
