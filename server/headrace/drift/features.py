"""What is watched of a model: each feature is one number, or one category, a row. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Side(enum.StrEnum):
    INPUT = "input"
    OUTPUT = "output"


class Kind(enum.StrEnum):
    """How a feature's values are counted: into ranges, or by what they are."""

    NUMERIC = "numeric"
    CATEGORICAL = "categorical"


class Extract(enum.StrEnum):
    """How a feature is got from a row of its tensor. Written into references: the words stay as they are."""

    COLUMN = "column"
    """Element `index` of the row, as it is; of [N] and [N, 1] that is all there is."""
    MEAN = "mean"
    DEVIATION = "deviation"
    MINIMUM = "minimum"
    MAXIMUM = "maximum"
    SHARPNESS = "sharpness"
    """Of channel `index`, or of the whole row where that is -1. Sharpness: the root of the mean square of differences of neighbours."""
    NORM = "norm"
    """Euclidean length of the row."""
    PROJECTION = "projection"
    """Dot product with the `index`-th of a fixed set of random directions."""
    LENGTH = "length"
    """Elements of the row, where that is free; of a string its bytes."""
    CLASS = "class"
    """The index of the largest score."""
    CONFIDENCE = "confidence"
    ENTROPY = "entropy"
    MARGIN = "margin"
    """Of the scores as probabilities: the largest; the entropy in nats; the largest less the second."""


SUMMARY = (Extract.MEAN, Extract.DEVIATION, Extract.MINIMUM, Extract.MAXIMUM)
BY_CHANNEL = frozenset({*SUMMARY, Extract.SHARPNESS})
OF_SCORES = (Extract.CLASS, Extract.CONFIDENCE, Extract.ENTROPY, Extract.MARGIN)


@dataclass(frozen=True, slots=True)
class Feature:
    """`name` is unique within its tensor: a column's own name or its number, or what it is, such as `mean[0]` or `class`.

    `is_logits`: scores become probabilities by softmax first.
    """

    side: Side
    tensor: str
    name: str
    kind: Kind
    extract: Extract
    index: int = -1
    is_logits: bool = False

    @property
    def title(self) -> str:
        """As people read it."""
        return f"{self.tensor}.{self.name}"
