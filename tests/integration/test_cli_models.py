"""`headrace models` against a server on a real port."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_operations import DIGITS, SENTIMENT, FakeOperations
from headrace import cli
from served_models import Serve

Capture = pytest.CaptureFixture[str]


async def models(address: str, capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)"""
    code = await asyncio.to_thread(cli.main, ("models", *arguments, "--url", address))
    return code, *capsys.readouterr()


async def test_models_are_listed_and_shown(serve: Serve, capsys: Capture) -> None:
    async with serve(view=FakeOperations(DIGITS, SENTIMENT)) as served:
        code, out, err = await models(served.address, capsys, "list")
        assert (code, err) == (0, "")
        assert [line.split()[:3] for line in out.splitlines()[1:4]] == [
            ["digits", n, s] for n, s in (("3", "live"), ("4", "live"), ("5", "failed"))
        ]
        assert not any(line.endswith(" ") for line in out.splitlines())
        code, out, err = await models(served.address, capsys, "show", "digits")
        assert (code, err) == (0, "")
        assert "4 on trial against 3" in out
        code, out, err = await models(served.address, capsys, "sources")
        assert "connection refused" in out


async def test_json_is_for_machines(serve: Serve, capsys: Capture) -> None:
    view = FakeOperations(DIGITS)
    view.event_log.record("live", "digits", 4, fields={"token": "t"})

    async def read(*arguments: str) -> Any:
        code, out, _ = await models(served.address, capsys, *arguments, "--json")
        assert code == 0
        return json.loads(out)

    async with serve(view=view) as served:
        (model,) = await read("list")
        assert (model["name"], model["labels"]) == ("digits", {"canary": 4, "stable": 3})
        assert model["versions"][0]["requests"] == 123_456
        assert (await read("show", "digits"))["history"][0]["kind"] == "live"
        assert (await read("events"))["fields"] == {"token": "t"}
        assert (await read("sources"))[1]["error"] == "connection refused"
        assert await read("rollback", "digits", "--reason", "slow") == {"model": "digits", "version": 3}


async def test_changes_are_made_and_said(serve: Serve, capsys: Capture) -> None:
    view = FakeOperations(DIGITS)
    steps = [
        (("traffic", "digits", "4", "--mode", "shadow", "--percent", "50"), "digits: version 4 gets copies of 50 % of the requests\n"),
        (("label", "digits", "stable", "4", "--reason", "good"), "digits: 'stable' names version 4\n"),
        (("label", "digits", "stable", "none"), "digits: 'stable' is taken away\n"),
        (("rollback", "digits", "--reason", "slow"), "digits: rolled back, version 3 serves\n"),
        (("promote", "digits", "--reason", "fast"), "digits: version 4 serves\n"),
    ]
    async with serve(view=view) as served:
        for arguments, said in steps:
            assert await models(served.address, capsys, *arguments) == (0, said, "")
    assert [asked[:3] for asked in view.asked] == [
        ("traffic", "digits", 4), ("label", "digits", 4), ("label", "digits", 0), ("rolled_back", "digits", 4), ("promoted", "digits", 4),
    ]  # fmt: skip
    assert [event.reason for event in view.event_log.since(0)] == ["", "good", "", "slow", "fast"]


async def test_a_refusal_is_one_line_and_exits_1(serve: Serve, capsys: Capture) -> None:
    async with serve(view=FakeOperations(DIGITS)) as served:
        answer = await models(served.address, capsys, "show", "nobody")
        assert answer == (1, "", "headrace: no model 'nobody'\n")
        answer = await models(served.address, capsys, "label", "digits", "stable", "9")
        assert answer == (1, "", "headrace: label 'stable': expected a live version, got 9\n")


async def test_a_server_that_is_not_there_is_one_line(serve: Serve, capsys: Capture, tmp_path: Path) -> None:
    async with serve() as served:
        code, out, err = await models(served.address, capsys, "list")
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert "has no admin service: expected the gRPC address of a Headrace server" in err
    for address in (served.address, f"unix:{tmp_path / 'none'}"):
        code, out, err = await models(address, capsys, "list")
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith(f"headrace: no answer from {address}: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list", "--url", "8001"), "--url: expected HOST:PORT or unix:PATH, got '8001'"),
        (("list", "--tls-key", "key.pem"), "--tls-certificate and --tls-key: expected both or neither"),
        (("list", "--tls-ca", "none.pem"), "--tls-ca: could not read none.pem: No such file"),
        (("list", "--tls-ca", __file__), "--tls-ca: expected PEM certificates in"),
    ],
)
def test_wrong_use_exits_2_with_one_line(arguments: tuple[str, ...], message: str, capsys: Capture) -> None:
    assert cli.main(("models", *arguments)) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


@pytest.mark.parametrize(
    "arguments",
    [
        (), ("promote", "digits"), ("rollback", "digits"), ("label", "digits", "stable", "x"), ("promote", "digits", "--version", "-1"),
        ("traffic", "digits", "4", "--mode", "canary", "--percent", "101"),
        ("traffic", "digits", "4", "--mode", "canary", "--percent", "nan"),
        ("list", "--timeout", "0"),
    ],
)  # fmt: skip
def test_what_the_command_line_cannot_mean_exits_2(arguments: tuple[str, ...], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(("models", *arguments))
    assert caught.value.code == 2
    assert "usage: headrace models" in capsys.readouterr().err


async def test_followed_events_come_as_they_happen_and_end_with_the_server(serve: Serve) -> None:
    view = FakeOperations(DIGITS)
    view.event_log.record("loading", "digits", 5)
    async with asyncio.timeout(60), serve(view=view) as served:
        command = (sys.executable, "-m", "headrace.cli", "models", "events", "--follow", "--url", served.address)
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        assert (await process.stdout.readline()).split()[2:] == [b"loading", b"digits:5"]
        view.event_log.record("live", "digits", 5)
        assert (await process.stdout.readline()).split()[2:] == [b"live", b"digits:5"]
        await served.stop(grace=5.0)
        out, err = await process.communicate()
    assert (process.returncode, out, err) == (0, b"", f"headrace: {served.address} has stopped\n".encode())
