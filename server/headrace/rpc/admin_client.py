"""The admin service from the other side: what `headrace models` asks and has done. Blocking."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from headrace.drift.verdict import DriftReport
from headrace.errors import Code, ConfigError, HeadraceError
from headrace.feedback.feedbacks import FeedbackReport, Joined, Labelled
from headrace.lifecycle.events import Event
from headrace.lifecycle.view import ModelDescription, SourceDescription
from headrace.rpc.admin_messages import decode_event, decode_model, decode_source
from headrace.rpc.drift_messages import decode_report
from headrace.rpc.feedback_messages import decode_feedback, decode_joined, encode_labelled
from headrace.wire import messages as pb
from headrace.wire.messages import ADMIN_SERVICE, FEEDBACK_SERVICE, method_classes

UNIX = "unix:"


class CallFailed(HeadraceError):
    """The server refused, or could not be asked."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files; all empty: no TLS. `authority` alone checks the server, the other two are shown to it (mutual TLS)."""

    authority: str = ""
    certificate: str = ""
    key: str = ""

    def __post_init__(self) -> None:
        if bool(self.certificate) != bool(self.key):
            raise ConfigError("--tls-certificate and --tls-key: expected both or neither")

    @property
    def is_on(self) -> bool:
        return bool(self.authority or self.certificate)


class AdminClient:
    """One connection. Every call raises CallFailed; use it as a context manager."""

    def __init__(self, url: str, tls: Tls, timeout: float) -> None:
        self._url = url
        self._timeout = timeout
        self._channel = open_channel(url, tls)

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._channel.close()

    def list_models(self) -> list[ModelDescription]:
        return [decode_model(model) for model in self._call("ListModels", pb.ListModelsRequest()).models]

    def describe_model(self, model: str) -> tuple[ModelDescription, list[Event]]:
        answer = self._call("DescribeModel", pb.DescribeModelRequest(model=model))
        return decode_model(answer.model), [decode_event(event) for event in answer.history]

    def list_sources(self) -> list[SourceDescription]:
        return [decode_source(source) for source in self._call("ListSources", pb.ListSourcesRequest()).sources]

    def get_drift(self, model: str, version: int = 0, windows: int = 0) -> DriftReport:
        """`version` 0: the default one. `windows`: of its history, the latest; 0: all."""
        return decode_report(self._call("GetDrift", pb.GetDriftRequest(model=model, version=version, windows=windows)).report)

    def get_feedback(self, model: str, version: int = 0) -> list[FeedbackReport]:
        """`version` 0: all that take labels."""
        return [decode_feedback(each) for each in self._call("GetFeedback", pb.GetFeedbackRequest(model=model, version=version)).reports]

    def send_feedback(self, model: str, requests: Sequence[Labelled], version: int = 0) -> Joined:
        """`version` 0: whichever versions have answered them. At most feedback.MOST_REQUESTS at a time."""
        message = pb.SendFeedbackRequest(model=model, version=version, requests=[encode_labelled(each) for each in requests])
        return decode_joined(self._call("SendFeedback", message, FEEDBACK_SERVICE))

    def watch_events(self, model: str, *, since: int = 0, is_following: bool) -> Iterator[tuple[Event, int]]:
        """(event, how many were lost before it). Ends when the server stops, or with what has happened so far."""
        request_class, response_class = method_classes(ADMIN_SERVICE)["WatchEvents"]
        call = self._channel.unary_stream(
            f"/{ADMIN_SERVICE}/WatchEvents",
            request_serializer=request_class.SerializeToString,
            response_deserializer=response_class.FromString,
        )
        request = pb.WatchEventsRequest(since=since, model=model, until_now=not is_following)
        try:
            for message in call(request, timeout=None if is_following else self._timeout):
                yield decode_event(message), message.missed
        except grpc.RpcError as error:
            raise self._explain(error) from None

    def promote(self, model: str, version: int, reason: str) -> None:
        self._call("Promote", pb.PromoteRequest(model=model, version=version, reason=reason))

    def roll_back(self, model: str, reason: str) -> int:
        """The version that serves now."""
        return int(self._call("RollBack", pb.RollBackRequest(model=model, reason=reason)).version)

    def set_label(self, model: str, label: str, version: int, reason: str) -> None:
        self._call("SetLabel", pb.SetLabelRequest(model=model, label=label, version=version, reason=reason))

    def set_traffic(self, model: str, version: int, mode: str, percent: float, reason: str) -> None:
        self._call("SetTraffic", pb.SetTrafficRequest(model=model, version=version, mode=mode, percent=percent, reason=reason))

    def _call(self, method: str, request: Any, service: str = ADMIN_SERVICE) -> Any:
        request_class, response_class = method_classes(service)[method]
        call = self._channel.unary_unary(
            f"/{service}/{method}",
            request_serializer=request_class.SerializeToString,
            response_deserializer=response_class.FromString,
        )
        try:
            return call(request, timeout=self._timeout)
        except grpc.RpcError as error:
            raise self._explain(error) from None

    def _explain(self, error: Any) -> CallFailed:
        return explain(error, self._url, self._timeout, "admin service")


