"""What became of requests that were to be captured, as metrics."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace.capture.captures import Captures


class CaptureCollector(Collector):
    """Asks at each scrape. Owns nothing. A version's series end with it."""

    def __init__(self, captures: Captures) -> None:
        self._captures = captures

    def collect(self) -> Iterable[Metric]:
        labels = ["model", "version"]
        captured = CounterMetricFamily("headrace_capture_requests", "Requests written with their answers.", labels=labels)
        size = CounterMetricFamily("headrace_capture_bytes", "Bytes written of them.", labels=labels)
        skipped = CounterMetricFamily("headrace_capture_skipped", "Chosen and not captured, by why.", labels=[*labels, "cause"])
        for version in self._captures.versions:
            values, counts = [version.model, str(version.version)], version.counts
            captured.add_metric(values, counts.captured)
            size.add_metric(values, counts.bytes)
            for cause, count in counts.skipped.items():
                skipped.add_metric([*values, cause], count)
        errors = CounterMetricFamily("headrace_capture_errors", "Writes that failed.", self._captures.errors)
        ring = GaugeMetricFamily("headrace_capture_ring_bytes", "Size of all captures in the directory.", self._captures.ring_bytes)
        return captured, size, skipped, errors, ring
