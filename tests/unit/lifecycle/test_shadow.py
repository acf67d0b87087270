"""Shadows: live answers arrive as they were, once and first, whatever the candidate does; answers are compared as configured."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from headrace.errors import BackendError, HeadraceError, NotReady
from headrace.lifecycle.shadow import DISTANCE_EDGES, Shadow, compare_answers
from headrace.requests import Answer, InferRequest, InputTensor, Reply, RequestedOutput
from headrace.signature import DataType, TensorSpec
from headrace.telemetry.shadow_metrics import shadow_lines
from headrace.testing import CollectingOutlet, FakeBackend
from headrace.wire.codec import ResponseEncoder
from scripted_models import ScriptedVersion, echo, hold, make_request
from swapping import Swapping

# -- comparison --------------------------------------------------------------------------------------------------------------


def message(values: Any, datatype: DataType = DataType.FP32, *, name: str = "y", id: str = "") -> bytes:
    array = np.array(values, datatype.dtype)
    return ResponseEncoder("m", "1", (TensorSpec(name, datatype, (-1,)),)).encode(id, (0,), [array], 0, 0, False)


@pytest.mark.parametrize("datatype", [DataType.FP16, DataType.FP32, DataType.FP64])
def test_floats_may_be_off_by_the_tolerance_times_one_and_their_size(datatype: DataType) -> None:
    live = message([[0.0], [99.0]], datatype)
    near = compare_answers(live, message([[0.03], [102.0]], datatype, id="other"), 0.05)
    assert (near.agrees, near.what) == (True, "")
    assert near.distance == pytest.approx(0.03, rel=1e-2)
    far = compare_answers(live, message([[0.0], [109.0]], datatype), 0.05)
    assert (far.agrees, far.what) == (False, "output 'y': off by 0.1, allowed 0.05")


def test_bfloat16_is_compared_by_value() -> None:
    one, two = 0x3F80, 0x4000
    assert compare_answers(message([one], DataType.BF16), message([two], DataType.BF16), 0.05).distance == 0.5


def classes(*strings: Sequence[str]) -> bytes:
    return message(strings, DataType.BYTES)


@pytest.mark.parametrize(
    ("live", "scores", "tolerance", "what"),
    [
        (classes(["0.900000:1:cat", "0.100000:0"]), [[0.1, 0.9]], 0.0, ""),
        (classes(["0.333333:1"]), [[0.1, 1 / 3, 0.2]], 0.0, ""),
        (classes(["0.900000:1"], ["0.500000:0"]), [[0.1, 0.93], [0.48, 0.1]], 0.05, ""),
        (classes(["0.900000:1"]), [[0.1, 0.7]], 0.05, "output 'y': off by 0.105, allowed 0.05"),
        (classes(["0.500000:1"]), [[0.51, 0.49]], 0.05, "output 'y': 1 of 1 rows rank another class first"),
        (classes(["0.500000:1", "0.490000:0"]), [[0.5, 0.49]], 0.05, "output 'y': 1 of 1 rows rank another class first"),
        (classes(["0.500000:1"]), [[0.5, 0.5]], 0.05, ""),
        (message(["nan:1", "inf:0"], DataType.BYTES), [np.inf, np.nan], 0.0, ""),
        (classes(["0.500000:7"]), [[0.5, 0.5]], 0.05, "output 'y': expected BYTES [1,1], got FP32 [1,2]"),
        (classes(["cat"]), [[0.5]], 0.05, "output 'y': expected BYTES [1,1], got FP32 [1,1]"),
    ],
)
def test_a_classification_is_compared_with_the_scores_of_its_classes(live: bytes, scores: Any, tolerance: float, what: str) -> None:
    assert compare_answers(live, message(scores), tolerance).what == what


def test_scores_that_rank_another_class_first_differ_within_the_tolerance() -> None:
    live, swapped = message([[0.50, 0.49], [0.1, 0.9]]), message([[0.49, 0.50], [0.1, 0.9]])
    assert compare_answers(live, swapped, 0.05).what == "output 'y': 1 of 2 rows rank another class first"
    assert compare_answers(live, live, 0.05) == (True, 0.0, "")
    assert compare_answers(message([0.50, 0.49]), message([0.49, 0.50]), 0.05).agrees, "one dimension is no scores"
    assert compare_answers(message([[0.5, 0.5]]), message([[0.5, 0.5000001]]), 0.05).agrees, "a tie has no first"


@pytest.mark.parametrize(
    ("live", "shadow", "agrees"),
    [
        ([np.nan, 1.0], [np.nan, 1.0], True),
        ([np.inf, 1.0], [np.inf, 1.0], True),
        ([np.inf, 1.0], [-np.inf, 1.0], False),
        ([1.0, 1.0], [np.nan, 1.0], False),
        ([np.inf, 1.0], [3.0, 1.0], False),
        ([], [], True),
    ],
)
def test_what_is_not_finite_agrees_with_itself_only(live: list[float], shadow: list[float], agrees: bool) -> None:
    found = compare_answers(message(live), message(shadow), 0.05)
    assert (found.agrees, found.distance) == (agrees, 0.0 if agrees else np.inf)


@pytest.mark.parametrize(
    ("datatype", "same", "other"),
    [(DataType.INT64, [1, 2], [1, 3]), (DataType.BOOL, [True, False], [True, True]), (DataType.BYTES, [b"a", b"bc"], [b"a", b"bd"])],
)
def test_whole_numbers_bools_and_strings_are_equal_or_differ(datatype: DataType, same: list[Any], other: list[Any]) -> None:
    live = message(same, datatype)
    assert compare_answers(live, live, 9.0).agrees
    assert compare_answers(live, message(other, datatype), 9.0) == (False, 1.0, "output 'y': 1 of 2 elements are not equal")


@pytest.mark.parametrize(
    ("shadow", "what"),
    [
        (message([1.0], name="z"), "expected the outputs y, got z"),
        (message([1.0, 2.0]), "output 'y': expected FP32 [1], got FP32 [2]"),
        (message([1.0], DataType.FP64), "output 'y': expected FP32 [1], got FP64 [1]"),
        (b"\xff\xff", "could not be decoded"),
    ],
)
def test_answers_of_another_form_differ(shadow: bytes, what: str) -> None:
    found = compare_answers(message([1.0]), shadow, 0.05)
    assert (found.agrees, found.distance) == (False, np.inf)
    assert what in found.what


# -- mirroring ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shadow() -> Iterator[Shadow]:
    shadow = Shadow("echo", 2, 0.05, max_pairs=4)
    yield shadow
    shadow.close()
    assert shadow.join(5)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "did not happen in 5 s"
        threading.Event().wait(0.002)


@pytest.fixture
def versions() -> Iterator[Callable[..., ScriptedVersion]]:
    made: list[ScriptedVersion] = []

    def make(version: int, script: Any = echo) -> ScriptedVersion:
        made.append(ScriptedVersion(version=version, script=script))
        return made[-1]

    yield make
    for version in made:
        version.close()


def ask(shadow: Shadow, live: ScriptedVersion, candidate: Any, outlet: CollectingOutlet, request: InferRequest | None = None) -> Reply:
    reply = Reply(outlet)
    request = request or make_request()
    shadow.mirror(request, reply, candidate)
    try:
        live.submit(request, reply, 0.0)
    except HeadraceError as error:
        reply.fail(error)
    return reply


def off_by(amount: float) -> Any:
    def script(version: ScriptedVersion, request: InferRequest) -> Answer:
        array = np.frombuffer(request.inputs[0].data, np.float32).reshape(1, 4) + np.float32(amount)
        return ResponseEncoder("echo", "2", (TensorSpec("y", DataType.FP32, (-1, -1)),)).encode(request.id, (0,), [array], 0, 1, True)

    return script


Versions = Callable[..., ScriptedVersion]


def test_the_candidates_answers_are_compared_and_reach_nobody(shadow: Shadow, versions: Versions) -> None:
    live, outlet = versions(1), CollectingOutlet()
    for candidate in (versions(2), versions(2, off_by(1.0))):
        reply = ask(shadow, live, candidate, outlet, make_request(id="a"))
        assert outlet.wait(reply) == echo(live, make_request(id="a"))
        until(lambda: "pairs=0" in repr(shadow))
    found = shadow.snapshot()
    assert (found.compared, found.disagreeing, found.dropped) == (2, 1, 0)
    assert found.buckets == (1, 0, 0, 0, 0, 0, 0, 1, 0, 0)
    assert found.distance_sum == 0.5
    assert found.last_difference == "output 'y': off by 0.5, allowed 0.05"
    assert len(outlet.answers) == 2


def test_a_copy_comes_after_the_live_answer_and_without_the_callers_timeout(shadow: Shadow, versions: Versions) -> None:
    live, candidate, outlet = versions(1, hold), versions(2), CollectingOutlet()
    request = make_request()
    request.parameters = {"timeout": 5, "priority": 1}
    reply = ask(shadow, live, candidate, outlet, request)
    assert candidate.requests == []
    live.release()
    outlet.wait(reply)
    until(lambda: shadow.snapshot().compared == 1)
    assert candidate.requests[0].parameters == {"priority": 1}
    assert candidate.replies[0].deadline is None
    assert reply.outlet is outlet


def test_the_copy_of_a_request_for_classes_asks_for_the_scores(shadow: Shadow, versions: Versions) -> None:
    live, candidate, outlet = versions(1), versions(2), CollectingOutlet()
    request = make_request()
    request.outputs = [RequestedOutput("y", {"classification": 2})]
    outlet.wait(ask(shadow, live, candidate, outlet, request))
    until(lambda: shadow.snapshot().compared == 1)
    assert [(each.name, each.parameters) for each in candidate.requests[0].outputs] == [("y", {})]


def test_a_candidate_that_hangs_costs_no_more_than_the_pairs_that_may_be_in_flight(shadow: Shadow, versions: Versions) -> None:
    live, candidate, outlet = versions(1), versions(2, hold), CollectingOutlet()
    replies = []
    for _ in range(10):
        replies.append(ask(shadow, live, candidate, outlet))
        assert isinstance(outlet.wait(replies[-1]), bytes)
    until(lambda: len(candidate.requests) == 4)
    assert (shadow.snapshot().compared, shadow.snapshot().dropped) == (0, 6)
    candidate.release()
    until(lambda: shadow.snapshot().compared == 4)


@pytest.mark.parametrize("error", [NotReady("gone"), RuntimeError("broken")])
def test_a_candidate_that_raises_is_nothing_to_the_caller_nor_to_the_next_pair(
    shadow: Shadow, versions: Versions, error: Exception
) -> None:
    def refuse(version: ScriptedVersion, request: InferRequest) -> Answer:
        raise error

    live, outlet = versions(1), CollectingOutlet()
    assert isinstance(outlet.wait(ask(shadow, live, versions(2, refuse), outlet)), bytes)
    assert isinstance(outlet.wait(ask(shadow, live, versions(2, lambda v, r: BackendError("broken")), outlet)), bytes)
    assert isinstance(outlet.wait(ask(shadow, live, versions(2), outlet)), bytes)
    until(lambda: shadow.snapshot().compared == 1)
    until(lambda: "pairs=0" in repr(shadow))
    assert shadow.snapshot().dropped == isinstance(error, HeadraceError)


def test_what_failed_or_was_cancelled_live_is_not_copied(shadow: Shadow, versions: Versions) -> None:
    live, candidate, outlet = versions(1, hold), versions(2), CollectingOutlet()
    cancelled = ask(shadow, live, candidate, outlet)
    assert cancelled.cancel is not None
    cancelled.cancel(cancelled)
    failed = ask(shadow, versions(1, lambda v, r: BackendError("broken")), candidate, outlet)
    for reply, code in ((cancelled, "CANCELLED"), (failed, "INTERNAL")):
        answer = outlet.wait(reply)
        assert isinstance(answer, HeadraceError)
        assert answer.code.value == code
    until(lambda: "pairs=0" in repr(shadow))
    assert candidate.requests == []


def test_a_request_with_tensors_in_shared_memory_is_answered_and_not_copied(shadow: Shadow, versions: Versions) -> None:
    """Its client may write the next inputs once it has the answer, and reads the outputs where the copy's would come."""
    live, candidate, outlet, request = versions(1), versions(2), CollectingOutlet(), make_request()
    request.uses_regions = True
    reply = ask(shadow, live, candidate, outlet, request)
    assert isinstance(outlet.wait(reply), bytes)
    assert (shadow.snapshot().dropped, "pairs=0" in repr(shadow)) == (1, True)
    assert candidate.requests == []


