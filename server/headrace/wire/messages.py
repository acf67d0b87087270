"""The protobuf messages, in a descriptor pool of our own.

tritonclient registers the same full names in protobuf's default pool; two definitions there are an error at import. A private
pool lets both load in one process, in either order, and needs no generated code that must match the protobuf runtime.

Every top-level message and enum value of protos/ is an attribute of this module by its simple name, with its types for mypy from
message_types.pyi, which `make proto` writes.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

if TYPE_CHECKING:
    from headrace.wire.message_types import *  # noqa: F403


SERVICE = "inference.GRPCInferenceService"
HEALTH_SERVICE = "grpc.health.v1.Health"
ADMIN_SERVICE = "headrace.v1.ModelAdmin"
FEEDBACK_SERVICE = "headrace.v1.ModelFeedback"


def _read_descriptors() -> descriptor_pb2.FileDescriptorSet:
    return descriptor_pb2.FileDescriptorSet.FromString((files("headrace.wire") / "descriptors.binpb").read_bytes())


def _load_pool(descriptors: descriptor_pb2.FileDescriptorSet) -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    for file in descriptors.file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


_DESCRIPTORS = _read_descriptors()
POOL = _load_pool(_DESCRIPTORS)
"""For reflection and text format. Never added to after import."""


def message_class(full_name: str) -> type[Message]:
    """The class of a message such as 'inference.ModelInferRequest'. Raises KeyError for an unknown name."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(full_name))


def method_classes(service: str) -> dict[str, tuple[type[Any], type[Any]]]:
    """Method name -> (request class, response class) of a service."""
    methods = POOL.FindServiceByName(service).methods
    return {m.name: (message_class(m.input_type.full_name), message_class(m.output_type.full_name)) for m in methods}


def _attributes() -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    for file in _DESCRIPTORS.file:
        for message in file.message_type:
            attributes[message.name] = message_class(f"{file.package}.{message.name}")
        for enum in file.enum_type:
            attributes.update({value.name: value.number for value in enum.value})
    return attributes


globals().update(_attributes())
