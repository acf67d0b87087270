"""GPU metrics over a driver made of plain values, and what the real binding says where there is none."""

# ruff: noqa: N802, N815  # NVML's names

from __future__ import annotations

import asyncio
import importlib.util
import logging
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from headrace.telemetry.gpu import FRESH, GpuReader, Gpus, Nvml, gpu_lines
from headrace.telemetry.metrics import make_registry


class FakeError(Exception):
    pass


class FakeNvml:
    """Two GPUs; the second knows nothing but its memory. What it cannot show: how long a driver takes, and what it says of real devices."""

    NVMLError: type[Exception] = FakeError
    NVML_TEMPERATURE_GPU = 0
    NVML_MEMORY_ERROR_TYPE_CORRECTED = 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0
    NVML_FI_DEV_PCIE_COUNT_TX_BYTES = 197
    NVML_FI_DEV_PCIE_COUNT_RX_BYTES = 198
    NVML_VALUE_TYPE_UNSIGNED_INT = 1
    NVML_VALUE_TYPE_UNSIGNED_LONG = 2
    NVML_VALUE_TYPE_UNSIGNED_LONG_LONG = 3
    nvmlClocksEventReasonSwPowerCap = 4
    nvmlClocksEventReasonHwSlowdown = 8

    def __init__(self) -> None:
        self.reads = 0
        self.energy = 5_000_000
        self.go_on = threading.Event()
        self.go_on.set()
        self.is_lost = False

    def _of_first(self, handle: str, value: Any) -> Any:
        if handle != "first" or self.is_lost:
            raise FakeError("Not Supported")
        return value

    def nvmlInit(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return ["first", "second"][index]

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetName(self, handle: str) -> str:
        return "NVIDIA H100"

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return self._of_first(handle, SimpleNamespace(gpu=75, memory=20))

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        self.reads += handle == "first"
        assert self.go_on.wait(10)
        if self.is_lost:
            raise FakeError("GPU is lost")
        return SimpleNamespace(total=80 << 30, free=60 << 30, used=20 << 30)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return int(self._of_first(handle, 312_500))

    def nvmlDeviceGetPowerManagementLimit(self, handle: str) -> int:
        return int(self._of_first(handle, 700_000))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return int(self._of_first(handle, self.energy))

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        raise FakeError("Function Not Found")

    def nvmlDeviceGetTemperatureV(self, handle: str, sensor: int) -> int:
        return int(self._of_first(handle, 61))

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return int(self._of_first(handle, 1 | 4))

    def nvmlDeviceGetTotalEccErrors(self, handle: str, error: int, counter: int) -> int:
        return int(self._of_first(handle, [3, 0][error]))

    def nvmlDeviceGetFieldValues(self, handle: str, fields: Sequence[int]) -> Sequence[Any]:
        assert list(fields) == [197, 198]
        value = SimpleNamespace(ullVal=1 << 40, uiVal=7, ulVal=0)
        return [
            SimpleNamespace(nvmlReturn=0 if handle == "first" else 3, valueType=3, value=value),
            SimpleNamespace(nvmlReturn=3, valueType=1, value=value),
        ]


def gpus(nvml: FakeNvml, clock: list[float]) -> Gpus:
    return Gpus(lambda: nvml, lambda: clock[0])


def test_what_a_gpu_says_is_told_by_tritons_names_and_ours() -> None:
    nvml = FakeNvml()
    reader = GpuReader(nvml)
    reader.read()
    nvml.energy += 12_500
    lines = gpu_lines(reader.read(), is_openmetrics=False)
    samples = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    first = {key.replace('gpu_uuid="GPU-first"', ""): float(value) for key, value in samples.items() if "GPU-first" in key}
    assert first == {
        'headrace_gpu_info{,index="0",name="NVIDIA H100"}': 1,
        "nv_gpu_utilization{}": 0.75,
        "nv_gpu_memory_total_bytes{}": 80 << 30,
        "nv_gpu_memory_used_bytes{}": 20 << 30,
        "nv_gpu_power_usage{}": 312.5,
        "nv_gpu_power_limit{}": 700.0,
        "nv_energy_consumption{}": 12.5,
        "headrace_gpu_up{}": 1,
        "headrace_gpu_busy_ratio{}": 0.75,
        "headrace_gpu_memory_busy_ratio{}": 0.2,
        "headrace_gpu_memory_total_bytes{}": 80 << 30,
        "headrace_gpu_memory_used_bytes{}": 20 << 30,
        "headrace_gpu_temperature_celsius{}": 61,
        'headrace_gpu_throttled{,reason="sw_power_cap"}': 1,
        **{f'headrace_gpu_throttled{{,reason="{reason}"}}': 0 for reason in
           ("hw_slowdown", "sw_thermal", "hw_thermal", "hw_power_brake", "sync_boost")},
        'headrace_gpu_ecc_errors_total{,kind="corrected"}': 3,
        'headrace_gpu_ecc_errors_total{,kind="uncorrected"}': 0,
        'headrace_gpu_pcie_bytes_total{,direction="tx"}': 1 << 40,
    }  # fmt: skip
    assert "# TYPE nv_energy_consumption counter" in lines


def test_a_gpu_that_does_not_say_has_no_series_of_it() -> None:
    second = [line for line in gpu_lines(GpuReader(FakeNvml()).read(), is_openmetrics=True) if "GPU-second" in line]
    assert {line.split("{")[0] for line in second} == {
        "headrace_gpu_info", "headrace_gpu_up", "nv_gpu_memory_total_bytes", "nv_gpu_memory_used_bytes",
        "headrace_gpu_memory_total_bytes", "headrace_gpu_memory_used_bytes",
    }  # fmt: skip


def test_a_lost_gpu_is_down_and_nothing_old_is_told_of_it() -> None:
    nvml = FakeNvml()
    reader = GpuReader(nvml)
    nvml.is_lost = True
    lines = [line for line in gpu_lines(reader.read(), is_openmetrics=False) if "GPU-first" in line and "info" not in line]
    assert [line for line in lines if "pcie" not in line] == ['headrace_gpu_up{gpu_uuid="GPU-first"} 0.0']


async def test_scrapes_within_a_moment_share_a_sample() -> None:
    nvml, clock = FakeNvml(), [0.0]
    asked = gpus(nvml, clock)
    await asyncio.gather(*(asked.sample(10) for _ in range(5)))
    clock[0] += FRESH / 2
    await asked.sample(10)
    assert nvml.reads == 1
    clock[0] += FRESH
    assert (await asked.sample(10))[0].is_up
    assert nvml.reads == 2


async def test_a_driver_that_hangs_holds_no_scrape_and_is_asked_once() -> None:
    nvml, clock = FakeNvml(), [0.0]
    asked = gpus(nvml, clock)
    assert (await asked.sample(10))[0].is_up
    nvml.go_on.clear()
    clock[0] += 2 * FRESH
    for _ in range(3):
        samples = await asked.sample(0.0)
        assert [(gpu.uuid, gpu.is_up) for gpu in samples] == [("GPU-first", False), ("GPU-second", False)]
    nvml.go_on.set()
    assert (await asked.sample(10))[0].is_up
    assert nvml.reads == 2


async def test_without_a_driver_there_is_nothing_and_one_line_says_why(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[int] = []

    def load() -> Nvml:
        asked.append(1)
        raise FakeError("NVML Shared Library Not Found")

    registry = make_registry(list, gpus=Gpus(load))
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            body, _ = await registry.scrape()
            assert b"gpu_" not in body
    assert len(asked) == 1


async def test_the_metrics_page_has_them() -> None:
    body, _ = await make_registry(list, gpus=gpus(FakeNvml(), [0.0])).scrape("application/openmetrics-text")
    assert b'nv_gpu_utilization{gpu_uuid="GPU-first"} 0.75' in body
    assert body.endswith(b"# EOF\n")


def test_the_real_binding_has_what_is_called() -> None:
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    names = [name for name in {**Nvml.__annotations__, **vars(Nvml)} if name.lower().startswith("nvml")]
    assert len(names) > 20
    for name in names:
        assert hasattr(pynvml, name), name
        assert hasattr(FakeNvml, name), f"the fake has no {name}"
        if name.isupper():
            assert getattr(pynvml, name) == getattr(FakeNvml, name), name
    assert pynvml.nvmlClocksEventReasonSwPowerCap == FakeNvml.nvmlClocksEventReasonSwPowerCap
    assert {"total", "used"} <= {name for name, _ in pynvml.c_nvmlMemory_t._fields_}
    assert {"gpu", "memory"} <= {name for name, _ in pynvml.c_nvmlUtilization_t._fields_}
    assert {"nvmlReturn", "valueType", "value"} <= {name for name, *_ in pynvml.c_nvmlFieldValue_t._fields_}
    assert {"uiVal", "ulVal", "ullVal"} <= {name for name, _ in pynvml.c_nvmlValue_t._fields_}


@pytest.mark.skipif(importlib.util.find_spec("pynvml") is None, reason="nvidia-ml-py is not installed")
async def test_the_real_binding_answers_or_is_absent() -> None:
    registry = Gpus()
    samples = await registry.sample(30)
    assert all(gpu.uuid for gpu in samples)
