"""Counts cut into windows: by rows and by time, one after the other, and the last several together. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from headrace.config import DriftConfig
from headrace.drift.counting import Counts
from headrace.drift.reference import Reference


@dataclass(frozen=True, slots=True)
class Window:
    """Counts of the rows from `began` to `ended`, in seconds of whichever clock `Windows` was told of."""

    counts: Counts
    began: float
    ended: float


class Windows:
    """Owns the window that is filled and the `sliding_windows` before it. Not for several threads."""

    def __init__(self, reference: Reference, config: DriftConfig, now: float) -> None:
        self._reference = reference
        self._config = config
        self._open = Counts.zero(reference)
        self._began = now
        self._ended: deque[Window] = deque(maxlen=config.sliding_windows)

    def __repr__(self) -> str:
        return f"Windows({self._open.rows} rows in the open one, {len(self._ended)} ended)"

    @property
    def is_empty(self) -> bool:
        return not self._open.rows

    def add(self, counts: Counts, now: float) -> Window | None:
        """The window that ends with these rows, if one does. It has what came together, and so perhaps more than `window_rows`."""
        if not self._open.rows:
            self._began = now
        self._open.add(counts)
        return self.end_if_due(now)

    def end_if_due(self, now: float) -> Window | None:
        """The window that ends now: it is full; or it is old and has enough rows to say something."""
        rows, config = self._open.rows, self._config
        is_old = now - self._began >= config.window
        if rows < config.window_rows and not (is_old and rows >= config.min_rows):
            return None
        ended = Window(self._open, self._began, now)
        self._ended.append(ended)
        self._open, self._began = Counts.zero(self._reference), now
        return ended

    def sliding(self) -> Window | None:
        """The last `sliding_windows` that ended, together; None while there are fewer than two."""
        if len(self._ended) < 2:
            return None
        total = Counts.zero(self._reference)
        for window in self._ended:
            total.add(window.counts)
        return Window(total, self._ended[0].began, self._ended[-1].ended)
