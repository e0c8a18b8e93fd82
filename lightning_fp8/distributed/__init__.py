"""What ranks send each other, in FP8."""

from lightning_fp8.distributed.gradients import FP8GradientReduction

__all__ = ["FP8GradientReduction"]
