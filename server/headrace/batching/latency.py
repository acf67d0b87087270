"""What is known of l(b), the seconds that a batch of b rows takes, and what follows from it. Pure."""

from __future__ import annotations

from collections.abc import Mapping

BATCH_OVERHEAD = 100e-6
"""Seconds that the server itself spends on a batch, whatever its size: waking, gathering, encoding, one hop back."""
GOOD_ENOUGH = 0.97
"""Of the best rate: a smaller batch is answered sooner, and l(b) from a few runs is no more exact than this."""
INLINE_LIMIT = 200e-6
"""Seconds of l(1) below which two changes of thread cost more than the model."""
INLINE_BUDGET = 1e-3
"""Seconds for which whoever brings a request may be held up by running what waits; other calls wait meanwhile."""


def worthwhile_batch(seconds: Mapping[int, float], max_batch_size: int) -> int:
    """The batch size up to which waiting requests should run together.

    On a CPU many models do fewer rows a second the larger the batch, because the activations of a small one stay in the cache
    (magika: 154 at 1, 114 at 64). Nothing measured: the largest allowed.
    """
    rates = {rows: rows / (took + BATCH_OVERHEAD) for rows, took in seconds.items()}
    if not rates:
        return max(max_batch_size, 1)
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
