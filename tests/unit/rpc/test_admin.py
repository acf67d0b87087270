from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fake_operations import DIGITS, NOW, SENTIMENT, FakeOperations
from headrace.errors import FailedPrecondition, Forbidden, InvalidRequest, NotFound
from headrace.lifecycle.events import Event
from headrace.rpc.admin import HISTORY, MAX_REASON, MAX_WAITING, AdminService, refusal
from headrace.rpc.admin_messages import decode_event, decode_model, decode_source
from headrace.rpc.drift_messages import decode_report
from headrace.rpc.peer import Peer
from headrace.wire import messages as pb
from headrace.wire.messages import ADMIN_SERVICE, method_classes
from watched_versions import DRIFTED, report

LOCAL = Peer("127.0.0.1:5", is_local=True)
REMOTE = Peer("10.0.0.7:5", is_local=False)
CHANGES = ("Promote", "RollBack", "SetLabel", "SetTraffic")


def admin(policy: str = "local") -> tuple[AdminService, FakeOperations]:
    view = FakeOperations(SENTIMENT, DIGITS)
    return AdminService(view, policy), view


async def ask(service: AdminService, method: str, peer: Peer = LOCAL, **fields: Any) -> Any:
    request, response = method_classes(ADMIN_SERVICE)[method]
    return response.FromString(await service.methods()[method](request(**fields).SerializeToString(), peer))


def watch(service: AdminService, peer: Peer = LOCAL, **fields: Any) -> AsyncIterator[bytes]:
    return service.watch(pb.WatchEventsRequest(**fields).SerializeToString(), peer)


async def read(events: AsyncIterator[bytes]) -> tuple[Event, int]:
    message = pb.LifecycleEvent.FromString(await asyncio.wait_for(anext(events), 5))
    return decode_event(message), message.missed


def test_every_method_of_the_service_is_there() -> None:
    assert {*admin()[0].methods(), "WatchEvents"} == set(method_classes(ADMIN_SERVICE))


# -- reading -----------------------------------------------------------------------------------------------------------


async def test_models_are_described_with_all_that_is_known_of_them() -> None:
    models = [decode_model(model) for model in (await ask(admin()[0], "ListModels")).models]
    assert models == [DIGITS, SENTIMENT]


async def test_a_model_comes_with_its_latest_events() -> None:
    service, view = admin()
    for number in range(HISTORY + 5):
        view.event_log.record("live", "digits", number)
        view.event_log.record("live", "sentiment", number)
    answer = await ask(service, "DescribeModel", model="digits")
    assert decode_model(answer.model) == DIGITS
    events = [decode_event(event) for event in answer.history]
    assert [event.version for event in events] == list(range(5, HISTORY + 5))
    assert {event.model for event in events} == {"digits"}


async def test_an_unknown_model_is_not_found_and_none_is_no_model() -> None:
    with pytest.raises(NotFound, match="nobody"):
        await ask(admin()[0], "DescribeModel", model="nobody")
    with pytest.raises(InvalidRequest, match="model: expected a name"):
        await ask(admin()[0], "DescribeModel")


async def test_sources_come_with_what_is_wrong_with_them() -> None:
    service, view = admin()
    assert [decode_source(source) for source in (await ask(service, "ListSources")).sources] == view.sources()


async def test_drift_comes_with_as_many_windows_as_are_asked_for() -> None:
    service, view = admin()
    view.reports["digits", 3] = given = report(DRIFTED)
    found = decode_report((await ask(service, "GetDrift", REMOTE, model="digits", version=3, windows=2)).report)
    assert (found.reference, found.alerts, found.history) == (given.reference, given.alerts, given.history[-2:])
    with pytest.raises(FailedPrecondition, match="version 4 of 'digits' is not watched"):
        await ask(service, "GetDrift", model="digits", version=4)
    with pytest.raises(InvalidRequest, match="windows: expected a number from 0, got -1"):
        await ask(service, "GetDrift", model="digits", windows=-1)
    with pytest.raises(InvalidRequest, match="model: expected a name"):
        await ask(service, "GetDrift")


async def test_garbage_is_the_callers_fault() -> None:
    with pytest.raises(InvalidRequest, match="could not decode the DescribeModelRequest"):
        await admin()[0].methods()["DescribeModel"](b"\xff", LOCAL)
    with pytest.raises(InvalidRequest, match="could not decode the WatchEventsRequest"):
        await anext(admin()[0].watch(b"\xff", LOCAL))


# -- changing ----------------------------------------------------------------------------------------------------------


async def test_changes_reach_the_models_with_who_and_why() -> None:
    service, view = admin()
    peer = Peer("10.0.0.7:5", is_local=True, identity="deploy-bot")
    await ask(service, "SetTraffic", peer, model="digits", version=5, mode="canary", percent=12.5, reason="try it")
    await ask(service, "SetLabel", peer, model="digits", label="stable", version=4, reason="good")
    assert (await ask(service, "RollBack", peer, model="digits", reason="slow")).version == 3
    await ask(service, "Promote", peer, model="digits", reason="fast")
    assert view.asked == [
        ("traffic", "digits", 5, "canary", "12.5"),
        ("label", "digits", 4, "stable"),
        ("rolled_back", "digits", 4),
        ("promoted", "digits", 4),
    ]
    assert [(event.who, event.reason) for event in view.event_log.since(0)] == [
        ("deploy-bot", reason) for reason in ("try it", "good", "slow", "fast")
    ]


