"""Which requests are traced, and what of them is handed to whoever makes spans. Off unless configured; knows nothing of OpenTelemetry.

Theory of operation. Whether a request is traced is decided when it comes (head sampling): as its caller has decided, else by chance,
within a rate. The hot path then only keeps the times that it takes anyway; once the answers of a batch have left, what is known of
its traced requests goes into a bounded queue, and a thread of its own makes spans of it and sends them. A collector that does not
keep up costs traces, which are counted, and nothing else.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from headrace.errors import HeadraceError
from headrace.requests import Answer, Ticket
from headrace.telemetry.counters import BatchTimes, Stage
from headrace.telemetry.exemplars import Exemplar, Exemplars
from headrace.telemetry.log import get_logger
from headrace.telemetry.trace_context import SAMPLED, TraceContext, decode_traceparent

log = get_logger(__name__)

MOST_TEXT = 1000
"""Characters that are kept of what comes from clients: many requests wait at a time, in the log's line too."""
MAX_PENDING = 1024
"""Traced requests that wait to be exported, some kilobytes each as spans."""
MAX_TOGETHER = 128
"""Traced requests of one export: some 800 spans, well below the 4 MiB that collectors take of a message."""
GATHER = 0.2
"""Seconds that the thread waits for more to export together."""
FLUSH_WITHIN = 2.0
"""Seconds that a stopping server gives to what is still to be sent."""
END_WITHIN = 1.0
"""Seconds more in which the thread may come back from an export that was cut short."""


class TracedRequest(NamedTuple):
    """What is known of one request that ended. Times are time.monotonic(); `enqueued` is 0 where it was refused before it was queued.
    Copies, since a ticket holds its whole message."""

    trace: TraceContext
    id: str
    rows: int
    arrived: float
    enqueued: float
    peer: str
    user_agent: str
    code: str


class Ended(NamedTuple):
    """Traced requests that ended together. `model` and `version` as the request named them where it was refused.

    `taken` is 0 where they never ran, `times` None where the batch failed; `left`: when the answers had left. `requests` and `rows`
    are of the whole batch, numbered `batch`. `wall_offset`: what makes the wall clock's time of a monotonic one.
    """

    traced: Sequence[TracedRequest]
    model: str
    version: str
    taken: float
    left: float
    times: BatchTimes | None
    batch: int
    requests: int
    rows: int
    wall_offset: float
    exemplars: Exemplars | None


class SpanExporter(Protocol):
    def export(self, ended: Sequence[Ended]) -> bool:
        """Make spans and send them, on the tracing thread; may block for seconds. False when they are lost."""

    def close(self) -> None:
        """From any thread: no more exports. One that is under way ends early."""


@dataclass(frozen=True, slots=True)
class TracingStats:
    """Requests whose spans were `exported`; that were not traced because of the rate; that were lost because the queue was full, or
    because they could not be sent."""

    exported: int
    over_rate: int
    queue_full: int
    not_sent: int


