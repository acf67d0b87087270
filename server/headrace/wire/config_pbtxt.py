"""Triton's config.pbtxt to our ModelConfig, and our effective configuration to the ModelConfig message that clients ask for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf import text_format

from headrace.config import BatchingConfig, InstanceConfig, ModelConfig, TensorConfig
from headrace.errors import ConfigError
from headrace.signature import DataType, Signature, TensorSpec
from headrace.wire.messages import POOL, ModelConfigMessage

_NOT_SERVED = {
    "ensemble_scheduling": "ensembles are not supported",
    "sequence_batching": "sequence batching is not supported",
    "response_cache": "the response cache is not supported",
    "cc_model_filenames": "one artifact per compute capability is not supported",
}
_HARMLESS = ("optimization", "metric_tags", "model_warmup", "runtime")
"""Fields that change speed or labels, not answers: honoured differently here, said at load."""

_ORT_PARAMETERS = {"inter_op_thread_count": "inter_op_threads", "enable_mem_arena": "enable_cpu_mem_arena", "enable_mem_pattern": "enable_mem_pattern"}
_BACKENDS = {"onnxruntime_onnx": "onnxruntime", "tensorrt_plan": "tensorrt"}


def parse_config_pbtxt(text: str, source: str, default_name: str = "") -> ModelConfig:
    """Raises ConfigError naming the file and what cannot be read or honoured. `default_name` where the file has no name."""
    message = ModelConfigMessage()
    try:
        text_format.Parse(text, message, descriptor_pool=POOL)
    except text_format.ParseError as error:
        raise ConfigError(f"{source}: {_explain(str(error))}") from None
    _refuse_unsupported(message, source)
    present = {field.name for field, _ in message.ListFields()}
    size = message.max_batch_size
    if size < 0:
        raise ConfigError(f"{source}: max_batch_size: expected >= 0, got {size}")
    filename = message.default_model_filename
    return ModelConfig(
        message.name or default_name,
        backend=message.backend or _BACKENDS.get(message.platform) or None,
        filename=filename or None,
        # Proto3 cannot tell an absent max_batch_size from 0; Triton infers in both cases, and so do we.
        batching=_batching(message, size or None, source),
        instances=_instances(message, source),
        inputs=tuple(_tensor(t, source, t.optional or None) for t in message.input),
        outputs=tuple(_tensor(t, source, None, t.label_filename) for t in message.output),
        version_policy=_version_policy(message.version_policy),
        parameters={key: value.string_value for key, value in message.parameters.items()},
        notes=tuple(f"config.pbtxt: '{name}' has no effect here" for name in _HARMLESS if name in present),
        provenance=dict.fromkeys(present, "config.pbtxt"),
    )


def _explain(error: str) -> str:
    match = re.search(r'type "inference\.([\w.]+)" has no field named "(\w+)"', error)
    if match is None:
        return error
    fields = [field.name for field in POOL.FindMessageTypeByName(f"inference.{match[1]}").fields]
    near = difflib.get_close_matches(match[2], fields, 1)
    return f"{error.split(' : ')[0]}: unknown field '{match[2]}' in {match[1]}" + (f", did you mean '{near[0]}'?" if near else "")


def _refuse_unsupported(message: Any, source: str) -> None:
    for field, _ in message.ListFields():
        if field.name in _NOT_SERVED and not (field.name == "response_cache" and not message.response_cache.enable):
            raise ConfigError(f"{source}: '{field.name}': {_NOT_SERVED[field.name]}")
    if message.model_transaction_policy.decoupled:
        raise ConfigError(f"{source}: 'model_transaction_policy.decoupled': decoupled models are not supported")
    for tensor in (*message.input, *message.output):
        if tensor.HasField("reshape"):
            raise ConfigError(f"{source}: 'reshape' of '{tensor.name}' is not supported; write the model's own dims")
    for tensor in message.input:
        if tensor.allow_ragged_batch:
            raise ConfigError(f"{source}: 'allow_ragged_batch' of '{tensor.name}' is not supported; different shapes form batches of their own")


def _batching(message: Any, size: int | None, source: str) -> BatchingConfig:
    if not message.HasField("dynamic_batching"):
        return BatchingConfig(max_batch_size=size)
    given = message.dynamic_batching
    policy = given.default_queue_policy
    if policy.timeout_action == 1:
        raise ConfigError(f"{source}: 'timeout_action: DELAY' is not supported; expected REJECT")
    if given.priority_queue_policy:
        raise ConfigError(f"{source}: 'priority_queue_policy' is not supported; expected default_queue_policy alone")
    return BatchingConfig(
        max_batch_size=size,
        max_queue_delay=given.max_queue_delay_microseconds / 1e6,
        max_queue_size=policy.max_queue_size or BatchingConfig().max_queue_size,
        priority_levels=given.priority_levels,
        default_priority_level=given.default_priority_level,
        default_timeout=policy.default_timeout_microseconds / 1e6,
        allow_timeout_override=policy.allow_timeout_override if given.HasField("default_queue_policy") else True,
    )


def _instances(message: Any, source: str) -> InstanceConfig:
    parameters = {key: value.string_value for key, value in message.parameters.items()}
    options = {ours: _flag(parameters[theirs]) for theirs, ours in _ORT_PARAMETERS.items() if theirs in parameters}
    threads = parameters.get("intra_op_thread_count", "0")
    if not threads.isdigit():
        raise ConfigError(f"{source}: parameter 'intra_op_thread_count': expected a number, got {threads!r}")
    groups = message.instance_group
    if any(group.kind == 1 for group in groups):
        raise ConfigError(f"{source}: 'instance_group' asks for KIND_GPU; this server runs models on the CPU only")
    count = sum(max(group.count, 1) for group in groups) or 1
    return InstanceConfig(count=count, threads=int(threads), options=options)


def _flag(text: str) -> str:
    return {"1": "true", "0": "false"}.get(text, text)


def _tensor(tensor: Any, source: str, optional: bool | None, labels: str = "") -> TensorConfig:
    if tensor.data_type == 0:
        datatype = None
    else:
        name = str(tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name)
        datatype = "BYTES" if name == "TYPE_STRING" else name.removeprefix("TYPE_")
    if any(dim == 0 or dim < -1 for dim in tensor.dims):
        raise ConfigError(f"{source}: dims of '{tensor.name}': expected numbers > 0 or -1, got {list(tensor.dims)}")
    return TensorConfig(tensor.name, datatype, tuple(tensor.dims) or None, optional, labels or None)


def _version_policy(policy: Any) -> str:
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return "all"
    if choice == "specific":
        return ",".join(map(str, policy.specific.versions))
    return f"latest:{policy.latest.num_versions or 1}" if choice == "latest" else "latest:1"


# -- to clients --------------------------------------------------------------------------------------------------------


def model_config_message(
    config: ModelConfig, signature: Signature, instances: InstanceConfig, *, backend: str, platform: str, filename: str
) -> Any:
    """The normalised configuration, as perf_analyzer and tritonclient read it: dims without the batch dimension."""
    message = ModelConfigMessage(
        name=config.name, platform=platform, backend=backend, max_batch_size=signature.max_batch_size, default_model_filename=filename
    )
    _write_version_policy(message.version_policy, config.version_policy)
    labels = {tensor.name: tensor.labels for tensor in config.outputs if tensor.labels}
    for spec in signature.inputs:
        message.input.add(name=spec.name, data_type=_enum(spec.datatype), dims=_dims(spec, signature), optional=spec.optional)
    for spec in signature.outputs:
        message.output.add(name=spec.name, data_type=_enum(spec.datatype), dims=_dims(spec, signature), label_filename=labels.get(spec.name, ""))
    if signature.max_batch_size:
        _write_batching(message.dynamic_batching, config.batching, signature.max_batch_size)
    message.instance_group.add(name=f"{config.name}_0", count=instances.count, kind=2)
    _write_parameters(message.parameters, config.parameters)
    return message


def _write_version_policy(policy: Any, text: str) -> None:
    if text == "all":
        policy.all.SetInParent()
    elif text.startswith("latest:"):
        policy.latest.num_versions = int(text.removeprefix("latest:"))
    else:
        policy.specific.versions.extend(int(number) for number in text.split(","))


def _write_batching(message: Any, batching: BatchingConfig, size: int) -> None:
    message.preferred_batch_size.extend(batching.allowed_batch_sizes or (size,))
    message.max_queue_delay_microseconds = round(batching.max_queue_delay * 1e6)
    message.priority_levels = batching.priority_levels
    message.default_priority_level = batching.default_priority_level
    message.default_queue_policy.default_timeout_microseconds = round(batching.default_timeout * 1e6)
    message.default_queue_policy.allow_timeout_override = batching.allow_timeout_override
    message.default_queue_policy.max_queue_size = batching.max_queue_size


def _write_parameters(target: Any, parameters: Mapping[str, str]) -> None:
    for key, value in parameters.items():
        target[key].string_value = value


def _enum(datatype: DataType) -> str:
    return "TYPE_STRING" if datatype is DataType.BYTES else f"TYPE_{datatype.value}"


def _dims(spec: TensorSpec, signature: Signature) -> Sequence[int]:
    return spec.shape[1:] if signature.max_batch_size else spec.shape
