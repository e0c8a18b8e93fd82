"""What the fault matrix says without training: its verdicts on made-up outcomes, and its table in the docs."""

import json
import math

import pytest
from clean import ROOT
from clean import table as clean_table
from faults import FAULTS
from judge import Found, Outcome, Row, complaints, margins, mutants
from matrix import ROWS, table

PAGE = (ROOT / "docs/stability.md").read_text()
TWELVE = {
    *("weights rounded", "second moments in linear per-tensor", "jump 64-fold", "does not saturate", "gate and up"),
    *("learning rate 0.3", "poisoned batches", "not scaled", "one rank", "corrupted scale", "stuck", "data shard"),
}
TOLD_ONLY = {"stuck", "data shard"}


def made_up(row: Row, loss: float = 1.5) -> Found:
    """Outcomes as the row claims them; clean runs are a hundredth of a nat apart."""
    clean = [Outcome(1.0), Outcome(1.01), Outcome(0.99)]
    broken = [Outcome(loss, row.onset + i * (row.within - 1) // 2) for i in range(3)]
    told = row.cure.startswith("none")
    return Found(clean, broken, [] if told else [Outcome(1.0, row.onset if row.alarms_when_cured else None)] * 3)


def test_there_are_twelve_of_which_ten_are_cured() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(TWELVE)
    assert all(sum(part in name for name in names) == 1 for part in TWELVE)
    told = {part for part in TWELVE for row in ROWS if part in row.name and row.cure.startswith("none")}
    assert told == TOLD_ONLY
    assert {fault.name for fault in FAULTS if fault.cured is None} <= {row.name for row in ROWS if "none" in row.cure}
    assert all(row.breaks_loss or any(part in row.name for part in TOLD_ONLY) for row in ROWS)
    assert all((ROOT / "tests" / row.test).exists() for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_verdict_depends_on_the_detector_the_cure_and_the_fault(row: Row) -> None:
    for loss in (1.5, math.inf, math.nan):
        found = made_up(row, loss)
        assert complaints(row, found) == []
        names = []
        for missing, mutant in mutants(row, found):
            names.append(missing)
            assert complaints(row, mutant), missing
        assert len(names) == 5 + row.breaks_loss + (3 - row.alarms_when_cured) * bool(found.cured)


def test_margins_are_the_larger_of_a_hundredth_and_two_deviations() -> None:
    near = [Outcome(2.0), Outcome(2.001), Outcome(1.999)]
    assert margins(near) == pytest.approx([0.02, 0.02001, 0.01999])
    far = [Outcome(2.0), Outcome(2.1), Outcome(1.9)]
    assert margins(far) == pytest.approx([0.2] * 3)
    row = Row(name="x", onset=5, detector="y", within=3, cure="z")
    just = Found(near, [Outcome(2.0202, 5), Outcome(2.0212, 7), Outcome(2.0192, 6)], [Outcome(2.0199)] * 3)
    assert complaints(row, just) == ["seed 2: the cured run ends outside, +0.0209 of 0.0200"]
    just = Found(near, [Outcome(2.0199, 5), Outcome(2.1, 7), Outcome(2.1, 8)], [])
    assert complaints(row, just) == [
        "seed 0: the broken run ends inside, +0.0199 of 0.0200",
        "seed 2: the first alarm is at 8",
    ]


def test_the_page_has_the_table_of_the_tests() -> None:
    assert table() in PAGE


def test_the_page_has_the_clean_runs_that_were_measured() -> None:
    runs = json.loads((ROOT / "benchmarks/results/clean_runs.json").read_text())["runs"]
    assert {recipe: len(found) for recipe, found in runs.items()} == {"tensorwise": 10, "delayed": 3, "bf16": 3}
    assert not any(run["alarms"] for found in runs.values() for run in found.values())
    assert clean_table(runs) in PAGE


def test_gaps_of_clean_runs_are_of_the_seeds_that_both_have() -> None:
    runs = {"a": {"0": 2.0, "1": 4.0, "2": 9.0}, "b": {"0": 2.2, "1": 4.0}}
    shown = clean_table({k: {s: {"alarms": 0, "loss": loss} for s, loss in v.items()} for k, v in runs.items()})
    assert shown.splitlines()[-1] == "| mean gap |  | +5.00% |"
    assert "| 2 | 0, 9.0000 | - |" in shown
