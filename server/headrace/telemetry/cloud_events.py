"""Alerts and what happens to models as CloudEvents 1.0 in JSON (structured mode), and the signature that they are sent with. Pure."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from headrace.drift.verdict import Alert
from headrace.errors import ConfigError
from headrace.lifecycle.events import Event

CONTENT_TYPE = "application/cloudevents+json; charset=utf-8"
TOLERANCE = 300.0
"""Seconds that a delivery's timestamp may be off, either way: what Standard Webhooks recommends against replays."""
SENT_KINDS = frozenset({"rollout", "promoted", "rolled_back", "taken_up", "failed", "device_lost"})
"""Of lifecycle events: those that a pipeline, which has put the version there, waits for, and what takes it away from them again."""

_OF_ALERT = ("kind", "side", "feature", "statistic", "value", "critical", "text")


class CloudEvent(NamedTuple):
    """`id`: the same however often and to whomever it is sent, so that a receiver can know it again. `body`: what is sent, and signed."""

    id: str
    kind: str
    at: float
    body: bytes


def alert_event(alerts: Sequence[Alert], source: str, event_id: str) -> CloudEvent:
    """What one window of a version says: all of it raised, or all over. `source`: a URI reference of who says so; with the id it is unique.

    One event, since a drift shows in many features at once, and whoever retrains does so once.
    """
    first = alerts[0]
    kind = f"headrace.drift.alert.{'raised' if first.is_raised else 'over'}.v1"
    data = {name: getattr(first, name) for name in ("model", "version", "rows", "seconds")}
    data["alerts"] = [{name: _number(getattr(alert, name)) for name in _OF_ALERT} for alert in alerts]
    return _event(kind, source, event_id, f"models/{first.model}/versions/{first.version}", first.at, data)


def lifecycle_event(event: Event, source: str, event_id: str) -> CloudEvent:
    subject = f"models/{event.model}" + (f"/versions/{event.version}" if event.version else "")
    data = {"model": event.model, "version": event.version, "who": event.who, "reason": event.reason, "fields": dict(event.fields)}
    return _event(f"headrace.model.{event.kind}.v1", source, event_id, subject, event.at, data)


def _event(kind: str, source: str, event_id: str, subject: str, at: float, data: Mapping[str, Any]) -> CloudEvent:
    table = {
        "specversion": "1.0",
        "id": event_id,
        "source": source,
        "type": kind,
        "subject": subject,
        "time": datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "data": {key: _number(value) for key, value in data.items()},
    }
    # Half a surrogate pair, from a file's name say, becomes JSON's own way to write one.
    return CloudEvent(event_id, kind, at, json.dumps(table, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace"))


def _number(value: Any) -> Any:
    """JSON has no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- the signature -----------------------------------------------------------------------------------------------------------


def signing_key(secret: str) -> bytes:
    """Standard Webhooks: what follows `whsec_` is base64; any other secret is its own UTF-8 bytes. Raises ConfigError."""
    if not secret.startswith("whsec_"):
        return secret.encode()
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not key:
        raise ConfigError("drift_webhook_secret: expected base64 after 'whsec_'")
    return key


def sign(key: bytes, event_id: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature` (Standard Webhooks 1.0): `v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`."""
    return "v1," + base64.b64encode(hmac.digest(key, f"{event_id}.{timestamp}.".encode() + body, hashlib.sha256)).decode()


def is_genuine(key: bytes, headers: Mapping[str, str], body: bytes, now: float) -> bool:
    """Whether who has the secret sent this, and lately. For receivers; docs/drift/act.md has it without this package.

    `headers`: by lower-case names. Several signatures, from a change of secrets, are separated by blanks.
    """
    event_id, sent = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not (event_id and sent.isascii() and sent.isdigit() and len(sent) < 16 and abs(now - int(sent)) <= TOLERANCE):
        return False
    expected = sign(key, event_id, int(sent), body).encode()
    given = headers.get("webhook-signature", "").split(" ")
    return any(hmac.compare_digest(expected, each.encode("utf-8", "surrogateescape")) for each in given)
