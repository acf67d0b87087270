"""headrace.v1.ModelAdmin: what operators see of models and change about them, for any transport."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar

from google.protobuf.message import Message

from headrace.errors import Forbidden, InvalidRequest
from headrace.feedback.feedbacks import Feedbacks
from headrace.lifecycle.events import Actor, Event
from headrace.lifecycle.view import AdminView
from headrace.rpc.admin_messages import encode_event, encode_model, encode_source
from headrace.rpc.control import decode
from headrace.rpc.drift_messages import encode_report
from headrace.rpc.feedback_messages import encode_feedback
from headrace.rpc.peer import Peer
from headrace.wire import messages as pb

MAX_WAITING = 1000
"""Events that wait for one reader: as many as the log keeps, so that a watch from the start loses none of them."""

HISTORY = 50
"""The latest events that come with a model's description."""

MAX_REASON = 1000
"""Characters; reasons are kept in memory and in the audit log."""

AdminCall = Callable[[bytes, Peer], Awaitable[bytes]]
Request = TypeVar("Request", bound=Message)


def refusal(policy: str, peer: Peer, *, is_change: bool) -> str:
    """Why the policy does not let this peer do it; empty: it may."""
    if policy == "off":
        return "the admin service is switched off: expected the server's option admin to be 'local' or 'on'"
    if is_change and policy == "local" and not peer.is_local:
        return f"changes are for callers on the server's own machine, not for {peer.name}: expected the server's option admin to be 'on'"
    return ""


