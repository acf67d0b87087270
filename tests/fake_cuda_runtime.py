"""CUDA's runtime as far as the server calls it, over the host's memory: what a client's process would have allocated is a buffer here.

What it cannot show: whether a real handle opens in another process, what a device does with an address beyond its allocation, and whether a
copy is ordered after what the client's own streams do. tests/gpu/test_cuda_shared_memory.py asks a device.
"""

# ruff: noqa: N802, N815  # CUDA's names

from __future__ import annotations

import ctypes
import enum
import os
import sys
import types
from typing import Any

import pytest


class Code(enum.IntEnum):
    SUCCESS = 0
    INVALID_VALUE = 1
    INSUFFICIENT_DRIVER = 35
    ILLEGAL_ADDRESS = 700


TEXTS = {
    Code.INVALID_VALUE: b"invalid argument",
    Code.INSUFFICIENT_DRIVER: b"CUDA driver version is insufficient for CUDA runtime version",
    Code.ILLEGAL_ADDRESS: b"an illegal memory access was encountered",
}


class CopyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class CaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1


class Handle:
    def __init__(self) -> None:
        self.bytes = (ctypes.c_char * 64)()

    def getPtr(self) -> int:
        return ctypes.addressof(self.bytes)


class FakeCuda:
    """runtime and driver in one. `allocate` is the client's side of it."""

    cudaIpcMemLazyEnablePeerAccess = 1
    cudaStreamNonBlocking = 1
    cudaMemcpyKind = CopyKind
    cudaStreamCaptureMode = CaptureMode
    cudaIpcMemHandle_t = Handle

    def __init__(self, devices: int = 2) -> None:
        self.devices = devices
        self.device = 0
        self.has_context = True
        """Whether the thread has chosen a device; if not, it has one as soon as it does."""
        self.contexts: set[int] = set()
        """Devices that have been woken."""
        self.mode = CaptureMode.cudaStreamCaptureModeGlobal
        self.memory: dict[bytes, Any] = {}
        self.opened: list[tuple[int, int]] = []
        """(device, pointer), once for each time it was opened and not yet closed."""
        self.copies: list[CopyKind] = []
        self.failing = Code.SUCCESS
        """What copies return."""
        self.pending = 0

    def allocate(self, size: int) -> tuple[bytes, Any]:
        """(raw handle, the memory)."""
        handle, buffer = os.urandom(64), (ctypes.c_char * size)()
        self.memory[handle] = buffer
        return handle, buffer

    def cudaGetDeviceCount(self) -> tuple[Code, int]:
        return (Code.SUCCESS, self.devices) if self.devices else (Code.INSUFFICIENT_DRIVER, 0)

    def cudaGetDevice(self) -> tuple[Code, int]:
        return Code.SUCCESS, self.device

    def cudaSetDevice(self, device: int) -> tuple[Code]:
        self.device = device
        self.has_context = True
        self.contexts.add(device)
        return (Code.SUCCESS,)

    def cuCtxGetCurrent(self) -> tuple[Code, int]:
        return Code.SUCCESS, 4711 if self.has_context else 0

    def cudaThreadExchangeStreamCaptureMode(self, mode: CaptureMode) -> tuple[Code, CaptureMode]:
        before, self.mode = self.mode, mode
        return Code.SUCCESS, before

    def _check_apart(self) -> None:
        assert self.mode is CaptureMode.cudaStreamCaptureModeThreadLocal, "it would spoil what other threads capture"

    def cudaIpcOpenMemHandle(self, handle: Handle, flags: int) -> tuple[Code, int]:
        self._check_apart()
        buffer = self.memory.get(bytes(handle.bytes))
        if buffer is None or flags != self.cudaIpcMemLazyEnablePeerAccess:
            return Code.INVALID_VALUE, 0
        self.opened.append((self.device, ctypes.addressof(buffer)))
        return Code.SUCCESS, ctypes.addressof(buffer)

    def cudaIpcCloseMemHandle(self, pointer: int) -> tuple[Code]:
        self._check_apart()
        self.opened.remove((self.device, pointer))
        return (Code.SUCCESS,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Code, str]:
        self._check_apart()
        return Code.SUCCESS, f"stream of {self.device}"

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: CopyKind, stream: str) -> tuple[Code]:
        self._check_apart()
        assert stream == f"stream of {self.device}"
        if not self.failing:
            self.copies.append(kind)
            ctypes.memmove(dst, src, count)
            self.pending += 1
        return (self.failing,)

    def cudaStreamSynchronize(self, stream: str) -> tuple[Code]:
        self.pending = 0
        return (Code.SUCCESS,)

    def cudaGetErrorString(self, error: Code) -> tuple[Code, bytes]:
        return Code.SUCCESS, TEXTS[error]

    def cudaGetLastError(self) -> tuple[Code]:
        return (Code.SUCCESS,)

    def cuMemGetAddressRange(self, pointer: int) -> tuple[Code, int, int]:
        for buffer in self.memory.values():
            if ctypes.addressof(buffer) == pointer:
                return Code.SUCCESS, pointer, len(buffer)
        return Code.INVALID_VALUE, 0, 0


def install(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda | None) -> None:
    """Put it where `import cuda.bindings` finds it; None: as if the package were not installed."""
    bindings = types.ModuleType("cuda.bindings")
    for name in ("cuda.bindings.runtime", "cuda.bindings.driver"):  # the real ones, where another test has imported them
        monkeypatch.delitem(sys.modules, name, raising=False)
    if cuda is not None:
        bindings.runtime = bindings.driver = cuda  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
