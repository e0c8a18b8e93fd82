"""Metrics whose states keep their dtype when the model that holds them is cast."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torchmetrics import Metric


class ExactStates(Metric):
    """A metric whose floating-point states keep their dtype for good; torchmetrics guards `.half()`, not `.to`."""

    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        def move(x: Tensor) -> Tensor:
            moved = fn(x)
            return x.to(moved.device) if x.is_floating_point() else moved

        return super()._apply(move, exclude_state)
