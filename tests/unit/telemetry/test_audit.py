from __future__ import annotations

import json
from pathlib import Path

import pytest
from headrace.errors import ConfigError
from headrace.lifecycle.events import EventLog
from headrace.lifecycle.policy import Key
from headrace.telemetry import audit as module
from headrace.telemetry.audit import AuditLog, read_audit
from structlog.testing import CapturingLogger


def written(path: Path, *events: tuple[str, str, int, dict[str, str]], who: str = "server") -> None:
    log, audit = EventLog(lambda: 0.0), AuditLog(path)
    log.subscribe(audit.record)
    for kind, model, version, fields in events:
        log.record(kind, model, version, who=who, reason="why", fields=fields)
    audit.stop()


def test_each_event_is_a_line_with_who_and_why_and_earlier_lines_stay(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    written(path, ("live", "m", 1, {"token": "a"}))
    written(path, ("promoted", "m", 2, {}), who="anna")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {
            "at": "1970-01-01T00:00:00.000+00:00",
            "event": "live",
            "model": "m",
            "version": 1,
            "who": "server",
            "reason": "why",
            "token": "a",
        },
        {"at": "1970-01-01T00:00:00.000+00:00", "event": "promoted", "model": "m", "version": 2, "who": "anna", "reason": "why"},
    ]


def test_a_server_that_starts_again_knows_what_was_rolled_back_and_where_operators_moved_labels(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    written(
        path,
        ("rolled_back", "m", 2, {"token": "a"}),
        ("rolled_back", "m", 3, {"token": "b"}),
        ("taken_up", "m", 3, {}),
        ("label", "m", 1, {"label": "configured", "from": "0"}),
    )
    written(
        path, ("label", "m", 1, {"label": "stable"}), ("label", "m", 2, {"label": "gone"}), ("label", "m", 0, {"label": "gone"}), who="anna"
    )
    found = read_audit(path)["m"]
    assert found.blocked == {Key(2, "a"): "why"}
    assert found.labels == {"stable": 1}


def test_a_line_that_a_crash_cut_off_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = CapturingLogger()
    monkeypatch.setattr(module, "log", log)
    path = tmp_path / "audit.jsonl"
    written(path, ("rolled_back", "m", 2, {"token": "a"}))
    with path.open("a") as file:
        file.write('{"event": "rolled_b')
    written(path, ("rolled_back", "m", 4, {"token": "c"}))
    assert read_audit(path)["m"].blocked == {Key(2, "a"): "why", Key(4, "c"): "why"}
    assert [(call.args[0], call.kwargs["line"]) for call in log.calls] == [("audit line not readable", 2)]
    assert read_audit(tmp_path / "none") == {}


def test_a_file_that_cannot_be_written_is_a_mistake_in_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"audit_log: .*: No such file or directory"):
        AuditLog(tmp_path / "nowhere" / "audit.jsonl")
