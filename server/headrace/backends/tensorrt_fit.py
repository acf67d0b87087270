"""What the server expects of an engine, and whether an engine is that."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from headrace.backends.base import ArtifactSignature, Expected
from headrace.backends.processing import Processing
from headrace.backends.tensorrt_engine import Engine
from headrace.errors import LoadError
from headrace.signature import Signature, TensorSpec, format_shape


def expect_nothing(artifact: ArtifactSignature) -> Expected:
    return Expected(artifact, Signature("", artifact.inputs, artifact.outputs))


def inputs_of(expected: Expected, processing: Processing) -> list[TensorSpec]:
    """The model's, with the dimensions that model.toml sets: for clients who see the same tensor, or by what images are resized to."""
    seen = {spec.name: spec for spec in expected.signature.inputs}
    return [_narrowed(spec, seen.get(spec.name), processing) for spec in expected.artifact.inputs]


def _narrowed(spec: TensorSpec, seen: TensorSpec | None, processing: Processing) -> TensorSpec:
    step = processing.inputs.get(spec.name)
    if step is not None and step.size is not None and len(spec.shape) == 4:
        at = 2 if step.layout == "NCHW" else 1
        return dataclasses.replace(spec, shape=(*spec.shape[:at], *step.size, *spec.shape[at + 2 :]))
    is_same = seen is not None and (seen.datatype, len(seen.shape)) == (spec.datatype, len(spec.shape))
    return seen if step is None and seen is not None and is_same else spec


def graph_sizes(expected: Expected) -> frozenset[int]:
    """Those that the server restricts batches to, else the powers of two: others run without a graph."""
    largest = expected.signature.max_batch_size
    return frozenset(expected.allowed or (*(1 << power for power in range(largest.bit_length())), largest))


def check_same(place: str, artifact: ArtifactSignature, found: ArtifactSignature) -> None:
    """TensorRT takes double for float and the like, and a plan may have been exchanged after it was looked at."""
    for kind, wanted, there in (("input", artifact.inputs, found.inputs), ("output", artifact.outputs, found.outputs)):
        by_name = {spec.name: spec for spec in there}
        if set(by_name) != {spec.name for spec in wanted}:
            raise LoadError(f"{place}: {kind}s: expected {_names(wanted)}, the engine has {_names(there)}")
        for spec in wanted:
            if by_name[spec.name].datatype is not spec.datatype:
                raise LoadError(
                    f"{place}: {kind} '{spec.name}': the model says {spec.datatype.value}, TensorRT makes "
                    f"{by_name[spec.name].datatype.value} of it; cast it in the model"
                )


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(spec.name for spec in specs) or "none"


def check_covered(engine: Engine, expected: Expected) -> None:
    """That a plan made elsewhere takes the batches that will come."""
    largest = expected.signature.max_batch_size
    if not largest:
        return
    for rows in expected.allowed or (1, largest):
        for spec in engine.signature.inputs:
            ranges = [profile.inputs[spec.name] for profile in engine.profiles]
            if not any(each.minimum[0] <= rows <= each.maximum[0] for each in ranges):
                built = ", ".join(f"{format_shape(each.minimum)} to {format_shape(each.maximum)}" for each in ranges)
                raise LoadError(
                    f"{engine.place}: input '{spec.name}': expected an engine that takes batches of {rows}, it was built for {built}; "
                    "set max_batch_size or allowed_batch_sizes in model.toml to what it was built for"
                )
