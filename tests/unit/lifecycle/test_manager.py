"""Versions and routes with fake backends: what is loaded, what is found, what is said of the rest."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from headrace.backends.base import ArtifactSignature
from headrace.config import ModelConfig
from headrace.errors import BackendError, HeadraceError, InvalidRequest, LoadError, NotFound, NotReady, ShuttingDown
from headrace.lifecycle.manager import ModelManager
from headrace.lifecycle.routes import parse_version
from headrace.lifecycle.state import MOVES, VersionState, check_move
from headrace.requests import InferRequest, InputTensor, Reply
from headrace.signature import DataType, TensorSpec
from headrace.sources.base import ModelRef, VersionRef
from headrace.testing import CollectingOutlet, FakeBackend, FakeSource
from headrace.wire.messages import ModelInferResponse


def no_timer(when: float, callback: Callable[[], None]) -> None:
    raise AssertionError("nothing here expires")


def manager(backend: type[FakeBackend]) -> ModelManager:
    return ModelManager({"fake": backend}, lambda: no_timer)


def offer(source: FakeSource, root: Path, model: str, *versions: int, **config: Any) -> None:
    """From now on the source has these versions of the model."""
    refs = {}
    for version in versions:
        directory = root / model / str(version)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "model.fake").touch()
        refs[version] = VersionRef("token", str(directory))
    source.models[model] = ModelRef(model, ModelConfig(model, **config), refs)


async def take(models: ModelManager, source: FakeSource) -> None:
    models.take(source, await source.list())
    await models.settle()


async def serve(models: ModelManager, root: Path, model: str, *versions: int, **config: Any) -> FakeSource:
    source = FakeSource()
    offer(source, root, model, *versions, **config)
    await take(models, source)
    return source


async def infer(models: ModelManager, model: str, rows: list[list[float]]) -> np.ndarray | HeadraceError:
    outlet = CollectingOutlet()
    reply = Reply(outlet)
    array = np.array(rows, "<f4")
    models.resolve(model, "").submit(InferRequest(model, "", "", [InputTensor("x", "FP32", array.shape, array.tobytes())]), reply, 0.0)
    answer = await asyncio.to_thread(outlet.wait, reply)
    if isinstance(answer, HeadraceError):
        return answer
    return np.frombuffer(ModelInferResponse.FromString(answer).raw_output_contents[0], "<f4")


async def test_a_model_that_fails_to_load_does_not_stop_the_others_and_is_shown_with_its_reason(tmp_path: Path) -> None:
    class Picky(FakeBackend.make()):  # type: ignore[misc]
        def load(self) -> None:
            if "bad" in str(self.path):
                raise LoadError("weights are cursed")
            super().load()

    models = manager(Picky)
    source = FakeSource()
    source.errors["odd"] = "no version"
    offer(source, tmp_path, "bad", 1)
    offer(source, tmp_path, "good", 1)
    await take(models, source)
    rows = [(e.model, e.version, e.state, e.reason) for e in models.index()]
    assert rows == [("bad", "1", "UNAVAILABLE", "weights are cursed"), ("good", "1", "READY", ""), ("odd", "", "UNAVAILABLE", "no version")]
    assert not models.is_ready
    np.testing.assert_array_equal(await infer(models, "good", [[1, 2]]), [1, 2])
    await models.stop(1)


async def test_requests_without_version_go_to_the_highest_live_one(tmp_path: Path) -> None:
    models = manager(FakeBackend.make())
    await serve(models, tmp_path, "m", 1, 3, version_policy="all")
    assert models.is_ready
    assert models.resolve("m", "").version == 3
    assert models.resolve("m", "1").version == 1
    await models.stop(1)


async def test_what_cannot_be_found_is_said_in_tritons_words(tmp_path: Path) -> None:
    models = manager(FakeBackend.make())
    source = FakeSource()
    source.errors["broken"] = "why"
    offer(source, tmp_path, "m", 1)
    await take(models, source)
    with pytest.raises(NotFound, match="Request for unknown model: 'foo' is not found"):
        models.resolve("foo", "")
    with pytest.raises(NotFound, match="Request for unknown model: 'm' version 99 is not found"):
        models.resolve("m", "99")
    with pytest.raises(NotFound, match="'broken' has no available versions"):
        models.resolve("broken", "")
    with pytest.raises(InvalidRequest, match="expected a number"):
        models.resolve("m", "one")
    await models.stop(1)
    with pytest.raises(ShuttingDown):
        models.resolve("m", "")


async def test_a_backend_error_fails_its_batch_only_and_keeps_its_reason(tmp_path: Path) -> None:
    def execute(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        if (inputs["x"] < 0).any():
            raise BackendError("negative rows are not for me")
        return [inputs["x"]]

    models = manager(FakeBackend.make(execute))
    await serve(models, tmp_path, "m", 1)
    failed = await infer(models, "m", [[-1, 0]])
    assert isinstance(failed, BackendError)
    assert "negative rows" in str(failed)
    np.testing.assert_array_equal(await infer(models, "m", [[5, 6]]), [5, 6])
    await models.stop(1)


async def test_an_unknown_exception_of_a_backend_does_not_reach_the_client(tmp_path: Path) -> None:
    def execute(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        if inputs["x"].any():
            raise ZeroDivisionError("secret path /etc/weights")
        return [inputs["x"]]

    models = manager(FakeBackend.make(execute))
    await serve(models, tmp_path, "m", 1)
    failed = await infer(models, "m", [[1, 0]])
    assert isinstance(failed, HeadraceError)
    assert "secret" not in str(failed)
    await models.stop(1)


async def test_a_free_first_dimension_that_is_no_batch_dimension_is_found_out_at_load(tmp_path: Path) -> None:
    pooled = ArtifactSignature((TensorSpec("x", DataType.FP32, (-1, 2)),), (TensorSpec("y", DataType.FP32, (-1, 2)),))
    models = manager(FakeBackend.make(lambda inputs: [inputs["x"].mean(axis=0, keepdims=True)], artifact=pooled))
    await serve(models, tmp_path, "m", 1)
    version = models.resolve("m", "")
    assert version.signature is not None
    assert version.signature.max_batch_size == 0
    assert version.effective is not None
    assert "no batch dimension" in version.effective.notes[-1]
    np.testing.assert_array_equal(await infer(models, "m", [[1, 2], [3, 4], [5, 6]]), [3, 4])
    await models.stop(1)


async def test_unloading_closes_every_instance_and_ends_its_thread(tmp_path: Path) -> None:
    backend = FakeBackend.make()
    models = manager(backend)
    await serve(models, tmp_path, "m", 1)
    assert len(backend.live) == 1
    version = models.resolve("m", "")
    await models.stop(1)
    assert backend.live == []
    assert version.state is VersionState.UNLOADED
    with pytest.raises(NotReady):
        version.submit(InferRequest("m", "", "", []), Reply(CollectingOutlet()), 0.0)


async def test_changes_are_announced_until_unsubscribed(tmp_path: Path) -> None:
    models = manager(FakeBackend.make())
    seen: list[bool] = []
    unsubscribe = models.subscribe(lambda: seen.append(models.is_ready))
    await serve(models, tmp_path, "m", 1)
    assert seen[-1]
    unsubscribe()
    count = len(seen)
    await models.stop(1)
    assert len(seen) == count


def test_every_state_is_reachable_and_illegal_moves_are_refused() -> None:
    targets = {target for moves in MOVES.values() for target in moves}
    assert targets | {VersionState.DISCOVERED} == set(VersionState)
    with pytest.raises(AssertionError, match="from unloaded to live"):
        check_move(VersionState.UNLOADED, VersionState.LIVE)


@pytest.mark.parametrize("text", ["-1", "1.0", "one", " 1", "٣", "9" * 5000])
def test_a_version_is_decimal_digits(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_version(text, {})


async def test_a_load_that_is_cancelled_ends_at_once_and_its_instance_is_closed_when_it_can_be(tmp_path: Path) -> None:
    loading, may_load, closed = threading.Event(), threading.Event(), threading.Event()

    class Slow(FakeBackend.make()):  # type: ignore[misc]
        def load(self) -> None:
            loading.set()
            assert may_load.wait(5)
            super().load()

        def close(self) -> None:
            super().close()
            closed.set()

    models = manager(Slow)
    task = asyncio.ensure_future(serve(models, tmp_path, "m", 1))
    await asyncio.to_thread(loading.wait, 5)
    version = models.find("m", "")[0]
    async with asyncio.timeout(2):
        await models.stop(1)
    assert version.state is VersionState.UNLOADED
    assert models.is_busy
    task.cancel()
    may_load.set()
    assert await asyncio.to_thread(closed.wait, 5)
    assert Slow.live == []


async def test_an_unknown_failure_while_loading_is_one_sentence_and_leaves_no_thread(tmp_path: Path) -> None:
    class Failing(FakeBackend.make()):  # type: ignore[misc]
        def load(self) -> None:
            raise SystemExit("secret")

    models = manager(Failing)
    await serve(models, tmp_path, "m", 1)
    assert [row.reason for row in models.index()] == ["internal error while loading; the server's log has the reason"]
    assert not models.is_busy
    await models.stop(1)
