"""What every answer of a service goes through on its way out: known errors keep their text, unknown ones lose it."""

from __future__ import annotations

import asyncio
import uuid

from headrace.errors import HeadraceError, ServerError
from headrace.telemetry.log import get_logger
from headrace.telemetry.trace_context import TraceContext

log = get_logger(__name__)


def as_known(error: BaseException, call: str, request_id: str = "", trace: TraceContext | None = None) -> HeadraceError:
    """`error` itself when it is ours. Else its traceback goes to the log, and the caller gets a fixed sentence with an id to quote.

    What is returned refers to no frames: those hold the call's message and the call itself, which holds its answer, and all of it
    would wait for the garbage collector. An overloaded server that refuses large messages would grow by them.
    """
    if isinstance(error, HeadraceError):
        error.__traceback__ = error.__context__ = error.__cause__ = None
        return error
    request_id = request_id or uuid.uuid4().hex[:16]
    where = {} if trace is None else {"trace_id": f"{trace.trace_id:032x}"}
    log.error("call failed", call=call, request_id=request_id, **where, exc_info=error)
    return ServerError(f"internal error; the server's log has the reason under request id {request_id}")


def is_cancelled() -> bool:
    """Whether the running task itself was cancelled, when a CancelledError has come up in it.

    If not, somebody cancelled a future that the task awaits. Let out of a handler of grpc.aio, that error sends no status at
    all and the caller hangs until its own deadline, if it has one: such an error is to be answered like any other.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
