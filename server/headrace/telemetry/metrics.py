"""Prometheus families, built from the counters of live versions when somebody scrapes and at no other time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace import __version__
from headrace.lifecycle.state import VersionState
from headrace.lifecycle.view import VersionView
from headrace.telemetry.counters import DURATION_EDGES, ROW_EDGES, CounterSnapshot, FailureReason, Stage

_LABELS = ("model", "version")
_STAGES = {
    Stage.REQUEST: ("request", "From the arrival of a request to its encoded answer."),
    Stage.QUEUE: ("queue", "From a request's admission to the start of its batch."),
    Stage.COMPUTE_INPUT: ("compute_input", "Gathering a batch's inputs, for each request in it."),
    Stage.COMPUTE: ("compute", "Running the model on a batch, for each request in it."),
    Stage.COMPUTE_OUTPUT: ("compute_output", "Encoding a batch's answers, for each request in it."),
}
_TRITON_STAGES = {
    Stage.REQUEST: "nv_inference_request_duration_us",
    Stage.QUEUE: "nv_inference_queue_duration_us",
    Stage.COMPUTE_INPUT: "nv_inference_compute_input_duration_us",
    Stage.COMPUTE: "nv_inference_compute_infer_duration_us",
    Stage.COMPUTE_OUTPUT: "nv_inference_compute_output_duration_us",
}
_OUTCOMES = {
    FailureReason.REJECTED: "rejected",
    FailureReason.CANCELED: "cancelled",
    FailureReason.BACKEND: "backend_error",
    FailureReason.OTHER: "invalid_or_other",
}


def make_registry(versions: Callable[[], Iterable[VersionView]]) -> CollectorRegistry:
    """A registry of its own: two servers in one process must not meet in the global one."""
    registry = CollectorRegistry()
    registry.register(VersionCollector(versions))
    ProcessCollector(registry=registry)
    return registry


class VersionCollector(Collector):
    def __init__(self, versions: Callable[[], Iterable[VersionView]]) -> None:
        self._versions = versions

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("headrace_build", "The running server.", value={"version": __version__})
        versions = list(self._versions())
        yield _states(versions)
        serving = [v for v in versions if v.state in (VersionState.LIVE, VersionState.DRAINING)]
        counted = [((v.model, str(v.version)), v.counters.snapshot()) for v in serving]
        yield from _histograms(counted)
        yield from _counters(counted)
        yield from _gauges(serving)
        yield from _triton(counted)


_Counted = Sequence[tuple[tuple[str, str], CounterSnapshot]]


def _states(versions: Sequence[VersionView]) -> Metric:
    family = GaugeMetricFamily("headrace_version_state", "1 for the state that a version is in.", labels=(*_LABELS, "state"))
    for version in versions:
        family.add_metric((version.model, str(version.version), version.state.value), 1)
    return family


def _histograms(counted: _Counted) -> Iterator[Metric]:
    for stage, (name, doc) in _STAGES.items():
        family = HistogramMetricFamily(f"headrace_{name}_duration_seconds", doc, labels=_LABELS)
        for labels, counts in counted:
            family.add_metric(labels, _buckets(DURATION_EDGES, counts.buckets[stage].tolist()), float(counts.seconds[stage]))
        yield family
    family = HistogramMetricFamily("headrace_batch_rows", "Rows of the batches that ran, without padding.", labels=_LABELS)
    for labels, counts in counted:
        family.add_metric(labels, _buckets(ROW_EDGES, counts.row_buckets.tolist()), counts.rows)
    yield family


def _buckets(edges: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Cumulative, as the exposition format wants them."""
    total = 0
    buckets: list[tuple[str, float]] = []
    for edge, count in zip([*map(_format_edge, edges), "+Inf"], counts, strict=True):
        total += count
        buckets.append((edge, total))
    return buckets


def _format_edge(edge: float) -> str:
    return f"{edge:g}" if edge >= 1e-4 else f"{edge:.5f}"


def _counters(counted: _Counted) -> Iterator[Metric]:
    requests = CounterMetricFamily("headrace_requests", "Requests by how they ended.", labels=(*_LABELS, "outcome"))
    rows = CounterMetricFamily("headrace_rows", "Rows inferred.", labels=_LABELS)
    batches = CounterMetricFamily("headrace_batches", "Batches run.", labels=_LABELS)
    padding = CounterMetricFamily("headrace_padding_rows", "Rows added to reach an allowed batch size.", labels=_LABELS)
    for labels, counts in counted:
        requests.add_metric((*labels, "success"), counts.success)
        for reason, outcome in _OUTCOMES.items():
            requests.add_metric((*labels, outcome), counts.failures[reason])
        rows.add_metric(labels, counts.rows)
        batches.add_metric(labels, counts.batches)
        padding.add_metric(labels, counts.padding)
    yield from (requests, rows, batches, padding)


def _gauges(versions: Sequence[VersionView]) -> Iterator[Metric]:
    gauges = (
        GaugeMetricFamily("headrace_pending_rows", "Rows that wait in the queue.", labels=_LABELS),
        GaugeMetricFamily("nv_inference_pending_request_count", "Requests that wait in the queue.", labels=_LABELS),
        GaugeMetricFamily("headrace_load_duration_seconds", "From discovery to live.", labels=_LABELS),
        GaugeMetricFamily("nv_model_load_duration_secs", "From discovery to live.", labels=_LABELS),
    )
    for version in versions:
        labels = (version.model, str(version.version))
        values = (version.pending_rows, version.pending_requests, version.load_seconds, version.load_seconds)
        for gauge, value in zip(gauges, values, strict=True):
            gauge.add_metric(labels, value)
    yield from gauges


class _BareCounter(Metric):
    """A counter whose samples carry no `_total`, as Triton names them: prometheus_client would add it."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str] = _LABELS) -> None:
        super().__init__(name, documentation, "unknown")
        self._label_names = labels

    def add(self, labels: Sequence[str], value: float) -> None:
        self.add_sample(self.name, dict(zip(self._label_names, labels, strict=True)), value)


def _triton(counted: _Counted) -> Iterator[Metric]:
    success = _BareCounter("nv_inference_request_success", "Requests answered.")
    failure = _BareCounter("nv_inference_request_failure", "Requests failed.", (*_LABELS, "reason"))
    rows = _BareCounter("nv_inference_count", "Rows inferred.")
    batches = _BareCounter("nv_inference_exec_count", "Batches run.")
    durations = {stage: _BareCounter(name, "Cumulative microseconds.") for stage, name in _TRITON_STAGES.items()}
    for labels, counts in counted:
        success.add(labels, counts.success)
        for reason in FailureReason:
            failure.add((*labels, reason.name), counts.failures[reason])
        rows.add(labels, counts.rows)
        batches.add(labels, counts.batches)
        for stage, family in durations.items():
            family.add(labels, round(float(counts.seconds[stage]) * 1e6))
    yield from (success, failure, rows, batches, *durations.values())
