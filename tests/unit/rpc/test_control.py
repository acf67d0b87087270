from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from fake_operations import FakeRepository
from headrace.errors import InvalidRequest, LoadError, NotFound, NotReady, ServerError, ShuttingDown, Unsupported
from headrace.lifecycle.state import VersionState
from headrace.rpc.control import ControlService
from headrace.telemetry.counters import BatchTimes, FailureReason
from headrace.wire import messages
from headrace.wire.messages import SERVICE, method_classes
from scripted_models import ScriptedModels, ScriptedVersion


def control(*versions: ScriptedVersion) -> tuple[ControlService, ScriptedModels]:
    models = ScriptedModels(*versions)
    return ControlService(models, server_name="triton", server_version="1.2.3"), models


def test_every_method_of_the_service_is_there_and_the_rest_says_that_it_is_not_offered() -> None:
    service, _ = control()
    methods = service.methods()
    assert {*methods, *service.slow_methods(), "ModelInfer", "ModelStreamInfer"} == set(method_classes(SERVICE))
    offered = {
        "ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelConfig", "ModelStatistics", "RepositoryIndex",
    }  # fmt: skip
    for name in set(methods) - offered:
        disabled = "shared memory is (disabled|not supported).*-shared-memory turns it on"
        with pytest.raises(Unsupported, match=disabled if "SharedMemory" in name else name):
            methods[name](b"")


def test_methods_go_from_bytes_to_bytes() -> None:
    methods = control(ScriptedVersion())[0].methods()
    answer = methods["ModelReady"](messages.ModelReadyRequest(name="echo").SerializeToString())
    assert messages.ModelReadyResponse.FromString(answer).ready
    with pytest.raises(InvalidRequest, match="could not decode the ModelReadyRequest"):
        methods["ModelReady"](b"\xff")


def test_server_live_and_ready_until_the_server_exits() -> None:
    service, models = control()
    models.is_ready = False
    assert service.server_live(messages.ServerLiveRequest()).live
    assert not service.server_ready(messages.ServerReadyRequest()).ready
    models.is_ready = True
    assert service.server_ready(messages.ServerReadyRequest()).ready
    models.announce_stop()
    for ask, request in ((service.server_live, messages.ServerLiveRequest()), (service.server_ready, messages.ServerReadyRequest())):
        with pytest.raises(ShuttingDown, match="Server exiting"):
            ask(request)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "version", "ready"),
    [("echo", "", True), ("echo", "2", True), ("echo", "3", False), ("echo", "9", False), ("other", "", False)],
)
def test_model_ready_is_false_for_what_is_not_there(name: str, version: str, ready: bool) -> None:
    service, _ = control(ScriptedVersion(version=2), ScriptedVersion(version=3, state=VersionState.LOADING))
    assert service.model_ready(messages.ModelReadyRequest(name=name, version=version)).ready is ready


@pytest.mark.parametrize("version", ["one", "-1", "1.5"])
def test_model_ready_refuses_a_version_that_is_no_number(version: str) -> None:
    with pytest.raises(InvalidRequest, match=version):
        control(ScriptedVersion())[0].model_ready(messages.ModelReadyRequest(name="echo", version=version))


def test_server_metadata_names_the_server_and_only_what_works() -> None:
    metadata = control()[0].server_metadata(messages.ServerMetadataRequest())
    assert (metadata.name, metadata.version) == ("triton", "1.2.3")
    assert {"statistics", "classification"} <= set(metadata.extensions)
    assert not {"model_repository", "system_shared_memory", "sequence", "trace", "logging"} & set(metadata.extensions)


def test_model_metadata_describes_tensors_with_their_batch_dimension() -> None:
    service, _ = control(ScriptedVersion(version=1), ScriptedVersion(version=2), ScriptedVersion(version=3, state=VersionState.FAILED))
    metadata = service.model_metadata(messages.ModelMetadataRequest(name="echo"))
    assert (metadata.name, list(metadata.versions), metadata.platform) == ("echo", ["1", "2"], "scripted_model")
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [("x", "FP32", [-1, -1])]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [("y", "FP32", [-1, -1])]
    assert list(service.model_metadata(messages.ModelMetadataRequest(name="echo", version="1")).versions) == ["1"]


def test_model_config_is_of_the_model_asked_for_and_agrees_with_its_metadata() -> None:
    service, _ = control(ScriptedVersion())
    config = service.model_config(messages.ModelConfigRequest(name="echo")).config
    assert (config.name, config.platform, config.backend) == ("echo", "scripted_model", "scripted")
    # perf_analyzer aborts when a tensor is in one and not in the other.
    metadata = service.model_metadata(messages.ModelMetadataRequest(name="echo"))
    assert [tensor.name for tensor in config.input] == [tensor.name for tensor in metadata.inputs]
    assert [tensor.name for tensor in config.output] == [tensor.name for tensor in metadata.outputs]


