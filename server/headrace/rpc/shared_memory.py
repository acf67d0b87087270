"""The calls by which clients register their shared memory: system shared memory, and that of CUDA devices."""

from __future__ import annotations

import asyncio

from headrace.client_memory import ClientMemory
from headrace.cuda_regions import CudaRegions, CudaRegionStatus
from headrace.errors import Unsupported
from headrace.shared_memory import RegionStatus, SharedMemoryRegions
from headrace.wire import messages
from headrace.wire.shared_memory import DISABLED

_RegionStatus = messages.SystemSharedMemoryStatusResponse.RegionStatus
_CudaRegionStatus = messages.CudaSharedMemoryStatusResponse.RegionStatus


class SharedMemoryService:
    """`memory` None, or without one of the two kinds: clients may not use that. Every call raises HeadraceError for what it refuses."""

    def __init__(self, memory: ClientMemory | None) -> None:
        self._system = memory.system if memory is not None else None
        self._cuda = memory.cuda if memory is not None else None

    @property
    def is_on(self) -> bool:
        return self._system is not None

    @property
    def is_cuda_on(self) -> bool:
        return self._cuda is not None

    def _allowed(self) -> SharedMemoryRegions:
        if self._system is None:
            raise Unsupported(DISABLED)
        return self._system

    def _allowed_cuda(self) -> CudaRegions:
        if self._cuda is not None:
            return self._cuda
        raise Unsupported("CUDA shared memory is not supported by this server as it runs; --client-cuda-shared-memory turns it on")

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
        regions = self._allowed_cuda()
        found = [regions.status(request.name)] if request.name else regions.status_of_all()
        return messages.CudaSharedMemoryStatusResponse(regions={status.name: _encode_cuda(status) for status in found})

    async def cuda_register(self, request: messages.CudaSharedMemoryRegisterRequest) -> messages.CudaSharedMemoryRegisterResponse:
        """In a thread: the first one may wake the driver."""
        regions = self._allowed_cuda()
        await asyncio.to_thread(regions.register, request.name, request.raw_handle, request.device_id, request.byte_size)
        return messages.CudaSharedMemoryRegisterResponse()

    async def cuda_unregister(self, request: messages.CudaSharedMemoryUnregisterRequest) -> messages.CudaSharedMemoryUnregisterResponse:
        """Where CUDA's is off there is none registered, so there is nothing to do: perf_analyzer begins with it before it uses system
        shared memory."""
        if self._cuda is None:
            self._allowed()
            return messages.CudaSharedMemoryUnregisterResponse()
        if request.name:
            await asyncio.to_thread(self._cuda.unregister, request.name)
        else:
            await asyncio.to_thread(self._cuda.unregister_all)
        return messages.CudaSharedMemoryUnregisterResponse()


def _encode(status: RegionStatus) -> messages.SystemSharedMemoryStatusResponse.RegionStatus:
    return _RegionStatus(name=status.name, key=status.key, offset=status.offset, byte_size=status.byte_size)


def _encode_cuda(status: CudaRegionStatus) -> messages.CudaSharedMemoryStatusResponse.RegionStatus:
    return _CudaRegionStatus(name=status.name, device_id=status.device_id, byte_size=status.byte_size)
