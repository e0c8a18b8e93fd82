"""How far the range of a cast is from the tensor that is cast."""

import torch
from torch import Tensor

from lightning_fp8.metrics.merged import Merged
from lightning_fp8.numerics import Quantized
from lightning_fp8.numerics.quantize import amax


class ScaleLag(Merged):
    """log2(max |x| / (scale * max of the format)), the largest over batches and ranks, in octaves.

    Above 0 something was cut off; below -6 or so range is wasted. Current scaling has 0, or down to -1 with scales
    that are powers of two. Of several scales the largest counts; -inf of zeros. `update(x, cast)`. Reduction: max.
    """

    reduction = "max"
    higher_is_better = None

    @staticmethod
    def measure(largest: Tensor, reach: Tensor) -> Tensor:
        """The statistic, fp64 [1], of max |x| and the largest magnitude that the cast can hold: scalars."""
        lag = (largest.double() / reach.double()).log2()
        # In units of 2^-16: a scale is rounded to fp32, and what just fits must not look like what was cut off.
        return (lag * 2.0**16).round().div(2.0**16).add(0.0).view(1)

    def update(self, x: Tensor, cast: Quantized) -> None:
        """Adds a tensor and its cast."""
        self.add(self.measure(amax(x), reach(cast)))


def reach(cast: Quantized) -> Tensor:
    """The largest magnitude that the codes with the largest scale can hold, fp64 scalar."""
    return cast.scale.double().amax() * torch.finfo(cast.codes.dtype).max
