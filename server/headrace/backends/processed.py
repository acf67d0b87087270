"""What model.toml declares to be done before and after the model, in numpy around any backend that does not do it itself.

It runs on the threads that the backend's own calls run on: images are made ready by whoever calls `execute` or `launch`, answers by whoever
waits for them. So a device computes one batch while the host prepares the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from headrace_kernels.topk import TopK

from headrace.backends.base import Array, ArtifactSignature, Backend, Pending, PipelinedBackend
from headrace.backends.processing import Processing, classes_of
from headrace.errors import BackendError

Finish = Callable[[list[Array]], list[Array]]


def processed(backend: Backend, processing: Processing, outputs: Sequence[str]) -> Backend:
    """`backend` with `processing`, before it is loaded: itself where it adopts that, else with numpy around it. `outputs`: the artifact's,
    in its order."""
    if processing.is_empty or backend.adopt(processing):
        return backend
    steps = _Steps(processing, outputs)
    return _ProcessedPipeline(backend, steps) if isinstance(backend, PipelinedBackend) else _Processed(backend, steps)


class _Steps:
    """Of one instance. Owns nothing that changes."""

    def __init__(self, processing: Processing, outputs: Sequence[str]) -> None:
        self._inputs = processing.inputs
        self._outputs = processing.outputs
        self._visible = processing.visible_outputs(outputs)
        self._sources = {classes_of(name): name for name, step in processing.outputs.items() if isinstance(step, TopK)}

    def prepare(self, inputs: Mapping[str, Array], staged: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """What the model takes; in the memory of `staged` where there is some."""
        made = dict(inputs)
        for name, step in self._inputs.items():
            if name in made:
                made[name] = step(made[name], staged.get(name) if staged else None)
        return made

    def shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Of what the model takes."""
        return {name: self._inputs[name].result_shape(shape) if name in self._inputs else shape for name, shape in shapes.items()}

    def is_prepared(self, name: str) -> bool:
        return name in self._inputs

    def ask(self, outputs: Sequence[str] | None) -> tuple[list[str], Finish]:
        """The model's outputs to ask for, and what makes those that were wanted of them."""
        wanted = self._visible if outputs is None else outputs
        names = list(dict.fromkeys([self._sources.get(name, name) for name in wanted]))
        return names, lambda arrays: self._finish(wanted, dict(zip(names, arrays, strict=True)))

    def _finish(self, wanted: Sequence[str], arrays: dict[str, Array]) -> list[Array]:
        made: dict[str, Array] = {}
        for name, array in arrays.items():
            step = self._outputs.get(name)
            try:
                if isinstance(step, TopK):
                    made[name], made[classes_of(name)] = step(array)
                else:
                    made[name] = array if step is None else step(array)
            except ValueError as error:  # scores of another shape than the artifact declares
                reason = f"output '{name}': {error}"
            else:
                continue
            raise BackendError(reason)
        return [made[name] for name in wanted]


class _Processed(Backend):
    """Owns the backend inside."""

    name = "processed"
    default_filename = ""
    platform = ""

    def __init__(self, inner: Backend, steps: _Steps) -> None:
        super().__init__(inner.path, inner.instance)
        self._inner = inner
        self._steps = steps

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._inner!r})"

    @property
    def works_on_the_caller(self) -> bool:  # type: ignore[override]  # of the instance inside, which may know it once it is loaded
        return self._inner.works_on_the_caller

    @property
    def device(self) -> str:
        return self._inner.device

    @property
    def device_memory(self) -> int:
        return self._inner.device_memory

    @classmethod
    def inspect(cls, path: Path) -> ArtifactSignature:
        raise TypeError("expected the class of the backend inside: it knows its artifacts")

    @classmethod
    def estimate_memory(cls, path: Path) -> int:
        raise TypeError("expected the class of the backend inside: it knows its artifacts")

    def interrupt(self) -> None:
        self._inner.interrupt()

    def load(self) -> None:
        self._inner.load()

    def warm(self, inputs: Mapping[str, Array]) -> None:
        if type(self._inner).warm is Backend.warm:
            self.execute(inputs, None)  # also what comes after the model, since this is what l(b) is learnt by
        else:
            self._inner.warm(self._steps.prepare(inputs))

    def shrink(self, inputs: Mapping[str, Array]) -> None:
        self._inner.shrink(self._steps.prepare(inputs))

    def execute(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> list[Array]:
        names, finish = self._steps.ask(outputs)
        return finish(self._inner.execute(self._steps.prepare(inputs), names))

    def close(self) -> None:
        self._inner.close()


class _ProcessedPending(Pending):
    def __init__(self, inner: Pending, finish: Finish) -> None:
        self._inner = inner
        self._finish = finish

    def wait(self) -> list[Array]:
        return self._finish(self._inner.wait())

    def release(self) -> None:
        self._inner.release()


class _ProcessedPipeline(_Processed, PipelinedBackend):
    """Owns, besides, the staging memory that the next `launch` may write to."""

    _inner: PipelinedBackend

    def __init__(self, inner: PipelinedBackend, steps: _Steps) -> None:
        super().__init__(inner, steps)
        self._staged: dict[str, Array] = {}

    @property
    def lanes(self) -> int:  # type: ignore[override]  # as above
        return self._inner.lanes

    def stage(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Array]:
        """For what the model takes as it is. What is prepared goes to that memory by itself."""
        staged = self._inner.stage(self._steps.shapes(shapes))
        self._staged = {name: array for name, array in staged.items() if self._steps.is_prepared(name)}
        return {name: array for name, array in staged.items() if name not in self._staged}

    def launch(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> Pending:
        staged, self._staged = self._staged, {}
        names, finish = self._steps.ask(outputs)
        return _ProcessedPending(self._inner.launch(self._steps.prepare(inputs, staged), names), finish)
