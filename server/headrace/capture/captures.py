"""Sampled requests with their answers, on their way to the disk: taken after the replies have left, written by a thread of its own.

The way of a request. `look` (the thread that ran the batch) asks the sampler, and keeps what is chosen by reference, without copying: a
view of the received message, and the batch's outputs. The thread cuts out the rows, encodes and writes.

Rules for changing this file: `look` does as good as nothing where nothing is chosen, never waits for the disk and never raises; what is
redacted never reaches the encoder.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from headrace.batching.observer import Array, RanBatch
from headrace.capture.records import Buffer, Captured, CapturedTensor, encode_record
from headrace.capture.ring import Ring
from headrace.capture.sampling import CaptureSampler
from headrace.lifecycle.effective import EffectiveModel
from headrace.requests import DeviceMemory, InputTensor, TensorBytes, Ticket
from headrace.signature import Signature
from headrace.telemetry.log import get_logger
from headrace.threads import be_patient
from headrace.wire.tensors import encode_bytes_tensor

log = get_logger(__name__)

INTERVAL = 0.25
"""Seconds for which requests gather before they are written."""
MOST_PENDING = 64 << 20
"""Bytes that are kept and not yet written. More come when the disk is slower than what is to be written to it."""

STRING = 40
"""Bytes of a bytes object beside its content, about."""

CAUSES = ("rate", "memory", "shared_memory", "too_large", "error")
"""Why a chosen request is not captured: beyond capture_max_per_second; beyond MOST_PENDING; its inputs lie in its client's memory, which
is the client's again; it would take more than half of the ring; it could not be written."""


@dataclass(slots=True)
class CaptureCounts:
    captured: int = 0
    bytes: int = 0
    skipped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0))


@dataclass(frozen=True, slots=True)
class _Pending:
    """`outputs`: index in the signature, and the batch's whole array, of which rows from `start` on are its own."""

    owner: VersionCapture
    id: str
    at: float
    rows: int
    start: int
    inputs: Sequence[InputTensor | None]
    outputs: Sequence[tuple[int, Array]]
    nbytes: int


class VersionCapture:
    """One version's part. `counts` are changed under the lock of its `Captures`."""

    def __init__(self, captures: Captures, model: str, version: int, signature: Signature, redacted: frozenset[str]) -> None:
        self._captures = captures
        self.model = model
        self.version = version
        self.signature = signature
        self.redacted = redacted
        self.counts = CaptureCounts()
        self._is_closed = False

    def __repr__(self) -> str:
        return f"VersionCapture({self.model}:{self.version}, {self.counts!r})"

    def look(self, batch: RanBatch) -> None:
        if self._is_closed:
            return
        try:
            self._captures.take(self, batch)
        except Exception:
            # Wrong with one, wrong with all: not a traceback for each batch from now on.
            self._is_closed = True
            log.exception("capture failed and stops", model=self.model, version=self.version)

    def close(self) -> None:
        self._captures.forget(self)


