"""Calls that can be sent any number of times, and what is right to answer to each."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from loadtests.calls import (
    TOLERANCE,
    Arrays,
    decode_answer,
    difference,
    grpc_frame,
    infer_message,
    open_session,
    right_answer,
    sample_inputs,
)

INPUTS = 8
REMEMBERED = 64
"""Right answers to one request that differ in their last bits, because they come from batches of different sizes."""


@dataclass(frozen=True, slots=True)
class EncodedCall:
    """`body`: the message with gRPC's prefix; `is_right` judges a response's body, prefix and all."""

    body: bytes
    is_right: Callable[[bytes], bool]
    timeout: float | None = None
    """Seconds from the intended time of sending, given to the server as a deadline and kept by the client."""


class AnswerCheck:
    """Whether a body is one whole message with the expected outputs. Remembers bodies it found right, since most come again."""

    def __init__(self, expected: Arrays) -> None:
        self._expected = expected
        self._last: bytes | None = None
        self._right: set[bytes] = set()

    def __call__(self, body: bytes) -> bool:
        if body == self._last:  # large ones are faster compared than hashed
            return True
        if body not in self._right:
            if not is_message(body) or not self._is_close(body[5:]):
                return False
            if len(self._right) < REMEMBERED:
                self._right.add(body)
        self._last = body
        return True

    def _is_close(self, message: bytes) -> bool:
        try:
            return difference(decode_answer(message), self._expected) <= TOLERANCE
        except (DecodeError, ValueError, InferenceServerException):  # no response, or a tensor of another size than its shape says
            return False


def is_message(body: bytes) -> bool:
    """One message, not compressed, no more and no less."""
    return len(body) >= 5 and body[0] == 0 and struct.unpack_from(">I", body, 1)[0] == len(body) - 5


def encode_calls(
    model: str, path: Path, *, inputs: int = INPUTS, seed: int = 1, timeout: float | None = None, priority: int | None = None
) -> list[EncodedCall]:
    """One row each, random inputs; the right answers are ONNX Runtime's."""
    session, rng = open_session(path), np.random.default_rng(seed)
    calls = []
    for _ in range(inputs):
        arrays = sample_inputs(session, 1, rng)
        body = grpc_frame(with_priority(infer_message(model, arrays), priority))
        calls.append(EncodedCall(body, AnswerCheck(right_answer(session, arrays)), timeout))
    return calls


def with_priority(message: bytes, priority: int | None) -> bytes:
    """As tritonclient sends it."""
    if priority is None:
        return message
    request = service_pb2.ModelInferRequest.FromString(message)
    request.parameters["priority"].uint64_param = priority
    return bytes(request.SerializeToString())


def with_timeout(calls: Sequence[EncodedCall], timeout: float | None) -> list[EncodedCall]:
    return [replace(call, timeout=timeout) for call in calls]
