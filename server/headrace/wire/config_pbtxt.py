"""Triton's model configuration: config.pbtxt or JSON to ModelConfig, and an effective model to the message that clients read.

A file is honoured or refused, never half honoured: what would change answers and is not offered is a ConfigError that names the
field; what only affects speed, or has no meaning here, becomes a note that `headrace check` shows.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from google.protobuf import json_format, text_format

from headrace.config import BatchingConfig, InstanceConfig, ModelConfig, TensorConfig
from headrace.errors import ConfigError
from headrace.signature import Signature, TensorSpec
from headrace.wire import messages as pb

BACKENDS_BY_PLATFORM = {"onnxruntime_onnx": "onnxruntime", "tensorrt_plan": "tensorrt"}

_MICROSECONDS = 1_000_000  # in a second

# -- config.pbtxt to ModelConfig -----------------------------------------------------------------------------------------


def parse_config_pbtxt(text: str, source_name: str, name: str = "") -> ModelConfig:
    """`source_name` is the file as messages call it; `name` the model's, for a file that does not say it.

    Raises ConfigError naming the file, the line and the nearest known field for what cannot be read, and the field for what is
    read but not supported.
    """
    given = pb.ModelConfig()
    try:
        text_format.Parse(text, given)
    except text_format.ParseError as error:
        line = error.GetLine()
        place = source_name if line is None else f"{source_name}:{line}"
        # The error's own text begins with its place once more.
        complaint = re.sub(r"^\d+:\d+ : ", "", str(error))
        raise ConfigError(f"{place}: {_explain(complaint)}") from None
    return _convert_named(given, source_name, name)


def parse_config_json(text: str, source_name: str, name: str) -> ModelConfig:
    """As `parse_config_pbtxt`, from the JSON that load requests carry: 64-bit numbers as strings or numbers."""
    given = pb.ModelConfig()
    try:
        json_format.Parse(text, given)
    except json_format.ParseError as error:
        raise ConfigError(f"{source_name}: {_explain(str(error).rstrip('.'))}") from None
    return _convert_named(given, source_name, name)


def _convert_named(given: pb.ModelConfig, source_name: str, name: str) -> ModelConfig:
    try:
        return _convert(given, source_name, name)
    except ConfigError as error:
        raise ConfigError(f"{source_name}: {error}") from None


def _convert(given: pb.ModelConfig, source_name: str, name: str) -> ModelConfig:
    for field, reason in _unsupported(given):
        raise ConfigError(f"{field} is not supported: {reason}")
    backend = _backend(given)
    size = _max_batch_size(given)
    return ModelConfig(
        name=given.name or name,
        backend=backend,
        filename=given.default_model_filename or None,
        batching=_batching(given, size),
        instances=_instances(given, backend),
        inputs=tuple(_tensor("input", tensor) for tensor in given.input),
        outputs=tuple(_tensor("output", tensor) for tensor in given.output),
        version_policy=_version_policy(given.version_policy),
        parameters={key: value.string_value for key, value in sorted(given.parameters.items())},
        notes=tuple(f"{source_name}: {note}" for note in _notes(given, backend, size)),
        provenance=_provenance(given, size, source_name),
    )


def _provenance(given: pb.ModelConfig, size: int | None, source_name: str) -> dict[str, str]:
    fields = {descriptor.name for descriptor, _ in given.ListFields()}
    if "platform" in fields:
        fields.add("backend")
    if size is not None:
        fields.add("max_batch_size")
    return dict.fromkeys(sorted(fields), source_name)


_NO_NAME = re.compile(r'(Message type|Enum type) "([\w.]+)" has no (?:field|value) named "?(\w+)')


def _explain(text: str) -> str:
    """A parser's complaint; an unknown name with the nearest known one."""
    found = _NO_NAME.search(text)
    if found is None:
        return text
    kind, owner, unknown = found.groups()
    if kind == "Enum type":
        known = list(pb.POOL.FindEnumTypeByName(owner).values_by_name)
        what = f"value of {owner.removeprefix('inference.')}"
    else:
        known = list(pb.POOL.FindMessageTypeByName(owner).fields_by_name)
        what = f"field of {owner.removeprefix('inference.')}"
    near = difflib.get_close_matches(unknown, known, 1)
    hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(sorted(known))}"
    return f"'{unknown}' is no {what}, {hint}"


