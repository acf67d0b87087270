"""What runs on grpc.aio for each call: from raw bytes to a service, and from its answer to a status."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import grpc

from headrace.errors import HeadraceError
from headrace.requests import Answer, Reply
from headrace.rpc.admin import AdminCall, AdminService
from headrace.rpc.control import AsyncUnary, Unary
from headrace.rpc.guard import as_known, is_cancelled
from headrace.rpc.health import HealthService
from headrace.rpc.inference import InferenceService
from headrace.rpc.peer import Peer, read_peer
from headrace.rpc.status import STATUS, answer_metadata, status_details

Context = Any
"""grpc.aio's servicer context; it has no types."""
Serve = Callable[[Any, Context], Awaitable[Answer | None]]


class LoopOutlet:
    """Brings answers to the futures of the calls that wait: one hop to the loop for any number of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread = threading.get_ident()

    def deliver(self, answers: Sequence[tuple[Reply, Answer]]) -> None:
        if threading.get_ident() == self._thread:
            _settle(answers)
            return
        try:
            self._loop.call_soon_threadsafe(_settle, answers)
        except RuntimeError:
            # The loop is closed: the server was torn down, and every call with it.
            pass


class FutureReply(Reply):
    __slots__ = ("future",)

    def __init__(self, outlet: LoopOutlet, future: asyncio.Future[Answer], deadline: float | None) -> None:
        super().__init__(outlet, deadline)
        self.future = future


def _settle(answers: Sequence[tuple[Reply, Answer]]) -> None:
    for reply, answer in answers:
        assert isinstance(reply, FutureReply)
        # Ticket and reply refer to each other; left alone, each request's message would wait for the garbage collector.
        reply.ticket = reply.cancel = None
        # Done already when the call was cancelled: nobody waits for this answer.
        if not reply.future.done():
            reply.future.set_result(answer)


def reply_deadline(context: Context) -> float | None:
    """The call's deadline on time.monotonic()'s clock."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def guarded(call: str, serve: Serve) -> Callable[[Any, Context], Awaitable[bytes | None]]:
    """The function to register for a method: `serve`, with whatever it returns or raises turned into a response or a status."""

    async def handle(request: Any, context: Context) -> bytes | None:
        try:
            answer = await serve(request, context)
            if not isinstance(answer, HeadraceError):
                return answer
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            answer = as_known(error, call)
        except grpc.aio.BaseError:
            # The call itself is broken, mostly because the caller has gone; grpc.aio wants its own error back.
            raise
        except Exception as error:
            answer = as_known(error, call)
        await context.abort(STATUS[answer.code], status_details(answer))
        raise AssertionError("abort always raises")

    return handle


def serve_unary(call: Unary) -> Serve:
    async def serve(message: bytes, context: Context) -> Answer:
        return call(message)

    return serve


def serve_slow_unary(call: AsyncUnary) -> Serve:
    async def serve(message: bytes, context: Context) -> Answer:
        return await call(message)

    return serve


def serve_admin(call: AdminCall) -> Serve:
    async def serve(message: bytes, context: Context) -> Answer:
        return await call(message, _peer(context))

    return serve


def _peer(context: Context) -> Peer:
    return read_peer(context.peer(), context.auth_context())


def serve_inference(inference: InferenceService, outlet: LoopOutlet, loop: asyncio.AbstractEventLoop) -> Serve:
    async def serve(message: bytes, context: Context) -> Answer:
        future: asyncio.Future[Answer] = loop.create_future()
        reply = FutureReply(outlet, future, reply_deadline(context))
        if inference.identify is not None:
            reply.caller = inference.identify(context.invocation_metadata(), context.peer())
            if trailers := answer_metadata(reply):
                context.set_trailing_metadata(trailers)
        inference.submit(message, reply)
        try:
            return await future
        except asyncio.CancelledError:
            # The client has gone or its deadline has passed.
            inference.cancel(reply)
            raise

    return serve


def serve_watch(health: HealthService) -> Serve:
    async def serve(message: bytes, context: Context) -> None:
        async with aclosing(health.watch(message)) as statuses:
            async for status in statuses:
                await context.write(status)

    return serve


def serve_events(admin: AdminService) -> Serve:
    async def serve(message: bytes, context: Context) -> None:
        async with aclosing(admin.watch(message, _peer(context))) as events:
            async for event in events:
                await context.write(event)

    return serve
