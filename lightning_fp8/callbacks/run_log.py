"""`metrics.csv`: one row a logged step, whole after a kill, continued after a resume.

Lightning's CSVLogger deletes the file of an earlier run of the same folder, also when that run is being resumed, and
keeps rows in memory that a kill would lose. This logger writes each row as it comes; rows for which the
disk has no room wait. When training starts or resumes at optimizer step n, rows of step n and later are dropped: they
were written after the checkpoint, by a run that died.
"""

import csv
import io
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor

from lightning_fp8.files import NO_SPACE, write_text


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
    def start_at(self, step: int) -> None:
        """Keeps the rows of steps before `step` of an earlier part of this run; drops the others."""
        rows = [row for row in self.rows() if int(row["step"]) < step]
        self._columns = list(rows[0]) if rows else []
        if self.file.exists():
            self._write(rows)

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
