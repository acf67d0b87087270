"""Captured answers beside those of another version: how far apart they are, output by output. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.capture.records import Array, Captured, CapturedTensor
from headrace.signature import format_shape

TIE = 1e-6
"""Scores closer than that, as a part of 1 + |score|, are in no order: another order of additions swaps them."""
MOST_PROBLEMS = 10
"""Sentences that are kept; the rest is counted."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """An element is within it when |new - old| <= atol + rtol |old|, as numpy.isclose has it. NaN equals NaN, an infinity itself."""

    rtol: float = 1e-3
    atol: float = 1e-5


@dataclass(frozen=True, slots=True)
class OutputComparison:
    """One output over all requests. Relative differences are |new - old| / max(|old|, |new|), from 0 to 2; -1: nothing to measure, as
    of strings. `flips` of `judged` rows name another class: the largest score of [rows, classes], or the value itself where a row is one
    integer, boolean or string. `outside`: rows with an element beyond the tolerance, or for others than floats one that differs."""

    name: str
    rows: int
    outside: int
    judged: int
    flips: int
    max_absolute: float
    mean_absolute: float
    max_relative: float
    mean_relative: float

    @property
    def flip_rate(self) -> float:
        return self.flips / self.judged if self.judged else 0.0

    @property
    def outside_rate(self) -> float:
        return self.outside / self.rows if self.rows else 0.0


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """`left_out`: requests that cannot be asked again, their inputs are redacted. `failed`: those that were refused or failed; `problems`
    says why, and what could not be compared, the first few. `seconds` of each answer: mean, median, 99th percentile."""

    requests: int
    rows: int
    left_out: int
    failed: int
    uncompared: int
    problems: tuple[str, ...]
    outputs: tuple[OutputComparison, ...]
    seconds: Mapping[str, float]


@dataclass(slots=True)
class _Tally:
    is_numeric: bool = True
    rows: int = 0
    outside: int = 0
    judged: int = 0
    flips: int = 0
    measured: int = 0
    absolute: list[float] = field(default_factory=lambda: [0.0, 0.0])
    relative: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Largest, sum."""


class Comparison:
    """Owns the sums over the requests that were compared so far."""

    def __init__(self, tolerance: Tolerance) -> None:
        self._tolerance = tolerance
        self._tallies: dict[str, _Tally] = {}
        self._problems: list[str] = []
        self._seconds: list[float] = []
        self._requests = self._rows = self._left_out = self._failed = self._uncompared = 0

    def leave_out(self) -> None:
        self._left_out += 1

    def fail(self, reason: str) -> None:
        self._failed += 1
        self._note(reason)

    def add(self, captured: Captured, answer: Mapping[str, CapturedTensor], seconds: float) -> None:
        """What the other version has answered, by name. Redacted outputs cannot be compared, and are passed over."""
        self._requests += 1
        self._rows += captured.rows
        self._seconds.append(seconds)
        for old in captured.outputs:
            if old.data is None:
                continue
            problem = self._compare(captured, old, answer.get(old.name))
            if problem:
                self._uncompared += 1
                self._note(f"output '{old.name}': {problem}")

    def _note(self, problem: str) -> None:
        if len(self._problems) < MOST_PROBLEMS and problem not in self._problems:
            self._problems.append(problem)

    def _compare(self, captured: Captured, old: CapturedTensor, new: CapturedTensor | None) -> str:
        if new is None:
            return "the other version has no such output"
        if old.shape != new.shape:
            return f"expected shape {format_shape(old.shape)}, got {format_shape(new.shape)}"
        a, b = _values(old), _values(new)
        if (a.dtype == object) != (b.dtype == object):
            return f"expected {old.datatype}, got {new.datatype}"
        rows = captured.rows if captured.is_batching else 1
        if a.size % rows:
            return f"expected {rows} rows, got shape {format_shape(old.shape)}"
        tally = self._tallies.setdefault(old.name, _Tally())
        _add(tally, a.reshape(rows, -1), b.reshape(rows, -1), self._tolerance)
        return ""

    def report(self) -> ReplayReport:
        return ReplayReport(
            requests=self._requests,
            rows=self._rows,
            left_out=self._left_out,
            failed=self._failed,
            uncompared=self._uncompared,
            problems=tuple(self._problems),
            outputs=tuple([_settle(name, tally) for name, tally in self._tallies.items()]),
            seconds=_summary(self._seconds),
        )


def _values(tensor: CapturedTensor) -> Array:
    array = tensor.array()
    assert array is not None
    return (array.astype(np.uint32) << 16).view(np.float32) if tensor.datatype == "BF16" else array


