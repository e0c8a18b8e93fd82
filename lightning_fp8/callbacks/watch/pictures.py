"""`fp8_heatmap.png`, layers over steps, and `fp8_layers.png`, each layer at the last reading."""

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from lightning_fp8.callbacks.readings import Reading
from lightning_fp8.callbacks.watch.limits import limit


class _Panel(NamedTuple):
    """Attributes: what is shown, of which operands, and whether on a logarithmic axis."""

    title: str
    metric: str
    roles: tuple[str, ...]
    logarithmic: bool = False


_OPERANDS = ("input", "weight", "grad_output")
_MAPS = (
    _Panel("underflow, input", "underflow", ("input",)),
    _Panel("underflow, gradient", "underflow", ("grad_output",)),
    _Panel("SQNR of the worst 5 % of blocks, input (dB)", "block_sqnr_p5", ("input",)),
    _Panel("SQNR of the worst 5 % of blocks, gradient (dB)", "block_sqnr_p5", ("grad_output",)),
    _Panel("kurtosis, input (log10)", "kurtosis", ("input",), logarithmic=True),
    _Panel("amax, gradient (log10)", "amax", ("grad_output",), logarithmic=True),
)
_DOTS = (
    _Panel("amax", "amax", _OPERANDS, logarithmic=True),
    _Panel("SQNR of the worst 5 % of blocks (dB)", "block_sqnr_p5", _OPERANDS),
    _Panel("underflow", "underflow", _OPERANDS),
    _Panel("kurtosis of the input", "kurtosis", ("input",), logarithmic=True),
)
_COLORS = {"input": "tab:blue", "weight": "tab:green", "grad_output": "tab:orange"}
_MOST_LABELS = 60
_SHORTENED = (("decoder.", ""), ("blocks.", ""), ("attention.", "attn."), ("_proj", ""))


def draw_heat_map(readings: Sequence[Reading], path: Path | BytesIO) -> None:
    """Draws a map of each panel's metric, layers down and steps across; nothing without linear layers."""
    from matplotlib.figure import Figure

    layers = _linear_layers(readings)
    panels = [panel for panel in _MAPS if _known(readings, layers, panel)]
    if not panels:
        return
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(14, rows * _height(len(layers))), layout="constrained")
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, 2, i + 1)
        cells = [
            [_shown(_figure(reading, layer, panel.roles[0], panel.metric), panel) for reading in readings]
            for layer in layers
        ]
        low, high = _range(cells, panel)
        image = axes.imshow(cells, aspect="auto", interpolation="nearest", cmap=_colors(panel), vmin=low, vmax=high)
        axes.set_title(panel.title, fontsize=10)
        _label_layers(axes, [short_name(layer) for layer in layers])
        marks = sorted({round(j * (len(readings) - 1) / 5) for j in range(6)})
        axes.set_xticks(marks, [f"{readings[j].step:,}" for j in marks])
        axes.set_xlabel("optimizer step")
        figure.colorbar(image, ax=axes, pad=0.01)
    figure.savefig(path, dpi=110)


def draw_layers(readings: Sequence[Reading], path: Path | BytesIO) -> None:
    """Draws the last reading, a dot for each layer and operand; nothing without linear layers."""
    from matplotlib.figure import Figure

    last, layers = readings[-1], _linear_layers(readings[-1:])
    panels = [panel for panel in _DOTS if _known([last], layers, panel)]
    if not panels:
        return
    figure = Figure(figsize=(3.6 * len(panels) + 2, _height(len(layers))), layout="constrained")
    figure.suptitle(f"Layers at step {last.step:,}; beyond a dashed line a layer deserves a look", fontsize=10)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for role in panel.roles:
            figures = [_figure(last, layer, role, panel.metric) for layer in layers]
            axes.plot(figures, range(len(layers)), "o", color=_COLORS[role], markersize=4, label=role, alpha=0.8)
            bound = limit(role, panel.metric)
            if bound is not None and panel.metric != "amax":
                axes.axvline(bound.value, color=_COLORS[role], linestyle="--", linewidth=1, alpha=0.6)
        if panel.logarithmic:
            axes.set_xscale("log")
        axes.set_title(panel.title, fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(len(layers) - 0.5, -0.5)
        _label_layers(axes, [short_name(layer) if i == 0 else "" for layer in layers])
        if not panel.logarithmic:
            axes.locator_params(axis="x", nbins=5)
        if i == 0:
            figure.legend(loc="outside lower center", ncols=len(panel.roles), frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def _linear_layers(readings: Sequence[Reading]) -> list[str]:
    """Those with an operand, in the order in which they occur."""
    found = (layer for reading in readings for layer, roles in reading.values.items() if "input" in roles)
    return list(dict.fromkeys(found))


def _figure(reading: Reading, layer: str, role: str, metric: str) -> float:
    return reading.values.get(layer, {}).get(role, {}).get(metric, math.nan)


def _known(readings: Sequence[Reading], layers: Sequence[str], panel: _Panel) -> bool:
    return any(
        math.isfinite(_figure(reading, layer, role, panel.metric))
        for reading in readings
        for layer in layers
        for role in panel.roles
    )


def _shown(value: float, panel: _Panel) -> float:
    if panel.logarithmic:
        return math.log10(value) if 0 < value < math.inf else math.nan
    return value if math.isfinite(value) else math.nan


def _colors(panel: _Panel) -> Any:
    """Dark is bad; what is not known, or not a number, is grey."""
    from matplotlib import colormaps

    return colormaps["viridis" if panel.metric == "block_sqnr_p5" else "viridis_r"].with_extremes(bad="0.85")


def _range(cells: Sequence[Sequence[float]], panel: _Panel) -> tuple[float | None, float | None]:
    """Up to the limit at least, or the noise of a healthy run would fill the whole range of colours."""
    bound = limit(panel.roles[0], panel.metric)
    if bound is None or panel.metric == "amax":
        return None, None
    values = [value for row in cells for value in row if math.isfinite(value)]
    if bound.decibels:
        return min(bound.value, *values), max(bound.value, *values)
    return 0.0, max(_shown(bound.value, panel), *values)


def _label_layers(axes: Any, layers: Sequence[str]) -> None:
    every = -(-len(layers) // _MOST_LABELS)
    axes.set_yticks(range(0, len(layers), every), layers[::every], fontsize=7)


def short_name(layer: str) -> str:
    """What tells a layer of our decoder from the others."""
    for long, short in _SHORTENED:
        layer = layer.replace(long, short)
    return layer


def _height(layers: int) -> float:
    """Inches."""
    return min(12.0, 1.5 + 0.16 * layers)
