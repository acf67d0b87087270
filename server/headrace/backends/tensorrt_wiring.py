"""Where each tensor of a batch lies in a lane, and which kernels stand before and after the model.

what clients send ── inputs slab ──▶ [normalize ── scratch slab ──▶] model [── scratch slab ──▶ softmax, topk] ── outputs slab ──▶
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.backends.base import ArtifactSignature
from headrace.backends.cuda_lanes import Lane, Layout, lay_out
from headrace.backends.cuda_processing import DeviceProcessing, Tensor
from headrace.backends.tensorrt_engine import Bound, Step
from headrace.errors import BackendError
from headrace.signature import Shape

_BYTES = np.dtype(np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class Wiring:
    """Of one batch shape, at the addresses that a lane had at `generation`. Those in `addresses` are the model's tensors."""

    inputs: Layout
    outputs: Layout
    generation: int
    addresses: Mapping[str, int]
    before: tuple[Step, ...]
    after: tuple[Step, ...]


def model_shapes(given: Mapping[str, Shape], processing: DeviceProcessing) -> dict[str, Shape]:
    """What the model gets of what clients send."""
    return {name: processing.normalized(name, shape)[0] if processing.is_input(name) else shape for name, shape in given.items()}


def lay_out_inputs(given: Mapping[str, Shape], artifact: ArtifactSignature, processing: DeviceProcessing) -> Layout:
    return lay_out({spec.name: (given[spec.name], processing.given(spec)) for spec in artifact.inputs})


def wire(bound: Bound, lane: Lane, given: Mapping[str, Shape], artifact: ArtifactSignature, processing: DeviceProcessing) -> Wiring:
    """Make room in the lane and say what lies where. Raises BackendError for a batch too large, CudaError where no memory is left."""
    inputs = lay_out_inputs(given, artifact, processing)
    outputs, between = _lay_out_outputs(bound, artifact, processing)
    between |= {name: processing.normalized(name, shape) for name, shape in given.items() if processing.is_input(name)}
    scratch = lay_out(between)
    for slab, layout in ((lane.inputs, inputs), (lane.outputs, outputs), (lane.scratch, scratch)):
        slab.reserve(max(layout.size, 1))
    addresses = {}
    for kind, slab, layout in (("input", lane.inputs, inputs), ("output", lane.outputs, outputs)):
        for spec in artifact.inputs if kind == "input" else artifact.outputs:
            place = scratch.places.get(spec.name)
            addresses[spec.name] = lane.scratch.address(place) if place else slab.address(layout.places[spec.name])
    visible = {name: lane.outputs.address(place) for name, place in outputs.places.items()}
    before = [
        _normalizing(processing, name, shape, lane.inputs.address(inputs.places[name]), addresses[name])
        for name, shape in given.items()
        if processing.is_input(name)
    ]
    after = [
        _finishing(processing, spec.name, bound.outputs[spec.name], addresses[spec.name], visible)
        for spec in artifact.outputs
        if processing.is_output(spec.name)
    ]
    return Wiring(inputs, outputs, lane.generation, addresses, tuple(before), tuple(after))


def _lay_out_outputs(bound: Bound, artifact: ArtifactSignature, processing: DeviceProcessing) -> tuple[Layout, dict[str, Tensor]]:
    """Clients' outputs, and those of the model from which kernels make some of them."""
    visible: dict[str, Tensor] = {}
    between: dict[str, Tensor] = {}
    for spec in artifact.outputs:
        dynamic = bound.dynamic.get(spec.name)
        if dynamic is not None and processing.is_output(spec.name):
            raise BackendError(f"output '{spec.name}': its shape depends on the data, so [postprocess] cannot be done on a GPU")
        if dynamic is not None:
            visible[spec.name] = ((dynamic.size,), _BYTES)
            continue
        tensor = bound.outputs[spec.name], spec.datatype.dtype
        visible |= processing.visible(spec.name, tensor)
        if processing.is_output(spec.name):
            between[spec.name] = tensor
    return lay_out(visible), between


def _normalizing(processing: DeviceProcessing, name: str, shape: Shape, images: int, into: int) -> Step:
    def launch(queue: Any) -> None:
        processing.normalize(queue, name, shape, images, into)

    return launch


def _finishing(processing: DeviceProcessing, name: str, shape: Shape, scores: int, into: Mapping[str, int]) -> Step:
    def launch(queue: Any) -> None:
        processing.finish(queue, name, shape, scores, into)

    return launch
