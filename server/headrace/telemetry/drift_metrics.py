"""Drift, as metric families of one scrape: what replicas can add up (counts on the reference's bins), and what this server judged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate

from headrace.config import DriftConfig
from headrace.drift.counting import QUALITY, Counts, Layout
from headrace.drift.distributions import chi2_isf
from headrace.drift.judgement import SHARES, Histograms, reference_accuracy
from headrace.drift.reference import FeatureReference, Reference
from headrace.drift.statistics import reference_fractions
from headrace.drift.verdict import DriftReport, FeatureScore, WindowVerdict
from headrace.telemetry.exposition import Family, format_labels

_DIGITS = 12
"""Of a reference's digest, in the label of whatever is counted against it: replicas that learnt theirs have bins of the same names
and other edges, and must not be added up."""


class DriftFamilies:
    """The families of one scrape. `add` each report once, then take the `lines`."""

    def __init__(self) -> None:
        self._values = {side: _ValueHistogram(f"headrace_{side}_value", f"Values of an {side}'s feature.") for side in ("input", "output")}
        self._rows = Family(
            "headrace_drift_rows_total",
            "counter",
            "Rows by feature and bin: upper edge (not cumulative) or category, (missing), (infinite).",
        )
        self._ratio = Family("headrace_drift_reference_ratio", "gauge", "Part of the reference's rows in a bin; half a row where none is.")
        self._cdf = Family("headrace_drift_reference_cdf_ratio", "gauge", "Part of the reference's values up to a bin's upper edge.")
        self._reference_rows = Family("headrace_drift_reference_rows", "gauge", "Rows of the reference that have the feature.")
        self._quantile = Family(
            "headrace_drift_psi_quantile", "gauge", "PSI exceeds this times (1/rows + 1/reference rows) by chance once in 1/alpha windows."
        )
        self._alpha = Family("headrace_drift_alpha_ratio", "gauge", "Chance of a false alarm that each feature has in a window.")
        self._min_psi = Family("headrace_drift_min_psi", "gauge", "Smaller shifts are no drift.")
        self._min_rows = Family("headrace_drift_min_rows", "gauge", "Fewer are not compared.")
        self._reference = Family("headrace_drift_reference_info", "gauge", "1, labelled with where the reference is from.")
        self._learning = Family("headrace_drift_learning_ratio", "gauge", "Part of the rows that a reference is still learnt from.")
        self._score = Family("headrace_drift_score", "gauge", "How far the window is from the reference.")
        self._critical = Family("headrace_drift_critical", "gauge", "What the score exceeds by chance once in 1/alpha windows.")
        self._samples = Family("headrace_drift_window_samples", "gauge", "Rows of the window that was judged last.")
        self._alert = Family("headrace_drift_alert", "gauge", "1 while an alert is raised for the feature.")
        self._slow = Family("headrace_drift_slow_evidence", "gauge", "Evidence of slow drift; an alarm from 1 on.")
        self._accuracy = Family("headrace_estimated_accuracy", "gauge", "Accuracy as confidence has it, without labels.")
        self._expected = Family("headrace_reference_accuracy", "gauge", "What the estimate is on the reference's data.")
        self._judged = Family("headrace_estimated_rows_total", "counter", "Rows whose chance of a right answer was estimated.")
        self._correct = Family("headrace_estimated_correct_rows_total", "counter", "Sum of those chances.")
        self._variance = Family("headrace_estimated_correct_variance_total", "counter", "Sum of chance (1 - chance) of those rows.")
        self._quality = Family("headrace_data_quality_total", "counter", "Rows with a problem, by feature.")
        self._seen = Family("headrace_drift_seen_rows_total", "counter", "Rows counted.")
        self._skipped = Family("headrace_drift_skipped_rows_total", "counter", "Rows left out to keep within the budget.")
        self._dropped = Family("headrace_drift_dropped_rows_total", "counter", "Rows lost because too many waited to be counted.")
        self._cpu = Family("headrace_drift_cpu_seconds_total", "counter", "CPU time of counting and judging.")

    def add(self, report: DriftReport) -> None:
        version = format_labels({"model": report.model, "version": str(report.version)})
        self._seen.add(version, report.seen_rows)
        self._skipped.add(version, report.skipped_rows)
        self._dropped.add(version, report.dropped_rows)
        self._cpu.add(version, report.cpu_seconds)
        reference, totals = report.reference, report.totals
        if reference is None or totals is None:
            self._learning.add(version, min(report.learnt_rows / max(report.learn_rows, 1), 1.0))
            return
        compared_with = format_labels({"reference": reference.digest[:_DIGITS]})
        self._reference.add(f"{version},{format_labels({'source': reference.source, 'digest': reference.digest})},{compared_with}", 1)
        if reference_accuracy(reference) >= 0:
            self._expected.add(version, reference_accuracy(reference))
            self._judged.add(version, totals.judged)
            self._correct.add(version, totals.correct)
            self._variance.add(version, totals.correct_variance)
        labels = [
            f"{version},{format_labels({'side': f.feature.side, 'tensor': f.feature.tensor, 'feature': f.feature.name})}"
            for f in reference.features
        ]
        self._add_counts(version, labels, compared_with, reference, totals)
        if report.config is not None:
            self._add_limits(version, labels, reference, report.config)
        for verdict in (report.tumbling, report.sliding):
            if verdict is not None:
                self._add_verdict(version, labels, reference, verdict)
        raised = {(alert.side, alert.feature) for alert in report.alerts if alert.feature}
        for index, (each, text) in enumerate(zip(reference.features, labels, strict=True)):
            self._alert.add(text, int((each.feature.side.value, each.feature.title) in raised))
            self._slow.add(text, report.slow.get(index, 0.0))

    def _add_counts(self, version: str, labels: list[str], compared_with: str, reference: Reference, totals: Counts) -> None:
        layout, made = Layout(reference), Histograms(reference)
        live, shares = made.of(totals), reference_fractions(made.reference, made.real)
        for index, (each, text) in enumerate(zip(reference.features, labels, strict=True)):
            names = (*each.labels, "(missing)", "(infinite)")
            self._reference_rows.add(f"{text},{compared_with}", int(made.rows[index]))
            for name, count, share in zip(names, live[index].tolist(), shares[index].tolist(), strict=False):
                bin_label = f"{text},{compared_with},{format_labels({'bin': name})}"
                self._rows.add(bin_label, count)
                self._ratio.add(bin_label, share)
            quality = layout.quality(totals, index).tolist()
            for problem, count in _problems(each, quality, int(live[index][len(each.counts) - 1])):
                self._quality.add(f'{text},problem="{problem}"', count)
            if each.is_numeric:
                what = format_labels({"tensor": each.feature.tensor, "feature": each.feature.name})
                histogram = f"{version},{what},{compared_with}"
                self._values[each.feature.side.value].add_bins(histogram, each, live[index].tolist(), float(totals.sums[index]))
                for edge, upto in zip(each.labels, accumulate(each.counts), strict=True):
                    self._cdf.add(f'{text},{compared_with},le="{edge}"', upto / max(each.counted, 1))

    def _add_limits(self, version: str, labels: list[str], reference: Reference, config: DriftConfig) -> None:
        """What makes a score an alert, of the version's own settings: rules need no numbers of their own then."""
        alpha = config.alpha * SHARES["tumbling"] / max(len(labels), 1)
        self._alpha.add(version, alpha)
        self._min_psi.add(version, config.min_psi)
        self._min_rows.add(version, config.min_rows)
        for each, text in zip(reference.features, labels, strict=True):
            filled = sum([count > 0 for count in (*each.counts, each.missing, each.infinite)])
            self._quantile.add(text, chi2_isf(alpha, max(filled, 2) - 1))

    def _add_verdict(self, version: str, labels: list[str], reference: Reference, verdict: WindowVerdict) -> None:
        window = f'window="{verdict.kind}"'
        self._samples.add(f"{version},{window}", verdict.rows)
        if verdict.estimated_accuracy >= 0:
            self._accuracy.add(f"{version},{window}", verdict.estimated_accuracy)
        for each, text, score in zip(reference.features, labels, verdict.scores, strict=True):
            for stat, value, critical in _statistics(each, score):
                self._score.add(f'{text},{window},stat="{stat}"', value)
                if critical is not None:
                    self._critical.add(f'{text},{window},stat="{stat}"', critical)

    def lines(self, is_openmetrics: bool) -> list[str]:
        families: list[Family] = [*self._values.values(), self._rows, self._ratio, self._cdf, self._reference_rows, self._reference]
        families += [self._quantile, self._alpha, self._min_psi, self._min_rows, self._learning]
        families += [self._score, self._critical, self._samples, self._alert, self._slow, self._accuracy, self._expected]
        families += [self._judged, self._correct, self._variance, self._quality, self._seen, self._skipped, self._dropped, self._cpu]
        return [line for family in families for line in family.lines(is_openmetrics)]


