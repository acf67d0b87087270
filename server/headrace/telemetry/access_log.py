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
from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple, TextIO

from headrace.requests import Caller
from headrace.telemetry.log import get_logger

log = get_logger(__name__)

FIELDS = (
    "ts", "id", "model", "version", "code", "rows", "batch", "batch_rows", "queue", "compute", "total", "peer", "user_agent",
)  # fmt: skip
"""In every line; docs/access-log.md has their meaning. `trace_id`, `span_id` and `error` follow where there is one."""

_MAX_ERROR = 300
"""Characters of an error's text: some quote what the client sent."""


class Entry(NamedTuple):
    """One request that has ended. Seconds for `queue`, `compute` and `total`; `batch` and `batch_rows` are 0 where it never ran."""

    id: str
    model: str
    version: int
    code: str
    rows: int
    batch: int
    batch_rows: int
    queue: float
    compute: float
    total: float
    caller: Caller | None = None
    error: str = ""


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
        self._pending: deque[tuple[float, Entry]] = deque()
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

    def record(self, entry: Entry) -> None:
        """Note one settled request. Never blocks and never raises; when the stream does not keep up the record is dropped."""
        if len(self._pending) >= self._max_pending:
            self.dropped += 1
            return
        # append and popleft of a deque are atomic, so that neither side needs a lock.
        self._pending.append((self._wall_clock(), entry))

    def flush(self) -> int:
        """Write all that is pending now, from the writer's thread or after it has ended. Returns how many records."""
        lines = [_format(*self._pending.popleft()) for _ in range(len(self._pending))]
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


def _format(ts: float, entry: Entry) -> str:
    id, model, version, code, rows, batch, batch_rows, queue, compute, total, caller, error = entry
    when = datetime.fromtimestamp(ts, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    seconds = (round(queue, 6), round(compute, 6), round(total, 6))
    peer, user_agent, trace = (caller.peer, caller.user_agent, caller.trace) if caller is not None else ("", "", None)
    values = (when, id, model, version, code, rows, batch, batch_rows, *seconds, peer, user_agent)
    line: dict[str, object] = dict(zip(FIELDS, values, strict=True))
    if trace is not None:
        line["trace_id"] = f"{trace.trace_id:032x}"
        if trace.is_sampled:
            line["span_id"] = f"{trace.span_id:016x}"
    if error:
        line["error"] = error[:_MAX_ERROR]
    return _encode(line) + "\n"
