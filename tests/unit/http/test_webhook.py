from __future__ import annotations

import base64
import hashlib
import hmac
import io
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from fake_models import FakeModels
from headrace.http.server import HttpServer
from headrace.http.webhook import LARGEST_BODY, PATH, check_delivery
from headrace.telemetry.metrics import make_registry

NOW = 1_800_000_000.0
BODY = b'{"entity": "model_version_alias", "action": "created"}'
SECRET = "a secret"


def sign(body: bytes = BODY, *, secret: str = SECRET, delivery: str = "d-1", timestamp: str = str(int(NOW))) -> str:
    """As MLflow's documentation describes it."""
    digest = hmac.new(secret.encode(), f"{delivery}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


GOOD: Mapping[str, Any] = {"secret": SECRET, "signature": sign(), "delivery": "d-1", "timestamp": str(int(NOW)), "body": BODY, "now": NOW}


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({}, 204),
        ({"now": NOW + 300}, 204),
        ({"now": NOW - 300}, 204),
        ({"body": b"", "signature": sign(b"")}, 204),
        ({"body": b"\xff\x00", "signature": sign(b"\xff\x00")}, 204),
        ({"now": NOW + 301}, 401),
        ({"now": NOW - 301}, 401),
        ({"secret": "another"}, 401),
        ({"body": BODY + b" "}, 401),
        ({"delivery": "d-2"}, 401),
        ({"timestamp": str(int(NOW) + 1)}, 401),
        ({"signature": "v1,"}, 401),
        ({"signature": sign()[:-5] + "="}, 401),
        ({"signature": ""}, 400),
        ({"signature": sign().removeprefix("v1,")}, 400),
        ({"signature": sign().replace("v1,", "v2,")}, 400),
        ({"signature": "v1,!!!!"}, 400),
        ({"signature": "v1,é"}, 400),
        ({"delivery": ""}, 400),
        ({"timestamp": ""}, 400),
        ({"timestamp": "-1"}, 400),
        ({"timestamp": "1e9"}, 400),
        ({"timestamp": "²"}, 400),
        ({"timestamp": "9" * 5000}, 400),
    ],
)
def test_only_a_fresh_delivery_by_who_has_the_secret_is_taken(changed: dict[str, Any], status: int) -> None:
    assert check_delivery(**{**GOOD, **changed}) == status


@asynccontextmanager
async def serving(secret: str) -> AsyncIterator[tuple[aiohttp.ClientSession, list[str]]]:
    models = FakeModels()
    hints: list[str] = []
    server = HttpServer(
        "127.0.0.1:0", models, make_registry(lambda: models.find("", "")), webhook_secret=secret, hint=lambda: hints.append("")
    )
    address = await server.start()
    try:
        async with aiohttp.ClientSession(f"http://{address}") as client:
            yield client, hints
    finally:
        await server.stop()


async def post(client: aiohttp.ClientSession, body: bytes, headers: Mapping[str, str]) -> int:
    async with client.post(PATH, data=io.BytesIO(body), headers=headers) as answer:
        return answer.status


def signed_now(body: bytes, secret: str = SECRET) -> dict[str, str]:
    timestamp = str(int(time.time()))
    return {
        "X-MLflow-Signature": sign(body, secret=secret, timestamp=timestamp),
        "X-MLflow-Delivery-Id": "d-1",
        "X-MLflow-Timestamp": timestamp,
    }


async def test_a_valid_delivery_is_a_hint_and_others_are_not() -> None:
    async with serving(SECRET) as (client, hints):
        assert await post(client, BODY, signed_now(BODY, "guessed")) == 401
        assert await post(client, BODY, {}) == 400
        assert hints == []
        assert await post(client, BODY, signed_now(BODY)) == 204
        assert len(hints) == 1


async def test_a_body_over_the_bound_is_refused_whoever_signed_it() -> None:
    body = b"x" * (LARGEST_BODY + 1)
    async with serving(SECRET) as (client, hints):
        assert await post(client, body, signed_now(body)) == 413
        assert await post(client, body[:-1], signed_now(body[:-1])) == 204
        assert len(hints) == 1


async def test_without_a_secret_there_is_no_webhook() -> None:
    async with serving("") as (client, hints):
        assert await post(client, BODY, signed_now(BODY, "")) == 404
        assert hints == []
