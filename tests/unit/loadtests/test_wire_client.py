"""Against a socket that says HTTP/2's settings and then goes away; real servers are in tests/integration/test_open_loop.py."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from loadtests.grpc_connection import SETTINGS, frame
from loadtests.service_level import Status
from loadtests.wire_client import Client, ConnectFailed


@contextmanager
def server_that_leaves() -> Iterator[str]:
    """Accepts one connection, and closes it and its port as soon as it has heard of a call."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with listener.accept()[0] as opened:
                listener.close()
                opened.sendall(frame(SETTINGS, 0, 0))
                while b"ModelInfer" not in opened.recv(65_536):
                    pass

        address = f"127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=serve)
        thread.start()
        yield address
        thread.join()


def test_calls_end_as_lost_with_their_connection_and_others_find_nobody() -> None:
    with server_that_leaves() as address, Client(address, connections=1) as client:
        client.start(1, b"body", None, time.monotonic())
        client.start(2, b"body", None, time.monotonic())
        ended = []
        while not ended:
            ended = client.exchange(1.0)
        assert [each for _, calls in ended for each in calls] == [(1, Status.LOST, b""), (2, Status.LOST, b"")]


def test_a_call_that_was_given_up_is_not_heard_of_again_though_nobody_was_there() -> None:
    with server_that_leaves() as address:
        client = Client(address, connections=1)
        client.start(1, b"body", None, time.monotonic())
        while not client.exchange(1.0):
            pass
    with client:  # the listener is closed now
        client.start(2, b"body", None, time.monotonic())
        client.start(3, b"body", None, time.monotonic())
        client.give_up(2)
        assert [each for _, calls in client.exchange(0.0) for each in calls] == [(3, Status.LOST, b"")]


def test_calls_beyond_the_streams_of_a_server_that_takes_none_wait_until_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        settings = frame(SETTINGS, 0, 0, b"\x00\x03\x00\x00\x00\x00")
        thread = threading.Thread(target=lambda: accepted.append(listener.accept()[0]) or accepted[0].sendall(settings))
        accepted: list[socket.socket] = []
        thread.start()
        with Client(f"127.0.0.1:{listener.getsockname()[1]}", connections=1) as client:
            for token in (1, 2, 3):
                client.start(token, b"body", None, time.monotonic())
            client.give_up(2)
            client.give_up(1)
            assert client.exchange(0.0) == []
            assert "1 waiting" in repr(client)
        thread.join()
        accepted[0].close()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "unix:/nowhere.sock", "127.0.0.1:port"])
def test_where_nobody_listens_is_said(address: str) -> None:
    with pytest.raises(ConnectFailed, match=f"{address}: expected a gRPC server"):
        Client(address)
