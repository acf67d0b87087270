"""Models whose versions answer as a test says: what the services and transports are tried on without a batcher or a backend."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from headrace.backends.base import ArtifactSignature
from headrace.batching.latency import LatencyStats
from headrace.config import ModelConfig
from headrace.drift.verdict import DriftReport
from headrace.errors import Cancelled, InvalidRequest, NotFound, NotReady
from headrace.lifecycle.effective import EffectiveModel, resolve
from headrace.lifecycle.state import INDEX_STATES, VersionState
from headrace.lifecycle.view import Call, IndexEntry, Refused, submit_each
from headrace.requests import Answer, InferRequest, InputTensor, Reply, RequestedOutput
from headrace.signature import DataType, Signature, TensorSpec
from headrace.telemetry.counters import VersionCounters
from headrace.wire.codec import ResponseEncoder
from headrace.wire.messages import ModelInferRequest

ARTIFACT = ArtifactSignature((TensorSpec("x", DataType.FP32, (-1, -1)),), (TensorSpec("y", DataType.FP32, (-1, -1)),))

Script = Callable[["ScriptedVersion", InferRequest], Answer | None]


def echo(version: ScriptedVersion, request: InferRequest) -> Answer:
    """y = x."""
    tensor = request.inputs[0]
    array = np.frombuffer(tensor.data, np.float32).reshape(tensor.shape)
    return ResponseEncoder(version.model, str(version.version), ARTIFACT.outputs).encode(request.id, (0,), [array], 0, len(array), True)


def hold(version: ScriptedVersion, request: InferRequest) -> None:
    """No answer until `release`."""
    return


def infer_message(model: str = "echo", rows: int = 1, columns: int = 4, *, version: str = "", id: str = "", value: float = 1.0) -> bytes:
    data = np.full((rows, columns), value, np.float32).tobytes()
    tensor = ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=(rows, columns))
    message = ModelInferRequest(model_name=model, model_version=version, id=id, inputs=[tensor], raw_input_contents=[data])
    return message.SerializeToString()


class ScriptedVersion:
    """Answers from a thread of its own, as a worker would, what `script` returns; raises what `script` raises; None is held."""

    def __init__(self, model: str = "echo", version: int = 1, script: Script = echo, state: VersionState = VersionState.LIVE) -> None:
        self.model = model
        self.version = version
        self.script = script
        self.state = state
        self.reason = ""
        config = ModelConfig(name=model)
        self.effective: EffectiveModel | None = resolve(
            config, ARTIFACT, backend="scripted", platform="scripted_model", filename="model.scripted", labels={}
        )
        self.signature: Signature | None = self.effective.signature
        self.counters = VersionCounters()
        self.pending_rows = 0
        self.pending_requests = 0
        self.load_seconds = 0.0
        self.latency_stats: LatencyStats | None = None
        self.drift: DriftReport | None = None
        self.requests: list[InferRequest] = []
        self.replies: list[Reply] = []
        self.held: dict[Reply, InferRequest] = {}
        self.cancelled: list[Reply] = []
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.pool = ThreadPoolExecutor(1)

    def submit(self, request: InferRequest, reply: Reply, arrived: float) -> None:
        assert self.signature is not None
        self.signature.validate(request)
        self.requests.append(request)
        self.replies.append(reply)
        try:
            answer = self.script(self, request)
            reply.cancel = self._cancel
            if answer is None:
                self.held[reply] = request
            else:
                self.pool.submit(reply.outlet.deliver, [(reply, answer)])
        finally:
            self._tell()

    def submit_all(self, calls: Sequence[Call], arrived: float) -> list[Refused]:
        return submit_each(self, calls, arrived)

    def _cancel(self, reply: Reply) -> None:
        if self.held.pop(reply, None) is not None:
            self.cancelled.append(reply)
            self._tell()
            reply.fail(Cancelled("the caller cancelled the request"))

    def _tell(self) -> None:
        """Requests come on the loop or, natively, on a thread of their own."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._changed.set)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what a request or its cancellation brings about."""
        self._loop = asyncio.get_running_loop()
        async with asyncio.timeout(5):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def release(self, script: Script = echo) -> None:
        """Answer everything that is held."""
        held, self.held = self.held, {}
        answers = [(reply, script(self, request)) for reply, request in held.items()]
        for reply, answer in answers:
            assert answer is not None
            self.pool.submit(reply.outlet.deliver, [(reply, answer)])

    def close(self) -> None:
        self.pool.shutdown()


class ScriptedModels:
    """A ModelsView of versions that a test changes by hand; `changed` tells the subscribers."""

    def __init__(self, *versions: ScriptedVersion) -> None:
        self.versions = list(versions)
        self.is_live = True
        self.is_ready = True
        self.labels: dict[str, int] = {}
        """Of every model."""
        self.subscribers: list[Callable[[], None]] = []

    def resolve(self, model: str, version: str) -> ScriptedVersion:
        found = self.find(model, version)
        if not found:
            raise NotFound(f"Request for unknown model: '{model}' is not found")
        live = [each for each in found if each.state is VersionState.LIVE]
        if not live:
            raise NotReady(f"Request for unknown model: '{model}' version {found[0].version} is not at ready state")
        return live[-1]

    def choose(self, request: InferRequest) -> ScriptedVersion:
        return self.resolve(request.model, request.version)

    def choose_for_all(self, request: InferRequest) -> None:
        return None

    def find(self, model: str, version: str) -> Sequence[ScriptedVersion]:
        version = str(self.labels.get(version, version))
        if version and not version.isdecimal():
            raise InvalidRequest(f"model version: expected a number such as '1' or nothing, got {version!r}")
        return [each for each in self.versions if model in ("", each.model) and version in ("", str(each.version))]

    def index(self) -> Sequence[IndexEntry]:
        return [IndexEntry(each.model, str(each.version), INDEX_STATES[each.state], each.reason) for each in self.versions]

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        self.subscribers.append(callback)
        return lambda: self.subscribers.remove(callback)

    def changed(self) -> None:
        for callback in self.subscribers:
            callback()

    def announce_stop(self) -> None:
        self.is_live = self.is_ready = False
        self.changed()

    def close(self) -> None:
        for version in self.versions:
            version.close()


def make_request(model: str = "echo", *, version: str = "", id: str = "", outputs: Sequence[str] = ()) -> InferRequest:
    data = np.ones((1, 4), np.float32).tobytes()
    return InferRequest(model, version, id, [InputTensor("x", "FP32", (1, 4), data)], [RequestedOutput(name) for name in outputs])
