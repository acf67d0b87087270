"""One version's drift: batches are sampled after their answers have left, counted a second's worth at a time, and windows judged.

The way of a batch. `look` (the thread that ran it) keeps one of so many batches, without copying; the counting thread (monitor.py)
joins what has gathered and counts it at once; a window that is full ends in verdicts, and those in alerts. With a budget of 0 every
batch is counted on the thread that ran it: then nothing is left out, and requests pay for it.

Rules for changing this file: `look` does as good as nothing for a batch that is not kept, never waits and never raises; a watch belongs
to one version for its whole life, so that no window can hold the rows of two.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.batching.observer import RanBatch
from headrace.config import DriftConfig
from headrace.drift.alarms import Alarms, findings
from headrace.drift.building import ReferenceBuilder, from_counts
from headrace.drift.counting import BatchCounter, Counts
from headrace.drift.extraction import as_numbers
from headrace.drift.features import Side
from headrace.drift.joining import Arrays, Kept, is_borrowed, join
from headrace.drift.judgement import Histograms, judge
from headrace.drift.plan import Plan
from headrace.drift.reference import Reference
from headrace.drift.reference_file import identified
from headrace.drift.sampling import SAVED, Budget
from headrace.drift.sequential import SlowDrift
from headrace.drift.verdict import Alert, DriftReport, WindowVerdict
from headrace.drift.window import Window, Windows
from headrace.signature import DataType, Signature
from headrace.telemetry.counters import VersionCounters
from headrace.telemetry.log import get_logger

log = get_logger(__name__)

MOST_BATCHES = 1024
MOST_BYTES = 32 << 20
"""Of one version, kept and not yet counted."""
LONGEST_PAUSE = 1.0
"""Seconds after which a batch is kept although it is not its turn: what was too many in a burst is few when that is over."""
KEPT_VERDICTS = 288
KEPT_ALERTS = 100

Publish = Callable[[Sequence[Alert]], None]


@dataclass(frozen=True, slots=True)
class Subject:
    """What is watched. `reference` None: it is learnt from the first rows, as `plan` has it."""

    model: str
    version: int
    config: DriftConfig
    signature: Signature
    plan: Plan
    reference: Reference | None
    counters: VersionCounters


class DriftWatch:
    """Owns all that is counted of one version's rows. `look` and `report` from any thread, `count_pending` on the counting thread."""

    def __init__(self, subject: Subject, wake: Callable[[], None], publish: Publish) -> None:
        self._subject = subject
        self._config = config = subject.config
        self._counters = subject.counters
        self._has_rows = subject.signature.is_batching
        specs = ((Side.INPUT, subject.signature.inputs), (Side.OUTPUT, subject.signature.outputs))
        self._bf16 = frozenset([(side, spec.name) for side, specs in specs for spec in specs if spec.datatype is DataType.BF16])
        self._wake = wake
        self._publish = publish
        self._pending: deque[Kept] = deque()
        self._pending_bytes = 0
        self._countdown = 1
        self._due = 0.0
        self._budget = Budget(config.budget)
        self._is_exact = config.budget == 0
        self._is_closed = False
        self._counting = threading.Lock()
        """Held while rows are counted and judged; one count at a time."""
        self._lock = threading.Lock()
        """Held while what `report` reads changes, and for no longer."""
        self._seen = self._dropped = 0
        self._cpu = 0.0
        self._ran = self._busy = 0.0
        self._adjusted = self._began = time.monotonic()
        self._alarms = Alarms(subject.model, subject.version)
        self._past: deque[Alert] = deque(maxlen=KEPT_ALERTS)
        self._history: deque[WindowVerdict] = deque(maxlen=KEPT_VERDICTS)
        self._sliding: WindowVerdict | None = None
        self._evidence: dict[int, float] = {}
        self._builder: ReferenceBuilder | None = None
        self._compared: _Compared | None = None
        self._tensors = subject.plan.tensors
        if subject.reference is not None:
            self._compare_with(subject.reference)
        else:
            self._builder = ReferenceBuilder(subject.model, subject.plan, bins=config.bins)

    def __repr__(self) -> str:
        return f"DriftWatch({self._subject.model}:{self._subject.version}, seen={self._seen}, {self._budget!r}, {self._alarms!r})"

    # -- any thread ----------------------------------------------------------------------------------------------------

    def look(self, batch: RanBatch) -> None:
        # Several threads may count down together; then some other batch is kept.
        self._countdown -= 1
        if self._countdown > 0 and batch.done < self._due:
            return
        if batch.done > self._due + SAVED:
            self._budget.rest()
        self._countdown, self._due = self._budget.stride, batch.done + LONGEST_PAUSE
        if self._is_closed:
            return
        try:
            batch = batch.to_keep()
            kept = Kept(batch.tickets[0].key, batch.rows, batch.inputs, batch.outputs, batch.arrays)
            if self._is_exact:
                self._count_now([kept])
                self._wake()  # a window may have to end by time alone
            else:
                self._budget.keep(batch.rows)
                self._keep(kept)
        except Exception:
            self._give_up()

    def _keep(self, batch: Kept) -> None:
        # The bytes are summed up without a lock: they bound memory, and need not be exact.
        if len(self._pending) >= MOST_BATCHES or self._pending_bytes + batch.nbytes > MOST_BYTES:
            with self._lock:
                self._dropped += batch.rows
            return
        shared = {name: array.copy() for name, array in batch.inputs.items() if is_borrowed(array)}
        self._pending_bytes += batch.nbytes
        self._pending.append(batch._replace(inputs={**batch.inputs, **shared}) if shared else batch)
        self._wake()

    def _give_up(self) -> None:
        """Something is wrong with counting: it must not be wrong with every batch from now on."""
        log.exception("drift counting failed and stops", model=self._subject.model, version=self._subject.version)
        self.close()

    def report(self) -> DriftReport:
        counters = self._counters
        rows = counters.rows()
        with self._lock:
            compared, builder = self._compared, self._builder
            return DriftReport(
                model=self._subject.model,
                version=self._subject.version,
                reference=compared.reference if compared is not None else None,
                learnt_rows=builder.rows if builder is not None else 0,
                learn_rows=self._config.learn_rows if builder is not None else 0,
                totals=compared.totals.copy() if compared is not None else None,
                latest=compared.latest if compared is not None else None,
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
                config=self._config,
            )

    def _pending_rows(self) -> int:
        return sum([batch.rows for batch in self._pending.copy()])

    def close(self) -> None:
        """The version goes: nothing is kept any more. What is raised ends with it, and nobody is told: that would read as a recovery."""
        self._is_closed = True
        with self._lock:
            self._pending.clear()
            self._past.extend(self._alarms.end(time.time(), self._seen, time.monotonic() - self._began))

    def live_reference(self, plan: Plan) -> Reference | None:
        """What was seen of this version, as a reference for the next one; None where that watches something else, or too little was."""
        with self._lock:
            compared = self._compared
            if compared is None or compared.totals.rows < self._config.learn_rows:
                return None
            totals = compared.totals.copy()
        if not plan.watches_the_same([each.feature for each in compared.reference.features]):
            return None
        return identified(from_counts(compared.reference, totals, f"version {self._subject.version}"))

    # -- counting ------------------------------------------------------------------------------------------------------

    def count_pending(self) -> bool:
        """Count what has gathered; whether there is an open window that time alone may end. Counting thread."""
        with self._lock:  # `close` empties it as well
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
        reference = identified(self._builder.build("learnt"))
        with self._lock:
            self._builder = None
            self._compare_with(reference)
        log.info(
            "drift reference learnt",
            model=self._subject.model,
            version=self._subject.version,
            rows=reference.rows,
            features=len(reference.features),
        )

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
        # A jump is told of as such. When it is over, it is no slow drift either.
        compared.slow.restart(tumbling.drifting)
        evidence = compared.slow.evidence()
        found = findings(reference, window.counts, tumbling, sliding, evidence)
        with self._lock:
            self._history.append(tumbling)
            compared.latest = window.counts
            self._sliding = sliding
            self._evidence = evidence
            if self._is_closed:
                return
            news = self._alarms.update(reference, found, window.ended, self._seen, time.monotonic() - self._began)
            self._past.extend(news)
        if news:
            self._publish(news)

    def _adjust(self, cpu: float, kept: int) -> None:
        now = time.monotonic()
        busy, ran = self._counters.busy_seconds()
        self._budget.spend(cpu, kept, ran=ran - self._ran, busy=busy - self._busy, seconds=max(now - self._adjusted, 1e-3))
        self._adjusted, self._busy, self._ran = now, busy, ran
        self._countdown = min(self._countdown, self._budget.stride)


class _Compared:
    """What there is once there is a reference."""

    __slots__ = ("counter", "histograms", "latest", "reference", "slow", "totals", "windows")

    def __init__(self, reference: Reference, config: DriftConfig) -> None:
        self.reference = reference
        self.counter = BatchCounter(reference)
        self.totals = Counts.zero(reference)
        self.latest: Counts | None = None
        self.windows = Windows(reference, config, time.time())
        self.histograms = Histograms(reference)
        self.slow = SlowDrift(reference, config, self.histograms)
