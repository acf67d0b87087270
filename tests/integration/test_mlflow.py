"""Models from an MLflow registry, against a real server: publishing, deploying by an alias, rolling back, webhooks, failures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as aio
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from fake_models import FakeModels
from headrace import cli
from headrace.config import SourceConfig
from headrace.errors import LoadError
from headrace.http.server import HttpServer
from headrace.plugins import open_source
from headrace.sources.base import Fetched, Listing, ModelRef
from headrace.sources.verification import verify_version
from headrace.telemetry.metrics import make_registry
from headrace.testing import serve_in_process
from integration.mlflow_server import mlflow_server
from watchfiles import awatch

pytestmark = pytest.mark.slow  # the server takes some ten seconds to start; there is one for all


@pytest.fixture(scope="session")
def mlflow_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as address:
        yield address


@pytest.fixture
def registry(mlflow_address: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """MLflow's client, and the environment that leads to the server."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_address)
    from mlflow import MlflowClient

    return MlflowClient()


def publish(folder: Path, to: str, name: str, *flags: str) -> int:
    artifact = onnx_models.save(onnx_models.mlp(8, 4), folder / "build", "trained.onnx")
    return cli.main(["publish", str(artifact), "--to", to, "--name", name, *flags])


async def list_models(uri: str) -> Listing:
    return await open_source(uri, SourceConfig()).list()


async def offered(uri: str, name: str) -> ModelRef:
    listing = await list_models(uri)
    assert listing.errors == {}
    return listing.models[name]


async def fetch(uri: str, name: str, folder: Path) -> tuple[ModelRef, Fetched]:
    source = open_source(uri, SourceConfig(cache_directory=str(folder)))
    model = (await source.list()).models[name]
    return model, await source.fetch(model, max(model.versions))


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def register(registry: Any, name: str, folder: Path) -> None:
    """A plain directory, as somebody's own script would."""
    run = registry.create_run(registry.create_experiment(f"of {name}"))
    registry.log_artifacts(run.info.run_id, str(folder), "m")
    registry.create_registered_model(name)
    registry.create_model_version(name, f"{run.info.artifact_uri}/m", run.info.run_id)


# -- deploying ---------------------------------------------------------------------------------------------------------


