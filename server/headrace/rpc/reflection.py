"""Server reflection over the private pool, so that grpcurl and its like work without .proto files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2

from headrace.wire.messages import POOL

V1ALPHA = "grpc.reflection.v1alpha"
V1 = "grpc.reflection.v1"


def reflection_handlers(services: Sequence[str]) -> list[Any]:
    """grpc.aio handlers that describe `services`, which are in the private pool, and reflection itself.

    Newer clients ask for v1 first. It differs from v1alpha in nothing but the package's name, so one servicer answers both.
    """
    names = [*services, *(f"{package}.ServerReflection" for package in (V1, V1ALPHA))]
    servicer = reflection.aio.ReflectionServicer(names, pool=_described_pool(services))
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return [
        grpc.method_handlers_generic_handler(f"{package}.ServerReflection", {"ServerReflectionInfo": handler}) for package in (V1, V1ALPHA)
    ]


def _described_pool(services: Sequence[str]) -> descriptor_pool.DescriptorPool:
    """A pool of its own, since reflection's files have no place among the messages that the server itself uses."""
    pool = descriptor_pool.DescriptorPool()
    added: set[str] = set()

    def add(file: Any) -> None:
        if file.name not in added:
            added.add(file.name)
            for dependency in file.dependencies:
                add(dependency)
            pool.AddSerializedFile(file.serialized_pb)

    for service in services:
        add(POOL.FindFileContainingSymbol(service))
    add(reflection_pb2.DESCRIPTOR)
    pool.AddSerializedFile(_as_v1(reflection_pb2.DESCRIPTOR))
    return pool


def _as_v1(v1alpha: Any) -> bytes:
    """The file of v1alpha with its package renamed."""
    file = descriptor_pb2.FileDescriptorProto.FromString(v1alpha.serialized_pb)
    file.name = file.name.replace("v1alpha", "v1")
    file.package = V1
    for message in file.message_type:
        for field in message.field:
            if field.type_name:  # setting it, even to nothing, would make a scalar field one of messages
                field.type_name = field.type_name.replace(f".{V1ALPHA}.", f".{V1}.")
    for service in file.service:
        for method in service.method:
            method.input_type = method.input_type.replace(f".{V1ALPHA}.", f".{V1}.")
            method.output_type = method.output_type.replace(f".{V1ALPHA}.", f".{V1}.")
    return file.SerializeToString()
