"""What a model takes and gives: datatypes, tensor specs, and the check of a request against them.

Error texts follow Triton's, because clients and their test suites match on fragments of them.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from headrace.errors import InvalidRequest
from headrace.requests import InferRequest, InputTensor

Shape = tuple[int, ...]


class DataType(enum.Enum):
    """A tensor datatype by its name on the wire. BF16 has no numpy type: it is carried as its 16-bit pattern."""

    BOOL = "BOOL", "?", 1
    UINT8 = "UINT8", "u1", 1
    UINT16 = "UINT16", "<u2", 2
    UINT32 = "UINT32", "<u4", 4
    UINT64 = "UINT64", "<u8", 8
    INT8 = "INT8", "i1", 1
    INT16 = "INT16", "<i2", 2
    INT32 = "INT32", "<i4", 4
    INT64 = "INT64", "<i8", 8
    FP16 = "FP16", "<f2", 2
    BF16 = "BF16", "<u2", 2
    FP32 = "FP32", "<f4", 4
    FP64 = "FP64", "<f8", 8
    BYTES = "BYTES", "O", 0

    dtype: np.dtype[np.generic]
    itemsize: int

    def __new__(cls, wire_name: str, dtype: str, itemsize: int) -> DataType:
        member = object.__new__(cls)
        member._value_ = wire_name
        member.dtype = np.dtype(dtype)
        member.itemsize = itemsize
        return member


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output. `shape` is as on the wire, batch dimension included; -1 is any length.

    `max_pixels`: of images [rows, height, width, channels] whose size is free, height times width at most; 0: it is no such input.
    `is_ranked`: it is what was taken of a row's scores, by rank, or the classes of that.
    """

    name: str
    datatype: DataType
    shape: Shape
    optional: bool = False
    max_pixels: int = 0
    is_ranked: bool = False


class Admission(NamedTuple):
    """What the check of a request yields. `key`: only requests with equal keys can run in one batch.

    Inputs and `output_indexes` are in the signature's order, so that a batch never looks a name up again; an absent optional input is
    None. `reordered`: the inputs, None when the request's own are in order. So an admission can hold for many requests.
    """

    rows: int
    key: Hashable
    reordered: tuple[InputTensor | None, ...] | None
    output_indexes: tuple[int, ...]

    def inputs(self, request: InferRequest) -> Sequence[InputTensor | None]:
        return request.inputs if self.reordered is None else self.reordered


