"""A reference out of data: values are gathered, and ranges cut so that each has about as many of them. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.drift.calibration import fit
from headrace.drift.counting import QUALITY, Counts, Layout
from headrace.drift.extraction import as_text, categories, numbers
from headrace.drift.features import Extract, Feature, Kind, Side
from headrace.drift.plan import Plan, settle
from headrace.drift.reference import FeatureReference, Reference

Array = NDArray[Any]

MOST_ROWS = 100_000
"""Of more a uniform sample is kept: what is left of its noise, a thousandth or so of PSI, is below every threshold that is of use."""
MOST_CATEGORIES = 50
FEW_DIFFERENT = 32
"""Integers of which there are no more different ones are categories, not numbers."""
_SEED = 20220301
_JUDGED = np.dtype([("confidence", np.float64), ("is_right", np.bool_)])
_ANSWER = (Extract.CLASS, Extract.CONFIDENCE)


class ReferenceBuilder:
    """Owns what was gathered: at most MOST_ROWS rows of each feature. Not for several threads."""

    def __init__(self, model: str, plan: Plan, bins: int) -> None:
        self._model = model
        self._plan = plan
        self._bins = bins
        self._columns: dict[Feature, _Column] = {}
        self._random = np.random.default_rng(_SEED)
        self._judged = _Column(_JUDGED, self._random.spawn(1)[0])
        self._right = self._labelled = 0
        self.rows = 0

    def __repr__(self) -> str:
        return f"ReferenceBuilder({self._model}, {self.rows} rows, {len(self._columns)} features)"

    def add(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], rows: int, truth: Array | None = None) -> None:
        """Rows of a batch, as BatchCounter takes them. `truth`: the number of each row's true class."""
        if self._plan.undecided:
            self._plan = settle(self._plan, outputs)
        groups: dict[tuple[Side, str], list[Feature]] = {}
        for feature in self._plan.features:
            groups.setdefault((feature.side, feature.tensor), []).append(feature)
        for (side, tensor), features in groups.items():
            array = (inputs if side is Side.INPUT else outputs).get(tensor)
            if array is None or not len(array):
                continue
            numeric = [feature for feature in features if feature.kind is Kind.NUMERIC]
            if numeric:
                values = numbers(array, numeric)
                for position, feature in enumerate(numeric):
                    self._column(feature, array).add(values[:, position])
            for feature in features:
                if feature.kind is Kind.CATEGORICAL:
                    self._column(feature, array).add(categories(array, feature))
        if truth is not None:
            self._judge(outputs, truth)
        self.rows += rows

    def _judge(self, outputs: Mapping[str, Array], truth: Array) -> None:
        scored = self.scored
        if scored is None or scored[1].tensor not in outputs:
            return
        array = outputs[scored[1].tensor]
        judged = np.empty(len(truth), _JUDGED)
        judged["confidence"] = numbers(array, [scored[1]])[:, 0]
        judged["is_right"] = categories(array, scored[0]) == truth
        self._judged.add(judged)
        self._right += int(judged["is_right"].sum())
        self._labelled += len(truth)

    @property
    def scored(self) -> tuple[Feature, Feature] | None:
        """Class and confidence of the output with the scores of classes, the first one where there are several."""
        by_extract = {extract: [each for each in self._plan.features if each.extract is extract] for extract in _ANSWER}
        first = next(iter(by_extract[Extract.CLASS]), None)
        confidence = next((each for each in by_extract[Extract.CONFIDENCE] if first is not None and each.tensor == first.tensor), None)
        return (first, confidence) if first is not None and confidence is not None else None

    def _column(self, feature: Feature, array: Array) -> _Column:
        column = self._columns.get(feature)
        if column is None:
            is_own = feature.extract is Extract.COLUMN
            column = self._columns[feature] = _Column(array.dtype if is_own else np.dtype(np.float64), self._random.spawn(1)[0])
        return column

    def build(self, source: str, *, data_digest: str = "", created: float = 0.0) -> Reference:
        """Raises ValueError when nothing was added."""
        if not self.rows:
            raise ValueError("a reference needs rows, got none")
        features = [_describe(feature, self._columns[feature], self._bins) for feature in self._plan.features if feature in self._columns]
        silent = [f"{each.side.value} '{each.tensor}': no data" for each in self._plan.features if each not in self._columns]
        calibration, accuracy = None, -1.0
        if self._labelled and self.scored is not None:
            judged = self._judged.values()
            accuracy = self._right / self._labelled
            calibration = fit(self.scored[0].tensor, judged["confidence"], judged["is_right"])
        return Reference(
            self._model,
            source,
            min(self.rows, MOST_ROWS),
            tuple(features),
            (*self._plan.left_out, *dict.fromkeys(silent)),
            data_digest,
            created,
            calibration,
            accuracy,
        )


