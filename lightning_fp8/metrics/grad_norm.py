"""How unusual the newest gradient norm is."""

from typing import Any

import torch
from torch import Tensor

from lightning_fp8.metrics.exact import ExactStates


class GradNormZ(ExactStates):
    """z = (|g| - mu) / sigma of the newest norm, against the moving mean and deviation of those before it.

    Both move by 1 - alpha at each update; during the first `warmup` updates they are the plain mean and deviation, and
    z is 0. A norm that is not finite has z = inf and is not remembered. (ZClip, 2504.02507, clips above 2.5.)
    `update(norm)`. Reduction: mean; after the gradients are reduced, the norm is the same on all ranks.

    Args:
        alpha: What each update keeps of mean and variance.
        warmup: Updates before the first z.
    """

    higher_is_better = None
    mean: Tensor
    variance: Tensor
    count: Tensor
    z: Tensor

    def __init__(self, alpha: float = 0.97, warmup: int = 25, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha, self.warmup = alpha, warmup
        for name in ("mean", "variance", "count", "z"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="mean")

    def update(self, norm: Tensor) -> None:
        """Adds the norm of a step's gradient: a scalar."""
        x, finite = norm.double(), norm.isfinite()
        deviation = x - self.mean
        # With both zero the norm is as expected; with a deviation from a constant it is as unexpected as can be.
        z = torch.where(deviation == 0, 0.0, deviation / self.variance.sqrt())
        ready = self.count >= self.warmup
        self.z = torch.where(finite, torch.where(ready, z, 0.0), torch.inf)
        weight = torch.where(ready, 1 - self.alpha, 1 / (self.count + 1))
        step = torch.where(finite, weight, 0.0)
        deviation = torch.where(finite, deviation, 0.0)
        self.mean = self.mean + step * deviation
        self.variance = (1 - step) * (self.variance + step * deviation.square())
        self.count = self.count + finite

    def compute(self) -> Tensor:
        """In standard deviations."""
        return self.z
