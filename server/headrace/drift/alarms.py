"""From the verdicts of windows to alerts that are raised once and end once. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from headrace.drift.counting import QUALITY, Counts, Layout
from headrace.drift.reference import Reference
from headrace.drift.verdict import Alert, WindowVerdict

CLEAR_ERRORS = 4.0
"""Standard errors by which the estimated accuracy must lie below the reference's: about once in 30,000 windows by chance."""
LEAST_DROP = 0.05
"""And by how much: less is no reason to wake anybody."""
MOST_OFF_SCALE = 0.05
"""Part of a window's rows that may lie far outside of the reference's range."""

_OFF_SCALE = QUALITY.index("off_scale")


class Finding(NamedTuple):
    """What is wrong now: with one feature of the reference, or, where `feature` is -1, with the version."""

    kind: str
    feature: int
    statistic: str
    value: float
    critical: float
    text: str

    @property
    def key(self) -> tuple[str, int]:
        return self.kind, self.feature


def findings(
    reference: Reference, window: Counts, tumbling: WindowVerdict, sliding: WindowVerdict | None, slow: Mapping[int, float]
) -> list[Finding]:
    """Everything that is wrong by the window that has just ended, at most one finding for each kind and feature."""
    found: dict[tuple[str, int], Finding] = {}
    for verdict in (tumbling, sliding):
        for index in verdict.drifting if verdict is not None else ():
            assert verdict is not None
            finding = _drift(reference, verdict, index)
            found.setdefault(finding.key, finding)
    for index, evidence in slow.items():
        if evidence >= 1 and ("drift", index) not in found:
            title = reference.features[index].feature.title
            text = f"{title} has drifted slowly: evidence {evidence:.3g} times what chance allows"
            found["slow_drift", index] = Finding("slow_drift", index, "evidence", evidence, 1.0, text)
    for finding in (*_accuracy(tumbling), *_scale(reference, window)):
        found[finding.key] = finding
    return list(found.values())


def _drift(reference: Reference, verdict: WindowVerdict, index: int) -> Finding:
    score, title = verdict.scores[index], reference.features[index].feature.title
    text = f"{title} drifted: PSI {score.psi:.3g} over {score.rows:,} rows, {score.psi_critical:.2g} by chance, p = {score.p_value:.1g}"
    return Finding("drift", index, "psi", score.psi, score.psi_critical, text)


def _accuracy(verdict: WindowVerdict) -> list[Finding]:
    estimate, expected = verdict.estimated_accuracy, verdict.reference_accuracy
    if estimate < 0 or expected < 0:
        return []
    allowed = expected - max(LEAST_DROP, CLEAR_ERRORS * verdict.estimated_error)
    if estimate >= allowed:
        return []
    text = f"estimated accuracy {estimate:.1%} over {verdict.rows:,} rows, {expected:.1%} in the reference"
    return [Finding("accuracy", -1, "estimated_accuracy", estimate, allowed, text)]


def _scale(reference: Reference, window: Counts) -> list[Finding]:
    layout, found = Layout(reference), []
    for index, feature in enumerate(reference.features):
        part = int(layout.quality(window, index)[_OFF_SCALE]) / max(window.rows, 1)
        if part > MOST_OFF_SCALE:
            text = (
                f"{feature.feature.title}: {part:.0%} of {window.rows:,} rows are far outside of {feature.minimum:.4g} to "
                f"{feature.maximum:.4g}: another scale or unit?"
            )
            found.append(Finding("quality", index, "off_scale", part, MOST_OFF_SCALE, text))
    return found


class Alarms:
    """Owns the alerts of one version that are raised and not over. Not for several threads."""

    def __init__(self, model: str, version: int) -> None:
        self._model = model
        self._version = version
        self._raised: dict[tuple[str, int], Alert] = {}

    def __repr__(self) -> str:
        return f"Alarms({self._model}:{self._version}, {len(self._raised)} raised)"

    @property
    def raised(self) -> tuple[Alert, ...]:
        return tuple(self._raised.values())

    def update(self, reference: Reference, found: Sequence[Finding], at: float, rows: int, seconds: float) -> list[Alert]:
        """What is new: alerts raised, and those that are over because a whole window went by without them."""
        now = {finding.key: self._alert(reference, finding, at, rows, seconds) for finding in found}
        news = [alert for key, alert in now.items() if key not in self._raised]
        news += [_over(alert, at, rows, seconds) for key, alert in self._raised.items() if key not in now]
        # The first one's time and numbers stay: when it began is what people ask.
        self._raised = {key: self._raised.get(key, alert) for key, alert in now.items()}
        return news

    def end(self, at: float, rows: int, seconds: float) -> list[Alert]:
        """The version goes: whatever is raised is over."""
        news = [_over(alert, at, rows, seconds) for alert in self._raised.values()]
        self._raised = {}
        return news

    def _alert(self, reference: Reference, finding: Finding, at: float, rows: int, seconds: float) -> Alert:
        feature = reference.features[finding.feature].feature if finding.feature >= 0 else None
        return Alert(
            at=at,
            model=self._model,
            version=self._version,
            kind=finding.kind,
            feature=feature.title if feature is not None else "",
            side=feature.side.value if feature is not None else "",
            is_raised=True,
            statistic=finding.statistic,
            value=finding.value,
            critical=finding.critical,
            rows=rows,
            seconds=seconds,
            text=finding.text,
        )


def _over(alert: Alert, at: float, rows: int, seconds: float) -> Alert:
    return Alert(
        at=at,
        model=alert.model,
        version=alert.version,
        kind=alert.kind,
        feature=alert.feature,
        side=alert.side,
        is_raised=False,
        statistic=alert.statistic,
        value=alert.value,
        critical=alert.critical,
        rows=rows,
        seconds=seconds,
        text=f"over: {alert.text}",
    )
