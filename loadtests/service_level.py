"""What the times and statuses of an open-loop run say: latencies, goodput, and whether a percentile is shown to hold. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from loadtests.arrivals import Times
from loadtests.statistics import percentile

Statuses = NDArray[np.int16]

LAG_SHARE = 0.1
"""Of the SLO, that a request may be sent too late at the 99th percentile. Beyond it the run measures its client."""
LAG_WITHOUT_SLO = 1e-3
EDGES = np.logspace(-5, 2, 7 * 20 + 1)
"""Of the histograms: 10 µs to 100 s, twenty a decade (12 % apart). What is outside is counted in the first or last."""


class Status(IntEnum):
    """gRPC's codes that matter here, and how else a call can end. Other codes of gRPC occur too, as plain numbers."""

    OK = 0
    CANCELLED = 1
    DEADLINE_EXCEEDED = 4
    RESOURCE_EXHAUSTED = 8
    UNAVAILABLE = 14
    UNANSWERED = -1
    """Nothing came within the patience of the run."""
    RESET = 100
    """RST_STREAM."""
    LOST = 101
    """The connection went away, or the server said that it would not answer (GOAWAY)."""
    NOT_GRPC = 102
    """Another HTTP status than 200, no grpc-status, or a body that is not one message."""
    WRONG = 103
    """OK, and the answer is not the right one."""
    EXPIRED = 104
    """The client gave up at the deadline, as clients do."""


def status_name(status: int) -> str:
    try:
        return Status(status).name
    except ValueError:
        return f"grpc-status {status}"


@dataclass(frozen=True, slots=True)
class Results:
    """One run, a place for each arrival. Times on one monotonic clock; `done` is NaN where nothing came.

    `sent` is when the client took the request up. What it waits from then on, for the server's windows or number of streams, is
    the server's doing. `timeouts`: seconds from the intended time, inf without a deadline.
    """

    intended: Times
    sent: Times
    done: Times
    statuses: Statuses
    timeouts: Times
    seconds: float
    """Of the schedule, whenever its last answer came."""
    texts: Counter[str] = field(default_factory=Counter)
    """What servers said with statuses other than OK, with how often; not more than a hundred."""

    def __len__(self) -> int:
        return len(self.intended)

    def select(self, chosen: NDArray[np.bool_]) -> Results:
        """Those of one class."""
        times = (self.intended[chosen], self.sent[chosen], self.done[chosen])
        return Results(*times, self.statuses[chosen], self.timeouts[chosen], self.seconds)

    @property
    def latencies(self) -> Times:
        """Of right answers, also late ones, from the time at which each request was intended to be sent."""
        answered = self.statuses == Status.OK
        return np.asarray((self.done - self.intended)[answered])

    @property
    def lags(self) -> Times:
        return np.asarray(self.sent - self.intended)


@dataclass(frozen=True, slots=True)
class Counts:
    """Every request is exactly one of these.

    `late`: answered right after the SLO, or not by its deadline, from when on a client hears of nothing else. `refused`: told that it
    will not be served while there was time: RESOURCE_EXHAUSTED, UNAVAILABLE, DEADLINE_EXCEEDED, or CANCELLED, by which servers on gRPC's
    C core shed what they have not taken up (grpc.server.max_pending_requests). `failed`: whatever else.
    """

    ok: int
    late: int
    refused: int
    failed: int
    wrong: int

    @property
    def total(self) -> int:
        return self.ok + self.late + self.refused + self.failed + self.wrong