class AdminService:
    """Owns what each watcher has not been sent yet, nothing else. Event loop only; every call raises HeadraceError for what it refuses."""

    def __init__(self, view: AdminView, policy: str = "local", feedbacks: Feedbacks | None = None) -> None:
        self._feedbacks = feedbacks if feedbacks is not None else Feedbacks()
        self._view = view
        self._policy = policy
        self._watchers: set[_Watcher] = set()
        self._is_closed = False

    def __repr__(self) -> str:
        return f"AdminService(admin={self._policy}, {len(self._watchers)} watchers, closed={self._is_closed})"

    def methods(self) -> dict[str, AdminCall]:
        """Every unary method by name; `watch` is the stream."""
        return {
            "ListModels": self._reading(pb.ListModelsRequest, self.list_models),
            "DescribeModel": self._reading(pb.DescribeModelRequest, self.describe_model),
            "ListSources": self._reading(pb.ListSourcesRequest, self.list_sources),
            "GetDrift": self.get_drift,
            "GetFeedback": self._reading(pb.GetFeedbackRequest, self.get_feedback),
            "Promote": self._changing(pb.PromoteRequest, self.promote),
            "RollBack": self._changing(pb.RollBackRequest, self.roll_back),
            "SetLabel": self._changing(pb.SetLabelRequest, self.set_label),
            "SetTraffic": self._changing(pb.SetTrafficRequest, self.set_traffic),
        }

    def close(self) -> None:
        """End every watch once it has been sent what happened until now."""
        self._is_closed = True
        for watcher in self._watchers:
            watcher.changed.set()

    # -- reading -------------------------------------------------------------------------------------------------------

    def list_models(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[encode_model(model) for model in self._view.describe("")])

    def describe_model(self, request: pb.DescribeModelRequest) -> pb.DescribeModelResponse:
        (model,) = self._view.describe(_check_model(request.model))
        events = self._view.event_log.since(0, request.model)[-HISTORY:]
        return pb.DescribeModelResponse(model=encode_model(model), history=[encode_event(event) for event in events])

    def list_sources(self, request: pb.ListSourcesRequest) -> pb.ListSourcesResponse:
        return pb.ListSourcesResponse(sources=[encode_source(source) for source in self._view.sources()])

    def get_feedback(self, request: pb.GetFeedbackRequest) -> pb.GetFeedbackResponse:
        reports = self._feedbacks.report(_check_model(request.model), _check_version(request.version))
        return pb.GetFeedbackResponse(reports=[encode_feedback(report) for report in reports])

    async def get_drift(self, message: bytes, peer: Peer) -> bytes:
        self._check(peer, is_change=False)
        request = decode(pb.GetDriftRequest, message)
        if request.windows < 0:
            raise InvalidRequest(f"windows: expected a number from 0, got {request.windows}")
        report = self._view.drift(_check_model(request.model), _check_version(request.version))

        def encode() -> bytes:
            return pb.GetDriftResponse(report=encode_report(report, request.windows)).SerializeToString()

        # 288 windows of 37 features are 10,000 scores to encode.
        return await asyncio.to_thread(encode)

    async def watch(self, message: bytes, peer: Peer) -> AsyncGenerator[bytes, None]:
        """Kept events after the number asked for, then new ones, until the server closes or the caller goes."""
        self._check(peer, is_change=False)
        request = decode(pb.WatchEventsRequest, message)
        watcher = _Watcher(request.model, self._view.event_log.since(request.since, request.model))
        unsubscribe = self._view.event_log.subscribe(watcher.add)
        self._watchers.add(watcher)
        try:
            while True:
                watcher.changed.clear()
                if taken := watcher.take():
                    yield encode_event(*taken).SerializeToString()
                elif self._is_closed or request.until_now:
                    return
                else:
                    await watcher.changed.wait()
        finally:
            unsubscribe()
            self._watchers.discard(watcher)

    # -- changing ------------------------------------------------------------------------------------------------------

    async def promote(self, request: pb.PromoteRequest, actor: Actor) -> pb.PromoteResponse:
        await self._view.promote(_check_model(request.model), _check_version(request.version), actor)
        return pb.PromoteResponse()

    async def roll_back(self, request: pb.RollBackRequest, actor: Actor) -> pb.RollBackResponse:
        return pb.RollBackResponse(version=await self._view.roll_back(_check_model(request.model), actor))

    async def set_label(self, request: pb.SetLabelRequest, actor: Actor) -> pb.SetLabelResponse:
        await self._view.set_label(_check_model(request.model), request.label, _check_version(request.version), actor)
        return pb.SetLabelResponse()

    async def set_traffic(self, request: pb.SetTrafficRequest, actor: Actor) -> pb.SetTrafficResponse:
        version = _check_version(request.version)
        await self._view.set_traffic(_check_model(request.model), version, request.mode, request.percent, actor)
        return pb.SetTrafficResponse()

    # -- from bytes to bytes -------------------------------------------------------------------------------------------

    def _check(self, peer: Peer, *, is_change: bool) -> None:
        reason = refusal(self._policy, peer, is_change=is_change)
        if reason:
            raise Forbidden(reason)

    def _reading(self, request_class: type[Request], serve: Callable[[Request], Message]) -> AdminCall:
        async def call(message: bytes, peer: Peer) -> bytes:
            self._check(peer, is_change=False)
            return serve(decode(request_class, message)).SerializeToString()

        return call

    def _changing(self, request_class: type[Request], serve: Callable[[Request, Actor], Awaitable[Message]]) -> AdminCall:
        async def call(message: bytes, peer: Peer) -> bytes:
            self._check(peer, is_change=True)
            request = decode(request_class, message)
            reason: str = request.reason  # type: ignore[attr-defined]  # every request that changes something has one
            if len(reason) > MAX_REASON:
                raise InvalidRequest(f"reason: expected at most {MAX_REASON} characters, got {len(reason)}")
            return (await serve(request, Actor(peer.name, reason))).SerializeToString()

        return call


class _Watcher:
    """Owns what one reader has not been sent yet. When it is full, the oldest goes, and the next one sent says how many went."""

    def __init__(self, model: str, kept: Sequence[Event]) -> None:
        self.changed = asyncio.Event()
        self._model = model
        self._waiting: deque[Event] = deque(kept, maxlen=MAX_WAITING)
        self._missed = 0

    def add(self, event: Event) -> None:
        if self._model not in ("", event.model):
            return
        if len(self._waiting) == MAX_WAITING:
            self._missed += 1
        self._waiting.append(event)
        self.changed.set()

    def take(self) -> tuple[Event, int] | None:
        """The oldest, and how many were lost before it."""
        if not self._waiting:
            return None
        missed, self._missed = self._missed, 0
        return self._waiting.popleft(), missed


def _check_model(model: str) -> str:
    if not model:
        raise InvalidRequest("model: expected a name, got none")
    return model


def _check_version(version: int) -> int:
    if version < 0:
        raise InvalidRequest(f"version: expected a number from 0, got {version}")
    return version
