from __future__ import annotations

import io
import json
import random
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from headrace.errors import QueueTimeout
from headrace.requests import Caller, Reply, Ticket
from headrace.telemetry.access_log import AccessLog
from headrace.telemetry.counters import DURATION_EDGES, BatchTimes, Stage
from headrace.telemetry.exemplars import Exemplars
from headrace.telemetry.otel import open_exporter
from headrace.telemetry.records import RequestRecords, VersionRecords
from headrace.telemetry.trace_context import TraceContext
from headrace.telemetry.tracing import MAX_TOGETHER, Ended, Sampler, TracedRequest, Tracing
from headrace.testing import CollectingOutlet

PARENT = f"00-{'a' * 32}-{'b' * 16}"


class Exported:
    """An exporter that keeps what it gets, and blocks, fails or raises when told to."""

    def __init__(self) -> None:
        self.ended: list[Ended] = []
        self.calls: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.outcome: bool | Exception = True

    def export(self, ended: Sequence[Ended]) -> bool:
        self.entered.set()
        self.gate.wait(20)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        self.calls.append(sum(len(one.traced) for one in ended))
        self.ended += ended
        return self.outcome

    def close(self) -> None:
        self.gate.set()


def sampler(fraction: float = 0.0, rate: float = 1e9, now: list[float] | None = None) -> Sampler:
    times = now if now is not None else [0.0]
    return Sampler(fraction, rate, lambda: times[0])


def ticket(is_sampled: bool = True, rows: int = 1, arrived: float = 1.0) -> Ticket:
    reply = Reply(CollectingOutlet())
    reply.caller = Caller("unix:", "test", TraceContext(7, 9 if is_sampled else 0, 8))
    made = Ticket(reply, rows, None, [], (0,), id="r", arrived=arrived)
    made.enqueued = arrived + 0.001
    return made


def times(tickets: Sequence[Ticket]) -> BatchTimes:
    arrived = [one.arrived for one in tickets]
    return BatchTimes(rows=4, padded_rows=8, arrived=arrived, taken=1.01, input_done=1.02, output_start=1.05, done=1.06)


def records(tracing: Tracing, exemplars: Exemplars | None = None) -> VersionRecords:
    return RequestRecords(None, tracing).of_version("m", 3, exemplars or Exemplars(len(Stage), DURATION_EDGES))


# -- who is traced -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_a_caller_that_has_decided_is_followed(fraction: float) -> None:
    sampled = sampler(fraction).begin(f"{PARENT}-01", "v=1")
    assert sampled is not None
    assert (sampled.trace_id, sampled.parent_id, sampled.state) == (int("a" * 32, 16), int("b" * 16, 16), "v=1")
    assert sampled.is_sampled
    other = sampler(fraction).begin(f"{PARENT}-00")
    assert other is not None
    assert (other.trace_id, other.is_sampled) == (int("a" * 32, 16), False)


def test_without_a_caller_that_has_decided_the_fraction_does() -> None:
    assert sampler(0.0).begin() is None
    begun = sampler(1.0).begin("nonsense", "v=1")
    assert begun is not None
    assert (begun.parent_id, begun.state, begun.is_sampled) == (0, "", True)


def test_a_fraction_is_met() -> None:
    some = sampler(0.1)
    some._random = random.Random(5)
    count = sum(some.begin() is not None for _ in range(20_000))
    assert 1850 < count < 2150  # 3.5 standard deviations


def test_the_rate_bounds_also_those_whose_callers_trace_them_and_recovers() -> None:
    now = [0.0]
    bounded = sampler(0.0, rate=2.0, now=now)
    begun = [bounded.begin(f"{PARENT}-01") for _ in range(5)]
    assert [one is not None and one.is_sampled for one in begun] == [True, True, False, False, False]
    assert bounded.over_rate == 3
    now[0] = 0.5
    again = [bounded.begin(f"{PARENT}-01") for _ in range(2)]
    assert [one is not None and one.is_sampled for one in again] == [True, False]


@pytest.mark.parametrize("is_logged", [False, True])
@pytest.mark.parametrize("is_traced", [False, True])
def test_callers_are_identified_as_far_as_somebody_wants_to_know(is_logged: bool, is_traced: bool) -> None:
    log = AccessLog(io.StringIO()) if is_logged else None
    identify = RequestRecords(log, Tracing(sampler(), Exported()) if is_traced else None).identify
    states = (("tracestate", "a=1"), ("tracestate", "b=2"))
    sampled = identify((("user-agent", "x"), ("traceparent", f"{PARENT}-01"), *states), "unix:")
    assert sampled is not None
    assert sampled.trace is not None
    assert (sampled.peer, sampled.user_agent, sampled.trace.is_sampled) == ("unix:", "x", is_traced)
    assert sampled.trace.state == ("a=1,b=2" if is_traced else "")
    for metadata in ((), (("traceparent", f"{PARENT}-01"),) * 2):  # of several none can be believed
        caller = identify(metadata, "unix:")
        assert (caller is not None) == is_logged
        assert caller is None or caller.trace is None


# -- what is handed on -------------------------------------------------------------------------------------------------


def test_of_a_batch_only_the_traced_are_handed_on_with_what_it_was() -> None:
    exported = Exported()
    tracing = Tracing(sampler(), exported, wall_clock=lambda: 1e9)
    tickets = [ticket(), ticket(is_sampled=False, rows=2), ticket()]
    version = records(tracing)
    version.ran([ticket(is_sampled=False)], [b""], 1.0, None)
    version.ran(tickets, [b"", b"", QueueTimeout("late")], 1.01, times(tickets))
    tracing.start()
    tracing.stop()
    (ended,) = exported.ended
    assert [(one.trace.span_id, one.code, one.peer, one.user_agent) for one in ended.traced] == [
        (9, "OK", "unix:", "test"), (9, "UNAVAILABLE", "unix:", "test"),
    ]  # fmt: skip
    assert (ended.model, ended.version, ended.batch, ended.requests, ended.rows) == ("m", "3", 2, 3, 4)
    assert ended.left + ended.wall_offset == pytest.approx(1e9)
    assert tracing.stats().exported == 2


