"""What the driver says of the machine's GPUs, asked for when somebody scrapes: Triton's names, and ours for what it does not have.

How it works. NVML's calls take from microseconds to many milliseconds, and on a device in trouble they do not come back at all. So they
run on a thread of their own, one at a time, and a scrape waits for them no longer than PATIENCE; what does not come in that time is
missing, with headrace_gpu_up at 0, rather than old. Two scrapes within FRESH share what the first one got.
"""

# ruff: noqa: N802  # NVML's names

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from headrace.telemetry.exposition import Family, format_labels
from headrace.telemetry.log import get_logger

log = get_logger(__name__)

T = TypeVar("T")

FRESH = 0.5
"""Seconds for which a sample stands for the next scrapes too: several scrapers ask no more of the driver than one. The driver's own
utilisation is a mean over about as long."""
PATIENCE = 0.25
"""Seconds that a scrape waits for the driver. Prometheus gives a whole scrape 10 s by default, a balancer's probe less."""

_REASONS = {
    "sw_power_cap": "nvmlClocksEventReasonSwPowerCap",
    "hw_slowdown": "nvmlClocksEventReasonHwSlowdown",
    "sw_thermal": "nvmlClocksEventReasonSwThermalSlowdown",
    "hw_thermal": "nvmlClocksEventReasonHwThermalSlowdown",
    "hw_power_brake": "nvmlClocksEventReasonHwPowerBrakeSlowdown",
    "sync_boost": "nvmlClocksEventReasonSyncBoost",
}
"""Why a GPU runs slower than it could, by NVML's names for the bits. That it is idle, or was told to, is none of them."""


