"""The few calls of the CUDA runtime that clients' memory on a device takes, by cuda.bindings.

How it works. A handle is opened in the primary context of its device, which the runtime makes at the first use of a device and which all
other users of the runtime in this process share. Copies go over a stream of their own per device that waits for nobody else's work; each is
waited for, since the client may write there again as soon as it has its answer. The device that a thread has chosen for itself is
left as it was; a thread that has none is not given the first, whose context would be made by that. What other threads capture is not spoilt
by any of this: ONNX Runtime captures graphs in a mode that forbids it to threads which have not said that they stand apart.
"""

# ruff: noqa: N802, N815  # CUDA's names

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from headrace.errors import BackendError, InvalidRequest

HANDLE_BYTES = 64
"""CUDA_IPC_HANDLE_SIZE."""


class CudaMissing(Exception):
    """CUDA cannot be used here. The text says what is missing."""


class Runtime(Protocol):
    """The part of cuda.bindings.runtime that is used. Calls return a tuple that begins with an error code, 0 where there is none."""

    cudaIpcMemLazyEnablePeerAccess: int
    cudaStreamNonBlocking: int
    cudaMemcpyKind: Any
    cudaStreamCaptureMode: Any

    def cudaIpcMemHandle_t(self) -> Any: ...
    def cudaGetDeviceCount(self) -> tuple[Any, int]: ...
    def cudaGetDevice(self) -> tuple[Any, int]: ...
    def cudaSetDevice(self, device: int) -> tuple[Any]: ...
    def cudaThreadExchangeStreamCaptureMode(self, mode: Any) -> tuple[Any, Any]: ...
    def cudaIpcOpenMemHandle(self, handle: Any, flags: int) -> tuple[Any, int]: ...
    def cudaIpcCloseMemHandle(self, pointer: int) -> tuple[Any]: ...
    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, Any]: ...
    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: Any) -> tuple[Any]: ...
    def cudaStreamSynchronize(self, stream: Any) -> tuple[Any]: ...
    def cudaGetErrorString(self, error: Any) -> tuple[Any, bytes]: ...
    def cudaGetLastError(self) -> tuple[Any]: ...


class Driver(Protocol):
    """The part of cuda.bindings.driver that is used."""

    def cuCtxGetCurrent(self) -> tuple[Any, Any]: ...
    def cuMemGetAddressRange(self, pointer: int) -> tuple[Any, Any, int]: ...


class CudaError(Exception):
    """A call was refused; the text is CUDA's own."""


class CudaMemory:
    """Owns one stream a device. Any thread; calls block for as long as the device takes."""

    def __init__(self, runtime: Runtime, driver: Driver) -> None:
        """Raises CudaMissing."""
        self._runtime = runtime
        self._driver = driver
        self._streams: dict[int, Any] = {}
        self._lock = threading.Lock()
        try:
            self._devices = self._call(runtime.cudaGetDeviceCount())
        except CudaError as error:
            raise CudaMissing(f"no CUDA device can be used: {error}") from None
        if not self._devices:
            raise CudaMissing("no CUDA device is there")

    def __repr__(self) -> str:
        return f"CudaMemory({self._devices} devices)"

    @classmethod
    def load(cls) -> CudaMemory:
        """Raises CudaMissing. The first time it wakes the driver, which takes up to seconds."""
        try:
            from cuda.bindings import driver, runtime
        except ImportError as error:
            raise CudaMissing(f"the package cuda-bindings is not there ({error}); pip install 'cuda-bindings>=13,<14'") from None
        return cls(runtime, driver)

    def open(self, device: int, handle: bytes) -> int:
        """Map another process's memory. Raises CudaError, InvalidRequest for a device that is not there."""
        if not 0 <= device < self._devices:
            raise InvalidRequest(f"expected a device_id from 0 to {self._devices - 1}, got {device}")
        runtime = self._runtime
        opened = runtime.cudaIpcMemHandle_t()
        # From release 13 on the bindings have no attribute for the bytes, only their address.
        ctypes.memmove(opened.getPtr(), handle, HANDLE_BYTES)
        with self._on(device):
            return int(self._call(runtime.cudaIpcOpenMemHandle(opened, runtime.cudaIpcMemLazyEnablePeerAccess)))

    def close(self, device: int, pointer: int) -> None:
        """Raises CudaError."""
        with self._on(device):
            self._call(self._runtime.cudaIpcCloseMemHandle(pointer))

    def size(self, device: int, pointer: int) -> int:
        """Bytes from `pointer` to the end of its allocation. Raises CudaError."""
        with self._on(device):
            code, base, size = self._driver.cuMemGetAddressRange(pointer)
        if code:
            raise CudaError(str(getattr(code, "name", code)))
        return int(base) + int(size) - pointer

    def read(self, device: int, pointer: int, size: int) -> memoryview:
        """A copy in the host's memory. Raises BackendError."""
        content = np.empty(size, np.uint8)
        self._copy(device, content.ctypes.data, pointer, size, self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost)
        return content.data

    def write(self, device: int, pointer: int, content: bytes | memoryview) -> None:
        """Raises BackendError."""
        source = np.frombuffer(content, np.uint8)
        self._copy(device, pointer, source.ctypes.data, source.nbytes, self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def _copy(self, device: int, to: int, source: int, size: int, kind: Any) -> None:
        if not size:
            return
        try:
            with self._on(device):
                stream = self._stream(device)
                self._call(self._runtime.cudaMemcpyAsync(to, source, size, kind, stream))
                self._call(self._runtime.cudaStreamSynchronize(stream))
        except CudaError as error:
            reason = str(error)
        else:
            return
        raise BackendError(f"CUDA shared memory on device {device} could not be copied: {reason}")

    def _stream(self, device: int) -> Any:
        """On that device."""
        with self._lock:
            if device not in self._streams:
                self._streams[device] = self._call(self._runtime.cudaStreamCreateWithFlags(self._runtime.cudaStreamNonBlocking))
            return self._streams[device]

    @contextmanager
    def _on(self, device: int) -> Iterator[None]:
        runtime = self._runtime
        self._call(runtime.cudaThreadExchangeStreamCaptureMode(runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
        before = self._call(runtime.cudaGetDevice()) if self._has_context() else device
        self._call(runtime.cudaSetDevice(device))
        try:
            yield
        finally:
            if before != device:
                self._call(runtime.cudaSetDevice(before))

    def _has_context(self) -> bool:
        """Whether the calling thread has a device by now. Not so before the driver is awake, which it says by a code."""
        code, context = self._driver.cuCtxGetCurrent()
        return not code and bool(int(context))

    def _call(self, result: tuple[Any, ...]) -> Any:
        """What a call returned beside its code."""
        code, *values = result
        if code:
            # Of an error that does not last the runtime keeps a note, which somebody else's next call would be blamed for.
            self._runtime.cudaGetLastError()
            _, text = self._runtime.cudaGetErrorString(code)
            raise CudaError(text.decode())
        return values[0] if values else None
