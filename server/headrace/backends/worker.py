"""The one thread that touches an instance's device: load, warm, then pull batches from the batcher until told to stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Protocol

import structlog

from headrace.backends.base import Array, Backend
from headrace.batching.assemble import gather, padded_size, union_outputs
from headrace.batching.batch_queue import NEVER
from headrace.batching.batcher import Batcher
from headrace.errors import BackendError, HeadraceError
from headrace.requests import Answer, Ticket
from headrace.signature import Signature
from headrace.telemetry.counters import BatchTimes, CounterShard, FailureReason

log = structlog.stdlib.get_logger(__name__)


class Encoder(Protocol):
    def encode(self, id: str, outputs: tuple[int, ...], arrays: Sequence[Array], start: int, stop: int, rows_axis: bool) -> bytes: ...


class BatchRunner:
    """Runs one batch start to end on the calling thread. Owns nothing that changes."""

    def __init__(self, backend: Backend, signature: Signature, encoder: Encoder, allowed: Sequence[int], shard: CounterShard, name: str) -> None:
        self._backend = backend
        self._signature = signature
        self._encoder = encoder
        self._allowed = allowed
        self._shard = shard
        self._name = name
        self._output_names = [spec.name for spec in signature.outputs]

    def run(self, tickets: Sequence[Ticket], taken: float) -> list[Answer]:
        """One answer a ticket. A failure of the model fails exactly this batch; one request's oversized answer only itself."""
        try:
            return self._run(tickets, taken)
        except HeadraceError as error:
            self._shard.record_failure(FailureReason.BACKEND, len(tickets))
            return [error.with_traceback(None)] * len(tickets)
        except Exception as error:
            log.exception("batch failed", version=self._name, request_ids=[t.id for t in tickets if t.id][:8], requests=len(tickets))
            self._shard.record_failure(FailureReason.OTHER, len(tickets))
            del error
            return [BackendError(f"{self._name} failed to run the request; the server's log has the reason")] * len(tickets)

    def _run(self, tickets: Sequence[Ticket], taken: float) -> list[Answer]:
        rows = sum([ticket.rows for ticket in tickets])
        padded = padded_size(rows, self._allowed) if self._allowed else rows
        inputs = gather(self._signature, tickets, padded)
        wanted = union_outputs(tickets)
        input_done = time.monotonic()
        arrays = self._backend.execute(inputs, [self._output_names[index] for index in wanted])
        output_start = time.monotonic()
        self._check_rows(arrays, wanted, padded)
        answers = self._encode(tickets, wanted, arrays)
        times = BatchTimes(
            rows=rows,
            padded_rows=padded,
            arrived=[ticket.arrived for ticket in tickets],
            enqueued=[ticket.enqueued for ticket in tickets],
            taken=taken,
            input_done=input_done,
            output_start=output_start,
            done=time.monotonic(),
        )
        self._shard.record_batch(times)
        return answers

    def _check_rows(self, arrays: Sequence[Array], wanted: Sequence[int], rows: int) -> None:
        if not self._signature.max_batch_size:
            return
        for index, array in zip(wanted, arrays, strict=True):
            if array.ndim == 0 or array.shape[0] != rows:
                raise BackendError(
                    f"output '{self._output_names[index]}' of '{self._name}': expected {rows} rows, got shape {tuple(array.shape)}; "
                    "the model does not keep the batch dimension, set max_batch_size = 0 in its model.toml"
                )

    def _encode(self, tickets: Sequence[Ticket], wanted: tuple[int, ...], arrays: Sequence[Array]) -> list[Answer]:
        answers: list[Answer] = []
        is_batching = self._signature.max_batch_size > 0
        start = 0
        for ticket in tickets:
            outputs = ticket.outputs
            chosen = arrays if outputs == wanted else [arrays[wanted.index(index)] for index in outputs]
            stop = start + ticket.rows
            try:
                answers.append(self._encoder.encode(ticket.id, outputs, chosen, start, stop, is_batching))
            except HeadraceError as error:
                answers.append(error)
            start = stop
        return answers


class Worker:
    """A thread and the instance that lives on it. Owns the doorbell and the stop flag; the backend belongs to the thread."""

    def __init__(self, name: str, backend: Backend) -> None:
        self.name = name
        self.backend = backend
        self._doorbell = threading.Semaphore(0)
        self._is_stopping = False
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"Worker({self.name}, alive={self._thread is not None and self._thread.is_alive()})"

    def wake(self) -> None:
        self._doorbell.release()

    def start(self, batcher: Batcher, runner: BatchRunner) -> None:
        self._thread = threading.Thread(target=self._serve, args=(batcher, runner), name=self.name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end after its present batch and close the backend there. Returns at once; `join` waits."""
        self._is_stopping = True
        self._doorbell.release()

    def join(self, timeout: float | None = None) -> bool:
        if self._thread is not None:
            self._thread.join(timeout)
            return not self._thread.is_alive()
        return True

    def _serve(self, batcher: Batcher, runner: BatchRunner) -> None:
        while not self._is_stopping:
            tickets, until = batcher.take(self)
            if tickets:
                batcher.settle(tickets, runner.run(tickets, time.monotonic()))
                del tickets
            elif until == NEVER:
                self._doorbell.acquire()
            else:
                self._doorbell.acquire(timeout=max(until - time.monotonic(), 0.0))
        self.backend.close()

