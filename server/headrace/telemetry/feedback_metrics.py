"""How right versions were by labels that came later, as metrics: sums that windows and replicas add up, and what they amount to."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace.feedback.feedbacks import FeedbackReport, Feedbacks


class FeedbackCollector(Collector):
    """Asks at each scrape. Owns nothing. A version's series end with it."""

    def __init__(self, feedbacks: Feedbacks) -> None:
        self._feedbacks = feedbacks

    def collect(self) -> Iterable[Metric]:
        families = _Families()
        for model, outcomes in self._feedbacks.outcomes().items():
            for outcome, count in outcomes.items():
                families.requests.add_metric([model, outcome], count)
        for report in self._feedbacks.reports():
            families.add(report)
        return families.all()


class _Families:
    def __init__(self) -> None:
        labels = ["model", "version"]
        self.requests = CounterMetricFamily(
            "headrace_feedback_requests", "Requests for which labels came, by what became of them.", labels=["model", "outcome"]
        )
        self._waiting = GaugeMetricFamily("headrace_feedback_waiting_rows", "Predictions that wait for labels.", labels=labels)
        self._unidentified = CounterMetricFamily(
            "headrace_feedback_unidentified", "Requests that labels cannot come for: without an id, or that output.", labels=labels
        )
        self._rows = CounterMetricFamily("headrace_feedback_rows", "Labelled rows.", labels=labels)
        self._correct = CounterMetricFamily("headrace_feedback_correct", "Labelled rows whose class was right.", labels=labels)
        self._accuracy = GaugeMetricFamily(
            "headrace_online_accuracy", "Part of the labelled rows that was right; recent: the latest 1000.", labels=[*labels, "window"]
        )
        self._bounds = GaugeMetricFamily(
            "headrace_online_accuracy_bound", "Of the accuracy of all labelled rows, 95 % (Wilson).", labels=[*labels, "bound"]
        )
        self._calibration = GaugeMetricFamily(
            "headrace_online_calibration_error", "Expected calibration error of all labelled rows.", labels=labels
        )
        self._absolute = CounterMetricFamily("headrace_feedback_absolute_error", "Sum of |predicted - true|.", labels=labels)
        self._squared = CounterMetricFamily("headrace_feedback_squared_error", "Sum of (predicted - true) squared.", labels=labels)
        self._error = GaugeMetricFamily(
            "headrace_online_error", "Of all labelled rows: mae, rmse, bias (predicted - true).", labels=[*labels, "stat"]
        )

    def add(self, report: FeedbackReport) -> None:
        values = [report.model, str(report.version)]
        self._waiting.add_metric(values, report.waiting_rows)
        self._unidentified.add_metric(values, report.unidentified)
        right, errors = report.classification, report.regression
        if right is not None:
            self._rows.add_metric(values, right.rows)
            self._correct.add_metric(values, right.correct)
            if right.rows:
                self._accuracy.add_metric([*values, "all"], right.accuracy)
                self._accuracy.add_metric([*values, "recent"], right.recent_accuracy)
                for bound, value in zip(("lower", "upper"), right.interval, strict=True):
                    self._bounds.add_metric([*values, bound], value)
            if right.calibration_error >= 0:
                self._calibration.add_metric(values, right.calibration_error)
        if errors is not None:
            self._rows.add_metric(values, errors.rows)
            self._absolute.add_metric(values, errors.absolute)
            self._squared.add_metric(values, errors.squared)
            if errors.rows:
                for stat, value in (("mae", errors.mae), ("rmse", errors.rmse), ("bias", errors.bias)):
                    self._error.add_metric([*values, stat], value)

    def all(self) -> list[Metric]:
        families = [self.requests, self._waiting, self._unidentified, self._rows, self._correct, self._accuracy, self._bounds]
        return [*families, self._calibration, self._absolute, self._squared, self._error]