def test_a_batch_of_mirrored_replies_is_still_one_hop(shadow: Shadow) -> None:
    class Counting(CollectingOutlet):
        hops = 0

        def deliver(self, answers: Sequence[tuple[Reply, Answer]]) -> None:
            self.hops += 1
            super().deliver(answers)

    outlet = Counting()
    replies = [Reply(outlet) for _ in range(3)]
    for reply in replies:
        shadow.mirror(make_request(), reply, ScriptedVersion())
    assert len({id(reply.outlet) for reply in replies}) == 1
    replies[0].outlet.deliver([(reply, BackendError("x")) for reply in replies])
    assert (outlet.hops, len(outlet.answers)) == (1, 3)


def test_an_outlet_is_not_kept_once_its_calls_are_answered(shadow: Shadow, versions: Versions) -> None:
    """Transports may make one for each call."""
    live, candidate, outlet = versions(1), versions(2), CollectingOutlet()
    reply = ask(shadow, live, candidate, outlet)
    outlet.wait(reply)
    until(lambda: shadow.snapshot().compared == 1)
    live.close()  # its thread is through with the answer
    gone = weakref.ref(outlet)
    del reply, outlet
    live.replies.clear()
    gc.collect()
    assert gone() is None


def test_a_request_that_is_submitted_again_is_mirrored_once(shadow: Shadow, versions: Versions) -> None:
    outlet, candidate, request = CollectingOutlet(), versions(2), make_request()
    reply = Reply(outlet)
    shadow.mirror(request, reply, candidate)
    shadow.mirror(request, reply, candidate)
    versions(1).submit(request, reply, 0.0)
    outlet.wait(reply)
    until(lambda: shadow.snapshot().compared == 1)
    assert len(candidate.requests) == 1