def _problems(each: FeatureReference, quality: list[int], last_bin: int) -> Iterator[tuple[str, int]]:
    if each.is_numeric:
        yield from zip(QUALITY, quality, strict=True)
    else:
        yield "missing", quality[0]
        yield "unseen", last_bin


def _statistics(each: FeatureReference, score: FeatureScore) -> Iterator[tuple[str, float, float | None]]:
    yield "psi", score.psi, score.psi_critical
    yield "js", score.js, score.js_critical
    yield "chi2", score.chi2, score.chi2_critical
    if each.is_numeric:
        yield "ks", score.ks, score.ks_critical
        yield "wasserstein", score.wasserstein, None


class _ValueHistogram(Family):
    """A histogram of which each feature has edges of its own."""

    __slots__ = ()

    def __init__(self, name: str, documentation: str) -> None:
        super().__init__(name, "histogram", documentation)

    def add_bins(self, labels: str, each: FeatureReference, counts: list[int], total: float) -> None:
        cumulative = list(accumulate(counts[: len(each.counts)]))
        self._lines += [f'{self._name}_bucket{{{labels},le="{le}"}} {count}' for le, count in zip(each.labels, cumulative, strict=True)]
        self._lines.append(f"{self._name}_count{{{labels}}} {cumulative[-1]}")
        self._lines.append(f"{self._name}_sum{{{labels}}} {total}")


def drift_lines(reports: Iterable[DriftReport], is_openmetrics: bool) -> list[str]:
    """The lines of all versions that are watched; none when there is none."""
    families = DriftFamilies()
    for report in reports:
        families.add(report)
    return families.lines(is_openmetrics)
