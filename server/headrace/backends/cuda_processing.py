"""What model.toml has done to tensors before and after a model, on the device and in the stream that the model runs in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from headrace_kernels import launches
from headrace_kernels.launches import Launch
from headrace_kernels.normalize import Normalize
from headrace_kernels.topk import Softmax, TopK

from headrace.backends.base import ArtifactSignature, DeviceArray, Expected, PipelinedBackend
from headrace.backends.processing import Processing, classes_of
from headrace.config import InstanceConfig
from headrace.errors import BackendError, LoadError
from headrace.signature import DataType, TensorSpec

if TYPE_CHECKING:
    from cuda.core import Stream
    from headrace_kernels.device import Kernels

Tensor = tuple[tuple[int, ...], np.dtype[Any]]
"""Shape and type. bfloat16 is uint16, as everywhere."""

_UINT8 = np.dtype(np.uint8)
_FLOAT32 = np.dtype(np.float32)
_INT32 = np.dtype(np.int32)
_SCORES = {DataType.FP32: "float32", DataType.FP16: "float16", DataType.BF16: "bfloat16"}


def can_run(processing: Processing, artifact: ArtifactSignature) -> bool:
    """Whether there are kernels for it, and the model's tensors are on the device."""
    if any(spec.optional or not spec.datatype.itemsize for spec in (*artifact.inputs, *artifact.outputs)):
        return False
    return all(spec.datatype in _SCORES for spec in artifact.outputs if spec.name in processing.outputs)


class GpuBackend(PipelinedBackend):
    """What a backend on a GPU is told before it loads, and lent before it launches: kept for it, with the processing that it takes over."""

    def __init__(self, path: Path, instance: InstanceConfig) -> None:
        super().__init__(path, instance)
        self._expected: Expected | None = None
        self._processing = Processing()
        self._lent: Mapping[str, DeviceArray] = {}

    def expect(self, expected: Expected) -> None:
        self._expected = expected

    def adopt(self, processing: Processing) -> bool:
        if self._expected is not None and not can_run(processing, self._expected.artifact):
            return False
        self._processing = processing
        return True

    def lend(self, inputs: Mapping[str, DeviceArray]) -> None:
        self._lent = inputs