class Sampler:
    """Decides which requests are traced; owns the allowance of the rate, a token bucket of one second's worth. Any thread."""

    def __init__(self, fraction: float, max_per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._fraction = fraction
        self._rate = max_per_second
        self._clock = clock
        self._random = random.Random()  # its own, so that a seeded application does not get the same ids again
        self._lock = threading.Lock()
        self._allowance = max(max_per_second, 1.0)
        self._filled_at = clock()
        self.over_rate = 0

    def __repr__(self) -> str:
        return f"Sampler(fraction={self._fraction}, max_per_second={self._rate}, over_rate={self.over_rate})"

    def begin(self, traceparent: str = "", tracestate: str = "") -> TraceContext | None:
        """The place in a trace of a request that came with these headers. None: in no trace at all."""
        parent = decode_traceparent(traceparent) if traceparent else None
        if parent is None:
            if self._random.random() >= self._fraction or not self._spend():
                return None
            return TraceContext(self._random.getrandbits(128) or 1, self._random.getrandbits(64) or 1)
        trace_id, parent_id, flags = parent
        if not flags & SAMPLED or not self._spend():
            return TraceContext(trace_id, 0, parent_id)
        return TraceContext(trace_id, self._random.getrandbits(64) or 1, parent_id, tracestate)

    def _spend(self) -> bool:
        with self._lock:
            now = self._clock()
            self._allowance = min(self._allowance + (now - self._filled_at) * self._rate, max(self._rate, 1.0))
            self._filled_at = now
            if self._allowance < 1.0:
                self.over_rate += 1
                return False
            self._allowance -= 1.0
            return True


class Tracing:
    """Owns the traced requests that have ended and are not exported, and the thread that exports them. `start`, `stop`: once each."""

    def __init__(
        self, sampler: Sampler, exporter: SpanExporter, *, max_pending: int = MAX_PENDING, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self.sampler = sampler
        self._exporter = exporter
        self._max_pending = max_pending
        self._wall_clock = wall_clock
        self._condition = threading.Condition()
        self._pending: deque[Ended] = deque()
        self._waiting = 0
        self._is_stopping = False
        self._thread: threading.Thread | None = None
        self._is_failing = False
        self._exported = self._queue_full = self._not_sent = 0

    def __repr__(self) -> str:
        return f"Tracing({self._waiting} requests to export, {self.stats()})"

    def stats(self) -> TracingStats:
        return TracingStats(self._exported, self.sampler.over_rate, self._queue_full, self._not_sent)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._export_all, name="tracing", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Send what is pending, within FLUSH_WITHIN, and end the thread. Blocks; what could not be sent by then is lost and counted."""
        with self._condition:
            self._is_stopping = True
            self._condition.notify()
        if self._thread is not None:
            self._thread.join(FLUSH_WITHIN)
        self._exporter.close()
        if self._thread is not None:
            self._thread.join(END_WITHIN)
        with self._condition:
            left, self._waiting = self._waiting, 0
            self._pending.clear()
            self._not_sent += left
        if left:
            log.warning("traces lost", requests=left, reason="the collector did not take them before the server stopped")

    # -- what ended: any thread ----------------------------------------------------------------------------------------

    def ran(
        self, tickets: Sequence[Ticket], answers: Sequence[Answer], taken: float, times: BatchTimes | None, batch: int, owner: Owner
    ) -> None:
        """A batch whose answers have left. Never blocks for long and never raises."""
        traced = [one for ticket, answer in zip(tickets, answers, strict=True) if (one := _traced(ticket, answer)) is not None]
        if traced:
            self._put(traced, owner, taken=taken, times=times, batch=batch, tickets=tickets)

    def dropped(self, tickets: Sequence[Ticket], error: HeadraceError, owner: Owner) -> None:
        """These left the queue unrun."""
        traced = [one for ticket in tickets if (one := _traced(ticket, error)) is not None]
        if traced:
            self._put(traced, owner)

    def refused(self, request: TracedRequest, model: str, version: str) -> None:
        """It was no ticket of any version yet."""
        self._put([request], Owner(model, version, None))

    def _put(
        self,
        traced: Sequence[TracedRequest],
        owner: Owner,
        *,
        taken: float = 0.0,
        times: BatchTimes | None = None,
        batch: int = 0,
        tickets: Sequence[Ticket] = (),
    ) -> None:
        now = time.monotonic()
        rows = sum([ticket.rows for ticket in tickets])
        offset = self._wall_clock() - now
        ended = Ended(traced, owner.model, owner.version, taken, now, times, batch, len(tickets), rows, offset, owner.exemplars)
        with self._condition:
            if self._is_stopping or self._waiting + len(traced) > self._max_pending:
                self._queue_full += len(traced)
                return
            self._pending.append(ended)
            self._waiting += len(traced)
            if len(self._pending) == 1:
                self._condition.notify()

    # -- the tracing thread --------------------------------------------------------------------------------------------

    def _export_all(self) -> None:
        while True:
            with self._condition:
                while not self._pending and not self._is_stopping:
                    self._condition.wait()
                if not self._pending:
                    return
                if not self._is_stopping:
                    self._condition.wait(GATHER)  # so that one export has many
                together = self._take()
            self._export(together)

    def _take(self) -> list[Ended]:
        """Under the lock. At least one, however many requests it has."""
        together: list[Ended] = []
        count = 0
        while self._pending and (not together or count + len(self._pending[0].traced) <= MAX_TOGETHER):
            ended = self._pending.popleft()
            count += len(ended.traced)
            together.append(ended)
        return together

    def _export(self, together: Sequence[Ended]) -> None:
        count = sum([len(ended.traced) for ended in together])
        reason = "the exporter's own message says why"
        try:
            is_sent = self._exporter.export(together)
        except Exception as error:
            # A bug, or a disk that is full: the thread lives on, or every later trace would be lost.
            is_sent, reason = False, f"{type(error).__name__}: {error}"
        if is_sent:
            for ended in together:
                _observe(ended)
        with self._condition:
            # 0 where `stop` has given up on them, and counted them.
            count = min(count, self._waiting)
            self._waiting -= count
            if is_sent:
                self._exported += count
            else:
                self._not_sent += count
        if is_sent == self._is_failing:
            self._is_failing = not is_sent
            if is_sent:
                log.info("traces sent again", lost=self._not_sent)
            else:
                log.warning("traces not sent", requests=count, reason=reason)


class Owner(NamedTuple):
    """The version that requests ended at."""

    model: str
    version: str
    exemplars: Exemplars | None


def _traced(ticket: Ticket, answer: Answer) -> TracedRequest | None:
    caller = ticket.reply.caller
    if caller is None or caller.trace is None or not caller.trace.is_sampled:
        return None
    code = answer.code.value if isinstance(answer, HeadraceError) else "OK"
    id, agent = ticket.id[:MOST_TEXT], caller.user_agent
    return TracedRequest(caller.trace, id, ticket.rows, ticket.arrived, ticket.enqueued, caller.peer, agent, code)


def _observe(ended: Ended) -> None:
    """The durations of those that were counted, as CounterShard.record_batch counts them: each is charged the whole batch's."""
    times, exemplars = ended.times, ended.exemplars
    if times is None or exemplars is None:
        return
    when = ended.left + ended.wall_offset
    for request in ended.traced:
        seconds = {
            Stage.REQUEST: times.done - request.arrived,
            Stage.QUEUE: times.taken - request.arrived,
            Stage.COMPUTE_INPUT: times.input_done - times.taken,
            Stage.COMPUTE: times.output_start - times.input_done,
            Stage.COMPUTE_OUTPUT: times.done - times.output_start,
        }
        for stage, duration in seconds.items():
            exemplars.observe(stage, Exemplar(request.trace.trace_id, duration, when))
