"""Our errors as gRPC's statuses: the table of codes, and the text; and what else goes into the trailers."""

from __future__ import annotations

import grpc

from headrace.errors import Code, HeadraceError
from headrace.requests import Reply
from headrace.telemetry.trace_context import encode_traceresponse

STATUS: dict[Code, grpc.StatusCode] = {code: grpc.StatusCode[code.value] for code in Code}

MAX_DETAILS_BYTES = 2048
"""The text travels in the trailers, percent-encoded, so that one byte can become three; gRPC refuses trailers from 8 kB on
(random early from there, always from 16 kB), and the caller then sees RESOURCE_EXHAUSTED instead of the error."""


def status_details(error: HeadraceError) -> str:
    """The error's text, fit to be sent: valid UTF-8 without control characters, and short enough for any client.

    Texts quote names that came from clients and file systems, so they can hold anything, at any length.
    """
    text = str(error)[: MAX_DETAILS_BYTES + 1]
    if len(text) < MAX_DETAILS_BYTES // 4 and text.isprintable():
        return text
    encoded = "".join([c if c.isprintable() else " " for c in text]).encode()
    if len(encoded) <= MAX_DETAILS_BYTES:
        return encoded.decode()
    return encoded[: MAX_DETAILS_BYTES - 3].decode("utf-8", "ignore") + "..."


def answer_metadata(reply: Reply) -> tuple[tuple[str, str], ...] | None:
    """What an answer's trailers say beside its status: of a traced request, where its spans are, so that its caller finds them also
    where the trace began here. None for nothing."""
    caller = reply.caller
    if caller is None or caller.trace is None or not caller.trace.is_sampled:
        return None
    return (("traceresponse", encode_traceresponse(caller.trace)),)
