"""A look at a version's files before any memory is taken for it. Blocking."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from headrace.backends.base import ArtifactSignature, BackendRegistry, select_file
from headrace.config import ModelConfig
from headrace.drift.reference import Reference
from headrace.drift.reference_file import FILENAME
from headrace.errors import LoadError
from headrace.lifecycle.effective import EffectiveModel, resolve_model
from headrace.lifecycle.memory import available_memory
from headrace.lifecycle.recorded import Recorded, read_recorded
from headrace.lifecycle.value_checks import make_checks
from headrace.model_files import read_reference
from headrace.sources.base import Fetched
from headrace.sources.manifest import Manifest
from headrace.sources.verification import verify_version


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a look at the files tells. Bytes: `needed` to load it (an upper bound), `available` at that time, on its devices too.
    `digest` is the manifest's sha256; both it and the manifest are there for published versions only."""

    effective: EffectiveModel
    needed: int
    available: int
    digest: str
    manifest: Manifest | None
    recorded: Recorded = ()
    reference: Reference | None = None
    is_signed: bool = False


def inspect(config: ModelConfig, fetched: Fetched, backends: BackendRegistry, known: ArtifactSignature | None = None) -> Inspection:
    """Nothing of the artifact is parsed before it is known to be what was published. Blocking."""
    directory = fetched.version_directory
    verified = verify_version(config, fetched.model_directory, directory)
    effective = resolve_model(config, fetched.model_directory, directory, backends, known, is_signed=verified.is_signed)
    backend = backends[effective.backend]
    needed = backend.estimate_memory(select_file(directory, effective.filename)) * effective.instances.count
    spaces = backend.devices(effective.instances.device)
    available = min([available_memory(), *([sum(space.free for space in spaces)] if spaces else [])])
    recorded = read_recorded(effective.signature, fetched.model_directory, directory)
    reference = _read_reference(effective, directory)
    # What it says of values is known to make sense before anything is loaded.
    make_checks(effective, reference, lambda *_: None)
    return Inspection(effective, needed, available, verified.digest, verified.manifest, recorded, reference, is_signed=verified.is_signed)


def _read_reference(effective: EffectiveModel, directory: Path) -> Reference | None:
    """Also looked for here, and not where it is used, so that a wrong one is known before anything is loaded."""
    wanted = effective.config.drift.reference
    if wanted not in ("auto", "file"):
        return None
    reference = read_reference(directory, effective.signature)
    if reference is None and wanted == "file":
        raise LoadError(f"[drift] reference 'file': expected {FILENAME} beside the model's file, found none")
    return reference
