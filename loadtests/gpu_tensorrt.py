"""TensorRT on a GPU: what builds, loads and refits take, and what of the bare engine's rate the backend keeps.

    python -m loadtests.gpu_tensorrt [--model NAME=FILE.onnx]... [--json FILE]

For each model: the first load, which builds; the second, from the cache; that of other weights, by refit; the engine alone, which does
nothing but execute on one stream at its best batch size; the backend with one lane and with two, with CUDA graphs and without; and the
device's free memory over swaps. Rates are rows a second. None of this has run where the project is built.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import onnx
from headrace.backends.base import Array, Expected, Pending
from headrace.backends.cuda import Gpu, cuda_unavailable
from headrace.backends.tensorrt import TensorRtBackend
from headrace.backends.tensorrt_api import find_library
from headrace.config import InstanceConfig
from headrace.errors import LoadError
from headrace.signature import Signature

from loadtests.gpu_models import make_cnn, make_transformer
from loadtests.gpu_onnxruntime import sample
from loadtests.models import add_models_argument, selected_models

SIZES = (1, 8, 32, 64, 128)
"""Those that engines are built for: the server's `allowed_batch_sizes`."""
SECONDS = 2.0
SWAPS = 50


class Report(Protocol):
    """What is needed of whoever runs this: models by name, to be measured beside the generated ones."""

    @property
    def models(self) -> Mapping[str, Path]: ...


def run(report: Report) -> dict[str, Any]:
    """All of it, by model; or under `skipped` why not."""
    try:
        library = find_library(to_build=True)
    except LoadError as error:
        return {"skipped": str(error)}
    if reason := cuda_unavailable():
        return {"skipped": reason}
    results: dict[str, Any] = {"tensorrt": library.version}
    with tempfile.TemporaryDirectory() as scratch:
        for name, model, other in _models(report):
            try:
                results[name] = measure(Path(scratch, name), model, other)
            except LoadError as error:  # of models that TensorRT does not take
                results[name] = {"failed": str(error)}
    return results


def _models(report: Report) -> list[tuple[str, onnx.ModelProto, onnx.ModelProto | None]]:
    """Each with the same graph under other weights, where it can be generated."""
    generated = [("cnn", make_cnn(), make_cnn(seed=51)), ("transformer", make_transformer(), make_transformer(seed=13))]
    return [*generated, *((name, onnx.load(str(path)), None) for name, path in report.models.items())]


def measure(scratch: Path, model: onnx.ModelProto, other: onnx.ModelProto | None) -> dict[str, Any]:
    path = _save(model, scratch / "m" / "1")
    cache = {"cache_directory": str(scratch / "engines")}
    seconds = {"built": _load_seconds(path, cache), "from_cache": _load_seconds(path, cache)}
    if other is not None:
        refit = {**cache, "refit": "true"}
        seconds["built_refittable"] = _load_seconds(path, refit)
        seconds["refitted"] = _load_seconds(_save(other, scratch / "m" / "2"), refit)
    bare = bare_rates(path, cache)
    best = max(bare, key=lambda rows: bare[rows])
    lanes = {count: backend_rate(path, best, count, cache) for count in (1, 2)}
    without = backend_rate(path, best, 2, {**cache, "cuda_graphs": "false"})
    return {
        "load_seconds": seconds,
        "bare": bare,
        "best_rows": best,
        "backend_one_lane": lanes[1],
        "backend_two_lanes": lanes[2],
        "overlap": lanes[2] / lanes[1],
        "backend_to_bare": lanes[2] / bare[best],
        "graphs_to_none": lanes[2] / without,
        "free_bytes_by_swap": free_after_swaps(path, best, cache),
    }


def _save(model: onnx.ModelProto, directory: Path) -> Path:
    directory.mkdir(parents=True)
    path = directory / "model.onnx"
    onnx.save(model, path)
    return path


def load(path: Path, options: Mapping[str, str], lanes: int = 2) -> TensorRtBackend:
    kind = type("Backend", (TensorRtBackend,), {"lanes": lanes})
    backend: TensorRtBackend = kind(path, InstanceConfig(device="cuda:0", options=options))
    artifact = TensorRtBackend.inspect(path)
    backend.expect(Expected(artifact, Signature("m", artifact.inputs, artifact.outputs, SIZES[-1]), SIZES))
    backend.load()
    return backend


def _load_seconds(path: Path, options: Mapping[str, str]) -> float:
    began = time.monotonic()
    backend = load(path, options)
    took = time.monotonic() - began
    backend.close()
    return took


def bare_rates(path: Path, options: Mapping[str, str]) -> dict[int, float]:
    """The engine's own rate by batch size: one context, on inputs that are on the device already, nothing fetched."""
    backend = load(path, options)
    rates = {}
    try:
        for rows in SIZES:
            backend.warm(sample(path, rows))
            rates[rows] = _bare_rate(backend, sample(path, rows))
    finally:
        backend.close()
    return rates


def _bare_rate(backend: TensorRtBackend, arrays: Mapping[str, Array]) -> float:
    lanes = backend._lanes
    assert lanes is not None
    rows = next(iter(arrays.values())).shape[0]
    bound = backend._contexts[0].bind({name: array.shape for name, array in arrays.items()})
    stream, done, began = lanes.streams.compute, 0, time.monotonic()
    while (took := time.monotonic() - began) < SECONDS:
        for _ in range(20):
            bound.run(stream)
        stream.sync()
        done += 20 * rows
    return done / took


def backend_rate(path: Path, rows: int, lanes: int, options: Mapping[str, str]) -> float:
    """Batches gathered into what `stage` gives, as the server's worker does, as many under way as there are lanes."""
    arrays = sample(path, rows)
    shapes = {name: array.shape for name, array in arrays.items()}
    backend = load(path, options, lanes)
    under_way: collections.deque[Pending] = collections.deque()
    try:
        backend.warm(arrays)
        done, began = 0, time.monotonic()
        while (took := time.monotonic() - began) < SECONDS:
            staged = dict(backend.stage(shapes))
            for name, array in staged.items():
                array[...] = arrays[name]
            under_way.append(backend.launch({**arrays, **staged}, None))
            if len(under_way) == lanes:
                _finish(under_way.popleft())
                done += rows
        return done / took
    finally:
        for pending in under_way:
            _finish(pending)
        backend.close()


def _finish(pending: Pending) -> None:
    try:
        pending.wait()
    finally:
        pending.release()


def free_after_swaps(path: Path, rows: int, options: Mapping[str, str]) -> list[int]:
    """The device's free bytes after each load, warm-up and close."""
    free, arrays, gpu = [], sample(path, rows), Gpu(0)
    for _ in range(SWAPS):
        backend = load(path, options)
        backend.warm(arrays)
        backend.close()
        gpu.make_current()
        free.append(gpu.memory().free)
    return free


class _Given:
    def __init__(self, models: Mapping[str, Path]) -> None:
        self.models = models


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="loadtests.gpu_tensorrt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_models_argument(parser)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    given = {name: path for name, path in selected_models(parser, options).items() if path is not None} if options.model else {}
    result = run(_Given(given))
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text)
    return 1 if "skipped" in result else 0


if __name__ == "__main__":
    sys.exit(main())
