"""What the services see of models and versions. The manager implements it; tests implement it smaller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from headrace.lifecycle.effective import EffectiveModel
from headrace.lifecycle.state import VersionState
from headrace.requests import InferRequest, Reply
from headrace.signature import Signature
from headrace.telemetry.counters import VersionCounters


class VersionView(Protocol):
    """One version in any state. `signature` and `effective` are None until it was inspected."""

    @property
    def model(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def state(self) -> VersionState: ...
    @property
    def reason(self) -> str: ...
    @property
    def signature(self) -> Signature | None: ...
    @property
    def effective(self) -> EffectiveModel | None: ...
    @property
    def counters(self) -> VersionCounters: ...
    @property
    def pending_rows(self) -> int: ...
    @property
    def pending_requests(self) -> int: ...
    @property
    def load_seconds(self) -> float: ...

    def submit(self, request: InferRequest, reply: Reply, arrived: float) -> None:
        """Validate and enqueue; from any thread. Raises HeadraceError, after which the reply is still the caller's to settle."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A row of RepositoryIndex. `version` is empty for a model of which no version was ever tried."""

    model: str
    version: str
    state: str
    reason: str


class ModelsView(Protocol):
    @property
    def is_live(self) -> bool: ...
    @property
    def is_ready(self) -> bool:
        """Every wanted version is live (strict readiness)."""

    def resolve(self, model: str, version: str) -> VersionView:
        """The live version that serves this request; `version` empty: the default one. Raises NotFound, NotReady, InvalidRequest."""

    def find(self, model: str, version: str) -> Sequence[VersionView]:
        """All known versions that match; empty strings match everything. Raises InvalidRequest on a version that is no number."""

    def index(self) -> Sequence[IndexEntry]: ...

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback` called on the event loop after any change of state. Returns the call that ends it."""
