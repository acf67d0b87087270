from __future__ import annotations

import pytest
from headrace.telemetry.trace_context import TraceContext, decode_traceparent, encode_traceresponse, join_tracestate

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("text", "flags"),
    [(f"00-{TRACE}-{SPAN}-01", 1), (f"00-{TRACE}-{SPAN}-00", 0), (f"00-{TRACE}-{SPAN}-03", 3), (f"cc-{TRACE}-{SPAN}-01-what-is-new", 1)],
)
def test_a_traceparent_is_read_also_in_versions_to_come(text: str, flags: int) -> None:
    assert decode_traceparent(text) == (int(TRACE, 16), int(SPAN, 16), flags)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"cc-{TRACE}-{SPAN}-01.more",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01\n",
    ],
)
def test_what_is_no_traceparent_counts_as_not_sent(text: str) -> None:
    assert decode_traceparent(text) is None


def test_tracestates_are_one_list_and_never_cut_in_two() -> None:
    assert join_tracestate(["a=1 ", "", "b=2,c=3"]) == "a=1,b=2,c=3"
    assert join_tracestate(["a=1", "b=" + "2" * 600]) == ""


def test_the_answer_names_the_servers_span() -> None:
    assert encode_traceresponse(TraceContext(int(TRACE, 16), 0xAB, int(SPAN, 16))) == f"00-{TRACE}-00000000000000ab-01"
