"""A prepared set, loaders of it, and a module that keeps what it was trained on."""

import hashlib
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_fp8.data import TokenDataModule

LENGTH, BATCH = 8, 4
BATCHES = 20


def data_of(prepared: Path | str | dict[str, float], **options: object) -> TokenDataModule:
    path = prepared if isinstance(prepared, dict) else str(prepared)
    return TokenDataModule(path, **{"sequence_length": LENGTH, "batch_size": BATCH, "seed": 3, **options})


def content_hash(batch: torch.Tensor) -> str:
    return hashlib.sha256(batch.numpy().tobytes()).hexdigest()[:12]


class Recorder(LightningModule):
    """Trains one weight and keeps the hash of every batch it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[str] = []

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        self.seen.append(content_hash(batch))
        return self.weight * batch.float().mean()

    def validation_step(self, batch: torch.Tensor) -> None:
        self.log("val_loss", batch.float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(
    data: TokenDataModule,
    callbacks: list[Callback] | None = None,
    ckpt_path: Path | None = None,
    **options: object,
) -> list[str]:
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=callbacks is not None,
        **{"max_epochs": 3, "limit_val_batches": 0, "num_sanity_val_steps": 0, **options},
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=False)
    return module.seen


def every_steps(folder: Path, steps: int) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=steps, save_top_k=-1)
