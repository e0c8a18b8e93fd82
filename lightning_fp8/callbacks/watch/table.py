"""`fp8.csv`: all readings of a run, a row for each step, layer and role, and a column for each metric.

Hundreds of figures a layer would make `metrics.csv` a table of thousands of columns, rewritten for each new one. There,
each metric has the worst layer's figure; everything is here. A row is written when it is read, and when a run resumes
at step n the rows of later steps are dropped: they were written after the checkpoint, by a run that died.
"""

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from lightning_fp8.callbacks.readings import Reading
from lightning_fp8.files import write_text

NAME = "fp8.csv"
METRICS = (
    *("amax", "underflow", "saturation", "sqnr", "block_sqnr_p5", "cosine_distortion", "kurtosis", "max_median_ratio"),
    *("scale_drift", "scale_lag", "update_rms", "max_update", "stalled_updates", "moment_zeros"),
    *("logit_max", "entropy", "log_z", "swiglu_alignment"),
)
_COLUMNS = ("step", "layer", "role", *METRICS)


def append(folder: Path, reading: Reading) -> None:
    """Adds a reading to the table in `folder`."""
    path = folder / NAME
    if not path.exists():
        _write(path, [])
    with path.open("a", newline="") as file:
        csv.writer(file).writerows(_rows(reading))


def start_at(folder: Path, step: int) -> None:
    """Keeps the readings of an earlier part of this run, up to `step`; without any the table goes."""
    path = folder / NAME
    if not path.exists():
        return
    kept = [reading for reading in read(folder) if reading.step <= step] if step else []
    _write(path, kept) if kept else path.unlink()


def read(folder: Path) -> list[Reading]:
    """The readings in `folder`, by step; where a step was read twice, after a rewind, the later one.

    A last line that a kill cut is left out.
    """
    path = folder / NAME
    if not path.exists():
        return []
    readings: dict[int, Reading] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(line for line in file if line.endswith("\n")):
            step = int(row["step"])
            values = readings.setdefault(step, Reading(step, {})).values
            figures = {metric: float(row[metric]) for metric in METRICS if row.get(metric)}
            values.setdefault(row["layer"], {})[row["role"]] = figures
    return [readings[step] for step in sorted(readings)]


def _rows(reading: Reading) -> Iterable[list[str]]:
    for layer, roles in reading.values.items():
        for role, figures in roles.items():
            shown = [f"{figures[metric]:.6g}" if metric in figures else "" for metric in METRICS]
            yield [str(reading.step), layer, role, *shown]


def _write(path: Path, readings: Iterable[Reading]) -> None:
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(_COLUMNS)
    for reading in readings:
        writer.writerows(_rows(reading))
    write_text(path, table.getvalue())
