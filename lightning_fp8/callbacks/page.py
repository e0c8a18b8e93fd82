"""One HTML page of a run, made from what is in its folder: it needs no network, no scripts and no other file.

A run that was killed has a page too: each part is there if what it is made of is. Parts are functions from the folder's
content to HTML; pictures are drawn anew and lie in the page as data.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from lightning_fp8.callbacks.html import document, picture, tabulate
from lightning_fp8.callbacks.plots import plot_loss, plot_series, series
from lightning_fp8.callbacks.readings import Reading
from lightning_fp8.callbacks.run_log import RunLog
from lightning_fp8.callbacks.watch import table
from lightning_fp8.callbacks.watch.limits import limit, worst_layers
from lightning_fp8.callbacks.watch.pictures import draw_heat_map, draw_layers

WORST = 20


@dataclass(frozen=True)
class Run:
    """The content of a run's folder; what is missing is empty.

    Attributes:
        name: The folder's.
        rows: Of `metrics.csv`.
        readings: Of `fp8.csv`.
        events: Of `events.jsonl`, one mapping a line.
        summary: `summary.json`.
        config: `config.yaml`, as text.
    """

    name: str
    rows: list[dict[str, str]]
    readings: list[Reading]
    events: list[dict[str, Any]]
    summary: dict[str, Any]
    config: str


def read_run(folder: Path) -> Run:
    """What is in a run's folder.

    Raises:
        ValueError: It holds no run, or a file of it is damaged.
    """
    summary, config, events = (folder / name for name in ("summary.json", "config.yaml", "events.jsonl"))
    run = Run(
        name=str(folder),
        rows=_rows(RunLog(str(folder))),
        readings=table.read(folder),
        events=_json_lines(events) if events.exists() else [],
        summary=_json_object(summary.read_text(errors="replace"), summary) if summary.exists() else {},
        config=config.read_text(errors="replace") if config.exists() else "",
    )
    if not run.rows and not run.readings:
        raise ValueError(f"{folder} holds no run: there are no rows in a metrics.csv or fp8.csv. Give a run's folder.")
    return run


def write_page(run: Run, path: Path, reference: Run | None = None) -> None:
    """Writes the page of `run` to `path`; with a reference, the gap to its loss."""
    parts = {
        "Summary": _summary(run),
        "Loss": picture(partial(plot_loss, run.rows), "loss over steps"),
        "Gap to the reference": _gap(run, reference) if reference else "",
        "Events": _events(run.events),
        "Worst layers": _worst(run.readings),
        "Layers over steps": picture(partial(draw_heat_map, run.readings), "a heat map of the layers"),
        "Layers at the last reading": picture(partial(draw_layers, run.readings), "figures of each layer")
        if run.readings
        else "",
        "Throughput": _curve(run, "tokens_per_second", "tokens a second"),
        "Memory": _memory(run),
        "Configuration": f"<details><summary>config.yaml</summary><pre>{escape(run.config)}</pre></details>"
        if run.config
        else "",
    }
    path.write_text(document(run.name, parts))


def loss_gap(run: Run, reference: Run) -> tuple[list[int], list[float]]:
    """The relative gap of the training loss at each step that both logged."""
    expected = dict(zip(*series(reference.rows, "train/loss"), strict=True))
    pairs = zip(*series(run.rows, "train/loss"), strict=True)
    gaps = {step: (loss - expected[step]) / expected[step] for step, loss in pairs if step in expected}
    return list(gaps), list(gaps.values())


def _summary(run: Run) -> str:
    shown = {name: f"{value:,.4g}" for name, value in run.summary.items() if isinstance(value, int | float)}
    per_param = run.summary.get("bytes_per_param")
    if per_param:
        shown["bytes a parameter"] = _bytes(per_param)
    steps, losses = series(run.rows, "train/loss")
    if steps:
        shown = {"steps": f"{steps[-1]:,}", "last training loss": f"{losses[-1]:.4f}"} | shown
    note = "" if run.summary else '<p class="note">There is no summary.json: the run is not over, or was killed.</p>'
    return note + tabulate([], [[name, value] for name, value in shown.items()])


def _bytes(per_param: dict[str, float]) -> str:
    parts = " + ".join(f"{value:.2f} {name}" for name, value in per_param.items())
    return f"{parts} = {sum(per_param.values()):.2f}"


def _gap(run: Run, reference: Run) -> str:
    steps, gaps = loss_gap(run, reference)
    if not steps:
        return f'<p class="note">No step was logged by both this run and {escape(reference.name)}.</p>'
    last = gaps[-max(1, len(gaps) // 10) :]
    said = f"Over the last tenth of {len(gaps)} common steps: {sum(last) / len(last):+.3%} of {escape(reference.name)}."
    rows = [{"step": str(step - 1), "gap": str(100 * gap)} for step, gap in zip(steps, gaps, strict=True)]
    return f"<p>{said}</p>" + picture(partial(plot_series, rows, "gap", "gap, %"), "relative loss gap over steps")


def _events(events: Sequence[dict[str, Any]]) -> str:
    columns = ("step", "kind", "layer", "message")
    return tabulate(columns, [[str(event.get(c) or "") for c in columns] for event in events]) if events else ""


def _worst(readings: Sequence[Reading]) -> str:
    lines, bad = [], []
    for severity, step, (layer, role, metric, value) in worst_layers(readings, WORST):
        bound = limit(role, metric)
        known = f"{bound.value:.3g}" if bound else ""
        lines.append([layer, role, f"{step:,}", metric, f"{value:.3g}", known, f"{severity:.2g}"])
        bad.append(severity > 1)
    note = '<p class="note">The worst figure of each layer and operand over the run; beyond the limit in red.</p>'
    columns = ("layer", "operand", "step", "metric", "figure", "limit", "x limit")
    return note + tabulate(columns, lines, bad) if lines else ""


def _memory(run: Run) -> str:
    per_param = run.summary.get("bytes_per_param")
    said = f"<p>Weights, gradients and moments, bytes a parameter: {_bytes(per_param)}.</p>" if per_param else ""
    return said + _curve(run, "memory_gib", "peak memory, GiB")


def _curve(run: Run, name: str, label: str) -> str:
    return picture(partial(plot_series, run.rows, name, label), f"{label} over steps")


def _rows(log: RunLog) -> list[dict[str, str]]:
    """Those of `metrics.csv`, all of whose cells are numbers."""
    try:
        rows = log.rows()
        for row in rows:
            int(row["step"])
            for cell in filter(None, row.values()):
                float(cell)
    except (ValueError, LookupError, TypeError, csv.Error) as error:
        raise ValueError(f"{log.file} is damaged ({error}): correct it, or restore it from a copy.") from error
    return rows


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects, one a line; a last line that a kill cut is left out."""
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    return [_json_object(line, path) for line in lines if line.endswith("\n") and line.strip()]


def _json_object(text: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and the page is made without it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (no JSON object): remove it, and the page is made without it.")
    return content
