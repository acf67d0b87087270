"""Captures on disk: what a server has written, whole directories of it or single files, also while it writes on. Blocking."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from headrace.capture.records import Array, Captured, CapturedTensor, CaptureError, read_records

PATTERN = f"capture-{'[0-9]' * 8}-*.msgpack"
"""Names of ring files, which are numbered in the order of their making."""


@dataclass(slots=True)
class Contents:
    """What is in a capture: requests by model and version, and the files that end before their last byte, with the reason."""

    requests: dict[tuple[str, int], int] = field(default_factory=dict)
    cuts: list[str] = field(default_factory=list)

    @property
    def models(self) -> list[str]:
        return sorted({model for model, _ in self.requests})


def capture_files(path: Path) -> list[Path]:
    """A file itself, or the ring files of a directory, oldest first. Raises CaptureError where there are none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CaptureError(f"{path}: expected a capture's directory or one of its files, found nothing")
    files = sorted(path.glob(PATTERN))
    if not files:
        raise CaptureError(f"{path}: expected files named capture-*.msgpack, found none: nothing was captured yet")
    return files


def read_capture(path: Path, on_cut: Callable[[str], None] = lambda reason: None) -> Iterator[Captured]:
    """Every captured request, oldest first, one at a time in memory. Raises CaptureError.

    `on_cut` is told of what cannot be read, which ends a file and not the capture: a crash, or a server that is just writing it.
    """
    for file in capture_files(path):
        try:
            with file.open("rb") as opened:
                yield from read_records(opened, file.name, on_cut)
        except FileNotFoundError:
            continue  # the ring has gone on meanwhile
        except OSError as error:
            raise CaptureError(f"{file}: {error.strerror}") from None


def list_contents(path: Path) -> Contents:
    """Reads all of it once. Raises CaptureError."""
    contents = Contents()
    for captured in read_capture(path, contents.cuts.append):
        key = (captured.model, captured.version)
        contents.requests[key] = contents.requests.get(key, 0) + 1
    return contents


def read_arrays(path: Path, model: str, version: int | None = None) -> Iterator[tuple[Mapping[str, Array], Mapping[str, Array], int]]:
    """Inputs and outputs by name, and the rows, of each captured request of a model; of all its versions where none is given.

    Redacted tensors are not among them. Arrays are as backends have them: BYTES are objects, BF16 16-bit patterns. They are read-only.
    Raises CaptureError.
    """
    for captured in read_capture(path):
        if captured.model == model and version in (None, captured.version):
            yield arrays_of(captured.inputs), arrays_of(captured.outputs), captured.rows


def arrays_of(tensors: tuple[CapturedTensor, ...]) -> dict[str, Array]:
    """By name, without the redacted ones."""
    arrays = {tensor.name: tensor.array() for tensor in tensors}
    return {name: array for name, array in arrays.items() if array is not None}
