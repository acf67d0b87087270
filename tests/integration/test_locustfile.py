"""Locust, as a process, with our users against a server in this one."""

import asyncio
import json
import os
import sys
from pathlib import Path

from headrace.testing import serve_in_process

ROOT = Path(__file__).parents[2]


async def run_locust(*arguments: str, shape: str = "") -> tuple[int | None, str, str]:
    environment = {**os.environ, "HEADRACE_SHAPE": shape}
    command = ["-m", "locust", "-f", "loadtests/locustfile.py", "--headless", "--json", *arguments]
    piped = asyncio.subprocess.PIPE
    locust = await asyncio.create_subprocess_exec(sys.executable, *command, cwd=ROOT, env=environment, stdout=piped, stderr=piped)
    try:
        async with asyncio.timeout(60):
            out, said = await locust.communicate()
    finally:
        if locust.returncode is None:
            locust.kill()
    return locust.returncode, out.decode(), said.decode()


async def test_users_call_every_model_that_is_ready_without_a_failure() -> None:
    async with serve_in_process(ROOT / "examples" / "models") as server:
        code, out, said = await run_locust(
            "--host", server.grpc_addresses[0], "--users", "4", "--run-time", "8s", "--pace", "0.05", "PacedUser"
        )
    assert code == 0, said
    counts = {row["name"]: (row["num_requests"], row["num_failures"]) for row in json.loads(out)}
    assert counts.keys() == {"diabetes", "digits", "digits_image"}
    assert all(requests > 0 and not failures for requests, failures in counts.values())


async def test_a_shape_ends_by_itself_and_takes_the_named_model() -> None:
    async with serve_in_process(ROOT / "examples" / "models") as server:
        arguments = [
            "--host",
            server.grpc_addresses[0],
            "--models",
            "digits",
            "--rows",
            "2",
            "--peak",
            "4",
            "--shape-seconds",
            "3",
            "BusyUser",
        ]
        code, out, said = await run_locust(*arguments, shape="spike")
    assert code == 0, said
    assert [(row["name"], row["num_failures"]) for row in json.loads(out)] == [("digits", 0)]


async def test_refused_requests_are_failures_and_the_exit_code_says_so() -> None:
    async with serve_in_process(ROOT / "examples" / "models") as server:
        # More rows than the model takes at once.
        arguments = [
            "--host",
            server.grpc_addresses[0],
            "--models",
            "digits",
            "--rows",
            "5000",
            "--users",
            "1",
            "--run-time",
            "2s",
            "PacedUser",
        ]
        code, out, said = await run_locust(*arguments)
    assert code == 1, said
    (row,) = json.loads(out)
    assert row["num_failures"] == row["num_requests"] > 0


async def test_a_server_that_is_not_there_is_said_at_once() -> None:
    code, _, said = await run_locust("--host", "127.0.0.1:1", "--users", "4", "--run-time", "30s", "PacedUser")
    assert code == 2
    assert "nothing to call at 127.0.0.1:1" in said
