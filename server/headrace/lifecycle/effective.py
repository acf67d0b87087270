"""A model's effective configuration: what its artifact says, below model.toml or config.pbtxt, with the origin of each value.

`resolve` is pure; `resolve_model` reads the files it needs.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace_kernels.topk import TopK

from headrace.backends.base import ArtifactSignature, Backend, BackendRegistry, Expected, select_file
from headrace.backends.processed import processed
from headrace.backends.processing import Processing, classes_of
from headrace.config import BatchingConfig, InstanceConfig, ModelConfig, TensorConfig
from headrace.config_loading import option_keys
from headrace.errors import ConfigError, LoadError
from headrace.lifecycle.processing import Visible, apply_processing
from headrace.model_files import load_labels
from headrace.signature import Shape, Signature, TensorSpec, format_shape

DEFAULT_MAX_BATCH_SIZE = 64
"""For artifacts with a free batch dimension and no configuration. Batches only grow under load, so a generous bound costs
nothing when idle; 64 rows bound the memory that one batch can take."""


@dataclass(frozen=True, slots=True)
class EffectiveModel:
    """Everything settled, nothing left to infer.

    `batching.max_batch_size` is a number and equals `signature.max_batch_size`; `provenance` maps a dotted key to where its
    value came from; `notes` are sentences worth showing at load and in `headrace check`; `labels` are by output name. `signature`,
    `config` and `labels` are of the tensors that clients see, `artifact` of what the model takes and gives between its `processing`.
    """

    config: ModelConfig
    backend: str
    platform: str
    filename: str
    signature: Signature
    batching: BatchingConfig
    instances: InstanceConfig
    artifact: ArtifactSignature
    provenance: Mapping[str, str]
    notes: tuple[str, ...] = ()
    labels: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    processing: Processing = dataclasses.field(default_factory=Processing)

    @property
    def output_names(self) -> list[str]:
        """The artifact's."""
        return [spec.name for spec in self.artifact.outputs]

    @property
    def ranked(self) -> frozenset[str]:
        """The outputs that clients see with a row's classes by rank."""
        return frozenset(classes_of(name) for name, step in self.processing.outputs.items() if isinstance(step, TopK))

    def make(self, backend: type[Backend], path: Path, instance: InstanceConfig, *, is_signed: bool = False) -> Backend:
        """An instance to load, which knows what will be asked of it and does to tensors what is to be done."""
        made = backend(path, instance)
        made.expect(Expected(self.artifact, self.signature, self.batching.allowed_batch_sizes, is_signed))
        return processed(made, self.processing, self.output_names)


def resolve_model(
    config: ModelConfig,
    model_directory: Path,
    version_directory: Path,
    backends: BackendRegistry,
    known: ArtifactSignature | None = None,
    *,
    is_signed: bool = False,
) -> EffectiveModel:
    """Read the artifact of one version. Raises ConfigError or LoadError with what to change. Blocking.

    `known`: what an artifact says that may have the same graph; then it is not opened for that. `is_signed`: as in Expected.
    """
    backend_name = config.backend or _detect_backend(version_directory, backends)
    backend = backends.get(backend_name)
    if backend is None:
        hint = f"{_nearest(backend_name, backends)}; installed: {', '.join(sorted(backends)) or 'none'}"
        raise ConfigError(f"{_source(config)}: unknown backend '{backend_name}'{hint}")
    filename = config.filename or backend.default_filename
    if Path(filename).name != filename:
        raise ConfigError(f"{_source(config)}: filename: expected a name in the version directory, without a path, got '{filename}'")
    path = select_file(version_directory, filename)
    backend.check_trusted(path, config.instances, is_signed=is_signed)
    graph = backend.graph_digest(path)
    artifact = known if known and graph and known.graph == graph else dataclasses.replace(backend.inspect(path), graph=graph)
    labels = {tensor.name: load_labels(model_directory, tensor.labels) for tensor in config.outputs if tensor.labels}
    return resolve(config, artifact, backend=backend_name, platform=backend.platform, filename=filename, labels=labels)


