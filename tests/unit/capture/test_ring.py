from __future__ import annotations

import os
import random
import resource
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from captured_requests import plain
from headrace.capture.reading import capture_files, list_contents, read_arrays, read_capture
from headrace.capture.records import CaptureError, encode_record
from headrace.capture.ring import FILES, Ring
from headrace.errors import ConfigError

MOST = 64 * 1024


def on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("capture-*.msgpack"))


def ids(directory: Path) -> list[int]:
    return [int(captured.id) for captured in read_capture(directory)]


def test_the_ring_keeps_the_latest_and_never_exceeds_its_size(tmp_path: Path) -> None:
    ring, random_ = Ring(tmp_path, MOST), random.Random(3)
    for number in range(2000):
        ring.append(encode_record(plain(random_.choice((1, 2, 50)), id=str(number))))
        assert ring.size == on_disk(tmp_path) <= MOST
    ring.close()
    found = ids(tmp_path)
    assert found == list(range(found[0], 2000))
    assert ring.size > MOST * (1 - 2 / FILES)


def test_a_record_of_almost_half_the_ring_is_taken(tmp_path: Path) -> None:
    ring = Ring(tmp_path, MOST)
    large = encode_record(plain(1, id="1")) + bytes(ring.largest_record)
    for _ in range(5):
        ring.append(large[: ring.largest_record])
        assert ring.size == on_disk(tmp_path) <= MOST
    ring.close()


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    ring = Ring(tmp_path / "a" / "b", MOST)
    ring.append(encode_record(plain(id="1")))
    ring.close()
    (file,) = capture_files(tmp_path / "a" / "b")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_server_that_is_started_again_goes_on_with_the_ring(tmp_path: Path) -> None:
    clocks = iter([2e9] * 100 + [1e9] * 100)  # set back meanwhile
    for run in range(3):
        ring = Ring(tmp_path, MOST, lambda: next(clocks))
        for number in range(20):
            ring.append(encode_record(plain(id=str(run * 20 + number))))
        ring.close()
    assert ids(tmp_path) == list(range(60))
    smaller = Ring(tmp_path, 4096)
    assert on_disk(tmp_path) == smaller.size <= 4096
    smaller.close()


def test_two_servers_do_not_share_a_directory(tmp_path: Path) -> None:
    ring = Ring(tmp_path, MOST)
    with pytest.raises(ConfigError, match="another server captures there"):
        Ring(tmp_path, MOST)
    ring.close()
    Ring(tmp_path, MOST).close()


def test_a_place_that_cannot_be_a_directory_is_an_error_of_configuration(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file: File exists"):
        Ring(tmp_path / "file", MOST)


@contextmanager
def nearly_full_disk() -> Iterator[None]:
    """As far as this process knows: a write beyond 3,000 bytes of one file fails half way. For no longer than it must be: the tests'
    own output may go into a larger file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_what_a_full_disk_cuts_off_is_taken_back(tmp_path: Path) -> None:
    ring = Ring(tmp_path, 1 << 20)
    written, failed = [], 0
    with nearly_full_disk():
        for number in range(40):
            try:
                ring.append(encode_record(plain(3, id=str(number))))
                written.append(number)
            except OSError:
                failed += 1
    assert failed > 0
    assert ring.size == on_disk(tmp_path)
    ring.close()
    contents = list_contents(tmp_path)
    assert contents.cuts == []
    assert ids(tmp_path) == written


def test_arrays_of_one_model_and_version(tmp_path: Path) -> None:
    ring = Ring(tmp_path, MOST)
    for model, version in (("m", 1), ("m", 2), ("other", 1)):
        ring.append(encode_record(plain(2, model=model, version=version)))
    ring.close()
    assert list_contents(tmp_path).requests == {("m", 1): 1, ("m", 2): 1, ("other", 1): 1}
    assert len(list(read_arrays(tmp_path, "m"))) == 2
    ((inputs, outputs, rows),) = read_arrays(tmp_path, "m", 2)
    assert (sorted(inputs), sorted(outputs), rows) == (["name", "x"], ["label", "y"], 2)
    assert outputs["label"].tolist() == [0, 1]


def test_a_directory_without_captures_says_what_was_expected(tmp_path: Path) -> None:
    for path, text in ((tmp_path, "nothing was captured yet"), (tmp_path / "none", "found nothing")):
        with pytest.raises(CaptureError, match=text):
            list_contents(path)
    assert os.listdir(tmp_path) == []
