"""The services on grpc.aio: every streaming kind, TLS, Unix sockets, reflection.

Handlers take and give raw bytes (no (de)serializers), so that the codec chooses how to read a message. They are registered
generically: with every method registered by name, grpc.aio waits on one future a method and each call costs 6 % more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from headrace.config import ServerConfig
from headrace.errors import ConfigError, HeadraceError, ShuttingDown
from headrace.rpc.admin import AdminService
from headrace.rpc.reflection import reflection_handlers
from headrace.rpc.transports.base import Services
from headrace.rpc.transports.grpcio_calls import (
    Context,
    LoopOutlet,
    guarded,
    serve_admin,
    serve_events,
    serve_inference,
    serve_slow_unary,
    serve_unary,
    serve_watch,
)
from headrace.rpc.transports.grpcio_stream import InferStream
from headrace.rpc.transports.listeners import SOCKET_MODE, UNIX, bind_problem, clear_stale_socket, load_certificates
from headrace.wire.messages import ADMIN_SERVICE, FEEDBACK_SERVICE, HEALTH_SERVICE, SERVICE


class GrpcioTransport:
    """Owns the grpc.aio server, its Unix socket files and the open streams. Built on the event loop."""

    def __init__(self, services: Services, config: ServerConfig) -> None:
        self._services = services
        self._config = config
        self._outlet = LoopOutlet(asyncio.get_running_loop())
        self._streams: set[InferStream] = set()
        self._socket_files: list[Path] = []
        self._server: Any = grpc.aio.server(options=_options(config), handlers=self._handlers())

    def __repr__(self) -> str:
        return f"GrpcioTransport({', '.join(self._config.grpc)}, {len(self._streams)} streams)"

    async def start(self) -> list[str]:
        certificates = load_certificates(self._config)
        credentials = certificates and grpc.ssl_server_credentials(
            [(certificates.key, certificates.chain)],
            certificates.client_authorities,
            require_client_auth=certificates.client_authorities is not None,
        )
        addresses = [
            self._bind_unix(listener) if listener.startswith(UNIX) else self._bind_tcp(listener, credentials)
            for listener in self._config.grpc
        ]
        await self._server.start()
        return addresses

    async def stop(self, grace: float) -> None:
        # grpc.aio closes the listeners and sends GOAWAY at once, so that no stream comes after those that are closed here.
        stopping = asyncio.ensure_future(self._server.stop(grace))
        await asyncio.sleep(0)
        for stream in self._streams:
            stream.close(ShuttingDown("the server is shutting down"))
        await stopping
        for path in self._socket_files:
            path.unlink(missing_ok=True)

    def _bind_tcp(self, listener: str, credentials: Any) -> str:
        try:
            port = self._server.add_secure_port(listener, credentials) if credentials else self._server.add_insecure_port(listener)
        except RuntimeError:
            raise ConfigError(f"grpc: could not listen on {listener}: {bind_problem(listener)}") from None
        return f"{listener.rpartition(':')[0]}:{port}"

    def _bind_unix(self, listener: str) -> str:
        path = Path(listener.removeprefix(UNIX))
        clear_stale_socket(path)
        try:
            self._server.add_insecure_port(listener)
        except RuntimeError:
            expected = "expected a path of at most 107 bytes in a writable directory"
            raise ConfigError(f"grpc: could not listen on {listener}: {expected}") from None
        self._socket_files.append(path)
        path.chmod(SOCKET_MODE)
        return listener

    # -- what is served ------------------------------------------------------------------------------------------------

    def _handlers(self) -> list[Any]:
        services = self._services
        methods = {name: _unary(name, serve_unary(call)) for name, call in services.control.methods().items()}
        methods.update((name, _unary(name, serve_slow_unary(call))) for name, call in services.control.slow_methods().items())
        methods["ModelInfer"] = _unary("ModelInfer", serve_inference(services.inference, self._outlet, asyncio.get_running_loop()))
        methods["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(guarded("ModelStreamInfer", self._serve_stream))
        health = {name: _unary(name, serve_unary(call)) for name, call in services.health.methods().items()}
        health["Watch"] = grpc.unary_stream_rpc_method_handler(guarded("Watch", serve_watch(services.health)))
        served = {SERVICE: methods, HEALTH_SERVICE: health}
        if services.admin is not None:
            served[ADMIN_SERVICE] = _admin_methods(services.admin)
        if services.feedback is not None:
            calls = services.feedback.methods().items()
            served[FEEDBACK_SERVICE] = {name: _unary(name, serve_slow_unary(call)) for name, call in calls}
        # Looked through in order, so inference comes first.
        return [
            *(grpc.method_handlers_generic_handler(service, handlers) for service, handlers in served.items()),
            *reflection_handlers(tuple(served)),
        ]

    async def _serve_stream(self, messages: AsyncIterator[bytes], context: Context) -> HeadraceError | None:
        stream = InferStream(self._services.inference, self._outlet, context)
        self._streams.add(stream)
        try:
            return await stream.run(messages)
        finally:
            self._streams.discard(stream)


def _admin_methods(admin: AdminService) -> dict[str, Any]:
    methods = {name: _unary(name, serve_admin(call)) for name, call in admin.methods().items()}
    methods["WatchEvents"] = grpc.unary_stream_rpc_method_handler(guarded("WatchEvents", serve_events(admin)))
    return methods


def _unary(name: str, serve: Any) -> Any:
    return grpc.unary_unary_rpc_method_handler(guarded(name, serve))


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        # Two servers on one port would split the traffic between them unnoticed.
        ("grpc.so_reuseport", 0),
        # Clients may ping every 10 s also when no call is open: the default of 5 minutes cuts off those that keep NAT
        # mappings and load balancers alive, with "too many pings".
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_ping_strikes", 2),
    ]
