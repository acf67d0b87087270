import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from headrace.wire import messages

ROOT = Path(__file__).resolve().parents[3]

RPCS = [
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
    "ModelStreamInfer",
    "ModelConfig",
    "ModelStatistics",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
    "SystemSharedMemoryStatus",
    "SystemSharedMemoryRegister",
    "SystemSharedMemoryUnregister",
    "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister",
    "CudaSharedMemoryUnregister",
    "TraceSetting",
    "LogSettings",
]


def test_service_has_the_twenty_rpcs():
    assert list(messages.method_classes(messages.SERVICE)) == RPCS


def test_only_stream_infer_streams():
    methods = messages.POOL.FindServiceByName(messages.SERVICE).methods
    assert [m.name for m in methods if m.client_streaming or m.server_streaming] == ["ModelStreamInfer"]


def test_health_service_is_the_standard_one():
    methods = messages.POOL.FindServiceByName("grpc.health.v1.Health").methods
    assert {m.name: m.server_streaming for m in methods} == {"Check": False, "List": False, "Watch": True}


def test_method_classes_are_the_modules_classes():
    request, response = messages.method_classes(messages.SERVICE)["ModelInfer"]
    assert (request, response) == (messages.ModelInferRequest, messages.ModelInferResponse)


def test_unknown_message_name_raises_key_error():
    with pytest.raises(KeyError):
        messages.message_class("inference.NoSuchMessage")


def test_files_resolve_by_their_import_paths():
    """What a reflection client does: a file by a symbol, then its imports by name."""
    file = messages.POOL.FindFileContainingSymbol(messages.SERVICE)
    assert file.name == "headrace/open_inference.proto"
    for imported in file.dependencies:
        assert messages.POOL.FindFileByName(imported.name).package == "inference"


@pytest.mark.parametrize("first", ["headrace.wire.messages", "tritonclient.grpc"])
def test_one_process_holds_headrace_and_tritonclient(first):
    """Both register inference.*; in protobuf's default pool the second import would fail."""
    script = f"""
import importlib
importlib.import_module({first!r})
import tritonclient.grpc as client
from headrace.wire.messages import ModelInferRequest
ours = ModelInferRequest(model_name="m", id="7").SerializeToString()
theirs = client.service_pb2.ModelInferRequest.FromString(ours)
assert (theirs.model_name, theirs.id) == ("m", "7")
assert type(theirs) is not ModelInferRequest
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_same_numbers_types_and_presence_as_tritonclient():
    from tritonclient.grpc import model_config_pb2, service_pb2

    theirs = {**model_config_pb2.DESCRIPTOR.message_types_by_name, **service_pb2.DESCRIPTOR.message_types_by_name}
    compared = [_compare(_as_proto(descriptor), _as_proto(messages.message_class(descriptor.full_name).DESCRIPTOR))
                for descriptor in theirs.values()]  # fmt: skip
    assert sum(count for count, _ in compared) > 300
    assert [text for _, differences in compared for text in differences] == []


def _as_proto(descriptor):
    proto = descriptor_pb2.DescriptorProto()
    descriptor.CopyToProto(proto)
    return proto


def _compare(theirs, ours):
    """(fields compared, those that differ). Ours may have more."""
    known = {field.name: _facts(ours, field) for field in ours.field}
    differences = [f"{theirs.name}.{f.name}" for f in theirs.field if known.get(f.name) != _facts(theirs, f)]
    values = {enum.name: [(v.name, v.number) for v in enum.value] for enum in ours.enum_type}
    differences += [e.name for e in theirs.enum_type if values[e.name] != [(v.name, v.number) for v in e.value]]
    count = len(theirs.field)
    nested = {message.name: message for message in ours.nested_type}
    for message in theirs.nested_type:
        more, found = _compare(message, nested[message.name])
        count += more
        differences += found
    return count, differences


def _facts(message, field):
    is_choice = field.HasField("oneof_index") and not field.proto3_optional
    choice = message.oneof_decl[field.oneof_index].name if is_choice else None
    return field.number, field.type, field.label, field.type_name, choice


def test_generated_files_are_up_to_date():
    subprocess.run([sys.executable, str(ROOT / "scripts" / "proto.py"), "--check"], check=True, timeout=60)
