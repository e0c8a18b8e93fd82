"""Models that know nothing of FP8, and a quiet Trainer, for the tests of the plugin."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Regression(LightningModule):
    """Two linear layers that can run in FP8; notes what its steps see."""

    def __init__(self, optimizer=torch.optim.AdamW):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16))
        self.optimizer = optimizer
        self.seen = []

    def training_step(self, batch, batch_idx):
        y = self.net(batch["x"])
        self.seen.append((batch["x"].dtype, batch["id"].dtype, y.dtype, torch.get_default_dtype()))
        loss = (y.float() - batch["x"][:, :16].float()).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.net(batch["x"])

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=1e-2)


def batches(n=4):
    """`n` batches of 16 rows."""
    torch.manual_seed(3)
    return DataLoader([{"x": torch.randn(32), "id": torch.tensor(i)} for i in range(16 * n)], batch_size=16)


def trainer(folder, *plugins, **options):
    """A Trainer of one epoch and no validation that writes, if at all, into `folder`."""
    defaults = {"max_epochs": 1, "limit_val_batches": 0, "enable_checkpointing": False, **QUIET}
    return Trainer(default_root_dir=folder, plugins=list(plugins), **{**defaults, **options})
