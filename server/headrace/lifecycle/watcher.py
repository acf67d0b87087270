"""Asks one source again and again what it has, and hands on what may be taken of it.

The rules that keep a fault of the source from becoming one of the server: a listing that fails changes nothing; nor does one that is
suddenly empty; a version that somebody may still be copying is not in it until it has stopped changing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Callable

from headrace.errors import ConfigError
from headrace.lifecycle.view import SourceDescription
from headrace.sources.base import Listing, ModelRef, Source, VersionRef
from headrace.telemetry.log import get_logger

log = get_logger(__name__)

JITTER = 0.2
"""Of the interval, so that a fleet that was started together does not ask together for ever."""
LONGEST_BACKOFF = 300.0


class Watcher:
    """Owns one source, what it said last and when. `take` is called with each listing that differs from the one before.

    `interval`: seconds between polls, under the source's own hints where those are followed. `settle`: seconds that files without a
    manifest must be unchanged. `on_error` is told why the source cannot be read when that changes, "" when it can again.
    """

    def __init__(
        self,
        source: Source,
        take: Callable[[Source, Listing], None],
        *,
        interval: float,
        settle: float,
        on_error: Callable[[Source, str], None],
        follows_hints: bool = True,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.source = source
        self.error = ""
        self._take = take
        self._interval = interval
        self._on_error = on_error
        self._jitter = jitter
        self._follows_hints = follows_hints
        self.has_listed = asyncio.Event()
        self._settling = Settling(settle)
        self._hinted = asyncio.Event()
        self._last: Listing | None = None
        self._listed_at = time.monotonic()
        self._failures = 0

    def __repr__(self) -> str:
        return f"Watcher({self.source.uri}, {'ok' if not self.error else self.error!r})"

    @property
    def age(self) -> float:
        """Seconds since the source last said what it has."""
        return time.monotonic() - self._listed_at

    def describe(self) -> SourceDescription:
        return SourceDescription(self.source.uri, self.age, self.error)

    def hint(self) -> None:
        """Somebody says that the source has changed: look now."""
        self._hinted.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._wait(self._delay())
            await self.poll()

    async def start(self) -> None:
        """Ask for the first time. Raises ConfigError for what only a changed configuration mends; a place that cannot be read now is
        asked again."""
        try:
            listing = await self.source.list()
        except OSError as error:
            self._fail(_reason(error))
        else:
            self._accept(listing)

    async def poll(self) -> None:
        """Ask once. Never raises for the source's fault."""
        try:
            listing = await self.source.list()
        except (OSError, ConfigError) as error:
            self._fail(_reason(error))
        except Exception:
            # A source may be somebody else's; its bug must not end the watching.
            log.exception("source failed", source=self.source.uri)
            self._fail("internal error while it was read; the server's log has the reason")
        else:
            self._accept(listing)

    def _accept(self, listing: Listing) -> None:
        if self._last is not None and self._last.models and not (listing.models or listing.errors):
            self._fail(f"the listing is suddenly empty; the {len(self._last.models)} models that were in it are kept")
            return
        self._listed_at = time.monotonic()
        self._failures = 0
        if self.error:
            self.error = ""
            log.info("source recovered", source=self.source.uri)
            self._on_error(self.source, "")
        settled = self._settling.settle(listing, self._listed_at)
        if settled != self._last:
            self._take(self.source, settled)
            self._last = settled
        self.has_listed.set()

    def _fail(self, reason: str) -> None:
        self._failures += 1
        if reason != self.error:
            self.error = reason
            log.warning("source not readable", source=self.source.uri, reason=reason, age=round(self.age, 1))
            self._on_error(self.source, reason)

    def _delay(self) -> float:
        base = min(self._interval * 2.0 ** min(self._failures, 16), max(LONGEST_BACKOFF, self._interval))
        delay = base * (1.0 + JITTER * (2.0 * self._jitter() - 1.0))
        due = self._settling.due
        return delay if due is None else min(delay, max(due - time.monotonic(), 0.01))

    async def _wait(self, delay: float) -> None:
        """For the poll's time, the source's hint or somebody else's, whichever comes first."""
        waits: list[asyncio.Future[object]] = [asyncio.ensure_future(self._hinted.wait())]
        if self._follows_hints:
            waits.append(asyncio.ensure_future(self.source.wait_for_change()))
        try:
            await asyncio.wait(waits, timeout=delay, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        self._hinted.clear()


class Settling:
    """Keeps back versions that may still be on their way. Owns since when each has been as it is. No clock of its own.

    `due`: when, by the monotonic clock, the next of those kept back may be whole; None: none is.
    """

    def __init__(self, seconds: float) -> None:
        self.due: float | None = None
        self._seconds = seconds
        self._seen: dict[tuple[str, int], tuple[str, float]] = {}
        self._passed: dict[tuple[str, int], VersionRef] = {}
        self._is_first = True

    def settle(self, listing: Listing, now: float) -> Listing:
        """The listing with only what may be taken; of a version whose content is changing, as it was before.

        The first listing is taken as it is: whoever starts a server means what is there, and what was caught half copied fails with
        its reason and is taken when it has changed and rested.
        """
        self.due = None
        seen: dict[tuple[str, int], tuple[str, float]] = {}
        passed: dict[tuple[str, int], VersionRef] = {}
        models: dict[str, ModelRef] = {}
        errors = dict(listing.errors)
        for name, model in listing.models.items():
            versions: dict[int, VersionRef] = {}
            for number, ref in model.versions.items():
                key = (name, number)
                token, since = self._seen.get(key, ("", now))
                since = since if token == ref.token else now
                seen[key] = (ref.token, since)
                if self._is_first or ref.is_complete or now - since >= self._seconds:
                    versions[number] = passed[key] = ref
                else:
                    due = since + self._seconds
                    self.due = due if self.due is None else min(self.due, due)
                    if key in self._passed:
                        versions[number] = passed[key] = self._passed[key]
            if versions or not model.versions:
                models[name] = dataclasses.replace(model, versions=versions)
            else:
                errors[name] = f"model '{name}': its files are still changing, or too new; they are taken when they have rested"
        self._seen, self._passed, self._is_first = seen, passed, False
        return Listing(models, errors)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__
