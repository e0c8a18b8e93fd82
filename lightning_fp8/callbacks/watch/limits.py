"""From what figure on a layer deserves a look: what tables and pictures rank layers by.

A limit is where to look, not where to act; `FP8Guard` has its own. Each is converted to a severity that is 1 at the
limit and comparable between metrics: a quotient for shares and ratios, a factor of noise amplitude for decibels.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from lightning_fp8.callbacks.readings import Figure, Reading


class Limit(NamedTuple):
    """Attributes: `value`, and whether it is in dB, where less is worse; of all else more is worse."""

    value: float
    decibels: bool = False

    def severity(self, figure: float) -> float:
        """1 at the limit, more beyond it; inf of what is not a number."""
        if math.isnan(figure):
            return math.inf
        if self.decibels:
            return float(10 ** ((self.value - figure) / 20))
        return abs(figure) / self.value if figure != -math.inf else 0.0


LIMITS = {
    "amax": Limit(3.4e38),  # beyond it is inf alone
    "underflow": Limit(0.05),
    "saturation": Limit(1e-3),
    "sqnr": Limit(25.0, decibels=True),  # E4M3 has 31.5 on Gaussians
    "block_sqnr_p5": Limit(15.0, decibels=True),
    "cosine_distortion": Limit(2e-3),  # E4M3 has 4e-4 on Gaussians
    "kurtosis": Limit(50.0),
    "max_median_ratio": Limit(100.0),
    "scale_drift": Limit(4.0),
    "update_rms": Limit(3.0),
    "max_update": Limit(10.0),
    "logit_max": Limit(100.0),
    "log_z": Limit(20.0),
    "swiglu_alignment": Limit(0.9),  # a healthy run of 128 columns has reached 0.74
}
# Gradients are E5M2, with one bit less, and reach over more octaves.
_OF_GRADIENTS = {
    "underflow": Limit(0.2),
    "sqnr": Limit(19.0, decibels=True),
    "block_sqnr_p5": Limit(9.0, decibels=True),
    "cosine_distortion": Limit(8e-3),
}


def limit(role: str, metric: str) -> Limit | None:
    """The limit of a metric; None if it has none."""
    return (_OF_GRADIENTS if role == "grad_output" else LIMITS).get(metric, LIMITS.get(metric))


class Finding(NamedTuple):
    """A figure, when it was read and how bad it is."""

    severity: float
    step: int
    figure: Figure


def worst_layers(readings: Iterable[Reading], count: int) -> list[Finding]:
    """For each layer and role its worst figure of all readings; the `count` worst of them, the worst first."""
    worst: dict[tuple[str, str], Finding] = {}
    for finding in _findings(readings):
        place = finding.figure.layer, finding.figure.role
        if place not in worst or finding.severity > worst[place].severity:
            worst[place] = finding
    return sorted(worst.values(), key=lambda finding: -finding.severity)[:count]


def worst_figures(reading: Reading) -> dict[str, float]:
    """Of each role and metric with a limit the worst layer's figure, as `role/metric`."""
    worst: dict[str, Finding] = {}
    for finding in _findings([reading]):
        name = f"{finding.figure.role}/{finding.figure.metric}"
        if name not in worst or finding.severity > worst[name].severity:
            worst[name] = finding
    return {name: finding.figure.value for name, finding in worst.items()}


def _findings(readings: Iterable[Reading]) -> Iterable[Finding]:
    for reading in readings:
        for figure in reading.figures():
            bound = limit(figure.role, figure.metric)
            if bound is not None:
                yield Finding(bound.severity(figure.value), reading.step, figure)