@dataclass(frozen=True)
class Signature:
    """The contract of one model version. `max_batch_size` 0: shapes are literal, every request is a batch of its own."""

    model: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int = 0
    _input_index: dict[str, int] = field(init=False, repr=False, compare=False)
    _output_index: dict[str, int] = field(init=False, repr=False, compare=False)
    _all_outputs: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _required: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_input_index", {spec.name: i for i, spec in enumerate(self.inputs)})
        object.__setattr__(self, "_output_index", {spec.name: i for i, spec in enumerate(self.outputs)})
        object.__setattr__(self, "_all_outputs", tuple(range(len(self.outputs))))
        object.__setattr__(self, "_required", sum(not spec.optional for spec in self.inputs))

    @property
    def is_batching(self) -> bool:
        return self.max_batch_size > 0

    def validate(self, request: InferRequest) -> Admission:
        """Raise InvalidRequest naming the tensor, what was expected and what came; the order of checks is Triton's.

        A request that is like one that was admitted is: 0.3 µs instead of 2.3.
        """
        likeness = request.likeness
        if likeness is not None:
            known = likeness.known
            if type(known) is _Known and known.signature is self:
                return known.admission
        try:
            admission = self._admit(request)
        except InvalidRequest as error:
            raise InvalidRequest(f"[request id: {request.id or '<id_unknown>'}] {error}") from None
        if likeness is not None and admission.reordered is None:
            likeness.known = _Known(self, admission)
        return admission

    def _admit(self, request: InferRequest) -> Admission:
        output_indexes = self._select_outputs(request)
        inputs = self._order_inputs(request)
        rows = self._count_rows(inputs) if self.max_batch_size > 0 else 1
        tails: list[Hashable] = []
        for spec, tensor in zip(self.inputs, inputs, strict=True):
            if tensor is None:
                tails.append(None)
            else:
                self._check_tensor(spec, tensor)
                if -1 in spec.shape[1:] or not self.max_batch_size:
                    tails.append(tensor.shape[1:])
                elif spec.optional:
                    tails.append(True)
        return Admission(rows, tuple(tails), None if inputs == tuple(request.inputs) else inputs, output_indexes)

    def _select_outputs(self, request: InferRequest) -> tuple[int, ...]:
        if not request.outputs:
            return self._all_outputs
        indexes = []
        for output in request.outputs:
            index = self._output_index.get(output.name)
            if index is None:
                raise InvalidRequest(f"unexpected inference output '{output.name}' for model '{self.model}'")
            if index in indexes:
                raise InvalidRequest(f"output '{output.name}' already exists in request for model '{self.model}'")
            indexes.append(index)
        return tuple(indexes)

    def _order_inputs(self, request: InferRequest) -> tuple[InputTensor | None, ...]:
        given = request.inputs
        ordered: list[InputTensor | None] = [None] * len(self.inputs)
        unknown = None
        for tensor in given:
            index = self._input_index.get(tensor.name)
            if index is None:
                unknown = unknown or tensor.name
            elif ordered[index] is not None:
                raise InvalidRequest(f"input '{tensor.name}' already exists in request for model '{self.model}'")
            else:
                ordered[index] = tensor
        missing = [s.name for s, t in zip(self.inputs, ordered, strict=True) if t is None and not s.optional]
        if not self._required <= len(given) <= len(self.inputs) or (missing and unknown is None):
            raise InvalidRequest(self._count_error(given, missing))
        if unknown is not None:
            raise InvalidRequest(f"unexpected inference input '{unknown}' for model '{self.model}'")
        return tuple(ordered)

    def _count_error(self, given: Sequence[InputTensor], missing: Sequence[str]) -> str:
        total = len(self.inputs)
        wanted = f"{total}" if self._required == total else f"number of inputs between {self._required} and {total}"
        noun = " inputs" if self._required == total else ""
        text = f"expected {wanted}{noun} but got {len(given)} inputs for model '{self.model}'."
        text += f" Got input(s) [{_quoted(t.name for t in given)}]"
        if missing:
            text += f", but missing required input(s) [{_quoted(missing)}]. Please provide all required input(s)."
        return text

    def _count_rows(self, inputs: Sequence[InputTensor | None]) -> int:
        rows = -1
        for tensor in inputs:
            if tensor is None:
                continue
            if not tensor.shape:
                raise InvalidRequest(f"input '{tensor.name}' has no shape but model requires batch dimension for '{self.model}'")
            if rows < 0:
                rows = tensor.shape[0]
            elif tensor.shape[0] != rows:
                raise InvalidRequest(
                    f"input '{tensor.name}' batch size does not match other inputs for '{self.model}': "
                    f"expected {rows}, got {tensor.shape[0]}"
                )
        if rows < 1:
            raise InvalidRequest(f"inference request batch-size must be >= 1 for '{self.model}', got {max(rows, 0)}")
        if rows > self.max_batch_size:
            raise InvalidRequest(f"inference request batch-size must be <= {self.max_batch_size} for '{self.model}', got {rows}")
        return rows

    def _check_tensor(self, spec: TensorSpec, tensor: InputTensor) -> None:
        if tensor.datatype != spec.datatype.value:
            raise InvalidRequest(
                f"inference input '{spec.name}' data-type is '{tensor.datatype}', but model '{self.model}' expects '{spec.datatype.value}'"
            )
        if tensor.shape != spec.shape and not _matches(spec.shape, tensor.shape):
            raise InvalidRequest(
                f"unexpected shape for input '{spec.name}' for model '{self.model}'. "
                f"Expected {format_shape(spec.shape)}, got {format_shape(tensor.shape)}"
            )
        if spec.max_pixels:
            height, width = tensor.shape[1:3]
            if not 1 <= height * width <= spec.max_pixels:
                raise InvalidRequest(
                    f"inference input '{spec.name}' for model '{self.model}': expected images of 1 to {spec.max_pixels} pixels, "
                    f"got {height} x {width}"
                )
        if spec.datatype.itemsize:
            expected = math.prod(tensor.shape) * spec.datatype.itemsize
            if len(tensor.data) != expected:
                raise InvalidRequest(
                    f"input byte size mismatch for input '{spec.name}' for model '{self.model}'. "
                    f"Expected {expected}, got {len(tensor.data)}"
                )


class _Known(NamedTuple):
    """The admission of a request by one signature, and so of all that are like it."""

    signature: Signature
    admission: Admission


def _matches(expected: Shape, got: Shape) -> bool:
    return len(expected) == len(got) and all(e in (-1, g) for e, g in zip(expected, got, strict=True))


def _quoted(names: object) -> str:
    return ",".join(f"'{name}'" for name in names)  # type: ignore[attr-defined]


def format_shape(shape: Sequence[int]) -> str:
    """As Triton prints shapes in its errors: no spaces."""
    return "[" + ",".join(map(str, shape)) + "]"
