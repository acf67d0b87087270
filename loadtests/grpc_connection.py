"""The client's half of one HTTP/2 connection with unary gRPC calls on it. Bytes in, bytes out; no sockets and no clock.

Theory of operation. What makes gRPC's clients in Python cost as much as the servers they measure is the object, the task and the
hops of each call. Here a call is an entry in a dict, its request a few bytes before a message that was encoded beforehand, and its
end a lookup of the trailers' bytes: the header table that the server may keep for us has the size 0, so that equal headers are
equal bytes, and each block is decoded only once. Our own table holds four fields that never change, as other clients' does; where the
server wants another size than the usual one we do without.

Windows: the server's are respected, also where a message is larger than them. Ours are as large as they may be, so that nothing waits
for us: RFC 9113, 6.9. Frames of a type or setting that is not known are skipped, 4.1 and 6.5.2.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from math import inf

import hpack

from loadtests.calls import INFER_PATH
from loadtests.service_level import Status

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 5, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 1, 2, 3, 4, 5
CANCEL = 8
USUAL_TABLE, USUAL_WINDOW, USUAL_FRAME = 4096, 65_535, 16_384
LARGEST_WINDOW = 2**31 - 1
LAST_STREAM = 2**31 - 3
REMEMBERED = 1024
"""Blocks of response headers. Texts of errors can differ in every one."""

_HEAD = struct.Struct(">HBBBI")
_SETTING = struct.Struct(">HI")

Ended = tuple[int, int, bytes]
"""A call's token, its status (gRPC's or one of Status), and its response's body with gRPC's prefix; of a failed one the grpc-message."""


class ProtocolError(Exception):
    """The server sent what HTTP/2 does not allow."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return _HEAD.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload


def encode_integer(value: int, bits: int, flags: int) -> bytes:
    """HPACK's, RFC 7541, 5.1: what does not fit into so many bits follows seven at a time."""
    most = (1 << bits) - 1
    if value < most:
        return bytes((flags | value,))
    encoded, value = bytearray((flags | most,)), value - most
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def encode_string(text: bytes) -> bytes:
    return encode_integer(len(text), 7, 0) + text


# Of HPACK's static table.
_AUTHORITY, _PATH, _CONTENT_TYPE = 1, 4, 31
_POST_HTTP = b"\x83\x86"


def encode_fields(authority: str, path: str, *, remember: bool) -> bytes:
    """The fields of every request; `remember` puts four of them into the server's table, where `_REMEMBERED` finds them."""
    bits, flags = (6, 0x40) if remember else (4, 0x00)
    return b"".join(
        (
            _POST_HTTP,
            encode_integer(_PATH, bits, flags) + encode_string(path.encode()),
            encode_integer(_AUTHORITY, bits, flags) + encode_string(authority.encode()),
            encode_integer(0, bits, flags) + encode_string(b"te") + encode_string(b"trailers"),
            encode_integer(_CONTENT_TYPE, bits, flags) + encode_string(b"application/grpc"),
        )
    )


_REMEMBERED = _POST_HTTP + bytes(0x80 | index for index in (65, 64, 63, 62))
_TIMEOUT = b"\x00" + encode_string(b"grpc-timeout")


