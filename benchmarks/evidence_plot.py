"""docs/evidence.png, what the figures of `evidence.py` come to in one picture: the README's."""

import json
from pathlib import Path

from lightning_fp8.parity.pictures import CONTROL_COLOUR, new_figure

PLOT = Path("docs/evidence.png")
EDGE, BAR = 1.0, 0.5  # per cent
# section, arm -> what is said of it, and whether it is a failure to be seen
ROWS = {
    ("skip-bigram", "fp8"): ("end-to-end FP8, a task that needs the blocks", False),
    ("text", "fp8"): ("end-to-end FP8, 2 million tokens of text", False),
    ("moments", "fp8"): ("FP8 moments alone, a Zipf vocabulary", False),
    ("rounding", "stochastic"): ("BF16 weights rounded stochastically", False),
    ("rounding", "nearest"): ("BF16 weights rounded to nearest", True),
    ("text", "dead-blocks"): ("blocks without gradient, text", True),
    ("skip-bigram", "dead-blocks"): ("blocks without gradient, the task", True),
}


def write_plot(folder: Path) -> None:
    """Draws the paired gaps of a profile's figures, those in `folder`; nothing unless all are there."""
    if not all((folder / f"{section}.json").exists() for section, _ in ROWS):
        return
    figure, axes = new_figure(0.9 + 0.4 * len(ROWS))
    axes.axvspan(-BAR, BAR, color="tab:green", alpha=0.12)
    axes.axvline(0, color="0.4", linewidth=0.8)
    for line, ((section, arm), (_, fails)) in enumerate(ROWS.items()):
        gap = json.loads((folder / f"{section}.json").read_text())["arms"][arm]["gap"]
        colour = CONTROL_COLOUR if fails else "tab:blue"
        if abs(100 * gap["mean"]) > EDGE:
            axes.annotate(
                f"{100 * gap['mean']:+.0f} % \N{RIGHTWARDS ARROW}",
                (EDGE * 0.98, line),
                ha="right",
                va="center",
                color="0.3",
            )
            continue
        axes.plot([100 * one for one in gap["seeds"]], [line] * len(gap["seeds"]), "o", color=colour, alpha=0.35, ms=4)
        axes.plot([100 * gap["low"], 100 * gap["high"]], [line, line], color=colour, linewidth=2.5)
        axes.plot([100 * gap["mean"]], [line], "D", color=colour, ms=5)
    axes.set_yticks(range(len(ROWS)), [said for said, _ in ROWS.values()])
    axes.set_xlim(-EDGE, EDGE)
    axes.set_ylim(len(ROWS) - 0.5, -0.5)
    axes.set_xlabel("loss above its reference's, %: seeds, mean, 90 % interval; green is ±0.5 %")
    figure.savefig(PLOT, dpi=120, metadata={"Software": None})
