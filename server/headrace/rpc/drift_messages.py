"""Drift reports to the messages of headrace.v1 and back. Any thread: a long history takes some milliseconds."""

from __future__ import annotations

import dataclasses
from typing import Any

from headrace.drift.counting import QUALITY, Counts, Layout
from headrace.drift.features import Extract, Feature, Kind, Side
from headrace.drift.reference import Calibration, FeatureReference, Reference
from headrace.drift.verdict import Alert, DriftReport, FeatureScore, WindowVerdict
from headrace.wire import messages as pb

_SCORE = [field.name for field in dataclasses.fields(FeatureScore)]
_ALERT = [field.name for field in dataclasses.fields(Alert)]


def encode_report(report: DriftReport, windows: int = 0) -> pb.DriftReport:
    """With the latest `windows` of its history; 0: all."""
    totals = report.totals
    return pb.DriftReport(
        model=report.model,
        version=report.version,
        reference=None if report.reference is None else _encode_reference(report.reference, report),
        learnt_rows=report.learnt_rows,
        learn_rows=report.learn_rows,
        seen_rows=report.seen_rows,
        skipped_rows=report.skipped_rows,
        dropped_rows=report.dropped_rows,
        cpu_seconds=report.cpu_seconds,
        tumbling=None if report.tumbling is None else _encode_window(report.tumbling),
        sliding=None if report.sliding is None else _encode_window(report.sliding),
        history=[_encode_window(window) for window in report.history[-windows:]],
        alerts=[_encode_alert(alert) for alert in report.alerts],
        past_alerts=[_encode_alert(alert) for alert in report.past_alerts],
        compared_rows=totals.rows if totals is not None else 0,
        judged_rows=totals.judged if totals is not None else 0,
        correct=totals.correct if totals is not None else 0.0,
        correct_variance=totals.correct_variance if totals is not None else 0.0,
    )


def decode_report(message: pb.DriftReport) -> DriftReport:
    reference = _decode_reference(message.reference) if message.HasField("reference") else None
    features = message.reference.features
    return DriftReport(
        model=message.model,
        version=message.version,
        reference=reference,
        learnt_rows=message.learnt_rows,
        learn_rows=message.learn_rows,
        totals=None if reference is None else _decode_totals(message, reference),
        latest=None if reference is None else _decode_latest(message, reference),
        seen_rows=message.seen_rows,
        skipped_rows=message.skipped_rows,
        dropped_rows=message.dropped_rows,
        cpu_seconds=message.cpu_seconds,
        tumbling=_decode_window(message.tumbling) if message.HasField("tumbling") else None,
        sliding=_decode_window(message.sliding) if message.HasField("sliding") else None,
        slow={index: feature.slow for index, feature in enumerate(features) if feature.slow},
        alerts=tuple([_decode_alert(alert) for alert in message.alerts]),
        history=tuple([_decode_window(window) for window in message.history]),
        past_alerts=tuple([_decode_alert(alert) for alert in message.past_alerts]),
    )


def _encode_reference(reference: Reference, report: DriftReport) -> pb.DriftReference:
    calibration = reference.calibration
    return pb.DriftReference(
        model=reference.model,
        source=reference.source,
        rows=reference.rows,
        features=[_encode_feature(index, reference, report) for index in range(len(reference.features))],
        left_out=reference.left_out,
        data_digest=reference.data_digest,
        digest=reference.digest,
        created=reference.created,
        accuracy=reference.accuracy,
        calibration=None
        if calibration is None
        else pb.DriftCalibration(tensor=calibration.tensor, edges=calibration.edges, accuracy=calibration.accuracy, rows=calibration.rows),
    )


def _decode_reference(message: pb.DriftReference) -> Reference:
    found = message.calibration
    return Reference(
        model=message.model,
        source=message.source,
        rows=message.rows,
        features=tuple([_decode_feature(feature) for feature in message.features]),
        left_out=tuple(message.left_out),
        data_digest=message.data_digest,
        created=message.created,
        calibration=Calibration(found.tensor, tuple(found.edges), tuple(found.accuracy), found.rows)
        if message.HasField("calibration")
        else None,
        accuracy=message.accuracy,
        digest=message.digest,
    )


