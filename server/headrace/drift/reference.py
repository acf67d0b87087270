"""What a version's data looked like when it was made: the distribution of each watched feature. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.drift.features import Feature, Kind


@dataclass(frozen=True, slots=True)
class FeatureReference:
    """One feature's distribution.

    Numeric: `edges` are ascending and finite; k of them make k + 1 bins (-inf, e0], (e0, e1], ..., (ek-1, inf): the upper bound belongs
    to the bin, as with Prometheus's `le`. Edges of a column are numbers of its tensor's own type, so that comparing in that type
    and in float64 gives the same. Categorical: each of `categories` is a bin, and one more is for all others.

    `counts`: rows a bin, one longer than `edges` or `categories`. `missing` rows had NaN (an empty string), `infinite` rows an
    infinity; neither is in a bin. `minimum` to `deviation` are of the finite values, and 0 for categories.
    """

    feature: Feature
    edges: tuple[float, ...]
    categories: tuple[str, ...]
    counts: tuple[int, ...]
    missing: int = 0
    infinite: int = 0
    minimum: float = 0.0
    maximum: float = 0.0
    mean: float = 0.0
    deviation: float = 0.0

    @property
    def is_numeric(self) -> bool:
        return self.feature.kind is Kind.NUMERIC

    @property
    def counted(self) -> int:
        """Rows that are in a bin."""
        return sum(self.counts)

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each bin, as its series have it: the upper edge, written as Prometheus writes `le`, or the category."""
        if self.is_numeric:
            return (*[str(float(edge)) for edge in self.edges], "+Inf")
        return (*self.categories, "")


@dataclass(frozen=True, slots=True)
class Calibration:
    """How often answers of a confidence were right: `accuracy[i]` in bin i of `edges`, which divide [0, 1] as a feature's do.

    Monotone; from `rows` labelled rows.
    """

    tensor: str
    edges: tuple[float, ...]
    accuracy: tuple[float, ...]
    rows: int


@dataclass(frozen=True, slots=True)
class Reference:
    """All features of one version. `source`: profile (from a file), learnt (the first requests), or `version N` (its live rows).

    `left_out`: what is not watched although it could be, a sentence each. `data_digest`: sha256 of the data that was profiled.
    `accuracy`: of the profiled data where it had labels, else -1. `created`: seconds since 1970.
    """

    model: str
    source: str
    rows: int
    features: tuple[FeatureReference, ...]
    left_out: tuple[str, ...] = ()
    data_digest: str = ""
    created: float = 0.0
    calibration: Calibration | None = None
    accuracy: float = -1.0
    digest: str = ""
    """Of the encoded reference: equal where bins and counts are. "" until it is compared with (see reference_file.identified)."""
