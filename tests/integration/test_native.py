"""What only the native transport has to take care of."""

from __future__ import annotations

import asyncio
import gc
import weakref

import grpc
import pytest
from headrace.requests import Answer, InferRequest, Ticket
from scripted_models import ScriptedVersion, echo, hold, infer_message
from served_models import serve_on

MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
serve = serve_on("native")


async def refusal(call: grpc.aio.Call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), raised.value.details() or ""


async def test_a_request_larger_than_a_message_may_be_is_refused_and_the_connection_goes_on() -> None:
    message = infer_message(columns=1000)
    options = [("grpc.max_send_message_length", -1)]
    async with serve(ScriptedVersion(), max_message_bytes=2000) as served, grpc.aio.insecure_channel(served.address, options) as channel:
        infer = channel.unary_unary(MODEL_INFER)
        code, text = await refusal(infer(message))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert text == f"received message larger than max ({len(message)} vs. 2000 bytes, max_message_bytes)"
        assert await infer(infer_message())
        assert len(served.models.versions[0].requests) == 1


async def test_a_response_larger_than_a_message_may_be_fails_by_itself() -> None:
    def enlarge(version: ScriptedVersion, request: InferRequest) -> Answer:
        return bytes(3000)

    version = ScriptedVersion(script=enlarge)
    async with serve(version, max_message_bytes=2000) as served, grpc.aio.insecure_channel(served.address) as channel:
        code, text = await refusal(channel.unary_unary(MODEL_INFER)(infer_message()))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert text == "response larger than max (3000 vs. 2000 bytes, max_message_bytes)"


async def test_beyond_the_bytes_in_flight_requests_are_refused_until_some_are_answered() -> None:
    message = infer_message(columns=250)
    async with serve(ScriptedVersion(script=hold), max_inflight_bytes=1500) as served:
        version = served.models.versions[0]
        async with grpc.aio.insecure_channel(served.address) as channel:
            first = channel.unary_unary(MODEL_INFER)(message)
            await version.until(lambda: len(version.held) == 1)
            code, text = await refusal(channel.unary_unary(MODEL_INFER)(message))
            assert code is grpc.StatusCode.UNAVAILABLE
            assert text.startswith("Exceeds maximum bytes in flight: ")
            version.release()
            await first
            version.script = echo
            assert await channel.unary_unary(MODEL_INFER)(message)


async def test_one_request_alone_may_be_larger_than_the_bytes_in_flight() -> None:
    async with serve(ScriptedVersion(), max_inflight_bytes=1024) as served, grpc.aio.insecure_channel(served.address) as channel:
        assert await channel.unary_unary(MODEL_INFER)(infer_message(columns=1000))


async def test_calls_that_keep_coming_do_not_keep_a_stopping_server_from_answering_those_in_flight() -> None:
    async with serve(ScriptedVersion(script=hold)) as served, grpc.aio.insecure_channel(served.address) as channel:
        version = served.models.versions[0]
        infer = channel.unary_unary(MODEL_INFER)
        first = asyncio.ensure_future(infer(infer_message()))
        await version.until(lambda: version.held != {})
        version.script = echo
        stopping = asyncio.ensure_future(served.stop(grace=20))
        text = ""
        while text != "the server is shutting down":
            try:
                await infer(infer_message())
            except grpc.aio.AioRpcError as error:
                text = error.details() or ""
        version.release()
        assert await first
        await stopping


class Tracked(Ticket):
    __slots__ = ("__weakref__",)


async def test_an_answered_call_leaves_memory_without_the_garbage_collector() -> None:
    """Ticket and reply refer to each other, and the ticket to the message: left to the collector, large messages pile up."""
    seen: list[weakref.ref[Ticket]] = []

    def script(version: ScriptedVersion, request: InferRequest) -> Answer:
        reply = version.replies.pop()
        version.requests.clear()
        reply.ticket = Tracked(reply, 1, None, request.inputs, (0,))
        seen.append(weakref.ref(reply.ticket))
        return echo(version, request)

    async with serve(ScriptedVersion(script=script)) as served, grpc.aio.insecure_channel(served.address) as channel:
        gc.disable()
        try:
            for _ in range(3):
                await channel.unary_unary(MODEL_INFER)(infer_message())
            # The last call's batch may still be in the receiving thread's hands.
            assert [ref() for ref in seen[:2]] == [None, None]
        finally:
            gc.enable()
