"""Numbers as JSON can hold them. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable


def rounded(value: float) -> float | None:
    """To five significant digits, which is more than anybody reads; None for what JSON has no number for."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def all_rounded(values: Iterable[float]) -> list[float | None]:
    return [rounded(value) for value in values]