async def test_a_published_model_is_offered_fetched_and_verified(tmp_path: Path, registry: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish(tmp_path, "mlflow:digits@champion", "digits", "--metadata", "run=417") == 0
    assert "published digits:1 to mlflow:digits/1 as champion: 1 file" in capsys.readouterr().out
    model, fetched = await fetch("mlflow:digits@champion", "digits", tmp_path)
    assert list(model.versions) == [1]
    assert model.labels == {"champion": 1}
    assert fetched.version_directory.name == "1"
    assert fetched.version_directory.parent.name == "digits"
    assert files_below(fetched.model_directory) == {"1/manifest.json", "1/model.onnx"}
    verify_version(model.config, fetched.model_directory, fetched.version_directory)
    fetched.release()
    assert not fetched.version_directory.exists()


async def test_moving_the_alias_deploys_and_moving_it_back_rolls_back(tmp_path: Path, registry: Any) -> None:
    publish(tmp_path, "mlflow:moving@champion", "moving")
    first = await offered("mlflow:moving@champion", "moving")
    publish(tmp_path, "mlflow:moving", "moving")
    assert await offered("mlflow:moving@champion", "moving") == first
    registry.set_registered_model_alias("moving", "champion", "2")
    assert list((await offered("mlflow:moving@champion", "moving")).versions) == [2]
    registry.set_registered_model_alias("moving", "champion", "1")
    assert await offered("mlflow:moving@champion", "moving") == first


async def test_other_aliases_and_tags_become_labels_and_change_no_token(tmp_path: Path, registry: Any) -> None:
    publish(tmp_path, "mlflow:labelled@champion", "labelled")
    publish(tmp_path, "mlflow:labelled@challenger", "labelled")
    before = await offered("mlflow:labelled@champion", "labelled")
    assert before.labels == {"champion": 1, "challenger": 2}
    registry.set_registered_model_alias("labelled", "shadow", "1")
    registry.set_registered_model_alias("labelled", "1st", "1")  # no label in Headrace: it would be read as a number
    registry.set_model_version_tag("labelled", "1", "approved", "yes")
    after = await offered("mlflow:labelled@champion", "labelled")
    assert after.labels == {"champion": 1, "challenger": 2, "shadow": 1}
    assert after.versions == before.versions


async def test_a_name_alone_offers_every_version_and_a_number_that_one(tmp_path: Path, registry: Any) -> None:
    for _ in range(3):
        publish(tmp_path, "mlflow:several", "several")
    registry.delete_model_version("several", "2")
    assert list((await offered("mlflow:several", "several")).versions) == [1, 3]
    assert list((await offered("mlflow:several/3", "several")).versions) == [3]


# -- publishing --------------------------------------------------------------------------------------------------------


def test_numbers_of_deleted_versions_are_passed_over(tmp_path: Path, registry: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        publish(tmp_path, "mlflow:gappy", "gappy")
    registry.delete_model_version("gappy", "2")
    capsys.readouterr()
    assert publish(tmp_path, "mlflow:gappy@champion", "gappy", "--json") == 0
    number = json.loads(capsys.readouterr().out)["version"]
    assert number > 2
    assert registry.get_model_version_by_alias("gappy", "champion").version == str(number)
    assert {int(each.version) for each in registry.search_model_versions("name = 'gappy'")} == {1, number}


def test_a_number_of_ones_own_and_another_name_are_refused_and_leave_nothing(
    tmp_path: Path, registry: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(tmp_path, "mlflow:refused", "refused", "--version", "7") == 2
    assert "MLflow numbers versions itself; the next of refused is 1, got 7" in capsys.readouterr().err
    assert publish(tmp_path, "mlflow:refused", "another") == 2
    assert "--name: expected 'refused'" in capsys.readouterr().err
    assert registry.search_registered_models("name = 'refused'") == []


def test_an_alias_that_cannot_be_set_takes_the_version_back(tmp_path: Path, registry: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish(tmp_path, "mlflow:reserved@latest", "reserved") == 1  # MLflow keeps this alias for itself
    assert "'latest' alias name (case insensitive) is reserved" in capsys.readouterr().err
    assert registry.search_registered_models("name = 'reserved'") == []
    experiment = registry.get_experiment_by_name("headrace").experiment_id
    runs = [run.info.run_name for run in registry.search_runs([experiment])]
    assert "headrace publish reserved" not in runs


async def test_configuration_goes_with_the_model_from_version_to_version(tmp_path: Path, registry: Any) -> None:
    folder = tmp_path / "logged"
    onnx_models.save(onnx_models.mlp(8, 2), folder)
    (folder / "model.toml").write_text('max_batch_size = 6\n[[output]]\nname = "y"\nlabels = "classes.txt"\n')
    (folder / "classes.txt").write_text("no\nyes\n")
    register(registry, "configured", folder)
    artifact = onnx_models.save(onnx_models.mlp(8, 2, seed=1), tmp_path / "build")
    assert cli.main(["publish", str(artifact), "--to", "mlflow:configured", "--name", "configured"]) == 0
    for version in (1, 2):
        model, fetched = await fetch(f"mlflow:configured/{version}", "configured", tmp_path)
        assert model.config.batching.max_batch_size == 6
        assert files_below(fetched.model_directory) - {"2/manifest.json"} == {"model.toml", "classes.txt", f"{version}/model.onnx"}
        verify_version(model.config, fetched.model_directory, fetched.version_directory)


async def test_a_signed_version_is_checked_by_the_key_that_lies_beside_the_configuration(tmp_path: Path, registry: Any) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    onnx_models.save(onnx_models.mlp(8, 4), tmp_path / "logged")
    (tmp_path / "logged" / "key.pub").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    (tmp_path / "logged" / "model.toml").write_text('signature_policy = "require"\nsignature_key = "key.pub"\n')
    register(registry, "signed", tmp_path / "logged")
    assert publish(tmp_path, "mlflow:signed", "signed", "--sign", str(tmp_path / "key.pem")) == 0
    model, fetched = await fetch("mlflow:signed/2", "signed", tmp_path)
    verify_version(model.config, fetched.model_directory, fetched.version_directory)
    model, fetched = await fetch("mlflow:signed/1", "signed", tmp_path)
    with pytest.raises(LoadError, match=r"^signed/1: expected manifest.json and its signature"):
        verify_version(model.config, fetched.model_directory, fetched.version_directory)


async def test_a_model_from_the_registry_is_served(tmp_path: Path, registry: Any) -> None:
    publish(tmp_path, "mlflow:served@champion", "served")
    async with serve_in_process("mlflow:served@champion") as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        tensor = triton.InferInput("x", [2, 8], "FP32")
        tensor.set_data_from_numpy(np.ones((2, 8), np.float32))
        assert (await client.infer("served", [tensor])).as_numpy("y").shape == (2, 4)


async def test_moving_the_alias_deploys_and_moving_it_back_rolls_back_in_a_running_server(tmp_path: Path, registry: Any) -> None:
    publish(tmp_path, "mlflow:moved@champion", "moved")

    async def version_that_answers(client: Any, version: str = "") -> str:
        tensor = triton.InferInput("x", [1, 8], "FP32")
        tensor.set_data_from_numpy(np.ones((1, 8), np.float32))
        result = await client.infer("moved", [tensor], model_version=version)
        return str(result.get_response().model_version)

    async def until_answers(client: Any, version: str) -> None:
        async with asyncio.timeout(20):
            while await version_that_answers(client) != version:
                await asyncio.sleep(0.05)

    async with (
        serve_in_process("mlflow:moved@champion", poll_interval=0.3) as server,
        aio.InferenceServerClient(server.grpc_addresses[0]) as client,
    ):
        assert await version_that_answers(client) == "1"
        await asyncio.to_thread(publish, tmp_path, "mlflow:moved", "moved")
        await asyncio.sleep(1)
        assert await version_that_answers(client) == "1", "a version that the alias does not name was taken up"
        await asyncio.to_thread(registry.set_registered_model_alias, "moved", "champion", "2")
        await until_answers(client, "2")
        assert await version_that_answers(client, "champion") == "2"
        await asyncio.to_thread(registry.set_registered_model_alias, "moved", "champion", "1")
        await until_answers(client, "1")
        assert not server.watchers[0].error


# -- what else is in a registry ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")  # of mlflow.onnx, when it is imported
async def test_a_model_logged_by_mlflow_onnx_is_laid_out_with_its_external_data(tmp_path: Path, registry: Any) -> None:
    import mlflow
    import mlflow.onnx

    with mlflow.start_run():
        model = onnx_models.mlp(64, 64, 4)
        mlflow.onnx.log_model(model, name="m", registered_model_name="flavoured", size_threshold=0, location="weights.bin")
    offer, fetched = await fetch("mlflow:flavoured", "flavoured", tmp_path)
    assert files_below(fetched.model_directory) == {"1/model.onnx", "1/weights.bin"}
    onnx.load(str(fetched.version_directory / "model.onnx"))
    verify_version(offer.config, fetched.model_directory, fetched.version_directory)


async def test_a_single_onnx_file_of_any_name_is_the_model(tmp_path: Path, registry: Any) -> None:
    onnx_models.save(onnx_models.mlp(8, 4), tmp_path / "logged", "my best.onnx")
    (tmp_path / "logged" / "notes").mkdir()
    (tmp_path / "logged" / "notes" / "why not.txt").write_text("because")
    register(registry, "with a space", tmp_path / "logged")
    _, fetched = await fetch("mlflow:with a space", "with a space", tmp_path)
    assert files_below(fetched.model_directory) == {"1/model.onnx", "1/notes/why not.txt"}


async def test_another_flavour_fails_with_what_it_is_and_leaves_nothing(tmp_path: Path, registry: Any) -> None:
    (tmp_path / "logged").mkdir()
    (tmp_path / "logged" / "MLmodel").write_text("flavors:\n  sklearn:\n    pickled_model: model.pkl\n")
    register(registry, "pickled", tmp_path / "logged")
    (tmp_path / "cache").mkdir()
    with pytest.raises(LoadError, match="expected the flavour onnx with its file, found sklearn"):
        await fetch("mlflow:pickled", "pickled", tmp_path / "cache")
    assert files_below(tmp_path / "cache") == set()


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("mlflow:present@nobody", "registered model 'present' has no alias 'nobody'; its aliases: champion"),
        ("mlflow:present/9", "version=9"),
        ("mlflow:absent@champion", "absent not found"),
        ("mlflow:absent", "absent not found"),
    ],
)
async def test_what_is_not_there_is_an_error_of_the_model_and_no_exception(tmp_path: Path, registry: Any, uri: str, text: str) -> None:
    if not registry.search_registered_models("name = 'present'"):
        publish(tmp_path, "mlflow:present@champion", "present")
    listing = await list_models(uri)
    assert listing.models == {}
    [(model, reason)] = listing.errors.items()
    assert model == uri.removeprefix("mlflow:").partition("@")[0].partition("/")[0]
    assert text in reason


async def test_artifacts_that_are_gone_fail_the_fetch(tmp_path: Path, registry: Any) -> None:
    publish(tmp_path, "mlflow:vanished", "vanished")
    source = open_source("mlflow:vanished", SourceConfig(cache_directory=str(tmp_path)))
    model = (await source.list()).models["vanished"]
    registry.delete_model_version("vanished", "1")
    with pytest.raises(LoadError, match=r"^vanished/1: "):
        await source.fetch(model, 1)


async def test_a_cancelled_fetch_leaves_nothing_behind(tmp_path: Path, registry: Any) -> None:
    publish(tmp_path, "mlflow:cancelled", "cancelled")
    (tmp_path / "cache").mkdir()
    source = open_source("mlflow:cancelled", SourceConfig(cache_directory=str(tmp_path / "cache")))
    model = (await source.list()).models["cancelled"]
    task = asyncio.create_task(source.fetch(model, 1))
    async for _ in awatch(tmp_path / "cache", step=10, debounce=10):
        break  # it has begun
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.get_running_loop().shutdown_default_executor()  # its threads have ended
    await asyncio.sleep(0)
    assert list((tmp_path / "cache").iterdir()) == []


@asynccontextmanager
async def forwarding(address: str, port: int = 0) -> AsyncIterator[int]:
    """A port that leads to the server as long as the block runs: what a client sees of a server that stops and comes back."""
    host, _, target = address.removeprefix("http://").partition(":")
    writers: list[asyncio.StreamWriter] = []

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(65536):
            writer.write(chunk)
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(target))
        writers.extend((writer, far_writer))
        await asyncio.gather(pipe(reader, far_writer), pipe(far_reader, writer), return_exceptions=True)

    server = await asyncio.start_server(connect, "127.0.0.1", port)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await server.wait_closed()


async def test_a_registry_that_is_away_is_an_os_error_without_the_password_and_comes_back(
    tmp_path: Path, registry: Any, mlflow_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, "mlflow:away@champion", "away")
    async with forwarding(mlflow_address) as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:xyzzy@127.0.0.1:{port}")
        source = open_source("mlflow:away@champion", SourceConfig())
        before = await source.list()
        assert list(before.models) == ["away"]
    with pytest.raises(OSError, match=r"MLflow registry at 127.0.0.1: cannot be reached") as caught:
        await source.list()
    assert "xyzzy" not in str(caught.value)
    async with forwarding(mlflow_address, port):
        assert await source.list() == before


async def test_refused_credentials_are_an_os_error_that_says_which_are_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(request: web.Request) -> web.Response:
        return web.Response(status=401, text="no")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", refuse)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{runner.addresses[0][1]}")
    try:
        with pytest.raises(OSError, match=r"refused our credentials .* expected MLFLOW_TRACKING_TOKEN"):
            await list_models("mlflow:digits@champion")
    finally:
        await runner.cleanup()