def test_close_forgets_the_pairs_and_lets_live_answers_through(versions: Versions) -> None:
    shadow, live, candidate, outlet = Shadow("echo", 2, 0.05), versions(1, hold), versions(2, hold), CollectingOutlet()
    waiting = ask(shadow, live, candidate, outlet)
    shadow.close()
    shadow.close()
    assert shadow.join(5)
    late = ask(shadow, live, candidate, outlet)
    live.release()
    assert isinstance(outlet.wait(waiting), bytes)
    assert isinstance(outlet.wait(late), bytes)
    assert candidate.requests == []
    gone = weakref.ref(shadow)
    del shadow
    gc.collect()
    assert gone() is None, "nothing of it is kept by answered replies"


def misbehaving(rng: random.Random) -> Any:
    def script(version: ScriptedVersion, request: InferRequest) -> Answer | None:
        if rng.random() < 0.4:
            raise rng.choice((NotReady("gone"), ValueError("broken")))
        return rng.choice((None, BackendError("broken"), echo(version, request)))

    return script


def walk(
    rng: random.Random, shadow: Shadow, live: ScriptedVersion, candidate: ScriptedVersion, outlet: CollectingOutlet
) -> dict[Reply, str]:
    """Forty steps of requests, answers and cancellations; the ids of what was asked."""
    asked = {}
    for step in range(40):
        action = rng.randrange(12)
        if action < 8:
            asked[ask(shadow, live, candidate, outlet, make_request(id=str(step)))] = str(step)
        elif action == 8:
            live.release()
        elif action == 9:
            candidate.release()
        elif live.held:
            reply = rng.choice(list(live.held))
            assert reply.cancel is not None
            reply.cancel(reply)
    if rng.random() < 0.5:
        shadow.close()
    live.release()
    return asked


