"""Copies of live requests for a version on trial, and the comparison of its answers with the live ones.

The life of a pair: `mirror` puts a tap before the reply's outlet; the live version answers; the tap hands that answer on, at once
and unchanged, and only then queues the copy; the shadow's own thread submits it to the candidate; the candidate's answer comes to
an outlet of the shadow; the same thread compares the two. The copy comes after the live answer, not beside it: the candidate
may run on the same cores, and a request should not wait for its own copy; what failed or was cancelled is not copied at all.

Rules for changing this file: nothing but the forwarding may happen between the live version and the caller, nothing after it may
raise or wait, and nothing of the candidate runs on a thread of the live version.
"""

from __future__ import annotations

import queue
import threading
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from headrace.errors import HeadraceError
from headrace.requests import Answer, InferRequest, Outlet, Reply, RequestedOutput
from headrace.signature import DataType, format_shape
from headrace.telemetry.log import get_logger
from headrace.threads import be_patient
from headrace.wire.classification import CLASSIFICATION, RANKABLE, decode_classes
from headrace.wire.messages import ModelInferResponse
from headrace.wire.tensors import decode_bytes_tensor

log = get_logger(__name__)

Array = NDArray[Any]

MAX_PAIRS = 64
DISTANCE_EDGES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
FARTHEST = 1e9
"""What counts in the sum of distances for those that are no number, since a sum with an infinity says nothing ever after."""
_TIE = 1e-6
"""Scores closer than that, as a part of 1 + |score|, are in no order: another order of additions swaps them."""
_ROUNDING = 0.5000001e-6
"""Of a float in a classification, which has six decimals: what they cannot tell apart is equal."""


