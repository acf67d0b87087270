from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_models
import pytest
from headrace.backends.base import Array
from headrace.backends.onnxruntime import OnnxRuntimeBackend
from headrace.config import InstanceConfig
from headrace.errors import BackendError, LoadError
from headrace.signature import DataType, TensorSpec
from onnx import ModelProto, TensorProto, helper

VERSION = "m/1"


def load(model: ModelProto, tmp_path: Path, instance: InstanceConfig | None = None) -> OnnxRuntimeBackend:
    backend = OnnxRuntimeBackend(onnx_models.save(model, tmp_path / VERSION), instance or InstanceConfig())
    backend.load()
    return backend


def text(*elements: bytes) -> Array:
    array = np.empty(len(elements), object)
    array[:] = elements
    return array


# -- what runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("datatype", [d for d in DataType if d is not DataType.BYTES])
def test_every_datatype_comes_out_bit_for_bit(datatype: DataType, tmp_path: Path) -> None:
    backend = load(onnx_models.identity(datatype.value), tmp_path)
    raw = np.random.default_rng(7).integers(0, 2 if datatype is DataType.BOOL else 128, 12 * datatype.itemsize, np.uint8)
    given = raw.view(datatype.dtype).reshape(3, 4)

    (result,) = backend.execute({"x": given}, None)

    assert result.dtype == datatype.dtype
    assert result.shape == (3, 4)
    assert result.tobytes() == given.tobytes()


def test_inspection_names_every_datatype(tmp_path: Path) -> None:
    for datatype in DataType:
        path = onnx_models.save(onnx_models.identity(datatype.value), tmp_path / datatype.value)
        artifact = OnnxRuntimeBackend.inspect(path)
        assert artifact.inputs == (TensorSpec("x", datatype, (-1, 4)),)
        assert artifact.outputs == (TensorSpec("y", datatype, (-1, 4)),)


@pytest.mark.parametrize("datatype", [DataType.FP32, DataType.BF16])
def test_zero_rows_are_no_error(datatype: DataType, tmp_path: Path) -> None:
    (result,) = load(onnx_models.identity(datatype.value), tmp_path).execute({"x": np.zeros((0, 4), datatype.dtype)}, None)
    assert result.shape == (0, 4)


def test_scalar_input_keeps_rank_zero(tmp_path: Path) -> None:
    backend = load(onnx_models.scalar_factor(), tmp_path)
    (result,) = backend.execute({"x": np.ones((2, 4), np.float32), "k": np.array(3, np.float32)}, None)
    assert (result == 3).all()


@pytest.mark.parametrize("datatype", [DataType.FP64, DataType.BF16, DataType.BYTES])
def test_scalar_output_keeps_rank_zero(datatype: DataType, tmp_path: Path) -> None:
    given = np.array(b"word" if datatype is DataType.BYTES else 5, datatype.dtype)
    (result,) = load(onnx_models.identity(datatype.value, ""), tmp_path).execute({"x": given}, None)
    assert result.shape == ()
    assert result.item() == ("word" if datatype is DataType.BYTES else 5)


def test_outputs_come_in_the_order_asked_for_and_no_others(tmp_path: Path) -> None:
    backend = load(onnx_models.two_inputs_two_outputs(), tmp_path)
    inputs: Mapping[str, Array] = {"a": np.full((1, 3), 3, np.float32), "b": np.full((1, 3), 4, np.float32)}

    assert [array[0, 0] for array in backend.execute(inputs, None)] == [7, 12]
    assert [array[0, 0] for array in backend.execute(inputs, ["product", "sum"])] == [12, 7]
    assert [array[0, 0] for array in backend.execute(inputs, ["product"])] == [12]


def test_absent_optional_input_is_absent_in_the_model(tmp_path: Path) -> None:
    backend = load(onnx_models.optional_bias(), tmp_path)
    ones = np.ones((1, 4), np.float32)

    assert backend.execute({"x": ones}, None)[0].tolist() == [[1, 1, 1, 1]]
    assert backend.execute({"x": ones, "bias": ones}, None)[0].tolist() == [[2, 2, 2, 2]]
    assert [s.optional for s in OnnxRuntimeBackend.inspect(backend.path).inputs] == [False, True]


