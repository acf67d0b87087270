"""Captured requests as bytes, and back: the format is described in docs/drift/capture-format.md. Pure.

A file is a sequence of msgpack objects: a header, then a pair of checksum and packed record for each request. So any language reads
it, and what a crash has cut off or damaged is told from what is whole.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import msgpack
import numpy as np
from numpy.typing import NDArray

from headrace.errors import HeadraceError
from headrace.signature import DataType
from headrace.wire.tensors import decode_bytes_tensor

Array = NDArray[Any]
Buffer = bytes | memoryview

FORMAT = "headrace.capture"
VERSION = 1
MOST_BYTES = 2**32 - 1
"""Of one record: what msgpack can hold."""
OVERHEAD = 16
"""Bytes that a record takes in its file beyond its own, at most."""


class CaptureError(HeadraceError):
    """A capture cannot be read, or is none."""


@dataclass(frozen=True, slots=True)
class CapturedTensor:
    """`data`: as in raw_input_contents; None where the tensor is redacted."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Buffer | None

    def array(self) -> Array | None:
        """As backends take and give it: BYTES an array of objects, BF16 of 16-bit patterns. None where it is redacted.

        Raises CaptureError when the content is not of that shape.
        """
        if self.data is None:
            return None
        datatype = DataType[self.datatype]
        size = math.prod(self.shape)
        try:
            if datatype is DataType.BYTES:
                return decode_bytes_tensor(self.data, size, self.name, "capture").reshape(self.shape)
            return np.frombuffer(self.data, datatype.dtype).reshape(self.shape)
        except (ValueError, HeadraceError) as error:
            raise CaptureError(f"tensor '{self.name}': expected {self.datatype} of shape {list(self.shape)}: {error}") from None


@dataclass(frozen=True, slots=True)
class Captured:
    """A request with its answer. `at`: when it came, seconds since 1970. `rows`: 1 where the model is not batched, which has no rows."""

    model: str
    version: int
    id: str
    at: float
    rows: int
    is_batching: bool
    inputs: tuple[CapturedTensor, ...]
    outputs: tuple[CapturedTensor, ...]

    @property
    def redacted_inputs(self) -> tuple[str, ...]:
        return tuple([tensor.name for tensor in self.inputs if tensor.data is None])


def encode_header(created: float) -> bytes:
    packed = msgpack.packb({"format": FORMAT, "version": VERSION, "created": created})
    assert isinstance(packed, bytes)
    return packed


def encode_record(captured: Captured) -> bytes:
    record = msgpack.packb(
        {
            "model": captured.model,
            "version": captured.version,
            "id": captured.id,
            "at": captured.at,
            "rows": captured.rows,
            "is_batching": captured.is_batching,
            "inputs": [_table(tensor) for tensor in captured.inputs],
            "outputs": [_table(tensor) for tensor in captured.outputs],
        }
    )
    packed = msgpack.packb([zlib.crc32(record), record])
    assert isinstance(packed, bytes)
    return packed


def _table(tensor: CapturedTensor) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape), "data": tensor.data}


def read_records(file: BinaryIO, name: str, on_cut: Callable[[str], None]) -> Iterator[Captured]:
    """Every whole record of a file, in order. `on_cut` gets the reason where it ends before its last byte, as after a crash.

    Raises CaptureError for what is no capture, or one of a newer format.
    """
    unpacker = msgpack.Unpacker(file, raw=False, max_buffer_size=MOST_BYTES)
    try:
        header = unpacker.unpack()
    except msgpack.OutOfData:
        on_cut(f"{name}: is empty, or ends within its header")
        return
    except (ValueError, msgpack.UnpackException) as error:
        raise CaptureError(f"{name}: expected a capture, got bytes that are no msgpack: {error}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CaptureError(f"{name}: expected a capture, a map with format '{FORMAT}'")
    if header.get("version") != VERSION:
        raise CaptureError(f"{name}: expected version {VERSION}, got {header.get('version')!r}: it is of a newer Headrace")
    position = unpacker.tell()
    while True:
        try:
            captured = _decode(unpacker.unpack())
        except msgpack.OutOfData:
            break
        except (ValueError, msgpack.UnpackException, CaptureError, RecursionError) as error:
            on_cut(f"{name}: damaged at byte {position}: {error}")
            return
        position = unpacker.tell()
        yield captured
    if file.tell() > position:
        on_cut(f"{name}: cut off at byte {position}")


def _decode(pair: object) -> Captured:
    if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], bytes)):
        raise CaptureError("expected a checksum and a record")
    if zlib.crc32(pair[1]) != pair[0]:
        raise CaptureError("expected a record of another checksum")
    table = msgpack.unpackb(pair[1], raw=False)
    if not isinstance(table, dict):
        raise CaptureError("expected a map")
    return Captured(
        model=_get(table, "model", str),
        version=_get(table, "version", int),
        id=_get(table, "id", str),
        at=_get(table, "at", float),
        rows=_get(table, "rows", int),
        is_batching=_get(table, "is_batching", bool),
        inputs=_tensors(table, "inputs"),
        outputs=_tensors(table, "outputs"),
    )


def _tensors(table: dict[str, Any], key: str) -> tuple[CapturedTensor, ...]:
    return tuple([_tensor(each, key) for each in _get(table, key, list)])


def _tensor(table: object, where: str) -> CapturedTensor:
    if not isinstance(table, dict):
        raise CaptureError(f"{where}: expected maps")
    shape: Sequence[object] = _get(table, "shape", list)
    if not all(type(dim) is int and dim >= 0 for dim in shape):
        raise CaptureError(f"{where}: expected a shape without negative dimensions")
    datatype = _get(table, "datatype", str)
    if datatype not in DataType.__members__:
        raise CaptureError(f"{where}: unknown datatype '{datatype}'")
    data = table.get("data")
    if not (data is None or isinstance(data, bytes)):
        raise CaptureError(f"{where}: data: expected bytes or nil")
    return CapturedTensor(_get(table, "name", str), datatype, tuple(shape), data)  # type: ignore[arg-type]  # checked above


def _get(table: dict[str, Any], key: str, kind: type[Any]) -> Any:
    value = table.get(key)
    if type(value) is not kind:
        raise CaptureError(f"{key}: expected {kind.__name__}, got {type(value).__name__}")
    return value
