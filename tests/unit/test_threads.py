from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
import threading

import pytest
from headrace import threads
from headrace.threads import be_patient, expect_little_work, patient


def slice_of_this_thread() -> float:
    """Seconds, by sched_getattr(2)."""
    buffer = ctypes.create_string_buffer(48)
    number = {"x86_64": 315, "aarch64": 275}[platform.machine()]
    assert ctypes.CDLL(None).syscall(number, 0, buffer, 48, 0) == 0
    return float(struct.unpack("=IIQiIQQQ", buffer.raw)[5]) / 1e9


def in_a_thread(work: object) -> list[float]:
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.extend(work()))  # type: ignore[operator]
    thread.start()
    thread.join()
    return found


def has_slices() -> bool:
    """From Linux 6.12 on, and not in every sandbox."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return False

    def work() -> list[float]:
        be_patient()
        return [slice_of_this_thread()]

    return in_a_thread(work) == [threads.LONG_SLICE]


@pytest.mark.skipif(not has_slices(), reason="this kernel gives threads no slices of their own")
def test_slices_are_the_threads_own_and_taken_back_without_a_privilege() -> None:
    def work() -> list[float]:
        before = slice_of_this_thread()
        with patient():
            long = slice_of_this_thread()
        after = slice_of_this_thread()
        expect_little_work()
        return [before, long, after, slice_of_this_thread(), float(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))]

    before, long, after, short, nice = in_a_thread(work)
    assert (long, after, short) == (threads.LONG_SLICE, before, threads.SHORT_SLICE)
    assert nice == os.getpriority(os.PRIO_PROCESS, 0)
    assert slice_of_this_thread() == before


def test_where_the_kernel_knows_no_slices_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_SCHED_SETATTR", None)
    with patient():
        pass
