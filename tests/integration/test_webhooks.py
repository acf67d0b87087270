"""Deliveries to a real receiver on loopback."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from aiohttp import web
from headrace.config import ServerConfig
from headrace.drift.verdict import Alert
from headrace.errors import ConfigError
from headrace.lifecycle.events import EventLog
from headrace.telemetry.cloud_events import TOLERANCE, alert_event, is_genuine, sign, signing_key
from headrace.telemetry.webhooks import DeliveryPolicy, WebhookCollector, Webhooks, parse_retry_after

ALERT = Alert(
    1_800_000_000.5, "digits", 3, "drift", "image.mean", "input", True, "psi", 0.42, 0.05, 12_000, 61.5, "image.mean drifted: PSI 0.42"
)
SECRET = "a secret"
QUICK = DeliveryPolicy(first_wait=0.001, longest_wait=0.002)


class Receiver:
    """Answers with `statuses` in turn, and then with the last of them for ever."""

    def __init__(self, statuses: Sequence[int] = (204,), headers: dict[str, str] | None = None) -> None:
        self.statuses = list(statuses)
        self.headers = headers or {}
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.came = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        self.got.append(({name.lower(): value for name, value in request.headers.items()}, await request.read()))
        self.came.set()
        await self.may_answer.wait()
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return web.Response(status=status, headers=self.headers)

    @property
    def texts(self) -> list[str]:
        return [json.loads(body)["data"]["alerts"][0]["text"] for _, body in self.got]


@asynccontextmanager
async def listening(receiver: Receiver, port: int = 0) -> AsyncIterator[Receiver]:
    app = web.Application()
    app.router.add_post("/hook/{token}", receiver.answer)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    receiver.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook/token"
    try:
        yield receiver
    finally:
        receiver.may_answer.set()
        await runner.cleanup()


@asynccontextmanager
async def sending(*urls: str, secret: str = SECRET, policy: DeliveryPolicy = QUICK) -> AsyncIterator[Webhooks]:
    webhooks = Webhooks(urls, secret, "//host/headrace", policy)
    webhooks.start()
    try:
        yield webhooks
    finally:
        await webhooks.stop()


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():
            await asyncio.sleep(0.002)


def numbered(number: int) -> Alert:
    return replace(ALERT, text=str(number))


# -- what is sent ------------------------------------------------------------------------------------------------------------


async def test_an_alert_is_a_signed_cloud_event() -> None:
    async with listening(Receiver()) as receiver, sending(receiver.url) as webhooks:
        webhooks.alerts([ALERT])
        await until(lambda: webhooks.outcomes["delivered"] == 1)
    ((headers, body),) = receiver.got
    assert headers["content-type"] == "application/cloudevents+json; charset=utf-8"
    event = json.loads(body)
    data = event.pop("data")
    assert event.pop("id") == headers["webhook-id"]
    assert event == {
        "specversion": "1.0",
        "source": "//host/headrace",
        "type": "headrace.drift.alert.raised.v1",
        "subject": "models/digits/versions/3",
        "time": "2027-01-15T08:00:00.500Z",
        "datacontenttype": "application/json",
    }
    (alert,) = data.pop("alerts")
    assert (data["model"], data["version"], data["rows"]) == ("digits", 3, 12_000)
    assert (alert["feature"], alert["side"], alert["statistic"], alert["value"]) == ("image.mean", "input", "psi", 0.42)
    assert is_genuine(signing_key(SECRET), headers, body, time.time())
    assert not is_genuine(signing_key("another"), headers, body, time.time())
    assert not is_genuine(signing_key(SECRET), headers, body + b" ", time.time())
    assert not is_genuine(signing_key(SECRET), {**headers, "webhook-id": "other"}, body, time.time())
    assert not is_genuine(signing_key(SECRET), headers, body, time.time() + TOLERANCE + 10)
    assert not is_genuine(signing_key(SECRET), {}, body, time.time())


def test_the_signature_is_that_of_standard_webhooks() -> None:
    """The example of its specification's libraries."""
    key = signing_key("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    expected = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert sign(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}') == expected
    with pytest.raises(ConfigError, match="expected base64 after 'whsec_'"):
        signing_key("whsec_?")
    assert base64.b64decode(expected.removeprefix("v1,"))


async def test_without_a_secret_nothing_is_signed_and_what_is_no_number_is_null() -> None:
    async with listening(Receiver()) as receiver, sending(receiver.url, secret="") as webhooks:
        webhooks.alerts([replace(ALERT, critical=float("inf"), is_raised=False, feature="", side="")])
        await until(lambda: webhooks.outcomes["delivered"] == 1)
    ((headers, body),) = receiver.got
    event = json.loads(body, parse_constant=pytest.fail)
    assert (event["type"], event["subject"], event["data"]["alerts"][0]["critical"]) == (
        "headrace.drift.alert.over.v1", "models/digits/versions/3", None,
    )  # fmt: skip
    assert "webhook-signature" not in headers


async def test_what_a_rollout_decided_is_sent_and_what_happens_every_day_is_not() -> None:
    log = EventLog()
    async with listening(Receiver()) as receiver, sending(receiver.url) as webhooks:
        log.subscribe(webhooks.lifecycle)
        log.record("loading", "digits", 4)
        log.record("rolled_back", "digits", 4, reason="error rate \udcff 5 %", fields={"token": "t"})
        await until(lambda: webhooks.outcomes["delivered"] == 1)
    ((_, body),) = receiver.got
    event = json.loads(body)
    assert (event["type"], event["subject"]) == ("headrace.model.rolled_back.v1", "models/digits/versions/4")
    assert event["data"]["fields"] == {"token": "t"}


# -- trying again ------------------------------------------------------------------------------------------------------------


async def test_one_that_fails_twice_is_tried_again_with_the_same_id_and_the_next_waits_for_it() -> None:
    async with listening(Receiver((503, 500, 204))) as receiver, sending(receiver.url) as webhooks:
        for number in (1, 2, 3):
            webhooks.alerts([numbered(number)])
        await until(lambda: webhooks.outcomes["delivered"] == 3)
    assert receiver.texts == ["1", "1", "1", "2", "3"]
    ids = [headers["webhook-id"] for headers, _ in receiver.got]
    assert len(set(ids[:3])) == 1
    assert len(set(ids)) == 3
    assert all(is_genuine(signing_key(SECRET), headers, body, time.time()) for headers, body in receiver.got)


@pytest.mark.parametrize("status", [400, 401, 404, 410, 302])
async def test_a_refusal_and_a_redirect_are_final(status: int) -> None:
    async with listening(Receiver((status, 204), {"Location": "/hook/elsewhere"})) as receiver, sending(receiver.url) as webhooks:
        webhooks.alerts([numbered(1)])
        webhooks.alerts([numbered(2)])
        await until(lambda: webhooks.outcomes["delivered"] == 1)
    assert receiver.texts == ["1", "2"]
    assert webhooks.outcomes["refused"] == 1


async def test_an_event_at_which_the_receiver_always_fails_does_not_block_the_others_for_ever() -> None:
    policy = replace(QUICK, most_refusals=3)
    async with listening(Receiver((500, 500, 500, 204))) as receiver, sending(receiver.url, policy=policy) as webhooks:
        webhooks.alerts([numbered(1)])
        webhooks.alerts([numbered(2)])
        await until(lambda: webhooks.outcomes["delivered"] == 1)
    assert receiver.texts == ["1", "1", "1", "2"]
    assert webhooks.outcomes == {"failed": 1, "delivered": 1}


async def test_a_receiver_that_is_not_there_yet_gets_it_when_it_comes() -> None:
    async with listening(Receiver()) as receiver:
        url = receiver.url
    port = int(url.split(":")[2].split("/")[0])
    async with sending(url) as webhooks:
        webhooks.alerts([ALERT])
        await asyncio.sleep(0.05)
        assert webhooks.pending == 1
        async with listening(Receiver(), port) as receiver:
            await until(lambda: webhooks.outcomes["delivered"] == 1)
    assert len(receiver.got) == 1


async def test_what_became_too_old_is_given_up() -> None:
    policy = replace(QUICK, oldest=0.02)
    async with listening(Receiver((503,))) as receiver, sending(receiver.url, policy=policy) as webhooks:
        webhooks.alerts([ALERT])
        await until(lambda: webhooks.outcomes["expired"] == 1)


async def test_a_receiver_that_hangs_times_out_and_holds_up_no_other() -> None:
    policy = replace(QUICK, timeout=0.05)
    async with listening(Receiver()) as slow, listening(Receiver()) as good, sending(slow.url, good.url, policy=policy) as webhooks:
        slow.may_answer.clear()
        webhooks.alerts([ALERT])
        await until(lambda: len(good.got) == 1 and len(slow.got) >= 2)
        slow.may_answer.set()
        await until(lambda: webhooks.outcomes["delivered"] == 2)
    assert len({headers["webhook-id"] for headers, _ in (*slow.got, *good.got)}) == 1


def test_waits_double_up_to_a_bound_are_spread_by_chance_and_honour_the_receivers_wish() -> None:
    policy = DeliveryPolicy()
    assert [policy.wait(attempt, 0, 1.0) for attempt in (1, 2, 3, 7, 10_000)] == [1, 2, 4, 60, 60]
    assert policy.wait(3, 0, 0.0) == 2
    assert policy.wait(1, 120, 0.5) == 120
    assert policy.wait(1, 1e9, 0.5) == policy.longest_retry_after


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("120", 120), ("", 0), ("soon", 0), ("-5", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 60), ("Wed, 21 Oct 2015 07:00:00 GMT", 0)],
)
def test_retry_after_is_seconds_or_a_date(value: str, seconds: float) -> None:
    assert parse_retry_after(value, 1445412420.0) == seconds