def open_channel(url: str, tls: Tls, options: Sequence[tuple[str, int]] = ()) -> Any:
    """Raises ConfigError for files of `tls` that cannot be used."""
    # A proxy from the environment is for the web; it would take calls to loopback too.
    options = [("grpc.enable_http_proxy", 0), *options]
    if tls.is_on and not url.startswith(UNIX):
        return grpc.secure_channel(url, _credentials(tls), options)
    return grpc.insecure_channel(url, options)


def explain(error: Any, url: str, timeout: float, service: str) -> CallFailed:
    """A grpc.RpcError in a sentence for people; `service` is what was asked of the server at `url`."""
    status: str = error.code().name
    code = Code[status] if status in Code.__members__ else Code.INTERNAL
    details = " ".join((error.details() or status).split())
    # 1. No answer at all. 2. None in time. 3. Somebody else's answer. 4. The server's own.
    if code is Code.UNAVAILABLE:
        return CallFailed(code, f"no answer from {url}: {_last_error(details)}")
    if code is Code.DEADLINE_EXCEEDED:
        return CallFailed(code, f"no answer from {url} within {timeout:g} s (--timeout); what was asked for may still happen")
    if code is Code.UNIMPLEMENTED:
        return CallFailed(code, f"{url} has no {service}: expected the gRPC address of a Headrace server")
    return CallFailed(code, details)


_WRAPPING = re.compile(r".*last error: |[A-Z_]+: (?=\S+: )|(?:ipv4|ipv6|unix):\S+: ")
"""gRPC's sentence about every address that it tried, and the address, of which our caller knows the one that it gave."""


def _last_error(details: str) -> str:
    while wrapping := _WRAPPING.match(details):
        details = details[wrapping.end() :]
    return details


def _credentials(tls: Tls) -> Any:
    authority = _read("--tls-ca", tls.authority)
    certificate = _read("--tls-certificate", tls.certificate)
    key = _read("--tls-key", tls.key)
    # gRPC itself takes any bytes and then fails every handshake.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if authority is not None:
            context.load_verify_locations(tls.authority)
    except ssl.SSLError as error:
        raise ConfigError(f"--tls-ca: expected PEM certificates in {tls.authority}: {error}") from None
    try:
        if certificate is not None:
            context.load_cert_chain(tls.certificate, tls.key)
    except ssl.SSLError as error:
        raise ConfigError(f"--tls-certificate and --tls-key: expected a matching PEM pair: {error}") from None
    return grpc.ssl_channel_credentials(authority, key, certificate)


def _read(flag: str, path: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag}: could not read {path}: {error.strerror}") from None
