from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path

import pytest
from headrace.errors import Cancelled, Code, HeadraceError, InvalidRequest, NotFound, NotReady, QueueFull
from headrace.requests import Answer, InferRequest, Reply
from headrace.rpc.inference import MAX_RESOLVES, InferenceService
from headrace.shared_memory import SharedMemoryRegions
from headrace.testing import CollectingOutlet
from headrace.wire.messages import ModelInferRequest
from scripted_models import ScriptedModels, ScriptedVersion, hold, infer_message


class WatchedReply(Reply):
    __slots__ = ("__weakref__",)


def submit(service: InferenceService, message: bytes) -> Answer | None:
    outlet = CollectingOutlet()
    reply = Reply(outlet)
    service.submit(message, reply)
    return outlet.answers.get(reply)


def placed_message() -> bytes:
    message = ModelInferRequest(model_name="echo", id="7")
    tensor = message.inputs.add(name="x", datatype="FP32", shape=(1, 4))
    tensor.parameters["shared_memory_region"].string_param = "r"
    tensor.parameters["shared_memory_byte_size"].int64_param = 16
    return message.SerializeToString()


def failing(error: Exception) -> ScriptedVersion:
    def script(version: ScriptedVersion, request: InferRequest) -> Answer:
        raise error

    return ScriptedVersion(script=script)


def test_a_message_that_cannot_be_decoded_is_the_callers_fault() -> None:
    answer = submit(InferenceService(ScriptedModels(ScriptedVersion())), b"\xff\xff\xff")
    assert isinstance(answer, InvalidRequest)
    assert "could not decode" in str(answer)


def test_an_unknown_model_is_named() -> None:
    answer = submit(InferenceService(ScriptedModels()), infer_message("nobody"))
    assert isinstance(answer, NotFound)
    assert "'nobody'" in str(answer)


def test_a_refusal_by_the_version_reaches_the_caller_as_it_is() -> None:
    error = QueueFull("Exceeds maximum queue size")
    assert submit(InferenceService(ScriptedModels(failing(error))), infer_message()) is error


def test_an_unexpected_error_is_logged_under_the_id_that_the_caller_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        answer = submit(InferenceService(ScriptedModels(failing(ZeroDivisionError("secret")))), infer_message(id="abc-1"))
    assert isinstance(answer, HeadraceError)
    assert answer.code is Code.INTERNAL
    assert str(answer) == "internal error; the server's log has the reason under request id abc-1"
    assert "secret" in caplog.text
    assert "abc-1" in caplog.text


def test_an_unexpected_error_of_a_request_without_id_gets_one_of_its_own() -> None:
    service = InferenceService(ScriptedModels(failing(ZeroDivisionError())))
    first, second = str(submit(service, infer_message())), str(submit(service, infer_message()))
    assert first.startswith("internal error")
    assert first != second


def test_a_version_that_drains_between_being_found_and_being_asked_fails_nobody() -> None:
    old, new = ScriptedVersion(version=1), ScriptedVersion(version=2)
    models = ScriptedModels(old)

    def swap(version: ScriptedVersion, request: InferRequest) -> Answer:
        models.versions = [new]
        raise NotReady("version 1 is not at ready state")

    old.script = swap
    new.script = hold
    assert submit(InferenceService(models), infer_message(id="r")) is None
    assert [request.id for request in new.requests] == ["r"]


def test_a_version_that_never_takes_the_request_is_not_asked_for_ever() -> None:
    version = failing(NotReady("version 1 is not at ready state"))
    answer = submit(InferenceService(ScriptedModels(version)), infer_message())
    assert isinstance(answer, NotReady)
    assert len(version.requests) == MAX_RESOLVES


def test_cancel_finds_the_request_where_it_waits() -> None:
    version = ScriptedVersion(script=hold)
    service = InferenceService(ScriptedModels(version))
    outlet = CollectingOutlet()
    reply = Reply(outlet)
    service.submit(infer_message(), reply)
    service.cancel(reply)
    assert version.cancelled == [reply]
    assert isinstance(outlet.answers[reply], Cancelled)


def test_cancel_of_a_request_that_was_refused_does_nothing() -> None:
    service = InferenceService(ScriptedModels())
    reply = Reply(CollectingOutlet())
    service.submit(infer_message(), reply)
    service.cancel(reply)


@pytest.mark.parametrize("error", [QueueFull("full"), ZeroDivisionError()])
def test_a_refused_request_leaves_memory_without_the_garbage_collector(error: Exception) -> None:
    version = failing(error)
    service = InferenceService(ScriptedModels(version))
    answers: list[Answer] = []

    class Outlet:
        def deliver(self, given: list[tuple[Reply, Answer]]) -> None:
            answers.extend(answer for _, answer in given)

    gc.disable()
    try:
        reply = WatchedReply(Outlet())
        alive = weakref.ref(reply)
        service.submit(infer_message(), reply)
        del reply
        version.requests.clear()
        version.replies.clear()
        if isinstance(error, ZeroDivisionError):
            error.__traceback__ = None  # the test's own reference
        assert len(answers) == 1
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("together", [False, True])
def test_what_memory_a_region_stands_for_is_looked_up_for_each_request(tmp_path: Path, together: bool) -> None:
    (tmp_path / "a").write_bytes(bytes(range(32)))
    regions, outlet, version = SharedMemoryRegions(tmp_path), CollectingOutlet(), ScriptedVersion(script=hold)
    service = InferenceService(ScriptedModels(version), regions=regions)

    def ask() -> Reply:
        reply = Reply(outlet)
        service.submit_all([(placed_message(), reply)]) if together else service.submit(placed_message(), reply)
        return reply

    for offset in (0, 16):
        regions.register("r", "a", offset, 16)
        for _ in range(20):  # soon by the layout
            ask()
        assert bytes(version.requests[-1].inputs[0].data) == bytes(range(offset, offset + 16))
        regions.unregister("r")
    answer = outlet.answers[ask()]
    assert isinstance(answer, NotFound)
    assert str(answer) == "Unable to find shared memory region: 'r'"
