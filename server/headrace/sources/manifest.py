"""manifest.json: what a published version consists of, and where it comes from. Blocking; never on the event loop.

A version directory with a manifest is complete by construction, because it is written last and moved into place with the rest;
and it is exactly what was published, because every file is checked against it before it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast

from headrace.errors import LoadError
from headrace.signature import DataType, TensorSpec

MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "manifest.json.sig"
FORMAT_VERSION = 1
CHUNK_BYTES = 1 << 20
LARGEST_MANIFEST = 16 << 20
"""Some hundred thousand files. A bound, because the file is read whole before anything of it is trusted."""

DATATYPES = {datatype.value: datatype for datatype in DataType}
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class FileEntry:
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class ModelTensors:
    """The tensors as clients see them without further configuration."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """`files`: path relative to the version directory, with `/`. `created` is UTC in ISO 8601. None: not known."""

    model: str
    version: int
    created: str
    files: Mapping[str, FileEntry]
    signature: ModelTensors | None = None
    parent_version: int | None = None
    git_commit: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.files.values())


# -- to and from bytes -------------------------------------------------------------------------------------------------


def encode_manifest(manifest: Manifest) -> bytes:
    table = {
        "format_version": FORMAT_VERSION,
        "model": manifest.model,
        "version": manifest.version,
        "created": manifest.created,
        "files": {path: {"sha256": entry.sha256, "size": entry.size} for path, entry in sorted(manifest.files.items())},
        "signature": manifest.signature and {"inputs": _tables(manifest.signature.inputs), "outputs": _tables(manifest.signature.outputs)},
        "parent_version": manifest.parent_version,
        "git_commit": manifest.git_commit,
        "metadata": dict(manifest.metadata),
    }
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()


def decode_manifest(raw: bytes, place: str) -> Manifest:
    """Raises LoadError that names `place` and the key. Keys that are not known are left to later versions of this format."""
    try:
        table = json.loads(raw, object_pairs_hook=_refuse_repeated_keys)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{place}: not valid JSON: {error}") from None
    if type(table) is not dict:
        raise LoadError(f"{place}: expected a JSON object, got {_brief(table)}")
    keys = _Table(table, place)
    number = keys.get("format_version", int)
    if number != FORMAT_VERSION:
        raise LoadError(f"{place}: format_version: expected {FORMAT_VERSION}, got {number}; this Headrace cannot read it")
    signature = keys.find("signature", dict)
    return Manifest(
        model=keys.get("model", str),
        version=keys.count("version"),
        created=keys.find("created", str) or "",
        files=_read_files(keys.get("files", dict), f"{place}: files"),
        signature=_read_tensors(signature, f"{place}: signature") if signature is not None else None,
        parent_version=keys.count("parent_version") if table.get("parent_version") is not None else None,
        git_commit=keys.find("git_commit", str),
        metadata=_read_metadata(keys.find("metadata", dict) or {}, f"{place}: metadata"),
    )


@dataclass(frozen=True, slots=True)
class _Table:
    """One JSON object whose values are fetched with their type. `place` begins the error."""

    values: Mapping[str, Any]
    place: str

    def get(self, key: str, kind: type[Value]) -> Value:
        if key not in self.values:
            raise LoadError(f"{self.place}: expected key '{key}'")
        return _typed(self.values[key], kind, f"{self.place}: {key}")

    def find(self, key: str, kind: type[Value]) -> Value | None:
        return None if self.values.get(key) is None else self.get(key, kind)

    def count(self, key: str) -> int:
        value = self.get(key, int)
        if value < 0:
            raise LoadError(f"{self.place}: {key}: expected at least 0, got {value}")
        return value


def _typed(value: object, kind: type[Value], place: str) -> Value:
    if type(value) is not kind:  # not isinstance: True is no number
        words = {str: "a string", int: "a whole number", dict: "an object", list: "a list", bool: "true or false"}
        raise LoadError(f"{place}: expected {words[kind]}, got {_brief(value)}")
    if isinstance(value, str):
        _check_text(value, place)
    return value


def _check_text(text: str, place: str) -> None:
    """JSON can spell half a surrogate pair, which neither a file name nor a log line can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise LoadError(f"{place}: expected valid Unicode, got {ascii(text)[:80]}") from None