# -- webhooks ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def webhook_endpoint(secret: str) -> AsyncIterator[tuple[str, asyncio.Event]]:
    models, hinted = FakeModels(), asyncio.Event()
    server = HttpServer("127.0.0.1:0", models, make_registry(lambda: models.find("", "")), webhook_secret=secret, hint=hinted.set)
    address = await server.start()
    try:
        yield f"http://{address}/v2/webhooks/mlflow", hinted
    finally:
        await server.stop()


async def test_mlflows_own_webhook_of_a_moved_alias_is_a_hint(tmp_path: Path, registry: Any) -> None:
    publish(tmp_path, "mlflow:hooked", "hooked")
    async with webhook_endpoint("shared") as (url, hinted):
        hook = await asyncio.to_thread(registry.create_webhook, "good", url, ["model_version_alias.created"], secret="shared")
        try:
            await asyncio.to_thread(registry.set_registered_model_alias, "hooked", "champion", "1")
            async with asyncio.timeout(30):
                await hinted.wait()
        finally:
            await asyncio.to_thread(registry.delete_webhook, hook.webhook_id)


async def test_mlflows_webhook_with_another_secret_is_refused(registry: Any) -> None:
    async with webhook_endpoint("shared") as (url, hinted):
        hook = await asyncio.to_thread(registry.create_webhook, "bad", url, ["model_version_alias.created"], secret="guessed")
        try:
            result = await asyncio.to_thread(registry.test_webhook, hook.webhook_id)
        finally:
            await asyncio.to_thread(registry.delete_webhook, hook.webhook_id)
        assert result.response_status == 401
        assert not hinted.is_set()
