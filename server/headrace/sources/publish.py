"""`headrace publish`: a model becomes a version in a repository, whole or not at all. Blocking; used by the command line only.

Staged and inspected in a local directory, .staging-…, a name that no source takes for a version; committed by the destination.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.backends.base import BackendRegistry
from headrace.config import ModelConfig
from headrace.drift.reference_file import FILENAME as REFERENCE_FILE
from headrace.errors import AlreadyExists, ConfigError, LoadError
from headrace.lifecycle.effective import resolve_model
from headrace.model_files import load_model_config, read_reference
from headrace.sources.base import Destination, is_version_name
from headrace.sources.manifest import (
    CHUNK_BYTES,
    MANIFEST_NAME,
    SIGNATURE_NAME,
    FileEntry,
    Manifest,
    ModelTensors,
    write_durably,
    write_manifest,
)
from headrace.sources.signing import load_private_key, sign

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

STAGING_PREFIX = ".staging-"
LARGEST_VERSION = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Order:
    """What to publish, and as what. `version` None: the next free one. `reference`: the drift reference that goes with it."""

    artifact: Path
    model: str
    version: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    signing_key: Path | None = None
    reference: Path | None = None

    def __post_init__(self) -> None:
        _check_model_name(self.model)
        if self.version is not None and not 1 <= self.version <= LARGEST_VERSION:
            raise ConfigError(f"--version: expected a number from 1, got {self.version}")


@dataclass(frozen=True, slots=True)
class Published:
    manifest: Manifest
    location: str
    is_signed: bool

    def table(self) -> dict[str, Any]:
        """For machines."""
        return {
            "model": self.manifest.model,
            "version": self.manifest.version,
            "location": self.location,
            "files": {path: {"sha256": entry.sha256, "size": entry.size} for path, entry in self.manifest.files.items()},
            "signed": self.is_signed,
            "parent_version": self.manifest.parent_version,
            "git_commit": self.manifest.git_commit,
        }

    def __str__(self) -> str:
        count = len(self.manifest.files)
        files = f"{count} file{'s' if count > 1 else ''}, {self.manifest.size} bytes"
        name = f"{self.manifest.model}:{self.manifest.version}"
        return f"published {name} to {self.location}: {files}{', signed' if self.is_signed else ''}"


def publish(order: Order, destination: Destination, backends: BackendRegistry) -> Published:
    """Raises ConfigError for a wrong order, LoadError for a model that cannot be served, AlreadyExists, and OSError.

    Whatever it raises, KeyboardInterrupt too, nothing of the attempt is left.
    """
    key = load_private_key(order.signing_key) if order.signing_key else None
    with destination.open_model(order.model) as directory:
        _refuse_existing(order, destination)
        with _staging(directory) as staging:
            config = load_model_config(directory, order.model)
            files = copy_artifact(order, config, directory, staging, backends)
            tensors = _inspect(order, config, directory, staging, backends)
            return _give_number(order, destination, staging, files, tensors, key)


def _check_model_name(name: str) -> None:
    """What a source would pass over or misread as a version cannot be published."""
    is_plain = name.isprintable() and "/" not in name and name == name.strip()
    if not is_plain or not name or name.startswith((".", "_")) or is_version_name(name):
        raise ConfigError(f"--name: expected a directory name that is no number and does not start with '.' or '_', got {name!a}")


# -- places ------------------------------------------------------------------------------------------------------------


@contextmanager
def _staging(directory: Path) -> Iterator[Path]:
    """Not by tempfile, whose directories only their owner can read: the server may be another user."""
    path = directory / (STAGING_PREFIX + secrets.token_hex(8))
    try:
        path.mkdir()
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)  # after the rename there is nothing of that name


def _refuse_existing(order: Order, destination: Destination) -> None:
    if order.version is not None and order.version in destination.numbers(order.model):
        raise AlreadyExists(f"{order.model}:{order.version} exists in {destination.uri}; a published version is never overwritten")


# -- the copy ----------------------------------------------------------------------------------------------------------


def copy_artifact(order: Order, config: ModelConfig, directory: Path, staging: Path, backends: BackendRegistry) -> dict[str, FileEntry]:
    """The files in `staging`, on disk, with the digests of what was copied."""
    source = order.artifact
    if source.is_dir():
        if directory.resolve().is_relative_to(source.resolve()):
            raise ConfigError(f"{source}: expected a directory without the repository in it, {directory} is")
        files = {str(path.relative_to(source)): path for path in _files_below(source)}
        if not files:
            raise ConfigError(f"{source}: expected the files of a model, found none")
    elif source.exists():
        files = {_name_in_version(order, config, backends): source}
    else:
        raise ConfigError(f"{source}: expected a model file or a directory, found nothing")
    if order.reference is not None:
        if not order.reference.is_file():
            raise ConfigError(f"--reference: expected a file, found none at {order.reference}")
        files[REFERENCE_FILE] = order.reference
    entries = {}
    for name, path in sorted(files.items()):
        target = staging / name
        target.parent.mkdir(parents=True, exist_ok=True)
        entries[Path(name).as_posix()] = _copy_file(path, target)
    return entries


def _files_below(source: Path) -> Iterator[Path]:
    """Hidden files are the tools' and not the model's; an earlier manifest is replaced by a new one. Links to files are
    followed, since download caches consist of them; links to directories may go round in circles."""
    for child in sorted(source.iterdir()):
        if child.name.startswith(".") or child.name in (MANIFEST_NAME, SIGNATURE_NAME):
            continue
        if child.name in ("model.toml", "config.pbtxt"):
            raise ConfigError(f"{child}: belongs into the model's directory, beside its versions; publish the version's files alone")
        _check_file_name(child)
        if child.is_dir() and child.is_symlink():
            raise ConfigError(f"{child}: expected files and directories, found a link to a directory")
        if child.is_dir():
            yield from _files_below(child)
        elif child.is_file():
            yield child
        else:
            raise ConfigError(f"{child}: expected a file, found a dangling link or a special file")


def _check_file_name(path: Path) -> None:
    try:
        path.name.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{str(path)!a}: expected a file name in UTF-8") from None


def _name_in_version(order: Order, config: ModelConfig, backends: BackendRegistry) -> str:
    """A single file gets the name under which the server looks for it."""
    if config.filename:
        return Path(config.filename).name
    known = {backend.default_filename for name, backend in backends.items() if config.backend in (None, name)}
    found = sorted(name for name in known if Path(name).suffix == order.artifact.suffix)
    if len(found) != 1:
        kinds = ", ".join(sorted(Path(name).suffix for name in known)) or "nothing: no backend is installed"
        raise ConfigError(f"{order.artifact}: expected a file that ends with {kinds}; or publish a directory")
    return found[0]


def _copy_file(source: Path, target: Path) -> FileEntry:
    """The digest is of the bytes that were written, so that a source that changes meanwhile cannot make it wrong."""
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(CHUNK_BYTES):
            writer.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return FileEntry(digest.hexdigest(), size)


def _inspect(order: Order, config: ModelConfig, directory: Path, staging: Path, backends: BackendRegistry) -> ModelTensors:
    """As the server will see it, configuration included. Raises LoadError where it could not be served."""
    try:
        # Who signs it vouches for it, and it is as it will be found.
        signature = resolve_model(config, directory, staging, backends, is_signed=order.signing_key is not None).signature
        read_reference(staging, signature)
    except (ConfigError, LoadError) as error:
        place = f"{order.model}/{staging.name}"
        reason = str(error).replace(place, "the new version").replace(staging.name + "/", "")
    else:
        return ModelTensors(signature.inputs, signature.outputs)
    raise LoadError(f"{order.artifact} was not published: {reason}")


# -- the number --------------------------------------------------------------------------------------------------------


def _give_number(
    order: Order,
    destination: Destination,
    staging: Path,
    files: Mapping[str, FileEntry],
    tensors: ModelTensors,
    key: EllipticCurvePrivateKey | None,
) -> Published:
    """The manifest, then the commit. Somebody else may take the next free number meanwhile: then the one after it."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    commit = find_commit(order.artifact)
    while True:
        there = destination.numbers(order.model)
        version = order.version or max(there, default=0) + 1
        parent = max((number for number in there if number < version), default=None)
        manifest = Manifest(order.model, version, created, files, tensors, parent, commit, order.metadata)
        raw = write_manifest(staging, manifest)
        if key is not None:
            write_durably(staging / SIGNATURE_NAME, sign(raw, key))
        location = destination.commit(order.model, version, staging)
        if location is not None:
            return Published(manifest, location, key is not None)
        _refuse_existing(order, destination)


def find_commit(artifact: Path) -> str | None:
    """Of the working tree that the artifact lies in; None where there is none, or no git."""
    folder = artifact if artifact.is_dir() else artifact.parent
    try:
        done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    commit = done.stdout.strip()
    return commit if done.returncode == 0 and len(commit) in (40, 64) else None
