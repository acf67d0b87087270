"""Which of a batch's answers hold NaN or infinity. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.requests import Ticket
from headrace.signature import DataType, Signature

Array = NDArray[Any]

_FLOATS = frozenset({DataType.FP16, DataType.BF16, DataType.FP32, DataType.FP64})
_BF16_EXPONENT = np.uint16(0x7F80)


def count_nonfinite(signature: Signature, tickets: Sequence[Ticket], wanted: Sequence[int], arrays: Sequence[Array]) -> int:
    """Requests whose answer has a floating output with NaN or infinity; `arrays[i]` is output `wanted[i]`.

    Padding is not looked at, and neither is an output that a request did not ask for. A batch without any costs one pass over
    its floating outputs; only one with some is cut by requests.
    """
    rows = sum([ticket.rows for ticket in tickets])
    has_rows = signature.max_batch_size > 0
    bad: dict[int, Array] = {}
    for index, array in zip(wanted, arrays, strict=True):
        datatype = signature.outputs[index].datatype
        if datatype not in _FLOATS:
            continue
        finite = _finite(array[:rows] if has_rows else array, datatype)
        if not finite.all():
            bad[index] = np.logical_not(finite.reshape(rows, -1).all(axis=1)) if has_rows else np.ones(rows, np.bool_)
    if not bad:
        return 0
    count = start = 0
    for ticket in tickets:
        stop = start + ticket.rows
        count += any(bool(bad[index][start:stop].any()) for index in ticket.outputs if index in bad)
        start = stop
    return count


def _finite(array: Array, datatype: DataType) -> NDArray[np.bool_]:
    if datatype is DataType.BF16:
        return np.asarray((array & _BF16_EXPONENT) != _BF16_EXPONENT)
    return np.asarray(np.isfinite(array))