def _brief(value: object) -> str:
    return json.dumps(value)[:80]


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ in which one counts, so that one file could mean two things."""
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!a} is there twice")
    return table


def _read_files(table: Mapping[str, Any], place: str) -> dict[str, FileEntry]:
    if not table:
        raise LoadError(f"{place}: expected at least one file")
    files = {}
    for path, entry in table.items():
        _check_path(path, place)
        keys = _Table(_typed(entry, dict, f"{place}: '{path}'"), f"{place}: '{path}'")
        digest = keys.get("sha256", str)
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise LoadError(f"{place}: '{path}': sha256: expected 64 hexadecimal digits, got {_brief(digest)}")
        files[path] = FileEntry(digest, keys.count("size"))
    return files


def _check_path(path: str, place: str) -> None:
    _check_text(path, place)
    parts = path.split("/")
    if "" in parts or "." in parts or ".." in parts or "\0" in path or path in (MANIFEST_NAME, SIGNATURE_NAME):
        raise LoadError(f"{place}: expected paths inside the version directory, got {_brief(path)}")


def _read_tensors(table: Mapping[str, Any], place: str) -> ModelTensors:
    keys = _Table(table, place)
    inputs, outputs = (
        tuple(_read_tensor(each, f"{place}: {kind}") for each in keys.get(kind, cast("type[list[Any]]", list)))
        for kind in ("inputs", "outputs")
    )
    return ModelTensors(inputs, outputs)


def _read_tensor(value: object, place: str) -> TensorSpec:
    keys = _Table(_typed(value, dict, place), place)
    datatype = keys.get("datatype", str)
    if datatype not in DATATYPES:
        raise LoadError(f"{place}: datatype: expected one of {', '.join(DATATYPES)}, got {_brief(datatype)}")
    shape = tuple(_typed(dim, int, f"{place}: shape") for dim in keys.get("shape", cast("type[list[Any]]", list)))
    return TensorSpec(keys.get("name", str), DATATYPES[datatype], shape, keys.find("optional", bool) or False)


def _tables(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    return [
        {"name": s.name, "datatype": s.datatype.value, "shape": list(s.shape)} | ({"optional": True} if s.optional else {}) for s in specs
    ]


def _read_metadata(table: Mapping[str, Any], place: str) -> dict[str, str]:
    for key in table:
        _check_text(key, place)
    return {key: _typed(value, str, f"{place}: {key}") for key, value in table.items()}


# -- on disk -----------------------------------------------------------------------------------------------------------


def has_manifest(directory: Path) -> bool:
    return os.path.lexists(directory / MANIFEST_NAME)


def read_manifest(directory: Path) -> Manifest:
    return decode_manifest(read_small_file(directory, MANIFEST_NAME), f"{place_of(directory)}/{MANIFEST_NAME}")


def is_copied_whole(directory: Path) -> bool:
    """Whether there is a manifest and nothing of what it names is missing or shorter: a copy by rsync brings it before the rest.

    Looks at sizes only. Everything else that can be wrong is for `verify_files` to say.
    """
    if not has_manifest(directory):
        return False
    try:
        files = read_manifest(directory).files
        return all((directory / path).lstat().st_size >= entry.size for path, entry in files.items())
    except (LoadError, OSError):
        return False


def write_manifest(directory: Path, manifest: Manifest) -> bytes:
    """The bytes written, which are what a signature is made over. They are on disk when this returns."""
    raw = encode_manifest(manifest)
    write_durably(directory / MANIFEST_NAME, raw)
    return raw


def write_durably(path: Path, raw: bytes) -> None:
    with path.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


def read_small_file(directory: Path, name: str) -> bytes:
    """A manifest or a signature, which are never links and never large. Raises LoadError."""
    place = f"{place_of(directory)}/{name}"
    try:
        with open(_open_regular(directory / name, place), "rb") as file:
            raw = file.read(LARGEST_MANIFEST + 1)
    except OSError as error:
        raise LoadError(f"{place}: cannot be read: {error.strerror}") from None
    if len(raw) > LARGEST_MANIFEST:
        raise LoadError(f"{place}: expected at most {LARGEST_MANIFEST} bytes, got more")
    return raw


def place_of(directory: Path) -> str:
    """A version directory as messages call it: model and version, without where on the machine that is."""
    return f"{directory.parent.name}/{directory.name}"


# -- verification ------------------------------------------------------------------------------------------------------


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Raises LoadError for the first file that is not what the manifest says.

    Presence, kinds and sizes first, since they cost nothing, then the digests: (1) a file that the manifest does not name,
    (2) one that it names and that is missing, (3) anything but a plain file, (4) another size, (5) another sha256.
    Empty directories do not count.
    """
    place = place_of(directory)
    try:
        found = dict(_walk(directory, PurePosixPath()))
        for path in sorted({*found, *manifest.files}):
            _check_presence(path, found.get(path), manifest, place)
        for path in sorted(manifest.files):
            _check_digest(directory / path, manifest.files[path], f"{place}/{path}")
    except OSError as error:
        raise LoadError(f"{place}: cannot be verified: {error.strerror}: {Path(error.filename or place).name!a}") from None


def _walk(directory: Path, below: PurePosixPath) -> Iterator[tuple[str, os.stat_result]]:
    """Everything but directories, and but the manifest and its signature. Links are not followed."""
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = below / entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(directory / entry.name, path)
            elif str(path) not in (MANIFEST_NAME, SIGNATURE_NAME):
                yield str(path), entry.stat(follow_symlinks=False)


def _check_presence(path: str, found: os.stat_result | None, manifest: Manifest, place: str) -> None:
    entry = manifest.files.get(path)
    if entry is None:
        raise LoadError(f"{place}: file {_brief(path)} is not in {MANIFEST_NAME}")
    subject = f"{place}/{path}"
    if found is None:
        raise LoadError(f"{subject}: is in {MANIFEST_NAME} but missing")
    if not stat.S_ISREG(found.st_mode):
        raise LoadError(f"{subject}: expected a plain file, got {'a symbolic link' if stat.S_ISLNK(found.st_mode) else 'a special file'}")
    if found.st_size != entry.size:
        raise LoadError(f"{subject}: expected {entry.size} bytes as {MANIFEST_NAME} says, got {found.st_size}")


def _check_digest(path: Path, entry: FileEntry, subject: str) -> None:
    digest, size = hashlib.sha256(), 0
    with open(_open_regular(path, subject), "rb", buffering=0) as file:
        # Not DONTNEED afterwards: the pages that were hashed are those that the backend loads next.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    if (digest.hexdigest(), size) != (entry.sha256, entry.size):
        raise LoadError(f"{subject}: expected sha256 {entry.sha256} as {MANIFEST_NAME} says, got {digest.hexdigest()}")


def _open_regular(path: Path, subject: str) -> int:
    """O_NONBLOCK: opening a named pipe would wait for its writer."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise LoadError(f"{subject}: expected a plain file")
    return descriptor
