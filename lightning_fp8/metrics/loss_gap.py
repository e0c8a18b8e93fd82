"""How far a run's loss is from that of another run, step by step."""

from typing import Any

import torch
from torch import Tensor

from lightning_fp8.metrics.exact import ExactStates


class LossGapToReference(ExactStates):
    """(L - L_ref) / L_ref of the moving averages of a loss and of a stored curve; 0.0025 is a gap of 0.25 %.

    Both averages take the same steps with the same weights, so noise that the two runs share (seeds, data order)
    cancels. Steps that the curve does not have do not count; NaN before the first that does. `update(loss, step)`.
    Reduction: mean over ranks.

    Args:
        reference: fp32 or fp64 [steps], the loss of the reference run at each step; NaN where it is not known.
        alpha: What each update keeps of the averages.
    """

    higher_is_better = False
    loss: Tensor
    expected: Tensor
    reference: Tensor

    def __init__(self, reference: Tensor, alpha: float = 0.98, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha = alpha
        self.register_buffer("reference", reference.double(), persistent=False)
        self.add_state("loss", torch.zeros((), dtype=torch.float64), dist_reduce_fx="mean")
        self.add_state("expected", torch.zeros((), dtype=torch.float64), dist_reduce_fx="mean")

    def update(self, loss: Tensor, step: int) -> None:
        """Adds the loss of a step, a scalar, the first step being 0."""
        if not 0 <= step < len(self.reference):
            return
        expected = self.reference[step]
        weight = torch.where(expected.isnan(), 0.0, 1 - self.alpha)
        # Both start at 0, and the bias of that cancels in the quotient.
        self.loss = self.loss + weight * (loss.double() - self.loss)
        self.expected = self.expected + weight * (expected.nan_to_num() - self.expected)

    def compute(self) -> Tensor:
        """As a share of the reference."""
        return (self.loss - self.expected) / self.expected
