"""Drift, driven: batches are sampled after their answers have left, counted on one thread, and every window is judged.

The way of a batch. `DriftWatch.look` (the thread that ran it) keeps every so many-th batch, without copying; the counting thread joins
what has gathered for a second and counts it at once, which costs a tenth of counting each alone; a window that is full
ends in verdicts, and those in alerts, which leave for the event loop.

The budget. Each version earns CPU time, a part of what its batches took and a little that passes by itself, so that a version with
little to do is counted whole; counting spends it; from both follows which part of the batches is kept. With a budget of 0 every batch
is counted, on the thread that ran it: then nothing is left out, and requests pay for it.

Rules for changing this file: `look` does as good as nothing for a batch that is not kept, never waits and never raises; a watch belongs
to one version for its whole life, so that no window can hold the rows of two.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.batching.observer import RanBatch
from headrace.config import DriftConfig
from headrace.drift.alarms import Alarms, findings
from headrace.drift.building import ReferenceBuilder, from_counts
from headrace.drift.counting import BatchCounter, Counts
from headrace.drift.extraction import as_numbers
from headrace.drift.features import Side
from headrace.drift.judgement import Histograms, judge
from headrace.drift.plan import Plan
from headrace.drift.reference import Reference
from headrace.drift.sequential import SlowDrift
from headrace.drift.verdict import Alert, DriftReport, WindowVerdict
from headrace.drift.window import Window, Windows
from headrace.signature import DataType, Signature
from headrace.telemetry.counters import VersionCounters
from headrace.telemetry.log import get_logger
from headrace.threads import be_patient

log = get_logger(__name__)

Array = NDArray[Any]
Arrays = Mapping[str, Array]

INTERVAL = 1.0
"""Seconds for which batches gather. Of 37 features one count takes 210 µs and then 2 µs a row, so it is shared by as many rows as come
before anybody can want to know."""
FLOOR = 0.002
"""CPU seconds that a version may spend each second whatever it does. One that answers ten requests a second is counted whole; many of
them together cannot cost more than they are asked."""
SAVED = 2.0
"""Seconds of earning that can be saved up."""
TAKE = 3e-6
"""CPU seconds that keeping a batch costs the thread that ran it."""
MOST_BATCHES = 1024
MOST_BYTES = 32 << 20
"""Of one version, kept and not yet counted."""
JOINED_BYTES = 1 << 20
"""Larger tensors cost so much each that joining them saves nothing."""
KEPT_VERDICTS = 288
KEPT_ALERTS = 100

Publish = Callable[[list[Alert]], None]


class Kept(NamedTuple):
    """Of a batch what is counted: without its requests, and without whoever waited for them. `key`: equal for equal shapes of inputs."""

    key: Hashable
    rows: int
    inputs: Arrays
    outputs: Sequence[str]
    arrays: Sequence[Array]

    @property
    def nbytes(self) -> int:
        return sum([array.nbytes for array in (*self.inputs.values(), *self.arrays)])


class DriftWatch:
    """Owns all that is counted of one version's rows. `look` and `report` from any thread, `count_pending` on the counting thread."""

    def __init__(
        self,
        model: str,
        version: int,
        config: DriftConfig,
        plan: Plan,
        counters: VersionCounters,
        *,
        reference: Reference | None,
        signature: Signature,
        wake: Callable[[], None],
        publish: Publish,
    ) -> None:
        self.model = model
        self.version = version
        self.plan = plan
        self._config = config
        self._counters = counters
        self._has_rows = signature.is_batching
        specs = ((Side.INPUT, signature.inputs), (Side.OUTPUT, signature.outputs))
        self._bf16 = frozenset([(side, spec.name) for side, specs in specs for spec in specs if spec.datatype is DataType.BF16])
        self._wake = wake
        self._publish = publish
        self._pending: deque[Kept] = deque()
        self._pending_bytes = 0
        self._countdown = 1
        self._stride = 1
        self._is_exact = config.budget == 0
        self._is_closed = False
        self._counting = threading.Lock()
        """Held while rows are counted and judged; one count at a time."""
        self._lock = threading.Lock()
        """Held while what `report` reads changes, and for no longer."""
        self._seen = self._dropped = 0
        self._cpu = 0.0
        self._allowance = 0.0
        self._cost = 0.0
        self._fixed = math.inf
        self._busy = self._batches = 0.0
        self._adjusted = self._began = time.monotonic()
        self._alarms = Alarms(model, version)
        self._past: deque[Alert] = deque(maxlen=KEPT_ALERTS)
        self._history: deque[WindowVerdict] = deque(maxlen=KEPT_VERDICTS)
        self._sliding: WindowVerdict | None = None
        self._evidence: dict[int, float] = {}
        self._builder: ReferenceBuilder | None = None
        self._compared: _Compared | None = None
        self._tensors = plan.tensors
        if reference is not None:
            self._compare_with(reference)
        else:
            self._builder = ReferenceBuilder(model, plan, bins=config.bins)

    def __repr__(self) -> str:
        return f"DriftWatch({self.model}:{self.version}, seen={self._seen}, every {self._stride}th batch, {self._alarms!r})"

    # -- any thread ----------------------------------------------------------------------------------------------------

    def look(self, batch: RanBatch) -> None:
        # Several threads may count down together; then some other batch is kept.
        self._countdown -= 1
        if self._countdown > 0:
            return
        self._countdown = self._stride
        if self._is_closed:
            return
        try:
            kept = Kept(batch.tickets[0].key, batch.rows, batch.inputs, batch.outputs, batch.arrays)
            if self._is_exact:
                self._count_now([kept])
            else:
                self._keep(kept)
        except Exception:
            self._give_up()

    def _keep(self, batch: Kept) -> None:
        # The bytes are summed up without a lock: they bound memory, and need not be exact.
        if len(self._pending) >= MOST_BATCHES or self._pending_bytes + batch.nbytes > MOST_BYTES:
            with self._lock:
                self._dropped += batch.rows
            return
        # Writeable and not its own: a region of shared memory, which is its client's again.
        shared = {name: array.copy() for name, array in batch.inputs.items() if array.flags.writeable and array.base is not None}
        self._pending_bytes += batch.nbytes
        self._pending.append(batch._replace(inputs={**batch.inputs, **shared}) if shared else batch)
        self._wake()

    def _give_up(self) -> None:
        """Something is wrong with counting: it must not be wrong with every batch from now on."""
        log.exception("drift counting failed and stops", model=self.model, version=self.version)
        self.close()

    def report(self) -> DriftReport:
        counters = self._counters
        rows = counters.rows()
        with self._lock:
            compared, builder = self._compared, self._builder
            return DriftReport(
                model=self.model,
                version=self.version,
                reference=compared.reference if compared is not None else None,
                learnt_rows=builder.rows if builder is not None else 0,
                learn_rows=self._config.learn_rows if builder is not None else 0,
                totals=compared.totals.copy() if compared is not None else None,
                seen_rows=self._seen,
                skipped_rows=max(rows - self._seen - self._dropped - self._pending_rows(), 0),
                dropped_rows=self._dropped,
                cpu_seconds=self._cpu,
                tumbling=self._history[-1] if self._history else None,
                sliding=self._sliding,
                slow=dict(self._evidence),
                alerts=self._alarms.raised,
                history=tuple(self._history),
                past_alerts=tuple(self._past),
            )

    def _pending_rows(self) -> int:
        return sum([batch.rows for batch in self._pending.copy()])

    def close(self) -> None:
        """The version goes: nothing is kept any more, and what is raised is over."""
        self._is_closed = True
        self._stride = self._countdown = 1 << 60
        with self._lock:
            self._pending.clear()
            news = self._alarms.end(time.time(), self._seen, time.monotonic() - self._began)
            self._past.extend(news)
        if news:
            self._publish(news)

    def live_reference(self, plan: Plan) -> Reference | None:
        """What was seen of this version, as a reference for the next one; None where that watches something else, or too little was."""
        with self._lock:
            compared = self._compared
            if compared is None or compared.totals.rows < self._config.learn_rows:
                return None
            totals = compared.totals.copy()
        if not plan.watches_the_same([each.feature for each in compared.reference.features]):
            return None
        return from_counts(compared.reference, totals, f"version {self.version}")

    # -- counting ------------------------------------------------------------------------------------------------------

    def count_pending(self) -> bool:
        """Count what has gathered; whether there is an open window that time alone may end. Counting thread."""
        batches = [self._pending.popleft() for _ in range(len(self._pending))]
        began = time.thread_time()
        try:
            if batches:
                self._pending_bytes = 0
                self._count_now(batches)
            elif self._compared is not None and not self._is_closed:
                self._end_old_window(self._compared)
        except Exception:
            self._give_up()
        if batches:
            self._adjust(time.thread_time() - began, len(batches))
        return self._compared is not None and not self._compared.windows.is_empty

    def _count_now(self, batches: Sequence[Kept]) -> None:
        began = time.thread_time()
        with self._counting:
            for inputs, outputs, rows in join(batches, self._tensors, self._has_rows):
                for side, name in self._bf16:
                    arrays = inputs if side is Side.INPUT else outputs
                    if name in arrays:
                        arrays[name] = as_numbers(arrays[name], is_bf16=True)
                if self._compared is not None:
                    self._count(self._compared, inputs, outputs, rows)
                else:
                    self._learn(inputs, outputs, rows)
        with self._lock:
            self._cpu += time.thread_time() - began

    def _compare_with(self, reference: Reference) -> None:
        self._compared = _Compared(reference, self._config)
        self._tensors = frozenset([(each.feature.side, each.feature.tensor) for each in reference.features])

    def _learn(self, inputs: Arrays, outputs: Arrays, rows: int) -> None:
        assert self._builder is not None
        self._builder.add(inputs, outputs, rows)
        with self._lock:
            self._seen += rows
        if self._builder.rows < self._config.learn_rows:
            return
        reference = self._builder.build("learnt")
        with self._lock:
            self._builder = None
            self._compare_with(reference)
        log.info("drift reference learnt", model=self.model, version=self.version, rows=reference.rows, features=len(reference.features))

    def _count(self, compared: _Compared, inputs: Arrays, outputs: Arrays, rows: int) -> None:
        counts = compared.counter.count(inputs, outputs, rows)
        with self._lock:
            self._seen += rows
            compared.totals.add(counts)
            ended = compared.windows.add(counts, time.time())
        if ended is not None:
            self._judge(compared, ended)

    def _end_old_window(self, compared: _Compared) -> None:
        with self._counting:
            with self._lock:
                ended = compared.windows.end_if_due(time.time())
            if ended is not None:
                self._judge(compared, ended)

    def _judge(self, compared: _Compared, window: Window) -> None:
        reference, config = compared.reference, self._config
        made = compared.histograms
        tumbling = judge(reference, window.counts, config, "tumbling", window.began, window.ended, made)
        whole = compared.windows.sliding()
        sliding = judge(reference, whole.counts, config, "sliding", whole.began, whole.ended, made) if whole is not None else None
        compared.slow.update(window.counts)
        evidence = compared.slow.evidence()
        found = findings(reference, window.counts, tumbling, sliding, evidence)
        with self._lock:
            self._history.append(tumbling)
            self._sliding = sliding
            self._evidence = evidence
            if self._is_closed:
                return
            news = self._alarms.update(reference, found, window.ended, self._seen, time.monotonic() - self._began)
            self._past.extend(news)
        if news:
            self._publish(news)

    # -- the budget ----------------------------------------------------------------------------------------------------

    def _adjust(self, cpu: float, kept: int) -> None:
        """Which part of the batches is kept from now on, after `kept` of them took `cpu` seconds."""
        now = time.monotonic()
        elapsed = max(now - self._adjusted, 1e-3)
        busy, batches = self._counters.busy_seconds()
        ran, worked = batches - self._batches, busy - self._busy
        self._adjusted, self._busy, self._batches = now, busy, batches
        earned = (self._config.budget * worked / elapsed + FLOOR) * INTERVAL
        self._allowance += earned * elapsed / INTERVAL - cpu - TAKE * kept
        self._allowance = min(self._allowance, earned * SAVED / INTERVAL)
        # What a count costs however few are in it, and each batch beyond that.
        self._fixed = min(self._fixed * 1.05, cpu)
        cost = (cpu - self._fixed) / kept + TAKE
        self._cost = cost if not self._cost else 0.7 * self._cost + 0.3 * cost
        affordable = (self._allowance + earned - self._fixed) / self._cost
        expected = ran * INTERVAL / elapsed
        self._stride = stride = max(math.ceil(expected / affordable), 1) if affordable > 0 else max(self._stride * 2, 2)
        self._countdown = min(self._countdown, stride)


