"""CUDA memory that clients on this machine have registered: names for what a client's process has allocated on a GPU, opened here.

A region is closed by whoever lets go of it last: it may be unregistered while requests use it, and its name is free at once. What it
holds is gone when the client frees it, or ends; reading it then is an error of CUDA, which nothing here can foresee.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from headrace.cuda_runtime import HANDLE_BYTES, CudaError, CudaMemory, CudaMissing
from headrace.errors import AlreadyExists, InvalidRequest, NotFound
from headrace.requests import DeviceMemory
from headrace.shared_memory import part_of
from headrace.telemetry.log import get_logger

log = get_logger(__name__)

MAX_REGIONS = 1024
"""Each is a mapping in the address space of every GPU's context, and whoever reaches the port can ask for one."""


@dataclass(frozen=True, slots=True)
class CudaRegionStatus:
    """As it was registered."""

    name: str
    device_id: int
    byte_size: int


class _Region:
    """One opened handle; closed with the last reference to this."""

    __slots__ = ("__weakref__", "memory", "pointer", "status")

    def __init__(self, status: CudaRegionStatus, memory: CudaMemory, pointer: int) -> None:
        self.status = status
        self.memory = memory
        self.pointer = pointer
        # At the end of the process the driver gives everything back, and calls into it may come too late.
        weakref.finalize(self, _close, memory, status, pointer).atexit = False


def _close(memory: CudaMemory, status: CudaRegionStatus, pointer: int) -> None:
    try:
        memory.close(status.device_id, pointer)
    except CudaError as error:
        log.warning("cuda region not closed", region=status.name, device=status.device_id, reason=str(error))


class _Part(DeviceMemory):
    """A part of a region, which stays open while this is held."""

    __slots__ = ("_region",)

    def __init__(self, region: _Region, offset: int, nbytes: int) -> None:
        super().__init__(f"cuda:{region.status.device_id}", region.pointer + offset, nbytes)
        self._region = region

    def read(self) -> memoryview:
        return self._region.memory.read(self._region.status.device_id, self.pointer, self.nbytes)

    def write(self, content: bytes | memoryview) -> None:
        self._region.memory.write(self._region.status.device_id, self.pointer, content)


class CudaRegions:
    """Owns the table of regions by name, and the way to CUDA once somebody has registered one. Every method may be called from any thread;
    `register` blocks while the driver works, the others for nobody. `is_taken`: whether the name is another kind's.
    """

    def __init__(self, load: Callable[[], CudaMemory] = CudaMemory.load, is_taken: Callable[[str], bool] = lambda name: False) -> None:
        self._load = load
        self._is_taken = is_taken
        self._memory: CudaMemory | None = None
        self._lock = threading.Lock()
        self._regions: dict[str, _Region | None] = {}
        """None: it is being opened."""

    def __repr__(self) -> str:
        return f"CudaRegions({len(self._regions)} registered)"

    def __contains__(self, name: str) -> bool:
        return name in self._regions

    def register(self, name: str, raw_handle: bytes, device_id: int, byte_size: int) -> None:
        """Open a handle of cudaIpcGetMemHandle. Raises AlreadyExists, InvalidRequest with what is missing where there is no CUDA."""
        subject = f"failed to register CUDA shared memory region '{name}'"
        with self._lock:
            if name in self._regions or self._is_taken(name):
                raise AlreadyExists(f"shared memory region '{name}' already in manager")
            if len(self._regions) >= MAX_REGIONS:
                raise InvalidRequest(f"{subject}: expected at most {MAX_REGIONS} regions, there are {len(self._regions)}")
            self._regions[name] = None
        try:
            region = self._open(subject, CudaRegionStatus(name, device_id, byte_size), raw_handle)
        except BaseException:
            with self._lock:
                del self._regions[name]
            raise
        with self._lock:
            # Unless it was unregistered meanwhile; then it is closed again.
            if name in self._regions:
                self._regions[name] = region

    def _open(self, subject: str, status: CudaRegionStatus, raw_handle: bytes) -> _Region:
        if not status.name:
            raise InvalidRequest("CUDA shared memory region: expected a name, got none")
        if len(raw_handle) != HANDLE_BYTES:
            raise InvalidRequest(f"{subject}: expected a cudaIpcMemHandle of {HANDLE_BYTES} bytes, got {len(raw_handle)}")
        if not status.byte_size:
            raise InvalidRequest(f"{subject}: expected a byte_size above 0, got 0")
        try:
            memory = self._memory or self._load()
        except CudaMissing as error:
            # Triton's text of a server without GPUs, and what is to be done.
            raise InvalidRequest(f"failed to register CUDA shared memory region: '{status.name}', GPUs not supported: {error}") from None
        self._memory = memory
        try:
            region = _Region(status, memory, memory.open(status.device_id, raw_handle))
        except (CudaError, InvalidRequest) as error:
            raise InvalidRequest(f"{subject}: failed to open CUDA IPC handle: {error}") from None
        try:
            size = memory.size(status.device_id, region.pointer)
        except CudaError as error:
            raise InvalidRequest(f"{subject}: its size cannot be found: {error}") from None
        if status.byte_size > size:
            # What is read beyond the end is an illegal address, after which nothing runs on the device any more.
            raise InvalidRequest(f"{subject}: expected at most the {size} bytes that its memory has, got {status.byte_size}")
        return region

    def unregister(self, name: str) -> None:
        """Of an unknown name nothing is left to do."""
        with self._lock:
            region = self._regions.pop(name, None)
        del region  # not under the lock: it may be closed by this

    def unregister_all(self) -> None:
        with self._lock:
            regions, self._regions = self._regions, {}
        del regions

    def status(self, name: str) -> CudaRegionStatus:
        """Raises NotFound."""
        region = self._regions.get(name)
        if region is None:
            if self._is_taken(name):
                raise NotFound(f"The region named '{name}' is registered as system shared memory, not CUDA shared memory")
            raise NotFound(f"Unable to find cuda shared memory region: '{name}'")
        return region.status

    def status_of_all(self) -> list[CudaRegionStatus]:
        with self._lock:
            return [region.status for region in self._regions.values() if region is not None]

    def view(self, name: str, offset: int, byte_size: int) -> DeviceMemory:
        """That part of a region; it stays open for as long as somebody holds it. Raises NotFound, InvalidRequest."""
        region = self._regions.get(name)
        if region is None:
            raise NotFound(f"Unable to find shared memory region: '{name}'")
        part_of(name, region.status.byte_size, offset, byte_size)
        return _Part(region, offset, byte_size)
