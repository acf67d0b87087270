from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx_models
import pytest
from headrace.backends.base import ArtifactSignature, Backend, Expected
from headrace.backends.onnxruntime import OnnxRuntimeBackend
from headrace.config import BatchingConfig, InstanceConfig, ModelConfig, TensorConfig
from headrace.errors import ConfigError, LoadError
from headrace.lifecycle.effective import DEFAULT_MAX_BATCH_SIZE, EffectiveModel, resolve, resolve_model
from headrace.model_files import load_model_config, model_name
from headrace.signature import DataType, TensorSpec
from onnx import ModelProto

FP32 = DataType.FP32
BATCHABLE = ArtifactSignature((TensorSpec("x", FP32, (-1, 16)),), (TensorSpec("y", FP32, (-1, 4)),))
ROW = ArtifactSignature((TensorSpec("x", FP32, (1, 16)),), (TensorSpec("y", FP32, (1, 4)),))
STATE = ArtifactSignature(
    (TensorSpec("x", FP32, (-1, 16)), TensorSpec("state", FP32, (2, -1, 8)), TensorSpec("rate", DataType.INT64, ())),
    (TensorSpec("y", FP32, (-1, 4)), TensorSpec("state_out", FP32, (2, -1, 8))),
)
UNDECLARED = ArtifactSignature((TensorSpec("x", FP32, (-1, 16)),), (TensorSpec("y", FP32, ()),))
FREE = ArtifactSignature((TensorSpec("x", FP32, (-1, 3, -1)),), (TensorSpec("y", FP32, (-1, -1)),))


def settle(artifact: ArtifactSignature, *, source: str = "model.toml", **config: Any) -> EffectiveModel:
    """`source`: the file that the configuration is said to come from."""
    given = ModelConfig("m", provenance={"anything": source}, **config) if config else ModelConfig("m")
    return resolve(given, artifact, backend="onnxruntime", platform="onnxruntime_onnx", filename="model.onnx", labels={})


def reason_of(artifact: ArtifactSignature, **config: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        settle(artifact, **config)
    return str(caught.value)


# -- without configuration ---------------------------------------------------------------------------------------------


def test_free_first_dimensions_are_the_batch() -> None:
    effective = settle(BATCHABLE)
    assert effective.signature.max_batch_size == effective.batching.max_batch_size == DEFAULT_MAX_BATCH_SIZE
    assert effective.signature.inputs == BATCHABLE.inputs
    assert effective.provenance["max_batch_size"] == "model.onnx: the first dimension of every tensor is free"
    assert effective.provenance["input.x"] == "model.onnx"
    assert effective.notes == ()


@pytest.mark.parametrize(
    ("artifact", "note"),
    [
        (
            ROW,
            "not batched: made for one row, every input has a fixed first dimension of 1; export it with a free one to batch",
        ),
        (STATE, "not batched: input 'state' has a fixed first dimension of 2"),
        (UNDECLARED, "not batched: output 'y' is a scalar, or declares no shape (then set its shape in model.toml)"),
        (ArtifactSignature(BATCHABLE.inputs, ROW.outputs), "not batched: output 'y' has a fixed first dimension of 1"),
        (ArtifactSignature((), BATCHABLE.outputs), "not batched: it has no inputs"),
    ],
)
def test_what_prevents_batching_is_a_note_and_shapes_are_literal(artifact: ArtifactSignature, note: str) -> None:
    effective = settle(artifact)
    assert effective.signature.max_batch_size == effective.batching.max_batch_size == 0
    assert effective.signature.inputs == artifact.inputs
    assert effective.signature.outputs == artifact.outputs
    assert effective.notes == (note,)


# -- max_batch_size and allowed_batch_sizes ----------------------------------------------------------------------------


def test_configured_batch_size_wins_and_is_shown_as_the_files() -> None:
    effective = settle(BATCHABLE, batching=BatchingConfig(max_batch_size=8))
    assert effective.signature.max_batch_size == 8
    assert effective.provenance["max_batch_size"] == "model.toml"


def test_written_zero_means_literal_shapes() -> None:
    effective = settle(BATCHABLE, batching=BatchingConfig(max_batch_size=0))
    assert effective.signature.max_batch_size == 0
    assert effective.notes == ("not batched: max_batch_size is 0 in model.toml",)


@pytest.mark.parametrize(
    ("artifact", "tensor"),
    [(ROW, "input 'x' has a fixed first dimension of 1"), (STATE, "input 'state'"), (UNDECLARED, "output 'y'")],
)
def test_batch_size_for_what_cannot_be_batched_names_the_tensor(artifact: ArtifactSignature, tensor: str) -> None:
    reason = reason_of(artifact, batching=BatchingConfig(max_batch_size=8))
    assert reason.startswith(f"model.toml: max_batch_size 8: the model cannot be batched, {tensor}")


def test_largest_allowed_size_is_the_batch_size_where_none_is_set() -> None:
    effective = settle(BATCHABLE, batching=BatchingConfig(allowed_batch_sizes=(1, 8, 32)))
    assert effective.signature.max_batch_size == 32
    assert effective.provenance["max_batch_size"] == "model.onnx: the last of allowed_batch_sizes"


@pytest.mark.parametrize(
    ("size", "allowed"), [(8, (1, 4)), (8, (1, 16)), (8, (4, 1, 8)), (8, (4, 4, 8)), (8, (0, 8)), (None, (8, 4)), (None, (0,))]
)
def test_allowed_sizes_ascend_and_end_with_the_batch_size(size: int | None, allowed: tuple[int, ...]) -> None:
    reason = reason_of(BATCHABLE, batching=BatchingConfig(max_batch_size=size, allowed_batch_sizes=allowed))
    assert f"allowed_batch_sizes {list(allowed)}: " in reason


def test_allowed_sizes_for_what_is_not_batched_say_why() -> None:
    assert "is not batched, input 'x' has a fixed" in reason_of(ROW, batching=BatchingConfig(allowed_batch_sizes=(1, 2)))
    assert "max_batch_size is 0" in reason_of(BATCHABLE, batching=BatchingConfig(max_batch_size=0, allowed_batch_sizes=(1,)))


# -- tensors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "settled"),
    [((3, 224), (-1, 3, 224)), ((-1, 224), (-1, 3, 224)), ((3, -1), (-1, 3, -1)), (None, (-1, 3, -1))],
)
def test_configured_shape_narrows_free_dimensions(shape: tuple[int, ...] | None, settled: tuple[int, ...]) -> None:
    effective = settle(FREE, inputs=(TensorConfig("x", shape=shape),))
    assert effective.signature.inputs[0].shape == settled


