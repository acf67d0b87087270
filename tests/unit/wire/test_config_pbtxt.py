import dataclasses

import pytest
from google.protobuf import json_format, text_format
from headrace.config import BatchingConfig, InstanceConfig, ModelConfig, TensorConfig
from headrace.errors import ConfigError
from headrace.signature import DataType, Signature, TensorSpec
from headrace.wire.config_pbtxt import model_config_message, parse_config_json, parse_config_pbtxt
from headrace.wire.messages import ModelConfig as ModelConfigMessage
from headrace.wire.messages import ModelInstanceGroup

FILE = "resnet/config.pbtxt"
FULL = """
# Comments, both list syntaxes and commas, as real files have them.
name: "resnet"
platform: "onnxruntime_onnx"
max_batch_size: 8
input [
  { name: "pixels", data_type: TYPE_FP32, format: FORMAT_NCHW, dims: [ 3, -1, -1 ] },
  { name: "text" data_type: TYPE_STRING dims: [ 1 ] optional: true }
]
output { name: "scores" data_type: TYPE_FP32 dims: 1000 label_filename: "labels.txt" }
default_model_filename: "resnet50.onnx"
version_policy: { specific: { versions: [ 1, 3 ] } }
dynamic_batching {
  max_queue_delay_microseconds: 250
  priority_levels: 3
  default_priority_level: 2
  default_queue_policy { timeout_action: REJECT default_timeout_microseconds: 1500000 max_queue_size: 64 }
}
instance_group [ { count: 2 kind: KIND_CPU }, { kind: KIND_CPU } ]
parameters { key: "intra_op_thread_count" value: { string_value: "2" } }
parameters { key: "enable_mem_arena" value: { string_value: "0" } }
parameters { key: "owner" value: { string_value: "vision" } }
optimization { graph { level: -1 } }
"""


def parse(text):
    return parse_config_pbtxt(text, FILE, "resnet")


def test_a_full_file_is_honoured():
    config = parse(FULL)
    assert (config.name, config.backend, config.filename, config.version_policy) == ("resnet", "onnxruntime", "resnet50.onnx", "1,3")
    assert config.batching == BatchingConfig(
        max_batch_size=8,
        max_queue_delay=0.00025,
        max_queue_size=64,
        priority_levels=3,
        default_priority_level=2,
        default_timeout=1.5,
        allow_timeout_override=False,
    )
    assert config.inputs == (
        TensorConfig("pixels", "FP32", (3, -1, -1)),
        TensorConfig("text", "BYTES", (1,), optional=True),
    )
    assert config.outputs == (TensorConfig("scores", "FP32", (1000,), labels="labels.txt"),)
    assert (config.instances.count, config.instances.device, config.instances.threads) == (3, "cpu", 2)
    assert config.parameters["owner"] == "vision"
    assert config.provenance["max_batch_size"] == config.provenance["backend"] == FILE


def test_options_are_those_of_the_onnxruntime_backend():
    from headrace.backends.onnxruntime import OPTIONS

    every = """
      optimization { graph { level: 2 } }
      parameters { key: "inter_op_thread_count" value: { string_value: "3" } }
      parameters { key: "enable_mem_arena" value: { string_value: "1" } }
      parameters { key: "enable_mem_pattern" value: { string_value: "0" } }
    """
    options = parse(every).instances.options
    assert len(options) == 4
    assert set(options) <= set(OPTIONS)


def test_an_empty_file_leaves_everything_to_be_inferred():
    config = parse("")
    assert config == ModelConfig("resnet")


def test_a_written_zero_holds_and_an_absent_size_is_inferred():
    assert parse("max_batch_size: 0").batching.max_batch_size == 0
    assert parse("name: 'resnet'").batching.max_batch_size is None


