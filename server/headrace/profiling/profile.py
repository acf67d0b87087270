"""A drift reference made of data: the model is run on it, and inputs and outputs are described. Blocking."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.backends.base import Backend, BackendRegistry, select_file
from headrace.drift.building import ReferenceBuilder
from headrace.drift.extraction import as_numbers
from headrace.drift.plan import choose
from headrace.drift.reference import Reference
from headrace.errors import ConfigError
from headrace.lifecycle.effective import EffectiveModel
from headrace.profiling.rows import to_classes, to_inputs
from headrace.signature import DataType

Array = NDArray[Any]
Chunk = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Subject:
    """`label`: which of the data's columns is the true class; empty for none. `bins`: 0 for what model.toml says."""

    effective: EffectiveModel
    directory: Path
    label: str = ""
    bins: int = 0


def profile(
    subject: Subject,
    chunks: Iterable[Chunk],
    backends: BackendRegistry,
    *,
    data_digest: str = "",
    created: float = 0.0,
    tell: Callable[[int], None] = lambda rows: None,
) -> Reference:
    """`tell` hears of the rows done so far. Raises ConfigError for data that does not fit, BackendError for what the model refuses."""
    effective = subject.effective
    plan = choose(effective.signature, effective.config, effective.labels)
    builder = ReferenceBuilder(effective.config.name, plan, subject.bins or effective.config.drift.bins)
    run = _run_rows if effective.signature.is_batching else _run_one_by_one
    with _loaded(subject, backends) as backend:
        for chunk in chunks:
            inputs = to_inputs(chunk, effective.signature, effective.config, subject.label, builder.rows)
            rows = len(next(iter(inputs.values())))
            outputs = run(backend, effective, inputs, rows)
            truth = _truth(subject, chunk, builder.rows)
            builder.add(_floats(effective, inputs), _floats(effective, outputs), rows, truth)
            if truth is not None:
                _check_classes(subject, builder, outputs, truth)
            tell(builder.rows)
    if not builder.rows:
        raise ConfigError("expected data, got no row")
    if subject.label and builder.scored is None:
        raise ConfigError(
            f"label '{subject.label}': expected an output with the scores of classes, the model has none that is known to be one; "
            'monitor = "classes" for an output in model.toml says which'
        )
    return builder.build("profile", data_digest=data_digest, created=created)


@contextmanager
def _loaded(subject: Subject, backends: BackendRegistry) -> Iterator[Backend]:
    effective = subject.effective
    path = select_file(subject.directory, effective.filename)
    backend = effective.make(backends[effective.backend], path, replace(effective.instances, count=1))
    backend.load()
    try:
        yield backend
    finally:
        backend.close()


def _run_rows(backend: Backend, effective: EffectiveModel, inputs: Mapping[str, Array], rows: int) -> dict[str, Array]:
    size = effective.signature.max_batch_size
    parts = [_execute(backend, effective, {name: array[at : at + size] for name, array in inputs.items()}) for at in range(0, rows, size)]
    return _joined(effective, parts)


def _run_one_by_one(backend: Backend, effective: EffectiveModel, inputs: Mapping[str, Array], rows: int) -> dict[str, Array]:
    """Of a model without a batch dimension each row is a request."""
    parts = [_execute(backend, effective, {name: array[row] for name, array in inputs.items()}) for row in range(rows)]
    return _joined(effective, [[array[None] for array in part] for part in parts])


def _execute(backend: Backend, effective: EffectiveModel, inputs: Mapping[str, Array]) -> list[Array]:
    return backend.execute({name: np.asarray(array, order="C") for name, array in inputs.items()}, None)


def _joined(effective: EffectiveModel, parts: Sequence[Sequence[Array]]) -> dict[str, Array]:
    """Outputs whose rows differ in shape from batch to batch cannot be described together, and are left out."""
    outputs = {}
    for index, spec in enumerate(effective.signature.outputs):
        arrays = [part[index] for part in parts]
        if len({array.shape[1:] for array in arrays}) == 1:
            outputs[spec.name] = np.concatenate(arrays)
    return outputs


def _floats(effective: EffectiveModel, arrays: Mapping[str, Array]) -> dict[str, Array]:
    specs = (*effective.signature.inputs, *effective.signature.outputs)
    bf16 = {spec.name for spec in specs if spec.datatype is DataType.BF16}
    return {name: as_numbers(array, is_bf16=True) if name in bf16 else array for name, array in arrays.items()}


def _check_classes(subject: Subject, builder: ReferenceBuilder, outputs: Mapping[str, Array], truth: Array) -> None:
    """Classes that are counted from 1 would make every answer wrong."""
    scored = builder.scored
    if scored is None or scored[0].tensor not in outputs:
        return
    classes = outputs[scored[0].tensor].shape[-1]
    if len(truth) and truth.max() >= classes:
        raise ConfigError(f"label '{subject.label}': expected a class from 0 to {classes - 1}, got {truth.max()}")


def _truth(subject: Subject, chunk: Chunk, first: int) -> Array | None:
    if not subject.label:
        return None
    if subject.label not in chunk:
        raise ConfigError(f"label '{subject.label}': not in the data, which has {', '.join(sorted(chunk)) or 'no names'}")
    labels = next(iter(subject.effective.labels.values()), ())
    return to_classes(chunk[subject.label], labels, subject.label, first)
