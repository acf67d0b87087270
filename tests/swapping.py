"""A manager over fake backends and a source that a test changes by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from headrace.backends.base import Array, Backend
from headrace.config import ModelConfig
from headrace.errors import HeadraceError
from headrace.lifecycle.manager import ModelManager
from headrace.lifecycle.state import VersionState
from headrace.requests import Reply
from headrace.rpc.inference import InferenceService
from headrace.sources.base import ModelRef, VersionRef
from headrace.testing import CollectingOutlet, FakeBackend, FakeSource
from headrace.wire.messages import ModelInferRequest, ModelInferResponse


def no_timer(when: float, callback: Callable[[], None]) -> None:
    raise AssertionError("nothing here expires")


def scaling(**behaviour: Any) -> type[FakeBackend]:
    """y = x times the version's number: an answer tells which version gave it. Keywords replace attributes and methods."""

    def execute(self: FakeBackend, inputs: Mapping[str, Array], outputs: Any) -> list[Array]:
        return [inputs["x"] * np.float32(int(self.path.parent.name))]

    base: Any = FakeBackend.make()
    return type("Scaling", (base,), {"execute": execute, **behaviour})


class Swapping:
    """Owns the manager, the source and the directory of the models."""

    def __init__(self, root: Path, backend: type[Backend]) -> None:
        self.root = root
        self.source = FakeSource()
        self.models = ModelManager({"fake": backend}, lambda: no_timer, drain_grace=5.0, pause=0.0)
        self.inference = InferenceService(self.models)

    def offer(self, *versions: int, model: str = "m", tokens: Mapping[int, str] | None = None, **config: Any) -> None:
        refs = {}
        for version in versions:
            directory = self.root / model / str(version)
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "model.fake").touch()
            refs[version] = VersionRef((tokens or {}).get(version, "token"), str(directory))
        self.source.models[model] = ModelRef(model, ModelConfig(model, **config), refs)

    async def take(self) -> None:
        """Hand the listing over, without waiting for what comes of it."""
        self.models.take(self.source, await self.source.list())

    async def publish(self, *versions: int, model: str = "m", tokens: Mapping[int, str] | None = None, **config: Any) -> None:
        """Offer, and wait until nothing moves any more."""
        self.offer(*versions, model=model, tokens=tokens, **config)
        await self.take()
        await self.rest()

    async def rest(self) -> None:
        await self.models.settle()
        await self.until(lambda: all(v.state in (VersionState.LIVE, VersionState.FAILED) for v in self.models.find("", "")))
        await self.models.settle()

    async def until(self, condition: Callable[[], bool]) -> None:
        changed = asyncio.Event()
        unsubscribe = self.models.subscribe(changed.set)
        try:
            async with asyncio.timeout(10):
                while not condition():
                    changed.clear()
                    await changed.wait()
        finally:
            unsubscribe()

    def submit(self, value: float = 1.0, *, model: str = "m", version: str = "", id: str = "") -> tuple[CollectingOutlet, Reply]:
        outlet = CollectingOutlet()
        reply = Reply(outlet)
        tensor = ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=(1, 2))
        message = ModelInferRequest(
            model_name=model, model_version=version, id=id, inputs=[tensor], raw_input_contents=[np.full(2, value, "<f4").tobytes()]
        )
        self.inference.submit(message.SerializeToString(), reply)
        return outlet, reply

    async def ask(self, value: float = 1.0, **request: Any) -> tuple[int, float]:
        """(version that answered, first element of the answer). Raises the error that came instead."""
        return await self.answer(*self.submit(value, **request))

    async def answer(self, outlet: CollectingOutlet, reply: Reply) -> tuple[int, float]:
        """The same of a request that was submitted."""
        answer = await asyncio.to_thread(outlet.wait, reply)
        if isinstance(answer, HeadraceError):
            raise answer
        message = ModelInferResponse.FromString(answer)
        return int(message.model_version), float(np.frombuffer(message.raw_output_contents[0], "<f4")[0])

    def index(self) -> dict[str, tuple[str, str]]:
        return {f"{row.model}:{row.version}": (row.state, row.reason) for row in self.models.index()}

    def events(self, *kinds: str) -> list[tuple[str, int]]:
        return [(event.kind, event.version) for event in self.models.event_log.since(0) if event.kind in kinds]
