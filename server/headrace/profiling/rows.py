"""What a model is asked, out of a chunk of named columns or tensors. Pure.

An input is found by its name; or as columns with the names that model.toml gives its columns (`columns`); or as `NAME.0`, `NAME.1`, ...;
or, when it is the one input that is missing and as many columns are left over as it has elements, as those, in their order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.config import ModelConfig
from headrace.drift.extraction import to_bf16
from headrace.errors import ConfigError
from headrace.signature import DataType, Signature, TensorSpec, format_shape

Array = NDArray[Any]
Chunk = Mapping[str, Array]

_TRUE, _FALSE = frozenset({"1", "true", "yes"}), frozenset({"0", "false", "no"})


def to_inputs(chunk: Chunk, signature: Signature, config: ModelConfig, label: str = "", first: int = 0) -> dict[str, Array]:
    """Each input with a dimension of rows first. `first`: the number of the chunk's first row. Raises ConfigError with what was expected
    and what came."""
    rest = {name: array for name, array in chunk.items() if name != label}
    columns_of = {each.name: each.columns for each in config.inputs}
    found: dict[str, Array] = {}
    for spec in signature.inputs:
        tail = spec.shape[1:] if signature.is_batching else spec.shape
        names = _names(spec.name, tail, columns_of.get(spec.name, ()), rest)
        if names:
            arrays = [rest.pop(name) for name in names]
            found[spec.name] = _fit(arrays, names, spec, tail, first)
    missing = [spec for spec in signature.inputs if spec.name not in found and not spec.optional]
    if len(missing) == 1:
        spec = missing[0]
        tail = spec.shape[1:] if signature.is_batching else spec.shape
        if len(rest) == 1 or len(rest) == math.prod(tail) > 0:
            found[spec.name] = _fit(list(rest.values()), list(rest), spec, tail, first)
            missing = []
    if missing or not found:
        missing = missing or list(signature.inputs)
        raise ConfigError(_not_found(missing[0], signature, columns_of.get(missing[0].name, ()), rest))
    return found


def _names(name: str, tail: Sequence[int], columns: Sequence[str], there: Mapping[str, Array]) -> list[str]:
    """The columns that make up an input; none where there are none."""
    if name in there:
        return [name]
    if columns and all(column in there for column in columns):
        return list(columns)
    numbered = [f"{name}.{index}" for index in range(math.prod(tail))] if -1 not in tail else []
    return numbered if numbered and all(each in there for each in numbered) else []


def _not_found(spec: TensorSpec, signature: Signature, columns: Sequence[str], rest: Mapping[str, Array]) -> str:
    tail = spec.shape[1:] if signature.is_batching else spec.shape
    ways = [f"'{spec.name}'"]
    if columns:
        ways.append(f"'{columns[0]}', ..., '{columns[-1]}'" if len(columns) > 1 else f"'{columns[0]}'")
    if -1 not in tail and math.prod(tail) > 1:
        ways.append(f"'{spec.name}.0' to '{spec.name}.{math.prod(tail) - 1}', or {math.prod(tail)} columns in their order")
    names = sorted(map(str, rest))
    there = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"
    return f"input '{spec.name}' {spec.datatype.value} {format_shape(spec.shape)}: expected {' or '.join(ways)} in the data, got {there}"


def _fit(arrays: Sequence[Array], names: Sequence[str], spec: TensorSpec, tail: Sequence[int], first: int) -> Array:
    converted = [_convert(array, spec.datatype, name, first) for array, name in zip(arrays, names, strict=True)]
    array = converted[0] if len(converted) == 1 else np.stack(converted, axis=1)
    rows, shape = len(array), tuple(array.shape[1:])
    if len(shape) == len(tail) and all(want in (-1, got) for want, got in zip(tail, shape, strict=True)):
        return array
    if -1 not in tail and math.prod(tail) == math.prod(shape):
        return array.reshape(rows, *tail)
    raise ConfigError(f"input '{spec.name}': expected rows of {format_shape(tail)}, got {format_shape(shape)}")


def _convert(array: Array, datatype: DataType, name: str, first: int) -> Array:
    """Raises ConfigError for what the type cannot hold, with the first such row."""
    if datatype is DataType.BYTES:
        return _to_bytes(array)
    if datatype is DataType.BOOL:
        return _to_bool(array, name, first)
    if array.dtype.kind not in "OSUbiuf":
        raise ConfigError(f"'{name}': expected numbers or text, got {array.dtype}")
    if array.dtype.kind in "OSU":
        array = _to_numbers(array, name, first, is_whole=datatype.dtype.kind in "iu" and datatype is not DataType.BF16)
    if datatype.dtype.kind == "f" or datatype is DataType.BF16:
        values = array.astype(np.float32 if datatype is DataType.BF16 else datatype.dtype)
        return to_bf16(values) if datatype is DataType.BF16 else values
    limits = np.iinfo(str(datatype.dtype))
    # Compared as they are: an unsigned 64-bit number is not to become a float first.
    is_whole = np.isfinite(array) & (np.floor(array) == array) if array.dtype.kind == "f" else np.ones(array.shape, bool)
    with np.errstate(invalid="ignore"):
        # As a float the largest is one more, which it does not hold.
        fits = is_whole & (array >= limits.min) & (array < float(limits.max) + 1 if array.dtype.kind == "f" else array <= limits.max)
    if not fits.all():
        row = int(np.argwhere(~fits)[0][0])
        raise ConfigError(
            f"'{name}', row {first + row}: expected {datatype.value}, got {array[row].ravel()[0] if array.ndim > 1 else array[row]}"
        )
    return array.astype(datatype.dtype)


def _to_numbers(array: Array, name: str, first: int, *, is_whole: bool) -> Array:
    """Text as float64, empty as NaN; as integers where all are, which float64 would round beyond 2**53."""
    flat = array.ravel()
    if is_whole:
        try:
            whole = [int(cell) for cell in flat]
            return np.array(whole, np.int64 if min(whole, default=0) < 0 else np.uint64).reshape(array.shape)
        except (TypeError, ValueError, OverflowError):
            pass
    try:
        values = np.array([float(cell) if cell not in ("", b"") else np.nan for cell in flat])
    except (TypeError, ValueError):
        place = next(place for place, cell in enumerate(flat) if not _is_number(cell))
        row = place // max(flat.size // len(array), 1)
        raise ConfigError(f"'{name}', row {first + row}: expected a number, got {flat[place]!r}") from None
    return values.reshape(array.shape)


def _is_number(cell: object) -> bool:
    try:
        float(cell)  # type: ignore[arg-type]  # that it may be no such thing is the question
    except (TypeError, ValueError):
        return cell in ("", b"")
    return True


def _to_bytes(array: Array) -> Array:
    out = np.empty(array.shape, object)
    out.ravel()[:] = [cell if isinstance(cell, bytes) else str(cell).encode() for cell in array.ravel().tolist()]
    return out


def _to_bool(array: Array, name: str, first: int) -> Array:
    if array.dtype.kind == "b":
        return array
    texts = [str(cell).strip().lower().removesuffix(".0") for cell in array.ravel().tolist()]
    wrong = next((row for row, text in enumerate(texts) if text not in _TRUE | _FALSE), None)
    if wrong is not None:
        row = wrong // max(len(texts) // len(array), 1)
        raise ConfigError(f"'{name}', row {first + row}: expected true or false, got {texts[wrong]!r}")
    return np.array([text in _TRUE for text in texts]).reshape(array.shape)


def to_classes(array: Array, labels: Sequence[str], name: str, first: int = 0) -> NDArray[np.int64]:
    """The true class of each row: its number, or its name of `labels`. Raises ConfigError for a row that is neither."""
    numbers = {text: number for number, text in enumerate(labels)}
    flat = array.reshape(len(array), -1)
    if flat.shape[1] != 1:
        raise ConfigError(f"label '{name}': expected one value a row, got {flat.shape[1]}")
    found = np.empty(len(array), np.int64)
    for row, cell in enumerate(flat[:, 0].tolist()):
        text = cell.decode("utf-8", "replace") if isinstance(cell, bytes) else str(cell).strip()
        number = numbers.get(text)
        if number is None:
            number = int(float(text)) if _is_number(text) and text and float(text).is_integer() and 0 <= float(text) < 2**53 else -1
        if number < 0:
            expected = f"a class's number or its name ({', '.join(labels[:3])}, ...)" if labels else "a class's number"
            raise ConfigError(f"label '{name}', row {first + row}: expected {expected}, got {text!r}")
        found[row] = number
    return found
