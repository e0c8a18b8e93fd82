"""Clean runs of the quickstart, monitored and guarded, through the command line: what the guard said of them."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
CONFIGS = ("configs/quickstart.yaml", "configs/stability/monitor.yaml", "configs/stability/guard.yaml")
STEPS = 450
# What else a run is configured with: configurations, options.
RECIPES: dict[str, tuple[str, ...]] = {
    "tensorwise": (),
    "delayed": ("--fp8.recipe", "delayed"),
    "bf16": ("-c", str(ROOT / "configs/precision/bf16.yaml")),
}


class Clean(NamedTuple):
    """What came of it: the guard's events, and the run's summary."""

    events: list[dict[str, Any]]
    summary: dict[str, Any]


def clean_run(folder: Path, data: Path, seed: int, recipe: str = "tensorwise") -> Clean:
    """Trains for 450 steps with a validation every 150.

    Args:
        folder: Of the run.
        data: What was prepared for the quickstart.
        seed: Of initial weights and of the order of the data.
        recipe: One of `RECIPES`.
    """
    command = [sys.executable, "-m", "lightning_fp8", "fit"]
    for config in CONFIGS:
        command += ["-c", str(ROOT / config)]
    settings = {
        "seed_everything": seed,
        "data.seed": seed,
        "data.path": data,
        "trainer.max_steps": STEPS,
        "trainer.val_check_interval": STEPS // 3,
        "trainer.default_root_dir": folder,
    }
    command += [*RECIPES[recipe], *(f"--{name}={value}" for name, value in settings.items())]
    subprocess.run(command, check=True, timeout=7200)
    return result(folder)


def table(runs: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Alarms and validation losses in Markdown, a line for each seed; `runs` by recipe and seed.

    The last line has the mean gaps to the runs with one scale a tensor, of the seeds that both have.
    """
    lines = [["seed", *(f"{recipe}: alarms, loss" for recipe in runs)], ["---"] * (1 + len(runs))]
    for seed in next(iter(runs.values())):
        cells = (found.get(seed) for found in runs.values())
        lines.append([seed, *(f"{run['alarms']}, {run['loss']:.4f}" if run else "-" for run in cells)])
    first, *others = runs.values()
    gaps = [fmean(found[seed]["loss"] / first[seed]["loss"] - 1 for seed in found) for found in others]
    lines.append(["mean gap", "", *(f"{gap:+.2%}" for gap in gaps)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def result(folder: Path) -> Clean:
    """Of a run that has ended."""
    events = folder / "events.jsonl"  # there is none without an event
    lines = events.read_text().splitlines() if events.exists() else []
    return Clean([json.loads(line) for line in lines], json.loads((folder / "summary.json").read_text()))
