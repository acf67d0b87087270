"""How right predictions were, from labels that came later: accuracy, calibration and confusion of classes, errors of numbers. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

MOST_CLASSES = 64
"""That have a row and a column of their own in the confusion, the first that are seen; all others share one: 65 x 65 counts at most."""
OTHER = -1
"""The class that all others share. No class has that number."""
BINS = 15
"""Of confidence, equally wide; as in Guo et al., On Calibration of Modern Neural Networks (2017)."""
RECENT = 1000
"""Rows that say how it is now."""
Z = 1.959963984540054
"""Of a standard normal, for intervals of 95 %."""


def wilson(correct: int, rows: int) -> tuple[float, float]:
    """The score interval of a proportion, 95 % (Wilson 1927), which holds for few rows and near 0 and 1 too. (0, 1) for no rows."""
    if not rows:
        return 0.0, 1.0
    share, weight = correct / rows, Z * Z / rows
    middle = share + weight / 2
    half = Z * math.sqrt(share * (1 - share) / rows + weight / (4 * rows))
    return max((middle - half) / (1 + weight), 0.0), min((middle + half) / (1 + weight), 1.0)


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Rows whose confidence is above `lower` and at most `upper`."""

    lower: float
    upper: float
    rows: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Classification:
    """`recent`: of the latest RECENT rows. `calibration_error`: the expected one, ECE: the mean over bins of |accuracy - confidence|, by
    their rows; -1 where no confidence is known. `confusion`: (true class, predicted class) -> rows, OTHER for classes beyond the cap."""

    rows: int
    correct: int
    recent_rows: int
    recent_correct: int
    calibration_error: float
    bins: tuple[CalibrationBin, ...]
    confusion: Mapping[tuple[int, int], int]

    @property
    def accuracy(self) -> float:
        return self.correct / self.rows if self.rows else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.correct, self.rows)

    @property
    def recent_accuracy(self) -> float:
        return self.recent_correct / self.recent_rows if self.recent_rows else 0.0


@dataclass(frozen=True, slots=True)
class Regression:
    """Errors are predicted - true. Sums, so that replicas and windows add up."""

    rows: int
    error: float
    absolute: float
    squared: float
    recent_rows: int
    recent_absolute: float

    @property
    def bias(self) -> float:
        return self.error / self.rows if self.rows else 0.0

    @property
    def mae(self) -> float:
        return self.absolute / self.rows if self.rows else 0.0

    @property
    def rmse(self) -> float:
        return math.sqrt(self.squared / self.rows) if self.rows else 0.0

    @property
    def recent_mae(self) -> float:
        return self.recent_absolute / self.recent_rows if self.recent_rows else 0.0


@dataclass(slots=True)
class ClassificationCounter:
    """Owns the counts of one version's labelled rows."""

    rows: int = 0
    correct: int = 0
    confident_rows: Array = field(default_factory=lambda: np.zeros(BINS, np.int64))
    confident_correct: Array = field(default_factory=lambda: np.zeros(BINS, np.int64))
    confidence: Array = field(default_factory=lambda: np.zeros(BINS))
    known: set[int] = field(default_factory=set)
    confusion: dict[tuple[int, int], int] = field(default_factory=dict)
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=RECENT))

    def add(self, predicted: Sequence[int], confidences: Sequence[float], labels: Sequence[int]) -> None:
        """Rows of one request. `confidences` from 0 to 1, negative where none is known."""
        for guess, sure, label in zip(predicted, confidences, labels, strict=True):
            is_right = guess == label
            self.rows += 1
            self.correct += is_right
            self.recent.append(is_right)
            pair = (self._class(label), self._class(guess))
            self.confusion[pair] = self.confusion.get(pair, 0) + 1
            if sure >= 0:
                bin_ = min(max(math.ceil(sure * BINS) - 1, 0), BINS - 1)
                self.confident_rows[bin_] += 1
                self.confident_correct[bin_] += is_right
                self.confidence[bin_] += sure

    def _class(self, index: int) -> int:
        if index in self.known:
            return index
        if len(self.known) < MOST_CLASSES:
            self.known.add(index)
            return index
        return OTHER

    def snapshot(self) -> Classification:
        counts = zip(self.confident_rows.tolist(), self.confidence.tolist(), self.confident_correct.tolist(), strict=True)
        bins = tuple(
            [
                CalibrationBin(i / BINS, (i + 1) / BINS, rows, confidence / rows, correct / rows)
                for i, (rows, confidence, correct) in enumerate(counts)
                if rows
            ]
        )
        total = sum([each.rows for each in bins])
        error = sum([each.rows * abs(each.accuracy - each.confidence) for each in bins]) / total if total else -1.0
        return Classification(self.rows, self.correct, len(self.recent), sum(self.recent), error, bins, dict(self.confusion))


@dataclass(slots=True)
class RegressionCounter:
    """Owns the sums of one version's labelled rows."""

    rows: int = 0
    error: float = 0.0
    absolute: float = 0.0
    squared: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def add(self, predicted: Sequence[float], labels: Sequence[float]) -> None:
        for guess, label in zip(predicted, labels, strict=True):
            error = guess - label
            self.rows += 1
            self.error += error
            self.absolute += abs(error)
            self.squared += error * error
            self.recent.append(abs(error))

    def snapshot(self) -> Regression:
        return Regression(self.rows, self.error, self.absolute, self.squared, len(self.recent), math.fsum(self.recent))
