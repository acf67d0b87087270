"""Pure but for the launches: where each tensor of a batch lies in a lane, and which kernels stand before and after the model.

    what clients send ── inputs slab ──▶ [normalize ── scratch slab ──▶] model [── scratch slab ──▶ softmax, topk] ── outputs slab ──▶
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from headrace.backends.base import ArtifactSignature
from headrace.backends.cuda_lanes import Lane, Layout, Place, lay_out
from headrace.backends.processing import Processing
from headrace.backends.tensorrt_engine import Bound, Step
from headrace.errors import BackendError
from headrace.signature import DataType, Shape, TensorSpec, format_shape
from headrace_kernels.normalize import Normalize
from headrace_kernels.topk import Softmax, TopK

if TYPE_CHECKING:
    from headrace_kernels.device import Kernels

KERNEL_TYPES = {
    DataType.FP32: "float32",
    DataType.FP16: "float16",
    DataType.BF16: "bfloat16",
}
"""Of scores, as the kernels name them."""
_DTYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}
_FLOAT32 = np.dtype("<f4")
_INT32 = np.dtype("<i4")

Tensors = dict[str, tuple[Shape, np.dtype[Any]]]


def classes_name(output: str) -> str:
    return f"{output}_classes"


def can_adopt(processing: Processing, artifact: ArtifactSignature) -> bool:
    """Whether all of it can be done by the kernels, to tensors of these shapes and types."""
    inputs = {spec.name: spec for spec in artifact.inputs}
    outputs = {spec.name: spec for spec in artifact.outputs}
    return all(name in inputs and _can_normalize(step, inputs[name]) for name, step in processing.inputs.items()) and all(
        name in outputs and _can_rank(step, outputs[name]) for name, step in processing.outputs.items()
    )


def _can_normalize(step: Normalize, spec: TensorSpec) -> bool:
    from headrace_kernels.device import Kernels

    if len(spec.shape) != 4 or KERNEL_TYPES.get(spec.datatype) != step.datatype:
        return False
    channels = spec.shape[1 if step.layout == "NCHW" else 3]
    return channels > 0 and Kernels.can_normalize(step, channels)


def _can_rank(step: TopK | Softmax, spec: TensorSpec) -> bool:
    """Of a shape that is known before the model has run."""
    if spec.datatype not in KERNEL_TYPES or not spec.shape:
        return False
    return isinstance(step, Softmax) or (len(spec.shape) == 2 and spec.shape[1] >= step.k)


def model_shapes(given: Mapping[str, Shape], processing: Processing) -> dict[str, Shape]:
    """What the model gets of what clients send."""
    return {name: _normalized(processing.inputs[name], shape) if name in processing.inputs else shape for name, shape in given.items()}


def _normalized(step: Normalize, shape: Shape) -> Shape:
    rows, height, width, channels = shape
    height, width = step.size or (height, width)
    return (rows, channels, height, width) if step.layout == "NCHW" else (rows, height, width, channels)


@dataclass(frozen=True, slots=True)
class Wiring:
    """Of one batch shape. `outputs` are those of the model that are not ranked, then what is made of those that are."""

    inputs: Layout
    outputs: Layout
    scratch: Layout
    addresses: Mapping[str, int]
    before: tuple[Step, ...]
    after: tuple[Step, ...]


def wire(
    bound: Bound,
    lane: Lane,
    given: Mapping[str, Shape],
    artifact: ArtifactSignature,
    processing: Processing,
    kernels: Kernels | None,
) -> Wiring:
    """Make room in the lane and say what lies where. Raises BackendError for a batch too large, CudaError where no memory is left."""
    inputs: Tensors = {}
    scratch: Tensors = {}
    outputs: Tensors = {}
    for spec in artifact.inputs:
        step = processing.inputs.get(spec.name)
        inputs[spec.name] = (given[spec.name], np.dtype(np.uint8) if step else spec.datatype.dtype)
        if step:
            scratch[_before(spec.name)] = (bound.shapes[spec.name], _DTYPES[step.datatype])
    for spec in artifact.outputs:
        _lay_output(spec, bound, processing.outputs.get(spec.name), scratch, outputs)
    layouts = lay_out(inputs), lay_out(outputs), lay_out(scratch)
    for slab, layout in zip((lane.inputs, lane.outputs, lane.scratch), layouts, strict=True):
        slab.reserve(layout.size)
    addresses = {spec.name: _address(lane, layouts, _before(spec.name), spec.name) for spec in artifact.inputs}
    addresses |= {spec.name: _address(lane, layouts, _after(spec.name), spec.name) for spec in artifact.outputs}
    if kernels is None:
        return Wiring(*layouts, addresses, (), ())
    before = tuple(
        _normalize_step(kernels, step, given[name], lane.inputs.address(layouts[0].places[name]), addresses[name])
        for name, step in processing.inputs.items()
    )
    types = {spec.name: KERNEL_TYPES[spec.datatype] for spec in artifact.outputs if spec.name in processing.outputs}
    after = tuple(
        _rank_step(kernels, ranking, bound.outputs[name], types[name], addresses[name], lane, layouts[1].places, name)
        for name, ranking in processing.outputs.items()
    )
    return Wiring(*layouts, addresses, before, after)


def _before(name: str) -> str:
    return f"model input {name}"


def _after(name: str) -> str:
    return f"model output {name}"


def _lay_output(spec: TensorSpec, bound: Bound, step: TopK | Softmax | None, scratch: Tensors, outputs: Tensors) -> None:
    if spec.name in bound.dynamic:
        if step is not None:
            raise BackendError(f"output '{spec.name}': its shape depends on the data; leave it out of [postprocess]")
        outputs[spec.name] = ((bound.dynamic[spec.name].size,), np.dtype(np.uint8))
        return
    shape = bound.outputs[spec.name]
    if step is None:
        outputs[spec.name] = (shape, spec.datatype.dtype)
        return
    scratch[_after(spec.name)] = (shape, spec.datatype.dtype)
    if isinstance(step, Softmax):
        outputs[spec.name] = (shape, _FLOAT32)
    else:
        if len(shape) != 2 or shape[1] < step.k:
            raise BackendError(f"output '{spec.name}': expected [rows, {step.k} classes or more], got {format_shape(shape)}")
        outputs[spec.name] = ((shape[0], step.k), _FLOAT32)
        outputs[classes_name(spec.name)] = ((shape[0], step.k), _INT32)


def _address(lane: Lane, layouts: tuple[Layout, Layout, Layout], between: str, name: str) -> int:
    inputs, outputs, scratch = layouts
    if between in scratch.places:
        return lane.scratch.address(scratch.places[between])
    slab, layout = (lane.inputs, inputs) if name in inputs.places else (lane.outputs, outputs)
    return slab.address(layout.places[name])


def _normalize_step(kernels: Kernels, step: Normalize, shape: Shape, images: int, into: int) -> Step:
    rows, height, width, channels = shape

    def launch(queue: Any) -> None:
        kernels.normalize(
            queue, images=images, into=into, rows=rows, height=height, width=width, channels=channels, normalize=step
        )  # fmt: skip

    return launch


def _rank_step(
    kernels: Kernels, step: TopK | Softmax, shape: Shape, source: str, scores: int, lane: Lane, places: Mapping[str, Place], name: str
) -> Step:
    values = lane.outputs.address(places[name])
    rows, classes = math.prod(shape[:-1]), shape[-1]

    def softmax(queue: Any) -> None:
        kernels.softmax(queue, scores=scores, into=values, rows=rows, classes=classes, source=source, target="float32")

    if isinstance(step, Softmax):
        return softmax
    indices = lane.outputs.address(places[classes_name(name)])
    ranking = cast(TopK, step)

    def topk(queue: Any) -> None:
        kernels.topk(
            queue, scores=scores, values=values, indices=indices, rows=rows, classes=classes, k=ranking.k, softmax=ranking.softmax,
            source=source, target="float32",
        )  # fmt: skip

    return topk
