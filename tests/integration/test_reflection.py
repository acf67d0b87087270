"""Server reflection, through the reflection client that grpcio ships."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from fake_operations import FakeOperations
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from headrace.wire.messages import method_classes
from served_models import Serve

SERVICES = [
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
    "headrace.v1.ModelAdmin",
    "inference.GRPCInferenceService",
]


def read_services(address: str) -> dict[str, Any]:
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = descriptor_pool.DescriptorPool(database)
        return {name: pool.FindServiceByName(name) for name in sorted(database.get_services())}


async def test_every_service_is_listed_and_described_with_all_its_messages(serve: Serve) -> None:
    async with serve(view=FakeOperations()) as served:
        found = await asyncio.to_thread(read_services, served.address)
    assert list(found) == SERVICES
    for name in ("grpc.health.v1.Health", "headrace.v1.ModelAdmin", "inference.GRPCInferenceService"):
        assert {m.name: m.input_type.full_name for m in found[name].methods} == {
            method: classes[0].DESCRIPTOR.full_name for method, classes in method_classes(name).items()
        }
    request = found["inference.GRPCInferenceService"].methods_by_name["ModelInfer"].input_type
    assert request.fields_by_name["raw_input_contents"].number == 7


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_both_versions_of_reflection_answer_and_describe_themselves(serve: Serve, version: str) -> None:
    service = f"grpc.reflection.{version}.ServerReflection"
    async with serve(view=FakeOperations()) as served, grpc.aio.insecure_channel(served.address) as channel:
        call = channel.stream_stream(
            f"/{service}/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )
        asked = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=service),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.such.Thing"),
        ]
        listed, described, unknown = [answer async for answer in call(asked)]
    assert [each.name for each in listed.list_services_response.service] == SERVICES
    assert len(described.file_descriptor_response.file_descriptor_proto) == 1
    assert unknown.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
