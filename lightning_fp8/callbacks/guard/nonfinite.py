"""Steps whose gradients are not finite are left out, whatever the optimizer.

`FP8AdamW` does so itself, on the device. For others:

* A fused torch optimizer takes a flag on the device and leaves weights, moments and step counts as they are where it
  is set (`found_inf`, made for gradient scalers): no host read.
* Any other must not be called with gradients at all. So the host reads the flag, one number a step, and the gradients
  go.

Each decides for the gradients of all processes: where they hold shards, one may see what the others do not.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_fp8.optim import FP8AdamW
from lightning_fp8.optim.finite import all_finite, count_skips
from lightning_fp8.optim.shards import local_part


class StepSkipper:
    """Leaves out the steps of `optimizer` whose gradients are not finite, and counts them.

    In a plain loop or with Fabric: `skipper.before_step()` after the last backward, before `optimizer.step()`.

    Raises:
        ValueError: The optimizer steps in backward, each parameter by itself.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if getattr(optimizer, "gradient_release", None) is not None:
            raise ValueError(
                "FP8Guard cannot leave out a step as a whole under gradient release, where each parameter steps in"
                " backward and leaves out its own (FP8AdamW): set skip_nonfinite: false, or gradient_release: false."
            )
        self._optimizer: Any = optimizer
        self._counts: Tensor | None = None

    @property
    def counts(self) -> Tensor | None:
        """Steps left out in all, and since the last one that was not: int64 [2] on the device; None before any."""
        if isinstance(self._optimizer, FP8AdamW):
            return self._optimizer.skip_counts
        return self._counts

    @torch.no_grad()
    def before_step(self) -> None:
        """Looks at the gradients."""
        optimizer = self._optimizer
        if isinstance(optimizer, FP8AdamW):
            return
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            return
        finite = all_finite([local_part(p.grad) for p in params])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            agreed = finite.float()
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MIN)
            finite = agreed.bool()
        self._counts = count_skips(self._counts, finite)
        if getattr(optimizer, "_step_supports_amp_scaling", False) and optimizer.defaults.get("fused"):
            optimizer.found_inf = (~finite).float()
        elif not finite:
            for p in params:
                p.grad = None