# -- comparison: pure ------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """`distance`: the largest |a - b| / (1 + |live|) over the floating outputs; 1 for others that differ, inf for what cannot be
    compared. `what` says how they differ, or is empty."""

    agrees: bool
    distance: float
    what: str = ""


def compare_answers(live: bytes, shadow: bytes, tolerance: float) -> Comparison:
    """Compare two ModelInferResponse messages by their outputs' names. One row that differs is enough.

    A row of floats differs when an element is off by more than `tolerance` times 1 + |live|, or, where the output looks like
    scores of classes ([rows, more than one]), when it ranks another class first. NaN agrees with NaN, and an infinity with itself.
    A live classification is compared with the shadow's scores of the classes that it names: see `_copy`.
    """
    try:
        old, new = _decode(live), _decode(shadow)
    except (DecodeError, HeadraceError, ValueError, KeyError) as error:
        return Comparison(False, np.inf, f"could not be decoded: {error}")
    if old.keys() != new.keys():
        return Comparison(False, np.inf, f"expected the outputs {', '.join(old)}, got {', '.join(new)}")
    found = [_compare_output(name, output, new[name], tolerance) for name, output in old.items()]
    differing = [each.what for each in found if not each.agrees]
    return Comparison(not differing, max([each.distance for each in found], default=0.0), "; ".join(differing))


class _Output(NamedTuple):
    datatype: DataType
    array: Array


def _decode(message: bytes) -> dict[str, _Output]:
    response = ModelInferResponse.FromString(message)
    outputs = {}
    for tensor, raw in zip(response.outputs[:], response.raw_output_contents[:], strict=True):
        datatype, shape = DataType[tensor.datatype], tuple(tensor.shape[:])
        if datatype is DataType.BYTES:
            array: Array = decode_bytes_tensor(raw, int(np.prod(shape, dtype=np.int64)), tensor.name, response.model_name)
        else:
            array = np.frombuffer(raw, datatype.dtype)
        if datatype is DataType.BF16:
            array = (array.astype(np.uint32) << 16).view(np.float32)
        outputs[tensor.name] = _Output(datatype, array.reshape(shape))
    return outputs


def _compare_output(name: str, live: _Output, shadow: _Output, tolerance: float) -> Comparison:
    if live.datatype is DataType.BYTES and shadow.datatype in RANKABLE:
        named = _named_scores(live.array, shadow.array)
        if named is not None:
            return _compare_classes(name, *named, tolerance)
    if live.datatype is not shadow.datatype or live.array.shape != shadow.array.shape:
        expected, got = [f"{each.datatype.value} {format_shape(each.array.shape)}" for each in (live, shadow)]
        return Comparison(False, np.inf, f"output '{name}': expected {expected}, got {got}")
    if live.array.dtype.kind == "f":
        return _compare_floats(name, live.array, shadow.array, tolerance)
    unequal = np.count_nonzero(live.array != shadow.array)
    if unequal:
        return Comparison(False, 1.0, f"output '{name}': {unequal} of {live.array.size} elements are not equal")
    return Comparison(True, 0.0)


def _compare_floats(name: str, live: Array, shadow: Array, tolerance: float) -> Comparison:
    if not live.size:
        return Comparison(True, 0.0)
    a, b = live.astype(np.float64), shadow.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        distances = np.abs(a - b) / (1 + np.abs(a))
    # Where one is not finite the quotient is no measure: equal, both NaN, or as far apart as can be.
    finite = np.isfinite(a) & np.isfinite(b)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    distances = np.where(finite, distances, np.where(same, 0.0, np.inf))
    distance = float(distances.max())
    if distance > tolerance:
        return Comparison(False, distance, f"output '{name}': off by {distance:.3g}, allowed {tolerance:g}")
    if a.ndim == 2 and a.shape[1] > 1 and finite.all():
        swapped = _rank_differently(a, b)
        if swapped:
            return Comparison(False, distance, f"output '{name}': {swapped} of {len(a)} rows rank another class first")
    return Comparison(True, distance)


def _named_scores(strings: Array, scores: Array) -> tuple[Array, Array, Array] | None:
    """By rows: the values of a classification, the scores of the same classes, and all scores. None where these do not belong together."""
    rows = len(strings) if strings.ndim == 2 else 1
    try:
        values, classes = decode_classes(strings.reshape(rows, -1))
        every = scores.reshape(rows, -1).astype(np.float64)
        return values, np.take_along_axis(every, classes, axis=1), every
    except (ValueError, IndexError):
        return None


def _compare_classes(name: str, values: Array, chosen: Array, every: Array, tolerance: float) -> Comparison:
    with np.errstate(invalid="ignore"):
        is_same = np.abs(values - chosen) <= _ROUNDING
    found = _compare_floats(name, values, np.where(is_same, values, chosen), tolerance)
    if not found.agrees or not values.size or not np.isfinite(every).all():
        return found
    best = every.max(axis=1)
    swapped = int(np.count_nonzero(best - chosen[:, 0] > _TIE * (1 + np.abs(best))))
    if swapped:
        return Comparison(False, found.distance, f"output '{name}': {swapped} of {len(values)} rows rank another class first")
    return found


def _rank_differently(live: Array, shadow: Array) -> int:
    rows = np.arange(len(live))
    best = live.max(axis=1)
    chosen = live[rows, shadow.argmax(axis=1)]
    return int(np.count_nonzero(best - chosen > _TIE * (1 + np.abs(best))))


# -- mirroring -------------------------------------------------------------------------------------------------------------


class Candidate(Protocol):
    def submit(self, request: InferRequest, reply: Reply, arrived: float) -> None: ...


class _Pair:
    """One request and its copy; `live` and `shadow` are their answers once they are there."""

    __slots__ = ("candidate", "live", "request", "shadow")

    def __init__(self, request: InferRequest, candidate: Candidate) -> None:
        self.request: InferRequest | None = request
        self.candidate: Candidate | None = candidate
        self.live: bytes = b""
        self.shadow: bytes | None = None


class _CopyReply(Reply):
    __slots__ = ("pair",)

    def __init__(self, outlet: Outlet, pair: _Pair) -> None:
        super().__init__(outlet)
        self.pair = pair


class _Tap:
    """Stands before one outlet for the replies of `pairs`, so that a batch of them still costs that outlet one hop."""

    def __init__(self, shadow: Shadow, outlet: Outlet) -> None:
        self.outlet = outlet
        self.pairs: dict[Reply, _Pair] = {}
        self._shadow = shadow

    def deliver(self, answers: Sequence[tuple[Reply, Answer]]) -> None:
        for reply, _ in answers:
            reply.outlet = self.outlet
        self.outlet.deliver(answers)
        self._shadow._live_answered(self, answers)


class _CopyOutlet:
    """Where the candidate's answers end."""

    def __init__(self, shadow: Shadow) -> None:
        self._shadow = shadow

    def deliver(self, answers: Sequence[tuple[Reply, Answer]]) -> None:
        for reply, answer in answers:
            # Ticket and reply refer to each other.
            reply.ticket = reply.cancel = None
            assert isinstance(reply, _CopyReply)
            self._shadow._copy_answered(reply.pair, answer)


@dataclass(frozen=True, slots=True)
class ShadowSnapshot:
    """`dropped`: copies that were not made (no room, or tensors in shared memory), or that the candidate did not take. `buckets`:
    of distances, one for each of DISTANCE_EDGES and one beyond (not cumulative). A copy that the candidate failed is in the
    candidate's counters only."""

    model: str
    candidate: int
    compared: int
    disagreeing: int
    dropped: int
    buckets: tuple[int, ...]
    distance_sum: float
    last_difference: str


