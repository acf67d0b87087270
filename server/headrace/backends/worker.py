"""The one thread that touches an instance's device: load, warm, then pull batches from the batcher until told to stop."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from headrace.backends.base import Array, Backend
from headrace.batching.assemble import gather, padded_size, union_outputs
from headrace.batching.batch_queue import NEVER
from headrace.batching.batcher import Batcher
from headrace.batching.observer import Observer, RanBatch
from headrace.batching.screening import count_nonfinite
from headrace.errors import BackendError, HeadraceError, LoadError
from headrace.requests import Answer, Ticket
from headrace.signature import Signature
from headrace.telemetry.counters import BatchTimes, CounterShard, FailureReason
from headrace.telemetry.log import get_logger
from headrace.telemetry.records import VersionRecords
from headrace.threads import patient

log = get_logger(__name__)


class Encoder(Protocol):
    def encode_batch(
        self, tickets: Sequence[Ticket], wanted: tuple[int, ...], arrays: Sequence[Array], rows_axis: bool
    ) -> list[Answer]: ...


class BatchRunner:
    """Runs one batch start to end on the calling thread.

    Owns nothing that changes but `screen_outputs`: whether answers with NaN or infinity are counted, set from any thread; `stretch`
    of the last batch: how much longer the model took than it had a core for, 0 where the thread's CPU time does not tell; and that
    batch itself until `show`, where there are `observers` or `records`.
    """

    def __init__(
        self,
        name: str,
        signature: Signature,
        encoder: Encoder,
        allowed: Sequence[int],
        shard: CounterShard,
        records: VersionRecords | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._observers = observers
        self._ran: RanBatch | None = None
        self.screen_outputs = False
        self.stretch = 0.0
        self._records = records
        self._times: BatchTimes | None = None
        self._ended: _Ended | None = None
        self._signature = signature
        self._encoder = encoder
        self._allowed = allowed
        self._shard = shard
        self._name = name
        self._output_names = [spec.name for spec in signature.outputs]

    def run(self, backend: Backend, tickets: Sequence[Ticket], taken: float) -> list[Answer]:
        """One answer a ticket. A failure of the model fails exactly this batch; one request's oversized answer only itself."""
        try:
            answers = self._run(backend, tickets, taken)
        except HeadraceError as error:
            answers = self._fail(tickets, error.with_traceback(None), FailureReason.BACKEND)
        except BaseException:
            # Also SystemExit and the like: a model ends neither its thread nor, run inline, the event loop.
            log.exception("batch failed", version=self._name, requests=len(tickets), **_who(tickets))
            unknown = BackendError(f"{self._name} failed to run the request; the server's log has the reason")
            answers = self._fail(tickets, unknown, FailureReason.OTHER)
        if self._records is not None:
            times, self._times = self._times, None
            self._ended = _Ended(tickets, answers, taken, times)
        return answers

    def _fail(self, tickets: Sequence[Ticket], error: HeadraceError, reason: FailureReason) -> list[Answer]:
        now = time.monotonic()
        self._shard.record_failure(reason, len(tickets), sum(now - ticket.arrived for ticket in tickets))
        return [error] * len(tickets)

    def _run(self, backend: Backend, tickets: Sequence[Ticket], taken: float) -> list[Answer]:
        rows = sum([ticket.rows for ticket in tickets])
        padded = padded_size(rows, self._allowed) if self._allowed else rows
        inputs = gather(self._signature, tickets, padded)
        wanted = union_outputs(tickets)
        input_done = time.monotonic()
        cpu = time.thread_time() if backend.works_on_the_caller else 0.0
        names = [self._output_names[index] for index in wanted]
        arrays = backend.execute(inputs, names)
        cost = time.thread_time() - cpu if backend.works_on_the_caller else None
        output_start = time.monotonic()
        self._check_rows(arrays, wanted, padded)
        answers = self._encoder.encode_batch(tickets, wanted, arrays, self._signature.max_batch_size > 0)
        times = BatchTimes(
            rows=rows,
            padded_rows=padded,
            arrived=[ticket.arrived for ticket in tickets],
            taken=taken,
            input_done=input_done,
            output_start=output_start,
            done=time.monotonic(),
            cost=cost,
        )
        if cost:
            self.stretch = max((output_start - input_done) / cost, 1.0)
        if self.screen_outputs:
            self._shard.record_nonfinite(count_nonfinite(self._signature, tickets, wanted, arrays))
        self._shard.record_batch(times)
        if self._records is not None:
            self._times = times
        if self._observers:
            self._ran = RanBatch(tickets, rows, inputs, names, arrays, times.done)
        return answers

    def show(self) -> None:
        """Let the records and the observers have the batch that has just run. To be called once its answers have left."""
        if self._records is not None and self._ended is not None:
            ended, self._ended = self._ended, None
            self._records.ran(*ended)
        ran, self._ran = self._ran, None
        if ran is not None:
            for observer in self._observers:
                observer.look(ran)

    def _check_rows(self, arrays: Sequence[Array], wanted: Sequence[int], rows: int) -> None:
        if not self._signature.max_batch_size:
            return
        for index, array in zip(wanted, arrays, strict=True):
            if array.ndim == 0 or array.shape[0] != rows:
                raise BackendError(
                    f"output '{self._output_names[index]}' of '{self._name}': expected {rows} rows, got shape {tuple(array.shape)}; "
                    "the model does not keep the batch dimension, set max_batch_size = 0 in its model.toml"
                )


