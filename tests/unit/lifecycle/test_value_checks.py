from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from headrace.backends.base import ArtifactSignature
from headrace.config import ModelConfig, TensorConfig
from headrace.drift.building import ReferenceBuilder
from headrace.drift.plan import choose
from headrace.drift.reference import Reference
from headrace.errors import ConfigError, InvalidRequest, LoadError
from headrace.lifecycle.effective import EffectiveModel, resolve
from headrace.lifecycle.value_checks import make_checks
from headrace.requests import InputTensor
from headrace.signature import DataType, Signature, TensorSpec

FLOATS, WORDS, NUMBERS = (
    TensorSpec("x", DataType.FP32, (-1, 2)),
    TensorSpec("w", DataType.BYTES, (-1,)),
    TensorSpec("n", DataType.INT64, (-1,)),
)
HALVES = TensorSpec("h", DataType.BF16, (-1,))
SPECS = {spec.name: spec for spec in (FLOATS, WORDS, NUMBERS, HALVES)}


def effective(*settings: TensorConfig) -> EffectiveModel:
    outputs = (TensorSpec("y", DataType.FP32, (-1,)),)
    return resolve(
        ModelConfig("m", inputs=settings),
        ArtifactSignature(tuple(SPECS.values()), outputs),
        backend="b",
        platform="p",
        filename="f",
        labels={},
    )


def tensor(name: str, values: Any) -> InputTensor:
    spec = SPECS[name]
    if spec.datatype is DataType.BYTES:
        array = np.empty(len(values), object)
        array[:] = values
        return InputTensor(name, "BYTES", (len(values),), array)
    array = np.asarray(values, spec.datatype.dtype)
    return InputTensor(name, spec.datatype.value, array.shape, array.tobytes())


def look(values: Any, *, reference: Reference | None = None, **settings: Any) -> dict[tuple[str, str, str], int]:
    """What is counted when one tensor is looked at."""
    counted: dict[tuple[str, str, str], int] = {}

    def count(tensor: str, problem: str, action: str, values: int) -> None:
        counted[tensor, problem, action] = counted.get((tensor, problem, action), 0) + values

    setting = TensorConfig(**settings)
    checks = make_checks(effective(setting), reference, count)
    assert checks is not None
    checks.look_at([tensor(name, values) if name == setting.name else None for name in SPECS], "id-7")
    return counted


def test_a_model_of_which_nothing_is_said_costs_nothing() -> None:
    assert make_checks(effective(TensorConfig("x", monitor="columns")), None, lambda *_: None) is None


@pytest.mark.parametrize(
    ("name", "settings", "good", "bad", "problem", "number"),
    [
        ("x", {"minimum": 0}, [[0, 1]], [[-1, 0], [2, -3]], "below", 2),
        ("x", {"maximum": 1}, [[0, 1]], [[1, 1.5]], "above", 1),
        ("x", {"minimum": 0, "maximum": 1}, [[np.nan, 1]], [[2, np.nan]], "above", 1),
        ("x", {"finite": True}, [[0, 1]], [[np.nan, np.inf]], "not_finite", 2),
        ("h", {"maximum": 1}, [0x3F80], [0x4000], "above", 1),  # 1 and 2
        ("h", {"finite": True}, [0x3F80], [0x7FC0], "not_finite", 1),
        ("n", {"categories": ("1", "2")}, [1, 2], [1, 3, 4], "not_allowed", 2),
        ("w", {"categories": ("a", "ü")}, [b"a", "ü".encode()], [b"b"], "not_allowed", 1),
    ],
)
def test_values_that_are_not_allowed_are_counted(
    name: str, settings: dict[str, Any], good: Any, bad: Any, problem: str, number: int
) -> None:
    assert set(look(good, name=name, **settings).values()) == {0}
    assert look(bad, name=name, **settings)[name, problem, "counted"] == number


