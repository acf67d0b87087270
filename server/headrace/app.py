"""Builds a server from a Config, starts it in order and stops it in the reverse order. The only module that knows every part."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import uvloop

from headrace import __version__
from headrace.batching.event_loop import LoopSchedule, LoopTimer
from headrace.capture.captures import Captures
from headrace.client_memory import ClientMemory
from headrace.config import ServerConfig
from headrace.drift.monitor import DriftMonitors
from headrace.errors import ConfigError
from headrace.feedback.feedbacks import Feedbacks
from headrace.http.dashboard import Dashboard
from headrace.http.server import HttpServer
from headrace.lifecycle.admin import Admin
from headrace.lifecycle.control import ExplicitControl
from headrace.lifecycle.dry_run import NOTHING, plan
from headrace.lifecycle.manager import ModelManager
from headrace.lifecycle.memory import keep_buffers, limit_arenas
from headrace.lifecycle.tasks import Tasks
from headrace.lifecycle.watcher import Watcher
from headrace.plugins import load_backends, open_source
from headrace.rpc.admin import AdminService
from headrace.rpc.control import ControlService
from headrace.rpc.feedback import FeedbackService
from headrace.rpc.health import HealthService
from headrace.rpc.inference import InferenceService
from headrace.rpc.transports.base import Services
from headrace.rpc.transports.choice import choose, open_transport
from headrace.sources.base import Listing, Source
from headrace.telemetry.access_log import AccessLog
from headrace.telemetry.audit import AuditLog, read_audit
from headrace.telemetry.capture_metrics import CaptureCollector
from headrace.telemetry.device_metrics import DeviceCollector
from headrace.telemetry.feedback_metrics import FeedbackCollector
from headrace.telemetry.gpu import Gpus
from headrace.telemetry.lifecycle_metrics import LifecycleCollector
from headrace.telemetry.log import get_logger
from headrace.telemetry.metrics import make_registry
from headrace.telemetry.records import RequestRecords
from headrace.telemetry.tracing import Sampler, Tracing
from headrace.telemetry.tracing_metrics import TracingCollector
from headrace.telemetry.webhooks import WebhookCollector, Webhooks
from headrace.threads import expect_little_work

log = get_logger(__name__)


SAME_SIGNAL = 0.5
"""Seconds within which a second signal is the first one again: timeout(1) and some supervisors send it to the process and to its group."""


class Server:
    """One running server. `start` binds and loads; `stop` drains and closes; both may be called once."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        loop = asyncio.get_running_loop()
        self.access_log = AccessLog(sys.stdout) if config.access_log else None
        self.tracing = _open_tracing(config) if config.tracing else None
        records = RequestRecords(self.access_log, self.tracing) if self.access_log is not None or self.tracing is not None else None
        backends = load_backends()
        if config.shared_threads:
            for backend in backends.values():
                backend.share_threads(config.shared_threads)
        self.drift = DriftMonitors(loop)
        self.feedbacks = Feedbacks()
        self.captures = _make_captures(config) if config.capture else None
        self.models = ModelManager(
            backends,
            lambda: LoopTimer(loop),
            LoopSchedule(loop),
            load_concurrency=config.load_threads,
            records=records,
            drift=self.drift if config.drift else None,
            attachments=[self.feedbacks, *([self.captures] if self.captures is not None else [])],
            drain_grace=config.shutdown_grace,
        )
        self.sources = [open_source(uri, config.sources) for uri in config.models]
        self.watchers = [self._watcher(source) for source in self.sources] if config.model_control != "explicit" else []
        self.admin = Admin(self.models, self.watchers)
        self.audit_log: AuditLog | None = None
        self.webhooks: Webhooks | None = None
        self._tasks = Tasks()
        self.control = ExplicitControl(self.models, self.sources) if config.model_control == "explicit" else None
        regions = ClientMemory.make(with_system=config.client_shared_memory, with_cuda=config.client_cuda_shared_memory)
        self.client_memory = regions
        self.services = Services(
            InferenceService(self.models, records, regions),
            ControlService(self.models, server_name=config.server_name, server_version=__version__, control=self.control, regions=regions),
            HealthService(self.models),
            AdminService(self.admin, config.admin, self.feedbacks),
            FeedbackService(self.feedbacks),
        )
        self.transport = open_transport(self.services, config)
        self.http: HttpServer | None = None
        self.grpc_addresses: list[str] = []
        self.http_address = ""

    async def start(self) -> None:
        """Sockets first, so that liveness can be probed while models load; ready once every wanted version is live."""
        if self.access_log is not None:
            self.access_log.start()
        if self.tracing is not None:
            self.tracing.start()
        if self.captures is not None:
            await asyncio.to_thread(self.captures.start)
        self._start_webhooks()
        if self.config.http:
            self.http = self._make_http()
            self.http_address = await self.http.start()
        self.grpc_addresses = await self.transport.start()
        log.info("server listening", grpc=self.grpc_addresses, http=self.http_address, transport=choose(self.config))
        await self._load()

    def _make_http(self) -> HttpServer:
        config = self.config
        registry = make_registry(lambda: self.models.find("", ""), self.models.shadows, Gpus())
        registry.register(LifecycleCollector(self.admin))
        registry.register(DeviceCollector(self.models.devices))
        registry.register(FeedbackCollector(self.feedbacks))
        if self.webhooks is not None:
            registry.register(WebhookCollector(self.webhooks))
        if self.tracing is not None:
            registry.register(TracingCollector(self.tracing))
        if self.captures is not None:
            registry.register(CaptureCollector(self.captures))
        dashboard = Dashboard(self.models, self.admin, shows_events=config.admin != "off") if config.dashboard else None
        return HttpServer(
            config.http, self.models, registry, webhook_secret=config.webhook_secret, hint=self._look_now, dashboard=dashboard
        )

    def _start_webhooks(self) -> None:
        config = self.config
        if config.drift_webhooks:
            self.webhooks = Webhooks(config.drift_webhooks, config.drift_webhook_secret, f"//{socket.gethostname()}/headrace")
            self.webhooks.start()
            self.drift.subscribe(self.webhooks.alerts)
            self.models.event_log.subscribe(self.webhooks.lifecycle)

    def _look_now(self) -> None:
        """Somebody says that something has changed, somewhere."""
        for watcher in self.watchers:
            watcher.hint()

    def _watcher(self, source: Source) -> Watcher:
        config = self.config
        return Watcher(
            source,
            self.models.take,
            interval=config.poll_interval,
            settle=config.settle,
            on_error=self.models.set_source_error,
            follows_hints=config.model_control == "watch",
        )

    async def _load(self) -> None:
        await self._start_audit()
        if self.control is not None:
            await self.control.start(self.config.load_models)
            await self._become_ready()
            return
        for watcher in self.watchers:
            await watcher.start()
        if self.config.model_control == "none":
            unread = [watcher for watcher in self.watchers if watcher.error]
            if unread:
                raise ConfigError(f"model repository {unread[0].source.uri!r} cannot be read: {unread[0].error}")
        if self.models.conflicts:
            raise ConfigError(self.models.conflicts[0])
        if self.config.model_control in ("watch", "poll"):
            for watcher in self.watchers:
                self._tasks.start(watcher.run(), f"watch {watcher.source.uri}")
        if all(watcher.has_listed.is_set() for watcher in self.watchers):
            await self._become_ready()
        else:
            # Serving what there is meanwhile; not ready before every source has been heard.
            self._tasks.start(self._become_ready(), "become ready")

    async def _become_ready(self) -> None:
        for watcher in self.watchers:
            await watcher.has_listed.wait()
        await self.models.settle()
        log.info("server ready" if self.models.is_ready else "server not ready", models=len(self.models.models))

    async def _start_audit(self) -> None:
        if not self.config.audit_log:
            return
        path = Path(self.config.audit_log)
        for name, left in (await asyncio.to_thread(read_audit, path)).items():
            self.models.remember(name, left.blocked, left.labels)
        self.audit_log = AuditLog(path)
        self.models.event_log.subscribe(self.audit_log.record)

    async def stop(self) -> None:
        """Not ready, no new calls, finish what is queued within the grace, then workers, then sockets."""
        deadline = time.monotonic() + self.config.shutdown_grace
        self.models.announce_stop()
        self.services.close()
        await self._tasks.close()
        # The transport waits for the calls it has taken, which the models still serve.
        await self.transport.stop(self.config.shutdown_grace)
        await self.models.stop(max(deadline - time.monotonic(), 0.0))
        if self.client_memory is not None:
            await asyncio.to_thread(self.client_memory.close)
        self.drift.close()
        self.feedbacks.close()
        if self.http is not None:
            await self.http.stop()
        if self.webhooks is not None:
            await self.webhooks.stop()
        for source in self.sources:
            await source.close()
        if self.captures is not None:
            await asyncio.to_thread(self.captures.stop)
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.stop)
        if self.access_log is not None:
            await asyncio.to_thread(self.access_log.stop)
        if self.audit_log is not None:
            await asyncio.to_thread(self.audit_log.stop)
        log.info("server stopped")


