"""What only the native transport has to take care of."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from headrace.errors import ConfigError
from headrace.requests import Answer, InferRequest
from headrace.rpc.transports.native import NativeReply
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


@pytest.mark.parametrize("method", ["ServerLive", "RepositoryModelLoad"])
async def test_other_calls_are_bounded_too(method: str) -> None:
    options = [("grpc.max_send_message_length", -1)]
    async with serve(ScriptedVersion(), max_message_bytes=2000) as served, grpc.aio.insecure_channel(served.address, options) as channel:
        code, _ = await refusal(channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(bytes(3000)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


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


async def test_a_call_that_came_while_a_stream_was_finished_is_answered_too() -> None:
    async with serve(ScriptedVersion(script=hold)) as served, grpc.aio.insecure_channel(served.address) as channel:
        version = served.models.versions[0]
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(one(infer_message(id="streamed")))
        await version.until(lambda: len(version.held) == 1)
        stopping = asyncio.ensure_future(served.stop(grace=20))
        late = asyncio.ensure_future(channel.unary_unary(MODEL_INFER)(infer_message(id="late")))
        await version.until(lambda: len(version.held) == 2)
        version.release()
        assert await late
        assert await stream.read() is not grpc.aio.EOF
        await stopping


async def one(message: bytes) -> AsyncIterator[bytes]:
    yield message


async def test_calls_cancelled_before_the_loop_came_to_them_are_forgotten() -> None:
    async with serve(ScriptedVersion()) as served, grpc.aio.insecure_channel(served.address) as channel:
        (listener,) = served.transport._listeners  # type: ignore[attr-defined]
        replies = [NativeReply(listener, number << 40, 100, None) for number in (1, 2, 3)]
        for reply in replies:
            listener._calls[reply.call_id] = reply
            listener._count(reply.size)
            reply.cancel = listener._cancel_task
        asyncio.get_running_loop().call_soon(listener._start_tasks, [(reply, listener._serves[0], b"", "") for reply in replies])
        for reply in replies:
            listener._inference.cancel(reply)
        while listener.is_busy:
            await channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"")
        assert listener._bytes == 0


async def test_calls_of_a_batch_that_met_a_bug_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(calls: object) -> None:
        raise RuntimeError("boom")

    async with serve(ScriptedVersion()) as served, grpc.aio.insecure_channel(served.address) as channel:
        infer = channel.unary_unary(MODEL_INFER)
        monkeypatch.setattr(served.services.inference, "submit_all", fail)
        code, text = await refusal(infer(infer_message(), timeout=10))
        assert (code, text[:14]) == (grpc.StatusCode.INTERNAL, "internal error")
        monkeypatch.undo()
        assert await infer(infer_message(), timeout=10)


async def test_a_directory_for_temporary_files_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(ConfigError, match="expected TMPDIR to name a directory for a socket"):
        async with serve(ScriptedVersion()):
            pass
