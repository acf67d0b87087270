"""All models and their versions: makes live what a source wants, and finds the version that serves a request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from headrace.backends.base import BackendRegistry
from headrace.batching.batcher import Schedule, Timer, at_once
from headrace.config import ModelConfig
from headrace.errors import InvalidRequest, NotFound, NotReady, ShuttingDown
from headrace.lifecycle.state import INDEX_STATES, VersionState
from headrace.lifecycle.version import ModelVersion
from headrace.lifecycle.view import IndexEntry
from headrace.sources.base import Fetched
from headrace.telemetry.access_log import AccessLog
from headrace.telemetry.log import get_logger

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WantedVersion:
    """A version that is to be served: what it is, and how to get it. `token` tells two contents of one number apart."""

    model: str
    version: int
    token: str
    config: ModelConfig
    fetch: Callable[[], Awaitable[Fetched]]
    location: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Route:
    """How requests for one model find a version. Immutable: a flip replaces the whole route by one assignment."""

    default: ModelVersion | None
    live: Mapping[int, ModelVersion]
    known: frozenset[int]


@dataclass(slots=True)
class _Model:
    versions: dict[int, ModelVersion] = field(default_factory=dict)
    error: str = ""


class ModelManager:
    """Owns the table of models and the routes. Everything but `resolve` belongs to the event loop; `resolve` reads one snapshot."""

    def __init__(
        self,
        backends: BackendRegistry,
        timer: Callable[[], Timer],
        schedule: Schedule = at_once,
        *,
        load_concurrency: int = 2,
        access_log: AccessLog | None = None,
    ) -> None:
        self._backends = backends
        self._timer = timer
        self._schedule = schedule
        self._access_log = access_log
        self._loads = asyncio.Semaphore(load_concurrency)
        self._models: dict[str, _Model] = {}
        self._routes: dict[str, Route] = {}
        self._subscribers: list[Callable[[], None]] = []
        self._has_settled = False
        self._is_stopping = False

    def __repr__(self) -> str:
        return f"ModelManager({len(self._models)} models, {sum(len(r.live) for r in self._routes.values())} live versions)"

    # -- the view of the services --------------------------------------------------------------------------------------

    @property
    def is_live(self) -> bool:
        return not self._is_stopping

    @property
    def is_ready(self) -> bool:
        return (
            self._has_settled
            and not self._is_stopping
            and all(
                model.versions and not model.error and all(v.is_live for v in model.versions.values()) for model in self._models.values()
            )
        )

    @property
    def is_busy(self) -> bool:
        """Whether a thread of any version still runs."""
        return any(version.is_busy for model in self._models.values() for version in model.versions.values())

    def resolve(self, model: str, version: str) -> ModelVersion:
        route = self._routes.get(model)
        if route is not None:
            if not version:
                if route.default is not None:
                    return route.default
            else:
                found = route.live.get(parse_version(version))
                if found is not None:
                    return found
        raise self._explain(model, version)

    def _explain(self, model: str, version: str) -> NotFound | NotReady:
        if self._is_stopping:
            return ShuttingDown("Server is shutting down: no new inference requests are taken")
        subject = f"Request for unknown model: '{model}'"
        entry = self._models.get(model)
        if entry is None:
            return NotFound(f"{subject} is not found")
        if not version:
            return NotFound(f"{subject} has no available versions")
        if parse_version(version) not in entry.versions:
            return NotFound(f"{subject} version {version} is not found")
        return NotReady(f"{subject} version {version} is not at ready state")

    def find(self, model: str, version: str) -> Sequence[ModelVersion]:
        number = parse_version(version) if version else None
        return [
            found
            for name, entry in sorted(self._models.items())
            if model in ("", name)
            for found in sorted(entry.versions.values(), key=lambda v: v.version)
            if number in (None, found.version)
        ]

    def index(self) -> Sequence[IndexEntry]:
        rows = []
        for name, entry in sorted(self._models.items()):
            if entry.error or not entry.versions:
                rows.append(IndexEntry(name, "", "UNAVAILABLE", entry.error or "no version found"))
            for version in sorted(entry.versions.values(), key=lambda v: v.version):
                rows.append(IndexEntry(name, str(version.version), INDEX_STATES[version.state], version.reason))
        return rows

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        self._subscribers.append(callback)

        def unsubscribe() -> None:
            if callback in self._subscribers:
                self._subscribers.remove(callback)

        return unsubscribe

    # -- what is wanted ------------------------------------------------------------------------------------------------

    async def load_all(self, wanted: Sequence[WantedVersion], errors: Mapping[str, str]) -> None:
        """Load every wanted version; a fault of one stops no other. `errors`: models that the source could not even list."""
        for model, reason in errors.items():
            self._models.setdefault(model, _Model()).error = reason
            log.error("model not loadable", model=model, reason=reason)
        async with asyncio.TaskGroup() as group:
            for want in wanted:
                version = ModelVersion(
                    want.model,
                    want.version,
                    timer=self._timer,
                    schedule=self._schedule,
                    access_log=self._access_log,
                    on_change=self._changed,
                )
                self._models.setdefault(want.model, _Model()).versions[want.version] = version
                group.create_task(self._load(version, want))
        self._has_settled = True
        self._notify()

    async def _load(self, version: ModelVersion, want: WantedVersion) -> None:
        async with self._loads:
            await version.load(want.config, want.fetch, self._backends)

    def announce_stop(self) -> None:
        """Not ready from here on, so that balancers send no more; what comes in all the same is still served."""
        self._is_stopping = True
        self._notify()

    async def stop(self, grace: float) -> None:
        """Take no more requests, finish what is queued within `grace` seconds, give all memory back."""
        self.announce_stop()
        self._routes = {}
        async with asyncio.TaskGroup() as group:
            for version in self.find("", ""):
                group.create_task(version.unload(grace, "server shutting down"))

    # -- changes -------------------------------------------------------------------------------------------------------

    def _changed(self, version: ModelVersion) -> None:
        if not self._is_stopping:
            self._routes[version.model] = make_route(self._models[version.model].versions)
        self._notify()

    def _notify(self) -> None:
        for callback in list(self._subscribers):
            callback()


def make_route(versions: Mapping[int, ModelVersion]) -> Route:
    """The highest live version is the default."""
    live = {number: version for number, version in versions.items() if version.state is VersionState.LIVE}
    return Route(live[max(live)] if live else None, live, frozenset(versions))


def parse_version(version: str) -> int:
    """Raises InvalidRequest unless it is a decimal number >= 0, of at most the 19 digits that the protocol's int64 can have."""
    if version.isascii() and version.isdigit() and len(version) <= 19:
        return int(version)
    raise InvalidRequest(f"model version: expected a number such as '1' or nothing, got {version[:40]!r}")
