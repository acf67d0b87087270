"""Metrics and health over HTTP."""

from __future__ import annotations

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from headrace.errors import ConfigError
from headrace.lifecycle.view import ModelsView

ENDPOINTS = "Headrace\n\n/metrics   Prometheus metrics\n/livez     the process serves\n/readyz    every wanted model is live\n"


class HttpServer:
    """Owns one listening socket. Event loop only."""

    def __init__(self, listener: str, models: ModelsView, registry: CollectorRegistry) -> None:
        self._host, _, port = listener.rpartition(":")
        self._port = int(port)
        self._models = models
        self._registry = registry
        self._runner: web.AppRunner | None = None

    async def start(self) -> str:
        """Bind and serve. Returns HOST:PORT as bound. Raises ConfigError when it cannot be."""
        app = web.Application()
        app.router.add_get("/", self._root)
        app.router.add_get("/metrics", self._metrics)
        # The second names are Triton's: probes in existing deployments point at them.
        for path in ("/livez", "/v2/health/live"):
            app.router.add_get(path, self._livez)
        for path in ("/readyz", "/v2/health/ready"):
            app.router.add_get(path, self._readyz)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host.strip("[]"), self._port, shutdown_timeout=1.0)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise ConfigError(f"http: could not listen on {self._host}:{self._port}: {error.strerror or error}") from None
        return f"{self._host}:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _root(self, request: web.Request) -> web.Response:
        return web.Response(text=ENDPOINTS)

    async def _metrics(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self._registry), headers={"Content-Type": content_type})

    async def _livez(self, request: web.Request) -> web.Response:
        return self._answer(self._models.is_live)

    async def _readyz(self, request: web.Request) -> web.Response:
        return self._answer(self._models.is_ready)

    def _answer(self, is_good: bool) -> web.Response:
        rows = [{"model": e.model, "version": e.version, "state": e.state, "reason": e.reason} for e in self._models.index()]
        return web.json_response({"ok": is_good, "models": rows}, status=200 if is_good else 503)
