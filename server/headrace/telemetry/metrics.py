"""What /metrics says: families of the versions, made from their counters when somebody scrapes and at no other time."""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from headrace import __version__
from headrace.batching.latency import LatencyStats
from headrace.lifecycle.shadow import ShadowSnapshot
from headrace.lifecycle.state import VersionState
from headrace.lifecycle.view import VersionView
from headrace.telemetry.counters import DURATION_EDGES, ROW_EDGES, CounterSnapshot, DispatchReason, DropCause, FailureReason, Stage
from headrace.telemetry.drift_metrics import DriftFamilies
from headrace.telemetry.exemplars import Exemplars
from headrace.telemetry.exposition import Family, HistogramFamily, format_labels
from headrace.telemetry.gpu import Gpus, gpu_lines
from headrace.telemetry.machine import MachineCollector
from headrace.telemetry.shadow_metrics import shadow_lines

_VERSIONS_AT_ONCE = 8
"""One version takes 60 µs. The event loop gets a turn after so many: of 50 versions (4.6 ms) no stretch takes longer than 0.95 ms."""

_COUNTED_STATES = frozenset({VersionState.LIVE, VersionState.DRAINING, VersionState.UNLOADING})
"""Before it is live a version has counted nothing, and the series of an unloaded one vanish, as Triton's do."""

_HISTOGRAMS = (
    ("headrace_request_duration_seconds", Stage.REQUEST, "From the arrival of a request to its encoded answer."),
    ("headrace_queue_duration_seconds", Stage.QUEUE, "From a request's admission to the start of its batch."),
    ("headrace_compute_input_duration_seconds", Stage.COMPUTE_INPUT, "Gathering a batch's inputs, for each request in it."),
    ("headrace_compute_duration_seconds", Stage.COMPUTE, "Running the model on a batch, for each request in it."),
    ("headrace_compute_output_duration_seconds", Stage.COMPUTE_OUTPUT, "Encoding a batch's answers, for each request in it."),
)

_Count = Callable[[CounterSnapshot], float]

_COUNTERS: tuple[tuple[str, str, _Count], ...] = (
    ("headrace_rows_total", "Rows inferred, without padding.", lambda counts: counts.rows),
    ("headrace_batches_total", "Batches run.", lambda counts: counts.batches),
    ("headrace_padding_rows_total", "Rows added to reach an allowed batch size.", lambda counts: counts.padding),
    ("headrace_nonfinite_answers_total", "Answers with NaN or infinity, counted while a rollout watches.", lambda counts: counts.nonfinite),
    ("nv_inference_request_success", "Requests answered.", lambda counts: counts.success),
    ("nv_inference_count", "Rows inferred, without padding.", lambda counts: counts.rows),
    ("nv_inference_exec_count", "Batches run.", lambda counts: counts.batches),
    ("nv_inference_request_duration_us", "Microseconds of requests.", lambda counts: _microseconds(counts, Stage.REQUEST)),
    ("nv_inference_queue_duration_us", "Microseconds in the queue.", lambda counts: _microseconds(counts, Stage.QUEUE)),
    (
        "nv_inference_compute_input_duration_us",
        "Microseconds of gathering inputs.",
        lambda counts: _microseconds(counts, Stage.COMPUTE_INPUT),
    ),
    (
        "nv_inference_compute_infer_duration_us",
        "Microseconds of running the model.",
        lambda counts: _microseconds(counts, Stage.COMPUTE),
    ),
    (
        "nv_inference_compute_output_duration_us",
        "Microseconds of encoding answers.",
        lambda counts: _microseconds(counts, Stage.COMPUTE_OUTPUT),
    ),
)

_GAUGES: tuple[tuple[str, str, Callable[[VersionView], float]], ...] = (
    ("headrace_pending_rows", "Rows that wait in the queue.", lambda version: version.pending_rows),
    ("headrace_load_duration_seconds", "From discovery to live.", lambda version: version.load_seconds),
    ("nv_inference_pending_request_count", "Requests that wait in the queue.", lambda version: version.pending_requests),
    ("nv_model_load_duration_secs", "From discovery to live.", lambda version: version.load_seconds),
)

_OUTCOMES = {
    FailureReason.REJECTED: "rejected",
    FailureReason.CANCELED: "cancelled",
    FailureReason.BACKEND: "backend_error",
    FailureReason.OTHER: "invalid_or_other",
}


def _microseconds(counts: CounterSnapshot, stage: Stage) -> int:
    return round(counts.seconds[stage] * 1e6)


