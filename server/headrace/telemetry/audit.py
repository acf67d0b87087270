"""The audit log: one JSON line for everything that changes which model answers, appended to a file, never rewritten."""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headrace.errors import ConfigError
from headrace.lifecycle.events import SERVER, Event
from headrace.lifecycle.policy import Key
from headrace.telemetry.log import get_logger

log = get_logger(__name__)


class AuditLog:
    """Owns the file and the thread that writes it: each line is on disk before the next, and no event waits for a disk.

    Raises ConfigError when the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("ab", buffering=0)
            if path.stat().st_size and not _ends_a_line(path):
                self._file.write(b"\n")  # a crash cut the last line off; the next one is not to be lost with it
        except OSError as error:
            raise ConfigError(f"audit_log: {path}: {error.strerror}") from None
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="audit-log", daemon=True)
        self._thread.start()

    def record(self, event: Event) -> None:
        self._lines.put(encode_event(event))

    def stop(self) -> None:
        """Write what is pending and close. Blocks."""
        self._lines.put(None)
        self._thread.join()
        self._file.close()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._file.write(line)
                os.fsync(self._file.fileno())
            except OSError as error:
                log.error("audit log not written", reason=error.strerror, line=line.decode())


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def encode_event(event: Event) -> bytes:
    table: dict[str, Any] = {"at": datetime.fromtimestamp(event.at, UTC).isoformat(timespec="milliseconds"), "event": event.kind}
    table |= {"model": event.model, "version": event.version, "who": event.who, "reason": event.reason, **event.fields}
    # Half a surrogate pair, from a file's name say, becomes JSON's own way to write one.
    return (json.dumps(table, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


@dataclass(slots=True)
class Remembered:
    """What earlier runs of the server leave to this one: versions that were rolled back, with the reason, and operators' labels."""

    blocked: dict[Key, str] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)


def read_audit(path: Path) -> Mapping[str, Remembered]:
    """By model. A line that cannot be read, such as one that a crash cut off, is passed over and logged. Blocking."""
    models: dict[str, Remembered] = {}
    if not path.exists():
        return models
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            table = json.loads(line)
            _apply(models.setdefault(str(table["model"]), Remembered()), table)
        except (ValueError, KeyError, TypeError, AttributeError):
            log.warning("audit line not readable", path=str(path), line=number)
    return models


def _apply(model: Remembered, table: Mapping[str, Any]) -> None:
    version = int(table["version"])
    if table["event"] == "rolled_back":
        model.blocked[Key(version, str(table["token"]))] = str(table["reason"])
    elif table["event"] == "taken_up":
        model.blocked = {key: reason for key, reason in model.blocked.items() if key.number != version}
    elif table["event"] == "label" and table["who"] != SERVER:
        model.labels.pop(str(table["label"]), None)
        if version:
            model.labels[str(table["label"])] = version