def test_dims_without_a_batch_size_are_literal():
    assert parse('input { name: "x" data_type: TYPE_INT8 dims: [ -1, 4 ] }').batching.max_batch_size == 0
    assert parse('output { name: "y" label_filename: "l.txt" }').batching.max_batch_size is None


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("latest { num_versions: 3 }", "latest:3"), ("latest { }", "latest:1"), ("all { }", "all"), ("specific { versions: 7 }", "7")],
)
def test_version_policies(policy, expected):
    assert parse(f"version_policy {{ {policy} }}").version_policy == expected


def test_queue_defaults_without_a_queue_policy():
    batching = parse("max_batch_size: 4 dynamic_batching { }").batching
    assert batching == dataclasses.replace(BatchingConfig(), max_batch_size=4)


@pytest.mark.parametrize("kind", ["KIND_AUTO", "KIND_MODEL"])
def test_instances_that_may_run_anywhere(kind):
    assert parse(f"instance_group {{ kind: {kind} }}").instances.device == "auto"


@pytest.mark.parametrize(
    ("groups", "count", "device"),
    [
        ("{ kind: KIND_GPU }", 1, "cuda"),
        ("{ kind: KIND_GPU gpus: 1 count: 2 }", 2, "cuda:1"),
        ("{ gpus: 0 }", 1, "cuda:0"),
        ("{ kind: KIND_GPU gpus: [ 0, 1 ] count: 2 }", 4, "cuda"),
        ("{ kind: KIND_GPU gpus: 0 }, { kind: KIND_GPU gpus: 0 count: 2 }", 3, "cuda:0"),
        ("{ kind: KIND_GPU gpus: 0 }, { kind: KIND_GPU }", 2, "cuda"),
        ("{ kind: KIND_CPU }, { kind: KIND_AUTO }", 2, "auto"),
    ],
)
def test_instances_on_gpus(groups, count, device):
    instances = parse(f"instance_group [ {groups} ]").instances
    assert (instances.count, instances.device) == (count, device)


def test_options_on_a_gpu_have_the_runtimes_names():
    given = {"cudnn_conv_algo_search": "0", "arena_extend_strategy": "1", "gpu_mem_limit": "1000"}
    text = " ".join(f"parameters {{ key: '{key}' value: {{ string_value: '{value}' }} }}" for key, value in given.items())
    assert parse(text).instances.options == {
        "cudnn_conv_algo_search": "EXHAUSTIVE", "arena_extend_strategy": "kSameAsRequested", "gpu_mem_limit": "1000",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"), [("TYPE_BOOL", "BOOL"), ("TYPE_BF16", "BF16"), ("TYPE_STRING", "BYTES"), ("TYPE_UINT64", "UINT64")]
)
def test_datatypes_have_their_names_on_the_wire(name, expected):
    assert parse(f'input {{ name: "x" data_type: {name} }}').inputs[0].datatype == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batch_sise: 3", f"{FILE}:1: 'max_batch_sise' is no field of ModelConfig, did you mean 'max_batch_size'?"),
        ("\n\ninput { nam: 'x' }", f"{FILE}:3: 'nam' is no field of ModelInput, did you mean 'name'?"),
        ("zzzzz: 1", "'zzzzz' is no field of ModelConfig, expected one of backend, "),
        ("input { data_type: TYPE_F32 }", "'TYPE_F32' is no value of DataType, did you mean 'TYPE_FP32'?"),
        ("name: 3", f"{FILE}:1: "),
        ("input {", f"{FILE}:1: "),
        ("name: 'a'\nname: 'b'", f"{FILE}:2: "),
    ],
)
def test_what_cannot_be_read_names_the_file_the_line_and_the_nearest(text, message):
    with pytest.raises(ConfigError) as raised:
        parse(text)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("ensemble_scheduling { }", "ensemble_scheduling"),
        ("platform: 'ensemble'", "ensemble_scheduling"),
        ("sequence_batching { }", "sequence_batching"),
        ("model_transaction_policy { decoupled: true }", "model_transaction_policy.decoupled"),
        ("response_cache { enable: true }", "response_cache.enable"),
        ("batch_input { target_name: 'x' }", "batch_input"),
        ("batch_output { target_name: 'x' }", "batch_output"),
        ("cc_model_filenames { key: '8.0' value: 'a' }", "cc_model_filenames"),
        ("model_operations { op_library_filename: 'a.so' }", "model_operations.op_library_filename"),
        ("model_repository_agents { agents { name: 'checksum' } }", "model_repository_agents"),
        ("input { name: 'x' dims: 1 reshape { shape: [] } }", "input.reshape of 'x'"),
        ("output { name: 'y' dims: 1 reshape { shape: [] } }", "output.reshape of 'y'"),
        ("input { name: 'x' is_shape_tensor: true }", "input.is_shape_tensor of 'x'"),
        ("output { name: 'y' is_non_linear_format_io: true }", "output.is_non_linear_format_io of 'y'"),
        ("input { name: 'x' allow_ragged_batch: true }", "input.allow_ragged_batch of 'x'"),
        ("instance_group { kind: KIND_CPU gpus: 0 }", "instance_group.gpus of KIND_CPU"),
        ("instance_group { passive: true }", "instance_group.passive"),
        ("instance_group { profile: '0' }", "instance_group.profile"),
        ("instance_group { secondary_devices { } }", "instance_group.secondary_devices"),
        ("dynamic_batching { priority_queue_policy { key: 1 } }", "dynamic_batching.priority_queue_policy"),
        (
            "dynamic_batching { default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 1 } }",
            "dynamic_batching.default_queue_policy.timeout_action DELAY",
        ),
    ],
)
def test_what_would_change_answers_is_refused_by_name(text, field):
    with pytest.raises(ConfigError) as raised:
        parse(text)
    assert str(raised.value).startswith(f"{FILE}: {field} is not supported: ")


