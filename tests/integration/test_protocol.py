"""What a client sees on the wire: the stock tritonclient, plain grpc and the standard health and reflection clients."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from headrace.errors import (
    AlreadyExists,
    BackendError,
    DeadlineExceeded,
    FailedPrecondition,
    HeadraceError,
    NotReady,
    QueueFull,
    QueueTimeout,
    Unsupported,
)
from headrace.lifecycle.state import VersionState
from headrace.requests import Answer, InferRequest
from headrace.wire.messages import HealthCheckRequest, HealthCheckResponse, ModelInferResponse
from scripted_models import Script, ScriptedVersion, hold, infer_message
from served_models import Serve
from tritonclient.utils import InferenceServerException

MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"


def tensor(rows: int = 1, columns: int = 4, *, value: float = 1.0, name: str = "x") -> triton.InferInput:
    made = triton.InferInput(name, [rows, columns], "FP32")
    made.set_data_from_numpy(np.full((rows, columns), value, np.float32))
    return made


def failing(error: Exception) -> Script:
    """Refused at admission."""

    def script(version: ScriptedVersion, request: InferRequest) -> Answer:
        raise error

    return script


def answering(error: HeadraceError) -> Script:
    """Admitted, then failed."""
    return lambda version, request: error


def raw_channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)])


async def infer_raw(address: str, message: bytes, **options: Any) -> ModelInferResponse:
    async with raw_channel(address) as channel:
        call = channel.unary_unary(MODEL_INFER, response_deserializer=ModelInferResponse.FromString)
        return await call(message, **options)


# -- inference ---------------------------------------------------------------------------------------------------------


async def test_the_stock_client_gets_its_answer(serve: Serve) -> None:
    async with serve(ScriptedVersion(version=3)) as served, triton.InferenceServerClient(served.address) as client:
        result = await client.infer("echo", [tensor(2, value=7.0)], request_id="r-1", outputs=[triton.InferRequestedOutput("y")])
        assert result.as_numpy("y").tolist() == [[7.0] * 4] * 2
        response = result.get_response()
        assert (response.model_name, response.model_version, response.id) == ("echo", "3", "r-1")


async def test_concurrent_calls_each_get_their_own_answer(serve: Serve) -> None:
    async with serve(ScriptedVersion()) as served, triton.InferenceServerClient(served.address) as client:
        results = await asyncio.gather(*[client.infer("echo", [tensor(value=i)], request_id=str(i)) for i in range(200)])
        assert [(r.get_response().id, r.as_numpy("y")[0, 0]) for r in results] == [(str(i), i) for i in range(200)]


async def test_a_message_of_20_mb_goes_in_and_out(serve: Serve) -> None:
    async with serve(ScriptedVersion()) as served, triton.InferenceServerClient(served.address) as client:
        given = np.random.default_rng(1).random((5, 1_000_000), np.float32)
        made = triton.InferInput("x", list(given.shape), "FP32")
        made.set_data_from_numpy(given)
        result = await client.infer("echo", [made])
        assert np.array_equal(result.as_numpy("y"), given)


async def test_a_message_above_the_configured_limit_is_refused(serve: Serve) -> None:
    async with serve(ScriptedVersion(), max_message_bytes=100_000) as served:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await infer_raw(served.address, infer_message(rows=1, columns=50_000))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await infer_raw(served.address, infer_message(rows=1, columns=20_000))).model_name == "echo"


@pytest.mark.parametrize("id", ["", "a b", "ünïcode-请求-😀", "x" * 5000, "\n\x00"])
async def test_any_request_id_comes_back(serve: Serve, id: str) -> None:
    async with serve(ScriptedVersion()) as served:
        assert (await infer_raw(served.address, infer_message(id=id))).id == id


async def test_compressed_requests_are_understood(serve: Serve) -> None:
    async with serve(ScriptedVersion()) as served, triton.InferenceServerClient(served.address) as client:
        result = await client.infer("echo", [tensor(4, 1000)], compression_algorithm="gzip")
        assert result.as_numpy("y").shape == (4, 1000)


async def test_deflated_requests_are_understood_or_refused_by_name(serve: Serve, transport: str) -> None:
    async with serve(ScriptedVersion()) as served, triton.InferenceServerClient(served.address) as client:
        call = client.infer("echo", [tensor(4, 1000)], compression_algorithm="deflate")
        if transport == "grpcio":
            assert (await call).as_numpy("y").shape == (4, 1000)
        else:
            with pytest.raises(InferenceServerException, match="deflate"):
                await call


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [failing, answering], ids=["refused", "failed"])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (QueueFull("Exceeds maximum queue size"), "UNAVAILABLE"),
        (QueueTimeout("Request timeout expired"), "UNAVAILABLE"),
        (NotReady("version 3 is not at ready state"), "UNAVAILABLE"),
        (DeadlineExceeded("the call's deadline passed"), "DEADLINE_EXCEEDED"),
        (Unsupported("decoupled models need a stream"), "UNIMPLEMENTED"),
        (FailedPrecondition("not now"), "FAILED_PRECONDITION"),
        (AlreadyExists("twice"), "ALREADY_EXISTS"),
        (BackendError("echo:1: Non-zero status code returned: größer 请求"), "INTERNAL"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_every_error_arrives_with_its_code_and_text(serve: Serve, error: HeadraceError, code: str, script: Any) -> None:
    async with serve(ScriptedVersion(script=script(error))) as served, triton.InferenceServerClient(served.address) as client:
        with pytest.raises(InferenceServerException) as raised:
            await client.infer("echo", [tensor()])
        assert raised.value.status() == f"StatusCode.{code}"
        assert raised.value.message() == str(error)


@pytest.mark.parametrize(
    ("model", "version", "inputs", "code", "fragment"),
    [
        ("nobody", "", [tensor()], "NOT_FOUND", "Request for unknown model: 'nobody' is not found"),
        ("echo", "x", [tensor()], "INVALID_ARGUMENT", "'x'"),
        ("echo", "", [tensor(name="z")], "INVALID_ARGUMENT", "unexpected inference input 'z' for model 'echo'"),
        ("echo", "", [], "INVALID_ARGUMENT", "[request id: my-id] expected 1 inputs but got 0 inputs for model 'echo'"),
    ],
)
async def test_errors_of_the_caller_say_what_was_wrong(
    serve: Serve, model: str, version: str, inputs: Sequence[Any], code: str, fragment: str
) -> None:
    async with serve(ScriptedVersion()) as served, triton.InferenceServerClient(served.address) as client:
        with pytest.raises(InferenceServerException) as raised:
            await client.infer(model, inputs, version, request_id="my-id")
        assert raised.value.status() == f"StatusCode.{code}"
        assert fragment in raised.value.message()


async def test_garbage_is_an_invalid_argument(serve: Serve) -> None:
    async with serve(ScriptedVersion()) as served:
        for garbage in (b"\xff\xff\xff", b"\x08", b"\xff" * 100_000):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await infer_raw(served.address, garbage)
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_unexpected_error_keeps_its_text_to_itself(serve: Serve) -> None:
    async with serve(ScriptedVersion(script=failing(RuntimeError("password=hunter2")))) as served:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await infer_raw(served.address, infer_message(id="id-9"))
        assert raised.value.code() is grpc.StatusCode.INTERNAL
        assert raised.value.details() == "internal error; the server's log has the reason under request id id-9"


async def test_an_error_that_quotes_a_huge_name_still_arrives(serve: Serve) -> None:
    async with serve() as served:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await infer_raw(served.address, infer_message(model="😀\n" * 100_000))
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        assert (raised.value.details() or "").startswith("Request for unknown model: '😀 😀")


async def test_unknown_methods_and_services_are_unimplemented(serve: Serve) -> None:
    async with serve() as served, raw_channel(served.address) as channel:
        for method in ("/inference.GRPCInferenceService/NoSuch", "/no.such.Service/Method", "/nonsense"):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await channel.unary_unary(method)(b"")
            assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


# -- cancellation and deadlines ----------------------------------------------------------------------------------------


async def test_cancelling_a_call_takes_its_request_back(serve: Serve) -> None:
    async with serve(ScriptedVersion(script=hold)) as served, raw_channel(served.address) as channel:
        version = served.models.versions[0]
        call = channel.unary_unary(MODEL_INFER)(infer_message())
        await version.until(lambda: version.held != {})
        call.cancel()
        await version.until(lambda: version.cancelled != [])
        assert version.cancelled == version.replies


async def test_a_call_that_is_cancelled_too_late_disturbs_nobody(serve: Serve) -> None:
    async with serve(ScriptedVersion(script=hold)) as served, raw_channel(served.address) as channel:
        version = served.models.versions[0]
        gone, stays = [channel.unary_unary(MODEL_INFER, response_deserializer=ModelInferResponse.FromString) for _ in range(2)]
        first = gone(infer_message(id="gone"))
        second = stays(infer_message(id="stays"))
        await version.until(lambda: len(version.held) == 2)
        first.cancel()
        version.release()
        assert (await second).id == "stays"


async def test_the_callers_deadline_reaches_the_scheduler(serve: Serve) -> None:
    async with serve(ScriptedVersion()) as served:
        before = time.monotonic()
        await infer_raw(served.address, infer_message(), timeout=50)
        await infer_raw(served.address, infer_message())
        first, second = [reply.deadline for reply in served.models.versions[0].replies]
        assert first is not None
        # The wire carries the time that is left, rounded, and gRPC gives it back on the wall clock.
        assert first == pytest.approx(before + 50, abs=5)
        assert second is None


async def test_a_deadline_that_passes_takes_the_request_back(serve: Serve) -> None:
    version = ScriptedVersion(script=hold)
    async with serve(version) as served:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await infer_raw(served.address, infer_message(), timeout=0.1)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await version.until(lambda: version.cancelled != [])


# -- control -----------------------------------------------------------------------------------------------------------


async def test_the_stock_client_reads_the_servers_state(serve: Serve) -> None:
    async with serve(ScriptedVersion()) as served, triton.InferenceServerClient(served.address) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("echo")
        assert not await client.is_model_ready("nobody")
        metadata = await client.get_server_metadata()
        assert (metadata.name, metadata.version) == ("triton", "1.2.3")
        assert [t.name for t in (await client.get_model_metadata("echo")).inputs] == ["x"]
        assert (await client.get_model_config("echo")).config.name == "echo"
        assert [m.name for m in (await client.get_inference_statistics()).model_stats] == ["echo"]
        assert [m.state for m in (await client.get_model_repository_index()).models] == ["READY"]


async def test_what_is_not_offered_says_so(serve: Serve) -> None:
    async with serve() as served, triton.InferenceServerClient(served.address) as client:
        for call in (client.get_trace_settings(), client.get_log_settings()):
            with pytest.raises(InferenceServerException) as raised:
                await call
            assert raised.value.status() == "StatusCode.UNIMPLEMENTED"
            assert "is not implemented by this server" in raised.value.message()


async def test_control_calls_do_not_wait_behind_inference(serve: Serve) -> None:
    version = ScriptedVersion(script=hold)
    async with serve(version) as served, triton.InferenceServerClient(served.address) as client:
        calls = [asyncio.ensure_future(client.infer("echo", [tensor()])) for _ in range(50)]
        await version.until(lambda: len(version.held) == 50)
        assert await client.is_server_live(client_timeout=5)
        assert (await client.get_inference_statistics(client_timeout=5)).model_stats
        version.release()
        await asyncio.gather(*calls)


# -- health ------------------------------------------------------------------------------------------------------------


def health_call(channel: grpc.aio.Channel, method: str, service: str) -> Any:
    kind = channel.unary_stream if method == "Watch" else channel.unary_unary
    call = kind(f"/grpc.health.v1.Health/{method}", HealthCheckRequest.SerializeToString, HealthCheckResponse.FromString)
    return call(HealthCheckRequest(service=service))


async def test_health_check_of_the_server_and_of_each_model(serve: Serve) -> None:
    loading = ScriptedVersion("slow", state=VersionState.LOADING)
    async with serve(ScriptedVersion(), loading) as served, raw_channel(served.address) as channel:
        found = {
            name: (await health_call(channel, "Check", name)).status for name in ("", "inference.GRPCInferenceService", "echo", "slow")
        }
        assert found == {"": 1, "inference.GRPCInferenceService": 1, "echo": 1, "slow": 2}
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await health_call(channel, "Check", "nobody")
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_watch_follows_a_model_until_the_server_stops(serve: Serve) -> None:
    version = ScriptedVersion(state=VersionState.LOADING)
    async with serve(version) as served, raw_channel(served.address) as channel:
        watch, unknown = health_call(channel, "Watch", "echo"), health_call(channel, "Watch", "nobody")
        assert [(await call.read()).status for call in (watch, unknown)] == [2, 3]
        version.state = VersionState.LIVE
        served.models.changed()
        assert (await watch.read()).status == 1
        await asyncio.wait_for(served.stop(grace=60), 10)  # open watches must not hold the server up
        assert (await watch.read()).status == 2
        assert [await call.read() for call in (watch, unknown)] == [grpc.aio.EOF] * 2
        assert [await call.code() for call in (watch, unknown)] == [grpc.StatusCode.OK] * 2


async def test_a_watch_that_cannot_be_decoded_is_refused(serve: Serve) -> None:
    async with serve() as served, raw_channel(served.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.unary_stream("/grpc.health.v1.Health/Watch")(b"\xff").read()
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_watcher_that_goes_away_is_forgotten(serve: Serve) -> None:
    async with serve() as served, raw_channel(served.address) as channel:
        watch = health_call(channel, "Watch", "")
        await watch.read()
        watch.cancel()
        async with asyncio.timeout(5):
            while "0 watchers" not in repr(served.services.health):
                await health_call(channel, "Check", "")


# -- shutdown ----------------------------------------------------------------------------------------------------------


async def test_calls_in_flight_finish_when_the_server_stops(serve: Serve) -> None:
    async with serve(ScriptedVersion(script=hold)) as served, raw_channel(served.address) as channel:
        version = served.models.versions[0]
        call = channel.unary_unary(MODEL_INFER, response_deserializer=ModelInferResponse.FromString)(infer_message(id="in flight"))
        await version.until(lambda: version.held != {})
        stopping = asyncio.ensure_future(served.stop(grace=30))
        await asyncio.sleep(0)
        version.release()
        assert (await call).id == "in flight"
        await asyncio.wait_for(stopping, 10)


async def test_the_grace_ends_what_does_not_finish(serve: Serve) -> None:
    version = ScriptedVersion(script=hold)
    async with serve(version) as served, raw_channel(served.address) as channel:
        call = channel.unary_unary(MODEL_INFER)(infer_message())
        await version.until(lambda: version.held != {})
        await asyncio.wait_for(served.stop(grace=0.05), 10)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert version.cancelled == version.replies


async def test_a_stopped_server_is_unavailable(serve: Serve) -> None:
    async with serve(ScriptedVersion()) as served:
        address = served.address
        await infer_raw(address, infer_message())
        await served.stop(grace=1)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await infer_raw(address, infer_message())
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
