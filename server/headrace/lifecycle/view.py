"""What the services see of models and versions. The manager implements it; tests implement it smaller."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from headrace.batching.latency import LatencyStats
from headrace.config import ModelConfig
from headrace.drift.verdict import DriftReport
from headrace.errors import HeadraceError
from headrace.lifecycle.effective import EffectiveModel
from headrace.lifecycle.events import Actor, EventLog
from headrace.lifecycle.state import VersionState
from headrace.requests import Alike, InferRequest, Reply
from headrace.signature import Signature
from headrace.telemetry.counters import VersionCounters

Call = tuple[InferRequest, Reply]
Refused = tuple[InferRequest, Reply, Exception]


class Submits(Protocol):
    """Whoever answers requests."""

    def submit(self, request: InferRequest, reply: Reply, arrived: float) -> None:
        """Validate and enqueue; from any thread. Raises HeadraceError, after which the reply is still the caller's to settle."""

    def submit_all(self, calls: Sequence[Call], arrived: float) -> list[Refused]:
        """As `submit` of each, for calls that came together: all are queued before the first runs. Those that it would raise for."""


def submit_each(to: Submits, calls: Sequence[Call], arrived: float) -> list[Refused]:
    """`submit_all` for those that have something to do for each call."""
    refused: list[Refused] = []
    for request, reply in calls:
        try:
            to.submit(request, reply, arrived)
        except HeadraceError as error:
            refused.append((request, reply, error.with_traceback(None)))
    return refused


class SubmitsAlike(Submits, Protocol):
    def submit_alike(self, alike: Alike, arrived: float) -> list[Refused]:
        """As `submit_all` of them, for much less than that of each."""


class VersionView(Submits, Protocol):
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
    @property
    def latency_stats(self) -> LatencyStats | None:
        """None where it serves nothing."""

    @property
    def drift(self) -> DriftReport | None:
        """None where nothing is watched, or not yet."""


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
        """The live version of a number or a label; `version` empty: the default one. Raises NotFound, NotReady, InvalidRequest."""

    def choose(self, request: InferRequest) -> Submits:
        """Whoever is to answer this request: as `resolve`, but that a part of what names no version may go to one on trial."""

    def choose_for_all(self, request: InferRequest) -> SubmitsAlike | None:
        """Whoever is to answer every request like this one; None where they must be chosen for, or refused, one by one."""

    def find(self, model: str, version: str) -> Sequence[VersionView]:
        """All known versions that match; empty strings match everything. Raises InvalidRequest on a version that is no number."""

    def index(self) -> Sequence[IndexEntry]: ...

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback` called on the event loop after any change of state. Returns the call that ends it."""


# -- what operators see and change -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VersionDescription:
    """One version in any state. `since`: wall clock of its present state. `traffic`: percent of the requests that name no version,
    as the route is now. `digest` and `signer` are of a published version's manifest; `metadata` is what the publisher said."""

    version: int
    state: str
    reason: str = ""
    since: float = 0.0
    location: str = ""
    token: str = ""
    labels: tuple[str, ...] = ()
    is_default: bool = False
    traffic: float = 0.0
    load_seconds: float = 0.0
    memory_bytes: int = 0
    requests: int = 0
    failures: int = 0
    digest: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RolloutDescription:
    """A new version on trial. `phase`: running | passed (waits for a promotion by hand) | promoted | rolled_back | superseded.

    `evidence`: what was counted, as (name, the candidate's, the old version's) for people.
    """

    mode: str
    phase: str
    candidate: int
    baseline: int
    percent: float
    began: float
    seconds_left: float
    requests: int
    min_requests: int
    reason: str = ""
    evidence: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model with all that is known of its versions. `error`: why its source cannot offer it now."""

    name: str
    source: str
    version_policy: str
    versions: tuple[VersionDescription, ...]
    labels: Mapping[str, int]
    rollout: RolloutDescription | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class SourceDescription:
    """`age`: seconds since the last listing that worked. `error`: why the last one did not, or empty."""

    uri: str
    age: float
    error: str = ""


class AdminView(Protocol):
    """What the admin service asks for and changes. Event loop only.

    Every change raises NotFound for an unknown model or version, FailedPrecondition for one that the state does not allow.
    """

    @property
    def event_log(self) -> EventLog: ...
    def sources(self) -> Sequence[SourceDescription]: ...
    def describe(self, model: str) -> Sequence[ModelDescription]:
        """By name; all when `model` is empty. Raises NotFound."""

    def drift(self, model: str, version: int) -> DriftReport:
        """Of a version, 0: of the default one. Raises NotFound; FailedPrecondition where nothing of it is watched."""

    async def promote(self, model: str, version: int, actor: Actor) -> None:
        """End the probation of `version` (0: the present candidate) in its favour; a version that was rolled back may be taken up again."""

    async def roll_back(self, model: str, actor: Actor) -> int:
        """Give the candidate, or else the serving version, up for the one before it, which serves when this returns. Returns it."""

    async def set_label(self, model: str, label: str, version: int, actor: Actor) -> None:
        """Move a label to a live version; version 0 takes the label away."""

    async def set_traffic(self, model: str, version: int, mode: str, percent: float, actor: Actor) -> None:
        """Start or change the trial of a live version beside the serving one: `mode` canary or shadow, `percent` of the requests."""


class RepositoryControl(Protocol):
    """RepositoryModelLoad and Unload, with Triton's rules (explicit mode only). Event loop only."""

    @property
    def allows_control(self) -> bool: ...
    async def load(self, model: str, config: ModelConfig | None, files: Mapping[str, bytes]) -> None:
        """Load the model as the source has it now, or `config` in place of its configuration, or `files` (paths such as
        '1/model.onnx') in place of its directory; return when every version it selects is live. Nothing changes on failure.

        Raises LoadError or ServerError with Triton's text.
        """

    async def unload(self, model: str, *, with_dependents: bool) -> None:
        """Return once no new request is taken. Unknown models are none already."""
