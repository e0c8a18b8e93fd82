"""Steps whose gradients are not finite are left out, whatever the optimizer.

`FP8AdamW` and `FP8Optimizer` do so themselves, on the device. For others:

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

from lightning_fp8.optim import FP8AdamW, FP8Optimizer
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
        self._skips_itself = isinstance(optimizer, FP8AdamW | FP8Optimizer)
        self._counts: Tensor | None = None

    @property
    def counts(self) -> Tensor | None:
        """Steps left out in all, and since the last one that was not: int64 [2] on the device; None before any."""
        counts: Tensor | None = self._optimizer.skip_counts if self._skips_itself else self._counts
        return counts

    @torch.no_grad()
    def before_step(self) -> None:
        """Looks at the gradients."""
        optimizer = self._optimizer
        if self._skips_itself:
            return
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            return
        finite = all_finite([local_part(p.grad) for p in params])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            agreed = finite.float()
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MIN)
            finite = agreed.bool()
        before = torch.zeros(2, dtype=torch.int64, device=finite.device) if self._counts is None else self._counts
        self._counts = count_skips(before, finite)
        if getattr(optimizer, "_step_supports_amp_scaling", False) and optimizer.defaults.get("fused"):
            optimizer.found_inf = (~finite).float()
        elif not finite:
            for p in params:
                p.grad = None
