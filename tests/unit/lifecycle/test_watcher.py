"""What of a source's listings reaches the models, and what never does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from headrace.config import ModelConfig
from headrace.errors import ConfigError
from headrace.lifecycle.watcher import Settling, Watcher
from headrace.sources.base import Listing, ModelRef, Source, VersionRef
from headrace.testing import FakeSource


def model(name: str = "m", /, **versions: VersionRef) -> ModelRef:
    return ModelRef(name, ModelConfig(name), {int(number.removeprefix("v")): ref for number, ref in versions.items()})


WHOLE = VersionRef("a", "place")


class Taken:
    def __init__(self) -> None:
        self.listings: list[Listing] = []
        self.errors: list[str] = []
        self.changed = asyncio.Event()

    def take(self, source: Source, listing: Listing) -> None:
        self.listings.append(listing)
        self.changed.set()

    def fail(self, source: Source, reason: str) -> None:
        self.errors.append(reason)
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


def watch(source: FakeSource, taken: Taken, interval: float = 3600.0) -> Watcher:
    return Watcher(source, taken.take, interval=interval, settle=5.0, on_error=taken.fail)


@asynccontextmanager
async def running(watcher: Watcher) -> AsyncIterator[None]:
    await watcher.start()
    task = asyncio.create_task(watcher.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_hint_of_the_source_or_of_somebody_else_is_followed_at_once() -> None:
    source, taken = FakeSource({"m": model(v1=WHOLE)}), Taken()
    watcher = watch(source, taken)
    async with running(watcher):
        source.models["m"] = model(v1=WHOLE, v2=WHOLE)
        source.changed.set()
        await taken.until(lambda: len(taken.listings) == 2)
        source.models["m"] = model(v3=WHOLE)
        watcher.hint()
        await taken.until(lambda: len(taken.listings) == 3)
    assert [list(listing.models["m"].versions) for listing in taken.listings] == [[1], [1, 2], [3]]


async def test_without_hints_the_source_is_asked_again_after_the_interval() -> None:
    source, taken = FakeSource({"m": model(v1=WHOLE)}), Taken()
    watcher = Watcher(source, taken.take, interval=0.01, settle=5.0, on_error=taken.fail, follows_hints=False)
    async with running(watcher):
        source.models["m"] = model(v2=WHOLE)
        await taken.until(lambda: len(taken.listings) == 2)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("connection refused"), "connection refused"),
        (ConfigError("expected a directory, found nothing"), "expected a directory, found nothing"),
        (ZeroDivisionError("a bug"), "internal error while it was read; the server's log has the reason"),
    ],
)
async def test_a_listing_that_fails_changes_nothing_and_is_told_once(error: Exception, reason: str) -> None:
    source, taken = FakeSource({"m": model(v1=WHOLE)}), Taken()
    watcher = watch(source, taken)
    await watcher.start()
    source.error = error
    await watcher.poll()
    await watcher.poll()
    assert len(taken.listings) == 1
    assert taken.errors == [reason]
    assert watcher.describe().error == reason
    source.error = None
    await watcher.poll()
    assert taken.errors == [reason, ""]
    assert len(taken.listings) == 1


async def test_a_suddenly_empty_listing_unloads_nothing_but_a_smaller_one_does() -> None:
    source, taken = FakeSource({"a": model("a", v1=WHOLE), "b": model("b", v1=WHOLE)}), Taken()
    watcher = watch(source, taken)
    await watcher.start()
    del source.models["a"]
    await watcher.poll()
    assert list(taken.listings[-1].models) == ["b"]
    del source.models["b"]
    await watcher.poll()
    assert list(taken.listings[-1].models) == ["b"]
    assert taken.errors == ["the listing is suddenly empty; the 1 models that were in it are kept"]


async def test_a_mistake_in_the_configuration_ends_the_start_and_a_place_that_is_away_does_not() -> None:
    source, taken = FakeSource(), Taken()
    source.error = ConfigError("no such scheme")
    with pytest.raises(ConfigError):
        await watch(source, taken).start()
    source.error = OSError("no route to host")
    watcher = watch(source, taken)
    await watcher.start()
    assert not watcher.has_listed.is_set()
    source.error = None
    await watcher.poll()
    assert watcher.has_listed.is_set()


def test_failures_are_asked_after_less_and_less_often_and_never_all_at_once() -> None:
    async def delays() -> list[float]:
        source, taken = FakeSource(), Taken()
        source.error = OSError("away")
        watcher = Watcher(source, taken.take, interval=10.0, settle=5.0, on_error=taken.fail, jitter=lambda: 1.0)
        found = [watcher._delay()]
        for _ in range(8):
            await watcher.poll()
            found.append(watcher._delay())
        return found

    found = asyncio.run(delays())
    assert found[:3] == [12.0, 24.0, 48.0]
    assert found[-1] == 360.0


# -- settling ----------------------------------------------------------------------------------------------------------


def copied(token: str) -> VersionRef:
    return VersionRef(token, "place", is_complete=False)


def listing(**versions: VersionRef) -> Listing:
    return Listing({"m": model(**versions)})


def tokens(listing: Listing) -> dict[int, str]:
    return {number: ref.token for number, ref in listing.models["m"].versions.items()} if "m" in listing.models else {}


def test_what_is_there_at_the_start_is_taken_as_it_is() -> None:
    assert tokens(Settling(5).settle(listing(v1=copied("a")), 0)) == {1: "a"}


def test_files_without_a_manifest_are_taken_when_they_have_not_changed_for_a_while() -> None:
    settling = Settling(5)
    settling.settle(listing(v1=copied("a")), 0)
    assert tokens(settling.settle(listing(v1=copied("a"), v2=copied("b")), 10)) == {1: "a"}
    assert settling.due == 15
    assert tokens(settling.settle(listing(v1=copied("a"), v2=copied("c")), 14)) == {1: "a"}
    assert settling.due == 19
    assert tokens(settling.settle(listing(v1=copied("a"), v2=copied("c")), 18)) == {1: "a"}
    assert tokens(settling.settle(listing(v1=copied("a"), v2=copied("c")), 19)) == {1: "a", 2: "c"}
    assert settling.due is None


def test_a_published_version_is_taken_at_once() -> None:
    settling = Settling(5)
    settling.settle(listing(v1=WHOLE), 0)
    assert tokens(settling.settle(listing(v1=WHOLE, v2=WHOLE), 1)) == {1: "a", 2: "a"}


def test_a_version_whose_files_are_being_replaced_stays_as_it_was_until_they_rest() -> None:
    settling = Settling(5)
    settling.settle(listing(v1=copied("a")), 0)
    assert tokens(settling.settle(listing(v1=copied("b")), 10)) == {1: "a"}
    assert tokens(settling.settle(listing(v1=copied("b")), 16)) == {1: "b"}


def test_a_new_model_that_is_still_being_copied_is_an_error_with_the_reason_until_then() -> None:
    settling = Settling(5)
    settling.settle(Listing({}), 0)
    kept = settling.settle(listing(v1=copied("a")), 1)
    assert kept.models == {}
    assert "still changing" in kept.errors["m"]


def test_labels_follow_at_once_while_files_settle() -> None:
    settling = Settling(5)
    first = settling.settle(listing(v1=copied("a")), 0)
    moved = ModelRef("m", ModelConfig("m", labels={"stable": 1}), {1: copied("b")})
    after = settling.settle(Listing({"m": moved}), 1)
    assert first.models["m"].config.labels == {}
    assert after.models["m"].config.labels == {"stable": 1}
    assert tokens(after) == {1: "a"}
