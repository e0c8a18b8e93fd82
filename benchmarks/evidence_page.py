"""docs/evidence.md, made from the figures of `evidence.py` and from nothing else."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evidence_plot import write_plot

from lightning_fp8.parity import report, sweep

PAGE = Path("docs/evidence.md")
GAP_BAR, CONTROL_BAR = 0.0025, 0.5
INTRODUCTION = """\
# Evidence

Does FP8 learn as BF16 does? Every table is made by `make evidence` (under an hour on two cores) or `make evidence-full`
(hours) from runs of `lightning-fp8 parity` and `sweep-lr`; each says its command, commit, device and seeds. The same
question about a configuration of your own: `lightning-fp8 parity -c config.yaml`.

Runs of a seed are paired: the same initial weights, the same data in the same order. The bar of the first two tables,
fixed in advance: end-to-end FP8 ("fp8") at most 0.25 % above BF16 GEMMs with fp32 weights and moments in the mean of
the seeds, the 90 % interval of the gap within ±0.5 %, and the control, whose blocks get no gradient, at least 50 % off.

![Gaps of the loss to BF16: end-to-end FP8 within half a per cent, the controls far off](evidence.png)
"""
TITLES = {
    "skip-bigram": ("A task that needs its blocks", "The next token depends on the last but one."),
    "text": (
        "The quickstart's text",
        "Two million tokens an arm, decay to zero, all held-out files. Without its blocks a model still learns which"
        " token follows which; the control can lose no more than what blocks add to that.",
    ),
    "moments": ("Formats of the moments", "On a vocabulary of which most is rare; the largest |u| = |m / √v| beside."),
    "rounding": ("Rounding of BF16 weights", "At a learning rate so small that updates are below half a unit."),
    "sensitivity": ("Sensitivity to the learning rate", "Over three decades."),
    "ledger": ("Memory", "Bytes a parameter of weights, gradients and moments, measured after a step."),
    "presets": ("Beside FP8-LM and nanotron", "Their recipes as far as they are known; see `configs/recipes`."),
    "faults": (
        "Faults",
        "What goes wrong, by what it is seen and when, and what cures it; losses are means. All twelve:"
        " [Stability](stability.md).",
    ),
    "gpu-26m": ("26 M parameters on a GPU", "40 million tokens an arm."),
    "gpu-150m": ("150 M parameters on a GPU", "66 million tokens an arm."),
}
JUDGED = ("skip-bigram", "text")
PROFILES = ("full", "short", "gpu")
COMMANDS = {"gpu-26m": "python benchmarks/evidence.py --profile gpu"} | {
    "gpu-150m": "python benchmarks/evidence.py --profile gpu"
}


def write_page(results: Path, profile: str) -> None:
    """Writes the page: each section from this profile's figures, from another's where it has none, or says so."""
    order = (profile, *(other for other in PROFILES if other != profile))
    parts = [INTRODUCTION]
    for name, (title, about) in TITLES.items():
        files = (results / one / f"{name}.json" for one in order)
        found = next((json.loads(file.read_text()) for file in files if file.exists()), None)
        remedy = COMMANDS.get(name, "make evidence-full")
        parts.append(f"## {title}\n\n{about}\n\n" + (_section(name, found) if found else _missing(remedy)))
    PAGE.write_text("\n".join(parts))
    write_plot(next((results / one for one in order if (results / one).exists()), results))


def _missing(remedy: str) -> str:
    return f"Not measured yet; run `{remedy}`.\n"


def _section(name: str, found: Mapping[str, Any]) -> str:
    body = _faults(found) if "faults" in found else sweep.markdown(found) if "rates" in found else _parity(name, found)
    return f"{body}\n{_conditions(found)}\n"


def _parity(name: str, found: Mapping[str, Any]) -> str:
    if name == "ledger":
        return f"{report.costs(found)}\n    {found['command']}\n"
    return (f"{bars(found)}\n\n" if name in JUDGED else "") + report.markdown(found)


def bars(found: Mapping[str, Any]) -> str:
    """Whether the bars that were fixed in advance are met, each with its figure."""
    arms, reached = found["arms"], []
    gap, control = arms["fp8"]["gap"], arms[found["control"]]["gap"]
    reached.append(_reached("mean gap of fp8 at most +0.25 %", gap, lambda g: g["mean"] <= GAP_BAR, "+.3%"))
    verdict = arms["fp8"]["verdict"]
    reached.append(f"90 % interval within ±0.5 %: **{'met' if verdict == 'parity' else f'not met ({verdict})'}**")
    reached.append(_reached("control at least +50 %", control, lambda g: g["mean"] >= CONTROL_BAR, "+.1%"))
    return "Bars: " + "; ".join(reached) + "."


def _reached(what: str, gap: Mapping[str, Any] | None, holds: Any, form: str) -> str:
    if gap is None or gap["mean"] is None:
        return f"{what}: **not met** (no loss)"
    return f"{what}: {gap['mean']:{form}}, **{'met' if holds(gap) else 'not met'}**"


def _faults(found: Mapping[str, Any]) -> str:
    head = ("fault", "seen by", "onset", "first alarms", "clean", "broken", "cured", "cure")
    lines = [head, ["---"] * len(head)]
    for name, row in found["faults"].items():
        alarms = ", ".join("none" if step is None else str(step) for step in row["first_alarms"])
        losses = [_loss(row[kind]) for kind in ("clean", "broken", "cured")]
        lines.append([name, row["detector"], str(row["onset"]), alarms, *losses, row["cure"]])
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"{table}\n\n    {found['command']}\n"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _conditions(found: Mapping[str, Any]) -> str:
    where = found["machine"]
    return (
        f"Profile {found['profile']}, seeds {', '.join(map(str, found['seeds']))}; {where['device']},"
        f" {found['jobs']} runs at a time; commit {', '.join(found['commits'])}; torch {where['versions']['torch']}."
    )
