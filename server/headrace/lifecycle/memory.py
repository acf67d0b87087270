"""How much memory there is to load into, and giving it back. Linux; elsewhere nothing is known and nothing is done. Blocking."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
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
    _set_malloc({_M_ARENA_MAX: ARENAS}, "MALLOC_ARENA_MAX")


_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
KEPT_BYTES = 128 << 20
LARGEST_KEPT = 32 << 20
"""The most that glibc takes."""


def keep_buffers() -> None:
    """Have glibc keep freed memory for the next message, up to KEPT_BYTES a heap, until `return_memory`: by itself it hands back what
    is above the largest block freed so far, and messages of 602 kB took 130 page faults each, a third of their CPU time. Setting
    either threshold alone makes it worse, because that ends their adapting to what is allocated.

    For the whole process, as above.
    """
    _set_malloc({_M_TRIM_THRESHOLD: KEPT_BYTES, _M_MMAP_THRESHOLD: LARGEST_KEPT}, "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def _set_malloc(parameters: Mapping[int, int], *variables: str) -> None:
    """Unless one of the variables, by which operators say the same, is set. Not glibc: nothing happens."""
    if sys.platform != "linux" or any(variable in os.environ for variable in variables):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in parameters.items():
            mallopt(parameter, value)


def return_memory() -> None:
    """Hand freed memory back to the system: glibc keeps it otherwise, and a server that swaps models grows by each of them."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            with patient():
                trim(0)