@pytest.mark.parametrize(
    "text",
    [
        "response_cache { enable: false }",
        "model_transaction_policy { }",
        "dynamic_batching { default_queue_policy { timeout_action: DELAY } }",
    ],
)
def test_what_is_switched_off_is_not_refused(text):
    assert parse(text).name == "resnet"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batch_size: -1", "max_batch_size: expected a number of rows or 0, got -1"),
        ("platform: 'tensorflow_graphdef'", "platform 'tensorflow_graphdef': expected one of onnxruntime_onnx, tensorrt_plan"),
        ("platform: 'onnxruntime_onnx' backend: 'python'", "expected backend 'onnxruntime' beside it, got 'python'"),
        ("input { dims: 1 }", "input: expected a name for each"),
        ("input { name: 'x' dims: [ 3, 0 ] }", "input.dims of 'x': expected lengths from 1, or -1 for any, got [3, 0]"),
        ("output { name: 'y' dims: -2 }", "output.dims of 'y'"),
        ("version_policy { specific { } }", "version_policy.specific: expected at least one version"),
        ("instance_group { count: -1 }", "instance_group.count: expected 1 or more"),
        ("instance_group [ { kind: KIND_CPU }, { gpus: 0 } ]", "instance_group.kind: expected one for all instances of a model"),
        ("instance_group { gpus: -1 }", "instance_group.gpus: expected numbers from 0, got -1"),
        ("parameters { key: 'cudnn_conv_algo_search' value { string_value: '7' } }", "expected one of 0, 1, 2, got '7'"),
        ("optimization { graph { level: 7 } }", "optimization.graph.level: expected -1, 0, 1 or 2, got 7"),
        ("parameters { key: 'intra_op_thread_count' value { string_value: 'two' } }", "expected a whole number, got 'two'"),
        ("dynamic_batching { priority_levels: 1 default_priority_level: 2 }", "default_priority_level: expected at most"),
    ],
)
def test_values_out_of_range_are_refused(text, message):
    with pytest.raises(ConfigError) as raised:
        parse(text)
    assert str(raised.value).startswith(f"{FILE}: ")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("max_batch_size: 4", "no dynamic_batching; requests that wait for an instance are run together all the same"),
        ("dynamic_batching { preferred_batch_size: [ 4, 8 ] }", "preferred_batch_size has no effect"),
        ("dynamic_batching { preserve_ordering: true }", "preserve_ordering has no effect"),
        ("dynamic_batching { default_queue_policy { max_queue_size: 9 } }", "max_queue_size counts rows, not requests"),
        ("model_warmup { name: 'w' }", "model_warmup has no effect"),
        ("metric_tags { key: 'a' value: 'b' }", "metric_tags has no effect"),
        ("model_metrics { metric_control { } }", "model_metrics has no effect"),
        ("runtime: 'x.so'", "runtime has no effect"),
        ("instance_group { host_policy: 'numa' }", "instance_group.host_policy has no effect"),
        ("instance_group { gpus: [ 0, 1 ] }", "instance_group.gpus 0, 1: instances are spread over all GPUs that this process sees"),
        ("instance_group { kind: KIND_GPU }", "instance_group.count is of all GPUs together, not of each"),
        ("instance_group { rate_limiter { priority: 2 } }", "instance_group.rate_limiter has no effect"),
        ("optimization { cuda { graphs: true } }", "optimization.cuda has no effect"),
        ("parameters { key: 'execution_mode' value { string_value: '1' } }", "parameters 'execution_mode' has no effect"),
    ],
)
def test_what_only_affects_speed_is_noted(text, note):
    (only,) = parse(text).notes
    assert only.startswith(f"{FILE}: ")
    assert note in only


