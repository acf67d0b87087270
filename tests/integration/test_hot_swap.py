"""Versions published while a real server answers a real client: taken up, refused with a reason, moved by alias, rolled back."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as aio
from headrace import cli
from headrace.testing import serve_in_process
from onnx import helper

QUICK = {"settle": 0.3, "poll_interval": 0.2}


def build(folder: Path, seed: int) -> Path:
    return onnx_models.save(onnx_models.mlp(8, 16, 4, seed=seed), folder / "build" / str(seed), "trained.onnx")


async def publish(artifact: Path, to: str, name: str = "m", *flags: str) -> None:
    """By the command, as a user would; in a thread, since the server under test runs on this loop."""
    assert await asyncio.to_thread(cli.main, ["publish", str(artifact), "--to", to, "--name", name, *flags]) == 0


async def ask(client: Any, version: str = "") -> tuple[str, Any]:
    tensor = triton.InferInput("x", [1, 8], "FP32")
    tensor.set_data_from_numpy(np.linspace(-1, 1, 8, dtype=np.float32).reshape(1, 8))
    result = await client.infer("m", [tensor], model_version=version)
    return result.get_response().model_version, result.as_numpy("y")


async def index(client: Any) -> dict[str, tuple[str, str]]:
    found = await client.get_model_repository_index()
    return {f"{entry.name}:{entry.version}": (entry.state, entry.reason) for entry in found.models}


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.02)


async def until_answers(client: Any, version: str) -> None:
    async def is_there() -> bool:
        return (await ask(client))[0] == version

    await until(is_there)


class Load:
    """One client that asks all the time, and what it was told."""

    def __init__(self, client: Any) -> None:
        self.answers: list[tuple[str, Any]] = []
        self._client = client
        self._stop = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while not self._stop.is_set():
            self.answers.append(await ask(self._client))

    async def end(self) -> None:
        """Raises what a call was refused with."""
        self._stop.set()
        await self._task


@asynccontextmanager
async def loaded(client: Any) -> AsyncIterator[Load]:
    load = Load(client)
    yield load
    await load.end()


async def test_versions_published_under_load_are_taken_up_with_no_failed_request_and_no_foreign_answer(tmp_path: Path) -> None:
    models = tmp_path / "models"
    await publish(build(tmp_path, 1), str(models))
    async with serve_in_process(models) as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        right = {"1": (await ask(client))[1]}
        async with loaded(client) as load:
            for number in range(2, 7):
                await publish(build(tmp_path, number), str(models))
                await until_answers(client, str(number))
                right[str(number)] = (await ask(client))[1]
        assert len({answer.tobytes() for answer in right.values()}) == 6
        for version, answer in load.answers:
            np.testing.assert_allclose(answer, right[version], rtol=1e-5, atol=1e-6)
        assert [int(version) for version, _ in load.answers] == sorted(int(version) for version, _ in load.answers)


def truncate(version: Path) -> None:
    content = (version / "model.onnx").read_bytes()
    (version / "model.onnx").write_bytes(content[: len(content) // 2])


def flip(version: Path) -> None:
    content = bytearray((version / "model.onnx").read_bytes())
    content[-1] ^= 1
    (version / "model.onnx").write_bytes(content)


def invalidate(version: Path) -> None:
    (version / "manifest.json").unlink()
    (version / "model.onnx").write_bytes(b"this is no model")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (truncate, "m/2/model.onnx: expected "),
        (flip, "m/2/model.onnx: expected sha256 "),
        (lambda version: (version / "extra.so").touch(), 'm/2: file "extra.so" is not in manifest.json'),
        (invalidate, "onnxruntime could not load 2/model.onnx"),
    ],
)
async def test_a_bad_publication_is_shown_with_its_reason_and_the_old_version_serves_on(
    tmp_path: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    models, elsewhere = tmp_path / "models", tmp_path / "elsewhere"
    for repository in (models, elsewhere):
        await publish(build(tmp_path, 1), str(repository))
    await publish(build(tmp_path, 2), str(elsewhere))
    spoil(elsewhere / "m" / "2")
    async with serve_in_process(models, **QUICK) as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        async with loaded(client) as load:
            (elsewhere / "m" / "2").rename(models / "m" / "2")

            async def is_shown() -> bool:
                return (await index(client)).get("m:2", ("", ""))[0] == "UNAVAILABLE"

            await until(is_shown)
            assert (await index(client))["m:2"][1].startswith(reason)
            assert (await index(client))["m:1"] == ("READY", "")
            assert await client.is_server_ready()
            shutil.rmtree(models / "m" / "2")
            await publish(build(tmp_path, 3), str(models), "m", "--version", "3")
            await until_answers(client, "3")
        assert {version for version, _ in load.answers} == {"1", "3"}


async def test_a_directory_that_is_copied_slowly_is_taken_when_it_is_whole(tmp_path: Path) -> None:
    models = tmp_path / "models"
    await publish(build(tmp_path, 1), str(models))
    content = build(tmp_path, 2).read_bytes()
    async with serve_in_process(models, **QUICK) as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        (models / "m" / "2").mkdir()
        with (models / "m" / "2" / "model.onnx").open("wb") as file:
            for start in range(0, len(content), len(content) // 6):
                file.write(content[start : start + len(content) // 6])
                file.flush()
                await asyncio.sleep(0.1)
                assert (await ask(client))[0] == "1"
                assert not (await index(client)).get("m:2", ("", ""))[1]
        await until_answers(client, "2")


async def test_another_signature_than_before_takes_over_and_wrong_requests_are_told_what_it_wants(tmp_path: Path) -> None:
    models = tmp_path / "models"
    await publish(build(tmp_path, 1), str(models))
    async with serve_in_process(models) as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        assert (await ask(client))[0] == "1"
        wider = onnx_models.save(onnx_models.mlp(9, 4), tmp_path / "build" / "wider", "trained.onnx")
        await publish(wider, str(models))
        with pytest.raises(
            triton.InferenceServerException, match=r"unexpected shape for input 'x' for model 'm'. Expected \[-1,9\], got \[1,8\]"
        ):
            await until_answers(client, "2")


async def test_an_emptied_repository_unloads_nothing(tmp_path: Path) -> None:
    models = tmp_path / "models"
    await publish(build(tmp_path, 1), str(models))
    async with serve_in_process(models, **QUICK) as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        (models / "m").rename(tmp_path / "away")

        async def is_told() -> bool:
            return "suddenly empty" in (await index(client))["m:1"][1]

        await until(is_told)
        assert (await ask(client))[0] == "1"
        assert "suddenly empty" in server.admin.describe("m")[0].error
        models.rename(tmp_path / "gone")
        await asyncio.sleep(0.5)
        assert (await ask(client))[0] == "1"
        (tmp_path / "gone").rename(models)
        (tmp_path / "away").rename(models / "m")

        async def is_well() -> bool:
            return (await index(client))["m:1"] == ("READY", "")

        await until(is_well)


async def test_a_canary_that_answers_nan_is_rolled_back_by_itself_and_the_audit_log_tells_the_story(tmp_path: Path) -> None:
    models, audit = tmp_path / "models", tmp_path / "audit.jsonl"
    await publish(build(tmp_path, 1), str(models))
    (models / "m" / "model.toml").write_text('[rollout]\nmode = "canary"\npercent = 50\nprobation_s = 60\n')
    bad = onnx_models.mlp(8, 16, 4, seed=2)
    last = bad.graph.output[0].name
    for node in bad.graph.node:
        for position, name in enumerate(node.output):
            if name == last:
                node.output[position] = "logits"
    # log of a class's score is NaN where that is negative: for one kind of request, not for all.
    bad.graph.node.append(helper.make_node("Log", ["logits"], [last]))
    artifact = onnx_models.save(bad, tmp_path / "build" / "bad", "trained.onnx")
    async with (
        serve_in_process(models, audit_log=str(audit), **QUICK) as server,
        aio.InferenceServerClient(server.grpc_addresses[0]) as client,
    ):
        async with loaded(client) as load:
            await publish(artifact, str(models))

            async def is_rolled_back() -> bool:
                return any(event.kind == "rolled_back" for event in server.models.event_log.since(0))

            await until(is_rolled_back)
            await asyncio.sleep(0.1)
            load.answers.clear()
            await asyncio.sleep(0.2)
        assert {version for version, _ in load.answers} == {"1"}
    story = [(line["event"], line["version"]) for line in map(json.loads, audit.read_text().splitlines())]
    assert [entry for entry in story if entry[0] in ("rollout", "rolled_back")] == [("rollout", 2), ("rolled_back", 2)]
    reason = next(line["reason"] for line in map(json.loads, audit.read_text().splitlines()) if line["event"] == "rolled_back")
    assert reason.startswith("NaN or infinity in ")
    async with (
        serve_in_process(models, audit_log=str(audit), **QUICK) as server,
        aio.InferenceServerClient(server.grpc_addresses[0]) as client,
    ):
        assert (await ask(client))[0] == "1", "a server that starts again takes it up again"
