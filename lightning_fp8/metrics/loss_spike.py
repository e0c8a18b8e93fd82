"""How unusual the newest loss is, judged so that the spike itself cannot hide it."""

from typing import Any

import torch
from torch import Tensor

from lightning_fp8.metrics.exact import ExactStates

_NORMAL = 1.4826  # the standard deviation of a Gaussian in units of its median absolute deviation
_FLOOR = 1e-3  # nats: fluctuations smaller than this are none


class LossSpike(ExactStates):
    """z = (L - median) / (1.4826 MAD + 0.001) of the newest loss, against the `window` losses before it.

    Median and median absolute deviation, unlike mean and standard deviation, are those of a healthy run even while a
    spike is in the window. z is 0 until half of the window is known; a loss that is not finite has z = inf and is not
    remembered. `update(loss)`; `confirmed()` says whether the last `confirm` losses were all above `threshold`.
    Reduction: mean of the states; give it the loss of all ranks, or what ranks decide will differ.

    Args:
        window: Losses to judge by.
        threshold: z above which a loss is a spike.
        confirm: How many in a row confirm it.
    """

    higher_is_better = False
    losses: Tensor  # the newest first; NaN where there is none yet
    z: Tensor
    in_a_row: Tensor

    def __init__(self, window: int = 100, threshold: float = 6.0, confirm: int = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold, self.confirm = threshold, confirm
        self.add_state("losses", torch.full((window,), torch.nan, dtype=torch.float64), dist_reduce_fx="mean")
        for name in ("z", "in_a_row"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="mean")

    def update(self, loss: Tensor) -> None:
        """Adds the loss of a step, a scalar."""
        x, finite = loss.double(), loss.isfinite()
        known = ~self.losses.isnan()
        median = self.losses.nanmedian()
        spread = (self.losses - median).abs().nanmedian()
        z = (x - median) / (_NORMAL * spread + _FLOOR)
        judged = 2 * known.sum() >= known.numel()
        self.z = torch.where(finite, torch.where(judged, z, 0.0), torch.inf)
        self.in_a_row = torch.where(self.z > self.threshold, self.in_a_row + 1, 0.0)
        self.losses = torch.where(finite, torch.cat([x.view(1), self.losses[:-1]]), self.losses)

    def compute(self) -> Tensor:
        """In standard deviations of a healthy run."""
        return self.z

    def confirmed(self) -> Tensor:
        """Whether enough spikes came in a row: bool scalar, on its device."""
        return self.in_a_row >= self.confirm
