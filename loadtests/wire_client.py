"""A gRPC client for load: some connections, watched by one thread that never waits longer than it is told to.

Costs about a tenth of what grpc.aio does, so that one core can send more than a server on another can answer. What it leaves out is
what load does not need: TLS, streams of messages, compression, retries, and any method but ModelInfer.
"""

from __future__ import annotations

import select
import socket
import time
from collections import Counter, deque
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from loadtests.grpc_connection import Connection, Ended, ProtocolError
from loadtests.service_level import Status

UNIX = "unix:"
RECEIVE = 65_536
"""Bytes at a time: a larger buffer would come from the kernel afresh for each read."""
CONNECT_TIMEOUT = 5.0
RECONNECT_TIMEOUT = 0.5
"""Nothing else is sent meanwhile, which shows as lag."""
RETRY = 0.1
"""Seconds before a server that was away is asked again."""


class ConnectFailed(Exception):
    """Nobody speaks HTTP/2 there."""


@dataclass(slots=True, eq=False)
class _Link:
    socket: socket.socket
    connection: Connection
    unsent: bytes = b""

    def flush(self) -> None:
        """Send what the socket takes. Raises OSError when the connection is gone."""
        data = self.unsent + self.connection.take()
        try:
            self.unsent = data[self.socket.send(data) :] if data else b""
        except BlockingIOError:
            self.unsent = data


@dataclass(frozen=True, slots=True)
class Waiting:
    """A call that no connection has room for."""

    token: int
    body: bytes
    deadline: float | None


