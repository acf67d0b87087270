"""Models from object stores and publishing to them, against a server with S3's API on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import onnx_models
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as aio
from aiohttp import ClientSession, web
from headrace import cli
from headrace.config import SourceConfig
from headrace.errors import AlreadyExists, ConfigError, LoadError
from headrace.plugins import open_source
from headrace.sources import object_store_destination as destination_module
from headrace.sources.object_store import ObjectStoreSource
from headrace.sources.object_store_destination import ObjectStoreDestination
from headrace.sources.object_store_index import INDEX_NAME
from headrace.sources.verification import verify_version
from headrace.testing import serve_in_process
from integration.object_stores import objects, publish_to, put, store_of

UNREACHABLE = "http://127.0.0.1:1"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return onnx_models.save(onnx_models.mlp(64, 32, 10), tmp_path / "build", "trained.onnx")


def content_of(path: Path) -> bytes:
    return path.read_bytes()


def index_of(uri: str) -> dict[str, Any]:
    return json.loads(bytes(obstore.get(store_of(uri), INDEX_NAME).bytes()))["models"]  # type: ignore[no-any-return]


def open_s3(uri: str, tmp_path: Path) -> ObjectStoreSource:
    source = open_source(uri, SourceConfig(str(tmp_path / "cache")))
    assert isinstance(source, ObjectStoreSource)
    return source


async def fetch_and_verify(source: ObjectStoreSource, model: str, version: int) -> Path:
    ref = (await source.list()).models[model]
    fetched = await source.fetch(ref, version)
    verify_version(ref.config, fetched.model_directory, fetched.version_directory)
    return fetched.version_directory


# -- publish, list, fetch ----------------------------------------------------------------------------------------------


async def test_a_model_published_by_the_command_is_listed_fetched_and_verified(bucket: str, artifact: Path, tmp_path: Path) -> None:
    assert cli.main(["publish", str(artifact), "--to", bucket, "--name", "digits"]) == 0
    assert objects(bucket) == {INDEX_NAME, "digits/1/model.onnx", "digits/1/manifest.json"}
    source = open_s3(bucket, tmp_path)
    ref = (await source.list()).models["digits"]
    assert (list(ref.versions), ref.versions[1].location, ref.versions[1].is_complete) == ([1], f"{bucket}/digits/1", True)
    directory = await fetch_and_verify(source, "digits", 1)
    assert content_of(directory / "model.onnx") == content_of(artifact)
    await source.close()


async def test_what_lies_beside_the_versions_comes_along_and_is_in_the_token(bucket: str, artifact: Path, tmp_path: Path) -> None:
    put(bucket, "digits/model.toml", b'[[output]]\nname = "y"\nlabels = "names.txt"\n')
    put(bucket, "digits/names.txt", b"\n".join(b"%d" % n for n in range(10)))
    publish_to(bucket, artifact)
    source = open_s3(bucket, tmp_path)
    before = (await source.list()).models["digits"]
    assert before.config.outputs[0].labels == "names.txt"
    directory = await fetch_and_verify(source, "digits", 1)
    assert (directory.parent / "names.txt").read_bytes().startswith(b"0\n1\n")
    put(bucket, "digits/names.txt", b"\n".join(b"digit %d" % n for n in range(10)))
    publish_to(bucket, artifact)
    after = (await source.list()).models["digits"]
    assert before.versions[1].token != after.versions[1].token
    assert list(after.versions) == [1, 2]
    await source.close()


async def test_a_server_serves_what_was_published(bucket: str, artifact: Path, tmp_path: Path) -> None:
    publish_to(bucket, artifact)
    source = open_s3(bucket, tmp_path)
    directory = await fetch_and_verify(source, "digits", 1)
    async with serve_in_process(directory.parent.parent) as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        tensor = triton.InferInput("x", [2, 64], "FP32")
        tensor.set_data_from_numpy(np.ones((2, 64), np.float32))
        assert (await client.infer("digits", [tensor])).as_numpy("y").shape == (2, 10)
    await source.close()


async def test_an_index_that_has_not_changed_costs_one_conditional_request_a_poll(
    bucket: str, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_to(bucket, artifact)
    async with Proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        source = open_s3(bucket, tmp_path)
        first = await source.list()
        proxy.seen.clear()
        assert [await source.list() for _ in range(3)] == [first] * 3
        assert proxy.seen == [("GET", 304)] * 3
        assert await source.list() is first
        proxy.seen.clear()
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.target)
        publish_to(bucket, artifact)
        assert list((await source.list()).models["digits"].versions) == [1, 2]
        assert proxy.seen == [("GET", 200)]
        await source.close()


class Proxy:
    """Counts what passes: method and status."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.seen: list[tuple[str, int]] = []

    async def __aenter__(self) -> Proxy:
        self._session = ClientSession(auto_decompress=False)
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._pass)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.address = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        await self._runner.cleanup()

    async def _pass(self, request: web.Request) -> web.Response:
        async with self._session.request(
            request.method, self.target + request.raw_path, headers=request.headers, data=await request.read()
        ) as answer:
            self.seen.append((request.method, answer.status))
            kept = {name: answer.headers[name] for name in ("ETag", "Last-Modified", "Content-Type") if name in answer.headers}
            return web.Response(status=answer.status, body=await answer.read(), headers=kept)


