"""Small references for tests."""

from __future__ import annotations

import numpy as np
from headrace.drift.counting import Counts, Layout
from headrace.drift.features import Extract, Feature, Kind, Side
from headrace.drift.reference import FeatureReference, Reference


def numeric(
    name: str = "0", edges: tuple[float, ...] = (0.0, 1.0, 2.0), counts: tuple[int, ...] = (250, 250, 250, 250)
) -> FeatureReference:
    feature = Feature(Side.INPUT, "x", name, Kind.NUMERIC, Extract.COLUMN, int(name) if name.isdigit() else 0)
    return FeatureReference(feature, edges, (), counts, minimum=-1.0, maximum=3.0, mean=1.0, deviation=1.0)


def reference_of(*features: FeatureReference) -> Reference:
    return Reference("m", "profile", 1000, features or (numeric(),))


def counts_of(reference: Reference, *bins: tuple[int, ...]) -> Counts:
    """One tuple of counts a feature."""
    counts, layout = Counts.zero(reference), Layout(reference)
    for index, numbers in enumerate(bins):
        layout.bins(counts, index)[:] = numbers
    counts.rows = int(np.sum(bins[0]))
    return counts
