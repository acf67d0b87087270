from __future__ import annotations

import io
import json
import threading

import pytest
from headrace.requests import Caller
from headrace.telemetry.access_log import FIELDS, AccessLog, Entry
from headrace.telemetry.trace_context import TraceContext

NEVER = 1e6


class WatchedStream(io.StringIO):
    """Tells when something was written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()
        self.writes = 0

    def write(self, text: str) -> int:
        self.writes += 1
        count = super().write(text)
        self.written.set()
        return count


ENTRY = Entry("7", "mlp", 2, "OK", 1, 3, 8, 0.0001234567, 0.002, 0.0025, Caller("ipv4:127.0.0.1:4242", "grpc-python/1.80"))


def record(log: AccessLog, id: str = "7", caller: Caller | None = ENTRY.caller, **changes: str) -> None:
    log.record(ENTRY._replace(id=id, caller=caller, **changes))  # type: ignore[arg-type]


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_record_has_all_fields_and_the_time_of_the_answer() -> None:
    stream = io.StringIO()
    log = AccessLog(stream, wall_clock=lambda: 1_700_000_000.5)
    record(log)
    log.flush()
    (line,) = lines(stream)
    assert tuple(line) == FIELDS
    assert list(line.values()) == [
        "2023-11-14T22:13:20.500Z", "7", "mlp", 2, "OK", 1, 3, 8, 0.000123, 0.002, 0.0025, "ipv4:127.0.0.1:4242", "grpc-python/1.80",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("trace", "expected"),
    [
        (TraceContext(0xABC, 0xDEF, 1), {"trace_id": f"{0xABC:032x}", "span_id": f"{0xDEF:016x}"}),
        (TraceContext(0xABC, parent_id=1), {"trace_id": f"{0xABC:032x}"}),  # its caller's, and not sampled
        (None, {}),
    ],
)
def test_a_record_names_its_trace_where_there_is_one(trace: TraceContext | None, expected: dict[str, str]) -> None:
    stream = io.StringIO()
    log = AccessLog(stream)
    record(log, caller=Caller("unix:", "", trace))
    log.flush()
    (line,) = lines(stream)
    assert {key: value for key, value in line.items() if key not in FIELDS} == expected


def test_a_failed_request_says_why_at_bounded_length() -> None:
    stream = io.StringIO()
    log = AccessLog(stream)
    record(log, code="NOT_FOUND", error="unknown model " + "x" * 10_000)
    log.flush()
    (line,) = lines(stream)
    assert str(line["error"]).startswith("unknown model xx")
    assert len(str(line["error"])) == 300


def test_many_records_are_one_write_in_their_order() -> None:
    stream = WatchedStream()
    log = AccessLog(stream)
    for number in range(100):
        record(log, id=str(number))
    assert stream.writes == 0
    assert log.flush() == 100
    assert stream.writes == 1
    assert [line["id"] for line in lines(stream)] == [str(number) for number in range(100)]


def test_nothing_pending_writes_nothing() -> None:
    stream = WatchedStream()
    assert AccessLog(stream).flush() == 0
    assert stream.writes == 0


def test_ids_of_clients_cannot_break_a_line() -> None:
    stream = io.StringIO()
    log = AccessLog(stream)
    record(log, id='"}\n{"id":"forged', caller=Caller("unix:é"))
    log.flush()
    (line,) = lines(stream)
    assert (line["id"], line["peer"]) == ('"}\n{"id":"forged', "unix:é")


def test_a_stream_that_does_not_keep_up_loses_records_not_memory() -> None:
    stream = io.StringIO()
    log = AccessLog(stream, max_pending=3)
    for number in range(5):
        record(log, id=str(number))
    assert log.dropped == 2
    log.flush()
    record(log, id="later")
    log.flush()
    assert [line["id"] for line in lines(stream)] == ["0", "1", "2", "later"]


def test_the_thread_writes_by_itself() -> None:
    stream = WatchedStream()
    log = AccessLog(stream, interval=0.001)
    log.start()
    record(log)
    assert stream.written.wait(10)
    log.stop()
    assert len(lines(stream)) == 1


def test_stop_writes_what_is_pending_and_ends_the_thread() -> None:
    stream = WatchedStream()
    log = AccessLog(stream, interval=NEVER)
    log.start()
    record(log)
    log.stop()
    assert len(lines(stream)) == 1
    assert "access-log" not in [thread.name for thread in threading.enumerate()]


def test_stop_without_start_writes_too() -> None:
    stream = io.StringIO()
    log = AccessLog(stream)
    record(log)
    log.stop()
    assert len(lines(stream)) == 1


@pytest.mark.parametrize("error", [OSError("no space left"), ValueError("I/O operation on closed file")])
def test_a_stream_that_fails_ends_neither_the_thread_nor_stop(error: Exception) -> None:
    class Broken(WatchedStream):
        def write(self, text: str) -> int:
            if not self.written.is_set():
                self.written.set()
                raise error
            return super().write(text)

    stream = Broken()
    log = AccessLog(stream, interval=0.001)
    log.start()
    record(log, id="lost")
    assert stream.written.wait(10)
    record(log, id="kept")
    log.stop()
    assert [line["id"] for line in lines(stream)] == ["kept"]
