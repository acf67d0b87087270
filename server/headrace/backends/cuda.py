"""CUDA as the backends use it: which devices there are, what their errors mean, memory, streams and events. Batches: cuda_lanes.py.

Rules for changing this file: nothing of CUDA is imported before it is used; every call that may fail goes through `_check`, so that its
reason is named.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headrace.backends.base import DeviceSpace
from headrace.errors import BackendError, DeviceLost, LoadError

if TYPE_CHECKING:
    from cuda.core import Event, Stream


# -- which devices there are -------------------------------------------------------------------------------------------


@functools.cache
def cuda_unavailable() -> str:
    """Why CUDA cannot be used in this process, naming what is missing; empty: it can. The first call loads the driver (some 0.1 s)."""
    try:
        from cuda.bindings import driver
        from cuda.core import Device  # noqa: F401  # whether it is there
    except ImportError as error:
        return f"the Python package cuda-core is not there ({error}); pip install cuda-core 'cuda-bindings>=13,<14'"
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


def device_spaces(device: str) -> list[DeviceSpace]:
    """The devices that `device`, which is not 'cpu', stands for: all for 'cuda' and 'auto'. Raises LoadError when it is not there."""
    first = open_device(device)
    each = [first] if ":" in device else [Gpu(ordinal) for ordinal in range(device_count())]
    return [DeviceSpace(f"cuda:{gpu.ordinal}", _free_bytes(gpu)) for gpu in each]


def _free_bytes(gpu: Gpu) -> int:
    """0 for a device that no longer answers: nothing is to be placed there."""
    try:
        gpu.make_current()
        return gpu.memory().free
    except Exception:  # CUDA's own
        return 0


# -- errors ------------------------------------------------------------------------------------------------------------

_LOST = {
    4: "DEINITIALIZED", 214: "ECC_UNCORRECTABLE", 220: "NVLINK_UNCORRECTABLE",
    226: "CONTAINED", 700: "ILLEGAL_ADDRESS", 702: "LAUNCH_TIMEOUT", 709: "CONTEXT_IS_DESTROYED", 710: "ASSERT",
    714: "HARDWARE_STACK_ERROR", 715: "ILLEGAL_INSTRUCTION", 716: "MISALIGNED_ADDRESS", 717: "INVALID_ADDRESS_SPACE", 718: "INVALID_PC",
    719: "LAUNCH_FAILED", 721: "TENSOR_MEMORY_LEAK", 810: "MPS_CLIENT_TERMINATED", 911: "EXTERNAL_DEVICE", 999: "UNKNOWN",
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
    "LaunchFailure", "ECCUncorrectable", "EccUncorrectable", "NvlinkUncorrectable", "InvalidPc",
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


__all__ = [
    "CudaError",
    "DeviceMemory",
    "Gpu",
    "cuda_unavailable",
    "device_count",
    "device_error",
    "device_ordinal",
    "device_spaces",
    "is_device_lost",
    "open_device",
]
