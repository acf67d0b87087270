"""Whether a window has drifted. Pure.

The budget of false alarms. `alpha` is the chance that the end of a window raises an alert although nothing has drifted, over all
features together. Half of it is the window's own, a quarter that of the sliding window, which is judged at the same time (overlap
makes its alarms come together, not more often), and a quarter is for slow drift (sequential.py). Over the features Benjamini and
Hochberg's procedure keeps each share. An alert also needs an effect: a PSI of `min_psi`, since with enough rows every difference is sure.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.config import DriftConfig
from headrace.drift import statistics
from headrace.drift.counting import QUALITY, Counts, Layout
from headrace.drift.distributions import chi2_isf
from headrace.drift.features import Extract
from headrace.drift.reference import Reference
from headrace.drift.statistics import wasserstein_weights
from headrace.drift.verdict import FeatureScore, WindowVerdict

Array = NDArray[Any]

SHARES = {"tumbling": 0.5, "sliding": 0.25, "slow": 0.25}
"""Of alpha."""
_MISSING, _INFINITE = QUALITY.index("missing"), QUALITY.index("infinite")


class Histograms:
    """A reference's features side by side: [features, bins], each with its bins, then its missing rows, then its infinite ones.

    `real` is False where a feature has fewer bins than others; `others` is True at the bin of categories that have none of their own.
    Immutable; made once for a reference.
    """

    def __init__(self, reference: Reference) -> None:
        layout, features = Layout(reference), reference.features
        self.features = features
        width = max([len(each.counts) for each in features], default=0) + 2
        self.places = np.full((len(features), width), layout.width)
        self.reference = np.zeros((len(features), width), np.int64)
        self.is_numeric = np.array([each.is_numeric for each in features], np.bool_)
        self._is_bin = np.zeros((len(features), width), np.bool_)
        self.others = np.zeros((len(features), width), np.bool_)
        self._weights = np.zeros((len(features), width))
        for row, each in enumerate(features):
            size, start = len(each.counts), layout.starts[row]
            self.places[row, :size] = start + np.arange(size)
            self.places[row, size : size + 2] = start + size + _MISSING, start + size + _INFINITE
            self.reference[row, : size + 2] = *each.counts, each.missing, each.infinite
            self._is_bin[row, :size] = True
            self.others[row, size - 1] = not each.is_numeric
            if each.is_numeric:
                self._weights[row, :size] = wasserstein_weights(each.edges, each.minimum, each.maximum, each.deviation)
        self.real = self.places < layout.width
        self.filled = (self.reference > 0).sum(axis=1)
        self.rows = self.reference.sum(axis=1)

    def of(self, counts: Counts) -> Array:
        """[features, bins] of live counts."""
        return np.asarray(np.append(counts.bins, 0)[self.places])

    def cdf_distances(self, live: Array) -> Array:
        """Of the bins alone, in their order; those of categories have none."""
        inside = self._is_bin & self.is_numeric[:, None]
        return statistics.cdf_distances(np.where(inside, live, 0), np.where(inside, self.reference, 0))

    def wasserstein(self, distances: Array) -> Array:
        return np.asarray((distances * self._weights).sum(axis=1))


def judge(
    reference: Reference,
    counts: Counts,
    config: DriftConfig,
    kind: str,
    began: float,
    ended: float,
    histograms: Histograms | None = None,
) -> WindowVerdict:
    """`kind`: tumbling or sliding. `histograms`: of this reference, where they are made already."""
    alpha = config.alpha * SHARES[kind]
    scores = _score(histograms or Histograms(reference), counts, config, alpha) if reference.features else ()
    estimate, error = estimated_accuracy(counts)
    return WindowVerdict(kind, began, ended, counts.rows, scores, estimate, error, reference_accuracy(reference))


def estimated_accuracy(counts: Counts) -> tuple[float, float]:
    """(estimate, standard error); -1 where nothing can be said."""
    if not counts.judged:
        return -1.0, 0.0
    return counts.correct / counts.judged, math.sqrt(counts.correct_variance) / counts.judged


def reference_accuracy(reference: Reference) -> float:
    """What the estimate is on the reference's own data: its accuracy where it was calibrated there, else its mean confidence."""
    if reference.calibration is not None and reference.accuracy >= 0:
        return reference.accuracy
    return next((each.mean for each in reference.features if each.feature.extract is Extract.CONFIDENCE), -1.0)


def _score(histograms: Histograms, counts: Counts, config: DriftConfig, alpha: float) -> tuple[FeatureScore, ...]:
    live, reference, real = histograms.of(counts), histograms.reference, histograms.real
    rows, each = live.sum(axis=1), alpha / len(live)
    psi, js = statistics.psi(live, reference, real), statistics.js(live, reference, real)
    distances = histograms.cdf_distances(live)
    ks, wasserstein = distances.max(axis=1), histograms.wasserstein(distances)
    chi2, df, p_values = statistics.compare(live, reference, histograms.others)
    p_values = np.where(rows >= config.min_rows, p_values, 1.0)
    is_drifting = statistics.benjamini_hochberg(p_values, alpha) & (psi >= config.min_psi)
    scores = []
    for index in range(len(live)):
        n, m = int(rows[index]), int(histograms.rows[index])
        critical = statistics.psi_critical(max(int(histograms.filled[index]), 2), n, m, each)
        size = len(histograms.features[index].counts)
        scores.append(
            FeatureScore(
                rows=n,
                psi=float(psi[index]),
                psi_critical=critical,
                js=float(js[index]),
                js_critical=statistics.js_critical(critical),
                ks=float(ks[index]),
                ks_critical=statistics.ks_critical(n, m, each) if histograms.is_numeric[index] else math.inf,
                wasserstein=float(wasserstein[index]),
                chi2=float(chi2[index]),
                chi2_critical=chi2_isf(each, int(df[index])) if df[index] else math.inf,
                p_value=float(p_values[index]),
                missing_rate=int(live[index, size]) / n if n else 0.0,
                infinite_rate=int(live[index, size + 1]) / n if n else 0.0,
                is_drifting=bool(is_drifting[index]),
            )
        )
    return tuple(scores)