def encode_timeout(seconds: float) -> bytes:
    """gRPC's header, at most eight digits: in microseconds, from a hundred seconds on in milliseconds."""
    microseconds = max(1, round(seconds * 1e6))
    text = b"%du" % microseconds if microseconds < 100_000_000 else b"%dm" % min(99_999_999, microseconds // 1000)
    return _TIMEOUT + encode_string(text)


def decode_status(block: bytes) -> tuple[int | None, bytes]:
    """The grpc-status of a block of response headers, NOT_GRPC where the HTTP status is not 200, None where there is neither; its text.

    Raises ProtocolError for a block that cannot be read, as one that refers to a table which we said not to have.
    """
    decoder = hpack.Decoder()
    decoder.header_table_size = decoder.max_allowed_table_size = 0
    try:
        fields = dict(decoder.decode(block, raw=True))
    except hpack.HPACKError as error:
        raise ProtocolError(f"unreadable headers: {error}") from error
    if (http := fields.get(b":status", b"200")) != b"200":
        return Status.NOT_GRPC, b"HTTP status " + http
    status = fields.get(b"grpc-status")
    if status is None:
        return None, b""
    return (int(status) if status.isdigit() and len(status) < 5 else Status.NOT_GRPC), fields.get(b"grpc-message", b"")


@dataclass(slots=True)
class _Upload:
    """What of a message the server's windows have not let through yet."""

    left: memoryview
    window: int


@dataclass(slots=True)
class Connection:
    """Owns the streams and windows of one connection. `receive` and `start` add to what `take` gives to be sent."""

    authority: str
    is_settled: bool = False
    """Whether the server's settings have come. Nothing may be started before."""
    is_closing: bool = False
    """Whether the server said GOAWAY, or there are no stream ids left. Nothing may be started any more."""
    goodbye: str = ""
    """What the server gave as its reason for that, unless there was none."""
    is_corked: bool = False
    """Whether the server will take no more concurrent streams for now."""
    streams: dict[int, int] = field(default_factory=dict)
    """Tokens of the calls under way, by stream."""
    _out: list[bytes | memoryview] = field(default_factory=list)
    _bodies: dict[int, bytes | bytearray] = field(default_factory=dict)
    _uploads: dict[int, _Upload] = field(default_factory=dict)
    _statuses: dict[bytes, tuple[int | None, bytes]] = field(default_factory=dict)
    _rest: bytes = b""
    _block: tuple[int, int, bytes] | None = None
    _next_stream: int = 1
    _most_streams: float = inf
    _window: int = USUAL_WINDOW
    _stream_window: int = USUAL_WINDOW
    _most_frame: int = USUAL_FRAME
    _unacknowledged: int = 0
    _first_fields: bytes = b""
    _fields: bytes = _REMEMBERED

    def __post_init__(self) -> None:
        settings = ((HEADER_TABLE_SIZE, 0), (ENABLE_PUSH, 0), (INITIAL_WINDOW_SIZE, LARGEST_WINDOW))
        self._out.append(PREFACE + frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*setting) for setting in settings)))
        self._out.append(_window_update(0, LARGEST_WINDOW - USUAL_WINDOW))
        self._first_fields = encode_fields(self.authority, INFER_PATH, remember=True)

    def __repr__(self) -> str:
        state = "closing" if self.is_closing else "settled" if self.is_settled else "new"
        return f"Connection({self.authority}, {state}, {len(self.streams)} streams, window {self._window})"

    @property
    def has_output(self) -> bool:
        return bool(self._out)

    def take(self) -> bytes:
        """Everything to be sent by now."""
        taken = b"".join(self._out)
        self._out.clear()
        return taken

    # -- calls ---------------------------------------------------------------------------------------------------------

    def start(self, token: int, body: bytes, timeout: float | None = None) -> int:
        """Send a call, `body` being its message with gRPC's prefix; its stream. Only when settled, and neither closing nor corked."""
        stream = self._next_stream
        self._next_stream = stream + 2
        block = self._first_fields or self._fields
        if self._first_fields:
            self._first_fields = b""
        if timeout is not None:
            block += encode_timeout(timeout)
        size = len(block)
        self.streams[stream] = token
        out = self._out
        out.append(_HEAD.pack(size >> 8, size & 0xFF, HEADERS, END_HEADERS, stream) + block)
        size = len(body)
        if size <= self._window and size <= self._stream_window and size <= self._most_frame and not self._uploads:
            self._window -= size
            out.append(_HEAD.pack(size >> 8, size & 0xFF, DATA, END_STREAM, stream))
            out.append(body)
        else:
            self._uploads[stream] = _Upload(memoryview(body), self._stream_window)
            self._pump()
        self._look_for_room()
        return stream

    def cancel(self, stream: int) -> None:
        """Give up a call that is under way. Nothing more is heard of it."""
        self._forget(stream)
        self._out.append(frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL)))

    def _forget(self, stream: int) -> int | None:
        token = self.streams.pop(stream, None)
        self._bodies.pop(stream, None)
        if self._uploads:
            self._uploads.pop(stream, None)
        if self.is_corked:
            self._look_for_room()
        return token

    def _look_for_room(self) -> None:
        self.is_corked = len(self.streams) >= self._most_streams
        if self._next_stream > LAST_STREAM:
            self.is_closing = True

    def _pump(self) -> None:
        """Send what the windows have room for, those that came first first."""
        for stream, upload in [*self._uploads.items()]:
            while upload.left:
                size = min(len(upload.left), upload.window, self._window, self._most_frame)
                if size <= 0:
                    break
                upload.window -= size
                self._window -= size
                is_last = size == len(upload.left)
                self._out.append(_HEAD.pack(size >> 8, size & 0xFF, DATA, END_STREAM if is_last else 0, stream))
                self._out.append(upload.left[:size])
                upload.left = upload.left[size:]
            if not upload.left:
                del self._uploads[stream]

    # -- what the server says ------------------------------------------------------------------------------------------

    def receive(self, received: bytes) -> list[Ended]:
        """The calls that ended with this. Raises ProtocolError, after which the connection is of no more use."""
        ended: list[Ended] = []
        data = self._rest + received if self._rest else received
        at, end = 0, len(data)
        unpack, streams, bodies, statuses = _HEAD.unpack_from, self.streams, self._bodies, self._statuses
        while end - at >= 9:
            high, low, kind, flags, stream = unpack(data, at)
            size = high << 8 | low
            start, after = at + 9, at + 9 + size
            if size > USUAL_FRAME:
                raise ProtocolError(f"expected frames of at most {USUAL_FRAME} bytes, got one of {size}")
            if after > end:
                break
            at = after
            if self._block is not None and kind != CONTINUATION:
                raise ProtocolError(f"expected the rest of a header block, got a frame of type {kind}")
            if kind == HEADERS and flags & (END_HEADERS | PADDED | PRIORITY) == END_HEADERS:
                block = data[start:after]
                read = statuses[block] if block in statuses else self._read_block(block)
                if stream in streams:
                    self._take_headers(ended, stream, read, flags)
            elif kind == DATA and not flags & PADDED:
                self._unacknowledged += size
                if stream in streams:
                    body = bodies.get(stream)
                    if body is None:
                        bodies[stream] = data[start:after]
                    elif isinstance(body, bytearray):
                        body += data[start:after]
                    else:
                        bodies[stream] = bytearray(body) + data[start:after]
                    if flags & END_STREAM:  # no trailers, so no status either
                        self._end(ended, stream, Status.NOT_GRPC)
            else:
                self._take_other(ended, kind, flags, stream & LARGEST_WINDOW, data[start:after])
        self._rest = data[at:] if at < end else b""
        if self._unacknowledged > 2**30:
            self._out.append(_window_update(0, self._unacknowledged))
            self._unacknowledged = 0
        return ended

    def _read_block(self, block: bytes) -> tuple[int | None, bytes]:
        status = decode_status(block)
        if len(self._statuses) < REMEMBERED:
            self._statuses[block] = status
        return status

    def _take_headers(self, ended: list[Ended], stream: int, read: tuple[int | None, bytes], flags: int) -> None:
        status, text = read
        # 1. The last headers, which have the status. 2. The first ones of a good response. 3. Those of no gRPC server.
        if flags & END_STREAM:
            self._end(ended, stream, Status.NOT_GRPC if status is None else status, text)
        elif status is not None:
            self._end(ended, stream, Status.NOT_GRPC, text)

    def _end(self, ended: list[Ended], stream: int, status: int, text: bytes = b"") -> None:
        body = text if status else self._bodies.get(stream, b"")
        is_unfinished = stream in self._uploads
        token = self._forget(stream)
        if is_unfinished:
            self._out.append(frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL)))
        if token is not None:
            ended.append((token, status, bytes(body)))

    def _take_other(self, ended: list[Ended], kind: int, flags: int, stream: int, payload: bytes) -> None:
        """The frames that are rare, or written in a rare way."""
        size = len(payload)  # of data counts with its padding
        if kind in (HEADERS, DATA) and flags & PADDED:
            if not payload or payload[0] >= len(payload):
                raise ProtocolError(f"expected less padding than the frame's {len(payload)} bytes")
            payload = payload[1 : len(payload) - payload[0]]
        match kind:
            case 0x0:
                self._unacknowledged += size
                if stream in self.streams:
                    self._bodies[stream] = bytes(self._bodies.get(stream, b"")) + payload
                    if flags & END_STREAM:
                        self._end(ended, stream, Status.NOT_GRPC)
            case 0x1:
                self._continue_block(ended, stream, flags, payload[5:] if flags & PRIORITY else payload)
            case 0x9:
                if self._block is None or self._block[0] != stream:
                    raise ProtocolError(f"stream {stream}: expected headers before their continuation")
                self._continue_block(ended, stream, flags, payload)
            case 0x3:
                self._end(ended, stream, Status.RESET)
            case 0x4:
                if not flags & ACK:
                    self._take_settings(payload)
                    self._out.append(frame(SETTINGS, ACK, 0))
            case 0x5:
                raise ProtocolError("got a PUSH_PROMISE, expected none because it is disabled")
            case 0x6:
                if not flags & ACK:
                    self._out.append(frame(PING, ACK, 0, payload))
            case 0x7:
                self.is_closing = True
                last, code = struct.unpack_from(">II", payload)
                if code:
                    self.goodbye = f"GOAWAY with error {code} {payload[8:].decode(errors='replace')}".strip()
                for above in [each for each in self.streams if each > last & LARGEST_WINDOW]:
                    self._end(ended, above, Status.LOST)
            case 0x8:
                (more,) = struct.unpack_from(">I", payload)
                if not stream:
                    self._window += more & LARGEST_WINDOW
                elif stream in self._uploads:
                    self._uploads[stream].window += more & LARGEST_WINDOW
                if self._uploads:
                    self._pump()

    def _continue_block(self, ended: list[Ended], stream: int, flags: int, part: bytes) -> None:
        _, first_flags, block = self._block or (stream, flags, b"")
        if not flags & END_HEADERS:
            self._block = (stream, first_flags, block + part)
            return
        self._block = None
        read = self._read_block(block + part)
        if stream in self.streams:
            self._take_headers(ended, stream, read, first_flags)

    def _take_settings(self, payload: bytes) -> None:
        self.is_settled = True
        for key, value in _SETTING.iter_unpack(payload):
            if key == HEADER_TABLE_SIZE and value < USUAL_TABLE:
                self._fields = encode_fields(self.authority, INFER_PATH, remember=False)
                self._first_fields = b"\x20" + self._fields  # RFC 7541, 4.2: a smaller table is to be confirmed
            elif key == MAX_CONCURRENT_STREAMS:
                self._most_streams = value
                self._look_for_room()
            elif key == INITIAL_WINDOW_SIZE:
                for upload in self._uploads.values():
                    upload.window += value - self._stream_window
                self._stream_window = value
                self._pump()
            elif key == MAX_FRAME_SIZE:
                self._most_frame = value


def _window_update(stream: int, more: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", more))