def _unsupported(given: pb.ModelConfig) -> Iterator[tuple[str, str]]:
    """(field, reason) of everything in the file whose absence clients would notice."""
    if given.HasField("ensemble_scheduling") or given.platform == "ensemble":
        yield "ensemble_scheduling", "serve the models one by one"
    if given.HasField("sequence_batching"):
        yield "sequence_batching", "requests are independent of each other; keep the state in inputs and outputs"
    if given.model_transaction_policy.decoupled:
        yield "model_transaction_policy.decoupled", "every request has one response"
    if given.response_cache.enable:
        yield "response_cache.enable", "every request is computed"
    if given.batch_input or given.batch_output:
        yield "batch_input" if given.batch_input else "batch_output", "inputs are what clients send"
    if given.cc_model_filenames:
        yield "cc_model_filenames", "use default_model_filename"
    if given.model_operations.op_library_filename:
        yield "model_operations.op_library_filename", "only the runtime's own operators are there"
    if given.model_repository_agents.agents:
        yield "model_repository_agents", "no agents can be loaded"
    for tensor in _tensors(given):
        yield from _unsupported_tensor(tensor)
    for group in given.instance_group:
        yield from _unsupported_group(group)
    yield from _unsupported_queue(given.dynamic_batching)


def _tensors(given: pb.ModelConfig) -> list[pb.ModelInput | pb.ModelOutput]:
    return [*given.input, *given.output]


def _unsupported_tensor(tensor: pb.ModelInput | pb.ModelOutput) -> Iterator[tuple[str, str]]:
    kind = "input" if isinstance(tensor, pb.ModelInput) else "output"
    if tensor.HasField("reshape"):
        yield f"{kind}.reshape of '{tensor.name}'", "write the model's own shape in dims"
    if tensor.is_shape_tensor:
        yield f"{kind}.is_shape_tensor of '{tensor.name}'", "there are no shape tensors"
    if tensor.is_non_linear_format_io:
        yield f"{kind}.is_non_linear_format_io of '{tensor.name}'", "tensors are row-major"
    if isinstance(tensor, pb.ModelInput) and tensor.allow_ragged_batch:
        yield f"input.allow_ragged_batch of '{tensor.name}'", "requests of different shapes run in different batches"


def _unsupported_group(group: pb.ModelInstanceGroup) -> Iterator[tuple[str, str]]:
    if group.kind == pb.ModelInstanceGroup.KIND_CPU and group.gpus:
        yield "instance_group.gpus of KIND_CPU", "it has none; write KIND_GPU"
    if group.passive:
        yield "instance_group.passive", "every instance takes requests"
    if group.profile:
        yield "instance_group.profile", "there are no optimization profiles"
    if group.secondary_devices:
        yield "instance_group.secondary_devices", "an instance has one device"


def _unsupported_queue(given: pb.ModelDynamicBatching) -> Iterator[tuple[str, str]]:
    if given.priority_queue_policy:
        yield "dynamic_batching.priority_queue_policy", "one policy holds for all levels; use default_queue_policy"
    policy = given.default_queue_policy
    if policy.timeout_action == pb.ModelQueuePolicy.DELAY and policy.default_timeout_microseconds:
        yield "dynamic_batching.default_queue_policy.timeout_action DELAY", "a request that timed out is refused; write REJECT"


def _backend(given: pb.ModelConfig) -> str | None:
    if not given.platform:
        return given.backend or None
    backend = BACKENDS_BY_PLATFORM.get(given.platform)
    if backend is None:
        raise ConfigError(f"platform '{given.platform}': expected one of {', '.join(BACKENDS_BY_PLATFORM)}")
    if given.backend and given.backend != backend:
        raise ConfigError(f"platform '{given.platform}': expected backend '{backend}' beside it, got '{given.backend}'")
    return backend


