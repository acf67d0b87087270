"""Metrics of which version is on which device, and of devices that are lost. Few samples, so by prometheus_client's own families."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace.lifecycle.devices import Devices

_LABELS = ("model", "version", "device")


class DeviceCollector(Collector):
    """Asks at each scrape, on the event loop. Owns nothing."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        instances = GaugeMetricFamily("headrace_version_instances", "Instances that serve.", labels=_LABELS)
        memory = GaugeMetricFamily(
            "headrace_version_device_memory_bytes", "Memory of a device that a version took when it was loaded.", labels=_LABELS
        )
        for use in self._devices.uses():
            labels = [use.model, str(use.version), use.device]
            instances.add_metric(labels, use.instances)
            if use.memory:
                memory.add_metric(labels, use.memory)
        lost = GaugeMetricFamily("headrace_device_lost", "1 for a device on which nothing runs until a new start.", labels=["device"])
        for device in sorted({use.device for use in self._devices.uses()} | self._devices.lost.keys()):
            lost.add_metric([device], device in self._devices.lost)
        return instances, memory, lost
