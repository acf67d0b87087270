"""The protobuf messages, in a descriptor pool of our own.

tritonclient registers the same full names in protobuf's default pool; two definitions there are an error at import. A private
pool lets both load in one process, in either order, and needs no generated code that must match the protobuf runtime.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# Messages have no static types: their attributes are made from descriptors when this module loads.
Message = Any


def _load_pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    descriptors = descriptor_pb2.FileDescriptorSet.FromString((files("headrace.wire") / "descriptors.binpb").read_bytes())
    for file in descriptors.file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


POOL = _load_pool()

SERVICE = "inference.GRPCInferenceService"
HEALTH_SERVICE = "grpc.health.v1.Health"


def message_class(full_name: str) -> type[Message]:
    """The class of a message such as 'inference.ModelInferRequest'. Raises KeyError for an unknown name."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(full_name))


def method_classes(service: str) -> dict[str, tuple[type[Message], type[Message]]]:
    """Method name -> (request class, response class) of a service."""
    methods = POOL.FindServiceByName(service).methods
    return {m.name: (message_class(m.input_type.full_name), message_class(m.output_type.full_name)) for m in methods}


ModelInferRequest = message_class("inference.ModelInferRequest")
ModelInferResponse = message_class("inference.ModelInferResponse")
ModelConfigMessage = message_class("inference.ModelConfig")
