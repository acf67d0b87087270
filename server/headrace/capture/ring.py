"""A directory of capture files that together stay below a size: the oldest goes when there is no room. Blocking."""

from __future__ import annotations

import fcntl
import os
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from headrace.capture.reading import PATTERN
from headrace.capture.records import encode_header
from headrace.errors import ConfigError

FILES = 8
"""Parts of the ring: what is lost at a time when it goes round is one of them."""
LOCK = "capture.lock"


class Ring:
    """Owns the files of its directory, and the one of them that is being written. For one thread.

    Files of earlier runs are part of it. Each file is for its owner alone (0600), and so is the directory where it is made here.
    Raises ConfigError for a directory that cannot be used, or that another server uses.
    """

    def __init__(self, directory: Path, max_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._clock = clock
        self._file = -1
        self._header = len(encode_header(0.0))
        self._files: deque[tuple[Path, int]] = deque()
        """Oldest first, with their sizes; the last one is written where `_file` is open."""
        self.size = 0
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"capture: {directory}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in sorted(directory.glob(PATTERN)):
                self._files.append((path, path.stat().st_size))
                self.size += self._files[-1][1]
            self._make_room(0)
        except BlockingIOError:
            os.close(self._lock)
            raise ConfigError(f"capture: {directory}: another server captures there; expected a directory of its own") from None
        except OSError as error:
            os.close(self._lock)
            raise ConfigError(f"capture: {directory}: {error.strerror}") from None

    def __repr__(self) -> str:
        return f"Ring({self._directory}, {len(self._files)} files, {self.size} of {self._max_bytes} bytes)"

    @property
    def largest_record(self) -> int:
        """Bytes of a record that is still taken: two of them fit."""
        return self._max_bytes // 2 - len(encode_header(0.0))

    def append(self, record: bytes) -> None:
        """Write a record of at most `largest_record` bytes, whole or not at all. Raises OSError."""
        if self._file >= 0 and self._files[-1][1] + len(record) > self._max_bytes // FILES:
            self._end_file()
        if self._file < 0:
            header = encode_header(self._clock())
            self._make_room(len(header) + len(record))
            self._begin_file()
            self._write(header)
        else:
            self._make_room(len(record))
        self._write(record)

    def close(self) -> None:
        self._end_file()
        os.close(self._lock)

    def _begin_file(self) -> None:
        # Numbered, because clocks are set back and the order of the names is that of the requests.
        number = 1 + (int(self._files[-1][0].name[8:16]) if self._files else 0)
        path = self._directory / f"capture-{number:08}-{datetime.fromtimestamp(self._clock(), UTC):%Y%m%dT%H%M%SZ}.msgpack"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._files.append((path, 0))

    def _end_file(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def _write(self, data: bytes) -> None:
        """What a full disk has cut off is taken back: what comes behind half a record could not be read."""
        path, size = self._files[-1]
        try:
            written = 0
            while written < len(data):
                written += os.write(self._file, memoryview(data)[written:])
        except OSError:
            try:
                os.ftruncate(self._file, size)
            finally:
                self._end_file()
                if size <= self._header:
                    # Not one without a record for each that fails.
                    self._files.pop()
                    self.size -= size
                    path.unlink(missing_ok=True)
            raise
        self._files[-1] = (path, size + len(data))
        self.size += len(data)

    def _make_room(self, wanted: int) -> None:
        """Never the file that is being written: no record is that large. One that was deleted by hand makes room as well."""
        while self.size + wanted > self._max_bytes and len(self._files) > (self._file >= 0):
            path, size = self._files[0]
            path.unlink(missing_ok=True)
            self._files.popleft()
            self.size -= size
