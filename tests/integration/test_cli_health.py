"""`headrace health` against real ports: what a container's probe sees."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest
from fake_models import FakeModels, FakeVersion
from headrace import cli
from headrace.cli_health import reached
from headrace.http.server import HttpServer
from headrace.telemetry.metrics import make_registry
from served_models import Serve

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADRACE_HTTP", "HEADRACE_GRPC", "HEADRACE_CONFIG"):
        monkeypatch.delenv(name, raising=False)


async def health(*arguments: str) -> int:
    return await asyncio.to_thread(cli.main, ("health", *arguments))


@asynccontextmanager
async def serving(models: FakeModels) -> AsyncIterator[str]:
    server = HttpServer("127.0.0.1:0", models, make_registry(lambda: models.find("", "")))
    address = await server.start()
    try:
        yield address
    finally:
        await server.stop()


@contextmanager
def silent() -> Iterator[str]:
    """The address of somebody who takes connections and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


async def test_exit_code_0_when_ready_and_1_when_not(capsys: Capture) -> None:
    async with serving(models := FakeModels([FakeVersion("m")])) as address:
        assert await health("--http", address) == 0
        assert "200" in capsys.readouterr().out
        models.is_ready = False
        assert await health("--http", address) == 1
        assert "503" in (err := capsys.readouterr().err)
        assert "starting" in err or "not ready" in err
        assert await health("--http", address, "--live") == 0


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
async def test_left_out_the_server_of_the_same_environment_is_asked(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(FakeModels([FakeVersion("m")])) as address:
        monkeypatch.setenv("HEADRACE_HTTP", f"{host}:{address.rpartition(':')[2]}")
        assert await health() == 0


async def test_over_grpc(serve: Serve, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve() as served:
        assert await health("--grpc", served.address) == 0
        served.models.is_ready = False
        assert await health("--grpc", served.address) == 1
        assert "not ready" in capsys.readouterr().err
        assert await health("--grpc", served.address, "--live") == 0
        served.models.is_ready = True
        monkeypatch.setenv("HEADRACE_HTTP", "")
        monkeypatch.setenv("HEADRACE_GRPC", served.address)
        assert await health() == 0, "no HTTP: the first gRPC listener"


async def test_nobody_there_is_exit_code_1_with_the_reason(capsys: Capture) -> None:
    with silent() as address:
        pass
    for flag in ("--http", "--grpc"):
        assert await health(flag, address) == 1
        assert "no answer from" in capsys.readouterr().err


async def test_a_server_that_hangs_is_given_up_after_the_timeout(capsys: Capture) -> None:
    with silent() as address:
        for flag in ("--http", "--grpc"):
            assert await health(flag, address, "--timeout", "0.2") == 1
            assert "no answer from" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [("--http", "nowhere"), ("--http", "unix:/x"), ("--grpc", "8001"), ("--timeout", "0"), ("--timeout", "nan")]
)
def test_wrong_use_is_exit_code_2(arguments: tuple[str, str], capsys: Capture) -> None:
    assert cli.main(("health", *arguments)) == 2
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("listener", "address"),
    [
        ("0.0.0.0:8002", "127.0.0.1:8002"),
        ("[::]:8002", "[::1]:8002"),
        ("10.0.0.7:1", "10.0.0.7:1"),
        ("unix:/run/a:b.sock", "unix:/run/a:b.sock"),
    ],
)
def test_a_listener_on_every_address_is_asked_by_loopback(listener: str, address: str) -> None:
    assert reached(listener) == address


def test_no_listener_at_all_is_exit_code_2(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("HEADRACE_HTTP", "")
    monkeypatch.setenv("HEADRACE_GRPC", "")
    assert cli.main(["health"]) == 2
    assert "listener" in capsys.readouterr().err


def test_a_configuration_that_the_server_refuses_is_exit_code_2(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("HEADRACE_HTTP", "nowhere")
    assert cli.main(["health"]) == 2
    assert "http" in capsys.readouterr().err