@pytest.mark.parametrize(
    ("settings", "bad", "reason"),
    [
        ({"name": "x", "minimum": 0}, [[1, 1], [1, -3]], r"row 1, element 1: expected at least 0, got -3"),
        ({"name": "x", "maximum": 1, "columns": ("age", "fare")}, [[1, 2]], r"row 0, 'fare': expected at most 1, got 2"),
        ({"name": "x", "minimum": 0, "maximum": 1}, [[1, 2]], r"expected 0 to 1, got 2"),
        ({"name": "x", "finite": True}, [[1, np.inf]], r"expected finite numbers, got inf"),
        ({"name": "h", "maximum": 1}, [0x3F80, 0x4000], r"row 1: expected at most 1, got 2"),
        ({"name": "w", "categories": ("a", "b")}, [b"a", b"c"], r"row 1: expected one of a, b, got c"),
    ],
)
def test_a_refusal_says_what_was_expected_where_and_what_came(settings: dict[str, Any], bad: Any, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"\[request id: id-7\] inference input '.' for model 'm', .*{reason}"):
        look(bad, on_invalid="refuse", **settings)


def reference() -> Reference:
    model = effective(TensorConfig("x", monitor="columns"))
    builder = ReferenceBuilder("m", choose(model.signature, model.config), 10)
    builder.add({"x": np.array([[0, 10], [1, 20]], np.float32)}, {}, 2)
    return builder.build("profile")


def test_limits_can_be_what_the_reference_has_seen_of_each_element() -> None:
    settings = {"name": "x", "limits": "reference"}
    assert set(look([[0, 10], [1, 20]], reference=reference(), **settings).values()) == {0}
    assert look([[10, 10], [1, 5]], reference=reference(), **settings) == {("x", "below", "counted"): 1, ("x", "above", "counted"): 1}
    with pytest.raises(LoadError, match=r"input 'x': limits 'reference': expected drift.msgpack"):
        look([[0, 0]], **settings)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"name": "w", "minimum": 0}, "input 'w': minimum: expected numbers, it has BYTES"),
        ({"name": "n", "finite": True}, "input 'n': finite: expected floating-point numbers, it has INT64"),
        ({"name": "x", "categories": ("1",)}, "input 'x': categories: expected integers, strings or booleans, it has FP32"),
        ({"name": "x", "minimum": 2, "maximum": 1}, "input 'x': minimum: expected at most the maximum 1, got 2"),
    ],
)
def test_settings_that_a_type_cannot_have_are_said_at_load(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_checks(effective(TensorConfig(**settings)), None, lambda *_: None)


@pytest.mark.parametrize("limit", [0.1, 0.7])
def test_the_limit_itself_is_allowed_as_the_tensors_type_holds_it(limit: float) -> None:
    values = [[np.float32(limit)] * 2]
    assert set(look(values, name="x", minimum=limit, maximum=limit, on_invalid="refuse").values()) == {0}


def test_of_a_model_without_rows_the_element_is_named() -> None:
    spec = TensorSpec("x", DataType.FP32, (4,))
    scalar = TensorSpec("s", DataType.FP32, ())
    settings = (
        TensorConfig("x", minimum=0, columns=("a", "b", "c", "d"), on_invalid="refuse"),
        TensorConfig("s", maximum=1, on_invalid="refuse"),
    )
    signature = Signature("m", (spec, scalar), (TensorSpec("y", DataType.FP32, (1,)),), 0)
    model = replace(effective(), config=ModelConfig("m", inputs=settings), signature=signature)
    checks = make_checks(model, None, lambda *_: None)
    assert checks is not None
    good = InputTensor("x", "FP32", (4,), np.zeros(4, np.float32).tobytes())
    with pytest.raises(InvalidRequest, match="for model 'm', 'd': expected at least 0, got -1"):
        checks.look_at([InputTensor("x", "FP32", (4,), np.array([0, 0, 0, -1], np.float32).tobytes()), None], "")
    with pytest.raises(InvalidRequest, match="for model 'm': expected at most 1, got 2"):
        checks.look_at([good, InputTensor("s", "FP32", (), np.float32(2).tobytes())], "")


def test_names_of_columns_are_as_many_as_there_are_columns() -> None:
    with pytest.raises(ConfigError, match="columns: expected 2 names, got 1"):
        make_checks(effective(TensorConfig("x", minimum=0, columns=("a",))), None, lambda *_: None)


def test_a_long_value_is_quoted_in_part() -> None:
    with pytest.raises(InvalidRequest) as error:
        look([b"x" * 1_000_000], name="w", categories=("a",), on_invalid="refuse")
    assert len(str(error.value)) < 400
