"""The largest magnitude of a tensor: what its scale has to cover."""

from torch import Tensor

from lightning_fp8.metrics.merged import Merged
from lightning_fp8.numerics.quantize import amax


class Amax(Merged):
    """max |x| over all elements, batches and ranks; NaN or inf where `x` holds one, -inf before the first update.

    `update(x)`. Reduction: max.
    """

    reduction = "max"
    higher_is_better = None

    @staticmethod
    def measure(x: Tensor) -> Tensor:
        """The statistic: fp64 [1]."""
        return amax(x).double().view(1)

    def update(self, x: Tensor) -> None:
        """Adds a tensor of any shape."""
        self.add(self.measure(x))
