"""How a guard says what it has seen and done: to people on the console, in figures to the loggers."""

from collections.abc import Iterable, Sequence

from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_fp8.callbacks.guard.events import Event, EventLog, finite
from lightning_fp8.callbacks.guard.layers import Decision


def event_of(step: int, decision: Decision) -> Event:
    """The event of a decision on a layer, taken after `step` optimizer steps."""
    layer, cause = decision.layer, decision.cause
    if cause is None:
        return Event(step, "metric", "return", f"{layer}: calm again, back in FP8.", layer)
    done = ", again and again: the layer now computes in BF16" if decision.action == "fallback" else ""
    message = f"{layer}: {cause}{done}. {cause.alarm.advice}".rstrip()
    metric = f"{cause.figure.role} {cause.figure.metric}"
    figure, limit = finite(cause.figure.value), finite(cause.alarm.limit)
    return Event(step, "metric", decision.action, message, layer, metric, figure, limit)


def summary(decisions: Iterable[Decision]) -> list[str]:
    """The decisions on a reading, those with one action and one reason in one line: a fault may be in every layer."""
    alike: dict[tuple[str, str], list[Decision]] = {}
    for decision in decisions:
        alike.setdefault((decision.action, decision.cause.reason if decision.cause else ""), []).append(decision)
    return [
        event_of(0, some[0]).message + (f" (And {len(some) - 1} more layers.)" if len(some) > 1 else "")
        for some in alike.values()
    ]


def say(trainer: Trainer, step: int, messages: Sequence[str], log: EventLog) -> None:
    """Warns of each message, and logs how many events of each action there are."""
    for message in messages:
        rank_zero_warn(f"FP8Guard, step {step}: {message}")
    counts = {f"guard/{action}": float(n) for action, n in log.counts().items()}
    for logger in trainer.loggers:
        logger.log_metrics(counts, step=step)
