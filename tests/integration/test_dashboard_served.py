"""The dashboard of a whole server, as its options have it; what a browser makes of it is in test_dashboard.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import pytest
from headrace.app import Server
from headrace.config import ServerConfig
from watched_digits import make_repository

BROWSER = {"Accept": "text/html"}


async def ask(repository: Path, path: str, **options: Any) -> tuple[int, str, Any]:
    """Status, type and body."""
    config = ServerConfig(models=(str(repository),), grpc=("127.0.0.1:0",), http="127.0.0.1:0", **options)
    server = Server(config)
    await server.start()
    try:
        async with aiohttp.ClientSession(f"http://{server.http_address}") as client, client.get(path, headers=BROWSER) as answer:
            body = await (answer.json() if answer.content_type == "application/json" else answer.text())
            return answer.status, answer.content_type, body
    finally:
        await server.stop()


async def test_the_page_is_there_unless_it_is_switched_off(tmp_path: Path) -> None:
    repository = make_repository(tmp_path)
    assert (await ask(repository, "/"))[:2] == (200, "text/html")
    assert (await ask(repository, "/", dashboard=False))[:2] == (200, "text/plain")
    assert (await ask(repository, "/dashboard/state", dashboard=False))[0] == 404


@pytest.mark.parametrize(("admin", "kinds"), [("local", ["flip", "live", "loading"]), ("off", None)])
async def test_state_is_of_the_versions_that_are_served(tmp_path: Path, admin: str, kinds: list[str] | None) -> None:
    status, _, state = await ask(make_repository(tmp_path), "/dashboard/state", admin=admin)
    assert status == 200
    (model,) = state["models"]
    (version,) = model["versions"]
    assert (model["name"], version["version"], version["state"], version["traffic"]) == ("digits", 1, "live", 100.0)
    assert version["counters"]["success"] == 0
    assert version["drift"]["status"] == "learning"
    assert (None if state["events"] is None else [event["kind"] for event in state["events"]]) == kinds