# -- bounds and the end ------------------------------------------------------------------------------------------------------


async def test_when_too_many_wait_the_newest_are_kept() -> None:
    async with listening(Receiver()) as receiver, sending(receiver.url, policy=replace(QUICK, waiting=3)) as webhooks:
        receiver.may_answer.clear()
        webhooks.alerts([numbered(1)])
        await receiver.came.wait()
        for number in range(2, 11):
            webhooks.alerts([numbered(number)])
        assert webhooks.pending == 3
        receiver.may_answer.set()
        await until(lambda: webhooks.outcomes["delivered"] == 3)
    assert receiver.texts == ["1", "9", "10"]
    assert webhooks.outcomes["overflow"] == 7


async def test_a_stop_delivers_what_waits_without_waiting_to_try_again() -> None:
    async with listening(Receiver((503, 204))) as receiver:
        async with sending(receiver.url, policy=DeliveryPolicy(first_wait=3600.0, longest_wait=3600.0)) as webhooks:
            for number in (1, 2, 3):
                webhooks.alerts([numbered(number)])
            await receiver.came.wait()
        assert receiver.texts == ["1", "1", "2", "3"]
    assert webhooks.outcomes == {"delivered": 3}


async def test_a_stop_does_not_wait_for_a_receiver_that_hangs() -> None:
    async with listening(Receiver()) as receiver:
        receiver.may_answer.clear()
        async with sending(receiver.url) as webhooks:
            webhooks.alerts([numbered(1)])
            webhooks.alerts([numbered(2)])
            await receiver.came.wait()
    assert webhooks.outcomes == {"shutdown": 2}
    assert webhooks.pending == 0


async def test_every_outcome_has_its_series_from_the_start() -> None:
    webhooks = Webhooks((), "", "//host/headrace")
    deliveries, pending = WebhookCollector(webhooks).collect()
    assert {sample.labels.get("outcome") for sample in deliveries.samples} >= {"delivered", "refused", "overflow"}
    assert pending.samples[0].value == 0


@pytest.mark.parametrize("url", ["", "example.com/hook", "ftp://example.com/", "http:///hook", "http://[::1", "http://a:99999/"])
def test_what_is_no_url_is_refused_at_start(url: str) -> None:
    with pytest.raises(ConfigError, match="drift_webhooks: expected http://HOST/PATH or https://HOST/PATH"):
        ServerConfig(drift_webhooks=(url,))
    assert SECRET not in repr(ServerConfig(drift_webhooks=("https://example.com/hook",), drift_webhook_secret=SECRET))


def test_equal_alerts_of_two_moments_are_two_events() -> None:
    assert alert_event([ALERT], "s", "1").body != alert_event([ALERT], "s", "2").body
