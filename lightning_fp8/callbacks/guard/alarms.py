"""When a figure of a reading is an alarm: rules as data.

A limit is where a healthy run does not come and a sick one does, so each has its reason beside it. Alarms cost
something, a reader's trust, and so the limits keep well clear of clean runs; the metrics themselves are logged whatever
they are. The signal-to-noise ratio of a whole tensor is blind to outliers, which carry its energy: underflow, kurtosis
and the worst blocks are looked at beside it.

What an alarm may do follows from what cures it. "fallback" is for what a cast to FP8 does to a tensor: in BF16 it does
not happen. Attention logits that grow, updates that are too large or weights that stand still are the same in BF16,
and only reported.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lightning_fp8.callbacks.readings import Figure

Action = Literal["warn", "fallback"]


@dataclass(frozen=True)
class Alarm:
    """A figure that is on the wrong side of its limit.

    Attributes:
        metric: Its name, as in `Reading`.
        limit: Figures above it are alarms. With a limit of infinity, those that are infinite or NaN, which no other
            limit minds: where one figure is NaN all are, and one alarm says it.
        roles: Of the tensors that are looked at; all if empty.
        below: Figures below the limit are alarms, instead of those above.
        action: What a lasting alarm leads to; see the module's docstring.
        advice: What it means and what to do, for the one who reads the warning.
    """

    metric: str
    limit: float
    roles: tuple[str, ...] = ()
    below: bool = False
    action: Action = "warn"
    advice: str = ""

    def __post_init__(self) -> None:
        if self.action not in ("warn", "fallback"):
            raise ValueError(f"Alarm on {self.metric}: action {self.action!r} is not one of warn, fallback.")

    def concerns(self, figure: Figure) -> bool:
        """Whether this is the figure that the alarm looks at."""
        return figure.metric == self.metric and (not self.roles or figure.role in self.roles)

    def raised_by(self, value: float) -> bool:
        """Whether `value` is on the wrong side."""
        if math.isinf(self.limit):
            return not math.isfinite(value)
        return value < self.limit if self.below else value > self.limit


class Raised(NamedTuple):
    """An alarm and the figure that raised it."""

    alarm: Alarm
    figure: Figure

    @property
    def reason(self) -> str:
        """What is wrong, the same for every sample of it."""
        return f"{self.figure.role} {self.figure.metric}, {self.alarm.action}"

    def __str__(self) -> str:
        alarm, figure = self.alarm, self.figure
        side = "not finite" if math.isinf(alarm.limit) else f"{'below' if alarm.below else 'above'} {alarm.limit:g}"
        return f"{figure.role} {figure.metric} is {figure.value:.3g}, {side}"


def raised(figures: Iterable[Figure], alarms: Iterable[Alarm]) -> list[Raised]:
    """Every alarm that one of `figures` raises."""
    rules = list(alarms)
    return [
        Raised(alarm, figure)
        for figure in figures
        for alarm in rules
        if alarm.concerns(figure) and alarm.raised_by(figure.value)
    ]


_CAST = "FP8 does not hold this tensor; a finer granularity (rowwise, blockwise) or BF16 for this layer does."
_FLUSHED = f"{_CAST} If a few outliers of a SwiGLU push the rest below FP8's range, so does smooth_swiglu."
_OUTLIERS = "a few channels outgrow the rest and cost the others their precision; smooth or normalise what feeds them."
_LOGITS = "softmax is about to be one-hot; use qk_norm, or lower the learning rate."
_STUCK = "this layer is stuck: all of it is zero; look at what feeds it, and at what it feeds."
_TINY = 2.0**-126  # the smallest normal number of fp32: anything else is zero to a GEMM

DEFAULT_ALARMS: tuple[Alarm, ...] = (
    # Non-finite once is a step that is skipped; from sample to sample it is a cast that overflows.
    Alarm("amax", math.inf, ("input", "weight", "grad_output"), action="fallback", advice="NaN or infinity."),
    # A layer that gives the same whatever it gets: what it reads, holds or learns from is zero throughout.
    Alarm("amax", _TINY, ("input", "weight", "grad_output"), below=True, advice=_STUCK),
    # What a cast loses. E4M3 spans 2^17.8: a Gaussian loses 1e-5 of itself, an aligned SwiGLU pair half and more.
    Alarm("underflow", 0.05, ("input", "weight"), advice=_FLUSHED),
    Alarm("underflow", 0.30, ("input", "weight"), action="fallback", advice=_FLUSHED),
    # Gradients have longer tails, and E5M2 spans 2^31.8; unscaled ones are lost all but entirely.
    Alarm("underflow", 0.20, ("grad_output",), advice=_CAST),
    Alarm("underflow", 0.50, ("grad_output",), action="fallback", advice=_CAST),
    # None with current scaling; with delayed scaling tensors that grow saturate a few thousandths now and then, and one
    # that jumps 64-fold nearly all of itself.
    Alarm("saturation", 0.02, ("input", "weight", "grad_output"), advice=_CAST),
    Alarm("saturation", 0.10, ("input", "weight", "grad_output"), action="fallback", advice=_CAST),
    # Rounding alone gives 31.5 dB in E4M3, and 6 dB less in E5M2 with its one bit less; 1 - cosine of the same noise is
    # 3.5e-4 and 1.4e-3. Of gradients the tensor as a whole says nothing: where a delayed scale lags L octaves behind a
    # few large ones, which carry the energy, as few as -20 log10(1 - 2^-L) dB are left, and all blocks but theirs are
    # as they should be. How far it may lag has a limit of its own.
    Alarm("sqnr", 25.0, ("input", "weight"), below=True, advice=_CAST),
    Alarm("cosine_distortion", 2e-3, ("input", "weight"), advice=_CAST),
    Alarm("block_sqnr_p5", 15.0, ("input", "weight"), below=True, advice=_OUTLIERS),
    Alarm("block_sqnr_p5", 9.0, ("grad_output",), below=True, advice=_CAST),
    # In [1, width]: 1 where all channels are alike; above 600 at 7 B parameters in Pre-LN models with outliers.
    Alarm("kurtosis", 50.0, ("input",), advice=_OUTLIERS),
    # The input of a down projection, a product of two, has come to 90 in a healthy run.
    Alarm("max_median_ratio", 500.0, ("input",), advice=_OUTLIERS),
    Alarm("scale_drift", 4.0, ("input", "weight"), advice="the magnitude changed 16-fold since the last reading."),
    # Early in a run gradients change 8-fold within 10 steps.
    Alarm("scale_drift", 8.0, ("grad_output",), advice="the magnitude changed 256-fold since the last reading."),
    Alarm("scale_lag", 3.0, advice="a tensor grew 8-fold and more past its scale; use current scaling, or a margin."),
    # |u| of Adam is about 1: a v that was lost makes it 10 to 600.
    Alarm("update_rms", 3.0, ("update",), advice="v is lost or stale; see moments, eps, clip_update_rms."),
    Alarm("max_update", 10.0, ("update",), advice="v is lost or stale; see moments, eps, max_update."),
    Alarm("moment_zeros", 1e-4, ("update",), advice='v is lost where it is small; use moments="fp8".'),
    Alarm("logit_max", 100.0, ("attention",), advice=_LOGITS),
    Alarm("log_z", 20.0, ("output",), advice="the output logits drift; use a z-loss."),
    Alarm("log_z", -20.0, ("output",), below=True, advice="the output logits drift; use a z-loss."),
    Alarm("swiglu_alignment", 0.95, advice="a gate and its up projection align, and SwiGLU turns quadratic."),
)
# Stochastic rounding leaves most weights where they are, and moves them all on average: no alarm there.
STALLED = Alarm("stalled_updates", 0.5, ("update",), advice="updates are rounded away; round stochastically.")
