"""CUDA as the backends use it: which devices there are, memory, streams, and the lanes in which batches pass through one.

An instance has three streams, so that what one batch uploads, another computes and a third downloads goes on at once, and a lane for
each of these batches:

    upload    H2D of the lane's input slab, then `uploaded`
    compute   waits for `uploaded`, runs the model and the kernels around it, then `computed`
    download  waits for `computed`, D2H of the lane's output slab, then `done`, which a thread sleeps on

Rules for changing this file: nothing of CUDA is imported before it is used; every call that may fail goes through `_check`, so that its
reason is named; nothing here waits for a device but `Completion.wait`, and what frees memory.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.backends.base import Array, Pending
from headrace.errors import BackendError, DeviceLost, LoadError

if TYPE_CHECKING:
    from cuda.core import Event, Stream

ALIGNMENT = 256
"""Bytes at which tensors begin in a slab: what cudaMalloc aligns to, and so what every kernel may count on."""
SLAB_LIMIT = 1 << 30
"""The most that one slab grows to. A lane has up to three; pinned memory is taken from the whole machine."""
SMALLEST_SLAB = 1 << 16


# -- which devices there are -------------------------------------------------------------------------------------------


@functools.cache
def cuda_unavailable() -> str:
    """Why CUDA cannot be used in this process, naming what is missing; empty: it can. The first call loads the driver (some 0.1 s)."""
    try:
        from cuda.bindings import driver
        from cuda.core import Device  # noqa: F401  # whether it is there
    except ImportError as error:
        return f"the Python package cuda-core is not there ({error}); pip install 'headrace[gpu]'"
    try:
        (code,) = driver.cuInit(0)
        if code == driver.CUresult.CUDA_ERROR_NO_DEVICE:
            return "the NVIDIA driver finds no GPU (CUDA_ERROR_NO_DEVICE); see CUDA_VISIBLE_DEVICES and what the container was given"
        _check("cuInit", code)
        code, count = driver.cuDeviceGetCount()
        _check("cuDeviceGetCount", code)
    except Exception as error:  # what the bindings raise where the library itself is not found is their loader's own class
        if "driver library" in str(error) or "libcuda" in str(error):
            return "the NVIDIA driver is not there (libcuda.so.1)"
        return f"the NVIDIA driver cannot be used: {_one_line(error)}"
    return "" if count else "the NVIDIA driver finds no GPU; see CUDA_VISIBLE_DEVICES"


def device_count() -> int:
    """0 where CUDA cannot be used."""
    if cuda_unavailable():
        return 0
    from cuda.bindings import driver

    code, count = driver.cuDeviceGetCount()
    _check("cuDeviceGetCount", code)
    return int(count)


def device_ordinal(device: str) -> int:
    """Of an InstanceConfig's `device` that is not 'cpu': 'cuda:1' is 1; 'cuda' and 'auto' are the first."""
    return int(device.partition(":")[2] or 0)


def open_device(device: str) -> Gpu:
    """The GPU that `device` names. Raises LoadError that says what is missing."""
    if reason := cuda_unavailable():
        raise LoadError(f"device '{device}': {reason}")
    ordinal, count = device_ordinal(device), device_count()
    if ordinal >= count:
        raise LoadError(f"device '{device}': expected one below cuda:{count}, as this process sees {count}")
    return Gpu(ordinal)


# -- errors ------------------------------------------------------------------------------------------------------------

_LOST = {
    4: "DEINITIALIZED", 46: "DEVICE_UNAVAILABLE", 101: "INVALID_DEVICE", 214: "ECC_UNCORRECTABLE", 220: "NVLINK_UNCORRECTABLE",
    226: "CONTAINED", 700: "ILLEGAL_ADDRESS", 702: "LAUNCH_TIMEOUT", 709: "CONTEXT_IS_DESTROYED", 710: "ASSERT",
    714: "HARDWARE_STACK_ERROR", 715: "ILLEGAL_INSTRUCTION", 716: "MISALIGNED_ADDRESS", 717: "INVALID_ADDRESS_SPACE", 718: "INVALID_PC",
    719: "LAUNCH_FAILED", 721: "TENSOR_MEMORY_LEAK", 807: "MPS_CLIENT_TERMINATED", 911: "EXTERNAL_DEVICE", 999: "UNKNOWN",
}  # fmt: skip
"""CUresult and cudaError_t, which share these numbers, after which every call in the process fails until it ends."""
_LOST_WORDS = (
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "unspecified launch failure",
    "launch timed out",
    "device-side assert",
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
)
"""Of them, as runtimes quote cudaGetErrorString without a name or number."""
_NAME = re.compile(r"CUDA_ERROR_(\w+)|cudaError([A-Z]\w+)")
_NUMBER = re.compile(r"CUDA (?:failure|error):? (\d+)", re.IGNORECASE)
_RUNTIME_NAMES = {"".join(word.capitalize() for word in name.split("_")) for name in _LOST.values()} | {
    "LaunchFailure", "DevicesUnavailable", "ECCUncorrectable", "EccUncorrectable", "NvlinkUncorrectable", "InvalidPc",
    "HardwareStackError", "CudartUnloading",
}  # fmt: skip
"""cudaError_t's names for the same; some differ by more than their spelling."""