def test_configured_shape_is_literal_where_nothing_is_batched() -> None:
    effective = settle(FREE, batching=BatchingConfig(max_batch_size=0), inputs=(TensorConfig("x", shape=(2, 3, 8)),))
    assert effective.signature.inputs[0].shape == (2, 3, 8)


@pytest.mark.parametrize("shape", [(4, 224), (3,), (1, 3, 224), ()])
def test_shape_that_contradicts_the_model_names_both(shape: tuple[int, ...]) -> None:
    reason = reason_of(FREE, inputs=(TensorConfig("x", shape=shape),))
    wanted = ",".join(map(str, (-1, *shape)))
    assert reason.startswith(f"model.toml: input 'x': the model has shape [-1,3,-1], the configuration says [{wanted}]")


def test_shape_for_a_tensor_that_declares_none_makes_it_batchable() -> None:
    effective = settle(UNDECLARED, outputs=(TensorConfig("y", shape=(10,)),))
    assert effective.signature.max_batch_size == DEFAULT_MAX_BATCH_SIZE
    assert effective.signature.outputs[0].shape == (-1, 10)
    assert effective.provenance["output.y"] == "model.onnx, model.toml"


def test_other_datatype_names_both() -> None:
    reason = reason_of(BATCHABLE, outputs=(TensorConfig("y", datatype="FP16"),))
    assert reason == "model.toml: output 'y': the model has datatype FP32, the configuration says FP16"
    assert settle(BATCHABLE, outputs=(TensorConfig("y", datatype="FP32"),)).signature.outputs == BATCHABLE.outputs


def test_unknown_tensor_names_the_nearest() -> None:
    assert reason_of(STATE, inputs=(TensorConfig("stat"),)) == (
        "model.toml: input 'stat' is not in the model, did you mean 'state'?; it has x, state, rate"
    )
    assert "output 'x' is not in the model" in reason_of(STATE, outputs=(TensorConfig("x"),))


def test_tensor_that_is_configured_twice_is_refused() -> None:
    assert "input 'x' is there twice" in reason_of(BATCHABLE, inputs=(TensorConfig("x"), TensorConfig("x")))


def test_only_what_the_model_can_do_without_is_optional() -> None:
    optional = ArtifactSignature((TensorSpec("x", FP32, (-1,)), TensorSpec("b", FP32, (-1,), optional=True)), BATCHABLE.outputs)
    assert settle(optional, inputs=(TensorConfig("b", optional=False),)).signature.inputs[1].optional is False
    assert "cannot do without it" in reason_of(optional, inputs=(TensorConfig("x", optional=True),))