class DeviceProcessing:
    """The kernels around one loaded model. Used from the thread that launches its batches, whose device is current."""

    def __init__(self, processing: Processing, kernels: Kernels | None, outputs: Sequence[TensorSpec]) -> None:
        """`kernels`: None where `processing` is empty. `outputs`: the artifact's. Raises LoadError for one that no kernel takes."""
        self._inputs = processing.inputs
        self._outputs = processing.outputs
        self._kernels = kernels
        self._scores = {spec.name: _scores(spec) for spec in outputs if spec.name in processing.outputs}

    def __repr__(self) -> str:
        return f"DeviceProcessing(inputs={[*self._inputs]}, outputs={[*self._outputs]})"

    def load(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        """Have the kernels ready that the artifact's tensors need, so that what is missing is known before it is live and no request waits
        for a compiler. Raises LoadError."""
        if self._kernels is None:
            return
        from headrace_kernels.errors import KernelsUnavailable

        try:
            for launch in self._foreseen(inputs, outputs):
                self._kernels.load((launch,))
        except (KernelsUnavailable, ValueError) as error:  # the latter of sizes that no kernel takes
            reason = str(error)
        else:
            return
        raise LoadError(f"[preprocess] and [postprocess] on a GPU: {reason}")

    def _foreseen(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Iterator[Launch]:
        """One of each kind: which kernel it is depends on channels, classes and whether there is a resize, not on rows."""
        for spec in inputs:
            if spec.name in self._inputs and len(spec.shape) == 4:
                step = self._inputs[spec.name]
                channels = spec.shape[1 if step.layout == "NCHW" else 3]
                for side in (16, 17):
                    resized = dataclasses.replace(step, size=step.size and (16, 16))
                    if channels > 0:
                        yield from launches.normalize(
                            images=0, into=0, rows=1, height=side, width=side, channels=channels, normalize=resized
                        )
        for spec in outputs:
            step_after = self._outputs.get(spec.name)
            known = spec.shape[-1] if spec.shape else 1
            for classes in (known,) if known > 0 else (launches.WARP_CLASSES, launches.WARP_CLASSES + 1):
                datatype = self._scores.get(spec.name, "")
                if isinstance(step_after, TopK):
                    yield from launches.topk(
                        scores=0,
                        values=0,
                        indices=0,
                        rows=1,
                        classes=classes,
                        k=step_after.k,
                        softmax=step_after.softmax,
                        datatype=datatype,
                    )
                elif isinstance(step_after, Softmax):
                    yield from launches.softmax(scores=0, into=0, rows=1, classes=classes, datatype=datatype)

    def is_input(self, name: str) -> bool:
        return name in self._inputs

    def is_output(self, name: str) -> bool:
        return name in self._outputs

    def given(self, spec: TensorSpec) -> np.dtype[Any]:
        """The type in which clients send an input."""
        return _UINT8 if spec.name in self._inputs else spec.datatype.dtype

    def needed(self, visible: Sequence[str]) -> list[str]:
        """The artifact's outputs from which those that clients ask for are made, each once."""
        sources = {classes_of(name): name for name, step in self._outputs.items() if isinstance(step, TopK)}
        return list(dict.fromkeys(sources.get(name, name) for name in visible))

    def normalized(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """What the model gets for images of [rows, height, width, channels]."""
        step = self._inputs[name]
        if len(shape) != 4:
            raise BackendError(f"input '{name}': expected images [rows, height, width, channels], got {list(shape)}")
        rows, height, width, channels = shape
        height, width = step.size or (height, width)
        ordered = (rows, channels, height, width) if step.layout == "NCHW" else (rows, height, width, channels)
        return ordered, np.dtype(np.uint16 if step.datatype == "bfloat16" else step.datatype)

    def normalize(self, stream: Stream, name: str, shape: tuple[int, ...], images: int, into: int) -> None:
        rows, height, width, channels = shape
        if not math.prod(shape):
            return
        step: Normalize = self._inputs[name]
        self._launcher.normalize(stream, images=images, into=into, rows=rows, height=height, width=width, channels=channels, normalize=step)

    def visible(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What clients see of one of the artifact's outputs, by name."""
        step, (shape, _) = self._outputs.get(name), tensor
        if step is None:
            return {name: tensor}
        if isinstance(step, Softmax):
            return {name: (shape, _FLOAT32)}
        if len(shape) != 2 or shape[1] < step.k:
            raise BackendError(f"output '{name}': expected [rows, {step.k} classes or more] to take the largest of, got {list(shape)}")
        return {name: ((shape[0], step.k), _FLOAT32), classes_of(name): ((shape[0], step.k), _INT32)}

    def finish(self, stream: Stream, name: str, shape: tuple[int, ...], scores: int, into: Mapping[str, int]) -> None:
        """Write what `visible` says of an output that lies at `scores`, to the addresses in `into`."""
        step = self._outputs[name]
        if not math.prod(shape):
            return
        datatype, classes = self._scores[name], shape[-1]
        if isinstance(step, Softmax):
            self._launcher.softmax(stream, scores=scores, into=into[name], rows=math.prod(shape[:-1]), classes=classes, datatype=datatype)
            return
        self._launcher.topk(
            stream,
            scores=scores,
            values=into[name],
            indices=into[classes_of(name)],
            rows=shape[0],
            classes=classes,
            k=step.k,
            softmax=step.softmax,
            datatype=datatype,
        )

    @property
    def _launcher(self) -> Kernels:
        assert self._kernels is not None, "no kernels were loaded, as there is nothing for them to do"
        return self._kernels


def _scores(spec: TensorSpec) -> str:
    if spec.datatype not in _SCORES:
        raise LoadError(
            f"output '{spec.name}': expected one of {', '.join(each.value for each in _SCORES)} for [postprocess] on a GPU, "
            f"got {spec.datatype.value}; cast it in the model"
        )
    return _SCORES[spec.datatype]


def load_kernels(processing: Processing, ordinal: int) -> Kernels | None:
    """The kernels that `processing` needs. Raises LoadError that says what is missing."""
    if not processing.inputs and not processing.outputs:
        return None
    from headrace_kernels.device import Kernels
    from headrace_kernels.errors import KernelsUnavailable

    try:
        return Kernels(ordinal)
    except KernelsUnavailable as error:
        reason = str(error)
    raise LoadError(f"[preprocess] and [postprocess] on cuda:{ordinal}: {reason}")


__all__ = ["DeviceProcessing", "GpuBackend", "Tensor", "can_run", "load_kernels"]
