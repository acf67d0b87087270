"""Whether a server is up, asked over the protocol's own calls: any server that speaks it. Blocking."""

from __future__ import annotations

import grpc

from headrace.rpc.admin_client import Tls, explain, open_channel
from headrace.wire.messages import SERVICE, ServerLiveRequest, ServerLiveResponse, ServerReadyRequest, ServerReadyResponse


def ask_server(url: str, tls: Tls, timeout: float, *, is_live_enough: bool) -> bool:
    """Whether the server at `url` is ready, or live where that is enough. Raises CallFailed when it cannot be asked."""
    with open_channel(url, tls) as channel:
        try:
            if is_live_enough:
                answer = channel.unary_unary(f"/{SERVICE}/ServerLive")(ServerLiveRequest().SerializeToString(), timeout=timeout)
                return bool(ServerLiveResponse.FromString(answer).live)
            answer = channel.unary_unary(f"/{SERVICE}/ServerReady")(ServerReadyRequest().SerializeToString(), timeout=timeout)
            return bool(ServerReadyResponse.FromString(answer).ready)
        except grpc.RpcError as error:
            raise explain(error, url, timeout, "inference service") from None
