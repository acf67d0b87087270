"""Loads and unloads by request, by the stock client."""

from __future__ import annotations

import asyncio

import pytest
import tritonclient.grpc.aio as triton
from fake_operations import FakeRepository
from headrace.errors import LoadError
from headrace.wire.messages import RepositoryModelLoadRequest
from served_models import Serve
from tritonclient.utils import InferenceServerException


async def test_the_stock_client_loads_and_unloads(serve: Serve) -> None:
    repository = FakeRepository()
    async with serve(repository=repository) as served, triton.InferenceServerClient(served.address) as client:
        assert "model_repository" in (await client.get_server_metadata()).extensions
        await client.load_model("m")
        await client.load_model("m", config='{"max_batch_size":"16"}', files={"file:1/model.onnx": b"graph"})
        await client.unload_model("m")
        await client.unload_model("m", unload_dependents=True)
    (plain, whole) = repository.loaded
    assert plain == ("m", None, {})
    assert whole[1] is not None
    assert (whole[1].batching.max_batch_size, whole[2]) == (16, {"1/model.onnx": b"graph"})
    assert repository.unloaded == [("m", False), ("m", True)]


async def test_without_control_the_client_gets_tritons_words(serve: Serve) -> None:
    async with serve() as served, triton.InferenceServerClient(served.address) as client:
        assert "model_repository" not in (await client.get_server_metadata()).extensions
        for call in (client.load_model("m"), client.unload_model("m")):
            with pytest.raises(
                InferenceServerException, match="explicit model load / unload is not allowed if polling is enabled"
            ) as caught:
                await call
            assert caught.value.status() == "StatusCode.UNAVAILABLE"


@pytest.mark.parametrize(
    ("config", "files", "status", "text"),
    [
        ('{"max_batch_sise": 1}', None, "INVALID_ARGUMENT", "'max_batch_sise' is no field of ModelConfig"),
        ("{}", {"file:../evil": b""}, "INVALID_ARGUMENT", "load parameter 'file:../evil'"),
        (None, {"file:1/model.onnx": b""}, "INTERNAL", "failed to load 'm', failed to poll from model repository"),
        (None, None, "INVALID_ARGUMENT", "load failed for model 'm': version 1 is at UNAVAILABLE state: cursed;"),
    ],
)
async def test_what_cannot_be_loaded_is_a_status(
    serve: Serve, config: str | None, files: dict[str, bytes] | None, status: str, text: str
) -> None:
    repository = FakeRepository(error=LoadError("load failed for model 'm': version 1 is at UNAVAILABLE state: cursed;"))
    async with serve(repository=repository) as served, triton.InferenceServerClient(served.address) as client:
        with pytest.raises(InferenceServerException) as caught:
            await client.load_model("m", config=config, files=files)
    assert (caught.value.status(), text in caught.value.message()) == (f"StatusCode.{status}", True)


async def test_a_load_holds_no_other_call_up_and_goes_on_when_its_client_leaves(serve: Serve) -> None:
    repository = FakeRepository()
    repository.gate.clear()
    async with serve(repository=repository) as served, triton.InferenceServerClient(served.address) as client:
        load = client._client_stub.RepositoryModelLoad(RepositoryModelLoadRequest(model_name="m"))
        await repository.began.wait()
        assert await client.is_server_live()
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
        repository.gate.set()
        await asyncio.wait_for(repository.done.wait(), 5)
    assert [model for model, _, _ in repository.loaded] == ["m"]
