from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from headrace.errors import ConfigError
from headrace.profiling.data_files import ONLY, read_chunks


def columns(path: Path, rows: int = 2) -> dict[str, list[object]]:
    """All rows, read in chunks of so many."""
    found: dict[str, list[object]] = {}
    progress = 0.0
    for chunk, part in read_chunks(path, rows):
        assert progress < part <= 1
        progress = part
        for name, array in chunk.items():
            assert 0 < len(array) <= rows
            found.setdefault(name, []).extend(array.tolist())
    assert progress == 1
    return found


def test_arrays_of_numpy_are_read_in_chunks(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(6).reshape(3, 2), y=np.array(["a", "b", "c"]))
    np.save(tmp_path / "b.npy", np.arange(3))
    assert columns(tmp_path / "a.npz") == {"x": [[0, 1], [2, 3], [4, 5]], "y": ["a", "b", "c"]}
    assert columns(tmp_path / "b.npy") == {ONLY: [0, 1, 2]}


def test_csv_is_read_in_chunks_with_quotes_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes('\ufeffx,name\n1,"a, b"\n\n2.5,"line\nbreak"\n,c\n'.encode())
    assert columns(tmp_path / "a.csv") == {"x": ["1", "2.5", ""], "name": ["a, b", "line\nbreak", "c"]}


def test_parquet_has_null_as_missing_and_lists_as_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = {"x": [1.5, None, 3.0], "word": ["a", None, "c"], "row": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]}
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    found = columns(tmp_path / "a.parquet")
    assert np.isnan(found["x"][1])  # type: ignore[arg-type]  # a number
    assert (found["word"], found["row"]) == (["a", "", "c"], [[1, 2], [3, 4], [5, 6]])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"", r"expected a file that ends with .npz, .npy, .csv, .parquet"),
        ("a.csv", b"", "expected a first line with the columns' names, each once, got nothing"),
        ("a.csv", b"x,x\n1,2\n", "each once, got"),
        ("a.csv", b"x,y\n1,2\n3\n", "line 3: expected 2 values as the first line has, got 1"),
        ("a.csv", b"x\n\xff\n", "line 2: expected UTF-8, byte 0 is not"),
        ("a.npz", b"PK\x03\x04", "expected arrays"),
        ("a.npy", b"\x93NUMPY", "expected arrays"),
        ("a.parquet", b"PAR1", "expected a Parquet file"),
        ("missing.csv", None, "No such file or directory"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        list(read_chunks(tmp_path / name))


def test_pickled_objects_are_not_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ConfigError, match="expected arrays of numbers or text"):
        list(read_chunks(tmp_path / "a.npy"))


def test_arrays_with_different_numbers_of_rows_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3), y=np.zeros(2))
    with pytest.raises(ConfigError, match=r"the same number of rows, at least one, got x \[3\], y \[2\]"):
        list(read_chunks(tmp_path / "a.npz"))
