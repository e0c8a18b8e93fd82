"""Metrics that are a figure of sums, or of maxima: what batches and ranks merge exactly.

Such a metric is two functions without state, and a class that adds up:

    measure   tensors -> statistics, fp64 [size]: sums over the elements, or maxima
    figure    merged statistics, fp64 [..., size] -> the figure, fp64 [...]

`FP8Monitor` uses the two functions for hundreds of layers at once, with one buffer for all statistics; everyone else
uses the class. Statistics are fp64: sums of squares neither overflow nor stop growing, and counts stay exact to 2^53.
None of this reads anything back to the host.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_fp8.metrics.exact import ExactStates
from lightning_fp8.metrics.rounded import Rounded
from lightning_fp8.numerics import Quantized


class Merged(ExactStates):
    """A metric of merged statistics; subclasses give `measure`, `figure`, and how statistics are merged.

    Args:
        size: How many statistics, where that depends on the data.
    """

    reduction: ClassVar[Literal["sum", "max"]] = "sum"
    size: ClassVar[int] = 1
    statistics: Tensor

    def __init__(self, size: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        start = 0.0 if self.reduction == "sum" else -torch.inf
        default = torch.full((size or self.size,), start, dtype=torch.float64)
        self.add_state("statistics", default, dist_reduce_fx=self.reduction)

    @staticmethod
    def figure(statistics: Tensor) -> Tensor:
        """The figure, fp64 [...], of merged statistics [..., size]."""
        return statistics.squeeze(-1)

    def add(self, statistics: Tensor) -> None:
        """Merges statistics that were measured."""
        merge = torch.add if self.reduction == "sum" else torch.maximum
        self.statistics = merge(self.statistics, statistics)

    def compute(self) -> Tensor:
        """The figure of all that was seen."""
        return self.figure(self.statistics)


class OfCasts(Merged):
    """A metric of what a cast to FP8 does to a tensor."""

    @staticmethod
    def measure(x: Rounded) -> Tensor:
        """The statistics."""
        raise NotImplementedError

    def update(self, x: Tensor, cast: Quantized) -> None:
        """Adds a tensor and its cast, as `numerics.quantize` makes it."""
        self.add(self.measure(Rounded.of(x, cast)))


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient of sums, and 0 for a share of nothing."""
    return torch.where(denominator == 0, 0.0, numerator / denominator)


def total(x: Tensor) -> Tensor:
    """The sum, or number of trues, fp64 scalar."""
    return x.sum(dtype=torch.float64)


def squares(x: Tensor, dim: int | None = None) -> Tensor:
    """The sum of squares, fp64, over all or one dimension, of whatever range `x` has."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64)
    return norm.square()
