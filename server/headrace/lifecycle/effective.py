"""A model's effective configuration: what its artifact says, overridden by model.toml or config.pbtxt, each value with its origin.

`resolve` is pure; `resolve_model` reads the files it needs.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.backends.base import ArtifactSignature, BackendRegistry, select_file
from headrace.config import BatchingConfig, InstanceConfig, ModelConfig, TensorConfig
from headrace.errors import ConfigError, LoadError
from headrace.model_files import load_labels, load_model_config
from headrace.signature import Shape, Signature, TensorSpec, format_shape

DEFAULT_MAX_BATCH_SIZE = 64
"""For artifacts with a free batch dimension and no configuration. Batches only grow under load, so a generous bound costs
nothing when idle; 64 rows bound the memory that one batch can take."""


@dataclass(frozen=True, slots=True)
class EffectiveModel:
    """Everything settled, nothing left to infer.

    `batching.max_batch_size` is a number and equals `signature.max_batch_size`; `provenance` maps a dotted key to where its
    value came from; `notes` are sentences worth showing at load and in `headrace check`; `labels` are by output name.
    """

    config: ModelConfig
    backend: str
    platform: str
    filename: str
    signature: Signature
    batching: BatchingConfig
    instances: InstanceConfig
    provenance: Mapping[str, str]
    notes: tuple[str, ...] = ()
    labels: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def resolve_model(model_directory: Path, version_directory: Path, backends: BackendRegistry) -> EffectiveModel:
    """Read configuration and artifact of one version. Raises ConfigError or LoadError with what to change. Blocking."""
    config = load_model_config(model_directory, model_directory.resolve().name)
    backend_name = config.backend or _detect_backend(version_directory, backends)
    backend = backends.get(backend_name)
    if backend is None:
        raise ConfigError(f"unknown backend '{backend_name}'{_nearest(backend_name, backends)}; installed: {', '.join(sorted(backends))}")
    filename = config.filename or backend.default_filename
    artifact = backend.inspect(select_file(version_directory, filename))
    labels = {t.name: load_labels(model_directory, t.labels) for t in config.outputs if t.labels}
    return resolve(config, artifact, backend=backend_name, platform=backend.platform, filename=filename, labels=labels)


def _detect_backend(directory: Path, backends: BackendRegistry) -> str:
    for name, backend in sorted(backends.items()):
        if (directory / backend.default_filename).exists():
            return name
    known = ", ".join(sorted(backend.default_filename for backend in backends.values())) or "none: no backend is installed"
    raise LoadError(f"no model file in {directory.parent.name}/{directory.name}: expected one of {known}")


def resolve(
    config: ModelConfig,
    artifact: ArtifactSignature,
    *,
    backend: str,
    platform: str,
    filename: str,
    labels: Mapping[str, tuple[str, ...]],
) -> EffectiveModel:
    """Artifact below configuration. Raises ConfigError where the configuration contradicts the artifact.

    Unlike Triton, `max_batch_size = 0` written down means literal shapes; only leaving it out has it inferred.
    """
    inferred, reason = infer_batching(artifact)
    asked = config.batching.max_batch_size
    if asked and not inferred:
        raise ConfigError(f"max_batch_size {asked}: the model cannot be batched, {reason}")
    size = asked if asked is not None else inferred
    provenance = dict(config.provenance)
    provenance.setdefault("max_batch_size", f"{filename}: {reason}")
    provenance.setdefault("backend", f"{filename} found")
    inputs = _override(config.name, "input", artifact.inputs, config.inputs, bool(size), provenance, filename)
    outputs = _override(config.name, "output", artifact.outputs, config.outputs, bool(size), provenance, filename)
    batching = dataclasses.replace(config.batching, max_batch_size=size)
    _check_allowed_sizes(batching)
    notes = () if size else (f"not batched: {reason if asked is None else 'max_batch_size is 0'}",)
    return EffectiveModel(
        config=config,
        backend=backend,
        platform=platform,
        filename=filename,
        signature=Signature(config.name, inputs, outputs, size),
        batching=batching,
        instances=config.instances,
        provenance=provenance,
        notes=notes,
        labels=labels,
    )


def infer_batching(artifact: ArtifactSignature) -> tuple[int, str]:
    """(max_batch_size, why): batching when the first dimension of every tensor is free."""
    for kind, specs in (("input", artifact.inputs), ("output", artifact.outputs)):
        for spec in specs:
            if not spec.shape:
                return 0, f"{kind} '{spec.name}' is a scalar"
            if spec.shape[0] >= 0:
                return 0, f"{kind} '{spec.name}' has a fixed first dimension of {spec.shape[0]}"
    if not artifact.inputs:
        return 0, "it has no inputs"
    return DEFAULT_MAX_BATCH_SIZE, "the first dimension of every tensor is free"


def _check_allowed_sizes(batching: BatchingConfig) -> None:
    sizes, largest = batching.allowed_batch_sizes, batching.max_batch_size or 0
    if not sizes:
        return
    if list(sizes) != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] != largest:
        raise ConfigError(f"allowed_batch_sizes: expected ascending sizes that end with max_batch_size {largest}, got {list(sizes)}")


def _override(
    model: str,
    kind: str,
    specs: Sequence[TensorSpec],
    overrides: Sequence[TensorConfig],
    is_batching: bool,
    provenance: dict[str, str],
    filename: str,
) -> tuple[TensorSpec, ...]:
    by_name = {override.name: override for override in overrides}
    names = [spec.name for spec in specs]
    for name in by_name:
        if name not in names:
            raise ConfigError(f"{kind} '{name}' is not in the model '{model}'{_nearest(name, names)}; it has {', '.join(names)}")
    settled = []
    for spec in specs:
        override = by_name.get(spec.name)
        provenance.setdefault(f"{kind}.{spec.name}", filename)
        settled.append(spec if override is None else _apply(kind, spec, override, is_batching))
    return tuple(settled)


def _apply(kind: str, spec: TensorSpec, override: TensorConfig, is_batching: bool) -> TensorSpec:
    if override.datatype is not None and override.datatype != spec.datatype.value:
        raise ConfigError(f"{kind} '{spec.name}': the model has datatype {spec.datatype.value}, the configuration says {override.datatype}")
    shape = spec.shape
    if override.shape is not None:
        shape = ((-1,) if is_batching else ()) + override.shape
        if not _narrows(spec.shape, shape):
            raise ConfigError(
                f"{kind} '{spec.name}': the model has shape {format_shape(spec.shape)}, the configuration says {format_shape(shape)}; "
                "only free dimensions (-1) can be set"
            )
        shape = tuple(d if w == -1 else w for d, w in zip(spec.shape, shape, strict=True))
    optional = spec.optional if override.optional is None else override.optional
    return dataclasses.replace(spec, shape=shape, optional=optional)


def _narrows(declared: Shape, wanted: Shape) -> bool:
    """A config.pbtxt may leave a dimension free that the artifact fixes (Triton accepts it): then the artifact's holds."""
    return len(declared) == len(wanted) and all(d in (-1, w) or w == -1 for d, w in zip(declared, wanted, strict=True))


def _nearest(name: str, known: Sequence[str] | Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f", did you mean '{near[0]}'?" if near else ""

