"""Signal to quantisation noise, of a tensor as a whole."""

import torch
from torch import Tensor

from lightning_fp8.metrics.merged import OfCasts, squares
from lightning_fp8.metrics.rounded import Rounded


class SQNR(OfCasts):
    """10 log10(sum x^2 / sum (x - Q(x))^2) in dB; inf where the cast is exact, of zeros too.

    `update(x, cast)`. Reduction: sums of both. E4M3 gives 31.5 dB on Gaussians, E5M2 25.5: six less, for one bit.
    Never look at it alone: with outliers it rises while all else underflows (`BlockSQNR`, `UnderflowRate`).
    """

    size = 2
    higher_is_better = True

    @staticmethod
    def measure(x: Rounded) -> Tensor:
        """The statistics: [signal, noise]."""
        return torch.stack([squares(x.exact), squares(x.exact - x.value)])

    @staticmethod
    def figure(statistics: Tensor) -> Tensor:
        """In dB."""
        signal, noise = statistics.unbind(-1)
        return torch.where(noise == 0, torch.inf, 10 * (signal / noise).log10())
