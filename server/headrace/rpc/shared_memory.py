"""The calls by which clients register their shared memory. That of CUDA devices is not offered."""

from __future__ import annotations

from headrace.errors import Unsupported
from headrace.shared_memory import RegionStatus, SharedMemoryRegions
from headrace.wire import messages
from headrace.wire.shared_memory import DISABLED

_RegionStatus = messages.SystemSharedMemoryStatusResponse.RegionStatus


class SharedMemoryService:
    """`regions` None: clients may not use shared memory. Every call raises HeadraceError for what it refuses."""

    def __init__(self, regions: SharedMemoryRegions | None) -> None:
        self._regions = regions

    @property
    def is_on(self) -> bool:
        return self._regions is not None

    def _allowed(self) -> SharedMemoryRegions:
        if self._regions is None:
            raise Unsupported(DISABLED)
        return self._regions

    def status(self, request: messages.SystemSharedMemoryStatusRequest) -> messages.SystemSharedMemoryStatusResponse:
        regions = self._allowed()
        found = [regions.status(request.name)] if request.name else regions.status_of_all()
        return messages.SystemSharedMemoryStatusResponse(regions={status.name: _encode(status) for status in found})

    def register(self, request: messages.SystemSharedMemoryRegisterRequest) -> messages.SystemSharedMemoryRegisterResponse:
        self._allowed().register(request.name, request.key, request.offset, request.byte_size)
        return messages.SystemSharedMemoryRegisterResponse()

    def unregister(self, request: messages.SystemSharedMemoryUnregisterRequest) -> messages.SystemSharedMemoryUnregisterResponse:
        regions = self._allowed()
        if request.name:
            regions.unregister(request.name)
        else:
            regions.unregister_all()
        return messages.SystemSharedMemoryUnregisterResponse()

    def cuda_status(self, request: messages.CudaSharedMemoryStatusRequest) -> messages.CudaSharedMemoryStatusResponse:
        self._allowed()
        raise _no_cuda()

    def cuda_register(self, request: messages.CudaSharedMemoryRegisterRequest) -> messages.CudaSharedMemoryRegisterResponse:
        self._allowed()
        raise _no_cuda()

    def cuda_unregister(self, request: messages.CudaSharedMemoryUnregisterRequest) -> messages.CudaSharedMemoryUnregisterResponse:
        """There is none registered, so there is nothing to do: perf_analyzer begins with it before it uses system shared memory."""
        self._allowed()
        return messages.CudaSharedMemoryUnregisterResponse()


def _no_cuda() -> Unsupported:
    return Unsupported("CUDA shared memory is not supported: this server takes tensors from system shared memory only")


def _encode(status: RegionStatus) -> messages.SystemSharedMemoryStatusResponse.RegionStatus:
    return _RegionStatus(name=status.name, key=status.key, offset=status.offset, byte_size=status.byte_size)
