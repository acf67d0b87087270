"""What was predicted for each request id, until its labels come. Bounded in rows and in time. Pure; `now` is given."""

from __future__ import annotations

import enum
from collections import OrderedDict
from typing import NamedTuple

LONGEST_ID = 256
"""Characters. Longer ones are not kept: they are the client's choice, and would make the bound in rows no bound of memory."""


class Found(enum.Enum):
    """What a request id is: `WAITING` for its labels, `LABELLED` already, `EXPIRED` (kept once, no more), or `UNKNOWN`."""

    WAITING = "waiting"
    LABELLED = "labelled"
    EXPIRED = "expired"
    UNKNOWN = "unknown"


class Prediction(NamedTuple):
    """`values`: by row, a class or a number; `confidences` of classes, negative where none is known. Empty once labelled."""

    at: float
    rows: int
    values: tuple[float, ...]
    confidences: tuple[float, ...] = ()


class Predictions:
    """Owns them, oldest first. Of those that had to go the ids' hashes are kept as long as there is room, so that one that is late is told
    from one that never was. Not for several threads."""

    def __init__(self, keep_rows: int, keep: float) -> None:
        self._keep_rows = keep_rows
        self._keep = keep
        self._kept: OrderedDict[str, Prediction] = OrderedDict()
        self._gone: OrderedDict[int, None] = OrderedDict()
        self.rows = self.waiting_rows = 0
        self.replaced = 0
        """Ids that were used again before their labels came, of which the earlier answer is lost."""

    def __repr__(self) -> str:
        return f"Predictions({len(self._kept)} requests, {self.rows} of {self._keep_rows} rows)"

    def add(self, id: str, prediction: Prediction) -> None:
        """An id that is used again means the later request from then on."""
        before = self._kept.pop(id, None)
        if before is not None:
            self._leave(before)
            self.replaced += bool(before.values)
        self._kept[id] = prediction
        self.rows += prediction.rows
        self.waiting_rows += prediction.rows
        self._trim(prediction.at)

    def find(self, id: str, now: float) -> tuple[Found, Prediction | None]:
        self._trim(now)
        prediction = self._kept.get(id)
        if prediction is None:
            return (Found.EXPIRED if hash(id) in self._gone else Found.UNKNOWN), None
        return (Found.WAITING, prediction) if prediction.values else (Found.LABELLED, None)

    def label(self, id: str) -> None:
        """Its labels have come. It is remembered as long as it would have waited, so that nobody counts twice."""
        before = self._kept[id]
        self.waiting_rows -= before.rows
        self._kept[id] = Prediction(before.at, before.rows, ())

    def _trim(self, now: float) -> None:
        while self._kept:
            id, oldest = next(iter(self._kept.items()))
            if self.rows <= self._keep_rows and now - oldest.at <= self._keep:
                return
            del self._kept[id]
            self._leave(oldest)
            self._gone[hash(id)] = None
            if len(self._gone) > self._keep_rows:
                self._gone.popitem(last=False)

    def _leave(self, prediction: Prediction) -> None:
        self.rows -= prediction.rows
        if prediction.values:
            self.waiting_rows -= prediction.rows


def is_kept(id: str) -> bool:
    return 0 < len(id) <= LONGEST_ID
