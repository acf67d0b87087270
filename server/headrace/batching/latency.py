"""What is known of l(b), the seconds that a batch of b rows takes, and what follows from it. Pure."""

from __future__ import annotations

from collections.abc import Mapping

BATCH_OVERHEAD = 100e-6
"""Seconds that the server itself spends on a batch, whatever its size: waking, gathering, encoding, one hop back."""
GOOD_ENOUGH = 0.97
"""Of the best rate: a smaller batch is answered sooner, and l(b) from a few runs is no more exact than this."""
INLINE_LIMIT = 200e-6
"""Seconds of l(1) below which two changes of thread cost more than the model."""


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


def is_tiny(seconds: Mapping[int, float]) -> bool:
    """Whether one request takes so little that it should run where it arrives."""
    return 0 < seconds.get(1, 0.0) < INLINE_LIMIT
