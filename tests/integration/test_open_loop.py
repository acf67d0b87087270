"""The open-loop client against real transports, whose models answer as the test says."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from headrace.errors import BackendError, QueueFull
from headrace.requests import Answer, InferRequest
from headrace.testing import serve_in_process
from scripted_models import ScriptedVersion, echo, infer_message
from served_models import Serve, serve_on

from loadtests.calls import grpc_frame
from loadtests.encoded_calls import AnswerCheck, EncodedCall, encode_calls
from loadtests.models import MLP, write_repository
from loadtests.open_loop import alternate, run_closed_loop, run_open_loop
from loadtests.service_level import Counts, Results, Status, count
from loadtests.wire_client import Client, ConnectFailed

RIGHT, REFUSED, BROKEN, WRONG, HELD = 1.0, 2.0, 3.0, 4.0, 5.0


def by_value(version: ScriptedVersion, request: InferRequest) -> Answer | None:
    value = np.frombuffer(request.inputs[0].data, np.float32)[0]
    if value == HELD:
        return None
    return {REFUSED: QueueFull("full"), BROKEN: BackendError("broken")}.get(float(value)) or echo(version, request)


def call(value: float, timeout: float | None = None, columns: int = 4) -> EncodedCall:
    """y = x is right, but for WRONG."""
    expected = np.full((1, columns), RIGHT if value == WRONG else value, np.float32)
    return EncodedCall(grpc_frame(infer_message(columns=columns, value=value)), AnswerCheck({"y": expected}), timeout)


async def offer(address: str, calls: Sequence[EncodedCall], total: int, seconds: float = 0.2) -> Results:
    """From a thread, since the server under test runs on this loop."""

    def run() -> Results:
        with Client(address, connections=2) as client:
            return run_open_loop(client, calls, np.linspace(0.0, seconds, total), alternate(total, len(calls)), seconds)

    return await asyncio.to_thread(run)


async def test_each_way_to_end_is_counted_as_what_it_is(serve: Serve) -> None:
    async with serve(ScriptedVersion(script=by_value)) as served:
        calls = [call(RIGHT), call(REFUSED), call(BROKEN), call(WRONG), call(HELD, timeout=0.3)]
        results = await offer(served.address, calls, 500)
    assert count(results, slo=10.0) == Counts(ok=100, late=100, refused=100, failed=100, wrong=100)
    assert set(results.statuses[results.statuses < 100].tolist()) <= {0, 4, 8, 13, 14}


async def test_a_unix_socket_is_served_as_well(serve: Serve, tmp_path: Path) -> None:
    async with serve(ScriptedVersion(script=by_value), grpc=(f"unix:{tmp_path}/s",)) as served:
        results = await offer(served.address, [call(RIGHT)], 50)
    assert count(results, None).ok == 50


async def test_an_answer_after_the_slo_is_late(serve: Serve) -> None:
    async with serve(ScriptedVersion(script=by_value)) as served:
        results = await offer(served.address, [call(RIGHT)], 50)
    assert count(results, slo=1e-6) == Counts(ok=0, late=50, refused=0, failed=0, wrong=0)
    assert np.all(results.sent >= results.intended)
    assert np.all(results.done > results.sent)


async def test_the_server_is_told_of_deadlines_and_of_calls_given_up(serve: Serve) -> None:
    version = ScriptedVersion(script=by_value)
    async with serve(version) as served:
        await offer(served.address, [call(HELD, timeout=0.2)], 20)
        await version.until(lambda: len(version.cancelled) == 20)
    assert all(reply.deadline is not None for reply in version.replies)


async def test_calls_beyond_the_servers_streams_wait_for_one_and_keep_their_deadlines() -> None:
    # On the transport that bounds them. gRPC's C core does not, and sheds calls at random instead.
    async with serve_on("native")(ScriptedVersion(script=by_value)) as served:

        def run() -> Results:
            with Client(served.address, connections=1) as client:  # 1024 streams
                calls = [call(HELD, timeout=0.5), call(RIGHT, timeout=5.0)]
                kinds = np.repeat([0, 1], [1500, 100])
                return run_open_loop(client, calls, np.linspace(0.0, 0.3, 1600), kinds, 0.3)

        results = await asyncio.to_thread(run)
    assert count(results, None) == Counts(ok=100, late=1500, refused=0, failed=0, wrong=0)


async def test_large_tensors_pass_through_the_windows(serve: Serve) -> None:
    async with serve(ScriptedVersion(script=by_value)) as served:
        results = await offer(served.address, [call(RIGHT, columns=150_000)], 40)
    assert count(results, None).ok == 40


@pytest.mark.parametrize("transport_name", ["native", "grpcio"])
async def test_a_served_model_answers_right_in_both_kinds_of_loop(tmp_path: Path, transport_name: str) -> None:
    path = write_repository(tmp_path, {MLP: None})[MLP]
    calls = encode_calls(MLP, path)

    def closed(address: str) -> Results:
        with Client(address, connections=2) as client:
            return run_closed_loop(client, calls, 16, 0.2)

    async with serve_in_process(tmp_path, transport=transport_name) as server:
        (address,) = server.grpc_addresses
        for results in (await offer(address, calls, 300), await asyncio.to_thread(closed, address)):
            assert len(results) > 16
            assert count(results, None) == Counts(len(results), 0, 0, 0, 0)


async def test_a_server_that_goes_away_loses_calls_and_the_client_ends(serve: Serve) -> None:
    version = ScriptedVersion(script=by_value)
    async with serve(version) as served:
        offered = asyncio.create_task(offer(served.address, [call(HELD)], 30))
        await version.until(lambda: len(version.held) == 30)
        await served.stop(grace=0.0)
        results = await offered
    kinds = Counter(results.statuses.tolist())
    assert kinds[Status.OK] == 0
    assert kinds[Status.UNANSWERED] == 0
    assert sum(kinds.values()) == 30


async def test_a_restarted_server_is_connected_to_again(serve: Serve) -> None:
    async with serve(ScriptedVersion(script=by_value)) as served:
        with Client(served.address, connections=2) as client:
            address, calls = served.address, [call(RIGHT)]
            await served.stop(grace=0.0)
            async with serve(ScriptedVersion(script=by_value), grpc=(address,)):
                first = await asyncio.to_thread(run_closed_loop, client, calls, 2, 0.05)
                again = await asyncio.to_thread(run_closed_loop, client, calls, 2, 0.05)
    assert client.reconnects == 2
    assert count(first, None).ok
    assert count(again, None) == Counts(len(again), 0, 0, 0, 0)


@contextmanager
def stubborn_server() -> Iterator[str]:
    """Speaks something else."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with listener.accept()[0] as opened:
                opened.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def test_what_speaks_no_http2_is_refused_with_its_address() -> None:
    with stubborn_server() as address, pytest.raises(ConnectFailed, match=f"{address}: expected a gRPC server"):
        Client(address)


async def test_a_run_that_cannot_show_its_bound_any_more_sends_nothing_further(serve: Serve) -> None:
    version = ScriptedVersion(script=by_value)
    async with serve(version) as served:

        def run() -> Results:
            with Client(served.address, connections=1) as client:
                times = np.linspace(0.0, 60.0, 6000)
                return run_open_loop(client, [call(REFUSED)], times, alternate(6000, 1), 60.0, bound=(1.0, 3))

        results = await asyncio.to_thread(run)
    assert 4 <= len(results) == len(version.requests) < 6000
    assert count(results, 1.0).refused == len(results)
    assert results.seconds < 60.0
