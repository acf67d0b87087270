from __future__ import annotations

import pytest
from headrace.errors import InvalidRequest, NotFound, ShuttingDown, Unsupported
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
    methods = control()[0].methods()
    assert {*methods, "ModelInfer", "ModelStreamInfer"} == set(method_classes(SERVICE))
    offered = {
        "ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelConfig", "ModelStatistics", "RepositoryIndex",
    }  # fmt: skip
    for name in set(methods) - offered:
        with pytest.raises(Unsupported, match=name):
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
    assert "statistics" in metadata.extensions
    assert not {"model_repository", "system_shared_memory", "sequence", "trace", "logging", "classification"} & set(metadata.extensions)


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


def test_metadata_and_config_of_an_unknown_model_are_not_found() -> None:
    service, _ = control()
    with pytest.raises(NotFound, match="Request for unknown model: 'nobody' is not found"):
        service.model_metadata(messages.ModelMetadataRequest(name="nobody"))
    with pytest.raises(NotFound, match="Request for unknown model: 'nobody' is not found"):
        service.model_config(messages.ModelConfigRequest(name="nobody"))


def test_statistics_sum_over_requests_and_over_executions() -> None:
    version = ScriptedVersion(version=7)
    shard = version.counters.shard()
    times = BatchTimes(
        rows=3, padded_rows=4, arrived=[1.0, 2.0], enqueued=[1.0, 2.0], taken=3.0, input_done=3.25, output_start=4.25, done=4.5
    )
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
