"""The CUDA backend on the host's memory and the runtime's CPU provider: what fake_cuda.py says it can show. On a GPU: tests/gpu/."""

from __future__ import annotations

import gc
import re
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx_models
import pytest
from fake_cuda import HostBackend, NumpyKernels
from headrace.backends import onnxruntime_cuda
from headrace.backends.base import DeviceArray, Expected
from headrace.backends.onnxruntime import OnnxRuntimeBackend
from headrace.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from headrace.backends.onnxruntime_runs import KEPT_PLANS
from headrace.backends.onnxruntime_session import Provider
from headrace.backends.processing import Processing
from headrace.config import InstanceConfig
from headrace.errors import BackendError, DeviceLost, LoadError
from headrace.signature import DataType, Signature
from headrace_kernels.errors import KernelsUnavailable
from headrace_kernels.normalize import Normalize
from headrace_kernels.topk import Softmax, TopK
from onnx import ModelProto

VERSION = "m/1"
ON_GPU = InstanceConfig(device="cuda:0")


def load(model: ModelProto, tmp_path: Path, options: Mapping[str, str] | None = None, processing: Processing | None = None) -> HostBackend:
    instance = InstanceConfig(device="cuda:0", options=options or {})
    backend = HostBackend(onnx_models.save(model, tmp_path / VERSION), instance)
    if processing is not None:
        assert backend.adopt(processing)
    backend.load()
    return backend


def on_cpu(model: ModelProto, tmp_path: Path) -> OnnxRuntimeBackend:
    backend = OnnxRuntimeBackend(onnx_models.save(model, tmp_path / VERSION), InstanceConfig(device="cpu"))
    backend.load()
    return backend


# -- which class -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_the_device_chooses_the_class(device: str, tmp_path: Path) -> None:
    path = onnx_models.save(onnx_models.identity(), tmp_path / VERSION)
    assert type(OnnxRuntimeBackend(path, InstanceConfig(device=device))) is OnnxRuntimeCudaBackend
    assert type(OnnxRuntimeBackend(path, InstanceConfig(device="cpu"))) is OnnxRuntimeBackend
    assert not OnnxRuntimeCudaBackend.works_on_the_caller


def test_auto_is_the_cpu_where_the_runtime_has_no_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    path = onnx_models.save(onnx_models.identity(), tmp_path / VERSION)
    assert OnnxRuntimeBackend.devices("auto") == []
    assert type(OnnxRuntimeBackend(path, InstanceConfig())) is OnnxRuntimeBackend


def test_auto_is_the_cpu_where_the_driver_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr("headrace.backends.onnxruntime_providers.cuda_unavailable", lambda: "the NVIDIA driver is not there (libcuda.so.1)")
    assert OnnxRuntimeBackend.devices("auto") == []
    with pytest.raises(LoadError, match=r"device 'cuda:0': the NVIDIA driver is not there \(libcuda.so.1\)"):
        OnnxRuntimeBackend.devices("cuda:0")


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("datatype", [d for d in DataType if d is not DataType.BYTES])
def test_every_datatype_comes_out_bit_for_bit(datatype: DataType, tmp_path: Path) -> None:
    backend = load(onnx_models.identity(datatype.value), tmp_path)
    raw = np.random.default_rng(7).integers(0, 2 if datatype is DataType.BOOL else 128, 12 * datatype.itemsize, np.uint8)
    given = raw.view(datatype.dtype).reshape(3, 4)

    for _ in range(3):  # by name, then bound by address in both lanes
        (result,) = backend.execute({"x": given}, None)

        assert result.dtype == datatype.dtype
        assert result.tobytes() == given.tobytes()


@pytest.mark.parametrize("rows", [1, 3, 16, 0])
def test_answers_are_those_of_the_cpu(rows: int, tmp_path: Path) -> None:
    model = onnx_models.mlp(16, 64, 4)
    backend, reference = load(model, tmp_path), on_cpu(model, tmp_path)
    for seed in range(4):
        x = np.random.default_rng(seed).standard_normal((rows, 16), np.float32)
        np.testing.assert_array_equal(backend.execute({"x": x}, None)[0], reference.execute({"x": x}, None)[0])