def _max_batch_size(given: pb.ModelConfig) -> int | None:
    """None: to be inferred.

    Triton cannot tell a written 0 from none and infers in both cases, unless the file has dims, which are then literal; we hold
    to a 0 that was written.
    """
    if given.max_batch_size < 0:
        raise ConfigError(f"max_batch_size: expected a number of rows or 0, got {given.max_batch_size}")
    has_dims = any(tensor.dims for tensor in _tensors(given))
    return given.max_batch_size if given.HasField("max_batch_size") or has_dims else None


def _batching(given: pb.ModelConfig, size: int | None) -> BatchingConfig:
    if not given.HasField("dynamic_batching"):
        return BatchingConfig(max_batch_size=size)
    asked = given.dynamic_batching
    defaults = BatchingConfig()
    policy = asked.default_queue_policy
    return BatchingConfig(
        max_batch_size=size,
        max_queue_delay=asked.max_queue_delay_microseconds / _MICROSECONDS,
        # Triton's 0 is an unbounded queue, which is also what a file gets that never thought of it; ours stays bounded.
        max_queue_size=policy.max_queue_size or defaults.max_queue_size,
        priority_levels=asked.priority_levels,
        default_priority_level=asked.default_priority_level,
        default_timeout=policy.default_timeout_microseconds / _MICROSECONDS,
        allow_timeout_override=policy.allow_timeout_override if asked.HasField("default_queue_policy") else defaults.allow_timeout_override,
    )


def _instances(given: pb.ModelConfig, backend: str | None) -> InstanceConfig:
    groups = given.instance_group
    if any(group.count < 0 for group in groups):
        raise ConfigError("instance_group.count: expected 1 or more")
    threads, options = _runtime_options(given) if backend in (None, "onnxruntime") else (0, {})
    return InstanceConfig(
        # As in Triton, a group has so many on each of the GPUs that it names.
        count=sum((group.count or 1) * (len(group.gpus) or 1) for group in groups) or 1,
        device=_device(groups),
        threads=threads,
        options=options,
    )


def _device(groups: Sequence[pb.ModelInstanceGroup]) -> str:
    """One for all groups: 'cuda' also for several GPUs, over which instances are spread."""
    is_gpu = [group.kind == pb.ModelInstanceGroup.KIND_GPU or bool(group.gpus) for group in groups]
    if any(is_gpu) and any(group.kind == pb.ModelInstanceGroup.KIND_CPU for group in groups):
        raise ConfigError("instance_group.kind: expected one for all instances of a model, got KIND_CPU and KIND_GPU")
    if any(is_gpu):
        named = {ordinal for group in groups for ordinal in group.gpus}
        if any(ordinal < 0 for ordinal in named):
            raise ConfigError(f"instance_group.gpus: expected numbers from 0, got {min(named)}")
        return f"cuda:{min(named)}" if len(named) == 1 and all(group.gpus for group in groups) else "cuda"
    return "cpu" if groups and all(group.kind == pb.ModelInstanceGroup.KIND_CPU for group in groups) else "auto"


_GRAPH_LEVELS = {-1: "basic", 0: "all", 1: "extended", 2: "disable"}
_SWITCHES = {"enable_mem_arena": "enable_cpu_mem_arena", "enable_mem_pattern": "enable_mem_pattern"}
_NUMBERED = {
    "cudnn_conv_algo_search": {"0": "EXHAUSTIVE", "1": "HEURISTIC", "2": "DEFAULT"},
    "arena_extend_strategy": {"0": "kNextPowerOfTwo", "1": "kSameAsRequested"},
}
"""Options on a GPU that Triton has numbers for and the runtime names."""


def _runtime_options(given: pb.ModelConfig) -> tuple[int, dict[str, str]]:
    """(threads, options of our onnxruntime backend) from the parameters that Triton's onnxruntime backend reads."""
    asked = {key: value.string_value for key, value in given.parameters.items()}
    options: dict[str, str] = {}
    if given.optimization.graph.level:
        level = given.optimization.graph.level
        if level not in _GRAPH_LEVELS:
            raise ConfigError(f"optimization.graph.level: expected -1, 0, 1 or 2, got {level}")
        options["graph_optimization_level"] = _GRAPH_LEVELS[level]
    if _count(asked, "inter_op_thread_count"):
        options["inter_op_num_threads"] = asked["inter_op_thread_count"]
    for theirs, ours in _SWITCHES.items():
        if theirs in asked:
            options[ours] = "true" if _count(asked, theirs) else "false"
    for name, values in _NUMBERED.items():
        if name in asked:
            if asked[name] not in values:
                raise ConfigError(f"parameters '{name}': expected one of {', '.join(values)}, got '{asked[name]}'")
            options[name] = values[asked[name]]
    if _count(asked, "gpu_mem_limit"):
        options["gpu_mem_limit"] = asked["gpu_mem_limit"]
    return _count(asked, "intra_op_thread_count"), options


