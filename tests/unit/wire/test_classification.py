"""Outputs as classifications: what Triton's strings look like, their order, and who gets which of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from headrace.errors import InvalidRequest
from headrace.requests import Destination, Destinations, Reply, Ticket, TopClasses
from headrace.signature import DataType, TensorSpec
from headrace.testing import CollectingOutlet
from headrace.wire import classification
from headrace.wire.classification import RANKABLE, classify, decode_classes, rank
from headrace.wire.codec import ResponseEncoder
from headrace.wire.messages import ModelInferResponse
from numpy.typing import NDArray
from tritonclient.grpc import InferResult, service_pb2

BY_NAME = sorted(RANKABLE, key=lambda datatype: datatype.value)
GENERATOR = np.random.default_rng(0)
BATCH = GENERATOR.random((6, 5)).astype(np.float32)


def ticket(rows: int, *how: Destination | TopClasses | None, outputs: Sequence[int] = (), id: str = "") -> Ticket:
    wanted: Destinations | None = how if any(how) else None
    return Ticket(Reply(CollectingOutlet()), rows, (), (), tuple(outputs or range(len(how))), id=id, destinations=wanted)


def top(count: int, by_row: bool = True) -> TopClasses:
    return TopClasses(count, by_row)


def encoder(datatype: DataType = DataType.FP32, labels: Sequence[str] = ()) -> ResponseEncoder:
    outputs = (TensorSpec("y", datatype, (-1, -1)), TensorSpec("z", DataType.BYTES, (-1,)))
    return ResponseEncoder("m", "3", outputs, {"y": labels} if labels else {})


def read(answer: Any, name: str = "y") -> NDArray[Any]:
    """As the stock client reads it."""
    assert isinstance(answer, bytes), answer
    found: NDArray[Any] = InferResult(service_pb2.ModelInferResponse.FromString(answer)).as_numpy(name)
    return found


def strings(scores: Any, count: int = 100, datatype: DataType = DataType.FP32, labels: Sequence[str] = (), by_row: bool = True) -> Any:
    array = np.array(scores, datatype.dtype)
    (answer,) = encoder(datatype, labels).encode_batch([ticket(len(array) if by_row else 1, top(count, by_row))], (0,), [array], by_row)
    return read(answer).tolist()


def test_the_protocols_own_example() -> None:
    assert strings([[1, 5, 10, 4]], 2, DataType.INT32) == [[b"10:2", b"5:1"]]
    named = strings([[1, 5, 10, 4]], 2, DataType.INT32, ["orange", "pickle", "apple"])
    assert named == [[b"10:2:apple", b"5:1:pickle"]]


def test_floats_have_six_decimals_as_in_c() -> None:
    assert strings([[1 / 3, -0.5, 3.4028235e38]]) == [[b"340282346638528859811704183484516925440.000000:2", b"0.333333:0", b"-0.500000:1"]]
    assert strings([[0.12345678, 1e-7, -1e-9]], datatype=DataType.FP64) == [[b"0.123457:0", b"0.000000:1", b"-0.000000:2"]]


@pytest.mark.parametrize("datatype", [datatype for datatype in BY_NAME if "INT" in datatype.value])
def test_integers_are_ranked_as_integers(datatype: DataType) -> None:
    """The 64-bit ones are the same number as floats."""
    limits = np.iinfo(datatype.dtype.str)
    values = [limits.min, limits.max - 1, limits.max, limits.min + 1]
    assert strings([values], datatype=datatype) == [[f"{values[i]}:{i}".encode() for i in (2, 1, 3, 0)]]


@pytest.mark.parametrize("datatype", [DataType.FP32, DataType.FP64])
def test_nan_comes_last_and_infinities_where_they_belong(datatype: DataType) -> None:
    scores = [[math.nan, 1.0, -math.inf, math.inf, -math.nan]]
    assert strings(scores, datatype=datatype) == [[b"inf:3", b"1.000000:1", b"-inf:2", b"nan:0", b"nan:4"]]


@pytest.mark.parametrize("datatype", BY_NAME)
def test_equal_values_come_by_class(datatype: DataType) -> None:
    values, classes = rank(np.array([[1, 7, 7, 0, 7, 0], [0, 0, 0, 0, 0, 0]], datatype.dtype), 5)
    assert values.dtype == datatype.dtype
    assert classes.tolist() == [[1, 2, 4, 0, 3], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("datatype", BY_NAME)
@pytest.mark.parametrize("part", [7, 1_000_000])
def test_a_ranking_is_that_of_a_plain_sort(datatype: DataType, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classification, "MAX_ELEMENTS", part)
    scores = GENERATOR.integers(0, 100, (9, 50)).astype(datatype.dtype)
    for count in (1, 3, 50):
        values, classes = rank(scores, count)
        for row, found, indexes in zip(scores.tolist(), values.tolist(), classes.tolist(), strict=True):
            expected = sorted(range(50), key=lambda index, row=row: (-row[index], index))[:count]  # type: ignore[misc]  # a lambda's default
            assert (indexes, found) == (expected, [row[index] for index in expected])


def test_a_class_has_a_name_where_the_labels_have_one() -> None:
    assert strings([[4, 3, 2, 1]], labels=["ü:x", "", "c"]) == [
        [b"4.000000:0:" + "ü:x".encode(), b"3.000000:1", b"2.000000:2:c", b"1.000000:3"]
    ]


def test_more_classes_than_there_are_is_all_of_them() -> None:
    assert [len(row) for row in strings(BATCH.tolist(), 2**40)] == [5] * 6


def test_an_output_of_more_dimensions_is_ranked_as_one_row_of_elements() -> None:
    assert strings([[[1, 2], [4, 3]], [[8, 7], [6, 5]]], 2) == [[b"4.000000:2", b"3.000000:3"], [b"8.000000:0", b"7.000000:1"]]
    assert strings([3, 1], 2) == [[b"3.000000:0"], [b"1.000000:0"]]


def test_without_a_batch_dimension_all_of_the_tensor_is_ranked() -> None:
    assert strings([[1, 2], [4, 3]], 3, by_row=False) == [b"4.000000:2", b"3.000000:3", b"2.000000:1"]
    assert strings(7.5, 3, by_row=False) == [b"7.500000:0"]


def test_an_output_without_elements_has_no_classes() -> None:
    (answer,) = encoder().encode_batch([ticket(2, top(3))], (0,), [np.zeros((2, 0), np.float32)], True)
    assert isinstance(answer, bytes)
    (output,) = ModelInferResponse.FromString(answer).outputs
    assert (output.datatype, list(output.shape)) == ("BYTES", [2, 0])


def test_each_request_of_a_batch_gets_what_it_would_get_alone() -> None:
    text = np.array([f"row {i}" for i in range(6)], object)
    tickets = [
        ticket(1, None, None, id="plain"),
        ticket(2, top(3), None, id="three and strings"),
        ticket(1, top(1), outputs=[0]),
        ticket(2, None, top(2), outputs=[1, 0]),
    ]
    encode = encoder(labels=["a", "b", "c"])
    answers = encode.encode_batch(tickets, (0, 1), [BATCH, text], True)
    np.testing.assert_array_equal(read(answers[0]), BATCH[:1])
    start = 0
    for each, answer in zip(tickets, answers, strict=True):
        stop = start + each.rows
        assert [answer] == encode.encode_batch([each], (0, 1), [BATCH[start:stop], text[start:stop]], True)
        start = stop
    assert read(answers[1]).shape == (2, 3)
    assert read(answers[1], "z").tolist() == [b"row 1", b"row 2"]
    assert read(answers[2]).shape == (1, 1)
    assert [output.name for output in ModelInferResponse.FromString(answers[3]).outputs] == ["z", "y"]  # type: ignore[arg-type]
    assert read(answers[3]).tolist()[1][0].startswith(f"{BATCH[5].max():f}:{BATCH[5].argmax()}".encode())


def test_headers_of_classes_and_of_plain_tensors_of_the_same_shape_are_kept_apart() -> None:
    encode = encoder()
    for _ in range(2):
        plain, classes = encode.encode_batch([ticket(1, None), ticket(1, top(5))], (0,), [BATCH[:2]], True)
        np.testing.assert_array_equal(read(plain), BATCH[:1])
        assert read(classes).dtype == object


def test_classes_and_shared_memory_go_together_in_one_request() -> None:
    memory = bytearray(20)
    outputs = (TensorSpec("y", DataType.FP32, (-1, -1)), TensorSpec("z", DataType.FP32, (-1, -1)))
    both = ticket(1, top(1), Destination("r", 0, memoryview(memory)))
    (answer,) = ResponseEncoder("m", "3", outputs).encode_batch([both], (0, 1), [BATCH[:1], BATCH[1:2]], True)
    assert memory == BATCH[1].tobytes()
    assert read(answer).tolist() == [[f"{BATCH[0].max():f}:{BATCH[0].argmax()}".encode()]]


def test_an_output_that_is_too_large_is_its_requests_error_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classification, "MAX_STRINGS", 6)
    tickets = [ticket(2, top(4)), ticket(2, top(3)), ticket(1, None)]
    refused, answered, plain = encoder().encode_batch(tickets, (0,), [BATCH[:5]], True)
    assert isinstance(refused, InvalidRequest)
    assert str(refused) == "classification output tensor too large: expected at most 6 strings in an answer, got 8"
    assert read(answered).shape == (2, 3)
    np.testing.assert_array_equal(read(plain), BATCH[4:5])


def test_a_row_of_more_elements_than_triton_ranks_is_refused_in_its_words() -> None:
    (answer,) = encoder().encode_batch([ticket(1, top(1))], (0,), [np.zeros((1, 1_000_001), np.float32)], True)
    assert isinstance(answer, InvalidRequest)
    assert str(answer) == "classification output tensor too large: expected at most 1000000 elements to rank, got 1000001"


def test_only_the_rows_that_are_wanted_are_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    ranked: list[Any] = []

    def note(scores: NDArray[Any], count: int) -> Any:
        ranked.append((scores, count))
        return rank(scores, count)

    monkeypatch.setattr(classification, "rank", note)
    tickets = [ticket(1, top(2)), ticket(2, None), ticket(1, top(4))]
    wanted = classify(tickets, {0: BATCH}, {})
    ((scores, count),) = ranked
    np.testing.assert_array_equal(scores, BATCH[[0, 3]])
    assert count == 4
    assert {each.rows: classes.shape for (each, _), classes in wanted.items() if not isinstance(classes, InvalidRequest)} == {1: (1, 4)}


def test_strings_are_read_back() -> None:
    found = np.array(strings(BATCH.tolist(), 3, labels=["a:b"]), object)
    values, classes = decode_classes(found)
    np.testing.assert_array_equal(classes, np.argsort(-BATCH, axis=1)[:, :3])
    np.testing.assert_allclose(values, np.take_along_axis(BATCH, classes, axis=1), atol=5.1e-7)
