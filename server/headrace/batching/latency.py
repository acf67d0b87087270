"""What is known of l(b), the seconds that a batch of b rows takes, and what follows from it. Pure.

Theory of operation. The warm-up measures l(b) at a few sizes, the knots. While the model serves, each knot has a correction, the
ratio of what batches of about its size take to what the warm-up said; sizes not seen lately take over their neighbours'. What all
models of a device suffer together is none of them: that is one factor of the device, which moves ten times faster. An estimate is
knot by correction by factor, never falling with the size, linear between knots. Where the thread's CPU time tells how much longer a
batch took than it had the core for, the factor is that and nothing else, and the corrections are what is left: by the clock alone a
busy neighbour made batches of 1, which are many, look worse than those of 16, which were seldom tried.
Rules for changing this file: `observe` is on the path of every batch; what can be made when the corrections have moved is not made
there. An estimate may be wrong, and must then come right by itself: nothing here may keep batches from being tried for ever.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

BATCH_OVERHEAD = 100e-6
"""Seconds that the server itself spends on a batch, whatever its size: waking, gathering, encoding, one hop back."""
GOOD_ENOUGH = 0.97
"""Of the best rate: a smaller batch is answered sooner, and l(b) from a few runs is no more exact than this."""
INLINE_LIMIT = 200e-6
"""Seconds of l(1) below which two changes of thread cost more than the model."""
INLINE_BUDGET = 1e-3
"""Seconds for which whoever brings a request may be held up by running what waits; other calls wait meanwhile."""

SHARED_TAU = 0.5
"""Seconds in which the device's factor follows; a neighbour's burst comes and goes in about that."""
PASSING = 30.0
"""Seconds in which the factor forgets: what lasts is no interference but how long batches take here, and becomes part of the
corrections. Otherwise the two could drift apart for ever, one up and one down."""
OWN_TAU = 5.0
"""Seconds in which a correction follows: ten times slower, so that what all suffer ends up in the factor."""
LONGEST_STEP = 0.3
"""Of a residual is what one batch may move an estimate by, however long ago the last one was."""
FIRST_SEEN = 8
"""Batches of a knot whose mean is its correction: the warm-up ran on made-up inputs, with nobody else on the core."""
WARM_UP_COUNTS = 2
"""For so many batches counts what the warm-up measured, the best of many runs, against slower ones. A faster one disproves it."""
FRESH = 30.0
"""Seconds after which a correction that nothing confirmed is forgotten: one bad measurement must not rule a size out for good."""
TRIAL_EVERY = 0.2
TRIAL_SHARE = 20.0
"""At least so many seconds from one trial to the next, and so many times what it takes: a trial does nearly as much as it displaces."""
CALIBRATED = 3
"""Batches of a knot before its estimate is good enough to tell what the device does."""
OUTLIER = 10.0
"""Times the estimate: beyond it a batch tells of the machine and not of the model. Counted, and taken for this much."""
CHANGED = 3
"""Residuals in a row beyond FAR deviations, over longer than the device's factor needs to explain them, after which the model itself
has changed, and its past counts for little."""
FAR = 4.0
UPPER = 0.95
"""The quantile that `upper` follows."""
LEAST_SPREAD = 0.02
OBSERVE_EVERY = 2e-3
"""Seconds between batches that are looked at. Tiny models run thousands a second, and one look costs two microseconds."""


def worthwhile_batch(seconds: Mapping[int, float], max_batch_size: int) -> int:
    """The batch size up to which waiting requests should run together.

    On a CPU many models do fewer rows a second the larger the batch, because the activations of a small one stay in the cache
    (magika: 154 at 1, 114 at 64). Nothing measured: the largest allowed.
    """
    return _smallest_good({rows: took + BATCH_OVERHEAD for rows, took in seconds.items()}) if seconds else max(max_batch_size, 1)


def _smallest_good(seconds: Mapping[int, float]) -> int:
    rates = {rows: rows / took for rows, took in seconds.items()}
    best = max(rates.values())
    return min(rows for rows, rate in rates.items() if rate >= GOOD_ENOUGH * best)


def inline_rows(seconds: Mapping[int, float], batch_limit: int) -> int:
    """How many waiting rows may run where they arrive, instead of on the instance's own thread; 0: none, not even one.

    l(1) alone does not tell: 64 rows of a model that takes 0.15 ms for one hold the event loop for 10 ms.
    """
    if not 0 < seconds.get(1, 0.0) < INLINE_LIMIT:
        return 0
    fitting = [rows for rows in seconds if rows <= batch_limit]
    full = max(fitting)
    if seconds[full] > INLINE_BUDGET:
        return max(rows for rows in fitting if seconds[rows] <= INLINE_BUDGET)
    return max(int(INLINE_BUDGET / (seconds[full] + BATCH_OVERHEAD)), 1) * full


class Interference:
    """How much longer batches on one device take than their models' tables say: one number, shared by those tables.

    Their batchers move it, each under its own lock. Two at the same moment lose one of two small steps towards the same truth,
    which is cheaper than a lock that all models meet at.
    """

    __slots__ = ("_at", "factor")

    def __init__(self) -> None:
        self.factor = 1.0
        self._at = 0.0

    def __repr__(self) -> str:
        return f"Interference({self.factor:.3f})"

    def observe(self, ratio: float, now: float) -> None:
        """`ratio` of what a batch took to what was expected, this factor included."""
        elapsed = now - self._at
        self._at = now
        if elapsed > 0:
            step = min(elapsed / (elapsed + SHARED_TAU), LONGEST_STEP) * (ratio - 1.0) * self.factor
            back = min(elapsed / PASSING, 1.0) * (1.0 - self.factor)
            self.factor = min(max(self.factor + step + back, 0.25), 16.0)

    def relax(self, now: float) -> None:
        """Forget what was a while ago; nothing runs that would tell."""
        elapsed = now - self._at
        if elapsed > 2.0 * SHARED_TAU:
            self._at = now
            self.factor += min(elapsed / PASSING, 1.0) * (1.0 - self.factor)


class Neighbours(Protocol):
    """What a table asks and tells of those that run beside its model."""

    @property
    def factor(self) -> float: ...
    def observe(self, ratio: float, now: float) -> None: ...
    def relax(self, now: float) -> None: ...


class JointInterference:
    """Of a model that is on several devices: a batch takes the mean of what it takes on each, and what is seen of one that runs on any
    of them goes to all, since a table is not told on which that was."""

    __slots__ = ("_parts",)

    def __init__(self, parts: Sequence[Interference]) -> None:
        self._parts = parts

    def __repr__(self) -> str:
        return f"JointInterference({list(self._parts)!r})"

    @property
    def factor(self) -> float:
        return sum([part.factor for part in self._parts]) / len(self._parts)

    def observe(self, ratio: float, now: float) -> None:
        for part in self._parts:
            part.observe(ratio, now)

    def relax(self, now: float) -> None:
        for part in self._parts:
            part.relax(now)


@dataclass(frozen=True, slots=True)
class LatencyStats:
    """`mean` and `upper` seconds by rows, as they are now; `worthwhile` rows; `outliers` and `observed` batches."""

    mean: dict[int, float]
    upper: dict[int, float]
    worthwhile: int
    factor: float
    outliers: int
    observed: int


class LatencyTable:
    """l(b) of one version, as it is now. Owns the corrections; whoever owns the table calls one method at a time.

    `seconds`: what the warm-up measured of the model alone, may be empty. `is_stepped`: batches are padded to one of those sizes.
    `before`: the table of the version that this one follows, whose corrections hold for it too.
    """

    def __init__(
        self,
        seconds: Mapping[int, float],
        max_rows: int,
        device: Neighbours | None = None,
        *,
        is_stepped: bool = False,
        before: LatencyTable | None = None,
    ) -> None:
        self._max_rows = max(max_rows, 1)
        self._device = Interference() if device is None else device
        self._is_stepped = is_stepped
        self._outliers = self._observed = 0
        self._in_a_row = 0
        self._far_since = 0.0
        self._spread = 0.1
        self._deviation = 0.05
        self.next_trial = 0.0
        """When another size may be tried, if enough wait."""
        self.next_look = 0.0
        """By the clock of `observe`; batches that end before it need not be reported."""
        self._rebuild_at = 0.0
        self._is_measured = bool(seconds)
        self._set_prior(seconds)
        if before is not None:
            self._inherit(before)

    def __repr__(self) -> str:
        return f"LatencyTable({dict(zip(self._knots, self._values, strict=True))}, worthwhile={self.worthwhile}, {self._device!r})"

    def _set_prior(self, seconds: Mapping[int, float]) -> None:
        measured = sorted(seconds)
        self._measured = len(measured)
        """Knots that were; the larger ones wait to be tried."""
        self._knots = measured if self._is_stepped or not measured else [*measured, *_doubled(measured[-1], self._max_rows)]
        self._prior = [_extrapolate(measured, seconds, rows) + BATCH_OVERHEAD for rows in self._knots]
        self._corrections = [1.0] * len(self._knots)
        self._counts = [0] * len(self._knots)
        self._seen = [0.0] * len(self._knots)
        self._rebuild(0.0)

    def _inherit(self, before: LatencyTable) -> None:
        if before._knots == self._knots:
            self._corrections, self._counts, self._seen = before._corrections.copy(), before._counts.copy(), before._seen.copy()
            self._spread, self._deviation = before._spread, before._deviation
            self._rebuild(max(self._seen, default=0.0))

    @property
    def is_known(self) -> bool:
        return bool(self._knots)

    def stats(self) -> LatencyStats:
        return LatencyStats(
            {rows: self.mean(rows) for rows in self._knots},
            {rows: self.upper(rows) for rows in self._knots},
            self.worthwhile,
            self._device.factor,
            self._outliers,
            self._observed,
        )

    # -- estimates -----------------------------------------------------------------------------------------------------

    def mean(self, rows: float) -> float:
        """Seconds that a batch of so many rows is expected to take; 0 where nothing is known."""
        return self._at(rows) * self._device.factor

    def upper(self, rows: float) -> float:
        """Seconds within which UPPER of such batches end."""
        return self._at(rows) * self._device.factor * (1.0 + self._spread)

    def rows_within(self, seconds: float) -> int:
        """The most rows whose `mean` is no longer than that; 0: not even the smallest batch. Everything where nothing is known.

        The mean: a batch made smaller than it had to be costs more than one of its requests that is late now and then.
        """
        values, knots = self._values, self._knots
        if not values:
            return self._max_rows
        alone = seconds / self._device.factor
        index = bisect_right(values, alone)
        if index == 0:
            return 0
        if self._is_stepped or len(knots) == 1:
            return knots[index - 1]
        if index == len(knots):
            slope = self._slope()
            return self._max_rows if slope <= 0 else min(int(knots[-1] + (alone - values[-1]) / slope + 1e-9), self._max_rows)
        low, high = values[index - 1], values[index]
        return int(knots[index - 1] + (knots[index] - knots[index - 1]) * (alone - low) / (high - low) + 1e-9)

    def fill(self, rows: int) -> int:
        """Of so many rows that wait, how many to run: all, padded up, or as many as the next smaller size takes, if that does more
        rows a second."""
        if not self._is_stepped or not self._knots:
            return rows
        index = bisect_right(self._knots, rows)
        if index == 0 or index == len(self._knots) or self._knots[index - 1] == rows:
            return rows
        down = self._knots[index - 1]
        return down if rows * self._values[index - 1] < down * self._values[index] else rows

    def possible(self, rows: int) -> float:
        """Seconds that it took with the device to itself: whatever was seen since, it may become that again."""
        return _interpolate(self._knots, self._prior, rows, self._is_stepped) if self._knots else 0.0

    def _at(self, rows: float) -> float:
        return _interpolate(self._knots, self._values, rows, self._is_stepped) if self._knots else 0.0

    def _slope(self) -> float:
        return (self._values[-1] - self._values[-2]) / (self._knots[-1] - self._knots[-2])

    def trial(self, now: float, waiting: int) -> int:
        """How many rows to run this time: `worthwhile`, or now and then the size next to it of which too little is known.

        A warm-up runs on made-up inputs, and beside neighbours: where it has put the best size wrongly, nothing else finds that out.
        """
        best = bisect_left(self._knots, self.worthwhile)
        rows = self.worthwhile
        for knot in (best + 1, best - 1):
            if 0 <= knot < len(self._knots) and self._knots[knot] <= waiting and self._is_doubtful(knot, now):
                rows = self._knots[knot]
                break
        self.next_trial = now + max(TRIAL_EVERY, TRIAL_SHARE * self.mean(rows))
        return rows

    def _is_doubtful(self, knot: int, now: float) -> bool:
        return self._counts[knot] < FIRST_SEEN or now - self._seen[knot] > FRESH / 2

    def relax(self, now: float) -> None:
        """Before estimates are asked for after a rest."""
        self._device.relax(now)

    # -- learning ------------------------------------------------------------------------------------------------------

    def observe(self, rows: int, took: float, now: float, stretch: float = 0.0) -> None:
        """A batch of so many rows, padding included, took so long, `stretch` times as long as it had a core for; 0: nobody knows."""
        if not self._knots:
            self._begin(rows, took)
        self._observed += 1
        self.next_look = now + OBSERVE_EVERY
        knot = self._knot_of(rows)
        count = self._counts[knot] if now - self._seen[knot] <= FRESH else 0
        base = self._corrections[knot] if count else self._values[knot] / self._prior[knot]
        expected = self._at(rows) * self._device.factor
        residual = took / expected - 1.0
        if residual > OUTLIER - 1.0:
            self._outliers += 1
            residual = OUTLIER - 1.0
        if count >= CALIBRATED:
            residual = self._judge(residual, now)
        elif self._is_measured:
            residual = min(residual, 1.0)
        if stretch:
            self._device.observe(min(stretch / self._device.factor, OUTLIER), now)
            residual = min(took / stretch / self._at(rows) - 1.0, 1.0)
        elif count >= CALIBRATED:
            self._device.observe(1.0 + residual, now)
        own = self._at(rows) * (1.0 + residual) / _interpolate(self._knots, self._prior, rows, self._is_stepped)
        moved = self._weight(knot, count, now, is_faster=own < base) * (own - base)
        self._corrections[knot] = base + moved
        self._counts[knot] = count + 1
        self._seen[knot] = now
        if not count or abs(moved) > 0.02 * base or now >= self._rebuild_at:
            self._rebuild(now)

    def _judge(self, residual: float, now: float) -> float:
        """How uncertain estimates are that should be right, and what counts of how far off one was.

        A stray batch counts for as much as the worst of the usual ones, for the device and the corrections alike: else its factor would
        sink and the corrections rise for ever. Three of them in a row are not stray.
        """
        distance = abs(residual)
        usual = FAR * self._deviation
        if distance > usual and not self._in_a_row:
            self._far_since = now
        self._in_a_row = self._in_a_row + 1 if distance > usual else 0
        self._deviation += 0.05 * (min(distance, 1.0) - self._deviation)
        # A quantile by small steps: at rest when 19 steps down make one step up.
        step = 0.2 * max(self._deviation, LEAST_SPREAD)
        self._spread = max(self._spread + (step * UPPER if residual > self._spread else step * (UPPER - 1.0)), LEAST_SPREAD)
        if 0 < self._in_a_row < CHANGED:
            residual = max(min(residual, usual), -usual)
        return residual

    def _weight(self, knot: int, count: int, now: float, *, is_faster: bool) -> float:
        elapsed = now - self._seen[knot]
        if count < FIRST_SEEN:
            return 1.0 / (count + 1 + (WARM_UP_COUNTS if self._is_measured and not is_faster else 0))
        weight = min(elapsed / (elapsed + OWN_TAU), LONGEST_STEP)
        if self._in_a_row >= CHANGED and now - self._far_since > 2.0 * SHARED_TAU:
            return max(weight, 0.5)
        return weight

    def _begin(self, rows: int, took: float) -> None:
        """Nothing was measured at load: a first guess of the shape, half of it for the batch and half for its rows."""
        powers = [1 << power for power in range(self._max_rows.bit_length()) if 1 << power < self._max_rows]
        knots = sorted({*powers, self._max_rows, rows})
        self._set_prior({size: max(took * (0.5 + 0.5 * size / rows) - BATCH_OVERHEAD, 0.0) for size in knots})

    def _knot_of(self, rows: int) -> int:
        knots = self._knots
        index = bisect_left(knots, rows)
        if index == len(knots):
            return index - 1
        if index and not self._is_stepped and knots[index - 1] * knots[index] > rows * rows:
            return index - 1
        return index

    def _rebuild(self, now: float) -> None:
        self._rebuild_at = now + 1.0
        seen = [index for index, count in enumerate(self._counts) if count]
        # After a rest nothing is fresh, and what was known before it is the best there is.
        live = [index for index in seen if now - self._seen[index] <= FRESH] or seen
        places = [float(index) for index in live]
        corrections = [self._corrections[index] for index in live]
        self._values = levelled([took * (_between(places, corrections, index) if live else 1.0) for index, took in enumerate(self._prior)])
        tried = range(max([self._measured, *[index + 1 for index in seen]])) if self._knots else ()
        self.worthwhile = _smallest_good({self._knots[index]: self._values[index] for index in tried}) if tried else self._max_rows


def _doubled(rows: int, up_to: int) -> list[int]:
    sizes = []
    while rows < up_to:
        rows = min(2 * rows, up_to)
        sizes.append(rows)
    return sizes


def _extrapolate(measured: Sequence[int], seconds: Mapping[int, float], rows: int) -> float:
    """What was measured, and beyond that as if each row took what those of the last step did."""
    last = measured[-1]
    if rows <= last:
        return seconds[rows]
    if len(measured) == 1:
        return seconds[last] * rows / last
    before = measured[-2]
    return seconds[last] + max(seconds[last] - seconds[before], 0.0) / (last - before) * (rows - last)


def levelled(values: Sequence[float]) -> list[float]:
    """The nearest sequence that never falls: runs that fall become their mean."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        count = 1
        while blocks and blocks[-1][0] > value:
            mean, size = blocks.pop()
            value = (mean * size + value * count) / (size + count)
            count += size
        blocks.append((value, count))
    return [value for value, count in blocks for _ in range(count)]


def _between(places: Sequence[float], values: Sequence[float], place: float) -> float:
    """Linear between places, constant outside."""
    index = bisect_left(places, place)
    if index == 0:
        return values[0]
    if index == len(places):
        return values[-1]
    low, high = places[index - 1], places[index]
    return values[index - 1] + (values[index] - values[index - 1]) * (place - low) / (high - low)


def _interpolate(knots: Sequence[int], values: Sequence[float], rows: float, is_stepped: bool) -> float:
    """l at any size: at and below the first knot its value, linear between knots and beyond the last; stepped: the next knot's."""
    index = bisect_left(knots, rows)
    last = len(knots) - 1
    if index > last:
        if is_stepped or not last:
            return values[last]
        index = last
    if index == 0 or is_stepped:
        return values[index]
    low, high = knots[index - 1], knots[index]
    return values[index - 1] + (values[index] - values[index - 1]) * (rows - low) / (high - low)
