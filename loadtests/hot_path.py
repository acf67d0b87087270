"""What the interpreter costs a tiny request: a server in this process, whose native transport receives from a front made of Python.

    python -m loadtests.hot_path --core 0

No sockets, no HTTP/2, no other thread at work, the same code again and again: microseconds a request, least and median over the
batches of each size. A real connection costs two to three times as much, and the more the less there is to do (docs/decisions/0008);
what this is for is to see, in seconds and within some hundredths, what a change of the path does.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import queue
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from headrace.rpc.transports import native
from headrace.testing import serve_in_process

from loadtests.calls import infer_message
from loadtests.models import MLP, MLP_WIDTHS, write_repository

SIZES = (1, 16, 64)


class Front:
    """Stands in for NativeGrpcFront: gives out one batch of calls again and again, and times how long it is until it is asked for more."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[bytes, int, int, list[float]] | None] = queue.SimpleQueue()
        self._left: tuple[bytes, int, int, list[float]] | None = None
        self._given = 0.0
        self._ids = 0
        self.bound_port = 1
        self.answers = 0
        self.failures = 0
        self.done = threading.Event()

    def start(self) -> None: ...

    def set_fallback(self, path: str) -> None: ...

    def run(self, message: bytes, size: int, batches: int) -> list[float]:
        """Seconds from a batch's hand-over to the call for the next one, for each of so many batches."""
        taken: list[float] = []
        self.done.clear()
        self._jobs.put((message, size, batches, taken))
        self.done.wait()
        return taken

    def recv_batch_details(self, most: int) -> list[Any] | None:
        now = time.perf_counter()
        if self._left is not None:
            message, size, batches, taken = self._left
            taken.append(now - self._given)
            if len(taken) == batches:
                self._left = None
                self.done.set()
        if self._left is None:
            self._left = self._jobs.get()
            if self._left is None:
                return None
            message, size, batches, taken = self._left
        first, self._ids = self._ids, self._ids + size
        # A copy each, as each has its own when it was received.
        events = [(0, first + i, 0, bytes(bytearray(message)), "peer", ((), "peer", None)) for i in range(size)]
        self._given = time.perf_counter()
        return events

    def respond(self, call_id: int, message: bytes, *rest: object) -> bool:
        self.answers += 1
        return True

    def fail(self, call_id: int, *rest: object) -> bool:
        self.failures += 1
        return True

    def metrics(self) -> dict[str, Any]:
        return {"methods": {}}

    def close(self) -> None:
        self._jobs.put(None)


async def measure(sizes: Sequence[int], batches: int) -> dict[int, list[float]]:
    """Seconds a batch by its size."""
    front = Front()
    bind, native._bind = native._bind, lambda address, paths: front  # type: ignore[assignment, return-value]
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_repository(Path(folder), {MLP: None})
            message = infer_message(MLP, {"x": np.random.default_rng(1).standard_normal((1, MLP_WIDTHS[0]), np.float32)})
            async with serve_in_process(folder, transport="native"):
                found = {}
                for size in sizes:
                    await asyncio.to_thread(front.run, message, size, 200)
                    found[size] = await asyncio.to_thread(front.run, message, size, batches)
    finally:
        native._bind = bind
    if front.failures or front.answers != sum(size * (batches + 200) for size in sizes):
        raise SystemExit(f"expected an answer to every call, got {front.answers} and {front.failures} failures")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="loadtests.hot_path", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core", type=int, help="run on this core alone")
    parser.add_argument("--batches", type=int, default=3000, help="of each size (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    found = asyncio.run(measure(SIZES, options.batches))
    for size, seconds in found.items():
        least, median = (each / size * 1e6 for each in (min(seconds), statistics.median(seconds)))
        print(f"in batches of {size:3}: {least:6.2f} µs a request at least, {median:6.2f} in the median of {len(seconds)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
