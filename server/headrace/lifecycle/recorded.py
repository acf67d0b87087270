"""Recorded requests that a version is tried with before it goes live: warmup/* in the version's directory, or else beside it.

Each file is one serialised ModelInferRequest, as a client sends it. Its model, version and id do not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from headrace.backends.base import Array
from headrace.batching.assemble import as_array
from headrace.errors import HeadraceError, InvalidRequest, LoadError
from headrace.signature import Signature
from headrace.wire.codec import decode_request

DIRECTORY = "warmup"
MOST_FILES = 1000
MOST_BYTES = 256 << 20
"""They are in memory until the version is live."""

Recorded = Sequence[tuple[str, Mapping[str, Array]]]
"""The file's name, and the inputs."""


def read_recorded(signature: Signature, model_directory: Path, version_directory: Path) -> Recorded:
    """Raises LoadError for a request that does not fit the model: it is not the model that it was recorded for. Blocking."""
    directory = next((path for path in (version_directory / DIRECTORY, model_directory / DIRECTORY) if path.is_dir()), None)
    if directory is None:
        return ()
    files = sorted(path for path in directory.iterdir() if path.is_file() and not path.name.startswith("."))
    size = sum(path.stat().st_size for path in files)
    if len(files) > MOST_FILES or size > MOST_BYTES:
        raise LoadError(f"{DIRECTORY}: expected at most {MOST_FILES} requests of {MOST_BYTES} bytes, got {len(files)} of {size}")
    return [(path.name, _decode(signature, path)) for path in files]


def _decode(signature: Signature, path: Path) -> dict[str, Array]:
    try:
        request = decode_request(path.read_bytes())
        if request.uses_regions:
            raise InvalidRequest("expected all tensors in the message, got some in shared memory")
        admission = signature.validate(request)
    except HeadraceError as error:
        raise LoadError(f"{DIRECTORY}/{path.name}: expected a ModelInferRequest for this model: {error}") from None
    inputs = zip(signature.inputs, admission.inputs(request), strict=True)
    return {spec.name: as_array(spec, tensor) for spec, tensor in inputs if tensor is not None}