def test_outputs_are_those_asked_for_in_that_order(tmp_path: Path) -> None:
    backend = load(onnx_models.two_inputs_two_outputs(), tmp_path)
    a, b = np.full((2, 3), 2, np.float32), np.full((2, 3), 5, np.float32)
    for _ in range(2):
        product, total = backend.execute({"b": b, "a": a}, ["product", "sum"])
        assert (product[0, 0], total[0, 0]) == (10, 7)
        assert backend.execute({"a": a, "b": b}, ["product"])[0][1, 2] == 10


def test_two_batches_are_in_flight_and_keep_apart(tmp_path: Path) -> None:
    backend = load(onnx_models.identity(), tmp_path)
    backend.execute({"x": np.zeros((2, 4), np.float32)}, None)
    first = backend.launch({"x": np.full((2, 4), 1, np.float32)}, None)
    second = backend.launch({"x": np.full((2, 4), 2, np.float32)}, None)

    with pytest.raises(BackendError, match="at most 2 batches between launch and release"):
        backend.launch({"x": np.zeros((2, 4), np.float32)}, None)

    assert (second.wait()[0] == 2).all()
    assert (first.wait()[0] == 1).all()
    first.release()
    third = backend.launch({"x": np.full((2, 4), 3, np.float32)}, None)
    assert (second.wait()[0] == 2).all()
    assert (third.wait()[0] == 3).all()


def test_what_is_staged_is_not_copied_again(tmp_path: Path) -> None:
    backend = load(onnx_models.two_inputs_two_outputs(), tmp_path)
    staged = backend.stage({"b": (2, 3), "a": (2, 3)})
    assert {name: (array.shape, array.dtype) for name, array in staged.items()} == dict.fromkeys("ab", ((2, 3), np.float32))
    staged["a"][...], staged["b"][...] = 4, 3
    backend.host.copied.clear()

    pending = backend.launch(staged, ["product"])

    assert (pending.wait()[0] == 12).all()
    assert backend.host.copied[0] == 256 + 24, "one upload of both, the second aligned"


def test_inputs_that_a_client_has_on_the_device_are_read_there(tmp_path: Path) -> None:
    backend = load(onnx_models.two_inputs_two_outputs(), tmp_path)
    theirs = np.full((2, 3), 9, np.float32)
    lent = DeviceArray("cuda:0", theirs.ctypes.data, (2, 3), theirs.dtype, theirs)
    owner = weakref.ref(theirs)
    assert backend.accepts_device_inputs
    for number in range(3):
        assert backend.stage({"a": (2, 3)}) == {}, "the lane has no place for it before it is known what lies beside it"
        backend.lend({"b": lent})
        pending = backend.launch({"a": np.full((2, 3), number, np.float32)}, None)
        total, product = pending.wait()
        assert (total == number + 9).all()
        assert (product == number * 9).all()
        pending.release()
    backend.lend({"a": lent, "b": lent})
    pending = backend.launch({}, ["product"])
    del theirs, lent
    assert owner() is not None, "the batch is not released yet"
    assert (pending.wait()[0] == 81).all()
    pending.release()
    assert owner() is None
    with pytest.raises(BackendError, match="onnxruntime: "):
        backend.launch({"a": np.ones((2, 3), np.float32)}, None)


