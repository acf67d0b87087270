"""A device that runs nothing any more: what goes with it, what goes on, and who is told."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from devices import DeviceBackend
from headrace.config import InstanceConfig
from headrace.errors import DeviceLost, NotReady
from headrace.lifecycle import model as module
from headrace.lifecycle.state import VersionState
from swapping import Swapping

Make = Callable[..., Swapping]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    made: list[Swapping] = []

    def make(backend: type[DeviceBackend]) -> Swapping:
        made.append(Swapping(tmp_path, backend))
        return made[-1]

    yield make
    for swapping in made:
        await swapping.models.stop(1)


def on(device: str, count: int = 1) -> dict[str, Any]:
    return {"instances": InstanceConfig(count=count, device=device)}


def where(swap: Swapping) -> dict[str, Counter[str]]:
    """Instances that serve, by model and device."""
    found: dict[str, Counter[str]] = {}
    for use in swap.models.devices.uses():
        found.setdefault(use.model, Counter())[use.device] += use.instances
    return found


async def lose(swap: Swapping, model: str = "m") -> None:
    """Ask until a batch of the model is lost."""
    for _ in range(50):
        try:
            await swap.ask(model=model)
        except DeviceLost:
            return
    raise AssertionError("no batch was lost")


async def test_instances_of_several_models_are_spread_and_a_pinned_one_is_where_it_is_to_be(make: Make) -> None:
    swap = make(DeviceBackend.make_on("cuda:0", "cuda:1"))
    await swap.publish(1, model="a", **on("cuda:1"))
    await swap.publish(1, model="b", **on("cuda"))
    await swap.publish(1, model="c", **on("auto", 3))
    assert where(swap) == {"a": {"cuda:1": 1}, "b": {"cuda:0": 1}, "c": {"cuda:0": 2, "cuda:1": 1}}


async def test_models_hold_each_other_up_on_the_device_that_they_got_and_on_no_other(make: Make) -> None:
    swap = make(DeviceBackend.make_on("cuda:0", "cuda:1"))
    for model, device in {"a": "cuda:0", "b": "cuda", "c": "cuda:0", "host": "cpu"}.items():
        await swap.publish(1, model=model, **on(device))
    tables = {name: entry.route.default._batcher.latencies for name, entry in swap.models.models.items()}
    shared = tables["a"]._device
    assert {name for name, table in tables.items() if table._device is shared} == {"a", "c"}
    assert tables["b"]._device is not tables["host"]._device


async def test_of_two_instances_one_goes_on_and_the_device_takes_the_others_on_it_along(make: Make) -> None:
    backend = DeviceBackend.make_on("cuda:0", "cuda:1")
    swap = make(backend)
    await swap.publish(1, **on("cuda", 2))
    await swap.publish(1, model="beside", **on("cuda", 2))
    with pytest.raises(DeviceLost, match="unspecified launch failure"):
        await swap.ask(-1.0)
    (lost,) = backend.broken
    left = "cuda:1" if lost == "cuda:0" else "cuda:0"
    await swap.publish(1, model="elsewhere", **on(left))
    await swap.until(lambda: where(swap)["m"][lost] == 0)
    for model in ("m", "beside", "elsewhere"):
        assert [await swap.ask(model=model) for _ in range(10)] == [(1, 1.0)] * 10
    assert where(swap) == {"m": {lost: 0, left: 1}, "beside": {lost: 0, left: 1}, "elsewhere": {left: 1}}
    events = [event for event in swap.models.event_log.since(0) if event.kind == "device_lost"]
    assert sorted((event.model, event.fields["device"], event.reason) for event in events) == [
        (model, lost, f"{lost}: unspecified launch failure") for model in ("beside", "m")
    ]
    assert len(backend.lost_batches) == 1
    await asyncio.to_thread(backend.wait_for_live, left)


async def test_without_another_device_the_version_says_why_and_models_on_the_host_serve_on(make: Make) -> None:
    backend = DeviceBackend.make_on("cuda:0")
    swap = make(backend)
    await swap.publish(1, **on("cuda"))
    await swap.publish(1, model="host", **on("cpu"))
    assert swap.models.is_ready
    backend.broken.add("cuda:0")
    await lose(swap)
    await swap.until(lambda: swap.index()["m:1"][0] == "UNAVAILABLE")
    for version in ("", "1"):
        with pytest.raises(NotReady, match="version 1 is not at ready state: cuda:0: unspecified launch failure"):
            await swap.ask(version=version)
    assert swap.index()["m:1"] == ("UNAVAILABLE", "cuda:0: unspecified launch failure")
    assert not swap.models.is_ready
    assert await swap.ask(model="host") == (1, 1.0)
    assert swap.events("device_lost", "failed") == [("device_lost", 1), ("failed", 1)]
    await asyncio.to_thread(backend.wait_for_live, "cpu")


async def test_a_device_lost_while_an_instance_on_the_host_is_loaded_is_why_the_load_failed(make: Make) -> None:
    class Gone(DeviceBackend.make_on("cuda:0")):  # type: ignore[misc]
        def load(self) -> None:
            raise DeviceLost("provider: the accelerator fell off the bus")

    swap = make(Gone)
    await swap.publish(1, **on("cpu"))
    assert swap.index()["m:1"] == ("UNAVAILABLE", "provider: the accelerator fell off the bus")
    assert swap.events("device_lost", "failed") == [("failed", 1)]


async def test_what_waits_for_the_last_instance_is_refused_and_not_left_waiting(make: Make) -> None:
    at_work, go_on = threading.Event(), threading.Event()

    class Held(DeviceBackend.make_on("cuda:0")):  # type: ignore[misc]
        def execute(self, inputs: Any, outputs: Any) -> Any:
            if inputs["x"][0, 0] > 0:
                at_work.set()
                assert go_on.wait(10)
            return super().execute(inputs, outputs)

    swap = make(Held)
    await swap.publish(1, **on("cuda"))
    # A model that is quick runs on the thread that brings a request, which here would be this one.
    running: list[Any] = []
    thread = threading.Thread(target=lambda: running.append(swap.submit()))
    thread.start()
    assert at_work.wait(10)
    waiting = [swap.submit() for _ in range(5)]
    Held.broken.add("cuda:0")
    go_on.set()
    thread.join(10)
    with pytest.raises(DeviceLost):
        await swap.answer(*running[0])
    for each in waiting:
        with pytest.raises((NotReady, DeviceLost)):
            await swap.answer(*each)
    assert len(Held.lost_batches) == 1


async def test_a_version_that_lost_its_device_comes_back_on_another_one(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_AFTER_LOSS", 0.0)
    backend = DeviceBackend.make_on("cuda:0", "cuda:1")
    swap = make(backend)
    await swap.publish(1, 2, **on("cuda"))
    device = next(use.device for use in swap.models.devices.uses())
    backend.broken.add(device)
    await lose(swap)
    other = "cuda:1" if device == "cuda:0" else "cuda:0"
    await swap.until(lambda: where(swap).get("m") == {other: 1})
    await swap.until(lambda: swap.index()["m:2"][0] == "READY")
    assert await swap.ask() == (2, 1.0)
    assert ("live", 1) not in swap.events("live"), "an older version is no better where a device is at fault"


async def test_auto_comes_back_on_the_host_when_no_device_is_left(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_AFTER_LOSS", 0.0)
    backend = DeviceBackend.make_on("cuda:0")
    swap = make(backend)
    await swap.publish(1, **on("auto"))
    backend.broken.add("cuda:0")
    await lose(swap)
    await swap.until(lambda: where(swap).get("m") == {"cpu": 1})
    await swap.until(lambda: swap.index()["m:1"][0] == "READY")
    assert await swap.ask() == (1, 1.0)


async def test_a_device_that_is_lost_while_a_version_is_loaded_there_takes_out_what_serves_on_it(make: Make) -> None:
    backend = DeviceBackend.make_on("cuda:0")
    swap = make(backend)
    await swap.publish(1, model="serving", **on("cuda"))
    backend.broken.add("cuda:0")
    await swap.publish(1, **on("cuda"))
    await swap.until(lambda: swap.index()["serving:1"][0] == "UNAVAILABLE")
    assert swap.index()["m:1"] == ("UNAVAILABLE", "cuda:0: unspecified launch failure")
    assert backend.lost_batches == []


async def test_a_version_that_was_being_loaded_when_its_device_was_lost_does_not_go_live(make: Make) -> None:
    loading, go_on = threading.Event(), threading.Event()

    class Slow(DeviceBackend.make_on("cuda:0")):  # type: ignore[misc]
        def load(self) -> None:
            if self.path.parent.parent.name == "late":
                loading.set()
                assert go_on.wait(10)
            super().load()

    swap = make(Slow)
    await swap.publish(1, **on("cuda"))
    swap.offer(1, model="late", **on("cuda"))
    await swap.take()
    await swap.until(lambda: any(version.state is VersionState.WARMING for version in swap.models.find("late", "")))
    assert await asyncio.to_thread(loading.wait, 10)
    Slow.broken.add("cuda:0")
    await lose(swap)
    await swap.until(lambda: swap.index()["m:1"][0] == "UNAVAILABLE")
    Slow.broken.clear()
    go_on.set()
    await swap.until(lambda: swap.index()["late:1"][0] == "UNAVAILABLE")
    assert swap.index()["late:1"][1] == "device 'cuda:0' was lost: cuda:0: unspecified launch failure"
    await asyncio.to_thread(Slow.wait_for_live)


async def test_the_next_version_for_a_lost_device_fails_with_what_is_to_be_done(make: Make) -> None:
    backend = DeviceBackend.make_on("cuda:0")
    swap = make(backend)
    await swap.publish(1, **on("cuda"))
    backend.broken.add("cuda:0")
    await lose(swap)
    await swap.until(lambda: swap.index()["m:1"][0] == "UNAVAILABLE")
    await swap.publish(1, model="next", **on("cuda"))
    assert "none is left that works; it takes a new start of the server" in swap.index()["next:1"][1]


async def test_an_instance_on_the_host_that_says_so_goes_alone(make: Make) -> None:
    backend = DeviceBackend.make_on()
    swap = make(backend)
    await swap.publish(1, **on("auto"))
    await swap.publish(1, model="other", **on("auto"))
    assert where(swap) == {"m": {"cpu": 1}, "other": {"cpu": 1}}
    backend.broken.add("cpu")
    await lose(swap)
    backend.broken.clear()
    await swap.until(lambda: swap.index()["m:1"][0] == "UNAVAILABLE")
    assert await swap.ask(model="other") == (1, 1.0)
    assert swap.models.devices.lost == {}


async def test_what_waits_for_a_version_that_loses_its_device_while_it_drains_is_refused_at_once(make: Make) -> None:
    at_work, go_on = threading.Semaphore(0), threading.Event()

    class Held(DeviceBackend.make_on("cuda:0")):  # type: ignore[misc]
        def execute(self, inputs: Any, outputs: Any) -> Any:
            if inputs["x"][0, 0] > 0:
                at_work.release()
                assert go_on.wait(10)
            return super().execute(inputs, outputs)

    swap = make(Held)
    await swap.publish(1, **on("cuda", 2))
    version = swap.models.models["m"].route.default
    assert version is not None
    running = []
    for _ in range(2):
        running.append(swap.submit())
        assert await asyncio.to_thread(at_work.acquire, timeout=10)
    waiting = [swap.submit() for _ in range(3)]
    swap.models.withdraw("m")
    await swap.until(lambda: version.state is VersionState.DRAINING)
    Held.broken.add("cuda:0")
    go_on.set()
    for each in running:
        with pytest.raises(DeviceLost):
            await swap.answer(*each)
    for each in waiting:
        with pytest.raises(NotReady, match="cuda:0: unspecified launch failure"):
            await swap.answer(*each)
    await swap.until(lambda: version.state is VersionState.UNLOADED)
    await asyncio.to_thread(Held.wait_for_live)