# -- a bucket that others fill -----------------------------------------------------------------------------------------


async def test_without_an_index_everything_is_listed(bucket: str, artifact: Path, tmp_path: Path) -> None:
    publish_to(bucket, artifact, "digits")
    obstore.delete(store_of(bucket), INDEX_NAME)
    put(bucket, "copied/7/model.onnx", content_of(artifact))
    put(bucket, "copied/labels.txt", b"a")
    put(bucket, "_hidden/1/model.onnx", b"x")
    put(bucket, "claimed/1/model.onnx", b"x")
    put(bucket, "claimed/.claim-1", b"")
    source = open_s3(bucket, tmp_path)
    listing = await source.list()
    assert set(listing.models) == {"digits", "copied"}
    copied = listing.models["copied"].versions[7]
    assert (listing.models["digits"].versions[1].is_complete, copied.is_complete) == (True, False)
    directory = await fetch_and_verify(source, "copied", 7)
    assert content_of(directory / "model.onnx") == content_of(artifact)
    assert (await source.list()).models["copied"].versions[7].token == copied.token
    put(bucket, "copied/7/more.bin", b"x")
    assert (await source.list()).models["copied"].versions[7].token != copied.token
    await source.close()


async def test_a_manifest_that_came_before_its_files_makes_no_complete_version(bucket: str, artifact: Path, tmp_path: Path) -> None:
    publish_to(bucket, artifact)
    obstore.delete(store_of(bucket), [INDEX_NAME, "digits/1/model.onnx"])
    source = open_s3(bucket, tmp_path)
    assert not (await source.list()).models["digits"].versions[1].is_complete
    await source.close()


