"""Loss against learning rate, and what a wrong rate costs, for each arm of a sweep.

The sensitivity is `metrics.lr_sensitivity`, mean_lr min(L(lr), L_0) - min_lr L(lr), with L_0 = ln V, the loss of a
model that knows nothing. It is taken of each seed's sweep and averaged; arms differ by the ratio of their averages.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from lightning_fp8 import hardware
from lightning_fp8.callbacks.html import document, picture, tabulate
from lightning_fp8.metrics.lr_sensitivity import lr_sensitivity
from lightning_fp8.parity.pictures import COLOURS, new_figure

DECADES = 3.0


@dataclass(frozen=True)
class Sweep:
    """Attributes.

    Attributes:
        rates: Evenly spread on a log scale, from low to high.
        seeds: Of each rate.
        losses: Arm -> rate -> seed -> the last loss, not finite of a run that diverged; runs that failed are missing.
        unlearnt: L_0.
        failures: Why runs failed, by their names.
    """

    rates: Sequence[float]
    seeds: Sequence[int]
    losses: Mapping[str, Mapping[float, Mapping[int, float]]]
    unlearnt: float
    failures: Mapping[str, str]

    def sensitivity(self, arm: str) -> float | None:
        """In nats, the mean of the seeds; None if a run is missing, for a failure is no loss."""
        found = self.losses[arm]
        if any(seed not in found.get(rate, {}) for rate in self.rates for seed in self.seeds):
            return None
        sweeps = [torch.tensor([found[rate][seed] for rate in self.rates]) for seed in self.seeds]
        return statistics.fmean(float(lr_sensitivity(losses, self.unlearnt)) for losses in sweeps)


def rates_around(centre: float, count: int, decades: float = DECADES) -> list[float]:
    """`count` rates at even distances on a log scale, over `decades` around `centre`; three digits of each.

    Raises:
        ValueError: There are fewer than two.
    """
    if count < 2:
        raise ValueError(f"A sweep needs 2 learning rates or more, not {count}.")
    return [float(f"{centre * 10 ** (decades * (i / (count - 1) - 0.5)):.3g}") for i in range(count)]


def figures(sweep: Sweep, command: str) -> dict[str, Any]:
    """All that is reported, as plain values; a loss that is not finite is None, that of a failure is missing."""
    arms = list(sweep.losses)
    sensitivities = {arm: sweep.sensitivity(arm) for arm in arms}
    first = sensitivities[arms[0]]
    return {
        "command": command,
        "device": hardware.describe_device(),
        "torch": torch.__version__,
        "seeds": list(sweep.seeds),
        "rates": list(sweep.rates),
        "unlearnt": sweep.unlearnt,
        "sensitivity": sensitivities,
        "ratio": {arm: own / first if first and own is not None else None for arm, own in sensitivities.items()},
        "losses": {
            arm: {f"{rate:.3g}": [_finite(loss) for loss in found.values()] for rate, found in by_rate.items()}
            for arm, by_rate in sweep.losses.items()
        },
        "failures": dict(sweep.failures),
    }


def write(sweep: Sweep, folder: Path, command: str) -> dict[str, Any]:
    """Writes `sweep.json`, `sweep.md`, `sweep.html` and `sweep.png` into `folder`; returns the figures."""
    found = figures(sweep, command)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / "sweep.md").write_text(f"# Learning-rate sweep\n\n{markdown(found)}")
    draw(sweep, folder / "sweep.png")
    parts = {
        "Loss over learning rate": picture(partial(draw, sweep), "loss over learning rate"),
        "Figures": tabulate(_head(found), _rows(found)) + f'<p class="note">{_conditions(found)}</p>',
        "Failures": tabulate((), [[n, why] for n, why in sweep.failures.items()]) if sweep.failures else "",
        "Command": f"<pre>{command}</pre>",
    }
    (folder / "sweep.html").write_text(document("Learning-rate sweep", parts))
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """The table of `sweep.json`."""
    head = _head(found)
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *_rows(found))]
    lines += ["", *(f"- {name} failed: {why}" for name, why in found["failures"].items()), _conditions(found)]
    return "\n".join([*lines, "", f"    {found['command']}", ""])


def draw(sweep: Sweep, path: Path | BytesIO) -> None:
    """Loss over learning rate, a line an arm through the means of the seeds; crosses on top are runs that diverged."""
    figure, axes = new_figure(4.2)
    for colour, (arm, by_rate) in zip(COLOURS, sweep.losses.items(), strict=False):
        kept = {rate: [min(loss, sweep.unlearnt) for loss in found.values() if math.isfinite(loss)]
                for rate, found in by_rate.items()}  # fmt: skip
        points = [(rate, statistics.fmean(losses)) for rate, losses in kept.items() if losses]
        own = sweep.sensitivity(arm)
        label = arm if own is None else f"{arm}: sensitivity {own:.3f} nats"
        axes.plot(*zip(*points, strict=True) if points else ([], []), "o-", color=colour, alpha=0.8, label=label)
        lost = [rate for rate, found in by_rate.items() for loss in found.values() if not math.isfinite(loss)]
        axes.plot(lost, [sweep.unlearnt] * len(lost), "x", color=colour, ms=9)
    axes.axhline(sweep.unlearnt, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate; the dotted line is a model that knows nothing")
    axes.set_ylabel("last loss, nats")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=144)


def _head(found: Mapping[str, Any]) -> list[str]:
    return ["arm", *(f"{rate:.3g}" for rate in found["rates"]), "sensitivity", "of the first"]


def _rows(found: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for arm, losses in found["losses"].items():
        own, ratio = found["sensitivity"][arm], found["ratio"][arm]
        means = [_mean(losses.get(f"{rate:.3g}", []), len(found["seeds"])) for rate in found["rates"]]
        rows.append([arm, *means, "-" if own is None else f"{own:.4f}", "-" if ratio is None else f"{ratio:.3f}"])
    return rows


def _mean(losses: Sequence[float | None], seeds: int) -> str:
    if len(losses) < seeds:
        return "failed"
    known = [loss for loss in losses if loss is not None]
    return f"{statistics.fmean(known):.4f}" if len(known) == seeds else "diverged"


def _conditions(found: Mapping[str, Any]) -> str:
    return (
        f"Last losses, nats, means of the seeds {', '.join(map(str, found['seeds']))}; the sensitivity is the mean of"
        f" min(loss, {found['unlearnt']:.3f}) over the rates, less the least. {found['device']}, torch"
        f" {found['torch']}."
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
