"""Who waits, in which order, and who runs next. Pure: no clock, no thread, no I/O; the batcher drives it under its lock.

Theory of operation. Tickets of equal key can share a batch, so there is one lane a key, each ordered by (priority, due time,
arrival). Due is when a ticket expires, but no later than PATIENCE after it came: by expiry alone, one client without a deadline
would wait for ever beside others who have one and keep the model busy. Most traffic has one priority and one timeout, so a new
ticket nearly always belongs at the end of its lane: an append; only the others pay for a binary search. A batch is a prefix of
the lane whose head is the most urgent of all heads.
Rules for changing this file: rows are what is bounded and batched, never requests; a ticket leaves in exactly one of `take`,
`remove`, `expire` and `clear`, and the random walks in tests/unit/batching hold that.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Hashable
from dataclasses import dataclass

from headrace.requests import Ticket

NEVER = float("inf")
PATIENCE = 1.0
"""Seconds after which a ticket has waited long enough to run before newer ones that expire soon."""
_Entry = tuple[int, float, int, Ticket]


@dataclass(frozen=True, slots=True)
class QueueStats:
    rows: int
    requests: int
    lanes: int


class BatchQueue:
    """The waiting tickets of one model version. Owned by its batcher."""

    def __init__(self, max_batch_rows: int, max_queue_rows: int = 0) -> None:
        self._max_batch_rows = max_batch_rows
        self._max_queue_rows = max_queue_rows
        self._lanes: dict[Hashable, list[_Entry]] = {}
        self._expiries: list[tuple[float, int, Ticket]] = []
        self._sequence = itertools.count()
        self.rows = 0
        self.requests = 0

    def __repr__(self) -> str:
        return f"BatchQueue(rows={self.rows}, requests={self.requests}, lanes={len(self._lanes)})"

    def stats(self) -> QueueStats:
        return QueueStats(self.rows, self.requests, len(self._lanes))

    def is_full_for(self, rows: int) -> bool:
        """An empty queue takes anything, or a request larger than the bound could never run."""
        return bool(self._max_queue_rows) and self.rows > 0 and self.rows + rows > self._max_queue_rows

    def push(self, ticket: Ticket) -> None:
        sequence = next(self._sequence)
        entry = (ticket.priority, _due(ticket), sequence, ticket)
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

    def take(self) -> list[Ticket]:
        """The most urgent batch, at most `max_batch_rows` rows but at least one ticket; empty when nobody waits."""
        if not self._lanes:
            return []
        lanes = self._lanes
        key = next(iter(lanes)) if len(lanes) == 1 else min(lanes, key=lambda k: lanes[k][0])
        lane = lanes[key]
        count, rows = self._prefix(lane)
        tickets = [entry[3] for entry in lane[:count]]
        if count == len(lane):
            del lanes[key]
        else:
            del lane[:count]
        for ticket in tickets:
            ticket.is_taken = True
        self.rows -= rows
        self.requests -= count
        return tickets

    def is_batch_full(self) -> bool:
        """Whether waiting longer could not add to the most urgent batch."""
        lane = min(self._lanes.values(), key=lambda lane: lane[0], default=None)
        if lane is None:
            return False
        count, rows = self._prefix(lane)
        return rows >= self._max_batch_rows or count < len(lane)

    def oldest_enqueued(self) -> float:
        """When the longest-waiting head was enqueued; NEVER when empty."""
        return min((lane[0][3].enqueued for lane in self._lanes.values()), default=NEVER)

    def remove(self, ticket: Ticket) -> bool:
        """Take one ticket out; False when it is not queued (any more)."""
        lane = self._lanes.get(ticket.key)
        if lane is None or ticket.is_taken or ticket.is_settled:
            return False
        # By identity: an entry's sequence number is unique but not known to the ticket.
        start = bisect.bisect_left(lane, (ticket.priority, _due(ticket)))
        for index in range(start, len(lane)):
            if lane[index][3] is ticket:
                del lane[index]
                break
        else:
            return False
        if not lane:
            del self._lanes[ticket.key]
        self.rows -= ticket.rows
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
        tickets = [entry[3] for lane in self._lanes.values() for entry in lane]
        self._lanes.clear()
        self._expiries.clear()
        self.rows = self.requests = 0
        return tickets

    def _prefix(self, lane: list[_Entry]) -> tuple[int, int]:
        rows = lane[0][3].rows
        count = 1
        limit = self._max_batch_rows
        while count < len(lane) and rows < limit:
            more = lane[count][3].rows
            if rows + more > limit:
                break
            rows += more
            count += 1
        return count, rows


def _due(ticket: Ticket) -> float:
    return min(ticket.expires, ticket.enqueued + PATIENCE)