def _count(asked: dict[str, str], key: str) -> int:
    text = asked.get(key, "0")
    if not text.isascii() or not text.isdigit():
        raise ConfigError(f"parameters '{key}': expected a whole number, got '{text}'")
    return int(text)


def _tensor(kind: str, given: pb.ModelInput | pb.ModelOutput) -> TensorConfig:
    if not given.name:
        raise ConfigError(f"{kind}: expected a name for each")
    if any(length < 1 and length != -1 for length in given.dims):
        raise ConfigError(f"{kind}.dims of '{given.name}': expected lengths from 1, or -1 for any, got {list(given.dims)}")
    return TensorConfig(
        name=given.name,
        datatype=_wire_datatype(given.data_type) if given.data_type else None,
        shape=tuple(given.dims) or None,
        optional=True if isinstance(given, pb.ModelInput) and given.optional else None,
        labels=given.label_filename or None if isinstance(given, pb.ModelOutput) else None,
    )


def _wire_datatype(number: int) -> str:
    name = pb.POOL.FindEnumTypeByName("inference.DataType").values_by_number[number].name.removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name


def _version_policy(given: pb.ModelVersionPolicy) -> str:
    if given.HasField("all"):
        return "all"
    if given.HasField("specific"):
        if not given.specific.versions:
            raise ConfigError("version_policy.specific: expected at least one version")
        return ",".join(map(str, given.specific.versions))
    return f"latest:{given.latest.num_versions or 1}"


_READ_PARAMETERS = {"intra_op_thread_count", "inter_op_thread_count", "gpu_mem_limit", *_SWITCHES, *_NUMBERED}
_IGNORED_PARAMETERS = {
    "execution_mode",
    "memory.enable_memory_arena_shrinkage",
    "session.use_device_allocator_for_initializers",
    "do_copy_in_default_stream",
}
"""Parameters of Triton's onnxruntime backend that change speed or memory only."""


def _notes(given: pb.ModelConfig, backend: str | None, size: int | None) -> Iterator[str]:
    batching = given.dynamic_batching
    if size and not given.HasField("dynamic_batching"):
        yield "no dynamic_batching; requests that wait for an instance are run together all the same"
    if batching.preferred_batch_size:
        yield "dynamic_batching.preferred_batch_size has no effect: a free instance takes what is there"
    if batching.preserve_ordering:
        yield "dynamic_batching.preserve_ordering has no effect: every call has its own answer"
    if batching.default_queue_policy.max_queue_size:
        yield "max_queue_size counts rows, not requests"
    if given.model_warmup:
        yield "model_warmup has no effect: every batch size is warmed up with synthesised inputs"
    if given.metric_tags or given.model_metrics.metric_control:
        yield f"{'metric_tags' if given.metric_tags else 'model_metrics'} has no effect"
    if given.runtime:
        yield "runtime has no effect: the backend knows its library"
    ordinals = sorted({ordinal for group in given.instance_group for ordinal in group.gpus})
    if len(ordinals) > 1:
        yield f"instance_group.gpus {', '.join(map(str, ordinals))}: instances are spread over all GPUs that this process sees"
    for group in given.instance_group:
        if group.kind == pb.ModelInstanceGroup.KIND_GPU and not group.gpus:
            yield "instance_group.count is of all GPUs together, not of each"
        if group.rate_limiter.resources or group.rate_limiter.priority or group.host_policy:
            yield f"instance_group.{'host_policy' if group.host_policy else 'rate_limiter'} has no effect"
    for descriptor, _ in given.optimization.ListFields():
        if descriptor.name != "graph":
            yield f"optimization.{descriptor.name} has no effect"
    if backend in (None, "onnxruntime"):
        yield from (f"parameters '{key}' has no effect" for key in sorted(given.parameters) if key in _IGNORED_PARAMETERS)


