"""Where instances are loaded: spread over devices, balanced among models, and never onto a lost one."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from headrace.backends.base import DeviceSpace
from headrace.errors import DeviceLost
from headrace.lifecycle.devices import Devices
from headrace.lifecycle.placement import Placed, choose_devices

GB = 1 << 30


def spaces(*free: int) -> list[DeviceSpace]:
    return [DeviceSpace(f"cuda:{index}", size * GB) for index, size in enumerate(free)]


@pytest.mark.parametrize(
    ("count", "needed", "free", "placed", "expected"),
    [
        (1, 1, (8,), [], ["cuda:0"]),
        (3, 1, (8, 8), [], ["cuda:0", "cuda:1", "cuda:0"]),
        (2, 1, (8, 80), [], ["cuda:1", "cuda:0"]),  # the roomier one first, but both
        (1, 1, (8, 8), [Placed("other", "cuda:0")], ["cuda:1"]),
        (2, 1, (8, 8), [Placed("other", "cuda:0"), Placed("other", "cuda:0")], ["cuda:1", "cuda:0"]),
        (2, 4, (2, 16), [], ["cuda:1", "cuda:1"]),  # no room on the first
        (1, 4, (16, 15), [Placed("loading", "cuda:0", 14 * GB)], ["cuda:1"]),
        (1, 4, (6, 5), [Placed("a", "cuda:0", 3 * GB), Placed("b", "cuda:1")], ["cuda:1"]),  # what is being loaded counts
        (1, 1, (8, 8), [Placed("m", "cuda:0"), Placed("other", "cuda:1")], ["cuda:0"]),  # the old version leaves, the other stays
        (1, 1, (8, 8), [Placed("m", "cuda:0")], ["cuda:1"]),
        (2, 9, (1, 2), [], ["cuda:1", "cuda:0"]),  # room nowhere: the load says so
    ],
)
def test_where_the_next_instances_go(count: int, needed: int, free: tuple[int, ...], placed: list[Placed], expected: list[str]) -> None:
    assert choose_devices("m", count, needed * GB, spaces(*free), placed) == expected


@pytest.mark.parametrize("seed", range(20))
def test_models_that_all_fit_are_spread_evenly(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    devices = Devices()
    for number in range(rng.randint(1, 12)):
        count = rng.randint(1, 6)
        chosen = devices.place(object(), f"m{number}", count, "cuda", 0, spaces(8, 8, 8))
        each = Counter(chosen)
        assert max(each.values()) - min(each[f"cuda:{index}"] for index in range(3)) <= 1
    total = Counter(placed.device for places in devices._placed.values() for placed in places)
    assert max(total.values()) - min(total[f"cuda:{index}"] for index in range(3)) <= 1


def test_a_lost_device_gets_nothing_and_without_another_the_reason_is_said() -> None:
    devices = Devices()
    assert devices.lose("cuda:0", "launch failure")
    assert not devices.lose("cuda:0", "again")
    assert devices.place(object(), "m", 2, "cuda", 1, spaces(8, 8)) == ["cuda:1", "cuda:1"]
    assert devices.place(object(), "m", 1, "auto", 1, spaces(8)) == ["cpu"]
    for device, there in (("cuda", spaces(8)), ("cuda:0", spaces(8)), ("cuda:0", [])):
        with pytest.raises(DeviceLost, match=r"none is left that works; it takes a new start of the server \(cuda:0: launch failure\)"):
            devices.place(object(), "m", 1, device, 1, there)


def test_a_backend_without_a_choice_keeps_what_the_configuration_says() -> None:
    assert Devices().place(object(), "m", 2, "auto", 1, []) == ["auto", "auto"]


def test_what_is_measured_is_told_by_version_and_device_until_it_is_given_back() -> None:
    devices, owner = Devices(), object()
    devices.place(owner, "m", 3, "cuda", GB, spaces(8, 8))
    assert devices.uses() == []
    devices.settle(owner, "m", 7, [("cuda:0", 5), ("cuda:1", 6), ("cuda:0", 7)])
    told = {use.device: (use.model, use.version, use.instances, use.memory) for use in devices.uses()}
    assert told == {"cuda:0": ("m", 7, 2, 12), "cuda:1": ("m", 7, 1, 6)}
    devices.drop(owner, "cuda:0", 1)
    assert {use.device: (use.instances, use.memory) for use in devices.uses()} == {"cuda:0": (1, 6), "cuda:1": (1, 6)}
    devices.release(owner)
    assert devices.uses() == []


def test_versions_on_one_device_share_its_interference_and_others_do_not() -> None:
    devices = Devices()
    first, again, other = devices.interference(["cuda:0"]), devices.interference(["cuda:0", "cuda:0"]), devices.interference(["cuda:1"])
    both = devices.interference(["cuda:1", "cuda:0"])
    for now in range(1, 200):
        first.observe(2.0, float(now))
    assert again.factor == first.factor > 1.5
    assert other.factor == 1.0
    assert both.factor == pytest.approx((first.factor + 1.0) / 2)
    both.observe(2.0, 500.0)
    assert other.factor > 1.0
