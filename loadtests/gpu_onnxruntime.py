"""ONNX Runtime on a GPU: what of the bare runtime's rate the backend keeps, and what of it the server. A section of gpu_report.

For each model: a bare IOBinding loop that uploads, runs and downloads, at its best batch size; the backend with one lane and with two, with
and without CUDA graphs, and whether its launch returns before the batch is done; a server and client processes on the other half of the
cores, with the device's busy fraction by NVML meanwhile; and the device's free memory over swaps. Rates are rows a second.
GPU_REPORT_MODELS="magika=FILE.onnx,ocr_cls=FILE.onnx" has those measured beside the generated ones. None of this has run where the project
is built.
"""

from __future__ import annotations

import collections
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from headrace.backends.base import Array, Pending
from headrace.backends.cuda import Gpu
from headrace.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from headrace.backends.onnxruntime_providers import gpu_unavailable, load_libraries
from headrace.config import InstanceConfig

from loadtests.calls import grpc_frame, infer_message
from loadtests.encoded_calls import EncodedCall
from loadtests.gpu_models import make_cnn, make_transformer
from loadtests.models import parse_models
from loadtests.open_loop import run_closed_loop
from loadtests.process import ServerProcess, free_port
from loadtests.service_level import Status
from loadtests.wire_client import Client

SIZES = (1, 4, 16, 32, 64, 128)
SECONDS = 2.0
SERVED_SECONDS = 6.0
SWAPS = 50
LAUNCHES = 50
GRAPHS = {"cuda_graph": "true"}
FREE_DIMENSION = 64
"""Taken for a dimension other than the first that a model leaves open."""


SERVED = 0.95
"""Of the bare loop's rate: what is asked of a server."""
KEPT = 16 << 20
"""Bytes that swaps may leave behind on the device: a fraction of any model's."""


class Report(Protocol):
    """What is needed of gpu_report's."""

    @property
    def device_id(self) -> int: ...


def run(report: Report) -> dict[str, Any]:
    if reason := gpu_unavailable():
        return {"checks": [{"what": "ONNX Runtime has a GPU", "passed": None, "got": reason}]}
    load_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        files = given_models(os.environ.get("GPU_REPORT_MODELS", ""))
        for name, make in (("cnn", make_cnn), ("transformer", make_transformer)):
            files[name] = Path(scratch, f"{name}.onnx")
            onnx.save(make(), files[name])
        measured = [measure(name, path, Path(scratch), report.device_id) for name, path in files.items()]
    return {
        "checks": [check for each in measured for check in checks(each)],
        "tables": [
            {"title": "Bare runtime: rows/s by batch size", "rows": [{"model": each["model"], **each["bare"]} for each in measured]},
            {
                "title": "At the best batch size",
                "rows": [{k: v for k, v in each.items() if k not in ("bare", "free")} for each in measured],
            },
        ],
    }


def given_models(text: str) -> dict[str, Path]:
    return {name: path for name, path in parse_models(text.split(",")).items() if path is not None} if text else {}


