"""One batch from its tickets to their answers, on the calling thread."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from headrace.backends.base import Array, Backend, Pending, PipelinedBackend
from headrace.batching.assemble import Stage, gather, padded_size, union_outputs
from headrace.batching.device_inputs import lend_or_bring
from headrace.batching.observer import Observer, RanBatch
from headrace.batching.screening import count_nonfinite
from headrace.errors import BackendError, DeviceLost, HeadraceError
from headrace.requests import Answer, Ticket
from headrace.signature import Signature
from headrace.telemetry.counters import BatchTimes, CounterShard, FailureReason
from headrace.telemetry.log import get_logger
from headrace.telemetry.records import VersionRecords

log = get_logger(__name__)

CLOCK_EVERY = 1e-3
"""Seconds between batches whose CPU time is asked for, twice a system call of 1-2 µs; alone, a tiny request takes 30."""


class Encoder(Protocol):
    def encode_batch(
        self, tickets: Sequence[Ticket], wanted: tuple[int, ...], arrays: Sequence[Array], rows_axis: bool
    ) -> list[Answer]: ...


class BatchRunner:
    """Runs one batch start to end on the calling thread; or, with a device that works beside the host, launches it on one thread and
    finishes it on another.

    Owns nothing that changes but `screen_outputs`: whether answers with NaN or infinity are counted, set from any thread; `stretch`
    of the last batch: how much longer the model took than it had a core for, 0 where the thread's CPU time does not tell, less where
    nobody asked; `lost`: why the device runs nothing any more, once that is so; and that batch itself until `show`, where there are
    `observers` or `records`. All of it, and the counters, belong to the thread that runs or finishes; `launch` touches none.
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
        self._next_clock = 0.0
        self.lost: DeviceLost | None = None
        self._device_free = 0.0
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
        except BaseException as error:
            # Also SystemExit and the like: a model ends neither its thread nor, run inline, the event loop.
            answers = self._fail(tickets, self._explained(tickets, error))
        self._keep(tickets, answers, taken)
        return answers

    def launch(self, backend: PipelinedBackend, tickets: Sequence[Ticket], taken: float) -> Launched:
        """Gather a batch and give it to the device. Never raises: what went wrong is for `finish` to answer."""
        try:
            batch = self._gather(backend, tickets, taken, backend.stage)
            return Launched(tickets, taken, batch, backend.launch(batch.inputs, batch.names), None)
        except BaseException as error:
            return Launched(tickets, taken, None, None, self._explained(tickets, error))

    def finish(self, launched: Launched) -> list[Answer]:
        """Wait for a launched batch and answer it, as `run` does. Its buffers are the caller's to release, after `show`."""
        tickets, batch, pending = launched.tickets, launched.batch, launched.pending
        try:
            if batch is None or pending is None:
                assert launched.error is not None
                raise launched.error
            try:
                arrays = pending.wait()
            finally:
                # While another batch had the device, this one's inputs were not done: a batch's time is what it takes there.
                output_start = time.monotonic()
                began, self._device_free = max(batch.input_done, self._device_free), output_start
            answers = self._answer(batch._replace(input_done=began), arrays, output_start - began, output_start, is_lent=True)
        except BaseException as error:
            answers = self._fail(tickets, self._explained(tickets, error))
        self._keep(tickets, answers, launched.taken)
        return answers

    def _explained(self, tickets: Sequence[Ticket], error: BaseException) -> HeadraceError:
        """What clients are told; the rest is logged."""
        if isinstance(error, HeadraceError):
            return error.with_traceback(None)
        log.error("batch failed", exc_info=error, version=self._name, requests=len(tickets), **_who(tickets))
        return _Unknown(f"{self._name} failed to run the request; the server's log has the reason")

    def _fail(self, tickets: Sequence[Ticket], error: HeadraceError) -> list[Answer]:
        if isinstance(error, DeviceLost):
            self.lost = error
        now = time.monotonic()
        reason = FailureReason.OTHER if isinstance(error, _Unknown) else FailureReason.BACKEND
        self._shard.record_failure(reason, len(tickets), sum(now - ticket.arrived for ticket in tickets))
        return [error] * len(tickets)

    def _keep(self, tickets: Sequence[Ticket], answers: Sequence[Answer], taken: float) -> None:
        if self._records is not None:
            times, self._times = self._times, None
            self._ended = _Ended(tickets, answers, taken, times)

    def _run(self, backend: Backend, tickets: Sequence[Ticket], taken: float) -> list[Answer]:
        batch = self._gather(backend, tickets, taken, None)
        if not backend.works_on_the_caller:
            arrays = backend.execute(batch.inputs, batch.names)
            output_start = time.monotonic()
            return self._answer(batch, arrays, output_start - batch.input_done, output_start)
        if taken < self._next_clock:
            self.stretch = -1.0
            arrays = backend.execute(batch.inputs, batch.names)
            return self._answer(batch, arrays, None, time.monotonic())
        self._next_clock = taken + CLOCK_EVERY
        cpu = time.thread_time()
        arrays = backend.execute(batch.inputs, batch.names)
        cost = time.thread_time() - cpu
        output_start = time.monotonic()
        self.stretch = max((output_start - batch.input_done) / cost, 1.0) if cost else 0.0
        return self._answer(batch, arrays, cost, output_start)

    def _gather(self, backend: Backend, tickets: Sequence[Ticket], taken: float, stage: Stage | None) -> _Batch:
        rows = sum([ticket.rows for ticket in tickets])
        padded = padded_size(rows, self._allowed) if self._allowed else rows
        lent = lend_or_bring(backend, self._signature, tickets, padded)
        inputs = gather(self._signature, tickets, padded, stage)
        if lent:
            backend.lend(lent)
        wanted = union_outputs(tickets)
        names = [self._output_names[index] for index in wanted]
        return _Batch(tickets, taken, rows, padded, inputs, wanted, names, time.monotonic())

    def _answer(self, batch: _Batch, arrays: list[Array], cost: float | None, output_start: float, is_lent: bool = False) -> list[Answer]:
        tickets, wanted = batch.tickets, batch.wanted
        self._check_rows(arrays, wanted, batch.padded)
        answers = self._encoder.encode_batch(tickets, wanted, arrays, self._signature.max_batch_size > 0)
        times = BatchTimes(
            rows=batch.rows,
            padded_rows=batch.padded,
            arrived=[ticket.arrived for ticket in tickets],
            taken=batch.taken,
            input_done=batch.input_done,
            output_start=output_start,
            done=time.monotonic(),
            cost=cost,
        )
        if self.screen_outputs:
            self._shard.record_nonfinite(count_nonfinite(self._signature, tickets, wanted, arrays))
        self._shard.record_batch(times)
        if self._records is not None:
            self._times = times
        if self._observers:
            self._ran = RanBatch(tickets, batch.rows, batch.inputs, batch.names, arrays, times.done, is_lent)
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


class _Unknown(BackendError):
    """Of a reason that is not for clients."""


class _Batch(NamedTuple):
    tickets: Sequence[Ticket]
    taken: float
    rows: int
    padded: int
    inputs: Mapping[str, Array]
    wanted: tuple[int, ...]
    names: list[str]
    input_done: float


class Launched(NamedTuple):
    """A batch that the device has, or the reason why not."""

    tickets: Sequence[Ticket]
    taken: float
    batch: _Batch | None
    pending: Pending | None
    error: HeadraceError | None


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
