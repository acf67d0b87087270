"""gather and screen in numpy against plain loops."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from headrace_kernels.gather import cast, gather, row_table
from headrace_kernels.screen import RECORD, screen
from hypothesis import given
from hypothesis import strategies as st

FP32 = st.floats(width=32)


@given(st.lists(FP32, min_size=1, max_size=30))
def test_float16_is_the_nearest_of_all_of_them_ties_to_even(values: list[float]) -> None:
    result = cast(np.array(values, np.float32), "float32", "float16")
    for value, rounded in zip(values, result, strict=True):
        if math.isnan(value):
            assert math.isnan(rounded)
        elif abs(value) >= 65520:
            assert rounded == math.copysign(math.inf, value)
        else:
            assert rounded == struct.unpack("e", struct.pack("e", value))[0]


@given(st.lists(FP32, min_size=1, max_size=30))
def test_bfloat16_is_the_nearest_of_its_two_neighbours_ties_to_even(values: list[float]) -> None:
    result = cast(np.array(values, np.float32), "float32", "bfloat16")
    for value, bits in zip(values, result.tolist(), strict=True):
        if math.isnan(value):
            assert bits & 0x7F80 == 0x7F80
            assert bits & 0x7F
            continue
        below = int(np.float32(value).view(np.uint32)) >> 16
        # In fp64, where the step beyond the largest number is a number as well: it stands for infinity.
        low, high = (_bfloat_as_if_endless(one) for one in (below, below + 1))
        distances = abs(value - low), abs(high - value)
        if math.isinf(value):
            expected = below
        elif distances[0] == distances[1]:
            expected = below + (below & 1)
        else:
            expected = below if distances[0] < distances[1] else below + 1
        assert bits == expected


def _bfloat_as_if_endless(bits: int) -> float:
    exponent, fraction = bits >> 7 & 255, bits & 127
    size = math.ldexp(fraction + (128 if exponent else 0), max(exponent, 1) - 134)
    return -size if bits & 0x8000 else size


@given(st.lists(FP32 | st.sampled_from([2.0**31, -(2.0**31), 2.0**63, -(2.0**63), 255.0, 255.5, -0.5]), min_size=1, max_size=30))
@pytest.mark.parametrize("target", ["int32", "int64", "uint8"])
def test_floats_become_integers_cut_and_saturated(target: str, values: list[float]) -> None:
    limits = np.iinfo(target)
    result = cast(np.array(values, np.float32), "float32", target).tolist()
    for value, integer in zip(values, result, strict=True):
        if math.isnan(value):
            assert integer == 0
        else:
            cut = math.trunc(value) if math.isfinite(value) else math.copysign(2.0**80, value)
            assert integer == min(max(cut, limits.min), limits.max)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
def test_integers_wrap(values: list[int]) -> None:
    array = np.array(values, np.int64)
    assert cast(array, "int64", "uint8").tolist() == [value % 256 for value in values]
    assert cast(array, "int64", "int32").tolist() == [(value + 2**31) % 2**32 - 2**31 for value in values]


def test_bfloat16_bits_become_numbers() -> None:
    bits = np.array([0x3F80, 0xBF80, 0x7F80, 0x0001], np.uint16)
    assert cast(bits, "bfloat16", "float32").tolist() == [1.0, -1.0, math.inf, 2.0**-133]


@given(st.data())
def test_ragged_rows_against_a_loop(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=len(counts), max_size=len(counts)))
    width, spare, pad = data.draw(st.integers(1, 7)), data.draw(st.integers(0, 3)), data.draw(st.integers(-5, 5))
    slab = np.arange(64, dtype=np.int32)
    offsets, end = [], 1
    for count, length in zip(counts, lengths, strict=True):
        offsets.append(end * 4)
        end += count * length
    table = row_table(offsets, counts, lengths, 4, sum(counts) + spare)
    rows = []
    for offset, count, length in zip(offsets, counts, lengths, strict=True):
        for row in range(count):
            start = offset // 4 + row * length
            rows.append(slab[start : start + length].tolist())
    rows += [rows[0]] * spare
    batch, mask = gather(slab.view(np.uint8), table, width, "int32", "int64", pad)
    assert batch.tolist() == [(row + [pad] * width)[:width] for row in rows]
    assert mask.tolist() == [([1] * len(row) + [0] * width)[:width] for row in rows]


def test_a_batch_is_that_of_the_server() -> None:
    """Padding rows are row 0 of the batch, as batching/assemble.gather has them."""
    requests = [np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(3, dtype=np.float32).reshape(1, 3) + 9]
    slab = np.concatenate([one.reshape(-1).view(np.uint8) for one in requests])
    batch, _ = gather(slab, row_table([0, 24], [2, 1], 3, 4, 5), 3, "float32", "float32")
    assert batch.tolist() == [[0, 1, 2], [3, 4, 5], [9, 10, 11], [0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("counts", [[], [0], [3, 3]])
def test_a_row_table_wants_at_least_one_row_and_no_more_than_fit(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="expected 1 to 5 rows"):
        row_table([0] * len(counts), counts, 3, 4, 5)


@given(st.data())
def test_screen_against_a_loop(data: st.DataObject) -> None:
    rows, features, requests = (data.draw(st.integers(1, 5)) for _ in range(3))
    values = np.array(data.draw(st.lists(FP32, min_size=rows * features, max_size=rows * features)), np.float32).reshape(rows, features)
    owners = np.array(data.draw(st.lists(st.integers(-1, requests - 1), min_size=rows, max_size=rows)), np.int32)
    by_feature, by_request = screen(values, owners, requests)
    for feature in range(features):
        same_as_loop(by_feature[feature], [values[row, feature] for row in range(rows) if owners[row] >= 0])
    for request in range(requests):
        same_as_loop(by_request[request], [values[row, i] for row in range(rows) if owners[row] == request for i in range(features)])


def same_as_loop(record: np.void, values: list[np.float32]) -> None:
    finite = [float(value) for value in values if math.isfinite(value)]
    assert record["finite"] == len(finite)
    assert record["nonfinite"] == len(values) - len(finite)
    assert record["minimum"] == min(finite, default=math.inf)
    assert record["maximum"] == max(finite, default=-math.inf)
    size = math.fsum(abs(value) for value in finite)
    assert abs(record["sum"] - math.fsum(finite)) <= len(finite) * 2.0**-53 * size
    assert record["squares"] == pytest.approx(math.fsum(value * value for value in finite), rel=1e-14)


def test_a_record_is_as_the_kernel_writes_it() -> None:
    assert RECORD.itemsize == 32
    assert [RECORD.fields[name][1] for name in RECORD.names] == [0, 8, 16, 20, 24, 28]  # type: ignore[index, union-attr]
