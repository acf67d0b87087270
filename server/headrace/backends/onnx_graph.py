"""What of an ONNX file is the graph and what are the weights, told apart by a walk over protobuf's wire format. Blocking.

ModelProto (field 7: graph) and GraphProto (field 5: initializer) as in onnx.proto of the ONNX project. Nothing is parsed: a file
that is no ONNX gives a digest like any other, or none, and the runtime says what is wrong with it.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

MODEL_GRAPH = 7
GRAPH_INITIALIZER = 5
TENSOR_DIMS = 1
TENSOR_DATATYPE = 2
_FLOATS = frozenset({1, 10, 11, 16})
"""FLOAT, FLOAT16, DOUBLE, BFLOAT16"""
SMALL = 4096
"""Bytes. Larger initializers are weights, whatever they are."""
FEW = 8
"""Elements. Smaller ones are part of the graph, since the target of a Reshape decides about the batch dimension; but not floats, unless
there are so few that they may be the scales of a Resize."""
LARGEST_GRAPH = 64 << 20

_VARINT, _DELIMITED = 0, 2
_FIXED = {1: 8, 5: 4}
_LONGEST_HEADER = 20
"""Bytes: a tag and a length."""


def graph_digest(path: Path) -> str:
    """Equal for files that differ in nothing but their weights; empty where that cannot be told. Reads no weights."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            _walk(file, size, digest, is_graph=False)
    except (OSError, ValueError):
        return ""
    return digest.hexdigest()


def _walk(file: io.BufferedReader, stop: int, digest: hashlib._Hash, *, is_graph: bool) -> None:
    """Feed everything up to `stop` to the digest but large initializers, of which only the size counts. Raises ValueError."""
    start = file.tell()
    while start < stop:
        header = file.read(_LONGEST_HEADER)
        tag, used = _read_varint(header, 0)
        field, kind = tag >> 3, tag & 7
        length = _FIXED.get(kind, 0)
        if kind in (_VARINT, _DELIMITED):
            length, used = _read_varint(header, used)
        elif not length:
            raise ValueError("not a field of protobuf")
        digest.update(header[:used])
        start += used
        if kind == _VARINT:
            file.seek(start)
            continue
        end = start + length
        if end > stop:
            raise ValueError("ends in a field")
        file.seek(start)
        if kind == _DELIMITED and not is_graph and field == MODEL_GRAPH:
            _walk(file, end, digest, is_graph=True)
        elif is_graph and field == GRAPH_INITIALIZER:
            if length <= SMALL and not _is_weights(content := file.read(length)):
                digest.update(content)
            file.seek(end)
        elif length > LARGEST_GRAPH:
            raise ValueError("too large to be read for this")
        else:
            digest.update(file.read(length))
        start = end


def _is_weights(tensor: bytes) -> bool:
    """Of a TensorProto (field 1: dims, 2: data_type), whether it holds more than a few floats. Raises ValueError."""
    position, elements, datatype = 0, 1, 0
    while position < len(tensor):
        tag, position = _read_varint(tensor, position)
        field, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, position = _read_varint(tensor, position)
            elements *= value if field == TENSOR_DIMS else 1
            datatype = value if field == TENSOR_DATATYPE else datatype
            continue
        length = _FIXED.get(kind, 0)
        if kind == _DELIMITED:
            length, position = _read_varint(tensor, position)
        end = position + length
        while kind == _DELIMITED and field == TENSOR_DIMS and position < end:  # packed, as some writers do it
            value, position = _read_varint(tensor, position)
            elements *= value
        position = end
    return datatype in _FLOATS and elements > FEW


def _read_varint(header: bytes, position: int) -> tuple[int, int]:
    """(value, where it ends). Raises ValueError."""
    value = shift = 0
    while position < len(header) and shift < 70:
        byte = header[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("expected a number")
