"""Whether a version on trial may stay: what was counted of it, beside what was counted of the one it replaces. Pure.

The judge is asked again and again while the counts grow, so it has two standards:

- Before the probation is over it rolls back only on what can hardly be chance: five failures at least, and a difference that
  is beyond the allowance by more than `CLEAR` standard errors (Newcombe's interval of two Wilson scores; Welch's for times, as
  they are and by their logarithms).
- At its end a rate must be beyond the allowance as counted, and worse than the old version's by more than `LIKELY` standard
  errors. So with `max_nonfinite_rate` 0 two answers with NaN in 1,000 are enough where the old version gave none in 9,000, one
  is not, and versions that both give some are not told apart by luck.

How often it is wrong is measured in tests/unit/lifecycle/test_rollout.py.
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from headrace.config import RolloutConfig
from headrace.telemetry.counters import BatchSizeCounts, CounterSnapshot, FailureReason

CLEAR = 3.5
"""Standard errors. One look is wrong once in 4,000 times where the true rate is exactly the allowed one; looks at growing counts
depend on each other, and hundreds of them are wrong about ten times as often."""
LIKELY = 2.8
"""Once in 400; for the one look at the end. At 2.33 versions that both fail now and then were told apart in 2.7 % of the trials."""
FEWEST_FAILURES = 5
FEWEST_AT_THE_END = 2
"""One request can meet a fault that is no version's."""
LEAST_BASELINE = 300
"""Requests. An old version of which less was counted is known no worse than that: it was good enough to serve, and a trial beside
one that nobody has asked must still be able to fail."""
FEWEST_BATCHES = 20
PRIOR_VARIANCE = 0.25
PRIOR_WEIGHT = 5
"""Batch times are taken to vary by half until measured otherwise: a handful can agree by luck."""

_AT_FAULT = (FailureReason.BACKEND, FailureReason.OTHER)
"""OTHER holds what the model raised unforeseen, and also requests that do not fit its signature. Those count: a version that
refuses what its predecessor took is what a trial is for, and callers who are wrong are wrong with both versions alike.
Rejected (queue full, too late) and cancelled say how much was asked, not how it was answered."""


class SizeTimes(NamedTuple):
    """Batches of one size: how many, and sums over their cost in seconds, the squares of these, their logarithms, and the
    squares of these."""

    batches: int
    seconds: float
    squares: float
    logs: float
    log_squares: float

    @property
    def mean(self) -> float:
        return self.seconds / self.batches

    @property
    def typical(self) -> float:
        """The geometric mean, in seconds."""
        return math.exp(self.logs / self.batches)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was counted of one version over a window. `sizes`: by rows of a batch. `compared` and `disagreeing`: a shadow's."""

    answered: int = 0
    failed: int = 0
    nonfinite: int = 0
    sizes: Mapping[int, SizeTimes] = field(default_factory=dict)
    compared: int = 0
    disagreeing: int = 0

    @property
    def requests(self) -> int:
        return self.answered + self.failed


def evidence(now: CounterSnapshot, before: CounterSnapshot | None = None, *, compared: int = 0, disagreeing: int = 0) -> Evidence:
    """What the same counters counted after `before`; all of it when that is None."""
    failed = sum([now.failures[reason] for reason in _AT_FAULT])
    sizes = {rows: _size_times(counts) for rows, counts in now.batch_sizes.items() if counts.costs}
    if before is None:
        return Evidence(now.success, failed, now.nonfinite, sizes, compared, disagreeing)
    for rows, counts in before.batch_sizes.items():
        times, earlier = sizes.pop(rows, None), _size_times(counts)
        if times is not None and times.batches > earlier.batches:
            sizes[rows] = SizeTimes(times.batches - earlier.batches, *[a - b for a, b in zip(times[1:], earlier[1:], strict=True)])
    failed -= sum([before.failures[reason] for reason in _AT_FAULT])
    return Evidence(now.success - before.success, failed, now.nonfinite - before.nonfinite, sizes, compared, disagreeing)


def _size_times(counts: BatchSizeCounts) -> SizeTimes:
    return SizeTimes(counts.costs, counts.cost, counts.cost_squares, counts.cost_logs, counts.cost_log_squares)


# -- the judgement ---------------------------------------------------------------------------------------------------------


