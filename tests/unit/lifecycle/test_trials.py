"""New versions on trial: who gets which requests, what ends a trial and how, and what operators change about it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from headrace.config import RolloutConfig
from headrace.errors import BackendError, FailedPrecondition, InvalidRequest, NotFound
from headrace.lifecycle.admin import Admin
from headrace.lifecycle.events import Actor
from headrace.testing import FakeBackend
from swapping import Swapping, scaling

ANNA = Actor("anna", "looks good")


def rollout(mode: str, **options: Any) -> dict[str, Any]:
    return {"rollout": RolloutConfig(**{"mode": mode, "probation": 3600.0, "min_requests": 20, **options})}


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[..., Swapping]]:
    made: list[Swapping] = []

    def make(backend: type[FakeBackend] | None = None) -> Swapping:
        made.append(Swapping(tmp_path, backend or scaling()))
        return made[-1]

    yield make
    for swapping in made:
        await swapping.models.stop(1)


async def begin(swap: Swapping, mode: str, **options: Any) -> Admin:
    """Version 1 serves, version 2 is on trial."""
    await swap.publish(1, **rollout(mode, **options))
    await swap.publish(1, 2, **rollout(mode, **options))
    return Admin(swap.models, [])


async def share(swap: Swapping, count: int, **request: Any) -> Counter[int]:
    return Counter([(await swap.ask(**request))[0] for _ in range(count)])


async def ask_until(swap: Swapping, condition: Callable[[], bool], **request: Any) -> Counter[int]:
    """Requests, also failing ones, one after the other until something has come of them."""
    answered: Counter[int] = Counter()
    async with asyncio.timeout(20):
        while not condition():
            with contextlib.suppress(BackendError):
                answered[(await swap.ask(**request))[0]] += 1
            await asyncio.sleep(0)
    return answered


async def test_a_canary_answers_its_part_of_the_requests_and_those_with_an_id_stay_where_they_were(make: Any) -> None:
    swap = make()
    await begin(swap, "canary", percent=20.0)
    assert await share(swap, 50) == {1: 40, 2: 10}
    for number in range(40):
        assert len(await share(swap, 3, id=f"user-{number}")) == 1
    by_id = Counter([(await swap.ask(id=f"user-{number}"))[0] for number in range(200)])
    assert 20 <= by_id[2] <= 60
    assert await share(swap, 5, version="1") == {1: 5}
    assert await share(swap, 5, version="2") == {2: 5}


async def test_the_first_version_of_a_model_is_not_on_trial(make: Any) -> None:
    swap = make()
    await swap.publish(1, **rollout("canary"))
    assert swap.models.models["m"].trial is None
    assert await share(swap, 5) == {1: 5}


async def test_a_canary_that_passes_its_probation_takes_over_and_the_old_version_goes(make: Any) -> None:
    swap = make()
    await begin(swap, "canary", percent=50.0, probation=0.0)
    await ask_until(swap, lambda: ("promoted", 2) in swap.events("promoted"))
    await swap.rest()
    assert await share(swap, 10) == {2: 10}
    assert [version.version for version in swap.models.find("m", "")] == [2]


async def test_a_version_on_probation_serves_all_while_the_old_one_stays_warm(make: Any) -> None:
    swap = make()
    admin = await begin(swap, "probation")
    assert await share(swap, 10) == {2: 10}
    assert sorted(version.version for version in swap.models.find("m", "")) == [1, 2]
    assert await admin.roll_back("m", Actor("anna", "customers complain")) == 1
    assert await share(swap, 10) == {1: 10}


def nan_for_negatives(self: Any, inputs: Any, outputs: Any) -> Any:
    y = inputs["x"] * np.float32(int(self.path.parent.name))
    return [np.where(inputs["x"] < 0, np.nan, y).astype(np.float32) if self.path.parent.name == "2" else y]


def raising(self: Any, inputs: Any, outputs: Any) -> Any:
    if self.path.parent.name == "2" and inputs["x"].any():
        raise BackendError("no such kernel")
    return [inputs["x"]]


def slow(self: Any, inputs: Any, outputs: Any) -> Any:
    # Far apart: what the machine adds to a sleep now and then must not hide the difference from thirty batches of the old version.
    time.sleep(0.010 if self.path.parent.name == "2" else 0.002)
    return [inputs["x"]]


@pytest.mark.parametrize("mode", ["canary", "probation"])
@pytest.mark.parametrize(
    ("execute", "reason"),
    [(nan_for_negatives, "NaN or infinity in"), (raising, "error rate"), (slow, "times as long as the old version's")],
)
async def test_a_bad_version_is_rolled_back_by_itself_and_not_taken_up_again(make: Any, mode: str, execute: Any, reason: str) -> None:
    swap = make(scaling(execute=execute))
    await swap.publish(1, **rollout(mode, percent=50.0))
    for _ in range(30):
        await swap.ask(-1.0)
    await swap.publish(1, 2, **rollout(mode, percent=50.0))
    await ask_until(swap, lambda: ("rolled_back", 2) in swap.events("rolled_back"), value=-1.0)
    await swap.rest()
    event = next(event for event in swap.models.event_log.since(0) if event.kind == "rolled_back")
    assert reason in event.reason
    assert event.who == "server"
    assert (await swap.ask(-1.0))[0] == 1
    assert [version.version for version in swap.models.find("m", "")] == [1]
    await swap.publish(1, 2, **rollout(mode, percent=50.0))
    assert [version.version for version in swap.models.find("m", "")] == [1]
    await swap.publish(1, 2, tokens={2: "mended"}, **rollout("direct"))
    assert [version.version for version in swap.models.find("m", "")] == [2]


async def test_a_shadow_answers_nobody_and_is_rolled_back_when_it_disagrees(make: Any) -> None:
    swap = make()
    await begin(swap, "shadow", percent=100.0, max_disagreement=0.1)
    answered = await ask_until(swap, lambda: ("rolled_back", 2) in swap.events("rolled_back"))
    assert set(answered) == {1}
    event = next(event for event in swap.models.event_log.since(0) if event.kind == "rolled_back")
    assert "compared answers differ from the old version's" in event.reason


async def test_a_shadow_that_agrees_is_promoted(make: Any) -> None:
    swap = make(FakeBackend.make())
    await begin(swap, "shadow", percent=100.0, max_disagreement=0.1, probation=0.0)
    await ask_until(swap, lambda: ("promoted", 2) in swap.events("promoted"))
    assert (await swap.ask())[0] == 2


async def test_a_promotion_by_hand_is_waited_for_where_that_is_configured(make: Any) -> None:
    swap = make()
    admin = await begin(swap, "canary", percent=50.0, probation=0.0, promote="manual")
    await ask_until(swap, lambda: ("passed", 2) in swap.events("passed"))
    assert set(await share(swap, 10)) == {1, 2}
    rollout_now = admin.describe("m")[0].rollout
    assert rollout_now is not None
    assert rollout_now.phase == "passed"
    await admin.promote("m", 0, ANNA)
    assert await share(swap, 5) == {2: 5}
    assert swap.events("promoted", "flip")[-2:] == [("promoted", 2), ("flip", 2)]
    event = next(event for event in swap.models.event_log.since(0) if event.kind == "promoted")
    assert (event.who, event.reason) == ("anna", "looks good")


async def test_a_newer_version_ends_the_trial_of_the_one_before_and_is_tried_itself(make: Any) -> None:
    swap = make()
    await begin(swap, "canary", percent=50.0)
    await swap.publish(1, 2, 3, **rollout("canary", percent=50.0))
    assert set(await share(swap, 10)) == {1, 3}
    assert swap.events("superseded") == [("superseded", 2)]


async def test_going_back_is_never_on_trial(make: Any) -> None:
    swap = make()
    await swap.publish(1, 2, **rollout("canary"))
    await swap.publish(1, **rollout("canary"))
    assert await share(swap, 5) == {1: 5}
    assert swap.events("rollout") == []


async def test_the_baseline_may_be_gone_from_the_source_and_serves_on_until_the_verdict(make: Any) -> None:
    swap = make()
    await begin(swap, "canary", percent=50.0)
    await swap.publish(2, **rollout("canary", percent=50.0))
    assert set(await share(swap, 10)) == {1, 2}


async def test_a_model_that_is_taken_away_while_a_version_is_on_trial_goes(make: Any) -> None:
    swap = make()
    await begin(swap, "canary", percent=50.0)
    await swap.publish(1, model="other")
    del swap.source.models["m"]
    await swap.take()
    await swap.until(lambda: "m" not in swap.models.models)


async def test_what_was_promoted_gives_way_to_a_newer_version_and_comes_back_when_that_is_rolled_back(make: Any) -> None:
    swap = make()
    admin = await begin(swap, "canary", percent=50.0)
    await admin.promote("m", 0, ANNA)
    await swap.publish(1, 2, 3, **rollout("canary", percent=50.0))
    assert set(await share(swap, 10)) == {2, 3}
    assert await admin.roll_back("m", ANNA) == 2
    assert await share(swap, 5) == {2: 5}
    assert await admin.roll_back("m", ANNA) == 1
    assert await share(swap, 5) == {1: 5}


# -- operators ---------------------------------------------------------------------------------------------------------


async def test_rolling_back_what_serves_brings_the_version_before_it_and_promoting_takes_it_up_again(make: Any) -> None:
    swap = make()
    await swap.publish(1)
    await swap.publish(1, 2)
    admin = Admin(swap.models, [])
    assert await admin.roll_back("m", Actor("anna", "wrong labels")) == 1
    assert await share(swap, 5) == {1: 5}
    states = {version.version: (version.state, version.reason) for version in admin.describe("m")[0].versions}
    assert states == {1: ("live", ""), 2: ("rolled back", "wrong labels")}
    with pytest.raises(FailedPrecondition, match="no version before 1 to go back to"):
        await admin.roll_back("m", ANNA)
    await admin.promote("m", 2, ANNA)
    assert await share(swap, 5) == {2: 5}


async def test_what_cannot_be_promoted_is_said(make: Any) -> None:
    swap = make()
    await swap.publish(1)
    admin = Admin(swap.models, [])
    with pytest.raises(FailedPrecondition, match="no version on trial"):
        await admin.promote("m", 0, ANNA)
    with pytest.raises(NotFound, match="'m' has no version 7"):
        await admin.promote("m", 7, ANNA)
    with pytest.raises(FailedPrecondition, match="neither on trial nor rolled back; version 1 serves"):
        await admin.promote("m", 1, ANNA)
    with pytest.raises(NotFound, match="'x' is not found; there are m"):
        await admin.roll_back("x", ANNA)


async def test_traffic_is_set_by_hand_for_any_live_version(make: Any) -> None:
    swap = make()
    await swap.publish(1, 2, version_policy="all")
    admin = Admin(swap.models, [])
    await admin.set_traffic("m", 1, "canary", 50.0, ANNA)
    assert await share(swap, 10) == {1: 5, 2: 5}
    assert {version.version: version.traffic for version in admin.describe("m")[0].versions} == {1: 50.0, 2: 50.0}
    await admin.set_traffic("m", 1, "canary", 10.0, ANNA)
    assert {version.version: version.traffic for version in admin.describe("m")[0].versions} == {1: 10.0, 2: 90.0}
    with pytest.raises(FailedPrecondition, match="version 2 of 'm' serves already"):
        await admin.set_traffic("m", 2, "canary", 10.0, ANNA)
    with pytest.raises(NotFound, match="no live version 9; live: 1, 2"):
        await admin.set_traffic("m", 9, "canary", 10.0, ANNA)
    with pytest.raises(InvalidRequest, match="percent: expected 0 to 100, got 101"):
        await admin.set_traffic("m", 1, "canary", 101.0, ANNA)
    await admin.promote("m", 1, ANNA)
    assert (await share(swap, 5))[1] == 5


async def test_labels_move_by_hand_to_live_versions_only_and_it_is_told_by_whom(make: Any) -> None:
    swap = make()
    await swap.publish(1, 2, version_policy="all")
    admin = Admin(swap.models, [])
    await admin.set_label("m", "stable", 1, ANNA)
    assert await share(swap, 3, version="stable") == {1: 3}
    with pytest.raises(FailedPrecondition, match="label 'stable': expected a live version, got 7; live: 1, 2"):
        await admin.set_label("m", "stable", 7, ANNA)
    with pytest.raises(InvalidRequest, match="label: expected letters"):
        await admin.set_label("m", "1st", 1, ANNA)
    await admin.set_label("m", "stable", 0, ANNA)
    with pytest.raises(InvalidRequest):
        await swap.ask(version="stable")
    events = [(event.version, event.who, event.fields) for event in swap.models.event_log.since(0) if event.kind == "label"]
    assert events == [(1, "anna", {"label": "stable", "from": "0"}), (0, "anna", {"label": "stable", "from": "1"})]