@pytest.mark.parametrize("seed", [*range(15), random.randrange(2**32)], ids=str)
def test_live_answers_arrive_once_and_unchanged_on_random_walks(versions: Versions, seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    shadow, outlet = Shadow("echo", 2, 0.05, max_pairs=rng.randint(1, 6)), CollectingOutlet()
    live = versions(1, lambda version, request: hold(version, request) if rng.random() < 0.5 else echo(version, request))
    candidate = versions(2, misbehaving(random.Random(seed)))  # of its own: it runs on the shadow's thread
    asked = walk(rng, shadow, live, candidate, outlet)
    for reply, id in asked.items():
        answer = outlet.wait(reply)
        assert reply in live.cancelled or answer == echo(live, make_request(id=id))
    assert outlet.answers.keys() == asked.keys()
    found = shadow.snapshot()
    assert found.disagreeing == 0
    assert found.compared + found.dropped <= len(asked)
    shadow.close()
    assert shadow.join(5)


async def test_real_versions_with_batches_and_screening(tmp_path: Path) -> None:
    """Two loaded versions of which the second answers NaN: found by the comparison and by its own counters."""

    class Doubtful(FakeBackend.make()):  # type: ignore[misc]
        def execute(self, inputs: Any, outputs: Any) -> Any:
            arrays = super().execute(inputs, outputs)
            return [array * np.float32(np.nan) for array in arrays] if "/2/" in str(self.path) else arrays

    swap = Swapping(tmp_path, Doubtful)
    await swap.publish(1, 2, version_policy="all", warmup_runs=1)
    live, candidate = swap.models.resolve("m", "1"), swap.models.resolve("m", "2")
    candidate.screen_outputs(True)
    shadow, outlet = Shadow("m", 2, 0.05), CollectingOutlet()
    array = np.ones((1, 2), "<f4")
    request = InferRequest("m", "", "", [InputTensor("x", "FP32", array.shape, array.tobytes())])
    for _ in range(20):
        reply = Reply(outlet)
        shadow.mirror(request, reply, candidate)
        live.submit(request, reply, time.monotonic())
        assert array.tobytes() in await asyncio.to_thread(outlet.wait, reply)  # type: ignore[operator]
    await asyncio.to_thread(until, lambda: shadow.snapshot().compared == 20)
    assert shadow.snapshot().disagreeing == candidate.counters.snapshot().nonfinite == 20
    assert live.counters.snapshot().success == 20
    shadow.close()
    await swap.models.stop(5)


async def test_real_versions_agree_on_a_classification_by_the_scores_behind_it(tmp_path: Path) -> None:
    """The second one's scores are off by less than the tolerance, and by more than six decimals show."""

    class Near(FakeBackend.make()):  # type: ignore[misc]
        def execute(self, inputs: Any, outputs: Any) -> Any:
            arrays = super().execute(inputs, outputs)
            return [array + np.float32(0.001) for array in arrays] if "/2/" in str(self.path) else arrays

    swap = Swapping(tmp_path, Near)
    await swap.publish(1, 2, version_policy="all", warmup_runs=1)
    live, candidate = swap.models.resolve("m", "1"), swap.models.resolve("m", "2")
    shadow, outlet = Shadow("m", 2, 0.05), CollectingOutlet()
    reply = Reply(outlet)
    array = np.array([[0.25, 0.75]], "<f4")
    request = InferRequest(
        "m", "", "", [InputTensor("x", "FP32", array.shape, array.tobytes())], [RequestedOutput("y", {"classification": 1})]
    )
    shadow.mirror(request, reply, candidate)
    live.submit(request, reply, time.monotonic())
    assert b"0.750000:1" in await asyncio.to_thread(outlet.wait, reply)  # type: ignore[operator]
    await asyncio.to_thread(until, lambda: shadow.snapshot().compared == 1)
    found = shadow.snapshot()
    assert (found.disagreeing, found.dropped, found.last_difference) == (0, 0, "")
    assert found.distance_sum == pytest.approx(0.001 / 1.75, rel=1e-3)
    shadow.close()
    await swap.models.stop(5)


# -- metrics -----------------------------------------------------------------------------------------------------------------


def test_shadows_are_shown_as_metrics(shadow: Shadow, versions: Versions) -> None:
    assert shadow_lines([], False) == []
    outlet = CollectingOutlet()
    outlet.wait(ask(shadow, versions(1), versions(2, off_by(1.0)), outlet))
    until(lambda: shadow.snapshot().compared == 1)
    lines = shadow_lines([shadow.snapshot()], False)
    labels = 'model="echo",candidate="2"'
    for name, value in (
        ("compared_total", 1),
        ("disagreements_total", 1),
        ("dropped_total", 0),
        ("distance_count", 1),
        ("distance_sum", 0.5),
    ):
        assert f"headrace_shadow_{name}{{{labels}}} {value}" in lines
    assert f'headrace_shadow_distance_bucket{{{labels},le="0.1"}} 0' in lines
    assert f'headrace_shadow_distance_bucket{{{labels},le="1.0"}} 1' in lines
    assert len([line for line in lines if "_bucket" in line]) == len(DISTANCE_EDGES) + 1
