"""A training configuration read without training: its model on the meta device, its data unread, no trainer."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_fp8.cli.fit import FP8CLI


class Blueprint(FP8CLI):
    """`FP8CLI` that stops before the trainer; `run=False` goes with it."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None: it may be of a device that this machine does not have."""

    def sketch(self) -> nn.Module:
        """The model with every parameter on the meta device, in the dtype that the plugin gives it."""
        model: LightningModule = self.model
        with torch.device("meta"):
            model.configure_model()
        plugin = self.plugin()
        return model.to(torch.bfloat16) if plugin and plugin.weights == "bf16" else model

    def example(self) -> torch.Tensor:
        """The input tokens [B, T] of one micro-batch, on the meta device."""
        data = self.datamodule
        return torch.zeros(data.batch_size, data.sequence_length, dtype=torch.int64, device="meta")
