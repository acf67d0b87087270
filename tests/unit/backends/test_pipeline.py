"""Batches on a device that works beside the host: when the next one is taken, what a failure costs, and how it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from headrace.backends.runner import BatchRunner
from headrace.backends.worker import WarmUp, Worker
from headrace.batching.batcher import Batcher
from headrace.batching.latency import LatencyTable
from headrace.batching.observer import RanBatch
from headrace.config import BatchingConfig, InstanceConfig
from headrace.errors import BackendError, DeviceLost
from headrace.requests import Answer, InputTensor, Reply, Ticket
from headrace.signature import Signature
from headrace.telemetry.counters import VersionCounters
from headrace.testing import CollectingOutlet, FakePipelinedBackend

SIGNATURE = Signature("m", FakePipelinedBackend.artifact.inputs, FakePipelinedBackend.artifact.outputs, 64)


class ValueEncoder:
    """Answers the first value of each ticket's rows, which says whose they are."""

    def encode_batch(self, tickets: Sequence[Ticket], wanted: Any, arrays: Any, rows_axis: bool) -> list[Answer]:
        answers: list[Answer] = []
        row = 0
        for ticket in tickets:
            answers.append(str(arrays[0][row, 0]).encode())
            row += ticket.rows
        return answers


class Waiting(CollectingOutlet):
    def __init__(self) -> None:
        super().__init__()
        self.complete = threading.Event()

    def deliver(self, answers: Any) -> None:
        super().deliver(answers)
        self.complete.set()

    @property
    def answer(self) -> Answer:
        assert self.complete.wait(5)
        return next(iter(self.answers.values()))


def ticket_of(value: float, outlet: CollectingOutlet | None = None) -> Ticket:
    tensor = InputTensor("x", "FP32", (1, 2), np.array([[value, 0.0]], "<f4").tobytes())
    return Ticket(Reply(outlet or CollectingOutlet()), 1, (), (tensor,), (0,))


class Bench:
    """A worker on a fake device, and its batcher."""

    def __init__(
        self, execute: Any = None, *, latencies: dict[int, float] | None = None, allowed: Sequence[int] = (), observers: Any = ()
    ) -> None:
        counters = VersionCounters()
        self.backend = FakePipelinedBackend.make(execute)(Path("model.fake"), InstanceConfig())
        assert isinstance(self.backend, FakePipelinedBackend)
        self.batcher = Batcher(
            "m:1",
            BatchingConfig(),
            latencies=LatencyTable(latencies or {}, 4),
            clock=time.monotonic,
            timer=lambda when, call: None,
            shard=counters.shard(),
        )
        self.worker = Worker("m:1#0", self.backend)
        self.worker.prepare(lambda b: WarmUp({})).result(timeout=5)
        runner = BatchRunner("m:1", SIGNATURE, ValueEncoder(), allowed, counters.shard(), None, observers)
        self.worker.serve(self.batcher, runner)

    def send(self, *values: float) -> Waiting:
        outlet = Waiting()
        rows = np.array([[value, 0.0] for value in values], "<f4")
        tensor = InputTensor("x", "FP32", rows.shape, rows.tobytes())
        self.batcher.submit(Ticket(Reply(outlet), len(values), (), (tensor,), (0,)))
        return outlet

    def until_queue_is(self, requests: int) -> None:
        end = time.monotonic() + 5
        while self.batcher.pending_requests != requests:
            assert time.monotonic() < end, self.batcher
            time.sleep(0.001)

    def close(self) -> None:
        self.backend.gate.set()
        self.worker.stop()
        assert self.worker.join(5)


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(**getattr(request, "param", {}))
    yield bench
    bench.close()


SLOW = {"latencies": {1: 60.0, 4: 60.0}}
"""An l(b) by which the running batch ends long after the test."""


