"""What the page shows of models, versions and their counters, as plain values for JSON. Pure.

Counters are handed out as they are, cumulative; whoever looks makes rates of two looks. `clock` is what to divide by: it never jumps.
A version's `id` is of one loaded copy: after a reload it is another one, whose counters begin at 0.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from headrace.drift.judgement import reference_accuracy
from headrace.drift.verdict import DriftReport
from headrace.http.dashboard.numbers import rounded
from headrace.lifecycle.events import Event
from headrace.lifecycle.view import ModelDescription, VersionDescription, VersionView
from headrace.telemetry.counters import DURATION_EDGES, ROW_EDGES, CounterSnapshot, DispatchReason, FailureReason, Stage

MOST_EVENTS = 200
HAS_COUNTERS = frozenset({"live", "draining"})

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ServerState:
    """`run` names one run of a server: another one's counters are not compared with this one's. `at`: wall clock; `clock`: monotonic."""

    run: str
    version: str
    at: float
    clock: float
    started: float
    is_live: bool
    is_ready: bool


Views = Mapping[tuple[str, int, str], deque[VersionView]]
"""By model, version and state; more than one where copies of a version are there at a time."""


def sort_views(views: Iterable[VersionView]) -> Views:
    found: dict[tuple[str, int, str], deque[VersionView]] = defaultdict(deque)
    for view in views:
        found[view.model, view.version, view.state.value].append(view)
    return found


def encode_state(server: ServerState, models: Sequence[Values], events: Sequence[Event] | None) -> Values:
    """Everything but the features of versions. `models` as `encode_model` has them. `events` None: they are not for whoever looks."""
    return {
        "server": asdict(server),
        "seconds": DURATION_EDGES,
        "rows": ROW_EDGES,
        "stages": [stage.name.lower() for stage in Stage],
        "models": models,
        "events": None if events is None else [encode_event(event) for event in reversed(events[-MOST_EVENTS:])],
    }


def encode_model(model: ModelDescription, views: Views) -> Values:
    """Takes the model's views out of `views`."""
    versions = []
    for version in model.versions:
        waiting = views.get((model.name, version.version, version.state))
        versions.append(_encode_version(version, waiting.popleft() if waiting else None))
    return {
        "name": model.name,
        "source": model.source,
        "policy": model.version_policy,
        "error": model.error,
        "rollout": None if model.rollout is None else asdict(model.rollout),
        "versions": versions,
    }


def _encode_version(version: VersionDescription, view: VersionView | None) -> Values:
    """`view` None: it is offered and not loaded, or left between two looks."""
    report = view.drift if view is not None else None
    return {
        "id": f"{version.version}@{version.token}",
        "version": version.version,
        "state": version.state,
        "reason": version.reason,
        "since": version.since,
        "labels": version.labels,
        "is_default": version.is_default,
        "traffic": version.traffic,
        "load_seconds": rounded(version.load_seconds),
        "memory_bytes": version.memory_bytes,
        "digest": version.digest[:12],
        "metadata": dict(version.metadata),
        "waiting_rows": view.pending_rows if view is not None else 0,
        "counters": encode_counters(view.counters.snapshot()) if view is not None and version.state in HAS_COUNTERS else None,
        "drift": None if report is None else encode_drift_summary(report),
    }


def encode_counters(counted: CounterSnapshot) -> Values:
    """`buckets`: by stage, over `seconds` and one beyond; not cumulative over buckets. `batch_buckets` likewise over `rows`."""
    return {
        "success": counted.success,
        "rows": counted.rows,
        "batches": counted.batches,
        "padding": counted.padding,
        "nonfinite": counted.nonfinite,
        "failures": {reason.name.lower(): counted.failures[reason] for reason in FailureReason},
        "dispatches": {reason.name.lower(): counted.dispatches[reason] for reason in DispatchReason},
        "buckets": counted.buckets,
        "batch_buckets": counted.row_buckets,
    }


def encode_drift_summary(report: DriftReport) -> Values:
    """Enough to say how a version is, without its features. `status`: learning (the reference), waiting (for the first window),
    alert, or calm."""
    reference, window = report.reference, report.tumbling
    summary: Values = {
        "status": drift_status(report),
        "learnt_rows": report.learnt_rows,
        "learn_rows": report.learn_rows,
        "seen_rows": report.seen_rows,
        "skipped_rows": report.skipped_rows,
        "dropped_rows": report.dropped_rows,
        "alerts": len(report.alerts),
        "features": len(reference.features) if reference is not None else 0,
        "drifting": len(window.drifting) if window is not None else 0,
        "reference": None,
        "window": None,
    }
    if reference is not None:
        summary["reference"] = {
            "source": reference.source,
            "rows": reference.rows,
            "created": reference.created,
            "digest": reference.digest[:12],
            "accuracy": _known(reference_accuracy(reference)),
        }
    if window is not None:
        worst = max([score.psi / score.psi_critical for score in window.scores if score.psi_critical > 0], default=0.0)
        summary["window"] = {
            "began": window.began,
            "ended": window.ended,
            "rows": window.rows,
            "excess": rounded(worst),
            "accuracy": _known(window.estimated_accuracy),
            "error": rounded(window.estimated_error),
        }
    return summary


def _known(accuracy: float) -> float | None:
    return rounded(accuracy) if accuracy >= 0 else None


def drift_status(report: DriftReport) -> str:
    if report.reference is None:
        return "learning"
    if report.alerts:
        return "alert"
    return "calm" if report.tumbling is not None else "waiting"


def encode_event(event: Event) -> Values:
    return {
        "number": event.number,
        "at": event.at,
        "kind": event.kind,
        "model": event.model,
        "version": event.version,
        "who": event.who,
        "reason": event.reason,
        "fields": dict(event.fields),
    }
