"""Threads that work beside those that serve."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

LOW_PRIORITY = 10
"""Niceness: a tenth of the share of a core that is busy with serving, all of one that is idle."""

T = TypeVar("T")


def lower_priority() -> None:
    """Of the calling thread, for good: raising it again takes a privilege. Threads that it starts inherit it."""
    if sys.platform == "linux":
        # On Linux a thread has a niceness of its own, reached by its thread id; elsewhere it would be the whole process's.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW_PRIORITY)


def run_at_low_priority(work: Callable[[], T], name: str) -> T:
    """What `work` returns or raises, from a thread of its own, which is waited for. For threads that may block."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        lower_priority()
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
