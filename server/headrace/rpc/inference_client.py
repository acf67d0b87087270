"""A served version that captured requests are asked of once more, over the stock protocol: any server that speaks it. Blocking."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import grpc

from headrace.capture.records import Captured, CapturedTensor
from headrace.errors import NotReady
from headrace.replay.messages import decode_answer, encode_request
from headrace.rpc.admin_client import Tls, explain, open_channel
from headrace.wire.messages import SERVICE, ModelReadyRequest, ModelReadyResponse

ANY_SIZE = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))


class RemoteTarget:
    """One model of the server at `url`. `version`: a number or a label, empty: the one that requests without a version get.

    Entering it asks whether the model is ready: raises CallFailed or NotReady where it cannot be asked at all.
    """

    def __init__(self, url: str, tls: Tls, timeout: float, model: str, version: str = "") -> None:
        self._url = url
        self._timeout = timeout
        self._model = model
        self._version = version
        self._channel = open_channel(url, tls, ANY_SIZE)

    def __enter__(self) -> RemoteTarget:
        try:
            ready = ModelReadyRequest(name=self._model, version=self._version)
            if not ModelReadyResponse.FromString(self._call("ModelReady", ready.SerializeToString())).ready:
                name = self._model + (f":{self._version}" if self._version else "")
                raise NotReady(f"{self._url} does not serve {name}: it is not ready there")
        except BaseException:
            self._channel.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._channel.close()

    def ask(self, captured: Captured) -> tuple[Mapping[str, CapturedTensor], float]:
        message = encode_request(captured, self._model, self._version)
        began = time.perf_counter()
        answer = self._call("ModelInfer", message)
        seconds = time.perf_counter() - began
        return decode_answer(answer), seconds

    def _call(self, method: str, message: bytes) -> bytes:
        call: Any = self._channel.unary_unary(f"/{SERVICE}/{method}")
        try:
            answer: bytes = call(message, timeout=self._timeout)
        except grpc.RpcError as error:
            raise explain(error, self._url, self._timeout, "inference service") from None
        return answer
