"""Versions that follow each other: what serves meanwhile, what is kept, what is given back."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from headrace.config import BatchingConfig
from headrace.errors import InvalidRequest, LoadError, NotFound
from headrace.lifecycle import model as module
from headrace.lifecycle.state import VersionState
from headrace.testing import FakeBackend, FakeSource
from swapping import Swapping, scaling


def failing_for(*versions: int, by: str = "load") -> type[FakeBackend]:
    """Those versions cannot be loaded, or looked at."""

    def load(self: Any) -> None:
        if int(self.path.parent.name) in versions:
            raise LoadError(f"version {self.path.parent.name} is cursed")
        FakeBackend.load(self)

    @classmethod  # type: ignore[misc]
    def inspect(cls: Any, path: Path) -> Any:
        if int(path.parent.name) in versions:
            raise LoadError(f"version {path.parent.name} is cursed")
        return cls.artifact

    return scaling(**{by: load if by == "load" else inspect})


def held_runs() -> tuple[type[FakeBackend], threading.Event, threading.Event]:
    """(backend, set when version 1 runs a request, to be set when it may go on)."""
    entered, may_go = threading.Event(), threading.Event()

    def execute(self: Any, inputs: Any, outputs: Any) -> Any:
        if inputs["x"].any() and self.path.parent.name == "1":
            entered.set()
            assert may_go.wait(5)
        return [inputs["x"] * int(self.path.parent.name)]

    return scaling(execute=execute), entered, may_go


@pytest.fixture
async def swap(tmp_path: Path) -> AsyncIterator[Swapping]:
    swapping = Swapping(tmp_path, scaling())
    yield swapping
    await swapping.models.stop(1)


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Any]:
    made: list[Swapping] = []

    def make(backend: type[FakeBackend]) -> Swapping:
        made.append(Swapping(tmp_path, backend))
        return made[-1]

    yield make
    for swapping in made:
        await swapping.models.stop(1)


async def test_a_new_version_takes_over_and_the_old_one_is_unloaded(swap: Swapping) -> None:
    await swap.publish(1)
    assert await swap.ask() == (1, 1.0)
    await swap.publish(1, 2)
    assert await swap.ask() == (2, 2.0)
    assert swap.index() == {"m:1": ("UNAVAILABLE", "unloaded"), "m:2": ("READY", "")}
    with pytest.raises(NotFound, match="version 1 is not found"):
        await swap.ask(version="1")
    assert swap.events("flip", "live", "unloaded") == [("live", 1), ("flip", 1), ("live", 2), ("flip", 2), ("unloaded", 1)]


async def test_no_request_fails_and_each_answer_is_its_versions_while_versions_follow_each_other(swap: Swapping) -> None:
    await swap.publish(1)
    answers: list[tuple[int, float]] = []
    stop = asyncio.Event()

    async def client() -> None:
        while not stop.is_set():
            answers.append(await swap.ask(3.0))

    clients = [asyncio.create_task(client()) for _ in range(4)]
    for version in range(2, 12):
        await swap.publish(*range(1, version + 1))
    stop.set()
    await asyncio.gather(*clients)
    assert all(value == 3.0 * version for version, value in answers)
    assert {1, 11} <= {version for version, _ in answers} | {(await swap.ask())[0], 1}


async def test_requests_that_the_old_version_has_taken_are_answered_by_it(make: Any) -> None:
    backend, entered, may_go = held_runs()
    swap = make(backend)
    await swap.publish(1, warmup_runs=0)
    outlet, reply = swap.submit()
    await asyncio.to_thread(entered.wait, 5)
    swap.offer(1, 2, warmup_runs=0)
    await swap.take()
    await swap.until(lambda: ("flip", 2) in swap.events("flip"))
    assert await swap.ask() == (2, 2.0)
    await swap.until(lambda: any(v.state is VersionState.DRAINING for v in swap.models.find("m", "")))
    may_go.set()
    answer = await asyncio.to_thread(outlet.wait, reply)
    assert isinstance(answer, bytes)
    await swap.rest()
    assert [version.version for version in swap.models.find("m", "")] == [2]


async def test_a_server_that_stops_while_a_version_drains_waits_for_it_and_closes_it(tmp_path: Path) -> None:
    backend, entered, may_go = held_runs()
    swap = Swapping(tmp_path, backend)
    await swap.publish(1, warmup_runs=0)
    outlet, reply = swap.submit()
    await asyncio.to_thread(entered.wait, 5)
    swap.offer(1, 2, warmup_runs=0)
    await swap.take()
    await swap.until(lambda: any(v.state is VersionState.DRAINING for v in swap.models.find("m", "")))
    stopping = asyncio.create_task(swap.models.stop(5))
    await asyncio.sleep(0)
    may_go.set()
    await stopping
    assert isinstance(await asyncio.to_thread(outlet.wait, reply), bytes)
    assert backend.live == []
    assert not swap.models.is_busy


async def test_what_waits_at_a_flip_is_answered_by_the_new_version_unless_it_asked_for_the_old_one(make: Any) -> None:
    """The old version would finish it beside newer requests on the same cores."""
    backend, entered, may_go = held_runs()
    swap = make(backend)
    await swap.publish(1, warmup_runs=0, batching=BatchingConfig(max_batch_size=1))
    running = swap.submit(1.0)
    await asyncio.to_thread(entered.wait, 5)
    waiting, bound = swap.submit(3.0), swap.submit(5.0, version="1")
    swap.offer(1, 2, warmup_runs=0, batching=BatchingConfig(max_batch_size=1))
    await swap.take()
    assert await swap.answer(*waiting) == (2, 6.0)
    may_go.set()
    assert await swap.answer(*running) == (1, 1.0)
    assert await swap.answer(*bound) == (1, 5.0)
    await swap.rest()
    assert [version.version for version in swap.models.find("m", "")] == [2]


@pytest.mark.parametrize("by", ["load", "inspect"])
async def test_a_bad_version_is_shown_with_its_reason_and_the_old_one_serves_on(make: Any, by: str) -> None:
    swap = make(failing_for(2, by=by))
    await swap.publish(1)
    await swap.publish(1, 2)
    assert await swap.ask() == (1, 1.0)
    assert swap.index() == {"m:1": ("READY", ""), "m:2": ("UNAVAILABLE", "version 2 is cursed")}
    assert swap.models.is_ready
    await swap.publish(1, 2, 3)
    assert await swap.ask() == (3, 3.0)
    assert swap.index()["m:3"] == ("READY", "")


async def test_a_server_that_starts_with_a_bad_newest_version_serves_the_one_before(make: Any) -> None:
    swap = make(failing_for(3))
    await swap.publish(1, 2, 3)
    assert await swap.ask() == (2, 2.0)
    assert swap.models.is_ready


async def test_a_failed_version_is_tried_again_by_and_by(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "retry_delay", lambda failures: 0.01)
    broken = [True]

    def load(self: Any) -> None:
        if broken:
            broken.clear()
            raise LoadError("the disk was away")
        FakeBackend.load(self)

    swap = make(scaling(load=load))
    swap.offer(1)
    await swap.take()
    await swap.until(lambda: swap.index().get("m:1") == ("READY", ""))
    assert swap.events("failed", "live") == [("failed", 1), ("live", 1)]


async def test_replaced_content_of_one_number_is_loaded_beside_the_old(swap: Swapping) -> None:
    await swap.publish(1)
    old = swap.models.resolve("m", "")
    await swap.publish(1, tokens={1: "other"})
    assert swap.models.resolve("m", "1") is not old
    assert old.state is VersionState.UNLOADED
    assert len(swap.models.find("m", "")) == 1


async def test_an_unchanged_listing_changes_nothing(swap: Swapping) -> None:
    await swap.publish(1)
    version, events = swap.models.resolve("m", ""), swap.models.event_log.since(0)
    await swap.publish(1)
    assert swap.models.resolve("m", "") is version
    assert swap.models.event_log.since(0) == events


def most_at_once() -> tuple[type[FakeBackend], list[int]]:
    counts: list[int] = []

    def load(self: Any) -> None:
        FakeBackend.load(self)
        counts.append(len(self.live))

    return scaling(load=load), counts


@pytest.mark.parametrize(("policy", "most"), [("availability", 2), ("resource", 1)])
async def test_who_goes_first_is_the_swap_policys(make: Any, policy: str, most: int) -> None:
    backend, counts = most_at_once()
    swap = make(backend)
    await swap.publish(1, swap_policy=policy)
    await swap.publish(1, 2, swap_policy=policy)
    assert await swap.ask() == (2, 2.0)
    assert max(counts) == most


async def test_the_old_version_makes_room_where_memory_does_not_suffice_for_both(make: Any) -> None:
    backend, counts = most_at_once()
    backend.estimate_memory = classmethod(lambda cls, path: 1 << 60 if path.parent.name == "2" else 0)  # type: ignore[method-assign]
    swap = make(backend)
    await swap.publish(1)
    await swap.publish(1, 2)
    assert await swap.ask() == (2, 2.0)
    assert max(counts) == 1


async def test_where_the_old_version_made_room_for_one_that_fails_it_comes_back(make: Any) -> None:
    swap = make(failing_for(2))
    await swap.publish(1, swap_policy="resource")
    await swap.publish(1, 2, swap_policy="resource")
    assert await swap.ask() == (1, 1.0)


def held_load(version: str) -> tuple[type[FakeBackend], threading.Event, threading.Event]:
    """(backend, set when that version loads, to be set when it may)."""
    loading, may_load = threading.Event(), threading.Event()

    def load(self: Any) -> None:
        if self.path.parent.name == version:
            loading.set()
            assert may_load.wait(5)
        FakeBackend.load(self)

    return scaling(load=load), loading, may_load


async def test_a_load_that_was_taken_back_is_cancelled(make: Any) -> None:
    backend, loading, may_load = held_load("2")
    swap = make(backend)
    await swap.publish(1)
    swap.offer(1, 2)
    await swap.take()
    await asyncio.to_thread(loading.wait, 5)
    await swap.publish(1, 3)
    assert await swap.ask() == (3, 3.0)
    assert swap.index()["m:2"] == ("UNAVAILABLE", "no longer wanted")
    may_load.set()
    await asyncio.to_thread(_join_instances)
    assert {int(instance.path.parent.name) for instance in backend.live} == {3}


async def test_a_load_that_was_overtaken_goes_on_and_serves_until_the_newer_one_does(make: Any) -> None:
    """Where versions come faster than they load, none would ever be taken up otherwise."""
    backend, loading, may_load = held_load("3")
    swap = make(backend)
    await swap.publish(1)
    swap.offer(1, 2)
    await swap.take()
    await asyncio.sleep(0)
    swap.offer(1, 2, 3)
    await swap.take()
    await swap.until(lambda: ("flip", 2) in swap.events("flip"))
    assert await swap.ask() == (2, 2.0)
    assert await asyncio.to_thread(loading.wait, 5)
    may_load.set()
    await swap.rest()
    assert await swap.ask() == (3, 3.0)


def _join_instances() -> None:
    for thread in threading.enumerate():
        if "#" in thread.name and "m:2" in thread.name:
            thread.join(5)


async def test_a_model_that_its_source_no_longer_has_is_unloaded_and_forgotten(swap: Swapping) -> None:
    await swap.publish(1)
    await swap.publish(1, model="other")
    del swap.source.models["m"]
    await swap.take()
    await swap.until(lambda: "m" not in swap.models.models)
    with pytest.raises(NotFound, match="'m' is not found"):
        await swap.ask()
    assert await swap.ask(model="other") == (1, 1.0)
    assert swap.models.is_ready


async def test_a_model_that_its_source_cannot_read_now_stays_as_it_is(swap: Swapping) -> None:
    await swap.publish(1)
    del swap.source.models["m"]
    swap.source.errors["m"] = "model.toml: not valid TOML"
    await swap.take()
    assert await swap.ask() == (1, 1.0)
    assert swap.index()["m:"] == ("UNAVAILABLE", "model.toml: not valid TOML")
    swap.source.errors.clear()
    await swap.publish(1, 2)
    assert "m:" not in swap.index()
    assert await swap.ask() == (2, 2.0)


async def test_a_model_that_never_could_be_read_is_forgotten_with_its_directory(swap: Swapping) -> None:
    swap.source.errors["odd"] = "no version"
    await swap.publish(1)
    assert not swap.models.is_ready
    swap.source.errors.clear()
    await swap.take()
    assert swap.index() == {"m:1": ("READY", "")}
    assert swap.models.is_ready


async def test_the_same_model_from_two_sources_is_an_error_that_names_both_and_the_first_serves_on(swap: Swapping) -> None:
    await swap.publish(1)
    other = FakeSource(swap.source.models)
    other.uri = "other://"
    swap.models.take(other, await other.list())
    assert swap.index()["m:"][1] == "model 'm' is in two repositories: fake:// and other://; expected one"
    assert await swap.ask() == (1, 1.0)


async def test_a_label_names_a_version_and_keeps_it(swap: Swapping) -> None:
    await swap.publish(1, labels={"stable": 1})
    await swap.publish(1, 2, 3, labels={"stable": 1})
    assert await swap.ask(version="stable") == (1, 1.0)
    assert await swap.ask() == (3, 3.0)
    assert sorted(version.version for version in swap.models.find("m", "")) == [1, 3]
    await swap.publish(1, 2, 3, labels={"stable": 3})
    assert await swap.ask(version="stable") == (3, 3.0)
    assert sorted(version.version for version in swap.models.find("m", "")) == [3]
    with pytest.raises(InvalidRequest, match=r"expected a number such as '1' or a label \(stable\) or nothing, got 'canary'"):
        await swap.ask(version="canary")


async def test_a_labelled_version_is_not_what_requests_without_version_get(swap: Swapping) -> None:
    await swap.publish(1, 2, 3, version_policy="1", labels={"next": 3})
    assert await swap.ask() == (1, 1.0)
    assert await swap.ask(version="next") == (3, 3.0)


async def test_nothing_of_an_unloaded_version_is_kept(swap: Swapping) -> None:
    """Also not until the garbage collector comes: a server with large models would grow by them meanwhile."""
    await swap.publish(1)
    await swap.ask()
    version = weakref.ref(swap.models.resolve("m", ""))
    gc.collect()
    gc.disable()
    try:
        await swap.publish(1, 2)
        await swap.ask()
        await asyncio.sleep(0)
        assert version() is None, gc.get_referrers(version())
    finally:
        gc.enable()


async def test_a_version_like_the_one_before_takes_over_what_was_learnt_of_it(make: Any) -> None:
    runs: dict[str, int] = {}

    def warm(self: Any, inputs: Any) -> None:
        runs[self.path.parent.name] = runs.get(self.path.parent.name, 0) + 1

    swap = make(scaling(warm=warm))
    await swap.publish(1)
    await swap.publish(1, 2)
    first, second = runs["1"], runs.get("2", 0)
    assert second < first / 4
    assert swap.models.resolve("m", "").latencies
