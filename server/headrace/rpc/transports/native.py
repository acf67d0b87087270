"""The services on pygrpc-native's low-level front: HTTP/2 in Rust outside the GIL, calls in batches, answers from any thread.

Theory of operation. Each listener has a front, and a thread that receives from it. That thread submits the ModelInfer calls of
a batch itself and lets tiny models run there; workers answer from their own threads; the event loop sees none of it. The other
unary methods are served on the loop, one hop for those of a batch. What the front cannot do (streams that clients send,
watches, reflection) it forwards to a grpc.aio server on a Unix socket that only this user can reach; that server also has the
ports with TLS.

Rules for changing this file: it is the only one that knows pygrpc-native. A call that was received leaves in `deliver`, exactly
once, whatever became of it. The front bounds neither the size of messages nor how many wait, so `_take` does both, and the thread
must never wait for anything, or calls pile up uncounted behind it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from pygrpc_native import EVENT_CALL, NativeGrpcFront

from headrace.config import ServerConfig
from headrace.errors import Cancelled, ConfigError, HeadraceError, MessageTooLarge, QueueFull, ShuttingDown
from headrace.lifecycle.tasks import Tasks
from headrace.requests import Answer, Reply
from headrace.rpc.admin import AdminCall
from headrace.rpc.control import AsyncUnary, Unary
from headrace.rpc.guard import as_known, is_cancelled
from headrace.rpc.peer import read_peer
from headrace.rpc.status import STATUS, answer_metadata, status_details
from headrace.rpc.transports.base import Services
from headrace.rpc.transports.grpcio import GrpcioTransport
from headrace.rpc.transports.listeners import SOCKET_MODE, UNIX, bind_problem, clear_stale_socket
from headrace.telemetry.log import get_logger
from headrace.wire.messages import ADMIN_SERVICE, FEEDBACK_SERVICE, HEALTH_SERVICE, SERVICE

log = get_logger(__name__)

MAX_EVENTS = 64
"""Calls that are taken at a time. More would let the first of them wait for the decoding of the last."""

QUIET_WITHIN = 0.5
"""Seconds that a stopping server waits for a moment without calls before it refuses new ones."""
STALLED = 2.0
"""Seconds after which those are given up that neither send nor read, once nobody else waits."""
CLOSE_WITHIN = 5.0
"""Seconds that a closed listener's thread may take to end; it may be inside a model."""
SENT_POLL = 0.002
"""Seconds between its looks at what has been sent."""

Serve = Callable[[bytes, str], Awaitable[bytes]]
"""A unary method: the message and the caller's address to the response. Raises HeadraceError."""


class NativeReply(Reply):
    __slots__ = ("call_id", "size", "task")

    def __init__(self, outlet: _Listener, call_id: int, size: int, deadline: float | None) -> None:
        # Not by super(): a call for each request, of a fifth of a microsecond.
        self.outlet = outlet
        self.deadline = deadline
        self.caller = self.ticket = self.cancel = None
        self.call_id = call_id
        self.size = size
        self.task: asyncio.Task[None] | None = None


