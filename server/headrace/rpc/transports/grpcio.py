"""The services on grpc.aio: every streaming kind, TLS, Unix sockets, reflection."""

from __future__ import annotations

import asyncio
import os
import stat
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection

from headrace.config import ServerConfig
from headrace.errors import ConfigError, HeadraceError, Unsupported
from headrace.requests import Answer, Reply
from headrace.rpc.control import Unary
from headrace.rpc.guard import as_known
from headrace.rpc.status import STATUS
from headrace.rpc.transports.base import Services
from headrace.wire.messages import HEALTH_SERVICE, POOL, SERVICE

_BytesHandler = Callable[[bytes, Any], Awaitable[bytes]]


class LoopOutlet:
    """Brings answers to the futures of the calls that wait: one hop to the loop for any number of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread = threading.get_ident()

    def deliver(self, answers: Sequence[tuple[Reply, Answer]]) -> None:
        if threading.get_ident() == self._thread:
            _settle(answers)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_settle, answers)


class FutureReply(Reply):
    __slots__ = ("future",)

    def __init__(self, outlet: LoopOutlet, future: asyncio.Future[Answer], deadline: float | None) -> None:
        super().__init__(outlet, deadline)
        self.future = future


def _settle(answers: Sequence[tuple[Reply, Answer]]) -> None:
    for reply, answer in answers:
        assert isinstance(reply, FutureReply)
        # Done already when the call was cancelled: nobody waits for this answer.
        if not reply.future.done():
            reply.future.set_result(answer)


class GrpcioTransport:
    """Owns the grpc.aio server and its Unix socket files."""

    def __init__(self, services: Services, config: ServerConfig) -> None:
        self._services = services
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._outlet = LoopOutlet(self._loop)
        self._socket_files: list[Path] = []
        self._server = grpc.aio.server(options=_options(config), handlers=[self._handlers(), self._health_handlers()])
        reflection.enable_server_reflection((SERVICE, HEALTH_SERVICE, reflection.SERVICE_NAME), self._server, pool=POOL)

    async def start(self) -> list[str]:
        addresses = [self._bind(listener) for listener in self._config.grpc]
        await self._server.start()
        return addresses

    async def stop(self, grace: float) -> None:
        await self._server.stop(grace)
        for path in self._socket_files:
            path.unlink(missing_ok=True)

    def _bind(self, listener: str) -> str:
        if listener.startswith("unix:"):
            self._socket_files.append(_clear_stale_socket(Path(listener.removeprefix("unix:"))))
        try:
            if self._config.tls_certificate and not listener.startswith("unix:"):
                port = self._server.add_secure_port(listener, _credentials(self._config))
            else:
                port = self._server.add_insecure_port(listener)
        except RuntimeError as error:
            raise ConfigError(f"grpc: could not listen on {listener}: {error}") from None
        return listener if listener.startswith("unix:") else f"{listener.rpartition(':')[0]}:{port}"

    # -- handlers ------------------------------------------------------------------------------------------------------

    def _handlers(self) -> Any:
        handlers = {name: _unary(_guarded(name, call)) for name, call in self._services.control.methods().items()}
        handlers["ModelInfer"] = _unary(self._model_infer)
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(_refuse_stream)
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def _health_handlers(self) -> Any:
        health = self._services.health

        async def watch(message: bytes, context: Any) -> AsyncIterator[bytes]:
            async for status in health.watch(message):
                yield status

        handlers = {"Check": _unary(_guarded("Check", health.check)), "Watch": grpc.unary_stream_rpc_method_handler(watch)}
        return grpc.method_handlers_generic_handler(HEALTH_SERVICE, handlers)

    async def _model_infer(self, message: bytes, context: Any) -> bytes:
        remaining = context.time_remaining()
        deadline = None if remaining is None else time.monotonic() + remaining
        reply = FutureReply(self._outlet, self._loop.create_future(), deadline)
        inference = self._services.inference
        inference.submit(message, reply)
        try:
            answer = await reply.future
        except asyncio.CancelledError:
            # grpc.aio cancels this task when the client has gone or its deadline has passed; it wants the error back.
            inference.cancel(reply)
            raise
        if isinstance(answer, bytes):
            return answer
        await context.abort(STATUS[answer.code], str(answer))
        raise AssertionError("abort always raises")


def _unary(handler: _BytesHandler) -> Any:
    return grpc.unary_unary_rpc_method_handler(handler)


def _guarded(name: str, call: Unary) -> _BytesHandler:
    async def handle(message: bytes, context: Any) -> bytes:
        try:
            return call(message)
        except Exception as error:
            known = as_known(error, name)
        await context.abort(STATUS[known.code], str(known))
        raise AssertionError("abort always raises")

    return handle


async def _refuse_stream(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    error: HeadraceError = Unsupported("ModelStreamInfer is not implemented by this server; use ModelInfer")
    await context.abort(STATUS[error.code], str(error))
    yield b""


# -- sockets -----------------------------------------------------------------------------------------------------------


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        # Two servers on one port would split the traffic between them unnoticed.
        ("grpc.so_reuseport", 0),
        # As Triton: clients may ping every 10 s while a long call runs, or they are cut off with "too many pings".
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_ping_strikes", 2),
    ]


def _credentials(config: ServerConfig) -> Any:
    key, certificate = _read_pem("tls_key", config.tls_key), _read_pem("tls_certificate", config.tls_certificate)
    authorities = _read_pem("tls_client_ca", config.tls_client_ca) if config.tls_client_ca else None
    return grpc.ssl_server_credentials([(key, certificate)], authorities, require_client_auth=authorities is not None)


def _read_pem(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: could not read {path}: {error.strerror}") from None


def _clear_stale_socket(path: Path) -> Path:
    """A socket file that a killed server left behind blocks the next one; anything else in its place is not ours to delete."""
    if path.exists():
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise ConfigError(f"grpc: {path} exists and is no socket")
        path.unlink()
    return path
