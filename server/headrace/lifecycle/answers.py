"""Whether a version on trial answers otherwise than it should: what drift counted of its answers, beside the old version's. Pure.

What is wrong with its inputs is not its fault: only outputs are looked at. They are compared with the old version's in the same time
where both are counted into the same ranges (the usual case: the new version's reference is what the old one saw), else with the
reference that was published with the version. A reference that it has learnt itself says nothing against it.

As with errors and times (rollout.py), before the end only what can hardly be chance rolls back, and at the end what is likely none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.config import RolloutConfig
from headrace.drift.counting import Counts
from headrace.drift.features import Extract, Side
from headrace.drift.judgement import Histograms
from headrace.drift.reference import Reference
from headrace.drift.statistics import compare, psi
from headrace.drift.verdict import DriftReport
from headrace.lifecycle.rollout import CLEAR, LIKELY

LEAST_ROWS = 200
"""Of both versions. Of fewer, PSI of ten ranges is 0.1 by chance alone."""
_P_LIKELY = math.erfc(LIKELY / math.sqrt(2)) / 2


@dataclass(frozen=True, slots=True)
class Answers:
    """What drift counted of one version's rows over a window. `reference` None: drift is off, or it is still learnt."""

    version: int
    reference: Reference | None = None
    counts: Counts | None = None

    @property
    def rows(self) -> int:
        return self.counts.rows if self.counts is not None else 0


class Judged(NamedTuple):
    """`faults`: why it should go, a sentence each. `unknown`: what was to be watched and could not be, or not yet."""

    faults: list[str]
    unknown: list[str]


def answers(version: int, now: DriftReport | None, before: DriftReport | None) -> Answers:
    """What was counted after `before`; all of it where that is None or nothing was compared then."""
    if now is None or now.totals is None:
        return Answers(version)
    if before is None or before.totals is None:
        return Answers(version, now.reference, now.totals)
    a, b = now.totals, before.totals
    since = Counts(
        a.bins - b.bins, a.sums - b.sums, a.squares - b.squares, a.rows - b.rows, a.judged - b.judged, a.correct - b.correct,
        a.correct_variance - b.correct_variance,
    )  # fmt: skip
    return Answers(version, now.reference, since)


def is_watched(config: RolloutConfig) -> bool:
    return bool(config.max_drift or config.max_accuracy_drop)


def judge_answers(config: RolloutConfig, candidate: Answers, baseline: Answers, is_over: bool) -> Judged:
    """`is_over`: the trial's time and requests are; the last answer is the one that holds."""
    judged = Judged([], [])
    if not is_watched(config):
        return judged
    if candidate.rows < LEAST_ROWS:
        judged.unknown.append(f"answers not judged: {candidate.rows:,} rows counted for drift, {LEAST_ROWS:,} are needed")
        return judged
    if config.max_accuracy_drop:
        _judge_accuracy(config.max_accuracy_drop, candidate, baseline, is_over, judged)
    if config.max_drift:
        _judge_drift(config.max_drift, candidate, baseline, is_over, judged)
    return judged


class Estimate(NamedTuple):
    """Accuracy without labels, and its standard error: at most that of so many rows right or wrong."""

    value: float
    error: float


def estimates(candidate: Answers, baseline: Answers) -> tuple[Estimate, Estimate] | None:
    """By calibrated confidence where both versions have a calibration, else by confidence as it is: like with like. None where either
    has no confidence, or too few rows of it."""
    both = [each for each in (candidate, baseline) if each.reference is not None and each.counts is not None]
    is_calibrated = all(each.reference is not None and each.reference.calibration is not None for each in both)
    found = [_estimate(each, is_calibrated) for each in both]
    known = [each for each in found if each is not None]
    return (known[0], known[1]) if len(known) == 2 else None


def _estimate(each: Answers, is_calibrated: bool) -> Estimate | None:
    reference, counts = each.reference, each.counts
    assert reference is not None
    assert counts is not None
    if is_calibrated:
        rows, total = counts.judged, counts.correct
    else:
        index = next((i for i, one in enumerate(reference.features) if one.feature.extract is Extract.CONFIDENCE), -1)
        if index < 0:
            return None
        made = Histograms(reference)
        rows, total = int(made.of(counts)[index, : len(reference.features[index].counts)].sum()), float(counts.sums[index])
    if rows < LEAST_ROWS:
        return None
    value = min(max(total / rows, 0.0), 1.0)
    return Estimate(value, math.sqrt(max(value * (1 - value), 1 / rows) / rows))