class Decision(enum.Enum):
    CONTINUE = "continue"
    PASSED = "passed"
    ROLLBACK = "rollback"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reason` is for people, with the numbers it rests on."""

    decision: Decision
    reason: str


def is_at_the_end(config: RolloutConfig, candidate: Evidence, elapsed: float) -> bool:
    return elapsed >= config.probation and _seen(config, candidate) >= config.min_requests


def _seen(config: RolloutConfig, candidate: Evidence) -> int:
    return candidate.compared if config.mode == "shadow" else candidate.answered


def judge(
    config: RolloutConfig, candidate: Evidence, baseline: Evidence, elapsed: float, more: Sequence[str] = (), unknown: Sequence[str] = ()
) -> Verdict:
    """`elapsed`: seconds since the trial began. `more`: faults found elsewhere (answers.py), and `unknown` what could not be judged there.
    Ask as often as the counts change; the last answer is the one that holds."""
    seen, is_over = _seen(config, candidate), is_at_the_end(config, candidate, elapsed)
    faults = [
        _judge_rate("error rate", candidate.failed, candidate.requests, baseline.failed, baseline.requests, config.max_error_rate, is_over),
        _judge_rate(
            "NaN or infinity in", candidate.nonfinite, candidate.answered, baseline.nonfinite, baseline.answered,
            config.max_nonfinite_rate, is_over,
        ),
        _judge_disagreement(config, candidate, is_over),
        _judge_latency(config.max_latency_ratio, candidate.sizes, baseline.sizes, is_over),
    ]  # fmt: skip
    reasons = [fault for fault in (*faults, *more) if fault]
    if reasons:
        return Verdict(Decision.ROLLBACK, "; ".join(reasons))
    what = "requests compared" if config.mode == "shadow" else "requests answered"
    if is_over:
        return Verdict(Decision.PASSED, "; ".join([f"nothing wrong in {elapsed:.0f} s and {seen:,} {what}", *unknown]))
    return Verdict(
        Decision.CONTINUE, f"watched for {elapsed:.0f} of {config.probation:.0f} s, {seen:,} of at least {config.min_requests:,} {what}"
    )


def _judge_rate(what: str, count: int, total: int, old_count: int, old_total: int, allowed: float, is_over: bool) -> str:
    """Why the rate count / total is too high, or empty."""
    if not total or count < (FEWEST_AT_THE_END if is_over else FEWEST_FAILURES):
        return ""
    old_rate = old_count / old_total if old_total else 0.0
    more = count / total - old_rate
    is_clear = count >= FEWEST_FAILURES and _least_difference(count, total, old_rate, old_total, CLEAR) > allowed
    is_likely = is_over and more > allowed and _least_difference(count, total, old_rate, old_total, LIKELY) > 0
    if not is_clear and not is_likely:
        return ""
    return (
        f"{what} {_percent(count / total)} of {total:,} requests, the old version {_percent(old_rate)} of {old_total:,}; "
        f"allowed {_percent(allowed)} more"
    )


def _judge_disagreement(config: RolloutConfig, candidate: Evidence, is_over: bool) -> str:
    count, total, allowed = candidate.disagreeing, candidate.compared, config.max_disagreement
    if not allowed or not total:
        return ""
    is_clear = count >= FEWEST_FAILURES and wilson(count / total, total, CLEAR)[0] > allowed
    if not is_clear and not (is_over and count / total > allowed):
        return ""
    return f"{_percent(count / total)} of {total:,} compared answers differ from the old version's; allowed {_percent(allowed)}"


def wilson(rate: float, total: int, z: float) -> tuple[float, float]:
    """The interval that the true rate is in, when `rate` was counted of `total`; good also near 0 and for few."""
    shift = z * z / total
    middle = (rate + shift / 2) / (1 + shift)
    # max: for a rate of 0 or 1 the difference is 0 but for rounding.
    half = z * math.sqrt(max(rate * (1 - rate), 0.0) / total + shift / (4 * total)) / (1 + shift)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _least_difference(count: int, total: int, old_rate: float, old_total: int, z: float) -> float:
    """By how much the new rate is above the old one at least (Newcombe 1998, method 10)."""
    rate = count / total
    lowest = wilson(rate, total, z)[0]
    old_highest = wilson(old_rate, max(old_total, LEAST_BASELINE), z)[1]
    return rate - old_rate - math.hypot(rate - lowest, old_highest - old_rate)


def _judge_latency(allowed: float, new: Mapping[int, SizeTimes], old: Mapping[int, SizeTimes], is_over: bool) -> str:
    matched = match_sizes(new, old) if allowed else None
    if matched is None:
        return ""
    # A few stray batches make an average that is no Gauss curve's: it has to be clear also at the end.
    for what, times, likely in (
        ("a typical batch takes", matched.typical, LIKELY),
        ("a batch takes on average", matched.average, CLEAR),
    ):
        is_likely = is_over and times.ratio > allowed and times.excess(1.0) > likely
        if is_likely or times.excess(allowed) > CLEAR:
            return (
                f"{what} {times.ratio:.2f} times as long as the old version's, {matched.how} over {matched.batches:,} batches "
                f"and {matched.old_batches:,} of the old version; allowed {allowed:g} times"
            )
    return ""


class AverageTimes(NamedTuple):
    """Seconds that the candidate's batches took and that the old version would have needed for such sizes, with variances."""

    seconds: float
    variance: float
    expected: float
    expected_variance: float

    @property
    def ratio(self) -> float:
        return self.seconds / self.expected

    def excess(self, ratio: float) -> float:
        """Standard errors by which the seconds are beyond `ratio` times the expected ones."""
        return (self.seconds - ratio * self.expected) / math.sqrt(self.variance + ratio * ratio * self.expected_variance)


class TypicalTimes(NamedTuple):
    """The mean logarithm of how many times longer a batch takes, and its variance."""

    logarithm: float
    variance: float

    @property
    def ratio(self) -> float:
        return math.exp(self.logarithm)

    def excess(self, ratio: float) -> float:
        return (self.logarithm - math.log(ratio)) / math.sqrt(self.variance)


class MatchedTimes(NamedTuple):
    """How long the candidate's batches take beside the old version's of equal size; `how` says how sizes were matched.

    Two views, because either alone is blind. A stray batch of twenty times the time says nothing of what is typical, but hides a
    slower version from the average for hundreds of batches; a version that is slow now and then is as fast as ever typically.
    """

    batches: int
    old_batches: int
    average: AverageTimes
    typical: TypicalTimes
    how: str


def match_sizes(new: Mapping[int, SizeTimes], old: Mapping[int, SizeTimes]) -> MatchedTimes | None:
    """Compare batches of equal size only, since a canary's are smaller; None while there are too few.

    Where the sizes that both ran are not enough, all count, and what the old version would need for a size that it never ran is
    between its neighbours' times in proportion to the rows; below its smallest that one's time, above its largest in proportion
    to the rows. Both err in the candidate's favour, for a batch has a part that does not grow with its rows.
    """
    chosen = used = [rows for rows in new if rows in old]
    how = "matched by size"
    if min(_batches_of(new, chosen), _batches_of(old, used)) < FEWEST_BATCHES:
        chosen, used, how = list(new), list(old), "estimated from other sizes"
    batches, old_batches = _batches_of(new, chosen), _batches_of(old, used)
    if min(batches, old_batches) < FEWEST_BATCHES:
        return None
    expected = {rows: _expect(rows, old) for rows in chosen}
    average, typical = _average(new, old, expected), _typical(new, old, expected)
    return MatchedTimes(batches, old_batches, average, typical, how) if average.seconds and average.expected else None


def _batches_of(sizes: Mapping[int, SizeTimes], rows: Sequence[int]) -> int:
    return sum([sizes[each].batches for each in rows])


class _Expected(NamedTuple):
    """Of the old version's batches of one size: mean and typical seconds, and the number of batches they rest on."""

    mean: float
    typical: float
    known: int


def _expect(rows: int, old: Mapping[int, SizeTimes]) -> _Expected:
    if rows in old:
        return _Expected(old[rows].mean, old[rows].typical, old[rows].batches)
    below = max([size for size in old if size < rows], default=0)
    above = min([size for size in old if size > rows], default=0)
    if not below:
        return _expect(above, old)
    low = _expect(below, old)
    if not above:
        return _Expected(low.mean * rows / below, low.typical * rows / below, low.known)
    high, part = _expect(above, old), (rows - below) / (above - below)
    mean, typical = low.mean + (high.mean - low.mean) * part, low.typical + (high.typical - low.typical) * part
    return _Expected(mean, typical, min(low.known, high.known))


def _average(new: Mapping[int, SizeTimes], old: Mapping[int, SizeTimes], expected: Mapping[int, _Expected]) -> AverageTimes:
    # One stray batch that lifts a mean lifts the variance as well, so that it proves nothing by itself.
    spread, old_spread = [
        _pool([(t.batches, t.squares / t.mean**2 - t.batches) for t in sizes.values() if t.seconds > 0]) for sizes in (new, old)
    ]
    seconds = variance = total = total_variance = 0.0
    for rows, (mean, _, known) in expected.items():
        times = new[rows]
        seconds += times.seconds
        variance += times.batches * spread * times.mean**2
        total += times.batches * mean
        total_variance += (times.batches * mean) ** 2 * old_spread / known
    return AverageTimes(seconds, variance, total, total_variance)


def _typical(new: Mapping[int, SizeTimes], old: Mapping[int, SizeTimes], expected: Mapping[int, _Expected]) -> TypicalTimes:
    spread, old_spread = [_pool([(t.batches, t.log_squares - t.logs**2 / t.batches) for t in sizes.values()]) for sizes in (new, old)]
    logarithm = weights = 0.0
    for rows, (_, typical, known) in expected.items():
        # The surer a size is on both sides, the more it weighs; then the variance is 1 / the sum of weights.
        weight = 1 / (spread / new[rows].batches + old_spread / known)
        logarithm += weight * (new[rows].logs / new[rows].batches - math.log(typical))
        weights += weight
    return TypicalTimes(logarithm / weights, 1 / weights)


def _pool(squares: Sequence[tuple[int, float]]) -> float:
    """Variance within sizes, of (batches, sum of squared deviations) for each. What subtraction left below 0 is rounding."""
    total = PRIOR_VARIANCE * PRIOR_WEIGHT + sum([max(deviations, 0.0) for _, deviations in squares])
    return total / (PRIOR_WEIGHT + sum([batches - 1 for batches, _ in squares]))


# -- which requests --------------------------------------------------------------------------------------------------------


def is_chosen(key: str, percent: float) -> bool:
    """Whether the requests with this id go to the candidate: the same answer each time, and raising `percent` only adds keys."""
    # Not crc32: of keys that count up, as sequence ids do, it is as regular as they are.
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) * 100 < percent * 2.0**64


def spread(counter: int, percent: float) -> bool:
    """The same for requests without an id, by how many came before: evenly, at 10 % the tenth, twentieth, thirtieth and so on."""
    parts = round(percent * 10_000)  # of a million: integers do not drift
    return (counter + 1) * parts // 1_000_000 > counter * parts // 1_000_000


# -- for people ------------------------------------------------------------------------------------------------------------


def table(candidate: Evidence, baseline: Evidence) -> tuple[tuple[str, str, str], ...]:
    """Rows of (name, the candidate's, the old version's)."""
    rows = [
        ("requests", f"{candidate.requests:,}", f"{baseline.requests:,}"),
        ("errors", _share(candidate.failed, candidate.requests), _share(baseline.failed, baseline.requests)),
        ("NaN or infinity", _share(candidate.nonfinite, candidate.answered), _share(baseline.nonfinite, baseline.answered)),
        ("batches", _batches(candidate.sizes), _batches(baseline.sizes)),
    ]
    matched = match_sizes(candidate.sizes, baseline.sizes)
    if matched is not None:
        rows.append((f"time of a typical batch, {matched.how}", f"{matched.typical.ratio:.2f}", "1.00"))
        rows.append((f"time of a batch on average, {matched.how}", f"{matched.average.ratio:.2f}", "1.00"))
    if candidate.compared:
        rows.append(("answers that differ", _share(candidate.disagreeing, candidate.compared), ""))
    return tuple(rows)


def _share(count: int, total: int) -> str:
    return f"{count:,} ({_percent(count / total)})" if total else f"{count:,}"


def _batches(sizes: Mapping[int, SizeTimes]) -> str:
    batches = sum([times.batches for times in sizes.values()])
    if not batches:
        return "0"
    rows = sum([size * times.batches for size, times in sizes.items()]) / batches
    seconds = sum([times.seconds for times in sizes.values()]) / batches
    return f"{batches:,} of {rows:.1f} rows, {seconds * 1e3:.3g} ms"


def _percent(rate: float) -> str:
    """Small rates keep a digit that says something: 0.0 % is for none."""
    return f"{rate * 100:.1f} %" if rate >= 0.001 or not rate else f"{rate * 100:.2g} %"
