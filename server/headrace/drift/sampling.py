"""Which part of the batches is counted, so that counting costs no more than it may. Pure.

A version earns CPU time: a part of what its batches took, and a little that passes by itself, so that one with little to do is counted
whole. Counting spends it, and from one count to the next the part that is kept follows what the last one took. A count costs something
however few batches are in it: so twice as many cost at most twice as much, and no more than twice as many are tried at a time.
"""

from __future__ import annotations

import math

FLOOR = 0.002
"""CPU seconds earned each second by doing nothing: enough to count some hundred rows of 37 features."""
SAVED = 2.0
"""Seconds of earning that can be saved up, or owed: a burst is paid for, and then forgotten."""
BURST = 4000
"""Rows that are counted between two looks at what that cost, before fewer are kept: some windows' worth."""
UNKNOWN = 16
"""Stride beyond those as long as nothing has been counted yet."""
KEEP = 3e-6
"""CPU seconds that keeping a batch costs the thread that ran it."""


class Budget:
    """Owns what is earned and not spent. `part`: of the time that batches take."""

    def __init__(self, part: float) -> None:
        self.stride = 1
        """One of so many batches is kept."""
        self._usual = UNKNOWN
        self._room = BURST
        self._part = part
        self._saved = 0.0

    def __repr__(self) -> str:
        return f"Budget(every {self.stride}th batch, {self._saved * 1e3:.2f} ms saved)"

    def rest(self) -> None:
        """Nothing came for longer than SAVED seconds: the first rows of a burst are counted whole, for an alert as soon as can be."""
        self._usual = max(self.stride, UNKNOWN)
        self._room = BURST
        self.stride = 1

    def keep(self, rows: int) -> None:
        """So many were kept of a batch. Any thread: it need not be exact."""
        self._room -= rows
        if self._room < 0:
            self.stride = max(self.stride, self._usual)

    def spend(self, cpu: float, kept: int, *, ran: float, busy: float, seconds: float) -> None:
        """In the last `seconds` counting took `cpu` for `kept` of the `ran` batches, which were run in `busy` seconds."""
        self._room, self._usual = BURST, self.stride  # from here on the stride is known, and so what a burst costs
        rate = self._part * busy / seconds + FLOOR
        cost = cpu + KEEP * kept
        self._saved = min(max(self._saved + rate * seconds - cost, -rate * SAVED), rate * SAVED)
        # What is saved or owed is made good over the seconds after.
        more = max(rate * seconds + self._saved / SAVED, 0.0) / cost
        self.stride = max(math.ceil(self.stride / min(more, 2.0)), 1) if more else self.stride * 2
        # One batch is kept at least; with a longer stride than there are batches it would take for ever to become shorter again.
        self.stride = min(self.stride, max(math.ceil(ran), 1))
