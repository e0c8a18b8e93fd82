"""`events.jsonl`: what a guard has seen and done, one JSON object a line.

The checkpoint holds the same events, and what it holds is the truth: when a run resumes, the file is written anew from
the checkpoint, and so loses what a run that died had added after it. The resumed run takes those decisions again.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_fp8.files import write_text


@dataclass(frozen=True)
class Event:
    """One thing seen, and what was done about it.

    Attributes:
        step: The number of optimizer steps taken when it was seen.
        kind: "metric", "nonfinite" or "spike".
        action: "warn"; "fallback" or "return" of a layer; "skip" of steps; "rewind"; "give up".
        message: For people.
        layer: Its name, for metrics.
        metric: What was measured.
        figure: The measurement; None if it is not finite.
        limit: What it should have kept to.
    """

    step: int
    kind: str
    action: str
    message: str
    layer: str | None = None
    metric: str | None = None
    figure: float | None = None
    limit: float | None = None


def finite(value: float) -> float | None:
    """The number, or None where JSON has none for it."""
    return value if math.isfinite(value) else None


class EventLog:
    """The events of a run, in memory and, where there is a file, in it.

    Args:
        events: Those so far.
    """

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.events = list(events)
        self._file: Path | None = None

    def open(self, file: Path) -> None:
        """Writes the events so far to `file`, in place of what is there, and each later one as it comes."""
        self._file = file
        if self.events or file.exists():
            write_text(file, "".join(map(_line, self.events)))

    def add(self, event: Event) -> None:
        """Appends an event."""
        self.events.append(event)
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as lines:
                lines.write(_line(event))

    def counts(self) -> dict[str, int]:
        """How many events there are of each action."""
        actions = [event.action for event in self.events]
        return {action: actions.count(action) for action in dict.fromkeys(actions)}

    def state_dict(self) -> list[dict[str, Any]]:
        """The events as plain values."""
        return [asdict(event) for event in self.events]

    def load_state_dict(self, state: Iterable[Mapping[str, Any]]) -> None:
        """Takes over what `state_dict` returned."""
        self.events = [Event(**event) for event in state]


def _line(event: Event) -> str:
    return json.dumps(asdict(event), allow_nan=False) + "\n"
