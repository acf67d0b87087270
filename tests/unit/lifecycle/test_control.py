"""Loads and unloads by request, with Triton's rules."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from headrace.config import BatchingConfig, ModelConfig
from headrace.errors import LoadError, NotFound, NotReady, ServerError
from headrace.lifecycle.control import ExplicitControl
from headrace.testing import FakeBackend
from swapping import Swapping, scaling


def cursed(*versions: int) -> type[FakeBackend]:
    def load(self: Any) -> None:
        if int(self.path.parent.name) in versions:
            raise LoadError("cursed")
        FakeBackend.load(self)

    return scaling(load=load)


@pytest.fixture
async def swap(tmp_path: Path) -> AsyncIterator[Swapping]:
    swapping = Swapping(tmp_path, cursed(3))
    yield swapping
    await swapping.models.stop(1)


@pytest.fixture
def control(swap: Swapping) -> ExplicitControl:
    return ExplicitControl(swap.models, [swap.source])


async def test_nothing_is_loaded_at_the_start_but_what_was_asked_for_and_all_is_known(swap: Swapping, control: ExplicitControl) -> None:
    swap.offer(1, model="a")
    swap.offer(1, model="b")
    await control.start(["b"])
    assert swap.index() == {"a:": ("", ""), "b:1": ("READY", "")}
    with pytest.raises(NotFound, match="'a' has no available versions"):
        await swap.ask(model="a")
    await control.start(["*"])
    assert swap.index() == {"a:1": ("READY", ""), "b:1": ("READY", "")}


async def test_a_load_returns_when_the_newest_content_serves(swap: Swapping, control: ExplicitControl) -> None:
    swap.offer(1)
    await control.load("m", None, {})
    assert await swap.ask() == (1, 1.0)
    swap.offer(1, 2)
    assert await swap.ask() == (1, 1.0)
    await control.load("m", None, {})
    assert await swap.ask() == (2, 2.0)


async def test_a_load_of_what_is_loaded_does_nothing(swap: Swapping, control: ExplicitControl) -> None:
    swap.offer(1)
    await control.load("m", None, {})
    version = swap.models.resolve("m", "")
    await control.load("m", None, {})
    assert swap.models.resolve("m", "") is version


async def test_a_load_of_which_one_version_fails_changes_nothing(swap: Swapping, control: ExplicitControl) -> None:
    swap.offer(1, version_policy="latest:2")
    await control.load("m", None, {})
    swap.offer(2, 3, version_policy="latest:2")
    with pytest.raises(LoadError, match="load failed for model 'm': version 3 is at UNAVAILABLE state: cursed;"):
        await control.load("m", None, {})
    assert await swap.ask() == (1, 1.0)
    await swap.rest()
    assert [version.version for version in swap.models.find("m", "")] == [1]


async def test_a_model_that_is_not_there_is_tritons_error(control: ExplicitControl) -> None:
    with pytest.raises(ServerError, match="failed to load 'm', failed to poll from model repository"):
        await control.load("m", None, {})


async def test_a_configuration_in_the_request_replaces_the_models_until_the_next_plain_load(
    swap: Swapping, control: ExplicitControl
) -> None:
    swap.offer(1)
    await control.load("m", ModelConfig("m", batching=BatchingConfig(max_batch_size=16)), {})
    signature = swap.models.resolve("m", "").signature
    assert signature is not None
    assert signature.max_batch_size == 16
    await control.load("m", None, {})
    signature = swap.models.resolve("m", "").signature
    assert signature is not None
    assert signature.max_batch_size == 64


async def test_files_in_the_request_replace_the_models_directory_and_are_deleted_with_it(
    swap: Swapping, control: ExplicitControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    await control.load("m", ModelConfig("m"), {"7/model.fake": b"weights", "labels.txt": b"cat"})
    assert await swap.ask() == (7, 7.0)
    assert [path.read_bytes() for path in (tmp_path / "tmp").rglob("model.fake")] == [b"weights"]
    await control.unload("m", with_dependents=False)
    await swap.until(lambda: not swap.models.find("m", ""))
    assert not list((tmp_path / "tmp").iterdir())
    with pytest.raises(ServerError, match="failed to load 'm', failed to poll from model repository"):
        await control.load("m", None, {"7/model.fake": b"weights"})


async def test_an_unloaded_model_stays_known_and_takes_no_requests(swap: Swapping, control: ExplicitControl) -> None:
    swap.offer(1)
    await control.load("m", None, {})
    await control.unload("m", with_dependents=True)
    with pytest.raises((NotFound, NotReady)):
        await swap.ask()
    await swap.until(lambda: swap.index() == {"m:1": ("UNAVAILABLE", "unloaded")})
    await control.load("m", None, {})
    assert await swap.ask() == (1, 1.0)
    await control.unload("unknown", with_dependents=False)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where sent files go."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def count(directory: Path) -> int:
    return len(list(directory.iterdir()))


async def test_files_of_which_no_version_comes_are_deleted(swap: Swapping, control: ExplicitControl, temporary: Path) -> None:
    with pytest.raises(LoadError, match="version 3 is at UNAVAILABLE state: cursed;"):
        await control.load("m", ModelConfig("m"), {"3/model.fake": b"weights"})
    with pytest.raises(ServerError, match="failed to load 'm', no version is available"):
        await control.load("m", ModelConfig("m", version_policy="9"), {"1/model.fake": b"weights"})
    assert count(temporary) == 0


async def test_files_that_are_sent_twice_or_not_selected_are_kept_once(swap: Swapping, control: ExplicitControl, temporary: Path) -> None:
    for _ in range(2):
        await control.load("m", ModelConfig("m"), {"6/model.fake": b"old", "7/model.fake": b"new"})
    assert await swap.ask() == (7, 7.0)
    assert count(temporary) == 1
    await control.unload("m", with_dependents=False)
    await swap.until(lambda: not swap.models.find("m", ""))
    assert count(temporary) == 0


async def test_a_policy_that_selects_nothing_changes_nothing(swap: Swapping, control: ExplicitControl) -> None:
    swap.offer(1)
    await control.load("m", None, {})
    with pytest.raises(ServerError, match="failed to load 'm', no version is available"):
        await control.load("m", ModelConfig("m", version_policy="9"), {})
    assert await swap.ask() == (1, 1.0)


async def test_a_configuration_in_the_request_does_not_take_signatures_away(swap: Swapping, control: ExplicitControl) -> None:
    swap.offer(1, signature_policy="require", signature_key="key.pub")
    with pytest.raises(LoadError, match=r"expected manifest\.json"):
        await control.load("m", ModelConfig("m", batching=BatchingConfig(max_batch_size=16)), {})
    with pytest.raises(LoadError, match=r"expected manifest\.json"):
        await control.load("m", ModelConfig("m"), {"2/model.fake": b"unsigned"})


async def test_the_server_is_ready_without_what_was_not_asked_for_or_was_unloaded(swap: Swapping, control: ExplicitControl) -> None:
    swap.offer(1, model="a")
    swap.offer(1, model="b")
    swap.offer(3, model="c")
    await control.start(["a", "c"])
    await swap.models.settle()
    assert not swap.models.is_ready  # c was asked for, and failed
    await control.unload("c", with_dependents=False)
    assert swap.models.is_ready
    await control.unload("a", with_dependents=False)
    assert swap.models.is_ready
