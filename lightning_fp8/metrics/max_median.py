"""How far the largest channel of a token stands out of the others."""

import torch
from torch import Tensor

from lightning_fp8.metrics.merged import Merged, total


class MaxMedianRatio(Merged):
    """The mean over tokens of max_j |x_j| / median_j |x_j| (the lower median, as torch's).

    Tokens whose median is 0 do not count; NaN before the first that does. `update(x)` with x [..., K]. Reduction: sums
    of ratios and of tokens. ("Massive activations", 2402.17762, are those some thousand times the median.)
    """

    size = 2
    higher_is_better = False

    @staticmethod
    def measure(x: Tensor) -> Tensor:
        """The statistics: [sum of ratios, tokens]."""
        if x.numel() == 0:
            return torch.zeros(2, dtype=torch.float64, device=x.device)
        ordered = x.reshape(-1, x.shape[-1]).abs().float().sort(-1).values
        median = ordered[:, (ordered.shape[-1] - 1) // 2]
        counted = median != 0
        return torch.stack([total(torch.where(counted, ordered[:, -1] / median, 0.0)), total(counted)])

    @staticmethod
    def figure(statistics: Tensor) -> Tensor:
        """At least 1."""
        return statistics[..., 0] / statistics[..., 1]

    def update(self, x: Tensor) -> None:
        """Adds activations [..., K]."""
        self.add(self.measure(x))
