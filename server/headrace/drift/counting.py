"""Rows counted into a reference's bins: sums that add up over batches, windows and replicas. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.drift.reference import Reference

Array = NDArray[Any]

QUALITY = ("missing", "infinite", "below", "above", "off_scale")
"""What is counted of each feature beside its bins: NaN or an empty string, an infinity, finite values below the reference's minimum
and above its maximum, and those further from its range than ten times that range is wide: a wrong scale or unit. An unseen category is
in the last bin."""


@dataclass(slots=True)
class Counts:
    """Sums over rows, one writer. `bins`: for each feature in turn its bins and then QUALITY, int64. `sums`, `squares`: of each feature's
    finite values, float64. `correct`: the sum of what confidence says is the chance of being right, over `judged` rows;
    `correct_variance` the sum of p(1 - p).
    """

    bins: NDArray[np.int64]
    sums: NDArray[np.float64]
    squares: NDArray[np.float64]
    rows: int = 0
    judged: int = 0
    correct: float = 0.0
    correct_variance: float = 0.0

    @classmethod
    def zero(cls, reference: Reference) -> Counts:
        width = Layout(reference).width
        features = len(reference.features)
        return cls(np.zeros(width, np.int64), np.zeros(features), np.zeros(features))

    def add(self, other: Counts) -> None:
        self.bins += other.bins
        self.sums += other.sums
        self.squares += other.squares
        self.rows += other.rows
        self.judged += other.judged
        self.correct += other.correct
        self.correct_variance += other.correct_variance

    def copy(self) -> Counts:
        return Counts(self.bins.copy(), self.sums.copy(), self.squares.copy(), self.rows, self.judged, self.correct, self.correct_variance)


class Layout:
    """Where each feature's counts are in `Counts.bins`."""

    __slots__ = ("sizes", "starts", "width")

    def __init__(self, reference: Reference) -> None:
        self.sizes = [len(feature.counts) for feature in reference.features]
        self.starts = list(accumulate([size + len(QUALITY) for size in self.sizes], initial=0))
        self.width = self.starts.pop()

    def bins(self, counts: Counts, index: int) -> NDArray[np.int64]:
        """A view of a feature's bins."""
        start = self.starts[index]
        return counts.bins[start : start + self.sizes[index]]

    def quality(self, counts: Counts, index: int) -> NDArray[np.int64]:
        """A view of a feature's QUALITY."""
        start = self.starts[index] + self.sizes[index]
        return counts.bins[start : start + len(QUALITY)]
