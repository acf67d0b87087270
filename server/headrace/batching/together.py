"""A Schedule for threads that bring requests in batches: one look at a queue for all that came together."""

from __future__ import annotations

import threading
from collections.abc import Callable

from headrace.batching.batcher import Schedule
from headrace.telemetry.log import get_logger

log = get_logger(__name__)

_Waiting = dict[Callable[[], None], None]


class TogetherSchedule:
    """Between `begin` and `end` callbacks of that thread wait for the end; all others go to `otherwise`.

    Without this the first of 64 requests that were received together would run alone. Owns, for each thread that is between the
    two, the callbacks that wait.
    """

    def __init__(self, otherwise: Schedule) -> None:
        self._otherwise = otherwise
        self._waiting: dict[int, _Waiting] = {}

    def __repr__(self) -> str:
        return f"TogetherSchedule({len(self._waiting)} threads, {self._otherwise!r})"

    def __call__(self, callback: Callable[[], None]) -> None:
        waiting = self._waiting.get(threading.get_ident())
        if waiting is None:
            self._otherwise(callback)
        else:
            waiting[callback] = None

    def begin(self) -> None:
        self._waiting[threading.get_ident()] = {}

    def end(self) -> None:
        for callback in self._waiting.pop(threading.get_ident()):
            try:
                callback()
            except Exception:
                log.exception("scheduled callback failed")  # the others' requests must not wait for it
