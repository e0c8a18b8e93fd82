"""One HTML page of a run, made from what is in its folder: it needs no network, no scripts and no other file.

A run that was killed has a page too: each part is there if what it is made of is. Parts are functions from the folder's
content to HTML; pictures are drawn anew and lie in the page as data.
"""

import base64
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from lightning_fp8.callbacks.plots import plot_loss, plot_series, series
from lightning_fp8.callbacks.readings import Reading
from lightning_fp8.callbacks.run_log import RunLog
from lightning_fp8.callbacks.watch import table
from lightning_fp8.callbacks.watch.limits import limit, worst_layers
from lightning_fp8.callbacks.watch.pictures import draw_heat_map, draw_layers

WORST = 20
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ccc }
table { border-collapse: collapse } td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } tr.bad { color: #b00020; font-weight: 600 }
img { max-width: 100% } pre { background: #f6f6f6; padding: 1em; overflow-x: auto } .note { color: #666 }
"""


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
        ValueError: It holds no run.
    """
    summary, config, events = (folder / name for name in ("summary.json", "config.yaml", "events.jsonl"))
    run = Run(
        name=str(folder),
        rows=RunLog(str(folder)).rows(),
        readings=table.read(folder),
        events=_json_lines(events.read_text()) if events.exists() else [],
        summary=json.loads(summary.read_text()) if summary.exists() else {},
        config=config.read_text() if config.exists() else "",
    )
    if not run.rows and not run.readings:
        raise ValueError(f"{folder} holds no run: there are no rows in a metrics.csv or fp8.csv. Give a run's folder.")
    return run


def write_page(run: Run, path: Path, reference: Run | None = None) -> None:
    """Writes the page of `run` to `path`; with a reference, the gap to its loss."""
    parts = {
        "Summary": _summary(run),
        "Loss": _picture(partial(plot_loss, run.rows), "loss over steps"),
        "Gap to the reference": _gap(run, reference) if reference else "",
        "Events": _events(run.events),
        "Worst layers": _worst(run.readings),
        "Layers over steps": _picture(partial(draw_heat_map, run.readings), "a heat map of the layers"),
        "Layers at the last reading": _picture(partial(draw_layers, run.readings), "figures of each layer")
        if run.readings
        else "",
        "Throughput": _curve(run, "tokens_per_second", "tokens a second"),
        "Memory": _memory(run),
        "Configuration": f"<details><summary>config.yaml</summary><pre>{escape(run.config)}</pre></details>"
        if run.config
        else "",
    }
    body = "".join(f"<section><h2>{escape(title)}</h2>{part}</section>" for title, part in parts.items() if part)
    page = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(run.name)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(run.name)}</h1>{body}</body></html>\n"
    )
    path.write_text(page)


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
    return note + _rows([], [[name, value] for name, value in shown.items()])


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
    return f"<p>{said}</p>" + _picture(partial(plot_series, rows, "gap", "gap, %"), "relative loss gap over steps")


def _events(events: Sequence[dict[str, Any]]) -> str:
    columns = ("step", "kind", "layer", "message")
    return _rows(columns, [[str(event.get(c) or "") for c in columns] for event in events]) if events else ""


def _worst(readings: Sequence[Reading]) -> str:
    lines, bad = [], []
    for severity, step, (layer, role, metric, value) in worst_layers(readings, WORST):
        bound = limit(role, metric)
        known = f"{bound.value:.3g}" if bound else ""
        lines.append([layer, role, f"{step:,}", metric, f"{value:.3g}", known, f"{severity:.2g}"])
        bad.append(severity > 1)
    note = '<p class="note">The worst figure of each layer and operand over the run; beyond the limit in red.</p>'
    columns = ("layer", "operand", "step", "metric", "figure", "limit", "x limit")
    return note + _rows(columns, lines, bad) if lines else ""


def _memory(run: Run) -> str:
    per_param = run.summary.get("bytes_per_param")
    said = f"<p>Weights, gradients and moments, bytes a parameter: {_bytes(per_param)}.</p>" if per_param else ""
    return said + _curve(run, "memory_gib", "peak memory, GiB")


def _curve(run: Run, name: str, label: str) -> str:
    return _picture(partial(plot_series, run.rows, name, label), f"{label} over steps")


def _picture(draw: Callable[[BytesIO], None], description: str) -> str:
    """An image that `draw` writes, in the page itself; nothing if it writes none."""
    file = BytesIO()
    draw(file)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">' if data else ""


def _rows(head: Sequence[str], lines: Sequence[Sequence[str]], bad: Sequence[bool] = ()) -> str:
    def row(cells: Sequence[str], tag: str, mark: str = "") -> str:
        return f"<tr{mark}>{''.join(_cell(cell, tag) for cell in cells)}</tr>"

    marks = [' class="bad"' if is_bad else "" for is_bad in bad] or [""] * len(lines)
    top = row(head, "th") if head else ""
    return f"<table>{top}{''.join(row(cells, 'td', mark) for cells, mark in zip(lines, marks, strict=True))}</table>"


def _cell(text: str, tag: str) -> str:
    mark = ' class="n"' if _is_number(text) else ""
    return f"<{tag}{mark}>{escape(text)}</{tag}>"


def _is_number(text: str) -> bool:
    try:
        return not math.isnan(float(text.replace(",", "")))
    except ValueError:
        return False


def _json_lines(text: str) -> list[dict[str, Any]]:
    """The objects, one a line; a last line that a kill cut is left out."""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n") and line.strip()]
