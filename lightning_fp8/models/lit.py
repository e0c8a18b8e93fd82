"""`DecoderLM`: the decoder as a LightningModule.

It knows nothing of FP8: precision is the plugin's business and the optimizer is passed in as a callable. It saves its
config in the checkpoint under its own key rather than as hyperparameters, because LightningCLI lets hyperparameters
of a checkpoint override, silently, what is written in YAML.
"""

import pickle
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn import ModuleList
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_fp8.metrics import BitsPerByte, Perplexity
from lightning_fp8.models.config import DecoderConfig
from lightning_fp8.models.decoder import Decoder
from lightning_fp8.optim import FP8AdamW, Schedule, WarmupCosine, decay_groups

_CONFIG_KEY = "decoder_config"


class DecoderLM(LightningModule):
    """Trains a `Decoder` to predict the next token of batches [B, T + 1].

    Logs train/loss and lr; val/loss, val/perplexity and, where the datamodule knows how many bytes a token stands
    for, val/bits_per_byte; the same under test/. Where the data has several sets, these are over all of them, and
    val/loss/NAME and so on are those of each.

    Args:
        config: The decoder's shape.
        optimizer: Called with parameter groups; its weight decay applies to parameters of two and more dimensions.
        schedule: Of the learning rate, stepped once per optimizer step.
    """

    def __init__(
        self,
        config: DecoderConfig,
        optimizer: OptimizerCallable = FP8AdamW,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.optimizer = optimizer
        self.schedule = schedule or WarmupCosine()
        self.decoder: Decoder | None = None
        self.perplexity = Perplexity()
        self.bits_per_byte: BitsPerByte | None = None
        self.set_names: list[str] = []
        self.set_perplexity = ModuleList()
        self.set_bits_per_byte = ModuleList()

    def configure_model(self) -> None:
        """Builds the decoder; Lightning calls it in the plugin's and the strategy's contexts."""
        if self.decoder is None:
            self.decoder = Decoder(self.config)

    def setup(self, stage: str) -> None:
        """Checks the model against the data and takes the bytes a token from it.

        Raises:
            ValueError: The data has more token ids than the model.
        """
        data = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "token_bytes"):
            return
        if data.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"The data has a vocabulary of {data.vocab_size} tokens and the model one of {self.config.vocab_size}:"
                f" set model.config.vocab_size to {data.vocab_size} or more."
            )
        self.bits_per_byte = BitsPerByte(data.token_bytes())
        names = getattr(data, "set_names", [])
        if len(names) > 1:
            self.set_names = list(names)
            self.set_perplexity = ModuleList(Perplexity() for _ in names)
            self.set_bits_per_byte = ModuleList(BitsPerByte(data.token_bytes()) for _ in names)

    def forward(self, tokens_bt: Tensor) -> Tensor:
        """Logits [B, T, V] of the next token."""
        if self.decoder is None:
            self.configure_model()
        decoder: Any = self.decoder
        logits_btv: Tensor = decoder(tokens_bt)
        return logits_btv

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The mean cross-entropy, in nats a token, of a batch [B, T + 1]."""
        logits_btv = self(batch[:, :-1])
        loss = F.cross_entropy(logits_btv.flatten(0, 1).float(), batch[:, 1:].flatten())
        self.log("train/loss", loss, prog_bar=True)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch [B, T + 1] of one set to the metrics."""
        self._evaluate(batch, dataloader_idx)

    def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch [B, T + 1] of one set to the metrics."""
        self._evaluate(batch, dataloader_idx)

    def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """The log-likelihood [B, T], in nats, of every predicted token of a batch [B, T + 1]."""
        logits_bvt = self(batch[:, :-1]).float().transpose(1, 2)
        return -F.cross_entropy(logits_bvt, batch[:, 1:], reduction="none")

    def _evaluate(self, batch: Tensor, which: int) -> None:
        logits_btv, targets_bt = self(batch[:, :-1]), batch[:, 1:]
        metrics: list[Any] = [self.perplexity, self.bits_per_byte]
        if self.set_names:
            metrics += [self.set_perplexity[which], self.set_bits_per_byte[which]]
        for metric in metrics:
            if metric is not None:
                metric.update(logits_btv, targets_bt)

    def on_validation_epoch_end(self) -> None:
        """Logs and resets the metrics."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Logs and resets the metrics."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        self._log_set(stage, "", self.perplexity, self.bits_per_byte)
        for name, perplexity, bits in zip(self.set_names, self.set_perplexity, self.set_bits_per_byte, strict=True):
            self._log_set(stage, f"/{name}", perplexity, bits)

    def _log_set(self, stage: str, suffix: str, perplexity_metric: Any, bits_per_byte: Any) -> None:
        perplexity = perplexity_metric.compute()
        self.log(f"{stage}/loss{suffix}", perplexity.log(), prog_bar=not suffix)
        self.log(f"{stage}/perplexity{suffix}", perplexity)
        perplexity_metric.reset()
        if bits_per_byte is not None:
            self.log(f"{stage}/bits_per_byte{suffix}", bits_per_byte.compute(), prog_bar=not suffix)
            bits_per_byte.reset()

    def configure_optimizers(self) -> Any:
        """The optimizer over decayed and undecayed parameters, and the schedule stepped by optimizer steps."""
        optimizer = self.optimizer(decay_groups(self))
        scheduler = self.schedule.of(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the norm as the Trainer is told to, also for fused optimizers.

        Under mixed precision Lightning refuses those, because with fp16 they unscale the gradients themselves; there
        is no loss scale with bf16.
        """
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores the config, so that a checkpoint alone is enough to build the model."""
        checkpoint[_CONFIG_KEY] = asdict(self.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compares the checkpoint's config with this model's.

        Raises:
            ValueError: They differ; all differences are named.
        """
        saved, own = checkpoint.get(_CONFIG_KEY, {}), asdict(self.config)
        differences = [
            f"{name} is {own.get(name, 'missing')} here and {value} there"
            for name, value in saved.items()
            if name not in own or own[name] != value
        ]
        if differences:
            raise ValueError(f"The checkpoint is of another model: {'; '.join(differences)}.")


def load_decoder(path: str) -> Decoder:
    """The decoder of a `DecoderLM` checkpoint, on the CPU, in the dtype its weights were saved in.

    Args:
        path: A checkpoint file that the Trainer wrote.

    Raises:
        ValueError: It is not such a checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, LookupError, RuntimeError) as error:  # as the bytes happen to mislead it
        raise ValueError(f"{path} is no DecoderLM checkpoint: torch.load cannot read it.") from error
    if _CONFIG_KEY not in checkpoint:
        raise ValueError(f"{path} is no DecoderLM checkpoint: it has no {_CONFIG_KEY!r}.")
    prefix = "decoder."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    decoder = Decoder(DecoderConfig(**checkpoint[_CONFIG_KEY])).to(weights["norm.weight"].dtype)
    decoder.load_state_dict(weights)
    return decoder
