"""Validation: what clients and their test suites match on, word for word."""

from __future__ import annotations

import numpy as np
import pytest
from headrace.errors import InvalidRequest
from headrace.requests import InferRequest, InputTensor, Likeness, RequestedOutput
from headrace.signature import DataType, Signature, TensorSpec

FP32 = DataType.FP32
BATCHING = Signature(
    "m",
    (TensorSpec("A", FP32, (-1, 2)), TensorSpec("B", FP32, (-1, -1)), TensorSpec("C", FP32, (-1, 1), optional=True)),
    (TensorSpec("Y", FP32, (-1, 2)), TensorSpec("Z", FP32, (-1, 2))),
    max_batch_size=4,
)
LITERAL = Signature("m", (TensorSpec("A", FP32, (-1, 2)),), (TensorSpec("Y", FP32, (-1,)),), 0)


def tensor(name: str, shape: tuple[int, ...], datatype: str = "FP32", size: int | None = None) -> InputTensor:
    return InputTensor(name, datatype, shape, bytes(4 * int(np.prod(shape)) if size is None else size))


def request(*inputs: InputTensor, outputs: tuple[str, ...] = (), id: str = "") -> InferRequest:
    return InferRequest("m", "", id, inputs, [RequestedOutput(name) for name in outputs])


def test_admits_in_the_signatures_order_and_counts_rows() -> None:
    given = request(tensor("B", (3, 7)), tensor("A", (3, 2)), outputs=("Z",))
    admission = BATCHING.validate(given)
    assert admission.rows == 3
    assert [t and t.name for t in admission.inputs(given)] == ["A", "B", None]
    assert admission.output_indexes == (1,)


def test_only_free_dimensions_and_optional_inputs_separate_batches() -> None:
    def key(width: int, rows: int = 1, optional: bool = False) -> object:
        extra = (tensor("C", (rows, 1)),) if optional else ()
        return BATCHING.validate(request(tensor("A", (rows, 2)), tensor("B", (rows, width)), *extra)).key

    assert key(7) == key(7, rows=3)
    assert key(7) != key(8)
    assert key(7) != key(7, optional=True)


def test_a_literal_shape_model_takes_zero_length_and_any_first_dimension() -> None:
    assert LITERAL.validate(request(tensor("A", (0, 2)))).rows == 1
    assert LITERAL.validate(request(tensor("A", (100, 2)))).rows == 1


A, B = tensor("A", (1, 2)), tensor("B", (1, 1))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (request(A, B, outputs=("Q",)), "[request id: <id_unknown>] unexpected inference output 'Q' for model 'm'"),
        (request(A, B, outputs=("Y", "Y"), id="7"), "[request id: 7] output 'Y' already exists in request"),
        (request(A, A), "input 'A' already exists in request"),
        (
            request(A),
            "expected number of inputs between 2 and 3 but got 1 inputs for model 'm'. Got input(s) ['A'], "
            "but missing required input(s) ['B']. Please provide all required input(s).",
        ),
        (request(), "Got input(s) [], but missing required input(s) ['A','B']. Please provide all required input(s)."),
        (request(A, B, tensor("D", (1, 1))), "unexpected inference input 'D' for model 'm'"),
        (request(A, tensor("B", ())), "input 'B' has no shape but model requires batch dimension"),
        (request(A, tensor("B", (2, 1))), "input 'B' batch size does not match other inputs for 'm'"),
        (request(tensor("A", (5, 2)), tensor("B", (5, 1))), "inference request batch-size must be <= 4 for 'm', got 5"),
        (request(tensor("A", (0, 2)), tensor("B", (0, 1))), "inference request batch-size must be >= 1"),
        (request(tensor("A", (1, 2), "INT32"), B), "inference input 'A' data-type is 'INT32', but model 'm' expects 'FP32'"),
        (request(tensor("A", (1, 3)), B), "unexpected shape for input 'A' for model 'm'. Expected [-1,2], got [1,3]"),
        (request(tensor("A", (1, 2), size=12), B), "input byte size mismatch for input 'A' for model 'm'. Expected 8, got 12"),
    ],
)
def test_refusals_say_what_was_expected_and_what_came(given: InferRequest, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        BATCHING.validate(given)
    assert text in str(caught.value)


def test_a_model_without_optional_inputs_states_one_number() -> None:
    with pytest.raises(InvalidRequest, match="expected 1 inputs but got 0 inputs for model 'm'"):
        LITERAL.validate(request())


def test_what_was_learnt_of_a_request_holds_for_those_like_it_and_for_this_signature_only() -> None:
    likeness = Likeness()
    loose = Signature("m", (TensorSpec("x", DataType.FP32, (-1, 4)),), (TensorSpec("y", DataType.FP32, (-1, 4)),), 8)
    strict = Signature("m", (TensorSpec("x", DataType.FP32, (-1, 5)),), (TensorSpec("y", DataType.FP32, (-1, 4)),), 8)
    first, second = [InferRequest("m", "", "", [InputTensor("x", "FP32", (2, 4), bytes(32))], likeness=likeness) for _ in range(2)]
    for request in (first, second):
        admission = loose.validate(request)
        assert (admission.rows, admission.inputs(request)) == (2, request.inputs)
        with pytest.raises(InvalidRequest, match="unexpected shape"):
            strict.validate(request)


def test_a_request_like_another_has_its_inputs_put_in_order_too() -> None:
    likeness = Likeness()
    signature = Signature("m", (TensorSpec("a", DataType.FP32, (-1,)), TensorSpec("b", DataType.FP32, (-1,))), (), 8)
    for _ in range(2):
        b, a = InputTensor("b", "FP32", (2,), bytes(8)), InputTensor("a", "FP32", (2,), bytes(8))
        given = InferRequest("m", "", "", [b, a], likeness=likeness)
        assert signature.validate(given).inputs(given) == (a, b)
