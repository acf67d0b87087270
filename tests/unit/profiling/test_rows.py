from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from headrace.config import ModelConfig, TensorConfig
from headrace.errors import ConfigError
from headrace.profiling.rows import to_classes, to_inputs
from headrace.signature import DataType, Signature, TensorSpec
from numpy.testing import assert_array_equal

TEXTS = np.array(["1", "2.5", ""], object)


def signature(*specs: tuple[str, DataType, tuple[int, ...]]) -> Signature:
    return Signature("m", tuple([TensorSpec(*spec) for spec in specs]), (TensorSpec("y", DataType.FP32, (-1,)),), max_batch_size=8)


def inputs(chunk: dict[str, Any], *specs: tuple[str, DataType, tuple[int, ...]], **options: Any) -> dict[str, Any]:
    arrays = {name: np.asarray(values) for name, values in chunk.items()}
    return to_inputs(arrays, signature(*specs), options.pop("config", ModelConfig("m")), **options)


PAIR = ("x", DataType.FP32, (-1, 2))


@pytest.mark.parametrize(
    "chunk",
    [
        {"x": [[1, 2], [3, 4]]},
        {"x.0": [1, 3], "x.1": [2, 4]},
        {"age": [1, 3], "fare": [2, 4]},
        {"whatever": [[1, 2], [3, 4]]},
        {"a": [1, 3], "b": [2, 4]},
    ],
)
def test_an_input_is_found_by_its_name_its_columns_or_as_what_is_left(chunk: dict[str, Any]) -> None:
    config = ModelConfig("m", inputs=(TensorConfig("x", columns=("age", "fare")),))
    found = inputs({**chunk, "class": [0, 1]}, PAIR, config=config, label="class")["x"]
    assert found.dtype == np.float32
    assert_array_equal(found, [[1, 2], [3, 4]])


def test_what_is_not_there_is_said_with_what_would_do_and_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"input 'x' FP32 .*: expected 'x' or 'x.0' to 'x.1', or 2 columns .* got a, b, c"):
        inputs({"a": [1], "b": [1], "c": [1]}, PAIR)


def test_text_becomes_numbers_and_an_empty_cell_a_missing_value() -> None:
    assert_array_equal(inputs({"x": TEXTS}, ("x", DataType.FP64, (-1,)))["x"], [1, 2.5, np.nan])


@pytest.mark.parametrize(
    ("datatype", "values", "reason"),
    [
        (DataType.FP32, np.array(["1", "two"], object), "'x', row 101: expected a number, got 'two'"),
        (DataType.INT8, [1, 300], "'x', row 101: expected INT8, got 300"),
        (DataType.INT32, [1, 2.5], "'x', row 101: expected INT32, got 2.5"),
        (DataType.INT64, [0.0, np.nan], "'x', row 101: expected INT64, got nan"),
        (DataType.BOOL, np.array(["true", "maybe"], object), "'x', row 101: expected true or false, got 'maybe'"),
    ],
)
def test_a_value_that_the_type_cannot_hold_is_named_with_its_row(datatype: DataType, values: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        inputs({"x": values}, ("x", datatype, (-1,)), first=100)


def test_every_kind_of_value_arrives_as_the_backend_takes_it() -> None:
    chunk = {"flag": np.array(["true", "0"], object), "word": np.array(["a", "ü"], object), "half": [1.0, 3.140625], "big": [2**63, 1]}
    specs = (
        ("flag", DataType.BOOL, (-1,)),
        ("word", DataType.BYTES, (-1,)),
        ("half", DataType.BF16, (-1,)),
        ("big", DataType.UINT64, (-1,)),
    )
    found = to_inputs({name: np.asarray(values) for name, values in chunk.items()}, signature(*specs), ModelConfig("m"))
    assert_array_equal(found["flag"], [True, False])
    assert found["word"].tolist() == [b"a", "ü".encode()]
    assert found["half"].tolist() == [0x3F80, 0x4049]  # 1 and 3.140625, whose patterns are theirs without rounding
    assert found["big"].tolist() == [2**63, 1]


def test_rows_of_another_shape_are_refused_and_flat_ones_take_the_shape() -> None:
    image = ("x", DataType.FP32, (-1, 2, 2))
    assert inputs({"x": np.zeros((3, 4))}, image)["x"].shape == (3, 2, 2)
    with pytest.raises(ConfigError, match=r"input 'x': expected rows of \[2,2\], got \[5\]"):
        inputs({"x": np.zeros((3, 5))}, image)


def test_classes_are_numbers_or_names() -> None:
    assert to_classes(np.array(["cat", "1", "2.0"], object), ("cat", "dog"), "y").tolist() == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"label 'y', row 1: expected a class's number or its name \(cat, dog, ...\), got 'bird'"):
        to_classes(np.array(["cat", "bird"], object), ("cat", "dog"), "y")


def test_large_integers_are_read_as_they_are_and_too_large_ones_refused() -> None:
    texts = np.array([str(2**53 + 1), str(2**63 - 1), "-1"], object)
    assert inputs({"x": texts}, ("x", DataType.INT64, (-1,)))["x"].tolist() == [2**53 + 1, 2**63 - 1, -1]
    for value in (np.array([str(2**63)], object), np.array([2.0**63])):
        with pytest.raises(ConfigError, match="'x', row 0: expected INT64, got 9"):
            inputs({"x": value}, ("x", DataType.INT64, (-1,)))


def test_a_bad_cell_is_named_by_its_row_also_in_a_table() -> None:
    with pytest.raises(ConfigError, match="'x', row 1: expected a number, got 'b'"):
        inputs({"x": np.array([["1", "2"], ["3", "b"]], object)}, PAIR)


def test_moments_are_no_numbers() -> None:
    with pytest.raises(ConfigError, match="expected numbers or text, got datetime64"):
        inputs({"x": np.array(["2026-01-01"], "datetime64[s]")}, ("x", DataType.INT64, (-1,)))
