"""The dashboard over HTTP: the page for browsers, its headers, and state that is made once a second however many ask."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from fake_models import FakeModels, FakeVersion
from fake_operations import DIGITS, FakeOperations
from headrace.drift.verdict import DriftReport
from headrace.http.dashboard import Dashboard
from headrace.http.dashboard.page import MOST_KEPT, STATIC
from headrace.http.server import HttpServer
from headrace.telemetry.metrics import make_registry

BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


class CountedOperations(FakeOperations):
    described = 0

    def describe(self, model: str):  # type: ignore[no-untyped-def]
        self.described += 1
        return super().describe(model)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def serving(models: FakeModels, dashboard: Dashboard | None) -> AsyncIterator[aiohttp.ClientSession]:
    server = HttpServer("127.0.0.1:0", models, make_registry(lambda: models.find("", "")), dashboard=dashboard)
    address = await server.start()
    try:
        async with aiohttp.ClientSession(f"http://{address}") as client:
            yield client
    finally:
        await server.stop()


def watched(number: int = 1) -> FakeModels:
    report = DriftReport("digits", 3, None, learnt_rows=5, learn_rows=2000)
    return FakeModels([FakeVersion("digits", 3 + index, drift=report) for index in range(number)])


async def test_browsers_get_the_page_and_others_the_text() -> None:
    models = FakeModels()
    async with serving(models, Dashboard(models, FakeOperations(DIGITS))) as client:
        async with client.get("/", headers=BROWSER) as answer:
            assert answer.content_type == "text/html"
            assert "<title>Headrace</title>" in await answer.text()
        async with client.get("/") as answer:  # Accept: */*, as curl says
            assert answer.content_type == "text/plain"
            assert answer.headers["Vary"] == "Accept"
            assert "/metrics" in await answer.text()


async def test_a_server_without_the_page_has_the_text_alone() -> None:
    async with serving(FakeModels(), None) as client:
        async with client.get("/", headers=BROWSER) as answer:
            assert answer.content_type == "text/plain"
            assert "browser" not in await answer.text()
        async with client.get("/dashboard/state") as answer:
            assert answer.status == 404


@pytest.mark.parametrize("path", ["/", "/dashboard/dashboard.js", "/dashboard/dashboard.css", "/dashboard/icon.svg", "/dashboard/state"])
async def test_everything_has_the_headers_that_keep_strangers_out(path: str) -> None:
    models = FakeModels()
    async with serving(models, Dashboard(models, FakeOperations(DIGITS))) as client, client.get(path, headers=BROWSER) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'self';")
        assert "unsafe" not in answer.headers["Content-Security-Policy"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("path", ["/dashboard/page.py", "/dashboard/..%2Fpage.py", "/dashboard/%2e%2e/server.py", "/dashboard/"])
async def test_no_other_file_is_served(path: str) -> None:
    models = FakeModels()
    async with serving(models, Dashboard(models, FakeOperations())) as client, client.get(path) as answer:
        assert answer.status == 404


async def test_state_is_made_once_a_second_for_all_who_look() -> None:
    models, operations, clock = FakeModels(), CountedOperations(DIGITS), Clock()
    async with serving(models, Dashboard(models, operations, clock=clock)) as client:
        assert operations.described == 0

        async def look() -> float:
            async with client.get("/dashboard/state") as answer:
                return float((await answer.json())["server"]["clock"])

        assert set(await asyncio.gather(*[look() for _ in range(20)])) == {0.0}
        assert operations.described == 1
        clock.now = 0.9
        assert await look() == 0.0
        clock.now = 1.0
        assert await look() == 1.0
        assert operations.described == 2


async def test_events_are_left_out_where_nobody_may_look_at_admin() -> None:
    models, operations = FakeModels(), FakeOperations(DIGITS)
    operations.event_log.record("label", "digits", 3, who="10.0.0.7")
    found = []
    for shows_events in (True, False):
        dashboard = Dashboard(models, operations, shows_events=shows_events)
        async with serving(models, dashboard) as client, client.get("/dashboard/state") as answer:
            found.append((await answer.json())["events"])
    assert [event["who"] for event in found[0]] == ["10.0.0.7"]
    assert found[1] is None


@pytest.mark.parametrize(
    ("query", "status", "text"),
    [
        ("model=digits&version=3", 200, "digits"),
        ("model=digits&version=9", 404, "version 9 of model 'digits' is not watched"),
        ("model=nothing&version=1", 404, "model 'nothing'"),
        ("model=digits", 400, "expected ?model=NAME&version=NUMBER"),
    ],
)
async def test_drift_is_of_one_version_or_says_why_not(query: str, status: int, text: str) -> None:
    models = watched()
    async with serving(models, Dashboard(models, FakeOperations())) as client, client.get(f"/dashboard/drift?{query}") as answer:
        assert answer.status == status
        assert text in await answer.text()


async def test_what_is_kept_of_drift_is_bounded() -> None:
    models = watched(MOST_KEPT + 5)
    dashboard = Dashboard(models, FakeOperations())
    async with serving(models, dashboard) as client:
        for number in range(MOST_KEPT + 5):
            async with client.get(f"/dashboard/drift?model=digits&version={3 + number}") as answer:
                assert answer.status == 200
    assert f"features of {MOST_KEPT} versions" in repr(dashboard)


def test_the_page_needs_nothing_from_elsewhere_and_reads_nothing_as_html() -> None:
    for path in STATIC.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), path.name
        assert not re.search(r"<script(?![^>]*src=)|\son\w+=|\sstyle=", text) or path.suffix == ".js", path.name


def test_every_file_that_the_page_names_is_there() -> None:
    named = set()
    for path in STATIC.iterdir():
        text = path.read_text(encoding="utf-8")
        named |= set(re.findall(r'(?:src|href)="/dashboard/([^"]+)"', text)) | set(re.findall(r'from "\./([^"]+)"', text))
    assert named == {path.name for path in Path(STATIC).iterdir()} - {"index.html"}
