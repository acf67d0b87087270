"""headrace.v1.ModelFeedback: labels from clients, for any transport."""

from __future__ import annotations

import asyncio

from headrace.errors import InvalidRequest
from headrace.feedback.feedbacks import Feedbacks
from headrace.rpc.control import AsyncUnary, decode
from headrace.rpc.feedback_messages import decode_labelled, encode_joined
from headrace.wire import messages as pb

MOST_REQUESTS = 10_000
"""Of one call: some 50 ms on a thread of its own."""


class FeedbackService:
    """Owns nothing. Who may ask for inference may say how it was: it is no part of the admin service, and of its option."""

    def __init__(self, feedbacks: Feedbacks) -> None:
        self._feedbacks = feedbacks

    def methods(self) -> dict[str, AsyncUnary]:
        return {"SendFeedback": self.send_feedback}

    async def send_feedback(self, message: bytes) -> bytes:
        """Raises InvalidRequest, FailedPrecondition. Labels that cannot be joined are no error: the answer says how many there were."""
        return await asyncio.to_thread(self._send_feedback, message)

    def _send_feedback(self, message: bytes) -> bytes:
        request = decode(pb.SendFeedbackRequest, message)
        if not request.model:
            raise InvalidRequest("model: expected a name, got none")
        if request.version < 0:
            raise InvalidRequest(f"version: expected a number from 0, got {request.version}")
        if len(request.requests) > MOST_REQUESTS:
            raise InvalidRequest(f"requests: expected at most {MOST_REQUESTS} at a time, got {len(request.requests)}")
        labelled = [decode_labelled(each) for each in request.requests]
        for each in labelled:
            if (bool(each.classes) + bool(each.names) + bool(each.values)) != 1:
                raise InvalidRequest(f"request {each.id!r}: expected one kind of labels: classes, names or values")
        return encode_joined(self._feedbacks.join(request.model, request.version, labelled)).SerializeToString()
