from __future__ import annotations

import io
import os
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from captured_requests import plain
from headrace.capture.records import OVERHEAD, Captured, CaptureError, encode_header, encode_record, read_records


def read(data: bytes) -> tuple[list[Captured], list[str]]:
    cuts: list[str] = []
    return list(read_records(io.BytesIO(data), "file", cuts.append)), cuts


def test_requests_come_out_as_they_went_in() -> None:
    redacted = replace(plain(3, id="b"), inputs=(replace(plain().inputs[0], data=None),))
    given = [plain(id="a", at=12.5), redacted]
    found, cuts = read(encode_header(1.0) + b"".join(map(encode_record, given)))
    assert (found, cuts) == (given, [])
    assert found[1].redacted_inputs == ("x",)
    np.testing.assert_array_equal(found[0].inputs[0].array(), np.arange(6, dtype=np.float32).reshape(2, 3))
    assert found[0].inputs[1].array().tolist() == [[b"a"], [b"a"]]
    assert found[1].inputs[0].array() is None


def test_a_file_that_was_cut_off_anywhere_is_read_up_to_the_cut() -> None:
    header, records = encode_header(1.0), [encode_record(plain(id=str(number))) for number in range(3)]
    whole = header + b"".join(records)
    for size in range(len(whole)):
        found, cuts = read(whole[:size])
        ends = [len(header) + sum(map(len, records[: n + 1])) for n in range(3)]
        assert [each.id for each in found] == [str(n) for n, end in enumerate(ends) if end <= size]
        is_whole = size in (len(header), *ends)
        assert len(cuts) == (not is_whole), f"{size}: {cuts}"


def test_a_damaged_record_ends_the_file_and_is_said() -> None:
    records = [encode_record(plain(id=str(number))) for number in range(3)]
    broken = bytearray(records[1])
    broken[-5] ^= 1
    found, (cut,) = read(encode_header(1.0) + records[0] + bytes(broken) + records[2])
    assert [each.id for each in found] == ["0"]
    assert "expected a record of another checksum" in cut


def test_zeros_behind_the_last_record_as_a_power_cut_leaves_them_are_a_cut() -> None:
    found, cuts = read(encode_header(1.0) + encode_record(plain()) + bytes(4096))
    assert (len(found), len(cuts)) == (1, 1)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"PK\x03\x04 a zip", "expected a capture, a map with format"),
        (b"\xc1\xc1", "no msgpack"),
        (msgpack.packb({"format": "headrace.capture", "version": 2}), "expected version 1, got 2: it is of a newer Headrace"),
        (msgpack.packb({"format": "headrace.drift", "version": 1}), "format 'headrace.capture'"),
    ],
)
def test_what_is_no_capture_is_refused(data: bytes, text: str) -> None:
    with pytest.raises(CaptureError, match=text):
        read(data)


def test_a_tensor_whose_content_does_not_fit_its_shape_is_refused_where_it_is_used() -> None:
    tensor = replace(plain().inputs[0], shape=(5, 5))
    with pytest.raises(CaptureError, match=r"tensor 'x': expected FP32 of shape \[5, 5\]"):
        tensor.array()


def test_a_record_takes_little_more_than_its_tensors() -> None:
    data = os.urandom(100_000)
    tensor = replace(plain().inputs[0], shape=(1, 25_000), data=data)
    assert len(encode_record(replace(plain(), inputs=(tensor,), outputs=()))) < len(data) + 200 + OVERHEAD