def _encode_feature(index: int, reference: Reference, report: DriftReport) -> pb.DriftFeature:
    each = reference.features[index]
    feature = each.feature
    return pb.DriftFeature(
        side=feature.side.value,
        tensor=feature.tensor,
        name=feature.name,
        kind=feature.kind.value,
        extract=feature.extract.value,
        index=feature.index,
        is_logits=feature.is_logits,
        edges=each.edges,
        categories=each.categories,
        counts=each.counts,
        missing=each.missing,
        infinite=each.infinite,
        minimum=each.minimum,
        maximum=each.maximum,
        mean=each.mean,
        deviation=each.deviation,
        live=None if report.totals is None else _encode_live(index, Layout(reference), report.totals),
        latest=None if report.latest is None else _encode_live(index, Layout(reference), report.latest),
        slow=report.slow.get(index, 0.0),
    )


def _encode_live(index: int, layout: Layout, totals: Counts) -> pb.DriftLive:
    quality = dict(zip(QUALITY, layout.quality(totals, index).tolist(), strict=True))
    counts = layout.bins(totals, index).tolist()
    return pb.DriftLive(counts=counts, sum=float(totals.sums[index]), squares=float(totals.squares[index]), **quality)


def _decode_feature(message: pb.DriftFeature) -> FeatureReference:
    feature = Feature(
        side=Side(message.side),
        tensor=message.tensor,
        name=message.name,
        kind=Kind(message.kind),
        extract=Extract(message.extract),
        index=message.index,
        is_logits=message.is_logits,
    )
    return FeatureReference(
        feature=feature,
        edges=tuple(message.edges),
        categories=tuple(message.categories),
        counts=tuple(message.counts),
        missing=message.missing,
        infinite=message.infinite,
        minimum=message.minimum,
        maximum=message.maximum,
        mean=message.mean,
        deviation=message.deviation,
    )


def _decode_totals(message: pb.DriftReport, reference: Reference) -> Counts | None:
    counts = _decode_counts([feature.live for feature in message.reference.features if feature.HasField("live")], reference)
    if counts is None:
        return None
    counts.rows = message.compared_rows
    counts.judged, counts.correct, counts.correct_variance = message.judged_rows, message.correct, message.correct_variance
    return counts


def _decode_latest(message: pb.DriftReport, reference: Reference) -> Counts | None:
    counts = _decode_counts([feature.latest for feature in message.reference.features if feature.HasField("latest")], reference)
    if counts is not None:
        counts.rows = message.tumbling.rows
    return counts


def _encode_window(window: WindowVerdict) -> pb.DriftWindow:
    return pb.DriftWindow(
        kind=window.kind,
        began=window.began,
        ended=window.ended,
        rows=window.rows,
        scores=[pb.DriftScore(**_values(score, _SCORE)) for score in window.scores],
        estimated_accuracy=window.estimated_accuracy,
        estimated_error=window.estimated_error,
        reference_accuracy=window.reference_accuracy,
    )


def _decode_window(message: pb.DriftWindow) -> WindowVerdict:
    return WindowVerdict(
        kind=message.kind,
        began=message.began,
        ended=message.ended,
        rows=message.rows,
        scores=tuple([FeatureScore(**_values(score, _SCORE)) for score in message.scores]),
        estimated_accuracy=message.estimated_accuracy,
        estimated_error=message.estimated_error,
        reference_accuracy=message.reference_accuracy,
    )


def _decode_counts(lives: list[pb.DriftLive], reference: Reference) -> Counts | None:
    """None unless there is one of each feature. How many rows they are of is not in them."""
    if len(lives) < len(reference.features):
        return None
    counts, layout = Counts.zero(reference), Layout(reference)
    for index, live in enumerate(lives):
        layout.bins(counts, index)[:] = list(live.counts)
        layout.quality(counts, index)[:] = [getattr(live, name) for name in QUALITY]
        counts.sums[index], counts.squares[index] = live.sum, live.squares
    return counts


def _encode_alert(alert: Alert) -> pb.DriftAlert:
    return pb.DriftAlert(**_values(alert, _ALERT))


def _decode_alert(message: pb.DriftAlert) -> Alert:
    return Alert(**_values(message, _ALERT))


def _values(source: object, names: list[str]) -> dict[str, Any]:
    """The messages have the shapes' names."""
    return {name: getattr(source, name) for name in names}