def test_a_batch_without_a_traced_request_leaves_nothing() -> None:
    exported = Exported()
    tracing = Tracing(sampler(), exported)
    records(tracing).ran([ticket(is_sampled=False)], [b""], 1.0, None)
    records(tracing).dropped([ticket(is_sampled=False)], QueueTimeout("late"))
    tracing.start()
    tracing.stop()
    assert exported.calls == []


def test_beyond_what_may_wait_traces_are_dropped_and_counted_and_nobody_waits() -> None:
    exported = Exported()
    exported.gate.clear()
    tracing = Tracing(sampler(), exported, max_pending=3)
    tracing.start()
    version = records(tracing)
    for _ in range(5):
        version.dropped([ticket()], QueueTimeout("late"))
    assert tracing.stats().queue_full == 2
    exported.gate.set()
    tracing.stop()
    assert tracing.stats().exported == 3


def test_one_export_is_bounded() -> None:
    exported = Exported()
    tracing = Tracing(sampler(), exported)
    for _ in range(MAX_TOGETHER + 2):
        records(tracing).dropped([ticket()], QueueTimeout("late"))
    tracing.start()
    tracing.stop()
    assert exported.calls == [MAX_TOGETHER, 2]


@pytest.mark.parametrize("outcome", [False, OSError("no space left")])
def test_what_cannot_be_sent_is_counted_and_ends_nothing(outcome: bool | Exception) -> None:
    exported = Exported()
    exported.outcome = outcome
    tracing = Tracing(sampler(), exported)
    tracing.start()
    records(tracing).dropped([ticket()], QueueTimeout("late"))
    assert exported.entered.wait(20)
    while not tracing.stats().not_sent:
        pass
    exported.outcome = True
    records(tracing).dropped([ticket()], QueueTimeout("late"))
    tracing.stop()
    assert (tracing.stats().exported, tracing.stats().not_sent) == (1, 1)


def test_stopping_does_not_wait_for_an_exporter_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.telemetry.tracing.FLUSH_WITHIN", 0.01)
    exported = Exported()
    exported.gate.clear()
    exported.outcome = False  # what a closed exporter says
    tracing = Tracing(sampler(), exported)
    tracing.start()
    records(tracing).dropped([ticket()], QueueTimeout("late"))
    tracing.stop()
    assert "tracing" not in [thread.name for thread in threading.enumerate()]
    assert (tracing.stats().exported, tracing.stats().not_sent) == (0, 1)
    records(tracing).dropped([ticket()], QueueTimeout("late"))
    assert tracing.stats().queue_full == 1


# -- exemplars ---------------------------------------------------------------------------------------------------------


def test_an_exemplar_is_in_the_bucket_that_its_request_was_counted_in() -> None:
    exported, exemplars = Exported(), Exemplars(len(Stage), DURATION_EDGES)
    tracing = Tracing(sampler(), exported)
    tickets = [ticket(arrived=1.0), ticket(arrived=0.5), ticket(is_sampled=False, arrived=0.2)]
    records(tracing, exemplars).ran(tickets, [b""] * 3, 1.01, times(tickets))
    tracing.start()
    tracing.stop()
    seconds = {stage: sorted(one.seconds for one in exemplars.of(stage) if one is not None) for stage in Stage}
    assert seconds[Stage.REQUEST] == pytest.approx([0.06, 0.56])
    assert seconds[Stage.QUEUE] == pytest.approx([0.01, 0.51])
    assert seconds[Stage.COMPUTE] == pytest.approx([0.03])
    for stage in Stage:
        for bucket, one in enumerate(exemplars.of(stage)):
            if one is not None:
                assert (DURATION_EDGES[bucket - 1] if bucket else 0) < one.seconds <= DURATION_EDGES[bucket]


def test_traces_that_were_not_sent_are_no_exemplars() -> None:
    exported, exemplars = Exported(), Exemplars(len(Stage), DURATION_EDGES)
    exported.outcome = False
    tracing = Tracing(sampler(), exported)
    tickets = [ticket()]
    records(tracing, exemplars).ran(tickets, [b""], 1.01, times(tickets))
    tracing.start()
    tracing.stop()
    assert all(one is None for stage in Stage for one in exemplars.of(stage))


def test_a_batch_has_a_trace_of_its_own_also_after_requests_with_parents(tmp_path: Path) -> None:
    exporter = open_exporter(f"file:{tmp_path / 'spans'}", "s", "1")
    for number in (1, 2):
        trace = TraceContext(0xA0 + number, 7, 9)
        request = TracedRequest(trace, "", 1, 1.0, 1.001, "", "", "OK")
        exporter.export([Ended([request], "m", "1", 1.002, 1.01, None, number, 1, 1, 0.0, None)])
    exporter.close()
    spans = [
        span
        for line in (tmp_path / "spans").read_text().splitlines()
        for group in json.loads(line)["resourceSpans"]
        for scope in group["scopeSpans"]
        for span in scope["spans"]
    ]
    batches = {span["traceId"] for span in spans if span["name"].startswith("batch")}
    assert len(batches) == 2
    assert not batches & {f"{0xA0 + number:032x}" for number in (1, 2)}
