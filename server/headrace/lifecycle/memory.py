"""How much memory there is to load into, and giving it back. Linux; elsewhere nothing is known and nothing is done. Blocking."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from headrace.threads import patient

PLENTY = 1 << 62
"""Bytes; what is taken to be available where nobody can say."""

_CGROUP = Path("/sys/fs/cgroup")


def available_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int:
    """Bytes that this process can still take: the machine's, or less where its container has a limit (cgroup v2)."""
    available = PLENTY
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
        limit = (cgroup / "memory.max").read_text().strip()
        if limit != "max":
            # The page cache counts as used here and is given up before anything fails.
            statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
            used = int((cgroup / "memory.current").read_text()) - int(statistics.get("inactive_file", 0))
            available = min(available, max(int(limit) - used, 0))
    except (OSError, ValueError):
        pass
    return available


def resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


_M_ARENA_MAX = -8
ARENAS = 2


def limit_arenas() -> None:
    """Keep glibc from giving threads heaps of their own, each of which keeps remainders of every model that was in it: swapping
    magika a hundred times, one after the other, left 200 MB and growing; with two heaps 136 MB after 20 swaps and after 100.

    For the whole process, so only a command calls it. Who sets MALLOC_ARENA_MAX decides.
    """
    if sys.platform == "linux" and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_ARENA_MAX, ARENAS)


def return_memory() -> None:
    """Hand freed memory back to the system: glibc keeps it otherwise, and a server that swaps models grows by each of them."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            with patient():
                trim(0)
