from __future__ import annotations

import numpy as np
import pytest
from headrace.batching.assemble import gather, padded_size, union_outputs
from headrace.requests import InputTensor, Reply, Ticket
from headrace.signature import DataType, Signature, TensorSpec
from headrace.testing import CollectingOutlet

OUTLET = CollectingOutlet()


def ticket(*tensors: InputTensor | None, outputs: tuple[int, ...] = (0,)) -> Ticket:
    rows = next(t.shape[0] for t in tensors if t is not None)
    return Ticket(Reply(OUTLET), rows, (), tensors, outputs)


def fp32(rows: list[list[float]]) -> InputTensor:
    array = np.array(rows, "<f4")
    return InputTensor("x", "FP32", array.shape, array.tobytes())


def signature(*specs: TensorSpec, max_batch_size: int = 8) -> Signature:
    return Signature("m", specs, (TensorSpec("y", DataType.FP32, (-1, 2)),), max_batch_size)


X = TensorSpec("x", DataType.FP32, (-1, 2))


def test_rows_of_several_requests_are_joined_in_order() -> None:
    joined = gather(signature(X), [ticket(fp32([[1, 2]])), ticket(fp32([[3, 4], [5, 6]]))], 3)
    np.testing.assert_array_equal(joined["x"], [[1, 2], [3, 4], [5, 6]])
    assert joined["x"].flags.c_contiguous


def test_padding_repeats_a_real_row() -> None:
    padded = gather(signature(X), [ticket(fp32([[1, 2]])), ticket(fp32([[3, 4]]))], 4)
    np.testing.assert_array_equal(padded["x"], [[1, 2], [3, 4], [1, 2], [1, 2]])


def test_single_aligned_request_is_a_view_and_an_unaligned_one_a_copy() -> None:
    data = b"\0" + np.array([[1, 2]], "<f4").tobytes()
    unaligned = InputTensor("x", "FP32", (1, 2), memoryview(data)[1:])
    array = gather(signature(X), [ticket(unaligned)], 1)["x"]
    assert array.flags.aligned
    np.testing.assert_array_equal(array, [[1, 2]])


def test_strings_are_joined_element_by_element() -> None:
    spec = TensorSpec("s", DataType.BYTES, (-1, 1))
    tensors = [InputTensor("s", "BYTES", (n, 1), np.array(e, object)) for n, e in ((1, [b"a"]), (2, [b"", b"c"]))]
    joined = gather(signature(spec), [ticket(t) for t in tensors], 3)["s"]
    assert joined.tolist() == [[b"a"], [b""], [b"c"]]


def test_absent_optional_inputs_are_left_out() -> None:
    optional = TensorSpec("o", DataType.FP32, (-1, 2), optional=True)
    assert set(gather(signature(X, optional), [ticket(fp32([[1, 2]]), None)], 1)) == {"x"}


def test_models_without_batching_get_the_shape_as_it_came() -> None:
    scalar = TensorSpec("sr", DataType.INT64, ())
    tensor = InputTensor("sr", "INT64", (), np.int64(16000).tobytes())
    array = gather(signature(scalar, max_batch_size=0), [Ticket(Reply(OUTLET), 1, (), (tensor,), (0,))], 1)["sr"]
    assert array.shape == ()
    assert array == 16000


@pytest.mark.parametrize(
    ("rows", "allowed", "expected"), [(1, (1, 4, 8), 1), (3, (1, 4, 8), 4), (8, (1, 4, 8), 8), (9, (1, 4), 9), (5, (), 5)]
)
def test_padded_size(rows: int, allowed: tuple[int, ...], expected: int) -> None:
    assert padded_size(rows, allowed) == expected


def test_union_outputs_keeps_the_order_that_all_ask_for() -> None:
    x = fp32([[1, 2]])
    assert union_outputs([ticket(x, outputs=(1, 0)), ticket(x, outputs=(1, 0))]) == (1, 0)
    assert union_outputs([ticket(x, outputs=(2,)), ticket(x, outputs=(0, 2))]) == (0, 2)
