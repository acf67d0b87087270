"""Every call but inference: what the server is, what it serves, how it does. From memory only, so that none waits for a disk.

Loads and unloads by request are the exception, and the only ones that are awaited.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from headrace.client_memory import ClientMemory
from headrace.errors import HeadraceError, InvalidRequest, LoadError, NotReady, ShuttingDown, Unsupported
from headrace.lifecycle.effective import EffectiveModel
from headrace.lifecycle.state import VersionState
from headrace.lifecycle.view import ModelsView, RepositoryControl, VersionView
from headrace.rpc.repository_requests import read_load, read_unload
from headrace.rpc.shared_memory import SharedMemoryService
from headrace.signature import TensorSpec
from headrace.telemetry.counters import BatchSizeCounts, CounterSnapshot, Stage
from headrace.wire import messages
from headrace.wire.config_pbtxt import model_config_message
from headrace.wire.messages import SERVICE, InferBatchStatistics, InferStatistics, ModelStatistics, StatisticDuration, method_classes

CONTROL_EXTENSION = "model_repository"
"""Where models are loaded and unloaded by request."""

SHARED_MEMORY_EXTENSION = "system_shared_memory"
CUDA_EXTENSION = "cuda_shared_memory"
"""Where clients may use it."""

EXTENSIONS = (
    "classification",
    CONTROL_EXTENSION,
    "schedule_policy",
    "model_configuration",
    SHARED_MEMORY_EXTENSION,
    CUDA_EXTENSION,
    "binary_tensor_data",
    "parameters",
    "statistics",
)
"""What ServerMetadata lists, in Triton's order. Clients switch features on by it: only what works may stand here."""

CONTROL_REFUSED = "explicit model load / unload is not allowed if polling is enabled"
"""Triton's text, which its clients' tests assert, also where nothing is polled."""

_TensorMetadata = messages.ModelMetadataResponse.TensorMetadata
_ModelIndex = messages.RepositoryIndexResponse.ModelIndex

Unary = Callable[[bytes], bytes]
AsyncUnary = Callable[[bytes], Awaitable[bytes]]
Request = TypeVar("Request", bound=Message)