class _Column:
    """The values of one feature: all of them, or a uniform sample (Vitter's algorithm R, a batch at a time)."""

    def __init__(self, dtype: np.dtype[Any], random: np.random.Generator) -> None:
        self.dtype = dtype
        self._random = random
        self._parts: list[Array] = []
        self._kept = self._seen = 0

    def add(self, values: Array) -> None:
        room = MOST_ROWS - self._kept
        first = values[:room]
        if len(first):
            self._parts.append(first.copy())
            self._kept += len(first)
        rest = values[len(first) :]
        if len(rest):
            self._parts = [self.values()]
            places = self._random.integers(0, self._seen + len(first) + 1 + np.arange(len(rest)))
            keep = places < MOST_ROWS
            self._parts[0][places[keep]] = rest[keep]
        self._seen += len(values)

    def values(self) -> Array:
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts)]
        return self._parts[0]


def _describe(feature: Feature, column: _Column, bins: int) -> FeatureReference:
    values = column.values()
    if feature.kind is Kind.CATEGORICAL:
        return _describe_categories(feature, [as_text(value) for value in values.tolist()])
    is_integer = column.dtype.kind in "iu" and feature.extract is Extract.COLUMN
    # Beyond 2**53 they have no names: float64 does not tell them apart.
    if is_integer and np.abs(values).max(initial=0) < 2**53 and len(np.unique(values)) <= FEW_DIFFERENT:
        return _describe_categories(replace(feature, kind=Kind.CATEGORICAL), [str(int(value)) for value in values])
    finite = values[np.isfinite(values)]
    missing = int(np.isnan(values).sum())
    edges = cut(finite, bins, column.dtype)
    place = np.searchsorted(edges, finite, side="left")
    counts = np.bincount(place, minlength=len(edges) + 1)
    some = finite if len(finite) else np.zeros(1)
    return FeatureReference(
        feature,
        tuple(edges.tolist()),
        (),
        tuple(counts.tolist()),
        missing,
        len(values) - len(finite) - missing,
        float(some.min()),
        float(some.max()),
        float(some.mean()),
        float(some.std()),
    )


def cut(values: Array, bins: int, dtype: np.dtype[Any]) -> NDArray[np.float64]:
    """Edges between `bins` ranges with about as many of the values each. Each edge is one of the values.

    A value that alone makes up a range, such as a confidence of 1, has one to itself: with its neighbours it would hide how many of
    them there are. So a few ranges more than `bins` can come out, and fewer where values repeat. Of a constant: what lies below it,
    itself, and what lies above, in the tensor's type.
    """
    if not len(values):
        return np.zeros(0)
    found, rows = np.unique(values, return_counts=True)
    if len(found) == 1:
        low = float(found[0])
        below = low - 1 if dtype.kind in "iu" else float(np.nextafter(dtype.type(low), dtype.type(-np.inf)))
        return np.array([below, low])
    heavy = np.flatnonzero(rows * bins >= len(values))
    around = np.concatenate([heavy, heavy[heavy > 0] - 1])
    # Between the heavy values the others are divided as far as there are ranges left.
    light = np.delete(np.arange(len(found)), heavy)
    left = max(bins - len(heavy), 1)
    share = np.cumsum(rows[light]) / max(rows[light].sum(), 1)
    cuts = [light[np.searchsorted(share, part)] for part in np.linspace(0, 1, left + 1)[1:-1]] if len(light) else []
    edges: NDArray[np.float64] = found[np.unique(np.concatenate([around, np.array(cuts, np.int64)]))]
    return np.asarray(edges[edges < found[-1]])


def _describe_categories(feature: Feature, texts: Sequence[str]) -> FeatureReference:
    found = Counter(texts)
    missing = found.pop("", 0) + found.pop("nan", 0)
    common = sorted([text for text, _ in found.most_common(MOST_CATEGORIES)], key=_in_order)
    counts = [found[text] for text in common]
    return FeatureReference(feature, (), tuple(common), (*counts, found.total() - sum(counts)), missing)


def _in_order(text: str) -> tuple[int, float, str]:
    """Numbers by size, before words by letters."""
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text


def from_counts(reference: Reference, counts: Counts, source: str) -> Reference:
    """A reference of what was counted into another one's bins; its ranges and scale stay those. Features that were never counted go."""
    layout, features = Layout(reference), []
    for index, each in enumerate(reference.features):
        bins, quality = layout.bins(counts, index), layout.quality(counts, index)
        total = int(bins.sum())
        if not total:
            continue
        mean, deviation = each.mean, each.deviation
        if each.is_numeric:
            mean = float(counts.sums[index] / total)
            variance = counts.squares[index] / total - mean * mean
            # Of numbers far from 0 the difference is noise; the scale that the edges were cut for is the better one then.
            deviation = float(np.sqrt(variance)) if variance > 1e-9 * mean * mean else each.deviation
        missing, infinite = (int(quality[QUALITY.index(kind)]) for kind in ("missing", "infinite"))
        numbered = tuple(bins.tolist())
        features.append(
            replace(each, counts=numbered, missing=missing, infinite=infinite, mean=mean, deviation=deviation)
        )  # fmt: skip
    return replace(
        reference, source=source, rows=counts.rows, features=tuple(features), data_digest="", digest="", calibration=None, accuracy=-1.0
    )
