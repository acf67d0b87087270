"""When a request that comes now would start and be answered, and how large batches may grow with the deadlines that are asked for. Pure.

Theory of operation. A request admitted too late is the dearest of all: it takes its place in the queue, and when its batch is formed
it either fails or forces the batch to be small, which makes everybody behind it late too. So the time to say no is when it comes. It
is answered when the batches that run have ended, those ahead of it have run, and then its own, which will have grown by whatever
comes in the meantime: under overload it is the full one that counts, at rest it is the request alone.
How large a full one is, `target`: a request waits for the batch before its own (or, under overload, as long as it takes a batch to
come together, whichever is shorter) and for its own; the largest size for which both fit into the usual time to the deadline.
How small one may be, `sustaining`: the smallest that does as many rows a second as come. Smaller ones for the sake of a deadline make
the queue grow, and with it whatever is late (with a third of the requests in a hurry, goodput at 0.8 of the capacity was 0.22).
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.batching.latency import LatencyTable

NEVER = float("inf")
RATE_WINDOW = 0.02
"""Seconds between two looks at how many rows came; the rate follows over two or three of them, since a burst is over before ten."""
RATE_TAU = 0.05
SLACK_WEIGHT = 0.05
"""Of one request's time to its deadline in the usual one."""
MARGIN = 200e-6
"""Seconds from the end of a batch until the last of its answers is on its way."""


class Forecast:
    """Owns the arrival rate and the usual time to a deadline of one version. Its batcher calls one method at a time."""

    def __init__(self, table: LatencyTable) -> None:
        self.table = table
        self.rate = 0.0
        """Rows a second that are asked for, admitted or not."""
        self._slack = 0.0
        self._rows = 0
        self._at = 0.0
        self.next_look = 0.0
        self._target = self._sustaining = 0
        self.batch_seconds = self.row_seconds = 0.0
        """Of a batch of the target size, and of a row in one: what comes later than two batches and all rows ahead needs no forecast."""
        self._target_until = 0.0

    def __repr__(self) -> str:
        return f"Forecast(rate={self.rate:.0f}, slack={self._slack:.4f}, {self.table!r})"

    def count(self, rows: int, now: float) -> None:
        """`rows`: asked for since the beginning. Worth calling from `next_look` on."""
        elapsed = now - self._at
        if elapsed <= 0:
            return
        rate = (rows - self._rows) / elapsed
        self.rate += (rate - self.rate) * min(elapsed / RATE_TAU, 1.0)
        self._rows, self._at, self.next_look = rows, now, now + RATE_WINDOW

    def saw_deadline(self, slack: float) -> None:
        """A request came that has so long to be answered."""
        self._slack = slack if not self._slack else self._slack + SLACK_WEIGHT * (slack - self._slack)

    def target(self, instances: int, now: float) -> int:
        """Rows of the batches that do the most work in time; never more than are worth it, never less than one."""
        self._look(instances, now)
        return self._target

    def sustaining(self, instances: int, now: float) -> int:
        """Rows of the smallest batches that keep up with what comes; at most the target."""
        self._look(instances, now)
        return self._sustaining

    def is_easy(self, slack: float, waiting: int) -> bool:
        """Whether there is time enough by far, so that most requests cost no more than this. What it goes by is a look old."""
        return slack > 2.0 * self.batch_seconds + waiting * self.row_seconds and bool(self._target)

    def look(self, instances: int, rows: int, now: float) -> None:
        """Every RATE_WINDOW: `rows` asked for since the beginning."""
        self.count(rows, now)
        self._look(instances, now)

    def _look(self, instances: int, now: float) -> None:
        if now >= self._target_until:
            self.table.relax(now)
            self._target = self._find_target(instances)
            self._sustaining = self._find_sustaining(instances)
            self.batch_seconds = self.table.upper(self.table.worthwhile) + MARGIN
            self.row_seconds = self.table.upper(self._target) / self._target
            self._target_until = now + RATE_WINDOW

    def _find_sustaining(self, instances: int) -> int:
        low, high = 1, self._target
        while low < high:
            middle = (low + high) // 2
            if middle * instances >= self.rate * self.table.mean(middle):
                high = middle
            else:
                low = middle + 1
        return low

    def _find_target(self, instances: int) -> int:
        """The largest size in time: both waits grow with it, so halving finds it."""
        low, high = 1, self.table.worthwhile
        if not self._slack or not self.table.is_known:
            return high
        while low < high:
            middle = (low + high + 1) // 2
            took = self.table.upper(middle)
            gathering = middle / self.rate if self.rate else NEVER
            if min(took / instances, gathering) + took + MARGIN <= self._slack:
                low = middle
            else:
                high = middle - 1
        return low

    def start_and_answer(self, now: float, free_at: Sequence[float], ahead: int, waiting: int, rows: int) -> tuple[float, float]:
        """When a request of `rows` starts and is answered that comes to `waiting` rows and runs after `ahead` of them. `free_at`: when
        each instance is free, ascending."""
        instances = len(free_at)
        target = self.target(instances, now)
        full, rest = divmod(ahead, target)
        rounds, instance = divmod(full, instances)
        start = max(free_at[instance], now) + rounds * self.table.mean(target)
        by_then = waiting - full * target + rows + self.rate * (start - now)
        joined = max(rest + rows, min(by_then, self._sustaining))
        return start, start + self.table.upper(joined) + MARGIN
