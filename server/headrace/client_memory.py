"""The memory that clients on this machine lend the server, whatever kind it is of. One name stands for one region of either kind."""

from __future__ import annotations

from headrace.cuda_regions import CudaRegions
from headrace.errors import NotFound
from headrace.requests import DeviceMemory
from headrace.shared_memory import SharedMemoryRegions


class ClientMemory:
    """Either kind is None where clients may not use it. Any thread."""

    def __init__(self, system: SharedMemoryRegions | None, cuda: CudaRegions | None) -> None:
        self.system = system
        self.cuda = cuda

    def __repr__(self) -> str:
        return f"ClientMemory({self.system!r}, {self.cuda!r})"

    @classmethod
    def make(cls, *, with_system: bool, with_cuda: bool) -> ClientMemory | None:
        """None where there is neither."""
        memory = cls(None, None)
        if with_system:
            memory.system = SharedMemoryRegions(is_taken=lambda name: memory.cuda is not None and name in memory.cuda)
        if with_cuda:
            memory.cuda = CudaRegions(is_taken=lambda name: memory.system is not None and name in memory.system)
        return memory if with_system or with_cuda else None

    def view(self, name: str, offset: int, byte_size: int) -> memoryview | DeviceMemory:
        """See wire.shared_memory.Regions."""
        if self.cuda is not None and name in self.cuda:
            return self.cuda.view(name, offset, byte_size)
        if self.system is not None:
            return self.system.view(name, offset, byte_size)
        raise NotFound(f"Unable to find shared memory region: '{name}'")

    def close(self) -> None:
        """Forget them all. What requests still hold is given back with the last of them."""
        if self.system is not None:
            self.system.unregister_all()
        if self.cuda is not None:
            self.cuda.unregister_all()
