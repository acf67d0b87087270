"""One version's features as the page shows them: live beside the reference, the worst first, as plain values for JSON. Pure."""

from __future__ import annotations

import dataclasses
from typing import Any

from headrace.drift.counting import QUALITY, Layout
from headrace.drift.ranking import Ranked, rank
from headrace.drift.reference import Reference
from headrace.drift.verdict import Alert, DriftReport, WindowVerdict
from headrace.http.dashboard.numbers import all_rounded, rounded

MOST_WINDOWS = 60
MOST_PAST_ALERTS = 30

Values = dict[str, Any]


def encode_drift(report: DriftReport) -> Values:
    """`features` is empty until a window has ended. `windows` and each feature's `history` are of the same windows, oldest first."""
    report = dataclasses.replace(report, history=report.history[-MOST_WINDOWS:])
    reference = report.reference
    return {
        "model": report.model,
        "version": report.version,
        "left_out": reference.left_out if reference is not None else (),
        "cpu_seconds": rounded(report.cpu_seconds),
        "alerts": [_encode_alert(alert) for alert in report.alerts],
        "past_alerts": [_encode_alert(alert) for alert in reversed(report.past_alerts[-MOST_PAST_ALERTS:])],
        "windows": [_encode_window(window) for window in report.history],
        "features": [] if reference is None else _encode_features(report, reference),
    }


def _encode_features(report: DriftReport, reference: Reference) -> list[Values]:
    places = {id(each): index for index, each in enumerate(reference.features)}
    return [_encode_feature(report, reference, places[id(each.reference)], each) for each in rank(report)]


def _encode_feature(report: DriftReport, reference: Reference, index: int, each: Ranked) -> Values:
    known, score, feature = each.reference, each.score, each.reference.feature
    return {
        "key": f"{feature.side.value}/{feature.title}",
        "title": feature.title,
        "side": feature.side.value,
        "kind": feature.kind.value,
        "extract": feature.extract.value,
        "is_raised": each.is_raised,
        "is_drifting": score.is_drifting,
        "excess": rounded(each.excess),
        "rows": score.rows,
        "psi": rounded(score.psi),
        "psi_critical": rounded(score.psi_critical),
        "js": rounded(score.js),
        "ks": rounded(score.ks) if known.is_numeric else None,
        "wasserstein": rounded(score.wasserstein) if known.is_numeric else None,
        "p_value": rounded(score.p_value),
        "missing_rate": rounded(score.missing_rate),
        "infinite_rate": rounded(score.infinite_rate),
        "slow": rounded(report.slow.get(index, 0.0)),
        # Numeric: upper edges of all bins but the last, which has none; else the categories, and what is left.
        "edges": all_rounded(known.edges) if known.is_numeric else None,
        "labels": None if known.is_numeric else [*known.categories, "others"],
        "range": all_rounded((known.minimum, known.maximum)) if known.is_numeric else None,
        "expected": all_rounded(each.expected),
        "live": all_rounded(each.live),
        "history": all_rounded(each.history),
        "quality": _encode_quality(report, reference, index),
    }


def _encode_quality(report: DriftReport, reference: Reference, index: int) -> Values:
    """Rows with a problem since the version went live; what none has is left out."""
    if report.totals is None:
        return {}
    layout = Layout(reference)
    counts = dict(zip(QUALITY, layout.quality(report.totals, index).tolist(), strict=True))
    if not reference.features[index].is_numeric:
        counts = {"missing": counts["missing"], "unseen": int(layout.bins(report.totals, index)[-1])}
    return {problem: count for problem, count in counts.items() if count}


def _encode_window(window: WindowVerdict) -> Values:
    return {
        "began": window.began,
        "ended": window.ended,
        "rows": window.rows,
        "drifting": len(window.drifting),
        "accuracy": rounded(window.estimated_accuracy) if window.estimated_accuracy >= 0 else None,
        "error": rounded(window.estimated_error),
        "reference_accuracy": rounded(window.reference_accuracy) if window.reference_accuracy >= 0 else None,
    }


def _encode_alert(alert: Alert) -> Values:
    return {
        "at": alert.at,
        "kind": alert.kind,
        "feature": alert.feature,
        "side": alert.side,
        "is_raised": alert.is_raised,
        "statistic": alert.statistic,
        "value": rounded(alert.value),
        "critical": rounded(alert.critical),
        "rows": alert.rows,
        "text": alert.text,
    }
