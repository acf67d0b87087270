"""W3C trace context (www.w3.org/TR/trace-context): whose trace a request belongs to. Pure; knows nothing of who records it."""

from __future__ import annotations

import re

SAMPLED = 0x01

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MAX_STATE = 512
"""Characters of a tracestate that is passed on: what the specification asks for at least. Longer ones are left out whole, as a list
that was cut off could end in somebody's half entry."""


class TraceContext:
    """One request's place in a trace. `parent_id` is the caller's span, 0 where the trace begins here; `span_id` is the server's own
    for the request, 0 where it records none because the request is not sampled. `state`: the tracestate to go with it.
    """

    __slots__ = ("parent_id", "span_id", "state", "trace_id")

    def __init__(self, trace_id: int, span_id: int = 0, parent_id: int = 0, state: str = "") -> None:
        self.trace_id = trace_id
        self.span_id = span_id
        self.parent_id = parent_id
        self.state = state

    def __repr__(self) -> str:
        return f"TraceContext({self.trace_id:032x}, span={self.span_id:016x}, parent={self.parent_id:016x})"

    @property
    def is_sampled(self) -> bool:
        return self.span_id != 0


def decode_traceparent(text: str) -> tuple[int, int, int] | None:
    """(trace id, span id, flags); None for what is none, which then counts as not sent.

    A later version may say more, behind what is known today (section 4.3); version ff is forbidden.
    """
    match = _TRACEPARENT.fullmatch(text)
    if match is None:
        return None
    version, trace, span, flags, more = match.groups()
    trace_id, span_id = int(trace, 16), int(span, 16)
    if version == "ff" or (version == "00" and more is not None) or not trace_id or not span_id:
        return None
    return trace_id, span_id, int(flags, 16)


def join_tracestate(values: list[str]) -> str:
    """One list of what came in any number of headers (section 3.3); empty where it is too long to pass on."""
    joined = ",".join([value.strip() for value in values if value.strip()])
    return joined if len(joined) <= _MAX_STATE else ""


def encode_traceresponse(context: TraceContext) -> str:
    """What a sampled request's answer says: the same form, with the server's own span (W3C Trace Context level 2 draft, section 4)."""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-01"
