"""What is said to whoever cannot be answered in time. gRPC's deadline has a status of its own; the request's timeout and the model's are
UNAVAILABLE, as with Triton. Pure."""

from __future__ import annotations

from headrace.errors import DeadlineExceeded, HeadraceError, QueueTimeout
from headrace.requests import Ticket


def _is_call_deadline(ticket: Ticket) -> bool:
    """Whether gRPC's deadline is the one that counts; else it is the request's timeout or the model's, which Triton calls UNAVAILABLE."""
    return ticket.reply.deadline is not None and ticket.reply.deadline <= ticket.expires


def unlikely_error(ticket: Ticket, name: str, now: float, start: float, answer: float) -> HeadraceError:
    if ticket.expires < min(start, ticket.answer_by):
        done, limit, foreseen = "started", ticket.expires, start
    else:
        done, limit, foreseen = "answered", ticket.answer_by, answer
    text = f"cannot be {done} in time by {name}: expected within {(limit - now) * 1e3:.3g} ms, foreseen in {(foreseen - now) * 1e3:.3g} ms"
    return DeadlineExceeded(f"the call {text}") if _is_call_deadline(ticket) else QueueTimeout(f"Request timeout: the request {text}")


def hopeless_error(ticket: Ticket, name: str) -> HeadraceError:
    text = f"too little time is left for {name} to answer"
    if _is_call_deadline(ticket):
        return DeadlineExceeded(f"the call's deadline cannot be met any more: {text}")
    return QueueTimeout(f"Request timeout cannot be met any more: {text}")


def expired_error(ticket: Ticket, name: str) -> HeadraceError:
    if _is_call_deadline(ticket):
        return DeadlineExceeded(f"the call's deadline passed while the request was queued for {name}")
    return QueueTimeout(f"Request timeout expired while the request was queued for {name}")
