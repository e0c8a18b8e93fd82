"""What a run is about to do, said before its first step: while it is cheap to stop and correct."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_fp8.data import TokenDataModule
from lightning_fp8.estimate import activations
from lightning_fp8.models import Decoder, DecoderLM
from lightning_fp8.models.accounting import FlopCounter
from lightning_fp8.optim.estimate import Mode, estimate


class StartReport(Callback):
    """Prints parameters, tokens, steps, FLOPs, the estimated memory of a device and the run's folder."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints them; all that is not known is left out."""
        if not trainer.is_global_zero:
            return
        parameters = sum(parameter.numel() for parameter in pl_module.parameters())
        rows = {"parameters": f"{parameters:,}"}
        data = getattr(trainer, "datamodule", None)
        steps = trainer.estimated_stepping_batches
        if isinstance(data, TokenDataModule) and math.isfinite(steps):
            step_tokens = tokens_per_step(trainer, data)
            tokens = int(steps) * step_tokens
            rows["tokens"] = f"{tokens:,} in {int(steps):,} steps of {step_tokens:,}"
            if isinstance(pl_module, DecoderLM):
                flops = training_flops(pl_module, data.sequence_length)
                rows["FLOPs"] = f"{flops * tokens:.3g}, {flops:.3g} a token"
                state, batch = training_bytes(trainer, pl_module, data)
                rows["memory"] = (
                    f"about {format_bytes(state + batch)} a device: {format_bytes(state)} of weights, gradients and"
                    f" moments, {format_bytes(batch)} of activations"
                )
        rows["run folder"] = trainer.default_root_dir
        for name, value in rows.items():
            print(f"{name:12}{value}")


def tokens_per_step(trainer: Trainer, data: TokenDataModule) -> int:
    """Tokens that an optimizer step predicts, over all processes."""
    return data.batch_size * data.sequence_length * trainer.world_size * trainer.accumulate_grad_batches


def training_bytes(trainer: Trainer, model: DecoderLM, data: TokenDataModule) -> tuple[float, int]:
    """Bytes of a device, both estimated: of weights, gradients and optimizer state, and of a batch's activations."""
    with torch.device("meta"):
        twin = Decoder(model.config)
    dtype = next(model.parameters()).dtype
    mode = Mode("this run", dtype, model.optimizer, release=model.gradient_release)
    sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    ledger = estimate(twin, mode, ways=trainer.world_size if sharded else 1)
    plugin: Any = trainer.precision_plugin
    recipe, patterns = getattr(plugin, "recipe", None), getattr(plugin, "fp8_activations", ())
    patterns = [pattern.removeprefix("decoder.") for pattern in patterns]  # the model is what holds the decoder
    how = model.activation_checkpointing
    batch = activations(model.config, data.batch_size, data.sequence_length, recipe, how, patterns)
    return ledger.total_bytes, batch.peak


def format_bytes(count: float) -> str:
    """In GB, or MB where that is less than one."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def training_flops(model: DecoderLM, sequence_length: int) -> float:
    """FLOPs of matrix products and attention for each token of training.

    Counted over a forward pass without data; the backward pass has two products for each of the forward pass.

    Args:
        model: Its config is what counts.
        sequence_length: Tokens that attend to each other.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounter() as counter:
        Decoder(model.config)(torch.zeros(1, sequence_length, dtype=torch.int64))
    return float(3 * counter.flops / sequence_length)