def test_a_label_stands_for_its_version() -> None:
    service, models = control(ScriptedVersion(version=1), ScriptedVersion(version=2))
    models.labels = {"stable": 1}
    assert list(service.model_metadata(messages.ModelMetadataRequest(name="echo", version="stable")).versions) == ["1"]
    (found,) = service.model_statistics(messages.ModelStatisticsRequest(name="echo", version="stable")).model_stats
    assert found.version == "1"
    assert service.model_ready(messages.ModelReadyRequest(name="echo", version="stable")).ready


def test_metadata_and_config_of_an_unknown_model_are_not_found() -> None:
    service, _ = control()
    with pytest.raises(NotFound, match="Request for unknown model: 'nobody' is not found"):
        service.model_metadata(messages.ModelMetadataRequest(name="nobody"))
    with pytest.raises(NotFound, match="Request for unknown model: 'nobody' is not found"):
        service.model_config(messages.ModelConfigRequest(name="nobody"))


def test_statistics_sum_over_requests_and_over_executions() -> None:
    version = ScriptedVersion(version=7)
    shard = version.counters.shard()
    times = BatchTimes(rows=3, padded_rows=4, arrived=[1.0, 2.0], taken=3.0, input_done=3.25, output_start=4.25, done=4.5)
    shard.record_batch(times)
    shard.record_failure(FailureReason.REJECTED, 2, 0.5)
    (found,) = control(version)[0].model_statistics(messages.ModelStatisticsRequest(name="echo")).model_stats
    assert (found.name, found.version, found.inference_count, found.execution_count) == ("echo", "7", 3, 1)
    assert found.last_inference > 1_700_000_000_000
    stats = found.inference_stats
    expected = {
        "success": (2, 6_000_000_000), "fail": (2, 500_000_000), "queue": (2, 3_000_000_000), "compute_input": (2, 500_000_000),
        "compute_infer": (2, 2_000_000_000), "compute_output": (2, 500_000_000), "cache_hit": (0, 0), "cache_miss": (0, 0),
    }  # fmt: skip
    assert {name: (getattr(stats, name).count, getattr(stats, name).ns) for name in expected} == expected
    assert all(stats.HasField(name) for name in expected)
    (batch,) = found.batch_stats
    assert (batch.batch_size, batch.compute_infer.count, batch.compute_infer.ns) == (3, 1, 1_000_000_000)


def test_statistics_of_all_models_are_of_those_that_are_live() -> None:
    service, _ = control(ScriptedVersion("a"), ScriptedVersion("b"), ScriptedVersion("c", state=VersionState.LOADING))
    assert [found.name for found in service.model_statistics(messages.ModelStatisticsRequest()).model_stats] == ["a", "b"]


@pytest.mark.parametrize(("name", "version"), [("nobody", ""), ("echo", "9")])
def test_statistics_of_an_unknown_model_are_the_callers_fault(name: str, version: str) -> None:
    with pytest.raises(InvalidRequest, match=f"requested model '{name}'.* is not available"):
        control(ScriptedVersion())[0].model_statistics(messages.ModelStatisticsRequest(name=name, version=version))


def test_repository_index_lists_states_with_their_reasons() -> None:
    failed = ScriptedVersion("b", state=VersionState.FAILED)
    failed.reason = "no such file"
    service, _ = control(ScriptedVersion("a"), failed)
    rows = service.repository_index(messages.RepositoryIndexRequest()).models
    assert [(r.name, r.version, r.state, r.reason) for r in rows] == [("a", "1", "READY", ""), ("b", "1", "UNAVAILABLE", "no such file")]
    assert [r.name for r in service.repository_index(messages.RepositoryIndexRequest(ready=True)).models] == ["a"]


def test_repository_index_of_one_repository_is_not_offered() -> None:
    with pytest.raises(Unsupported, match="repository_name"):
        control()[0].repository_index(messages.RepositoryIndexRequest(repository_name="models"))


# -- loads and unloads by request --------------------------------------------------------------------------------------

REFUSED = "explicit model load / unload is not allowed if polling is enabled"


def controlled(repository: FakeRepository | None) -> ControlService:
    return ControlService(ScriptedModels(), server_name="triton", server_version="1.2.3", control=repository)


def parameter(value: Any) -> messages.ModelRepositoryParameter:
    field = {bool: "bool_param", int: "int64_param", str: "string_param", bytes: "bytes_param"}[type(value)]
    return messages.ModelRepositoryParameter(**{field: value})


async def load(service: ControlService, model: str = "m", parameters: Mapping[str, Any] | None = None, repository: str = "") -> None:
    given = {key: parameter(value) for key, value in (parameters or {}).items()}
    request = messages.RepositoryModelLoadRequest(repository_name=repository, model_name=model, parameters=given)
    await service.slow_methods()["RepositoryModelLoad"](request.SerializeToString())


async def unload(service: ControlService, model: str = "m", parameters: Mapping[str, Any] | None = None, repository: str = "") -> None:
    given = {key: parameter(value) for key, value in (parameters or {}).items()}
    request = messages.RepositoryModelUnloadRequest(repository_name=repository, model_name=model, parameters=given)
    await service.slow_methods()["RepositoryModelUnload"](request.SerializeToString())


