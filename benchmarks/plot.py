"""One bar chart of a benchmark's JSON, beside it as PNG.

python benchmarks/plot.py results/cpu/block.json
"""

import json
import sys
from pathlib import Path

from matplotlib import pyplot as plt

# The first that the rows have is drawn: larger is better for all but times and overheads.
QUANTITIES = ("tokens/s", "x bf16", "x fused fp32", "/ copy", "of_copy", "/ torchao", "seconds", "us", "ms")


def plot(path: Path) -> Path:
    """Draws the file's rows; returns where."""
    figures = json.loads(path.read_text())
    rows = figures.get("rows") or figures["arms"]
    quantity = next(name for name in QUANTITIES if any(name in row for row in rows.values()))
    values = {name: row[quantity] for name, row in rows.items() if quantity in row}
    fig, axes = plt.subplots(figsize=(8, 1 + 0.3 * len(values)), layout="constrained")
    bars = axes.barh(list(values), list(values.values()))
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(quantity)
    device = figures.get("device") or figures["machine"]
    axes.set_title(f"{path.stem}: {device}, torch {figures.get('torch') or figures['versions']['torch']}", fontsize=9)
    target = path.with_suffix(".png")
    fig.savefig(target, dpi=130)
    plt.close(fig)
    return target


if __name__ == "__main__":
    print(plot(Path(sys.argv[1])))
