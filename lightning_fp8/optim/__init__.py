"""What an optimizer step does: FP8 state, stochastic rounding, gradient release, checkpoints, schedules."""

from lightning_fp8.optim.adamw import FP8AdamW
from lightning_fp8.optim.clipping import AdaGC, ZClip, clip_grad_norm
from lightning_fp8.optim.configured import FP8OptimizerOf
from lightning_fp8.optim.groups import decay_groups
from lightning_fp8.optim.interchange import convert_state, export_fp32_state, import_adamw_state
from lightning_fp8.optim.release import GradientRelease, enable_gradient_release
from lightning_fp8.optim.schedules import Schedule, WarmupCosine, WarmupStableDecay
from lightning_fp8.optim.wrapper import FP8Optimizer

__all__ = [
    "AdaGC",
    "FP8AdamW",
    "FP8Optimizer",
    "FP8OptimizerOf",
    "GradientRelease",
    "Schedule",
    "WarmupCosine",
    "WarmupStableDecay",
    "ZClip",
    "clip_grad_norm",
    "convert_state",
    "decay_groups",
    "enable_gradient_release",
    "export_fp32_state",
    "import_adamw_state",
]
