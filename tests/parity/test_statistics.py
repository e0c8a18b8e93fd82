"""Gaps, intervals and verdicts against figures worked out by hand and printed tables of Student's distribution."""

import math

import pytest

from lightning_fp8.parity.statistics import judge, paired_gap, student, with_control

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("confidence", "freedom", "printed"),
    [
        (0.90, 1, 6.314),
        (0.90, 2, 2.920),
        (0.90, 3, 2.353),
        (0.90, 4, 2.132),
        (0.90, 9, 1.833),
        (0.90, 30, 1.697),
        (0.95, 7, 2.365),
        (0.99, 2, 9.925),
        (0.99, 10, 3.169),
    ],
)
def test_quantiles_are_those_of_printed_tables(confidence: float, freedom: int, printed: float) -> None:
    assert round(student(confidence, freedom), 3) == printed


@pytest.mark.parametrize(("confidence", "freedom"), [(0.9, 0), (0.0, 3), (1.0, 3)])
def test_there_is_no_quantile_of_nothing(confidence: float, freedom: int) -> None:
    with pytest.raises(ValueError, match="student"):
        student(confidence, freedom)


def test_a_gap_is_that_of_pairs() -> None:
    # Gaps of 1, 2 and 3 %: mean 2 %, deviation 1 %, and t is 2.920 for two degrees of freedom.
    gap = paired_gap([1.01, 2.04, 4.12], [1.0, 2.0, 4.0])
    assert gap.seeds == pytest.approx((0.01, 0.02, 0.03))
    assert gap.mean == pytest.approx(0.02)
    reach = 2.919986 * 0.01 / math.sqrt(3)
    assert (gap.low, gap.high) == pytest.approx((0.02 - reach, 0.02 + reach), rel=1e-5)


def test_what_pairs_share_is_no_part_of_the_interval() -> None:
    gap = paired_gap([2.02, 4.04, 8.08], [2.0, 4.0, 8.0])
    assert gap.low == pytest.approx(0.01)
    assert gap.high == pytest.approx(0.01)


@pytest.mark.parametrize("losses", [[], [1.0, 2.0]])
def test_losses_without_partners_are_refused(losses: list[float]) -> None:
    with pytest.raises(ValueError, match="no pairs"):
        paired_gap(losses, [1.0] if losses else [])


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([1.001, 1.002, 1.001], "parity"),
        ([0.999, 1.0, 1.001], "parity"),
        ([1.02, 1.021, 1.019], "worse"),
        ([0.98, 0.981, 0.979], "better"),
        ([1.0, 1.02, 1.04], "undecided"),  # too scattered
        ([1.004, 1.006, 1.005], "undecided"),  # on the bar
        ([1.0], "undecided"),  # one seed, equal as it is
        ([1.5], "undecided"),
        ([1.0, 1.0, NAN], "worse"),
        ([1.0, 1.0, INF], "worse"),
        ([NAN], "worse"),
    ],
)
def test_a_verdict_follows_from_the_interval(losses: list[float], verdict: str) -> None:
    assert judge(paired_gap(losses, [1.0] * len(losses)), bar=0.005) == verdict


@pytest.mark.parametrize(
    ("verdict", "control", "said"),
    [
        ("parity", "worse", "parity"),
        ("parity", "parity", "void"),
        ("parity", "undecided", "void"),
        ("parity", "better", "void"),
        ("parity", "failed", "void"),
        ("worse", "parity", "worse"),
        ("better", "parity", "better"),
        ("failed", "worse", "failed"),
        ("undecided", "parity", "undecided"),
    ],
)
def test_parity_counts_where_the_control_is_worse(verdict: str, control: str, said: str) -> None:
    assert with_control(verdict, control) == said