def _judge_accuracy(allowed: float, candidate: Answers, baseline: Answers, is_over: bool, judged: Judged) -> None:
    found = estimates(candidate, baseline)
    if found is None:
        judged.unknown.append(f"accuracy not estimated: both versions need confidence over {LEAST_ROWS:,} rows")
        return
    new, old = found
    drop, error = old.value - new.value, math.hypot(new.error, old.error)
    if drop - CLEAR * error > allowed or (is_over and drop > allowed and drop > LIKELY * error):
        judged.faults.append(
            f"estimated accuracy {new.value * 100:.1f} % over {candidate.rows:,} rows, {drop * 100:.1f} points below version "
            f"{baseline.version}; at most {allowed * 100:g}"
        )


class OutputDrift(NamedTuple):
    """The output's feature that is furthest from what it should be like: `psi` beyond chance and its standard error; `p_value` among all
    outputs' features."""

    title: str
    psi: float
    error: float
    p_value: float
    what: str


def output_drift(candidate: Answers, baseline: Answers) -> OutputDrift | None:
    """None where there is nothing to compare with, or too few rows."""
    found = _compared_with(candidate, baseline) if candidate.rows >= LEAST_ROWS else None
    if found is None or candidate.counts is None:
        return None
    reference, others, what = found
    made = Histograms(reference)
    features = [i for i, each in enumerate(reference.features) if each.feature.side is Side.OUTPUT]
    if not features:
        return None
    live, old = made.of(candidate.counts)[features], others[features]
    p_values = np.minimum(compare(live, old, made.others[features])[2] * len(features), 1.0)
    noise, freedom = _noise(live, old)
    values = psi(live, old, made.real[features]) - freedom * noise
    # PSI over the noise is chi-square, with drift a noncentral one.
    errors = np.sqrt(2 * freedom * noise**2 + 4 * np.maximum(values, 0) * noise)
    # Of those that are likely the furthest; where none is, of all.
    is_sure = p_values < _P_LIKELY
    worst = int(np.argmax(np.where(is_sure, values, -np.inf) if is_sure.any() else values))
    title = reference.features[features[worst]].feature.title
    return OutputDrift(title, float(values[worst]), float(errors[worst]), float(p_values[worst]), what)


def _judge_drift(allowed: float, candidate: Answers, baseline: Answers, is_over: bool, judged: Judged) -> None:
    found = output_drift(candidate, baseline)
    if found is None:
        what = f"output drift not judged: version {candidate.version} has learnt its reference from its own answers, or has none, and"
        judged.unknown.append(f"{what} version {baseline.version} is counted otherwise or too little")
        return
    is_clear = found.psi - CLEAR * found.error > allowed
    is_likely = is_over and found.psi > allowed and found.p_value < _P_LIKELY
    if is_clear or is_likely:
        rows = f"over {candidate.rows:,} rows"
        judged.faults.append(f"output {found.title} is unlike {found.what}: PSI {found.psi:.2f} beyond chance {rows}; at most {allowed:g}")


def _compared_with(candidate: Answers, baseline: Answers) -> tuple[Reference, NDArray[Any], str] | None:
    """The candidate's reference, counts [features, bins] to compare with, and what they are."""
    mine, its = candidate.reference, baseline.reference
    if mine is None:
        return None
    if its is not None and baseline.counts is not None and baseline.rows >= LEAST_ROWS and _same_bins(mine, its):
        return mine, Histograms(mine).of(baseline.counts), f"version {baseline.version}'s in the same time"
    if mine.source == "learnt":
        return None
    return mine, Histograms(mine).reference, f"its reference ({mine.source})"


def _same_bins(a: Reference, b: Reference) -> bool:
    return [(each.feature, each.edges, each.categories) for each in a.features] == [
        (each.feature, each.edges, each.categories) for each in b.features
    ]


def _noise(live: NDArray[Any], old: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(1/n + 1/m, degrees of freedom) of each feature: their product is PSI without drift on average (Yurdakul 2018)."""
    n, m = live.sum(axis=1), old.sum(axis=1)
    freedom = np.maximum(((live + old) > 0).sum(axis=1) - 1, 1)
    return np.asarray(1 / np.maximum(n, 1) + 1 / np.maximum(m, 1)), freedom.astype(np.float64)


def table(candidate: Answers, baseline: Answers) -> tuple[tuple[str, str, str], ...]:
    """Rows of (name, the candidate's, the old version's)."""
    found, drift = estimates(candidate, baseline), output_drift(candidate, baseline)
    new, old = (f"{found[0].value * 100:.1f} %", f"{found[1].value * 100:.1f} %") if found is not None else ("not known", "not known")
    return (
        ("rows counted for drift", f"{candidate.rows:,}", f"{baseline.rows:,}"),
        ("estimated accuracy", new, old),
        ("output drift, PSI", f"{drift.psi:.2f} ({drift.title})" if drift is not None else "not known", ""),
    )
