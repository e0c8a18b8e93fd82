"""SwiGLU neurons whose two projections have come to point the same way."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_fp8.metrics.merged import Merged


class SwiGLUAlignment(Merged):
    """max_i |cos(w_gate,i, w_up,i)| over the neurons of an MLP; 0 where a row is zero.

    A neuron with aligned rows is quadratic in its input: the source of the late, sporadic outliers that end FP8 runs
    (Fishman et al., 2409.12517). `update(gate, up)`. Reduction: max, also over shards of rows.
    """

    reduction = "max"
    higher_is_better = False

    @staticmethod
    def measure(gate: Tensor, up: Tensor) -> Tensor:
        """The statistic: fp64 [1]."""
        if gate.shape[0] == 0:
            return torch.zeros(1, dtype=torch.float64, device=gate.device)
        return F.cosine_similarity(gate.float(), up.float(), dim=1).abs().amax().double().view(1)

    def update(self, gate: Tensor, up: Tensor) -> None:
        """Adds the weights [neurons, K] of both projections."""
        self.add(self.measure(gate, up))
