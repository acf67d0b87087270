"""Which requests are captured. Pure; `now` is given."""

from __future__ import annotations

import math
import random


class CaptureSampler:
    """Owns how many requests are passed over before the next, and the allowance of the rate: a token bucket of one second's worth.

    Each request is chosen with the chance `fraction`, whatever model it is for. Passing over so many at once costs a batch of which none
    is chosen one subtraction, where asking for each would cost as much as some requests do. Not for several threads.
    """

    def __init__(self, fraction: float, per_second: float, now: float, seed: int | None = None) -> None:
        self._fraction = fraction
        self._rate = per_second
        self._most = max(per_second, 1.0) if per_second else 0.0
        self._allowance = self._most
        self._filled = now
        self._random = random.Random(seed)
        self._pass_over = self._draw()

    def __repr__(self) -> str:
        return f"CaptureSampler(fraction={self._fraction:g}, per_second={self._rate:g}, next in {self._pass_over})"

    def choose(self, count: int, now: float) -> tuple[list[int], int]:
        """Of the next `count` requests: the positions of those to capture, and how many others were chosen but come too fast."""
        if self._pass_over >= count:
            self._pass_over -= count
            return [], 0
        chosen = []
        position = self._pass_over
        while position < count:
            chosen.append(position)
            position += 1 + self._draw()
        self._pass_over = position - count
        allowed = self._spend(len(chosen), now)
        return chosen[:allowed], len(chosen) - allowed

    def _draw(self) -> int:
        """How many are passed over before the next: geometric."""
        if self._fraction >= 1.0:
            return 0
        if self._fraction <= 0.0:
            return 1 << 62
        return int(math.log(1.0 - self._random.random()) / math.log1p(-self._fraction))

    def _spend(self, count: int, now: float) -> int:
        self._allowance = min(self._allowance + max(now - self._filled, 0.0) * self._rate, self._most)
        self._filled = now
        allowed = min(count, int(self._allowance))
        self._allowance -= allowed
        return allowed
