from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_fp8.callbacks import StepProgress


class Recorder(StepProgress):
    """Notes where the training bar stands after each batch, and how many bars there were."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1)
        self.positions: list[int] = []
        self.bars: set[Any] = set()

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        bar = self.progress.tasks[self.train_progress_bar_id]
        self.positions.append(int(bar.completed))
        self.bars.add((bar.id, bar.total, bar.start_time))


def test_the_bar_counts_optimizer_steps_across_epochs(tmp_path: Path) -> None:
    callback = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_model_summary=False,
        max_epochs=2,
        limit_train_batches=6,
        limit_val_batches=1,
        accumulate_grad_batches=2,
    )
    trainer.fit(BoringModel())
    assert callback.positions[-1] == 6
    assert callback.positions == sorted(callback.positions)
    assert len(callback.bars) == 1
    assert next(iter(callback.bars))[1] == 6


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        ({}, {}),
        ({"train/loss": 1.23456, "lr": 0.003}, {"loss": "1.235", "lr": "3.0e-03"}),
        ({"val/loss": 2.0, "tokens_per_second": 12345.6}, {"tokens/s": "12,346", "val": "2.000"}),
        ({"v_num": "3", "other": 1.0}, {}),
    ],
)
def test_what_is_shown(metrics: dict[str, Any], shown: dict[str, str]) -> None:
    trainer: Any = SimpleNamespace(progress_bar_metrics=metrics)
    module: Any = None
    assert StepProgress().get_metrics(trainer, module) == shown
