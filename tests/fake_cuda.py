"""The device layer without a device: host memory for the device's, and streams that do a copy only when something waits for it.

It shows what is copied where, in which order it would have been, and whether all is given back. Of CUDA itself it shows nothing: neither
that the calls of Gpu are right, nor anything of time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from headrace.backends.base import Array, DeviceSpace
from headrace.backends.cuda import CudaError, DeviceMemory, Gpu
from headrace.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from headrace.backends.onnxruntime_session import Provider
from headrace.config import InstanceConfig
from headrace_kernels.launches import Launch
from headrace_kernels.normalize import Normalize
from headrace_kernels.topk import Softmax, TopK

TOTAL = 1 << 30


class FakeEvent:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.is_closed = False
        self._recorded: tuple[FakeStream, int] | None = None

    def mark(self, stream: FakeStream, position: int) -> None:
        self._recorded = stream, position

    def sync(self) -> None:
        if self.error is not None:
            raise self.error
        if self._recorded is not None:
            stream, position = self._recorded
            stream.run(position)

    def close(self) -> None:
        self.is_closed = True


class FakeStream:
    """Work is done up to an event when somebody waits for that event: without the wait, whoever reads finds the old bytes."""

    handle = 4711

    def __init__(self) -> None:
        self.is_closed = False
        self.queued: list[Callable[[], None]] = []
        self._done = 0

    def run(self, position: int) -> None:
        while self._done < position:
            self.queued[self._done]()
            self._done += 1

    def record(self, event: FakeEvent) -> None:
        event.mark(self, len(self.queued))

    def wait(self, event: FakeEvent) -> None:
        event.sync()

    def sync(self) -> None:
        self.run(len(self.queued))

    def close(self) -> None:
        self.is_closed = True


class HostGpu(Gpu):
    def __init__(self) -> None:
        super().__init__(0)
        self.blocks: dict[int, Array] = {}
        self.copied: list[int] = []
        self.streams: list[FakeStream] = []
        self.events: list[FakeEvent] = []
        self.allocations_left: int | None = None
        """So many more are granted; None: all."""

    def make_current(self) -> None:
        pass

    def memory(self) -> DeviceMemory:
        return DeviceMemory(TOTAL - sum(block.nbytes for block in self.blocks.values()), TOTAL)

    def create_stream(self) -> Any:
        self.streams.append(FakeStream())
        return self.streams[-1]

    def create_event(self) -> Any:
        self.events.append(FakeEvent())
        return self.events[-1]

    def allocate(self, size: int) -> int:
        if self.allocations_left is not None:
            self.allocations_left -= 1
            if self.allocations_left < 0:
                raise CudaError(f"cuMemAlloc of {size} bytes: CUDA_ERROR_OUT_OF_MEMORY (out of memory)")
        block = np.full(size, 0xEE, np.uint8)
        self.blocks[block.ctypes.data] = block
        return block.ctypes.data

    def free(self, pointer: int) -> None:
        del self.blocks[pointer]

    allocate_pinned = allocate
    free_pinned = free

    def copy(self, target: int, source: int, size: int, stream: Any) -> None:
        self.copied.append(size)
        cast(FakeStream, stream).queued.append(lambda: ctypes.memmove(target, source, size) and None)


class HostBackend(OnnxRuntimeCudaBackend):
    """The CUDA backend as it is, with the runtime's own CPU provider on HostGpu's memory."""

    _memory = "cpu"

    def __init__(self, path: Path, instance: InstanceConfig) -> None:
        super().__init__(path, instance)
        self.host = HostGpu()

    @classmethod
    def devices(cls, device: str) -> list[DeviceSpace]:
        return []

    def _open_device(self) -> Gpu:
        return self.host

    def _make_providers(self, ordinal: int, stream: int) -> list[Provider]:
        return ["CPUExecutionProvider"]

    def _read_on_host(self, inputs: Sequence[str]) -> frozenset[str]:
        return frozenset()


class NumpyKernels:
    """The launchers of headrace_kernels.device.Kernels that a backend uses, by their definitions, at once."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def load(self, planned: tuple[Launch, ...]) -> None:
        self.loaded += [launch.kernel for launch in planned]

    def normalize(
        self, stream: object, *, images: int, into: int, rows: int, height: int, width: int, channels: int, normalize: Normalize
    ) -> None:
        result = normalize(at(images, (rows, height, width, channels), np.uint8))
        at(into, result.shape, result.dtype)[...] = result

    def softmax(self, stream: object, *, scores: int, into: int, rows: int, classes: int, datatype: str) -> None:
        at(into, (rows, classes), "float32")[...] = Softmax()(at(scores, (rows, classes), datatype))

    def topk(
        self, stream: object, *, scores: int, values: int, indices: int, rows: int, classes: int, k: int, softmax: bool, datatype: str
    ) -> None:
        found, chosen = TopK(k, softmax)(at(scores, (rows, classes), datatype))
        at(values, (rows, k), "float32")[...] = found
        at(indices, (rows, k), "int32")[...] = chosen


def at(address: int, shape: tuple[int, ...], dtype: Any) -> Array:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(dtype).reshape(shape)
