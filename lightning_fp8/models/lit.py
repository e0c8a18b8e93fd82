"""`DecoderLM`: the decoder as a LightningModule.

It knows nothing of FP8: precision is the plugin's business and the optimizer is passed in as a callable. It saves its
config in the checkpoint under its own key rather than as hyperparameters, because LightningCLI lets hyperparameters
of a checkpoint override, silently, what is written in YAML.
"""

from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import ModuleList
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_fp8.metrics import BitsPerByte, Perplexity
from lightning_fp8.models.accounting import flops_per_token
from lightning_fp8.models.config import SHAPING, DecoderConfig, differences
from lightning_fp8.models.decoder import Decoder
from lightning_fp8.models.loss import CHUNK_LOGITS
from lightning_fp8.models.masks import documents
from lightning_fp8.models.named_state import by_name
from lightning_fp8.models.recompute import Recompute
from lightning_fp8.models.saved import CONFIG_KEY, LENGTH_KEY, load_weights
from lightning_fp8.models.sharding import copy_weights, materialize, mesh_of, shard
from lightning_fp8.optim import (
    FP8AdamW,
    GradientRelease,
    Schedule,
    WarmupCosine,
    decay_groups,
    enable_gradient_release,
)


class DecoderLM(LightningModule):
    """Trains a `Decoder` to predict the next token of batches [B, T + 1].

    Logs train/loss and lr; val/loss, val/perplexity and, where the datamodule knows how many bytes a token stands
    for, val/bits_per_byte; the same under test/. Where the data has several sets, these are over all of them, and
    val/loss/NAME and so on are those of each.

    Args:
        config: The decoder's shape.
        optimizer: Called with parameter groups; its weight decay applies to parameters of two and more dimensions.
        schedule: Of the learning rate, stepped once per optimizer step.
        gradient_release: Step each parameter in backward and free its gradient: 2 bytes a parameter less. Needs an
            optimizer that can, such as `FP8AdamW`; excludes gradient clipping, accumulation and DDP.
        initial_weights: A checkpoint, of `lightning-fp8 import` or of a run, whose weights to begin with. A resumed
            run has its own.
        activation_checkpointing: What backward computes again instead of keeping it: nothing; what is cheap
            ("selective"); whole blocks ("full").
        end_of_text: The token id that ends a document; attention then stays within documents. None: it sees the
            whole sequence, documents before included.
        processes_a_copy: Under ModelParallelStrategy, how many processes hold one copy of the weights together, such
            as the devices of a node; None is all data-parallel processes.
    """

    def __init__(
        self,
        config: DecoderConfig,
        optimizer: OptimizerCallable = FP8AdamW,
        schedule: Schedule | None = None,
        gradient_release: bool = False,
        initial_weights: str | None = None,
        activation_checkpointing: Recompute = "none",
        end_of_text: int | None = None,
        processes_a_copy: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.processes_a_copy = processes_a_copy
        self.initial_weights = initial_weights
        self.activation_checkpointing: Recompute = activation_checkpointing
        self.end_of_text = end_of_text
        self.optimizer = optimizer
        self.schedule = schedule or WarmupCosine()
        self.gradient_release = gradient_release
        self._release: GradientRelease | None = None
        self.decoder: Decoder | None = None
        self.perplexity = Perplexity()
        self.bits_per_byte: BitsPerByte | None = None
        self.set_names: list[str] = []
        self.set_perplexity = ModuleList()
        self.set_bits_per_byte = ModuleList()

    def configure_model(self) -> None:
        """Builds the decoder; Lightning calls it in the plugin's and the strategy's contexts.

        Under ModelParallelStrategy the decoder is cut (`sharding.py`) before it has memory. Where the Trainer computes
        in bf16 on fp32 weights, blocks are gathered in bf16.

        Raises:
            ValueError: The strategy is to cut matrices too (tensor parallelism), or copies do not divide processes.
        """
        if self.decoder is not None:
            return
        if self.device_mesh is None:
            self.decoder = Decoder(self.config, activation_checkpointing=self.activation_checkpointing)
        else:
            self.decoder = self._sharded(self.device_mesh)
        if self.initial_weights and not self.decoder.embedding.weight.is_meta:
            saved, weights = load_weights(self.initial_weights)
            _refuse(differences(saved, self.config, SHAPING), self.initial_weights)
            copy_weights(weights, self.decoder)

    def _sharded(self, mesh: DeviceMesh) -> Decoder:
        if mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                f"DecoderLM has no plan for tensor parallelism, and tensor_parallel_size is"
                f" {mesh['tensor_parallel'].size()}: give ModelParallelStrategy tensor_parallel_size 1 and, as"
                " data_parallel_size, the number of processes."
            )
        with torch.device("meta"):
            decoder = Decoder(self.config, activation_checkpointing=self.activation_checkpointing)
        mixed = str(self.trainer.precision) == "bf16-mixed"
        shard(
            decoder,
            mesh_of(mesh["data_parallel"], self.processes_a_copy),
            gather_dtype=torch.bfloat16 if mixed else None,
        )
        return materialize(decoder, self.trainer.strategy.root_device)

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

    def forward(self, tokens_bt: Tensor, targets_bt: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of the next token or, where targets are given, the mean loss."""
        if self.decoder is None:
            self.configure_model()
        decoder: Any = self.decoder
        documents_bt = None if self.end_of_text is None else documents(tokens_bt, self.end_of_text)
        out: Tensor = decoder(tokens_bt, targets_bt, documents_bt=documents_bt)
        return out

    def flops_per_token(self, length: int) -> int:
        """Model FLOPs of one token of a training step on sequences of `length`; `Throughput` takes MFU from them."""
        return flops_per_token(self.config, length)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The mean cross-entropy, in nats a token, of a batch [B, T + 1]."""
        loss: Tensor = self(batch[:, :-1], batch[:, 1:])
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
        rows = max(1, CHUNK_LOGITS // logits_btv[0].numel())  # the metrics make fp32 of what they are given
        for logits, targets in zip(logits_btv.split(rows), targets_bt.split(rows), strict=True):
            for metric in metrics:
                if metric is not None:
                    metric.update(logits, targets)

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
        """The optimizer over decayed and undecayed parameters, and the schedule stepped by optimizer steps.

        Raises:
            ValueError: Gradients are to be released, and the optimizer or the Trainer cannot do so.
        """
        optimizer: Any = self.optimizer(decay_groups(self))
        if self._release is not None:  # of an earlier fit
            self._release.remove()
        if self.gradient_release:
            self._release = enable_gradient_release(self, optimizer)
            self._release.check(
                self,
                gradient_clip_val=self.trainer.gradient_clip_val,
                accumulate_grad_batches=self.trainer.accumulate_grad_batches,
            )
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
        """Stores what it takes to build and use the model from the file alone; names the optimizer's state."""
        checkpoint[CONFIG_KEY] = asdict(self.config)
        length = getattr(getattr(self._trainer, "datamodule", None), "sequence_length", None)
        if isinstance(length, int):
            checkpoint[LENGTH_KEY] = length
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = [by_name(state) for state in checkpoint["optimizer_states"]]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compares the checkpoint's config with this model's; lets the data count in batches of this run's size.

        Raises:
            ValueError: They differ; all differences are named.
        """
        if CONFIG_KEY in checkpoint:
            _refuse(differences(checkpoint[CONFIG_KEY], self.config), "The checkpoint")
        data: Any = getattr(self._trainer, "datamodule", None)  # there is no Trainer in load_from_checkpoint
        if hasattr(data, "recount"):
            data.recount(checkpoint)


def _refuse(found: list[str], whose: str) -> None:
    if found:
        raise ValueError(f"{whose} is of another model: {'; '.join(found)}.")
