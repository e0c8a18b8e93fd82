"""The pictures of a comparison: gaps with their intervals, losses, gaps over steps, other figures over steps."""

import math
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from lightning_fp8.callbacks.page import loss_gap
from lightning_fp8.callbacks.plots import series
from lightning_fp8.parity.compare import Comparison, Result

COLOURS = ("tab:blue", "tab:red", "tab:green", "tab:purple", "tab:orange", "tab:brown", "tab:pink", "tab:olive")
CONTROL_COLOUR = "0.55"


def draw_gaps(comparison: Comparison, path: Path | BytesIO) -> None:
    """A line an arm: the gaps of its seeds, their mean and interval, beside the bar; what is off the scale is told."""
    results = [result for result in comparison.results[1:] if result.gap]
    if not results:
        return
    figure, axes = new_figure(0.9 + 0.45 * len(results))
    within = [gap for result in results if result.name != comparison.control and result.gap for gap in result.gap.seeds]
    # So wide that the arms in question are seen; the control is meant to be far away.
    edge = 100 * max(3 * comparison.bar, *(1.3 * abs(gap) for gap in within if math.isfinite(gap)), 0.0)
    axes.axvspan(-100 * comparison.bar, 100 * comparison.bar, color="tab:green", alpha=0.12, label="the bar")
    axes.axvline(0, color="0.4", linewidth=0.8)
    for line, result in enumerate(results):
        gap, colour = result.gap, _colour(comparison, result)
        known = gap is not None and math.isfinite(gap.mean)
        if gap is None or not known or abs(100 * gap.mean) > edge:
            side = -1 if gap is not None and gap.mean < 0 else 1
            said = f"{gap.mean:+.0%}" if gap is not None and known else "not finite"
            axes.annotate(said, (side * edge * 0.98, line), ha="right" if side > 0 else "left", va="center")
            continue
        axes.plot([100 * one for one in gap.seeds], [line] * len(gap.seeds), "o", color=colour, alpha=0.35, ms=5)
        if math.isfinite(gap.low):
            axes.plot([100 * gap.low, 100 * gap.high], [line, line], color=colour, linewidth=2.5)
        axes.plot([100 * gap.mean], [line], "D", color=colour, ms=6)
    axes.set_yticks(range(len(results)), [f"{result.name}  ({result.verdict})" for result in results])
    axes.set_xlim(-edge, edge)
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_xlabel(f"gap of the loss to {comparison.reference.name}, %: seeds, mean, 90 % interval; green is the bar")
    figure.savefig(path, dpi=144)


def draw_losses(comparison: Comparison, path: Path | BytesIO) -> None:
    """Training losses over steps, a line a seed and a colour an arm."""
    _draw(comparison, {r.name: _curves(r, "train/loss") for r in comparison.results}, "training loss, nats", path)


def draw_curve(comparison: Comparison, metric: str, label: str, path: Path | BytesIO) -> None:
    """Another figure of `metrics.csv` over steps, on a logarithmic scale."""
    _draw(comparison, {r.name: _curves(r, metric) for r in comparison.results}, label, path, scale="log")


def draw_gaps_over_steps(comparison: Comparison, path: Path | BytesIO) -> None:
    """The paired gap of the training loss over steps, of all arms but the control."""
    curves = {}
    for result in comparison.compared:
        pairs = [(one, comparison.reference.outcomes.get(seed)) for seed, one in result.outcomes.items()]
        found = [loss_gap(one.run, other.run) for one, other in pairs if other is not None]
        curves[result.name] = [(steps, _smooth([100 * gap for gap in gaps])) for steps, gaps in found if steps]
    _draw(comparison, curves, "gap of the training loss, % (smoothed)", path, limits=comparison.bar)


def _draw(
    comparison: Comparison,
    curves: Mapping[str, list[Any]],
    label: str,
    path: Path | BytesIO,
    *,
    scale: str = "linear",
    limits: float | None = None,
) -> None:
    if not any(curves.values()):
        return
    figure, axes = new_figure(3.8)
    for result in comparison.results:
        for number, (steps, values) in enumerate(curves.get(result.name, [])):
            name = None if number else result.name
            axes.plot(steps, values, color=_colour(comparison, result), linewidth=1.1, alpha=0.75, label=name)
    if limits is not None:
        axes.axhspan(-100 * limits, 100 * limits, color="tab:green", alpha=0.12)
    axes.set_yscale(scale)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=144)


def new_figure(height: float) -> Any:
    """A figure of this height, inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _colour(comparison: Comparison, result: Result) -> str:
    if result.name == comparison.control:
        return CONTROL_COLOUR
    return COLOURS[list(comparison.results).index(result) % len(COLOURS)]


def _curves(result: Result, name: str) -> list[Any]:
    found = [series(outcome.run.rows, name) for outcome in result.outcomes.values()]
    return [curve for curve in found if curve[0]]


def _smooth(values: list[float]) -> list[float]:
    reach = max(1, len(values) // 20)
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
