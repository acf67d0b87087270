"""What became of traced requests, as metrics."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace.telemetry.tracing import Tracing


class TracingCollector(Collector):
    """Asks at each scrape. Owns nothing."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    def collect(self) -> Iterable[Metric]:
        stats = self._tracing.stats()
        exported = CounterMetricFamily("headrace_traced_requests", "Requests whose spans were sent.")
        exported.add_metric([], stats.exported)
        dropped = CounterMetricFamily(
            "headrace_untraced_requests",
            "Requests that were to be traced and are not: beyond the rate, no room to wait, not taken by the collector.",
            labels=["cause"],
        )
        for cause, count in (("rate", stats.over_rate), ("queue_full", stats.queue_full), ("not_sent", stats.not_sent)):
            dropped.add_metric([cause], count)
        return exported, dropped
