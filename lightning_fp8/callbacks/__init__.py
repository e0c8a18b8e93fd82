"""What a run shows: throughput, logs, the health of its layers, the final report."""

from lightning_fp8.callbacks.checkpoint import LastCheckpoint
from lightning_fp8.callbacks.clipping import AdaptiveClipping
from lightning_fp8.callbacks.dead_blocks import DeadBlocks
from lightning_fp8.callbacks.gradients import FP8Gradients
from lightning_fp8.callbacks.guard import FP8Guard
from lightning_fp8.callbacks.monitor import FP8Monitor
from lightning_fp8.callbacks.peers import PeerWatch
from lightning_fp8.callbacks.progress import StepProgress
from lightning_fp8.callbacks.readings import Figure, Reading
from lightning_fp8.callbacks.report import RunReport
from lightning_fp8.callbacks.run_log import ContinuedLog, RunLog
from lightning_fp8.callbacks.start import StartReport
from lightning_fp8.callbacks.step_sizes import StepSizes
from lightning_fp8.callbacks.throughput import Throughput

__all__ = [
    "AdaptiveClipping",
    "ContinuedLog",
    "DeadBlocks",
    "FP8Gradients",
    "FP8Guard",
    "FP8Monitor",
    "Figure",
    "LastCheckpoint",
    "PeerWatch",
    "Reading",
    "RunLog",
    "RunReport",
    "StartReport",
    "StepProgress",
    "StepSizes",
    "Throughput",
]
