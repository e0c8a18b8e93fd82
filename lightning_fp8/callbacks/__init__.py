"""What a run shows: throughput, logs, the final report."""

from lightning_fp8.callbacks.checkpoint import LastCheckpoint
from lightning_fp8.callbacks.gradients import FP8Gradients
from lightning_fp8.callbacks.progress import StepProgress
from lightning_fp8.callbacks.report import RunReport
from lightning_fp8.callbacks.run_log import RunLog
from lightning_fp8.callbacks.start import StartReport
from lightning_fp8.callbacks.throughput import Throughput

__all__ = ["FP8Gradients", "LastCheckpoint", "RunLog", "RunReport", "StartReport", "StepProgress", "Throughput"]
