"""A running server and an object store: what is published is taken up, and what goes wrong there is survived."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import onnx_models
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as aio
from headrace import cli
from headrace.sources.object_store_index import INDEX_NAME
from headrace.testing import serve_in_process
from integration.object_stores import publish_to, put, store_of


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return onnx_models.save(onnx_models.mlp(64, 32, 10), tmp_path / "build", "trained.onnx")


async def ask(client: Any) -> tuple[str, Any]:
    tensor = triton.InferInput("x", [1, 64], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 64), np.float32))
    result = await client.infer("digits", [tensor])
    return result.get_response().model_version, result.as_numpy("y")


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(15):
        while not await condition():
            await asyncio.sleep(0.05)


async def reason_of(client: Any, version: str) -> str:
    found = await client.get_model_repository_index()
    return "".join(entry.reason for entry in found.models if entry.version == version)


async def test_a_running_server_takes_up_what_is_published_and_serves_on_while_the_bucket_is_away(
    bucket: str, artifact: Path, tmp_path: Path, s3: str
) -> None:
    publish_to(bucket, artifact)
    quick = {"poll_interval": 0.2, "cache_directory": str(tmp_path / "cache")}
    async with serve_in_process(bucket, **quick) as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        assert (await ask(client))[0] == "1"
        publish = ["publish", str(artifact), "--to", bucket, "--name", "digits"]
        assert await asyncio.to_thread(cli.main, publish) == 0

        async def is_taken_up() -> bool:
            return (await ask(client))[0] == "2"

        await until(is_taken_up)
        index = obstore.get(store_of(bucket), INDEX_NAME).bytes()
        put(bucket, INDEX_NAME, b"{")

        async def is_told() -> bool:
            return "its source cannot be read now" in await reason_of(client, "2")

        await until(is_told)
        assert (await ask(client))[0] == "2"
        put(bucket, INDEX_NAME, bytes(index))

        async def is_well() -> bool:
            return not await reason_of(client, "2")

        await until(is_well)
        put(bucket, "digits/3/model.onnx", b"junk")
        assert (await ask(client))[0] == "2"


class Line:
    """The way to the store, which can be cut and mended."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.removeprefix("http://").rpartition(":")
        self._port = int(port)
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self.port = 0

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._open:
            writer.transport.abort()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        self._open |= {writer, far_writer}
        await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while content := await reader.read(65536):
                writer.write(content)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()


async def test_while_the_store_is_away_what_is_loaded_serves_and_afterwards_it_is_heard_again(
    bucket: str, artifact: Path, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_to(bucket, artifact)
    line = Line(s3)
    await line.mend()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{line.port}")
    quick = {"poll_interval": 0.2, "cache_directory": str(tmp_path / "cache")}
    async with serve_in_process(bucket, **quick) as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        assert (await ask(client))[0] == "1"
        await line.cut()

        async def is_told() -> bool:
            assert (await ask(client))[0] == "1"
            return "its source cannot be read now" in await reason_of(client, "1")

        await until(is_told)
        assert "its source cannot be read now" in server.admin.describe("digits")[0].error
        assert await client.is_server_ready()
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
        await asyncio.to_thread(publish_to, bucket, artifact)
        await line.mend()

        async def is_taken_up() -> bool:
            return (await ask(client))[0] == "2"

        await until(is_taken_up)
        await line.cut()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
async def test_a_full_disk_fails_the_new_version_with_the_reason_and_the_old_one_serves_on(
    bucket: str, artifact: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(cache)]
    if (await asyncio.to_thread(subprocess.run, mount, capture_output=True, check=False)).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        publish_to(bucket, artifact)
        quick = {"poll_interval": 0.2, "cache_directory": str(cache)}
        async with serve_in_process(bucket, **quick) as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
            assert (await ask(client))[0] == "1"
            large = onnx_models.save(onnx_models.mlp(64, 8192, 10), tmp_path / "large", "trained.onnx")
            await asyncio.to_thread(publish_to, bucket, large)

            async def is_told() -> bool:
                assert (await ask(client))[0] == "1"
                return "no space" in (await reason_of(client, "2")).lower()

            await until(is_told)
            assert await client.is_server_ready()
            await asyncio.to_thread(publish_to, bucket, artifact)

            async def is_taken_up() -> bool:
                return (await ask(client))[0] == "3"

            await until(is_taken_up)
    finally:
        await asyncio.to_thread(subprocess.run, ["umount", "-l", str(cache)], check=True)
