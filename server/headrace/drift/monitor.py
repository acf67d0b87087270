"""All versions' drift: the thread that counts, and who is told of alerts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

from headrace.drift.ranking import worst_first
from headrace.drift.verdict import Alert
from headrace.drift.watch import DriftWatch, Subject
from headrace.telemetry.log import get_logger
from headrace.threads import be_patient

log = get_logger(__name__)

INTERVAL = 1.0
"""Seconds for which batches gather. Of 37 features one count takes 210 µs and then 2 µs a row, so it is shared by as many rows as come
before anybody can want to know."""

Told = Callable[[Sequence[Alert]], None]


class DriftMonitors:
    """Owns the counting thread, the watches and who is told of alerts. Made and closed on the event loop, where alerts arrive too."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watches: tuple[DriftWatch, ...] = ()
        self._subscribers: list[Told] = []
        self._has_work = threading.Event()
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"DriftMonitors({len(self._watches)} versions)"

    def watch(self, subject: Subject) -> DriftWatch:
        watch = DriftWatch(subject, self._wake, self._publish)
        self._watches = (*self._watches, watch)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="drift", daemon=True)
            self._thread.start()
        return watch

    def forget(self, watch: DriftWatch) -> None:
        watch.close()
        self._watches = tuple([each for each in self._watches if each is not watch])

    def subscribe(self, callback: Told) -> Callable[[], None]:
        """Have `callback` called on the event loop with what a window of a version raises, and with what is over by it. Returns the call
        that ends it."""
        self._subscribers.append(callback)

        def unsubscribe() -> None:
            if callback in self._subscribers:
                self._subscribers.remove(callback)

        return unsubscribe

    def close(self) -> None:
        """End the thread, after the count that it is in. Returns at once."""
        self._is_closed.set()
        self._has_work.set()

    def _wake(self) -> None:
        if not self._has_work.is_set():
            self._has_work.set()

    def _run(self) -> None:
        be_patient()
        may_end = False
        while not self._is_closed.is_set():
            # A window may end by time alone.
            self._has_work.wait(timeout=1.0 if may_end else None)
            self._has_work.clear()
            if self._is_closed.wait(INTERVAL):
                return
            may_end = False
            for watch in self._watches:
                try:
                    may_end |= watch.count_pending()
                except Exception:  # one version's, and not the end of all others'
                    log.exception("drift counting failed", watch=repr(watch))

    def _publish(self, news: Sequence[Alert]) -> None:
        """From any thread."""
        for is_raised in (True, False):
            some = [alert for alert in news if alert.is_raised is is_raised]
            if some:
                # One line a window, however many features: what is worst comes first.
                texts = [alert.text for alert in worst_first(some)]
                shown = {"model": some[0].model, "version": some[0].version, "rows": some[0].rows, "alerts": texts}
                (log.warning if is_raised else log.info)("drift found" if is_raised else "drift over", **shown)
                try:
                    self._loop.call_soon_threadsafe(self._tell, some)
                except RuntimeError:
                    pass  # the loop is gone, and with it everybody who would have been told

    def _tell(self, some: Sequence[Alert]) -> None:
        for callback in list(self._subscribers):
            try:
                callback(some)
            except Exception:  # whoever is told must not keep the others from it
                log.exception("drift alerts not delivered", model=some[0].model, version=some[0].version)
