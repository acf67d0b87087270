from __future__ import annotations

from headrace.config import DriftConfig
from headrace.drift.window import Windows
from unit.drift.references import counts_of, reference_of

REFERENCE = reference_of()
CONFIG = DriftConfig(window_rows=100, window=60.0, min_rows=20, sliding_windows=3)


def windows() -> Windows:
    return Windows(REFERENCE, CONFIG, 0.0)


def rows(count: int) -> tuple[int, ...]:
    return (count, 0, 0, 0)


def test_a_window_ends_when_it_is_full_and_the_next_begins_empty() -> None:
    cut = windows()
    assert cut.add(counts_of(REFERENCE, rows(60)), 1.0) is None
    ended = cut.add(counts_of(REFERENCE, rows(60)), 2.0)
    assert ended is not None
    assert (ended.counts.rows, ended.began, ended.ended) == (120, 1.0, 2.0)
    assert cut.is_empty


def test_an_old_window_ends_with_fewer_rows_but_not_with_too_few() -> None:
    cut = windows()
    cut.add(counts_of(REFERENCE, rows(19)), 0.0)
    assert cut.end_if_due(61.0) is None
    ended = cut.add(counts_of(REFERENCE, rows(1)), 61.0)
    assert ended is not None
    assert ended.counts.rows == 20


def test_a_window_begins_with_its_first_row() -> None:
    cut = windows()
    cut.add(counts_of(REFERENCE, rows(50)), 1000.0)
    assert cut.end_if_due(1059.0) is None
    assert cut.end_if_due(1060.0) is not None


def test_the_sliding_window_is_the_last_ones_that_ended() -> None:
    cut = windows()
    assert cut.sliding() is None
    for number in range(1, 6):
        cut.add(counts_of(REFERENCE, rows(100 * number)), float(number))
    whole = cut.sliding()
    assert whole is not None
    assert whole.counts.rows == 300 + 400 + 500
    assert (whole.began, whole.ended) == (3.0, 5.0)


def test_ended_counts_do_not_change_any_more() -> None:
    cut = windows()
    first = cut.add(counts_of(REFERENCE, rows(100)), 1.0)
    cut.add(counts_of(REFERENCE, rows(100)), 2.0)
    cut.sliding()
    assert first is not None
    assert first.counts.rows == 100