class _Compared:
    """What there is once there is a reference."""

    __slots__ = ("counter", "histograms", "reference", "slow", "totals", "windows")

    def __init__(self, reference: Reference, config: DriftConfig) -> None:
        self.reference = reference
        self.counter = BatchCounter(reference)
        self.totals = Counts.zero(reference)
        self.windows = Windows(reference, config, time.time())
        self.histograms = Histograms(reference)
        self.slow = SlowDrift(reference, config, self.histograms)


def join(
    batches: Sequence[Kept], watched: frozenset[tuple[Side, str]], has_rows: bool
) -> Iterable[tuple[dict[str, Array], dict[str, Array], int]]:
    """Inputs, outputs and rows of batches of equal shapes put together, without padding and what is not watched. Each array gets a
    dimension of rows where it has none."""
    groups: dict[object, list[Kept]] = {}
    for position, batch in enumerate(batches):
        # Whether the outputs' shapes agree too is not known before they are looked at; those of large ones stay alone.
        shapes = tuple([array.shape[1:] if has_rows else array.shape for array in batch.arrays])
        key = (batch.key, tuple(batch.outputs), shapes) if batch.nbytes < JOINED_BYTES else position
        groups.setdefault(key, []).append(batch)
    for group in groups.values():
        first = group[0]
        inputs = {name: _joined([b.inputs[name] for b in group], group, has_rows) for name in first.inputs if (Side.INPUT, name) in watched}
        outputs = {
            name: _joined([b.arrays[index] for b in group], group, has_rows)
            for index, name in enumerate(first.outputs)
            if (Side.OUTPUT, name) in watched
        }
        yield inputs, outputs, sum([batch.rows for batch in group])


