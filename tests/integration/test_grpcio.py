"""What only the grpcio transport has to take care of."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from headrace.requests import Answer, Reply
from headrace.rpc.transports.grpcio_calls import FutureReply, LoopOutlet
from scripted_models import ScriptedVersion, hold, infer_message
from served_models import serve_on

MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
serve = serve_on("grpcio")


async def test_a_cancelled_error_from_inside_is_answered_and_does_not_leave_the_caller_hanging() -> None:
    async with serve(ScriptedVersion(script=hold)) as served, grpc.aio.insecure_channel(served.address) as channel:
        version = served.models.versions[0]
        call = channel.unary_unary(MODEL_INFER)(infer_message(), timeout=20)
        await version.until(lambda: version.held != {})
        reply = version.replies[0]
        assert isinstance(reply, FutureReply)
        reply.future.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await asyncio.wait_for(call, 5)
        assert raised.value.code() is grpc.StatusCode.INTERNAL


class CountingLoop:
    """Counts the hops that go through it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.hops = 0

    def call_soon_threadsafe(self, callback: Callable[..., None], *given: Any) -> None:
        self.hops += 1
        self._loop.call_soon_threadsafe(callback, *given)


async def test_a_batch_of_answers_from_another_thread_takes_one_hop() -> None:
    loop = asyncio.get_running_loop()
    counting: Any = CountingLoop(loop)
    outlet = LoopOutlet(counting)
    replies = [FutureReply(outlet, loop.create_future(), None) for _ in range(64)]
    pairs: list[tuple[Reply, Answer]] = [(reply, b"%d" % i) for i, reply in enumerate(replies)]
    thread = threading.Thread(target=outlet.deliver, args=(pairs,))
    thread.start()
    assert await asyncio.gather(*[reply.future for reply in replies]) == [answer for _, answer in pairs]
    thread.join()
    assert counting.hops == 1
    replies[0].future = loop.create_future()
    outlet.deliver(pairs[:1])
    assert replies[0].future.result() == b"0"  # on the loop's own thread there is nothing to wait for
    assert counting.hops == 1


async def test_an_answer_for_a_loop_that_is_gone_is_dropped() -> None:
    gone = asyncio.new_event_loop()
    gone.close()
    outlet = LoopOutlet(gone)
    reply = FutureReply(outlet, asyncio.get_running_loop().create_future(), None)
    await asyncio.to_thread(outlet.deliver, [(reply, b"late")])
    assert not reply.future.done()
