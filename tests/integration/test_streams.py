"""ModelStreamInfer: many requests on one call, through the stock client and through plain grpc."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from headrace.errors import BackendError, QueueFull
from headrace.requests import Answer, InferRequest
from headrace.wire.messages import ModelInferRequest, ModelStreamInferResponse
from scripted_models import ScriptedVersion, echo, hold, infer_message
from served_models import Serve

Response = Any


class Stream:
    """One open stream of raw messages."""

    def __init__(self, channel: grpc.aio.Channel, **metadata: str) -> None:
        method = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer", response_deserializer=ModelStreamInferResponse.FromString
        )
        self.call = method(metadata=tuple(metadata.items()))

    async def send(self, *messages: bytes) -> None:
        for message in messages:
            await self.call.write(message)

    async def receive(self) -> Response:
        return await asyncio.wait_for(self.call.read(), 5)

    async def end(self) -> list[Response]:
        """Half-close; what was still to come."""
        await self.call.done_writing()
        rest = []
        while (response := await self.receive()) is not grpc.aio.EOF:
            rest.append(response)
        return rest


def open_channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address)


def is_final(response: Response) -> bool:
    return response.infer_response.parameters["triton_final_response"].bool_param


def by_id(version: ScriptedVersion, request: InferRequest) -> Answer | None:
    """What a request wants done with it stands in its id."""
    if request.id.startswith("full"):
        raise QueueFull("Exceeds maximum queue size")
    if request.id.startswith("break"):
        return BackendError("the model broke")
    return None if request.id.startswith("hold") else echo(version, request)


async def test_the_stock_client_streams(serve: Serve) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for i in range(50):
            tensor = triton.InferInput("x", [1, 4], "FP32")
            tensor.set_data_from_numpy(np.full((1, 4), i, np.float32))
            yield {"model_name": "echo", "inputs": [tensor], "request_id": str(i)}

    async with serve(ScriptedVersion()) as served, triton.InferenceServerClient(served.address) as client:
        answers = [(result, error) async for result, error in client.stream_infer(requests())]
    assert [error for _, error in answers] == [None] * 50
    assert [(r.get_response().id, r.as_numpy("y")[0, 0]) for r, _ in answers] == [(str(i), i) for i in range(50)]
    assert all(r.get_response().parameters["triton_final_response"].bool_param for r, _ in answers)


async def test_answers_come_in_the_order_of_the_requests(serve: Serve) -> None:
    async with serve(ScriptedVersion(script=by_id)) as served, open_channel(served.address) as channel:
        stream, version = Stream(channel), served.models.versions[0]
        await stream.send(infer_message(id="hold"), infer_message(id="quick"))
        await version.until(lambda: len(version.requests) == 2)
        # A unary call behind the second one in the version's single thread: when it is answered, so is the second.
        unary = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        await asyncio.wait_for(unary(infer_message(id="third")), 5)
        version.release()
        assert [response.infer_response.id for response in await stream.end()] == ["hold", "quick"]
        assert await stream.call.code() is grpc.StatusCode.OK


async def test_an_error_is_a_message_of_the_stream_which_goes_on(serve: Serve) -> None:
    async with serve(ScriptedVersion(script=by_id)) as served, open_channel(served.address) as channel:
        stream = Stream(channel)
        await stream.send(*[infer_message(id=id) for id in ("full", "break", "fine")], infer_message("nobody", id="lost"), b"\xff")
        full, broke, fine, lost, garbage = await stream.end()
        assert await stream.call.code() is grpc.StatusCode.OK
    assert (full.error_message, full.infer_response.id, full.infer_response.model_name) == ("Exceeds maximum queue size", "full", "")
    assert (broke.error_message, broke.infer_response.id, broke.infer_response.model_name) == ("the model broke", "break", "echo")
    assert is_final(broke)
    assert (fine.error_message, fine.infer_response.id) == ("", "fine")
    assert is_final(fine)
    assert lost.error_message == "Request for unknown model: 'nobody' is not found"
    assert lost.infer_response.id == "lost"
    assert "could not decode" in garbage.error_message


async def test_a_region_that_is_not_there_is_an_error_of_its_request(serve: Serve) -> None:
    message = ModelInferRequest.FromString(infer_message(id="7"))
    message.inputs[0].parameters["shared_memory_region"].string_param = "r"
    message.inputs[0].parameters["shared_memory_byte_size"].int64_param = 16
    async with serve(ScriptedVersion(), client_shared_memory=True) as served, open_channel(served.address) as channel:
        stream = Stream(channel)
        await stream.send(message.SerializeToString())
        (refused,) = await stream.end()
    assert (refused.error_message, refused.infer_response.id) == ("Unable to find shared memory region: 'r'", "7")


async def test_the_first_error_ends_the_stream_for_clients_that_ask_for_a_status(serve: Serve) -> None:
    async with serve(ScriptedVersion(script=by_id)) as served, open_channel(served.address) as channel:
        stream, version = Stream(channel, triton_grpc_error="true"), served.models.versions[0]
        await stream.send(infer_message(id="fine"))
        assert (await stream.receive()).infer_response.id == "fine"
        await stream.send(infer_message(id="break"), infer_message(id="hold"))
        assert await asyncio.wait_for(stream.call.code(), 5) is grpc.StatusCode.INTERNAL
        assert await stream.call.details() == "the model broke"
        await version.until(lambda: not version.held)


async def test_cancelling_a_stream_takes_its_requests_back(serve: Serve) -> None:
    async with serve(ScriptedVersion(script=hold)) as served, open_channel(served.address) as channel:
        stream, version = Stream(channel), served.models.versions[0]
        await stream.send(*[infer_message()] * 5)
        await version.until(lambda: len(version.held) == 5)
        stream.call.cancel()
        await version.until(lambda: len(version.cancelled) == 5)


async def test_stopping_the_server_answers_what_was_read_and_ends_open_streams(serve: Serve) -> None:
    async with serve(ScriptedVersion(script=by_id)) as served, open_channel(served.address) as channel:
        busy, idle, version = Stream(channel), Stream(channel), served.models.versions[0]
        await idle.send(infer_message(id="first"))
        await idle.receive()
        await busy.send(infer_message(id="hold"))
        await version.until(lambda: len(version.held) == 1)
        stopping = asyncio.ensure_future(served.stop(grace=30))
        await asyncio.sleep(0)
        version.release()
        assert (await busy.receive()).infer_response.id == "hold"
        for stream in (busy, idle):
            assert await asyncio.wait_for(stream.call.code(), 5) is grpc.StatusCode.UNAVAILABLE
            assert "shutting down" in (await stream.call.details() or "")
        await asyncio.wait_for(stopping, 5)


async def test_a_stream_that_is_not_read_does_not_fill_the_memory(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.rpc.transports.grpcio_stream.MAX_DUE", 4)
    async with serve(ScriptedVersion(script=by_id)) as served, open_channel(served.address) as channel:
        stream, version = Stream(channel), served.models.versions[0]
        await stream.send(*[infer_message(id=f"hold {i}") for i in range(20)])
        await version.until(lambda: len(version.held) >= 4)
        # A round trip on the same connection: whatever else was to be read would have been read by now.
        await channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"")
        assert len(version.requests) <= 5
        version.script = echo
        version.release()
        assert [response.infer_response.id for response in await stream.end()] == [f"hold {i}" for i in range(20)]