class Nvml(Protocol):
    """The part of pynvml that is used. All raise NVMLError, also for what a device does not have."""

    NVMLError: type[Exception]
    NVML_TEMPERATURE_GPU: int
    NVML_MEMORY_ERROR_TYPE_CORRECTED: int
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED: int
    NVML_VOLATILE_ECC: int
    NVML_FI_DEV_PCIE_COUNT_TX_BYTES: int
    NVML_FI_DEV_PCIE_COUNT_RX_BYTES: int
    NVML_VALUE_TYPE_UNSIGNED_INT: int
    NVML_VALUE_TYPE_UNSIGNED_LONG: int
    NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: int

    def nvmlInit(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any: ...
    def nvmlDeviceGetUUID(self, handle: Any) -> str: ...
    def nvmlDeviceGetName(self, handle: Any) -> str: ...
    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any: ...
    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any: ...
    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int: ...
    def nvmlDeviceGetPowerManagementLimit(self, handle: Any) -> int: ...
    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int: ...
    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int: ...
    def nvmlDeviceGetTemperatureV(self, handle: Any, sensor: int) -> int: ...
    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: Any) -> int: ...
    def nvmlDeviceGetTotalEccErrors(self, handle: Any, error: int, counter: int) -> int: ...
    def nvmlDeviceGetFieldValues(self, handle: Any, fields: Sequence[int]) -> Sequence[Any]: ...


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One GPU at one moment; None, or an empty table: the device or its driver does not say. Memory in bytes, power in watts, energy in
    joules since the first sample, PCIe in bytes by direction as the GPU sees it."""

    uuid: str
    index: int
    name: str
    busy: float | None = None
    memory_busy: float | None = None
    memory_total: int | None = None
    memory_used: int | None = None
    power: float | None = None
    power_limit: float | None = None
    energy: float | None = None
    temperature: int | None = None
    throttled: dict[str, bool] = field(default_factory=dict)
    ecc: dict[str, int] = field(default_factory=dict)
    pcie: dict[str, int] = field(default_factory=dict)

    @property
    def is_up(self) -> bool:
        """Whether it answers. Every GPU has memory."""
        return self.memory_total is not None


@dataclass(frozen=True, slots=True)
class _Device:
    handle: Any
    uuid: str
    index: int
    name: str


class GpuReader:
    """Owns NVML's handles and what the energy counters said first. Whichever thread reads; never two at once."""

    def __init__(self, nvml: Nvml) -> None:
        """Raises NVMLError where there is no driver."""
        self._nvml = nvml
        nvml.nvmlInit()
        self._devices = list(self._find())
        self._energy_before: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"GpuReader({len(self._devices)} GPUs)"

    @property
    def known(self) -> list[GpuSample]:
        """The GPUs, with nothing said of them."""
        return [GpuSample(device.uuid, device.index, device.name) for device in self._devices]

    def _find(self) -> Iterator[_Device]:
        nvml = self._nvml
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = self._try(lambda index=index: nvml.nvmlDeviceGetHandleByIndex(index))  # type: ignore[misc]  # mypy: lambda defaults
            uuid = None if handle is None else self._try(lambda handle=handle: nvml.nvmlDeviceGetUUID(handle))  # type: ignore[misc]
            if uuid is not None:
                yield _Device(handle, uuid, index, nvml.nvmlDeviceGetName(handle))

    def read(self) -> list[GpuSample]:
        return [self._read(device) for device in self._devices]

    def _try(self, ask: Callable[[], T]) -> T | None:
        """None where it is not to be had: not of this device, not from this driver, not from this version of pynvml."""
        try:
            return ask()
        except (self._nvml.NVMLError, AttributeError):
            return None

    def _read(self, device: _Device) -> GpuSample:
        nvml, handle, attempt = self._nvml, device.handle, self._try
        rates = attempt(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        memory = attempt(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        power = attempt(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        limit = attempt(lambda: nvml.nvmlDeviceGetPowerManagementLimit(handle))
        return GpuSample(
            device.uuid,
            device.index,
            device.name,
            busy=None if rates is None else rates.gpu / 100,
            memory_busy=None if rates is None else rates.memory / 100,
            memory_total=None if memory is None else memory.total,
            memory_used=None if memory is None else memory.used,
            power=None if power is None else power / 1000,
            power_limit=None if limit is None else limit / 1000,
            energy=self._energy(device),
            temperature=self._temperature(handle),
            throttled=self._throttled(handle),
            ecc=self._ecc(handle),
            pcie=self._pcie(handle),
        )

    def _energy(self, device: _Device) -> float | None:
        millijoules = self._try(lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(device.handle))
        if millijoules is None:
            return None
        # The driver counts from when it was loaded, Triton's metric from when the server was started.
        return (millijoules - self._energy_before.setdefault(device.uuid, millijoules)) / 1000

    def _temperature(self, handle: Any) -> int | None:
        """The second is there to take the first one's place; older drivers do not have it."""
        nvml, sensor = self._nvml, self._nvml.NVML_TEMPERATURE_GPU
        found = self._try(lambda: nvml.nvmlDeviceGetTemperature(handle, sensor))
        return self._try(lambda: nvml.nvmlDeviceGetTemperatureV(handle, sensor)) if found is None else found

    def _throttled(self, handle: Any) -> dict[str, bool]:
        bits = self._try(lambda: self._nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
        if bits is None:
            return {}
        return {reason: bool(bits & getattr(self._nvml, name, 0)) for reason, name in _REASONS.items()}

    def _ecc(self, handle: Any) -> dict[str, int]:
        nvml = self._nvml
        kinds = {"corrected": nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, "uncorrected": nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED}
        found = {}
        for kind, number in kinds.items():
            with contextlib.suppress(nvml.NVMLError):  # no ECC, or it is off
                found[kind] = nvml.nvmlDeviceGetTotalEccErrors(handle, number, nvml.NVML_VOLATILE_ECC)
        return found

    def _pcie(self, handle: Any) -> dict[str, int]:
        """By counters: nvmlDeviceGetPcieThroughput measures for 20 ms each time it is asked."""
        nvml = self._nvml
        fields = {"tx": nvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES, "rx": nvml.NVML_FI_DEV_PCIE_COUNT_RX_BYTES}
        values = self._try(lambda: nvml.nvmlDeviceGetFieldValues(handle, list(fields.values())))
        members = {
            nvml.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal",
            nvml.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
            nvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
        }
        # Each field has a return code of its own, 0 where it is known.
        return {
            direction: getattr(value.value, members[value.valueType])
            for direction, value in zip(fields, values or (), strict=False)
            if value.nvmlReturn == 0 and value.valueType in members
        }


class Gpus:
    """Owns the last sample and the one thread that asks for the next. Event loop only, but for that thread."""

    def __init__(self, load: Callable[[], Nvml] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._load = load or _load_nvml
        self._clock = clock
        self._reader: GpuReader | None = None
        self._is_absent = False
        self._known: list[GpuSample] = []
        self._samples: list[GpuSample] = []
        self._at = float("-inf")
        self._asking: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"Gpus({self._reader!r}, asking={self._asking is not None})"

    async def sample(self, patience: float = PATIENCE) -> Sequence[GpuSample]:
        """Of each GPU, not older than FRESH. Those that do not answer within `patience` come with nothing said of them; without a driver
        there are none. Never raises."""
        if self._is_absent or self._clock() - self._at < FRESH:
            return self._samples
        if self._asking is None:
            self._asking = asyncio.get_running_loop().create_future()
            threading.Thread(target=self._ask, args=(asyncio.get_running_loop(), self._asking), name="nvml", daemon=True).start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                # The thread goes on beyond this scrape, and the next one waits for the same answer.
                await asyncio.shield(self._asking)
        return self._samples if self._clock() - self._at < FRESH else self._known

    def _ask(self, loop: asyncio.AbstractEventLoop, asked: asyncio.Future[None]) -> None:
        samples: list[GpuSample] | None = None
        reason = ""
        try:
            if self._reader is None:
                self._reader = GpuReader(self._load())
                self._known = self._reader.known
            samples = self._reader.read()
        except Exception as error:  # of the driver, or of a pynvml that does not fit it: metrics are no reason to fail
            reason = str(error) or type(error).__name__
        with contextlib.suppress(RuntimeError):  # the loop may be gone
            loop.call_soon_threadsafe(self._heard, asked, samples, reason)

    def _heard(self, asked: asyncio.Future[None], samples: list[GpuSample] | None, reason: str) -> None:
        self._asking = None
        if samples is not None:
            self._samples, self._at = samples, self._clock()
        elif self._reader is None:
            self._is_absent = True
            log.debug("gpus not watched", reason=reason)
        else:
            log.warning("gpus not read", reason=reason)
        if not asked.done():
            asked.set_result(None)


def _load_nvml() -> Nvml:
    import pynvml

    nvml: Nvml = pynvml
    return nvml


_GAUGES: tuple[tuple[str, str, str, Callable[[GpuSample], float | None]], ...] = (
    ("nv_gpu_utilization", "gauge", "Share of time in which the GPU was busy, 0 to 1.", lambda gpu: gpu.busy),
    ("nv_gpu_memory_total_bytes", "gauge", "Memory of the GPU.", lambda gpu: gpu.memory_total),
    ("nv_gpu_memory_used_bytes", "gauge", "Memory of the GPU in use, by whomever.", lambda gpu: gpu.memory_used),
    ("nv_gpu_power_usage", "gauge", "Watts that the GPU takes.", lambda gpu: gpu.power),
    ("nv_gpu_power_limit", "gauge", "Watts that the GPU may take.", lambda gpu: gpu.power_limit),
    ("nv_energy_consumption", "counter", "Joules that the GPU has taken since the first scrape.", lambda gpu: gpu.energy),
    ("headrace_gpu_up", "gauge", "Whether the GPU's driver answered in time.", lambda gpu: float(gpu.is_up)),
    ("headrace_gpu_busy_ratio", "gauge", "Share of time in which the GPU ran a kernel, 0 to 1.", lambda gpu: gpu.busy),
    ("headrace_gpu_memory_busy_ratio", "gauge", "Share of time in which its memory was read or written.", lambda gpu: gpu.memory_busy),
    ("headrace_gpu_memory_total_bytes", "gauge", "Memory of the GPU.", lambda gpu: gpu.memory_total),
    ("headrace_gpu_memory_used_bytes", "gauge", "Memory of the GPU in use, by whomever.", lambda gpu: gpu.memory_used),
    ("headrace_gpu_temperature_celsius", "gauge", "Temperature of the GPU.", lambda gpu: gpu.temperature),
)
_TABLES: tuple[tuple[str, str, str, str, Callable[[GpuSample], dict[str, int] | dict[str, bool]]], ...] = (
    ("headrace_gpu_throttled", "gauge", "reason", "1 while the GPU is slower than it could be, by why.", lambda gpu: gpu.throttled),
    ("headrace_gpu_ecc_errors_total", "counter", "kind", "Memory errors since the driver was loaded.", lambda gpu: gpu.ecc),
    ("headrace_gpu_pcie_bytes_total", "counter", "direction", "Bytes over PCIe, sent (tx) and received by the GPU.", lambda gpu: gpu.pcie),
)


def gpu_lines(samples: Iterable[GpuSample], is_openmetrics: bool) -> list[str]:
    """The families' lines; none without a GPU."""
    info = Family("headrace_gpu_info", "gauge", "1, labelled with what the GPU is.")
    gauges = [(Family(name, kind, text), value) for name, kind, text, value in _GAUGES]
    tables = [(Family(name, kind, text), label, values) for name, kind, label, text, values in _TABLES]
    for gpu in samples:
        labels = format_labels({"gpu_uuid": gpu.uuid})
        info.add(format_labels({"gpu_uuid": gpu.uuid, "index": str(gpu.index), "name": gpu.name}), 1)
        for family, value in gauges:
            found = value(gpu)
            if found is not None:
                family.add(labels, found)
        for family, label, values in tables:
            for key, number in values(gpu).items():
                family.add(f'{labels},{label}="{key}"', int(number))
    families = [info, *(family for family, _ in gauges), *(family for family, _, _ in tables)]
    return [line for family in families for line in family.lines(is_openmetrics)]
