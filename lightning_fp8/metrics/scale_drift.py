"""How fast the scale of a tensor moves."""

from typing import Any

import torch
from torch import Tensor

from lightning_fp8.metrics.exact import ExactStates


class ScaleDrift(ExactStates):
    """|log2 s_t - log2 s_(t-H)|: the octaves by which a scale has moved over H updates; 0 until there are as many.

    `update(scale)` with the decode scales of a tensor, of which the largest counts. Reduction: the maximum over ranks
    of each of the H + 1 remembered scales.

    Args:
        history: H.
    """

    higher_is_better = False
    log_scales: Tensor  # the newest first; -inf where there is none yet

    def __init__(self, history: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        none = torch.full((history + 1,), -torch.inf, dtype=torch.float64)
        self.add_state("log_scales", none, dist_reduce_fx="max")

    def update(self, scale: Tensor) -> None:
        """Adds the scale of a step: fp32, any shape."""
        newest = scale.double().amax().log2().view(1)
        self.log_scales = torch.cat([newest, self.log_scales[:-1]])

    def compute(self) -> Tensor:
        """In octaves, fp64."""
        newest, oldest = self.log_scales[0], self.log_scales[-1]
        return torch.where(oldest == -torch.inf, 0.0, (newest - oldest).abs())
