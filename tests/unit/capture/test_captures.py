from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from headrace.batching.observer import RanBatch
from headrace.capture import captures as module
from headrace.capture.captures import Captures, VersionCapture
from headrace.capture.reading import read_capture
from headrace.capture.ring import Ring
from headrace.config import CaptureConfig
from ran_batches import model, ran


def make(directory: Path, **options: float) -> Captures:
    return Captures(directory, **{"fraction": 1.0, "per_second": 1e9, "max_bytes": 1 << 20, **options})  # type: ignore[arg-type]


def attach(captures: Captures) -> VersionCapture:
    made = captures.attach(1, model())
    assert made is not None
    return made


def test_all_that_is_pending_is_written_when_it_stops(tmp_path: Path) -> None:
    captures = make(tmp_path)
    captures.start()
    version = attach(captures)
    scores = np.random.default_rng(0).random((6, 3)).astype(np.float32)
    version.look(ran(scores, ["a", "b", "c"], [1, 2, 3]))
    version.close()
    captures.stop()
    found = list(read_capture(tmp_path))
    assert [(each.id, each.rows) for each in found] == [("a", 1), ("b", 2), ("c", 3)]
    np.testing.assert_array_equal(np.concatenate([each.outputs[0].array() for each in found]), scores)
    assert version.counts.captured == 3
    assert captures.versions == ()


def test_memory_of_what_waits_for_the_disk_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PENDING", 500)
    captures = make(tmp_path)  # not started: a disk that takes nothing
    version = attach(captures)
    for number in range(100):
        version.look(ran(np.zeros((1, 3)), [str(number)]))
    assert captures._pending_bytes <= 500
    assert version.counts.skipped["memory"] + len(captures._pending) == 100
    captures.start()
    captures.stop()
    assert version.counts.captured == len(list(read_capture(tmp_path))) > 0
    assert captures._pending_bytes == 0


def test_a_request_of_more_than_half_the_ring_is_left_out(tmp_path: Path) -> None:
    captures = make(tmp_path, max_bytes=1 << 16)
    captures.start()
    version = attach(captures)
    version.look(ran(np.zeros((5000, 3)), ["large"], [5000]))
    version.look(ran(np.zeros((1, 3)), ["small"]))
    captures.stop()
    assert [each.id for each in read_capture(tmp_path)] == ["small"]
    assert version.counts.skipped["too_large"] == 1


def test_a_disk_that_fails_is_counted_said_once_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    captures, write = make(tmp_path), Ring.append
    version = attach(captures)

    def full(ring: Ring, record: bytes) -> None:
        raise OSError(28, "No space left on device")

    ring = Ring(tmp_path, 1 << 20)
    monkeypatch.setattr(Ring, "append", full)
    for number in range(3):
        version.look(ran(np.zeros((1, 3)), [str(number)]))
        captures._write_pending(ring)
    monkeypatch.setattr(Ring, "append", write)
    version.look(ran(np.zeros((1, 3)), ["3"]))
    captures._write_pending(ring)
    ring.close()
    assert (captures.errors, version.counts.skipped["error"], version.counts.captured) == (3, 3, 1)
    assert [each.id for each in read_capture(tmp_path)] == ["3"]
    assert [record.levelname for record in caplog.records].count("ERROR") == 1


def test_what_goes_wrong_ends_capture_and_no_request(tmp_path: Path) -> None:
    captures = make(tmp_path)
    version = attach(captures)
    broken = ran(np.zeros((1, 3)), ["a"])
    for batch in (broken._replace(outputs=["scores", "more"]), broken):
        version.look(RanBatch(*batch))
    assert len(captures._pending) == 0


def test_redacted_inputs_are_not_even_kept(tmp_path: Path) -> None:
    captures = make(tmp_path)
    version = captures.attach(1, model(capture=CaptureConfig(redact=("x",))))
    assert version is not None
    version.look(ran(np.zeros((1, 3)), ["a"]))
    (pending,) = captures._pending
    assert pending.inputs[0] is not None
    assert pending.inputs[0].data == b""
    assert captures.attach(2, model(capture=CaptureConfig(enabled=False))) is None
