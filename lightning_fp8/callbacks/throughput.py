"""Tokens a second of training, model FLOPs utilisation (MFU) and memory.

Set-up and validation are left out of the time, saving checkpoints is not.

MFU is the model's FLOPs a second over what the device can do. The peaks are those of dense products, from the
datasheet in `hardware.ACCELERATORS`, and there are two: against the bf16 peak runs of any precision compare, and FP8
may pass 1; against the FP8 peak it cannot. Lightning's ThroughputMonitor takes a plugin it does not know for fp32, and
some of its peaks are those of sparse products.
"""

import time
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_fp8 import hardware


class Peaks(NamedTuple):
    """What MFU is measured against.

    Attributes:
        device: As its maker calls it.
        bf16: Dense FLOP/s.
        fp8: Dense FLOP/s.
        flops_per_token: Of the model, forward and backward.
    """

    device: str
    bf16: float
    fp8: float
    flops_per_token: float


class Throughput(Callback):
    """Logs `tokens_per_second` over the last logging interval and keeps the average of the run.

    Counts the predicted tokens of batches [B, T + 1] over all processes: B * T. The clock stops during validation.

    On devices whose datasheet is known it also logs `mfu_bf16` and `mfu_fp8`, shares of the dense peaks, and on devices
    with memory of their own `memory_gib`, the most that tensors have taken so far. What the peaks are is said once.

    Args:
        warmup_batches: Batches at the start that count neither as tokens nor as time (compilation, caches).
        flops_per_token: Model FLOPs of a token, forward and backward, for models that do not tell by a method
            `flops_per_token(length)` themselves, as `DecoderLM` does.
    """

    def __init__(self, warmup_batches: int = 2, flops_per_token: float | None = None) -> None:
        self.warmup_batches = warmup_batches
        self.flops_per_token = flops_per_token
        self.peaks: Peaks | None = None
        self._processes = 1
        self._seen = self._logged_step = 0
        self._tokens = self._interval_tokens = 0
        self._seconds = self._interval_seconds = 0.0
        self._since = 0.0

    @property
    def tokens_per_second(self) -> float:
        """The average of the run so far; 0 before the warm-up is over."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def mfu(self, tokens_per_second: float) -> dict[str, float]:
        """`mfu_bf16` and `mfu_fp8` at this speed of all processes; empty where the peaks are not known."""
        if self.peaks is None:
            return {}
        flops = tokens_per_second * self.peaks.flops_per_token / self._processes
        return {"mfu_bf16": flops / self.peaks.bf16, "mfu_fp8": flops / self.peaks.fp8}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._since = time.perf_counter()
        self._processes = trainer.world_size

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Counts the batch; logs at the Trainer's logging interval."""
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        self._seen += 1
        if self._seen == 1:
            self._find_peaks(pl_module, batch)
        if self._seen <= self.warmup_batches:
            return
        tokens = (batch.numel() - batch.shape[0]) * trainer.world_size
        self._tokens += tokens
        self._seconds += elapsed
        self._interval_tokens += tokens
        self._interval_seconds += elapsed
        step = trainer.global_step
        if step != self._logged_step and step % cast(Any, trainer).log_every_n_steps == 0:
            self._logged_step = step
            speed = self._interval_tokens / self._interval_seconds
            pl_module.log("tokens_per_second", speed, prog_bar=True)
            for name, value in {**self.mfu(speed), **_memory(batch.device)}.items():
                pl_module.log(name, value)
            self._interval_tokens, self._interval_seconds = 0, 0.0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the validation out of the next batch's time."""
        self._since = time.perf_counter()

    def _find_peaks(self, pl_module: LightningModule, batch: Tensor) -> None:
        flops_of = getattr(pl_module, "flops_per_token", None)
        if self.flops_per_token is None and flops_of is not None:
            self.flops_per_token = flops_of(batch.shape[1] - 1)
        known = hardware.accelerator(batch.device)
        if self.flops_per_token is None or known is None:
            missing = "the model does not say its FLOPs a token" if known else "the peak of this device is not known"
            rank_zero_info(f"Throughput: no MFU, because {missing}.")
            return
        self.peaks = Peaks(known.name, known.bf16, known.fp8, self.flops_per_token)
        rank_zero_info(
            f"Throughput: MFU is of the dense peaks of {known.name}, {known.bf16 / 1e12:,.0f} TFLOP/s in bf16 and"
            f" {known.fp8 / 1e12:,.0f} in FP8, at {self.flops_per_token / 1e9:.3g} GFLOPs a token."
        )


def _memory(device: torch.device) -> dict[str, float]:
    peak = hardware.peak_memory(device)
    return {} if peak is None else {"memory_gib": peak / 2**30}
