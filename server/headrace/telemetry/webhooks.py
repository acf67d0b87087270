"""Tell other systems: each alert, and what a rollout decided, is sent to every configured URL as a CloudEvent.

Each URL has a line of its own, in which one event after the other is delivered: "over" never comes before "raised", and a receiver that
hangs holds up no other. An event is tried again, with the same id, while there is hope: after 429, 502, 503, 504 or without any answer
until it is too old; after another 5xx a few times, for the receiver has seen it and may fail at it for ever. Everything else than 2xx
is final: redirects too, since they would have this server ask where nobody has configured it to.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from enum import Enum
from urllib.parse import urlsplit

import aiohttp
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace import __version__
from headrace.drift.verdict import Alert
from headrace.lifecycle.events import Event
from headrace.lifecycle.tasks import Tasks
from headrace.telemetry.cloud_events import CONTENT_TYPE, SENT_KINDS, CloudEvent, alert_event, lifecycle_event, sign, signing_key
from headrace.telemetry.log import get_logger

log = get_logger(__name__)

NOT_THERE = frozenset({429, 502, 503, 504})
STOP_SECONDS = 1.0
"""For what still waits when the server stops; each event is tried once more at most."""
OUTCOMES = ("delivered", "refused", "failed", "expired", "overflow", "shutdown")
"""refused: the receiver's answer was final. failed: 5xx again and again. The others were given up: too old, too many, too late."""


@dataclass(frozen=True, slots=True)
class DeliveryPolicy:
    """Times in seconds. Waits double from `first_wait` to `longest_wait`, each shortened by chance to as little as half, so that many
    servers that lost the same receiver do not come back together."""

    first_wait: float = 1.0
    longest_wait: float = 60.0
    longest_retry_after: float = 600.0
    most_refusals: int = 8
    oldest: float = 3600.0
    """Older news triggers a pipeline that should by then ask the server itself."""
    waiting: int = 1000
    """From 2."""
    timeout: float = 10.0

    def wait(self, attempt: int, retry_after: float, chance: float) -> float:
        """Before the attempt after the `attempt`-th; `chance` is from 0 to 1."""
        backoff = min(self.first_wait * 2.0 ** min(attempt - 1, 30), self.longest_wait) * (0.5 + 0.5 * chance)
        return max(backoff, min(retry_after, self.longest_retry_after))


class Answer(Enum):
    DELIVERED = "delivered"
    FINAL = "refused"
    FAILED = "failed"
    NOT_THERE = "not there"


def judge_status(status: int) -> Answer:
    if 200 <= status < 300:
        return Answer.DELIVERED
    if status in NOT_THERE:
        return Answer.NOT_THERE
    return Answer.FAILED if status >= 500 else Answer.FINAL


