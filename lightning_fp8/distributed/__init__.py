"""What travels between processes in FP8."""

from lightning_fp8.distributed.all_gather import gather_in_fp8
from lightning_fp8.distributed.gradients import FP8GradientReduction

__all__ = ["FP8GradientReduction", "gather_in_fp8"]