class Captures:
    """Owns the sampler, what waits to be written, the ring and the thread that writes it. `start` and `stop`: once each."""

    def __init__(self, directory: Path, *, fraction: float, per_second: float, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._sampler = CaptureSampler(fraction, per_second, time.monotonic())
        self._pending: deque[_Pending] = deque()
        self._pending_bytes = 0
        self._versions: tuple[VersionCapture, ...] = ()
        self._ring: Ring | None = None
        self._has_work = threading.Event()
        self._is_stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_failing = False
        self.errors = 0
        """Writes that failed."""

    def __repr__(self) -> str:
        return f"Captures({self._ring!r}, {len(self._versions)} versions, {len(self._pending)} pending, {self.errors} errors)"

    def start(self) -> None:
        """Open the ring. Blocking; raises ConfigError for a directory that cannot be used."""
        self._ring = Ring(self._directory, self._max_bytes)
        self._thread = threading.Thread(target=self._run, args=(self._ring,), name="capture", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write what is pending and close. Blocks; does nothing where `start` failed."""
        self._is_stopping.set()
        self._has_work.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def versions(self) -> Sequence[VersionCapture]:
        return self._versions

    @property
    def ring_bytes(self) -> int:
        return self._ring.size if self._ring is not None else 0

    def attach(self, version: int, effective: EffectiveModel) -> VersionCapture | None:
        config = effective.config.capture
        if not config.enabled:
            return None
        made = VersionCapture(self, effective.config.name, version, effective.signature, frozenset(config.redact))
        self._versions = (*self._versions, made)
        return made

    def forget(self, version: VersionCapture) -> None:
        """Its requests that wait are still written."""
        self._versions = tuple([each for each in self._versions if each is not version])

    # -- the thread that ran the batch ---------------------------------------------------------------------------------

    def take(self, owner: VersionCapture, batch: RanBatch) -> None:
        tickets = batch.tickets
        with self._lock:
            chosen, too_fast = self._sampler.choose(len(tickets), batch.done)
            owner.counts.skipped["rate"] += too_fast
        if not chosen:
            return
        starts, start = [], 0
        for ticket in tickets:
            starts.append(start)
            start += ticket.rows
        now, clock = time.monotonic(), time.time()
        batch = batch.to_keep()
        for position in chosen:
            ticket = tickets[position]
            self._keep(_pending(owner, batch, ticket, starts[position], clock - (now - ticket.arrived)))
        self._has_work.set()

    def _keep(self, pending: _Pending) -> None:
        lies_elsewhere = any(tensor is not None and _is_shared(tensor.data) for tensor in pending.inputs)
        with self._lock:
            skipped = pending.owner.counts.skipped
            if lies_elsewhere:
                skipped["shared_memory"] += 1
            elif self._pending_bytes and self._pending_bytes + pending.nbytes > MOST_PENDING:
                skipped["memory"] += 1
            else:
                self._pending.append(pending)
                self._pending_bytes += pending.nbytes

    # -- the capture thread --------------------------------------------------------------------------------------------

    def _run(self, ring: Ring) -> None:
        be_patient()
        while not self._is_stopping.is_set():
            self._has_work.wait()
            self._has_work.clear()
            self._is_stopping.wait(INTERVAL)
            self._write_pending(ring)
        self._write_pending(ring)
        ring.close()

    def _write_pending(self, ring: Ring) -> None:
        for _ in range(len(self._pending)):
            pending = self._pending.popleft()
            counts, cause, record = pending.owner.counts, "", b""
            try:
                record = encode_record(_captured(pending))
                if len(record) > ring.largest_record:
                    cause = "too_large"
                else:
                    ring.append(record)
                    self._recover()
            except OSError as error:
                cause = "error"
                self._fail(error.strerror or str(error))
            except Exception as error:  # one request that cannot be encoded has nothing to do with the next
                cause = "error"
                log.exception("request not captured", model=pending.owner.model, version=pending.owner.version)
                self._fail(str(error))
            with self._lock:
                self._pending_bytes -= pending.nbytes
                if cause:
                    counts.skipped[cause] += 1
                else:
                    counts.captured += 1
                    counts.bytes += len(record)

    def _fail(self, reason: str) -> None:
        self.errors += 1
        if not self._is_failing:
            self._is_failing = True
            log.error("captures not written", directory=str(self._directory), reason=reason)

    def _recover(self) -> None:
        if self._is_failing:
            self._is_failing = False
            log.info("captures written again", directory=str(self._directory))


def _pending(owner: VersionCapture, batch: RanBatch, ticket: Ticket, start: int, at: float) -> _Pending:
    redacted, specs = owner.redacted, owner.signature.outputs
    names = {specs[index].name: index for index in ticket.outputs}
    outputs = [(names[name], array) for name, array in zip(batch.outputs, batch.arrays, strict=True) if name in names]
    # A redacted input's view is not kept, though its message may be, by that of another one; redacted outputs are not read.
    inputs = [
        InputTensor(tensor.name, tensor.datatype, tensor.shape, b"") if tensor is not None and tensor.name in redacted else tensor
        for tensor in ticket.inputs
    ]
    nbytes = _size([tensor.data for tensor in inputs if tensor is not None]) + sum([array.nbytes for _, array in outputs])
    return _Pending(owner, ticket.id, at, ticket.rows, start, inputs, outputs, nbytes)


def _size(inputs: Sequence[TensorBytes]) -> int:
    """What is kept in memory by keeping these: a view keeps its whole message."""
    messages: dict[int, int] = {}
    strings = 0
    for data in inputs:
        if isinstance(data, (bytes, memoryview)):
            whole = data.obj if isinstance(data, memoryview) else data
            messages[id(whole)] = memoryview(whole).nbytes
        elif not isinstance(data, DeviceMemory):
            elements: list[bytes] = data.ravel().tolist()
            strings += sum([STRING + len(element) for element in elements])
    return strings + sum(messages.values())


def _is_shared(data: TensorBytes) -> bool:
    """A view of something else than a received message: of a region of shared memory."""
    return isinstance(data, DeviceMemory) or (isinstance(data, memoryview) and not isinstance(data.obj, bytes))


def _captured(pending: _Pending) -> Captured:
    owner = pending.owner
    signature, redacted = owner.signature, owner.redacted
    inputs = [
        CapturedTensor(tensor.name, tensor.datatype, tensor.shape, None if tensor.name in redacted else _input_bytes(tensor.data))
        for tensor in pending.inputs
        if tensor is not None
    ]
    outputs = []
    for index, whole in pending.outputs:
        spec = signature.outputs[index]
        array = whole[pending.start : pending.start + pending.rows] if signature.is_batching else whole
        data = None if spec.name in redacted else output_bytes(array)
        outputs.append(CapturedTensor(spec.name, spec.datatype.value, tuple(array.shape), data))
    return Captured(owner.model, owner.version, pending.id, pending.at, pending.rows, signature.is_batching, tuple(inputs), tuple(outputs))


def _input_bytes(data: TensorBytes) -> Buffer:
    assert not isinstance(data, DeviceMemory), "what lies elsewhere is not captured"
    return data if isinstance(data, (bytes, memoryview)) else encode_bytes_tensor(data)


def output_bytes(array: Array) -> Buffer:
    return encode_bytes_tensor(array) if array.dtype == object or array.dtype.kind in "SU" else array.tobytes()