def _add(tally: _Tally, old: Array, new: Array, tolerance: Tolerance) -> None:
    rows = len(old)
    tally.rows += rows
    is_float = old.dtype.kind == "f" or new.dtype.kind == "f"
    if old.dtype == object:
        tally.is_numeric = False
        outside = (old != new).any(axis=1)
    else:
        a, b = old.astype(np.float64), new.astype(np.float64)
        same, absolute, relative = _distances(a, b)
        if not is_float:
            same = old == new  # beyond 2**53 different integers become the same float
        _measure(tally, absolute, relative)
        near = np.isfinite(absolute) & (absolute <= tolerance.atol + tolerance.rtol * np.abs(a))
        within = same | near if is_float else same
        outside = ~within.all(axis=1)
    tally.outside += int(np.count_nonzero(outside))
    flips = _flips(old, new) if is_float else (outside if old.shape[1] == 1 else None)
    if flips is not None:
        tally.judged += rows
        tally.flips += int(np.count_nonzero(flips))


def _distances(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """(equal, absolute, relative). Where one is not finite: equal, or as far apart as can be."""
    with np.errstate(invalid="ignore", over="ignore"):
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        finite = np.isfinite(a) & np.isfinite(b)
        absolute = np.where(same, 0.0, np.where(finite, np.abs(a - b), np.inf))
        scale = np.maximum(np.abs(a), np.abs(b))
        relative = np.where(same, 0.0, np.divide(absolute, scale, out=np.full_like(scale, 2.0), where=finite & (scale > 0)))
    return same, absolute, relative


def _measure(tally: _Tally, absolute: Array, relative: Array) -> None:
    if absolute.size:
        tally.measured += absolute.size
        for sums, values in ((tally.absolute, absolute), (tally.relative, relative)):
            sums[0] = max(sums[0], float(values.max()))
            sums[1] += float(values.sum())


def _flips(old: Array, new: Array) -> NDArray[np.bool_] | None:
    """By row whether another class has the largest score; None where rows are no scores. NaN ranks as the lowest."""
    if old.shape[1] < 2:
        return None
    rows = np.arange(len(old))
    scores = np.nan_to_num(old.astype(np.float64), nan=-np.inf)
    chosen = np.nan_to_num(new.astype(np.float64), nan=-np.inf).argmax(axis=1)
    best = scores.max(axis=1)
    with np.errstate(invalid="ignore"):
        behind = best - scores[rows, chosen]
    differs = scores.argmax(axis=1) != chosen
    flipped: NDArray[np.bool_] = differs & ~(behind <= TIE * (1 + np.abs(best)))
    return flipped


def _settle(name: str, tally: _Tally) -> OutputComparison:
    def both(sums: list[float]) -> tuple[float, float]:
        return (sums[0], sums[1] / tally.measured) if tally.is_numeric and tally.measured else (-1.0, -1.0)

    return OutputComparison(name, tally.rows, tally.outside, tally.judged, tally.flips, *both(tally.absolute), *both(tally.relative))


def _summary(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    p50, p99 = np.quantile(seconds, (0.5, 0.99))
    return {"mean": math.fsum(seconds) / len(seconds), "p50": float(p50), "p99": float(p99)}


# -- what a pipeline goes by -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Limits:
    """None: not watched. `max_flips`: of the judged rows of an output; `max_outside`: of its rows."""

    max_flips: float | None = None
    max_outside: float | None = None


def exceeded(report: ReplayReport, limits: Limits) -> list[str]:
    """Why the other version does not pass, a sentence each; none: it does.

    Whatever could not be answered or compared is a reason as well, and so is a replay of nothing.
    """
    reasons = []
    if not any(output.rows for output in report.outputs):
        reasons.append("nothing was compared")
    if report.failed:
        reasons.append(f"{report.failed} requests failed")
    if report.uncompared:
        reasons.append(f"{report.uncompared} outputs could not be compared")
    return reasons + list(_beyond(report.outputs, limits))


def _beyond(outputs: Iterable[OutputComparison], limits: Limits) -> Iterable[str]:
    for output in outputs:
        if limits.max_flips is not None and output.flip_rate > limits.max_flips:
            yield f"output '{output.name}': {output.flip_rate:.3%} of the rows name another class, allowed {limits.max_flips:.3%}"
        if limits.max_outside is not None and output.outside_rate > limits.max_outside:
            yield f"output '{output.name}': {output.outside_rate:.3%} of the rows are out of tolerance, allowed {limits.max_outside:.3%}"


def to_table(report: ReplayReport) -> dict[str, Any]:
    """For machines. What is not finite, where a number became none, is null: JSON knows no infinity."""
    outputs = [
        {name: _finite(getattr(output, name)) for name in (*OutputComparison.__dataclass_fields__, "flip_rate", "outside_rate")}
        for output in report.outputs
    ]
    counts = {name: getattr(report, name) for name in ("requests", "rows", "left_out", "failed", "uncompared")}
    return {**counts, "problems": list(report.problems), "outputs": outputs, "seconds": dict(report.seconds)}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