def test_input_with_an_initializer_is_no_input(tmp_path: Path) -> None:
    backend = load(onnx_models.default_factor(), tmp_path)
    assert [spec.name for spec in OnnxRuntimeBackend.inspect(backend.path).inputs] == ["x"]
    assert backend.execute({"x": np.ones((1, 4), np.float32)}, None)[0].tolist() == [[2, 2, 2, 2]]


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("datatype", [DataType.FP32, DataType.BF16])
def test_reads_views_of_a_received_message_and_never_writes_to_them(datatype: DataType, offset: int, tmp_path: Path) -> None:
    message = bytes(offset) + np.arange(8).astype(datatype.dtype).tobytes()
    view = np.frombuffer(message, datatype.dtype, offset=offset).reshape(2, 4)

    (result,) = load(onnx_models.identity(datatype.value), tmp_path).execute({"x": view}, None)

    assert result.tolist() == view.tolist()
    assert not np.shares_memory(result, view)
    assert result.flags.writeable
    assert message == bytes(offset) + np.arange(8).astype(datatype.dtype).tobytes()


def test_outputs_survive_later_runs_and_close(tmp_path: Path) -> None:
    backend = load(onnx_models.mlp(16, 64, 4), tmp_path)
    x = np.ones((8, 16), np.float32)
    (first,) = backend.execute({"x": x}, None)
    kept = first.copy()
    for _ in range(5):
        backend.execute({"x": x * 2}, None)
    backend.close()
    gc.collect()
    assert first.tobytes() == kept.tobytes()


def test_rows_of_a_batch_equal_single_rows(tmp_path: Path) -> None:
    backend = load(onnx_models.mlp(16, 64, 64, 4), tmp_path)
    rows = np.random.default_rng(3).standard_normal((32, 16), np.float32)
    (batch,) = backend.execute({"x": rows}, None)
    singles = np.concatenate([backend.execute({"x": rows[i : i + 1]}, None)[0] for i in range(32)])
    np.testing.assert_allclose(batch, singles, rtol=1e-5, atol=1e-6)


# -- strings and BF16 --------------------------------------------------------------------------------------------------


def test_strings_go_in_as_bytes_and_come_out_as_text(tmp_path: Path) -> None:
    backend = load(onnx_models.strings_concat(), tmp_path)
    a, b = text(b"a", "é".encode()).reshape(1, 2), text(b"\0b", b"").reshape(1, 2)
    (result,) = backend.execute({"a": a, "b": b}, None)
    assert result.tolist() == [["a\0b", "é"]]
    assert result.dtype == object


def test_text_is_upper_cased_by_the_model(tmp_path: Path) -> None:
    (result,) = load(onnx_models.strings_upper(), tmp_path).execute({"x": text(b"abc", b"dEf")}, None)
    assert result.tolist() == ["ABC", "DEF"]


def test_bytes_that_are_not_utf8_reach_the_model_and_leave_batch_mates_alone(tmp_path: Path) -> None:
    backend = load(onnx_models.strings_lookup(), tmp_path)
    (result,) = backend.execute({"x": text(b"yes", b"\xff\xfe\xfd", "naïve".encode(), b"", b"naive\xff")}, None)
    assert result.tolist() == [1, -1, 2, -1, -1]


def test_bytes_with_nul_that_are_not_utf8_are_refused_by_position(tmp_path: Path) -> None:
    backend = load(onnx_models.strings_lookup(), tmp_path)
    with pytest.raises(BackendError, match=r"input 'x': expected UTF-8, element 1 of 2 is not"):
        backend.execute({"x": text(b"yes\0", b"\xff\0")}, None)


def test_one_long_string_among_many_is_not_padded_to_gigabytes(tmp_path: Path) -> None:
    backend = load(onnx_models.strings_lookup(), tmp_path)
    elements = text(b"\xff" * 1_000_000, *[b"yes"] * 100)
    with pytest.raises(BackendError, match="element 0 of 101"):
        backend.execute({"x": elements}, None)


def test_text_that_the_model_makes_unreadable_fails_the_batch(tmp_path: Path) -> None:
    backend = load(onnx_models.identity("BYTES", "N"), tmp_path)
    with pytest.raises(BackendError, match="utf-8"):
        backend.execute({"x": text(b"\xff")}, None)


def test_bfloat16_beside_other_datatypes(tmp_path: Path) -> None:
    backend = load(onnx_models.bfloat16_double(), tmp_path)
    one_and_a_half = np.full((2, 4), 0x3FC0, np.uint16)
    k = np.full((2, 4), 2, np.float32)

    y, z = backend.execute({"x": one_and_a_half, "k": k}, None)
    assert (y == 0x4060).all()  # 3.5
    assert (z == 3.5).all()
    (only_z,) = backend.execute({"x": one_and_a_half, "k": k}, ["z"])
    assert (only_z == 3.5).all()


