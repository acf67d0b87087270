from __future__ import annotations

import threading
from collections.abc import Callable

from headrace.batching.together import TogetherSchedule


def recording() -> tuple[TogetherSchedule, list[str]]:
    ran: list[str] = []

    def otherwise(callback: Callable[[], None]) -> None:
        ran.append("otherwise")
        callback()

    return TogetherSchedule(otherwise), ran


def test_callbacks_of_what_came_together_run_once_and_after_all_of_it() -> None:
    schedule, ran = recording()

    def look() -> None:
        ran.append("look")

    schedule.begin()
    for _ in range(3):
        schedule(look)
        assert ran == []
    schedule.end()
    assert ran == ["look"]


def test_outside_and_on_other_threads_callbacks_go_on_as_they_are() -> None:
    schedule, ran = recording()
    schedule.begin()
    thread = threading.Thread(target=schedule, args=(lambda: ran.append("look"),))
    thread.start()
    thread.join()
    assert ran == ["otherwise", "look"]
    schedule.end()
    schedule(lambda: ran.append("look"))
    assert ran == ["otherwise", "look", "otherwise", "look"]


def test_a_callback_that_fails_does_not_keep_the_others_from_running() -> None:
    schedule, ran = recording()

    def fail() -> None:
        raise RuntimeError("boom")

    schedule.begin()
    schedule(fail)
    schedule(lambda: ran.append("look"))
    schedule.end()
    assert ran == ["look"]


def test_what_a_callback_schedules_does_not_wait_for_the_next_time() -> None:
    schedule, ran = recording()
    schedule.begin()
    schedule(lambda: schedule(lambda: ran.append("look")))
    schedule.end()
    assert ran == ["otherwise", "look"]
