"""What a scrape says of drift, read by Prometheus's own parsers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from headrace.drift.judgement import Histograms
from headrace.drift.statistics import psi
from headrace.drift.verdict import DriftReport
from headrace.telemetry.drift_metrics import drift_lines
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from watched_versions import CLEAN, DRIFTED, reference, report

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples_of(*reports: DriftReport, is_openmetrics: bool = False) -> Samples:
    lines = drift_lines(reports, is_openmetrics)
    text = "\n".join([*lines, *(["# EOF"] if is_openmetrics else []), ""])
    parsed = parse_openmetrics(text) if is_openmetrics else parse_text(text)
    found: Samples = {}
    for family in parsed:
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found, f"{key} stands there twice"
            found[key] = sample.value
    return found


def digest(report: DriftReport) -> str:
    assert report.reference is not None
    return report.reference.digest[:12]


def pick(samples: Samples, name: str, **labels: str) -> dict[str, float]:
    """Values by the label that is not given, of those with these labels."""
    wanted = set({"model": "titanic", "version": "3", **labels}.items())
    return {
        "".join(value for key, value in found if (key, value) not in wanted): number
        for (each, found), number in samples.items()
        if each == name and wanted <= set(found)
    }


@pytest.mark.parametrize("is_openmetrics", [False, True])
def test_both_formats_can_be_parsed_and_name_each_series_once(is_openmetrics: bool) -> None:
    samples = samples_of(report(DRIFTED), report(CLEAN, version=4), is_openmetrics=is_openmetrics)
    assert len(samples) > 300


def test_bins_and_ratios_add_up_to_the_servers_own_psi() -> None:
    """Over the totals, by the formula of docs/operations.md."""
    drifted = report(DRIFTED)
    samples = samples_of(drifted)
    assert drifted.reference is not None
    assert drifted.totals is not None
    made = Histograms(drifted.reference)
    expected = psi(made.of(drifted.totals), made.reference, made.real)
    for index, each in enumerate(drifted.reference.features):
        where = {"side": each.feature.side.value, "tensor": each.feature.tensor, "feature": each.feature.name, "reference": digest(drifted)}
        rows, ratios = pick(samples, "headrace_drift_rows_total", **where), pick(samples, "headrace_drift_reference_ratio", **where)
        total = sum(rows.values())
        found = 0.0
        for name, q in ratios.items():
            p = (rows[name] + 5 * q) / (total + 5)
            found += (p - q) * math.log(p / q)
        assert found == pytest.approx(float(expected[index]))


def test_histograms_are_cumulative_and_alerts_are_on_what_drifts() -> None:
    drifted = report(DRIFTED)
    samples, here = samples_of(drifted), digest(drifted)
    buckets = pick(samples, "headrace_input_value_bucket", tensor="passenger", feature="age", reference=here)
    assert list(buckets.values()) == sorted(buckets.values())
    assert buckets["+Inf"] == pick(samples, "headrace_input_value_count", tensor="passenger", feature="age", reference=here)[""] == 3000
    assert pick(samples, "headrace_drift_alert", side="input", tensor="passenger", feature="age")[""] == 1
    assert pick(samples, "headrace_drift_alert", side="input", tensor="passenger", feature="fare")[""] == 0
    assert pick(samples, "headrace_data_quality_total", feature="value", problem="unseen", side="input", tensor="port")[""] > 0
    assert pick(samples, "headrace_drift_skipped_rows_total")[""] == 1200


def test_a_version_that_learns_says_how_far_it_is() -> None:
    learning = replace(report(CLEAN), reference=None, totals=None, learnt_rows=500, learn_rows=2000)
    samples = samples_of(learning)
    assert pick(samples, "headrace_drift_learning_ratio") == {"": 0.25}
    assert not any(name == "headrace_drift_score" for name, _ in samples)


def test_categories_may_be_called_anything() -> None:
    drifted = report(CLEAN)
    assert drifted.reference is not None
    port = drifted.reference.features[2]
    odd = replace(port, categories=("missing", 'say "hi"\n', "back\\slash"))
    features = (*drifted.reference.features[:2], odd, *drifted.reference.features[3:])
    samples = samples_of(replace(drifted, reference=replace(drifted.reference, features=features)))
    named = {"side": "input", "tensor": "port", "feature": "value", "reference": digest(drifted)}
    names = set(pick(samples, "headrace_drift_rows_total", **named))
    assert names == {"missing", 'say "hi"\n', "back\\slash", "", "(missing)", "(infinite)"}


def test_a_rule_has_what_it_needs_for_the_critical_value_and_the_ks_distance() -> None:
    drifted = report(DRIFTED)
    samples = samples_of(drifted)
    assert drifted.reference is not None
    assert drifted.tumbling is not None
    for each, score in zip(drifted.reference.features, drifted.tumbling.scores, strict=True):
        where = {"side": each.feature.side.value, "tensor": each.feature.tensor, "feature": each.feature.name}
        quantile = pick(samples, "headrace_drift_psi_quantile", **where)[""]
        rows = pick(samples, "headrace_drift_reference_rows", reference=digest(drifted), **where)[""]
        assert quantile * (1 / score.rows + 1 / rows) == pytest.approx(score.psi_critical)
    edges = pick(samples, "headrace_drift_reference_cdf_ratio", side="input", tensor="passenger", feature="age", reference=digest(drifted))
    assert list(edges.values()) == sorted(edges.values())
    assert edges["+Inf"] == 1


def test_references_that_differ_are_different_series() -> None:
    """Bins of the same names and other edges would else be added up."""
    first = report(CLEAN)
    other = replace(first, reference=reference(seed=5))
    assert digest(first) != digest(other)
    assert len(samples_of(first)) == len(samples_of(other))
    names = ("headrace_drift_rows_total", "headrace_drift_reference_ratio", "headrace_input_value_bucket")
    for name in names:
        assert not {key for key in samples_of(first) if key[0] == name} & {key for key in samples_of(other) if key[0] == name}