@pytest.mark.parametrize("bench", [SLOW], indirect=True)
def test_a_full_batch_is_launched_while_another_runs(bench: Bench) -> None:
    bench.backend.gate.clear()
    first = bench.send(1)
    bench.until_queue_is(0)
    rest = [bench.send(value) for value in (2, 3, 4, 5)]
    bench.until_queue_is(0)
    assert bench.backend.most_in_flight == 2
    bench.backend.gate.set()
    assert [outlet.answer for outlet in (first, *rest)] == [b"1.0", b"2.0", b"3.0", b"4.0", b"5.0"]
    assert [len(batch["x"]) for batch in bench.backend.batches] == [1, 4]


@pytest.mark.parametrize("bench", [SLOW], indirect=True)
def test_a_batch_that_is_not_full_fills_until_the_running_one_ends(bench: Bench) -> None:
    bench.backend.gate.clear()
    first = bench.send(1)
    bench.until_queue_is(0)
    second, third = bench.send(2), bench.send(3)
    assert bench.batcher.pending_requests == 2
    bench.backend.gate.set()
    assert [outlet.answer for outlet in (first, second, third)] == [b"1.0", b"2.0", b"3.0"]
    assert [len(batch["x"]) for batch in bench.backend.batches] == [1, 2]


@pytest.mark.parametrize("bench", [{"latencies": {1: 1e-6, 4: 1e-6}}], indirect=True)
def test_one_that_is_due_to_end_is_joined_by_what_is_there(bench: Bench) -> None:
    bench.backend.gate.clear()
    first = bench.send(1)
    bench.until_queue_is(0)
    second = bench.send(2)
    bench.until_queue_is(0)
    bench.backend.gate.set()
    assert (first.answer, second.answer) == (b"1.0", b"2.0")
    assert bench.backend.most_in_flight == 2


def test_never_more_batches_are_under_way_than_there_are_lanes(bench: Bench) -> None:
    bench.backend.gate.clear()
    outlets = [bench.send(value) for value in range(40)]
    bench.backend.gate.set()
    assert [outlet.answer for outlet in outlets] == [str(float(value)).encode() for value in range(40)]
    assert bench.backend.most_in_flight <= 2


def fail_two(inputs: Any) -> list[Any]:
    if 2.0 in inputs["x"]:
        raise BackendError("no twos")
    if 3.0 in inputs["x"]:
        raise SystemExit("secret")
    return [inputs["x"].copy()]


