"""grpc.health.v1: Check and Watch for the server ("" and the inference service) and for each model by its name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from headrace.errors import HeadraceError, InvalidRequest, NotFound
from headrace.lifecycle.view import ModelsView
from headrace.wire.messages import SERVICE, message_class

HealthCheckRequest = message_class("grpc.health.v1.HealthCheckRequest")
HealthCheckResponse = message_class("grpc.health.v1.HealthCheckResponse")
SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3


class HealthService:
    """Event loop only. Owns the set of watchers' events, so that shutting down can end them."""

    def __init__(self, models: ModelsView) -> None:
        self._models = models
        self._changed: set[asyncio.Event] = set()
        self._is_closed = False
        models.subscribe(self._notify)

    def _notify(self) -> None:
        for event in self._changed:
            event.set()

    def close(self) -> None:
        """End every watch; the last thing a watcher has seen is NOT_SERVING."""
        self._is_closed = True
        self._notify()

    def check(self, message: bytes) -> bytes:
        service = _decode(message)
        status = self._status(service)
        if status == SERVICE_UNKNOWN:
            raise NotFound(f"health: unknown service '{service}'; expected '', '{SERVICE}' or a model's name")
        return bytes(HealthCheckResponse(status=status).SerializeToString())

    async def watch(self, message: bytes) -> AsyncIterator[bytes]:
        """The status now and after every change, until the server closes or the caller goes."""
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
                    yield bytes(HealthCheckResponse(status=status).SerializeToString())
                if self._is_closed:
                    return
                await changed.wait()
        finally:
            self._changed.discard(changed)

    def _status(self, service: str) -> int:
        if service in ("", SERVICE):
            return SERVING if self._models.is_ready else NOT_SERVING
        if not any(entry.model == service for entry in self._models.index()):
            return SERVICE_UNKNOWN
        try:
            self._models.resolve(service, "")
        except HeadraceError:
            return NOT_SERVING
        return SERVING


def _decode(message: bytes) -> str:
    try:
        return str(HealthCheckRequest.FromString(message).service)
    except Exception as error:
        raise InvalidRequest(f"could not decode the HealthCheckRequest: {error}") from None