def test_what_was_staged_is_not_freed_under_what_is_lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a lent input the buffers must grow in `launch`: what was written to staging memory must not lie in them by then."""
    backend = load(
        onnx_models.parse("g (float[N,M] a, float[N,M] b) => (float[N,M] y, float[N,M] z) { y = Sub(a, b) z = Sub(b, a) }"), tmp_path
    )
    free = backend.host.free

    def spoil_and_free(pointer: int) -> None:
        backend.host.blocks[pointer][:] = 0xDD
        free(pointer)

    monkeypatch.setattr(backend.host, "free", spoil_and_free)
    monkeypatch.setattr(backend.host, "free_pinned", spoil_and_free)
    for columns in (4, 12_000, 30_000):
        theirs, ours = np.full((1, columns), 7, np.float32), np.arange(columns, dtype=np.float32).reshape(1, columns)
        given = dict(backend.stage({"a": (1, columns)})) or {"a": np.empty((1, columns), np.float32)}
        given["a"][...] = ours
        backend.lend({"b": DeviceArray("cuda:0", theirs.ctypes.data, theirs.shape, theirs.dtype, theirs)})
        pending = backend.launch(given, ["y"])
        np.testing.assert_array_equal(pending.wait()[0], ours - 7)
        pending.release()


def test_a_larger_batch_moves_the_buffers_and_is_right(tmp_path: Path) -> None:
    backend = load(onnx_models.identity(), tmp_path)
    for rows in (1, 1, 9000, 9000, 9000, 1, 1):
        x = np.random.default_rng(rows).standard_normal((rows, 4), np.float32)
        np.testing.assert_array_equal(backend.execute({"x": x}, None)[0], x)


def test_a_batch_that_gets_no_memory_leaves_nothing_that_is_known_of_what_it_freed(tmp_path: Path) -> None:
    """Bindings hold addresses: of memory that was given back for a larger block, which was then not to be had."""
    backend = load(onnx_models.parse("g (float[N,4] x) => (float[N,64] y) { y = Concat<axis=1>(" + ",".join(["x"] * 16) + ") }"), tmp_path)
    runs, lanes = backend._runs, backend._lanes
    assert runs is not None
    assert lanes is not None
    small, large = np.ones((1, 4), np.float32), np.ones((1000, 4), np.float32)  # 16 kB and 256 kB: the outputs alone must grow
    for _ in range(4):
        backend.execute({"x": small}, None)
    lane = lanes.first
    assert lane is not None
    known = [(key, plan.generation) for key, plan in runs._plans[lane.index].items()]
    backend.host.allocations_left = 0
    with pytest.raises(BackendError, match="OUT_OF_MEMORY"):
        backend.execute({"x": large}, None)
    backend.host.allocations_left = None
    assert lane.outputs.size == 0
    assert all(generation != lane.generation for _, generation in known), "a plan of memory that is gone is still taken for good"
    for x in (small, small, large, large, small):
        np.testing.assert_array_equal(backend.execute({"x": x}, None)[0], np.tile(x, 16))


def test_a_batch_beyond_the_limit_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = load(onnx_models.identity(), tmp_path)
    lanes = backend._lanes
    assert lanes is not None
    for lane in lanes.all:
        monkeypatch.setattr(lane.inputs, "_limit", 1 << 16)
    huge = np.zeros((1 << 14, 4), np.float32)
    assert backend.stage({"x": huge.shape}) == {}
    with pytest.raises(BackendError, match="take 262144 bytes: expected at most 65536"):
        backend.launch({"x": huge}, None)
    assert backend.execute({"x": huge[:2]}, None)[0].shape == (2, 4)


def test_outputs_whose_shape_depends_on_values(tmp_path: Path) -> None:
    model = onnx_models.parse("g (float[N] x) => (int64[1, K] y) { y = NonZero(x) }")
    backend = load(model, tmp_path)
    for values, expected in (([0, 1, 1], [1, 2]), ([1, 1, 1], [0, 1, 2]), ([0, 0, 1], [2]), ([0, 0, 0], []), ([5, 0, 1], [0, 2])):
        (result,) = backend.execute({"x": np.array(values, np.float32)}, None)
        assert result.tolist() == [expected]


def test_outputs_of_the_runtime_live_until_they_are_copied_and_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = load(onnx_models.identity(), tmp_path)
    bindings: list[weakref.ref[object]] = []
    make = backend._session.io_binding

    def watched() -> object:
        binding = make()
        bindings.append(weakref.ref(binding))
        return binding

    monkeypatch.setattr(backend._session, "io_binding", watched)
    pending = backend.launch({"x": np.ones((2, 4), np.float32)}, None)
    assert bindings[0]() is not None, "the copy has not been waited for"
    assert (pending.wait()[0] == 1).all()
    pending.release()
    assert bindings[0]() is None


def test_strings_run_as_on_the_cpu(tmp_path: Path) -> None:
    backend = load(onnx_models.identity("BYTES"), tmp_path)
    given = np.array([[b"a", b"bc", b"", "ü".encode()]], object)
    assert backend.stage({"x": (1, 4)}) == {}
    assert backend.execute({"x": given}, None)[0].tolist() == [["a", "bc", "", "ü"]]


def test_a_model_that_fails_says_why_and_leaves_its_lane_free(tmp_path: Path) -> None:
    backend = load(onnx_models.identity(), tmp_path)
    for _ in range(3):
        with pytest.raises(BackendError, match=r"onnxruntime: .*Got: 5 Expected: 4"):
            backend.launch({"x": np.zeros((1, 5), np.float32)}, None)
    assert backend.execute({"x": np.ones((1, 4), np.float32)}, None)[0].sum() == 4


def test_a_lost_device_is_told_from_a_failed_batch(tmp_path: Path) -> None:
    backend = load(onnx_models.identity(), tmp_path)
    lanes = backend._lanes
    assert lanes is not None
    x = np.ones((1, 4), np.float32)
    for error, expected in (("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal …", DeviceLost), ("CUDA_ERROR_INVALID_VALUE: …", BackendError)):
        pending = backend.launch({"x": x}, None)
        events = [lane.done for lane in lanes.all]
        for event in events:
            event.error = RuntimeError(error)  # type: ignore[attr-defined]  # FakeEvent's
        with pytest.raises(expected) as caught:
            pending.wait()
        assert type(caught.value) is expected
        for event in events:
            event.error = None  # type: ignore[attr-defined]
        pending.release()


# -- kernels around the model -------------------------------------------------------------------------------------------


def test_adopted_steps_run_on_the_device_with_their_definitions_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_cuda, "load_kernels", lambda processing, ordinal: NumpyKernels())
    model = onnx_models.parse("g (float[N,3,4,4] x) => (float[N,48] scores, float[N,48] odds) { scores = Flatten(x) odds = Flatten(x) }")
    steps = Processing({"x": Normalize(size=(4, 4), mean=(0.5, 0.4, 0.3))}, {"scores": TopK(2), "odds": Softmax()})
    backend = load(model, tmp_path, processing=steps)
    images = np.random.default_rng(1).integers(0, 256, (2, 8, 6, 3), np.uint8)
    flat = steps.inputs["x"](images).reshape(2, 48)
    values, classes = TopK(2)(flat)

    for _ in range(3):
        staged = backend.stage({"x": images.shape})
        assert staged["x"].dtype == np.uint8, "what clients send"
        results = backend.execute({"x": images}, None)
        for result, expected in zip(results, (values, classes, Softmax()(flat)), strict=True):
            np.testing.assert_array_equal(result, expected)
        np.testing.assert_array_equal(backend.execute({"x": images}, ["scores_classes"])[0], classes)


def test_kernels_are_there_before_the_first_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = NumpyKernels()
    monkeypatch.setattr(onnxruntime_cuda, "load_kernels", lambda processing, ordinal: kernels)
    model = onnx_models.parse(
        "g (float16[N,H,W,3] x) => (float16[N,C] scores, float16[N,2000] odds) { scores = Flatten(x) odds = Flatten(x) }"
    )
    steps = Processing({"x": Normalize(size=(4, 4), layout="NHWC", datatype="float16")}, {"scores": TopK(2), "odds": Softmax()})
    load(model, tmp_path, processing=steps)
    assert kernels.loaded == [
        "normalize_nhwc_float16_3", "resize_nhwc_float16_3", "topk_warp_float16", "topk_block_float16", "softmax_block_float16",
    ]  # fmt: skip


def test_kernels_that_cannot_be_had_are_a_load_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: NumpyKernels, planned: object) -> None:
        raise KernelsUnavailable("NVRTC cannot compile topk.cu for sm_90: libnvrtc.so.13 was not found")

    monkeypatch.setattr(NumpyKernels, "load", refuse)
    monkeypatch.setattr(onnxruntime_cuda, "load_kernels", lambda processing, ordinal: NumpyKernels())
    with pytest.raises(LoadError, match=r"\[postprocess\] on a GPU: NVRTC cannot compile topk.cu for sm_90: libnvrtc.so.13 was not found"):
        load(onnx_models.identity(), tmp_path, processing=Processing({}, {"y": TopK(1)}))


def test_what_no_kernel_takes_is_left_to_numpy(tmp_path: Path) -> None:
    for datatype, is_adopted in (("FP32", True), ("BF16", True), ("FP64", False), ("BYTES", False)):
        path = onnx_models.save(onnx_models.identity(datatype), tmp_path / datatype)
        backend = HostBackend(path, ON_GPU)
        artifact = HostBackend.inspect(path)
        backend.expect(Expected(artifact, Signature("m", artifact.inputs, artifact.outputs, 0)))
        assert backend.adopt(Processing({}, {"y": TopK(1)})) is is_adopted


def test_scores_that_no_kernel_takes_are_a_load_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_cuda, "load_kernels", lambda processing, ordinal: NumpyKernels())
    with pytest.raises(LoadError, match=r"output 'y': expected one of FP32, FP16, BF16 .* got FP64; cast it in the model"):
        load(onnx_models.identity("FP64"), tmp_path, processing=Processing({}, {"y": TopK(1)}))


# -- load and close ----------------------------------------------------------------------------------------------------


def test_everything_is_given_back(tmp_path: Path) -> None:
    backend = load(onnx_models.mlp(16, 64, 4), tmp_path)
    for rows in (1, 1, 4, 4):
        backend.execute({"x": np.zeros((rows, 16), np.float32)}, None)
    assert backend.device_memory > 0
    session = weakref.ref(backend._session)

    backend.close()

    assert session() is None, f"still referred to by {gc.get_referrers(session())}"
    assert not backend.host.blocks
    assert all(each.is_closed for each in [*backend.host.streams, *backend.host.events])


def test_a_load_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = onnx_models.save(onnx_models.identity(), tmp_path / VERSION)
    backend = HostBackend(path, InstanceConfig(device="cuda:0", options={"use_tf32": "perhaps"}))
    with pytest.raises(LoadError, match="'use_tf32': expected true or false, got 'perhaps'"):
        backend.load()
    backend.close()
    assert all(each.is_closed for each in backend.host.streams)


def test_a_model_larger_than_the_device_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fake_cuda.TOTAL", 10)
    with pytest.raises(LoadError, match=r"cuda:0 has 10 of 10 bytes free; the model's files alone have \d+"):
        load(onnx_models.identity(), tmp_path)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cudnn_conv_algo_search": "FAST"}, "'cudnn_conv_algo_search': expected one of HEURISTIC, EXHAUSTIVE, DEFAULT, got 'FAST'"),
        ({"arena_extend_strategy": "double"}, "'arena_extend_strategy': expected one of kSameAsRequested, kNextPowerOfTwo"),
        ({"gpu_mem_limit": "2G"}, "'gpu_mem_limit': expected a whole number from 1, got '2G'"),
        ({"provider": "openvino"}, "'provider': expected one of cuda, tensorrt, got 'openvino'"),
        ({"cuda_graphs": "true"}, "unknown onnxruntime option 'cuda_graphs', did you mean 'cuda_graph'?"),
    ],
)
def test_wrong_options_are_refused_on_every_device(options: Mapping[str, str], message: str, tmp_path: Path) -> None:
    path = onnx_models.save(onnx_models.identity(), tmp_path / VERSION)
    for backend in (
        HostBackend(path, InstanceConfig(device="cuda", options=options)),
        OnnxRuntimeBackend(path, InstanceConfig(options=options)),
    ):
        with pytest.raises(LoadError) as caught:
            backend.load()
        assert message in str(caught.value)
        backend.close()


def test_a_session_on_the_cpu_takes_the_gpus_options_and_leaves_them(tmp_path: Path) -> None:
    options = {"cuda_graph": "true", "gpu_mem_limit": "1000", "session.disable_cpu_ep_fallback": "true", "provider": "tensorrt"}
    backend = OnnxRuntimeBackend(
        onnx_models.save(onnx_models.identity(), tmp_path / VERSION), InstanceConfig(device="cpu", options=options)
    )
    backend.load()
    assert backend.execute({"x": np.ones((1, 4), np.float32)}, None)[0].sum() == 4


def test_providers_get_the_defaults_and_the_options() -> None:
    from headrace.backends.onnxruntime_providers import make_providers

    given = {"use_tf32": "false", "gpu_mem_limit": "1000", "cuda_graph": "true", "provider": "tensorrt", "trt_fp16_enable": "true"}
    (trt, trt_options), (cuda, options) = make_providers(InstanceConfig(device="cuda:1", options=given), 1, 4711)
    assert (trt, cuda) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert trt_options == {"device_id": "1", "user_compute_stream": "4711", "trt_fp16_enable": "1"}
    assert options == {
        "device_id": "1", "user_compute_stream": "4711", "cudnn_conv_algo_search": "HEURISTIC", "do_copy_in_default_stream": "1",
        "arena_extend_strategy": "kSameAsRequested", "enable_cuda_graph": "1", "use_tf32": "0", "gpu_mem_limit": "1000",
    }  # fmt: skip


@pytest.mark.parametrize("model", [onnx_models.identity("BYTES")], ids=["strings"])
def test_graphs_of_models_that_cannot_have_any_are_refused(model: ModelProto, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="'cuda_graph': not for models with BYTES or optional tensors"):
        load(model, tmp_path, {"cuda_graph": "true"})


def test_each_shape_of_the_warm_up_gets_a_graph_in_each_lane(tmp_path: Path) -> None:
    """The CPU provider captures nothing; what is seen here is which runs would."""
    backend = load(onnx_models.identity(), tmp_path, {"cuda_graph": "true"})
    for rows in (1, 2, 1):
        backend.execute({"x": np.ones((rows, 4), np.float32)}, None)
    for rows in range(3, 200):  # more shapes than bindings are kept for
        for _ in range(3):
            backend.launch({"x": np.ones((rows, 4), np.float32)}, None).release()
    runs = backend._runs
    assert runs is not None
    assert runs._graphs is not None
    assert [len(plans) for plans in runs._plans] == [KEPT_PLANS, KEPT_PLANS]
    ids = [plan.options.get_run_config_entry("gpu_graph_id") for plans in runs._plans for key, plan in plans.items() if key in runs._graphs]
    assert sorted(ids) == ["1", "2", "3", "4"]
    assert runs._queued.get_run_config_entry("gpu_graph_id") == "-1"
    assert runs._queued.get_run_config_entry("disable_synchronize_execution_providers") == "1"


def test_a_provider_that_cannot_be_loaded_is_named_with_its_library() -> None:
    """Of the runtime for GPUs, where that is installed and NVIDIA's libraries are not; where they are: the test in tests/gpu."""
    import onnxruntime
    from headrace.backends import onnxruntime_providers as providers

    if providers.CUDA not in onnxruntime.get_available_providers() or not providers.gpu_unavailable():
        pytest.skip("onnxruntime-gpu is not installed, or there is a GPU")
    for name, library in ((providers.CUDA, "libcu"), (providers.TENSORRT, "lib(cu|nvinfer)")):
        assert re.search(rf"{library}\w+\.so\.\d+: cannot open shared object file", providers.provider_failure(name))


