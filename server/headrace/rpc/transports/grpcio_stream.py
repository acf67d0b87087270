"""ModelStreamInfer on grpc.aio: many requests on one call, answered in their order.

A request is submitted as soon as it is read, so that those of one stream run side by side and share batches; its answer waits
for the answers before it. What fails is reported in the stream, which goes on, unless the client asked for a status.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc

from headrace.errors import BackendError, HeadraceError
from headrace.requests import Answer, InferRequest
from headrace.rpc.inference import InferenceService
from headrace.rpc.status import status_details
from headrace.rpc.transports.grpcio_calls import Context, FutureReply, LoopOutlet, reply_deadline
from headrace.wire.stream_responses import encode_stream_error, encode_stream_response

MAX_DUE = 1024
"""Requests of one stream that may wait for their answers; beyond it nothing is read, and the client feels it by flow control.
A client that sends and never reads would otherwise fill the memory."""


@dataclass(slots=True, eq=False)
class _Due:
    """A request whose answer is not written yet; `request` is None when it could not be decoded."""

    reply: FutureReply
    request: InferRequest | None
    was_admitted: bool


class InferStream:
    """One call. Owns the answers that are due, in order."""

    def __init__(self, inference: InferenceService, outlet: LoopOutlet, context: Context) -> None:
        self._inference = inference
        self._outlet = outlet
        self._context = context
        self._deadline = reply_deadline(context)
        self._metadata = context.invocation_metadata()
        self._ends_with_status = ("triton_grpc_error", "true") in self._metadata
        self._order: asyncio.Queue[_Due | None] = asyncio.Queue()
        self._due: set[_Due] = set()
        self._room = asyncio.Semaphore(MAX_DUE)
        self._error: HeadraceError | None = None

    def __repr__(self) -> str:
        return f"InferStream({len(self._due)} answers due)"

    def close(self, error: HeadraceError) -> None:
        """Answer what was read so far, then end the call with `error`."""
        self._error = error
        self._order.put_nowait(None)

    async def run(self, messages: AsyncIterator[bytes]) -> HeadraceError | None:
        """Serve until the client has sent all and got all. Returns the error that ends the call otherwise."""
        try:
            async with asyncio.TaskGroup() as group:
                reader = group.create_task(self._read(messages))
                await self._write()
                reader.cancel()
        finally:
            for due in self._due:
                self._inference.cancel(due.reply)
        return self._error

    async def _read(self, messages: AsyncIterator[bytes]) -> None:
        loop = asyncio.get_running_loop()
        identify = self._inference.identify
        peer = self._context.peer() if identify is not None else ""
        async for message in messages:
            future: asyncio.Future[Answer] = loop.create_future()
            reply = FutureReply(self._outlet, future, self._deadline)
            if identify is not None:
                reply.caller = identify(self._metadata, peer)
            request = self._inference.submit(message, reply)
            due = _Due(reply, request, was_admitted=not future.done())
            self._due.add(due)
            self._order.put_nowait(due)
            await self._room.acquire()
        self._order.put_nowait(None)

    async def _write(self) -> None:
        while (due := await self._order.get()) is not None:
            answer = await due.reply.future
            self._due.discard(due)
            if isinstance(answer, HeadraceError):
                if self._ends_with_status:
                    self._error = answer
                    return
                # A tiny model may have run, and failed, before `submit` returned.
                was_admitted = due.was_admitted or isinstance(answer, BackendError)
                message = encode_stream_error(status_details(answer), due.request, was_admitted=was_admitted)
            else:
                message = encode_stream_response(answer)
            try:
                await self._context.write(message)
            except grpc.aio.BaseError:
                return  # the caller has gone
            self._room.release()