def test_preferred_sizes_are_no_padding_sizes():
    assert parse("max_batch_size: 8 dynamic_batching { preferred_batch_size: 4 }").batching.allowed_batch_sizes == ()


# -- the message ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Settled:
    config: ModelConfig
    signature: Signature
    batching: BatchingConfig
    instances: InstanceConfig
    backend: str = "onnxruntime"
    platform: str = "onnxruntime_onnx"
    filename: str = "model.onnx"


def settled(size, config=None, **batching):
    inputs = (TensorSpec("x", DataType.FP32, (-1, 3)), TensorSpec("s", DataType.BYTES, (-1, -1), optional=True))
    signature = Signature("m", inputs, (TensorSpec("y", DataType.BF16, (-1, 5)),), size)
    return Settled(config or ModelConfig("m"), signature, BatchingConfig(max_batch_size=size, **batching), InstanceConfig())


def test_message_of_a_batching_model():
    labels = ModelConfig("m", outputs=(TensorConfig("y", labels="labels.txt"),), parameters={"owner": "vision"})
    message = model_config_message(settled(16, labels, max_queue_delay=0.0001, default_timeout=2.0))
    assert (message.name, message.backend, message.platform) == ("m", "onnxruntime", "onnxruntime_onnx")
    assert (message.max_batch_size, message.default_model_filename) == (16, "model.onnx")
    assert [(t.name, t.data_type, list(t.dims), t.optional) for t in message.input] == [("x", 11, [3], False), ("s", 13, [-1], True)]
    assert [(t.name, t.data_type, list(t.dims), t.label_filename) for t in message.output] == [("y", 14, [5], "labels.txt")]
    assert message.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert list(message.dynamic_batching.preferred_batch_size) == [16]
    assert message.dynamic_batching.max_queue_delay_microseconds == 100
    assert message.dynamic_batching.default_queue_policy.default_timeout_microseconds == 2_000_000
    assert message.parameters["owner"].string_value == "vision"


def test_message_of_a_model_with_literal_shapes():
    message = model_config_message(settled(0))
    assert [list(t.dims) for t in message.input] == [[-1, 3], [-1, -1]]
    assert message.WhichOneof("scheduling_choice") is None


def test_messages_that_say_nothing_are_absent():
    """perf_analyzer takes the presence of a message for its meaning."""
    message = model_config_message(settled(4))
    present = {descriptor.name for descriptor, _ in message.ListFields()}
    assert present == {
        "name",
        "platform",
        "backend",
        "version_policy",
        "max_batch_size",
        "input",
        "output",
        "instance_group",
        "default_model_filename",
        "dynamic_batching",
    }


