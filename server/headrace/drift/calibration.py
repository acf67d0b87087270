"""From confidence to the chance of being right, and so to accuracy without labels. Pure.

Confidence-based performance estimation (CBPE; NannyML, 2022): where a classifier's confidence is calibrated, its accuracy over any rows
is the mean of their confidences, since each is right with that chance. It follows what a shift of the inputs does to accuracy. It
does not see a change of what is right (concept drift), nor confidence that is wrong on inputs unlike all that it was calibrated with.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.drift.reference import Calibration

Array = NDArray[Any]

BINS = 20
FEWEST = 100
"""Labelled rows below which confidence is taken as it is."""


def fit(tensor: str, confidence: Array, is_right: Array, bins: int = BINS) -> Calibration | None:
    """Isotonic regression by pool-adjacent-violators (Ayer et al. 1955; Zadrozny and Elkan 2002) on bins of equally many rows.

    Each bin is drawn to its mean confidence by one row's weight, so that none says 0 or 1 of what was seen a few times. None when there
    are fewer than FEWEST rows.
    """
    keep = np.isfinite(confidence)
    confidence, is_right = confidence[keep].astype(np.float64), is_right[keep].astype(np.float64)
    if len(confidence) < FEWEST:
        return None
    quantiles = np.quantile(confidence, np.linspace(0, 1, bins + 1)[1:-1], method="inverted_cdf")
    edges = np.unique(quantiles[quantiles < confidence.max()])
    place = np.searchsorted(edges, confidence, side="left")
    rows = np.bincount(place, minlength=len(edges) + 1).astype(np.float64)
    right = np.bincount(place, is_right, minlength=len(edges) + 1)
    sure = np.bincount(place, confidence, minlength=len(edges) + 1)
    accuracy = pool_adjacent_violators((right + sure / np.maximum(rows, 1)) / (rows + 1), rows + 1)
    return Calibration(tensor, tuple(edges.tolist()), tuple(accuracy.tolist()), len(confidence))


def pool_adjacent_violators(values: Array, weights: Array) -> Array:
    """The nearest sequence that never falls, by weighted squares."""
    blocks: list[list[float]] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            high, low = blocks[-2], blocks.pop()
            total = high[1] + low[1]
            blocks[-1] = [(high[0] * high[1] + low[0] * low[1]) / total, total, high[2] + low[2]]
    return np.concatenate([np.full(int(count), value) for value, _, count in blocks])


def apply(calibration: Calibration, confidence: Array) -> Array:
    """The chance of being right, of each."""
    return np.asarray(calibration.accuracy)[np.searchsorted(np.asarray(calibration.edges), confidence, side="left")]
