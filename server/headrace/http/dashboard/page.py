"""The page and what it asks for, over HTTP. Reads only.

State is made when somebody asks and at most once in KEPT seconds, however many look; nobody looking costs nothing.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from headrace import __version__
from headrace.errors import HeadraceError
from headrace.http.dashboard.drift import encode_drift
from headrace.http.dashboard.state import ServerState, encode_model, encode_state, sort_views
from headrace.lifecycle.state import VersionState
from headrace.lifecycle.view import AdminView, ModelsView

STATIC = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
KEPT = 1.0
"""Seconds."""
MOST_KEPT = 64
"""Versions whose features are kept; those asked for longest ago go first."""

HEADERS = {
    # Names and reasons come from elsewhere. The page makes text nodes of them; these hold even if it ever did not.
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    # The files of another release may be there after the next restart.
    "Cache-Control": "no-cache",
}


class Dashboard:
    """Owns the page's files and the answers made last. Event loop only. `shows_events`: who changed what, and why."""

    def __init__(
        self, models: ModelsView, admin: AdminView, *, shows_events: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._models = models
        self._admin = admin
        self._shows_events = shows_events
        self._clock = clock
        self._run = uuid.uuid4().hex
        self._started = time.time()
        self._files = {path.name: (path.read_bytes(), TYPES[path.suffix]) for path in sorted(STATIC.iterdir()) if path.suffix in TYPES}
        self._state = _Kept(clock)
        self._drift: dict[tuple[str, str], _Kept] = {}

    def __repr__(self) -> str:
        return f"Dashboard({len(self._files)} files, state made {self._state.made} times, features of {len(self._drift)} versions kept)"

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/dashboard/state", self._answer_state)
        router.add_get("/dashboard/drift", self._answer_drift)
        router.add_get("/dashboard/{name}", self._answer_file)

    def answer_page(self) -> web.Response:
        return self._file("index.html")

    async def _answer_file(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self._files:
            raise web.HTTPNotFound(text=f"the dashboard has no file {name!r}")
        return self._file(name)

    def _file(self, name: str) -> web.Response:
        body, content_type = self._files[name]
        # The root is this page or a text, as the Accept header wants it.
        headers = {**HEADERS, "Vary": "Accept"} if name == "index.html" else HEADERS
        response = web.Response(body=body, content_type=content_type, charset="utf-8", headers=headers)
        response.enable_compression()
        return response

    async def _answer_state(self, request: web.Request) -> web.Response:
        return _json(await self._state.get(self._make_state))

    async def _answer_drift(self, request: web.Request) -> web.Response:
        model, version = request.query.get("model", ""), request.query.get("version", "")
        if not model or not version:
            raise web.HTTPBadRequest(text="expected ?model=NAME&version=NUMBER")
        try:
            found = self._models.find(model, version)
        except HeadraceError as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        watched = [view for view in found if view.drift is not None]
        if not watched:
            raise web.HTTPNotFound(text=f"version {version} of model '{model}' is not watched for drift")
        view = max(watched, key=lambda view: view.state is VersionState.LIVE)

        async def make() -> bytes:
            report = view.drift
            return b"{}" if report is None else await asyncio.to_thread(lambda: _encode(encode_drift(report)))

        return _json(await self._kept_drift(model, version).get(make))

    def _kept_drift(self, model: str, version: str) -> _Kept:
        kept = self._drift.pop((model, version), None) or _Kept(self._clock)
        self._drift[model, version] = kept
        while len(self._drift) > MOST_KEPT:
            del self._drift[next(iter(self._drift))]
        return kept

    async def _make_state(self) -> bytes:
        server = ServerState(
            run=self._run,
            version=__version__,
            at=time.time(),
            clock=self._clock(),
            started=self._started,
            is_live=self._models.is_live,
            is_ready=self._models.is_ready,
        )
        events = self._admin.event_log.since(0) if self._shows_events else None
        views = sort_views(self._models.find("", ""))
        models = []
        for model in self._admin.describe(""):
            models.append(encode_model(model, views))
            # 0.2 ms each: requests have their turn between.
            await asyncio.sleep(0)
        return await asyncio.to_thread(_encode, encode_state(server, models, events))


class _Kept:
    """Owns one answer and when it was made. Askers at the same time share it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.made = 0
        self._clock = clock
        self._lock = asyncio.Lock()
        self._body = b""
        self._at = float("-inf")

    async def get(self, make: Callable[[], Awaitable[bytes]]) -> bytes:
        async with self._lock:
            if self._clock() - self._at >= KEPT:
                self._body = await make()
                self._at = self._clock()
                self.made += 1
            return self._body


def _encode(values: dict[str, Any]) -> bytes:
    return json.dumps(values, separators=(",", ":"), allow_nan=False).encode()


def _json(body: bytes) -> web.Response:
    response = web.Response(body=body, content_type="application/json", headers={**HEADERS, "Cache-Control": "no-store"})
    response.enable_compression()
    return response
