"""One model version's life: from a directory to live instances, and back to nothing."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from headrace.backends.base import Backend, BackendRegistry
from headrace.backends.runner import BatchRunner
from headrace.backends.worker import WarmUp, Worker
from headrace.batching.batcher import Batcher, Instance, Schedule, Timer
from headrace.batching.latency import LatencyStats, LatencyTable, inline_rows
from headrace.drift.monitor import DriftMonitors
from headrace.drift.verdict import DriftReport
from headrace.drift.watch import DriftWatch, Subject
from headrace.errors import DeviceLost, HeadraceError, LoadError, NotReady
from headrace.lifecycle.admission import make_ticket, make_tickets
from headrace.lifecycle.attachments import Attached, Attachment
from headrace.lifecycle.devices import Devices
from headrace.lifecycle.drift_subject import drift_subject
from headrace.lifecycle.effective import EffectiveModel, without_batching
from headrace.lifecycle.inspection import Inspection, inspect
from headrace.lifecycle.instances import Instances
from headrace.lifecycle.memory import resident_bytes
from headrace.lifecycle.policy import Key
from headrace.lifecycle.state import VersionState, check_move
from headrace.lifecycle.value_checks import ValueChecks, make_checks
from headrace.lifecycle.view import Call, Refused
from headrace.lifecycle.wanted import WantedVersion
from headrace.lifecycle.warm_up import NOTHING_KNOWN, BatchAxisError, Known, has_free_dimension
from headrace.requests import Alike, InferRequest, Reply
from headrace.signature import Signature
from headrace.sources.base import Fetched
from headrace.telemetry.counters import FailureReason, VersionCounters
from headrace.telemetry.log import get_logger
from headrace.telemetry.records import RequestRecords
from headrace.threads import patient
from headrace.wire.codec import ResponseEncoder

log = get_logger(__name__)

T = TypeVar("T")

PAUSE = 0.2
"""Seconds between looking at a version, loading it and warming it up, while another one serves: longer than most requests take, so
that one that waits meets a part of the work and not all of it. Magika swapped every second on one saturated core, latency 120 ms
throughout: p99 while swapping 1.28 times the steady one without, 1.08-1.14 with it."""


class ModelVersion:
    """Owns one version's state, its batcher and its instances. Lives on the event loop, but for `submit`: any thread."""

    def __init__(
        self,
        want: WantedVersion,
        *,
        timer: Callable[[], Timer],
        schedule: Schedule,
        devices: Devices,
        records: RequestRecords | None = None,
        drift: DriftMonitors | None = None,
        attachments: Sequence[Attachment] = (),
        on_change: Callable[[ModelVersion], None],
        on_lost: Callable[[ModelVersion, Worker, str, DeviceLost], None],
        pause: float = PAUSE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.want = want
        self.model = want.model
        self.version = want.version
        self.state = VersionState.DISCOVERED
        self.since = time.time()
        self.reason = ""
        self.is_prepared = False
        self.displaces = False
        """Whether the version that served had to make room for it."""
        self.is_lost = False
        """Whether what it failed of is its devices."""
        self.inspection: Inspection | None = None
        self.memory_bytes = 0
        self.effective: EffectiveModel | None = None
        self.counters = VersionCounters()
        self.latencies: dict[int, float] = {}
        self.load_seconds = 0.0
        self._timer = timer
        self._schedule = schedule
        self._records = records.of_version(want.model, want.version, self.counters.exemplars) if records is not None else None
        self._drift = drift
        self._watch: DriftWatch | None = None
        self._attachments = attachments
        self._attached: list[Attached] = []
        self._checks: ValueChecks | None = None
        self._on_change = on_change
        self._on_lost = on_lost
        self._pause = pause
        self._clock = clock
        self._batcher: Batcher | None = None
        self.instances = Instances(want.model, want.version, devices)
        self._loop = asyncio.get_running_loop()
        self._look_thread: threading.Thread | None = None
        self._fetched: Fetched | None = None
        self._leave: asyncio.Future[None] = self._loop.create_future()

    def __repr__(self) -> str:
        return f"ModelVersion({self.model}:{self.version}, {self.state.value}, {self._batcher!r})"

    @property
    def name(self) -> str:
        return f"{self.model}:{self.version}"

    @property
    def key(self) -> Key:
        return self.want.key

    @property
    def signature(self) -> Signature | None:
        return self.effective.signature if self.effective else None

    @property
    def is_live(self) -> bool:
        return self.state is VersionState.LIVE

    @property
    def is_busy(self) -> bool:
        """Whether a thread of this version still runs, serving or left behind inside a call that cannot be interrupted."""
        is_looking = self._look_thread is not None and self._look_thread.is_alive()
        return is_looking or self.instances.is_alive

    @property
    def pending_rows(self) -> int:
        return self._batcher.pending_rows if self._batcher else 0

    @property
    def latency_stats(self) -> LatencyStats | None:
        return self._batcher.latency_stats() if self._batcher else None

    @property
    def drift(self) -> DriftReport | None:
        watch = self._watch
        return watch.report() if watch is not None else None

    @property
    def pending_requests(self) -> int:
        return self._batcher.pending_requests if self._batcher else 0

    def move(self, state: VersionState, reason: str = "") -> None:
        """The only place where the state changes."""
        check_move(self.state, state)
        self.state = state
        self.since = time.time()
        self.reason = reason.encode(errors="backslashreplace").decode()  # names of files can hold what no message can
        self._on_change(self)

    # -- serving: any thread -------------------------------------------------------------------------------------------

    def submit(self, request: InferRequest, reply: Reply, arrived: float) -> None:
        for _, _, error in self.submit_all([(request, reply)], arrived):
            raise error

    def submit_all(self, calls: Sequence[Call], arrived: float) -> list[Refused]:
        batcher, effective = self._batcher, self.effective
        if batcher is None or effective is None:
            reason = f"Request for unknown model: '{self.model}' version {self.version} is not at ready state"
            return [(request, reply, NotReady(reason)) for request, reply in calls]
        refused: list[Refused] = []
        tickets = []
        signature, batching, cancel = effective.signature, effective.batching, batcher.cancel_reply
        for request, reply in calls:
            try:
                ticket = make_ticket(signature, batching, request, reply, arrived, self._checks)
            except HeadraceError as error:
                batcher.count_failure(FailureReason.OTHER)
                refused.append((request, reply, error.with_traceback(None)))
                continue
            except Exception as error:  # a fault of ours, which is not to fail those that came together with it
                batcher.count_failure(FailureReason.OTHER)
                refused.append((request, reply, error))
                continue
            reply.ticket = ticket
            reply.cancel = cancel
            tickets.append(ticket)
        for ticket, refusal in batcher.submit_all(tickets):
            refused.extend((request, reply, refusal) for request, reply in calls if reply is ticket.reply)
        return refused

    def submit_alike(self, alike: Alike, arrived: float) -> list[Refused]:
        batcher, effective = self._batcher, self.effective
        if batcher is None or effective is None or self._checks is not None:
            return self.submit_all(alike.calls(), arrived)
        try:
            tickets = make_tickets(effective.signature, effective.batching, alike, arrived)
        except HeadraceError:
            # Each with an error of its own.
            return self.submit_all(alike.calls(), arrived)
        cancel = batcher.cancel_reply
        for ticket in tickets:
            reply = ticket.reply
            reply.ticket = ticket
            reply.cancel = cancel
        refusals = batcher.submit_all(tickets)
        if not refusals:
            return []
        reasons = {ticket.reply: refusal for ticket, refusal in refusals}
        return [(request, reply, reasons[reply]) for request, reply in alike.calls() if reply in reasons]

    # -- life: the event loop ------------------------------------------------------------------------------------------

    def allow_load(self) -> None:
        """Give a prepared version leave to load. Until then it takes no memory to speak of."""
        if not self._leave.done():
            self._leave.set_result(None)

    async def load(self, backends: BackendRegistry, slots: asyncio.Semaphore, predecessor: Callable[[], ModelVersion | None]) -> None:
        """From DISCOVERED to LIVE or FAILED; never raises for a fault of the artifact or its configuration.

        Stops in VERIFYING, prepared, until `allow_load`. `slots` bounds how many are fetched and loaded at a time; of the
        predecessor, the version that serves, is taken over what holds for this one too. Cancelling it ends in UNLOADED.
        """
        began = time.monotonic()
        try:
            async with slots:
                self.move(VersionState.FETCHING)
                self._fetched = fetched = await self.want.fetch()
                self.move(VersionState.VERIFYING)
                before = predecessor()
                known = before.effective.artifact if before is not None and before.effective is not None else None
                inspection = await self._look(lambda: inspect(self.want.config, fetched, backends, known))
            self.inspection = inspection
            self.is_prepared = True
            self._on_change(self)
            await self._leave
            effective, before = inspection.effective, predecessor()
            self._checks = make_checks(effective, inspection.reference, self.counters.count_invalid)
            pause = self._pause if before is not None else 0.0
            await asyncio.sleep(pause)
            async with slots:
                self.move(VersionState.LOADING)
                await self._load(effective, fetched.version_directory, backends[effective.backend], before, pause)
        except asyncio.CancelledError:
            self.abandon()
            raise
        except HeadraceError as error:
            self.is_lost = isinstance(error, DeviceLost)
            self._fail(str(error))
            return
        except Exception:
            log.exception("version failed to load", model=self.model, version=self.version)
            self._fail("internal error while loading; the server's log has the reason")
            return
        self.load_seconds = time.monotonic() - began
        self.move(VersionState.LIVE)
        self._log_live()

    async def _look(self, look: Callable[[], T]) -> T:
        """In a thread of its own, not an executor's: those are waited for when the process ends, and reading a large artifact or waking
        a driver is nothing that a stopping server waits for."""
        result: Future[T] = Future()

        def run() -> None:
            result.set_running_or_notify_cancel()
            try:
                with patient():
                    found = look()
                result.set_result(found)
            except HeadraceError as error:
                result.set_exception(error.with_traceback(None))
            except BaseException:
                log.exception("version failed to load", model=self.model, version=self.version)
                result.set_exception(LoadError("internal error while reading the model; the server's log has the reason"))

        self._look_thread = threading.Thread(target=run, name=f"{self.name} inspection", daemon=True)
        self._look_thread.start()
        return await asyncio.wrap_future(result)

    def abandon(self) -> None:
        """No longer wanted before it was live. Threads inside a load end after it, by themselves."""
        self.instances.stop()
        self._release()
        self.move(VersionState.UNLOADING, "no longer wanted")
        self.move(VersionState.UNLOADED, "no longer wanted")
        log.info("version load abandoned", model=self.model, version=self.version)

    def _release(self) -> None:
        self.instances.release()
        fetched, self._fetched = self._fetched, None
        if fetched is not None:
            fetched.release()

    def _fail(self, reason: str) -> None:
        self._release()
        if self.inspection is not None:
            self.inspection = dataclasses.replace(self.inspection, recorded=())
        self.move(VersionState.FAILED, reason)
        log.error("version failed", model=self.model, version=self.version, reason=reason)

    async def _load(
        self, effective: EffectiveModel, directory: Path, backend: type[Backend], predecessor: ModelVersion | None, pause: float
    ) -> None:
        known, before = learnt_of(predecessor, effective), resident_bytes()
        subject = self._drift_subject(effective, predecessor)
        try:
            warm = await self._start(effective, directory, backend, known, pause)
        except BatchAxisError as error:
            effective, known = without_batching(effective, str(error)), NOTHING_KNOWN
            subject = self._drift_subject(effective, predecessor)
            warm = await self._start(effective, directory, backend, NOTHING_KNOWN, pause)
        # Of the whole process: loads side by side count for each other, and freed memory that is used again counts as nothing.
        self.memory_bytes = max(resident_bytes() - before, 0)
        if warm.failure:
            log.warning("version not warmed up", model=self.model, version=self.version, reason=warm.failure)
        if self.inspection is not None:
            self.inspection = dataclasses.replace(self.inspection, recorded=())
        self.latencies = dict(warm.seconds)
        self.effective = effective
        self._watch = self._drift.watch(subject) if self._drift is not None and subject is not None else None
        self._open(effective, known.table)

    async def _start(self, effective: EffectiveModel, directory: Path, backend: type[Backend], known: Known, pause: float) -> WarmUp:
        assert self.inspection is not None
        await self.instances.make(effective, directory, backend, self.inspection, self._look)
        if self.state is VersionState.LOADING:
            self.move(VersionState.WARMING)
        on_lost = functools.partial(self._on_lost, self)
        return await self.instances.warm_up(effective, known, self.inspection.recorded, pause, on_lost)

    def _drift_subject(self, effective: EffectiveModel, predecessor: ModelVersion | None) -> Subject | None:
        if self._drift is None:
            return None
        published = self.inspection.reference if self.inspection is not None else None
        # What was seen of tensors that something else was done to says nothing of these.
        old = predecessor.effective if predecessor is not None else None
        is_alike = old is not None and old.processing == effective.processing
        before = predecessor._watch if predecessor is not None and is_alike else None
        return drift_subject(self.version, effective, published, before, self.counters)

    def _open(self, effective: EffectiveModel, before: LatencyTable | None) -> None:
        counters = self.counters
        encoder = ResponseEncoder(self.model, str(self.version), effective.signature.outputs, effective.labels)
        allowed = effective.batching.allowed_batch_sizes
        table = LatencyTable(
            self.latencies,
            effective.signature.max_batch_size,
            self.instances.interference(),
            is_stepped=bool(allowed),
            before=before,
        )
        batcher = Batcher(
            self.name,
            effective.batching,
            latencies=table,
            clock=self._clock,
            timer=self._timer(),
            schedule=self._schedule,
            shard=counters.shard(),
            on_dropped=self._records.dropped if self._records is not None else None,
            instances=effective.instances.count,
            on_lost=self._hear_of_loss,
        )
        attached = [attachment.attach(self.version, effective) for attachment in self._attachments]
        self._attached = [each for each in attached if each is not None]
        observers = [*([self._watch] if self._watch is not None else []), *self._attached]
        inline = inline_rows(self.latencies, table.worthwhile) if self._may_run_inline(effective) else 0
        self.instances.serve(
            batcher,
            lambda: BatchRunner(self.name, effective.signature, encoder, allowed, counters.shard(), self._records, observers),
            inline,
        )
        log.debug("instances opened", version=self.name, batch_limit=table.worthwhile, inline_rows=inline)
        self._batcher = batcher

    @staticmethod
    def _may_run_inline(effective: EffectiveModel) -> bool:
        """Only where the warm-up tells what a request costs: with free dimensions or strings one row can be of any size."""
        signature = effective.signature
        is_known = not has_free_dimension(signature) and all(spec.datatype.itemsize for spec in signature.inputs)
        return is_known and effective.instances.count == 1 and not effective.batching.max_queue_delay

    def _log_live(self) -> None:
        assert self.effective is not None
        for note in self.effective.notes:
            log.info("version noted", model=self.model, version=self.version, note=note)
        log.info(
            "version live",
            model=self.model,
            version=self.version,
            backend=self.effective.backend,
            max_batch_size=self.effective.signature.max_batch_size,
            instances=self.effective.instances.count,
            devices=self.instances.devices,
            seconds=round(self.load_seconds, 3),
        )

    def hand_over(self, successor: ModelVersion) -> None:
        """Let `successor` answer what waits here and names no version, if it takes the same requests.

        At a flip both run on the same cores, and what was asked first would wait for what was asked after it.
        """
        if self._batcher is not None and successor._batcher is not None and self.signature == successor.signature:
            self._batcher.hand_over(successor._batcher)

    def screen_outputs(self, on: bool) -> None:
        """Count answers with NaN or infinity from the next batch on, or no longer. For a version that is live."""
        self.instances.screen_outputs(on)

    # -- lost devices --------------------------------------------------------------------------------------------------

    def _hear_of_loss(self, instance: Instance, error: DeviceLost) -> None:
        """From the instance's thread."""
        with contextlib.suppress(RuntimeError):  # the loop may be gone
            self._loop.call_soon_threadsafe(self._lose, instance, error)

    def _lose(self, instance: Instance, error: DeviceLost) -> None:
        found = self.instances.find(instance)
        if found is not None:
            self._on_lost(self, *found, error)

    def take_out(self, workers: Sequence[Worker], error: DeviceLost) -> None:
        """These run nothing any more; what waits goes to the others. Without others the version has failed, and what waits is refused."""
        left = self.instances.take_out(workers)
        if self._batcher is not None:
            for worker in workers:
                self._batcher.lose(worker, error)
        log.error("instances lost", version=self.name, lost=len(workers), left=left, reason=str(error))
        if left or self._batcher is None:
            return
        refusal = NotReady(f"Request for unknown model: '{self.model}' version {self.version} is not at ready state: {error}")
        if self.state is VersionState.LIVE:
            self.is_lost = True
            self._batcher.stop_admitting(refusal, lambda: None)
            self._fail(str(error))
        self._batcher.fail_queued(refusal)

    # -- the end -------------------------------------------------------------------------------------------------------

    async def unload(self, grace: float, reason: str = "unloaded") -> None:
        """Drain what was admitted for at most `grace` seconds, fail the rest, and give everything back. Idempotent."""
        deadline = time.monotonic() + grace
        if self.state is VersionState.LIVE:
            self.move(VersionState.DRAINING, reason)
            await self._drain(grace)
            self.move(VersionState.UNLOADING, reason)
        elif self.state is VersionState.FAILED:
            self.move(VersionState.UNLOADED, self.reason)
            await self.put_away(deadline)
            return
        else:
            return
        await self.put_away(deadline)
        self.move(VersionState.UNLOADED, reason)
        log.info("version unloaded", model=self.model, version=self.version, reason=reason)

    async def put_away(self, deadline: float = 0.0) -> None:
        """Give everything back that serving took. Instances that are inside a call have until `deadline` to end it. Idempotent."""
        await self.instances.close(deadline)
        self._batcher = None
        if self._drift is not None and self._watch is not None:
            self._drift.forget(self._watch)
            self._watch = None
        for attached in self._attached:
            attached.close()
        self._attached = []
        self._release()

    async def _drain(self, grace: float) -> None:
        assert self._batcher is not None
        loop = asyncio.get_running_loop()
        drained = asyncio.Event()
        error = NotReady(f"Request for unknown model: '{self.model}' version {self.version} is not at ready state")

        def report() -> None:
            # After the grace nobody waits for this any more, and the loop itself may be gone.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(drained.set)

        self._batcher.stop_admitting(error, report)
        try:
            async with asyncio.timeout(grace):
                await drained.wait()
        except TimeoutError:
            if drained.is_set() or not self._batcher.unsettled:
                return
            count = self._batcher.fail_queued(NotReady(f"{self.name} was unloaded before the request could run"))
            log.warning("drain cut short", model=self.model, version=self.version, seconds=grace, failed=count)


_EVENTS = {
    VersionState.FETCHING: "loading",
    VersionState.LIVE: "live",
    VersionState.FAILED: "failed",
    VersionState.UNLOADED: "unloaded",
}


def event_of(version: ModelVersion) -> tuple[str, dict[str, str]] | None:
    """What the event log says of a version that has just changed its state: kind and fields. An end counts only where it was live."""
    kind = _EVENTS.get(version.state)
    if kind is None or (version.state is VersionState.UNLOADED and not version.load_seconds):
        return None
    fields = {"token": version.key.token, "location": version.want.location}
    if version.inspection is not None and version.inspection.digest:
        fields["digest"] = version.inspection.digest
    return kind, fields


def learnt_of(before: ModelVersion | None, effective: EffectiveModel) -> Known:
    """What the warm-up of `before` found out, if that takes and gives the same as `effective` and runs in the same way."""
    if before is None or before.effective is None:
        return NOTHING_KNOWN
    old = before.effective
    is_alike = (old.backend, old.signature, old.batching, old.instances, old.processing) == (
        effective.backend, effective.signature, effective.batching, effective.instances, effective.processing,
    )  # fmt: skip
    has_same_graph = bool(old.artifact.graph) and old.artifact.graph == effective.artifact.graph
    table = before._batcher.latencies if before._batcher is not None else None
    return Known(before.latencies, has_same_graph, table) if is_alike else NOTHING_KNOWN