# -- an effective model to the message ------------------------------------------------------------------------------------


class SettledModel(Protocol):
    """What of a model's effective configuration clients are told. lifecycle.effective.EffectiveModel is one."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def backend(self) -> str: ...
    @property
    def platform(self) -> str: ...
    @property
    def filename(self) -> str: ...
    @property
    def signature(self) -> Signature: ...
    @property
    def batching(self) -> BatchingConfig: ...
    @property
    def instances(self) -> InstanceConfig: ...


def model_config_message(model: SettledModel) -> pb.ModelConfig:
    """The configuration as Triton normalises it: nothing left to default that clients would have to know.

    Only what holds is present: clients tell the scheduler by which message is set.
    """
    size = model.signature.max_batch_size
    labels = {tensor.name: tensor.labels or "" for tensor in model.config.outputs}
    optional = {spec.name for spec in model.signature.inputs if spec.optional}
    message = pb.ModelConfig(
        name=model.config.name,
        platform=model.platform,
        backend=model.backend,
        default_model_filename=model.filename,
        max_batch_size=size,
        version_policy=_version_policy_message(model.config.version_policy),
        instance_group=[_instance_group(model.config.name, model.instances)],
    )
    for spec, dims in _without_batch(model.signature.inputs, size):
        message.input.add(name=spec.name, data_type=_data_type(spec), dims=dims, optional=spec.name in optional)
    for spec, dims in _without_batch(model.signature.outputs, size):
        message.output.add(name=spec.name, data_type=_data_type(spec), dims=dims, label_filename=labels.get(spec.name, ""))
    for key, value in model.config.parameters.items():
        message.parameters[key].string_value = value
    if size:
        message.dynamic_batching.CopyFrom(_dynamic_batching(model.batching, size))
    return message


def _without_batch(specs: Iterable[TensorSpec], size: int) -> Iterator[tuple[TensorSpec, Sequence[int]]]:
    for spec in specs:
        yield spec, spec.shape[1:] if size else spec.shape


def _data_type(spec: TensorSpec) -> int:
    name = "STRING" if spec.datatype.value == "BYTES" else spec.datatype.value
    return pb.POOL.FindEnumTypeByName("inference.DataType").values_by_name[f"TYPE_{name}"].number


def _version_policy_message(policy: str) -> pb.ModelVersionPolicy:
    if policy == "all":
        return pb.ModelVersionPolicy(all=pb.ModelVersionPolicy.All())
    if policy.startswith("latest:"):
        return pb.ModelVersionPolicy(latest=pb.ModelVersionPolicy.Latest(num_versions=int(policy.removeprefix("latest:"))))
    return pb.ModelVersionPolicy(specific=pb.ModelVersionPolicy.Specific(versions=map(int, policy.split(","))))


def _instance_group(model: str, instances: InstanceConfig) -> pb.ModelInstanceGroup:
    kinds = {"cpu": pb.ModelInstanceGroup.KIND_CPU, "cuda": pb.ModelInstanceGroup.KIND_GPU}
    name, _, ordinal = instances.device.partition(":")
    kind = kinds.get(name, pb.ModelInstanceGroup.KIND_AUTO)
    return pb.ModelInstanceGroup(name=f"{model}_0", kind=kind, count=instances.count, gpus=[int(ordinal)] if ordinal else [])


def _dynamic_batching(batching: BatchingConfig, size: int) -> pb.ModelDynamicBatching:
    return pb.ModelDynamicBatching(
        preferred_batch_size=batching.allowed_batch_sizes or (size,),
        max_queue_delay_microseconds=round(batching.max_queue_delay * _MICROSECONDS),
        priority_levels=batching.priority_levels,
        default_priority_level=batching.default_priority_level,
        default_queue_policy=pb.ModelQueuePolicy(
            default_timeout_microseconds=round(batching.default_timeout * _MICROSECONDS),
            allow_timeout_override=batching.allow_timeout_override,
            max_queue_size=batching.max_queue_size,
        ),
    )
