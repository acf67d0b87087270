"""What operators see of models and change about them."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.config_loading import LABEL
from headrace.drift.verdict import DriftReport
from headrace.errors import FailedPrecondition, InvalidRequest, NotFound
from headrace.lifecycle.events import Actor, EventLog
from headrace.lifecycle.manager import ModelManager
from headrace.lifecycle.model import Model
from headrace.lifecycle.version import ModelVersion
from headrace.lifecycle.view import ModelDescription, SourceDescription, VersionDescription
from headrace.lifecycle.watcher import Watcher


class Admin:
    """An AdminView over the manager and the watchers. Stateless; event loop only."""

    def __init__(self, models: ModelManager, watchers: Sequence[Watcher]) -> None:
        self._models = models
        self._watchers = watchers

    @property
    def event_log(self) -> EventLog:
        return self._models.event_log

    def sources(self) -> Sequence[SourceDescription]:
        return [watcher.describe() for watcher in self._watchers]

    def describe(self, model: str) -> Sequence[ModelDescription]:
        models = [self._models.model(model)] if model else [entry for _, entry in sorted(self._models.models.items())]
        return [describe_model(entry, self._models.source_error(entry)) for entry in models]

    def drift(self, model: str, version: int) -> DriftReport:
        entry = self._models.model(model)
        found = entry.route.default if not version else next((each for each in entry.versions if each.version == version), None)
        if found is None and not version:
            raise FailedPrecondition(f"model '{model}' has no version that serves")
        if found is None:
            raise NotFound(f"model '{model}' has no version {version}")
        report = found.drift
        if report is None:
            raise FailedPrecondition(
                f"version {found.version} of '{model}' is not watched for drift: it is {found.state.value}; expected a live version, "
                "whose model.toml does not have [drift] reference = 'off', with inputs or outputs that can be watched"
            )
        return report

    async def promote(self, model: str, version: int, actor: Actor) -> None:
        entry = self._models.model(model)
        trial = entry.trial
        if trial is not None and version in (0, trial.candidate.version):
            entry.promote_candidate(actor)
            return
        if not version:
            raise FailedPrecondition(f"model '{model}' has no version on trial")
        if entry.take_up(version, actor):
            await entry.settle()
            return
        if version not in {each.version for each in entry.versions}:
            raise NotFound(f"model '{model}' has no version {version}")
        default = entry.route.default
        serving = f"version {default.version} serves" if default is not None else "none serves"
        raise FailedPrecondition(
            f"version {version} of '{model}' is neither on trial nor rolled back; {serving}, as the version policy selects"
        )

    async def roll_back(self, model: str, actor: Actor) -> int:
        entry = self._models.model(model)
        version = entry.trial.candidate if entry.trial is not None else entry.route.default
        if version is None:
            raise FailedPrecondition(f"model '{model}' has no version that serves")
        if entry.trial is None and not any(key < version.key for key in _others(entry, version)):
            raise FailedPrecondition(f"model '{model}': there is no version before {version.version} to go back to")
        entry.give_up(version, actor)
        await entry.settle()
        default = entry.route.default
        if default is None or default is version:
            reasons = "; ".join(f"{each.version}: {each.reason}" for each in entry.versions if each.reason) or "no reason is known"
            raise FailedPrecondition(
                f"model '{model}': the version before {version.version} could not be loaded, which goes on serving ({reasons})"
            )
        return default.version

    async def set_label(self, model: str, label: str, version: int, actor: Actor) -> None:
        if not LABEL.fullmatch(label):
            raise InvalidRequest(f"label: expected letters, digits, '_', '.' and '-' after a first letter, got {label!r}")
        self._models.model(model).set_label(label, version, actor)

    async def set_traffic(self, model: str, version: int, mode: str, percent: float, actor: Actor) -> None:
        if mode not in ("canary", "shadow"):
            raise InvalidRequest(f"mode: expected canary or shadow, got {mode!r}")
        if not 0 <= percent <= 100:
            raise InvalidRequest(f"percent: expected 0 to 100, got {percent:g}")
        self._models.model(model).set_trial(version, mode, percent, actor)


def _others(entry: Model, version: ModelVersion) -> list[tuple[int, str]]:
    offered = entry.offer.versions.values() if entry.offer is not None else ()
    return [want.key for want in offered if want.key != version.key and want.key not in entry.blocked]


def describe_model(entry: Model, source_error: str = "") -> ModelDescription:
    labels = labels_of(entry)
    there = sorted(entry.versions, key=lambda version: version.key)
    versions = [_describe_version(entry, version, labels.get(version.version, ())) for version in there]
    numbers = {version.version for version in there}
    offered = entry.offer.versions if entry.offer is not None else {}
    for number, want in sorted(offered.items()):
        if number not in numbers:
            reason = entry.blocked.get(want.key)
            state = "rolled back" if reason is not None else "offered"
            versions.append(VersionDescription(number, state, reason or "", location=want.location, token=want.token))
    return ModelDescription(
        name=entry.name,
        source=entry.offer.source if entry.offer is not None else "",
        version_policy=entry.offer.config.version_policy if entry.offer is not None else "",
        versions=tuple(sorted(versions, key=lambda version: version.version)),
        labels=dict(entry.labels.current),
        rollout=entry.trial.describe() if entry.trial is not None else None,
        error=entry.error or source_error,
    )


def _describe_version(entry: Model, version: ModelVersion, labels: tuple[str, ...]) -> VersionDescription:
    counted = version.counters.snapshot()
    inspection = version.inspection
    return VersionDescription(
        version=version.version,
        state=version.state.value,
        reason=version.reason or entry.blocked.get(version.key, ""),
        since=version.since,
        location=version.want.location,
        token=version.key.token,
        labels=labels,
        is_default=version is entry.route.default,
        traffic=entry.traffic(version),
        load_seconds=version.load_seconds,
        memory_bytes=version.memory_bytes,
        requests=counted.success,
        failures=sum(counted.failures),
        digest=inspection.digest if inspection is not None else "",
        metadata=dict(inspection.manifest.metadata) if inspection is not None and inspection.manifest is not None else {},
    )


def labels_of(model: Model) -> dict[int, tuple[str, ...]]:
    """Labels by version."""
    found: dict[int, tuple[str, ...]] = {}
    for label, version in sorted(model.labels.current.items()):
        found[version] = (*found.get(version, ()), label)
    return found
