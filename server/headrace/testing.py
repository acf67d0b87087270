"""Test doubles that are part of the product: a backend and a source made of plain values, a loop whose time is virtual, and a
whole server in the running event loop. For the tests of Headrace and of whoever extends it; needs nothing but the package."""

from __future__ import annotations

import asyncio
import dataclasses
import selectors
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from headrace.backends.base import Array, ArtifactSignature, Backend, Pending, PipelinedBackend
from headrace.config import InstanceConfig, ServerConfig, SourceConfig
from headrace.errors import HeadraceError
from headrace.requests import Answer, Reply
from headrace.signature import DataType, TensorSpec
from headrace.sources.base import Fetched, Listing, ModelRef, Source

Execute = Callable[[Mapping[str, Array]], list[Array]]


class FakeBackend(Backend):
    """y = x, or whatever `execute` says. `make` gives a class with its own behaviour, as the registry wants classes."""

    name = "fake"
    default_filename = "model.fake"
    platform = "fake"
    artifact: ClassVar[ArtifactSignature] = ArtifactSignature(
        (TensorSpec("x", DataType.FP32, (-1, 2)),), (TensorSpec("y", DataType.FP32, (-1, 2)),)
    )
    behaviour: ClassVar[Execute] = staticmethod(lambda inputs: [inputs["x"].copy()])
    load_error: ClassVar[HeadraceError | None] = None
    live: ClassVar[list[FakeBackend]]
    """Instances loaded and not yet closed."""

    def __init__(self, path: Path, instance: InstanceConfig) -> None:
        super().__init__(path, instance)
        self.batches: list[dict[str, Array]] = []
        self.threads: set[int] = set()

    @classmethod
    def make(
        cls, execute: Execute | None = None, *, artifact: ArtifactSignature | None = None, load_error: HeadraceError | None = None
    ) -> type[FakeBackend]:
        body: dict[str, Any] = {"live": [], "load_error": load_error}
        if execute is not None:
            body["behaviour"] = staticmethod(execute)
        if artifact is not None:
            body["artifact"] = artifact
        return type("FakeBackend", (cls,), body)

    @classmethod
    def inspect(cls, path: Path) -> ArtifactSignature:
        return cls.artifact

    @classmethod
    def estimate_memory(cls, path: Path) -> int:
        return 0

    def load(self) -> None:
        if self.load_error is not None:
            raise self.load_error
        self.live.append(self)

    def execute(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> list[Array]:
        self.batches.append(dict(inputs))
        self.threads.add(threading.get_ident())
        arrays = type(self).behaviour(inputs)
        names = [spec.name for spec in self.artifact.outputs]
        return arrays if outputs is None else [arrays[names.index(name)] for name in outputs]

    def close(self) -> None:
        if self in self.live:
            self.live.remove(self)


class FakePipelinedBackend(FakeBackend, PipelinedBackend):
    """The same on a device of its own, a thread that runs one batch after the other. While `gate` is not set the device is busy.

    A lane's memory is overwritten when it is released, as the next batch would: whoever reads it later gets NaN.
    """

    def __init__(self, path: Path, instance: InstanceConfig) -> None:
        super().__init__(path, instance)
        self.gate = threading.Event()
        self.gate.set()
        self.most_in_flight = 0
        self._in_flight: set[_FakePending] = set()
        self._device = ThreadPoolExecutor(1, thread_name_prefix="fake device")

    def stage(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Array]:
        datatypes = {spec.name: spec.datatype.dtype for spec in self.artifact.inputs}
        return {name: np.empty(shape, datatypes[name]) for name, shape in shapes.items()}

    def launch(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> Pending:
        pending = _FakePending(self._in_flight, self._device.submit(self._run, inputs, outputs), inputs)
        self._in_flight.add(pending)
        self.most_in_flight = max(self.most_in_flight, len(self._in_flight))
        return pending

    def execute(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> list[Array]:
        return PipelinedBackend.execute(self, inputs, outputs)

    def _run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> list[Array]:
        self.gate.wait()
        return FakeBackend.execute(self, inputs, outputs)

    def close(self) -> None:
        self._device.shutdown()
        super().close()


class _FakePending(Pending):
    def __init__(self, in_flight: set[_FakePending], result: Future[list[Array]], inputs: Mapping[str, Array]) -> None:
        self._in_flight = in_flight
        self._result = result
        self._arrays = [array for array in inputs.values() if array.flags.writeable]

    def wait(self) -> list[Array]:
        arrays = self._result.result()
        self._arrays += arrays
        return arrays

    def release(self) -> None:
        for array in self._arrays:
            array[...] = np.nan
        self._in_flight.remove(self)


class FakeSource(Source):
    """Offers what is put into `models`, whose locations are local directories; raises `error` when one is set."""

    def __init__(self, models: Mapping[str, ModelRef] | None = None) -> None:
        super().__init__("fake://", SourceConfig())
        self.models = dict(models or {})
        self.errors: dict[str, str] = {}
        self.error: Exception | None = None
        self.changed = asyncio.Event()

    async def list(self) -> Listing:
        if self.error is not None:
            raise self.error
        return Listing(dict(self.models), dict(self.errors))

    async def fetch(self, model: ModelRef, version: int) -> Fetched:
        directory = Path(model.versions[version].location)
        return Fetched(directory.parent, directory)

    async def wait_for_change(self) -> None:
        await self.changed.wait()
        self.changed.clear()


class CollectingOutlet:
    """Keeps every answer by reply; an answer for a reply that has one already is a fault of the server."""

    def __init__(self) -> None:
        self.answers: dict[Reply, Answer] = {}
        self._arrived = threading.Condition()

    def deliver(self, answers: Sequence[tuple[Reply, Answer]]) -> None:
        with self._arrived:
            for reply, answer in answers:
                assert reply not in self.answers, f"{reply!r} was answered twice: {self.answers[reply]!r}, then {answer!r}"
                self.answers[reply] = answer
            self._arrived.notify_all()

    def wait(self, reply: Reply, timeout: float = 10.0) -> Answer:
        """The answer of one reply, from a thread that may block. Raises TimeoutError."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: reply in self.answers, timeout):
                raise TimeoutError(f"{reply!r} has had no answer for {timeout} s")
            return self.answers[reply]


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop that jumps to its next timer instead of waiting for it. `asyncio.sleep(3600)` takes no time."""

    def __init__(self) -> None:
        super().__init__(_JumpingSelector(self))
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        ready = super().select(0)
        if not ready:
            self._loop.advance(timeout)
        return ready


@asynccontextmanager
async def serve_in_process(models: str | Path | Sequence[str | Path], **options: Any) -> AsyncIterator[Any]:
    """A whole server on free loopback ports, ready when it is entered: `async with serve_in_process(folder) as server`.

    Yields the app.Server; `server.grpc_addresses[0]` is where clients connect. `options` are ServerConfig's.
    """
    from headrace.app import Server  # the app imports everything, which plain unit tests need not

    folders = [models] if isinstance(models, (str, Path)) else models
    config = ServerConfig(models=tuple(map(str, folders)), grpc=("127.0.0.1:0",), http="127.0.0.1:0", shutdown_grace=5.0)
    server = Server(dataclasses.replace(config, **options))
    try:
        await server.start()
        yield server
    finally:
        await server.stop()
