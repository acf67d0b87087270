"""All models: takes what sources offer, and finds the version that serves a request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from headrace.backends.base import CPU, BackendRegistry
from headrace.backends.worker import Worker
from headrace.batching.batcher import Schedule, Timer, at_once
from headrace.drift.monitor import DriftMonitors
from headrace.errors import DeviceLost, NotFound, NotReady, ShuttingDown
from headrace.lifecycle.attachments import Attachment
from headrace.lifecycle.devices import Devices
from headrace.lifecycle.events import EventLog
from headrace.lifecycle.memory import return_memory
from headrace.lifecycle.model import Model
from headrace.lifecycle.parts import Parts
from headrace.lifecycle.policy import Key
from headrace.lifecycle.routes import parse_version
from headrace.lifecycle.shadow import ShadowSnapshot
from headrace.lifecycle.state import INDEX_STATES
from headrace.lifecycle.tasks import Tasks
from headrace.lifecycle.version import PAUSE, ModelVersion
from headrace.lifecycle.view import IndexEntry, Submits
from headrace.lifecycle.wanted import Offer, make_offer
from headrace.requests import InferRequest
from headrace.sources.base import Listing, Source
from headrace.telemetry.log import get_logger
from headrace.telemetry.records import RequestRecords

log = get_logger(__name__)

RETURN_MEMORY_AFTER = 1.0
"""Seconds after an unload. Trimming takes each of the allocator's arenas in turn for milliseconds, so not more often."""