async def test_a_load_hands_over_the_configuration_and_the_files() -> None:
    repository = FakeRepository()
    service = controlled(repository)
    await load(service)
    files = {"file:1/model.onnx": b"graph", "file:2/model.onnx/part.bin": b""}
    await load(service, parameters={"config": '{"max_batch_size":"16", "parameters": {"a": {"string_value": "b"}}}', **files})
    (plain, whole) = repository.loaded
    assert plain == ("m", None, {})
    model, config, given = whole
    assert config is not None
    assert (model, config.name, config.batching.max_batch_size, config.parameters) == ("m", "m", 16, {"a": "b"})
    assert given == {"1/model.onnx": b"graph", "2/model.onnx/part.bin": b""}


@pytest.mark.parametrize("repository", [None, FakeRepository(allows_control=False)])
async def test_without_control_nothing_is_loaded_or_unloaded_by_request(repository: FakeRepository | None) -> None:
    for ask in (load, unload):
        with pytest.raises(NotReady, match=REFUSED):
            await ask(controlled(repository))
    assert "model_repository" not in controlled(repository).server_metadata(messages.ServerMetadataRequest()).extensions


def test_with_control_the_extension_is_listed_in_its_place() -> None:
    metadata = controlled(FakeRepository()).server_metadata(messages.ServerMetadataRequest())
    assert list(metadata.extensions[:3]) == ["classification", "model_repository", "schedule_policy"]


async def test_other_repositories_are_not_offered() -> None:
    for ask in (load, unload):
        with pytest.raises(Unsupported, match="'repository_name' specification is not supported"):
            await ask(controlled(FakeRepository()), repository="elsewhere")


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"confg": "{}"}, "unrecognized load parameter 'confg'."),
        ({"config": b"{}"}, "invalid value type for load parameter 'config', expected string_param."),
        ({"config": 3}, "invalid value type for load parameter 'config', expected string_param."),
        ({"file:1/model.onnx": "graph"}, "invalid value type for load parameter 'file:1/model.onnx', expected bytes_param."),
        ({"config": '{"max_batch_sise": 1}'}, "'max_batch_sise' is no field of ModelConfig, did you mean 'max_batch_size'?"),
        ({"config": "{"}, "failed to load 'm', failed to poll from model repository: parameter 'config': Failed to load JSON"),
        ({"config": '{"name": "other"}'}, "parameter 'config': expected name 'm' or none, got 'other'"),
        ({"file:1/a": b"", "file:1/a/b": b""}, "load parameter 'file:1/a': expected a file or a directory, got both ('1/a/b')"),
    ],
)
async def test_what_a_load_cannot_mean_is_the_callers_fault(parameters: dict[str, Any], text: str) -> None:
    repository = FakeRepository()
    with pytest.raises(InvalidRequest) as caught:
        await load(controlled(repository), parameters=parameters)
    assert text in str(caught.value)
    assert repository.loaded == []


@pytest.mark.parametrize("model", ["", ".", "..", "../m", "a/b", "/etc", "a\\b", "a\0"])
async def test_a_models_name_is_that_of_a_directory(model: str) -> None:
    with pytest.raises(InvalidRequest, match="model name: expected one without path separators"):
        await load(controlled(FakeRepository()), model)


@pytest.mark.parametrize(
    "path",
    [
        "", "model.onnx", "1", "1/", "x/model.onnx", "01/model.onnx", "-1/m", "1/../../m", "1/./m", "1//m", "/1/m", "../1/m",
        "1/a\\b", "1/\0",
    ],
)  # fmt: skip
async def test_files_stay_in_the_directory_of_their_version(path: str) -> None:
    with pytest.raises(InvalidRequest, match="expected 'file:<version number>/<name>'"):
        await load(controlled(FakeRepository()), parameters={"config": "{}", f"file:{path}": b""})


async def test_files_without_a_configuration_are_tritons_error() -> None:
    with pytest.raises(ServerError, match=r"failed to load 'm', failed to poll from model repository$"):
        await load(controlled(FakeRepository()), parameters={"file:1/model.onnx": b""})


async def test_a_model_that_cannot_be_loaded_has_tritons_code() -> None:
    text = "load failed for model 'm': version 1 is at UNAVAILABLE state: no such file;"
    with pytest.raises(InvalidRequest, match=text):
        await load(controlled(FakeRepository(error=LoadError(text))))


async def test_a_load_goes_on_when_its_caller_leaves() -> None:
    repository = FakeRepository()
    repository.gate.clear()
    call = asyncio.ensure_future(load(controlled(repository)))
    await repository.began.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    repository.gate.set()
    await asyncio.wait_for(repository.done.wait(), 5)
    assert [model for model, _, _ in repository.loaded] == ["m"]


async def test_an_unload_says_whether_its_parts_go_too() -> None:
    repository = FakeRepository()
    service = controlled(repository)
    await unload(service)
    await unload(service, "a", {"unload_dependents": True})
    await unload(service, "b", {"unload_dependents": False, "unknown": 1})
    assert repository.unloaded == [("m", False), ("a", True), ("b", False)]
    with pytest.raises(InvalidRequest, match="invalid value type for 'unload_dependents' parameter, expected bool_param"):
        await unload(service, parameters={"unload_dependents": "yes"})
