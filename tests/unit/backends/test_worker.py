"""One instance's thread: what it runs itself, what it leaves to whoever brings it, and how it ends."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from headrace.backends.base import Backend
from headrace.backends.runner import BatchRunner
from headrace.backends.worker import WarmUp, Worker
from headrace.batching.batcher import Batcher
from headrace.batching.latency import LatencyTable
from headrace.config import BatchingConfig, InstanceConfig
from headrace.errors import BackendError, HeadraceError, LoadError
from headrace.requests import Answer, InputTensor, Reply, Ticket
from headrace.signature import Signature
from headrace.telemetry.counters import VersionCounters
from headrace.testing import CollectingOutlet, FakeBackend

SIGNATURE = Signature("m", FakeBackend.artifact.inputs, FakeBackend.artifact.outputs, 64)


class RowsEncoder:
    def encode_batch(self, tickets: list[Ticket], wanted: Any, arrays: Any, rows_axis: bool) -> list[Answer]:
        return [b"answer"] * len(tickets)


class SignallingOutlet(CollectingOutlet):
    def __init__(self, expected: int) -> None:
        super().__init__()
        self._expected = expected
        self.complete = threading.Event()

    def deliver(self, answers: Any) -> None:
        super().deliver(answers)
        if len(self.answers) == self._expected:
            self.complete.set()


def make_ticket(outlet: CollectingOutlet) -> Ticket:
    tensor = InputTensor("x", "FP32", (1, 2), np.ones((1, 2), "<f4").tobytes())
    return Ticket(Reply(outlet), 1, (), (tensor,), (0,))


def loaded(backend: Backend) -> Worker:
    worker = Worker("m:1#0", backend)
    worker.prepare(lambda b: WarmUp({})).result(timeout=5)
    return worker


def parts(batch_limit: int = 4) -> tuple[Batcher, BatchRunner]:
    counters = VersionCounters()
    batcher = Batcher(
        "m:1",
        BatchingConfig(),
        latencies=LatencyTable({}, batch_limit),
        clock=time.monotonic,
        timer=lambda when, call: None,
        shard=counters.shard(),
    )
    return batcher, BatchRunner("m:1", SIGNATURE, RowsEncoder(), (), counters.shard())


def fake(execute: Any = None) -> FakeBackend:
    return FakeBackend.make(execute)(Path("model.fake"), InstanceConfig())


def test_few_rows_run_on_the_thread_that_brings_them() -> None:
    backend, outlet = fake(), SignallingOutlet(1)
    worker = loaded(backend)
    batcher, runner = parts()
    worker.serve_inline(batcher, runner, 4)
    batcher.submit(make_ticket(outlet))
    assert outlet.complete.is_set()
    assert backend.threads == {threading.get_ident()}
    worker.stop()
    assert worker.join(5)


def test_a_long_queue_does_not_hold_up_whoever_wakes_the_instance() -> None:
    backend, outlet = fake(), SignallingOutlet(20)
    worker = loaded(backend)
    batcher, runner = parts()
    for _ in range(20):
        batcher.submit(make_ticket(outlet))
    worker.serve_inline(batcher, runner, 8)
    assert outlet.complete.wait(5)
    assert threading.get_ident() not in backend.threads
    worker.stop()
    assert worker.join(5)


def test_an_inline_instance_comes_back_from_its_thread() -> None:
    backend, outlet = fake(), SignallingOutlet(20)
    worker = loaded(backend)
    batcher, runner = parts()
    for _ in range(20):
        batcher.submit(make_ticket(outlet))
    worker.serve_inline(batcher, runner, 8)
    assert outlet.complete.wait(5)
    for count in range(1, 50):
        again = SignallingOutlet(1)
        batcher.submit(make_ticket(again))
        assert again.complete.wait(5), count
    worker.stop()
    assert worker.join(5)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), StopIteration(), GeneratorExit()])
def test_whatever_a_model_raises_fails_its_batch_and_the_next_one_runs(error: BaseException) -> None:
    def execute(inputs: Any) -> list[Any]:
        if not backend.batches[1:]:
            raise error
        return [inputs["x"]]

    backend = fake(execute)
    worker = loaded(backend)
    batcher, runner = parts()
    worker.serve(batcher, runner)
    first, second = SignallingOutlet(1), SignallingOutlet(1)
    batcher.submit(make_ticket(first))
    assert first.complete.wait(5)
    batcher.submit(make_ticket(second))
    assert second.complete.wait(5)
    assert isinstance(next(iter(first.answers.values())), BackendError)
    assert list(second.answers.values()) == [b"answer"]
    worker.stop()
    assert worker.join(5)


@pytest.mark.parametrize("error", [SystemExit(3), StopIteration(), RuntimeError("secret"), LoadError("bad weights")])
def test_whatever_a_load_raises_is_told_and_ends_the_thread(error: BaseException) -> None:
    class Failing(FakeBackend.make()):  # type: ignore[misc]
        def load(self) -> None:
            super().load()
            raise error

    worker = Worker("m:1#0", Failing(Path("model.fake"), InstanceConfig()))
    with pytest.raises(HeadraceError) as caught:
        worker.prepare(lambda b: WarmUp({})).result(timeout=5)
    assert "secret" not in str(caught.value)
    assert worker.join(5)
    assert Failing.live == []


def test_a_worker_stopped_while_it_loads_does_not_warm_up_and_closes_what_it_loaded() -> None:
    may_load, loading = threading.Event(), threading.Event()

    class Slow(FakeBackend.make()):  # type: ignore[misc]
        def load(self) -> None:
            loading.set()
            assert may_load.wait(5)
            super().load()

    worker = Worker("m:1#0", Slow(Path("model.fake"), InstanceConfig()))
    ready = worker.prepare(lambda b: WarmUp({}))
    assert loading.wait(5)
    assert not ready.cancel()
    worker.stop()
    may_load.set()
    assert worker.join(5)
    assert Slow.live == []
    with pytest.raises(LoadError, match="stopped while it was loaded"):
        ready.result(timeout=0)


def test_answers_with_nan_are_counted_only_while_they_are_screened() -> None:
    counters = VersionCounters()
    runner = BatchRunner("m:1", SIGNATURE, RowsEncoder(), (), counters.shard())
    backend = FakeBackend.make(lambda inputs: [np.array([[1.0, np.nan], [1.0, 2.0]], "<f4")])(Path(), InstanceConfig())
    tickets = [make_ticket(CollectingOutlet()) for _ in range(2)]
    for on, counted in ((False, 0), (True, 1), (False, 1)):
        runner.screen_outputs = on
        assert runner.run(backend, tickets, time.monotonic()) == [b"answer"] * 2
        assert counters.snapshot().nonfinite == counted
    assert counters.snapshot().success == 6
