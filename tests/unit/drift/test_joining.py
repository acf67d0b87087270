from __future__ import annotations

import mmap

import numpy as np
import pytest
from headrace.batching.assemble import as_array
from headrace.drift.features import Side
from headrace.drift.joining import Kept, is_borrowed, join
from headrace.requests import InputTensor
from headrace.signature import DataType, TensorSpec

SPEC = TensorSpec("x", DataType.FP32, (-1, 2))


def arrived(data: bytes | memoryview) -> np.ndarray:
    return as_array(SPEC, InputTensor("x", "FP32", (2, 2), data))


@pytest.mark.parametrize("data", [bytes(16), memoryview(bytes(16))])
def test_what_lies_in_a_received_message_is_nobody_elses(data: bytes | memoryview) -> None:
    assert not is_borrowed(arrived(data))
    assert not is_borrowed(np.concatenate([arrived(data)] * 2))


def test_what_lies_in_shared_memory_is_its_clients() -> None:
    with mmap.mmap(-1, 16) as region:
        array = arrived(memoryview(region).toreadonly())
        assert is_borrowed(array)
        assert is_borrowed(array[:1])
        assert not is_borrowed(array.copy())
        del array


def test_requests_of_a_model_without_rows_are_joined_only_where_they_are_of_one_shape() -> None:
    kept = [Kept(((),), 1, {"x": np.zeros(size, np.float32)}, ["y"], [np.zeros(1, np.float32)]) for size in (3, 5, 3)]
    found = join(kept, frozenset({(Side.INPUT, "x"), (Side.OUTPUT, "y")}), has_rows=False)
    assert sorted((inputs["x"].shape, rows) for inputs, _, rows in found) == [((1, 5), 1), ((2, 3), 2)]


def test_requests_whose_input_stayed_on_its_device_are_not_joined_with_those_that_have_it() -> None:
    kept = [Kept(((),), 1, inputs, ["y"], [np.zeros((1, 2), np.float32)]) for inputs in ({}, {"x": np.zeros((1, 2), np.float32)}, {})]
    found = join(kept, frozenset({(Side.INPUT, "x"), (Side.OUTPUT, "y")}), has_rows=True)
    assert sorted((list(inputs), rows) for inputs, _, rows in found) == [([], 2), (["x"], 1)]