def is_device_lost(text: str) -> bool:
    """Whether an error's text, of whichever library, is one after which nothing runs on the device any more."""
    if any(words in text for words in _LOST_WORDS):
        return True
    for driver_name, runtime_name in _NAME.findall(text):
        if driver_name in _LOST.values() or runtime_name in _RUNTIME_NAMES:
            return True
    return any(int(number) in _LOST for number in _NUMBER.findall(text))


def device_error(subject: str, error: BaseException) -> BackendError:
    """What to raise for `error` of a CUDA library, to be raised outside its handler: DeviceLost, or BackendError for the batch alone."""
    text = _one_line(error)
    return DeviceLost(f"{subject}: {text}") if is_device_lost(text) else BackendError(f"{subject}: {text}")


class CudaError(Exception):
    """A call of the driver that failed; the text has its name, the error's name and its sentence."""


def _check(call: str, code: Any) -> None:
    if not code:
        return
    from cuda.bindings import driver

    _, name = driver.cuGetErrorName(code)
    _, sentence = driver.cuGetErrorString(code)
    words = [text.decode() if isinstance(text, bytes) else str(code) for text in (name, sentence)]
    raise CudaError(f"{call}: {words[0]} ({words[1]})")


def _one_line(error: BaseException) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())[:1000] or type(error).__name__


# -- one device --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of the whole device, whoever has taken them."""

    free: int
    total: int


