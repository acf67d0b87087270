from __future__ import annotations

import pytest
from headrace.drift.sampling import FLOOR, KEEP, Budget

FIXED, EACH = 300e-6, 20e-6


def run(budget: Budget, batches: int, busy: float, seconds: int = 60) -> tuple[float, float]:
    """(CPU seconds a second, part of the batches) over the last half, where a count takes FIXED and EACH for each batch in it."""
    spent, kept_of_all = [], []
    for _ in range(seconds):
        kept = max(batches // budget.stride, 1)
        cpu = FIXED + EACH * kept
        budget.spend(cpu, kept, ran=batches, busy=busy, seconds=1.0)
        spent.append(cpu + KEEP * kept)
        kept_of_all.append(kept / batches)
    return sum(spent[seconds // 2 :]) / (seconds // 2), sum(kept_of_all[seconds // 2 :]) / (seconds // 2)


def test_a_version_with_little_to_do_is_counted_whole() -> None:
    assert run(Budget(0.01), batches=20, busy=0.001)[1] == 1.0


@pytest.mark.parametrize("busy", [0.1, 0.5, 1.0])
def test_a_busy_version_spends_what_it_may_and_not_much_less(busy: float) -> None:
    allowed = 0.01 * busy + FLOOR
    spent, part = run(Budget(0.01), batches=20_000, busy=busy)
    assert 0.5 * allowed < spent <= 1.1 * allowed
    assert part < 0.05


def test_after_a_burst_it_is_counted_whole_again() -> None:
    budget = Budget(0.01)
    run(budget, batches=20_000, busy=0.5)
    assert budget.stride > 10
    assert run(budget, batches=20, busy=0.001)[1] == 1.0