def _detect_backend(directory: Path, backends: BackendRegistry) -> str:
    place = f"{directory.parent.name}/{directory.name}"
    found = sorted(name for name, backend in backends.items() if (directory / backend.default_filename).exists())
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{place} has files for several backends: {', '.join(found)}; choose one by 'backend' in model.toml")
    known = ", ".join(sorted(backend.default_filename for backend in backends.values())) or "nothing: no backend is installed"
    present = ", ".join(sorted(child.name for child in directory.iterdir())) or "nothing"
    raise LoadError(f"no model file in {place}: expected {known}, found {present}; 'filename' in model.toml sets another name")


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

    Where this differs from Triton: a `max_batch_size = 0` that is written down means literal shapes, only leaving it out has it
    inferred (Triton takes both for absent); what is inferred is 64 rows, not 4, since a batch costs nothing until there is a
    queue; and a configuration need not repeat the tensors: what it says of some is checked, the rest is the artifact's.
    """
    _check_names(config, artifact)
    inferred, reason = infer_batching(config, artifact)
    asked = config.batching.max_batch_size
    if asked and not inferred:
        raise ConfigError(f"{_source(config)}: max_batch_size {asked}: the model cannot be batched, {reason}")
    size = inferred if asked is None else asked
    batching = dataclasses.replace(config.batching, max_batch_size=size)
    _check_allowed_sizes(config, size, reason)
    seen = apply_processing(
        config,
        _settle(config, "input", artifact.inputs, config.inputs, bool(size)),
        _settle(config, "output", artifact.outputs, config.outputs, bool(size)),
        labels,
    )
    return EffectiveModel(
        config=seen.config,
        backend=backend,
        platform=platform,
        filename=filename,
        signature=Signature(config.name, seen.inputs, _settle_classes(config, artifact, seen, bool(size)), size),
        batching=batching,
        instances=config.instances,
        artifact=artifact,
        provenance=_provenance(config, artifact, filename, reason),
        notes=(*config.notes, *_batching_notes(config, artifact, size, reason), *seen.notes),
        labels=seen.labels,
        processing=seen.processing,
    )


def without_batching(effective: EffectiveModel, found: str) -> EffectiveModel:
    """The same model with literal shapes, when a run has shown that its free first dimension is no batch dimension.

    Raises LoadError when batching was asked for by configuration: then the configuration is wrong, not our guess.
    """
    origin = effective.provenance.get("max_batch_size", "")
    if effective.config.batching.max_batch_size:
        raise LoadError(f"max_batch_size {effective.config.batching.max_batch_size} ({origin}) cannot be right: {found}")
    note = f"not batched: {found}, so the free first dimension is no batch dimension"
    return dataclasses.replace(
        effective,
        signature=dataclasses.replace(effective.signature, max_batch_size=0),
        batching=dataclasses.replace(effective.batching, max_batch_size=0, allowed_batch_sizes=()),
        provenance={**effective.provenance, "max_batch_size": "found by running a batch of 2"},
        notes=(*effective.notes, note),
    )


# -- the batch axis ----------------------------------------------------------------------------------------------------


def infer_batching(config: ModelConfig, artifact: ArtifactSignature) -> tuple[int, str]:
    """(max_batch_size, why): batching when the first dimension of every tensor is free, as far as declarations tell.

    That a free first dimension really is the batch is found out by the warm-up, which runs a batch of two.
    """
    if not artifact.inputs:
        return 0, "it has no inputs"
    given = {("input", t.name) for t in config.inputs if t.shape} | {("output", t.name) for t in config.outputs if t.shape}
    for kind, specs in (("input", artifact.inputs), ("output", artifact.outputs)):
        for spec in specs:
            if not spec.shape and (kind, spec.name) not in given:
                return 0, f"{kind} '{spec.name}' is a scalar, or declares no shape (then set its shape in model.toml)"
            if spec.shape and spec.shape[0] >= 0:
                return 0, f"{kind} '{spec.name}' has a fixed first dimension of {spec.shape[0]}"
    if config.batching.allowed_batch_sizes:
        return config.batching.allowed_batch_sizes[-1], "the last of allowed_batch_sizes"
    return DEFAULT_MAX_BATCH_SIZE, "the first dimension of every tensor is free"


def _batching_notes(config: ModelConfig, artifact: ArtifactSignature, size: int, reason: str) -> Iterator[str]:
    if size:
        return
    if config.batching.max_batch_size == 0:
        yield f"not batched: max_batch_size is 0 in {_source(config)}"
    elif artifact.inputs and all(spec.shape[:1] == (1,) for spec in artifact.inputs):
        yield "not batched: made for one row, every input has a fixed first dimension of 1; export it with a free one to batch"
    else:
        yield f"not batched: {reason}"


def _check_allowed_sizes(config: ModelConfig, largest: int, reason: str) -> None:
    sizes = list(config.batching.allowed_batch_sizes)
    if not sizes:
        return
    subject = f"{_source(config)}: allowed_batch_sizes {sizes}"
    if not largest:
        raise ConfigError(
            f"{subject}: the model is not batched, {'max_batch_size is 0' if config.batching.max_batch_size == 0 else reason}"
        )
    if sizes != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] != largest:
        raise ConfigError(f"{subject}: expected ascending sizes from 1 that end with max_batch_size {largest}")


# -- tensors -----------------------------------------------------------------------------------------------------------


def _check_names(config: ModelConfig, artifact: ArtifactSignature) -> None:
    """Raises ConfigError for a tensor in the configuration that the artifact does not have, and for one that is there twice."""
    inputs, outputs = [spec.name for spec in artifact.inputs], [spec.name for spec in artifact.outputs]
    visible = [*outputs, *[classes_of(step.output) for step in config.postprocess if step.top_k and step.output in outputs]]
    for kind, names, known in (
        ("input", [each.name for each in config.inputs], inputs),
        ("output", [each.name for each in config.outputs], visible),
        ("[[preprocess]] input", [step.input for step in config.preprocess], inputs),
        ("[[postprocess]] output", [step.output for step in config.postprocess], outputs),
    ):
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"{_source(config)}: {kind} '{name}' is not in the model{_nearest(name, known)}; it has {', '.join(known)}"
                )
            if names.count(name) > 1:
                raise ConfigError(f"{_source(config)}: {kind} '{name}' is there twice")
    # A mistyped name would have the tensor written that nobody is to see.
    for name in config.capture.redact:
        _check_named(config, "[capture] redact", name, inputs + visible)
    if config.feedback.output:
        _check_named(config, "[feedback] output", config.feedback.output, visible)


def _check_named(config: ModelConfig, key: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ConfigError(f"{_source(config)}: {key}: '{name}' is not in the model{_nearest(name, known)}; it has {', '.join(known)}")


def _settle(
    config: ModelConfig, kind: str, specs: Sequence[TensorSpec], overrides: Sequence[TensorConfig], is_batching: bool
) -> tuple[TensorSpec, ...]:
    by_name = {override.name: override for override in overrides}
    try:
        return tuple(_apply(kind, spec, by_name.get(spec.name, _NOTHING), is_batching) for spec in specs)
    except ConfigError as error:
        reason = str(error)
    raise ConfigError(f"{_source(config)}: {reason}")


def _settle_classes(config: ModelConfig, artifact: ArtifactSignature, seen: Visible, is_batching: bool) -> tuple[TensorSpec, ...]:
    """The outputs that clients see; what the configuration says of those of classes, which the artifact does not have, is checked."""
    known = {spec.name for spec in artifact.outputs}
    added = [spec for spec in seen.outputs if spec.name not in known]
    settled = {spec.name: spec for spec in _settle(config, "output", added, config.outputs, is_batching)}
    return tuple([settled.get(spec.name, spec) for spec in seen.outputs])


_NOTHING = TensorConfig()
_OF_INPUTS = ("minimum", "maximum", "finite", "categories", "limits", "on_invalid")


def _apply(kind: str, spec: TensorSpec, override: TensorConfig, is_batching: bool) -> TensorSpec:
    if override.datatype is not None and override.datatype != spec.datatype.value:
        raise ConfigError(f"{kind} '{spec.name}': the model has datatype {spec.datatype.value}, the configuration says {override.datatype}")
    if kind == "input" and override.labels:
        raise ConfigError(f"input '{spec.name}': labels are for outputs")
    if kind == "output":
        for key in _OF_INPUTS:
            if getattr(override, key) != getattr(_NOTHING, key):
                raise ConfigError(f"output '{spec.name}': {key} is for inputs")
    if override.optional and not spec.optional:
        raise ConfigError(f"{kind} '{spec.name}': the model cannot do without it, the configuration says optional")
    shape = spec.shape
    if override.shape is not None:
        shape = _narrow(kind, spec, ((-1,) if is_batching else ()) + override.shape)
    return dataclasses.replace(spec, shape=shape, optional=spec.optional if override.optional is None else override.optional)


def _narrow(kind: str, spec: TensorSpec, wanted: Shape) -> Shape:
    """A dimension may be free on either side: then the other one's holds (a config.pbtxt may leave free what the model fixes).
    A tensor that declares no shape looks like a scalar and takes any."""
    if not spec.shape:
        return wanted
    if len(spec.shape) != len(wanted) or any(d not in (-1, w) and w != -1 for d, w in zip(spec.shape, wanted, strict=True)):
        raise ConfigError(
            f"{kind} '{spec.name}': the model has shape {format_shape(spec.shape)}, the configuration says "
            f"{format_shape(wanted)} (with the batch dimension, if there is one); only free dimensions (-1) can be set"
        )
    return tuple(d if w == -1 else w for d, w in zip(spec.shape, wanted, strict=True))


# -- where each value came from ----------------------------------------------------------------------------------------


def _source(config: ModelConfig) -> str:
    """The configuration file as messages call it. A model has at most one."""
    return next(iter(config.provenance.values()), f"model '{config.name}'")


def _provenance(config: ModelConfig, artifact: ArtifactSignature, filename: str, batching_reason: str) -> dict[str, str]:
    """The file's own record first; then every value that is not the default came from it too; then what was inferred."""
    origins = dict(config.provenance)
    for section in (config.batching, config.instances):
        for key, field in option_keys(type(section)).items():
            if getattr(section, field.name) != _default(field):
                origins.setdefault(key, _source(config))
    origins.setdefault("max_batch_size", f"{filename}: {batching_reason}")
    origins.setdefault("backend", f"{filename} found")
    for kind, specs, overrides in (("input", artifact.inputs, config.inputs), ("output", artifact.outputs, config.outputs)):
        for spec in specs:
            override = next((o for o in overrides if o.name == spec.name), None)
            has_changed = override is not None and (override.shape is not None or override.optional is not None)
            origins[f"{kind}.{spec.name}"] = f"{filename}, {_source(config)}" if has_changed else filename
    for step in config.preprocess:
        origins[f"input.{step.input}"] = f"{_source(config)} [[preprocess]]"
    for after in config.postprocess:
        origins[f"output.{after.output}"] = origins[f"output.{classes_of(after.output)}"] = f"{_source(config)} [[postprocess]]"
    return origins


def _default(field: dataclasses.Field[Any]) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _nearest(name: str, known: Sequence[str] | Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f", did you mean '{near[0]}'?" if near else ""