class ModelManager:
    """Owns the table of models, and those versions that are gone but for a thread inside a call that cannot be interrupted.

    Everything but `resolve` and `choose` belongs to the event loop; those read one snapshot.
    """

    def __init__(
        self,
        backends: BackendRegistry,
        timer: Callable[[], Timer],
        schedule: Schedule = at_once,
        *,
        load_concurrency: int = 2,
        records: RequestRecords | None = None,
        drift: DriftMonitors | None = None,
        attachments: Sequence[Attachment] = (),
        drain_grace: float = 30.0,
        pause: float = PAUSE,
    ) -> None:
        self.event_log = EventLog()
        self.models: dict[str, Model] = {}
        self.devices = Devices()
        self.source_errors: dict[str, str] = {}
        self.conflicts: list[str] = []
        self._remembered: dict[str, tuple[Mapping[Key, str], Mapping[str, int]]] = {}
        self._required: set[str] = set()
        self._listings: dict[str, tuple[Source, Listing]] = {}
        self._left_behind: list[ModelVersion] = []
        self._tasks = Tasks()
        self._subscribers: list[Callable[[], None]] = []
        self._has_settled = False
        self._is_stopping = False
        self._trim: asyncio.TimerHandle | None = None
        self._parts = Parts(
            backends=backends,
            timer=timer,
            schedule=schedule,
            slots=asyncio.Semaphore(load_concurrency),
            tasks=self._tasks,
            events=self.event_log,
            records=records,
            drift=drift,
            attachments=attachments,
            devices=self.devices,
            drain_grace=drain_grace,
            pause=pause,
            notify=self._notify,
            unloaded=self._unloaded,
            lost=self._lost,
        )

    def __repr__(self) -> str:
        return f"ModelManager({len(self.models)} models, {sum(len(m.route.live) for m in self.models.values())} live versions)"

    # -- the view of the services --------------------------------------------------------------------------------------

    @property
    def is_live(self) -> bool:
        return not self._is_stopping

    @property
    def is_ready(self) -> bool:
        """Once everything that was there at the start has been loaded, and as long as all of it has a version that serves.

        A bad publication changes nothing in that, nor does a new model: they must not take a server out that serves.
        """
        return self._has_settled and not self._is_stopping and all(self._serves(name) for name in self._required)

    def _serves(self, name: str) -> bool:
        model = self.models.get(name)
        return model is not None and model.is_serving

    @property
    def is_busy(self) -> bool:
        """Whether a thread of any version still runs."""
        return any(version.is_busy for version in [*self._versions(), *self._left_behind])

    def resolve(self, model: str, version: str) -> ModelVersion:
        entry = self.models.get(model)
        if entry is not None:
            found = entry.route.find(version)
            if found is not None:
                return found
        raise self._explain(model, version)

    def choose(self, request: InferRequest) -> Submits:
        entry = self.models.get(request.model)
        if entry is not None:
            found = entry.route.choose(request)
            if found is not None:
                return found
        raise self._explain(request.model, request.version)

    def choose_for_all(self, request: InferRequest) -> ModelVersion | None:
        entry = self.models.get(request.model)
        return entry.route.choose_for_all(request.version) if entry is not None else None

    def _explain(self, model: str, version: str) -> NotFound | NotReady:
        if self._is_stopping:
            return ShuttingDown("Server is shutting down: no new inference requests are taken")
        subject = f"Request for unknown model: '{model}'"
        entry = self.models.get(model)
        if entry is None:
            return NotFound(f"{subject} is not found")
        if not version:
            lost = [each for each in entry.versions if each.is_lost]
            if lost:
                return NotReady(f"{subject} version {lost[-1].version} is not at ready state: {lost[-1].reason}")
            return NotFound(f"{subject} has no available versions")
        number = parse_version(version, entry.route.labels)
        if number not in {each.version for each in entry.versions}:
            return NotFound(f"{subject} version {version} is not found")
        reasons = [f": {each.reason}" for each in entry.versions if each.version == number and each.is_lost]
        return NotReady(f"{subject} version {version} is not at ready state{''.join(reasons[-1:])}")

    def find(self, model: str, version: str) -> Sequence[ModelVersion]:
        return [
            found
            for name, entry in sorted(self.models.items())
            if model in ("", name)
            for found in sorted(entry.versions, key=lambda v: v.version)
            if not version or found.version == parse_version(version, entry.route.labels)
        ]

    def _versions(self) -> list[ModelVersion]:
        return [version for entry in self.models.values() for version in entry.versions]

    def shadows(self) -> list[ShadowSnapshot]:
        """Of the trials whose candidates get copies."""
        trials = [entry.trial for entry in self.models.values() if entry.trial is not None]
        return [trial.shadow.snapshot() for trial in trials if trial.config.mode == "shadow"]

    def index(self) -> Sequence[IndexEntry]:
        rows = []
        for name, entry in sorted(self.models.items()):
            if entry.error:
                rows.append(IndexEntry(name, "", "UNAVAILABLE", entry.error))
            elif not (entry.versions or entry.unloaded):
                rows.append(IndexEntry(name, "", "", ""))  # there, and never loaded
            there = {version.version for version in entry.versions}
            for number, reason in entry.unloaded.items():
                if number not in there:
                    rows.append(IndexEntry(name, str(number), "UNAVAILABLE", reason))
            stale = self.source_error(entry)
            for version in sorted(entry.versions, key=lambda v: v.version):
                reason = version.reason or stale
                rows.append(IndexEntry(name, str(version.version), INDEX_STATES[version.state], reason))
        return rows

    def source_error(self, model: Model) -> str:
        """Why what is known of the model may be out of date, or empty."""
        error = self.source_errors.get(self._owner(model.name), "")
        return f"its source cannot be read now: {error}" if error else ""

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        self._subscribers.append(callback)

        def unsubscribe() -> None:
            if callback in self._subscribers:
                self._subscribers.remove(callback)

        return unsubscribe

    # -- what is offered -----------------------------------------------------------------------------------------------

    def take(self, source: Source, listing: Listing) -> None:
        """Work towards what a source offers now. Models of its earlier listings that are not in this one are unloaded."""
        self._listings[source.uri] = (source, listing)
        self.conflicts = [conflict for conflict in self.conflicts if source.uri not in conflict]
        for name, reason in listing.errors.items():
            self._set_error(name, source.uri, reason)
        for name, ref in listing.models.items():
            owner = self._owner(name)
            if owner not in ("", source.uri):
                conflict = f"model '{name}' is in two repositories: {owner} and {source.uri}; expected one"
                self.conflicts.append(conflict)
                self._set_error(name, source.uri, conflict)
            else:
                self.add(name).set_offer(make_offer(source, ref))
        for name in [name for name in self.models if name not in listing.models and name not in listing.errors]:
            self._take_away(name, source)

    def _take_away(self, name: str, source: Source) -> None:
        """What the source had of this model, if anything, is no longer wanted."""
        entry = self.models.get(name)
        if entry is None:
            return
        if self._owner(name) == source.uri:
            assert entry.offer is not None
            for other, listing in self._listings.values():
                if other is not source and name in listing.models:
                    entry.set_offer(make_offer(other, listing.models[name]))
                    return
            self._required.discard(name)
            entry.set_offer(Offer(source.uri, entry.offer.config, {}, {}))
        elif entry.error_source == source.uri:
            entry.error = entry.error_source = ""
            if entry.offer is None:
                self._required.discard(name)
                del self.models[name]
            self._notify()

    def _owner(self, name: str) -> str:
        entry = self.models.get(name)
        return entry.offer.source if entry is not None and entry.offer is not None and entry.offer.versions else ""

    def add(self, name: str) -> Model:
        """The model of that name, made where it is new."""
        if name not in self.models:
            self.models[name] = Model(name, self._parts)
            blocked, labels = self._remembered.get(name, ({}, {}))
            self.models[name].remember(blocked, labels)
        return self.models[name]

    def remember(self, name: str, blocked: Mapping[Key, str], labels: Mapping[str, int]) -> None:
        """What an earlier run of the server left of a model that may come. Before the first listing is taken."""
        self._remembered[name] = (blocked, labels)

    def model(self, name: str) -> Model:
        """Raises NotFound."""
        if name not in self.models:
            raise NotFound(f"model '{name}' is not found; there are {', '.join(sorted(self.models)) or 'none'}")
        return self.models[name]

    def withdraw(self, name: str) -> None:
        """Unload a model by request. It stays known, and the server is ready without it."""
        self._required.discard(name)
        self.models[name].withdraw()

    def _set_error(self, name: str, source: str, reason: str) -> None:
        """What is served of the model stays as it is."""
        entry = self.add(name)
        reason = reason.encode(errors="backslashreplace").decode()
        if entry.error != reason:
            entry.error, entry.error_source = reason, source
            self.event_log.record("source_error", name, reason=reason, fields={"source": source})
            log.error("model not loadable", model=name, reason=reason)
            self._notify()

    def set_source_error(self, source: Source, reason: str) -> None:
        """Why a source cannot be read; "": it can again. What it said before stays in force."""
        if reason:
            self.source_errors[source.uri] = reason
            self.event_log.record("source_error", "", reason=reason, fields={"source": source.uri})
        elif self.source_errors.pop(source.uri, None) is not None:
            self.event_log.record("source_recovered", "", fields={"source": source.uri})
        self._notify()

    async def settle(self) -> None:
        """Wait until nothing is on its way to being live; the server is ready from the first time on, if all is well."""
        await asyncio.gather(*(entry.settle() for entry in self.models.values()))
        if not self._has_settled:
            self._has_settled = True
            self._required = {name for name, entry in self.models.items() if entry.offer is not None or entry.error}
        self._notify()

    # -- stopping ------------------------------------------------------------------------------------------------------

    def announce_stop(self) -> None:
        """Not ready from here on, so that balancers send no more; what comes in all the same is still served."""
        self._is_stopping = True
        self._notify()

    async def stop(self, grace: float) -> None:
        """Take no more requests, finish what is queued within `grace` seconds, give all memory back."""
        self.announce_stop()
        if self._trim is not None:
            self._trim.cancel()
        await asyncio.gather(*(entry.close(grace, "server shutting down") for entry in self.models.values()))
        await self._tasks.close()

    # -- changes -------------------------------------------------------------------------------------------------------

    def _notify(self) -> None:
        for name in [name for name, entry in self.models.items() if entry.is_gone]:
            gone = self.models.pop(name)
            # It may come back, and is not to be taken for another one then.
            self._remembered[name] = (dict(gone.blocked), gone.labels.moved)
        for callback in list(self._subscribers):
            callback()

    def _lost(self, version: ModelVersion, worker: Worker, device: str, error: DeviceLost) -> None:
        """An instance's device runs nothing any more: whatever else is there is taken out as well. The host is never given up for what one
        instance says, which may have an accelerator that it does not name."""
        is_shared = device != CPU
        if is_shared and self.devices.lose(device, str(error)):
            log.error("device lost", device=device, reason=str(error))
        for each in self._versions():
            own = [worker] if each is version and each.instances.find(worker) is not None else []  # none while it is loaded
            gone = each.instances.on(device) if is_shared else own
            if gone:
                fields = {"device": device, "instances": str(len(gone))}
                self.event_log.record("device_lost", each.model, each.version, reason=str(error), fields=fields)
                each.take_out(gone, error)
        self._notify()

    def _unloaded(self, version: ModelVersion) -> None:
        self._left_behind = [each for each in [*self._left_behind, version] if each.is_busy]
        if self._trim is None and not self._is_stopping:
            self._trim = asyncio.get_running_loop().call_later(RETURN_MEMORY_AFTER, self._return_memory)

    def _return_memory(self) -> None:
        self._trim = None
        self._tasks.start(asyncio.to_thread(return_memory), "return memory")
