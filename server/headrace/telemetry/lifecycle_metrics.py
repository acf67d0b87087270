"""Metrics of what changes: sources, versions coming and going, rollouts. Few samples, so by prometheus_client's own families."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace.lifecycle.view import AdminView

ALARMING = ("failed", "rolled_back", "source_error", "device_lost")
"""Kinds of events that the rules in deploy/prometheus alert on."""


class LifecycleCollector(Collector):
    """Asks an AdminView at each scrape. Owns nothing."""

    def __init__(self, admin: AdminView) -> None:
        self._admin = admin

    def collect(self) -> Iterable[Metric]:
        yield from self._sources()
        yield from self._models()
        events = CounterMetricFamily("headrace_model_events", "What happened to models, as in the audit log.", labels=["model", "event"])
        # Those that alerts are for from the start: a rate over a series that appears with its first failure misses that failure.
        counts = {(model.name, kind): 0 for model in self._admin.describe("") for kind in ALARMING}
        for (model, kind), count in sorted({**counts, **self._admin.event_log.counts}.items()):
            events.add_metric([model, kind], count)
        yield events

    def _sources(self) -> Iterable[Metric]:
        age = GaugeMetricFamily("headrace_source_age_seconds", "Since a source last said what it has.", labels=["source"])
        up = GaugeMetricFamily("headrace_source_up", "Whether a source could be read when it was last asked.", labels=["source"])
        for source in self._admin.sources():
            age.add_metric([source.uri], source.age)
            up.add_metric([source.uri], 0.0 if source.error else 1.0)
        return age, up

    def _models(self) -> Iterable[Metric]:
        serving = GaugeMetricFamily("headrace_model_serving_version", "The version that requests without one get.", labels=["model"])
        memory = GaugeMetricFamily(
            "headrace_version_memory_bytes", "What the process grew by while a version was loaded.", labels=["model", "version"]
        )
        traffic = GaugeMetricFamily(
            "headrace_version_traffic_ratio", "Part of the requests without a version that one gets.", labels=["model", "version"]
        )
        labels = GaugeMetricFamily("headrace_model_label_version", "The version that a label names.", labels=["model", "label"])
        rollout = GaugeMetricFamily("headrace_rollout_running", "1 while a version is on trial.", labels=["model", "version", "mode"])
        for model in self._admin.describe(""):
            for version in model.versions:
                if version.is_default:
                    serving.add_metric([model.name], version.version)
                if version.state == "live":
                    memory.add_metric([model.name, str(version.version)], version.memory_bytes)
                    traffic.add_metric([model.name, str(version.version)], version.traffic / 100.0)
            for label, number in model.labels.items():
                labels.add_metric([model.name, label], number)
            if model.rollout is not None:
                rollout.add_metric([model.name, str(model.rollout.candidate), model.rollout.mode], 1)
        return serving, memory, traffic, labels, rollout