class ControlService:
    """Owns the loads and unloads that are under way. Event loop only; every call raises HeadraceError for what it refuses."""

    def __init__(
        self,
        models: ModelsView,
        *,
        server_name: str,
        server_version: str,
        control: RepositoryControl | None = None,
        regions: ClientMemory | None = None,
    ) -> None:
        self._shared_memory = SharedMemoryService(regions)
        self._models = models
        self._control = control
        self._changes: set[asyncio.Task[None]] = set()
        self._server_name = server_name
        self._server_version = server_version

    def methods(self) -> dict[str, Unary]:
        """Every unary method of the service but ModelInfer and the slow ones, by name; those not offered raise Unsupported."""
        shared_memory = self._shared_memory
        offered = {
            "ServerLive": _unary(messages.ServerLiveRequest, self.server_live),
            "ServerReady": _unary(messages.ServerReadyRequest, self.server_ready),
            "ModelReady": _unary(messages.ModelReadyRequest, self.model_ready),
            "ServerMetadata": _unary(messages.ServerMetadataRequest, self.server_metadata),
            "ModelMetadata": _unary(messages.ModelMetadataRequest, self.model_metadata),
            "ModelConfig": _unary(messages.ModelConfigRequest, self.model_config),
            "ModelStatistics": _unary(messages.ModelStatisticsRequest, self.model_statistics),
            "RepositoryIndex": _unary(messages.RepositoryIndexRequest, self.repository_index),
            "SystemSharedMemoryStatus": _unary(messages.SystemSharedMemoryStatusRequest, shared_memory.status),
            "SystemSharedMemoryRegister": _unary(messages.SystemSharedMemoryRegisterRequest, shared_memory.register),
            "SystemSharedMemoryUnregister": _unary(messages.SystemSharedMemoryUnregisterRequest, shared_memory.unregister),
            "CudaSharedMemoryStatus": _unary(messages.CudaSharedMemoryStatusRequest, shared_memory.cuda_status),
        }
        served_elsewhere = {"ModelInfer", "ModelStreamInfer", *self.slow_methods()}
        others = [name for name in method_classes(SERVICE) if name not in {*offered, *served_elsewhere}]
        return {**offered, **{name: _unsupported(name) for name in others}}

    def slow_methods(self) -> dict[str, AsyncUnary]:
        """Those that wait for models, or for a driver."""
        shared_memory = self._shared_memory
        return {
            "CudaSharedMemoryRegister": _async_unary(messages.CudaSharedMemoryRegisterRequest, shared_memory.cuda_register),
            "CudaSharedMemoryUnregister": _async_unary(messages.CudaSharedMemoryUnregisterRequest, shared_memory.cuda_unregister),
            "RepositoryModelLoad": _async_unary(messages.RepositoryModelLoadRequest, self.repository_model_load),
            "RepositoryModelUnload": _async_unary(messages.RepositoryModelUnloadRequest, self.repository_model_unload),
        }

    def server_live(self, request: messages.ServerLiveRequest) -> messages.ServerLiveResponse:
        self._check_stays()
        return messages.ServerLiveResponse(live=True)

    def server_ready(self, request: messages.ServerReadyRequest) -> messages.ServerReadyResponse:
        self._check_stays()
        return messages.ServerReadyResponse(ready=self._models.is_ready)

    def _check_stays(self) -> None:
        if not self._models.is_live:
            raise ShuttingDown("Server exiting")

    def model_ready(self, request: messages.ModelReadyRequest) -> messages.ModelReadyResponse:
        """Unknown and unloaded models are "not ready", as clients that load and unload models rely on; a bad version is an error."""
        try:
            self._models.resolve(request.name, request.version)
        except InvalidRequest:
            raise
        except HeadraceError:
            return messages.ModelReadyResponse(ready=False)
        return messages.ModelReadyResponse(ready=True)

    def server_metadata(self, request: messages.ServerMetadataRequest) -> messages.ServerMetadataResponse:
        left_out = set()
        if self._control is None or not self._control.allows_control:
            left_out.add(CONTROL_EXTENSION)
        if not self._shared_memory.is_on:
            left_out.add(SHARED_MEMORY_EXTENSION)
        if not self._shared_memory.is_cuda_on:
            left_out.add(CUDA_EXTENSION)
        extensions = [extension for extension in EXTENSIONS if extension not in left_out]
        return messages.ServerMetadataResponse(name=self._server_name, version=self._server_version, extensions=extensions)

    def model_metadata(self, request: messages.ModelMetadataRequest) -> messages.ModelMetadataResponse:
        effective = self._effective(request.name, request.version)
        return messages.ModelMetadataResponse(
            name=request.name,
            versions=[str(version.version) for version in self._live(request.name, request.version)],
            platform=effective.platform,
            inputs=_describe(effective.signature.inputs),
            outputs=_describe(effective.signature.outputs),
        )

    def model_config(self, request: messages.ModelConfigRequest) -> messages.ModelConfigResponse:
        return messages.ModelConfigResponse(config=model_config_message(self._effective(request.name, request.version)))

    def model_statistics(self, request: messages.ModelStatisticsRequest) -> messages.ModelStatisticsResponse:
        versions = self._live(request.name, request.version)
        if request.name and not versions:
            subject = f"model '{request.name}'" + (f" version {request.version}" if request.version else "")
            raise InvalidRequest(f"requested {subject} is not available")
        return messages.ModelStatisticsResponse(model_stats=[encode_statistics(version) for version in versions])

    def repository_index(self, request: messages.RepositoryIndexRequest) -> messages.RepositoryIndexResponse:
        if request.repository_name:
            raise Unsupported(f"'repository_name': expected nothing, got '{request.repository_name}'; the index is of all repositories")
        return messages.RepositoryIndexResponse(
            models=[
                _ModelIndex(name=entry.model, version=entry.version, state=entry.state, reason=entry.reason)
                for entry in self._models.index()
                if entry.state == "READY" or not request.ready
            ]
        )

    async def repository_model_load(self, request: messages.RepositoryModelLoadRequest) -> messages.RepositoryModelLoadResponse:
        order = read_load(request)
        control = self._allowed_control()
        try:
            await self._finish(control.load(order.model, order.read_config(), order.files))
        except LoadError as error:
            raise InvalidRequest(str(error)) from None  # Triton's code for a model that cannot be loaded
        return messages.RepositoryModelLoadResponse()

    async def repository_model_unload(self, request: messages.RepositoryModelUnloadRequest) -> messages.RepositoryModelUnloadResponse:
        with_dependents = read_unload(request)
        await self._finish(self._allowed_control().unload(request.model_name, with_dependents=with_dependents))
        return messages.RepositoryModelUnloadResponse()

    def _allowed_control(self) -> RepositoryControl:
        if self._control is None or not self._control.allows_control:
            raise NotReady(CONTROL_REFUSED)
        return self._control

    def close(self) -> None:
        """Give up the loads and unloads under way: the server is stopping."""
        for task in self._changes:
            task.cancel()

    async def _finish(self, change: Coroutine[Any, Any, None]) -> None:
        """Wait for a change that goes on when its caller leaves, as in Triton: half a load is worse than one nobody waits for."""
        task = asyncio.ensure_future(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        await asyncio.wait({task})
        task.result()

    def _live(self, model: str, version: str) -> list[VersionView]:
        return [found for found in self._models.find(model, version) if found.state is VersionState.LIVE]

    def _effective(self, model: str, version: str) -> EffectiveModel:
        found = self._models.resolve(model, version)
        assert found.effective is not None, f"{found!r} is live and was never inspected"
        return found.effective


def decode(request_class: type[Request], message: bytes) -> Request:
    try:
        return request_class.FromString(message)
    except DecodeError as error:
        raise InvalidRequest(f"could not decode the {request_class.DESCRIPTOR.name}: {error}") from None


def _unary(request_class: type[Request], serve: Callable[[Request], Message]) -> Unary:
    def call(message: bytes) -> bytes:
        return serve(decode(request_class, message)).SerializeToString()

    return call


def _async_unary(request_class: type[Request], serve: Callable[[Request], Awaitable[Message]]) -> AsyncUnary:
    async def call(message: bytes) -> bytes:
        return (await serve(decode(request_class, message))).SerializeToString()

    return call


def _unsupported(name: str) -> Unary:
    def refuse(message: bytes) -> bytes:
        raise Unsupported(f"{name} is not implemented by this server")

    return refuse


def _describe(specs: Iterable[TensorSpec]) -> list[messages.ModelMetadataResponse.TensorMetadata]:
    return [_TensorMetadata(name=spec.name, datatype=spec.datatype.value, shape=spec.shape) for spec in specs]


# -- statistics --------------------------------------------------------------------------------------------------------


def encode_statistics(version: VersionView) -> ModelStatistics:
    """Triton's shape: durations are summed over requests, in `batch_stats` over executions; failures touch only `fail`."""
    counted = version.counters.snapshot()
    return ModelStatistics(
        name=version.model,
        version=str(version.version),
        last_inference=round(counted.last_inference * 1000),
        inference_count=counted.rows,
        execution_count=counted.batches,
        inference_stats=_inference_statistics(counted),
        batch_stats=[_batch_statistics(rows, sums) for rows, sums in counted.batch_sizes.items()],
    )


def _inference_statistics(counted: CounterSnapshot) -> InferStatistics:
    # perf_analyzer reads all of these and aborts where one is missing, hence the cache's zeros.
    return InferStatistics(
        success=_duration(counted.success, counted.seconds[Stage.REQUEST]),
        fail=_duration(sum(counted.failures), sum(counted.failure_seconds)),
        queue=_duration(counted.success, counted.seconds[Stage.QUEUE]),
        compute_input=_duration(counted.success, counted.seconds[Stage.COMPUTE_INPUT]),
        compute_infer=_duration(counted.success, counted.seconds[Stage.COMPUTE]),
        compute_output=_duration(counted.success, counted.seconds[Stage.COMPUTE_OUTPUT]),
        cache_hit=_duration(0, 0.0),
        cache_miss=_duration(0, 0.0),
    )


def _batch_statistics(rows: int, sums: BatchSizeCounts) -> InferBatchStatistics:
    return InferBatchStatistics(
        batch_size=rows,
        compute_input=_duration(sums.executions, sums.compute_input),
        compute_infer=_duration(sums.executions, sums.compute),
        compute_output=_duration(sums.executions, sums.compute_output),
    )


def _duration(count: int, seconds: float) -> StatisticDuration:
    return StatisticDuration(count=count, ns=round(seconds * 1e9))
