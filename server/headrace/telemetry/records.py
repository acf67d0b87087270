"""What is kept of each request that ends, for the access log and for tracing. There is none of it where both are off.

Batches are noted after their answers have left, so that a client never waits for it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

from headrace.errors import HeadraceError
from headrace.requests import Answer, Caller, InferRequest, Reply, Ticket
from headrace.telemetry.access_log import AccessLog, Entry
from headrace.telemetry.counters import BatchTimes
from headrace.telemetry.exemplars import Exemplars
from headrace.telemetry.trace_context import TraceContext, decode_traceparent, join_tracestate
from headrace.telemetry.tracing import MOST_TEXT, Owner, TracedRequest, Tracing

Metadata = Sequence[tuple[str, str | bytes]]


class RequestRecords:
    """One server's. Owns nothing; any thread."""

    def __init__(self, access_log: AccessLog | None, tracing: Tracing | None) -> None:
        self._access_log = access_log
        self._tracing = tracing

    def __repr__(self) -> str:
        return f"RequestRecords({self._access_log!r}, {self._tracing!r})"

    def of_version(self, model: str, version: int, exemplars: Exemplars) -> VersionRecords:
        return VersionRecords(self._access_log, self._tracing, model, version, exemplars)

    def identify(self, metadata: Metadata, peer: str) -> Caller | None:
        """Who makes a call, and whether it is traced, None where neither matters. Called once for each request, since that is decided
        by chance. Never raises."""
        headers = dict(metadata)  # C code, and nearly all requests end here
        parent = headers.get("traceparent")
        if parent is None:
            trace = self._tracing.sampler.begin() if self._tracing is not None else None
        elif [name for name, _ in metadata].count("traceparent") > 1:
            trace = self._begin("", "")  # of several none can be believed
        else:
            trace = self._begin(str(parent), join_tracestate([str(value) for name, value in metadata if name == "tracestate"]))
        if trace is None and self._access_log is None:
            return None
        return Caller(peer, str(headers.get("user-agent", ""))[:MOST_TEXT], trace)

    def _begin(self, parent: str, state: str) -> TraceContext | None:
        if self._tracing is not None:
            return self._tracing.sampler.begin(parent, state)
        # Nothing is traced here, but whoever looks for a trace finds its requests in the log.
        decoded = decode_traceparent(parent)
        return None if decoded is None else TraceContext(decoded[0], parent_id=decoded[1])

    def refused(self, request: InferRequest | None, reply: Reply, error: HeadraceError, arrived: float) -> None:
        """It was no version's yet; `request` is None where it could not be decoded. Never blocks and never raises."""
        id, model, version = (request.id[:MOST_TEXT], request.model[:MOST_TEXT], request.version) if request is not None else ("", "", "")
        caller = reply.caller
        if self._access_log is not None:
            self._access_log.record(
                Entry(id, model, 0, error.code.value, 0, 0, 0, 0.0, 0.0, time.monotonic() - arrived, caller, str(error)[:MOST_TEXT])
            )  # fmt: skip
        if self._tracing is not None and caller is not None and caller.trace is not None and caller.trace.is_sampled:
            traced = TracedRequest(caller.trace, id, 0, arrived, 0.0, caller.peer, caller.user_agent, error.code.value)
            self._tracing.refused(traced, model, version)


class VersionRecords:
    """What one version's batcher and workers report. Owns the numbers of its batches; any thread."""

    def __init__(self, access_log: AccessLog | None, tracing: Tracing | None, model: str, version: int, exemplars: Exemplars) -> None:
        self._access_log = access_log
        self._tracing = tracing
        self._model = model
        self._version = version
        self._owner = Owner(model, str(version), exemplars)
        self._batches = itertools.count(1)  # a step of it is one C call, hence no lock

    def __repr__(self) -> str:
        return f"VersionRecords({self._model}:{self._version})"

    def ran(self, tickets: Sequence[Ticket], answers: Sequence[Answer], taken: float, times: BatchTimes | None) -> None:
        """A batch that was `taken` out of the queue, and whose answers have left; `times` is None where it failed. Never raises."""
        batch = next(self._batches)
        if self._access_log is not None:
            done = times.done if times is not None else time.monotonic()
            rows = sum([ticket.rows for ticket in tickets])
            for ticket, answer in zip(tickets, answers, strict=True):
                self._log(self._access_log, ticket, answer, batch, rows, taken - ticket.arrived, done - taken, done)
        if self._tracing is not None:
            self._tracing.ran(tickets, answers, taken, times, batch, self._owner)

    def dropped(self, tickets: Sequence[Ticket], error: HeadraceError) -> None:
        """These left the queue unrun: cancelled, expired, or cut off by a shutdown. Never raises."""
        if self._access_log is not None:
            now = time.monotonic()
            for ticket in tickets:
                self._log(self._access_log, ticket, error, 0, 0, now - ticket.arrived, 0.0, now)
        if self._tracing is not None:
            self._tracing.dropped(tickets, error, self._owner)

    def _log(
        self, to: AccessLog, ticket: Ticket, answer: Answer, batch: int, batch_rows: int, queue: float, compute: float, now: float
    ) -> None:
        code, error = (answer.code.value, str(answer)[:MOST_TEXT]) if isinstance(answer, HeadraceError) else ("OK", "")
        id, total, caller = ticket.id[:MOST_TEXT], now - ticket.arrived, ticket.reply.caller
        to.record(
            Entry(id, self._model, self._version, code, ticket.rows, batch, batch_rows, queue, compute, total, caller, error)
        )  # fmt: skip