class Gpu:
    """One device. Any thread that calls anything of it, or of streams and events made by it, calls `make_current` before.

    Has no state of its own. Raises CudaError and what cuda.core raises; `device_error` makes ours of it.
    """

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal

    def __repr__(self) -> str:
        return f"Gpu({self.ordinal})"

    def make_current(self) -> None:
        """Make it the calling thread's device. Cheap when it is already."""
        from cuda.bindings import driver
        from cuda.core import Device

        Device(self.ordinal).set_current()
        # Otherwise a graph that some other instance's thread captures would forbid this one to allocate memory, and be spoilt by it.
        code, _ = driver.cuThreadExchangeStreamCaptureMode(driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        _check("cuThreadExchangeStreamCaptureMode", code)

    def memory(self) -> DeviceMemory:
        from cuda.bindings import driver

        code, free, total = driver.cuMemGetInfo()
        _check("cuMemGetInfo", code)
        return DeviceMemory(int(free), int(total))

    def create_stream(self) -> Stream:
        """One that does not wait for the default stream, nor makes it wait."""
        from cuda.core import Device, StreamOptions

        return Device(self.ordinal).create_stream(options=StreamOptions(nonblocking=True))

    def create_event(self) -> Event:
        """One that a thread sleeps on: without blocking_sync it would spin, and take the core that the event loop needs."""
        from cuda.core import Device, EventOptions

        return Device(self.ordinal).create_event(options=EventOptions(blocking_sync=True))

    def allocate(self, size: int) -> int:
        """The address of `size` bytes of device memory. Not from a pool: what is freed is the device's again at once."""
        from cuda.bindings import driver

        code, pointer = driver.cuMemAlloc(size)
        _check(f"cuMemAlloc of {size} bytes on cuda:{self.ordinal}", code)
        return int(pointer)

    def free(self, pointer: int) -> None:
        from cuda.bindings import driver

        (code,) = driver.cuMemFree(pointer)
        _check("cuMemFree", code)

    def allocate_pinned(self, size: int) -> int:
        """The address of `size` bytes of host memory that devices copy from and to by themselves."""
        from cuda.bindings import driver

        code, pointer = driver.cuMemHostAlloc(size, driver.CU_MEMHOSTALLOC_PORTABLE)
        _check(f"cuMemHostAlloc of {size} bytes", code)
        return int(pointer)

    def free_pinned(self, pointer: int) -> None:
        from cuda.bindings import driver

        (code,) = driver.cuMemFreeHost(pointer)
        _check("cuMemFreeHost", code)

    def copy(self, target: int, source: int, size: int, stream: Stream) -> None:
        """Queue a copy between any two addresses, which tell by themselves where they are."""
        from cuda.bindings import driver

        (code,) = driver.cuMemcpyAsync(target, source, size, stream.handle)
        _check("cuMemcpyAsync", code)


# -- slabs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor lies in a slab."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Layout:
    """Tensors one behind the other, each aligned. `size`: up to the end of the last."""

    places: Mapping[str, Place]
    size: int


def lay_out(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> Layout:
    """Shape and type of each tensor to their places, in the order given."""
    places, end = {}, 0
    for name, (shape, dtype) in tensors.items():
        places[name] = place = Place(-(-end // ALIGNMENT) * ALIGNMENT, shape, dtype)
        end = place.offset + place.size
    return Layout(places, end)


class Slab:
    """Memory on a device and, with `on_host`, as much pinned memory that mirrors it.

    Owns both. They grow by need up to `limit` and never shrink; `generation` counts how often they have moved.
    """

    def __init__(self, gpu: Gpu, *, on_host: bool = True, limit: int = SLAB_LIMIT) -> None:
        self.size = 0
        self.generation = 0
        self._gpu = gpu
        self._on_host = on_host
        self._limit = limit
        self._device = 0
        self._pinned = 0
        self._host: Array = np.empty(0, np.uint8)

    def __repr__(self) -> str:
        return f"Slab({self.size} bytes, generation {self.generation})"

    def reserve(self, size: int) -> None:
        """Make room for `size` bytes. What was in it is lost if it moves, and nothing may be in flight in it.

        Raises BackendError beyond the limit, CudaError where there is no memory left; then the slab is empty.
        """
        if size <= self.size:
            return
        if size > self._limit:
            raise BackendError(f"a batch whose tensors take {size} bytes: expected at most {self._limit}, which a device buffer may grow to")
        grown = min(max(size, 2 * self.size, SMALLEST_SLAB), self._limit)
        self.close()
        self._device = self._gpu.allocate(grown)
        if self._on_host:
            self._pinned = self._gpu.allocate_pinned(grown)
            self._host = np.frombuffer((ctypes.c_uint8 * grown).from_address(self._pinned), np.uint8)
        self.size = grown
        self.generation += 1

    def array(self, place: Place) -> Array:
        """Its host memory, where there is any. Not to be touched after the slab has moved or closed."""
        flat = self._host[place.offset : place.offset + place.size]
        return flat.view(place.dtype).reshape(place.shape)

    def address(self, place: Place) -> int:
        """Its device memory."""
        return self._device + place.offset

    def upload(self, size: int, stream: Stream) -> None:
        if size:
            self._gpu.copy(self._device, self._pinned, size, stream)

    def download(self, size: int, stream: Stream) -> None:
        if size:
            self._gpu.copy(self._pinned, self._device, size, stream)

    def download_from(self, address: int, place: Place, stream: Stream) -> None:
        """Of one tensor that lies elsewhere on the device."""
        if place.size:
            self._gpu.copy(self._pinned + place.offset, address, place.size, stream)

    def close(self) -> None:
        """Give the memory back. Nothing may be in flight in it."""
        device, pinned = self._device, self._pinned
        self._device = self._pinned = self.size = 0
        self._host = np.empty(0, np.uint8)
        if device:
            self._gpu.free(device)
        if pinned:
            self._gpu.free_pinned(pinned)


# -- lanes -------------------------------------------------------------------------------------------------------------


class Streams:
    """The three streams of one instance, for all of its lanes: batches keep their order in each of them."""

    def __init__(self, gpu: Gpu) -> None:
        self.upload = gpu.create_stream()
        self.compute = gpu.create_stream()
        self.download = gpu.create_stream()

    def sync(self) -> None:
        """Wait until all of it is done."""
        for stream in (self.upload, self.compute, self.download):
            stream.sync()

    def close(self) -> None:
        for stream in (self.upload, self.compute, self.download):
            stream.close()


class Lane:
    """What one batch has for itself from `launch` to `release`. Owns its slabs and events; used by one batch at a time.

    `inputs` and `outputs` are mirrored on the host. `scratch` is not: tensors between the model and the kernels around it.
    """

    def __init__(self, gpu: Gpu, streams: Streams, index: int, limit: int = SLAB_LIMIT) -> None:
        self.index = index
        self.gpu = gpu
        self.streams = streams
        self.inputs = Slab(gpu, limit=limit)
        self.outputs = Slab(gpu, limit=limit)
        self.scratch = Slab(gpu, on_host=False, limit=limit)
        self.uploaded = gpu.create_event()
        self.computed = gpu.create_event()
        self.done = gpu.create_event()

    def __repr__(self) -> str:
        return f"Lane({self.index}, inputs={self.inputs.size}, outputs={self.outputs.size}, scratch={self.scratch.size})"

    @property
    def generation(self) -> int:
        """Changes when any address in the lane does."""
        return self.inputs.generation + self.outputs.generation + self.scratch.generation

    def upload(self, size: int) -> None:
        """Queue the copy of the input slab's first bytes, and have what is computed from now on wait for it."""
        streams = self.streams
        self.inputs.upload(size, streams.upload)
        streams.upload.record(self.uploaded)
        streams.compute.wait(self.uploaded)

    def download(self, size: int) -> None:
        """Queue the copy of the output slab's first bytes after all that has been queued to compute; the batch is done after it."""
        streams = self.streams
        streams.compute.record(self.computed)
        streams.download.wait(self.computed)
        self.outputs.download(size, streams.download)
        streams.download.record(self.done)

    def close(self) -> None:
        for slab in (self.inputs, self.outputs, self.scratch):
            slab.close()
        for event in (self.uploaded, self.computed, self.done):
            event.close()


class Lanes:
    """The lanes of one instance. Owns them, and which are free, in the order in which they became so.

    `first` and `take` on the thread that launches, `give_back` on any.
    """

    def __init__(self, gpu: Gpu, count: int, limit: int = SLAB_LIMIT) -> None:
        self.gpu = gpu
        self.streams = Streams(gpu)
        self.all = tuple(Lane(gpu, self.streams, index, limit) for index in range(count))
        self._free = collections.deque(self.all)

    def __repr__(self) -> str:
        return f"Lanes({len(self._free)} of {len(self.all)} free)"

    @property
    def first(self) -> Lane | None:
        """The one that `take` gives next."""
        return self._free[0] if self._free else None

    def take(self) -> Lane:
        if not self._free:
            raise BackendError(f"expected at most {len(self.all)} batches between launch and release, got one more")
        return self._free.popleft()

    def give_back(self, lane: Lane) -> None:
        self._free.append(lane)

    def give_back_failed(self, lane: Lane) -> None:
        """The same for one whose batch could not be launched whole: first what of it was queued ends, as it reads the lane's memory."""
        try:
            self.streams.sync()
        except Exception:  # lost: then nothing reads it any more, and the failure that brought us here says so
            pass
        self.give_back(lane)

    def close(self) -> None:
        """Wait for what is in flight and give everything back. A lost device has nothing to give back, and says so in the exception."""
        try:
            self.streams.sync()
        finally:
            for lane in self.all:
                lane.close()
            self.streams.close()


class Completion(Pending):
    """The batch in a lane whose `done` has been queued. `arrays`: views of its output slab; `held`: what must live until then."""

    def __init__(self, subject: str, lanes: Lanes, lane: Lane, arrays: Sequence[Array], held: object = None) -> None:
        self._subject = subject
        self._lanes = lanes
        self._lane = lane
        self._arrays = list(arrays)
        self._held = held

    def wait(self) -> list[Array]:
        try:
            self._lane.gpu.make_current()
            self._lane.done.sync()
        except Exception as error:  # CUDA's errors have no common base with ours
            failure = device_error(self._subject, error)
        else:
            return self._arrays
        raise failure

    def release(self) -> None:
        self._arrays, self._held = [], None
        self._lanes.give_back(self._lane)


__all__ = [
    "ALIGNMENT",
    "SLAB_LIMIT",
    "Completion",
    "CudaError",
    "DeviceMemory",
    "Gpu",
    "Lane",
    "Lanes",
    "Layout",
    "Place",
    "Slab",
    "Streams",
    "cuda_unavailable",
    "device_count",
    "device_error",
    "device_ordinal",
    "is_device_lost",
    "lay_out",
    "open_device",
]
