"""Shared memory that clients on this machine have registered: names for parts of POSIX shared memory objects, mapped.

Nothing is ever unmapped by hand. A view that is handed out keeps its mapping, and the mapping goes with the last of them: so a
region can be unregistered while requests use it, and its name is free at once.
"""

from __future__ import annotations

import mmap
import os
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from headrace.errors import AlreadyExists, InvalidRequest, NotFound

DIRECTORY = Path("/dev/shm")
"""Where Linux has what shm_open opens."""
RESERVED = "triton_python_backend_shm_region_"
"""Triton refuses keys that begin so: its own processes talk through them."""
_BLOCK = 512
"""Bytes that st_blocks counts in, whatever the file system's blocks are."""


@dataclass(frozen=True, slots=True)
class RegionStatus:
    """As it was registered."""

    name: str
    key: str
    offset: int
    byte_size: int


def part_of(name: str, size: int, offset: int, byte_size: int) -> None:
    """Raises InvalidRequest for what is not within a region of so many bytes."""
    if offset >= size:
        raise InvalidRequest(f"Invalid offset for shared memory region: '{name}': expected less than {size}, got {offset}")
    if offset + byte_size > size:
        raise InvalidRequest(
            f"Invalid offset + byte size for shared memory region: '{name}': expected at most {size}, got {offset} + {byte_size}"
        )


class _Region:
    """One mapping, and the client's part of it."""

    __slots__ = ("_mapping", "_needed", "_view", "status")

    def __init__(self, status: RegionStatus, mapping: mmap.mmap, skipped: int) -> None:
        self.status = status
        self._mapping = mapping
        self._needed = status.offset + status.byte_size
        self._view = memoryview(mapping)[skipped:]

    def view(self, offset: int, byte_size: int) -> memoryview:
        name = self.status.name
        part_of(name, self.status.byte_size, offset, byte_size)
        # Beyond the object's end there is no memory, and touching it ends the process. Who shrinks it after this still does that.
        if self._mapping.size() < self._needed:
            raise InvalidRequest(
                f"shared memory region '{name}': expected '{self.status.key}' to have at least the {self._needed} bytes it had "
                f"when it was registered, got {self._mapping.size()}"
            )
        return self._view[offset : offset + byte_size]


class SharedMemoryRegions:
    """Owns the table of regions by name. Every method may be called from any thread, and none waits for anything. `is_taken`: whether
    a name is another kind's."""

    def __init__(self, directory: Path = DIRECTORY, is_taken: Callable[[str], bool] = lambda name: False) -> None:
        self._directory = directory
        self._is_taken = is_taken
        self._lock = threading.Lock()
        self._regions: dict[str, _Region] = {}

    def __repr__(self) -> str:
        return f"SharedMemoryRegions({len(self._regions)} registered)"

    def __contains__(self, name: str) -> bool:
        return name in self._regions

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Map that part of the object `key`. Raises AlreadyExists, InvalidRequest."""
        if not name:
            raise InvalidRequest("shared memory region: expected a name, got none")
        status = RegionStatus(name, key, offset, byte_size)
        with self._lock:
            if name in self._regions or self._is_taken(name):
                raise AlreadyExists(f"shared memory region '{name}' already in manager")
            self._regions[name] = self._map(status)

    def unregister(self, name: str) -> None:
        """Of an unknown name nothing is left to do."""
        with self._lock:
            self._regions.pop(name, None)

    def unregister_all(self) -> None:
        with self._lock:
            self._regions.clear()

    def status(self, name: str) -> RegionStatus:
        """Raises NotFound."""
        region = self._regions.get(name)
        if region is None:
            if self._is_taken(name):
                raise NotFound(f"The region named '{name}' is registered as CUDA shared memory, not system shared memory")
            raise NotFound(f"Unable to find system shared memory region: '{name}'")
        return region.status

    def status_of_all(self) -> list[RegionStatus]:
        with self._lock:
            return [region.status for region in self._regions.values()]

    def view(self, name: str, offset: int, byte_size: int) -> memoryview:
        """That part of a region, writable; it stays valid for as long as somebody holds it. Raises NotFound, InvalidRequest."""
        region = self._regions.get(name)
        if region is None:
            raise NotFound(f"Unable to find shared memory region: '{name}'")
        return region.view(offset, byte_size)

    def _map(self, status: RegionStatus) -> _Region:
        descriptor = self._open(status.key)
        try:
            found = os.fstat(descriptor)
            size = found.st_size
            if not status.byte_size or status.offset + status.byte_size > size:
                raise InvalidRequest(
                    f"failed to register shared memory region '{status.name}': invalid args: expected a part of the {size} bytes "
                    f"of '{status.key}', got {status.byte_size} from {status.offset} on"
                )
            # Pages come when they are first written, and where there is no room then, that ends the process. A container's /dev/shm
            # has 64 MB unless somebody asked for more.
            system = os.fstatvfs(descriptor)
            missing, free = size - found.st_blocks * _BLOCK, system.f_bavail * system.f_frsize
            if missing > free:
                raise InvalidRequest(
                    f"failed to register shared memory region '{status.name}': expected room for the {missing} bytes of "
                    f"'{status.key}' that were never written, got {free} bytes free in {self._directory}"
                )
            # A mapping begins at a page.
            skipped = status.offset % mmap.ALLOCATIONGRANULARITY
            try:
                mapping = mmap.mmap(descriptor, skipped + status.byte_size, offset=status.offset - skipped)
            except (OSError, ValueError) as error:
                raise InvalidRequest(f"failed to register shared memory region '{status.name}': {error}") from None
        finally:
            os.close(descriptor)
        return _Region(status, mapping, skipped)

    def _open(self, key: str) -> int:
        """As shm_open does, to which a key is the name of a file and never a path. Raises InvalidRequest."""
        name = key.lstrip("/")
        if name.startswith(RESERVED):
            raise InvalidRequest(f"cannot register shared memory region with the key '{key}': expected none that begins with '{RESERVED}'")
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise InvalidRequest(f"Unable to open shared memory region: {key!r}: expected the name of an object, without '/' inside")
        try:
            # Not blocking, so that a named pipe does not hold up the server.
            descriptor = os.open(self._directory / name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InvalidRequest(f"Unable to open shared memory region: '{key}': {reason}") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InvalidRequest(f"Unable to open shared memory region: '{key}': it is no shared memory object")
        return descriptor
