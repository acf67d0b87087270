"""What an object store holds of models, and headrace-index.json, which says so in one object. Pure.

    <prefix>/headrace-index.json             the index: swapped whole, by a conditional write
    <prefix>/<model>/model.toml, labels, …   what all versions share
    <prefix>/<model>/<version>/manifest.json uploaded after the version's files
    <prefix>/<model>/.claim-<version>        somebody is publishing that version now

The index, format 1:

    {"format_version": 1,
     "models": {"<model>": {
       "versions": {"<version>": {"manifest": {"sha256": "…", "size": 812}}},
       "files": {"model.toml": {"etag": "…", "size": 57, "sha256": "…"}}}}}

A version that was there before the index was and has no manifest is listed with its files instead: {"files": {"model.onnx": {"etag":
"…", "size": 4711}}}. `sha256` of a file is left out where nobody has read it yet. Keys that are not known are left to later versions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from headrace.errors import LoadError
from headrace.model_files import CONFIG_FILES
from headrace.sources.base import is_version_name
from headrace.sources.manifest import FileEntry

INDEX_NAME = "headrace-index.json"
FORMAT_VERSION = 1
CLAIM_PREFIX = ".claim-"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """`etag` is the store's name of the content; what it is made from is the store's affair. `sha256` empty: not known."""

    etag: str
    size: int
    sha256: str = ""
    changed_at: float = 0.0


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """`manifest` None, in an index: without one. `files`: path within the version; empty where the manifest says it all."""

    manifest: FileEntry | None = None
    files: Mapping[str, StoredFile] = field(default_factory=dict)

    @property
    def changed_at(self) -> float:
        return max((file.changed_at for file in self.files.values()), default=0.0)


@dataclass(frozen=True, slots=True)
class StoredModel:
    versions: Mapping[int, StoredVersion]
    files: Mapping[str, StoredFile] = field(default_factory=dict)


Models = Mapping[str, StoredModel]


def group_objects(objects: Iterable[tuple[str, StoredFile]]) -> dict[str, StoredModel]:
    """Models with at least one version, from everything below the prefix. Hidden names are nobody's model, version or file, and
    claimed versions are not there yet."""
    beside: dict[str, dict[str, StoredFile]] = {}
    versions: dict[str, dict[int, dict[str, StoredFile]]] = {}
    claims: set[tuple[str, str]] = set()
    for path, file in objects:
        model, *rest = path.split("/")
        if not rest or model.startswith((".", "_")) or is_version_name(model):
            continue
        if len(rest) > 1 and is_version_name(rest[0]) and rest[-1]:  # a name that ends with / is some tool's directory
            versions.setdefault(model, {}).setdefault(int(rest[0]), {})["/".join(rest[1:])] = file
        elif len(rest) == 1 and rest[0].startswith(CLAIM_PREFIX):
            claims.add((model, rest[0].removeprefix(CLAIM_PREFIX)))
        elif len(rest) == 1 and rest[0] and not rest[0].startswith((".", "_")):
            beside.setdefault(model, {})[rest[0]] = file
    models = {}
    for model, found in versions.items():
        free = {number: StoredVersion(None, files) for number, files in found.items() if (model, str(number)) not in claims}
        if free:
            models[model] = StoredModel(free, beside.get(model, {}))
    return models


def version_token(version: StoredVersion, served_with: str, beside: Mapping[str, StoredFile]) -> str:
    """The same whether the version was found in the index or by listing, so that the first index loads nothing again."""
    digest = hashlib.sha256(served_with.encode())
    if version.manifest is not None:
        digest.update(version.manifest.sha256.encode())
    else:
        digest.update(_lines(version.files))
    digest.update(_lines({name: file for name, file in beside.items() if name not in CONFIG_FILES}))
    return digest.hexdigest()[:16]


def _lines(files: Mapping[str, StoredFile]) -> bytes:
    return b"".join(f"\n{path}\0{file.size}\0{file.etag}".encode() for path, file in sorted(files.items()))


# -- to and from bytes -------------------------------------------------------------------------------------------------


def encode_index(models: Models) -> bytes:
    table = {
        "format_version": FORMAT_VERSION,
        "models": {
            name: {
                "versions": {str(number): _version_table(version) for number, version in sorted(model.versions.items())},
                "files": {path: _file_table(file) for path, file in sorted(model.files.items())},
            }
            for name, model in sorted(models.items())
        },
    }
    return (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode()


def _version_table(version: StoredVersion) -> dict[str, Any]:
    if version.manifest is not None:
        return {"manifest": {"sha256": version.manifest.sha256, "size": version.manifest.size}}
    return {"files": {path: _file_table(file) for path, file in sorted(version.files.items())}}


def _file_table(file: StoredFile) -> dict[str, Any]:
    return {"etag": file.etag, "size": file.size} | ({"sha256": file.sha256} if file.sha256 else {})


def decode_index(raw: bytes) -> dict[str, StoredModel]:
    """Raises LoadError that names the index and the key."""
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{INDEX_NAME}: not valid JSON: {error}") from None
    number = _get(table, "format_version", int, INDEX_NAME)
    if number != FORMAT_VERSION:
        raise LoadError(f"{INDEX_NAME}: format_version: expected {FORMAT_VERSION}, got {number}; this Headrace cannot read it")
    models: dict[str, Any] = _get(table, "models", dict, INDEX_NAME)
    return {name: _read_model(entry, f"{INDEX_NAME}: {name!a}") for name, entry in models.items()}


def _read_model(entry: object, place: str) -> StoredModel:
    versions = {}
    for number, version in _get(entry, "versions", dict, place).items():
        if not is_version_name(number):
            raise LoadError(f"{place}: versions: expected numbers, got {number!a}")
        versions[int(number)] = _read_version(version, f"{place}: {number}")
    return StoredModel(versions, _read_files(_get(entry, "files", dict, place), place))


def _read_version(entry: object, place: str) -> StoredVersion:
    if isinstance(entry, dict) and "manifest" not in entry:
        return StoredVersion(None, _read_files(_get(entry, "files", dict, place), place))
    manifest = _get(entry, "manifest", dict, place)
    return StoredVersion(FileEntry(_get(manifest, "sha256", str, place), _get(manifest, "size", int, place)))


def _read_files(table: Mapping[str, object], place: str) -> dict[str, StoredFile]:
    return {
        path: StoredFile(
            _get(entry, "etag", str, f"{place}: {path!a}"),
            _get(entry, "size", int, f"{place}: {path!a}"),
            _get(entry, "sha256", str, f"{place}: {path!a}") if isinstance(entry, dict) and "sha256" in entry else "",
        )
        for path, entry in table.items()
    }


def _get(table: object, key: str, kind: type[Any], place: str) -> Any:
    if type(table) is not dict:
        raise LoadError(f"{place}: expected a JSON object, got {json.dumps(table)[:80]}")
    value = table.get(key)
    if type(value) is not kind:
        words = {str: "a string", int: "a whole number", dict: "an object"}
        raise LoadError(f"{place}: {key}: expected {words[kind]}, got {json.dumps(value)[:80]}")
    return value
