"""Builds a server from a Config, starts it in order and stops it in the reverse order. The only module that knows every part."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import signal
import sys
import time
from collections.abc import Callable

import uvloop

from headrace import __version__
from headrace.batching.event_loop import LoopSchedule, LoopTimer
from headrace.config import ServerConfig
from headrace.errors import ConfigError
from headrace.http.server import HttpServer
from headrace.lifecycle.manager import ModelManager, WantedVersion
from headrace.lifecycle.policy import select_versions
from headrace.plugins import load_backends, open_source
from headrace.rpc.control import ControlService
from headrace.rpc.health import HealthService
from headrace.rpc.inference import InferenceService
from headrace.rpc.transports.base import Services, Transport
from headrace.rpc.transports.grpcio import GrpcioTransport
from headrace.telemetry.access_log import AccessLog
from headrace.telemetry.log import get_logger
from headrace.telemetry.metrics import make_registry

log = get_logger(__name__)


SAME_SIGNAL = 0.5
"""Seconds within which a second signal is the first one again: timeout(1) and some supervisors send it to the process and to its group."""


class Server:
    """One running server. `start` binds and loads; `stop` drains and closes; both may be called once."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        loop = asyncio.get_running_loop()
        self.access_log = AccessLog(sys.stdout) if config.access_log else None
        self.models = ModelManager(
            load_backends(), lambda: LoopTimer(loop), LoopSchedule(loop), load_concurrency=config.load_threads, access_log=self.access_log
        )
        self.services = Services(
            InferenceService(self.models, self.access_log),
            ControlService(self.models, server_name=config.server_name, server_version=__version__),
            HealthService(self.models),
        )
        self.transport: Transport = GrpcioTransport(self.services, config)
        self.http: HttpServer | None = None
        self.grpc_addresses: list[str] = []
        self.http_address = ""

    async def start(self) -> None:
        """Sockets first, so that liveness can be probed while models load; ready once every wanted version is live."""
        if self.access_log is not None:
            self.access_log.start()
        if self.config.http:
            self.http = HttpServer(self.config.http, self.models, make_registry(lambda: self.models.find("", "")))
            self.http_address = await self.http.start()
        self.grpc_addresses = await self.transport.start()
        log.info("server listening", grpc=self.grpc_addresses, http=self.http_address)
        await self._load()

    async def _load(self) -> None:
        wanted: list[WantedVersion] = []
        errors: dict[str, str] = {}
        for uri in self.config.models:
            source = open_source(uri, self.config.sources)
            try:
                listing = await source.list()
            except OSError as error:
                raise ConfigError(f"model repository {uri!r} cannot be read: {error.strerror}") from None
            errors.update(listing.errors)
            for model in listing.models.values():
                taken = [want for want in wanted if want.model == model.name]
                if taken:
                    raise ConfigError(f"model '{model.name}' is in two repositories: {taken[0].source} and {uri}; expected one")
                policy = model.config.version_policy
                numbers = select_versions(list(model.versions), policy)
                if not numbers:
                    there = ", ".join(map(str, sorted(model.versions)))
                    errors[model.name] = f"version_policy '{policy}' selects none of its versions: {there}"
                for number in numbers:
                    ref = model.versions[number]
                    fetch = functools.partial(source.fetch, model, number)
                    wanted.append(WantedVersion(model.name, number, ref.token, model.config, fetch, ref.location, uri))
        await self.models.load_all(wanted, errors)
        log.info("server ready" if self.models.is_ready else "server not ready", models=len({want.model for want in wanted}))

    async def stop(self) -> None:
        """Not ready, no new calls, finish what is queued within the grace, then workers, then sockets."""
        deadline = time.monotonic() + self.config.shutdown_grace
        self.models.announce_stop()
        self.services.health.close()
        # The transport refuses new calls at once and waits for those it has taken, which the models still serve.
        await self.transport.stop(self.config.shutdown_grace)
        await self.models.stop(max(deadline - time.monotonic(), 0.0))
        if self.http is not None:
            await self.http.stop()
        if self.access_log is not None:
            await asyncio.to_thread(self.access_log.stop)
        log.info("server stopped")


async def serve(config: ServerConfig, started: Callable[[Server], None] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; a second signal, later than SAME_SIGNAL, ends the process at once with status 1."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    asked_at = 0.0

    def on_signal() -> None:
        nonlocal asked_at
        if stopping.is_set():
            if time.monotonic() - asked_at < SAME_SIGNAL:
                return
            log.warning("shutdown forced")
            sys.stderr.flush()
            # Not sys.exit: worker threads may be inside a model for minutes, and the operator has asked twice.
            os._exit(1)
        log.info("server stopping", grace=config.shutdown_grace)
        asked_at = time.monotonic()
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    server = Server(config)
    try:
        start = asyncio.ensure_future(server.start())
        stop = asyncio.ensure_future(stopping.wait())
        await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
        if start.done():
            start.result()
            # What is loaded now stays for long: out of the collector's way, which otherwise scans it on every full collection.
            # Here and not in Server, because it is the whole process's.
            gc.collect()
            gc.freeze()
            if started is not None:
                started(server)
            await stop
        else:
            start.cancel()
            # What it still has to say is of no interest any more; as a result of gather it is not logged either.
            await asyncio.gather(start, return_exceptions=True)
    finally:
        await server.stop()
    if server.models.is_busy:
        _leave()
    return 0


def _leave() -> None:
    """End the process although threads are inside models, in loads or runs that cannot be interrupted.

    The interpreter's own way out would unwind them through C++ frames, which aborts the process.
    """
    log.warning("threads left behind", reason="a model was still being loaded or run")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run(config: ServerConfig, started: Callable[[Server], None] | None = None) -> int:
    """The command `headrace serve`: an event loop of its own, until a signal. Returns the exit code."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(config, started))
