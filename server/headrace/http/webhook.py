"""POST /v2/webhooks/mlflow: a registry says that something has changed.

What it says is a hint and never state: a delivery that is proved to be the registry's makes us look sooner, and nothing in it is
read. So one that is lost, late or delivered twice does no harm. The signature is MLflow's (its docs call the format Standard Webhooks).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Callable

from aiohttp import web

PATH = "/v2/webhooks/mlflow"
SIGNATURE = "X-MLflow-Signature"
DELIVERY = "X-MLflow-Delivery-Id"
TIMESTAMP = "X-MLflow-Timestamp"

LARGEST_BODY = 1 << 20
"""Bytes. The largest payload has a version's description and tags, which MLflow bounds far lower."""
LONGEST_BODY = 10.0
"""Seconds for it to arrive: anybody can begin one, before it is known who they are."""
OLDEST = 300.0
"""Seconds that a delivery's timestamp may be off, either way: what MLflow recommends against replays."""


def check_delivery(secret: str, signature: str, delivery: str, timestamp: str, body: bytes, now: float) -> int:
    """The status to answer with: 204 for a delivery by who has the secret, 400 for none that MLflow makes, 401 for another one.

    `now`: wall clock, in seconds.
    """
    version, comma, encoded = signature.partition(",")
    if version != "v1" or not comma or not delivery or not (timestamp.isascii() and timestamp.isdigit() and len(timestamp) < 16):
        return 400
    try:
        given = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return 400
    signed = f"{delivery}.{timestamp}.".encode("utf-8", "surrogateescape") + body
    expected = hmac.digest(secret.encode(), signed, hashlib.sha256)
    if not hmac.compare_digest(expected, given):
        return 401
    return 204 if abs(now - int(timestamp)) <= OLDEST else 401


class Webhook:
    """Answers deliveries. `hint` is called on the event loop after each that is valid."""

    def __init__(self, secret: str, hint: Callable[[], None], wall_clock: Callable[[], float] = time.time) -> None:
        self._secret = secret
        self._hint = hint
        self._wall_clock = wall_clock

    async def answer(self, request: web.Request) -> web.Response:
        body = bytearray()
        try:
            async with asyncio.timeout(LONGEST_BODY):
                async for chunk in request.content.iter_any():
                    body += chunk
                    if len(body) > LARGEST_BODY:
                        return web.Response(status=413)
        except TimeoutError:
            return web.Response(status=408)
        headers = request.headers
        status = check_delivery(
            self._secret,
            headers.get(SIGNATURE, ""),
            headers.get(DELIVERY, ""),
            headers.get(TIMESTAMP, ""),
            bytes(body),
            self._wall_clock(),
        )
        if status == 204:
            self._hint()
        return web.Response(status=status)
