from __future__ import annotations

import asyncio
import math

import pytest
from fake_models import FakeVersion
from headrace.lifecycle.state import VersionState
from headrace.telemetry.counters import DURATION_EDGES, DispatchReason, FailureReason
from headrace.telemetry.metrics import MetricsRegistry, make_registry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain
from prometheus_client.registry import Collector

OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2"
FORMATS = pytest.mark.parametrize("accept", ["", OPENMETRICS], ids=["plain", "openmetrics"])

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def families(registry: MetricsRegistry, accept: str = "") -> list[Metric]:
    body, _ = await registry.scrape(accept)
    return list((parse_openmetrics if accept else parse_plain)(body.decode()))


async def scrape(*versions: FakeVersion, accept: str = "") -> Series:
    found = await families(make_registry(lambda: versions), accept)
    samples = [sample for family in found for sample in family.samples]
    series = {(_as_sent(sample.name), frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(series) == len(samples), "a series appears twice"
    return series


def _as_sent(name: str) -> str:
    """The parser of plain text adds `_total` to counters that lack it, to be like OpenMetrics; Prometheus itself does not."""
    return name.removesuffix("_total") if name.startswith("nv_") else name


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset({"model": "m", "version": "1", **labels}.items())


@FORMATS
async def test_histograms_are_cumulative_and_agree_with_their_count_and_sum(accept: str) -> None:
    version = FakeVersion("m").run(3, rows=6, padded_rows=8, seconds=0.02).run(1, rows=1, padded_rows=1, seconds=0.2)
    series = await scrape(version, accept=accept)
    name = "headrace_request_duration_seconds"
    edges = [*map(repr, DURATION_EDGES), "+Inf"]
    buckets = [series[key(f"{name}_bucket", le=edge)] for edge in edges]
    assert buckets == [0 if edge < 0.02 else 3 if edge < 0.2 else 4 for edge in (*DURATION_EDGES, math.inf)]
    assert series[key(f"{name}_count")] == 4
    assert series[key(f"{name}_sum")] == pytest.approx(0.26)
    assert series[key("headrace_compute_duration_seconds_sum")] == pytest.approx(0.7 * 0.26)


async def test_rows_of_batches() -> None:
    version = FakeVersion("m").run(3, rows=6, padded_rows=8, seconds=0.01).run(1, rows=1, padded_rows=1, seconds=0.1)
    series = await scrape(version)
    assert [series[key("headrace_batch_rows_bucket", le=edge)] for edge in ("1.0", "4.0", "8.0", "+Inf")] == [1, 1, 2, 2]
    assert series[key("headrace_batch_rows_sum")] == series[key("headrace_rows_total")] == 7
    assert series[key("headrace_batch_rows_count")] == series[key("headrace_batches_total")] == 2
    assert series[key("headrace_padding_rows_total")] == 2


async def test_answers_that_are_not_finite_are_shown_from_the_start() -> None:
    version = FakeVersion("m").run(3, rows=3, padded_rows=3, seconds=0.01)
    assert (await scrape(version))[key("headrace_nonfinite_answers_total")] == 0
    version.counters.shard().record_nonfinite(2)
    assert (await scrape(version))[key("headrace_nonfinite_answers_total")] == 2


@FORMATS
async def test_tritons_counters_keep_their_names_without_total(accept: str) -> None:
    version = FakeVersion("m", pending_requests=3, load_seconds=1.5).run(2, rows=4, padded_rows=4, seconds=0.01)
    version.counters.shard().record_failure(FailureReason.REJECTED, 5)
    series = await scrape(version, accept=accept)
    expected = {
        "nv_inference_request_success": 2,
        "nv_inference_count": 4,
        "nv_inference_exec_count": 1,
        "nv_inference_request_duration_us": 20_000,
        "nv_inference_queue_duration_us": 2_000,
        "nv_inference_compute_input_duration_us": 2_000,
        "nv_inference_compute_infer_duration_us": 14_000,
        "nv_inference_compute_output_duration_us": 2_000,
        "nv_inference_pending_request_count": 3,
        "nv_model_load_duration_secs": 1.5,
    }
    assert {name: series[key(name)] for name in expected} == expected
    failures = {reason.name: series[key("nv_inference_request_failure", reason=reason.name)] for reason in FailureReason}
    assert failures == {"REJECTED": 5, "CANCELED": 0, "BACKEND": 0, "OTHER": 0}


@pytest.mark.parametrize(("accept", "kind"), [("", "counter"), (OPENMETRICS, "unknown")], ids=["plain", "openmetrics"])
async def test_tritons_counters_as_they_are_sent(accept: str, kind: str) -> None:
    body, _ = await make_registry(lambda: [FakeVersion("m")]).scrape(accept)
    lines = body.decode().splitlines()
    assert f"# TYPE nv_inference_count {kind}" in lines
    assert 'nv_inference_count{model="m",version="1"} 0' in lines
    assert f"# TYPE nv_inference_request_failure {kind}" in lines
    assert 'nv_inference_request_failure{model="m",version="1",reason="BACKEND"} 0' in lines
    assert not [line for line in lines if line.startswith("nv_") and "_total{" in line]


async def test_every_sample_stands_under_a_type_of_its_own_name() -> None:
    body, _ = await make_registry(lambda: [FakeVersion("m"), FakeVersion("n")]).scrape()
    name, kind, seen = "", "", set()
    for line in body.decode().splitlines():
        if line.startswith("# TYPE "):
            name, kind = line.split()[2:]
            assert name not in seen
            seen.add(name)
        elif not line.startswith("#"):
            suffixes = ("_bucket", "_count", "_sum") if kind == "histogram" else ("",)
            assert line.split("{")[0].split(" ")[0] in {name + suffix for suffix in suffixes}


async def test_outcomes_exist_before_they_happen() -> None:
    series = await scrape(FakeVersion("m"))
    outcomes = ("success", "rejected", "cancelled", "backend_error", "invalid_or_other")
    assert [series[key("headrace_requests_total", outcome=outcome)] for outcome in outcomes] == [0] * 5


async def test_requests_are_counted_by_outcome() -> None:
    version = FakeVersion("m").run(2, rows=2, padded_rows=2, seconds=0.01)
    shard = version.counters.shard()
    for count, reason in enumerate(FailureReason, start=3):
        shard.record_failure(reason, count)
    series = await scrape(version)
    outcomes = ("success", "rejected", "cancelled", "backend_error", "invalid_or_other")
    assert [series[key("headrace_requests_total", outcome=outcome)] for outcome in outcomes] == [2, 3, 4, 5, 6]


async def test_why_batches_were_dispatched() -> None:
    version = FakeVersion("m")
    version.counters.shard().record_dispatch(DispatchReason.IDLE)
    series = await scrape(version)
    assert series[key("headrace_dispatches_total", reason="idle")] == 1
    assert series[key("headrace_dispatches_total", reason="full")] == 0


@FORMATS
async def test_names_with_quotes_backslashes_and_newlines_survive(accept: str) -> None:
    name = 'a"b\\c\nd\\n{x="y"} é'
    series = await scrape(FakeVersion(name, pending_rows=7), accept=accept)
    assert series[key("headrace_pending_rows", model=name)] == 7


@FORMATS
async def test_series_of_an_unloaded_version_vanish(accept: str) -> None:
    version = FakeVersion("m").run(1, rows=1, padded_rows=1, seconds=0.01)
    assert key("headrace_rows_total") in await scrape(version, accept=accept)
    version.state = VersionState.UNLOADED
    assert [found for found in await scrape(version, accept=accept) if ("model", "m") in found[1]] == []


async def test_a_version_that_is_not_live_shows_its_state_and_no_counts() -> None:
    series = await scrape(FakeVersion("m", state=VersionState.FAILED))
    assert [found for found in series if ("model", "m") in found[1]] == [key("headrace_version_state", state="failed")]


async def test_a_draining_version_is_still_counted() -> None:
    version = FakeVersion("m", state=VersionState.DRAINING).run(1, rows=1, padded_rows=1, seconds=0.01)
    series = await scrape(version)
    assert series[key("headrace_version_state", state="draining")] == 1
    assert series[key("headrace_rows_total")] == 1


@FORMATS
async def test_the_process_the_machine_and_the_build_are_shown(accept: str) -> None:
    names = {name for name, _ in await scrape(accept=accept)}
    assert {"process_resident_memory_bytes", "python_gc_collections_total", "headrace_build_info"} <= names
    assert {"nv_cpu_memory_total_bytes", "nv_cpu_memory_used_bytes"} <= names


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain; version=0.0.4"),
        ("*/*", "text/plain; version=0.0.4"),
        ("text/plain;version=1.0.0;escaping=allow-utf-8", "text/plain; version=1.0.0"),
        (OPENMETRICS, "application/openmetrics-text; version=1.0.0"),
    ],
)
async def test_the_format_is_negotiated(accept: str, content_type: str) -> None:
    body, found = await make_registry(lambda: [FakeVersion("m")]).scrape(accept)
    assert found.startswith(content_type)
    assert body.endswith(b"# EOF\n") == found.startswith("application/openmetrics-text")


class Weather(Collector):
    def collect(self) -> list[Metric]:
        return [GaugeMetricFamily("weather_celsius", "Outside.", value=21)]


async def test_registries_share_nothing() -> None:
    one, two = make_registry(list), make_registry(list)
    one.register(Weather())
    assert "weather_celsius" in [family.name for family in await families(one)]
    assert "weather_celsius" not in [family.name for family in await families(two)]


async def test_a_scrape_lets_the_event_loop_run_between_versions() -> None:
    registry = make_registry(lambda: [FakeVersion(f"m{number}") for number in range(32)])
    scraping = asyncio.ensure_future(registry.scrape())
    turns = 0
    while not scraping.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 4