class NativeTransport:
    """Owns the listeners and the grpc.aio server behind them. Built on the event loop."""

    def __init__(self, services: Services, config: ServerConfig) -> None:
        self._config = config
        self._directory = _private_directory()
        behind = f"{UNIX}{self._directory.name}/{_STREAMS}"
        secured = [address for address in config.grpc if not can_serve(address, config)]
        self._behind = GrpcioTransport(services, dataclasses.replace(config, grpc=(behind, *secured)))
        self._methods = _unary_methods(services)
        self._services = services
        self._listeners: list[_Listener] = []

    def __repr__(self) -> str:
        return f"NativeTransport({self._listeners!r})"

    async def start(self) -> list[str]:
        behind, *secured = await self._behind.start()
        try:
            return [self._listen(address, behind) if can_serve(address, self._config) else secured.pop(0) for address in self._config.grpc]
        except BaseException:
            await self.stop(0.0)
            raise

    def _listen(self, address: str, behind: str) -> str:
        listener = _Listener(address, self._services, self._methods, behind.removeprefix(UNIX), self._config)
        self._listeners.append(listener)
        return listener.start()

    async def stop(self, grace: float) -> None:
        until = time.monotonic() + grace
        # First, because what the server behind them still sends goes through them.
        await self._behind.stop(grace)
        await self._drain(until)
        # What the fronts count as sent is in their connections' buffers.
        await asyncio.sleep(SENT_POLL)
        await asyncio.gather(*(listener.close() for listener in self._listeners))
        self._directory.cleanup()

    async def _drain(self, until: float) -> None:
        """Wait for a moment at which every call is answered and the answer sent.

        The fronts cannot close their sockets alone, and calls keep coming on connections that are open. A call that is refused is one
        that failed, a closed connection on the other hand tells callers to go elsewhere. So calls are served on, in the hope of a
        moment without any; under a load that leaves none they are refused from QUIET_WITHIN on. Callers that do not send the
        rest of their request, or do not read their answer, are waited for STALLED longer.
        """
        refuse_at = time.monotonic() + QUIET_WITHIN
        stalled_at = refuse_at + STALLED
        while (now := time.monotonic()) < until and not all(listener.has_sent_all() for listener in self._listeners):
            if now >= refuse_at:
                for listener in self._listeners:
                    listener.refuse()
                if any(listener.is_busy for listener in self._listeners):
                    stalled_at = now + STALLED
                elif now >= stalled_at:
                    return
            await asyncio.sleep(SENT_POLL)


_STREAMS = "streams.sock"
_LONGEST_SOCKET = 107
"""Bytes of a Unix socket's path."""


def _private_directory() -> tempfile.TemporaryDirectory[str]:
    """For the socket between the fronts and the server behind them. Raises ConfigError."""
    try:
        directory = tempfile.TemporaryDirectory(prefix="headrace-")
    except OSError as error:
        reason = f"{error}"
    else:
        if len(os.fsencode(directory.name)) + 1 + len(_STREAMS) <= _LONGEST_SOCKET:
            return directory
        reason = f"{directory.name} is too long for the path of a socket"
        directory.cleanup()
    raise ConfigError(f"transport native: expected TMPDIR to name a directory for a socket, got: {reason}; or use transport grpcio")


def can_serve(address: str, config: ServerConfig) -> bool:
    """The front has no TLS, and Unix sockets need none."""
    return address.startswith(UNIX) or not config.tls_certificate


