"""Paired gaps of a loss, their confidence interval, and what it allows to say.

Of each seed s the relative gap g_s = L_s / L_s(reference) - 1. The interval of their mean is Student's,

    mean(g) +- t * sd(g) / sqrt(n),    t the (1 + confidence) / 2 quantile with n - 1 degrees of freedom,

at 90 % the one whose inclusion in +-bar is the test of equivalence at 5 % (two one-sided tests; Schuirmann 1987).
One seed has a gap and no interval: how far pairs scatter is not known then, so no verdict is given.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

CONFIDENCE = 0.90
BAR = 0.005

# parity: the interval lies within +-bar. worse, better: it lies wholly beyond. undecided: neither; more seeds or
# longer runs would tell. failed: a run did not end. void: it would be parity, but the control was not seen to be worse.
Verdict = Literal["parity", "worse", "better", "undecided", "failed", "void"]


@dataclass(frozen=True)
class Gap:
    """Relative gaps of the seeds; 0.01 is 1 % above the reference.

    Attributes:
        seeds: Of each seed, in order; not finite where the loss was not.
        mean: Their mean.
        low: Of the interval; NaN with one seed.
        high: Of the interval.
    """

    seeds: tuple[float, ...]
    mean: float
    low: float
    high: float


def paired_gap(losses: Sequence[float], reference: Sequence[float], confidence: float = CONFIDENCE) -> Gap:
    """The gap of `losses` to those of the reference with the same seeds.

    Raises:
        ValueError: They are not equally many, or none.
    """
    if len(losses) != len(reference) or not losses:
        raise ValueError(f"paired_gap: {len(losses)} losses and {len(reference)} of the reference are no pairs.")
    gaps = tuple(loss / other - 1 for loss, other in zip(losses, reference, strict=True))
    mean = sum(gaps) / len(gaps)
    if len(gaps) < 2 or not all(map(math.isfinite, gaps)):
        return Gap(gaps, mean, math.nan, math.nan)
    reach = student(confidence, len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return Gap(gaps, mean, mean - reach, mean + reach)


def judge(gap: Gap, bar: float = BAR) -> Verdict:
    """What the interval allows to say: of one seed, whose interval is NaN, nothing; of a loss not finite, "worse"."""
    if not all(map(math.isfinite, gap.seeds)):
        return "worse"
    if gap.low > bar:
        return "worse"
    if gap.high < -bar:
        return "better"
    return "parity" if -bar <= gap.low and gap.high <= bar else "undecided"


def with_control(verdict: Verdict, control: Verdict) -> Verdict:
    """The verdict, given that of the control: parity counts only where the control was found to be worse.

    A difference that was found is one, whatever the control says.
    """
    return "void" if verdict == "parity" and control != "worse" else verdict


def student(confidence: float, freedom: int) -> float:
    """The t for which Student's distribution has `confidence` between -t and t: 2.920 for 0.9 and 2.

    By bisection of the closed form for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    Raises:
        ValueError: `freedom` is below 1, or `confidence` not between 0 and 1.
    """
    if freedom < 1 or not 0 < confidence < 1:
        raise ValueError(f"student: freedom {freedom} must be 1 or more, confidence {confidence} between 0 and 1.")
    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _between(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _between(theta: float, freedom: int) -> float:
    """The probability between -t and t, theta = atan(t / sqrt(freedom))."""
    cosine = math.cos(theta)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(freedom // 2):
        total += term
        term *= cosine**2 * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total