class _Ended(NamedTuple):
    tickets: Sequence[Ticket]
    answers: Sequence[Answer]
    taken: float
    times: BatchTimes | None


def _who(tickets: Sequence[Ticket]) -> dict[str, list[str]]:
    """Ids by which a line of the log and its requests find each other; a few of them, as a batch can be of a thousand."""
    traces = [ticket.reply.caller.trace for ticket in tickets if ticket.reply.caller is not None]
    ids = {"request_ids": [ticket.id for ticket in tickets if ticket.id][:8]}
    if any(traces):
        ids["trace_ids"] = [f"{trace.trace_id:032x}" for trace in traces if trace is not None][:8]
    return ids


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Seconds of one run by batch rows, the shortest seen; `failure` is why synthesised inputs could not be run, or empty."""

    seconds: Mapping[int, float]
    failure: str = ""


class Worker:
    """A thread and the instance that lives on it. Owns the doorbell and the stop flag; the backend belongs to the thread."""

    def __init__(self, name: str, backend: Backend) -> None:
        self.name = name
        self._backend = backend
        self._doorbell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_stopping = False
        self._work: tuple[Batcher, BatchRunner] | None = None
        self._inline: tuple[Batcher, BatchRunner, int] | None = None
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"Worker({self.name}, alive={self.is_alive})"

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def prepare(self, warm_up: Callable[[Backend], WarmUp], pause: float = 0.0) -> Future[WarmUp]:
        """Start the thread, load and, `pause` seconds later, warm there. After a failure the backend is closed and the thread gone."""
        ready: Future[WarmUp] = Future()
        self._thread = threading.Thread(target=self._main, args=(ready, warm_up, pause), name=self.name, daemon=True)
        self._thread.start()
        return ready

    def serve(self, batcher: Batcher, runner: BatchRunner) -> None:
        """Begin to pull batches. Called once, after `prepare` succeeded."""
        self._work = (batcher, runner)
        self._doorbell.put(None)

    def serve_inline(self, batcher: Batcher, runner: BatchRunner, max_rows: int) -> None:
        """Like `serve`, but while no more than `max_rows` wait they run on the thread that brought the last of them."""
        self._work = (batcher, runner)
        self._inline = (batcher, runner, max_rows)
        self.wake()

    def wake(self) -> None:
        """Called by whoever has taken this instance off the batcher's idle list, and so for one thread at a time."""
        if self._inline is None:
            self._doorbell.put(None)
            return
        batcher, runner, max_rows = self._inline
        left = max_rows
        while batcher.pending_rows <= left:
            tickets, _ = batcher.take(self)
            if not tickets:
                return
            left -= sum([ticket.rows for ticket in tickets])
            answers = runner.run(self._backend, tickets, time.monotonic())
            batcher.settle(tickets, answers, runner.stretch)
            runner.show()
        # Too much to hold this thread up for. The instance is still off the idle list: it passes to its own thread, which puts
        # it back there once the queue is empty.
        self._doorbell.put(None)

    def stop(self) -> None:
        """Let the thread end after its present batch and close the backend there. Returns at once; `join` waits."""
        self._is_stopping = True
        self._doorbell.put(None)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread to end; False when it has not within `timeout`."""
        if self._thread is None:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _main(self, ready: Future[WarmUp], warm_up: Callable[[Backend], WarmUp], pause: float) -> None:
        # From here on nobody can cancel it: whoever waited may have gone, and the result still has a place.
        ready.set_running_or_notify_cancel()
        with patient():
            result = self._prepare(warm_up, pause)
        if isinstance(result, HeadraceError):
            # Closed first: whoever is told of the failure may count on the memory.
            self._close()
            ready.set_exception(result)
            return
        ready.set_result(result)
        try:
            self._doorbell.get()
            if self._work is not None:
                self._pull(*self._work)
        finally:
            # Batcher and worker refer to each other.
            self._work = self._inline = None
            self._close()

    def _prepare(self, warm_up: Callable[[Backend], WarmUp], pause: float) -> WarmUp | HeadraceError:
        """Load and warm; the reason when that went wrong, whatever the backend raised."""
        try:
            self._backend.load()
            time.sleep(pause)
            if self._is_stopping:
                return LoadError(f"{self.name}: stopped while it was loaded")
            return warm_up(self._backend)
        except HeadraceError as error:
            return error.with_traceback(None)
        except BaseException:
            log.exception("instance failed to load", worker=self.name)
            return LoadError("internal error while loading; the server's log has the reason")

    def _close(self) -> None:
        try:
            self._backend.close()
        except Exception:
            log.exception("instance failed to close", worker=self.name)

    def _pull(self, batcher: Batcher, runner: BatchRunner) -> None:
        while not self._is_stopping:
            tickets, until = batcher.take(self)
            if tickets:
                answers = runner.run(self._backend, tickets, time.monotonic())
                batcher.settle(tickets, answers, runner.stretch)
                runner.show()
                del tickets, answers
            else:
                self._wait(until)

    def _wait(self, until: float) -> None:
        try:
            self._doorbell.get(timeout=None if until == NEVER else max(until - time.monotonic(), 0.0))
        except queue.Empty:
            pass
