"""`loss.png`: the loss of a run over its steps; and any other of its figures."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path


def plot_loss(rows: Sequence[dict[str, str]], path: Path | BytesIO) -> None:
    """Draws training and validation loss of the rows of a `RunLog` into `path`; nothing if there are none."""
    # The object interface without pyplot: no global state, no window system, no effect on the user's own figures.
    from matplotlib.figure import Figure

    train, val = (series(rows, name) for name in ("train/loss", "val/loss"))
    if not train[0] and not val[0]:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*train, color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot(train[0], _smooth(train[1]), color="tab:blue", linewidth=1.8, label="training (smoothed)")
    if val[0]:
        axes.plot(*val, "o-", color="tab:red", markersize=4, linewidth=1.2, label="validation")
        axes.annotate(
            f"{val[1][-1]:.3f}", (val[0][-1], val[1][-1]), textcoords="offset points", xytext=(0, 8), ha="right"
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross-entropy, nats a token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=144)


def plot_series(rows: Sequence[dict[str, str]], name: str, label: str, path: Path | BytesIO) -> None:
    """Draws one metric of the rows of a `RunLog` into `path`; nothing if it has no rows."""
    from matplotlib.figure import Figure

    steps, values = series(rows, name)
    if not steps:
        return
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, values, ".-", color="tab:blue", linewidth=1, markersize=3)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def series(rows: Sequence[dict[str, str]], name: str) -> tuple[list[int], list[float]]:
    """The steps, counted from 1, at which a metric was logged, and its values."""
    points = [(int(row["step"]) + 1, float(row[name])) for row in rows if row.get(name)]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean over a window centred on each value, about a tenth of all wide and cut at the ends.

    Centred, so that it does not lag behind where the loss falls fast, as an average of past values would.
    """
    reach = len(values) // 20
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
