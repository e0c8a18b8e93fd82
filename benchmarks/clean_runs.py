"""Does a healthy run raise an alarm? The quickstart for 450 steps, monitored and guarded, seed by seed.

    python benchmarks/clean_runs.py                               # all: about an hour on two cores
    python benchmarks/clean_runs.py --recipes delayed --seeds 1   # one, added to those that are there

Ten seeds of the quickstart as it is; three of them besides with delayed scaling, and in BF16 for the loss. Runs of a
seed have the same initial weights and the same data in the same order. The figures, with the commits they were made
at, go to benchmarks/results/clean_runs.json; a run that has ended is not repeated. `tests/stability/test_tables.py`
holds the table in docs/stability.md to them.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from measuring import machine
from provenance import commits, recorded

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests/stability"))
from clean import RECIPES, STEPS, clean_run, result

SEEDS = {"tensorwise": range(10), "delayed": range(3), "bf16": range(3)}
RUNS, RESULTS = Path("runs/clean"), Path("benchmarks/results/clean_runs.json")


def measure(recipe: str, seed: int) -> None:
    """Trains one run, unless it has ended."""
    folder = RUNS / f"{recipe}-{seed}"
    if not (folder / "summary.json").exists():
        with recorded(folder, machine()):
            clean_run(folder, Path("data/quickstart").resolve(), seed, recipe)


def figures() -> dict[str, Any]:
    """Of all runs that have ended."""
    runs: dict[str, Any] = {}
    for recipe, seeds in SEEDS.items():
        for seed in seeds:
            folder = RUNS / f"{recipe}-{seed}"
            if (folder / "summary.json").exists():
                run = result(folder)
                row = {"alarms": len(run.events), "loss": run.summary["val/loss"], "commits": commits(folder)}
                runs.setdefault(recipe, {})[str(seed)] = row
    return {"command": "python benchmarks/clean_runs.py", "steps": STEPS, "runs": runs, "machine": machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, help="by default ten, and three of delayed and bf16")
    args = parser.parse_args()
    for recipe in args.recipes:
        for seed in SEEDS[recipe] if args.seeds is None else args.seeds:
            measure(recipe, seed)
            found = figures()
            RESULTS.write_text(json.dumps(found, indent=2) + "\n")
            print(f"{recipe} {seed}: {found['runs'][recipe][str(seed)]}", flush=True)


if __name__ == "__main__":
    main()