class _Listener:
    """One address: its front, the thread that receives, and every call that is not answered yet. An Outlet."""

    def __init__(self, address: str, services: Services, methods: dict[str, Serve], behind: str, config: ServerConfig) -> None:
        self._inference = services.inference
        self._serves = [*methods.values()]
        self._max_message = config.max_message_bytes
        self._max_bytes = config.max_inflight_bytes
        self._loop = asyncio.get_running_loop()
        self._tasks = Tasks()
        self._socket_file = Path(address.removeprefix(UNIX)) if address.startswith(UNIX) else None
        self._front = _bind(address, [_INFER, *methods])
        self._front.set_fallback(behind)
        self._address = address if self._socket_file else f"{address.rpartition(':')[0]}:{self._front.bound_port}"
        self._thread = threading.Thread(target=self._receive, name=f"receive {self._address}", daemon=True)
        self._lock = threading.Lock()
        self._calls: dict[int, NativeReply] = {}
        self._bytes = 0
        self._is_refusing = False

    def __repr__(self) -> str:
        return f"_Listener({self._address}, {len(self._calls)} calls, {self._bytes} bytes)"

    def start(self) -> str:
        """Returns the address, its port filled in."""
        self._front.start()
        self._thread.start()
        return self._address

    # -- receiving: the listener's thread ------------------------------------------------------------------------------

    def _receive(self) -> None:
        while True:
            try:
                events = self._front.recv_batch_details(MAX_EVENTS)
            except Exception:
                log.exception("calls could not be received", address=self._address)  # want of memory; others may need less
                continue
            if events is None:
                return
            try:
                self._take(events)
            except Exception as error:
                self._give_up(events, as_known(error, "receive"))

    def _give_up(self, events: Sequence[Any], error: HeadraceError) -> None:
        """A bug in `_take`: nobody shall wait for ever, and the next batch must not pay for it."""
        for event in events:
            reply = self._calls.get(event[1])
            if reply is not None and reply.ticket is None and reply.task is None:
                reply.fail(error)

    def _take(self, events: Sequence[Any]) -> None:
        now = time.monotonic()
        inferences: list[tuple[bytes, Reply]] = []
        others: list[tuple[NativeReply, Serve, bytes, str]] = []
        cancelled: list[int] = []
        identify = self._inference.identify
        size = 0
        for kind, call_id, method, message, _, details in events:
            if kind != EVENT_CALL:
                cancelled.append(call_id)
                continue
            metadata, peer, left = details
            reply = NativeReply(self, call_id, len(message), None if left is None else now + left)
            self._calls[call_id] = reply
            size += reply.size
            if method:
                reply.cancel = self._cancel_task
                others.append((reply, self._serves[method - 1], message, peer))
            else:
                if identify is not None:
                    reply.caller = identify(metadata, peer)
                inferences.append((message, reply))
        if not self._count(size):
            inferences, others = self._sort_out(inferences, others)
        if inferences:
            self._inference.submit_all(inferences)
        if others:
            self._on_loop(self._start_tasks, others)
        for call_id in cancelled:
            if (known := self._calls.get(call_id)) is not None:
                self._inference.cancel(known)

    def _count(self, size: int) -> bool:
        """Of the messages of a batch; whether all of them may go on as they are."""
        with self._lock:
            self._bytes += size
            return not self._is_refusing and self._bytes <= self._max_bytes and size <= self._max_message

    def _sort_out(
        self, inferences: list[tuple[bytes, Reply]], others: list[tuple[NativeReply, Serve, bytes, str]]
    ) -> tuple[list[tuple[bytes, Reply]], list[tuple[NativeReply, Serve, bytes, str]]]:
        """Answer those that cannot be admitted; the others. Only inferences wait for room: what asks how the server is must get through."""
        room = self._max_bytes - self._bytes + sum([len(message) for message, _ in inferences])
        admitted = []
        for message, reply in inferences:
            error = self._refusal(len(message), room)
            if error is None:
                admitted.append((message, reply))
                room -= len(message)
            else:
                reply.fail(error)
        served = []
        for call in others:
            error = self._refusal(len(call[2]), self._max_message)
            if error is None:
                served.append(call)
            else:
                call[0].fail(error)
        return admitted, served

    def _refusal(self, size: int, room: int) -> HeadraceError | None:
        if self._is_refusing:
            return ShuttingDown("the server is shutting down")
        if size > self._max_message:
            return MessageTooLarge(f"received message larger than max ({size} vs. {self._max_message} bytes, max_message_bytes)")
        if size > room and self._bytes > size:  # alone it may be as large as it likes
            return QueueFull(f"Exceeds maximum bytes in flight: {self._bytes} of {self._max_bytes} wait, got {size} more")
        return None

    # -- answering: any thread -----------------------------------------------------------------------------------------

    def deliver(self, answers: Sequence[tuple[Reply, Answer]]) -> None:
        front, calls, limit = self._front, self._calls, self._max_message
        is_plain = self._inference.identify is None
        size = 0
        for reply, answer in answers:
            assert isinstance(reply, NativeReply)
            # Ticket and reply refer to each other; left alone, each request's message would wait for the garbage collector.
            reply.ticket = reply.cancel = None
            call_id = reply.call_id
            if calls.pop(call_id, None) is None:
                continue  # given up
            size += reply.size
            # Both return False when the caller has gone.
            if isinstance(answer, HeadraceError):
                front.fail(call_id, STATUS[answer.code].value[0], status_details(answer), answer_metadata(reply))
            elif len(answer) > limit:
                self._fail_too_large(call_id, len(answer))
            elif is_plain:
                front.respond(call_id, answer)
            else:
                front.respond(call_id, answer, None, answer_metadata(reply))
        with self._lock:
            self._bytes -= size

    def _fail_too_large(self, call_id: int, size: int) -> None:
        text = f"response larger than max ({size} vs. {self._max_message} bytes, max_message_bytes)"
        self._front.fail(call_id, STATUS[MessageTooLarge.code].value[0], text)

    def _on_loop(self, callback: Callable[..., object], *given: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *given)
        except RuntimeError:
            # The loop is closed: the server was torn down, and every call with it.
            pass

    # -- other methods: the event loop ---------------------------------------------------------------------------------

    def _start_tasks(self, calls: Sequence[tuple[NativeReply, Serve, bytes, str]]) -> None:
        for reply, serve, message, peer in calls:
            reply.task = self._tasks.start(self._answer(reply, serve(message, peer)), f"call {reply.call_id}")

    async def _answer(self, reply: NativeReply, work: Awaitable[bytes]) -> None:
        answer: Answer = Cancelled("the caller cancelled the call")
        try:
            answer = await work
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            answer = as_known(error, "unary")
        except Exception as error:
            answer = as_known(error, "unary")
        finally:
            reply.task = None
            self.deliver([(reply, answer)])

    def _cancel_task(self, reply: Reply) -> None:
        assert isinstance(reply, NativeReply)

        def cancel() -> None:
            if reply.task is not None:
                reply.task.cancel()

        # A turn later: a task that is cancelled before it has begun never comes to deliver its answer.
        self._on_loop(self._loop.call_soon, cancel)

    # -- stopping: the event loop --------------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether a call waits for its answer."""
        return bool(self._calls)

    def refuse(self) -> None:
        """New calls from now on."""
        self._is_refusing = True

    def has_sent_all(self) -> bool:
        """Every answer to every call. Asked and not told: that it was given to the front does not mean that HTTP/2's windows have let it
        through."""
        counted = self._front.metrics()
        assert counted is not None, "the front was made to count"
        methods = counted["methods"].values()
        return all(method["started"] == sum(status["count"] for status in method["status"].values()) for method in methods)

    async def close(self) -> None:
        """Callers that still wait are told UNAVAILABLE, and nothing runs for them any more."""
        await asyncio.to_thread(self._front.close)
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, CLOSE_WITHIN)
        await self._tasks.close()
        for reply in [*self._calls.values()]:
            self._inference.cancel(reply)


