"""The dashboard in a headless Chromium, against servers that run: what a person would see of it."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as client
from fake_models import FakeModels, FakeVersion
from fake_operations import NOW, FakeOperations
from headrace.app import Server
from headrace.config import ServerConfig
from headrace.http.dashboard import Dashboard
from headrace.http.server import HttpServer
from headrace.lifecycle.view import ModelDescription, VersionDescription
from headrace.telemetry.counters import DURATION_EDGES
from headrace.telemetry.metrics import make_registry
from sklearn.datasets import load_digits
from watched_digits import make_repository

from scripts.browser import CHROMIUM, Page, open_browser

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")

CLEAN = load_digits().data.astype(np.float32)
HOSTILE = "<img src=x onerror=\"document.title='owned'\">"


def text(selector: str) -> str:
    return f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"


def shows(selector: str, words: str) -> str:
    return f"({text(selector)}).includes({json.dumps(words)})"


def tile(name: str) -> str:
    """The figure of a tile."""
    return f"[...document.querySelectorAll('.tile')].find((tile) => tile.innerText.startsWith({name!r}))?.querySelector('strong').innerText"


class Traffic:
    """Requests of 8 rows each, one after the other, for as long as it is open."""

    def __init__(self, address: str, images: np.ndarray) -> None:
        self._address, self._images, self._is_over = address, images, False

    def run(self) -> None:
        random = np.random.default_rng(0)
        with client.InferenceServerClient(self._address) as stub:
            while not self._is_over:
                rows = self._images[random.integers(0, len(self._images), 8)]
                tensor = client.InferInput("image", list(rows.shape), "FP32")
                tensor.set_data_from_numpy(rows)
                stub.infer("digits", [tensor])

    async def __aenter__(self) -> None:
        self._thread = asyncio.create_task(asyncio.to_thread(self.run))

    async def __aexit__(self, *error: object) -> None:
        self._is_over = True
        await self._thread


async def test_the_page_shows_a_model_its_traffic_and_its_drift(tmp_path: Path) -> None:
    server = Server(ServerConfig(models=(str(make_repository(tmp_path)),), grpc=("127.0.0.1:0",), http="127.0.0.1:0"))
    await server.start()
    try:
        async with open_browser(f"http://{server.http_address}/") as page:
            await page.until(shows(".head", "digits version 1"))
            assert await page.evaluate(shows("#readiness", "ready"))
            await page.until(shows("main", "Learning reference: 0 of 600 rows"))
            assert await page.evaluate(shows(".events", "live v1"))

            async with Traffic(server.grpc_addresses[0], CLEAN):
                await page.until("document.querySelectorAll('.features tbody tr').length >= 30")
                await page.until(f"Number({tile('Requests')}.replaceAll(',', '')) > 5")
                await page.until("/^\\d.*[mµ]s$/.test(" + tile("Latency p99") + ")")
            assert await page.evaluate(shows(".verdict", "estimated accuracy"))
            assert await page.evaluate(tile("Drift alerts")) == "0"
            assert not await page.evaluate("document.querySelector('.alerts')")

            async with Traffic(server.grpc_addresses[0], np.ascontiguousarray(CLEAN[:, ::-1])):
                await page.until(shows(".head .pills", "drift alert"))
                await page.until(shows(".alerts", "drifted: PSI"))
            order = await page.evaluate("[...document.querySelectorAll('.features button')].map((button) => button.innerText)")
            assert order[0].startswith("probabilities."), order
            assert await page.evaluate(shows(".chosen h4", order[0]))

            await page.evaluate("[...document.querySelectorAll('.features button')].find((b) => b.innerText === 'image.0').click()")
            await page.until(shows(".chosen h4", "image.0"))
            assert await page.evaluate("document.querySelectorAll('.chosen rect.was').length >= 2")
            assert await page.evaluate("document.querySelectorAll('.chosen circle.beyond').length >= 1")
            assert page.problems == []
    finally:
        await server.stop()


async def test_after_a_swap_the_page_shows_what_serves_unless_somebody_asked_for_the_old_version(tmp_path: Path) -> None:
    repository = make_repository(tmp_path)
    config = ServerConfig(models=(str(repository),), grpc=("127.0.0.1:0",), http="127.0.0.1:0", poll_interval=0.1, settle=0)
    server = Server(config)
    await server.start()
    try:
        async with open_browser(f"http://{server.http_address}/") as page:
            await page.until(shows(".head", "digits version 1"))
            shutil.copytree(repository / "digits" / "1", repository / "digits" / "2")
            await page.until(shows(".head", "digits version 2"))
            assert await page.evaluate(shows(".events", "flip v2"))

            await page.evaluate("location.hash = '#digits:1'")
            await page.until(shows(".head", "digits version 1"))
            await page.until(shows(".head", "Version 2 serves this model now."))
            await page.evaluate("document.querySelector('.head .note a').click()")
            await page.until(shows(".head", "digits version 2"))
            assert page.problems == []
    finally:
        await server.stop()


def many(count: int) -> tuple[FakeModels, FakeOperations]:
    names = [HOSTILE, *[f"model-{number:02}" for number in range(1, count)]]
    reason = "<script>document.title='owned'</script>"
    models = [
        ModelDescription(
            name, "/srv/models", "latest:1",
            (VersionDescription(1, "live", since=NOW, is_default=True, traffic=100.0, labels=("<b>stable</b>",), reason=reason),), {},
        )
        for name in names
    ]  # fmt: skip
    versions = [FakeVersion(name).run(4, rows=4, padded_rows=4, seconds=0.01) for name in names]
    return FakeModels(versions), FakeOperations(*models)


@asynccontextmanager
async def serving(models: FakeModels, operations: FakeOperations, listener: str = "127.0.0.1:0") -> AsyncIterator[str]:
    dashboard = Dashboard(models, operations)
    server = HttpServer(listener, models, make_registry(lambda: models.find("", "")), dashboard=dashboard)
    address = await server.start()
    try:
        yield address
    finally:
        await server.stop()


async def test_names_and_reasons_are_text_and_many_versions_can_be_filtered() -> None:
    models, operations = many(50)
    async with serving(models, operations) as address, open_browser(f"http://{address}/") as page:
        await page.until("document.querySelectorAll('.version').length === 50")
        assert await page.evaluate(shows(".models h3", HOSTILE))
        await page.evaluate("document.querySelector('.version').click()")
        await page.until(shows(".head", HOSTILE))
        assert await page.evaluate(shows(".note", "<script>"))
        assert await page.evaluate("document.querySelectorAll('main img, main script, main b, .models img').length") == 0

        await page.evaluate("Object.assign(document.querySelector('#filter'), {value: 'model-07 live'}).dispatchEvent(new Event('input'))")
        await page.until("document.querySelectorAll('.version').length === 1")
        await page.evaluate("document.querySelector('.version').click()")
        await page.until(shows(".head", "model-07 version 1"))
        assert await page.evaluate("location.hash") == "#model-07:1"
        assert await page.evaluate("document.title") == "model-07 \u2013 Headrace"
        assert page.problems == []


async def test_what_is_old_is_marked_and_a_server_that_comes_back_begins_anew() -> None:
    models, operations = many(2)
    models.versions[0].run(1000, rows=8, padded_rows=8, seconds=0.01)
    first = serving(models, operations)
    address = await first.__aenter__()
    async with open_browser(f"http://{address}/") as page:
        try:
            await page.until(f"{tile('Requests')} === '0'")
        finally:
            await first.__aexit__(None, None, None)
        await page.until("document.body.classList.contains('is-stale')")
        assert await page.evaluate(shows("#stale", "No answer from the server: it cannot be reached"))

        again, operations = many(2)
        async with serving(again, operations, address):
            await page.until("document.querySelector('#stale').hidden && !document.body.classList.contains('is-stale')")
            await page.until(f"{tile('Requests')} === '0'")
            again.versions[0].run(3, rows=3, padded_rows=3, seconds=0.01)
            await page.until(f"Number({tile('Requests')}) > 0")


LOOK = """
  const counters = (n) => ({success: n, rows: 2 * n, batches: n, failures: {backend: n / 10}, buckets: [[n, 0]], batch_buckets: [n]});
  const version = (n, index) => ({id: `${index}@`, counters: n === null ? null : counters(n)});
  const tracked = new Rates();
  const add = (run, clock, ...counts) => {
    tracked.add({server: {run, clock}, models: [{name: "m", versions: counts.map(version)}]});
    const { recent } = tracked.of({name: "m"}, {id: "0@"});
    return recent && [recent.requests, recent.rows, recent.failures];
  };
