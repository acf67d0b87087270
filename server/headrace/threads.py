"""How the kernel treats our threads: those that answer go first, those that load wait.

By the length of a thread's time slice (EEVDF, Linux 6.12): one with a short slice is let in as soon as it wakes, also before another
one's slice is over; one with a long slice waits longer for its turn, and gets as much of the core all the same. It takes no
privilege and can be taken back, unlike a niceness; and a thread of low niceness that waits for the GIL or holds it is a trap: CPython
hands the GIL to whoever has waited longest, and everybody waits until that one is scheduled. Elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SHORT_SLICE = 100e-6
"""Seconds; the shortest that the kernel grants."""
LONG_SLICE = 50e-3

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}.get(platform.machine())
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
"""sched_setattr(2): size, policy, flags, nice, priority, runtime (the slice of an ordinary thread), deadline, period."""


def expect_little_work() -> None:
    """Of the calling thread: it wakes often and is soon done, and others wait for it. An event loop's."""
    _set_slice(SHORT_SLICE)


def be_patient() -> None:
    """The calling thread lets others go first from here on, and so do those that it starts."""
    _set_slice(LONG_SLICE)


@contextmanager
def patient() -> Iterator[None]:
    """As `be_patient`, for a while."""
    be_patient()
    try:
        yield
    finally:
        _set_slice(0.0)


def _set_slice(seconds: float) -> None:
    """0: the kernel's own. Best effort: what fails on an older kernel, or in a sandbox, was only a wish."""
    if sys.platform == "linux" and _SCHED_SETATTR is not None:
        nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_OTHER, 0, nice, 0, round(seconds * 1e9), 0, 0)
        ctypes.CDLL(None).syscall(_SCHED_SETATTR, 0, attributes, 0)
