"""`metrics.csv`: one row a logged step, whole after a kill, continued by `ContinuedLog` after a resume.

Lightning's CSVLogger deletes the file of an earlier run of the same folder, also when that run is being resumed, and
keeps rows in memory that a kill would lose. This logger writes each row as it comes; rows for which the
disk has no room wait. When training starts or resumes at optimizer step n, rows of step n and later are dropped: they
were written after the checkpoint, by a run that died. The other way round, Lightning writes a step's row after the
callbacks, and so after the checkpoint of that step: the checkpoint carries the row, should a kill come between the two.
"""

import csv
import io
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor

from lightning_fp8.files import NO_SPACE, write_text

_ROW = "lightning_fp8_row"


class RunLog(Logger):
    """Logs metrics to `<save_dir>/metrics.csv`.

    Args:
        save_dir: The run's folder; checkpoints go into its subfolder `checkpoints`.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self._folder = Path(save_dir)
        self._columns: list[str] = []
        self._waiting: list[dict[str, Any]] = []  # rows for which the disk had no room

    @property
    def name(self) -> str:
        """Empty: the run's folder has no level below it."""
        return ""

    @property
    def version(self) -> str:
        """Empty: the run's folder has no level below it."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self._folder)

    @property
    def file(self) -> Path:
        """Where the rows are."""
        return self._folder / "metrics.csv"

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the run's configuration is in `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Appends a row; a metric that was not seen before adds a column."""
        row = {k: v.item() if isinstance(v, Tensor) else v for k, v in metrics.items()}
        row["step"] = step
        new = sorted(set(row) - set(self._columns))
        if new or not self.file.exists():
            rows = self.rows()
            self._columns = list(dict.fromkeys([*self._columns, *(rows[0] if rows else ()), *new]))
            self._write(rows)
        if not self._append([*self._waiting, row]):
            if not self._waiting:
                rank_zero_warn(f"No room for {self.file}: its rows wait in memory until there is.")
            self._waiting.append(row)
            return
        self._waiting = []

    def _append(self, rows: list[dict[str, Any]]) -> bool:
        """Writes all of the rows, or none if there is no room."""
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._columns).writerows(rows)
        content = text.getvalue().encode()
        with self.file.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(content) == len(content):
                    return True
            except OSError as error:
                if error.errno not in NO_SPACE:
                    raise
            file.truncate(size)
        return False

    @rank_zero_only
    def start_at(self, step: int, row: dict[str, Any] | None = None) -> None:
        """Keeps the rows of steps before `step` of an earlier part of this run; drops the others.

        Args:
            step: The optimizer step at which training goes on.
            row: The last one before `step`, as the checkpoint has it; written if it is missing.
        """
        rows = [row for row in self.rows() if int(row["step"]) < step]
        self._columns = list(rows[0]) if rows else []
        if self.file.exists():
            self._write(rows)
        if row and not any(row.items() <= _numbers(kept).items() for kept in rows):
            self.log_metrics(row, row["step"])

    def rows(self) -> list[dict[str, str]]:
        """The rows so far, as written; an incomplete last line (of a killed run) is left out."""
        if not self.file.exists():
            return []
        with self.file.open(newline="") as file:
            return list(csv.DictReader(line for line in file if line.endswith("\n")))

    def _write(self, rows: list[dict[str, str]]) -> None:
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, self._columns)
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.file, table.getvalue())


class ContinuedLog(Callback):
    """Has the `RunLog` of a resumed run go on after the checkpoint's step, with no row twice and none missing."""

    def __init__(self) -> None:
        self._row: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the row of the step that is being saved, which Lightning writes later."""
        checkpoint[_ROW] = _row_to_come(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes that row, to write it if a kill came first."""
        self._row = checkpoint.get(_ROW)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continues the log."""
        for logger in trainer.loggers:
            if isinstance(logger, RunLog):
                logger.start_at(trainer.global_step, self._row)


def _row_to_come(trainer: Trainer) -> dict[str, Any] | None:
    """What Lightning will log of this step when all callbacks have seen its end; None at any other time."""
    epoch_loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    progress = cast(Any, epoch_loop.batch_progress.total)
    if progress.completed == progress.processed or trainer.fit_loop._should_accumulate():
        return None
    if not connector.should_update_logs or not connector.metrics["log"]:
        return None
    row = {name: float(value) for name, value in connector.metrics["log"].items()}
    return {"epoch": trainer.current_epoch} | row | {"step": epoch_loop._batches_that_stepped}


def _numbers(row: dict[str, str]) -> dict[str, float]:
    return {name: float(value) for name, value in row.items() if value}
