"""The admin service over a real transport, by the client that `headrace models` uses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import trustme
from fake_operations import DIGITS, SENTIMENT, FakeOperations
from headrace.errors import Code
from headrace.lifecycle.events import Event, EventLog
from headrace.rpc.admin_client import AdminClient, CallFailed, Tls
from scripted_models import ScriptedVersion
from served_models import Serve
from watched_versions import DRIFTED, report

Answer = TypeVar("Answer")


class LeavingLog(EventLog):
    """Tells when a subscriber has left."""

    def __init__(self) -> None:
        super().__init__()
        self.left = asyncio.Event()

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        unsubscribe = super().subscribe(callback)

        def leave() -> None:
            unsubscribe()
            self.left.set()

        return leave


async def ask(address: str, call: Callable[[AdminClient], Answer], tls: Tls | None = None) -> Answer:
    def run() -> Answer:
        with AdminClient(address, tls or Tls(), 5.0) as client:
            return call(client)

    return await asyncio.to_thread(run)


async def test_a_client_sees_and_changes_models(serve: Serve) -> None:
    view = FakeOperations(DIGITS, SENTIMENT)
    async with serve(view=view) as served:
        assert await ask(served.address, lambda client: client.list_models()) == [DIGITS, SENTIMENT]
        assert await ask(served.address, lambda client: client.list_sources()) == view.sources()
        assert await ask(served.address, lambda client: client.roll_back("digits", "too slow")) == 3
        await ask(served.address, lambda client: client.set_label("digits", "stable", 4, ""))
        await ask(served.address, lambda client: client.set_traffic("digits", 4, "shadow", 50.0, ""))
        await ask(served.address, lambda client: client.promote("digits", 0, "good"))
        model, history = await ask(served.address, lambda client: client.describe_model("digits"))
    assert model.rollout is None
    assert [event.kind for event in history] == ["rolled_back", "label", "traffic", "promoted"]
    assert history[0].who.startswith("127.0.0.1:")
    assert history[0].reason == "too slow"


async def test_a_client_sees_how_far_a_version_has_drifted(serve: Serve) -> None:
    view = FakeOperations(DIGITS)
    view.reports["digits", 3] = given = report(DRIFTED)
    async with serve(view=view) as served:
        found = await ask(served.address, lambda client: client.get_drift("digits", 3))
    assert (found.reference, found.alerts, found.history) == (given.reference, given.alerts, given.history)


@pytest.mark.parametrize(
    ("call", "code", "text"),
    [
        (lambda client: client.describe_model("nobody"), Code.NOT_FOUND, "no model 'nobody'"),
        (lambda client: client.set_label("digits", "a", 9, ""), Code.FAILED_PRECONDITION, "expected a live version, got 9"),
        (lambda client: client.promote("", 0, ""), Code.INVALID_ARGUMENT, "model: expected a name"),
    ],
)
async def test_refusals_keep_their_code_and_text(serve: Serve, call: Callable[[AdminClient], object], code: Code, text: str) -> None:
    async with serve(view=FakeOperations(DIGITS)) as served:
        with pytest.raises(CallFailed, match=text) as caught:
            await ask(served.address, call)
    assert caught.value.code is code


async def test_a_watch_goes_on_until_the_server_stops(serve: Serve) -> None:
    view = FakeOperations(DIGITS)
    view.event_log.record("loading", "digits", 5)
    loop = asyncio.get_running_loop()
    seen: asyncio.Queue[Event] = asyncio.Queue()

    def follow(address: str) -> str:
        with AdminClient(address, Tls(), 5.0) as client:
            for event, missed in client.watch_events("digits", is_following=True):
                assert missed == 0
                loop.call_soon_threadsafe(seen.put_nowait, event)
        return "ended"

    async with asyncio.timeout(20), serve(view=view) as served:
        following = asyncio.ensure_future(asyncio.to_thread(follow, served.address))
        assert (await seen.get()).kind == "loading"
        view.event_log.record("live", "sentiment", 1)
        view.event_log.record("live", "digits", 5)
        assert (await seen.get()).number == 3
        await served.stop(grace=5.0)
        assert await following == "ended"


async def test_a_watch_ends_on_the_server_when_its_client_leaves(serve: Serve) -> None:
    view = FakeOperations(DIGITS)
    view.event_log = log = LeavingLog()
    log.record("live", "digits", 3)

    def glance(events: Iterator[tuple[Event, int]]) -> int:
        return next(events)[0].number

    async with serve(view=view) as served:
        assert await ask(served.address, lambda client: glance(client.watch_events("", is_following=True))) == 1
        await asyncio.wait_for(log.left.wait(), 5)
        assert "0 watchers" in repr(served.services.admin)


async def test_what_has_happened_ends_by_itself(serve: Serve) -> None:
    view = FakeOperations(DIGITS)
    for version in (3, 4):
        view.event_log.record("live", "digits", version)
    async with serve(view=view) as served:
        events = await ask(served.address, lambda client: list(client.watch_events("", since=1, is_following=False)))
    assert [(event.version, missed) for event, missed in events] == [(4, 0)]


async def test_a_unix_socket_is_this_machine(serve: Serve, tmp_path: Path) -> None:
    view = FakeOperations(DIGITS)
    async with serve(view=view, grpc=(f"unix:{tmp_path / 'socket'}",)) as served:
        await ask(served.address, lambda client: client.promote("digits", 0, ""))
    assert [event.who for event in view.event_log.since(0)] == ["unix"]


async def test_a_client_certificate_names_who_changes_something(serve: Serve, tmp_path: Path) -> None:
    authority = trustme.CA()
    server, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("deploy.example", common_name="deploy-bot")
    paths = {name: str(tmp_path / name) for name in ("ca", "server", "server_key", "client", "client_key")}
    authority.cert_pem.write_to_path(paths["ca"])
    for name, made in (("server", server), ("client", client)):
        made.private_key_pem.write_to_path(paths[f"{name}_key"])
        for blob in made.cert_chain_pems:
            blob.write_to_path(paths[name], append=True)
    view = FakeOperations(DIGITS)
    options = {"tls_certificate": paths["server"], "tls_key": paths["server_key"], "tls_client_ca": paths["ca"]}
    async with serve(view=view, **options) as served:
        tls = Tls(paths["ca"], paths["client"], paths["client_key"])
        await ask(served.address, lambda each: each.promote("digits", 0, "it is good"), tls)
        with pytest.raises(CallFailed, match="no answer from"):
            await ask(served.address, lambda each: each.list_models())
    assert [(event.who, event.reason) for event in view.event_log.since(0)] == [("deploy-bot", "it is good")]


async def test_switched_off_nothing_is_told(serve: Serve) -> None:
    async with serve(view=FakeOperations(DIGITS), admin="off") as served:
        with pytest.raises(CallFailed, match="switched off") as caught:
            await ask(served.address, lambda client: client.list_models())
    assert caught.value.code is Code.PERMISSION_DENIED


async def test_a_server_without_the_service_and_none_at_all_are_told_apart(serve: Serve) -> None:
    async with serve(ScriptedVersion()) as served:
        with pytest.raises(CallFailed, match="has no admin service"):
            await ask(served.address, lambda client: client.list_models())
    with pytest.raises(CallFailed, match=rf"no answer from {served.address}: .*[Cc]onnection refused"):
        await ask(served.address, lambda client: client.list_models())