def test_labels_of_an_input_are_refused() -> None:
    assert "labels are for outputs" in reason_of(BATCHABLE, inputs=(TensorConfig("x", labels="names.txt"),))


# -- notes and origins -------------------------------------------------------------------------------------------------


def test_notes_of_the_configuration_are_kept() -> None:
    effective = settle(ROW, notes=("config.pbtxt: optimization.cuda has no effect",))
    assert effective.notes[0] == "config.pbtxt: optimization.cuda has no effect"
    assert len(effective.notes) == 2


def test_every_value_that_is_not_the_default_has_its_file_as_origin() -> None:
    effective = settle(
        BATCHABLE,
        source="m/config.pbtxt",
        batching=BatchingConfig(max_queue_delay=0.001, priority_levels=3),
        instances=InstanceConfig(count=2, options={"enable_mem_pattern": "false"}),
    )
    for key in ("max_queue_delay_ms", "priority_levels", "default_priority_level", "count", "options"):
        assert effective.provenance[key] == "m/config.pbtxt", key
    assert "max_queue_size" not in effective.provenance
    assert effective.provenance["backend"] == "model.onnx found"


# -- from files --------------------------------------------------------------------------------------------------------

BACKENDS: dict[str, type[Backend]] = {"onnxruntime": OnnxRuntimeBackend}


def write(tmp_path: Path, model: ModelProto, **files: str) -> Path:
    """A model directory 'm' with version 1 and `files` beside it (a double underscore is a dot)."""
    onnx_models.save(model, tmp_path / "m" / "1")
    for name, content in files.items():
        (tmp_path / "m" / name.replace("__", ".")).write_text(content, encoding="utf-8")
    return tmp_path / "m"


def resolved(directory: Path) -> EffectiveModel:
    return resolve_model(load_model_config(directory, model_name(directory)), directory, directory / "1", BACKENDS)


def test_model_file_alone_is_enough(tmp_path: Path) -> None:
    effective = resolved(write(tmp_path, onnx_models.mlp(16, 64, 4)))
    assert effective.config.name == "m"
    assert (effective.backend, effective.platform, effective.filename) == ("onnxruntime", "onnxruntime_onnx", "model.onnx")
    assert effective.signature.max_batch_size == DEFAULT_MAX_BATCH_SIZE


def test_model_toml_overrides(tmp_path: Path) -> None:
    toml = 'max_batch_size = 4\nmax_queue_delay_ms = 2\n[[output]]\nname = "y"\nlabels = "names.txt"\n[instances]\ncount = 2\n'
    effective = resolved(write(tmp_path, onnx_models.mlp(16, 64, 3), model__toml=toml, names__txt="cat\n\ndog\n"))
    assert effective.signature.max_batch_size == 4
    assert effective.batching.max_queue_delay == 0.002
    assert effective.instances.count == 2
    assert effective.labels == {"y": ("cat", "", "dog")}
    assert effective.provenance["count"] == effective.provenance["max_batch_size"] == "model.toml"


