"""What becomes of a layer whose alarms last: a state machine of numbers, with no model and no Trainer.

    FP8  -- `enter` of the last `of` samples raise a fallback alarm -->  BF16
    BF16 -- `calm` samples in a row without one -->  FP8, until it has fallen back `max_fallbacks` times

One bad sample is not enough to leave FP8 and one good one not enough to return: a layer at the edge would flap, and
every switch changes what the run computes. Coming back is measured by what the cast *would* do, so a monitor must look
at layers in BF16 too; while it does not, the layer stays where it is safe.

Any alarm is reported once for each layer and reason, and again only after `calm` samples without it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

from lightning_fp8.callbacks.guard.alarms import Alarm, Raised, raised
from lightning_fp8.callbacks.readings import Reading


@dataclass(frozen=True)
class FallbackRule:
    """When a layer leaves FP8 and returns.

    Attributes:
        enter: So many alarming samples,
        of: of so many.
        calm: Samples in a row without alarm before a layer returns, or is warned of again.
        max_fallbacks: After so many a layer stays in BF16.
    """

    enter: int = 2
    of: int = 3
    calm: int = 10
    max_fallbacks: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.enter <= self.of or self.calm < 1 or self.max_fallbacks < 0:
            raise ValueError(
                f"{self}: enter must be from 1 to `of`, calm at least 1, and max_fallbacks 0 (never fall back) or more."
            )


@dataclass(frozen=True)
class LayerState:
    """What is remembered of a layer.

    Attributes:
        recent: Whether the newest samples were alarming, oldest first; at most `of`.
        calm: Samples since the last alarming one.
        fallen: Whether the layer runs in BF16.
        fallbacks: How often it left FP8.
        warned: Reason -> samples since it was last seen, of what was reported.
    """

    recent: tuple[bool, ...] = ()
    calm: int = 0
    fallen: bool = False
    fallbacks: int = 0
    warned: Mapping[str, int] = field(default_factory=dict)


class Decision(NamedTuple):
    """What to do about a layer.

    Attributes:
        layer: Its name.
        action: "fallback" and "return" switch it; "warn" tells.
        cause: The alarm; None for a return.
    """

    layer: str
    action: Literal["warn", "fallback", "return"]
    cause: Raised | None


def advance(
    layer: str, state: LayerState, alarms: Iterable[Raised], rule: FallbackRule
) -> tuple[LayerState, list[Decision]]:
    """One sample of one layer: its next state, and what to do."""
    by_reason = {alarm.reason: alarm for alarm in alarms}
    aged = {reason: 0 if reason in by_reason else age + 1 for reason, age in state.warned.items()}
    known = {reason: age for reason, age in aged.items() if age < rule.calm}
    decisions = [Decision(layer, "warn", by_reason[reason]) for reason in by_reason if reason not in known]
    warned = {**known, **dict.fromkeys(by_reason, 0)}
    serious = [alarm for alarm in by_reason.values() if alarm.alarm.action == "fallback"]
    recent = (*state.recent, bool(serious))[-rule.of :]
    calm = 0 if serious else state.calm + 1
    state = replace(state, recent=recent, calm=calm, warned=warned)
    if not state.fallen and serious and sum(recent) >= rule.enter and state.fallbacks < rule.max_fallbacks:
        state = replace(state, fallen=True, fallbacks=state.fallbacks + 1)
        decisions.append(Decision(layer, "fallback", serious[0]))
    elif state.fallen and calm >= rule.calm and state.fallbacks < rule.max_fallbacks:
        state = replace(state, fallen=False, recent=())
        decisions.append(Decision(layer, "return", None))
    return state, decisions


class LayerPolicy:
    """The state machines of all layers.

    With Fabric: `for decision in policy.decide(reading)`, then `lightning_fp8.compute.linear.fall_back(model,
    policy.fallen)`, and `policy.state_dict()` into the checkpoint.

    Args:
        alarms: What to look at.
        rule: When a layer leaves FP8 and returns.
    """

    def __init__(self, alarms: Iterable[Alarm], rule: FallbackRule) -> None:
        self.alarms = tuple(alarms)
        self.rule = rule
        self._states: dict[str, LayerState] = {}

    @property
    def fallen(self) -> frozenset[str]:
        """The layers that run in BF16."""
        return frozenset(name for name, state in self._states.items() if state.fallen)

    def decide(self, reading: Reading) -> list[Decision]:
        """What to do about the layers of a reading; layers that are not in it stay as they are."""
        by_layer: dict[str, list[Raised]] = {layer: [] for layer in reading.values}
        for alarm in raised(reading.figures(), self.alarms):
            by_layer[alarm.figure.layer].append(alarm)
        decisions = []
        for layer, alarms in by_layer.items():
            if alarms or layer in self._states:
                state = self._states.get(layer, LayerState())
                self._states[layer], found = advance(layer, state, alarms, self.rule)
                decisions += found
        return decisions

    def state_dict(self) -> dict[str, Any]:
        """The states as plain numbers, by layer."""
        return {
            name: {**asdict(state), "recent": list(state.recent), "warned": dict(state.warned)}
            for name, state in self._states.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self._states = {name: LayerState(**{**s, "recent": tuple(s["recent"])}) for name, s in state.items()}
