"""Rows counted into a reference's bins: sums that add up over batches, windows and replicas. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from headrace_kernels.histogram import count_columns
from numpy.typing import NDArray

from headrace.drift.calibration import apply
from headrace.drift.extraction import as_text, categories, numbers
from headrace.drift.features import Extract, Side
from headrace.drift.reference import FeatureReference, Reference

Array = NDArray[Any]

QUALITY = ("missing", "infinite", "below", "above", "off_scale")
"""What is counted of each feature beside its bins: NaN or an empty string, an infinity, finite values below the reference's minimum
and above its maximum, and those further from its range than OFF_SCALE times that range is wide: a wrong scale or unit. An unseen category
is in the last bin."""
OFF_SCALE = 10.0


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


class BatchCounter:
    """Counts batches into one reference's bins. Immutable once made; any thread."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._layout = layout = Layout(reference)
        self._groups: list[_Numeric] = []
        self._categorical: list[tuple[int, FeatureReference, dict[object, int]]] = []
        by_tensor: dict[tuple[Side, str], list[int]] = {}
        for index, each in enumerate(reference.features):
            if each.is_numeric:
                by_tensor.setdefault((each.feature.side, each.feature.tensor), []).append(index)
            else:
                self._categorical.append((index, each, {text: position for position, text in enumerate(each.categories)}))
        for (side, tensor), indexes in by_tensor.items():
            self._groups.append(_Numeric(side, tensor, indexes, reference, layout))

    def __repr__(self) -> str:
        return f"BatchCounter({len(self._reference.features)} features, {self._layout.width} counts)"

    def count(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], rows: int) -> Counts:
        """`inputs` and `outputs` by name, rows first; one that a batch does not have counts nothing. BF16 as floats."""
        counts = Counts.zero(self._reference)
        counts.rows = rows
        for group in self._groups:
            array = (inputs if group.side is Side.INPUT else outputs).get(group.tensor)
            if array is not None:
                values = group.count(array, counts)
                if group.confidence is not None:
                    self._judge(values[:, group.confidence], counts)
        for index, each, known in self._categorical:
            array = (inputs if each.feature.side is Side.INPUT else outputs).get(each.feature.tensor)
            if array is not None:
                self._count_categories(index, each, known, array, counts)
        return counts

    def _judge(self, confidence: Array, counts: Counts) -> None:
        """What confidence says of accuracy: each answer is right with that chance (CBPE, see calibration.py)."""
        chances = confidence[np.isfinite(confidence)]
        if self._reference.calibration is not None:
            chances = apply(self._reference.calibration, chances)
        counts.judged += len(chances)
        counts.correct += float(chances.sum())
        counts.correct_variance += float((chances * (1 - chances)).sum())

    def _count_categories(self, index: int, each: FeatureReference, known: dict[object, int], array: Array, counts: Counts) -> None:
        values = categories(array, each.feature)
        bins, quality = self._layout.bins(counts, index), self._layout.quality(counts, index)
        if values.dtype.kind == "O":
            different: dict[object, int] = {}
            for value in values:
                different[value] = different.get(value, 0) + 1
            found = list(different.items())
        else:
            unique, numbers_of = np.unique(values, return_counts=True)
            found = list(zip(unique.tolist(), numbers_of.tolist(), strict=True))
        for value, number in found:
            text = as_text(value)
            if text in ("", "nan"):
                quality[0] += number
            else:
                bins[known.get(text, -1)] += number


class _Numeric:
    """The numeric features of one tensor: counted together."""

    def __init__(self, side: Side, tensor: str, indexes: list[int], reference: Reference, layout: Layout) -> None:
        self.side = side
        self.tensor = tensor
        self._indexes = np.array(indexes)
        parts = [reference.features[index] for index in indexes]
        self._features = [each.feature for each in parts]
        extracts = [each.feature.extract for each in parts]
        self.confidence = extracts.index(Extract.CONFIDENCE) if Extract.CONFIDENCE in extracts else None
        longest = max([len(each.edges) for each in parts])
        self._edges = np.full((len(parts), longest), np.inf)
        # Where each count goes; those of padded edges are 0 and go to the end.
        self._places = np.full((len(parts), longest + 1), layout.width)
        for row, (index, each) in enumerate(zip(indexes, parts, strict=True)):
            self._edges[row, : len(each.edges)] = each.edges
            self._places[row, : len(each.counts)] = layout.starts[index] + np.arange(len(each.counts))
        self._quality = np.array([[layout.starts[i] + layout.sizes[i] + kind for kind in range(len(QUALITY))] for i in indexes])
        self._minimum = np.array([each.minimum for each in parts])
        self._maximum = np.array([each.maximum for each in parts])
        width = self._maximum - self._minimum
        # Of a constant only its size says what is far.
        width = np.where(width > 0, width, np.maximum(np.abs(self._maximum), 1.0)) * OFF_SCALE
        self._lowest, self._highest = self._minimum - width, self._maximum + width

    def count(self, array: Array, counts: Counts) -> Array:
        """Add to `counts`; returns the values [rows, features]."""
        values = numbers(array, self._features)
        padded = np.zeros(len(counts.bins) + 1, np.int64)
        padded[self._places] = count_columns(values, self._edges)
        counts.bins += padded[:-1]
        finite = np.isfinite(values)
        quality = np.empty(self._quality.shape, np.int64)
        quality[:, 0] = np.isnan(values).sum(axis=0)
        quality[:, 1] = len(values) - finite.sum(axis=0) - quality[:, 0]
        known = values if finite.all() else np.where(finite, values, self._minimum)
        quality[:, 2] = (known < self._minimum).sum(axis=0)
        quality[:, 3] = (known > self._maximum).sum(axis=0)
        quality[:, 4] = ((known < self._lowest) | (known > self._highest)).sum(axis=0)
        counts.bins[self._quality] += quality
        summed = values if known is values else np.where(finite, values, 0.0)
        counts.sums[self._indexes] += summed.sum(axis=0)
        counts.squares[self._indexes] += np.einsum("ij,ij->j", summed, summed)
        return values