@pytest.mark.parametrize(
    ("device", "kind", "gpus"),
    [
        ("cpu", ModelInstanceGroup.KIND_CPU, []),
        ("auto", ModelInstanceGroup.KIND_AUTO, []),
        ("cuda", ModelInstanceGroup.KIND_GPU, []),
        ("cuda:2", ModelInstanceGroup.KIND_GPU, [2]),
    ],
)
def test_instances_are_written_out_and_read_again(device, kind, gpus):
    model = settled(4)
    model.instances = InstanceConfig(count=3, device=device)
    (group,) = model_config_message(model).instance_group
    assert (group.name, group.count, group.kind, list(group.gpus)) == ("m_0", 3, kind, gpus)
    assert parse(f"instance_group {{ {group} }}").instances == model.instances


@pytest.mark.parametrize("policy", ["latest:2", "all", "1,4"])
def test_version_policies_are_written_out(policy):
    message = model_config_message(settled(4, ModelConfig("m", version_policy=policy)))
    text = f"version_policy {{ {message.version_policy} }}"
    assert parse(text).version_policy == policy


@pytest.mark.parametrize("datatype", list(DataType))
def test_every_datatype_has_its_number_in_tritons_configuration(datatype):
    from tritonclient.grpc import model_config_pb2

    model = settled(4)
    model.signature = Signature("m", (TensorSpec("x", datatype, (-1,)),), (), 4)
    number = model_config_message(model).input[0].data_type
    theirs = model_config_pb2.DataType.Name(number)
    assert theirs == ("TYPE_STRING" if datatype is DataType.BYTES else f"TYPE_{datatype.value}")


def test_tritonclient_reads_the_message():
    from tritonclient.grpc import model_config_pb2

    theirs = model_config_pb2.ModelConfig.FromString(model_config_message(settled(0)).SerializeToString())
    assert (theirs.name, theirs.max_batch_size, len(theirs.input)) == ("m", 0, 2)


def test_message_class_has_presence_only_where_we_added_it():
    assert ModelConfigMessage(max_batch_size=0).HasField("max_batch_size")


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_json_means_what_the_same_text_format_means():
    message = ModelConfigMessage()
    text_format.Parse(FULL, message)
    # As tritonclient prints it: 64-bit numbers as strings.
    assert '"max_queue_delay_microseconds": "250"' in json_format.MessageToJson(message, preserving_proto_field_name=True)
    for keeps_names in (True, False):
        text = json_format.MessageToJson(message, preserving_proto_field_name=keeps_names)
        assert parse_config_json(text, FILE, "resnet") == parse(FULL)


@pytest.mark.parametrize("size", ['"16"', "16"])
def test_json_of_a_batch_size_alone_leaves_the_rest_to_be_inferred(size):
    config = parse_config_json(f'{{"max_batch_size":{size}}}', "request", "resnet")
    assert (config.name, config.batching.max_batch_size, config.inputs, config.backend) == ("resnet", 16, (), None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"max_batch_sise": 1}', "request: 'max_batch_sise' is no field of ModelConfig, did you mean 'max_batch_size'?"),
        ('{"dynamic_batching": {"delay": 1}}', "request: 'delay' is no field of ModelDynamicBatching, expected one of "),
        ('{"max_batch_size": "many"}', "request: Failed to parse max_batch_size field"),
        ('{"input": [{"data_type": "TYPE_FP99"}]}', "TYPE_FP99"),
        ('"parameters": {}', "request: Failed to load JSON"),
        ("[" * 100_000, "request: Failed to load JSON"),
        ("null", "request: "),
        ('{"name": "\\ud800"}', "request: Failed to parse name field"),
        ('{"ensemble_scheduling": {}}', "request: ensemble_scheduling is not supported"),
        ('{"max_batch_size": -1}', "request: max_batch_size: expected a number of rows or 0, got -1"),
    ],
)
def test_json_that_cannot_be_honoured_says_why(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_config_json(text, "request", "resnet")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
