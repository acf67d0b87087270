"""The batcher's two ports on an asyncio loop: when to look at the queue, and when somebody's time is up."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

from headrace.telemetry.log import get_logger

log = get_logger(__name__)


class LoopTimer:
    """A batching.batcher.Timer on an event loop, callable from any thread. Owns one pending callback.

    Calls come one at a time and the last one holds: also when it is made on the loop while an earlier one, from another thread,
    is still on its way there.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread = threading.get_ident()
        self._handle: asyncio.TimerHandle | None = None
        self._latest: tuple[float, Callable[[], None]] | None = None

    def __call__(self, when: float, callback: Callable[[], None]) -> None:
        self._latest = (when, callback)
        if threading.get_ident() == self._thread:
            self._set()
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        latest, self._latest = self._latest, None
        if latest is None:
            return
        when, callback = latest
        if self._handle is not None:
            self._handle.cancel()
        self._handle = self._loop.call_later(max(when - time.monotonic(), 0.0), callback)


class LoopSchedule:
    """A batching.batcher.Schedule: from the event loop, once the loop has been quiet for some turns; else at once.

    grpc.aio brings one event a turn and needs four for a call. Without this the first of 64 requests that arrive together runs
    alone: tiny MLP, 64 concurrent, one core: 2,900 requests/s and 1.2 rows a batch, with it 6,300 and 23. Turns of an idle loop
    take microseconds. Owns the callbacks that wait.
    """

    QUIET_TURNS = 8
    LONGEST_WAIT = 0.002
    """Seconds; a loop that is never quiet has at least this much other work to do."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread = threading.get_ident()
        self._waiting: dict[Callable[[], None], None] = {}
        self._quiet = 0
        self._since = 0.0

    def __call__(self, callback: Callable[[], None]) -> None:
        if threading.get_ident() != self._thread:
            callback()
            return
        if not self._waiting:
            self._since = time.monotonic()
            self._loop.call_soon(self._turn)
        self._waiting[callback] = None
        self._quiet = 0

    def _turn(self) -> None:
        self._quiet += 1
        if self._quiet <= self.QUIET_TURNS and time.monotonic() - self._since < self.LONGEST_WAIT:
            self._loop.call_soon(self._turn)
            return
        waiting, self._waiting = self._waiting, {}
        for callback in waiting:
            try:
                callback()
            except Exception:
                log.exception("scheduled callback failed")  # the others' requests must not wait for it
