"""Tokens a second of training; set-up and validation are left out, saving checkpoints is not."""

import time
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class Throughput(Callback):
    """Logs `tokens_per_second` over the last logging interval and keeps the average of the run.

    Counts the predicted tokens of batches [B, T + 1] over all processes: B * T. The clock stops during validation.

    Args:
        warmup_batches: Batches at the start that count neither as tokens nor as time (compilation, caches).
    """

    def __init__(self, warmup_batches: int = 2) -> None:
        self.warmup_batches = warmup_batches
        self._seen = self._logged_step = 0
        self._tokens = self._interval_tokens = 0
        self._seconds = self._interval_seconds = 0.0
        self._since = 0.0

    @property
    def tokens_per_second(self) -> float:
        """The average of the run so far; 0 before the warm-up is over."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Counts the batch; logs at the Trainer's logging interval."""
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        self._seen += 1
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
            pl_module.log("tokens_per_second", self._interval_tokens / self._interval_seconds, prog_bar=True)
            self._interval_tokens, self._interval_seconds = 0, 0.0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the validation out of the next batch's time."""
        self._since = time.perf_counter()
