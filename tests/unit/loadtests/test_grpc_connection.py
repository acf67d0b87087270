import struct

import hpack
import pytest

from loadtests import grpc_connection as h2
from loadtests.grpc_connection import Connection, ProtocolError, encode_timeout, frame
from loadtests.service_level import Status

SETTLED = frame(h2.SETTINGS, 0, 0)
BODY = b"\0\0\0\0\x05hello"


def settings(**values: int) -> bytes:
    return frame(h2.SETTINGS, 0, 0, b"".join(struct.pack(">HI", getattr(h2, name), value) for name, value in values.items()))


def settled(*more: bytes) -> Connection:
    """Connected to a server with these settings; what both said so far is over."""
    connection = Connection("host:1")
    connection.receive(b"".join(more) or SETTLED)
    connection.take()
    return connection


def frames(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Type, flags, stream, payload."""
    found, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 3])
        found.append((data[at + 3], data[at + 4], int.from_bytes(data[at + 5 : at + 9]), data[at + 9 : at + 9 + size]))
        at += 9 + size
    return found


def headers(fields: dict[str, str], stream: int = 1, *, flags: int = 0, huffman: bool = True) -> bytes:
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    return frame(h2.HEADERS, h2.END_HEADERS | flags, stream, encoder.encode(fields, huffman=huffman))


def response(body: bytes = BODY, stream: int = 1, status: str = "0") -> bytes:
    """As servers send it: headers, one message, trailers."""
    first = headers({":status": "200", "content-type": "application/grpc"}, stream)
    last = headers({"grpc-status": status, "grpc-message": "so it is"}, stream, flags=h2.END_STREAM)
    return first + frame(h2.DATA, 0, stream, body) + last


def test_a_connection_begins_with_preface_and_settings() -> None:
    sent = Connection("host:1").take()
    assert sent.startswith(h2.PREFACE)
    kind, _, stream, payload = frames(sent.removeprefix(h2.PREFACE))[0]
    assert (kind, stream) == (h2.SETTINGS, 0)
    assert (h2.HEADER_TABLE_SIZE, 0) in struct.iter_unpack(">HI", payload)


@pytest.mark.parametrize("table", [4096, 0, 100])
def test_every_request_reads_the_same_whatever_table_the_server_keeps(table: int) -> None:
    connection, decoder = settled(settings(HEADER_TABLE_SIZE=table)), hpack.Decoder()
    decoder.max_allowed_table_size = table
    for stream in (1, 3, 5):
        connection.start(stream, BODY)
        (head, data) = frames(connection.take())
        assert head[:3] == (h2.HEADERS, h2.END_HEADERS, stream)
        assert dict(decoder.decode(head[3])) == {
            ":method": "POST", ":scheme": "http", ":path": "/inference.GRPCInferenceService/ModelInfer", ":authority": "host:1",
            "te": "trailers", "content-type": "application/grpc",
        }  # fmt: skip
        assert data == (h2.DATA, h2.END_STREAM, stream, BODY)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "250000u"), (1e-9, "1u"), (-1.0, "1u"), (99.9, "99900000u"), (100.0, "100000m"), (1e9, "99999999m")]
)
def test_a_deadline_is_a_timeout_of_at_most_eight_digits(seconds: float, text: str) -> None:
    assert hpack.Decoder().decode(encode_timeout(seconds)) == [("grpc-timeout", text)]


def test_a_call_with_a_deadline_tells_the_server() -> None:
    connection = settled()
    connection.start(7, BODY, 0.5)
    assert ("grpc-timeout", "500000u") in hpack.Decoder().decode(frames(connection.take())[0][3])


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_a_response_may_arrive_in_any_pieces(piece: int) -> None:
    connection, ended = settled(), []
    connection.start(42, BODY)
    data = response()
    for at in range(0, len(data), piece):
        ended += connection.receive(data[at : at + piece])
    assert ended == [(42, 0, BODY)]
    assert not connection.streams


def test_responses_belong_to_their_streams() -> None:
    connection = settled()
    for token in (10, 11, 12):
        connection.start(token, BODY)
    ended = connection.receive(response(b"c", 5) + response(b"a", 1, "8") + response(b"b", 3))
    assert ended == [(12, 0, b"c"), (10, 8, b"so it is"), (11, 0, b"b")]


@pytest.mark.parametrize("huffman", [True, False])
def test_a_status_without_response_is_read(huffman: bool) -> None:
    connection = settled()
    connection.start(1, BODY)
    fields = {":status": "200", "content-type": "application/grpc", "grpc-status": "14", "grpc-message": "away"}
    assert connection.receive(headers(fields, flags=h2.END_STREAM, huffman=huffman)) == [(1, 14, b"away")]


@pytest.mark.parametrize(
    "data",
    [
        headers({":status": "502"}),
        headers({":status": "200"}, flags=h2.END_STREAM),
        headers({":status": "200", "grpc-status": "x"}, flags=h2.END_STREAM),
        headers({":status": "200"}) + frame(h2.DATA, h2.END_STREAM, 1, BODY),
    ],
)
def test_what_is_no_grpc_is_said_to_be_none(data: bytes) -> None:
    connection = settled()
    connection.start(1, BODY)
    assert [status for _, status, _ in connection.receive(data)] == [Status.NOT_GRPC]


def test_padding_priority_and_continuations_are_understood() -> None:
    connection = settled()
    connection.start(1, BODY)
    block = frames(headers({"grpc-status": "0"}))[0][3]
    padded = frame(h2.DATA, h2.PADDED, 1, b"\x02" + BODY + b"xx")
    first = frame(h2.HEADERS, h2.END_STREAM | h2.PADDED | h2.PRIORITY, 1, b"\x01" + bytes(5) + block[:4] + b"x")
    last = frame(h2.CONTINUATION, h2.END_HEADERS, 1, block[4:])
    assert connection.receive(headers({":status": "200"}) + padded + first + last) == [(1, 0, BODY)]


def test_pings_and_settings_are_answered() -> None:
    connection = settled()
    connection.receive(frame(h2.PING, 0, 0, b"12345678") + frame(h2.PING, h2.ACK, 0, bytes(8)) + SETTLED)
    assert frames(connection.take()) == [(h2.PING, h2.ACK, 0, b"12345678"), (h2.SETTINGS, h2.ACK, 0, b"")]


def test_a_large_message_waits_for_the_servers_windows() -> None:
    connection, body = settled(settings(INITIAL_WINDOW_SIZE=30_000)), bytes(range(256)) * 400
    connection.start(1, body)
    sent = [payload for kind, _, _, payload in frames(connection.take()) if kind == h2.DATA]
    assert [len(payload) for payload in sent] == [16_384, 13_616]
    connection.receive(frame(h2.WINDOW_UPDATE, 0, 1, struct.pack(">I", 90_000)))
    sent += [payload for _, _, _, payload in frames(connection.take())]
    assert sum(map(len, sent)) == 65_535  # the connection's window
    connection.receive(frame(h2.WINDOW_UPDATE, 0, 0, struct.pack(">I", 90_000)))
    *_, last = rest = frames(connection.take())
    assert last[:3] == (h2.DATA, h2.END_STREAM, 1)
    assert b"".join(sent + [payload for _, _, _, payload in rest]) == body


def test_a_changed_window_counts_for_messages_under_way() -> None:
    connection = settled(settings(INITIAL_WINDOW_SIZE=10))
    connection.start(1, bytes(100))
    connection.take()
    connection.receive(settings(INITIAL_WINDOW_SIZE=60))
    assert frames(connection.take())[0] == (h2.DATA, 0, 1, bytes(50))


def test_no_more_streams_than_the_server_takes() -> None:
    connection = settled(settings(MAX_CONCURRENT_STREAMS=2))
    connection.start(1, BODY)
    assert not connection.is_corked
    connection.start(2, BODY)
    assert connection.is_corked
    connection.receive(response())
    assert not connection.is_corked


def test_a_call_given_up_is_reset_and_makes_room_and_its_answer_is_not_heard() -> None:
    connection = settled(settings(MAX_CONCURRENT_STREAMS=1))
    stream = connection.start(1, BODY)
    connection.take()
    connection.cancel(stream)
    assert frames(connection.take()) == [(h2.RST_STREAM, 0, 1, struct.pack(">I", h2.CANCEL))]
    assert not connection.is_corked
    assert connection.receive(response()) == []


def test_a_reset_stream_has_failed() -> None:
    connection = settled()
    connection.start(5, BODY)
    assert connection.receive(frame(h2.RST_STREAM, 0, 1, struct.pack(">I", 7))) == [(5, Status.RESET, b"")]


def test_going_away_loses_what_the_server_will_not_answer_and_nothing_else() -> None:
    connection = settled()
    connection.start(5, BODY)
    connection.start(6, BODY)
    assert connection.receive(frame(h2.GOAWAY, 0, 0, struct.pack(">II", 1, 0))) == [(6, Status.LOST, b"")]
    assert connection.is_closing
    assert connection.receive(response()) == [(5, 0, BODY)]


@pytest.mark.parametrize(
    "data",
    [
        frame(h2.HEADERS, h2.END_HEADERS, 1, b"\xbe"),  # of a table which we said not to have
        frame(h2.DATA, 0, 1, bytes(16_385)),
        frame(h2.CONTINUATION, h2.END_HEADERS, 1, b""),
        frame(h2.HEADERS, 0, 1, b"") + frame(h2.PING, 0, 0, bytes(8)),
        frame(h2.DATA, h2.PADDED, 1, b"\x05abc"),
        frame(h2.PUSH_PROMISE, h2.END_HEADERS, 1, bytes(4)),
    ],
)
def test_what_http2_does_not_allow_is_refused(data: bytes) -> None:
    connection = settled()
    connection.start(1, BODY)
    with pytest.raises(ProtocolError, match=r"expected|unreadable"):
        connection.receive(data)


def test_our_window_is_opened_again_long_before_it_is_used_up() -> None:
    connection = settled()
    chunk = frame(h2.DATA, 0, 3, bytes(16_384)) * 64  # of a call that was given up: it counts as well
    for _ in range(2**30 // (16_384 * 64) + 1):
        connection.receive(chunk)
    ((kind, _, stream, payload),) = frames(connection.take())
    assert (kind, stream) == (h2.WINDOW_UPDATE, 0)
    assert int.from_bytes(payload) == 2**30 + 64 * 16_384
