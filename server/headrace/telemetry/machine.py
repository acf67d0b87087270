"""Triton's gauges of the machine's processor and memory, read from /proc when somebody scrapes; none but on Linux."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class MachineCollector(Collector):
    """Owns the processor times of the last scrape: utilisation is what was busy since then, over all cores, from 0 to 1."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._busy, self._total = self._read_processor_times()

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        busy, total = self._read_processor_times()
        if total > self._total:
            utilization = (busy - self._busy) / (total - self._total)
            yield GaugeMetricFamily("nv_cpu_utilization", "Share of all processor time in use, 0 to 1.", value=utilization)
            self._busy, self._total = busy, total
        memory = self._read_memory()
        if memory:
            total, used = memory["MemTotal"], memory["MemTotal"] - memory["MemAvailable"]
            yield GaugeMetricFamily("nv_cpu_memory_total_bytes", "Memory of the machine.", value=total)
            yield GaugeMetricFamily("nv_cpu_memory_used_bytes", "Memory of the machine not available.", value=used)

    def _read_processor_times(self) -> tuple[int, int]:
        """(busy, all) in clock ticks since boot. Guest time is in user time already; idle and iowait are not busy."""
        try:
            first = (self._proc / "stat").read_text().split("\n", 1)[0]
        except OSError:
            return 0, 0
        ticks = [int(value) for value in first.split()[1:9]]
        return sum(ticks) - sum(ticks[3:5]), sum(ticks)

    def _read_memory(self) -> dict[str, int]:
        """Bytes by the names of /proc/meminfo; empty where they cannot be read."""
        try:
            lines = (self._proc / "meminfo").read_text().splitlines()
        except OSError:
            return {}
        sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        return sizes if {"MemTotal", "MemAvailable"} <= sizes.keys() else {}
