"""The backend on fake_tensorrt.py and fake_cuda.py, which say what that can show. On a GPU: tests/gpu/test_tensorrt.py."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import onnx_models
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from fake_tensorrt import WIDTH, FakeTensorRt, QueuedKernels, plan_of, scaling
from headrace.backends import cuda_processing, tensorrt, tensorrt_engine, tensorrt_plans
from headrace.backends.base import ArtifactSignature, DeviceArray, Expected
from headrace.backends.processing import Processing
from headrace.backends.tensorrt import TensorRtBackend
from headrace.backends.tensorrt_build import Build
from headrace.config import InstanceConfig, SourceConfig
from headrace.errors import BackendError, DeviceLost, LoadError
from headrace.lifecycle.inspection import inspect
from headrace.model_files import load_model_config
from headrace.signature import DataType, Signature, TensorSpec
from headrace.sources.base import Fetched
from headrace.sources.directory_destination import DirectoryDestination
from headrace.sources.publish import Order, publish
from headrace_kernels.topk import TopK
from structlog.testing import CapturingLogger

TRUSTED = {"trust_plans": "true"}
ARTIFACT = ArtifactSignature((TensorSpec("x", DataType.FP32, (-1, WIDTH)),), (TensorSpec("y", DataType.FP32, (-1, WIDTH)),))
RANGES = [(1, 1), (2, 8), (9, 32)]


def expected(largest: int = 32, allowed: tuple[int, ...] = (), *, is_signed: bool = False) -> Expected:
    return Expected(ARTIFACT, Signature("m", ARTIFACT.inputs, ARTIFACT.outputs, largest), allowed, is_signed)


class Machine(fake_tensorrt.Machine):
    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        super().__init__(monkeypatch)
        self.directory = directory

    def plan(self, **more: Any) -> TensorRtBackend:
        path = self.directory / "m/1/model.plan"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(plan_of(more.pop("ranges", RANGES), [2.0] * WIDTH, **more))
        return self.backend(path, TRUSTED)

    def onnx(self, weight: float = 3.0, version: int = 1, **options: str) -> TensorRtBackend:
        path = onnx_models.save(scaling(weight), self.directory / f"m/{version}")
        return self.backend(path, {"cache_directory": str(self.directory / "engines"), **options})

    def backend(self, path: Path, options: Mapping[str, str]) -> TensorRtBackend:
        backend = TensorRtBackend(path, InstanceConfig(options=options))
        backend.expect(expected())
        return backend


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    yield Machine(monkeypatch, tmp_path)
    fake_tensorrt.STREAMS.clear()


def loaded(backend: TensorRtBackend) -> TensorRtBackend:
    backend.load()
    return backend


def batch(rows: int, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    return {"x": np.random.default_rng(seed).standard_normal((rows, WIDTH), np.float32)}


def check(backend: TensorRtBackend, rows: int, factor: float = 2.0, seed: int = 0) -> None:
    inputs = batch(rows, seed)
    [y] = backend.execute(inputs, None)
    np.testing.assert_array_equal(y, inputs["x"] * np.float32(factor))


# -- who is trusted ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filename", ["model.plan", "model.engine", "model"])
def test_plan_that_nobody_vouched_for_is_refused_and_not_opened(machine: Machine, filename: str) -> None:
    path = machine.directory / "m/1" / filename
    path.parent.mkdir(parents=True, exist_ok=True)
    with pytest.raises(LoadError, match=f"expected 1/{filename}, found no such file; 'filename' in model.toml"):
        TensorRtBackend.check_trusted(path, InstanceConfig(), is_signed=False)
    path.write_bytes(b"plan")
    with pytest.raises(LoadError, match=r"nobody has vouched for this one: expected a version whose signature is verified .*trust_plans"):
        TensorRtBackend.check_trusted(path, InstanceConfig(), is_signed=False)
    TensorRtBackend.check_trusted(path, InstanceConfig(), is_signed=True)
    TensorRtBackend.check_trusted(path, InstanceConfig(options=TRUSTED), is_signed=False)


def test_load_asks_for_trust_by_itself(machine: Machine) -> None:
    path = machine.plan().path
    backend = machine.backend(path, {})
    with pytest.raises(LoadError, match="nobody has vouched"):
        backend.load()
    assert not machine.tensorrt.engines
    backend.expect(expected(is_signed=True))
    check(loaded(backend), 1)
    assert machine.tensorrt.allowed_host_code == [True]


def test_load_that_was_told_nothing_opens_no_plan(machine: Machine) -> None:
    with pytest.raises(LoadError, match="nobody has vouched"):
        TensorRtBackend(machine.plan().path, InstanceConfig()).load()
    assert not machine.tensorrt.engines


def test_plan_of_a_signed_version_is_taken_and_of_an_unsigned_one_not(machine: Machine) -> None:
    """From `headrace publish` to what the server finds."""
    key = ec.generate_private_key(ec.SECP256R1())
    directory, private = machine.directory / "models" / "m", machine.directory / "key.pem"
    directory.mkdir(parents=True)
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (directory / "key.pub").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    toml = 'backend = "tensorrt"\nmax_batch_size = 32\nsignature_policy = "warn"\nsignature_key = "key.pub"\n'
    (directory / "model.toml").write_text(toml)
    destination = DirectoryDestination(str(directory.parent), SourceConfig())
    plan = machine.plan().path
    with pytest.raises(LoadError, match=r"was not published: .*nobody has vouched"):
        publish(Order(plan, "m"), destination, {"tensorrt": TensorRtBackend})
    published = Path(publish(Order(plan, "m", signing_key=private), destination, {"tensorrt": TensorRtBackend}).location)
    config = load_model_config(directory, "m")
    fetched = Fetched(directory, published)
    inspection = inspect(config, fetched, {"tensorrt": TensorRtBackend})
    assert inspection.is_signed
    assert inspection.effective.artifact.inputs == ARTIFACT.inputs
    (published / "manifest.json.sig").unlink()
    with pytest.raises(LoadError, match="nobody has vouched"):
        inspect(config, fetched, {"tensorrt": TensorRtBackend})


def test_onnx_needs_no_trust_and_its_engine_brings_no_code(machine: Machine) -> None:
    TensorRtBackend.check_trusted(Path("m/1/model.onnx"), InstanceConfig(), is_signed=False)
    check(loaded(machine.onnx()), 1, 3.0)
    assert machine.tensorrt.allowed_host_code == [False]


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 32])
def test_answers_are_those_of_the_model_at_every_size(machine: Machine, rows: int) -> None:
    backend = loaded(machine.plan())
    for seed in range(7):
        check(backend, rows, seed=seed)


def test_two_batches_are_in_flight_and_keep_apart(machine: Machine) -> None:
    backend = loaded(machine.plan())
    first, second = batch(4, 1), batch(4, 2)
    pending = [backend.launch(first, None), backend.launch(second, None)]
    with pytest.raises(BackendError, match="at most 2 batches"):
        backend.launch(first, None)
    for given, each in zip((first, second), pending, strict=True):
        np.testing.assert_array_equal(each.wait()[0], given["x"] * np.float32(2))
        each.release()
    check(backend, 4)


def test_what_was_gathered_into_the_lane_is_not_copied_again(machine: Machine) -> None:
    backend = loaded(machine.plan())
    staged = backend.stage({"x": (3, WIDTH)})
    staged["x"][...] = 7
    pending = backend.launch(staged, ["y"])
    np.testing.assert_array_equal(pending.wait()[0], np.full((3, WIDTH), 14, np.float32))
    pending.release()
    assert backend.stage({"z": (3, WIDTH)}) == {}


def test_input_that_lies_on_the_device_is_read_there(machine: Machine) -> None:
    backend = loaded(machine.plan())
    for seed in range(5):
        there = batch(4, seed)["x"]
        machine.gpu.copied.clear()
        backend.lend({"x": DeviceArray("cuda:0", there.ctypes.data, there.shape, there.dtype, there)})
        [y] = backend.execute({}, None)
        np.testing.assert_array_equal(y, there * np.float32(2))
        assert machine.gpu.copied == [there.nbytes, y.nbytes]
    check(backend, 4)


def test_each_size_runs_in_the_narrowest_profile(machine: Machine) -> None:
    backend = loaded(machine.plan())
    profiles = []
    for rows in (1, 3, 20):
        before = len(machine.tensorrt.contexts)
        check(backend, rows)
        profiles.append(machine.tensorrt.contexts[before].profile)
    assert profiles == [0, 1, 2]


def test_shape_that_the_engine_was_not_built_for_fails_its_batch_alone(machine: Machine) -> None:
    backend = loaded(machine.plan())
    with pytest.raises(
        BackendError, match=r"input 'x': expected a shape that the engine was built for, \[1,16\] to \[1,16\], .*got \[33,16\]"
    ):
        backend.execute(batch(33), None)
    check(backend, 2)


def test_batch_that_gets_no_memory_leaves_no_graph_of_what_it_freed(machine: Machine) -> None:
    """The fake's own memory is the host's: a replay at addresses that were given back would end the process."""
    backend = machine.plan(ranges=[(1, 4096)])
    backend.expect(expected(4096))
    backend.load()
    lanes = backend._lanes
    assert lanes is not None
    for each in lanes.all:
        each.inputs.reserve(4 * WIDTH * 4096)  # so that the outputs alone must grow
    for _ in range(4):
        check(backend, 1)
    lane = lanes.first
    assert lane is not None
    [known] = backend._wirings[lane.index].values()
    machine.gpu.allocations_left = 0
    with pytest.raises(BackendError, match="OUT_OF_MEMORY"):
        backend.execute(batch(4096), None)
    machine.gpu.allocations_left = None
    assert lane.outputs.size == 0
    assert known.generation != lane.generation
    for rows in (1, 1, 1, 4096, 1, 1):
        check(backend, rows, seed=rows)


def test_failed_execution_is_told_with_what_tensorrt_logged(machine: Machine) -> None:
    backend = loaded(machine.plan())
    machine.tensorrt.errors["execute_async_v3"] = "Error Code 2: no such tactic"
    with pytest.raises(BackendError, match=r"1/model\.plan: Error Code 2: no such tactic") as caught:
        backend.execute(batch(1), None)
    assert not isinstance(caught.value, DeviceLost)
    for _ in range(4):
        check(backend, 1)


def test_error_after_which_nothing_runs_is_a_lost_device(machine: Machine) -> None:
    backend = loaded(machine.plan())
    machine.tensorrt.errors["execute_async_v3"] = "Cuda Runtime (an illegal memory access was encountered)"
    with pytest.raises(DeviceLost):
        backend.execute(batch(1), None)


def test_shape_that_only_the_data_decides(machine: Machine) -> None:
    backend = loaded(machine.plan(dynamic=True))
    for seed in range(5):
        inputs = batch(8, seed)
        [y] = backend.execute(inputs, None)
        np.testing.assert_array_equal(y, inputs["x"][inputs["x"][:, 0] > 0] * np.float32(2))
    assert not machine.graphs


# -- graphs ------------------------------------------------------------------------------------------------------------


def test_graph_is_captured_of_what_has_run_and_then_replayed(machine: Machine) -> None:
    backend = loaded(machine.plan())
    for seed in range(6):
        check(backend, 4, seed=seed)
    assert len(machine.graphs) == backend.lanes
    assert [graph.launches for graph in machine.graphs] == [2, 2]
    machine.tensorrt.calls.clear()
    check(backend, 4, seed=9)
    assert machine.tensorrt.calls == []


def test_warming_leaves_a_graph_in_every_lane(machine: Machine) -> None:
    backend = loaded(machine.plan())
    backend.warm(batch(8))
    assert len(machine.graphs) == backend.lanes


def test_sizes_that_come_seldom_share_a_context_without_graphs(machine: Machine) -> None:
    backend = loaded(machine.plan())
    for seed, rows in enumerate([3, 5, 6, 7] * 4):
        check(backend, rows, seed=seed)
    assert not machine.graphs
    assert len(machine.tensorrt.contexts) == backend.lanes


def test_allowed_sizes_have_graphs(machine: Machine) -> None:
    backend = machine.plan()
    backend.expect(expected(allowed=(1, 6, 32)))
    backend.load()
    for rows in (6, 8):
        for seed in range(4):
            check(backend, rows, seed=seed)
    assert len(machine.graphs) == backend.lanes


def test_graph_does_not_outlive_the_addresses_that_it_holds(machine: Machine) -> None:
    backend = loaded(machine.plan(ranges=[(1, 4096)]))
    backend.expect(expected(4096))
    for rows in (1, 1, 1, 1, 4096, 4096, 1, 1, 1, 1, 1, 1):
        check(backend, rows, seed=rows)
    assert sum(graph.is_closed for graph in machine.graphs) == backend.lanes


def test_model_of_which_no_graph_can_be_captured_runs_without(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    log = CapturingLogger()
    monkeypatch.setattr(tensorrt_engine, "log", log)
    machine.capture_error = RuntimeError("operation not permitted when stream is capturing")
    backend = loaded(machine.plan())
    for seed in range(8):
        check(backend, 2, seed=seed)
    assert len(log.calls) == backend.lanes


def test_option_turns_graphs_off(machine: Machine) -> None:
    backend = loaded(machine.backend(machine.plan().path, TRUSTED | {"cuda_graphs": "false"}))
    for seed in range(6):
        check(backend, 4, seed=seed)
    assert not machine.graphs


@pytest.mark.parametrize("rows", [3, 4])
def test_kernels_after_the_model_run_behind_it_in_graphs_too(machine: Machine, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "load_kernels", lambda *_: QueuedKernels())
    assert cuda_processing.load_kernels(Processing(), 0) is None
    step = TopK(3, softmax=True)
    backend = machine.plan()
    assert backend.adopt(Processing({}, {"y": step}))
    backend.load()
    for seed in range(7):
        inputs = batch(rows, seed)
        values, classes = backend.execute(inputs, None)
        want = step(inputs["x"] * np.float32(2))
        np.testing.assert_allclose(values, want[0])
        np.testing.assert_array_equal(classes, want[1])
        [alone] = backend.execute(inputs, ["y_classes"])
        np.testing.assert_array_equal(alone, want[1])
    assert bool(machine.graphs) == (rows == 4)


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"location": "HOST"}, r"1/model\.plan: input 'x' is wanted in host memory"),
        ({"format": "HWC"}, r"1/model\.plan: input 'x' is laid out as HWC; expected LINEAR, row after row"),
        ({"format": "HWC", "is_lean": True}, r"input 'x' is laid out as Channel major FP32 format \(kHWC\); expected LINEAR"),
        ({"datatype": "FP8"}, r"input 'x' is FP8, which the protocol cannot carry; expected one of FLOAT, "),
        ({"datatype": "HALF"}, r"input 'x': the model says FP32, TensorRT makes FP16 of it"),
        ({"ranges": [(1, 16)]}, r"expected an engine that takes batches of 32, it was built for \[1,16\] to \[16,16\]"),
    ],
)
def test_engine_that_does_not_fit_is_refused(machine: Machine, more: Mapping[str, Any], reason: str) -> None:
    backend = machine.plan(**more)
    with pytest.raises(LoadError, match=reason):
        backend.load()
    backend.close()
    assert not machine.gpu.blocks


def test_bindings_that_cannot_name_layouts_load_what_is_linear(machine: Machine) -> None:
    check(loaded(machine.plan(is_lean=True)), 2)


def test_file_that_is_no_plan_is_told_with_tensorrts_reason(machine: Machine) -> None:
    backend = machine.plan()
    backend.path.write_bytes(b"not a plan")
    with pytest.raises(LoadError, match=r"tensorrt 11\.4\.fake could not load 1/model\.plan: Magic tag does not match. A plan runs under"):
        backend.load()


def test_plugins_that_cannot_be_registered_are_a_load_error(machine: Machine) -> None:
    machine.tensorrt.errors["init_libnvinfer_plugins"] = ""
    with pytest.raises(LoadError, match="cannot register its plugins"):
        machine.plan().load()


@pytest.mark.parametrize("content", [None, b""])
def test_missing_or_empty_plan_is_a_load_error(machine: Machine, content: bytes | None) -> None:
    backend = machine.plan()
    backend.path.unlink()
    if content is not None:
        backend.path.write_bytes(content)
    with pytest.raises(LoadError, match=r"filename = .model\.onnx|cannot mmap an empty file"):
        backend.load()


def test_devices_are_those_that_the_process_sees(machine: Machine) -> None:
    assert [space.name for space in TensorRtBackend.devices("auto")] == ["cuda:0"]
    assert TensorRtBackend.devices("cuda:0")[0].free > 0


def test_cpu_is_no_device_for_it(machine: Machine) -> None:
    backend = TensorRtBackend(machine.plan().path, InstanceConfig(device="cpu", options=TRUSTED))
    with pytest.raises(LoadError, match="TensorRT runs on NVIDIA GPUs alone"):
        backend.load()
    with pytest.raises(LoadError, match="NVIDIA GPUs alone"):
        TensorRtBackend.devices("cpu")


def test_close_gives_everything_back(machine: Machine) -> None:
    backend = loaded(machine.plan())
    for rows in (1, 3, 4, 32):
        for _ in range(4):
            check(backend, rows)
    assert backend.device_memory == 0 or machine.gpu.blocks
    backend.close()
    assert not machine.gpu.blocks
    assert all(stream.is_closed for stream in machine.gpu.streams)
    assert all(event.is_closed for event in machine.gpu.events)
    assert all(graph.is_closed for graph in machine.graphs)
    backend.close()


def test_plan_without_a_gpu_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m/1/model.plan"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"plan")
    monkeypatch.setattr(tensorrt, "find_library", lambda: FakeTensorRt().library)
    monkeypatch.setattr("headrace.backends.cuda.cuda_unavailable", lambda: "the NVIDIA driver is not there")
    with pytest.raises(LoadError, match=r"1/model\.plan: a plan can be read on a GPU .* and nowhere else: .*driver is not there"):
        TensorRtBackend.inspect(path)


def test_onnx_is_inspected_without_tensorrt_or_gpu(tmp_path: Path) -> None:
    path = onnx_models.save(scaling(2), tmp_path / "m/1")
    assert TensorRtBackend.inspect(path).inputs == ARTIFACT.inputs
    assert TensorRtBackend.graph_digest(path)
    assert not TensorRtBackend.graph_digest(path.with_suffix(".plan"))
    assert TensorRtBackend.estimate_memory(path) > path.stat().st_size


# -- engines of ONNX models --------------------------------------------------------------------------------------------


def test_engine_is_built_once_and_then_comes_from_the_cache(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    check(loaded(machine.onnx()), 8, 3.0)
    monkeypatch.setattr(tensorrt_plans, "Build", None)
    check(loaded(machine.onnx()), 8, 3.0)


def test_other_weights_are_another_engine(machine: Machine) -> None:
    check(loaded(machine.onnx(3.0, 1)), 2, 3.0)
    check(loaded(machine.onnx(5.0, 2)), 2, 5.0)
    assert len(list((machine.directory / "engines").glob("*.plan"))) == 2


def test_cached_engine_that_tensorrt_refuses_is_built_again_and_said_so(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(machine.onnx()).close()
    log = CapturingLogger()
    monkeypatch.setattr("headrace.backends.tensorrt_cache.log", log)
    machine.tensorrt.errors["deserialize_cuda_engine"] = "Platform specific tag mismatch detected"
    check(loaded(machine.onnx()), 1, 3.0)
    [call] = log.calls
    assert "Platform specific tag mismatch" in call.kwargs["reason"]
    assert call.kwargs["next"] == "it is built again"


def test_refit_gives_the_engine_of_one_version_the_weights_of_the_next(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    first = loaded(machine.onnx(3.0, 1, refit="true"))
    monkeypatch.setattr(tensorrt_plans, "Build", None)
    second = loaded(machine.onnx(5.0, 2, refit="true"))
    check(first, 4, 3.0)
    check(second, 4, 5.0)
    check(first, 4, 3.0)
    assert len(machine.tensorrt.engines) == 2


def test_refit_that_leaves_weights_out_is_refused(machine: Machine) -> None:
    machine.tensorrt.errors["get_missing_weights"] = "w"
    with pytest.raises(LoadError, match=r"wants weights that it does not have: w"):
        machine.onnx(refit="true").load()


@pytest.mark.parametrize(("options", "reason"), [({}, "runs plans and builds none"), ({"refit": "true"}, "runs plans and builds none")])
def test_lean_runtime_builds_nothing(machine: Machine, options: Mapping[str, str], reason: str) -> None:
    machine.tensorrt = FakeTensorRt("tensorrt_lean")
    with pytest.raises(LoadError, match=f"tensorrt_lean 11.4.fake {reason}"):
        machine.onnx(**options).load()


def test_interrupted_load_ends_without_an_engine(machine: Machine) -> None:
    backend = machine.onnx()
    backend.interrupt()
    with pytest.raises(LoadError, match="given up"):
        backend.load()
    backend.close()
    assert [path.name for path in (machine.directory / "engines").iterdir()] == []


def test_interrupt_kills_the_builder(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another thread, once the builder has said that it works."""
    backend = machine.onnx()
    program = "import json, threading; print(json.dumps({'phase': 'timing'}), flush=True); threading.Event().wait()"
    command = (sys.executable, "-c", program)
    build = functools.partial(Build, command=command, on_progress=lambda _: backend.interrupt())
    monkeypatch.setattr(tensorrt_plans, "Build", build)
    with pytest.raises(LoadError, match="given up while its engine was built"):
        backend.load()


def test_free_dimension_needs_an_option(machine: Machine) -> None:
    backend = machine.onnx()
    artifact = ArtifactSignature((TensorSpec("x", DataType.FP32, (-1, -1)),), ARTIFACT.outputs)
    backend.expect(Expected(artifact, Signature("m", artifact.inputs, artifact.outputs, 8)))
    with pytest.raises(LoadError, match=r"profile\.x"):
        backend.load()


def test_shape_in_model_toml_settles_a_free_dimension(machine: Machine) -> None:
    backend = machine.onnx()
    artifact = ArtifactSignature((TensorSpec("x", DataType.FP32, (-1, -1)),), ARTIFACT.outputs)
    backend.expect(Expected(artifact, Signature("m", ARTIFACT.inputs, ARTIFACT.outputs, 32)))
    check(loaded(backend), 32, 3.0)
