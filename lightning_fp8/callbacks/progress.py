"""A progress bar over the optimizer steps of the whole run.

Lightning's own counts batches and starts anew each epoch; pre-training is measured in steps, and an epoch is an
accident of the data's size.
"""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

_SHOWN = {
    "train/loss": ("loss", ".3f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "lr": ("lr", ".1e"),
    "val/loss": ("val", ".3f"),
}


class StepProgress(RichProgressBar):
    """Shows optimizer steps, time, and the newest loss, tokens a second, learning rate and validation loss.

    Args:
        refresh_rate: Batches between redraws.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)

    @property
    def total_train_batches(self) -> int | float:
        """Optimizer steps of the run."""
        return self.trainer.estimated_stepping_batches

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the bar with the first epoch only."""
        if self.train_progress_bar_id is None:
            super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar to the optimizer step."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, max(0, trainer.global_step - 1))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What is shown beside the bar, under short names."""
        values: dict[str, Any] = trainer.progress_bar_metrics
        return {label: format(float(values[name]), spec) for name, (label, spec) in _SHOWN.items() if name in values}

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{'Training':{len(self.validation_description)}}"