def test_a_library_that_is_not_found_does_not_keep_others_from_being_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.backends import onnxruntime_providers as providers

    asked: list[str] = []

    def find(name: str) -> None:
        asked.append(name)
        raise ChildProcessError("timed out") if name == "cudart" else RuntimeError(f"Failure finding {name}")

    pathfinder = ModuleType("cuda.pathfinder")
    pathfinder.load_nvidia_dynamic_lib = find  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", pathfinder)
    providers.load_libraries()
    assert asked == ["nvrtc", "nvJitLink", "cudart", "cublasLt", "cublas", "curand", "cufft", "cudnn"]


def test_the_runtimes_word_for_missing_tensorrt_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.backends import onnxruntime_providers as providers

    monkeypatch.setattr(providers, "provider_failure", lambda name: "libnvinfer.so.10: cannot open shared object file")
    wanted: list[Provider] = [(providers.TENSORRT, {}), (providers.CUDA, {})]
    vague = LoadError("onnxruntime could not load 1/model.onnx: … Please install TensorRT libraries as mentioned …")
    assert str(providers.explain(vague, wanted)) == (
        "onnxruntime could not load its TensorrtExecutionProvider: libnvinfer.so.10: cannot open shared object file"
    )
    assert providers.explain(vague, wanted[1:]) is vague
    other = LoadError("onnxruntime could not load 1/model.onnx: bad")
    assert providers.explain(other, wanted) is other


def test_a_session_that_went_on_without_the_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the runtime does when its provider's library cannot be loaded: it says nothing and computes on the CPU."""
    from headrace.backends import onnxruntime_providers as providers

    monkeypatch.setattr(providers, "provider_failure", lambda name: "libcublasLt.so.13: cannot open shared object file")
    backend = on_cpu(onnx_models.identity(), tmp_path)
    with pytest.raises(LoadError, match=r"could not load its CUDAExecutionProvider: libcublasLt\.so\.13: cannot open"):
        providers.check_providers(backend._session, [(providers.CUDA, {})])
