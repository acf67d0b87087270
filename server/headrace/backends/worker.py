"""The one thread that touches an instance's device: load, warm, then pull batches from the batcher until told to stop."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from headrace.backends.base import CPU, Backend, PipelinedBackend
from headrace.backends.pipeline import Pipeline
from headrace.backends.runner import BatchRunner
from headrace.batching.batch_queue import NEVER
from headrace.batching.batcher import Batcher
from headrace.errors import DeviceLost, HeadraceError, LoadError
from headrace.telemetry.log import get_logger
from headrace.threads import patient

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Seconds of one run by batch rows, the shortest seen; `failure` is why synthesised inputs could not be run, or empty."""

    seconds: Mapping[int, float]
    failure: str = ""


class Worker:
    """A thread and the instance that lives on it. Owns the doorbell and the stop flag; the backend belongs to the thread."""

    def __init__(self, name: str, backend: Backend) -> None:
        self.name = name
        self._backend = backend
        self._doorbell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_stopping = False
        self._work: tuple[Batcher, BatchRunner] | None = None
        self._inline: tuple[Batcher, BatchRunner, int] | None = None
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"Worker({self.name}, alive={self.is_alive})"

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def prepare(self, warm_up: Callable[[Backend], WarmUp], pause: float = 0.0) -> Future[WarmUp]:
        """Start the thread, load and, `pause` seconds later, warm there. After a failure the backend is closed and the thread gone."""
        ready: Future[WarmUp] = Future()
        self._thread = threading.Thread(target=self._main, args=(ready, warm_up, pause), name=self.name, daemon=True)
        self._thread.start()
        return ready

    def serve(self, batcher: Batcher, runner: BatchRunner) -> None:
        """Begin to pull batches. Called once, after `prepare` succeeded."""
        self._work = (batcher, runner)
        self._doorbell.put(None)

    def serve_inline(self, batcher: Batcher, runner: BatchRunner, max_rows: int) -> None:
        """Like `serve`, but while no more than `max_rows` wait they run on the thread that brought the last of them; on the CPU, that is:
        whoever brings a request does not wait for a device."""
        if isinstance(self._backend, PipelinedBackend) or self._backend.device != CPU:
            self.serve(batcher, runner)
            return
        self._work = (batcher, runner)
        self._inline = (batcher, runner, max_rows)
        self.wake()

    def wake(self) -> None:
        """Called by whoever has taken this instance off the batcher's idle list, and so for one thread at a time."""
        if self._inline is None:
            self._doorbell.put(None)
            return
        batcher, runner, max_rows = self._inline
        left = max_rows
        while batcher.pending_rows <= left:
            tickets, _ = batcher.take(self)
            if not tickets:
                return
            left -= sum([ticket.rows for ticket in tickets])
            answers = runner.run(self._backend, tickets, time.monotonic())
            batcher.settle(tickets, answers, runner.stretch)
            runner.show()
            if runner.lost is not None:
                self._lose(batcher, runner.lost)
                return
        # Too much to hold this thread up for. The instance is still off the idle list: it passes to its own thread, which puts
        # it back there once the queue is empty.
        self._doorbell.put(None)

    def stop(self) -> None:
        """Let the thread end after its present batch, or a load that can be interrupted, and close the backend there. Returns at once;
        `join` waits."""
        self._is_stopping = True
        self._backend.interrupt()
        self._doorbell.put(None)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread to end; False when it has not within `timeout`."""
        if self._thread is None:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _main(self, ready: Future[WarmUp], warm_up: Callable[[Backend], WarmUp], pause: float) -> None:
        # From here on nobody can cancel it: whoever waited may have gone, and the result still has a place.
        ready.set_running_or_notify_cancel()
        with patient():
            result = self._prepare(warm_up, pause)
        if isinstance(result, HeadraceError):
            # Closed first: whoever is told of the failure may count on the memory.
            self._close()
            ready.set_exception(result)
            return
        ready.set_result(result)
        try:
            self._doorbell.get()
            if self._work is not None:
                if isinstance(self._backend, PipelinedBackend):
                    self._pull_pipelined(self._backend, *self._work)
                else:
                    self._pull(*self._work)
        finally:
            # Batcher and worker refer to each other.
            self._work = self._inline = None
            self._close()

    def _prepare(self, warm_up: Callable[[Backend], WarmUp], pause: float) -> WarmUp | HeadraceError:
        """Load and warm; the reason when that went wrong, whatever the backend raised."""
        try:
            self._backend.load()
            time.sleep(pause)
            if self._is_stopping:
                return LoadError(f"{self.name}: stopped while it was loaded")
            return warm_up(self._backend)
        except HeadraceError as error:
            return error.with_traceback(None)
        except BaseException:
            log.exception("instance failed to load", worker=self.name)
            return LoadError("internal error while loading; the server's log has the reason")

    def _close(self) -> None:
        try:
            self._backend.close()
        except Exception:
            log.exception("instance failed to close", worker=self.name)

    def _pull(self, batcher: Batcher, runner: BatchRunner) -> None:
        while not self._is_stopping:
            tickets, until = batcher.take(self)
            if tickets:
                answers = runner.run(self._backend, tickets, time.monotonic())
                batcher.settle(tickets, answers, runner.stretch)
                runner.show()
                del tickets, answers
                if runner.lost is not None:
                    self._lose(batcher, runner.lost)
            else:
                self._wait(until)

    def _pull_pipelined(self, backend: PipelinedBackend, batcher: Batcher, runner: BatchRunner) -> None:
        pipeline = Pipeline(self.name, backend, batcher, runner, self._ring, lambda error: self._lose(batcher, error))
        try:
            while not self._is_stopping:
                pipeline.acquire()
                tickets, until = batcher.take(self, pipeline.lead)
                if tickets:
                    pipeline.launch(tickets)
                else:
                    pipeline.give_back()
                    self._wait(until)
        finally:
            pipeline.close()

    def _lose(self, batcher: Batcher, error: DeviceLost) -> None:
        """This instance's device is gone. What else it had under way there fails by itself."""
        batcher.lose(self, error)
        self.stop()

    def _ring(self) -> None:
        """Have the thread look again. One ring does for any number of reasons that it has not heard of yet."""
        if self._doorbell.empty():
            self._doorbell.put(None)

    def _wait(self, until: float) -> None:
        try:
            self._doorbell.get(timeout=None if until == NEVER else max(until - time.monotonic(), 0.0))
        except queue.Empty:
            pass
