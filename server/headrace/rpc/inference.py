"""ModelInfer, for any transport: bytes in, an answer at the reply."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from headrace.errors import NotReady
from headrace.lifecycle.view import Call, ModelsView, Refused, Submits
from headrace.requests import Caller, InferRequest, Reply
from headrace.rpc.guard import as_known
from headrace.telemetry.records import Metadata, RequestRecords
from headrace.wire.request_layouts import RequestDecoder
from headrace.wire.shared_memory import Regions, place

MAX_RESOLVES = 4
"""A version can begin to drain between being found and being asked; the next look finds its successor. More than a few rounds
would mean that versions change faster than one request is handed over."""


class InferenceService:
    """Owns the decoder's memory of what requests look like, nothing else; any thread."""

    def __init__(self, models: ModelsView, records: RequestRecords | None = None, regions: Regions | None = None) -> None:
        self._models = models
        self._records = records
        self.identify: Callable[[Metadata, str], Caller | None] | None = records.identify if records is not None else None
        """What transports are to make each `reply.caller` with, of the call's metadata and its peer; it costs too much to do it for
        nobody."""
        self._regions = regions
        decoder = RequestDecoder()
        self._decode = decoder.decode
        self._sort = decoder.sort

    def submit(self, message: bytes, reply: Reply) -> InferRequest | None:
        """Take one ModelInfer message. Never waits and never raises; the reply is answered exactly once, now or later.

        Returns the request, for transports that answer in more than the reply; None when it could not be decoded.
        """
        arrived = time.monotonic()
        request = None
        try:
            request = self._decode(message)
            if request.uses_regions:
                place(request, self._regions)
            self._submit(request, reply, arrived)
        except Exception as error:
            self._refuse(request, reply, error, arrived)
        return request

    def submit_all(self, calls: Sequence[tuple[bytes, Reply]]) -> None:
        """As `submit` of each, for messages that came together: those for one model are queued before the first of them runs."""
        if len(calls) == 1:
            self.submit(*calls[0])
            return
        arrived = time.monotonic()
        alike, others = self._sort(calls)
        waiting: dict[Submits, list[Call]] = {}
        for group in alike:
            version = self._models.choose_for_all(group.first) if len(group.replies) > 1 and not group.first.uses_regions else None
            if version is None:
                self._choose(group.calls(), waiting, arrived)
                continue
            try:
                refused: Sequence[Refused] = version.submit_alike(group, arrived)
            except Exception as error:
                refused = [(request, reply, error) for request, reply in group.calls()]
            for request, reply, reason in refused:
                self._refuse_or_retry(request, reply, reason, arrived)
        if others:
            self._choose(self._decode_each(others, arrived), waiting, arrived)
        for submits, together in waiting.items():
            try:
                refused = submits.submit_all(together, arrived)
            except Exception as error:
                refused = [(request, reply, error) for request, reply in together]
            for request, reply, reason in refused:
                self._refuse_or_retry(request, reply, reason, arrived)

    def _decode_each(self, calls: Iterable[tuple[bytes, Reply]], arrived: float) -> Iterator[Call]:
        for message, reply in calls:
            try:
                request = self._decode(message)
            except Exception as error:
                self._refuse(None, reply, error, arrived)
                continue
            yield request, reply

    def _choose(self, calls: Iterable[Call], waiting: dict[Submits, list[Call]], arrived: float) -> None:
        """Put each with the others that go where it goes."""
        choose = self._models.choose
        for call in calls:
            request, reply = call
            try:
                if request.uses_regions:
                    place(request, self._regions)
                submits = choose(request)
            except Exception as error:
                self._refuse(request, reply, error, arrived)
                continue
            known = waiting.get(submits)
            if known is None:
                waiting[submits] = [call]
            else:
                known.append(call)

    def _refuse_or_retry(self, request: InferRequest, reply: Reply, error: Exception, arrived: float) -> None:
        try:
            if not isinstance(error, NotReady):
                raise error
            self._submit(request, reply, arrived)
        except Exception as final:
            self._refuse(request, reply, final, arrived)

    def _refuse(self, request: InferRequest | None, reply: Reply, error: Exception, arrived: float) -> None:
        caller = reply.caller
        known = as_known(error, "ModelInfer", request.id if request else "", caller.trace if caller is not None else None)
        if self._records is not None:
            self._records.refused(request, reply, known, arrived)
        reply.fail(known)

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
