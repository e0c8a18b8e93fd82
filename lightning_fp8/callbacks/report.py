"""What a finished run shows: one table, `summary.json`, `loss.png`.

Everything in the summary is measured: bytes a parameter are those of the storages that exist after the first step,
when the optimizer's state has come into being, and the share of GEMM FLOPs in FP8 is counted while the first batch
runs, by an operator counter for all GEMMs and by the FP8 backend's own record for those in FP8. Transformer Engine's
are in the record alone.
"""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_fp8.callbacks.plots import plot_loss
from lightning_fp8.callbacks.run_log import RunLog
from lightning_fp8.callbacks.throughput import Throughput
from lightning_fp8.compute.gemm import GemmRecord, record_gemms
from lightning_fp8.compute.linear import FP8Linear
from lightning_fp8.compute.transformer_engine.layers import ConvertedLinear
from lightning_fp8.compute.transformer_engine.record import BACKEND as TRANSFORMER_ENGINE
from lightning_fp8.data import TokenDataModule
from lightning_fp8.files import write_text
from lightning_fp8.models.accounting import FlopCounter
from lightning_fp8.optim.ledger import Ledger, measure_ledger


class RunReport(Callback):
    """Writes `summary.json` and `loss.png` into the run's folder at the end of `fit`, and prints the table."""

    def __init__(self) -> None:
        self._counting = ExitStack()
        self._flops = FlopCounter()
        self._gemms: list[GemmRecord] = []
        self._ledger: Ledger | None = None
        self._first_step = self._validated_at = 0
        self._table: Table | None = None

    def state_dict(self) -> dict[str, Any]:
        """The number of torch threads: a resume is exact, bit for bit, with the same number."""
        return {"torch_threads": torch.get_num_threads()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Says so if a run is resumed with another number of threads."""
        before, now = state_dict.get("torch_threads"), torch.get_num_threads()
        if before not in (None, now):
            rank_zero_warn(
                f"The run was made with {before} torch threads and goes on with {now}: sums are added up in another"
                f" order, so it will not be the same bit for bit. Set OMP_NUM_THREADS={before} if it is to be."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the tokenizer beside the checkpoints."""
        self._first_step = trainer.global_step
        _copy_tokenizer(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Tensor, batch_idx: int) -> None:
        """Starts counting at the first batch."""
        if not self._flops.flops:
            self._gemms = self._counting.enter_context(record_gemms())
            self._counting.enter_context(self._flops)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Stops counting; measures the ledger after the first step, while the gradients still exist.

        Which step will be the last is not known here: a validation or a time limit may end the run.
        """
        self._counting.close()
        if self._ledger is None and trainer.global_step > self._first_step:
            self._ledger = measure_ledger(pl_module.parameters(), trainer.optimizers)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remembers which step the validation figures belong to."""
        self._validated_at = trainer.global_step

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Takes the counters off again if the first batch fails."""
        self._counting.close()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the report."""
        if not trainer.is_global_zero or self._ledger is None:
            return
        folder = Path(trainer.default_root_dir)
        summary = self._summary(trainer, pl_module, self._ledger)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        for logger in trainer.loggers:
            if isinstance(logger, RunLog):
                plot_loss(logger.rows(), folder / "loss.png")
        self._table = _table(summary, trainer, folder, self._validated_at)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prints the table, when the progress bar is off the screen."""
        if self._table is not None:
            Console().print(self._table)
            self._table = None

    def _summary(self, trainer: Trainer, pl_module: LightningModule, ledger: Ledger) -> dict[str, Any]:
        metrics = {
            name: trainer.callback_metrics[name].item()
            for name in ("val/loss", "val/perplexity", "val/bits_per_byte")
            if name in trainer.callback_metrics
        }
        throughput = next((c for c in cast(Any, trainer).callbacks if isinstance(c, Throughput)), Throughput())
        return metrics | {
            "tokens_per_second": throughput.tokens_per_second,
            "fp8/linears": sum(isinstance(module, FP8Linear | ConvertedLinear) for module in pl_module.modules()),
            "fp8/flop_share": self._flop_share(),
            "bytes_per_param": {
                "weights": ledger.weights,
                "grads": ledger.grads,
                "moments": ledger.moments + ledger.scales,
            },
            "torch_threads": torch.get_num_threads(),
            **throughput.mfu(throughput.tokens_per_second),
            **({"peaks": throughput.peaks._asdict()} if throughput.peaks else {}),
        }

    def _flop_share(self) -> float:
        unseen = sum(gemm.flops for gemm in self._gemms if gemm.backend == TRANSFORMER_ENGINE)
        return sum(gemm.flops for gemm in self._gemms) / max(1, self._flops.flops + unseen)


def _table(summary: dict[str, Any], trainer: Trainer, folder: Path, validated_at: int) -> Table:
    per_param = summary["bytes_per_param"]
    earlier = "" if validated_at == trainer.global_step else f", at step {validated_at:,}"
    rows = {
        "validation loss": f"{summary.get('val/loss', float('nan')):.4f} nats a token{earlier}",
        "perplexity": f"{summary.get('val/perplexity', float('nan')):.2f}",
        "bits per byte": _bits_per_byte(summary, trainer),
        "training speed": f"{summary['tokens_per_second']:,.0f} tokens/s",
        "FP8 linear layers": f"{summary['fp8/linears']}, {summary['fp8/flop_share']:.0%} of the GEMM FLOPs",
        "bytes a parameter": " + ".join(f"{per_param[k]:.2f} {k}" for k in ("weights", "grads", "moments"))
        + f" = {sum(per_param.values()):.2f}",
        "run folder": str(folder),
    }
    table = Table(title=f"After {trainer.global_step:,} steps", show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _bits_per_byte(summary: dict[str, Any], trainer: Trainer) -> str:
    text = f"{summary.get('val/bits_per_byte', float('nan')):.4f}"
    data = getattr(trainer, "datamodule", None)
    gzip = data.gzip_bits_per_byte if isinstance(data, TokenDataModule) else None
    if gzip and "val/bits_per_byte" in summary:
        text += f" = {summary['val/bits_per_byte'] / gzip:.3f} x gzip -9 ({gzip:.4f}) of the same files"
    return text


def _copy_tokenizer(trainer: Trainer) -> None:
    """Makes the run's folder complete: a checkpoint and a tokenizer are what generating text takes."""
    data = getattr(trainer, "datamodule", None)
    if trainer.is_global_zero and isinstance(data, TokenDataModule):
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data.tokenizer_path, folder / "tokenizer.json")