def count(results: Results, slo: float | None) -> Counts:
    statuses = results.statuses
    right = statuses == Status.OK
    with np.errstate(invalid="ignore"):
        in_time = right & (results.done - results.intended <= (math.inf if slo is None else slo))
        had_time = results.done < results.intended + results.timeouts
    refusing = (Status.RESOURCE_EXHAUSTED, Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED, Status.CANCELLED)
    refused = np.isin(statuses, refusing) & had_time
    is_grpc = (statuses > Status.OK) & (statuses < Status.RESET)
    late = (right & ~in_time) | (is_grpc & ~had_time) | (statuses == Status.EXPIRED)
    wrong = statuses == Status.WRONG
    ok, late_count, refused_count, wrong_count = (int(chosen.sum()) for chosen in (in_time, late, refused, wrong))
    return Counts(ok, late_count, refused_count, len(results) - ok - late_count - refused_count - wrong_count, wrong_count)


def goodput(results: Results, slo: float | None) -> float:
    """Right answers within the SLO a second of the schedule; without one, a second until the last answer."""
    seconds = results.seconds
    if slo is None and len(results) and not np.isnan(results.done).all():
        seconds = max(seconds, float(np.nanmax(results.done) - results.intended[0]))
    return count(results, slo).ok / seconds


def lag_limit(slo: float | None) -> float:
    return LAG_WITHOUT_SLO if slo is None else LAG_SHARE * slo


def is_valid(results: Results, slo: float | None) -> bool:
    """Whether the client kept to its schedule. Otherwise latencies are its own, and nothing is said about the server."""
    return len(results) > 0 and percentile(results.lags, 99) <= lag_limit(slo)


def binomial_tail(most: int, total: int, chance: float) -> float:
    """The probability of at most `most` hits in `total` draws."""
    if most >= total:
        return 1.0
    log_hit, log_miss = math.log(chance), math.log1p(-chance)
    logs = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) + k * log_hit + (total - k) * log_miss
        for k in range(most + 1)
    ]
    top = max(logs)
    return math.exp(top) * math.fsum(math.exp(log - top) for log in logs)


def is_shown(total: int, misses: int, share: float = 0.99, confidence: float = 0.99) -> bool:
    """Whether so few misses among so many requests show that `share` of all requests are within the bound (MLPerf's early stopping).

    If fewer were, a run as good as this one would be seen with a probability of 1 - confidence at most.
    """
    if misses >= total * (1 - share):
        return False  # no fewer than are to be expected: the sum below would take long to say so
    return binomial_tail(misses, total, 1 - share) <= 1 - confidence


def least_requests(misses: int, share: float = 0.99, confidence: float = 0.99) -> int:
    """How many requests it takes to show that, when so many of them miss the bound."""
    low, high = misses, 2 * misses + 1
    while not is_shown(high, misses, share, confidence):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_shown(middle, misses, share, confidence) else (middle, high)
    return high


def most_misses(total: int, share: float = 0.99, confidence: float = 0.99) -> int:
    """With how many misses so many requests still show it; -1 where there are too few of them in any case."""
    low, high = -1, total
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_shown(total, middle, share, confidence) else (low, middle)
    return low


def statement(total: int, misses: int, slo: float) -> str:
    """One sentence on p99, for people."""
    bound = f"p99 <= {slo * 1e3:.3g} ms"
    if is_shown(total, misses):
        return f"{bound} holds with 99 % confidence ({misses} of {total} missed)"
    return f"{bound} is not shown: {misses} of {total} missed, which takes {least_requests(misses)} requests"


@dataclass(frozen=True, slots=True)
class Histogram:
    edges_s: Sequence[float]
    counts: Sequence[int]

    @classmethod
    def of(cls, latencies: Times) -> Histogram:
        """Of EDGES only the part from the first to the last count."""
        counts, _ = np.histogram(np.clip(latencies, EDGES[0], EDGES[-1]), EDGES)
        found = np.flatnonzero(counts)
        first, last = (int(found[0]), int(found[-1])) if len(found) else (0, 0)
        return cls([float(edge) for edge in EDGES[first : last + 2]], [int(number) for number in counts[first : last + 1]])


def percentiles(latencies: Times, percents: Sequence[float]) -> list[float]:
    """NaN where nothing was answered."""
    return [percentile(latencies, percent) if len(latencies) else math.nan for percent in percents]
