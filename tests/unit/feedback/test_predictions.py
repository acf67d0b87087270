from __future__ import annotations

import random

from headrace.feedback.predictions import LONGEST_ID, Found, Prediction, Predictions, is_kept


def made(at: float, rows: int = 1) -> Prediction:
    return Prediction(at, rows, (1.0,) * rows, (0.5,) * rows)


def test_a_prediction_waits_until_it_is_labelled_and_is_labelled_once() -> None:
    kept = Predictions(10, 60.0)
    kept.add("a", made(0.0, rows=2))
    found, prediction = kept.find("a", 1.0)
    assert (found, prediction) == (Found.WAITING, made(0.0, rows=2))
    kept.label("a")
    assert kept.find("a", 2.0) == (Found.LABELLED, None)
    assert kept.find("b", 2.0) == (Found.UNKNOWN, None)
    assert (kept.rows, kept.waiting_rows) == (2, 0)


def test_what_is_too_old_or_too_much_goes_and_is_told_from_what_never_was() -> None:
    kept = Predictions(3, 60.0)
    for number in range(5):
        kept.add(str(number), made(float(number)))
    assert [kept.find(str(number), 5.0)[0] for number in range(6)] == [Found.EXPIRED] * 2 + [Found.WAITING] * 3 + [Found.UNKNOWN]
    assert kept.find("3", 63.5)[0] is Found.EXPIRED
    assert kept.find("4", 63.5)[0] is Found.WAITING
    assert kept.rows == kept.waiting_rows == 1


def test_an_id_that_is_used_again_means_the_later_request() -> None:
    kept = Predictions(10, 60.0)
    kept.add("a", made(0.0))
    kept.add("a", made(1.0, rows=3))
    assert kept.find("a", 1.0)[1] == made(1.0, rows=3)
    assert (kept.rows, kept.replaced) == (3, 1)
    kept.label("a")
    kept.add("a", made(2.0))
    assert (kept.rows, kept.waiting_rows, kept.replaced) == (1, 1, 1)


def test_a_request_of_more_rows_than_are_kept_is_not() -> None:
    kept = Predictions(3, 60.0)
    kept.add("a", made(0.0, rows=4))
    assert kept.find("a", 0.0)[0] is Found.EXPIRED
    assert kept.rows == 0


def test_counts_and_memory_stay_within_bounds_whatever_comes() -> None:
    seed = 7
    walk, kept, now = random.Random(seed), Predictions(50, 20.0), 0.0
    for step in range(5000):
        now += walk.random()
        id = str(walk.randrange(200))
        if walk.random() < 0.6:
            kept.add(id, made(now, rows=walk.randint(1, 9)))
        elif kept.find(id, now)[0] is Found.WAITING:
            kept.label(id)
        entries = list(kept._kept.values())
        assert kept.rows == sum(each.rows for each in entries) <= 50, f"seed {seed}, step {step}"
        assert kept.waiting_rows == sum(each.rows for each in entries if each.values), f"seed {seed}, step {step}"
        assert len(kept._gone) <= 50


def test_ids_that_are_missing_or_endless_are_not_kept() -> None:
    assert [is_kept(id) for id in ("", "a", "a" * LONGEST_ID, "a" * (LONGEST_ID + 1))] == [False, True, True, False]