async def test_what_the_models_refuse_is_refused_in_their_words() -> None:
    service, _ = admin()
    with pytest.raises(NotFound, match="no model 'nobody'"):
        await ask(service, "RollBack", model="nobody")
    with pytest.raises(FailedPrecondition, match="expected a live version, got 9"):
        await ask(service, "SetLabel", model="digits", label="stable", version=9)


@pytest.mark.parametrize(
    ("method", "fields", "text"),
    [
        ("Promote", {}, "model: expected a name"),
        ("RollBack", {"model": "digits", "reason": "x" * (MAX_REASON + 1)}, "reason: expected at most 1000 characters, got 1001"),
        ("SetLabel", {"model": "digits", "label": "a", "version": -1}, "version: expected a number from 0, got -1"),
        ("SetTraffic", {"model": "digits", "version": 4, "mode": "canary", "percent": float("nan")}, "percent"),
    ],
)
async def test_malformed_changes_change_nothing(method: str, fields: dict[str, Any], text: str) -> None:
    service, view = admin()
    with pytest.raises(InvalidRequest, match=text):
        await ask(service, method, **fields)
    assert view.asked == []


# -- who may -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "peer", "may_read", "may_change"),
    [
        ("local", LOCAL, True, True), ("local", REMOTE, True, False), ("on", LOCAL, True, True), ("on", REMOTE, True, True),
        ("off", LOCAL, False, False), ("off", REMOTE, False, False),
    ],
)  # fmt: skip
def test_the_policy_says_who_may(policy: str, peer: Peer, may_read: bool, may_change: bool) -> None:
    assert (not refusal(policy, peer, is_change=False), not refusal(policy, peer, is_change=True)) == (may_read, may_change)


@pytest.mark.parametrize("method", CHANGES)
async def test_a_remote_caller_may_look_and_changes_nothing(method: str) -> None:
    service, view = admin("local")
    assert len((await ask(service, "ListModels", REMOTE)).models) == 2
    with pytest.raises(Forbidden, match=r"not for 10\.0\.0\.7:5: expected the server's option admin to be 'on'"):
        await ask(service, method, REMOTE, model="digits")
    assert view.asked == []


async def test_switched_off_it_tells_nobody_anything() -> None:
    service, _ = admin("off")
    for method in service.methods():
        with pytest.raises(Forbidden, match="switched off"):
            await ask(service, method)
    with pytest.raises(Forbidden, match="switched off"):
        await anext(watch(service))


# -- watching ----------------------------------------------------------------------------------------------------------


async def test_a_watch_sends_what_was_and_then_what_comes() -> None:
    service, view = admin()
    for kind in ("loading", "live", "flip"):
        view.event_log.record(kind, "digits", 4)
    events = watch(service, since=1)
    assert [(await read(events))[0].kind for _ in range(2)] == ["live", "flip"]
    waiting = asyncio.ensure_future(read(events))
    await asyncio.sleep(0)
    assert not waiting.done()
    view.event_log.record("failed", "sentiment", reason="broken", fields={"token": "t"})
    assert await waiting == (Event(4, NOW, "failed", "sentiment", reason="broken", fields={"token": "t"}), 0)


async def test_a_watch_of_one_model_sees_no_other() -> None:
    service, view = admin()
    events = watch(service, model="digits", until_now=True)
    for model in ("sentiment", "digits", "sentiment"):
        view.event_log.record("live", model)
    assert [pb.LifecycleEvent.FromString(message).number async for message in events] == [2]


async def test_a_slow_reader_loses_the_oldest_and_is_told_how_many() -> None:
    service, view = admin()
    view.event_log.record("live", "digits")
    events = watch(service)
    assert (await read(events))[0].number == 1
    for _ in range(MAX_WAITING + 3):
        view.event_log.record("live", "digits")
    first, missed = await read(events)
    assert (first.number, missed) == (5, 3)
    second, missed = await read(events)
    assert (second.number, missed) == (6, 0)


async def test_watches_end_when_the_server_stops_after_what_has_happened() -> None:
    service, view = admin()
    events = watch(service)
    view.event_log.record("live", "digits")
    assert (await read(events))[0].number == 1
    waiting = asyncio.ensure_future(anext(events, None))
    await asyncio.sleep(0)
    view.event_log.record("unloaded", "digits")
    service.close()
    last = await waiting
    assert last is not None
    assert pb.LifecycleEvent.FromString(last).kind == "unloaded"
    assert [message async for message in events] == []
    assert "0 watchers" in repr(service)


async def test_a_watcher_that_leaves_is_forgotten() -> None:
    service, view = admin()
    view.event_log.record("live", "digits")
    events = service.watch(b"", LOCAL)
    await anext(events)
    assert "1 watchers" in repr(service)
    await events.aclose()
    assert "0 watchers" in repr(service)
