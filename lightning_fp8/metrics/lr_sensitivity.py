"""How much a wrong learning rate costs: a property of a model and its precision, not of one run."""

import torch
from torch import Tensor

from lightning_fp8.metrics.exact import ExactStates


def lr_sensitivity(losses: Tensor, initial: Tensor | float) -> Tensor:
    """mean_lr min(L(lr), L_0) - min_lr L(lr), in nats: 0 if every rate of a sweep ends at the same loss.

    A run that diverged counts as one that learned nothing. (Wortsman et al., 2309.14322: the expectation over learning
    rates spread evenly on a log scale, over three decades around the best.)

    Args:
        losses: [rates], the last loss at each learning rate, at even distances on a log scale; NaN or inf of runs that
            diverged.
        initial: L_0, the loss before training.
    """
    start = torch.as_tensor(initial, dtype=torch.float64, device=losses.device)
    kept = losses.double().nan_to_num(nan=torch.inf).minimum(start)
    return kept.mean() - kept.min()


class LRSensitivity(ExactStates):
    """`lr_sensitivity` of a sweep whose runs come one by one, or lie on several ranks.

    `update(loss)` with the last loss of a run. Reduction: the runs of all ranks together.

    Args:
        initial: The loss before training.
    """

    higher_is_better = False
    losses: list[Tensor] | Tensor  # ranks merge into one tensor

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.add_state("losses", [], dist_reduce_fx="cat")

    def update(self, loss: Tensor) -> None:
        """Adds a run, a scalar, or several [rates]."""
        self.losses = [*self.losses, loss.double().reshape(-1)]

    def compute(self) -> Tensor:
        """In nats."""
        losses = self.losses if isinstance(self.losses, Tensor) else torch.cat(self.losses)
        return lr_sensitivity(losses, self.initial)
