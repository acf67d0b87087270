"""Sequences of events that went wrong once."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from headrace.config import ModelConfig, RolloutConfig, SourceConfig
from headrace.errors import BackendError, LoadError, ServerError
from headrace.lifecycle import model as module
from headrace.lifecycle import trial as trial_module
from headrace.lifecycle.admin import Admin
from headrace.lifecycle.control import ExplicitControl
from headrace.lifecycle.events import Actor
from headrace.sources.directory import DirectorySource
from headrace.telemetry.audit import AuditLog
from headrace.testing import FakeBackend, FakeSource
from swapping import Swapping, scaling

ANNA = Actor("anna", "says so")


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Any]:
    made: list[Swapping] = []

    def make(backend: type[FakeBackend] | None = None) -> Swapping:
        made.append(Swapping(tmp_path, backend or scaling()))
        return made[-1]

    yield make
    for swapping in made:
        await swapping.models.stop(1)


def failing(*versions: int, **more: Any) -> type[FakeBackend]:
    def load(self: Any) -> None:
        if int(self.path.parent.name) in versions:
            raise LoadError("cursed")
        FakeBackend.load(self)

    return scaling(load=load, **more)


def trials(mode: str = "canary", **options: Any) -> dict[str, Any]:
    return {"rollout": RolloutConfig(**{"mode": mode, "percent": 50.0, "probation": 3600.0, "min_requests": 20, **options})}


async def share(swap: Swapping, count: int = 10) -> Counter[int]:
    return Counter([(await swap.ask())[0] for _ in range(count)])


async def test_several_bad_versions_at_the_start_are_each_tried_once_and_the_good_one_below_serves(make: Any) -> None:
    swap = make(failing(2, 3))
    async with asyncio.timeout(10):
        await swap.publish(1, 2, 3)
    assert await swap.ask() == (1, 1.0)
    assert Counter(swap.events("failed")) == {("failed", 3): 1, ("failed", 2): 1}


async def test_nothing_but_bad_versions_are_each_tried_once(make: Any) -> None:
    swap = make(failing(1, 2, 3))
    async with asyncio.timeout(10):
        await swap.publish(1, 2, 3)
    assert Counter(swap.events("failed")) == {("failed", version): 1 for version in (1, 2, 3)}


async def test_a_version_that_the_serving_one_made_room_for_and_that_failed_is_not_tried_again(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "retry_delay", lambda failures: 0.01)
    backend = failing(2)
    backend.estimate_memory = classmethod(lambda cls, path: 1 << 60 if path.parent.name == "2" else 0)  # type: ignore[method-assign]
    swap = make(backend)
    await swap.publish(1)
    await swap.publish(1, 2)
    await asyncio.sleep(0.1)
    assert swap.events("failed") == [("failed", 2)]
    assert await swap.ask() == (1, 1.0)


async def test_a_version_that_is_taken_back_in_the_turn_in_which_it_came_leaves_nothing_behind(make: Any) -> None:
    swap = make(failing(2))
    await swap.publish(1)
    await swap.publish(1, 2)
    swap.offer(1, 3)
    await swap.take()
    swap.offer(1)
    await swap.take()
    swap.offer(1, 3)
    await swap.take()
    swap.offer(1)
    asyncio.get_running_loop().call_soon(lambda: None)
    await swap.take()
    async with asyncio.timeout(5):
        await swap.rest()
        await swap.publish(1, 3)
    assert await swap.ask() == (3, 3.0)


async def test_a_version_on_probation_that_is_superseded_leaves_the_proven_one_as_the_way_back(make: Any) -> None:
    swap = make()
    await swap.publish(1, **trials("probation"))
    await swap.publish(1, 2, **trials("probation"))
    await swap.publish(1, 2, 3, **trials("probation"))
    assert await share(swap) == {3: 10}
    assert swap.models.models["m"].trial.baseline.version == 1
    await Admin(swap.models, []).roll_back("m", ANNA)
    assert swap.models.models["m"].trial.baseline.version == 1, "version 2, which has not passed, is the measure of others"


async def test_a_version_that_has_passed_and_waits_is_still_watched(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_module, "LOOK_EVERY", 0.02)
    broken: list[bool] = []

    def execute(self: Any, inputs: Any, outputs: Any) -> Any:
        if broken and self.path.parent.name == "2":
            raise BackendError("no such kernel")
        return [inputs["x"]]

    swap = make(scaling(execute=execute))
    await swap.publish(1, **trials(probation=0.0, promote="manual"))
    await swap.publish(1, 2, **trials(probation=0.0, promote="manual"))
    async with asyncio.timeout(10):
        while not swap.events("passed"):
            await swap.ask()
        broken.append(True)
        while not swap.events("rolled_back"):
            try:
                await swap.ask()
            except BackendError:
                pass
    assert swap.events("passed", "rolled_back") == [("passed", 2), ("rolled_back", 2)]


async def test_content_that_replaces_a_serving_number_has_to_pass_its_trial_too(make: Any) -> None:
    swap = make()
    await swap.publish(1, **trials())
    old = swap.models.resolve("m", "")
    await swap.publish(1, tokens={1: "other"}, **trials())
    assert swap.models.models["m"].trial is not None
    assert swap.models.resolve("m", "") is old


async def test_a_version_that_was_rolled_back_stays_so_when_its_model_goes_and_comes_back(make: Any) -> None:
    swap = make()
    await swap.publish(1, model="other")
    await swap.publish(1)
    await swap.publish(1, 2)
    await Admin(swap.models, []).roll_back("m", ANNA)
    del swap.source.models["m"]
    await swap.take()
    await swap.until(lambda: "m" not in swap.models.models)
    await swap.publish(1, 2)
    assert await swap.ask() == (1, 1.0)


async def test_a_promoted_version_serves_on_though_the_policy_selects_another(make: Any) -> None:
    swap = make()
    await swap.publish(1, 2, labels={"stable": 1})
    admin = Admin(swap.models, [])
    await admin.set_traffic("m", 1, "canary", 10.0, ANNA)
    await admin.promote("m", 1, ANNA)
    await swap.publish(1, 2)
    assert await share(swap) == {1: 10}
    await swap.publish(1, 2, 3)
    assert await share(swap) == {3: 10}


async def test_a_model_that_moves_to_another_repository_is_served_from_there(make: Any) -> None:
    swap = make()
    await swap.publish(1, model="other")
    await swap.publish(1)
    elsewhere = FakeSource({"m": swap.source.models["m"]})
    elsewhere.uri = "elsewhere://"
    swap.models.take(elsewhere, await elsewhere.list())
    del swap.source.models["m"]
    await swap.take()
    await swap.rest()
    assert await swap.ask() == (1, 1.0)
    assert swap.models.models["m"].offer.source == "elsewhere://"
    assert "m:" not in swap.index()


async def test_sent_files_are_refused_while_nobody_can_say_how_the_model_has_to_be_signed(make: Any) -> None:
    swap = make()
    swap.source.errors["m"] = "m/model.toml: not valid TOML"
    with pytest.raises(ServerError, match=r"failed to poll from model repository: m/model\.toml: not valid TOML"):
        await ExplicitControl(swap.models, [swap.source]).load("m", ModelConfig("m"), {"1/model.fake": b"x"})


async def test_a_model_whose_first_load_by_request_fails_stays_known(make: Any) -> None:
    swap = make(failing(1))
    swap.offer(1)
    control = ExplicitControl(swap.models, [swap.source])
    await control.start([])
    with pytest.raises(LoadError):
        await control.load("m", None, {})
    await swap.models.settle()
    assert [row.model for row in swap.models.index()] == ["m"]


async def test_names_that_are_no_unicode_disturb_neither_the_log_nor_the_other_models(make: Any, tmp_path: Path) -> None:
    swap = make(failing())
    audit = AuditLog(tmp_path / "audit.jsonl")
    swap.models.event_log.subscribe(audit.record)
    swap.models.event_log.subscribe(lambda event: 1 / 0)
    swap.source.errors["odd"] = "cannot be read: \udcff"
    await swap.publish(1)
    assert await swap.ask() == (1, 1.0)
    audit.stop()
    assert b"\\udcff" in (tmp_path / "audit.jsonl").read_bytes()
    assert all(row.reason.isprintable() for row in swap.models.index())


async def test_a_directory_whose_name_is_no_unicode_and_a_configuration_without_end_are_no_matter_of_the_others(tmp_path: Path) -> None:
    for name in (b"good", b"deep", b"digits"):
        os.makedirs(os.path.join(os.fsencode(tmp_path), name, b"1"))
    os.makedirs(os.path.join(os.fsencode(tmp_path), b"\xff", b"1"))
    (tmp_path / "deep" / "model.toml").write_text("a=" + "[" * 5000)
    (tmp_path / "digits" / "model.toml").write_text(f"version_policy = 'latest:{'9' * 5000}'")
    listing = await DirectorySource(str(tmp_path), SourceConfig()).list()
    assert (list(listing.models), sorted(listing.errors)) == (["good"], ["deep", "digits"])


async def test_a_version_that_is_unloaded_but_still_listed_is_not_taken_for_its_successor(make: Any) -> None:
    swap = make()
    await swap.publish(1)
    old = swap.models.resolve("m", "")
    await old.unload(1.0)
    await swap.until(lambda: any(version.is_live for version in swap.models.find("m", "1")))
    assert await swap.ask() == (1, 1.0)
    assert swap.models.resolve("m", "") is not old
