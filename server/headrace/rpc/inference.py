"""ModelInfer, for any transport: bytes in, an answer at the reply."""

from __future__ import annotations

import time
from collections.abc import Iterable

from headrace.batching.together import TogetherSchedule
from headrace.errors import HeadraceError, NotReady
from headrace.lifecycle.view import ModelsView
from headrace.requests import InferRequest, Reply
from headrace.rpc.guard import as_known
from headrace.telemetry.access_log import AccessLog
from headrace.wire.request_layouts import RequestDecoder
from headrace.wire.shared_memory import Regions

MAX_RESOLVES = 4
"""A version can begin to drain between being found and being asked; the next look finds its successor. More than a few rounds
would mean that versions change faster than one request is handed over."""


class InferenceService:
    """Owns the decoder's memory of what requests look like, nothing else; any thread."""

    def __init__(
        self,
        models: ModelsView,
        access_log: AccessLog | None = None,
        together: TogetherSchedule | None = None,
        regions: Regions | None = None,
    ) -> None:
        self._models = models
        self._access_log = access_log
        self._together = together
        self._decode = RequestDecoder(regions).decode

    def submit(self, message: bytes, reply: Reply) -> InferRequest | None:
        """Take one ModelInfer message. Never waits and never raises; the reply is answered exactly once, now or later.

        Returns the request, for transports that answer in more than the reply; None when it could not be decoded.
        """
        arrived = time.monotonic()
        request = None
        try:
            request = self._decode(message)
            self._submit(request, reply, arrived)
        except Exception as error:
            known = as_known(error, "ModelInfer", request.id if request else "")
            if self._access_log is not None:
                self._record_refusal(self._access_log, request, reply, known, arrived)
            reply.fail(known)
        return request

    def submit_together(self, calls: Iterable[tuple[bytes, Reply]]) -> None:
        """As `submit` of each; models look at their queues once, after the last."""
        together = self._together
        if together is not None:
            together.begin()
        try:
            for message, reply in calls:
                self.submit(message, reply)
        finally:
            if together is not None:
                together.end()

    @property
    def wants_peer(self) -> bool:
        """Whether transports should set `reply.peer`; it costs too much to do it for nobody."""
        return self._access_log is not None

    @staticmethod
    def _record_refusal(access_log: AccessLog, request: InferRequest | None, reply: Reply, error: HeadraceError, arrived: float) -> None:
        access_log.record(
            id=request.id if request else "",
            model=request.model if request else "",
            version=0,
            code=error.code.value,
            rows=0,
            batch_rows=0,
            queue=0.0,
            compute=0.0,
            total=time.monotonic() - arrived,
            peer=reply.peer,
        )

    def _submit(self, request: InferRequest, reply: Reply, arrived: float) -> None:
        for attempt in range(1, MAX_RESOLVES + 1):
            version = self._models.choose(request)
            try:
                version.submit(request, reply, arrived)
                return
            except NotReady:
                if attempt == MAX_RESOLVES:
                    raise

    def cancel(self, reply: Reply) -> None:
        """The caller of `reply` went away: if its request still waits, it leaves the queue. Any thread, any time."""
        cancel = reply.cancel  # once: whoever settles the reply takes it away, perhaps right now
        if cancel is not None:
            cancel(reply)
