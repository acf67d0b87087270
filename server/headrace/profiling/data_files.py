"""Rows of data out of files, a chunk at a time: .npz, .npy, .csv, .parquet. Blocking.

A chunk is a map of names to arrays with as many rows each: the tensors or the columns of the file. A cell of text stays text: what it
is to become is known by the model's signature (rows.py).
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.errors import ConfigError

Array = NDArray[Any]
Chunk = Mapping[str, Array]

CHUNK_ROWS = 4096
ONLY = ""
"""The name of the one array that a .npy has."""


def read_chunks(path: Path, rows: int = CHUNK_ROWS) -> Iterator[tuple[Chunk, float]]:
    """(a chunk, how much of the file is read by then, 0 to 1). Raises ConfigError for what cannot be read."""
    readers: Mapping[str, Callable[[Path, int], Iterator[tuple[Chunk, float]]]] = {
        ".npz": _read_arrays,
        ".npy": _read_arrays,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"{path}: expected a file that ends with {', '.join(readers)}")
    try:
        yield from reader(path, rows)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None


def digest(path: Path) -> str:
    """sha256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_arrays(path: Path, rows: int) -> Iterator[tuple[Chunk, float]]:
    try:
        with path.open("rb") as file:
            # Never pickled: data is not to be code.
            loaded = np.load(file, allow_pickle=False)
            arrays = {ONLY: loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{path}: expected arrays of numbers or text as numpy writes them, got: {error}") from None
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    total = max(counts.values(), default=0)
    if set(counts.values()) != {total} or not total:
        found = ", ".join(f"{name or 'the array'} {list(array.shape)}" for name, array in arrays.items()) or "no array"
        raise ConfigError(f"{path}: expected arrays with the same number of rows, at least one, got {found}")
    for start in range(0, total, rows):
        yield {name: array[start : start + rows] for name, array in arrays.items()}, min(start + rows, total) / total


def _read_csv(path: Path, rows: int) -> Iterator[tuple[Chunk, float]]:
    size = max(path.stat().st_size, 1)
    with path.open("rb") as raw:
        lines = (_decode(line, path, number) for number, line in enumerate(raw, start=1))
        reader = csv.reader(lines, strict=True)
        names = _read_names(reader, path)
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"{path}: expected a first line with the columns' names, each once, got {names or 'nothing'}")
        try:
            while chunk := list(itertools.islice(_whole(reader, len(names), path), rows)):
                columns = zip(*chunk, strict=True)
                yield {name: np.array(column, object) for name, column in zip(names, columns, strict=True)}, raw.tell() / size
        except csv.Error as error:
            raise ConfigError(f"{path}: line {reader.line_num}: expected comma-separated values: {error}") from None


def _read_names(reader: Any, path: Path) -> list[str]:
    try:
        return [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise ConfigError(f"{path}: line 1: expected comma-separated values: {error}") from None


def _decode(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: line {number}: expected UTF-8, byte {error.start} is not") from None


def _whole(reader: Any, width: int, path: Path) -> Iterator[list[str]]:
    for cells in reader:
        if not cells:
            continue  # an empty line
        if len(cells) != width:
            raise ConfigError(f"{path}: line {reader.line_num}: expected {width} values as the first line has, got {len(cells)}")
        yield cells


def _read_parquet(path: Path, rows: int) -> Iterator[tuple[Chunk, float]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(f"{path}: Parquet needs pyarrow: pip install 'headrace[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            total, done = max(file.metadata.num_rows, 1), 0
            twice = [name for name in file.schema_arrow.names if file.schema_arrow.names.count(name) > 1]
            if twice:
                raise ConfigError(f"{path}: expected each column once, got '{twice[0]}' twice")
            for batch in file.iter_batches(rows):
                done += batch.num_rows
                yield {name: _as_array(batch.column(name), f"{path}: column '{name}'") for name in batch.schema.names}, done / total
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path}: expected a Parquet file, got: {error}") from None


def _as_array(column: Any, where: str) -> Array:
    """Numbers with NaN for null; text as it is; lists of one length as a second dimension."""
    array = column.to_numpy(zero_copy_only=False)
    if array.dtype == object and len(array) and isinstance(next((each for each in array if each is not None), None), np.ndarray):
        if len({len(each) if each is not None else -1 for each in array}) != 1:
            raise ConfigError(f"{where}: expected lists of one length, without null")
        return np.stack(array)
    if array.dtype == object:
        array = np.array(["" if each is None else each for each in array], object)
    return np.asarray(array)
