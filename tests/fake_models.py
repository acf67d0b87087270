"""Versions and models as plain values, for tests of what only looks at them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from headrace.batching.latency import LatencyStats
from headrace.drift.verdict import DriftReport
from headrace.errors import NotFound
from headrace.lifecycle.effective import EffectiveModel
from headrace.lifecycle.state import INDEX_STATES, VersionState
from headrace.lifecycle.view import Call, IndexEntry, Refused, VersionView, submit_each
from headrace.requests import InferRequest, Reply
from headrace.signature import Signature
from headrace.telemetry.counters import BatchTimes, VersionCounters


@dataclass
class FakeVersion:
    model: str
    version: int = 1
    state: VersionState = VersionState.LIVE
    reason: str = ""
    signature: Signature | None = None
    effective: EffectiveModel | None = None
    counters: VersionCounters = field(default_factory=VersionCounters)
    pending_rows: int = 0
    pending_requests: int = 0
    load_seconds: float = 0.0
    latency_stats: LatencyStats | None = None
    drift: DriftReport | None = None

    def submit(self, request: InferRequest, reply: Reply, arrived: float) -> None:
        raise AssertionError(f"nothing should be submitted to {self.model}:{self.version}")

    def submit_all(self, calls: Sequence[Call], arrived: float) -> list[Refused]:
        return submit_each(self, calls, arrived)

    def run(self, requests: int, *, rows: int, padded_rows: int, seconds: float) -> FakeVersion:
        """Count a batch: a tenth of `seconds` for each of queue, input and output, the rest is the model's."""
        part = seconds / 10
        times = BatchTimes(
            rows=rows,
            padded_rows=padded_rows,
            arrived=[-part] * requests,
            taken=0.0,
            input_done=part,
            output_start=seconds - 2 * part,
            done=seconds - part,
        )
        self.counters.shard().record_batch(times)
        return self


@dataclass
class FakeModels:
    versions: list[FakeVersion] = field(default_factory=list)
    is_live: bool = True
    is_ready: bool = True

    def resolve(self, model: str, version: str) -> VersionView:
        for found in self.find(model, version):
            return found
        raise NotFound(f"Request for unknown model: '{model}' is not found")

    def choose(self, request: InferRequest) -> VersionView:
        return self.resolve(request.model, request.version)

    def choose_for_all(self, request: InferRequest) -> None:
        return None

    def find(self, model: str, version: str) -> Sequence[VersionView]:
        return [found for found in self.versions if model in ("", found.model) and version in ("", str(found.version))]

    def index(self) -> Sequence[IndexEntry]:
        return [IndexEntry(v.model, str(v.version), INDEX_STATES[v.state], v.reason) for v in self.versions]

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        return lambda: None
