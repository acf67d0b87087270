"""What is said of a version's drift: scores of a window, alerts, and everything together. Shapes only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from headrace.config import DriftConfig
from headrace.drift.counting import Counts
from headrace.drift.reference import Reference


@dataclass(frozen=True, slots=True)
class FeatureScore:
    """One feature in one window, beside its reference. The statistics are statistics.py's, each of live bins against reference bins.

    `psi_critical`: what PSI exceeds once in 1 / alpha windows without drift, at this window's and the reference's number of rows.
    `p_value`: of the chi-square test; 1 where there were too few rows. `is_drifting`: significant among all features of the window, and
    larger than the floor.
    """

    rows: int
    psi: float
    psi_critical: float
    js: float
    js_critical: float
    ks: float
    ks_critical: float
    wasserstein: float
    chi2: float
    chi2_critical: float
    p_value: float
    missing_rate: float
    infinite_rate: float
    is_drifting: bool = False


@dataclass(frozen=True, slots=True)
class WindowVerdict:
    """A window: `kind` tumbling (rows since the last one ended) or sliding (the last several of those together). Times are the wall
    clock's. `scores`: one a feature of the reference, in its order. `estimated_accuracy`: -1 where it cannot be estimated;
    `estimated_error` is its standard error. `reference_accuracy`: what the same estimate gives for the reference."""

    kind: str
    began: float
    ended: float
    rows: int
    scores: tuple[FeatureScore, ...]
    estimated_accuracy: float = -1.0
    estimated_error: float = 0.0
    reference_accuracy: float = -1.0

    @property
    def drifting(self) -> tuple[int, ...]:
        """Indexes of the features that drift."""
        return tuple([index for index, score in enumerate(self.scores) if score.is_drifting])


@dataclass(frozen=True, slots=True)
class Alert:
    """`kind`: drift, slow_drift, accuracy or quality; `feature` is the title of one, or empty. `is_raised` False: it is over.

    `value` and `critical` are of the statistic that `statistic` names; `rows` were seen since the version went live; `seconds` since then.
    """

    at: float
    model: str
    version: int
    kind: str
    feature: str
    side: str
    is_raised: bool
    statistic: str
    value: float
    critical: float
    rows: int
    seconds: float
    text: str


@dataclass(frozen=True, slots=True)
class DriftReport:
    """Everything that is known of one version's drift at a moment.

    `reference` is None while it is learnt: `learnt_rows` of `learn_rows`. `totals`: all live counts since the version went live, on
    that reference; `latest`: those of the window `tumbling`. `seen_rows` were counted, `skipped_rows` left out to stay within the
    budget, `dropped_rows` because the hand-off was full. `history`: verdicts of ended tumbling windows, oldest first. `slow`: by feature
    index, evidence of slow drift, which raises an alert at 1. `config`: what it is judged by; None in a report from another process.
    """

    model: str
    version: int
    reference: Reference | None
    learnt_rows: int = 0
    learn_rows: int = 0
    totals: Counts | None = None
    latest: Counts | None = None
    seen_rows: int = 0
    skipped_rows: int = 0
    dropped_rows: int = 0
    cpu_seconds: float = 0.0
    tumbling: WindowVerdict | None = None
    sliding: WindowVerdict | None = None
    slow: Mapping[int, float] = field(default_factory=dict)
    alerts: tuple[Alert, ...] = ()
    history: tuple[WindowVerdict, ...] = ()
    past_alerts: tuple[Alert, ...] = ()
    config: DriftConfig | None = field(default=None, compare=False)
