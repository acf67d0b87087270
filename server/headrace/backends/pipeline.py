"""Batches under way on a device that works beside its host: launched by the worker's thread, finished by another."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence

from headrace.backends.base import PipelinedBackend
from headrace.backends.runner import BatchRunner, Launched
from headrace.batching.batcher import Batcher
from headrace.errors import DeviceLost
from headrace.requests import Ticket
from headrace.telemetry.log import get_logger

log = get_logger(__name__)

_LEAD_WEIGHT = 0.1


class Pipeline:
    """Owns the count of free lanes and the thread that waits for the device and answers. All methods are for the worker's thread.

    From the other thread are called `on_free`, whenever a batch has ended and its lane is free, and `on_lost`, when the device is gone.
    """

    def __init__(
        self,
        name: str,
        backend: PipelinedBackend,
        batcher: Batcher,
        runner: BatchRunner,
        on_free: Callable[[], None],
        on_lost: Callable[[DeviceLost], None],
    ) -> None:
        self._backend = backend
        self._batcher = batcher
        self._runner = runner
        self._on_free = on_free
        self._on_lost = on_lost
        self._lanes = threading.Semaphore(backend.lanes)
        self._launched: queue.SimpleQueue[Launched | None] = queue.SimpleQueue()
        self.lead = 0.0
        """Seconds that a batch needs on the host before the device can begin with it: a moving average."""
        self._thread = threading.Thread(target=self._finish_all, name=f"{name} answers", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"Pipeline({self._thread.name}, lead={self.lead:.6f})"

    def acquire(self) -> None:
        """Wait for a free lane and take it."""
        self._lanes.acquire()

    def give_back(self) -> None:
        """The lane is not needed after all."""
        self._lanes.release()

    def launch(self, tickets: Sequence[Ticket]) -> None:
        """Run a batch in the lane that was acquired."""
        taken = time.monotonic()
        self._launched.put(self._runner.launch(self._backend, tickets, taken))
        self.lead += _LEAD_WEIGHT * (time.monotonic() - taken - self.lead)

    def close(self) -> None:
        """Wait until what is under way has been answered."""
        self._launched.put(None)
        self._thread.join()

    def _finish_all(self) -> None:
        while (launched := self._launched.get()) is not None:
            self._finish(launched)
            del launched
            if self._runner.lost is not None:
                self._on_lost(self._runner.lost)
            self._lanes.release()
            self._on_free()

    def _finish(self, launched: Launched) -> None:
        try:
            self._batcher.settle(launched.tickets, self._runner.finish(launched))
            self._runner.show()
        except Exception:
            # Not the end of this thread: the worker's would wait for a lane for ever.
            log.exception("a batch's answers were not all delivered", thread=self._thread.name)
        finally:
            if launched.pending is not None:
                launched.pending.release()