def _joined(arrays: Sequence[Array], group: Sequence[Kept], has_rows: bool) -> Array:
    parts = [array[: batch.rows] if has_rows else array[None] for array, batch in zip(arrays, group, strict=True)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class DriftMonitors:
    """Owns the counting thread, the watches and who is told of alerts. Made and closed on the event loop, where alerts arrive too."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watches: tuple[DriftWatch, ...] = ()
        self._subscribers: list[Callable[[Alert], None]] = []
        self._has_work = threading.Event()
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"DriftMonitors({len(self._watches)} versions)"

    def watch(
        self,
        model: str,
        version: int,
        config: DriftConfig,
        plan: Plan,
        counters: VersionCounters,
        *,
        reference: Reference | None,
        signature: Signature,
    ) -> DriftWatch:
        """Begin to watch a version, against `reference` or, without one, what is learnt from its first rows."""
        watch = DriftWatch(
            model,
            version,
            config,
            plan,
            counters,
            reference=reference,
            signature=signature,
            wake=self._wake,
            publish=self._publish,
        )
        self._watches = (*self._watches, watch)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="drift", daemon=True)
            self._thread.start()
        return watch

    def forget(self, watch: DriftWatch) -> None:
        watch.close()
        self._watches = tuple([each for each in self._watches if each is not watch])

    def subscribe(self, callback: Callable[[Alert], None]) -> Callable[[], None]:
        """Have `callback` called on the event loop with each alert that is raised or over. Returns the call that ends it."""
        self._subscribers.append(callback)

        def unsubscribe() -> None:
            if callback in self._subscribers:
                self._subscribers.remove(callback)

        return unsubscribe

    def close(self) -> None:
        """End the thread, after the count that it is in. Returns at once."""
        self._is_closed.set()
        self._has_work.set()

    def _wake(self) -> None:
        if not self._has_work.is_set():
            self._has_work.set()

    def _run(self) -> None:
        be_patient()
        may_end = False
        while not self._is_closed.is_set():
            # A window may end by time alone.
            self._has_work.wait(timeout=1.0 if may_end else None)
            self._has_work.clear()
            if self._is_closed.wait(INTERVAL):
                return
            may_end = False
            for watch in self._watches:
                may_end |= watch.count_pending()

    def _publish(self, news: list[Alert]) -> None:
        """From any thread."""
        for is_raised in (True, False):
            some = [alert for alert in news if alert.is_raised is is_raised]
            if some:
                # One line a window, however many features: what is worst comes first.
                texts = [alert.text for alert in sorted(some, key=lambda alert: -abs(alert.value / (alert.critical or 1.0)))]
                shown = {"model": some[0].model, "version": some[0].version, "rows": some[0].rows, "alerts": texts}
                (log.warning if is_raised else log.info)("drift found" if is_raised else "drift over", **shown)
        try:
            self._loop.call_soon_threadsafe(self._tell, news)
        except RuntimeError:
            pass  # the loop is gone, and with it everybody who would have been told

    def _tell(self, news: list[Alert]) -> None:
        for alert in news:
            for callback in list(self._subscribers):
                try:
                    callback(alert)
                except Exception:  # whoever is told must not keep the others from it
                    log.exception("drift alert not delivered", model=alert.model, version=alert.version)