_INFER = f"/{SERVICE}/ModelInfer"


def _unary_methods(services: Services) -> dict[str, Serve]:
    """By path, all but ModelInfer."""
    methods: dict[str, Serve] = {}
    for service, offered in ((SERVICE, services.control.methods()), (HEALTH_SERVICE, services.health.methods())):
        methods.update((f"/{service}/{name}", _at_once(call)) for name, call in offered.items())
    methods.update((f"/{SERVICE}/{name}", _slow(call)) for name, call in services.control.slow_methods().items())
    if services.feedback is not None:
        methods.update((f"/{FEEDBACK_SERVICE}/{name}", _slow(call)) for name, call in services.feedback.methods().items())
    if services.admin is not None:
        # Here and not behind: there every caller comes by a Unix socket and would pass for local.
        methods.update((f"/{ADMIN_SERVICE}/{name}", _admin(call)) for name, call in services.admin.methods().items())
    return methods


def _at_once(call: Unary) -> Serve:
    async def serve(message: bytes, peer: str) -> bytes:
        return call(message)

    return serve


def _slow(call: AsyncUnary) -> Serve:
    async def serve(message: bytes, peer: str) -> bytes:
        return await call(message)

    return serve


def _admin(call: AdminCall) -> Serve:
    async def serve(message: bytes, peer: str) -> bytes:
        return await call(message, read_peer(peer, {}))

    return serve


def _bind(address: str, paths: Sequence[str]) -> NativeGrpcFront:
    """Raises ConfigError."""
    if address.startswith(UNIX):
        clear_stale_socket(Path(address.removeprefix(UNIX)))
    try:
        # metrics: to know, when stopping, what has been sent; no cost could be seen.
        front = NativeGrpcFront(address, [(path, False) for path in paths], io_threads=_io_threads(), call_details=True, metrics=True)
    except OSError:
        if address.startswith(UNIX):
            expected = "expected a path of at most 107 bytes in a writable directory"
            raise ConfigError(f"grpc: could not listen on {address}: {expected}") from None
        raise ConfigError(f"grpc: could not listen on {address}: {bind_problem(address)}") from None
    if address.startswith(UNIX):
        Path(address.removeprefix(UNIX)).chmod(SOCKET_MODE)
    return front


def _io_threads() -> int:
    """One core: with two threads an empty call costs a third more. Two do more than Python can answer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if cores <= 2 else 2
