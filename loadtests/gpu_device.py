"""A GPU for measurements and checks: memory by address, launches, and times from CUDA events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
from headrace_kernels.device import Kernels
from headrace_kernels.errors import KernelsUnavailable
from headrace_kernels.launches import Launch
from numpy.typing import NDArray

Array = NDArray[Any]

POISON = 0xA5
GUARD = 256


def find_device(device_id: int = 0) -> None:
    """Raises KernelsUnavailable with the reason why the GPU cannot be used."""
    Kernels(device_id)


def checked(result: tuple[Any, ...]) -> Any:
    """What a call of cuda.bindings' driver API gave, without its code. Raises RuntimeError with the driver's name of an error."""
    code, *values = result
    if int(code):
        from cuda.bindings import driver

        raise RuntimeError(f"CUDA driver: {driver.cuGetErrorName(code)[1].decode()}")
    return values[0] if len(values) == 1 else tuple(values)


class GpuMachine:
    """A loadtests.kernel_checks.Machine. Owns all memory that it gave out; `close` frees it.

    `through_graph`: every launch is captured in a CUDA graph and replayed, instead of launched.
    """

    def __init__(self, device_id: int = 0, through_graph: bool = False) -> None:
        self.kernels = Kernels(device_id)  # says what is missing; so it comes first
        from cuda.core import Device, StreamOptions

        self.multiprocessors = self.kernels.multiprocessors
        self.device = Device(device_id)
        self.device.set_current()
        # One that keeps its order with the legacy stream, in which plain copies and memsets run: not all of those are waited for.
        self.stream = self.device.create_stream(options=StreamOptions(nonblocking=False))
        self._through_graph = through_graph
        self._memory: list[int] = []

    def allocate(self, size: int) -> int:
        from cuda.bindings import driver

        address = int(checked(driver.cuMemAlloc(max(size, 1))))
        self._memory.append(address)
        return address

    def upload(self, array: Array) -> int:
        return self.result(array.shape, array.dtype, array).address

    def result(self, shape: tuple[int, ...], dtype: Any, content: Array | None = None) -> GpuResult:
        return GpuResult(self, shape, np.dtype(dtype), content)

    def copies(self, address: int, size: int, count: int) -> list[int]:
        """`count` places with what is at `address`, itself among them."""
        from cuda.bindings import driver

        places = [address, *(self.allocate(size) for _ in range(count - 1))]
        for place in places[1:]:
            checked(driver.cuMemcpyDtoD(place, address, size))
        return places

    def overwrite(self, target: int, source: int, size: int) -> None:
        from cuda.bindings import driver

        checked(driver.cuMemcpyDtoD(target, source, size))

    def run(self, planned: Sequence[Launch]) -> None:
        if self._through_graph:
            self.capture([tuple(planned)]).launch(self.stream)
        else:
            self.kernels.run(self.stream, tuple(planned))
        self.stream.sync()

    def capture(self, planned: Sequence[tuple[Launch, ...]]) -> Any:
        """A cuda.core Graph of all of them in turn."""
        for one in planned:
            self.kernels.load(one)
        builder = self.stream.create_graph_builder()
        builder.begin_building()
        for one in planned:
            self.kernels.run(builder, one)
        graph = builder.end_building().complete()
        return graph

    def time(self, action: Callable[[], None], repeats: int = 30, warm_up: int = 5) -> float:
        """Median seconds between two events of the stream around what `action` puts into it."""
        from cuda.core import EventOptions

        for _ in range(warm_up):
            action()
        times = []
        for _ in range(repeats):
            before = self.stream.record(options=EventOptions(timing_enabled=True))
            action()
            after = self.stream.record(options=EventOptions(timing_enabled=True))
            after.sync()
            times.append(float(after - before) / 1e3)
        return float(median(times))

    def time_launches(self, rotation: Sequence[tuple[Launch, ...]], repeats: int = 30) -> float:
        """Median seconds of one of them, all of them in a graph: without the gaps of a launch from Python, and each on other memory."""
        often = max(1, 24 // len(rotation))
        graph = self.capture(list(rotation) * often)
        return self.time(lambda: graph.launch(self.stream), repeats) / (len(rotation) * often)

    def close(self) -> None:
        from cuda.bindings import driver

        self.stream.sync()
        for address in self._memory:
            checked(driver.cuMemFree(address))
        self._memory.clear()


class GpuResult:
    """Poisoned memory of the device, and what is beside it."""

    def __init__(self, machine: GpuMachine, shape: tuple[int, ...], dtype: np.dtype[Any], content: Array | None) -> None:
        from cuda.bindings import driver

        self._shape, self._dtype = shape, dtype
        self._size = int(np.prod(shape)) * dtype.itemsize
        self._start = machine.allocate(self._size + 2 * GUARD)
        checked(driver.cuMemsetD8(self._start, POISON, self._size + 2 * GUARD))
        if content is not None and self._size:
            host = np.ascontiguousarray(content, dtype)
            checked(driver.cuMemcpyHtoD(self.address, host.ctypes.data, self._size))

    @property
    def address(self) -> int:
        return self._start + GUARD

    def read(self) -> Array:
        from cuda.bindings import driver

        around = np.empty(self._size + 2 * GUARD, np.uint8)
        checked(driver.cuMemcpyDtoH(around.ctypes.data, self._start, around.nbytes))
        beside = np.concatenate([around[:GUARD], around[-GUARD:]])
        assert (beside == POISON).all(), "something was written beside the result"
        return around[GUARD : GUARD + self._size].view(self._dtype).reshape(self._shape)


__all__ = ["GpuMachine", "KernelsUnavailable", "checked", "find_device"]