def test_config_pbtxt_is_honoured_with_dims_that_leave_the_batch_out(tmp_path: Path) -> None:
    pbtxt = """
        name: "m" platform: "onnxruntime_onnx" max_batch_size: 16
        input [{ name: "x" data_type: TYPE_FP32 dims: [ 16 ] }]
        output [{ name: "y" data_type: TYPE_FP32 dims: [ 4 ] }]
        instance_group [{ count: 2 kind: KIND_CPU }]
        parameters { key: "intra_op_thread_count" value: { string_value: "1" } }
        optimization { graph { level: 1 } }
    """
    effective = resolved(write(tmp_path, onnx_models.mlp(16, 64, 4), config__pbtxt=pbtxt))
    assert effective.signature.inputs == (TensorSpec("x", FP32, (-1, 16)),)
    assert effective.signature.max_batch_size == 16
    assert effective.instances == InstanceConfig(count=2, device="cpu", threads=1, options={"graph_optimization_level": "extended"})
    assert effective.provenance["count"] == "m/config.pbtxt"
    backend = OnnxRuntimeBackend(tmp_path / "m" / "1" / "model.onnx", effective.instances)
    backend.load()
    backend.close()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model__toml": "", "config__pbtxt": ""}, "both model.toml and config.pbtxt"),
        ({"model__toml": "max_batchsize = 4"}, "did you mean 'max_batch_size'"),
        ({"model__toml": "backend = 'onnxruntim'"}, "unknown backend 'onnxruntim', did you mean 'onnxruntime'?"),
        ({"model__toml": "filename = '../../other/1/model.onnx'"}, "filename: expected a name in the version directory"),
        ({"config__pbtxt": 'name: "other"'}, "expected name 'm' as its directory, got 'other'"),
        ({"model__toml": "[[output]]\nname = 'y'\nlabels = '../secret.txt'"}, "expected a file inside the model's directory"),
        ({"model__toml": "[[output]]\nname = 'y'\nlabels = 'none.txt'"}, "labels file 'none.txt': not found"),
        ({"config__pbtxt": 'input { name: "z" data_type: TYPE_FP32 dims: [ 4 ] }'}, "input 'z' is not in the model"),
    ],
)
def test_wrong_configuration_says_what_was_expected(files: dict[str, str], message: str, tmp_path: Path) -> None:
    directory = write(tmp_path, onnx_models.identity(), **files)
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        resolved(directory)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["config.pbtxt", "model.toml", "names.txt"])
def test_files_that_are_not_utf8_are_configuration_errors(name: str, tmp_path: Path) -> None:
    directory = write(tmp_path, onnx_models.identity())
    (directory / name).write_bytes(b"\xff\xfe")
    if name == "names.txt":
        (directory / "model.toml").write_text("[[output]]\nname = 'y'\nlabels = 'names.txt'", encoding="utf-8")
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        resolved(directory)


def test_version_without_a_model_file_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "1" / "resnet.onnx").touch()
    with pytest.raises(LoadError, match=r"no model file in m/1: expected model.onnx, found resnet.onnx; .*'filename'"):
        resolved(tmp_path / "m")


def test_file_of_another_name_is_served_when_configured(tmp_path: Path) -> None:
    directory = write(tmp_path, onnx_models.identity(), model__toml="backend = 'onnxruntime'\nfilename = 'net.onnx'")
    (directory / "1" / "model.onnx").rename(directory / "1" / "net.onnx")
    assert resolved(directory).filename == "net.onnx"


def test_model_directory_with_external_data(tmp_path: Path) -> None:
    onnx_models.save_with_external_data(onnx_models.mlp(16, 64, 4), tmp_path / "m" / "1" / "model.onnx")
    assert resolved(tmp_path / "m").signature.max_batch_size == DEFAULT_MAX_BATCH_SIZE


def test_files_of_two_backends_are_ambiguous(tmp_path: Path) -> None:
    class Plan(OnnxRuntimeBackend):
        name = "plan"
        default_filename = "model.plan"

    directory = write(tmp_path, onnx_models.identity())
    (directory / "1" / "model.plan").touch()
    with pytest.raises(ConfigError, match="m/1 has files for several backends: onnxruntime, plan"):
        resolve_model(ModelConfig("m"), directory, directory / "1", {**BACKENDS, "plan": Plan})


@pytest.mark.parametrize("is_signed", [True, False])
def test_artifact_that_nobody_vouched_for_is_not_opened(tmp_path: Path, is_signed: bool) -> None:
    opened, told = [], []

    class Plan(OnnxRuntimeBackend):
        def expect(self, expected: Expected) -> None:
            told.append(expected)

        @classmethod
        def check_trusted(cls, path: Path, instance: InstanceConfig, *, is_signed: bool) -> None:
            if not is_signed:
                raise LoadError("nobody vouched for it")

        @classmethod
        def graph_digest(cls, path: Path) -> str:
            opened.append(path)
            return super().graph_digest(path)

    directory = write(tmp_path, onnx_models.identity())
    if is_signed:
        effective = resolve_model(ModelConfig("m"), directory, directory / "1", {"onnxruntime": Plan}, is_signed=True)
        effective.make(Plan, directory / "1" / "model.onnx", InstanceConfig(), is_signed=True)
        assert told == [Expected(effective.artifact, effective.signature, (), is_signed=True)]
    else:
        with pytest.raises(LoadError, match="nobody vouched"):
            resolve_model(ModelConfig("m"), directory, directory / "1", {"onnxruntime": Plan})
    assert len(opened) == is_signed


def test_linked_model_directory_keeps_its_own_name(tmp_path: Path) -> None:
    directory = write(tmp_path, onnx_models.identity())
    link = tmp_path / "linked"
    link.symlink_to(directory)
    assert resolved(link).signature.model == "linked"


def test_effective_model_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        settle(BATCHABLE).filename = "other"  # type: ignore[misc]
