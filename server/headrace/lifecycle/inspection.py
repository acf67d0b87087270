"""A look at a version's files before any memory is taken for it. Blocking."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from headrace.backends.base import ArtifactSignature, BackendRegistry, select_file
from headrace.config import ModelConfig
from headrace.drift.reference import Reference
from headrace.drift.reference_file import FILENAME, MOST_BYTES, check_fits, decode
from headrace.errors import LoadError
from headrace.lifecycle.effective import EffectiveModel, resolve_model
from headrace.lifecycle.memory import available_memory
from headrace.lifecycle.recorded import Recorded, read_recorded
from headrace.sources.base import Fetched
from headrace.sources.manifest import Manifest
from headrace.sources.verification import verify_version


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a look at the files tells. Bytes: `needed` to load it (an upper bound), `available` at that time. `digest` is the
    manifest's sha256; both it and the manifest are there for published versions only."""

    effective: EffectiveModel
    needed: int
    available: int
    digest: str
    manifest: Manifest | None
    recorded: Recorded = ()
    reference: Reference | None = None


def inspect(config: ModelConfig, fetched: Fetched, backends: BackendRegistry, known: ArtifactSignature | None = None) -> Inspection:
    """Nothing of the artifact is parsed before it is known to be what was published. Blocking."""
    directory = fetched.version_directory
    manifest, digest = verify_version(config, fetched.model_directory, directory)
    effective = resolve_model(config, fetched.model_directory, directory, backends, known)
    needed = backends[effective.backend].estimate_memory(select_file(directory, effective.filename)) * effective.instances.count
    recorded = read_recorded(effective.signature, fetched.model_directory, directory)
    return Inspection(effective, needed, available_memory(), digest, manifest, recorded, read_reference(effective, directory))


def read_reference(effective: EffectiveModel, directory: Path) -> Reference | None:
    """The drift reference in a version's directory, None where there is none. Raises LoadError for one that is damaged or of another
    model: what is compared with it would be wrong, and the version before serves on."""
    try:
        with (directory / FILENAME).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LoadError(f"{FILENAME}: {error.strerror}") from None
    reference = decode(data)
    check_fits(reference, effective.signature)
    return reference
