"""What happened to models, in order: loads, flips, label moves, promotions, rollbacks, with who and why."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from headrace.telemetry.log import get_logger

log = get_logger(__name__)

SERVER = "server"
"""Who did it, when nobody asked for it."""


@dataclass(frozen=True, slots=True)
class Actor:
    """Who changes something and why. `name`: a client's address or identity; empty reasons are allowed."""

    name: str = SERVER
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the audit log. `number` counts from 1 within a run of the server; `at` is the wall clock, in seconds.

    `kind`: loading, live, failed, unloaded, flip, label, traffic, rollout, promoted, rolled_back, taken_up, source_error, source_recovered,
    device_lost.
    `version` 0: the model as a whole, or no version. `reason` is for people; `fields` depend on the kind.
    """

    number: int
    at: float
    kind: str
    model: str
    version: int = 0
    who: str = SERVER
    reason: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)

    def table(self) -> dict[str, Any]:
        return asdict(self)


class EventLog:
    """Owns the latest events, how many there were of each kind, and who is told of new ones. Event loop only."""

    KEPT = 1000

    def __init__(self, wall_clock: Callable[[], float] = time.time) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        """By model and kind."""
        self._events: deque[Event] = deque(maxlen=self.KEPT)
        self._next = 1
        self._wall_clock = wall_clock
        self._subscribers: list[Callable[[Event], None]] = []

    def __repr__(self) -> str:
        return f"EventLog({len(self._events)} kept, {self._next - 1} in all)"

    def record(
        self, kind: str, model: str, version: int = 0, *, who: str = SERVER, reason: str = "", fields: Mapping[str, str] | None = None
    ) -> Event:
        event = Event(self._next, self._wall_clock(), kind, model, version, who, reason, dict(fields or {}))
        self._next += 1
        self._events.append(event)
        self.counts[model, kind] += 1
        for callback in list(self._subscribers):
            try:
                callback(event)
            except Exception:  # whoever is told must not stop what happened from happening
                log.exception("event not delivered", kind=kind, model=model)
        return event

    def since(self, number: int, model: str = "") -> list[Event]:
        """Those kept with a higher number, oldest first; of one model where one is given."""
        return [event for event in self._events if event.number > number and model in ("", event.model)]

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Have `callback` called with each new event. Returns the call that ends it."""
        self._subscribers.append(callback)

        def unsubscribe() -> None:
            if callback in self._subscribers:
                self._subscribers.remove(callback)

        return unsubscribe
