import asyncio
import math

import numpy as np

from loadtests.traffic import NO_VERSION, Record, delays, misnamed, overtaken_delays, p_ms


def record(*calls: tuple[float, float, int]) -> Record:
    made = Record("m")
    for call in calls:
        made.add(*call)
    return made


def test_a_call_belongs_to_the_phase_that_it_began_in() -> None:
    made = record((0.0, 0.5, 1), (0.9, 1.2, 1), (1.0, 1.1, 1))
    assert made.latencies(0.0, 1.0).round(3).tolist() == [0.5, 0.3]
    assert made.count(1.0, 2.0) == (1, 0)


def test_failed_calls_have_no_latency_and_are_counted() -> None:
    made = record((0.0, 0.5, 1), (0.6, 9.0, NO_VERSION))
    assert made.latencies(0.0, 1.0).tolist() == [0.5]
    assert made.count(0.0, 1.0) == (2, 1)


def test_calls_that_overlap_a_flip_are_those_under_way_at_any_time_of_it() -> None:
    made = record((0.0, 1.0, 1), (1.0, 4.0, 1), (2.2, 2.3, 2), (3.1, 3.2, 2))
    assert made.overlapping([(2.0, 3.0)]).round(3).tolist() == [3.0, 0.1]
    assert made.overlapping([]).tolist() == []


def test_the_older_answer_to_a_call_that_began_before_the_flip_is_no_step_back() -> None:
    assert record((0.0, 0.1, 1), (0.2, 0.5, 2), (0.4, 0.6, 1)).steps_back() == 0


def test_the_older_answer_to_a_call_that_began_after_the_flip_is_a_step_back() -> None:
    assert record((0.0, 0.1, 1), (0.2, 0.5, 2), (0.55, 0.6, 1), (0.7, 0.8, NO_VERSION)).steps_back() == 1


def test_a_record_without_answers_has_no_step_back() -> None:
    assert record().steps_back() == 0


def test_versions_that_answer_before_they_were_published_are_told() -> None:
    assert misnamed({1: 0.0, 2: 5.0}, {1: float("-inf"), 2: 4.0, 3: 6.0}) == []
    assert misnamed({2: 5.0, 7: 1.0}, {2: 5.5}) == [
        "version 7 answered and was never published",
        "version 2 answered 0.500 s before it was published",
    ]


def test_delays_are_those_of_versions_that_answered() -> None:
    assert delays({2: 5.0}, {2: 4.0, 3: 6.0}) == [1.0]


def test_a_version_that_was_overtaken_waited_for_the_newer_one() -> None:
    assert overtaken_delays({2: 5.0, 4: 9.0}, {2: 4.0, 3: 6.0, 4: 7.0, 5: 8.0}) == [1.0, 3.0, 2.0, math.inf]


def test_nothing_measured_is_no_good_percentile() -> None:
    assert math.isnan(p_ms(np.array([]), 99))
    assert p_ms(np.array([0.001, 0.002]), 99) == 2.0


async def test_waiting_for_a_version_ends_with_its_answer_or_a_newer_one() -> None:
    made = record((0.0, 0.1, 1))
    waiting = asyncio.create_task(made.wait_for(3, patience=5.0))
    for version in (2, 4):
        await asyncio.sleep(0)
        made.add(0.2, 0.3, version)
    assert await waiting


async def test_waiting_for_a_version_that_never_answers_ends() -> None:
    assert not await record((0.0, 0.1, 1)).wait_for(2, patience=0.01)