class Shadow:
    """Owns the pairs in flight, the counts of what was compared, and the thread that submits copies and compares, all under one
    lock. At most `max_pairs` requests and their answers are kept alive; a candidate that hangs costs that and no more."""

    def __init__(self, model: str, candidate: int, tolerance: float, max_pairs: int = MAX_PAIRS) -> None:
        self._model = model
        self._candidate = candidate
        self._tolerance = tolerance
        self._max_pairs = max_pairs
        self._lock = threading.Lock()
        self._taps: dict[int, _Tap] = {}
        self._pairs: set[_Pair] = set()
        self._outlet = _CopyOutlet(self)
        # As bounded as the pairs are: each is in it once at a time. None ends the thread.
        self._ready: queue.SimpleQueue[_Pair | None] = queue.SimpleQueue()
        self._is_closed = False
        self._compared = 0
        self._disagreeing = 0
        self._dropped = 0
        self._buckets = [0] * (len(DISTANCE_EDGES) + 1)
        self._distance_sum = 0.0
        self._last_difference = ""
        self._thread = threading.Thread(target=self._work, name=f"{model}:{candidate} shadow", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return (
            f"Shadow({self._model}:{self._candidate}, pairs={len(self._pairs)}, compared={self._compared}, "
            f"disagreeing={self._disagreeing}, dropped={self._dropped})"
        )

    def mirror(self, request: InferRequest, reply: Reply, candidate: Candidate) -> None:
        """Have `candidate` answer a copy too. Call it before the request is submitted to the live version; from any thread.

        Never raises and never waits. A reply that is mirrored already, because it is submitted again, stays as it is. A request
        with tensors in its client's shared memory is not copied: once answered, the client writes the next inputs there, and the
        copy's outputs must not come there.
        """
        with self._lock:
            if self._is_closed or isinstance(reply.outlet, _Tap):
                return
            if request.uses_regions or len(self._pairs) >= self._max_pairs:
                self._dropped += 1
                return
            pair = _Pair(request, candidate)
            self._pairs.add(pair)
            tap = self._taps.get(id(reply.outlet))
            if tap is None:
                tap = self._taps[id(reply.outlet)] = _Tap(self, reply.outlet)
            tap.pairs[reply] = pair
        reply.outlet = tap

    def _live_answered(self, tap: _Tap, answers: Sequence[tuple[Reply, Answer]]) -> None:
        with self._lock:
            for reply, answer in answers:
                pair = tap.pairs.pop(reply, None)
                if pair is None or pair not in self._pairs:
                    continue
                if isinstance(answer, bytes):
                    pair.live = answer
                    self._ready.put(pair)
                else:
                    self._pairs.discard(pair)
            if not tap.pairs and self._taps.get(id(tap.outlet)) is tap:
                # Transports may make an outlet for each call.
                del self._taps[id(tap.outlet)]

    def _copy_answered(self, pair: _Pair, answer: Answer) -> None:
        with self._lock:
            if pair not in self._pairs:
                return
            if isinstance(answer, bytes):
                pair.shadow = answer
                self._ready.put(pair)
            else:
                self._pairs.discard(pair)

    def snapshot(self) -> ShadowSnapshot:
        with self._lock:
            return ShadowSnapshot(
                self._model,
                self._candidate,
                self._compared,
                self._disagreeing,
                self._dropped,
                tuple(self._buckets),
                self._distance_sum,
                self._last_difference,
            )

    def close(self) -> None:
        """Copy nothing more and forget the pairs; live answers on their way still reach their callers. Returns at once; `join`
        waits for the thread. Idempotent."""
        with self._lock:
            self._is_closed = True
            self._pairs.clear()
            for tap in self._taps.values():
                tap.pairs.clear()
            self._taps.clear()
        self._ready.put(None)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread to end after `close`; False when it has not within `timeout`."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # -- the shadow's thread -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        be_patient()
        while (pair := self._ready.get()) is not None:
            try:
                if pair.shadow is None:
                    self._submit(pair)
                else:
                    self._compare(pair, pair.shadow)
            except Exception:
                # Whatever the candidate or its answer is like, the next pair has nothing to do with it.
                log.exception("shadow failed", model=self._model, version=self._candidate)
                with self._lock:
                    self._pairs.discard(pair)
            del pair

    def _submit(self, pair: _Pair) -> None:
        request, candidate = pair.request, pair.candidate
        # What the copy needs, the candidate's ticket keeps; the pair keeps the answers.
        pair.request = pair.candidate = None
        if request is None or candidate is None or self._is_closed:
            return
        try:
            # Arrived now: the candidate's durations are not to hold the live version's.
            candidate.submit(_copy(request), _CopyReply(self._outlet, pair), time.monotonic())
        except HeadraceError:
            with self._lock:
                self._dropped += pair in self._pairs
                self._pairs.discard(pair)

    def _compare(self, pair: _Pair, shadow: bytes) -> None:
        found = compare_answers(pair.live, shadow, self._tolerance)
        with self._lock:
            if pair not in self._pairs:
                return
            self._pairs.discard(pair)
            self._compared += 1
            self._buckets[bisect_left(DISTANCE_EDGES, found.distance)] += 1
            self._distance_sum += min(found.distance, FARTHEST)
            if not found.agrees:
                self._disagreeing += 1
                self._last_difference = found.what


def _copy(request: InferRequest) -> InferRequest:
    """Tensors are shared, nobody writes to them; how long its caller would wait is nothing to the copy. Where the caller wants a
    classification the copy asks for the scores: strings differ by their last decimals, and say nothing of the classes behind."""
    parameters = {name: value for name, value in request.parameters.items() if name != "timeout"}
    outputs = [RequestedOutput(each.name) if CLASSIFICATION in each.parameters else each for each in request.outputs]
    return InferRequest(request.model, request.version, request.id, request.inputs, outputs, parameters)