@pytest.mark.parametrize("bench", [{"execute": fail_two}], indirect=True)
@pytest.mark.parametrize("where", ["wait", "launch"])
def test_a_failure_costs_its_batch_and_no_lane(bench: Bench, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "launch":
        launch = bench.backend.launch

        def failing(inputs: Any, outputs: Any) -> Any:
            fail_two(inputs)
            return launch(inputs, outputs)

        monkeypatch.setattr(bench.backend, "launch", failing)
    for _ in range(5):
        assert str(bench.send(2).answer) == "no twos"
        assert "secret" not in str(bench.send(3).answer)
    assert bench.send(1).answer == b"1.0"
    assert bench.batcher.unsettled == 0


def lose_at_two(inputs: Any) -> list[Any]:
    if 2.0 in inputs["x"]:
        raise DeviceLost("the device fell off the bus")
    return [inputs["x"].copy()]


@pytest.mark.parametrize("bench", [{"execute": lose_at_two}], indirect=True)
def test_with_the_device_goes_the_instance_once_its_batches_are_answered(bench: Bench) -> None:
    assert bench.send(1).answer == b"1.0"
    assert isinstance(bench.send(2).answer, DeviceLost)
    assert bench.worker.join(5)
    assert bench.backend.live == []
    late = bench.send(1)
    assert not late.complete.is_set()
    assert bench.batcher.pending_requests == 1


def test_what_is_under_way_is_answered_before_the_worker_ends(bench: Bench) -> None:
    bench.backend.gate.clear()
    outlet = bench.send(1)
    bench.until_queue_is(0)
    bench.worker.stop()
    assert not outlet.complete.is_set()
    bench.backend.gate.set()
    assert outlet.answer == b"1.0"
    assert bench.worker.join(5)
    assert bench.backend.live == []


class Seen:
    def __init__(self) -> None:
        self.batches: list[tuple[float, float]] = []

    def look(self, batch: RanBatch) -> None:
        self.batches.append((float(batch.inputs["x"].sum()), float(batch.arrays[0].sum())))


def test_rows_are_gathered_into_the_lane_and_padded_there_and_observers_read_them_before_it_is_released() -> None:
    seen = Seen()
    bench = Bench(allowed=(4,), observers=(seen,))
    bench.backend.gate.clear()
    outlets = [bench.send(7)]
    bench.until_queue_is(0)
    outlets += [bench.send(1, 2), bench.send(3)]
    bench.backend.gate.set()
    assert [outlet.answer for outlet in outlets] == [b"7.0", b"1.0", b"3.0"]
    bench.close()
    assert [batch["x"].shape for batch in bench.backend.batches] == [(4, 2), (4, 2)]
    # Row 0 once more: 7 four times, and 1, 2, 3 and 1.
    assert seen.batches == [(28.0, 28.0), (7.0, 7.0)]


def test_a_batchs_cost_is_what_it_took_on_the_device_and_not_what_it_waited_for_another() -> None:
    counters = VersionCounters()
    runner = BatchRunner("m:1", SIGNATURE, ValueEncoder(), (), counters.shard())
    backend = FakePipelinedBackend.make()(Path("model.fake"), InstanceConfig())
    assert isinstance(backend, FakePipelinedBackend)
    backend.gate.clear()
    launched = [runner.launch(backend, [ticket_of(value)], time.monotonic()) for value in (1.0, 2.0)]
    began = time.monotonic()
    threading.Timer(0.2, backend.gate.set).start()
    for each in launched:
        assert isinstance(runner.finish(each)[0], bytes)
        assert each.pending is not None
        each.pending.release()
    took = time.monotonic() - began
    sizes = counters.snapshot().batch_sizes[1]
    # Both were launched at the beginning: waiting counted as computing would make it twice as much.
    assert sizes.cost == pytest.approx(sizes.compute)
    assert 0.19 < sizes.cost <= took + 0.1
    backend.close()


def test_whoever_brings_a_request_does_not_wait_for_a_device(bench: Bench) -> None:
    worker = Worker("m:1#0", bench.backend)
    worker.prepare(lambda b: WarmUp({})).result(timeout=5)
    counters = VersionCounters()
    batcher = Batcher(
        "m:1",
        BatchingConfig(),
        latencies=LatencyTable({1: 1e-6}, 4),
        clock=time.monotonic,
        timer=lambda when, call: None,
        shard=counters.shard(),
    )
    worker.serve_inline(batcher, BatchRunner("m:1", SIGNATURE, ValueEncoder(), (), counters.shard()), 4)
    bench.backend.gate.clear()
    outlet = Waiting()
    batcher.submit(ticket_of(1.0, outlet))
    assert not outlet.complete.is_set()
    bench.backend.gate.set()
    assert outlet.answer == b"1.0"
    worker.stop()
    assert worker.join(5)


def test_a_batch_that_waited_for_the_device_is_timed_from_when_it_got_it() -> None:
    now = [0.0]
    table = LatencyTable({1: 1.0, 4: 1.0}, 4)
    batcher = Batcher(
        "m:1",
        BatchingConfig(),
        latencies=table,
        clock=lambda: now[0],
        timer=lambda when, call: None,
        shard=VersionCounters().shard(),
    )
    observed: list[float] = []
    table.observe = lambda rows, seconds, at, stretch: observed.append(seconds)  # type: ignore[method-assign]
    worker = Worker("m:1#0", FakePipelinedBackend(Path("model.fake"), InstanceConfig()))
    tickets = [Ticket(Reply(CollectingOutlet()), 4, (), (InputTensor("x", "FP32", (4, 2), bytes(32)),), (0,)) for _ in range(2)]
    batcher.submit(tickets[0])
    batcher.take(worker)
    now[0] = 0.25
    batcher.submit(tickets[1])
    batcher.take(worker)
    for end in (1.0, 2.0):
        now[0] = end
        batcher.settle([tickets[int(end) - 1]], [b""])
    assert observed == [1.0, 1.0]
