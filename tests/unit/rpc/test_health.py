from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from headrace.errors import InvalidRequest, NotFound
from headrace.lifecycle.state import VersionState
from headrace.rpc.health import HealthService
from headrace.wire.messages import SERVICE, HealthCheckRequest, HealthCheckResponse, HealthListResponse
from scripted_models import ScriptedModels, ScriptedVersion

SERVING, NOT_SERVING, UNKNOWN = 1, 2, 3


def ask(service: str) -> bytes:
    return HealthCheckRequest(service=service).SerializeToString()


def status(message: bytes) -> int:
    return HealthCheckResponse.FromString(message).status


async def next_status(watch: AsyncIterator[bytes]) -> int:
    return status(await asyncio.wait_for(anext(watch), 5))


@pytest.mark.parametrize(
    ("service", "expected"),
    [
        ("", SERVING), (SERVICE, SERVING), ("a", SERVING), ("a:1", SERVING), ("a:2", NOT_SERVING), ("b", NOT_SERVING),
        ("with:colon", SERVING), ("with:colon:1", SERVING),
    ],
)  # fmt: skip
def test_check_knows_the_server_its_models_and_their_versions(service: str, expected: int) -> None:
    loading = VersionState.LOADING
    models = ScriptedModels(
        ScriptedVersion("a", 1), ScriptedVersion("a", 2, state=loading), ScriptedVersion("b", state=loading), ScriptedVersion("with:colon")
    )
    assert status(HealthService(models).check(ask(service))) == expected


@pytest.mark.parametrize("service", ["nobody", "a:9", "a:", "a:x", ":", ":1", "grpc.health.v1.Health"])
def test_check_of_an_unknown_service_is_not_found(service: str) -> None:
    with pytest.raises(NotFound, match="unknown service"):
        HealthService(ScriptedModels(ScriptedVersion("a"))).check(ask(service))


def test_check_of_garbage_is_the_callers_fault() -> None:
    with pytest.raises(InvalidRequest, match="HealthCheckRequest"):
        HealthService(ScriptedModels()).check(b"\xff")


def test_the_server_is_not_serving_while_it_is_not_ready() -> None:
    models = ScriptedModels()
    models.is_ready = False
    assert status(HealthService(models).check(ask(""))) == NOT_SERVING


def test_list_has_the_server_and_every_model() -> None:
    models = ScriptedModels(ScriptedVersion("a"), ScriptedVersion("b", state=VersionState.FAILED))
    statuses = HealthListResponse.FromString(HealthService(models).list(b"")).statuses
    assert {name: found.status for name, found in statuses.items()} == {"": SERVING, SERVICE: SERVING, "a": SERVING, "b": NOT_SERVING}


@pytest.mark.parametrize(("service", "expected"), [("a:stable", SERVING), ("a:canary", NOT_SERVING)])
def test_check_knows_versions_by_their_labels(service: str, expected: int) -> None:
    models = ScriptedModels(ScriptedVersion("a", 1), ScriptedVersion("a", 2, state=VersionState.LOADING))
    models.labels = {"stable": 1, "canary": 2}
    assert status(HealthService(models).check(ask(service))) == expected


async def test_watch_tells_the_status_at_once_and_then_only_changes() -> None:
    version = ScriptedVersion("a", state=VersionState.LOADING)
    models = ScriptedModels(version)
    watch = HealthService(models).watch(ask("a"))
    assert await next_status(watch) == NOT_SERVING
    waiting = asyncio.ensure_future(next_status(watch))
    models.changed()
    await asyncio.sleep(0)
    assert not waiting.done()
    version.state = VersionState.LIVE
    models.changed()
    assert await waiting == SERVING
    await watch.aclose()


async def test_watch_of_an_unknown_model_sees_it_come() -> None:
    models = ScriptedModels()
    watch = HealthService(models).watch(ask("later"))
    assert await next_status(watch) == UNKNOWN
    models.versions.append(ScriptedVersion("later"))
    models.changed()
    assert await next_status(watch) == SERVING
    await watch.aclose()


async def test_watch_ends_after_not_serving_when_the_server_stops() -> None:
    models = ScriptedModels(ScriptedVersion("a"))
    health = HealthService(models)
    watches = [health.watch(ask(service)) for service in ("", "a")]
    assert [await next_status(watch) for watch in watches] == [SERVING, SERVING]
    models.announce_stop()
    health.close()
    for watch in watches:
        assert [status(message) async for message in watch] == [NOT_SERVING]


async def test_a_watcher_that_leaves_is_forgotten() -> None:
    health = HealthService(ScriptedModels())
    watch = health.watch(ask(""))
    await next_status(watch)
    assert "1 watchers" in repr(health)
    await watch.aclose()
    assert "0 watchers" in repr(health)
