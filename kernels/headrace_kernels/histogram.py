"""`histogram`: rows counted into ranges, feature by feature. This is the kernel's definition, and its path on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

FEW = 1 << 16
"""Comparisons up to which comparing everything with everything is faster than a search for each feature: it is one call."""


def count_columns(values: Array, edges: Array) -> NDArray[np.int64]:
    """[features, edges + 1] counts of [rows, features] values.

    `edges` [features, edges] ascend, and are padded with +inf; both arrays are of one floating type, in which they are compared. A
    value v is in bin b when exactly b edges are less than v: the upper edge belongs to a bin, as Prometheus's `le` has it, and 0.0
    and -0.0 are equal. NaN and infinities are in no bin.
    """
    rows, features = values.shape
    width = edges.shape[1] + 1
    if not rows or not features:
        return np.zeros((features, width), np.int64)
    if values.size * edges.shape[1] <= FEW:
        bins = (values[:, :, None] > edges[None]).sum(axis=2)
    else:
        bins = np.empty(values.shape, np.int64)
        for feature in range(features):
            bins[:, feature] = np.searchsorted(edges[feature], values[:, feature], side="left")
    bins += np.arange(features) * width
    # One place more, for what is in no bin.
    bins = np.where(np.isfinite(values), bins, features * width)
    return np.bincount(bins.ravel(), minlength=features * width + 1)[:-1].reshape(features, width)
