"""One record per request, for whoever wants to know what was asked and what came of it. Off unless configured.

Where it is off there is no object: the hot path asks `if access_log is not None`. Where it is on, `record` puts a tuple into
memory and a thread of its own formats and writes whole blocks, since formatting a line costs as much as a small request and a
blocking write to a full pipe would hold up every model.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TextIO

from headrace.errors import HeadraceError
from headrace.requests import Answer, Ticket
from headrace.telemetry.log import get_logger

log = get_logger(__name__)

FIELDS = ("ts", "id", "model", "version", "code", "rows", "batch_rows", "queue", "compute", "total", "peer")
"""Seconds for `queue`, `compute` and `total`. `batch_rows` is what the request ran together with, 0 where it never ran."""

_Record = tuple[float, str, str, int, str, int, int, float, float, float, str]

_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


class AccessLog:
    """Owns the records not yet written and the thread that writes them. `record`: any thread; `start` and `stop`: once each."""

    def __init__(
        self, stream: TextIO, *, interval: float = 0.5, max_pending: int = 65536, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._stream = stream
        self._interval = interval
        self._max_pending = max_pending
        self._wall_clock = wall_clock
        self._pending: deque[_Record] = deque()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._reported = 0
        self.dropped = 0
        """Records lost because the stream took no more. Counted without a lock: two threads may count one loss once."""

    def __repr__(self) -> str:
        return f"AccessLog(pending={len(self._pending)}, dropped={self.dropped})"

    def start(self) -> None:
        self._thread = threading.Thread(target=self._write_regularly, name="access-log", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write what is pending and end the thread. Blocks until the stream took it."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        else:
            self._flush_or_report()

    def record(
        self,
        *,
        id: str,
        model: str,
        version: int,
        code: str,
        rows: int,
        batch_rows: int,
        queue: float,
        compute: float,
        total: float,
        peer: str,
    ) -> None:
        """Note one settled request. Never blocks and never raises; when the stream does not keep up the record is dropped."""
        if len(self._pending) >= self._max_pending:
            self.dropped += 1
            return
        # append and popleft of a deque are atomic, so that neither side needs a lock.
        self._pending.append((self._wall_clock(), id, model, version, code, rows, batch_rows, queue, compute, total, peer))

    def flush(self) -> int:
        """Write all that is pending now, from the writer's thread or after it has ended. Returns how many records."""
        lines = [_format(self._pending.popleft()) for _ in range(len(self._pending))]
        if lines:
            self._stream.write("".join(lines))
            self._stream.flush()
        return len(lines)

    def _write_regularly(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._stopping.wait(self._interval)
            self._flush_or_report()

    def _flush_or_report(self) -> None:
        try:
            self.flush()
        except (OSError, ValueError) as error:
            # A full disk, a broken pipe or a closed file must end neither the thread nor the server; what was taken is lost.
            log.error("access log not written", reason=str(error))
        if self.dropped != self._reported:
            log.warning("access log records dropped", records=self.dropped - self._reported)
            self._reported = self.dropped


class VersionAccessLog:
    """The access log from the point of view of one model version: what its batcher and its workers report."""

    def __init__(self, access_log: AccessLog, model: str, version: int) -> None:
        self._access_log = access_log
        self._model = model
        self._version = version

    def ran(self, tickets: Sequence[Ticket], answers: Sequence[Answer], taken: float) -> None:
        """A batch that began at `taken` has just ended with these answers."""
        now = time.monotonic()
        batch_rows = sum(ticket.rows for ticket in tickets)
        for ticket, answer in zip(tickets, answers, strict=True):
            self._record(ticket, answer, batch_rows, taken - ticket.arrived, now - taken, now)

    def dropped(self, tickets: Sequence[Ticket], error: HeadraceError) -> None:
        """These left the queue unrun: cancelled, expired, or cut off by a shutdown."""
        now = time.monotonic()
        for ticket in tickets:
            self._record(ticket, error, 0, now - ticket.arrived, 0.0, now)

    def _record(self, ticket: Ticket, answer: Answer, batch_rows: int, queue: float, compute: float, now: float) -> None:
        self._access_log.record(
            id=ticket.id,
            model=self._model,
            version=self._version,
            code=answer.code.value if isinstance(answer, HeadraceError) else "OK",
            rows=ticket.rows,
            batch_rows=batch_rows,
            queue=queue,
            compute=compute,
            total=now - ticket.arrived,
            peer=ticket.reply.peer,
        )


def _format(record: _Record) -> str:
    ts, request_id, model, version, code, rows, batch_rows, queue, compute, total, peer = record
    when = datetime.fromtimestamp(ts, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    seconds = (round(queue, 6), round(compute, 6), round(total, 6))
    values = (when, request_id, model, version, code, rows, batch_rows, *seconds, peer)
    return _encode(dict(zip(FIELDS, values, strict=True))) + "\n"
