"""Whether a version directory is what was published, and by whom, asked before anything of it is loaded. Blocking."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from headrace.config import ModelConfig
from headrace.errors import LoadError
from headrace.sources.manifest import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    Manifest,
    decode_manifest,
    has_manifest,
    place_of,
    read_small_file,
    verify_files,
)
from headrace.sources.signing import check_signature
from headrace.telemetry.log import get_logger

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Verified:
    """The manifest and its sha256, where there is one; `is_signed`: by the model's signature_key, and found to be so."""

    manifest: Manifest | None = None
    digest: str = ""
    is_signed: bool = False


def verify_version(config: ModelConfig, model_directory: Path, version_directory: Path) -> Verified:
    """Raises LoadError.

    A directory without a manifest was put there by hand and is taken as it is, unless the model requires signatures.
    """
    raw = read_small_file(version_directory, MANIFEST_NAME) if has_manifest(version_directory) else None
    is_signed = False
    if config.signature_policy != "off":
        try:
            _check_signed(config, model_directory, version_directory, raw)
            is_signed = True
        except LoadError as error:
            if config.signature_policy == "require":
                raise
            log.warning("signature not valid", model=config.name, version=version_directory.name, reason=str(error))
    if raw is None:
        return Verified()
    manifest = _decode(version_directory, raw)
    verify_files(version_directory, manifest)
    return Verified(manifest, hashlib.sha256(raw).hexdigest(), is_signed)


def _check_signed(config: ModelConfig, model_directory: Path, version_directory: Path, raw: bytes | None) -> None:
    """That the signature is valid, and that it is of this version and no other: an old one must not come back as a new one."""
    place = place_of(version_directory)
    if raw is None:
        raise LoadError(f"{place}: expected {MANIFEST_NAME} and its signature, as signature_policy is '{config.signature_policy}'")
    if not os.path.lexists(version_directory / SIGNATURE_NAME):
        raise LoadError(f"{place}: expected {SIGNATURE_NAME}, as signature_policy is '{config.signature_policy}'")
    key = _read_key(model_directory, config.signature_key)
    check_signature(raw, read_small_file(version_directory, SIGNATURE_NAME), key, f"{place}/{SIGNATURE_NAME}", config.signature_key)
    manifest = _decode(version_directory, raw)
    if (manifest.model, str(manifest.version)) != (config.name, version_directory.name):
        raise LoadError(f"{place}/{MANIFEST_NAME}: signed for {manifest.model}:{manifest.version}, expected this model and version")


def _decode(version_directory: Path, raw: bytes) -> Manifest:
    return decode_manifest(raw, f"{place_of(version_directory)}/{MANIFEST_NAME}")


def _read_key(directory: Path, name: str) -> bytes:
    """The key lies beside model.toml: not in a version, whose publisher could bring their own, and not elsewhere."""
    path = directory / name
    if Path(name).name != name or not path.resolve().is_relative_to(directory.resolve()):
        raise LoadError(f"signature_key '{name}': expected a file beside model.toml")
    try:
        return path.read_bytes()
    except OSError as error:
        raise LoadError(f"signature_key '{name}': {error.strerror}") from None
