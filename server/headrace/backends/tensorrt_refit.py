"""The weights of one ONNX model into an engine that was built of another with the same graph."""

from __future__ import annotations

from pathlib import Path

from headrace.backends.tensorrt_api import ICudaEngine, Library, OnnxParserRefitter, Refitter
from headrace.backends.tensorrt_builder import describe_errors
from headrace.errors import LoadError

_NAMED = 5


def refit(library: Library, engine: ICudaEngine, model: Path, place: str) -> None:
    """Give the engine all of its weights, on the current device. Blocks until they are there. Raises LoadError; then it is of no use.

    Only for an engine that runs nothing: another one of the same plan serves meanwhile.
    """
    if not library.can_build:
        raise LoadError(
            f"{place}: option refit: {library.name} cannot refit an engine, the full tensorrt can; pip install 'headrace[cpu,tensorrt]'"
        )
    refitter: Refitter = library.make("Refitter", engine)
    parser: OnnxParserRefitter = library.make("OnnxParserRefitter", refitter)
    if not parser.refit_from_file(str(model)):
        reason = describe_errors(parser.get_error, parser.num_errors) or library.take_errors() or "no reason given"
        raise LoadError(f"{place}: its weights do not fit the engine of the same graph: {reason}")
    missing = refitter.get_missing_weights()
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise LoadError(f"{place}: the engine of the same graph wants weights that it does not have: {', '.join(missing[:_NAMED])}{more}")
    if not refitter.refit_cuda_engine():
        raise LoadError(f"{place}: the engine could not take its weights: {library.take_errors() or 'no reason given'}")
