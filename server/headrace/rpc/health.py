"""grpc.health.v1 for the server ("" and the inference service), each model by its name, and each version as model:version."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from google.protobuf.message import DecodeError

from headrace.errors import HeadraceError, InvalidRequest, NotFound
from headrace.lifecycle.view import ModelsView
from headrace.wire.messages import SERVICE, HealthCheckRequest, HealthCheckResponse, HealthListResponse


class HealthService:
    """Event loop only. Owns one event a watcher, by which changes reach it; nothing polls."""

    def __init__(self, models: ModelsView) -> None:
        self._models = models
        self._changed: set[asyncio.Event] = set()
        self._is_closed = False
        models.subscribe(self._notify)

    def __repr__(self) -> str:
        return f"HealthService({len(self._changed)} watchers, closed={self._is_closed})"

    def methods(self) -> dict[str, Callable[[bytes], bytes]]:
        return {"Check": self.check, "List": self.list}

    def _notify(self) -> None:
        for event in self._changed:
            event.set()

    def close(self) -> None:
        """End every watch, after the models have announced the stop: the last thing a watcher sees is NOT_SERVING."""
        self._is_closed = True
        self._notify()

    def check(self, message: bytes) -> bytes:
        service = _decode(message)
        status = self._status(service)
        if status == HealthCheckResponse.SERVICE_UNKNOWN:
            raise NotFound(f"health: unknown service '{service}'; expected '', '{SERVICE}', a model or model:version")
        return HealthCheckResponse(status=status).SerializeToString()

    def list(self, message: bytes) -> bytes:
        names = {"", SERVICE, *(entry.model for entry in self._models.index())}
        statuses = {name: HealthCheckResponse(status=self._status(name)) for name in names}
        return HealthListResponse(statuses=statuses).SerializeToString()

    async def watch(self, message: bytes) -> AsyncGenerator[bytes, None]:
        """The status now and after every change, until the server closes or the caller goes. An unknown service may become known."""
        service = _decode(message)
        changed = asyncio.Event()
        self._changed.add(changed)
        last = None
        try:
            while True:
                changed.clear()
                status = self._status(service)
                if status != last:
                    last = status
                    yield HealthCheckResponse(status=status).SerializeToString()
                elif self._is_closed:
                    return
                else:
                    await changed.wait()
        finally:
            self._changed.discard(changed)

    def _status(self, service: str) -> int:
        if service in ("", SERVICE):
            return HealthCheckResponse.SERVING if self._models.is_ready else HealthCheckResponse.NOT_SERVING
        models = {entry.model for entry in self._models.index()}
        model, version = service, ""
        if model not in models:
            model, _, version = service.rpartition(":")
            if model not in models or not self._is_known(model, version):
                return HealthCheckResponse.SERVICE_UNKNOWN
        if not self._models.is_live:
            return HealthCheckResponse.NOT_SERVING  # it still answers, but is not to be sent more
        try:
            self._models.resolve(model, version)
        except HeadraceError:
            return HealthCheckResponse.NOT_SERVING
        return HealthCheckResponse.SERVING

    def _is_known(self, model: str, version: str) -> bool:
        """By number or label."""
        try:
            return bool(version and self._models.find(model, version))
        except HeadraceError:
            return False


def _decode(message: bytes) -> str:
    try:
        return HealthCheckRequest.FromString(message).service
    except DecodeError as error:
        raise InvalidRequest(f"could not decode the HealthCheckRequest: {error}") from None
