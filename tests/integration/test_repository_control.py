"""Loads and unloads by request, by the stock client."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models
import pytest
import tritonclient.grpc.aio as triton
from fake_operations import FakeRepository
from headrace.errors import LoadError
from headrace.testing import serve_in_process
from headrace.wire.messages import RepositoryModelLoadRequest
from served_models import Serve
from tritonclient.grpc import InferInput
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


# -- with real models --------------------------------------------------------------------------------------------------


def save(folder: Path, version: int, *, columns: int = 8) -> Path:
    return onnx_models.save(onnx_models.mlp(columns, 4, seed=version), folder / "m" / str(version))


async def ask(client: Any, version: str = "") -> str:
    tensor = InferInput("x", [1, 8], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 8), np.float32))
    return str((await client.infer("m", [tensor], model_version=version)).get_response().model_version)


async def index(client: Any) -> list[tuple[str, str, str]]:
    return [(entry.version, entry.state, entry.reason) for entry in (await client.get_model_repository_index()).models]


async def test_models_are_there_when_they_were_loaded_and_gone_when_they_were_unloaded(tmp_path: Path) -> None:
    save(tmp_path, 1)
    async with (
        serve_in_process(tmp_path, model_control="explicit") as server,
        triton.InferenceServerClient(server.grpc_addresses[0]) as client,
    ):
        assert await client.is_server_ready()
        assert await index(client) == [("", "", "")]
        with pytest.raises(InferenceServerException, match="'m' has no available versions"):
            await ask(client)
        await client.load_model("m")
        assert (await ask(client), await index(client)) == ("1", [("1", "READY", "")])
        save(tmp_path, 2)
        await client.load_model("m")
        assert await ask(client) == "2"
        await client.load_model("m", config='{"max_batch_size": "16"}')
        assert (await client.get_model_config("m")).config.max_batch_size == 16
        (tmp_path / "m" / "3").mkdir()
        (tmp_path / "m" / "3" / "model.onnx").write_bytes(b"junk")
        with pytest.raises(InferenceServerException, match=r"load failed for model 'm': version 3 is at UNAVAILABLE state: .*") as caught:
            await client.load_model("m")
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
        assert await ask(client) == "2"
        with pytest.raises(InferenceServerException, match="failed to load 'other', failed to poll from model repository") as caught:
            await client.load_model("other")
        assert caught.value.status() == "StatusCode.INTERNAL"
        await client.load_model("m", config="{}", files={"file:7/model.onnx": (tmp_path / "m" / "1" / "model.onnx").read_bytes()})
        assert await ask(client) == "7"
        await client.unload_model("m")
        assert not await client.is_model_ready("m")


async def test_models_named_at_the_start_are_loaded_then(tmp_path: Path) -> None:
    save(tmp_path, 1)
    async with (
        serve_in_process(tmp_path, model_control="explicit", load_models=("*",)) as server,
        triton.InferenceServerClient(server.grpc_addresses[0]) as client,
    ):
        assert await ask(client) == "1"


async def test_a_label_is_a_version_wherever_one_can_be_named(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "m" / "model.toml").write_text("[labels]\nstable = 1\n")
    async with serve_in_process(tmp_path) as server, triton.InferenceServerClient(server.grpc_addresses[0]) as client:
        assert (await ask(client), await ask(client, "stable")) == ("2", "1")
        assert await client.is_model_ready("m", "stable")
        assert list((await client.get_model_metadata("m", "stable")).versions) == ["1"]
        statistics = (await client.get_inference_statistics("m", "stable")).model_stats
        assert [each.version for each in statistics] == ["1"]
        for call in (client.get_model_metadata("m", "canary"), client.is_model_ready("m", "canary"), ask(client, "canary")):
            with pytest.raises(InferenceServerException, match=r"or a label \(stable\)") as caught:
                await call
            assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