def test_strings_in_and_bfloat16_out_are_refused_at_load(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"1/model.onnx: input 's' is BYTES and output 'y' BF16"):
        load(onnx_models.bfloat16_and_strings(), tmp_path)


# -- failures ----------------------------------------------------------------------------------------------------------


def test_failing_run_gives_the_runtimes_reason_and_the_next_run_works(tmp_path: Path) -> None:
    backend = load(onnx_models.fails_on_large_index(), tmp_path)
    with pytest.raises(BackendError, match=r"onnxruntime: .*Gather.*7"):
        backend.execute({"index": np.array([0, 7])}, None)
    assert backend.execute({"index": np.array([0, 2])}, None)[0].tolist() == [10, 30]


def test_a_failure_keeps_neither_the_runtimes_exception_nor_the_arrays(tmp_path: Path) -> None:
    backend = load(onnx_models.fails_on_large_index(), tmp_path)
    array = np.array([0, 7])
    alive = weakref.ref(array)
    with pytest.raises(BackendError) as caught:
        backend.execute({"index": array}, None)
    error = caught.value.with_traceback(None)
    del caught, array
    assert error.__context__ is None
    assert error.__cause__ is None
    assert alive() is None


def test_a_failure_is_quiet_on_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    backend = load(onnx_models.fails_on_large_index(), tmp_path)
    with pytest.raises(BackendError):
        backend.execute({"index": np.array([9])}, None)
    assert capfd.readouterr().err == ""


def test_nan_is_an_answer(tmp_path: Path) -> None:
    (result,) = load(onnx_models.square_root(), tmp_path).execute({"x": np.array([[-1, 4, 9, -16]], np.float32)}, None)
    assert np.isnan(result).tolist() == [[True, False, False, True]]


def test_close_lets_the_session_go(tmp_path: Path) -> None:
    backend = load(onnx_models.mlp(16, 64, 4), tmp_path)
    backend.execute({"x": np.ones((1, 16), np.float32)}, None)
    session = weakref.ref(backend._session)
    backend.close()
    assert session() is None
    backend.close()


# -- loading -----------------------------------------------------------------------------------------------------------


def test_missing_file_is_named_by_version_and_file(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"expected an ONNX file at 1/model.onnx, found none"):
        OnnxRuntimeBackend.inspect(tmp_path / "1" / "model.onnx")


@pytest.mark.parametrize("content", [b"", b"not an onnx file"])
def test_broken_file_is_a_load_error_without_the_machines_paths(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "1" / "model.onnx"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(LoadError, match=r"onnxruntime could not load 1/model.onnx: ") as caught:
        OnnxRuntimeBackend.inspect(path)
    assert str(tmp_path) not in str(caught.value)
    assert caught.value.__context__ is None


def test_truncated_file_is_a_load_error(tmp_path: Path) -> None:
    path = onnx_models.save(onnx_models.mlp(16, 64, 4), tmp_path / "1")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(LoadError, match=r"1/model.onnx"):
        OnnxRuntimeBackend.inspect(path)


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (onnx_models.sequence_output, r"output 'y' is a seq\(tensor\(float\)\)"),
        (onnx_models.map_output, r"output 'y' is a seq\(map\(int64,tensor\(float\)\)\)"),
        (onnx_models.float8, r"input 'x' is a tensor\(float8e4m3fn\)"),
    ],
)
def test_what_the_protocol_cannot_carry_is_named(model: object, what: str, tmp_path: Path) -> None:
    path = onnx_models.save(model(), tmp_path / "1")  # type: ignore[operator]
    with pytest.raises(LoadError, match=what):
        OnnxRuntimeBackend.inspect(path)


def test_external_data_beside_the_file(tmp_path: Path) -> None:
    model = onnx_models.mlp(16, 64, 4)
    x = np.ones((1, 16), np.float32)
    expected = load(model, tmp_path).execute({"x": x}, None)[0]
    backend = OnnxRuntimeBackend(onnx_models.save_with_external_data(model, tmp_path / "2"), InstanceConfig())
    backend.load()
    assert backend.execute({"x": x}, None)[0].tobytes() == expected.tobytes()


def test_missing_external_data_is_a_load_error(tmp_path: Path) -> None:
    path = onnx_models.save_with_external_data(onnx_models.mlp(16, 64, 4), tmp_path / "1")
    (tmp_path / "1" / "model.onnx.data").unlink()
    with pytest.raises(LoadError, match=r"model.onnx.data"):
        OnnxRuntimeBackend(path, InstanceConfig()).load()


