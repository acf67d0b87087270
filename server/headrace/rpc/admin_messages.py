"""Descriptions and events to the messages of headrace.v1 and back: the server encodes, the command line decodes."""

from __future__ import annotations

from headrace.lifecycle.events import Event
from headrace.lifecycle.view import ModelDescription, RolloutDescription, SourceDescription, VersionDescription
from headrace.wire import messages as pb


def encode_model(model: ModelDescription) -> pb.ManagedModel:
    return pb.ManagedModel(
        name=model.name,
        source=model.source,
        version_policy=model.version_policy,
        versions=[_encode_version(version) for version in model.versions],
        labels=model.labels,
        rollout=None if model.rollout is None else _encode_rollout(model.rollout),
        error=model.error,
    )


def decode_model(message: pb.ManagedModel) -> ModelDescription:
    return ModelDescription(
        name=message.name,
        source=message.source,
        version_policy=message.version_policy,
        versions=tuple(_decode_version(version) for version in message.versions),
        labels=dict(sorted(message.labels.items())),
        rollout=_decode_rollout(message.rollout) if message.HasField("rollout") else None,
        error=message.error,
    )


def _encode_version(version: VersionDescription) -> pb.ManagedVersion:
    return pb.ManagedVersion(
        version=version.version,
        state=version.state,
        reason=version.reason,
        since=version.since,
        location=version.location,
        token=version.token,
        labels=version.labels,
        is_default=version.is_default,
        traffic=version.traffic,
        load_seconds=version.load_seconds,
        memory_bytes=version.memory_bytes,
        requests=version.requests,
        failures=version.failures,
        digest=version.digest,
        metadata=version.metadata,
    )


def _decode_version(message: pb.ManagedVersion) -> VersionDescription:
    return VersionDescription(
        version=message.version,
        state=message.state,
        reason=message.reason,
        since=message.since,
        location=message.location,
        token=message.token,
        labels=tuple(message.labels),
        is_default=message.is_default,
        traffic=message.traffic,
        load_seconds=message.load_seconds,
        memory_bytes=message.memory_bytes,
        requests=message.requests,
        failures=message.failures,
        digest=message.digest,
        metadata=dict(sorted(message.metadata.items())),
    )


def _encode_rollout(rollout: RolloutDescription) -> pb.Rollout:
    return pb.Rollout(
        mode=rollout.mode,
        phase=rollout.phase,
        candidate=rollout.candidate,
        baseline=rollout.baseline,
        percent=rollout.percent,
        began=rollout.began,
        seconds_left=rollout.seconds_left,
        requests=rollout.requests,
        min_requests=rollout.min_requests,
        reason=rollout.reason,
        evidence=[pb.RolloutEvidence(name=name, candidate=new, baseline=old) for name, new, old in rollout.evidence],
    )


def _decode_rollout(message: pb.Rollout) -> RolloutDescription:
    return RolloutDescription(
        mode=message.mode,
        phase=message.phase,
        candidate=message.candidate,
        baseline=message.baseline,
        percent=message.percent,
        began=message.began,
        seconds_left=message.seconds_left,
        requests=message.requests,
        min_requests=message.min_requests,
        reason=message.reason,
        evidence=tuple((each.name, each.candidate, each.baseline) for each in message.evidence),
    )


def encode_event(event: Event, missed: int = 0) -> pb.LifecycleEvent:
    return pb.LifecycleEvent(
        number=event.number,
        at=event.at,
        kind=event.kind,
        model=event.model,
        version=event.version,
        who=event.who,
        reason=event.reason,
        fields=event.fields,
        missed=missed,
    )


def decode_event(message: pb.LifecycleEvent) -> Event:
    return Event(
        number=message.number,
        at=message.at,
        kind=message.kind,
        model=message.model,
        version=message.version,
        who=message.who,
        reason=message.reason,
        fields=dict(sorted(message.fields.items())),
    )


def encode_source(source: SourceDescription) -> pb.ModelSource:
    return pb.ModelSource(uri=source.uri, age=source.age, error=source.error)


def decode_source(message: pb.ModelSource) -> SourceDescription:
    return SourceDescription(uri=message.uri, age=message.age, error=message.error)
