"""What every answer of a service goes through on its way out: known errors keep their text, unknown ones lose it."""

from __future__ import annotations

import uuid

import structlog

from headrace.errors import HeadraceError, ServerError

log = structlog.stdlib.get_logger(__name__)


def as_known(error: BaseException, call: str, request_id: str = "") -> HeadraceError:
    """`error` itself when it is ours. Else its traceback goes to the log, and the caller gets a fixed sentence with an id to quote."""
    if isinstance(error, HeadraceError):
        return error
    request_id = request_id or uuid.uuid4().hex[:16]
    log.error("call failed", call=call, request_id=request_id, exc_info=error)
    return ServerError(f"internal error; the server's log has the reason under request id {request_id}")
