"""What operators see and change, as values that a test sets: an AdminView and a RepositoryControl that say what they were asked."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.config import ModelConfig
from headrace.drift.verdict import DriftReport
from headrace.errors import FailedPrecondition, HeadraceError, InvalidRequest, NotFound
from headrace.lifecycle.events import Actor, EventLog
from headrace.lifecycle.view import ModelDescription, RolloutDescription, SourceDescription, VersionDescription

NOW = 1_790_000_000.0

DIGITS = ModelDescription(
    name="digits",
    source="/srv/models",
    version_policy="latest:2",
    versions=(
        VersionDescription(
            3, "live", since=NOW - 3 * 86400, location="/srv/models/digits/3", token="a1b2", labels=("stable",), is_default=True,
            traffic=90.0, load_seconds=1.25, memory_bytes=42 << 20, requests=123_456, failures=7, digest="9f" * 32,
            metadata={"run": "417", "git": "8ab30a4"},
        ),
        VersionDescription(4, "live", since=NOW - 150, location="/srv/models/digits/4", labels=("canary",), traffic=10.0, requests=80),
        VersionDescription(5, "failed", "model.onnx: sha256 differs from manifest.json: expected 12ab…, got 98fe…", since=NOW - 20),
    ),
    labels={"canary": 4, "stable": 3},
    rollout=RolloutDescription(
        "canary", "running", 4, 3, 10.0, NOW - 150, 150.0, 80, 100,
        evidence=(("error rate", "0.00 %", "0.01 %"), ("p50", "2.1 ms", "2.0 ms")),
    ),
)  # fmt: skip
SENTIMENT = ModelDescription("sentiment", "s3://models", "latest:1", (), {}, error="no version has a model.onnx")


class FakeOperations:
    """An AdminView of `models`. Its changes are noted in `asked`, recorded as events, and move what the model says of itself."""

    def __init__(self, *models: ModelDescription) -> None:
        self.models = {model.name: model for model in models}
        self.event_log = EventLog(lambda: NOW)
        self.asked: list[tuple[Any, ...]] = []
        self.reports: dict[tuple[str, int], DriftReport] = {}

    def sources(self) -> Sequence[SourceDescription]:
        return [SourceDescription("/srv/models", 1.5), SourceDescription("s3://models", 4000.0, "connection refused")]

    def describe(self, model: str) -> Sequence[ModelDescription]:
        if not model:
            return [self.models[name] for name in sorted(self.models)]
        if model not in self.models:
            raise NotFound(f"no model '{model}'")
        return [self.models[model]]

    def drift(self, model: str, version: int) -> DriftReport:
        self.describe(model)
        if (model, version) not in self.reports:
            raise FailedPrecondition(f"version {version} of '{model}' is not watched for drift")
        return self.reports[model, version]

    async def promote(self, model: str, version: int, actor: Actor) -> None:
        (found,) = self.describe(model)
        if found.rollout is None:
            raise FailedPrecondition(f"model '{model}' has no version on trial")
        promoted = version or found.rollout.candidate
        self._note("promoted", model, promoted, actor)
        versions = tuple(dataclasses.replace(each, is_default=each.version == promoted) for each in found.versions)
        self.models[model] = dataclasses.replace(found, versions=versions, rollout=None)

    async def roll_back(self, model: str, actor: Actor) -> int:
        (found,) = self.describe(model)
        assert found.rollout is not None
        self._note("rolled_back", model, found.rollout.candidate, actor)
        return found.rollout.baseline

    async def set_label(self, model: str, label: str, version: int, actor: Actor) -> None:
        (found,) = self.describe(model)
        if version not in {0, *(each.version for each in found.versions)}:
            raise FailedPrecondition(f"label '{label}': expected a live version, got {version}")
        self._note("label", model, version, actor, label=label)

    async def set_traffic(self, model: str, version: int, mode: str, percent: float, actor: Actor) -> None:
        if not 0 <= percent <= 100:
            raise InvalidRequest(f"percent: expected 0 to 100, got {percent:g}")
        self.describe(model)
        self._note("traffic", model, version, actor, mode=mode, percent=f"{percent:g}")

    def _note(self, kind: str, model: str, version: int, actor: Actor, **fields: str) -> None:
        self.asked.append((kind, model, version, *fields.values()))
        self.event_log.record(kind, model, version, who=actor.name, reason=actor.reason, fields=fields)


class FakeRepository:
    """A RepositoryControl that notes what it was asked, once `gate` is open; raises `error` where there is one."""

    def __init__(self, *, allows_control: bool = True, error: HeadraceError | None = None) -> None:
        self.allows_control = allows_control
        self.error = error
        self.loaded: list[tuple[str, ModelConfig | None, Mapping[str, bytes]]] = []
        self.unloaded: list[tuple[str, bool]] = []
        self.began = asyncio.Event()
        self.gate = asyncio.Event()
        self.done = asyncio.Event()
        self.gate.set()

    async def load(self, model: str, config: ModelConfig | None, files: Mapping[str, bytes]) -> None:
        self.began.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.loaded.append((model, config, files))
        self.done.set()

    async def unload(self, model: str, *, with_dependents: bool) -> None:
        self.unloaded.append((model, with_dependents))
