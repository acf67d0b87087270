"""What a call leaves behind, on every transport."""

from __future__ import annotations

import gc
import weakref

import grpc
from headrace.requests import Answer, InferRequest, Ticket
from scripted_models import ScriptedVersion, echo, infer_message
from served_models import Serve

MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"


class Tracked(Ticket):
    __slots__ = ("__weakref__",)


async def test_an_answered_call_leaves_memory_without_the_garbage_collector(serve: Serve) -> None:
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
            # The last call may still be in its task's or its thread's hands.
            assert [ref() for ref in seen[:2]] == [None, None]
        finally:
            gc.enable()
