"""What is made of measured numbers: medians with their range, percentiles, slopes, the order of contestants, tables. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Spread:
    """A handful of repeated measurements of one thing. The range, not a deviation: three rounds have no distribution."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError when there is nothing to summarise."""
        if not values:
            raise ValueError("a spread needs at least one value, got none")
        return cls(float(np.median(values)), float(min(values)), float(max(values)))

    def text(self, scale: float = 1.0) -> str:
        """`median (low-high)` with three significant digits, e.g. `26 800 (26 100-27 000)`; what never varied is alone."""
        if self.low == self.high:
            return _digits(self.median * scale)
        return f"{_digits(self.median * scale)} ({_digits(self.low * scale)}-{_digits(self.high * scale)})"


def _digits(value: float) -> str:
    rounded = float(f"{value:.3g}")
    if rounded == 0 or not np.isfinite(rounded):
        return f"{rounded:g}"
    places = max(0, 2 - int(np.floor(np.log10(abs(rounded)))))
    return f"{rounded:,.{places}f}".replace(",", " ")


def percentile(values: ArrayLike, percent: float) -> float:
    """The smallest measured value that `percent` % of all do not exceed: one that happened, never one in between."""
    return float(np.percentile(np.asarray(values, np.float64), percent, method="inverted_cdf"))


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Least-squares change of `values` per unit of `times`; 0 where it is not determined."""
    if len(times) < 2 or times[0] == times[-1]:
        return 0.0
    return float(np.polyfit(np.asarray(times) - times[0], np.asarray(values), 1)[0])


def abba_order(contestants: Sequence[T], rounds: int) -> list[list[T]]:
    """The contestants of each round, every second round reversed, so that a steady drift of the machine hits all alike."""
    forward = list(contestants)
    return [forward if number % 2 == 0 else forward[::-1] for number in range(rounds)]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded, so that it reads in a terminal as well."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines)
