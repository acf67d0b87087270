from __future__ import annotations

from dataclasses import replace

from headrace.drift.alarms import Alarms, Finding, findings
from headrace.drift.counting import QUALITY, Layout
from headrace.drift.verdict import FeatureScore, WindowVerdict
from unit.drift.references import counts_of, numeric, reference_of

REFERENCE = reference_of(numeric("0"), numeric("1"))
WINDOW = counts_of(REFERENCE, (25, 25, 25, 25), (25, 25, 25, 25))
QUIET = FeatureScore(100, 0.01, 0.2, 0.01, 0.2, 0.01, 0.2, 0.1, 3.0, 16.0, 0.4, 0.0, 0.0)
DRIFTING = replace(QUIET, psi=0.7, chi2=70.0, p_value=1e-9, is_drifting=True)


def verdict(*scores: FeatureScore, kind: str = "tumbling") -> WindowVerdict:
    return WindowVerdict(kind, 0.0, 10.0, 100, scores)


def test_a_drifting_feature_is_named_with_its_numbers() -> None:
    found = findings(REFERENCE, WINDOW, verdict(QUIET, DRIFTING), None, {})
    assert [(f.kind, f.feature, f.value, f.critical) for f in found] == [("drift", 1, 0.7, 0.2)]
    assert "x.1 drifted: PSI 0.7 over 100 rows" in found[0].text


def test_both_windows_and_slow_evidence_make_one_finding_a_feature() -> None:
    sliding = verdict(DRIFTING, DRIFTING, kind="sliding")
    found = findings(REFERENCE, WINDOW, verdict(DRIFTING, QUIET), sliding, {0: 5.0, 1: 0.4})
    assert sorted((f.kind, f.feature) for f in found) == [("drift", 0), ("drift", 1)]


def test_slow_drift_is_found_where_no_window_sees_it() -> None:
    found = findings(REFERENCE, WINDOW, verdict(QUIET, QUIET), None, {0: 0.99, 1: 1.0})
    assert [(f.kind, f.feature) for f in found] == [("slow_drift", 1)]


def test_a_drop_of_the_estimated_accuracy_must_be_large_and_sure() -> None:
    def kinds(estimate: float, error: float) -> list[str]:
        said = replace(verdict(QUIET, QUIET), estimated_accuracy=estimate, estimated_error=error, reference_accuracy=0.9)
        return [finding.kind for finding in findings(REFERENCE, WINDOW, said, None, {})]

    assert kinds(0.80, 0.01) == ["accuracy"]
    assert kinds(0.86, 0.001) == []  # sure, and small
    assert kinds(0.80, 0.03) == []  # large, and may be chance
    assert kinds(-1.0, 0.0) == []  # cannot be estimated


def test_rows_far_outside_the_reference_are_another_scale() -> None:
    window = WINDOW.copy()
    Layout(REFERENCE).quality(window, 1)[QUALITY.index("off_scale")] = 6
    found = findings(REFERENCE, window, verdict(QUIET, QUIET), None, {})
    assert [(f.kind, f.feature) for f in found] == [("quality", 1)]
    assert "6% of 100 rows are far outside of -1 to 3" in found[0].text


def test_an_alert_is_raised_once_and_is_over_once() -> None:
    alarms = Alarms("m", 3)
    found = [Finding("drift", 1, "psi", 0.7, 0.2, "x.1 drifted")]
    (first,) = alarms.update(REFERENCE, found, 10.0, 100, 1.0)
    assert (first.model, first.version, first.feature, first.side, first.is_raised) == ("m", 3, "x.1", "input", True)
    assert alarms.update(REFERENCE, found, 20.0, 200, 2.0) == []
    assert alarms.raised == (first,)
    (over,) = alarms.update(REFERENCE, [], 30.0, 300, 3.0)
    assert (over.feature, over.is_raised, over.at, over.rows) == ("x.1", False, 30.0, 300)
    assert alarms.raised == ()
    assert alarms.update(REFERENCE, [], 40.0, 400, 4.0) == []


def test_a_version_that_goes_ends_its_alerts() -> None:
    alarms = Alarms("m", 3)
    alarms.update(REFERENCE, [Finding("accuracy", -1, "estimated_accuracy", 0.5, 0.8, "worse")], 10.0, 100, 1.0)
    (over,) = alarms.end(20.0, 150, 2.0)
    assert (over.kind, over.feature, over.is_raised) == ("accuracy", "", False)
    assert alarms.end(30.0, 150, 3.0) == []
