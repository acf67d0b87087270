"""Transports on free ports over scripted models."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from headrace.client_memory import ClientMemory
from headrace.config import ServerConfig
from headrace.lifecycle.view import AdminView, RepositoryControl
from headrace.rpc.admin import AdminService
from headrace.rpc.control import ControlService
from headrace.rpc.health import HealthService
from headrace.rpc.inference import InferenceService
from headrace.rpc.transports.base import Services, Transport
from headrace.rpc.transports.grpcio import GrpcioTransport
from headrace.rpc.transports.native import NativeTransport
from scripted_models import ScriptedModels, ScriptedVersion

TRANSPORTS: dict[str, Callable[[Services, ServerConfig], Transport]] = {"grpcio": GrpcioTransport, "native": NativeTransport}


@dataclass
class Served:
    """A transport that serves `models` at `addresses`; `stop` is the app's order of stopping."""

    transport: Transport
    services: Services
    models: ScriptedModels
    addresses: list[str]

    @property
    def address(self) -> str:
        return self.addresses[0]

    async def stop(self, grace: float) -> None:
        self.models.announce_stop()
        self.services.close()
        await self.transport.stop(grace)


Serve = Callable[..., AbstractAsyncContextManager[Served]]


def serve_on(name: str) -> Serve:
    """`async with serve(version, ..., grpc=(listener, ...)) as served`; other keywords are ServerConfig's.

    `view` is what operators see, `repository` what loads and unloads by request.
    """

    @asynccontextmanager
    async def serve(
        *versions: ScriptedVersion, view: AdminView | None = None, repository: RepositoryControl | None = None, **options: Any
    ) -> AsyncIterator[Served]:
        models = ScriptedModels(*versions)
        config = ServerConfig(**{"grpc": ("127.0.0.1:0",), **options})
        regions = ClientMemory.make(with_system=config.client_shared_memory, with_cuda=config.client_cuda_shared_memory)
        control = ControlService(models, server_name="triton", server_version="1.2.3", control=repository, regions=regions)
        admin = None if view is None else AdminService(view, config.admin)
        services = Services(InferenceService(models, regions=regions), control, HealthService(models), admin)
        transport = TRANSPORTS[name](services, config)
        served = Served(transport, services, models, await transport.start())
        try:
            yield served
        finally:
            await served.stop(grace=0.0)
            models.close()

    return serve
