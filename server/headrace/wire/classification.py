"""Triton's classification extension: an output as its largest values, each with its class and the class's name, as strings. Pure.

Where this differs from Triton: equal values come by class, and NaN after all others; there both are in no order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from headrace_kernels.topk import TopK
from numpy.typing import NDArray

from headrace.errors import InvalidRequest
from headrace.requests import Ticket, TopClasses
from headrace.signature import DataType, Shape

Array = NDArray[Any]

CLASSIFICATION = "classification"
"""The parameter of a requested output: how many classes."""

RANKABLE = frozenset(datatype for datatype in DataType if datatype.value.startswith(("INT", "UINT"))) | {DataType.FP32, DataType.FP64}

MAX_ELEMENTS = 1_000_000
"""Of a row, or of the tensor where the model is not batched: Triton's limit."""
MAX_STRINGS = 10_000
"""Of an answer. A string takes about 1 µs, so that is the longest for which one request can hold up the others."""

_LENGTH = struct.Struct("<I")


class Classes(NamedTuple):
    """One answer's output, as BYTES on the wire."""

    shape: Shape
    content: bytes


Wanted = Mapping[tuple[Ticket, int], Classes | InvalidRequest]
"""By ticket and output."""


def encode_names(labels: Sequence[str]) -> tuple[bytes, ...]:
    """What a string ends with, by class: nothing where the class has no name."""
    return tuple([b":" + label.encode() if label else b"" for label in labels])


def classify(tickets: Sequence[Ticket], arrays: Mapping[int, Array], names: Mapping[int, Sequence[bytes]]) -> Wanted:
    """Every output that a ticket of this batch wants so. `arrays`, by output, are of the tickets' rows, one ticket's after the other's.

    The rows that are wanted of an output are ranked together, with the largest number of classes; the others are not looked at.
    """
    wishes: dict[int, list[_Wish]] = {}
    start = 0
    for ticket in tickets:
        if ticket.destinations is not None:
            for index, how in zip(ticket.outputs, ticket.destinations, strict=True):
                if isinstance(how, TopClasses):
                    wishes.setdefault(index, []).append(_Wish(ticket, how, start))
        start += ticket.rows
    return {
        (wish.ticket, index): classes
        for index, of_output in wishes.items()
        for wish, classes in _answer(of_output, arrays[index], names.get(index, ()))
    }


class _Wish(NamedTuple):
    ticket: Ticket
    how: TopClasses
    start: int


def _answer(wishes: Sequence[_Wish], array: Array, names: Sequence[bytes]) -> Iterator[tuple[_Wish, Classes | InvalidRequest]]:
    scores = array.reshape(len(array) if wishes[0].how.by_row else 1, -1)
    elements = scores.shape[1]
    granted = []
    for wish in wishes:
        strings = wish.ticket.rows * min(wish.how.count, elements)
        if elements > MAX_ELEMENTS:
            yield wish, _too_large(f"expected at most {MAX_ELEMENTS} elements to rank, got {elements}")
        elif strings > MAX_STRINGS:
            yield wish, _too_large(f"expected at most {MAX_STRINGS} strings in an answer, got {strings}")
        else:
            granted.append(wish)
    if not granted:
        return
    rows = np.concatenate([np.arange(wish.start, wish.start + wish.ticket.rows) for wish in granted])
    values, classes = rank(scores[rows], min(max([wish.how.count for wish in granted]), elements))
    start = 0
    for wish in granted:
        stop, count = start + wish.ticket.rows, min(wish.how.count, elements)
        content = _encode(values[start:stop, :count], classes[start:stop, :count], names)
        yield wish, Classes((stop - start, count) if wish.how.by_row else (count,), content)
        start = stop


def _too_large(reason: str) -> InvalidRequest:
    return InvalidRequest(f"classification output tensor too large: {reason}")


def rank(scores: Array, count: int) -> tuple[Array, Array]:
    """(values, classes) of the `count` largest of each row of [rows, elements], in the datatype's own order."""
    # By parts: what a ranking takes while it is made is several times the scores.
    step = max(MAX_ELEMENTS // max(scores.shape[1], 1), 1)
    parts = [_rank(scores[start : start + step], count) for start in range(0, len(scores), step)]
    return parts[0] if len(parts) == 1 else (np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]))


def _rank(scores: Array, count: int) -> tuple[Array, Array]:
    if scores.dtype == np.float32 and count:
        return TopK(count)(scores)
    # Both turn the order round without an overflow, and sorting leaves NaN last and equal ones in theirs.
    turned = -scores if scores.dtype.kind == "f" else ~scores
    classes = np.argsort(turned, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(scores, classes, axis=1), classes


def _encode(values: Array, classes: Array, names: Sequence[bytes]) -> bytes:
    """As C++'s std::to_string has numbers: six decimals of floats."""
    text = b"%f:%d%b" if values.dtype.kind == "f" else b"%d:%d%b"
    known = len(names)
    parts: list[bytes] = []
    for value, index in zip(values.ravel().tolist(), classes.ravel().tolist(), strict=True):
        content = text % (value, index, names[index] if index < known else b"")
        parts += (_LENGTH.pack(len(content)), content)
    return b"".join(parts)


def decode_classes(strings: Array) -> tuple[Array, Array]:
    """(values, classes) of what `classify` gave; floats become fp64. Raises ValueError for other strings."""
    found = [element.split(b":", 2) for element in strings.ravel().tolist()]
    values, classes = [float(each[0]) for each in found], [int(each[1]) for each in found]
    return np.array(values, np.float64).reshape(strings.shape), np.array(classes, np.int64).reshape(strings.shape)


__all__ = ["CLASSIFICATION", "MAX_ELEMENTS", "MAX_STRINGS", "RANKABLE", "Classes", "Wanted", "classify", "decode_classes", "encode_names"]
