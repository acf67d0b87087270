"""Which machine a number was measured on, and whether the machine was quiet then."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("headrace", "grpcio", "pygrpc-native", "uvloop", "protobuf", "numpy", "onnxruntime", "tritonclient")


def machine_facts() -> dict[str, str]:
    facts = {
        "cpu": _field(Path("/proc/cpuinfo"), "model name"),
        "cores": str(os.cpu_count()),
        "memory": _field(Path("/proc/meminfo"), "MemTotal"),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            facts[package] = version(package)
    return facts


def _field(path: Path, name: str) -> str:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"


@dataclass(frozen=True, slots=True)
class Noise:
    """The time of a fixed piece of work on one core: the median shows its clock, the worst against the best its neighbours."""

    core: int
    best: float
    median: float
    worst: float
    stolen: float
    """Part of the machine's time that the hypervisor gave to others meanwhile."""


def probe_noise(core: int, repeats: int = 9) -> Noise:
    """Takes about a tenth of a second on `core`; the caller's affinity is as before afterwards."""
    affinity = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        stolen, total = _stolen()
        times = sorted(_spin() for _ in range(repeats))
        stolen_after, total_after = _stolen()
    finally:
        os.sched_setaffinity(0, affinity)
    share = (stolen_after - stolen) / max(1, total_after - total)
    return Noise(core, times[0], times[len(times) // 2], times[-1], share)


def _spin() -> float:
    started = time.perf_counter()
    value = 1
    for _ in range(150_000):
        value = value * 1103515245 + 12345 & 0x7FFFFFFF
    return time.perf_counter() - started


def _stolen() -> tuple[int, int]:
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[7], sum(ticks)


def noisy_probes(probes: Sequence[Noise], tolerance: float = 0.1) -> list[Noise]:
    """Those whose median is over the best seen on their core by more than `tolerance`, or that lost 2 % to the hypervisor."""
    best = {core: min(p.best for p in probes if p.core == core) for core in {p.core for p in probes}}
    return [p for p in probes if p.median > best[p.core] * (1 + tolerance) or p.stolen > 0.02]
