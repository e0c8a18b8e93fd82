"""By how much a cast turns a tensor."""

import torch
from torch import Tensor

from lightning_fp8.metrics.merged import OfCasts, squares, total
from lightning_fp8.metrics.rounded import Rounded


class CosineDistortion(OfCasts):
    """1 - <x, Q(x)> / (|x| |Q(x)|): 0 where the direction stays, 1 where nothing of it is left.

    0 of zeros. `update(x, cast)`. Reduction: sums of the three products. (Ling 2.0 tracks it by layer, 2510.22115.)
    """

    size = 3
    higher_is_better = False

    @staticmethod
    def measure(x: Rounded) -> Tensor:
        """The statistics: [<x, Q>, <x, x>, <Q, Q>]."""
        return torch.stack([total(x.exact.double() * x.value), squares(x.exact), squares(x.value)])

    @staticmethod
    def figure(statistics: Tensor) -> Tensor:
        """In 0..2."""
        inner, exact, value = statistics.unbind(-1)
        cosine = inner / (exact.sqrt() * value.sqrt())
        cosine = torch.where((value == 0) & (exact > 0), 0.0, torch.where(exact == 0, 1.0, cosine))
        return (1 - cosine).clamp_min(0)