def _make_captures(config: ServerConfig) -> Captures:
    return Captures(
        Path(config.capture),
        fraction=config.capture_fraction,
        per_second=config.capture_max_per_second,
        max_bytes=config.capture_max_bytes,
    )


def _open_tracing(config: ServerConfig) -> Tracing:
    """Raises ConfigError."""
    # Not at the top: its packages are an extra, and take a quarter of a second to import.
    try:
        from headrace.telemetry.otel import open_exporter
    except ImportError as error:
        raise ConfigError(f"tracing: expected the packages of OpenTelemetry, pip install 'headrace[otel]', got: {error}") from None
    exporter = open_exporter(config.tracing, config.trace_service_name, __version__)
    return Tracing(Sampler(config.trace_fraction, config.trace_max_per_second), exporter)


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
    if config.watch_dry_run:
        await dry_run(config, stopping)
        return 0
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


async def dry_run(config: ServerConfig, stopping: asyncio.Event) -> None:
    """Print what would be loaded and unloaded, at first and with every change, until told to stop. Serves nothing."""
    seen: dict[str, Listing] = {}

    def take(source: Source, listing: Listing) -> None:
        for line in plan(seen.get(source.uri, NOTHING), listing):
            print(f"would {line}" if not line.startswith("cannot") else line, flush=True)
        seen[source.uri] = listing

    def tell(source: Source, reason: str) -> None:
        print(f"{source.uri}: {reason or 'can be read again'}", flush=True)

    tasks = Tasks()
    sources = [open_source(uri, config.sources) for uri in config.models]
    try:
        for source in sources:
            watcher = Watcher(source, take, interval=config.poll_interval, settle=config.settle, on_error=tell)
            await watcher.start()
            tasks.start(watcher.run(), f"watch {source.uri}")
        await stopping.wait()
    finally:
        await tasks.close()
        for source in sources:
            await source.close()


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
    limit_arenas()
    keep_buffers()
    expect_little_work()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(config, started))
