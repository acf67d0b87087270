"""What captured requests are asked of: a version in this process. One behind a port is rpc/inference_client.py. Blocking."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Protocol

from headrace.backends.base import Array, BackendRegistry, select_file
from headrace.batching.assemble import as_array
from headrace.capture.captures import output_bytes
from headrace.capture.records import Captured, CapturedTensor
from headrace.errors import HeadraceError, InvalidRequest
from headrace.lifecycle.effective import EffectiveModel
from headrace.replay.comparison import Comparison, ReplayReport, Tolerance
from headrace.requests import InferRequest, InputTensor
from headrace.sources.base import Fetched
from headrace.wire.tensors import decode_bytes_tensor


class Target(Protocol):
    def ask(self, captured: Captured) -> tuple[Mapping[str, CapturedTensor], float]:
        """All outputs by name, and the seconds that they took. Raises HeadraceError for what is refused or fails."""


class LocalTarget:
    """One loaded instance of a model, on the calling thread: `with LocalTarget(effective, fetched, backends) as target`."""

    def __init__(self, effective: EffectiveModel, fetched: Fetched, backends: BackendRegistry) -> None:
        self._signature = effective.signature
        path = select_file(fetched.version_directory, effective.filename)
        self._backend = effective.make(backends[effective.backend], path, effective.instances)

    def __enter__(self) -> LocalTarget:
        self._backend.load()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._backend.close()

    def ask(self, captured: Captured) -> tuple[Mapping[str, CapturedTensor], float]:
        inputs = self._inputs(captured)
        began = time.perf_counter()
        arrays = self._backend.execute(inputs, None)
        seconds = time.perf_counter() - began
        outputs = {
            spec.name: CapturedTensor(spec.name, spec.datatype.value, tuple(array.shape), output_bytes(array))
            for spec, array in zip(self._signature.outputs, arrays, strict=True)
        }
        return outputs, seconds

    def _inputs(self, captured: Captured) -> dict[str, Array]:
        """Checked as the server checks them."""
        request = InferRequest(self._signature.model, "", captured.id, [_input(captured, tensor) for tensor in captured.inputs])
        given = self._signature.validate(request).inputs(request)
        return {spec.name: as_array(spec, tensor) for spec, tensor in zip(self._signature.inputs, given, strict=True) if tensor is not None}


def _input(captured: Captured, tensor: CapturedTensor) -> InputTensor:
    if tensor.data is None:
        raise InvalidRequest(f"input '{tensor.name}' is redacted")
    if tensor.datatype != "BYTES":
        return InputTensor(tensor.name, tensor.datatype, tensor.shape, tensor.data)
    elements = decode_bytes_tensor(tensor.data, math.prod(tensor.shape), tensor.name, captured.model)
    return InputTensor(tensor.name, tensor.datatype, tensor.shape, elements)


def replay(requests: Iterable[Captured], target: Target, tolerance: Tolerance) -> ReplayReport:
    """Ask each once more, one after the other, and compare. What fails is counted, and the replay goes on."""
    comparison = Comparison(tolerance)
    for captured in requests:
        if captured.redacted_inputs:
            comparison.leave_out()
            continue
        try:
            answer, seconds = target.ask(captured)
            comparison.add(captured, answer, seconds)
        except HeadraceError as error:
            comparison.fail(str(error))
    return comparison.report()
