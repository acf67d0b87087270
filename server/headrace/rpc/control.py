"""Every call but inference: what the server is, what it serves, how it does. From memory only, so that none waits for a disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headrace.errors import HeadraceError, InvalidRequest, Unsupported
from headrace.lifecycle.state import VersionState
from headrace.lifecycle.view import ModelsView, VersionView
from headrace.telemetry.counters import CounterSnapshot
from headrace.wire.config_pbtxt import model_config_message
from headrace.wire.messages import SERVICE, Message, method_classes

EXTENSIONS = ("model_repository", "schedule_policy", "model_configuration", "binary_tensor_data", "parameters", "statistics")
"""What ServerMetadata lists. Clients switch features on by it: only what works may stand here."""

Unary = Callable[[bytes], bytes]


class ControlService:
    """Stateless but for what it is told at the start. Event loop only."""

    def __init__(self, models: ModelsView, *, server_name: str, server_version: str) -> None:
        self._models = models
        self._server_name = server_name
        self._server_version = server_version

    def methods(self) -> dict[str, Unary]:
        """Every unary method of the service but ModelInfer, by name; those not offered raise Unsupported."""
        handlers: dict[str, Callable[[Message, Message], None]] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._repository_index,
        }
        skip = ("ModelInfer", "ModelStreamInfer")
        return {
            name: _unary(request, response, handlers.get(name) or _unsupported(name))
            for name, (request, response) in method_classes(SERVICE).items()
            if name not in skip
        }

    def _server_live(self, request: Message, response: Message) -> None:
        response.live = self._models.is_live

    def _server_ready(self, request: Message, response: Message) -> None:
        response.ready = self._models.is_ready

    def _model_ready(self, request: Message, response: Message) -> None:
        # Triton's clients expect OK with ready = false for a model that is not there.
        try:
            self._models.resolve(request.name, request.version)
        except InvalidRequest:
            raise
        except HeadraceError:
            response.ready = False
        else:
            response.ready = True

    def _server_metadata(self, request: Message, response: Message) -> None:
        response.name = self._server_name
        response.version = self._server_version
        response.extensions.extend(EXTENSIONS)

    def _model_metadata(self, request: Message, response: Message) -> None:
        version = self._models.resolve(request.name, request.version)
        assert version.effective is not None  # a live version was inspected
        response.name = version.model
        response.versions.extend(
            str(v.version) for v in self._models.find(request.name, request.version) if v.state is VersionState.LIVE
        )
        response.platform = version.effective.platform
        for target, specs in ((response.inputs, version.effective.signature.inputs), (response.outputs, version.effective.signature.outputs)):
            for spec in specs:
                target.add(name=spec.name, datatype=spec.datatype.value, shape=spec.shape)

    def _model_config(self, request: Message, response: Message) -> None:
        effective = self._models.resolve(request.name, request.version).effective
        assert effective is not None
        response.config.CopyFrom(model_config_message(effective))

    def _model_statistics(self, request: Message, response: Message) -> None:
        versions = [v for v in self._models.find(request.name, request.version) if v.state is VersionState.LIVE]
        if not versions and request.name:
            raise InvalidRequest(f"requested model '{request.name}' is not available")
        for version in versions:
            _write_statistics(response.model_stats.add(), version)

    def _repository_index(self, request: Message, response: Message) -> None:
        _check_repository_name(request.repository_name)
        for entry in self._models.index():
            if not request.ready or entry.state == "READY":
                response.models.add(name=entry.model, version=entry.version, state=entry.state, reason=entry.reason)


def _check_repository_name(name: str) -> None:
    if name:
        raise Unsupported(f"'repository_name': expected nothing, got {name!r}; requests for one repository are not supported")


def _unary(request: type[Message], response: type[Message], handler: Callable[[Message, Message], None]) -> Unary:
    def call(message: bytes) -> bytes:
        try:
            parsed = request.FromString(message)
        except Exception as error:
            raise InvalidRequest(f"could not decode the {request.DESCRIPTOR.name}: {error}") from None
        answer = response()
        handler(parsed, answer)
        return bytes(answer.SerializeToString())

    return call


def _unsupported(name: str) -> Callable[[Message, Message], None]:
    def refuse(request: Message, response: Message) -> None:
        raise Unsupported(f"{name} is not implemented by this server")

    return refuse


def _write_statistics(target: Any, version: VersionView) -> None:
    counted = version.counters.snapshot()
    target.name = version.model
    target.version = str(version.version)
    target.last_inference = round(counted.last_inference * 1000)
    target.inference_count = counted.rows
    target.execution_count = counted.batches
    _write_durations(target.inference_stats, counted)
    for rows, sums in counted.batch_sizes.items():
        batch = target.batch_stats.add(batch_size=rows)
        for duration, seconds in (
            (batch.compute_input, sums.compute_input),
            (batch.compute_infer, sums.compute),
            (batch.compute_output, sums.compute_output),
        ):
            duration.count = sums.executions
            duration.ns = round(seconds * 1e9)


def _write_durations(target: Any, counted: CounterSnapshot) -> None:
    durations = (target.success, target.queue, target.compute_input, target.compute_infer, target.compute_output)
    for duration, seconds in zip(durations, counted.seconds, strict=True):
        duration.count = counted.success
        duration.ns = round(seconds * 1e9)
    target.fail.count = sum(counted.failures)
    target.cache_hit.SetInParent()
    target.cache_miss.SetInParent()
