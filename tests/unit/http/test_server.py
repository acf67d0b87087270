from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from fake_models import FakeModels, FakeVersion
from headrace.errors import ConfigError
from headrace.http.server import HttpServer
from headrace.lifecycle.state import VersionState
from headrace.telemetry.metrics import make_registry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

ENDPOINTS = ("/", "/metrics", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready")
READY = pytest.mark.parametrize("path", ["/readyz", "/v2/health/ready"])
LIVE = pytest.mark.parametrize("path", ["/livez", "/v2/health/live"])


def make_server(models: FakeModels, listener: str = "127.0.0.1:0") -> HttpServer:
    return HttpServer(listener, models, make_registry(lambda: models.find("", "")))


@asynccontextmanager
async def serving(models: FakeModels) -> AsyncIterator[aiohttp.ClientSession]:
    server = make_server(models)
    address = await server.start()
    try:
        async with aiohttp.ClientSession(f"http://{address}") as client:
            yield client
    finally:
        await server.stop()


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_every_endpoint_answers_get_and_head(path: str) -> None:
    async with serving(FakeModels([FakeVersion("m")])) as client:
        async with client.get(path) as answer:
            assert answer.status == 200
            assert await answer.read() != b""
        async with client.head(path) as answer:
            assert answer.status == 200
            assert await answer.read() == b""


async def test_unknown_paths_are_404_and_other_methods_405() -> None:
    async with serving(FakeModels()) as client:
        async with client.get("/metric") as answer:
            assert answer.status == 404
        async with client.post("/metrics") as answer:
            assert answer.status == 405


async def test_the_root_names_the_endpoints() -> None:
    async with serving(FakeModels()) as client, client.get("/") as answer:
        text = await answer.text()
    assert all(path in text for path in ("/metrics", "/livez", "/readyz"))


@READY
async def test_ready_when_the_models_are(path: str) -> None:
    async with serving(FakeModels([FakeVersion("m")])) as client, client.get(path) as answer:
        assert answer.status == 200
        assert await answer.json() == {"ready": True}


@READY
async def test_not_ready_names_each_missing_version_and_why(path: str) -> None:
    versions = [
        FakeVersion("good"),
        FakeVersion("bad", 3, VersionState.FAILED, "weights are cursed"),
        FakeVersion("slow", 2, VersionState.WARMING),
    ]
    async with serving(FakeModels(versions, is_ready=False)) as client, client.get(path) as answer:
        assert answer.status == 503
        body = await answer.json()
    assert body["ready"] is False
    assert body["models"] == [
        {"model": "bad", "version": "3", "state": "UNAVAILABLE", "reason": "weights are cursed"},
        {"model": "slow", "version": "2", "state": "LOADING", "reason": ""},
    ]
    assert body["reason"] == "2 models or versions are not ready"


async def test_not_ready_before_any_model_is_known_says_that_it_starts() -> None:
    async with serving(FakeModels(is_ready=False)) as client, client.get("/readyz") as answer:
        assert answer.status == 503
        assert (await answer.json())["reason"] == "the server is starting"


async def test_readiness_follows_the_models() -> None:
    models = FakeModels([FakeVersion("m")])
    async with serving(models) as client:
        statuses = []
        for is_ready in (True, False, True):
            models.is_ready = is_ready
            async with client.get("/readyz") as answer:
                statuses.append(answer.status)
    assert statuses == [200, 503, 200]


@LIVE
async def test_a_draining_server_is_live_but_not_ready(path: str) -> None:
    models = FakeModels([FakeVersion("m", state=VersionState.DRAINING)], is_live=False, is_ready=False)
    async with serving(models) as client:
        async with client.get(path) as answer:
            assert answer.status == 200
        async with client.get("/readyz") as answer:
            assert answer.status == 503
            assert (await answer.json())["reason"] == "the server is shutting down"


async def test_metrics_in_plain_text() -> None:
    models = FakeModels([FakeVersion("m").run(2, rows=2, padded_rows=2, seconds=0.01)])
    async with serving(models) as client, client.get("/metrics", headers={"Accept": "text/plain"}) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert 'nv_inference_request_success{model="m",version="1"} 2\n' in await answer.text()


async def test_metrics_as_openmetrics_compressed_as_a_prometheus_server_asks() -> None:
    headers = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5", "Accept-Encoding": "gzip"}
    models = FakeModels([FakeVersion(f"m{number}") for number in range(20)])
    async with serving(models) as client, client.get("/metrics", headers=headers) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
        assert answer.headers["Content-Encoding"] == "gzip"
        text = await answer.text()
        assert int(answer.headers["Content-Length"]) < len(text) / 5
    found = {family.name: family for family in parse_openmetrics(text)}  # type: ignore[no-untyped-call]
    assert len(found["headrace_rows"].samples) == 20


async def test_scrapes_at_the_same_time_do_not_mix() -> None:
    models = FakeModels([FakeVersion(f"m{number}") for number in range(20)])

    async def scrape(client: aiohttp.ClientSession) -> int:
        async with client.get("/metrics") as answer:
            return (await answer.text()).count("headrace_rows_total{")

    async with serving(models) as client:
        assert await asyncio.gather(*[scrape(client) for _ in range(8)]) == [20] * 8


async def test_two_servers_in_one_process() -> None:
    async with serving(FakeModels([FakeVersion("a")])) as one, serving(FakeModels([FakeVersion("b")])) as two:
        async with one.get("/metrics") as answer:
            assert 'model="b"' not in await answer.text()
        async with two.get("/metrics") as answer:
            assert 'model="b"' in await answer.text()


async def test_a_taken_port_is_a_configuration_error_that_names_it() -> None:
    first = make_server(FakeModels())
    address = await first.start()
    try:
        with pytest.raises(ConfigError, match=f"got {address}: .*in use"):
            await make_server(FakeModels(), address).start()
    finally:
        await first.stop()


async def test_stop_gives_the_port_back_and_may_be_called_again() -> None:
    first = make_server(FakeModels())
    address = await first.start()
    await first.stop()
    await first.stop()
    second = make_server(FakeModels(), address)
    assert await second.start() == address
    await second.stop()


async def test_stop_does_not_wait_for_idle_connections() -> None:
    server = make_server(FakeModels())
    address = await server.start()
    async with aiohttp.ClientSession(f"http://{address}") as client:
        async with client.get("/livez") as answer:
            await answer.read()
        async with asyncio.timeout(0.9):
            await server.stop()