def parse_retry_after(value: str, now: float) -> float:
    """Seconds (RFC 9110, 10.2.3: a number or a date); 0 for none and for nonsense."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, IndexError):
        return 0.0
    return max((date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp() - now, 0.0)


class Webhooks:
    """Owns a line of events for each URL. Event loop only; `start` and `stop` once each, `alerts` and `lifecycle` at any time between."""

    def __init__(self, urls: Sequence[str], secret: str, source: str, policy: DeliveryPolicy | None = None) -> None:
        self._source = source
        self._key = signing_key(secret) if secret else b""
        self._policy = policy or DeliveryPolicy()
        self.outcomes: Counter[str] = Counter()
        self._lines = [_Line(url, self._key, self._policy, self.outcomes) for url in urls]
        self._tasks = Tasks()
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"Webhooks({len(self._lines)} receivers, {self.pending} pending, {dict(self.outcomes)})"

    @property
    def pending(self) -> int:
        return sum([line.pending for line in self._lines])

    def start(self) -> None:
        # Cookies of a receiver are nothing that we keep; proxies of the environment are not used.
        self._session = session = aiohttp.ClientSession(
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=self._policy.timeout),
            headers={"Content-Type": CONTENT_TYPE, "User-Agent": f"headrace/{__version__}"},
        )
        for line in self._lines:
            self._tasks.start(line.run(session), f"webhook {line.name}")

    def alerts(self, alerts: Sequence[Alert]) -> None:
        """For DriftMonitors.subscribe."""
        self._send(alert_event(alerts, self._source, str(uuid.uuid4())))

    def lifecycle(self, event: Event) -> None:
        """For EventLog.subscribe; most kinds are of no interest to anybody else."""
        if event.kind in SENT_KINDS:
            self._send(lifecycle_event(event, self._source, str(uuid.uuid4())))

    def _send(self, event: CloudEvent) -> None:
        for line in self._lines:
            line.add(event)

    async def stop(self) -> None:
        """Deliver what can be within STOP_SECONDS; the rest is counted and logged. Without effect when not running."""
        session, self._session = self._session, None
        if session is None:
            return
        for line in self._lines:
            line.stop()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                for line in self._lines:
                    await line.is_done.wait()
        except TimeoutError:
            pass
        await self._tasks.close()
        for line in self._lines:
            line.give_up()
        await session.close()


class _Line:
    """Owns the events that one URL has not had yet, the first of which is being delivered."""

    def __init__(self, url: str, key: bytes, policy: DeliveryPolicy, outcomes: Counter[str]) -> None:
        # Paths and queries of such URLs are often what keeps others from using them.
        parts = urlsplit(url)
        self.name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        self.is_done = asyncio.Event()
        self._url = url
        self._key = key
        self._policy = policy
        self._outcomes = outcomes
        self._waiting: deque[tuple[CloudEvent, float]] = deque()
        self._has_work = asyncio.Event()
        self._stopping = asyncio.Event()
        self._overflowing = False

    @property
    def pending(self) -> int:
        return len(self._waiting)

    def add(self, event: CloudEvent) -> None:
        if len(self._waiting) >= self._policy.waiting:
            # The newest say how things are. The first one stays: it is under way.
            del self._waiting[1]
            self._outcomes["overflow"] += 1
            if not self._overflowing:
                self._overflowing = True
                log.warning("webhook events dropped", receiver=self.name, reason="too many wait", waiting=len(self._waiting))
        else:
            self._overflowing = False
        self._waiting.append((event, time.monotonic()))
        self._has_work.set()

    def stop(self) -> None:
        self._stopping.set()
        self._has_work.set()

    def give_up(self) -> None:
        for event, _ in self._waiting:
            self._end(event, "shutdown", "the server stopped first")
        self._waiting.clear()

    async def run(self, session: aiohttp.ClientSession) -> None:
        try:
            while True:
                if self._waiting:
                    event, since = self._waiting[0]
                    outcome, reason = await self._deliver(session, event, since)
                    self._waiting.popleft()
                    self._end(event, outcome, reason)
                elif self._stopping.is_set():
                    return
                else:
                    self._has_work.clear()
                    await self._has_work.wait()
        finally:
            self.is_done.set()

    async def _deliver(self, session: aiohttp.ClientSession, event: CloudEvent, since: float) -> tuple[str, str]:
        """(outcome, why) once it has ended."""
        policy, attempt, refusals = self._policy, 0, 0
        while True:
            if time.monotonic() - since > policy.oldest:
                return "expired", f"not delivered within {policy.oldest:g} s"
            is_last = self._stopping.is_set()
            attempt += 1
            answer, reason, retry_after = await self._post(session, event)
            refusals += answer is Answer.FAILED
            if answer in (Answer.DELIVERED, Answer.FINAL):
                return answer.value, reason
            if refusals >= policy.most_refusals:
                return "failed", f"{reason}, {refusals} times"
            if is_last:
                return "shutdown", reason
            log.info("webhook delivery put off", receiver=self.name, type=event.kind, id=event.id, attempt=attempt, reason=reason)
            try:
                async with asyncio.timeout(policy.wait(attempt, retry_after, random.random())):
                    await self._stopping.wait()
            except TimeoutError:
                pass

    async def _post(self, session: aiohttp.ClientSession, event: CloudEvent) -> tuple[Answer, str, float]:
        """One attempt: (what the answer means, in words, Retry-After)."""
        headers = {"webhook-id": event.id}
        if self._key:
            now = int(time.time())
            headers |= {"webhook-timestamp": str(now), "webhook-signature": sign(self._key, event.id, now, event.body)}
        try:
            async with session.post(self._url, data=event.body, headers=headers, allow_redirects=False) as response:
                retry_after = parse_retry_after(response.headers.get("Retry-After", ""), time.time())
                return judge_status(response.status), f"status {response.status}", retry_after
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            return Answer.NOT_THERE, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__, 0.0

    def _end(self, event: CloudEvent, outcome: str, reason: str) -> None:
        self._outcomes[outcome] += 1
        say = log.info if outcome == "delivered" else log.error
        say("webhook delivered" if outcome == "delivered" else "webhook not delivered", receiver=self.name, type=event.kind, id=event.id,
            outcome=outcome, reason=reason)  # fmt: skip


class WebhookCollector(Collector):
    """Owns nothing."""

    def __init__(self, webhooks: Webhooks) -> None:
        self._webhooks = webhooks

    def collect(self) -> Iterable[Metric]:
        deliveries = CounterMetricFamily("headrace_webhook_deliveries", "Events by how their delivery ended.", labels=["outcome"])
        for outcome in OUTCOMES:
            deliveries.add_metric([outcome], self._webhooks.outcomes[outcome])
        return deliveries, GaugeMetricFamily("headrace_webhook_pending", "Events that wait for a receiver.", value=self._webhooks.pending)
