"""The loaded copies of one version: where each goes, how they are loaded and warmed up, and what becomes of them."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from headrace.backends.base import Backend, DeviceSpace, select_file
from headrace.backends.runner import BatchRunner
from headrace.backends.worker import WarmUp, Worker
from headrace.batching.batcher import Batcher, Instance
from headrace.batching.latency import Neighbours
from headrace.errors import DeviceLost
from headrace.lifecycle.devices import Devices
from headrace.lifecycle.effective import EffectiveModel
from headrace.lifecycle.inspection import Inspection
from headrace.lifecycle.recorded import Recorded
from headrace.lifecycle.warm_up import Known, batch_sizes, warm_up
from headrace.telemetry.log import get_logger

log = get_logger(__name__)

LONGEST_JOIN = 30.0
SHORTEST_JOIN = 1.0
"""Seconds for instances to end their last batch and close, also when the grace is used up: most need milliseconds."""

Look = Callable[[Callable[[], Sequence[DeviceSpace]]], Awaitable[Sequence[DeviceSpace]]]


class Instances:
    """Owns the workers of one version, their runners, and the device of each that serves. Event loop only.

    Refers to nothing of its version: what is unloaded goes at once, and does not wait for the garbage collector.
    """

    def __init__(self, model: str, version: int, devices: Devices) -> None:
        self._model = model
        self._version = version
        self._devices = devices
        self._backends: list[Backend] = []
        """Between `make` and the end of `warm_up`."""
        self._workers: list[Worker] = []
        self._places: dict[Worker, str] = {}
        """The device of each that serves."""
        self._runners: list[BatchRunner] = []

    def __repr__(self) -> str:
        return f"Instances({self._model}:{self._version}, {len(self._places)} of {len(self._workers)} serve)"

    @property
    def is_alive(self) -> bool:
        """Whether a thread still runs, serving or left behind inside a call that cannot be interrupted."""
        return any(worker.is_alive for worker in self._workers)

    @property
    def devices(self) -> list[str]:
        return sorted(set(self._places.values()))

    def interference(self) -> Neighbours:
        return self._devices.interference(self._places.values())

    # -- load ----------------------------------------------------------------------------------------------------------

    async def make(self, effective: EffectiveModel, directory: Path, backend: type[Backend], inspection: Inspection, look: Look) -> None:
        """Choose a device for each; nothing is loaded yet. `look` runs what may be slow beside the loop. Raises LoadError, DeviceLost."""
        path = select_file(directory, effective.filename)
        instances, is_signed = effective.instances, inspection.is_signed
        needed = inspection.needed // instances.count
        spaces = await look(lambda: backend.devices(instances.device))
        places = self._devices.place(self, self._model, instances.count, instances.device, needed, spaces)
        placed = [dataclasses.replace(instances, device=place) for place in places]
        self._backends = [effective.make(backend, path, each, is_signed=is_signed) for each in placed]
        self._workers = [Worker(f"{self._model}:{self._version}#{number}", each) for number, each in enumerate(self._backends)]

    async def warm_up(
        self, effective: EffectiveModel, known: Known, recorded: Recorded, pause: float, on_lost: Callable[[Worker, str, DeviceLost], None]
    ) -> WarmUp:
        """Load them and run each batch size. Raises what that raises of the first that cannot; then none is left, and of each whose
        device it was `on_lost` is told."""
        batching = effective.batching
        warm = functools.partial(
            warm_up,
            signature=effective.signature,
            sizes=batch_sizes(batching.max_batch_size or 0, batching.allowed_batch_sizes),
            runs=effective.config.warmup_runs,
            must_run_all=bool(batching.allowed_batch_sizes),  # then each may have work of its own that is done once
            known=known,
            recorded=recorded,
        )
        backends, self._backends = self._backends, []
        ready = [asyncio.wrap_future(worker.prepare(warm, pause)) for worker in self._workers]
        results = await asyncio.gather(*ready, return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            workers = self._workers
            await self._stop_all()
            for worker, each, result in zip(workers, backends, results, strict=True):
                if isinstance(result, DeviceLost):
                    on_lost(worker, each.device, result)
            raise errors[0].with_traceback(None)
        for device, reason in self._devices.find_lost([each.device for each in backends]).items():
            # While it was loaded, another version's batch found that out.
            await self._stop_all()
            raise DeviceLost(f"device '{device}' was lost: {reason}")
        self._places = {worker: each.device for worker, each in zip(self._workers, backends, strict=True)}
        self._devices.settle(self, self._model, self._version, [(each.device, each.device_memory) for each in backends])
        return next(result for result in results if isinstance(result, WarmUp))

    # -- serve ---------------------------------------------------------------------------------------------------------

    def serve(self, batcher: Batcher, make_runner: Callable[[], BatchRunner], inline: int) -> None:
        """Have them pull batches; up to so many `inline` rows run on the thread that brings them."""
        for worker in self._workers:
            runner = make_runner()
            self._runners.append(runner)
            if inline:
                worker.serve_inline(batcher, runner, inline)
            else:
                worker.serve(batcher, runner)

    def screen_outputs(self, on: bool) -> None:
        """Count answers with NaN or infinity from the next batch on, or no longer."""
        for runner in self._runners:
            runner.screen_outputs = on

    def on(self, device: str) -> list[Worker]:
        """Those that serve there."""
        return [worker for worker, place in self._places.items() if place == device]

    def find(self, instance: Instance) -> tuple[Worker, str] | None:
        """One that serves, and its device."""
        return next((found for found in self._places.items() if found[0] is instance), None)

    def take_out(self, workers: Sequence[Worker]) -> int:
        """These serve no more. Returns how many are left."""
        for worker in workers:
            self._devices.drop(self, self._places.pop(worker), 1)
            worker.stop()
        return len(self._places)

    # -- the end -------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Have them end, in their own time."""
        for worker in self._workers:
            worker.stop()

    def release(self) -> None:
        """Their devices are free for others."""
        self._devices.release(self)

    async def close(self, deadline: float) -> None:
        """Stop them. Those inside a call have until `deadline`, by time.monotonic(), to end it; after that they end by themselves."""
        now = time.monotonic()
        self._workers = await stop_workers(self._workers, min(max(deadline, now + SHORTEST_JOIN), now + LONGEST_JOIN))
        self._places = {}
        self._runners = []

    async def _stop_all(self) -> None:
        self._workers = await stop_workers(self._workers, time.monotonic() + LONGEST_JOIN)


async def stop_workers(workers: Sequence[Worker], until: float) -> list[Worker]:
    """Returns those that are still inside their backend at `until`, by time.monotonic(); they end by themselves after that call."""
    for worker in workers:
        worker.stop()
    remaining = [worker for worker in workers if not await asyncio.to_thread(worker.join, max(until - time.monotonic(), 0.0))]
    for worker in remaining:
        log.error("worker did not end", worker=worker.name)
    return remaining
