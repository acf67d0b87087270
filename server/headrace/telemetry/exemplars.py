"""A traced request for each bucket of the latency histograms, so that a spike on a dashboard leads to a trace."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple


class Exemplar(NamedTuple):
    """`seconds` is what was observed, `when` the wall clock's time of it."""

    trace_id: int
    seconds: float
    when: float

    def __str__(self) -> str:
        """As OpenMetrics writes it behind a bucket."""
        return f'# {{trace_id="{self.trace_id:032x}"}} {self.seconds} {self.when:.3f}'


class Exemplars:
    """One version's: the latest of each bucket, and so of bounded size. Owns nothing else; written by the tracing thread, read by any.

    A slot is replaced whole, which needs no lock.
    """

    def __init__(self, stages: int, edges: Sequence[float]) -> None:
        self._edges = edges
        self._latest: list[list[Exemplar | None]] = [[None] * (len(edges) + 1) for _ in range(stages)]

    def __repr__(self) -> str:
        return f"Exemplars({sum(exemplar is not None for stage in self._latest for exemplar in stage)} buckets)"

    def observe(self, stage: int, exemplar: Exemplar) -> None:
        self._latest[stage][bisect_left(self._edges, exemplar.seconds)] = exemplar

    def of(self, stage: int) -> list[Exemplar | None]:
        """One entry for each of a stage's buckets, None where none was seen."""
        return self._latest[stage]
