"""A report's features as people look at them: the worst first, live beside the reference. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.drift.counting import Layout
from headrace.drift.reference import FeatureReference
from headrace.drift.verdict import Alert, DriftReport, FeatureScore


@dataclass(frozen=True, slots=True)
class Ranked:
    """A feature in the window that ended last. `expected`, `live`: parts of the rows in each bin, of the reference and of that window.
    `history`: its PSI in ended windows, oldest first. `is_raised`: an alert of it is."""

    reference: FeatureReference
    score: FeatureScore
    expected: tuple[float, ...]
    live: tuple[float, ...]
    history: tuple[float, ...]
    is_raised: bool

    @property
    def excess(self) -> float:
        """How many times what chance allows."""
        return self.score.psi / self.score.psi_critical if self.score.psi_critical > 0 else self.score.psi


def rank(report: DriftReport) -> list[Ranked]:
    """Those with alerts first, then by how far PSI is beyond chance. None before a window has ended."""
    reference, window, latest = report.reference, report.tumbling, report.latest
    if reference is None or window is None or latest is None:
        return []
    layout = Layout(reference)
    raised = {(alert.side, alert.feature) for alert in report.alerts}
    ranked = [
        Ranked(
            each,
            window.scores[index],
            _parts([*each.counts]),
            _parts(layout.bins(latest, index).tolist()),
            tuple([past.scores[index].psi for past in report.history]),
            (each.feature.side.value, each.feature.title) in raised,
        )
        for index, each in enumerate(reference.features)
    ]
    return sorted(ranked, key=lambda each: (not each.is_raised, -each.excess))


def worst_first(alerts: Sequence[Alert]) -> list[Alert]:
    """Those of the version as a whole, then those of features by how far they are beyond what chance allows."""
    return sorted(alerts, key=lambda alert: (bool(alert.feature), -abs(alert.value / (alert.critical or 1.0))))


def _parts(counts: list[int]) -> tuple[float, ...]:
    total = max(sum(counts), 1)
    return tuple([count / total for count in counts])