class VersionFamilies:
    """The families of one scrape. `add` each version once, then take the `lines`."""

    def __init__(self) -> None:
        self._states = Family("headrace_version_state", "gauge", "1 for the state that a version is in.")
        self._requests = Family("headrace_requests_total", "counter", "Requests by how they ended.")
        self._dispatches = Family("headrace_dispatches_total", "counter", "Batches by why they were started.")
        self._invalid = Family("headrace_invalid_values_total", "counter", "Values of inputs that model.toml does not allow.")
        self._drops = Family("headrace_drops_total", "counter", "Requests of no use, by why: not answered in time, or too late.")
        self._latencies = Family("headrace_batch_latency_seconds", "gauge", "What a batch of so many rows is expected to take now.")
        self._worthwhile = Family("headrace_worthwhile_rows", "gauge", "Rows beyond which another request is not added to a batch.")
        self._interference = Family(
            "headrace_interference_ratio", "gauge", "How much longer batches take on the device than their models alone."
        )
        self._failures = Family("nv_inference_request_failure", "counter", "Requests failed, by reason.")
        self._rows = HistogramFamily("headrace_batch_rows", "Rows of the batches that ran, without padding.", ROW_EDGES)
        self._stages = [(HistogramFamily(name, doc, DURATION_EDGES), stage) for name, stage, doc in _HISTOGRAMS]
        self._counters = [(Family(name, "counter", doc), count) for name, doc, count in _COUNTERS]
        self._gauges = [(Family(name, "gauge", doc), measure) for name, doc, measure in _GAUGES]

    def add(self, version: VersionView) -> None:
        labels = format_labels({"model": version.model, "version": str(version.version)})
        if version.state is not VersionState.UNLOADED:
            self._states.add(f'{labels},state="{version.state.value}"', 1)
        if version.state in _COUNTED_STATES:
            self._add_counts(labels, version.counters.snapshot(), version.counters.exemplars)
            for family, measure in self._gauges:
                family.add(labels, measure(version))
            for (tensor, problem, action), count in version.counters.invalid_values.items():
                self._invalid.add(f"{labels},{format_labels({'tensor': tensor, 'problem': problem, 'action': action})}", count)
            if version.latency_stats is not None:
                self._add_latencies(labels, version.latency_stats)

    def _add_latencies(self, labels: str, stats: LatencyStats) -> None:
        for estimate, seconds in (("mean", stats.mean), ("upper", stats.upper)):
            for rows, value in seconds.items():
                self._latencies.add(f'{labels},rows="{rows}",estimate="{estimate}"', value)
        self._worthwhile.add(labels, stats.worthwhile)
        self._interference.add(labels, stats.factor)

    def _add_counts(self, labels: str, counts: CounterSnapshot, exemplars: Exemplars) -> None:
        for histogram, stage in self._stages:
            histogram.add_histogram(labels, counts.buckets[stage], counts.seconds[stage], exemplars.of(stage))
        self._rows.add_histogram(labels, counts.row_buckets, counts.rows)
        for counter, count in self._counters:
            counter.add(labels, count(counts))
        self._requests.add(f'{labels},outcome="success"', counts.success)
        # All reasons from the start: a rate over a series that appears with its first failure misses that failure.
        for reason, outcome in _OUTCOMES.items():
            self._requests.add(f'{labels},outcome="{outcome}"', counts.failures[reason])
            self._failures.add(f'{labels},reason="{reason.name}"', counts.failures[reason])
        for dispatch in DispatchReason:
            self._dispatches.add(f'{labels},reason="{dispatch.name.lower()}"', counts.dispatches[dispatch])
        for cause in DropCause:
            self._drops.add(f'{labels},cause="{cause.name.lower()}"', counts.drops[cause])

    def lines(self, is_openmetrics: bool) -> list[str]:
        families = [self._states, self._requests, self._dispatches, self._drops, self._invalid, self._failures, self._rows]
        families += [self._latencies, self._worthwhile, self._interference]
        families += [family for family, _ in (*self._stages, *self._counters, *self._gauges)]
        return [line for family in families for line in family.lines(is_openmetrics)]


class MetricsRegistry:
    """One server's metrics, in no global registry, so that two servers in one process do not meet. Event loop only.

    Beside the versions it holds any prometheus_client collector that is registered; those have few samples.
    """

    def __init__(
        self,
        versions: Callable[[], Iterable[VersionView]],
        shadows: Callable[[], Iterable[ShadowSnapshot]] = tuple,
        gpus: Gpus | None = None,
    ) -> None:
        self._versions = versions
        self._shadows = shadows
        self._gpus = gpus
        self._others = CollectorRegistry()
        ProcessCollector(registry=self._others)
        GCCollector(registry=self._others)
        self.register(MachineCollector())

    def register(self, collector: Collector) -> None:
        self._others.register(collector)

    async def scrape(self, accept: str = "") -> tuple[bytes, str]:
        """The body and its content type, as the `Accept` header wants them: OpenMetrics or plain text."""
        encode_others, content_type = choose_encoder(accept)
        is_openmetrics = content_type.startswith("application/openmetrics-text")
        families = VersionFamilies()
        drift = DriftFamilies()
        for position, version in enumerate(self._versions(), start=1):
            families.add(version)
            report = version.drift
            if report is not None:
                # Of 37 features 3 ms: each has a turn of the event loop to itself.
                await asyncio.sleep(0)
                drift.add(report)
            if position % _VERSIONS_AT_ONCE == 0:
                await asyncio.sleep(0)
        shadows = shadow_lines(self._shadows(), is_openmetrics)
        gpus = gpu_lines(await self._gpus.sample(), is_openmetrics) if self._gpus is not None else []
        text = "\n".join([*_build_lines(), *families.lines(is_openmetrics), *drift.lines(is_openmetrics), *shadows, *gpus, ""]).encode()
        await asyncio.sleep(0)
        # The others come last, because their encoder ends the text (OpenMetrics wants `# EOF`).
        return text + encode_others(self._others), content_type


def _build_lines() -> list[str]:
    family = Family("headrace_build_info", "gauge", "1, labelled with what is running.")
    family.add(format_labels({"version": __version__, "python": platform.python_version()}), 1)
    return family.lines(is_openmetrics=False)


def make_registry(
    versions: Callable[[], Iterable[VersionView]], shadows: Callable[[], Iterable[ShadowSnapshot]] = tuple, gpus: Gpus | None = None
) -> MetricsRegistry:
    """The metrics of the versions and shadows that these return at each scrape, of this process, of the machine and of its GPUs."""
    return MetricsRegistry(versions, shadows, gpus)
