"""Outcomes set side by side: for each arm its gap to the reference, seed by seed, and the verdict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_fp8.parity.outcome import Outcome
from lightning_fp8.parity.statistics import BAR, Gap, Verdict, judge, paired_gap, with_control


@dataclass(frozen=True)
class Result:
    """An arm.

    Attributes:
        name: Of the arm.
        about: In a few words.
        outcomes: Seed -> what came of it, where the run ended.
        gap: To the reference; None of an arm that did not end in all seeds, and of the reference.
        verdict: None of the reference.
    """

    name: str
    about: str
    outcomes: Mapping[int, Outcome]
    gap: Gap | None
    verdict: Verdict | None


@dataclass(frozen=True)
class Comparison:
    """Attributes.

    Attributes:
        seeds: In order; of logged runs, their numbers.
        results: The reference first.
        control: The control's name; None if there was none.
        bar: Of the gap.
        failures: Why runs did not end, by their names.
    """

    seeds: Sequence[int]
    results: Sequence[Result]
    control: str | None
    bar: float
    failures: Mapping[str, str]

    @property
    def reference(self) -> Result:
        """What all others are compared with."""
        return self.results[0]

    @property
    def compared(self) -> list[Result]:
        """The arms that there is a question about."""
        return [result for result in self.results[1:] if result.name != self.control]

    @property
    def passed(self) -> bool:
        """Whether all of them came out at parity, or better."""
        return all(result.verdict in ("parity", "better") for result in self.compared)


def compare(
    outcomes: Mapping[str, Mapping[int, Outcome]],
    abouts: Mapping[str, str],
    seeds: Sequence[int],
    *,
    control: str | None,
    bar: float = BAR,
    failures: Mapping[str, str] | None = None,
) -> Comparison:
    """The comparison of arms with the first of them.

    Args:
        outcomes: Arm -> seed -> what came of it; seeds whose run did not end are missing.
        abouts: What the arms are.
        seeds: Of all arms.
        control: The arm that must come out worse for any parity to count; None does without, and parity counts.
        bar: The interval of the gap must be within +-bar.
        failures: Why runs did not end.
    """
    names = list(outcomes)
    gaps = {name: _gap(outcomes[name], outcomes[names[0]], seeds) for name in names[1:]}
    verdicts: dict[str, Verdict] = {name: judge(gap, bar) if gap else "failed" for name, gap in gaps.items()}
    expected: Verdict = verdicts[control] if control else "worse"
    results = [Result(names[0], abouts[names[0]], outcomes[names[0]], None, None)]
    for name in names[1:]:
        verdict = verdicts[name] if name == control else with_control(verdicts[name], expected)
        results.append(Result(name, abouts[name], outcomes[name], gaps[name], verdict))
    return Comparison(seeds, results, control, bar, failures or {})


def _gap(arm: Mapping[int, Outcome], reference: Mapping[int, Outcome], seeds: Sequence[int]) -> Gap | None:
    """None where a run did not end, or a reference has no loss to compare with."""
    if any(seed not in arm or seed not in reference for seed in seeds):
        return None
    losses = [reference[seed].loss for seed in seeds]
    return paired_gap([arm[seed].loss for seed in seeds], losses) if all(map(math.isfinite, losses)) else None
