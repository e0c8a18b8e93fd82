"""The fault matrix of tests/stability as figures: each fault broken and cured, and when it is seen."""

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent / "tests"


def measure_faults(seeds: list[int], folder: Path) -> dict[str, Any]:
    """Trains what the rows need; rows that are in `folder` are taken from there."""
    sys.path[:0] = [str(TESTS), str(TESTS / "stability")]
    from faults import FAULTS
    from trials import run

    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = {}
    for fault in FAULTS:
        file = folder / f"{fault.name.replace(' ', '-').replace(',', '')}.json"
        if not file.exists():
            clean, broken = ([run(setup, seed) for seed in seeds] for setup in (fault.clean, fault.broken))
            cured = [run(fault.cured, seed) for seed in seeds] if fault.cured else []
            row = {
                "onset": fault.onset,
                "detector": fault.detector,
                "within": fault.within,
                "cure": fault.cure,
                "first_alarms": [one.first(fault.detector) for one in broken],
                **{
                    name: _mean([one.loss for one in runs])
                    for name, runs in (("clean", clean), ("broken", broken), ("cured", cured))
                },
            }
            file.write_text(json.dumps(row, indent=2) + "\n")
        rows[fault.name] = json.loads(file.read_text())
        print(f"{fault.name}: done ({len(rows)} of {len(FAULTS)})", flush=True)
    return {"seeds": seeds, "faults": rows}


def _mean(losses: list[float]) -> float | None:
    mean = statistics.fmean(losses) if losses else math.nan
    return mean if math.isfinite(mean) else None
