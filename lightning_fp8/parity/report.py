"""A comparison as JSON, Markdown, pictures and one HTML page. Markdown is made from the JSON alone, by anyone."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from lightning_fp8 import hardware
from lightning_fp8.callbacks.html import document, picture, tabulate
from lightning_fp8.callbacks.watch.limits import limit, worst_layers
from lightning_fp8.parity.compare import Comparison, Result
from lightning_fp8.parity.pictures import draw_curve, draw_gaps, draw_gaps_over_steps, draw_losses
from lightning_fp8.parity.statistics import CONFIDENCE

WORST = 10
Figures = dict[str, Any]
MEANINGS = {
    "parity": "the interval lies within the bar",
    "worse": "the interval lies above the bar, or the loss is not finite",
    "better": "the interval lies below the bar",
    "undecided": "the interval crosses the bar, or one seed has none: more seeds, or longer runs, would tell",
    "failed": "a run, or the reference's, did not end with a loss",
    "void": "the interval lies within the bar, but the control was not seen to be worse: this comparison cannot tell",
}
_HEAD = ("arm", "loss", "bits/byte", "gap", "90 % interval", "verdict")
_COST_HEAD = ("arm", "tokens/s", "bytes a parameter", "peak GiB", "grad norm", "update / weight", "max update")


def figures(comparison: Comparison, command: str) -> Figures:
    """All that is reported, as plain values; what is not finite is None."""
    finite: Figures = _finite(
        {
            "command": command,
            "device": hardware.describe_device(),
            "torch": torch.__version__,
            "seeds": list(comparison.seeds),
            "bar": comparison.bar,
            "confidence": CONFIDENCE,
            "control": comparison.control,
            "verdict": _overall(comparison),
            "failures": dict(comparison.failures),
            "arms": {result.name: _arm(result) for result in comparison.results},
        }
    )
    return finite


def write(comparison: Comparison, folder: Path, command: str) -> Figures:
    """Writes `parity.json`, `parity.md`, `parity.html` and the pictures into `folder`; returns the figures."""
    found = figures(comparison, command)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "parity.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / "parity.md").write_text(f"# Parity\n\n{markdown(found)}")
    for name, draw in _pictures(comparison).items():
        draw(folder / f"{name}.png")
    (folder / "parity.html").write_text(_page(comparison, found))
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """All of `parity.json`."""
    lines = [found["verdict"], "", *_table(_HEAD, _loss_rows(found)), "", costs(found)]
    return "\n".join([*lines, _conditions(found), "", f"    {found['command']}", ""])


def costs(found: Mapping[str, Any]) -> str:
    """What the arms of `parity.json` are, and take in time and memory."""
    lines = [*_table(_COST_HEAD, _cost_rows(found)), ""]
    lines += [f"- {name}: {arm['about']}" for name, arm in found["arms"].items()]
    lines += [f"- {name} failed: {why}" for name, why in found["failures"].items()]
    return "\n".join([*lines, ""])


def _overall(comparison: Comparison) -> str:
    by_verdict: dict[str, list[str]] = {}
    for result in comparison.compared:
        by_verdict.setdefault(str(result.verdict), []).append(result.name)
    said = [f"{', '.join(names)}: **{verdict}** ({MEANINGS[verdict]})." for verdict, names in by_verdict.items()]
    if len(comparison.seeds) == 1:
        said.append("One seed: a gap has no interval, so nothing is decided.")
    if comparison.control is None:
        said.append("There was no control: whether this task would show a difference is not known.")
    return " ".join(said)


def _arm(result: Result) -> Figures:
    outcomes = list(result.outcomes.values())
    gap = result.gap
    return {
        "about": result.about,
        "verdict": result.verdict,
        "gap": {"mean": gap.mean, "low": gap.low, "high": gap.high, "seeds": list(gap.seeds)} if gap else None,
        "losses": {str(seed): outcome.loss for seed, outcome in result.outcomes.items()},
        "first_losses": {str(seed): outcome.first_loss for seed, outcome in result.outcomes.items()},
        "validated": all(outcome.validated for outcome in outcomes),
        "bits_per_byte": _mean(outcome.bits_per_byte for outcome in outcomes),
        "tokens_per_second": _mean(outcome.tokens_per_second for outcome in outcomes),
        "bytes_per_param": outcomes[0].bytes_per_param if outcomes else {},
        "memory_gib": _mean(outcome.memory_gib for outcome in outcomes),
        "grad_norm": _mean(outcome.grad_norm for outcome in outcomes),
        "update_ratio": _mean(outcome.update_ratio for outcome in outcomes),
        "max_update": max((o.max_update for o in outcomes if o.max_update is not None), default=None),
        "worst_layers": [row for outcome in outcomes[:1] for row in _worst(outcome.run.readings)],
    }


def _worst(readings: Sequence[Any]) -> list[list[str]]:
    lines = []
    for severity, step, (layer, role, metric, value) in worst_layers(readings, WORST):
        bound = limit(role, metric)
        shown = f"{bound.value:.3g}" if bound else ""
        lines.append([layer, role, str(step), metric, f"{value:.3g}", shown, f"{severity:.2g}"])
    return lines


def _loss_rows(found: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, arm in found["arms"].items():
        gap = arm["gap"] or {}
        known = gap.get("low") is not None
        rows.append(
            [
                name,
                ", ".join("-" if loss is None else f"{loss:.4f}" for loss in arm["losses"].values()) or "-",
                _shown(arm["bits_per_byte"], ".4f"),
                _shown(gap.get("mean"), "+.3%"),
                f"{gap['low']:+.3%} to {gap['high']:+.3%}" if known else "-",
                arm["verdict"] or "reference",
            ]
        )
    return rows


def _cost_rows(found: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            name,
            _shown(arm["tokens_per_second"], ",.0f"),
            _shown(sum(arm["bytes_per_param"].values()) or None, ".2f"),
            _shown(arm["memory_gib"], ".2f"),
            _shown(arm["grad_norm"], ".3g"),
            _shown(arm["update_ratio"], ".2e"),
            _shown(arm["max_update"], ".3g"),
        ]
        for name, arm in found["arms"].items()
    ]


def _conditions(found: Mapping[str, Any]) -> str:
    validated = all(arm["validated"] for arm in found["arms"].values())
    which = "of the validation after the last step" if validated else "of the last tenth of training, not validated"
    return (
        f"Losses are {which}, nats a token, in the order of the seeds {', '.join(map(str, found['seeds']))}; gaps are"
        f" paired by seed; Student's interval of {found['confidence']:.0%} must lie within"
        f" ±{100 * found['bar']:g} %. {found['device']}, torch {found['torch']}."
    )


def _pictures(comparison: Comparison) -> dict[str, Callable[[Path | BytesIO], None]]:
    return {
        "gaps": partial(draw_gaps, comparison),
        "losses": partial(draw_losses, comparison),
        "gaps_over_steps": partial(draw_gaps_over_steps, comparison),
        "grad_norm": partial(draw_curve, comparison, "grad_norm", "gradient norm before clipping"),
        "update_ratio": partial(draw_curve, comparison, "update_ratio", "update / weight"),
    }


def _page(comparison: Comparison, found: Figures) -> str:
    pictures = _pictures(comparison)
    verdicts = [arm["verdict"] for arm in found["arms"].values()]
    bad = [verdict not in (None, "parity", "better") for verdict in verdicts]
    worst = "".join(
        f"<h3>{escape(name)}</h3>"
        + tabulate(("layer", "operand", "step", "metric", "figure", "limit", "x limit"), arm["worst_layers"])
        for name, arm in found["arms"].items()
        if arm["worst_layers"]
    )
    abouts = tabulate((), [[name, arm["about"]] for name, arm in found["arms"].items()])
    parts = {
        "Verdict": f"<p>{escape(found['verdict']).replace('**', '')}</p>"
        + tabulate(_HEAD, _loss_rows(found), bad)
        + f'<p class="note">{escape(_conditions(found))}</p>',
        "Arms": abouts + f"<pre>{escape(found['command'])}</pre>",
        "Failures": tabulate((), [[name, why] for name, why in found["failures"].items()]) if found["failures"] else "",
        "Gaps": picture(pictures["gaps"], "paired gaps and their intervals"),
        "Loss": picture(pictures["losses"], "training loss of the arms"),
        "Gap over steps": picture(pictures["gaps_over_steps"], "paired gap of the training loss"),
        "Cost": tabulate(_COST_HEAD, _cost_rows(found)),
        "Gradients": picture(pictures["grad_norm"], "gradient norm"),
        "Updates": picture(pictures["update_ratio"], "update over weight"),
        "Worst layers": worst,
    }
    return document("Parity", parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
