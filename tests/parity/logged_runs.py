"""Folders that look like those of runs."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def write_run(
    folder: Path,
    train: Sequence[float],
    val: float | None = None,
    *,
    config: dict[str, Any] | None = None,
    **figures: float,
) -> Path:
    """A run that logged each step's training loss, and the validation's after the last."""
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = [{"step": step, "train/loss": loss, **figures} for step, loss in enumerate(train)]
    if val is not None:
        rows.append({"step": len(train) - 1, "val/loss": val, "val/bits_per_byte": val / 2})
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "train/loss", "val/loss", "val/bits_per_byte", *figures])
        writer.writeheader()
        writer.writerows(rows)
    summary = {"tokens_per_second": 1000.0, "bytes_per_param": {"weights": 2.0, "grads": 2.0, "moments": 2.1}}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(yaml.safe_dump(config or {"seed_everything": 0, "data": {"seed": 0}}))
    return folder