def test_memory_estimate_counts_external_data(tmp_path: Path) -> None:
    inside = onnx_models.save(onnx_models.mlp(512, 512, 512), tmp_path / "1")
    outside = onnx_models.save_with_external_data(onnx_models.mlp(512, 512, 512), tmp_path / "2")
    assert OnnxRuntimeBackend.estimate_memory(inside) > 2 * 2 * 512 * 512 * 4
    assert OnnxRuntimeBackend.estimate_memory(outside) == pytest.approx(OnnxRuntimeBackend.estimate_memory(inside), rel=0.01)


def test_absent_runtime_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = onnx_models.save(onnx_models.identity(), tmp_path / "1")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(LoadError, match=r"pip install 'headrace\[cpu\]'"):
        OnnxRuntimeBackend.inspect(path)


def test_shape_of_a_tensor_without_a_declared_one_is_empty(tmp_path: Path) -> None:
    artifact = OnnxRuntimeBackend.inspect(onnx_models.save(onnx_models.undeclared_output_shape(), tmp_path / "1"))
    assert artifact.outputs == (TensorSpec("y", DataType.FP32, ()),)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"graph_optimization_level": "basic", "execution_mode": "parallel", "inter_op_num_threads": "2"},
        {"enable_cpu_mem_arena": "false", "enable_mem_pattern": "false"},
        {"memory.enable_memory_arena_shrinkage": "cpu:0"},
        {"session.intra_op.allow_spinning": "true", "session.set_denormal_as_zero": "1"},
    ],
)
def test_options_by_the_runtimes_names(options: Mapping[str, str], tmp_path: Path) -> None:
    backend = load(onnx_models.mlp(16, 64, 4), tmp_path, InstanceConfig(options=options))
    assert backend.execute({"x": np.ones((2, 16), np.float32)}, None)[0].shape == (2, 4)


def test_options_reach_the_session(tmp_path: Path) -> None:
    instance = InstanceConfig(threads=3, options={"enable_cpu_mem_arena": "false", "session.set_denormal_as_zero": "true"})
    options = load(onnx_models.identity(), tmp_path, instance)._session.get_session_options()
    assert options.intra_op_num_threads == 3
    assert options.inter_op_num_threads == 1
    assert options.enable_cpu_mem_arena is False
    assert options.get_session_config_entry("session.set_denormal_as_zero") == "1"
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_threads_default_to_this_processs_cores_divided_by_instances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    threads = [
        load(onnx_models.identity(), tmp_path, InstanceConfig(count=count))._session.get_session_options().intra_op_num_threads
        for count in (1, 3, 20)
    ]
    assert threads == [8, 2, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"graph_optimisation_level": "all"},
            "unknown onnxruntime option 'graph_optimisation_level', did you mean 'graph_optimi",
        ),
        ({"session.set_denormals_as_zero": "1"}, "did you mean 'session.set_denormal_as_zero'"),
        ({"qqq": "1"}, "unknown onnxruntime option 'qqq', known: graph_optimization_level, "),
        (
            {"graph_optimization_level": "9"},
            "'graph_optimization_level': expected one of disable, basic, extended, all, got '9'",
        ),
        ({"enable_mem_pattern": "yes"}, "'enable_mem_pattern': expected true or false, got 'yes'"),
        ({"inter_op_num_threads": "0"}, "'inter_op_num_threads': expected a whole number from 1, got '0'"),
    ],
)
def test_wrong_option_is_a_load_error(options: Mapping[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(LoadError) as caught:
        load(onnx_models.identity(), tmp_path, InstanceConfig(options=options))
    assert message in str(caught.value)


def test_device_that_is_not_there_is_a_load_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(LoadError, match="device 'cuda:0': the installed onnxruntime has no CUDAExecutionProvider"):
        load(onnx_models.identity(), tmp_path, InstanceConfig(device="cuda:0"))


def test_many_inputs_of_an_old_exporter_stay_inside(tmp_path: Path) -> None:
    """Up to IR version 3 every weight was listed as an input as well."""
    model = onnx_models.mlp(16, 64, 4)
    model.graph.input.extend(helper.make_tensor_value_info(w.name, TensorProto.FLOAT, w.dims) for w in model.graph.initializer)
    assert [s.name for s in OnnxRuntimeBackend.inspect(onnx_models.save(model, tmp_path / "1")).inputs] == ["x"]
