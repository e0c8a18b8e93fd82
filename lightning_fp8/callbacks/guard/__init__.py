"""What a run does about what it sees: alarms as data, policies as state machines, and a callback that applies them."""

from lightning_fp8.callbacks.guard.alarms import DEFAULT_ALARMS, Alarm
from lightning_fp8.callbacks.guard.callback import FP8Guard
from lightning_fp8.callbacks.guard.layers import FallbackRule, LayerPolicy
from lightning_fp8.callbacks.guard.recovery import LossSpikeError, Recovery, RewindRule
from lightning_fp8.callbacks.guard.spikes import Spike, SpikeDetector, SpikeRule

__all__ = [
    "DEFAULT_ALARMS",
    "Alarm",
    "FP8Guard",
    "FallbackRule",
    "LayerPolicy",
    "LossSpikeError",
    "Recovery",
    "RewindRule",
    "Spike",
    "SpikeDetector",
    "SpikeRule",
]
