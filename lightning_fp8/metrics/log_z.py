"""The normaliser of the output's softmax, which no loss holds in place."""

import torch
from torch import Tensor

from lightning_fp8.metrics.merged import Merged, total


class OutputLogZ(Merged):
    """The mean over tokens of log sum_v exp z_v, the logits' log-partition, in nats.

    Cross-entropy does not change when all logits shift, so it drifts; far from 0 the logits lose precision (PaLM,
    2204.02311, whose z-loss holds it). NaN before the first token. `update(logits)`. Reduction: sums of both.
    """

    size = 2
    higher_is_better = None

    @staticmethod
    def measure(logits: Tensor) -> Tensor:
        """The statistics: [sum of log Z, tokens]."""
        log_z = logits.float().logsumexp(-1)
        return torch.stack([total(log_z), total(torch.ones_like(log_z))])

    @staticmethod
    def figure(statistics: Tensor) -> Tensor:
        """In nats."""
        return statistics[..., 0] / statistics[..., 1]

    def update(self, logits: Tensor) -> None:
        """Adds logits [..., V]."""
        self.add(self.measure(logits))