"""


async def evaluate_rates(page: Page, expression: str) -> Any:
    await page.until("document.readyState === 'complete'")
    return await page.evaluate(f"import('/dashboard/rates.js').then((rates) => {{ const {{ Rates, quantile }} = rates; {expression} }})")


async def test_rates_are_differences_of_looks_and_never_negative() -> None:
    models, operations = many(1)
    async with serving(models, operations) as address, open_browser(f"http://{address}/") as page:
        looks = [("a", 1, 100), ("a", 2, 150), ("a", 2, 999), ("a", 3, 20), ("a", 4, 30), ("b", 1, 500), ("b", 2, 510)]
        assert await evaluate_rates(page, f"{LOOK} return {json.dumps(looks)}.map((look) => add(...look));") == [
            None,  # one look is no rate
            [50, 100, 5],
            [50, 100, 5],  # the same answer again
            None,  # the counters began anew
            [10, 20, 1],
            None,  # another run of the server, whose counters are larger
            [10, 20, 1],
        ]
        gone = 'add("a", 1, 5, 7); add("a", 2, 6, 8); add("a", 3, null, 9); return [tracked.tracks.size, tracked.together().requests];'
        assert await evaluate_rates(page, LOOK + gone) == [1, 1]


async def test_quantiles_are_those_of_the_values_to_within_a_bucket() -> None:
    models, operations = many(1)
    values = np.random.default_rng(7).lognormal(-6, 1, 20_000)
    counts = np.bincount(np.searchsorted(DURATION_EDGES, values), minlength=len(DURATION_EDGES) + 1).tolist()
    async with serving(models, operations) as address, open_browser(f"http://{address}/") as page:
        for q in (0.01, 0.5, 0.9, 0.99):
            found = await evaluate_rates(page, f"return quantile({json.dumps(DURATION_EDGES)}, {json.dumps(counts)}, {q});")
            edges = (0.0, *DURATION_EDGES)
            bucket = int(np.searchsorted(edges, np.quantile(values, q)))
            assert edges[bucket - 1] <= found <= edges[bucket]
        assert await evaluate_rates(page, f"return quantile({json.dumps(DURATION_EDGES)}, {json.dumps([0] * len(counts))}, 0.5);") is None