def checks(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    name, free = measured["model"], measured["free"]
    # The first ones bring what the libraries take once.
    lost = free[2] - free[-1]
    return [
        {"what": f"{name}: two lanes are faster than one", "passed": measured["overlap"] > 1, "got": round(measured["overlap"], 3)},
        {
            "what": f"{name}: server, at least {SERVED} of bare",
            "passed": measured["of_bare"] >= SERVED,
            "got": round(measured["of_bare"], 3),
        },
        {"what": f"{name}: bytes lost in {len(free)} swaps", "passed": lost < KEPT, "got": lost},
    ]


def measure(name: str, path: Path, scratch: Path, device_id: int) -> dict[str, Any]:
    place = scratch / f"only-{name}" / name / "1" / "model.onnx"
    place.parent.mkdir(parents=True)
    place.write_bytes(path.read_bytes())
    bare = {rows: bare_rate(place, rows, device_id) for rows in SIZES}
    best = max(bare, key=lambda rows: bare[rows])
    one, two = (backend_rate(place, best, lanes, {}, device_id) for lanes in (1, 2))
    share, share_graphs = launch_share(place, best, {}, device_id), float("nan")
    try:
        graphs: float | str = backend_rate(place, best, 2, GRAPHS, device_id)
        share_graphs = launch_share(place, best, GRAPHS, device_id)
    except Exception as error:  # of a model that cannot have any
        graphs = str(error)
    served, busy = server_rate(name, scratch, best, device_id)
    return {
        "model": name,
        "bare": bare,
        "rows": best,
        "bare_rate": bare[best],
        "one_lane": one,
        "two_lanes": two,
        "overlap": two / one,
        "two_lanes_graphs": graphs,
        "launch_share": share,
        "launch_share_graphs": share_graphs,
        "server": served,
        "of_bare": served / bare[best],
        "device_busy": busy,
        "free": free_after_swaps(place, best, device_id),
    }


def sample(path: Path, rows: int) -> dict[str, Array]:
    rng = np.random.default_rng(rows)
    arrays: dict[str, Array] = {}
    for spec in OnnxRuntimeCudaBackend.inspect(path).inputs:
        shape = (rows, *(FREE_DIMENSION if length < 0 else length for length in spec.shape[1:]))
        is_number = np.issubdtype(spec.datatype.dtype, np.floating)
        arrays[spec.name] = (rng.random(shape) if is_number else rng.integers(0, 128, shape)).astype(spec.datatype.dtype)
    return arrays


def bare_rate(path: Path, rows: int, device_id: int) -> float:
    """The runtime alone, as its documentation has it: inputs updated in place on the device, outputs fetched when they are done."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    provider = ("CUDAExecutionProvider", {"device_id": str(device_id), "cudnn_conv_algo_search": "HEURISTIC"})
    session = onnxruntime.InferenceSession(str(path), options, providers=[provider], enable_fallback=0)
    binding, arrays = session.io_binding(), sample(path, rows)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", device_id) for name, array in arrays.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda", device_id)

    def once() -> None:
        for name, value in values.items():
            value.update_inplace(arrays[name])
        session.run_with_iobinding(binding)
        binding.copy_outputs_to_cpu()

    for _ in range(5):
        once()
    began, done = time.monotonic(), 0
    while (took := time.monotonic() - began) < SECONDS:
        once()
        done += rows
    return done / took


def load(path: Path, lanes: int, options: Mapping[str, str], device_id: int) -> OnnxRuntimeCudaBackend:
    kind = type("Backend", (OnnxRuntimeCudaBackend,), {"lanes": lanes})
    backend: OnnxRuntimeCudaBackend = kind(path, InstanceConfig(device=f"cuda:{device_id}", options=options))
    backend.load()
    return backend


def backend_rate(path: Path, rows: int, lanes: int, options: Mapping[str, str], device_id: int) -> float:
    """Batches gathered into what `stage` gives, as the server's worker does, as many under way as there are lanes."""
    arrays = sample(path, rows)
    shapes = {name: array.shape for name, array in arrays.items()}
    backend = load(path, lanes, options, device_id)
    try:
        for _ in range(3):
            backend.execute(arrays, None)
        under_way: collections.deque[Pending] = collections.deque()
        began, done = time.monotonic(), 0
        while (took := time.monotonic() - began) < SECONDS:
            staged = dict(backend.stage(shapes))
            for name, array in arrays.items():
                if name in staged:
                    staged[name][...] = array
            under_way.append(backend.launch(staged or arrays, None))
            if len(under_way) == lanes:
                done += rows * _finish(under_way.popleft())
        for pending in under_way:
            _finish(pending)
        return done / took
    finally:
        backend.close()


def launch_share(path: Path, rows: int, options: Mapping[str, str], device_id: int) -> float:
    """Of the seconds from a batch's launch to its end, the share after which `launch` returns: near 1 where the runtime waits inside, as
    some versions do when they replay a graph, so that nothing is queued behind a batch before that is done. The median of some."""
    arrays, shares = sample(path, rows), []
    backend = load(path, 2, options, device_id)
    try:
        for _ in range(5):
            backend.execute(arrays, None)
        for _ in range(LAUNCHES):
            began = time.monotonic()
            pending = backend.launch(arrays, None)
            launched = time.monotonic()
            _finish(pending)
            shares.append((launched - began) / (time.monotonic() - began))
        return statistics.median(shares)
    finally:
        backend.close()


def _finish(pending: Pending) -> int:
    try:
        pending.wait()
    finally:
        pending.release()
    return 1


def free_after_swaps(path: Path, rows: int, device_id: int) -> list[int]:
    """The device's free bytes after each load, run and close."""
    free, arrays = [], sample(path, rows)
    for _ in range(SWAPS):
        backend = load(path, 2, {}, device_id)
        for _ in range(3):
            backend.execute(arrays, None)
        backend.close()
        gpu = Gpu(device_id)
        gpu.make_current()
        free.append(gpu.memory().free)
    return free


# -- the server --------------------------------------------------------------------------------------------------------


def server_rate(name: str, scratch: Path, rows: int, device_id: int) -> tuple[float, float]:
    """(rows/s, the device's busy fraction) of a server under closed load of single rows from processes of their own."""
    repository = scratch / f"only-{name}"
    folder = repository / name
    (folder / "model.toml").write_text(f'max_batch_size = {rows}\n[instances]\ndevice = "cuda:{device_id}"\n')
    cores = sorted(os.sched_getaffinity(0))
    mine, clients = cores[: max(len(cores) // 2, 1)], cores[len(cores) // 2 :] or cores
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "headrace.cli", "serve", "--models", str(repository), "--grpc", address, "--http", ""]
    message = grpc_frame(infer_message(name, sample(folder / "1" / "model.onnx", 1)))
    with ServerProcess(command, address=address, cores=mine, log=scratch / f"{name}.log") as server:
        server.wait_ready([name], timeout=300.0)
        concurrency = max(4 * rows // len(clients), 2)
        context = multiprocessing.get_context("spawn")
        with context.Pool(len(clients)) as pool:
            pool.starmap(_load, [(address, message, concurrency, 1.0)] * len(clients))
            with busy_fraction(device_id) as busy:
                answered = pool.starmap(_load, [(address, message, concurrency, SERVED_SECONDS)] * len(clients))
    return sum(answered) / SERVED_SECONDS, busy[0] if busy else float("nan")


def _load(address: str, message: bytes, concurrency: int, seconds: float) -> int:
    """Requests that were answered, whatever the answer says: whether it is right is what tests/gpu looks at."""
    with Client(address, 4) as client:
        results = run_closed_loop(client, [EncodedCall(message, lambda body: True)], concurrency, seconds)
    return int(np.count_nonzero(np.array(results.statuses) == Status.OK))


@contextmanager
def busy_fraction(device_id: int, every: float = 0.1) -> Iterator[list[float]]:
    """Filled at the end with the mean of NVML's utilization of the device; left empty where there is no NVML."""
    mean: list[float] = []
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device_id)
    except Exception:  # not installed, or its own errors
        yield mean
        return
    samples: list[float] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(every):
            samples.append(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield mean
    finally:
        stop.set()
        thread.join()
        mean.extend([statistics.fmean(samples)] if samples else [])
