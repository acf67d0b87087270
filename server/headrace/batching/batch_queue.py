"""Who waits, in which order, and who runs next. Pure: no clock, no thread, no I/O; the batcher drives it under its lock.

Theory of operation. Tickets of equal key can share a batch, so there is one lane a key, each ordered by when its tickets are due, then
by arrival. Due is when a ticket expires, but no later than PATIENCE after it came: by expiry alone, one client without a deadline
would wait for ever beside others who have one and keep the model busy. Each level of priority below the first is due LEVEL later:
while they wait together the higher level goes first whatever the deadlines, and the lower one is passed over for so long and no
longer (Triton's levels are strict, and the lowest starves). Most traffic has one priority and one timeout, so a new
ticket nearly always belongs at the end of its lane: an append; only the others pay for a binary search. A batch is a prefix of
the lane whose head is the most urgent of all heads: as many rows as are worth it (`limit`), and where somebody has a deadline no
more than let each of them be answered by it. Heads that cannot be are taken out while others wait, `drop_late`: run all the same,
they would make those late too.
Rules for changing this file: rows are what is bounded and batched, never requests; a ticket leaves in exactly one of `take`,
`remove`, `expire` and `clear`, and the random walks in tests/unit/batching hold that.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Hashable
from dataclasses import dataclass

from headrace.batching.latency import LatencyTable
from headrace.requests import Ticket

NEVER = float("inf")
PATIENCE = 1.0
"""Seconds after which a ticket has waited long enough to run before newer ones that expire soon."""
LEVEL = 2.0
"""Seconds for which a level of priority goes before the next; more than PATIENCE, or a deadline would count for more."""
_LANES_LOOKED_AT = 16
"""For an estimate of what is ahead; a model with free dimensions has as many lanes as there are lengths."""
_Entry = tuple[float, int, Ticket]


@dataclass(frozen=True, slots=True)
class QueueStats:
    rows: int
    requests: int
    lanes: int


class BatchQueue:
    """The waiting tickets of one model version. Owned by its batcher."""

    def __init__(self, limit: int, max_queue_rows: int = 0) -> None:
        self.limit = limit
        """Rows beyond which another request is not added to a batch. May change at any time."""
        self._max_queue_rows = max_queue_rows
        self._lanes: dict[Hashable, list[_Entry]] = {}
        self._expiries: list[tuple[float, int, Ticket]] = []
        self._sequence = itertools.count()
        self.rows = 0
        self.requests = 0
        self.left_rows = 0
        """Of all tickets that have left. With those that wait: all that came, counted once a batch instead of once a request."""

    def __repr__(self) -> str:
        return f"BatchQueue(rows={self.rows}, requests={self.requests}, lanes={len(self._lanes)})"

    def stats(self) -> QueueStats:
        return QueueStats(self.rows, self.requests, len(self._lanes))

    @property
    def has_deadlines(self) -> bool:
        """Whether anybody may have one: False is certain."""
        return bool(self._expiries)

    def is_full_for(self, rows: int) -> bool:
        """An empty queue takes anything, or a request larger than the bound could never run."""
        return bool(self._max_queue_rows) and self.rows > 0 and self.rows + rows > self._max_queue_rows

    def push(self, ticket: Ticket) -> None:
        sequence = next(self._sequence)
        entry = (_due(ticket), sequence, ticket)
        lane = self._lanes.get(ticket.key)
        if lane is None:
            self._lanes[ticket.key] = [entry]
        elif entry > lane[-1]:
            lane.append(entry)
        else:
            bisect.insort(lane, entry)
        self.rows += ticket.rows
        self.requests += 1
        if ticket.expires != NEVER:
            heapq.heappush(self._expiries, (ticket.expires, sequence, ticket))
            if len(self._expiries) > 2 * self.requests + 64:
                self._forget_expiries()

    def take(self, table: LatencyTable | None = None, now: float = 0.0) -> list[Ticket]:
        """The most urgent batch, at most `limit` rows but at least one ticket; empty when nobody waits.

        With a table: no more rows than let it end by the earliest deadline in it, and of restricted sizes the one that pays.
        """
        if not self._lanes:
            return []
        key = self._most_urgent()
        lane = self._lanes[key]
        if table is None:
            count, rows = self._batch(lane)
        else:
            count, rows = self._prefix_in_time(lane, table, now) if self.is_pressed(table, now) else self._batch(lane)
            fill = table.fill(rows)
            if fill < rows:
                count, rows = self._prefix(lane, fill)
        tickets = self._cut(key, count, rows)
        for ticket in tickets:
            ticket.is_taken = True
        return tickets

    def is_pressed(self, table: LatencyTable, now: float) -> bool:
        """Whether anybody's deadline comes before the largest batch could be done."""
        expiry = self.next_expiry()
        return expiry != NEVER and expiry < now + table.mean(self.limit)

    def drop_late(self, table: LatencyTable, now: float, sustaining: int = 1) -> list[Ticket]:
        """Take out the heads that cannot be answered in time, as long as others wait behind them.

        `sustaining`: also those that could be, but only in a batch of fewer rows than that, which does less than what comes (Nexus'
        window).
        """
        if not self.is_pressed(table, now) or not self._lanes:
            return []
        key = self._most_urgent()
        lane = self._lanes[key]
        count = 0
        while count < len(lane) and count + 1 < self.requests and lane[count][2].answer_by < now + table.mean(lane[count][2].rows):
            count += 1
        count = self._window(lane, count, table, now, sustaining)
        return self._cut(key, count, sum([entry[2].rows for entry in lane[:count]])) if count else []

    def _window(self, lane: list[_Entry], start: int, table: LatencyTable, now: float, sustaining: int) -> int:
        """How many heads to drop, `start` of them at least."""
        rest = lane[start : start + sustaining]
        wanted = min(sustaining, self.limit, sum([entry[2].rows for entry in rest]))
        _, rows = self._prefix_in_time(rest, table, now)
        if rows >= wanted:
            return start
        until = now + table.mean(wanted)
        while start + 1 < len(lane) and lane[start][2].answer_by < until:
            start += 1
        return start

    def rows_ahead(self, ticket: Ticket) -> int:
        """Rows that would run before a ticket that is not queued yet; an estimate where requests differ in rows."""
        if not self.requests:
            return 0
        entry = (_due(ticket), NEVER)
        lanes = self._lanes.values()
        ahead = sum([bisect.bisect_right(lane, entry) for lane in itertools.islice(lanes, _LANES_LOOKED_AT)])
        if len(lanes) > _LANES_LOOKED_AT:
            ahead = ahead * len(lanes) // _LANES_LOOKED_AT
        return ahead * self.rows // self.requests

    def is_batch_full(self) -> bool:
        """Whether waiting longer could not add to the most urgent batch."""
        if not self._lanes:
            return False
        lane = self._lanes[self._most_urgent()]
        count, rows = self._batch(lane)
        return rows >= self.limit or count < len(lane)

    def _most_urgent(self) -> Hashable:
        lanes = self._lanes
        return next(iter(lanes)) if len(lanes) == 1 else min(lanes, key=lambda key: lanes[key][0])

    def _cut(self, key: Hashable, count: int, rows: int) -> list[Ticket]:
        lane = self._lanes[key]
        tickets = [entry[2] for entry in lane[:count]]
        if count == len(lane):
            del self._lanes[key]
        else:
            del lane[:count]
        self.rows -= rows
        self.left_rows += rows
        self.requests -= count
        return tickets

    def oldest_enqueued(self) -> float:
        """When the longest-waiting head was enqueued; NEVER when empty."""
        return min((lane[0][2].enqueued for lane in self._lanes.values()), default=NEVER)

    def remove(self, ticket: Ticket) -> bool:
        """Take one ticket out; False when it is not queued (any more)."""
        lane = self._lanes.get(ticket.key)
        if lane is None or ticket.is_taken or ticket.is_settled:
            return False
        # By identity: an entry's sequence number is unique but not known to the ticket.
        start = bisect.bisect_left(lane, (_due(ticket),))
        for index in range(start, len(lane)):
            if lane[index][2] is ticket:
                del lane[index]
                break
        else:
            return False
        if not lane:
            del self._lanes[ticket.key]
        self.rows -= ticket.rows
        self.left_rows += ticket.rows
        self.requests -= 1
        return True

    def next_expiry(self) -> float:
        """The earliest expiry of a queued ticket; NEVER when none has one."""
        expiries = self._expiries
        while expiries and (expiries[0][2].is_taken or expiries[0][2].is_settled):
            heapq.heappop(expiries)
        return expiries[0][0] if expiries else NEVER

    def expire(self, now: float) -> list[Ticket]:
        """Take out every ticket whose time has passed."""
        expired = []
        while self.next_expiry() <= now:
            ticket = heapq.heappop(self._expiries)[2]
            if self.remove(ticket):
                expired.append(ticket)
        return expired

    def _forget_expiries(self) -> None:
        """Drop the entries of tickets that have left: with deadlines far ahead they, and their tensors, would stay until then."""
        self._expiries = [entry for entry in self._expiries if not (entry[2].is_taken or entry[2].is_settled)]
        heapq.heapify(self._expiries)

    def clear(self) -> list[Ticket]:
        tickets = [entry[2] for lane in self._lanes.values() for entry in lane]
        self._lanes.clear()
        self._expiries.clear()
        self.left_rows += self.rows
        self.rows = self.requests = 0
        return tickets

    def _prefix_in_time(self, lane: list[_Entry], table: LatencyTable, now: float) -> tuple[int, int]:
        """Of a lane that may be empty: the most that ends by the earliest deadline in it; the first one whatever it has."""
        rows = count = 0
        limit = self.limit
        earliest = NEVER
        for entry in lane:
            ticket = entry[2]
            if ticket.answer_by < earliest:
                within = min(table.rows_within(ticket.answer_by - now), limit)
                if count and rows + ticket.rows > within:
                    break
                earliest, limit = ticket.answer_by, within
            if count and rows + ticket.rows > limit:
                break
            rows += ticket.rows
            count += 1
        return count, rows

    def _batch(self, lane: list[_Entry]) -> tuple[int, int]:
        """As many of the lane as may run together. Mostly that is all that waits, which takes no counting."""
        return (len(lane), self.rows) if self.rows <= self.limit and len(self._lanes) == 1 else self._prefix(lane, self.limit)

    @staticmethod
    def _prefix(lane: list[_Entry], limit: int) -> tuple[int, int]:
        if not lane:
            return 0, 0
        rows = lane[0][2].rows
        count = 1
        while count < len(lane) and rows < limit:
            more = lane[count][2].rows
            if rows + more > limit:
                break
            rows += more
            count += 1
        return count, rows


def _due(ticket: Ticket) -> float:
    due = ticket.enqueued + PATIENCE
    if ticket.expires < due:
        due = ticket.expires
    return due + ticket.priority * LEVEL
