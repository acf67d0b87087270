"""Slow drift: what no single window shows, found by evidence that adds up. Pure.

For each feature and several starting points the probability of all rows since then is compared under two hypotheses: that they and the
reference came from one distribution (its Dirichlet posterior), and that they came from another one (a Dirichlet prior around it that
the rows themselves sharpen). Their quotient is an e-process: without drift its expectation stays 1, however often one looks (Ville
1939; Grünwald, de Heide and Koolen 2024). The sum over starting points is an e-detector (Shin, Ramdas and Rinaldo 2024): without drift
it takes c windows or more, on average, to exceed c. With c = features / (alpha's share) all features together raise a false alarm no more
often than once in 1 / (alpha's share) windows. As with windows, an effect of `min_psi` is needed too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.config import DriftConfig
from headrace.drift.counting import Counts
from headrace.drift.judgement import SHARES, Histograms
from headrace.drift.reference import Reference
from headrace.drift.statistics import psi, reference_fractions

Array = NDArray[Any]

EVERY = 4
"""Windows between starting points. Fewer of them only make the detector slower: their sum is of fewer terms."""
MOST = 10
"""Starting points that are kept, at ages that about double."""
CONCENTRATION = 30.0
"""Rows that the prior of the other hypothesis is worth: a shift of PSI 0.05 to 1 is what it expects."""
UNSEEN = 0.5
"""Rows that each bin is taken to have beside (Jeffreys' prior), under both hypotheses: where the other one expected less of bins that
stay empty, a constant that stays constant was evidence of drift after a million rows."""
SETTLED = 8
"""Windows without evidence after which an alarm is over."""

_SHIFT = 8


def log_gamma(values: Array) -> Array:
    """ln gamma of positive numbers: Stirling's series at x + 8, less the logarithm of x (x + 1) ... (x + 7); to 1e-11."""
    x = np.asarray(values, np.float64)
    product = x.copy()
    for step in range(1, _SHIFT):
        product = product * (x + step)
    y = x + _SHIFT
    inverse = 1 / (y * y)
    series = (1 / 12 - inverse * (1 / 360 - inverse * (1 / 1260 - inverse / 1680))) / y
    return np.asarray((y - 0.5) * np.log(y) - y + 0.5 * math.log(2 * math.pi) + series - np.log(product))


class _Hypothesis:
    """Dirichlet priors of all features: ln of the Dirichlet-multinomial probability of counts, in their order."""

    def __init__(self, prior: Array, real: Array) -> None:
        self._prior = np.where(real, prior, 1.0)
        self._total = np.where(real, prior, 0.0).sum(axis=-1)
        self._start = log_gamma(self._total) - np.where(real, log_gamma(self._prior), 0.0).sum(axis=-1)

    def log_probability(self, counts: Array, size: Array) -> Array:
        """[..., features] of counts [..., features, bins], whose sums are `size`; bins that are not real have none."""
        return np.asarray(log_gamma(self._prior + counts).sum(axis=-1) + self._start - log_gamma(self._total + size))


class SlowDrift:
    """Owns the sums since each starting point, and which features are in alarm. Not for several threads."""

    def __init__(self, reference: Reference, config: DriftConfig, histograms: Histograms | None = None) -> None:
        self._histograms = made = histograms or Histograms(reference)
        shares = reference_fractions(made.reference, made.real)
        self._same = _Hypothesis(made.reference + UNSEEN, made.real)
        self._other = _Hypothesis(CONCENTRATION * shares + UNSEEN, made.real)
        features = max(len(reference.features), 1)
        self._threshold = math.log(features / (config.alpha * SHARES["slow"]))
        self._min_psi = config.min_psi
        self._sums = np.zeros((0, *made.reference.shape))
        """[starting points, features, bins], the oldest first."""
        self._began: list[int] = []
        self._windows = 0
        self._alarms: set[int] = set()
        self._evidence: dict[int, float] = {}

    def __repr__(self) -> str:
        return f"SlowDrift({self._windows} windows, {len(self._began)} starting points, alarms={sorted(self._alarms)})"

    def update(self, counts: Counts) -> None:
        """The next window's counts."""
        if not len(self._histograms.reference):
            return
        if self._windows % EVERY == 0:
            self._sums = np.concatenate([self._sums, np.zeros((1, *self._sums.shape[1:]))])
            self._began.append(self._windows)
            self._thin()
        self._windows += 1
        self._sums += self._histograms.of(counts)
        size = self._sums.sum(axis=-1)
        logs = self._other.log_probability(self._sums, size) - self._same.log_probability(self._sums, size)
        top = logs.max(axis=0)
        total = top + np.log(np.exp(logs - top).sum(axis=0)) - self._threshold
        ratios = np.exp(np.clip(total, -700, 50))
        self._evidence = {index: self._decide(index, float(ratio), logs[:, index]) for index, ratio in enumerate(ratios)}

    def restart(self, features: Iterable[int]) -> None:
        """Begin anew with these. The budget holds: what is left out of a sum of e-processes makes it smaller."""
        for index in features:
            self._forget(index)

    def _forget(self, index: int) -> None:
        self._alarms.discard(index)
        self._sums[:, index] = 0
        self._evidence[index] = 0.0

    def evidence(self) -> dict[int, float]:
        """By feature: 1 and more is an alarm."""
        return dict(self._evidence)

    def _decide(self, index: int, ratio: float, logs: Array) -> float:
        if index in self._alarms:
            settled = [log for log, began in zip(logs, self._began, strict=True) if self._windows - began >= SETTLED]
            if settled and settled[-1] < 0:
                self._forget(index)
                return 0.0
            return max(ratio, 1.0)
        if ratio < 1:
            return ratio
        made = self._histograms
        if psi(self._sums[int(logs.argmax()), index], made.reference[index], made.real[index]) < self._min_psi:
            return 0.999  # sure, and too small to matter
        self._alarms.add(index)
        return ratio

    def _thin(self) -> None:
        """Drop the starting point that is closest to its elder by the ratio of their ages; never the youngest or the oldest."""
        if len(self._began) <= MOST:
            return
        ages = [self._windows - began + 1 for began in self._began]
        closest = min(range(1, len(ages) - 1), key=lambda i: ages[i - 1] / ages[i])
        del self._began[closest]
        self._sums = np.delete(self._sums, closest, axis=0)
