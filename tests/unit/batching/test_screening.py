"""Whose answers hold NaN or infinity."""

from __future__ import annotations

import numpy as np
import pytest
from headrace.batching.screening import count_nonfinite
from headrace.requests import Reply, Ticket
from headrace.signature import DataType, Signature, TensorSpec
from headrace.testing import CollectingOutlet


def tickets(*rows: int, outputs: tuple[int, ...] = (0,)) -> list[Ticket]:
    return [Ticket(Reply(CollectingOutlet()), each, (), (), outputs) for each in rows]


def signature(*datatypes: DataType, max_batch_size: int = 8) -> Signature:
    return Signature("m", (), tuple(TensorSpec(f"y{i}", datatype, (-1, 2)) for i, datatype in enumerate(datatypes)), max_batch_size)


@pytest.mark.parametrize("datatype", [DataType.FP16, DataType.FP32, DataType.FP64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_request_counts_once_by_its_own_rows(datatype: DataType, value: float) -> None:
    array = np.zeros((6, 2), datatype.dtype)
    assert count_nonfinite(signature(datatype), tickets(1, 3, 2), (0,), [array]) == 0
    array[1:4] = value
    assert count_nonfinite(signature(datatype), tickets(1, 3, 2), (0,), [array]) == 1
    array[5, 1] = value
    assert count_nonfinite(signature(datatype), tickets(1, 3, 2), (0,), [array]) == 2


@pytest.mark.parametrize(("pattern", "count"), [(0x7F80, 1), (0xFF80, 1), (0x7FC0, 1), (0x7F7F, 0), (0x0000, 0), (0xBF80, 0)])
def test_bfloat16_is_read_by_its_exponent(pattern: int, count: int) -> None:
    array = np.full((2, 2), pattern, "<u2")
    array[1] = 0
    assert count_nonfinite(signature(DataType.BF16), tickets(1, 1), (0,), [array]) == count


def test_whole_numbers_are_never_not_finite() -> None:
    array = np.full((1, 2), 0x7F80, "<u2")
    assert count_nonfinite(signature(DataType.UINT16), tickets(1), (0,), [array]) == 0


def test_padding_is_not_looked_at() -> None:
    array = np.array([[1, 2], [np.nan, np.nan]], "<f4")
    assert count_nonfinite(signature(DataType.FP32), tickets(1), (0,), [array]) == 0


def test_an_output_that_a_request_did_not_ask_for_is_not_its_own() -> None:
    both = signature(DataType.FP32, DataType.FP32)
    good, bad = np.zeros((2, 2), "<f4"), np.full((2, 2), np.nan, "<f4")
    batch = [*tickets(1, outputs=(0,)), *tickets(1, outputs=(0, 1))]
    assert count_nonfinite(both, batch, (0, 1), [good, bad]) == 1
    assert count_nonfinite(both, tickets(2, outputs=(1,)), (1,), [bad]) == 1


def test_without_a_batch_dimension_every_request_gets_all_of_it() -> None:
    array = np.array([1, 2, np.inf], "<f4")
    assert count_nonfinite(signature(DataType.FP32, max_batch_size=0), tickets(1), (0,), [array]) == 1


def test_arrays_without_elements_have_nothing_to_find() -> None:
    assert count_nonfinite(signature(DataType.FP32), tickets(2), (0,), [np.zeros((2, 0), "<f4")]) == 0