async def test_the_first_index_keeps_what_others_have_put_there_and_their_tokens(
    bucket: str, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(bucket, "copied/7/model.onnx", content_of(artifact))
    put(bucket, "copied/labels.txt", b"a")
    source = open_s3(bucket, tmp_path)
    before = (await source.list()).models["copied"].versions[7].token
    with pytest.raises(OSError, match=r"copied/7: no manifest.json, and changed \d+ s ago: somebody may still be copying it"):
        publish_to(bucket, artifact)
    assert objects(bucket) == {"copied/7/model.onnx", "copied/labels.txt"}
    monkeypatch.setattr(destination_module, "SETTLED_AFTER", -5.0)
    publish_to(bucket, artifact)
    listing = await source.list()
    assert set(listing.models) == {"copied", "digits"}
    copied = listing.models["copied"].versions[7]
    assert (copied.token, copied.is_complete) == (before, True)
    await fetch_and_verify(source, "copied", 7)
    await source.close()


# -- what goes wrong ---------------------------------------------------------------------------------------------------


async def test_a_store_that_cannot_be_reached_is_an_os_error_without_secrets(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", UNREACHABLE)
    source = open_s3(bucket, tmp_path)
    with pytest.raises(OSError, match=f"^{bucket}/{INDEX_NAME}: no connection$") as caught:
        await source.list()
    assert "somebody" not in str(caught.value)
    await source.close()


async def test_a_wrong_bucket_is_an_os_error(bucket: str, tmp_path: Path) -> None:
    source = open_s3("s3://no-such-bucket/models", tmp_path)
    with pytest.raises(OSError, match=r"^s3://no-such-bucket/models: 404 Not Found: NoSuchBucket: The specified bucket does not exist$"):
        await source.list()
    await source.close()


def test_publishing_to_a_store_that_is_away_is_said_in_one_line(
    bucket: str, artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", UNREACHABLE)
    assert cli.main(["publish", str(artifact), "--to", bucket, "--name", "digits"]) == 1
    assert capsys.readouterr().err == f"headrace: cannot publish digits: {bucket}: no connection\n"


async def test_a_file_that_is_not_what_was_published_is_not_loaded(bucket: str, artifact: Path, tmp_path: Path) -> None:
    publish_to(bucket, artifact)
    content = content_of(artifact)
    put(bucket, "digits/1/model.onnx", content[:-1] + bytes([content[-1] ^ 1]))
    source = open_s3(bucket, tmp_path)
    expected = hashlib.sha256(content).hexdigest()
    with pytest.raises(LoadError, match=f"^digits/1/model.onnx: expected sha256 {expected}, got [0-9a-f]{{64}}$"):
        await fetch_and_verify(source, "digits", 1)
    assert expected not in {path.name for path in (tmp_path / "cache" / "blobs").iterdir()}
    put(bucket, "digits/1/manifest.json", b"{}")
    with pytest.raises(LoadError, match=r"^digits/1/manifest.json: expected sha256"):
        await fetch_and_verify(source, "digits", 1)
    obstore.delete(store_of(bucket), "digits/1/manifest.json")
    with pytest.raises(LoadError, match=r"digits/1/manifest.json: 404 Not Found: NoSuchKey"):
        await fetch_and_verify(source, "digits", 1)
    await source.close()


async def test_a_configuration_that_cannot_be_read_is_its_models_error(bucket: str, artifact: Path, tmp_path: Path) -> None:
    publish_to(bucket, artifact, "fine")
    publish_to(bucket, artifact, "broken")
    obstore.delete(store_of(bucket), INDEX_NAME)
    put(bucket, "broken/model.toml", b"max_batch_sise = 4\n")
    source = open_s3(bucket, tmp_path)
    listing = await source.list()
    assert list(listing.models) == ["fine"]
    assert "broken/model.toml: unknown key 'max_batch_sise'" in listing.errors["broken"]
    put(bucket, "broken/model.toml", b"max_batch_size = 4\n")
    assert (await source.list()).models["broken"].config.batching.max_batch_size == 4
    await source.close()


async def test_a_file_changed_behind_the_index_is_an_error_until_the_next_publication(bucket: str, artifact: Path, tmp_path: Path) -> None:
    put(bucket, "digits/model.toml", b"max_batch_size = 4\n")
    publish_to(bucket, artifact)
    put(bucket, "digits/model.toml", b"max_batch_size = 8\n")
    source = open_s3(bucket, tmp_path)
    assert "digits/model.toml: not what headrace-index.json says" in (await source.list()).errors["digits"]
    publish_to(bucket, artifact)
    assert (await source.list()).models["digits"].config.batching.max_batch_size == 8
    await source.close()


def test_a_uri_without_a_bucket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^s3://: "):
        open_source("s3://", SourceConfig(str(tmp_path)))


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.exceptions", None)
    with pytest.raises(ConfigError, match=r"^s3://b/x: object stores need the package obstore: pip install 'headrace\[object-store\]'$"):
        open_source("s3://b/x", SourceConfig(str(tmp_path)))


# -- publishing --------------------------------------------------------------------------------------------------------


def test_publishers_at_the_same_time_all_get_in(bucket: str, artifact: Path) -> None:
    start, versions, errors = threading.Barrier(4), [], []

    def run(name: str) -> None:
        try:
            start.wait()
            versions.append((name, publish_to(bucket, artifact, name)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("digits", "digits", "digits", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    digits = sorted(number for name, number in versions if name == "digits")
    assert len(set(digits)) == 3, "a number was given twice"
    index = index_of(bucket)
    assert (sorted(index["digits"]["versions"]), list(index["other"]["versions"])) == ([str(number) for number in digits], ["1"])
    whole = {f"digits/{number}/{file}" for number in digits for file in ("model.onnx", "manifest.json")}
    assert objects(bucket) == whole | {INDEX_NAME, "other/1/model.onnx", "other/1/manifest.json"}


def test_a_number_that_is_taken_is_never_overwritten(bucket: str, artifact: Path) -> None:
    publish_to(bucket, artifact, version=5)
    before = index_of(bucket)
    with pytest.raises(AlreadyExists, match="digits:5 exists in"):
        publish_to(bucket, artifact, version=5)
    destination = ObjectStoreDestination(bucket, SourceConfig())
    with destination.open_model("digits") as directory:
        staging = directory / ".staging"
        staging.mkdir()
        (staging / "manifest.json").write_bytes(b"{}")
        assert destination.commit("digits", 5, staging) is None
    assert index_of(bucket) == before
    assert objects(bucket) == {INDEX_NAME, "digits/5/model.onnx", "digits/5/manifest.json"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "torn down")])
@pytest.mark.parametrize("at", ["model.onnx", "manifest.json", INDEX_NAME])
def test_nothing_is_left_of_a_publication_that_failed(
    bucket: str, artifact: Path, monkeypatch: pytest.MonkeyPatch, at: str, error: BaseException
) -> None:
    publish_to(bucket, artifact)
    before, index = objects(bucket), index_of(bucket)
    whole = ObjectStoreDestination._put

    def broken(self: ObjectStoreDestination, path: str, *rest: Any) -> None:
        if path.endswith(at):
            raise error
        whole(self, path, *rest)

    monkeypatch.setattr(ObjectStoreDestination, "_put", broken)
    with pytest.raises(type(error)):
        publish_to(bucket, artifact)
    assert (objects(bucket), index_of(bucket)) == (before, index)


def test_an_index_write_without_an_answer_is_looked_after(bucket: str, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ObjectStoreDestination._put

    def unanswered(self: ObjectStoreDestination, path: str, *rest: Any) -> None:
        whole(self, path, *rest)
        if path == INDEX_NAME:
            raise OSError(110, "connection lost")

    monkeypatch.setattr(ObjectStoreDestination, "_put", unanswered)
    assert publish_to(bucket, artifact) == 1
    assert list(index_of(bucket)["digits"]["versions"]) == ["1"]


# -- http --------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def website(tmp_path: Path) -> AsyncIterator[str]:
    """What a web server makes of `tmp_path`/site."""
    (tmp_path / "site").mkdir()
    app = web.Application()
    app.router.add_static("/models", tmp_path / "site")
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/models"
    await runner.cleanup()


async def test_models_behind_a_web_server_are_found_by_their_index(bucket: str, artifact: Path, tmp_path: Path, website: str) -> None:
    source = open_s3(website, tmp_path)
    with pytest.raises(OSError, match=rf"{INDEX_NAME}: 404 Not Found: over HTTP expected the index that publishing writes"):
        await source.list()
    put(bucket, "digits/model.toml", b"max_batch_size = 4\n")
    publish_to(bucket, artifact)
    for path in objects(bucket):  # as a mirror does
        target = tmp_path / "site" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(bytes(obstore.get(store_of(bucket), path).bytes()))
    listing = await source.list()
    assert listing.models["digits"].config.batching.max_batch_size == 4
    await fetch_and_verify(source, "digits", 1)
    assert await source.list() is listing
    await source.close()


def test_http_cannot_be_published_to(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["publish", str(artifact), "--to", "https://models.example/x", "--name", "digits"]) == 2
    assert "unknown scheme 'https'" in capsys.readouterr().err