class Client:
    """Owns the connections and which call is on which of them. Used by one thread, in a `with` block.

    Every call that was started ends once: in what `exchange` returns, or by `give_up`. Calls take the connections in turn; when the
    server takes no more streams on any, they wait here, first come first served. A connection that is lost ends its calls as LOST
    and is replaced; `goodbyes` counts the reasons that servers gave.
    """

    def __init__(self, address: str, connections: int = 4) -> None:
        """HOST:PORT or unix:PATH. Raises ConnectFailed."""
        self.address = address
        self._wanted = connections
        self._links: dict[socket.socket, _Link] = {}
        self._turns: list[_Link] = []
        self._turn = 0
        self._dirty: set[_Link] = set()
        self._where: dict[int, tuple[_Link, int]] = {}
        self._waiting: deque[Waiting] = deque()
        self._ended: list[Ended] = []
        self._retry_at = 0.0
        self.reconnects = 0
        self.goodbyes: Counter[str] = Counter()
        try:
            for _ in range(connections):
                self._add(_connect(address, CONNECT_TIMEOUT))
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"Client({self.address}, {len(self._turns)} connections, {len(self._where)} calls, {len(self._waiting)} waiting)"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for each in self._links:
            each.close()
        self._links.clear()
        self._turns.clear()

    # -- calls ---------------------------------------------------------------------------------------------------------

    def start(self, token: int, body: bytes, deadline: float | None, now: float) -> None:
        """Make the call, to be sent by the next `exchange`. Times are of the monotonic clock; tokens are the caller's, each used once."""
        if self._waiting or not self._place(token, body, deadline, now):
            self._waiting.append(Waiting(token, body, deadline))

    def _place(self, token: int, body: bytes, deadline: float | None, now: float) -> bool:
        turns = self._turns
        for _ in range(len(turns)):
            self._turn = turn = (self._turn + 1) % len(turns)
            link = turns[turn]
            if not link.connection.is_corked:
                stream = link.connection.start(token, body, None if deadline is None else deadline - now)
                self._where[token] = (link, stream)
                self._dirty.add(link)
                if link.connection.is_closing:  # that was its last stream
                    self._replace(link)
                return True
        if turns or self._reconnect(now):
            return False
        self._ended.append((token, Status.LOST, b""))
        return True

    def give_up(self, token: int) -> None:
        """Cancel a call, as clients do at their deadline. Does nothing for one that `exchange` has returned."""
        if (placed := self._where.pop(token, None)) is not None:
            link, stream = placed
            link.connection.cancel(stream)
            self._dirty.add(link)
        elif self._waiting and self._waiting[0].token == token:  # who waits longest mostly has the earliest deadline
            self._waiting.popleft()
        elif self._waiting:
            self._waiting = deque(each for each in self._waiting if each.token != token)
        if self._ended:
            self._ended = [each for each in self._ended if each[0] != token]

    def exchange(self, wait: float) -> list[tuple[float, list[Ended]]]:
        """Send what there is, wait for so many seconds at most for something to arrive, and take it: when, and which calls ended."""
        now = time.monotonic()
        while self._waiting:
            first = self._waiting[0]
            if not self._place(first.token, first.body, first.deadline, now):
                break
            self._waiting.popleft()
        for link in [*self._dirty]:
            self._flush(link)
        arrived: list[tuple[float, list[Ended]]] = []
        writing = [link.socket for link in self._dirty]
        readable, writable, _ = select.select([*self._links], writing, (), 0.0 if self._ended else max(0.0, wait))
        for ready in readable:
            self._read(self._links[ready], arrived)
        for ready in writable:
            if (open_link := self._links.get(ready)) is not None:  # reading may have found it gone
                self._flush(open_link)
        if self._ended:
            arrived.append((time.monotonic(), self._ended))
            self._ended = []
        return arrived

    # -- connections ---------------------------------------------------------------------------------------------------

    def _flush(self, link: _Link) -> None:
        """Afterwards a link that has more to send is dirty, and no other."""
        try:
            link.flush()
        except OSError:
            self._lose(link)
            return
        (self._dirty.add if link.unsent else self._dirty.discard)(link)

    def _read(self, link: _Link, arrived: list[tuple[float, list[Ended]]]) -> None:
        try:
            data = link.socket.recv(RECEIVE)
            now = time.monotonic()
            if not data:
                raise ConnectionResetError
            ended = link.connection.receive(data)
        except BlockingIOError:
            return
        except OSError:
            self._lose(link)
            return
        except ProtocolError as error:
            self.goodbyes[str(error)] += 1
            self._lose(link)
            return
        if ended:
            for token, _, _ in ended:
                del self._where[token]
            arrived.append((now, ended))
        if link.connection.has_output:
            self._dirty.add(link)
        if link.connection.is_closing:
            self._retire(link)

    def _retire(self, link: _Link) -> None:
        """No new calls for one that the server is closing; those under way may still end well."""
        if link in self._turns:
            if link.connection.goodbye:
                self.goodbyes[link.connection.goodbye] += 1
            self._replace(link)
        if not link.connection.streams:
            self._drop(link)

    def _lose(self, link: _Link) -> None:
        for token in link.connection.streams.values():
            del self._where[token]
            self._ended.append((token, Status.LOST, b""))
        link.connection.streams.clear()
        self._drop(link)
        if link in self._turns:
            self._replace(link)

    def _drop(self, link: _Link) -> None:
        self._links.pop(link.socket, None)
        self._dirty.discard(link)
        link.socket.close()

    def _replace(self, link: _Link) -> None:
        self._turns.remove(link)
        self._reconnect(time.monotonic())

    def _reconnect(self, now: float) -> bool:
        """Whether there is a connection again. Not tried more often than RETRY says while the server is away."""
        while len(self._turns) < self._wanted and now >= self._retry_at:
            try:
                self._add(_connect(self.address, RECONNECT_TIMEOUT))
            except ConnectFailed:
                self._retry_at = now + RETRY
            else:
                self.reconnects += 1
        return bool(self._turns)

    def _add(self, link: _Link) -> None:
        self._links[link.socket] = link
        self._turns.append(link)


def _connect(address: str, timeout: float) -> _Link:
    """Connected, and the server's settings known."""
    connection = Connection("localhost" if address.startswith(UNIX) else address)
    opened: socket.socket | None = None
    try:
        if address.startswith(UNIX):
            opened = socket.socket(socket.AF_UNIX)
            opened.settimeout(timeout)
            opened.connect(address.removeprefix(UNIX))
        else:
            host, _, port = address.rpartition(":")
            opened = socket.create_connection((host.strip("[]"), int(port)), timeout)
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        opened.sendall(connection.take())
        while not connection.is_settled:
            data = opened.recv(RECEIVE)
            if not data:
                raise ProtocolError("closed before its settings came")
            connection.receive(data)
        opened.sendall(connection.take())
        opened.setblocking(False)
    except (OSError, ProtocolError, ValueError) as error:
        if opened is not None:
            opened.close()
        raise ConnectFailed(f"{address}: expected a gRPC server, got {error or type(error).__name__}") from error
    return _Link(opened, connection)
